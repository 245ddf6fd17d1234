//! Snapshots on hold: whatever the policies say, they are kept.
//!
//! Commands change the file, also beside a running daemon, so it has a lock of its own.
//! Reading needs none, since the file is replaced in one step.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::lookup::Known;
use crate::snapshot::{SnapshotId, ZoneName};
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;

/// The version of the file that this program writes.
const VERSION: u64 = 1;

const FILE: &str = "holds.json";

/// Every hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holds {
    /// In the order in which they were put; expired ones may be among them until the next change.
    pub holds: Vec<Hold>,
}

/// A hold on one snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// The snapshot that is on hold.
    pub snapshot: SnapshotId,
    /// The hold ends at this instant; without it, it never ends.
    #[serde(default)]
    pub until: Option<Timestamp>,
    /// The user's reason: untrusted text.
    #[serde(default)]
    pub reason: Option<String>,
    /// When the hold began.
    pub since: Timestamp,
    /// What the snapshot is, if that was known then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub about: Option<About>,
}

/// What a snapshot on hold is: people don't recognise it by its id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The snapshot's zone.
    pub zone: ZoneName,
    /// The snapshot's name; hostile text.
    pub name: String,
    /// When the snapshot was taken.
    pub created_at: Timestamp,
    /// The name of its instance, if that is known; hostile text.
    #[serde(default)]
    pub instance_name: Option<String>,
}

impl Hold {
    /// The snapshot, as it is looked up.
    pub fn known(&self) -> Known {
        let about = self.about.as_ref();
        Known {
            id: self.snapshot.0,
            name: about.map(|about| about.name.clone()),
            zone: about.map(|about| about.zone.clone()),
            taken_at: about.map(|about| about.created_at),
        }
    }

    /// Whether it has not ended by then.
    pub fn counts_at(&self, now: Timestamp) -> bool {
        self.until.is_none_or(|until| until > now)
    }
}

impl Holds {
    /// The hold on this snapshot that counts at that moment.
    pub fn on(&self, snapshot: SnapshotId, now: Timestamp) -> Option<&Hold> {
        self.holds.iter().find(|hold| hold.snapshot == snapshot && hold.counts_at(now))
    }

    /// How many count at that moment.
    pub fn count_at(&self, now: Timestamp) -> u64 {
        self.holds.iter().filter(|hold| hold.counts_at(now)).count() as u64
    }

    /// Removes ended holds, and the hold on this snapshot, which is returned.
    fn release(&mut self, snapshot: SnapshotId, now: Timestamp) -> Option<Hold> {
        self.holds.retain(|hold| hold.counts_at(now));
        let place = self.holds.iter().position(|hold| hold.snapshot == snapshot)?;
        Some(self.holds.remove(place))
    }
}

impl StateDirectory {
    /// Every hold that was not removed; ended ones may be among them.
    ///
    /// # Errors
    /// A file that can't be read, is damaged, or was written by a later program: then nothing may be deleted.
    pub async fn holds(&self) -> Result<Holds, StateError> {
        self.load(FILE, VERSION).await
    }

    /// Puts a snapshot on hold, and returns the hold that this one replaces.
    ///
    /// # Errors
    /// [`StateError`]; the holds are as they were then, or new.
    pub async fn hold(&self, clock: &dyn Clock, hold: Hold) -> Result<Option<Hold>, StateError> {
        let now = clock.now();
        self.change_holds(clock, move |holds| {
            let replaced = holds.release(hold.snapshot, now);
            holds.holds.push(hold);
            replaced
        })
        .await
    }

    /// Removes the hold on a snapshot, and returns it; none if there was none, or if it had ended.
    ///
    /// # Errors
    /// [`StateError`]; the holds are as they were then, or new.
    pub async fn unhold(&self, clock: &dyn Clock, snapshot: SnapshotId) -> Result<Option<Hold>, StateError> {
        let now = clock.now();
        self.change_holds(clock, move |holds| holds.release(snapshot, now)).await
    }

