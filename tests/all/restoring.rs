//! Restoring a verified copy to a file, or to a template.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use jiff::SignedDuration;
use serde_json::{Value, json};
use snapwarden::archive::backend::Archive;
use snapwarden::archive::manifest::{BuildFacts, Manifest};
use snapwarden::archive::md5::Md5;
use snapwarden::clock::{Clock as _, SystemClock};
use snapwarden::disk::{Access, Disk as _, RealDisk, read_file, replace_file};
use snapwarden::restore::error::RestoreError;
use snapwarden::restore::find::ArchivedCopy;
use snapwarden::restore::template::{BootMode, NewTemplate, to_template};
use snapwarden::run::context::Runner;
use snapwarden::run::report::Step;
use snapwarden::sim::call::Call;
use snapwarden::sim::clock::SimClock;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::image::DiskShape;
use snapwarden::sim::world::{API_KEY, API_SECRET, INSTANCE_TYPE, Template, World};
use snapwarden::snapshot::{InstanceId, SnapshotId, TemplateId, ZoneName};
use snapwarden::state::audit::StepOutcome;
use snapwarden::transport::{HttpTransport, Purpose, Request, Transport as _};

use crate::in_place::{machine, without};
use crate::s3::{Server, archive, hash};
use crate::stage::{NOW, Said, Stage, days_ago, files, read};

/// Two folders that get all, in this order: `spare`, `vault`.
fn policies(folder: &Path) -> String {
    format!(
        "[archives.spare]\ntype = \"local\"\npath = \"{}/spare\"\n[policies.nightly]\nzones = [\"ch-gva-2\"]\n\
         [policies.nightly.export]\narchives = [\"spare\", \"vault\"]\nsnapshots = \"all\"\nrequired = false\n",
        folder.display()
    )
}

