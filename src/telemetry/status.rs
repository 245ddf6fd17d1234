//! The answer to `/api/v1/status`, as the daemon makes it and `snapwarden status` reads it.
//!
//! ```json
//! {
//!   "version": "0.1.0", "at": "2026-11-02T08:00:00Z", "draining": false,
//!   "state_error": null,
//!   "config": { "last_reload_successful": true, "last_reload_error": null, "web_config_error": null, "loaded_at": "2026-11-01T12:00:00Z" },
//!   "policies": { "nightly": {
//!     "enabled": true, "paused_since": null, "schedule": "30 2 * * *", "timezone": "Europe/Zurich",
//!     "next_run_at": "2026-11-03T01:30:00Z", "running_since": null,
//!     "last": { "started_at": "…", "finished_at": "…", "result": "success" },
//!     "missed_runs": 0,
//!     "zones": { "ch-gva-2": {
//!       "last_run_at": "…", "last_success_at": "…", "failure": null, "held": null,
//!       "gate_since": null, "gate_alert": null,
//!       "plan": { "keep": 14, "delete": 1, "ignore": 0, "blocked_by_hold": 0, "blocked_by_policy": 0, "blocked_by_export": 0 },
//!       "result": "success", "instances": { "fresh": 3, "stale": 0, "none": 0, "vanished": 0 }, "problems": []
//!     } }
//!   } },
//!   "zones": { "ch-gva-2": { "at": "…", "covered": 3, "uncovered": 1, "exempt": 0, "uncovered_instances": ["ci-1"], "unexplained": 0 } },
//!   "audit": { "hash": "9f86…", "at": "…" },
//!   "archives": { "vault": { "images": 3, "bytes": 1, "free_bytes": 1, "corrupt": 0, "verified_at": "…", "error": null } },
//!   "downloads": [{
//!     "policy": "nightly", "zone": "ch-gva-2", "snapshot_id": "…", "snapshot_name": "…", "instance_name": "web-1",
//!     "archives": ["vault"], "started_at": "…",
//!     "bytes": 1, "total": 2, "bytes_per_second": 1, "state": "downloading"
//!   }]
//! }
//! ```
//!
//! The daemon may be of another version than the reader: a missing key is empty, an unknown one is ignored.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::archive::stats::ArchiveStats;
use crate::run::coverage::InstanceStates;
use crate::run::downloads::HowFar;
use crate::run::persist;
use crate::state::audit_chain::AuditHead;
use crate::state::last_runs::{LastRun, PlanSums, ZoneCoverage, ZoneMemory};
use crate::text::{counted, to_the_second};

/// The whole answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// The program's version.
    pub version: String,
    /// That no daemon has said this: it is what the state directory remembers.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub remembered: bool,
    /// The moment of the answer.
    pub at: Option<Timestamp>,
    /// Whether it is stopping.
    pub draining: bool,
    /// Why the daemon can't save how far it served the schedules, if so.
    pub state_error: Option<String>,
    /// The configuration in use.
    pub config: ConfigStatus,
    /// The policies of the configuration, by name.
    pub policies: BTreeMap<String, PolicyStatus>,
    /// The archives of the configuration, by name, once they were read.
    pub archives: BTreeMap<String, ArchiveStats>,
    /// How the instances of each zone are covered by all policies, by name.
    pub zones: BTreeMap<String, ZoneCoverage>,
    /// The last line of the audit log; none if it is not known.
    pub audit: Option<AuditHead>,
    /// Images that are being downloaded or verified.
    pub downloads: Vec<DownloadStatus>,
}

/// Something that needs attention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong.
    pub text: String,
    /// The command to begin with.
    pub command: String,
}

impl Status {
    /// The problems that need attention.
    pub fn problems(&self) -> Vec<Problem> {
        self.problems_but(|_, _, _| false)
    }

