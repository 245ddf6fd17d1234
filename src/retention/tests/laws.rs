//! Laws that hold for whatever zone and policies there may be.

use std::collections::BTreeSet;

use proptest::collection::{btree_map, hash_map, vec};
use proptest::option::of;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;
use crate::policy::Period;
use crate::policy::select::NameGlob;

const INSTANCES: [&str; 4] = ["web-1", "web-2", "gone", ""];

/// Moments near every kind of edge: ends of months, leap days, clock changes, and none at all.
fn moments() -> impl Strategy<Value = Timestamp> {
    let edges = select(vec![
        "2026-09-16T12:00:00Z",
        "2024-02-29T10:00:00Z",
        "2021-01-01T00:00:00Z",
        "2024-12-30T00:00:00Z",
        "2026-03-01T00:00:00Z",
        "2026-03-08T07:00:00Z",
        "2026-03-29T01:00:00Z",
        "2026-03-31T10:00:00Z",
        "2026-10-25T01:00:00Z",
        "2026-11-01T06:00:00Z",
        "2026-04-04T15:00:00Z",
        "2026-10-03T15:30:00Z",
        "2026-12-31T23:30:00Z",
    ]);
    (edges, -50..50_i64).prop_map(|(edge, hours)| at(edge) + SignedDuration::from_hours(hours))
}

fn zones() -> impl Strategy<Value = TimeZone> {
    select(vec!["UTC", "Europe/Zurich", "America/New_York", "Australia/Lord_Howe"]).prop_map(zone)
}

const SPANS: [&str; 15] = [
    "100ms", "5h", "24h", "2d", "72h", "3d12h", "1w", "2w1d", "1mo", "1mo12h", "6w", "1mo4w1d", "3mo", "1y",
    "1y1mo1d",
];

pub(super) fn spans() -> impl Strategy<Value = Span> {
    select(&SPANS[..]).prop_map(span)
}

fn limits() -> impl Strategy<Value = NonZeroU32> {
    (1..6_u32).prop_map(|count| NonZeroU32::new(count).unwrap())
}

fn counts() -> impl Strategy<Value = Count> {
    prop_oneof![
        8 => limits().prop_map(Count::Of),
        1 => select(vec![Count::All, Count::Of(NonZeroU32::MAX)]),
    ]
}

/// For each period mostly nothing.
fn by_period<T: Clone + std::fmt::Debug>(
    value: impl Strategy<Value = T> + Clone,
) -> impl Strategy<Value = ByPeriod<Option<T>>> {
    vec(prop_oneof![3 => Just(None), 1 => value.prop_map(Some)], 5).prop_map(|values| {
        let mut values = values.into_iter();
        ByPeriod::of(|_| values.next().unwrap())
    })
}

/// Tables with every rule that there is, and with none.
fn retentions() -> impl Strategy<Value = Retention> {
    let wanted =
        (of(counts()), of(spans()), by_period(counts().boxed()), by_period(spans().boxed()), any::<bool>());
    let minima = (0..3_u32, prop_oneof![2 => Just(0), 1 => 1..3_u32]);
    let limits = (of(spans()), of(limits()), minima, of(spans()));
    (wanted, limits).prop_map(|(wanted, limits)| {
        let (keep_last, keep_within, keep, keep_within_each, keep_oldest) = wanted;
        let (max_age, max_count, (min_keep, min_keep_consistent), failed_after) = limits;
        Retention {
            keep_last,
            keep_within,
            keep,
            keep_within_each,
            keep_oldest,
            max_age,
            max_count,
            min_keep,
            min_keep_consistent,
            failed_after,
        }
    })
}

