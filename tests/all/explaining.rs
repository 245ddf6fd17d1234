//! `explain` and `history`: what is known of a snapshot, and what was changed and why.

use serde_json::{Value, json};
use snapwarden::disk::{Access, Disk as _, RealDisk};
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::snapshot::SnapshotId;

use crate::command_line::{PRUNE, Play, end_of, write};
use crate::stage::{Said, read};

/// Of five snapshots two stay; the newest is exported.
const KEEPS_TWO: &str = "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.retention]\nmax_count = 2\n\
                         [policies.nightly.export]\narchives = [\"vault\"]\n";

impl Play {
    /// What the program says on a terminal of 80 columns: nothing is wider.
    async fn narrow(&self, arguments: &[&str]) -> Said {
        let mut command = self.command(arguments);
        command.env("COLUMNS", "80");
        let said = end_of(command).await;
        for line in said.out.lines() {
            assert!(line.chars().count() <= 80, "`{line}` is too wide:\n{}", said.out);
        }
        said
    }

    fn named(&self, id: SnapshotId) -> String {
        let all = self.world.snapshots(&self.zone);
        all.into_iter().find(|snapshot| snapshot.id == id).unwrap().name.into()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_known_of_a_snapshot_that_exists_is_told() {
    let (play, ids) = Play::five(KEEPS_TWO).await;
    assert_eq!(play.run(&["hold", &ids[4].to_string(), "--reason", "an audit"]).await.status, 0);
    let before = play.everything();
    let said = play.narrow(&["explain", &ids[0].short()]).await;
    assert_eq!((said.status, said.err.as_str()), (0, ""), "{said:?}");
    said.has(&[&ids[0].to_string(), &play.named(ids[0]), "ch-gva-2", "web-1", "exported", "nightly: keep"]);
    said.has(&["none that is known"]);
    let (pruned, doomed) = Play::five(PRUNE).await;
    let said = pruned.narrow(&["explain", &pruned.named(doomed[3])]).await;
    said.has(&["nightly: DELETE (max_count)", "number 4 from the newest"]);
    let said = play.narrow(&["explain", &play.named(ids[4])]).await;
    said.has(&["nightly: keep (hold)", "forever: an audit"]);
    assert_eq!(play.everything(), before, "looking changes nothing");

    assert_eq!(play.run(&["once"]).await.status, 0);
    let said = play.narrow(&["explain", &ids[0].to_string()]).await;
    said.has(&[
        "archive vault: ",
        "verified 20",
        "\nhistory\n",
        "exported",
        "policy nightly, archive vault: ",
    ]);
    let known = play.run(&["explain", &ids[0].to_string(), "--output", "json"]).await.json();
    assert_eq!(known["snapshot"]["id"], json!(ids[0]));
    assert_eq!((&known["snapshot"]["instance_name"], &known["is_listed"]), (&json!("web-1"), &json!(true)));
    assert_eq!(
        (&known["decisions"][0]["policy"], &known["decisions"][0]["verdict"]),
        (&json!("nightly"), &json!("keep"))
    );
    assert_eq!(known["copies"][0]["archive"], "vault");
    assert_eq!(known["history"][0]["outcome"], "done");
    assert_eq!((&known["hold"], &known["not_known"]), (&Value::Null, &json!([])));
}

/// The question at three in the morning: where did it go?
#[tokio::test(flavor = "multi_thread")]
async fn of_one_that_was_deleted_it_is_told_when_by_which_policy_and_why() {
    let (play, ids) = Play::five(KEEPS_TWO).await;
    let name = play.named(ids[3]);
    assert_eq!(play.run(&["once"]).await.status, 0);
    assert_eq!(play.there().len(), 2);
    let words = ["DELETED 20", "by policy nightly", "rule max_count", "number 4 from the newest", "history"];
    let said = play.run(&["explain", &name]).await;
    assert_eq!((said.status, said.err.as_str()), (0, ""), "{said:?}");
    said.has(&words);
    // Where nothing can be asked, the state directory still knows.
    let said = end_of(play.stranger(&["explain", &name])).await;
    assert_eq!(said.status, 1, "{said:?}");
    said.has(&words);
    said.complained(&["not known: ", "EXOSCALE_API_KEY"]);
    play.world.fault(Fault::on(Call::ListSnapshots, Effect::status(403, "Forbidden by role policy")));
    let said = play.run(&["explain", &ids[3].short(), "--output", "json"]).await;
    assert_eq!(said.status, 1, "{said:?}");
    let known = said.json();
    assert_eq!((&known["is_listed"], &known["decisions"]), (&Value::Null, &json!([])), "{known}");
    assert!(known["not_known"][0].as_str().unwrap().contains("zone ch-gva-2"), "{known}");
    let last = known["history"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&last["action"], &last["rule"], &last["policy"]),
        (&json!("delete"), &json!("max_count"), &json!("nightly"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_deleted_is_told_apart_and_a_copy_stays_known() {
    let (play, ids) = Play::five(KEEPS_TWO).await;
    assert_eq!(play.run(&["once"]).await.status, 0);
    let names = [play.named(ids[0]), play.named(ids[1])];
    let instance = play.world.snapshots(&play.zone)[0].instance_id.unwrap();
    play.world.remove_instance(instance);
    let said = play.run(&["explain", &names[0]]).await;
    said.has(&["does not exist any more", "the audit log has no deletion of it", "archive vault: "]);
    // Nothing ever knew the other one.
    let said = play.run(&["explain", &names[1]]).await;
    said.refused(2, &["no snapshot is known", &names[1], "zone ch-gva-2, archive vault"]);
    play.run(&["explain", &ids[1].to_string()]).await.refused(2, &["no snapshot is known"]);
    // A damaged copy is no copy, and is told.
    let image = crate::stage::paths(&play.path("vault"));
    let image = image.iter().find(|path| path.extension().is_some_and(|end| end == "qcow2")).unwrap();
    write(image, "short");
    let said = play.run(&["explain", &ids[0].short()]).await;
    said.has(&["archive vault: ", "the image has 5 bytes where the manifest says"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_without_credentials_keeps_nothing_else_from_being_told() {
    let bucket = "[archives.offsite]\ntype = \"s3\"\nendpoint = \"http://127.0.0.1:9\"\nregion = \"r\"\nbucket = \"backups\"\n";
    let (play, ids) = Play::five(&format!("{bucket}{KEEPS_TWO}")).await;
    let said = play.run(&["explain", &ids[4].short()]).await;
    assert_eq!(said.status, 1, "{said:?}");
    said.has(&["nightly: ", "ch-gva-2"]);
    said.complained(&["not known: archive offsite", "AWS_ACCESS_KEY_ID"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_log_is_a_table_that_says_what_was_deleted_last_and_why() {
    let (play, ids) = Play::five(KEEPS_TWO).await;
    let nothing = end_of(play.stranger(&["history"])).await;
    assert_eq!((nothing.status, nothing.out.as_str()), (0, "no such change stands in the audit log\n"));
    assert_eq!(play.run(&["once"]).await.status, 0);
    play.instance("db-1", 1, 24);
    assert_eq!(play.run(&["once"]).await.status, 0);

    let said = play.narrow(&["history"]).await;
    assert_eq!((said.status, said.err.as_str()), (0, ""), "{said:?}");
    let today = play.begun.strftime("%Y-%m-%d").to_string();
    let deleted: Vec<&str> = said.out.lines().filter(|line| line.contains("DELETED")).collect();
    assert_eq!(deleted.len(), 3, "{}", said.out);
    assert!(deleted[0].starts_with(&today) && deleted[0].contains("web-1"), "{}", said.out);
    for id in &ids[2..] {
        assert!(said.out.contains(&id.short()), "{}", said.out);
    }
    said.has(&["policy nightly: number 3 from the newest", "policy nightly, archive vault: "]);
    // Right below its row.
    let lines: Vec<&str> = said.out.lines().collect();
    let place = lines.iter().position(|line| line.contains(&ids[4].short())).unwrap();
    assert!(lines[place + 1].contains("policy nightly: number 5"), "{}", said.out);

    let all = play.run(&["history", "--output", "json"]).await.json();
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 5, "three deletions and two exports: {all:?}");
    assert!(
        all.iter().all(|change| change["outcome"] == "done" && change["begun_at"].is_string()),
        "{all:?}"
    );
    let count = async |arguments: &[&str]| {
        let said = end_of(play.stranger(&[&["history", "--output", "json"], arguments].concat())).await;
        assert_eq!(said.status, 0, "{said:?}");
        said.json().as_array().unwrap().len()
    };
    let instance = play.world.snapshots(&play.zone).iter().find(|one| one.id == ids[0]).unwrap().instance_id;
    assert_eq!(count(&["--instance", "web-1"]).await, 4);
    assert_eq!(count(&["--instance", &instance.unwrap().short()]).await, 4);
    assert_eq!(count(&["--instance", "db-1", "--action", "export"]).await, 1);
    assert_eq!(count(&["--policy", "nightly", "--since", "1h"]).await, 5);
    assert_eq!(count(&["--policy", "weekly"]).await, 0);
    assert_eq!(count(&["--since", "in 1h"]).await, 0);
    assert_eq!(count(&["--action", "delete"]).await, 3);
    play.run(&["history", "--instance", "nowhere"]).await.refused(2, &["no instance is known", "`nowhere`"]);
    play.run(&["history", "--since", "lately"]).await.refused(2, &["lately", "2 days ago"]);
    // On a pipe each change has its line.
    let said = play.run(&["history", "--action", "delete"]).await;
    assert_eq!(said.out.lines().count(), 4, "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_line_or_a_hostile_name_spoils_no_history() {
    let (play, ids) = Play::five(KEEPS_TWO).await;
    play.world.set_name(ids[4], "evil\n\u{1b}[31mname");
    assert_eq!(play.run(&["once"]).await.status, 0);
    let log = play.path("state/audit.jsonl");
    let text = read(&log);
    RealDisk.append(&log, &text.as_bytes()[..40], Access::Owner).unwrap();
    let number = text.lines().count() + 1;
    for arguments in [&["history"][..], &["explain", &ids[4].to_string()], &["history", "--output", "json"]] {
        let said = play.run(arguments).await;
        assert_eq!(said.status, 0, "{said:?}");
        said.complained(&[&format!("line {number} of audit.jsonl can't be read")]);
        said.has(&[&ids[4].to_string()]);
        assert!(!said.out.contains('\u{1b}') && !said.err.contains('\u{1b}'), "{said:?}");
    }
    // A change that was begun and never ended.
    let last = text.lines().last().unwrap().replace("\"done\"", "\"intended\"");
    write(&log, &format!("{last}\n"));
    play.run(&["history"]).await.has(&["delete begun", "no result is known"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audit_file_that_cannot_be_read_hides_no_other_month_and_is_a_failure() {
    let (play, ids) = Play::five(KEEPS_TWO).await;
    assert_eq!(play.run(&["once"]).await.status, 0);
    RealDisk.create_dir_all(&play.path("state/audit-2026-09.jsonl"), Access::Owner).unwrap();
    for arguments in
        [&["history"][..], &["history", "--instance", "web-1"], &["explain", &ids[4].to_string()]]
    {
        let said = play.run(arguments).await;
        assert_eq!(said.status, 1, "{said:?}");
        said.complained(&["audit-2026-09.jsonl"]);
        said.has(&[&ids[4].to_string()]);
    }
    // What no other file has may stand there.
    let said = play.run(&["history", "--instance", "nowhere"]).await;
    said.refused(1, &["audit-2026-09.jsonl"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_changes_are_shown_unless_a_time_is_given() {
    let (play, _) = Play::five(KEEPS_TWO).await;
    assert_eq!(play.run(&["once"]).await.status, 0);
    let log = play.path("state/audit.jsonl");
    let line = read(&log).lines().last().unwrap().to_owned();
    let many: String =
        (0..200).map(|number| line.replacen("number", &format!("{number}: number"), 1) + "\n").collect();
    write(&log, &many);
    let said = play.run(&["history"]).await;
    assert_eq!(said.out.lines().count(), 51, "{}", said.out);
    assert!(said.out.lines().last().unwrap().contains("199: number"), "{}", said.out);
    said.complained(&["the newest 50; 150 earlier changes with --since"]);
    assert_eq!(play.run(&["history", "--since", "1d"]).await.out.lines().count(), 201);
    assert_eq!(play.run(&["history", "--output", "json"]).await.json().as_array().unwrap().len(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_of_an_instance_that_does_not_exist_fails() {
    let (play, _) = Play::five(KEEPS_TWO).await;
    let said = play.run(&["once", "--instance", "cache-*"]).await;
    assert_eq!(said.status, 1, "{said:?}");
    said.complained(&["no instance that these policies select matches `cache-*`"]);
    assert_eq!(play.there().len(), 5);
    assert_eq!(play.run(&["once", "--instance", "web-*"]).await.status, 0);
    assert_eq!(play.there().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_is_not_valid_keeps_nobody_from_looking_back() {
    let (play, ids) = Play::five(KEEPS_TWO).await;
    assert_eq!(play.run(&["once"]).await.status, 0);
    let file = play.path("snapwarden.toml");
    write(&file, &format!("{}\nkeep_lsat = 3\n[policies\n", read(&file)));
    let why = "the configuration file is not valid: ";
    let said = play.run(&["history", "--action", "delete"]).await;
    assert!(said.status == 1 && said.out.matches("DELETED").count() == 3, "{said:?}");
    said.complained(&[why, "`snapwarden check` says where"]);
    let said = play.run(&["explain", &ids[3].short()]).await;
    assert_eq!(said.status, 1, "{said:?}");
    said.has(&["DELETED 20", "by policy nightly", "rule max_count"]);
    said.complained(&["not known: no zone and no archive is asked: ", why]);
    let unknown = play.run(&["explain", "0badc0de"]).await;
    unknown.refused(2, &["no snapshot is known", why]);
}
