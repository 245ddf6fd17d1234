//! Metrics and status over whole runs: what is there at which moment, and what is gone with its policy.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use snapwarden::archive::stats::ArchiveStats;
use snapwarden::clock::Clock as _;
use snapwarden::disk::{Access, Disk as _, RealDisk, replace_file};
use snapwarden::exoscale::client::Observer as _;
use snapwarden::policy::Policy;
use snapwarden::policy::name::{ArchiveName, PolicyName};
use snapwarden::run::context::{RunOptions, Runner};
use snapwarden::run::report::RunReport;
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::snapshot::{InstanceId, ZoneName};
use snapwarden::state::last_runs::{InstanceCounts, LastRun, LastRuns, PlanSums, ZoneMemory};
use snapwarden::telemetry::Telemetry;
use snapwarden::telemetry::model::PolicyView;

use crate::stage::{NIGHTLY, NOW, Stage, days_ago, files};

/// Every metric that the contract names and that belongs to what exists.
const METRICS: &[&str] = &[
    "build_info",
    "config_last_reload_successful",
    "config_last_reload_success_timestamp_seconds",
    "state_last_write_successful",
    "scheduler_last_tick_timestamp_seconds",
    "clock_skew_seconds",
    "policy_enabled",
    "policy_created_timestamp_seconds",
    "policy_next_run_timestamp_seconds",
    "policy_expected_interval_seconds",
    "policy_runs_total",
    "policy_run_duration_seconds",
    "policy_missed_runs_total",
    "policy_last_run_timestamp_seconds",
    "policy_last_success_timestamp_seconds",
    "policy_held",
    "policy_unmatched",
    "policy_last_run_result",
    "policy_instances",
    "instances",
    "guard_allowance",
    "pending_deletes",
    "archive_present",
    "planned_deletes",
    "blocked_deletes",
    "snapshots",
    "snapshot_newest_timestamp_seconds",
    "snapshot_newest_consistent_timestamp_seconds",
    "snapshot_oldest_timestamp_seconds",
    "export_newest_verified_timestamp_seconds",
    "snapshot_deletes_total",
    "snapshot_creates_total",
    "exports_total",
    "promotes_total",
    "export_bytes_total",
    "export_duration_seconds",
    "export_resumes_total",
    "exports_in_progress",
    "export_progress_bytes",
    "export_checksum_mismatches_total",
    "archive_images",
    "archive_bytes",
    "archive_free_bytes",
    "archive_corrupt_images",
    "quota_usage",
    "quota_limit",
    "api_requests_total",
    "api_request_duration_seconds",
    "api_retries_total",
];

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn nightly() -> PolicyName {
    "nightly".parse().unwrap()
}

fn vault() -> BTreeSet<ArchiveName> {
    ["vault".parse().unwrap()].into()
}

fn view(policy: &Policy, remembered: LastRuns) -> PolicyView<'_> {
    let (first_seen_at, expected_interval) = (at(NOW), Some(Duration::from_hours(24)));
    PolicyView { policy, first_seen_at, remembered, expected_interval }
}

/// The telemetry of a stage, configured with all policies of the runner, and the runner observed by it.
fn observed(stage: &Stage, policies: &str) -> (Telemetry, Runner) {
    let telemetry = Telemetry::new(stage.seams.clock.clone(), "1.2.3", "abc");
    let mut runner = stage.runner(policies);
    runner.client = runner.client.with_observer(Arc::new(telemetry.clone()));
    let views: Vec<PolicyView<'_>> =
        runner.policies.iter().map(|policy| view(policy, LastRuns::default())).collect();
    telemetry.configure(&views, &vault());
    (telemetry, runner)
}

async fn run(telemetry: &Telemetry, runner: &Runner) -> RunReport {
    let policy = &runner.policies[0];
    telemetry.run_begun(&policy.name, runner.clock.now());
    let report = runner.run(policy, &RunOptions::default()).await.unwrap();
    telemetry.run_ended(&report);
    report
}

