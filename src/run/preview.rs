//! Shows what a run would do. Nothing is changed.

use std::collections::{BTreeSet, HashSet};

use jiff::Timestamp;

use crate::policy::name::ArchiveName;
use crate::policy::select::Exemption;
use crate::policy::{Hooks, Policy};
use crate::randomness::Randomness;
use crate::retention::guard::Held;
use crate::retention::inventory::Inventory;
use crate::retention::plan::{Decision, PolicyPlan};
use crate::retention::verdict::Verdict;
use crate::run::archive_retention::CopyDecision;
use crate::run::context::Runner;
use crate::run::coverage;
use crate::run::export;
use crate::run::guard::{self, GuardedPlan, ends_at};
use crate::run::list::{Catalogues, Listing, ListingCache, list_zones, memories, with_warnings};
use crate::run::pauses;
use crate::run::persist;
use crate::run::plan::{PlannedAction, ZonePlan, add_coming, decide};
use crate::run::policy_memory::PolicyMemory;
use crate::run::promote::{self, TemplateDecision};
use crate::run::self_instance;
use crate::snapshot::ZoneName;
use crate::state::allowances::{Allowance, AllowanceOf};
use crate::state::error::StateError;
use crate::state::last_runs::LastRuns;
use crate::text::chain;

/// What a run of a policy would do in a zone.
#[derive(Debug)]
pub struct Preview {
    /// The listing that the plan is about, with the snapshots that the run would take first.
    pub listing: Listing,
    /// The decisions.
    pub plan: PolicyPlan,
    /// The deletions that wait for the exports of this very run, by their places in the listing.
    pub after_export: HashSet<u32>,
    /// Why the guard would block all deletions, if it would.
    pub held: Option<Held>,
    /// Which deletions would wait for a change to settle.
    pub pending: Option<String>,
    /// The allowances that the run would use, and when each ends.
    pub allowances: Vec<(Allowance, Timestamp)>,
    /// The exports and promotions before deleting.
    pub actions: Vec<PlannedAction>,
    /// The templates that `promote.keep` does not keep, after those promotions.
    pub templates: Vec<TemplateDecision>,
    /// The copies that the archives' own retention does not keep, after those exports.
    pub copies: Vec<CopyDecision>,
    /// Which of these copies the guards of the archives keep, in sentences.
    pub copies_blocked: Vec<String>,
    /// The programs that the run would start.
    pub hooks: Hooks,
}

/// The exports that a run would do in a zone.
#[derive(Default)]
pub(crate) struct Exports {
    actions: Vec<PlannedAction>,
    /// The places in the listing of the deletions that need none of them.
    not_waiting: HashSet<u32>,
}

/// A zone, and what a run would do there, or why that is unknown.
pub type ZonePreview = (ZoneName, Result<Preview, String>);

impl Runner {
    /// Shows what a run of the policy would do now, or as of `at`, over listings from the cache where it has them.
    pub async fn preview(
        &self,
        cache: &ListingCache,
        policy: &Policy,
        at: Option<Timestamp>,
    ) -> Vec<ZonePreview> {
        let failed = |what: &str, error: &StateError| -> Vec<ZonePreview> {
            let why = format!("nothing is planned, since {what} cannot be read: {}", chain(error));
            policy.zones.iter().map(|zone| (zone.clone(), Err(why.clone()))).collect()
        };
        let (runner, heeding) = match pauses::heed(self, policy).await {
            Ok(paused) => paused,
            Err(error) => return failed("the pauses", &error),
        };
        let before = match runner.state.last_runs(&policy.name).await {
            Ok(before) => before,
            Err(error) => return failed("the last runs", &error),
        };
        let (runner, policy) = self_instance::resolve(&runner, &heeding).await;
        let (runner, policy) = (&*runner, &*policy);
        let memories = memories(runner, policy, &before).await;
        let listings = list_zones(runner, &policy.name, Some(cache), &memories, &policy.zones).await;
        let at = at.unwrap_or_else(|| runner.clock.now());
        let (mut plans, mut exports) = (Vec::new(), Vec::new());
        for listing in listings {
            let planned = runner.plan_with_exports(policy, listing, at);
            let (plan, of_zone) =
                planned.map_or_else(|why| (Err(why), None), |(plan, of)| (Ok(plan), Some(of)));
            plans.push(plan);
            exports.push(of_zone.unwrap_or_default());
        }
        let mut guarded = guard::preview(runner, policy, plans, &before).await;
        let inventories = guarded.iter().map(|guarded| Some(&guarded.as_ref().ok()?.plan.listing.inventory));
        let unmatched = coverage::unmatched_text(policy, inventories);
        if let Some(first) = guarded.iter_mut().flatten().next() {
            first.plan.listing.warnings.extend(unmatched);
        }
        let mut previews = Vec::new();
        for ((zone, guarded), exports) in policy.zones.iter().zip(guarded).zip(exports) {
            let preview = match guarded {
                Ok(guarded) => Ok(runner.preview_zone(policy, guarded, exports, &before, at).await),
                Err(failure) => Err(failure),
            };
            previews.push((zone.clone(), preview));
        }
        runner.add_copies(policy, &mut previews).await;
        previews
    }

