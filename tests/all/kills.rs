//! The daemon itself, killed in the middle of things and started again, over a zone behind a socket.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use snapwarden::archive::md5::Md5;
use snapwarden::clock::{Clock as _, SystemClock};
use snapwarden::disk::{Access, Disk as _, RealDisk, read_file, replace_file};
use snapwarden::randomness::Randomness as _;
use snapwarden::sim::image::DiskShape;
use snapwarden::sim::randomness::SeededRandomness;
use snapwarden::sim::world::{API_KEY, API_SECRET, World};

use crate::stage::paths;

/// A run every two seconds; the moments at which it is killed are spread over more than one.
const EVERY: i64 = 2;

fn times() -> u64 {
    std::env::var("SNAPWARDEN_KILLS").ok().and_then(|times| times.parse().ok()).unwrap_or(8)
}

fn configuration(folder: &Path, endpoint: &str) -> String {
    format!(
        r#"
[exoscale]
endpoint = "{endpoint}"
request_timeout = "1s"
poll_interval = "50ms"
requests_per_second = 1000
[server]
listen = "127.0.0.1:0"
[state]
directory = "{0}/state"
[archives.vault]
type = "local"
path = "{0}/vault"
[policies.p]
schedule = "*/{EVERY} * * * * *"
zones = ["ch-gva-2"]
create = true
[policies.p.retention]
keep_last = 3
[policies.p.export]
archives = ["vault"]
"#,
        folder.display()
    )
}

/// A daemon, killed when it is dropped: also where a claim about it does not hold.
pub(crate) struct Killed(pub(crate) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(folder: &Path) -> Killed {
    let mut child = Command::new(env!("CARGO_BIN_EXE_snapwarden"))
        .args(["--config", folder.join("snapwarden.toml").to_str().unwrap(), "run"])
        .env("EXOSCALE_API_KEY", API_KEY)
        .env("EXOSCALE_API_SECRET", API_SECRET)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let first: Vec<String> =
        lines.by_ref().map(Result::unwrap).take_while(|line| !line.contains("listens on")).collect();
    // Whatever it says later must go somewhere.
    std::thread::spawn(move || lines.for_each(drop));
    assert!(child.try_wait().unwrap().is_none(), "it did not start: {first:?}");
    Killed(child)
}

#[test]
fn point_33_killed_at_any_moment_the_next_start_doubles_nothing_and_forgets_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let randomness = SeededRandomness::new(23);
    let clock = SystemClock::start();
    let world = World::new(Arc::new(clock), 5);
    let zone = world.add_zone("ch-gva-2");
    for name in ["web-1", "db-1"] {
        let instance = world.add_instance(&zone, name, &[]);
        world.set_disk(instance, DiskShape::with_data_mib(1));
    }
    world.set_operations_take(Duration::from_millis(100));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let address: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let served = runtime.block_on(world.serve(address)).unwrap();
    let text = configuration(folder.path(), &served.endpoint());
    replace_file(&RealDisk, &folder.path().join("snapwarden.toml"), text.as_bytes(), Access::Owner).unwrap();

    // Everything that was ever taken, by instance and slot, while pruning takes away the older ones.
    let mut taken = BTreeMap::new();
    let mut last_success = None;
    for _ in 0..times() {
        let daemon = start(folder.path());
        let life = Duration::from_millis(300 + randomness.next_u64() % 3500);
        runtime.block_on(async { clock.sleep(life).await });
        drop(daemon);
        for snapshot in world.snapshots(&zone) {
            taken.insert(
                snapshot.id,
                (snapshot.instance_id, snapshot.created_at.as_second().div_euclid(EVERY)),
            );
        }
        let success = success(folder.path());
        assert!(success >= last_success, "{success:?} after {last_success:?}");
        last_success = success;
    }
    assert!(last_success.is_some(), "no run ended well");
    let mut slots = BTreeMap::new();
    for slot in taken.values() {
        *slots.entry(slot).or_insert(0) += 1;
    }
    assert!(slots.len() > 2, "{slots:?}");
    assert!(slots.values().all(|count| *count == 1), "two for one slot: {slots:?}");

    // After the last kill it continues as if nothing had happened.
    let _daemon = start(folder.path());
    let before = last_success;
    let waited = clock.elapsed();
    while success(folder.path()) <= before {
        assert!(clock.elapsed().saturating_sub(waited) < Duration::from_mins(1), "no run ends well any more");
        runtime.block_on(async { clock.sleep(Duration::from_millis(50)).await });
    }
}

