//! Archives by more than one name, and several with one marker: a rename, a copy of the whole folder, a new disk.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::SignedDuration;
use snapwarden::disk::{Access, Disk as _, Open, RealDisk, create_folders, read_file, replace_file};
use snapwarden::run::context::RunOptions;
use snapwarden::run::report::RunReport;
use snapwarden::sim::disk::MemoryDisk;
use snapwarden::state::allowances::{Allowance, AllowanceOf};
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::directory::StateDirectory;

use crate::stage::{Stage, ended, paths};

fn place(stage: &Stage, name: &str, folder: &str, rules: &str) -> String {
    let at = stage.folder.path().join(folder);
    let rules =
        if rules.is_empty() { String::new() } else { format!("[archives.{name}.retention]\n{rules}\n") };
    format!("[archives.{name}]\ntype = \"local\"\npath = \"{}\"\n{rules}", at.display())
}

fn policy(archive: &str, count: u32) -> String {
    format!(
        "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.retention]\nkeep_last = {count}\n\
         [policies.nightly.guard]\nmax_delete_percent = 100\nsettle = \"0s\"\n[policies.nightly.export]\narchives = [\"{archive}\"]\n"
    )
}

fn deleted(report: &RunReport) -> usize {
    ended(report, Action::Delete, StepOutcome::Done)
}

fn images(stage: &Stage, folder: &str) -> usize {
    let all = paths(&stage.folder.path().join(folder));
    all.iter().filter(|path| path.extension().is_some_and(|end| end == "qcow2")).count()
}

/// `attic` is renamed to `store`; its disk rots and is read-only; the scheduled verification (before the first run, or before
/// the edit is taken back) notes it in the state; the next run counts the copy.
async fn corruption_under_another_name(runs_as_store: bool, last: &str) {
    corruption(runs_as_store, "store", false, last).await;
}

async fn corruption(runs_as_store: bool, verified_as: &str, adopts: bool, last: &str) {
    let disk = MemoryDisk::new();
    let stage = Stage::over(Arc::new(disk.clone()));
    disk.create_dir_all(stage.folder.path(), Access::Owner).unwrap();
    stage.instance("web-1", 10);
    let of = |name: &str, count| format!("{}{}", place(&stage, name, "kept", ""), policy(name, count));
    stage.run(&of("attic", 10)).await;
    if runs_as_store {
        stage.run(&of("store", 10)).await;
    }
    let kept = stage.folder.path().join("kept");
    let below = |folder: PathBuf| {
        disk.list(&folder).unwrap_or_default().into_iter().map(move |entry| folder.join(entry.name))
    };
    let mut files = below(kept.join("ch-gva-2")).flat_map(below);
    let image = files.rfind(|path| path.extension().is_some_and(|end| end == "qcow2")).unwrap();
    let bytes = read_file(&disk, &image, 1 << 30).unwrap();
    let middle = bytes.len() / 2;
    disk.open(&image, Open::Update, Access::Group)
        .unwrap()
        .write_all_at(&[bytes[middle] ^ 1], middle as u64)
        .unwrap();
    disk.set_unwritable(&kept, Some(ErrorKind::ReadOnlyFilesystem));
    let runner = stage.runner(&of(verified_as, 10));
    runner.verifier(&runner.archives[&verified_as.parse().unwrap()]).verify(100, &|_, _| {}).await.unwrap();
    if adopts {
        stage.runner(&of(last, 10)).adopt_archive(&last.parse().unwrap()).await.unwrap();
    }
    let report = stage.run(&of(last, 3)).await;
    assert_eq!(deleted(&report), 0, "{:?} {:?}", report.result, report.zones[0].failures);
}

#[tokio::test(start_paused = true)]
async fn corruption_that_was_found_by_the_new_name_before_its_first_run_counts() {
    corruption_under_another_name(false, "store").await;
}

#[tokio::test(start_paused = true)]
async fn corruption_that_was_found_by_a_name_that_was_taken_back_counts() {
    corruption_under_another_name(true, "attic").await;
}

