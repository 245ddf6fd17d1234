//! The engine against the second judge, which reads the rules slowly and plainly, with nothing of the engine's inside.
//! Where the two differ, one of them has misread.

use jiff::{RoundMode, TimestampRound, Unit};
use proptest::collection::{hash_set, vec};
use proptest::option::of;
use proptest::prelude::*;
use proptest::sample::select;

use super::laws::{councils, few_policies, scenes, scenes_of, spans};
use super::*;
use crate::judge;
use crate::judge::calendar::Age;
use crate::judge::facts::Facts;
use crate::policy::Period;
use crate::retention::change_guard::keep_pending;
use crate::retention::inventory::Missing;
use crate::retention::memory::Memory;
use crate::retention::sources::keep_where_missing;
use crate::run::second_judge::{Judged, plan_again};

/// What both judge from, for the run of one of the policies.
pub(super) fn facts(
    policies: &[Policy],
    policy: &Policy,
    inventory: &Inventory,
    memory: &Memory,
    at: Timestamp,
) -> Facts {
    let all: Vec<SnapshotId> = inventory.snapshots.iter().map(|snapshot| snapshot.id).collect();
    let (emptied, changes_are_allowed) = (&[][..], false);
    let judged = Judged { policies, policy, inventory, memory, at, emptied, changes_are_allowed };
    // Through the form that is written to a file.
    let text = serde_json::to_string(&judged.facts(&all).unwrap()).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Verdict and key for each snapshot of the facts; `-` where the policy selects nothing.
pub(super) fn rulings(facts: &Facts) -> Vec<String> {
    let rulings = judge::rulings(facts).unwrap().into_iter();
    rulings.map(|one| one.map_or("-".to_owned(), |one| format!("{} {}", one.verdict, one.rule))).collect()
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
            let age = Age::read(&limit.to_string()).unwrap();
            for snapshot in &inventory.snapshots {
                let end = age.end(snapshot.created_at, &policy.time_zone);
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
    fn the_engine_reads_the_rules_as_the_second_judge_does(policies in councils(), (moment, zone) in scenes()) {
        let plan = plan(&policies, &zone, moment);
        prop_assert_eq!(plan.policies.len(), policies.len());
        for (policy, plan) in policies.iter().zip(&plan.policies) {
            let facts = facts(&policies, policy, &zone, &Memory::default(), moment);
            let (shown, read) = (shown(plan, &zone), rulings(&facts));
            for (snapshot, (shown, read)) in zone.snapshots.iter().zip(shown.iter().zip(&read)) {
                prop_assert_eq!(shown, read, "engine, then judge: {:?} by {}, at {}", snapshot, policy.name, moment);
            }
        }
    }
}

/// What keeps snapshots beside the rules: pauses, failures that are remembered, snapshots that could not be taken, policies
/// that expect some.
#[derive(Debug, Clone)]
struct More {
    policies: Vec<OfPolicy>,
    failed: Vec<(usize, i64, bool)>,
    missing: Vec<(&'static str, Option<&'static str>, i64)>,
    unreachable: bool,
}

/// Of a policy: whether it is paused, since how many hours, whether it creates, what it expects, when it is due.
type OfPolicy = (bool, Option<i64>, bool, Option<Span>, Option<&'static str>);

fn more() -> impl Strategy<Value = More> {
    let hours = || -100..3000_i64;
    let rarely = || prop_oneof![3 => Just(false), 1 => Just(true)];
    let expected = prop_oneof![3 => Just(None), 1 => spans().prop_map(Some)];
    let schedule = of(select(vec!["0 3 * * *", "30 2 * * 0", "@monthly"]));
    let policies = vec((rarely(), of(hours()), any::<bool>(), expected, schedule), 3);
    let failed = vec((0..24_usize, hours(), any::<bool>()), 0..4);
    let names = select(vec!["nightly", "weekly", "monthly"]);
    let missing = vec((names, of(select(vec!["web-1", "web-2"])), hours()), 0..3);
    (policies, failed, missing, rarely()).prop_map(|(policies, failed, missing, unreachable)| More {
        policies,
        failed,
        missing,
        unreachable,
    })
}

impl More {
    fn add_to(&self, policies: &mut [Policy], zone: &mut Inventory, moment: Timestamp) {
        let ago = |hours: i64| moment - SignedDuration::from_hours(hours);
        for (policy, (is_paused, since, creates, expected, schedule)) in
            policies.iter_mut().zip(&self.policies)
        {
            policy.enabled = !is_paused;
            policy.create = *creates;
            policy.guard.expect_newest.clone_from(expected);
            policy.schedule = schedule.map(|line| line.parse().unwrap());
            let since = since.filter(|_| *is_paused).map(|hours| (policy.name.clone(), ago(hours)));
            zone.paused.extend(since);
        }
        for (place, hours, was_good) in &self.failed {
            if let Some(snapshot) = zone.snapshots.get(*place).filter(|one| one.state == SnapshotState::Error)
            {
                zone.failed.insert(snapshot.id, Failed { since: ago(*hours), was_good: *was_good });
            }
        }
        zone.missing.extend(self.missing.iter().map(|(policy, instance, hours)| Missing {
            policy: policy.parse().unwrap(),
            instance: instance.map(instance_id),
            slot: ago(*hours),
            cause: "quota".to_owned(),
        }));
        if self.unreachable {
            zone.archives.insert("vault".parse().unwrap(), Copies::Unreachable("down".to_owned()));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// With pauses, sources that fail, and changes since the last run: policies edited, added, removed or paused, instances
    /// renamed or deleted, snapshots that failed.
    #[test]
    fn the_engine_and_the_second_judge_agree_whatever_keeps_beside_the_rules(
        (before, mut policies) in (councils(), councils()),
        (moment, mut zone) in scenes(),
        (more_before, more) in (more(), more()),
        (is_renamed, gone, hours) in (any::<bool>(), of(0..2_usize), 0..40_i64),
        failed in hash_set(0..24_usize, 0..3),
        edited in any::<bool>(),
    ) {
        let mut before = before;
        let mut then = zone.clone();
        more_before.add_to(&mut before, &mut then, moment);
        let since = moment - SignedDuration::from_hours(hours);
        if edited {
            more.add_to(&mut policies, &mut zone, moment);
        } else {
            policies.clone_from(&before);
            zone.missing.clone_from(&then.missing);
        }
        let mut memory = Memory::default().renewed(&before, &then, since, Vec::new());
        memory.at = Some(since);
        for (place, snapshot) in zone.snapshots.iter_mut().enumerate() {
            if failed.contains(&place) {
                snapshot.state = SnapshotState::Error;
            }
        }
        if is_renamed {
            zone.instances[0].name = "db-1".into();
        }
        if let Some(gone) = gone {
            zone.instances.remove(gone);
        }
        memory.add_to(&mut zone, &policies, moment);
        for policy in policies.iter().filter(|policy| policy.enabled) {
            let mut plans = plan(&policies, &zone, moment).policies;
            let Some(place) = plans.iter().position(|plan| plan.policy == policy.name) else { continue };
            let mut plan = plans.swap_remove(place);
            keep_where_missing(&mut plan, &policies, &zone);
            keep_pending(&mut plan, &policies, &zone, &memory).unwrap();
            let facts = facts(&policies, policy, &zone, &memory, moment);
            let again = plan_again(&facts).unwrap();
            let (shown, read) = (shown(&plan, &zone), rulings(&facts));
            for (snapshot, (shown, read)) in zone.snapshots.iter().zip(shown.iter().zip(&read)) {
                prop_assert_eq!(shown, read, "engine, then judge: {:?} by {}, at {}", snapshot, policy.name, moment);
                let again = again.get(&snapshot.id).map_or("-".to_owned(), |(verdict, rule)| format!("{verdict} {rule}"));
                prop_assert_eq!(shown, &again, "engine, then played again: {:?}", snapshot);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Not at a few later seconds, but at all at which anything can change.
    #[test]
    fn expiry_is_the_first_second_at_which_the_second_judge_deletes(
        policies in few_policies(),
        (moment, zone) in scenes_of(8),
    ) {
        let plans = plan(&policies, &zone, moment);
        let changes = changes(&policies, &zone, moment);
        for (policy, plan) in policies.iter().zip(&plans.policies) {
            let mut firsts: Vec<Option<Timestamp>> = vec![None; zone.snapshots.len()];
            if policy.retention.is_some() {
                let mut facts = facts(&policies, policy, &zone, &Memory::default(), moment);
                for change in &changes {
                    facts.now = *change;
                    for (first, read) in firsts.iter_mut().zip(rulings(&facts)) {
                        if first.is_none() && read.starts_with("delete") {
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
                    "engine, then judge: {:?} by {}, at {}", snapshot, policy.name, moment
                );
            }
        }
    }

    /// Also on facts that nobody could have: dates at the ends of the calendar, and keys that say nothing.
    #[test]
    fn the_second_judge_answers_whatever_the_facts_are(
        policies in councils(),
        (moment, zone) in scenes_of(8),
        dates in vec(select(vec![Timestamp::MIN, Timestamp::MAX, Timestamp::UNIX_EPOCH]), 9),
        (key, value) in (select(vec!["timezone", "instances", "ownership", "no_such_key"]), any::<u32>()),
        is_strange in any::<bool>(),
        seven_hundred_years in any::<bool>(),
    ) {
        for policy in &policies {
            let mut facts = facts(&policies, policy, &zone, &Memory::default(), moment);
            for (snapshot, date) in facts.snapshots.iter_mut().zip(&dates) {
                snapshot.created_at = *date;
            }
            facts.now = *dates.last().unwrap();
            let keys = facts.present.policies.values_mut().next().unwrap();
            if seven_hundred_years {
                keys.insert("max_age".to_owned(), "700y9000mo1000000d99999999999h".into());
            }
            if is_strange {
                keys.insert(key.to_owned(), value.into());
            }
            let victims: Vec<SnapshotId> = facts.snapshots.iter().map(|one| one.id).chain([snapshot_id(99)]).collect();
            let objections = judge::objections(&facts, &victims);
            prop_assert!(objections.iter().any(|one| one.snapshot == snapshot_id(99)), "of what is not listed");
            prop_assert!(!is_strange || objections.len() == victims.len(), "{:?}", objections);
        }
    }
}
