//! Those of the forty numbered edge cases that period rules, failed snapshots and the calendar make; `point_NN` in a
//! test's name is the number, and `tests/all/points.rs` sees that each of the forty has one.

use super::*;
use crate::policy::Period;

fn nightly() -> Policy {
    policy("nightly")
}

fn aged_hours(hours: &[i64]) -> Inventory {
    inventory(hours.iter().map(|hours| snap("web-1", hours_ago(*hours))))
}

fn taken(times: &[&str]) -> Inventory {
    inventory(times.iter().map(|time| snap("web-1", at(time))))
}

fn keep_all(period: Period) -> Retention {
    keep_each(period, Count::All)
}

/// The newest of each period, without the oldest of all.
fn keep_each(period: Period, count: Count) -> Retention {
    let mut rules = Retention { keep_oldest: false, ..no_rules() };
    *rules.keep.get_mut(period) = Some(count);
    rules
}

fn keep_within_each(period: Period, within: &str) -> Retention {
    let mut rules = Retention { keep_oldest: false, ..no_rules() };
    *rules.keep_within_each.get_mut(period) = Some(span(within));
    rules
}

fn with_failed_after(after: &str, rules: Retention) -> Retention {
    Retention { failed_after: Some(span(after)), ..rules }
}

/// Those of these times that a policy keeps, as they are written there.
fn kept<'t>(times: &[&'t str], rules: Retention, time_zone: &str, now: Timestamp) -> Vec<&'t str> {
    let zone = taken(times);
    let gone = deleted(&plan_of(&[nightly().in_zone(time_zone).with(rules)], &zone, now));
    (1..).zip(times).filter(|(number, _)| !gone.contains(number)).map(|(_, time)| *time).collect()
}

#[test]
fn point_04_all_is_without_end_and_a_great_count_too() {
    let ages: Vec<i64> = (0..300).map(|month| month * 730).collect();
    let zone = aged_hours(&ages);
    for count in [Count::All, slots(1_000_000_000).unwrap()] {
        let rules = Retention { keep_last: Some(count), ..no_rules() };
        assert_eq!(plan_of(&[nightly().with(rules)], &zone, now()).deletes, 0);
        let yearly = plan_of(&[nightly().with(keep_each(Period::Year, count))], &zone, now());
        // 300 months back from September 2026 are 25 years and a half.
        assert_eq!(yearly.good - yearly.deletes, 26);
    }
}

#[test]
fn point_07_a_failed_one_goes_by_failed_after_alone_and_only_beneath_a_newer_good_one() {
    let failed = |days| in_state("error", snap("web-1", days_ago(days)));
    let other = || snap("web-2", days_ago(0));
    let rules = || with_failed_after("2d", keep_last(9));
    let deleted = "delete failed_after";
    let stays = "ignore state";
    for (name, snapshots, rules, expected) in [
        (
            "older, beneath a good one",
            vec![failed(3), snap("web-1", days_ago(1))],
            rules(),
            &[deleted, "keep keep_last"][..],
        ),
        ("exactly so old", vec![failed(2), snap("web-1", days_ago(1))], rules(), &[stays, "keep keep_last"]),
        (
            "the good one is older",
            vec![failed(3), snap("web-1", days_ago(4))],
            rules(),
            &[stays, "keep keep_last"],
        ),
        ("the good one is of another", vec![failed(3), other()], rules(), &[stays, "keep keep_last"]),
        (
            "the newer one is not good",
            vec![failed(3), failed(1), in_state("exporting", snap("web-1", days_ago(0)))],
            rules(),
            &[stays, stays, stays],
        ),
        (
            "the newer one is dated in the future",
            vec![failed(3), snap("web-1", days_ago(-1))],
            rules(),
            &[stays, "ignore future"],
        ),
        (
            "without the key",
            vec![failed(300), snap("web-1", days_ago(1))],
            max_age("1w"),
            &[stays, "keep none"],
        ),
        (
            "it counts for nothing",
            vec![failed(1), failed(0), snap("web-1", days_ago(3)), snap("web-1", days_ago(4))],
            Retention { min_keep: 1, max_count: count(1), ..with_failed_after("2d", keep_last(2)) },
            &[stays, stays, "keep keep_last", "delete max_count"],
        ),
        (
            "other states are not failed",
            vec![
                in_state("snapshotting", snap("web-1", days_ago(9))),
                in_state("odd", snap("web-1", days_ago(9))),
                snap("web-1", days_ago(1)),
            ],
            rules(),
            &[stays, stays, "keep keep_last"],
        ),
    ] {
        let zone = inventory(snapshots);
        assert_eq!(shown(&plan_of(&[nightly().with(rules)], &zone, now()), &zone), expected, "{name}");
    }
}

