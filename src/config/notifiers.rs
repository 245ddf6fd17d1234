//! Reads the notifiers.

use std::collections::BTreeSet;
use std::time::Duration;

use url::Host;

use crate::config::toml_reader::{Table, Value};
use crate::policy::name::NotifierName;
use crate::policy::notifier::{Event, MailSettings, MailTls, NotifierKind, NotifierSettings, WebhookFormat};

/// Once a day is often enough to be reminded.
const REPEAT: Duration = Duration::from_hours(24);
/// What a person has to look at, and when that is over.
const ON: [Event; 3] = [Event::Failure, Event::Held, Event::Recovered];
/// More is a mailing list.
const RECIPIENTS_MAX: usize = 20;
/// RFC 5321 allows no longer address.
const ADDRESS_MAX: usize = 254;

/// The keys that notifiers of one type or of two have, with these types.
const KEYS_OF_TYPES: [(&str, &[&str]); 10] = [
    ("url_file", &["webhook", "healthchecks"]),
    ("format", &["webhook"]),
    ("details", &["healthchecks"]),
    ("server", &["mail"]),
    ("port", &["mail"]),
    ("tls", &["mail"]),
    ("username", &["mail"]),
    ("password_file", &["mail"]),
    ("from", &["mail"]),
    ("to", &["mail"]),
];

/// All notifiers, in the order of the file.
pub(super) fn read(table: &Table<'_>) -> Vec<NotifierSettings> {
    let named = table.named::<NotifierName>();
    named.into_iter().filter_map(|(name, notifier)| read_notifier(name, &notifier)).collect()
}

fn read_notifier(name: NotifierName, table: &Table<'_>) -> Option<NotifierSettings> {
    let types = ["webhook", "healthchecks", "mail"].map(|name| (name, name));
    let help = "write `type = \"webhook\"`, `type = \"healthchecks\"` or `type = \"mail\"`";
    let of_type = table.required("type", help).and_then(|value| value.choice(&types));
    for (key, types) in KEYS_OF_TYPES {
        let Some(value) = table.value(key) else { continue };
        if let Some(of_type) = of_type.filter(|of_type| !types.contains(of_type)) {
            let fact = format!("a notifier of type `{of_type}` has no such key");
            let types: Vec<String> = types.iter().map(|name| format!("`{name}`")).collect();
            value
                .place()
                .wrong(fact, format!("take it out: it is for notifiers of type {}", types.join(" and ")));
        }
    }
    let on = table.value("on").map(|list| {
        let events = list
            .list(Some("name at least one, such as `on = [\"failure\"]`"), |word| word.choice(&Event::ALL));
        events.into_iter().collect::<BTreeSet<Event>>()
    });
    let repeat = table.read("repeat", Value::duration).unwrap_or(REPEAT);
    let of_type = of_type?;
    let secret = if of_type == "mail" { "password_file" } else { "url_file" };
    let kind = match of_type {
        "webhook" => {
            let formats = [("json", WebhookFormat::Json), ("slack", WebhookFormat::Slack)];
            NotifierKind::Webhook { format: table.choice("format", &formats).unwrap_or(WebhookFormat::Json) }
        }
        "healthchecks" => {
            NotifierKind::Healthchecks { details: table.read("details", Value::boolean).unwrap_or(false) }
        }
        _ => NotifierKind::Mail(read_mail(table)?),
    };
    Some(NotifierSettings {
        name,
        kind,
        secret_file: table.read(secret, Value::path),
        on: on.unwrap_or_else(|| ON.into()),
        repeat,
    })
}

fn read_mail(table: &Table<'_>) -> Option<MailSettings> {
    let modes = [("starttls", MailTls::StartTls), ("implicit", MailTls::Implicit), ("none", MailTls::None)];
    let tls = table.choice("tls", &modes).unwrap_or(MailTls::StartTls);
    let server = table
        .required("server", "write the mail server's name, such as `server = \"mail.example.com\"`")
        .and_then(|value| value.written("a server's name", "a host name or an IP address alone", is_host));
    let is_local = server.as_deref().is_none_or(is_this_machine);
    if tls == MailTls::None
        && !is_local
        && let Some(value) = table.value("tls")
    {
        value.place().wrong(
            "mail to another machine can be read and changed on the way",
            "use `\"starttls\"` or `\"implicit\"`; `\"none\"` is for a server on this machine",
        );
    }
    let port = match tls {
        MailTls::StartTls => 587,
        MailTls::Implicit => 465,
        MailTls::None => 25,
    };
    let from = table.required("from", "write the sender, such as `from = \"snapwarden@example.com\"`");
    let to = table.required("to", "write who gets the mail, such as `to = [\"ops@example.com\"]`");
    let recipients = to.map(|list| {
        let all = list.list(Some("name at least one, such as `to = [\"ops@example.com\"]`"), read_address);
        if all.len() > RECIPIENTS_MAX {
            list.place().wrong(
                format!("there are more than {RECIPIENTS_MAX} recipients"),
                "write the address of a mailing list",
            );
        }
        all
    });
    let username = table.value("username").and_then(|value| value.line(ADDRESS_MAX));
    if let (Some(value), None) = (table.value("password_file"), &username) {
        value.place().wrong("there is a password, but no `username`", "write both, or neither");
    }
    Some(MailSettings {
        port: table.number("port", 1..=65535).unwrap_or(port),
        tls,
        username,
        from: from.and_then(|value| read_address(&value))?,
        to: recipients?,
        server: server?,
    })
}

fn read_address(value: &Value<'_>) -> Option<String> {
    value.written("a mail address", "one plain address, such as `ops@example.com`", is_address)
}

/// One that needs no quotes: it stands in commands and headers.
fn is_address(text: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b".!#$%&'*+-/=?^_`{|}~".contains(&b);
    text.len() <= ADDRESS_MAX
        && text.split_once('@').is_some_and(|(user, host)| {
            !user.is_empty() && user.bytes().all(is_plain) && !host.contains('@') && is_host(host)
        })
}

fn is_host(text: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-.:".contains(&b);
    (1..=253).contains(&text.len()) && text.bytes().all(is_plain)
}

fn is_this_machine(host: &str) -> bool {
    let is_loopback = |address: std::net::IpAddr| address.is_loopback();
    matches!(Host::parse(host), Ok(Host::Domain(name)) if name == "localhost")
        || host.parse().is_ok_and(is_loopback)
}
