//! Buckets that keep versions and lock them: what is kept stays, whoever has the program's key.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Method, header};
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use snapwarden::disk::{Access, create_folders};
use snapwarden::run::report::RunResult;
use snapwarden::sim::bucket::{SimBucket, Version};
use snapwarden::sim::disk::MemoryDisk;
use snapwarden::sim::image::DiskShape;
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::directory::StateDirectory;
use snapwarden::state::holds::Hold;
use snapwarden::transport::{Purpose, Request, Response, Transport, TransportError};

use crate::command_line::{Play, end_of, write};
use crate::s3::Server;
use crate::stage::{Said, Stage, ended, steps};

/// The zone, and a bucket at a host of its own.
#[derive(Debug)]
struct ZoneAndBucket {
    zone: Arc<dyn Transport>,
    bucket: SimBucket,
}

impl Transport for ZoneAndBucket {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        let is_bucket = request.url.host_str() == Some("store.example");
        if is_bucket { self.bucket.send(request) } else { self.zone.send(request) }
    }
}

/// An empty zone, and an empty bucket that locks.
fn scene() -> (Stage, SimBucket) {
    let disk = MemoryDisk::new();
    let mut stage = Stage::over(Arc::new(disk.clone()));
    create_folders(&disk, stage.folder.path(), Access::Owner).unwrap();
    let bucket = SimBucket::new(Arc::new(stage.clock.clone()), true);
    let (zone, bucket_too) = (stage.world.transport(), bucket.clone());
    stage.seams.transport = Arc::new(ZoneAndBucket { zone, bucket: bucket_too });
    write(&stage.folder.path().join("key"), "api_key=EXO1\napi_secret=hush\n");
    (stage, bucket)
}

/// A policy that exports every night into the bucket, whose archive has these keys.
fn policies(stage: &Stage, archive: &str) -> String {
    format!(
        "[archives.offsite]\ntype = \"s3\"\nendpoint = \"https://store.example\"\nregion = \"r\"\nbucket = \"backups\"\n\
         prefix = \"snapwarden/\"\ncredentials_file = \"{}/key\"\n{archive}\n\
         [policies.nightly]\nzones = [\"ch-gva-2\"]\ncreate = true\n\
         [policies.nightly.retention]\nkeep_last = 2\n\
         [policies.nightly.export]\narchives = [\"offsite\"]\n",
        stage.folder.path().display()
    )
}

/// What the name of a copy's file ends with; empty for the files of the archive itself.
fn end_of_copy(key: &str) -> &str {
    let name = key.strip_prefix("snapwarden/ch-gva-2/").and_then(|rest| rest.split_once('/'));
    name.and_then(|(_, name)| name.split_once('.')).map_or("", |(_, end)| end)
}

/// The versions that are locked now, by key and id.
fn locked(bucket: &SimBucket, now: Timestamp) -> BTreeMap<(String, String), Version> {
    let mut locked = BTreeMap::new();
    for (key, versions) in bucket.versions() {
        for version in versions {
            if version.lock.as_ref().is_some_and(|(_, until)| *until > now) {
                locked.insert((key.clone(), version.id.clone()), version);
            }
        }
    }
    locked
}

/// A request with the program's key.
async fn with_the_key(
    bucket: &SimBucket,
    method: Method,
    key: &str,
    query: &str,
    body: &str,
) -> http::StatusCode {
    let mut headers = HeaderMap::new();
    headers.insert(header::AUTHORIZATION, HeaderValue::from_static("the program's own"));
    headers.insert("x-amz-bypass-governance-retention", HeaderValue::from_static("true"));
    let signed = Sha256::digest(body).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
    headers.insert("x-amz-content-sha256", signed.parse().unwrap());
    let url = format!("https://store.example/backups/{key}?{query}").parse().unwrap();
    let body = Bytes::from(body.to_owned());
    let request = Request { method, url, headers, body, purpose: Purpose::Image };
    bucket.send(request).await.unwrap().status
}

/// Nights that are played unless `SNAPWARDEN_NIGHTS` says otherwise: every lock of the first ones has ended by then, and a month
/// has changed three times. A year takes minutes of the processor.
const NIGHTS: u32 = 100;