#[test]
fn point_07_a_failed_one_needs_no_copy_but_pins_and_other_policies_keep_it() {
    let failed = || in_state("error", snap("web-1", days_ago(3)));
    let zone = inventory([failed(), snap("web-1", days_ago(1))]);
    let nightly = || nightly().with(with_failed_after("2d", keep_last(9)));
    let first =
        |policies: &[Policy], zone: &Inventory| shown(&plan_of(policies, zone, now()), zone).swap_remove(0);
    let gated = nightly().requiring(&["vault"], Which::All);
    let closed = zone.clone().archive("vault", Copies::Unreachable("it is gone".to_owned()));
    assert_eq!(first(std::slice::from_ref(&gated), &closed), "delete failed_after");
    let plan = plan_of(&[gated], &closed, now());
    assert!(decision(&plan, 1).copies().is_empty());
    assert_eq!(first(&[nightly()], &zone.clone().on_hold(1, None)), "keep hold");
    let weekly = policy("weekly").with(keep_last(1));
    assert_eq!(first(&[nightly(), weekly.clone()], &zone), "keep policy");
    assert_eq!(first(&[nightly(), weekly.clone().only("web-2")], &zone), "delete failed_after");
    let later = Retention { failed_after: Some(span("5d")), ..keep_last(1) };
    let both = [nightly(), policy("weekly").with(later)];
    assert_eq!(first(&both, &zone), "keep policy");
    let plan = plan_of(&both, &zone, now());
    assert_eq!(decision(&plan, 1).expires_at, Some(days_ago(-2) + SignedDuration::from_secs(1)));
}

#[test]
fn point_12_both_half_past_twos_are_kept_by_an_hour_rule_and_the_day_of_25_hours_is_one() {
    let times = [
        "2026-10-24T23:30:00+02:00",
        "2026-10-25T00:30:00+02:00",
        "2026-10-25T02:30:00+02:00",
        "2026-10-25T02:30:00+01:00",
        "2026-10-25T23:30:00+01:00",
    ];
    let now = at("2026-10-26T00:00:00+01:00");
    assert_eq!(kept(&times, keep_all(Period::Hour), "Europe/Zurich", now), times);
    assert_eq!(kept(&times, keep_all(Period::Day), "Europe/Zurich", now), [times[0], times[4]]);
    // The day of 25 hours, from its first instant to its last.
    let edges = [
        "2026-10-24T23:59:59.999999999+02:00",
        "2026-10-25T00:00:00+02:00",
        "2026-10-25T23:59:59.999999999+01:00",
    ];
    assert_eq!(kept(&edges, keep_all(Period::Day), "Europe/Zurich", now), [edges[0], edges[2]]);
}

#[test]
fn point_13_the_day_of_23_hours_is_one() {
    let edges = [
        "2026-03-28T23:59:59.999999999+01:00",
        "2026-03-29T00:00:00+01:00",
        "2026-03-29T23:59:59.999999999+02:00",
    ];
    let now = at("2026-03-30T00:00:00+02:00");
    assert_eq!(kept(&edges, keep_all(Period::Day), "Europe/Zurich", now), [edges[0], edges[2]]);
    let hours = ["2026-03-29T01:30:00+01:00", "2026-03-29T03:30:00+02:00"];
    assert_eq!(kept(&hours, keep_all(Period::Hour), "Europe/Zurich", now), hours);
}

#[test]
fn point_14_another_time_zone_groups_the_days_anew() {
    // 23:30 and 00:30 of Zurich are one day in UTC.
    let times = ["2026-09-14T23:30:00+02:00", "2026-09-15T00:30:00+02:00", "2026-09-15T12:00:00+02:00"];
    assert_eq!(kept(&times, keep_all(Period::Day), "Europe/Zurich", now()), [times[0], times[2]]);
    assert_eq!(kept(&times, keep_all(Period::Day), "UTC", now()), [times[1], times[2]]);
}

