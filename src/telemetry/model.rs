//! What is known of the daemon, its policies and its archives: the one place that reports are folded in.
//!
//! It is plain data behind a lock that is held for no longer than it takes to add something up. Whoever folds
//! something in for a policy, a zone or an archive that the configuration does not have (any more) folds nothing:
//! so a run that outlives its policy leaves no series behind.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::StatusCode;
use jiff::{SignedDuration, Timestamp};

use crate::archive::facts::ArchiveFacts;
use crate::clock::Clock;
use crate::exoscale::client::Observer;
use crate::exoscale::error::ErrorKind;
use crate::exoscale::wire::Quota;
use crate::policy::{ArchiveName, Policy, PolicyName};
use crate::run::remember;
use crate::run::report::{RunReport, RunResult, Step, StepOutcome, ZoneReport};
use crate::snapshot::ZoneName;
use crate::state::audit::Action;
use crate::state::last_runs::{LastRuns, ZoneMemory};
use crate::telemetry::metrics::{self, Histograms};
use crate::telemetry::status::{self, Last, Status};

/// A scheduler that did not turn for so long is stuck.
const TICK_LATE: Duration = Duration::from_mins(1);

/// The results of `policy_runs_total`.
pub(super) const RUN_RESULTS: [&str; 5] = ["success", "partial", "failed", "held", SKIPPED];
const SKIPPED: &str = "skipped";

/// The results of all counters of steps.
pub(super) const STEP_RESULTS: [&str; 4] = ["done", "failed", "blocked", SKIPPED];

/// How often, by result; every result is there.
pub(super) type Counts = BTreeMap<&'static str, u64>;

/// All that the daemon tells of itself. Cloning is cheap and shares everything.
#[derive(Debug, Clone)]
pub struct Telemetry {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    clock: Arc<dyn Clock>,
    model: Mutex<Model>,
    histograms: Histograms,
}

/// A policy as the configuration has it, with what is remembered of it.
#[derive(Debug, Clone)]
pub struct PolicyView<'a> {
    /// The policy.
    pub policy: &'a Policy,
    /// When the configuration first had it.
    pub first_seen_at: Timestamp,
    /// What came of its last runs, by the state directory.
    pub remembered: LastRuns,
    /// The longest span between two due times of its schedule; none without a schedule.
    pub expected_interval: Option<Duration>,
}

/// All that is known.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) version: String,
    pub(super) revision: String,
    pub(super) draining: bool,
    /// Whether a configuration was taken over, with what is remembered of its policies.
    configured: bool,
    pub(super) ticked_at: Option<Timestamp>,
    /// On the clock's elapsed time; the start counts as one.
    ticked: Duration,
    pub(super) reload_ok: bool,
    pub(super) loaded_at: Option<Timestamp>,
    /// Why the daemon can't remember how far it served the schedules, if so.
    pub(super) state_error: Option<String>,
    pub(super) policies: BTreeMap<PolicyName, PolicyModel>,
    /// The archives of the configuration.
    archive_names: BTreeSet<ArchiveName>,
    /// Those that were read.
    pub(super) archives: BTreeMap<ArchiveName, ArchiveFacts>,
    /// By what there may only be so many of: how many there are, and may be.
    pub(super) quotas: BTreeMap<String, (u64, Option<u64>)>,
    /// In seconds; this machine's clock is ahead of the API's by so much.
    pub(super) clock_skew: BTreeMap<ZoneName, f64>,
    pub(super) api_requests: BTreeMap<(ZoneName, &'static str, Option<StatusCode>), u64>,
    pub(super) api_retries: BTreeMap<(&'static str, &'static str), u64>,
}

#[derive(Debug)]
pub(super) struct PolicyModel {
    pub(super) enabled: bool,
    pub(super) schedule: Option<String>,
    pub(super) time_zone: Option<String>,
    pub(super) first_seen_at: Timestamp,
    pub(super) expected_interval: Option<Duration>,
    pub(super) next_run_at: Option<Timestamp>,
    pub(super) running_since: Option<Timestamp>,
    pub(super) last: Option<Last>,
    pub(super) missed_runs: u64,
    pub(super) runs: Counts,
    pub(super) steps: StepCounts,
    pub(super) export_bytes: u64,
    pub(super) export_resumes: u64,
    pub(super) export_checksum_mismatches: u64,
    pub(super) zones: BTreeMap<ZoneName, ZoneModel>,
}

