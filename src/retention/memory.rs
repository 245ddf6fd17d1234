//! What a policy remembers of its last accepted run in a zone, and the changes since then.
//!
//! A plan rests on more than time: on the keys of all policies, on the names and labels of instances, and on which
//! snapshots are good. A change in any of these can make deletions that the operator did not intend. So each change has
//! to settle: until then it is taken back for another plan, and what not every plan deletes is kept. The changes are
//! remembered one by one, so that a value counts, too, that was in force only between two of them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::policy::Policy;
use crate::policy::name::PolicyName;
use crate::retention::change::{Change, Seen, Subject, settles_at};
use crate::retention::deciding_keys::{
    ENABLED, LABEL_KEYS, MANAGED, MIN_KEEP_CONSISTENT, deciding_keys, policy_of_keys, set_deciding_keys,
};
use crate::retention::inventory::{Failed, Inventory};
use crate::snapshot::{Instance, InstanceId, SnapshotId, SnapshotState};

/// The most values that are remembered of what has changed more than once, beside one for each instance.
const MOST_FORMER: usize = 256;

type Keys = BTreeMap<String, Value>;

/// What the last accepted run of a policy in a zone rested on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// When the run began.
    #[serde(default)]
    pub at: Option<Timestamp>,
    /// The deciding keys of each policy of the zone.
    pub policies: BTreeMap<PolicyName, Keys>,
    /// When each policy was first found disabled that still is, unless a change of that has not settled.
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
    /// The changes that have not settled yet, in their order; several if a key has been edited more than once.
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
        let found = |policy: &Policy| {
            let known = policy.paused_since.or_else(|| self.paused_at(&policy.name));
            known.unwrap_or(at).min(at)
        };
        inventory.paused = paused.map(|policy| (policy.name.clone(), found(policy))).collect();
    }

    /// When a policy was found disabled that still was when the last run found it, as far as that is remembered.
    fn paused_at(&self, policy: &PolicyName) -> Option<Timestamp> {
        paused_at(policy, &self.changes, &self.paused)
    }

    /// Since when policies are paused by what has settled since this was saved: by all that is not among the `unsettled` changes.
    fn settled_paused(&self, unsettled: &[Seen]) -> BTreeMap<PolicyName, Timestamp> {
        let is_settled = |seen: &&Seen| !unsettled.iter().any(|one| one.change == seen.change);
        let mut paused = self.paused.clone();
        for seen in self.changes.iter().filter(is_settled) {
            match &seen.change {
                Change::Key { policy, key, .. } if key == ENABLED => match seen.paused_at() {
                    Some(at) => drop(paused.insert(policy.clone(), at)),
                    None => drop(paused.remove(policy)),
                },
                _ => {}
            }
        }
        paused
    }

    /// That a policy was found paused, and is paused by hand since a later time: it was resumed and paused in between.
    fn paused_anew(&self, policy: &Policy, last: &BTreeMap<PolicyName, Keys>) -> Option<Change> {
        let is = last.get(&policy.name)?.get(ENABLED).filter(|is| **is == Value::Bool(false))?;
        let was_paused_at = self.paused_at(&policy.name)?;
        (policy.paused_since? > was_paused_at).then(|| Change::Key {
            policy: policy.name.clone(),
            key: ENABLED.to_owned(),
            was: Some(is.clone()),
            is: Some(is.clone()),
        })
    }

    /// Adds the keys of a policy that was removed, from what its own last run rested on, where this memory knows nothing of it: so
    /// that its removal is found.
    pub fn add_gone(&mut self, policy: &PolicyName, own: &Self) {
        if let (false, Some(keys)) = (self.policies.contains_key(policy), own.last_found().0.remove(policy)) {
            self.policies.insert(policy.clone(), keys);
        }
    }

    /// Lets a change begin anew that a later memory, of another policy that ran in the meantime, shows to have been taken
    /// back then.
    pub fn forget_interrupted(&mut self, later: &Self) {
        let others = latest(&later.changes);
        let is_interrupted = |seen: &Seen| match others.get(&seen.change.subject()) {
            Some(other) => {
                !other.change.has_same_end(&seen.change)
                    || other.not_before.is_some_and(|not_before| not_before >= seen.since)
            }
            None => later.rests_on_start_of(&seen.change),
        };
        let interrupted: Vec<Change> = latest(&self.changes)
            .into_values()
            .filter(|seen| is_interrupted(seen))
            .map(|seen| seen.change.clone())
            .collect();
        for change in interrupted {
            match change.reversed() {
                Some(change) => {
                    let known = later.changes.iter().map(|seen| seen.since).chain(later.at);
                    let since = known.max().unwrap_or(Timestamp::MIN);
                    self.changes.push(Seen { since, not_before: self.at, paused_since: None, change });
                }
                None => self.changes.retain(|seen| seen.change != change),
            }
        }
        self.changes.sort_by_key(|seen| seen.since);
    }

    /// Whether the settled values are those before a change.
    fn rests_on_start_of(&self, change: &Change) -> bool {
        let instance = |id: &InstanceId| self.instances.get(id);
        match change {
            // Of a policy that is paused anew this says nothing.
            Change::Key { policy, key, was, is } => {
                was != is && self.policies.get(policy).is_some_and(|keys| keys.get(key) == was.as_ref())
            }
            Change::PolicyGone(policy) => self.policies.contains_key(policy),
            Change::Renamed { id, was, .. } => instance(id).is_some_and(|facts| facts.name == *was),
            Change::Label { id, label, was, .. } => {
                instance(id).is_some_and(|facts| facts.labels.get(label) == Some(was))
            }
            Change::Vanished { id, .. } => self.instances.contains_key(id),
            Change::Managed { id, is, .. } => instance(id).is_some_and(|facts| facts.is_managed == Some(!is)),
            Change::Failed(id) => self.good.contains(id),
        }
    }

    /// The keys and facts as the last run found them; of a policy or an instance that was not there any more, the last
    /// ones that are known.
    fn last_found(&self) -> (BTreeMap<PolicyName, Keys>, BTreeMap<InstanceId, InstanceFacts>) {
        let (mut policies, mut instances) = (self.policies.clone(), self.instances.clone());
        for Seen { change, .. } in &self.changes {
            match change {
                Change::Key { policy, key, is, .. } => {
                    set_key(policies.entry(policy.clone()).or_default(), key, is.as_ref());
                }
                Change::Renamed { id, is, .. } => {
                    if let Some(facts) = instances.get_mut(id) {
                        facts.name.clone_from(is);
                    }
                }
                Change::Label { id, label, is, .. } => {
                    if let Some(facts) = instances.get_mut(id) {
                        facts.labels.insert(label.clone(), is.clone());
                    }
                }
                Change::Managed { id, is, .. } => {
                    if let Some(facts) = instances.get_mut(id) {
                        facts.is_managed = Some(*is);
                    }
                }
                Change::PolicyGone(_) | Change::Vanished { .. } | Change::Failed(_) => {}
            }
        }
        (policies, instances)
    }

    /// The remembered changes, and each difference between what the last run found and the present, first seen `at`.
    pub fn differences(&self, policies: &[Policy], inventory: &Inventory, at: Timestamp) -> Vec<Seen> {
        let (last_policies, last_instances) = self.last_found();
        let mut found = Vec::new();
        let present = keys_of_policies(policies, inventory);
        let here = policies.iter().filter(|policy| present.contains_key(&policy.name));
        found.extend(here.filter_map(|policy| self.paused_anew(policy, &last_policies)));
        for (name, last) in &last_policies {
            match present.get(name) {
                None => found.push(Change::PolicyGone(name.clone())),
                Some(present) => found.extend(key_changes(name, last, present)),
            }
        }
        let listed: HashMap<InstanceId, &Instance> =
            inventory.instances.iter().map(|instance| (instance.id, instance)).collect();
        for (id, last) in &last_instances {
            match listed.get(id) {
                None => found.push(Change::Vanished { id: *id, name: last.name.clone() }),
                Some(instance) => found.extend(instance_changes(last, instance)),
            }
        }
        let failed = inventory.snapshots.iter().filter(|snapshot| snapshot.state == SnapshotState::Error);
        let failed = failed.filter(|snapshot| self.good.contains(&snapshot.id));
        found.extend(failed.map(|snapshot| Change::Failed(snapshot.id)));

        // What is only there or not is found again as long as it lasts.
        let losses = |change: &&Change| change.is_loss();
        let lasting: HashSet<Subject<'_>> = found.iter().filter(losses).map(Change::subject).collect();
        let is_over = |change: &Change| change.is_loss() && !lasting.contains(&change.subject());
        let known: HashSet<Subject<'_>> = self.changes.iter().map(|seen| seen.change.subject()).collect();
        let is_known = |change: &Change| change.is_loss() && known.contains(&change.subject());
        let before = self.changes.iter().filter(|seen| !is_over(&seen.change));
        let before = before.map(|seen| Seen { since: seen.since.min(at), ..seen.clone() });
        let new = found.iter().filter(|change| !is_known(change));
        let by_hand = |change: &Change| match change {
            Change::Key { policy, key, .. } if key == ENABLED => {
                policies.iter().find(|one| one.name == *policy)?.paused_since.map(|since| since.min(at))
            }
            _ => None,
        };
        let new = new.map(|change| Seen {
            since: at,
            not_before: self.at,
            paused_since: by_hand(change),
            change: change.clone(),
        });
        let mut changes: Vec<Seen> = before.chain(new).collect();
        changes.sort_by_key(|seen| seen.since);
        forget_former(&mut changes, most_former(inventory) + 1);
        changes
    }

    /// The changes that have not settled at `at`.
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

    /// The memory after a run that began at `at`: of the present, except for what the `unsettled` changes are about.
    #[must_use]
    pub fn renewed(
        &self,
        policies: &[Policy],
        inventory: &Inventory,
        at: Timestamp,
        unsettled: Vec<Seen>,
    ) -> Self {
        let (last_policies, last_instances) = self.last_found();
        let was_paused = self.settled_paused(&unsettled);
        let mut new_policies = keys_of_policies(policies, inventory);
        let subjects: BTreeSet<Subject<'_>> = unsettled.iter().map(|seen| seen.change.subject()).collect();
        for subject in &subjects {
            match subject {
                Subject::Policy(name) => {
                    let last = last_policies.get(*name).map(|keys| ((*name).clone(), keys.clone()));
                    new_policies.extend(last);
                }
                Subject::Key(name, key) => {
                    let before = self.policies.get(*name).and_then(|keys| keys.get(*key));
                    if let Some(keys) = new_policies.get_mut(*name) {
                        set_key(keys, key, before);
                    }
                }
                _ => {}
            }
        }
        let labels = selecting_labels(policies, inventory, new_policies.values(), &unsettled);
        let has_key = |key: &str| {
            new_policies.values().any(|keys| keys.contains_key(key))
                || subjects
                    .iter()
                    .any(|subject| matches!(subject, Subject::Key(_, changed) if *changed == key))
        };
        let (by_manager, keeps_consistent) = (has_key(MANAGED), has_key(MIN_KEEP_CONSISTENT));
        let facts = |instance: &Instance| InstanceFacts {
            name: instance.name.to_string(),
            labels: labels
                .iter()
                .map(|label| (label.clone(), instance.labels.get(label).map(ToString::to_string)))
                .collect(),
            is_managed: by_manager.then_some(instance.is_managed),
        };
        let is_good = |id: &SnapshotId| !inventory.coming.contains(id);
        let good = inventory.snapshots.iter().filter(|snapshot| snapshot.state.is_good());
        let consistent = inventory
            .snapshots
            .iter()
            .filter(|snapshot| keeps_consistent && snapshot.application_consistent == Some(true));
        let mut new = Self {
            at: Some(at),
            policies: new_policies,
            paused: inventory.paused.clone(),
            instances: inventory.instances.iter().map(|instance| (instance.id, facts(instance))).collect(),
            good: good.map(|snapshot| snapshot.id).filter(is_good).collect(),
            failed: inventory.failed.clone(),
            consistent: consistent.map(|snapshot| snapshot.id).collect(),
            changes: Vec::new(),
        };
        new.paused.retain(|name, _| new.policies.contains_key(name));
        for subject in &subjects {
            match subject {
                Subject::Policy(name) | Subject::Key(name, ENABLED) => match was_paused.get(*name) {
                    Some(since) => drop(new.paused.insert((*name).clone(), *since)),
                    None => drop(new.paused.remove(*name)),
                },
                Subject::Key(..) => {}
                Subject::Snapshot(id) => {
                    new.good.insert(*id);
                    new.failed.remove(id);
                }
                Subject::Instance(id) => {
                    new.instances.extend(last_instances.get(id).map(|facts| (*id, facts.clone())));
                }
                Subject::Name(id) | Subject::Label(id, _) | Subject::Managed(id) => {
                    if let (Some(facts), Some(before)) = (new.instances.get_mut(id), self.instances.get(id)) {
                        facts.restore(*subject, before);
                    }
                }
            }
        }
        new.changes = unsettled;
        new
    }

    fn since(&self, change: &Change, at: Timestamp) -> Timestamp {
        self.changes.iter().find(|seen| seen.change == *change).map_or(at, |seen| seen.since.min(at))
    }

    /// The different states in which things were, according to these changes: as it is remembered, and before each change.
    pub(crate) fn former_states<'c>(&self, changes: &'c [Seen]) -> Vec<FormerState<'c>> {
        let was_paused = self.settled_paused(changes);
        let mut states = vec![FormerState {
            back: self.back_to_memory(changes),
            staying: &[],
            paused: self.paused.clone(),
        }];
        for place in first_of_runs(changes) {
            let (staying, later) = changes.split_at(place);
            let Some(time) = later.first().map(|seen| seen.since) else { continue };
            let mut back: BTreeMap<Subject<'_>, Seen> = BTreeMap::new();
            for seen in later {
                let mut all = Seen { since: time, ..seen.clone() };
                if let Some(earlier) = back.get(&seen.change.subject()) {
                    all.change.begin_with(&earlier.change);
                }
                back.insert(seen.change.subject(), all);
            }
            let back = back.into_values().filter(|seen| !seen.change.is_none()).collect();
            states.push(FormerState { back, staying, paused: was_paused.clone() });
        }
        let mut different: Vec<FormerState<'_>> = Vec::new();
        for state in states {
            if !state.back.is_empty() && !different.iter().any(|known| known.is_same(&state)) {
                different.push(state);
            }
        }
        different
    }

    /// For each thing that has changed, the change from what is remembered, since it changed last.
    fn back_to_memory(&self, changes: &[Seen]) -> Vec<Seen> {
        let mut back: BTreeMap<Subject<'_>, Seen> = BTreeMap::new();
        for seen in changes {
            let mut all = seen.clone();
            let facts = |id: &InstanceId| self.instances.get(id);
            match &mut all.change {
                Change::Key { policy, key, was, .. } => {
                    *was = self.policies.get(policy).and_then(|keys| keys.get(key)).cloned();
                }
                Change::Renamed { id, was, .. } => {
                    *was = facts(id).map_or_else(|| was.clone(), |facts| facts.name.clone());
                }
                Change::Label { id, label, was, .. } => {
                    *was = facts(id).and_then(|facts| facts.labels.get(label)).cloned().flatten();
                }
                Change::Managed { id, was, .. } => {
                    *was = facts(id).and_then(|facts| facts.is_managed).unwrap_or(*was);
                }
                Change::PolicyGone(_) | Change::Vanished { .. } | Change::Failed(_) => {}
            }
            back.insert(seen.change.subject(), all);
        }
        back.into_values().filter(|seen| !seen.change.is_none()).collect()
    }

    /// The policies and the inventory as they were in a former state.
    ///
    /// # Errors
    /// Why a remembered policy cannot be read.
    pub(crate) fn take_back(
        &self,
        state: &FormerState<'_>,
        policies: &[Policy],
        inventory: &Inventory,
    ) -> Result<(Vec<Policy>, Inventory), String> {
        let (last_policies, last_instances) = self.last_found();
        let mut policies = policies.to_vec();
        let mut inventory = inventory.clone();
        let mut keys: BTreeMap<&PolicyName, BTreeMap<&str, Option<&Value>>> = BTreeMap::new();
        let mut paused = BTreeSet::new();
        let changes = || state.back.iter().map(|seen| &seen.change);
        for change in changes() {
            match change {
                Change::Key { policy, key, was, .. } => {
                    keys.entry(policy).or_default().insert(key, was.as_ref());
                    paused.extend((key == ENABLED).then_some(policy));
                }
                Change::PolicyGone(name) => {
                    let last = last_policies.get(name).map(|keys| policy_of_keys(name.clone(), keys));
                    let mut last = last.transpose().map_err(|key| unreadable(name, &key))?;
                    if let Some(policy) = &mut last {
                        policy.zones.push(inventory.zone.clone());
                    }
                    policies.retain(|policy| policy.name != *name);
                    policies.extend(last);
                    paused.insert(name);
                }
                Change::Vanished { id, .. } => {
                    let facts = last_instances.get(id);
                    inventory.instances.extend(facts.map(|facts| facts.instance(*id)));
                }
                Change::Renamed { .. }
                | Change::Label { .. }
                | Change::Managed { .. }
                | Change::Failed(_) => {}
            }
        }
        for (name, keys) in keys {
            if let Some(policy) = policies.iter_mut().find(|policy| policy.name == *name) {
                set_deciding_keys(policy, keys.into_iter()).map_err(|key| unreadable(name, &key))?;
            }
        }
        for name in paused {
            match paused_at(name, state.staying, &state.paused) {
                Some(at) => drop(inventory.paused.insert(name.clone(), at)),
                None => drop(inventory.paused.remove(name)),
            }
        }
        let mut instances: HashMap<InstanceId, &mut Instance> =
            inventory.instances.iter_mut().map(|instance| (instance.id, instance)).collect();
        for change in changes() {
            if let Some(instance) = change.instance().and_then(|id| instances.get_mut(&id)) {
                change.take_back_from(instance);
            }
        }
        let failed: HashSet<SnapshotId> = changes()
            .filter_map(|change| if let Change::Failed(id) = change { Some(*id) } else { None })
            .collect();
        for snapshot in inventory.snapshots.iter_mut().filter(|snapshot| failed.contains(&snapshot.id)) {
            snapshot.state = SnapshotState::Exported;
        }
        Ok((policies, inventory))
    }
}

