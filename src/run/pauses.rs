//! Policies that are paused by hand: to a run, it is as if `enabled = false` stood in the configuration.

use std::borrow::Cow;
use std::collections::BTreeMap;

use jiff::Timestamp;

use crate::policy::Policy;
use crate::policy::name::PolicyName;
use crate::run::context::Runner;
use crate::state::error::StateError;

/// Pauses exactly the policies that are paused by hand.
pub fn apply(policies: &mut [Policy], paused: &BTreeMap<PolicyName, Timestamp>) {
    for policy in policies {
        policy.pause(paused.get(&policy.name).copied());
    }
}

/// Whether [`apply`] would change any policy.
pub fn have_changed(policies: &[Policy], paused: &BTreeMap<PolicyName, Timestamp>) -> bool {
    let mut known = policies.iter().filter(|policy| policy.is_enabled_in_file());
    known.any(|policy| policy.paused_since.as_ref() != paused.get(&policy.name))
}

/// The runner and the policy as they are by the pauses of this moment.
///
/// # Errors
/// [`StateError`] if the pauses cannot be read.
pub(crate) async fn heed<'a>(
    runner: &'a Runner,
    policy: &'a Policy,
) -> Result<(Cow<'a, Runner>, Cow<'a, Policy>), StateError> {
    let paused = runner.state.controls().await?.paused;
    if !have_changed(&runner.policies, &paused) && !have_changed(std::slice::from_ref(policy), &paused) {
        return Ok((Cow::Borrowed(runner), Cow::Borrowed(policy)));
    }
    let (mut runner, mut policy) = (runner.clone(), policy.clone());
    apply(&mut runner.policies, &paused);
    apply(std::slice::from_mut(&mut policy), &paused);
    Ok((Cow::Owned(runner), Cow::Owned(policy)))
}
