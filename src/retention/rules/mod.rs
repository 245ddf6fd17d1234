//! The rules of one policy, applied one after the other to the snapshots of an instance, newest first.
//!
//! Only good snapshots are candidates. First the keep rules: what any of them keeps is kept. Then the limits `max_age`
//! and `max_count`, which delete all the same; then `min_keep` and `min_keep_consistent`, which keep all the same. Holds, required copies and
//! other policies are not considered here.

pub(crate) mod candidate;
mod failed_after;
mod keep_hourly_to_yearly;
mod keep_last;
mod keep_within;
mod keep_within_hourly_to_yearly;
mod kept_during;
mod limits;

use std::ops::Range;
use std::sync::Arc;

use jiff::Timestamp;

use crate::policy::name::PolicyName;
use crate::policy::{ByPeriod, Period, Policy, Retention};
use crate::retention::age::AgeTable;
use crate::retention::calendar::Calendar;
use crate::retention::expiry::{ALWAYS, first_second_after};
use crate::retention::grouping::{Entry, Group, latest_counted};
use crate::retention::inventory::{Inventory, Ownership};
use crate::retention::reason::Reason;
use crate::retention::rules::candidate::{Candidate, Opinion};
use crate::retention::rules::keep_hourly_to_yearly::keep_newest_of_each;
use crate::retention::rules::keep_last::keep_last;
use crate::retention::rules::keep_within::keep_within;
use crate::retention::rules::keep_within_hourly_to_yearly::keep_newest_of_each_within;
use crate::retention::rules::kept_during::kept_during;
use crate::retention::rules::limits::{max_age, max_count, min_keep, min_keep_consistent};
use crate::retention::verdict::Rule;
use crate::snapshot::Snapshot;

/// What a policy by itself says of a snapshot, and why.
#[derive(Debug)]
pub(crate) struct Assessment {
    pub(crate) opinion: Opinion,
    /// The seconds during which it keeps the snapshot, if no other one comes.
    pub(crate) kept_during: Range<i64>,
    pub(crate) reasons: Vec<Reason>,
}

/// The rules of one policy.
///
/// Its lists and calendars are used again for each instance: a million snapshots would otherwise need as many
/// allocations.
#[derive(Debug)]
pub(crate) struct PolicyRules<'a> {
    pub(crate) policy: &'a Policy,
    pub(crate) name: Arc<PolicyName>,
    /// When it was found disabled: it judges as of then, and only what was there then.
    pub(crate) paused_at: Option<Timestamp>,
    /// The names of all policies of the zone.
    configured: Arc<[&'a PolicyName]>,
    calendar: Calendar,
    keep_within: Option<AgeTable>,
    keep_within_each: ByPeriod<Option<AgeTable>>,
    max_age: Option<AgeTable>,
    failed_after: Option<AgeTable>,
    candidates: Vec<Candidate>,
    /// The place of each candidate among the snapshots of its instance.
    places: Vec<usize>,
    /// One for each snapshot of the instance.
    assessments: Vec<Assessment>,
}

