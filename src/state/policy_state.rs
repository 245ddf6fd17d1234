//! The creations and promotions of one policy, kept from run to run. It is read and written under the policy's lock alone.

use std::collections::HashSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::policy::name::PolicyName;
use crate::snapshot::{InstanceId, SnapshotId, TemplateId, ZoneName};
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;

/// The version of the file that this program writes.
const VERSION: u64 = 1;

/// The state of one policy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyState {
    /// The templates that it made, and those that it set out to make.
    pub promotions: Vec<Promotion>,
    /// The snapshots that it took, and those that it set out to take.
    #[serde(default)]
    pub created: Vec<Creation>,
    /// The snapshots that it could not take when they were last due.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<MissingSnapshot>,
}

/// A snapshot that could not be taken when it was due.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingSnapshot {
    /// The zone.
    pub zone: ZoneName,
    /// The instance; none if none at all could be taken in the zone.
    pub instance_id: Option<InstanceId>,
    /// The moment of the schedule that it was for.
    pub slot: Timestamp,
    /// Why it could not be taken.
    pub cause: String,
}

/// A snapshot that was taken, or was about to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Creation {
    /// The snapshot's zone.
    pub zone: ZoneName,
    /// The snapshot's instance.
    pub instance_id: InstanceId,
    /// The moment of the schedule that it is for.
    pub slot: Timestamp,
    /// When it was asked for. It is written before the request, so that a snapshot whose answer was lost is found
    /// again by instance and date, instead of a second one being taken.
    pub requested_at: Timestamp,
    /// The snapshot, once it is known.
    pub snapshot_id: Option<SnapshotId>,
    /// Whether several could be it, so that it will never be known: none of them counts as ours.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_in_doubt: bool,
    /// The instance's snapshots of about that time that were listed before the request: none of them came of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub listed_before: Vec<SnapshotId>,
    /// Whose the snapshot is. A file from before this was recorded lacks it.
    #[serde(default)]
    pub owner: Owner,
}

/// Whose a snapshot is that was taken here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// Every policy's: it was recorded before that was.
    #[default]
    Everyone,
    /// This policy's: the operation named it.
    ThisPolicy,
    /// Perhaps somebody else's: there is no operation that named it, so it counts for its slot alone.
    Nobody,
    /// This policy's, too: the other one took it, and it served a slot of this policy. `requested_at` is that of the other
    /// policy's record, which alone has the snapshot's id: it may not be known yet.
    ServedBy(PolicyName),
}

impl Creation {
    /// Whether it is still to be found out what came of it.
    pub fn is_open(&self) -> bool {
        self.snapshot_id.is_none() && !self.is_in_doubt && self.server().is_none()
    }

    /// The policy that took the snapshot, if that is another one.
    pub fn server(&self) -> Option<&PolicyName> {
        if let Owner::ServedBy(policy) = &self.owner { Some(policy) } else { None }
    }

    /// The other policy's record of the snapshot that served the slot, among these of that policy.
    pub fn served_from<'c>(&self, created: &'c [Creation]) -> Option<&'c Creation> {
        created.iter().find(|made| {
            made.server().is_none()
                && made.zone == self.zone
                && made.instance_id == self.instance_id
                && made.requested_at == self.requested_at
        })
    }
}

/// A snapshot that became a template, or was about to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promotion {
    /// The snapshot's zone.
    pub zone: ZoneName,
    /// The snapshot.
    pub snapshot_id: SnapshotId,
    /// When the snapshot was taken.
    pub snapshot_created_at: Timestamp,
    /// The snapshot's instance.
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

impl StateDirectory {
    /// The policy's state; empty if it never ran.
    ///
    /// # Errors
    /// A file that can't be read, is damaged, or was written by a later program.
    pub async fn policy_state(&self, policy: &PolicyName) -> Result<PolicyState, StateError> {
        self.load(file_name(policy), VERSION).await
    }