#[tokio::test(start_paused = true)]
async fn nights_on_end_lock_what_is_kept_and_lose_nothing_that_is_locked() {
    let nights = std::env::var("SNAPWARDEN_NIGHTS").map_or(NIGHTS, |nights| nights.parse().unwrap());
    let (stage, bucket) = scene();
    let instances = ["web-1", "db-1", "mail-1"].map(|name| stage.world.add_instance(&stage.zone, name, &[]));
    for instance in instances {
        stage.world.set_disk(instance, DiskShape::with_data_mib(1));
    }
    let archive = "lock_for = \"14d\"\nlock_mode = \"compliance\"\nnoncurrent = \"delete\"\n\
                   [archives.offsite.retention]\nkeep_daily = 7\nkeep_monthly = 2\n";
    let policies = policies(&stage, archive);
    let day = SignedDuration::from_hours(24);
    let (mut before, mut images_max) = (BTreeMap::new(), 0);
    for night in 0..nights {
        let report = stage.run(&policies).await;
        assert_eq!(report.result, RunResult::Success, "night {night}: {report:#?}");
        assert_eq!(ended(&report, Action::Export, StepOutcome::Done), 3, "night {night}");
        let (now, versions) = (stage.now(), bucket.versions());
        let locked = locked(&bucket, now);
        // Nothing that was locked until now or longer is gone, and no lock was shortened.
        for ((key, id), then) in &before {
            let Version { lock: Some((_, until)), bytes, .. } = then else { continue };
            if *until <= now {
                continue;
            }
            let there = versions.get(key).and_then(|all| all.iter().find(|version| version.id == *id));
            let there = there.unwrap_or_else(|| panic!("night {night}: {key} {id} is gone"));
            let start = |bytes: &Option<Bytes>| bytes.as_ref().map(|bytes| bytes.as_ptr());
            assert_eq!(start(&there.bytes), start(bytes), "night {night}: {key}");
            assert!(there.lock.as_ref().unwrap().1 >= *until, "night {night}: {key}: a lock was shortened");
        }
        // What is there is locked, image and manifest, and for no longer than was asked for.
        for key in bucket.keys().iter().filter(|key| ["qcow2", "json"].contains(&end_of_copy(key))) {
            let (mode, until) = versions[key].last().unwrap().lock.clone().unwrap_or_else(|| {
                panic!("night {night}: {key} is not locked");
            });
            let left = until.duration_since(now);
            assert!(mode == "COMPLIANCE" && left <= 14 * day, "night {night}: {key}: {left}");
        }
        let newest = |version: &&Version| version.lock.as_ref().unwrap().1 > now + 13 * day;
        assert!(locked.values().filter(newest).count() >= 6, "night {night}");
        let images = versions.iter().filter(|(key, _)| end_of_copy(key) == "qcow2");
        images_max =
            images_max.max(images.flat_map(|(_, all)| all).filter(|one| one.bytes.is_some()).count());
        before = locked;
        stage.step(day);
    }
    // 7 daily and up to 2 monthly ones, and those whose lock has not ended yet: what has no lock any more is deleted for good.
    assert!(images_max <= 3 * (7 + 2 + 14 + 2), "{images_max} images");

    // Somebody with the program's key does all that can be done with it.
    let now = stage.now();
    let victims = locked(&bucket, now);
    assert!(victims.len() > 100, "{}", victims.len());
    let soon = now + SignedDuration::from_secs(5);
    for (key, versions) in bucket.versions() {
        for version in &versions {
            let id = format!("versionId={}", version.id);
            for mode in ["GOVERNANCE", "COMPLIANCE"] {
                let body = format!(
                    "<Retention><Mode>{mode}</Mode><RetainUntilDate>{soon}</RetainUntilDate></Retention>"
                );
                with_the_key(&bucket, Method::PUT, &key, &format!("retention&{id}"), &body).await;
            }
            with_the_key(&bucket, Method::DELETE, &key, &id, "").await;
        }
        with_the_key(&bucket, Method::PUT, &key, "", "overwritten").await;
        with_the_key(&bucket, Method::DELETE, &key, "", "").await;
    }
    assert!(bucket.keys().is_empty(), "all is hidden");
    let left = locked(&bucket, now);
    for (name, version) in &victims {
        assert_eq!(left[name].bytes, version.bytes, "{name:?}");
        assert_eq!(left[name].lock, version.lock, "{name:?}");
    }
    // The next night says so, and deletes nothing.
    let there = stage.there();
    stage.step(day);
    let report = stage.run(&policies).await;
    assert!(matches!(report.result, RunResult::Partial | RunResult::Failed), "{report:#?}");
    assert_eq!(ended(&report, Action::Delete, StepOutcome::Done), 0);
    assert_eq!(ended(&report, Action::PruneCopy, StepOutcome::Done), 0);
    assert!(there.iter().all(|id| stage.there().contains(id)));
}

