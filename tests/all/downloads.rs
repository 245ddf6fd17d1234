//! Exports by a whole run, from a store that misbehaves: which bytes travel, and what becomes of the copies.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::{Either, select};
use http::header;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use snapwarden::clock::{Clock as _, timeout};
use snapwarden::run::context::{RunOptions, Runner};
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::image::DiskShape;
use snapwarden::snapshot::SnapshotId;
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::last_runs::LastRuns;
use snapwarden::telemetry::Telemetry;
use snapwarden::telemetry::model::PolicyView;

use crate::stage::{Stage, steps};

const EXPORT: &str = r#"
[policies.p]
zones = ["ch-gva-2"]
[policies.p.export]
archives = ["vault"]
"#;

/// A zone with one snapshot of this many MiB, and the length of its image.
fn one(mib: u64) -> (Stage, SnapshotId, u64) {
    let stage = Stage::new();
    let id = big(&stage, "big-1", mib);
    let bytes = stage.world.image(id).file_bytes();
    (stage, id, bytes)
}

fn big(stage: &Stage, name: &str, mib: u64) -> SnapshotId {
    let instance = stage.world.add_instance(&stage.zone, name, &[]);
    stage.world.set_disk(instance, DiskShape::with_data_mib(mib));
    stage.days(instance, 0..1)[0]
}

/// What the store sent of images.
fn sent(stage: &Stage) -> u64 {
    let log = stage.world.log();
    log.iter().filter(|exchange| exchange.call == Call::GetImage).map(|exchange| exchange.body_bytes()).sum()
}

fn asked(stage: &Stage, call: Call) -> usize {
    stage.world.log().iter().filter(|exchange| exchange.call == call).count()
}

fn told(report: &RunReport) -> String {
    let steps = steps(report, Action::Export);
    steps.iter().filter_map(|step| step.message.clone()).collect::<Vec<_>>().join("\n")
}

async fn run_well(stage: &Stage, policies: &str, what: &str) -> RunReport {
    let report = stage.run(policies).await;
    assert_eq!(report.result, RunResult::Success, "{what}: {}", told(&report));
    report
}

#[tokio::test(start_paused = true)]
async fn over_an_address_that_expires_halfway_next_to_nothing_comes_twice() {
    let (stage, id, bytes) = one(64);
    stage.world.fault(Fault::on(Call::GetImage, Effect::Expire(bytes / 2)).times(1));
    run_well(&stage, EXPORT, "expired").await;
    assert_eq!(asked(&stage, Call::ExportSnapshot), 2, "a new address was asked for");
    assert!(asked(&stage, Call::GetImage) >= 3, "broken off, refused, resumed");
    let sent = sent(&stage);
    assert!(sent * 100 <= bytes * 102, "{sent} bytes of {bytes}");
    let catalogue = stage.runner(EXPORT).archives[&"vault".parse().unwrap()].catalogue().await.unwrap();
    assert_eq!(catalogue.copies()[0].manifest.image.md5.to_string(), stage.world.image(id).md5());
}

#[tokio::test(start_paused = true)]
async fn what_a_failed_run_left_is_taken_up_by_the_next() {
    let (stage, _, bytes) = one(32);
    stage.world.fault(Fault::on(Call::GetImage, Effect::CutBody(bytes / 2)).times(1));
    stage.world.fault(Fault::on(Call::GetImage, Effect::status(503, "no")).after(1).times(9));
    let report = stage.run(EXPORT).await;
    assert_ne!(report.result, RunResult::Success);
    assert!(told(&report).contains("give up at byte"), "{}", told(&report));
    stage.world.clear_faults();
    run_well(&stage, EXPORT, "resumed").await;
    let sent = sent(&stage);
    assert!(sent * 100 <= bytes * 102, "{sent} bytes of {bytes}");
}

