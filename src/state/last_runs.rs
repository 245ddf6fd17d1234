//! The results of a policy's last runs, and their listings: for metrics and status after a restart, and for the guard.
//! It is written at the end of a run, under the policy's lock.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use uuid::Uuid;

use crate::disk::Metadata;
use crate::policy::name::{ArchiveName, PolicyName};
use crate::policy::shard::Shard;
use crate::snapshot::{InstanceId, SnapshotId, ZoneName};
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;

/// The version of the file that this program writes.
const VERSION: u64 = 1;

/// The last runs of a policy.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LastRuns {
    /// The last one, scheduled or manual; none before the first.
    pub last: Option<LastRun>,
    /// By zone.
    pub zones: BTreeMap<ZoneName, ZoneMemory>,
}

/// A run that ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastRun {
    /// In the audit log and the program's log.
    pub run_id: Uuid,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
    /// `success`, `partial`, `failed` or `held`.
    pub result: String,
}

/// A part of a state file whose form another module knows. It is long, and most readers do not need it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Unparsed(Box<RawValue>);

impl Unparsed {
    /// In the form in which it is saved; none for what JSON cannot express.
    pub fn of(value: &impl Serialize) -> Option<Self> {
        to_raw_value(value).ok().map(Self)
    }

    /// What it says.
    ///
    /// # Errors
    /// JSON of another form.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_str(self.0.get())
    }
}

impl PartialEq for Unparsed {
    fn eq(&self, other: &Self) -> bool {
        self.0.get() == other.0.get()
    }
}

/// The last runs of a policy in one zone.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ZoneMemory {
    /// When a run last ended here.
    pub last_run_at: Option<Timestamp>,
    /// When a run last ended in which nothing failed and the guard blocked no deletion.
    pub last_success_at: Option<Timestamp>,
    /// The first failure of the last run, if there was one.
    pub failure: Option<String>,
    /// Why the guard blocked the last run's deletions, if it did.
    pub held: Option<String>,
    /// `success`, `partial`, `failed` or `held`: how the last run ended here; none before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
    /// Which of the policy's patterns the last run found to match no instance in any of its zones, if there were such.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unmatched: Option<String>,
    /// How the instances of the zone are covered by all policies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coverage: Option<ZoneCoverage>,
    /// Since when the export gate keeps a snapshot here without a break.
    pub gate_since: Option<Timestamp>,
    /// The sums of the last plan.
    pub plan: Option<PlanSums>,
    /// What each instance had then: every one that the policy selects, those with selected snapshots that are not listed any
    /// more, and for a week those that vanished.
    pub instances: Vec<InstanceCounts>,
    /// How many listed instances the policy selects that other shards are for.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub elsewhere: u64,
    /// The listing against which a drop is measured.
    pub accepted: Option<AcceptedListing>,
    /// What that run rested on, in the form of `retention`: later changes are found by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rested_on: Option<Unparsed>,
    /// What the last listing lacked, if it was not accepted for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missed: Option<MissedFromListing>,
}

/// How many snapshots a plan keeps, deletes and ignores.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PlanSums {
    /// Snapshots that are kept.
    pub keep: u64,
    /// Snapshots to delete.
    pub delete: u64,
    /// Snapshots that the policy says nothing about.
    pub ignore: u64,
    /// Of the kept ones: on hold, and else to delete.
    pub blocked_by_hold: u64,
    /// Of the kept ones: kept by another policy, and else to delete.
    pub blocked_by_policy: u64,
    /// Of the kept ones: without a required verified copy, and else to delete.
    pub blocked_by_export: u64,
    /// Of the kept ones: an archive cannot say whether it has the required copy, and else to delete.
    pub blocked_by_archive: u64,
    /// Of the kept ones: kept by a paused policy, and else to delete.
    pub blocked_by_paused: u64,
    /// Of the kept ones: a newer snapshot of their instance is missing, and else to delete.
    pub blocked_by_source: u64,
    /// To delete, or kept of an instance that lost all its snapshots: the guard blocks them.
    pub blocked_by_guard: u64,
    /// To delete: the second judge says otherwise of some of them, so all are blocked.
    pub blocked_by_judge: u64,
    /// Of the kept ones: to delete once a change has settled.
    pub pending: u64,
}

/// How the instances of a zone are covered by all policies together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ZoneCoverage {
    /// When the zone was listed.
    pub at: Option<Timestamp>,
    /// The instances of which an enabled policy takes or exports snapshots.
    pub covered: u64,
    /// The instances of which none does.
    pub uncovered: u64,
    /// The instances that are meant to be without a backup.
    pub exempt: u64,
    /// The names of the uncovered ones.
    pub uncovered_instances: Vec<String>,
    /// How many snapshots of the zone vanished within a week while nothing explains it.
    pub unexplained: u64,
}

