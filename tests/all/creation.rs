//! The taking of snapshots by whole runs: once for a slot, whatever happens on the way.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use snapwarden::clock::{self, Clock as _};
use snapwarden::disk::{Access, Disk as _, RealDisk, replace_file};
use snapwarden::run::context::RunOptions;
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::sim::call::Call;
use snapwarden::sim::disk::MemoryDisk;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::snapshot::{InstanceId, SnapshotId, SnapshotState};
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::directory::StateDirectory;
use snapwarden::state::policy_state::{Creation, Owner};

use crate::daemon::{play, until};
use crate::stage::{NOW, Stage, days_ago, ended, steps};

const CREATING: &str = r#"
[policies.nightly]
zones = ["ch-gva-2"]
create = true
"#;

/// Keeps the newest three of its own.
const PRUNING: &str = r#"
[policies.nightly]
zones = ["ch-gva-2"]
create = true
[policies.nightly.retention]
keep_last = 3
[policies.nightly.guard]
max_delete_percent = 100
"#;

/// A zone with one instance and nothing else.
fn web() -> (Stage, InstanceId) {
    let stage = Stage::new();
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    (stage, instance)
}

fn at(slot: &str) -> RunOptions {
    RunOptions { slot: Some(slot.parse().unwrap()), ..RunOptions::default() }
}

fn now() -> RunOptions {
    at(NOW)
}

/// Everything that a report says.
fn said(report: &RunReport) -> String {
    let zones = report.zones.iter();
    let mut all: Vec<String> = zones.clone().flat_map(|zone| zone.failures.clone()).collect();
    all.extend(zones.clone().flat_map(|zone| zone.warnings.clone()));
    all.extend(zones.flat_map(|zone| &zone.steps).filter_map(|step| step.message.clone()));
    all.join("\n")
}

fn asked(stage: &Stage) -> usize {
    stage.world.log().iter().filter(|exchange| exchange.call == Call::CreateSnapshot).count()
}

/// What the processes of a stage remember.
fn folder(stage: &Stage) -> StateDirectory {
    StateDirectory::at(stage.seams.disk.clone(), &stage.state())
}

async fn remembered(stage: &Stage, policy: &str) -> Vec<Creation> {
    folder(stage).policy_state(&policy.parse().unwrap()).await.unwrap().created
}

fn made_by_it(made: &Creation) -> Option<SnapshotId> {
    made.snapshot_id.filter(|_| made.owner == Owner::ThisPolicy)
}

/// What a process wrote down before it was killed.
async fn was_asked(stage: &Stage, instance: InstanceId, requested_at: Timestamp) {
    was_asked_by("nightly", stage, instance, requested_at).await;
}

