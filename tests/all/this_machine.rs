//! `self` in a selection: which instance this machine is, and what a policy does if that is unknown.

use snapwarden::run::list::ListingCache;
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::snapshot::{InstanceId, SnapshotId};

use crate::stage::{Stage, days_ago};

/// Prunes what it selects down to five.
fn pruning(name: &str, select: &str) -> String {
    format!(
        "[policies.{name}]\nzones = [\"ch-gva-2\"]\n[policies.{name}.select]\n{select}\n\
         [policies.{name}.retention]\nmax_count = 5\n"
    )
}

const MINE: &str = "instances = [\"self\"]";
const OTHERS: &str = "exclude_instances = [\"self\"]";

/// Two instances with eight snapshots each.
fn two() -> (Stage, [InstanceId; 2], [Vec<SnapshotId>; 2]) {
    let stage = Stage::new();
    let instances = ["web-1", "db-1"].map(|name| stage.world.add_instance(&stage.zone, name, &[]));
    let ids = instances
        .map(|instance| (0..8).rev().map(|day| stage.world.add_snapshot(instance, days_ago(day))).collect());
    (stage, instances, ids)
}

fn left(stage: &Stage, ids: &[Vec<SnapshotId>; 2]) -> [usize; 2] {
    let there = stage.there();
    [0, 1].map(|of| ids[of].iter().filter(|id| there.contains(id)).count())
}

fn failed_for_want_of_an_id(report: &RunReport) {
    assert_eq!(report.result, RunResult::Failed, "{report:?}");
    let said = report.zones[0].failures.join("\n");
    for word in ["nothing is done here", "`self`", "metadata server at 169.254.169.254 does not answer"] {
        assert!(said.contains(word), "{said}");
    }
    assert!(report.zones.iter().all(|zone| zone.steps.is_empty()), "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn it_is_selected_and_left_out_as_the_metadata_server_says() {
    for (select, expected) in [(MINE, [5, 8]), (OTHERS, [8, 5])] {
        let (stage, [web, _], ids) = two();
        stage.world.set_this_machine(Some(web));
        assert_eq!(stage.run(&pruning("nightly", select)).await.result, RunResult::Success);
        assert_eq!(left(&stage, &ids), expected, "{select}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_cannot_be_told_which_one_it_is_does_nothing_and_says_so() {
    for select in [MINE, OTHERS, "instances = [\"self\", \"db-*\"]"] {
        let (stage, [web, _], ids) = two();
        let policy = pruning("nightly", select);
        failed_for_want_of_an_id(&stage.run(&policy).await);
        let creating = policy.replace("zones", "create = true\nzones");
        failed_for_want_of_an_id(&stage.run(&creating).await);
        assert_eq!(left(&stage, &ids), [8, 8], "{select}");
        assert!(stage.world.changes().is_empty(), "{select}");
        // Once it answers, all is well.
        stage.world.set_this_machine(Some(web));
        assert_eq!(stage.run(&policy).await.result, RunResult::Success);
    }
}

#[tokio::test(start_paused = true)]
async fn a_preview_says_so_as_well() {
    let (stage, ..) = two();
    let runner = stage.runner(&pruning("nightly", MINE));
    let zones = runner.preview(&ListingCache::default(), &runner.policies[0], None).await;
    assert!(zones[0].1.as_ref().is_err_and(|failure| failure.contains("`self`")), "{zones:?}");
}

#[tokio::test(start_paused = true)]
async fn what_such_a_policy_keeps_of_any_instance_is_kept_from_others_meanwhile() {
    let (stage, [web, _], ids) = two();
    let prune_all = "[policies.all]\nzones = [\"ch-gva-2\"]\n[policies.all.retention]\nmax_count = 2\n";
    // It wants five of its own instance; which that is, is unknown.
    let both = [prune_all, &pruning("mine", MINE)].concat();
    let report = stage.run(&both).await;
    assert_eq!(report.result, RunResult::Success, "{report:?}");
    assert_eq!(left(&stage, &ids), [5, 5]);
    let warned = report.zones[0].warnings.join("\n");
    assert!(warned.contains("policy mine selects by `self`"), "{warned}");
    stage.world.set_this_machine(Some(web));
    let report = stage.run(&both).await;
    assert_eq!(left(&stage, &ids), [5, 2]);
    assert!(report.zones[0].warnings.is_empty(), "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn it_is_also_asked_for_a_policy_that_is_paused() {
    let prune_all = "[policies.all]\nzones = [\"ch-gva-2\"]\n[policies.all.retention]\nmax_count = 2\n";
    let both = [prune_all, &pruning("mine", MINE).replace("zones", "enabled = false\nzones")].concat();
    let (stage, [web, _], ids) = two();
    let warned = stage.run(&both).await.zones[0].warnings.join("\n");
    assert!(warned.contains("policy mine selects by `self`"), "{warned}");
    assert_eq!(left(&stage, &ids), [5, 5]);
    stage.world.set_this_machine(Some(web));
    stage.run(&both).await;
    assert_eq!(left(&stage, &ids), [5, 2]);
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_does_not_ask_never_waits_for_the_answer() {
    let (stage, _, ids) = two();
    assert_eq!(stage.run(&pruning("nightly", "instances = [\"web-*\"]")).await.result, RunResult::Success);
    assert_eq!(left(&stage, &ids), [5, 8]);
}