/// The selected snapshots of one instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceCounts {
    /// Which.
    pub id: InstanceId,
    /// Its name; its id's text where it is not listed any more.
    pub name: String,
    /// Selected snapshots that are good.
    pub good: u64,
    /// Selected snapshots in state `error`.
    pub failed: u64,
    /// Selected snapshots that are being made.
    pub in_flight: u64,
    /// Selected snapshots in other states.
    pub other: u64,
    /// When the newest good one was taken.
    pub newest_at: Option<Timestamp>,
    /// When the oldest good one was taken.
    pub oldest_at: Option<Timestamp>,
    /// When the newest good one was taken that is application-consistent.
    #[serde(default)]
    pub newest_consistent_at: Option<Timestamp>,
    /// When the newest one was taken of which each of the policy's archives has a verified copy.
    pub newest_verified_at: BTreeMap<ArchiveName, Timestamp>,
    /// When the oldest good one was taken that is newer than the newest verified copy, by archive; none where all have one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub uncopied_since: BTreeMap<ArchiveName, Timestamp>,
    /// Whether it was listed.
    #[serde(default)]
    pub is_listed: bool,
    /// Whether it is meant to be without a backup.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_exempt: bool,
    /// When it was created, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    /// When a run first found that it is not listed any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vanished_at: Option<Timestamp>,
}

/// A listing that a run accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceptedListing {
    /// When the zone was listed.
    pub at: Timestamp,
    /// The length of the audit log before the listing, in bytes: later deletions are recorded after it.
    pub audit_from: u64,
    /// The month of the file of the audit log that has this byte; none before there was one for each month.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit_month: Option<String>,
    /// Every snapshot of the zone but those that are being deleted.
    pub snapshots: Vec<SnapshotId>,
    /// Which of them are of which instance, as places in that list.
    #[serde(default)]
    pub of_instances: BTreeMap<InstanceId, Vec<u32>>,
}

/// What was missing in a listing that was not accepted for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissedFromListing {
    /// When the run began that first missed just these.
    pub since: Timestamp,
    /// Snapshots, and instances of which there are snapshots.
    pub ids: BTreeSet<Uuid>,
}

impl ZoneMemory {
    /// Forgets the instances of other shards, which will not be listed.
    pub(crate) fn retain_shard(&mut self, shard: Shard) {
        self.instances.retain(|instance| shard.has(instance.id));
        self.missed = None;
        let Some(before) = self.accepted.take() else { return };
        let instance_of: HashMap<u32, InstanceId> = before
            .of_instances
            .iter()
            .flat_map(|(id, places)| places.iter().map(|place| (*place, *id)))
            .collect();
        let (snapshots, of_instances) = (Vec::new(), BTreeMap::new());
        let mut accepted = AcceptedListing { snapshots, of_instances, ..before.clone() };
        for (place, id) in (0..).zip(&before.snapshots) {
            let instance = instance_of.get(&place).copied();
            if shard.has_of(*id, instance) {
                if let Some(instance) = instance {
                    let place = u32::try_from(accepted.snapshots.len()).unwrap_or(u32::MAX);
                    accepted.of_instances.entry(instance).or_default().push(place);
                }
                accepted.snapshots.push(*id);
            }
        }
        self.accepted = Some(accepted);
    }
}

impl PlanSums {
    /// How many are kept for want of a required copy, whether it is missing or the archive cannot be read.
    pub fn waiting_for_copies(&self) -> u64 {
        self.blocked_by_export + self.blocked_by_archive
    }
}

impl InstanceCounts {
    /// Of an instance that has nothing yet; without a name it is not listed any more.
    pub fn of(id: InstanceId, name: Option<String>) -> Self {
        Self {
            id,
            name: name.unwrap_or_else(|| id.to_string()),
            good: 0,
            failed: 0,
            in_flight: 0,
            other: 0,
            newest_at: None,
            oldest_at: None,
            newest_consistent_at: None,
            newest_verified_at: BTreeMap::new(),
            uncopied_since: BTreeMap::new(),
            is_listed: false,
            is_exempt: false,
            created_at: None,
            vanished_at: None,
        }
    }
}

impl StateDirectory {
    /// What is remembered of the policy's last runs; nothing if it never ran.
    ///
    /// # Errors
    /// A file that can't be read, is damaged, or was written by a later program.
    pub async fn last_runs(&self, policy: &PolicyName) -> Result<LastRuns, StateError> {
        self.load(file_name(policy), VERSION).await
    }

    /// Which version of [`Self::last_runs`] is there: another value once a run has ended. It costs next to nothing.
    pub async fn last_runs_version(&self, policy: &PolicyName) -> Option<Metadata> {
        self.version_of(file_name(policy)).await
    }

    /// What is remembered of the last runs of every policy that ever ran here, also of one that is not configured any more.
    ///
    /// # Errors
    /// A directory or a file that can't be read, or a file that is damaged or was written by a later program.
    pub async fn all_last_runs(&self) -> Result<Vec<(PolicyName, LastRuns)>, StateError> {
        self.blocking(|state| state.read_of_policies("runs-", VERSION)).await
    }

    /// Saves them; after a crash at any moment the file holds the old or the new, whole.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub async fn set_last_runs(&self, policy: &PolicyName, runs: LastRuns) -> Result<(), StateError> {
        self.save(file_name(policy), VERSION, runs).await
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

fn file_name(policy: &PolicyName) -> String {
    format!("runs-{policy}.json")
}
