//! The order in which snapshots are decided: by instance, and newest first within one.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};

use crate::retention::inventory::Inventory;
use crate::snapshot::{Instance, InstanceId, SnapshotState};

/// A snapshot may be dated this far in the future and still be judged, as if created now: clocks differ a little.
const FUTURE_TOLERANCE: SignedDuration = SignedDuration::from_mins(5);

/// The latest date of a snapshot that is judged at `now`.
pub(crate) fn latest_counted(now: Timestamp) -> Timestamp {
    now.checked_add(FUTURE_TOLERANCE).unwrap_or(Timestamp::MAX)
}

/// The first instant at which a snapshot with this date is judged.
pub(crate) fn counted_from(created_at: Timestamp) -> Timestamp {
    created_at.checked_sub(FUTURE_TOLERANCE).unwrap_or(Timestamp::MIN)
}

/// The snapshots of one instance, or those of which the API names none.
#[derive(Debug)]
pub(crate) struct Group<'a> {
    pub(crate) instance_id: Option<InstanceId>,
    /// The instance, if it is still listed.
    pub(crate) instance: Option<&'a Instance>,
    /// Newest first, by (`created_at`, id).
    pub(crate) entries: Vec<Entry>,
}

/// A snapshot's place in the inventory's list, and what every decision begins with: the list is long and unordered, so
/// that looking there for each costs more than all rules.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) created_at: Timestamp,
    pub(crate) index: u32,
    pub(crate) is_good: bool,
    pub(crate) is_failed: bool,
    /// Good, or failed and good before: then it counts for the guard and the export gate, and for no keep rule.
    pub(crate) was_good: bool,
}

/// All snapshots of the inventory: the listed instances by name and id, then the orphans.
///
/// The list is read once: it is far larger than the groups.
pub(crate) fn group_by_instance(inventory: &Inventory) -> Vec<Group<'_>> {
    let snapshots = &inventory.snapshots;
    let listed: HashMap<InstanceId, &Instance> =
        inventory.instances.iter().map(|instance| (instance.id, instance)).collect();
    let mut groups: Vec<Group<'_>> = Vec::new();
    // By the number that an id is, which is hashed faster than its bytes.
    let mut places: HashMap<u128, usize> = HashMap::new();
    let mut without_instance = None;
    for (index, snapshot) in (0..).zip(snapshots) {
        // The id is read in place: a copy of it would make each snapshot wait for the memory of the one before.
        let mut new_group = || {
            let instance = snapshot.instance_id.as_ref().and_then(|id| listed.get(id).copied());
            groups.push(Group { instance_id: snapshot.instance_id, instance, entries: Vec::new() });
            groups.len() - 1
        };
        let place = match &snapshot.instance_id {
            Some(InstanceId(id)) => *places.entry(id.as_u128()).or_insert_with(new_group),
            None => *without_instance.get_or_insert_with(&mut new_group),
        };
        if let Some(group) = groups.get_mut(place) {
            let is_good = snapshot.state.is_good();
            let is_failed = snapshot.state == SnapshotState::Error;
            let failed = inventory.failed.get(&snapshot.id).filter(|_| is_failed);
            let was_good = is_good || failed.is_some_and(|failed| failed.was_good);
            let created_at = snapshot.created_at;
            group.entries.push(Entry { created_at, index, is_good, is_failed, was_good });
        }
    }

    let id_of = |entry: &Entry| snapshots.get(entry.index as usize).map(|snapshot| snapshot.id);
    for group in &mut groups {
        group
            .entries
            .sort_unstable_by(|a, b| b.created_at.cmp(&a.created_at).then_with(|| id_of(b).cmp(&id_of(a))));
    }
    groups.sort_unstable_by_key(|group| {
        let name = group.instance.map(|instance| &*instance.name);
        (name.is_none(), name, group.instance_id.is_none(), group.instance_id)
    });
    groups
}