/// The second archive was seeded with `cp -a`, so both have one id.
#[tokio::test(start_paused = true)]
async fn a_copied_archive_with_other_rules_has_settled_after_a_night() {
    seeded_by_cp(6, 8, 30, |first, second| (first, 8.min(second))).await;
}

#[tokio::test(start_paused = true)]
async fn a_mistyped_count_of_the_first_of_two_with_one_id_waits() {
    seeded_by_cp(7, 30, 8, |first, second| (8.min(first), second)).await;
}

fn copy_folder(from: &Path, to: &Path) {
    for path in paths(from) {
        let copy = to.join(path.strip_prefix(from).unwrap());
        create_folders(&RealDisk, copy.parent().unwrap(), Access::Group).unwrap();
        let bytes = read_file(&RealDisk, &path, 1 << 30).unwrap();
        replace_file(&RealDisk, &copy, &bytes, Access::Group).unwrap();
    }
}

async fn seeded_by_cp(nights: i32, first: u32, second: u32, typo: fn(u32, u32) -> (u32, u32)) {
    let stage = Stage::new();
    stage.instance("web-1", 12);
    let export = |names: &str| {
        format!(
            "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.export]\narchives = [{names}]\nsnapshots = \"all\"\n"
        )
    };
    let one = format!("{}{}", place(&stage, "first", "one", "keep_last = 30"), export("\"first\""));
    stage.run(&one).await;
    let root = stage.folder.path();
    copy_folder(&root.join("one"), &root.join("two"));
    let both = |first: u32, second: u32| {
        [
            place(&stage, "first", "one", &format!("keep_last = {first}")),
            place(&stage, "second", "two", &format!("keep_last = {second}")),
            export("\"first\", \"second\""),
        ]
        .concat()
    };
    let instance = stage.world.snapshots(&stage.zone)[0].instance_id.unwrap();
    let mut again = 0;
    for hours in 0..nights {
        stage.days(instance, 0..1);
        let report = stage.run(&both(first, second)).await;
        again += i32::from(hours > 1 && report.zones[0].pending.is_some());
        stage.step(SignedDuration::from_hours(24));
    }
    let count = || [images(&stage, "one"), images(&stage, "two")];
    let before = count();
    stage.days(instance, 0..1);
    let (first, second) = typo(first, second);
    let report = stage.run(&both(first, second)).await;
    let after = count();
    assert!(
        before.iter().zip(&after).all(|(b, a)| *a + 1 >= *b),
        "{before:?} -> {after:?}: {:?} {:?}",
        report.result,
        report.zones[0].pending
    );
    assert!(again < 1, "pending again {again} times after it had settled");
}

/// Two policies, two zones, one archive: the allowance goes to the one that has nothing pending.
#[tokio::test(start_paused = true)]
async fn an_allowance_stays_for_the_pruning_that_needs_it() {
    let stage = Stage::new();
    stage.instance("web-1", 3);
    let other = stage.world.add_zone("de-fra-1");
    let db = stage.world.add_instance(&other, "db-1", &[]);
    stage.days(db, (0..12).rev());
    let web = stage.world.snapshots(&stage.zone)[0].instance_id.unwrap();
    let config = |keep: u32| {
        let of = |name: &str, zone: &str| {
            format!(
                "[policies.{name}]\nzones = [\"{zone}\"]\n[policies.{name}.export]\narchives = [\"store\"]\nsnapshots = \"all\"\n"
            )
        };
        [
            place(&stage, "store", "kept", &format!("keep_last = {keep}")),
            of("alpha", "ch-gva-2"),
            of("beta", "de-fra-1"),
        ]
        .concat()
    };
    let run = async |keep: u32, number: usize| {
        let runner = stage.runner(&config(keep));
        runner.run(&runner.policies[number], &RunOptions::default()).await.unwrap()
    };
    run(12, 0).await;
    run(12, 1).await;
    stage.days(db, 0..1);
    run(8, 1).await;
    let directory = StateDirectory::open(stage.seams.disk.clone(), &stage.state()).unwrap();
    let of = AllowanceOf::Archive("store".parse().unwrap());
    directory
        .allow(&stage.clock, Allowance { of, zone: None, deletes: 20, given_at: stage.now(), ends_at: None })
        .await
        .unwrap();
    stage.days(web, 0..1);
    run(8, 0).await;
    stage.days(db, 0..1);
    let report = run(8, 1).await;
    assert!(report.zones[0].pending.is_none(), "the allowance is gone: {:?}", report.zones[0].pending);
}

