//! Has each snapshot that a run is about to delete judged again by the second judge, from the same facts.
//!
//! Where it disagrees about any of them, nothing of the zone is deleted, and the case is written to the state directory:
//! one of the two has a fault, and it is not known yet which.

use std::collections::{BTreeMap, HashSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::judge;
use crate::judge::facts::{
    CopyFacts, Facts, FailedFacts, HoldFacts, Holdings, InstanceFacts, MissingFacts, Owner, Situation,
    SnapshotFacts,
};
use crate::policy::Policy;
use crate::policy::name::PolicyName;
use crate::retention;
use crate::retention::deciding_keys::{deciding_keys, policy_of_keys};
use crate::retention::inventory::{ArchivedCopy, Copies, Failed, Hold, Inventory, Missing, Ownership};
use crate::retention::memory::{Memory, is_overfull};
use crate::retention::sources::keep_where_missing;
use crate::retention::verdict::{Rule, Verdict};
use crate::run::context::Runner;
use crate::run::guard::GuardedPlan;
use crate::run::plan::ZonePlan;
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId};
use crate::text::{chain, counted, printable};

/// The most snapshots whose case is written into a file: one is enough to find the fault.
const VICTIMS_IN_FILE: usize = 100;

/// A case about which the judges disagree, as it is written to a file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Disagreement {
    /// The version of the program that wrote it.
    pub program: String,
    /// What the plan deleted, and the second judge would not.
    pub victims: Vec<Victim>,
    /// What both judged from.
    pub facts: Facts,
}

/// A snapshot about which the judges disagree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Victim {
    /// Its id.
    pub snapshot: SnapshotId,
    /// The key by which the plan deleted it.
    pub rule: String,
    /// The plan's reasons.
    pub reasons: Vec<String>,
    /// What the second judge said.
    pub second_judge: String,
}

/// A plan, and what else a second judgement of it needs to know.
#[derive(Debug, Clone, Copy)]
pub struct Judged<'a> {
    /// Every policy of the configuration.
    pub policies: &'a [Policy],
    /// Whose plan it is.
    pub policy: &'a Policy,
    /// What the plan is about.
    pub inventory: &'a Inventory,
    /// What the policy's last run rested on.
    pub memory: &'a Memory,
    /// The moment of the plan.
    pub at: Timestamp,
    /// The instances that lost all their snapshots.
    pub emptied: &'a [InstanceId],
    /// Whether an operator let pass what waits for changes or for newer snapshots.
    pub changes_are_allowed: bool,
}

impl Runner {
    /// Why nothing of the zone may be deleted, if the second judge objects to deleting anything that the plan does.
    pub(crate) async fn judge_again(&self, policy: &Policy, guarded: &GuardedPlan) -> Option<String> {
        let plan = &guarded.plan;
        let victims = victims(plan);
        if victims.is_empty() {
            return None;
        }
        let ids: Vec<SnapshotId> = victims.keys().copied().collect();
        let emptied = guarded.emptied.as_ref().map_or(&[][..], |(instances, _)| instances);
        let judged = Judged {
            policies: &self.policies,
            policy,
            inventory: &plan.listing.inventory,
            memory: &plan.listing.memory,
            at: plan.plan.at,
            emptied,
            changes_are_allowed: plan.accepts_changes,
        };
        let objections = match judged.facts(&ids) {
            Ok(facts) => judge::objections(&facts, &ids),
            Err(why) => return Some(format!("nothing is deleted, since it cannot be judged again: {why}")),
        };
        let mut against: Vec<Victim> = objections
            .into_iter()
            .filter_map(|objection| {
                let victim = victims.get(&objection.snapshot)?.clone();
                Some(Victim { second_judge: objection.says, ..victim })
            })
            .collect();
        against.sort_by_key(|victim| victim.snapshot);
        let first = against.first()?.clone();
        let count = against.len();
        against.truncate(VICTIMS_IN_FILE);
        let named: Vec<SnapshotId> = against.iter().map(|victim| victim.snapshot).collect();
        let file = match judged.facts(&named) {
            Ok(facts) => {
                let program = env!("CARGO_PKG_VERSION").to_owned();
                let case = Disagreement { program, victims: against, facts };
                let saved = self.state.save_disagreement(&policy.name, plan.zone(), case).await;
                saved.map_err(|error| chain(&error))
            }
            Err(why) => Err(why),
        };
        let snapshots = plan.listing.inventory.snapshots.iter();
        let name = snapshots.clone().find(|one| one.id == first.snapshot).map(|one| printable(&one.name));
        let others =
            if count > 1 { format!(" (and {})", counted(count - 1, "other")) } else { String::new() };
        let look = match file {
            Ok(path) => format!(
                "the case is in {0}; look: snapwarden plan --facts {0}; report it with that file",
                path.display()
            ),
            Err(why) => format!("the case could not be written to a file: {why}"),
        };
        Some(format!(
            "judges disagree: the plan deletes snapshot {} ({}){others} by {}, the second judge says: {}; one of them has a \
             fault, so nothing of zone {} is deleted in this run; {look}",
            name.unwrap_or_default(),
            first.snapshot,
            first.rule,
            first.second_judge,
            plan.zone(),
        ))
    }
}

