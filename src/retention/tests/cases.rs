//! Rules, their composition, and the numbered edge cases.

use super::*;
use crate::policy::select::NameGlob;
use crate::retention::deciding_keys::deciding_keys;
use crate::retention::guard::{WholeRun, ZoneCase, hold};
use crate::retention::verdict::{CopyNeeded, Rule};

fn nightly() -> Policy {
    policy("nightly")
}

/// One good snapshot of `web-1` for each age in days.
fn aged(days: &[i64]) -> Inventory {
    inventory(days.iter().map(|days| snap("web-1", days_ago(*days))))
}

#[test]
fn rules_compose() {
    let last_or_within = Retention { keep_within: Some(span("4d")), ..keep_last(2) };
    let oldest_three = |rules: Retention| Retention { min_keep: 3, ..rules };
    let cases: [(&str, Retention, &[i64], &[&str]); 12] = [
        (
            "keep_last keeps the newest",
            keep_last(2),
            &[3, 1, 2],
            &["delete keep", "keep keep_last", "keep keep_last"],
        ),
        (
            "keep_last of more than there are",
            keep_last(1_000_000_000),
            &[1, 2],
            &["keep keep_last", "keep keep_last"],
        ),
        ("keep_within keeps the young", keep_within("2d"), &[1, 3], &["keep keep_within", "delete keep"]),
        (
            "rules are a union",
            last_or_within.clone(),
            &[1, 3, 4, 5],
            &["keep keep_last", "keep keep_last", "keep keep_within", "delete keep"],
        ),
        ("without a keep rule all are held", max_age("2d"), &[1, 3], &["keep none", "delete max_age"]),
        (
            "max_age overrules a keep rule",
            Retention { max_age: Some(span("2d")), ..keep_last(3) },
            &[1, 3],
            &["keep keep_last", "delete max_age"],
        ),
        (
            "one that no rule wants is deleted by that, however old it is",
            Retention { max_age: Some(span("2d")), ..keep_last(1) },
            &[1, 3],
            &["keep keep_last", "delete keep"],
        ),
        (
            "max_count overrules a keep rule",
            Retention { max_count: count(1), ..keep_within("4d") },
            &[1, 3],
            &["keep keep_within", "delete max_count"],
        ),
        (
            "max_count alone",
            Retention { max_count: count(1), ..no_rules() },
            &[1, 3],
            &["keep none", "delete max_count"],
        ),
        (
            "min_keep overrules max_age",
            oldest_three(max_age("2d")),
            &[1, 3, 4, 5],
            &["keep none", "keep min_keep", "keep min_keep", "delete max_age"],
        ),
        (
            "min_keep overrules max_count",
            oldest_three(Retention { max_count: count(1), ..no_rules() }),
            &[1, 2, 3, 4],
            &["keep none", "keep min_keep", "keep min_keep", "delete max_count"],
        ),
        (
            "min_keep overrules that nothing wants it",
            oldest_three(keep_last(1)),
            &[1, 2, 3, 4],
            &["keep keep_last", "keep min_keep", "keep min_keep", "delete keep"],
        ),
    ];
    for (name, rules, ages, expected) in cases {
        let zone = aged(ages);
        assert_eq!(shown(&plan_of(&[nightly().with(rules)], &zone, now()), &zone), expected, "{name}");
    }
}

#[test]
fn min_keep_consistent_keeps_the_newest_that_are_so_whatever_the_rules_say() {
    let keeping = |count: u32, rules: Retention| Retention { min_keep_consistent: count, ..rules };
    let (kept, unwanted) = ("keep min_keep_consistent", "delete keep");
    let cases: [(&str, Retention, &[i64], &[&str]); 9] = [
        ("none by default", keep_last(1), &[3], &["keep keep_last", unwanted, unwanted, unwanted]),
        (
            "an older one stays",
            keeping(1, keep_last(1)),
            &[3, 4],
            &["keep keep_last", unwanted, kept, unwanted],
        ),
        ("so many", keeping(2, keep_last(1)), &[3, 4], &["keep keep_last", unwanted, kept, kept]),
        ("as there are", keeping(9, keep_last(1)), &[4], &["keep keep_last", unwanted, unwanted, kept]),
        (
            "one that is kept anyway takes a place",
            keeping(1, keep_last(1)),
            &[1, 4],
            &["keep keep_last", unwanted, unwanted, unwanted],
        ),
        (
            "also beyond max_age",
            keeping(1, max_age("2d")),
            &[3],
            &["keep none", "keep none", kept, "delete max_age"],
        ),
        (
            "and beyond max_count, where it takes no place of another",
            keeping(1, Retention { max_count: count(2), ..no_rules() }),
            &[4],
            &["keep none", "keep none", "delete max_count", kept],
        ),
        (
            "min_keep comes first",
            keeping(1, Retention { min_keep: 2, ..max_age("1h") }),
            &[2],
            &["keep min_keep", "keep min_keep", "delete max_age", "delete max_age"],
        ),
        (
            "without any that is so nothing is kept",
            keeping(1, keep_last(1)),
            &[],
            &["keep keep_last", unwanted, unwanted, unwanted],
        ),
    ];
    for (name, rules, consistent_days, expected) in cases {
        let zone = inventory((1..=4).map(|day| match snap("web-1", days_ago(day)) {
            one if consistent_days.contains(&day) => consistent(one),
            // Where the API does not say, it is none.
            one if day == 2 => Snapshot { application_consistent: None, ..one },
            one => one,
        }));
        assert_eq!(shown(&plan_of(&[nightly().with(rules)], &zone, now()), &zone), expected, "{name}");
    }
}

#[test]
fn min_keep_consistent_counts_good_ones_of_each_instance_and_says_so() {
    let rules = Retention { min_keep_consistent: 1, ..keep_last(1) };
    let zone = inventory([
        snap("web-1", days_ago(1)),
        in_state("error", consistent(snap("web-1", days_ago(2)))),
        consistent(snap("web-1", days_ago(3))),
        consistent(snap("web-1", days_ago(4))),
        snap("web-2", days_ago(1)),
        consistent(snap("web-2", days_ago(5))),
        consistent(snap("web-2", days_ago(-1))),
    ]);
    let plan = plan_of(&[nightly().with(rules)], &zone, now());
    assert_eq!(
        shown(&plan, &zone),
        [
            "keep keep_last",
            "ignore state",
            "keep min_keep_consistent",
            "delete keep",
            "keep keep_last",
            "keep min_keep_consistent",
            "ignore future",
        ]
    );
    let one = decision(&plan, 3);
    let reasons: Vec<String> = one.reasons().map(|reason| reason.to_string()).collect();
    assert_eq!(
        reasons,
        [
            "newest 1 of 1 application-consistent ones that are always kept (min_keep_consistent)",
            "otherwise it would be deleted",
            "no keep rule wants it",
            "number 2 from the newest (keep_last = 1)",
        ]
    );
    assert_eq!((one.expires_at, one.blocked_by()), (None, None));
}

#[test]
fn each_instance_is_judged_for_itself() {
    let zone = inventory([
        snap("web-1", days_ago(1)),
        snap("web-2", days_ago(2)),
        snap("web-1", days_ago(3)),
        snap("web-2", days_ago(4)),
    ]);
    let expected = ["keep keep_last", "keep keep_last", "delete keep", "delete keep"];
    assert_decided(&[nightly().with(keep_last(1))], &zone, now(), &expected);
}

