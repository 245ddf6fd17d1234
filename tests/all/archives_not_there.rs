//! An archive that is not the one that was used before: its disk is not mounted, another one is, copies vanished, or it is
//! the state directory that is empty. Nothing is stored in it, and nothing is deleted that needs it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use snapwarden::clock::Clock as _;
use snapwarden::disk::{Access, Disk as _, RealDisk, create_folders, replace_file};
use snapwarden::retention::plan::Decision;
use snapwarden::run::context::RunOptions;
use snapwarden::run::list::ListingCache;
use snapwarden::run::report::RunReport;
use snapwarden::sim::call::Call;
use snapwarden::sim::disk::{DiskCall, MemoryDisk};
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::snapshot::SnapshotId;
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::holds::Hold;

use crate::archives::said;
use crate::stage::{Stage, ended, files, paths, read, steps};

const MARKER: &str = "snapwarden-archive.json";

/// Keeps three; the newest is exported.
const KEEP_THREE: &str = r#"
[policies.nightly]
zones = ["ch-gva-2"]
[policies.nightly.retention]
keep_last = 3
[policies.nightly.guard]
max_delete_percent = 100
settle = "0s"
[policies.nightly.export]
archives = ["vault"]
"#;

fn keeping(count: u32) -> String {
    KEEP_THREE.replace("keep_last = 3", &format!("keep_last = {count}"))
}

fn exporting_all(count: u32) -> String {
    format!("{}snapshots = \"all\"\n", keeping(count))
}

/// Takes the archive's disk away, and gives back where it is now.
fn unmount(stage: &Stage) -> PathBuf {
    let away = stage.folder.path().join("away");
    RealDisk.rename(&stage.archive(), &away).unwrap();
    away
}

fn remount(stage: &Stage, away: &Path) {
    RealDisk.rename(away, &stage.archive()).unwrap();
}

fn remove_all(folder: &Path) {
    for path in paths(folder) {
        RealDisk.remove_file(&path).unwrap();
    }
}

fn failures(report: &RunReport) -> String {
    report.zones.iter().flat_map(|zone| &zone.failures).cloned().collect::<Vec<_>>().join("\n")
}

/// What keeps, by `plan`, each snapshot that would be deleted otherwise.
async fn blocked(stage: &Stage, policies: &str) -> Vec<&'static str> {
    let runner = stage.runner(policies);
    let previews = runner.preview(&ListingCache::default(), &runner.policies[0], None).await;
    let preview = previews.into_iter().next().unwrap().1.unwrap();
    preview.plan.decisions.iter().filter_map(Decision::blocked_by).collect()
}

