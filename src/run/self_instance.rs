//! `self` in a selection: puts this machine's id in its place before a policy is used.
//!
//! Where the id can't be told, the policy itself does nothing, and says why. What it keeps from the deletions of
//! others it keeps all the same: then it counts as speaking about every instance.

use std::borrow::Cow;

use crate::policy::Policy;
use crate::run::Runner;
use crate::text::chain;

/// What can't be asked for where there is no network.
const ON_PAPER: &str = "a listing from a file does not tell which instance this machine is";

/// The runner and the policy as they are to be used; none if both can be used as they are.
pub async fn known(runner: &Runner, policy: &Policy) -> Option<(Runner, Policy)> {
    if !policy.select.is_in_doubt() && !runner.policies.iter().any(asks) {
        return None;
    }
    let this_machine = runner.metadata.this_machine().await.map_err(|error| chain(&error));
    let used = |policy: &Policy| {
        let mut policy = policy.clone();
        match &this_machine {
            Ok(id) => policy.select.resolve(*id),
            Err(why) => policy.select.this_machine.unknown = Some(why.clone()),
        }
        policy
    };
    let policies = runner.policies.iter().map(used).collect();
    Some((Runner { policies, ..runner.clone() }, used(policy)))
}

/// The policies as they are to be used where nothing can be asked.
pub fn on_paper(policies: &[Policy]) -> Cow<'_, [Policy]> {
    if !policies.iter().any(asks) {
        return Cow::Borrowed(policies);
    }
    let mut policies = policies.to_vec();
    for policy in &mut policies {
        policy.select.this_machine.unknown = Some(ON_PAPER.to_owned());
    }
    Cow::Owned(policies)
}

/// Why the policy can't be used, if so.
///
/// # Errors
/// A sentence.
pub fn check(policy: &Policy) -> Result<(), String> {
    if !policy.select.is_in_doubt() {
        return Ok(());
    }
    Err(format!(
        "nothing is done here, since the policy selects by `self`, and it can't be told which instance that is: {}",
        why(policy)
    ))
}

/// What others should know of a policy whose `self` is not resolved.
pub fn warning(policy: &Policy) -> Option<String> {
    (asks(policy) && policy.retention.is_some()).then(|| {
        format!(
            "policy {} selects by `self`, and it can't be told which instance that is ({}): what it would keep of any \
             instance stays",
            policy.name,
            why(policy)
        )
    })
}

fn asks(policy: &Policy) -> bool {
    policy.enabled && policy.select.is_in_doubt()
}

fn why(policy: &Policy) -> &str {
    policy.select.this_machine.unknown.as_deref().unwrap_or("nobody was asked")
}
