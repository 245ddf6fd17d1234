//! Collects what the guard decides by, beside the plans: what vanished from the listings since the last accepted ones,
//! and the allowances. The limits themselves are `retention`'s. A policy without a retention table, and whose
//! templates all stay, deletes nothing, so it needs no guard.

use std::collections::{BTreeSet, HashSet};

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use crate::policy::Policy;
use crate::policy::select::Pattern;
use crate::retention::change::settles_at;
use crate::retention::change_guard::keep_emptied;
use crate::retention::guard::{self, Held, ListingDrop, VERY_FEW, WholeRun, ZoneCase};
use crate::retention::plan::Decision;
use crate::retention::verdict::{Rule, Verdict};
use crate::run::context::{RunOptions, Runner};
use crate::run::plan::ZonePlan;
use crate::snapshot::{InstanceId, SnapshotId};
use crate::state::allowances::{Allowance, AllowanceOf};
use crate::state::audit::AuditMark;
use crate::state::directory::StateDirectory;
use crate::state::last_runs::LastRuns;
use crate::text::{chain, counted, printable};

/// A plan, and what the guard says of it.
#[derive(Debug)]
pub struct GuardedPlan {
    pub(crate) plan: ZonePlan,
    /// Why the guard blocks all deletions of the plan, if it does.
    pub(crate) held: Option<Held>,
    /// Which instances lost all their snapshots, and that they did, if any did: nothing of those is deleted.
    pub(crate) emptied: Option<(Vec<InstanceId>, String)>,
    /// Snapshots and instances that the listings lack.
    pub(crate) missed: BTreeSet<Uuid>,
    /// Which deletions wait for a change to settle, if there are any.
    pub(crate) pending: Option<String>,
    /// Why the second judge blocks all deletions of the plan, if it does.
    pub(crate) disagreement: Option<String>,
    /// Whether later listings are compared with this one.
    pub(crate) is_accepted: bool,
}

impl GuardedPlan {
    /// Leaves what is about these instances alone, after the guard has judged the whole.
    pub(crate) fn limit_to(&mut self, policy: &Policy, only: Option<&Pattern<InstanceId>>) {
        if only.is_none() {
            return;
        }
        self.plan.limit_to(only);
        let is_meant = |id: &InstanceId| self.plan.listing.is_one_of(only, *id);
        if self.emptied.as_ref().is_some_and(|(instances, _)| !instances.iter().any(is_meant)) {
            self.emptied = None;
        }
        let decisions = &self.plan.plan.decisions;
        let is_any = |is: fn(&Decision) -> bool| decisions.iter().any(is);
        if !is_any(|decision| decision.verdict == Verdict::Delete) && !deletes_templates(policy) {
            self.held = None;
        }
        if !is_any(|decision| matches!(decision.rule, Rule::Change | Rule::Source)) {
            self.pending = None;
        }
    }
}

/// Whether anything is deleted for the policy, so that it has to be seen that the listing is whole.
fn deletes(policy: &Policy) -> bool {
    policy.retention.is_some() || deletes_templates(policy)
}

fn deletes_templates(policy: &Policy) -> bool {
    policy.promote.as_ref().is_some_and(|promote| promote.keep.is_some())
}

/// Judges as a run would that began now; the allowances are left for it.
pub(crate) async fn preview(
    runner: &Runner,
    policy: &Policy,
    plans: Vec<Result<ZonePlan, String>>,
    before: &LastRuns,
) -> Vec<Result<GuardedPlan, String>> {
    if !deletes(policy) {
        return unguarded(plans);
    }
    match runner.state.allowances(&AllowanceOf::Policy(policy.name.clone())).await {
        Ok(allowances) => {
            let allowances = valid(allowances, &[policy], runner.clock.now());
            judge(runner, policy, plans, before, &allowances, None).await
        }
        Err(error) => fail(plans, &error),
    }
}

