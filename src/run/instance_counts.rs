//! Counts the snapshots and copies of each instance, for metrics and status.

use std::collections::{HashMap, HashSet};

use jiff::{SignedDuration, Timestamp};

use crate::policy::Policy;
use crate::policy::select::Exemption;
use crate::retention::verdict::Rule;
use crate::run::plan::ZonePlan;
use crate::snapshot::{InstanceId, SnapshotId, SnapshotState};
use crate::state::last_runs::InstanceCounts;

/// How long an instance that vanished is remembered: a week, so that it is seen after a holiday, too.
const VANISHED_FOR: SignedDuration = SignedDuration::from_hours(7 * 24);

/// Whether an instance vanished within the last week.
pub(crate) fn is_remembered(instance: &InstanceCounts, now: Timestamp) -> bool {
    instance.vanished_at.is_some_and(|at| now.duration_since(at) <= VANISHED_FOR)
}

/// Counts the snapshots of each instance in the plan, in the plan's order; then follow the selected instances without any,
/// and those of the last run, `before`, that vanished. Neither snapshots without an instance are counted nor those that were
/// `deleted` since.
pub(crate) fn count(
    policy: &Policy,
    exempt: &Exemption,
    plan: &ZonePlan,
    deleted: &HashSet<SnapshotId>,
    before: &[InstanceCounts],
    now: Timestamp,
) -> Vec<InstanceCounts> {
    let inventory = &plan.listing.inventory;
    let mut all: Vec<InstanceCounts> = Vec::new();
    // Indexes in `all`.
    let mut known: HashMap<InstanceId, usize> = HashMap::new();
    for (decision, snapshot) in plan.decided() {
        let Some(id) = snapshot.instance_id.filter(|_| !deleted.contains(&snapshot.id)) else { continue };
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
    for instance in inventory.selected_by(policy) {
        let index = *known.entry(instance.id).or_insert_with(|| {
            all.push(InstanceCounts::of(instance.id, Some(instance.name.to_string())));
            all.len() - 1
        });
        if let Some(counts) = all.get_mut(index) {
            counts.is_listed = true;
            counts.is_exempt = exempt.includes(instance);
            counts.created_at = instance.created_at;
        }
    }
    let listed: HashSet<InstanceId> = inventory.instances.iter().map(|instance| instance.id).collect();
    for earlier in before.iter().filter(|earlier| !earlier.is_exempt && !listed.contains(&earlier.id)) {
        if !earlier.is_listed && !is_remembered(earlier, now) {
            continue;
        }
        let index = *known.entry(earlier.id).or_insert_with(|| {
            all.push(InstanceCounts::of(earlier.id, None));
            all.len() - 1
        });
        if let Some(counts) = all.get_mut(index) {
            counts.name.clone_from(&earlier.name);
            counts.vanished_at = earlier.vanished_at.or(Some(now));
        }
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
        for (decision, snapshot) in plan.decided() {
            let is_counted =
                snapshot.state.is_good() && decision.rule != Rule::Future && !deleted.contains(&snapshot.id);
            let index = snapshot.instance_id.filter(|_| is_counted).and_then(|id| known.get(&id));
            let Some(counts) = index.and_then(|index| all.get_mut(*index)) else { continue };
            let at = snapshot.created_at;
            if counts.newest_verified_at.get(archive).is_none_or(|copy| at > *copy) {
                let oldest = counts.uncopied_since.entry(archive.clone()).or_insert(at);
                *oldest = at.min(*oldest);
            }
        }
    }
    all
}
