//! Hooks around whole runs against the simulated zone: simulated programs, in virtual time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join;
use jiff::SignedDuration;
use snapwarden::clock::Clock as _;
use snapwarden::policy::select::Pattern;
use snapwarden::retention::deciding_keys::deciding_keys;
use snapwarden::run::context::RunOptions;
use snapwarden::run::list::ListingCache;
use snapwarden::run::report::{Hook, RunReport, RunResult};
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::processes::SimProgram;
use snapwarden::state::audit::{Action, StepOutcome};

use crate::stage::{NIGHTLY, Stage, ended};

const HOOKS: &str = "[policies.nightly.hooks]\nbefore = [\"freeze\", \"db-1\", \"db-1\"]\nafter = [\"thaw\"]\n\
                     on_failure = [\"alarm\"]\ntimeout = \"2m\"\n";

/// Takes a snapshot of each instance, and has no hooks.
fn without_hooks() -> String {
    let select = "[policies.nightly.select]\nownership = \"all\"\n[policies.nightly.retention]";
    NIGHTLY.replacen("zones", "create = true\nzones", 1).replace("[policies.nightly.retention]", select)
}

/// The same with hooks.
fn nightly() -> String {
    without_hooks() + HOOKS
}

/// Two instances of twenty snapshots, and three programs that succeed at once.
fn stage() -> Stage {
    let (stage, _) = Stage::two_by_twenty();
    stage.step(SignedDuration::from_hours(1));
    for name in ["freeze", "thaw", "alarm"] {
        stage.processes.install(name, SimProgram::default());
    }
    stage
}

/// The programs that were started, in their order.
fn started(stage: &Stage) -> Vec<String> {
    stage.processes.started().into_iter().map(|command| command.program).collect()
}

fn failures(report: &RunReport) -> Vec<(Hook, &str)> {
    let hooks = report.hooks.iter();
    hooks.filter_map(|hook| Some((hook.hook, hook.failure.as_deref()?))).collect()
}

#[tokio::test(start_paused = true)]
async fn before_comes_before_every_request_and_after_once_all_is_done_and_saved() {
    let stage = stage();
    let seen = Arc::new(Mutex::new(Vec::new()));
    for name in ["freeze", "thaw"] {
        let (seen, world, folder) = (Arc::clone(&seen), stage.world.clone(), stage.state());
        let effect = move |_: &_| {
            let is_saved = folder.join("runs-nightly.json").exists();
            let deleted = world.changes().iter().filter(|change| change.call == Call::DeleteSnapshot).count();
            seen.lock().unwrap().push((world.log().len(), deleted, is_saved));
        };
        stage.processes.install(name, SimProgram { effect: Some(Arc::new(effect)), ..SimProgram::default() });
    }
    let report = stage.run(&nightly()).await;
    assert_eq!((report.result, failures(&report)), (RunResult::Success, vec![]));
    assert_eq!(started(&stage), ["freeze", "thaw"], "nothing failed, so nobody is alarmed");
    let deleted = ended(&report, Action::Delete, StepOutcome::Done);
    assert!(deleted > 0);
    assert_eq!(*seen.lock().unwrap(), [(0, 0, false), (stage.world.log().len(), deleted, true)]);
}

#[tokio::test(start_paused = true)]
async fn what_others_took_before_the_hook_had_ended_does_not_serve_the_slot() {
    let stage = stage();
    let (world, clock) = (stage.world.clone(), stage.clock.clone());
    // Another host takes one of each instance as soon as the hour has struck.
    let instances: BTreeSet<_> =
        world.snapshots(&stage.zone).iter().filter_map(|snapshot| snapshot.instance_id).collect();
    let others = instances.clone();
    let effect =
        move |_: &_| others.iter().for_each(|instance| _ = world.add_snapshot(*instance, clock.now()));
    let takes = Duration::from_secs(20);
    stage
        .processes
        .install("freeze", SimProgram { takes, effect: Some(Arc::new(effect)), ..SimProgram::default() });
    let options = RunOptions { slot: Some(stage.now()), ..RunOptions::default() };
    let report = stage.run_with(&nightly(), &options).await;
    assert_eq!(ended(&report, Action::Create, StepOutcome::Done), instances.len(), "{:?}", report.zones);
    // After a restart its own serve the slot, however long the hook takes.
    let again = stage.run_with(&nightly(), &options).await;
    assert_eq!(ended(&again, Action::Create, StepOutcome::Done), 0, "{:?}", again.zones);
}