/// Judges for a run, and uses up the allowances for it, unless it is limited to some instances: they are for whole runs.
pub(crate) async fn judge_run(
    runner: &Runner,
    policy: &Policy,
    plans: Vec<Result<ZonePlan, String>>,
    before: &LastRuns,
    options: &RunOptions,
) -> Vec<Result<GuardedPlan, String>> {
    let by_caller = options.allow_deletes;
    // Where nothing can be deleted, an allowance is not used up.
    if !deletes(policy) || plans.iter().all(Result::is_err) {
        return unguarded(plans);
    }
    if options.instances.is_some() {
        return judge(runner, policy, plans, before, &[], by_caller).await;
    }
    let of = AllowanceOf::Policy(policy.name.clone());
    match runner.state.take_allowances(&of, &*runner.clock, &options.stop).await {
        Ok(allowances) => {
            let allowances = valid(allowances, &[policy], runner.clock.now());
            judge(runner, policy, plans, before, &allowances, by_caller).await
        }
        Err(error) => fail(plans, &error),
    }
}

impl Runner {
    /// The most deletions that an allowance lets pass in the policy's next run, for metrics; 0 without, or if that is unknown.
    pub async fn allowance(&self, policy: &Policy) -> u64 {
        let given = self.state.allowances(&AllowanceOf::Policy(policy.name.clone())).await;
        let valid = valid(given.unwrap_or_default(), &[policy], self.clock.now());
        valid.iter().map(|allowance| allowance.deletes).max().unwrap_or_default()
    }
}

/// The allowances that have not ended.
pub(crate) fn valid(mut allowances: Vec<Allowance>, policies: &[&Policy], now: Timestamp) -> Vec<Allowance> {
    allowances.retain(|allowance| now <= ends_at(allowance, policies));
    allowances
}

/// When an allowance ends that these policies use up: when its giver said, else after a week, or a day after the next run
/// of all of them if that is later, since a run may be late. Who gave it knew the situation of those days.
pub(crate) fn ends_at(allowance: &Allowance, policies: &[&Policy]) -> Timestamp {
    let days = |from: Timestamp, days: i64| {
        from.checked_add(SignedDuration::from_hours(24 * days)).unwrap_or(Timestamp::MAX)
    };
    let next_run =
        |policy: &&Policy| policy.schedule.as_ref()?.next_after(allowance.given_at, &policy.time_zone);
    let next_run = policies.iter().filter_map(next_run).max();
    let week = days(allowance.given_at, 7);
    allowance.ends_at.unwrap_or_else(|| next_run.map_or(week, |next_run| week.max(days(next_run, 1))))
}

/// Judges plans over listings that have no past, such as those from files.
pub(crate) fn judge_without_past(
    policy: &Policy,
    plans: Vec<Result<ZonePlan, String>>,
) -> Vec<Result<GuardedPlan, String>> {
    if policy.retention.is_none() {
        return unguarded(plans);
    }
    let cases = plans.into_iter().map(|plan| Ok((plan?, Missed::default())));
    hold(&[], policy, cases.collect(), &[], None)
}

async fn judge(
    runner: &Runner,
    policy: &Policy,
    plans: Vec<Result<ZonePlan, String>>,
    before: &LastRuns,
    allowances: &[Allowance],
    by_caller: Option<u64>,
) -> Vec<Result<GuardedPlan, String>> {
    let mut cases = Vec::new();
    for plan in plans {
        cases.push(match plan {
            Ok(plan) => missed(&runner.state, policy, before, &plan).await.map(|missed| (plan, missed)),
            Err(failure) => Err(failure),
        });
    }
    hold(&runner.policies, policy, cases, allowances, by_caller)
}

/// What vanished from a zone's listings.
#[derive(Default)]
struct Missed {
    drop: ListingDrop,
    /// The instances that are listed, but none of the snapshots that they had.
    emptied: Vec<InstanceId>,
    /// Everything that is missing.
    ids: BTreeSet<Uuid>,
}

