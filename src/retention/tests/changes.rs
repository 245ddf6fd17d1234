//! The change guard: what a change alone would delete stays until the change has settled.

use super::*;
use crate::policy::select::NameGlob;
use crate::retention::change::{Change, Seen};
use crate::retention::change_guard::{keep_emptied, keep_pending};
use crate::retention::memory::{InstanceFacts, Memory};
use crate::retention::verdict::Rule;

fn hours_later(hours: i64) -> Timestamp {
    now() + SignedDuration::from_hours(hours)
}

/// The plan of the first policy as of `at`, and the memory after a run at that time.
fn run(policies: &[Policy], zone: &Inventory, memory: &Memory, at: Timestamp) -> (PolicyPlan, Memory) {
    let mut zone = zone.clone();
    memory.add_to(&mut zone, policies, at);
    let mut plans = plan(policies, &zone, at).policies;
    let mut plan = plans.swap_remove(0);
    let unsettled = keep_pending(&mut plan, policies, &zone, memory).unwrap();
    let memory = memory.renewed(policies, &zone, at, unsettled);
    let text = serde_json::to_string(&memory).unwrap();
    assert_eq!(serde_json::from_str::<Memory>(&text).unwrap(), memory, "it survives being saved");
    (plan, memory)
}

fn pending(plan: &PolicyPlan) -> Vec<u32> {
    let waiting = plan.decisions.iter().filter(|decision| decision.rule == Rule::Change);
    let mut waiting: Vec<u32> = waiting.map(|decision| decision.index + 1).collect();
    waiting.sort_unstable();
    assert_eq!(plan.pending, waiting.len() as u64);
    waiting
}

fn why(plan: &PolicyPlan) -> String {
    let first = plan.decisions.iter().find(|decision| decision.rule == Rule::Change).unwrap();
    assert_eq!(first.blocked_by(), Some("change"));
    first.reasons().next().unwrap().to_string()
}

fn days(count: i64) -> Inventory {
    inventory((0..count).map(|day| snap("web-1", days_ago(day))))
}

#[test]
fn an_edit_waits_until_it_has_settled() {
    let before = [policy("nightly").with(keep_last(4))];
    let after = [policy("nightly").with(keep_last(2))];
    let zone = days(5);
    let (plan, memory) = run(&before, &zone, &Memory::default(), now());
    assert_eq!((deleted(&plan), pending(&plan)), (vec![5], vec![]), "nothing is there to compare with");
    let (plan, memory) = run(&after, &zone, &memory, now());
    assert_eq!((deleted(&plan), pending(&plan)), (vec![5], vec![3, 4]));
    assert_eq!((plan.deletes, plan.good_deletes), (1, 1));
    assert_eq!(
        why(&plan),
        format!(
            "policy nightly: keep_last was 4, is 2: deleted only since then, so not before {}",
            hours_later(20)
        )
    );
    let (plan, memory) = run(&after, &zone, &memory, hours_later(20) - nanosecond());
    assert_eq!(pending(&plan), [3, 4]);
    let (plan, memory) = run(&after, &zone, &memory, hours_later(20));
    assert_eq!((deleted(&plan), pending(&plan)), (vec![3, 4, 5], vec![]));
    let (plan, _) = run(&after, &zone, &memory, hours_later(20));
    assert_eq!(deleted(&plan), [3, 4, 5]);
}

#[test]
fn one_that_was_application_consistent_stays_so_whatever_a_later_answer_says() {
    let policies = [policy("nightly").with(Retention { min_keep_consistent: 1, ..keep_last(1) })];
    let mut zone = days(4);
    zone.snapshots[2] = consistent(zone.snapshots[2].clone());
    let (plan, memory) = run(&policies, &zone, &Memory::default(), now());
    assert_eq!((deleted(&plan), memory.consistent.len()), (vec![2, 4], 1));
    for flag in [None, Some(false)] {
        zone.snapshots[2].application_consistent = flag;
        let (plan, memory) = run(&policies, &zone, &memory, now());
        assert_eq!((deleted(&plan), memory.consistent.len()), (vec![2, 4], 1), "{flag:?}");
    }
    // A newer one takes its place.
    zone.snapshots[0] = consistent(zone.snapshots[0].clone());
    let (plan, memory) = run(&policies, &zone, &memory, now());
    assert_eq!((deleted(&plan), memory.consistent.len()), (vec![2, 3, 4], 2));
    // Where no policy asks, nothing is remembered.
    let (_, memory) = run(&[policy("nightly").with(keep_last(1))], &zone, &memory, hours_later(30));
    assert!(!serde_json::to_string(&memory).unwrap().contains("\"min_keep_consistent\":0"));
}

#[test]
fn taking_min_keep_consistent_away_has_to_settle() {
    let before = [policy("nightly").with(Retention { min_keep_consistent: 2, ..keep_last(1) })];
    let after = [policy("nightly").with(keep_last(1))];
    let mut zone = days(4);
    for index in [2, 3] {
        zone.snapshots[index] = consistent(zone.snapshots[index].clone());
    }
    let (plan, memory) = run(&before, &zone, &Memory::default(), now());
    assert_eq!(deleted(&plan), [2]);
    let (plan, memory) = run(&after, &zone, &memory, now());
    assert_eq!((deleted(&plan), pending(&plan)), (vec![2], vec![3, 4]));
    assert!(why(&plan).contains("min_keep_consistent was 2, is not set"), "{}", why(&plan));
    let (plan, memory) = run(&after, &zone, &memory, hours_later(20));
    assert_eq!(deleted(&plan), [2, 3, 4]);
    assert_eq!(memory.consistent.len(), 0);
}

