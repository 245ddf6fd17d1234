//! How restic can fail, in words that say what to do about it.

use std::path::PathBuf;

use crate::archive::transfer::sink::SinkError;
use crate::clock::TimedOut;
use crate::process::ProgramError;
use crate::text::excerpt;

/// A call of restic that failed: the action, the repository, and the cause.
#[derive(Debug, thiserror::Error)]
#[error("{doing} in the restic repository {repository}")]
pub struct ResticError {
    doing: &'static str,
    repository: String,
    #[source]
    pub(super) cause: ResticCause,
}

/// What went wrong with a call.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResticCause {
    /// It did not start.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// Its end is not known, or its output was not read.
    #[error("its output cannot be read")]
    Broken(#[from] std::io::Error),
    /// It did not end, or took no bytes, in time.
    #[error(transparent)]
    TimedOut(#[from] TimedOut),
    /// Another process works in the repository.
    #[error("it is locked by another process ({0}); if none works in it any more: restic unlock")]
    Locked(String),
    /// There is no repository.
    #[error("there is no repository ({0}): correct `repository`, or create it with `restic init`")]
    Missing(String),
    /// The password is not that of the repository.
    #[error("the password is wrong ({0}): correct the file that `password_file` names")]
    Password(String),
    /// There is no space left.
    #[error("there is no space left ({0}): free some space there")]
    Full(String),
    /// The repository has lost or damaged data.
    #[error("the repository has lost data, or it is damaged ({0}): `restic check --read-data` says how much")]
    Damaged(String),
    /// It left out snapshots that it cannot read.
    #[error(
        "its listing lacks a snapshot that restic cannot read ({0}): let this user read all of the repository; if the file is damaged, \
         `restic check` names it, and without it the others are listed"
    )]
    Incomplete(String),
    /// It ended with an error.
    #[error("restic failed: {0}")]
    Failed(String),
    /// It said something that no known version says.
    #[error("restic said something unexpected ({0}): is it version 0.14 or later?")]
    Unexpected(String),
    /// Another run, or another process of this machine, works on the same image.
    #[error("it is being stored or changed at this moment by another run")]
    Busy,
    /// An image can't be locked.
    #[error("cannot lock {}", .0.display())]
    Lock(PathBuf, #[source] std::io::Error),
    /// What the repository holds is not what was sent.
    #[error("{0}")]
    Differs(String),
}

/// What restic says of a snapshot that it leaves out of a listing, by its `internal/restic/snapshot_find.go` and `cmd/restic/find.go`.
const UNREAD: [&str; 2] = ["could not load snapshot", "Ignoring "];

/// What restic says where a blob can't be had any more, by whichever backend.
const DAMAGES: [&str; 6] = [
    "ciphertext verification failed",
    "no such file or directory",
    "does not exist",
    "not found",
    "unexpected EOF",
    "returned invalid data",
];

impl ResticCause {
    /// The cause by what restic wrote to its standard error, from which secrets were removed.
    pub(super) fn of(status: &str, text: &str) -> Self {
        let line = |part: &str| text.lines().find(|line| line.contains(part));
        let said = |line: &str| excerpt(line.trim(), 300);
        if let Some(line) = line("already locked") {
            return Self::Locked(said(line));
        }
        if let Some(line) = line("wrong password") {
            return Self::Password(said(line));
        }
        if text.contains("Is there a repository at the following location?") {
            return Self::Missing(said(text.lines().next().unwrap_or_default()));
        }
        if let Some(line) = line("no space left on device").or_else(|| line("disk quota exceeded")) {
            return Self::Full(said(line));
        }
        if let Some(line) =
            line("cannot dump file").filter(|line| DAMAGES.iter().any(|damage| line.contains(damage)))
        {
            return Self::Damaged(said(line));
        }
        // The last line is the error; what comes before it is what went on.
        let last = text.lines().rfind(|line| !line.trim().is_empty());
        Self::Failed(last.map_or_else(|| status.to_owned(), |line| format!("{} ({status})", said(line))))
    }

    /// The snapshot that a listing lacks, by what restic wrote to its standard error, from which secrets were removed.
    pub(super) fn unread(text: &str) -> Option<Self> {
        let line = text.lines().find(|line| UNREAD.iter().any(|unread| line.contains(unread)))?;
        Some(Self::Incomplete(excerpt(line.trim(), 300)))
    }
}

impl ResticError {
    pub(super) fn new(doing: &'static str, repository: &str, cause: ResticCause) -> Self {
        Self { doing, repository: repository.to_owned(), cause }
    }

    /// Whether another process, or another run of this one, has to end first.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self.cause, ResticCause::Busy | ResticCause::Locked(_))
    }

    /// Whether another attempt may succeed.
    pub(super) fn is_transient(&self) -> bool {
        matches!(self.cause, ResticCause::Locked(_) | ResticCause::TimedOut(_) | ResticCause::Failed(_))
    }

    /// The same as an error of an archive that was to be written.
    pub(crate) fn into_sink_error(self, doing: impl Into<String>) -> SinkError {
        let is_full = matches!(self.cause, ResticCause::Full(_));
        SinkError::Remote { doing: doing.into(), is_full, source: Box::new(self) }
    }
}
