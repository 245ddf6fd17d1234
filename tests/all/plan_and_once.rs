//! `plan` and `once` over the same random zone: the run takes, exports and deletes what the plan said beforehand.
//!
//! `SNAPWARDEN_SEEDS=1000` plays more of them, `SNAPWARDEN_SEED=7` plays one of them again.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::SignedDuration;
use snapwarden::disk::{Access, Disk as _};
use snapwarden::policy::select::Pattern;
use snapwarden::retention::verdict::Verdict;
use snapwarden::run::context::RunOptions;
use snapwarden::run::list::ListingCache;
use snapwarden::run::preview::Preview;
use snapwarden::run::report::{RunReport, RunResult, Step};
use snapwarden::sim::disk::MemoryDisk;
use snapwarden::sim::randomness::SeededRandomness;
use snapwarden::snapshot::{InstanceId, SnapshotId, SnapshotState};
use snapwarden::state::allowances::{Allowance, AllowanceOf};
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::holds::Hold;
use snapwarden::state::last_runs::LastRuns;

use crate::crashes::{Dice, Repeat, TINY};
use crate::stage::{NIGHTLY, Stage, ended, steps};

/// How many zones are played by default.
const SEEDS: u64 = 60;

/// Those that found something: the guard of a plan did not count what the run would take first.
const FOUND: [u64; 1] = [612];

/// What a run does, and what of it a plan can know.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changes {
    /// The instances of which a snapshot is taken.
    taken: BTreeSet<InstanceId>,
    /// Those that are there already; or else the instance.
    exported: BTreeSet<(Option<SnapshotId>, Option<InstanceId>)>,
    deleted: BTreeSet<SnapshotId>,
    is_held: bool,
    is_pending: bool,
}

fn planned(preview: &Preview) -> Changes {
    let mut changes = Changes {
        is_held: preview.held.is_some(),
        is_pending: preview.pending.is_some(),
        ..Changes::default()
    };
    let coming = &preview.listing.inventory.coming;
    for decision in &preview.plan.decisions {
        let snapshot = &preview.listing.inventory.snapshots[decision.index as usize];
        if coming.contains(&snapshot.id) {
            changes.taken.extend(snapshot.instance_id);
        } else if decision.verdict == Verdict::Delete && !changes.is_held {
            changes.deleted.insert(snapshot.id);
        }
    }
    for action in preview.actions.iter().filter(|action| action.action == Action::Export) {
        let instance = action.snapshot.instance_id.filter(|_| action.snapshot.id.is_none());
        changes.exported.insert((action.snapshot.id, instance));
    }
    changes
}

fn done(report: &RunReport) -> Changes {
    let zone = &report.zones[0];
    let mut changes =
        Changes { is_held: zone.held.is_some(), is_pending: zone.pending.is_some(), ..Changes::default() };
    let mut new = BTreeSet::new();
    for step in zone.steps.iter().filter(|step| step.outcome == StepOutcome::Done) {
        let snapshot = &step.facts.snapshot;
        match step.facts.action {
            Action::Create => {
                new.extend(snapshot.id);
                changes.taken.extend(snapshot.instance_id);
            }
            Action::Export => {
                let is_new = snapshot.id.is_some_and(|id| new.contains(&id));
                let instance = snapshot.instance_id.filter(|_| is_new);
                changes.exported.insert((snapshot.id.filter(|_| !is_new), instance));
            }
            Action::Delete => changes.deleted.extend(snapshot.id),
            _ => {}
        }
    }
    changes
}

fn retention(dice: &Dice) -> String {
    let mut rules = Vec::new();
    let count = |most: u64| 1 + dice.below(most);
    for (key, most) in [("keep_last", 6), ("keep_daily", 8), ("keep_weekly", 3), ("max_count", 9)] {
        if dice.one_in(2) {
            rules.push(format!("{key} = {}", count(most)));
        }
    }
    if rules.is_empty() || dice.one_in(3) {
        rules.push(format!("max_age = \"{}d\"", count(20)));
    }
    if dice.one_in(3) {
        rules.push(format!("min_keep = {}", count(4)));
    }
    rules.join("\n")
}

