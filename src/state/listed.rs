//! Which snapshots a zone had when it was last listed, and those that are not listed any more while nothing explains their end.
//! It is written by each whole run, under the zone's lock, whatever its policy: so that the end of each snapshot that was ever
//! listed is looked for once, and is found.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::snapshot::{InstanceId, SnapshotId, ZoneName};
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;

/// The version of the file that this program writes.
const VERSION: u64 = 1;

/// A zone as it was last listed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ListedZone {
    /// When it was listed; none if it never was.
    pub at: Option<Timestamp>,
    /// The length of the audit log before the listing, in bytes: later deletions are recorded after it.
    pub audit_from: u64,
    /// The month of the file of the audit log that has this byte.
    pub audit_month: Option<String>,
    /// The snapshots of each instance.
    pub instances: BTreeMap<InstanceId, ListedInstance>,
    /// Those of which the platform names no instance, and when they were taken.
    pub without_instance: BTreeMap<SnapshotId, Timestamp>,
    /// Those that this program tried in vain to delete, and when: it may be done after all.
    pub tried: BTreeMap<SnapshotId, Timestamp>,
    /// Those that were listed before, and whose end is not known, or not explained.
    pub missing: BTreeMap<SnapshotId, Missing>,
}

/// An instance with snapshots.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ListedInstance {
    /// Its name; hostile text. None if it was not listed itself.
    pub name: Option<String>,
    /// Its snapshots, and when they were taken.
    pub snapshots: BTreeMap<SnapshotId, Timestamp>,
}

/// A snapshot that is not listed any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// When it was taken.
    pub created_at: Timestamp,
    /// Its instance.
    pub instance_id: Option<InstanceId>,
    /// The name of that instance; hostile text.
    pub instance_name: Option<String>,
    /// When it was last listed.
    pub listed_at: Timestamp,
    /// When a listing first lacked it.
    pub missed_at: Timestamp,
    /// When this program tried in vain to delete it, if it did.
    #[serde(default)]
    pub tried_at: Option<Timestamp>,
    /// When the audit log said that nothing explains its end; none if that is not decided.
    #[serde(default)]
    pub unexplained_at: Option<Timestamp>,
}

impl ListedZone {
    /// All snapshots that were listed, each as it would be missed `at`.
    pub fn snapshots(&self, at: Timestamp) -> impl Iterator<Item = (SnapshotId, Missing)> {
        let listed_at = self.at.unwrap_or(at);
        let of = self.instances.iter().flat_map(|(id, instance)| {
            let of = (Some(*id), instance.name.clone());
            instance.snapshots.iter().map(move |(snapshot, taken)| (*snapshot, *taken, of.clone()))
        });
        let without = self.without_instance.iter().map(|(snapshot, taken)| (*snapshot, *taken, (None, None)));
        of.chain(without).map(move |(snapshot, created_at, (instance_id, instance_name))| {
            let (missed_at, unexplained_at) = (at, None);
            let tried_at = self.tried.get(&snapshot).copied();
            let missing = Missing {
                created_at,
                instance_id,
                instance_name,
                listed_at,
                missed_at,
                tried_at,
                unexplained_at,
            };
            (snapshot, missing)
        })
    }
}

impl StateDirectory {
    /// The zone as it was last listed; nothing if it never was.
    ///
    /// # Errors
    /// A file that can't be read, is damaged, or was written by a later program.
    pub async fn listed_zone(&self, zone: &ZoneName) -> Result<ListedZone, StateError> {
        self.load(file_name(zone), VERSION).await
    }

    /// Saves a listing; after a crash at any moment the file holds the old or the new, whole.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub async fn set_listed_zone(&self, zone: &ZoneName, listed: ListedZone) -> Result<(), StateError> {
        self.save(file_name(zone), VERSION, listed).await
    }
}

fn file_name(zone: &ZoneName) -> String {
    format!("listed-{zone}.json")
}
