//! What one policy says of each snapshot by itself: without pins, other policies and required copies.
//!
//! One instance after the other, each in a single walk from the newest snapshot to the oldest: what a rule holds
//! depends on newer ones alone, but for the oldest, which a rule with a slot left holds at the end of the walk.

use jiff::Timestamp;

use crate::policy::{Count, Period, Policy, Retention};
use crate::retention::age::AgeLimit;
use crate::retention::calendar::{Calendar, Periods};
use crate::retention::grouping::{Entry, Group, Times, counted_from, latest_counted};
use crate::retention::inventory::Inventory;
use crate::retention::reason::Reason;
use crate::retention::verdict::Rule;
use crate::snapshot::Snapshot;

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
    /// Its reasons among those of its group: from here on, so many.
    pub(crate) first_reason: u32,
    pub(crate) reasons: u16,
    /// Its place among those of its instance that are judged, the newest has 1; of a failed one, how many of them
    /// are newer.
    place: u32,
    /// Of which periods it is the newest, one bit each; only those that a rule asks for.
    newest_of: u8,
    /// Which rules hold it for ever if nothing newer comes: `keep_last`, or a period rule that counts. One bit each.
    counted_by: u8,
    room: Room,
}

/// Whether `max_count` may let a snapshot go one day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    /// It never will: fewer newer ones will ever be wanted.
    Enough,
    /// It does at any time: enough newer ones are wanted for ever.
    None,
    /// That changes with what is wanted at the time.
    Depends,
}

const UNSELECTED: Standing = Standing {
    say: Say::Nothing,
    first_reason: 0,
    reasons: 0,
    place: 0,
    newest_of: 0,
    counted_by: 0,
    room: Room::Enough,
};

/// The bit of `keep_last` in [`Standing::counted_by`]; the periods have those below.
const KEEP_LAST_BIT: u8 = 1 << 5;

fn bit(period: Period) -> u8 {
    1 << (period as u8)
}

/// One policy's judgement, of one instance at a time.
#[derive(Debug)]
pub(crate) struct Judgement<'a> {
    pub(crate) policy: &'a Policy,
    /// How many are judged and there, in all instances so far.
    pub(crate) good: u64,
    inventory: &'a Inventory,
    now: Timestamp,
    /// The latest time that one may bear to be judged.
    latest: Timestamp,
    rules: Option<Rules<'a>>,
    /// Of the present group, by place in it.
    standings: Vec<Standing>,
    /// Of the present group: the reasons of the selected ones, one after the other.
    reasons: Vec<Reason>,
    /// Of the present group: how many are selected.
    selected: u32,
    /// Of the present group: how many are judged.
    judged: u32,
    /// Of the present group: those dated in the future that will be judged, the first one first: from when on, and
    /// when they say they were taken.
    later: Vec<(Timestamp, Timestamp)>,
    /// One for each period rule.
    walks: Vec<Walk>,
    /// Of the present group: what the later ones change for each period rule; empty if there are none.
    arrivals: Vec<Arrivals>,
    /// Whether anybody will ask when something goes.
    foresees: bool,
    times: Times,
    /// What the rules that do not hold a snapshot say of it; used again and again.
    misses: Vec<Reason>,
}

/// What those that are dated in the future change for a period rule, once they are judged.
#[derive(Debug, Default)]
struct Arrivals {
    /// When the first of them takes the place of the newest one that is judged now, if they share a period.
    displaced: Option<Timestamp>,
    /// When each period begins that has none yet, the first one first.
    periods: Vec<Timestamp>,
}

/// What is counted on the way from the newest to the oldest.
#[derive(Debug, Default)]
struct Tally {
    /// Those that are wanted and not too old.
    wanted: u32,
    /// Those that are wanted now or may be later.
    ever: u32,
    /// Those that are wanted for ever.
    always: u32,
}

