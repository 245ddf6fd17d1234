//! How fast the engine judges, and how much memory that takes: `cargo bench --bench retention`.
//!
//! Hourly snapshots of many instances, unordered, and six keep rules in a zone with clock changes.
//! `second_judge` is what a run adds for 10,000 snapshots of which one of each of 100 instances is deleted, and `whole_run` that
//! run, over a simulated zone that answers at once.
//!
//! The README quotes the time on one core and, as `alloc`, the bytes that were asked for at the same time at most; both
//! grow with the number of snapshots, so there are three sizes.

use std::collections::BTreeMap;
use std::sync::Arc;

use divan::counter::ItemsCount;
use divan::{AllocProfiler, Bencher, black_box};
use jiff::{SignedDuration, Timestamp};
use snapwarden::cli::assemble::{self, Seams, Use};
use snapwarden::config;
use snapwarden::credentials::Credentials;
use snapwarden::disk::RealDisk;
use snapwarden::judge;
use snapwarden::policy::Policy;
use snapwarden::retention::inventory::Inventory;
use snapwarden::retention::memory::Memory;
use snapwarden::retention::{decide, plan};
use snapwarden::run::context::{RunOptions, Runner};
use snapwarden::run::second_judge::Judged;
use snapwarden::sim::clock::SimClock;
use snapwarden::sim::processes::SimProcesses;
use snapwarden::sim::randomness::SeededRandomness;
use snapwarden::sim::world::{API_KEY, API_SECRET, World};
use snapwarden::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, SnapshotState};
use uuid::Uuid;

#[global_allocator]
static ALLOC: AllocProfiler = AllocProfiler::system();

fn main() {
    divan::main();
}

const SNAPSHOTS_PER_INSTANCE: u32 = 100;

fn policies(table: &str) -> Vec<Policy> {
    let text = format!(
        "[policies.nightly]\ntimezone = \"Europe/Zurich\"\nzones = [\"ch-gva-2\"]\n[policies.nightly.retention]\n{table}"
    );
    config::parse(&text, "bench.toml", None).expect("a valid configuration").policies
}

/// Six keep rules.
const SIX: &str =
    "keep_last = 5\nkeep_hourly = 24\nkeep_daily = 14\nkeep_weekly = 8\nkeep_monthly = 12\nkeep_yearly = 3\n";
/// Limits instead of counts: what they keep expires one day, and that day is looked for.
const LIMITS: &str = "keep_within = \"2d\"\nkeep_within_daily = \"14d\"\nkeep_within_weekly = \"8w\"\nkeep_within_monthly = \"1y\"\nmax_age = \"400d\"\nmax_count = 60\n";

/// Every seven hours one, of each instance, shuffled by a fixed rule.
fn inventory(snapshots: u32, now: Timestamp) -> Inventory {
    let instances = snapshots.div_ceil(SNAPSHOTS_PER_INSTANCE);
    let instance_id = |number: u32| InstanceId(Uuid::from_u128(0xa000_0000_0000_0000 + u128::from(number)));
    let snapshot = |number: u32| {
        // A step that shares no factor with the count meets each number once.
        let number = u32::try_from(u64::from(number) * 7_368_787 % u64::from(snapshots)).unwrap_or(0);
        let (instance, age) = (number % instances, number / instances);
        let created_at = now
            - SignedDuration::from_hours(7 * i64::from(age))
            - SignedDuration::from_mins(i64::from(instance % 60));
        Snapshot {
            id: SnapshotId(Uuid::from_u128(u128::from(number) << 64 | 0xbeef)),
            name: "web".into(),
            created_at,
            state: SnapshotState::Exported,
            size_gib: Some(50),
            application_consistent: None,
            instance_id: Some(instance_id(instance)),
        }
    };
    let instance = |number| Instance {
        id: instance_id(number),
        name: format!("web-{number}").into(),
        labels: BTreeMap::new(),
        template_id: None,
        is_managed: false,
        created_at: None,
    };
    let zone = "ch-gva-2".parse().expect("a zone");
    Inventory::on_paper(zone, (0..snapshots).map(snapshot).collect(), (0..instances).map(instance).collect())
}

fn now() -> Timestamp {
    "2026-11-01T12:00:00Z".parse().expect("a time")
}

const SIZES: [u32; 3] = [10_000, 100_000, 1_000_000];

#[divan::bench(args = SIZES, max_time = 5)]
fn six_rules(bencher: Bencher<'_, '_>, snapshots: u32) {
    let (policies, inventory) = (policies(SIX), inventory(snapshots, now()));
    bencher
        .counter(ItemsCount::new(snapshots))
        .bench_local(|| plan(black_box(&policies), black_box(&inventory), now()));
}

