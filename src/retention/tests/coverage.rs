//! Which instances have what they should have.

use std::collections::BTreeMap;

use super::*;
use crate::policy::name::PolicyName;
use crate::policy::select::Exemption;
use crate::retention::coverage::{
    CoverageState, Expectation, Freshness, InstanceCoverage, VanishedInstance, coverage, state_of,
};

fn creating(name: &str, schedule: &str) -> Policy {
    Policy { create: true, schedule: Some(schedule.parse().unwrap()), ..policy(name) }
}

fn judged(policies: &[Policy], inventory: &Inventory) -> BTreeMap<String, InstanceCoverage> {
    let all = coverage(policies, &Exemption::default(), inventory, &[], now());
    all.into_iter().map(|one| (one.name.clone(), one)).collect()
}

fn problems(policies: &[Policy], inventory: &Inventory) -> Vec<String> {
    judged(policies, inventory).remove("web-1").unwrap().problems
}

#[test]
fn a_snapshot_is_fresh_for_twice_the_longest_gap_where_the_policy_creates() {
    let daily = creating("nightly", "@daily");
    let weekly = creating("weekly", "@weekly");
    let expecting = |span_text: &str| {
        let mut policy = policy("others");
        policy.guard.expect_newest = Some(span(span_text));
        policy
    };
    for (policy, hours, expected) in [
        (&daily, 48, Freshness::Fresh),
        (&daily, 49, Freshness::Stale),
        (&weekly, 49, Freshness::Fresh),
        (&weekly, 14 * 24 + 1, Freshness::Stale),
        // Others take them, so nothing is known of when.
        (&Policy { create: false, ..daily.clone() }, 10_000, Freshness::Fresh),
        (&Policy { schedule: None, ..daily.clone() }, 10_000, Freshness::Fresh),
        (&expecting("36h"), 36, Freshness::Fresh),
        (&expecting("36h"), 37, Freshness::Stale),
    ] {
        let newest = Some(hours_ago(hours));
        assert_eq!(Expectation::of(policy, now()).judge(newest, None, now()), expected, "{hours}");
    }
}

#[test]
fn a_new_machine_has_twice_the_longest_gap_for_its_first_snapshot() {
    let others = Policy { create: false, ..creating("nightly", "@daily") };
    for (policy, created_at, expected) in [
        (&creating("nightly", "@daily"), Some(hours_ago(48)), Freshness::Fresh),
        (&creating("nightly", "@daily"), Some(hours_ago(49)), Freshness::None),
        (&others, Some(hours_ago(49)), Freshness::None),
        (&creating("weekly", "@weekly"), Some(hours_ago(49)), Freshness::Fresh),
        // Without a schedule two days.
        (&policy("manual"), Some(hours_ago(48)), Freshness::Fresh),
        (&policy("manual"), Some(hours_ago(49)), Freshness::None),
        (&policy("manual"), None, Freshness::None),
    ] {
        let freshness = Expectation::of(policy, now()).judge(None, created_at, now());
        assert_eq!(freshness, expected, "{} {created_at:?}", policy.name);
    }
}

#[test]
fn covered_is_what_an_enabled_policy_takes_or_exports_and_exempt_what_is_named() {
    let exports = policy("offsite").requiring(&["vault"], Which::Newest);
    let web = instance("web-1");
    let exemption =
        |name: &str| Exemption { instances: vec![Pattern::new(name).unwrap()], ..Exemption::default() };
    let elsewhere = Policy { zones: vec!["de-fra-1".parse().unwrap()], ..exports.clone() };
    let mut unresolved = exports.clone();
    unresolved.select.this_machine.is_selected = true;
    for (policies, exempt, expected) in [
        (vec![exports.clone()], "ci-*", CoverageState::Covered),
        (vec![creating("nightly", "@daily")], "ci-*", CoverageState::Covered),
        (vec![exports.clone().only("db-1")], "ci-*", CoverageState::Uncovered),
        (vec![policy("prunes").with(keep_last(1))], "ci-*", CoverageState::Uncovered),
        (vec![Policy { enabled: false, ..exports.clone() }], "ci-*", CoverageState::Uncovered),
        (vec![elsewhere], "ci-*", CoverageState::Uncovered),
        (vec![unresolved], "ci-*", CoverageState::Uncovered),
        (vec![], "ci-*", CoverageState::Uncovered),
        (vec![], "web-*", CoverageState::Exempt),
        (vec![exports], "web-*", CoverageState::Exempt),
    ] {
        let state = state_of(&policies, &exemption(exempt), &"ch-gva-2".parse().unwrap(), &web);
        assert_eq!(state, expected, "{policies:?} {exempt}");
    }
}