/// A retention table at a moment.
#[derive(Debug)]
struct Rules<'a> {
    table: &'a Retention,
    keep_within: Option<AgeLimit<'a>>,
    /// In the order in which reasons are told: those with a count first.
    periodic: Vec<PeriodRule<'a>>,
    max_age: Option<AgeLimit<'a>>,
    failed_after: Option<AgeLimit<'a>>,
    /// None if no rule asks for it.
    calendar: Option<Calendar>,
    wants_all: bool,
}

/// A rule that holds the newest of each period.
#[derive(Debug)]
struct PeriodRule<'a> {
    rule: Rule,
    period: Period,
    bound: Bound<'a>,
}

/// Of how many periods.
#[derive(Debug)]
enum Bound<'a> {
    /// Of so many.
    Slots(Count),
    /// Of those whose newest is inside the limit.
    Within(AgeLimit<'a>),
}

/// How far a period rule has come on its way from the newest to the oldest.
#[derive(Debug, Clone, Copy, Default)]
struct Walk {
    /// The period of the last one, and its newest: the place among the selected, and whether the rule holds it.
    period: Option<(i64, u32, bool)>,
    /// The period of the first one.
    first: Option<i64>,
    /// How many it holds as the newest of their periods.
    used: u32,
}

impl<'a> Judgement<'a> {
    /// A judgement at `now` of snapshots that were taken at these times. With `foresees`, [`Self::lets_go`] may be
    /// asked.
    pub(crate) fn new(
        policy: &'a Policy,
        inventory: &'a Inventory,
        times: Times,
        now: Timestamp,
        foresees: bool,
    ) -> Self {
        let rules = policy.retention.as_ref().map(|table| Rules::new(table, policy, times, now));
        Self {
            times,
            foresees,
            arrivals: Vec::new(),
            policy,
            good: 0,
            inventory,
            now,
            latest: latest_counted(now),
            walks: vec![Walk::default(); rules.as_ref().map_or(0, |rules| rules.periodic.len())],
            rules,
            standings: Vec::new(),
            reasons: Vec::new(),
            selected: 0,
            judged: 0,
            later: Vec::new(),
            misses: Vec::new(),
        }
    }

    /// Judges what the policy selects of an instance; what was said of the one before is forgotten.
    pub(crate) fn judge(&mut self, group: &Group<'_>) {
        self.standings.clear();
        self.standings.resize(group.entries.len(), UNSELECTED);
        self.reasons.clear();
        self.later.clear();
        self.arrivals.clear();
        self.walks.fill(Walk::default());
        (self.selected, self.judged) = (0, 0);
        let select = &self.policy.select;
        if !select.selects_instance(group.instance_id, group.instance) {
            return;
        }
        let orphan = match (group.instance_id, group.instance) {
            (None, _) => Some(Reason::NoInstance),
            (Some(_), None) if !select.judge_orphans => Some(Reason::Orphan),
            (Some(_), _) => None,
        };
        let oldest = self.oldest(group, orphan.is_some());
        let mut tally = Tally::default();
        for (place_in_group, entry) in group.entries.iter().enumerate() {
            let Some(snapshot) = self.inventory.snapshots.get(entry.index as usize) else { continue };
            let is_coming = self.is_coming(snapshot);
            if !is_coming && !select.selects_snapshot(snapshot) {
                continue;
            }
            let first_reason = self.reasons.len();
            let mut standing = UNSELECTED;
            if is_coming {
                // Of one that is not there yet nothing is known that could speak against it. It counts as any other
                // does; what the rules say of it is not told.
                self.judged += 1;
                self.apply(&mut standing, entry.taken, oldest == Some(place_in_group), &mut tally);
                self.reasons.truncate(first_reason);
                self.reasons.push(Reason::Create);
                standing.say = Say::Keeps(Rule::Create);
            } else if select.only_created && !self.inventory.created.contains(&snapshot.id) {
                self.reasons.push(Reason::Foreign);
                standing.say = Say::Ignores(Rule::Foreign);
            } else if entry.taken > self.latest || !entry.is_good || orphan.is_some() {
                standing.place = self.judged;
                standing.say = self.pass_over(entry, orphan);
                if orphan.is_none() && entry.is_good {
                    self.later.push((counted_from(entry.taken), entry.taken));
                }
            } else {
                self.judged += 1;
                self.good += 1;
                standing.say =
                    self.apply(&mut standing, entry.taken, oldest == Some(place_in_group), &mut tally);
            }
            self.selected += 1;
            standing.first_reason = count(first_reason);
            standing.reasons = u16::try_from(self.reasons.len() - first_reason).unwrap_or(u16::MAX);
            if let Some(place) = self.standings.get_mut(place_in_group) {
                *place = standing;
            }
        }
        self.later.reverse();
        if self.foresees && !self.later.is_empty() {
            self.arrivals = self.arrivals();
        }
    }

