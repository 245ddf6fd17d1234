//! The creations and promotions of one policy, kept from run to run. It is read and written under the policy's lock alone.
//!
//! A run changes it before and after each step, and it grows with the fleet. So a change is a line at the end of
//! `policy-<name>.<generation>.jsonl`, beside `policy-<name>.json` of that generation. Once there are more bytes of changes
//! than of what they change, the whole is written anew, as the next generation.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::path::PathBuf;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::disk::{Access, read_file};
use crate::policy::name::PolicyName;
use crate::snapshot::{InstanceId, SnapshotId, TemplateId, ZoneName};
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;
use crate::state::file;

/// A clock that is set back by more was wrong altogether: what it said is no time.
const SET_BACK_MAX: SignedDuration = SignedDuration::from_mins(10);

/// The version of the file that this program writes. The first one knew no changes beside the file.
const VERSION: u64 = 2;

/// The whole is not written anew for less than this.
const CHANGES_BYTES: u64 = 64 << 10;

/// The most bytes of changes that are read: some times what a zone of a million snapshots needs.
const CHANGES_BYTES_MAX: u64 = 1 << 30;

/// The length of a file of changes that may hold anything.
const UNKNOWN: u64 = u64::MAX;

/// The state of one policy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyState {
    /// Which file of changes belongs to it; 0 for a file without.
    #[serde(default)]
    generation: u64,
    /// The length of that file, in bytes, as this state knows it.
    #[serde(skip)]
    changes_len: u64,
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
    /// Where another policy's snapshot served the slot, the slot of its record: by that it is known also if it was requested again,
    /// since the first request is known not to have been carried out. Records from before lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_for: Option<Timestamp>,
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
    /// This policy's, too: the other one took it, and it served a slot of this policy. `requested_at` and `taken_for` are of the
    /// other policy's record, which alone has the snapshot's id: it may not be known yet.
    ServedBy(PolicyName),
}

impl Creation {
    /// Whether it is still to be found out what came of it.
    pub fn is_open(&self) -> bool {
        self.snapshot_id.is_none() && !self.is_in_doubt && self.server().is_none()
    }

    /// Whether it was requested for this slot, or since, up to `now`: also where our clock was set back a little after its slot or
    /// its request. One by a clock that ran far ahead says nothing: until then no other policy would take any.
    pub fn is_since(&self, slot: Timestamp, now: Timestamp) -> bool {
        let latest = now.checked_add(SET_BACK_MAX).unwrap_or(Timestamp::MAX);
        let set_back = self.slot.duration_since(self.requested_at);
        let is_of_slot = self.slot >= slot && set_back <= SET_BACK_MAX;
        (self.requested_at >= slot || is_of_slot) && self.requested_at <= latest
    }

    /// The policy that took the snapshot, if that is another one.
    pub fn server(&self) -> Option<&PolicyName> {
        if let Owner::ServedBy(policy) = &self.owner { Some(policy) } else { None }
    }

    /// The other policy's record of the snapshot that served the slot, among these of that policy.
    pub fn served_from<'c>(&self, created: &'c [Creation]) -> Option<&'c Creation> {
        let mut of_instance = created.iter().filter(|made| {
            made.server().is_none() && made.zone == self.zone && made.instance_id == self.instance_id
        });
        let exact = of_instance.clone().find(|made| made.requested_at == self.requested_at);
        // An earlier one for the slot may have failed.
        exact.or_else(|| of_instance.rfind(|made| Some(made.slot) == self.taken_for))
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
    /// When that was by the platform's clock, if both were known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_at_there: Option<Timestamp>,
    /// The template, once it is known.
    pub template_id: Option<TemplateId>,
    /// When this policy deleted it again. The entry stays while the snapshot is listed, so that it is not promoted twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted_at: Option<Timestamp>,
}

impl Promotion {
    /// When it was asked for, by the platform's clock as far as that is known: templates are dated by it.
    pub fn by_platform(&self) -> Timestamp {
        self.requested_at_there.unwrap_or(self.requested_at)
    }
}

