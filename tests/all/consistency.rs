//! Application-consistent snapshots: which are so, that the newest stay, and that an instance that asks for them in vain is
//! named.

use jiff::SignedDuration;
use serde_json::json;
use snapwarden::disk::{Access, RealDisk, replace_file};
use snapwarden::run::list::ListingCache;
use snapwarden::run::report::RunResult;
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::snapshot::InstanceId;
use snapwarden::state::audit::{Action, StepOutcome};

use crate::archives::said;
use crate::stage::{Stage, ended, files};

const NIGHTLY: &str = r#"
[policies.nightly]
zones = ["ch-gva-2"]
create = true
[policies.nightly.select]
ownership = "all"
[policies.nightly.retention]
keep_last = 2
min_keep_consistent = 1
[policies.nightly.guard]
max_delete_percent = 100
settle = "0s"
[policies.nightly.export]
archives = ["vault"]
"#;

const DAY: SignedDuration = SignedDuration::from_hours(24);

/// The warnings of a run about consistency.
async fn warnings(stage: &Stage) -> Vec<String> {
    let report = stage.run(NIGHTLY).await;
    assert_eq!(report.result, RunResult::Success, "{report:?}");
    let warnings = report.zones[0].warnings.iter().filter(|warning| warning.contains("consistent"));
    warnings.cloned().collect()
}

