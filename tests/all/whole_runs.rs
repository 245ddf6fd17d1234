//! Whole runs of a policy against the simulated zone, in virtual time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use http::header;
use jiff::SignedDuration;
use serde_json::{Value, json};
use snapwarden::disk::{Access, Disk as _};
use snapwarden::run::context::RunOptions;
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::sim::call::Call;
use snapwarden::sim::disk::MemoryDisk;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::image::DiskShape;
use snapwarden::snapshot::{SnapshotId, SnapshotState};
use snapwarden::state::audit::{Action, StepOutcome};

use crate::stage::{NIGHTLY, Stage, ended, rewrite_as_version_1, steps};

/// Everything that a report says went wrong.
fn said(report: &RunReport) -> String {
    let zones = report.zones.iter();
    let mut all: Vec<String> = zones.clone().flat_map(|zone| zone.failures.clone()).collect();
    all.extend(zones.clone().filter_map(|zone| zone.held.clone()));
    all.extend(zones.flat_map(|zone| &zone.steps).filter_map(|step| step.message.clone()));
    all.join("\n")
}

#[tokio::test(start_paused = true)]
async fn the_right_ones_go_the_newest_is_archived_and_a_second_run_changes_nothing() {
    let (stage, ids) = Stage::two_by_twenty();
    let report = stage.run(NIGHTLY).await;
    assert_eq!(report.result, RunResult::Success, "{}", said(&report));
    // 20 days, of which max_age takes those older than 15 days (4 of them) and max_count all but 10.
    let expected: BTreeSet<SnapshotId> = ids.iter().flat_map(|ids| &ids[10..]).copied().collect();
    assert_eq!(stage.there().into_iter().collect::<BTreeSet<_>>(), expected);
    assert_eq!(ended(&report, Action::Delete, StepOutcome::Done), 20);
    assert_eq!(ended(&report, Action::Export, StepOutcome::Done), 2);
    assert_eq!(ended(&report, Action::Promote, StepOutcome::Done), 2);
    let mut names: Vec<_> = stage.world.templates(&stage.zone).into_iter().map(|made| made.name).collect();
    names.sort();
    assert_eq!(names, ["db-1-20261101", "web-1-20261101"]);

    stage.world.clear_log();
    let again = stage.run(NIGHTLY).await;
    assert_eq!(again.result, RunResult::Success, "{}", said(&again));
    assert!(again.zones.iter().all(|zone| zone.steps.is_empty()), "{}", said(&again));
    assert!(stage.world.changes().is_empty());
}

#[tokio::test(start_paused = true)]
async fn deletions_go_oldest_first_and_each_is_written_down_before_and_after() {
    let (stage, _) = Stage::two_by_twenty();
    let policy = NIGHTLY.replace("[policies.nightly.export]\narchives = [\"vault\"]\n", "");
    let report = stage.run(&policy).await;
    let deleted: Vec<_> =
        steps(&report, Action::Delete).iter().map(|step| step.facts.snapshot.created_at).collect();
    assert!(deleted.is_sorted(), "{deleted:?}");
    let lines = stage.audit();
    for step in steps(&report, Action::Delete) {
        let of: Vec<_> = lines
            .iter()
            .filter(|line| {
                line["action"] == "delete" && line["snapshot"]["id"] == json!(step.facts.snapshot.id)
            })
            .collect();
        let outcomes: Vec<_> = of.iter().map(|line| line["outcome"].as_str().unwrap()).collect();
        assert_eq!(outcomes, ["intended", "done"]);
        assert_eq!(of[0]["rule"], json!(step.facts.rule));
        assert!(of[0]["reasons"].as_array().is_some_and(|reasons| !reasons.is_empty()));
        assert_eq!(of[0]["run_id"], report.run_id.to_string());
        assert!(of[1]["operation_id"].is_string(), "{}", of[1]);
    }
}

