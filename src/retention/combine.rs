//! All policies together: a snapshot that a policy would delete is kept all the same by a hold, by a required copy that
//! is missing, or by another policy that keeps it.

use std::sync::Arc;

use jiff::Timestamp;

use crate::policy::Policy;
use crate::policy::name::PolicyName;
use crate::retention::expiry::first_second_from;
use crate::retention::export_gate::{Requirement, copies_needed, requirements};
use crate::retention::grouping::{Entry, Group, counted_from, group_by_instance, latest_counted};
use crate::retention::inventory::{Hold, Inventory};
use crate::retention::plan::{Decision, Plan, PolicyPlan};
use crate::retention::reason::Reason;
use crate::retention::rules::PolicyRules;
use crate::retention::rules::candidate::Opinion;
use crate::retention::verdict::{CopyNeeded, Rule, Verdict};
use crate::snapshot::Snapshot;

/// The rules of the policies that name the zone, to be used for any number of plans. A policy that is disabled is paused:
/// it decides nothing itself, and others keep what it kept then.
pub(crate) fn rules_for<'a>(
    policies: &'a [Policy],
    inventory: &Inventory,
    now: Timestamp,
) -> Vec<PolicyRules<'a>> {
    let policies: Vec<&Policy> =
        policies.iter().filter(|policy| policy.zones.contains(&inventory.zone)).collect();
    let configured: Arc<[&PolicyName]> = policies.iter().map(|policy| &policy.name).collect();
    let paused_at = |policy: &Policy| {
        let found = inventory.paused.get(&policy.name).copied().unwrap_or(now);
        (!policy.enabled).then_some(found)
    };
    let rules = policies.into_iter().map(|policy| PolicyRules::new(policy, paused_at(policy), &configured));
    rules.collect()
}

/// Decides about each snapshot of the inventory for each policy; with expiry dates only where they are asked for.
pub(crate) fn combine(
    policies: &mut [PolicyRules<'_>],
    inventory: &Inventory,
    now: Timestamp,
    with_expiry: bool,
) -> Plan {
    let mut zone = Zone {
        requirements: requirements(
            policies.iter().map(|rules| (rules.policy, rules.paused_at)),
            inventory,
            now,
        ),
        inventory,
        now,
        known_copies: Vec::new(),
    };
    let plan = |rules: &PolicyRules<'_>| PolicyPlan {
        policy: rules.policy.name.clone(),
        at: now,
        decisions: Vec::new(),
        good: 0,
        deletes: 0,
        good_deletes: 0,
        pending: 0,
    };
    let mut plans: Vec<PolicyPlan> = policies.iter().map(plan).collect();
    // Used again for each instance.
    let (mut verdicts, mut reasons, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    for group in &group_by_instance(inventory) {
        for (rules, plan) in policies.iter_mut().zip(&mut plans) {
            plan.good += rules.apply(group, inventory, now, with_expiry);
            if rules.paused_at.is_some() {
                continue;
            }
            reserve(&mut plan.decisions, group.entries.len());
        }
        for (own, plan) in plans.iter_mut().enumerate() {
            if policies.get(own).is_none_or(|rules| rules.paused_at.is_some()) {
                continue;
            }
            // Newest first.
            let mut newer_stays = false;
            for (place, entry) in group.entries.iter().enumerate() {
                let decided = zone.decide(policies, own, place, entry, newer_stays, &mut reasons);
                let is_deleted = decided.as_ref().is_some_and(|decided| decided.verdict == Verdict::Delete);
                newer_stays |= entry.is_good && !is_deleted && entry.created_at <= latest_counted(now);
                verdicts.extend(decided);
            }
            let prunes = policies.get(own).is_some_and(PolicyRules::prunes);
            let mut instance_reasons = Vec::with_capacity(reasons.len());
            instance_reasons.append(&mut reasons);
            let instance_reasons: Arc<Box<[Reason]>> = Arc::new(instance_reasons.into_boxed_slice());
            let mut first_reason = 0;
            for Decided { place, entry, verdict, rule, copies, reason_count } in verdicts.drain(..) {
                let is_deleted = verdict == Verdict::Delete;
                plan.deletes += u64::from(is_deleted);
                plan.good_deletes += u64::from(is_deleted && entry.was_good);
                // The rules counted the good ones.
                plan.good += u64::from(entry.was_good && !entry.is_good);
                // One that is still to be created has no end yet either.
                if with_expiry && prunes && verdict == Verdict::Keep && rule != Rule::Create {
                    kept.push(Kept { own, decision: plan.decisions.len(), place });
                }
                plan.decisions.push(Decision {
                    index: entry.index,
                    verdict,
                    rule,
                    expires_at: None,
                    created_at: entry.created_at,
                    copies,
                    instance_reasons: instance_reasons.clone(),
                    first_reason,
                    reason_count,
                });
                first_reason += u32::from(reason_count);
            }
        }
        zone.find_expiry(policies, group, &mut kept, &mut plans);
        kept.clear();
    }
    let decided = policies.iter().zip(plans).filter(|(rules, _)| rules.paused_at.is_none());
    Plan { at: now, zone: inventory.zone.clone(), policies: decided.map(|(_, plan)| plan).collect() }
}

/// Growing by doubling would need twice the memory at the end.
fn reserve(decisions: &mut Vec<Decision>, more: usize) {
    if decisions.capacity() - decisions.len() < more {
        decisions.reserve_exact(more.max(decisions.len() / 8));
    }
}

/// What the policies have to respect beside each other.
struct Zone<'a> {
    /// The copies that each policy requires.
    requirements: Vec<Vec<Arc<Requirement>>>,
    inventory: &'a Inventory,
    now: Timestamp,
    /// The different lists of copies so far; policies make few.
    known_copies: Vec<Arc<Vec<CopyNeeded>>>,
}

