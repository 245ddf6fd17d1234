//! What notifiers may be notified of, found in the model: each condition that a policy, a zone or an archive can be in, with
//! what is wrong, if anything is. Where that is not known there is no condition, so that nothing is said to be over.

use std::collections::BTreeSet;

use jiff::Timestamp;
use uuid::Uuid;

use crate::policy::name::{ArchiveName, PolicyName};
use crate::policy::notifier::Event;
use crate::run::instance_counts::is_remembered;
use crate::run::report::RunResult;
use crate::snapshot::ZoneName;
use crate::state::last_runs::InstanceCounts;
use crate::telemetry::model::{Model, PolicyModel, ZoneModel};
use crate::telemetry::problem::ProblemLine;
use crate::text::counted;

/// A condition of a policy in a zone, of a zone, or of an archive.
#[derive(Debug, Clone)]
pub(super) struct Condition {
    pub(super) event: Event,
    /// Such as `policy nightly in ch-gva-2`.
    pub(super) of: String,
    pub(super) policy: Option<PolicyName>,
    pub(super) zone: Option<ZoneName>,
    /// Of the last run.
    pub(super) run_id: Option<Uuid>,
    /// What is wrong, without names: `2 instances are not listed any more`.
    pub(super) title: String,
    /// What is wrong; empty if nothing is.
    pub(super) problems: Vec<ProblemLine>,
    /// What more of it has to be said although it was said before: instances.
    pub(super) subjects: BTreeSet<String>,
    /// The command that shows more.
    pub(super) next_command: String,
}

impl Condition {
    /// What is wrong where, for what is remembered.
    pub(super) fn key(&self) -> String {
        format!("{} of {}", self.event.as_str(), self.of)
    }
}

/// All conditions as of `now`.
pub(super) fn conditions(model: &Model, now: Timestamp) -> Vec<Condition> {
    let mut all = Vec::new();
    for (name, policy) in model.policies.iter().filter(|(_, policy)| policy.status.enabled) {
        for (zone, known) in &policy.zones {
            all.extend(of_policy(name, policy, zone, known, now));
        }
        all.extend(policy.failed_hooks.as_ref().map(|failed| of_hooks(name, policy.last_run_id, failed)));
    }
    for (zone, coverage) in model.coverage().into_iter().filter(|(_, coverage)| coverage.at.is_some()) {
        let names = &coverage.uncovered_instances;
        let problem =
            |name: &String| ProblemLine::new(Some(name), "no policy takes or exports its snapshots");
        all.push(Condition {
            event: Event::Uncovered,
            of: format!("zone {zone}"),
            policy: None,
            zone: Some(zone.clone()),
            run_id: None,
            title: are(names.len(), "instance", "without a backup"),
            problems: names.iter().map(problem).collect(),
            subjects: names.iter().cloned().collect(),
            next_command: "snapwarden coverage".to_owned(),
        });
    }
    for (zone, coverage) in model.coverage().into_iter().filter(|(_, coverage)| coverage.at.is_some()) {
        all.push(unexplained(zone, usize::try_from(coverage.unexplained).unwrap_or(usize::MAX)));
    }
    for (archive, stats) in model.archives.iter().filter(|(_, stats)| stats.error.is_none()) {
        all.push(corrupt(archive, usize::try_from(stats.corrupt).unwrap_or(usize::MAX)));
    }
    all
}

