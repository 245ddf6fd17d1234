//! What a policy remembers of its last accepted run in a zone, and the changes since then.
//!
//! A plan rests on more than time: on the keys of all policies, on the names and labels of instances, and on which
//! snapshots are good. A change in any of these can make deletions that the operator did not intend. So each change has
//! to settle: until then it is taken back for a second plan, and what only the first plan deletes is kept.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::{self, Display};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::policy::Policy;
use crate::policy::name::PolicyName;
use crate::retention::deciding_keys::{deciding_keys, policy_of_keys, set_deciding_keys};
use crate::retention::inventory::{Failed, Inventory};
use crate::snapshot::{Instance, InstanceId, SnapshotId, SnapshotState};
use crate::text::{counted, excerpt, printable};

/// The most characters that a reason repeats of a value.
const QUOTED_CHARACTERS: usize = 80;

/// The most changes that are named one by one.
const NAMED_CHANGES: usize = 3;

/// What the last accepted run of a policy in a zone rested on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// When the run began.
    #[serde(default)]
    pub at: Option<Timestamp>,
    /// The deciding keys of each policy of the zone.
    pub policies: BTreeMap<PolicyName, BTreeMap<String, Value>>,
    /// When each policy was first found disabled that still is.
    #[serde(default)]
    pub paused: BTreeMap<PolicyName, Timestamp>,
    /// The listed instances.
    pub instances: BTreeMap<InstanceId, InstanceFacts>,
    /// The listed snapshots that were good.
    pub good: BTreeSet<SnapshotId>,
    /// The listed snapshots that failed, with the time at which they were first found so.
    #[serde(default)]
    pub failed: BTreeMap<SnapshotId, Failed>,
    /// The listed snapshots that were application-consistent, where a policy has `min_keep_consistent`.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub consistent: BTreeSet<SnapshotId>,
    /// When each change was first seen that has not settled yet.
    #[serde(default)]
    pub changes: Vec<Seen>,
}

/// The facts of an instance on which selections depend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceFacts {
    /// Its name.
    pub name: String,
    /// Its value of each label that a policy selects by; none where it lacks the label.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, Option<String>>,
    /// Whether it belonged to an instance pool or a node pool, where a policy selects by that; none if that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_managed: Option<bool>,
}

/// A change, and when it was first seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// When the run began that first saw it.
    pub since: Timestamp,
    /// The last run before that of the policy that remembers it: then the change was not there yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before: Option<Timestamp>,
    /// The change.
    pub change: Change,
}

/// One difference between a memory and the present.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// A deciding key of a policy has another value.
    Key {
        /// The policy.
        policy: PolicyName,
        /// Its key.
        key: String,
        /// The remembered value; none if the key was not set.
        was: Option<Value>,
        /// The present value; none if the key is not set.
        is: Option<Value>,
    },
    /// A policy does not exist any more, or not in this zone.
    PolicyGone(PolicyName),
    /// An instance has another name.
    Renamed {
        /// The instance.
        id: InstanceId,
        /// Its remembered name.
        was: String,
        /// Its present name.
        is: String,
    },
    /// An instance has another value of a label, or lost or got the label.
    Label {
        /// The instance.
        id: InstanceId,
        /// Its present name.
        name: String,
        /// The label.
        label: String,
        /// The remembered value.
        was: Option<String>,
        /// The present value.
        is: Option<String>,
    },
    /// An instance became a member of an instance pool or a node pool, or is none any more.
    Managed {
        /// The instance.
        id: InstanceId,
        /// Its present name.
        name: String,
        /// Whether it is one now.
        is: bool,
    },
    /// An instance is not listed any more.
    Vanished {
        /// The instance.
        id: InstanceId,
        /// Its remembered name.
        name: String,
    },
    /// A good snapshot failed.
    Failed(SnapshotId),
}

