//! Ordinary nights in which nothing may be lost: an edit, a rename, a pause, a label that is gone, a listing that lacks
//! what it had.

use std::time::Duration;

use futures_util::future::join;
use http::StatusCode;
use jiff::SignedDuration;
use snapwarden::policy::select::Pattern;
use snapwarden::run::context::RunOptions;
use snapwarden::run::list::ListingCache;
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::snapshot::{InstanceId, SnapshotState};
use snapwarden::state::allowances::{Allowance, AllowanceOf};
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::directory::StateDirectory;
use snapwarden::state::holds::Hold;

use crate::stage::{Stage, ended, steps};

/// A policy that prunes, with a guard that does not count.
fn pruning(name: &str, rules: &str) -> String {
    format!(
        "[policies.{name}]\nzones = [\"ch-gva-2\"]\n[policies.{name}.retention]\n{rules}\n[policies.{name}.guard]\n\
         max_delete_percent = 100\n"
    )
}

fn deleted(report: &RunReport) -> usize {
    ended(report, Action::Delete, StepOutcome::Done)
}

fn pending(report: &RunReport) -> &str {
    assert_eq!(report.result, RunResult::Success, "{:?}", report.zones);
    report.zones[0].pending.as_deref().unwrap_or_else(|| panic!("nothing is pending: {:?}", report.zones))
}

