//! Decides for one policy what its rules say of a listing.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;

use crate::policy::name::ArchiveName;
use crate::policy::select::Pattern;
use crate::policy::{Policy, Which};
use crate::randomness::{Randomness, fresh_id};
use crate::retention;
use crate::retention::change::Seen;
use crate::retention::change_guard;
use crate::retention::grouping::counted_from;
use crate::retention::inventory::{ArchivedCopy, Copies, Inventory};
use crate::retention::memory::Memory;
use crate::retention::plan::{Decision, PolicyPlan};
use crate::retention::sources::{keep_where_missing, late_texts};
use crate::retention::verdict::{Rule, Verdict};
use crate::run::context::Runner;
use crate::run::list::{Listing, Memories, list_zones};
use crate::run::self_instance;
use crate::snapshot::{InstanceId, Snapshot, SnapshotId, SnapshotState, ZoneName};
use crate::state::audit::{Action, Subject};
use crate::text::{counted, printable};

/// A zone's listing, and what the policies decide about it.
#[derive(Debug)]
pub struct ZonePlan {
    /// The listing that the decisions are about.
    pub listing: Listing,
    /// The decisions, for one policy.
    pub plan: PolicyPlan,
    /// The changes that have not settled, of which some may keep what the plan would delete otherwise.
    pub(crate) unsettled: Vec<Seen>,
    /// Whether what waits for a change to settle or for a newer snapshot is deleted all the same, since an operator let it pass.
    pub(crate) accepts_changes: bool,
}

/// An export or a promotion that a run would do before deleting.
#[derive(Debug)]
pub struct PlannedAction {
    /// Either `Export` or `Promote`.
    pub action: Action,
    /// Where an export is stored.
    pub archive: Option<ArchiveName>,
    /// The snapshot that it is done to; without an id if the run would take the snapshot first.
    pub snapshot: Subject,
    /// A sentence for people.
    pub why: String,
}

impl ZonePlan {
    pub(crate) fn zone(&self) -> &ZoneName {
        &self.listing.inventory.zone
    }

    /// Leaves the decisions about these instances alone, after all was decided over the whole listing.
    pub(crate) fn limit_to(&mut self, only: Option<&Pattern<InstanceId>>) {
        let Self { listing, plan, .. } = self;
        plan.decisions.retain(|decision| {
            let snapshot = listing.inventory.snapshots.get(decision.index as usize);
            let instance = snapshot.and_then(|snapshot| snapshot.instance_id);
            only.is_none() || instance.is_some_and(|id| listing.is_one_of(only, id))
        });
    }

    /// Decides again as if these exports had been done, which the run does before it deletes.
    pub(crate) fn after_exports(
        &mut self,
        policies: &[Policy],
        policy: &Policy,
        exports: &[PlannedAction],
    ) -> Result<(), String> {
        let at = self.plan.at;
        for PlannedAction { archive, snapshot, .. } in exports {
            let copies =
                archive.as_ref().and_then(|archive| self.listing.inventory.archives.get_mut(archive));
            let ids = snapshot.id.zip(snapshot.instance_id);
            if let (Some(Copies::Known(copies)), Some((snapshot_id, instance_id))) = (copies, ids) {
                let created_at = snapshot.created_at;
                copies.push(ArchivedCopy { snapshot_id, instance_id, created_at, exported_at: Some(at) });
            }
        }
        (self.plan, self.unsettled) = judge(policies, policy, &self.listing, at)?;
        Ok(())
    }

    /// The places in the listing of those that no required copy keeps: they are deleted, or wait for something else.
    pub(crate) fn not_waiting_for_copies(&self) -> HashSet<u32> {
        let deleted = |decision: &&Decision| {
            decision.verdict == Verdict::Delete || matches!(decision.rule, Rule::Change | Rule::Source)
        };
        self.plan.decisions.iter().filter(deleted).map(|decision| decision.index).collect()
    }

    /// Accepts the changes that have not settled, and that snapshots are missing: what waits for them is deleted, too. Where only
    /// snapshots were missing, that alone is accepted: nobody was told of a change that would delete the same ones.
    pub(crate) fn accept_changes(&mut self, policies: &[Policy], policy: &Policy) -> Result<(), String> {
        let is_for_changes = self.plan.decisions.iter().any(|decision| decision.rule == Rule::Change);
        self.plan = plan_of(policies, policy, &self.listing.inventory, self.plan.at)?;
        self.accepts_changes = true;
        if is_for_changes {
            self.unsettled.clear();
            return Ok(());
        }
        let Listing { inventory, memory, .. } = &self.listing;
        let unsettled = change_guard::keep_pending(&mut self.plan, policies, inventory, memory);
        self.unsettled = unsettled.map_err(|why| format!("nothing is done here: {why}"))?;
        Ok(())
    }

