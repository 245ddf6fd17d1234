//! `plan` as a process, over listings from files: what people see, what another configuration would change, what
//! the guard would say, and what becomes of bad input.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use snapwarden::disk::{Access, RealDisk};

use crate::command_line::{PRUNE, Play, end_of};
use crate::stage::Said;

/// A process that takes longer hangs.
const PATIENCE: Duration = Duration::from_mins(1);

const AT: &str = "2026-11-24T06:00:00Z";
const WEB: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";
const DB: &str = "1b1c9d9e-0b43-4b23-9b2f-6f7f4b2a9a01";

fn plan(arguments: &[&str], stdin: &str) -> Said {
    let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_snapwarden"));
    let command = command.env_clear().timeout(PATIENCE).arg("plan").args(arguments).write_stdin(stdin);
    let ended = command.output().unwrap();
    Said::of(ended)
}

/// A folder with a listing and configurations.
struct Desk(tempfile::TempDir);

impl Desk {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        snapwarden::disk::replace_file(&RealDisk, &path, text.as_bytes(), Access::Owner).unwrap();
        path
    }

    /// Plans by this configuration over this listing.
    fn plan(&self, config: &str, listing: &Value, more: &[&str]) -> Said {
        let config = self.write("now.toml", config);
        let listing = self.write("listing.json", &listing.to_string());
        let arguments = ["--config", shown(&config), "--at", AT, "--snapshots", shown(&listing)];
        plan(&[&arguments[..], more].concat(), "")
    }
}

