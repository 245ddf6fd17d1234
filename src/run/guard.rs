//! Collects what the guard decides by, beside the plans: what vanished from the listings since the last accepted ones,
//! and the allowances. The limits themselves are `retention`'s. A policy without a retention table deletes nothing, so it
//! needs no guard.

use std::collections::HashSet;

use tokio_util::sync::CancellationToken;

use crate::policy::Policy;
use crate::retention::guard::{self, FEW, Held, ListingDrop, WholeRun, ZoneCase};
use crate::run::context::Runner;
use crate::run::plan::ZonePlan;
use crate::snapshot::SnapshotId;
use crate::state::allowances::Allowance;
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;
use crate::state::last_runs::LastRuns;
use crate::text::chain;

/// A plan, and what the guard says of it.
#[derive(Debug)]
pub struct GuardedPlan {
    pub(crate) plan: ZonePlan,
    /// Why the guard blocks all deletions of the plan, if it does.
    pub(crate) held: Option<Held>,
    /// Which deletions wait for a change to settle, if there are any.
    pub(crate) pending: Option<String>,
    /// Whether later listings are compared with this one.
    pub(crate) is_accepted: bool,
}

/// Judges as a run would that began now; the allowances are left for it.
pub(crate) async fn preview(
    runner: &Runner,
    policy: &Policy,
    plans: Vec<Result<ZonePlan, String>>,
) -> Vec<Result<GuardedPlan, String>> {
    if policy.retention.is_none() {
        return unguarded(plans);
    }
    let read = async {
        let before = runner.state.last_runs(&policy.name).await?;
        Ok::<_, StateError>((before, runner.state.allowances(&policy.name).await?))
    };
    match read.await {
        Ok((before, allowances)) => judge(runner, policy, plans, &before, &allowances, None).await,
        Err(error) => fail(plans, &error),
    }
}

/// Judges for a run, and uses up the allowances for it. `by_caller` is an allowance for this run alone.
pub(crate) async fn judge_run(
    runner: &Runner,
    policy: &Policy,
    plans: Vec<Result<ZonePlan, String>>,
    before: &LastRuns,
    by_caller: Option<u64>,
    stop: &CancellationToken,
) -> Vec<Result<GuardedPlan, String>> {
    // Where nothing can be deleted, an allowance is not used up.
    if policy.retention.is_none() || plans.iter().all(Result::is_err) {
        return unguarded(plans);
    }
    match runner.state.take_allowances(&policy.name, &*runner.clock, stop).await {
        Ok(allowances) => judge(runner, policy, plans, before, &allowances, by_caller).await,
        Err(error) => fail(plans, &error),
    }
}

/// Judges plans over listings that have no past, such as those from files.
pub(crate) fn judge_without_past(
    policy: &Policy,
    plans: Vec<Result<ZonePlan, String>>,
) -> Vec<Result<GuardedPlan, String>> {
    if policy.retention.is_none() {
        return unguarded(plans);
    }
    let cases = plans.into_iter().map(|plan| Ok((plan?, ListingDrop::default())));
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
            Ok(plan) => listing_drop(&runner.state, before, &plan).await.map(|drop| (plan, drop)),
            Err(failure) => Err(failure),
        });
    }
    hold(&runner.policies, policy, cases, allowances, by_caller)
}

/// What vanished from a zone since its accepted listing.
async fn listing_drop(
    state: &StateDirectory,
    before: &LastRuns,
    plan: &ZonePlan,
) -> Result<ListingDrop, String> {
    let zone = plan.zone();
    let Some(accepted) = before.zones.get(zone).and_then(|zone| zone.accepted.as_ref()) else {
        return Ok(ListingDrop::default());
    };
    let listed: HashSet<SnapshotId> =
        plan.listing.inventory.snapshots.iter().map(|snapshot| snapshot.id).collect();
    let mut missing: Vec<SnapshotId> =
        accepted.snapshots.iter().copied().filter(|id| !listed.contains(id)).collect();
    let mut ours = 0;
    // The audit log is long, and a few missing snapshots never trip the guard.
    if missing.len() as u64 > FEW {
        let deleted =
            state.deleted_since(zone, accepted.audit_from).await.map_err(|error| undecided(&error))?;
        let all = missing.len();
        missing.retain(|id| !deleted.contains(id));
        ours = all - missing.len();
    }
    Ok(ListingDrop { dropped: missing.len() as u64, accepted: (accepted.snapshots.len() - ours) as u64 })
}

/// Asks the guard. Each allowance counts alone and is never added to another, so that no more deletions pass than one
/// person had in mind. Where deletions wait for changes to settle, it counts for those alone.
fn hold(
    runner_policies: &[Policy],
    policy: &Policy,
    cases: Vec<Result<(ZonePlan, ListingDrop), String>>,
    allowances: &[Allowance],
    by_caller: Option<u64>,
) -> Vec<Result<GuardedPlan, String>> {
    let of_run = allowances.iter().filter(|allowance| allowance.zone.is_none());
    let of_run = of_run.map(|allowance| allowance.deletes).chain(by_caller).max();
    let pending = cases.iter().flatten().fold(0_u64, |sum, (plan, _)| sum.saturating_add(plan.plan.pending));
    let accepts =
        |allowed: Option<u64>, pending: u64| pending > 0 && allowed.is_some_and(|allowed| pending <= allowed);
    let cases: Vec<Result<(ZonePlan, ZoneCase), String>> = cases
        .into_iter()
        .map(|case| {
            let (mut plan, drop) = case?;
            let of_zone = allowances.iter().rfind(|allowance| allowance.zone.as_ref() == Some(plan.zone()));
            let of_zone = of_zone.map(|allowance| allowance.deletes);
            let mut case = ZoneCase {
                zone: plan.zone().clone(),
                deletes: plan.plan.deletes,
                accepted: 0,
                good_deletes: plan.plan.good_deletes,
                good: plan.plan.good,
                drop,
                clock: plan.listing.inventory.clock,
                allowed: of_zone.filter(|_| pending == 0),
            };
            if plan.plan.pending > 0 && (accepts(of_run, pending) || accepts(of_zone, plan.plan.pending)) {
                plan.accept_changes(runner_policies, policy)?;
                case.accepted = plan.plan.deletes.saturating_sub(case.deletes);
            }
            Ok((plan, case))
        })
        .collect();
    let run = WholeRun::new(cases.iter().flatten().map(|(_, case)| case), of_run.filter(|_| pending == 0));
    let guarded = cases.into_iter().map(|case| {
        let (plan, case) = case?;
        let held = guard::hold(&policy.name, &policy.guard, &case, run);
        // Blocked for another reason, the listing may be incomplete all the same.
        let is_accepted = held.is_none() || !case.drop.exceeds(&policy.guard);
        let pending = plan.pending_text(policy, pending);
        Ok(GuardedPlan { plan, held, pending, is_accepted })
    });
    guarded.collect()
}

fn unguarded(plans: Vec<Result<ZonePlan, String>>) -> Vec<Result<GuardedPlan, String>> {
    let guarded = plans
        .into_iter()
        .map(|plan| Ok(GuardedPlan { plan: plan?, held: None, pending: None, is_accepted: true }));
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