    fn is_coming(&self, snapshot: &Snapshot) -> bool {
        !self.inventory.coming.is_empty() && self.inventory.coming.contains(&snapshot.id)
    }

    /// The place in the group of the oldest one that is judged, if it matters.
    fn oldest(&self, group: &Group<'_>, is_orphan: bool) -> Option<usize> {
        let rules = self.rules.as_ref()?;
        if !rules.table.keep_oldest || rules.periodic.is_empty() {
            return None;
        }
        let select = &self.policy.select;
        group.entries.iter().rposition(|entry| {
            self.inventory.snapshots.get(entry.index as usize).is_some_and(|snapshot| {
                let is_meant = || !select.only_created || self.inventory.created.contains(&snapshot.id);
                let is_good = entry.is_good && entry.taken <= self.latest;
                self.is_coming(snapshot)
                    || is_good && !is_orphan && is_meant() && select.selects_snapshot(snapshot)
            })
        })
    }

    /// Why a snapshot is not judged: every reason, and what that means for it.
    fn pass_over(&mut self, entry: &Entry, orphan: Option<Reason>) -> Say {
        let mut rule = None;
        if entry.taken > self.latest {
            rule = rule.or(Some(Rule::Future));
            self.reasons.push(Reason::Future);
        }
        if !entry.is_good {
            let limit = self.rules.as_ref().and_then(|rules| rules.failed_after.as_ref());
            match limit.filter(|_| entry.is_failed && orphan.is_none()) {
                Some(limit) if rule.is_none() && self.judged > 0 && limit.is_passed(entry.taken) => {
                    self.reasons.push(Reason::Failed);
                    return Say::LetsGo(Rule::FailedAfter);
                }
                Some(_) if self.judged == 0 => self.reasons.push(Reason::FailedLast),
                Some(_) => self.reasons.push(Reason::FailedYoung),
                // Which of the plan's states is told by whoever makes the plan.
                None => self.reasons.push(Reason::State { state: 0 }),
            }
            rule = rule.or(Some(Rule::State));
        }
        if let Some(orphan) = orphan {
            rule = rule.or(Some(Rule::Orphan));
            self.reasons.push(orphan);
        }
        Say::Ignores(rule.unwrap_or(Rule::State))
    }

