//! The order in which everything is judged: by instance, and newest first within one; and from when on.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};

use crate::retention::inventory::Inventory;
use crate::snapshot::{Instance, InstanceId, SnapshotState};

/// So far in the future a snapshot may be dated and still be judged, as if taken now: clocks differ a little.
const FUTURE_TOLERANCE: SignedDuration = SignedDuration::from_mins(5);

/// The latest time that a snapshot may bear to be judged at `now`.
pub(crate) fn latest_counted(now: Timestamp) -> Timestamp {
    now.checked_add(FUTURE_TOLERANCE).unwrap_or(Timestamp::MAX)
}

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
    pub(crate) entries: Vec<Entry>,
}

/// A snapshot's place in the inventory's list, and what every judgement of it begins with: the list is long, and its
/// order means nothing, so looking there for each costs more than the judging.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) taken: Timestamp,
    pub(crate) index: u32,
    /// Its state is good.
    pub(crate) is_good: bool,
    /// Its state says that it failed.
    pub(crate) is_failed: bool,
}

/// Between which instants the snapshots of an inventory were taken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    /// Of those that are not dated in the future, the first and the last.
    pub(crate) counted: Option<(Timestamp, Timestamp)>,
    /// Of all, the first and the last.
    pub(crate) all: (Timestamp, Timestamp),
}

/// All snapshots of the inventory: the listed instances by name and id, then the orphans; and when they were taken.
///
/// The list is read once: it is far larger than what is made of it.
pub(crate) fn groups(inventory: &Inventory, now: Timestamp) -> (Vec<Group<'_>>, Times) {
    let snapshots = &inventory.snapshots;
    let listed: HashMap<InstanceId, &Instance> =
        inventory.instances.iter().map(|instance| (instance.id, instance)).collect();
    let latest = latest_counted(now);
    let mut times = Times { counted: None, all: (Timestamp::MAX, Timestamp::MIN) };
    let mut groups: Vec<Group<'_>> = Vec::new();
    // By the number that an id is, which is hashed faster than its bytes.
    let mut places: HashMap<u128, usize> = HashMap::new();
    let mut nameless = None;
    for (index, snapshot) in (0..).zip(snapshots) {
        let (id, taken) = (snapshot.instance_id, snapshot.created_at);
        times.all = (times.all.0.min(taken), times.all.1.max(taken));
        if taken <= latest {
            let (first, last) = times.counted.unwrap_or((taken, taken));
            times.counted = Some((first.min(taken), last.max(taken)));
        }
        let place = match id {
            Some(InstanceId(id)) => places.entry(id.as_u128()).or_insert(usize::MAX),
            None => nameless.get_or_insert(usize::MAX),
        };
        if *place == usize::MAX {
            *place = groups.len();
            let instance = id.and_then(|id| listed.get(&id).copied());
            groups.push(Group { instance_id: id, instance, entries: Vec::new() });
        }
        if let Some(group) = groups.get_mut(*place) {
            group.entries.push(Entry {
                taken,
                index,
                is_good: snapshot.state.is_good(),
                is_failed: snapshot.state == SnapshotState::Error,
            });
        }
    }

    let id_of = |entry: &Entry| snapshots.get(entry.index as usize).map(|snapshot| snapshot.id);
    for group in &mut groups {
        group.entries.sort_unstable_by(|a, b| b.taken.cmp(&a.taken).then_with(|| id_of(b).cmp(&id_of(a))));
    }
    groups.sort_unstable_by_key(|group| {
        let name = group.instance.map(|instance| &*instance.name);
        (name.is_none(), name, group.instance_id.is_none(), group.instance_id)
    });
    (groups, times)
}