/// A policy that may take snapshots, export and prune.
fn policy(name: &str, dice: &Dice, is_pruning: bool) -> String {
    let create = if dice.one_in(2) { "create = true\n" } else { "" };
    let mut ownership = format!("ownership = \"{}\"\n", dice.any(&["all", "created"]));
    if create.is_empty() {
        ownership.clear();
    }
    let instances = dice.any(&["[\"*\"]", "[\"a-*\"]", "[\"a-*\", \"b-*\"]"]);
    let retention = if is_pruning {
        format!("[policies.{name}.retention]\n{}\n", retention(dice))
    } else {
        String::new()
    };
    let percent = dice.any(&[30, 60, 100]);
    let max_deletes = if dice.one_in(4) { "max_deletes = 5\n" } else { "" };
    let expect_newest = if dice.one_in(4) { "expect_newest = \"36h\"\n" } else { "" };
    let export = if dice.one_in(2) {
        format!(
            "[policies.{name}.export]\narchives = [\"vault\"]\nsnapshots = \"{}\"\nrequired = {}\n",
            dice.any(&["newest", "all"]),
            dice.below(3) > 0
        )
    } else {
        String::new()
    };
    format!(
        "[policies.{name}]\nzones = [\"ch-gva-2\"]\nschedule = \"30 2 * * *\"\n{create}\
         [policies.{name}.select]\ninstances = {instances}\n{ownership}{retention}\
         [policies.{name}.guard]\nmax_delete_percent = {percent}\n{max_deletes}{expect_newest}{export}"
    )
}

fn furnish(stage: &Stage, dice: &Dice) {
    for name in ["a-1", "a-2", "b-1"].iter().take(1 + usize::try_from(dice.below(3)).unwrap()) {
        let instance = stage.world.add_instance(&stage.zone, name, &[]);
        stage.world.set_disk(instance, TINY);
        for _ in 0..dice.below(14) {
            let age = SignedDuration::from_mins(i64::try_from(dice.below(40 * 24 * 60)).unwrap() + 90);
            let snapshot = stage.world.add_snapshot(instance, stage.now() - age);
            if dice.one_in(12) {
                stage.world.set_state(snapshot, SnapshotState::Error);
            }
        }
        if dice.one_in(6) {
            // Dated ahead, as by a clock that differs a little.
            stage.world.add_snapshot(instance, stage.now() + SignedDuration::from_mins(3));
        }
    }
}

async fn one_zone(seed: u64) {
    let _repeat = Repeat(seed);
    let dice = Dice(SeededRandomness::new(seed));
    let disk = MemoryDisk::new();
    let stage = Stage::over(Arc::new(disk.clone()));
    disk.create_dir_all(stage.folder.path(), Access::Owner).unwrap();
    furnish(&stage, &dice);
    let other = policy("other", &dice, dice.one_in(2));
    let mut policies = format!("{}{other}", policy("main", &dice, true));
    // Some zones have a past: runs, another configuration, holds.
    for _ in 0..dice.below(3) {
        let runner = stage.runner(&policies);
        for policy in &runner.policies {
            runner.run(policy, &RunOptions::default()).await.unwrap();
        }
        stage.step(SignedDuration::from_hours(i64::try_from(1 + dice.below(50)).unwrap()));
        if dice.one_in(2) {
            policies = format!("{}{other}", policy("main", &dice, true));
        }
    }
    let runner = stage.runner(&policies);
    for snapshot in stage.there() {
        if dice.one_in(15) {
            let hold = Hold { snapshot, since: stage.now(), until: None, reason: None, about: None };
            runner.state.hold(&stage.clock, hold).await.unwrap();
        }
    }
    let main = &runner.policies[0];
    assert_eq!(main.name.as_str(), "main");
    let preview = runner.preview(&ListingCache::default(), main, None).await.remove(0).1.unwrap();
    let planned = planned(&preview);
    let report = runner.run(main, &RunOptions::default()).await.unwrap();
    let context = format!("seed {seed}\n{policies}\n{:#?}", report.zones[0].steps);
    // An instance may be without a snapshot, and a pattern may match none: that is partial.
    let zone = &report.zones[0];
    let lacks = zone.missing.is_some() || zone.unmatched.is_some();
    let is_as_it_should_be = match report.result {
        RunResult::Success | RunResult::Held => true,
        RunResult::Partial => lacks && report.sums().failed == 0,
        RunResult::Failed => false,
    };
    assert!(is_as_it_should_be, "{context}");
    assert_eq!(planned, done(&report), "left: the plan, right: the run; {context}");
}

#[test]
fn a_run_does_what_its_plan_said() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds: Vec<u64> = match number("SNAPWARDEN_SEED") {
        Some(seed) => vec![seed],
        None => FOUND.into_iter().chain(0..number("SNAPWARDEN_SEEDS").unwrap_or(SEEDS)).collect(),
    };
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build().unwrap();
    for seed in seeds {
        runtime.block_on(one_zone(seed));
    }
}