#[tokio::test(start_paused = true)]
async fn point_01_a_listing_that_is_not_whole_fails_the_zone_and_deletes_nothing() {
    for (name, call, effect) in [
        ("refused", Call::ListSnapshots, Effect::status(400, "no")),
        ("down", Call::ListSnapshots, Effect::status(503, "Endpoint temporarily unavailable")),
        ("cut", Call::ListSnapshots, Effect::CutBody(200)),
        ("a web page", Call::ListSnapshots, Effect::html()),
        ("half a JSON", Call::ListSnapshots, Effect::malformed_json()),
        ("without a date", Call::ListSnapshots, Effect::Edit("/snapshots/3/created-at", None)),
        ("without an id", Call::ListSnapshots, Effect::Edit("/snapshots/3/id", None)),
        (
            "instances refused",
            Call::ListInstances,
            Effect::status(403, "Forbidden by role policy for compute"),
        ),
        ("instances cut", Call::ListInstances, Effect::CutBody(20)),
        ("unreachable", Call::ListInstances, Effect::Unreachable),
    ] {
        let (stage, _) = Stage::two_by_twenty();
        stage.world.fault(Fault::on(call, effect));
        let report = stage.run(NIGHTLY).await;
        assert_eq!(report.result, RunResult::Failed, "{name}: {}", said(&report));
        assert_eq!(stage.there().len(), 40, "{name}");
        assert!(stage.world.changes().is_empty(), "{name}");
        let text = said(&report);
        assert!(text.contains(call.as_str()) && text.contains("ch-gva-2"), "{name}: {text}");
    }
}

#[tokio::test(start_paused = true)]
async fn point_01_a_second_listing_that_fails_keeps_everything() {
    let (stage, _) = Stage::two_by_twenty();
    stage.world.fault(Fault::on(Call::ListSnapshots, Effect::html()).after(1));
    let report = stage.run(NIGHTLY).await;
    assert_eq!(report.result, RunResult::Partial, "{}", said(&report));
    assert_eq!(stage.there().len(), 40);
    assert_eq!(ended(&report, Action::Export, StepOutcome::Done), 2);
}

#[tokio::test(start_paused = true)]
async fn one_bad_zone_does_not_stop_the_other() {
    let (stage, _) = Stage::two_by_twenty();
    let dark = stage.world.add_zone("de-fra-1");
    stage.world.fault(Fault::on(Call::ListSnapshots, Effect::Unreachable).in_zone(&dark));
    let policy = NIGHTLY.replace("[\"ch-gva-2\"]", "[\"de-fra-1\", \"ch-gva-2\"]");
    let report = stage.run(&policy).await;
    assert_eq!(report.result, RunResult::Partial, "{}", said(&report));
    assert_eq!(stage.there().len(), 20);
    assert!(said(&report).contains("de-fra-1"));
}

#[tokio::test(start_paused = true)]
async fn point_26_snapshots_that_went_with_their_instance_are_not_pruned_and_its_copies_stay() {
    let stage = Stage::new();
    let web = stage.instance("web-1", 5);
    let db = stage.world.add_instance(&stage.zone, "db-1", &[]);
    stage.world.set_disk(db, DiskShape::with_data_mib(1));
    stage.days(db, (0..5).rev());
    let report = stage.run(NIGHTLY).await;
    assert_eq!(report.result, RunResult::Success, "{}", said(&report));
    let copies = || {
        let mut files = crate::stage::files(&stage.archive());
        // That the snapshots ended is a line of the audit log, whose end the archive has.
        files.retain(|(path, _)| !path.to_string_lossy().contains("snapwarden-audit-"));
        files
    };
    let before = copies();
    assert!(before.iter().any(|(path, _)| path.to_str().unwrap().contains(&db.to_string())));

    stage.world.remove_instance(db);
    stage.world.clear_log();
    let report = stage.run(NIGHTLY).await;
    assert_eq!(report.result, RunResult::Success, "{}", said(&report));
    assert_eq!(stage.there(), web);
    assert!(steps(&report, Action::Delete).is_empty() && stage.world.changes().is_empty());
    assert_eq!(copies(), before);
}