#[tokio::test(start_paused = true)]
async fn a_copy_is_locked_no_longer_than_the_archive_keeps_it() {
    let (stage, bucket) = scene();
    stage.instance("web-1", 0);
    let archive = "lock_for = \"60d\"\n[archives.offsite.retention]\nmax_age = \"10d\"\nkeep_last = 2\n";
    let policies = policies(&stage, archive);
    assert_eq!(stage.run(&policies).await.result, RunResult::Success);
    let image = |bucket: &SimBucket, at: usize| {
        let versions = bucket.versions();
        let mut images = versions.iter().filter(|(key, _)| end_of_copy(key) == "qcow2");
        images.nth(at).unwrap().1.last().unwrap().clone()
    };
    // The only one is kept whatever its age (`min_keep`).
    let until = image(&bucket, 0).lock.unwrap().1;
    assert_eq!(until.duration_since(stage.now()).as_hours(), 60 * 24);
    stage.step(SignedDuration::from_hours(24));
    assert_eq!(stage.run(&policies).await.result, RunResult::Success);
    assert!(image(&bucket, 0).lock.unwrap().1 >= until, "never shortened");
    stage.step(SignedDuration::from_hours(24));
    bucket.requests();
    assert_eq!(stage.run(&policies).await.result, RunResult::Success);
    let locks = bucket.requests()["PUT retention"];
    assert_eq!(locks, 4, "the new one and the one before it: their manifests and their images");
    let second = image(&bucket, 1).lock.unwrap();
    assert_eq!(second.0, "GOVERNANCE");

    // A run that changes nothing costs no request for a lock.
    assert_eq!(
        stage.run(&policies.replace("create = true", "create = false")).await.result,
        RunResult::Success
    );
    assert_eq!(bucket.requests().get("PUT retention"), None);
}

#[tokio::test(start_paused = true)]
async fn a_hold_is_a_legal_hold_until_it_ends() {
    let (stage, bucket) = scene();
    stage.instance("web-1", 0);
    let policies = policies(&stage, "lock_for = \"5d\"");
    assert_eq!(stage.run(&policies).await.result, RunResult::Success);
    let with_hold = |bucket: &SimBucket| -> Vec<String> {
        let versions = bucket.versions().into_iter();
        let keys = versions.filter(|(_, all)| all.iter().any(|version| version.has_legal_hold));
        keys.map(|(key, _)| key.rsplit_once('.').unwrap().1.to_owned()).collect()
    };
    assert!(with_hold(&bucket).is_empty());
    let directory = StateDirectory::open(stage.seams.disk.clone(), &stage.state()).unwrap();
    let until = Some(stage.now() + SignedDuration::from_hours(36));
    let hold = Hold { snapshot: stage.there()[0], until, reason: None, since: stage.now(), about: None };
    directory.hold(&stage.clock, hold).await.unwrap();
    stage.step(SignedDuration::from_hours(24));
    assert_eq!(stage.run(&policies).await.result, RunResult::Success);
    assert_eq!(with_hold(&bucket), ["json", "qcow2"]);
    stage.step(SignedDuration::from_hours(24));
    assert_eq!(stage.run(&policies).await.result, RunResult::Success);
    assert!(with_hold(&bucket).is_empty(), "it ended");
}

