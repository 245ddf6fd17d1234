//! What a policy remembers, while a run changes it.

use tokio::sync::{Mutex, MutexGuard};

use crate::policy::Policy;
use crate::run::Runner;
use crate::run::step::StepError;
use crate::state::error::StateError;
use crate::state::policy_state::PolicyState;
use crate::text::chain;

/// The memory of one policy. Zones share one, so that no change overwrites another.
#[derive(Debug)]
pub struct PolicyMemory<'a> {
    pub(super) runner: &'a Runner,
    policy: &'a Policy,
    own: Mutex<PolicyState>,
    /// What all other policies remembered when this was read.
    pub(super) others: Vec<PolicyState>,
}

impl<'a> PolicyMemory<'a> {
    /// Reads it; the run holds the policy's lock.
    ///
    /// # Errors
    /// [`StateError`] if a policy's memory can't be read.
    pub async fn read(runner: &'a Runner, policy: &'a Policy) -> Result<Self, StateError> {
        let own = runner.state.policy_state(&policy.name).await?;
        let mut others = Vec::new();
        for other in runner.policies.iter().filter(|other| other.name != policy.name) {
            others.push(runner.state.policy_state(&other.name).await?);
        }
        Ok(Self { runner, policy, own: Mutex::new(own), others })
    }

    /// What the policy itself remembers by now; nothing changes while this is held.
    pub(super) async fn own(&self) -> MutexGuard<'_, PolicyState> {
        self.own.lock().await
    }

    /// Changes what is remembered, and returns once the change is safe.
    pub(super) async fn change(&self, change: impl FnOnce(&mut PolicyState)) -> Result<(), StepError> {
        let mut held = self.own.lock().await;
        let mut changed = held.clone();
        change(&mut changed);
        self.runner
            .state
            .set_policy_state(&self.policy.name, changed.clone())
            .await
            .map_err(|error| StepError::failed(chain(&error)))?;
        *held = changed;
        Ok(())
    }
}
