//! Snapshots that can't be taken: while a newer one of an instance is missing, none of that instance is deleted.

use std::io::ErrorKind;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use snapwarden::disk::{Access, Disk as _};
use snapwarden::run::context::RunOptions;
use snapwarden::run::list::ListingCache;
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::sim::call::Call;
use snapwarden::sim::disk::{DiskCall, MemoryDisk};
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::snapshot::{InstanceId, SnapshotState};
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::directory::StateDirectory;
use snapwarden::state::schedules::{Schedules, Served};

use crate::archives::said;
use crate::command_line::write;
use crate::stage::{Stage, ended, paths};

const DAY: SignedDuration = SignedDuration::from_hours(24);

const NIGHTLY: &str = r#"
[policies.nightly]
zones = ["ch-gva-2"]
create = true
[policies.nightly.select]
ownership = "all"
[policies.nightly.retention]
keep_within = "14d"
[policies.nightly.guard]
max_delete_percent = 100
"#;

/// Another policy, which prunes and takes nothing.
const PRUNE: &str = r#"
[policies.prune]
zones = ["ch-gva-2"]
[policies.prune.retention]
keep_last = 3
[policies.prune.guard]
max_delete_percent = 100
"#;

fn forbid(stage: &Stage) {
    let forbidden = Effect::status(403, "Forbidden by role policy for compute");
    stage.world.fault(Fault::on(Call::CreateSnapshot, forbidden));
}

async fn run(stage: &Stage, policies: &str, name: &str) -> RunReport {
    let runner = stage.runner(policies);
    let policy = runner.policies.iter().find(|policy| policy.name.as_str() == name).unwrap();
    runner.run(policy, &RunOptions::default()).await.unwrap()
}

fn deleted(report: &RunReport) -> usize {
    ended(report, Action::Delete, StepOutcome::Done)
}

#[tokio::test(start_paused = true)]
async fn creates_that_fail_for_weeks_delete_nothing() {
    let (stage, _) = Stage::two_by_twenty();
    stage.step(SignedDuration::from_hours(1));
    run(&stage, NIGHTLY, "nightly").await;
    let before = stage.there().len();
    forbid(&stage);
    for day in 0..40 {
        stage.step(DAY);
        let report = run(&stage, NIGHTLY, "nightly").await;
        assert_eq!((deleted(&report), stage.there().len()), (0, before), "day {day}");
        assert_eq!(report.result, RunResult::Partial);
        let plan = report.zones[0].plan.as_ref().unwrap();
        if day > 1 {
            assert!(plan.blocked_by_source > 0, "day {day}: {plan:?}");
            let pending = report.zones[0].pending.clone().unwrap();
            assert!(pending.contains("policy nightly could not take its snapshot of 2026-"), "{pending}");
            assert!(pending.contains("403") && pending.contains("snapwarden allow nightly"), "{pending}");
        }
    }
    // It works again: from then on the rules apply.
    stage.world.clear_faults();
    stage.step(DAY);
    let report = run(&stage, NIGHTLY, "nightly").await;
    assert_eq!(report.result, RunResult::Success, "{:?}", report.zones);
    assert!(deleted(&report) > 0);
}

/// What a policy that keeps all for two weeks stores in an archive that does so as well.
const ARCHIVED: &str = r#"
[policies.nightly.export]
archives = ["vault"]
snapshots = "all"
[archives.vault.retention]
keep_within = "14d"
[archives.vault.guard]
max_delete_percent = 100
"#;

/// How many copies of an instance there are.
fn copies(stage: &Stage, id: InstanceId) -> usize {
    let all = paths(&stage.archive().join("ch-gva-2").join(id.to_string()));
    all.iter().filter(|path| path.extension().is_some_and(|end| end == "qcow2")).count()
}