    /// The problems that need attention, without those of a policy's zone that are left out by the policy, the zone and the text.
    pub(super) fn problems_but(&self, is_left_out: impl Fn(&str, &str, &str) -> bool) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut add = |text: String, command: String| problems.push(Problem { text, command });
        if !self.config.last_reload_successful {
            let why = self.config.last_reload_error.as_deref().unwrap_or("see `snapwarden check`");
            let text = format!("the configuration could not be reloaded, the previous one is in use: {why}");
            add(text, "snapwarden check".to_owned());
        }
        if let Some(why) = &self.config.web_config_error {
            let text = format!("the web configuration file can't be used, the previous one is in use: {why}");
            add(text, "snapwarden check".to_owned());
        }
        if let Some(error) = &self.state_error {
            let text = format!("the results of runs cannot be saved: {error}");
            add(text, "journalctl -u snapwarden -p warning".to_owned());
        }
        for (name, policy) in self.policies.iter().filter(|(_, policy)| policy.enabled) {
            let is_told = |zone: &ZoneStatus| {
                zone.failure.is_some() || zone.held.is_some() || !zone.problems.is_empty()
            };
            let failed_zones = policy.zones.values().any(is_told);
            for (zone, known) in &policy.zones {
                let of = format!("policy {name}, zone {zone}");
                if let Some(failure) = &known.failure {
                    add(format!("{of}: {failure}"), "snapwarden check --online".to_owned());
                }
                if let Some(held) = &known.held {
                    let text = format!("{of}: deletions are blocked by the guard: {held}");
                    add(text, format!("snapwarden plan {name}"));
                }
                for problem in known.problems.iter().filter(|text| !is_left_out(name, zone, text)) {
                    add(format!("{of}: {problem}"), "snapwarden coverage".to_owned());
                }
                if let Some(alert) = &known.gate_alert {
                    add(
                        format!("{of}: {alert}"),
                        format!("snapwarden history --policy {name} --action export"),
                    );
                }
            }
            match &policy.last {
                // A failed zone was reported above.
                Some(last) if last.result != "success" && !failed_zones => add(
                    format!(
                        "policy {name}: its last run ended at {} with result {}",
                        to_the_second(last.finished_at),
                        last.result
                    ),
                    format!("snapwarden history --policy {name}"),
                ),
                _ => {}
            }
        }
        for (zone, known) in self.zones.iter().filter(|(_, known)| known.unexplained > 0) {
            let snapshots = counted(usize::try_from(known.unexplained).unwrap_or(usize::MAX), "snapshot");
            let text = format!("zone {zone}: {snapshots} vanished within a week, and nothing explains it");
            add(text, "snapwarden history --action vanish".to_owned());
        }
        for (name, archive) in &self.archives {
            let list = || format!("snapwarden archive list {name}");
            if let Some(error) = &archive.error {
                add(format!("archive {name} cannot be read: {error}"), list());
            }
            if archive.corrupt > 0 {
                let files = counted(usize::try_from(archive.corrupt).unwrap_or(usize::MAX), "damaged file");
                add(format!("archive {name} has {files}: see `snapwarden archive list {name}`"), list());
            }
        }
        problems
    }

    /// The policies that are paused by hand.
    pub(super) fn paused(&self) -> Vec<Problem> {
        let paused = self.policies.iter().filter_map(|(name, policy)| Some((name, policy.paused_since?)));
        let problem = |(name, since): (&String, Timestamp)| Problem {
            text: format!(
                "policy {name} is paused by hand since {}: it takes, exports and deletes nothing",
                to_the_second(since)
            ),
            command: format!("snapwarden resume {name}"),
        };
        paused.map(problem).collect()
    }
}

/// The configuration in use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConfigStatus {
    /// Whether the last attempt to read it succeeded; if not, the previous one is in use.
    pub last_reload_successful: bool,
    /// Why not.
    pub last_reload_error: Option<String>,
    /// Why the web configuration file that changed, or a certificate, can't be used; the one from before is in use.
    pub web_config_error: Option<String>,
    /// When the one in use was read.
    pub loaded_at: Option<Timestamp>,
}

