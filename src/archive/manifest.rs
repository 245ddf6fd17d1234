//! The record beside an image: all that is needed to find, check and restore it without this program.
//!
//! ```json
//! {
//!   "version": 1,
//!   "zone": "ch-gva-2",
//!   "snapshot": { "id": "…", "name": "…", "created_at": "2026-11-01T02:30:00Z", "state": "exported", "size_gib": 10,
//!                 "application_consistent": true },
//!   "instance": { "id": "…", "name": "web-1", "labels": { "backup": "nightly" } },
//!   "image": { "file": "20261101T023000Z-….qcow2", "bytes": 1, "md5": "…", "qcow2_version": 3, "virtual_size_bytes": 10737418240 },
//!   "exported_at": "…", "verified_at": "…",
//!   "policy": "nightly", "run_id": "…", "program_version": "0.1.0",
//!   "template": { "id": "…", "boot_mode": "uefi", "default_user": "debian", "password_enabled": false, "ssh_key_enabled": true },
//!   "warnings": [], "pruned_at": null, "corrupt_since": null
//! }
//! ```
//!
//! A manifest that is read back is treated as hostile: its size is bounded, no name in it is used as a path, and its ids
//! must be those of the file's own name. Fields of a later version are ignored, and survive a rewrite; only those that are
//! needed to trust the copy are required.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::archive::layout::{CopyId, Mark};
use crate::archive::md5::Md5Sum;
use crate::snapshot::{InstanceId, SnapshotId, TemplateId, ZoneName};

/// A manifest is never larger, in bytes.
pub const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// The version that this program writes.
pub const MANIFEST_VERSION: u64 = 1;

/// The record of a copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of its form; a later one only adds fields.
    #[serde(default)]
    pub version: u64,
    /// The zone of the snapshot.
    pub zone: ZoneName,
    /// The snapshot that it is a copy of.
    pub snapshot: SnapshotRecord,
    /// The instance that it was taken of.
    pub instance: InstanceRecord,
    /// The image of the snapshot.
    pub image: ImageRecord,
    /// When the export began.
    pub exported_at: Option<Timestamp>,
    /// When its bytes were last verified.
    pub verified_at: Timestamp,
    /// The policy that exported it.
    pub policy: Option<String>,
    /// The run that exported it.
    pub run_id: Option<Uuid>,
    /// The version of this program that wrote it.
    pub program_version: Option<String>,
    /// The instance's template, where it was known: the model for a restored one.
    pub template: Option<TemplateRecord>,
    /// Oddities of the image that do not keep it from being verified.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// When the archive's retention removed the image. The copy was there, and still counts.
    pub pruned_at: Option<Timestamp>,
    /// When the image was found to differ from its MD5. The copy does not count.
    pub corrupt_since: Option<Timestamp>,
    /// The bytes of the manifest that this one is made of, if it is: what a later version wrote there stays.
    #[serde(skip)]
    pub made_of: Option<Arc<[u8]>>,
}

/// The snapshot, as it was listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its id.
    pub id: SnapshotId,
    /// Its name; hostile text.
    #[serde(default)]
    pub name: String,
    /// When it was taken, with fractions of a second.
    pub created_at: Timestamp,
    /// Its state in the API's words.
    #[serde(default)]
    pub state: String,
    /// The size of the disk in GiB.
    pub size_gib: Option<u64>,
    /// Whether it is application-consistent; none if that is not known.
    pub application_consistent: Option<bool>,
}

/// The instance, as it was listed; without a name if it was no longer listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// Its id.
    pub id: InstanceId,
    /// Its name; hostile text.
    pub name: Option<String>,
    /// Its labels; hostile text.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// The image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The name of its file, for people: nothing here opens it by this name.
    #[serde(default)]
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// The MD5 of all its bytes.
    pub md5: Md5Sum,
    /// The version of its format.
    pub qcow2_version: Option<u32>,
    /// The size of the disk in it.
    pub virtual_size_bytes: Option<u64>,
    /// The store's name of these very bytes, where the archive is in a bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// The store's name of this version of the object, where its bucket keeps versions: whatever becomes of the key, the
    /// bytes are read by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version_id: Option<String>,
}

/// The model for a template that is made of the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateRecord {
    /// The instance's template.
    pub id: TemplateId,
    /// `legacy` or `uefi`.
    pub boot_mode: Option<String>,
    /// The user of the first login.
    pub default_user: Option<String>,
    /// Whether one may log in by password.
    pub password_enabled: Option<bool>,
    /// Whether one may log in by SSH key.
    pub ssh_key_enabled: Option<bool>,
}

impl Manifest {
    /// The snapshot that it is a copy of, as the names of the files have it.
    pub(crate) fn id(&self) -> CopyId {
        CopyId {
            zone: self.zone.clone(),
            instance_id: self.instance.id,
            created_at: self.snapshot.created_at,
            snapshot_id: self.snapshot.id,
        }
    }

    /// The mark that the name of its file has.
    pub(super) fn mark(&self) -> Option<Mark> {
        let corrupt = self.corrupt_since.map(|_| Mark::Corrupt);
        corrupt.or(self.pruned_at.map(|_| Mark::Pruned))
    }

    /// The content of its file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let ours = serde_json::to_value(self).expect("JSON can hold all that a manifest has");
        let before = self.made_of.as_ref().and_then(|bytes| serde_json::from_slice(bytes).ok());
        let mut bytes = match before {
            Some(mut whole) => {
                merge(&mut whole, ours);
                serde_json::to_vec_pretty(&whole)
            }
            None => serde_json::to_vec_pretty(self),
        }
        .expect("JSON can hold all that a manifest has");
        bytes.push(b'\n');
        bytes
    }

    /// Reads a file's content.
    ///
    /// # Errors
    /// It is no JSON, or lacks what is needed. The text may hold words of the file.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }
}

/// Puts each field of `ours` in the place of the one that is there.
fn merge(there: &mut Value, ours: Value) {
    match (there, ours) {
        (Value::Object(there), Value::Object(ours)) => {
            for (name, value) in ours {
                merge(there.entry(name).or_insert(Value::Null), value);
            }
        }
        (there, ours) => *there = ours,
    }
}