    async fn change_holds(
        &self,
        clock: &dyn Clock,
        change: impl FnOnce(&mut Holds) -> Option<Hold> + Send + 'static,
    ) -> Result<Option<Hold>, StateError> {
        // A command: a signal ends its process.
        let never = CancellationToken::new();
        self.change_shared("holds", clock, &never, move |state| {
            let before: Holds = state.read(FILE, VERSION)?;
            let mut holds = before.clone();
            let other = change(&mut holds);
            if holds != before {
                state.write(FILE, VERSION, &holds)?;
            }
            Ok(other)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use jiff::SignedDuration;
    use uuid::Uuid;

    use super::*;
    use crate::disk::{self, Access, Disk as _, RealDisk};
    use crate::sim::clock::SimClock;

    const NOW: &str = "2026-11-01T12:00:00Z";

    fn state(folder: &Path) -> StateDirectory {
        StateDirectory::open(Arc::new(RealDisk), folder).unwrap()
    }

    fn clock() -> SimClock {
        SimClock::starting_at(NOW.parse().unwrap())
    }

    fn id(number: u128) -> SnapshotId {
        SnapshotId(Uuid::from_u128(number))
    }

    /// A hold that ends after some hours; without a number, never.
    fn hold(number: u128, hours: Option<i64>) -> Hold {
        let now: Timestamp = NOW.parse().unwrap();
        let until = hours.map(|hours| now + SignedDuration::from_hours(hours));
        Hold {
            snapshot: id(number),
            until,
            reason: Some("a \u{1b}[31mreason".to_owned()),
            since: now,
            about: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn holds_are_put_replaced_and_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let (state, clock) = (state(folder.path()), clock());
        assert_eq!(state.hold(&clock, hold(1, None)).await.unwrap(), None);
        assert_eq!(state.hold(&clock, hold(2, None)).await.unwrap(), None);
        assert_eq!(state.hold(&clock, hold(1, Some(3))).await.unwrap(), Some(hold(1, None)));
        assert_eq!(state.holds().await.unwrap().holds, [hold(2, None), hold(1, Some(3))]);
        assert_eq!(state.unhold(&clock, id(2)).await.unwrap(), Some(hold(2, None)));
        assert_eq!(state.unhold(&clock, id(2)).await.unwrap(), None);
        assert_eq!(state.holds().await.unwrap().holds, [hold(1, Some(3))]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_expired_hold_counts_no_more_and_goes_with_the_next_change() {
        let folder = tempfile::tempdir().unwrap();
        let (state, clock) = (state(folder.path()), clock());
        state.hold(&clock, hold(1, Some(1))).await.unwrap();
        clock.step(SignedDuration::from_secs(3599));
        assert!(state.holds().await.unwrap().on(id(1), clock.now()).is_some());
        clock.step(SignedDuration::from_secs(1));
        assert_eq!(state.holds().await.unwrap().on(id(1), clock.now()), None);
        assert_eq!(state.holds().await.unwrap().holds.len(), 1, "reading changes nothing");
        assert_eq!(state.unhold(&clock, id(1)).await.unwrap(), None, "it held nothing any more");
        assert_eq!(state.holds().await.unwrap(), Holds::default());
    }

    #[tokio::test(start_paused = true)]
    async fn changes_at_the_same_time_lose_none() {
        let folder = tempfile::tempdir().unwrap();
        let clock = clock();
        let states: Vec<_> = (0..20).map(|_| state(folder.path())).collect();
        let put = states.iter().zip(0..).map(|(state, number)| state.hold(&clock, hold(number, None)));
        for put in futures_util::future::join_all(put).await {
            assert_eq!(put.unwrap(), None);
        }
        assert_eq!(states[0].holds().await.unwrap().holds.len(), 20);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lock_that_stays_is_an_error_after_a_while() {
        let folder = tempfile::tempdir().unwrap();
        let (state, clock) = (state(folder.path()), clock());
        let _held = RealDisk.lock(&folder.path().join("holds.lock")).unwrap();
        let error = state.hold(&clock, hold(1, None)).await.unwrap_err();
        assert!(matches!(error, StateError::Locked { .. }), "{error}");
        assert!(clock.elapsed() >= std::time::Duration::from_secs(5));
    }

    #[tokio::test(start_paused = true)]
    async fn damaged_holds_are_an_error_and_are_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let (state, clock) = (state(folder.path()), clock());
        let path = folder.path().join(FILE);
        for damaged in ["", "{}", "{\"version\":1}", "{\"version\":1,\"holds\":[{}]}"] {
            disk::replace_file(&RealDisk, &path, damaged.as_bytes(), Access::Owner).unwrap();
            let error = state.hold(&clock, hold(1, None)).await.unwrap_err();
            assert!(error.to_string().contains("holds.json"), "{damaged:?}: {error}");
            assert_eq!(disk::read_file(&RealDisk, &path, 100).unwrap(), damaged.as_bytes());
        }
    }
}