#[test]
fn decisions_stand_by_instance_and_newest_first_with_orphans_last() {
    let zone = inventory([
        Snapshot { instance_id: None, ..snap("", days_ago(0)) },
        snap("gone", days_ago(0)),
        snap("web-2", days_ago(1)),
        snap("web-1", days_ago(3)),
        in_state("error", snap("web-1", days_ago(2))),
        snap("web-1", days_ago(1)),
    ]);
    let plan = plan_of(&[nightly().with(keep_last(1))], &zone, now());
    let order: Vec<u32> = plan.decisions.iter().map(|decision| decision.index + 1).collect();
    assert_eq!(order, [6, 5, 4, 3, 2, 1]);
    assert_eq!((plan.good, plan.deletes), (3, 1));
}

#[test]
fn a_policy_that_is_elsewhere_has_no_plan_and_no_say() {
    let zone = aged(&[1, 2]);
    let elsewhere =
        Policy { zones: vec!["at-vie-1".parse().unwrap()], ..policy("elsewhere").with(keep_last(9)) };
    let plan = plan(&[nightly().with(keep_last(1)), elsewhere], &zone, now());
    assert_eq!(plan.policies.len(), 1);
    assert_eq!(deleted(&plan.policies[0]), [2]);
    assert_eq!((plan.at, plan.zone), (now(), zone.zone));
}

#[test]
fn a_paused_policy_has_no_plan_and_keeps_what_it_kept_when_it_was_paused() {
    let paused = Policy { enabled: false, ..policy("paused").with(keep_last(2)) };
    let policies = [nightly().with(keep_last(1)), paused];
    let mut zone = aged(&[0, 1, 2, 3, 4]);
    for (paused_at, expected) in
        [(days_ago(2), vec![2, 5]), (days_ago(1), vec![4, 5]), (now(), vec![3, 4, 5])]
    {
        zone.paused.insert(policies[1].name.clone(), paused_at);
        let plan = plan(&policies, &zone, now());
        assert_eq!(plan.policies.len(), 1);
        assert_eq!(deleted(&plan.policies[0]), expected, "paused at {paused_at}");
        let kept: Vec<_> = plan.policies[0].decisions.iter().filter(|one| one.rule == Rule::Policy).collect();
        assert!(!kept.is_empty() && kept.iter().all(|one| one.expires_at.is_none()), "its time stands still");
    }
}

#[test]
fn the_gate_of_a_paused_policy_counts_the_copies_of_then() {
    let exporter = Policy { enabled: false, ..policy("offsite").requiring(&["vault"], Which::Newest) };
    let policies = [nightly().with(keep_last(1)), exporter];
    let mut zone = aged(&[1, 2, 9]);
    zone.paused.insert(policies[1].name.clone(), days_ago(5));
    for (exported_at, expected) in
        [(Some(days_ago(6)), vec![2, 3]), (None, vec![2, 3]), (Some(days_ago(4)), vec![2])]
    {
        let Copies::Known(mut copies) = zone.copies(&[3]) else { panic!() };
        copies[0].exported_at = exported_at;
        let zone = zone.clone().archive("vault", Copies::Known(copies));
        let plan = plan_of(&policies, &zone, now());
        assert_eq!(deleted(&plan), expected, "exported at {exported_at:?}");
        let last = decision(&plan, 3);
        if expected.len() == 1 {
            let texts: Vec<String> = last.reasons().map(|reason| reason.to_string()).collect();
            assert!(
                last.blocked_by() == Some("paused") && texts[0].contains("`offsite`, which is paused"),
                "{texts:?}"
            );
            assert!(!texts.concat().contains("no verified copy"), "there is one by now: {texts:?}");
        } else {
            assert_eq!(last.copies().len(), 1, "and verified before deleting");
        }
    }
}

#[test]
fn a_copy_that_is_required_is_required_of_all_that_prune() {
    let exporter = policy("offsite").requiring(&["vault"], Which::All);
    let policies = [nightly().with(keep_last(1)), exporter];
    let zone = aged(&[1, 2]).archive("vault", Copies::Known(Vec::new()));
    let plans = plan(&policies, &zone, now());
    assert_eq!(shown(&plans.policies[0], &zone), ["keep keep_last", "keep policy"]);
    let zone = zone.archive("vault", Copies::Assumed);
    let plans = plan(&policies, &zone, now());
    assert_eq!(shown(&plans.policies[0], &zone), ["keep keep_last", "delete keep"]);
    assert_eq!(decision(&plans.policies[0], 2).copies().len(), 1, "and proved before deleting");
}

/// Noon of today, Wednesday, and of the five days before; a weekly export was last due on Sunday at four, thus after the
/// fifth.
fn a_week() -> (Inventory, Policy) {
    let weekly = policy("weekly").requiring(&["vault"], Which::Newest);
    let schedule = Some("0 4 * * 0".parse().unwrap());
    (inventory((0..6).map(|day| snap("web-1", days_ago(day)))), Policy { schedule, ..weekly })
}

/// A copy of the snapshot with this number, whose export began then.
fn exported(zone: &Inventory, number: usize, exported_at: Option<&str>) -> Copies {
    let Copies::Known(mut copies) = zone.copies(&[number]) else { panic!() };
    copies[0].exported_at = exported_at.map(at);
    Copies::Known(copies)
}

#[test]
fn a_weekly_export_blocks_pruning_only_until_its_last_due_run_has_its_copy() {
    let (zone, weekly) = a_week();
    let in_time = Some("2026-09-13T04:10:00Z");
    let prune = policy("prune").with(keep_last(1));
    for (copies, expected) in [
        (exported(&zone, 5, in_time), &[2, 3, 4, 5, 6][..]),
        (exported(&zone, 4, Some("2026-09-14T04:00:00Z")), &[2, 3, 4, 5, 6]),
        // It missed its last run; the copy is of that before, or of an unknown one, or dated in the future.
        (exported(&zone, 5, Some("2026-09-13T03:59:59Z")), &[5, 6]),
        (exported(&zone, 5, None), &[5, 6]),
        (exported(&zone, 5, Some("2026-09-16T12:00:01Z")), &[5, 6]),
        // An older one than there was when it was due.
        (exported(&zone, 6, in_time), &[6]),
        (Copies::Known(Vec::new()), &[]),
        (Copies::Unreachable("x".to_owned()), &[]),
    ] {
        let zone = zone.clone().archive("vault", copies);
        let plan = plan_of(&[prune.clone(), weekly.clone()], &zone, now());
        assert_eq!(deleted(&plan), expected, "{:?}", zone.archives);
        let since = decision(&plan, 2).copies().first().map(|copy| copy.or_since);
        assert!(since.is_none_or(|since| since == Some(at("2026-09-13T04:00:00Z"))));
        assert!(decision(&plan, 6).copies().iter().all(|copy| copy.or_since.is_none()));
    }
    // Half an hour after it is due again, its last copy is too old.
    let later = at("2026-09-20T04:30:00Z");
    let zone = zone.clone().archive("vault", exported(&zone, 5, in_time));
    let plan = plan_of(&[prune.clone(), weekly.clone()], &zone, later);
    assert_eq!(deleted(&plan), [5, 6]);
    let texts: Vec<String> = decision(&plan, 2).reasons().map(|reason| reason.to_string()).collect();
    let expected = "no verified copy of it or a newer one in archive `vault`, nor of its instance's newest one since a policy \
                    was last to export it, at 2026-09-20T04:00:00Z";
    assert!(texts.iter().any(|text| text == expected), "{texts:?}");
    // Also for an instance that was never exported, and not for one that the policy does not select.
    let mut other = zone.clone();
    other.snapshots.iter_mut().take(4).for_each(|snap| snap.instance_id = Some(instance_id("web-2")));
    assert_eq!(deleted(&plan_of(&[prune.clone(), weekly.clone()], &other, now())), [6]);
    assert_eq!(deleted(&plan_of(&[prune, weekly.only("web-1")], &other, now())), [2, 3, 4, 6]);
}

