//! Whose a snapshot is: each policy prunes what it took, and what served a slot of it.

use std::collections::BTreeSet;

use jiff::SignedDuration;
use serde_json::Value;
use snapwarden::disk::{Access, Disk as _, RealDisk, replace_file};
use snapwarden::run::context::RunOptions;
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::snapshot::{InstanceId, SnapshotId};
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::directory::StateDirectory;
use snapwarden::state::policy_state::{Creation, Owner};

use crate::endings::listing;
use crate::stage::{Stage, ended, paths, read, rewrite_as_version_1, steps};

/// As people write it: each policy is meant to keep its own.
const TWO: &str = r#"
[policies.hourly]
zones = ["ch-gva-2"]
create = true
[policies.hourly.retention]
keep_last = 3
[policies.hourly.guard]
max_delete_percent = 100
[policies.weekly]
zones = ["ch-gva-2"]
create = true
[policies.weekly.retention]
keep_last = 4
[policies.weekly.guard]
max_delete_percent = 100
"#;

const HOUR: SignedDuration = SignedDuration::from_hours(1);

fn zone() -> (Stage, InstanceId) {
    let stage = Stage::new();
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    (stage, instance)
}

/// A run of the named policy for the slot of this hour.
async fn run(stage: &Stage, policies: &str, name: &str) -> RunReport {
    let runner = stage.runner(policies);
    let policy = runner.policies.iter().find(|policy| policy.name.as_str() == name).unwrap();
    let options = RunOptions { slot: Some(stage.now()), ..RunOptions::default() };
    let report = runner.run(policy, &options).await.unwrap();
    assert_eq!(report.result, RunResult::Success, "{name}: {:?}", report.zones);
    report
}

fn created(report: &RunReport) -> Option<SnapshotId> {
    let steps = steps(report, Action::Create);
    steps.iter().find(|step| step.outcome == StepOutcome::Done)?.facts.snapshot.id
}

async fn remembered(stage: &Stage, policy: &str) -> Vec<Creation> {
    let folder = StateDirectory::at(stage.seams.disk.clone(), &stage.state());
    folder.policy_state(&policy.parse().unwrap()).await.unwrap().created
}

fn there(stage: &Stage) -> BTreeSet<SnapshotId> {
    stage.there().into_iter().collect()
}

