//! The state of the daemon, its policies and its archives, from which metrics and status are made.
//!
//! It is plain data behind a lock that is held for no longer than an addition takes. A report about a policy, a zone
//! or an archive that the configuration does not have (any more) is ignored, so that a run that outlives its policy
//! leaves no series behind.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::LazyLock;
use std::time::Duration;

use http::StatusCode;
use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use crate::archive::stats::ArchiveStats;
use crate::exoscale::wire::Quota;
use crate::policy::Policy;
use crate::policy::name::{ArchiveName, NotifierName, PolicyName};
use crate::run::coverage::{self, InstanceStates, Judged};
use crate::run::details::{CopyDetails, ZoneDetails};
use crate::run::downloads::RunningDownload;
use crate::run::persist;
use crate::run::report::{Hook, RunReport, Step, ZoneReport};
use crate::snapshot::ZoneName;
use crate::state::audit::{Action, StepOutcome};
use crate::state::history::Change;
use crate::state::last_runs::{LastRun, LastRuns, ZoneCoverage, ZoneMemory};
use crate::state::schedules::Schedules;
use crate::telemetry::problem::ProblemLine;
use crate::telemetry::status::{DownloadStatus, Last, PolicyStatus, Status, ZoneStatus};
use crate::text::excerpt;

/// The results of `policy_runs_total`.
pub(super) const RUN_RESULTS: [&str; 5] = ["success", "partial", "failed", "held", SKIPPED];
pub(super) const SKIPPED: &str = "skipped";

/// The results of all counters of steps.
pub(super) const STEP_RESULTS: [&str; 4] = ["done", "failed", "blocked", SKIPPED];

/// The results of `notifications_total`.
const NOTIFICATION_RESULTS: [&str; 3] = ["sent", "failed", "dropped"];

/// The longest value of a label that comes from outside; a name at Exoscale has at most 255 characters.
pub(super) const LABEL_CHARACTERS_MAX: usize = 255;

/// How many failures of a zone are remembered; the log has all.
const FAILURES_MAX: usize = 100;

/// How often, by result; every result is there from the start.
pub(super) type Counts = BTreeMap<&'static str, u64>;

/// A policy of the configuration, with its facts from the state directory.
#[derive(Debug, Clone)]
pub struct PolicyView<'a> {
    /// The policy.
    pub policy: &'a Policy,
    /// When the configuration first had it.
    pub first_seen_at: Timestamp,
    /// Its last runs, from the state directory.
    pub remembered: LastRuns,
    /// The longest span between two due times of its schedule; none without a schedule.
    pub expected_interval: Option<Duration>,
}

impl<'a> PolicyView<'a> {
    /// A policy as of `now`, with the schedules that were served and its last runs.
    pub fn of(policy: &'a Policy, schedules: &Schedules, remembered: LastRuns, now: Timestamp) -> Self {
        let schedule = policy.schedule.as_ref().filter(|_| policy.enabled);
        let gap = schedule.and_then(|schedule| schedule.longest_gap(now, &policy.time_zone));
        Self {
            policy,
            first_seen_at: schedules.policies.get(&policy.name).map_or(now, |served| served.first_seen_at),
            remembered,
            expected_interval: gap.map(SignedDuration::unsigned_abs),
        }
    }
}