impl Memory {
    /// Adds what is remembered of the snapshots that failed or were application-consistent, and of the policies that are
    /// paused. `at` is the time of what is found so for the first time.
    pub fn add_to(&self, inventory: &mut Inventory, policies: &[Policy], at: Timestamp) {
        for snapshot in inventory.snapshots.iter().filter(|snapshot| snapshot.state == SnapshotState::Error) {
            let id = snapshot.id;
            let failed = self.failed.get(&id).copied().unwrap_or_else(|| Failed {
                since: self.since(&Change::Failed(id), at),
                was_good: self.good.contains(&id),
            });
            inventory.failed.insert(id, failed);
        }
        // How a snapshot was taken does not change: an answer that says otherwise, or lacks it, deletes nothing.
        for snapshot in &mut inventory.snapshots {
            if self.consistent.contains(&snapshot.id) {
                snapshot.application_consistent = Some(true);
            }
        }
        let paused = policies.iter().filter(|policy| !policy.enabled);
        let found = |policy: &Policy| self.paused.get(&policy.name).copied().unwrap_or(at);
        inventory.paused = paused.map(|policy| (policy.name.clone(), found(policy))).collect();
    }

    /// Lets a change begin anew that a later memory, of another policy that ran in the meantime, shows to have been taken
    /// back then.
    pub fn forget_interrupted(&mut self, later: &Self) {
        self.changes.retain(|seen| {
            let was_there = match &seen.change {
                Change::Key { policy, key, was, .. } => {
                    later.policies.get(policy).is_some_and(|keys| keys.get(key) == was.as_ref())
                }
                Change::PolicyGone(policy) => later.policies.contains_key(policy),
                Change::Renamed { id, was, .. } => {
                    later.instances.get(id).is_some_and(|instance| instance.name == *was)
                }
                Change::Label { id, label, was, .. } => {
                    let labels = later.instances.get(id).map(|instance| &instance.labels);
                    labels.is_some_and(|labels| labels.get(label) == Some(was))
                }
                Change::Vanished { id, .. } => later.instances.contains_key(id),
                Change::Managed { id, is, .. } => {
                    later.instances.get(id).is_some_and(|instance| instance.is_managed == Some(!is))
                }
                Change::Failed(id) => later.good.contains(id),
            };
            match later.changes.iter().find(|other| other.change == seen.change) {
                Some(other) => other.not_before.is_none_or(|not_before| not_before < seen.since),
                None => !was_there,
            }
        });
    }

    /// Every difference to the present, with the time at which it was first seen: `at` if that is now.
    pub fn differences(&self, policies: &[Policy], inventory: &Inventory, at: Timestamp) -> Vec<Seen> {
        let mut changes = Vec::new();
        let present = keys_of_policies(policies, inventory);
        for (name, remembered) in &self.policies {
            match present.get(name) {
                None => changes.push(Change::PolicyGone(name.clone())),
                Some(present) => changes.extend(key_changes(name, remembered, present)),
            }
        }
        let listed: HashMap<InstanceId, &Instance> =
            inventory.instances.iter().map(|instance| (instance.id, instance)).collect();
        for (id, remembered) in &self.instances {
            match listed.get(id) {
                None => changes.push(Change::Vanished { id: *id, name: remembered.name.clone() }),
                Some(instance) => changes.extend(instance_changes(remembered, instance)),
            }
        }
        let failed = inventory.snapshots.iter().filter(|snapshot| snapshot.state == SnapshotState::Error);
        let failed = failed.filter(|snapshot| self.good.contains(&snapshot.id));
        changes.extend(failed.map(|snapshot| Change::Failed(snapshot.id)));
        let seen = |change: Change| match self.changes.iter().find(|seen| seen.change == change) {
            Some(seen) => Seen { since: seen.since.min(at), ..seen.clone() },
            None => Seen { since: at, not_before: self.at, change },
        };
        changes.into_iter().map(seen).collect()
    }

