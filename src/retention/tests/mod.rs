//! What the engine decides: stories with relative times, the numbered edge cases, and laws.

mod cases;
mod changes;
mod coverage;
mod judge;
mod laws;
mod points;
mod restic;
mod small_scope;

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use crate::policy::select::{Pattern, Select};
use crate::policy::span::Span;
use crate::policy::{ByPeriod, Count, Export, Guard, Hooks, OnStart, Policy, Retention, Which};
use crate::retention::inventory::{ArchivedCopy, Copies, Failed, Hold, Inventory, Ownership};
use crate::retention::plan;
use crate::retention::plan::{Decision, PolicyPlan};
use crate::retention::verdict::Verdict;
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, SnapshotState};

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// A noon without any edge near it.
fn now() -> Timestamp {
    at("2026-09-16T12:00:00Z")
}

fn hours_ago(hours: i64) -> Timestamp {
    now() - SignedDuration::from_hours(hours)
}

fn days_ago(days: i64) -> Timestamp {
    hours_ago(24 * days)
}

fn minutes_ahead(minutes: i64) -> Timestamp {
    now() + SignedDuration::from_mins(minutes)
}

fn nanosecond() -> SignedDuration {
    SignedDuration::from_nanos(1)
}

fn zone(name: &str) -> TimeZone {
    TimeZone::get(name).unwrap()
}

fn instance_id(name: &str) -> InstanceId {
    InstanceId(Uuid::from_u128(name.bytes().fold(0, |id, byte| id << 8 | u128::from(byte))))
}

fn snapshot_id(number: u128) -> SnapshotId {
    SnapshotId(Uuid::from_u128(number))
}

/// A good snapshot; its id comes with its place in the inventory.
fn snap(instance: &str, created_at: Timestamp) -> Snapshot {
    Snapshot {
        id: snapshot_id(0),
        name: format!("{instance}_ROOT-1_{created_at}").into(),
        created_at,
        state: SnapshotState::Exported,
        size_gib: Some(10),
        instance_id: Some(instance_id(instance)),
        application_consistent: Some(false),
    }
}

fn consistent(snapshot: Snapshot) -> Snapshot {
    Snapshot { application_consistent: Some(true), ..snapshot }
}

fn in_state(state: &str, snapshot: Snapshot) -> Snapshot {
    Snapshot { state: state.into(), ..snapshot }
}

fn instance(name: &str) -> Instance {
    Instance {
        id: instance_id(name),
        name: name.into(),
        labels: BTreeMap::new(),
        template_id: None,
        is_managed: false,
        created_at: None,
    }
}

/// A zone with these snapshots, numbered from 1 as their ids; `web-1` and `web-2` are listed.
fn inventory(snapshots: impl IntoIterator<Item = Snapshot>) -> Inventory {
    let numbered = (1..).zip(snapshots);
    let snapshots = numbered.map(|(number, snap)| Snapshot { id: snapshot_id(number), ..snap }).collect();
    Inventory::on_paper("ch-gva-2".parse().unwrap(), snapshots, vec![instance("web-1"), instance("web-2")])
}

impl Inventory {
    fn on_hold(mut self, number: u128, until: Option<Timestamp>) -> Self {
        self.holds.insert(snapshot_id(number), Hold { until, reason: None });
        self
    }

    fn archive(mut self, name: &str, copies: Copies) -> Self {
        self.archives.insert(name.parse().unwrap(), copies);
        self
    }

    /// Copies of the snapshots with these numbers.
    fn copies(&self, numbers: &[usize]) -> Copies {
        let copy = |number: &usize| {
            let Snapshot { id, created_at, instance_id, .. } = self.snapshots[*number - 1];
            let instance_id = instance_id.unwrap();
            ArchivedCopy { snapshot_id: id, created_at, instance_id, exported_at: Some(created_at) }
        };
        Copies::Known(numbers.iter().map(copy).collect())
    }
}

