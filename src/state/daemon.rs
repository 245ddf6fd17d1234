//! The daemon that works on the directory: that there is one, and where it listens.
//!
//! Its lock says whether it runs, since that ends with its process. The file with its address stays.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::disk::DiskLock;
use crate::lock::LockWait;
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;

/// The version of the file that this program writes.
const VERSION: u64 = 1;

const FILE: &str = "daemon.json";

const LOCK: &str = "daemon.lock";

/// A command that looks whether a daemon runs has the lock for less than a millisecond.
const WAIT: LockWait = LockWait { poll: Duration::from_millis(20), max: Duration::from_millis(500) };

/// What the file holds.
#[derive(Debug, Default, Serialize, Deserialize)]
struct DaemonFile {
    address: Option<SocketAddr>,
}

impl StateDirectory {
    /// Makes this process the only daemon on the directory, until the value is dropped.
    ///
    /// # Errors
    /// [`StateError::Locked`] if there is another one.
    pub async fn lock_daemon(&self, clock: &dyn Clock) -> Result<Box<dyn DiskLock>, StateError> {
        let what = format!("the state directory {}", self.path.display());
        self.lock(LOCK, what, WAIT, clock, &CancellationToken::new()).await
    }

    /// Whether a daemon works on the directory.
    ///
    /// # Errors
    /// [`StateError::File`] if there is no directory, or this user may not see its lock.
    pub async fn has_daemon(&self) -> Result<bool, StateError> {
        self.blocking(|state| {
            let failed = |path, source| StateError::File { verb: "look at", path, source };
            state.disk.metadata(&state.path).map_err(|error| failed(state.path.clone(), error))?;
            let path = state.path.join(LOCK);
            // To lock it would create it.
            let locked = state.disk.metadata(&path).and_then(|_| state.disk.lock(&path).map(drop));
            match locked.map_err(|error| (error.kind(), error)) {
                Ok(()) | Err((io::ErrorKind::NotFound, _)) => Ok(false),
                Err((io::ErrorKind::WouldBlock, _)) => Ok(true),
                Err((_, error)) => Err(failed(path, error)),
            }
        })
        .await
    }

    /// Where the daemon listens, or the last one did; none if no daemon has said so.
    ///
    /// # Errors
    /// A file that can't be read, is damaged, or was written by a later program.
    pub async fn daemon_address(&self) -> Result<Option<SocketAddr>, StateError> {
        Ok(self.load::<DaemonFile>(FILE, VERSION).await?.address)
    }

    /// Says where the daemon listens.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub async fn set_daemon_address(&self, address: SocketAddr) -> Result<(), StateError> {
        self.save(FILE, VERSION, DaemonFile { address: Some(address) }).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::disk::{Disk as _, RealDisk};
    use crate::sim::clock::SimClock;

    #[tokio::test(start_paused = true)]
    async fn a_daemon_is_seen_by_its_lock_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let clock = SimClock::starting_at(jiff::Timestamp::UNIX_EPOCH);
        let reader = StateDirectory::at(Arc::new(RealDisk), &path);
        assert!(matches!(reader.has_daemon().await, Err(StateError::File { .. })), "no directory");
        let state = StateDirectory::open(Arc::new(RealDisk), &path).unwrap();
        assert!(!reader.has_daemon().await.unwrap());
        assert!(RealDisk.metadata(&path.join(LOCK)).is_err(), "looking creates nothing");
        let lock = state.lock_daemon(&clock).await.unwrap();
        assert!(reader.has_daemon().await.unwrap());
        assert!(matches!(reader.lock_daemon(&clock).await, Err(StateError::Locked { .. })));
        assert_eq!(reader.daemon_address().await.unwrap(), None);
        let address = "127.0.0.1:9788".parse().unwrap();
        state.set_daemon_address(address).await.unwrap();
        drop(lock);
        assert!(!reader.has_daemon().await.unwrap(), "whatever the file says");
        assert_eq!(reader.daemon_address().await.unwrap(), Some(address));
    }
}