/// What the plan deletes.
fn victims(plan: &ZonePlan) -> BTreeMap<SnapshotId, Victim> {
    let deleted = plan.decided().filter(|(decision, _)| decision.verdict == Verdict::Delete);
    let victims = deleted.map(|(decision, snapshot)| {
        let victim = Victim {
            snapshot: snapshot.id,
            rule: decision.rule.as_str().to_owned(),
            reasons: decision.reasons().map(|reason| reason.to_string()).collect(),
            second_judge: String::new(),
        };
        (snapshot.id, victim)
    });
    victims.collect()
}

impl Judged<'_> {
    /// The facts about the instances of these snapshots.
    ///
    /// # Errors
    /// Why the changes that have not settled are not known.
    pub fn facts(&self, victims: &[SnapshotId]) -> Result<Facts, String> {
        let Self { policies, policy, inventory, memory, at, .. } = *self;
        let victims: HashSet<SnapshotId> = victims.iter().copied().collect();
        let of_victims = inventory.snapshots.iter().filter(|one| victims.contains(&one.id));
        let whose: HashSet<Option<InstanceId>> = of_victims.map(|one| one.instance_id).collect();
        let snapshots = inventory.snapshots.iter().filter(|one| whose.contains(&one.instance_id));
        let instances = inventory.instances.iter().filter(|one| whose.contains(&Some(one.id)));
        // Of these alone, since each change is taken back from a copy.
        let small = Inventory {
            paused: inventory.paused.clone(),
            ..Inventory::on_paper(
                inventory.zone.clone(),
                snapshots.cloned().collect(),
                instances.cloned().collect(),
            )
        };
        let ids: HashSet<SnapshotId> = small.snapshots.iter().map(|one| one.id).collect();
        let is_about =
            |copy: &&ArchivedCopy| ids.contains(&copy.snapshot_id) || whose.contains(&Some(copy.instance_id));
        let holdings = |copies: &Copies| match copies {
            Copies::Unreachable(_) => Holdings::Unreachable,
            Copies::Assumed => Holdings::Assumed,
            Copies::Known(copies) => {
                Holdings::Known(copies.iter().filter(is_about).map(copy_facts).collect())
            }
        };
        let unsettled = memory.unsettled(policies, inventory, at, policy.guard.settle);
        let has_too_many_changes = is_overfull(&unsettled, inventory);
        let mut before = Vec::new();
        if !has_too_many_changes && !self.changes_are_allowed {
            for state in memory.former_states(&unsettled) {
                let (policies, then) = memory.take_back(&state, policies, &small)?;
                let mut situation = situation(&policies, &then);
                situation.instances.retain(|instance| whose.contains(&Some(instance.id)));
                let is_good_again = |(then, now): &(&Snapshot, &Snapshot)| then.state != now.state;
                let good = then.snapshots.iter().zip(&small.snapshots).filter(is_good_again);
                situation.good = good.map(|(then, _)| then.id).collect();
                before.push(situation);
            }
        }
        Ok(Facts {
            policy: policy.name.clone(),
            zone: inventory.zone.clone(),
            now: at,
            this_machine: policies.iter().find_map(|policy| policy.select.this_machine.id),
            present: situation(policies, &small),
            before,
            has_too_many_changes,
            changes_are_allowed: self.changes_are_allowed,
            snapshots: small.snapshots.iter().map(|one| snapshot_facts(one, inventory)).collect(),
            archives: inventory
                .archives
                .iter()
                .map(|(name, copies)| (name.clone(), holdings(copies)))
                .collect(),
            unadopted: inventory.unadopted.clone(),
            missing: inventory.missing.iter().map(missing_facts).collect(),
            emptied: self.emptied.iter().copied().collect(),
        })
    }
}

