//! `plan`: what a run would do, and why, snapshot by snapshot.

pub(super) mod candidate;
pub(super) mod decisions;
pub(super) mod facts;
pub(super) mod files;
pub(super) mod keys;
pub(super) mod table;

use std::collections::BTreeSet;

use jiff::Timestamp;

use crate::cli::args::{Global, Plan};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::Output;
use crate::cli::plan::candidate::Changes;
use crate::cli::plan::decisions::{Filter, PolicyInZone};
use crate::cli::plan::files::{Files, check_files, inventories};
use crate::config::sections::Config;
use crate::policy::Policy;
use crate::policy::name::PolicyName;
use crate::retention::verdict::Verdict;
use crate::run::list::ListingCache;
use crate::run::preview::preview_offline;

/// Shows what a run of the policies would do, or what another configuration would change.
///
/// # Errors
/// [`Refusal`] if nothing can be planned.
pub async fn plan(global: &Global, plan: &Plan, output: Output) -> Result<Exit, Refusal> {
    if let Some(file) = &plan.facts {
        return facts::play_again(file, output);
    }
    let mut config = assemble::configuration(global)?;
    let seams = Seams::real();
    // Over files there is no state.
    let has_state = plan.snapshots.is_empty();
    if has_state {
        assemble::heed_pauses(&mut config, &seams).await?;
        if plan.policies.is_empty() {
            assemble::complain_of_paused(&config, output);
        }
    }
    let now = seams.clock.now();
    let given_at = plan.at.as_ref().map(|at| at.back_from(now)).transpose()?;
    let at = given_at.unwrap_or(now);
    let mut planner = Planner { plan, seams, at, files: Files::default(), listings: ListingCache::default() };
    let Some(candidate) = &plan.candidate else {
        let policies = assemble::chosen(&config, &plan.policies)?;
        if policies.is_empty() {
            output.complain(assemble::NOTHING_ENABLED);
        }
        check_files(&policies, &plan.snapshots)?;
        check_files(&policies, &plan.instances)?;
        let mut all = planner.plan(&config, &policies, given_at).await?;
        // What all policies say of a zone is said once.
        let mut told = BTreeSet::new();
        for PolicyInZone { zone, planned, .. } in &mut all {
            let Ok(preview) = planned else { continue };
            preview.listing.warnings.retain(|warning| told.insert((zone.clone(), warning.clone())));
        }
        let exit = complain("", &all, output);
        let plans = all.iter().filter_map(|one| Some((&one.name, one.planned.as_ref().ok()?)));
        let filter = Filter {
            only: plan.only.map(Verdict::from),
            instances: plan.instance.clone(),
            is_summary: plan.summary,
        };
        output.show(|| decisions::json(at, &all, &filter), || table::render(plans, &filter, at, output));
        return Ok(exit);
    };
    let mut candidate = Config { shard: config.shard, ..assemble::configuration_at(candidate)? };
    if has_state {
        assemble::heed_pauses(&mut candidate, &planner.seams).await?;
    }
    let [now, then] = chosen_of_both(&config, &candidate, &plan.policies)?;
    let both = [now.clone(), then.clone()].concat();
    check_files(&both, &plan.snapshots)?;
    check_files(&both, &plan.instances)?;
    // Both at the same time, and over the same listings if they use the same API.
    let now = planner.plan(&config, &now, Some(at)).await?;
    if config.exoscale.endpoint != candidate.exoscale.endpoint {
        planner.listings = ListingCache::default();
    }
    let then = planner.plan(&candidate, &then, Some(at)).await?;
    let exit = complain("now: ", &now, output).worse(complain("candidate: ", &then, output));
    let differences = candidate::differences(&now, &then);
    let keys = keys::changed_keys(&config, &candidate);
    let losses = keys::losses(&config, &candidate, now.iter().chain(&then));
    let changes = Changes { keys, losses, differences };
    output.show(|| candidate::json(at, &changes), || candidate::render(&changes, at, output));
    Ok(exit)
}

/// Makes plans, and reads each listing once.
struct Planner<'a> {
    plan: &'a Plan,
    seams: Seams,
    at: Timestamp,
    files: Files,
    listings: ListingCache,
}

impl Planner<'_> {
    /// The plans of these policies, over the listings in files if any are given, else of the API.
    async fn plan(
        &mut self,
        config: &Config,
        policies: &[&Policy],
        at: Option<Timestamp>,
    ) -> Result<Vec<PolicyInZone>, Refusal> {
        let mut all = Vec::new();
        let mut add = |policy: &Policy, zones: Vec<_>| {
            let name = &policy.name;
            all.extend(zones.into_iter().map(|(zone, planned)| PolicyInZone {
                name: name.clone(),
                zone,
                planned,
            }));
        };
        if self.plan.snapshots.is_empty() {
            let credentials = assemble::credentials(config)?;
            let runner = assemble::runner(config, credentials, &self.seams, Use::Reading)?;
            assemble::require_shard(config, &runner)?;
            for policy in policies {
                add(policy, runner.preview(&self.listings, policy, at).await);
            }
        } else {
            for policy in policies {
                let inventories =
                    inventories(config, policy, &self.plan.snapshots, &self.plan.instances, &mut self.files)?;
                let randomness = &*self.seams.randomness;
                let (policies, exempt) = (&config.policies, &config.exempt);
                add(policy, preview_offline(policies, exempt, policy, inventories, self.at, randomness));
            }
        }
        Ok(all)
    }
}

/// Reports the zones that could not be planned.
fn complain(side: &str, all: &[PolicyInZone], output: Output) -> Exit {
    let mut exit = Exit::Done;
    for PolicyInZone { name, zone, planned } in all {
        if let Err(failure) = planned {
            output.complain(&format!("{side}policy {name}, zone {zone}: {failure}"));
            exit = Exit::Failed;
        }
    }
    exit
}

/// The enabled policies of each configuration that the command names; all, if it names none. Each name must be in one of
/// the two.
fn chosen_of_both<'a>(
    config: &'a Config,
    candidate: &'a Config,
    names: &[PolicyName],
) -> Result<[Vec<&'a Policy>; 2], Refusal> {
    let both = [config, candidate].map(|config| -> Vec<&Policy> {
        let is_meant =
            |policy: &&Policy| policy.enabled && (names.is_empty() || names.contains(&policy.name));
        config.policies.iter().filter(is_meant).collect()
    });
    match names.iter().find(|name| !both.iter().flatten().any(|policy| policy.name == **name)) {
        Some(name) => {
            let text = format!("neither configuration has an enabled policy `{name}`");
            Err(Refusal::usage(text))
        }
        None => Ok(both),
    }
}
