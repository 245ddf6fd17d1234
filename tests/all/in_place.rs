//! An existing instance goes back: to a snapshot, or to a verified copy.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use serde_json::{Value, json};
use snapwarden::archive::backend::Archive;
use snapwarden::archive::manifest::BuildFacts;
use snapwarden::clock::Clock as _;
use snapwarden::restore::find::ArchivedCopy;
use snapwarden::restore::in_place::{Change, Changed, Interrupted, OnTheWay};
use snapwarden::restore::rebuild::facts_of;
use snapwarden::restore::template::NewTemplate;
use snapwarden::run::context::{RunOptions, Runner};
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::image::DiskShape;
use snapwarden::sim::world::World;
use snapwarden::snapshot::{InstanceId, SnapshotId, SnapshotState};
use snapwarden::state::audit::Action;
use tokio_util::sync::CancellationToken;

use crate::s3::archive;
use crate::stage::{Stage, days_ago, files, paths, read};

const EXPORTS: &str =
    "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.export]\narchives = [\"vault\"]\n";

/// Every field of an instance that the API shows for it alone.
pub(crate) fn machine() -> Value {
    let of = |number: u128| json!([{ "id": uuid::Uuid::from_u128(number) }]);
    json!({
        "security-groups": of(1), "private-networks": of(2), "elastic-ips": of(3), "anti-affinity-groups": of(4),
        "ssh-keys": [{ "name": "alice" }, { "name": "bob, the \"admin\"" }], "secureboot-enabled": true, "tpm-enabled": true,
        "public-ip-assignment": "dual", "user-data": "aHVzaC1odXNo",
    })
}

/// An instance with five snapshots, oldest first, in a zone with an archive.
struct Play {
    stage: Stage,
    instance: InstanceId,
    ids: Vec<SnapshotId>,
    runner: Runner,
}

impl Play {
    fn new() -> Self {
        Self::with(EXPORTS)
    }

    fn with(policies: &str) -> Self {
        let stage = Stage::new();
        let instance = stage.world.add_instance(&stage.zone, "web-1", &[("backup", "nightly")]);
        stage.world.set_disk(instance, DiskShape::with_data_mib(1));
        stage.world.set_machine(instance, machine());
        let ids = stage.days(instance, (0..5).rev());
        let runner = stage.runner(policies);
        Self { stage, instance, ids, runner }
    }

    fn world(&self) -> &World {
        &self.stage.world
    }

    fn vault(&self) -> &Arc<Archive> {
        &self.runner.archives[&"vault".parse().unwrap()]
    }

    async fn revert(&self, with_copy: bool) -> Result<Changed, Interrupted> {
        let change = Change::to_snapshot(&self.runner, &self.stage.zone, self.ids[1]).await.unwrap();
        change.carry_out(with_copy.then(|| self.vault()), &CancellationToken::new()).await
    }

    /// Why nothing was begun.
    async fn refused(&self, id: SnapshotId) -> String {
        let refused = Change::to_snapshot(&self.runner, &self.stage.zone, id).await.unwrap_err();
        assert!(self.world().changes().is_empty());
        refused.to_string()
    }

    fn changes(&self) -> Vec<Call> {
        self.world().changes().iter().map(|exchange| exchange.call).collect()
    }

    /// Action and outcome of each line of the audit log.
    fn audit(&self) -> Vec<(String, String)> {
        let text = |line: &Value, field: &str| line[field].as_str().unwrap().to_owned();
        self.stage.audit().iter().map(|line| (text(line, "action"), text(line, "outcome"))).collect()
    }

    /// The exported copy of the newest snapshot, as one that a bucket is said to have.
    async fn copy(&self) -> ArchivedCopy {
        assert_eq!(self.stage.run(EXPORTS).await.sums().failed, 0);
        let copy = self.vault().catalogue().await.unwrap().copies()[0].clone();
        self.world().clear_log();
        ArchivedCopy { archive: Arc::new(Archive::S3(archive("http://127.0.0.1:9"))), copy }
    }

