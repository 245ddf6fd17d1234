//! The record beside an image: all that is needed to find, check and restore it without this program.
//!
//! ```json
//! {
//!   "version": 2,
//!   "zone": "ch-gva-2",
//!   "snapshot": { "id": "…", "name": "…", "created_at": "2026-11-01T02:30:00Z", "state": "exported", "size_gib": 10,
//!                 "application_consistent": true },
//!   "instance": { "id": "…", "name": "web-1", "labels": { "backup": "nightly" } },
//!   "image": { "file": "20261101T023000Z-….qcow2", "bytes": 1, "md5": "…", "qcow2_version": 3, "virtual_size_bytes": 10737418240 },
//!   "exported_at": "…", "verified_at": "…",
//!   "policy": "nightly",
//!   "template": { "id": "…", "boot_mode": "uefi", "default_user": "debian", "password_enabled": false, "ssh_key_enabled": true,
//!                 "application_consistent": true, "origin": { "name": "…", "version": "…", "build": "…", "maintainer": "…" } },
//!   "warnings": [], "pruned_at": null, "corrupt_since": null,
//!   "run_id": "…", "program_version": "0.1.0",
//!   "machine": { "instance_type": "standard.medium", "disk_size_gib": 10, "ssh_keys": ["alice"], … }
//! }
//! ```
//!
//! A manifest that is read back is treated as hostile: its size is bounded, no name in it is used as a path, and its ids
//! must be those of the file's own name. Fields of a later version are ignored, and survive a rewrite; only those that are
//! needed to trust the copy are required.
//!
//! Version 2 added `machine`, and to `template` its last two fields. What nothing is decided by is not kept in memory with the
//! rest, since there may be hundreds of thousands: it is written, and stays in the file when that is rewritten. What only a
//! restore needs of it ([`BuildFacts`]) is read from the file of the one copy that is restored.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::archive::layout::Mark;
use crate::archive::md5::Md5Sum;
use crate::copies::CopyId;
use crate::snapshot::{InstanceId, Machine, SnapshotId, TemplateId, ZoneName};

/// A manifest is never larger, in bytes.
pub const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// The version that this program writes.
pub const MANIFEST_VERSION: u64 = 2;

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
    /// The instance that it was taken of; copies that are read together share it.
    pub instance: Arc<InstanceRecord>,
    /// The image of the snapshot.
    pub image: ImageRecord,
    /// When the export began.
    pub exported_at: Option<Timestamp>,
    /// When its bytes were last verified.
    pub verified_at: Timestamp,
    /// The policy that exported it.
    pub policy: Option<Arc<str>>,
    /// The instance's template, where it was known: the model for a restored one. Copies that are read together share it.
    pub template: Option<Arc<TemplateRecord>>,
    /// What else is written into a new file.
    #[serde(skip)]
    pub written: Option<Box<Written>>,
    /// Oddities of the image that do not keep it from being verified.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// When the archive's retention removed the image. The copy was there, and still counts.
    pub pruned_at: Option<Timestamp>,
    /// When the image was found to differ from its MD5. The copy does not count.
    pub corrupt_since: Option<Timestamp>,
}

/// What is written into a manifest's file, and never read with the rest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Written {
    /// The run that exported it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_id: Option<Uuid>,
    /// The version of this program that wrote it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub program_version: Option<&'static str>,
    /// How to build the instance again, where that was known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
    /// The bytes of the file that this one is made of, if it is: what else stands there stays.
    #[serde(skip)]
    pub made_of: Option<Arc<[u8]>>,
}

/// All of a new file.
#[derive(Serialize)]
struct NewFile<'a> {
    #[serde(flatten)]
    manifest: &'a Manifest,
    #[serde(flatten)]
    written: Option<&'a Written>,
}

impl Written {
    /// Over a file with these bytes.
    pub fn over(bytes: impl Into<Arc<[u8]>>) -> Box<Self> {
        Box::new(Self { made_of: Some(bytes.into()), ..Self::default() })
    }
}

/// The snapshot, as it was listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its id.
    pub id: SnapshotId,
    /// Its name; hostile text.
    #[serde(default)]
    pub name: Box<str>,
    /// When it was taken, with fractions of a second.
    pub created_at: Timestamp,
    /// Its state in the API's words. It is written, and never read with the rest.
    #[serde(skip_deserializing, skip_serializing_if = "str::is_empty")]
    pub state: Box<str>,
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
    /// The name of its file, for people: nothing here opens it by this name. It is written, and never read with the rest.
    #[serde(skip_deserializing, skip_serializing_if = "str::is_empty")]
    pub file: Box<str>,
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
    pub etag: Option<Box<str>>,
    /// The store's name of this version of the object, where its bucket keeps versions: whatever becomes of the key, the
    /// bytes are read by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version_id: Option<Box<str>>,
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
    /// Whether application-consistent snapshots of its instances are possible.
    #[serde(default)]
    pub application_consistent: Option<bool>,
    /// Where it comes from. It is written, and never read with the rest.
    #[serde(skip_deserializing, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Box<TemplateOrigin>>,
}

/// What a template is, for those who choose among them. Hostile texts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TemplateOrigin {
    /// Its name.
    pub name: Option<String>,
    /// The version of its operating system.
    pub version: Option<String>,
    /// Its own version.
    pub build: Option<String>,
    /// Who maintains it.
    pub maintainer: Option<String>,
}

/// What only a restore needs of a manifest: how to build the instance and its template again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BuildFacts {
    /// None if the export could not read it, or was made before version 2.
    pub machine: Option<Machine>,
    /// Where the instance's template came from.
    pub origin: TemplateOrigin,
}

