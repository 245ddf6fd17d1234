//! All policies together: what a policy would let go is brought back by the first of these that holds it: a
//! pin, a required copy that is missing, another policy.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;

use crate::policy::Policy;
use crate::retention::gate::{self, Need};
use crate::retention::inventory::{Hold, Inventory};
use crate::retention::judge::{Judgement, Say, first_of_all};
use crate::retention::order::{Entry, Group};
use crate::retention::plan::{Decision, PolicyPlan};
use crate::retention::reason::Reason;
use crate::retention::verdict::{CopyNeeded, Rule, Verdict};

/// The policies of a zone, and what they have to respect beside each other.
#[derive(Debug)]
pub(crate) struct Council<'a> {
    members: Vec<Member<'a>>,
    inventory: &'a Inventory,
    now: Timestamp,
}

#[derive(Debug)]
struct Member<'a> {
    judgement: Judgement<'a>,
    /// The copies that it requires.
    needs: Vec<Arc<Need>>,
}

/// What holds a snapshot beside the rules of the policy whose plan is made.
#[derive(Debug, Default)]
struct Holders<'m> {
    /// The key of the first of them.
    rule: Option<Rule>,
    reasons: Vec<Reason>,
    /// What all policies together require for it.
    needs: Vec<&'m Need>,
}

/// Lists of copies by the numbers of the needs, so that snapshots share them: policies make few different ones.
type CopyLists = Vec<(Vec<usize>, Arc<[CopyNeeded]>)>;

impl<'a> Council<'a> {
    pub(crate) fn new(judgements: Vec<Judgement<'a>>, inventory: &'a Inventory, now: Timestamp) -> Self {
        let policies: Vec<&Policy> = judgements.iter().map(|judgement| judgement.policy).collect();
        let needs = gate::needs(&policies, inventory, now);
        let members = judgements.into_iter().zip(needs);
        let members = members.map(|(judgement, needs)| Member { judgement, needs }).collect();
        Self { members, inventory, now }
    }

    /// The plan of every policy, in the order given.
    pub(crate) fn conclude(mut self, groups: &[Group<'_>]) -> Vec<PolicyPlan> {
        let take = |member: &mut Member<'_>| std::mem::take(&mut member.judgement.reasons);
        let own_reasons: Vec<Vec<Reason>> = self.members.iter_mut().map(take).collect();
        let plans = self.members.iter().zip(own_reasons);
        plans.map(|(member, reasons)| self.plan(member, reasons, groups)).collect()
    }

    fn plan(&self, own: &Member<'_>, own_reasons: Vec<Reason>, groups: &[Group<'_>]) -> PolicyPlan {
        let mut own_reasons = own_reasons.into_iter();
        let mut plan = PolicyPlan {
            policy: own.judgement.policy.name.clone(),
            decisions: Vec::new(),
            good: own.judgement.good,
            deletes: 0,
            reasons: Vec::with_capacity(own_reasons.len()),
        };
        let none: Arc<[CopyNeeded]> = Arc::new([]);
        let mut lists: CopyLists = Vec::new();
        let mut holders = Holders::default();
        // Why a need is not met, made once: snapshots share it.
        let mut missing: BTreeMap<usize, Reason> = BTreeMap::new();
        for group in groups {
            for entry in &group.entries {
                let standing = own.judgement.standing(entry.index);
                if standing.say == Say::Nothing {
                    continue;
                }
                let first_reason = plan.reasons.len();
                let own_reasons = own_reasons.by_ref().take(usize::from(standing.reasons));
                holders.clear();
                let is_asked = !matches!(standing.say, Say::Ignores(_) | Say::Keeps(Rule::Create));
                if own.judgement.prunes() && is_asked {
                    self.ask(own, entry, &mut missing, &mut holders);
                }
                let (verdict, rule) = match (standing.say, holders.rule) {
                    (Say::LetsGo(rule), Some(holder)) => {
                        plan.reasons.append(&mut holders.reasons);
                        plan.reasons.push(Reason::WouldGo(rule));
                        plan.reasons.extend(own_reasons);
                        (Verdict::Keep, holder)
                    }
                    (say, _) => {
                        plan.reasons.extend(own_reasons);
                        plan.reasons.append(&mut holders.reasons);
                        match say {
                            Say::LetsGo(rule) => (Verdict::Delete, rule),
                            Say::Keeps(rule) => (Verdict::Keep, rule),
                            Say::Ignores(rule) => (Verdict::Ignore, rule),
                            Say::Nothing => continue,
                        }
                    }
                };
                let is_deleted = verdict == Verdict::Delete;
                plan.deletes += u64::from(is_deleted);
                plan.decisions.push(Decision {
                    index: entry.index,
                    verdict,
                    rule,
                    // What is not there yet has no end yet either.
                    expires_at: if verdict == Verdict::Keep && rule != Rule::Create {
                        self.expiry(own, entry)
                    } else {
                        None
                    },
                    copies: if is_deleted { copies(&holders.needs, &mut lists) } else { none.clone() },
                    first_reason: u32::try_from(first_reason).unwrap_or(u32::MAX),
                    reason_count: u16::try_from(plan.reasons.len() - first_reason).unwrap_or(u16::MAX),
                });
            }
        }
        plan
    }

