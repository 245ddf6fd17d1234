//! Copies in an archive over time: verified again, found corrupt, pruned, and the verdict of the export gate.

use std::path::PathBuf;
use std::sync::Arc;

use http::StatusCode;
use jiff::SignedDuration;
use snapwarden::clock::SystemClock;
use snapwarden::disk::{Access, Disk as _, Open, RealDisk};

use snapwarden::run::list::ListingCache;
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::world::World;
use snapwarden::state::audit::{Action, StepOutcome};

use crate::stage::{Said, Stage, ended, files, read, steps};

/// All that stays is exported, and the archive keeps two.
const KEEP_TWO: &str = r#"
[archives.vault.retention]
keep_last = 2
[archives.vault.guard]
settle = "0s"
[policies.nightly]
zones = ["ch-gva-2"]
[policies.nightly.retention]
keep_last = 10
[policies.nightly.guard]
max_delete_percent = 100
settle = "0s"
[policies.nightly.export]
archives = ["vault"]
snapshots = "all"
"#;

/// The program itself over the stage's files, without any credentials.
pub(crate) fn said(stage: &Stage, policies: &str, arguments: &[&str]) -> Said {
    // Nobody listens there.
    said_beside("http://127.0.0.1:1/{zone}/v2", stage, policies, arguments)
}

/// The same, with an API at hand.
fn said_beside(endpoint: &str, stage: &Stage, policies: &str, arguments: &[&str]) -> Said {
    let path = stage.folder.path().join("snapwarden.toml");
    snapwarden::disk::replace_file(&RealDisk, &path, stage.config(policies).as_bytes(), Access::Owner)
        .unwrap();
    let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_snapwarden"));
    command.env_clear().env("EXOSCALE_API_ENDPOINT", endpoint);
    let ended = command.arg("--config").arg(path).args(arguments).output().unwrap();
    Said::of(ended)
}

/// An API whose clock is right, on a thread of its own.
struct Api {
    world: World,
    endpoint: String,
    _ends: std::sync::mpsc::Sender<()>,
}

impl Api {
    fn of_now() -> Self {
        let world = World::new(Arc::new(SystemClock::start()), 1);
        world.add_zone("ch-gva-2");
        let served = world.clone();
        let (tell, told) = std::sync::mpsc::channel();
        let (ends, end) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
            let runtime = runtime.unwrap();
            let served = runtime.block_on(served.serve(([127, 0, 0, 1], 0).into())).unwrap();
            tell.send(served.endpoint()).unwrap();
            let _ = end.recv();
        });
        Self { world, endpoint: told.recv().unwrap(), _ends: ends }
    }
}

/// The images that the archive has.
fn image_files(stage: &Stage) -> Vec<(PathBuf, Vec<u8>)> {
    let is_image = |path: &PathBuf| path.extension().is_some_and(|end| end == "qcow2");
    files(&stage.archive()).into_iter().filter(|(path, _)| is_image(path)).collect()
}

/// How many images the archive has.
fn images(stage: &Stage) -> usize {
    image_files(stage).len()
}