#[test]
fn point_15_a_week_belongs_to_the_iso_year_that_has_its_thursday() {
    for (name, week, other) in [
        ("2025-W01", ["2024-12-30T12:00:00Z", "2025-01-05T12:00:00Z"], "2024-12-29T12:00:00Z"),
        ("2020-W53", ["2020-12-28T12:00:00Z", "2021-01-03T12:00:00Z"], "2021-01-04T12:00:00Z"),
        // 1 January 2021 is not in the week of 28 December 2021, though both call themselves 2021 and last.
        ("2021-W52", ["2021-12-27T12:00:00Z", "2022-01-02T12:00:00Z"], "2021-01-01T12:00:00Z"),
    ] {
        let times = [week[0], week[1], other];
        assert_eq!(kept(&times, keep_all(Period::Week), "UTC", now()), [week[1], other], "{name}");
        let zone = taken(&times);
        let plan = plan_of(&[nightly().with(keep_all(Period::Week))], &zone, now());
        let words = words(&plan, 2).join("\n");
        assert!(words.contains(name), "{words}");
    }
}

#[test]
fn point_16_months_and_years_are_the_calendars() {
    let times =
        ["2026-01-31T23:59:59Z", "2026-02-01T00:00:00Z", "2026-02-28T23:59:59Z", "2026-03-01T00:00:00Z"];
    assert_eq!(kept(&times, keep_all(Period::Month), "UTC", now()), [times[0], times[2], times[3]]);
    let times =
        ["2023-12-31T23:59:59Z", "2024-01-01T00:00:00Z", "2024-12-31T23:59:59Z", "2025-01-01T00:00:00Z"];
    assert_eq!(kept(&times, keep_all(Period::Year), "UTC", now()), [times[0], times[2], times[3]]);
    let window = || keep_within_each(Period::Day, "1mo");
    let times = ["2026-02-28T12:00:00Z", "2026-02-27T12:00:00Z"];
    assert_eq!(kept(&times, window(), "UTC", at("2026-03-28T12:00:00Z")), [times[0]]);
    assert_eq!(kept(&times, window(), "UTC", at("2026-03-31T12:00:00Z")), [""; 0]);
}

#[test]
fn point_17_exactly_on_the_cut_off_is_kept_by_the_rules_of_a_window_too() {
    for period in Period::ALL {
        let zone = inventory([snap("web-1", hours_ago(7))]);
        let policy = nightly().with(keep_within_each(period, "7h"));
        let rule = format!("keep keep_within_{}", period.adverb());
        assert_eq!(shown(&plan_of(std::slice::from_ref(&policy), &zone, now()), &zone), [rule]);
        assert_eq!(shown(&plan_of(&[policy], &zone, now() + nanosecond()), &zone), ["delete keep"]);
    }
    let failed = inventory([in_state("error", snap("web-1", hours_ago(7))), snap("web-1", now())]);
    let policy = [nightly().with(with_failed_after("7h", keep_last(1)))];
    assert_eq!(shown(&plan_of(&policy, &failed, now()), &failed)[0], "ignore state");
    assert_eq!(shown(&plan_of(&policy, &failed, now() + nanosecond()), &failed)[0], "delete failed_after");
}

#[test]
fn point_18_of_two_with_one_timestamp_a_rule_that_keeps_one_keeps_one() {
    for period in Period::ALL {
        let zone = inventory([snap("web-1", days_ago(1)), snap("web-1", days_ago(1))]);
        for rules in [keep_each(period, slots(1).unwrap()), keep_within_each(period, "2d")] {
            assert_eq!(deleted(&plan_of(&[nightly().with(rules)], &zone, now())), [1], "{period:?}");
        }
    }
}

#[test]
fn point_21_a_long_outage_empties_no_count_of_periods() {
    let zone = aged_hours(&[24 * 400, 24 * 401, 24 * 402, 24 * 402 + 1]);
    let daily = keep_each(Period::Day, slots(2).unwrap());
    assert_eq!(deleted(&plan_of(&[nightly().with(daily)], &zone, now())), [3, 4]);
    // Periods without one take no slot.
    let zone = aged_hours(&[1, 24 * 400]);
    let daily = keep_each(Period::Day, slots(2).unwrap());
    assert_eq!(deleted(&plan_of(&[nightly().with(daily)], &zone, now())), [0_u32; 0]);
}

#[test]
fn point_22_a_burst_of_a_hundred_in_an_hour_pushes_out_no_daily() {
    let burst = (0..100).map(|minute| snap("web-1", hours_ago(1) + SignedDuration::from_secs(30 * minute)));
    let zone = inventory((1..=7).map(|day| snap("web-1", days_ago(day))).chain(burst));
    let gone = deleted(&plan_of(&[nightly().with(keep_each(Period::Day, slots(7).unwrap()))], &zone, now()));
    // The day of the burst takes one slot of seven: the newest of it stays, and the oldest day is deleted.
    let expected: Vec<u32> = std::iter::once(7).chain(8..107).collect();
    assert_eq!(gone, expected);
}