    fn hold(&self, entry: &Entry<'_>) -> Option<&Hold> {
        let hold = self.inventory.holds.get(&entry.snapshot.id);
        hold.filter(|hold| hold.until.is_none_or(|until| until > self.now))
    }

    /// Who holds a good snapshot beside the rules of its own policy.
    fn ask<'m>(
        &'m self,
        own: &Member<'_>,
        entry: &Entry<'_>,
        missing: &mut BTreeMap<usize, Reason>,
        holders: &mut Holders<'m>,
    ) {
        if let Some(hold) = self.hold(entry) {
            holders.add(Rule::Hold, Reason::Pinned(Box::new(hold.clone())));
        }
        let is_missing = |need: &Need| need.opens(entry.snapshot, self.now).is_none_or(|at| at > self.now);
        for need in own.needs.iter().filter(|need| is_missing(need)) {
            let reason = missing.entry(need.number).or_insert_with(|| need.reason()).clone();
            holders.add(Rule::Export, reason);
        }
        for member in self.members.iter().filter(|member| member.judgement.prunes()) {
            let say = member.judgement.standing(entry.index).say;
            if say.is_silent() {
                continue;
            }
            for need in &member.needs {
                if !holders.needs.iter().any(|known| known.number == need.number) {
                    holders.needs.push(need);
                }
            }
            if std::ptr::eq(member, own) {
                continue;
            }
            let holding = match say {
                Say::Keeps(rule) | Say::Ignores(rule) => Some(rule),
                _ => member.needs.iter().any(|need| is_missing(need)).then_some(Rule::Export),
            };
            if let Some(rule) = holding {
                let policy = member.judgement.policy.name.clone();
                holders.add(Rule::Policy, Reason::OtherPolicy { policy, rule });
            }
        }
        let needs = std::mem::take(&mut holders.needs);
        let of_others = |need: &&&Need| !own.needs.iter().any(|known| known.number == need.number);
        for need in needs.iter().filter(of_others).filter(|need| is_missing(need)) {
            let reason = missing.entry(need.number).or_insert_with(|| need.reason()).clone();
            holders.add(Rule::Export, reason);
        }
        holders.needs = needs;
    }

    /// The first instant at which nothing would hold a snapshot that is kept now.
    fn expiry(&self, own: &Member<'_>, entry: &Entry<'_>) -> Option<Timestamp> {
        if !own.judgement.prunes() {
            return None;
        }
        let pinned_until = match self.hold(entry) {
            Some(hold) => hold.until?,
            None => self.now,
        };
        first_of_all(self.now, |from| {
            let mut free = from.max(pinned_until);
            for member in self.members.iter().filter(|member| member.judgement.prunes()) {
                if member.judgement.standing(entry.index).say.is_silent() {
                    continue;
                }
                for need in &member.needs {
                    free = free.max(need.opens(entry.snapshot, from)?);
                }
                free = free.max(member.judgement.lets_go(entry.index, entry.snapshot, from)?);
            }
            Some(free)
        })
    }
}

fn copies(needs: &[&Need], lists: &mut CopyLists) -> Arc<[CopyNeeded]> {
    let numbers = || needs.iter().map(|need| need.number);
    if let Some((_, copies)) = lists.iter().find(|(known, _)| numbers().eq(known.iter().copied())) {
        return copies.clone();
    }
    let copies: Arc<[CopyNeeded]> = gate::copies(needs).into();
    lists.push((numbers().collect(), copies.clone()));
    copies
}

impl Holders<'_> {
    fn clear(&mut self) {
        self.rule = None;
        self.reasons.clear();
        self.needs.clear();
    }

    fn add(&mut self, rule: Rule, reason: Reason) {
        self.rule = self.rule.or(Some(rule));
        self.reasons.push(reason);
    }
}
