//! What the program did and how it is, as log lines, as metrics, and as a status.
//!
//! Every event is reported to [`Telemetry`] and added up in one place, [`model`], from which [`metrics`] and [`status`]
//! are made, so that they can't disagree, and which [`notifications`] reads, too. The log is apart from them.

mod conditions;
pub mod logging;
mod mail;
mod message;
pub mod metrics;
pub mod model;
pub mod notifications;
pub mod notifier;
pub mod overview;
mod problem;
pub mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use http::StatusCode;
use jiff::{SignedDuration, Timestamp};

use crate::archive::stats::ArchiveStats;
use crate::clock::Clock;
use crate::exoscale::client::Observer;
use crate::exoscale::error::ErrorKind;
use crate::policy::name::{ArchiveName, PolicyName};
use crate::run::downloads::{Downloads, RunningDownload};
use crate::run::report::{RunReport, RunResult};
use crate::snapshot::{InstanceId, ZoneName};
use crate::state::audit::StepOutcome;
use crate::state::audit_chain::AuditHead;
use crate::state::directory::StateDirectory;
use crate::state::history::Change;
use crate::state::last_runs::LastRuns;
use crate::telemetry::metrics::Histograms;
use crate::telemetry::model::{Model, PolicyModel, PolicyView, SKIPPED, count};
use crate::telemetry::notifications::Notifications;
use crate::telemetry::notifier::{Notifier, Wires};
use crate::telemetry::overview::{InstanceOverview, Overview};
use crate::telemetry::problem::ProblemLine;
use crate::telemetry::status::{Last, Status};

/// A scheduler whose loop did not turn for this long is stuck: it turns every other second.
const TICK_LATE: Duration = Duration::from_mins(1);

/// How many of the last deletions are shown.
pub const DELETED_LAST_MAX: usize = 10;

/// Everything that the daemon reports about itself. Cloning is cheap and shares everything.
#[derive(Debug, Clone)]
pub struct Telemetry {
    clock: Arc<dyn Clock>,
    /// Reading is shared, so that a probe does not wait for a scrape.
    model: Arc<RwLock<Model>>,
    histograms: Histograms,
    downloads: Downloads,
}

impl Telemetry {
    /// With the program's version alone; `revision` is empty where it is unknown.
    pub fn new(clock: Arc<dyn Clock>, version: &str, revision: &str) -> Self {
        let model = Model {
            status: Status { version: version.to_owned(), ..Status::default() },
            revision: revision.to_owned(),
            configured: false,
            ticked_at: None,
            ticked: clock.elapsed(),
            policies: BTreeMap::new(),
            archive_names: BTreeSet::new(),
            archives: BTreeMap::new(),
            quotas: BTreeMap::new(),
            deleted_last: Vec::new(),
            holds: None,
            clock_skew: BTreeMap::new(),
            api_requests: BTreeMap::new(),
            api_retries: BTreeMap::new(),
            notifications: BTreeMap::new(),
        };
        Self {
            clock,
            model: Arc::new(RwLock::new(model)),
            histograms: Histograms::new(),
            downloads: Downloads::default(),
        }
    }

    /// The downloads in flight: for every runner whose runs are reported here.
    pub fn downloads(&self) -> Downloads {
        self.downloads.clone()
    }

    fn running(&self) -> Vec<RunningDownload> {
        self.downloads.list(self.clock.elapsed())
    }

