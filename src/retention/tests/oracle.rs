//! The engine against a second, slow reading of the rules: plain loops over the contract's sentences, with nothing
//! of the engine's inside. Where the two differ, one of them has misread.

use std::collections::HashSet;

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{RoundMode, TimestampRound, Unit};

use proptest::prelude::*;

use super::laws::{councils, few_policies, scenes, scenes_of};
use super::*;
use crate::policy::Period;
use crate::retention::verdict::Rule;

/// What one policy says of one snapshot by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opinion {
    NotSelected,
    Ignores(Rule),
    Keeps(Rule),
    LetsGo(Rule),
}

/// Verdict and key for each snapshot of the inventory, by the plan of one of the policies; `None` where it selects
/// nothing.
pub(super) fn verdicts(
    policies: &[Policy],
    own: &Policy,
    inventory: &Inventory,
    now: Timestamp,
) -> Vec<Option<(Verdict, Rule)>> {
    let opinions: Vec<(&Policy, Vec<Opinion>)> = policies
        .iter()
        .filter(|policy| policy.enabled && policy.zones.contains(&inventory.zone))
        .map(|policy| (policy, opinions_of(policy, policies, inventory, now)))
        .collect();
    let own_opinions = opinions_of(own, policies, inventory, now);
    let mut verdicts = Vec::new();
    for (place, snapshot) in inventory.snapshots.iter().enumerate() {
        verdicts.push(match own_opinions[place] {
            Opinion::NotSelected => None,
            Opinion::Ignores(rule) => Some((Verdict::Ignore, rule)),
            Opinion::Keeps(rule) => Some((Verdict::Keep, rule)),
            Opinion::LetsGo(rule) => {
                let pin = inventory.holds.get(&snapshot.id);
                if pin.is_some_and(|pin| pin.until.is_none_or(|until| now < until)) {
                    Some((Verdict::Keep, Rule::Hold))
                } else if rule != Rule::FailedAfter && !is_gate_open(own, snapshot, inventory, now) {
                    Some((Verdict::Keep, Rule::Export))
                } else {
                    let mut is_held = false;
                    for (policy, opinions) in &opinions {
                        if policy.name != own.name && holds(policy, opinions[place], snapshot, inventory, now)
                        {
                            is_held = true;
                        }
                    }
                    Some(if is_held { (Verdict::Keep, Rule::Policy) } else { (Verdict::Delete, rule) })
                }
            }
        });
    }
    verdicts
}

/// Whether another policy keeps a snapshot of which it thinks so. One that does not prune only requires its copies.
fn holds(
    policy: &Policy,
    opinion: Opinion,
    snapshot: &Snapshot,
    inventory: &Inventory,
    now: Timestamp,
) -> bool {
    match opinion {
        // What is foreign to a policy is none of its business; a failed one needs no copy.
        Opinion::NotSelected | Opinion::Ignores(Rule::Foreign) | Opinion::LetsGo(Rule::FailedAfter) => false,
        Opinion::Ignores(_) | Opinion::Keeps(_) if policy.retention.is_some() => true,
        _ if snapshot.state.as_str() == "error" => false,
        _ => !is_gate_open(policy, snapshot, inventory, now),
    }
}

/// Whether the policy took the snapshot or was served by it, or nobody can say who else may prune it.
pub(super) fn is_own(
    policy: &Policy,
    policies: &[Policy],
    inventory: &Inventory,
    snapshot: &Snapshot,
) -> bool {
    match inventory.created.get(&snapshot.id) {
        None => false,
        Some(Ownership { maker: None, .. }) => true,
        Some(Ownership { maker: Some(maker), served }) => {
            let is_gone = policies.iter().all(|policy| policy.name != *maker);
            is_gone || *maker == policy.name || served.contains(&policy.name)
        }
    }
}