    /// The plan of the run's delete phase, as it will be after the exports.
    pub(crate) fn plan_with_exports(
        &self,
        policy: &Policy,
        listing: Result<Listing, String>,
        at: Timestamp,
    ) -> Result<(ZonePlan, Exports), String> {
        let mut listing = listing?;
        add_coming(policy, &mut listing, at, &*self.randomness);
        let mut plan = decide(&self.policies, policy, listing, at)?;
        let actions: Vec<_> = policy
            .export
            .iter()
            .flat_map(|export| export::planned(export, &plan, &self.archive_rules))
            .collect();
        let not_waiting = plan.not_waiting_for_copies();
        if !actions.is_empty() {
            plan.after_exports(&self.policies, policy, &actions)?;
        }
        Ok((plan, Exports { actions, not_waiting }))
    }

    /// Adds what the retention of the policy's archives says of the copies in them.
    async fn add_copies(&self, policy: &Policy, previews: &mut [ZonePreview]) {
        let archives: BTreeSet<&ArchiveName> =
            policy.export.iter().flat_map(|export| &export.archives).collect();
        for (archive, pruner) in archives.into_iter().filter_map(|name| Some((name, self.pruner(name)?))) {
            let mut coming = Vec::new();
            for (zone, preview) in &*previews {
                let actions = preview.iter().flat_map(|preview| &preview.actions);
                let exports = actions.filter(|action| action.archive.as_ref() == Some(archive));
                coming.extend(exports.map(|action| (zone.clone(), action.snapshot.clone())));
            }
            // An archive that cannot be read has its own warning.
            let Ok(mut plan) = pruner.plan(Some(&policy.zones), &coming).await else { continue };
            for (zone, preview) in &mut *previews {
                let Ok(preview) = preview else { continue };
                let decisions = plan.decisions.iter().filter(|decision| decision.facts.zone == *zone);
                preview.copies.extend(decisions.cloned());
                preview
                    .copies_blocked
                    .extend(plan.held.remove(zone).into_iter().chain(plan.pending.remove(zone)));
                preview.listing.warnings.extend(plan.warnings.remove(zone).unwrap_or_default());
            }
        }
    }