    /// The differences to the present that have not settled at `at`.
    pub fn unsettled(
        &self,
        policies: &[Policy],
        inventory: &Inventory,
        at: Timestamp,
        settle: Duration,
    ) -> Vec<Seen> {
        let mut seen = self.differences(policies, inventory, at);
        seen.retain(|seen| settles_at(seen.since, settle).is_none_or(|end| at < end));
        seen
    }

    /// The memory after a run that began at `at`: of the present, except for the changes that are `unsettled`.
    #[must_use]
    pub fn renewed(
        &self,
        policies: &[Policy],
        inventory: &Inventory,
        at: Timestamp,
        unsettled: Vec<Seen>,
    ) -> Self {
        let mut new = Self::of(policies, inventory, at);
        for (name, since) in &mut new.paused {
            *since = self.paused.get(name).copied().unwrap_or(*since);
        }
        for Seen { change, .. } in &unsettled {
            match change {
                Change::Key { policy, key, was, .. } => {
                    let keys = new.policies.entry(policy.clone()).or_default();
                    match was {
                        Some(was) => drop(keys.insert(key.clone(), was.clone())),
                        None => drop(keys.remove(key)),
                    }
                }
                Change::PolicyGone(name) => {
                    if let Some(keys) = self.policies.get(name) {
                        new.policies.insert(name.clone(), keys.clone());
                    }
                }
                Change::Renamed { id, was, .. } => {
                    if let Some(facts) = new.instances.get_mut(id) {
                        facts.name.clone_from(was);
                    }
                }
                Change::Label { id, label, was, .. } => {
                    if let Some(facts) = new.instances.get_mut(id) {
                        facts.labels.insert(label.clone(), was.clone());
                    }
                }
                Change::Managed { id, is, .. } => {
                    if let Some(facts) = new.instances.get_mut(id) {
                        facts.is_managed = Some(!is);
                    }
                }
                Change::Vanished { id, .. } => {
                    if let Some(facts) = self.instances.get(id) {
                        new.instances.insert(*id, facts.clone());
                    }
                }
                Change::Failed(id) => {
                    new.good.insert(*id);
                    new.failed.remove(id);
                }
            }
        }
        new.at = Some(at);
        new.changes = unsettled;
        new
    }

    /// A memory of the present.
    fn of(policies: &[Policy], inventory: &Inventory, at: Timestamp) -> Self {
        let policies_here = keys_of_policies(policies, inventory);
        let here = || policies.iter().filter(|policy| policy.zones.contains(&inventory.zone));
        let labels: BTreeSet<&String> = here().flat_map(|policy| policy.select.label_keys()).collect();
        let by_manager = here().any(|policy| policy.select.exclude_managed);
        let keeps_consistent = here().any(|policy| {
            policy.retention.as_ref().is_some_and(|retention| retention.min_keep_consistent > 0)
        });
        let facts = |instance: &Instance| InstanceFacts {
            name: instance.name.to_string(),
            labels: labels
                .iter()
                .map(|label| ((*label).clone(), instance.labels.get(*label).map(ToString::to_string)))
                .collect(),
            is_managed: by_manager.then_some(instance.is_managed),
        };
        let disabled = policies.iter().filter(|policy| !policy.enabled).map(|policy| policy.name.clone());
        Self {
            at: None,
            paused: disabled.filter(|name| policies_here.contains_key(name)).map(|name| (name, at)).collect(),
            policies: policies_here,
            instances: inventory.instances.iter().map(|instance| (instance.id, facts(instance))).collect(),
            good: inventory
                .snapshots
                .iter()
                .filter(|snapshot| snapshot.state.is_good() && !inventory.coming.contains(&snapshot.id))
                .map(|snapshot| snapshot.id)
                .collect(),
            failed: inventory.failed.clone(),
            consistent: inventory
                .snapshots
                .iter()
                .filter(|snapshot| keeps_consistent && snapshot.application_consistent == Some(true))
                .map(|snapshot| snapshot.id)
                .collect(),
            changes: Vec::new(),
        }
    }

