//! How long one scrape of a large fleet takes, and how much memory: 2,500 instances of two policies are 40,000 series.
#![expect(clippy::unwrap_used, reason = "what is measured was made here")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;

use divan::counter::{BytesCount, ItemsCount};
use divan::{AllocProfiler, Bencher};
use jiff::Timestamp;
use snapwarden::clock::SystemClock;
use snapwarden::state::last_runs::LastRuns;
use snapwarden::telemetry::Telemetry;
use snapwarden::telemetry::model::PolicyView;

#[global_allocator]
static ALLOCATIONS: AllocProfiler = AllocProfiler::system();

const SIZES: [usize; 2] = [250, 2_500];

fn main() {
    divan::main();
}

/// What a zone of so many instances leaves in the state directory.
fn remembered(instances: usize) -> LastRuns {
    let mut text = String::new();
    for number in 0..instances {
        let comma = if number == 0 { "" } else { "," };
        write!(
            text,
            r#"{comma}{{"id":"9ee8cb98-ea6e-4d57-bdde-{number:012x}","name":"web-{number}.example.org","good":14,"failed":0,"in_flight":0,"other":0,"newest_at":"2026-11-14T02:30:07Z","oldest_at":"2026-11-01T02:30:07Z","newest_consistent_at":"2026-11-14T02:30:07Z","newest_verified_at":{{"vault":"2026-11-14T02:30:07Z"}},"is_listed":true}}"#
        )
        .unwrap();
    }
    let at = "2026-11-14T02:31:00Z";
    serde_json::from_str(&format!(
        r#"{{"last":null,"zones":{{"ch-gva-2":{{"last_run_at":"{at}","last_success_at":"{at}","failure":null,"held":null,"gate_since":null,"plan":null,"accepted":null,"instances":[{text}]}}}}}}"#
    ))
    .unwrap()
}

#[divan::bench(args = SIZES, sample_count = 20)]
fn text(bencher: Bencher<'_, '_>, instances: usize) {
    let config = "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.weekly]\nzones = [\"ch-gva-2\"]\n";
    let policies = snapwarden::config::parse(config, "sample", None).unwrap().policies;
    let views: Vec<PolicyView<'_>> = policies
        .iter()
        .map(|policy| PolicyView {
            policy,
            first_seen_at: Timestamp::UNIX_EPOCH,
            remembered: remembered(instances),
            expected_interval: None,
        })
        .collect();
    let telemetry = Telemetry::new(Arc::new(SystemClock::start()), "0", "");
    telemetry.configure(&views, &BTreeSet::new());
    let text = telemetry.metrics_text();
    let series = text.lines().filter(|line| !line.starts_with('#')).count();
    bencher
        .counter(BytesCount::new(text.len()))
        .counter(ItemsCount::new(series))
        .bench_local(|| telemetry.metrics_text());
}
