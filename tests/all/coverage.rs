//! Which instances lack the snapshots that they should have, and who says so.

use jiff::SignedDuration;
use serde_json::json;
use snapwarden::run::context::RunOptions;
use snapwarden::run::list::ListingCache;
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::snapshot::InstanceId;

use crate::command_line::{Play, end_of};
use crate::stage::{Said, Stage, days_ago};

/// As in the README: it exports and prunes what others take.
const FIVE_MINUTES: &str = r#"
[policies.nightly]
schedule = "30 2 * * *"
zones = ["ch-gva-2"]
[policies.nightly.retention]
keep_last = 7
[policies.nightly.export]
archives = ["vault"]
"#;

/// It takes snapshots of `web-*` itself, and can't: its quota is used up.
const CREATING: &str = r#"
[policies.nightly]
schedule = "30 2 * * *"
zones = ["ch-gva-2"]
create = true
[policies.nightly.select]
instances = ["web-*"]
"#;

/// A month-old machine.
fn machine(stage: &Stage, name: &str, days: &[i64]) -> InstanceId {
    let id = stage.world.add_instance(&stage.zone, name, &[]);
    stage.world.set_instance_created(id, days_ago(31));
    stage.days(id, days.iter().copied());
    id
}

/// What the plan of the first policy says beside its decisions.
async fn planned(stage: &Stage, policies: &str) -> String {
    let runner = stage.runner(policies);
    let previews = runner.preview(&ListingCache::default(), &runner.policies[0], None).await;
    previews.iter().flat_map(|(_, preview)| preview.as_ref().unwrap().listing.warnings.clone()).collect()
}

fn warnings(report: &RunReport) -> String {
    report.zones.iter().flat_map(|zone| zone.warnings.clone()).collect()
}

#[tokio::test(start_paused = true)]
async fn an_account_without_any_snapshot_is_no_success_once_its_machines_are_old() {
    let stage = Stage::new();
    let id = machine(&stage, "web-1", &[]);
    let report = stage.run(FIVE_MINUTES).await;
    let missing = "1 instance has no good snapshot: web-1";
    assert_eq!((report.result, report.zones[0].missing.as_deref()), (RunResult::Partial, Some(missing)));
    assert!(planned(&stage, FIVE_MINUTES).await.contains(missing));
    let runs = stage.runner(FIVE_MINUTES).state.last_runs(&report.policy).await.unwrap();
    let zone = &runs.zones[&stage.zone];
    assert_eq!((zone.last_success_at, zone.result.as_deref()), (None, Some("partial")));
    assert_eq!((zone.instances.len(), zone.instances[0].id, zone.instances[0].good), (1, id, 0));

    // A new one gets twice the schedule's gap.
    stage.world.set_instance_created(id, days_ago(1));
    let report = stage.run(FIVE_MINUTES).await;
    assert_eq!((report.result, report.zones[0].missing.as_deref()), (RunResult::Success, None));
    assert!(!planned(&stage, FIVE_MINUTES).await.contains(missing));
    let exempt = format!("{FIVE_MINUTES}[coverage]\nexempt = [\"web-*\"]\n");
    stage.world.set_instance_created(id, days_ago(31));
    assert_eq!(stage.run(&exempt).await.result, RunResult::Success);
}

