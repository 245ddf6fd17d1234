//! Puts before the guard what it judges by beside the plans: what vanished from the listings, and what somebody
//! allowed. What trips it is `retention`'s to say. A policy without a retention table deletes nothing, so it has no
//! guard.

use std::collections::{BTreeMap, HashSet};

use tokio_util::sync::CancellationToken;

use crate::policy::Policy;
use crate::retention::guard::{self, FEW, ListingDrop, ZoneCase};
use crate::run::{Planned, Runner, ZonePlan};
use crate::snapshot::{Snapshot, SnapshotId, ZoneName};
use crate::state::allowances::Allowance;
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;
use crate::state::last_runs::{AcceptedListing, LastRuns};
use crate::text::chain;

/// How many deletions somebody let pass.
#[derive(Debug, Default)]
pub struct Allowed {
    run: Option<u64>,
    zones: BTreeMap<ZoneName, u64>,
}

impl Allowed {
    /// By allowances, and for this run by its caller. Each is for itself, so that never more pass than somebody
    /// had in mind: two are not added up.
    pub fn new(allowances: Vec<Allowance>, by_caller: Option<u64>) -> Self {
        let mut allowed = Self { run: by_caller, zones: BTreeMap::new() };
        for Allowance { zone, deletes, .. } in allowances {
            match zone {
                None => allowed.run = allowed.run.max(Some(deletes)),
                Some(zone) => {
                    allowed.zones.insert(zone, deletes);
                }
            }
        }
        allowed
    }
}

/// Judges as a run would that began now; the allowances stay. What can't be judged becomes an error of its zone.
pub async fn preview(runner: &Runner, policy: &Policy, zones: &mut [ZonePlan]) {
    if policy.retention.is_none() {
        return;
    }
    let read = async {
        let before = runner.state.last_runs(&policy.name).await?;
        Ok::<_, StateError>((before, runner.state.allowances(&policy.name).await?))
    };
    match read.await {
        Ok((before, allowances)) => {
            judge(&runner.state, policy, zones, &before, &Allowed::new(allowances, None)).await;
        }
        Err(error) => fail(zones, &error),
    }
}

/// Judges for a run, and takes the allowances for it. What can't be judged becomes an error of its zone.
pub async fn judge_run(
    runner: &Runner,
    policy: &Policy,
    zones: &mut [ZonePlan],
    before: &LastRuns,
    by_caller: Option<u64>,
    stop: &CancellationToken,
) {
    // Where nothing can be let pass, leave to pass is not used up.
    if policy.retention.is_none() || zones.iter().all(|(_, planned)| planned.is_err()) {
        return;
    }
    match runner.state.take_allowances(&policy.name, &*runner.clock, stop).await {
        Ok(taken) => {
            let allowed = Allowed::new(taken, by_caller);
            judge(&runner.state, policy, zones, before, &allowed).await;
        }
        Err(error) => fail(zones, &error),
    }
}

/// Judges listings that have no past, such as those from files.
pub fn judge_on_paper(policy: &Policy, zones: &mut [ZonePlan]) {
    if policy.retention.is_some() {
        hold(policy, zones, &[], &Allowed::default());
    }
}

async fn judge(
    state: &StateDirectory,
    policy: &Policy,
    zones: &mut [ZonePlan],
    before: &LastRuns,
    allowed: &Allowed,
) {
    let mut drops = Vec::new();
    for (zone, planned) in zones.iter_mut() {
        let accepted = before.zones.get(zone).and_then(|memory| memory.accepted.as_ref());
        let (Ok(found), Some(accepted)) = (&*planned, accepted) else {
            drops.push(ListingDrop::default());
            continue;
        };
        match drop_since(state, zone, accepted, &found.listed.inventory.snapshots).await {
            Ok(drop) => drops.push(drop),
            Err(failure) => {
                *planned = Err(failure);
                drops.push(ListingDrop::default());
            }
        }
    }
    hold(policy, zones, &drops, allowed);
}

/// What vanished from a zone since the accepted listing.
async fn drop_since(
    state: &StateDirectory,
    zone: &ZoneName,
    accepted: &AcceptedListing,
    listed: &[Snapshot],
) -> Result<ListingDrop, String> {
    let listed: HashSet<SnapshotId> = listed.iter().map(|snapshot| snapshot.id).collect();
    let mut missing: Vec<SnapshotId> =
        accepted.snapshots.iter().copied().filter(|id| !listed.contains(id)).collect();
    let mut ours = 0;
    // The log is long, and so few trip nothing.
    if missing.len() as u64 > FEW {
        let deleted =
            state.deleted_since(zone, accepted.audit_from).await.map_err(|error| undecided(&error))?;
        let all = missing.len();
        missing.retain(|id| !deleted.contains(id));
        ours = all - missing.len();
    }
    Ok(ListingDrop { dropped: missing.len() as u64, accepted: (accepted.snapshots.len() - ours) as u64 })
}

/// Writes into each plan whether the guard holds it back, and whether its listing is accepted. `drops` are in the
/// order of the zones; where there are none, nothing vanished.
fn hold(policy: &Policy, zones: &mut [ZonePlan], drops: &[ListingDrop], allowed: &Allowed) {
    let drops = drops.iter().copied().chain(std::iter::repeat(ListingDrop::default()));
    let mut planned: Vec<(ZoneCase, &mut Planned)> = zones
        .iter_mut()
        .zip(drops)
        .filter_map(|((zone, planned), drop)| {
            let planned = planned.as_mut().ok()?;
            let case = ZoneCase {
                zone: zone.clone(),
                deletes: planned.plan.deletes,
                good_deletes: planned.plan.good_deletes,
                good: planned.plan.good,
                drop,
                clock: planned.listed.inventory.clock,
                allowed: allowed.zones.get(zone).copied(),
            };
            Some((case, planned))
        })
        .collect();
    let cases: Vec<ZoneCase> = planned.iter().map(|(case, _)| case.clone()).collect();
    let held = guard::hold(&policy.name, &policy.guard, &cases, allowed.run);
    for ((case, planned), held) in planned.iter_mut().zip(held) {
        // Held for another reason, it may be one of these all the same.
        planned.is_accepted = held.is_none() || !case.drop.exceeds(&policy.guard);
        planned.held = held;
    }
}

fn fail(zones: &mut [ZonePlan], error: &(dyn std::error::Error + 'static)) {
    for (_, planned) in zones.iter_mut().filter(|(_, planned)| planned.is_ok()) {
        *planned = Err(undecided(error));
    }
}

fn undecided(error: &(dyn std::error::Error + 'static)) -> String {
    format!("nothing is deleted, since it can't be told what the guard says: {}", chain(error))
}