fn policies() -> impl Strategy<Value = Policy> {
    let flags = (any::<bool>(), prop_oneof![3 => Just(false), 1 => Just(true)]);
    let selects = (flags, prop_oneof![3 => Just("*"), 1 => Just("web-*")], of(Just("*7")));
    let exports = of((select(vec![Which::Newest, Which::All]), vec(select(vec!["vault", "offsite"]), 1..3)));
    (of(retentions()), zones(), selects, exports).prop_map(
        |(retention, time_zone, ((judge_orphans, only_created), instances, excluded), export)| {
            let mut policy = Policy { time_zone, retention, ..policy("p") };
            policy.select.judge_orphans = judge_orphans;
            policy.select.only_created = only_created;
            if instances != "*" {
                policy = policy.only(instances);
            }
            let glob = excluded.map(|glob| Pattern::Name(NameGlob::new(glob).unwrap()));
            policy.select.exclude_snapshots = glob.into_iter().collect();
            match export {
                Some((which, archives)) => {
                    let archives: BTreeSet<&str> = archives.into_iter().collect();
                    policy.requiring(&Vec::from_iter(archives), which)
                }
                None => policy,
            }
        },
    )
}

/// Offsets from the moment: mostly exact spans, some a little off, some in the future.
fn snapshots(moment: Timestamp) -> impl Strategy<Value = Snapshot> {
    let states = prop_oneof![
        8 => Just("exported"),
        1 => Just("ready"),
        1 => Just("error"),
        1 => select(vec!["error", "snapshotting", "exporting", "deleting", "deleted", "odd"]),
    ];
    let taken = prop_oneof![
        6 => (0..2400_i64).prop_map(SignedDuration::from_hours),
        2 => (0..30_000_i64).prop_map(SignedDuration::from_hours),
        2 => (0..150_i64).prop_map(|halves| SignedDuration::from_mins(30 * halves)),
        2 => (-5..20_i64).prop_map(SignedDuration::from_mins),
        1 => (-20..-5_i64).prop_map(SignedDuration::from_mins),
        1 => (-40..0_i64).prop_map(|days| SignedDuration::from_hours(24 * days)),
    ];
    let off = prop_oneof![3 => Just(0), 1 => -1..=1_i64].prop_map(SignedDuration::from_nanos);
    let instances = prop_oneof![8 => 0..2_usize, 2 => 2..4_usize];
    let flags = select(vec![None, Some(false), Some(true)]);
    let facts = (instances, states, taken, off, 0..10_u8, flags);
    facts.prop_map(move |(instance, state, taken, off, name, application_consistent)| {
        let instance = INSTANCES[instance];
        let snapshot = in_state(state, snap(instance, moment - taken + off));
        Snapshot {
            name: format!("{name}").into(),
            application_consistent,
            instance_id: snapshot.instance_id.filter(|_| !instance.is_empty()),
            ..snapshot
        }
    })
}

fn archives(count: usize) -> impl Strategy<Value = Option<Vec<Index>>> {
    of(vec(any::<Index>(), 0..=count.min(6)))
}

/// Everyone's, or of a policy that may be one of those at hand.
fn ownerships() -> impl Strategy<Value = Ownership> {
    let names = || select(vec!["nightly", "weekly", "monthly", "gone"]);
    (of(names()), vec(names(), 0..2)).prop_map(|(maker, served)| Ownership {
        maker: maker.map(|name| name.parse().unwrap()),
        served: served.into_iter().map(|name| name.parse().unwrap()).collect(),
    })
}

/// A moment, and a zone as it is then.
pub(super) fn scenes() -> impl Strategy<Value = (Timestamp, Inventory)> {
    scenes_of(24)
}

/// A moment, and a zone with fewer snapshots than this.
pub(super) fn scenes_of(most: usize) -> impl Strategy<Value = (Timestamp, Inventory)> {
    let zone = moments().prop_flat_map(move |moment| {
        (Just(moment), vec(snapshots(moment), 0..most)).prop_flat_map(|(moment, snapshots)| {
            let count = snapshots.len();
            let holds = btree_map(0..24_u128, of(-2..40_i64), 0..3);
            let created = hash_map(1..24_u128, ownerships(), 0..24);
            (Just(moment), Just(snapshots), holds, created, archives(count), archives(count))
        })
    });
    zone.prop_map(|(moment, snapshots, holds, created, vault, offsite)| {
        let mut zone = inventory(snapshots);
        zone.created = created.into_iter().map(|(number, of)| (snapshot_id(number), of)).collect();
        for (number, days) in holds {
            let until = days.map(|days| moment + SignedDuration::from_hours(24 * days));
            zone = zone.on_hold(number, until);
        }
        let known: Vec<usize> = (1..=zone.snapshots.len())
            .filter(|number| zone.snapshots[*number - 1].instance_id.is_some())
            .collect();
        for (name, copies) in [("vault", vault), ("offsite", offsite)] {
            let copies = match copies {
                None => Copies::Assumed,
                Some(_) if known.is_empty() => Copies::Known(Vec::new()),
                Some(picks) => {
                    zone.copies(&picks.iter().map(|pick| known[pick.index(known.len())]).collect::<Vec<_>>())
                }
            };
            zone = zone.archive(name, copies);
        }
        (moment, zone)
    })
}