#[test]
fn each_instance_says_what_it_has_and_what_it_lacks() {
    let nightly = creating("nightly", "@daily").requiring(&["vault"], Which::Newest);
    let mut zone = inventory([snap("web-1", hours_ago(3)), snap("web-1", hours_ago(27))]);
    zone = zone.clone().archive("vault", zone.copies(&[1, 2]));
    let all = judged(std::slice::from_ref(&nightly), &zone);
    let web = &all["web-1"];
    assert_eq!((web.state, &web.problems[..], &web.missing[..]), (CoverageState::Covered, &[][..], &[][..]));
    assert_eq!((web.newest_snapshot, web.newest_copy), (Some(hours_ago(3)), Some(hours_ago(3))));
    assert_eq!((web.policies.len(), web.archives.len()), (1, 1));
    let without = &all["web-2"];
    assert_eq!((&without.problems[..], without.missing.len()), (&["no good snapshot".to_owned()][..], 1));
    assert_eq!((without.newest_snapshot, without.newest_copy, without.archives.len()), (None, None, 0));
}

#[test]
fn problems_name_the_policy_the_archive_and_the_times() {
    let nightly = creating("nightly", "@daily");
    let old = snap("web-1", days_ago(30));
    assert_eq!(
        problems(std::slice::from_ref(&nightly), &inventory([old.clone()])),
        [
            "newest good snapshot of 2026-08-17T12:00:00Z: policy nightly expects one not older than 2d, twice the longest \
          gap of its schedule"
        ]
    );
    // Neither failed nor future nor coming ones count.
    let failed = in_state("error", old.clone());
    let future = snap("web-1", minutes_ahead(6));
    let mut coming = inventory([failed, future, snap("web-1", now())]);
    coming.coming.insert(snapshot_id(3));
    assert_eq!(problems(std::slice::from_ref(&nightly), &coming), ["no good snapshot"]);
    let mut by_name = nightly.clone();
    by_name.select.exclude_snapshots = vec![Pattern::new("web-1*").unwrap()];
    assert_eq!(
        problems(&[by_name], &inventory([old.clone()])),
        ["policy nightly selects none of its good snapshots"]
    );

    let exports =
        |zone: Inventory| problems(&[policy("offsite").requiring(&["vault"], Which::Newest)], &zone);
    let zone = inventory([old, snap("web-1", days_ago(3)), snap("web-1", hours_ago(1))]);
    let with = |numbers: &[usize]| zone.clone().archive("vault", zone.copies(numbers));
    assert_eq!(exports(with(&[])), ["archive vault has no verified copy"]);
    assert_eq!(
        exports(with(&[1])),
        ["archive vault: newest verified copy of 2026-08-17T12:00:00Z, though a good snapshot is of \
          2026-09-13T12:00:00Z"]
    );
    // The newest is not late yet.
    assert_eq!(exports(with(&[2])), [""; 0]);
    let unreachable = Copies::Unreachable("no such folder".to_owned());
    assert_eq!(
        exports(zone.clone().archive("vault", unreachable)),
        ["its copies in archive vault are not known"]
    );
}

#[test]
fn an_uncovered_instance_says_why() {
    let paused = Policy { enabled: false, ..creating("nightly", "@daily") };
    let prunes = policy("prunes").with(keep_last(1));
    let zone = inventory([snap("web-1", hours_ago(1))]);
    for (policies, why) in [
        (vec![], "no policy selects it"),
        (vec![paused.clone()], "no enabled policy selects it; not enabled: nightly"),
        (vec![prunes.clone(), paused], "no policy takes or exports its snapshots; prunes does neither"),
        (vec![prunes, policy("more")], "no policy takes or exports its snapshots; prunes, more do neither"),
    ] {
        assert_eq!(problems(&policies, &zone), [why]);
    }
}

#[test]
fn a_vanished_instance_stands_with_its_copies() {
    let nightly = creating("nightly", "@daily").requiring(&["vault"], Which::Newest);
    let mut zone = inventory([snap("db-1", hours_ago(3))]);
    zone = zone.clone().archive("vault", zone.copies(&[1]));
    zone.snapshots.clear();
    let gone = VanishedInstance {
        id: instance_id("db-1"),
        name: "db-1".to_owned(),
        since: hours_ago(2),
        policies: vec!["nightly".parse::<PolicyName>().unwrap()],
    };
    let all = coverage(&[nightly], &Exemption::default(), &zone, &[gone], now());
    let db = all.iter().find(|one| one.name == "db-1").unwrap();
    assert_eq!(
        (db.state.as_str(), db.newest_snapshot, db.newest_copy),
        ("vanished", None, Some(hours_ago(3)))
    );
    assert_eq!(db.problems, ["not listed any more since 2026-09-16T10:00:00Z"]);
}