#[test]
fn an_edit_of_an_hourly_policy_takes_effect_although_ranks_move() {
    let (before, after) = ([policy("hourly").with(keep_last(48))], [policy("hourly").with(keep_last(24))]);
    let zone_at = |hour: i64| inventory((0..60 + hour).map(|age| snap("web-1", hours_later(hour - age))));
    let (_, mut memory) = run(&before, &zone_at(0), &Memory::default(), now());
    for hour in 1..=25 {
        let (plan, next) = run(&after, &zone_at(hour), &memory, hours_later(hour));
        memory = next;
        let expected = if hour <= 20 { 24 } else { 0 };
        assert_eq!(pending(&plan).len(), expected, "in hour {hour}");
        assert_eq!(plan.decisions.iter().filter(|one| one.verdict == Verdict::Keep).count(), 24 + expected);
    }
}

#[test]
fn edits_do_not_restart_each_other_and_one_that_is_taken_back_is_forgotten() {
    let table = |last, within: &str| Retention { keep_within: Some(span(within)), ..keep_last(last) };
    let zone = days(8);
    let (_, memory) = run(&[policy("p").with(table(4, "6d"))], &zone, &Memory::default(), now());
    let (_, memory) = run(&[policy("p").with(table(4, "1d"))], &zone, &memory, now());
    // Another key ten hours later: the first one settles at its own time.
    let (plan, memory) = run(&[policy("p").with(table(1, "1d"))], &zone, &memory, hours_later(10));
    assert_eq!(pending(&plan), [2, 3, 4, 5, 6]);
    let (plan, memory) = run(&[policy("p").with(table(1, "1d"))], &zone, &memory, hours_later(20));
    assert_eq!(pending(&plan), [2, 3, 4], "only keep_last is still taken back");
    assert!(why(&plan).contains("keep_last was 4, is 1"), "{}", why(&plan));
    let (plan, memory) = run(&[policy("p").with(table(4, "1d"))], &zone, &memory, hours_later(21));
    assert_eq!(pending(&plan), [0; 0]);
    let (plan, _) = run(&[policy("p").with(table(1, "1d"))], &zone, &memory, hours_later(31));
    assert_eq!(pending(&plan), [2, 3, 4], "and begins anew");
}

#[test]
fn a_value_that_was_in_force_in_the_meantime_counts_until_it_has_been_replaced_for_that_long() {
    let zone = days(6);
    let with = |last| [policy("p").with(keep_last(last))];
    for (first, last) in [(2, 2), (3, 2), (4, 2)] {
        let (_, memory) = run(&with(first), &zone, &Memory::default(), now());
        let (plan, memory) = run(&with(5), &zone, &memory, now());
        assert_eq!((deleted(&plan), pending(&plan)), (vec![6], vec![]), "keeping more counts at once");
        let (plan, memory) = run(&with(last), &zone, &memory, hours_later(5));
        assert_eq!((deleted(&plan), pending(&plan)), (vec![6], vec![3, 4, 5]), "{first}");
        let expected = format!("keep_last was 5, is {last}: deleted only since then, so not before");
        let fifth = plan.decisions.iter().find(|decision| decision.index == 4).unwrap();
        let text = fifth.reasons().next().unwrap().to_string();
        assert!(text.contains(&format!("{expected} {}", hours_later(25))), "{text}");
        assert_eq!(fifth.expires_at, Some(hours_later(25)));
        let (plan, memory) = run(&with(last), &zone, &memory, hours_later(25) - nanosecond());
        assert_eq!(pending(&plan), [3, 4, 5]);
        let (plan, memory) = run(&with(last), &zone, &memory, hours_later(25));
        assert_eq!((deleted(&plan), pending(&plan)), (vec![3, 4, 5, 6], vec![]));
        assert!(memory.changes.is_empty());
    }
}

#[test]
fn a_clock_that_is_set_back_between_two_edits_makes_them_no_single_one() {
    let zone = days(6);
    let with = |last| [policy("p").with(keep_last(last))];
    let (_, memory) = run(&with(2), &zone, &Memory::default(), hours_later(-1));
    let (_, memory) = run(&with(5), &zone, &memory, now());
    let (plan, memory) = run(&with(2), &zone, &memory, now() - SignedDuration::from_mins(4));
    assert_eq!((deleted(&plan), pending(&plan)), (vec![6], vec![3, 4, 5]));
    let (plan, _) = run(&with(2), &zone, &memory, hours_later(19));
    assert_eq!((deleted(&plan), pending(&plan)), (vec![6], vec![3, 4, 5]));
}

#[test]
fn a_lower_value_begins_anew_when_it_is_edited_and_one_in_between_that_kept_less_holds_nothing() {
    let zone = days(6);
    let with = |last| [policy("p").with(keep_last(last))];
    let (_, memory) = run(&with(5), &zone, &Memory::default(), now());
    let (_, memory) = run(&with(1), &zone, &memory, now());
    let (plan, memory) = run(&with(3), &zone, &memory, hours_later(10));
    assert_eq!((deleted(&plan), pending(&plan)), (vec![6], vec![4, 5]));
    let (plan, memory) = run(&with(3), &zone, &memory, hours_later(30) - nanosecond());
    assert_eq!((deleted(&plan), pending(&plan)), (vec![6], vec![4, 5]));
    let (plan, _) = run(&with(3), &zone, &memory, hours_later(30));
    assert_eq!((deleted(&plan), pending(&plan)), (vec![4, 5, 6], vec![]));
}

#[test]
fn keys_that_kept_something_only_together_count_together() {
    let table = |last, max: Option<u32>| {
        let max_count = max.and_then(NonZeroU32::new);
        [policy("p").with(Retention { max_count, ..keep_last(last) })]
    };
    let zone = days(6);
    let (_, memory) = run(&table(5, Some(2)), &zone, &Memory::default(), now());
    let (plan, memory) = run(&table(5, None), &zone, &memory, now());
    assert_eq!(deleted(&plan), [6]);
    let (plan, memory) = run(&table(2, None), &zone, &memory, hours_later(5));
    assert_eq!((deleted(&plan), pending(&plan)), (vec![6], vec![3, 4, 5]), "as they were from 0 to 5 hours");
    let (plan, _) = run(&table(2, None), &zone, &memory, hours_later(25));
    assert_eq!(deleted(&plan), [3, 4, 5, 6]);
}

