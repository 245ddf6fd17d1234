//! Each snapshot that was ever listed ends as deleted by us, by somebody else, with its instance, or unexplained; the audit log
//! says which, `history` and `explain` show it, and nothing in that log can be changed unnoticed.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use snapwarden::cli::assemble::{self, Use};
use snapwarden::config;
use snapwarden::credentials::Credentials;
use snapwarden::run::context::{RunOptions, Runner};
use snapwarden::run::report::RunReport;
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::world::Somebody;
use snapwarden::snapshot::{InstanceId, Snapshot, SnapshotId};

use crate::command_line::{Play, write};
use crate::stage::{Stage, files, read};

/// Nothing is deleted by it.
const WATCH: &str = "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.retention]\nmax_count = 40\n\
                     [policies.nightly.guard]\nsettle = \"0s\"\n";

/// All but three go.
const PRUNE: &str = "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.retention]\nmax_count = 3\n\
                     [policies.nightly.guard]\nmax_delete_percent = 100\nsettle = \"0s\"\n";

fn ci() -> Somebody {
    Somebody::Key("ci".to_owned(), "EXOci".to_owned())
}

/// The outcome of each line about the end of a snapshot.
fn endings(stage: &Stage) -> BTreeMap<String, Vec<String>> {
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in stage.audit().iter().filter(|line| line["action"] == "vanish") {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        all.entry(text(&line["snapshot"]["id"])).or_default().push(text(&line["outcome"]));
    }
    all
}

fn ending(stage: &Stage, id: SnapshotId) -> String {
    endings(stage).remove(&id.to_string()).map_or_else(String::new, |all| all.join(", "))
}

fn line_of(stage: &Stage, id: SnapshotId) -> Value {
    let lines = stage.audit().into_iter();
    let mut ends = lines.filter(|line| line["action"] == "vanish" && line["snapshot"]["id"] == json!(id));
    ends.next_back().unwrap_or_else(|| panic!("nothing says how {id} ended"))
}

fn unexplained(report: &RunReport) -> u64 {
    report.zones[0].coverage.as_ref().unwrap().unexplained
}

/// The program with a key that may make all calls but these.
fn runner_without(stage: &Stage, forbidden: &[Call]) -> Runner {
    let calls = [
        Call::ListSnapshots,
        Call::ListInstances,
        Call::ListEvents,
        Call::GetSnapshot,
        Call::GetInstance,
        Call::DeleteSnapshot,
        Call::ListQuotas,
    ];
    let allowed: Vec<Call> = calls.into_iter().filter(|call| !forbidden.contains(call)).collect();
    stage.world.add_key("EXOless", "less-secret", &allowed);
    let config = config::parse(&stage.config(WATCH), "test.toml", None).unwrap();
    let credentials = Credentials::new("EXOless", "less-secret", None).unwrap();
    assemble::runner(&config, credentials, &stage.seams, Use::Changing)
        .unwrap_or_else(|refusal| panic!("{}", refusal.text))
}

async fn run_without(stage: &Stage, forbidden: &[Call]) -> RunReport {
    let runner = runner_without(stage, forbidden);
    runner.run(&runner.policies[0], &RunOptions::default()).await.unwrap()
}

fn asked(stage: &Stage, call: Call) -> usize {
    stage.world.log().iter().filter(|exchange| exchange.call == call).count()
}

fn instance_of(stage: &Stage, id: SnapshotId) -> InstanceId {
    let listed = stage.world.snapshots(&stage.zone);
    listed.iter().find(|one| one.id == id).and_then(|one| one.instance_id).unwrap()
}

/// From now on these are listed, whatever there is.
pub(crate) fn listing<'a>(snapshots: impl Iterator<Item = &'a Snapshot>) -> Fault {
    let listed = snapshots.map(|one| {
        json!({ "id": one.id, "name": one.name, "created-at": one.created_at, "state": "exported", "instance": { "id": one.instance_id } })
    });
    let body = json!({ "snapshots": listed.collect::<Vec<_>>() }).to_string();
    let status = http::StatusCode::OK;
    Fault::on(Call::ListSnapshots, Effect::Answer { status, content_type: "application/json", body })
}