/// What replaces a part of a list.
#[derive(Debug, Serialize, Deserialize)]
struct Splice<T> {
    at: usize,
    removed: usize,
    added: Vec<T>,
}

/// What makes `after` of `before`, one splice after the other.
fn splices<T: Clone + PartialEq>(mut before: &[T], after: &[T]) -> Vec<Splice<T>> {
    let mut splices: Vec<Splice<T>> = Vec::new();
    let mut at = 0;
    while let Some((next, rest)) = after.get(at..).and_then(<[T]>::split_first) {
        let found = before.iter().position(|one| one == next);
        let (removed, added) = if let Some(removed) = found {
            (removed, Vec::new())
        } else {
            // What is kept behind this one was not replaced by it.
            let is_kept = before.first().is_none_or(|one| rest.contains(one));
            (usize::from(!is_kept), vec![next.clone()])
        };
        before = &before[removed + usize::from(found.is_some())..];
        if removed > 0 || !added.is_empty() {
            splices.push(Splice { at, removed, added });
        }
        at += 1;
    }
    if !before.is_empty() {
        splices.push(Splice { at, removed: before.len(), added: Vec::new() });
    }
    splices
}

/// Whether they could be applied.
fn splice<T>(list: &mut Vec<T>, splices: Vec<Splice<T>>) -> bool {
    splices.into_iter().all(|Splice { at, removed, added }| {
        let end = at.checked_add(removed).filter(|end| *end <= list.len());
        end.map(|end| list.splice(at..end, added)).is_some()
    })
}

/// A line of the file of changes.
#[derive(Debug, Serialize, Deserialize)]
struct Change {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    promotions: Vec<Splice<Promotion>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    created: Vec<Splice<Creation>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    missing: Vec<Splice<MissingSnapshot>>,
}

impl Change {
    fn between(before: &PolicyState, after: &PolicyState) -> Self {
        Self {
            promotions: splices(&before.promotions, &after.promotions),
            created: splices(&before.created, &after.created),
            missing: splices(&before.missing, &after.missing),
        }
    }

    fn apply(self, state: &mut PolicyState) -> bool {
        splice(&mut state.promotions, self.promotions)
            && splice(&mut state.created, self.created)
            && splice(&mut state.missing, self.missing)
    }
}

/// A state file as far as its generation.
#[derive(Default, Deserialize)]
struct GenerationAlone {
    #[serde(default)]
    generation: u64,
}

impl StateDirectory {
    /// The policy's state; empty if it never ran.
    ///
    /// # Errors
    /// A file that can't be read, is damaged, or was written by a later program.
    pub async fn policy_state(&self, policy: &PolicyName) -> Result<PolicyState, StateError> {
        let policy = policy.clone();
        self.blocking(move |state| state.read_policy(&policy)).await
    }

    /// Saves what `own`, as it was read or saved last, becomes; after a crash at any moment the files hold the old or the
    /// new, whole. After an error either may be there, so the next change is saved with the whole.
    ///
    /// # Errors
    /// [`StateError::File`]; then `own` stays as it is.
    pub async fn set_policy_state(
        &self,
        policy: &PolicyName,
        own: &mut PolicyState,
        after: PolicyState,
    ) -> Result<(), StateError> {
        let policy = policy.clone();
        let before = own.clone();
        // Before the files are changed, also for a caller that is dropped meanwhile.
        own.changes_len = UNKNOWN;
        *own = self.blocking(move |state| state.save_policy(&policy, &before, after)).await?;
        Ok(())
    }

    fn save_policy(
        &self,
        policy: &PolicyName,
        before: &PolicyState,
        after: PolicyState,
    ) -> Result<PolicyState, StateError> {
        let noted = match before.generation {
            0 => None,
            _ => self.note_change(policy, before, &after).ok(),
        };
        if let Some(changes_len) = noted {
            return Ok(PolicyState { generation: before.generation, changes_len, ..after });
        }
        // Also where a change could not be noted: what would come behind it could not be trusted.
        let generation = self.next_generation(policy, before.generation)?;
        let after = PolicyState { generation, changes_len: 0, ..after };
        self.write(&file_name(policy), VERSION, &after)?;
        // Nothing reads it any more.
        let _ = self.disk.remove_file(&self.changes_of(policy, before.generation));
        Ok(after)
    }