#[test]
fn a_key_that_is_edited_all_the_time_does_not_hold_what_another_edit_deletes() {
    let other =
        |spare: u32| policy("other").with(Retention { max_count: NonZeroU32::new(spare), ..keep_last(1) });
    let zone = days(6);
    let both = |last, spare| [policy("p").with(keep_last(last)), other(spare)];
    let (_, mut memory) = run(&both(4, 7), &zone, &Memory::default(), now());
    for step in 0..=125 {
        let at = now() + SignedDuration::from_mins(10 * i64::from(step));
        let (plan, next) = run(&both(2, 8 + step), &zone, &memory, at);
        memory = next;
        let expected = if step < 120 { vec![3, 4] } else { vec![] };
        assert_eq!(pending(&plan), expected, "in step {step}");
    }
    let size = serde_json::to_string(&memory).unwrap().len();
    assert!(size < 40_000, "{size} bytes");
}

#[test]
fn more_changes_than_are_remembered_hold_everything() {
    let mut zone = days(6);
    zone.instances.truncate(1);
    let with = |last| [policy("p").with(keep_last(last))];
    let (_, mut memory) = run(&with(2), &zone, &Memory::default(), now());
    let minutes = |step: u32| now() + SignedDuration::from_mins(step.into());
    for step in 0..300 {
        let (plan, next) = run(&with(10 + step), &zone, &memory, minutes(step));
        assert_eq!(deleted(&plan), [0; 0]);
        memory = next;
    }
    let (plan, memory) = run(&with(1), &zone, &memory, minutes(300));
    assert_eq!((deleted(&plan), pending(&plan)), (vec![], vec![2, 3, 4, 5, 6]));
    let size = serde_json::to_string(&memory).unwrap().len();
    assert!(size < 60_000, "{size} bytes");
    let (plan, _) = run(&with(1), &zone, &memory, minutes(300 + 20 * 60));
    assert_eq!(deleted(&plan), [2, 3, 4, 5, 6]);
}

#[test]
fn a_key_that_goes_to_and_fro_is_remembered_once_for_each_value() {
    let zone = days(6);
    let with = |last| [policy("p").with(keep_last(last))];
    let (_, mut memory) = run(&with(4), &zone, &Memory::default(), now());
    for hour in 1..60 {
        let last = if hour % 2 == 0 { 4 } else { 2 };
        let (plan, next) = run(&with(last), &zone, &memory, hours_later(hour));
        memory = next;
        assert_eq!(deleted(&plan), [5, 6], "in hour {hour}");
        assert!(memory.changes.len() <= 3, "{:?}", memory.changes);
    }
}

#[test]
fn a_policy_that_is_renamed_or_replaced_still_counts_until_that_has_settled() {
    let zone = days(6);
    let (_, memory) = run(&[policy("nightly").with(keep_last(5))], &zone, &Memory::default(), now());
    let renamed = [policy("daily").with(keep_last(2))];
    let (plan, memory) = run(&renamed, &zone, &memory, now());
    assert_eq!((deleted(&plan), pending(&plan)), (vec![6], vec![3, 4, 5]));
    assert!(why(&plan).starts_with("policy nightly is gone: "), "{}", why(&plan));
    let (plan, _) = run(&renamed, &zone, &memory, hours_later(20));
    assert_eq!(deleted(&plan), [3, 4, 5, 6]);
}

#[test]
fn a_policy_of_this_machine_that_is_widened_waits_until_that_has_settled() {
    // It is remembered as `self`, and which instance that was is not: it may not be taken for one of all instances.
    let of = |names: &[&str]| {
        let mut policy = policy("nightly").with(keep_last(1));
        policy.select.this_machine.is_selected = true;
        policy.select.instances = Some(names.iter().map(|name| Pattern::new(name).unwrap()).collect());
        policy.select.resolve(instance_id("web-1"));
        [policy]
    };
    let zone = inventory(
        ["web-1", "web-2"].into_iter().flat_map(|name| [1, 2].map(|day| snap(name, days_ago(day)))),
    );
    let (plan, memory) = run(&of(&[]), &zone, &Memory::default(), now());
    assert_eq!((deleted(&plan), pending(&plan)), (vec![2], vec![]));
    let (plan, memory) = run(&of(&["web-2"]), &zone, &memory, now());
    assert_eq!((deleted(&plan), pending(&plan)), (vec![], vec![2, 4]));
    let (plan, _) = run(&of(&["web-2"]), &zone, &memory, hours_later(20));
    assert_eq!((deleted(&plan), pending(&plan)), (vec![2, 4], vec![]));
}