#[tokio::test(start_paused = true)]
async fn of_three_machines_the_one_without_and_the_one_with_an_old_snapshot_are_named() {
    let stage = Stage::new();
    machine(&stage, "web-1", &[0]);
    machine(&stage, "web-2", &[]);
    machine(&stage, "web-3", &[30]);
    let at_the_limit = RunOptions { slot: Some(days_ago(1)), ..RunOptions::default() };
    stage.world.set_quota("snapshot", 2);
    let report = stage.run_with(CREATING, &at_the_limit).await;
    assert_eq!(report.result, RunResult::Partial);
    assert_eq!(report.zones[0].missing.as_deref(), Some("1 instance has no good snapshot: web-2"));
    let old_text = "no good snapshot of 1 instance is new enough (policy nightly: 2d, twice the longest gap of its \
                 schedule): web-3 (2026-10-02T12:00:00Z)";
    assert!(warnings(&report).contains(old_text), "{report:?}");
    assert_eq!(report.zones[0].instances.len(), 3);

    let coverage = stage.runner(CREATING).coverage().await.unwrap();
    let shown: Vec<_> = coverage
        .instances
        .iter()
        .map(|one| (one.name.as_str(), one.state.as_str(), one.problems.join("; ")))
        .collect();
    let old = "newest good snapshot of 2026-10-02T12:00:00Z: policy nightly expects one not older than 2d, twice the \
               longest gap of its schedule";
    assert_eq!(
        shown,
        [
            ("web-2", "covered", "no good snapshot".to_owned()),
            ("web-3", "covered", old.to_owned()),
            ("web-1", "covered", String::new())
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn what_no_policy_covers_is_named_by_plan_and_coverage_and_counted() {
    let stage = Stage::new();
    for name in ["web-1", "db-1", "ci-1"] {
        machine(&stage, name, &[0]);
    }
    let policies = format!("{CREATING}[coverage]\nexempt = [\"ci-*\"]\n");
    let uncovered = "1 instance is uncovered, since no policy takes or exports snapshots there: db-1";
    assert!(planned(&stage, &policies).await.contains(uncovered));
    let report = stage.run(&policies).await;
    assert_eq!(report.result, RunResult::Success, "{report:?}");
    let zone = report.zones[0].coverage.as_ref().unwrap();
    assert_eq!((zone.covered, zone.uncovered, zone.exempt), (1, 1, 1));
    let coverage = stage.runner(&policies).coverage().await.unwrap();
    let states: Vec<_> =
        coverage.instances.iter().map(|one| (one.name.as_str(), one.state.as_str())).collect();
    assert_eq!(states, [("db-1", "uncovered"), ("web-1", "covered"), ("ci-1", "exempt")]);
    assert_eq!(coverage.instances[0].problems, ["no policy selects it"]);
}

#[tokio::test(start_paused = true)]
async fn a_pattern_that_matches_nothing_in_all_zones_makes_a_run_partial() {
    let stage = Stage::new();
    let other = stage.world.add_zone("de-fra-1");
    machine(&stage, "web-1", &[0]);
    let policies = FIVE_MINUTES.replace("[\"ch-gva-2\"]", "[\"ch-gva-2\", \"de-fra-1\"]");
    let policies = |select: &str| format!("{policies}[policies.nightly.select]\n{select}\n");
    let text = "`cache-*` in `instances` matches no instance in ch-gva-2, de-fra-1: correct or remove it in policy nightly";
    let both = policies("instances = [\"web-*\", \"cache-*\"]");
    let report = stage.run(&both).await;
    assert_eq!((report.result, report.zones[1].unmatched.as_deref()), (RunResult::Partial, Some(text)));
    assert!(planned(&stage, &both).await.contains(text));
    let labels = stage.run(&policies("labels = { backup = \"*\" }")).await;
    assert_eq!(labels.result, RunResult::Partial);
    assert!(labels.zones[0].unmatched.as_ref().unwrap().starts_with("`backup = \"*\"` in `labels`"));
    // In any of its zones is enough.
    let cache = stage.world.add_instance(&other, "cache-1", &[]);
    stage.world.add_snapshot(cache, days_ago(0));
    assert_eq!(stage.run(&both).await.result, RunResult::Success);
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_vanished_is_told_once_and_shown_for_a_week() {
    let stage = Stage::new();
    let gone = machine(&stage, "db-1", &[0]);
    machine(&stage, "web-1", &[0]);
    assert_eq!(stage.run(FIVE_MINUTES).await.result, RunResult::Success);
    stage.world.remove_instance(gone);
    stage.step(SignedDuration::from_hours(24));
    let coverage = stage.runner(FIVE_MINUTES).coverage().await.unwrap();
    assert_eq!(
        (coverage.instances[0].name.as_str(), coverage.instances[0].state.as_str()),
        ("db-1", "vanished")
    );

    let text =
        "1 instance is not listed any more: db-1 (newest verified copy of 2026-11-01T12:00:00Z in vault)";
    assert!(planned(&stage, FIVE_MINUTES).await.contains(text));
    let report = stage.run(FIVE_MINUTES).await;
    assert!(warnings(&report).contains(text), "{report:?}");
    let counts = report.zones[0].instances.iter().find(|counts| counts.id == gone).unwrap();
    assert!(counts.vanished_at.is_some() && counts.good == 0 && !counts.newest_verified_at.is_empty());
    stage.step(SignedDuration::from_secs(1));
    assert!(!warnings(&stage.run(FIVE_MINUTES).await).contains("not listed any more"));
    for (hours, is_shown) in [(7 * 24 - 1, true), (2, false)] {
        stage.step(SignedDuration::from_hours(hours));
        let coverage = stage.runner(FIVE_MINUTES).coverage().await.unwrap();
        let shown = coverage.instances.iter().find(|one| one.id == gone);
        assert_eq!(shown.is_some(), is_shown);
        let problems = shown.map(|one| (one.newest_copy, one.problems.len()));
        assert_eq!(problems, is_shown.then_some((Some(days_ago(0)), 1)));
    }
    assert_eq!(stage.run(FIVE_MINUTES).await.zones[0].instances.len(), 1);
}

impl Play {
    /// A month-old machine.
    fn machine(&self, name: &str, snapshots: i64) -> InstanceId {
        let id = self.instance(name, snapshots, 24).0;
        self.world.set_instance_created(id, self.begun - SignedDuration::from_hours(31 * 24));
        id
    }
}

/// What the program says on a terminal of 80 columns: nothing is wider.
async fn narrow(play: &Play, arguments: &[&str]) -> Said {
    let mut command = play.command(arguments);
    command.env("COLUMNS", "80");
    let said = end_of(command).await;
    for line in said.out.lines() {
        assert!(line.chars().count() <= 80, "`{line}` is too wide:\n{}", said.out);
    }
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_without_any_snapshot_is_told_by_every_command() {
    let play = Play::new().await;
    play.configure(FIVE_MINUTES);
    play.machine("web-1", 0);
    let before = play.everything();
    for (arguments, status) in [(&["plan"][..], 0), (&["check", "--online"], 1), (&["coverage"], 1)] {
        let said = play.run(arguments).await;
        assert_eq!(said.status, status, "{arguments:?}: {said:?}");
        said.has(&["no good snapshot", "web-1"]);
    }
    assert_eq!(play.everything(), before, "looking changes nothing");
    let said = play.run(&["once"]).await;
    assert_eq!(said.status, 1, "{said:?}");
    said.has(&["policy nightly: partial", "MISSING: 1 instance has no good snapshot: web-1"]);
    let said = play.run(&["once", "--output", "json"]).await.json();
    assert_eq!(said[0]["zones"][0]["missing"], "1 instance has no good snapshot: web-1");
    assert_eq!(said[0]["zones"][0]["instances"][0]["name"], "web-1");

    // What the next run takes itself is no failure of the configuration.
    play.configure(CREATING);
    let said = play.run(&["check", "--online"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    said.has(&["policy `nightly`: 1 instance has no good snapshot: web-1: the policy's next run takes one"]);
    let said = play.run(&["plan"]).await;
    assert!(said.status == 0 && !said.out.contains("no good snapshot"), "{said:?}");
    play.configure(&CREATING.replace("web-*", "cache-*"));
    let said = play.run(&["check", "--online"]).await;
    assert_eq!(said.status, 1, "{said:?}");
    said.has(&["`cache-*` in `instances` matches no instance in ch-gva-2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn coverage_shows_every_instance_the_worst_first() {
    let play = Play::new().await;
    let exempt = format!(
        "{FIVE_MINUTES}[policies.nightly.select]\ninstances = [\"web-*\"]\n[coverage]\nexempt = [\"ci-*\"]\n"
    );
    play.configure(&exempt);
    let ids =
        ["web-1", "web-2", "db-1", "ci-1"].map(|name| (name, play.machine(name, i64::from(name != "web-2"))));
    assert_eq!(play.run(&["once"]).await.status, 1);
    let said = narrow(&play, &["coverage"]).await;
    assert_eq!(said.status, 1, "{said:?}");
    let starts: Vec<&str> = said.out.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(starts, ["INSTANCE", "web-2", "no", "db-1", "no", "web-1", "ci-1", "4"], "{}", said.out);
    said.has(&[
        "1h 0m",
        "vault",
        "4 instances: 2 covered, 1 uncovered, 1 exempt, 0 vanished; 2 with problems",
    ]);

    let all = play.run(&["coverage", "--output", "json"]).await;
    assert_eq!(all.status, 1);
    let web = play.run(&["coverage", "web-1", "--output", "json"]).await;
    assert_eq!(web.status, 0, "{web:?}");
    let web = web.json();
    assert_eq!(web["instances"].as_array().unwrap().len(), 1);
    let mut one = web["instances"][0].clone();
    let taken = one["newest_snapshot"].take();
    assert_eq!(one["newest_copy"].take(), taken);
    assert_eq!(
        one,
        json!({"zone": "ch-gva-2", "instance_id": ids[0].1, "instance_name": "web-1", "state": "covered",
            "policies": ["nightly"], "newest_snapshot": null, "newest_copy": null, "archives": ["vault"], "problems": []})
    );
    let id = ids[2].1.to_string();
    for text in [&id, &id[..8]] {
        let said = play.run(&["coverage", text]).await;
        assert_eq!(said.status, 1, "{said:?}");
        said.has(&["db-1", "no policy selects it"]);
    }
    play.run(&["coverage", "web-9"]).await.refused(2, &["web-9"]);
    play.run(&["coverage", "00000000-0000-0000-0000-000000000000"])
        .await
        .refused(2, &["no instance is known"]);
}