fn opinions_of(policy: &Policy, policies: &[Policy], inventory: &Inventory, now: Timestamp) -> Vec<Opinion> {
    let mut opinions = vec![Opinion::NotSelected; inventory.snapshots.len()];
    let whose: HashSet<Option<InstanceId>> =
        inventory.snapshots.iter().map(|snapshot| snapshot.instance_id).collect();
    for instance_id in whose {
        let instance = inventory.instances.iter().find(|instance| Some(instance.id) == instance_id);
        if !policy.select.selects_instance(instance_id, instance) {
            continue;
        }
        let is_orphan = match instance {
            Some(_) => false,
            None => instance_id.is_none() || !policy.select.judge_orphans,
        };
        let mut good: Vec<usize> = Vec::new();
        let mut failed: Vec<usize> = Vec::new();
        for (place, snapshot) in inventory.snapshots.iter().enumerate() {
            if snapshot.instance_id != instance_id || !policy.select.selects_snapshot(snapshot) {
                continue;
            }
            let is_foreign = policy.select.only_created && !is_own(policy, policies, inventory, snapshot);
            let is_future = snapshot.created_at.duration_since(now) > SignedDuration::from_mins(5);
            let is_good = ["exported", "ready"].contains(&snapshot.state.as_str());
            if is_foreign {
                opinions[place] = Opinion::Ignores(Rule::Foreign);
            } else if is_future {
                opinions[place] = Opinion::Ignores(Rule::Future);
            } else if !is_good {
                opinions[place] = Opinion::Ignores(Rule::State);
                if snapshot.state.as_str() == "error" && !is_orphan {
                    failed.push(place);
                }
            } else if is_orphan {
                opinions[place] = Opinion::Ignores(Rule::Orphan);
            } else {
                good.push(place);
            }
        }
        let key = |place: &usize| {
            let snapshot = &inventory.snapshots[*place];
            (snapshot.created_at, snapshot.id)
        };
        good.sort_by_key(key);
        good.reverse();
        let Some(table) = &policy.retention else {
            for place in good {
                opinions[place] = Opinion::Keeps(Rule::NoKeepRule);
            }
            continue;
        };
        let newest_first: Vec<&Snapshot> = good.iter().map(|place| &inventory.snapshots[*place]).collect();
        for (place, opinion) in good.iter().zip(judged(table, &newest_first, &policy.time_zone, now)) {
            opinions[*place] = opinion;
        }
        for place in failed {
            let Some(after) = &table.failed_after else { continue };
            let has_newer_good = good.iter().any(|newer| key(newer) > key(&place));
            if is_older(&inventory.snapshots[place], after, &policy.time_zone, now) && has_newer_good {
                opinions[place] = Opinion::LetsGo(Rule::FailedAfter);
            }
        }
    }
    opinions
}

/// Exactly as old as the limit is not older.
fn is_older(snapshot: &Snapshot, limit: &Span, zone: &TimeZone, now: Timestamp) -> bool {
    end_of_age(snapshot, limit, zone).is_some_and(|end| now > end)
}

/// The last instant at which a snapshot is not older than a limit: counted forward on a wall calendar, month by month and
/// day by day, then on by the clock.
fn end_of_age(snapshot: &Snapshot, limit: &Span, zone: &TimeZone) -> Option<Timestamp> {
    let mut parts: BTreeMap<String, i64> = BTreeMap::new();
    let text = limit.to_string();
    let mut rest = text.as_str();
    while let Some(digits) = rest.find(|character: char| !character.is_ascii_digit()) {
        let (number, unit) = rest.split_at(digits);
        let end = unit.find(|character: char| character.is_ascii_digit()).unwrap_or(unit.len());
        parts.insert(unit[..end].to_owned(), number.parse().unwrap());
        rest = &unit[end..];
    }
    let part = |unit: &str| parts.get(unit).copied().unwrap_or(0);
    let mut end = snapshot.created_at;
    if ["y", "mo", "w", "d"].iter().any(|unit| part(unit) > 0) {
        let wall = zone.to_datetime(end);
        let (mut date, mut time) = (wall.date(), wall.time());
        let months = 12 * part("y") + part("mo");
        let mut month = date.first_of_month();
        for _ in 0..months {
            month = month.last_of_month().tomorrow().ok()?;
        }
        if date.day() <= month.days_in_month() {
            date = month.last_of_month().with().day(date.day()).build().unwrap();
        } else {
            // The month lacks such a day: its end.
            (date, time) = (month.last_of_month().tomorrow().ok()?, Time::midnight());
        }
        for _ in 0..7 * part("w") + part("d") {
            date = date.tomorrow().ok()?;
        }
        end = first_time_the_clock_shows(date.to_datetime(time), zone)?;
    }
    let clock = SignedDuration::from_hours(part("h"))
        + SignedDuration::from_mins(part("m"))
        + SignedDuration::from_secs(part("s"))
        + SignedDuration::from_millis(part("ms"));
    end.checked_add(clock).ok()
}

/// The first instant at which the clock of a zone shows this time or a later one.
fn first_time_the_clock_shows(wall: DateTime, zone: &TimeZone) -> Option<Timestamp> {
    let about = TimeZone::UTC.to_timestamp(wall).ok()?;
    let mut from = about - SignedDuration::from_hours(48);
    for change in zone.following(from).map(|change| change.timestamp()).chain([Timestamp::MAX]) {
        // The offset does not change from here to there.
        let shown = zone.to_offset(from).to_timestamp(wall).ok()?;
        if shown < change {
            return Some(shown.max(from));
        }
        from = change;
    }
    None
}