/// The whole.
#[derive(Debug)]
pub(super) struct Model {
    /// As served, but for the moment and the lists, which are filled in when it is.
    pub(super) status: Status,
    pub(super) revision: String,
    /// Whether a configuration was taken over, with the state of its policies.
    pub(super) configured: bool,
    pub(super) ticked_at: Option<Timestamp>,
    /// On the clock's elapsed time; the start counts as one.
    pub(super) ticked: Duration,
    pub(super) policies: BTreeMap<PolicyName, PolicyModel>,
    /// The archives of the configuration.
    pub(super) archive_names: BTreeSet<ArchiveName>,
    /// Those that were read.
    pub(super) archives: BTreeMap<ArchiveName, ArchiveStats>,
    /// Usage and limit, by resource; the name is cut for its label, so that no two series are the same.
    pub(super) quotas: BTreeMap<String, (u64, Option<u64>)>,
    /// What was deleted last, the newest last.
    pub(super) deleted_last: Vec<Change>,
    /// How many snapshots are on hold; none if that is not known.
    pub(super) holds: Option<u64>,
    /// How far this machine's clock is ahead of the API's, in seconds.
    pub(super) clock_skew: BTreeMap<ZoneName, f64>,
    pub(super) api_requests: BTreeMap<(ZoneName, &'static str, Option<StatusCode>), u64>,
    pub(super) api_retries: BTreeMap<(&'static str, &'static str), u64>,
    /// By notifier and result.
    pub(super) notifications: BTreeMap<NotifierName, Counts>,
}

#[derive(Debug)]
pub(super) struct PolicyModel {
    pub(super) policy: Policy,
    /// As served, but for the zones, which are filled in when it is.
    pub(super) status: PolicyStatus,
    /// The id of the last run, if any is known.
    pub(super) last_run_id: Option<Uuid>,
    pub(super) first_seen_at: Timestamp,
    pub(super) expected_interval: Option<Duration>,
    /// How many deletions the guard may let pass in the next run.
    pub(super) allowance: u64,
    /// A snapshot that is kept for longer than this only for want of a copy is an alert.
    pub(super) alert_after: Option<Duration>,
    pub(super) runs: Counts,
    pub(super) creates: Counts,
    pub(super) exports: Counts,
    pub(super) promotes: Counts,
    pub(super) deletes: Counts,
    pub(super) export_bytes: u64,
    pub(super) export_resumes: u64,
    pub(super) export_checksum_mismatches: u64,
    pub(super) hook_failures: u64,
    /// Why hooks at the end of the last run failed; none before a run of this process.
    pub(super) failed_hooks: Option<Vec<String>>,
    pub(super) zones: BTreeMap<ZoneName, ZoneModel>,
}

#[derive(Debug, Default)]
pub(super) struct ZoneModel {
    /// As in the state directory, but without the accepted listing.
    pub(super) memory: ZoneMemory,
    /// What keeps each snapshot and copy, by the last run; none if that was of another process.
    pub(super) details: Option<ZoneDetails>,
    /// How many instances have the snapshots that they should have, as judged for the last answer.
    pub(super) states: InstanceStates,
    /// Whether the policy takes snapshots itself.
    pub(super) creates: bool,
    /// Whether the policy is enabled: the last run of one that is not needs no attention any more.
    enabled: bool,
    /// Deletions of the last run that were blocked only when they were to begin, by the reason.
    blocked: Counts,
    /// What failed in the last run of this process.
    pub(super) failed: Vec<ProblemLine>,
}

/// No run.
static NOTHING: LazyLock<ZoneMemory> = LazyLock::new(ZoneMemory::default);

impl Model {
    pub(super) fn has_zone(&self, zone: &ZoneName) -> bool {
        self.policies.values().any(|policy| policy.zones.contains_key(zone))
    }

    /// Judges all instances as of `now`, for metrics.
    pub(super) fn judge(&mut self, now: Timestamp) {
        for policy in self.policies.values_mut() {
            let judged: Vec<InstanceStates> =
                policy.zones.values().map(|zone| policy.judge(zone, now).states).collect();
            for (zone, states) in policy.zones.values_mut().zip(judged) {
                zone.states = states;
            }
        }
    }

    /// How the instances of each zone are covered, by the last listing of any policy; empty before the first.
    pub(super) fn coverage(&self) -> BTreeMap<&ZoneName, ZoneCoverage> {
        let mut zones: BTreeMap<&ZoneName, ZoneCoverage> = BTreeMap::new();
        for (name, zone) in self.policies.values().flat_map(|policy| &policy.zones) {
            let known = zones.entry(name).or_default();
            if let Some(coverage) = zone.memory.coverage.as_ref().filter(|found| found.at > known.at) {
                known.clone_from(coverage);
            }
        }
        zones
    }