fn shown(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Snapshots of one instance, one a day; the newest is of today.
fn daily(instance: &str, count: u32, state: &str) -> Vec<Value> {
    let newest: jiff::Timestamp = "2026-11-24T02:30:00Z".parse().unwrap();
    let taken = |day: u32| newest - jiff::SignedDuration::from_hours(24 * i64::from(day));
    let snapshot = |day: u32| {
        let id = format!("{}-0000-4000-8000-{day:012}", &instance[..8]);
        json!({"id": id, "name": format!("{state}-{day}"), "created-at": taken(day).to_string(), "state": state,
            "size": 50, "instance": {"id": instance}})
    };
    (0..count).map(snapshot).collect()
}

fn listing(snapshots: &[Value]) -> Value {
    json!({ "snapshots": snapshots })
}

fn policy(name: &str, tables: &str) -> String {
    format!("[policies.{name}]\nzones = [\"ch-gva-2\"]\n{tables}")
}

fn keeping(count: u32) -> String {
    policy("nightly", &format!("[policies.nightly.retention]\nmax_count = {count}\n"))
}

/// The listings and policies that the README shows.
fn sample(more: &[&str]) -> Said {
    let file = |name: &str| format!("{}/tests/listings/{name}", env!("CARGO_MANIFEST_DIR"));
    let (config, snapshots, instances) =
        (file("policies.toml"), file("snapshots.json"), file("instances.json"));
    let arguments = ["--config", &config, "--at", AT, "--snapshots", &snapshots, "--instances", &instances];
    plan(&[&arguments[..], more].concat(), "")
}

#[test]
fn people_see_a_timeline_a_table_and_a_sum() {
    let said = sample(&[]);
    assert_eq!((said.status, said.err.as_str()), (0, ""), "{said:?}");
    said.has(&[
        "timelines: # keep  x delete  % keep and delete  o ignore  + to be taken  - none\n",
        "policy nightly, zone ch-gva-2, as of 2026-11-24T06:00:00Z\n",
        "\n  web-1 (9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec): 11 kept, 6 to delete, 1 ignored\n",
        "\n  2026-08-31 x-------------------------#---------------x-----#------x-----#----x#xx###### 2026-11-24\n",
        "\n  instance 5d0b9a44-7c1e-4f0a-8a55-3e0f6f1f2c33, no longer listed: 0 kept, 0 to delete, 1 ignored\n",
        "\n  26 snapshots: 17 kept, 6 to delete, 3 ignored\n",
        "\n  kept only because another policy keeps them: 3\n",
        "\ntotal: 23 kept, 6 to delete, 4 ignored\n",
    ]);
    assert!(!said.out.contains('\u{1b}'), "a pipe has no colours");
    assert!(sample(&["--color", "always"]).out.contains("\u{1b}[38;5;9mDELETE"));
    assert!(!sample(&["--color", "never"]).out.contains('\u{1b}'));
    // Newest first within an instance, each row in the columns of its head.
    let rows: Vec<&str> = said.out.lines().filter(|line| line.contains("web-1_ROOT-100001_")).collect();
    let taken: Vec<&str> =
        rows.iter().filter_map(|row| row.split_whitespace().find(|word| word.ends_with('Z'))).collect();
    assert_eq!(taken.len(), 18, "{rows:#?}");
    assert!(taken.is_sorted_by(|newer, older| newer > older), "{taken:?}");
    let head = said.out.lines().find(|line| line.contains("VERDICT")).unwrap();
    assert_eq!(
        head.split_whitespace().collect::<Vec<_>>(),
        ["VERDICT", "AGE", "TAKEN", "UNTIL", "ID", "SNAPSHOT", "WHY"]
    );
}

#[test]
fn a_plan_from_files_says_what_it_can_know_of_coverage_and_what_not_of_templates() {
    let desk = Desk::new();
    let config = keeping(3)
        + "[policies.nightly.select]\ninstances = [\"web-*\", \"cache-*\"]\n\
        [policies.nightly.promote]\nname = \"{instance}\"\nkeep = 2\n";
    let listing = listing(&daily(WEB, 4, "exported"));
    let templates = "which templates `promote.keep` deletes is not known from files";
    let said = desk.plan(&config, &listing, &[]);
    said.has(&[templates]);
    assert!(!said.out.contains("uncovered"), "the zone may have other instances: {said:?}");
    let instances = desk.write(
        "instances.json",
        &json!({"instances": [{"id": WEB, "name": "web-1"}, {"id": DB, "name": "db-1"}]}).to_string(),
    );
    let said = desk.plan(&config, &listing, &["--instances", shown(&instances)]);
    said.has(&[
        templates,
        "`cache-*`",
        "matches no instance in ch-gva-2",
        "2 instances are uncovered",
        "db-1",
    ]);
}

#[tokio::test]
async fn the_table_of_a_plan_has_room_for_why_on_80_columns() {
    let policies = format!("{PRUNE}[policies.nightly.export]\narchives = [\"vault\"]\n");
    let (play, _) = Play::five(&policies).await;
    let mut command = play.command(&["plan"]);
    command.env("COLUMNS", "80");
    let said = end_of(command).await;
    said.has(&["DELETE", "  after export; numbe"]);
    assert!(said.out.lines().all(|line| line.chars().count() <= 80), "{said:?}");
    let json = play.run(&["plan", "--output", "json"]).await.json();
    assert_eq!(json["policies"][0]["decisions"][4]["after_export"], true, "{json}");
}

#[tokio::test]
async fn a_plan_shows_the_templates_that_are_deleted() {
    let policies =
        format!("{PRUNE}[policies.nightly.promote]\nname = \"{{instance}}-{{created:%s}}\"\nkeep = 1\n");
    let (play, _) = Play::five(&policies).await;
    assert_eq!(play.run(&["once"]).await.status, 0);
    let instance = play.world.snapshots(&play.zone)[0].instance_id.unwrap();
    play.world.add_snapshot(instance, play.begun);
    let said = play.run(&["plan"]).await;
    said.has(&["templates that `promote.keep` does not keep", "1 newer templates of its instance are kept"]);
    let json = play.run(&["plan", "--output", "json"]).await.json();
    let template = &json["policies"][0]["templates"][0];
    assert_eq!((&template["verdict"], &template["rule"]), (&json!("delete"), &json!("keep")), "{json}");
    let name = template["template_name"].as_str().unwrap().to_owned();
    assert_eq!(play.run(&["once"]).await.status, 0);
    assert!(play.world.templates(&play.zone).iter().all(|template| template.name != name));
}

#[test]
fn the_table_tells_the_same_as_the_json() {
    let (text, json) = (sample(&[]), sample(&["--output", "json"]).json());
    let mut told = text.out.lines().filter(|line| line.contains("_ROOT-"));
    for policy in json["policies"].as_array().unwrap() {
        for decision in policy["decisions"].as_array().unwrap() {
            let line = told.next().unwrap();
            let words: Vec<&str> = line.split_whitespace().collect();
            let word = |value: &Value| value.as_str().unwrap().to_owned();
            assert_eq!(words[0].to_lowercase(), word(&decision["verdict"]), "{line}");
            for part in
                [&decision["snapshot"]["name"], &decision["snapshot"]["created_at"], &decision["reasons"][0]]
            {
                assert!(line.contains(&word(part)), "{part} is missing: {line}");
            }
            if let Some(expires) = decision["expires_at"].as_str() {
                assert!(line.contains(&format!("Z  {}", &expires[..10])), "{expires} is missing: {line}");
            }
        }
    }
    assert_eq!(told.next(), None);
}

#[test]
fn it_is_seen_which_policy_holds_a_snapshot_and_by_which_rule() {
    let said = sample(&["--output", "json"]).json();
    let reasons = |policy: usize, name: &str| -> (Value, Vec<String>) {
        let decisions = said["policies"][policy]["decisions"].as_array().unwrap();
        let found = decisions.iter().find(|decision| decision["snapshot"]["name"] == name).unwrap();
        let reasons = found["reasons"].as_array().unwrap().iter();
        (found["rule"].clone(), reasons.map(|reason| reason.as_str().unwrap().to_owned()).collect())
    };
    let (rule, held) = reasons(0, "db-1_ROOT-100002_20251231023000");
    assert_eq!(rule, "keep_daily");
    assert!(held.contains(&"policy `audit` keeps it (keep_yearly)".to_owned()), "{held:?}");
    let (rule, held) = reasons(1, "db-1_ROOT-100002_20261109023000");
    assert_eq!((rule, held[0].as_str()), (json!("policy"), "policy `nightly` keeps it (keep_last)"));
    // The table says it beside the policy's own rules.
    let text = sample(&["nightly"]).out;
    let line = text.lines().find(|line| line.contains("db-1_ROOT-100002_20251231023000")).unwrap();
    for word in ["daily", "also weekly, monthly", "policy `audit` keeps it (keep_yearly)"] {
        assert!(line.contains(word), "{word} is missing: {line}");
    }
}

#[test]
fn what_is_shown_can_be_filtered_and_the_sums_stay() {
    let all = sample(&["--output", "json"]).json();
    let decisions = |json: &Value| -> Vec<Value> {
        let policies = json["policies"].as_array().unwrap();
        policies.iter().flat_map(|policy| policy["decisions"].as_array().unwrap().clone()).collect()
    };
    for verdict in ["delete", "keep", "ignore"] {
        let of_it = decisions(&all).into_iter().filter(|one| one["verdict"] == *verdict);
        let shown = sample(&["--only", verdict, "--output", "json"]).json();
        assert_eq!(decisions(&shown), of_it.collect::<Vec<_>>(), "{verdict}");
    }
    let of_db = decisions(&all).into_iter().filter(|one| one["snapshot"]["instance_name"] == "db-1");
    let shown = sample(&["--instance", "db-*", "--output", "json"]).json();
    assert_eq!(decisions(&shown), of_db.collect::<Vec<_>>());
    let said = sample(&["nightly", "--only", "delete", "--instance", "web-*"]);
    said.has(&["DELETE", "26 snapshots: 17 kept, 6 to delete, 3 ignored"]);
    assert!(!said.out.contains("  keep ") && !said.out.contains("db-1 ("), "{said:?}");
    let said = sample(&["--summary"]);
    said.has(&["26 snapshots: 17 kept, 6 to delete, 3 ignored"]);
    assert!(!said.out.contains("TAKEN") && !said.out.contains("timelines"), "{said:?}");
    let json = sample(&["nightly", "--summary", "--output", "json"]).json();
    assert_eq!((decisions(&json).len(), &json["policies"][0]["plan"]["delete"]), (0, &json!(6)), "{json:#}");
    let refused = sample(&["--instance", "[", "--output", "json"]);
    assert_eq!(refused.status, 2, "{refused:?}");
}

#[test]
fn a_candidate_shows_only_what_it_would_change() {
    let file = format!("{}/tests/listings/candidate.toml", env!("CARGO_MANIFEST_DIR"));
    let json = sample(&["--candidate", &file, "--output", "json"]).json();
    assert_eq!(json["at"], AT);
    let policies = json["policies"].as_array().unwrap();
    assert_eq!(policies.len(), 1, "the other policy is the same: {json:#}");
    let keys = |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
    assert_eq!(keys(&policies[0]), ["change", "changes", "policy", "zone"]);
    assert_eq!((&policies[0]["policy"], &policies[0]["change"]), (&json!("nightly"), &json!("changed")));
    let changes = policies[0]["changes"].as_array().unwrap();
    for change in changes {
        assert_eq!(keys(change), ["candidate", "now", "snapshot"]);
        assert_eq!(keys(&change["now"]), ["blocked_by", "expires_at", "reasons", "rule", "verdict"]);
        assert_eq!(
            keys(&change["snapshot"]),
            ["created_at", "id", "instance_id", "instance_name", "name", "size_gib", "state"]
        );
    }
    let short = |change: &Value| {
        [&change["snapshot"]["created_at"], &change["now"]["rule"], &change["candidate"]["rule"]]
            .map(|value| value.as_str().unwrap().to_owned())
    };
    let short: Vec<[String; 3]> = changes.iter().map(short).collect();
    assert_eq!(
        short,
        [
            ["2026-11-19T02:30:00Z", "keep_daily", "keep"],
            ["2026-11-18T02:30:00Z", "keep_daily", "keep"],
            ["2026-08-31T02:30:00Z", "keep", "keep_monthly"],
        ]
    );
    let of_key =
        |key: &str, now: Value, candidate: Value| json!({ "key": key, "now": now, "candidate": candidate });
    assert_eq!(
        json["keys"],
        json!([
            of_key("policies.nightly.retention.keep_daily", json!(7), json!(5)),
            of_key("policies.nightly.retention.keep_monthly", json!(3), json!(6)),
            of_key("policies.nightly.schedule", json!("30 2 * * *"), Value::Null),
        ])
    );
    assert_eq!(json["losses"], json!([]));
    let said = sample(&["--candidate", &file]);
    said.has(&[
        "  ~ policies.nightly.retention.keep_daily: 7 -> 5\n",
        "  - policies.nightly.schedule: \"30 2 * * *\" -> not set\n",
        "NOW     CANDIDATE  AGE",
        "keep    DELETE     5d 3h   2026-11-19T02:30:00Z",
        "DELETE  keep       85d 3h  2026-08-31T02:30:00Z",
        "\n  3 changes: 2 more to delete, 1 fewer to delete\n",
        "\n  now:        17 kept, 6 to delete, 3 ignored\n  candidate:  16 kept, 7 to delete, 3 ignored\n",
    ]);
    assert!(!said.out.contains("policy audit"), "{said:?}");
    let same = format!("{}/tests/listings/policies.toml", env!("CARGO_MANIFEST_DIR"));
    sample(&["--candidate", &same]).has(&["no changes: every selected snapshot has the same verdict"]);
}

#[test]
fn a_candidate_names_the_instances_that_lose_their_backups_even_if_no_verdict_changes() {
    let desk = Desk::new();
    let snapshots = listing(&[daily(WEB, 3, "exported"), daily(DB, 2, "exported")].concat());
    let making = |name: &str, keys: &str, instances: &str| {
        policy(name, &format!("create = true\n{keys}[policies.{name}.select]\ninstances = [{instances}]\n"))
    };
    let all = format!("\"{WEB}\", \"{DB}\"");
    let now = making("nightly", "", &all);
    for (candidate, expected) in [
        (
            making("nightly", "enabled = false\n", &all),
            "policies.nightly: paused: 2 instances will have no new snapshots",
        ),
        (now.replace("create = true", "create = false"), "policies.nightly.create: removed: 2 instances"),
        (
            making("daily", "", &format!("\"{DB}\"")),
            "policies.nightly: removed: 1 instance will have no new snapshots",
        ),
        (
            making("nightly", "", &format!("\"{WEB}\"")),
            "policies.nightly: selects less: 1 instance will have no",
        ),
        (making("daily", "", &all), ""),
    ] {
        let then = desk.write("then.toml", &candidate);
        let json = desk.plan(&now, &snapshots, &["--candidate", shown(&then), "--output", "json"]).json();
        let losses: Vec<&str> =
            json["losses"].as_array().unwrap().iter().map(|loss| loss.as_str().unwrap()).collect();
        assert_eq!(losses.len(), usize::from(!expected.is_empty()), "{candidate}: {losses:?}");
        assert!(losses.iter().all(|loss| loss.starts_with(expected)), "{candidate}: {losses:?}");
        assert_ne!(json["keys"], json!([]), "{candidate}");
    }
}

#[test]
fn policies_that_are_new_or_gone_and_snapshots_that_only_one_selects_are_changes() {
    let desk = Desk::new();
    let snapshots = listing(&[daily(WEB, 3, "exported"), daily(DB, 2, "exported")].concat());
    let now = [keeping(5), policy("old", "")].concat();
    let narrower = keeping(5).replace(
        "[policies.nightly.retention]",
        &format!(
            "create = true\n[policies.nightly.select]\ninstances = [\"{DB}\"]\n[policies.nightly.retention]"
        ),
    );
    let then = desk.write(
        "then.toml",
        &[narrower, policy("young", "[policies.young.retention]\nmax_count = 1\n")].concat(),
    );
    let said = desk.plan(&now, &snapshots, &["--candidate", shown(&then), "--output", "json"]);
    assert_eq!(said.status, 0, "{said:?}");
    let json = said.json();
    let summary: Vec<(&str, &str, usize)> = json["policies"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| {
            let word = |key: &str| one[key].as_str().unwrap();
            (word("policy"), word("change"), one["changes"].as_array().unwrap().len())
        })
        .collect();
    // Three of web-1 are selected no more; those of db-1 become somebody else's (`create` asks for its own: on paper
    // all are), and one is to be taken.
    assert_eq!(summary, [("nightly", "changed", 4), ("old", "gone", 5), ("young", "new", 5)], "{json:#}");
    let changes = |policy: usize| json["policies"][policy]["changes"].as_array().unwrap();
    let coming = changes(0).iter().find(|change| change["snapshot"]["id"].is_null()).unwrap();
    assert_eq!((&coming["now"], &coming["candidate"]["rule"]), (&Value::Null, &json!("create")));
    assert!(changes(0).iter().filter(|change| change["candidate"].is_null()).count() == 3, "{json:#}");
    assert!(
        changes(1).iter().all(|change| change["candidate"].is_null() && change["now"]["verdict"] == "keep")
    );
    assert!(changes(2).iter().all(|change| change["now"].is_null()), "{json:#}");
    let text = desk.plan(&now, &snapshots, &["--candidate", shown(&then)]);
    text.has(&[
        "policy old, zone ch-gva-2: REMOVED",
        "policy young, zone ch-gva-2: NEW",
        "not selected",
        "(to be taken)",
    ]);
    // One that neither has is a slip.
    let said = desk.plan(&now, &snapshots, &["--candidate", shown(&then), "nightli"]);
    assert_eq!(said.status, 2, "{said:?}");
    // What is wrong with the candidate is said as for the present one.
    let broken = desk.write("broken.toml", "[policies.nightly]\nzone = 1\n");
    let said = desk.plan(&now, &snapshots, &["--candidate", shown(&broken)]);
    assert!(said.status == 78 && said.err.contains("broken.toml"), "{said:?}");
}

/// What the guard says of each case beforehand, as JSON and at the end of the table.
fn judged(cases: &[(&str, String, Value, Option<&str>)]) {
    for (what, config, listing, trips) in cases {
        let desk = Desk::new();
        let json = desk.plan(config, listing, &["--output", "json"]);
        assert_eq!(json.status, 0, "{what}: {json:?}");
        let (held, text) = (json.json()["policies"][0]["held"].clone(), desk.plan(config, listing, &[]).out);
        let deletes = text.matches("DELETE ").count();
        assert!(deletes > 0, "{what}: nothing would be deleted: {text}");
        let Some(limit) = trips else {
            assert_eq!(held, Value::Null, "{what}");
            assert!(!text.contains("BLOCKED") && text.contains("the guard allows this"), "{what}: {text}");
            continue;
        };
        let held = held.as_str().unwrap_or_else(|| panic!("{what}: {text}"));
        let end = text.trim_end().lines().last().unwrap();
        assert!(
            end.starts_with("  BLOCKED:  by the guard: ") && end.ends_with(held),
            "{what}: it stands at the end: {end}"
        );
        let way_out = format!("snapwarden once nightly --allow-deletes {deletes}");
        for word in [*limit, &way_out, "snapwarden allow nightly"] {
            assert!(held.contains(word), "{what}: `{word}` is missing: {held}");
        }
    }
}

#[test]
fn the_guard_is_told_of_beforehand_at_each_limit_exactly() {
    let guard = |line: &str| format!("{}[policies.nightly.guard]\n{line}\n", keeping(10));
    let good = |count: u32| listing(&daily(WEB, count, "exported"));
    judged(&[
        ("5 go, 5 may", guard("max_deletes = 5"), good(15), None),
        ("6 go, 5 may", guard("max_deletes = 5"), good(16), Some("max_deletes = 5")),
        ("10 of 20 go", guard("max_delete_percent = 0"), good(20), None),
        ("11 of 21 go, more than half", guard(""), good(21), Some("max_delete_percent = 50")),
        ("15 of 25 go, 60 % may", guard("max_delete_percent = 60"), good(25), None),
        (
            "15 of 25 go, 59 % may",
            guard("max_delete_percent = 59"),
            good(25),
            Some("max_delete_percent = 59"),
        ),
    ]);
}

#[test]
fn failed_ones_count_for_max_deletes_and_not_for_the_share_of_good_ones() {
    let guard =
        |line: &str| format!("{}failed_after = \"2d\"\n[policies.nightly.guard]\n{line}\n", keeping(20));
    // Good ones of the last days, and twelve failed ones that are older.
    let mut all = daily(DB, 5, "exported");
    for mut failed in daily(DB, 15, "error").split_off(3) {
        failed["id"] = json!(failed["id"].as_str().unwrap().replace("4000", "4001"));
        all.push(failed);
    }
    judged(&[
        ("no good one goes", guard("max_delete_percent = 0"), listing(&all), None),
        ("12 failed ones go, 12 may", guard("max_deletes = 12"), listing(&all), None),
        ("12 failed ones go, 11 may", guard("max_deletes = 11"), listing(&all), Some("max_deletes = 11")),
    ]);
}

#[test]
fn this_machine_cannot_be_told_from_a_file() {
    let desk = Desk::new();
    let mine = policy(
        "mine",
        "[policies.mine.select]\ninstances = [\"self\"]\n[policies.mine.retention]\nmax_count = 2\n",
    );
    let config = [keeping(1), mine].concat();
    let snapshots = listing(&daily(WEB, 3, "exported"));
    let said = desk.plan(&config, &snapshots, &["mine"]);
    assert_eq!(said.status, 1, "{said:?}");
    for word in ["policy mine, zone ch-gva-2", "`self`", "a listing from a file does not say which instance"]
    {
        assert!(said.err.contains(word), "{said:?}");
    }
    // Others can be planned; what it may keep of any instance stays.
    let said = desk.plan(&config, &snapshots, &["nightly", "--output", "json"]);
    assert_eq!((said.status, said.err.as_str()), (0, ""), "{said:?}");
    let verdicts: Vec<Value> = said.json()["policies"][0]["decisions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|decision| decision["rule"].clone())
        .collect();
    assert_eq!(verdicts[1..], [json!("policy"), json!("max_count")], "{said:?}");
    desk.plan(&config, &snapshots, &["nightly"]).has(&["policy mine selects by `self`"]);
}

#[test]
fn what_is_no_file_with_a_listing_is_refused_or_read_to_its_end() {
    let desk = Desk::new();
    let config = desk.write("now.toml", &[keeping(1), policy("other", "")].concat());
    let over = |path: &str, stdin: &str| {
        plan(&["--config", shown(&config), "--at", AT, "--output", "json", "--snapshots", path], stdin)
    };
    // A pipe can be read once: policies share what it brought.
    let said = over("/dev/stdin", &listing(&daily(WEB, 3, "exported")).to_string());
    assert_eq!((said.status, said.json()["policies"].as_array().unwrap().len()), (0, 2), "{said:?}");
    let huge = desk.write("huge.json", "");
    std::fs::OpenOptions::new().write(true).open(&huge).unwrap().set_len((1 << 30) + 1).unwrap();
    let bytes = desk.write("bytes.json", "");
    std::fs::OpenOptions::new().write(true).open(&bytes).unwrap().set_len(8).unwrap();
    let deep = desk.write("deep.json", &"[".repeat(100_000));
    for (path, why) in [
        (desk.0.path().to_path_buf(), "directory"),
        (huge, "more than 1073741824 bytes"),
        (bytes, "line 1 column 1"),
        (deep, "expected an object with `snapshots`"),
        (desk.0.path().join("none.json"), "No such file"),
    ] {
        let said = over(shown(&path), "");
        assert_eq!((said.status, said.out.as_str()), (1, ""), "{said:?}");
        assert!(said.err.contains(shown(&path)) && said.err.contains(why), "{why}: {said:?}");
    }
}

#[test]
fn impossible_moments_and_dates_are_refused_and_the_ends_of_time_are_answered() {
    let desk = Desk::new();
    let snapshots = |taken: &[&str]| {
        let mut all = daily(WEB, 3, "exported");
        for (one, taken) in all.iter_mut().zip(taken) {
            one["created-at"] = json!(taken);
        }
        listing(&all)
    };
    let (config, usual) =
        (desk.write("usual.toml", &keeping(1)), desk.write("usual.json", &snapshots(&[]).to_string()));
    let as_of = |at: &str| {
        plan(&["--config", shown(&config), "--snapshots", shown(&usual), &format!("--at={at}")], "")
    };
    assert_eq!(as_of(AT).status, 0);
    for at in ["", "tuesday", "2026-02-30T00:00:00Z", "2026-11-31", "10000-01-01T00:00:00Z", "99999999999"] {
        let said = as_of(at);
        assert!(said.status == 2 && said.err.contains("--at"), "{at:?}: {said:?}");
    }
    for date in ["", "2026-02-30T00:00:00Z", "2026-13-01T00:00:00Z", "yesterday", "99999-01-01T00:00:00Z"] {
        let said = desk.plan(&keeping(1), &snapshots(&[date]), &[]);
        assert!(said.status == 1 && said.err.contains("listing.json"), "{date:?}: {said:?}");
    }
    let config = policy(
        "nightly",
        "timezone = \"Pacific/Apia\"\n[policies.nightly.retention]\nkeep_within = \"99y\"\nkeep_daily = 4294967295\n\
         keep_yearly = \"all\"\nmax_age = \"98y\"\n",
    );
    let ends = snapshots(&["-009999-01-03T00:00:00Z", "9999-12-30T00:00:00Z", "1970-01-01T00:00:00Z"]);
    for at in ["-009999-01-03T00:00:00Z", "1970-01-01T00:00:00Z", "9999-12-30T22:00:00Z"] {
        let with = format!("--at={at}");
        for format in ["text", "json"] {
            let config = desk.write("ends.toml", &config);
            let listing = desk.write("ends.json", &ends.to_string());
            let arguments =
                ["--config", shown(&config), &with, "--snapshots", shown(&listing), "--output", format];
            let said = plan(&arguments, "");
            assert_eq!((said.status, said.err.as_str()), (0, ""), "{at}: {said:?}");
            assert!(said.out.contains("exported-0") && !said.out.contains("panicked"), "{at}: {said:?}");
        }
    }
}
