//! Several processes that divide the instances among them, against the simulated zone.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use jiff::SignedDuration;
use snapwarden::cli::assemble::{self, Use};
use snapwarden::cli::exit::Refusal;
use snapwarden::config;
use snapwarden::credentials::Credentials;
use snapwarden::disk::{Disk as _, RealDisk};
use snapwarden::policy::shard::Shard;
use snapwarden::run::archive_adopt;
use snapwarden::run::context::{RunOptions, Runner};
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::run::shard_adopt;
use snapwarden::sim::world::{API_KEY, API_SECRET};
use snapwarden::snapshot::{InstanceId, SnapshotId};
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::holds::Hold;

use crate::stage::{NIGHTLY, Stage, paths, steps};

const SHARDS: u32 = 3;

fn shard(index: u32, of: u32) -> Shard {
    Shard::new(index, of).unwrap()
}

/// Twelve instances with a snapshot a day for twenty days.
fn fleet() -> (Stage, BTreeMap<InstanceId, Vec<SnapshotId>>) {
    let stage = Stage::new();
    let mut fleet = BTreeMap::new();
    for number in 0..12 {
        let snapshots = stage.instance(&format!("web-{number}"), 20);
        let all = stage.world.snapshots(&stage.zone);
        let of = all.iter().find(|snapshot| snapshot.id == snapshots[0]).unwrap().instance_id.unwrap();
        fleet.insert(of, snapshots);
    }
    (stage, fleet)
}

/// The process of a shard; its state has a folder of this name.
fn process(stage: &Stage, folder: &str, shard: Option<Shard>, policies: &str) -> Result<Runner, Refusal> {
    let text = stage.config(policies).replace("/state\"", &format!("/{folder}\""));
    let mut config = config::parse(&text, "test.toml", None).unwrap_or_else(|error| panic!("{error}"));
    config.shard = shard;
    let credentials = Credentials::new(API_KEY, API_SECRET, None).unwrap();
    assemble::runner(&config, credentials, &stage.seams, Use::Changing)
}

fn of_fleet(stage: &Stage, index: u32, policies: &str) -> Runner {
    process(stage, &format!("shard-{index}"), Some(shard(index, SHARDS)), policies)
        .unwrap_or_else(|refusal| panic!("{}", refusal.text))
}

async fn run(runner: &Runner) -> RunReport {
    runner.run(&runner.policies[0], &RunOptions::default()).await.unwrap()
}

/// One run of each shard: the first, which marks the archive, and then the others at the same time.
async fn run_all(stage: &Stage, policies: &str) -> Vec<RunReport> {
    let mut reports = vec![run(&of_fleet(stage, 0, policies)).await];
    let others: Vec<Runner> = (1..SHARDS).map(|index| of_fleet(stage, index, policies)).collect();
    reports.extend(join_all(others.iter().map(run)).await);
    reports
}

/// What a run did, by action and snapshot, with how often.
fn done(reports: &[RunReport]) -> BTreeMap<(String, SnapshotId), usize> {
    let mut done = BTreeMap::new();
    for action in [Action::Create, Action::Export, Action::Promote, Action::Delete, Action::PruneCopy] {
        for step in reports.iter().flat_map(|report| steps(report, action)) {
            assert_eq!(step.outcome, StepOutcome::Done, "{step:?}");
            *done.entry((format!("{action:?}"), step.facts.snapshot.id.unwrap())).or_default() += 1;
        }
    }
    done
}

fn images(stage: &Stage) -> BTreeSet<String> {
    let name = |path: std::path::PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    paths(&stage.archive())
        .into_iter()
        .map(name)
        .filter(|name| name.rsplit('.').next() == Some("qcow2"))
        .collect()
}