/// When a policy was found disabled that still was after these changes, with those that were `paused` before them.
fn paused_at(
    policy: &PolicyName,
    changes: &[Seen],
    paused: &BTreeMap<PolicyName, Timestamp>,
) -> Option<Timestamp> {
    let enabled = Subject::Key(policy, ENABLED);
    let last = changes.iter().rfind(|seen| seen.change.subject() == enabled);
    last.map_or_else(|| paused.get(policy).copied(), Seen::paused_at)
}

impl Seen {
    /// Since when the policy is paused that was paused by this change of [`ENABLED`].
    fn paused_at(&self) -> Option<Timestamp> {
        let Change::Key { is: Some(Value::Bool(false)), .. } = &self.change else { return None };
        Some(self.paused_since.unwrap_or(self.since))
    }
}

/// A state in which things were.
#[derive(Debug)]
pub(crate) struct FormerState<'c> {
    /// The changes to be taken back, at most one of each thing.
    pub(crate) back: Vec<Seen>,
    /// Those before them.
    staying: &'c [Seen],
    /// Since when policies were paused before those.
    paused: BTreeMap<PolicyName, Timestamp>,
}

impl FormerState<'_> {
    fn is_same(&self, other: &Self) -> bool {
        let mut pairs = self.back.iter().zip(&other.back);
        let are_same = self.back.len() == other.back.len() && self.paused == other.paused;
        are_same && pairs.all(|(one, other)| one.change == other.change)
    }
}

