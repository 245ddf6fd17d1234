//! The facts of a case, as plain data: what the plan rested on, in words that can be written to a file and read again.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::policy::name::{ArchiveName, PolicyName};
use crate::snapshot::{InstanceId, SnapshotId, ZoneName};

/// The keys of a policy that decide what is deleted, as the configuration has them.
pub type Keys = BTreeMap<String, Value>;

/// Everything that a judgement may depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Whose run it is.
    pub policy: PolicyName,
    /// The zone.
    pub zone: ZoneName,
    /// The moment that every age is counted to.
    pub now: Timestamp,
    /// The instance that `self` stands for; none if that is not known.
    pub this_machine: Option<InstanceId>,
    /// Policies and instances as they are.
    pub present: Situation,
    /// Policies and instances as they were before each change that has not settled.
    pub before: Vec<Situation>,
    /// There are more such changes than can be taken back one by one, so no deletion is beyond doubt.
    pub has_too_many_changes: bool,
    /// An operator let deletions pass that only a change brings about, or though a newer snapshot is missing.
    pub changes_are_allowed: bool,
    /// Every snapshot of the instances that the case is about.
    pub snapshots: Vec<SnapshotFacts>,
    /// What each archive holds of these instances.
    pub archives: BTreeMap<ArchiveName, Holdings>,
    /// An archive that others used, while this program remembers nothing.
    pub unadopted: Option<ArchiveName>,
    /// The snapshots that policies could not take when they were last due.
    pub missing: Vec<MissingFacts>,
    /// The instances that are listed while none of the snapshots is that they had.
    pub emptied: BTreeSet<InstanceId>,
}

/// Policies and instances at one time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Situation {
    /// Each policy that names the zone.
    pub policies: BTreeMap<PolicyName, Keys>,
    /// When each disabled policy was found so.
    pub paused: BTreeMap<PolicyName, Timestamp>,
    /// The listed instances.
    pub instances: Vec<InstanceFacts>,
    /// Snapshots that were good then, and have failed since.
    pub good: BTreeSet<SnapshotId>,
}

/// An instance, as selections depend on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceFacts {
    /// Its id.
    pub id: InstanceId,
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether it belongs to an instance pool or a node pool.
    pub is_managed: bool,
}

/// A snapshot, with all that is known of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotFacts {
    /// Its id.
    pub id: SnapshotId,
    /// Its name.
    pub name: String,
    /// When it was taken.
    pub created_at: Timestamp,
    /// The API's word.
    pub state: String,
    /// Its instance, if the API names one.
    pub instance_id: Option<InstanceId>,
    /// Whether it is known to be application-consistent.
    pub is_consistent: bool,
    /// Whose it is, if this program took it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// The hold on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<HoldFacts>,
    /// What is remembered of its failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<FailedFacts>,
}

/// Whose a snapshot is that this program took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The policy that took it; none if that is not known.
    pub maker: Option<PolicyName>,
    /// The other policies of which it served a slot.
    pub served: Vec<PolicyName>,
}

/// A hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldFacts {
    /// Without it, for ever.
    pub until: Option<Timestamp>,
}

/// What is remembered of a snapshot that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedFacts {
    /// When it was first found so.
    pub since: Timestamp,
    /// Whether it was ever found good.
    pub was_good: bool,
}

/// What an archive holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Holdings {
    /// It can't be read.
    Unreachable,
    /// For decisions on paper: whatever is required.
    Assumed,
    /// These verified copies.
    Known(Vec<CopyFacts>),
}

/// A verified copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyFacts {
    /// Of which snapshot.
    pub snapshot_id: SnapshotId,
    /// Of which instance.
    pub instance_id: InstanceId,
    /// When the snapshot was taken.
    pub created_at: Timestamp,
    /// When its export began, if that is known.
    pub exported_at: Option<Timestamp>,
}

/// A snapshot that a policy could not take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingFacts {
    /// The policy.
    pub policy: PolicyName,
    /// The instance; none if the policy could take none at all in the zone.
    pub instance: Option<InstanceId>,
    /// The time for which it was due.
    pub slot: Timestamp,
}