async fn was_asked_by(policy: &str, stage: &Stage, instance: InstanceId, requested_at: Timestamp) {
    stage.runner(CREATING);
    let policy = policy.parse().unwrap();
    let mut own = folder(stage).policy_state(&policy).await.unwrap();
    let mut memory = own.clone();
    memory.created.push(Creation {
        zone: stage.zone.clone(),
        instance_id: instance,
        slot: NOW.parse().unwrap(),
        requested_at,
        snapshot_id: None,
        is_in_doubt: false,
        listed_before: Vec::new(),
        owner: Owner::Nobody,
        taken_for: None,
    });
    folder(stage).set_policy_state(&policy, &mut own, memory).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn each_selected_instance_gets_one_a_slot_and_a_restart_makes_none() {
    let (stage, _) = web();
    let db = stage.world.add_instance(&stage.zone, "db-1", &[]);
    stage.world.add_instance(&stage.zone, "scratch", &[]);
    let policy = format!("{CREATING}[policies.nightly.select]\nexclude_instances = [\"scratch\"]\n");
    let report = stage.run_with(&policy, &now()).await;
    assert_eq!(report.result, RunResult::Success, "{}", said(&report));
    assert_eq!(ended(&report, Action::Create, StepOutcome::Done), 2);
    let of_db =
        steps(&report, Action::Create).into_iter().find(|step| step.facts.snapshot.instance_id == Some(db));
    let of_db = of_db.unwrap();
    assert!(of_db.facts.snapshot.id.is_some_and(|id| stage.there().contains(&id)));
    assert_eq!(of_db.facts.snapshot.instance_name.as_deref(), Some("db-1"));
    assert!(!of_db.facts.snapshot.name.is_empty());

    let again = stage.run_with(&policy, &now()).await;
    assert!(again.zones[0].steps.is_empty(), "{}", said(&again));
    assert_eq!(asked(&stage), 2);
    // `once` has now as its slot.
    stage.step(SignedDuration::from_mins(1));
    let once = stage.run(&policy).await;
    assert_eq!(ended(&once, Action::Create, StepOutcome::Done), 2, "{}", said(&once));
    assert_eq!(stage.there().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn it_is_written_down_before_and_after() {
    let (stage, _) = web();
    let report = stage.run_with(CREATING, &now()).await;
    let lines = stage.audit();
    let outcomes: Vec<_> = lines.iter().map(|line| line["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["intended", "done"]);
    assert!(lines.iter().all(|line| line["action"] == "create" && line["rule"] == "create"));
    assert_eq!(lines[0]["snapshot"]["id"], json!(null));
    assert_eq!(lines[0]["snapshot"]["instance_name"], "web-1");
    assert_eq!(lines[1]["snapshot"]["id"], json!(steps(&report, Action::Create)[0].facts.snapshot.id));
    assert!(lines[1]["operation_id"].is_string());
}

#[tokio::test(start_paused = true)]
async fn one_of_anybody_since_the_slot_stands_in_for_it() {
    let slot: Timestamp = NOW.parse().unwrap();
    for (name, state, seconds, is_taken) in [
        ("on the slot", SnapshotState::Exported, 0, false),
        ("after it", SnapshotState::Ready, 30, false),
        ("being taken", SnapshotState::Snapshotting, 30, false),
        ("before it", SnapshotState::Exported, -1, true),
        ("failed", SnapshotState::Error, 30, true),
        ("going", SnapshotState::Deleting, 30, true),
        ("dated far ahead", SnapshotState::Exported, 3_600, true),
    ] {
        let (stage, instance) = web();
        let other = stage.world.add_snapshot(instance, slot + SignedDuration::from_secs(seconds));
        stage.world.set_state(other, state);
        stage.step(SignedDuration::from_mins(1));
        let report = stage.run_with(CREATING, &now()).await;
        assert_eq!(asked(&stage) == 1, is_taken, "{name}: {}", said(&report));
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_taken_is_exported_in_the_same_run() {
    let (stage, _) = web();
    let policy = format!("{CREATING}[policies.nightly.export]\narchives = [\"vault\"]\n");
    let report = stage.run(&policy).await;
    assert_eq!(report.result, RunResult::Success, "{}", said(&report));
    let [created, exported] = [Action::Create, Action::Export].map(|action| steps(&report, action)[0]);
    assert_eq!(created.facts.snapshot.id, exported.facts.snapshot.id);
}

#[tokio::test(start_paused = true)]
async fn point_29_only_its_own_are_pruned() {
    let (stage, instance) = web();
    let foreign: BTreeSet<SnapshotId> = stage.days(instance, 1..=9).into_iter().collect();
    for day in 0..7 {
        let report = stage.run(PRUNING).await;
        assert_eq!(report.result, RunResult::Success, "day {day}: {}", said(&report));
        stage.step(SignedDuration::from_hours(24));
    }
    let there: BTreeSet<SnapshotId> = stage.there().into_iter().collect();
    assert!(foreign.is_subset(&there), "what people made stays");
    assert_eq!(there.len() - foreign.len(), 3);
    // What is gone is forgotten by the second run after the one that deleted it: the first accepts its absence.
    assert_eq!(remembered(&stage, "nightly").await.len(), 5);

    // All are meant if that is asked for.
    let all = PRUNING.replace(
        "[policies.nightly.ret",
        "[policies.nightly.select]\nownership = \"all\"\n[policies.nightly.ret",
    );
    let report = stage.run(&all).await;
    assert!(
        foreign.is_subset(&stage.there().into_iter().collect()),
        "an edit has to settle: {}",
        said(&report)
    );
    stage.step(SignedDuration::from_hours(24));
    stage.run(&all).await;
    assert_eq!(stage.there().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_makes_no_second_one() {
    for (name, effect, is_carried_out) in [
        ("cut after", Effect::CutAfter, true),
        ("late", Effect::Delay(Duration::from_secs(40)), true),
        ("half an answer", Effect::CutBody(10), true),
        ("a web page", Effect::html(), false),
        ("cut before", Effect::CutBefore, false),
        ("a proxy in trouble", Effect::status(502, "no"), false),
        ("unreachable", Effect::Unreachable, false),
    ] {
        let (stage, _) = web();
        stage.world.fault(Fault::on(Call::CreateSnapshot, effect).times(1));
        let report = stage.run_with(CREATING, &now()).await;
        assert_eq!(report.result, RunResult::Success, "{name}: {}", said(&report));
        assert_eq!(stage.there().len(), 1, "{name}");
        assert_eq!(asked(&stage), if is_carried_out { 1 } else { 2 }, "{name}");
        let made = remembered(&stage, "nightly").await;
        assert_eq!(
            made.iter().map(|made| made.snapshot_id).collect::<Vec<_>>(),
            [Some(stage.there()[0])],
            "{name}"
        );
        let owner = if is_carried_out { Owner::Nobody } else { Owner::ThisPolicy };
        assert_eq!(made[0].owner, owner, "{name}: only the operation can say that it is ours");
        assert_eq!(
            stage.world.snapshots(&stage.zone)[0].state,
            SnapshotState::Exported,
            "{name}: it was waited for"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn what_nobody_can_tell_is_left_to_the_next_run() {
    let (stage, _) = web();
    stage.world.fault(Fault::on(Call::CreateSnapshot, Effect::CutAfter).times(1));
    stage.world.fault(Fault::on(Call::ListSnapshots, Effect::html()).after(2).times(1));
    let report = stage.run_with(CREATING, &now()).await;
    assert_eq!(ended(&report, Action::Create, StepOutcome::Failed), 1, "{}", said(&report));
    assert!(said(&report).contains("the next run looks again"), "{}", said(&report));
    let again = stage.run_with(CREATING, &now()).await;
    assert_eq!(ended(&again, Action::Create, StepOutcome::Done), 1, "{}", said(&again));
    assert_eq!((stage.there().len(), asked(&stage)), (1, 1));
    assert_eq!(remembered(&stage, "nightly").await[0].snapshot_id, Some(stage.there()[0]));
}

#[tokio::test(start_paused = true)]
async fn killed_before_the_request_exactly_one_is_taken_after_a_wait() {
    let (stage, instance) = web();
    was_asked(&stage, instance, NOW.parse().unwrap()).await;
    let begun = stage.now();
    let report = stage.run_with(CREATING, &now()).await;
    assert_eq!(ended(&report, Action::Create, StepOutcome::Done), 1, "{}", said(&report));
    assert_eq!((stage.there().len(), remembered(&stage, "nightly").await.len()), (1, 1));
    assert!(
        stage.now().duration_since(begun) >= SignedDuration::from_secs(30),
        "it may have been on its way"
    );
}

#[tokio::test(start_paused = true)]
async fn killed_after_the_request_the_snapshot_is_found_for_its_slot_and_is_nobodys() {
    for minutes in [0, -9, 9] {
        let (stage, instance) = web();
        let requested_at: Timestamp = NOW.parse().unwrap();
        was_asked(&stage, instance, requested_at).await;
        // The platform's clock may be off ours.
        let taken = stage.world.add_snapshot(instance, requested_at + SignedDuration::from_mins(minutes));
        stage.step(SignedDuration::from_hours(1));
        let report = stage.run_with(CREATING, &now()).await;
        assert_eq!(ended(&report, Action::Create, StepOutcome::Done), 1, "{}", said(&report));
        assert_eq!(
            (asked(&stage), remembered(&stage, "nightly").await[0].snapshot_id),
            (0, Some(taken)),
            "{minutes}"
        );
        assert_eq!(remembered(&stage, "nightly").await[0].owner, Owner::Nobody, "it may be anybody's");
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_people_took_much_later_is_not_taken_for_ours() {
    let (stage, instance) = web();
    was_asked(&stage, instance, NOW.parse().unwrap()).await;
    stage.step(SignedDuration::from_hours(5));
    let foreign = stage.world.add_snapshot(instance, stage.now());
    stage.run_with(CREATING, &now()).await;
    assert_eq!(asked(&stage), 0, "it is one since the slot all the same");
    assert!(remembered(&stage, "nightly").await.iter().all(|made| made.snapshot_id != Some(foreign)));
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_people_took_just_before_is_not_taken_for_ours() {
    // With the third listing the answer is looked for: where it fails, the next run looks for it.
    for is_left_to_the_next_run in [false, true] {
        let (stage, instance) = web();
        let theirs = stage.world.add_snapshot(instance, stage.now() - SignedDuration::from_mins(3));
        stage.world.fault(Fault::on(Call::CreateSnapshot, Effect::CutBefore).times(1));
        if is_left_to_the_next_run {
            stage.world.fault(Fault::on(Call::ListSnapshots, Effect::html()).after(2).times(1));
            let report = stage.run_with(CREATING, &now()).await;
            assert_eq!(ended(&report, Action::Create, StepOutcome::Failed), 1, "{}", said(&report));
        }
        let report = stage.run_with(CREATING, &now()).await;
        assert_eq!(ended(&report, Action::Create, StepOutcome::Done), 1, "{}", said(&report));
        assert_eq!((stage.there().len(), asked(&stage)), (2, 2), "{is_left_to_the_next_run}");
        assert!(remembered(&stage, "nightly").await.iter().all(|made| made.snapshot_id != Some(theirs)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_listing_that_lost_everything_for_a_moment_takes_no_ownership_away() {
    let (stage, _) = web();
    stage.run_with(PRUNING, &now()).await;
    let ours = stage.there()[0];
    stage.step(SignedDuration::from_hours(30));
    let empty = Effect::Edit("/snapshots", Some(serde_json::json!([])));
    stage.world.fault(Fault::on(Call::ListSnapshots, empty).times(1));
    stage.run_with(PRUNING, &now()).await;
    assert!(remembered(&stage, "nightly").await.iter().any(|made| made.snapshot_id == Some(ours)));
    // One that is gone for good is forgotten, once a run has taken that for the truth.
    stage.world.remove_snapshot(ours);
    for _ in 0..2 {
        stage.step(SignedDuration::from_hours(30));
        stage.run_with(PRUNING, &now()).await;
    }
    assert!(remembered(&stage, "nightly").await.iter().all(|made| made.snapshot_id != Some(ours)));
}

#[tokio::test(start_paused = true)]
async fn where_several_could_be_it_none_is_ours_and_none_is_taken() {
    let (stage, instance) = web();
    let requested_at: Timestamp = NOW.parse().unwrap();
    was_asked(&stage, instance, requested_at).await;
    for minutes in [-1, -2] {
        stage.world.add_snapshot(instance, requested_at + SignedDuration::from_mins(minutes));
    }
    let report = stage.run_with(&PRUNING.replace("keep_last = 3", "max_count = 1"), &now()).await;
    assert_eq!(ended(&report, Action::Create, StepOutcome::Skipped), 1);
    assert!(said(&report).contains("any of 2 snapshots could be it"), "{}", said(&report));
    // Not even when one of them is gone.
    stage.world.remove_snapshot(stage.there()[0]);
    let again = stage.run_with(&PRUNING.replace("keep_last = 3", "max_count = 1"), &now()).await;
    assert!(again.zones[0].steps.is_empty(), "{}", said(&again));
    assert_eq!((stage.there().len(), asked(&stage)), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn one_that_the_platform_fails_is_a_failure_is_ours_and_does_not_stop_the_others() {
    for effect in [Effect::operation_fails("fault", "no space"), Effect::fails_inline("fault", "no space")] {
        let (stage, web) = web();
        stage.world.add_instance(&stage.zone, "db-1", &[]);
        stage.world.fault(Fault::on(Call::CreateSnapshot, effect).of(web.0).times(1));
        let report = stage.run_with(CREATING, &now()).await;
        assert_eq!(report.result, RunResult::Partial, "{}", said(&report));
        assert!(said(&report).contains("no space"), "{}", said(&report));
        assert_eq!(ended(&report, Action::Create, StepOutcome::Done), 1);
        let failed =
            stage.world.snapshots(&stage.zone).into_iter().filter(|one| one.state == SnapshotState::Error);
        let ours: BTreeSet<_> = remembered(&stage, "nightly").await.iter().filter_map(made_by_it).collect();
        assert!(failed.map(|one| one.id).all(|id| ours.contains(&id)), "so that it can be pruned one day");
        // The slot has none yet, so a restart takes one.
        let again = stage.run_with(CREATING, &now()).await;
        assert_eq!(ended(&again, Action::Create, StepOutcome::Done), 1, "{}", said(&again));
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_does_not_show_after_its_operation_is_waited_for_and_counts_only_if_it_comes() {
    for (times, outcome) in [(3, StepOutcome::Done), (100, StepOutcome::Failed)] {
        let (stage, _) = web();
        let fault = Fault::on(Call::GetSnapshot, Effect::status(404, "Not Found"));
        stage.world.fault(fault.times(times));
        let report = stage.run_with(CREATING, &now()).await;
        assert_eq!(ended(&report, Action::Create, outcome), 1, "{times}: {}", said(&report));
        let is_told = said(&report).contains("there is no snapshot");
        assert_eq!(is_told, outcome == StepOutcome::Failed, "{times}: {}", said(&report));
        // It is listed, so no second one is taken.
        stage.world.clear_faults();
        let again = stage.run_with(CREATING, &now()).await;
        assert_eq!((asked(&stage), again.result), (1, RunResult::Success), "{times}: {}", said(&again));
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_looks_whether_a_policy_runs_keeps_it_from_no_run() {
    let (stage, _) = web();
    let name = "nightly".parse().unwrap();
    let looks = stage.runner(CREATING).state.lock_policy(&name, &stage.clock).await.unwrap();
    let look = async {
        stage.clock.sleep(Duration::from_millis(1)).await;
        drop(looks);
    };
    let options = now();
    let (report, ()) = futures_util::future::join(stage.run_with(CREATING, &options), look).await;
    assert_eq!(ended(&report, Action::Create, StepOutcome::Done), 1, "{}", said(&report));
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_never_ends_is_a_failure_and_what_it_makes_is_ours() {
    let (stage, _) = web();
    stage.world.fault(Fault::on(Call::CreateSnapshot, Effect::operation_hangs()).times(1));
    let report = stage.run_with(CREATING, &now()).await;
    assert_eq!(ended(&report, Action::Create, StepOutcome::Failed), 1, "{}", said(&report));
    assert_eq!(made_by_it(&remembered(&stage, "nightly").await[0]), Some(stage.there()[0]));
    assert!(stage.run_with(CREATING, &now()).await.zones[0].steps.is_empty());
    assert_eq!(asked(&stage), 1);
}

#[tokio::test(start_paused = true)]
async fn an_operation_that_does_not_name_its_snapshot_is_looked_for() {
    let (stage, _) = web();
    stage.world.fault(Fault::on(Call::GetOperation, Effect::Edit("/reference", None)));
    let report = stage.run_with(CREATING, &now()).await;
    assert_eq!(ended(&report, Action::Create, StepOutcome::Done), 1, "{}", said(&report));
    let made = &remembered(&stage, "nightly").await[0];
    assert_eq!((made.snapshot_id, &made.owner), (Some(stage.there()[0]), &Owner::Nobody));
}

#[tokio::test(start_paused = true)]
async fn point_38_where_the_quota_does_not_suffice_the_one_with_the_oldest_goes_first() {
    let (stage, web) = web();
    stage.days(web, [1].into_iter());
    let db = stage.world.add_instance(&stage.zone, "db-1", &[]);
    stage.days(db, [3].into_iter());
    stage.world.set_quota("snapshot", 3);
    let report = stage.run(CREATING).await;
    assert_eq!(report.result, RunResult::Partial, "{}", said(&report));
    let done =
        steps(&report, Action::Create).into_iter().find(|step| step.outcome == StepOutcome::Done).unwrap();
    assert_eq!(done.facts.snapshot.instance_name.as_deref(), Some("db-1"));
    let text = said(&report);
    assert!(text.contains("2 of 3") && text.contains("higher quota"), "{text}");
    assert_eq!(asked(&stage), 1, "what the quota does not allow is not asked for");
}

#[tokio::test(start_paused = true)]
async fn a_quota_that_cannot_be_read_is_warned_about_and_the_platforms_word_counts() {
    for (limit, taken) in [(-1, 1), (0, 0)] {
        let (stage, _) = web();
        stage.world.set_quota("snapshot", limit);
        stage
            .world
            .fault(Fault::on(Call::GetQuota, Effect::status(403, "Forbidden by role policy for compute")));
        let report = stage.run(CREATING).await;
        assert!(said(&report).contains("get-quota"), "{}", said(&report));
        assert_eq!((asked(&stage), stage.there().len()), (1, taken));
        assert_eq!(
            said(&report).contains("quota of the organization is used up"),
            taken == 0,
            "{}",
            said(&report)
        );
        assert!(taken == 1 || remembered(&stage, "nightly").await.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn after_the_deadline_nothing_begins_that_adds_and_what_may_go_goes() {
    let (stage, web) = web();
    let db = stage.world.add_instance(&stage.zone, "db-1", &[]);
    let days = stage.days(web, (1..9).rev());
    // The older one is the first to be taken.
    let days_of_db = stage.days(db, (2..9).rev());
    stage.world.set_operations_take(Duration::from_secs(50));
    let policy = r#"
[exoscale]
concurrency = 1
[policies.nightly]
zones = ["ch-gva-2"]
create = true
deadline = "30s"
[policies.nightly.select]
ownership = "all"
[policies.nightly.retention]
keep_last = 2
[policies.nightly.export]
archives = ["vault"]
required = false
[policies.nightly.promote]
name = "{instance}"
"#;
    let report = stage.run(policy).await;
    assert_eq!(report.result, RunResult::Partial, "{}", said(&report));
    for (action, done, skipped) in [(Action::Create, 1, 1), (Action::Export, 0, 2), (Action::Promote, 0, 2)] {
        assert_eq!(ended(&report, action, StepOutcome::Done), done, "{action:?}: {}", said(&report));
        assert!((1..=skipped).contains(&ended(&report, action, StepOutcome::Skipped)), "{action:?}");
    }
    assert!(said(&report).contains("deadline"), "{}", said(&report));
    assert_eq!(ended(&report, Action::Delete, StepOutcome::Done), 6, "{}", said(&report));
    assert!(!stage.there().contains(&days_of_db[0]));
    assert!(days.iter().all(|id| stage.there().contains(id)), "nothing of the one whose snapshot is missing");
    let pending = report.zones[0].pending.as_deref().unwrap();
    assert!(
        pending.contains("6 snapshots") && pending.contains("the run's deadline has passed"),
        "{pending}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_platform_whose_clock_is_off_makes_no_second_one_for_a_slot() {
    for minutes in [-9, -3, 3, 9] {
        let (stage, _) = web();
        stage.world.set_skew(SignedDuration::from_mins(minutes));
        stage.step(SignedDuration::from_secs(1));
        for run in 0..3 {
            let report = stage.run_with(CREATING, &now()).await;
            assert_eq!(report.result, RunResult::Success, "{minutes}, {run}: {}", said(&report));
            stage.step(SignedDuration::from_mins(1));
        }
        assert_eq!((asked(&stage), stage.there().len()), (1, 1), "{minutes}");
        let lost = Fault::on(Call::CreateSnapshot, Effect::CutAfter).times(1);
        stage.world.fault(lost);
        stage.step(SignedDuration::from_hours(24));
        let next = format!("{}", days_ago(-1));
        for _ in 0..2 {
            stage.run_with(CREATING, &at(&next)).await;
        }
        assert_eq!(stage.there().len(), 2, "{minutes}");
    }
}

#[tokio::test(start_paused = true)]
async fn point_40_two_policies_side_by_side_take_one_together() {
    // Also where this machine's clock, which had been right, was set back after the slot had come.
    for set_back in [0, 2].map(SignedDuration::from_mins) {
        let (stage, _) = web();
        stage.world.add_instance(&stage.zone, "db-1", &[]);
        stage.world.set_skew(set_back);
        let both = format!("{CREATING}[policies.weekly]\nzones = [\"ch-gva-2\"]\ncreate = true\n");
        let runner = stage.runner(&both);
        let options = RunOptions { slot: Some(stage.now() + set_back), ..RunOptions::default() };
        let (one, other) = futures_util::future::join(
            runner.run(&runner.policies[0], &options),
            runner.run(&runner.policies[1], &options),
        )
        .await;
        let reports = [one.unwrap(), other.unwrap()];
        assert_eq!((asked(&stage), stage.there().len()), (2, 2), "{set_back}: {}", said(&reports[1]));
        let done = reports.iter().map(|report| ended(report, Action::Create, StepOutcome::Done));
        assert_eq!(done.sum::<usize>(), 2);
        // One took both, and they served the other's slot: they belong to both.
        assert_eq!(folder(&stage).created_snapshots().await.unwrap().len(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_policy_asked_for_by_a_clock_that_ran_ahead_serves_no_slot_of_others() {
    let (stage, instance) = web();
    // It asked, was killed, and the clock was set right; and it takes none of this instance any more.
    was_asked_by("weekly", &stage, instance, stage.now() + SignedDuration::from_hours(9000)).await;
    let policies = format!(
        "{CREATING}[policies.weekly]\nzones = [\"ch-gva-2\"]\ncreate = true\n[policies.weekly.select]\ninstances = [\"db-*\"]\n"
    );
    for day in 1..=3 {
        let report =
            stage.run_with(&policies, &RunOptions { slot: Some(stage.now()), ..RunOptions::default() }).await;
        assert_eq!(ended(&report, Action::Create, StepOutcome::Done), 1, "{}", said(&report));
        assert_eq!(stage.there().len(), day);
        stage.step(SignedDuration::from_hours(24));
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_policy_asked_for_that_is_gone_is_missing_until_it_is_there() {
    let within = PRUNING.replace("keep_last = 3", "keep_within = \"60h\"");
    for (other, deleted) in [("", 0), ("[policies.weekly]\nzones = [\"ch-gva-2\"]\ncreate = true\n", 1)] {
        let (stage, instance) = web();
        let config = format!("{within}{other}");
        for day in 0..3 {
            let options = RunOptions { slot: Some(stage.now()), ..RunOptions::default() };
            let report = stage.run_with(&config, &options).await;
            assert_eq!(report.result, RunResult::Success, "day {day}: {}", said(&report));
            stage.step(SignedDuration::from_hours(24));
        }
        was_asked_by("weekly", &stage, instance, stage.now()).await;
        let options = RunOptions { slot: Some(stage.now()), ..RunOptions::default() };
        let report = stage.run_with(&config, &options).await;
        assert_eq!(stage.there().len(), 3 - deleted, "{}", said(&report));
        assert_eq!(said(&report).contains("policy weekly, which takes none any more"), deleted == 0);
        assert_eq!(report.result == RunResult::Success, deleted == 1, "{}", said(&report));
    }
}

/// When the requests for a snapshot of each instance arrived.
fn taken_of(stage: &Stage, instances: &[InstanceId]) -> Vec<Vec<Timestamp>> {
    let log = stage.world.log();
    let of = |instance: &InstanceId| {
        let asked = log.iter().filter(|one| one.call == Call::CreateSnapshot);
        asked.filter(|one| one.path.contains(&instance.to_string())).map(|one| one.at).collect()
    };
    instances.iter().map(of).collect()
}

fn machines(stage: &Stage, count: usize) -> Vec<InstanceId> {
    (0..count).map(|number| stage.world.add_instance(&stage.zone, &format!("web-{number}"), &[])).collect()
}

#[tokio::test(start_paused = true)]
async fn two_daemons_with_separate_state_take_two_only_of_what_they_ask_for_at_once() {
    for (later, most_twice) in [(0, 8), (3, 0)] {
        let stage = Stage::new();
        let instances = machines(&stage, 40);
        stage.world.set_operations_take(Duration::from_secs(10));
        let other = stage.beside("backup-2");
        let options = now();
        let second = async {
            stage.clock.sleep(Duration::from_secs(later)).await;
            other.run_with(CREATING, &options).await
        };
        let reports = futures_util::future::join(stage.run_with(CREATING, &options), second).await;
        let asked = taken_of(&stage, &instances);
        let twice: Vec<_> = asked.iter().filter(|asked| asked.len() != 1).collect();
        assert!(twice.len() <= most_twice, "{later}: {twice:?}");
        for asked in twice {
            assert!(
                asked.len() == 2 && asked[1].duration_since(asked[0]).as_secs() <= 3,
                "{later}: {asked:?}"
            );
        }
        let mut skipped = 0;
        for (stage, report) in [(&stage, &reports.0), (&other, &reports.1)] {
            assert_eq!(report.result, RunResult::Success, "{later}: {}", said(report));
            let of_others = ended(report, Action::Create, StepOutcome::Skipped);
            assert_eq!(said(report).matches("another one was taken since").count(), of_others, "{later}");
            // They are written down, and are nobody's; a restart takes none.
            let found = remembered(stage, "nightly").await;
            let found = found.iter().filter(|made| made.owner == Owner::Nobody && made.snapshot_id.is_some());
            assert_eq!(found.count(), of_others, "{later}");
            let again = stage.run_with(CREATING, &options).await;
            assert!(again.zones[0].steps.is_empty(), "{later}: {}", said(&again));
            skipped += of_others;
        }
        assert!(skipped > 20, "{later}: {skipped}");
    }
}

#[tokio::test(start_paused = true)]
async fn two_daemons_of_one_policy_with_jitter_take_one_together() {
    for jitter in ["10s", "5m"] {
        let policy = format!("{CREATING}schedule = \"30 12 * * *\"\njitter = \"{jitter}\"\n");
        let stage = Stage::new();
        let instances = machines(&stage, 12);
        stage.world.set_operations_take(Duration::from_secs(10));
        let other = stage.beside("backup-2");
        let plays = [play(&stage, &policy).await, play(&other, &policy).await];
        until(&stage, "2026-11-01T13:00:00Z").await;
        for one in plays {
            one.stop().await;
        }
        let taken = taken_of(&stage, &instances);
        assert!(taken.iter().all(|asked| asked.len() == 1), "{jitter}: {taken:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn listings_right_before_the_requests_are_shared() {
    let stage = Stage::new();
    machines(&stage, 40);
    for seconds in [1, 10] {
        stage.world.set_operations_take(Duration::from_secs(seconds));
        stage.world.clear_log();
        let report = stage.run(CREATING).await;
        assert_eq!(ended(&report, Action::Create, StepOutcome::Done), 40, "{}", said(&report));
        let listings = stage.world.log().iter().filter(|one| one.call == Call::ListSnapshots).count();
        assert!((3..=14).contains(&listings), "{seconds}: {listings}");
        stage.step(SignedDuration::from_hours(1));
    }
}

#[tokio::test(start_paused = true)]
async fn if_the_listing_right_before_fails_a_snapshot_is_taken_all_the_same() {
    let stage = Stage::new();
    machines(&stage, 40);
    stage.world.fault(Fault::on(Call::ListSnapshots, Effect::status(403, "no")).after(1).times(1));
    let report = stage.run_with(CREATING, &now()).await;
    assert_eq!(ended(&report, Action::Create, StepOutcome::Done), 40, "{}", said(&report));
    assert_eq!(said(&report).matches("so some may be taken twice").count(), 1, "{}", said(&report));
}

#[tokio::test(start_paused = true)]
async fn one_that_was_found_late_serves_no_slot_after_it() {
    let stage = Stage::new();
    let instances = machines(&stage, 2);
    stage.world.set_operations_take(Duration::from_mins(1));
    let policies = format!(
        "[exoscale]\nconcurrency = 1\n{CREATING}[policies.weekly]\nzones = [\"ch-gva-2\"]\ncreate = true\n"
    );
    let runner = stage.runner(&policies);
    let (slot, options) = (stage.now(), now());
    let by_hand = async {
        stage.clock.sleep(Duration::from_secs(30)).await;
        for instance in &instances {
            stage.world.add_snapshot(*instance, stage.now());
        }
    };
    let (report, ()) = futures_util::future::join(runner.run(&runner.policies[0], &options), by_hand).await;
    // The first was asked for before, the second is found after a minute.
    assert_eq!(ended(&report.unwrap(), Action::Create, StepOutcome::Skipped), 1);
    let later = RunOptions { slot: Some(slot + SignedDuration::from_secs(45)), ..RunOptions::default() };
    let report = runner.run(&runner.policies[1], &later).await.unwrap();
    assert_eq!(ended(&report, Action::Create, StepOutcome::Done), 2, "{}", said(&report));
}

#[tokio::test(start_paused = true)]
async fn a_memory_that_cannot_be_read_fails_the_zone_whoever_asks_for_ownership() {
    let (stage, instance) = web();
    stage.days(instance, 0..3);
    stage.runner(PRUNING);
    replace_file(&RealDisk, &stage.state().join("policy-old.json"), b"{", Access::Owner).unwrap();
    let report = stage.run(PRUNING).await;
    assert_eq!(report.result, RunResult::Failed, "{}", said(&report));
    assert!(said(&report).contains("policy-old.json"), "{}", said(&report));
    let all = PRUNING.replace(
        "[policies.nightly.ret",
        "[policies.nightly.select]\nownership = \"all\"\n[policies.nightly.ret",
    );
    let report = stage.run(&all.replace("create = true", "create = false")).await;
    assert_eq!(report.result, RunResult::Failed, "{}", said(&report));
}

/// Killed at every change of the disk, and after every second: no slot ever has two, and each has one in the end.
#[tokio::test(start_paused = true)]
async fn killed_at_any_moment_a_slot_has_one() {
    let moments = (0..40).map(Some).zip(std::iter::repeat(Duration::MAX));
    let seconds = (0..8).map(|second| (None, Duration::from_millis(700 * second)));
    for (changes, limit) in moments.chain(seconds) {
        let context = format!("{changes:?} changes, {limit:?}");
        let disk = MemoryDisk::new();
        let mut stage = Stage::over(Arc::new(disk.clone()));
        disk.create_dir_all(stage.folder.path(), Access::Owner).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
        stage.runner(PRUNING);
        if let Some(changes) = changes {
            disk.stop_after(changes);
        }
        if let Ok(runner) = stage.assemble(PRUNING) {
            let options = now();
            let run = runner.run(&runner.policies[0], &options);
            let _ = clock::timeout(&stage.clock, limit, run).await;
        }
        stage.seams.disk = Arc::new(disk.crash());
        let foreign = stage.world.add_snapshot(instance, days_ago(30));
        for _ in 0..2 {
            let report = stage.run_with(PRUNING, &now()).await;
            assert_eq!(report.result, RunResult::Success, "{context}: {}", said(&report));
        }
        assert_eq!(stage.there().len(), 2, "{context}");
        assert!(stage.there().contains(&foreign));
        let ours = stage.there()[1];
        assert_eq!(
            remembered(&stage, "nightly").await.iter().map(|made| made.snapshot_id).collect::<Vec<_>>(),
            [Some(ours)],
            "{context}"
        );
    }
}