fn of_policy(
    name: &PolicyName,
    policy: &PolicyModel,
    zone: &ZoneName,
    known: &ZoneModel,
    now: Timestamp,
) -> Vec<Condition> {
    let memory = &known.memory;
    let of = |event, title, problems, next_command: String| Condition {
        event,
        of: format!("policy {name} in {zone}"),
        policy: Some(name.clone()),
        zone: Some(zone.clone()),
        run_id: policy.last_run_id,
        title,
        problems,
        subjects: BTreeSet::new(),
        next_command,
    };
    let mut all = Vec::new();
    let Some(result) = memory.result.as_deref() else { return all };
    let is = |known: RunResult| result == known.as_str();
    let has_failed = is(RunResult::Failed) || is(RunResult::Partial);
    let failed = if is(RunResult::Partial) { "the last run failed in part" } else { "the last run failed" };
    let mut problems: Vec<ProblemLine> = Vec::new();
    if has_failed {
        problems.clone_from(&known.failed);
        if problems.is_empty() {
            let texts = memory.failure.iter().chain(&memory.unmatched).cloned();
            problems.extend(
                texts.chain(policy.judge(known, now).missing).map(|text| ProblemLine::new(None, text)),
            );
        }
        if problems.is_empty() {
            problems.push(ProblemLine::new(None, "the log says why"));
        }
    }
    all.push(of(Event::Failure, failed.to_owned(), problems, "snapwarden status".to_owned()));
    let plan = format!("snapwarden plan {name}");
    if memory.held.is_some() || !has_failed {
        let held = memory.held.iter().map(|why| ProblemLine::new(None, why.clone())).collect();
        all.push(of(Event::Held, "deletions are blocked by the guard".to_owned(), held, plan.clone()));
    }
    if let Some(sums) = &memory.plan {
        let pending = usize::try_from(sums.pending).unwrap_or(usize::MAX);
        let title = format!("{} until a change has settled", waiting(pending));
        let text = format!("`snapwarden allow {name} {pending}` lets them pass, if the change is meant");
        let problems = if pending == 0 { Vec::new() } else { vec![ProblemLine::new(None, text)] };
        all.push(of(Event::Pending, title, problems, plan));
    }
    let is_vanished = |one: &&InstanceCounts| !one.is_exempt && is_remembered(one, now);
    let vanished: Vec<&InstanceCounts> = memory.instances.iter().filter(is_vanished).collect();
    let problem = |one: &&InstanceCounts| {
        let newest = one.newest_verified_at.iter().max_by_key(|(_, at)| **at);
        let copy = newest.map_or_else(
            || "no verified copy".to_owned(),
            |(archive, at)| format!("newest verified copy of {at} in {archive}"),
        );
        ProblemLine::new(Some(&one.name), format!("not listed any more; {copy}"))
    };
    let coverage = || "snapwarden coverage".to_owned();
    let title = are(vanished.len(), "instance", "not listed any more");
    let subjects = vanished.iter().map(|one| one.id.to_string()).collect();
    let problems = vanished.iter().map(problem).collect();
    all.push(Condition { subjects, ..of(Event::Vanished, title, problems, coverage()) });
    let lacking = policy.judge(known, now).lacking;
    let problem = |(name, newest): &(String, Option<Timestamp>)| {
        let newest = newest.map_or_else(
            || "no good snapshot".to_owned(),
            |at| format!("the newest good snapshot is of {at}"),
        );
        ProblemLine::new(Some(name), newest)
    };
    let title = format!("{} without a new enough snapshot", counted(lacking.len(), "instance"));
    let subjects = lacking.iter().map(|(name, _)| name.clone()).collect();
    let problems = lacking.iter().map(problem).collect();
    all.push(Condition { subjects, ..of(Event::Stale, title, problems, coverage()) });
    all
}

/// The hooks that follow a run. They leave its result as it is, so nothing else reports them.
fn of_hooks(name: &PolicyName, last_run_id: Option<Uuid>, failed: &[String]) -> Condition {
    Condition {
        event: Event::Failure,
        of: format!("hooks of policy {name}"),
        policy: Some(name.clone()),
        zone: None,
        run_id: last_run_id,
        title: format!("{} failed after the last run", counted(failed.len(), "hook")),
        problems: failed.iter().map(|text| ProblemLine::new(None, text.clone())).collect(),
        subjects: BTreeSet::new(),
        next_command: "snapwarden check".to_owned(),
    }
}

fn corrupt(archive: &ArchiveName, count: usize) -> Condition {
    let title = format!("{} missing or damaged", counted(count, "copy"));
    let problems = if count == 0 { Vec::new() } else { vec![ProblemLine::new(None, title.clone())] };
    Condition {
        event: Event::Corrupt,
        of: format!("archive {archive}"),
        policy: None,
        zone: None,
        run_id: None,
        title,
        problems,
        // One more of them is news, one less is not.
        subjects: (1..=count.min(1000)).map(|number| number.to_string()).collect(),
        next_command: format!("snapwarden archive list {archive}"),
    }
}

fn unexplained(zone: &ZoneName, count: usize) -> Condition {
    let title = format!("{} vanished unexplained", counted(count, "snapshot"));
    let text = "neither the audit log nor the API's events nor the end of their instance explains it";
    Condition {
        event: Event::Unexplained,
        of: format!("zone {zone}"),
        policy: None,
        zone: Some(zone.clone()),
        run_id: None,
        title,
        problems: if count == 0 { Vec::new() } else { vec![ProblemLine::new(None, text)] },
        // One more of them is news, one less is not.
        subjects: (1..=count.min(1000)).map(|number| number.to_string()).collect(),
        next_command: "snapwarden history --action vanish".to_owned(),
    }
}

fn are(count: usize, noun: &str, what: &str) -> String {
    format!("{} {} {what}", counted(count, noun), if count == 1 { "is" } else { "are" })
}

fn waiting(count: usize) -> String {
    format!("{} {}", counted(count, "deletion"), if count == 1 { "waits" } else { "wait" })
}