#[tokio::test(start_paused = true)]
async fn the_shards_together_do_what_one_process_does_and_nothing_twice() {
    let nightly = NIGHTLY.replace(
        "[policies.nightly.guard]",
        "[policies.nightly.select]\norphans = \"apply\"\n[policies.nightly.guard]",
    );
    let (alone, _) = fleet();
    let (stage, fleet) = fleet();
    assert!(
        (0..SHARDS).all(|index| fleet.keys().any(|id| shard(index, SHARDS).has(*id))),
        "a shard has nothing"
    );
    for stage in [&alone, &stage] {
        let orphans = stage.instance("gone", 20);
        let unlisted = InstanceId("9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec".parse().unwrap());
        let listed = stage.world.snapshots(&stage.zone);
        let gone = listed.iter().find(|one| one.id == orphans[0]).unwrap().instance_id.unwrap();
        for id in orphans {
            stage.world.set_instance(id, Some(unlisted));
        }
        stage.world.remove_instance(gone);
    }
    for days in [0, 8] {
        alone.step(SignedDuration::from_hours(24 * days));
        stage.step(SignedDuration::from_hours(24 * days));
        let expected = run(&process(&alone, "state", None, &nightly).unwrap_or_else(|_| panic!())).await;
        assert_eq!(expected.result, RunResult::Success, "{expected:?}");
        let reports = run_all(&stage, &nightly).await;
        assert!(reports.iter().all(|report| report.result == RunResult::Success), "{reports:?}");
        let together = done(&reports);
        assert_eq!(together, done(&[expected]));
        assert!(together.values().all(|times| *times == 1) && !together.is_empty(), "{together:?}");
        assert_eq!(stage.there(), alone.there());
        assert_eq!(images(&stage), images(&alone));
    }
}

