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
