//! `snapwarden status` against a port of its own, and against others.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use snapwarden::archive::stats::ArchiveStats;
use snapwarden::archive::transfer::progress::Progress;
use snapwarden::config;
use snapwarden::daemon::server;
use snapwarden::daemon::web::Access;
use snapwarden::disk::{self, RealDisk, replace_file};
use snapwarden::randomness::SystemRandomness;
use snapwarden::run::downloads::{HowFar, RunningDownload};
use snapwarden::sim::clock::SimClock;
use snapwarden::snapshot::InstanceId;
use snapwarden::state::directory::StateDirectory;
use snapwarden::state::last_runs::{InstanceCounts, LastRuns, PlanSums, ZoneCoverage, ZoneMemory};
use snapwarden::telemetry::Telemetry;
use snapwarden::telemetry::model::PolicyView;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::stage::{NIGHTLY, NOW, Stage, config_text};

/// How `status` ended with these arguments beside a configuration that listens there, and what it printed.
async fn status(address: SocketAddr, arguments: &[&str]) -> (i32, String, String) {
    status_in(address, arguments, "200").await
}

/// The same on a terminal of so many columns.
async fn status_in(address: SocketAddr, arguments: &[&str], columns: &str) -> (i32, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let text = format!("[server]\nlisten = \"{address}\"\n{}", config_text(folder.path(), NIGHTLY));
    status_of(folder.path(), Some(&text), arguments, &[("COLUMNS", columns)]).await
}

/// The same with this text as the configuration file in that folder, and this environment.
async fn status_of(
    folder: &Path,
    text: Option<&str>,
    arguments: &[&str],
    environment: &[(&str, &str)],
) -> (i32, String, String) {
    let file = folder.join("snapwarden.toml");
    if let Some(text) = text {
        replace_file(&RealDisk, &file, text.as_bytes(), disk::Access::Owner).unwrap();
    }
    let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_snapwarden"));
    command
        .env_clear()
        .envs(environment.iter().copied())
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
    daemon_of(NIGHTLY, memory).await
}