#[test]
fn gates_of_policies_that_prune_are_paused_or_have_no_schedule_or_want_all_stay_as_they_are() {
    let (zone, weekly) = a_week();
    let zone = zone.clone().archive("vault", exported(&zone, 5, Some("2026-09-13T04:10:00Z")));
    let prune = policy("prune").with(keep_last(1));
    for (other, expected) in [
        (Policy { enabled: false, ..weekly.clone() }, &[5, 6][..]),
        (Policy { schedule: None, ..weekly.clone() }, &[5, 6]),
        (weekly.clone().with(keep_last(1)), &[5, 6]),
        (weekly.clone().requiring(&["vault"], Which::All), &[5]),
    ] {
        assert_eq!(deleted(&plan_of(&[prune.clone(), other], &zone, now())), expected);
    }
    // Two that require a copy in the same archive: the stricter one counts.
    let daily = prune.clone().requiring(&["vault"], Which::Newest);
    assert_eq!(deleted(&plan_of(&[daily, weekly.clone()], &zone, now())), [5, 6]);
    // The newest of all does not go without a copy, whatever the rules say.
    let none = Retention { max_age: Some(span("1h")), min_keep: 0, ..no_rules() };
    let plan =
        plan_of(&[policy("prune").with(none), weekly.clone()], &zone, now() + SignedDuration::from_hours(2));
    assert_eq!((deleted(&plan), decision(&plan, 1).rule), (vec![2, 3, 4, 5, 6], Rule::Policy));
    // When it is due decides, so an edit of that has to settle.
    let key = |policy: &Policy| deciding_keys(policy).get("schedule").cloned();
    assert_eq!(key(&weekly), Some("0 4 * * 0".into()));
    assert_eq!(key(&weekly.with(keep_last(1))), None);
}

#[test]
fn what_a_weekly_export_lets_pass_expires_before_it_is_due_again_or_not_at_all() {
    let (zone, weekly) = a_week();
    let zone = zone.clone().archive("vault", exported(&zone, 5, Some("2026-09-13T04:10:00Z")));
    let rules = Retention { keep_within: Some(span("6d")), min_keep: 1, ..no_rules() };
    let prune = policy("prune").with(rules);
    let policies = [prune, weekly];
    let plan = plan_of(&policies, &zone, now());
    let expiry: Vec<_> = (1..=6).map(|number| decision(&plan, number).expires_at).collect();
    let noon_of = |day: i8| Some(at(&format!("2026-09-{day}T12:00:01Z")));
    assert_eq!(expiry, [None, None, None, noon_of(19), noon_of(18), noon_of(17)]);
    for (number, expires_at) in (1..).zip(expiry) {
        let Some(expires_at) = expires_at else { continue };
        assert!(deleted(&plan_of(&policies, &zone, expires_at)).contains(&number));
        let before = expires_at - SignedDuration::from_secs(1);
        assert!(!deleted(&plan_of(&policies, &zone, before)).contains(&number));
    }
}

#[test]
fn a_failed_snapshot_that_was_good_counts_for_guard_and_gate_and_for_no_keep_rule() {
    let table = Retention { failed_after: Some(span("2d")), ..keep_last(2) };
    let policies = [nightly().with(table).requiring(&["vault"], Which::All)];
    let mut zone = inventory([
        snap("web-1", days_ago(1)),
        in_state("error", snap("web-1", days_ago(5))),
        in_state("error", snap("web-1", days_ago(6))),
        snap("web-1", days_ago(7)),
    ])
    .archive("vault", Copies::Known(Vec::new()));
    let shown_with = |zone: &Inventory| shown(&plan_of(&policies, zone, now()), zone);
    // Nothing is remembered: their age is that of the snapshots, and there was nothing to copy.
    assert_eq!(
        shown_with(&zone),
        ["keep keep_last", "delete failed_after", "delete failed_after", "keep keep_last"]
    );
    let failed = |days, was_good| Failed { since: days_ago(days), was_good };
    zone.failed = [(snapshot_id(2), failed(1, true)), (snapshot_id(3), failed(3, true))].into();
    assert_eq!(shown_with(&zone), ["keep keep_last", "ignore state", "keep export", "keep keep_last"]);
    let zone = zone.archive("vault", Copies::Assumed);
    let plan = plan_of(&policies, &zone, now());
    assert_eq!(
        shown(&plan, &zone),
        ["keep keep_last", "ignore state", "delete failed_after", "keep keep_last"]
    );
    assert_eq!((plan.good, plan.good_deletes), (4, 1));
}

#[test]
fn point_01_an_empty_listing_plans_nothing() {
    let plan = plan_of(&[nightly().with(keep_last(1))], &inventory([]), now());
    assert!(plan.decisions.is_empty());
    assert_eq!((plan.good, plan.deletes), (0, 0));
}

#[test]
fn point_02_without_a_retention_table_nothing_is_pruned() {
    let zone = aged(&[1, 5000]);
    let plan = plan_of(&[nightly()], &zone, now());
    assert_eq!(shown(&plan, &zone), ["keep none", "keep none"]);
    assert_eq!(words(&plan, 2), ["the policy has no retention table: it prunes nothing"]);
    assert_eq!(decision(&plan, 2).expires_at, None);
    // Nor has it a say about what others prune.
    assert_decided(
        &[policy("weekly").with(keep_last(1)), nightly()],
        &zone,
        now(),
        &["keep keep_last", "delete keep"],
    );
}

#[test]
fn point_03_only_min_keep_0_may_empty_an_instance() {
    let zone = aged(&[8, 9]);
    let delete = "delete max_age";
    assert_decided(&[nightly().with(max_age("1d"))], &zone, now(), &[delete, delete]);
    let min_keep = Retention { min_keep: 1, ..max_age("1d") };
    assert_decided(&[nightly().with(min_keep)], &zone, now(), &["keep min_keep", delete]);
}

#[test]
fn point_05_fewer_than_min_keep_stay_however_old() {
    let zone = aged(&[800, 900]);
    let rules = Retention { min_keep: 3, max_count: count(1), ..max_age("1d") };
    let plan = plan_of(&[nightly().with(rules)], &zone, now());
    assert_eq!(shown(&plan, &zone), ["keep min_keep", "keep min_keep"]);
    assert_eq!(decision(&plan, 2).expires_at, None);
    assert_eq!(
        words(&plan, 2),
        [
            "newest 2 of 3 that are always kept (min_keep)",
            "otherwise it would be deleted",
            "older than 1d since 2024-03-31T12:00:00Z (max_age)",
        ]
    );
}