/// Nightly snapshots of two instances with copies in an archive, of which those of the second fail from now on.
async fn one_of_two_fails(policies: &str) -> (Stage, InstanceId, InstanceId) {
    let stage = Stage::new();
    let [web, db] = ["web-1", "db-1"].map(|name| stage.world.add_instance(&stage.zone, name, &[]));
    stage.days(web, (1..13).rev());
    stage.days(db, (1..13).rev());
    run(&stage, policies, "nightly").await;
    assert_eq!((copies(&stage, web), copies(&stage, db)), (13, 13));
    let forbidden = Effect::status(403, "Forbidden by role policy for compute");
    stage.world.fault(Fault::on(Call::CreateSnapshot, forbidden).of(db.0));
    (stage, web, db)
}

#[tokio::test(start_paused = true)]
async fn copies_of_an_instance_stay_while_its_snapshots_fail() {
    let policies = format!("{NIGHTLY}{ARCHIVED}");
    let (stage, web, db) = one_of_two_fails(&policies).await;
    for day in 0..20 {
        stage.step(DAY);
        let report = run(&stage, &policies, "nightly").await;
        assert_eq!((copies(&stage, db), report.result), (13, RunResult::Partial), "day {day}");
        assert!(copies(&stage, web) <= 15, "day {day}");
        if day > 3 {
            let pending = report.zones[0].pending.clone().unwrap();
            let (_, of_copies) = pending.split_once("archive vault: ").unwrap();
            for part in [
                "kept only because a newer copy",
                "policy nightly could not take its snapshot of 2026-",
                "403",
            ] {
                assert!(of_copies.contains(part), "{part}: {pending}");
            }
        }
    }
    stage.world.clear_faults();
    stage.step(DAY);
    run(&stage, &policies, "nightly").await;
    assert_eq!(copies(&stage, db), 1, "by the rules again");
}

#[tokio::test(start_paused = true)]
async fn to_let_copies_pass_that_wait_for_a_newer_one_accepts_no_edit_of_the_archives_rules() {
    let policies = format!("{NIGHTLY}{ARCHIVED}");
    let stage = Stage::new();
    let db = stage.world.add_instance(&stage.zone, "db-1", &[]);
    stage.days(db, (1..13).rev());
    run(&stage, &policies, "nightly").await;
    let forbidden = Effect::status(403, "Forbidden by role policy for compute");
    stage.world.fault(Fault::on(Call::CreateSnapshot, forbidden).of(db.0));
    stage.world.add_instance(&stage.zone, "web-1", &[]);
    for _ in 0..5 {
        stage.step(DAY);
        run(&stage, &policies, "nightly").await;
    }
    // By the rules before, three would be deleted but for the missing ones; by the new ones eleven, of which nothing is said.
    let (before, archive) = policies.split_once("[archives.vault.retention]").unwrap();
    let edited = format!("{before}[archives.vault.retention]{}", archive.replace("14d", "7d"));
    stage.step(SignedDuration::from_hours(1));
    run(&stage, &edited, "nightly").await;
    assert_eq!(copies(&stage, db), 13);
    assert_eq!(said(&stage, &edited, &["allow", "--archive", "vault", "100"]).status, 0);
    stage.step(SignedDuration::from_hours(1));
    let report = run(&stage, &edited, "nightly").await;
    let pending = report.zones[0].pending.clone().unwrap_or_default();
    assert_eq!(copies(&stage, db), 13, "{pending}");
    assert!(pending.contains("keep_within was 14d, is 7d"), "{pending}");
}

#[tokio::test(start_paused = true)]
async fn copies_that_wait_for_a_policy_that_is_taken_away_wait_until_that_has_settled() {
    let other = NIGHTLY.replace("nightly", "web").replace("ownership = \"all\"", "instances = [\"web-1\"]");
    let stored = ARCHIVED.replace("nightly", "web");
    let alone = format!("{other}{stored}");
    let (nightly, _) = ARCHIVED.split_once("[archives").unwrap();
    let both = format!("{NIGHTLY}{nightly}{alone}");
    let (stage, _, db) = one_of_two_fails(&both).await;
    for _ in 0..10 {
        stage.step(DAY);
        run(&stage, &both, "nightly").await;
    }
    stage.step(SignedDuration::from_hours(1));
    let report = run(&stage, &alone, "web").await;
    assert_eq!(copies(&stage, db), 13);
    let pending = report.zones[0].pending.clone().unwrap_or_default();
    let (_, of_copies) = pending.split_once("archive vault: ").unwrap();
    assert!(of_copies.contains("policy nightly is gone"), "{pending}");
    stage.step(DAY);
    run(&stage, &alone, "web").await;
    assert!(copies(&stage, db) < 13);
}

