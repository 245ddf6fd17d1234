//! The alert rules in `config/prometheus`, judged by promtool: two daemons have a policy of one name in two zones each. Each
//! rule fires for the one that has its problem, for nothing else, and no longer than the problem lasts.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::process::Command;

const RULES: &str = include_str!("../../config/prometheus/snapwarden.rules.yml");
const RUNBOOKS: &str = include_str!("../../docs/monitoring.md");

/// The problem lasts from the one step to the other, each of a quarter of an hour.
const PROBLEM: std::ops::Range<usize> = 12..24;
const DAY: usize = 96;
const STEP_SECONDS: usize = 900;

const DAEMON: &str = "job=\"snapwarden\",instance=\"b:9788\"";
const POLICY: &str = "job=\"snapwarden\",instance=\"b:9788\",policy=\"nightly\"";
const ZONE: &str = "job=\"snapwarden\",instance=\"b:9788\",policy=\"nightly\",zone=\"de-fra-1\"";
const ARCHIVE: &str = "job=\"snapwarden\",instance=\"b:9788\",archive=\"vault\"";
const SERVER: &str = ",instance_id=\"i1\",instance_name=\"db-1\"";

/// An alert as its file states it.
struct Alert<'a> {
    name: &'a str,
    text: &'a str,
}

fn alerts() -> Vec<Alert<'static>> {
    let texts = RULES.split("      - alert: ").skip(1);
    texts.map(|text| Alert { name: text.lines().next().unwrap(), text }).collect()
}

