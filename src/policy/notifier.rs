//! Who is notified, and of what.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::policy::name::NotifierName;

/// A notifier. Its secret is in a file or a systemd credential of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotifierSettings {
    /// Unique in a configuration.
    pub name: NotifierName,
    /// How it is reached.
    pub kind: NotifierKind,
    /// The file with the address, or with the password of a mail server.
    pub secret_file: Option<PathBuf>,
    /// What it is notified of.
    pub on: BTreeSet<Event>,
    /// What lasts is repeated after this long.
    pub repeat: Duration,
}

/// How a notifier is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotifierKind {
    /// A POST to an address, which is a secret.
    Webhook {
        /// The form of the body.
        format: WebhookFormat,
    },
    /// The pings of healthchecks.io, by an address that is a secret.
    Healthchecks {
        /// Whether the body may have names of policies, zones and instances.
        details: bool,
    },
    /// Mail by SMTP.
    Mail(MailSettings),
}

/// The form of a webhook's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WebhookFormat {
    /// Of its own.
    Json,
    /// As Slack and those that follow it take it.
    Slack,
}

/// A mail server, and between whom the mail is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MailSettings {
    /// The server's name or address.
    pub server: String,
    /// Its port.
    pub port: u16,
    /// How the connection is encrypted.
    pub tls: MailTls,
    /// Without one there is no login.
    pub username: Option<String>,
    /// The sender's address.
    pub from: String,
    /// The recipients' addresses; at least one.
    pub to: Vec<String>,
}

/// How the connection to a mail server is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MailTls {
    /// By the command STARTTLS, which the server must know.
    StartTls,
    /// From the first byte.
    Implicit,
    /// Not at all: for a server on this machine alone.
    None,
}

/// What a notifier may be notified of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A run failed, or failed in part.
    Failure,
    /// The guard blocks deletions.
    Held,
    /// What was notified of is over.
    Recovered,
    /// An instance is not listed any more.
    Vanished,
    /// An instance is without a backup.
    Uncovered,
    /// The newest good snapshot of an instance is too old.
    Stale,
    /// A copy is missing or damaged.
    Corrupt,
    /// Deletions wait until a change has settled.
    Pending,
    /// A snapshot vanished, and nothing explains it.
    Unexplained,
}

impl Event {
    /// All of them, by their names in the configuration and in JSON.
    pub const ALL: [(&'static str, Self); 9] = [
        ("failure", Self::Failure),
        ("held", Self::Held),
        ("recovered", Self::Recovered),
        ("vanished", Self::Vanished),
        ("uncovered", Self::Uncovered),
        ("stale", Self::Stale),
        ("corrupt", Self::Corrupt),
        ("pending", Self::Pending),
        ("unexplained", Self::Unexplained),
    ];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(_, event)| *event == self).map_or("", |(name, _)| name)
    }
}