    /// One that has no file of changes, should one have been restored from a backup since the state was read.
    fn next_generation(&self, policy: &PolicyName, mut generation: u64) -> Result<u64, StateError> {
        loop {
            generation = generation.checked_add(1).unwrap_or(1);
            let path = self.changes_of(policy, generation);
            match self.disk.metadata(&path) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(generation),
                Err(source) => return Err(StateError::File { verb: "look at", path, source }),
            }
        }
    }

    /// Adds a line to the file of changes, and returns its length then. It is an error if the file would be too long, or
    /// holds anything else than the state that is changed, such as a line that a full disk left unfinished.
    fn note_change(&self, policy: &PolicyName, before: &PolicyState, after: &PolicyState) -> io::Result<u64> {
        let path = self.changes_of(policy, before.generation);
        let mut line = serde_json::to_vec(&Change::between(before, after))?;
        line.push(b'\n');
        let found = match self.disk.metadata(&path) {
            Ok(found) => found.len,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        let len = found + line.len() as u64;
        let whole = self.disk.metadata(&self.path.join(file_name(policy)))?.len;
        if found != before.changes_len || len > whole.max(CHANGES_BYTES) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.disk.append(&path, &line, Access::Owner)?;
        Ok(len)
    }

    fn changes_of(&self, policy: &PolicyName, generation: u64) -> PathBuf {
        self.path.join(format!("policy-{policy}.{generation}.jsonl"))
    }

    /// The file of changes of the latest generation, whichever the state is of.
    fn newest_changes(&self, policy: &PolicyName) -> Result<Option<(u64, PathBuf)>, StateError> {
        let prefix = format!("policy-{policy}.");
        let generation =
            |name: &String| name.strip_prefix(&prefix)?.strip_suffix(".jsonl")?.parse::<u64>().ok();
        let newest = self.file_names()?.iter().filter_map(generation).max();
        Ok(newest.map(|newest| (newest, self.changes_of(policy, newest))))
    }

    /// [`StateDirectory::policy_state`], for work that is on the blocking pool already.
    fn read_policy(&self, policy: &PolicyName) -> Result<PolicyState, StateError> {
        let name = file_name(policy);
        loop {
            let mut state: PolicyState = self.read(&name, VERSION)?;
            if let Some((generation, newer)) =
                self.newest_changes(policy)?.filter(|(newest, _)| *newest > state.generation)
            {
                // Changes are written after the whole that they belong to.
                let path = self.path.join(&name);
                let is_written = || file::read_part::<GenerationAlone>(&*self.disk, &path, VERSION);
                if is_written()?.generation < generation {
                    return Err(StateError::Outdated { path, newer });
                }
                continue;
            }
            if state.generation == 0 {
                return Ok(state);
            }
            let path = self.changes_of(policy, state.generation);
            match read_file(&*self.disk, &path, CHANGES_BYTES_MAX) {
                Ok(changes) => {
                    state.changes_len = apply(&changes, &mut state)
                        .map_err(|(line, error)| StateError::damaged(&path, line, &error))?;
                    return Ok(state);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(StateError::File { verb: "read", path, source }),
            }
            // There is none yet, or another process wrote the whole anew in between.
            let path = self.path.join(&name);
            if file::read_part::<GenerationAlone>(&*self.disk, &path, VERSION)?.generation == state.generation
            {
                return Ok(state);
            }
        }
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
        self.blocking(|state| {
            // Also one of which the changes alone are left: reading it is an error.
            let policy_of = |name: &String| {
                let (policy, end) = name.strip_prefix("policy-")?.split_once('.')?;
                matches!(end.rsplit('.').next(), Some("json" | "jsonl")).then(|| policy.parse().ok())?
            };
            let policies: BTreeSet<PolicyName> = state.file_names()?.iter().filter_map(policy_of).collect();
            policies.into_iter().map(|policy| Ok((policy.clone(), state.read_policy(&policy)?))).collect()
        })
        .await
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

/// Applies the changes and returns their length without an unfinished line, which was never saved. The error has the
/// number of the line that is wrong, from 1.
fn apply(changes: &[u8], state: &mut PolicyState) -> Result<u64, (usize, serde_json::Error)> {
    let mut len = 0;
    let lines = changes.split_inclusive(|byte| *byte == b'\n').take_while(|line| line.ends_with(b"\n"));
    for (number, line) in (1..).zip(lines) {
        let change = serde_json::from_slice::<Change>(line).map_err(|error| (number, error))?;
        if !change.apply(state) {
            return Err((number, serde::de::Error::custom("it changes what is not there")));
        }
        len += line.len() as u64;
    }
    Ok(len)
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
    use crate::sim::disk::{DiskCall, MemoryDisk};

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
                requested_at_there: None,
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
                taken_for: Some(Timestamp::UNIX_EPOCH),
            }],
            missing: vec![MissingSnapshot {
                zone: "ch-gva-2".parse().unwrap(),
                instance_id: None,
                slot: Timestamp::UNIX_EPOCH,
                cause: "403".to_owned(),
            }],
            ..PolicyState::default()
        };
        let saved = save(folder.path(), PolicyState::default(), remembered.clone()).await;
        assert_eq!(
            (&saved.created, &saved.promotions, &saved.missing),
            (&remembered.created, &remembered.promotions, &remembered.missing)
        );
        assert_eq!(state(folder.path()).policy_state(&nightly()).await.unwrap(), saved);
        let created = state(folder.path()).created_snapshots().await.unwrap();
        assert_eq!(created, HashSet::from([SnapshotId(Uuid::from_u128(1))]));
    }

    async fn save(folder: &Path, mut own: PolicyState, after: PolicyState) -> PolicyState {
        state(folder).set_policy_state(&nightly(), &mut own, after).await.unwrap();
        own
    }

    async fn read(folder: &Path) -> PolicyState {
        state(folder).policy_state(&nightly()).await.unwrap()
    }

    fn creation(number: u128, snapshot_id: Option<u128>) -> Creation {
        Creation {
            zone: "ch-gva-2".parse().unwrap(),
            instance_id: InstanceId(Uuid::from_u128(number)),
            slot: Timestamp::UNIX_EPOCH,
            requested_at: Timestamp::UNIX_EPOCH,
            snapshot_id: snapshot_id.map(|id| SnapshotId(Uuid::from_u128(id))),
            is_in_doubt: false,
            listed_before: Vec::new(),
            owner: Owner::ThisPolicy,
            taken_for: None,
        }
    }

    #[test]
    fn of_two_records_for_a_slot_the_one_of_that_request_served_it_or_else_the_last() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let made = |second| Creation { requested_at: at(second), ..creation(2, Some(1)) };
        let created = [made(1), made(2)];
        for (asked, place) in [(1, 0), (2, 1), (3, 1)] {
            let owner = Owner::ServedBy("hourly".parse().unwrap());
            let taken_for = Some(Timestamp::UNIX_EPOCH);
            let served = Creation { requested_at: at(asked), owner, taken_for, ..creation(2, None) };
            assert_eq!(served.served_from(&created), Some(&created[place]), "{asked}");
        }
    }

    /// The bytes of all files of the policy.
    fn bytes(folder: &Path) -> u64 {
        let entries = RealDisk.list(folder).unwrap().into_iter();
        let names =
            entries.filter(|entry| entry.name.to_str().is_some_and(|name| name.starts_with("policy-")));
        names.map(|entry| RealDisk.metadata(&folder.join(entry.name)).unwrap().len).sum()
    }

    #[tokio::test]
    async fn a_step_writes_what_it_changes_however_much_is_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let created = (0..1_000).map(|number| creation(number, Some(number))).collect();
        let state = PolicyState { created, ..PolicyState::default() };
        let mut state = save(folder.path(), PolicyState::default(), state).await;
        let whole = bytes(folder.path());
        for number in 1_000..1_050 {
            let mut asked = state.clone();
            asked.created.push(creation(number, None));
            state = save(folder.path(), state, asked).await;
            let mut done = state.clone();
            done.created.last_mut().unwrap().snapshot_id = Some(SnapshotId(Uuid::from_u128(number)));
            state = save(folder.path(), state, done).await;
        }
        // In the middle, at both ends, and none.
        let mut fewer = state.clone();
        fewer.created.retain(|made| ![0, 77, 1_049].contains(&made.instance_id.0.as_u128()));
        fewer.missing.clear();
        state = save(folder.path(), state, fewer).await;
        state = save(folder.path(), state.clone(), state).await;
        assert_eq!(read(folder.path()).await, state);
        assert_eq!(state.created.len(), 1_047);
        let written = bytes(folder.path()) - whole;
        assert!(written < 64 << 10, "{written} for 50 snapshots, beside {whole}");
    }

    #[tokio::test]
    async fn the_whole_is_written_anew_when_changes_outgrow_it_or_can_not_be_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let mut state = PolicyState::default();
        for number in 0..500 {
            let mut more = state.clone();
            more.created = vec![creation(number, None)];
            state = save(folder.path(), state, more).await;
        }
        assert!(state.generation > 1, "{}", state.generation);
        assert!(bytes(folder.path()) < 2 * CHANGES_BYTES, "{}", bytes(folder.path()));
        assert_eq!(read(folder.path()).await, state);

        // An unfinished line, and one of a process that was told that it failed.
        for behind in ["{\"created\":{\"at\"", "{\"created\":[{\"at\":0,\"removed\":1,\"added\":[]}]}\n"] {
            let path = folder.path().join(format!("policy-nightly.{}.jsonl", state.generation));
            RealDisk.append(&path, behind.as_bytes(), Access::Owner).unwrap();
            let mut more = state.clone();
            more.created.push(creation(1, None));
            let saved = save(folder.path(), state.clone(), more).await;
            assert_eq!((saved.generation, read(folder.path()).await), (state.generation + 1, saved.clone()));
            state = saved;
            let mut more = state.clone();
            more.created.push(creation(2, None));
            state = save(folder.path(), state, more).await;
            assert_eq!(read(folder.path()).await, state);
        }
    }

    proptest::proptest! {
        #[test]
        fn the_splices_between_two_lists_make_the_second_of_the_first(
            before in proptest::collection::vec(0_u8..6, 0..12),
            after in proptest::collection::vec(0_u8..6, 0..12),
        ) {
            let mut list = before.clone();
            proptest::prop_assert!(splice(&mut list, splices(&before, &after)));
            proptest::prop_assert_eq!(list, after);
        }
    }

    #[tokio::test]
    async fn damaged_changes_are_an_error_that_names_their_file() {
        let folder = tempfile::tempdir().unwrap();
        let state = save(folder.path(), PolicyState::default(), PolicyState::default()).await;
        let mut more = state.clone();
        more.created.push(creation(1, None));
        save(folder.path(), state, more).await;
        let path = folder.path().join("policy-nightly.1.jsonl");
        for damaged in ["\n", "{\n", "{\"created\":[{\"at\":1,\"removed\":1,\"added\":[]}]}\n"] {
            let whole = disk::read_file(&RealDisk, &path, 1 << 20).unwrap();
            RealDisk.append(&path, damaged.as_bytes(), Access::Owner).unwrap();
            let error = self::state(folder.path()).policy_state(&nightly()).await.unwrap_err();
            assert!(matches!(error, StateError::Damaged { line: 2, .. }), "{damaged:?}: {error}");
            assert!(error.to_string().contains("policy-nightly.1.jsonl"), "{error}");
            disk::replace_file(&RealDisk, &path, &whole, Access::Owner).unwrap();
        }
    }

    /// Adds a creation to what was saved last.
    async fn add(directory: &StateDirectory, own: &mut PolicyState, number: u128) -> Result<(), StateError> {
        let mut more = own.clone();
        more.created.push(creation(number, None));
        directory.set_policy_state(&nightly(), own, more).await
    }

    #[tokio::test]
    async fn no_change_is_noted_beside_a_file_that_was_replaced_after_all() {
        let disk = MemoryDisk::default();
        let directory = StateDirectory::open(Arc::new(disk.clone()), Path::new("/state")).unwrap();
        let mut own = PolicyState::default();
        add(&directory, &mut own, 1).await.unwrap();
        add(&directory, &mut own, 2).await.unwrap();
        // The line is not written, and then the file is replaced, but that is not safe.
        disk.fail(DiskCall::Write, 1, io::ErrorKind::StorageFull);
        disk.fail(DiskCall::SyncDir, 1, io::ErrorKind::Other);
        add(&directory, &mut own, 3).await.unwrap_err();
        add(&directory, &mut own, 4).await.unwrap();
        assert_eq!(directory.policy_state(&nightly()).await.unwrap(), own);
    }

    #[tokio::test]
    async fn a_file_that_was_lost_or_restored_from_before_its_changes_is_an_error_that_names_both() {
        let folder = tempfile::tempdir().unwrap();
        let (directory, path) = (state(folder.path()), folder.path().join("policy-nightly.json"));
        let changes = |generation: u64| folder.path().join(format!("policy-nightly.{generation}.jsonl"));
        let mut own = PolicyState::default();
        add(&directory, &mut own, 1).await.unwrap();
        let early = disk::read_file(&RealDisk, &path, 1 << 20).unwrap();
        add(&directory, &mut own, 2).await.unwrap();
        // As if there had been many changes.
        RealDisk.rename(&changes(1), &changes(2)).unwrap();
        let outdated = async |files: &str| {
            for error in [
                directory.policy_state(&nightly()).await.unwrap_err(),
                directory.created_snapshots().await.unwrap_err(),
            ] {
                let text = error.to_string();
                assert!(matches!(error, StateError::Outdated { .. }), "{files}: {error}");
                for part in ["policy-nightly.json is missing, or older than", "restore the newest", "move /"]
                {
                    assert!(text.contains(part), "{part}: {text}");
                }
                assert_eq!(text.matches("policy-nightly.2.jsonl").count(), 2, "{text}");
            }
        };
        for files in [early, b"{\"version\":1,\"promotions\":[]}".to_vec()] {
            disk::replace_file(&RealDisk, &path, &files, Access::Owner).unwrap();
            outdated(&String::from_utf8_lossy(&files)).await;
        }
        RealDisk.remove_file(&path).unwrap();
        outdated("none").await;
        // It is moved away, as the error says.
        RealDisk.rename(&changes(2), &folder.path().join("away")).unwrap();
        let mut own = read(folder.path()).await;
        for number in 3..5 {
            add(&directory, &mut own, number).await.unwrap();
            assert_eq!(read(folder.path()).await, own);
        }
    }

    #[tokio::test]
    async fn changes_that_a_crash_left_beside_a_later_file_are_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let (directory, mut own) = (state(folder.path()), PolicyState::default());
        add(&directory, &mut own, 1).await.unwrap();
        add(&directory, &mut own, 2).await.unwrap();
        let changes = folder.path().join("policy-nightly.1.jsonl");
        let left = disk::read_file(&RealDisk, &changes, 1 << 20).unwrap();
        // Of another process, which writes the whole anew.
        own.changes_len = UNKNOWN;
        add(&directory, &mut own, 3).await.unwrap();
        disk::replace_file(&RealDisk, &changes, &left, Access::Owner).unwrap();
        for number in 4..7 {
            assert_eq!(read(folder.path()).await, own);
            assert_eq!(directory.created_snapshots().await.unwrap().len(), 0);
            add(&directory, &mut own, number).await.unwrap();
        }
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
        disk::replace_file(&RealDisk, &path, b"{\"version\":3,\"moons\":[]}", Access::Owner).unwrap();
        let error = state(folder.path()).policy_state(&nightly()).await.unwrap_err();
        assert!(matches!(error, StateError::FromTheFuture { found: 3, .. }), "{error}");
    }
}
