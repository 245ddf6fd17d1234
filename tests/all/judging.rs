//! The second judge in whole runs, over a case in which the engine is wrong.
//!
//! In Newfoundland clocks went back over midnight until 2010: at 00:01 of 7 November it was 23:01 of the 6th again. The
//! engine takes the minute that came before for a third day; the second judge knows that it is of the 7th. No snapshot of
//! the platform is so old, and no clock does so any more, so that it is left as it is: here it shows what a fault does. Faults
//! that are planted into the plan, one for each rule, are in `src/run/second_judge/tests.rs`.

use std::time::Duration;

use snapwarden::run::report::RunResult;
use snapwarden::snapshot::SnapshotId;

use crate::stage::{Said, Stage};

/// A process that takes longer hangs.
const PATIENCE: Duration = Duration::from_mins(1);

const KEEP_3_DAYS: &str = r#"
[policies.nightly]
zones = ["ch-gva-2"]
timezone = "America/St_Johns"
[policies.nightly.retention]
keep_daily = 3
"#;

/// The third one is of the minute before clocks went back.
const TAKEN: [&str; 4] =
    ["2010-11-05T15:00:00Z", "2010-11-07T02:30:30Z", "2010-11-07T02:45:00Z", "2010-11-07T12:00:00Z"];

fn stage() -> (Stage, Vec<SnapshotId>) {
    let stage = Stage::new();
    let instance = stage.world.add_instance(&stage.zone, "web-1", &[]);
    let ids = TAKEN.iter().map(|at| stage.world.add_snapshot(instance, at.parse().unwrap())).collect();
    (stage, ids)
}

fn plan(arguments: &[&str]) -> Said {
    let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_snapwarden"));
    Said::of(command.env_clear().timeout(PATIENCE).arg("plan").args(arguments).output().unwrap())
}

#[tokio::test(start_paused = true)]
async fn where_the_judges_disagree_nothing_is_deleted_and_the_case_can_be_played_again() {
    let (stage, ids) = stage();
    let other = stage.instance("db-1", 2);
    let report = stage.run(KEEP_3_DAYS).await;
    assert_eq!(report.result, RunResult::Held, "{:?}", report.zones);
    let held = report.zones[0].held.as_deref().unwrap();
    let file = stage.state().join("disagreement-nightly-ch-gva-2.json");
    for part in
        ["judges disagree", &ids[0].to_string(), "by keep,", "keep (keep_daily)", file.to_str().unwrap()]
    {
        assert!(held.contains(part), "{part}: {held}");
    }
    assert_eq!(stage.there().len(), TAKEN.len() + other.len());
    let plan_sums = report.zones[0].plan.as_ref().unwrap();
    assert_eq!((plan_sums.delete, plan_sums.blocked_by_judge, plan_sums.blocked_by_guard), (1, 1, 0));

    let said = plan(&["--facts", file.to_str().unwrap()]);
    assert_eq!(said.status, 3, "{}", said.err);
    for part in ["delete (keep)", "keep (keep_daily)", "the judges disagree about 1 snapshot"] {
        assert!(said.out.contains(part), "{part}: {}", said.out);
    }
    let said = plan(&["--facts", file.to_str().unwrap(), "--output", "json"]);
    let json = said.json();
    assert_eq!(json["disagree"], true);
    let snapshot = &json["snapshots"][0];
    assert_eq!(snapshot["snapshot"], ids[0].to_string());
    assert_eq!(snapshot["plan"]["verdict"], "delete");
    assert_eq!(snapshot["second_judge"]["verdict"], "keep");
    assert_eq!(json["snapshots"].as_array().unwrap().len(), 1);

    // The case has the instance that it is about, and no other.
    let text = snapwarden::disk::read_named_file(&file, 1 << 20).unwrap();
    assert!(text.contains("web-1") && !text.contains("db-1"), "{text}");
    let said = plan(&["--facts", stage.state().join("no-such-file.json").to_str().unwrap()]);
    assert_eq!(said.status, 1, "{}", said.err);
    assert!(said.err.contains("no-such-file.json"), "{}", said.err);
}

#[tokio::test(start_paused = true)]
async fn a_case_that_cannot_be_written_blocks_all_the_same() {
    let (stage, _) = stage();
    let folder = stage.state().join("disagreement-nightly-ch-gva-2.json");
    let disk = &*stage.seams.disk;
    // Nothing can take the place of a folder.
    snapwarden::disk::create_folders(disk, &folder, snapwarden::disk::Access::Owner).unwrap();
    let report = stage.run(KEEP_3_DAYS).await;
    assert_eq!(report.result, RunResult::Held, "{:?}", report.zones);
    let held = report.zones[0].held.as_deref().unwrap();
    assert!(held.contains("the case could not be written to a file"), "{held}");
    assert_eq!(stage.there().len(), TAKEN.len());
}
