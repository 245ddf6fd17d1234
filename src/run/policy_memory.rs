//! The state of a policy while a run changes it.

use tokio::sync::{Mutex, MutexGuard};

use crate::policy::Policy;
use crate::run::context::Runner;
use crate::run::step::StepError;
use crate::state::error::StateError;
use crate::state::policy_state::PolicyState;
use crate::text::chain;

/// What one policy remembers. All zones of a run share one value, so that no change overwrites another.
#[derive(Debug)]
pub struct PolicyMemory<'a> {
    pub(crate) runner: &'a Runner,
    pub(crate) policy: &'a Policy,
    own: Mutex<PolicyState>,
    /// What all other policies remembered at the time of reading.
    pub(crate) others: Vec<PolicyState>,
}

impl<'a> PolicyMemory<'a> {
    /// Reads the state of every policy; the run has the policy's lock.
    ///
    /// # Errors
    /// [`StateError`] if one cannot be read.
    pub(crate) async fn read(runner: &'a Runner, policy: &'a Policy) -> Result<Self, StateError> {
        let own = runner.state.policy_state(&policy.name).await?;
        let mut others = Vec::new();
        for other in runner.policies.iter().filter(|other| other.name != policy.name) {
            others.push(runner.state.policy_state(&other.name).await?);
        }
        Ok(Self { runner, policy, own: Mutex::new(own), others })
    }

    /// What the policy itself remembers by now; nothing changes while the guard lives.
    pub(crate) async fn own(&self) -> MutexGuard<'_, PolicyState> {
        self.own.lock().await
    }

    /// Changes what is remembered, and returns once the change is on disk.
    pub(crate) async fn change(&self, change: impl FnOnce(&mut PolicyState)) -> Result<(), StepError> {
        let mut own = self.own.lock().await;
        let mut changed = own.clone();
        change(&mut changed);
        let saved = self.runner.state.set_policy_state(&self.policy.name, &mut own, changed).await;
        saved.map_err(|error| StepError::failed(chain(&error)))
    }
}