#[test]
fn point_24_with_three_weeks_of_data_a_yearly_rule_holds_the_newest_and_the_oldest_with_that_reason() {
    let days: Vec<i64> = (0..21).map(|day| 24 * day).collect();
    let zone = aged_hours(&days);
    let yearly = |count: u32, keep_oldest| {
        let rules = Retention { keep_oldest, ..keep_each(Period::Year, slots(count).unwrap()) };
        plan_of(&[nightly().with(rules)], &zone, now())
    };
    let stays = |plan: &PolicyPlan| (1..=21).filter(|day| !deleted(plan).contains(day)).collect::<Vec<u32>>();
    assert_eq!(stays(&yearly(1, true)), [1], "its one slot is used");
    assert_eq!(stays(&yearly(3, false)), [1]);
    let plan = yearly(3, true);
    assert_eq!(stays(&plan), [1, 21]);
    assert_eq!(shown(&plan, &zone)[20], "keep keep_yearly");
    assert!(words(&plan, 21).join("\n").contains("oldest"), "{:?}", words(&plan, 21));
}

#[test]
fn point_24_the_oldest_is_held_by_a_window_only_while_it_is_inside() {
    let zone = aged_hours(&[0, 1, 2]);
    let window = |within: &str| Retention { keep_oldest: true, ..keep_within_each(Period::Year, within) };
    assert_eq!(deleted(&plan_of(&[nightly().with(window("2h"))], &zone, now())), [2]);
    let later = plan_of(&[nightly().with(window("2h"))], &zone, now() + nanosecond());
    assert_eq!(deleted(&later), [2, 3]);
    let all = Retention { keep_oldest: true, ..keep_all(Period::Year) };
    assert_eq!(deleted(&plan_of(&[nightly().with(all)], &zone, now())), [2], "`all` has always one left");
}

#[test]
fn point_25_the_newest_of_the_running_week_is_dropped_for_a_newer_one() {
    let weekly = || nightly().with(keep_all(Period::Week));
    let zone = taken(&["2026-09-14T02:30:00Z"]);
    assert_decided(&[weekly()], &zone, now(), &["keep keep_weekly"]);
    let next = taken(&["2026-09-14T02:30:00Z", "2026-09-15T02:30:00Z"]);
    assert_decided(&[weekly()], &next, now(), &["delete keep", "keep keep_weekly"]);
}

/// A clock change: in which zone, the times around it as the clock on the wall had them, and which of them are the
/// newest of their day and of their week, there and by UTC.
struct Change {
    zone: &'static str,
    times: &'static [&'static str],
    days: &'static [usize],
    days_of_utc: &'static [usize],
    weeks: &'static [usize],
    weeks_of_utc: &'static [usize],
}

/// Each is on a Sunday, so that the week ends with the day after whose noon it is judged.
const CHANGES: [Change; 6] = [
    Change {
        zone: "Europe/Zurich",
        times: &[
            "2026-03-28T12:00:00+01:00",
            "2026-03-28T23:30:00+01:00",
            "2026-03-29T01:30:00+01:00",
            "2026-03-29T03:30:00+02:00",
            "2026-03-29T23:30:00+02:00",
            "2026-03-30T00:30:00+02:00",
        ],
        days: &[1, 4, 5],
        days_of_utc: &[1, 5],
        weeks: &[4, 5],
        weeks_of_utc: &[5],
    },
    Change {
        zone: "Europe/Zurich",
        times: &[
            "2026-10-24T12:00:00+02:00",
            "2026-10-24T23:30:00+02:00",
            "2026-10-25T01:30:00+02:00",
            "2026-10-25T02:30:00+02:00",
            "2026-10-25T02:30:00+01:00",
            "2026-10-25T23:30:00+01:00",
            "2026-10-26T00:30:00+01:00",
        ],
        days: &[1, 5, 6],
        days_of_utc: &[2, 6],
        weeks: &[5, 6],
        weeks_of_utc: &[6],
    },
    Change {
        zone: "America/New_York",
        times: &[
            "2026-03-07T12:00:00-05:00",
            "2026-03-07T23:30:00-05:00",
            "2026-03-08T01:30:00-05:00",
            "2026-03-08T03:30:00-04:00",
            "2026-03-08T23:30:00-04:00",
            "2026-03-09T00:30:00-04:00",
        ],
        days: &[1, 4, 5],
        days_of_utc: &[0, 3, 5],
        weeks: &[4, 5],
        weeks_of_utc: &[3, 5],
    },
    Change {
        zone: "America/New_York",
        times: &[
            "2026-10-31T12:00:00-04:00",
            "2026-10-31T23:30:00-04:00",
            "2026-11-01T01:30:00-04:00",
            "2026-11-01T01:30:00-05:00",
            "2026-11-01T23:30:00-05:00",
            "2026-11-02T00:30:00-05:00",
        ],
        days: &[1, 4, 5],
        days_of_utc: &[0, 3, 5],
        weeks: &[4, 5],
        weeks_of_utc: &[3, 5],
    },
    // By half an hour.
    Change {
        zone: "Australia/Lord_Howe",
        times: &[
            "2026-04-04T12:00:00+11:00",
            "2026-04-04T23:15:00+11:00",
            "2026-04-05T01:35:00+11:00",
            "2026-04-05T01:35:00+10:30",
            "2026-04-05T23:15:00+10:30",
            "2026-04-06T00:15:00+10:30",
        ],
        days: &[1, 4, 5],
        days_of_utc: &[3, 5],
        weeks: &[4, 5],
        weeks_of_utc: &[5],
    },
    Change {
        zone: "Australia/Lord_Howe",
        times: &[
            "2026-10-03T12:00:00+10:30",
            "2026-10-03T23:15:00+10:30",
            "2026-10-04T01:25:00+10:30",
            "2026-10-04T02:45:00+11:00",
            "2026-10-04T23:15:00+11:00",
            "2026-10-05T00:15:00+11:00",
        ],
        days: &[1, 4, 5],
        days_of_utc: &[3, 5],
        weeks: &[4, 5],
        weeks_of_utc: &[5],
    },
];