#[test]
fn point_06_only_good_ones_count() {
    let zone = inventory([
        in_state("error", snap("web-1", days_ago(1))),
        in_state("error", snap("web-1", days_ago(2))),
        in_state("snapshotting", snap("web-1", hours_ago(1))),
        snap("web-1", days_ago(90)),
        in_state("ready", snap("web-1", days_ago(91))),
    ]);
    let rules = Retention { min_keep: 1, max_age: Some(span("30d")), ..keep_last(1) };
    let ignored = "ignore state";
    assert_decided(
        &[nightly().with(rules)],
        &zone,
        now(),
        &[ignored, ignored, ignored, "keep min_keep", "delete keep"],
    );
}

#[test]
fn point_07_and_08_other_states_are_ignored_and_say_so() {
    let states = ["error", "snapshotting", "exporting", "deleting", "deleted", "hiber\u{1b}[2Jnating", ""];
    let zone = inventory(states.map(|state| in_state(state, snap("web-1", days_ago(9)))));
    let plan = plan_of(&[nightly().with(max_age("1d"))], &zone, now());
    assert_eq!(shown(&plan, &zone), vec!["ignore state"; states.len()]);
    let words: Vec<String> = (1..=7).flat_map(|number| words(&plan, number)).collect();
    assert_eq!(
        words,
        [
            "failed: its state is `error`, and no rule prunes those",
            "not finished yet: its state is `snapshotting`",
            "not finished yet: its state is `exporting`",
            "being deleted: its state is `deleting`",
            "being deleted: its state is `deleted`",
            "its state is unknown: `hiber\\u{1b}[2Jnating`; left alone",
            "it has no state; left alone",
        ]
    );
    assert_eq!((plan.good, plan.deletes), (0, 0));
}

#[test]
fn point_09_dated_in_the_future_is_not_judged_and_moves_nothing() {
    let zone = inventory([
        snap("web-1", minutes_ahead(5) + nanosecond()),
        snap("web-1", days_ago(-365)),
        snap("web-1", days_ago(2)),
        snap("web-1", days_ago(3)),
    ]);
    let rules = Retention { min_keep: 1, ..keep_last(1) };
    let plan = plan_of(&[nightly().with(rules)], &zone, now());
    assert_eq!(shown(&plan, &zone), ["ignore future", "ignore future", "keep keep_last", "delete keep"]);
    assert_eq!(
        words(&plan, 2),
        ["dated more than 5 minutes in the future: 2027-09-16T12:00:00Z; not judged before"]
    );
}

#[test]
fn point_09_and_11_up_to_five_minutes_in_the_future_is_age_zero() {
    let zone = inventory([snap("web-1", minutes_ahead(5)), snap("web-1", now())]);
    let plan = plan_of(&[nightly().with(keep_within("100ms"))], &zone, now());
    assert_eq!(shown(&plan, &zone), ["keep keep_within", "keep keep_within"]);
    assert_decided(&[nightly().with(keep_last(1))], &zone, now(), &["keep keep_last", "delete keep"]);
}

#[test]
fn point_09_a_copy_dated_in_the_future_opens_no_gate() {
    let zone =
        inventory([snap("web-1", days_ago(1)), snap("web-1", days_ago(2)), snap("web-1", days_ago(-9))]);
    let copies = zone.copies(&[3]);
    let zone = zone.archive("vault", copies);
    let policies = [nightly().with(keep_last(1)).requiring(&["vault"], Which::Newest)];
    assert_decided(&policies, &zone, now(), &["keep keep_last", "keep export", "ignore future"]);
}

#[test]
fn point_12_days_are_the_calendars_and_hours_are_absolute_when_summer_ends() {
    // 2026-10-25 has 25 hours in Zurich.
    let zone = inventory([snap("web-1", at("2026-10-24T12:00:00+02:00"))]);
    let after = |rules: &str, at: Timestamp| {
        shown(&plan_of(&[nightly().in_zone("Europe/Zurich").with(max_age(rules))], &zone, at), &zone)
    };
    assert_eq!(after("1d", at("2026-10-25T12:00:00+01:00")), ["keep none"]);
    assert_eq!(after("24h", at("2026-10-25T12:00:00+01:00")), ["delete max_age"]);
    assert_eq!(after("25h", at("2026-10-25T12:00:00+01:00")), ["keep none"]);
}

#[test]
fn point_13_days_are_the_calendars_and_hours_are_absolute_when_summer_begins() {
    // 2026-03-29 has 23 hours in Zurich.
    let zone = inventory([snap("web-1", at("2026-03-28T12:00:00+01:00"))]);
    let after = |rules: &str, at: Timestamp| {
        shown(&plan_of(&[nightly().in_zone("Europe/Zurich").with(max_age(rules))], &zone, at), &zone)
    };
    let noon = at("2026-03-29T12:00:00+02:00");
    assert_eq!(after("1d", noon), ["keep none"]);
    assert_eq!(after("1d", noon + nanosecond()), ["delete max_age"]);
    assert_eq!(after("24h", noon + nanosecond()), ["keep none"]);
}

/// The verdicts of one snapshot by `max_age` at several moments.
fn at_moments(created_at: &str, age: &str, zone: &str, moments: &[(&str, &str)]) {
    let one = inventory([snap("web-1", at(created_at))]);
    let policies = [nightly().in_zone(zone).with(max_age(age))];
    for (moment, expected) in moments {
        assert_eq!(shown(&plan_of(&policies, &one, at(moment)), &one), [*expected], "{created_at}: {moment}");
    }
}

#[test]
fn point_16_a_month_is_counted_forward_and_ends_once() {
    let (keep, delete) = ("keep none", "delete max_age");
    at_moments(
        "2026-02-28T12:00:00Z",
        "1mo",
        "UTC",
        &[
            ("2026-03-28T12:00:00Z", keep),
            ("2026-03-28T12:00:00.000000001Z", delete),
            ("2026-03-29T06:00:00Z", delete),
            ("2026-03-30T06:00:00Z", delete),
            ("2026-03-31T12:00:00Z", delete),
        ],
    );
}

#[test]
fn point_16_a_day_that_the_month_lacks_is_the_end_of_that_month_in_the_policys_zone() {
    let (keep, delete) = ("keep none", "delete max_age");
    for (created_at, age, zone, end) in [
        ("2026-01-31T12:00:00Z", "1mo", "UTC", "2026-03-01T00:00:00Z"),
        ("2026-01-29T12:00:00Z", "1mo", "UTC", "2026-03-01T00:00:00Z"),
        ("2026-01-28T12:00:00Z", "1mo", "UTC", "2026-02-28T12:00:00Z"),
        ("2028-01-31T12:00:00Z", "1mo", "UTC", "2028-03-01T00:00:00Z"),
        ("2028-01-29T12:00:00Z", "1mo", "UTC", "2028-02-29T12:00:00Z"),
        ("2024-02-29T12:00:00Z", "1y", "UTC", "2025-03-01T00:00:00Z"),
        ("2024-02-29T12:00:00Z", "4y", "UTC", "2028-02-29T12:00:00Z"),
        // In February 2028 there is a 29th, but no 31st.
        ("2026-08-31T12:00:00Z", "1y6mo", "UTC", "2028-03-01T00:00:00Z"),
        ("2026-01-31T12:00:00+01:00", "1mo", "Europe/Zurich", "2026-03-01T00:00:00+01:00"),
        ("2026-01-31T12:00:00+01:00", "1mo2d3h", "Europe/Zurich", "2026-03-03T03:00:00+01:00"),
    ] {
        let end = at(end);
        let later = (end + nanosecond()).to_string();
        at_moments(created_at, age, zone, &[(&end.to_string(), keep), (&later, delete)]);
        let one = inventory([snap("web-1", at(created_at))]);
        let plan = plan_of(&[nightly().in_zone(zone).with(max_age(age))], &one, at(created_at));
        assert_eq!(decision(&plan, 1).expires_at, Some(end + SignedDuration::from_secs(1)), "{created_at}");
    }
}