    fn since(&self, change: &Change, at: Timestamp) -> Timestamp {
        self.changes.iter().find(|seen| seen.change == *change).map_or(at, |seen| seen.since.min(at))
    }

    /// The policies and the inventory as they would be without these changes.
    ///
    /// # Errors
    /// Why a remembered policy cannot be read.
    pub fn take_back(
        &self,
        changes: &[Seen],
        policies: &[Policy],
        inventory: &Inventory,
    ) -> Result<(Vec<Policy>, Inventory), String> {
        let mut policies = policies.to_vec();
        let mut inventory = inventory.clone();
        for Seen { change, .. } in changes {
            match change {
                Change::Key { policy: name, key, was, .. } => {
                    let is_it = |policy: &&mut Policy| policy.name == *name;
                    if let Some(policy) = policies.iter_mut().find(is_it) {
                        set_deciding_keys(policy, std::iter::once((key.as_str(), was.as_ref())))
                            .map_err(|key| unreadable(name, &key))?;
                    }
                }
                Change::PolicyGone(name) => {
                    let keys = self.policies.get(name);
                    let policy = keys.map(|keys| policy_of_keys(name.clone(), keys)).transpose();
                    let mut policy = policy.map_err(|key| unreadable(name, &key))?;
                    if let Some(policy) = &mut policy {
                        policy.zones.push(inventory.zone.clone());
                    }
                    policies.retain(|policy| policy.name != *name);
                    policies.extend(policy);
                }
                Change::Renamed { id, was, .. } => {
                    if let Some(instance) = instance_mut(&mut inventory, *id) {
                        instance.name = was.as_str().into();
                    }
                }
                Change::Label { id, label, was, .. } => {
                    if let Some(instance) = instance_mut(&mut inventory, *id) {
                        match was {
                            Some(was) => drop(instance.labels.insert(label.clone(), was.clone())),
                            None => drop(instance.labels.remove(label)),
                        }
                    }
                }
                Change::Managed { id, is, .. } => {
                    if let Some(instance) = instance_mut(&mut inventory, *id) {
                        instance.is_managed = !is;
                    }
                }
                Change::Vanished { id, .. } => {
                    let facts = self.instances.get(id);
                    inventory.instances.extend(facts.map(|facts| facts.instance(*id)));
                }
                Change::Failed(id) => {
                    let is_it = |snapshot: &&mut crate::snapshot::Snapshot| snapshot.id == *id;
                    if let Some(snapshot) = inventory.snapshots.iter_mut().find(is_it) {
                        snapshot.state = SnapshotState::Exported;
                    }
                }
            }
        }
        Ok((policies, inventory))
    }
}

impl InstanceFacts {
    fn instance(&self, id: InstanceId) -> Instance {
        let labels = self.labels.iter();
        let labels = labels.filter_map(|(label, value)| Some((label.clone(), value.clone()?)));
        Instance {
            id,
            name: self.name.as_str().into(),
            labels: labels.collect(),
            template_id: None,
            is_managed: self.is_managed.unwrap_or(false),
        }
    }
}

/// When a change that was first seen then has settled; never beyond the calendar.
pub(crate) fn settles_at(since: Timestamp, settle: Duration) -> Option<Timestamp> {
    since.checked_add(SignedDuration::try_from(settle).ok()?).ok()
}

fn unreadable(policy: &PolicyName, key: &str) -> String {
    format!(
        "the remembered key `{key}` of policy {policy} can't be read by this version: go back to the version that wrote \
         it, or set it as it was and wait for one run"
    )
}

fn keys_of_policies(
    policies: &[Policy],
    inventory: &Inventory,
) -> BTreeMap<PolicyName, BTreeMap<String, Value>> {
    let here = policies.iter().filter(|policy| policy.zones.contains(&inventory.zone));
    here.map(|policy| (policy.name.clone(), deciding_keys(policy))).collect()
}