fn state_directory(stage: &Stage) -> StateDirectory {
    StateDirectory::open(stage.seams.disk.clone(), &stage.state()).unwrap()
}

/// What a daemon remembers of `nightly`, relative to the moment at which that was due last.
#[derive(Default)]
struct Known {
    served: SignedDuration,
    begun: Option<SignedDuration>,
    missed: Option<SignedDuration>,
}

/// The daemon's run hangs, or was missed: nobody has tried to take what was due.
#[tokio::test(start_paused = true)]
async fn a_policy_that_a_daemon_has_not_run_when_it_was_due_keeps_others_from_deleting() {
    let scheduled =
        NIGHTLY.replace("create = true", "create = true\nschedule = \"30 2 * * *\"\njitter = \"10m\"");
    let both = format!("{scheduled}{}", PRUNE.replace("keep_last = 3", "keep_within = \"7d\""));
    let hours = SignedDuration::from_hours;
    let known = |served| Known { served, ..Known::default() };
    for (case, known, has_daemon, expected) in [
        ("all was run", known(hours(0)), true, None),
        ("its loop hangs", known(-DAY), true, Some("has not begun")),
        ("it runs", Known { begun: Some(hours(0)), ..known(-DAY) }, true, Some("has not ended")),
        (
            "another time has passed meanwhile",
            Known { begun: Some(-DAY), ..known(-DAY * 2) },
            true,
            Some("has not ended"),
        ),
        ("it was asked for a moment ago", Known { begun: Some(hours(1)), ..known(hours(0)) }, true, None),
        (
            "it waits for the next one",
            Known { missed: Some(hours(0)), ..known(hours(0)) },
            true,
            Some("trigger nightly"),
        ),
        ("of a daemon that is not there any more", known(-DAY), false, None),
    ] {
        let (stage, _) = Stage::two_by_twenty();
        stage.step(DAY * 8);
        let slot: Timestamp = "2026-12-01T02:30:00Z".parse().unwrap();
        stage.step(slot.duration_since(stage.now()) + hours(2));
        let remembered = state_directory(&stage);
        let _lock = if has_daemon { Some(remembered.lock_daemon(&stage.clock).await.unwrap()) } else { None };
        let served = Served {
            first_seen_at: slot - DAY * 30,
            watermark: slot + known.served,
            begun: known.begun.map(|after| slot + after),
            missed: known.missed.map(|after| slot + after),
        };
        let policies = [("nightly".parse().unwrap(), served)].into();
        remembered.set_schedules(Schedules { policies, ..Schedules::default() }).await.unwrap();
        let report = run(&stage, &both, "prune").await;
        let pending = report.zones[0].pending.clone().unwrap_or_default();
        assert_eq!(deleted(&report) > 0, expected.is_none(), "{case}: {pending}");
        assert!(
            expected.is_none_or(|words| pending.contains("policy nightly") && pending.contains(words)),
            "{case}: {pending}"
        );
        // It does not wait for itself, and once it ran others do not, either.
        let report = run(&stage, &both, "nightly").await;
        assert!(ended(&report, Action::Create, StepOutcome::Done) > 0, "{case}: {:?}", report.zones);
        assert!(expected.is_none() || deleted(&report) > 0, "{case}: {:?}", report.zones);
        let report = run(&stage, &both, "prune").await;
        assert_eq!(report.zones[0].pending, None, "{case}");
    }
}

