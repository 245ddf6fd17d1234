//! Of each snapshot and copy, what keeps it after a run, and what the next run would delete: for the daemon's page.
//!
//! The daemon has it in memory alone, so it is bounded for each instance.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;

use crate::policy::Policy;
use crate::policy::name::ArchiveName;
use crate::retention::plan::Decision;
use crate::retention::verdict::{Rule, Verdict};
use crate::run::archive_retention::Judged;
use crate::run::context::Runner;
use crate::run::guard::GuardedPlan;
use crate::snapshot::{InstanceId, SnapshotId, ZoneName};
use crate::state::last_runs::InstanceCounts;

/// The most snapshots of an instance: all of an ordinary policy, with hours, days, weeks, months and years.
pub const SNAPSHOTS_MAX: usize = 100;

/// The most copies of an instance in one archive. They may be there for ever, so there may be many.
pub const COPIES_MAX: usize = 30;

/// The zone of a policy after a run.
#[derive(Debug, Clone)]
pub struct ZoneDetails {
    /// When it was listed.
    pub at: Timestamp,
    /// By instance, the newest first: at most [`SNAPSHOTS_MAX`] of each, beside those to delete.
    pub snapshots: Vec<SnapshotDetails>,
    /// By archive and instance, the newest first: at most [`COPIES_MAX`] of each, without those that were pruned.
    pub copies: Vec<CopyDetails>,
}

/// A snapshot after a run.
#[derive(Debug, Clone)]
pub struct SnapshotDetails {
    /// Its id.
    pub id: SnapshotId,
    /// Its instance.
    pub instance_id: InstanceId,
    /// When it was taken.
    pub created_at: Timestamp,
    /// What the policy says of it.
    pub decision: Decision,
    /// Why the next run deletes it, if nothing but that run changes anything.
    pub deleted_next: Option<Box<str>>,
}

/// A copy after a run.
#[derive(Debug, Clone)]
pub struct CopyDetails {
    /// Where it is.
    pub archive: ArchiveName,
    /// Of which snapshot.
    pub snapshot_id: SnapshotId,
    /// Of which instance.
    pub instance_id: InstanceId,
    /// When that snapshot was taken.
    pub created_at: Timestamp,
    /// When its bytes were last verified.
    pub verified_at: Timestamp,
    /// The length of its image.
    pub bytes: u64,
    /// What keeps it.
    pub kept: CopyKept,
}

/// What keeps a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyKept {
    /// Its archive has no retention.
    ForEver,
    /// That could not be judged.
    Unknown,
    /// This rule of the archive's retention, or one that deletes it at the next pruning; and when it would be deleted if
    /// nothing came and nothing changed.
    By(Rule, Verdict, Option<Timestamp>),
}

impl SnapshotDetails {
    /// Whether the policy would have it deleted already, and something blocked that.
    pub fn is_blocked(&self) -> bool {
        self.decision.verdict == Verdict::Delete
    }

    /// What keeps it, or why it is deleted.
    pub fn why(&self) -> String {
        self.decision.reasons().next().map_or_else(String::new, |reason| reason.to_string())
    }
}

impl Runner {
    /// What is left of the guarded plan, without the snapshots that were deleted, of these instances.
    pub(crate) async fn details(
        &self,
        policy: &Policy,
        guarded: &GuardedPlan,
        deleted: &HashSet<SnapshotId>,
        instances: &[InstanceCounts],
        at: Timestamp,
    ) -> ZoneDetails {
        let mut next = self.deleted_next(policy, guarded, deleted, at);
        let mut snapshots: Vec<SnapshotDetails> = Vec::new();
        let mut counts: HashMap<InstanceId, usize> = HashMap::new();
        for (decision, snapshot) in guarded.plan.decided() {
            let Some(instance_id) = snapshot.instance_id.filter(|_| !deleted.contains(&snapshot.id)) else {
                continue;
            };
            let deleted_next = next.remove(&snapshot.id);
            let count = counts.entry(instance_id).or_default();
            *count += 1;
            if *count > SNAPSHOTS_MAX && deleted_next.is_none() && decision.verdict != Verdict::Delete {
                continue;
            }
            let (id, created_at, decision) = (snapshot.id, snapshot.created_at, decision.clone());
            snapshots.push(SnapshotDetails { id, instance_id, created_at, decision, deleted_next });
        }
        let instances: HashSet<InstanceId> = instances.iter().map(|instance| instance.id).collect();
        let copies = self.copy_details(policy, guarded, &instances, at).await;
        ZoneDetails { at, snapshots, copies }
    }

