//! `self` in a selection: replaces it by the id of the instance that this machine is, before a policy is used.
//!
//! Where the id is unknown, the policy itself does nothing, and says why. It still protects snapshots from other policies:
//! then as if it selected every instance.

use std::borrow::Cow;

use crate::policy::Policy;
use crate::run::context::Runner;
use crate::text::chain;

/// Offline, the metadata server cannot be asked.
const OFFLINE: &str = "a listing from a file does not say which instance this machine is";

/// The runner and the policy with `self` resolved.
pub(crate) async fn resolve<'a>(
    runner: &'a Runner,
    policy: &'a Policy,
) -> (Cow<'a, Runner>, Cow<'a, Policy>) {
    if !policy.select.is_in_doubt() && !runner.policies.iter().any(is_unresolved) {
        return (Cow::Borrowed(runner), Cow::Borrowed(policy));
    }
    let this_machine = runner.metadata.this_machine().await.map_err(|error| chain(&error));
    let resolved = |policy: &Policy| {
        let mut policy = policy.clone();
        match &this_machine {
            Ok(id) => policy.select.resolve(*id),
            Err(why) => policy.select.this_machine.unknown = Some(why.clone()),
        }
        policy
    };
    let policies = runner.policies.iter().map(resolved).collect();
    (Cow::Owned(Runner { policies, ..runner.clone() }), Cow::Owned(resolved(policy)))
}

/// The policies for a plan offline.
pub(crate) fn offline(policies: &[Policy]) -> Cow<'_, [Policy]> {
    if !policies.iter().any(is_unresolved) {
        return Cow::Borrowed(policies);
    }
    let mut policies = policies.to_vec();
    for policy in &mut policies {
        policy.select.this_machine.unknown = Some(OFFLINE.to_owned());
    }
    Cow::Owned(policies)
}

/// # Errors
/// Why the policy cannot be used, as a sentence.
pub fn check(policy: &Policy) -> Result<(), String> {
    if !policy.select.is_in_doubt() {
        return Ok(());
    }
    Err(format!(
        "nothing is done here, since the policy selects by `self`, and it is unknown which instance that is: {}",
        why(policy)
    ))
}

/// A warning for the other policies, if this one's `self` is not resolved.
pub fn warning(policy: &Policy) -> Option<String> {
    (is_unresolved(policy) && policy.retention.is_some()).then(|| {
        format!(
            "policy {} selects by `self`, and it is unknown which instance that is ({}): snapshots of any instance that \
             it would keep are kept",
            policy.name,
            why(policy)
        )
    })
}

fn is_unresolved(policy: &Policy) -> bool {
    policy.select.is_in_doubt()
}

fn why(policy: &Policy) -> &str {
    policy.select.this_machine.unknown.as_deref().unwrap_or("it was not looked up")
}
