//! The change guard: deletions that only a change brought about wait until the change has settled.
//!
//! The plan is made several times over the same listing: as things are, and as they were before the changes that have not
//! settled. What not all of them delete is kept as pending.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use jiff::Timestamp;

use crate::policy::Policy;
use crate::policy::name::PolicyName;
use crate::retention::change::{Change, Seen, describe, settles_at};
use crate::retention::combine::{combine, rules_for};
use crate::retention::expiry::first_second_from;
use crate::retention::inventory::Inventory;
use crate::retention::memory::{Memory, is_overfull};
use crate::retention::plan::{Decision, PolicyPlan};
use crate::retention::reason::{ChangeText, Reason};
use crate::retention::sources::keep_where_missing;
use crate::retention::verdict::{Rule, Verdict};
use crate::snapshot::{InstanceId, SnapshotId};

/// Marks what the plan of a policy deletes only because of changes that have not settled. Returns those changes.
///
/// # Errors
/// Why the memory cannot be read.
pub fn keep_pending(
    plan: &mut PolicyPlan,
    policies: &[Policy],
    inventory: &Inventory,
    memory: &Memory,
) -> Result<Vec<Seen>, String> {
    let Some(policy) = policies.iter().find(|policy| policy.name == plan.policy) else {
        return Ok(Vec::new());
    };
    let unsettled = memory.unsettled(policies, inventory, plan.at, policy.guard.settle);
    if unsettled.is_empty() || plan.deletes == 0 {
        return Ok(unsettled);
    }
    let mut waiting = Waiting::new();
    if is_overfull(&unsettled, inventory) {
        let mut causes = Causes::new(&unsettled, inventory, &plan.policy, policy.guard.settle);
        let text = causes.all();
        waiting.extend(deletions(plan).map(|(place, _)| (place, text.clone())));
    } else {
        for state in memory.former_states(&unsettled) {
            let (policies, before) = memory.take_back(&state, policies, inventory)?;
            let without = plan_of(&plan.policy, &policies, &before, plan.at);
            let mut causes = Causes::new(&state.back, inventory, &plan.policy, policy.guard.settle);
            kept_without(plan, without.as_ref(), inventory, &mut causes, &mut waiting);
        }
    }
    for (place, change) in waiting {
        let Some(decision) = plan.decisions.get_mut(place) else { continue };
        let Some(snapshot) = inventory.snapshots.get(decision.index as usize) else { continue };
        plan.deletes -= 1;
        plan.good_deletes -= u64::from(inventory.was_good(snapshot));
        plan.pending += 1;
        decision.expires_at = change.settles_at;
        decision.keep(Rule::Change, Reason::Change(change));
    }
    Ok(unsettled)
}

/// Why deletions wait, by their places in the plan.
type Waiting = BTreeMap<usize, Arc<ChangeText>>;

fn deletions(plan: &PolicyPlan) -> impl Iterator<Item = (usize, &Decision)> {
    let decisions = plan.decisions.iter().enumerate();
    decisions.filter(|(_, decision)| decision.verdict == Verdict::Delete)
}

/// The plan of one policy; none if it is none of these, or if it is not known what it selected.
fn plan_of(
    name: &PolicyName,
    policies: &[Policy],
    inventory: &Inventory,
    at: Timestamp,
) -> Option<PolicyPlan> {
    // Which instance `self` was is not known: any may be one that the policy did not select.
    if policies.iter().any(|policy| policy.name == *name && policy.select.is_in_doubt()) {
        return None;
    }
    let plans = combine(&mut rules_for(policies, inventory, at), inventory, at, false).policies;
    let mut plan = plans.into_iter().find(|plan| plan.policy == *name)?;
    keep_where_missing(&mut plan, policies, inventory);
    Some(plan)
}

/// Adds what the plan deletes, and the one `without` changes does not; of several causes the one that lasts longest.
fn kept_without(
    plan: &PolicyPlan,
    without: Option<&PolicyPlan>,
    inventory: &Inventory,
    causes: &mut Causes<'_>,
    waiting: &mut Waiting,
) {
    let decisions = without.into_iter().flat_map(|plan| &plan.decisions);
    let without: HashMap<u32, &Decision> = decisions.map(|decision| (decision.index, decision)).collect();
    for (place, decision) in deletions(plan) {
        let without = without.get(&decision.index).copied();
        if without.is_some_and(|without| without.verdict == Verdict::Delete) {
            continue;
        }
        let Some(snapshot) = inventory.snapshots.get(decision.index as usize) else { continue };
        let cause = causes.of(snapshot.instance_id, without);
        let end = |cause: &ChangeText| cause.settles_at.unwrap_or(Timestamp::MAX);
        match waiting.get(&place) {
            Some(known) if end(known) >= end(&cause) => {}
            _ => drop(waiting.insert(place, cause)),
        }
    }
}

