//! One situation, and what all its policies together say of the snapshots of an instance.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};

use crate::judge::facts::{CopyFacts, Facts, Holdings, InstanceFacts, Situation, SnapshotFacts};
use crate::judge::reading::Reading;
use crate::judge::ruling::{Opinion, Ruling, Verdict};
use crate::policy::name::PolicyName;
use crate::snapshot::{InstanceId, SnapshotId};

/// A snapshot may be dated this far ahead and still be judged: clocks differ a little.
const AHEAD_MAX: SignedDuration = SignedDuration::from_mins(5);

/// The copies of each archive, to be looked up; none for one that can't be read.
pub(super) type Archives<'f> = HashMap<&'f str, Option<HeldCopies<'f>>>;

/// The copies of one archive.
#[derive(Debug, Default)]
pub(super) struct HeldCopies<'f> {
    has_all: bool,
    of_snapshots: HashMap<SnapshotId, Vec<&'f CopyFacts>>,
    of_instances: HashMap<InstanceId, Vec<&'f CopyFacts>>,
}

/// The copies of a case.
pub(super) fn archives(facts: &Facts) -> Archives<'_> {
    facts.archives.iter().map(|(name, holdings)| (name.as_str(), HeldCopies::new(holdings))).collect()
}

impl<'f> HeldCopies<'f> {
    /// None if the archive can't be read.
    fn new(holdings: &'f Holdings) -> Option<Self> {
        let mut held = Self::default();
        match holdings {
            Holdings::Unreachable => return None,
            Holdings::Assumed => held.has_all = true,
            Holdings::Known(copies) => {
                for copy in copies {
                    held.of_snapshots.entry(copy.snapshot_id).or_default().push(copy);
                    held.of_instances.entry(copy.instance_id).or_default().push(copy);
                }
            }
        }
        Some(held)
    }
}

/// One situation.
#[derive(Debug)]
pub(super) struct Case<'f> {
    facts: &'f Facts,
    situation: &'f Situation,
    listed: HashMap<InstanceId, &'f InstanceFacts>,
    policies: Vec<Party<'f>>,
}

/// A policy of the zone.
#[derive(Debug)]
struct Party<'f> {
    name: &'f PolicyName,
    reading: Reading,
    /// When it was found paused: it knows nothing of later.
    paused_at: Option<Timestamp>,
}

impl<'f> Case<'f> {
    /// # Errors
    /// Why the facts can't be read.
    pub(super) fn new(facts: &'f Facts, situation: &'f Situation) -> Result<Self, String> {
        let mut policies = Vec::new();
        for (name, keys) in &situation.policies {
            let reading = Reading::new(keys, facts.this_machine, facts.now);
            let reading = reading.map_err(|key| format!("the key `{key}` of policy {name} can't be read"))?;
            let found = situation.paused.get(name).copied().unwrap_or(facts.now);
            let paused_at = (!reading.is_enabled).then_some(found);
            policies.push(Party { name, reading, paused_at });
        }
        let listed = situation.instances.iter().map(|instance| (instance.id, instance)).collect();
        Ok(Self { facts, situation, listed, policies })
    }

