//! Failing sources: while a newer snapshot of an instance is missing, none of that instance is deleted.
//!
//! It is missing if a policy could not take it when it was last due, or if the newest good one is older than a policy
//! expects. Otherwise each night would delete one more, until the last is older than anyone wants to go back to.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use jiff::Timestamp;

use crate::policy::Policy;
use crate::policy::name::PolicyName;
use crate::retention::grouping::latest_counted;
use crate::retention::inventory::{Inventory, Missing};
use crate::retention::plan::PolicyPlan;
use crate::retention::reason::{MissingText, Reason};
use crate::retention::verdict::{Rule, Verdict};
use crate::snapshot::{Instance, InstanceId, Snapshot};
use crate::text::printable;

/// Keeps what the plan would delete of instances of which a newer snapshot is missing.
pub fn keep_where_missing(plan: &mut PolicyPlan, policies: &[Policy], inventory: &Inventory) {
    let missing = missing(policies, inventory, plan.at);
    if missing.is_empty() {
        return;
    }
    for decision in plan.decisions.iter_mut().filter(|decision| decision.verdict != Verdict::Ignore) {
        let Some(snapshot) = inventory.snapshots.get(decision.index as usize) else { continue };
        let Some(text) = snapshot.instance_id.and_then(|id| missing.get(&id)) else { continue };
        // If nothing changes, it stays missing.
        decision.expires_at = None;
        if decision.verdict == Verdict::Delete {
            plan.deletes -= 1;
            plan.good_deletes -= u64::from(inventory.was_good(snapshot));
            plan.pending += 1;
            decision.keep(Rule::Source, Reason::Source(text.clone()));
        }
    }
}

/// The instances of which a newer snapshot is missing, for any policy.
fn missing(
    policies: &[Policy],
    inventory: &Inventory,
    now: Timestamp,
) -> HashMap<InstanceId, Arc<MissingText>> {
    let here = policies.iter().filter(|policy| policy.enabled && policy.zones.contains(&inventory.zone));
    let mut texts: HashMap<InstanceId, MissingText> = HashMap::new();
    let mut add = |id: InstanceId, policy: &PolicyName, text: &str| {
        let known =
            texts.entry(id).or_insert_with(|| MissingText { policies: Vec::new(), text: String::new() });
        if !known.text.is_empty() {
            known.text.push_str("; ");
        }
        known.text.push_str(text);
        known.policies.push(policy.clone());
    };
    let newest =
        if inventory.missing.is_empty() { HashMap::new() } else { newest_good(inventory, now, |_| true) };
    for policy in here {
        for missing in
            inventory.missing.iter().filter(|missing| policy.create && missing.policy == policy.name)
        {
            let is_it = |instance: &&Instance| missing.instance.is_none_or(|id| id == instance.id);
            let since = |id| newest.get(&id).is_some_and(|newest| *newest >= missing.slot);
            for instance in inventory.selected_by(policy).filter(is_it).filter(|instance| !since(instance.id))
            {
                add(instance.id, &policy.name, &not_taken(missing));
            }
        }
        for (instance, text) in late(policy, inventory, now) {
            add(instance.id, &policy.name, &text);
        }
    }
    texts.into_iter().map(|(id, text)| (id, Arc::new(text))).collect()
}

/// A sentence for each instance whose newest good snapshot is older than the policy expects. Where there is none, there is
/// nothing that would be deleted.
pub fn late_texts(policy: &Policy, inventory: &Inventory, now: Timestamp) -> Vec<String> {
    let with_any: HashSet<InstanceId> =
        inventory.snapshots.iter().filter_map(|snapshot| snapshot.instance_id).collect();
    let late = late(policy, inventory, now).into_iter();
    let late = late.filter(|(instance, _)| with_any.contains(&instance.id));
    late.map(|(instance, text)| {
        format!("instance {}: {text}: nothing of it is deleted", printable(&instance.name))
    })
    .collect()
}

/// The instances whose newest good snapshot is older than the policy expects, each with a text.
fn late<'a>(policy: &'a Policy, inventory: &'a Inventory, now: Timestamp) -> Vec<(&'a Instance, String)> {
    let Some(span) = &policy.guard.expect_newest else { return Vec::new() };
    let newest = newest_good(inventory, now, |snapshot| policy.select.selects_snapshot(snapshot));
    let late = inventory.selected_by(policy).filter_map(|instance| {
        let expected = format!("policy {} expects one not older than {span} (expect_newest)", policy.name);
        let Some(newest) = newest.get(&instance.id) else {
            return Some((instance, format!("it has no good snapshot, and {expected}")));
        };
        let end = span.after(*newest, &policy.time_zone).unwrap_or(Timestamp::MAX);
        (now > end).then(|| (instance, format!("its newest good snapshot is of {newest}, and {expected}")))
    });
    late.collect()
}

/// When the newest good snapshot of each instance was taken, or would be by the run that a preview is about.
fn newest_good(
    inventory: &Inventory,
    now: Timestamp,
    is_meant: impl Fn(&Snapshot) -> bool,
) -> HashMap<InstanceId, Timestamp> {
    let latest = latest_counted(now);
    let mut newest: HashMap<InstanceId, Timestamp> = HashMap::new();
    for snapshot in &inventory.snapshots {
        let Some(id) = snapshot.instance_id else { continue };
        let is_counted = snapshot.state.is_good() && snapshot.created_at <= latest;
        if is_counted && is_meant(snapshot) {
            let at = newest.entry(id).or_insert(snapshot.created_at);
            *at = snapshot.created_at.max(*at);
        }
    }
    newest
}

fn not_taken(missing: &Missing) -> String {
    let Missing { policy, slot, cause, .. } = missing;
    format!("policy {policy} could not take its snapshot of {}: {cause}", slot.strftime("%Y-%m-%dT%H:%M:%SZ"))
}