#[tokio::test(start_paused = true)]
async fn copies_that_can_not_be_locked_are_a_failure_that_is_told() {
    let (stage, bucket) = scene();
    stage.instance("web-1", 0);
    let policies = policies(&stage, "lock_for = \"5d\"");
    bucket.deny("retention");
    let report = stage.run(&policies).await;
    assert_eq!(report.result, RunResult::Partial, "{report:#?}");
    let failures = report.zones[0].failures.join("; ");
    for words in ["archive offsite: copies are not locked: 1 of 1 copy", "needs `s3:PutObjectRetention`"] {
        assert!(failures.contains(words), "{words}: {failures}");
    }
    assert_eq!(steps(&report, Action::Export).len(), 1);
}

/// A zone with one instance, and a bucket of a real server that locks.
struct Locked {
    play: Play,
    of_bucket: Value,
}

impl Locked {
    /// With these keys of the archive.
    async fn new(server: &mut Server, archive: &str) -> Self {
        let of_bucket = server.ask("locked");
        let (play, _) = Play::five("").await;
        let locked = Self { play, of_bucket };
        locked.configure(server, archive);
        locked
    }

    fn configure(&self, server: &Server, archive: &str) {
        self.play.configure(&format!(
            "[archives.offsite]\ntype = \"s3\"\nendpoint = \"{}\"\nregion = {}\nbucket = {}\n\
             prefix = \"snapwarden/\"\n{archive}\n[policies.nightly]\nzones = [\"ch-gva-2\"]\n\
             [policies.nightly.export]\narchives = [\"offsite\"]\nsnapshots = \"all\"\n",
            server.endpoint, self.of_bucket["region"], self.of_bucket["bucket"]
        ));
    }

    async fn run(&self, arguments: &[&str]) -> Said {
        let mut command = self.play.command(arguments);
        let word = |name: &str| self.of_bucket[name].as_str().unwrap().to_owned();
        command.env("AWS_ACCESS_KEY_ID", word("key")).env("AWS_SECRET_ACCESS_KEY", word("secret"));
        end_of(command).await
    }

    async fn list(&self) -> Value {
        let said = self.run(&["archive", "list", "offsite", "--output", "json"]).await;
        said.json()[0].clone()
    }
}

/// Whether the server does all that S3 documents: moto lets everybody shorten a lock.
fn enforces_locks() -> bool {
    std::env::var_os("SNAPWARDEN_S3_ENDPOINT").is_some()
}