impl<'a> PolicyRules<'a> {
    pub(crate) fn new(
        policy: &'a Policy,
        paused_at: Option<Timestamp>,
        configured: &Arc<[&'a PolicyName]>,
    ) -> Self {
        let table = policy.retention.as_ref();
        let age = |rule: Rule, span: fn(&Retention) -> Option<&_>| {
            table.and_then(span).map(|span| AgeTable::new(rule, span, &policy.time_zone))
        };
        let within = |period| {
            let span = table.and_then(|table| table.keep_within_each.get(period).as_ref());
            span.map(|span| AgeTable::new(Rule::KeepWithinEach(period), span, &policy.time_zone))
        };
        Self {
            policy,
            name: Arc::new(policy.name.clone()),
            paused_at,
            configured: configured.clone(),
            calendar: Calendar::new(&policy.time_zone),
            keep_within: age(Rule::KeepWithin, |table| table.keep_within.as_ref()),
            keep_within_each: ByPeriod::of(within),
            max_age: age(Rule::MaxAge, |table| table.max_age.as_ref()),
            failed_after: age(Rule::FailedAfter, |table| table.failed_after.as_ref()),
            candidates: Vec::new(),
            places: Vec::new(),
            assessments: Vec::new(),
        }
    }

    /// Whether the policy prunes at all, and so protects snapshots from other policies.
    pub(crate) fn prunes(&self) -> bool {
        self.policy.retention.is_some()
    }

    /// What it says of the snapshot at this place in the group.
    pub(crate) fn assessment(&self, place: usize) -> Option<&Assessment> {
        self.assessments.get(place).filter(|assessment| assessment.opinion != Opinion::NotSelected)
    }

    pub(crate) fn reasons_mut(&mut self, place: usize) -> Option<&mut Vec<Reason>> {
        self.assessments.get_mut(place).map(|assessment| &mut assessment.reasons)
    }

    /// Assesses the snapshots of an instance as of `now`. Returns how many of them are good and selected.
    pub(crate) fn apply(
        &mut self,
        group: &Group<'_>,
        inventory: &Inventory,
        now: Timestamp,
        with_expiry: bool,
    ) -> u64 {
        for assessment in &mut self.assessments {
            assessment.opinion = Opinion::NotSelected;
            assessment.reasons.clear();
        }
        let unselected =
            || Assessment { opinion: Opinion::NotSelected, kept_during: ALWAYS, reasons: Vec::new() };
        self.assessments.resize_with(group.entries.len().max(self.assessments.len()), unselected);
        if !self.policy.select.selects_instance(group.instance_id, group.instance) {
            return 0;
        }
        let now = self.paused_at.map_or(now, |paused_at| paused_at.min(now));
        self.find_candidates(group, inventory, now);
        if self.policy.retention.is_some() {
            self.apply_rules(now);
        } else {
            for candidate in &mut self.candidates {
                candidate.keep(Rule::NoKeepRule, Timestamp::MAX, Reason::NoRetention);
                candidate.forget_other_reasons();
            }
        }
        self.note_candidates(group, inventory, with_expiry)
    }

    /// Finds the good ones; all others are ignored, except failed ones that are too old.
    fn find_candidates(&mut self, group: &Group<'_>, inventory: &Inventory, now: Timestamp) {
        let select = &self.policy.select;
        let latest = latest_counted(now);
        let orphan = match (group.instance_id, group.instance) {
            (None, _) => Some(Reason::NoInstance),
            (Some(_), None) if !select.judge_orphans => Some(Reason::Orphan),
            (Some(_), _) => None,
        };
        for (place, (entry, assessment)) in group.entries.iter().zip(&mut self.assessments).enumerate() {
            let Some(snapshot) = inventory.snapshots.get(entry.index as usize) else { continue };
            let is_coming = is_coming(inventory, snapshot);
            if !is_coming && !select.selects_snapshot(snapshot) {
                continue;
            }
            if self.paused_at.is_some_and(|paused_at| entry.created_at > paused_at) {
                continue;
            }
            let is_own = |ownership: &Ownership| ownership.includes(&self.name, &self.configured);
            let is_foreign = select.only_created && !inventory.created.get(&snapshot.id).is_some_and(is_own);
            let is_counted = entry.created_at <= latest && entry.is_good;
            // Nothing is known of a coming one that could speak against it.
            if is_coming || is_counted && !is_foreign && orphan.is_none() {
                let periods = self.calendar.periods(entry.created_at);
                let reasons = std::mem::take(&mut assessment.reasons);
                let is_consistent = snapshot.application_consistent == Some(true);
                self.candidates.push(Candidate::new(entry.created_at, periods, is_consistent, reasons));
                self.places.push(place);
                continue;
            }
            if is_foreign {
                assessment.reasons.push(Reason::Foreign);
                assessment.opinion = Opinion::Ignores(Rule::Foreign);
                assessment.kept_during = ALWAYS;
                continue;
            }
            let failed_after = self.failed_after.as_ref().filter(|_| orphan.is_none());
            let failed_at =
                inventory.failed.get(&snapshot.id).map_or(entry.created_at, |failed| failed.since);
            let failed = failed_after.filter(|_| entry.is_failed).map(|age| {
                let has_newer_good = !self.places.is_empty();
                failed_after::failed_after(age, failed_at, has_newer_good, now)
            });
            assessment.ignore(entry, snapshot, orphan.as_ref(), failed, now);
        }
    }

    fn apply_rules(&mut self, now: Timestamp) {
        let Some(table) = &self.policy.retention else { return };
        let list = &mut self.candidates[..];
        if let Some(count) = table.keep_last {
            keep_last(list, count);
        }
        if let Some(age) = &mut self.keep_within {
            keep_within(list, age, now);
        }
        for period in Period::ALL {
            if let Some(slots) = *table.keep.get(period) {
                keep_newest_of_each(list, period, slots, table.keep_oldest);
            }
        }
        for period in Period::ALL {
            if let Some(age) = self.keep_within_each.get_mut(period) {
                keep_newest_of_each_within(list, period, age, table.keep_oldest, now);
            }
        }
        let has_keep_rule = table.has_keep_rule();
        for candidate in &mut *list {
            if !has_keep_rule {
                candidate.keep(Rule::NoKeepRule, Timestamp::MAX, Reason::NoKeepRule);
            }
            candidate.forget_other_reasons();
        }
        if let Some(age) = &mut self.max_age {
            max_age(list, age, now);
        }
        if let Some(max) = table.max_count {
            max_count(list, max);
        }
        min_keep(list, table.min_keep);
        min_keep_consistent(list, table.min_keep_consistent);
    }

    fn note_candidates(&mut self, group: &Group<'_>, inventory: &Inventory, with_expiry: bool) -> u64 {
        if let Some(table) = self.policy.retention.as_ref().filter(|_| with_expiry) {
            let ranges = kept_during(&self.candidates, table);
            for (range, place) in ranges.zip(&self.places) {
                if let Some(assessment) = self.assessments.get_mut(*place) {
                    assessment.kept_during = range;
                }
            }
        }
        let mut good = 0;
        for (candidate, place) in self.candidates.drain(..).zip(self.places.drain(..)) {
            let Some(assessment) = self.assessments.get_mut(place) else { continue };
            let Candidate { opinion, reasons, .. } = candidate;
            (assessment.opinion, assessment.reasons) = (opinion, reasons);
            if self.paused_at.is_some() && matches!(opinion, Opinion::Keeps(_)) {
                // Its time stands still.
                assessment.kept_during = ALWAYS;
            }
            good += 1;
            let entry = group.entries.get(place);
            let snapshot = entry.and_then(|entry| inventory.snapshots.get(entry.index as usize));
            if snapshot.is_some_and(|snapshot| is_coming(inventory, snapshot)) {
                // It counts as any other does, but there is nothing to say about it yet.
                assessment.opinion = Opinion::Keeps(Rule::Create);
                assessment.reasons.clear();
                assessment.reasons.push(Reason::Create);
            }
        }
        good
    }
}

impl Assessment {
    /// Notes why a snapshot is no candidate: all reasons, of which the first gives the rule.
    fn ignore(
        &mut self,
        entry: &Entry,
        snapshot: &Snapshot,
        orphan: Option<&Reason>,
        failed: Option<(Reason, Timestamp)>,
        now: Timestamp,
    ) {
        let mut rule = None;
        let mut kept_until = Timestamp::MAX;
        if entry.created_at > latest_counted(now) {
            rule = Some(Rule::Future);
            self.reasons.push(Reason::Future);
        }
        if !entry.is_good {
            rule = rule.or(Some(Rule::State));
            if let Some((reason, until)) = failed {
                self.reasons.push(reason);
                kept_until = until;
            } else {
                self.reasons.push(Reason::State(Box::new(snapshot.state.clone())));
            }
        }
        self.reasons.extend(orphan.cloned());
        self.opinion = match rule {
            _ if now > kept_until => Opinion::Deletes(Rule::FailedAfter),
            Some(rule) => Opinion::Ignores(rule),
            None => Opinion::Ignores(Rule::Orphan),
        };
        self.kept_during = i64::MIN..first_second_after(kept_until);
    }
}

fn is_coming(inventory: &Inventory, snapshot: &Snapshot) -> bool {
    !inventory.coming.is_empty() && inventory.coming.contains(&snapshot.id)
}