/// The values of the series whose text begins so.
fn values(text: &str, series: &str) -> Vec<f64> {
    let of =
        |line: &str| line.strip_prefix(&format!("snapwarden_{series} ")).map(|value| value.parse().unwrap());
    text.lines().filter_map(of).collect()
}

fn value(telemetry: &Telemetry, series: &str) -> Option<f64> {
    let values = values(&telemetry.metrics_text(), series);
    assert!(values.len() < 2, "{series}: {values:?}");
    values.first().copied()
}

/// The value of a counter, which is there.
fn count(telemetry: &Telemetry, series: &str) -> usize {
    let text = telemetry.metrics_text();
    let found = text.lines().find_map(|line| line.strip_prefix(&format!("snapwarden_{series} ")));
    found.unwrap_or_else(|| panic!("{series} is missing: {text}")).parse().unwrap()
}

fn tally(name: &str) -> InstanceCounts {
    InstanceCounts {
        id: "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec".parse::<InstanceId>().unwrap(),
        name: name.to_owned(),
        good: 3,
        failed: 1,
        in_flight: 0,
        other: 0,
        newest_at: Some(at(NOW)),
        oldest_at: Some(at("2026-10-01T00:00:00.5Z")),
        newest_consistent_at: Some(at("2026-10-01T00:00:00.5Z")),
        newest_verified_at: BTreeMap::from([("vault".parse().unwrap(), at(NOW))]),
        uncopied_since: BTreeMap::new(),
        is_listed: true,
        is_exempt: false,
        created_at: None,
        vanished_at: None,
    }
}

/// What a state directory would remember of a run that went well, but for one that is held.
fn remembered(zone: &ZoneName, name: &str) -> LastRuns {
    let memory = ZoneMemory {
        last_run_at: Some(at(NOW)),
        last_success_at: Some(at("2026-10-31T12:00:00Z")),
        held: Some("too many".to_owned()),
        plan: Some(PlanSums {
            keep: 5,
            delete: 7,
            blocked_by_hold: 2,
            blocked_by_guard: 7,
            ..PlanSums::default()
        }),
        instances: vec![tally(name)],
        ..ZoneMemory::default()
    };
    let last = LastRun {
        run_id: "0198c0de-0000-7000-8000-000000000001".parse().unwrap(),
        started_at: at("2026-11-01T11:59:00Z"),
        finished_at: at(NOW),
        result: "held".to_owned(),
    };
    LastRuns { last: Some(last), zones: BTreeMap::from([(zone.clone(), memory)]) }
}

/// A telemetry into which something of every kind was folded.
async fn all_folded() -> Telemetry {
    let (stage, _) = Stage::two_by_twenty();
    let unavailable = Effect::status(503, "later");
    stage.world.fault(Fault::on(Call::ListInstances, unavailable).times(1));
    stage.world.set_quota("snapshot", 100);
    let (telemetry, runner) = observed(&stage, NIGHTLY);
    telemetry.reloaded(Ok(()), stage.now());
    telemetry.tick(stage.now());
    telemetry.next_run(&nightly(), Some(stage.now() + SignedDuration::from_hours(14)));
    for _ in 0..2 {
        let mut report = run(&telemetry, &runner).await;
        report.zones[0].instances = vec![tally("web-1")];
        telemetry.run_ended(&report);
    }
    for (name, archive) in &runner.archives {
        telemetry.archive(name, ArchiveStats::read(archive).await);
    }
    telemetry
}

#[tokio::test(start_paused = true)]
async fn every_metric_of_the_contract_is_there_with_help_and_type() {
    let text = all_folded().await.metrics_text();
    let helped: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# HELP snapwarden_")?.split(' ').next()).collect();
    let missing: Vec<&&str> = METRICS.iter().filter(|name| !helped.contains(**name)).collect();
    assert!(missing.is_empty(), "{missing:?}\n{text}");
    // So are those that the alert rules and the dashboard read.
    let rules = include_str!("../../config/prometheus/snapwarden.rules.yml");
    let dashboard = include_str!("../../config/prometheus/dashboard.json");
    let both = format!("{rules}{dashboard}");
    let of_rules = both.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    let of_rules: BTreeSet<&str> =
        of_rules.filter_map(|word| word.strip_prefix("snapwarden_")?.split("_bucket").next()).collect();
    // Absent while the gate keeps nothing, and without a notifier.
    let absent = ["export_gate_oldest_timestamp_seconds", "notifications_total"];
    let missing: Vec<&&str> =
        of_rules.iter().filter(|name| !helped.contains(**name) && !absent.contains(name)).collect();
    assert!(of_rules.len() > 25 && missing.is_empty(), "{missing:?}");
    assert!(text.contains("\nprocess_resident_memory_bytes "), "{text}");
}

