//! Copies that people look after: copied on, removed one by one, repaired, and on hold for every host.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;
use snapwarden::archive::marker::MARKER_FILE;
use snapwarden::cli::assemble::{self, Use};
use snapwarden::config;
use snapwarden::credentials::Credentials;
use snapwarden::disk::{Access, Disk as _, Open, RealDisk, replace_file};
use snapwarden::run::context::RunOptions;
use snapwarden::sim::image::DiskShape;
use snapwarden::sim::restic::{SimRepository, SimRestic};
use snapwarden::sim::world::{API_KEY, API_SECRET};
use snapwarden::snapshot::SnapshotId;
use snapwarden::state::audit::{Action, StepOutcome};

use crate::archives::said;
use crate::stage::{Stage, ended, files, paths, read};

/// All that stays is exported into one archive; there is another.
fn two_archives(stage: &Stage) -> String {
    format!(
        r#"
[archives.second]
type = "local"
path = "{}/second"
[policies.nightly]
zones = ["ch-gva-2"]
[policies.nightly.retention]
keep_last = 10
[policies.nightly.export]
archives = ["vault"]
snapshots = "all"
"#,
        stage.folder.path().display()
    )
}

/// An archive `dedup` in a simulated repository: restic, the repository's folder, and the section of the configuration.
fn repository(stage: &Stage) -> (SimRestic, String, String) {
    let restic = SimRestic::default();
    let folder = stage.folder.path();
    let repository = format!("{}/repository", folder.display());
    restic.init(&repository);
    stage.processes.install_tool("restic", Arc::new(restic.clone()));
    replace_file(&RealDisk, &folder.join("password"), b"hush-hush", Access::Owner).unwrap();
    let section = format!(
        "[archives.dedup]\ntype = \"restic\"\nrepository = \"{repository}\"\npassword_file = \"{}/password\"\n",
        folder.display()
    );
    (restic, repository, section)
}

fn images(folder: &std::path::Path) -> Vec<(PathBuf, Vec<u8>)> {
    let of = |(path, bytes): (PathBuf, Vec<u8>)| {
        let name = path.strip_prefix(folder).unwrap().to_owned();
        (name.extension().is_some_and(|end| end == "qcow2")).then_some((name, bytes))
    };
    files(folder).into_iter().filter_map(of).collect()
}

fn edit(path: &std::path::Path, edit: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_str(&read(path)).unwrap();
    edit(&mut json);
    replace_file(&RealDisk, path, json.to_string().as_bytes(), Access::Group).unwrap();
}

fn manifests(folder: &std::path::Path) -> Vec<PathBuf> {
    paths(folder).into_iter().filter(|path| path.extension().is_some_and(|end| end == "json")).collect()
}

#[tokio::test(start_paused = true)]
async fn an_archive_is_copied_on_once_and_whole() {
    let stage = Stage::new();
    let policies = two_archives(&stage);
    let ids = stage.instance("web-1", 3);
    stage.instance("db-1", 2);
    stage.run(&policies).await;
    // What a later version wrote goes along.
    let of_first = manifests(&stage.archive())
        .into_iter()
        .find(|path| path.to_string_lossy().contains(&ids[0].to_string()));
    edit(&of_first.unwrap(), |json| json["colour"] = "red".into());
    let copy = |more: &[&str]| {
        let all = [&["archive", "copy", "vault", "second", "--output", "json"], more].concat();
        said(&stage, &policies, &all)
    };
    let second = stage.folder.path().join("second");

    let newest = copy(&["--newest", "--instance", "web-1"]);
    assert_eq!((newest.status, newest.json()["copies"].as_array().unwrap().len()), (0, 1), "{newest:?}");
    assert!(images(&second)[0].0.to_string_lossy().contains(&ids[2].to_string()));
    let one = copy(&["--snapshot", &ids[0].to_string()[..8]]);
    assert_eq!((one.status, images(&second).len()), (0, 2), "{one:?}");
    let rest = copy(&[]);
    assert_eq!((rest.status, rest.json()["already_there"].as_u64()), (0, Some(2)), "{rest:?}");
    assert_eq!(images(&second), images(&stage.archive()));
    let of_first =
        manifests(&second).into_iter().find(|path| path.to_string_lossy().contains(&ids[0].to_string()));
    assert!(read(&of_first.unwrap()).contains("\"colour\": \"red\""));
    assert!(RealDisk.metadata(&second.join("snapwarden-archive.json")).is_ok(), "it was marked first");
    let again = copy(&[]).json();
    assert_eq!((again["copies"].as_array().unwrap().len(), again["already_there"].as_u64()), (0, Some(5)));
    assert_eq!(said(&stage, &policies, &["archive", "verify", "second"]).status, 0);
    let copied = |line: &&Value| line["action"] == "copy" && line["archive"] == "second";
    assert_eq!(stage.audit().iter().filter(copied).count(), 2 * 5, "each before and after");

    let none = said(&stage, &policies, &["archive", "copy", "vault", "vault"]);
    none.refused(2, &["itself"]);
    said(&stage, &policies, &["archive", "copy", "vault", "attic"]).refused(2, &["attic"]);
}

