//! The locks of the directory: each is a file, and lasts until its value is dropped or its process ends.

use std::io;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::disk::DiskLock;
use crate::lock::{LockOutcome, LockWait, wait_for_lock};
use crate::policy::name::PolicyName;
use crate::snapshot::ZoneName;
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;

/// A delete phase can take long, and one that takes longer than this is left alone: the next run deletes what this
/// one could not.
const ZONE: LockWait = LockWait { poll: Duration::from_secs(1), max: Duration::from_mins(15) };

/// Deciding who takes a snapshot is a matter of two files, behind at most as many others as there are instances.
const CREATION: LockWait = LockWait { poll: Duration::from_millis(50), max: Duration::from_mins(1) };

/// A file that commands change beside a running daemon is changed within milliseconds.
const SHARED_FILE: LockWait = LockWait { poll: Duration::from_millis(20), max: Duration::from_secs(5) };

/// Whoever only looks whether a policy runs has its lock for a moment.
const POLICY: LockWait = LockWait { poll: Duration::from_millis(100), max: Duration::from_secs(1) };

/// A line of the audit log is written and synced within milliseconds, or seconds on a disk that is busy.
const AUDIT_LOG: LockWait = LockWait { poll: Duration::from_millis(10), max: Duration::from_secs(30) };

fn policy_lock(policy: &PolicyName) -> String {
    format!("policy-{policy}.lock")
}

impl StateError {
    /// Whether it says that a process runs the policy.
    pub fn is_run_of(&self, policy: &PolicyName) -> bool {
        matches!(self, Self::Locked { path, .. } if path.ends_with(policy_lock(policy)))
    }
}

impl StateDirectory {
    /// Waits until this is the only one that writes to the audit log, until the value is dropped. A stop does not end it: a step
    /// that has begun can finish.
    pub(super) async fn lock_audit_log(&self, clock: &dyn Clock) -> Result<Box<dyn DiskLock>, StateError> {
        let what = "the audit log".to_owned();
        self.lock("audit.lock", what, AUDIT_LOG, clock, &CancellationToken::new()).await
    }

    /// Makes this process the only one that runs the policy, until the value is dropped.
    ///
    /// # Errors
    /// [`StateError::Locked`] if another runs it.
    pub async fn lock_policy(
        &self,
        policy: &PolicyName,
        clock: &dyn Clock,
    ) -> Result<Box<dyn DiskLock>, StateError> {
        let (name, what) = (policy_lock(policy), format!("policy `{policy}`"));
        self.lock(&name, what, POLICY, clock, &CancellationToken::new()).await
    }