#[tokio::test(start_paused = true)]
async fn a_hook_gets_the_facts_of_its_run_and_nothing_else() {
    let stage = stage();
    let report = stage.run(&nightly()).await;
    let [before, after]: [_; 2] = stage.processes.started().try_into().unwrap();
    assert_eq!(before.arguments, ["db-1", "db-1"]);
    let facts = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| (format!("SNAPWARDEN_{name}"), (*value).to_owned())).collect()
    };
    let (id, at) = (report.run_id.to_string(), report.started_at.to_string());
    let of_run = [("POLICY", "nightly"), ("RUN_ID", &id), ("ZONES", "ch-gva-2"), ("STARTED_AT", &at)];
    assert_eq!(before.environment, facts(&[&of_run[..], &[("HOOK", "before")]].concat()));
    let counts = [
        ("HOOK", "after"),
        ("RESULT", "success"),
        ("CREATED", "2"),
        ("EXPORTED", "2"),
        ("PROMOTED", "2"),
        ("DELETED", "22"),
        ("TEMPLATES_DELETED", "0"),
        ("COPIES_PRUNED", "0"),
        ("BLOCKED", "0"),
        ("SKIPPED", "0"),
        ("FAILED", "0"),
        ("BLOCKED_BY_GUARD", "0"),
        ("PENDING", "0"),
        ("PROBLEMS", ""),
    ];
    assert_eq!(after.environment, facts(&[&of_run[..], &counts].concat()));
}

