//! What one policy says of each snapshot by itself: without pins, other policies and required copies.

use std::collections::HashMap;

use jiff::Timestamp;

use crate::policy::{Policy, Retention};
use crate::retention::age::AgeLimit;
use crate::retention::inventory::Inventory;
use crate::retention::order::counted_from;
use crate::retention::order::{Entry, Group};
use crate::retention::reason::Reason;
use crate::retention::verdict::Rule;
use crate::snapshot::{InstanceId, Snapshot};

/// What a policy says of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Say {
    /// Nothing: it does not select it.
    Nothing,
    /// It does not judge it, because of this.
    Ignores(Rule),
    /// It keeps it, by this.
    Keeps(Rule),
    /// It lets it go, by this.
    LetsGo(Rule),
}

impl Say {
    /// Whether it leaves others alone with it: it does not select it, or it is not this program's.
    pub(crate) fn is_silent(self) -> bool {
        matches!(self, Self::Nothing | Self::Ignores(Rule::Foreign))
    }
}

/// Where a snapshot stands with a policy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Standing {
    pub(crate) say: Say,
    /// How many reasons it has.
    pub(crate) reasons: u8,
    /// Its place among those of its instance that are judged; the newest has 1.
    place: u32,
}

const UNSELECTED: Standing = Standing { say: Say::Nothing, reasons: 0, place: 0 };

/// One policy's judgement of a zone.
#[derive(Debug)]
pub(crate) struct Judgement<'a> {
    pub(crate) policy: &'a Policy,
    /// The reasons of the selected ones, one after the other in the order of the groups.
    pub(crate) reasons: Vec<Reason>,
    /// How many are judged and there.
    pub(crate) good: u64,
    rules: Option<Rules<'a>>,
    /// By place in the inventory.
    standings: Vec<Standing>,
    /// When those that are dated in the future will be judged, the first one first.
    coming: HashMap<InstanceId, Vec<Timestamp>>,
}

/// A retention table at a moment.
#[derive(Debug)]
struct Rules<'a> {
    table: &'a Retention,
    keep_within: Option<AgeLimit>,
    max_age: Option<AgeLimit>,
}