    /// Applies the rules to the next one that is judged.
    fn apply(
        &mut self,
        standing: &mut Standing,
        taken: Timestamp,
        is_oldest: bool,
        tally: &mut Tally,
    ) -> Say {
        standing.place = self.judged;
        let Some(rules) = &self.rules else {
            self.reasons.push(Reason::NothingPruned);
            return Say::Keeps(Rule::NoKeepRule);
        };
        let place = standing.place;
        let first_reason = self.reasons.len();
        self.misses.clear();
        // Only whoever asks when something goes, and only `max_count`, makes it matter that a limit may fall back.
        let counts_room = self.foresees && rules.table.max_count.is_some() && !rules.is_monotone();
        let returns_to = |limit: &AgeLimit<'_>| counts_room && limit.is_ever_inside(taken);
        let mut may_return = false;
        let mut keeper = None;
        let mut hold = |reason: Reason, rule: Rule, reasons: &mut Vec<Reason>| {
            reasons.push(reason);
            keeper = keeper.or(Some(rule));
        };

        if rules.wants_all {
            hold(Reason::NoKeepRule, Rule::NoKeepRule, &mut self.reasons);
        }
        match rules.table.keep_last {
            Some(count) if count.has_place(place) => {
                standing.counted_by |= KEEP_LAST_BIT;
                hold(Reason::Last { place }, Rule::KeepLast, &mut self.reasons);
            }
            Some(_) => self.misses.push(Reason::NotLast { place }),
            None => {}
        }
        if let Some(limit) = &rules.keep_within {
            if limit.is_passed(taken) {
                self.misses.push(Reason::TooOld(Rule::KeepWithin));
                may_return = returns_to(limit);
            } else {
                hold(Reason::Within, Rule::KeepWithin, &mut self.reasons);
            }
        }
        let periods = rules.calendar.as_ref().map(|calendar| calendar.periods(taken));
        for (rule, walk) in rules.periodic.iter().zip(&mut self.walks) {
            let Some(periods) = &periods else { continue };
            let step = walk.step(rule, periods, taken, self.selected);
            if step.is_newest {
                standing.newest_of |= bit(rule.period);
            }
            let oldest = || is_oldest && rule.has_slot(walk.used, taken);
            let wanted = match step.said {
                Ok(reason) => Some(reason),
                Err(_) if oldest() => Some(Reason::Oldest { rule: rule.rule }),
                Err(miss) => {
                    self.misses.push(miss);
                    None
                }
            };
            match (&rule.bound, wanted) {
                (Bound::Slots(_), Some(reason)) => {
                    standing.counted_by |= bit(rule.period);
                    hold(reason, rule.rule, &mut self.reasons);
                }
                (Bound::Within(_), Some(reason)) => hold(reason, rule.rule, &mut self.reasons),
                (Bound::Within(limit), None) => {
                    may_return |= (step.is_newest || is_oldest) && returns_to(limit);
                }
                (Bound::Slots(_), None) => {}
            }
        }
        let keeper = keeper;

        let is_too_old = rules.max_age.as_ref().is_some_and(|limit| limit.is_passed(taken));
        if counts_room {
            standing.room = tally.room(rules, self.later.len());
            tally.ever += u32::from(keeper.is_some() || may_return);
            tally.always += u32::from(rules.wants_all || standing.counted_by != 0);
        }
        let is_protected = place <= rules.table.min_keep;
        let released = match keeper {
            None => Rule::NotWanted,
            Some(_) if is_too_old => Rule::MaxAge,
            Some(keeper) => {
                tally.wanted += 1;
                if rules.table.max_count.is_none_or(|count| tally.wanted <= count.get()) {
                    if is_protected {
                        self.reasons.push(Reason::MinKeep { place });
                    }
                    return Say::Keeps(keeper);
                }
                Rule::MaxCount
            }
        };
        // What wants it does not hold it after all.
        self.reasons.truncate(first_reason);
        if is_protected {
            self.reasons.extend([Reason::MinKeep { place }, Reason::WouldGo(released)]);
        }
        match released {
            Rule::NotWanted => {
                self.reasons.push(Reason::NotWanted);
                self.reasons.append(&mut self.misses);
            }
            Rule::MaxCount => self.reasons.push(Reason::TooMany { place: tally.wanted }),
            _ => {}
        }
        if is_too_old {
            self.reasons.push(Reason::TooOld(Rule::MaxAge));
        }
        if is_protected { Say::Keeps(Rule::MinKeep) } else { Say::LetsGo(released) }
    }

    /// Whether the policy prunes at all, and so has a say about what others prune.
    pub(crate) fn prunes(&self) -> bool {
        self.rules.is_some()
    }

    /// Where the snapshot at this place of the present group stands.
    pub(crate) fn standing(&self, place: usize) -> Standing {
        self.standings.get(place).copied().unwrap_or(UNSELECTED)
    }

    /// Why, as far as this policy goes; places of others count the selected ones of the group.
    pub(crate) fn reasons(&self, standing: &Standing) -> &[Reason] {
        let first = standing.first_reason as usize;
        self.reasons.get(first..first + usize::from(standing.reasons)).unwrap_or_default()
    }