/// Runs the program, in an environment of these variables alone, in this folder.
async fn program(folder: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> Said {
    let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_snapwarden"));
    command.env_clear().envs(variables.iter().copied()).current_dir(folder).timeout(Duration::from_mins(1));
    command.args(["--config", "snapwarden.toml"]).args(arguments);
    let ended = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    Said::of(ended)
}

fn write(path: &Path, bytes: &[u8]) {
    replace_file(&RealDisk, path, bytes, Access::Owner).unwrap();
}

fn bytes_of(path: &Path) -> Vec<u8> {
    read_file(&RealDisk, path, 1 << 30).unwrap()
}

/// A zone whose snapshots, one a day, are in both folders; and what restores them knows nothing of the zone.
struct Play {
    stage: Stage,
    /// Oldest first.
    ids: Vec<SnapshotId>,
}

impl Play {
    async fn new(snapshots: i64) -> Self {
        let stage = Stage::new();
        let ids = stage.instance("web-1", snapshots);
        let play = Self { stage, ids };
        play.export().await;
        play
    }

    async fn export(&self) {
        let policies = policies(self.folder());
        let report = self.stage.run(&policies).await;
        assert_eq!(report.sums().failed, 0, "{report:?}");
        write(&self.path("snapwarden.toml"), self.stage.config(&policies).as_bytes());
    }

    fn folder(&self) -> &Path {
        self.stage.folder.path()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    fn image(&self, id: SnapshotId) -> Vec<u8> {
        let image = self.stage.world.image(id);
        image.read(0..image.file_bytes())
    }

    async fn restore(&self, arguments: &[&str]) -> Said {
        program(self.folder(), &[], &[&["restore"], arguments].concat()).await
    }

    /// The file of a copy that ends so.
    fn stored(&self, archive: &str, id: SnapshotId, end: &str) -> PathBuf {
        let files = files(&self.path(archive));
        let wanted = format!("{id}{end}");
        files
            .into_iter()
            .map(|(path, _)| path)
            .find(|path| path.to_str().unwrap().ends_with(&wanted))
            .unwrap()
    }

    /// Flips a byte in the middle of an image, which stays as long as it was.
    fn damage(&self, archive: &str, id: SnapshotId) {
        let path = self.stored(archive, id, ".qcow2");
        let mut bytes = bytes_of(&path);
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xff;
        write(&path, &bytes);
    }

    fn edit_manifest(&self, archive: &str, id: SnapshotId, edit: impl Fn(&mut Value)) {
        let path = self.stored(archive, id, ".json");
        let mut manifest: Value = serde_json::from_slice(&bytes_of(&path)).unwrap();
        edit(&mut manifest);
        write(&path, manifest.to_string().as_bytes());
    }
}

#[tokio::test(start_paused = true)]
async fn a_copy_comes_back_as_a_new_file_without_credentials_and_the_archive_stays_as_it_is() {
    let play = Play::new(2).await;
    let id = play.ids[0];
    let before = files(play.folder());
    let said = play.restore(&[&id.to_string(), "--to", "disk.qcow2", "--output", "json"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    let (told, image) = (said.json(), play.stage.world.image(id));
    assert_eq!(told["snapshot_id"], id.to_string());
    assert_eq!(told["archive"], "spare");
    assert_eq!(told["file"], "disk.qcow2");
    assert_eq!(told["bytes"], image.file_bytes());
    assert_eq!(told["md5"], image.md5());
    assert_eq!(told["instance_name"], "web-1");
    assert_eq!(told["passed_over"], json!([]));
    assert!(bytes_of(&play.path("disk.qcow2")) == play.image(id));
    RealDisk.remove_file(&play.path("disk.qcow2")).unwrap();
    assert!(files(play.folder()) == before, "something else changed");

    let said = play.restore(&[&id.to_string(), "--to", "disk.qcow2", "--archive", "vault"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    for word in ["disk.qcow2", "web-1", "from archive vault", "verified"] {
        assert!(said.out.contains(word), "{said:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_damaged_copy_is_refused_and_the_next_archive_serves() {
    let play = Play::new(1).await;
    let id = play.ids[0];
    play.damage("spare", id);
    let said = play.restore(&[&id.to_string(), "--to", "disk", "--output", "json"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    assert!(said.err.contains("archive `spare` is damaged"), "{said:?}");
    assert_eq!(said.json()["archive"], "vault");
    assert_eq!(said.json()["passed_over"].as_array().unwrap().len(), 1);
    assert!(bytes_of(&play.path("disk")) == play.image(id));
    RealDisk.remove_file(&play.path("disk")).unwrap();

    play.damage("vault", id);
    let before = files(play.folder());
    let said = play.restore(&[&id.to_string(), "--to", "disk"]).await;
    said.refused(1, &["archive `spare` is damaged", "archive `vault` is damaged"]);
    assert!(files(play.folder()) == before, "something is left, or was marked");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_ever_overwritten() {
    let play = Play::new(1).await;
    let id = play.ids[0].to_string();
    write(&play.path("mine"), b"precious");
    write(&play.path("other.part"), b"precious too");
    std::os::unix::fs::symlink("nowhere", play.path("link")).unwrap();
    let before = files(&play.path("vault"));
    for (to, words) in [
        ("mine", &["mine already exists", "nothing is overwritten"][..]),
        ("other", &["other.part already exists"]),
        ("link", &["link already exists"]),
        ("vault", &["vault already exists"]),
        ("no/such/folder", &["no/such"]),
        ("..", &["is not a file name"]),
    ] {
        play.restore(&[&id, "--to", to]).await.refused(1, words);
    }
    assert_eq!(bytes_of(&play.path("mine")), b"precious");
    assert_eq!(bytes_of(&play.path("other.part")), b"precious too");
    assert!(RealDisk.metadata(&play.path("nowhere")).is_err());
    assert!(files(&play.path("vault")) == before);
}

#[tokio::test(start_paused = true)]
async fn the_latest_is_the_newest_of_the_one_instance_that_is_meant() {
    let play = Play::new(3).await;
    let latest = async |arguments: &[&str]| {
        let all = [&["--latest"], arguments, &["--to", "disk", "--output", "json"]].concat();
        let said = play.restore(&all).await;
        let _ = RealDisk.remove_file(&play.path("disk"));
        said
    };
    let id_of = |said: Said| said.json()["snapshot_id"].as_str().unwrap().parse::<SnapshotId>().unwrap();
    assert_eq!(id_of(latest(&["web-1"]).await), play.ids[2]);
    // Exactly then is not before it.
    let before = days_ago(0).to_string();
    assert_eq!(id_of(latest(&["web-1", "--before", &before]).await), play.ids[1]);
    let long_ago = days_ago(9).to_string();
    latest(&["web-1", "--before", &long_ago])
        .await
        .refused(1, &["no verified copy from before", "the oldest is"]);
    latest(&["web-9"]).await.refused(1, &["`web-9`", "archive list"]);
    latest(&["9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec"]).await.refused(1, &["9ee8cb98", "archive list"]);

    let old = play.stage.world.snapshots(&play.stage.zone)[0].instance_id.unwrap();
    let other = play.stage.instance("web-1", 1)[0];
    let new = play.stage.world.snapshots(&play.stage.zone).into_iter().find(|found| found.id == other);
    let new: InstanceId = new.unwrap().instance_id.unwrap();
    play.export().await;
    latest(&["web-1"]).await.refused(1, &["2 instances", &old.to_string(), &new.to_string(), "ch-gva-2"]);
    assert_eq!(id_of(latest(&[&old.to_string()]).await), play.ids[2]);
    assert_eq!(id_of(latest(&[&new.to_string()]).await), other);

    // What the archive's own retention removed can't come back.
    for archive in ["spare", "vault"] {
        play.edit_manifest(archive, play.ids[2], |manifest| manifest["pruned_at"] = NOW.into());
    }
    assert_eq!(id_of(latest(&[&old.to_string()]).await), play.ids[1]);
    let said = play.restore(&[&play.ids[2].to_string(), "--to", "disk"]).await;
    said.refused(1, &["no archive has a verified copy", "its retention removed the image"]);
}

#[tokio::test(start_paused = true)]
async fn an_archive_that_cannot_be_read_keeps_the_latest_unknown_but_no_copy_away() {
    let play = Play::new(1).await;
    let id = play.ids[0].to_string();
    let bucket = "[archives.offsite]\ntype = \"s3\"\nendpoint = \"http://127.0.0.1:9\"\nregion = \"r\"\nbucket = \"backups\"\n";
    let config = format!("{}{bucket}", read(&play.path("snapwarden.toml")));
    write(&play.path("snapwarden.toml"), config.as_bytes());
    let said = play.restore(&[&id, "--to", "disk"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    assert!(
        said.err.contains("archive offsite cannot be read") && said.err.contains("AWS_ACCESS_KEY_ID"),
        "{said:?}"
    );
    let said = play.restore(&["--latest", "web-1", "--to", "disk2"]).await;
    said.refused(1, &["may be in an archive that cannot be read", "offsite", "--archive"]);
    let said = play.restore(&["--latest", "web-1", "--to", "disk2", "--archive", "vault"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    play.restore(&[&id, "--to", "disk3", "--archive", "offsite"]).await.refused(78, &["AWS_ACCESS_KEY_ID"]);
    play.restore(&[&id, "--to", "disk3", "--archive", "nosuch"]).await.refused(2, &["nosuch"]);
}

#[tokio::test]
async fn what_makes_no_sense_is_wrong_usage() {
    let folder = tempfile::tempdir().unwrap();
    let id = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";
    for arguments in [
        &["--to", "disk"][..],
        &[id],
        &[id, "--latest", "web-1", "--to", "disk"],
        &[id, "--to", "disk", "--to-template", "golden", "--zone", "ch-gva-2"],
        &[id, "--to-template", "golden"],
        &[id, "--to", "disk", "--zone", "ch-gva-2"],
        &[id, "--before", NOW, "--to", "disk"],
        &[id, "--to-template", "golden", "--zone", "ch-gva-2", "--boot-mode", "grub"],
        &[id, "--to-instance", "web-1", "--yes"],
        &[id, "--to-template", "golden", "--zone", "ch-gva-2", "--yes"],
        &[id, "--to-template", "golden", "--zone", "ch-gva-2", "--from-other"],
        &[id, "--to", "disk", "--force"],
        &[id, "--to", "-", "--output", "json"],
        &[id, "--to", "disk", "--bandwidth-limit", "much"],
    ] {
        let said = program(folder.path(), &[], &[&["restore"], arguments].concat()).await;
        assert_eq!((said.status, &*said.out), (2, ""), "{arguments:?}: {said:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn hostile_words_of_a_manifest_are_no_paths_and_move_no_terminal() {
    let play = Play::new(1).await;
    let id = play.ids[0];
    let hostile = "../../../../tmp/x\n\u{1b}[31m; rm -rf ~";
    for archive in ["spare", "vault"] {
        play.edit_manifest(archive, id, |manifest| {
            manifest["instance"]["name"] = hostile.into();
            manifest["snapshot"]["name"] = hostile.into();
            manifest["image"]["file"] = "../../../../../../etc/passwd".into();
        });
    }
    let before = files(play.folder()).len();
    for format in ["text", "json"] {
        let said = play.restore(&["--latest", hostile, "--to", format, "--output", format]).await;
        assert_eq!(said.status, 0, "{said:?}");
        assert!(!said.out.contains('\u{1b}') && !said.err.contains('\u{1b}'), "{said:?}");
        assert!(bytes_of(&play.path(format)) == play.image(id));
    }
    assert_eq!(files(play.folder()).len(), before + 2);
    let said = play.restore(&["--latest", &format!("{hostile}?"), "--to", "none"]).await;
    said.refused(1, &["no archive has"]);
    assert!(!said.err.contains('\u{1b}'), "{said:?}");
}

#[tokio::test(start_paused = true)]
async fn an_image_goes_into_a_pipe_and_a_damaged_one_ends_too_early_with_an_error() {
    let play = Play::new(1).await;
    let id = play.ids[0];
    let pipe = async |arguments: &[&str]| {
        let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_snapwarden"));
        command.env_clear().current_dir(play.folder()).timeout(Duration::from_mins(1));
        command
            .args(["--config", "snapwarden.toml", "restore", &id.to_string(), "--to", "-"])
            .args(arguments);
        tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap()
    };
    let ended = pipe(&["--bandwidth-limit", "1GiB"]).await;
    assert!(
        ended.status.success() && ended.stdout == play.image(id),
        "{:?}",
        String::from_utf8_lossy(&ended.stderr)
    );
    assert!(String::from_utf8(ended.stderr).unwrap().contains("verified"));
    assert!(!play.path("-").exists());
    // What was written can't be taken back, so no other archive serves.
    play.damage("spare", id);
    let ended = pipe(&[]).await;
    assert_eq!(ended.status.code(), Some(1));
    assert_eq!(ended.stdout.len(), play.image(id).len() - (1 << 20));
    let err = String::from_utf8(ended.stderr).unwrap();
    for words in ["is damaged", "must not be used"] {
        assert!(err.contains(words), "{words}: {err}");
    }
    let ended = pipe(&["--archive", "vault"]).await;
    assert!(ended.status.success() && ended.stdout == play.image(id));
}

/// A snapshot with a copy that a bucket is said to have; an address of it can be made without asking the bucket.
struct AsTemplate {
    stage: Stage,
    runner: Runner,
    found: ArchivedCopy,
}

impl AsTemplate {
    async fn new() -> Self {
        let stage = Stage::new();
        stage.instance("web-1", 1);
        let policies = policies(stage.folder.path());
        assert_eq!(stage.run(&policies).await.sums().failed, 0);
        let runner = stage.runner(&policies);
        let vault = runner.archives[&"vault".parse().unwrap()].catalogue().await.unwrap();
        let copy = vault.copies()[0].clone();
        stage.world.clear_log();
        let found = ArchivedCopy { archive: Arc::new(Archive::S3(archive("http://127.0.0.1:9"))), copy };
        Self { stage, runner, found }
    }

    async fn restore(&self) -> Result<Step, RestoreError> {
        let wanted = NewTemplate {
            name: "golden".to_owned(),
            zone: self.stage.zone.clone(),
            boot_mode: None,
            force: false,
        };
        to_template(&self.runner, std::slice::from_ref(&self.found), &BuildFacts::default(), &wanted, None)
            .await
    }

    /// The private templates that are there.
    fn made(&self) -> Vec<Template> {
        private(&self.stage.world, &self.stage.zone)
    }

    fn manifest(&mut self) -> &mut Manifest {
        Arc::make_mut(&mut self.found.copy.manifest)
    }

    fn registered(&self) -> usize {
        self.stage.world.log().iter().filter(|exchange| exchange.call == Call::RegisterTemplate).count()
    }
}

fn private(world: &World, zone: &ZoneName) -> Vec<Template> {
    world.templates(zone).into_iter().filter(|template| !template.public).collect()
}

#[tokio::test(start_paused = true)]
async fn a_template_is_like_the_one_that_the_instance_came_from() {
    let mut play = AsTemplate::new().await;
    let step = play.restore().await.unwrap();
    assert_eq!(step.outcome, StepOutcome::Done, "{step:?}");
    let manifest = play.manifest().clone();
    let [made] = &play.made()[..] else { panic!("{:?}", play.made()) };
    assert_eq!(step.facts.template_id, Some(made.id));
    assert_eq!((&*made.name, &*made.boot_mode), ("golden", "uefi"));
    assert_eq!(made.default_user.as_deref(), Some("ubuntu"));
    assert_eq!((made.ssh_key_enabled, made.password_enabled), (true, false));
    assert_eq!(made.checksum, Some(manifest.image.md5.to_string()));
    assert!(made.description.contains(&manifest.snapshot.id.to_string()), "{}", made.description);
    let address = made.url.clone().unwrap();
    assert!(address.starts_with("http://127.0.0.1:9/bucket/snapwarden/ch-gva-2/"), "{address}");

    let audit = play.stage.audit();
    let lines: Vec<&Value> = audit.iter().filter(|line| line["action"] == "restore").collect();
    let told: Vec<_> = lines.iter().map(|line| line["outcome"].as_str().unwrap()).collect();
    assert_eq!(told, ["intended", "done"]);
    assert_eq!(lines[1]["template_id"], made.id.to_string());
    assert_eq!(lines[1]["archive"], "offsite");
    assert!(!format!("{audit:?}{step:?}").contains("X-Amz"));

    // A second time there would be two of the name.
    let refused = play.restore().await.unwrap_err().to_string();
    assert!(
        refused.contains(&made.id.to_string()) && refused.contains("already has a template"),
        "{refused}"
    );
    assert_eq!((play.made().len(), play.registered()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_does_not_make_two_templates() {
    for effect in [Effect::CutAfter, Effect::CutBody(0), Effect::malformed_json()] {
        let play = AsTemplate::new().await;
        let carried_out = !matches!(effect, Effect::Answer { .. });
        play.stage.world.fault(Fault::on(Call::RegisterTemplate, effect));
        let step = play.restore().await.unwrap();
        assert_eq!(play.registered(), 1, "it was asked for again");
        if carried_out {
            let [made] = &play.made()[..] else { panic!("{:?}", play.made()) };
            assert_eq!(
                (step.outcome, step.facts.template_id),
                (StepOutcome::Done, Some(made.id)),
                "{step:?}"
            );
        } else {
            assert_eq!(step.outcome, StepOutcome::Failed);
            let message = step.message.unwrap();
            assert!(message.contains("check the list before you restore again"), "{message}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_may_never_have_come_there_is_told_and_not_sent_again() {
    let play = AsTemplate::new().await;
    play.stage.world.fault(Fault::on(Call::RegisterTemplate, Effect::CutBefore));
    let step = play.restore().await.unwrap();
    assert_eq!((step.outcome, step.facts.template_id), (StepOutcome::Failed, None), "{step:?}");
    assert!(step.message.unwrap().contains("check the list before you restore again"));
    assert_eq!((play.made().len(), play.registered()), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_told_in_the_platforms_words_but_for_the_address() {
    let play = AsTemplate::new().await;
    play.restore().await.unwrap();
    let address = play.made()[0].url.clone().unwrap();
    let play = AsTemplate::new().await;
    // The clock stands, so the address is the same.
    let said = json!({ "message": format!("can't fetch {address}: no route") }).to_string();
    let answer =
        Effect::Answer { status: StatusCode::BAD_REQUEST, content_type: "application/json", body: said };
    play.stage.world.fault(Fault::on(Call::RegisterTemplate, answer));
    let step = play.restore().await.unwrap();
    let signature = address.split_once("X-Amz-Signature=").unwrap().1;
    let all = format!("{step:?} {:?}", play.stage.audit());
    assert!(step.message.as_ref().unwrap().contains("can't fetch"), "{step:?}");
    assert!(!all.contains(&signature[..8]), "{all}");

    let play = AsTemplate::new().await;
    play.stage.world.fault(Fault::on(
        Call::RegisterTemplate,
        Effect::operation_fails("fault", "the checksum does not match"),
    ));
    let step = play.restore().await.unwrap();
    assert_eq!(step.outcome, StepOutcome::Failed);
    assert!(step.message.unwrap().contains("the checksum does not match"));
    assert!(play.made().is_empty());
}

#[tokio::test(start_paused = true)]
async fn without_a_word_on_how_it_boots_somebody_has_to_say_it() {
    let mut play = AsTemplate::new().await;
    for edit in [None, Some("bios; rm")] {
        let template = play.manifest().template.as_mut().map(Arc::make_mut);
        match (edit, template) {
            (Some(odd), Some(template)) => template.boot_mode = Some(odd.to_owned()),
            (None, Some(template)) => template.boot_mode = None,
            _ => panic!("the export kept nothing of the template"),
        }
        let refused = play.restore().await.unwrap_err().to_string();
        assert!(refused.contains("--boot-mode"), "{refused}");
    }
    play.manifest().template = None;
    assert!(play.restore().await.unwrap_err().to_string().contains("--boot-mode"));
    assert_eq!(play.registered(), 0);

    let wanted = NewTemplate {
        name: "golden".to_owned(),
        zone: play.stage.zone.clone(),
        boot_mode: Some(BootMode::Legacy),
        force: false,
    };
    let step =
        to_template(&play.runner, std::slice::from_ref(&play.found), &BuildFacts::default(), &wanted, None)
            .await
            .unwrap();
    assert_eq!(step.outcome, StepOutcome::Done, "{step:?}");
    let made = &play.made()[0];
    assert_eq!((&*made.boot_mode, made.ssh_key_enabled, made.password_enabled), ("legacy", true, true));
}

#[tokio::test(start_paused = true)]
async fn without_a_bucket_there_is_no_template_and_nothing_is_asked_for() {
    let play = AsTemplate::new().await;
    let vault = Arc::clone(&play.runner.archives[&"vault".parse().unwrap()]);
    let found = ArchivedCopy { archive: vault, copy: play.found.copy.clone() };
    let wanted = NewTemplate {
        name: "golden".to_owned(),
        zone: play.stage.zone.clone(),
        boot_mode: None,
        force: false,
    };
    let refused = to_template(&play.runner, &[found], &BuildFacts::default(), &wanted, None)
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.contains("`s3`") && refused.contains("--to"), "{refused}");
    assert!(play.stage.world.changes().is_empty());
}

/// Fetches what a template was registered with, as the platform would.
async fn fetch(template: &Template) -> String {
    let request = Request {
        method: Method::GET,
        url: template.url.as_ref().unwrap().parse().unwrap(),
        headers: HeaderMap::new(),
        body: Bytes::new(),
        purpose: Purpose::Image,
    };
    let answer = HttpTransport::default().send(request).await.unwrap();
    assert_eq!(answer.status, StatusCode::OK);
    hash(answer.body).await.to_string()
}

/// Carries out the commands that a restore printed: a shell reads them, and the zone gets what `exo` would ask for.
fn build(world: &World, zone: &ZoneName, folder: &Path, told: &Value) -> InstanceId {
    let create = words(folder, told["next"].as_str().unwrap());
    let mut options = create.iter().map(String::as_str);
    let beginning: Vec<&str> = options.by_ref().take(4).collect();
    assert_eq!(beginning[..3], ["compute", "instance", "create"]);
    let (mut body, mut networks) = (json!({ "name": beginning[3], "labels": {} }), json!([]));
    let push = |list: &mut Value, entry: Value| match list {
        Value::Array(list) => list.push(entry),
        list => *list = json!([entry]),
    };
    while let Some(option) = options.next() {
        if let Some(asked) = option.strip_prefix("--application-consistent-snapshot-enabled=") {
            body["application-consistent-snapshot-enabled"] = (asked == "true").into();
            continue;
        }
        match option {
            "--secureboot" => body["secureboot-enabled"] = true.into(),
            "--tpm" => body["tpm-enabled"] = true.into(),
            _ => {
                let value = options.next().unwrap();
                match option {
                    "--zone" => assert_eq!(value, zone.as_str()),
                    "--template" => body["template"] = json!({ "id": value }),
                    "--template-visibility" => assert_eq!(value, "private"),
                    "--disk-size" => body["disk-size"] = value.parse::<u64>().unwrap().into(),
                    "--instance-type" => {
                        assert_eq!(value, "standard.medium");
                        body["instance-type"] = json!({ "id": INSTANCE_TYPE });
                    }
                    "--security-group" => push(&mut body["security-groups"], json!({ "id": value })),
                    "--anti-affinity-group" => {
                        push(&mut body["anti-affinity-groups"], json!({ "id": value }));
                    }
                    "--private-network" => push(&mut networks, json!({ "id": value })),
                    "--deploy-target" => body["deploy-target"] = json!({ "id": value }),
                    "--public-ip" => body["public-ip-assignment"] = value.into(),
                    "--ssh-key" => push(&mut body["ssh-keys"], json!({ "name": of_csv(value) })),
                    "--label" => {
                        let field =
                            if value.matches('=').count() > 1 { of_csv(value) } else { value.to_owned() };
                        let (key, value) = field.split_once('=').unwrap();
                        body["labels"][key] = value.into();
                    }
                    other => panic!("{other}"),
                }
            }
        }
    }
    let made = world.create_instance(zone, body);
    let mut addresses = json!([]);
    for command in told["then"].as_array().unwrap() {
        let words = words(folder, command.as_str().unwrap());
        assert_eq!(words[..5], ["compute", "instance", "elastic-ip", "attach", "web-1"]);
        push(&mut addresses, json!({ "id": words[5] }));
    }
    world.set_machine(made, json!({ "private-networks": networks, "elastic-ips": addresses }));
    made
}

/// The arguments that `exo` gets from a shell.
fn words(folder: &Path, command: &str) -> Vec<String> {
    let script = format!("exo() {{ for word in \"$@\"; do printf '%s\\0' \"$word\"; done; }}\n{command}\n");
    let ended = std::process::Command::new("sh").arg("-c").arg(script).current_dir(folder).output().unwrap();
    assert!(ended.status.success() && ended.stderr.is_empty(), "{ended:?}");
    let text = String::from_utf8(ended.stdout).unwrap();
    text.split_terminator('\0').map(str::to_owned).collect()
}

/// A line of CSV with one field.
fn of_csv(line: &str) -> String {
    match line.strip_prefix('"').and_then(|line| line.strip_suffix('"')) {
        Some(quoted) => quoted.replace("\"\"", "\""),
        None => line.to_owned(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_instance_comes_back_as_a_template_whose_source_is_what_was_exported() {
    let Some(mut bucket_server) = Server::start() else { return };
    let begun = SystemClock::start().now();
    let world = World::new(Arc::new(SimClock::starting_at(begun)), 7);
    world.set_operations_take(Duration::ZERO);
    let zone = world.add_zone("ch-gva-2");
    let served = world.serve(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let instance = |name: &str| {
        let instance = world.add_instance(&zone, name, &[]);
        world.set_disk(instance, DiskShape::with_data_mib(20));
        let snapshot = world.add_snapshot(instance, begun - SignedDuration::from_hours(1));
        (instance, snapshot, world.image(snapshot).md5().to_owned())
    };
    let (web, db) = (instance("web-1"), instance("db; rm -rf ~"));
    world.rename_instance(web.0, "web-1", &[("backup", "nightly"), ("say", "it's $HOME, a=b")]);
    world.set_machine(web.0, machine());
    world.set_consistency(web.0, true, true);
    let before = world.shown(web.0);
    // One goes to the bucket, the other to the folder alone.
    let policy = |name: &str, of: &str, archive: &str| {
        format!(
            "[policies.{name}]\nzones = [\"ch-gva-2\"]\n[policies.{name}.select]\ninstances = [\"{of}\"]\n\
             [policies.{name}.export]\narchives = [\"{archive}\"]\nrequired = false\n"
        )
    };
    let bucket = format!(
        "[archives.offsite]\ntype = \"s3\"\nendpoint = \"{}\"\nregion = \"us-east-1\"\nbucket = \"bucket\"\nprefix = \"re/store/\"\n",
        bucket_server.endpoint
    );
    let policies = [bucket, policy("far", "web-1", "offsite"), policy("near", "db*", "vault")].concat();
    let exoscale = format!(
        "[exoscale]\nendpoint = \"{}\"\npoll_interval = \"100ms\"\nrequests_per_second = 1000\n",
        served.endpoint()
    );
    let config = exoscale + &crate::stage::config_text(folder.path(), &policies);
    write(&folder.path().join("snapwarden.toml"), config.as_bytes());
    let (bucket_key, bucket_secret) = ("EXO1", "hush-hush-hush");
    let variables = [
        ("EXOSCALE_API_KEY", API_KEY),
        ("EXOSCALE_API_SECRET", API_SECRET),
        ("AWS_ACCESS_KEY_ID", bucket_key),
        ("AWS_SECRET_ACCESS_KEY", bucket_secret),
    ];
    let said = program(folder.path(), &variables, &["once"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    // The archive's marker, the image, its manifest and its MD5, and the end of the audit log.
    assert_eq!(bucket_server.keys().len(), 5);

    world.remove_instance(web.0);
    world.remove_instance(db.0);
    assert!(world.snapshots(&zone).is_empty());

    let restore = async |arguments: &[&str]| {
        let all = [&["restore", "--zone", "ch-gva-2", "--log-level", "trace"], arguments].concat();
        let said = program(folder.path(), &variables, &all).await;
        assert_eq!(said.status, 0, "{said:?}");
        said
    };
    let said = restore(&["--latest", "web-1", "--to-template", "web-again", "--output", "json"]).await;
    let told = said.json();
    let id: TemplateId = told["template_id"].as_str().unwrap().parse().unwrap();
    let made = private(&world, &zone);
    assert_eq!((made.len(), made[0].id, &*made[0].name), (1, id, "web-again"));
    assert_eq!((&told["archive"], &told["snapshot_id"]), (&json!("offsite"), &json!(web.1.to_string())));
    // The printed commands, by a shell, build it again.
    let again = build(&world, &zone, folder.path(), &told);
    // User data is only where an archive may hold it.
    let different = ["id", "created-at", "snapshots", "template", "public-ip", "user-data"];
    let shown = |id: InstanceId| without(world.shown(id), &different);
    assert_eq!(shown(again), without(before.clone(), &different));
    assert_eq!(
        (world.template_of(again), &told["next"].as_str().unwrap()[..32]),
        (id, "exo compute instance create web-")
    );
    let source: TemplateId = before["template"]["id"].as_str().unwrap().parse().unwrap();
    assert_ne!(source, id);
    assert_eq!((&*made[0].version, &*made[0].build), ("24.04 LTS", "2026-01-01-simulated"));
    assert_eq!(
        (&*made[0].maintainer, made[0].ssh_key_enabled, made[0].password_enabled),
        ("Exoscale", true, false)
    );
    assert_eq!((&*made[0].boot_mode, made[0].default_user.as_deref()), ("uefi", Some("ubuntu")));
    assert_eq!(made[0].checksum.as_ref(), Some(&web.2));
    assert_eq!(fetch(&made[0]).await, web.2);

    // What only the folder has goes through the bucket, and is a verified copy there.
    let text = restore(&[&db.1.to_string(), "--to-template", "db-again"]).await;
    let made = private(&world, &zone).into_iter().find(|template| template.name == "db-again").unwrap();
    assert_eq!(made.checksum.as_ref(), Some(&db.2));
    assert_eq!(fetch(&made).await, db.2);
    let command = format!("create 'db; rm -rf ~' \\\n    --zone ch-gva-2 \\\n    --template {} ", made.id);
    assert!(text.out.contains(&command), "{text:?}");
    assert_eq!(bucket_server.keys().len(), 8);
    let listed =
        program(folder.path(), &variables, &["archive", "list", "offsite", "--output", "json"]).await;
    assert_eq!(listed.json()[0]["images"].as_array().unwrap().len(), 2, "{listed:?}");

    // Elsewhere the archive is not there, so nothing is stored.
    let elsewhere = config.replace("prefix = \"re/store/\"", "prefix = \"elsewhere/\"");
    write(&folder.path().join("snapwarden.toml"), elsewhere.as_bytes());
    let arguments = ["restore", "--zone", "ch-gva-2", &db.1.to_string(), "--to-template", "db-3"];
    let refused = program(folder.path(), &variables, &arguments).await;
    assert_eq!(refused.status, 1, "{refused:?}");
    assert!(refused.err.contains("archive `offsite`: it is not there"), "{refused:?}");
    assert_eq!(bucket_server.keys().len(), 8);
    write(&folder.path().join("snapwarden.toml"), config.as_bytes());

    // From the bucket to a file, as well.
    let said =
        program(folder.path(), &variables, &["restore", &web.1.to_string(), "--to", "web.qcow2"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    let mut md5 = Md5::new();
    md5.update(&bytes_of(&folder.path().join("web.qcow2")));
    assert_eq!(md5.finish().to_string(), web.2);

    // An existing instance gets the disk back; its id and all that it is attached to stay.
    let shown = world.shown(again);
    let arguments = ["--latest", &before["id"].as_str().unwrap()[..8], "--to-instance", &again.to_string()];
    let safe = ["--yes", "--from-other", "--copy-to", "vault", "--output", "json"];
    let refused =
        program(folder.path(), &variables, &[&["restore", "--zone", "ch-gva-2"], &arguments[..]].concat())
            .await;
    refused.refused(2, &["nobody can be asked", "--yes"]);
    let of_other =
        [&["restore", "--zone", "ch-gva-2"], &arguments[..], &["--yes", "--copy-to", "vault"]].concat();
    program(folder.path(), &variables, &of_other).await.refused(1, &["--from-other"]);
    let reset = restore(&[&arguments[..], &safe[..]].concat()).await;
    let told_of_reset = reset.json();
    let different = ["snapshots", "template"];
    assert_eq!(without(world.shown(again), &different), without(shown, &different));
    let on: TemplateId = told_of_reset["template_id"].as_str().unwrap().parse().unwrap();
    assert_eq!((world.template_of(again), &told_of_reset["before_archive"]), (on, &json!("vault")));
    let holds = program(folder.path(), &variables, &["holds", "--output", "json"]).await;
    assert!(holds.out.contains(told_of_reset["before_snapshot_id"].as_str().unwrap()), "{holds:?}");

    // And back to what it was before that.
    let safety = told_of_reset["before_snapshot_id"].as_str().unwrap();
    program(folder.path(), &variables, &["revert", safety]).await.refused(2, &["--yes"]);
    let reverted =
        program(folder.path(), &variables, &["revert", &safety[..8], "--yes", "--copy-to", "vault"]).await;
    assert_eq!(reverted.status, 0, "{reverted:?}");
    reverted.has(&["reverted instance web-1", "on hold until", "with a verified copy in archive vault"]);
    assert!(world.is_running(again));

    // What is not said at all can't hold a secret.
    assert!(text.err.contains("register-template"), "{text:?}");
    for secret in ["X-Amz-Signature", bucket_secret, API_SECRET, "aHVzaC1odXNo"] {
        for said in [
            &reset.out,
            &reset.err,
            &reverted.err,
            &text.out,
            &text.err,
            &told.to_string(),
            &said.err,
            &read(&folder.path().join("state/audit.jsonl")),
        ] {
            assert!(!said.contains(secret), "{secret} in {said}");
        }
    }
}