    /// What the policy's next run would delete, and why. It is judged as of when that is due, after the snapshots and the
    /// copies that it makes first.
    fn deleted_next(
        &self,
        policy: &Policy,
        GuardedPlan { plan, is_accepted, .. }: &GuardedPlan,
        deleted: &HashSet<SnapshotId>,
        at: Timestamp,
    ) -> HashMap<SnapshotId, Box<str>> {
        if policy.retention.is_none() {
            return HashMap::new();
        }
        let schedule = policy.schedule.as_ref();
        let due = schedule.and_then(|schedule| schedule.next_after(at, &policy.time_zone)).unwrap_or(at);
        let mut listing = plan.listing.clone();
        listing.memory = plan.memory(&self.policies, at, *is_accepted).into();
        listing.inventory.snapshots.retain(|snapshot| !deleted.contains(&snapshot.id));
        let Ok((next, _)) = self.plan_with_exports(policy, Ok(listing), due) else { return HashMap::new() };
        let deletions = next.decided().filter(|(decision, _)| decision.verdict == Verdict::Delete);
        let why =
            |decision: &Decision| decision.reasons().next().map_or_else(String::new, |why| why.to_string());
        deletions.map(|(decision, snapshot)| (snapshot.id, why(decision).into())).collect()
    }

    async fn copy_details(
        &self,
        policy: &Policy,
        GuardedPlan { plan, .. }: &GuardedPlan,
        instances: &HashSet<InstanceId>,
        at: Timestamp,
    ) -> Vec<CopyDetails> {
        let Some(export) = &policy.export else { return Vec::new() };
        let (holds, remembered) = (self.state.holds().await, self.state.archives().await);
        let states = self.state.all_policy_states().await;
        let (Ok(holds), Ok(remembered), Ok(states)) = (holds, remembered, states) else { return Vec::new() };
        let mut all = Vec::new();
        for archive in &export.archives {
            let Some(Ok(catalogue)) = plan.listing.catalogues.get(archive) else { continue };
            let Some(rules) = self.archive_rules.get(archive) else { continue };
            let memory = remembered.archives.get(archive).cloned().unwrap_or_default();
            let judged = Judged {
                archive,
                rules,
                policies: &self.policies,
                states: &states,
                catalogue,
                holds: &holds,
                memory: &memory,
                allowances: &[],
                coming: &[],
            };
            let mut copies = copies_of(&judged, plan.zone(), instances, at);
            copies.sort_unstable_by_key(|copy| (copy.instance_id, std::cmp::Reverse(copy.created_at)));
            let mut counts: HashMap<InstanceId, usize> = HashMap::new();
            copies.retain(|copy| {
                let count = counts.entry(copy.instance_id).or_default();
                *count += 1;
                *count <= COPIES_MAX
            });
            all.append(&mut copies);
        }
        all
    }
}

fn copies_of(
    judged: &Judged<'_>,
    zone: &ZoneName,
    instances: &HashSet<InstanceId>,
    at: Timestamp,
) -> Vec<CopyDetails> {
    let kept = judged.kept(zone, at);
    let copies = judged.catalogue.unpruned().map(|copy| &copy.manifest);
    let ours = copies.filter(|manifest| manifest.zone == *zone && instances.contains(&manifest.instance.id));
    ours.map(|manifest| CopyDetails {
        archive: judged.archive.clone(),
        snapshot_id: manifest.snapshot.id,
        instance_id: manifest.instance.id,
        created_at: manifest.snapshot.created_at,
        verified_at: manifest.verified_at,
        bytes: manifest.image.bytes,
        kept: match &kept {
            None => CopyKept::ForEver,
            Some(kept) => kept.get(&manifest.snapshot.id).map_or(CopyKept::Unknown, |decision| {
                CopyKept::By(decision.rule, decision.verdict, decision.expires_at)
            }),
        },
    })
    .collect()
}
