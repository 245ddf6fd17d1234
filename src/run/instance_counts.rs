//! Counts the snapshots and copies of each instance, for metrics and status.

use std::collections::HashMap;

use crate::policy::Policy;
use crate::retention::verdict::Rule;
use crate::run::plan::{ZonePlan, selected};
use crate::snapshot::{InstanceId, SnapshotState};
use crate::state::last_runs::InstanceCounts;

/// Counts the snapshots of each instance in the plan, in the plan's order; then come the instances that should have a
/// snapshot, since the policy creates them, and have none. Snapshots without an instance are not counted.
pub(crate) fn count(policy: &Policy, plan: &ZonePlan) -> Vec<InstanceCounts> {
    let inventory = &plan.listing.inventory;
    let mut all: Vec<InstanceCounts> = Vec::new();
    // Indexes in `all`.
    let mut known: HashMap<InstanceId, usize> = HashMap::new();
    for (decision, snapshot) in plan.decided() {
        let Some(id) = snapshot.instance_id else { continue };
        let index = *known.entry(id).or_insert_with(|| {
            let name = plan.listing.instance_of(snapshot).map(|instance| instance.name.to_string());
            all.push(InstanceCounts::of(id, name));
            all.len() - 1
        });
        let Some(counts) = all.get_mut(index) else { continue };
        if decision.rule == Rule::Future {
            // As the newest of all it would hide that no new ones are taken.
            counts.other += 1;
        } else if snapshot.state.is_good() {
            counts.good += 1;
            let at = snapshot.created_at;
            counts.newest_at = counts.newest_at.max(Some(at));
            counts.oldest_at = Some(counts.oldest_at.map_or(at, |oldest| oldest.min(at)));
            if snapshot.application_consistent == Some(true) {
                counts.newest_consistent_at = counts.newest_consistent_at.max(Some(at));
            }
        } else if snapshot.state.is_in_flight() {
            counts.in_flight += 1;
        } else if snapshot.state == SnapshotState::Error {
            counts.failed += 1;
        } else {
            counts.other += 1;
        }
    }
    for instance in selected(policy, inventory).filter(|_| policy.create) {
        known.entry(instance.id).or_insert_with(|| {
            all.push(InstanceCounts::of(instance.id, Some(instance.name.to_string())));
            all.len() - 1
        });
    }
    for archive in policy.export.iter().flat_map(|export| &export.archives) {
        let Some(Ok(catalogue)) = plan.listing.catalogues.get(archive) else { continue };
        for copy in catalogue.copies() {
            let manifest = &copy.manifest;
            // One that the archive's retention removed restores nothing.
            if manifest.zone != inventory.zone || manifest.pruned_at.is_some() {
                continue;
            }
            let index = known.get(&manifest.instance.id);
            let Some(counts) = index.and_then(|index| all.get_mut(*index)) else { continue };
            let at = manifest.snapshot.created_at;
            let newest = counts.newest_verified_at.entry(archive.clone()).or_insert(at);
            *newest = at.max(*newest);
        }
    }
    all
}
