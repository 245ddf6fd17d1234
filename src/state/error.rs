//! How the state directory fails.

use std::io;
use std::path::{Path, PathBuf};

use crate::policy::shard::Shard;
use crate::text::json_error;

/// What is wrong with the text of a file. It may quote some of it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Damage(String);

/// The state directory can't be used as it should.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The directory can't be used.
    #[error(
        "use the state directory {}: it must be a folder that this user may write (create it, or name another as `directory` under `[state]`)",
        .path.display()
    )]
    Directory {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file can't be read or written.
    #[error("{verb} the state file {}", .path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error(
        "the state file {} is damaged at line {line}, column {column}; restore it from a backup, or move it away if what it remembers may be forgotten",
        .path.display()
    )]
    Damaged {
        /// Its path.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
        /// The cause.
        #[source]
        source: Damage,
    },
    /// A file was lost, or restored from a backup: the changes beside it are of a later one.
    #[error(
        "the state file {path} is missing, or older than {newer}, which has changes of a later one: restore the newest {path}. If there is none, move {newer} \
         to another folder: then it is forgotten which snapshots and templates the policy made since",
        path = .path.display(), newer = .newer.display()
    )]
    Outdated {
        /// Its path.
        path: PathBuf,
        /// The changes.
        newer: PathBuf,
    },
    /// A file of a later program.
    #[error(
        "the state file {} is of version {found}, this program knows up to {known}: it was written by a later snapwarden, use that one",
        .path.display()
    )]
    FromTheFuture {
        /// Its path.
        path: PathBuf,
        /// Its version.
        found: u64,
        /// The highest that we know.
        known: u64,
    },
    /// An earlier line of the audit log could not be made safe.
    #[error(
        "the state file {} could not be made safe from a crash before, so nothing more is begun: check the disk, then restart snapwarden",
        .path.display()
    )]
    Unsafe {
        /// Its path.
        path: PathBuf,
    },
    /// Another process, or another run in this one, has the lock.
    #[error("{what} is locked by another process ({})", .path.display())]
    Locked {
        /// What the lock is for.
        what: String,
        /// The lock's file.
        path: PathBuf,
    },
    /// It is about another part of the instances.
    #[error(
        "the state directory {} was made for {}, and this is {}: nothing is done. To make it that one, which tells what moves: snapwarden shard adopt{}",
        .path.display(), described(*.made_for), described(*.wanted), .wanted.map_or_else(String::new, |shard| format!(" --shard {shard}"))
    )]
    OtherShard {
        /// Its path.
        path: PathBuf,
        /// The part that it is about; none for all instances.
        made_for: Option<Shard>,
        /// The part that this process is for.
        wanted: Option<Shard>,
    },
    /// A stop came while another had the lock.
    #[error("stopping, and not waiting any longer for {what}, which is locked by another process ({})", .path.display())]
    Stopped {
        /// What the lock is for.
        what: String,
        /// The lock's file.
        path: PathBuf,
    },
}

impl StateError {
    /// The file at this path has an error at this line.
    pub(super) fn damaged(path: &Path, line: usize, error: &serde_json::Error) -> Self {
        let source = Damage(json_error(error));
        Self::Damaged { path: path.to_owned(), line, column: error.column(), source }
    }
}

/// A part of the instances, for people.
pub fn described(shard: Option<Shard>) -> String {
    shard.map_or_else(|| "all instances (no shard)".to_owned(), |shard| format!("shard {shard}"))
}