#[tokio::test(start_paused = true)]
async fn promtool_has_nothing_to_say() {
    let text = all_folded().await.metrics_text();
    let child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        crate::stage::skipped(format_args!("promtool is not installed, so it judged no metric here"));
        return;
    };
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let said = child.wait_with_output().unwrap();
    let [out, err] = [said.stdout, said.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(said.status.success() && out.is_empty() && err.is_empty(), "{out}{err}");
}

#[tokio::test(start_paused = true)]
async fn a_run_is_told_by_counters_that_begin_at_zero() {
    let (stage, ids) = Stage::two_by_twenty();
    stage.world.set_quota("snapshot", 100);
    let (telemetry, runner) = observed(&stage, NIGHTLY);
    let counted = |telemetry: &Telemetry| {
        [
            "policy_runs_total{policy=\"nightly\",result=\"success\"}",
            "policy_runs_total{policy=\"nightly\",result=\"failed\"}",
            "exports_total{policy=\"nightly\",result=\"done\"}",
            "promotes_total{policy=\"nightly\",result=\"done\"}",
            "snapshot_deletes_total{policy=\"nightly\",result=\"done\"}",
            "snapshot_creates_total{policy=\"nightly\",result=\"done\"}",
            "policy_run_duration_seconds_count{policy=\"nightly\"}",
            "export_duration_seconds_count{policy=\"nightly\"}",
        ]
        .map(|series| count(telemetry, series))
    };
    assert_eq!(counted(&telemetry), [0; 8]);
    assert_eq!(
        value(&telemetry, "policy_last_success_timestamp_seconds{policy=\"nightly\",zone=\"ch-gva-2\"}"),
        None
    );

    let report = run(&telemetry, &runner).await;
    assert_eq!(report.sums().failed, 0, "{report:?}");
    let deleted = ids.iter().map(Vec::len).sum::<usize>() - stage.there().len();
    assert_eq!(deleted, 20);
    assert_eq!(counted(&telemetry), [1, 0, 2, 2, 20, 0, 1, 2]);
    // They are done, not to come.
    assert_eq!(value(&telemetry, "planned_deletes{policy=\"nightly\",zone=\"ch-gva-2\"}"), Some(0.0));
    let success = "policy_last_success_timestamp_seconds{policy=\"nightly\",zone=\"ch-gva-2\"}";
    assert_eq!(
        value(&telemetry, success),
        Some(report.finished_at.duration_since(Timestamp::UNIX_EPOCH).as_secs_f64())
    );
    let listings = "api_requests_total{code=\"200\",operation=\"list-snapshots\",zone=\"ch-gva-2\"}";
    assert_eq!(value(&telemetry, listings), Some(2.0));
    assert_eq!(value(&telemetry, "quota_limit{resource=\"snapshot\"}"), Some(100.0));
    // What came in is what lies in the archive.
    let images = files(&stage.archive());
    let bytes: usize = images
        .iter()
        .filter(|(path, _)| path.extension().is_some_and(|end| end == "qcow2"))
        .map(|(_, bytes)| bytes.len())
        .sum();
    assert_eq!(count(&telemetry, "export_bytes_total{policy=\"nightly\"}"), bytes);
}

