//! The guard of an archive: copies that only an edit would delete wait, limits block, and an allowance lets it pass.

use std::collections::BTreeSet;

use jiff::SignedDuration;
use serde_json::Value;
use snapwarden::clock::{Clock as _, SystemClock};
use snapwarden::disk::{Access, Disk as _, RealDisk, replace_file};
use snapwarden::run::list::ListingCache;
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::state::allowances::{Allowance, AllowanceOf};
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::directory::StateDirectory;
use snapwarden::state::holds::Hold;

use crate::archives::said;
use crate::stage::{Stage, ended, files, paths, read};

/// Every snapshot is exported and kept; the archive has these tables.
fn exporting(archive: &str) -> String {
    format!(
        "{archive}\n[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.export]\narchives = [\"vault\"]\n\
         snapshots = \"all\"\n"
    )
}

fn keeping(rules: &str) -> String {
    exporting(&format!("[archives.vault.retention]\n{rules}"))
}

fn guarded(rules: &str, guard: &str) -> String {
    exporting(&format!("[archives.vault.retention]\n{rules}\n[archives.vault.guard]\n{guard}"))
}

fn images(stage: &Stage) -> usize {
    images_in(stage, "vault")
}

fn images_in(stage: &Stage, folder: &str) -> usize {
    let all = files(&stage.folder.path().join(folder));
    all.iter().filter(|(path, _)| path.extension().is_some_and(|end| end == "qcow2")).count()
}

fn pruned(report: &RunReport) -> usize {
    ended(report, Action::PruneCopy, StepOutcome::Done)
}

fn pending(report: &RunReport) -> &str {
    assert_eq!(report.result, RunResult::Success, "{:?}", report.zones);
    report.zones[0].pending.as_deref().unwrap_or_else(|| panic!("nothing is pending: {:?}", report.zones))
}

/// Takes a snapshot, so that the next run stores something and looks at the archive.
fn another(stage: &Stage) {
    let instance = stage.world.snapshots(&stage.zone)[0].instance_id.unwrap();
    stage.days(instance, 0..1);
}

