//! `snapwarden status` against a port of its own, and against others.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use snapwarden::archive::stats::ArchiveStats;
use snapwarden::archive::transfer::progress::Progress;
use snapwarden::config;
use snapwarden::daemon::server;
use snapwarden::disk::{Access, RealDisk, replace_file};
use snapwarden::run::downloads::{HowFar, RunningDownload};
use snapwarden::sim::clock::SimClock;
use snapwarden::snapshot::InstanceId;
use snapwarden::state::last_runs::{InstanceCounts, LastRuns, PlanSums, ZoneCoverage, ZoneMemory};
use snapwarden::telemetry::Telemetry;
use snapwarden::telemetry::model::PolicyView;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::stage::{NIGHTLY, NOW, config_text};

/// How `status` ended with these arguments beside a configuration that listens there, and what it printed.
async fn status(address: SocketAddr, arguments: &[&str]) -> (i32, String, String) {
    status_in(address, arguments, "200").await
}

/// The same on a terminal of so many columns.
async fn status_in(address: SocketAddr, arguments: &[&str], columns: &str) -> (i32, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("snapwarden.toml");
    let text = format!("[server]\nlisten = \"{address}\"\n{}", config_text(folder.path(), NIGHTLY));
    replace_file(&RealDisk, &file, text.as_bytes(), Access::Owner).unwrap();
    let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_snapwarden"));
    command
        .env_clear()
        .env("COLUMNS", columns)
        .timeout(Duration::from_mins(1))
        .arg("--config")
        .arg(&file)
        .arg("status")
        .args(arguments);
    let ended = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let [out, err] = [ended.stdout, ended.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    (ended.status.code().unwrap(), out, err)
}

/// What is folded in before the question.
type Change<'a> = &'a dyn Fn(&Telemetry);

/// A port that tells of the policy `nightly` in this condition.
async fn daemon(memory: ZoneMemory) -> (SocketAddr, Telemetry) {
    let clock = Arc::new(SimClock::starting_at(NOW.parse().unwrap()));
    let telemetry = Telemetry::new(clock.clone(), "1.2.3", "");
    let text = config_text(std::path::Path::new("/x"), NIGHTLY);
    let config = config::parse(&text, "test.toml", None).unwrap();
    let remembered = LastRuns { last: None, zones: BTreeMap::from([("ch-gva-2".parse().unwrap(), memory)]) };
    let view = PolicyView {
        policy: &config.policies[0],
        first_seen_at: NOW.parse().unwrap(),
        remembered,
        expected_interval: None,
    };
    let archives: BTreeSet<_> = config.archives.keys().cloned().collect();
    telemetry.configure(&[view], &archives);
    let listener = server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let address = listener.local_addr().unwrap();
    // It lasts as long as the test's runtime.
    tokio::spawn(server::serve(listener, telemetry.clone(), clock, CancellationToken::new()));
    (address, telemetry)
}

fn well() -> ZoneMemory {
    ZoneMemory {
        last_run_at: Some(NOW.parse().unwrap()),
        last_success_at: Some(NOW.parse().unwrap()),
        plan: Some(PlanSums { keep: 14, delete: 1, ..PlanSums::default() }),
        ..ZoneMemory::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_is_well_and_is_shown_as_a_table_and_as_json() {
    let (address, telemetry) = daemon(well()).await;
    let facts = ArchiveStats { images: 3, bytes: 4096, free_bytes: Some(1 << 30), ..ArchiveStats::default() };
    telemetry.archive(&"vault".parse().unwrap(), facts);
    let (exit, out, err) = status(address, &[]).await;
    assert_eq!((exit, err.as_str()), (0, ""), "{out}");
    for word in [
        "snapwarden 1.2.3",
        "nightly",
        "(manual)",
        "2026-11-01T12:00:00Z",
        "14 kept, 1 to delete",
        "vault",
        "4.00 KiB",
    ] {
        assert!(out.contains(word), "{word}: {out}");
    }
    let (_, narrow, _) = status_in(address, &[], "80").await;
    assert!(narrow.lines().all(|line| line.chars().count() <= 80), "{narrow}");
    for value in ["2026-11-01T12:00:00Z", "14 kept, 1 to delete, 0 ignored", "4.00 KiB", "1.00 GiB"] {
        assert!(narrow.contains(value), "{value} is broken: {narrow}");
    }
    let (exit, out, _) = status(address, &["--output", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((exit, &json["policies"]["nightly"]["zones"]["ch-gva-2"]["plan"]["keep"]), (0, &14.into()));
    assert_eq!(json["downloads"], serde_json::json!([]));

    let download = RunningDownload {
        policy: "nightly".parse().unwrap(),
        zone: "ch-gva-2".parse().unwrap(),
        snapshot_id: "0198c0de-0000-7000-8000-000000000001".parse().unwrap(),
        snapshot_name: "before\u{1b}[2K".to_owned(),
        instance_name: Some("web-1".to_owned()),
        archives: vec!["vault".parse().unwrap()],
        started_at: NOW.parse().unwrap(),
        how_far: HowFar::default(),
    };
    let clock = Arc::new(SimClock::starting_at(NOW.parse().unwrap()));
    let running = telemetry.downloads().begin(download, clock);
    running.note(Progress::Downloading { bytes: 300 << 20, total: Some(1 << 30) }, 0);
    let (exit, out, err) = status(address, &[]).await;
    assert_eq!((exit, err.as_str()), (0, ""), "{out}");
    for word in ["DOWNLOAD", "web-1", "before\\u{1b}[2K", "29 %", "300.00 MiB of 1.00 GiB", "0 B/s"] {
        assert!(out.contains(word), "{word}: {out}");
    }
    drop(running);
    assert!(!status(address, &[]).await.1.contains("DOWNLOAD"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_needs_attention_is_said_and_exits_with_1() {
    let vault = "vault".parse().unwrap();
    let broken = ArchiveStats { error: Some("no such folder".to_owned()), ..ArchiveStats::default() };
    let corrupt = ArchiveStats { corrupt: 2, ..ArchiveStats::default() };
    let failed = ZoneMemory { failure: Some("no \u{1b}[31mroute".to_owned()), ..well() };
    let held = ZoneMemory { held: Some("it would delete 40 of 50".to_owned()), ..well() };
    let long_ago = NOW.parse::<jiff::Timestamp>().unwrap() - jiff::SignedDuration::from_hours(36);
    let plan = PlanSums { blocked_by_export: 2, ..PlanSums::default() };
    let blocked = ZoneMemory { gate_since: Some(long_ago), plan: Some(plan), ..well() };
    let listed = InstanceCounts { is_listed: true, ..InstanceCounts::of(InstanceId(Uuid::nil()), None) };
    let missing = ZoneMemory {
        instances: vec![InstanceCounts { name: "web-\u{1b}[2K".to_owned(), ..listed }],
        ..well()
    };
    let unmatched = ZoneMemory { unmatched: Some("`cache-*` matches no instance".to_owned()), ..well() };
    let cases: [(ZoneMemory, Change<'_>, &str); 10] = [
        (missing, &|_| (), "zone ch-gva-2: 1 instance has no good snapshot: web-\\u{1b}[2K"),
        (unmatched, &|_| (), "policy nightly, zone ch-gva-2: `cache-*` matches no instance"),
        (blocked, &|_| (), "2 snapshots kept for want of a verified copy since"),
        (failed, &|_| (), "policy nightly, zone ch-gva-2: no \\u{1b}[31mroute"),
        (held, &|_| (), "deletions are blocked by the guard: it would delete 40 of 50"),
        (
            well(),
            &|telemetry| telemetry.archive(&vault, broken.clone()),
            "vault cannot be read: no such folder",
        ),
        (well(), &|telemetry| telemetry.archive(&vault, corrupt.clone()), "2 damaged files"),
        (well(), &|telemetry| telemetry.reloaded(false, NOW.parse().unwrap()), "could not be reloaded"),
        (
            well(),
            &|telemetry| telemetry.state_written(Some("disk full".to_owned())),
            "cannot be saved: disk full",
        ),
        (
            well(),
            &|telemetry| telemetry.run_panicked_or_refused(&"nightly".parse().unwrap(), NOW.parse().unwrap()),
            "its last run ended at 2026-11-01T12:00:00Z with result failed",
        ),
    ];
    for (memory, change, word) in cases {
        let (address, telemetry) = daemon(memory).await;
        change(&telemetry);
        let (exit, out, err) = status(address, &[]).await;
        assert_eq!(exit, 1, "{word}: {out}{err}");
        assert!(err.contains(word) && out.contains("nightly"), "{word}: {out}{err}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uncovered_instances_are_named_without_being_an_alarm() {
    let coverage = ZoneCoverage {
        at: Some(NOW.parse().unwrap()),
        covered: 7,
        uncovered: 2,
        exempt: 3,
        uncovered_instances: vec!["db-1".to_owned(), "ci-\u{1b}[2K".to_owned()],
    };
    let (address, _) = daemon(ZoneMemory { coverage: Some(coverage), ..well() }).await;
    let (exit, out, err) = status(address, &[]).await;
    assert_eq!((exit, err.as_str()), (0, ""), "{out}");
    for word in ["COVERED", "UNCOVERED", "2 instances are uncovered", "db-1, ci-\\u{1b}[2K"] {
        assert!(out.contains(word), "{word}: {out}");
    }
    let (_, out, _) = status(address, &["--output", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["zones"]["ch-gva-2"]["uncovered"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_and_somebody_else_are_told_apart() {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    drop(socket);
    let (exit, out, err) = status(address, &[]).await;
    assert_eq!((exit, out.as_str()), (1, ""));
    assert!(err.contains("systemctl status snapwarden") && err.contains(&address.to_string()), "{err}");

    for answer in [
        "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
        "HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{\"policies\": [1]}",
    ] {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = socket.accept().await.unwrap();
            // Whoever answers before he was asked is not understood.
            assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
            stream.write_all(answer.as_bytes()).await.unwrap();
            std::future::pending::<()>().await;
        });
        let (exit, out, err) = status(address, &[]).await;
        assert_eq!((exit, out.as_str()), (1, ""), "{answer}");
        assert!(err.contains("another service may use the port"), "{answer}: {err}");
    }
}