    /// Which deletions wait for a change to settle or for a newer snapshot, and how to let them pass; `in_run` is their
    /// number in all zones.
    pub(crate) fn pending_text(&self, policy: &Policy, in_run: u64) -> Option<String> {
        let of = |rule: Rule| self.plan.decisions.iter().filter(move |decision| decision.rule == rule);
        let text = |rule: Rule, cause: &str, when: &str| {
            let count = of(rule).count();
            let are = if count == 1 { "is" } else { "are" };
            let why = of(rule).next()?.reasons().next()?;
            Some(format!("{} {are} kept only because {cause}{when}: {why}", counted(count, "snapshot")))
        };
        let until = of(Rule::Change).filter_map(|decision| decision.expires_at).min();
        let when = until.map_or_else(String::new, |until| format!(", the first not before {until}"));
        let changes = text(Rule::Change, "a change has not settled (`settle`)", &when);
        let sources = text(Rule::Source, "a newer snapshot of their instance is missing", "");
        let so = if sources.is_none() {
            "if the change is right, let it pass"
        } else {
            "to delete them all the same"
        };
        let texts: Vec<String> = changes.into_iter().chain(sources).collect();
        let name = &policy.name;
        (!texts.is_empty()).then(|| {
            format!(
                "{}; look: snapwarden plan {name}; {so}: snapwarden once {name} --allow-deletes {in_run}, or in the next scheduled run: snapwarden \
                 allow {name} {in_run}",
                texts.join("; ")
            )
        })
    }

    /// The memory for the policy's next run, if the listing `is_accepted`; else only when each change was first seen.
    pub(crate) fn memory(&self, policies: &[Policy], started_at: Timestamp, is_accepted: bool) -> Memory {
        let Self { listing: Listing { inventory, memory, .. }, plan, unsettled, .. } = self;
        if is_accepted {
            let from_start = |seen: &Seen| Seen { since: seen.since.min(started_at), ..seen.clone() };
            let unsettled = unsettled.iter().map(from_start).collect();
            Memory { at: Some(started_at), ..memory.renewed(policies, inventory, plan.at, unsettled) }
        } else {
            let changes = memory.differences(policies, inventory, started_at);
            Memory { at: Some(started_at), changes, ..Memory::clone(memory) }
        }
    }

    /// The memory after a run by a clock that is not known to be right: when each change was first seen, by `latest`, which is no
    /// earlier than it was. What it rests on stays that of the last run by a clock that was.
    pub(crate) fn memory_in_doubt(&self, policies: &[Policy], latest: Timestamp) -> Memory {
        let Listing { inventory, memory, .. } = &self.listing;
        Memory { changes: memory.differences(policies, inventory, latest), ..Memory::clone(memory) }
    }

    /// Every decision with its snapshot, in the plan's order.
    pub(crate) fn decided(&self) -> impl Iterator<Item = (&Decision, &Snapshot)> {
        let snapshots = &self.listing.inventory.snapshots;
        let decisions = self.plan.decisions.iter();
        decisions.filter_map(|decision| Some((decision, snapshots.get(decision.index as usize)?)))
    }

    /// The good snapshots that an export or a promotion is for, each with its instance: the newest of each instance, or
    /// all that are kept.
    pub(crate) fn wanted(&self, which: Which) -> Vec<(&Snapshot, InstanceId)> {
        let mut instances = HashSet::new();
        let good = self
            .decided()
            .filter(|(decision, snapshot)| decision.verdict != Verdict::Ignore && snapshot.state.is_good());
        good.filter_map(|(decision, snapshot)| Some((decision, snapshot, snapshot.instance_id?)))
            .filter(|(decision, _, instance_id)| match which {
                // The plan has the newest of an instance first.
                Which::Newest => instances.insert(*instance_id),
                Which::All => decision.verdict == Verdict::Keep,
            })
            .map(|(_, snapshot, instance_id)| (snapshot, instance_id))
            .collect()
    }
}

/// Lists zones afresh and decides as of then; the plans are in the order of the zones.
pub(crate) async fn plan_zones(
    runner: &Runner,
    policy: &Policy,
    memories: &Memories,
    zones: &[ZoneName],
) -> Vec<Result<ZonePlan, String>> {
    let listings = list_zones(runner, &policy.name, None, memories, zones).await;
    let now = runner.clock.now();
    listings.into_iter().map(|listing| decide(&runner.policies, policy, listing?, now)).collect()
}

