//! Faults planted in the plan, one for each rule that keeps: the second judge finds each in a whole run.

use std::cell::Cell;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::*;
use crate::cli::assemble::{self, Seams, Use};
use crate::clock::Clock as _;
use crate::config;
use crate::credentials::Credentials;
use crate::disk::{RealDisk, read_named_file};
use crate::retention::plan::PolicyPlan;
use crate::run::context::RunOptions;
use crate::run::report::{RunReport, RunResult};
use crate::sim::clock::SimClock;
use crate::sim::image::DiskShape;
use crate::sim::processes::SimProcesses;
use crate::sim::randomness::SeededRandomness;
use crate::sim::world::{API_KEY, API_SECRET, World};
use crate::snapshot::{SnapshotState, ZoneName};
use crate::state::directory::StateDirectory;
use crate::state::holds;

thread_local! {
    /// The snapshot that the plan deletes, whatever its rules say.
    static PLANTED: Cell<Option<SnapshotId>> = const { Cell::new(None) };
}

/// Has the plan delete the planted snapshot.
pub(crate) fn plant(plan: &mut PolicyPlan, inventory: &Inventory) {
    let Some(planted) = PLANTED.get() else { return };
    for decision in &mut plan.decisions {
        let snapshot = &inventory.snapshots[decision.index as usize];
        if snapshot.id == planted && decision.verdict != Verdict::Delete {
            (decision.verdict, decision.rule, decision.copies) = (Verdict::Delete, Rule::NotWanted, None);
            plan.deletes += 1;
            plan.good_deletes += u64::from(snapshot.state.is_good());
        }
    }
}

const NOW: &str = "2026-11-01T12:00:00Z";

struct Stage {
    world: World,
    clock: SimClock,
    zone: ZoneName,
    seams: Seams,
    folder: tempfile::TempDir,
    instance: InstanceId,
    /// One a day, oldest first; the newest is of today.
    snapshots: Vec<SnapshotId>,
}

impl Stage {
    fn new() -> Self {
        let clock = SimClock::starting_at(NOW.parse().unwrap());
        let world = World::new(Arc::new(clock.clone()), 7);
        let zone = world.add_zone("ch-gva-2");
        let seams = Seams {
            transport: world.transport(),
            disk: Arc::new(RealDisk),
            clock: Arc::new(clock.clone()),
            randomness: Arc::new(SeededRandomness::new(11)),
            processes: Arc::new(SimProcesses::new(Arc::new(clock.clone()))),
            host: "backup-1".into(),
        };
        let instance = world.add_instance(&zone, "web-1", &[]);
        world.set_disk(instance, DiskShape::with_data_mib(1));
        let at = |days: i64| NOW.parse::<Timestamp>().unwrap() - SignedDuration::from_hours(24 * days);
        let snapshots = (0..10).rev().map(|day| world.add_snapshot(instance, at(day))).collect();
        Self { world, clock, zone, seams, folder: tempfile::tempdir().unwrap(), instance, snapshots }
    }

    fn runner(&self, policies: &str) -> Runner {
        let folder = self.folder.path().display();
        let text = format!(
            "[state]\ndirectory = \"{folder}/state\"\n[archives.vault]\ntype = \"local\"\npath = \"{folder}/vault\"\n{policies}"
        );
        let config = config::parse(&text, "test.toml", None).unwrap_or_else(|error| panic!("{error}"));
        let credentials = Credentials::new(API_KEY, API_SECRET, None).unwrap();
        assemble::runner(&config, credentials, &self.seams, Use::Changing)
            .unwrap_or_else(|refusal| panic!("{}", refusal.text))
    }

    async fn run(&self, policies: &str) -> RunReport {
        let runner = self.runner(policies);
        runner.run(&runner.policies[0], &RunOptions::default()).await.unwrap()
    }

    fn there(&self) -> Vec<SnapshotId> {
        self.world.snapshots(&self.zone).into_iter().map(|snapshot| snapshot.id).collect()
    }

    fn state(&self) -> StateDirectory {
        StateDirectory::open(self.seams.disk.clone(), &self.folder.path().join("state")).unwrap()
    }

    fn case_file(&self) -> PathBuf {
        self.folder.path().join("state/disagreement-nightly-ch-gva-2.json")
    }

    /// The plan deletes `victim`, and the second judge must say so.
    async fn finds(&self, policies: &str, victim: SnapshotId, says: &str) {
        let before = self.there();
        PLANTED.set(Some(victim));
        let report = self.run(policies).await;
        PLANTED.set(None);
        let zone = &report.zones[0];
        let held = zone.held.as_deref().unwrap_or_else(|| panic!("{says}: {report:?}"));
        assert_eq!(report.result, RunResult::Held, "{says}: {:?}", report.zones);
        assert_eq!(self.there(), before, "{says}: {held}");
        assert!(held.starts_with("judges disagree: "), "{says}: {held}");
        for part in
            [&victim.to_string(), says, "disagreement-nightly-ch-gva-2.json", "snapwarden plan --facts"]
        {
            assert!(held.contains(part), "{says}: {held}");
        }
        assert!(zone.plan.as_ref().unwrap().blocked_by_judge > 0, "{says}");
        let text = read_named_file(&self.case_file(), 1 << 20).unwrap();
        let case: Disagreement = serde_json::from_str(&text).unwrap();
        assert_eq!(case.victims.len(), 1, "{says}: {:?}", case.victims);
        assert_eq!(case.victims[0].snapshot, victim, "{says}");
        assert!(case.victims[0].second_judge.contains(says), "{says}: {:?}", case.victims);
        // Played again, without the fault: both keep it.
        assert!(judge::objections(&case.facts, &[victim])[0].says.contains(says), "{says}");
        let again = plan_again(&case.facts).unwrap();
        assert!(
            again.get(&victim).is_none_or(|(verdict, _)| *verdict != Verdict::Delete),
            "{says}: {again:?}"
        );
    }
}