#[divan::bench(args = SIZES, max_time = 5)]
fn limits_that_pass(bencher: Bencher<'_, '_>, snapshots: u32) {
    let (policies, inventory) = (policies(LIMITS), inventory(snapshots, now()));
    bencher
        .counter(ItemsCount::new(snapshots))
        .bench_local(|| plan(black_box(&policies), black_box(&inventory), now()));
}

#[divan::bench(args = SIZES, max_time = 5)]
fn six_rules_without_foresight(bencher: Bencher<'_, '_>, snapshots: u32) {
    let (policies, inventory) = (policies(SIX), inventory(snapshots, now()));
    bencher
        .counter(ItemsCount::new(snapshots))
        .bench_local(|| decide(black_box(&policies), black_box(&inventory), now()));
}

/// All snapshots of one instance.
#[divan::bench(args = SIZES, max_time = 5)]
fn one_instance(bencher: Bencher<'_, '_>, snapshots: u32) {
    let (policies, mut inventory) = (policies(SIX), inventory(snapshots, now()));
    let first = inventory.instances[0].id;
    for (minutes, snapshot) in (0..).zip(&mut inventory.snapshots) {
        snapshot.instance_id = Some(first);
        snapshot.created_at = now() - SignedDuration::from_mins(minutes);
    }
    bencher
        .counter(ItemsCount::new(snapshots))
        .bench_local(|| plan(black_box(&policies), black_box(&inventory), now()));
}

/// Keeps all but the oldest of each instance.
const ALL_BUT_ONE: &str =
    "keep_last = 99\nkeep_daily = 14\nkeep_monthly = 12\nmax_age = \"400d\"\nkeep_oldest = false\n";

/// Collecting the facts, and judging each deletion again.
#[divan::bench]
fn second_judge(bencher: Bencher<'_, '_>) {
    let (policies, inventory) = (policies(ALL_BUT_ONE), inventory(10_000, now()));
    let decided = plan(&policies, &inventory, now());
    let deleted = decided.policies[0].decisions.iter().filter(|one| one.verdict.as_str() == "delete");
    let victims: Vec<SnapshotId> = deleted.map(|one| inventory.snapshots[one.index as usize].id).collect();
    assert_eq!(victims.len(), 100);
    let judged = Judged {
        policies: &policies,
        policy: &policies[0],
        inventory: &inventory,
        memory: &Memory::default(),
        at: now(),
        emptied: &[],
        changes_are_allowed: false,
    };
    bencher.bench_local(|| {
        let facts = black_box(&judged).facts(&victims).expect("no memory");
        assert_eq!(judge::objections(&facts, &victims), []);
    });
}

/// A zone with as many snapshots, and a program with a state directory.
fn ready_to_run() -> (tempfile::TempDir, Runner) {
    let clock = SimClock::starting_at(now());
    let world = World::new(Arc::new(clock.clone()), 7);
    let zone = world.add_zone("ch-gva-2");
    for instance in 0..100 {
        let instance = world.add_instance(&zone, &format!("web-{instance}"), &[]);
        for age in 0..100 {
            world.add_snapshot(instance, now() - SignedDuration::from_hours(7 * age));
        }
    }
    let folder = tempfile::tempdir().expect("a folder");
    let seams = Seams {
        transport: world.transport(),
        disk: Arc::new(RealDisk),
        processes: Arc::new(SimProcesses::new(Arc::new(clock.clone()))),
        clock: Arc::new(clock),
        randomness: Arc::new(SeededRandomness::new(11)),
        host: "bench".into(),
    };
    let text = format!(
        "[state]\ndirectory = \"{}/state\"\n[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.retention]\nkeep_last = 99\n",
        folder.path().display()
    );
    let config = config::parse(&text, "bench.toml", None).expect("a valid configuration");
    let credentials = Credentials::new(API_KEY, API_SECRET, None).expect("a key");
    let runner = assemble::runner(&config, credentials, &seams, Use::Changing);
    (folder, runner.unwrap_or_else(|refusal| panic!("{}", refusal.text)))
}

#[divan::bench(sample_count = 5)]
fn whole_run(bencher: Bencher<'_, '_>) {
    // Time that nobody works in passes at once: what is left is the work.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    let runtime = runtime.expect("a runtime");
    bencher.with_inputs(ready_to_run).bench_local_values(|(folder, runner)| {
        let report = runtime.block_on(runner.run(&runner.policies[0], &RunOptions::default()));
        assert_eq!(report.expect("a run").sums().deleted, 100);
        folder
    });
}
