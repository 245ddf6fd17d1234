//! The daemon's status, as JSON at `/api/v1/status`.
//!
//! ```json
//! {
//!   "version": "0.1.0", "at": "2026-11-02T08:00:00Z", "draining": false,
//!   "state_error": null,
//!   "config": { "last_reload_successful": true, "loaded_at": "2026-11-01T12:00:00Z" },
//!   "policies": { "nightly": {
//!     "enabled": true, "schedule": "30 2 * * *", "timezone": "Europe/Zurich",
//!     "next_run_at": "2026-11-03T01:30:00Z", "running_since": null,
//!     "last": { "started_at": "…", "finished_at": "…", "result": "success" },
//!     "missed_runs": 0,
//!     "zones": { "ch-gva-2": {
//!       "last_run_at": "…", "last_success_at": "…", "failure": null, "held": null,
//!       "gate_since": null, "gate_alert": null,
//!       "plan": { "keep": 14, "delete": 1, "ignore": 0, "blocked_by_hold": 0, "blocked_by_policy": 0, "blocked_by_export": 0 }
//!     } }
//!   } },
//!   "archives": { "vault": { "images": 3, "bytes": 1, "free_bytes": 1, "corrupt": 0, "verified_at": "…", "error": null } },
//!   "downloads": [{
//!     "policy": "nightly", "zone": "ch-gva-2", "snapshot_id": "…", "snapshot_name": "…", "instance_name": "web-1",
//!     "archives": ["vault"], "started_at": "…",
//!     "bytes": 1, "total": 2, "bytes_per_second": 1, "state": "downloading"
//!   }]
//! }
//! ```
//!
//! It may be read by another version of this program: missing fields get their defaults, unknown ones are ignored.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::run::downloads::{HowFar, RunningDownload};
use crate::run::persist;
use crate::state::last_runs::PlanSums;
use crate::telemetry::model::{Last, Model, PolicyModel, ZoneModel};

/// The whole.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Of the program.
    pub version: String,
    /// The time of this status.
    pub at: Option<Timestamp>,
    /// Whether it is stopping.
    pub draining: bool,
    /// Why the daemon's state can't be written, if so.
    pub state_error: Option<String>,
    /// The configuration in use.
    pub config: ConfigStatus,
    /// The policies of the configuration, by name.
    pub policies: BTreeMap<String, PolicyStatus>,
    /// The archives of the configuration, by name, once they were read.
    pub archives: BTreeMap<String, ArchiveStatus>,
    /// Downloads in progress.
    pub downloads: Vec<DownloadStatus>,
}

/// The configuration in use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConfigStatus {
    /// Whether the last attempt to read it succeeded; if not, the previous one is in use.
    pub last_reload_successful: bool,
    /// When the one in use was read.
    pub loaded_at: Option<Timestamp>,
}

impl Default for ConfigStatus {
    fn default() -> Self {
        Self { last_reload_successful: true, loaded_at: None }
    }
}

/// A policy.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyStatus {
    /// Whether it runs.
    pub enabled: bool,
    /// Its cron line; none if it runs only manually.
    pub schedule: Option<String>,
    /// The name of its time zone.
    pub timezone: Option<String>,
    /// When it is due next.
    pub next_run_at: Option<Timestamp>,
    /// When the run in flight began; none if there is none.
    pub running_since: Option<Timestamp>,
    /// The last run that ended.
    pub last: Option<Last>,
    /// Runs that were due while the program was not running, counted since its start.
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
    /// When the last one ended in which nothing failed and nothing was blocked by the guard.
    pub last_success_at: Option<Timestamp>,
    /// The first failure of the last one, if there was any.
    pub failure: Option<String>,
    /// Why the guard blocked the last one's deletions, if it did.
    pub held: Option<String>,
    /// Since when snapshots are kept only because a verified copy is missing, without a break.
    pub gate_since: Option<Timestamp>,
    /// Why that is an alert by now, if it is.
    pub gate_alert: Option<String>,
    /// The sums of the last plan.
    pub plan: Option<PlanSums>,
}

/// An archive.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ArchiveStatus {
    /// Verified copies whose image exists.
    pub images: u64,
    /// The length of all these images in bytes.
    pub bytes: u64,
    /// Free bytes there.
    pub free_bytes: Option<u64>,
    /// Copies that are missing or damaged.
    pub corrupt: u64,
    /// The oldest time of last verification among the copies.
    pub verified_at: Option<Timestamp>,
    /// Why it can't be read, if so.
    pub error: Option<String>,
}

/// A download in progress.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DownloadStatus {
    /// Whose run it is of.
    pub policy: String,
    /// Where the snapshot is.
    pub zone: String,
    /// The snapshot.
    pub snapshot_id: String,
    /// Its name.
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

/// The status as of now.
pub(super) fn of(model: &Model, running: Vec<RunningDownload>, now: Timestamp) -> Status {
    let archives = model.archives.iter().map(|(name, facts)| {
        let status = ArchiveStatus {
            images: facts.images,
            bytes: facts.bytes,
            free_bytes: facts.free_bytes,
            corrupt: facts.corrupt,
            verified_at: facts.verified_at,
            error: facts.error.clone(),
        };
        (name.to_string(), status)
    });
    Status {
        version: model.version.clone(),
        at: Some(now),
        draining: model.draining,
        state_error: model.state_error.clone(),
        config: ConfigStatus { last_reload_successful: model.reload_ok, loaded_at: model.loaded_at },
        policies: model
            .policies
            .iter()
            .map(|(name, policy)| (name.to_string(), of_policy(policy, now)))
            .collect(),
        archives: archives.collect(),
        downloads: running.into_iter().map(of_download).collect(),
    }
}

fn of_download(download: RunningDownload) -> DownloadStatus {
    DownloadStatus {
        policy: download.policy.to_string(),
        zone: download.zone.to_string(),
        snapshot_id: download.snapshot_id.to_string(),
        snapshot_name: download.snapshot_name,
        instance_name: download.instance_name,
        archives: download.archives.iter().map(ToString::to_string).collect(),
        started_at: Some(download.started_at),
        how_far: download.how_far,
    }
}

fn of_policy(policy: &PolicyModel, now: Timestamp) -> PolicyStatus {
    let zone = |zone| of_zone(zone, policy.alert_after, now);
    PolicyStatus {
        enabled: policy.enabled,
        schedule: policy.schedule.clone(),
        timezone: policy.time_zone.clone(),
        next_run_at: policy.next_run_at,
        running_since: policy.running_since,
        last: policy.last.clone(),
        missed_runs: policy.missed_runs,
        zones: policy.zones.iter().map(|(name, known)| (name.to_string(), zone(known))).collect(),
    }
}

fn of_zone(zone: &ZoneModel, alert_after: Option<Duration>, now: Timestamp) -> ZoneStatus {
    let memory = &zone.memory;
    let blocked = memory.plan.as_ref().map_or(0, |plan| plan.blocked_by_export);
    ZoneStatus {
        last_run_at: memory.last_run_at,
        last_success_at: memory.last_success_at,
        failure: memory.failure.clone(),
        held: memory.held.clone(),
        gate_since: memory.gate_since,
        gate_alert: persist::overdue(alert_after, blocked, memory.gate_since, now),
        plan: memory.plan.clone(),
    }
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