fn instance(stage: &Stage) -> InstanceId {
    stage.world.snapshots(&stage.zone)[0].instance_id.unwrap()
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_asks_in_vain_is_named_and_the_run_is_a_success() {
    let stage = Stage::new();
    stage.instance("web-1", 1);
    let web = instance(&stage);
    for (is_asked_for, has_agent, is_warned) in
        [(false, false, false), (true, true, false), (true, false, true), (false, true, false)]
    {
        stage.step(DAY);
        stage.world.set_consistency(web, is_asked_for, has_agent);
        let warnings = warnings(&stage).await;
        assert_eq!(warnings.len(), usize::from(is_warned), "{is_asked_for} {has_agent}: {warnings:?}");
        if is_warned {
            let newest = *stage.there().last().unwrap();
            for words in ["web-1", "guest agent", &newest.to_string()] {
                assert!(warnings[0].contains(words), "{warnings:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn where_the_instance_cannot_be_read_that_is_said_once() {
    let stage = Stage::new();
    stage.instance("web-1", 1);
    stage.instance("web-2", 1);
    stage.step(DAY);
    stage
        .world
        .fault(Fault::on(Call::GetInstance, Effect::status(403, "Forbidden by role policy for compute")));
    let warnings = warnings(&stage).await;
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("get-instance") && warnings[0].contains("403"), "{warnings:?}");
}

#[tokio::test(start_paused = true)]
async fn the_newest_that_is_consistent_stays_and_is_shown_everywhere() {
    let stage = Stage::new();
    let ids = stage.instance("web-1", 1);
    stage.world.set_consistent(ids[0], Some(true));
    for _ in 0..4 {
        stage.step(DAY);
        stage.run(NIGHTLY).await;
    }
    let there = stage.there();
    assert_eq!((there.len(), there[0]), (3, ids[0]));
    let runner = stage.runner(NIGHTLY);
    let previews = runner.preview(&ListingCache::default(), &runner.policies[0], None).await;
    let preview = previews.into_iter().next().unwrap().1.unwrap();
    let rules: Vec<_> = preview.plan.decisions.iter().map(|decision| decision.rule.as_str()).collect();
    assert_eq!(rules, ["create", "keep_last", "keep", "min_keep_consistent"]);

    // The API does not say any more how it was taken.
    stage.world.set_consistent(ids[0], None);
    stage.step(DAY);
    let report = stage.run(NIGHTLY).await;
    assert_eq!((ended(&report, Action::Delete, StepOutcome::Done), stage.there()[0]), (1, ids[0]));
    let counts = &report.zones[0].instances[0];
    assert_eq!(
        counts.newest_consistent_at,
        stage.world.snapshots(&stage.zone).first().map(|one| one.created_at)
    );

    // Once a newer one is there, it may go.
    stage.world.set_consistency(instance(&stage), true, true);
    stage.step(DAY);
    stage.run(NIGHTLY).await;
    assert_eq!(stage.there().len(), 2);
    let manifests = files(&stage.archive()).into_iter().filter(|(path, _)| {
        path.extension().is_some_and(|end| end == "json") && path.to_string_lossy().contains("ch-gva-2")
    });
    let flags: Vec<bool> = manifests
        .map(|(_, bytes)| serde_json::from_slice::<serde_json::Value>(&bytes).unwrap())
        .map(|manifest| manifest["snapshot"]["application_consistent"].as_bool().unwrap())
        .collect();
    assert_eq!(flags.iter().filter(|flag| **flag).count(), 1, "{flags:?}");
    assert!(flags.len() >= 5 && flags.last() == Some(&true), "{flags:?}");
}

#[tokio::test(start_paused = true)]
async fn copies_are_kept_by_it_as_well() {
    let stage = Stage::new();
    let ids = stage.instance("web-1", 5);
    stage.world.set_consistent(ids[1], Some(true));
    let policies = NIGHTLY.replace(
        "[policies.nightly]\n",
        "[archives.vault.retention]\nkeep_last = 1\nmin_keep_consistent = 1\n[policies.nightly]\n",
    ) + "snapshots = \"all\"\n";
    let policies =
        policies.replace("keep_last = 2", "keep_last = 9").replace("create = true", "create = false");
    let report = stage.run(&policies).await;
    assert_eq!(ended(&report, Action::Export, StepOutcome::Done), 5, "{report:?}");
    assert_eq!(ended(&report, Action::PruneCopy, StepOutcome::Done), 3, "{report:?}");
    let images = files(&stage.archive()).into_iter().filter(|(path, _)| {
        path.extension().is_some_and(|end| end == "qcow2")
            && path.to_string_lossy().contains(&ids[1].to_string())
    });
    assert_eq!(images.count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_plan_says_which_are_consistent() {
    let stage = Stage::new();
    let id = |number: u32| format!("b0c0ef2c-106a-4f3c-a5aa-00000000000{number}");
    let entry = |number: u32, flag: &str| {
        format!(
            r#"{{"id":"{}","name":"{number}","created-at":"2026-11-0{number}T02:30:00Z","state":"exported",
                "application-consistent":{flag},"instance":{{"id":"9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec"}}}}"#,
            id(number)
        )
    };
    let entries = [
        entry(1, "true"),
        entry(2, "false"),
        entry(3, "null"),
        entry(4, "\"?\""),
        // Kept by another rule.
        entry(5, "true"),
    ];
    let path = stage.folder.path().join("snapshots.json");
    let body = format!(r#"{{"snapshots":[{}]}}"#, entries.join(","));
    replace_file(&RealDisk, &path, body.as_bytes(), Access::Owner).unwrap();
    let policies = NIGHTLY
        .replace("create = true", "create = false")
        .replace("consistent = 1", "consistent = 2")
        .replace("ownership = \"all\"", "");
    let plan = ["plan", "--at", "2026-11-05T12:00:00Z", "--snapshots", path.to_str().unwrap()];
    let text = said(&stage, &policies, &plan);
    text.has(&[
        "also min_keep, min_keep_consistent; application-consistent",
        "2 application-consistent ones",
    ]);
    assert_eq!(text.out.matches("; application-consistent").count(), 1, "{}", text.out);
    let json = said(&stage, &policies, &[&plan[..], &["--output", "json"]].concat()).json();
    let decisions = json["policies"][0]["decisions"].as_array().unwrap();
    let flags: Vec<_> = decisions.iter().map(|one| one["application_consistent"].clone()).collect();
    assert_eq!(flags, [json!(true), json!(null), json!(null), json!(false), json!(true)]);
    assert_eq!(decisions[4]["rule"], "min_keep_consistent");
}
