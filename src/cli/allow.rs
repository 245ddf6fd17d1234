//! `allow`: the guard allows a policy's next run, or an archive's next pruning, once.

use jiff::tz::TimeZone;

use crate::cli::args::{Allow, Global};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::Output;
use crate::state::allowances::{Allowance, AllowanceOf};
use crate::text::{counted, to_the_second};

/// Records an allowance; it replaces one for the same policy or archive, and the same zone.
///
/// # Errors
/// [`Refusal`] if there is no such policy, archive or zone, or the state cannot be changed.
pub async fn allow(global: &Global, allow: &Allow, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let (of, what) = match (&allow.policy, &allow.archive) {
        (Some(name), _) => {
            let policy = assemble::policy(&config, name)?;
            if policy.retention.is_none() {
                return Err(Refusal::usage(format!(
                    "policy `{name}` has no retention table, so it never deletes and needs no allowance"
                )));
            }
            assemble::zone_of(policy, allow.zone.as_ref())?;
            (AllowanceOf::Policy(name.clone()), format!("the next run of policy {name}"))
        }
        (None, Some(name)) => {
            assemble::check_archives(&config, std::slice::from_ref(name))?;
            if config.archive_rules.get(name).is_none_or(|rules| rules.retention.is_none()) {
                return Err(Refusal::usage(format!(
                    "archive `{name}` has no retention table, so it keeps every copy and needs no allowance"
                )));
            }
            (AllowanceOf::Archive(name.clone()), format!("the next pruning of archive {name}"))
        }
        (None, None) => return Err(Refusal::usage("name a policy, or an archive with --archive")),
    };
    let seams = Seams::real();
    let state = assemble::state(&config, &seams, Use::Changing)?;
    let given_at = seams.clock.now();
    let ends_at = allow.lasts.as_ref().and_then(|lasts| lasts.after(given_at, &TimeZone::UTC));
    let allowance = Allowance { of, zone: allow.zone.clone(), deletes: allow.deletes, given_at, ends_at };
    let replaced = state.allow(&*seams.clock, allowance.clone()).await?;
    let place = allow.zone.as_ref().map_or_else(String::new, |zone| format!(" in zone {zone}"));
    let most = counted(usize::try_from(allow.deletes).unwrap_or(usize::MAX), "deletion");
    let until = ends_at.map_or_else(String::new, |at| format!(", until {}", to_the_second(at)));
    let before =
        replaced.map_or_else(String::new, |before| format!(" (previously at most {})", before.deletes));
    let text = || format!("the guard allows {what}{place}, up to {most}{until}{before}\n");
    output.show(|| &allowance, text);
    Ok(Exit::Done)
}