    fn on_the_way(&self, facts: BuildFacts) -> OnTheWay<'static> {
        let (name, zone) = ("on-the-way".to_owned(), self.stage.zone.clone());
        OnTheWay {
            facts,
            template: NewTemplate { name, zone, boot_mode: None, force: false },
            throttle: None,
        }
    }
}

/// What is shown, but for these fields.
pub(crate) fn without(mut shown: Value, fields: &[&str]) -> Value {
    for field in fields {
        shown.as_object_mut().unwrap().remove(*field);
    }
    shown
}

#[tokio::test(start_paused = true)]
async fn an_instance_goes_back_to_a_snapshot_and_what_it_was_is_safe() {
    let play = Play::new();
    let before = play.world().shown(play.instance);
    let changed = play.revert(true).await.unwrap();
    assert_eq!(
        play.changes(),
        [
            Call::CreateSnapshot,
            Call::ExportSnapshot,
            Call::StopInstance,
            Call::RevertInstance,
            Call::StartInstance
        ]
    );
    let steps = ["create", "export", "stop_instance", "revert", "start_instance"];
    let lines: Vec<_> = steps
        .iter()
        .flat_map(|step| ["intended", "done"].map(|outcome| (step.to_string(), outcome.to_owned())))
        .collect();
    assert_eq!(play.audit(), lines);
    // The disk is that of the snapshot, and nothing else is different.
    let now = play.world().add_snapshot(play.instance, play.world().now());
    assert_eq!(play.world().image(now).md5(), play.world().image(play.ids[1]).md5());
    play.world().remove_snapshot(now);
    assert_eq!(without(play.world().shown(play.instance), &["snapshots"]), without(before, &["snapshots"]));
    assert!(play.world().is_running(play.instance));
    // What it was is on hold for 30 days, also in the archive.
    let (holds, now) = (play.runner.state.holds().await.unwrap(), play.stage.now());
    let held = holds.on(changed.safety, now).unwrap();
    assert_eq!(held.until, Some(changed.held_until));
    assert!(held.about.as_ref().unwrap().name.starts_with("web-1_ROOT-"), "{held:?}");
    let hours = changed.held_until.duration_since(now).as_hours();
    assert!((29 * 24..=30 * 24).contains(&hours), "{hours}");
    let catalogue = play.vault().catalogue().await.unwrap();
    assert_eq!(
        catalogue.copies().iter().filter(|copy| copy.manifest.snapshot.id == changed.safety).count(),
        1
    );
    assert_eq!(catalogue.holds()[&changed.safety].len(), 1);
}

