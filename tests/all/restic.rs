//! Archives in repositories of restic, with the real program. Without it the tests say that they were skipped.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use snapwarden::archive::md5::Md5;
use snapwarden::clock::{Clock as _, SystemClock};
use snapwarden::disk::{Disk as _, RealDisk, read_file};
use snapwarden::randomness::Randomness as _;
use snapwarden::sim::image::DiskShape;
use snapwarden::sim::randomness::SeededRandomness;
use snapwarden::sim::world::World;

use crate::command_line::{Play, write};
use crate::kills::once;
use crate::stage::{paths, skipped};

const POLICY: &str = r#"
[policies.nightly]
zones = ["ch-gva-2"]
[policies.nightly.retention]
keep_last = 2
[policies.nightly.guard]
max_delete_percent = 100
[policies.nightly.export]
archives = ["dedup"]
required = true
"#;

/// A repository in a folder, as an operator makes it.
struct Repository {
    folder: PathBuf,
}

impl Repository {
    fn init(folder: &Path) -> Option<Self> {
        if Command::new("restic").arg("version").output().is_err() {
            skipped(format_args!("restic is not installed, so nothing was stored with it"));
            return None;
        }
        write(&folder.join("password"), "hush-hush\n");
        let repository = Self { folder: folder.to_owned() };
        repository.restic(&["init", "--quiet"]);
        Some(repository)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("restic");
        command.args(arguments).env("RESTIC_CACHE_DIR", self.folder.join("cache-by-hand"));
        command.env("RESTIC_REPOSITORY", self.folder.join("repository"));
        command.env("RESTIC_PASSWORD_FILE", self.folder.join("password"));
        command
    }