#[tokio::test(start_paused = true)]
async fn two_archives_are_fed_by_one_download_and_each_has_its_step() {
    let (stage, _, bytes) = one(8);
    let second = stage.folder.path().join("second");
    let policies = format!("[archives.second]\ntype = \"local\"\npath = {second:?}\n{EXPORT}")
        .replace("[\"vault\"]", "[\"vault\", \"second\"]");
    let report = run_well(&stage, &policies, "two").await;
    let steps = steps(&report, Action::Export);
    assert_eq!(steps.len(), 2);
    assert!(steps.iter().all(|step| step.outcome == StepOutcome::Done));
    let transfers: u64 = steps.iter().filter_map(|step| step.transfer).map(|transfer| transfer.bytes).sum();
    assert_eq!(transfers, bytes, "one download is counted once");
    assert_eq!((asked(&stage, Call::ExportSnapshot), asked(&stage, Call::GetImage)), (1, 1));
    assert_eq!(sent(&stage), bytes);
    let outcomes: Vec<String> = stage.audit().iter().map(|line| line["outcome"].to_string()).collect();
    assert_eq!(outcomes, ["\"intended\"", "\"intended\"", "\"done\"", "\"done\""]);
    for (_, archive) in stage.runner(&policies).archives {
        assert_eq!(archive.catalogue().await.unwrap().copies().len(), 1, "{}", archive.name());
    }
}

#[tokio::test(start_paused = true)]
async fn several_connections_bring_the_image_once() {
    let (stage, _, bytes) = one(64);
    let policies = format!("{EXPORT}connections = 4\n");
    run_well(&stage, &policies, "several").await;
    assert!(asked(&stage, Call::GetImage) > 4);
    assert_eq!(sent(&stage), bytes);

    // A store that allows a single one.
    let (stage, _, bytes) = one(64);
    stage.world.fault(Fault::on(Call::GetImage, Effect::status(429, "slow down")).after(2).times(3));
    run_well(&stage, &policies, "refused").await;
    assert!(sent(&stage) * 100 <= bytes * 102);

    // One that knows no ranges.
    let (stage, ..) = one(16);
    stage.world.fault(Fault::on(Call::GetImage, Effect::IgnoreRange));
    run_well(&stage, &policies, "ignored").await;
    assert_eq!(asked(&stage, Call::GetImage), 1);
}

#[tokio::test(start_paused = true)]
async fn a_range_that_is_ignored_at_any_request_makes_no_wrong_file() {
    let policies = format!("{EXPORT}connections = 4\n");
    for number in 0..9 {
        let (stage, ..) = one(64);
        stage.world.fault(Fault::on(Call::GetImage, Effect::IgnoreRange).after(number).times(1));
        run_well(&stage, &policies, "ignored once").await;
        let files = crate::stage::files(&stage.archive());
        let bad = files.iter().any(|(path, _)| path.to_string_lossy().ends_with(".bad"));
        assert_eq!((bad, asked(&stage, Call::ExportSnapshot)), (false, 1), "request {number}");
    }
}