/// A policy that deletes all but the newest seven.
const KEEP_7: &str = "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.retention]\nkeep_last = 7\n[policies.nightly.guard]\nmax_delete_percent = 100\n";

fn with(table: &str, rest: &str) -> String {
    format!(
        "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.retention]\n{table}\n[policies.nightly.guard]\nmax_delete_percent = 100\n{rest}"
    )
}

#[tokio::test(start_paused = true)]
async fn a_run_without_a_fault_deletes_and_writes_no_case() {
    let stage = Stage::new();
    let report = stage.run(KEEP_7).await;
    assert_eq!(report.result, RunResult::Success, "{:?}", report.zones);
    assert_eq!(stage.there(), stage.snapshots[3..]);
    assert!(read_named_file(&stage.case_file(), 1).is_err());
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_a_rule_of_the_policy_keeps() {
    for (table, says) in [
        ("keep_last = 7", "keep (keep_last)"),
        ("keep_within = \"6d\"", "keep (keep_within)"),
        ("keep_daily = 7", "keep (keep_daily)"),
        ("keep_within_daily = \"6d\"", "keep (keep_within_daily)"),
        ("max_count = 7", "keep (none)"),
        ("max_age = \"6d\"", "keep (none)"),
        ("max_age = \"1d\"\nmin_keep = 7", "keep (min_keep)"),
    ] {
        let stage = Stage::new();
        // The seventh, from the newest.
        stage.finds(&with(table, ""), stage.snapshots[3], says).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_on_hold() {
    let stage = Stage::new();
    let (snapshot, since) = (stage.snapshots[0], stage.clock.now());
    let hold = holds::Hold { snapshot, until: None, reason: None, since, about: None };
    stage.state().hold(&stage.clock, hold).await.unwrap();
    stage.finds(KEEP_7, snapshot, "keep (hold)").await;
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_another_policy_keeps_also_one_that_is_paused() {
    let other = "[policies.weekly]\nzones = [\"ch-gva-2\"]\n[policies.weekly.retention]\nkeep_last = 9\n";
    for more in ["", "[policies.weekly.guard]\n"] {
        let stage = Stage::new();
        let paused = other.replace("[policies.weekly]\n", "[policies.weekly]\nenabled = false\n");
        let other = if more.is_empty() { other } else { &paused };
        stage.finds(&format!("{KEEP_7}{other}"), stage.snapshots[1], "keep (policy: weekly)").await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_of_which_a_required_copy_is_missing() {
    let stage = Stage::new();
    let other = "[policies.copies]\nzones = [\"ch-gva-2\"]\n[policies.copies.export]\narchives = [\"vault\"]\nrequired = true\n";
    stage.finds(&format!("{KEEP_7}{other}"), stage.snapshots[0], "keep (policy: copies)").await;
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_is_not_good_or_dated_ahead() {
    let stage = Stage::new();
    let taken = stage.world.add_snapshot(stage.instance, stage.clock.now() - SignedDuration::from_hours(300));
    stage.world.set_state(taken, SnapshotState::Snapshotting);
    stage.finds(KEEP_7, taken, "ignore (state)").await;
    let ahead = stage.world.add_snapshot(stage.instance, stage.clock.now() + SignedDuration::from_hours(1));
    stage.finds(KEEP_7, ahead, "ignore (future)").await;
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_the_policy_does_not_own() {
    let stage = Stage::new();
    let owned = KEEP_7.replace(
        "[policies.nightly.retention]",
        "[policies.nightly.select]\nownership = \"created\"\n[policies.nightly.retention]",
    );
    stage.finds(&owned, stage.snapshots[0], "ignore (foreign)").await;
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_of_an_instance_of_which_a_newer_one_is_missing() {
    let stage = Stage::new();
    let late = KEEP_7.replace("max_delete_percent", "expect_newest = \"12h\"\nmax_delete_percent");
    stage.clock.step(SignedDuration::from_hours(24));
    PLANTED.set(None);
    stage.finds(&late, stage.snapshots[0], "keep (source)").await;
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_only_a_change_deletes() {
    let stage = Stage::new();
    let kept = KEEP_7.replace("keep_last = 7", "keep_last = 10");
    assert_eq!(stage.run(&kept).await.result, RunResult::Success);
    stage.clock.step(SignedDuration::from_hours(1));
    stage.finds(KEEP_7, stage.snapshots[0], "only the change deletes it").await;
    // And once it is allowed, neither objects.
    let runner = stage.runner(KEEP_7);
    let options = RunOptions { allow_deletes: Some(3), ..RunOptions::default() };
    let report = runner.run(&runner.policies[0], &options).await.unwrap();
    assert_eq!(report.zones[0].held, None);
    assert_eq!(stage.there(), stage.snapshots[3..]);
}
