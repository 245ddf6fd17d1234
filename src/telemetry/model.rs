//! The state of the daemon, its policies and its archives: the one place where reports are collected.
//!
//! It is plain data behind a lock that is held only for short updates. Updates for a policy, a zone or an archive that
//! the configuration does not have (any more) are ignored, so that a run that outlives its policy adds no series.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use http::StatusCode;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::archive::stats::ArchiveStats;
use crate::exoscale::wire::Quota;
use crate::policy::{ArchiveName, Policy, PolicyName};
use crate::run::persist;
use crate::run::report::{RunReport, Step, ZoneReport};
use crate::snapshot::ZoneName;
use crate::state::audit::{Action, StepOutcome};
use crate::state::last_runs::{LastRuns, ZoneMemory};

/// The results of `policy_runs_total`.
pub(super) const RUN_RESULTS: [&str; 5] = ["success", "partial", "failed", "held", SKIPPED];
pub(super) const SKIPPED: &str = "skipped";

/// The results of all counters of steps.
pub(super) const STEP_RESULTS: [&str; 4] = ["done", "failed", "blocked", SKIPPED];

/// A count for each result; all results are present.
pub(super) type Counts = BTreeMap<&'static str, u64>;

/// A policy of the configuration, with its facts from the state directory.
#[derive(Debug, Clone)]
pub struct PolicyView<'a> {
    /// The policy.
    pub policy: &'a Policy,
    /// When the configuration first had it.
    pub first_seen_at: Timestamp,
    /// The results of its last runs.
    pub remembered: LastRuns,
    /// The longest span between two due times of its schedule; none without a schedule.
    pub expected_interval: Option<Duration>,
}

/// A run that ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Last {
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
    /// `success`, `partial`, `failed` or `held`.
    pub result: String,
}

/// The whole model.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) version: String,
    pub(super) revision: String,
    pub(super) draining: bool,
    /// Whether a configuration was taken over.
    pub(super) configured: bool,
    pub(super) ticked_at: Option<Timestamp>,
    /// On the clock's elapsed time; the start counts as one.
    pub(super) ticked: Duration,
    pub(super) reload_ok: bool,
    pub(super) loaded_at: Option<Timestamp>,
    /// Why the daemon's state can't be written, if so.
    pub(super) state_error: Option<String>,
    pub(super) policies: BTreeMap<PolicyName, PolicyModel>,
    /// The archives of the configuration.
    pub(super) archive_names: BTreeSet<ArchiveName>,
    /// Those that were read.
    pub(super) archives: BTreeMap<ArchiveName, ArchiveStats>,
    /// Used amount and limit by the name of the quota.
    pub(super) quotas: BTreeMap<String, (u64, Option<u64>)>,
    /// How many seconds this machine's clock is ahead of the API's, by zone.
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
    /// A snapshot that is kept for this long only because a copy is missing is an alert.
    pub(super) alert_after: Option<Duration>,
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

impl Model {
    pub(super) fn has_zone(&self, zone: &ZoneName) -> bool {
        self.policies.values().any(|policy| policy.zones.contains_key(zone))
    }

    pub(super) fn fold_quotas(&mut self, quotas: &[Quota]) {
        self.quotas =
            quotas.iter().map(|quota| (quota.resource.clone(), (quota.usage, quota.limit))).collect();
    }
}

impl PolicyModel {
    /// A policy of a new configuration; the counters of `before` continue.
    pub(super) fn configured(view: &PolicyView<'_>, before: Option<Self>) -> Self {
        let policy = view.policy;
        let mut model = before.unwrap_or_else(|| Self::new(view.first_seen_at));
        model.enabled = policy.enabled;
        model.alert_after = policy.export.as_ref().map(|export| export.alert_after);
        model.schedule = policy.schedule.as_ref().map(|schedule| schedule.as_str().to_owned());
        model.time_zone = policy.time_zone.iana_name().map(str::to_owned);
        model.first_seen_at = view.first_seen_at;
        model.expected_interval = view.expected_interval;
        // The schedule may have changed; the daemon's loop reports the next run.
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
                // A manual run may have been the last one.
                if known.memory.last_run_at < remembered.last_run_at {
                    known.memory = ZoneMemory { accepted: None, ..remembered.clone() };
                }
            }
            model.zones.insert(zone.clone(), known);
        }
        model
    }

    pub(super) fn new(first_seen_at: Timestamp) -> Self {
        Self {
            enabled: false,
            schedule: None,
            time_zone: None,
            first_seen_at,
            expected_interval: None,
            next_run_at: None,
            running_since: None,
            last: None,
            alert_after: None,
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

    pub(super) fn fold(&mut self, report: &RunReport) {
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

    pub(super) fn fold_step(&mut self, step: &Step) {
        let counts = match step.facts.action {
            Action::Create => Some(&mut self.steps.creates),
            Action::Export => Some(&mut self.steps.exports),
            Action::Promote => Some(&mut self.steps.promotes),
            Action::Delete => Some(&mut self.steps.deletes),
            // Old templates, copies and manual steps have no metrics.
            Action::DeleteTemplate | Action::PruneCopy | Action::Restore => None,
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
    pub(super) fn fold(&mut self, report: &ZoneReport, at: Timestamp) {
        self.memory = persist::after(std::mem::take(&mut self.memory), report, at);
        let busy = |step: &&Step| step.facts.action == Action::Delete && step.outcome == StepOutcome::Blocked;
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

pub(super) fn count(counts: &mut Counts, result: &'static str) {
    *counts.entry(result).or_default() += 1;
}