/// What is only needed in order to delete keeps no snapshot from being taken.
#[tokio::test(start_paused = true)]
async fn damaged_records_of_listings_and_schedules_keep_snapshots_and_none_from_being_taken() {
    for file in ["listed-ch-gva-2.json", "schedules.json"] {
        let (stage, _) = Stage::two_by_twenty();
        let scheduled = NIGHTLY.replace("create = true", "create = true\nschedule = \"30 2 * * *\"");
        let both = format!("{scheduled}{PRUNE}");
        run(&stage, &both, "nightly").await;
        let remembered = state_directory(&stage);
        let _lock = remembered.lock_daemon(&stage.clock).await.unwrap();
        remembered.set_schedules(Schedules::default()).await.unwrap();
        stage.step(DAY);
        assert!(paths(&stage.state()).contains(&stage.state().join(file)));
        write(&stage.state().join(file), "{");
        let report = run(&stage, &both, "prune").await;
        let pending = report.zones[0].pending.clone().unwrap_or_default();
        let is_known = file != "schedules.json";
        assert_eq!(deleted(&report) > 0, is_known, "{file}: {pending}");
        assert!(
            is_known || pending.contains("it is not known when it ran") && pending.contains(file),
            "{pending}"
        );
        let report = run(&stage, &both, "nightly").await;
        assert_eq!(ended(&report, Action::Create, StepOutcome::Done), 2, "{file}: {:?}", report.zones);
    }
}

/// By one listing without the instance, or its label, nothing is known to be taken.
#[tokio::test(start_paused = true)]
async fn that_a_snapshot_is_missing_outlasts_a_listing_without_the_instance() {
    let (stage, _) = Stage::two_by_twenty();
    let both = format!("{}{PRUNE}", NIGHTLY.replace("14d", "1d"));
    stage.step(SignedDuration::from_hours(1));
    forbid(&stage);
    run(&stage, &both, "nightly").await;
    stage.world.fault(Fault::on(Call::ListInstances, Effect::Edit("/instances/0", None)));
    run(&stage, &both, "nightly").await;
    stage.world.clear_faults();
    let report = run(&stage, &both, "prune").await;
    assert_eq!(deleted(&report), 0, "{:?}", report.zones);

    // It is deleted: once that has settled nothing waits for a snapshot of it any more.
    forbid(&stage);
    stage.world.fault(Fault::on(Call::ListInstances, Effect::Edit("/instances/0", None)));
    for (day, expected) in [(1, 2), (2, 2), (3, 1), (4, 1)] {
        run(&stage, &both, "nightly").await;
        let states = state_directory(&stage).all_policy_states().await.unwrap();
        assert_eq!(states.iter().map(|(_, state)| state.missing.len()).sum::<usize>(), expected, "day {day}");
        stage.step(DAY);
    }
}

#[tokio::test(start_paused = true)]
async fn no_other_policy_deletes_of_the_instance_either_and_allow_lets_it_pass() {
    let (stage, _) = Stage::two_by_twenty();
    let both = format!("{}{PRUNE}", NIGHTLY.replace("14d", "1d"));
    stage.step(SignedDuration::from_hours(1));
    forbid(&stage);
    run(&stage, &both, "nightly").await;
    stage.step(DAY);
    for _ in 0..3 {
        let report = run(&stage, &both, "prune").await;
        assert_eq!((report.result, deleted(&report)), (RunResult::Success, 0), "{:?}", report.zones);
        let plan = report.zones[0].plan.as_ref().unwrap();
        assert_eq!(plan.blocked_by_source, 34, "{plan:?}");
        assert!(report.zones[0].pending.is_some(), "so `once` exits with 3");
    }
    // `plan` says so beforehand.
    let runner = stage.runner(&both);
    let preview = runner.preview(&ListingCache::default(), &runner.policies[1], None).await;
    let preview = preview[0].1.as_ref().unwrap();
    let blocked = preview.plan.decisions.iter().filter(|one| one.blocked_by() == Some("source"));
    assert_eq!(blocked.count(), 34);
    assert!(preview.pending.as_ref().unwrap().contains("34"), "{:?}", preview.pending);

    let options = RunOptions { allow_deletes: Some(33), ..RunOptions::default() };
    let report = runner.run(&runner.policies[1], &options).await.unwrap();
    assert_eq!(deleted(&report), 0, "fewer than there are");
    let options = RunOptions { allow_deletes: Some(34), ..RunOptions::default() };
    let report = runner.run(&runner.policies[1], &options).await.unwrap();
    assert_eq!(deleted(&report), 34, "{:?}", report.zones);
}