#[tokio::test(start_paused = true)]
async fn a_plan_names_the_templates_that_the_run_deletes() {
    let stage = Stage::new();
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    let policy = NIGHTLY
        .replace("[policies.nightly.export]\narchives = [\"vault\"]\n", "")
        .replace("keep = 2", "keep = 1");
    let mut deleted = Vec::new();
    for day in 0..4 {
        stage.world.add_snapshot(instance, stage.now());
        let runner = stage.runner(&policy);
        let preview = runner.preview(&ListingCache::default(), &runner.policies[0], None).await;
        let preview = preview.into_iter().next().unwrap().1.unwrap();
        let planned: Vec<_> =
            preview.templates.iter().map(|one| (one.facts.template_id, &one.needed)).collect();
        let report = stage.run(&policy).await;
        let steps = steps(&report, Action::DeleteTemplate);
        let done: Vec<_> = steps.iter().map(|step| (step.facts.template_id, &step.message)).collect();
        assert_eq!(planned, done, "day {day}");
        deleted.extend(preview.templates.into_iter().map(|one| (one.name, one.needed)));
        if day == 1 {
            let templates = stage.world.templates(&stage.zone);
            stage.world.set_template(instance, templates[0].id);
        }
        stage.step(SignedDuration::from_hours(24));
    }
    let names: Vec<&str> = deleted.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["web-1-20261101", "web-1-20261102", "web-1-20261102", "web-1-20261103"]);
    let stay: Vec<bool> = deleted.iter().map(|(_, needed)| needed.is_some()).collect();
    assert_eq!(stay, [false, true, true, false], "{deleted:?}");
}

fn limited_to(pattern: &str) -> RunOptions {
    RunOptions { instances: Some(Pattern::new(pattern).unwrap()), ..RunOptions::default() }
}

#[tokio::test(start_paused = true)]
async fn a_run_that_is_limited_to_an_instance_leaves_the_others_and_what_is_remembered_alone() {
    let (stage, [web, db]) = Stage::two_by_twenty();
    let policies = NIGHTLY.replace("zones = [", "create = true\nselect.ownership = \"all\"\nzones = [");
    stage.step(SignedDuration::from_hours(1));
    let runner = stage.runner(&policies);
    let policy = "nightly".parse().unwrap();
    let given_at = stage.now();
    let of = AllowanceOf::Policy(policy);
    let allowance = Allowance { of: of.clone(), zone: None, deletes: 40, given_at, ends_at: None };
    runner.state.allow(&stage.clock, allowance).await.unwrap();
    let report = stage.run_with(&policies, &limited_to("web-*")).await;
    assert_eq!(report.result.as_str(), "success", "{report:?}");
    for action in [Action::Create, Action::Export, Action::Promote, Action::Delete] {
        assert!(ended(&report, action, StepOutcome::Done) > 0, "{action:?}: {report:?}");
    }
    let of_web = |step: &Step| step.facts.snapshot.instance_name.as_deref() == Some("web-1");
    assert!(report.zones[0].steps.iter().all(of_web), "{report:?}");
    assert_eq!(report.zones[0].instances.len(), 1);
    let there = stage.there();
    assert!(db.iter().all(|id| there.contains(id)), "nothing of the other");
    assert_eq!(there.iter().filter(|id| !db.contains(id)).count(), 10, "{web:?}");
    assert_eq!(runner.state.last_runs(&"nightly".parse().unwrap()).await.unwrap(), LastRuns::default());
    assert_eq!(runner.state.allowances(&of).await.unwrap().len(), 1);

    let whole = stage.run(&policies).await;
    let deleted = steps(&whole, Action::Delete).into_iter();
    let deleted = deleted.filter(|step| db.contains(&step.facts.snapshot.id.unwrap()));
    assert_eq!(deleted.count(), 11, "{whole:?}");
}

#[tokio::test(start_paused = true)]
async fn a_limited_run_is_held_by_the_guard_of_the_whole_plan_and_tells_of_its_own_alone() {
    let (stage, _) = Stage::two_by_twenty();
    let policies = "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.retention]\nmax_count = 10\n\
                    [policies.nightly.guard]\nmax_deletes = 15\n";
    let held = stage.run_with(policies, &limited_to("db-1")).await;
    assert_eq!((held.result.as_str(), stage.there().len()), ("held", 40), "20 deletions are planned");
    assert_eq!(held.zones[0].plan.as_ref().unwrap().delete, 10);
    stage.world.add_instance(&stage.zone, "new-1", &[]);
    let none = stage.run_with(policies, &limited_to("new-1")).await;
    assert_eq!(none.result.as_str(), "success", "nothing of it is held: {none:?}");
    let nothing = stage.run_with(policies, &limited_to("cache-*")).await;
    assert!(nothing.zones[0].instances.is_empty() && nothing.zones[0].steps.is_empty(), "{nothing:?}");
}