#[test]
fn point_16_it_holds_for_every_key_that_is_an_age() {
    let zone = inventory([
        snap("web-1", at("2026-01-31T12:00:00Z")),
        in_state("error", snap("web-1", at("2026-01-31T11:00:00Z"))),
    ]);
    let end = at("2026-03-01T00:00:00Z");
    for (rules, kept, deleted) in [
        (keep_within("1mo"), "keep keep_within", "delete keep"),
        (max_age("1mo"), "keep none", "delete max_age"),
        (
            {
                let mut daily = no_rules();
                *daily.keep_within_each.get_mut(crate::policy::Period::Day) = Some(span("1mo"));
                daily
            },
            "keep keep_within_daily",
            "delete keep",
        ),
    ] {
        let policies = [nightly().with(Retention { failed_after: Some(span("1mo")), ..rules })];
        assert_eq!(shown(&plan_of(&policies, &zone, end), &zone), [kept, "ignore state"]);
        let later = shown(&plan_of(&policies, &zone, end + nanosecond()), &zone);
        assert_eq!(later, [deleted, "delete failed_after"]);
    }
}

#[test]
fn point_16_an_age_beyond_the_calendar_never_ends() {
    let zone = inventory([snap("web-1", at("9500-06-01T00:00:00Z"))]);
    let plan = plan_of(&[nightly().with(max_age("1000y"))], &zone, at("9999-12-30T00:00:00Z"));
    assert_eq!((shown(&plan, &zone), decision(&plan, 1).expires_at), (vec!["keep none".to_owned()], None));
}

#[test]
fn point_17_exactly_on_the_cut_off_is_kept() {
    let zone = inventory([snap("web-1", days_ago(7)), snap("web-1", days_ago(7) - nanosecond())]);
    assert_decided(&[nightly().with(max_age("7d"))], &zone, now(), &["keep none", "delete max_age"]);
    assert_decided(&[nightly().with(keep_within("7d"))], &zone, now(), &["keep keep_within", "delete keep"]);
    let zone = inventory([snap("web-1", hours_ago(7)), snap("web-1", hours_ago(7) - nanosecond())]);
    assert_decided(&[nightly().with(max_age("7h"))], &zone, now(), &["keep none", "delete max_age"]);
}

#[test]
fn point_18_with_one_timestamp_the_greater_id_is_newer() {
    let zone =
        inventory([snap("web-1", days_ago(1)), snap("web-1", days_ago(1)), snap("web-1", days_ago(1))]);
    let expected = ["delete keep", "delete keep", "keep keep_last"];
    assert_decided(&[nightly().with(keep_last(1))], &zone, now(), &expected);
}

#[test]
fn point_21_a_long_gap_does_not_empty_a_count() {
    let zone = aged(&[400, 401, 402]);
    let expected = ["keep keep_last", "keep keep_last", "delete keep"];
    assert_decided(&[nightly().with(keep_last(2))], &zone, now(), &expected);
}

#[test]
fn point_23_a_flood_of_newer_ones_is_met_by_keep_within_and_the_guard() {
    let flood = (0..40).map(|_| snap("web-1", hours_ago(1)));
    let zone = inventory((1..=20).map(|day| snap("web-1", days_ago(day))).chain(flood));
    let policy = Policy {
        guard: Guard { max_deletes: Some(5), ..nightly().guard },
        ..nightly().with(Retention { keep_within: Some(span("14d")), ..keep_last(7) })
    };
    let plan = plan_of(std::slice::from_ref(&policy), &zone, now());
    assert_eq!(deleted(&plan), [15, 16, 17, 18, 19, 20]);
    let case = ZoneCase {
        zone: zone.zone,
        accepted: 0,
        deletes: plan.deletes,
        good_deletes: plan.good_deletes,
        good: plan.good,
        drop: crate::retention::guard::ListingDrop::default(),
        clock: crate::retention::inventory::ClockSkew::OnPaper,
        allowed: None,
    };
    let run = WholeRun::new(std::iter::once(&case), None);
    assert!(hold(&policy.name, &policy.guard, &case, run).is_some());
}

#[test]
fn point_27_orphans_are_kept_unless_they_are_to_be_judged() {
    let zone = inventory([
        snap("gone", days_ago(1)),
        snap("gone", days_ago(2)),
        Snapshot { instance_id: None, ..snap("", days_ago(90)) },
    ]);
    let mut policy = nightly().with(keep_last(1));
    let plan = plan_of(std::slice::from_ref(&policy), &zone, now());
    assert_eq!(shown(&plan, &zone), vec!["ignore orphan"; 3]);
    assert_eq!(words(&plan, 1), ["its instance is not listed any more, and orphans are kept"]);
    assert_eq!(words(&plan, 3), ["the API does not say which instance it is of"]);
    assert_eq!(plan.good, 0);

    policy.select.judge_orphans = true;
    let expected = ["keep keep_last", "delete keep", "ignore orphan"];
    assert_decided(std::slice::from_ref(&policy), &zone, now(), &expected);
    // A policy that keeps orphans keeps them from others, too.
    assert_decided(
        &[policy.clone(), policy2().with(keep_last(1))],
        &zone,
        now(),
        &["keep keep_last", "keep policy", "ignore orphan"],
    );

    policy.select.labels = [("backup".to_owned(), NameGlob::new("nightly").unwrap())].into();
    assert_decided(&[policy], &zone, now(), &["-", "-", "-"]);
}

fn policy2() -> Policy {
    policy("weekly")
}

#[test]
fn point_27_an_instance_that_lost_its_label_is_not_touched() {
    let mut zone = aged(&[1, 2, 3]);
    let mut policy = nightly().with(keep_last(1));
    policy.select.labels = [("backup".to_owned(), NameGlob::new("nightly").unwrap())].into();
    assert_decided(std::slice::from_ref(&policy), &zone, now(), &["-", "-", "-"]);
    zone.instances[0].labels = [("backup".to_owned(), "nightly".to_owned())].into();
    let expected = ["keep keep_last", "delete keep", "delete keep"];
    assert_decided(&[policy], &zone, now(), &expected);
}

