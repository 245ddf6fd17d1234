//! Every zone of up to six snapshots on a grid of instants, in three states, under every combination of up to three rules,
//! in four time zones: the engine and the second judge agree.
//!
//! A grid has six instants around a clock change, the end of a month or a year, or a leap day, and at each of them there is
//! no snapshot, or one in one of the states. All these zones are instances of one inventory, since instances are judged
//! apart. The tests play a part: four instants, and each 223rd of the other combinations. With `SNAPWARDEN_SMALL_SCOPE=all`
//! all is played, with a number N each N-th of the combinations of rules, time zones and moments, with all six instants.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::judge::facts;
use super::*;
use crate::judge;
use crate::judge::facts::Facts;
use crate::policy::Period;
use crate::retention::decide;
use crate::retention::deciding_keys::deciding_keys;
use crate::retention::memory::Memory;

const ZONES: [&str; 4] = ["UTC", "Europe/Zurich", "America/New_York", "Australia/Lord_Howe"];

const STATES: [&str; 3] = ["exported", "error", "snapshotting"];

/// Both clock changes of each time zone, and edges of the calendar.
const EDGES: [&str; 10] = [
    "2027-03-28T01:00:00Z",
    "2027-10-31T01:00:00Z",
    "2027-03-14T07:00:00Z",
    "2027-11-07T06:00:00Z",
    "2027-04-03T15:00:00Z",
    "2027-10-02T15:30:00Z",
    "2028-02-29T12:00:00Z",
    "2027-01-31T00:00:00Z",
    "2027-03-01T00:00:00Z",
    "2027-01-01T00:00:00Z",
];

/// From an edge to the six instants, in nanoseconds.
const GRID: [i64; 6] = [-25 * HOUR, -HOUR, -1, 0, HOUR / 2, 23 * HOUR];
const HOUR: i64 = 3_600_000_000_000;

/// From an edge to the moments of judging, in hours: a day later for one of the instants, and about a month and a year.
const MOMENTS: [i64; 3] = [24, 31 * 24, 366 * 24];

type Edit = fn(&mut Retention);

/// Each rule with small counts and ages; no two of one key stand in a combination.
fn rules() -> Vec<(&'static str, Edit)> {
    fn each(table: &mut Retention, period: Period, count: u32) {
        *table.keep.get_mut(period) = slots(count);
    }
    fn within(table: &mut Retention, period: Period, age: &str) {
        *table.keep_within_each.get_mut(period) = Some(span(age));
    }
    vec![
        ("keep_last", |table| table.keep_last = slots(1)),
        ("keep_last", |table| table.keep_last = slots(2)),
        ("keep_within", |table| table.keep_within = Some(span("1d"))),
        ("keep_within", |table| table.keep_within = Some(span("1mo"))),
        ("keep_hourly", |table| each(table, Period::Hour, 2)),
        ("keep_daily", |table| each(table, Period::Day, 1)),
        ("keep_daily", |table| each(table, Period::Day, 2)),
        ("keep_weekly", |table| each(table, Period::Week, 2)),
        ("keep_monthly", |table| each(table, Period::Month, 1)),
        ("keep_monthly", |table| each(table, Period::Month, 2)),
        ("keep_yearly", |table| each(table, Period::Year, 2)),
        ("keep_within_hourly", |table| within(table, Period::Hour, "24h")),
        ("keep_within_daily", |table| within(table, Period::Day, "1mo")),
        ("keep_within_weekly", |table| within(table, Period::Week, "1mo")),
        ("keep_within_monthly", |table| within(table, Period::Month, "1y")),
        ("keep_within_yearly", |table| within(table, Period::Year, "1y")),
        ("keep_oldest", |table| table.keep_oldest = false),
        ("max_age", |table| table.max_age = Some(span("1d"))),
        ("max_age", |table| table.max_age = Some(span("1mo"))),
        ("max_count", |table| table.max_count = count(1)),
        ("max_count", |table| table.max_count = count(2)),
        ("min_keep", |table| table.min_keep = 1),
        ("min_keep", |table| table.min_keep = 2),
        ("min_keep_consistent", |table| table.min_keep_consistent = 1),
        ("failed_after", |table| table.failed_after = Some(span("1d"))),
    ]
}

/// Every combination of up to three rules.
fn tables() -> Vec<Retention> {
    let rules = rules();
    let mut tables = vec![no_rules()];
    for (place, (first, edit)) in rules.iter().enumerate() {
        let mut one = no_rules();
        edit(&mut one);
        for (place, (second, edit)) in rules.iter().enumerate().skip(place + 1) {
            let mut two = one.clone();
            edit(&mut two);
            for (third, edit) in rules.iter().skip(place + 1) {
                if third != second && third != first && second != first {
                    let mut three = two.clone();
                    edit(&mut three);
                    tables.push(three);
                }
            }
            tables.extend((second != first).then_some(two));
        }
        tables.push(one);
    }
    tables
}