    /// Which notifiers there are from now on.
    pub(super) fn set_notifiers(&mut self, names: BTreeSet<NotifierName>) {
        self.notifications.retain(|name, _| names.contains(name));
        for name in names {
            self.notifications.entry(name).or_insert_with(|| zeros(&NOTIFICATION_RESULTS));
        }
    }

    /// A notification was sent, or was not.
    pub(super) fn notified(&mut self, name: &NotifierName, result: &'static str) {
        if let Some(counts) = self.notifications.get_mut(name) {
            count(counts, result);
        }
    }

    /// The status as of `now`.
    pub(super) fn status(&self, running: Vec<RunningDownload>, now: Timestamp) -> Status {
        let policies = self.policies.iter().map(|(name, policy)| (name.to_string(), policy.status(now)));
        let archives = self.archives.iter().map(|(name, stats)| (name.to_string(), stats.clone()));
        Status {
            at: Some(now),
            policies: policies.collect(),
            archives: archives.collect(),
            zones: self.coverage().into_iter().map(|(name, zone)| (name.to_string(), zone)).collect(),
            downloads: running.into_iter().map(download_status).collect(),
            ..self.status.clone()
        }
    }

    /// What a run deleted is not there any more, whichever policy knew it.
    pub(super) fn forget_deleted(&mut self, report: &RunReport) {
        for zone in &report.zones {
            let deleted = zone.steps.iter().filter(|step| step.has_deleted_a_snapshot());
            let deleted: HashSet<_> = deleted.filter_map(|step| step.facts.snapshot.id).collect();
            let zones = self.policies.values_mut().filter_map(|policy| policy.zones.get_mut(&zone.zone));
            for details in zones.filter_map(|zone| zone.details.as_mut()).filter(|_| !deleted.is_empty()) {
                details.snapshots.retain(|snapshot| !deleted.contains(&snapshot.id));
            }
        }
    }

    pub(super) fn fold_quotas(&mut self, quotas: &[Quota]) {
        let cut =
            |quota: &Quota| (excerpt(&quota.resource, LABEL_CHARACTERS_MAX), (quota.usage, quota.limit));
        self.quotas = quotas.iter().map(cut).collect();
    }
}

impl PolicyModel {
    /// The policy as a configuration has it; the counters of `before` are continued.
    pub(super) fn configured(view: &PolicyView<'_>, before: Option<Self>) -> Self {
        let policy = view.policy;
        let mut model = before.unwrap_or_else(|| Self::new(policy, view.first_seen_at));
        model.policy = policy.clone();
        model.alert_after = policy.export.as_ref().map(|export| export.alert_after);
        model.first_seen_at = view.first_seen_at;
        model.expected_interval = view.expected_interval;
        let status = &mut model.status;
        (status.enabled, status.paused_since) = (policy.enabled, policy.paused_since);
        status.schedule = policy.schedule.as_ref().map(|schedule| schedule.as_str().to_owned());
        status.timezone = policy.time_zone.iana_name().map(str::to_owned);
        // The schedule may have changed; the daemon's loop reports the next run.
        status.next_run_at = None;
        let mut zones_before = std::mem::take(&mut model.zones);
        for zone in &policy.zones {
            let mut known = zones_before.remove(zone).unwrap_or_default();
            (known.creates, known.enabled) = (policy.create, policy.enabled);
            model.zones.insert(zone.clone(), known);
        }
        model.recall(view.remembered.clone());
        model
    }