    /// The first instant, `from` or later, at which the policy lets the snapshot at this place of the group go, if
    /// nothing comes or changes. One of which it says nothing it never holds; one that it ignores it never lets go,
    /// but for a failed one.
    pub(crate) fn lets_go(&self, group: &Group<'_>, place: usize, from: Timestamp) -> Option<Timestamp> {
        let rules = self.rules.as_ref()?;
        let standing = self.standing(place);
        let taken = group.entries.get(place)?.taken;
        match standing.say {
            say if say.is_silent() => return Some(from),
            Say::Ignores(Rule::State) | Say::LetsGo(Rule::FailedAfter) => {
                return self.lets_failed_go(rules, &standing, taken, from);
            }
            Say::LetsGo(_) if from == self.now => return Some(from),
            Say::Nothing | Say::Ignores(_) => return None,
            Say::Keeps(_) | Say::LetsGo(_) => {}
        }
        if standing.room == Room::Depends {
            return self.lets_go_by_trial(rules, group, place, from);
        }
        first_of_all(from, |from| {
            let unprotected = self.beyond(standing.place, rules.table.min_keep, from)?;
            let too_old = rules.max_age.as_ref().and_then(|limit| limit.first_passed(taken, from));
            let too_many = if standing.room == Room::None {
                Some(from)
            } else if rules.is_monotone() {
                rules.table.max_count.and_then(|count| self.beyond(standing.place, count.get(), from))
            } else {
                None
            };
            let unwanted = self.unwanted(rules, &standing, taken, from);
            let released = [unwanted, too_old, too_many].into_iter().flatten().min()?;
            Some(unprotected.max(released))
        })
    }

    /// When a place moves beyond a count: places change only by what is dated in the future.
    fn beyond(&self, place: u32, count: u32, from: Timestamp) -> Option<Timestamp> {
        match count.checked_sub(place) {
            None => Some(from),
            Some(missing) => self.later.get(missing as usize).map(|(at, _)| from.max(*at)),
        }
    }

    /// The first instant, `from` or later, at which no keep rule wants it.
    fn unwanted(
        &self,
        rules: &Rules<'_>,
        standing: &Standing,
        taken: Timestamp,
        from: Timestamp,
    ) -> Option<Timestamp> {
        if rules.wants_all || standing.counted_by != 0 && self.later.is_empty() {
            return None;
        }
        first_of_all(from, |from| {
            let mut free = from;
            if let Some(Count::Of(count)) = rules.table.keep_last {
                free = free.max(self.beyond(standing.place, count.get(), from)?);
            } else if rules.table.keep_last == Some(Count::All) {
                return None;
            }
            if let Some(limit) = &rules.keep_within {
                free = free.max(limit.first_passed(taken, from)?);
            }
            for number in 0..rules.periodic.len() {
                free = free.max(self.released(rules, number, standing, taken, from)?);
            }
            Some(free)
        })
    }

