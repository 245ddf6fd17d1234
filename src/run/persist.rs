//! Saves the result of a run for the next one. [`after`] alone says what counts as a success.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::policy::Policy;
use crate::run::context::Runner;
use crate::run::plan::ZonePlan;
use crate::run::report::{RunReport, RunResult, Step, ZoneReport, sums_of};
use crate::snapshot::ZoneName;
use crate::state::audit::StepOutcome;
use crate::state::last_runs::{
    AcceptedListing, LastRun, LastRuns, MissedFromListing, PlanSums, Unparsed, ZoneMemory,
};
use crate::text::{chain, counted};

/// What the delete phase found in a zone, for the next run to compare with.
#[derive(Debug, Default)]
pub(crate) struct SeenZone {
    /// Its listing, if that was accepted.
    pub(crate) accepted: Option<AcceptedListing>,
    /// What the plan rested on; by a clock in doubt, only which changes were seen.
    pub(crate) rested_on: Option<Unparsed>,
    /// Whether this machine's clock is as the platform's.
    pub(crate) is_clock_trusted: bool,
    /// What the listing lacked, if it was not accepted for that.
    pub(crate) missed: Option<MissedFromListing>,
}

/// Saves the result of a run; `before` is the state when the run began, under the same lock. A run that cannot be saved
/// has failed in each of its zones.
///
/// `seen` has the zones that were listed for the delete phase. Zones that the policy no longer has are forgotten.
pub(crate) async fn persist(
    runner: &Runner,
    policy: &Policy,
    mut before: LastRuns,
    mut seen: BTreeMap<ZoneName, SeenZone>,
    report: &mut RunReport,
) {
    let zones = report.zones.iter().map(|zone| {
        let memory = before.zones.remove(&zone.zone).unwrap_or_default();
        let SeenZone { accepted, rested_on, missed, .. } = seen.remove(&zone.zone).unwrap_or_default();
        let accepted = accepted.or_else(|| memory.accepted.clone());
        let rested_on = rested_on.or_else(|| memory.rested_on.clone());
        let memory = after(memory, zone, report.finished_at);
        (zone.zone.clone(), ZoneMemory { accepted, rested_on, missed, ..memory })
    });
    let last = LastRun {
        run_id: report.run_id,
        started_at: report.started_at,
        finished_at: report.finished_at,
        result: report.result.as_str().to_owned(),
    };
    let runs = LastRuns { zones: zones.collect(), last: Some(last) };
    if let Err(error) = runner.state.set_last_runs(&policy.name, runs).await {
        report.fail(&format!("the result of this run is not saved: {}", chain(&error)));
    }
}

/// What is remembered of a zone after a run that ended at `at`; the accepted listing stays the same.
pub fn after(before: ZoneMemory, zone: &ZoneReport, at: Timestamp) -> ZoneMemory {
    let failure = first_failure(zone);
    let result = zone.result();
    let mut memory = ZoneMemory {
        last_run_at: Some(at),
        last_success_at: if result == RunResult::Success { Some(at) } else { before.last_success_at },
        failure,
        held: zone.held.clone(),
        result: Some(result.as_str().to_owned()),
        unmatched: zone.unmatched.clone(),
        ..before
    };
    // Without a plan of this run, the last one is better than nothing.
    if let Some(plan) = &zone.plan {
        memory.gate_since = memory.gate_since.or(Some(at)).filter(|_| plan.waiting_for_copies() > 0);
        let done = zone.steps.iter().filter(|step| step.has_deleted_a_snapshot()).count() as u64;
        // What is still to come: a deletion that is done is no longer planned.
        memory.plan = Some(PlanSums { delete: plan.delete.saturating_sub(done), ..plan.clone() });
        memory.instances.clone_from(&zone.instances);
        memory.elsewhere = zone.elsewhere;
        memory.coverage.clone_from(&zone.coverage);
    }
    memory
}

/// A warning if something in the zone of this plan has been waiting for an export longer than the policy's `alert_after`.
pub(crate) fn overdue_in(
    policy: &Policy,
    before: &LastRuns,
    plan: &ZonePlan,
    at: Timestamp,
) -> Option<String> {
    let alert_after = policy.export.as_ref().map(|export| export.alert_after);
    let since = before.zones.get(plan.zone())?.gate_since;
    overdue(alert_after, sums_of(&plan.plan).waiting_for_copies(), since, at)
}

/// A warning if `blocked` snapshots have been kept for want of a verified copy `since` before `alert_after`.
pub fn overdue(
    alert_after: Option<Duration>,
    blocked: u64,
    since: Option<Timestamp>,
    now: Timestamp,
) -> Option<String> {
    let since = since.filter(|_| blocked > 0)?;
    let alert_after = SignedDuration::try_from(alert_after?).ok()?;
    (now.duration_since(since) >= alert_after).then(|| {
        format!(
            "{} kept for want of a verified copy since {since}, longer than `alert_after`: look at its exports",
            counted(usize::try_from(blocked).unwrap_or(usize::MAX), "snapshot")
        )
    })
}

/// The first failure, or else the first step that was not begun because the program was stopping or it was too late.
pub(crate) fn first_failure(zone: &ZoneReport) -> Option<String> {
    zone.failures.first().cloned().or_else(|| zone.steps.iter().find_map(failure_of))
}

/// A sentence about a step that failed, or that was not begun because the program was stopping or it was too late.
pub(crate) fn failure_of(step: &Step) -> Option<String> {
    if step.outcome != StepOutcome::Failed && !step.was_stopped() {
        return None;
    }
    let why = step.message.as_deref().unwrap_or("it failed");
    let snapshot = &step.facts.snapshot;
    let of = snapshot.instance_name.as_deref().unwrap_or("an instance");
    let which = snapshot.id.map_or_else(|| format!("of {of}"), |id| id.to_string());
    Some(format!("not {}: snapshot {which}: {why}", step.facts.action.past()))
}