/// What a retention table says of the good snapshots of one instance, newest first.
fn judged(table: &Retention, good: &[&Snapshot], zone: &TimeZone, now: Timestamp) -> Vec<Opinion> {
    let taken: Vec<Moment> = good.iter().map(|snapshot| Moment::of(snapshot, zone)).collect();
    // All that wants each of them, the first of the keys first.
    let mut wanting: Vec<Vec<Rule>> = vec![Vec::new(); good.len()];
    let mut has_keep_rule = false;

    if let Some(count) = table.keep_last {
        has_keep_rule = true;
        for (place, wanting) in wanting.iter_mut().enumerate() {
            if is_below(place, count) {
                wanting.push(Rule::KeepLast);
            }
        }
    }
    if let Some(within) = &table.keep_within {
        has_keep_rule = true;
        for (snapshot, wanting) in good.iter().zip(&mut wanting) {
            if !is_older(snapshot, within, zone, now) {
                wanting.push(Rule::KeepWithin);
            }
        }
    }
    for period in Period::ALL {
        if let Some(count) = *table.keep.get(period) {
            has_keep_rule = true;
            let mut used = 0;
            for (place, wanting) in wanting.iter_mut().enumerate() {
                if is_first_of_period(place, &taken, period) && is_below(used, count) {
                    used += 1;
                    wanting.push(Rule::KeepEach(period));
                }
            }
            if table.keep_oldest && is_below(used, count) && !good.is_empty() {
                wanting[good.len() - 1].push(Rule::KeepEach(period));
            }
        }
    }
    for period in Period::ALL {
        if let Some(within) = table.keep_within_each.get(period) {
            has_keep_rule = true;
            for (place, snapshot) in good.iter().enumerate() {
                let is_oldest = place == good.len() - 1;
                let is_meant = is_first_of_period(place, &taken, period) || table.keep_oldest && is_oldest;
                if is_meant && !is_older(snapshot, within, zone, now) {
                    wanting[place].push(Rule::KeepWithinEach(period));
                }
            }
        }
    }
    if !has_keep_rule {
        for wanting in &mut wanting {
            wanting.push(Rule::NoKeepRule);
        }
    }

    let mut opinions = Vec::new();
    let mut held = 0;
    let mut consistent = 0;
    for (place, snapshot) in good.iter().enumerate() {
        let is_too_old = table.max_age.as_ref().is_some_and(|limit| is_older(snapshot, limit, zone, now));
        let opinion = match wanting[place].first() {
            None => Opinion::LetsGo(Rule::NotWanted),
            Some(_) if is_too_old => Opinion::LetsGo(Rule::MaxAge),
            Some(rule) => {
                held += 1;
                if table.max_count.is_some_and(|most| held > most.get()) {
                    Opinion::LetsGo(Rule::MaxCount)
                } else {
                    Opinion::Keeps(*rule)
                }
            }
        };
        let is_protected = place < table.min_keep as usize;
        let is_consistent = snapshot.application_consistent == Some(true);
        consistent += u32::from(is_consistent);
        let is_needed = is_consistent && consistent <= table.min_keep_consistent;
        opinions.push(match opinion {
            Opinion::LetsGo(_) if is_protected => Opinion::Keeps(Rule::MinKeep),
            Opinion::LetsGo(_) if is_needed => Opinion::Keeps(Rule::MinKeepConsistent),
            opinion => opinion,
        });
    }
    opinions
}

fn is_below(number: usize, count: Count) -> bool {
    match count {
        Count::All => true,
        Count::Of(count) => number < count.get() as usize,
    }
}

/// Whether none of the newer ones is of its period.
fn is_first_of_period(place: usize, newest_first: &[Moment], period: Period) -> bool {
    !newest_first[..place].iter().any(|newer| newer.shares(period, &newest_first[place]))
}

/// When a snapshot was taken: the hours since 1970, and the calendar's words for it.
struct Moment {
    hour: i128,
    date: Date,
    week: (i16, i8),
}

impl Moment {
    fn of(snapshot: &Snapshot, zone: &TimeZone) -> Self {
        let date = snapshot.created_at.to_zoned_datetime(zone.clone()).date();
        let week = date.iso_week_date();
        Self {
            hour: snapshot.created_at.as_nanosecond().div_euclid(3_600_000_000_000),
            date,
            week: (week.year(), week.week()),
        }
    }

    fn shares(&self, period: Period, other: &Self) -> bool {
        match period {
            Period::Hour => self.hour == other.hour,
            Period::Day => self.date == other.date,
            Period::Week => self.week == other.week,
            Period::Month => self.date.year() == other.date.year() && self.date.month() == other.date.month(),
            Period::Year => self.date.year() == other.date.year(),
        }
    }
}