async fn allow(stage: &Stage, deletes: u64) {
    let directory = StateDirectory::open(stage.seams.disk.clone(), &stage.state()).unwrap();
    let of = AllowanceOf::Archive("vault".parse().unwrap());
    let given = Allowance { of, zone: None, deletes, given_at: stage.now(), ends_at: None };
    directory.allow(&stage.clock, given).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_edited_retention_deletes_no_copy_at_once_and_says_when_it_will() {
    let stage = Stage::new();
    stage.instance("web-1", 12);
    stage.run(&keeping("keep_last = 30")).await;
    assert_eq!(images(&stage), 12);
    let edited = keeping("keep_last = 3");

    // The plan says so beforehand, also to those who run nothing.
    let runner = stage.runner(&edited);
    let preview = runner.preview(&ListingCache::default(), &runner.policies[0], None).await;
    let preview = preview[0].1.as_ref().unwrap();
    assert_eq!(preview.copies.iter().filter(|copy| copy.blocked_by == Some("change")).count(), 9);
    assert!(preview.copies_blocked[0].contains("keep_last was 30, is 3"), "{:?}", preview.copies_blocked);
    assert!(preview.copies.iter().all(|copy| copy.blocked_by.is_some()));

    another(&stage);
    let report = stage.run(&edited).await;
    assert_eq!((pruned(&report), images(&stage)), (0, 13));
    let text = pending(&report);
    for part in [
        "archive vault",
        "10 copies",
        "archive vault: keep_last was 30, is 3",
        "2026-11-02T08:00:",
        "snapwarden allow --archive vault 10",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // By then there are more than ten, and the limit has its say.
    stage.step(SignedDuration::from_hours(20));
    another(&stage);
    let report = stage.run(&edited).await;
    assert_eq!((report.result, images(&stage)), (RunResult::Held, 14), "{report:?}");
    allow(&stage, 12).await;
    another(&stage);
    let report = stage.run(&edited).await;
    assert_eq!((report.zones[0].pending.as_deref(), images(&stage)), (None, 3), "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn an_allowance_counts_for_pending_copies_alone_and_accepts_the_change() {
    let stage = Stage::new();
    stage.instance("web-1", 12);
    stage.run(&keeping("keep_last = 12")).await;
    let edited = keeping("keep_last = 8");
    for (allowed, images_left) in [(None, 12), (Some(3), 12), (Some(4), 8)] {
        if let Some(allowed) = allowed {
            allow(&stage, allowed).await;
        }
        another(&stage);
        stage.run(&edited).await;
        assert_eq!(images(&stage), images_left, "{allowed:?}");
    }
    another(&stage);
    let report = stage.run(&edited).await;
    assert_eq!((report.zones[0].pending.as_deref(), images(&stage)), (None, 8), "the change is accepted");
}

#[tokio::test(start_paused = true)]
async fn a_retention_where_there_was_none_and_another_name_are_changes_too() {
    let stage = Stage::new();
    stage.instance("web-1", 10);
    stage.run(&exporting("")).await;
    another(&stage);
    let report = stage.run(&keeping("keep_last = 2")).await;
    assert!(pending(&report).contains("keep_last was not set, is 2"), "{report:?}");
    assert_eq!(images(&stage), 11);

    let stage = Stage::new();
    stage.instance("web-1", 10);
    let called = |name: &str, rules: &str| {
        let place = stage.folder.path().join("kept");
        let place = format!("[archives.{name}]\ntype = \"local\"\npath = {place:?}\n");
        format!("{place}{}", keeping(rules).replace("vault", name))
    };
    stage.run(&called("attic", "keep_last = 10")).await;
    another(&stage);
    let report = stage.run(&called("store", "keep_last = 2")).await;
    assert!(pending(&report).contains("archive store: keep_last was 10, is 2"), "{report:?}");
    assert_eq!((pruned(&report), images_in(&stage, "kept")), (1, 10));
}

#[tokio::test(start_paused = true)]
async fn copies_that_another_state_stored_wait_until_the_rules_of_this_one_have_settled() {
    let strict = guarded("keep_last = 3", "max_delete_percent = 100");
    let stage = Stage::new();
    stage.instance("web-1", 12);
    assert_eq!(pruned(&stage.run(&strict).await), 9, "the only state has filled it itself");

    let stage = Stage::new();
    stage.instance("web-1", 12);
    stage.run(&keeping("keep_last = 30")).await;
    let second = stage.beside("backup-2");
    second.run(&exporting("")).await;
    let shared = format!(
        "[archives.store]\ntype = \"local\"\npath = {:?}\n{}",
        stage.archive(),
        strict.replace("vault", "store")
    );
    // By hand it is the same, also before its first run.
    let looked =
        said(&second, &shared, &["archive", "prune", "store", "--dry-run", "--output", "json"]).json();
    let copies = looked[0]["copies"].as_array().unwrap();
    assert_eq!((copies.len(), images(&stage)), (9, 12));
    assert!(copies.iter().all(|copy| copy["blocked_by"] == "change"), "{looked}");
    another(&second);
    let report = second.run(&shared).await;
    assert_eq!((pruned(&report), images(&stage)), (0, 13));
    let text = pending(&report);
    for part in
        ["archive store: 10 copies", "archive store: keep_last was not set, is 3", "2026-11-02T08:00:"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    second.step(SignedDuration::from_hours(20));
    another(&second);
    let report = second.run(&shared).await;
    assert_eq!((report.zones[0].pending.as_deref(), images(&stage)), (None, 3), "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn copies_that_a_lost_state_stored_wait_after_the_archive_is_adopted() {
    let stage = Stage::new();
    stage.instance("web-1", 12);
    stage.run(&keeping("keep_last = 30")).await;
    for path in paths(&stage.state()) {
        RealDisk.remove_file(&path).unwrap();
    }
    let strict = guarded("keep_last = 3", "max_delete_percent = 100");
    stage.run(&strict).await;
    stage.runner(&strict).adopt_archive(&"vault".parse().unwrap()).await.unwrap();
    another(&stage);
    let report = stage.run(&strict).await;
    assert_eq!((pruned(&report), images(&stage)), (0, 13));
    assert!(pending(&report).contains("archive vault: keep_last was not set, is 3"), "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn limits_block_all_copies_of_a_zone_until_their_number_is_allowed() {
    let settled = "settle = \"0s\"\n";
    for (guard, why) in [
        ("max_deletes = 12", "13 copies would be deleted, more than max_deletes = 12"),
        ("", "13 of 16 would be deleted, more than max_delete_percent = 50"),
    ] {
        let stage = Stage::new();
        stage.instance("web-1", 15);
        stage.run(&keeping("keep_last = 20")).await;
        another(&stage);
        let edited = guarded("keep_last = 3", &format!("{settled}{guard}"));
        let report = stage.run(&edited).await;
        assert_eq!((report.result, images(&stage)), (RunResult::Held, 16), "{report:?}");
        let held = report.zones[0].held.as_deref().unwrap();
        assert!(held.contains(why) && held.contains("snapwarden allow --archive vault 13"), "{held}");
        allow(&stage, 13).await;
        stage.step(SignedDuration::from_hours(8 * 24));
        another(&stage);
        stage.run(&edited).await;
        assert_eq!(images(&stage), 17, "the allowance has ended");
        allow(&stage, 14).await;
        another(&stage);
        assert_eq!(pruned(&stage.run(&edited).await), 0, "a larger plan stays blocked");
        allow(&stage, 16).await;
        another(&stage);
        stage.run(&edited).await;
        assert_eq!(images(&stage), 3);
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_deleted_of_an_instance_whose_newest_copy_is_too_old() {
    let stage = Stage::new();
    stage.instance("web-1", 5);
    let db = stage.world.add_instance(&stage.zone, "db-1", &[]);
    let rules = guarded("max_age = \"6d\"\nmin_keep = 1", "expect_newest = \"36h\"");
    stage.run(&rules).await;
    assert_eq!(images(&stage), 5);
    stage.step(SignedDuration::from_hours(3 * 24));
    let today = -3..-2;
    stage.days(db, today.clone());
    let report = stage.run(&rules).await;
    assert_eq!((pruned(&report), images(&stage)), (0, 6));
    let text = pending(&report);
    assert!(
        text.contains("its newest verified copy is of") && text.contains("archive vault expects"),
        "{text}"
    );
    assert!(report.zones[0].warnings.iter().any(|warning| warning.contains("expect_newest")));
    let web = stage.world.snapshots(&stage.zone)[0].instance_id.unwrap();
    stage.days(web, today);
    assert!(pruned(&stage.run(&rules).await) > 0);
}

#[tokio::test(start_paused = true)]
async fn by_hand_a_policy_that_is_paused_prolongs_no_allowance() {
    let stage = Stage::new();
    stage.instance("web-1", 5);
    stage.run(&keeping("keep_last = 5")).await;
    // The command has the clock of this machine.
    let now = SystemClock::start().now();
    let days = |count: i64| SignedDuration::from_hours(24 * count);
    let schedule = (now + days(20)).strftime("schedule = \"0 0 %-d %-m *\"\nzones").to_string();
    let edited = keeping("keep_last = 2").replace("zones", &schedule);
    let directory = StateDirectory::open(stage.seams.disk.clone(), &stage.state()).unwrap();
    let of = AllowanceOf::Archive("vault".parse().unwrap());
    let given = Allowance { of, zone: None, deletes: 3, given_at: now - days(8), ends_at: None };
    directory.allow(&stage.clock, given).await.unwrap();
    let blocked_by = || {
        let looked = said(&stage, &edited, &["archive", "prune", "--dry-run", "--output", "json"]);
        let copies = looked.json()[0]["copies"].as_array().unwrap().clone();
        copies.iter().map(|copy| copy["blocked_by"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(blocked_by(), [Value::Null, Value::Null, Value::Null], "until the next run");
    directory.pause(&stage.clock, "nightly".parse().unwrap(), now).await.unwrap();
    assert_eq!(blocked_by(), ["change", "change", "change"], "for a week");
}

#[tokio::test(start_paused = true)]
async fn by_hand_the_guard_is_asked_as_well() {
    let stage = Stage::new();
    stage.instance("web-1", 5);
    stage.run(&keeping("keep_last = 5")).await;
    let edited = keeping("keep_last = 2");
    let looked = said(&stage, &edited, &["archive", "prune", "--dry-run", "--output", "json"]);
    let copies = looked.json()[0]["copies"].clone();
    assert_eq!((looked.status, copies.as_array().unwrap().len()), (0, 3), "{}", looked.err);
    assert!(copies.as_array().unwrap().iter().all(|copy| copy["blocked_by"] == "change"));
    let refused = said(&stage, &edited, &["archive", "prune"]);
    assert_eq!((refused.status, images(&stage)), (3, 5), "{}", refused.err);
    assert!(refused.out.contains("keep_last was 5, is 2"), "{}", refused.out);
    for (arguments, status) in [
        (&["allow", "--archive", "vault", "3"][..], 0),
        (&["allow", "--archive", "vault", "3", "--for", "12h"], 0),
        (&["allow", "--archive", "attic", "3"], 2),
        (&["allow", "--archive", "vault", "nightly", "3"], 2),
        (&["allow", "3"], 2),
    ] {
        assert_eq!(said(&stage, &edited, arguments).status, status, "{arguments:?}");
    }
    another(&stage);
    let kept = exporting("");
    assert_eq!(said(&stage, &kept, &["allow", "--archive", "vault", "3"]).status, 2);
}

#[tokio::test(start_paused = true)]
async fn rules_that_this_version_cannot_read_delete_no_copy() {
    let stage = Stage::new();
    stage.instance("web-1", 5);
    stage.run(&keeping("keep_last = 5")).await;
    let path = stage.state().join("archives.json");
    let text = crate::stage::read(&path).replace("keep_last", "keep_lunar");
    snapwarden::disk::replace_file(
        &snapwarden::disk::RealDisk,
        &path,
        text.as_bytes(),
        snapwarden::disk::Access::Owner,
    )
    .unwrap();
    another(&stage);
    let report = stage.run(&keeping("keep_last = 2")).await;
    assert_eq!((pruned(&report), images(&stage)), (0, 6));
    let failures = report.zones[0].failures.join("\n");
    assert!(
        failures.contains("keep_lunar") && failures.contains("can't be read by this version"),
        "{failures}"
    );
}

/// Takes a snapshot each night, keeps some in the zone and fewer in the archive.
const NIGHTS: &str = "[archives.vault.retention]\nkeep_last = 2\n[archives.vault.guard]\nsettle = \"0s\"\n\
    [policies.nightly]\nzones = [\"ch-gva-2\"]\ncreate = true\n[policies.nightly.retention]\nkeep_last = 4\n\
    [policies.nightly.guard]\nsettle = \"0s\"\n[policies.nightly.export]\narchives = [\"vault\"]\nsnapshots = \"all\"\n";

/// The ids in the names of the manifests.
fn manifests(stage: &Stage) -> BTreeSet<String> {
    let all = files(&stage.archive());
    let names = all.iter().filter_map(|(path, _)| path.file_name()?.to_str()?.strip_suffix(".json"));
    let ids = names.filter_map(|name| name.split_once("Z-"));
    ids.map(|(_, id)| id.split_once('.').map_or(id, |(id, _)| id).to_owned()).collect()
}

async fn nights(stage: &Stage, count: usize) {
    for night in 0..count {
        stage.step(SignedDuration::from_hours(24));
        let report = stage.run(NIGHTS).await;
        assert_eq!(report.result, RunResult::Success, "night {night}: {:?}", report.zones);
        assert_eq!(report.zones[0].warnings, [""; 0], "night {night}");
        // Each that is listed has one, also if its image was deleted.
        let listed: BTreeSet<String> = stage.there().iter().map(ToString::to_string).collect();
        assert!(listed.is_subset(&manifests(stage)), "night {night}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_manifest_of_a_pruned_copy_is_removed_once_its_snapshot_is_deleted() {
    let stage = Stage::new();
    stage.instance("web-1", 0);
    nights(&stage, 12).await;
    assert_eq!((stage.there().len(), images(&stage)), (4, 2));
    // Those of the last two runs are still in the listing before.
    assert!(manifests(&stage).len() <= 6, "{:?}", manifests(&stage));
    // Its audit log still knows it.
    let pruned = stage.audit().iter().filter(|line| line["action"] == "prune_copy").count();
    assert!(pruned >= 16, "{pruned}");
}

#[tokio::test(start_paused = true)]
async fn manifests_of_pruned_copies_stay_where_their_snapshot_or_another_state_may_need_them() {
    // A hold on a snapshot that is not there any more is a hold on its copy.
    let stage = Stage::new();
    stage.instance("web-1", 0);
    nights(&stage, 1).await;
    let first = stage.there()[0];
    let (clock, directory) =
        (&stage.clock, StateDirectory::open(stage.seams.disk.clone(), &stage.state()).unwrap());
    nights(&stage, 4).await;
    let hold = Hold { snapshot: first, until: None, reason: None, since: stage.now(), about: None };
    directory.hold(clock, hold).await.unwrap();
    stage.world.remove_snapshot(first);
    nights(&stage, 4).await;
    assert!(manifests(&stage).contains(&first.to_string()));

    // Another state remembers the copies with their images.
    let stage = Stage::new();
    stage.instance("web-1", 0);
    nights(&stage, 1).await;
    let path = stage.archive().join("snapwarden-archive.json");
    let mut marker: Value = serde_json::from_str(&read(&path)).unwrap();
    marker["states"].as_array_mut().unwrap().push("b0c0ab00-0000-4000-8000-00000000f105".into());
    replace_file(&RealDisk, &path, marker.to_string().as_bytes(), Access::Group).unwrap();
    nights(&stage, 8).await;
    assert!(manifests(&stage).len() >= 9);
}

#[tokio::test(start_paused = true)]
async fn a_listing_that_lacks_everything_removes_no_manifest() {
    let stage = Stage::new();
    stage.instance("web-1", 0);
    nights(&stage, 6).await;
    let before = manifests(&stage);
    for id in stage.there() {
        stage.world.remove_snapshot(id);
    }
    for _ in 0..3 {
        stage.step(SignedDuration::from_hours(24));
        let report = stage.run(&NIGHTS.replace("create = true\n", "")).await;
        assert!(report.zones[0].held.is_some(), "{report:?}");
        assert_eq!(manifests(&stage), before);
    }
}