#[test]
fn what_an_instance_was_called_and_labelled_counts_until_that_has_settled() {
    let long = |select: Select| Policy { select, ..policy("long").with(keep_last(5)) };
    let glob = |text: &str| [("backup".to_owned(), NameGlob::new(text).unwrap())].into();
    let unless = Select { exclude_labels: glob("[!l]*"), ..Select::default() };
    let unmanaged = Select { exclude_managed: true, ..Select::default() };
    let labelled = Select { labels: glob("l*"), ..Select::default() };
    let named = Select { instances: Some(vec![Pattern::new("db-*").unwrap()]), ..Select::default() };
    for (select, expected) in [
        (labelled, "db-1 lost the label backup=long"),
        (unless, "db-1: label backup was long, is none"),
        (unmanaged, "db-1 joined an instance pool or node pool"),
        (named, "instance db-1 is called web-9 now"),
    ] {
        let policies = [policy("all").with(keep_last(1)), long(select)];
        let mut zone = inventory((0..6).map(|day| snap("db-1", days_ago(day))));
        zone.instances = vec![instance("db-1")];
        zone.instances[0].labels.insert("backup".into(), "long".into());
        let (plan, memory) = run(&policies, &zone, &Memory::default(), now());
        assert_eq!(deleted(&plan), [6]);
        let changed = &mut zone.instances[0];
        match expected.split_once("label") {
            Some(("db-1 lost the ", _)) => changed.labels.clear(),
            Some(_) => drop(changed.labels.insert("backup".into(), "none".into())),
            None if expected.contains("joined") => changed.is_managed = true,
            None => changed.name = "web-9".into(),
        }
        let (plan, memory) = run(&policies, &zone, &memory, now());
        assert_eq!((deleted(&plan), pending(&plan)), (vec![6], vec![2, 3, 4, 5]));
        assert!(why(&plan).starts_with(expected), "{}", why(&plan));
        let (plan, _) = run(&policies, &zone, &memory, hours_later(20));
        assert_eq!(deleted(&plan), [2, 3, 4, 5, 6]);
    }
}

#[test]
fn what_an_instance_was_called_and_labelled_in_the_meantime_counts_too() {
    let glob = |text: &str| [("backup".to_owned(), NameGlob::new(text).unwrap())].into();
    let labelled = Select { labels: glob("long"), ..Select::default() };
    let unless = Select { exclude_labels: glob("none"), ..Select::default() };
    let unmanaged = Select { exclude_managed: true, ..Select::default() };
    let named = Select { instances: Some(vec![Pattern::new("db-*").unwrap()]), ..Select::default() };
    let is_selected = |select: &Select, instance: &mut Instance, is: bool| {
        if select.exclude_managed {
            instance.is_managed = !is;
        } else if select.instances.is_some() {
            instance.name = if is { "db-1" } else { "web-9" }.into();
        } else {
            let value = if is { "long" } else { "none" };
            instance.labels.insert("backup".into(), value.into());
        }
    };
    for select in [labelled, unless, unmanaged, named] {
        let long = Policy { select: select.clone(), ..policy("long").with(keep_last(5)) };
        let policies = [policy("all").with(keep_last(1)), long];
        let mut zone = inventory((0..6).map(|day| snap("db-1", days_ago(day))));
        zone.instances = vec![instance("db-1")];
        is_selected(&select, &mut zone.instances[0], false);
        let (plan, memory) = run(&policies, &zone, &Memory::default(), now());
        assert_eq!(deleted(&plan), [2, 3, 4, 5, 6], "{select:?}");
        is_selected(&select, &mut zone.instances[0], true);
        let (plan, memory) = run(&policies, &zone, &memory, now());
        assert_eq!((deleted(&plan), pending(&plan)), (vec![6], vec![]));
        is_selected(&select, &mut zone.instances[0], false);
        let (plan, memory) = run(&policies, &zone, &memory, hours_later(5));
        assert_eq!((deleted(&plan), pending(&plan)), (vec![6], vec![2, 3, 4, 5]), "{select:?}");
        assert!(why(&plan).contains(&hours_later(25).to_string()), "{}", why(&plan));
        let (plan, _) = run(&policies, &zone, &memory, hours_later(25));
        assert_eq!(deleted(&plan), [2, 3, 4, 5, 6]);
    }
}

#[test]
fn a_policy_of_the_meantime_counts_as_it_was_until_its_end_has_settled() {
    let all = policy("all").with(keep_last(1));
    let long = |last| policy("long").with(keep_last(last));
    let zone = days(6);
    for edited in [5, 3] {
        let (plan, memory) = run(std::slice::from_ref(&all), &zone, &Memory::default(), now());
        assert_eq!(deleted(&plan), [2, 3, 4, 5, 6]);
        let (_, memory) = run(&[all.clone(), long(5)], &zone, &memory, now());
        // Removed, or edited first.
        let (_, memory) = run(&[all.clone(), long(edited)], &zone, &memory, hours_later(2));
        let (plan, memory) = run(std::slice::from_ref(&all), &zone, &memory, hours_later(5));
        assert_eq!(pending(&plan), [2, 3, 4, 5]);
        let (plan, memory) = run(std::slice::from_ref(&all), &zone, &memory, hours_later(22) - nanosecond());
        assert_eq!(deleted(&plan), [6]);
        let (plan, memory) = run(std::slice::from_ref(&all), &zone, &memory, hours_later(25) - nanosecond());
        assert_eq!(pending(&plan), (2..=edited).collect::<Vec<u32>>(), "as long as it was edited so");
        let (plan, _) = run(std::slice::from_ref(&all), &zone, &memory, hours_later(25));
        assert_eq!(deleted(&plan), [2, 3, 4, 5, 6]);
    }
    // One that was there before, kept more for some hours, and is removed then.
    let (_, memory) = run(&[all.clone(), long(2)], &zone, &Memory::default(), now());
    let (_, memory) = run(&[all.clone(), long(5)], &zone, &memory, now());
    let mut memory = memory;
    for hour in [5, 6, 21, 22] {
        let (plan, next) = run(std::slice::from_ref(&all), &zone, &memory, hours_later(hour));
        memory = next;
        assert_eq!((deleted(&plan), pending(&plan)), (vec![6], vec![2, 3, 4, 5]), "in hour {hour}");
        let kept = memory.policies.values().filter_map(|keys| keys["keep_last"].as_u64()).max();
        assert_eq!(kept, Some(if hour < 20 { 2 } else { 5 }), "one value settles before the policy");
    }
    let (plan, _) = run(std::slice::from_ref(&all), &zone, &memory, hours_later(25));
    assert_eq!(deleted(&plan), [2, 3, 4, 5, 6]);
}