fn success(folder: &Path) -> Option<String> {
    let bytes = read_file(&RealDisk, &folder.join("state/runs-p.json"), 1 << 20).ok()?;
    let state: serde_json::Value =
        serde_json::from_slice(&bytes).expect("a state file is whole at any moment");
    state["zones"]["ch-gva-2"]["last_success_at"].as_str().map(str::to_owned)
}

fn exporting(folder: &Path, endpoint: &str) -> String {
    format!(
        r#"
[exoscale]
endpoint = "{endpoint}"
request_timeout = "5s"
poll_interval = "20ms"
requests_per_second = 1000
[state]
directory = "{0}/state"
[archives.vault]
type = "local"
path = "{0}/vault"
[policies.p]
zones = ["ch-gva-2"]
[policies.p.export]
archives = ["vault"]
"#,
        folder.display()
    )
}

/// A run of all policies by the configuration in this folder.
pub(crate) fn once(folder: &Path) -> Killed {
    let child = Command::new(env!("CARGO_BIN_EXE_snapwarden"))
        .args(["--config", folder.join("snapwarden.toml").to_str().unwrap(), "once"])
        .env("EXOSCALE_API_KEY", API_KEY)
        .env("EXOSCALE_API_SECRET", API_SECRET)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    Killed(child)
}

/// Every file of the archive by the end of its name.
fn archived(folder: &Path) -> BTreeMap<String, std::path::PathBuf> {
    let named = |path: std::path::PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name.split_once('.').map_or(name.clone(), |(_, end)| end.to_owned()), path)
    };
    let name_of = |path: &std::path::PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    let is_of_image = |path: &std::path::PathBuf| !name_of(path).starts_with("snapwarden-");
    paths(&folder.join("vault")).into_iter().filter(is_of_image).map(named).collect()
}

/// Kills until the image is there, at random moments of the time that one download takes; then it must be right, and must
/// never have been anything else.
#[test]
fn an_export_that_is_killed_again_and_again_ends_in_one_verified_image() {
    let folder = tempfile::tempdir().unwrap();
    let randomness = SeededRandomness::new(std::process::id().into());
    let clock = SystemClock::start();
    let world = World::new(Arc::new(clock), 5);
    let zone = world.add_zone("ch-gva-2");
    let instance = world.add_instance(&zone, "big-1", &[]);
    world.set_disk(instance, DiskShape::with_data_mib(256));
    let snapshot = world.add_snapshot(instance, clock.now());
    let md5 = world.image(snapshot).md5().to_owned();
    world.set_operations_take(Duration::from_millis(20));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let served = runtime.block_on(world.serve("127.0.0.1:0".parse().unwrap())).unwrap();
    let text = exporting(folder.path(), &served.endpoint());
    replace_file(&RealDisk, &folder.path().join("snapwarden.toml"), text.as_bytes(), Access::Owner).unwrap();

    let verified = |when: &str| {
        let files = archived(folder.path());
        assert!(!files.contains_key("qcow2.bad"), "{when}: what was resumed was wrong");
        let Some(manifest) = files.get("json") else { return false };
        let manifest: serde_json::Value =
            serde_json::from_slice(&read_file(&RealDisk, manifest, 1 << 20).unwrap()).unwrap();
        let image = read_file(&RealDisk, &files["qcow2"], 1 << 30).unwrap();
        let mut hash = Md5::new();
        hash.update(&image);
        assert!(hash.finish().to_string() == md5 && manifest["image"]["md5"] == md5, "{when}: a wrong image");
        true
    };
    let (mut kills, mut resumed, mut longest) = (0, 0, Duration::from_secs(2));
    while kills < times() {
        if verified(&format!("after {kills} kills")) {
            // It was quicker than the kill: the next one strikes earlier, on a new way there.
            longest = longest * 3 / 4;
            for path in archived(folder.path()).into_values() {
                RealDisk.remove_file(&path).unwrap();
            }
        }
        if archived(folder.path()).contains_key("qcow2.part.json") {
            resumed += 1;
        }
        let running = once(folder.path());
        let nanos = u64::try_from(longest.as_nanos()).unwrap();
        runtime.block_on(async { clock.sleep(Duration::from_nanos(randomness.next_u64() % nanos)).await });
        drop(running);
        kills += 1;
    }
    if !verified("at last") {
        let mut running = once(folder.path());
        assert!(running.0.wait().unwrap().success());
        assert!(verified("at the end"));
    }
    let ends: Vec<_> = archived(folder.path()).into_keys().collect();
    assert_eq!(ends, ["json", "qcow2", "qcow2.md5"]);
    assert!(resumed > 0 || times() < 20, "no kill left anything that could be resumed");
}