    /// Whether a process runs the policy.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub async fn is_running(&self, policy: &PolicyName) -> Result<bool, StateError> {
        match self.try_lock(policy_lock(policy), format!("policy `{policy}`")).await {
            Ok(_) => Ok(false),
            Err(StateError::Locked { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Waits until this is the only delete phase in the zone, until the value is dropped.
    ///
    /// # Errors
    /// [`StateError::Locked`] if another has been deleting there for too long, [`StateError::Stopped`].
    pub async fn lock_zone(
        &self,
        zone: &ZoneName,
        clock: &dyn Clock,
        stop: &CancellationToken,
    ) -> Result<Box<dyn DiskLock>, StateError> {
        self.lock(&format!("zone-{zone}.lock"), format!("the delete phase of zone {zone}"), ZONE, clock, stop)
            .await
    }

    /// Waits until this is the only one that decides which snapshots are taken in the zone, until the value is
    /// dropped.
    ///
    /// # Errors
    /// [`StateError::Locked`] if others have been deciding for too long, [`StateError::Stopped`].
    pub async fn lock_creation(
        &self,
        zone: &ZoneName,
        clock: &dyn Clock,
        stop: &CancellationToken,
    ) -> Result<Box<dyn DiskLock>, StateError> {
        let what = format!("the taking of snapshots in zone {zone}");
        self.lock(&format!("create-{zone}.lock"), what, CREATION, clock, stop).await
    }

    /// Changes a file that other processes change as well, one at a time: waits for the lock `<name>.lock`, and
    /// keeps it until the work is done, even if the caller is dropped meanwhile.
    pub(super) async fn change_shared<T: Send + 'static>(
        &self,
        name: &'static str,
        clock: &dyn Clock,
        stop: &CancellationToken,
        work: impl FnOnce(&Self) -> Result<T, StateError> + Send + 'static,
    ) -> Result<T, StateError> {
        let what = format!("the file of {name}");
        let lock = self.lock(&format!("{name}.lock"), what, SHARED_FILE, clock, stop).await?;
        self.blocking(move |state| {
            let done = work(state);
            drop(lock);
            done
        })
        .await
    }

    pub(super) async fn lock(
        &self,
        name: &str,
        what: String,
        wait: LockWait,
        clock: &dyn Clock,
        stop: &CancellationToken,
    ) -> Result<Box<dyn DiskLock>, StateError> {
        let path = self.path.join(name);
        match wait_for_lock(&self.disk, &path, wait, clock, stop).await {
            Ok(LockOutcome::Acquired(lock)) => Ok(lock),
            Ok(LockOutcome::GaveUp) => Err(StateError::Locked { what, path }),
            Ok(LockOutcome::Stopped) => Err(StateError::Stopped { what, path }),
            Err(source) => Err(StateError::File { verb: "lock", path, source }),
        }
    }

    async fn try_lock(&self, name: String, what: String) -> Result<Box<dyn DiskLock>, StateError> {
        self.blocking(move |state| {
            let path = state.path.join(name);
            state.disk.lock(&path).map_err(|source| match source.kind() {
                io::ErrorKind::WouldBlock => StateError::Locked { what, path },
                _ => StateError::File { verb: "lock", path, source },
            })
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::disk::RealDisk;
    use crate::sim::clock::SimClock;
    use crate::state::holds::Hold;

    fn open(path: &Path) -> StateDirectory {
        StateDirectory::open(Arc::new(RealDisk), path).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn what_root_makes_belongs_to_the_owner_of_the_directory() {
        use std::os::unix::fs::{MetadataExt as _, chown};

        use crate::state::allowances::{Allowance, AllowanceOf};

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let state = open(&path);
        if let Err(error) = chown(&path, Some(12345), Some(12346)) {
            return crate::text::skipped(format_args!("whose the files are that root makes: {error}"));
        }
        let clock = SimClock::starting_at(jiff::Timestamp::UNIX_EPOCH);
        let (policy, given_at): (PolicyName, _) = ("nightly".parse().unwrap(), jiff::Timestamp::UNIX_EPOCH);
        let snapshot = crate::snapshot::SnapshotId(uuid::Uuid::nil());
        let hold = Hold { snapshot, until: None, reason: None, since: given_at, about: None };
        state.hold(&clock, hold).await.unwrap();
        state
            .allow(
                &clock,
                Allowance {
                    of: AllowanceOf::Policy(policy.clone()),
                    zone: None,
                    deletes: 1,
                    given_at,
                    ends_at: None,
                },
            )
            .await
            .unwrap();
        drop(state.lock_policy(&policy, &clock).await.unwrap());
        for name in ["holds.json", "holds.lock", "allowances.json", "allowances.lock", "policy-nightly.lock"]
        {
            let found = std::fs::symlink_metadata(path.join(name)).unwrap();
            assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (12345, 12346, 0o600), "{name}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_policy_runs_once_at_a_time_and_others_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (open(folder.path()), open(folder.path()));
        let (nightly, weekly) = ("nightly".parse().unwrap(), "weekly".parse().unwrap());
        let clock = SimClock::starting_at(jiff::Timestamp::UNIX_EPOCH);
        let held = one.lock_policy(&nightly, &clock).await.unwrap();
        let error = other.lock_policy(&nightly, &clock).await.unwrap_err();
        assert!(error.is_run_of(&nightly) && !error.is_run_of(&weekly), "{error}");
        other.lock_policy(&weekly, &clock).await.unwrap();
        drop(held);
        other.lock_policy(&nightly, &clock).await.unwrap();
    }
}