    /// The first instant, `from` or later, at which a period rule does not hold it.
    fn released(
        &self,
        rules: &Rules<'_>,
        number: usize,
        standing: &Standing,
        taken: Timestamp,
        from: Timestamp,
    ) -> Option<Timestamp> {
        let rule = rules.periodic.get(number)?;
        let arrivals = self.arrivals.get(number);
        let is_newest = standing.newest_of & bit(rule.period) != 0;
        let is_oldest = standing.place == self.judged && rules.table.keep_oldest;
        // Only the newest of all is the newest of a period that may go on.
        let displaced = arrivals.filter(|_| standing.place == 1).and_then(|arrivals| arrivals.displaced);
        let displaced = displaced.map(|at| at.max(from));
        match &rule.bound {
            Bound::Slots(_) if standing.counted_by & bit(rule.period) == 0 => Some(from),
            Bound::Slots(Count::All) => displaced.filter(|_| !is_oldest),
            Bound::Slots(Count::Of(count)) => {
                // When so many new periods have come that a place is none any more.
                let crowded_out = |place: u32| match count.get().checked_sub(place) {
                    None => Some(from),
                    Some(left) => {
                        let begins = arrivals.and_then(|arrivals| arrivals.periods.get(left as usize));
                        begins.map(|at| from.max(*at))
                    }
                };
                let place = self.reasons(standing).iter().find_map(|reason| match reason {
                    Reason::NewestOf { rule: by, place } if *by == rule.rule => Some(*place),
                    _ => None,
                });
                // As the newest of its period it needs the slot of its place; as the oldest, one more than are used.
                let as_newest =
                    place.map(|place| [crowded_out(place), displaced].into_iter().flatten().min());
                let used = self.walks.get(number).map_or(0, |walk| walk.used);
                match (as_newest, is_oldest.then(|| crowded_out(used.saturating_add(1)))) {
                    (Some(as_newest), Some(as_oldest)) => Some(as_newest?.max(as_oldest?)),
                    (Some(only), None) | (None, Some(only)) => only,
                    (None, None) => Some(from),
                }
            }
            Bound::Within(limit) if is_oldest => limit.first_passed(taken, from),
            Bound::Within(limit) if is_newest => {
                [limit.first_passed(taken, from), displaced].into_iter().flatten().min()
            }
            Bound::Within(_) => Some(from),
        }
    }

    /// What those that are dated in the future change for each period rule.
    fn arrivals(&self) -> Vec<Arrivals> {
        let Some((rules, calendar)) =
            self.rules.as_ref().and_then(|rules| Some((rules, rules.calendar.as_ref()?)))
        else {
            return Vec::new();
        };
        let walks = rules.periodic.iter().zip(&self.walks);
        let arrivals = walks.map(|(rule, walk)| {
            let mut arrivals = Arrivals::default();
            let mut last = walk.first;
            for (at, taken) in &self.later {
                let this = calendar.periods(*taken).of(rule.period);
                if last == Some(this) {
                    let is_first = arrivals.periods.is_empty();
                    arrivals.displaced = arrivals.displaced.or(Some(*at).filter(|_| is_first));
                } else {
                    last = Some(this);
                    arrivals.periods.push(*at);
                }
            }
            arrivals
        });
        arrivals.collect()
    }

    /// Like [`Self::lets_go`], by judging anew at every instant at which anything may turn: what `max_count` lets go
    /// depends on what all newer ones are at that time.
    fn lets_go_by_trial(
        &self,
        rules: &Rules<'a>,
        group: &Group<'_>,
        place: usize,
        from: Timestamp,
    ) -> Option<Timestamp> {
        let taken = group.entries.get(place)?.taken;
        let limits = rules.limits().flat_map(|limit| limit.turns(taken, from));
        let later = self.later.iter().map(|(at, _)| *at).filter(|at| *at >= from);
        let mut turns: Vec<Timestamp> = std::iter::once(from).chain(later).chain(limits).collect();
        turns.sort_unstable();
        turns.dedup();
        turns.into_iter().find(|turn| {
            let mut then = Judgement::new(self.policy, self.inventory, self.times, *turn, false);
            then.judge(group);
            matches!(then.standing(place).say, Say::LetsGo(_))
        })
    }

