//! The program as a process: what it prints, where it prints it, how it exits, and what it leaves behind. The
//! zone is a simulated one behind a socket; the clock, the disk and the network are real.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use snapwarden::clock::{Clock as _, SystemClock};
use snapwarden::disk::{Access, Disk as _, RealDisk};
use snapwarden::sim::call::Call;
use snapwarden::sim::clock::SimClock;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::http_server::Served;
use snapwarden::sim::image::DiskShape;
use snapwarden::sim::world::{API_KEY, API_SECRET, World};
use snapwarden::snapshot::{InstanceId, SnapshotId, SnapshotState, ZoneName};
use snapwarden::state::allowances::AllowanceOf;
use snapwarden::state::directory::StateDirectory;

use crate::stage::{NIGHTLY, Said, audit_log, files, read, skipped};

/// An image of 40 KiB or so: what is tried here does not depend on its size.
const SMALL: DiskShape = DiskShape { size_gib: 10, data_clusters: 4, cluster_bits: 12 };

/// A process that takes longer hangs.
const PATIENCE: Duration = Duration::from_mins(1);

/// A policy that only prunes.
pub(crate) const PRUNE: &str =
    "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.retention]\nmax_count = 2\n";

/// An id that nothing has.
const NIL: &str = "00000000-0000-0000-0000-000000000000";

/// A zone behind a socket, and a folder with a configuration that leads there.
pub(crate) struct Play {
    pub(crate) world: World,
    pub(crate) zone: ZoneName,
    served: Served,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) begun: Timestamp,
}

/// The program in an empty environment, with these arguments.
fn bare(arguments: &[&str]) -> assert_cmd::Command {
    let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_snapwarden"));
    command.env_clear().timeout(PATIENCE).args(arguments);
    command
}

/// The images begin their command line with `--log-format json`.
#[test]
fn the_last_format_of_the_log_counts() {
    for (formats, is_json) in [(["text", "json"], true), (["json", "text"], false)] {
        let arguments =
            ["--log-format", formats[0], "--log-format", formats[1], "--config", "/nowhere", "check"];
        let output = bare(&arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), said.starts_with('{')), (Some(78), is_json), "{said}");
    }
}

/// Runs a process to its end, beside the zone that it speaks with.
pub(crate) async fn end_of(mut command: assert_cmd::Command) -> Said {
    let ended = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    Said::of(ended)
}

pub(crate) fn write(path: &Path, text: &str) {
    snapwarden::disk::replace_file(&RealDisk, path, text.as_bytes(), Access::Owner).unwrap();
}

