//! The proof that a verified copy exists, as a value.
//!
//! Deleting a snapshot whose export is required takes one. Its fields are private and only this module makes one, so
//! the order "verify first, then delete" is held by the compiler.

use jiff::Timestamp;

use crate::archive::manifest::Manifest;
use crate::policy::Which;
use crate::policy::name::ArchiveName;
use crate::snapshot::{InstanceId, Snapshot, SnapshotId};

/// An archive holds, or has held until its own retention removed it, a verified copy of this snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedCopy {
    archive: ArchiveName,
    snapshot_id: SnapshotId,
    instance_id: InstanceId,
    created_at: Timestamp,
    exported_at: Option<Timestamp>,
    bytes: u64,
    warnings: Vec<String>,
    pruned_at: Option<Timestamp>,
}

impl VerifiedCopy {
    pub(super) fn new(archive: &ArchiveName, manifest: &Manifest) -> Self {
        Self {
            archive: archive.clone(),
            snapshot_id: manifest.snapshot.id,
            instance_id: manifest.instance.id,
            created_at: manifest.snapshot.created_at,
            exported_at: manifest.exported_at,
            bytes: manifest.image.bytes,
            warnings: manifest.warnings.clone(),
            pruned_at: manifest.pruned_at,
        }
    }

    /// The archive that has it.
    pub fn archive(&self) -> &ArchiveName {
        &self.archive
    }

    /// The snapshot that it is a copy of.
    pub fn snapshot_id(&self) -> SnapshotId {
        self.snapshot_id
    }

    /// The instance of that snapshot.
    pub fn instance_id(&self) -> InstanceId {
        self.instance_id
    }

    /// When the snapshot was taken.
    pub fn created_at(&self) -> Timestamp {
        self.created_at
    }

    /// The length of the image in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// When the archive's retention deleted its image, if it did.
    pub fn pruned_at(&self) -> Option<Timestamp> {
        self.pruned_at
    }

    /// Oddities of the image that do not keep it from being verified.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Whether this copy is what `snapshot` needs before it may be deleted: a copy of itself ([`Which::All`]), or of it
    /// or a newer one of its instance ([`Which::Newest`]).
    pub fn covers(&self, snapshot: &Snapshot, of: Which) -> bool {
        let newer = || {
            snapshot.instance_id == Some(self.instance_id)
                && (self.created_at, self.snapshot_id) > (snapshot.created_at, snapshot.id)
        };
        self.snapshot_id == snapshot.id || (of == Which::Newest && newer())
    }

    /// Whether this copy is of the same instance as `snapshot`, and its export began at `since` or later.
    pub(super) fn is_of_run_since(&self, snapshot: &Snapshot, since: Timestamp) -> bool {
        snapshot.instance_id == Some(self.instance_id) && self.exported_at.is_some_and(|at| at >= since)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::snapshot::SnapshotState;

    fn at(minute: u8) -> Timestamp {
        format!("2026-11-01T02:{minute:02}:00Z").parse().unwrap()
    }

    fn snapshot(number: u128, minute: u8, instance: u128) -> Snapshot {
        Snapshot {
            id: SnapshotId(Uuid::from_u128(number)),
            name: "web-1".into(),
            created_at: at(minute),
            state: SnapshotState::Exported,
            size_gib: None,
            instance_id: Some(InstanceId(Uuid::from_u128(instance))),
            application_consistent: None,
        }
    }

    /// The copy of snapshot 2 of instance 1, taken at 02:10 and exported at 02:20.
    fn copy() -> VerifiedCopy {
        VerifiedCopy {
            archive: "vault".parse().unwrap(),
            snapshot_id: SnapshotId(Uuid::from_u128(2)),
            instance_id: InstanceId(Uuid::from_u128(1)),
            created_at: at(10),
            exported_at: Some(at(20)),
            bytes: 1,
            warnings: Vec::new(),
            pruned_at: None,
        }
    }

    #[test]
    fn a_copy_covers_its_own_snapshot_and_older_ones_of_its_instance() {
        for (of, number, minute, instance, covers) in [
            (Which::All, 2, 10, 1, true),
            (Which::All, 3, 9, 1, false),
            (Which::Newest, 2, 10, 1, true),
            (Which::Newest, 3, 9, 1, true),
            (Which::Newest, 3, 11, 1, false),
            (Which::Newest, 3, 9, 7, false),
            // Of two with one time the order of the ids decides.
            (Which::Newest, 1, 10, 1, true),
            (Which::Newest, 3, 10, 1, false),
        ] {
            let snapshot = snapshot(number, minute, instance);
            assert_eq!(copy().covers(&snapshot, of), covers, "{of:?}, {number} at {minute} of {instance}");
        }
    }

    #[test]
    fn a_copy_is_of_a_run_if_its_export_began_in_it_and_it_is_of_the_same_instance() {
        for (instance, since, is_of) in [(1, 20, true), (1, 19, true), (1, 21, false), (7, 20, false)] {
            let snapshot = snapshot(9, 30, instance);
            assert_eq!(copy().is_of_run_since(&snapshot, at(since)), is_of, "{instance} since {since}");
        }
        let unknown = VerifiedCopy { exported_at: None, ..copy() };
        assert!(!unknown.is_of_run_since(&snapshot(9, 30, 1), at(0)));
    }
}