/// How steps ended, by what they did.
#[derive(Debug)]
pub(super) struct StepCounts {
    pub(super) creates: Counts,
    pub(super) exports: Counts,
    pub(super) promotes: Counts,
    pub(super) deletes: Counts,
}

#[derive(Debug, Default)]
pub(super) struct ZoneModel {
    /// As the state directory remembers it, but without the accepted listing.
    pub(super) memory: ZoneMemory,
    /// Deletions of the last run that the platform was too busy for.
    pub(super) busy: u64,
}

impl Telemetry {
    /// Nothing is known yet but what this program is; `revision` is empty where it is not known.
    pub fn new(clock: Arc<dyn Clock>, version: &str, revision: &str) -> Self {
        let model = Model {
            version: version.to_owned(),
            revision: revision.to_owned(),
            draining: false,
            configured: false,
            ticked_at: None,
            ticked: clock.elapsed(),
            reload_ok: true,
            loaded_at: None,
            state_error: None,
            policies: BTreeMap::new(),
            archive_names: BTreeSet::new(),
            archives: BTreeMap::new(),
            quotas: BTreeMap::new(),
            clock_skew: BTreeMap::new(),
            api_requests: BTreeMap::new(),
            api_retries: BTreeMap::new(),
        };
        let shared = Shared { clock, model: Mutex::new(model), histograms: Histograms::new() };
        Self { shared: Arc::new(shared) }
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.shared.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a configuration over, at the start and at each reload. Every series of a policy is there from now on;
    /// policies, zones and archives that the configuration does not have any more are forgotten with all their
    /// series; the counters of those that stay go on. It also makes the program ready.
    pub fn configure(&self, policies: &[PolicyView<'_>], archives: &BTreeSet<ArchiveName>) {
        let mut model = self.model();
        let mut before = std::mem::take(&mut model.policies);
        for view in policies {
            let name = &view.policy.name;
            self.shared.histograms.begin(name);
            let policy = PolicyModel::configured(view, before.remove(name));
            model.policies.insert(name.clone(), policy);
        }
        for gone in before.keys() {
            self.shared.histograms.forget(gone);
        }
        let zones: BTreeSet<ZoneName> =
            policies.iter().flat_map(|view| view.policy.zones.iter().cloned()).collect();
        model.clock_skew.retain(|zone, _| zones.contains(zone));
        model.api_requests.retain(|(zone, ..), _| zones.contains(zone));
        model.archives.retain(|name, _| archives.contains(name));
        model.archive_names.clone_from(archives);
        model.configured = true;
    }

    /// A configuration was read and taken over, or was not and the old one stays.
    pub fn reloaded(&self, ok: bool, at: Timestamp) {
        let mut model = self.model();
        model.reload_ok = ok;
        if ok {
            model.loaded_at = Some(at);
        }
    }

    /// What the daemon must remember was written, or could not be, because of this.
    pub fn state_written(&self, error: Option<String>) {
        self.model().state_error = error;
    }

    /// The scheduler's loop turned.
    pub fn tick(&self, at: Timestamp) {
        let ticked = self.shared.clock.elapsed();
        let mut model = self.model();
        (model.ticked_at, model.ticked) = (Some(at), ticked);
    }

    /// No new run begins any more.
    pub fn draining(&self) {
        self.model().draining = true;
    }

    /// When the policy runs next by itself.
    pub fn next_run(&self, policy: &PolicyName, at: Option<Timestamp>) {
        self.of(policy, |policy| policy.next_run_at = at);
    }

    /// A run of the policy began.
    pub fn run_begun(&self, policy: &PolicyName, at: Timestamp) {
        self.of(policy, |policy| policy.running_since = Some(at));
    }

    /// So many runs of the policy were due while nobody was there to begin them.
    pub fn missed(&self, policy: &PolicyName, runs: u64) {
        self.of(policy, |policy| policy.missed_runs += runs);
    }

    /// A run of the policy was due while another one went on.
    pub fn skipped(&self, policy: &PolicyName) {
        self.of(policy, |policy| count(&mut policy.runs, SKIPPED));
    }

    /// A run of the policy that had begun gave way to one of another process.
    pub fn gave_way(&self, policy: &PolicyName) {
        self.of(policy, |policy| {
            policy.running_since = None;
            count(&mut policy.runs, SKIPPED);
        });
    }

    /// A run of the policy ended without a report: it panicked, or could not begin.
    pub fn run_panicked_or_refused(&self, policy: &PolicyName, at: Timestamp) {
        self.of(policy, |policy| {
            let started_at = policy.running_since.take().unwrap_or(at);
            let result = RunResult::Failed.as_str();
            count(&mut policy.runs, result);
            policy.last = Some(Last { started_at, finished_at: at, result: result.to_owned() });
        });
    }

    /// A run ended.
    pub fn run_ended(&self, report: &RunReport) {
        let histograms = &self.shared.histograms;
        let mut model = self.model();
        let Some(policy) = model.policies.get_mut(&report.policy) else { return };
        policy.fold(report);
        histograms.run_took(&report.policy, report.finished_at.duration_since(report.started_at));
        for step in report.zones.iter().flat_map(|zone| &zone.steps) {
            if let (StepOutcome::Done, Some(transfer)) = (step.outcome, &step.transfer) {
                histograms.export_took(&report.policy, transfer.seconds);
            }
        }
        if !report.quotas.is_empty() {
            model.fold_quotas(&report.quotas);
        }
    }

    /// What an archive holds by now.
    pub fn archive(&self, name: &ArchiveName, facts: ArchiveFacts) {
        let mut model = self.model();
        if model.archive_names.contains(name) {
            model.archives.insert(name.clone(), facts);
        }
    }

    /// This machine's clock is ahead of the API's by so many seconds.
    pub fn clock_skew(&self, zone: &ZoneName, seconds: f64) {
        let mut model = self.model();
        if model.has_zone(zone) {
            model.clock_skew.insert(zone.clone(), seconds);
        }
    }

    fn of(&self, policy: &PolicyName, fold: impl FnOnce(&mut PolicyModel)) {
        if let Some(policy) = self.model().policies.get_mut(policy) {
            fold(policy);
        }
    }

    /// Whether the scheduler's loop turns.
    ///
    /// # Errors
    /// Why not, as a sentence.
    pub fn alive(&self) -> Result<(), String> {
        let still = self.shared.clock.elapsed().saturating_sub(self.model().ticked);
        if still <= TICK_LATE {
            return Ok(());
        }
        Err(format!("the scheduler's loop did not turn for {} s", still.as_secs()))
    }

    /// Whether a configuration is in force and runs may begin.
    ///
    /// # Errors
    /// Why not, as a sentence.
    pub fn ready(&self) -> Result<(), String> {
        let model = self.model();
        if model.draining {
            Err("the program was told to stop: no new run begins".to_owned())
        } else if model.configured {
            Ok(())
        } else {
            Err("the configuration and the state are not read yet".to_owned())
        }
    }

    /// Everything in the text format of Prometheus, version 0.0.4.
    pub fn metrics_text(&self) -> String {
        metrics::text(&self.model(), &self.shared.histograms)
    }

    /// Everything as `/api/v1/status` tells it.
    pub fn status_json(&self) -> Status {
        status::of(&self.model(), self.shared.clock.now())
    }
}

impl Observer for Telemetry {
    fn answered(&self, zone: &ZoneName, operation: &'static str, status: Option<StatusCode>, took: Duration) {
        let mut model = self.model();
        if model.has_zone(zone) {
            *model.api_requests.entry((zone.clone(), operation, status)).or_default() += 1;
            self.shared.histograms.request_took(operation, took);
        }
    }

    fn retried(&self, operation: &'static str, reason: ErrorKind) {
        *self.model().api_retries.entry((operation, reason.as_str())).or_default() += 1;
    }

    fn clock_compared(&self, zone: &ZoneName, ahead: SignedDuration) {
        self.clock_skew(zone, ahead.as_secs_f64());
    }
}

impl Model {
    fn has_zone(&self, zone: &ZoneName) -> bool {
        self.policies.values().any(|policy| policy.zones.contains_key(zone))
    }

    fn fold_quotas(&mut self, quotas: &[Quota]) {
        self.quotas =
            quotas.iter().map(|quota| (quota.resource.clone(), (quota.usage, quota.limit))).collect();
    }
}

impl PolicyModel {
    /// The policy as a configuration has it; what was counted `before` goes on.
    fn configured(view: &PolicyView<'_>, before: Option<Self>) -> Self {
        let policy = view.policy;
        let mut model = before.unwrap_or_else(|| Self::new(view.first_seen_at));
        model.enabled = policy.enabled;
        model.schedule = policy.schedule.as_ref().map(|schedule| schedule.as_str().to_owned());
        model.time_zone = policy.time_zone.iana_name().map(str::to_owned);
        model.first_seen_at = view.first_seen_at;
        model.expected_interval = view.expected_interval;
        // A schedule may be another one now; the scheduler tells.
        model.next_run_at = None;
        if let Some(last) = &view.remembered.last {
            // A run that could not begin is known here alone.
            if model.last.as_ref().is_none_or(|known| known.finished_at < last.finished_at) {
                model.last = Some(Last {
                    started_at: last.started_at,
                    finished_at: last.finished_at,
                    result: last.result.clone(),
                });
            }
        }
        let mut zones_before = std::mem::take(&mut model.zones);
        for zone in &policy.zones {
            let mut known = zones_before.remove(zone).unwrap_or_default();
            if let Some(remembered) = view.remembered.zones.get(zone) {
                // A run by hand may have been the last one.
                if known.memory.last_run_at < remembered.last_run_at {
                    known.memory = ZoneMemory { accepted: None, ..remembered.clone() };
                }
            }
            model.zones.insert(zone.clone(), known);
        }
        model
    }

    fn new(first_seen_at: Timestamp) -> Self {
        Self {
            enabled: false,
            schedule: None,
            time_zone: None,
            first_seen_at,
            expected_interval: None,
            next_run_at: None,
            running_since: None,
            last: None,
            missed_runs: 0,
            runs: zeros(&RUN_RESULTS),
            steps: StepCounts {
                creates: zeros(&STEP_RESULTS),
                exports: zeros(&STEP_RESULTS),
                promotes: zeros(&STEP_RESULTS),
                deletes: zeros(&STEP_RESULTS),
            },
            export_bytes: 0,
            export_resumes: 0,
            export_checksum_mismatches: 0,
            zones: BTreeMap::new(),
        }
    }

    fn fold(&mut self, report: &RunReport) {
        self.running_since = None;
        let result = report.result.as_str();
        count(&mut self.runs, result);
        self.last = Some(Last {
            started_at: report.started_at,
            finished_at: report.finished_at,
            result: result.to_owned(),
        });
        for zone in &report.zones {
            for step in &zone.steps {
                self.fold_step(step);
            }
            if let Some(known) = self.zones.get_mut(&zone.zone) {
                known.fold(zone, report.finished_at);
            }
        }
    }

    fn fold_step(&mut self, step: &Step) {
        let counts = match step.action {
            Action::Create => Some(&mut self.steps.creates),
            Action::Export => Some(&mut self.steps.exports),
            Action::Promote => Some(&mut self.steps.promotes),
            Action::Delete => Some(&mut self.steps.deletes),
            // Templates beyond `keep`: no metric of theirs.
            Action::DeleteTemplate => None,
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
    fn fold(&mut self, report: &ZoneReport, at: Timestamp) {
        self.memory = remember::after(std::mem::take(&mut self.memory), report, at);
        let busy = |step: &&Step| step.action == Action::Delete && step.outcome == StepOutcome::Blocked;
        self.busy = report.steps.iter().filter(busy).count() as u64;
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

fn zeros(results: &[&'static str]) -> Counts {
    results.iter().map(|result| (*result, 0)).collect()
}

fn count(counts: &mut Counts, result: &'static str) {
    *counts.entry(result).or_default() += 1;
}