async fn allow(stage: &Stage, policy: &str, deletes: u64) {
    let directory = StateDirectory::open(stage.seams.disk.clone(), &stage.state()).unwrap();
    let given = Allowance {
        of: AllowanceOf::Policy(policy.parse().unwrap()),
        zone: None,
        deletes,
        given_at: stage.now(),
        ends_at: None,
    };
    directory.allow(&stage.clock, given).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_mistyped_count_deletes_nothing_at_once_and_says_when_it_will() {
    let stage = Stage::new();
    stage.instance("web-1", 11);
    stage.run(&pruning("nightly", "keep_daily = 14")).await;
    let mistyped = pruning("nightly", "keep_daily = 1\nkeep_oldest = false");
    let report = stage.run(&mistyped).await;
    assert_eq!(deleted(&report), 0);
    let text = pending(&report);
    for part in
        ["10 snapshots", "keep_daily was 14, is 1", "2026-11-02T08:00:00Z", "snapwarden allow nightly 10"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    // The plan said so beforehand.
    let runner = stage.runner(&mistyped);
    let preview = runner.preview(&ListingCache::default(), &runner.policies[0], None).await;
    let preview = preview[0].1.as_ref().unwrap();
    let blocked = preview.plan.decisions.iter().filter(|decision| decision.blocked_by() == Some("change"));
    assert_eq!((blocked.count(), preview.plan.deletes), (10, 0));
    assert!(preview.pending.as_deref().unwrap().contains("keep_daily was 14, is 1"));

    stage.step(SignedDuration::from_hours(20));
    assert_eq!(deleted(&stage.run(&mistyped).await), 10);
}

#[tokio::test(start_paused = true)]
async fn a_typo_that_is_mended_within_the_time_loses_nothing() {
    let stage = Stage::new();
    stage.instance("web-1", 11);
    let right = pruning("nightly", "keep_daily = 14");
    stage.run(&right).await;
    stage.run(&pruning("nightly", "keep_daily = 1")).await;
    stage.step(SignedDuration::from_hours(10));
    let report = stage.run(&right).await;
    assert_eq!((report.zones[0].pending.as_deref(), stage.there().len()), (None, 11));
}

#[tokio::test(start_paused = true)]
async fn what_was_kept_while_the_clock_was_wrong_is_not_deleted_at_once() {
    // By a clock that is behind, requests are signed for a time that is over.
    for skew in [SignedDuration::from_mins(-30), SignedDuration::from_hours(-9000)] {
        let stage = Stage::new();
        stage.instance("web-1", 10);
        let with = |daily: u32| pruning("nightly", &format!("keep_daily = {daily}"));
        stage.run(&with(10)).await;
        stage.days(instance_of(&stage), (10..15).rev());
        stage.world.set_skew(skew);
        let raised = stage.run(&with(15)).await;
        assert_eq!(deleted(&raised), 0, "{skew}");
        stage.world.set_skew(SignedDuration::ZERO);
        stage.step(SignedDuration::from_hours(24));
        let reverted = stage.run(&with(10)).await;
        assert_eq!((deleted(&reverted), stage.there().len()), (0, 15), "{skew}");
        assert!(pending(&reverted).contains("keep_daily was 15, is 10"), "{skew}: {}", pending(&reverted));
        stage.step(SignedDuration::from_hours(20));
        assert_eq!(deleted(&stage.run(&with(10)).await), 5, "{skew}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_while_a_run_goes_on_makes_no_change_look_older() {
    let stage = Stage::new();
    stage.instance("web-1", 11);
    stage.run(&pruning("nightly", "keep_daily = 14")).await;
    let mistyped = pruning("nightly", "keep_daily = 1\nkeep_oldest = false");
    // A run begins by a clock that is a year behind, cannot reach the platform, and finds the right time when it can.
    let year = SignedDuration::from_hours(9000);
    stage.world.set_skew(year);
    for call in [Call::ListSnapshots, Call::ListInstances] {
        stage.world.fault(Fault::on(call, Effect::Unreachable).times(1));
    }
    let set = async {
        stage.seams.clock.sleep(Duration::from_millis(1)).await;
        stage.step(year);
        stage.world.set_skew(SignedDuration::ZERO);
    };
    let (first, ()) = join(stage.run(&mistyped), set).await;
    assert!(pending(&first).contains("keep_daily was 14, is 1"), "{}", pending(&first));
    for _ in 0..2 {
        stage.step(SignedDuration::from_hours(9));
        assert_eq!(deleted(&stage.run(&mistyped).await), 0);
    }
    stage.step(SignedDuration::from_hours(2));
    assert_eq!(deleted(&stage.run(&mistyped).await), 10);
}

#[tokio::test(start_paused = true)]
async fn what_was_kept_in_the_meantime_alone_is_not_deleted_at_once() {
    let stage = Stage::new();
    stage.instance("web-1", 10);
    let with = |daily: u32| pruning("nightly", &format!("keep_daily = {daily}"));
    let gitops = with(10);
    stage.run(&gitops).await;
    stage.step(SignedDuration::from_hours(1));
    // An operator needs five more, and the next day's synchronisation takes that back before it has settled.
    stage.run(&with(15)).await;
    stage.days(instance_of(&stage), (10..15).rev());
    let [raised, reverted] = [stage.run(&with(15)).await, stage.run(&gitops).await];
    assert_eq!((deleted(&raised), deleted(&reverted), stage.there().len()), (0, 0, 15));
    let text = pending(&reverted);
    for part in ["5 snapshots", "keep_daily was 15, is 10", "2026-11-02T09:00:00Z", "allow nightly 5"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    stage.step(SignedDuration::from_hours(19));
    assert_eq!(deleted(&stage.run(&gitops).await), 0);
    stage.step(SignedDuration::from_hours(1));
    assert_eq!(deleted(&stage.run(&gitops).await), 5);
}

#[tokio::test(start_paused = true)]
async fn the_most_templates_that_were_kept_in_the_meantime_stay_for_now() {
    let stage = Stage::new();
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    let keep = |number: u32| PROMOTING.replace("keep = 4", &format!("keep = {number}"));
    promote_daily(&stage, 2, instance, &keep(2)).await;
    promote_daily(&stage, 1, instance, &keep(4)).await;
    stage.run(&keep(2)).await;
    assert_eq!(templates(&stage).len(), 3);
    stage.step(SignedDuration::from_hours(20));
    stage.run(&keep(2)).await;
    assert_eq!(templates(&stage).len(), 2);
}

#[tokio::test(start_paused = true)]
async fn an_allowance_counts_for_what_is_pending_alone_and_accepts_the_changes() {
    let stage = Stage::new();
    stage.instance("web-1", 20);
    stage.run(&pruning("nightly", "keep_last = 13")).await;
    let edited = pruning("nightly", "keep_last = 8");
    stage.days(instance_of(&stage), (20..32).rev());
    // Twelve ordinary deletions, and five that the edit brought about.
    for (allowed, expected) in [(None, 12), (Some(4), 0), (Some(5), 5)] {
        if let Some(allowed) = allowed {
            allow(&stage, "nightly", allowed).await;
        }
        let report = stage.run(&edited).await;
        assert_eq!(deleted(&report), expected, "{allowed:?}");
        assert_eq!(report.zones[0].pending.is_none(), expected == 5);
    }
    assert_eq!(stage.there().len(), 8);
    stage.days(instance_of(&stage), 0..1);
    assert_eq!(deleted(&stage.run(&edited).await), 1, "the change is accepted");
}

fn instance_of(stage: &Stage) -> InstanceId {
    stage.world.snapshots(&stage.zone)[0].instance_id.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_renamed_policy_inherits_what_the_one_before_it_kept() {
    for replacement in [pruning("daily", "keep_last = 3"), pruning("cleanup", "max_count = 3")] {
        let stage = Stage::new();
        stage.instance("web-1", 30);
        stage.run(&pruning("nightly", "keep_last = 30")).await;
        let report = stage.run(&replacement).await;
        assert_eq!(deleted(&report), 0);
        assert!(pending(&report).contains("policy nightly is gone"), "{}", pending(&report));
        stage.step(SignedDuration::from_hours(19));
        assert_eq!(deleted(&stage.run(&replacement).await), 0);
        stage.step(SignedDuration::from_hours(1));
        assert_eq!(deleted(&stage.run(&replacement).await), 27);
    }
}

/// Another policy runs in between, which does not need what the one that was renamed kept.
#[tokio::test(start_paused = true)]
async fn a_rare_policy_that_is_renamed_keeps_what_it_kept_though_others_have_run_for_weeks() {
    let stage = Stage::new();
    stage.instance("web-1", 30);
    let hourly = "[policies.hourly]\nzones = [\"ch-gva-2\"]\ncreate = true\n".to_owned();
    stage.run(&pruning("monthly", "keep_last = 30")).await;
    assert_eq!(stage.there().len(), 30);
    let renamed = pruning("archive", "keep_last = 3");
    for _ in 0..20 {
        stage.step(SignedDuration::from_hours(24));
        stage.run(&[hourly.clone(), renamed.clone()].concat()).await;
    }
    assert_eq!(stage.there().len(), 50);
    let both = [renamed, hourly].concat();
    let report = stage.run(&both).await;
    assert_eq!((deleted(&report), stage.there().len()), (20, 30), "what no rule kept");
    assert!(pending(&report).contains("policy monthly is gone"), "{}", pending(&report));
    stage.step(SignedDuration::from_hours(20));
    assert!(deleted(&stage.run(&both).await) > 0);
}

#[tokio::test(start_paused = true)]
async fn a_paused_policy_keeps_what_it_kept() {
    let stage = Stage::new();
    stage.instance("web-1", 39);
    let hourly = pruning("hourly", "keep_last = 1");
    let nightly = pruning("nightly", "keep_daily = 30");
    stage.run(&[hourly.clone(), nightly.clone()].concat()).await;
    assert_eq!(stage.there().len(), 30);
    let paused = [hourly, nightly.replace("]\nzones", "]\nenabled = false\nzones")].concat();
    for day in 0..40 {
        let report = stage.run(&paused).await;
        assert_eq!(stage.there().len(), 30, "day {day}: {:?}", report.zones);
        assert_eq!(report.zones[0].plan.as_ref().unwrap().blocked_by_paused, 29);
        stage.step(SignedDuration::from_hours(24));
    }
}

#[tokio::test(start_paused = true)]
async fn the_archive_of_a_paused_policy_is_read_and_what_was_copied_by_then_may_be_deleted() {
    let stage = Stage::new();
    stage.instance("web-1", 10);
    let offsite =
        "[policies.offsite]\nzones = [\"ch-gva-2\"]\n[policies.offsite.export]\narchives = [\"vault\"]\n";
    let prune = pruning("prune", "max_count = 3");
    assert_eq!(stage.run(&[offsite, &prune].concat()).await.result, RunResult::Success);
    let paused = offsite.replace("]\nzones", "]\nenabled = false\nzones");
    let report = stage.run(&[prune, paused].concat()).await;
    assert_eq!((report.result, deleted(&report)), (RunResult::Success, 7), "{:?}", report.zones);
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_loses_its_label_or_its_name_loses_no_snapshot_at_once() {
    let long = "[policies.long.select]\nlabels = { backup = \"long\" }\n";
    let glob = "[policies.long.select]\nlabels = { backup = \"*\" }\n";
    let unless = "[policies.long.select]\nexclude_labels = { lost = \"*\" }\n";
    let named = "[policies.long.select]\ninstances = [\"db-*\"]\n";
    let unmanaged = "[policies.long.select]\nmanaged = false\n";
    for select in [long, glob, unless, named, unmanaged] {
        let stage = Stage::new();
        let instance = stage.world.add_instance(&stage.zone, "db-1", &[("backup", "long")]);
        stage.days(instance, (0..14).rev());
        let both =
            [pruning("all", "keep_last = 5"), pruning("long", "keep_last = 14"), select.to_owned()].concat();
        assert_eq!(deleted(&stage.run(&both).await), 0);
        stage.world.rename_instance(instance, "web-9", &[("lost", "")]);
        stage.world.put_into_pool(instance);
        let report = stage.run(&both).await;
        assert_eq!(deleted(&report), 0, "{select}");
        assert!(pending(&report).contains("9 snapshots"), "{}", pending(&report));
        stage.step(SignedDuration::from_hours(20));
        assert_eq!(deleted(&stage.run(&both).await), 9);
    }
}

#[tokio::test(start_paused = true)]
async fn required_copies_are_required_of_a_policy_that_only_prunes() {
    let stage = Stage::new();
    stage.instance("web-1", 10);
    let offsite =
        "[policies.offsite]\nzones = [\"ch-gva-2\"]\n[policies.offsite.export]\narchives = [\"vault\"]\n";
    let both = [pruning("prune", "max_count = 3"), offsite.to_owned()].concat();
    let report = stage.run(&both).await;
    assert_eq!(deleted(&report), 0, "no image exists");
    assert_eq!(report.zones[0].plan.as_ref().unwrap().blocked_by_policy, 7);
}

#[tokio::test(start_paused = true)]
async fn a_weekly_export_lets_others_prune_until_it_has_missed_a_run() {
    let stage = Stage::new();
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    let weekly = "[policies.weekly]\nzones = [\"ch-gva-2\"]\nschedule = \"0 4 * * 0\"\n\
                  [policies.weekly.export]\narchives = [\"vault\"]\n";
    let both = [pruning("often", "keep_last = 6"), weekly.to_owned()].concat();
    let run_weekly = async || {
        let runner = stage.runner(&both);
        runner.run(&runner.policies[1], &RunOptions::default()).await.unwrap().result
    };
    // Every four hours for four weeks, from Sunday noon on; it is due on Sundays at four.
    for step in 0..168 {
        stage.world.add_snapshot(instance, stage.now());
        if matches!(step, 0 | 40 | 82 | 124 | 166) {
            if step == 82 {
                stage.world.fault(Fault::on(Call::ExportSnapshot, Effect::status(403, "no")));
            }
            let expected = if step == 82 { RunResult::Partial } else { RunResult::Success };
            assert_eq!(run_weekly().await, expected, "step {step}");
            stage.world.clear_faults();
        }
        let report = stage.run(&both).await;
        let expected = match step {
            0..82 => 6.min(step + 1),
            82..124 => step - 75,
            _ => 6,
        };
        assert_eq!(stage.there().len(), expected, "step {step}: {:?}", report.zones);
        stage.step(SignedDuration::from_hours(4));
    }
}

#[tokio::test(start_paused = true)]
async fn snapshots_that_fail_for_an_hour_are_not_deleted_for_their_age() {
    let stage = Stage::new();
    let ids = stage.instance("web-1", 60);
    let rules = pruning("nightly", "keep_last = 60\nfailed_after = \"2d\"");
    stage.run(&rules).await;
    for id in &ids[..58] {
        stage.world.set_state(*id, SnapshotState::Error);
    }
    let report = stage.run(&rules).await;
    assert_eq!((deleted(&report), stage.there().len()), (0, 60));
    for id in &ids[..58] {
        stage.world.set_state(*id, SnapshotState::Exported);
    }
    stage.step(SignedDuration::from_hours(72));
    assert_eq!((deleted(&stage.run(&rules).await), stage.there().len()), (0, 60));
}

#[tokio::test(start_paused = true)]
async fn an_empty_list_of_instances_deletes_nothing() {
    for list in [Some(serde_json::json!([])), None] {
        let stage = Stage::new();
        stage.instance("web-1", 8);
        stage.instance("db-1", 8);
        let rules = pruning("nightly", "keep_last = 5");
        let rules = format!("{rules}[policies.nightly.select]\norphans = \"apply\"\n");
        stage.world.fault(Fault::on(Call::ListInstances, Effect::Edit("/instances", list.clone())));
        let report = stage.run(&rules).await;
        assert_eq!((deleted(&report), report.result), (0, RunResult::Held), "{list:?}: {:?}", report.zones);
        assert!(
            report.zones[0].held.as_deref().unwrap().contains("2 of the 2 instances"),
            "{:?}",
            report.zones
        );
        stage.world.clear_faults();
        assert_eq!(deleted(&stage.run(&rules).await), 6);
    }
}

#[tokio::test(start_paused = true)]
async fn a_listing_without_anything_that_was_there_is_held_until_it_has_stayed_so() {
    for (instances, each) in [(1, 10), (5, 2), (2, 5)] {
        let stage = Stage::new();
        for number in 0..instances {
            stage.instance(&format!("web-{number}"), each);
        }
        let rules = pruning("nightly", "keep_last = 20");
        stage.run(&rules).await;
        let all = stage.there();
        stage.world.fault(Fault::on(Call::ListSnapshots, Effect::Edit("/snapshots", None)));
        assert_eq!(stage.run(&rules).await.result, RunResult::Held, "{instances} times {each}");
        stage.world.clear_faults();
        assert_eq!(stage.run(&rules).await.result, RunResult::Success);
        // They are really gone.
        for id in all {
            stage.world.remove_snapshot(id);
        }
        assert_eq!(stage.run(&rules).await.result, RunResult::Held);
        stage.step(SignedDuration::from_hours(19));
        assert_eq!(stage.run(&rules).await.result, RunResult::Held);
        stage.step(SignedDuration::from_hours(1));
        assert_eq!(stage.run(&rules).await.result, RunResult::Success);
    }
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_lost_all_its_snapshots_is_held_alone() {
    let stage = Stage::new();
    let lost = stage.instance("web-1", 3);
    stage.instance("db-1", 20);
    let keep = pruning("nightly", "keep_last = 20");
    stage.run(&keep).await;
    let web = stage.world.snapshots(&stage.zone).into_iter().find(|one| one.id == lost[0]).unwrap();
    for id in lost {
        stage.world.remove_snapshot(id);
    }
    stage.days(web.instance_id.unwrap(), [0, 0, 0].into_iter());
    let prune = pruning("nightly", "keep_last = 2").replace("max_delete", "settle = \"0s\"\nmax_delete");
    let report = stage.run_with(&prune, &RunOptions::default()).await;
    assert_eq!(report.result, RunResult::Held);
    assert!(
        report.zones[0].held.as_deref().unwrap().starts_with("instance web-1: none"),
        "{:?}",
        report.zones
    );
    assert_eq!(deleted(&report), 18, "those of db-1");
    allow(&stage, "nightly", 9).await;
    stage.run(&prune).await;
    assert_eq!(deleted(&stage.run(&prune).await), 1, "allowed, and deleted by the next run");
}

#[tokio::test(start_paused = true)]
async fn a_limited_run_is_not_held_for_an_instance_that_it_is_not_about() {
    let stage = Stage::new();
    let lost = stage.instance("web-1", 3);
    stage.instance("db-1", 3);
    let keep = pruning("nightly", "keep_last = 20");
    stage.run(&keep).await;
    let web = stage.world.snapshots(&stage.zone).into_iter().find(|one| one.id == lost[0]).unwrap();
    for id in lost {
        stage.world.remove_snapshot(id);
    }
    stage.days(web.instance_id.unwrap(), 0..1);
    for (only, expected) in
        [("db-1", RunResult::Success), ("web-1", RunResult::Held), ("*-1", RunResult::Held)]
    {
        let options = RunOptions { instances: Some(Pattern::new(only).unwrap()), ..RunOptions::default() };
        let report = stage.run_with(&keep, &options).await;
        assert_eq!(report.result, expected, "{only}: {:?}", report.zones);
    }
}

/// Every run makes a template.
const PROMOTING: &str = "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.promote]\n\
                         name = \"{instance}-{created:%Y%m%d}\"\nkeep = 4\n";

async fn promote_daily(stage: &Stage, days: usize, instance: InstanceId, policy: &str) -> RunReport {
    let mut report = None;
    for _ in 0..days {
        stage.world.add_snapshot(instance, stage.now());
        report = Some(stage.run(policy).await);
        stage.step(SignedDuration::from_hours(24));
    }
    report.unwrap()
}

fn templates(stage: &Stage) -> Vec<String> {
    stage.world.templates(&stage.zone).into_iter().map(|made| made.name).collect()
}

#[tokio::test(start_paused = true)]
async fn a_template_that_an_instance_runs_on_or_whose_snapshot_is_on_hold_stays() {
    let stage = Stage::new();
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    let one = PROMOTING.replace("keep = 4", "keep = 1");
    promote_daily(&stage, 1, instance, &one).await;
    stage.world.set_template(instance, stage.world.templates(&stage.zone)[0].id);
    promote_daily(&stage, 1, instance, &one).await;
    let second = stage.world.snapshots(&stage.zone)[1].id;
    let directory = StateDirectory::open(stage.seams.disk.clone(), &stage.state()).unwrap();
    let hold = Hold { snapshot: second, until: None, reason: None, since: stage.now(), about: None };
    directory.hold(&stage.clock, hold).await.unwrap();
    let report = promote_daily(&stage, 2, instance, &one).await;
    assert_eq!(templates(&stage), ["web-1-20261101", "web-1-20261102", "web-1-20261104"]);
    let steps = steps(&report, Action::DeleteTemplate);
    let why: Vec<_> = steps.iter().filter_map(|step| step.message.as_deref()).collect();
    assert_eq!(why, ["instance web-1 runs on it", "its snapshot is on hold"]);
}

#[tokio::test(start_paused = true)]
async fn a_mistyped_number_of_templates_has_to_settle() {
    let stage = Stage::new();
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    promote_daily(&stage, 4, instance, PROMOTING).await;
    let mistyped = PROMOTING.replace("keep = 4", "keep = 1");
    let report = stage.run(&mistyped).await;
    assert_eq!(templates(&stage).len(), 4);
    let expected = "3 templates are kept only because a change has not settled (`settle`): keep = 1";
    assert!(pending(&report).contains(expected), "{}", pending(&report));
    stage.step(SignedDuration::from_hours(20));
    let report = stage.run(&mistyped).await;
    assert_eq!((templates(&stage), &report.zones[0].pending), (vec!["web-1-20261104".to_owned()], &None));
}

/// Also of a policy that deletes no snapshots.
#[tokio::test(start_paused = true)]
async fn no_template_is_deleted_by_a_wrong_clock_or_a_listing_that_lost_much() {
    let one = PROMOTING.replace("keep = 4", "keep = 1");
    let stage = Stage::new();
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    promote_daily(&stage, 4, instance, PROMOTING).await;
    stage.run(&one).await;
    stage.step(SignedDuration::from_hours(21));
    stage.world.set_skew(SignedDuration::from_hours(-9000));
    let report = stage.run(&one).await;
    let failures = &report.zones[0].failures;
    assert!(failures.iter().any(|text| text.contains("no template is deleted")), "{failures:?}");
    assert_eq!(templates(&stage).len(), 4);
    stage.world.set_skew(SignedDuration::ZERO);

    // What runs on a template is not listed.
    let lost = Effect::Edit("/instances", Some(serde_json::json!([])));
    stage.world.fault(Fault::on(Call::ListInstances, lost));
    let report = stage.run(&one).await;
    assert!(report.zones[0].held.is_some(), "{:?}", report.zones);
    assert_eq!(templates(&stage).len(), 4);
    stage.world.clear_faults();
    let report = stage.run(&one).await;
    assert_eq!((report.zones[0].held.as_ref(), templates(&stage).len()), (None, 1), "{:?}", report.zones);
}

#[tokio::test(start_paused = true)]
async fn an_allowance_of_long_ago_lets_nothing_pass() {
    for (schedule, days, is_valid) in
        [("0 0 * * *", 7, true), ("0 0 * * *", 8, false), ("0 0 1 * *", 29, true), ("0 0 1 * *", 31, false)]
    {
        let stage = Stage::new();
        stage.instance("web-1", 20);
        let rules = pruning("nightly", "max_age = \"300d\"\nmax_count = 5")
            .replace("max_delete", "max_deletes = 1\nmax_delete")
            .replace("]\nzones", &format!("]\nschedule = \"{schedule}\"\nzones"));
        allow(&stage, "nightly", 15).await;
        stage.step(SignedDuration::from_hours(24 * days));
        let report = stage.run(&rules).await;
        assert_eq!(deleted(&report) == 15, is_valid, "{schedule} after {days} days: {:?}", report.zones);
    }
}

#[tokio::test(start_paused = true)]
async fn deletions_that_change_nothing_and_re_reads_that_lack_something_are_blocked() {
    let body = "{\"id\":\"00000000-0000-4000-8000-000000000001\",\"state\":\"success\"}".to_owned();
    let success = Effect::Answer { status: StatusCode::OK, content_type: "application/json", body };
    for (call, effect) in [
        (Call::DeleteSnapshot, success),
        (Call::GetSnapshot, Effect::Edit("/name", None)),
        (Call::GetSnapshot, Effect::Edit("/instance", None)),
    ] {
        let stage = Stage::new();
        stage.instance("web-1", 8);
        stage.world.fault(Fault::on(call, effect));
        let report = stage.run(&pruning("nightly", "keep_last = 5")).await;
        assert_eq!(deleted(&report), 0, "{call:?}: {:?}", report.zones);
        assert_eq!(ended(&report, Action::Delete, StepOutcome::Blocked), 3, "{call:?}: {:?}", report.zones);
        assert_eq!(stage.there().len(), 8);
    }
}