#[tokio::test(start_paused = true)]
async fn answers_lost_answers_and_repetitions_are_counted_apart() {
    let stage = Stage::new();
    stage.world.fault(Fault::on(Call::ListInstances, Effect::status(503, "later")).times(2));
    stage.world.fault(Fault::on(Call::ListSnapshots, Effect::CutAfter).times(1));
    stage.world.fault(Fault::on(Call::ListSnapshots, Effect::DateSkew(SignedDuration::from_secs(-90))));
    let (telemetry, runner) = observed(&stage, NIGHTLY);
    run(&telemetry, &runner).await;
    for (series, expected) in [
        ("api_requests_total{code=\"503\",operation=\"list-instances\",zone=\"ch-gva-2\"}", 2),
        ("api_requests_total{code=\"none\",operation=\"list-snapshots\",zone=\"ch-gva-2\"}", 1),
        ("api_retries_total{operation=\"list-instances\",reason=\"server\"}", 2),
        ("api_retries_total{operation=\"list-snapshots\",reason=\"transport\"}", 1),
        // Two each, and those that failed.
        ("api_request_duration_seconds_count{operation=\"list-instances\"}", 4),
        ("api_request_duration_seconds_count{operation=\"list-snapshots\"}", 3),
    ] {
        assert_eq!(count(&telemetry, series), expected, "{series}");
    }
    let ahead = value(&telemetry, "clock_skew_seconds{zone=\"ch-gva-2\"}").unwrap();
    assert!((90.0..91.0).contains(&ahead), "{ahead}");
}

#[tokio::test(start_paused = true)]
async fn a_download_that_breaks_and_one_that_lies_are_counted() {
    let stage = Stage::new();
    stage.instance("web-1", 1);
    stage.world.fault(Fault::on(Call::GetImage, Effect::CutBody(1000)).times(1));
    let (telemetry, runner) = observed(&stage, NIGHTLY);
    let report = run(&telemetry, &runner).await;
    let transfer = report.zones[0].steps[0].transfer.unwrap();
    assert_eq!((transfer.resumes, transfer.checksum_mismatches), (1, 0), "{report:?}");
    assert_eq!(value(&telemetry, "export_resumes_total{policy=\"nightly\"}"), Some(1.0));

    let stage = Stage::new();
    stage.instance("web-1", 1);
    stage.world.fault(Fault::on(Call::GetImage, Effect::Corrupt(5)));
    let (telemetry, runner) = observed(&stage, NIGHTLY);
    run(&telemetry, &runner).await;
    assert_eq!(value(&telemetry, "export_checksum_mismatches_total{policy=\"nightly\"}"), Some(2.0));
    assert_eq!(value(&telemetry, "exports_total{policy=\"nightly\",result=\"failed\"}"), Some(1.0));
    assert_eq!(value(&telemetry, "export_duration_seconds_count{policy=\"nightly\"}"), Some(0.0));
}