/// One to three policies of different names.
pub(super) fn councils() -> impl Strategy<Value = Vec<Policy>> {
    councils_of(3)
}

/// One or two policies of different names.
pub(super) fn few_policies() -> impl Strategy<Value = Vec<Policy>> {
    councils_of(2)
}

fn councils_of(most: usize) -> impl Strategy<Value = Vec<Policy>> {
    vec(policies(), 1..=most).prop_map(|mut policies| {
        for (policy, name) in policies.iter_mut().zip(["nightly", "weekly", "monthly"]) {
            policy.name = name.parse().unwrap();
        }
        policies
    })
}

/// Whether the policy took the snapshot or was served by it, or it is not known who else may prune it.
fn is_own(policy: &Policy, policies: &[Policy], inventory: &Inventory, snapshot: &Snapshot) -> bool {
    match inventory.created.get(&snapshot.id) {
        None => false,
        Some(Ownership { maker: None, .. }) => true,
        Some(Ownership { maker: Some(maker), served }) => {
            let is_gone = policies.iter().all(|policy| policy.name != *maker);
            is_gone || *maker == policy.name || served.contains(&policy.name)
        }
    }
}

/// Whether a snapshot is not foreign to a policy.
fn is_meant(policy: &Policy, policies: &[Policy], zone: &Inventory, snapshot: &Snapshot) -> bool {
    !policy.select.only_created || is_own(policy, policies, zone, snapshot)
}

fn has_keep_rule(rules: &Retention) -> bool {
    rules.keep_last.is_some()
        || rules.keep_within.is_some()
        || Period::ALL
            .iter()
            .any(|period| rules.keep.get(*period).is_some() || rules.keep_within_each.get(*period).is_some())
}

/// Whether a span ends later than another one for each snapshot of a zone: days and hours, and months of different
/// lengths, make that depend on where it begins.
fn is_longer_everywhere(
    one: Option<&Span>,
    other: Option<&Span>,
    inventory: &Inventory,
    zone: &TimeZone,
) -> bool {
    one.zip(other).is_some_and(|(one, other)| {
        let mut taken = inventory.snapshots.iter().map(|snapshot| snapshot.created_at);
        taken.all(|taken| one.after(taken, zone) > other.after(taken, zone))
    })
}

/// Whether a policy asks for failed ones to go, and a newer good one of the instance is there.
fn is_let_go_as_failed(policies: &[Policy], zone: &Inventory, failed: &Snapshot) -> bool {
    let asks = |policy: &Policy| policy.retention.as_ref().is_some_and(|table| table.failed_after.is_some());
    policies.iter().any(asks)
        && zone.snapshots.iter().any(|other| {
            other.state.is_good()
                && other.instance_id == failed.instance_id
                && (other.created_at, other.id) > (failed.created_at, failed.id)
        })
}

/// Everything that a plan says, by snapshot.
fn all_told(plan: &PolicyPlan, inventory: &Inventory) -> BTreeMap<SnapshotId, String> {
    let show = |decision: &Decision| {
        let why: Vec<String> = decision.reasons().map(|why| why.to_string()).collect();
        let Decision { verdict, rule, expires_at, .. } = decision;
        let holders = decision.keep_rules();
        let text = format!("{verdict} {rule} {expires_at:?} {holders:?} {:?} {why:?}", decision.copies());
        (inventory.snapshots[decision.index as usize].id, text)
    };
    plan.decisions.iter().map(show).collect()
}