#[tokio::test(start_paused = true)]
async fn corruption_counts_also_where_the_archive_is_adopted_by_another_name() {
    corruption(false, "attic", true, "store").await;
}

#[tokio::test(start_paused = true)]
async fn corruption_counts_by_the_new_name() {
    corruption(false, "attic", false, "store").await;
}

/// A write fails under one name, and the next one succeeds under another.
#[tokio::test(start_paused = true)]
async fn a_write_that_succeeds_ends_the_doubts_of_another_name() {
    let disk = MemoryDisk::new();
    let stage = Stage::over(Arc::new(disk.clone()));
    disk.create_dir_all(stage.folder.path(), Access::Owner).unwrap();
    stage.instance("web-1", 9);
    let of = |name: &str| format!("{}{}", place(&stage, name, "kept", ""), policy(name, 3));
    stage.run(&of("attic")).await;
    let instance = stage.world.snapshots(&stage.zone)[0].instance_id.unwrap();
    let night = async |name: &str| {
        stage.step(SignedDuration::from_hours(24));
        stage.world.add_snapshot(instance, stage.now());
        stage.run(&of(name)).await
    };
    night("store").await;
    let kept = stage.folder.path().join("kept");
    disk.set_unwritable(&kept, Some(ErrorKind::ReadOnlyFilesystem));
    assert_eq!(deleted(&night("store").await), 0);
    disk.set_unwritable(&kept, None);
    let report = night("attic").await;
    assert_eq!((deleted(&report), report.zones[0].failures.len()), (2, 0), "{report:?}");
}

/// A rename of an archive is taken back after copies expired under the other name.
#[tokio::test(start_paused = true)]
async fn a_name_that_was_taken_back_is_no_false_alarm() {
    let stage = Stage::new();
    stage.instance("web-1", 9);
    let of = |name: &str, copies: u32, count: u32| {
        let guard = format!("[archives.{name}.guard]\nsettle = \"0s\"\n");
        let all = format!("{}snapshots = \"all\"\n", policy(name, count));
        format!("{}{guard}{all}", place(&stage, name, "kept", &format!("keep_last = {copies}")))
    };
    stage.run(&of("attic", 9, 9)).await;
    let instance = stage.world.snapshots(&stage.zone)[0].instance_id.unwrap();
    for _ in 0..3 {
        stage.step(SignedDuration::from_hours(24));
        stage.world.add_snapshot(instance, stage.now());
        stage.run(&of("store", 2, 3)).await;
    }
    let report = stage.run(&of("attic", 2, 3)).await;
    assert!(report.zones[0].failures.is_empty(), "{:?}", report.zones[0].failures);
}

#[tokio::test(start_paused = true)]
async fn a_mistyped_count_of_the_second_of_two_with_one_id_waits() {
    seeded_by_cp(3, 8, 30, |first, second| (first, 8.min(second))).await;
}

/// No `cp`: the disk is replaced by a new one, adopted as `archive adopt` says; the old one is configured beside it.
#[tokio::test(start_paused = true)]
async fn a_new_disk_that_is_adopted_has_an_id_of_its_own() {
    let stage = Stage::new();
    stage.instance("web-1", 3);
    let config = format!("{}{}", place(&stage, "first", "one", ""), policy("first", 3));
    stage.run(&config).await;
    let root = stage.folder.path();
    RealDisk.rename(&root.join("one"), &root.join("two")).unwrap();
    create_folders(&RealDisk, &root.join("one"), Access::Group).unwrap();
    stage.runner(&config).adopt_archive(&"first".parse().unwrap()).await.unwrap();
    let id = |folder: &str| {
        let text = crate::stage::read(&root.join(folder).join("snapwarden-archive.json"));
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["id"].clone()
    };
    assert_ne!(id("one"), id("two"));
}