/// The images in a listing, but for what another look changes.
fn images(listed: &Value) -> Vec<(String, String)> {
    let images = listed["images"].as_array().unwrap().iter();
    images.map(|image| (image["file"].to_string(), image["md5"].to_string())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_the_programs_key_destroys_nothing_that_is_locked() {
    let Some(mut server) = Server::start() else { return };
    let scene = Locked::new(&mut server, "lock_for = \"1d\"\nlock_mode = \"compliance\"").await;
    let said = scene.run(&["once"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    let before = scene.list().await;
    assert_eq!((images(&before).len(), &before["hidden"]), (5, &Value::Array(Vec::new())), "{before:#}");
    let kept = server.ask("kept");
    let locked: Vec<(&String, &Value)> =
        kept.as_object().unwrap().iter().filter(|(_, version)| version["mode"] == "COMPLIANCE").collect();
    assert_eq!(locked.len(), 10, "five images and their manifests: {kept:#}");

    let done = server.ask("enemy");
    println!("the store let pass: {done}");
    let after = server.ask("kept");
    for (name, version) in &locked {
        let left = &after[name.as_str()];
        assert_eq!((&left["md5"], &left["bytes"]), (&version["md5"], &version["bytes"]), "{name}: {done}");
        let is_shorter = left["until"].as_f64() < version["until"].as_f64();
        assert!(!is_shorter || !enforces_locks(), "{name}: a lock was shortened: {done}");
    }
    let hidden = scene.run(&["archive", "list", "offsite"]).await;
    assert_eq!(hidden.out.matches("hidden by a delete marker: s3://").count(), 5, "{hidden:?}");
    let there = scene.play.there().len();
    assert_ne!(scene.run(&["once"]).await.status, 0, "it is a failure");
    assert_eq!(scene.play.there().len(), there);

    // Its owner deletes what was put above: all is there again, and every byte is right.
    server.ask("mend");
    assert_eq!(images(&scene.list().await), images(&before));
    let verified = scene.run(&["archive", "verify", "offsite"]).await;
    assert_eq!(verified.status, 0, "{verified:?}");
    assert!(verified.out.contains("5 images read, 5 good"), "{verified:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_proves_that_a_lock_holds_against_its_own_key() {
    let Some(mut server) = Server::start() else { return };
    let scene = Locked::new(&mut server, "lock_for = \"1d\"\nlock_mode = \"compliance\"").await;
    let check = ["check", "--online", "--output", "json"];
    let row = |said: &Said, what: &str| {
        let json = said.json();
        let rows = json["online"].as_array().unwrap();
        let row = rows.iter().find(|row| row["where"] == "archive offsite" && row["what"] == what);
        row.unwrap_or_else(|| panic!("{what}: {json:#}")).clone()
    };
    let said = scene.run(&check).await;
    assert_eq!(row(&said, "lock")["error"], Value::Null, "{said:?}");
    assert_eq!(row(&said, "versioning")["note"], "Enabled");
    if enforces_locks() {
        assert_eq!(row(&said, "keep the lock")["error"], Value::Null, "{said:?}");
        assert_eq!(said.status, 0, "{said:?}");
    } else {
        let why = row(&said, "keep the lock")["error"].to_string();
        assert!(why.contains("can break a lock (shorten it, "), "{why}");
        assert!(why.contains("this store does not enforce locks"), "{why}");
    }

    // This key may bypass: it belongs to the owner of the bucket.
    scene.configure(&server, "lock_for = \"1d\"");
    let said = scene.run(&check).await;
    let why = row(&said, "keep the lock")["error"].to_string();
    assert!(why.contains("can break a lock") && why.contains("s3:BypassGovernanceRetention"), "{why}");
    assert_eq!(said.status, 1, "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pruning_tells_what_it_freed_where_versions_are_kept() {
    let Some(mut server) = Server::start() else { return };
    let pruned = "[archives.offsite.retention]\nkeep_last = 2\n[archives.offsite.guard]\nsettle = \"0s\"";
    let scene = Locked::new(&mut server, "").await;
    let said = scene.run(&["once"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    let bytes: u64 = scene.list().await["images"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["size_bytes"].as_u64().unwrap())
        .sum();

    scene.configure(&server, pruned);
    let prune = ["archive", "prune", "offsite"];
    let said = scene.run(&prune).await;
    assert_eq!(said.status, 0, "{said:?}");
    for words in
        ["freed: 0 B of", "the bucket keeps", "\"NoncurrentDays\": 30", "\"Prefix\": \"snapwarden/\""]
    {
        assert!(said.out.contains(words), "{words}: {said:?}");
    }
    let listed = scene.list().await;
    assert_eq!((images(&listed).len(), listed["hidden"].as_array().unwrap().len()), (2, 0), "{listed:#}");
    let noncurrent = listed["noncurrent"]["bytes"].as_u64().unwrap();
    assert!(noncurrent > bytes / 2 && noncurrent < bytes, "{noncurrent} of {bytes}");

    // They are deleted once the archive is told to.
    scene.configure(&server, &format!("noncurrent = \"delete\"\n{}", pruned.replace("= 2", "= 1")));
    let said = scene.run(&["archive", "prune", "offsite", "--output", "json"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    let freed = said.json()[0]["freed_bytes"].as_u64().unwrap();
    assert!(freed > 0, "{said:?}");
    let images: Vec<String> = server.ask("kept").as_object().unwrap().keys().cloned().collect();
    let images = images.iter().filter(|name| name.contains(".qcow2 "));
    assert_eq!(images.count(), 1, "those that were pruned before, too");
}