    fn model(&self) -> RwLockWriteGuard<'_, Model> {
        self.model.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn reading(&self) -> RwLockReadGuard<'_, Model> {
        self.model.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over a configuration, at the start and at each reload. All series of its policies exist from now on;
    /// policies, zones and archives that it does not have any more are removed with all their series; other counters
    /// continue. It also makes the program ready.
    pub fn configure(&self, policies: &[PolicyView<'_>], archives: &BTreeSet<ArchiveName>) {
        let mut model = self.model();
        let mut before = std::mem::take(&mut model.policies);
        for view in policies {
            let name = &view.policy.name;
            self.histograms.begin(name);
            let policy = PolicyModel::configured(view, before.remove(name));
            model.policies.insert(name.clone(), policy);
        }
        for removed in before.keys() {
            self.histograms.forget(removed);
        }
        let zones: BTreeSet<ZoneName> =
            policies.iter().flat_map(|view| view.policy.zones.iter().cloned()).collect();
        model.clock_skew.retain(|zone, _| zones.contains(zone));
        model.api_requests.retain(|(zone, ..), _| zones.contains(zone));
        model.archives.retain(|name, _| archives.contains(name));
        model.archive_names.clone_from(archives);
        model.configured = true;
    }

    /// A configuration was read and taken over; or it was not, because of this error, and the old one is still in use.
    pub fn reloaded(&self, result: Result<(), String>, at: Timestamp) {
        let config = &mut self.model().status.config;
        config.last_reload_successful = result.is_ok();
        if result.is_ok() {
            config.loaded_at = Some(at);
        }
        config.last_reload_error = result.err();
    }

    /// The web configuration file that changed can't be used, because of this error, and the one from before is in use; or
    /// there is none such. Returns whether that is news.
    pub fn web_file(&self, error: Option<String>) -> bool {
        let config = &mut self.model().status.config;
        let is_news = config.web_config_error != error;
        config.web_config_error = error;
        is_news
    }

    /// The daemon's own state was saved, or could not be, because of this error.
    pub fn state_written(&self, error: Option<String>) {
        self.model().status.state_error = error;
    }

    /// The scheduler's loop ran.
    pub fn tick(&self, at: Timestamp) {
        let ticked = self.clock.elapsed();
        let mut model = self.model();
        (model.ticked_at, model.ticked) = (Some(at), ticked);
    }

    /// No new run begins any more.
    pub fn draining(&self) {
        self.model().status.draining = true;
    }

    /// When the policy is due next.
    pub fn next_run(&self, policy: &PolicyName, at: Option<Timestamp>) {
        self.of(policy, |policy| policy.status.next_run_at = at);
    }

    /// How many deletions the guard may let pass in the policy's next run.
    pub fn allowance(&self, policy: &PolicyName, deletes: u64) {
        self.of(policy, |policy| policy.allowance = deletes);
    }

    /// How many snapshots are on hold; none if that can't be read, and then no run deletes anything.
    pub fn holds(&self, count: Option<u64>) {
        self.model().holds = count;
    }

    /// The state directory has another last run of the policy: one that another process did.
    pub fn recall(&self, policy: &PolicyName, remembered: LastRuns) {
        self.of(policy, |policy| policy.recall(remembered));
    }

    /// A run of the policy began.
    pub fn run_begun(&self, policy: &PolicyName, at: Timestamp) {
        self.of(policy, |policy| policy.status.running_since = Some(at));
    }

    /// Runs of the policy were due while the machine slept or the program was not running.
    pub fn missed(&self, policy: &PolicyName, runs: u64) {
        self.of(policy, |policy| policy.status.missed_runs += runs);
    }

    /// Runs of the policy were due while another one went on.
    pub fn skipped(&self, policy: &PolicyName, runs: u64) {
        self.of(policy, |policy| *policy.runs.entry(SKIPPED).or_default() += runs);
    }

    /// A run of the policy did not begin, since another process runs it.
    pub fn displaced(&self, policy: &PolicyName) {
        self.of(policy, |policy| {
            policy.status.running_since = None;
            count(&mut policy.runs, SKIPPED);
        });
    }

    /// A run of the policy ended without a report: it panicked, or could not begin.
    pub fn run_panicked_or_refused(&self, policy: &PolicyName, at: Timestamp) {
        self.of(policy, |policy| {
            let started_at = policy.status.running_since.take().unwrap_or(at);
            let result = RunResult::Failed.as_str();
            count(&mut policy.runs, result);
            policy.status.last = Some(Last { started_at, finished_at: at, result: result.to_owned() });
            for zone in policy.zones.values_mut() {
                zone.memory.result = Some(result.to_owned());
                zone.failed = vec![ProblemLine::new(
                    None,
                    "the run could not begin, or ended by a bug: the log says why",
                )];
            }
        });
    }

    /// A run ended.
    pub fn run_ended(&self, report: &RunReport) {
        let histograms = &self.histograms;
        let mut model = self.model();
        let Some(policy) = model.policies.get_mut(&report.policy) else { return };
        policy.fold(report);
        model.forget_deleted(report);
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

    /// An archive was read, or could not be.
    pub fn archive(&self, name: &ArchiveName, stats: ArchiveStats) {
        let mut model = self.model();
        if model.archive_names.contains(name) {
            model.archives.insert(name.clone(), stats);
        }
    }

    /// Begins to notify these notifiers, on tokio's runtime, and no others any more; what those from before have is still
    /// delivered.
    pub fn notify(
        &self,
        notifiers: Vec<Notifier>,
        wires: Wires,
        state: StateDirectory,
        host: Arc<str>,
    ) -> Notifications {
        self.model().set_notifiers(notifiers.iter().map(|notifier| notifier.settings.name.clone()).collect());
        Notifications::start(notifiers, wires, state, host, Arc::clone(&self.model))
    }

    /// How far this machine's clock is ahead of the API's.
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

    /// Whether the scheduler's loop runs.
    ///
    /// # Errors
    /// Why not, as a sentence.
    pub fn alive(&self) -> Result<(), String> {
        let still = self.clock.elapsed().saturating_sub(self.reading().ticked);
        if still <= TICK_LATE {
            return Ok(());
        }
        Err(format!("the scheduler's loop has stalled for {} s", still.as_secs()))
    }

    /// Whether a configuration is in use and runs may begin.
    ///
    /// # Errors
    /// Why not, as a sentence.
    pub fn ready(&self) -> Result<(), String> {
        let model = self.reading();
        if model.status.draining {
            Err("the program is stopping: no new run begins".to_owned())
        } else if model.configured {
            Ok(())
        } else {
            Err("the configuration and the state are not read yet".to_owned())
        }
    }

    /// Everything in the text format of Prometheus, version 0.0.4.
    pub fn metrics_text(&self) -> String {
        let running = self.running();
        self.model().judge(self.clock.now());
        metrics::text(&self.reading(), &running, &self.histograms)
    }

    /// The end of the audit log was read.
    pub fn audit_head(&self, head: Option<AuditHead>) {
        self.model().status.audit = head;
    }

    /// What was deleted since the last call, in the order in which that ended.
    pub fn deleted(&self, changes: Vec<Change>) {
        let deleted = &mut self.model().deleted_last;
        deleted.extend(changes);
        let more = deleted.len().saturating_sub(DELETED_LAST_MAX);
        deleted.drain(..more);
    }

    /// The program's version.
    pub fn version(&self) -> String {
        self.reading().status.version.clone()
    }

    /// The whole fleet, for people.
    pub fn overview(&self) -> Overview {
        let running = self.running();
        self.reading().overview(running, self.clock.now())
    }

    /// One instance, for people; none that no policy knows.
    pub fn instance(&self, zone: &ZoneName, id: InstanceId) -> Option<InstanceOverview> {
        self.reading().instance(zone, id, self.clock.now())
    }

    /// The answer to `/api/v1/status`.
    pub fn status_json(&self) -> Status {
        let running = self.running();
        self.reading().status(running, self.clock.now())
    }
}

impl Observer for Telemetry {
    fn answered(&self, zone: &ZoneName, operation: &'static str, status: Option<StatusCode>, took: Duration) {
        let mut model = self.model();
        if model.has_zone(zone) {
            *model.api_requests.entry((zone.clone(), operation, status)).or_default() += 1;
            self.histograms.request_took(operation, took);
        }
    }

    fn retried(&self, operation: &'static str, reason: ErrorKind) {
        *self.model().api_retries.entry((operation, reason.as_str())).or_default() += 1;
    }

    fn clock_compared(&self, zone: &ZoneName, ahead: SignedDuration) {
        self.clock_skew(zone, ahead.as_secs_f64());
    }
}