#[test]
fn point_12_and_13_around_clock_changes_hours_are_the_same_everywhere_and_days_and_weeks_the_zones() {
    for Change { zone, times, days, days_of_utc, weeks, weeks_of_utc } in CHANGES {
        let later = at(times[times.len() - 1]) + SignedDuration::from_hours(12);
        let instants: Vec<String> = times.iter().map(|time| at(time).to_string()).collect();
        let instants: Vec<&str> = instants.iter().map(String::as_str).collect();
        let places = |times: &[&str], rules: Retention, zone| -> Vec<usize> {
            let kept = kept(times, rules, zone, later);
            (0..times.len()).filter(|place| kept.contains(&times[*place])).collect()
        };
        let all: Vec<usize> = (0..times.len()).collect();
        for rules in [keep_all(Period::Hour), keep_within_each(Period::Hour, "30d"), keep_within("30d")] {
            // No two are of one hour, whatever the clock on the wall said.
            assert_eq!(places(times, rules.clone(), zone), all, "{zone}: {times:?}");
            assert_eq!(places(&instants, rules.clone(), zone), all, "{zone}: the same instants in UTC");
            assert_eq!(places(times, rules, "UTC"), all, "{zone}: the same in a policy of UTC");
        }
        for (period, there, of_utc) in [(Period::Day, days, days_of_utc), (Period::Week, weeks, weeks_of_utc)]
        {
            assert_eq!(places(times, keep_all(period), zone), there, "{zone}: {period:?} of {times:?}");
            assert_eq!(places(&instants, keep_all(period), zone), there, "{zone}: the same instants in UTC");
            assert_eq!(places(times, keep_all(period), "UTC"), of_utc, "UTC: {period:?} of {times:?}");
        }
    }
}

#[test]
fn point_12_and_13_a_day_before_noon_is_noon_through_every_clock_change() {
    for Change { zone, times, .. } in CHANGES {
        // The first of them is noon of the day before.
        let noon = at(times[0]);
        let next = noon.to_zoned_datetime(super::zone(zone)).datetime().tomorrow().unwrap();
        let next = super::zone(zone).to_ambiguous_timestamp(next).compatible().unwrap();
        assert_ne!(next.duration_since(noon), SignedDuration::from_hours(24));
        let one = inventory([snap("web-1", noon)]);
        let shown =
            |at: Timestamp| shown(&plan_of(&[nightly().in_zone(zone).with(max_age("1d"))], &one, at), &one);
        assert_eq!(shown(next), ["keep none"], "{zone}");
        assert_eq!(shown(next + nanosecond()), ["delete max_age"], "{zone}");
        let expiry = plan_of(&[nightly().in_zone(zone).with(max_age("1d"))], &one, noon);
        assert_eq!(decision(&expiry, 1).expires_at, Some(next + SignedDuration::from_secs(1)), "{zone}");
    }
}
