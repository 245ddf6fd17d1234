//! Remembers: plain files in the state directory.
//!
//! | file | holds |
//! | --- | --- |
//! | `audit.jsonl` | a line before and after everything that changes something ([`audit`]) |
//! | `policy-<name>.json` | what a policy must remember from run to run ([`policy_state`]) |
//! | `runs-<name>.json` | what came of its last runs, and the listings that they accepted ([`last_runs`]) |
//! | `schedules.json` | how far the daemon served each schedule ([`schedules`]) |
//! | `directory.lock` | nothing: that it can be locked shows that runs may write here |
//! | `daemon.lock` | which daemon works on the directory |
//! | `holds.json` | snapshots that people pinned ([`holds`]) |
//! | `allowances.json` | leave to pass the guard, once ([`allowances`]) |
//! | `policy-<name>.lock`, `zone-<name>.lock`, `create-<zone>.lock` | who runs, who deletes, who decides what is taken ([`StateDirectory::lock_policy`]) |
//! | `holds.lock`, `allowances.lock` | who changes what commands change beside a running daemon |
//!
//! Every file is for its owner alone, replaced in one step, and carries a version; one that root makes belongs
//! to the directory's owner, so that a command beside the daemon takes nothing away from it. One that can't be
//! read is an error that names it, never an empty start: an empty memory would do things twice.

pub mod allowances;
pub mod audit;
mod file;
pub mod holds;
pub mod last_runs;
pub mod policy_state;
pub mod schedules;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Clock;
use crate::disk::{self, Access, Disk, DiskLock, Kind, blocking};
use crate::policy::PolicyName;
use crate::snapshot::ZoneName;
use crate::state::audit::LogHealth;

/// Between two looks at the lock of a file that somebody else changes.
const SHARED_LOCK_POLL: Duration = Duration::from_millis(20);

/// So long the lock of a file is waited for that is changed within milliseconds.
const SHARED_LOCK_WAIT_MAX: Duration = Duration::from_secs(5);

/// Memory that fails.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The directory can't be used.
    #[error(
        "use the state directory {}: it must be a folder that this user may write (create it, or name another as `directory` under `[state]`)",
        .path.display()
    )]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file can't be read or written.
    #[error("{verb} the state file {}", .path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error(
        "the state file {} is damaged at line {line}, column {column}; restore it from a backup, or move it away if what it remembers may be forgotten",
        .path.display()
    )]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Where, from 1.
        line: usize,
        /// Where, from 1.
        column: usize,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A file of a later program.
    #[error(
        "the state file {} is of version {found}, this program knows up to {known}: it was written by a later snapwarden, use that one",
        .path.display()
    )]
    FromTheFuture {
        /// Which.
        path: PathBuf,
        /// Its version.
        found: u64,
        /// The highest that we know.
        known: u64,
    },
    /// What was written could not be made safe.
    #[error(
        "the state file {} could not be made safe from a crash before, so nothing more is begun: look after the disk, then start snapwarden anew",
        .path.display()
    )]
    Unsafe {
        /// Which.
        path: PathBuf,
    },
    /// Somebody else has the lock.
    #[error("{what} is locked by another process ({})", .path.display())]
    Locked {
        /// What the lock is for.
        what: String,
        /// The lock's file.
        path: PathBuf,
    },
}

/// The state directory.
#[derive(Debug, Clone)]
pub struct StateDirectory {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    log: Arc<LogHealth>,
}

impl StateDirectory {
    /// The directory, for reading what may be there; nothing is made or changed.
    pub fn at(disk: Arc<dyn Disk>, path: &Path) -> Self {
        Self { disk, path: path.to_owned(), log: Arc::default() }
    }

    /// Opens the directory for a run; one that is missing is made if the folder above it is there.
    ///
    /// # Errors
    /// [`StateError::Directory`] if it can't be made, is no folder, or may not be written.
    pub fn open(disk: Arc<dyn Disk>, path: &Path) -> Result<Self, StateError> {
        let state = Self::at(disk, path);
        state.prepare().map_err(|source| StateError::Directory { path: path.to_owned(), source })?;
        audit::mend(&state)?;
        Ok(state)
    }

    fn prepare(&self) -> io::Result<()> {
        match self.disk.metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let above = self.path.parent().unwrap_or(&self.path);
                if self.disk.metadata(above)?.kind != Kind::Folder {
                    return Err(io::ErrorKind::NotADirectory.into());
                }
            }
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        // What is written below a name that is not safe would be lost with it.
        disk::create_folders(&*self.disk, &self.path, Access::Owner)?;
        // Listing it and locking a file in it show what nothing but trying can: that we may read and write.
        self.disk.list(&self.path)?;
        match self.disk.lock(&self.path.join("directory.lock")) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes this process the only one that runs the policy, until the value is dropped.
    ///
    /// # Errors
    /// [`StateError::Locked`] if another runs it.
    pub fn lock_policy(&self, policy: &PolicyName) -> Result<Box<dyn DiskLock>, StateError> {
        self.lock(&format!("policy-{policy}.lock"), || format!("policy `{policy}`"))
    }

