//! Counts what each instance has of which the policy speaks: for metrics and status.

use std::collections::HashMap;

use crate::policy::Policy;
use crate::retention::verdict::Rule;
use crate::run::{Planned, create};
use crate::snapshot::{InstanceId, SnapshotState};
use crate::state::last_runs::InstanceCounts;

/// What each instance has of the snapshots that stand in the plan, in the plan's order; behind them the instances
/// that should have some, since the policy takes them, and have none. Snapshots without an instance are counted
/// nowhere.
pub fn count(policy: &Policy, planned: &Planned) -> Vec<InstanceCounts> {
    let inventory = &planned.listed.inventory;
    let mut tallies: Vec<InstanceCounts> = Vec::new();
    let mut places: HashMap<InstanceId, usize> = HashMap::new();
    for decision in &planned.plan.decisions {
        let Some(snapshot) = inventory.snapshots.get(decision.index as usize) else { continue };
        let Some(id) = snapshot.instance_id else { continue };
        let place = *places.entry(id).or_insert_with(|| {
            let name = planned.listed.instance_of(snapshot).map(|instance| instance.name.to_string());
            tallies.push(InstanceCounts::of(id, name));
            tallies.len() - 1
        });
        let Some(tally) = tallies.get_mut(place) else { continue };
        if decision.rule == Rule::Future {
            // As the newest of all it would hide that nothing comes any more.
            tally.other += 1;
        } else if snapshot.state.is_good() {
            tally.good += 1;
            let at = snapshot.created_at;
            tally.newest_at = tally.newest_at.max(Some(at));
            tally.oldest_at = Some(tally.oldest_at.map_or(at, |oldest| oldest.min(at)));
        } else if snapshot.state.is_in_flight() {
            tally.in_flight += 1;
        } else if snapshot.state == SnapshotState::Error {
            tally.failed += 1;
        } else {
            tally.other += 1;
        }
    }
    for instance in create::selected(policy, inventory).filter(|_| policy.create) {
        places.entry(instance.id).or_insert_with(|| {
            tallies.push(InstanceCounts::of(instance.id, Some(instance.name.to_string())));
            tallies.len() - 1
        });
    }
    for archive in policy.export.iter().flat_map(|export| &export.archives) {
        let Some(Ok(catalogue)) = planned.listed.catalogues.get(archive) else { continue };
        for copy in catalogue.copies() {
            let manifest = &copy.manifest;
            // One that the archive's retention removed restores nothing.
            if manifest.zone != inventory.zone || manifest.pruned_at.is_some() {
                continue;
            }
            let place = places.get(&manifest.instance.id);
            let Some(tally) = place.and_then(|place| tallies.get_mut(*place)) else { continue };
            let at = manifest.snapshot.created_at;
            let newest = tally.newest_verified_at.entry(archive.clone()).or_insert(at);
            *newest = at.max(*newest);
        }
    }
    tallies
}