    /// Takes over what the state directory remembers of the last runs, where it is newer: a manual one may have been the
    /// last. Counters count the runs of this process alone.
    pub(super) fn recall(&mut self, mut remembered: LastRuns) {
        let known = &mut self.status.last;
        // A run that could not begin is known here alone.
        let is_newer =
            |last: &LastRun| known.as_ref().is_none_or(|known| known.finished_at < last.finished_at);
        if let Some(last) = remembered.last.filter(is_newer) {
            *known = Some(Last::from(&last));
            self.last_run_id = Some(last.run_id);
        }
        for (name, zone) in &mut self.zones {
            let Some(remembered) = remembered.zones.remove(name) else { continue };
            if zone.memory.last_run_at < remembered.last_run_at {
                zone.memory = ZoneMemory { accepted: None, rested_on: None, ..remembered };
                zone.blocked.clear();
                zone.details = None;
                zone.failed.clear();
            }
        }
    }

    /// Judges the instances of a zone as of `now`: they grow stale without any run, too.
    pub(super) fn judge(&self, zone: &ZoneModel, now: Timestamp) -> Judged {
        let gap = self.expected_interval.and_then(|span| SignedDuration::try_from(span).ok());
        coverage::judge(&self.policy, gap, &zone.memory.instances, now)
    }

    fn status(&self, now: Timestamp) -> PolicyStatus {
        let status = |zone: &ZoneModel| {
            let judged = self.judge(zone, now);
            let unmatched = zone.in_force().unmatched.clone();
            ZoneStatus {
                instances: judged.states,
                problems: [unmatched, judged.missing, judged.stale].into_iter().flatten().collect(),
                last_run_at: zone.memory.last_run_at,
                last_success_at: zone.memory.last_success_at,
                ..ZoneStatus::of(zone.in_force(), self.alert_after, now)
            }
        };
        let zones = self.zones.iter().map(|(name, zone)| (name.to_string(), status(zone)));
        PolicyStatus { zones: zones.collect(), ..self.status.clone() }
    }

    fn new(policy: &Policy, first_seen_at: Timestamp) -> Self {
        Self {
            policy: policy.clone(),
            status: PolicyStatus::default(),
            last_run_id: None,
            first_seen_at,
            expected_interval: None,
            alert_after: None,
            allowance: 0,
            runs: zeros(&RUN_RESULTS),
            creates: zeros(&STEP_RESULTS),
            exports: zeros(&STEP_RESULTS),
            promotes: zeros(&STEP_RESULTS),
            deletes: zeros(&STEP_RESULTS),
            export_bytes: 0,
            export_resumes: 0,
            export_checksum_mismatches: 0,
            hook_failures: 0,
            failed_hooks: None,
            zones: BTreeMap::new(),
        }
    }

    pub(super) fn fold(&mut self, report: &RunReport) {
        self.status.running_since = None;
        let result = report.result.as_str();
        count(&mut self.runs, result);
        self.status.last = Some(Last {
            started_at: report.started_at,
            finished_at: report.finished_at,
            result: result.to_owned(),
        });
        self.last_run_id = Some(report.run_id);
        self.hook_failures += report.hooks.iter().filter(|hook| hook.failure.is_some()).count() as u64;
        // A run without a successful `before` has failed itself.
        let ended = report.hooks.iter().filter(|hook| hook.hook != Hook::Before);
        self.failed_hooks = Some(ended.filter_map(|hook| hook.failure.clone()).collect());
        for zone in &report.zones {
            for step in &zone.steps {
                self.fold_step(step);
            }
            if let Some(known) = self.zones.get_mut(&zone.zone) {
                known.fold(zone, report.finished_at);
            }
        }
    }