impl BuildFacts {
    /// Those of a manifest's file. What can't be read counts as not there: the copy can be restored without it.
    pub fn of(manifest: &[u8]) -> Self {
        let manifest: Value = serde_json::from_slice(manifest).unwrap_or_default();
        let origin = manifest.get("template").and_then(|template| template.get("origin"));
        Self { machine: read(manifest.get("machine")), origin: read(origin).unwrap_or_default() }
    }
}

fn read<T: DeserializeOwned>(value: Option<&Value>) -> Option<T> {
    value.filter(|value| value.is_object()).and_then(|value| T::deserialize(value).ok())
}

/// A manifest's file without the user data of its instance, which not every archive may hold.
pub(crate) fn without_user_data(manifest: Vec<u8>) -> Vec<u8> {
    let Ok(mut value) = serde_json::from_slice::<Value>(&manifest) else { return manifest };
    let machine = value.get_mut("machine").and_then(Value::as_object_mut);
    match machine.and_then(|machine| machine.remove("user_data")) {
        Some(_) => serde_json::to_vec(&value).unwrap_or(manifest),
        None => manifest,
    }
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
        let written = self.written.as_deref();
        let ours = NewFile { manifest: self, written };
        let before = written.and_then(|written| written.made_of.as_ref());
        let before = before.and_then(|bytes| serde_json::from_slice(bytes).ok());
        let mut bytes = match before {
            Some(mut whole) => {
                merge(&mut whole, serde_json::to_value(ours).expect("JSON can hold all that a manifest has"));
                // Those of another store would be asked for in this one, which may need a right of its own for that.
                if let Some(image) = whole.get_mut("image").and_then(Value::as_object_mut) {
                    image.retain(|name, _| match name.as_str() {
                        "etag" => self.image.etag.is_some(),
                        "version_id" => self.image.version_id.is_some(),
                        _ => true,
                    });
                }
                serde_json::to_vec_pretty(&whole)
            }
            None => serde_json::to_vec_pretty(&ours),
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
        // A rewrite changes no list: its entries are the same ones.
        (Value::Array(there), Value::Array(ours)) if there.len() == ours.len() => {
            there.iter_mut().zip(ours).for_each(|(there, ours)| merge(there, ours));
        }
        (there, ours) => *there = ours,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::archive::testing::{image, manifest_of};

    #[test]
    fn what_only_a_restore_needs_is_read_from_the_file_alone_and_survives_a_rewrite() {
        let machine = Machine {
            ssh_keys: vec!["alice".to_owned()],
            user_data: Some("aHVzaA==".to_owned()),
            ..Machine::default()
        };
        let written = Some(Box::new(Written { machine: Some(machine.clone()), ..Written::default() }));
        let file = Manifest { written, ..manifest_of(&image(300_000, 1)) }.to_bytes();
        let read = Manifest::from_bytes(&file).unwrap();
        assert_eq!(read.written, None);
        assert_eq!(BuildFacts::of(&file).machine, Some(machine.clone()));

        let mut later: Value = serde_json::from_slice(&file).unwrap();
        later["machine"]["security_groups"] =
            json!([{ "id": "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec", "colour": "red" }]);
        later["machine"]["gpu"] = json!({ "count": 2 });
        let written = Some(Written::over(later.to_string().into_bytes()));
        let again: Value = serde_json::from_slice(&Manifest { written, ..read }.to_bytes()).unwrap();
        assert_eq!(again["machine"], later["machine"]);
        let without: Value =
            serde_json::from_slice(&without_user_data(again.to_string().into_bytes())).unwrap();
        assert_eq!(
            (&without["machine"]["gpu"], &without["machine"]["user_data"]),
            (&json!({ "count": 2 }), &Value::Null)
        );
    }

    #[test]
    fn names_that_another_store_gave_do_not_survive_a_rewrite() {
        let mut there = manifest_of(b"QFI");
        (there.image.etag, there.image.version_id) = (Some("a".into()), Some("3".into()));
        let bytes = there.to_bytes();
        let same = Manifest { written: Some(Written::over(bytes.clone())), ..there.clone() };
        let value = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        assert_eq!(value(&same.to_bytes()), value(&bytes));
        (there.image.etag, there.image.version_id) = (None, None);
        let copied = Manifest { written: Some(Written::over(bytes)), ..there.clone() };
        let image = &value(&copied.to_bytes())["image"];
        assert_eq!((image.get("etag"), image.get("version_id")), (None, None));
    }

    #[test]
    fn a_list_keeps_what_a_later_version_wrote_into_its_entries() {
        let mut there = json!({ "list": [{ "id": 1, "colour": "red" }], "other": [1, 2] });
        merge(&mut there, json!({ "list": [{ "id": 2 }], "other": [3] }));
        assert_eq!(there, json!({ "list": [{ "id": 2, "colour": "red" }], "other": [3] }));
    }

    #[test]
    fn odd_facts_make_no_copy_unreadable() {
        let mut manifest = serde_json::to_value(manifest_of(&image(300_000, 1))).unwrap();
        for odd in
            [json!("x"), json!(7), json!([]), json!({ "ssh_keys": 3 }), json!({ "security_groups": [{}] })]
        {
            manifest["machine"] = odd;
            manifest["version"] = 2.into();
            let file = manifest.to_string().into_bytes();
            assert!(Manifest::from_bytes(&file).is_ok());
            assert_eq!(BuildFacts::of(&file), BuildFacts::default());
        }
        assert_eq!(BuildFacts::of(b"no JSON"), BuildFacts::default());
    }
}