/// The same with these keys.
async fn daemon_of(policies: &str, memory: ZoneMemory) -> (SocketAddr, Telemetry) {
    let clock = Arc::new(SimClock::starting_at(NOW.parse().unwrap()));
    let telemetry = Telemetry::new(clock.clone(), "1.2.3", "");
    let text = config_text(Path::new("/x"), policies);
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
    let access = Arc::new(Access::new(None, &SystemRandomness));
    tokio::spawn(server::serve(listener, telemetry.clone(), access, clock, CancellationToken::new()));
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
        doing: "exporting",
        policy: Some("nightly".parse().unwrap()),
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
        (
            well(),
            &|telemetry| telemetry.reloaded(Err("line 7 is wrong".to_owned()), NOW.parse().unwrap()),
            "could not be reloaded, the previous one is in use: line 7 is wrong",
        ),
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
        unexplained: 0,
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

/// A proxy that nothing answers on, in every spelling.
const PROXIES: [(&str, &str); 4] = [
    ("HTTP_PROXY", "http://127.0.0.1:1"),
    ("http_proxy", "http://127.0.0.1:1"),
    ("ALL_PROXY", "http://127.0.0.1:1"),
    ("all_proxy", "http://127.0.0.1:1"),
];

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_is_found_by_its_state_directory_whatever_the_configuration_says() {
    let (address, _) = daemon(well()).await;
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("state");
    let state = StateDirectory::open(Arc::new(RealDisk), &directory).unwrap();
    let clock = SimClock::starting_at(NOW.parse().unwrap());
    let lock = state.lock_daemon(&clock).await.unwrap();
    state.set_daemon_address(address).await.unwrap();

    let moved = format!("[server]\nlisten = \"127.0.0.1:1\"\n{}", config_text(folder.path(), NIGHTLY));
    let (exit, out, err) = status_of(folder.path(), Some(&moved), &[], &PROXIES).await;
    assert_eq!((exit, err.as_str()), (0, ""), "{out}");
    assert!(out.contains("14 kept, 1 to delete"), "{out}");

    let environment = [("STATE_DIRECTORY", directory.to_str().unwrap())];
    let of_file = format!("[state]\ndirectory = \"{}\"\n", directory.display());
    for (text, environment) in [
        (Some(format!("{of_file}[policies.nightly]\nzoness = 3\n")), &[][..]),
        (Some(format!("{of_file}[policies.nightly\nzones = [\n")), &[]),
        (Some("[policies.nightly]\n".to_owned()), &environment),
        (None, &environment),
    ] {
        let file = folder.path().join("snapwarden.toml");
        if text.is_none() {
            snapwarden::disk::Disk::remove_file(&RealDisk, &file).unwrap();
        }
        let (exit, out, err) = status_of(folder.path(), text.as_deref(), &[], environment).await;
        assert_eq!(exit, 1, "{text:?}: {out}{err}");
        assert!(out.contains("14 kept, 1 to delete"), "{text:?}: {out}{err}");
        assert!(err.starts_with("snapwarden: the configuration file is not valid: "), "{err}");
        assert!(err.contains("`snapwarden check` says where") && err.lines().count() == 1, "{err}");
    }

    // One that ended leaves its address, and another service may have got the port.
    drop(lock);
    let (exit, out, err) = status_of(folder.path(), Some(&moved), &[], &[]).await;
    assert!(out.starts_with("no daemon runs on this state directory"), "{exit}: {out}{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_was_just_paused_is_shown_so_and_a_silent_daemon_is_not_to_be_started_again() {
    let (address, _) = daemon(ZoneMemory { failure: Some("no answer".to_owned()), ..well() }).await;
    let folder = tempfile::tempdir().unwrap();
    let state = StateDirectory::open(Arc::new(RealDisk), &folder.path().join("state")).unwrap();
    let clock = SimClock::starting_at(NOW.parse().unwrap());
    let _lock = state.lock_daemon(&clock).await.unwrap();
    state.set_daemon_address(address).await.unwrap();
    let text = config_text(folder.path(), NIGHTLY);
    let asked = || status_of(folder.path(), Some(&text), &["--output", "json"], &[]);
    assert_eq!(asked().await.0, 1, "it failed");
    state.pause(&clock, "nightly".parse().unwrap(), NOW.parse().unwrap()).await.unwrap();
    let (exit, out, err) = asked().await;
    let shown = serde_json::from_str::<serde_json::Value>(&out).unwrap()["policies"]["nightly"].clone();
    assert_eq!((&shown["enabled"], &shown["paused_since"]), (&false.into(), &NOW.into()), "{shown}");
    assert_eq!(exit, 0, "{err}");

    state.set_daemon_address(SocketAddr::from(([127, 0, 0, 1], 1))).await.unwrap();
    let (exit, out, err) = status_of(folder.path(), Some(&text), &[], &[]).await;
    assert!(exit == 1 && out.starts_with("the daemon on this state directory does not answer"), "{out}{err}");
    assert!(err.contains("systemctl restart snapwarden") && !err.contains("snapwarden run"), "{err}");
}

#[tokio::test(start_paused = true)]
async fn without_a_daemon_the_state_directory_is_shown() {
    let (stage, _) = Stage::two_by_twenty();
    stage.run(NIGHTLY).await;
    let text = stage.config(NIGHTLY);
    let (exit, out, err) = status_of(stage.folder.path(), Some(&text), &[], &[("COLUMNS", "80")]).await;
    assert_eq!((exit, err.as_str()), (0, ""), "nothing has a schedule: {out}");
    for word in
        ["no daemon runs on this state directory", "nightly", "(manual)", "success", "COVERED", "kept"]
    {
        assert!(out.contains(word), "{word}: {out}");
    }
    let path = stage.state().display().to_string();
    assert!(out.lines().all(|line| line.contains(&path) || line.chars().count() <= 80), "{out}");

    let text = text.replace("[policies.nightly]\n", "[policies.nightly]\nschedule = \"30 2 * * *\"\n");
    let (exit, out, err) = status_of(stage.folder.path(), Some(&text), &[], &[]).await;
    assert!(exit == 1 && err.contains("no policy runs by its schedule"), "{out}{err}");
    assert!(!out.contains("(manual)"), "it is due: {out}");
    let (_, json, _) = status_of(stage.folder.path(), Some(&text), &["--output", "json"], &[]).await;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&json["remembered"], &json["policies"]["nightly"]["last"]["result"]),
        (&true.into(), &"success".into())
    );

    let broken = format!("{text}[policies.nightly.retention]\n");
    let (exit, out, err) = status_of(stage.folder.path(), Some(&broken), &[], &[]).await;
    assert!(exit == 1 && err.contains("is not valid"), "{out}{err}");
    for word in ["no daemon runs on this state directory", "nightly", "(not known)", "success", "kept"] {
        assert!(out.contains(word), "{word}: {out}");
    }
    let runs = stage.state().join("runs-nightly.json");
    replace_file(&RealDisk, &runs, b"{", disk::Access::Owner).unwrap();
    let (exit, out, err) = status_of(stage.folder.path(), Some(&text), &[], &[]).await;
    assert!(exit == 1 && err.contains("runs-nightly.json is damaged"), "{out}{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_is_not_enabled_is_no_alert() {
    let long_ago = NOW.parse::<jiff::Timestamp>().unwrap() - jiff::SignedDuration::from_hours(40 * 24);
    let listed = InstanceCounts { is_listed: true, ..InstanceCounts::of(InstanceId(Uuid::nil()), None) };
    let plan = PlanSums { blocked_by_export: 2, delete: 3, pending: 4, ..PlanSums::default() };
    let memory = ZoneMemory {
        failure: Some("no route".to_owned()),
        held: Some("it would delete 40 of 50".to_owned()),
        result: Some("failed".to_owned()),
        unmatched: Some("`cache-*` matches no instance".to_owned()),
        gate_since: Some(long_ago),
        last_success_at: Some(long_ago),
        instances: vec![listed],
        plan: Some(plan),
        ..well()
    };
    let alerts = |telemetry: &Telemetry| -> Vec<String> {
        let text = telemetry.metrics_text();
        let names = [
            "policy_held{",
            "pending_deletes{",
            "policy_unmatched{",
            "policy_last_run_result{",
            "policy_instances{",
            "planned_deletes{",
            "blocked_deletes{",
            "export_gate_oldest_timestamp_seconds{",
            "policy_expected_interval_seconds{",
        ];
        let is_alert = |line: &&str| {
            let name = |name: &&str| line.starts_with(&format!("snapwarden_{name}"));
            names.iter().any(name) && !line.ends_with(" 0") && !line.contains("\"fresh\"")
        };
        text.lines().filter(is_alert).map(str::to_owned).collect()
    };
    let scheduled = NIGHTLY.replace("[policies.nightly]\n", "[policies.nightly]\nschedule = \"@daily\"\n");
    let (address, telemetry) = daemon_of(&scheduled, memory.clone()).await;
    assert!(alerts(&telemetry).len() >= 7, "{:#?}", alerts(&telemetry));
    assert_eq!(status(address, &[]).await.0, 1);

    let paused = scheduled.replace("[policies.nightly]\n", "[policies.nightly]\nenabled = false\n");
    let (address, telemetry) = daemon_of(&paused, memory).await;
    telemetry.run_panicked_or_refused(&"nightly".parse().unwrap(), NOW.parse().unwrap());
    assert_eq!(alerts(&telemetry), [""; 0]);
    let (exit, out, err) = status(address, &[]).await;
    assert_eq!((exit, err.as_str()), (0, ""), "{out}");
    assert!(out.contains("(not enabled)"), "{out}");
}