#[test]
fn a_label_is_remembered_as_long_as_the_policy_that_selected_by_it() {
    let glob = [("tier".to_owned(), NameGlob::new("gold").unwrap())].into();
    let select = Select { labels: glob, ..Select::default() };
    let all = policy("all").with(keep_last(1));
    let both = [all.clone(), Policy { select, ..policy("long").with(keep_last(5)) }];
    let mut zone = days(6);
    zone.instances[0].labels.insert("tier".into(), "gold".into());
    let (_, memory) = run(&both, &zone, &Memory::default(), now());
    let (plan, memory) = run(std::slice::from_ref(&all), &zone, &memory, hours_later(1));
    assert_eq!(pending(&plan), [2, 3, 4, 5]);
    zone.instances[0].labels.clear();
    let (plan, memory) = run(std::slice::from_ref(&all), &zone, &memory, hours_later(2));
    assert_eq!(pending(&plan), [2, 3, 4, 5]);
    let (plan, memory) = run(std::slice::from_ref(&all), &zone, &memory, hours_later(21));
    assert_eq!(pending(&plan), [0; 0], "the policy would have selected nothing without its label");
    let (_, memory) = run(std::slice::from_ref(&all), &zone, &memory, hours_later(22));
    assert!(memory.instances.values().all(|facts| facts.labels.is_empty()), "{:?}", memory.instances);
}

#[test]
fn a_memory_from_before_managed_instances_were_told_apart_makes_no_change() {
    let zone = days(3);
    let (_, memory) = run(&[policy("p").with(keep_last(4))], &zone, &Memory::default(), now());
    let text = serde_json::to_string(&memory).unwrap();
    for word in ["managed", "exclude_labels"] {
        assert!(!text.contains(word), "{text}");
    }
    let mut select = policy("p").with(keep_last(4));
    select.select.exclude_managed = true;
    let (plan, memory) = run(&[select], &zone, &memory, now());
    assert_eq!((deleted(&plan), pending(&plan)), (vec![], vec![]));
    assert!(memory.changes.iter().all(|seen| seen.change.to_string().starts_with("policy p: managed ")));
    assert!(memory.instances.values().all(|facts| facts.is_managed == Some(false)));
}

#[test]
fn what_a_vanished_instance_had_waits_where_orphans_are_judged() {
    let select = Select { judge_orphans: true, ..Select::default() };
    let keeper = Policy {
        select: Select { instances: Some(vec![Pattern::new("web-*").unwrap()]), ..Select::default() },
        ..policy("keeper").with(keep_last(9))
    };
    let policies = [Policy { select, ..policy("all").with(keep_last(1)) }, keeper];
    let mut zone = days(4);
    let (plan, memory) = run(&policies, &zone, &Memory::default(), now());
    assert_eq!(deleted(&plan), [0; 0]);
    zone.instances.clear();
    let (plan, memory) = run(&policies, &zone, &memory, now());
    assert_eq!((deleted(&plan), pending(&plan)), (vec![], vec![2, 3, 4]));
    assert!(why(&plan).contains("instance web-1 is not listed any more"), "{}", why(&plan));
    let (plan, _) = run(&policies, &zone, &memory, hours_later(20));
    assert_eq!(deleted(&plan), [2, 3, 4]);
}

#[test]
fn good_snapshots_that_fail_count_their_age_from_then_and_wait() {
    let table = Retention { failed_after: Some(span("2h")), ..keep_last(9) };
    let policies = [policy("p").with(table)];
    let mut zone = days(5);
    let (_, memory) = run(&policies, &zone, &Memory::default(), now());
    for place in 1..4 {
        zone.snapshots[place].state = SnapshotState::Error;
    }
    let (plan, memory) = run(&policies, &zone, &memory, now());
    assert_eq!((deleted(&plan), pending(&plan)), (vec![], vec![]), "they failed just now");
    let (plan, memory) = run(&policies, &zone, &memory, hours_later(3));
    assert_eq!((deleted(&plan), pending(&plan)), (vec![], vec![2, 3, 4]));
    assert!(why(&plan).starts_with("3 snapshots turned to `error`"), "{}", why(&plan));
    let mut good_again = zone.clone();
    good_again.snapshots[2].state = SnapshotState::Exported;
    let (plan, _) = run(&policies, &good_again, &memory, hours_later(19));
    assert_eq!(pending(&plan), [2, 4]);
    let (plan, memory) = run(&policies, &zone, &memory, hours_later(20));
    assert_eq!((deleted(&plan), plan.good_deletes), (vec![2, 3, 4], 3), "and they count for the guard");
    assert!(memory.failed.values().all(|failed| failed.was_good && failed.since == now()));
}

#[test]
fn a_policy_is_paused_and_goes_on_without_losing_anything() {
    let nightly = policy("nightly").with(keep_last(4));
    let paused = Policy { enabled: false, ..nightly.clone() };
    let hourly = policy("hourly").with(keep_last(1));
    let zone = days(6);
    let (plan, memory) = run(&[hourly.clone(), nightly.clone()], &zone, &Memory::default(), now());
    assert_eq!(deleted(&plan), [5, 6]);
    let mut memory = memory;
    for hour in [0, 20, 24 * 60] {
        let (plan, next) = run(&[hourly.clone(), paused.clone()], &zone, &memory, hours_later(hour));
        memory = next;
        assert_eq!((deleted(&plan), pending(&plan)), (vec![5, 6], vec![]), "after {hour} hours");
        let kept = plan.decisions.iter().find(|decision| decision.index == 3).unwrap();
        assert_eq!(kept.blocked_by(), Some("paused"));
    }
}