impl<'a> Judgement<'a> {
    /// Judges everything that the policy selects. `taken` is when the first and the last that can be judged were
    /// taken.
    pub(crate) fn new(
        policy: &'a Policy,
        groups: &[Group<'_>],
        inventory: &Inventory,
        taken: Option<(Timestamp, Timestamp)>,
        now: Timestamp,
    ) -> Self {
        let limit = |rule, span: &Option<_>| {
            span.as_ref().map(|span| AgeLimit::new(rule, span, &policy.time_zone, now, taken))
        };
        let rules = policy.retention.as_ref().map(|table| Rules {
            table,
            keep_within: limit(Rule::KeepWithin, &table.keep_within),
            max_age: limit(Rule::MaxAge, &table.max_age),
        });
        let mut judgement = Self {
            policy,
            reasons: Vec::new(),
            good: 0,
            rules,
            standings: vec![UNSELECTED; inventory.snapshots.len()],
            coming: HashMap::new(),
        };
        for group in groups {
            if policy.select.selects_instance(group.instance_id, group.instance) {
                judgement.judge_group(group, inventory, now);
            }
        }
        judgement
    }

    fn judge_group(&mut self, group: &Group<'_>, inventory: &Inventory, now: Timestamp) {
        let select = &self.policy.select;
        let orphan = match (group.instance_id, group.instance) {
            (None, _) => Some(Reason::NoInstance),
            (Some(_), None) if !select.judge_orphans => Some(Reason::Orphan),
            (Some(_), _) => None,
        };
        let mut coming = Vec::new();
        let (mut place, mut wanted) = (0, 0);
        for Entry { index, snapshot } in &group.entries {
            // Of one that is not there yet nothing is known that could speak against it.
            let is_coming = inventory.coming.contains(&snapshot.id);
            if !is_coming && !select.selects_snapshot(snapshot) {
                continue;
            }
            let reasons_before = self.reasons.len();
            let say = if is_coming {
                place += 1;
                self.reasons.push(Reason::Create);
                if let Some(rules) = &self.rules {
                    // It counts as any other does; what the rules say of it is not told.
                    rules.judge(snapshot, place, &mut wanted, &mut Vec::new());
                }
                Say::Keeps(Rule::Create)
            } else if select.only_created && !inventory.created.contains(&snapshot.id) {
                self.reasons.push(Reason::Foreign);
                Say::Ignores(Rule::Foreign)
            } else if let Some(rule) = ignored(snapshot, orphan.as_ref(), now, &mut self.reasons) {
                if orphan.is_none() && snapshot.state.is_good() {
                    coming.push(counted_from(snapshot.created_at));
                }
                Say::Ignores(rule)
            } else {
                place += 1;
                self.good += 1;
                if let Some(rules) = &self.rules {
                    rules.judge(snapshot, place, &mut wanted, &mut self.reasons)
                } else {
                    self.reasons.push(Reason::NothingPruned);
                    Say::Keeps(Rule::NoKeepRule)
                }
            };
            if let Some(standing) = self.standings.get_mut(*index as usize) {
                // There are fewer reasons than keys of a policy.
                let reasons = u8::try_from(self.reasons.len() - reasons_before).unwrap_or(u8::MAX);
                *standing = Standing { say, reasons, place };
            }
        }
        if let Some(id) = group.instance_id
            && !coming.is_empty()
        {
            coming.reverse();
            self.coming.insert(id, coming);
        }
    }

    /// Whether the policy prunes at all, and so has a say about what others prune.
    pub(crate) fn prunes(&self) -> bool {
        self.rules.is_some()
    }

    /// Where the snapshot at this place of the inventory stands.
    pub(crate) fn standing(&self, index: u32) -> Standing {
        self.standings.get(index as usize).copied().unwrap_or(UNSELECTED)
    }

    /// The first instant, `from` or later, at which the policy lets the snapshot go, if nothing comes or changes.
    /// One of which it says nothing it never holds; one that it ignores it never lets go.
    pub(crate) fn lets_go(&self, index: u32, snapshot: &Snapshot, from: Timestamp) -> Option<Timestamp> {
        let rules = self.rules.as_ref()?;
        let standing = self.standing(index);
        match standing.say {
            say if say.is_silent() => return Some(from),
            Say::Nothing | Say::Ignores(_) => return None,
            Say::Keeps(_) | Say::LetsGo(_) => {}
        }
        let coming = snapshot.instance_id.and_then(|id| self.coming.get(&id)).map_or(&[][..], Vec::as_slice);
        // Newer ones are never let go before older ones, so places change only by what is dated in the future,
        // and the place among those that are wanted is the same.
        let beyond = |count: u32, from: Timestamp| match count.checked_sub(standing.place) {
            None => Some(from),
            Some(missing) => coming.get(missing as usize).map(|at| from.max(*at)),
        };
        let taken = snapshot.created_at;
        let unwanted = |from| {
            if rules.wants_all() {
                return None;
            }
            first_of_all(from, |from| {
                let last = rules.table.keep_last.map_or(Some(from), |count| beyond(count.get(), from));
                let within = rules.keep_within.as_ref();
                let within = within.map_or(Some(from), |limit| limit.first_passed(taken, from));
                Some(last?.max(within?))
            })
        };
        first_of_all(from, |from| {
            let unprotected = beyond(rules.table.min_keep, from)?;
            let too_old = rules.max_age.as_ref().and_then(|limit| limit.first_passed(taken, from));
            let too_many = rules.table.max_count.and_then(|count| beyond(count.get(), from));
            let released = [unwanted(from), too_old, too_many].into_iter().flatten().min()?;
            Some(unprotected.max(released))
        })
    }
}

/// The first instant, `from` or later, at which every one of some conditions holds; `next` gives the latest of
/// the first instants, from a given one on, at which each holds.
pub(crate) fn first_of_all(
    mut from: Timestamp,
    next: impl Fn(Timestamp) -> Option<Timestamp>,
) -> Option<Timestamp> {
    // A condition that held may cease to while another is waited for: calendar limits also fall back.
    loop {
        match next(from)? {
            same if same == from => return Some(from),
            later => from = later,
        }
    }
}

impl Rules<'_> {
    fn wants_all(&self) -> bool {
        self.table.keep_last.is_none() && self.keep_within.is_none()
    }