impl Default for ConfigStatus {
    fn default() -> Self {
        Self {
            last_reload_successful: true,
            last_reload_error: None,
            web_config_error: None,
            loaded_at: None,
        }
    }
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

impl From<&LastRun> for Last {
    fn from(run: &LastRun) -> Self {
        Self { started_at: run.started_at, finished_at: run.finished_at, result: run.result.clone() }
    }
}

/// A policy.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyStatus {
    /// Whether its schedule is followed.
    pub enabled: bool,
    /// Since when it is paused by hand; then it is not enabled.
    pub paused_since: Option<Timestamp>,
    /// Its cron line; none if all its runs are manual.
    pub schedule: Option<String>,
    /// The name of its time zone.
    pub timezone: Option<String>,
    /// When it is due next.
    pub next_run_at: Option<Timestamp>,
    /// When the run in flight began; none if there is none.
    pub running_since: Option<Timestamp>,
    /// The last run that ended.
    pub last: Option<Last>,
    /// Runs that were due while the machine slept or the program was not running, since it started.
    pub missed_runs: u64,
    /// Its zones, by name.
    pub zones: BTreeMap<String, ZoneStatus>,
}

/// A policy in one zone.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ZoneStatus {
    /// When a run last ended here.
    pub last_run_at: Option<Timestamp>,
    /// When a run last ended in which nothing failed and no deletion was blocked by the guard.
    pub last_success_at: Option<Timestamp>,
    /// The first failure of the last run, if there was one.
    pub failure: Option<String>,
    /// Why the guard blocked the last run's deletions, if it did.
    pub held: Option<String>,
    /// Since when snapshots are kept only because a verified copy is missing, without a break.
    pub gate_since: Option<Timestamp>,
    /// Why that is an alert by now, if it is.
    pub gate_alert: Option<String>,
    /// The sums of the last plan.
    pub plan: Option<PlanSums>,
    /// `success`, `partial`, `failed` or `held`: how the last run ended here.
    pub result: Option<String>,
    /// How many of the policy's instances have the snapshots that they should have.
    pub instances: InstanceStates,
    /// Which do not, and which of the policy's patterns match nothing, in sentences.
    pub problems: Vec<String>,
}

impl ZoneStatus {
    /// What the state directory remembers of a zone, as of `now`.
    pub fn of(memory: &ZoneMemory, alert_after: Option<Duration>, now: Timestamp) -> Self {
        let blocked = memory.plan.as_ref().map_or(0, PlanSums::waiting_for_copies);
        Self {
            last_run_at: memory.last_run_at,
            last_success_at: memory.last_success_at,
            failure: memory.failure.clone(),
            held: memory.held.clone(),
            gate_since: memory.gate_since,
            gate_alert: persist::overdue(alert_after, blocked, memory.gate_since, now),
            plan: memory.plan.clone(),
            result: memory.result.clone(),
            ..Self::default()
        }
    }
}

/// An image that is being downloaded or verified.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DownloadStatus {
    /// The policy whose run it is part of.
    pub policy: String,
    /// The snapshot's zone.
    pub zone: String,
    /// The snapshot's id.
    pub snapshot_id: String,
    /// The snapshot's name.
    pub snapshot_name: String,
    /// The name of its instance, if that is still listed.
    pub instance_name: Option<String>,
    /// The archives that receive it.
    pub archives: Vec<String>,
    /// When it began.
    pub started_at: Option<Timestamp>,
    /// Downloading or verifying.
    #[serde(flatten)]
    pub how_far: HowFar,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_versions_answer_is_read_as_far_as_it_is_known() {
        let text = r#"{"new": 1, "policies": {"a": {"later": {}, "zones": {"z": {"plan": {"keep": 3, "more": 1}}}}}}"#;
        let status: Status = serde_json::from_str(text).unwrap();
        let plan = status.policies["a"].zones["z"].plan.clone();
        assert_eq!(plan, Some(PlanSums { keep: 3, ..PlanSums::default() }));
        assert!(status.config.last_reload_successful);
        let again: Status = serde_json::from_str(&serde_json::to_string(&status).unwrap()).unwrap();
        assert_eq!(again, status);
    }
}