/// A policy over everything in the zone, without a retention table.
fn policy(name: &str) -> Policy {
    Policy {
        name: name.parse().unwrap(),
        enabled: true,
        paused_since: None,
        schedule: None,
        time_zone: TimeZone::UTC,
        jitter: Duration::ZERO,
        on_start: OnStart::IfMissed,
        deadline: None,
        create: false,
        zones: vec!["ch-gva-2".parse().unwrap()],
        select: Select::default(),
        retention: None,
        guard: Guard {
            max_deletes: None,
            max_delete_percent: 50,
            max_listing_drop_percent: 50,
            max_clock_skew: Duration::from_mins(5),
            settle: Duration::from_hours(20),
            expect_newest: None,
        },
        export: None,
        promote: None,
        hooks: Hooks::default(),
    }
}

/// A table without any rule, and without `min_keep`; for building on.
pub(crate) fn no_rules() -> Retention {
    Retention {
        keep_last: None,
        keep_within: None,
        keep: ByPeriod::default(),
        keep_within_each: ByPeriod::default(),
        keep_oldest: true,
        max_age: None,
        max_count: None,
        min_keep: 0,
        min_keep_consistent: 0,
        failed_after: None,
    }
}

fn count(count: u32) -> Option<NonZeroU32> {
    NonZeroU32::new(count)
}

fn span(text: &str) -> Span {
    text.parse::<Span>().unwrap()
}

fn slots(slots: u32) -> Option<Count> {
    count(slots).map(Count::Of)
}

fn keep_last(last: u32) -> Retention {
    Retention { keep_last: slots(last), ..no_rules() }
}

fn keep_within(within: &str) -> Retention {
    Retention { keep_within: Some(span(within)), ..no_rules() }
}

fn max_age(age: &str) -> Retention {
    Retention { max_age: Some(span(age)), ..no_rules() }
}

impl Policy {
    fn with(self, retention: Retention) -> Self {
        Self { retention: Some(retention), ..self }
    }

    fn in_zone(self, name: &str) -> Self {
        Self { time_zone: zone(name), ..self }
    }

    fn only(mut self, instance: &str) -> Self {
        self.select.instances = Some(vec![Pattern::new(instance).unwrap()]);
        self
    }

    fn requiring(self, archives: &[&str], snapshots: Which) -> Self {
        let export = Export {
            archives: archives.iter().map(|name| name.parse().unwrap()).collect(),
            snapshots,
            required: true,
            alert_after: Duration::MAX,
            concurrency: NonZeroUsize::MIN,
            connections: NonZeroUsize::MIN,
            stall_timeout: Duration::from_mins(1),
            bandwidth_limit: None,
        };
        Self { export: Some(export), ..self }
    }
}

/// The plan of the first of these policies at this moment.
fn plan_of(policies: &[Policy], inventory: &Inventory, at: Timestamp) -> PolicyPlan {
    plan(policies, inventory, at).policies.swap_remove(0)
}

/// For each snapshot in the inventory's order its verdict and rule; `-` if it is not selected.
fn shown(plan: &PolicyPlan, inventory: &Inventory) -> Vec<String> {
    let show = |index| {
        let decision = plan.decisions.iter().find(|decision| decision.index == index);
        decision.map_or("-".to_owned(), |decision| format!("{} {}", decision.verdict, decision.rule))
    };
    (0..).zip(&inventory.snapshots).map(|(index, _)| show(index)).collect()
}

#[track_caller]
fn assert_decided(policies: &[Policy], inventory: &Inventory, at: Timestamp, expected: &[&str]) {
    assert_eq!(shown(&plan_of(policies, inventory, at), inventory), expected);
}

/// The decision about the snapshot with this number.
fn decision(plan: &PolicyPlan, number: u32) -> &Decision {
    plan.decisions.iter().find(|decision| decision.index == number - 1).unwrap()
}

/// The reasons of the snapshot with this number, in words.
fn words(plan: &PolicyPlan, number: u32) -> Vec<String> {
    decision(plan, number).reasons().map(|why| why.to_string()).collect()
}

/// The numbers of the snapshots that go.
fn deleted(plan: &PolicyPlan) -> Vec<u32> {
    let mut numbers: Vec<u32> = plan
        .decisions
        .iter()
        .filter(|decision| decision.verdict == Verdict::Delete)
        .map(|decision| decision.index + 1)
        .collect();
    numbers.sort_unstable();
    numbers
}