/// Nothing was exported or deleted, and the failure says all of this.
fn is_refused(report: &RunReport, words: &[&str]) {
    assert_eq!(
        (steps(report, Action::Delete).len(), steps(report, Action::Export).len()),
        (0, 0),
        "{report:?}"
    );
    let failures = failures(report);
    for word in words {
        assert!(failures.contains(word), "`{word}` is missing: {failures}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_first_use_writes_the_marker_and_works_at_once() {
    let stage = Stage::new();
    stage.instance("web-1", 5);
    let report = stage.run(KEEP_THREE).await;
    assert_eq!(ended(&report, Action::Delete, StepOutcome::Done), 2, "{report:?}");
    let marker: serde_json::Value = serde_json::from_str(&read(&stage.archive().join(MARKER))).unwrap();
    assert_eq!(marker["version"], 1);
    assert!(marker["id"].is_string() && marker["states"].as_array().unwrap().len() == 1, "{marker}");
    let known: serde_json::Value = serde_json::from_str(&read(&stage.state().join("archives.json"))).unwrap();
    assert_eq!(known["archives"]["vault"]["id"], marker["id"]);
}

#[tokio::test(start_paused = true)]
async fn an_archive_whose_disk_is_not_mounted_is_not_there() {
    let stage = Stage::new();
    stage.instance("web-1", 5);
    stage.run(&keeping(5)).await;
    let away = unmount(&stage);
    for folder_exists in [false, true] {
        if folder_exists {
            create_folders(&RealDisk, &stage.archive(), Access::Group).unwrap();
        }
        let report = stage.run(KEEP_THREE).await;
        is_refused(&report, &["not mounted", MARKER, "snapwarden archive adopt vault"]);
        assert_eq!(stage.there().len(), 5);
        assert!(files(&stage.archive()).is_empty());
        assert_eq!(blocked(&stage, KEEP_THREE).await, ["archive"; 2]);
        let file = stage.folder.path().join("web-1.qcow2").display().to_string();
        let latest = said(&stage, KEEP_THREE, &["restore", "--latest", "web-1", "--to", &file]);
        latest.refused(1, &["archive vault is empty", "is its disk not mounted?"]);
    }
    // Another disk, with an archive of its own.
    let other = "{\"version\": 1, \"id\": \"b0c0ab00-0000-4000-8000-00000000f105\", \"states\": []}";
    replace_file(&RealDisk, &stage.archive().join(MARKER), other.as_bytes(), Access::Group).unwrap();
    is_refused(&stage.run(KEEP_THREE).await, &["another archive", "adopt"]);

    remove_all(&stage.archive());
    std::fs::remove_dir(stage.archive()).unwrap();
    remount(&stage, &away);
    let report = stage.run(KEEP_THREE).await;
    assert_eq!(ended(&report, Action::Delete, StepOutcome::Done), 2, "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn a_marker_that_is_damaged_or_later_closes_the_archive_and_is_named() {
    let stage = Stage::new();
    stage.instance("web-1", 5);
    stage.run(&keeping(5)).await;
    let path = stage.archive().join(MARKER);
    let good = read(&path);
    for (text, word) in [("{", "damaged"), ("{\"version\": 2}", "version 2"), ("", "damaged")] {
        replace_file(&RealDisk, &path, text.as_bytes(), Access::Group).unwrap();
        let report = stage.run(KEEP_THREE).await;
        is_refused(&report, &[word, path.to_str().unwrap()]);
    }
    replace_file(&RealDisk, &path, good.as_bytes(), Access::Group).unwrap();
    assert_eq!(ended(&stage.run(KEEP_THREE).await, Action::Delete, StepOutcome::Done), 2);
}

#[tokio::test(start_paused = true)]
async fn an_archive_from_before_markers_gets_one_and_an_empty_one_is_not_there() {
    let stage = Stage::new();
    stage.instance("web-1", 5);
    stage.run(&keeping(5)).await;
    let as_before = || {
        let _ = RealDisk.remove_file(&stage.archive().join(MARKER));
        let _ = RealDisk.remove_file(&stage.state().join("archives.json"));
    };
    as_before();
    assert_eq!(ended(&stage.run(&keeping(4)).await, Action::Delete, StepOutcome::Done), 1);
    assert!(stage.archive().join(MARKER).exists());
    as_before();
    let away = unmount(&stage);
    is_refused(&stage.run(KEEP_THREE).await, &["not mounted"]);
    assert!(files(&stage.archive()).is_empty());
    remount(&stage, &away);
    assert_eq!(ended(&stage.run(KEEP_THREE).await, Action::Delete, StepOutcome::Done), 1);
}

#[tokio::test(start_paused = true)]
async fn a_state_that_was_lost_deletes_nothing_in_any_run_until_the_archive_is_adopted() {
    let stage = Stage::new();
    let ids: Vec<SnapshotId> = stage.instance("web-1", 6);
    stage.run(&keeping(6)).await;
    remove_all(&stage.state());
    for _ in 0..2 {
        let report = stage.run(KEEP_THREE).await;
        assert_eq!(steps(&report, Action::Delete).len(), 0, "{report:?}");
        let held = report.zones[0].held.as_deref().unwrap_or_default();
        assert!(held.contains("archive adopt vault"), "{held}");
        assert_eq!(stage.there().len(), 6);
        assert_eq!(blocked(&stage, KEEP_THREE).await, ["archive"; 3]);
    }
    // Also where no policy requires a copy.
    let optional = format!("{KEEP_THREE}required = false\n");
    assert_eq!(steps(&stage.run(&optional).await, Action::Delete).len(), 0);
    stage.runner(KEEP_THREE).adopt_archive(&"vault".parse().unwrap()).await.unwrap();
    let runner = stage.runner(KEEP_THREE);
    let hold = Hold { snapshot: ids[0], until: None, reason: None, since: stage.now(), about: None };
    runner.state.hold(&*runner.clock, hold).await.unwrap();
    let report = stage.run(KEEP_THREE).await;
    assert_eq!(ended(&report, Action::Delete, StepOutcome::Done), 2, "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lost_state_is_known_as_such_also_where_its_first_run_fails() {
    for call in [Call::ListSnapshots, Call::ListInstances] {
        let stage = Stage::new();
        stage.instance("web-1", 6);
        stage.run(&keeping(6)).await;
        remove_all(&stage.state());
        let refused =
            Effect::Answer { status: StatusCode::FORBIDDEN, content_type: "text/plain", body: String::new() };
        stage.world.fault(Fault::on(call, refused));
        stage.run(KEEP_THREE).await;
        stage.world.clear_faults();
        let report = stage.run(KEEP_THREE).await;
        assert_eq!(stage.there().len(), 6, "{call:?}: {report:?}");
        assert!(report.zones[0].held.as_deref().unwrap_or_default().contains("archive adopt vault"));
    }
}

/// If that it may be lost can't be remembered, the next run would find a state that remembers one.
#[tokio::test(start_paused = true)]
async fn a_lost_state_that_cannot_be_written_runs_nothing() {
    let disk = MemoryDisk::new();
    let stage = Stage::over(Arc::new(disk.clone()));
    disk.create_dir_all(stage.folder.path(), Access::Owner).unwrap();
    stage.instance("web-1", 6);
    stage.run(&keeping(6)).await;
    for entry in disk.list(&stage.state()).unwrap() {
        disk.remove_file(&stage.state().join(entry.name)).unwrap();
    }
    disk.fail_at(DiskCall::Rename, &stage.state().join("archives.json.new"), ErrorKind::Other);
    let runner = stage.runner(KEEP_THREE);
    let error = runner.run(&runner.policies[0], &RunOptions::default()).await.unwrap_err();
    assert!(error.to_string().contains("archives.json"), "{error}");
    let report = stage.run(KEEP_THREE).await;
    assert_eq!(stage.there().len(), 6, "{report:?}");
    assert!(report.zones[0].held.as_deref().unwrap_or_default().contains("archive adopt vault"));
}

#[tokio::test(start_paused = true)]
async fn copies_that_vanish_close_the_archive_until_they_are_back_or_it_is_adopted() {
    let stage = Stage::new();
    stage.instance("web-1", 9);
    stage.run(&exporting_all(9)).await;
    let all = files(&stage.archive());
    let stems: Vec<PathBuf> = all
        .iter()
        .map(|(path, _)| path.clone())
        .filter(|path| path.extension().is_some_and(|end| end == "qcow2"))
        .collect();
    assert_eq!(stems.len(), 9);
    // The seven newest, with all that is beside them.
    for image in &stems[2..] {
        for end in ["qcow2", "json", "qcow2.md5"] {
            RealDisk.remove_file(&image.with_extension(end)).unwrap();
        }
    }
    let report = stage.run(KEEP_THREE).await;
    assert_eq!(steps(&report, Action::Delete).len(), 0, "{report:?}");
    assert!(failures(&report).contains("7 of 9 verified copies vanished"), "{}", failures(&report));
    let report = stage.run(KEEP_THREE).await;
    assert_eq!(steps(&report, Action::Delete).len(), 0, "{report:?}");
    stage.runner(KEEP_THREE).adopt_archive(&"vault".parse().unwrap()).await.unwrap();
    let report = stage.run(KEEP_THREE).await;
    assert_eq!(failures(&report), "");
    assert_eq!(ended(&report, Action::Delete, StepOutcome::Done), 6, "{report:?}");
}

/// Three instances with nine snapshots each, all of them in the archive; with the folder of each instance there.
async fn three_by_nine() -> (Stage, Vec<PathBuf>) {
    let stage = Stage::new();
    for name in ["web-1", "db-1", "mail-1"] {
        stage.instance(name, 9);
    }
    stage.run(&exporting_all(9)).await;
    let instances = stage.world.snapshots(&stage.zone).into_iter().filter_map(|one| one.instance_id);
    let mut folders: Vec<PathBuf> =
        instances.map(|id| stage.archive().join("ch-gva-2").join(id.to_string())).collect();
    folders.sort();
    folders.dedup();
    assert_eq!((folders.len(), images(&stage)), (3, 27));
    (stage, folders)
}

fn images(stage: &Stage) -> usize {
    let all = paths(&stage.archive());
    all.iter().filter(|path| path.extension().is_some_and(|end| end == "qcow2")).count()
}

#[tokio::test(start_paused = true)]
async fn the_loss_of_all_copies_of_one_instance_closes_the_archive() {
    let (stage, folders) = three_by_nine().await;
    remove_all(&folders[0]);
    for _ in 0..2 {
        let report = stage.run(&exporting_all(3)).await;
        is_refused(&report, &["9 of 27 verified copies vanished", "snapwarden archive adopt vault"]);
        assert_eq!(images(&stage), 18);
    }
    stage.runner(KEEP_THREE).adopt_archive(&"vault".parse().unwrap()).await.unwrap();
    let report = stage.run(&exporting_all(9)).await;
    assert_eq!((failures(&report), images(&stage)), (String::new(), 27));
}

/// Also where the run stores it again, as its snapshot is still there.
#[tokio::test(start_paused = true)]
async fn a_copy_that_vanished_is_named_by_one_run() {
    for is_stored_again in [true, false] {
        let (stage, folders) = three_by_nine().await;
        let mut oldest = paths(&folders[0]);
        oldest.sort();
        let image =
            oldest.into_iter().find(|path| path.extension().is_some_and(|end| end == "qcow2")).unwrap();
        for end in ["qcow2", "json", "qcow2.md5"] {
            RealDisk.remove_file(&image.with_extension(end)).unwrap();
        }
        let is_it = |id: &&SnapshotId| image.to_string_lossy().contains(&id.to_string());
        let there = stage.there();
        let lost = there.iter().find(is_it).unwrap();
        if !is_stored_again {
            stage.world.remove_snapshot(*lost);
        }
        let mut told = Vec::new();
        for _ in 0..2 {
            let report = stage.run(&exporting_all(9)).await;
            assert_eq!(failures(&report), "");
            let warnings = report.zones.iter().flat_map(|zone| zone.warnings.clone());
            told.push(warnings.filter(|text| text.contains("vanished from it")).collect::<Vec<_>>());
        }
        let [[warning], []] = [&told[0][..], &told[1][..]] else { panic!("{told:?}") };
        for part in [
            "archive vault: 1 of 27 verified copies vanished",
            "-1 of 2026-10-24T12:00:00Z",
            "lifecycle rule",
        ] {
            assert!(warning.contains(part), "{part}: {warning}");
        }
        assert_eq!(images(&stage), if is_stored_again { 27 } else { 26 });
    }
}

/// Exports into it would bring enough copies back to end the alert before anybody has looked.
#[tokio::test(start_paused = true)]
async fn an_archive_that_lost_its_copies_gets_no_new_ones_until_it_is_adopted() {
    let stage = Stage::new();
    stage.instance("web-1", 9);
    stage.run(&exporting_all(9)).await;
    remove_all(&stage.archive().join("ch-gva-2"));
    for _ in 0..2 {
        let report = stage.run(&exporting_all(3)).await;
        assert_eq!(
            steps(&report, Action::Delete).len() + steps(&report, Action::Export).len(),
            0,
            "{report:?}"
        );
        assert!(failures(&report).contains("9 of 9 verified copies vanished"), "{}", failures(&report));
        assert!(failures(&report).contains("nothing is exported"), "{}", failures(&report));
    }
    stage.runner(KEEP_THREE).adopt_archive(&"vault".parse().unwrap()).await.unwrap();
    let report = stage.run(&exporting_all(9)).await;
    assert_eq!(ended(&report, Action::Export, StepOutcome::Done), 9, "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn the_commands_name_what_is_missing_until_it_is_adopted() {
    let stage = Stage::new();
    stage.instance("web-1", 5);
    let policies = exporting_all(5);
    stage.run(&policies).await;
    let images: Vec<PathBuf> = paths(&stage.archive())
        .into_iter()
        .filter(|path| path.extension().is_some_and(|end| end == "qcow2"))
        .collect();
    for image in &images[1..] {
        RealDisk.remove_file(image).unwrap();
        RealDisk.remove_file(&image.with_extension("json")).unwrap();
    }
    let name = images[1].file_name().unwrap().to_str().unwrap();
    for command in ["list", "verify"] {
        let failed = said(&stage, &policies, &["archive", command]);
        assert_eq!(failed.status, 1, "{failed:?}");
        failed.complained(&["4 of 5 verified copies vanished", name, "archive adopt vault"]);
        let json = said(&stage, &policies, &["archive", command, "--output", "json"]).json();
        assert_eq!(json[0]["missing"].as_array().unwrap().len(), 4, "{json}");
    }
    let adopted = said(&stage, &policies, &["archive", "adopt", "vault"]);
    assert_eq!(adopted.status, 0, "{adopted:?}");
    adopted.has(&["taken over with 1 verified copy", name]);
    for command in ["list", "verify"] {
        assert_eq!(said(&stage, &policies, &["archive", command]).status, 0);
    }
    assert_eq!(said(&stage, &policies, &["archive", "adopt", "attic"]).status, 2);
}

#[tokio::test(start_paused = true)]
async fn a_later_marker_is_never_replaced_and_a_damaged_one_is_by_adopting() {
    let stage = Stage::new();
    stage.instance("web-1", 2);
    stage.run(KEEP_THREE).await;
    let path = stage.archive().join(MARKER);
    replace_file(&RealDisk, &path, b"{\"version\": 2}", Access::Group).unwrap();
    let refused = said(&stage, KEEP_THREE, &["archive", "adopt", "vault"]);
    assert_eq!(refused.status, 1);
    refused.complained(&["version 2", MARKER]);
    assert_eq!(read(&path), "{\"version\": 2}");
    replace_file(&RealDisk, &path, b"{", Access::Group).unwrap();
    assert_eq!(said(&stage, KEEP_THREE, &["archive", "adopt", "vault"]).status, 0);
    assert_eq!(failures(&stage.run(KEEP_THREE).await), "");
}

#[tokio::test(start_paused = true)]
async fn a_pruned_copy_counts_only_beside_an_intact_one_that_is_at_least_as_new() {
    let stage = Stage::new();
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    stage.days(instance, (0..5).rev());
    let policies = exporting_all(5)
        .replace("[policies.nightly]\n", "[archives.vault.retention]\nkeep_last = 1\n[policies.nightly]\n");
    stage.run(&policies).await;
    let images: Vec<PathBuf> = paths(&stage.archive())
        .into_iter()
        .filter(|path| path.extension().is_some_and(|end| end == "qcow2"))
        .collect();
    assert_eq!(images.len(), 1);
    // The only image is lost, and the next export fails.
    RealDisk.remove_file(&images[0]).unwrap();
    stage.world.fault(Fault::on(Call::ExportSnapshot, Effect::status(403, "no")).times(100));
    let report = stage.run(&policies.replace("keep_last = 5", "keep_last = 2")).await;
    assert_eq!(ended(&report, Action::Delete, StepOutcome::Done), 0, "{report:?}");
    assert_eq!(stage.there().len(), 5);
}

#[tokio::test(start_paused = true)]
async fn an_archive_that_vanishes_in_the_delete_phase_keeps_the_rest() {
    let stage = Stage::new();
    stage.instance("web-1", 10);
    stage.run(&keeping(10)).await;
    stage.world.clear_log();
    stage.world.set_operations_take(Duration::from_mins(1));
    let vanishes = async {
        while stage.world.changes().is_empty() {
            stage.clock.sleep(Duration::from_secs(1)).await;
        }
        unmount(&stage);
    };
    let policies = keeping(2);
    let (report, ()) = tokio::join!(stage.run(&policies), vanishes);
    assert!((1..=4).contains(&ended(&report, Action::Delete, StepOutcome::Done)), "{report:?}");
    assert!(stage.there().len() >= 6);
}

#[tokio::test(start_paused = true)]
async fn copies_are_pruned_by_the_clock_and_the_listing_of_that_moment() {
    for listing_fails in [false, true] {
        let stage = Stage::new();
        let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
        stage.days(instance, (0..5).rev());
        let policies = exporting_all(5).replace(
            "[policies.nightly]\n",
            "[archives.vault.retention]\nkeep_last = 1\n[policies.nightly]\n",
        );
        if listing_fails {
            stage.world.fault(Fault::on(Call::ListSnapshots, Effect::status(403, "no")).after(1).times(100));
        } else {
            let skew = Effect::DateSkew(jiff::SignedDuration::from_hours(9000));
            stage.world.fault(Fault::on(Call::ListZones, skew).times(100));
        }
        let report = stage.run(&policies).await;
        assert_eq!(ended(&report, Action::Export, StepOutcome::Done), 5, "{report:?}");
        assert!(steps(&report, Action::PruneCopy).is_empty(), "{report:?}");
    }
}