#[tokio::test(start_paused = true)]
async fn what_only_a_change_deletes_is_not_let_pass_with_what_waits_for_a_snapshot() {
    let mistyped = NIGHTLY.replace("14d", "3d");
    let mut deletions = Vec::new();
    for policies in [NIGHTLY, &mistyped] {
        let (stage, _) = Stage::two_by_twenty();
        stage.step(SignedDuration::from_hours(1));
        run(&stage, NIGHTLY, "nightly").await;
        // In the night in which no snapshot can be taken: of the change nothing is said.
        forbid(&stage);
        stage.step(DAY);
        let plan = run(&stage, policies, "nightly").await.zones[0].plan.clone().unwrap();
        let waiting = plan.blocked_by_source + plan.pending;
        let runner = stage.runner(policies);
        let options = RunOptions { allow_deletes: Some(waiting), ..RunOptions::default() };
        let report = runner.run(&runner.policies[0], &options).await.unwrap();
        deletions.push((waiting, deleted(&report)));
    }
    let [(_, before), (waiting, by_mistake)] = deletions[..] else { panic!() };
    assert!(waiting > 20 && before > 0 && by_mistake <= before, "{deletions:?}");
}

/// Whichever read of its state fails: without the night's snapshot neither policy deletes any of its instance.
#[tokio::test(start_paused = true)]
async fn a_state_that_cannot_be_read_once_deletes_nothing_without_the_snapshot() {
    let both = format!("{}{PRUNE}", NIGHTLY.replace("keep_within = \"14d\"", "keep_last = 5"));
    let mut was_missing = 0;
    for call in [DiskCall::List, DiskCall::Open, DiskCall::Read] {
        for nth in 1..=24 {
            let disk = MemoryDisk::new();
            let stage = Stage::over(Arc::new(disk.clone()));
            disk.create_dir_all(stage.folder.path(), Access::Owner).unwrap();
            let web = stage.world.add_instance(&stage.zone, "web-1", &[]);
            stage.days(web, (1..6).rev());
            run(&stage, &both, "nightly").await;
            stage.step(DAY);
            // Both would delete these.
            stage.days(web, 10..13);
            let before = stage.there();
            disk.fail(call, nth, ErrorKind::Other);
            for name in ["nightly", "prune"] {
                // A process that can't start knows of no run.
                let Ok(runner) = stage.assemble(&both) else { break };
                let policy = runner.policies.iter().find(|policy| policy.name.as_str() == name).unwrap();
                let _ = runner.run(policy, &RunOptions::default()).await;
                let there = stage.there();
                if !there.iter().any(|id| !before.contains(id)) {
                    was_missing += 1;
                    assert_eq!(there, before, "{call:?} {nth}, {name}");
                }
            }
        }
    }
    assert!(was_missing > 0, "no failure hit what a creation needs");
}

#[tokio::test(start_paused = true)]
async fn a_full_quota_deletes_nothing_and_says_usage_and_limit() {
    let stage = Stage::new();
    stage.instance("web-1", 10);
    stage.world.set_quota("snapshot", 10);
    let policy = NIGHTLY.replace("keep_within = \"14d\"", "keep_last = 5");
    for _ in 0..3 {
        stage.step(DAY);
        let report = run(&stage, &policy, "nightly").await;
        assert_eq!((deleted(&report), stage.there().len()), (0, 10));
        let pending = report.zones[0].pending.clone().unwrap();
        assert!(pending.contains("quota of snapshots: 10 of 10 used"), "{pending}");
    }
    // Somebody makes room.
    stage.world.remove_snapshot(stage.there()[0]);
    let report = run(&stage, &policy, "nightly").await;
    assert_eq!((report.result, stage.there().len()), (RunResult::Success, 5), "{:?}", report.zones);
}

