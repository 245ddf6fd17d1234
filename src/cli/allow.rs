//! `allow`: the guard allows a policy's next run, once.

use crate::cli::args::{Allow, Global};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::Output;
use crate::state::allowances::Allowance;
use crate::text::counted;

/// Records an allowance; it replaces one for the same policy and zone.
///
/// # Errors
/// [`Refusal`] if there is no such policy or zone, or the state cannot be changed.
pub async fn allow(global: &Global, allow: &Allow, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(&global.config)?;
    let policy = assemble::policy(&config, &allow.policy)?;
    if policy.retention.is_none() {
        return Err(Refusal::usage(format!(
            "policy `{}` has no retention table, so it never deletes and needs no allowance",
            policy.name
        )));
    }
    assemble::zone_of(policy, allow.zone.as_ref())?;
    let seams = Seams::real();
    let state = assemble::state(&config, &seams, Use::Changing)?;
    let allowance = Allowance {
        policy: allow.policy.clone(),
        zone: allow.zone.clone(),
        deletes: allow.deletes,
        given_at: seams.clock.now(),
    };
    let replaced = state.allow(&*seams.clock, allowance.clone()).await?;
    let Allow { policy, deletes, .. } = allow;
    let place = allow.zone.as_ref().map_or_else(String::new, |zone| format!(" in zone {zone}"));
    let most = counted(usize::try_from(*deletes).unwrap_or(usize::MAX), "deletion");
    let before =
        replaced.map_or_else(String::new, |before| format!(" (previously at most {})", before.deletes));
    let text = || format!("the guard allows the next run of policy {policy}{place}, up to {most}{before}\n");
    output.show(|| &allowance, text);
    Ok(Exit::Done)
}