/// Whether more values are remembered of what has changed more than once than can be tried one by one.
pub(crate) fn is_overfull(changes: &[Seen], inventory: &Inventory) -> bool {
    former(changes) > most_former(inventory)
}

fn most_former(inventory: &Inventory) -> usize {
    MOST_FORMER + inventory.instances.len()
}

/// How many changes were not the last one of the same thing.
fn former(changes: &[Seen]) -> usize {
    changes.len() - latest(changes).len()
}

/// The last change of each thing.
fn latest(changes: &[Seen]) -> BTreeMap<Subject<'_>, &Seen> {
    changes.iter().map(|seen| (seen.change.subject(), seen)).collect()
}

/// Where in a list of changes those begin that one run saw first. The clock may have been set back between two runs.
fn first_of_runs(changes: &[Seen]) -> Vec<usize> {
    let mut places = Vec::new();
    let mut since = None;
    let mut of_run = HashSet::new();
    for (place, seen) in changes.iter().enumerate() {
        if since != Some(seen.since) || of_run.contains(&seen.change.subject()) {
            places.push(place);
            since = Some(seen.since);
            of_run.clear();
        }
        of_run.insert(seen.change.subject());
    }
    places
}

/// Forgets what was repeated since, and, beyond the number that may stay, the oldest of those that were not the last.
fn forget_former(changes: &mut Vec<Seen>, may_stay: usize) {
    let mut places: HashMap<Subject<'_>, Vec<usize>> = HashMap::new();
    for (place, seen) in changes.iter().enumerate() {
        places.entry(seen.change.subject()).or_default().push(place);
    }
    let change = |place: &usize| changes.get(*place).map(|seen| &seen.change);
    let mut former = BTreeSet::new();
    let mut repeated = BTreeSet::new();
    for places in places.values() {
        for (number, place) in places.iter().enumerate().take(places.len() - 1) {
            let is_repeated = places.iter().skip(number + 1).any(|later| change(later) == change(place));
            if is_repeated {
                repeated.insert(*place)
            } else {
                former.insert(*place)
            };
        }
    }
    let excess = former.len().saturating_sub(may_stay);
    repeated.extend(former.into_iter().take(excess));
    let mut place = 0;
    changes.retain(|_| {
        place += 1;
        !repeated.contains(&(place - 1))
    });
}