/// Decides for one policy, heeding what all the others keep.
///
/// # Errors
/// Why there is no plan, as a sentence.
pub(crate) fn decide(
    policies: &[Policy],
    policy: &Policy,
    mut listing: Listing,
    at: Timestamp,
) -> Result<ZonePlan, String> {
    if let Some(paused) = policy.paused_text() {
        return Err(format!("nothing is done here: policy {} is {paused}", policy.name));
    }
    self_instance::check(policy)?;
    let here = policies.iter().filter(|other| other.zones.contains(&listing.inventory.zone));
    listing.warnings.extend(here.filter_map(self_instance::warning));
    listing.warnings.extend(late_texts(policy, &listing.inventory, at));
    let (plan, unsettled) = judge(policies, policy, &listing, at)?;
    Ok(ZonePlan { listing, plan, unsettled, accepts_changes: false })
}

/// The plan, in which whatever waits for a newer snapshot or for a change to settle is kept; and the changes that have
/// not settled.
fn judge(
    policies: &[Policy],
    policy: &Policy,
    listing: &Listing,
    at: Timestamp,
) -> Result<(PolicyPlan, Vec<Seen>), String> {
    let mut plan = plan_of(policies, policy, &listing.inventory, at)?;
    keep_where_missing(&mut plan, policies, &listing.inventory);
    let unsettled = change_guard::keep_pending(&mut plan, policies, &listing.inventory, &listing.memory);
    let unsettled = unsettled.map_err(|why| format!("nothing is done here: {why}"))?;
    #[cfg(test)]
    crate::run::second_judge::tests::plant(&mut plan, &listing.inventory);
    Ok((plan, unsettled))
}

fn plan_of(
    policies: &[Policy],
    policy: &Policy,
    inventory: &Inventory,
    at: Timestamp,
) -> Result<PolicyPlan, String> {
    let plan = retention::plan(policies, inventory, at).policies.into_iter();
    let mut plan = plan.filter(|plan| plan.policy == policy.name);
    plan.next().ok_or_else(|| "the policy is not enabled, or does not include this zone".to_owned())
}

/// The instances that need no snapshot for a slot, each with one that was taken since then, or is being taken.
pub(crate) fn served(
    snapshots: &[Snapshot],
    slot: Timestamp,
    now: Timestamp,
) -> HashMap<InstanceId, &Snapshot> {
    let snapshots = snapshots.iter().filter(|snapshot| snapshot.created_at >= slot);
    snapshots
        .filter(|snapshot| snapshot.state.is_good() || snapshot.state.is_in_flight())
        // One that is dated far ahead would stand in the way until then.
        .filter(|snapshot| counted_from(snapshot.created_at) <= now)
        .filter_map(|snapshot| Some((snapshot.instance_id?, snapshot)))
        .collect()
}

/// A warning for each selected instance of which no snapshot is taken since it has one that is dated ahead of now.
pub(crate) fn dated_ahead(
    policy: &Policy,
    inventory: &Inventory,
    slot: Timestamp,
    now: Timestamp,
) -> Vec<String> {
    let served = served(&inventory.snapshots, slot, now);
    let ahead = inventory.selected_by(policy).filter_map(|instance| {
        let snapshot = served.get(&instance.id).filter(|snapshot| snapshot.created_at > now)?;
        Some(format!(
            "instance {}: no snapshot is taken, since snapshot {} ({}) is dated {}, ahead of this machine's clock, and \
             counts as just taken",
            printable(&instance.name),
            printable(&snapshot.name),
            snapshot.id,
            snapshot.created_at
        ))
    });
    ahead.collect()
}

/// Adds the snapshots that a run of the policy would take first: good ones, with ids that nothing else has. Then none is
/// missing that this policy could not take before.
pub(crate) fn add_coming(policy: &Policy, listing: &mut Listing, at: Timestamp, randomness: &dyn Randomness) {
    if !policy.create {
        return;
    }
    listing.warnings.extend(dated_ahead(policy, &listing.inventory, at, at));
    let inventory = &mut listing.inventory;
    inventory.missing.retain(|missing| missing.policy != policy.name);
    let served = served(&inventory.snapshots, at, at);
    let coming: Vec<Snapshot> = inventory
        .selected_by(policy)
        .filter(|instance| !served.contains_key(&instance.id))
        .map(|instance| Snapshot {
            id: SnapshotId(fresh_id(randomness, at)),
            name: "".into(),
            created_at: at,
            state: SnapshotState::Exported,
            size_gib: None,
            instance_id: Some(instance.id),
            application_consistent: None,
        })
        .collect();
    inventory.coming.extend(coming.iter().map(|snapshot| snapshot.id));
    inventory.snapshots.extend(coming);
}