/// A policy that keeps what is younger than three days, beside one that keeps only the newest. It was paused `days` days
/// ago.
fn paused_days_ago(days: i64, zone: &Inventory) -> ([Policy; 2], [Policy; 2], Memory) {
    let all = policy("all").with(keep_last(1));
    let short = policy("short").with(Retention { keep_within: Some(span("3d")), ..no_rules() });
    let paused = [all.clone(), Policy { enabled: false, ..short.clone() }];
    let enabled = [all, short];
    let (_, memory) = run(&enabled, zone, &Memory::default(), days_ago(days));
    let (_, memory) = run(&paused, zone, &memory, days_ago(days));
    let (plan, memory) = run(&paused, zone, &memory, now());
    let kept: Vec<u32> = (2..=6).filter(|place| (3..=6).contains(place)).collect();
    let frozen = plan.decisions.iter().filter(|one| one.blocked_by() == Some("paused"));
    let mut frozen: Vec<u32> = frozen.map(|one| one.index + 1).collect();
    frozen.sort_unstable();
    assert_eq!((frozen, deleted(&plan)), (kept, vec![2]));
    (paused, enabled, memory)
}

#[test]
fn what_a_paused_policy_kept_waits_when_it_is_enabled_or_removed() {
    // Snapshots of today, and of 1, 2, 3, 4 and 5 days before today; paused two days ago.
    let zone = days(6);
    let (paused, enabled, memory) = paused_days_ago(2, &zone);
    let kept = [3, 4, 5, 6];
    // Enabled again: it speaks of the new ones, too, and of those that it kept then it would keep two.
    let (plan, on) = run(&enabled, &zone, &memory, now());
    assert_eq!((deleted(&plan), pending(&plan)), (vec![], vec![5, 6]));
    // Paused again after five hours: both that which it kept then and that which it keeps now stay.
    let (plan, off) = run(&paused, &zone, &on, hours_later(5));
    assert_eq!(deleted(&plan), [0; 0]);
    let (plan, off) = run(&paused, &zone, &off, hours_later(19));
    assert_eq!(deleted(&plan), [0; 0]);
    let (plan, _) = run(&paused, &zone, &off, hours_later(25));
    assert_eq!(deleted(&plan), [4, 5, 6], "it was paused anew after five hours, and keeps what it kept then");
    let (plan, _) = run(&enabled, &zone, &on, hours_later(20));
    assert_eq!(deleted(&plan), [4, 5, 6]);
    // Removed while it was paused.
    let (plan, removed) = run(&paused[..1], &zone, &memory, now());
    assert_eq!((deleted(&plan), pending(&plan)), (vec![2], kept.to_vec()));
    let (plan, removed) = run(&paused[..1], &zone, &removed, hours_later(19));
    assert_eq!(pending(&plan), kept);
    let (plan, _) = run(&paused[..1], &zone, &removed, hours_later(20));
    assert_eq!(deleted(&plan), [2, 3, 4, 5, 6]);
}

/// Between two runs of a weekly policy a change has settled that no memory has taken in, and another one came.
#[test]
fn what_a_paused_policy_kept_waits_also_where_only_one_run_saw_it_paused() {
    let [all, short] = [policy("all").with(keep_last(1)), policy("short").with(keep_within("3d"))];
    let enabled = [all.clone(), short.clone()];
    let paused = [all, Policy { enabled: false, ..short }];
    let zone = days(8);
    let (_, memory) = run(&enabled, &zone, &Memory::default(), days_ago(14));
    let (plan, seen_paused) = run(&paused, &zone, &memory, days_ago(5));
    let kept_by_paused = [6, 7, 8];
    assert_eq!(deleted(&plan), [0; 0], "at that time all were younger than three days, or did not exist");
    let (plan, mut memory) = run(&enabled, &zone, &seen_paused, now());
    assert!(kept_by_paused.iter().all(|number| pending(&plan).contains(number)), "{:?}", pending(&plan));
    let (plan, _) = run(&enabled[..1], &zone, &seen_paused, now());
    assert!(
        kept_by_paused.iter().all(|number| pending(&plan).contains(number)),
        "removed: {:?}",
        pending(&plan)
    );
    for hours in [1, 19] {
        let (plan, next) = run(&enabled, &zone, &memory, hours_later(hours));
        assert!(kept_by_paused.iter().all(|number| pending(&plan).contains(number)), "after {hours} hours");
        memory = next;
    }
    let (plan, _) = run(&enabled, &zone, &memory, hours_later(20));
    assert_eq!(pending(&plan), [0; 0]);
}

/// The first run after the pause came days later.
#[test]
fn what_a_policy_kept_when_it_was_paused_by_hand_waits_though_no_run_saw_that_then() {
    let [all, last] = [policy("all").with(keep_last(1)), policy("last").with(keep_last(3))];
    let enabled = [all.clone(), last.clone()];
    let paused = [all, Policy { enabled: false, paused_since: Some(days_ago(5)), ..last }];
    let zone = days(8);
    let (_, memory) = run(&enabled, &zone, &Memory::default(), days_ago(6));
    // Those of the day of the pause, and of the two before; the others came later.
    let (plan, memory) = run(&paused, &zone, &memory, now());
    assert_eq!((deleted(&plan), pending(&plan)), (vec![4, 5], vec![2, 3]));
    let (plan, memory) = run(&enabled, &zone, &memory, hours_later(21));
    assert_eq!(pending(&plan), [6, 7, 8]);
    let (plan, _) = run(&enabled, &zone, &memory, hours_later(40));
    assert_eq!(pending(&plan), [6, 7, 8]);
}

#[test]
fn a_policy_that_is_paused_enabled_and_paused_keeps_what_it_ever_kept() {
    let zone = days(6);
    let on = [policy("all").with(keep_last(1)), policy("nightly").with(keep_last(4))];
    let off = [on[0].clone(), Policy { enabled: false, ..on[1].clone() }];
    let (_, mut memory) = run(&on, &zone, &Memory::default(), now());
    for (hour, policies) in [(0, &off), (2, &on), (4, &off), (24, &off), (48, &off)] {
        let (plan, next) = run(policies, &zone, &memory, hours_later(hour));
        memory = next;
        assert_eq!((deleted(&plan), pending(&plan)), (vec![5, 6], vec![]), "after {hour} hours");
    }
    assert_eq!(memory.paused.values().collect::<Vec<_>>(), [&hours_later(4)]);
}

