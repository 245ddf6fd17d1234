//! `simulate` as a process: over nothing, over files and over a simulated zone behind a socket.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use snapwarden::clock::{Clock as _, SystemClock};
use snapwarden::disk::{Access, RealDisk};
use snapwarden::sim::clock::SimClock;
use snapwarden::sim::world::{API_KEY, API_SECRET, World};
use snapwarden::snapshot::SnapshotId;
use snapwarden::state::directory::StateDirectory;

const NIGHTLY: &str = "[policies.nightly]\nschedule = \"30 2 * * *\"\ntimezone = \"Europe/Zurich\"\n\
                       zones = [\"ch-gva-2\", \"de-fra-1\"]\ncreate = true\n\
                       [policies.nightly.retention]\nkeep_last = 3\nkeep_weekly = 2\n";

const FROM: &str = "2026-11-01T12:00:00Z";

/// What the process said, and how it ended.
#[derive(Debug)]
struct Said {
    status: Option<i32>,
    out: String,
    err: String,
}

impl Said {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// A folder with a configuration.
struct Desk {
    folder: tempfile::TempDir,
}

impl Desk {
    fn new(config: &str) -> Self {
        let desk = Self { folder: tempfile::tempdir().unwrap() };
        let state = desk.folder.path().join("state");
        desk.write("snapwarden.toml", &format!("[state]\ndirectory = \"{}\"\n{config}", state.display()));
        desk
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        snapwarden::disk::replace_file(&RealDisk, &path, text.as_bytes(), Access::Owner).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Runs `simulate` with these arguments; with credentials, if it is to go online.
    fn simulate(&self, arguments: &[&str], online: bool) -> Said {
        self.run(&[&["simulate"], arguments].concat(), online)
    }

    fn run(&self, arguments: &[&str], online: bool) -> Said {
        let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_snapwarden"));
        command.env_clear().arg("--config").arg(Path::new(self.folder.path()).join("snapwarden.toml"));
        if online {
            command.env("EXOSCALE_API_KEY", API_KEY).env("EXOSCALE_API_SECRET", API_SECRET);
        }
        let ended = command.args(arguments).output().unwrap();
        Said {
            status: ended.status.code(),
            out: String::from_utf8(ended.stdout).unwrap(),
            err: String::from_utf8(ended.stderr).unwrap(),
        }
    }
}

fn listed(number: u32, created_at: &str) -> Value {
    json!({
        "id": format!("00000000-0000-0000-0000-{number:012}"), "name": format!("snap-{number}"),
        "created-at": created_at, "state": "exported", "size": 50,
        "instance": { "id": "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec" },
    })
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn from_nothing_it_tells_how_many_there_will_be_and_leaves_nothing_behind() {
    let desk = Desk::new(NIGHTLY);
    let asked = ["nightly", "--for", "60d", "--from", FROM, "--empty"];
    let said = desk.simulate(&[&asked[..], &["--output", "json"]].concat(), false);
    assert_eq!((said.status, said.err.as_str()), (Some(0), ""), "{said:?}");
    let json = said.json();
    assert_eq!(
        keys(&json),
        [
            "final_held",
            "from",
            "max_held",
            "max_storage_gib",
            "notes",
            "policy",
            "samples",
            "snapshots",
            "ticks",
            "to",
            "zone"
        ]
    );
    let samples = json["samples"].as_array().unwrap();
    assert_eq!((json["ticks"].as_u64(), samples.len()), (Some(60), 61));
    assert_eq!(keys(&samples[0]), ["at", "held", "oldest", "storage_gib"]);
    assert_eq!(samples[0], json!({"at": FROM, "held": 0, "oldest": null, "storage_gib": 0}));
    assert_eq!(samples[1]["at"], "2026-11-02T01:30:00Z");
    assert_eq!(json["final_held"], samples[60]["held"]);
    let lives = json["snapshots"].as_array().unwrap();
    assert_eq!(lives.len(), 60);
    assert_eq!(
        keys(&lives[0]),
        ["born", "died", "held_by", "id", "instance_id", "instance_name", "name", "size_gib"]
    );
    assert!(lives.iter().all(|life| life["id"].is_null()), "{json:#}");
    // At each moment there are as many as were born and did not die; times of one form compare as text.
    for sample in samples {
        let at = sample["at"].as_str().unwrap();
        let there = lives.iter().filter(|life| {
            life["born"].as_str().unwrap() <= at && life["died"].as_str().is_none_or(|died| died > at)
        });
        assert_eq!(there.count() as u64, sample["held"].as_u64().unwrap(), "{sample}");
    }

    let text = desk.simulate(&asked, false);
    assert_eq!((text.status, text.err.as_str()), (Some(0), ""), "{text:?}");
    for words in [
        "60 runs by 30 2 * * * (Europe/Zurich)",
        "REACHES BACK",
        "60 snapshots taken",
        "nothing here is real",
    ] {
        assert!(text.out.contains(words), "{words}: {}", text.out);
    }
    assert!(text.out.lines().count() < 70, "it fits on a screen or two");
    assert!(!desk.folder.path().join("state").exists(), "it remembers nothing");
}

#[test]
fn over_a_file_it_begins_with_what_stands_there() {
    // An export that is required waits for nothing here.
    let exported = format!(
        "[archives.vault]\ntype = \"local\"\npath = \"/nowhere\"\n{}[policies.nightly.export]\n\
         archives = [\"vault\"]\nrequired = true\n",
        NIGHTLY.replace("create = true", "create = false")
    );
    let desk = Desk::new(&exported);
    let snapshots = json!({"snapshots": [
        listed(1, "2026-10-01T12:00:00Z"), listed(2, "2026-10-31T12:00:00Z"), listed(3, "2026-10-30T12:00:00Z"),
    ]});
    let snapshots = desk.write("snapshots.json", &snapshots.to_string());
    let asked = ["nightly", "--for", "30d", "--from", FROM, "--zone", "de-fra-1", "--snapshots", &snapshots];
    let said = desk.simulate(&[&asked[..], &["--output", "json"]].concat(), false);
    assert_eq!((said.status, said.err.as_str()), (Some(0), ""), "{said:?}");
    let json = said.json();
    assert_eq!((&json["zone"], &json["samples"][0]["held"]), (&json!("de-fra-1"), &json!(3)));
    let lives = json["snapshots"].as_array().unwrap();
    let oldest = lives.iter().find(|life| life["name"] == "snap-1").unwrap();
    assert_eq!(oldest["id"], "00000000-0000-0000-0000-000000000001");
    assert!(oldest["died"].is_string(), "{oldest}");
    assert_eq!(lives.iter().find(|life| life["id"].is_null()).unwrap()["size_gib"], 50);
    let notes = json["notes"].to_string();
    assert!(
        notes.contains("takes no snapshots itself") && notes.contains("exports count as done"),
        "{notes}"
    );

    let broken = desk.write("broken.json", "{\"snapshots\": 7}");
    let said = desk.simulate(&["nightly", "--for", "30d", "--snapshots", &broken], false);
    assert_eq!((said.status, said.out.as_str()), (Some(1), ""), "{said:?}");
    assert!(said.err.contains("broken.json"), "{said:?}");
}

#[test]
fn the_picture_stands_alone_and_escapes_what_others_named() {
    let desk = Desk::new(NIGHTLY);
    let snapshots =
        desk.write("snapshots.json", &json!({"snapshots": [listed(1, "2026-10-31T12:00:00Z")]}).to_string());
    let hostile = json!({"instances": [
        {"id": "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec", "name": "<script>alert(1)</script>\u{1b}[31m\u{202e}"},
    ]});
    let instances = desk.write("instances.json", &hostile.to_string());
    let asked = ["nightly", "--for", "2y", "--from", FROM, "--output", "svg", "--snapshots", &snapshots];
    let said = desk.simulate(&[&asked[..], &["--instances", &instances]].concat(), false);
    assert_eq!((said.status, said.err.as_str()), (Some(0), ""), "{said:?}");
    assert!(
        said.out.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\"") && said.out.ends_with("</svg>\n")
    );
    for words in ["keep_last", "keep_weekly", "&lt;script&gt;", "\\u{1b}", "2027"] {
        assert!(said.out.contains(words), "{words}: {}", said.out);
    }
    assert!(!said.out.contains("<script") && !said.out.contains('\u{1b}') && !said.out.contains('\u{202e}'));
    assert!(said.out.len() < 500_000, "{}", said.out.len());
}

#[test]
fn what_makes_no_sense_is_refused_and_says_why() {
    let by_hand = "[policies.by-hand]\nzones = [\"ch-gva-2\"]\n[policies.by-hand.retention]\nkeep_last = 3\n";
    let restless =
        by_hand.replace("by-hand]", "restless]\nschedule = \"* * * * * *\"").replace("by-hand", "restless");
    let desk = Desk::new(&format!("{NIGHTLY}{by_hand}{restless}"));
    for (arguments, words) in [
        (&["nightly", "--empty"][..], "--for"),
        (&["weekly", "--for", "2y", "--empty"], "there is no policy `weekly`"),
        (&["nightly", "--for", "2", "--empty"], "has no unit"),
        (&["nightly", "--for", "2y", "--empty", "--from", "tuesday"], "tuesday"),
        (
            &["nightly", "--for", "2y", "--empty", "--zone", "at-vie-1"],
            "has no zone `at-vie-1`; it has ch-gva-2, de-fra-1",
        ),
        (&["nightly", "--for", "2y", "--empty", "--snapshots", "x.json"], "--snapshots"),
        (&["nightly", "--for", "2y", "--instances", "x.json"], "--snapshots"),
        (
            &["nightly", "--for", "2y", "--empty", "--from", "9998-12-01T00:00:00Z"],
            "beyond the end of the calendar",
        ),
        (&["by-hand", "--for", "2y", "--empty"], "has no `schedule`"),
        (&["restless", "--for", "1000y", "--empty"], "more than 250000 runs"),
    ] {
        let said = desk.simulate(arguments, false);
        assert_eq!((said.status, said.out.as_str()), (Some(2), ""), "{arguments:?}: {said:?}");
        assert!(said.err.contains(words), "{arguments:?}: {said:?}");
    }
    let said = desk.run(&["plan", "--output", "svg"], false);
    assert_eq!((said.status, said.out.as_str()), (Some(2), ""), "{said:?}");
    assert!(said.err.contains("only `simulate` draws pictures"), "{said:?}");
    // So far no schedule is followed, and that is told.
    let said =
        desk.simulate(&["nightly", "--for", "1mo", "--empty", "--from", "9999-11-01T00:00:00Z"], false);
    assert!(said.status == Some(0) && said.out.contains("has no run in that time"), "{said:?}");
    // The beginning of time as computers know it is a time like others.
    let said =
        desk.simulate(&["nightly", "--for", "1mo", "--empty", "--from", "1970-01-01T00:00:00Z"], false);
    assert_eq!(said.status, Some(0), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn over_the_zone_it_sees_what_is_there_and_changes_nothing() {
    let now = SystemClock::start().now();
    let world = World::new(Arc::new(SimClock::starting_at(now)), 7);
    let zone = world.add_zone("ch-gva-2");
    let web = world.add_instance(&zone, "web-1", &[]);
    let other = world.add_instance(&zone, "scratch", &[]);
    let hours = |hours| now - jiff::SignedDuration::from_hours(hours);
    let taken: Vec<SnapshotId> = [1, 2, 700, 1400].map(|ago| world.add_snapshot(web, hours(ago))).into();
    world.add_snapshot(other, hours(5));
    let served = world.serve(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let select = "[policies.nightly.select]\ninstances = [\"web-*\"]\nownership = \"all\"\n";
    let config = format!("[exoscale]\nendpoint = \"{}\"\n{NIGHTLY}{select}", served.endpoint());
    let desk = Desk::new(&config);
    let foreign = Desk::new(&config.replace("ownership = \"all\"\n", ""));
    let state = StateDirectory::open(Arc::new(RealDisk), &desk.folder.path().join("state")).unwrap();
    drop(state);
    let before = world.snapshots(&zone);
    let asked = ["nightly", "--for", "90d", "--output", "json"];
    let said = tokio::task::spawn_blocking(move || {
        let without = desk.simulate(&asked, false);
        assert_eq!((without.status, without.out.as_str()), (Some(78), ""), "{without:?}");
        (desk.simulate(&asked, true), foreign.simulate(&asked, true))
    });
    let (said, foreign) = said.await.unwrap();
    assert_eq!((said.status, said.err.as_str()), (Some(0), ""), "{said:?}");
    let json = said.json();
    assert_eq!((&json["samples"][0]["held"], &json["notes"]), (&json!(4), &json!([])));
    let lives = json["snapshots"].as_array().unwrap();
    let real: Vec<&Value> = lives.iter().filter(|life| !life["id"].is_null()).collect();
    assert_eq!(real.len(), taken.len());
    assert!(lives.iter().all(|life| life["instance_name"] == "web-1"), "{json:#}");
    // Whatever is there now goes in three months of nights.
    assert!(real.iter().all(|life| life["died"].is_string()), "{json:#}");
    // The last three; in the second half of a week also the last one of the week before.
    assert!([3, 4].map(Value::from).contains(&json["final_held"]), "{json:#}");
    // Where it only speaks about what this program made, they stay for ever, and that is told.
    let json = foreign.json();
    let real = json["snapshots"].as_array().unwrap().iter().filter(|life| !life["id"].is_null());
    assert!(
        real.clone().all(|life| life["died"].is_null() && life["held_by"] == json!(["foreign"])),
        "{json:#}"
    );
    assert_eq!(real.count(), taken.len());
    assert_eq!(format!("{before:?}"), format!("{:?}", world.snapshots(&zone)));
}
