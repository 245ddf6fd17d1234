//! How fast a policy is played forward.

use std::num::NonZeroU32;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use snapwarden::config;
use snapwarden::policy::{ByPeriod, Count, Policy};
use snapwarden::retention::simulate::{self, Forecast, Simulation};

fn main() {
    divan::main();
}

/// A policy with six keep rules that runs every hour.
fn hourly() -> Policy {
    let text = "[policies.hourly]\nschedule = \"@hourly\"\nzones = [\"ch-gva-2\"]\ncreate = true\n\
                [policies.hourly.retention]\nkeep_last = 24\n";
    let parsed = config::parse(text, "bench.toml", None);
    let config = parsed.unwrap_or_else(|error| panic!("{error}"));
    let Some(mut policy) = config.policies.into_iter().next() else { panic!("there is a policy") };
    let of = |count| NonZeroU32::new(count).map(Count::Of);
    let mut counts = [48, 14, 8, 12, 3].into_iter();
    policy.time_zone = TimeZone::get("Europe/Zurich").unwrap_or(TimeZone::UTC);
    if let Some(retention) = &mut policy.retention {
        retention.keep = ByPeriod::of(|_| counts.next().and_then(of));
    }
    policy
}

/// Two years of hourly snapshots of one instance: 17,520 runs.
#[divan::bench]
fn two_years_of_hourly_snapshots(bencher: divan::Bencher) {
    let policy = hourly();
    let from: Timestamp = "2026-11-01T12:00:00Z".parse().unwrap_or_default();
    let until = from + SignedDuration::from_hours(2 * 365 * 24);
    bencher.bench(|| -> Forecast {
        let (policy, inventory) = simulate::imaginary_instance(&policy, &policy.zones[0]);
        let policies = std::slice::from_ref(&policy);
        let play = Simulation { policies, policy: &policy, from, until, size_gib: Some(10) };
        let played = simulate::simulate(play, inventory).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(played.moments.len(), 17_521);
        played
    });
}