    /// What the policy of the run may do with all snapshots of an instance, newest first; none for one that it does not
    /// select.
    pub(super) fn judge(&self, group: &[&SnapshotFacts], archives: &Archives<'_>) -> Vec<Option<Ruling>> {
        let mut rulings: Vec<Option<Ruling>> = vec![None; group.len()];
        let is_own = |party: &&Party<'_>| *party.name == self.facts.policy && party.paused_at.is_none();
        let Some(own) = self.policies.iter().find(is_own) else { return rulings };
        let own_opinions = self.opinions(own, group);
        let others: Vec<(&Party<'_>, Vec<Opinion>)> = self
            .policies
            .iter()
            .filter(|party| party.name != own.name)
            .map(|party| (party, self.opinions(party, group)))
            .collect();
        let is_late = self.lacks_a_newer_one(group);
        let mut newer_stays = false;
        for (place, snapshot) in group.iter().enumerate() {
            let opinion = own_opinions.get(place).copied().unwrap_or(Opinion::NotSelected);
            let ruling = match opinion {
                Opinion::NotSelected => None,
                Opinion::Ignores(rule) => Some(Ruling::new(Verdict::Ignore, rule)),
                Opinion::Keeps(rule) => Some(Ruling::keep(rule)),
                Opinion::Deletes(_) if own.reading.is_in_doubt() => {
                    Some(Ruling::keep_by("policy", own.name.as_str()))
                }
                Opinion::Deletes(rule) => Some(if self.is_on_hold(snapshot) {
                    Ruling::keep("hold")
                } else if let Some(archive) = self.lacking_copy(own, snapshot, newer_stays, archives) {
                    Ruling::keep_by("export", archive)
                } else if let Some(keeper) = others.iter().find(|(party, opinions)| {
                    let opinion = opinions.get(place).copied().unwrap_or(Opinion::NotSelected);
                    self.keeps_for_others(party, opinion, snapshot, newer_stays, archives)
                }) {
                    Ruling::keep_by("policy", keeper.0.name.as_str())
                } else {
                    Ruling::new(Verdict::Delete, rule)
                }),
            };
            let is_deleted = ruling.as_ref().is_some_and(|ruling| ruling.verdict == Verdict::Delete);
            newer_stays |= self.is_good(snapshot) && !is_deleted && !self.is_ahead(snapshot.created_at);
            let is_kept_as_last = is_deleted && is_late && !self.facts.changes_are_allowed;
            if let Some(place) = rulings.get_mut(place) {
                *place = if is_kept_as_last { Some(Ruling::keep("source")) } else { ruling };
            }
        }
        rulings
    }

    fn is_good(&self, snapshot: &SnapshotFacts) -> bool {
        ["exported", "ready"].contains(&snapshot.state.as_str()) || self.situation.good.contains(&snapshot.id)
    }

    /// Whether it counts as not there yet.
    fn is_ahead(&self, created_at: Timestamp) -> bool {
        created_at.duration_since(self.facts.now) > AHEAD_MAX
    }

    fn is_on_hold(&self, snapshot: &SnapshotFacts) -> bool {
        snapshot.hold.is_some_and(|hold| hold.until.is_none_or(|until| self.facts.now < until))
    }

    /// Whether a snapshot belongs to a policy: it took it, or was served by it, or it is not known who else may prune it.
    fn is_of(&self, policy: &PolicyName, snapshot: &SnapshotFacts) -> bool {
        let Some(owner) = &snapshot.owner else { return false };
        match &owner.maker {
            None => true,
            Some(maker) => {
                let is_gone = !self.situation.policies.contains_key(maker);
                is_gone || maker == policy || owner.served.contains(policy)
            }
        }
    }

    /// What one policy by itself says of the snapshots of an instance, newest first.
    fn opinions(&self, party: &Party<'_>, group: &[&SnapshotFacts]) -> Vec<Opinion> {
        let mut opinions = vec![Opinion::NotSelected; group.len()];
        let Party { name, reading, paused_at } = party;
        let instance_id = group.first().and_then(|snapshot| snapshot.instance_id);
        let listed = instance_id.and_then(|id| self.listed.get(&id).copied());
        if !reading.selects_instance(instance_id, listed) {
            return opinions;
        }
        let now = paused_at.map_or(self.facts.now, |paused_at| paused_at.min(self.facts.now));
        let is_orphan = listed.is_none() && (instance_id.is_none() || !reading.judges_orphans);
        let mut good: Vec<(&mut Opinion, &SnapshotFacts)> = Vec::new();
        let mut failed: Vec<(&mut Opinion, &SnapshotFacts)> = Vec::new();
        for (opinion, &snapshot) in opinions.iter_mut().zip(group) {
            let is_known = paused_at.is_none_or(|paused_at| snapshot.created_at <= paused_at);
            if !is_known || !reading.selects_snapshot(snapshot) {
                continue;
            }
            if reading.only_created && !self.is_of(name, snapshot) {
                *opinion = Opinion::Ignores("foreign");
            } else if snapshot.created_at.duration_since(now) > AHEAD_MAX {
                *opinion = Opinion::Ignores("future");
            } else if !self.is_good(snapshot) {
                *opinion = Opinion::Ignores("state");
                if snapshot.state == "error" && !is_orphan {
                    failed.push((opinion, snapshot));
                }
            } else if is_orphan {
                *opinion = Opinion::Ignores("orphan");
            } else {
                good.push((opinion, snapshot));
            }
        }
        let list: Vec<&SnapshotFacts> = good.iter().map(|(_, snapshot)| *snapshot).collect();
        let Some(table) = &reading.table else {
            for (opinion, _) in good {
                *opinion = Opinion::Keeps("none");
            }
            return opinions;
        };
        let judged = table.judge(&list, &reading.time_zone, now);
        for ((opinion, _), judged) in good.into_iter().zip(judged) {
            *opinion = judged;
        }
        let newest = list.first().map(|newest| (newest.created_at, newest.id));
        for (opinion, snapshot) in failed {
            let Some(after) = &table.failed_after else { continue };
            let since = snapshot.failed.map_or(snapshot.created_at, |failed| failed.since);
            let has_newer = newest > Some((snapshot.created_at, snapshot.id));
            if has_newer && after.is_exceeded(since, &reading.time_zone, now) {
                *opinion = Opinion::Deletes("failed_after");
            }
        }
        opinions
    }

    /// Whether another policy keeps a snapshot of which it thinks so. One that does not prune only requires its copies.
    fn keeps_for_others(
        &self,
        party: &Party<'_>,
        opinion: Opinion,
        snapshot: &SnapshotFacts,
        newer_stays: bool,
        archives: &Archives<'_>,
    ) -> bool {
        match opinion {
            // What is foreign to a policy is none of its business.
            Opinion::NotSelected | Opinion::Ignores("foreign") => false,
            Opinion::Ignores(_) | Opinion::Keeps(_) if party.reading.table.is_some() => true,
            _ => self.lacking_copy(party, snapshot, newer_stays, archives).is_some(),
        }
    }

    /// The first archive that lacks a copy that the policy requires before a snapshot is deleted.
    fn lacking_copy<'c>(
        &'c self,
        party: &'c Party<'_>,
        snapshot: &SnapshotFacts,
        newer_stays: bool,
        archives: &Archives<'_>,
    ) -> Option<&'c str> {
        if let Some(archive) = &self.facts.unadopted {
            return Some(archive.as_str());
        }
        // Of one that was never good there is nothing to copy.
        let was_good = self.is_good(snapshot) || snapshot.failed.is_some_and(|failed| failed.was_good);
        if snapshot.state == "error" && !was_good {
            return None;
        }
        let has_copy = |archive: &&String| {
            let Some(Some(held)) = archives.get(archive.as_str()) else { return false };
            held.has_all || self.has_copy(party, snapshot, newer_stays, held)
        };
        party.reading.required.iter().find(|archive| !has_copy(archive)).map(String::as_str)
    }

    fn has_copy(
        &self,
        party: &Party<'_>,
        snapshot: &SnapshotFacts,
        newer_stays: bool,
        held: &HeldCopies<'_>,
    ) -> bool {
        let Party { reading, paused_at, .. } = party;
        let was_there = |copy: &&&CopyFacts| {
            paused_at.is_none_or(|then| copy.exported_at.is_none_or(|exported| exported <= then))
        };
        let of_itself = held.of_snapshots.get(&snapshot.id).map_or(&[][..], Vec::as_slice);
        if of_itself.iter().any(|copy| was_there(&copy)) {
            return true;
        }
        let Some(of_instance) = snapshot.instance_id.and_then(|id| held.of_instances.get(&id)) else {
            return false;
        };
        if reading.requires_all {
            return false;
        }
        // What is dated ahead moves nothing.
        let counted = || of_instance.iter().filter(was_there).filter(|copy| !self.is_ahead(copy.created_at));
        if counted().any(|copy| (copy.created_at, copy.snapshot_id) >= (snapshot.created_at, snapshot.id)) {
            return true;
        }
        // A policy that does not prune has done its part where its last run exported the newest one of then.
        let Some(last_due) =
            reading.last_due.filter(|_| newer_stays && paused_at.is_none() && reading.table.is_none())
        else {
            return false;
        };
        let of_run = counted()
            .filter(|copy| copy.exported_at.is_some_and(|at| last_due <= at && at <= self.facts.now));
        let Some(newest) = of_run.map(|copy| (copy.created_at, copy.snapshot_id)).max() else { return false };
        !self.facts.snapshots.iter().any(|other| {
            let was_good = self.is_good(other)
                || other.state == "error" && other.failed.is_some_and(|failed| failed.was_good);
            other.instance_id == snapshot.instance_id
                && other.created_at <= last_due
                && was_good
                && (other.created_at, other.id) > newest
                && reading.selects_snapshot(other)
        })
    }

    /// Whether a snapshot of the instance could not be taken when it was due, or the newest good one is older than a policy
    /// expects.
    fn lacks_a_newer_one(&self, group: &[&SnapshotFacts]) -> bool {
        let Some(instance) = group.first().and_then(|snapshot| snapshot.instance_id) else { return false };
        let Some(listed) = self.listed.get(&instance).copied() else { return false };
        let good = || group.iter().filter(|one| self.is_good(one) && !self.is_ahead(one.created_at));
        let newest = good().map(|one| one.created_at).max();
        self.policies.iter().filter(|party| party.paused_at.is_none()).any(|party| {
            let reading = &party.reading;
            if !reading.selects_instance(Some(instance), Some(listed)) {
                return false;
            }
            let could_not_take = self.facts.missing.iter().any(|missing| {
                reading.creates
                    && missing.policy == *party.name
                    && missing.instance.is_none_or(|id| id == instance)
                    && newest.is_none_or(|newest| newest < missing.slot)
            });
            let is_late = reading.expect_newest.as_ref().is_some_and(|age| {
                let selected = good().filter(|one| reading.selects_snapshot(one));
                let newest = selected.map(|one| one.created_at).max();
                newest.is_none_or(|newest| age.is_exceeded(newest, &reading.time_zone, self.facts.now))
            });
            could_not_take || is_late
        })
    }
}
