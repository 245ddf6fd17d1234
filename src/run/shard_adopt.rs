//! Makes a state directory that of another part of the instances.
//!
//! What it remembers of instances that belong to other shards from now on is left out of what the next run is compared with:
//! else they would seem to have vanished. Their new shards know nothing of it, so what moves is named.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use crate::clock::Clock;
use crate::policy::shard::Shard;
use crate::snapshot::{InstanceId, SnapshotId};
use crate::state::archives::Archives;
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;
use crate::state::holds::Hold;

/// What became of the instances of a state directory.
#[derive(Debug, Clone, Serialize)]
pub struct Adopted {
    /// For which part it was made; none for all instances.
    pub was: Option<Shard>,
    /// For which part it is from now on.
    pub is: Option<Shard>,
    /// How many instances it knew.
    pub known: usize,
    /// Those of them that belong to other shards now.
    pub moved: Vec<MovedInstance>,
    /// The holds on snapshots of these, and those on snapshots of which it does not know the instance.
    pub holds: Vec<MovedHold>,
}

/// An instance that belongs to another shard now.
#[derive(Debug, Clone, Serialize)]
pub struct MovedInstance {
    /// Which.
    pub instance_id: InstanceId,
    /// Its name when it was last listed; hostile text.
    pub instance_name: String,
    /// To which one it belongs.
    pub shard: Shard,
}

/// A hold that protects nothing here any more.
#[derive(Debug, Clone, Serialize)]
pub struct MovedHold {
    /// The hold.
    pub hold: Hold,
    /// Where it is needed; none if that is not known.
    pub shard: Option<Shard>,
}

/// Makes the directory that of another part, while no daemon and no run works on it.
///
/// # Errors
/// [`StateError`], also if something works on it.
pub async fn adopt(
    state: &mut StateDirectory,
    clock: &dyn Clock,
    is: Option<Shard>,
) -> Result<Adopted, StateError> {
    let was = state.shard();
    let _daemon = state.lock_daemon(clock).await?;
    let mut locks = Vec::new();
    for (policy, _) in state.all_last_runs().await? {
        locks.push(state.lock_policy(&policy, clock).await?);
    }
    let mut names: BTreeMap<InstanceId, String> = BTreeMap::new();
    let mut instance_of: HashMap<SnapshotId, InstanceId> = HashMap::new();
    let all = state.all_last_runs().await?;
    for zone in all.iter().flat_map(|(_, runs)| runs.zones.values()) {
        names.extend(zone.instances.iter().map(|instance| (instance.id, instance.name.clone())));
        for (id, places) in zone.accepted.iter().flat_map(|accepted| &accepted.of_instances) {
            names.entry(*id).or_insert_with(|| id.to_string());
            let snapshots = zone.accepted.iter().flat_map(|accepted| {
                places.iter().filter_map(|place| accepted.snapshots.get(*place as usize))
            });
            instance_of.extend(snapshots.map(|snapshot| (*snapshot, *id)));
        }
    }
    let known = names.len();
    let new_shard = |id: InstanceId| is.filter(|shard| !shard.has(id)).map(|shard| shard.of(id));
    let moved = names.into_iter().filter_map(|(instance_id, instance_name)| {
        Some(MovedInstance { instance_id, instance_name, shard: new_shard(instance_id)? })
    });
    let moved: Vec<MovedInstance> = moved.collect();
    let now = clock.now();
    let holds = state.holds().await?.holds.into_iter().filter(|hold| hold.counts_at(now));
    let holds = holds.filter_map(|hold| match instance_of.get(&hold.snapshot) {
        Some(id) => Some(MovedHold { shard: Some(new_shard(*id)?), hold }),
        None => is.map(|_| MovedHold { shard: None, hold }),
    });
    let adopted = Adopted { was, is, known, moved, holds: holds.collect() };
    if let Some(shard) = is {
        for (policy, mut runs) in all {
            runs.zones.values_mut().for_each(|zone| zone.retain_shard(shard));
            state.set_last_runs(&policy, runs).await?;
        }
        let change = move |all: &mut Archives| all.retain_shard(shard);
        state.change_archives(clock, change).await?;
    }
    // Last, so that a crash before this is made up for by the same command.
    state.set_shard(is).await?;
    Ok(adopted)
}