/// Changes one bit in the middle of the first image.
fn flip(stage: &Stage) {
    let (path, bytes) = image_files(stage).swap_remove(0);
    let middle = bytes.len() / 2;
    let file = RealDisk.open(&path, Open::Update, Access::Group).unwrap();
    file.write_all_at(&[bytes[middle] ^ 1], middle as u64).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_run_that_stored_something_prunes_the_archive_and_the_gate_still_knows_of_it() {
    let stage = Stage::new();
    stage.instance("web-1", 5);
    let report = stage.run(KEEP_TWO).await;
    assert_eq!(ended(&report, Action::Export, StepOutcome::Done), 5);
    assert_eq!(ended(&report, Action::PruneCopy, StepOutcome::Done), 3);
    assert_eq!(images(&stage), 2);
    let told: Vec<_> = stage.audit().iter().filter(|line| line["action"] == "prune_copy").cloned().collect();
    assert_eq!(told.len(), 6);
    assert!(told.iter().all(|line| line["archive"] == "vault" && line["reasons"][0].is_string()));

    // What was pruned is not fetched again, and its snapshot may go.
    let strict = KEEP_TWO.replace("keep_last = 10", "keep_last = 1");
    let report = stage.run(&strict).await;
    assert_eq!(steps(&report, Action::Export).len(), 0);
    assert_eq!(ended(&report, Action::Delete, StepOutcome::Done), 4);
    assert_eq!((images(&stage), stage.there().len()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn where_deletions_are_held_copies_stay_as_well() {
    let stage = Stage::new();
    stage.instance("web-1", 5);
    let held = KEEP_TWO
        .replace("max_delete_percent = 100", "max_deletes = 0")
        .replace("keep_last = 10", "keep_last = 4");
    let report = stage.run(&held).await;
    assert_eq!(ended(&report, Action::Export, StepOutcome::Done), 5);
    assert_eq!(steps(&report, Action::PruneCopy).len(), 0);
    assert!(
        report.zones[0].warnings.iter().any(|warning| warning.contains("no copy in archive vault is pruned"))
    );
}

/// Whether the state directory says that a command changed something in an archive.
fn is_daemon_shown(stage: &Stage) -> bool {
    read(&stage.state().join("archives.json")).contains("\"changed_at\"")
}

#[tokio::test(start_paused = true)]
async fn pruning_by_hand_looks_first_and_then_does_what_it_said() {
    let stage = Stage::new();
    stage.instance("web-1", 4);
    let keep_all = KEEP_TWO.replace("[archives.vault.retention]\nkeep_last = 2\n", "");
    stage.run(&keep_all).await;
    let refused = said(&stage, &keep_all, &["archive", "prune", "vault"]);
    assert_eq!(refused.status, 2);
    assert!(refused.err.contains("keeps every copy"), "{}", refused.err);
    assert_eq!(said(&stage, KEEP_TWO, &["archive", "prune", "attic"]).status, 2);

    let before = files(&stage.archive());
    let looked = said(&stage, KEEP_TWO, &["archive", "prune", "--dry-run"]);
    assert!(looked.status == 0 && looked.out.contains("would be deleted"), "{}", looked.out);
    assert_eq!(files(&stage.archive()), before);
    assert!(!is_daemon_shown(&stage), "nothing has changed");
    let api = Api::of_now();
    let prune = ["archive", "prune", "--output", "json"];
    for (hours, side) in [(-2, "ahead of"), (2, "behind")] {
        let skew = Effect::DateSkew(SignedDuration::from_hours(hours));
        api.world.fault(Fault::on(Call::ListZones, skew).times(1));
        let held = said_beside(&api.endpoint, &stage, KEEP_TWO, &prune);
        assert!(held.status == 1 && held.err.contains(side), "{}", held.err);
        assert_eq!(files(&stage.archive()), before);
    }
    let undated =
        Effect::Answer { status: StatusCode::FORBIDDEN, content_type: "text/plain", body: String::new() };
    api.world.fault(Fault::on(Call::ListZones, undated).times(1));
    let held = said_beside(&api.endpoint, &stage, KEEP_TWO, &prune);
    assert!(held.status == 1 && held.err.contains("cannot be compared"), "{}", held.err);
    assert_eq!(files(&stage.archive()), before);
    let pruned = said_beside(&api.endpoint, &stage, KEEP_TWO, &prune);
    let json = pruned.json();
    assert_eq!((pruned.status, json[0]["copies"].as_array().unwrap().len()), (0, 2), "{}", pruned.err);
    assert!(json[0]["copies"].as_array().unwrap().iter().all(|copy| copy["outcome"] == "done"));
    assert_eq!(images(&stage), 2);
    assert!(is_daemon_shown(&stage));
    let listed = said(&stage, KEEP_TWO, &["archive", "list", "--output", "json"]).json();
    assert_eq!(listed[0]["images"].as_array().unwrap().len(), 2);
    assert_eq!(listed[0]["pruned"].as_array().unwrap().len(), 2);
    assert!(listed[0]["pruned"][0]["pruned_at"].is_string());
    let text = said(&stage, KEEP_TWO, &["archive", "list"]).out;
    assert!(text.contains("AGE") && text.contains("2 copies deleted"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn corruption_is_found_told_and_healed_by_the_next_export() {
    let stage = Stage::new();
    stage.instance("web-1", 3);
    let policies = KEEP_TWO.replace("[archives.vault.retention]\nkeep_last = 2\n", "");
    stage.run(&policies).await;
    let good = said(&stage, &policies, &["archive", "verify"]);
    assert_eq!(good.status, 0, "{}", good.err);
    assert!(good.out.contains("3 images read, 3 good"), "{}", good.out);
    assert!(is_daemon_shown(&stage));
    let part = said(&stage, &policies, &["archive", "verify", "--percent", "34", "--output", "json"]).json();
    assert_eq!(part[0]["images"].as_array().unwrap().len(), 2);
    assert_eq!(said(&stage, &policies, &["archive", "verify", "--percent", "0"]).status, 2);

    flip(&stage);
    let before = image_files(&stage);
    let bad = said(&stage, &policies, &["archive", "verify", "--output", "json"]);
    assert_eq!(bad.status, 1);
    assert!(bad.err.contains("CORRUPT") && bad.err.contains("MD5"), "{}", bad.err);
    let json = bad.json();
    let outcomes: Vec<_> =
        json[0]["images"].as_array().unwrap().iter().map(|image| &image["outcome"]).collect();
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == "corrupt").count(), 1, "{outcomes:?}");
    assert_eq!(image_files(&stage), before);
    assert_eq!(said(&stage, &policies, &["archive", "verify"]).status, 1, "it stays an alert");
    let listed = said(&stage, &policies, &["archive", "list"]);
    assert!(listed.out.contains("corrupt since"), "{}", listed.out);

    // It counts as not exported, so it is downloaded again.
    let report = stage.run(&policies).await;
    assert_eq!(ended(&report, Action::Export, StepOutcome::Done), 1);
    assert_eq!(said(&stage, &policies, &["archive", "verify"]).status, 0);
}

#[tokio::test(start_paused = true)]
async fn what_the_gate_keeps_too_long_is_told_and_no_longer_than_it_is_so() {
    let stage = Stage::new();
    stage.instance("web-1", 5);
    let policies = KEEP_TWO.replace("[archives.vault.retention]\nkeep_last = 2\n", "").replace("= 10", "= 2");
    // Something else has the archive's place.
    RealDisk.append(&stage.archive(), b"", Access::Owner).unwrap();
    stage.run(&policies).await;
    let alert = |warnings: &[String]| warnings.iter().any(|warning| warning.contains("`alert_after`"));
    for (hours, is_late) in [(35, false), (2, true)] {
        stage.step(SignedDuration::from_hours(hours));
        let runner = stage.runner(&policies);
        let planned =
            runner.preview(&ListingCache::default(), &runner.policies[0], None).await.remove(0).1.unwrap();
        assert_eq!(alert(&planned.listing.warnings), is_late, "{:?}", planned.listing.warnings);
        assert_eq!(alert(&stage.run(&policies).await.zones[0].warnings), is_late);
    }
    RealDisk.remove_file(&stage.archive()).unwrap();
    let report = stage.run(&policies).await;
    assert!(!alert(&report.zones[0].warnings));
    assert_eq!(stage.there().len(), 2);
    let remembered = stage.runner(&policies).state.last_runs(&"nightly".parse().unwrap()).await.unwrap();
    assert!(remembered.zones.values().all(|zone| zone.gate_since.is_none()));
}

#[tokio::test(start_paused = true)]
async fn a_run_that_deletes_nothing_prunes_no_copy_by_a_wrong_clock() {
    let stage = Stage::new();
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    stage.days(instance, (1..4).rev());
    // Without a retention of its own the policy has no guard, which would look at the clock.
    let policies = KEEP_TWO
        .replace("[policies.nightly.retention]\nkeep_last = 10\n", "")
        .replace("[policies.nightly.guard]\nmax_delete_percent = 100\nsettle = \"0s\"\n", "");
    let skew = Effect::DateSkew(SignedDuration::from_mins(20));
    stage.world.fault(Fault::on(Call::ListSnapshots, skew).times(2));
    let report = stage.run(&policies).await;
    assert_eq!(ended(&report, Action::Export, StepOutcome::Done), 3, "{report:?}");
    assert!(steps(&report, Action::PruneCopy).is_empty(), "{report:?}");
    assert!(report.zones[0].warnings.join("\n").contains("clock"), "{report:?}");
    stage.days(instance, 0..1);
    let report = stage.run(&policies).await;
    assert_eq!(ended(&report, Action::PruneCopy, StepOutcome::Done), 2, "{report:?}");
}