#[tokio::test(start_paused = true)]
async fn point_30_a_busy_snapshot_is_blocked_and_the_rest_goes_on() {
    for effect in [
        Effect::status(409, "Snapshot is in use"),
        Effect::operation_fails("busy", "the snapshot is busy"),
        Effect::operation_fails("conflict", "another operation runs"),
        Effect::fails_inline("busy", "the snapshot is busy"),
    ] {
        let (stage, ids) = Stage::two_by_twenty();
        stage.world.fault(Fault::on(Call::DeleteSnapshot, effect).of(ids[0][3].0));
        let report = stage.run(NIGHTLY).await;
        assert_eq!(report.result, RunResult::Success, "{}", said(&report));
        assert_eq!(ended(&report, Action::Delete, StepOutcome::Blocked), 1, "{}", said(&report));
        assert_eq!(ended(&report, Action::Delete, StepOutcome::Done), 19);
        assert!(stage.there().contains(&ids[0][3]));
        let audit = stage.audit();
        assert_eq!(audit.iter().filter(|line| line["outcome"] == "blocked").count(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn point_32_a_deletion_that_fails_is_a_failure_with_its_reason() {
    for (effect, word) in [
        (Effect::fails_inline("fault", "storage is gone"), "storage is gone"),
        (Effect::operation_fails("fault", "storage is gone"), "storage is gone"),
        (Effect::operation_hangs(), "did not end in time"),
        (Effect::Edit("/state", Some(json!("dreaming"))), "dreaming"),
        (Effect::status(403, "Forbidden by role policy for compute"), "delete-snapshot"),
        (Effect::status(403, "Invalid request signature"), "signature"),
    ] {
        let (stage, ids) = Stage::two_by_twenty();
        stage.world.fault(Fault::on(Call::DeleteSnapshot, effect).of(ids[1][0].0));
        let report = stage.run(NIGHTLY).await;
        assert_eq!(report.result, RunResult::Partial, "{word}: {}", said(&report));
        assert_eq!(ended(&report, Action::Delete, StepOutcome::Failed), 1, "{word}: {}", said(&report));
        assert_eq!(ended(&report, Action::Delete, StepOutcome::Done), 19, "{word}");
        assert!(said(&report).contains(word), "{word}: {}", said(&report));
    }
}

#[tokio::test(start_paused = true)]
async fn a_deletion_whose_answer_is_lost_is_done_all_the_same() {
    let (stage, _) = Stage::two_by_twenty();
    stage.world.fault(Fault::on(Call::DeleteSnapshot, Effect::CutAfter).times(1).each());
    let report = stage.run(NIGHTLY).await;
    assert_eq!(report.result, RunResult::Success, "{}", said(&report));
    // The platform may still be at the one that was asked for last.
    stage.seams.clock.sleep(Duration::from_secs(10)).await;
    assert_eq!(stage.there().len(), 20);
}

#[tokio::test(start_paused = true)]
async fn point_34_what_changed_since_the_plan_is_left_alone() {
    let (stage, ids) = Stage::two_by_twenty();
    let victim = ids[0][2];
    stage
        .world
        .fault(Fault::on(Call::GetSnapshot, Effect::Edit("/state", Some(json!("exporting")))).of(victim.0));
    let report = stage.run(NIGHTLY).await;
    assert!(stage.there().contains(&victim));
    assert_eq!(ended(&report, Action::Delete, StepOutcome::Skipped), 1, "{}", said(&report));
    assert!(said(&report).contains("`exporting`"), "{}", said(&report));
}

#[tokio::test(start_paused = true)]
async fn point_10_a_clock_in_doubt_holds_every_deletion_and_nothing_allows_it() {
    for skew in [SignedDuration::from_mins(20), SignedDuration::from_mins(-20)] {
        let (stage, _) = Stage::two_by_twenty();
        // A clock that far off would fail every signature as well; here it is the Date header alone.
        stage.world.fault(Fault::on(Call::ListSnapshots, Effect::DateSkew(skew)));
        let options = RunOptions { allow_deletes: Some(1_000), ..RunOptions::default() };
        let report = stage.run_with(NIGHTLY, &options).await;
        assert_eq!(report.result, RunResult::Held, "{}", said(&report));
        assert_eq!(stage.there().len(), 40);
        assert_eq!(ended(&report, Action::Export, StepOutcome::Done), 2, "all else goes on");
        assert!(said(&report).contains("clock"), "{}", said(&report));
    }
}

#[tokio::test(start_paused = true)]
async fn without_the_apis_time_nothing_is_deleted_and_nothing_allows_it() {
    let (stage, _) = Stage::two_by_twenty();
    stage.world.fault(Fault::on(Call::ListSnapshots, Effect::Header(header::DATE, None)));
    let options = RunOptions { allow_deletes: Some(1_000), ..RunOptions::default() };
    let report = stage.run_with(NIGHTLY, &options).await;
    assert_eq!(report.result, RunResult::Held, "{}", said(&report));
    assert_eq!(stage.there().len(), 40);
    assert!(said(&report).contains("Date"), "{}", said(&report));
}

#[tokio::test(start_paused = true)]
async fn a_plan_beyond_the_guard_is_held_whole_until_it_is_allowed() {
    let (stage, _) = Stage::two_by_twenty();
    let policy = NIGHTLY.replace("max_delete_percent = 100", "max_deletes = 19\nmax_delete_percent = 100");
    let report = stage.run(&policy).await;
    assert_eq!(report.result, RunResult::Held, "{}", said(&report));
    assert_eq!(stage.there().len(), 40);
    let text = said(&report);
    assert!(text.contains("max_deletes = 19") && text.contains("--allow-deletes 20"), "{text}");

    let allow = |count| RunOptions { allow_deletes: Some(count), ..RunOptions::default() };
    assert_eq!(stage.run_with(&policy, &allow(19)).await.result, RunResult::Held);
    assert_eq!(stage.there().len(), 40);
    assert_eq!(stage.run_with(&policy, &allow(20)).await.result, RunResult::Success);
    assert_eq!(stage.there().len(), 20);
}

#[tokio::test(start_paused = true)]
async fn the_guard_adds_up_the_zones_of_a_run() {
    let (stage, _) = Stage::two_by_twenty();
    let other = stage.world.add_zone("de-fra-1");
    let instance = stage.world.add_instance(&other, "web-9", &[]);
    stage.days(instance, (0..20).rev());
    let policy = NIGHTLY
        .replace("[\"ch-gva-2\"]", "[\"ch-gva-2\", \"de-fra-1\"]")
        .replace("max_delete_percent = 100", "max_deletes = 29\nmax_delete_percent = 100")
        .replace("[policies.nightly.export]\narchives = [\"vault\"]\n", "");
    let report = stage.run(&policy).await;
    assert_eq!(report.result, RunResult::Held, "{}", said(&report));
    assert_eq!((stage.there().len(), stage.world.snapshots(&other).len()), (40, 20));
}

#[tokio::test(start_paused = true)]
async fn an_export_that_fails_keeps_its_own_instance_alone() {
    let (stage, ids) = Stage::two_by_twenty();
    let newest = *ids[0].last().unwrap();
    stage
        .world
        .fault(Fault::on(Call::ExportSnapshot, Effect::operation_fails("fault", "no space")).of(newest.0));
    let report = stage.run(NIGHTLY).await;
    assert_eq!(report.result, RunResult::Partial, "{}", said(&report));
    let there = stage.there();
    assert!(ids[0].iter().all(|id| there.contains(id)), "nothing of web-1 may go");
    assert_eq!(there.len(), 30);
    assert_eq!(ended(&report, Action::Delete, StepOutcome::Done), 10);
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_does_not_come_about_is_a_failure_also_where_the_platform_was_busy() {
    for (call, action) in [(Call::ExportSnapshot, Action::Export), (Call::PromoteSnapshot, Action::Promote)] {
        for effect in [
            Effect::status(409, "Template limit reached"),
            Effect::operation_fails("conflict", "another operation runs"),
        ] {
            let (stage, ids) = Stage::two_by_twenty();
            stage.world.fault(Fault::on(call, effect).of(ids[0].last().unwrap().0));
            let report = stage.run(NIGHTLY).await;
            assert_eq!(report.result, RunResult::Partial, "{}", said(&report));
            assert_eq!(ended(&report, action, StepOutcome::Failed), 1, "{}", said(&report));
            assert_eq!(ended(&report, action, StepOutcome::Done), 1, "{}", said(&report));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn point_36_an_image_that_is_not_proved_is_not_published_and_keeps_the_snapshots() {
    for (name, effect, word) in [
        ("no MD5", Effect::Edit("/export/md5sum", None), "MD5"),
        ("an empty MD5", Effect::Edit("/export/md5sum", Some(json!(""))), "MD5"),
        ("another MD5", Effect::Edit("/export/md5sum", Some(json!("0".repeat(32)))), "MD5"),
        ("no address", Effect::Edit("/export", None), "address"),
    ] {
        let (stage, ids) = Stage::two_by_twenty();
        let newest = *ids[0].last().unwrap();
        stage.world.fault(Fault::on(Call::GetSnapshot, effect).of(newest.0));
        let report = stage.run(NIGHTLY).await;
        assert_eq!(report.result, RunResult::Partial, "{name}: {}", said(&report));
        assert_eq!(stage.there().len(), 30, "{name}");
        assert!(said(&report).contains(word), "{name}: {}", said(&report));
        let published = crate::stage::files(&stage.archive());
        let of_it = published.iter().filter(|(path, _)| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            path.to_str().unwrap().contains(&newest.to_string())
                && extension.is_some_and(|extension| extension == "qcow2" || extension == "json")
        });
        assert_eq!(of_it.count(), 0, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_corrupt_download_is_fetched_anew_and_a_cut_one_goes_on_where_it_was() {
    let (stage, ids) = Stage::two_by_twenty();
    let [web, db] = [0, 1].map(|instance| ids[instance].last().unwrap().0);
    stage.world.fault(Fault::on(Call::GetImage, Effect::Corrupt(100_000)).of(web).times(1));
    stage.world.fault(Fault::on(Call::GetImage, Effect::CutBody(600_000)).of(db).times(1));
    let report = stage.run(NIGHTLY).await;
    assert_eq!(report.result, RunResult::Success, "{}", said(&report));
    let size = stage.world.image(SnapshotId(db)).file_bytes();
    let of_db = stage.world.log().into_iter().filter(|exchange| exchange.path.contains(&db.to_string()));
    let fetched: u64 =
        of_db.filter(|exchange| exchange.call == Call::GetImage).map(|one| one.body_bytes()).sum();
    assert!(fetched <= size + size / 50, "{fetched} bytes for an image of {size}");
}

#[tokio::test(start_paused = true)]
async fn an_address_that_expires_is_asked_for_again() {
    let (stage, ids) = Stage::two_by_twenty();
    let newest = ids[0].last().unwrap().0;
    stage.world.fault(Fault::on(Call::GetImage, Effect::Expire(500_000)).of(newest).times(1));
    let report = stage.run(NIGHTLY).await;
    assert_eq!(report.result, RunResult::Success, "{}", said(&report));
}

#[tokio::test(start_paused = true)]
async fn a_promotion_whose_answer_is_lost_makes_no_second_template() {
    let (stage, _) = Stage::two_by_twenty();
    stage.world.fault(Fault::on(Call::PromoteSnapshot, Effect::CutAfter).times(1).each());
    let report = stage.run(NIGHTLY).await;
    assert!(ended(&report, Action::Promote, StepOutcome::Done) <= 2);
    // The first run may not have seen them yet; the second finds them by name.
    stage.step(SignedDuration::from_mins(5));
    let again = stage.run(NIGHTLY).await;
    assert_eq!(again.result, RunResult::Success, "{}", said(&again));
    stage.step(SignedDuration::from_hours(24));
    stage.run(NIGHTLY).await;
    assert_eq!(stage.world.templates(&stage.zone).len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_lost_promotion_takes_no_template_of_a_namesake_for_its_own() {
    let stage = Stage::new();
    let ids = ["web", "web"].map(|name| stage.instance(name, 1)[0]);
    stage.world.fault(Fault::on(Call::PromoteSnapshot, Effect::operation_hangs()).of(ids[0].0).times(1));
    let policy = NIGHTLY.replace("[policies.nightly.export]\narchives = [\"vault\"]\n", "");
    let report = stage.run(&policy).await;
    let promoted = steps(&report, Action::Promote);
    let of = |id| promoted.iter().find(|step| step.facts.snapshot.id == Some(id)).unwrap();
    assert_eq!(of(ids[1]).outcome, StepOutcome::Done, "{}", said(&report));
    assert_eq!(of(ids[0]).outcome, StepOutcome::Failed, "{}", said(&report));

    stage.step(SignedDuration::from_hours(3));
    let again = stage.run(&policy).await;
    assert_eq!(ended(&again, Action::Promote, StepOutcome::Done), 1, "{}", said(&again));
    assert_eq!(stage.world.templates(&stage.zone).len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_lost_promotion_is_found_by_the_name_that_was_asked_for_then() {
    let stage = Stage::new();
    stage.instance("web-1", 1);
    // The template comes, but neither its answer nor the look for it.
    stage.world.fault(Fault::on(Call::PromoteSnapshot, Effect::CutAfter).times(1));
    stage.world.fault(Fault::on(Call::ListTemplates, Effect::html()).after(1).times(1));
    let policy = NIGHTLY.replace("[policies.nightly.export]\narchives = [\"vault\"]\n", "");
    assert_eq!(stage.run(&policy).await.result, RunResult::Partial);
    stage.seams.clock.sleep(Duration::from_mins(1)).await;
    stage.step(SignedDuration::from_hours(3));
    let renamed = policy.replace("{instance}-{created:%Y%m%d}", "golden-{instance}");
    let again = stage.run(&renamed).await;
    assert_eq!(ended(&again, Action::Promote, StepOutcome::Done), 1, "{}", said(&again));
    assert_eq!(stage.world.templates(&stage.zone).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_lost_promotion_is_found_by_the_platforms_clock() {
    // By a clock that is behind, requests are signed for a time that is over.
    for minutes in [-30, 0] {
        let stage = Stage::new();
        stage.instance("web-1", 1);
        stage.world.set_skew(SignedDuration::from_mins(minutes));
        stage.world.fault(Fault::on(Call::PromoteSnapshot, Effect::CutAfter).times(1));
        stage.world.fault(Fault::on(Call::ListTemplates, Effect::html()).after(1).times(1));
        let policy = NIGHTLY.replace("[policies.nightly.export]\narchives = [\"vault\"]\n", "");
        let report = stage.run(&policy).await;
        assert_eq!(ended(&report, Action::Promote, StepOutcome::Failed), 1, "{minutes}: {}", said(&report));
        stage.seams.clock.sleep(Duration::from_mins(1)).await;
        stage.world.set_skew(SignedDuration::ZERO);
        stage.step(SignedDuration::from_hours(3));
        let again = stage.run(&policy).await;
        assert_eq!(ended(&again, Action::Promote, StepOutcome::Done), 1, "{minutes}: {}", said(&again));
        assert_eq!(stage.world.templates(&stage.zone).len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_promotion_remembered_from_the_end_of_time_is_no_panic() {
    let stage = Stage::new();
    stage.instance("web-1", 1);
    stage.world.fault(Fault::on(Call::PromoteSnapshot, Effect::CutBefore).times(1));
    let policy = NIGHTLY.replace("[policies.nightly.export]\narchives = [\"vault\"]\n", "");
    stage.run(&policy).await;
    for edge in ["9999-12-30T21:00:00Z", "-009999-01-03T00:00:00Z"] {
        rewrite_as_version_1(&stage.state(), "nightly", |memory| {
            memory["promotions"][0]["requested_at"] = json!(edge);
            memory["promotions"][0]["template_id"] = Value::Null;
        })
        .await;
        let report = stage.run(&policy).await;
        assert_eq!(ended(&report, Action::Promote, StepOutcome::Done), 1, "{edge}: {}", said(&report));
    }
}

#[tokio::test(start_paused = true)]
async fn older_templates_of_the_policy_go_and_those_of_people_stay() {
    let stage = Stage::new();
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    let policy = NIGHTLY.replace("[policies.nightly.export]\narchives = [\"vault\"]\n", "");
    for _ in 0..4 {
        stage.world.add_snapshot(instance, stage.now());
        let report = stage.run(&policy).await;
        assert_eq!(report.result, RunResult::Success, "{}", said(&report));
        stage.step(SignedDuration::from_hours(24));
    }
    let names: Vec<_> = stage.world.templates(&stage.zone).into_iter().map(|made| made.name).collect();
    assert_eq!(names, ["web-1-20261103", "web-1-20261104"]);
}

#[tokio::test(start_paused = true)]
async fn a_template_whose_answer_was_lost_goes_too_once_there_are_enough_newer_ones() {
    let stage = Stage::new();
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    let policy = NIGHTLY.replace("[policies.nightly.export]\narchives = [\"vault\"]\n", "");
    stage.world.fault(Fault::on(Call::PromoteSnapshot, Effect::CutAfter).times(1));
    // At first it can't be looked for either.
    stage.world.fault(Fault::on(Call::ListTemplates, Effect::status(503, "down")).after(1).times(5));
    for _ in 0..4 {
        stage.world.add_snapshot(instance, stage.now());
        stage.run(&policy).await;
        stage.step(SignedDuration::from_hours(24));
    }
    let names: Vec<_> = stage.world.templates(&stage.zone).into_iter().map(|made| made.name).collect();
    assert_eq!(names, ["web-1-20261103", "web-1-20261104"]);
}

#[tokio::test(start_paused = true)]
async fn a_template_that_somebody_made_later_under_the_name_of_a_lost_one_is_left_alone() {
    let stage = Stage::new();
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    let policy = NIGHTLY
        .replace("[policies.nightly.export]\narchives = [\"vault\"]\n", "")
        .replace("keep = 2", "keep = 1");
    stage.world.fault(Fault::on(Call::PromoteSnapshot, Effect::CutBefore).times(1));
    stage.world.add_snapshot(instance, stage.now());
    let report = stage.run(&policy).await;
    assert_eq!(ended(&report, Action::Promote, StepOutcome::Failed), 1, "{}", said(&report));
    stage.step(SignedDuration::from_hours(24));
    let another = policy
        .replace("policies.nightly", "policies.another")
        .replace("{instance}-{created:%Y%m%d}", "web-1-20261101");
    stage.run(&another).await;

    for _ in 0..2 {
        stage.world.add_snapshot(instance, stage.now());
        stage.run(&policy).await;
        stage.step(SignedDuration::from_hours(24));
    }
    let names: Vec<_> = stage.world.templates(&stage.zone).into_iter().map(|made| made.name).collect();
    assert_eq!(names, ["web-1-20261101", "web-1-20261103"]);
}

#[tokio::test(start_paused = true)]
async fn unknown_states_and_snapshots_without_an_instance_stay() {
    let (stage, ids) = Stage::two_by_twenty();
    stage.world.set_state(ids[0][0], SnapshotState::Unknown("hibernating".into()));
    stage.world.set_state(ids[0][1], SnapshotState::Snapshotting);
    stage.world.set_state(ids[0][2], SnapshotState::Error);
    stage.world.set_instance(ids[0][3], None);
    let report = stage.run(NIGHTLY).await;
    let there = stage.there();
    assert!(ids[0][..4].iter().all(|id| there.contains(id)), "{}", said(&report));
    let warnings: Vec<_> = report.zones.iter().flat_map(|zone| &zone.warnings).collect();
    assert!(warnings.iter().any(|warning| warning.contains("hibernating")), "{warnings:?}");
}

#[tokio::test(start_paused = true)]
async fn an_archive_that_cannot_be_read_keeps_everything_that_needs_it() {
    let (stage, _) = Stage::two_by_twenty();
    // A file where the archive's folder should be.
    snapwarden::disk::replace_file(
        &snapwarden::disk::RealDisk,
        &stage.archive(),
        b"",
        snapwarden::disk::Access::Owner,
    )
    .unwrap();
    let report = stage.run(NIGHTLY).await;
    assert_eq!(stage.there().len(), 40);
    assert_ne!(report.result, RunResult::Success, "an archive that can't be reached is no success");
    assert!(said(&report).contains("vault"), "{}", said(&report));
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_vanished_from_the_archive_is_told_of_in_the_next_run() {
    let (stage, _) = Stage::two_by_twenty();
    let report = stage.run(NIGHTLY).await;
    assert!(report.zones[0].warnings.is_empty(), "{:?}", report.zones[0].warnings);
    let files = crate::stage::files(&stage.archive());
    let (image, _) =
        files.iter().find(|(path, _)| path.extension().is_some_and(|end| end == "qcow2")).unwrap();
    snapwarden::disk::Disk::remove_file(&snapwarden::disk::RealDisk, image).unwrap();
    // Its snapshot is gone as well, so that no export brings it back.
    for id in stage.there() {
        stage.world.remove_snapshot(id);
    }
    let again = stage.run(NIGHTLY).await;
    let warnings = again.zones[0].warnings.join("\n");
    assert!(warnings.contains("vault") && warnings.contains("image is missing"), "{warnings}");
}

#[tokio::test(start_paused = true)]
async fn a_full_archive_publishes_nothing_deletes_nothing_and_says_what_to_do() {
    // Full from the start; and full on the way, since others write as well.
    for (capacity, shrinks) in [(65 << 20, false), (200 << 20, true)] {
        let disk = MemoryDisk::new();
        disk.set_capacity(Some(capacity));
        let stage = Stage::over(Arc::new(disk.clone()));
        disk.create_dir_all(stage.folder.path(), Access::Owner).unwrap();
        let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
        stage.world.set_disk(instance, DiskShape::with_data_mib(8));
        stage.days(instance, (0..20).rev());
        let runner = stage.runner(NIGHTLY);
        if shrinks {
            let used = capacity - disk.free_bytes(stage.folder.path()).unwrap();
            let full = disk.clone();
            // Between the look at the free space and the bytes themselves.
            stage.world.fault(Fault::on(Call::GetImage, Effect::Delay(Duration::from_secs(20))));
            let clock = stage.seams.clock.clone();
            tokio::spawn(async move {
                clock.sleep(Duration::from_secs(12)).await;
                full.set_capacity(Some(used + (3 << 20)));
            });
        }
        let report = runner.run(&runner.policies[0], &RunOptions::default()).await.unwrap();
        let text = said(&report);
        assert_eq!(report.result, RunResult::Partial, "{text}");
        assert_eq!(stage.there().len(), 20, "{text}");
        assert!(text.contains("free some space"), "{text}");
        assert!(text.contains(if shrinks { "the file system is full" } else { "MiB to spare" }), "{text}");
        let catalogue = runner.archives[&"vault".parse().unwrap()].catalogue().await.unwrap();
        assert!(catalogue.copies().is_empty() && catalogue.problems().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn point_40_two_runs_of_one_policy_do_not_overlap() {
    let (stage, _) = Stage::two_by_twenty();
    let (one, other) = (stage.runner(NIGHTLY), stage.runner(NIGHTLY));
    let options = RunOptions::default();
    let (first, second) =
        tokio::join!(one.run(&one.policies[0], &options), other.run(&other.policies[0], &options));
    let refused = first.as_ref().err().or(second.as_ref().err()).expect("one of them is refused");
    assert!(refused.to_string().contains("nightly"), "{refused}");
    assert!(first.is_ok() != second.is_ok());
}

#[tokio::test(start_paused = true)]
async fn told_to_stop_no_new_step_begins() {
    let (stage, _) = Stage::two_by_twenty();
    let options = RunOptions::default();
    options.stop.cancel();
    let report = stage.run_with(NIGHTLY, &options).await;
    assert!(stage.world.changes().is_empty());
    assert_eq!(stage.there().len(), 40);
    assert!(report.zones[0].steps.iter().all(snapwarden::run::report::Step::was_stopped));
    assert_ne!(report.result, RunResult::Success, "a run that was stopped did not do its work");
}

#[tokio::test(start_paused = true)]
async fn told_to_stop_before_its_deletions_a_run_says_that_nothing_was_deleted() {
    let (stage, _) = Stage::two_by_twenty();
    let policy = "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.retention]\nkeep_last = 10\n";
    let options = RunOptions::default();
    options.stop.cancel();
    let report = stage.run_with(policy, &options).await;
    assert_eq!(stage.there().len(), 40);
    assert_ne!(report.result, RunResult::Success, "{}", said(&report));
    assert!(said(&report).contains("is stopping"), "{}", said(&report));
}

#[tokio::test(start_paused = true)]
async fn a_slow_answer_is_given_up_and_asked_again() {
    let (stage, _) = Stage::two_by_twenty();
    stage.world.fault(Fault::on(Call::ListSnapshots, Effect::Delay(Duration::from_secs(45))).times(2));
    stage.world.fault(Fault::on(Call::ListInstances, Effect::status(429, "slow down")).times(1));
    stage.world.fault(Fault::on(Call::ListInstances, Effect::header(header::RETRY_AFTER, "7")).times(1));
    let report = stage.run(NIGHTLY).await;
    assert_eq!(report.result, RunResult::Success, "{}", said(&report));
    let asked: Vec<_> = stage.world.log().into_iter().filter(|one| one.call == Call::ListInstances).collect();
    assert!(asked[1].at.duration_since(asked[0].at) >= SignedDuration::from_secs(7));
}