    /// What an operator does with restic alone.
    fn restic(&self, arguments: &[&str]) -> Vec<u8> {
        let ended = self.command(arguments).output().unwrap();
        assert!(ended.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&ended.stderr));
        ended.stdout
    }

    fn snapshots(&self) -> Vec<Value> {
        serde_json::from_slice(&self.restic(&["snapshots", "--json"])).unwrap()
    }

    /// The images, with their snapshots.
    fn images(&self) -> Vec<(String, String)> {
        let all = self.snapshots().into_iter().map(|one| {
            (one["id"].as_str().unwrap().to_owned(), one["paths"][0].as_str().unwrap().to_owned())
        });
        all.filter(|(_, path)| Path::new(path).extension().is_some_and(|end| end == "qcow2")).collect()
    }

    /// Its files with data.
    fn packs(&self) -> Vec<PathBuf> {
        paths(&self.folder.join("repository/data"))
    }

    fn section(&self) -> String {
        format!(
            "[archives.dedup]\ntype = \"restic\"\nrepository = \"{0}/repository\"\npassword_file = \"{0}/password\"\n\
             cache_directory = \"{0}/cache\"\n",
            self.folder.display()
        )
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_stored_listed_verified_and_restored_with_and_without_this_program() {
    let play = Play::new().await;
    let Some(repository) = Repository::init(play.folder.path()) else { return };
    let (_, ids) = play.instance("web-1", 4, 24);
    play.configure(&(repository.section() + "[archives.dedup.retention]\nkeep_last = 3\n" + POLICY));
    let said = play.run(&["once"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    assert_eq!(play.there().len(), 2, "the gate has opened");
    let md5 = play.world.image(ids[0]).md5().to_owned();

    // Anybody with restic and the password has the image.
    let [(id, path)] = &repository.images()[..] else { panic!("{:?}", repository.snapshots()) };
    let bytes = repository.restic(&["dump", "--", id, path]);
    let hash = |bytes: &[u8]| {
        let mut md5 = Md5::new();
        md5.update(bytes);
        md5.finish().to_string()
    };
    assert_eq!(hash(&bytes), md5);
    repository.restic(&["check", "--read-data"]);

    let again = play.run(&["once"]).await;
    assert_eq!((again.status, repository.images().len()), (0, 1), "{again:?}");
    let listed = play.run(&["archive", "list", "dedup", "--output", "json"]).await;
    assert_eq!(listed.status, 0, "{listed:?}");
    assert!(listed.out.contains(&md5), "{listed:?}");
    assert_eq!(play.run(&["archive", "verify", "dedup"]).await.status, 0);
    let file = play.path("back.qcow2");
    let restored = play.run(&["restore", "--latest", "web-1", "--to", file.to_str().unwrap()]).await;
    assert_eq!(restored.status, 0, "{restored:?}");
    assert_eq!(hash(&read_file(&RealDisk, &file, 1 << 30).unwrap()), md5);
    assert_eq!(play.run(&["archive", "prune", "dedup"]).await.status, 0);
    assert_eq!(repository.images().len(), 1);

    let all = format!("{said:?}{again:?}{listed:?}{restored:?}");
    assert!(!all.contains("hush-hush"), "{all}");
    // What other users keep in the repository is not ours.
    repository.restic(&["backup", "--quiet", play.path("password").to_str().unwrap()]);
    assert_eq!(play.run(&["archive", "list", "dedup"]).await.status, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_lost_pack_nothing_counts_and_the_gate_stays_shut() {
    let play = Play::new().await;
    let Some(repository) = Repository::init(play.folder.path()) else { return };
    let newest = play.instance("web-1", 2, 24).1[0];
    play.configure(&(repository.section() + POLICY));
    assert_eq!(play.run(&["once"]).await.status, 0);
    let largest =
        || repository.packs().into_iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let (pack, elsewhere) = (largest(), play.path("pack"));
    RealDisk.rename(&pack, &elsewhere).unwrap();

    // The copy that is there is found to be corrupt, and closes the archive.
    let verified = play.run(&["archive", "verify", "dedup"]).await;
    assert!(verified.status == 1 && verified.err.contains("lost or damaged"), "{verified:?}");
    let fewer = POLICY
        .replace("keep_last = 2", "keep_last = 1")
        .replace("percent = 100", "percent = 100\nsettle = \"0s\"");
    play.configure(&(repository.section() + &fewer));
    let said = play.run(&["once"]).await;
    assert!(said.status != 0 && play.there().len() == 2, "nothing is deleted: {said:?}");

    // Without it the image is exported again: restic finds all its data in the index, and reports success.
    let removed = play.run(&["archive", "rm", "dedup", &newest.to_string(), "--yes"]).await;
    assert_eq!(removed.status, 0, "{removed:?}");
    let said = play.run(&["once"]).await;
    assert!(said.status != 0 && play.there().len() == 2, "nothing is deleted: {said:?}");
    assert!(format!("{said:?}").contains("lost data"), "{said:?}");
    assert_eq!(repository.images(), []);

    // The pack is back.
    RealDisk.rename(&elsewhere, &pack).unwrap();
    let said = play.run(&["once"]).await;
    assert!(said.status == 0 && play.there().len() == 1, "{said:?}");
    assert_eq!(play.run(&["archive", "verify", "dedup"]).await.status, 0);
}

/// Killed by the signal that nobody sees coming, at random moments of an export: restic, which goes on, saves what it has got,
/// and no copy is listed that is not whole. `SNAPWARDEN_KILLS=20` kills that often.
#[test]
fn killed_at_any_moment_of_an_export_no_copy_is_listed_that_is_not_whole() {
    let folder = tempfile::tempdir().unwrap();
    let Some(repository) = Repository::init(folder.path()) else { return };
    let kills = std::env::var("SNAPWARDEN_KILLS").ok().and_then(|times| times.parse().ok()).unwrap_or(4);
    let randomness = SeededRandomness::new(std::process::id().into());
    let clock = SystemClock::start();
    let world = World::new(Arc::new(clock), 5);
    let zone = world.add_zone("ch-gva-2");
    let instance = world.add_instance(&zone, "big-1", &[]);
    world.set_disk(instance, DiskShape::with_data_mib(64));
    let snapshot = world.add_snapshot(instance, clock.now());
    let md5 = world.image(snapshot).md5().to_owned();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let address: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let served = runtime.block_on(world.serve(address)).unwrap();
    let text = format!(
        "[exoscale]\nendpoint = \"{}\"\npoll_interval = \"20ms\"\nrequests_per_second = 1000\n[state]\ndirectory = \
         \"{}/state\"\n{}[policies.p]\nzones = [\"ch-gva-2\"]\n[policies.p.export]\narchives = [\"dedup\"]\n",
        served.endpoint(),
        folder.path().display(),
        repository.section()
    );
    write(&folder.path().join("snapwarden.toml"), &text);
    let listed = || {
        let ended = Command::new(env!("CARGO_BIN_EXE_snapwarden"))
            .args(["--config", folder.path().join("snapwarden.toml").to_str().unwrap(), "--output", "json"])
            .args(["archive", "list", "dedup"])
            .output()
            .unwrap();
        String::from_utf8(ended.stdout).unwrap()
    };
    // The first one, undisturbed, says how long an export takes.
    let begun = clock.elapsed();
    assert!(once(folder.path()).0.wait().unwrap().success());
    let whole = clock.elapsed().saturating_sub(begun);
    assert!(listed().contains(&md5));
    let mut wholes = 1;
    for kill in 0..kills {
        // Another disk, so that restic has something to do.
        world.set_disk(instance, DiskShape::with_data_mib(64 + kill));
        let snapshot = world.add_snapshot(instance, clock.now());
        let md5 = world.image(snapshot).md5().to_owned();
        let running = once(folder.path());
        let life = whole * u32::try_from(randomness.next_u64() % 1000).unwrap() / 1000;
        runtime.block_on(async { clock.sleep(life).await });
        drop(running);
        // restic may still be about to save what it has got.
        runtime.block_on(async { clock.sleep(Duration::from_secs(1)).await });
        if listed().contains(&md5) {
            wholes += 1;
        }
    }
    // Every image that a manifest names is whole, and the next run ends well.
    assert!(once(folder.path()).0.wait().unwrap().success());
    let verified = Command::new(env!("CARGO_BIN_EXE_snapwarden"))
        .args([
            "--config",
            folder.path().join("snapwarden.toml").to_str().unwrap(),
            "archive",
            "verify",
            "dedup",
        ])
        .output()
        .unwrap();
    assert!(verified.status.success(), "{wholes} of {kills}: {verified:?}");
}
