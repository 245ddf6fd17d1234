//! What `pause`, `resume` and `trigger` ask of a daemon that may run beside them.
//!
//! Commands change the file, and a daemon removes each trigger that it has taken, so it has a lock of its own. Reading
//! needs none, since the file is replaced in one step.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::policy::name::PolicyName;
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;

/// The version of the file that this program writes.
const VERSION: u64 = 1;

const FILE: &str = "controls.json";

/// The policies that are paused by hand, and those that are to run now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Controls {
    /// Since when each of them is paused, also of policies that are not configured any more.
    pub paused: BTreeMap<PolicyName, Timestamp>,
    /// When each run was asked for that no daemon has begun.
    pub triggered: BTreeMap<PolicyName, Timestamp>,
}

impl StateDirectory {
    /// The pauses and triggers.
    ///
    /// # Errors
    /// A file that can't be read, is damaged, or was written by a later program: then no step may begin.
    pub async fn controls(&self) -> Result<Controls, StateError> {
        self.load(FILE, VERSION).await
    }

    /// [`StateDirectory::controls`], for the daemon's loop, which reads them each second: this blocks for as long as one small
    /// file takes, which is less than a way to the blocking pool and back.
    ///
    /// # Errors
    /// As for [`StateDirectory::controls`].
    pub fn controls_blocking(&self) -> Result<Controls, StateError> {
        self.read(FILE, VERSION)
    }

    /// Pauses a policy from this moment on, and returns since when it was paused already: that stays. A run that was asked
    /// for does not begin.
    ///
    /// # Errors
    /// [`StateError`]; the pauses are as they were then, or new.
    pub async fn pause(
        &self,
        clock: &dyn Clock,
        policy: PolicyName,
        since: Timestamp,
    ) -> Result<Option<Timestamp>, StateError> {
        self.change_controls(clock, move |controls| {
            controls.triggered.remove(&policy);
            let before = controls.paused.get(&policy).copied();
            controls.paused.entry(policy).or_insert(since);
            before
        })
        .await
    }

    /// Ends the pause of a policy, and returns since when it was paused, if it was.
    ///
    /// # Errors
    /// [`StateError`]; the pauses are as they were then, or new.
    pub async fn resume(
        &self,
        clock: &dyn Clock,
        policy: PolicyName,
    ) -> Result<Option<Timestamp>, StateError> {
        self.change_controls(clock, move |controls| controls.paused.remove(&policy)).await
    }

    /// Asks for a run of a policy now, and returns when one was asked for before that no daemon has begun.
    ///
    /// # Errors
    /// [`StateError`]; the triggers are as they were then, or new.
    pub async fn trigger(
        &self,
        clock: &dyn Clock,
        policy: PolicyName,
    ) -> Result<Option<Timestamp>, StateError> {
        let now = clock.now();
        self.change_controls(clock, move |controls| controls.triggered.insert(policy, now)).await
    }

    /// Removes the trigger of a policy, and returns when the run was asked for: to be begun, or to be refused.
    ///
    /// # Errors
    /// [`StateError`]: then the run must not begin, since it might begin twice.
    pub async fn take_trigger(
        &self,
        clock: &dyn Clock,
        policy: PolicyName,
    ) -> Result<Option<Timestamp>, StateError> {
        self.change_controls(clock, move |controls| controls.triggered.remove(&policy)).await
    }

    async fn change_controls(
        &self,
        clock: &dyn Clock,
        change: impl FnOnce(&mut Controls) -> Option<Timestamp> + Send + 'static,
    ) -> Result<Option<Timestamp>, StateError> {
        // Nothing holds the lock for longer than a change takes.
        let never = CancellationToken::new();
        self.change_shared("controls", clock, &never, move |state| {
            let before: Controls = state.read(FILE, VERSION)?;
            let mut controls = before.clone();
            let other = change(&mut controls);
            if controls != before {
                state.write(FILE, VERSION, &controls)?;
            }
            Ok(other)
        })
        .await
    }
}