    async fn preview_zone(
        &self,
        policy: &Policy,
        guarded: GuardedPlan,
        Exports { mut actions, not_waiting }: Exports,
        before: &LastRuns,
        at: Timestamp,
    ) -> Preview {
        let GuardedPlan { mut plan, held, pending, .. } = guarded;
        let now = self.clock.now();
        let of = AllowanceOf::Policy(policy.name.clone());
        let allowances = self.state.allowances(&of).await.unwrap_or_default().into_iter();
        let allowances = allowances.map(|allowance| (ends_at(&allowance, &[policy]), allowance));
        let allowances = allowances.filter(|(ends_at, allowance)| {
            now <= *ends_at && allowance.zone.as_ref().is_none_or(|zone| zone == plan.zone())
        });
        let allowances = allowances.map(|(ends_at, allowance)| (allowance, ends_at)).collect();
        plan.listing.warnings.extend(persist::overdue_in(policy, before, &plan, at));
        let texts = coverage::planned_texts(&self.policies, &self.exempt, policy, &plan, before);
        plan.listing.warnings.extend(texts);
        let is_after_export = |decision: &&Decision| {
            decision.verdict == Verdict::Delete && !not_waiting.contains(&decision.index)
        };
        let after_export =
            plan.plan.decisions.iter().filter(is_after_export).map(|decision| decision.index).collect();
        let mut templates = Vec::new();
        if let Some(promote) = &policy.promote {
            match PolicyMemory::read(self, policy).await {
                Ok(memory) => {
                    let promotions = promote::planned(&memory, promote, &plan).await;
                    match promote::planned_deletions(&memory, promote, &plan, &promotions).await {
                        Ok(deletions) => templates = deletions,
                        Err(why) => plan.listing.warnings.push(why),
                    }
                    actions.extend(promotions);
                }
                Err(error) => plan.listing.warnings.push(chain(&error)),
            }
        }
        if held.is_some() {
            for template in &mut templates {
                template.needed = Some("the guard blocks all deletions here".to_owned());
            }
        }
        let coming = &plan.listing.inventory.coming;
        for action in &mut actions {
            action.snapshot.id = action.snapshot.id.filter(|id| !coming.contains(id));
        }
        let (copies, copies_blocked) = (Vec::new(), Vec::new());
        let ZonePlan { listing, plan, .. } = plan;
        Preview {
            listing,
            plan,
            after_export,
            held,
            pending,
            allowances,
            actions,
            templates,
            copies,
            copies_blocked,
            hooks: policy.hooks.clone(),
        }
    }
}

/// Offline, the templates that are there are not known.
const TEMPLATES_UNKNOWN: &str =
    "which templates `promote.keep` deletes is not known from files: a plan without `--snapshots` shows them";

/// Shows what a run would do over the given listings, each with whether it has all instances of its zone: without network
/// and without state.
pub fn preview_offline(
    policies: &[Policy],
    exempt: &Exemption,
    policy: &Policy,
    inventories: Vec<(Inventory, bool)>,
    at: Timestamp,
    randomness: &dyn Randomness,
) -> Vec<ZonePreview> {
    let policies = self_instance::offline(policies);
    let policy = policies.iter().find(|known| known.name == policy.name).unwrap_or(policy);
    let zones: Vec<ZoneName> = inventories.iter().map(|(inventory, _)| inventory.zone.clone()).collect();
    let whole = inventories.iter().map(|(inventory, is_whole)| is_whole.then_some(inventory));
    let mut unmatched = coverage::unmatched_text(policy, whole);
    let plans = inventories.into_iter().map(|(inventory, is_whole)| {
        let mut listing = with_warnings(inventory, Catalogues::new());
        add_coming(policy, &mut listing, at, randomness);
        listing.warnings.extend(unmatched.take());
        if policy.promote.as_ref().is_some_and(|promote| promote.keep.is_some()) {
            listing.warnings.push(TEMPLATES_UNKNOWN.to_owned());
        }
        let mut plan = decide(&policies, policy, listing, at)?;
        if is_whole {
            let texts = coverage::planned_texts(&policies, exempt, policy, &plan, &LastRuns::default());
            plan.listing.warnings.extend(texts);
        }
        Ok(plan)
    });
    let guarded = guard::judge_without_past(policy, plans.collect());
    let previews = guarded.into_iter().map(|guarded| {
        let GuardedPlan { plan, held, pending, .. } = guarded?;
        Ok(Preview {
            listing: plan.listing,
            plan: plan.plan,
            after_export: HashSet::new(),
            held,
            pending,
            allowances: Vec::new(),
            actions: Vec::new(),
            templates: Vec::new(),
            copies: Vec::new(),
            copies_blocked: Vec::new(),
            hooks: policy.hooks.clone(),
        })
    });
    zones.into_iter().zip(previews).collect()
}