#[tokio::test(start_paused = true)]
async fn another_etag_after_a_renewed_address_or_a_restart_costs_nothing() {
    for connections in [1, 4] {
        let policies = format!("{EXPORT}connections = {connections}\n");
        let (stage, _, bytes) = one(64);
        stage.world.fault(Fault::on(Call::GetImage, Effect::Expire(bytes / 16)).times(1));
        stage.world.fault(Fault::on(Call::GetImage, Effect::Etag("\"renewed\"")).after(2));
        run_well(&stage, &policies, "renewed").await;
        assert!(asked(&stage, Call::ExportSnapshot) == 2 || connections > 1, "a new address was asked for");
        assert!(sent(&stage) * 100 <= bytes * 102, "{} of {bytes}", sent(&stage));

        let (stage, _, bytes) = one(32);
        stage.world.fault(Fault::on(Call::GetImage, Effect::CutBody(bytes / 8)).times(1));
        stage.world.fault(Fault::on(Call::GetImage, Effect::status(503, "no")).after(1).times(30));
        assert_ne!(stage.run(&policies).await.result, RunResult::Success);
        stage.world.clear_faults();
        stage.world.fault(Fault::on(Call::GetImage, Effect::Etag("\"restarted\"")));
        run_well(&stage, &policies, "restarted").await;
        assert!(sent(&stage) * 100 <= bytes * 102, "{} of {bytes}", sent(&stage));
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_misbehaves_once_is_survived() {
    let cases: Vec<(&str, Effect)> = vec![
        ("a page with status 200", Effect::html()),
        ("a length that is too small", Effect::header(header::CONTENT_LENGTH, "1000")),
        ("a length that is too large", Effect::header(header::CONTENT_LENGTH, "99999999")),
        ("no length", Effect::Header(header::CONTENT_LENGTH, None)),
        ("too many bytes", Effect::Pad(100_000)),
        ("bytes that are others", Effect::Corrupt(300_000)),
        ("another magic number", Effect::Corrupt(0)),
        ("another ETag", Effect::Etag("\"other\"")),
        ("a stall", Effect::Stall(300_000)),
    ];
    for (what, effect) in cases {
        let (stage, id, _) = one(4);
        stage.world.fault(Fault::on(Call::GetImage, effect).times(1));
        run_well(&stage, EXPORT, what).await;
        let catalogue = stage.runner(EXPORT).archives[&"vault".parse().unwrap()].catalogue().await.unwrap();
        assert_eq!(
            catalogue.copies()[0].manifest.image.md5.to_string(),
            stage.world.image(id).md5(),
            "{what}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn pages_instead_of_images_leave_nothing_and_are_told() {
    let (stage, ..) = one(4);
    stage.world.fault(Fault::on(Call::GetImage, Effect::html()));
    let report = stage.run(EXPORT).await;
    assert!(told(&report).contains("web page"), "{}", told(&report));
    let images = crate::stage::files(&stage.archive()).into_iter().map(|(path, _)| path);
    let is_of_archive = |path: &std::path::Path| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with("snapwarden-") || name.strip_suffix(".lock").is_some()
    };
    let images: Vec<_> = images.filter(|path| !is_of_archive(path)).collect();
    assert!(images.is_empty(), "{images:?}");
}

#[tokio::test(start_paused = true)]
async fn redirects_lead_to_tls_or_to_the_same_host_alone() {
    for (to, told_of) in [
        ("http://elsewhere.example/x", Some("another host without TLS")),
        ("ftp://elsewhere.example/x", Some("another host without TLS")),
        ("", Some("in a ring")),
    ] {
        let (stage, ..) = one(1);
        let found = Effect::Answer {
            status: http::StatusCode::FOUND,
            content_type: "text/plain",
            body: String::new(),
        };
        stage.world.fault(Fault::on(Call::GetImage, found));
        stage.world.fault(Fault::on(Call::GetImage, Effect::header(header::LOCATION, to)));
        let report = stage.run(EXPORT).await;
        assert_ne!(report.result, RunResult::Success);
        let told = told(&report);
        assert!(told_of.is_none_or(|of| told.contains(of)), "{to}: {told}");
        assert!(!told.contains("X-Amz-Signature"), "{told}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_bandwidth_limit_holds_over_all_downloads_of_a_policy() {
    let (stage, _, mut bytes) = one(30);
    for name in ["big-2", "big-3"] {
        bytes += stage.world.image(big(&stage, name, 30)).file_bytes();
    }
    let before = stage.clock.elapsed();
    run_well(&stage, &format!("{EXPORT}concurrency = 3\nbandwidth_limit = \"1MiB\"\n"), "limited").await;
    let took = stage.clock.elapsed().saturating_sub(before);
    let least = Duration::from_secs(bytes >> 20);
    assert!(took >= least && took < least + Duration::from_secs(30), "{took:?} for {bytes} bytes");
}

/// A runner whose downloads a daemon's telemetry shows, and a limit under which one of 30 MiB takes half a minute.
fn told_of(stage: &Stage) -> (Telemetry, Runner) {
    let telemetry = Telemetry::new(stage.seams.clock.clone(), "1.2.3", "");
    let mut runner = stage.runner(&format!("{EXPORT}bandwidth_limit = \"1MiB\"\n"));
    runner.downloads = telemetry.downloads();
    let views: Vec<PolicyView<'_>> = runner
        .policies
        .iter()
        .map(|policy| PolicyView {
            policy,
            first_seen_at: stage.now(),
            remembered: LastRuns::default(),
            expected_interval: None,
        })
        .collect();
    telemetry.configure(&views, &runner.archives.keys().cloned().collect());
    (telemetry, runner)
}

/// The number of downloads in the metrics, and their bytes.
fn in_progress(telemetry: &Telemetry) -> [Option<u64>; 2] {
    let text = telemetry.metrics_text();
    ["exports_in_progress", "export_progress_bytes"].map(|name| {
        let series = format!("snapwarden_{name}{{policy=\"p\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&*series)?.parse().ok())
    })
}

#[tokio::test(start_paused = true)]
async fn a_download_is_told_of_while_it_runs_and_not_after_it() {
    let (stage, snapshot, bytes) = one(30);
    let (telemetry, runner) = told_of(&stage);
    assert_eq!(in_progress(&telemetry), [Some(0), Some(0)], "at zero from the start");
    let started_at = stage.now();
    let options = RunOptions::default();
    let run = Box::pin(runner.run(&runner.policies[0], &options));
    let look = Box::pin(async {
        stage.clock.sleep(Duration::from_secs(20)).await;
        let json = serde_json::to_value(telemetry.status_json()).unwrap();
        (json["downloads"].clone(), in_progress(&telemetry))
    });
    let Either::Right(((downloads, metrics), run)) = select(run, look).await else {
        panic!("it took no time")
    };
    let [told] = &downloads.as_array().unwrap()[..] else { panic!("{downloads}") };
    let here = told["bytes"].as_u64().unwrap();
    assert!((15 << 20..25 << 20).contains(&here), "{told}");
    assert_eq!(metrics, [Some(1), Some(here)]);
    let rate = told["bytes_per_second"].as_u64().unwrap();
    assert!((900_000..1_200_000).contains(&rate), "{told}");
    let since: Timestamp = told["started_at"].as_str().unwrap().parse().unwrap();
    assert!(since >= started_at && since < started_at + SignedDuration::from_secs(19), "{told}");
    let name = stage.world.snapshots(&stage.zone)[0].name.clone();
    assert_eq!(
        (
            &told["policy"],
            &told["zone"],
            &told["snapshot_id"],
            &told["snapshot_name"],
            &told["instance_name"]
        ),
        (&json!("p"), &json!("ch-gva-2"), &json!(snapshot), &json!(name), &json!("big-1"))
    );
    assert_eq!(
        (&told["archives"], &told["total"], &told["state"]),
        (&json!(["vault"]), &json!(bytes), &json!("downloading"))
    );
    assert!(!telemetry.metrics_text().contains(&snapshot.to_string()), "an id is no label");

    let report = run.await.unwrap();
    assert_eq!(report.result, RunResult::Success);
    assert_eq!(in_progress(&telemetry), [Some(0), Some(0)]);
    assert!(telemetry.status_json().downloads.is_empty());
    telemetry.configure(&[], &BTreeSet::new());
    assert_eq!(in_progress(&telemetry), [None, None], "removed with its policy");
}

#[tokio::test(start_paused = true)]
async fn a_download_that_is_dropped_or_fails_is_not_told_of_any_more() {
    let (stage, ..) = one(30);
    let (telemetry, runner) = told_of(&stage);
    let options = RunOptions::default();
    let run = Box::pin(runner.run(&runner.policies[0], &options));
    let cut = timeout(&*stage.seams.clock, Duration::from_secs(20), run);
    let cut = cut.await.map(|report| report.unwrap().result);
    assert!(cut.is_err(), "{cut:?}");
    assert_eq!(in_progress(&telemetry), [Some(0), Some(0)]);

    stage.world.fault(Fault::on(Call::GetImage, Effect::status(403, "no")));
    let report = runner.run(&runner.policies[0], &options).await.unwrap();
    assert_ne!(report.result, RunResult::Success);
    assert_eq!(in_progress(&telemetry), [Some(0), Some(0)]);
}

#[tokio::test(start_paused = true)]
async fn what_an_earlier_download_left_does_not_count_as_having_come_in() {
    let (stage, _, bytes) = one(32);
    stage.world.fault(Fault::on(Call::GetImage, Effect::CutBody(bytes / 2)).times(1));
    stage.world.fault(Fault::on(Call::GetImage, Effect::status(503, "no")).after(1).times(9));
    assert_ne!(stage.run(EXPORT).await.result, RunResult::Success);
    stage.world.clear_faults();
    let report = run_well(&stage, EXPORT, "resumed").await;
    let transfer = steps(&report, Action::Export)[0].transfer.unwrap();
    assert_eq!(transfer.resumes, 1);
    assert!(transfer.bytes <= bytes - bytes / 2 + (1 << 20), "{transfer:?} of {bytes} bytes");
}