/// What vanished from a zone since its accepted listings. A drop that has stayed the same for `settle` is none any more.
async fn missed(
    state: &StateDirectory,
    policy: &Policy,
    before: &LastRuns,
    plan: &ZonePlan,
) -> Result<Missed, String> {
    let inventory = &plan.listing.inventory;
    let zone_before = before.zones.get(plan.zone());
    let mut missed = Missed::default();

    let listed: HashSet<InstanceId> = inventory.instances.iter().map(|instance| instance.id).collect();
    let with_snapshots: HashSet<InstanceId> =
        inventory.snapshots.iter().filter_map(|snapshot| snapshot.instance_id).collect();
    let known = &plan.listing.memory.instances;
    // Those that were missing before are accepted.
    let is_new = |id: &&InstanceId| !listed.contains(id) && (known.is_empty() || known.contains_key(id));
    let unlisted: Vec<InstanceId> = with_snapshots.iter().filter(is_new).copied().collect();
    missed.drop.instances_dropped = unlisted.len() as u64;
    missed.drop.instances = with_snapshots.len() as u64;
    missed.ids.extend(unlisted.iter().map(|id| id.0));

    if let Some(accepted) = zone_before.and_then(|zone| zone.accepted.as_ref()) {
        let listed_snapshots: HashSet<SnapshotId> =
            inventory.snapshots.iter().map(|snapshot| snapshot.id).collect();
        let mut missing: HashSet<SnapshotId> =
            accepted.snapshots.iter().copied().filter(|id| !listed_snapshots.contains(id)).collect();
        let all = missing.len();
        // The audit log is long, and a few missing snapshots never trip the guard.
        if all as u64 > VERY_FEW {
            let from = AuditMark { month: accepted.audit_month.clone(), offset: accepted.audit_from };
            let deleted = state.deleted_since(plan.zone(), from).await;
            let deleted = deleted.map_err(|error| undecided(&error))?;
            missing.retain(|id| !deleted.contains(id));
        }
        let ours = all - missing.len();
        missed.drop.dropped = missing.len() as u64;
        missed.drop.accepted = (accepted.snapshots.len() - ours) as u64;
        let of_instance = |places: &[u32]| -> Vec<SnapshotId> {
            places.iter().filter_map(|place| accepted.snapshots.get(*place as usize)).copied().collect()
        };
        for (instance, places) in &accepted.of_instances {
            let had = of_instance(places);
            let lost = had.iter().filter(|id| missing.contains(id)).count() as u64;
            let has_none = had.iter().all(|id| !listed_snapshots.contains(id));
            if lost > VERY_FEW && has_none && listed.contains(instance) {
                missed.emptied.push(*instance);
            }
        }
        missed.ids.extend(missing.iter().map(|id| id.0));
    }

    let same_before =
        zone_before.and_then(|zone| zone.missed.as_ref()).filter(|before| before.ids == missed.ids);
    let settled_at = same_before.and_then(|before| settles_at(before.since, policy.guard.settle));
    if !policy.guard.settle.is_zero() && settled_at.is_some_and(|at| plan.plan.at >= at) {
        return Ok(Missed::default());
    }
    Ok(missed)
}