fn deleted_ids(policies: &[Policy], inventory: &Inventory, at: Timestamp) -> BTreeSet<SnapshotId> {
    let plan = plan(policies, inventory, at);
    let numbers = plan.policies.iter().flat_map(deleted);
    numbers.map(|number| inventory.snapshots[number as usize - 1].id).collect()
}

/// What one policy would delete if it stood alone and nothing else held anything.
fn deleted_by(
    policy: &Policy,
    retention: Retention,
    inventory: &Inventory,
    at: Timestamp,
) -> BTreeSet<SnapshotId> {
    deleted_ids(&[Policy { retention: Some(retention), export: None, ..policy.clone() }], inventory, at)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn point_20_every_selected_snapshot_is_decided_once_with_a_reason_and_sums_fit(
        policies in councils(),
        (moment, zone) in scenes(),
    ) {
        let plan = plan(&policies, &zone, moment);
        prop_assert_eq!(plan.policies.len(), policies.len());
        for (policy, plan) in policies.iter().zip(&plan.policies) {
            let instance = |snapshot: &Snapshot| {
                zone.instances.iter().find(|instance| Some(instance.id) == snapshot.instance_id)
            };
            let selected: Vec<u32> = (0..)
                .zip(&zone.snapshots)
                .filter(|(_, snapshot)| {
                    policy.select.selects_instance(snapshot.instance_id, instance(snapshot))
                        && policy.select.selects_snapshot(snapshot)
                })
                .map(|(index, _)| index)
                .collect();
            let mut decided: Vec<u32> = plan.decisions.iter().map(|decision| decision.index).collect();
            decided.sort_unstable();
            prop_assert_eq!(decided, selected);
            for decision in &plan.decisions {
                prop_assert!(decision.reasons().next().is_some());
            }
            prop_assert_eq!(plan.deletes, deleted(plan).len() as u64);
            let good = deleted(plan).into_iter().filter(|number| zone.snapshots[*number as usize - 1].state.is_good());
            prop_assert!(good.count() as u64 <= plan.good);
        }
    }

    #[test]
    fn point_19_the_order_of_the_listing_does_not_matter(
        policies in councils(),
        ((moment, zone), snapshots) in scenes().prop_flat_map(|(moment, zone)| {
            let snapshots = Just(zone.snapshots.clone()).prop_shuffle();
            (Just((moment, zone)), snapshots)
        }),
    ) {
        let mut shuffled = Inventory { snapshots, ..zone.clone() };
        shuffled.instances.reverse();
        let (one, other) = (plan(&policies, &zone, moment), plan(&policies, &shuffled, moment));
        for (one, other) in one.policies.iter().zip(&other.policies) {
            prop_assert_eq!(all_told(one, &zone), all_told(other, &shuffled));
            let ids = |plan: &PolicyPlan, zone: &Inventory| -> Vec<SnapshotId> {
                plan.decisions.iter().map(|decision| zone.snapshots[decision.index as usize].id).collect()
            };
            prop_assert_eq!(ids(one, &zone), ids(other, &shuffled));
        }
    }

    #[test]
    fn point_20_planning_what_a_plan_leaves_deletes_nothing_more(policies in councils(), (moment, zone) in scenes()) {
        let gone = deleted_ids(&policies, &zone, moment);
        let mut left = zone;
        left.snapshots.retain(|snapshot| !gone.contains(&snapshot.id));
        prop_assert_eq!(deleted_ids(&policies, &left, moment), BTreeSet::new());
    }

    #[test]
    fn point_20_another_keep_rule_or_a_higher_count_never_deletes_more(
        policy in policies(),
        rules in retentions(),
        more in retentions(),
        (moment, zone) in scenes(),
    ) {
        // `max_count` may bind then; and the first keep rule takes the place of keeping all.
        let rules = Retention { max_count: None, ..rules };
        prop_assume!(has_keep_rule(&rules));
        let longer = |one: &Option<Span>, other: &Option<Span>| {
            // A span that reaches further from everywhere in the scene.
            if one.is_none() || is_longer_everywhere(other.as_ref(), one.as_ref(), &zone, &policy.time_zone) {
                other.clone()
            } else {
                one.clone()
            }
        };
        let wider = Retention {
            keep_last: rules.keep_last.max(more.keep_last),
            keep_within: longer(&rules.keep_within, &more.keep_within),
            keep: ByPeriod::of(|period| *rules.keep.get(period).max(more.keep.get(period))),
            keep_within_each: ByPeriod::of(|period| {
                longer(rules.keep_within_each.get(period), more.keep_within_each.get(period))
            }),
            keep_oldest: rules.keep_oldest || more.keep_oldest,
            min_keep: rules.min_keep + more.min_keep,
            min_keep_consistent: rules.min_keep_consistent + more.min_keep_consistent,
            ..rules.clone()
        };
        let fewer = deleted_by(&policy, wider, &zone, moment);
        prop_assert!(fewer.is_subset(&deleted_by(&policy, rules, &zone, moment)));
    }

    #[test]
    fn point_20_a_lower_limit_never_deletes_less(
        policy in policies(),
        rules in retentions(),
        lower in retentions(),
        (moment, zone) in scenes(),
    ) {
        let shorter = |one: &Option<Span>, other: &Option<Span>| {
            let is_shorter = is_longer_everywhere(one.as_ref(), other.as_ref(), &zone, &policy.time_zone);
            if one.is_none() || is_shorter { other.clone() } else { one.clone() }
        };
        let lower = Retention {
            max_count: rules.max_count.into_iter().chain(lower.max_count).min(),
            max_age: shorter(&rules.max_age, &lower.max_age),
            failed_after: shorter(&rules.failed_after, &lower.failed_after),
            ..rules.clone()
        };
        let more = deleted_by(&policy, lower, &zone, moment);
        prop_assert!(deleted_by(&policy, rules, &zone, moment).is_subset(&more));
    }

    #[test]
    fn the_newest_min_keep_and_min_keep_consistent_good_ones_never_go(policies in councils(), (moment, zone) in scenes()) {
        let gone = deleted_ids(&policies, &zone, moment);
        let pruning = policies.iter().filter_map(|policy| Some((policy, policy.retention.as_ref()?)));
        for (policy, table) in pruning {
            for instance in &zone.instances {
                let mut good: Vec<(Timestamp, SnapshotId, bool)> = zone
                    .snapshots
                    .iter()
                    .filter(|snapshot| {
                        snapshot.instance_id == Some(instance.id)
                            && policy.select.selects_instance(snapshot.instance_id, Some(instance))
                            && policy.select.selects_snapshot(snapshot)
                            && is_meant(policy, &policies, &zone, snapshot)
                            && snapshot.state.is_good()
                            && snapshot.created_at <= moment + SignedDuration::from_mins(5)
                    })
                    .map(|one| (one.created_at, one.id, one.application_consistent == Some(true)))
                    .collect();
                good.sort_unstable();
                let newest = good.iter().rev().take(table.min_keep as usize);
                let consistent = good.iter().rev().filter(|(.., is_consistent)| *is_consistent);
                for (_, id, _) in newest.chain(consistent.take(table.min_keep_consistent as usize)) {
                    prop_assert!(!gone.contains(id));
                }
            }
        }
    }

    #[test]
    fn what_is_not_good_or_dated_ahead_or_pinned_or_foreign_or_of_nobody_never_goes(
        policies in councils(),
        (moment, zone) in scenes(),
    ) {
        let gone = deleted_ids(&policies, &zone, moment);
        for snapshot in zone.snapshots.iter().filter(|snapshot| gone.contains(&snapshot.id)) {
            let is_failed = snapshot.state == SnapshotState::Error;
            prop_assert!(snapshot.state.is_good() || is_failed && is_let_go_as_failed(&policies, &zone, snapshot));
            prop_assert!(snapshot.created_at <= moment + SignedDuration::from_mins(5));
            prop_assert!(snapshot.instance_id.is_some());
            let hold = zone.holds.get(&snapshot.id);
            prop_assert!(hold.is_none_or(|hold| hold.until.is_some_and(|until| until <= moment)));
            prop_assert!(policies.iter().any(|policy| is_meant(policy, &policies, &zone, snapshot)));
        }
    }

    #[test]
    fn what_goes_by_one_policy_goes_by_all_that_select_it(policies in councils(), (moment, zone) in scenes()) {
        let plan = plan(&policies, &zone, moment);
        for number in plan.policies.iter().flat_map(deleted) {
            let snapshot = &zone.snapshots[number as usize - 1];
            for (policy, plan) in policies.iter().zip(&plan.policies) {
                let decision = plan.decisions.iter().find(|decision| decision.index + 1 == number);
                let goes = decision.is_none_or(|decision| decision.verdict == Verdict::Delete);
                let is_meant = is_meant(policy, &policies, &zone, snapshot);
                prop_assert!(goes || policy.retention.is_none() || !is_meant);
                prop_assert!(is_meant || decision.is_none_or(|decision| decision.verdict == Verdict::Ignore));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn expiry_is_the_first_whole_second_at_which_the_engine_deletes(
        policies in councils(),
        (moment, zone) in scenes_of(16),
        before in vec(0..15_000_000_i64, 2),
        later in vec(0..200_000_i64, 4),
    ) {
        let plans = plan(&policies, &zone, moment);
        for (place, plan) in plans.policies.iter().enumerate() {
            for decision in plan.decisions.iter().filter(|decision| decision.verdict == Verdict::Keep) {
                let is_deleted = |at: Timestamp| {
                    let plan = super::plan(&policies, &zone, at).policies.swap_remove(place);
                    super::decision(&plan, decision.index + 1).verdict == Verdict::Delete
                };
                if let Some(expiry) = decision.expires_at {
                    prop_assert!(expiry > moment);
                    prop_assert_eq!(expiry.subsec_nanosecond(), 0);
                    prop_assert!(is_deleted(expiry));
                    for before in before.iter().chain(&[1]) {
                        let earlier = expiry - SignedDuration::from_secs(*before);
                        prop_assert!(!is_deleted(earlier.max(moment)) || *before == 0);
                    }
                } else {
                    for hours in &later {
                        prop_assert!(!is_deleted(moment + SignedDuration::from_hours(*hours)));
                    }
                }
            }
        }
    }

    /// Of one instance and by one policy; `max_count` may keep one again when newer ones are too old.
    #[test]
    fn what_is_older_never_outlives_what_is_newer_by_an_age_limit_and_no_verdict_flips_back(
        span in spans(),
        zone in zones(),
        moment in moments(),
        ages in vec(0..3000_i64, 2..12),
        later in vec(0..30_000_i64, 1..6),
    ) {
        let snapshots = ages.iter().map(|hours| snap("web-1", moment - SignedDuration::from_hours(*hours)));
        let inventory = inventory(snapshots);
        let policy = [Policy { time_zone: zone.clone(), ..policy("p").with(Retention { max_age: Some(span), ..no_rules() }) }];
        let mut later = later;
        later.sort_unstable();
        let mut gone = BTreeSet::new();
        for hours in later {
            let now = moment + SignedDuration::from_mins(30 * hours);
            let deleted: BTreeSet<u32> = deleted(&plan_of(&policy, &inventory, now)).into_iter().collect();
            prop_assert!(deleted.is_superset(&gone), "kept again at {}", now);
            let created = |number: &u32| inventory.snapshots[*number as usize - 1].created_at;
            let newest_deleted = deleted.iter().map(created).max();
            let kept = (1..).zip(&inventory.snapshots).filter(|(number, _)| !deleted.contains(number));
            for (_, kept) in kept {
                // The hour that comes twice stands for one time on the wall clock.
                let is_newer = newest_deleted.is_none_or(|newest| kept.created_at + SignedDuration::from_hours(1) > newest);
                prop_assert!(is_newer, "at {}: {} is kept, {:?} is not", now, kept.created_at, newest_deleted);
            }
            gone = deleted;
        }
    }
}