impl InstanceFacts {
    /// Takes over what the memory before has of one thing.
    fn restore(&mut self, subject: Subject<'_>, before: &Self) {
        match subject {
            Subject::Name(_) => self.name.clone_from(&before.name),
            Subject::Label(_, label) => {
                if let Some(value) = before.labels.get(label) {
                    self.labels.insert(label.to_owned(), value.clone());
                }
            }
            Subject::Managed(_) => self.is_managed = before.is_managed,
            _ => {}
        }
    }

    fn instance(&self, id: InstanceId) -> Instance {
        let labels = self.labels.iter();
        let labels = labels.filter_map(|(label, value)| Some((label.clone(), value.clone()?)));
        Instance {
            id,
            name: self.name.as_str().into(),
            labels: labels.collect(),
            template_id: None,
            is_managed: self.is_managed.unwrap_or(false),
            created_at: None,
        }
    }
}

fn unreadable(policy: &PolicyName, key: &str) -> String {
    format!(
        "the remembered key `{key}` of policy {policy} can't be read by this version: go back to the version that wrote \
         it, or set it as it was and wait for one run"
    )
}

fn keys_of_policies(policies: &[Policy], inventory: &Inventory) -> BTreeMap<PolicyName, Keys> {
    let here = policies.iter().filter(|policy| policy.zones.contains(&inventory.zone));
    here.map(|policy| (policy.name.clone(), deciding_keys(policy))).collect()
}

