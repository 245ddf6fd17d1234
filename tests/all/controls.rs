//! `pause`, `resume` and `trigger`, beside a daemon and beside a run by hand.

use std::time::Duration;

use jiff::SignedDuration;
use serde_json::json;
use snapwarden::clock::Clock as _;
use snapwarden::disk::{Access, RealDisk, replace_file};
use snapwarden::policy::name::PolicyName;
use snapwarden::run::context::RunOptions;
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::directory::StateDirectory;

use crate::command_line::{self, PRUNE};
use crate::daemon::{creating, deleting, play, stage_at, taken, until};
use crate::stage::{Stage, ended, read};

fn name(policy: &str) -> PolicyName {
    policy.parse().unwrap()
}

/// As a command beside the daemon has it.
fn state(stage: &Stage) -> StateDirectory {
    StateDirectory::open(stage.seams.disk.clone(), &stage.state()).unwrap()
}

async fn pause(stage: &Stage, policy: &str) {
    state(stage).pause(&stage.clock, name(policy), stage.now()).await.unwrap();
}

async fn resume(stage: &Stage, policy: &str) {
    state(stage).resume(&stage.clock, name(policy)).await.unwrap();
}

async fn trigger(stage: &Stage, policy: &str) {
    state(stage).trigger(&stage.clock, name(policy)).await.unwrap();
}

/// When a run was asked for that has not begun.
async fn is_triggered(stage: &Stage) -> bool {
    !state(stage).controls().await.unwrap().triggered.is_empty()
}