#[test]
fn with_settle_switched_off_an_edit_counts_at_once() {
    let off = |mut policy: Policy| {
        policy.guard.settle = std::time::Duration::ZERO;
        policy
    };
    let zone = days(5);
    let (_, memory) = run(&[off(policy("p").with(keep_last(4)))], &zone, &Memory::default(), now());
    let (plan, _) = run(&[off(policy("p").with(keep_last(2)))], &zone, &memory, now());
    assert_eq!((deleted(&plan), pending(&plan)), (vec![3, 4, 5], vec![]));
}

#[test]
fn a_change_that_was_taken_back_while_the_policy_did_not_run_begins_anew() {
    let (nightly, daily) = (policy("nightly").with(keep_last(5)), policy("daily").with(keep_last(2)));
    let zone = days(6);
    let (_, of_nightly) = run(std::slice::from_ref(&nightly), &zone, &Memory::default(), now());
    let (_, mut of_daily) = run(std::slice::from_ref(&daily), &zone, &of_nightly, now());
    assert_eq!(of_daily.changes.len(), 1);
    // The name from before is back for days, and then lost again.
    let (_, of_nightly) = run(std::slice::from_ref(&nightly), &zone, &of_nightly, hours_later(24));
    let (plan, _) = run(std::slice::from_ref(&daily), &zone, &of_daily, hours_later(120));
    assert_eq!(pending(&plan), [0; 0], "its own memory alone does not know");
    // Another policy has seen the change by now; it knows that it was not there before.
    let both = [policy("hourly").with(keep_last(5)), daily.clone()];
    let (_, of_hourly) = run(&[both[0].clone(), nightly.clone()], &zone, &Memory::default(), hours_later(96));
    let (_, of_hourly) = run(&both, &zone, &of_hourly, hours_later(119));
    let mut seen_by_both = of_daily.clone();
    seen_by_both.forget_interrupted(&of_hourly);
    assert!(seen_by_both.changes.is_empty());
    of_daily.forget_interrupted(&of_nightly);
    let (plan, _) = run(std::slice::from_ref(&daily), &zone, &of_daily, hours_later(120));
    assert_eq!(pending(&plan), [3, 4, 5]);
}

/// What another policy's run remembers, in which all had one value, or the other.
fn memory_of(keep_last: u32, name: &str, tier: Option<&str>, is_managed: bool) -> Memory {
    let keys = [("keep_last".to_owned(), keep_last.into())].into();
    let labels = [("tier".to_owned(), tier.map(str::to_owned))].into();
    let facts = InstanceFacts { name: name.to_owned(), labels, is_managed: Some(is_managed) };
    Memory {
        at: Some(hours_later(24)),
        policies: [(policy("p").name, keys)].into(),
        instances: [(instance_id("web-1"), facts)].into(),
        good: [snapshot_id(1)].into(),
        ..Memory::default()
    }
}

#[test]
fn a_change_begins_anew_where_a_later_run_of_another_policy_found_what_was_before_it() {
    let (id, policy) = (instance_id("web-1"), policy("p").name);
    let (before, after) = (memory_of(4, "a", Some("gold"), false), memory_of(2, "b", None, true));
    let key = |was: u32, is: u32| Change::Key {
        policy: policy.clone(),
        key: "keep_last".into(),
        was: Some(was.into()),
        is: Some(is.into()),
    };
    let name = || "a".to_owned();
    let changes = [
        key(4, 2),
        Change::Renamed { id, was: name(), is: "b".into() },
        Change::Label { id, name: name(), label: "tier".into(), was: Some("gold".into()), is: None },
        Change::Managed { id, name: name(), was: false, is: true },
    ];
    let losses = [
        Change::PolicyGone(policy.clone()),
        Change::Vanished { id, name: name() },
        Change::Failed(snapshot_id(1)),
    ];
    let seen =
        |change: &Change| Seen { since: now(), not_before: None, paused_since: None, change: change.clone() };
    let forgotten = |change: &Change, later: &Memory| {
        let mut own = Memory { at: Some(now()), changes: vec![seen(change)], ..Memory::default() };
        own.forget_interrupted(later);
        own.changes
    };
    for change in &changes {
        assert_eq!(forgotten(change, &after), [seen(change)], "{change}: it was so all the time");
        assert_eq!(forgotten(change, &Memory::default()), [seen(change)], "{change}: nothing is known");
        let back =
            Seen { since: hours_later(24), not_before: Some(now()), ..seen(&change.reversed().unwrap()) };
        assert_eq!(forgotten(change, &before), [seen(change), back], "{change}");
    }
    for loss in &losses {
        assert_eq!(forgotten(loss, &Memory::default()), [seen(loss)], "{loss}");
        assert_eq!(forgotten(loss, &before), [], "{loss}");
    }
    // One that the other policy saw as well, and no sooner than this one, or later.
    for (change, not_before, begins_anew) in
        [(key(4, 2), hours_later(-1), false), (key(4, 2), now(), true), (key(4, 3), hours_later(-1), true)]
    {
        let other = Seen { not_before: Some(not_before), ..seen(&change) };
        let later = Memory { changes: vec![other], ..after.clone() };
        assert_eq!(forgotten(&key(4, 2), &later).len() > 1, begins_anew, "{change}");
    }
    // A pause that began anew is none that was taken back.
    let no = Some(serde_json::Value::Bool(false));
    let anew = Change::Key { policy: policy.clone(), key: "enabled".into(), was: no.clone(), is: no.clone() };
    let mut paused = before.clone();
    paused.policies.get_mut(&policy).unwrap().extend(no.map(|no| ("enabled".to_owned(), no)));
    assert_eq!(forgotten(&anew, &paused), [seen(&anew)]);
}

