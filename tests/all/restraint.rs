//! What keeps a run from deleting beside the rules: holds, the guard over a listing that lost too much, and leave
//! to pass it. And what a run remembers for the next one.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use snapwarden::clock::Clock as _;
use snapwarden::disk::{Access, Disk as _, RealDisk, replace_file};
use snapwarden::run::context::{RunOptions, Runner};
use snapwarden::run::list::ListingCache;
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::sim::call::Call;
use snapwarden::sim::disk::{DiskCall, MemoryDisk};
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::snapshot::{SnapshotId, SnapshotState};
use snapwarden::state::allowances::{Allowance, AllowanceOf};
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::directory::StateDirectory;
use snapwarden::state::holds::Hold;
use snapwarden::state::last_runs::{LastRuns, PlanSums, ZoneMemory};
use snapwarden::transport::{Request, Response, Transport, TransportError};

use crate::stage::{NIGHTLY, Stage, days_ago, ended, steps};

/// Deletes all but the newest 15 of an instance.
const PRUNE: &str = r#"
[policies.nightly]
zones = ["ch-gva-2"]
[policies.nightly.retention]
max_count = 15
[policies.nightly.guard]
max_delete_percent = 100
settle = "0s"
"#;

fn state(stage: &Stage) -> StateDirectory {
    StateDirectory::open(stage.seams.disk.clone(), &stage.state()).unwrap()
}

fn pin(snapshot: SnapshotId, until: Option<Timestamp>) -> Hold {
    Hold { snapshot, until, reason: Some("an audit".to_owned()), since: days_ago(1), about: None }
}

async fn runs(stage: &Stage) -> LastRuns {
    state(stage).last_runs(&"nightly".parse().unwrap()).await.unwrap()
}

async fn memory(stage: &Stage) -> ZoneMemory {
    runs(stage).await.zones.remove(&stage.zone).unwrap()
}

/// How many snapshots the accepted listing has.
async fn accepted(stage: &Stage) -> usize {
    memory(stage).await.accepted.unwrap().snapshots.len()
}

async fn allow(stage: &Stage, zone: bool, deletes: u64) {
    let zone = zone.then(|| stage.zone.clone());
    let given = Allowance {
        of: AllowanceOf::Policy("nightly".parse().unwrap()),
        zone,
        deletes,
        given_at: stage.now(),
        ends_at: None,
    };
    state(stage).allow(&stage.clock, given).await.unwrap();
}

fn held(report: &RunReport) -> &str {
    assert_eq!(report.result, RunResult::Held, "{:?}", report.zones);
    report.zones[0].held.as_deref().unwrap()
}