/// A path as an argument.
fn shown(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub(crate) fn is_there(path: &Path) -> bool {
    RealDisk.metadata(path).is_ok()
}

impl Play {
    /// An empty zone `ch-gva-2` whose operations are over at once.
    pub(crate) async fn new() -> Self {
        let begun = SystemClock::start().now();
        let world = World::new(Arc::new(SimClock::starting_at(begun)), 7);
        world.set_operations_take(Duration::ZERO);
        let zone = world.add_zone("ch-gva-2");
        let served = world.serve(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        Self { world, zone, served, folder: tempfile::tempdir().unwrap(), begun }
    }

    /// One instance `web-1` with a snapshot a day, five of them, and a configuration with these policies.
    pub(crate) async fn five(policies: &str) -> (Self, Vec<SnapshotId>) {
        let play = Self::new().await;
        let (_, ids) = play.instance("web-1", 5, 24);
        play.configure(policies);
        (play, ids)
    }

    /// An instance and its snapshots, newest first: the newest is an hour old.
    pub(crate) fn instance(
        &self,
        name: &str,
        snapshots: i64,
        hours_apart: i64,
    ) -> (InstanceId, Vec<SnapshotId>) {
        let instance = self.world.add_instance(&self.zone, name, &[]);
        self.world.set_disk(instance, SMALL);
        let taken = |place: i64| self.begun - SignedDuration::from_hours(1 + place * hours_apart);
        (instance, (0..snapshots).map(|place| self.world.add_snapshot(instance, taken(place))).collect())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn configure(&self, policies: &str) {
        let exoscale = format!("endpoint = \"{}\"", self.served.endpoint());
        self.configure_with(&exoscale, policies);
    }

    pub(crate) fn configure_with(&self, exoscale: &str, policies: &str) {
        let rest = crate::stage::config_text(self.folder.path(), policies);
        let fast = "poll_interval = \"100ms\"\nrequests_per_second = 1000";
        write(&self.path("snapwarden.toml"), &format!("[exoscale]\n{exoscale}\n{fast}\n{rest}"));
    }

    /// The program with the configuration and without credentials.
    pub(crate) fn stranger(&self, arguments: &[&str]) -> assert_cmd::Command {
        let mut command = bare(&["--config", shown(&self.path("snapwarden.toml"))]);
        command.args(arguments);
        command
    }

    /// The program with the configuration and the credentials.
    pub(crate) fn command(&self, arguments: &[&str]) -> assert_cmd::Command {
        let mut command = self.stranger(arguments);
        command.env("EXOSCALE_API_KEY", API_KEY).env("EXOSCALE_API_SECRET", API_SECRET);
        command
    }

    pub(crate) async fn run(&self, arguments: &[&str]) -> Said {
        end_of(self.command(arguments)).await
    }

    pub(crate) fn there(&self) -> Vec<SnapshotId> {
        self.world.snapshots(&self.zone).into_iter().map(|snapshot| snapshot.id).collect()
    }

    pub(crate) fn audit(&self) -> Vec<Value> {
        let text = audit_log(&RealDisk, &self.path("state")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Everything that the zone has and the folder holds.
    pub(crate) fn everything(&self) -> String {
        let zone = (self.world.snapshots(&self.zone), self.world.templates(&self.zone));
        format!("{zone:?} {:?}", files(self.folder.path()))
    }
}

/// Whether a tool is there; if not, says that something was not tried.
fn have(tool: &str) -> bool {
    let have = Command::new(tool).arg("--version").output().is_ok();
    if !have {
        crate::stage::skipped(format_args!("{tool} is not installed, so it judged nothing here"));
    }
    have
}

#[tokio::test(flavor = "multi_thread")]
async fn once_does_exactly_what_the_policy_says_and_a_second_time_nothing() {
    let play = Play::new().await;
    let (web, web_ids) = play.instance("web-1", 20, 24);
    let (db, db_ids) = play.instance("db-1", 20, 48);
    play.configure(&NIGHTLY.replace("archives = [\"vault\"]", "archives = [\"vault\"]\nrequired = true"));

    let said = play.run(&["once"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    // Of web-1 max_count leaves 10; of db-1 no more than 8 are younger than 15 days.
    let mut expected: Vec<SnapshotId> = web_ids[..10].iter().chain(&db_ids[..8]).copied().collect();
    expected.sort();
    let mut there = play.there();
    there.sort();
    assert_eq!(there, expected);

    let archived = files(&play.path("vault"));
    for (instance, newest) in [(web, web_ids[0]), (db, db_ids[0])] {
        let folder = play.path("vault").join(format!("ch-gva-2/{instance}"));
        let named = |end: &str| -> Vec<&PathBuf> {
            let named = |path: &&PathBuf| path.starts_with(&folder) && shown(path).ends_with(end);
            archived.iter().map(|(path, _)| path).filter(named).collect()
        };
        let images = named(&format!("-{newest}.qcow2"));
        assert_eq!((images.len(), named(".qcow2").len(), named(".json").len()), (1, 1, 1), "{archived:?}");
        let sums = named(".qcow2.md5");
        assert_eq!(sums.len(), 1);
        if have("md5sum") {
            let checked = Command::new("md5sum").arg("-c").args(&sums).current_dir(&folder).output().unwrap();
            assert!(checked.status.success(), "{checked:?}");
            assert!(String::from_utf8_lossy(&checked.stdout).contains(&newest.to_string()), "{checked:?}");
        }
        if have("qemu-img") {
            let checked =
                Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(images[0]).output().unwrap();
            assert!(checked.status.success(), "{checked:?}");
        }
    }

    let listed = play.run(&["archive", "list", "--output", "json"]).await.json();
    assert_eq!((&listed[0]["archive"], &listed[0]["problems"]), (&json!("vault"), &json!([])));
    let images = listed[0]["images"].as_array().unwrap();
    assert_eq!(images.len(), 2, "{listed}");
    for image in images {
        let of: SnapshotId = image["snapshot_id"].as_str().unwrap().parse().unwrap();
        assert_eq!(image["md5"], play.world.image(of).md5());
        let file = RealDisk.metadata(Path::new(image["file"].as_str().unwrap())).unwrap();
        assert_eq!(image["size_bytes"], file.len);
    }

    let day = |at: SnapshotId| {
        let all = play.world.snapshots(&play.zone);
        all.into_iter().find(|one| one.id == at).unwrap().created_at.strftime("%Y%m%d").to_string()
    };
    let mut templates: Vec<String> =
        play.world.templates(&play.zone).into_iter().map(|template| template.name).collect();
    templates.sort();
    assert_eq!(templates, [format!("db-1-{}", day(db_ids[0])), format!("web-1-{}", day(web_ids[0]))]);

    // Each step stands there twice, in this order, and says why.
    let mut steps: BTreeMap<(String, String), Vec<Value>> = BTreeMap::new();
    for line in play.audit() {
        let key = |pointer: &str| line.pointer(pointer).unwrap().as_str().unwrap().to_owned();
        steps.entry((key("/action"), key("/snapshot/id"))).or_default().push(line);
    }
    let mut rules: BTreeMap<String, usize> = BTreeMap::new();
    let mut actions: BTreeMap<&str, usize> = BTreeMap::new();
    for ((action, id), lines) in &steps {
        let outcomes: Vec<&str> = lines.iter().map(|line| line["outcome"].as_str().unwrap()).collect();
        assert_eq!(outcomes, ["intended", "done"], "{action} {id}");
        assert!(lines[1]["operation_id"].is_string(), "{}", lines[1]);
        assert!(!lines[0]["reasons"].as_array().unwrap().is_empty(), "{}", lines[0]);
        *actions.entry(action).or_default() += 1;
        if let Some(rule) = lines[0]["rule"].as_str() {
            *rules.entry(rule.to_owned()).or_default() += 1;
        }
    }
    assert_eq!(actions, BTreeMap::from([("delete", 22), ("export", 2), ("promote", 2)]));
    assert_eq!(rules, BTreeMap::from([("max_age".to_owned(), 17), ("max_count".to_owned(), 5)]));

    let before = play.everything();
    let (memory, listed) = (play.path("state/runs-nightly.json"), play.path("state/listed-ch-gva-2.json"));
    let (remembered, listed_before) = (read(&memory), read(&listed));
    play.world.clear_log();
    let again = play.run(&["once", "--output", "json"]).await;
    assert_eq!(again.status, 0, "{again:?}");
    let report = again.json();
    assert_eq!(report[0]["result"], "success", "{report}");
    assert_eq!(report[0]["zones"][0]["steps"], json!([]), "{report}");
    assert!(play.world.changes().is_empty());
    // That it ran is remembered, and nothing else is otherwise.
    assert_ne!(read(&memory), remembered);
    write(&memory, &remembered);
    write(&listed, &listed_before);
    assert!(
        play.everything() == before,
        "{:?}",
        files(play.folder.path()).iter().map(|file| &file.0).collect::<Vec<_>>()
    );
}

/// What must stand nowhere: the secret, and what only a presigned address or a signed header has.
pub(crate) fn secrets(world: &World) -> Vec<String> {
    let of_images = world.log().into_iter().filter(|exchange| exchange.call == Call::GetImage);
    let words = ["X-Amz-", "x-amz-", "EXO2-HMAC-SHA256", "signature=", "hush", "exported-snapshots-"];
    let mut secrets: Vec<String> =
        words.map(str::to_owned).into_iter().chain([API_SECRET.to_owned()]).collect();
    secrets.extend(of_images.map(|exchange| exchange.path.clone()));
    secrets
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_stands_in_any_output_log_or_file() {
    let address = "fetch https://sos.example/x?X-Amz-Credential=hush&X-Amz-Signature=hush";
    let elsewhere = "http://127.0.0.1:1/x?X-Amz-Signature=hush";
    let faults: [(&str, Vec<Fault>, i32); 12] = [
        ("nothing", vec![], 0),
        (
            "signature",
            vec![Fault::on(Call::DeleteSnapshot, Effect::status(403, "Invalid request signature"))],
            1,
        ),
        ("expired", vec![Fault::on(Call::GetImage, Effect::Expire(1_000)).times(1)], 0),
        ("denied", vec![Fault::on(Call::GetImage, Effect::Expire(0)).times(1)], 0),
        ("broken", vec![Fault::on(Call::GetImage, Effect::CutBody(1_000)).times(1)], 0),
        ("cut", vec![Fault::on(Call::GetImage, Effect::CutBefore).times(1)], 0),
        ("refused", vec![Fault::on(Call::GetImage, Effect::status(404, address))], 1),
        (
            "sent on",
            vec![
                Fault::on(Call::GetImage, Effect::status(302, "")).times(1),
                Fault::on(Call::GetImage, Effect::header(http::header::LOCATION, elsewhere)).times(1),
            ],
            0,
        ),
        (
            "another MD5",
            vec![Fault::on(Call::GetSnapshot, Effect::Edit("/export/md5sum", Some(json!("0".repeat(32)))))],
            1,
        ),
        (
            "odd address",
            vec![Fault::on(
                Call::GetSnapshot,
                Effect::Edit("/export/presigned-url", Some(json!("x?X-Amz-Signature=hush"))),
            )],
            1,
        ),
        ("told in an error", vec![Fault::on(Call::ExportSnapshot, Effect::status(400, address))], 1),
        (
            "told by an operation",
            vec![Fault::on(Call::ExportSnapshot, Effect::operation_fails("fault", address))],
            1,
        ),
    ];
    // The log at its most talkative, as an operator who looks for a fault would have it.
    let levels: [(&[&str], Option<&str>); 4] = [
        (&["-vvv", "--log-format", "text"], None),
        (&["-vvv", "--log-format", "json"], None),
        (&["--log-format", "text"], Some("trace")),
        (
            &["--log-format", "json"],
            Some("trace,hyper=trace,hyper_util=trace,reqwest=trace,h2=trace,rustls=trace"),
        ),
    ];
    let plays = faults.into_iter().enumerate().map(|(place, (name, faults, status))| async move {
        let (play, ids) = Play::five(&NIGHTLY.replace("max_count = 10", "max_count = 2")).await;
        for fault in faults {
            play.world.fault(fault);
        }
        let (flags, rust_log) = levels[place % levels.len()];
        let newest = ids[0].to_string();
        let mut told = String::new();
        for arguments in [
            vec!["check", "--online"],
            vec!["plan"],
            vec!["plan", "--output", "json"],
            vec!["once"],
            vec!["once", "--output", "json"],
            vec!["promote", &newest, "--zone", "ch-gva-2", "--name", "golden"],
            vec!["archive", "list"],
            vec!["archive", "list", "--output", "json"],
            vec!["explain", &newest],
            vec!["explain", &newest, "--output", "json"],
            vec!["history"],
            vec!["history", "--output", "json"],
        ] {
            let mut command = play.command(&arguments);
            command.args(flags);
            if let Some(rust_log) = rust_log {
                command.env("RUST_LOG", rust_log);
            }
            let said = end_of(command).await;
            if arguments == ["once"] {
                assert_eq!(said.status, status, "{name}: {said:?}");
                assert!(said.err.contains("list-snapshots"), "{name}: the log is not at its most talkative");
            }
            assert!(!said.err.contains("idle connection"), "{name}: a library talks: {said:?}");
            told.push_str(&said.out);
            told.push_str(&said.err);
        }
        let held = files(&play.path("state")).into_iter().chain(files(&play.path("vault")));
        for (path, bytes) in held {
            told.push_str(&path.to_string_lossy());
            told.push_str(&String::from_utf8_lossy(&bytes));
        }
        for secret in secrets(&play.world) {
            let found = told.find(&secret).map(|at| {
                let start = told.floor_char_boundary(at.saturating_sub(200));
                &told[start..told.ceil_char_boundary(at + 300)]
            });
            assert_eq!(found, None, "{name}: `{secret}`");
        }
    });
    // Side by side, since some of them wait before they try again.
    join_all(plays).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn looking_changes_nothing() {
    let (play, ids) = Play::five(NIGHTLY).await;
    let oldest = ids[4].short();
    let before = play.everything();
    for arguments in [
        vec!["plan"],
        vec!["plan", "--output", "json"],
        vec!["check"],
        vec!["check", "--output", "json"],
        vec!["archive", "list"],
        vec!["archive", "list", "vault", "--output", "json"],
        vec!["holds"],
        vec!["history"],
        vec!["history", "--output", "json"],
        vec!["explain", &oldest],
        vec!["explain", &oldest, "--output", "json"],
    ] {
        let said = play.run(&arguments).await;
        assert_eq!(said.status, 0, "{arguments:?}: {said:?}");
        assert!(!said.out.is_empty(), "{arguments:?}");
        assert_eq!(said.err, "", "{arguments:?}");
        assert_eq!(play.everything(), before, "{arguments:?}");
    }
    assert!(play.world.changes().is_empty());

    let said = play.run(&["check", "--online", "--output", "json"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    let checked = said.json();
    let tried: Vec<&str> =
        checked["online"].as_array().unwrap().iter().map(|tried| tried["what"].as_str().unwrap()).collect();
    for operation in [
        "list-snapshots",
        "delete-snapshot",
        "export-snapshot",
        "promote-snapshot-to-template",
        "delete-template",
    ] {
        assert!(tried.contains(&operation), "{checked}");
    }
    let changes = play.world.changes();
    assert_eq!(changes.len(), 4, "{changes:?}");
    for change in changes {
        assert!(change.status().is_some_and(|status| [403, 404].contains(&status.as_u16())), "{change:?}");
    }
    assert_eq!(play.everything(), before);
    assert!(!is_there(&play.path("state")) && !is_there(&play.path("vault")));
}

#[tokio::test(flavor = "multi_thread")]
async fn check_online_names_the_permission_that_is_missing() {
    let (play, _) = Play::five(NIGHTLY).await;
    let may = [
        Call::ListSnapshots,
        Call::ListInstances,
        Call::GetSnapshot,
        Call::ExportSnapshot,
        Call::ListTemplates,
        Call::GetTemplate,
        Call::PromoteSnapshot,
        Call::DeleteTemplate,
    ];
    play.world.add_key("EXOfew", "few-secret", &may);
    let few = |arguments: &[&str]| {
        let mut command = play.stranger(arguments);
        command.env("EXOSCALE_API_KEY", "EXOfew").env("EXOSCALE_API_SECRET", "few-secret");
        command
    };
    let said = end_of(few(&["check", "--online"])).await;
    assert_eq!(said.status, 1, "{said:?}");
    assert!(said.out.contains("allow `delete-snapshot`"), "{said:?}");
    assert!(!said.out.contains("allow `export-snapshot`"), "{said:?}");
    let mut wrong = play.stranger(&["check", "--online"]);
    wrong.env("EXOSCALE_API_KEY", API_KEY).env("EXOSCALE_API_SECRET", "another-secret");
    let said = end_of(wrong).await;
    assert_eq!(said.status, 1, "{said:?}");
    assert!(said.out.contains("signature"), "{said:?}");
    assert_eq!(play.there().len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_exits_with_1_and_says_what_failed() {
    let (play, ids) = Play::five(PRUNE).await;
    play.world.fault(
        Fault::on(Call::DeleteSnapshot, Effect::fails_inline("fault", "storage is gone")).of(ids[4].0),
    );
    let said = play.run(&["once"]).await;
    assert_eq!(said.status, 1, "{said:?}");
    said.complained(&[&ids[4].to_string(), "storage is gone"]);
    assert!(said.out.contains("storage is gone"), "{said:?}");
    assert_eq!(play.there(), [ids[4], ids[1], ids[0]], "the others went");

    // Somebody else runs the policy.
    let state = StateDirectory::open(Arc::new(RealDisk), &play.path("state")).unwrap();
    let held = state.lock_policy(&"nightly".parse().unwrap(), &SystemClock::start()).await.unwrap();
    play.world.clear_log();
    let said = play.run(&["once"]).await;
    assert_eq!(said.status, 1, "{said:?}");
    said.complained(&["nightly", "locked by another process", "policy-nightly.lock"]);
    assert!(play.world.log().is_empty(), "nothing was even asked");
    drop(held);
    play.world.clear_faults();
    assert_eq!(play.run(&["once"]).await.status, 0);

    // The zone does not answer as an API does.
    for effect in [Effect::html(), Effect::malformed_json(), Effect::status(403, "Unknown API key")] {
        let (play, _) = Play::five(PRUNE).await;
        play.world.fault(Fault::on(Call::ListSnapshots, effect));
        for arguments in [["once"], ["plan"]] {
            let said = play.run(&arguments).await;
            assert_eq!(said.status, 1, "{said:?}");
            said.complained(&["list-snapshots", "ch-gva-2"]);
        }
        assert_eq!(play.there().len(), 5);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_usage_exits_with_2_before_anything_is_touched() {
    let (play, _) = Play::five(NIGHTLY).await;
    let before = play.everything();
    for (arguments, words) in [
        (vec!["once", "weekly"], vec!["no policy `weekly`", "nightly"]),
        (vec!["plan", "weekly"], vec!["no policy `weekly`", "nightly"]),
        (vec!["once", "../x"], vec!["../x"]),
        (vec!["once", "--allow-deletes", "-1"], vec!["-1"]),
        (vec!["once", "--frobnicate"], vec!["--frobnicate"]),
        (vec!["frobnicate"], vec!["frobnicate"]),
        (vec!["archive", "list", "attic"], vec!["no archive `attic`"]),
        (vec!["plan", "--at", "tuesday"], vec!["tuesday", "2 days ago", "midnight UTC"]),
        (vec!["plan", "--instances", "x.json"], vec!["--snapshots"]),
        (vec!["hold", NIL, "--until", "2026-01-01T00:00:00Z"], vec!["is in the past", "leave it out"]),
        (vec!["hold", NIL, "--until", "tomorrow"], vec!["tomorrow"]),
        (vec!["unhold"], vec!["SNAPSHOT"]),
        (vec!["allow", "weekly", "3"], vec!["no policy `weekly`", "nightly"]),
        (vec!["allow", "nightly", "-3"], vec!["-3"]),
        (vec!["allow", "nightly", "3", "--zone", "at-vie-1"], vec!["no zone `at-vie-1`", "ch-gva-2"]),
        (vec!["-q", "-v", "check"], vec!["--quiet", "--verbose"]),
        (vec![], vec!["Usage"]),
    ] {
        let said = play.run(&arguments).await;
        said.refused(2, &words);
        assert_eq!(play.everything(), before, "{arguments:?}");
    }
    assert!(play.world.log().is_empty());
    let nameless =
        play.run(&["promote", &play.there()[0].to_string(), "--zone", "ch-gva-2", "--name", ""]).await;
    nameless.refused(2, &["1 to 255 characters"]);
    assert_eq!(play.everything(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guard_holds_exits_with_3_and_says_how_to_let_it_pass() {
    let (play, ids) = Play::five(&format!("{PRUNE}[policies.nightly.guard]\nmax_deletes = 2\n")).await;
    let held = play.run(&["once"]).await;
    assert_eq!(held.status, 3, "{held:?}");
    held.complained(&["max_deletes = 2", "snapwarden once nightly --allow-deletes 3"]);
    assert!(held.out.contains("BLOCKED") && held.out.contains("--allow-deletes 3"), "{held:?}");
    let report = play.run(&["once", "--output", "json"]).await;
    assert_eq!(report.status, 3, "{report:?}");
    assert!(report.json()[0]["zones"][0]["held"].is_string(), "{report:?}");
    assert_eq!(play.run(&["once", "nightly", "--allow-deletes", "2"]).await.status, 3);
    assert!(play.world.changes().is_empty());

    // A plan only looks: what a guard would hold is no failure of it.
    let looked = play.run(&["plan", "--output", "json"]).await;
    assert_eq!(looked.status, 0, "{looked:?}");
    assert!(looked.json()["policies"][0]["held"].is_string(), "{looked:?}");
    assert!(play.run(&["plan"]).await.out.contains("BLOCKED"));

    assert_eq!(play.run(&["once", "nightly", "--allow-deletes", "3"]).await.status, 0);
    assert_eq!(play.there(), [ids[1], ids[0]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn holds_are_put_shown_and_taken_away_without_credentials() {
    let (play, ids) = Play::five(PRUNE).await;
    let (first, second) = (ids[4].to_string(), ids[3].to_string());
    let stranger = async |arguments: &[&str]| {
        let said = end_of(play.stranger(arguments)).await;
        let warned = arguments.contains(&"hold");
        assert_eq!((said.status, said.err.contains("was not checked")), (0, warned), "{said:?}");
        assert!(warned || said.err.is_empty(), "{said:?}");
        said
    };
    assert_eq!(stranger(&["holds"]).await.out, "no snapshot is on hold\n");
    assert!(!is_there(&play.path("state")), "looking makes nothing");
    assert_eq!(stranger(&["unhold", &first]).await.out.lines().count(), 1);

    let put = stranger(&["hold", &first, "--reason", "an \u{1b}[31maudit"]).await.out;
    assert_eq!(put, format!("snapshot {first} is on hold forever: an \\u{{1b}}[31maudit\n"));
    let until = "2999-01-01T00:00:00Z";
    let put = stranger(&["hold", &first, "--until", until]).await.out;
    assert!(
        put.starts_with(&format!("snapshot {first} is on hold until {until} (previously forever")),
        "{put}"
    );
    let put = stranger(&["--output", "json", "hold", &second]).await.json();
    assert_eq!((&put["snapshot"], &put["until"]), (&json!(second), &Value::Null));

    let shown = stranger(&["holds", "--output", "json"]).await.json();
    let snapshots: Vec<_> = shown.as_array().unwrap().iter().map(|hold| hold["snapshot"].clone()).collect();
    assert_eq!(snapshots, [json!(first), json!(second)]);
    assert_eq!(shown[0]["until"], until);
    let table = stranger(&["holds"]).await.out;
    assert!(table.starts_with("SNAPSHOT") && table.contains(until) && table.contains("forever"), "{table}");

    let planned = play.run(&["plan", "--output", "json"]).await.json();
    assert_eq!(planned["policies"][0]["decisions"][4]["rule"], "hold");
    let taken = stranger(&["unhold", &second]).await.out;
    assert_eq!(taken, format!("snapshot {second} is no longer on hold (previously forever)\n"));
    assert_eq!(play.run(&["once"]).await.status, 0);
    assert_eq!(play.there(), [ids[4], ids[1], ids[0]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_of_an_unknown_snapshot_is_refused_unless_that_cannot_be_asked() {
    let (play, ids) = Play::five(PRUNE).await;
    let said = play.run(&["hold", NIL]).await;
    assert_eq!(said.status, 2, "{said:?}");
    said.complained(&[NIL, "is not in zone ch-gva-2"]);
    assert!(!is_there(&play.path("state")), "nothing was written");
    let known = play.run(&["hold", &ids[0].to_string()]).await;
    assert_eq!((known.status, known.err.as_str()), (0, ""), "{known:?}");
    play.world
        .fault(Fault::on(Call::ListSnapshots, Effect::status(403, "Forbidden by role policy for compute")));
    let unasked = play.run(&["hold", NIL]).await;
    assert_eq!(unasked.status, 0, "{unasked:?}");
    unasked.complained(&["zone ch-gva-2", "was not checked"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hold_also_looks_for_the_snapshot_in_archives_if_these_are_there() {
    let (play, ids) =
        Play::five(&format!("{PRUNE}[policies.nightly.export]\narchives = [\"vault\"]\n")).await;
    assert_eq!(play.run(&["once"]).await.status, 0);
    play.world.remove_snapshot(ids[0]);
    let known = play.run(&["hold", &ids[0].to_string()]).await;
    assert_eq!((known.status, known.err.as_str()), (0, ""), "{known:?}");
    play.run(&["hold", NIL]).await.refused(2, &["is not in zone ch-gva-2, archive vault"]);
    RealDisk.rename(&play.path("vault"), &play.path("away")).unwrap();
    let unasked = play.run(&["hold", NIL]).await;
    assert_eq!(unasked.status, 0, "{unasked:?}");
    unasked.complained(&["archive vault: it is not there", "was not checked"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allowance_lets_one_run_pass_and_needs_no_credentials() {
    let (play, ids) = Play::five(&format!("{PRUNE}[policies.nightly.guard]\nmax_deletes = 2\n")).await;
    let held = play.run(&["once"]).await;
    assert_eq!(held.status, 3, "{held:?}");
    held.complained(&["snapwarden allow nightly 3"]);
    for (arguments, said) in [
        (
            ["allow", "nightly", "3"].as_slice(),
            "the guard allows the next run of policy nightly, up to 3 deletions\n",
        ),
        (
            &["allow", "nightly", "1", "--zone", "ch-gva-2"],
            "the guard allows the next run of policy nightly in zone ch-gva-2, up to 1 deletion\n",
        ),
        (
            &["allow", "nightly", "2", "--zone", "ch-gva-2"],
            "the guard allows the next run of policy nightly in zone ch-gva-2, up to 2 deletions (previously at most 1)\n",
        ),
    ] {
        let ended = end_of(play.stranger(arguments)).await;
        assert_eq!((ended.status, ended.out.as_str(), ended.err.as_str()), (0, said, ""));
    }
    let json = end_of(play.stranger(&["allow", "nightly", "3", "--output", "json"])).await.json();
    assert_eq!(
        (&json["policy"], &json["zone"], &json["deletes"]),
        (&json!("nightly"), &Value::Null, &json!(3))
    );
    assert!(
        !play.run(&["plan"]).await.out.contains("BLOCKED"),
        "a plan looks at what was allowed, and takes nothing"
    );
    assert_eq!(play.run(&["once"]).await.status, 0);
    assert_eq!(play.there(), [ids[1], ids[0]]);
    let left = StateDirectory::at(std::sync::Arc::new(RealDisk), &play.path("state"));
    assert!(left.allowances(&AllowanceOf::Policy("nightly".parse().unwrap())).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_or_credentials_that_cannot_be_used_exit_with_78() {
    let (play, _) = Play::five(NIGHTLY).await;
    for arguments in [["once"].as_slice(), &["plan"], &["check", "--online"]] {
        end_of(play.stranger(arguments)).await.refused(78, &["EXOSCALE_API_KEY", "credentials_file"]);
        let mut half = play.stranger(arguments);
        half.env("EXOSCALE_API_KEY", API_KEY);
        end_of(half)
            .await
            .refused(78, &["`EXOSCALE_API_KEY` and", "`EXOSCALE_API_SECRET` is missing", "both"]);
        let mut half = play.stranger(arguments);
        half.env("EXOSCALE_API_SECRET", API_SECRET);
        let said = end_of(half).await;
        said.refused(78, &["`EXOSCALE_API_KEY` is missing"]);
        assert!(!said.err.contains(API_SECRET));
    }
    // Without --online a check needs none.
    assert_eq!(end_of(play.stranger(&["check"])).await.status, 0);

    play.configure(&PRUNE.replace("max_count = 2", "max_count = 0\nkeep_lost = 3"));
    let said = play.run(&["once"]).await;
    said.refused(78, &["snapwarden.toml", "max_count", "keep_lost", "keep_last"]);
    let missing = play.path("nowhere.toml");
    end_of(bare(&["--config", shown(&missing), "check"])).await.refused(78, &[shown(&missing), "--config"]);
    let folder = play.folder.path();
    let said = end_of(bare(&["--config", shown(folder), "check"])).await;
    said.refused(78, &[shown(folder), "directory"]);
    let mut by_environment = bare(&["check"]);
    by_environment.env("SNAPWARDEN_CONFIG", &missing);
    end_of(by_environment).await.refused(78, &[shown(&missing)]);
    assert!(play.world.log().is_empty());
    assert!(!is_there(&play.path("state")));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_archives_on_one_folder_by_a_link_are_refused_before_anything_is_touched() {
    let (play, ids) = Play::five(NIGHTLY).await;
    std::fs::create_dir(play.path("data")).unwrap();
    std::os::unix::fs::symlink(play.path("data"), play.path("link")).unwrap();
    for (one, other) in
        [("data", "link"), ("link", "data/inside"), ("link/inside", "data"), ("link/new", "data/new")]
    {
        let archive = |name: &str, folder: &str| {
            format!("[archives.{name}]\ntype = \"local\"\npath = \"{}\"\n", shown(&play.path(folder)))
        };
        let export = "[policies.nightly.export]\narchives = [\"first\", \"second\"]\n";
        play.configure(&format!("{PRUNE}{export}{}{}", archive("first", one), archive("second", other)));
        for arguments in [["check"].as_slice(), &["once"], &["plan"], &["run"], &["archive", "list"]] {
            let said = play.run(arguments).await;
            said.refused(78, &["`first`", "`second`", shown(&play.path(one)), "of its own"]);
        }
    }
    assert_eq!(play.there().len(), ids.len());
    assert!(
        play.world.log().is_empty() && !is_there(&play.path("state")) && files(&play.path("data")).is_empty()
    );
}

const WEB: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";
const DB: &str = "1b1c9d9e-0b43-4b23-9b2f-6f7f4b2a9a01";
const AT: &str = "2026-11-01T12:00:00Z";

/// The id of a snapshot in a file.
fn id(number: u32) -> String {
    format!("00000000-0000-4000-8000-{number:012}")
}

/// A snapshot as list-snapshots has it.
fn listed(number: u32, created_at: &str, state: &str, instance: Option<&str>) -> Value {
    let mut snapshot = json!({
        "id": id(number), "name": format!("snap-{number}"), "created-at": created_at, "state": state, "size": 50,
    });
    if let Some(instance) = instance {
        snapshot["instance"] = json!({ "id": instance });
    }
    snapshot
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_of_files_needs_no_network_and_prints_what_scripts_rely_on() {
    let play = Play::new().await;
    // Nothing listens there.
    play.configure_with(
        "endpoint = \"http://127.0.0.1:1/{zone}/v2\"",
        "[policies.nightly]\nzones = [\"ch-gva-2\", \"de-fra-1\", \"at-vie-1\"]\n[policies.nightly.retention]\n\
         keep_last = 1\nkeep_within = \"2d\"\nmax_age = \"10d\"\n[policies.nightly.export]\narchives = [\"vault\"]\n",
    );
    let gva = play.path("gva.json");
    write(
        &gva,
        &json!({"snapshots": [
            listed(1, "2026-10-20T12:00:00Z", "exported", Some(WEB)),
            listed(2, "2026-10-31T12:00:00Z", "exported", Some(WEB)),
            listed(3, "2026-11-01T11:00:00Z", "ready", Some(WEB)),
            listed(4, "2026-11-01T11:30:00Z", "snapshotting", Some(WEB)),
            listed(5, "2026-10-28T12:00:00Z", "exported", Some(DB)),
            listed(6, "2026-10-27T12:00:00Z", "exported", Some(DB)),
            listed(7, "2026-11-03T12:00:00Z", "exported", Some(DB)),
            listed(8, "2026-10-01T12:00:00Z", "exported", None),
        ]})
        .to_string(),
    );
    let instances = play.path("instances.json");
    write(
        &instances,
        &json!({"instances": [{"id": WEB, "name": "web-1"}, {"id": DB, "name": "db-1"}]}).to_string(),
    );
    let gva_zone = format!("ch-gva-2={}", shown(&gva));
    let instances_zone = format!("ch-gva-2={}", shown(&instances));
    let offline = ["plan", "--at", AT, "--output", "json", "--snapshots"];
    let with = [&offline[..], &[&gva_zone, "--instances", &instances_zone]].concat();
    let said = end_of(play.stranger(&with)).await;
    assert_eq!((said.status, said.err.as_str()), (0, ""), "{said:?}");
    let json = said.json();
    assert_eq!(json["at"], AT);
    let policies = json["policies"].as_array().unwrap();
    assert_eq!(policies.len(), 1, "zones without a file are left out: {json}");
    let keys = |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
    assert_eq!(keys(&json), ["at", "policies"]);
    assert_eq!(keys(&policies[0]), ["decisions", "held", "policy", "zone"]);
    assert_eq!((&policies[0]["policy"], &policies[0]["zone"]), (&json!("nightly"), &json!("ch-gva-2")));
    assert_eq!(policies[0]["held"], Value::Null);
    let decisions = policies[0]["decisions"].as_array().unwrap();
    for decision in decisions {
        let expected =
            ["application_consistent", "blocked_by", "expires_at", "reasons", "rule", "snapshot", "verdict"];
        assert_eq!(keys(decision), expected);
        assert_eq!(
            keys(&decision["snapshot"]),
            ["created_at", "id", "instance_id", "instance_name", "name", "size_gib", "state"]
        );
        assert!(!decision["reasons"].as_array().unwrap().is_empty(), "{decision}");
    }
    let short = |decision: &Value| {
        let word = |value: &Value| value.as_str().unwrap_or("-").to_owned();
        let of = &decision["snapshot"];
        (
            word(&of["name"]),
            word(&of["instance_name"]),
            word(&decision["verdict"]),
            word(&decision["rule"]),
            word(&decision["expires_at"]),
        )
    };
    let expected: Vec<_> = [
        // Within an instance the newest comes first.
        ("snap-7", "db-1", "ignore", "future", "-"),
        // Until the one from the future counts.
        ("snap-5", "db-1", "keep", "keep_last", "2026-11-03T11:55:00Z"),
        ("snap-6", "db-1", "delete", "keep", "-"),
        ("snap-4", "web-1", "ignore", "state", "-"),
        ("snap-3", "web-1", "keep", "keep_last", "-"),
        // Exactly as old as the limit is still kept: deleted a second later.
        ("snap-2", "web-1", "keep", "keep_within", "2026-11-02T12:00:01Z"),
        ("snap-1", "web-1", "delete", "keep", "-"),
        ("snap-8", "-", "ignore", "orphan", "-"),
    ]
    .map(|(name, instance, verdict, rule, expires)| {
        (name.to_owned(), instance.to_owned(), verdict.to_owned(), rule.to_owned(), expires.to_owned())
    })
    .to_vec();
    let mut got: Vec<_> = decisions.iter().map(short).collect();
    // In which order instances come is nobody's business.
    got.sort_by_key(|decision| decision.1.clone());
    let mut sorted = expected.clone();
    sorted.sort_by_key(|decision| decision.1.clone());
    assert_eq!(got, sorted, "{json:#}");
    let first = decisions.iter().find(|decision| decision["snapshot"]["id"] == id(3)).unwrap();
    assert_eq!(
        first["snapshot"],
        json!({"id": id(3), "name": "snap-3", "created_at": "2026-11-01T11:00:00Z", "state": "ready",
            "size_gib": 50, "instance_id": WEB, "instance_name": "web-1"})
    );

    // Several zones, and the file without a zone stands for the first; no instances: every one named is there.
    let fra = play.path("fra.json");
    write(
        &fra,
        &json!({"snapshots": [listed(9, "2026-11-01T11:00:00Z", "exported", Some(WEB))]}).to_string(),
    );
    let fra_zone = format!("de-fra-1={}", shown(&fra));
    let said =
        end_of(play.stranger(&[&offline[..], &[shown(&gva), "--snapshots", &fra_zone]].concat())).await;
    assert_eq!(said.status, 0, "{said:?}");
    let json = said.json();
    let zones: Vec<&str> =
        json["policies"].as_array().unwrap().iter().map(|one| one["zone"].as_str().unwrap()).collect();
    assert_eq!(zones, ["ch-gva-2", "de-fra-1"]);
    let sums = |value: &Value| {
        let decisions = value["decisions"].as_array().unwrap();
        let count = |word: &str| decisions.iter().filter(|decision| decision["verdict"] == word).count();
        (count("keep"), count("delete"), count("ignore"))
    };
    assert_eq!((sums(&json["policies"][0]), sums(&json["policies"][1])), ((3, 2, 3), (1, 0, 0)), "{json:#}");

    // An instance that is not listed any more: its snapshots are orphans.
    write(&instances, &json!({"instances": [{"id": WEB, "name": "web-1"}]}).to_string());
    let json = end_of(play.stranger(&with)).await.json();
    assert_eq!(sums(&json["policies"][0]), (2, 1, 5), "{json:#}");

    // The ends of time.
    for at in ["1970-01-01T00:00:00Z", "9999-12-30T00:00:00Z"] {
        for format in ["text", "json"] {
            let said =
                end_of(play.stranger(&["plan", "--at", at, "--output", format, "--snapshots", shown(&gva)]))
                    .await;
            assert_eq!((said.status, said.err.as_str()), (0, ""), "{at}: {said:?}");
            assert!(said.out.contains("snap-8"), "{said:?}");
        }
    }
    assert!(!is_there(&play.path("state")) && !is_there(&play.path("vault")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_no_listing_is_named_and_exits_with_1() {
    let play = Play::new().await;
    play.configure(PRUNE);
    let good = json!({"snapshots": [listed(1, "2026-10-20T12:00:00Z", "exported", Some(WEB))]}).to_string();
    let twice = listed(1, "2026-10-20T12:00:00Z", "exported", Some(WEB));
    let instances = |list: Value| json!({ "instances": list }).to_string();
    let (file, other) = (play.path("snapshots.json"), play.path("instances.json"));
    let fine_instances = instances(json!([{"id": WEB, "name": "web-1"}]));
    for (snapshots, listing, named) in [
        (None, fine_instances.clone(), &file),
        (Some(String::new()), fine_instances.clone(), &file),
        (Some("[]".to_owned()), fine_instances.clone(), &file),
        (Some(good[..good.len() - 10].to_owned()), fine_instances.clone(), &file),
        (Some("<!DOCTYPE html><h1>Please sign in</h1>".to_owned()), fine_instances.clone(), &file),
        (Some(json!({"snapshots": [twice, twice]}).to_string()), fine_instances.clone(), &file),
        (Some(format!("{good}{good}")), fine_instances.clone(), &file),
        (Some(good.clone()), instances(json!([{"name": "web-1"}])), &other),
        (Some(good.clone()), instances(json!([{"id": WEB}, {"id": WEB}])), &other),
    ] {
        let _ = RealDisk.remove_file(&file);
        if let Some(snapshots) = &snapshots {
            write(&file, snapshots);
        }
        write(&other, &listing);
        let arguments = ["plan", "--at", AT, "--snapshots", shown(&file), "--instances", shown(&other)];
        end_of(play.stranger(&arguments)).await.refused(1, &[shown(named)]);
    }
}

/// Names that somebody chose who means harm.
const HOSTILE: [&str; 8] = [
    "../../../../x",
    "\"'`$(touch x)&|;",
    "a\nb\r\nlevel=error c",
    "\u{1b}[2J\u{1b}]0;x\u{7}",
    "\u{9b}31m\u{0}\u{7f}",
    "\u{202e}txt\u{2066}\u{200b}\u{feff}",
    "<script>alert(1)</script>",
    "/etc/passwd",
];

/// Nothing that moves a cursor, breaks a line, or turns the reading direction.
fn is_clean(text: &str) -> bool {
    !text.chars().any(|character| {
        (character.is_control() && character != '\n')
            || matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_names_reach_no_terminal_log_or_path_and_come_back_unchanged() {
    let play = Play::new().await;
    let mut newest = Vec::new();
    for name in HOSTILE {
        let (_, ids) = play.instance(name, 3, 24);
        for id in &ids {
            play.world.set_name(*id, name);
        }
        newest.push(ids[0]);
    }
    // One with a state that nobody knows, one that fails: both are spoken of.
    let odd = play.world.snapshots(&play.zone)[0].id;
    play.world.set_state(odd, SnapshotState::Unknown("\u{1b}[2J\u{202e}".into()));
    let failing = newest[3];
    play.world.fault(
        Fault::on(Call::DeleteSnapshot, Effect::fails_inline("fault", "\u{1b}[2J\nlevel=error \u{9b}31m"))
            .times(1),
    );
    play.world
        .fault(Fault::on(Call::PromoteSnapshot, Effect::status(400, "\u{1b}[2J\u{202e}\n")).of(failing.0));
    play.configure(&NIGHTLY.replace("max_count = 10", "max_count = 2"));

    for (format, log) in [("text", "text"), ("json", "json"), ("text", "json")] {
        for arguments in [["plan"].as_slice(), &["once", "-v"], &["archive", "list"], &["plan", "-vvv"]] {
            let said = play
                .run(&[arguments, &["--output", format, "--log-format", log, "--color", "never"]].concat())
                .await;
            assert!(said.status <= 1, "{arguments:?}: {said:?}");
            assert!(is_clean(&said.out), "{arguments:?}: {:?}", said.out);
            assert!(is_clean(&said.err), "{arguments:?}: {:?}", said.err);
            // A line of the log is one line: nobody else writes into it.
            assert!(!said.err.lines().any(|line| line.starts_with("level=")), "{:?}", said.err);
            if log == "json" {
                for line in said.err.lines().filter(|line| !line.starts_with("snapwarden: ")) {
                    serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
                }
            }
            if format == "json" && arguments[0] == "plan" {
                let json = said.json();
                let decisions = json["policies"][0]["decisions"].as_array().unwrap();
                for (name, id) in HOSTILE.into_iter().zip(&newest) {
                    let of = &decisions.iter().find(|one| one["snapshot"]["id"] == id.to_string()).unwrap()["snapshot"];
                    assert_eq!((&of["name"], &of["instance_name"]), (&json!(name), &json!(name)));
                }
            }
            if format == "json" && arguments[0] == "archive" {
                let json = said.json();
                let images = json[0]["images"].as_array().unwrap();
                assert_eq!(images.len(), HOSTILE.len());
                for (name, id) in HOSTILE.into_iter().zip(&newest) {
                    let of = images.iter().find(|one| one["snapshot_id"] == id.to_string()).unwrap();
                    assert_eq!((&of["snapshot_name"], &of["instance_name"]), (&json!(name), &json!(name)));
                }
            }
        }
    }
    let odd_path = play.path("\u{1b}[2J\u{202e}.toml");
    write(&odd_path, &read(&play.path("snapwarden.toml")));
    let said = end_of(bare(&["check", "--config", shown(&odd_path)])).await;
    assert_eq!(said.status, 0, "{said:?}");
    assert!(is_clean(&said.out), "{said:?}");
    RealDisk.remove_file(&odd_path).unwrap();

    assert_eq!(play.there().len(), 2 * HOSTILE.len() + 1, "two of each, and the odd one");
    let audit = play.audit();
    assert!(is_clean(&read(&play.path("state/audit.jsonl"))));
    assert!(audit.iter().any(|line| line["snapshot"]["name"] == HOSTILE[4]));
    // Paths are made of ids and times alone.
    for (path, _) in files(play.folder.path()) {
        let below = shown(path.strip_prefix(play.folder.path()).unwrap());
        assert!(
            ["snapwarden.toml", "vault/snapwarden-archive.json"].contains(&below)
                || below.starts_with("state/")
                || below.starts_with("vault/snapwarden-audit-")
                || below.starts_with("vault/ch-gva-2/"),
            "{below}"
        );
        assert!(
            below.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"./-_".contains(&byte)),
            "{below:?}"
        );
    }
    let templates = play.world.templates(&play.zone);
    assert!(templates.iter().all(|template| is_clean(&template.name)), "{templates:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn state_that_cannot_be_read_is_named_and_nothing_is_deleted() {
    for (content, words) in [
        ("{\"version\": 1, \"promo", vec!["policy-nightly.json", "damaged", "backup"]),
        ("", vec!["policy-nightly.json", "damaged"]),
        ("{\"version\": 3, \"moons\": []}", vec!["policy-nightly.json", "version 3", "later snapwarden"]),
    ] {
        let (play, _) = Play::five(&NIGHTLY.replace("max_count = 10", "max_count = 2")).await;
        RealDisk.create_dir_all(&play.path("state"), Access::Owner).unwrap();
        write(&play.path("state/policy-nightly.json"), content);
        let said = play.run(&["once"]).await;
        assert_eq!(said.status, 1, "{said:?}");
        said.complained(&words);
        assert_eq!(play.there().len(), 5, "{content}: {said:?}");
        assert_eq!(read(&play.path("state/policy-nightly.json")), content, "it is left as it was");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_cannot_be_written_is_named_and_nothing_is_deleted() {
    let (play, ids) = Play::five(PRUNE).await;
    write(&play.path("state"), "somebody's own");
    let state = play.path("state");
    play.run(&["once"]).await.refused(1, &[shown(&state), "folder", "[state]"]);
    let newest = ids[0].to_string();
    let promote = ["promote", &newest, "--zone", "ch-gva-2", "--name", "golden"];
    play.run(&promote).await.refused(1, &[shown(&state)]);
    assert!(play.world.changes().is_empty());
    assert_eq!(read(&state), "somebody's own");

    let policy = NIGHTLY.replace("max_count = 10", "max_count = 2");
    let (play, _) = Play::five(&policy).await;
    let vault = play.path("vault");
    write(&vault, "somebody's own");
    let said = play.run(&["once"]).await;
    assert_eq!(said.status, 1, "{said:?}");
    said.complained(&["vault"]);
    assert_eq!(play.there().len(), 5, "{said:?}");
    let said = play.run(&["archive", "list"]).await;
    assert_eq!(said.status, 1, "{said:?}");
    said.complained(&["archive vault", shown(&vault)]);
    let said = play.run(&["check", "--online"]).await;
    assert_eq!(said.status, 1, "{said:?}");
    assert!(said.out.contains("archive vault"), "{said:?}");

    let (play, _) = Play::five(&policy).await;
    let vault = play.path("vault");
    RealDisk.create_dir_all(&vault, Access::Owner).unwrap();
    set_mode(&vault, 0o555);
    if RealDisk.append(&vault.join("probe"), b"", Access::Owner).is_ok() {
        crate::stage::skipped(format_args!(
            "this user may write everywhere, so a read-only archive was not tried"
        ));
    } else {
        let said = play.run(&["once"]).await;
        assert_eq!(said.status, 1, "{said:?}");
        said.complained(&[shown(&vault)]);
        assert_eq!(play.there().len(), 5, "{said:?}");
    }
    set_mode(&vault, 0o755);
}

pub(crate) fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn promote_makes_one_template_and_prints_its_id() {
    let (play, ids) = Play::five(PRUNE).await;
    let promote_as = |name: &str, id: &str, more: &[&str]| {
        let all = [&["promote", id, "--zone", "ch-gva-2", "--name", name], more].concat();
        play.command(&all)
    };
    let promote = |id: &str, more: &[&str]| promote_as("golden-2", id, more);
    let said = end_of(promote_as("golden", &ids[0].to_string(), &[])).await;
    assert_eq!(said.status, 0, "{said:?}");
    let template = play.world.templates(&play.zone)[0].clone();
    assert_eq!(said.out, format!("template {} (golden) in zone ch-gva-2\n", template.id));
    let said = end_of(promote(&ids[1].to_string(), &["--output", "json"])).await;
    let made = play.world.templates(&play.zone).into_iter().find(|made| made.id != template.id).unwrap();
    assert_eq!(
        said.json(),
        json!({"zone": "ch-gva-2", "snapshot_id": ids[1], "template_id": made.id, "template_name": "golden-2"})
    );
    let again = end_of(promote_as("golden", &ids[0].to_string(), &[])).await;
    again.refused(1, &["already has a template named golden", &template.id.to_string(), "another name"]);
    let outcomes: Vec<Value> = play.audit().iter().map(|line| line["outcome"].clone()).collect();
    assert_eq!(outcomes, ["intended", "done", "intended", "done"]);

    let promote = |id: &str, more: &[&str]| promote_as("golden-3", id, more);
    let unknown = id(404);
    end_of(promote(&unknown, &[])).await.refused(1, &[&unknown, "ch-gva-2"]);
    play.world.set_state(ids[2], SnapshotState::Error);
    end_of(promote(&ids[2].to_string(), &[])).await.refused(1, &[&ids[2].to_string(), "`error`"]);
    assert_eq!(play.world.templates(&play.zone).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn help_completions_and_the_manual_page_are_data() {
    for (arguments, word) in [
        (vec!["--help"], "Usage"),
        (vec!["--version"], "snapwarden"),
        (vec!["once", "--help"], "--allow-deletes"),
        (vec!["archive", "list", "--help"], "ARCHIVE"),
        (vec!["completions", "bash"], "complete"),
        (vec!["completions", "zsh"], "compdef"),
        (vec!["completions", "fish"], "complete"),
        (vec!["man"], ".TH"),
    ] {
        let said = end_of(bare(&arguments)).await;
        assert_eq!((said.status, said.err.as_str()), (0, ""), "{arguments:?}: {said:?}");
        assert!(said.out.contains(word), "{arguments:?}: {said:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_manual_pages_are_well_formed_and_fit_80_columns() {
    let folder = tempfile::tempdir().unwrap();
    let written = end_of(bare(&["man", "--directory", folder.path().to_str().unwrap()])).await;
    assert_eq!((written.status, written.out.as_str(), written.err.as_str()), (0, "", ""));
    let pages = files(folder.path());
    let page = |name: &str| read(&folder.path().join(name));
    for (name, file) in [
        (None, "man1/snapwarden.1"),
        (Some("once"), "man1/snapwarden-once.1"),
        (Some("snapwarden-archive-list"), "man1/snapwarden-archive-list.1"),
        (Some("snapwarden.toml"), "man5/snapwarden.toml.5"),
    ] {
        let arguments: Vec<&str> = ["man"].into_iter().chain(name).collect();
        assert_eq!(end_of(bare(&arguments)).await.out, page(file), "{file}");
    }
    end_of(bare(&["man", "onec"])).await.refused(2, &["onec", "once", "archive-list", "snapwarden.toml"]);
    end_of(bare(&["man", "--directory", "/proc"])).await.refused(1, &["/proc/man1"]);

    let mut missing = BTreeSet::new();
    let mut run = |program: &'static str, arguments: &[&str], path: &Path| {
        let said = Command::new(program).args(arguments).arg(path).output().ok();
        // A small installation has no macros for pages.
        let said = said.filter(|said| !String::from_utf8_lossy(&said.stderr).contains("find macro file"));
        if said.is_none() {
            missing.insert(program);
        }
        said.map(|said| [said.stdout, said.stderr].map(|text| String::from_utf8(text).unwrap()))
    };
    for (path, _) in &pages {
        if let Some([lint, _]) = run("mandoc", &["-T", "lint", "-W", "warning"], path) {
            // There is no date that a build could know.
            let bad: Vec<&str> = lint.lines().filter(|line| !line.contains("missing date")).collect();
            assert!(bad.is_empty(), "{bad:#?}");
        }
        let plain = ["-man", "-ww", "-Tutf8", "-rLL=80n", "-P-c", "-P-b", "-P-o", "-P-u"];
        if let Some([text, warnings]) = run("groff", &plain, path) {
            assert_eq!(warnings, "", "{}", path.display());
            for line in text.lines() {
                let is_whole = line.chars().count() <= 80 && !line.ends_with('\u{2010}');
                assert!(is_whole, "{}: {line}", path.display());
            }
        }
    }
    for program in missing {
        skipped(format_args!("the manual pages by {program}, which is not installed"));
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    for arguments in [["completions", "zsh"].as_slice(), &["man"], &["--help"]] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_snapwarden"))
            .args(arguments)
            .env_clear()
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // Gone before a byte is written, or in the middle of it.
        drop(child.stdout.take());
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(0), "{ended:?}");
        assert!(ended.stderr.is_empty(), "{ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_environment_overrides_the_endpoint_of_the_configuration() {
    let (play, _) = Play::five(PRUNE).await;
    play.configure_with("endpoint = \"http://127.0.0.1:1/{zone}/v2\"", PRUNE);
    let mut command = play.command(&["plan", "--output", "json"]);
    command.env("EXOSCALE_API_ENDPOINT", play.served.endpoint());
    let said = end_of(command).await;
    assert_eq!(said.status, 0, "{said:?}");
    assert_eq!(said.json()["policies"][0]["decisions"].as_array().unwrap().len(), 5);
    // An empty one does not count; one that is none is named.
    play.configure(PRUNE);
    let mut command = play.command(&["plan"]);
    command.env("EXOSCALE_API_ENDPOINT", "");
    assert_eq!(end_of(command).await.status, 0);
    let mut command = play.command(&["plan"]);
    command.env("EXOSCALE_API_ENDPOINT", "http://api.example/{zone}");
    end_of(command).await.refused(78, &["EXOSCALE_API_ENDPOINT", "http"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn state_is_kept_where_systemd_says_if_the_configuration_does_not() {
    let (play, _) = Play::five(PRUNE).await;
    let text = read(&play.path("snapwarden.toml"));
    let lines = text.lines().filter(|line| *line != "[state]" && !line.starts_with("directory"));
    write(&play.path("snapwarden.toml"), &lines.collect::<Vec<_>>().join("\n"));
    let mut command = play.command(&["once"]);
    command.env("STATE_DIRECTORY", play.path("given"));
    let said = end_of(command).await;
    assert_eq!(said.status, 0, "{said:?}");
    assert!(is_there(&play.path("given/audit.jsonl")) && !is_there(&play.path("state")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_with_nothing_enabled_says_that_nothing_was_done() {
    let (play, _) = Play::five(&PRUNE.replace("zones", "enabled = false\nzones")).await;
    for arguments in [["once"], ["plan"]] {
        let said = play.run(&arguments).await;
        assert_eq!(said.status, 0, "{said:?}");
        said.complained(&["no policy is enabled"]);
        let named = play.run(&[arguments[0], "nightly"]).await;
        named.refused(2, &["policy `nightly` is not enabled"]);
    }
    assert!(play.world.log().is_empty());
}

/// Takes one first, and keeps the newest two of its own.
const CREATE: &str = "[policies.nightly]\nzones = [\"ch-gva-2\"]\ncreate = true\n[policies.nightly.retention]\nkeep_last = 2\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_counts_what_the_run_would_take_first_and_the_run_takes_it() {
    let (play, _) = Play::five(&CREATE.replace(
        "[policies.nightly.ret",
        "[policies.nightly.select]\nownership = \"all\"\n[policies.nightly.ret",
    ))
    .await;
    let told = |plan: &Value| -> Vec<String> {
        let decisions = plan["policies"][0]["decisions"].as_array().unwrap().iter();
        decisions
            .map(|one| format!("{} {}", one["verdict"].as_str().unwrap(), one["rule"].as_str().unwrap()))
            .collect()
    };
    let expected =
        ["keep create", "keep keep_last", "delete keep", "delete keep", "delete keep", "delete keep"];
    let online = play.run(&["plan", "--output", "json"]).await;
    assert_eq!(told(&online.json()), expected, "{online:?}");
    let first = &online.json()["policies"][0]["decisions"][0];
    assert_eq!((&first["snapshot"]["id"], &first["expires_at"]), (&json!(null), &json!(null)));
    assert_eq!(first["snapshot"]["instance_name"], "web-1");
    let text = play.run(&["plan"]).await.out;
    assert!(text.contains("(to be taken)") && text.contains("1 snapshot to be taken first"), "{text}");
    assert!(text.contains("5 snapshots: 1 kept, 4 to delete, 0 ignored"), "{text}");

    let once = play.run(&["once"]).await;
    assert_eq!((once.status, play.there().len()), (0, 2), "{once:?}");
    assert!(once.out.contains("1 created") && once.out.contains("create"), "{once:?}");
    // From now on only its own: the other one counts for nothing.
    play.configure(CREATE);
    let online = play.run(&["plan", "--output", "json"]).await;
    assert_eq!(told(&online.json()), ["keep create", "keep keep_last", "ignore foreign"], "{online:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_lists_each_zone_once_for_all_policies_and_for_a_candidate() {
    let second = PRUNE.replace("nightly", "weekly").replace('2', "3").replace("ch-gva-3", "ch-gva-2");
    let (play, ids) = Play::five(&[PRUNE, &second].concat()).await;
    let candidate = play.path("candidate.toml");
    let present = read(&play.path("snapwarden.toml"));
    write(
        &candidate,
        &present.replace("max_count = 2", "max_count = 4").replace("max_count = 3", "max_count = 4"),
    );
    let listings = || {
        let of_listings = |call: &Call| [Call::ListSnapshots, Call::ListInstances].contains(call);
        let calls: Vec<Call> =
            play.world.log().iter().map(|exchange| exchange.call).filter(of_listings).collect();
        play.world.clear_log();
        calls.len()
    };
    let looked = play.run(&["plan", "--output", "json"]).await;
    assert_eq!((looked.status, looked.json()["policies"].as_array().unwrap().len()), (0, 2), "{looked:?}");
    assert_eq!(listings(), 2);
    let said = play.run(&["plan", "--candidate", shown(&candidate), "--output", "json"]).await;
    assert_eq!((said.status, said.err.as_str()), (0, ""), "{said:?}");
    assert_eq!(listings(), 2);
    // Both let the oldest two go; the candidate only the oldest.
    let json = said.json();
    for policy in [0, 1] {
        let changes = json["policies"][policy]["changes"].as_array().unwrap();
        assert_eq!(changes.len(), 1, "{json:#}");
        assert_eq!(changes[0]["snapshot"]["id"], ids[3].to_string());
        assert_eq!(
            (&changes[0]["now"]["verdict"], &changes[0]["candidate"]["verdict"]),
            (&json!("delete"), &json!("keep"))
        );
    }
    assert!(play.world.changes().is_empty() && !is_there(&play.path("state")));
}

#[tokio::test(flavor = "multi_thread")]
async fn on_paper_all_snapshots_count_as_its_own() {
    let play = Play::new().await;
    play.configure(CREATE);
    let listing = play.path("snapshots.json");
    let snapshots: Vec<Value> =
        (1..=3).map(|day| listed(day, &format!("2026-09-0{day}T00:00:00Z"), "exported", Some(WEB))).collect();
    write(&listing, &json!({ "snapshots": snapshots }).to_string());
    let at = ["plan", "--at", "2026-09-05T00:00:00Z", "--output", "json", "--snapshots", shown(&listing)];
    let said = end_of(play.stranger(&at)).await;
    let decisions = said.json()["policies"][0]["decisions"].as_array().unwrap().clone();
    let rules: Vec<_> = decisions.iter().map(|one| one["rule"].as_str().unwrap()).collect();
    assert_eq!(rules, ["create", "keep_last", "keep", "keep"], "{said:?}");
    assert!(decisions[0]["snapshot"]["id"].is_null());
}

#[tokio::test(flavor = "multi_thread")]
async fn check_warns_where_a_configuration_invites_a_loss_and_exits_with_0() {
    let (play, _) = Play::five(PRUNE).await;
    let expected = "policy `nightly` deletes snapshots in ch-gva-2 that no policy exports: ";
    let said = end_of(play.stranger(&["check"])).await;
    assert_eq!(said.status, 0, "{said:?}");
    assert!(said.out.contains(&format!("\nwarning: {expected}")), "{said:?}");
    let said = end_of(play.stranger(&["check", "--output", "json"])).await;
    assert_eq!(said.status, 0, "{said:?}");
    let warnings = said.json()["warnings"].as_array().unwrap().clone();
    assert!(warnings.len() == 1 && warnings[0].as_str().unwrap().starts_with(expected), "{said:?}");
    play.configure("[policies.lists]\nzones = [\"ch-gva-2\"]\n");
    let said = end_of(play.stranger(&["check", "--output", "json"])).await;
    assert_eq!(said.json()["warnings"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn check_tells_of_creation_and_tries_what_it_needs() {
    let (play, _) = Play::five(CREATE).await;
    let checked = play.run(&["check", "--output", "json"]).await.json();
    assert_eq!(checked["policies"][0]["does"], json!(["create", "prune"]));
    let tried = play.run(&["check", "--online"]).await;
    assert_eq!(tried.status, 0, "{tried:?}");
    assert!(tried.out.contains("create-snapshot") && tried.out.contains("get-quota"), "{tried:?}");
    assert_eq!(play.there().len(), 5);
    let forbidden = Effect::status(403, "Forbidden by role policy for compute");
    play.world.fault(Fault::on(Call::CreateSnapshot, forbidden));
    let tried = play.run(&["check", "--online"]).await;
    assert!(tried.status == 1 && tried.out.contains("allow `create-snapshot`"), "{tried:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn at_80_columns_no_value_is_broken_inside_and_no_action_is_printed_twice() {
    let name = "database-primary-of-the-shop";
    let play = Play::new().await;
    play.instance(name, 14, 24);
    play.configure(NIGHTLY);
    let other = play.path("other.toml");
    write(&other, &read(&play.path("snapwarden.toml")).replace("max_count = 10", "max_count = 3"));
    let candidate = ["plan", "--candidate", shown(&other)];
    for arguments in [&["plan"][..], &candidate, &["once"]] {
        let mut command = play.command(arguments);
        command.env("COLUMNS", "80");
        let said = end_of(command).await;
        assert_eq!(said.status, 0, "{said:?}");
        for line in said.out.lines() {
            assert!(line.chars().count() <= 80, "{arguments:?}: {line}\n{}", said.out);
            let words = line.split([' ', '(', ',']).filter(|word| word.starts_with("database"));
            for word in words {
                assert!(word.starts_with(name), "{arguments:?}: {line}\n{}", said.out);
            }
            // A date has a time behind it, or is one of `UNTIL`.
            for word in line.split_whitespace().filter(|word| word.starts_with("20") && word.contains('-')) {
                assert!(word.len() >= "2026-11-28".len(), "{arguments:?}: {line}\n{}", said.out);
            }
        }
    }
    let deletions =
        play.audit().iter().filter(|line| line["action"] == "delete" && line["outcome"] == "done").count();
    assert_eq!(deletions, 4);
    // Where stdout and stderr are one file, the report alone has them, unless more is asked for.
    let together = play.path("together");
    let program = env!("CARGO_BIN_EXE_snapwarden");
    for (number, more) in ["", "-v"].iter().enumerate() {
        play.instance(&format!("web-{number}"), 14, 24);
        let config = play.path("snapwarden.toml");
        let line = format!("{program} --config {} once {more} > {} 2>&1", shown(&config), shown(&together));
        let mut shell = assert_cmd::Command::new("sh");
        shell.args(["-c", &line]).env("EXOSCALE_API_KEY", API_KEY).env("EXOSCALE_API_SECRET", API_SECRET);
        let said = end_of(shell).await;
        let text = read(&together);
        assert_eq!(said.status, 0, "{text}");
        assert!(text.contains("  delete   done    web-"), "{text}");
        assert_eq!(text.contains("deleted snapshot web-"), *more == "-v", "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_json_logs_all_that_stderr_gets_is_json_of_one_shape() {
    let (play, _) = Play::five(NIGHTLY).await;
    play.world.fault(Fault::on(Call::ExportSnapshot, Effect::status(403, "no\nway")));
    let lines = |said: &Said| -> Vec<Value> {
        said.err.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect()
    };
    let said = play.run(&["--log-format", "json", "once"]).await;
    let all = lines(&said);
    assert!(all.iter().all(|line| line["policy.name"] == "nightly" && line["run.id"].is_string()), "{all:?}");
    let errors: Vec<&Value> = all.iter().filter(|line| line["level"] == "ERROR").collect();
    assert_eq!(errors.len(), 1, "a failed run is one error: {all:?}");
    assert!(errors[0]["message"].as_str().unwrap().contains("no\\u{a}way"), "{errors:?}");

    let refused = lines(&play.run(&["--log-format", "json", "once", "no-such-policy"]).await);
    let [line] = &refused[..] else { panic!("{refused:?}") };
    assert!(line["level"] == "ERROR" && line["timestamp"].is_string(), "{line}");
    assert!(line["message"].as_str().unwrap().contains("no-such-policy"), "{line}");
}