#[tokio::test(start_paused = true)]
async fn deletions_that_the_second_look_at_an_archive_keeps_are_counted_as_those_of_the_plan() {
    let stage = Stage::new();
    stage.instance("web-1", 20);
    stage.world.set_operations_take(Duration::from_mins(1));
    let (telemetry, runner) = observed(&stage, NIGHTLY);
    let vanishes = async {
        while !stage.world.changes().iter().any(|change| change.call == Call::DeleteSnapshot) {
            stage.clock.sleep(Duration::from_secs(1)).await;
        }
        RealDisk.rename(&stage.archive(), &stage.folder.path().join("away")).unwrap();
    };
    let (report, ()) = tokio::join!(run(&telemetry, &runner), vanishes);
    let kept = u32::try_from(stage.there().len() - 10).unwrap();
    assert!(kept > 0, "{report:?}");
    let to_come = value(&telemetry, "planned_deletes{policy=\"nightly\",zone=\"ch-gva-2\"}");
    assert_eq!(to_come, Some(f64::from(kept)), "{report:?}");
    for (reason, expected) in [("archive", kept), ("busy", 0)] {
        let series = format!("blocked_deletes{{policy=\"nightly\",reason=\"{reason}\",zone=\"ch-gva-2\"}}");
        assert_eq!(value(&telemetry, &series), Some(f64::from(expected)), "{report:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_restart_the_last_runs_are_there_before_any_run() {
    let stage = Stage::new();
    let runner = stage.runner(NIGHTLY);
    let telemetry = Telemetry::new(stage.seams.clock.clone(), "1.2.3", "");
    let policy = &runner.policies[0];
    telemetry.configure(&[view(policy, remembered(&stage.zone, "web-1"))], &vault());
    let of_zone = "policy=\"nightly\",zone=\"ch-gva-2\"";
    let zoned = [
        (format!("policy_last_run_timestamp_seconds{{{of_zone}}}"), 1_793_534_400.0),
        (format!("policy_last_success_timestamp_seconds{{{of_zone}}}"), 1_793_448_000.0),
        (format!("policy_held{{{of_zone}}}"), 1.0),
        (format!("policy_unmatched{{{of_zone}}}"), 0.0),
        (format!("planned_deletes{{{of_zone}}}"), 7.0),
    ];
    for (series, expected) in zoned {
        assert_eq!(value(&telemetry, &series), Some(expected), "{series}");
    }
    for (reason, expected) in [("hold", 2.0), ("policy", 0.0), ("export", 0.0), ("busy", 0.0), ("guard", 7.0)]
    {
        let series = format!("blocked_deletes{{policy=\"nightly\",reason=\"{reason}\",zone=\"ch-gva-2\"}}");
        assert_eq!(value(&telemetry, &series), Some(expected), "{reason}");
    }
    let oldest = "snapshot_oldest_timestamp_seconds{instance_id=\"9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec\",\
                  instance_name=\"web-1\",policy=\"nightly\",zone=\"ch-gva-2\"}";
    assert_eq!(value(&telemetry, oldest), Some(1_790_812_800.5));
    assert_eq!(value(&telemetry, &oldest.replace("oldest", "newest_consistent")), Some(1_790_812_800.5));
    let last = telemetry.status_json().policies["nightly"].last.clone().unwrap();
    assert_eq!((last.result.as_str(), last.finished_at), ("held", at(NOW)));
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_goes_takes_all_its_series_with_it_and_the_others_go_on() {
    let stage = Stage::new();
    stage.instance("web-1", 1);
    let both = format!(
        "{NIGHTLY}[policies.gone]\nzones = [\"de-fra-1\"]\n[policies.gone.retention]\nmax_count = 1\n"
    );
    stage.world.add_zone("de-fra-1");
    let (telemetry, runner) = observed(&stage, &both);
    let [nightly, gone] = &runner.policies[..] else { panic!() };
    let frankfurt = &gone.zones[0];
    telemetry.configure(
        &[view(nightly, LastRuns::default()), view(gone, remembered(frankfurt, "db-1"))],
        &vault(),
    );
    let mut last = runner.run(gone, &RunOptions::default()).await.unwrap();
    last.zones[0].instances = vec![tally("db-1")];
    telemetry.run_ended(&last);
    run(&telemetry, &runner).await;
    let before = telemetry.metrics_text();
    for word in ["\"gone\"", "\"de-fra-1\"", "\"db-1\""] {
        assert!(before.contains(word), "{word}: {before}");
    }

    telemetry.configure(&[view(nightly, LastRuns::default())], &vault());
    // A run that outlives its policy, and whatever else comes late.
    telemetry.run_begun(&gone.name, stage.now());
    telemetry.skipped(&gone.name, 1);
    telemetry.run_ended(&last);
    telemetry.run_panicked_or_refused(&gone.name, stage.now());
    telemetry.clock_skew(frankfurt, 1.0);
    telemetry.answered(frankfurt, "list-snapshots", None, Duration::ZERO);
    let after = telemetry.metrics_text();
    for word in ["\"gone\"", "\"de-fra-1\"", "\"db-1\""] {
        assert!(!after.contains(word), "{word}: {after}");
    }
    assert_eq!(value(&telemetry, "policy_runs_total{policy=\"nightly\",result=\"success\"}"), Some(1.0));
    assert_eq!(value(&telemetry, "policy_run_duration_seconds_count{policy=\"nightly\"}"), Some(1.0));
}

#[tokio::test(start_paused = true)]
async fn hostile_names_are_escaped_and_cut() {
    let stage = Stage::new();
    let runner = stage.runner(NIGHTLY);
    let folded = |name: &str| {
        let runs = remembered(&stage.zone, name);
        let fresh = Telemetry::new(stage.seams.clock.clone(), "1.2.3", "");
        fresh.configure(&[view(&runner.policies[0], runs)], &vault());
        fresh.metrics_text()
    };
    let text = folded("a\"} 1\nup{x=\"\\ \u{1b}[31m\u{202e}");
    let expected = r#"instance_name="a\"} 1\\u{a}up{x=\"\\ \\u{1b}[31m\\u{202e}","#;
    assert!(text.contains(expected), "{text}");
    assert!(!text.lines().any(|line| line.starts_with("up{")), "{text}");
    let longest = folded(&"é".repeat(10_000));
    assert!(longest.lines().all(|line| line.chars().count() < 600), "{longest}");
    assert!(longest.contains(&format!("{}…\"", "é".repeat(255))), "{longest}");
}

#[tokio::test(start_paused = true)]
async fn what_happens_beside_runs_is_told() {
    let stage = Stage::new();
    let (telemetry, runner) = observed(&stage, NIGHTLY);
    telemetry.missed(&nightly(), 3);
    telemetry.skipped(&nightly(), 1);
    telemetry.run_begun(&nightly(), stage.now());
    assert_eq!(telemetry.status_json().policies["nightly"].running_since, Some(stage.now()));
    telemetry.run_panicked_or_refused(&nightly(), stage.now());
    telemetry.reloaded(Err("a line is wrong".to_owned()), stage.now());
    for (series, expected) in [
        ("policy_missed_runs_total{policy=\"nightly\"}", 3.0),
        ("policy_runs_total{policy=\"nightly\",result=\"skipped\"}", 1.0),
        ("policy_runs_total{policy=\"nightly\",result=\"failed\"}", 1.0),
        ("config_last_reload_successful", 0.0),
    ] {
        assert_eq!(value(&telemetry, series), Some(expected), "{series}");
    }
    // Until the first.
    assert_eq!(value(&telemetry, "config_last_reload_success_timestamp_seconds"), None);
    assert_eq!(value(&telemetry, "archive_images{archive=\"vault\"}"), None);
    let status = telemetry.status_json();
    assert_eq!(status.policies["nightly"].last.as_ref().map(|last| last.result.as_str()), Some("failed"));
    assert!(status.policies["nightly"].running_since.is_none() && !status.config.last_reload_successful);

    // A zone without a snapshot: the policy matches nothing there.
    run(&telemetry, &runner).await;
    assert_eq!(value(&telemetry, "policy_unmatched{policy=\"nightly\",zone=\"ch-gva-2\"}"), Some(1.0));
}

#[tokio::test(start_paused = true)]
async fn a_zone_that_failed_keeps_what_was_known_of_it() {
    let stage = Stage::new();
    let (telemetry, runner) = observed(&stage, NIGHTLY);
    telemetry.configure(&[view(&runner.policies[0], remembered(&stage.zone, "web-1"))], &vault());
    let refused = Effect::status(403, "no");
    stage.world.fault(Fault::on(Call::ListSnapshots, refused));
    stage.clock.step(SignedDuration::from_hours(1));
    run(&telemetry, &runner).await;
    let zone = &telemetry.status_json().policies["nightly"].zones["ch-gva-2"];
    assert_eq!(zone.last_success_at, Some(at("2026-10-31T12:00:00Z")));
    assert!(zone.last_run_at > Some(at(NOW)) && zone.held.is_none());
    assert!(zone.failure.as_ref().is_some_and(|failure| failure.contains("list-snapshots")), "{zone:?}");
    assert!(telemetry.metrics_text().contains("instance_name=\"web-1\""));
}

#[tokio::test(start_paused = true)]
async fn a_run_is_told_as_it_is_remembered_however_it_ended() {
    let stopped = RunOptions::default();
    stopped.stop.cancel();
    let no_bytes = Fault::on(Call::GetImage, Effect::status(403, "no"));
    let no_list = Fault::on(Call::ListSnapshots, Effect::status(403, "no"));
    let cases = [
        (None, RunOptions::default(), None),
        (Some(no_bytes), RunOptions::default(), Some("not exported: snapshot")),
        (Some(no_list), RunOptions::default(), Some("list-snapshots")),
        (None, stopped, Some("is stopping")),
    ];
    for (fault, options, failure) in cases {
        let (stage, _) = Stage::two_by_twenty();
        if let Some(fault) = fault {
            stage.world.fault(fault);
        }
        let (telemetry, runner) = observed(&stage, NIGHTLY);
        telemetry.run_ended(&runner.run(&runner.policies[0], &options).await.unwrap());
        let remembered = runner.state.last_runs(&nightly()).await.unwrap().zones.remove(&stage.zone).unwrap();
        let told = telemetry.status_json().policies["nightly"].zones["ch-gva-2"].clone();
        assert_eq!(told.failure, remembered.failure);
        assert_eq!(told.last_success_at, remembered.last_success_at);
        assert_eq!(told.last_success_at.is_some(), failure.is_none(), "{told:?}");
        let said = told.failure.as_deref().unwrap_or_default();
        assert!(failure.is_none_or(|word| said.contains(word)), "{failure:?}: {said}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_should_have_snapshots_and_has_none_is_seen() {
    let stage = Stage::new();
    stage.instance("web-1", 0);
    stage.world.fault(Fault::on(Call::CreateSnapshot, Effect::status(403, "no")));
    for (create, unmatched) in [("true", 0.0), ("false", 1.0)] {
        let policy = format!("[policies.nightly]\nzones = [\"ch-gva-2\"]\ncreate = {create}\n");
        let (telemetry, runner) = observed(&stage, &policy);
        run(&telemetry, &runner).await;
        let series = "policy_unmatched{policy=\"nightly\",zone=\"ch-gva-2\"}";
        assert_eq!(value(&telemetry, series), Some(unmatched), "{create}");
        let text = telemetry.metrics_text();
        let good = text.lines().find(|line| line.contains("web-1") && line.contains("state=\"good\""));
        assert!(good.is_some_and(|line| line.ends_with(" 0")), "{create}: {good:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn instances_are_counted_by_what_they_have_and_by_who_covers_them() {
    let stage = Stage::new();
    for (name, age) in
        [("web-1", 31), ("web-2", 31), ("web-3", 31), ("web-4", 1), ("web-5", 31), ("db-1", 31), ("ci-1", 31)]
    {
        let id = stage.world.add_instance(&stage.zone, name, &[]);
        stage.world.set_instance_created(id, days_ago(age));
        match name {
            "web-1" | "web-5" => drop(stage.days(id, [0].into_iter())),
            "web-2" => drop(stage.days(id, [30].into_iter())),
            _ => {}
        }
    }
    let policies = "[policies.nightly]\nzones = [\"ch-gva-2\"]\nschedule = \"@daily\"\n\
                    [policies.nightly.select]\ninstances = [\"web-*\"]\n\
                    [policies.nightly.guard]\nexpect_newest = \"2d\"\n\
                    [policies.nightly.export]\narchives = [\"vault\"]\n[coverage]\nexempt = [\"ci-*\"]\n";
    let (telemetry, runner) = observed(&stage, policies);
    let of = |telemetry: &Telemetry| {
        let policy = ["fresh", "stale", "none", "vanished"].map(|state| {
            let series =
                format!("policy_instances{{policy=\"nightly\",state=\"{state}\",zone=\"ch-gva-2\"}}");
            count(telemetry, &series)
        });
        let zone = ["covered", "uncovered", "exempt"]
            .map(|state| count(telemetry, &format!("instances{{state=\"{state}\",zone=\"ch-gva-2\"}}")));
        let result = count(telemetry, "policy_last_run_result{policy=\"nightly\",zone=\"ch-gva-2\"}");
        (policy, zone, result)
    };
    // From the start.
    assert_eq!(of(&telemetry), ([0; 4], [0; 3], 0));
    run(&telemetry, &runner).await;
    assert_eq!(of(&telemetry), ([3, 1, 1, 0], [5, 1, 1], 1));
    let status = telemetry.status_json();
    let zone = &status.policies["nightly"].zones["ch-gva-2"];
    assert_eq!(zone.problems.len(), 2, "{zone:?}");
    assert!(zone.problems[0].ends_with("no good snapshot: web-3"), "{zone:?}");
    assert!(zone.problems[1].contains("web-2 (2026-10-02T12:00:00Z)"), "{zone:?}");
    assert_eq!(status.zones["ch-gva-2"].uncovered_instances, ["db-1"]);

    // They grow stale without a run, too; and a restart knows it all.
    stage.step(SignedDuration::from_hours(49));
    assert_eq!(of(&telemetry), ([0, 3, 2, 0], [5, 1, 1], 1));
    let all = stage.world.snapshots(&stage.zone);
    let web = all.last().and_then(|snapshot| snapshot.instance_id).unwrap();
    stage.world.remove_instance(web);
    run(&telemetry, &runner).await;
    assert_eq!(of(&telemetry), ([0, 2, 2, 1], [4, 1, 1], 1));
    let (again, _) = observed(&stage, policies);
    let remembered = runner.state.last_runs(&nightly()).await.unwrap();
    again.configure(&[view(&runner.policies[0], remembered)], &vault());
    assert_eq!(of(&again), of(&telemetry));
    again.run_panicked_or_refused(&nightly(), stage.now());
    assert_eq!(of(&again).2, 2);
    again.allowance(&nightly(), 40);
    assert_eq!(count(&again, "guard_allowance{policy=\"nightly\"}"), 40);

    // A policy that is not enabled raises no alert.
    let paused = stage.runner(&policies.replace("zones =", "enabled = false\nzones ="));
    let remembered = runner.state.last_runs(&nightly()).await.unwrap();
    again.configure(&[view(&paused.policies[0], remembered)], &vault());
    assert_eq!(of(&again).0, [0; 4]);
    assert_eq!(again.status_json().policies["nightly"].zones["ch-gva-2"].problems, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn an_archive_adds_up_to_its_images_and_to_what_is_wrong_with_it() {
    let (stage, _) = Stage::two_by_twenty();
    let (_, runner) = observed(&stage, NIGHTLY);
    let archive = runner.archives.values().next().unwrap();
    let empty = ArchiveStats::read(archive).await;
    assert_eq!((empty.images, empty.corrupt, empty.error), (0, 0, None));
    assert!(empty.free_bytes.is_some_and(|free| free > 0), "of the folder above");

    runner.run(&runner.policies[0], &RunOptions::default()).await.unwrap();
    let facts = ArchiveStats::read(archive).await;
    assert!(facts.images == 2 && facts.corrupt == 0 && facts.bytes > 2 << 20, "{facts:?}");
    let (image, bytes) = files(&stage.archive())
        .into_iter()
        .find(|(path, _)| path.extension().is_some_and(|end| end == "qcow2"))
        .unwrap();
    replace_file(&RealDisk, &image, &bytes[1..], Access::Group).unwrap();
    let cut = ArchiveStats::read(archive).await;
    assert_eq!((cut.images, cut.corrupt), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn the_loop_is_alive_for_a_minute_after_each_turn_and_ready_until_it_drains() {
    let stage = Stage::new();
    let telemetry = Telemetry::new(stage.seams.clock.clone(), "1.2.3", "");
    assert!(telemetry.ready().is_err(), "nothing is read yet");
    let runner = stage.runner(NIGHTLY);
    telemetry.configure(&[view(&runner.policies[0], LastRuns::default())], &vault());
    assert_eq!(telemetry.ready(), Ok(()));
    tokio::time::advance(Duration::from_mins(1)).await;
    telemetry.tick(stage.now());
    // The wall clock has no say.
    stage.clock.step(SignedDuration::from_hours(-5));
    tokio::time::advance(Duration::from_mins(1)).await;
    assert_eq!(telemetry.alive(), Ok(()));
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(telemetry.alive(), Err("the scheduler's loop has stalled for 61 s".to_owned()));
    telemetry.draining();
    assert!(telemetry.ready().unwrap_err().contains("stopping"));
}