fn situation(policies: &[Policy], inventory: &Inventory) -> Situation {
    let here = policies.iter().filter(|policy| policy.zones.contains(&inventory.zone));
    let instances = inventory.instances.iter().map(|instance| InstanceFacts {
        id: instance.id,
        name: instance.name.to_string(),
        labels: instance.labels.clone(),
        is_managed: instance.is_managed,
    });
    Situation {
        policies: here.map(|policy| (policy.name.clone(), deciding_keys(policy))).collect(),
        paused: inventory.paused.clone(),
        instances: instances.collect(),
        good: [].into(),
    }
}

fn snapshot_facts(snapshot: &Snapshot, inventory: &Inventory) -> SnapshotFacts {
    let id = snapshot.id;
    let owner = |of: &Ownership| Owner { maker: of.maker.clone(), served: of.served.clone() };
    let failed = |of: &Failed| FailedFacts { since: of.since, was_good: of.was_good };
    SnapshotFacts {
        id,
        name: snapshot.name.to_string(),
        created_at: snapshot.created_at,
        state: snapshot.state.as_str().to_owned(),
        instance_id: snapshot.instance_id,
        is_consistent: snapshot.application_consistent == Some(true),
        owner: inventory.created.get(&id).map(owner),
        hold: inventory.holds.get(&id).map(|hold| HoldFacts { until: hold.until }),
        failed: inventory.failed.get(&id).map(failed),
    }
}

fn copy_facts(copy: &ArchivedCopy) -> CopyFacts {
    let ArchivedCopy { snapshot_id, instance_id, created_at, exported_at } = *copy;
    CopyFacts { snapshot_id, instance_id, created_at, exported_at }
}

fn missing_facts(missing: &Missing) -> MissingFacts {
    let Missing { policy, instance, slot, cause: _ } = missing;
    MissingFacts { policy: policy.clone(), instance: *instance, slot: *slot }
}

/// What the plan of this version says of each snapshot of a case; nothing of one that the policy does not select.
///
/// # Errors
/// Why the facts cannot be read.
pub fn plan_again(facts: &Facts) -> Result<BTreeMap<SnapshotId, (Verdict, Rule)>, String> {
    let mut plan = plan_in(facts, &facts.present)?;
    let mut keep = |is_meant: &dyn Fn(&SnapshotId) -> bool, rule: Rule| {
        for (id, decision) in &mut plan {
            if decision.0 == Verdict::Delete && is_meant(id) {
                *decision = (Verdict::Keep, rule);
            }
        }
    };
    if !facts.changes_are_allowed {
        keep(&|_| facts.has_too_many_changes, Rule::Change);
        for situation in &facts.before {
            let before = plan_in(facts, situation)?;
            let is_deleted = |id: &SnapshotId| before.get(id).is_some_and(|one| one.0 == Verdict::Delete);
            keep(&|id| !is_deleted(id), Rule::Change);
        }
    }
    let emptied = facts.snapshots.iter();
    let emptied = emptied.filter(|one| one.instance_id.is_some_and(|id| facts.emptied.contains(&id)));
    let emptied: HashSet<SnapshotId> = emptied.map(|one| one.id).collect();
    keep(&|id| emptied.contains(id), Rule::Guard);
    Ok(plan)
}