    /// When a failed one is old enough and there is a newer good one.
    fn lets_failed_go(
        &self,
        rules: &Rules<'_>,
        standing: &Standing,
        taken: Timestamp,
        from: Timestamp,
    ) -> Option<Timestamp> {
        let limit = rules.failed_after.as_ref()?;
        let is_failed =
            |reason: &Reason| matches!(reason, Reason::Failed | Reason::FailedYoung | Reason::FailedLast);
        if !self.reasons(standing).iter().any(is_failed) {
            return None;
        }
        let outlived = if standing.place > 0 { from } else { self.later.first()?.0.max(from) };
        first_of_all(outlived, |from| limit.first_passed(taken, from))
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

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

impl Tally {
    /// What `max_count` may ever do to the next one that is judged, with so many more to come.
    fn room(&self, rules: &Rules<'_>, later: usize) -> Room {
        let Some(max) = rules.table.max_count else { return Room::Enough };
        if u64::from(self.ever) + 1 + later as u64 <= u64::from(max.get()) {
            Room::Enough
        } else if later == 0 && self.always >= max.get() {
            Room::None
        } else {
            Room::Depends
        }
    }
}

/// What a rule says of the next one.
struct Step {
    /// Whether it is the newest of its period.
    is_newest: bool,
    /// Why the rule holds it, or why not.
    said: Result<Reason, Reason>,
}

impl Walk {
    /// Takes the next one, which is the given one of the selected.
    fn step(&mut self, rule: &PeriodRule<'_>, periods: &Periods, taken: Timestamp, selected: u32) -> Step {
        let this = periods.of(rule.period);
        if let Some((_, holder, is_held)) = self.period.filter(|(last, ..)| *last == this) {
            let is_too_old = matches!(&rule.bound, Bound::Within(limit) if limit.is_passed(taken));
            let miss = match (is_too_old, is_held) {
                (true, _) => Reason::TooOld(rule.rule),
                (false, true) => Reason::NotNewestOf { rule: rule.rule, holder },
                (false, false) => Reason::NoSlot { rule: rule.rule },
            };
            return Step { is_newest: false, said: Err(miss) };
        }
        let is_held = rule.has_slot(self.used, taken);
        self.first = self.first.or(Some(this));
        self.period = Some((this, selected, is_held));
        self.used += u32::from(is_held);
        let said = match (is_held, &rule.bound) {
            (true, _) => Ok(Reason::NewestOf { rule: rule.rule, place: self.used }),
            (false, Bound::Slots(_)) => Err(Reason::NoSlot { rule: rule.rule }),
            (false, Bound::Within(_)) => Err(Reason::TooOld(rule.rule)),
        };
        Step { is_newest: true, said }
    }
}

impl PeriodRule<'_> {
    /// Whether it may hold one more, which was taken then, beside those that it holds.
    fn has_slot(&self, used: u32, taken: Timestamp) -> bool {
        match &self.bound {
            Bound::Slots(count) => count.has_place(used.saturating_add(1)),
            Bound::Within(limit) => !limit.is_passed(taken),
        }
    }
}

impl<'a> Rules<'a> {
    fn new(table: &'a Retention, policy: &'a Policy, times: Times, now: Timestamp) -> Self {
        let limit = |span: &'a Option<_>| {
            span.as_ref().map(|span| AgeLimit::new(span, &policy.time_zone, now, times.counted))
        };
        let counted = Period::ALL.into_iter().filter_map(|period| {
            let count = (*table.keep.get(period))?;
            Some(PeriodRule { rule: Rule::KeepEach(period), period, bound: Bound::Slots(count) })
        });
        let within = Period::ALL.into_iter().filter_map(|period| {
            let limit = limit(table.keep_within_each.get(period))?;
            Some(PeriodRule { rule: Rule::KeepWithinEach(period), period, bound: Bound::Within(limit) })
        });
        let periodic: Vec<PeriodRule<'_>> = counted.chain(within).collect();
        let (first, last) = times.all;
        Self {
            table,
            keep_within: limit(&table.keep_within),
            max_age: limit(&table.max_age),
            failed_after: limit(&table.failed_after),
            calendar: (!periodic.is_empty()).then(|| Calendar::new(&policy.time_zone, first, last)),
            wants_all: table.keep_last.is_none() && table.keep_within.is_none() && periodic.is_empty(),
            periodic,
        }
    }

    /// Whether everything newer than a wanted one is wanted as well.
    fn is_monotone(&self) -> bool {
        self.periodic.is_empty()
    }

    fn limits(&self) -> impl Iterator<Item = &AgeLimit<'a>> {
        let within = self.periodic.iter().filter_map(|rule| match &rule.bound {
            Bound::Within(limit) => Some(limit),
            Bound::Slots(_) => None,
        });
        self.keep_within.iter().chain(&self.max_age).chain(within)
    }
}