#[test]
fn point_28_a_snapshot_goes_only_if_every_policy_lets_it_go() {
    let zone = aged(&[1, 2, 3]);
    let policies =
        [nightly().with(keep_last(1)), policy2().with(keep_within("2d")), policy("web-2").only("web-2")];
    let plan = plan_of(&policies, &zone, now());
    assert_eq!(shown(&plan, &zone), ["keep keep_last", "keep policy", "delete keep"]);
    assert_eq!(
        words(&plan, 2),
        [
            "policy `weekly` keeps it (keep_within)",
            "otherwise it would be deleted",
            "no keep rule wants it",
            "number 2 from the newest (keep_last = 1)",
        ]
    );
    assert_eq!(words(&plan, 1), ["newest 1 of 1 (keep_last)", "policy `weekly` keeps it (keep_within)"]);
    // It expires when the other one keeps it no longer.
    assert_eq!(decision(&plan, 2).expires_at, Some(now() + SignedDuration::from_secs(1)));
}

#[test]
fn point_28_each_policy_judges_in_its_own_time_zone() {
    // A day before noon of 25 October is 25 hours before in Zurich, and 24 in UTC.
    let noon = at("2026-10-25T12:00:00+01:00");
    let zone = inventory([snap("web-1", noon - SignedDuration::from_hours(25))]);
    let zurich = nightly().in_zone("Europe/Zurich").with(max_age("1d"));
    let utc = policy2().with(max_age("1d"));
    assert_decided(&[zurich.clone(), utc.clone()], &zone, noon, &["keep none"]);
    assert_decided(&[utc, zurich], &zone, noon, &["keep policy"]);
}

#[test]
fn point_28_another_policys_gate_holds_too() {
    let zone = aged(&[1, 2]).archive("vault", Copies::Known(Vec::new()));
    let policies =
        [nightly().with(keep_last(1)), policy2().with(keep_last(1)).requiring(&["vault"], Which::All)];
    let plan = plan_of(&policies, &zone, now());
    assert_eq!(shown(&plan, &zone), ["keep keep_last", "keep policy"]);
    assert_eq!(
        words(&plan, 2)[..2],
        ["policy `weekly` keeps it (export)", "no verified copy of it in archive `vault`",]
    );
}

#[test]
fn point_29_a_pin_holds_until_it_ends() {
    let zone =
        aged(&[1, 2, 3, 4]).on_hold(2, None).on_hold(3, Some(now() + nanosecond())).on_hold(4, Some(now()));
    let plan = plan_of(&[nightly().with(keep_last(1))], &zone, now());
    assert_eq!(shown(&plan, &zone), ["keep keep_last", "keep hold", "keep hold", "delete keep"]);
    assert_eq!(words(&plan, 2)[..2], ["on hold", "otherwise it would be deleted"]);
    assert_eq!(decision(&plan, 2).expires_at, None);
    assert_eq!(decision(&plan, 3).expires_at, Some(now() + SignedDuration::from_secs(1)));
}

#[test]
fn point_35_a_required_copy_that_is_missing_keeps() {
    let zone = aged(&[1, 2, 3, 4]);
    let copies = zone.copies(&[3]);
    let zone = zone.archive("vault", copies);
    let newest = nightly().with(keep_last(1)).requiring(&["vault"], Which::Newest);
    let plan = plan_of(&[newest], &zone, now());
    assert_eq!(shown(&plan, &zone), ["keep keep_last", "keep export", "delete keep", "delete keep"]);
    assert_eq!(words(&plan, 2)[0], "no verified copy of it or a newer one in archive `vault`");
    assert_eq!(decision(&plan, 2).expires_at, None);
    let needed = CopyNeeded { archive: "vault".parse().unwrap(), of: Which::Newest, or_since: None };
    assert_eq!(*decision(&plan, 4).copies(), [needed]);

    let all = nightly().with(keep_last(1)).requiring(&["vault"], Which::All);
    assert_decided(&[all], &zone, now(), &["keep keep_last", "keep export", "delete keep", "keep export"]);
}

#[test]
fn point_35_a_copy_of_another_instance_counts_for_nothing() {
    let zone =
        inventory([snap("web-2", days_ago(0)), snap("web-1", days_ago(1)), snap("web-1", days_ago(2))]);
    let copies = zone.copies(&[1]);
    let zone = zone.archive("vault", copies);
    let policy = nightly().with(keep_last(1)).requiring(&["vault"], Which::Newest);
    assert_decided(&[policy], &zone, now(), &["keep keep_last", "keep keep_last", "keep export"]);
}

#[test]
fn point_35_every_archive_must_have_it_and_one_that_cannot_be_asked_keeps_everything() {
    let zone = aged(&[1, 2]);
    let copies = zone.copies(&[1]);
    let zone = zone.archive("vault", copies);
    let policy = nightly().with(keep_last(1)).requiring(&["vault", "offsite"], Which::Newest);
    let policies = std::slice::from_ref(&policy);
    let why = |zone: &Inventory| {
        let plan = plan_of(policies, zone, now());
        assert_eq!(shown(&plan, zone), ["keep keep_last", "keep export"]);
        words(&plan, 2).swap_remove(0)
    };
    assert_eq!(why(&zone), "archive `offsite` can't be reached: it was not asked");
    let unreachable = Copies::Unreachable("permission \u{1b}denied".to_owned());
    assert_eq!(
        why(&zone.clone().archive("offsite", unreachable)),
        "archive `offsite` can't be reached: permission \\u{1b}denied"
    );
    let empty = Copies::Known(Vec::new());
    assert_eq!(
        why(&zone.clone().archive("offsite", empty)),
        "no verified copy of it or a newer one in archive `offsite`"
    );

    let zone = zone.archive("offsite", Copies::Assumed);
    let plan = plan_of(policies, &zone, now());
    assert_eq!(shown(&plan, &zone), ["keep keep_last", "delete keep"]);
    // Also where it was only assumed, the proof is still asked for.
    let archives: Vec<&str> = decision(&plan, 2).copies().iter().map(|copy| copy.archive.as_str()).collect();
    assert_eq!(archives, ["vault", "offsite"]);
}

#[test]
fn point_35_what_all_policies_require_must_be_proved() {
    let zone = aged(&[1, 2]).archive("vault", Copies::Assumed).archive("offsite", Copies::Assumed);
    let policies = [
        nightly().with(keep_last(1)).requiring(&["vault"], Which::Newest),
        policy2().with(keep_last(1)).requiring(&["offsite", "vault"], Which::All),
        policy("optional").requiring(&["never-asked"], Which::All),
    ];
    let mut policies = policies;
    policies[2].export.as_mut().unwrap().required = false;
    let plan = plan(&policies, &zone, now());
    for plan in &plan.policies[..2] {
        let mut copies = decision(plan, 2).copies().to_vec();
        copies.sort_by(|a, b| a.archive.cmp(&b.archive));
        assert_eq!(
            copies,
            [
                CopyNeeded { archive: "offsite".parse().unwrap(), of: Which::All, or_since: None },
                CopyNeeded { archive: "vault".parse().unwrap(), of: Which::All, or_since: None },
            ]
        );
        assert!(decision(plan, 1).copies().is_empty());
    }
}

#[test]
fn point_35_a_gate_without_required_keeps_nothing() {
    let mut policy = nightly().with(keep_last(1)).requiring(&["vault"], Which::All);
    policy.export.as_mut().unwrap().required = false;
    let zone = aged(&[1, 2]);
    let plan = plan_of(&[policy], &zone, now());
    assert_eq!(shown(&plan, &zone), ["keep keep_last", "delete keep"]);
    assert!(decision(&plan, 2).copies().is_empty());
}