#[tokio::test(start_paused = true)]
async fn the_end_of_each_snapshot_is_found_once_and_told() {
    let (stage, [web, db]) = Stage::two_by_twenty();
    let old = stage.instance("old-1", 3);
    let of_old = instance_of(&stage, old[0]);
    stage.run(WATCH).await;
    assert_eq!((endings(&stage).len(), asked(&stage, Call::ListEvents)), (0, 0), "nothing is missing");
    stage.step(SignedDuration::from_hours(24));
    stage.world.delete_snapshot_as(web[0], ci(), "198.51.100.7");
    stage.world.delete_snapshot_as(
        web[1],
        Somebody::User("eve\u{1b}[31m@example.org".to_owned()),
        "2001:db8::7",
    );
    stage.world.remove_snapshot(db[0]);
    stage.world.remove_instance(of_old);
    let report = stage.run(WATCH).await;
    assert_eq!(ending(&stage, web[0]), "deleted_by_other");
    assert_eq!(ending(&stage, web[1]), "deleted_by_other");
    assert_eq!(ending(&stage, db[0]), "unexplained");
    assert!(old.iter().all(|id| ending(&stage, *id) == "deleted_with_instance"), "{:?}", endings(&stage));
    // A second time since one was found to be gone of which the first answer said nothing.
    assert_eq!((endings(&stage).len(), unexplained(&report), asked(&stage, Call::ListEvents)), (6, 1, 2));
    let line = line_of(&stage, web[0]);
    assert_eq!(line["by"]["key_name"], "ci");
    assert_eq!((&line["by"]["key"], &line["by"]["address"]), (&json!("EXOci"), &json!("198.51.100.7")));
    assert_eq!(line["by"]["at"].as_str().unwrap().parse::<Timestamp>().unwrap(), stage.world.now());
    assert_eq!((&line["snapshot"]["instance_name"], &line["policy"]), (&json!("web-1"), &json!("nightly")));
    let line = line_of(&stage, web[1]);
    assert!(
        line["by"]["user"].as_str().unwrap().contains("@example.org") && line["by"]["key"].is_null(),
        "{line}"
    );
    assert!(!line.to_string().contains('\u{1b}'), "{line}");
    let warnings = report.zones[0].warnings.join("\n");
    assert!(
        warnings.contains("1 snapshot vanished unexplained") && warnings.contains("of db-1"),
        "{warnings}"
    );
    assert!(
        warnings.contains("2 snapshots deleted, but not by snapwarden") && warnings.contains("198.51.100.7"),
        "{warnings}"
    );
    assert!(!warnings.contains('\u{1b}'), "{warnings}");

    // Said once; an alert for a week; and asked for as long as there could be another answer.
    for (days, alert, asks) in [(1, 1, 1), (5, 1, 1), (2, 0, 1), (25, 0, 0)] {
        stage.step(SignedDuration::from_hours(24 * days));
        stage.world.clear_log();
        let report = stage.run(WATCH).await;
        assert_eq!((unexplained(&report), asked(&stage, Call::ListEvents)), (alert, asks), "{days}");
        assert_eq!(endings(&stage).values().map(Vec::len).sum::<usize>(), 6);
    }
}