    /// Saves it; after a crash at any moment the file holds the old or the new, whole.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub async fn set_policy_state(&self, policy: &PolicyName, state: PolicyState) -> Result<(), StateError> {
        self.save(file_name(policy), VERSION, state).await
    }

    /// The snapshots that each policy took, for every policy that ever ran here, also one that is not configured any
    /// more.
    ///
    /// # Errors
    /// A directory or a file that can't be read, or a file that is damaged or was written by a later program.
    pub async fn all_created(&self) -> Result<Vec<(PolicyName, Vec<Creation>)>, StateError> {
        let all = self.all_policy_states().await?;
        Ok(all.into_iter().map(|(policy, state)| (policy, state.created)).collect())
    }

    /// The state of every policy that ever ran here, also of one that is not configured any more.
    ///
    /// # Errors
    /// As [`StateDirectory::all_created`].
    pub async fn all_policy_states(&self) -> Result<Vec<(PolicyName, PolicyState)>, StateError> {
        self.blocking(|state| state.read_of_policies("policy-", VERSION)).await
    }

    /// The snapshots that this program is known to have asked for, whosever they are.
    ///
    /// # Errors
    /// As [`StateDirectory::all_created`].
    pub async fn created_snapshots(&self) -> Result<HashSet<SnapshotId>, StateError> {
        let all = self.all_created().await?.into_iter().flat_map(|(_, created)| created);
        Ok(all.filter_map(|made| made.snapshot_id).collect())
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
    use crate::disk::{self, Access, Disk as _, RealDisk};

    fn state(folder: &Path) -> StateDirectory {
        StateDirectory::open(Arc::new(RealDisk), folder).unwrap()
    }

    fn nightly() -> PolicyName {
        "nightly".parse().unwrap()
    }

    #[tokio::test]
    async fn what_was_remembered_comes_back() {
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
            created: vec![Creation {
                zone: "ch-gva-2".parse().unwrap(),
                instance_id: InstanceId(Uuid::from_u128(2)),
                slot: Timestamp::UNIX_EPOCH,
                requested_at: Timestamp::UNIX_EPOCH,
                snapshot_id: Some(SnapshotId(Uuid::from_u128(1))),
                is_in_doubt: false,
                listed_before: vec![SnapshotId(Uuid::from_u128(3))],
                owner: Owner::ServedBy("hourly".parse().unwrap()),
            }],
            missing: vec![MissingSnapshot {
                zone: "ch-gva-2".parse().unwrap(),
                instance_id: None,
                slot: Timestamp::UNIX_EPOCH,
                cause: "403".to_owned(),
            }],
        };
        state(folder.path()).set_policy_state(&nightly(), remembered.clone()).await.unwrap();
        assert_eq!(state(folder.path()).policy_state(&nightly()).await.unwrap(), remembered);
        let created = state(folder.path()).created_snapshots().await.unwrap();
        assert_eq!(created, HashSet::from([SnapshotId(Uuid::from_u128(1))]));
    }

    #[tokio::test]
    async fn a_file_of_an_earlier_program_knows_of_no_creation() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy-nightly.json");
        let earlier = b"{\"version\":1,\"promotions\":[]}";
        disk::replace_file(&RealDisk, &path, earlier, Access::Owner).unwrap();
        assert_eq!(state(folder.path()).policy_state(&nightly()).await.unwrap(), PolicyState::default());
    }

    #[tokio::test]
    async fn ownership_is_not_derived_from_less_than_every_policy() {
        let folder = tempfile::tempdir().unwrap();
        assert!(state(&folder.path().join("state")).created_snapshots().await.unwrap().is_empty());
        let path = folder.path().join("policy-removed-from-the-configuration.json");
        disk::replace_file(&RealDisk, &path, b"{", Access::Owner).unwrap();
        let error = state(folder.path()).created_snapshots().await.unwrap_err();
        assert!(error.to_string().contains("removed-from-the-configuration"), "{error}");
    }

    #[tokio::test]
    async fn damage_is_an_error_that_names_the_file_and_never_an_empty_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy-nightly.json");
        for damaged in ["", "{}", "null", "{\"version\":1}", "{\"version\":1,\"promotions\":[{}]}", "\0\0\0"]
        {
            disk::replace_file(&RealDisk, &path, damaged.as_bytes(), Access::Owner).unwrap();
            let error = state(folder.path()).policy_state(&nightly()).await.unwrap_err();
            assert!(matches!(error, StateError::Damaged { .. }), "{damaged:?}: {error}");
            assert!(error.to_string().contains("policy-nightly.json"), "{error}");
        }
        RealDisk.remove_file(&path).unwrap();
        assert_eq!(state(folder.path()).policy_state(&nightly()).await.unwrap(), PolicyState::default());
    }

    #[tokio::test]
    async fn a_file_of_a_later_program_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy-nightly.json");
        disk::replace_file(&RealDisk, &path, b"{\"version\":2,\"moons\":[]}", Access::Owner).unwrap();
        let error = state(folder.path()).policy_state(&nightly()).await.unwrap_err();
        assert!(matches!(error, StateError::FromTheFuture { found: 2, .. }), "{error}");
    }
}