#[tokio::test(start_paused = true)]
async fn only_the_instance_whose_snapshot_is_missing_is_kept_until_it_has_one() {
    let stage = Stage::new();
    let web = stage.world.add_instance(&stage.zone, "web-1", &[]);
    let db = stage.world.add_instance(&stage.zone, "db-1", &[]);
    stage.days(web, (1..11).rev());
    stage.days(db, (1..11).rev());
    let policy = NIGHTLY.replace("keep_within = \"14d\"", "keep_last = 5");
    let broken = Effect::operation_fails("fault", "no space");
    stage.world.fault(Fault::on(Call::CreateSnapshot, broken).of(db.0));
    let report = run(&stage, &policy, "nightly").await;
    assert_eq!(deleted(&report), 6, "of web-1 alone: {:?}", report.zones);
    stage.world.clear_faults();

    // One that was taken by hand since then will do.
    let other = format!("{policy}{PRUNE}");
    let report = run(&stage, &other, "prune").await;
    let of_db = |stage: &Stage| {
        let all = stage.world.snapshots(&stage.zone);
        all.iter().filter(|one| one.instance_id == Some(db) && one.state == SnapshotState::Exported).count()
    };
    assert_eq!(of_db(&stage), 10, "{:?}", report.zones);
    stage.step(SignedDuration::from_mins(10));
    stage.world.add_snapshot(db, stage.now());
    run(&stage, &other, "prune").await;
    assert_eq!(of_db(&stage), 5, "as many as nightly wants");
}

#[tokio::test(start_paused = true)]
async fn a_failing_policy_that_is_taken_away_has_to_settle() {
    let (stage, _) = Stage::two_by_twenty();
    let both = format!("{}{PRUNE}", NIGHTLY.replace("14d", "1d"));
    forbid(&stage);
    stage.step(DAY * 2);
    run(&stage, &both, "nightly").await;
    stage.step(DAY);
    run(&stage, &both, "prune").await;
    let report = run(&stage, PRUNE, "prune").await;
    let pending = report.zones[0].pending.clone().unwrap_or_default();
    assert!(pending.contains("policy nightly is gone"), "{:?}", report.zones[0].plan);
    assert_eq!(stage.there().len(), 40);
    stage.step(DAY);
    run(&stage, PRUNE, "prune").await;
    assert_eq!(stage.there().len(), 6);
}

#[tokio::test(start_paused = true)]
async fn a_zone_that_cannot_be_listed_has_missed_all_of_its_snapshots() {
    let (stage, _) = Stage::two_by_twenty();
    let both = format!("{}{PRUNE}", NIGHTLY.replace("14d", "1d"));
    stage.step(SignedDuration::from_hours(1));
    stage.world.fault(Fault::on(Call::ListSnapshots, Effect::status(403, "no")));
    assert_eq!(run(&stage, &both, "nightly").await.result, RunResult::Failed);
    stage.world.clear_faults();
    let report = run(&stage, &both, "prune").await;
    assert_eq!(deleted(&report), 0, "{:?}", report.zones);
    run(&stage, &both, "nightly").await;
    assert!(stage.there().len() < 40);
}

#[tokio::test(start_paused = true)]
async fn expect_newest_keeps_what_others_fail_to_take_and_is_said() {
    let (stage, _) = Stage::two_by_twenty();
    let policy = PRUNE.replace("max_delete_percent", "expect_newest = \"36h\"\nmax_delete_percent");
    stage.step(SignedDuration::from_hours(37));
    let report = run(&stage, &policy, "prune").await;
    assert_eq!((deleted(&report), stage.there().len()), (0, 40), "{:?}", report.zones);
    let warnings = report.zones[0].warnings.join("\n");
    assert!(
        warnings.contains("instance web-1: its newest good snapshot is of 2026-11-01T12:00:00Z"),
        "{warnings}"
    );
    assert!(warnings.contains("expect_newest"), "{warnings}");
    let web = stage.world.snapshots(&stage.zone)[0].instance_id.unwrap();
    stage.world.add_snapshot(web, stage.now());
    let report = run(&stage, &policy, "prune").await;
    assert_eq!(deleted(&report), 18, "of one instance alone: {:?}", report.zones);
}