#[test]
fn a_policy_that_only_its_own_last_run_knew_of_is_found_to_be_gone() {
    let gone = policy("p").name;
    let (mut memory, own) = (Memory::default(), memory_of(4, "a", None, false));
    memory.add_gone(&policy("q").name, &own);
    assert!(memory.policies.is_empty(), "of another one it knows nothing");
    memory.add_gone(&gone, &own);
    assert_eq!(memory.policies, own.policies);
    memory.add_gone(&gone, &memory_of(2, "a", None, false));
    assert_eq!(memory.policies, own.policies, "what is known stays");
}

#[test]
fn only_a_pause_has_a_time_of_its_own_and_it_begins_anew_where_a_policy_was_resumed_in_between() {
    let (all, on, zone) = (policy("all").with(keep_last(1)), policy("p").with(keep_last(4)), days(5));
    let paused_since =
        |at: Timestamp| [all.clone(), Policy { enabled: false, paused_since: Some(at), ..on.clone() }];
    let (_, memory) = run(&[all.clone(), on.clone()], &zone, &Memory::default(), days_ago(3));
    let (_, memory) = run(&paused_since(days_ago(2)), &zone, &memory, days_ago(2));
    let (_, memory) = run(&paused_since(days_ago(2)), &zone, &memory, days_ago(1));
    assert_eq!(memory.paused.values().collect::<Vec<_>>(), [&days_ago(2)]);
    for (since, changes) in [(days_ago(3), 0), (days_ago(2), 0), (days_ago(2) + nanosecond(), 1)] {
        assert_eq!(memory.differences(&paused_since(since), &zone, now()).len(), changes, "{since}");
    }
    // An edit of a policy that is paused by hand.
    let [all, paused] = paused_since(days_ago(2));
    let edited = [all, Policy { retention: policy("p").with(keep_last(2)).retention, ..paused }];
    let found = memory.differences(&edited, &zone, now());
    assert_eq!(found.iter().map(|seen| seen.paused_since).collect::<Vec<_>>(), [None]);
}

#[test]
fn a_memory_that_this_version_cannot_read_is_an_error() {
    let zone = days(5);
    let (_, mut memory) = run(&[policy("p").with(keep_last(4))], &zone, &Memory::default(), now());
    for (key, value) in [("keep_moons", serde_json::json!(3)), ("keep_last", serde_json::json!({}))] {
        let mut damaged = memory.clone();
        damaged.policies.values_mut().next().unwrap().insert(key.to_owned(), value);
        let policies = [policy("p").with(keep_last(2))];
        let mut plan = plan(&policies, &zone, now()).policies.swap_remove(0);
        let error = keep_pending(&mut plan, &policies, &zone, &damaged).unwrap_err();
        assert!(error.contains(key), "{error}");
    }
    memory.policies.clear();
}

#[test]
fn a_change_ends_as_another_one_of_the_same_thing_if_the_same_is_there_after_both() {
    let (id, policy) = (instance_id("web-1"), policy("p").name);
    let key = |is: u32| Change::Key {
        policy: policy.clone(),
        key: "keep_last".into(),
        was: None,
        is: Some(is.into()),
    };
    let renamed = |is: &str| Change::Renamed { id, was: "web-1".into(), is: is.into() };
    let label = |is: &str| Change::Label {
        id,
        name: "web-1".into(),
        label: "tier".into(),
        was: None,
        is: Some(is.into()),
    };
    let managed = |is: bool| Change::Managed { id, name: "web-1".into(), was: !is, is };
    for [one, same, other] in [
        [key(1), key(1), key(2)],
        [renamed("a"), renamed("a"), renamed("b")],
        [label("a"), label("a"), label("b")],
        [managed(true), managed(true), managed(false)],
    ] {
        assert!(one.has_same_end(&same) && !one.has_same_end(&other), "{one}");
        let back = other.reversed().unwrap();
        assert_eq!(back.subject(), other.subject());
        assert_eq!(back.reversed().unwrap(), other);
        assert!(!other.is_none(), "{other}");
    }
    for loss in [
        Change::PolicyGone(policy.clone()),
        Change::Vanished { id, name: "web-1".into() },
        Change::Failed(snapshot_id(1)),
    ] {
        assert!(loss.has_same_end(&loss) && loss.reversed().is_none() && !loss.is_none());
    }
    let same = |key: &str, value: bool| {
        let value = Some(serde_json::Value::Bool(value));
        Change::Key { policy: policy.clone(), key: key.into(), was: value.clone(), is: value }
    };
    assert!(same("create", false).is_none() && same("enabled", true).is_none());
    assert!(!same("enabled", false).is_none(), "it is paused anew");
}

#[test]
fn what_an_instance_lost_all_of_is_taken_out_of_the_numbers_of_the_plan() {
    let failed = in_state("error", snap("web-1", days_ago(9)));
    let zone = inventory([
        snap("web-1", days_ago(0)),
        snap("web-1", days_ago(1)),
        snap("web-2", days_ago(0)),
        snap("web-2", days_ago(1)),
        failed,
    ]);
    let policies = [policy("p").with(Retention { failed_after: Some(span("1d")), ..keep_last(1) })];
    let mut plan = plan_of(&policies, &zone, now());
    assert_eq!((deleted(&plan), plan.deletes, plan.good_deletes), (vec![2, 4, 5], 3, 2));
    keep_emptied(&mut plan, &zone, &[instance_id("web-1")]);
    assert_eq!((deleted(&plan), plan.deletes, plan.good_deletes), (vec![4], 1, 1));
    assert_eq!(decision(&plan, 2).blocked_by(), Some("guard"));
}
