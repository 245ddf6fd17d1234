//! Snapshots and instances by their names and by how their ids begin.

use jiff::SignedDuration;
use serde_json::json;
use snapwarden::disk::{Disk as _, RealDisk};
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::snapshot::SnapshotId;
use snapwarden::state::directory::StateDirectory;

use crate::command_line::{PRUNE, Play, end_of, is_there};

const EXPORTS: &str =
    "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.export]\narchives = [\"vault\"]\n";

impl Play {
    /// The name of a snapshot.
    fn name(&self, id: SnapshotId) -> String {
        let all = self.world.snapshots(&self.zone);
        all.into_iter().find(|snapshot| snapshot.id == id).unwrap().name.into()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_held_and_released_by_its_name_or_by_how_its_id_begins() {
    let (play, ids) = Play::five(PRUNE).await;
    let (first, second) = (play.name(ids[4]), ids[3].short());
    for (text, id) in [(&first, ids[4]), (&second, ids[3])] {
        let said = play.run(&["hold", text, "--until", "30d"]).await;
        assert_eq!((said.status, said.err.as_str()), (0, ""), "{said:?}");
        said.has(&[&id.to_string(), &play.name(id), "until "]);
    }
    let said = play.run(&["holds", "--output", "json"]).await.json();
    assert_eq!(said[0]["about"]["instance_name"], "web-1", "{said}");
    let until: jiff::Timestamp = said[0]["until"].as_str().unwrap().parse().unwrap();
    let days = (until.duration_since(play.begun).as_hours() + 12) / 24;
    assert_eq!(days, 30, "a span is ahead");
    // The table of a terminal of 80 columns shows an id that is taken.
    let mut narrow = play.stranger(&["holds"]);
    let said = end_of({
        narrow.env("COLUMNS", "80");
        narrow
    })
    .await;
    said.has(&[&ids[4].short(), "web-1"]);
    assert!(said.out.lines().all(|line| line.chars().count() <= 80), "{}", said.out);

    // Without network: the holds know it.
    for text in [&first, &second] {
        let said = end_of(play.stranger(&["unhold", text])).await;
        assert_eq!((said.status, said.err.as_str()), (0, ""), "{said:?}");
        said.has(&["is no longer on hold"]);
    }
    assert_eq!(play.run(&["holds"]).await.out, "no snapshot is on hold\n");
    // The zone knows one that is not on hold.
    play.run(&["unhold", &first]).await.has(&[&ids[4].to_string(), "was not on hold"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_of_two_snapshots_is_refused_with_both_and_nothing_is_changed() {
    let (play, ids) = Play::five(PRUNE).await;
    for id in [ids[0], ids[4]] {
        play.world.set_name(id, "db-1_3");
    }
    let (one, two) = (ids[0].to_string(), ids[4].to_string());
    let both =
        ["`db-1_3` is the name of 2 snapshots", one.as_str(), two.as_str(), "in zone ch-gva-2, taken "];
    for arguments in [
        &["hold", "db-1_3"][..],
        &["unhold", "db-1_3"],
        &["promote", "db-1_3", "--zone", "ch-gva-2", "--name", "golden"],
    ] {
        play.run(arguments).await.refused(2, &both);
    }
    for (arguments, words) in [
        (&["hold", "nothing-there"][..], &["`nothing-there`", "zone ch-gva-2, archive vault", "plan"][..]),
        (&["hold", "9ee8c"], &["at least 8 characters"]),
        (&["unhold", "nothing-there"], &["`nothing-there`"]),
        (&["promote", "web-1", "--zone", "ch-gva-2", "--name", "golden"], &["zone ch-gva-2", "`web-1`"]),
    ] {
        play.run(arguments).await.refused(2, words);
    }
    // What can't be asked is named, and a name is not taken blindly.
    end_of(play.stranger(&["hold", "nothing-there"])).await.refused(2, &["not asked", "EXOSCALE_API_KEY"]);
    assert!(play.world.changes().is_empty());
    assert!(!is_there(&play.path("state/holds.json")));

    // One of them is on hold: that one is meant.
    assert_eq!(play.run(&["hold", &two]).await.status, 0);
    end_of(play.stranger(&["unhold", "db-1_3"])).await.has(&[&two, "is no longer on hold"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn holds_of_before_have_no_names_and_are_released_by_what_the_zone_or_the_log_says() {
    let (play, ids) = Play::five(EXPORTS).await;
    for id in [ids[2], ids[0]] {
        assert_eq!(play.run(&["hold", &id.to_string()]).await.status, 0);
    }
    let path = play.path("state/holds.json");
    let mut holds: serde_json::Value = serde_json::from_str(&crate::stage::read(&path)).unwrap();
    for hold in holds["holds"].as_array_mut().unwrap() {
        hold.as_object_mut().unwrap().remove("about").unwrap();
    }
    crate::command_line::write(&path, &holds.to_string());
    // It was exported, so the log has its name.
    assert_eq!(play.run(&["once"]).await.status, 0);
    let said = end_of(play.stranger(&["unhold", &play.name(ids[0])])).await;
    assert_eq!((said.status, said.err.as_str()), (0, ""), "{said:?}");
    let said = play.run(&["unhold", &play.name(ids[2])]).await;
    said.has(&["is no longer on hold (previously forever)"]);
    let state = StateDirectory::at(std::sync::Arc::new(RealDisk), &play.path("state"));
    assert!(state.holds().await.unwrap().holds.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_promoted_by_its_name() {
    let (play, ids) = Play::five(PRUNE).await;
    let said = play
        .run(&["promote", &play.name(ids[1]), "--zone", "ch-gva-2", "--name", "golden", "--output", "json"])
        .await;
    assert_eq!(said.json()["snapshot_id"], json!(ids[1]), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_is_restored_by_the_names_in_the_manifests() {
    let (play, ids) = Play::five(EXPORTS).await;
    assert_eq!(play.run(&["once"]).await.status, 0);
    let name = play.name(ids[0]);
    let instance = play.world.snapshots(&play.zone)[0].instance_id.unwrap();
    play.world.remove_instance(instance);
    let disk = play.path("disk");
    let to = disk.to_str().unwrap();
    for arguments in [
        ["restore", &name, "--to", to].as_slice(),
        &["restore", &ids[0].short(), "--to", to],
        &["restore", "--latest", &instance.short(), "--to", to],
        &["restore", "--latest", "web-1", "--to", to],
    ] {
        let said = end_of(play.stranger(arguments)).await;
        assert_eq!(said.status, 0, "{said:?}");
        said.has(&[&ids[0].to_string()]);
        RealDisk.remove_file(&disk).unwrap();
    }
    let said = end_of(play.stranger(&["restore", "web-1", "--to", to])).await;
    said.refused(1, &["no archive has a verified copy of a snapshot with the id or name `web-1`"]);
}

/// It is three in the morning, and yesterday's disk is wanted.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_without_a_copy_that_still_exists_is_named_with_the_way_to_get_it() {
    let (play, ids) = Play::five(EXPORTS).await;
    assert_eq!(play.run(&["once"]).await.status, 0);
    let to = play.path("disk");
    let to = to.to_str().unwrap();
    let (id, name) = (ids[2].to_string(), play.name(ids[2]));
    let next = format!("snapwarden promote {id} --zone ch-gva-2 --name NAME");
    let said = play.run(&["restore", "--latest", "web-1", "--before", "2 days ago", "--to", to]).await;
    said.refused(
        1,
        &["has no verified copy from before", &id, &name, "still exists in zone ch-gva-2", &next],
    );
    play.run(&["restore", &name, "--to", to]).await.refused(1, &["no archive has", &next]);
    play.run(&["restore", &id, "--to", to]).await.refused(1, &["no archive has", &next]);
    // A copy that is older than what the zone has is restored, and that is said.
    let instance = play.world.snapshots(&play.zone)[0].instance_id.unwrap();
    let newer = play.world.add_snapshot(instance, play.begun);
    let said = play.run(&["restore", "--latest", "web-1", "--to", to]).await;
    assert_eq!(said.status, 0, "{said:?}");
    said.complained(&["not the newest", &newer.to_string(), "snapwarden promote"]);
    RealDisk.remove_file(&play.path("disk")).unwrap();
    let quiet = ["restore", "--latest", "web-1", "--to", to, "-q"];
    let said = end_of(play.stranger(&quiet)).await;
    assert_eq!((said.status, said.err.as_str()), (0, ""), "without credentials nothing is asked");
    RealDisk.remove_file(&play.path("disk")).unwrap();
    // One that was never exported at all.
    play.instance("db-1", 1, 24);
    play.run(&["restore", "--latest", "db-1", "--to", to]).await.refused(1, &["`db-1`", "still exists"]);
    // None that is so old; and where nothing can be asked, that is said.
    let long_ago = (play.begun - SignedDuration::from_hours(24 * 9)).to_string();
    let said = play.run(&["restore", "--latest", "web-1", "--before", &long_ago, "--to", to]).await;
    said.refused(1, &["there is no such snapshot in zone ch-gva-2 either"]);
    let arguments = ["restore", "--latest", "web-1", "--before", "2 days ago", "--to", to];
    end_of(play.stranger(&arguments)).await.refused(1, &["still exists is not known", "EXOSCALE_API_KEY"]);
    play.world.fault(Fault::on(Call::ListSnapshots, Effect::status(403, "Forbidden by role policy")));
    play.run(&arguments).await.refused(1, &["still exists is not known", "zone ch-gva-2", "role policy"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_archives_show_and_verify_the_copies_of_one_instance() {
    let (play, _) = Play::five(&format!("{EXPORTS}snapshots = \"all\"\n")).await;
    let (db, _) = play.instance("a-database-of-note", 2, 24);
    assert_eq!(play.run(&["once"]).await.status, 0);
    let count = async |arguments: &[&str]| {
        let said = end_of(play.stranger(&[arguments, &["--output", "json"]].concat())).await;
        assert_eq!(said.status, 0, "{said:?}");
        said.json()[0]["images"].as_array().unwrap().len()
    };
    for command in ["list", "verify"] {
        assert_eq!(count(&["archive", command]).await, 7);
        assert_eq!(count(&["archive", command, "--instance", "a-database-of-note"]).await, 2);
        assert_eq!(
            count(&["archive", command, "vault", "--instance", &db.short(), "--zone", "ch-gva-2"]).await,
            2
        );
        assert_eq!(count(&["archive", command, "--zone", "de-fra-1"]).await, 0);
        let said = play.run(&["archive", command, "--instance", "nowhere"]).await;
        said.refused(2, &["no instance is known", "`nowhere`"]);
    }
    assert_eq!(count(&["archive", "verify", "--instance", "web-1", "--percent", "40"]).await, 2);
    play.run(&["archive", "prune", "--instance", "web-1"]).await.has(&["no archive has a retention"]);

    // A terminal of 80 columns: a line a copy, and each value whole.
    let mut narrow = play.stranger(&["archive", "list"]);
    let said = end_of({
        narrow.env("COLUMNS", "80");
        narrow
    })
    .await;
    let head = said.out.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(head[0..3], ["INSTANCE", "SNAPSHOT", "TAKEN"], "{}", said.out);
    assert_eq!(said.out.lines().count(), 2 + 7, "{}", said.out);
    assert!(said.out.lines().all(|line| line.chars().count() <= 80), "{}", said.out);
    for snapshot in play.world.snapshots(&play.zone) {
        let line = said.out.lines().find(|line| line.contains(&snapshot.id.short())).unwrap();
        assert!(line.contains(&snapshot.created_at.to_string()) && line.contains("KiB"), "{line}");
    }
    let wide = end_of(play.stranger(&["archive", "list"])).await;
    wide.has(&["MD5", "FILE", ".qcow2"]);
}