fn key_changes(policy: &PolicyName, remembered: &Keys, present: &Keys) -> Vec<Change> {
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
    let was = remembered.is_managed.filter(|was| *was != is);
    let managed = was.map(|was| Change::Managed { id, name: name.clone(), was, is });
    renamed.into_iter().chain(labels).chain(managed).collect()
}

fn set_key(keys: &mut Keys, key: &str, value: Option<&Value>) {
    match value {
        Some(value) => drop(keys.insert(key.to_owned(), value.clone())),
        None => drop(keys.remove(key)),
    }
}

/// The labels by which policies select instances, or did before changes that have not settled.
fn selecting_labels<'k>(
    policies: &[Policy],
    inventory: &Inventory,
    remembered: impl Iterator<Item = &'k Keys>,
    unsettled: &[Seen],
) -> BTreeSet<String> {
    let here = policies.iter().filter(|policy| policy.zones.contains(&inventory.zone));
    let mut labels: BTreeSet<String> = here.flat_map(|policy| policy.select.label_keys()).cloned().collect();
    let remembered = remembered.flat_map(|keys| LABEL_KEYS.iter().filter_map(|key| keys.get(*key)));
    let changed = unsettled.iter().filter_map(|seen| match &seen.change {
        Change::Key { key, was, .. } if LABEL_KEYS.contains(&key.as_str()) => was.as_ref(),
        _ => None,
    });
    let values = remembered.chain(changed).filter_map(Value::as_object);
    labels.extend(values.flat_map(|values| values.keys().cloned()));
    labels
}