#[tokio::test(start_paused = true)]
async fn guards_coverage_and_archives_of_a_shard_are_about_its_own_instances() {
    let nightly = NIGHTLY.replacen("[policies", "[archives.vault.retention]\nkeep_last = 5\n[policies", 1);
    let (stage, fleet) = fleet();
    run_all(&stage, &nightly).await;
    let coverage = of_fleet(&stage, 1, &nightly).coverage().await.unwrap();
    let own = |id: &&InstanceId| shard(1, SHARDS).has(**id);
    let covered: BTreeSet<InstanceId> = coverage.instances.iter().map(|one| one.id).collect();
    assert_eq!(covered, fleet.keys().filter(own).copied().collect());

    // All of shard 1 is lost, in the zone and in the archive.
    for id in fleet.keys().filter(own) {
        stage.world.snapshots(&stage.zone).iter().filter(|one| one.instance_id == Some(*id)).for_each(
            |one| {
                stage.world.remove_snapshot(one.id);
            },
        );
        for path in
            paths(&stage.archive()).iter().filter(|path| path.iter().any(|part| *part == *id.to_string()))
        {
            RealDisk.remove_file(path).unwrap();
        }
    }
    let reports = run_all(&stage, &nightly).await;
    for (index, report) in reports.iter().enumerate() {
        let zone = &report.zones[0];
        let said = format!("{:?} {:?} {:?}", zone.held, zone.failures, zone.warnings);
        assert_eq!(zone.held.is_some(), index == 1, "{index}: {said}");
        assert_eq!(said.contains("vanished from it"), index == 1, "{index}: {said}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_pattern_that_another_shard_matches_is_no_typo_and_its_instances_templates_stay() {
    let (stage, fleet) = fleet();
    let one = NIGHTLY.replace(
        "[policies.nightly.guard]",
        "[policies.nightly.select]\ninstances = [\"web-3\"]\n[policies.nightly.guard]",
    );
    for report in run_all(&stage, &one).await {
        assert_eq!(report.result, RunResult::Success, "{report:?}");
        assert_eq!(report.zones[0].elsewhere + report.zones[0].instances.len() as u64, 1);
    }
    let typo = one.replace("web-3", "wbe-3");
    let report = run(&of_fleet(&stage, 0, &typo)).await;
    assert!(report.zones[0].unmatched.is_some(), "{report:?}");

    // An instance of another shard runs on a template that this one would delete.
    let keep_one = NIGHTLY.replace("keep = 2", "keep = 1");
    let owner = fleet.keys().find(|id| shard(0, SHARDS).has(**id)).unwrap();
    let user = fleet.keys().find(|id| shard(1, SHARDS).has(**id)).unwrap();
    let made = run(&of_fleet(&stage, 0, &keep_one)).await;
    let template = steps(&made, Action::Promote)
        .into_iter()
        .find(|step| step.facts.snapshot.instance_id == Some(*owner))
        .and_then(|step| step.facts.template_id)
        .unwrap();
    stage.world.set_template(*user, template);
    for day in 1..4 {
        stage.step(SignedDuration::from_hours(24));
        stage.world.add_snapshot(*owner, stage.now() - SignedDuration::from_mins(day));
        run(&of_fleet(&stage, 0, &keep_one)).await;
    }
    let templates = stage.world.templates(&stage.zone);
    assert!(templates.iter().any(|one| one.id == template), "an instance runs on it");
}

#[tokio::test(start_paused = true)]
async fn another_number_of_shards_is_refused_until_what_moves_was_said() {
    let (stage, fleet) = fleet();
    run_all(&stage, NIGHTLY).await;
    let was = shard(0, SHARDS);
    let moves = |is: Shard| -> BTreeSet<InstanceId> {
        fleet.keys().filter(|id| was.has(**id) && !is.has(**id)).copied().collect()
    };
    let stays = |is: Shard| fleet.keys().copied().find(|id| is.has(*id));
    let mut others = (SHARDS + 1..20).map(|of| shard(0, of));
    let is = others.find(|is| !moves(*is).is_empty() && stays(*is).is_some()).unwrap();
    for other in [Some(is), Some(shard(1, SHARDS))] {
        let Err(refusal) = process(&stage, "shard-0", other, NIGHTLY) else { panic!("{other:?}") };
        assert_eq!(refusal.exit as u8, 78);
        for words in ["was made for shard 0/3", "nothing is done", "snapwarden shard adopt --shard"] {
            assert!(refusal.text.contains(words), "{}", refusal.text);
        }
    }
    // Without a shard the state can be read, and a run is refused.
    let runner = process(&stage, "shard-0", None, NIGHTLY).unwrap_or_else(|_| panic!());
    assert_eq!(runner.state.shard(), Some(was));
    assert!(runner.state.require_shard(None).is_err());

    let expected = moves(is);
    let gone = *expected.first().unwrap();
    let mut directory = runner.state.clone();
    for id in [gone, stays(is).unwrap()] {
        let snapshot = *fleet[&id].last().unwrap();
        let hold = Hold { snapshot, until: None, reason: None, since: stage.now(), about: None };
        directory.hold(&stage.clock, hold).await.unwrap();
    }
    let adopted = shard_adopt::adopt(&mut directory, &stage.clock, Some(is)).await.unwrap();
    assert_eq!(adopted.moved.iter().map(|one| one.instance_id).collect::<BTreeSet<_>>(), expected);
    assert!(adopted.moved.iter().all(|one| one.shard == is.of(one.instance_id)));
    let held: Vec<SnapshotId> = adopted.holds.iter().map(|one| one.hold.snapshot).collect();
    assert_eq!(held, [*fleet[&gone].last().unwrap()]);

    // What moved is not missed here, and the new shard waits for its archive.
    let runner =
        process(&stage, "shard-0", Some(is), NIGHTLY).unwrap_or_else(|refusal| panic!("{}", refusal.text));
    let report = run(&runner).await;
    assert_eq!(report.result, RunResult::Success, "{report:?}");
    assert!(report.zones[0].instances.iter().all(|one| is.has(one.id) && one.vanished_at.is_none()));
    let new = is.of(gone);
    let runner =
        process(&stage, "shard-new", Some(new), NIGHTLY).unwrap_or_else(|refusal| panic!("{}", refusal.text));
    let report = run(&runner).await;
    assert!(report.zones[0].held.as_ref().unwrap().contains("archive adopt vault"), "{report:?}");
    archive_adopt::adopt(
        &runner.state,
        &stage.clock,
        &*stage.seams.randomness,
        &runner.archives[&"vault".parse().unwrap()],
    )
    .await
    .unwrap();
    let report = run(&runner).await;
    assert!(report.zones[0].held.is_none(), "{report:?}");
    // It does not know the templates of its instances: that says so until they have newer snapshots.
    let failed = steps(&report, Action::Promote);
    assert!(
        failed.iter().all(|step| step.message.as_ref().unwrap().contains("exists already")),
        "{report:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_state_of_all_instances_is_another_one_and_the_first_shard_marks_the_archive() {
    let (stage, _) = fleet();
    let report = run(&of_fleet(&stage, 1, NIGHTLY)).await;
    assert_eq!(report.result, RunResult::Partial);
    assert!(report.zones[0].failures.join("\n").contains("which the first shard writes"), "{report:?}");
    assert_eq!(images(&stage).len(), 0);
    run(&of_fleet(&stage, 0, NIGHTLY)).await;
    let report = run(&of_fleet(&stage, 1, NIGHTLY)).await;
    assert_eq!(report.result, RunResult::Success, "{report:?}");

    let (alone, _) = fleet();
    run(&process(&alone, "state", None, NIGHTLY).unwrap_or_else(|_| panic!())).await;
    let Err(refusal) = process(&alone, "state", Some(shard(0, 2)), NIGHTLY) else { panic!("it was taken") };
    assert!(refusal.text.contains("was made for all instances (no shard)"), "{}", refusal.text);
}