/// A decision without its reasons: those of all decisions about an instance are shared once they are complete.
struct Decided {
    place: usize,
    entry: Entry,
    verdict: Verdict,
    rule: Rule,
    copies: Option<Arc<Vec<CopyNeeded>>>,
    reason_count: u16,
}

/// A decision to keep, whose expiry is looked for.
struct Kept {
    /// Whose decision: the policy's place.
    own: usize,
    /// Its place in that policy's plan.
    decision: usize,
    /// The snapshot's place in its group.
    place: usize,
}

impl Zone<'_> {
    /// Decides about a snapshot for one of the policies, and adds the reasons to the list; nothing if the policy does not
    /// select it.
    fn decide(
        &mut self,
        policies: &mut [PolicyRules<'_>],
        own: usize,
        place: usize,
        entry: &Entry,
        newer_stays: bool,
        all_reasons: &mut Vec<Reason>,
    ) -> Option<Decided> {
        let snapshot = self.inventory.snapshots.get(entry.index as usize)?;
        let opinion = policies.get(own)?.assessment(place)?.opinion;
        let mut protection = Vec::new();
        let mut copies = None;
        let is_judged = matches!(opinion, Opinion::Keeps(_) | Opinion::Deletes(_));
        if is_judged && opinion != Opinion::Keeps(Rule::Create) && policies.get(own)?.prunes() {
            protection = self.protection(policies, own, place, entry, snapshot, newer_stays);
            if matches!(opinion, Opinion::Deletes(_)) && protection.is_empty() {
                copies = self.copies_needed(policies, place, entry, snapshot);
            }
        }
        let reasons = policies.get_mut(own)?.reasons_mut(place)?;
        let (verdict, rule) = match (opinion, protection.first()) {
            (Opinion::Deletes(_), Some((rule, _))) => {
                let rule = *rule;
                let protection = protection.into_iter().map(|(_, reason)| reason);
                reasons.splice(0..0, protection.chain([Reason::OtherwiseDeleted]));
                (Verdict::Keep, rule)
            }
            (Opinion::Deletes(rule), None) => (Verdict::Delete, rule),
            (Opinion::Keeps(rule), _) => {
                reasons.extend(protection.into_iter().map(|(_, reason)| reason));
                (Verdict::Keep, rule)
            }
            (Opinion::Ignores(rule), _) => (Verdict::Ignore, rule),
            (Opinion::NotSelected, _) => return None,
        };
        let reason_count = u16::try_from(reasons.len()).unwrap_or(u16::MAX);
        reasons.truncate(reason_count.into());
        all_reasons.append(reasons);
        Some(Decided { place, entry: *entry, verdict, rule, copies, reason_count })
    }

    /// What keeps a snapshot beside the rules of its own policy, the most important first.
    fn protection(
        &self,
        policies: &[PolicyRules<'_>],
        own: usize,
        place: usize,
        entry: &Entry,
        snapshot: &Snapshot,
        newer_stays: bool,
    ) -> Vec<(Rule, Reason)> {
        let mut protection = Vec::new();
        let passes = |requirement: &Requirement| requirement.passes(snapshot, newer_stays);
        let unmet = |requirement: &Requirement| (Rule::Export, Reason::Unmet(requirement.unmet.clone()));
        if let Some(hold) = self.hold(snapshot) {
            protection.push((Rule::Hold, Reason::OnHold(Arc::new(hold.clone()))));
        }
        let own_requirements = self.requirements_of(own, entry);
        protection.extend(own_requirements.iter().filter(|one| !passes(one)).map(|one| unmet(one)));
        let mut of_others: Vec<&Arc<Requirement>> = Vec::new();
        for (number, rules, opinion) in deciding(policies, place) {
            if number == own {
                continue;
            }
            let missing = self.requirements_of(number, entry).iter().filter(|one| !passes(one));
            let keeping = match opinion {
                Opinion::Keeps(rule) | Opinion::Ignores(rule) if rules.prunes() => Some(rule),
                _ => missing.clone().next().map(|_| Rule::Export),
            };
            if let Some(rule) = keeping {
                let name = rules.name.clone();
                let reason = match rules.paused_at {
                    Some(_) => Reason::PausedPolicy(name, rule),
                    None => Reason::OtherPolicy(name, rule),
                };
                protection.push((Rule::Policy, reason));
            }
            for requirement in missing {
                // There may be a copy by now, so that none was there then is all to say.
                if rules.paused_at.is_some() && !requirement.unmet.is_unreachable() {
                    continue;
                }
                let is_it = |known: &Arc<Requirement>| Arc::ptr_eq(known, requirement);
                if !own_requirements.iter().chain(of_others.iter().copied()).any(is_it) {
                    of_others.push(requirement);
                }
            }
        }
        protection.extend(of_others.into_iter().map(|one| unmet(one)));
        protection
    }

    fn hold(&self, snapshot: &Snapshot) -> Option<&Hold> {
        if self.inventory.holds.is_empty() {
            return None;
        }
        let hold = self.inventory.holds.get(&snapshot.id);
        hold.filter(|hold| hold.until.is_none_or(|until| until > self.now))
    }

    /// The copies that a policy requires before a snapshot may be deleted: of a failed one there is nothing to copy.
    fn requirements_of(&self, policy: usize, entry: &Entry) -> &[Arc<Requirement>] {
        let is_copied = entry.was_good || !entry.is_failed || self.inventory.unadopted.is_some();
        let requirements = self.requirements.get(policy).filter(|_| is_copied);
        requirements.map_or(&[], Vec::as_slice)
    }

    /// What all policies together require for a snapshot.
    fn copies_needed(
        &mut self,
        policies: &[PolicyRules<'_>],
        place: usize,
        entry: &Entry,
        snapshot: &Snapshot,
    ) -> Option<Arc<Vec<CopyNeeded>>> {
        if self.requirements.iter().all(Vec::is_empty) {
            return None;
        }
        let requirements =
            deciding(policies, place).flat_map(|(number, ..)| self.requirements_of(number, entry));
        let needed = copies_needed(requirements, snapshot);
        if needed.is_empty() {
            return None;
        }
        let known = self.known_copies.iter().find(|known| ***known == needed).cloned();
        Some(known.unwrap_or_else(|| {
            let copies = Arc::new(needed);
            self.known_copies.push(copies.clone());
            copies
        }))
    }

    /// Finds when each of the kept snapshots of an instance is not kept any more.
    ///
    /// Until a snapshot that is dated in the future begins to count, all that keeps one is a range of seconds. When one
    /// does, the rules are applied anew.
    fn find_expiry(
        &self,
        policies: &mut [PolicyRules<'_>],
        group: &Group<'_>,
        kept: &mut Vec<Kept>,
        plans: &mut [PolicyPlan],
    ) {
        let latest = latest_counted(self.now);
        let later = group.entries.iter().filter(|entry| entry.is_good && entry.created_at > latest);
        let mut arrivals: Vec<i64> =
            later.map(|entry| first_second_from(counted_from(entry.created_at))).collect();
        arrivals.sort_unstable();
        arrivals.dedup();
        let mut from = first_second_from(self.now);
        for arrival in arrivals.into_iter().chain([i64::MAX]) {
            kept.retain(|kept| {
                let expiry = self.first_unkept(policies, kept, group, from);
                let Some(expiry) = expiry.filter(|expiry| *expiry < arrival) else { return true };
                let decision = plans.get_mut(kept.own).and_then(|plan| plan.decisions.get_mut(kept.decision));
                if let Some(decision) = decision {
                    decision.expires_at = Timestamp::from_second(expiry).ok();
                }
                false
            });
            let Some(then) = Timestamp::from_second(arrival).ok().filter(|_| !kept.is_empty()) else {
                return;
            };
            for rules in &mut *policies {
                rules.apply(group, self.inventory, then, true);
            }
            from = arrival;
        }
    }

    /// The first second, `from` or later, at which nothing keeps a snapshot, as long as no other one comes.
    fn first_unkept(
        &self,
        policies: &[PolicyRules<'_>],
        kept: &Kept,
        group: &Group<'_>,
        from: i64,
    ) -> Option<i64> {
        let place = kept.place;
        // The newest one that its policy judges; if it is that itself, it does not expire.
        let retention = policies.get(kept.own).and_then(|rules| rules.policy.retention.as_ref());
        let newer_stays = retention.is_some_and(|retention| retention.min_keep > 0);
        let entry = group.entries.get(place)?;
        let snapshot = self.inventory.snapshots.get(entry.index as usize)?;
        let mut second = match self.hold(snapshot) {
            Some(hold) => from.max(first_second_from(hold.until?)),
            None => from,
        };
        loop {
            let mut next = second;
            for (number, rules, _) in deciding(policies, place) {
                let kept_during = rules.assessment(place).map(|assessment| &assessment.kept_during);
                let kept_during = kept_during.filter(|_| rules.prunes());
                if let Some(range) = kept_during.filter(|range| range.contains(&next)) {
                    next = range.end;
                }
                for requirement in self.requirements_of(number, entry) {
                    next = requirement.passes_from(snapshot, newer_stays, next);
                }
            }
            if next == i64::MAX {
                return None;
            }
            if next == second {
                return Some(second);
            }
            second = next;
        }
    }
}

/// The policies that judge a snapshot, with their places. One that does not select it, or to which it is foreign, has no
/// opinion that others would have to respect. Of one that does not prune, only the copies count that it requires.
fn deciding<'p, 'a>(
    policies: &'p [PolicyRules<'a>],
    place: usize,
) -> impl Iterator<Item = (usize, &'p PolicyRules<'a>, Opinion)> {
    policies.iter().enumerate().filter_map(move |(number, rules)| {
        let opinion = rules.assessment(place)?.opinion;
        (opinion != Opinion::Ignores(Rule::Foreign)).then_some((number, rules, opinion))
    })
}