/// The values of a series, step by step.
#[derive(Clone, Copy)]
enum Values {
    /// The same in every step.
    Always(i64),
    /// The time, or so many seconds before it.
    Clock(i64),
    /// As the first, but this during the problem.
    While(&'static Values, i64),
    /// As the first, and absent during the problem.
    Absent(&'static Values),
    /// One more in each step of the problem.
    Rising,
}

impl Values {
    fn text(self, steps: usize) -> String {
        match self {
            Self::Always(value) => return format!("{value}x{steps}"),
            Self::Clock(before) => return format!("{}+{STEP_SECONDS}x{steps}", -before),
            _ => {}
        }
        let each =
            (0..=steps).map(|step| self.at(step).map_or_else(|| "_".to_owned(), |value| value.to_string()));
        each.collect::<Vec<_>>().join(" ")
    }

    fn at(self, step: usize) -> Option<i64> {
        let now = i64::try_from(step * STEP_SECONDS).unwrap();
        match self {
            Self::Always(value) => Some(value),
            Self::Clock(before) => Some(now - before),
            Self::While(_, value) if PROBLEM.contains(&step) => Some(value),
            Self::Absent(_) if PROBLEM.contains(&step) => None,
            Self::While(usual, _) | Self::Absent(usual) => usual.at(step),
            Self::Rising => i64::try_from(step.clamp(PROBLEM.start, PROBLEM.end) - PROBLEM.start).ok(),
        }
    }
}

/// Of a series that goes.
const GONE: Values = Values::Absent(&Values::Always(1));

type Series = BTreeMap<String, Values>;

fn series_name(name: &str, labels: &str) -> String {
    let prefix = if name == "up" || name.starts_with("process_") { "" } else { "snapwarden_" };
    format!("{prefix}{name}{{{labels}}}")
}

/// Everything that the rules read, of two daemons that are well.
fn well() -> Series {
    let mut series = Series::new();
    let mut add = |name: &str, labels: &str, values: Values| {
        series.insert(series_name(name, labels), values);
    };
    let (now, one, none) = (Values::Clock(0), Values::Always(1), Values::Always(0));
    for daemon in [DAEMON.to_owned(), DAEMON.replace("b:", "a:")] {
        for (name, values) in [
            ("up", one),
            ("state_last_write_successful", one),
            ("config_last_reload_successful", one),
            ("scheduler_last_tick_timestamp_seconds", now),
            ("process_open_fds", Values::Always(30)),
            ("process_max_fds", Values::Always(1024)),
        ] {
            add(name, &daemon, values);
        }
        for result in ["sent", "failed", "dropped"] {
            let notifier = format!("{daemon},notifier=\"ops\",result=\"{result}\"");
            add("notifications_total", &notifier, none);
        }
        for resource in ["snapshot", "template"] {
            let quota = format!("{daemon},resource=\"{resource}\"");
            add("quota_usage", &quota, Values::Always(10));
            add("quota_limit", &quota, Values::Always(100));
        }
        let archive = format!("{daemon},archive=\"vault\"");
        for (name, values) in [
            ("archive_corrupt_images", none),
            ("archive_readable", one),
            ("archive_present", one),
            ("archive_last_verify_timestamp_seconds", now),
            ("archive_free_bytes", Values::Always(50_000_000_000)),
        ] {
            add(name, &archive, values);
        }
        let policy = format!("{daemon},policy=\"nightly\"");
        for (name, values) in [
            ("policy_enabled", one),
            ("policy_created_timestamp_seconds", Values::Always(-86_400)),
            ("policy_expected_interval_seconds", Values::Always(3600)),
            ("policy_missed_runs_total", none),
            ("export_checksum_mismatches_total", none),
            ("hook_failures_total", none),
            ("exports_in_progress", none),
            ("export_progress_bytes", none),
            ("guard_allowance", none),
        ] {
            add(name, &policy, values);
        }
        for result in ["success", "failed", "partial", "held", "skipped"] {
            add("policy_runs_total", &format!("{policy},result=\"{result}\""), none);
        }
        for zone in ["ch-gva-2", "de-fra-1"] {
            let of_zone = format!("{policy},zone=\"{zone}\"");
            for (name, values) in [
                ("policy_last_success_timestamp_seconds", now),
                ("policy_held", none),
                ("policy_unmatched", none),
                ("policy_last_run_result", none),
                ("pending_deletes", none),
                ("export_gate_oldest_timestamp_seconds", now),
            ] {
                add(name, &of_zone, values);
            }
            for reason in ["guard", "judge"] {
                let values = if reason == "judge" { none } else { Values::Always(3) };
                add("blocked_deletes", &format!("{of_zone},reason=\"{reason}\""), values);
            }
            for state in ["fresh", "stale", "none", "vanished"] {
                let values = if state == "fresh" { Values::Always(3) } else { none };
                add("policy_instances", &format!("{of_zone},state=\"{state}\""), values);
            }
            let zone = format!("{daemon},zone=\"{zone}\"");
            add("clock_skew_seconds", &zone, Values::Always(2));
            add("snapshots_unexplained", &zone, none);
            for state in ["covered", "uncovered", "exempt"] {
                let values = if state == "uncovered" { none } else { Values::Always(3) };
                add("instances", &format!("{zone},state=\"{state}\""), values);
            }
            for code in ["200", "403", "503"] {
                // Requests that succeed are many, else each that does not is a fifth of all.
                let values = if code == "200" { now } else { none };
                add(
                    "api_requests_total",
                    &format!("{zone},operation=\"list-snapshots\",code=\"{code}\""),
                    values,
                );
            }
            let server = format!("{of_zone}{SERVER}");
            add("snapshot_newest_timestamp_seconds", &server, now);
            add("export_newest_verified_timestamp_seconds", &format!("{server},archive=\"vault\""), now);
        }
    }
    series
}

/// Something that is wrong with one daemon, in one zone, for half a day.
struct Problem {
    alert: &'static str,
    /// Of the alert, without its name and severity.
    labels: String,
    series: Vec<(String, Values)>,
    /// Steps for which the alert lasts longer than its problem, such as a counter's window.
    lasts: usize,
}

/// As [`Problem`], of one series whose labels are the alert's.
fn problem(alert: &'static str, name: &str, labels: &str, values: Values) -> Problem {
    Problem { alert, labels: labels.to_owned(), series: vec![(series_name(name, labels), values)], lasts: 3 }
}

fn problems() -> Vec<Problem> {
    const fn instead(value: i64) -> Values {
        Values::While(&Values::Always(0), value)
    }
    const NOT_ONE: Values = Values::While(&Values::Always(1), 0);
    const STOPPED: Values = Values::While(&Values::Clock(0), 0);
    let by = |labels: &str, label: &str| format!("{labels},{label}");
    let success = "policy_last_success_timestamp_seconds";
    let of_zone = by(DAEMON, "zone=\"de-fra-1\"");
    let request = |code: &str| {
        series_name("api_requests_total", &format!("{of_zone},operation=\"list-snapshots\",code=\"{code}\""))
    };
    let copy = format!("{ZONE}{SERVER},archive=\"vault\"");
    let mut all = vec![
        problem("SnapwardenDown", "up", DAEMON, NOT_ONE),
        problem("SnapwardenSchedulerStalled", "scheduler_last_tick_timestamp_seconds", DAEMON, STOPPED),
        problem("SnapwardenConfigNotLoaded", "config_last_reload_successful", DAEMON, NOT_ONE),
        problem("SnapwardenStateNotWritten", "state_last_write_successful", DAEMON, NOT_ONE),
        problem("SnapwardenClockWrong", "clock_skew_seconds", &of_zone, instead(-300)),
        problem("SnapwardenPolicyLate", success, ZONE, STOPPED),
        // Never in that zone, and well in the other.
        problem("SnapwardenPolicyNeverSucceeded", success, ZONE, Values::Absent(&Values::Clock(0))),
        problem("SnapwardenRunFailed", "policy_last_run_result", ZONE, instead(2)),
        problem("SnapwardenRunPartial", "policy_last_run_result", ZONE, instead(1)),
        Problem {
            labels: by(POLICY, "result=\"skipped\""),
            lasts: 5,
            ..problem(
                "SnapwardenRunsSkipped",
                "policy_runs_total",
                &by(POLICY, "result=\"skipped\""),
                Values::Rising,
            )
        },
        Problem {
            lasts: DAY + 1,
            ..problem("SnapwardenRunsMissed", "policy_missed_runs_total", POLICY, Values::Rising)
        },
        problem("SnapwardenInstanceUncovered", "instances", &by(&of_zone, "state=\"uncovered\""), instead(2)),
        problem("SnapwardenSnapshotUnexplained", "snapshots_unexplained", &of_zone, instead(2)),
        problem("SnapwardenPolicySelectsNothing", "policy_unmatched", ZONE, instead(1)),
        problem("SnapwardenDeletionsHeld", "policy_held", ZONE, instead(1)),
        problem("SnapwardenJudgesDisagree", "blocked_deletes", &by(ZONE, "reason=\"judge\""), instead(3)),
        problem("SnapwardenDeletionsPending", "pending_deletes", ZONE, instead(4)),
        problem(
            "SnapwardenExportMissing",
            "export_gate_oldest_timestamp_seconds",
            ZONE,
            Values::While(&Values::Clock(0), -129_600),
        ),
        problem("SnapwardenCopyBehind", "export_newest_verified_timestamp_seconds", &copy, STOPPED),
        Problem {
            lasts: DAY + 1,
            ..problem(
                "SnapwardenChecksumMismatch",
                "export_checksum_mismatches_total",
                POLICY,
                Values::Rising,
            )
        },
        Problem {
            lasts: DAY + 1,
            ..problem("SnapwardenHookFailed", "hook_failures_total", POLICY, Values::Rising)
        },
        problem("SnapwardenDownloadStalled", "exports_in_progress", POLICY, instead(1)),
        problem("SnapwardenArchiveNotThere", "archive_present", ARCHIVE, NOT_ONE),
        problem("SnapwardenArchiveNotReadable", "archive_readable", ARCHIVE, NOT_ONE),
        problem("SnapwardenCopyCorrupt", "archive_corrupt_images", ARCHIVE, instead(1)),
        problem(
            "SnapwardenCopiesNotVerified",
            "archive_last_verify_timestamp_seconds",
            ARCHIVE,
            instead(-2_592_000),
        ),
        Problem {
            lasts: 3 * DAY,
            ..problem(
                "SnapwardenArchiveFull",
                "archive_free_bytes",
                ARCHIVE,
                Values::While(&Values::Always(50_000_000_000), 900_000_000),
            )
        },
        problem(
            "SnapwardenQuotaNearlyFull",
            "quota_usage",
            &by(DAEMON, "resource=\"snapshot\""),
            Values::While(&Values::Always(10), 95),
        ),
        Problem {
            lasts: 5,
            series: vec![(request("403"), Values::Rising)],
            ..problem("SnapwardenKeyRefused", "", &of_zone, Values::Rising)
        },
        Problem {
            lasts: 5,
            series: vec![(request("503"), Values::Rising), (request("200"), Values::Always(0))],
            ..problem("SnapwardenApiErrors", "", &of_zone, Values::Rising)
        },
        Problem {
            labels: by(DAEMON, "notifier=\"ops\""),
            lasts: 5,
            ..problem(
                "SnapwardenNotificationsFailing",
                "notifications_total",
                &by(DAEMON, "notifier=\"ops\",result=\"failed\""),
                Values::Rising,
            )
        },
        problem(
            "SnapwardenFilesNearlyUsedUp",
            "process_open_fds",
            DAEMON,
            Values::While(&Values::Always(30), 900),
        ),
    ];
    for (alert, state) in [
        ("SnapwardenInstanceWithoutSnapshot", "none"),
        ("SnapwardenInstanceStale", "stale"),
        ("SnapwardenInstanceVanished", "vanished"),
    ] {
        all.push(problem(alert, "policy_instances", &by(ZONE, &format!("state=\"{state}\"")), instead(1)));
    }
    all
}

/// A test of promtool: these series, and which alerts fire with which labels at each of some steps.
fn a_test(series: &Series, expected: &[(usize, &[(&Alert<'_>, &str)])]) -> String {
    let mut text = String::from("  - interval: 15m\n    input_series:\n");
    let steps = expected.iter().map(|(step, _)| *step).max().unwrap_or_default();
    for (series, values) in series {
        let _ = writeln!(text, "      - series: '{series}'\n        values: '{}'", values.text(steps));
    }
    text.push_str("    promql_expr_test:\n");
    for (step, firing) in expected {
        let minutes = step * 15;
        let _ =
            writeln!(text, "      - expr: 'ALERTS{{alertstate=\"firing\"}}'\n        eval_time: {minutes}m");
        if !firing.is_empty() {
            text.push_str("        exp_samples:\n");
        }
        for (alert, labels) in *firing {
            let name = alert.name;
            let severity = alert.text.split("severity: ").nth(1).unwrap().lines().next().unwrap();
            let _ = writeln!(
                text,
                "          - labels: 'ALERTS{{alertname=\"{name}\",alertstate=\"firing\",severity=\"{severity}\",\
                 {labels}}}'\n            value: 1"
            );
        }
    }
    text
}

#[test]
fn each_alert_names_the_one_daemon_and_zone_that_has_its_problem_and_ends_with_it() {
    if Command::new("promtool").arg("--version").output().is_err() {
        crate::stage::skipped(format_args!("promtool is not installed, so no alert rule was tried"));
        return;
    }
    let alerts = alerts();
    assert!(alerts.len() >= 30, "{}", alerts.len());
    let named =
        |name: &str| alerts.iter().find(|alert| alert.name == name).unwrap_or_else(|| panic!("{name}"));
    let (before, within) = (PROBLEM.start - 1, PROBLEM.end - 1);
    let quiet: &[(usize, &[(&Alert<'_>, &str)])] = &[(before, &[]), (within, &[]), (DAY, &[])];
    let mut tests = a_test(&well(), quiet);
    let mut tried = BTreeSet::from(["SnapwardenAllowanceOpen", "SnapwardenAbsent"]);
    // As many problems at once as have no series in common: each brings its own alert, and no other.
    let mut groups: Vec<Vec<Problem>> = Vec::new();
    for problem in problems() {
        tried.insert(problem.alert);
        let has = |other: &Problem| {
            other.series.iter().any(|one| problem.series.iter().any(|mine| one.0 == mine.0))
        };
        match groups.iter_mut().find(|group| !group.iter().any(has)) {
            Some(group) => group.push(problem),
            None => groups.push(vec![problem]),
        }
    }
    for group in &groups {
        let mut all = well();
        for (series, values) in group.iter().flat_map(|problem| &problem.series) {
            assert!(all.insert(series.clone(), *values).is_some(), "{series}");
        }
        let after = PROBLEM.end + group.iter().map(|problem| problem.lasts).max().unwrap_or_default();
        let firing: Vec<_> =
            group.iter().map(|problem| (named(problem.alert), problem.labels.as_str())).collect();
        tests.push_str(&a_test(&all, &[(before, &[]), (within, &firing), (after, &[])]));
    }
    // An allowance is open for more than a day.
    let mut all = well();
    all.insert(series_name("guard_allowance", POLICY), Values::Always(5));
    let open = [(named("SnapwardenAllowanceOpen"), POLICY)];
    tests.push_str(&a_test(&all, &[(DAY - 1, &[]), (DAY + 1, &open)]));
    // What failed is sent at the next attempt.
    let mut all = well();
    for result in ["failed", "sent"] {
        let labels = format!("{DAEMON},notifier=\"ops\",result=\"{result}\"");
        all.insert(series_name("notifications_total", &labels), Values::Rising);
    }
    tests.push_str(&a_test(&all, &[(within, &[])]));
    // Nothing is scraped.
    let absent = [(named("SnapwardenAbsent"), "job=\"snapwarden\"")];
    tests.push_str(&a_test(&Series::new(), &[(1, &absent)]));
    // A policy is removed, and with it its series: there is nothing to alert on.
    let usual = well().into_iter();
    let removed =
        usual.map(|(series, values)| (series.clone(), if series.contains(POLICY) { GONE } else { values }));
    tests.push_str(&a_test(&removed.collect(), &[(within, &[])]));
    // A restart: counters begin at zero. Times come from the state.
    let mut all = well();
    let runs = series_name("policy_runs_total", &format!("{POLICY},result=\"skipped\""));
    all.insert(runs, Values::While(&Values::Always(0), 40));
    tests.push_str(&a_test(&all, &[(PROBLEM.end, &[]), (PROBLEM.end + 5, &[])]));

    let untried: Vec<&str> =
        alerts.iter().map(|alert| alert.name).filter(|name| !tried.contains(name)).collect();
    assert!(untried.is_empty(), "{untried:?}");

    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| crate::command_line::write(&folder.path().join(name), text);
    write("rules.yml", RULES);
    write("tests.yml", &format!("rule_files: [rules.yml]\nevaluation_interval: 15m\ntests:\n{tests}"));
    let said = Command::new("promtool")
        .args(["test", "rules"])
        .arg(folder.path().join("tests.yml"))
        .output()
        .unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert!(said.status.success(), "{text}");
}

#[test]
fn each_alert_has_a_severity_a_summary_a_next_command_and_a_runbook() {
    for Alert { name, text } in alerts() {
        let severity = text.split("severity: ").nth(1).unwrap().lines().next().unwrap();
        assert!(["critical", "warning", "info"].contains(&severity), "{name}: {severity}");
        let section = RUNBOOKS.split(&format!("### {name}\n")).nth(1);
        let section = section.unwrap_or_else(|| panic!("{name} has no section in docs/monitoring.md"));
        assert!(section.trim_start().starts_with(&format!("*{severity}.*")), "{name}: {section}");
        assert!(text.contains(&format!("runbook: docs/monitoring.md#{}\n", name.to_lowercase())), "{text}");
        let says = |key: &str| text.lines().find_map(|line| line.trim().strip_prefix(key)).unwrap();
        let (summary, description) = (says("summary: "), says("description: "));
        assert!(summary.len() > 20 && description.len() > 20, "{text}");
        // Of which host, and of which policy or archive, it says by its labels.
        if name != "SnapwardenAbsent" {
            let both = format!("{summary} {description}");
            assert!(both.contains("{{ $labels.instance }}") || text.contains("by (resource"), "{name}");
        }
        for label in ["policy", "archive", "zone"] {
            let expression = says("expr: ");
            let of_it =
                expression.contains(&format!("snapwarden_{label}_")) && !expression.contains("sum by");
            assert!(!of_it || text.contains(&format!("{{{{ $labels.{label} }}}}")), "{name}: {label}");
        }
    }
}

#[test]
fn the_dashboard_is_the_one_that_its_script_writes() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/config/prometheus");
    let Ok(made) = Command::new("python3").arg("dashboard.py").current_dir(folder).output() else {
        crate::stage::skipped(format_args!("there is no python3, so the dashboard was not made anew"));
        return;
    };
    assert!(made.status.success(), "{made:?}");
    let text = include_str!("../../config/prometheus/dashboard.json");
    assert_eq!(String::from_utf8(made.stdout).unwrap(), text, "dashboard.py > dashboard.json");
}
