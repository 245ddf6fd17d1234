//! Plans of listings in files, as the program prints them: against what another tool keeps, with the offsets of clocks
//! that change, and the table against the JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use snapwarden::disk::{Access, RealDisk, read_named_file, replace_file};

use crate::stage::skipped;

const WEB: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";

/// A folder with a configuration and a listing in it; nothing answers on the network.
struct Paper(tempfile::TempDir);

impl Paper {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        replace_file(&RealDisk, &self.path(name), text.as_bytes(), Access::Owner).unwrap();
    }

    /// A policy with this time zone and these lines as its retention table.
    fn configure(&self, time_zone: &str, retention: &str) {
        let text = format!(
            "[state]\ndirectory = \"{}/state\"\n[policies.nightly]\nzones = [\"ch-gva-2\"]\ntimezone = \"{time_zone}\"\n\
             [policies.nightly.retention]\n{retention}\n",
            self.0.path().display()
        );
        self.write("snapwarden.toml", &text);
    }

    /// What `plan` prints of the listing `snapshots.json` in this format.
    fn plan(&self, at: &str, format: &str) -> String {
        let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_snapwarden"));
        command.env_clear().timeout(Duration::from_mins(1)).arg("--config").arg(self.path("snapwarden.toml"));
        command
            .args(["plan", "--at", at, "--output", format, "--snapshots"])
            .arg(self.path("snapshots.json"));
        let ended = command.output().unwrap();
        let (out, err) = (String::from_utf8(ended.stdout).unwrap(), String::from_utf8_lossy(&ended.stderr));
        assert_eq!((ended.status.code(), &*err), (Some(0), ""), "{out}");
        out
    }

    fn decisions(&self, at: &str) -> Vec<Value> {
        let plan: Value = serde_json::from_str(&self.plan(at, "json")).unwrap();
        plan["policies"][0]["decisions"].as_array().unwrap().clone()
    }
}

fn id(number: usize) -> String {
    format!("00000000-0000-4000-8000-{number:012}")
}

fn listed(number: usize, created_at: &str, state: &str, instance: &str) -> Value {
    json!({
        "id": id(number), "name": format!("snap-{number}"), "created-at": created_at, "state": state, "size": 50,
        "instance": {"id": instance},
    })
}

