//! All policies together: what a policy would let go is brought back by the first of these that holds it: a
//! pin, a required copy that is missing, another policy.

use std::sync::Arc;

use jiff::Timestamp;

use crate::policy::Policy;
use crate::retention::export_gate::{self, Need, Unmet};
use crate::retention::grouping::{Entry, Group, Times};
use crate::retention::inventory::{Hold, Inventory};
use crate::retention::judge::{Judgement, Say, first_of_all};
use crate::retention::plan::{Decision, PolicyPlan, Terms};
use crate::retention::reason::Reason;
use crate::retention::verdict::{Rule, Verdict};
use crate::snapshot::Snapshot;

/// The policies of a zone, and what they have to respect beside each other.
#[derive(Debug)]
pub(crate) struct Council<'a> {
    members: Vec<Member<'a>>,
    inventory: &'a Inventory,
    now: Timestamp,
    foresees: bool,
}

#[derive(Debug)]
struct Member<'a> {
    judgement: Judgement<'a>,
    /// The copies that it requires.
    needs: Vec<Arc<Need>>,
}

/// A plan in the making.
#[derive(Debug)]
struct Draft {
    plan: PolicyPlan,
    /// Which needs each of the plan's lists of copies comes from.
    lists: Vec<Vec<usize>>,
    /// The number of the need of each of the plan's unmet ones.
    unmet: Vec<usize>,
}

/// What holds a snapshot beside the rules of the policy whose plan is made.
#[derive(Debug, Default)]
struct Holders {
    /// The key of the first of them.
    rule: Option<Rule>,
    reasons: Vec<Reason>,
    /// What all policies together require for it.
    needs: Vec<Arc<Need>>,
}