#[tokio::test(start_paused = true)]
async fn what_we_delete_ourselves_is_no_riddle() {
    let (stage, _) = Stage::two_by_twenty();
    for _ in 0..2 {
        stage.run(PRUNE).await;
    }
    assert_eq!((stage.there().len(), endings(&stage).len(), asked(&stage, Call::ListEvents)), (6, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_key_that_may_not_ask_says_so_until_one_may() {
    let (stage, [web, db]) = Stage::two_by_twenty();
    run_without(&stage, &[]).await;
    stage.world.delete_snapshot_as(web[0], ci(), "198.51.100.7");
    let of_db = instance_of(&stage, db[0]);
    stage.world.remove_instance(of_db);
    // Nor about the snapshots and instances themselves: then the listing is believed.
    let report = run_without(&stage, &[Call::ListEvents, Call::GetSnapshot, Call::GetInstance]).await;
    assert_eq!(
        (ending(&stage, web[0]), ending(&stage, db[0])),
        ("unexplained".to_owned(), "deleted_with_instance".to_owned())
    );
    let reason = line_of(&stage, web[0])["reasons"][0].as_str().unwrap().to_owned();
    assert!(reason.starts_with("not allowed to ask"), "{reason}");
    assert_eq!(unexplained(&report), 1);
    let report = run_without(&stage, &[]).await;
    assert_eq!(
        (ending(&stage, web[0]), unexplained(&report)),
        ("unexplained, deleted_by_other".to_owned(), 0)
    );
}

#[tokio::test(start_paused = true)]
async fn an_api_that_does_not_answer_is_asked_again_and_not_for_ever() {
    let (stage, [web, _]) = Stage::two_by_twenty();
    stage.run(WATCH).await;
    stage.world.delete_snapshot_as(web[0], ci(), "198.51.100.7");
    stage.world.remove_snapshot(web[1]);
    stage.world.fault(Fault::on(Call::ListEvents, Effect::status(503, "unavailable")));
    let report = stage.run(WATCH).await;
    assert_eq!((endings(&stage).len(), unexplained(&report)), (0, 0));
    let warnings = report.zones[0].warnings.join("\n");
    assert!(warnings.contains("how 2 snapshots ended is not known yet"), "{warnings}");
    // Silence for days is told.
    stage.step(SignedDuration::from_hours(49));
    let report = stage.run(WATCH).await;
    assert_eq!((ending(&stage, web[0]), unexplained(&report)), ("unexplained".to_owned(), 2));
    stage.world.clear_faults();
    stage.step(SignedDuration::from_hours(24 * 20));
    stage.run(WATCH).await;
    assert_eq!(ending(&stage, web[0]), "unexplained, deleted_by_other");
    assert_eq!(ending(&stage, web[1]), "unexplained");
}

#[tokio::test(start_paused = true)]
async fn what_a_listing_lacks_is_not_gone_before_it_was_asked_for() {
    // A role for pruning alone may not ask for an instance.
    for forbidden in [&[][..], &[Call::GetInstance]] {
        let (stage, [web, _]) = Stage::two_by_twenty();
        run_without(&stage, forbidden).await;
        let all = stage.world.snapshots(&stage.zone);
        stage.world.fault(listing(all.iter().filter(|one| !web[..2].contains(&one.id))));
        let report = run_without(&stage, forbidden).await;
        assert_eq!((endings(&stage).len(), unexplained(&report)), (0, 0), "{:?}", report.zones[0].warnings);
        // An instance that is not listed either.
        stage.world.fault(Fault::on(Call::ListInstances, Effect::Edit("/instances", Some(json!([])))));
        run_without(&stage, forbidden).await;
        assert_eq!(endings(&stage).len(), 0);
        // And once they are gone, that is found.
        stage.world.clear_faults();
        stage.world.remove_snapshot(web[0]);
        run_without(&stage, forbidden).await;
        assert_eq!(
            (ending(&stage, web[0]), ending(&stage, web[1])),
            ("unexplained".to_owned(), String::new())
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_deletion_of_ours_that_seemed_to_fail_is_ours_and_one_with_our_key_alone_is_not() {
    let (stage, [web, db]) = Stage::two_by_twenty();
    stage.run(WATCH).await;
    // It succeeds after it was given up.
    stage.world.fault(Fault::on(Call::DeleteSnapshot, Effect::operation_hangs()).of(web[0].0));
    stage.run(PRUNE).await;
    let tried = stage.audit().into_iter().rfind(|line| line["snapshot"]["id"] == json!(web[0])).unwrap();
    assert_eq!(tried["outcome"], "failed", "{tried}");
    for _ in 0..2 {
        stage.step(SignedDuration::from_hours(24));
        stage.run(WATCH).await;
    }
    stage.world.remove_snapshot(web[0]);
    let own = Somebody::Key("backup".to_owned(), snapwarden::sim::world::API_KEY.to_owned());
    stage.world.delete_snapshot_as(db[19], own, "203.0.113.9");
    stage.step(SignedDuration::from_hours(24));
    stage.run(WATCH).await;
    assert_eq!(
        (ending(&stage, web[0]), ending(&stage, db[19])),
        ("deleted_by_us".to_owned(), "deleted_by_other".to_owned())
    );
    let reason = line_of(&stage, db[19])["reasons"][0].as_str().unwrap().to_owned();
    assert!(
        reason.contains("203.0.113.9") && reason.contains("this audit log has no such deletion"),
        "{reason}"
    );
}

#[tokio::test(start_paused = true)]
async fn after_a_month_without_a_run_events_are_too_old_to_say() {
    let (stage, [web, _]) = Stage::two_by_twenty();
    stage.run(WATCH).await;
    stage.world.delete_snapshot_as(web[0], ci(), "198.51.100.7");
    stage.step(SignedDuration::from_hours(24 * 31));
    stage.run(WATCH).await;
    assert_eq!(ending(&stage, web[0]), "unexplained");
    let reason = line_of(&stage, web[0])["reasons"][0].as_str().unwrap().to_owned();
    assert!(reason.contains("keeps events for 30 days"), "{reason}");
}

#[tokio::test(start_paused = true)]
async fn a_listing_by_a_clock_that_ran_ahead_hides_no_event() {
    let (stage, [web, _]) = Stage::two_by_twenty();
    stage.run(WATCH).await;
    let file = stage.state().join("listed-ch-gva-2.json");
    write(&file, &read(&file).replace("\"at\":\"2026-", "\"at\":\"2028-"));
    stage.world.delete_snapshot_as(web[0], ci(), "198.51.100.7");
    stage.run(WATCH).await;
    assert_eq!(ending(&stage, web[0]), "deleted_by_other");
}

#[tokio::test(start_paused = true)]
async fn by_a_clock_in_doubt_nobody_is_accused() {
    let (stage, [web, _]) = Stage::two_by_twenty();
    stage.run(WATCH).await;
    stage.world.delete_snapshot_as(web[0], ci(), "198.51.100.7");
    let ago = Effect::DateSkew(SignedDuration::from_hours(-24 * 400));
    stage.world.fault(Fault::on(Call::ListSnapshots, ago));
    stage.run(WATCH).await;
    assert_eq!((endings(&stage).len(), asked(&stage, Call::ListEvents)), (0, 0));
    stage.world.clear_faults();
    stage.run(WATCH).await;
    assert_eq!(ending(&stage, web[0]), "deleted_by_other");
}

#[tokio::test(start_paused = true)]
async fn what_we_tried_to_delete_and_what_events_are_too_old_for_is_ours() {
    let (stage, [web, _]) = Stage::two_by_twenty();
    stage.run(WATCH).await;
    stage.world.fault(Fault::on(Call::DeleteSnapshot, Effect::operation_hangs()).of(web[0].0));
    stage.run(PRUNE).await;
    stage.world.clear_faults();
    stage.world.remove_snapshot(web[0]);
    stage.step(SignedDuration::from_hours(24 * 31));
    stage.run(WATCH).await;
    assert_eq!(ending(&stage, web[0]), "deleted_by_us");
}

#[tokio::test(start_paused = true)]
async fn what_is_still_there_days_after_we_tried_to_delete_it_is_not_ours_when_it_vanishes() {
    let (stage, [web, _]) = Stage::two_by_twenty();
    stage.run(WATCH).await;
    stage.world.fault(Fault::on(Call::DeleteSnapshot, Effect::status(403, "no")).of(web[0].0));
    stage.run(PRUNE).await;
    stage.world.clear_faults();
    for _ in 0..2 {
        stage.step(SignedDuration::from_hours(25));
        run_without(&stage, &[Call::ListEvents]).await;
    }
    stage.world.remove_snapshot(web[0]);
    let report = run_without(&stage, &[Call::ListEvents]).await;
    assert_eq!((ending(&stage, web[0]), unexplained(&report)), ("unexplained".to_owned(), 1));
}

#[tokio::test(start_paused = true)]
async fn a_request_of_ours_that_failed_is_not_taken_for_done_because_it_has_an_event() {
    let (stage, [web, _]) = Stage::two_by_twenty();
    stage.run(WATCH).await;
    stage.world.fault(
        Fault::on(Call::DeleteSnapshot, Effect::operation_fails("internal", "It failed")).of(web[0].0),
    );
    stage.run(PRUNE).await;
    stage.world.clear_faults();
    assert!(stage.there().contains(&web[0]));
    let left = stage.world.snapshots(&stage.zone);
    stage.world.fault(listing(left.iter().filter(|one| one.id != web[0])));
    stage.step(SignedDuration::from_hours(24));
    stage.run(WATCH).await;
    assert_eq!(endings(&stage), BTreeMap::new());
}

#[tokio::test(start_paused = true)]
async fn a_listing_from_before_our_deletions_makes_no_strangers_of_us() {
    let (stage, [web, _]) = Stage::two_by_twenty();
    stage.run(WATCH).await;
    let before = stage.world.snapshots(&stage.zone);
    stage.run(PRUNE).await;
    assert!(!stage.there().contains(&web[0]));
    stage.world.fault(listing(before.iter()));
    for _ in 0..2 {
        stage.run(WATCH).await;
        stage.step(SignedDuration::from_hours(24));
    }
    stage.world.clear_faults();
    let report = stage.run(WATCH).await;
    assert_eq!(
        (endings(&stage), unexplained(&report)),
        (BTreeMap::new(), 0),
        "{:?}",
        report.zones[0].warnings
    );
}

#[tokio::test(start_paused = true)]
async fn who_deleted_a_snapshot_is_found_and_said_once_though_a_listing_of_before_still_had_it() {
    let (stage, [web, _]) = Stage::two_by_twenty();
    stage.run(WATCH).await;
    let before = stage.world.snapshots(&stage.zone);
    stage.world.delete_snapshot_as(web[0], ci(), "198.51.100.7");
    for _ in 0..2 {
        stage.step(SignedDuration::from_hours(3));
        stage.world.fault(listing(before.iter()));
        stage.run(WATCH).await;
        stage.world.clear_faults();
        stage.run(WATCH).await;
        assert_eq!(ending(&stage, web[0]), "deleted_by_other");
    }
    assert_eq!(endings(&stage).values().map(Vec::len).sum::<usize>(), 1);
}

#[tokio::test(start_paused = true)]
async fn one_that_we_took_and_that_was_gone_before_it_was_listed_is_looked_for() {
    let (stage, _) = Stage::two_by_twenty();
    stage.run(WATCH).await;
    stage.step(SignedDuration::from_hours(24));
    let before = stage.world.snapshots(&stage.zone);
    stage.world.fault(listing(before.iter()));
    let report = stage.run(&WATCH.replace("zones", "create = true\nzones")).await;
    stage.world.clear_faults();
    let is_new = |one: &Snapshot| before.iter().all(|other| other.id != one.id);
    let taken: Vec<SnapshotId> =
        stage.world.snapshots(&stage.zone).into_iter().filter(is_new).map(|one| one.id).collect();
    assert_eq!((taken.len(), endings(&stage).len()), (2, 0), "{report:?}");
    stage.world.delete_snapshot_as(taken[0], ci(), "198.51.100.7");
    stage.world.remove_snapshot(taken[1]);
    let report = stage.run(WATCH).await;
    assert_eq!(
        (ending(&stage, taken[0]), ending(&stage, taken[1])),
        ("deleted_by_other".to_owned(), "unexplained".to_owned())
    );
    let line = line_of(&stage, taken[0]);
    let name = line["snapshot"]["instance_name"].as_str();
    assert_eq!((unexplained(&report), ["web-1", "db-1"].iter().any(|one| name == Some(one))), (1, true));
}

#[tokio::test(start_paused = true)]
async fn one_that_is_deleted_while_the_events_are_read_is_no_riddle() {
    let (stage, [web, _]) = Stage::two_by_twenty();
    stage.run(WATCH).await;
    let before = stage.world.snapshots(&stage.zone);
    stage.world.fault(listing(before.iter().filter(|one| one.id != web[0])));
    stage.world.fault(Fault::on(Call::GetSnapshot, Effect::Delay(Duration::from_secs(5))));
    stage.world.fault(Fault::on(Call::ListEvents, Effect::Delay(Duration::from_secs(5))).times(1));
    let stranger = async {
        stage.seams.clock.sleep(Duration::from_secs(2)).await;
        assert_eq!(asked(&stage, Call::ListEvents), 1);
        stage.world.delete_snapshot_as(web[0], ci(), "198.51.100.7");
    };
    tokio::join!(stage.run(WATCH), stranger);
    assert_eq!(ending(&stage, web[0]), "deleted_by_other");
}

#[tokio::test(start_paused = true)]
async fn a_program_that_was_killed_after_it_said_so_does_not_say_it_again() {
    let (stage, [web, db]) = Stage::two_by_twenty();
    stage.run(WATCH).await;
    let file = stage.state().join("listed-ch-gva-2.json");
    let before = read(&file);
    stage.world.delete_snapshot_as(web[0], ci(), "198.51.100.7");
    stage.world.remove_snapshot(db[0]);
    stage.run(WATCH).await;
    write(&file, &before);
    let report = stage.run(WATCH).await;
    assert_eq!(
        (ending(&stage, web[0]), ending(&stage, db[0])),
        ("deleted_by_other".to_owned(), "unexplained".to_owned())
    );
    assert_eq!(unexplained(&report), 1, "the alert stays");
    // Nor does one whose listing was not saved after it had found out.
    let before = read(&file);
    let of_db = instance_of(&stage, db[1]);
    stage.world.remove_instance(of_db);
    for _ in 0..2 {
        stage.run(WATCH).await;
        write(&file, &before);
    }
    assert_eq!(ending(&stage, db[0]), "unexplained, deleted_with_instance");
}

/// `history` and `explain` of what others did.
#[tokio::test(flavor = "multi_thread")]
async fn people_are_told_who_deleted_a_snapshot() {
    let (play, ids) = Play::five(WATCH).await;
    assert_eq!(play.run(&["once"]).await.status, 0);
    play.world.delete_snapshot_as(
        ids[0],
        Somebody::Key("ci\u{1b}[2K".to_owned(), "EXOci".to_owned()),
        "198.51.100.7",
    );
    play.world.remove_snapshot(ids[1]);
    let said = play.run(&["once"]).await;
    assert!(said.err.contains("198.51.100.7") || said.out.contains("198.51.100.7"), "{said:?}");
    let said = play.run(&["history", "--action", "vanish"]).await;
    assert_eq!((said.status, said.err.as_str()), (0, ""), "{said:?}");
    said.has(&[
        "DELETED by other",
        "UNEXPLAINED",
        "by the API key ci\\u{1b}[2K (EXOci) from 198.51.100.7",
        "no event of the API says",
    ]);
    assert!(!said.out.contains('\u{1b}') && !said.out.contains("policy nightly"), "{said:?}");
    let known = play.run(&["history", "--action", "vanish", "--output", "json"]).await.json();
    let by: Vec<&Value> = known.as_array().unwrap().iter().map(|line| &line["by"]["address"]).collect();
    assert!(by.len() == 2 && by.contains(&&json!("198.51.100.7")), "{known}");
    let said = play.run(&["explain", &ids[0].short()]).await;
    said.has(&["DELETED, but not by snapwarden", "198.51.100.7"]);
    let said = play.run(&["explain", &ids[1].short()]).await;
    said.has(&["VANISHED, and nothing explains it", "no event of the API says who deleted it"]);
    let said = play.run(&["status"]).await;
    assert_eq!(said.status, 1, "{said:?}");
    assert!(
        said.err.contains("zone ch-gva-2: 1 snapshot vanished within a week, and nothing explains it"),
        "{said:?}"
    );
}

const EXPORTS: &str = "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.retention]\nmax_count = 2\n\
                       [policies.nightly.export]\narchives = [\"vault\"]\n";

fn kept(folder: &Path) -> Vec<Value> {
    let is_kept = |name: &str| name.starts_with("snapwarden-audit-");
    let named =
        files(folder).into_iter().filter(|(path, _)| path.file_name().unwrap().to_str().is_some_and(is_kept));
    named.map(|(_, bytes)| serde_json::from_slice(&bytes).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_changed_or_cut_is_found_by_the_command() {
    let (play, _) = Play::five(EXPORTS).await;
    let said = play.run(&["history", "--verify"]).await;
    assert_eq!(said.status, 0, "{said:?}");
    said.has(&["no line has a link yet"]);
    assert_eq!(play.run(&["once"]).await.status, 0);
    let before = play.everything();
    let said = play.run(&["history", "--verify"]).await;
    assert_eq!((said.status, said.err.as_str()), (0, ""), "{said:?}");
    said.has(&[
        "8 lines checked, from line 1 of audit.jsonl on",
        "archive vault: its last line of ",
        "is in the log",
        "is intact",
    ]);
    assert_eq!(play.everything(), before, "looking changes nothing");
    let known = play.run(&["history", "--verify", "--output", "json"]).await.json();
    assert_eq!(
        (&known["is_intact"], &known["lines"], &known["breaks"]),
        (&json!(true), &json!(8), &json!([]))
    );
    let [head] = &kept(&play.path("vault"))[..] else { panic!("one for this state") };
    assert_eq!((&known["head"]["hash"], &known["archives"][0]["is_in_log"]), (&head["hash"], &json!(true)));
    let status = play.run(&["status", "--output", "json"]).await.json();
    assert_eq!(status["audit"], known["head"]);

    let log = play.path("state/audit.jsonl");
    let text = read(&log);
    let lines: Vec<&str> = text.lines().collect();
    write(&log, &text.replacen("web-1", "web-2", 1));
    let said = play.run(&["history", "--verify"]).await;
    assert_eq!(said.status, 1, "{said:?}");
    said.has(&["BROKEN: line 2 of audit.jsonl: the line that it followed is missing", "was CHANGED"]);
    write(&log, &(lines[..7].join("\n") + "\n"));
    let said = play.run(&["history", "--verify"]).await;
    assert_eq!(said.status, 1, "{said:?}");
    said.has(&["archive vault: BROKEN: it has a last line of", "the log was cut at its end"]);
    write(&log, &text);
    assert_eq!(play.run(&["history", "--verify"]).await.status, 0);
    // A run that changes nothing writes nothing to the archive, and one that can't is no failure.
    let archive = files(&play.path("vault"));
    assert_eq!(play.run(&["once"]).await.status, 0);
    assert_eq!(files(&play.path("vault")), archive);
    play.run(&["history", "--verify", "--since", "1d"]).await.refused(2, &["cannot be used with"]);
}