/// Every zone of a grid, each as an instance of one inventory.
fn grid(edge: Timestamp, offsets: &[i64]) -> Inventory {
    let (mut snapshots, mut instances) = (Vec::new(), Vec::new());
    let choices = STATES.len() + 1;
    for number in 0..choices.pow(u32::try_from(offsets.len()).unwrap()) {
        let name = format!("{number:04}");
        let mut rest = number;
        for (place, offset) in offsets.iter().enumerate() {
            let created_at = edge + SignedDuration::from_nanos(*offset);
            if let Some(state) = STATES.get(rest % choices) {
                let snapshot = in_state(state, snap(&name, created_at));
                // Some of them, for `min_keep_consistent`.
                snapshots.push(if place % 2 == 0 { consistent(snapshot) } else { snapshot });
            }
            rest /= choices;
        }
        instances.push(instance(&name));
    }
    Inventory { instances, ..inventory(snapshots) }
}

/// Judges all zones of a grid by both. Returns how many snapshots that were.
fn agree(table: &Retention, time_zone: &str, grid: &Inventory, facts: &mut Facts, at: Timestamp) -> u64 {
    let policies = [policy("p").in_zone(time_zone).with(table.clone())];
    facts.now = at;
    facts.present.policies = [(policies[0].name.clone(), deciding_keys(&policies[0]))].into();
    let plan = decide(&policies, grid, at).policies.swap_remove(0);
    let rulings = judge::rulings(facts).unwrap();
    assert_eq!(plan.decisions.len(), rulings.len());
    for decision in &plan.decisions {
        let ruling = rulings[decision.index as usize].as_ref().unwrap();
        let (engine, judge) =
            ((decision.verdict.as_str(), decision.rule.as_str()), (ruling.verdict, ruling.rule));
        let is_same = engine.1 == judge.1
            && match judge.0 {
                judge::ruling::Verdict::Keep => decision.verdict == Verdict::Keep,
                judge::ruling::Verdict::Delete => decision.verdict == Verdict::Delete,
                judge::ruling::Verdict::Ignore => decision.verdict == Verdict::Ignore,
            };
        if !is_same {
            let snapshot = &grid.snapshots[decision.index as usize];
            let of_instance = grid.snapshots.iter().filter(|one| one.instance_id == snapshot.instance_id);
            let all: Vec<String> =
                of_instance.map(|one| format!("{} {}", one.created_at, one.state)).collect();
            panic!(
                "{} by {table:?} in {time_zone} at {at}: the plan says {engine:?}, the second judge {judge:?}; of {all:?}",
                snapshot.created_at
            );
        }
    }
    rulings.len() as u64
}

/// Plays each `step`-th combination over these instants. Returns how many judgements that were.
fn play(offsets: &[i64], step: usize) -> u64 {
    let tables = tables();
    let judgements = AtomicU64::new(0);
    let places: Vec<(usize, usize)> =
        (0..EDGES.len()).flat_map(|edge| (0..MOMENTS.len()).map(move |moment| (edge, moment))).collect();
    let of_place = tables.len() * ZONES.len();
    let work = |edge: usize| {
        let start = at(EDGES[edge]);
        let grid = grid(start, offsets);
        let mut facts = facts(&[policy("p")], &policy("p"), &grid, &Memory::default(), start);
        for (place, (_, moment)) in places.iter().enumerate().filter(|(_, (of, _))| *of == edge) {
            let now = start + SignedDuration::from_hours(MOMENTS[*moment]);
            for (table, retention) in tables.iter().enumerate() {
                for (zone, name) in ZONES.iter().enumerate() {
                    let number = place * of_place + table * ZONES.len() + zone;
                    if number.is_multiple_of(step) {
                        let judged = agree(retention, name, &grid, &mut facts, now);
                        judgements.fetch_add(judged, Ordering::Relaxed);
                    }
                }
            }
        }
    };
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let edge = next.fetch_add(1, Ordering::Relaxed);
                    if edge >= EDGES.len() {
                        break;
                    }
                    work(edge);
                }
            });
        }
    });
    judgements.into_inner()
}

#[test]
fn the_engine_and_the_second_judge_agree_about_every_small_zone() {
    let asked = std::env::var("SNAPWARDEN_SMALL_SCOPE").ok();
    let judgements = match asked.as_deref() {
        None => play(&[GRID[0], GRID[2], GRID[3], GRID[5]], 223),
        Some("all") => play(&GRID, 1),
        Some(step) => play(&GRID, step.parse().unwrap()),
    };
    if asked.is_some() {
        eprintln!("{judgements} judgements");
    }
    assert!(judgements >= 1_000_000, "{judgements}");
}
