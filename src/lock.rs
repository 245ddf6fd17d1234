//! Waiting for a lock that another process, or another run in this one, has.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::disk::{Disk, DiskLock, blocking};

/// How often and how long a lock is tried.
#[derive(Debug, Clone, Copy)]
pub struct LockWait {
    /// Between two attempts.
    pub poll: Duration,
    /// No attempt follows one that ended after this; with zero there is one attempt.
    pub max: Duration,
}

/// How waiting for a lock ended.
#[derive(Debug)]
pub enum LockOutcome {
    /// It is ours until the value is dropped.
    Acquired(Box<dyn DiskLock>),
    /// Another still had it after [`LockWait::max`].
    GaveUp,
    /// The stop came first.
    Stopped,
}

/// Tries a lock until it is acquired, the time is over, or `stop` is cancelled.
///
/// A stop ends the waiting, not an attempt: a lock that is free is acquired also after a stop, so that a step that
/// has begun can finish.
///
/// # Errors
/// The disk's, if the lock's file can't be opened or locked.
pub async fn wait_for_lock(
    disk: &Arc<dyn Disk>,
    path: &Path,
    wait: LockWait,
    clock: &dyn Clock,
    stop: &CancellationToken,
) -> io::Result<LockOutcome> {
    let deadline = clock.elapsed() + wait.max;
    loop {
        let (disk, path) = (Arc::clone(disk), path.to_owned());
        match blocking(move || disk.lock(&path)).await {
            Ok(lock) => return Ok(LockOutcome::Acquired(lock)),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            Err(_) if clock.elapsed() >= deadline => return Ok(LockOutcome::GaveUp),
            Err(_) => {}
        }
        if stop.run_until_cancelled(clock.sleep(wait.poll)).await.is_none() {
            return Ok(LockOutcome::Stopped);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::join;
    use jiff::Timestamp;

    use super::*;
    use crate::disk::Access;
    use crate::sim::clock::SimClock;
    use crate::sim::disk::MemoryDisk;

    const WAIT: LockWait = LockWait { poll: Duration::from_secs(1), max: Duration::from_secs(10) };

    struct Bench {
        disk: Arc<dyn Disk>,
        clock: SimClock,
        stop: CancellationToken,
    }

    impl Bench {
        fn new() -> Self {
            let memory = MemoryDisk::new();
            memory.create_dir_all(Path::new("/srv"), Access::Owner).unwrap();
            Self {
                disk: Arc::new(memory),
                clock: SimClock::starting_at(Timestamp::UNIX_EPOCH),
                stop: CancellationToken::new(),
            }
        }

        fn path() -> &'static Path {
            Path::new("/srv/one.lock")
        }

        async fn wait(&self) -> (io::Result<LockOutcome>, u64) {
            let before = self.clock.elapsed();
            let outcome = wait_for_lock(&self.disk, Self::path(), WAIT, &self.clock, &self.stop).await;
            (outcome, self.clock.elapsed().saturating_sub(before).as_secs())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_free_lock_is_acquired_at_once_and_kept_until_it_is_dropped() {
        let bench = Bench::new();
        let (outcome, seconds) = bench.wait().await;
        assert!(matches!(outcome, Ok(LockOutcome::Acquired(_))), "{outcome:?}");
        assert_eq!(seconds, 0);
        assert!(bench.disk.lock(Bench::path()).is_err());
        drop(outcome);
        bench.disk.lock(Bench::path()).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_lock_is_acquired_once_the_other_drops_it() {
        let bench = Bench::new();
        let other = bench.disk.lock(Bench::path()).unwrap();
        let release = async {
            bench.clock.sleep(Duration::from_millis(4500)).await;
            drop(other);
        };
        let ((outcome, seconds), ()) = join(bench.wait(), release).await;
        assert!(matches!(outcome, Ok(LockOutcome::Acquired(_))), "{outcome:?}");
        assert_eq!(seconds, 5, "at the next attempt");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lock_that_another_keeps_is_given_up_after_the_longest_wait() {
        let bench = Bench::new();
        let _other = bench.disk.lock(Bench::path()).unwrap();
        let (outcome, seconds) = bench.wait().await;
        assert!(matches!(outcome, Ok(LockOutcome::GaveUp)), "{outcome:?}");
        assert_eq!(seconds, WAIT.max.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_ends_the_waiting_at_once() {
        let bench = Bench::new();
        let _other = bench.disk.lock(Bench::path()).unwrap();
        let stop = async {
            bench.clock.sleep(Duration::from_millis(2500)).await;
            bench.stop.cancel();
            bench.clock.elapsed()
        };
        let ((outcome, _), stopped_at) = join(bench.wait(), stop).await;
        assert!(matches!(outcome, Ok(LockOutcome::Stopped)), "{outcome:?}");
        assert_eq!(bench.clock.elapsed(), stopped_at, "not only at the next attempt");
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_stop_a_free_lock_is_acquired_and_another_is_not_waited_for() {
        let bench = Bench::new();
        bench.stop.cancel();
        assert!(matches!(bench.wait().await, (Ok(LockOutcome::Acquired(_)), 0)));
        let _other = bench.disk.lock(Bench::path()).unwrap();
        assert!(matches!(bench.wait().await, (Ok(LockOutcome::Stopped), 0)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lock_that_cannot_be_tried_is_an_error_and_not_waited_for() {
        let bench = Bench::new();
        let error = wait_for_lock(&bench.disk, Path::new("/none/one.lock"), WAIT, &bench.clock, &bench.stop)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(bench.clock.elapsed(), Duration::ZERO);
    }
}