fn damage(path: &Path) {
    replace_file(&RealDisk, path, b"{", Access::Owner).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_held_snapshot_stays_until_its_hold_is_over() {
    let (stage, ids) = Stage::two_by_twenty();
    let until = stage.now() + SignedDuration::from_hours(1);
    for hold in [pin(ids[0][0], None), pin(ids[0][1], Some(until)), pin(ids[0][2], None)] {
        state(&stage).hold(&stage.clock, hold).await.unwrap();
    }
    state(&stage).unhold(&stage.clock, ids[0][2]).await.unwrap();
    let report = stage.run(PRUNE).await;
    assert_eq!(report.result, RunResult::Success, "{:?}", report.zones);
    assert_eq!(report.zones[0].plan.as_ref().unwrap().blocked_by_hold, 2);
    let stays = [ids[0][0], ids[0][1]].map(|id| stage.there().contains(&id));
    assert_eq!((stays, stage.there().len()), ([true, true], 32));

    stage.step(SignedDuration::from_hours(1));
    stage.run(PRUNE).await;
    let stays = [ids[0][0], ids[0][1]].map(|id| stage.there().contains(&id));
    assert_eq!(stays, [true, false]);
}

/// A run whose deletions wait for the API, while this is done.
async fn run_while(stage: &Stage, meanwhile: impl AsyncFnOnce()) -> RunReport {
    stage.world.fault(Fault::on(Call::GetSnapshot, Effect::Delay(Duration::from_secs(20))));
    let runner = stage.runner(PRUNE);
    let options = RunOptions::default();
    let meanwhile = async {
        stage.clock.sleep(Duration::from_secs(10)).await;
        meanwhile().await;
    };
    let (report, ()) = tokio::join!(runner.run(&runner.policies[0], &options), meanwhile);
    report.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_hold_that_comes_while_deletions_go_on_still_counts() {
    let (stage, ids) = Stage::two_by_twenty();
    let held = ids[0][0];
    let put = async || drop(state(&stage).hold(&stage.clock, pin(held, None)).await.unwrap());
    let report = run_while(&stage, put).await;
    assert!(stage.there().contains(&held));
    assert_eq!(stage.there().len(), 31);
    let all = steps(&report, Action::Delete);
    let step = all.iter().find(|step| step.facts.snapshot.id == Some(held)).unwrap();
    assert_eq!(step.outcome, StepOutcome::Skipped);
    assert!(step.message.as_ref().unwrap().contains("an audit"), "{step:?}");
}

#[tokio::test(start_paused = true)]
async fn holds_that_cannot_be_read_keep_everything() {
    let (stage, _) = Stage::two_by_twenty();
    let path = stage.state().join("holds.json");
    let report = run_while(&stage, async || damage(&path)).await;
    assert_eq!(ended(&report, Action::Delete, StepOutcome::Failed), 10, "{:?}", report.zones);
    assert_eq!(stage.there().len(), 40);

    let report = stage.run(PRUNE).await;
    assert_eq!(report.result, RunResult::Failed);
    assert!(report.zones[0].failures[0].contains("holds.json"), "{:?}", report.zones);
    assert_eq!(stage.there().len(), 40);
}

#[tokio::test(start_paused = true)]
async fn point_01_a_listing_that_lost_too_much_is_held_and_not_accepted_and_a_whole_one_passes() {
    let (stage, _) = Stage::two_by_twenty();
    let keep_all = PRUNE.replace("15", "40");
    assert_eq!(stage.run(&keep_all).await.result, RunResult::Success);
    assert_eq!(accepted(&stage).await, 40);
    for _ in 0..30 {
        stage.world.fault(Fault::on(Call::ListSnapshots, Effect::Edit("/snapshots/0", None)));
    }
    let before = memory(&stage).await;
    for _ in 0..2 {
        let report = stage.run(PRUNE).await;
        let text = held(&report);
        assert!(text.contains("30 of 40") && text.contains("snapwarden allow nightly"), "{text}");
        assert_eq!(memory(&stage).await.accepted, before.accepted);
        assert_eq!(memory(&stage).await.last_success_at, before.last_success_at);
        assert_eq!(memory(&stage).await.held.as_deref(), Some(text));
    }
    assert_eq!(stage.there().len(), 40);
    stage.world.clear_faults();
    assert_eq!(stage.run(PRUNE).await.result, RunResult::Success);
    assert_eq!((stage.there().len(), accepted(&stage).await, memory(&stage).await.held), (30, 40, None));
}

#[tokio::test(start_paused = true)]
async fn leave_to_pass_the_guard_is_for_one_run() {
    let (stage, ids) = Stage::two_by_twenty();
    let keep_all = PRUNE.replace("15", "40");
    for (zone, gone) in [(false, 0), (true, 1)] {
        stage.run(&keep_all).await;
        for id in &ids[gone][..15] {
            stage.world.remove_snapshot(*id);
        }
        let policy =
            keep_all.replace("max_delete_percent", "max_listing_drop_percent = 20\nmax_delete_percent");
        held(&stage.run(&policy).await);
        let planned = stage.runner(&policy);
        allow(&stage, zone, 0).await;
        let preview = planned.preview(&ListingCache::default(), &planned.policies[0], None).await;
        assert!(preview[0].1.as_ref().unwrap().held.is_none(), "a preview judges by what a run would take");
        assert_eq!(stage.run(&policy).await.result, RunResult::Success, "{gone}");
        assert_eq!(accepted(&stage).await, stage.there().len());
        assert!(
            state(&stage)
                .allowances(&AllowanceOf::Policy("nightly".parse().unwrap()))
                .await
                .unwrap()
                .is_empty()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn leave_for_fewer_deletions_is_used_up_and_lets_nothing_pass() {
    let (stage, _) = Stage::two_by_twenty();
    let policy = PRUNE.replace("max_delete_percent", "max_deletes = 5\nmax_delete_percent");
    for (allowed, expected) in [
        (None, RunResult::Held),
        (Some(9), RunResult::Held),
        (None, RunResult::Held),
        (Some(10), RunResult::Success),
    ] {
        if let Some(allowed) = allowed {
            allow(&stage, false, allowed).await;
        }
        assert_eq!(stage.run(&policy).await.result, expected, "{allowed:?}");
    }
    assert_eq!(stage.there().len(), 30);
}

#[tokio::test(start_paused = true)]
async fn allowances_that_cannot_be_read_keep_everything() {
    let (stage, _) = Stage::two_by_twenty();
    drop(state(&stage));
    damage(&stage.state().join("allowances.json"));
    let report = stage.run(PRUNE).await;
    assert_eq!(report.result, RunResult::Failed);
    assert!(report.zones[0].failures[0].contains("allowances.json"), "{:?}", report.zones);
    assert_eq!(stage.there().len(), 40);
}

#[tokio::test(start_paused = true)]
async fn what_we_deleted_ourselves_is_no_drop_as_long_as_the_audit_log_says_so() {
    let (stage, _) = Stage::two_by_twenty();
    let policy = PRUNE.replace("15", "2");
    assert_eq!(stage.run(&policy).await.result, RunResult::Success);
    assert_eq!((stage.there().len(), accepted(&stage).await), (4, 40));
    let log = stage.state().join("audit.jsonl");
    let aside = stage.state().join("aside");
    RealDisk.rename(&log, &aside).unwrap();
    assert!(held(&stage.run(&policy).await).contains("36 of 40"));
    RealDisk.rename(&aside, &log).unwrap();
    assert_eq!(stage.run(&policy).await.result, RunResult::Success);
    assert_eq!(accepted(&stage).await, 4);
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_deletes_nothing_has_no_guard() {
    let (stage, ids) = Stage::two_by_twenty();
    let policy = "[policies.nightly]\nzones = [\"ch-gva-2\"]\n";
    stage.run(policy).await;
    for id in ids.iter().flatten() {
        stage.world.remove_snapshot(*id);
    }
    allow(&stage, false, 0).await;
    assert_eq!(stage.run(policy).await.result, RunResult::Success);
    assert_eq!(accepted(&stage).await, 0);
    assert_eq!(
        state(&stage).allowances(&AllowanceOf::Policy("nightly".parse().unwrap())).await.unwrap().len(),
        1
    );
}

#[tokio::test(start_paused = true)]
async fn a_run_is_remembered_with_what_each_instance_has() {
    let (stage, ids) = Stage::two_by_twenty();
    stage.world.set_state(ids[1][19], SnapshotState::Exporting);
    stage.world.set_state(ids[1][18], SnapshotState::Error);
    stage.world.set_state(ids[1][17], SnapshotState::Unknown("moonstruck".into()));
    let all = stage.world.snapshots(&stage.zone);
    let db = all.iter().find(|snapshot| snapshot.id == ids[1][0]).and_then(|snapshot| snapshot.instance_id);
    stage.world.add_snapshot(db.unwrap(), stage.now() + SignedDuration::from_hours(1));
    let report = stage.run(NIGHTLY).await;
    let runs = runs(&stage).await;
    let last = runs.last.as_ref().unwrap();
    assert_eq!(
        (last.run_id, &*last.result, last.finished_at),
        (report.run_id, "success", report.finished_at)
    );
    let zone = memory(&stage).await;
    assert_eq!(
        (zone.last_run_at, zone.last_success_at),
        (Some(report.finished_at), Some(report.finished_at))
    );
    // Its deletions are done, not to come.
    let plan = report.zones[0].plan.clone().map(|plan| PlanSums { delete: 0, ..plan });
    assert_eq!((zone.failure, zone.held, &zone.plan), (None, None, &plan));
    // After the deletions; one from the future is not the newest good one.
    let told: Vec<_> = zone
        .instances
        .iter()
        .map(|one| (&*one.name, one.good, one.failed, one.in_flight, one.other, one.newest_at, one.oldest_at))
        .collect();
    let at = |days| Some(days_ago(days));
    assert_eq!(told, [("db-1", 10, 1, 1, 2, at(3), at(12)), ("web-1", 10, 0, 0, 0, at(0), at(9))]);
    let verified: Vec<_> = zone
        .instances
        .iter()
        .map(|one| one.newest_verified_at.values().copied().collect::<Vec<_>>())
        .collect();
    assert_eq!(verified, [vec![days_ago(3)], vec![days_ago(0)]]);
}

#[tokio::test(start_paused = true)]
async fn a_zone_that_fails_keeps_what_was_known_of_it_and_one_that_left_is_forgotten() {
    let (stage, _) = Stage::two_by_twenty();
    stage.world.add_zone("de-fra-1");
    let both = PRUNE.replace("\"ch-gva-2\"", "\"ch-gva-2\", \"de-fra-1\"");
    stage.run(&both).await;
    assert_eq!(runs(&stage).await.zones.len(), 2);
    let before = memory(&stage).await;
    stage.world.fault(Fault::on(Call::ListSnapshots, Effect::html()));
    stage.step(SignedDuration::from_hours(24));
    let report = stage.run(PRUNE).await;
    assert_eq!(runs(&stage).await.zones.len(), 1);
    let now = memory(&stage).await;
    assert_eq!(now.failure.as_ref(), report.zones[0].failures.first());
    assert_eq!(now.last_run_at, Some(report.finished_at));
    assert_eq!(now.last_success_at, before.last_success_at);
    assert_eq!((now.plan, now.instances, now.accepted), (before.plan, before.instances, before.accepted));
}

#[tokio::test(start_paused = true)]
async fn a_failed_step_and_a_stop_are_no_success() {
    for stop in [false, true] {
        let (stage, _) = Stage::two_by_twenty();
        stage.world.fault(Fault::on(Call::DeleteSnapshot, Effect::status(403, "Forbidden")));
        let options = RunOptions::default();
        if stop {
            options.stop.cancel();
        }
        stage.run_with(PRUNE, &options).await;
        let zone = memory(&stage).await;
        assert_eq!(zone.last_success_at, None);
        let failure = zone.failure.unwrap();
        assert!(failure.contains(if stop { "is stopping" } else { "not deleted: snapshot" }), "{failure}");
    }
}

/// The outcome of a run, also if it could not begin.
async fn begun(runner: &Runner) -> Result<RunReport, String> {
    runner.run(&runner.policies[0], &RunOptions::default()).await.map_err(|error| error.to_string())
}

#[tokio::test(start_paused = true)]
async fn a_damaged_memory_of_runs_is_refused_before_anything_is_begun() {
    let (stage, _) = Stage::two_by_twenty();
    let runner = stage.runner(PRUNE);
    damage(&stage.state().join("runs-nightly.json"));
    let error = begun(&runner).await.unwrap_err();
    assert!(error.contains("runs-nightly.json"), "{error}");
    assert!(stage.world.log().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_run_that_cannot_be_remembered_has_failed() {
    let disk = MemoryDisk::new();
    let stage = Stage::over(Arc::new(disk.clone()));
    disk.create_dir_all(stage.folder.path(), Access::Owner).unwrap();
    stage.instance("web-1", 20);
    let runner = stage.runner(PRUNE);
    // The first file is archives.json, before the run begins, the second one what was listed.
    disk.fail(DiskCall::Rename, 3, std::io::ErrorKind::Other);
    let report = begun(&runner).await.unwrap();
    assert_eq!(report.result, RunResult::Partial);
    assert!(report.zones[0].failures[0].contains("runs-nightly.json"), "{:?}", report.zones);
    assert_eq!(stage.there().len(), 15, "what was to be done was done");
}

#[tokio::test(start_paused = true)]
async fn a_hold_is_over_at_the_very_instant_of_its_end() {
    let (stage, ids) = Stage::two_by_twenty();
    let now = stage.now();
    // The one that is over comes last, since a later change would remove it from the file.
    for (id, until) in [(ids[0][1], now + SignedDuration::from_secs(1)), (ids[0][0], now)] {
        state(&stage).hold(&stage.clock, pin(id, Some(until))).await.unwrap();
    }
    let report = stage.run(PRUNE).await;
    assert_eq!((report.started_at, report.zones[0].plan.as_ref().unwrap().blocked_by_hold), (now, 1));
    assert_eq!([0, 1].map(|place| stage.there().contains(&ids[0][place])), [false, true]);
}

#[tokio::test(start_paused = true)]
async fn a_listing_that_lost_too_much_is_not_accepted_because_the_clock_is_wrong_as_well() {
    let (stage, ids) = Stage::two_by_twenty();
    let policy = PRUNE
        .replace("max_count = 15", "max_count = 50")
        .replace("max_delete_percent", "max_listing_drop_percent = 20\nmax_delete_percent");
    stage.run(&policy).await;
    assert_eq!(accepted(&stage).await, 40);
    for id in &ids[0][..15] {
        stage.world.remove_snapshot(*id);
    }
    let skew = Effect::DateSkew(SignedDuration::from_mins(20));
    stage.world.fault(Fault::on(Call::ListSnapshots, skew));
    // Without deletions the guard does not look at the clock.
    let report = stage.run(&policy.replace("= 50", "= 15")).await;
    assert!(held(&report).contains("clock"), "{}", held(&report));
    assert_eq!(accepted(&stage).await, 40);
}

#[tokio::test(start_paused = true)]
async fn deletions_of_the_month_before_are_no_drop_and_old_months_are_removed() {
    let (stage, _) = Stage::two_by_twenty();
    let run = async |count: u64| {
        let mut runner = stage.runner(&PRUNE.replace("max_count = 15", &format!("max_count = {count}")));
        runner.keep_audit = "90d".parse().unwrap();
        runner.run(&runner.policies[0], &RunOptions::default()).await.unwrap()
    };
    let earlier = || -> Vec<String> {
        let names = RealDisk.list(&stage.state()).unwrap().into_iter();
        let names = names.filter_map(|entry| entry.name.into_string().ok());
        names.filter(|name| name.starts_with("audit-")).collect()
    };
    // Twenty-eight are deleted after the accepted listing.
    run(6).await;
    assert_eq!((stage.there().len(), earlier()), (12, vec![]));
    let first_month = stage.now().strftime("%Y-%m").to_string();
    stage.step(SignedDuration::from_hours(31 * 24));
    let report = run(5).await;
    assert_eq!((report.result, stage.there().len()), (RunResult::Success, 10), "{report:?}");
    let report = run(5).await;
    assert_eq!(report.result, RunResult::Success, "{report:?}");
    assert_eq!(earlier(), [format!("audit-{first_month}.jsonl")]);

    // A clock in doubt removes nothing.
    stage.step(SignedDuration::from_hours(90 * 24));
    stage
        .world
        .fault(Fault::on(Call::ListSnapshots, Effect::DateSkew(SignedDuration::from_hours(-24))).times(2));
    run(5).await;
    assert_eq!(earlier().len(), 1);
    // The line that says so begins another month.
    run(5).await;
    assert_eq!(earlier(), ["audit-2026-12.jsonl"]);
}

/// Adds a line to the audit log whenever snapshots are listed, as another process may.
#[derive(Debug)]
struct BusyLog {
    inner: Arc<dyn Transport>,
    log: PathBuf,
    /// The length of the log before each of these lines.
    lengths: Mutex<Vec<u64>>,
}

impl Transport for BusyLog {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        if request.url.path().ends_with("/snapshot") {
            let len = RealDisk.metadata(&self.log).map_or(0, |found| found.len);
            self.lengths.lock().unwrap().push(len);
            RealDisk.append(&self.log, b"{}\n", Access::Owner).unwrap();
        }
        self.inner.send(request)
    }
}

#[tokio::test(start_paused = true)]
async fn a_deletion_that_is_logged_while_the_accepted_listing_is_read_is_found_behind_its_mark() {
    let (mut stage, _) = Stage::two_by_twenty();
    let log = stage.state().join("audit.jsonl");
    let busy = BusyLog { inner: stage.world.transport(), log, lengths: Mutex::default() };
    let busy = Arc::new(busy);
    stage.seams.transport = busy.clone();
    stage.run(&PRUNE.replace("max_count = 15", "max_count = 50")).await;
    let lengths = busy.lengths.lock().unwrap().clone();
    assert_eq!(lengths.len(), 2, "{lengths:?}");
    let mark = memory(&stage).await.accepted.unwrap().audit_from;
    assert_eq!(Some(&mark), lengths.last());
}