#[tokio::test(start_paused = true)]
async fn without_a_successful_before_nothing_is_done_and_what_is_now_missing_keeps_the_rest() {
    let hang = SimProgram { takes: Duration::from_hours(1), ..SimProgram::default() };
    let stubborn = SimProgram { is_stubborn: true, ..hang.clone() };
    let fails = SimProgram { status: 3, stderr: b"no\nguest \x1b[31m\n\n".to_vec(), ..SimProgram::default() };
    for (program, words, takes) in [
        (Some(fails), "exit status: 3; its last line is: guest \\u{1b}[31m", 0),
        (Some(hang), "it was ended, since it took longer than 120 s", 120),
        (Some(stubborn), "it was ended, since it took longer than 120 s", 125),
        (None, "there is no program `freeze` in PATH", 0),
    ] {
        let (stage, _) = Stage::two_by_twenty();
        stage.step(SignedDuration::from_hours(1));
        stage.processes.install("thaw", SimProgram::default());
        stage.processes.install("alarm", SimProgram::default());
        let is_there = program.is_some();
        if let Some(program) = program {
            stage.processes.install("freeze", program);
        }
        let begun = stage.clock.elapsed();
        let report = stage.run(&nightly()).await;
        assert_eq!(report.result, RunResult::Failed, "{words}");
        let failure = report.zones[0].failures.join("\n");
        assert!(failure.contains("nothing is done here: hook `before` (freeze)"), "{failure}");
        assert!(failure.contains(words), "{failure}");
        assert!(stage.clock.elapsed().abs_diff(begun).as_secs() == takes, "{words}");
        assert!(stage.world.changes().is_empty(), "{words}");
        let rest = ["alarm", "thaw"];
        assert_eq!(started(&stage), if is_there { vec!["freeze", "alarm", "thaw"] } else { rest.to_vec() });
        let alarm = &stage.processes.started()[usize::from(is_there)];
        assert_eq!(alarm.environment["SNAPWARDEN_RESULT"], "failed");
        assert!(alarm.environment["SNAPWARDEN_PROBLEMS"].contains("zone ch-gva-2: nothing is done here"));

        // Another policy, which would delete, keeps what the missing snapshot was to replace.
        let tidy = nightly().replace("[policies.nightly.export]\narchives = [\"vault\"]\n", "")
            + "[policies.tidy]\nzones = [\"ch-gva-2\"]\n[policies.tidy.retention]\nkeep_last = 2\n\
               [policies.tidy.guard]\nmax_delete_percent = 100\nsettle = \"0s\"\n";
        let runner = stage.runner(&tidy);
        let report = runner.run(&runner.policies[1], &RunOptions::default()).await.unwrap();
        assert_eq!(stage.there().len(), 40, "{words}");
        assert!(report.zones[0].plan.as_ref().unwrap().blocked_by_source > 0, "{words}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_hook_at_the_end_that_fails_changes_nothing_but_is_reported() {
    let stage = stage();
    stage.processes.install("thaw", SimProgram { status: 1, ..SimProgram::default() });
    let report = stage.run(&nightly()).await;
    assert_eq!(report.result, RunResult::Success);
    assert_eq!(failures(&report), [(Hook::After, "hook `after` (thaw): it ended with exit status: 1")]);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["hooks"][0]["hook"], "before");
    assert!(json["hooks"][1]["failure"].as_str().unwrap().contains("exit status: 1"));
}

#[tokio::test(start_paused = true)]
async fn a_partial_run_alarms_and_then_thaws_and_a_held_one_only_thaws() {
    let stage = stage();
    stage.world.fault(Fault::on(Call::ListSnapshots, Effect::html()).after(2));
    let report = stage.run(&nightly()).await;
    assert_eq!(report.result, RunResult::Partial);
    assert_eq!(started(&stage), ["freeze", "alarm", "thaw"]);

    let stage = self::stage();
    let held = nightly().replace("max_delete_percent = 100", "max_deletes = 1");
    let report = stage.run(&held).await;
    assert_eq!(report.result, RunResult::Held);
    assert_eq!(started(&stage), ["freeze", "thaw"]);
    assert_eq!(stage.processes.started()[1].environment["SNAPWARDEN_RESULT"], "held");
}

#[tokio::test(start_paused = true)]
async fn a_stop_starts_no_before_and_ends_one_in_flight_within_the_grace_but_thaws() {
    let stage = stage();
    let options = RunOptions::default();
    options.stop.cancel();
    let report = stage.run_with(&nightly(), &options).await;
    assert_eq!(report.result, RunResult::Failed);
    assert_eq!(started(&stage), ["alarm", "thaw"]);

    let stage = self::stage();
    let slow = SimProgram { takes: Duration::from_secs(100), is_stubborn: true, ..SimProgram::default() };
    stage.processes.install("freeze", slow);
    let options = RunOptions::default();
    let begun = stage.clock.elapsed();
    let stop = async {
        stage.clock.sleep(Duration::from_secs(10)).await;
        options.stop.cancel();
    };
    let (report, ()) = join(stage.run_with(&nightly(), &options), stop).await;
    assert_eq!(report.result, RunResult::Failed);
    // 25 s of the grace of 30 s; then it is asked to end, and 5 s later it is killed.
    assert_eq!(stage.clock.elapsed().abs_diff(begun), Duration::from_secs(10 + 25 + 5));
    assert_eq!(started(&stage), ["freeze", "alarm", "thaw"]);
    assert!(stage.world.changes().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_plan_names_hooks_and_starts_none_and_a_limited_run_says_what_it_is_limited_to() {
    let stage = stage();
    let runner = stage.runner(&nightly());
    let previews = runner.preview(&ListingCache::default(), &runner.policies[0], None).await;
    let hooks = &previews[0].1.as_ref().unwrap().hooks;
    let named: Vec<_> = hooks.each().map(|(key, program)| (key, &*program.name)).collect();
    assert_eq!(named, [("before", "freeze"), ("after", "thaw"), ("on_failure", "alarm")]);
    assert_eq!(started(&stage), [""; 0]);

    let options = RunOptions { instances: Some(Pattern::new("web-*").unwrap()), ..RunOptions::default() };
    stage.run_with(&nightly(), &options).await;
    assert_eq!(started(&stage), ["freeze", "thaw"]);
    assert_eq!(stage.processes.started()[0].environment["SNAPWARDEN_INSTANCE"], "web-*");
}

#[tokio::test(start_paused = true)]
async fn another_hook_is_no_change_that_deletions_wait_for() {
    let stage = stage();
    let [with, without] =
        [nightly(), without_hooks()].map(|policies| deciding_keys(&stage.runner(&policies).policies[0]));
    assert_eq!(with, without);
}

#[tokio::test(start_paused = true)]
async fn the_deadline_counts_from_before_the_hook() {
    let stage = stage();
    stage.processes.install("freeze", SimProgram { takes: Duration::from_secs(90), ..SimProgram::default() });
    let late = nightly().replacen("zones", "deadline = \"1m\"\nzones", 1);
    let report = stage.run(&late).await;
    assert_eq!(ended(&report, Action::Create, StepOutcome::Done), 0);
    assert!(report.finished_at.duration_since(report.started_at) >= SignedDuration::from_secs(90));
}