/// Whether every copy that a policy requires before a good snapshot is deleted is there.
fn is_gate_open(policy: &Policy, snapshot: &Snapshot, inventory: &Inventory, now: Timestamp) -> bool {
    let Some(export) = policy.export.as_ref().filter(|export| export.required) else { return true };
    let mut is_open = true;
    for archive in &export.archives {
        let has_it = match inventory.archives.get(archive) {
            None | Some(Copies::Unreachable(_)) => false,
            Some(Copies::Assumed) => true,
            Some(Copies::Known(copies)) => copies.iter().any(|copy| {
                // What is dated in the future moves nothing.
                let is_of_now = copy.created_at.duration_since(now) <= SignedDuration::from_mins(5);
                let is_newer = Some(copy.instance_id) == snapshot.instance_id
                    && (copy.created_at, copy.snapshot_id) >= (snapshot.created_at, snapshot.id)
                    && is_of_now;
                copy.snapshot_id == snapshot.id || export.snapshots == Which::Newest && is_newer
            }),
        };
        is_open &= has_it;
    }
    is_open
}

/// The whole seconds after `now` at which something may change for a snapshot of this inventory, in order.
fn changes(policies: &[Policy], inventory: &Inventory, now: Timestamp) -> Vec<Timestamp> {
    let whole = |instant: Timestamp| {
        instant.round(TimestampRound::new().smallest(Unit::Second).mode(RoundMode::Ceil)).unwrap()
    };
    let mut changes: Vec<Timestamp> = inventory.holds.values().filter_map(|hold| hold.until).collect();
    let copies = inventory.archives.values().flat_map(|copies| match copies {
        Copies::Known(copies) => copies.as_slice(),
        _ => &[],
    });
    let dated = inventory.snapshots.iter().map(|snapshot| snapshot.created_at);
    let dated = dated.chain(copies.map(|copy| copy.created_at));
    changes.extend(dated.map(|dated| dated - SignedDuration::from_mins(5)));
    for policy in policies {
        let Some(table) = &policy.retention else { continue };
        let limits = Period::ALL.iter().filter_map(|period| table.keep_within_each.get(*period).as_ref());
        let limits = limits.chain(&table.keep_within).chain(&table.max_age).chain(&table.failed_after);
        for limit in limits {
            for snapshot in &inventory.snapshots {
                let end = end_of_age(snapshot, limit, &policy.time_zone);
                changes.extend(end.map(|end| end + nanosecond()));
            }
        }
    }
    let mut changes: Vec<Timestamp> = changes.into_iter().map(whole).filter(|change| *change > now).collect();
    changes.sort_unstable();
    changes.dedup();
    changes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_engine_reads_the_rules_as_the_slow_reading_does(policies in councils(), (moment, zone) in scenes()) {
        let plan = plan(&policies, &zone, moment);
        prop_assert_eq!(plan.policies.len(), policies.len());
        for (policy, plan) in policies.iter().zip(&plan.policies) {
            let mut shown = vec![None; zone.snapshots.len()];
            for decision in &plan.decisions {
                shown[decision.index as usize] = Some((decision.verdict, decision.rule));
            }
            let read = verdicts(&policies, policy, &zone, moment);
            for (snapshot, (shown, read)) in zone.snapshots.iter().zip(shown.iter().zip(&read)) {
                prop_assert_eq!(shown, read, "engine, then this: {:?} by {}, at {}", snapshot, policy.name, moment);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Not at a few later seconds, but at all at which anything can change.
    #[test]
    fn expiry_is_the_first_second_at_which_the_slow_reading_deletes(
        policies in few_policies(),
        (moment, zone) in scenes_of(8),
    ) {
        let plans = plan(&policies, &zone, moment);
        let changes = changes(&policies, &zone, moment);
        for (policy, plan) in policies.iter().zip(&plans.policies) {
            let mut firsts: Vec<Option<Timestamp>> = vec![None; zone.snapshots.len()];
            if policy.retention.is_some() {
                for change in &changes {
                    let read = verdicts(&policies, policy, &zone, *change);
                    for (first, read) in firsts.iter_mut().zip(read) {
                        if first.is_none() && read.is_some_and(|(verdict, _)| verdict == Verdict::Delete) {
                            *first = Some(*change);
                        }
                    }
                }
            }
            for decision in &plan.decisions {
                let snapshot = &zone.snapshots[decision.index as usize];
                let first = firsts[decision.index as usize].filter(|_| decision.verdict == Verdict::Keep);
                prop_assert_eq!(
                    decision.expires_at, first,
                    "engine, then this: {:?} by {}, at {}", snapshot, policy.name, moment
                );
            }
        }
    }
}