fn listing(times: &[String]) -> String {
    let snapshots = (1..).zip(times).map(|(number, time)| listed(number, time, "exported", WEB));
    json!({ "snapshots": snapshots.collect::<Vec<_>>() }).to_string()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// restic's words for a policy in ours: -1 is `"all"`, `m` are months; years beyond a thousand are no span of ours.
fn in_our_words(policy: &BTreeMap<String, Value>) -> String {
    let line = |(key, value): (&String, &Value)| match value {
        Value::Number(number) if number.as_i64() == Some(-1) => format!("keep_{key} = \"all\"\n"),
        Value::Number(number) => format!("keep_{key} = {number}\n"),
        span => format!("keep_{key} = \"{}\"\n", text(span).replace('m', "mo").replace("9999y", "1000y")),
    };
    policy.iter().map(line).collect()
}

/// The cases lie beside the project, or where `SNAPWARDEN_SHARED` says. In none of them the two are meant to differ.
#[test]
fn restic_keeps_the_same_as_the_plan_that_is_printed() {
    let folder = std::env::var_os("SNAPWARDEN_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let path = folder.join("retention-cases/restic.json");
    let Ok(cases) = read_named_file(&path, 1 << 24) else {
        skipped(format_args!("there is no {}", path.display()));
        return;
    };
    let cases: Vec<Value> = serde_json::from_str(&cases).unwrap();
    assert_eq!(cases.len(), 36);
    let paper = Paper::new();
    for case in cases {
        let times = |key: &str| -> Vec<String> {
            case[key].as_array().unwrap().iter().map(|time| text(time).to_owned()).collect()
        };
        let instants = |times: &[String]| -> Vec<Timestamp> {
            let mut instants: Vec<Timestamp> = times.iter().map(|time| time.parse().unwrap()).collect();
            instants.sort_unstable();
            instants
        };
        let policy = serde_json::from_value(case["policy"].clone()).unwrap();
        paper.configure(text(&case["timezone"]), &in_our_words(&policy));
        let snapshots = times("snapshots");
        paper.write("snapshots.json", &listing(&snapshots));
        // Windows are measured there from the newest snapshot.
        let newest = instants(&snapshots).pop().unwrap();
        let decisions = paper.decisions(&newest.to_string());
        assert_eq!(decisions.len(), snapshots.len());
        let kept = decisions.iter().filter(|decision| decision["verdict"] == "keep");
        let kept: Vec<String> = kept.map(|one| text(&one["snapshot"]["created_at"]).to_owned()).collect();
        assert_eq!(instants(&kept), instants(&times("keep")), "{}", case["name"]);
    }
}

/// For each zone a listing around a clock change, twice: as the clock on the wall there had it, and in UTC.
#[test]
fn point_12_and_13_a_listing_with_the_offsets_of_a_zone_is_judged_as_the_same_instants_in_utc() {
    let paper = Paper::new();
    let table = "keep_hourly = 40\nkeep_daily = 9\nkeep_weekly = 3\nkeep_within = \"1d\"\nkeep_within_hourly = \"2d\"\nmax_age = \"30d\"";
    for (zone, change, before, after) in [
        ("Europe/Zurich", "2026-03-29T01:00:00Z", "+01:00", "+02:00"),
        ("Europe/Zurich", "2026-10-25T01:00:00Z", "+02:00", "+01:00"),
        ("America/New_York", "2026-03-08T07:00:00Z", "-05:00", "-04:00"),
        ("America/New_York", "2026-11-01T06:00:00Z", "-04:00", "-05:00"),
        ("Australia/Lord_Howe", "2026-04-04T15:00:00Z", "+11:00", "+10:30"),
        ("Australia/Lord_Howe", "2026-10-03T15:30:00Z", "+10:30", "+11:00"),
    ] {
        let change: Timestamp = change.parse().unwrap();
        let at = (change + SignedDuration::from_hours(12)).to_string();
        // Every twenty minutes for three days.
        let instants: Vec<Timestamp> =
            (-180..36).map(|step| change + SignedDuration::from_mins(20 * step)).collect();
        let offset = |instant: &Timestamp| if *instant < change { before } else { after };
        let with_offsets: Vec<String> = instants
            .iter()
            .map(|instant| {
                let offset = offset(instant);
                let minutes: i64 =
                    offset[4..6].parse::<i64>().unwrap() + 60 * offset[1..3].parse::<i64>().unwrap();
                let minutes = if offset.starts_with('-') { -minutes } else { minutes };
                let wall = (*instant + SignedDuration::from_mins(minutes)).to_string();
                wall.replace('Z', offset)
            })
            .collect();
        let in_utc: Vec<String> = instants.iter().map(ToString::to_string).collect();
        assert_ne!(with_offsets, in_utc);
        paper.configure(zone, table);
        paper.write("snapshots.json", &listing(&in_utc));
        let plain = paper.plan(&at, "json");
        paper.write("snapshots.json", &listing(&with_offsets));
        assert_eq!(paper.plan(&at, "json"), plain, "{zone}, {change}");
        let decisions = paper.decisions(&at);
        let kept = decisions.iter().filter(|decision| decision["verdict"] == "keep").count();
        assert!(kept > 40 && kept < decisions.len(), "{zone}, {change}: {kept}");

        // Hours are absolute: where nothing but hours counts, the zone does not.
        let hours = |zone: &str| {
            paper.configure(
                zone,
                "keep_hourly = 40\nkeep_within_hourly = \"36h\"\nkeep_within = \"5h\"\nmax_age = \"48h\"",
            );
            let verdicts = paper.decisions(&at);
            verdicts.iter().map(|one| (one["verdict"].clone(), one["rule"].clone())).collect::<Vec<_>>()
        };
        assert_eq!(hours(zone), hours("UTC"), "{zone}, {change}");
    }
}

/// Numbers of a fixed seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// Layout is nobody's business: a row is a line that begins with a verdict, and of the snapshot that it names first.
#[test]
fn the_table_of_a_plan_tells_the_same_as_its_json() {
    let paper = Paper::new();
    let now: Timestamp = "2026-11-01T12:00:00Z".parse().unwrap();
    let states = ["exported", "exported", "exported", "exported", "ready", "error", "exporting", "odd"];
    for (seed, retention) in [
        (
            1,
            "keep_last = 2\nkeep_daily = 3\nkeep_monthly = \"all\"\nmax_age = \"200d\"\nfailed_after = \"2d\"",
        ),
        (2, "keep_within = \"9d\"\nkeep_within_weekly = \"8w\"\nmax_count = 5\nmin_keep = 2"),
        (3, "max_age = \"30d\"\nmax_count = 6"),
    ] {
        let mut dice = Dice(seed);
        let snapshots: Vec<Value> = (1..=1000)
            .map(|number| {
                let age = SignedDuration::from_mins(i64::try_from(dice.below(500_000)).unwrap() - 3000);
                let state = states[usize::try_from(dice.below(8)).unwrap()];
                let instance = id(usize::try_from(dice.below(60)).unwrap() + 10_000);
                listed(number, &(now - age).to_string(), state, &instance)
            })
            .collect();
        paper.configure("Europe/Zurich", retention);
        paper.write("snapshots.json", &json!({ "snapshots": snapshots }).to_string());
        let at = now.to_string();
        let decisions = paper.decisions(&at);
        assert_eq!(decisions.len(), 1000);
        let table = paper.plan(&at, "text");
        let mut rows: Vec<(String, String, String)> = Vec::new();
        for line in table.lines() {
            let is_word = |character: char| character.is_alphanumeric() || character == '-';
            let mut words = line.split(|character| !is_word(character)).filter(|word| !word.is_empty());
            let Some(verdict) = words.next().filter(|word| ["keep", "DELETE", "ignore"].contains(word))
            else {
                if let Some((.., row)) = rows.last_mut() {
                    row.push_str(line);
                }
                continue;
            };
            if let Some(name) = words.find(|word| word.starts_with("snap-")) {
                rows.push((name.to_owned(), verdict.to_lowercase(), line.to_owned()));
            }
        }
        assert_eq!(rows.len(), 1000, "{table}");
        let rows: BTreeMap<String, (String, String)> =
            rows.into_iter().map(|(name, verdict, row)| (name, (verdict, row))).collect();
        let mut verdicts = BTreeSet::new();
        for decision in &decisions {
            let (verdict, row) = &rows[text(&decision["snapshot"]["name"])];
            assert_eq!(verdict, text(&decision["verdict"]), "{row}");
            for word in text(&decision["reasons"][0]).split_whitespace() {
                assert!(row.contains(word), "`{word}` is missing: {row}");
            }
            verdicts.insert(verdict.clone());
        }
        assert_eq!(verdicts.len(), 3);
    }
}