#[tokio::test(start_paused = true)]
async fn a_paused_policy_is_not_run_also_after_a_restart_and_makes_up_for_nothing_once_it_is_resumed() {
    let stage = stage_at("2026-11-03T00:30:00Z");
    let policies = creating("schedule = \"@hourly\"");
    let first = play(&stage, &policies).await;
    let enabled = "snapwarden_policy_enabled{policy=\"p\"}";
    until(&stage, "2026-11-03T00:40:00Z").await;
    assert_eq!(first.value(enabled), Some(1.0));
    pause(&stage, "p").await;
    until(&stage, "2026-11-03T00:40:03Z").await;
    assert_eq!(first.value(enabled), Some(0.0));
    let status = first.telemetry.status_json().policies["p"].clone();
    assert_eq!(status.paused_since.map(|at| at.to_string()).as_deref(), Some("2026-11-03T00:40:00Z"));
    assert_eq!((status.enabled, status.next_run_at), (false, None));
    until(&stage, "2026-11-03T02:30:00Z").await;
    first.stop().await;

    let second = play(&stage, &policies).await;
    until(&stage, "2026-11-03T04:30:00Z").await;
    assert_eq!((second.value(enabled), taken(&stage).len()), (Some(0.0), 0));
    resume(&stage, "p").await;
    until(&stage, "2026-11-03T04:59:00Z").await;
    assert_eq!((second.value(enabled), taken(&stage).len()), (Some(1.0), 0), "nothing was missed");
    until(&stage, "2026-11-03T05:10:00Z").await;
    assert_eq!(taken(&stage).len(), 1);
    assert_eq!(second.value("snapwarden_policy_missed_runs_total{policy=\"p\"}"), Some(0.0));
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pause_or_its_end_stops_every_deletion_that_has_not_begun() {
    let policies = deleting("", "max_count = 3")
        + "[policies.q]\nzones = [\"ch-gva-2\"]\ncreate = true\n\
           [policies.off]\nzones = [\"ch-gva-2\"]\nenabled = false\n";
    for (what, is_stopped) in [("nothing", false), ("p", true), ("q", true), ("resume", true), ("off", false)]
    {
        let stage = stage_at("2026-11-01T12:00:00Z");
        stage.instance("db-1", 40);
        if what == "resume" {
            drop(stage.runner(&policies));
            pause(&stage, "q").await;
        }
        stage.step(SignedDuration::from_secs(12 * 3600 - 60));
        stage.world.fault(Fault::on(Call::DeleteSnapshot, Effect::Delay(Duration::from_secs(10))));
        let play = play(&stage, &policies).await;
        until(&stage, "2026-11-02T00:00:05Z").await;
        match what {
            "nothing" => {}
            "resume" => resume(&stage, "q").await,
            policy => pause(&stage, policy).await,
        }
        stage.clock.sleep(Duration::from_mins(10)).await;
        // Those in flight end.
        assert_eq!(stage.there().len(), if is_stopped { 36 } else { 3 }, "{what}");
        play.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_by_hand_sees_a_pause_before_its_next_step() {
    let stage = Stage::new();
    for number in 0..12 {
        stage.instance(&format!("web-{number}"), 0);
    }
    stage.world.set_operations_take(Duration::from_mins(1));
    let runner = stage.runner(&creating(""));
    let options = RunOptions::default();
    let paused = async {
        stage.clock.sleep(Duration::from_secs(30)).await;
        pause(&stage, "p").await;
    };
    let (report, ()) = tokio::join!(runner.run(&runner.policies[0], &options), paused);
    let report = report.unwrap();
    let skipped = ended(&report, Action::Create, StepOutcome::Skipped);
    assert_eq!((ended(&report, Action::Create, StepOutcome::Done), skipped), (4, 8), "{report:?}");

    let report = stage.run(&creating("")).await;
    assert!(report.zones[0].steps.is_empty(), "{report:?}");
    let failure = &report.zones[0].failures[0];
    assert!(failure.contains("policy p is paused by hand since 2026-11-01T12:00:30Z"), "{failure}");
}

#[tokio::test(start_paused = true)]
async fn a_deletion_is_not_begun_if_the_pause_comes_while_the_api_answers() {
    let stage = Stage::new();
    stage.instance("db-1", 6);
    stage.world.fault(Fault::on(Call::GetSnapshot, Effect::Delay(Duration::from_secs(10))));
    let runner = stage.runner(&deleting("", "max_count = 3"));
    let options = RunOptions::default();
    let paused = async {
        stage.clock.sleep(Duration::from_secs(5)).await;
        pause(&stage, "p").await;
    };
    let (report, ()) = tokio::join!(runner.run(&runner.policies[0], &options), paused);
    assert_eq!(stage.there().len(), 6, "{:?}", report.unwrap());
}

#[tokio::test(start_paused = true)]
async fn what_a_policy_kept_when_it_was_paused_stays_kept() {
    let rules = |name: &str, rules: &str| {
        format!(
            "[policies.{name}]\nzones = [\"ch-gva-2\"]\n[policies.{name}.retention]\n{rules}\n\
             [policies.{name}.guard]\nsettle = \"0s\"\nmax_delete_percent = 100\n"
        )
    };
    let policies = rules("short", "keep_last = 1") + &rules("p", "keep_within = \"3d\"");
    for (is_paused, left) in [(false, 2), (true, 4)] {
        let stage = Stage::new();
        stage.instance("db-1", 10);
        drop(stage.runner(&policies));
        if is_paused {
            pause(&stage, "p").await;
        }
        // The first run that finds it paused comes two days later.
        stage.step(SignedDuration::from_hours(48));
        stage.run(&policies).await;
        assert_eq!(stage.there().len(), left, "paused: {is_paused}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_policy_kept_waits_if_it_is_resumed_and_paused_again_between_two_runs_of_another_one() {
    let rules = |name: &str, rules: &str| {
        format!(
            "[policies.{name}]\nzones = [\"ch-gva-2\"]\n[policies.{name}.retention]\n{rules}\n\
             [policies.{name}.guard]\nmax_delete_percent = 100\n"
        )
    };
    let policies = rules("short", "keep_last = 1") + &rules("p", "keep_within = \"3d\"");
    for (is_resumed, hours, left) in [(false, 0, 4), (true, 0, 4), (true, 19, 4), (true, 20, 1)] {
        let stage = Stage::new();
        stage.instance("db-1", 10);
        drop(stage.runner(&policies));
        pause(&stage, "p").await;
        stage.step(SignedDuration::from_hours(24));
        stage.run(&policies).await;
        stage.step(SignedDuration::from_hours(24));
        stage.run(&policies).await;
        assert_eq!(stage.there().len(), 4);
        stage.step(SignedDuration::from_hours(1));
        if is_resumed {
            resume(&stage, "p").await;
            pause(&stage, "p").await;
        }
        stage.step(SignedDuration::from_hours(1));
        let report = stage.run(&policies).await;
        let pending = report.zones[0].pending.as_deref().unwrap_or_default();
        assert_eq!(pending.contains("policy p is paused anew"), is_resumed, "{pending}");
        stage.step(SignedDuration::from_hours(hours));
        stage.run(&policies).await;
        stage.run(&policies).await;
        assert_eq!(stage.there().len(), left, "{is_resumed}, after {hours} hours");
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_that_is_asked_for_begins_within_two_seconds_and_once_more_if_one_runs() {
    let stage = stage_at("2026-11-03T00:30:00Z");
    stage.world.set_operations_take(Duration::from_mins(5));
    let play = play(&stage, &creating("")).await;
    until(&stage, "2026-11-03T00:40:00Z").await;
    trigger(&stage, "p").await;
    until(&stage, "2026-11-03T00:40:02.5Z").await;
    assert!(play.telemetry.status_json().policies["p"].running_since.is_some());
    assert!(!is_triggered(&stage).await, "it was taken");
    for minute in 41..44 {
        until(&stage, &format!("2026-11-03T00:{minute}:00Z")).await;
        trigger(&stage, "p").await;
    }
    until(&stage, "2026-11-03T01:30:00Z").await;
    assert_eq!(play.value("snapwarden_policy_runs_total{policy=\"p\",result=\"success\"}"), Some(2.0));
    assert_eq!(taken(&stage).len(), 2, "each takes its snapshot");
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_run_that_is_asked_for_while_another_process_runs_the_policy_begins_after_that() {
    let stage = stage_at("2026-11-03T00:30:00Z");
    let play = play(&stage, &creating("")).await;
    let by_hand = state(&stage).lock_policy(&name("p"), &stage.clock).await.unwrap();
    trigger(&stage, "p").await;
    stage.clock.sleep(Duration::from_mins(90)).await;
    assert!(is_triggered(&stage).await && taken(&stage).is_empty());
    drop(by_hand);
    stage.clock.sleep(Duration::from_secs(30)).await;
    assert!(!is_triggered(&stage).await && taken(&stage).len() == 1);
    let skipped = "snapwarden_policy_runs_total{policy=\"p\",result=\"skipped\"}";
    assert_eq!(play.value(skipped), Some(0.0), "none was begun in vain");
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_run_that_was_asked_for_long_before_the_start_or_cannot_be_is_dropped() {
    let policies = creating("") + "[policies.off]\nzones = [\"ch-gva-2\"]\nenabled = false\n";
    for (policy, wait, runs) in [
        ("p", SignedDuration::from_mins(59), 1),
        ("p", SignedDuration::from_mins(61), 0),
        ("off", SignedDuration::ZERO, 0),
        ("unknown", SignedDuration::ZERO, 0),
    ] {
        let stage = stage_at("2026-11-03T00:30:00Z");
        drop(stage.runner(&policies));
        trigger(&stage, policy).await;
        stage.step(wait);
        let play = play(&stage, &policies).await;
        stage.clock.sleep(Duration::from_mins(5)).await;
        assert_eq!(taken(&stage).len(), runs, "{policy} after {wait}");
        assert!(!is_triggered(&stage).await, "{policy} after {wait}");
        play.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_that_is_asked_for_and_then_paused_does_not_begin() {
    let stage = stage_at("2026-11-03T00:30:00Z");
    let play = play(&stage, &creating("")).await;
    trigger(&stage, "p").await;
    pause(&stage, "p").await;
    stage.clock.sleep(Duration::from_mins(1)).await;
    resume(&stage, "p").await;
    stage.clock.sleep(Duration::from_mins(1)).await;
    assert_eq!(taken(&stage).len(), 0);
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_run_that_a_pause_stopped_begins_again_if_the_pause_is_over_by_then() {
    for (is_resumed, schedule, snapshots) in
        [(true, "schedule = \"@hourly\"", 12), (true, "", 12), (false, "schedule = \"@hourly\"", 4)]
    {
        let stage = stage_at("2026-11-03T00:59:00Z");
        for number in 2..=12 {
            stage.world.add_instance(&stage.zone, &format!("web-{number}"), &[]);
        }
        stage.world.set_operations_take(Duration::from_mins(1));
        let play = play(&stage, &creating(schedule)).await;
        until(&stage, "2026-11-03T01:00:00Z").await;
        if schedule.is_empty() {
            trigger(&stage, "p").await;
        }
        until(&stage, "2026-11-03T01:00:20Z").await;
        pause(&stage, "p").await;
        until(&stage, "2026-11-03T01:00:30Z").await;
        if is_resumed {
            resume(&stage, "p").await;
        }
        until(&stage, "2026-11-03T01:40:00Z").await;
        assert_eq!(taken(&stage).len(), snapshots, "{schedule}, {is_resumed}");
        resume(&stage, "p").await;
        until(&stage, "2026-11-03T01:50:00Z").await;
        assert_eq!(taken(&stage).len(), snapshots, "{schedule}, {is_resumed}");
        play.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_that_is_asked_for_and_cut_short_is_begun_by_the_next_start_unless_it_is_paused() {
    // How long each snapshot takes: the grace is 30 s. The policy's other instances are not begun.
    for (how, seconds, snapshots) in
        [("stopped", 10, 12), ("stopped", 300, 12), ("killed", 300, 12), ("paused", 10, 4)]
    {
        let stage = stage_at("2026-11-03T00:30:00Z");
        for number in 2..=12 {
            stage.world.add_instance(&stage.zone, &format!("web-{number}"), &[]);
        }
        stage.world.set_operations_take(Duration::from_secs(seconds));
        let first = play(&stage, &creating("")).await;
        stage.clock.sleep(Duration::from_secs(5)).await;
        trigger(&stage, "p").await;
        stage.clock.sleep(Duration::from_secs(6)).await;
        if how == "killed" {
            first.kill().await;
        } else {
            first.stop().await;
        }
        if how == "paused" {
            pause(&stage, "p").await;
        }
        let second = play(&stage, &creating("")).await;
        stage.clock.sleep(Duration::from_mins(30)).await;
        resume(&stage, "p").await;
        stage.clock.sleep(Duration::from_mins(1)).await;
        assert_eq!(taken(&stage).len(), snapshots, "{how}, {seconds} s");
        second.stop().await;

        let third = play(&stage, &creating("")).await;
        stage.clock.sleep(Duration::from_mins(30)).await;
        assert_eq!(taken(&stage).len(), snapshots, "{how}, {seconds} s, once more");
        assert_eq!(third.value("snapwarden_policy_runs_total{policy=\"p\",result=\"success\"}"), Some(0.0));
        third.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_slot_that_comes_during_a_run_that_was_asked_for_is_made_up_for_if_that_fails() {
    for is_failing in [true, false] {
        let stage = stage_at("2026-11-03T00:50:00Z");
        stage.world.set_operations_take(Duration::from_mins(3));
        if is_failing {
            let fault = Fault::on(Call::CreateSnapshot, Effect::operation_fails("fault", "no space"));
            stage.world.fault(fault.times(1));
        }
        let play = play(&stage, &creating("schedule = \"0 1 * * *\"")).await;
        until(&stage, "2026-11-03T00:59:00Z").await;
        trigger(&stage, "p").await;
        until(&stage, "2026-11-03T01:30:00Z").await;
        let all = stage.world.snapshots(&stage.zone);
        assert_eq!(all.iter().filter(|one| one.state.is_good()).count(), 1, "{is_failing}: {all:?}");
        let made_up = all.iter().any(|one| one.created_at.to_string().as_str() > "2026-11-03T01:00");
        assert_eq!(made_up, is_failing, "{all:?}");
        play.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_that_was_asked_for_long_before_a_slot_does_not_take_its_place() {
    for (asked_at, snapshots) in [("00:30:00", 2), ("00:50:00", 1)] {
        let stage = stage_at("2026-11-03T00:29:00Z");
        stage.world.set_operations_take(Duration::from_mins(40));
        let play = play(&stage, &creating("schedule = \"0 1 * * *\"")).await;
        until(&stage, &format!("2026-11-03T{asked_at}Z")).await;
        trigger(&stage, "p").await;
        until(&stage, "2026-11-03T02:30:00Z").await;
        assert_eq!(taken(&stage).len(), snapshots, "{asked_at}");
        play.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn pauses_that_cannot_be_read_stop_everything_until_they_can() {
    let stage = stage_at("2026-11-03T00:30:00Z");
    let play = play(&stage, &creating("schedule = \"@hourly\"")).await;
    stage.clock.sleep(Duration::from_secs(5)).await;
    let file = stage.state().join("controls.json");
    replace_file(&RealDisk, &file, b"{\"version\": 2, \"paused\": {}}", Access::Owner).unwrap();
    until(&stage, "2026-11-03T01:30:00Z").await;
    assert_eq!(taken(&stage).len(), 0);
    assert_eq!(play.value("snapwarden_policy_runs_total{policy=\"p\",result=\"failed\"}"), Some(1.0));
    let good = b"{\"version\": 1, \"paused\": {}, \"triggered\": {}}";
    replace_file(&RealDisk, &file, good, Access::Owner).unwrap();
    until(&stage, "2026-11-03T02:30:00Z").await;
    assert_eq!(taken(&stage).len(), 1);
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_look_for_the_daemon_does_not_keep_one_from_starting() {
    let stage = stage_at("2026-11-03T00:30:00Z");
    let policies = creating("");
    drop(stage.runner(&policies));
    assert!(!state(&stage).has_daemon().await.unwrap());
    let looking = stage.seams.disk.lock(&stage.state().join("daemon.lock")).unwrap();
    let looked = async {
        stage.clock.sleep(Duration::from_millis(200)).await;
        drop(looking);
    };
    let (play, ()) = tokio::join!(play(&stage, &policies), looked);
    assert!(state(&stage).has_daemon().await.unwrap());
    play.stop().await;
    assert!(!state(&stage).has_daemon().await.unwrap());
}

#[tokio::test]
async fn the_commands_say_what_is_so_now_and_need_no_credentials() {
    let (play, _) = command_line::Play::five(PRUNE).await;
    let run = async |arguments: &[&str]| command_line::end_of(play.stranger(arguments)).await;
    let paused = run(&["pause", "nightly"]).await;
    assert_eq!(paused.status, 0, "{paused:?}");
    paused.has(&["policy nightly is paused by hand since 20", "`snapwarden resume nightly` ends that"]);
    let again = run(&["pause", "nightly", "--output", "json"]).await;
    assert_eq!((again.status, &again.json()["was_paused"]), (0, &json!(true)), "{again:?}");

    // What runs or is planned by hand knows it, too.
    let refused = ["paused by hand since", "`snapwarden resume nightly` ends that"];
    for arguments in [&["once", "nightly"][..], &["plan", "nightly"], &["trigger", "nightly"]] {
        play.run(arguments).await.refused(2, &refused);
    }
    for arguments in [&["once"][..], &["plan"], &["coverage"]] {
        play.run(arguments).await.complained(&["policy nightly is paused by hand since"]);
    }
    assert_eq!(play.there().len(), 5);
    let status = play.run(&["status", "--output", "json"]).await.json();
    assert_eq!(status["policies"]["nightly"]["enabled"], json!(false), "{status}");
    assert!(status["policies"]["nightly"]["paused_since"].is_string(), "{status}");
    play.run(&["status"]).await.has(&["paused by hand since 20"]);
    let uncovered = play.run(&["coverage", "web-1"]).await;
    assert!(uncovered.out.contains("nightly (paused by hand since"), "{uncovered:?}");

    let resumed = run(&["resume", "nightly"]).await;
    assert_eq!(resumed.status, 0, "{resumed:?}");
    resumed.has(&["policy nightly is not paused any more (it was since 20", "snapwarden plan nightly"]);
    let again = run(&["resume", "nightly"]).await;
    assert_eq!(again.status, 0, "{again:?}");
    again.has(&["was not paused by hand, so nothing changed"]);

    let asked = run(&["trigger", "nightly"]).await;
    assert_eq!(asked.status, 0, "{asked:?}");
    asked.has(&["a run of policy nightly is asked for", "no daemon works on", "`snapwarden once nightly`"]);
    let asked = run(&["trigger", "nightly", "--output", "json"]).await.json();
    assert_eq!((&asked["policy"], &asked["daemon"]), (&json!("nightly"), &json!(false)));
    for command in ["pause", "resume", "trigger"] {
        run(&[command, "nigthly"])
            .await
            .refused(2, &["there is no policy `nigthly`", "did you mean `nightly`?"]);
    }
    let file = read(&play.path("state").join("controls.json"));
    assert!(file.contains("\"paused\": {}") && file.contains("\"nightly\": \"20"), "{file}");
}