    pub(super) fn fold_step(&mut self, step: &Step) {
        let counts = match step.facts.action {
            Action::Create => Some(&mut self.creates),
            Action::Export => Some(&mut self.exports),
            Action::Promote => Some(&mut self.promotes),
            Action::Delete => Some(&mut self.deletes),
            // There is no metric for these: templates beyond `keep`, copies, and manual steps.
            Action::DeleteTemplate
            | Action::PruneCopy
            | Action::Copy
            | Action::Restore
            | Action::StopInstance
            | Action::Revert
            | Action::Reset
            | Action::StartInstance
            | Action::Vanish => None,
        };
        if let Some(counts) = counts {
            count(counts, word(step.outcome));
        }
        if let Some(transfer) = &step.transfer {
            self.export_bytes += transfer.bytes;
            self.export_resumes += transfer.resumes;
            self.export_checksum_mismatches += transfer.checksum_mismatches;
        }
    }
}

impl ZoneModel {
    /// What the last run left to attend to; nothing of a policy that is not enabled.
    pub(super) fn in_force(&self) -> &ZoneMemory {
        if self.enabled { &self.memory } else { &NOTHING }
    }

    /// How many deletions of the last run were blocked for this reason only when they were to begin.
    pub(super) fn blocked_late(&self, reason: &str) -> u64 {
        self.blocked.get(reason).copied().filter(|_| self.enabled).unwrap_or_default()
    }

    pub(super) fn fold(&mut self, report: &ZoneReport, at: Timestamp) {
        self.memory = persist::after(std::mem::take(&mut self.memory), report, at);
        if report.plan.is_some() {
            self.details.clone_from(&report.details);
        }
        let pruned = report
            .steps
            .iter()
            .filter(|step| step.facts.action == Action::PruneCopy && step.outcome == StepOutcome::Done);
        let pruned: HashSet<_> = pruned.map(|step| (&step.facts.archive, step.facts.snapshot.id)).collect();
        if let Some(details) = &mut self.details {
            let is_there =
                |copy: &CopyDetails| !pruned.contains(&(&Some(copy.archive.clone()), Some(copy.snapshot_id)));
            details.copies.retain(is_there);
        }
        let is_blocked =
            |step: &&Step| step.facts.action == Action::Delete && step.outcome == StepOutcome::Blocked;
        self.blocked.clear();
        for step in report.steps.iter().filter(is_blocked) {
            count(&mut self.blocked, step.blocked_by.unwrap_or("busy"));
        }
        self.failed = failures(report);
    }
}

fn download_status(download: RunningDownload) -> DownloadStatus {
    DownloadStatus {
        policy: download.policy.map(|policy| policy.to_string()).unwrap_or_default(),
        zone: download.zone.to_string(),
        snapshot_id: download.snapshot_id.to_string(),
        snapshot_name: download.snapshot_name,
        instance_name: download.instance_name,
        archives: download.archives.iter().map(ToString::to_string).collect(),
        started_at: Some(download.started_at),
        how_far: download.how_far,
    }
}

/// A step's outcome as a label.
fn word(outcome: StepOutcome) -> &'static str {
    match outcome {
        StepOutcome::Done => "done",
        StepOutcome::Failed => "failed",
        StepOutcome::Blocked => "blocked",
        StepOutcome::Skipped => SKIPPED,
    }
}

/// What failed in a zone, of the zone and of each snapshot.
fn failures(report: &ZoneReport) -> Vec<ProblemLine> {
    let of_zone = report.failures.iter().chain(&report.missing).chain(&report.unmatched);
    let failed = report.steps.iter().filter(|step| step.outcome == StepOutcome::Failed);
    let of_step = failed.map(|step| {
        let why = step.message.as_deref().unwrap_or("it failed");
        let text = format!("not {}: {why}", step.facts.action.past());
        ProblemLine::new(step.facts.snapshot.instance_name.as_deref(), text)
    });
    of_zone.map(|text| ProblemLine::new(None, text.clone())).chain(of_step).take(FAILURES_MAX).collect()
}

fn zeros(results: &[&'static str]) -> Counts {
    results.iter().map(|result| (*result, 0)).collect()
}

pub(super) fn count(counts: &mut Counts, result: &'static str) {
    *counts.entry(result).or_default() += 1;
}