/// Two listings that lack a snapshot do not make it somebody else's.
#[tokio::test(start_paused = true)]
async fn what_listings_lacked_for_a_day_belongs_to_its_policy_when_it_is_back() {
    let (stage, _) = zone();
    let sweep = "[policies.sweep]\nzones = [\"ch-gva-2\"]\n[policies.sweep.select]\nownership = \"all\"\n\
                 [policies.sweep.retention]\nkeep_last = 1\n[policies.sweep.guard]\nmax_delete_percent = 100\n";
    let policies = format!("{TWO}{sweep}");
    let first = created(&run(&stage, &policies, "weekly").await).unwrap();
    stage.step(HOUR);
    let slot = stage.now();
    run(&stage, &policies, "weekly").await;
    for _ in 0..3 {
        stage.step(HOUR * 26);
        let all = stage.world.snapshots(&stage.zone);
        stage.world.fault(listing(all.iter().filter(|one| one.id != first)));
        let runner = stage.runner(&policies);
        let options = RunOptions { slot: Some(slot), ..RunOptions::default() };
        let report = runner.run(&runner.policies[1], &options).await.unwrap();
        assert_eq!(report.result, RunResult::Success, "{:?}", report.zones);
        stage.world.clear_faults();
    }
    let ids = |all: Vec<Creation>| all.into_iter().filter_map(|made| made.snapshot_id).collect::<Vec<_>>();
    assert!(ids(remembered(&stage, "weekly").await).contains(&first));
    run(&stage, &policies, "sweep").await;
    assert!(there(&stage).contains(&first), "it is one of the four that `weekly` keeps");
    // Once it is gone it is forgotten.
    stage.world.remove_snapshot(first);
    for _ in 0..2 {
        stage.step(HOUR * 26);
        run(&stage, &policies, "weekly").await;
    }
    assert!(!ids(remembered(&stage, "weekly").await).contains(&first));
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_keeps_little_leaves_alone_what_another_took() {
    let (stage, _) = zone();
    let mut weeklies = Vec::new();
    for hour in 0..48 {
        if hour % 8 == 0 {
            weeklies.extend(created(&run(&stage, TWO, "weekly").await));
            stage.step(SignedDuration::from_mins(5));
            run(&stage, TWO, "hourly").await;
            stage.step(SignedDuration::from_mins(55));
        } else {
            run(&stage, TWO, "hourly").await;
            stage.step(HOUR);
        }
    }
    assert_eq!(weeklies.len(), 6);
    let there = there(&stage);
    let kept: Vec<bool> = weeklies.iter().map(|id| there.contains(id)).collect();
    assert_eq!(kept, [false, false, true, true, true, true], "the newest four of its own");
    assert_eq!(there.len(), 4 + 3);
}

#[tokio::test(start_paused = true)]
async fn one_that_served_the_slot_of_another_belongs_to_both() {
    let (stage, _) = zone();
    let mut served = Vec::new();
    for hour in 0..40 {
        let slot = Some(stage.now());
        let taken = created(&run(&stage, TWO, "hourly").await);
        if hour % 8 == 0 {
            // The same slot, a moment later.
            stage.step(SignedDuration::from_secs(30));
            for _ in 0..2 {
                let runner = stage.runner(TWO);
                let options = RunOptions { slot, ..RunOptions::default() };
                let report = runner.run(&runner.policies[1], &options).await.unwrap();
                assert_eq!(
                    ended(&report, Action::Create, StepOutcome::Done),
                    0,
                    "no second one for the slot"
                );
            }
            served.extend(taken);
        }
        stage.step(HOUR);
    }
    assert_eq!(served.len(), 5);
    let weekly = remembered(&stage, "weekly").await;
    let slots: BTreeSet<_> = weekly.iter().map(|made| made.slot).collect();
    assert_eq!(slots.len(), weekly.len(), "once for each slot");
    assert!(
        weekly.iter().all(|made| !made.is_open() && made.owner == Owner::ServedBy("hourly".parse().unwrap()))
    );
    let kept: Vec<bool> = served.iter().map(|id| there(&stage).contains(id)).collect();
    assert_eq!(kept, [false, true, true, true, true], "as many as the other one wants");
    // It is forgotten like any other.
    assert!(weekly.len() <= 5, "{weekly:?}");
}

#[tokio::test(start_paused = true)]
async fn one_of_the_same_moment_belongs_to_both_before_its_id_is_known() {
    let (stage, _) = zone();
    let runner = stage.runner(TWO);
    let options = RunOptions { slot: Some(stage.now()), ..RunOptions::default() };
    let (one, other) =
        tokio::join!(runner.run(&runner.policies[0], &options), runner.run(&runner.policies[1], &options));
    let (one, other) = (one.unwrap(), other.unwrap());
    assert_eq!([&one, &other].iter().filter_map(|report| created(report)).count(), 1);
    let (snapshot, taker) = match created(&one) {
        Some(id) => (id, "hourly"),
        None => (created(&other).unwrap(), "weekly"),
    };
    let follower = if taker == "hourly" { "weekly" } else { "hourly" };
    assert_eq!(remembered(&stage, follower).await[0].owner, Owner::ServedBy(taker.parse().unwrap()));
    // Each alone keeps it from the other.
    for hour in 1..=10 {
        stage.step(HOUR);
        run(&stage, TWO, "hourly").await;
        assert!(there(&stage).contains(&snapshot), "{hour}");
    }
}

/// Runs of both policies for the slot of this moment, at the same time.
async fn run_both(stage: &Stage, policies: &str) -> [RunReport; 2] {
    let runner = stage.runner(policies);
    let options = RunOptions { slot: Some(stage.now()), ..RunOptions::default() };
    let (hourly, weekly) =
        tokio::join!(runner.run(&runner.policies[0], &options), runner.run(&runner.policies[1], &options));
    [hourly.unwrap(), weekly.unwrap()]
}

#[tokio::test(start_paused = true)]
async fn one_that_had_to_be_asked_for_twice_belongs_to_both_all_the_same() {
    for effect in [Effect::CutBefore, Effect::status(503, "no")] {
        let (stage, _) = zone();
        stage.world.fault(Fault::on(Call::CreateSnapshot, effect).times(1));
        let reports = run_both(&stage, TWO).await;
        let taken: Vec<SnapshotId> = reports.iter().filter_map(created).collect();
        assert_eq!((taken.len(), stage.there().len()), (1, 1), "{reports:?}");
        for hour in 1..=10 {
            stage.step(HOUR);
            run(&stage, TWO, "hourly").await;
            assert!(there(&stage).contains(&taken[0]), "{hour}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_slot_is_not_served_by_a_snapshot_of_another_policy_that_fails() {
    let (stage, _) = zone();
    stage.world.fault(Fault::on(Call::CreateSnapshot, Effect::operation_fails("fault", "no space")).times(1));
    let reports = run_both(&stage, TWO).await;
    let mut results = reports.each_ref().map(|report| report.result);
    results.sort_by_key(|result| *result == RunResult::Partial);
    assert_eq!(results, [RunResult::Success, RunResult::Partial], "{reports:?}");
    assert_eq!(reports.iter().filter_map(created).count(), 1, "the other one takes it: {reports:?}");
}

#[tokio::test(start_paused = true)]
async fn what_another_policy_takes_for_the_same_slot_is_exported_in_the_same_run() {
    let (stage, _) = zone();
    let export = "[policies.weekly.export]\narchives = [\"vault\"]\n[policies.weekly.retention]";
    let policies = TWO.replace("[policies.weekly.retention]", export);
    for _ in 0..3 {
        let [hourly, weekly] = run_both(&stage, &policies).await;
        assert_eq!(weekly.result, RunResult::Success, "{weekly:?}");
        let exported = steps(&weekly, Action::Export);
        let newest = created(&hourly).or(created(&weekly));
        assert_eq!(exported.iter().map(|step| step.facts.snapshot.id).collect::<Vec<_>>(), [newest]);
        stage.step(HOUR);
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_policy_took_that_is_gone_belongs_to_all_once_that_has_settled() {
    let (stage, _) = zone();
    let mut weeklies = Vec::new();
    for _ in 0..4 {
        weeklies.extend(created(&run(&stage, TWO, "weekly").await));
        stage.step(HOUR);
        run(&stage, TWO, "hourly").await;
        stage.step(HOUR);
    }
    let hourly = TWO.split("[policies.weekly]").next().unwrap();
    for hour in 0..30 {
        run(&stage, hourly, "hourly").await;
        let kept = weeklies.iter().filter(|id| there(&stage).contains(id)).count();
        assert_eq!(kept == 4, hour < 20, "{hour}: {kept}");
        stage.step(HOUR);
    }
    assert_eq!(there(&stage).len(), 3);
}

#[tokio::test(start_paused = true)]
async fn what_was_recorded_before_owners_were_belongs_to_every_policy() {
    let (stage, _) = zone();
    for _ in 0..4 {
        run(&stage, TWO, "weekly").await;
        stage.step(HOUR);
    }
    let before = stage.there();
    rewrite_as_version_1(&stage.state(), "weekly", |earlier| {
        for made in earlier["created"].as_array_mut().unwrap() {
            assert_eq!(made.as_object_mut().unwrap().remove("owner").unwrap(), "this_policy");
        }
    })
    .await;
    let report = run(&stage, TWO, "hourly").await;
    let plan = report.zones[0].plan.clone().unwrap();
    assert_eq!((plan.keep, plan.blocked_by_policy), (5, 2), "as before, weekly keeps what it wants of them");
    assert_eq!(stage.there().len(), before.len() + 1);
}

#[tokio::test(start_paused = true)]
async fn one_taken_by_hand_beside_a_lost_answer_is_never_ours() {
    let policy = TWO.split("[policies.weekly]").next().unwrap();
    let (stage, instance) = zone();
    // Never carried out, and a person takes one within the same minutes.
    stage.world.fault(Fault::on(Call::CreateSnapshot, Effect::CutBefore).times(1));
    stage.world.fault(Fault::on(Call::ListSnapshots, Effect::html()).after(2).times(1));
    let runner = stage.runner(policy);
    let options = RunOptions { slot: Some(stage.now()), ..RunOptions::default() };
    let report = runner.run(&runner.policies[0], &options).await.unwrap();
    assert_eq!(ended(&report, Action::Create, StepOutcome::Failed), 1, "{:?}", report.zones);
    let theirs = stage.world.add_snapshot(instance, stage.now());
    stage.step(SignedDuration::from_mins(2));
    let report = runner.run(&runner.policies[0], &options).await.unwrap();
    assert_eq!(report.result, RunResult::Success, "{:?}", report.zones);
    assert_eq!(there(&stage), BTreeSet::from([theirs]), "no second one for the slot");
    for _ in 0..12 {
        stage.step(HOUR);
        run(&stage, policy, "hourly").await;
    }
    assert!(there(&stage).contains(&theirs));
    assert_eq!(there(&stage).len(), 3 + 1, "the newest three of its own, and theirs");
}

/// Two policies as people wrote them for the version before, whose `created` meant what any policy took.
const MONTH: &str = r#"
[policies.hourly]
zones = ["ch-gva-2"]
create = true
[policies.hourly.retention]
keep_last = 24
[policies.nightly]
zones = ["ch-gva-2"]
create = true
[policies.nightly.retention]
keep_daily = 7
"#;

/// Turns the state into that of the version before, which knew neither owners nor what a run rested on.
async fn forget_what_is_new(stage: &Stage) {
    fn strip(value: &mut Value) {
        const NEW: [&str; 10] = [
            "owner",
            "missing",
            "rested_on",
            "missed",
            "of_instances",
            "pending",
            "blocked_by_paused",
            "blocked_by_source",
            "blocked_by_guard",
            "blocked_by_judge",
        ];
        match value {
            Value::Object(map) => {
                map.retain(|key, _| !NEW.contains(&key.as_str()));
                map.values_mut().for_each(strip);
            }
            Value::Array(list) => {
                list.retain(|one| one.get("owner").is_none_or(|owner| owner == "this_policy"));
                list.iter_mut().for_each(strip);
            }
            _ => {}
        }
    }
    for path in paths(&stage.state()) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if let Some(policy) = name.strip_prefix("policy-").and_then(|name| name.strip_suffix(".json")) {
            rewrite_as_version_1(&stage.state(), policy, |_| {}).await;
        }
        if name == "archives.json" {
            RealDisk.remove_file(&path).unwrap();
        } else if path.extension().is_some_and(|end| end == "json") {
            let mut json: Value = serde_json::from_str(&read(&path)).unwrap();
            strip(&mut json);
            replace_file(&RealDisk, &path, json.to_string().as_bytes(), Access::Owner).unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_deletes_nothing_that_the_version_before_kept_and_holds_nothing_for_long() {
    let (stage, _) = zone();
    let mut too_many_since: Option<i64> = None;
    for hour in 0..24 * 16 {
        if hour == 24 * 11 {
            forget_what_is_new(&stage).await;
        }
        run(&stage, MONTH, "hourly").await;
        if hour % 24 == 2 {
            stage.step(SignedDuration::from_mins(10));
            run(&stage, MONTH, "nightly").await;
            stage.step(SignedDuration::from_mins(50));
        } else {
            stage.step(HOUR);
        }
        if hour < 24 * 11 {
            continue;
        }
        // The version before kept the newest 24 of all, and the newest of each of 7 days.
        let mut all = stage.world.snapshots(&stage.zone);
        all.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.created_at));
        let days: BTreeSet<String> =
            all.iter().map(|snapshot| snapshot.created_at.strftime("%F").to_string()).collect();
        assert!(all.len() >= 24 + 5, "hour {hour}: {} are left", all.len());
        assert!(days.len() >= 7, "hour {hour}: of {days:?}");
        // Those that are kept longer are a few of the last day, and never for longer than a change takes to settle.
        let before = 24 + 7;
        too_many_since = (all.len() > before + 2).then(|| too_many_since.unwrap_or(hour));
        assert!(too_many_since.is_none_or(|since| hour - since <= 20), "hour {hour}: {} are left", all.len());
    }
}