    /// Judges a good one at its place; `wanted` counts those of its instance that are wanted and not too old.
    fn judge(&self, snapshot: &Snapshot, place: u32, wanted: &mut u32, reasons: &mut Vec<Reason>) -> Say {
        let taken = snapshot.created_at;
        let is_too_old = self.max_age.as_ref().is_some_and(|limit| limit.is_passed(taken));
        let is_protected = place <= self.table.min_keep;
        let reasons_before = reasons.len();

        let released = match self.keep(taken, place, reasons) {
            None => Rule::NotWanted,
            Some(_) if is_too_old => Rule::MaxAge,
            Some(keeper) => {
                *wanted += 1;
                if self.table.max_count.is_none_or(|count| *wanted <= count.get()) {
                    if is_protected {
                        reasons.push(Reason::MinKeep { place, count: self.table.min_keep });
                    }
                    return Say::Keeps(keeper);
                }
                Rule::MaxCount
            }
        };

        // What wants it does not hold it after all.
        reasons.truncate(reasons_before);
        if is_protected {
            reasons.push(Reason::MinKeep { place, count: self.table.min_keep });
            reasons.push(Reason::WouldGo(released));
        }
        self.explain(released, taken, place, *wanted, reasons);
        if is_protected { Say::Keeps(Rule::MinKeep) } else { Say::LetsGo(released) }
    }

    /// The first keep rule that wants it, and all of them as reasons.
    fn keep(&self, taken: Timestamp, place: u32, reasons: &mut Vec<Reason>) -> Option<Rule> {
        if self.wants_all() {
            reasons.push(Reason::NoKeepRule);
            return Some(Rule::NoKeepRule);
        }
        let mut keeper = None;
        if let Some(count) = self.table.keep_last.filter(|count| place <= count.get()) {
            reasons.push(Reason::Last { place, count: count.get() });
            keeper = keeper.or(Some(Rule::KeepLast));
        }
        if let Some(limit) = self.keep_within.as_ref().filter(|limit| !limit.is_passed(taken)) {
            reasons.push(Reason::Within(limit.cutoff.clone()));
            keeper = keeper.or(Some(Rule::KeepWithin));
        }
        keeper
    }

    /// Why a rule lets it go.
    fn explain(&self, rule: Rule, taken: Timestamp, place: u32, wanted: u32, reasons: &mut Vec<Reason>) {
        let past = |limit: &Option<AgeLimit>| {
            let passed = limit.as_ref().filter(|limit| limit.is_passed(taken));
            passed.map(|limit| Reason::TooOld(limit.cutoff.clone()))
        };
        if rule == Rule::NotWanted {
            let count = self.table.keep_last;
            reasons.push(Reason::NotWanted);
            reasons.extend(count.map(|count| Reason::NotLast { place, count: count.get() }));
            reasons.extend(past(&self.keep_within));
        }
        if rule == Rule::MaxCount {
            let count = self.table.max_count;
            reasons.extend(count.map(|count| Reason::TooMany { place: wanted, count: count.get() }));
        }
        reasons.extend(past(&self.max_age));
    }
}

/// Why a snapshot is not judged, if so: every reason, and the key of the first.
fn ignored(
    snapshot: &Snapshot,
    orphan: Option<&Reason>,
    now: Timestamp,
    reasons: &mut Vec<Reason>,
) -> Option<Rule> {
    let future = counted_from(snapshot.created_at) > now;
    let future = future.then_some((Rule::Future, Reason::Future { taken: snapshot.created_at }));
    let state = !snapshot.state.is_good();
    let state = state.then(|| (Rule::State, Reason::State(snapshot.state.clone())));
    let orphan = orphan.map(|orphan| (Rule::Orphan, orphan.clone()));
    let mut rule = None;
    for (key, reason) in future.into_iter().chain(state).chain(orphan) {
        rule = rule.or(Some(key));
        reasons.push(reason);
    }
    rule
}
