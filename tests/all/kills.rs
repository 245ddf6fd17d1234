//! The daemon itself, killed in the middle of things and started again, over a zone behind a socket.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use snapwarden::clock::{Clock as _, SystemClock};
use snapwarden::disk::{Access, RealDisk, read_file, replace_file};
use snapwarden::randomness::Randomness as _;
use snapwarden::sim::image::DiskShape;
use snapwarden::sim::randomness::SeededRandomness;
use snapwarden::sim::world::{API_KEY, API_SECRET, World};

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

/// A daemon, killed when it goes out of sight: also where a claim about it does not hold.
struct Killed(Child);

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

    // After the last kill it goes on as if nothing had been.
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