#[test]
fn point_39_a_failed_create_leaves_min_keep_and_the_guards_share_to_good_ones() {
    let zone = inventory([in_state("error", snap("web-1", hours_ago(1))), snap("web-1", days_ago(40))]);
    let plan = plan_of(&[nightly().with(Retention { min_keep: 1, ..max_age("30d") })], &zone, now());
    assert_eq!(shown(&plan, &zone), ["ignore state", "keep min_keep"]);
    assert_eq!(plan.good, 1);
}

#[test]
fn the_first_that_holds_gives_the_rule_and_all_of_them_are_told() {
    let zone = aged(&[9]).on_hold(1, None).archive("vault", Copies::Known(Vec::new()));
    let nightly = nightly().with(max_age("1d")).requiring(&["vault"], Which::Newest);
    let weekly = policy2().with(keep_last(1));
    let policies = [nightly, weekly];
    let plan = plan_of(&policies, &zone, now());
    assert_eq!(shown(&plan, &zone), ["keep hold"]);
    assert_eq!(
        words(&plan, 1),
        [
            "on hold",
            "no verified copy of it or a newer one in archive `vault`",
            "policy `weekly` keeps it (keep_last)",
            "otherwise it would be deleted",
            "older than 1d since 2026-09-08T12:00:00Z (max_age)",
        ]
    );
    let zone = Inventory { holds: BTreeMap::new(), ..zone };
    assert_decided(&policies, &zone, now(), &["keep export"]);
    let zone = zone.archive("vault", Copies::Assumed);
    assert_decided(&policies, &zone, now(), &["keep policy"]);
}

#[test]
fn reasons_tell_each_rule_with_its_place_and_limit() {
    let zone = aged(&[1, 2, 40]);
    let rules =
        Retention { keep_within: Some(span("14d")), max_age: Some(span("30d")), min_keep: 1, ..keep_last(1) };
    let plan = plan_of(&[nightly().with(rules)], &zone, now());
    assert_eq!(
        words(&plan, 1),
        [
            "newest 1 of 1 (keep_last)".to_owned(),
            "not older than 14d (keep_within)".to_owned(),
            "newest 1 of 1 that are always kept (min_keep)".to_owned(),
        ]
    );
    assert_eq!(words(&plan, 2), ["not older than 14d (keep_within)".to_owned()]);
    assert_eq!(
        words(&plan, 3),
        [
            "no keep rule wants it",
            "number 3 from the newest (keep_last = 1)",
            "older than 14d since 2026-08-21T12:00:00Z (keep_within)",
            "older than 30d since 2026-09-06T12:00:00Z (max_age)",
        ]
    );
}

#[test]
fn a_name_in_a_reason_can_not_move_the_cursor() {
    let mut zone = aged(&[1, 2]).archive("vault", Copies::Known(Vec::new()));
    zone.instances[0].name = "we\u{1b}[2Jb\n".into();
    zone.holds.insert(snapshot_id(2), Hold { until: None, reason: Some("\r\u{202e}audit".to_owned()) });
    let policy = nightly().with(keep_last(1)).requiring(&["vault"], Which::Newest);
    let words = words(&plan_of(&[policy], &zone, now()), 2).join("\n");
    assert!(words.contains("on hold: \\u{d}\\u{202e}audit"), "{words}");
}

#[test]
fn expiry_is_the_first_second_past_the_limit() {
    let expiry = |rules: Retention, ages: &[i64]| {
        decision(&plan_of(&[nightly().with(rules)], &aged(ages), now()), 1).expires_at
    };
    let in_days = |days: i64| Some(days_ago(-days) + SignedDuration::from_secs(1));
    assert_eq!(expiry(max_age("30d"), &[10]), in_days(20));
    assert_eq!(expiry(keep_within("30d"), &[10]), in_days(20));
    assert_eq!(expiry(keep_last(1), &[10]), None);
    assert_eq!(expiry(Retention { max_age: Some(span("30d")), ..keep_last(1) }, &[10]), in_days(20));
    assert_eq!(expiry(Retention { keep_within: Some(span("30d")), ..keep_last(1) }, &[10]), None);
    assert_eq!(expiry(Retention { keep_within: Some(span("30d")), ..keep_last(1) }, &[10, 9]), in_days(20));
    assert_eq!(expiry(Retention { max_count: count(1), ..no_rules() }, &[10]), None);
    assert_eq!(expiry(Retention { min_keep: 1, ..max_age("30d") }, &[10]), None);
}

#[test]
fn expiry_waits_for_the_last_of_pin_and_policies() {
    let in_days = |days: i64| days_ago(-days);
    let zone = aged(&[10]).on_hold(1, Some(in_days(25)));
    let nightly = nightly().with(max_age("30d"));
    let expiry = |policies: &[Policy]| decision(&plan_of(policies, &zone, now()), 1).expires_at;
    assert_eq!(expiry(std::slice::from_ref(&nightly)), Some(in_days(25)));
    assert_eq!(
        expiry(&[nightly.clone(), policy2().with(max_age("40d"))]),
        Some(in_days(30) + SignedDuration::from_secs(1))
    );
    assert_eq!(expiry(&[nightly, policy2().with(keep_last(1))]), None);
}

#[test]
fn point_12_an_age_that_ends_at_a_time_that_comes_twice_ends_at_the_first() {
    // The second 02:30 of that day, whose hour comes twice again 52 weeks on.
    let zone = inventory([snap("web-1", at("2025-10-26T02:30:00+01:00"))]);
    let policies = [nightly().in_zone("Europe/Zurich").with(max_age("52w"))];
    let plan = plan_of(&policies, &zone, at("2026-09-01T00:00:00Z"));
    assert_eq!(decision(&plan, 1).expires_at, Some(at("2026-10-25T02:30:01+02:00")));
    assert_decided(&policies, &zone, at("2026-10-25T02:30:00+02:00"), &["keep none"]);
    assert_decided(&policies, &zone, at("2026-10-25T02:00:00+01:00"), &["delete max_age"]);
}

#[test]
fn point_13_an_age_that_ends_at_a_time_that_the_clock_skips_ends_after_the_gap() {
    // On 29 March 2026 the clock jumps from 02:00 to 03:00 in Zurich. An older one does not outlive a newer one.
    let zone = inventory([
        snap("web-1", at("2026-03-28T02:30:00+01:00")),
        snap("web-1", at("2026-03-28T03:00:00+01:00")),
    ]);
    let policies = [nightly().in_zone("Europe/Zurich").with(max_age("1d"))];
    let plan = plan_of(&policies, &zone, at("2026-03-28T12:00:00Z"));
    for number in [1, 2] {
        assert_eq!(decision(&plan, number).expires_at, Some(at("2026-03-29T03:00:01+02:00")), "{number}");
    }
}

#[test]
fn point_16_expiry_is_the_date_of_a_months_end_and_a_hold_beyond_it_is_the_last() {
    let zone = inventory([snap("web-1", at("2026-02-28T12:00:00Z"))]);
    let expiry = |held_until: &str| {
        let zone = zone.clone().on_hold(1, Some(at(held_until)));
        let plan = plan_of(&[nightly().with(max_age("1mo"))], &zone, at("2026-03-01T00:00:00Z"));
        decision(&plan, 1).expires_at
    };
    assert_eq!(expiry("2026-03-02T00:00:00Z"), Some(at("2026-03-28T12:00:01Z")));
    assert_eq!(expiry("2026-03-28T18:00:00Z"), Some(at("2026-03-28T18:00:00Z")));
    assert_eq!(expiry("2026-03-29T06:00:00.5Z"), Some(at("2026-03-29T06:00:01Z")));
}