#[tokio::test(start_paused = true)]
async fn a_damaged_image_is_not_copied_on_and_an_archive_that_is_not_there_gets_none() {
    let stage = Stage::new();
    let policies = two_archives(&stage);
    stage.instance("web-1", 2);
    stage.run(&policies).await;
    let (path, bytes) = images(&stage.archive()).remove(0);
    let file = RealDisk.open(&stage.archive().join(path), Open::Update, Access::Group).unwrap();
    file.write_all_at(&[bytes[bytes.len() / 2] ^ 1], bytes.len() as u64 / 2).unwrap();
    let copied = said(&stage, &policies, &["archive", "copy", "vault", "second"]);
    assert_eq!(copied.status, 1, "{copied:?}");
    copied.complained(&["is damaged", "archive verify vault"]);
    let second = stage.folder.path().join("second");
    assert_eq!(images(&second).len(), 1);
    // As if its disk were not mounted.
    let marker = second.join("snapwarden-archive.json");
    RealDisk.rename(&marker, &stage.folder.path().join("aside")).unwrap();
    let refused = said(&stage, &policies, &["archive", "copy", "vault", "second"]);
    assert_eq!((refused.status, images(&second).len()), (1, 1), "{refused:?}");
    refused.complained(&["second", "it is not there"]);
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_is_only_noted_as_corrupt_is_replaced_by_another_archives() {
    let stage = Stage::new();
    let policies = two_archives(&stage);
    stage.instance("web-1", 1);
    stage.run(&policies).await;
    assert_eq!(said(&stage, &policies, &["archive", "copy", "vault", "second"]).status, 0);
    let second = stage.folder.path().join("second");
    let (image, bytes) = images(&second).remove(0);
    let file = RealDisk.open(&second.join(&image), Open::Update, Access::Group).unwrap();
    file.write_all_at(&[bytes[bytes.len() / 2] ^ 1], bytes.len() as u64 / 2).unwrap();
    // As a verification notes it that can't write to the archive.
    let is_of_image = |path: &PathBuf| path.with_extension("qcow2").ends_with(&image);
    let manifest = manifests(&second).into_iter().find(is_of_image).unwrap();
    let verified_at = serde_json::from_str::<Value>(&read(&manifest)).unwrap()["verified_at"].clone();
    let stem = image.with_extension("").to_string_lossy().into_owned();
    edit(&stage.state().join("archives.json"), |json| {
        json["archives"]["second"]["corrupt"] =
            serde_json::json!({ stem: { "since": "2026-11-01T00:00:00Z", "verified_at": verified_at } });
    });
    let copied = said(&stage, &policies, &["archive", "copy", "vault", "second", "--output", "json"]);
    assert_eq!((copied.status, copied.json()["copies"].as_array().unwrap().len()), (0, 1), "{copied:?}");
    assert_eq!(images(&second), images(&stage.archive()));
    assert_eq!(said(&stage, &policies, &["archive", "verify", "second"]).status, 0);
}

#[tokio::test(start_paused = true)]
async fn one_copy_is_removed_as_pruned_and_only_if_that_is_confirmed() {
    let stage = Stage::new();
    let policies = two_archives(&stage);
    let ids = stage.instance("web-1", 3);
    stage.run(&policies).await;
    assert_eq!(said(&stage, &policies, &["archive", "copy", "vault", "second"]).status, 0);
    let before = files(&stage.archive());
    let rm = |id: &str, more: &[&str]| {
        said(&stage, &policies, &[&["archive", "rm", "vault", id, "--output", "json"], more].concat())
    };
    let id = ids[0].to_string();
    // The zone can't be asked here, so what policies need is not known.
    rm(&id, &[]).refused(2, &["no terminal", "--yes --losing gate"]);
    rm(&id, &["--yes"]).refused(2, &["more is lost", "gate: policy nightly"]);
    rm("web-9", &["--yes"]).refused(2, &["archive vault", "web-9"]);
    assert_eq!(files(&stage.archive()), before);

    let removed = rm(&id, &["--yes", "--losing", "gate"]);
    assert_eq!((removed.status, &removed.json()["losses"][0]["what"]), (0, &"gate".into()), "{removed:?}");
    assert_eq!(images(&stage.archive()).len(), 2);
    let listed = said(&stage, &policies, &["archive", "list", "vault", "--output", "json"]).json();
    assert_eq!(
        (listed[0]["pruned"].as_array().unwrap().len(), &listed[0]["problems"]),
        (1, &Value::Array(vec![]))
    );
    let lines = stage.audit();
    let [intended, done] = &lines[lines.len() - 2..] else { panic!("{lines:?}") };
    assert_eq!((&intended["action"], &done["outcome"]), (&"prune_copy".into(), &"done".into()));
    assert!(
        done["reasons"][0] == "a manual command" && done["reasons"][1].as_str().unwrap().contains("gate")
    );
    rm(&id, &["--yes"]).refused(2, &["was deleted at"]);
    // One of which an interrupted pruning left the image.
    let (image, bytes) =
        before.iter().find(|(path, _)| is_of(path, &ids[0]) && path.extension().unwrap() == "qcow2").unwrap();
    replace_file(&RealDisk, image, bytes, Access::Owner).unwrap();
    assert_eq!((rm(&id, &["--yes", "--losing", "gate"]).status, images(&stage.archive()).len()), (0, 2));

    // The last one of all: no other archive has it, and its snapshot is not known to be there.
    let other = ids[1].to_string();
    assert_eq!(said(&stage, &policies, &["hold", &other, "--reason", "audit"]).status, 0);
    let gone = said(&stage, &policies, &["archive", "rm", "second", &other, "--yes", "--losing", "hold"]);
    assert_eq!(gone.status, 0, "{gone:?}");
    rm(&other, &["--yes", "--losing", "gate"])
        .refused(2, &["hold: its snapshot is on hold (audit)", "only-copy:"]);
    assert_eq!(images(&stage.archive()).len(), 2);
    let removed = rm(&other, &["--yes", "--losing", "gate,hold,only-copy"]);
    assert_eq!((removed.status, images(&stage.archive()).len()), (0, 1), "{removed:?}");
    let report = stage.run(&policies).await;
    assert_eq!(ended(&report, Action::Export, StepOutcome::Done), 0, "what was removed is not fetched again");
}

#[tokio::test(start_paused = true)]
async fn a_hold_is_seen_by_the_pruning_of_another_host_until_it_is_released() {
    let stage = Stage::new();
    let keep_one = "[archives.vault.retention]\nkeep_last = 1\n[archives.vault.guard]\nsettle = \"0s\"\nmax_delete_percent = 100\n";
    let policies = two_archives(&stage);
    let ids = stage.instance("web-1", 3);
    stage.run(&policies).await;
    let id = ids[0].to_string();
    assert_eq!(said(&stage, &policies, &["hold", &id]).status, 0);
    let marks = || {
        let all = paths(&stage.archive()).into_iter().map(|path| path.to_string_lossy().into_owned());
        all.filter(|path| path.contains(".hold-")).count()
    };
    assert_eq!(marks(), 1);

    // A second machine: its own state, the same archive.
    let other = stage.beside("backup-2");
    let theirs = format!("{policies}{keep_one}")
        .replace(&stage.folder.path().display().to_string(), &other.folder.path().display().to_string());
    let config = other.config(&theirs).replace(
        &format!("path = \"{}\"", other.archive().display()),
        &format!("path = \"{}\"", stage.archive().display()),
    );
    let run = async |expected: usize| {
        let parsed = config::parse(&config, "other.toml", None).unwrap_or_else(|why| panic!("{why}"));
        let credentials = Credentials::new(API_KEY, API_SECRET, None).unwrap();
        let runner = assemble::runner(&parsed, credentials, &other.seams, Use::Changing);
        let runner = runner.unwrap_or_else(|refusal| panic!("{}", refusal.text));
        // Whoever takes it over knows whose holds count.
        runner.adopt_archive(&"vault".parse().unwrap()).await.unwrap();
        // A run prunes an archive that it stored something in.
        stage.world.add_snapshot(stage.world.snapshots(&stage.zone)[0].instance_id.unwrap(), stage.now());
        let report = runner.run(&runner.policies[0], &RunOptions::default()).await.unwrap();
        assert_eq!(ended(&report, Action::PruneCopy, StepOutcome::Done), expected, "{report:?}");
    };
    run(2).await;
    let there = || images(&stage.archive()).iter().any(|(path, _)| path.to_string_lossy().contains(&id));
    assert!(there(), "it is on hold");
    let released = said(&stage, &policies, &["unhold", &id]);
    assert_eq!((released.status, marks()), (0, 0), "{released:?}");
    stage.step(jiff::SignedDuration::from_hours(24));
    run(2).await;
    assert!(!there());
}

#[tokio::test(start_paused = true)]
async fn what_an_interrupted_export_left_is_listed_and_goes_once_it_is_old() {
    let stage = Stage::new();
    let policies = two_archives(&stage);
    stage.instance("web-1", 1);
    stage.run(&policies).await;
    let [(image, _)] = &images(&stage.archive())[..] else { panic!() };
    let folder = stage.archive().join(image.parent().unwrap());
    let part = |time: &str| folder.join(format!("{time}-b0c0ab00-0000-4000-8000-00000000f105.qcow2.part"));
    let (older, newer) = (part("20261024T110000Z"), part("20261030T120000Z"));
    for path in [&older, &newer] {
        replace_file(&RealDisk, path, b"half of an image", Access::Group).unwrap();
    }
    let listed = said(&stage, &policies, &["archive", "list", "vault", "--output", "json"]).json();
    assert_eq!(
        (listed[0]["leftovers"].as_array().unwrap().len(), &listed[0]["problems"]),
        (2, &Value::Array(vec![])),
        "{listed}"
    );
    assert_eq!(listed[0]["leftovers"][0]["bytes"], 16);
    let instance = stage.world.snapshots(&stage.zone)[0].instance_id.unwrap();
    stage.step(jiff::SignedDuration::from_hours(1));
    stage.world.add_snapshot(instance, stage.now());
    stage.run(&policies).await;
    assert!(RealDisk.metadata(&older).is_err(), "no export resumed it for a week");
    assert!(RealDisk.metadata(&newer).is_ok(), "one may still");
    assert_eq!(images(&stage.archive()).len(), 2);
}

#[tokio::test(start_paused = true)]
async fn once_a_day_a_run_removes_what_no_export_will_use_and_frees_what_restic_was_told_to_forget() {
    let stage = Stage::new();
    let (restic, repository, section) = repository(&stage);
    let policies = two_archives(&stage).replace("[\"vault\"]", "[\"vault\", \"dedup\"]") + &section;
    stage.instance("web-1", 1);
    let freed = || stage.processes.started().iter().filter(|command| command.arguments[0] == "prune").count();
    // Of an instance that no export is about, and an image without a manifest.
    let gone = "ch-gva-2/9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec/20261001T120000Z-b0c0ab00-0000-4000-8000-00000000f105.qcow2";
    let part = stage.archive().join(format!("{gone}.part"));
    RealDisk.create_dir_all(part.parent().unwrap(), Access::Group).unwrap();
    let leave = || {
        replace_file(&RealDisk, &part, b"half of an image", Access::Group).unwrap();
        restic.with(&repository, |repository| {
            repository.add(&format!("/{gone}"), "2026-10-01 12:00:00", "backup-1", "half".into())
        });
    };
    let is_left = || {
        let images = restic.with(&repository, |repository| {
            repository.snapshots.iter().filter(|snapshot| snapshot.path.ends_with(gone)).count()
        });
        assert_eq!(RealDisk.metadata(&part).is_ok(), images != Some(0));
        images != Some(0)
    };
    // By each run: for how many hours it is after the one before, whether there is anything left then, and how often restic
    // has freed space.
    for (hours, left, count) in [(0, false, 1), (1, true, 1), (22, false, 2), (24, false, 3)] {
        stage.step(jiff::SignedDuration::from_hours(hours));
        let report = stage.run(&policies).await;
        assert_eq!((report.sums().failed, is_left(), freed()), (0, left, count), "{hours}: {report:?}");
        leave();
    }
    // In doubt nothing is removed.
    stage.step(jiff::SignedDuration::from_hours(24));
    RealDisk.remove_file(&stage.archive().join(MARKER_FILE)).unwrap();
    restic.with(&repository, |repository| {
        repository.snapshots.retain(|snapshot| !snapshot.path.ends_with(MARKER_FILE));
    });
    stage.run(&policies).await;
    assert_eq!((is_left(), freed()), (true, 3));
}

#[tokio::test(start_paused = true)]
async fn what_was_pruned_before_a_repository_lost_data_still_counts_once_that_is_repaired() {
    let stage = Stage::new();
    let (restic, repository, section) = repository(&stage);
    let keeping = |count: u32| {
        format!(
            "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.export]\narchives = [\"dedup\"]\nsnapshots = \"all\"\n\
             [policies.nightly.retention]\nkeep_last = {count}\n\
             [policies.nightly.guard]\nsettle = \"0s\"\nmax_delete_percent = 100\n\
             {section}[archives.dedup.retention]\nkeep_last = 1\n\
             [archives.dedup.guard]\nsettle = \"0s\"\nmax_delete_percent = 100\n"
        )
    };
    let ids = stage.instance("web-1", 2);
    let report = stage.run(&keeping(9)).await;
    assert_eq!(ended(&report, Action::PruneCopy, StepOutcome::Done), 1, "{report:?}");

    let verify = async || {
        stage.step(jiff::SignedDuration::from_hours(1));
        let runner = stage.runner(&keeping(9));
        let archive = &runner.archives[&"dedup".parse().unwrap()];
        runner.verifier(archive).verify(100, &|_, _| {}).await.unwrap();
    };
    let image = |all: &mut SimRepository| {
        let image = all.snapshots.iter().find(|one| one.path.contains(".qcow2")).map(|one| one.bytes.clone());
        all.lost.extend(image);
    };
    restic.with(&repository, image);
    verify().await;
    let report = stage.run(&keeping(1)).await;
    assert_eq!(ended(&report, Action::Delete, StepOutcome::Done), 0, "{report:?}");
    restic.with(&repository, |all| all.lost.clear());
    verify().await;
    let report = stage.run(&keeping(1)).await;
    assert_eq!(ended(&report, Action::Delete, StepOutcome::Done), 1, "{report:?}");
    assert!(!stage.there().contains(&ids[0]));
}

#[tokio::test(start_paused = true)]
async fn user_data_goes_along_only_where_the_other_archive_may_hold_it() {
    for (may_hold, expected) in [(false, Value::Null), (true, "aHVzaC1odXNo".into())] {
        let stage = Stage::new();
        let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
        stage.world.set_machine(instance, crate::in_place::machine());
        stage.days(instance, 0..1);
        let mut policies = two_archives(&stage).replace("archives = [\"vault\"]", "archives = [\"second\"]");
        policies = policies.replace("[archives.second]", "[archives.second]\nuser_data = true");
        let third = stage.folder.path().join("third");
        let section = format!(
            "[archives.third]\ntype = \"local\"\npath = \"{}\"\nuser_data = {may_hold}\n",
            third.display()
        );
        policies.push_str(&section);
        assert_eq!(stage.run(&policies).await.sums().failed, 0);
        let copied = said(&stage, &policies, &["archive", "copy", "second", "third"]);
        assert_eq!(copied.status, 0, "{copied:?}");
        let of_copy = |folder: &std::path::Path| {
            let path = manifests(folder).into_iter().find(|path| path.to_string_lossy().contains("ch-gva-2"));
            serde_json::from_str::<Value>(&read(&path.unwrap())).unwrap()["machine"].clone()
        };
        let (there, here) = (of_copy(&stage.folder.path().join("second")), of_copy(&third));
        assert_eq!((&there["user_data"], &here["user_data"]), (&"aHVzaC1odXNo".into(), &expected));
        assert_eq!(
            (&there["ssh_keys"], &here["instance_type"]),
            (&here["ssh_keys"], &"standard.medium".into())
        );
    }
}

#[tokio::test(start_paused = true)]
async fn what_an_archive_deleted_is_stored_again_once_the_newer_copy_that_stood_for_it_is_gone() {
    for (retention, again) in
        [("keep_last = 1", 1), ("max_age = \"12h\"\nmin_keep = 0\nallow_empty = true", 0)]
    {
        let stage = Stage::new();
        let policies = format!(
            "{}[policies.nightly.guard]\nsettle = \"0s\"\n[archives.vault.retention]\n{retention}\n\
             [archives.vault.guard]\nsettle = \"0s\"\nmax_delete_percent = 100\n",
            two_archives(&stage).replace("\"all\"", "\"newest\"")
        );
        let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
        stage.world.set_disk(instance, DiskShape::with_data_mib(1));
        let older = stage.days(instance, [1].into_iter());
        stage.run(&policies).await;
        let newer = stage.days(instance, [0].into_iter());
        let report = stage.run(&policies).await;
        let images_of =
            |id: &SnapshotId| images(&stage.archive()).iter().filter(|(name, _)| is_of(name, id)).count();
        assert_eq!((images_of(&older[0]), images_of(&newer[0])), (0, 1), "{report:?}");

        stage.world.remove_snapshot(newer[0]);
        for path in paths(&stage.archive()).iter().filter(|path| is_of(path, &newer[0])) {
            RealDisk.remove_file(path).unwrap();
        }
        let report = stage.run(&policies).await;
        assert_eq!((ended(&report, Action::Export, StepOutcome::Done), images_of(&older[0])), (again, again));
        let report = stage.run(&policies).await;
        assert_eq!(ended(&report, Action::Export, StepOutcome::Done), 0, "{report:?}");

        // The same by hand, into another archive.
        let copy = |expected: usize| {
            let report = said(&stage, &policies, &["archive", "copy", "vault", "second"]);
            assert_eq!(report.status, 0, "{report:?}");
            assert_eq!(images(&stage.folder.path().join("second")).len(), expected, "{report:?}");
        };
        copy(again);
        if again == 1 {
            let rm = ["archive", "rm", "second", &older[0].to_string(), "--yes", "--losing", "gate"];
            assert_eq!(said(&stage, &policies, &rm).status, 0);
            copy(1);

            // One whose image an interrupted pruning left is not taken for stored.
            let second = stage.folder.path().join("second");
            let (image, bytes) = images(&second).remove(0);
            assert_eq!(said(&stage, &policies, &rm).status, 0);
            replace_file(&RealDisk, &second.join(image), &bytes, Access::Owner).unwrap();
            let report = said(&stage, &policies, &["archive", "copy", "vault", "second", "--output", "json"]);
            assert_eq!(report.json()["pruned_there"], 1, "{report:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn of_the_copies_that_an_archive_deleted_none_is_stored_again_beside_a_newer_one() {
    let stage = Stage::new();
    let policies = format!(
        "{}[policies.nightly.guard]\nsettle = \"0s\"\n[archives.vault.retention]\nkeep_last = 1\n\
         [archives.vault.guard]\nsettle = \"0s\"\nmax_delete_percent = 100\n",
        two_archives(&stage)
    );
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    stage.world.set_disk(instance, DiskShape::with_data_mib(1));
    let taken = stage.days(instance, [3, 2, 1, 0].into_iter());
    stage.run(&policies).await;
    let stored = || {
        let images = images(&stage.archive());
        let is_stored = |id: &&SnapshotId| images.iter().any(|(name, _)| is_of(name, id));
        taken.iter().filter(is_stored).copied().collect::<Vec<_>>()
    };
    assert_eq!(stored(), [taken[3]]);
    let lose = |id: &SnapshotId| {
        for path in paths(&stage.archive()).iter().filter(|path| is_of(path, id)) {
            RealDisk.remove_file(path).unwrap();
        }
    };
    lose(&taken[3]);
    let report = stage.run(&policies).await;
    assert_eq!((ended(&report, Action::Export, StepOutcome::Done), stored()), (1, vec![taken[3]]));
    // Its snapshot is lost as well.
    lose(&taken[3]);
    stage.world.remove_snapshot(taken[3]);
    let report = stage.run(&policies).await;
    assert_eq!((ended(&report, Action::Export, StepOutcome::Done), stored()), (1, vec![taken[2]]));
}

/// Whether a file is one of a snapshot's copy.
fn is_of(path: &std::path::Path, id: &SnapshotId) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().contains(&id.to_string()))
}
