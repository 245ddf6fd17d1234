//! The order in which everything is judged: by instance, and newest first within one; and from when on.

use std::cmp::Reverse;
use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};

use crate::retention::inventory::Inventory;
use crate::snapshot::{Instance, InstanceId, Snapshot};

/// So far in the future a snapshot may be dated and still be judged, as if taken now: clocks differ a little.
const FUTURE_TOLERANCE: SignedDuration = SignedDuration::from_mins(5);

/// From when on a snapshot that was taken then is judged.
pub(crate) fn counted_from(taken: Timestamp) -> Timestamp {
    taken.checked_sub(FUTURE_TOLERANCE).unwrap_or(Timestamp::MIN)
}

/// The snapshots of one instance, or of none that is known.
#[derive(Debug)]
pub(crate) struct Group<'a> {
    /// Which instance; the API may name none.
    pub(crate) instance_id: Option<InstanceId>,
    /// The instance, if it is still listed.
    pub(crate) instance: Option<&'a Instance>,
    /// Newest first, by (time taken, id).
    pub(crate) entries: Vec<Entry<'a>>,
}

/// A snapshot and its place in the inventory's list.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub(crate) index: u32,
    pub(crate) snapshot: &'a Snapshot,
}

/// All snapshots of the inventory: the listed instances by name and id, then the orphans.
pub(crate) fn groups(inventory: &Inventory) -> Vec<Group<'_>> {
    let listed: HashMap<InstanceId, &Instance> =
        inventory.instances.iter().map(|instance| (instance.id, instance)).collect();
    let mut entries: HashMap<Option<InstanceId>, Vec<Entry<'_>>> = HashMap::new();
    for (index, snapshot) in (0..).zip(&inventory.snapshots) {
        entries.entry(snapshot.instance_id).or_default().push(Entry { index, snapshot });
    }
    let mut groups: Vec<Group<'_>> = entries
        .into_iter()
        .map(|(instance_id, mut entries)| {
            entries.sort_unstable_by_key(|entry| Reverse((entry.snapshot.created_at, entry.snapshot.id)));
            let instance = instance_id.and_then(|id| listed.get(&id).copied());
            Group { instance_id, instance, entries }
        })
        .collect();
    groups.sort_unstable_by_key(|group| {
        let name = group.instance.map(|instance| &*instance.name);
        (name.is_none(), name, group.instance_id.is_none(), group.instance_id)
    });
    groups
}