#[test]
fn expiry_waits_where_max_count_lets_another_policys_one_back_in() {
    // `strict` would delete the oldest one now, for two newer ones; those are too old in an hour, so that it is kept
    // again until its own age ends.
    let zone =
        inventory([snap("web-1", hours_ago(4)), snap("web-1", hours_ago(23)), snap("web-1", hours_ago(24))]);
    let mut strict = Retention { max_count: count(2), keep_oldest: true, ..keep_within("24h") };
    *strict.keep_within_each.get_mut(crate::policy::Period::Year) = Some(span("72h"));
    let policies = [nightly().with(strict), policy2().with(keep_within("30h"))];
    let plan = plan_of(&policies, &zone, now());
    assert_eq!(shown(&plan, &zone), ["keep keep_within", "keep keep_within", "keep policy"]);
    assert_eq!(decision(&plan, 3).expires_at, Some(hours_ago(-48) + SignedDuration::from_secs(1)));
    assert_decided(
        &policies,
        &zone,
        hours_ago(-8),
        &["keep keep_within", "delete keep", "keep keep_within_yearly"],
    );
}

#[test]
fn what_is_dated_in_the_future_takes_its_place_when_its_time_comes() {
    let zone = inventory([snap("web-1", days_ago(1)), snap("web-1", days_ago(-9))]);
    let plan = plan_of(&[nightly().with(Retention { min_keep: 1, ..keep_last(1) })], &zone, now());
    assert_eq!(decision(&plan, 1).expires_at, Some(days_ago(-9) - SignedDuration::from_mins(5)));
}

#[test]
fn the_ends_of_time_are_no_trouble() {
    let zone = inventory([Timestamp::MIN, now(), Timestamp::MAX].map(|taken| snap("web-1", taken)));
    for span in ["1ms", "1y1mo1d12h", "30y"] {
        let policies = [nightly().in_zone("Europe/Zurich").with(max_age(span))];
        for at in [Timestamp::MIN, at("1970-01-01T00:00:00Z"), now(), Timestamp::MAX] {
            assert_eq!(plan_of(&policies, &zone, at).decisions.len(), 3);
        }
    }
}

#[test]
fn decisions_and_reasons_are_small() {
    assert!(size_of::<Decision>() <= 72, "{}", size_of::<Decision>());
    let reason = size_of::<crate::retention::reason::Reason>();
    assert!(reason <= 16, "{reason}");
}

/// A policy that asks for what this program made alone.
fn own(policy: Policy) -> Policy {
    let select = crate::policy::select::Select { only_created: true, ..policy.select.clone() };
    Policy { select, ..policy }
}

impl Inventory {
    fn made_by_us(mut self, numbers: &[u128]) -> Self {
        let everyones = |number: &u128| (snapshot_id(*number), Ownership::default());
        self.created = numbers.iter().map(everyones).collect();
        self
    }

    fn coming(mut self, number: u128) -> Self {
        self.coming.insert(snapshot_id(number));
        self
    }
}

#[test]
fn what_somebody_else_made_counts_for_nothing_where_only_ours_are_meant() {
    let foreign = "ignore foreign";
    for (name, ages, ours, rules, expected) in [
        ("nothing is ours", &[1, 2][..], &[][..], keep_last(1), &[foreign, foreign][..]),
        (
            "it takes no place",
            &[1, 2, 3, 4],
            &[2, 4],
            keep_last(1),
            &[foreign, "keep keep_last", foreign, "delete keep"],
        ),
        (
            "nor of max_count",
            &[1, 2, 3],
            &[2, 3],
            Retention { max_count: count(1), ..no_rules() },
            &[foreign, "keep none", "delete max_count"],
        ),
        (
            "nor of min_keep",
            &[1, 2, 3],
            &[2, 3],
            Retention { min_keep: 1, ..max_age("1h") },
            &[foreign, "keep min_keep", "delete max_age"],
        ),
        ("however old it is", &[500], &[], max_age("1d"), &[foreign]),
    ] {
        let zone = aged(ages).made_by_us(ours);
        let plan = plan_of(&[own(nightly().with(rules))], &zone, now());
        assert_eq!(shown(&plan, &zone), expected, "{name}");
        assert_eq!(plan.good, ours.len() as u64, "{name}");
    }
    let zone = aged(&[1]);
    assert_decided(&[nightly().with(keep_last(1))], &zone, now(), &["keep keep_last"]);
    let words = words(&plan_of(&[own(nightly())], &zone, now()), 1);
    assert_eq!(words, ["this policy did not take it (ownership = \"created\")"]);
}

#[test]
fn a_policy_has_no_say_about_what_is_foreign_to_it() {
    let holder = || policy("weekly").with(keep_within("9d")).requiring(&["vault"], Which::All);
    let zone = aged(&[1, 2]).archive("vault", Copies::Known(Vec::new())).made_by_us(&[1]);
    let pair = |weekly| [nightly().with(Retention { max_age: Some(span("1h")), ..keep_last(2) }), weekly];
    assert_decided(&pair(holder()), &zone, now(), &["keep policy", "keep policy"]);
    let plan = plan_of(&pair(own(holder())), &zone, now());
    assert_eq!(shown(&plan, &zone), ["keep policy", "delete max_age"]);
    assert!(decision(&plan, 2).copies().is_empty(), "nor does it ask for a copy");
    // Nor for how long it stays: only nightly's rule counts.
    let kept = plan_of(&[nightly().with(max_age("3d")), own(holder())], &zone, now());
    assert_eq!(decision(&kept, 2).expires_at, Some(now() + SignedDuration::from_secs(24 * 3600 + 1)));
}

#[test]
fn one_that_comes_takes_the_first_place_is_counted_and_is_kept() {
    let create = "keep create";
    for (name, rules, expected) in [
        ("keep_last", keep_last(1), [create, "delete keep"]),
        ("max_count", Retention { max_count: count(1), ..no_rules() }, [create, "delete max_count"]),
        ("min_keep", Retention { min_keep: 1, ..max_age("1h") }, [create, "delete max_age"]),
        ("all may stay", keep_last(2), [create, "keep keep_last"]),
    ] {
        let zone = aged(&[0, 1]).made_by_us(&[2]).coming(1);
        let plan = plan_of(&[own(nightly().with(rules))], &zone, now());
        assert_eq!(shown(&plan, &zone), expected, "{name}");
        assert_eq!((plan.good, decision(&plan, 1).expires_at), (2, None), "{name}");
    }
    // Not even a rule that is out of place here lets it go, and its name is not known yet.
    let zone = aged(&[0]).coming(1);
    let mut unnamed = nightly().with(Retention { max_count: None, ..max_age("1h") });
    unnamed.select.snapshot_names = Some(Vec::new());
    let later = now() + SignedDuration::from_hours(5);
    let plan = plan_of(&[unnamed, policy("weekly").with(keep_last(1))], &zone, later);
    assert_eq!(shown(&plan, &zone), [create]);
    assert_eq!(words(&plan, 1), ["the run takes it first (create)"]);
}