fn plan_in(facts: &Facts, situation: &Situation) -> Result<BTreeMap<SnapshotId, (Verdict, Rule)>, String> {
    let (policies, inventory) = (policies_in(facts, situation)?, inventory_in(facts, situation));
    let plans = retention::decide(&policies, &inventory, facts.now).policies.into_iter();
    let Some(mut plan) = plans.into_iter().find(|plan| plan.policy == facts.policy) else {
        return Ok(BTreeMap::new());
    };
    if !facts.changes_are_allowed {
        keep_where_missing(&mut plan, &policies, &inventory);
    }
    let decisions = plan.decisions.iter().filter_map(|decision| {
        let snapshot = inventory.snapshots.get(decision.index as usize)?;
        Some((snapshot.id, (decision.verdict, decision.rule)))
    });
    Ok(decisions.collect())
}

fn policies_in(facts: &Facts, situation: &Situation) -> Result<Vec<Policy>, String> {
    let policy = |(name, keys): (&PolicyName, &_)| {
        let mut policy = policy_of_keys(name.clone(), keys)
            .map_err(|key| format!("the key `{key}` of policy {name} can't be read"))?;
        policy.zones.push(facts.zone.clone());
        if let Some(this_machine) = facts.this_machine {
            policy.select.resolve(this_machine);
        }
        Ok(policy)
    };
    situation.policies.iter().map(policy).collect()
}

fn inventory_in(facts: &Facts, situation: &Situation) -> Inventory {
    let snapshot = |one: &SnapshotFacts| Snapshot {
        id: one.id,
        name: one.name.as_str().into(),
        created_at: one.created_at,
        state: if situation.good.contains(&one.id) { "exported" } else { one.state.as_str() }.into(),
        size_gib: None,
        instance_id: one.instance_id,
        application_consistent: Some(one.is_consistent),
    };
    let instances = situation.instances.iter().map(|one| Instance {
        id: one.id,
        name: one.name.as_str().into(),
        labels: one.labels.clone(),
        template_id: None,
        is_managed: one.is_managed,
        created_at: None,
    });
    let mut inventory = Inventory::on_paper(
        facts.zone.clone(),
        facts.snapshots.iter().map(snapshot).collect(),
        instances.collect(),
    );
    for one in &facts.snapshots {
        let owner = |of: &Owner| Ownership { maker: of.maker.clone(), served: of.served.clone() };
        inventory.created.extend(one.owner.as_ref().map(|of| (one.id, owner(of))));
        let hold = |of: &HoldFacts| Hold { until: of.until, reason: None };
        inventory.holds.extend(one.hold.as_ref().map(|of| (one.id, hold(of))));
        let failed = |of: &FailedFacts| Failed { since: of.since, was_good: of.was_good };
        inventory.failed.extend(one.failed.as_ref().map(|of| (one.id, failed(of))));
    }
    let copy = |copy: &CopyFacts| {
        let CopyFacts { snapshot_id, instance_id, created_at, exported_at } = *copy;
        ArchivedCopy { snapshot_id, instance_id, created_at, exported_at }
    };
    let copies = |holdings: &Holdings| match holdings {
        Holdings::Unreachable => Copies::Unreachable(String::new()),
        Holdings::Assumed => Copies::Assumed,
        Holdings::Known(copies) => Copies::Known(copies.iter().map(copy).collect()),
    };
    inventory.archives = facts.archives.iter().map(|(name, held)| (name.clone(), copies(held))).collect();
    inventory.unadopted.clone_from(&facts.unadopted);
    inventory.paused.clone_from(&situation.paused);
    let missing = facts.missing.iter().map(|one| Missing {
        policy: one.policy.clone(),
        instance: one.instance,
        slot: one.slot,
        cause: String::new(),
    });
    inventory.missing = missing.collect();
    inventory
}

#[cfg(test)]
pub(crate) mod tests;