/// Keeps what the plan deletes of instances that lost all the snapshots that they had.
pub fn keep_emptied(plan: &mut PolicyPlan, inventory: &Inventory, emptied: &[InstanceId]) {
    for decision in plan.decisions.iter_mut().filter(|decision| decision.verdict == Verdict::Delete) {
        let Some(snapshot) = inventory.snapshots.get(decision.index as usize) else { continue };
        if snapshot.instance_id.is_some_and(|id| emptied.contains(&id)) {
            plan.deletes -= 1;
            plan.good_deletes -= u64::from(inventory.was_good(snapshot));
            decision.keep(Rule::Guard, Reason::Emptied);
        }
    }
}

/// Which of the changes concern a decision.
struct Causes<'a> {
    unsettled: &'a [Seen],
    settle: std::time::Duration,
    own: &'a PolicyName,
    of_policies: HashMap<&'a PolicyName, Vec<usize>>,
    of_instances: HashMap<InstanceId, Vec<usize>>,
    texts: HashMap<BTreeSet<usize>, Arc<ChangeText>>,
}

impl<'a> Causes<'a> {
    fn new(
        unsettled: &'a [Seen],
        inventory: &Inventory,
        own: &'a PolicyName,
        settle: std::time::Duration,
    ) -> Self {
        let instance_of: HashMap<SnapshotId, Option<InstanceId>> =
            inventory.snapshots.iter().map(|snapshot| (snapshot.id, snapshot.instance_id)).collect();
        let mut of_policies: HashMap<&PolicyName, Vec<usize>> = HashMap::new();
        let mut of_instances: HashMap<InstanceId, Vec<usize>> = HashMap::new();
        for (number, Seen { change, .. }) in unsettled.iter().enumerate() {
            let instance = match change {
                Change::Key { policy, .. } | Change::PolicyGone(policy) => {
                    of_policies.entry(policy).or_default().push(number);
                    None
                }
                Change::Renamed { id, .. }
                | Change::Managed { id, .. }
                | Change::Label { id, .. }
                | Change::Vanished { id, .. } => Some(*id),
                Change::Failed(id) => instance_of.get(id).copied().flatten(),
            };
            if let Some(id) = instance {
                of_instances.entry(id).or_default().push(number);
            }
        }
        Self { unsettled, settle, own, of_policies, of_instances, texts: HashMap::new() }
    }

    /// The changes of the policies that would keep the snapshot without them, and those of its instance; all of them if
    /// there are none such.
    fn of(&mut self, instance: Option<InstanceId>, without: Option<&Decision>) -> Arc<ChangeText> {
        let mut keeping: Vec<&PolicyName> = vec![self.own];
        for reason in without.iter().flat_map(|decision| decision.own_reasons()) {
            if let Reason::OtherPolicy(name, _) | Reason::PausedPolicy(name, _) = reason {
                keeping.push(name);
            }
            if let Reason::Source(missing) = reason {
                keeping.extend(&missing.policies);
            }
        }
        let of_policies = keeping.iter().filter_map(|name| self.of_policies.get(*name)).flatten();
        let of_instance = instance.and_then(|id| self.of_instances.get(&id)).into_iter().flatten();
        let numbers: BTreeSet<usize> = of_policies.chain(of_instance).copied().collect();
        if numbers.is_empty() { self.all() } else { self.text(numbers) }
    }

    fn all(&mut self) -> Arc<ChangeText> {
        self.text((0..self.unsettled.len()).collect())
    }

    fn text(&mut self, numbers: BTreeSet<usize>) -> Arc<ChangeText> {
        let (unsettled, settle) = (self.unsettled, self.settle);
        let text = |numbers: &BTreeSet<usize>| {
            let seen = || numbers.iter().filter_map(|number| unsettled.get(*number));
            let ends: Option<Vec<Timestamp>> = seen().map(|seen| settles_at(seen.since, settle)).collect();
            ChangeText {
                text: describe(seen().map(|seen| &seen.change)),
                settles_at: ends.and_then(|ends| ends.into_iter().max()).map(whole_second),
            }
        };
        self.texts.entry(numbers).or_insert_with_key(|numbers| Arc::new(text(numbers))).clone()
    }
}

/// The first whole second from then on: fractions are of no use to people.
fn whole_second(at: Timestamp) -> Timestamp {
    Timestamp::from_second(first_second_from(at)).unwrap_or(Timestamp::MAX)
}