    /// Makes this the only delete phase in the zone, until the value is dropped.
    ///
    /// # Errors
    /// [`StateError::Locked`] if another deletes there.
    pub fn lock_zone(&self, zone: &ZoneName) -> Result<Box<dyn DiskLock>, StateError> {
        self.lock(&format!("zone-{zone}.lock"), || format!("the delete phase of zone {zone}"))
    }

    /// Changes a file that other processes change as well, one at a time: waits for the lock `<name>.lock`, and
    /// keeps it until the work is done, even if the caller is dropped meanwhile.
    async fn change_shared<T: Send + 'static>(
        &self,
        clock: &dyn Clock,
        name: &'static str,
        work: impl FnOnce(&Self) -> Result<T, StateError> + Send + 'static,
    ) -> Result<T, StateError> {
        let deadline = clock.elapsed() + SHARED_LOCK_WAIT_MAX;
        let lock = loop {
            match self.lock(&format!("{name}.lock"), || format!("the file of {name}")) {
                Err(StateError::Locked { .. }) if clock.elapsed() < deadline => {
                    clock.sleep(SHARED_LOCK_POLL).await;
                }
                locked => break locked?,
            }
        };
        let state = self.clone();
        blocking(move || {
            let done = work(&state);
            drop(lock);
            done
        })
        .await
    }

    /// Makes this the only one that decides which snapshots are taken in the zone, until the value is dropped.
    ///
    /// # Errors
    /// [`StateError::Locked`] if another decides that just now.
    pub fn lock_creation(&self, zone: &ZoneName) -> Result<Box<dyn DiskLock>, StateError> {
        self.lock(&format!("create-{zone}.lock"), || format!("the taking of snapshots in zone {zone}"))
    }

    fn lock(&self, name: &str, what: impl Fn() -> String) -> Result<Box<dyn DiskLock>, StateError> {
        let path = self.path.join(name);
        self.disk.lock(&path).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => StateError::Locked { what: what(), path: path.clone() },
            _ => StateError::File { verb: "lock", path: path.clone(), source },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;

    fn open(path: &Path) -> Result<StateDirectory, StateError> {
        StateDirectory::open(Arc::new(RealDisk), path)
    }

    #[test]
    fn a_missing_directory_is_made_only_below_one_that_exists() {
        let folder = tempfile::tempdir().unwrap();
        assert!(open(&folder.path().join("state")).is_ok());
        let error = open(&folder.path().join("a/b")).unwrap_err();
        assert!(error.to_string().contains("a/b"), "{error}");
    }

    #[test]
    fn a_file_in_the_place_of_the_directory_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        crate::disk::replace_file(&RealDisk, &path, b"", Access::Owner).unwrap();
        assert!(matches!(open(&path), Err(StateError::Directory { .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn what_root_makes_belongs_to_the_owner_of_the_directory() {
        use std::os::unix::fs::{MetadataExt as _, chown};

        use crate::sim::clock::SimClock;
        use crate::state::allowances::Allowance;

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let state = open(&path).unwrap();
        if let Err(error) = chown(&path, Some(12345), Some(12346)) {
            return crate::text::skipped(format_args!("whose the files are that root makes: {error}"));
        }
        let clock = SimClock::starting_at(jiff::Timestamp::UNIX_EPOCH);
        let (policy, given_at): (PolicyName, _) = ("nightly".parse().unwrap(), jiff::Timestamp::UNIX_EPOCH);
        let snapshot = crate::snapshot::SnapshotId(uuid::Uuid::nil());
        let hold = holds::Hold { snapshot, until: None, reason: None, since: given_at };
        state.hold(&clock, hold).await.unwrap();
        state
            .allow(&clock, Allowance { policy: policy.clone(), zone: None, deletes: 1, given_at })
            .await
            .unwrap();
        drop(state.lock_policy(&policy).unwrap());
        for name in ["holds.json", "holds.lock", "allowances.json", "allowances.lock", "policy-nightly.lock"]
        {
            let found = std::fs::symlink_metadata(path.join(name)).unwrap();
            assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (12345, 12346, 0o600), "{name}");
        }
    }

    #[test]
    fn a_policy_runs_once_at_a_time_and_others_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (open(folder.path()).unwrap(), open(folder.path()).unwrap());
        let (nightly, weekly) = ("nightly".parse().unwrap(), "weekly".parse().unwrap());
        let held = one.lock_policy(&nightly).unwrap();
        assert!(matches!(other.lock_policy(&nightly), Err(StateError::Locked { .. })));
        other.lock_policy(&weekly).unwrap();
        drop(held);
        other.lock_policy(&nightly).unwrap();
    }
}