fn key_changes(
    policy: &PolicyName,
    remembered: &BTreeMap<String, Value>,
    present: &BTreeMap<String, Value>,
) -> Vec<Change> {
    let keys: BTreeSet<&String> = remembered.keys().chain(present.keys()).collect();
    keys.into_iter()
        .map(|key| (key, remembered.get(key), present.get(key)))
        .filter(|(_, was, is)| was != is)
        .map(|(key, was, is)| Change::Key {
            policy: policy.clone(),
            key: key.clone(),
            was: was.cloned(),
            is: is.cloned(),
        })
        .collect()
}

fn instance_changes(remembered: &InstanceFacts, instance: &Instance) -> Vec<Change> {
    let (id, name) = (instance.id, instance.name.to_string());
    let is_renamed = name != remembered.name;
    let renamed = is_renamed.then(|| Change::Renamed { id, was: remembered.name.clone(), is: name.clone() });
    let labels = remembered.labels.iter().filter_map(|(label, was)| {
        let is = instance.labels.get(label).map(ToString::to_string);
        (*was != is).then(|| Change::Label {
            id,
            name: name.clone(),
            label: label.clone(),
            was: was.clone(),
            is,
        })
    });
    let is = instance.is_managed;
    let is_other = remembered.is_managed.is_some_and(|was| was != is);
    let managed = is_other.then(|| Change::Managed { id, name: name.clone(), is });
    renamed.into_iter().chain(labels).chain(managed).collect()
}

fn instance_mut(inventory: &mut Inventory, id: InstanceId) -> Option<&mut Instance> {
    inventory.instances.iter_mut().find(|instance| instance.id == id)
}

/// The changes as one text; several snapshots that failed are counted.
pub(crate) fn describe<'c>(changes: impl Iterator<Item = &'c Change>) -> String {
    let (failed, others): (Vec<&Change>, Vec<&Change>) =
        changes.partition(|change| matches!(change, Change::Failed(_)));
    let mut texts: Vec<String> = others.iter().take(NAMED_CHANGES).map(ToString::to_string).collect();
    if others.len() > NAMED_CHANGES {
        texts.push(counted(others.len() - NAMED_CHANGES, "other change"));
    }
    if !failed.is_empty() {
        texts.push(format!("{} turned to `error`", counted(failed.len(), "snapshot")));
    }
    texts.join("; ")
}

impl Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: &Option<Value>| {
            value.as_ref().map_or("not set".to_owned(), |value| {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                excerpt(&text, QUOTED_CHARACTERS).clone()
            })
        };
        match self {
            Self::Key { policy, key, was, is } if key == "enabled" && was != is => {
                let is_paused = is.as_ref().and_then(Value::as_bool) == Some(false);
                write!(f, "policy {policy} is {}", if is_paused { "paused" } else { "not paused any more" })
            }
            Self::Key { policy, key, was, is } => {
                write!(f, "policy {policy}: {key} was {}, is {}", shown(was), shown(is))
            }
            Self::PolicyGone(policy) => write!(f, "policy {policy} is gone"),
            Self::Renamed { was, is, .. } => {
                write!(f, "instance {} is called {} now", printable(was), printable(is))
            }
            Self::Label { name, label, was, is, .. } => {
                let (name, label) = (printable(name), printable(label));
                match (was, is) {
                    (Some(was), None) => write!(f, "{name} lost the label {label}={}", printable(was)),
                    (None, Some(is)) => write!(f, "{name} got the label {label}={}", printable(is)),
                    (was, is) => {
                        let [was, is] =
                            [was, is].map(|value| printable(value.as_deref().unwrap_or_default()));
                        write!(f, "{name}: label {label} was {was}, is {is}")
                    }
                }
            }
            Self::Managed { name, is, .. } => {
                let verb = if *is { "joined" } else { "left" };
                write!(f, "{} {verb} an instance pool or node pool", printable(name))
            }
            Self::Vanished { name, .. } => write!(f, "instance {} is not listed any more", printable(name)),
            Self::Failed(id) => write!(f, "snapshot {id} turned to `error`"),
        }
    }
}