#[tokio::test(start_paused = true)]
async fn one_that_is_stopped_stays_so_and_without_a_copy_nothing_is_exported() {
    let play = Play::new();
    play.world().set_running(play.instance, false);
    play.revert(false).await.unwrap();
    assert_eq!(play.changes(), [Call::CreateSnapshot, Call::RevertInstance]);
    assert!(!play.world().is_running(play.instance));
    assert!(files(&play.stage.archive()).is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_is_not_safe_is_refused_before_anything_is_begun() {
    let play = Play::new();
    play.world().set_state(play.ids[0], SnapshotState::Exporting);
    assert!(play.refused(play.ids[0]).await.contains("`exporting`"));
    let gone: SnapshotId = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec".parse().unwrap();
    assert!(play.refused(gone).await.contains("has no snapshot"));
    play.world().set_instance(play.ids[2], None);
    assert!(play.refused(play.ids[2]).await.contains("which instance"));

    play.world().set_disk(play.instance, DiskShape { size_gib: 9, ..DiskShape::default() });
    assert!(play.refused(play.ids[1]).await.contains("resize-disk"));
    play.world().set_disk(play.instance, DiskShape::default());
    play.world().put_into_pool(play.instance);
    assert!(play.refused(play.ids[1]).await.contains("instance pool"));
}

#[tokio::test(start_paused = true)]
async fn a_revert_that_the_platform_refuses_leaves_the_instance_running_as_it_was() {
    let play = Play::new();
    play.world()
        .fault(Fault::on(Call::RevertInstance, Effect::status(403, "Forbidden by role policy for compute")));
    let error = play.revert(true).await.unwrap_err().to_string();
    for words in [
        "was not changed",
        "Forbidden",
        "is on hold until",
        "copy of it is in archive vault",
        "exo compute instance snapshot revert",
    ] {
        assert!(error.contains(words), "{words}: {error}");
    }
    assert!(play.world().is_running(play.instance));
    assert_eq!(play.audit().last().unwrap(), &("start_instance".to_owned(), "done".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_revert_of_unknown_result_leaves_the_instance_stopped_and_says_how_to_go_on() {
    for effect in [Effect::operation_fails("fault", "disk on fire"), Effect::CutAfter] {
        let play = Play::new();
        play.world().fault(Fault::on(Call::RevertInstance, effect));
        let error = play.revert(true).await.unwrap_err().to_string();
        for words in ["is not known", "is stopped", "revert it again", &play.ids[1].to_string()] {
            assert!(error.contains(words), "{words}: {error}");
        }
        assert!(!play.world().is_running(play.instance));
        assert_eq!(play.audit().last().unwrap(), &("revert".to_owned(), "failed".to_owned()));
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_safe_copy_of_what_it_is_nothing_is_changed() {
    for (call, effect, words) in [
        (Call::CreateSnapshot, Effect::status(409, "quota exceeded"), "no whole snapshot"),
        (Call::CreateSnapshot, Effect::operation_fails("fault", "no"), "no whole snapshot"),
        (Call::ExportSnapshot, Effect::status(403, "Forbidden"), "--without-copy"),
        (Call::GetImage, Effect::Corrupt(200_000), "--without-copy"),
    ] {
        let play = Play::new();
        play.world().fault(Fault::on(call, effect.clone()));
        let error = play.revert(true).await.unwrap_err().to_string();
        assert!(error.contains("was not changed") && error.contains(words), "{effect:?}: {error}");
        assert!(!play.changes().contains(&Call::StopInstance), "{effect:?}");
        assert!(play.world().is_running(play.instance));
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_is_never_stored_is_waited_for_an_hour() {
    let play = Play::new();
    // The listing may say so for a short time; it is not enough.
    play.world().fault(Fault::on(Call::GetSnapshot, Effect::Edit("/state", Some("ready".into()))));
    let begun = play.stage.clock.elapsed();
    let error = play.revert(true).await.unwrap_err().to_string();
    assert!(error.contains("`ready` after an hour") && error.contains("is on hold until"), "{error}");
    assert!(play.stage.clock.elapsed() >= begun + Duration::from_hours(1));
    assert!(!play.changes().contains(&Call::StopInstance));
}

#[tokio::test(start_paused = true)]
async fn a_stop_ends_it_before_the_instance_is_touched() {
    let play = Play::new();
    play.world()
        .fault(Fault::on(Call::GetSnapshot, Effect::Edit("/state", Some("exporting".into()))).after(1));
    let change = Change::to_snapshot(&play.runner, &play.stage.zone, play.ids[1]).await.unwrap();
    let stop = CancellationToken::new();
    let stopping = async {
        play.stage.clock.sleep(Duration::from_mins(5)).await;
        stop.cancel();
    };
    let (changed, ()) = tokio::join!(change.carry_out(Some(play.vault()), &stop), stopping);
    let error = changed.unwrap_err().to_string();
    assert!(error.contains("was not changed") && error.contains("stopping"), "{error}");
    assert_eq!(play.changes(), [Call::CreateSnapshot]);
    assert!(play.world().is_running(play.instance));
}

#[tokio::test(start_paused = true)]
async fn no_policy_deletes_in_the_zone_meanwhile() {
    let prunes = format!(
        "{EXPORTS}[policies.prune]\nzones = [\"ch-gva-2\"]\n[policies.prune.retention]\nkeep_last = 2\n[policies.prune.guard]\nsettle = \"0s\"\n"
    );
    let play = Play::with(&prunes);
    let change = Change::to_snapshot(&play.runner, &play.stage.zone, play.ids[1]).await.unwrap();
    let (stop, options) = (CancellationToken::new(), RunOptions::default());
    let run = play.runner.run(&play.runner.policies[1], &options);
    let (changed, report) = tokio::join!(change.carry_out(Some(play.vault()), &stop), run);
    let changed = changed.unwrap();
    let calls = play.changes();
    let position = |call| calls.iter().position(|one| *one == call);
    let deleted = position(Call::DeleteSnapshot).expect("something is deleted");
    assert!(position(Call::StartInstance).unwrap() < deleted, "{calls:?}");
    assert!(report.unwrap().sums().deleted > 0);
    assert!(play.stage.there().contains(&changed.safety));
}

#[tokio::test(start_paused = true)]
async fn an_instance_is_reset_with_a_copy_and_everything_else_of_it_stays() {
    let play = Play::new();
    let found = play.copy().await;
    let (newest, facts) = (found.copy.manifest.snapshot.id, BuildFacts::default());
    let before = play.world().shown(play.instance);
    play.world().clear_log();
    let change =
        Change::to_copy(&play.runner, play.instance, vec![found.clone()], play.on_the_way(facts), false);
    let change = change.await.unwrap();
    let changed = change.carry_out(Some(play.vault()), &CancellationToken::new()).await.unwrap();
    assert_eq!(
        play.changes(),
        [Call::RegisterTemplate, Call::CreateSnapshot, Call::ExportSnapshot, Call::ResetInstance]
    );
    let after = play.world().shown(play.instance);
    let different = ["snapshots", "template"];
    assert_eq!(without(after, &different), without(before, &different));
    let [made] = &play.world().templates(&play.stage.zone)[..] else { panic!("one template") };
    assert_eq!((Some(made.id), play.world().template_of(play.instance)), (changed.template_id, made.id));
    assert_eq!(made.checksum.as_deref(), Some(play.world().image(newest).md5()));
    let notes = changed.notes.join("\n");
    assert!(notes.contains("does not promise") && notes.contains(&made.id.to_string()), "{notes}");
    let reset: Vec<_> = play.audit().into_iter().filter(|(action, _)| action == "reset").collect();
    assert_eq!(reset.len(), 2);
    let line = play.stage.audit().into_iter().rfind(|line| line["action"] == "reset").unwrap();
    assert_eq!((&line["outcome"], &line["template_id"]), (&json!("done"), &json!(made.id)));

    // A reset that fails says where to look.
    play.world().fault(Fault::on(Call::ResetInstance, Effect::operation_fails("fault", "disk on fire")));
    play.stage.step(SignedDuration::from_mins(1));
    let other = OnTheWay {
        template: NewTemplate { name: "again".to_owned(), ..play.on_the_way(BuildFacts::default()).template },
        ..play.on_the_way(BuildFacts::default())
    };
    let change = Change::to_copy(&play.runner, play.instance, vec![found], other, false).await.unwrap();
    let error = change.carry_out(None, &CancellationToken::new()).await.unwrap_err().to_string();
    for words in
        ["perhaps not reset", "disk on fire", "template", "exo compute instance show", "is on hold until"]
    {
        assert!(error.contains(words), "{words}: {error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_copy_is_refused_for_another_instance_a_smaller_disk_and_a_member_of_a_pool() {
    let play = Play::new();
    let found = play.copy().await;
    let refused = async |instance, from_other| {
        let on_the_way = play.on_the_way(BuildFacts::default());
        let change =
            Change::to_copy(&play.runner, instance, vec![found.clone()], on_the_way, from_other).await;
        change.map_or_else(|error| error.to_string(), |_| String::new())
    };
    let other = play.world().add_instance(&play.stage.zone, "web-2", &[]);
    let why = refused(other, false).await;
    assert!(why.contains("--from-other") && why.contains("web-1"), "{why}");
    assert_eq!(refused(other, true).await, "");
    play.world().set_disk(other, DiskShape { size_gib: 5, ..DiskShape::default() });
    assert!(refused(other, true).await.contains("resize-disk"));
    play.world().put_into_pool(play.instance);
    assert!(refused(play.instance, false).await.contains("instance pool"));
    let gone: InstanceId = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec".parse().unwrap();
    assert!(refused(gone, true).await.contains("has no instance"));
    assert!(play.world().changes().is_empty());
}

/// The first manifest below a folder.
fn manifest_path(folder: &Path) -> PathBuf {
    let is_json = |path: &PathBuf| path.extension().is_some_and(|end| end == "json");
    let all = paths(folder).into_iter().filter(is_json);
    all.into_iter().find(|path| path.to_string_lossy().contains("ch-gva-2")).unwrap()
}

fn manifest_in(folder: &Path) -> Value {
    serde_json::from_str(&read(&manifest_path(folder))).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_manifest_has_all_that_builds_the_instance_again_and_user_data_only_where_that_is_wanted() {
    for (more, user_data) in [("", Value::Null), ("user_data = true\n", "aHVzaC1odXNo".into())] {
        let policies =
            format!("{EXPORTS}[archives.second]\ntype = \"local\"\npath = \"FOLDER/second\"\n{more}");
        let play = Play::new();
        let folder = play.stage.folder.path().to_owned();
        let policies = policies
            .replace("FOLDER", &folder.to_string_lossy())
            .replace("[\"vault\"]", "[\"vault\", \"second\"]");
        assert_eq!(play.stage.run(&policies).await.sums().failed, 0);
        let manifest = manifest_in(&folder.join("second"));
        assert_eq!((&manifest["version"], &manifest["warnings"]), (&json!(2), &json!([])));
        let machine = &manifest["machine"];
        assert_eq!(machine["user_data"], user_data);
        assert_eq!(manifest_in(&folder.join("vault"))["machine"]["user_data"], Value::Null);
        let id = |number: u128| json!([{ "id": uuid::Uuid::from_u128(number) }]);
        for (field, expected) in [
            ("instance_type", json!("standard.medium")),
            ("disk_size_gib", json!(10)),
            ("security_groups", id(1)),
            ("private_networks", id(2)),
            ("elastic_ips", id(3)),
            ("anti_affinity_groups", id(4)),
            ("ssh_keys", json!(["alice", "bob, the \"admin\""])),
            ("secure_boot", json!(true)),
            ("tpm", json!(true)),
            ("public_ip_assignment", json!("dual")),
            ("application_consistent_snapshots", json!(false)),
        ] {
            assert_eq!(machine[field], expected, "{field}");
        }
        assert_eq!(manifest["template"]["origin"]["version"], "24.04 LTS");
        // Nothing of it is in the state directory.
        let state = format!("{:?}", files(&play.stage.state()));
        assert!(!state.contains("aHVzaC1odXNo"));
        // An instance is asked once for an export, however many archives get it.
        let asked = play.world().log().iter().filter(|exchange| exchange.call == Call::GetInstance).count();
        assert_eq!(asked, 1);
    }
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_cannot_be_read_is_exported_all_the_same() {
    for effect in [
        Effect::status(403, "Forbidden by role policy for compute"),
        Effect::html(),
        Effect::status(404, "Instance not found"),
    ] {
        let play = Play::new();
        play.world().fault(Fault::on(Call::GetInstance, effect.clone()));
        let report = play.stage.run(EXPORTS).await;
        assert_eq!((report.sums().failed, report.sums().exported), (0, 1), "{effect:?}");
        let manifest = manifest_in(&play.stage.archive());
        assert_eq!(manifest["machine"], Value::Null);
        let warnings = manifest["warnings"].to_string();
        assert!(warnings.contains("is not recorded"), "{warnings}");
        let said: Vec<_> = crate::stage::steps(&report, Action::Export);
        assert!(said[0].message.as_ref().unwrap().contains("is not recorded"), "{said:?}");
        // The listing named the template.
        assert_eq!(manifest["template"]["boot_mode"], "uefi");
    }
}

#[tokio::test(start_paused = true)]
async fn what_another_version_wrote_serves_as_it_can() {
    let play = Play::new();
    assert_eq!(play.stage.run(EXPORTS).await.sums().failed, 0);
    let vault = play.vault();
    let path = manifest_path(&play.stage.archive());
    let whole = manifest_in(&play.stage.archive());
    let facts = async || {
        let copy = vault.catalogue().await.unwrap().copies()[0].clone();
        facts_of(&[ArchivedCopy { archive: Arc::clone(vault), copy }]).await
    };
    assert_eq!(facts().await.machine.unwrap().ssh_keys, ["alice", "bob, the \"admin\""]);
    let write = |manifest: &Value| {
        let bytes = manifest.to_string().into_bytes();
        snapwarden::disk::replace_file(
            &snapwarden::disk::RealDisk,
            &path,
            &bytes,
            snapwarden::disk::Access::Owner,
        )
        .unwrap();
    };
    // Version 1 had no such thing.
    let mut first = whole.clone();
    first["version"] = 1.into();
    first.as_object_mut().unwrap().remove("machine");
    for field in ["application_consistent", "origin"] {
        first["template"].as_object_mut().unwrap().remove(field);
    }
    write(&first);
    assert_eq!(facts().await, BuildFacts::default());
    play.runner.verifier(vault).verify(100, &|_, _| {}).await.unwrap();
    assert_eq!(manifest_in(&play.stage.archive())["version"], 1);
    // A later one has more, which stays.
    let mut later = whole;
    later["version"] = 3.into();
    later["machine"]["gpus"] = json!([{ "model": "a" }]);
    write(&later);
    play.runner.verifier(vault).verify(100, &|_, _| {}).await.unwrap();
    let verified = manifest_in(&play.stage.archive());
    assert_eq!((&verified["version"], &verified["machine"]), (&json!(3), &later["machine"]));
    assert!(facts().await.machine.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_no_template_is_documented_for_is_warned_about_and_refused() {
    let play = Play::new();
    play.world().set_disk(play.instance, DiskShape { size_gib: 101, ..DiskShape::default() });
    let newest = play.world().add_snapshot(play.instance, days_ago(0) + SignedDuration::from_mins(1));
    let found = play.copy().await;
    assert_eq!(found.copy.manifest.snapshot.id, newest);
    assert!(found.copy.manifest.warnings[0].contains("101 GiB"), "{:?}", found.copy.manifest.warnings);
    let reset = async |force| {
        let mut on_the_way = play.on_the_way(BuildFacts::default());
        on_the_way.template.force = force;
        Change::to_copy(&play.runner, play.instance, vec![found.clone()], on_the_way, false).await
    };
    let refused = reset(false).await.unwrap_err().to_string();
    assert!(refused.contains("101 GiB") && refused.contains("--force"), "{refused}");
    assert!(play.world().changes().is_empty());
    reset(true).await.unwrap().carry_out(None, &CancellationToken::new()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_simulated_zone_demands_what_the_platform_does() {
    let play = Play::new();
    let client = play.runner.client.zone(&play.stage.zone);
    let (id, snapshot) = (play.instance, play.ids[0]);
    let refused = client.revert_instance(id, snapshot).await.unwrap_err().to_string();
    assert!(refused.contains("must be stopped") || refused.contains("409"), "{refused}");
    assert!(client.start_instance(id).await.is_err());
    client.stop_instance(id).await.unwrap();
    assert_eq!(client.get_instance(id).await.unwrap().unwrap().state, "stopped");
    assert!(client.stop_instance(id).await.is_err());
    let other = play.world().add_instance(&play.stage.zone, "web-2", &[]);
    let of_other = play.world().add_snapshot(other, days_ago(0));
    assert!(client.revert_instance(id, of_other).await.is_err());
    // Of two at once only one is begun, and its snapshot can't be deleted meanwhile.
    let (one, two, deleted) = tokio::join!(
        client.revert_instance(id, snapshot),
        client.revert_instance(id, snapshot),
        client.delete_snapshot(snapshot)
    );
    assert!(one.is_ok() && two.is_err() && deleted.is_err());
    client.start_instance(id).await.unwrap();
    assert!(play.world().is_running(id));
}