impl<'a> Council<'a> {
    /// With `foresees`, the plans say when what is kept would go.
    pub(crate) fn new(
        policies: &[&'a Policy],
        inventory: &'a Inventory,
        times: Times,
        now: Timestamp,
        foresees: bool,
    ) -> Self {
        let needs = export_gate::needs(policies, inventory, now);
        let members = policies.iter().zip(needs).map(|(policy, needs)| Member {
            judgement: Judgement::new(policy, inventory, times, now, foresees),
            needs,
        });
        Self { members: members.collect(), inventory, now, foresees }
    }

    /// The plan of every policy, in the order given.
    pub(crate) fn conclude(mut self, groups: &[Group<'_>]) -> Vec<PolicyPlan> {
        let mut drafts: Vec<Draft> = self.members.iter().map(|member| self.draft(member)).collect();
        let mut holders = Holders::default();
        for group in groups {
            for member in &mut self.members {
                member.judgement.judge(group);
            }
            for (own, draft) in self.members.iter().zip(&mut drafts) {
                self.decide(own, group, draft, &mut holders);
            }
        }
        let plans = self.members.iter().zip(drafts);
        let finish =
            |(member, draft): (&Member<'_>, Draft)| PolicyPlan { good: member.judgement.good, ..draft.plan };
        plans.map(finish).collect()
    }

    fn draft(&self, own: &Member<'_>) -> Draft {
        let policy = own.judgement.policy;
        let plan = PolicyPlan {
            policy: policy.name.clone(),
            at: self.now,
            decisions: Vec::new(),
            good: 0,
            deletes: 0,
            good_deletes: 0,
            reasons: Vec::new(),
            terms: Terms {
                retention: policy.retention.clone(),
                time_zone: policy.time_zone.clone(),
                holds: Vec::new(),
                policies: self.members.iter().map(|member| member.judgement.policy.name.clone()).collect(),
                unmet: Vec::new(),
                states: Vec::new(),
                copies: Vec::new(),
            },
        };
        Draft { plan, lists: Vec::new(), unmet: Vec::new() }
    }

    /// Decides what a policy selects of an instance.
    fn decide(&self, own: &Member<'_>, group: &Group<'_>, draft: &mut Draft, holders: &mut Holders) {
        // Places of others in the policy's reasons count the selected ones of the group.
        let base = number(draft.plan.decisions.len());
        draft.reserve(group.entries.len());
        for (place, entry) in group.entries.iter().enumerate() {
            let standing = own.judgement.standing(place);
            let Some(snapshot) = self.inventory.snapshots.get(entry.index as usize) else { continue };
            if standing.say == Say::Nothing {
                continue;
            }
            holders.clear();
            let is_asked = match standing.say {
                Say::Keeps(Rule::Create) | Say::Ignores(_) | Say::Nothing => false,
                Say::Keeps(_) | Say::LetsGo(_) => own.judgement.prunes(),
            };
            if is_asked {
                self.ask(own, place, entry, snapshot, draft, holders);
            }
            let first_reason = draft.plan.reasons.len();
            let (verdict, rule) = match (standing.say, holders.rule) {
                (Say::LetsGo(rule), Some(holder)) => {
                    draft.plan.reasons.append(&mut holders.reasons);
                    draft.plan.reasons.push(Reason::WouldGo(rule));
                    (Verdict::Keep, holder)
                }
                (Say::LetsGo(rule), None) => (Verdict::Delete, rule),
                (Say::Keeps(rule), _) => (Verdict::Keep, rule),
                (Say::Ignores(rule), _) => (Verdict::Ignore, rule),
                (Say::Nothing, _) => continue,
            };
            for reason in own.judgement.reasons(&standing) {
                let reason = draft.translate(*reason, base, snapshot);
                draft.plan.reasons.push(reason);
            }
            draft.plan.reasons.append(&mut holders.reasons);
            let is_deleted = verdict == Verdict::Delete;
            draft.plan.deletes += u64::from(is_deleted);
            draft.plan.good_deletes += u64::from(is_deleted && entry.is_good);
            // What is not there yet has no end yet either.
            let may_expire = self.foresees && verdict == Verdict::Keep && rule != Rule::Create;
            let decision = Decision {
                index: entry.index,
                verdict,
                rule,
                taken: entry.taken,
                expires_at: if may_expire { self.expiry(own, group, place, entry, snapshot) } else { None },
                copies: if is_deleted { draft.copies(&holders.needs) } else { None },
                first_reason: number(first_reason),
                reason_count: u16::try_from(draft.plan.reasons.len() - first_reason).unwrap_or(u16::MAX),
            };
            draft.plan.decisions.push(decision);
        }
    }

    fn hold(&self, snapshot: &Snapshot) -> Option<&Hold> {
        if self.inventory.holds.is_empty() {
            return None;
        }
        let hold = self.inventory.holds.get(&snapshot.id);
        hold.filter(|hold| hold.until.is_none_or(|until| until > self.now))
    }

    /// Who holds a snapshot beside the rules of its own policy.
    fn ask(
        &self,
        own: &Member<'_>,
        place: usize,
        entry: &Entry,
        snapshot: &Snapshot,
        draft: &mut Draft,
        holders: &mut Holders,
    ) {
        if let Some(hold) = self.hold(snapshot) {
            draft.plan.terms.holds.push(hold.clone());
            let hold = number(draft.plan.terms.holds.len() - 1);
            holders.add(Rule::Hold, Reason::OnHold { hold });
        }
        let is_missing = |need: &Need| need.opens(snapshot, self.now).is_none_or(|at| at > self.now);
        let own_needs = needs_of(own, entry);
        for need in own_needs.iter().filter(|need| is_missing(need)) {
            let need = draft.unmet(need);
            holders.add(Rule::Export, Reason::Unmet { need });
        }
        for (policy, member) in (0..).zip(&self.members) {
            let say = member.judgement.standing(place).say;
            if !member.judgement.prunes() || say.is_silent() {
                continue;
            }
            let needs = needs_of(member, entry);
            for need in needs {
                if !holders.needs.iter().any(|known| known.number == need.number) {
                    holders.needs.push(need.clone());
                }
            }
            if std::ptr::eq(member, own) {
                continue;
            }
            let holding = match say {
                Say::Keeps(rule) | Say::Ignores(rule) => Some(rule),
                _ => needs.iter().any(|need| is_missing(need)).then_some(Rule::Export),
            };
            if let Some(rule) = holding {
                holders.add(Rule::Policy, Reason::OtherPolicy { policy, rule });
            }
        }
        let needs = std::mem::take(&mut holders.needs);
        let is_of_others = |need: &&Arc<Need>| !own_needs.iter().any(|known| known.number == need.number);
        for need in needs.iter().filter(is_of_others).filter(|need| is_missing(need)) {
            let need = draft.unmet(need);
            holders.add(Rule::Export, Reason::Unmet { need });
        }
        holders.needs = needs;
    }

    /// The first instant at which nothing would hold a snapshot that is kept now.
    fn expiry(
        &self,
        own: &Member<'_>,
        group: &Group<'_>,
        place: usize,
        entry: &Entry,
        snapshot: &Snapshot,
    ) -> Option<Timestamp> {
        if !own.judgement.prunes() {
            return None;
        }
        let pinned_until = match self.hold(snapshot) {
            Some(hold) => hold.until?,
            None => self.now,
        };
        first_of_all(self.now, |from| {
            let mut free = from.max(pinned_until);
            for member in self.members.iter().filter(|member| member.judgement.prunes()) {
                if member.judgement.standing(place).say.is_silent() {
                    continue;
                }
                for need in needs_of(member, entry) {
                    free = free.max(need.opens(snapshot, from)?);
                }
                free = free.max(member.judgement.lets_go(group, place, from)?);
            }
            Some(free)
        })
    }
}

/// The copies that a policy requires before a snapshot may go: of a failed one there is nothing to copy.
fn needs_of<'m>(member: &'m Member<'_>, entry: &Entry) -> &'m [Arc<Need>] {
    if entry.is_failed { &[] } else { &member.needs }
}

fn number(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// The place of a thing in a list, at its end if it is new.
fn intern<T>(list: &mut Vec<T>, is_it: impl Fn(&T) -> bool, make: impl FnOnce() -> T) -> u32 {
    let place = list.iter().position(is_it).unwrap_or_else(|| {
        list.push(make());
        list.len() - 1
    });
    number(place)
}

impl Draft {
    /// Makes room for the decisions of a group, and for their reasons. Growing by doubling would need twice the memory
    /// at the end.
    fn reserve(&mut self, snapshots: usize) {
        fn reserve<T>(list: &mut Vec<T>, more: usize) {
            if list.capacity() - list.len() < more {
                list.reserve_exact(more.max(list.len() / 8));
            }
        }
        reserve(&mut self.plan.decisions, snapshots);
        reserve(&mut self.plan.reasons, 4 * snapshots);
    }

    /// A reason of the policy's own judgement, as the plan has it.
    fn translate(&mut self, reason: Reason, base: u32, snapshot: &Snapshot) -> Reason {
        match reason {
            Reason::NotNewestOf { rule, holder } => {
                Reason::NotNewestOf { rule, holder: base.saturating_add(holder) }
            }
            Reason::State { .. } => {
                let states = &mut self.plan.terms.states;
                let state = intern(states, |known| *known == snapshot.state, || snapshot.state.clone());
                Reason::State { state }
            }
            other => other,
        }
    }

    fn unmet(&mut self, need: &Need) -> u32 {
        let texts: &mut Vec<Unmet> = &mut self.plan.terms.unmet;
        intern(
            &mut self.unmet,
            |known| *known == need.number,
            || {
                texts.push(need.unmet());
                need.number
            },
        )
    }

    fn copies(&mut self, needs: &[Arc<Need>]) -> Option<u32> {
        if needs.is_empty() {
            return None;
        }
        let numbers = || needs.iter().map(|need| need.number);
        let copies = &mut self.plan.terms.copies;
        Some(intern(
            &mut self.lists,
            |known| numbers().eq(known.iter().copied()),
            || {
                copies.push(export_gate::copies(needs));
                numbers().collect()
            },
        ))
    }
}

impl Holders {
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
