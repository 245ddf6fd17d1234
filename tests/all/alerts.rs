//! The alert rules of the README, judged by promtool: two daemons have a policy of one name in two zones each, and each
//! rule says which of them has its problem, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::process::Command;

const README: &str = include_str!("../../README.md");

/// Two hours of a schedule by the hour: then a policy is late.
const EVALUATED_AT: &str = "3h";

const DAEMON: &str = "job=\"snapwarden\",instance=\"b:9788\"";
const POLICY: &str = "job=\"snapwarden\",instance=\"b:9788\",policy=\"nightly\"";
const ZONE: &str = "job=\"snapwarden\",instance=\"b:9788\",policy=\"nightly\",zone=\"de-fra-1\"";
const ARCHIVE: &str = "job=\"snapwarden\",instance=\"b:9788\",archive=\"vault\"";

/// The expressions of the table of alerts, in its order.
fn expressions() -> Vec<String> {
    let table = README.split("Alert on these:").nth(1).unwrap().split("\n##").next().unwrap();
    let rows = table.lines().filter_map(|line| line.strip_prefix("| ")?.split_once(" | `"));
    let cells = rows.map(|(_, cell)| cell.trim_end_matches("` |").replace("\\|", "|"));
    cells.flat_map(|cell| cell.split("`, `").map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// Everything that the rules read, of two daemons that are well; the series with their values.
fn well() -> BTreeMap<String, String> {
    let mut series = BTreeMap::new();
    let mut add = |name: &str, labels: &str, values: &str| {
        let name = if name == "up" { name.to_owned() } else { format!("snapwarden_{name}") };
        series.insert(format!("{name}{{{labels}}}"), values.to_owned());
    };
    // As the clock, or since a day before it began.
    let (now, long_ago) = ("0+600x24", "-86400x24");
    for daemon in [DAEMON.to_owned(), DAEMON.replace("b:", "a:")] {
        for (name, values) in [
            ("up", "1x24"),
            ("state_last_write_successful", "1x24"),
            ("config_last_reload_successful", "1x24"),
            ("scheduler_last_tick_timestamp_seconds", now),
        ] {
            add(name, &daemon, values);
        }
        let archive = format!("{daemon},archive=\"vault\"");
        for (name, values) in [
            ("archive_corrupt_images", "0x24"),
            ("archive_readable", "1x24"),
            ("archive_present", "1x24"),
            ("archive_last_verify_timestamp_seconds", now),
        ] {
            add(name, &archive, values);
        }
        let policy = format!("{daemon},policy=\"nightly\"");
        for (name, values) in [
            ("policy_enabled", "1x24"),
            ("policy_created_timestamp_seconds", long_ago),
            ("policy_expected_interval_seconds", "3600x24"),
            ("policy_missed_runs_total", "0x24"),
            ("export_checksum_mismatches_total", "0x24"),
        ] {
            add(name, &policy, values);
        }
        for result in ["success", "failed", "partial", "held", "skipped"] {
            add("policy_runs_total", &format!("{policy},result=\"{result}\""), "0x24");
        }
        for zone in ["ch-gva-2", "de-fra-1"] {
            let of_zone = format!("{policy},zone=\"{zone}\"");
            for (name, values) in [
                ("policy_last_success_timestamp_seconds", now),
                ("policy_held", "0x24"),
                ("policy_unmatched", "0x24"),
                ("policy_last_run_result", "0x24"),
                ("pending_deletes", "0x24"),
                ("export_gate_oldest_timestamp_seconds", now),
            ] {
                add(name, &of_zone, values);
            }
            for state in ["fresh", "stale", "none", "vanished"] {
                let values = if state == "fresh" { "3x24" } else { "0x24" };
                add("policy_instances", &format!("{of_zone},state=\"{state}\""), values);
            }
            for state in ["covered", "uncovered", "exempt"] {
                let values = if state == "uncovered" { "0x24" } else { "3x24" };
                add("instances", &format!("{daemon},zone=\"{zone}\",state=\"{state}\""), values);
            }
        }
    }
    series
}

/// Something that is wrong with one daemon, in one zone.
struct Problem {
    /// A piece of the rule that is to fire.
    rule: String,
    series: String,
    /// None: it is absent.
    values: Option<&'static str>,
    /// Of the alert.
    labels: String,
}

fn problem(name: &str, labels: &str, values: &'static str) -> Problem {
    let name = if name == "up" { name.to_owned() } else { format!("snapwarden_{name}") };
    Problem {
        series: format!("{name}{{{labels}}}"),
        rule: name,
        values: Some(values),
        labels: labels.to_owned(),
    }
}

fn problems() -> Vec<Problem> {
    // Ten minutes before the rules are evaluated.
    let one_more = "0x17 1x6";
    let success = "policy_last_success_timestamp_seconds";
    let by = |labels: &str, label: &str| format!("{labels},{label}");
    let mut all = vec![
        Problem { rule: "up{job=\"snapwarden\"} ==".to_owned(), ..problem("up", DAEMON, "0x24") },
        Problem { rule: format!("- snapwarden_{success}"), ..problem(success, ZONE, "0x24") },
        Problem { rule: "unless".to_owned(), values: None, ..problem(success, ZONE, "") },
        Problem {
            rule: "snapwarden_policy_last_run_result >".to_owned(),
            ..problem("policy_last_run_result", ZONE, "2x24")
        },
        problem("policy_held", ZONE, "1x24"),
        problem("pending_deletes", ZONE, "4x24"),
        problem("policy_unmatched", ZONE, "1x24"),
        problem("instances", &by(DAEMON, "zone=\"de-fra-1\",state=\"uncovered\""), "2x24"),
        problem("policy_missed_runs_total", POLICY, one_more),
        problem("archive_corrupt_images", ARCHIVE, "1x24"),
        problem("archive_readable", ARCHIVE, "0x24"),
        problem("archive_present", ARCHIVE, "0x24"),
        problem("archive_last_verify_timestamp_seconds", ARCHIVE, "-2592000x24"),
        problem("export_gate_oldest_timestamp_seconds", ZONE, "-129600x24"),
        problem("export_checksum_mismatches_total", POLICY, one_more),
        problem("state_last_write_successful", DAEMON, "0x24"),
        problem("config_last_reload_successful", DAEMON, "0x24"),
        problem("scheduler_last_tick_timestamp_seconds", DAEMON, "0x24"),
    ];
    for state in ["stale", "none", "vanished"] {
        all.push(problem("policy_instances", &by(ZONE, &format!("state=\"{state}\"")), "1x24"));
    }
    for result in ["failed", "partial", "skipped"] {
        all.push(problem("policy_runs_total", &by(POLICY, &format!("result=\"{result}\"")), one_more));
    }
    all
}

/// A test of promtool: these series, and which rules fire with which labels.
fn a_test(series: &BTreeMap<String, String>, rules: usize, fires: Option<(usize, &str)>) -> String {
    let mut text = String::from("  - interval: 10m\n    input_series:\n");
    for (series, values) in series {
        let _ = writeln!(text, "      - series: '{series}'\n        values: '{values}'");
    }
    text.push_str("    alert_rule_test:\n");
    for rule in 0..rules {
        let _ = writeln!(text, "      - eval_time: {EVALUATED_AT}\n        alertname: rule_{rule}");
        if let Some((_, labels)) = fires.filter(|(fires, _)| *fires == rule) {
            let labels = labels.replace('=', ": ").replace(',', ", ");
            let _ = writeln!(text, "        exp_alerts:\n          - exp_labels: {{{labels}}}");
        }
    }
    text
}

#[test]
fn each_alert_of_the_readme_names_the_one_daemon_and_zone_that_has_its_problem() {
    if Command::new("promtool").arg("--version").output().is_err() {
        crate::stage::skipped(format_args!("promtool is not installed, so no alert rule was tried"));
        return;
    }
    let rules = expressions();
    assert!(rules.len() >= 20, "{rules:?}");
    let mut tests = a_test(&well(), rules.len(), None);
    let mut tried = BTreeSet::new();
    for Problem { rule, series, values, labels } in problems() {
        let of: Vec<usize> = (0..rules.len()).filter(|number| rules[*number].contains(&rule)).collect();
        let [fires] = of[..] else { panic!("{rule} is in the rules {of:?}") };
        tried.insert(fires);
        let mut all = well();
        let before = match values {
            Some(values) => all.insert(series.clone(), values.to_owned()),
            None => all.remove(&series),
        };
        assert!(before.is_some(), "{series}");
        tests.push_str(&a_test(&all, rules.len(), Some((fires, &labels))));
    }
    let absent = rules.iter().position(|rule| rule.starts_with("absent(")).unwrap();
    tried.insert(absent);
    tests.push_str(&a_test(&BTreeMap::new(), rules.len(), Some((absent, "job=\"snapwarden\""))));
    let untried: Vec<&String> =
        (0..rules.len()).filter(|rule| !tried.contains(rule)).map(|rule| &rules[rule]).collect();
    assert!(untried.is_empty(), "{untried:?}");

    let folder = tempfile::tempdir().unwrap();
    let mut text = String::from("groups:\n  - name: readme\n    rules:\n");
    for (number, rule) in rules.iter().enumerate() {
        let _ = writeln!(text, "      - alert: rule_{number}\n        expr: '{rule}'");
    }
    let write = |name: &str, text: &str| crate::command_line::write(&folder.path().join(name), text);
    write("rules.yml", &text);
    write("tests.yml", &format!("rule_files: [rules.yml]\nevaluation_interval: 10m\ntests:\n{tests}"));
    let said = Command::new("promtool")
        .args(["test", "rules"])
        .arg(folder.path().join("tests.yml"))
        .output()
        .unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    let numbered = rules.iter().enumerate().map(|(number, rule)| format!("\nrule_{number}: {rule}"));
    assert!(said.status.success(), "{text}{}", numbered.collect::<String>());
}
