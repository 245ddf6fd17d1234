//! What one policy remembers from run to run. It is read and written under the policy's lock alone.

use std::io;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::disk::{self, Access};
use crate::policy::PolicyName;
use crate::snapshot::{InstanceId, SnapshotId, TemplateId, ZoneName};
use crate::state::{StateDirectory, StateError};

/// The version of the file that this program writes.
const VERSION: u64 = 1;

/// A policy that promotes 100 snapshots a day for ten years stays far below this.
const BYTES_MAX: u64 = 256 * 1024 * 1024;

/// The memory of one policy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyState {
    /// The templates that it made, and those that it set out to make.
    pub promotions: Vec<Promotion>,
}

/// A snapshot that became a template, or was about to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promotion {
    /// Where.
    pub zone: ZoneName,
    /// Of which snapshot.
    pub snapshot_id: SnapshotId,
    /// When that was taken.
    pub snapshot_created_at: Timestamp,
    /// Of which instance.
    pub instance_id: InstanceId,
    /// The template's name.
    pub template_name: String,
    /// When it was asked for. It is written before the request, so that a template whose answer was lost is
    /// found again by name and date, instead of a second one being made.
    pub requested_at: Timestamp,
    /// The template, once it is known.
    pub template_id: Option<TemplateId>,
    /// When this policy deleted it again. The entry stays while the snapshot is listed, so that it is not promoted twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted_at: Option<Timestamp>,
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u64,
    #[serde(flatten)]
    state: T,
}

#[derive(Deserialize)]
struct VersionAlone {
    version: u64,
}

impl StateDirectory {
    /// What the policy remembers; nothing if it never ran.
    ///
    /// # Errors
    /// A file that can't be read, is damaged, or was written by a later program.
    pub fn policy_state(&self, policy: &PolicyName) -> Result<PolicyState, StateError> {
        let path = self.path.join(file_name(policy));
        let bytes = match disk::read_file(&*self.disk, &path, BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(PolicyState::default()),
            Err(source) => return Err(StateError::File { verb: "read", path, source }),
        };
        let damaged = |source: serde_json::Error| StateError::Damaged {
            path: path.clone(),
            line: source.line(),
            column: source.column(),
            source,
        };
        let found = serde_json::from_slice::<VersionAlone>(&bytes).map_err(damaged)?.version;
        if found > VERSION {
            return Err(StateError::FromTheFuture { path, found, known: VERSION });
        }
        Ok(serde_json::from_slice::<Versioned<PolicyState>>(&bytes).map_err(damaged)?.state)
    }

    /// Remembers; after a crash at any moment the file holds the old or the new, whole.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub fn set_policy_state(&self, policy: &PolicyName, state: &PolicyState) -> Result<(), StateError> {
        let path = self.path.join(file_name(policy));
        let failed = |source| StateError::File { verb: "write", path: path.clone(), source };
        let versioned = Versioned { version: VERSION, state };
        let mut bytes = serde_json::to_vec_pretty(&versioned).map_err(|error| failed(error.into()))?;
        bytes.push(b'\n');
        disk::replace_file(&*self.disk, &path, &bytes, Access::Owner).map_err(failed)
    }
}

fn file_name(policy: &PolicyName) -> String {
    format!("policy-{policy}.json")
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use uuid::Uuid;

    use super::*;
    use crate::disk::{Disk as _, RealDisk};

    fn state(folder: &Path) -> StateDirectory {
        StateDirectory::open(Arc::new(RealDisk), folder).unwrap()
    }

    fn nightly() -> PolicyName {
        "nightly".parse().unwrap()
    }

    #[test]
    fn what_was_remembered_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let remembered = PolicyState {
            promotions: vec![Promotion {
                zone: "ch-gva-2".parse().unwrap(),
                snapshot_id: SnapshotId(Uuid::from_u128(1)),
                snapshot_created_at: Timestamp::UNIX_EPOCH,
                instance_id: InstanceId(Uuid::from_u128(2)),
                template_name: "golden".to_owned(),
                requested_at: Timestamp::UNIX_EPOCH,
                template_id: None,
                deleted_at: None,
            }],
        };
        state(folder.path()).set_policy_state(&nightly(), &remembered).unwrap();
        assert_eq!(state(folder.path()).policy_state(&nightly()).unwrap(), remembered);
    }

    #[test]
    fn damage_is_an_error_that_names_the_file_and_never_an_empty_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy-nightly.json");
        for damaged in ["", "{}", "null", "{\"version\":1}", "{\"version\":1,\"promotions\":[{}]}", "\0\0\0"]
        {
            disk::replace_file(&RealDisk, &path, damaged.as_bytes(), Access::Owner).unwrap();
            let error = state(folder.path()).policy_state(&nightly()).unwrap_err();
            assert!(matches!(error, StateError::Damaged { .. }), "{damaged:?}: {error}");
            assert!(error.to_string().contains("policy-nightly.json"), "{error}");
        }
        RealDisk.remove_file(&path).unwrap();
        assert_eq!(state(folder.path()).policy_state(&nightly()).unwrap(), PolicyState::default());
    }

    #[test]
    fn a_file_of_a_later_program_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy-nightly.json");
        disk::replace_file(&RealDisk, &path, b"{\"version\":2,\"moons\":[]}", Access::Owner).unwrap();
        let error = state(folder.path()).policy_state(&nightly()).unwrap_err();
        assert!(matches!(error, StateError::FromTheFuture { found: 2, .. }), "{error}");
    }
}