/// Asks the guard. Each allowance counts alone and is never added to another, so that no more deletions pass than one
/// person had in mind. Where deletions wait for changes to settle, it counts for those alone.
fn hold(
    runner_policies: &[Policy],
    policy: &Policy,
    cases: Vec<Result<(ZonePlan, Missed), String>>,
    allowances: &[Allowance],
    by_caller: Option<u64>,
) -> Vec<Result<GuardedPlan, String>> {
    let of_run = allowances.iter().filter(|allowance| allowance.zone.is_none());
    let of_run = of_run.map(|allowance| allowance.deletes).chain(by_caller).max();
    let pending = cases.iter().flatten().fold(0_u64, |sum, (plan, _)| sum.saturating_add(plan.plan.pending));
    let accepts =
        |allowed: Option<u64>, pending: u64| pending > 0 && allowed.is_some_and(|allowed| pending <= allowed);
    let cases: Vec<Result<(ZonePlan, ZoneCase, Missed), String>> = cases
        .into_iter()
        .map(|case| {
            let (mut plan, mut missed) = case?;
            if policy.retention.is_none() {
                // Templates stay or go by their instances alone.
                missed.drop.dropped = 0;
                missed.emptied.clear();
            }
            let of_zone = allowances.iter().rfind(|allowance| allowance.zone.as_ref() == Some(plan.zone()));
            let of_zone = of_zone.map(|allowance| allowance.deletes);
            let mut case = ZoneCase {
                zone: plan.zone().clone(),
                deletes: plan.plan.deletes,
                accepted: 0,
                good_deletes: plan.plan.good_deletes,
                good: plan.plan.good,
                drop: missed.drop,
                clock: plan.listing.inventory.clock,
                allowed: of_zone.filter(|_| pending == 0),
            };
            if plan.plan.pending > 0 && (accepts(of_run, pending) || accepts(of_zone, plan.plan.pending)) {
                plan.accept_changes(runner_policies, policy)?;
                case.accepted = plan.plan.deletes.saturating_sub(case.deletes);
            }
            // Also where the drop is allowed: then the next run deletes them.
            keep_emptied(&mut plan.plan, &plan.listing.inventory, &missed.emptied);
            Ok((plan, case, missed))
        })
        .collect();
    let run = WholeRun::new(cases.iter().flatten().map(|(_, case, _)| case), of_run.filter(|_| pending == 0));
    let guarded = cases.into_iter().map(|case| {
        let (plan, case, missed) = case?;
        let held = guard::hold(&policy.name, &policy.guard, &case, run);
        let is_allowed = run.is_allowed() || case.allowed.is_some_and(|allowed| case.deletes <= allowed);
        let emptied = if is_allowed { Vec::new() } else { missed.emptied };
        // Blocked for another reason, the listing may be incomplete all the same.
        let is_accepted = (held.is_none() || !case.drop.exceeds(&policy.guard)) && emptied.is_empty();
        let pending = plan.pending_text(policy, pending);
        let text = emptied_text(policy, &plan, &emptied, run.deletes);
        let emptied = text.map(|text| (emptied, text));
        let missed = missed.ids;
        Ok(GuardedPlan { plan, held, emptied, pending, missed, disagreement: None, is_accepted })
    });
    guarded.collect()
}

/// Names the instances that are listed while none of the snapshots is that they had.
fn emptied_text(
    policy: &Policy,
    plan: &ZonePlan,
    emptied: &[InstanceId],
    run_deletes: u64,
) -> Option<String> {
    let first = emptied.first()?;
    let instances = plan.listing.inventory.instances.iter();
    let name =
        instances.clone().find(|instance| instance.id == *first).map(|instance| printable(&instance.name));
    let name = name.unwrap_or_default();
    let others = match emptied.len() - 1 {
        0 => String::new(),
        count => format!(" and {}", counted(count, "other instance")),
    };
    let policy = &policy.name;
    Some(format!(
        "instance {name}{others}: none of the snapshots that the last accepted listing had is listed any more, though \
         snapwarden did not delete them; look: snapwarden plan {policy}; if that is right, let it pass: snapwarden once \
         {policy} --allow-deletes {run_deletes}, or in the next scheduled run: snapwarden allow {policy} {run_deletes}"
    ))
}

fn unguarded(plans: Vec<Result<ZonePlan, String>>) -> Vec<Result<GuardedPlan, String>> {
    let guarded = plans.into_iter().map(|plan| {
        Ok(GuardedPlan {
            plan: plan?,
            held: None,
            emptied: None,
            pending: None,
            missed: BTreeSet::new(),
            disagreement: None,
            is_accepted: true,
        })
    });
    guarded.collect()
}

fn fail(
    plans: Vec<Result<ZonePlan, String>>,
    error: &(dyn std::error::Error + 'static),
) -> Vec<Result<GuardedPlan, String>> {
    plans.into_iter().map(|plan| Err(plan.err().unwrap_or_else(|| undecided(error)))).collect()
}

fn undecided(error: &(dyn std::error::Error + 'static)) -> String {
    format!("nothing is deleted, since the guard cannot decide: {}", chain(error))
}
