//! The page for people, over real sockets: what it shows, and that nothing on it can do harm.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::SignedDuration;
use sha2::{Digest as _, Sha256};
use snapwarden::policy::name::ArchiveName;
use snapwarden::run::context::{RunOptions, Runner};
use snapwarden::run::report::RunReport;
use snapwarden::snapshot::InstanceId;
use snapwarden::state::last_runs::{InstanceCounts, LastRuns, ZoneCoverage, ZoneMemory};
use snapwarden::telemetry::Telemetry;
use snapwarden::telemetry::model::PolicyView;

use crate::daemon::{play, until};
use crate::http_port::{Port, get, open, open_at, say, status_of};
use crate::stage::{NOW, Stage, days_ago};

/// It keeps five, and a copy of the newest.
const NIGHTLY: &str = r#"
[policies.nightly]
schedule = "30 2 * * *"
zones = ["ch-gva-2"]
create = true
[policies.nightly.select]
ownership = "all"
[policies.nightly.retention]
keep_last = 5
[policies.nightly.guard]
max_delete_percent = 100
[policies.nightly.export]
archives = ["vault"]
"#;

/// It takes nothing and exports nothing.
const PRUNING: &str =
    "[policies.nightly]\nzones = [\"ch-gva-2\"]\n[policies.nightly.retention]\nkeep_last = 3\n";

const HOSTILE: &str = "<script>alert(1)</script>\"'&\u{202e}\u{1b}[31m\n";

/// Everything on the page that no browser may find there.
fn is_harmless(answer: &str) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let (before, rest) = body.split_once("<style>").unwrap();
    let (style, after) = rest.split_once("</style>").unwrap();
    let hash = STANDARD.encode(Sha256::digest(style.as_bytes()));
    let policy = format!(
        "content-security-policy: default-src 'none'; style-src 'sha256-{hash}'; base-uri 'none'; \
         form-action 'self'; frame-ancestors 'none'\r\n"
    );
    assert!(head.contains(&policy), "{head}");
    for header in
        ["x-content-type-options: nosniff", "referrer-policy: no-referrer", "cache-control: no-store"]
    {
        assert!(head.contains(header), "{head}");
    }
    for word in [
        "<style",
        "<script",
        " style=",
        " src=",
        "url(",
        "@import",
        " on",
        "javascript:",
        "\u{202e}",
        "\u{1b}",
    ] {
        // Names of elements and of attributes: what stands in quotes is text.
        let is_markup = |text: &str| {
            text.split('<').skip(1).any(|tag| {
                let tag = format!("<{}", tag.split('>').next().unwrap());
                tag.split('"').step_by(2).any(|part| part.contains(word))
            })
        };
        assert!(!is_markup(before) && !is_markup(after) && !style.contains(word), "{word:?}: {body}");
    }
    assert!(!body.contains(['\u{202e}', '\u{1b}']), "{body}");
    // Nothing from elsewhere: the one address is the name of a kind of markup.
    assert_eq!(body.replace("http://www.w3.org/2000/svg", "").matches("://").count(), 0, "{body}");
}

fn configure(port: &Port, runner: &Runner, remembered: &LastRuns) {
    let views: Vec<PolicyView<'_>> = runner
        .policies
        .iter()
        .map(|policy| PolicyView {
            policy,
            first_seen_at: NOW.parse().unwrap(),
            remembered: remembered.clone(),
            expected_interval: Some(Duration::from_hours(24)),
        })
        .collect();
    port.telemetry.configure(&views, &BTreeSet::<ArchiveName>::from(["vault".parse().unwrap()]));
}

async fn run(telemetry: &Telemetry, runner: &Runner) -> RunReport {
    let options = RunOptions { with_details: true, ..RunOptions::default() };
    let report = runner.run(&runner.policies[0], &options).await.unwrap();
    telemetry.run_ended(&report);
    report
}

/// An instance that is backed up.
fn counts(number: u128, name: &str) -> InstanceCounts {
    InstanceCounts {
        good: 3,
        newest_at: Some(days_ago(0)),
        oldest_at: Some(days_ago(2)),
        newest_verified_at: BTreeMap::from([("vault".parse().unwrap(), days_ago(0))]),
        is_listed: true,
        ..InstanceCounts::of(InstanceId(uuid::Uuid::from_u128(number)), Some(name.to_owned()))
    }
}

fn remembered(stage: &Stage, instances: Vec<InstanceCounts>) -> LastRuns {
    let coverage =
        ZoneCoverage { at: Some(days_ago(0)), covered: instances.len() as u64, ..ZoneCoverage::default() };
    let memory = ZoneMemory {
        last_run_at: Some(days_ago(0)),
        last_success_at: Some(days_ago(0)),
        result: Some("success".to_owned()),
        coverage: Some(coverage),
        instances,
        ..ZoneMemory::default()
    };
    LastRuns { last: None, zones: BTreeMap::from([(stage.zone.clone(), memory)]) }
}

#[tokio::test]
async fn hostile_names_are_text_wherever_they_stand() {
    let (port, stage) = (open().await, Stage::new());
    let id = stage.world.add_instance(&stage.zone, HOSTILE, &[]);
    stage.days(id, 1..10);
    let runner = stage.runner(NIGHTLY);
    configure(&port, &runner, &LastRuns::default());
    run(&port.telemetry, &runner).await;
    let history = runner.state.history(9, |change| change.action == "delete").await.unwrap();
    assert_eq!(history.changes.len(), 5);
    port.telemetry.deleted(history.changes);
    let of_instance = format!("/instance/ch-gva-2/{id}");
    for path in [
        "/",
        "/?q=alert%281",
        "/?q=%3Cscript%3E%22%20onfocus%3Dx&page=%3Cb%3E",
        &of_instance,
        "/instance/%3Cb%3E/x",
    ] {
        let answer = get(port.address, path).await;
        is_harmless(&answer);
        assert_eq!(answer.contains("&lt;script&gt;"), !path.contains("%3Cb%3E/x"), "{path}: {answer}");
    }
    // Something happened of which each part speaks.
    let answer = get(port.address, "/").await;
    let escaped = "&lt;script&gt;alert(1)&lt;/script&gt;&quot;'&amp;\\u{202e}\\u{1b}[31m\\u{a}";
    assert!(answer.matches(escaped).count() >= 6, "{answer}");
}

#[tokio::test]
async fn the_page_says_first_whether_everything_is_backed_up_and_what_to_do() {
    let (port, stage) = (open().await, Stage::new());
    let answer = get(port.address, "/").await;
    assert!(answer.contains("Nothing is backed up: there is no policy"), "{answer}");
    let runner = stage.runner(NIGHTLY);
    configure(&port, &runner, &LastRuns::default());
    assert!(get(port.address, "/").await.contains("Not known yet"));

    let fine = remembered(&stage, vec![counts(1, "web-1"), counts(2, "web-2")]);
    configure(&port, &runner, &fine);
    let answer = get(port.address, "/").await;
    assert!(
        answer.contains("✓ </span>Everything is backed up: 2 instances")
            && answer.contains("<p>Nothing.</p>"),
        "{answer}"
    );

    // Snapshots alone are no backup: they are deleted with their instance.
    let only = InstanceCounts { newest_verified_at: BTreeMap::new(), ..counts(2, "web-2") };
    let mut only = remembered(&stage, vec![counts(1, "web-1"), only]);
    only.zones.get_mut(&stage.zone).unwrap().last_run_at = Some(days_ago(0) + SignedDuration::from_secs(1));
    configure(&port, &runner, &only);
    let answer = get(port.address, "/").await;
    for text in ["Nothing is missing: 2 instances, 1 of them with snapshots only", "snapshots only</span>"] {
        assert!(answer.contains(text), "{text}: {answer}");
    }

    // Without any run, too, what was new enough is too old one day.
    let old = InstanceCounts { newest_at: Some(days_ago(3)), ..counts(3, "old-1") };
    let none = InstanceCounts { newest_at: None, newest_verified_at: BTreeMap::new(), ..counts(4, "none-1") };
    let vault: ArchiveName = "vault".parse().unwrap();
    let uncopied =
        InstanceCounts { uncopied_since: [(vault, days_ago(5))].into(), ..counts(5, "uncopied-1") };
    let vanished =
        InstanceCounts { is_listed: false, vanished_at: Some(days_ago(1)), ..counts(6, "vanished-1") };
    let exempt = InstanceCounts { is_exempt: true, newest_at: None, ..counts(7, "exempt-1") };
    let mut bad = remembered(&stage, vec![counts(1, "web-1"), exempt, vanished, uncopied, old, none]);
    let zone = bad.zones.get_mut(&stage.zone).unwrap();
    zone.last_run_at = Some(days_ago(0) + SignedDuration::from_secs(2));
    zone.held = Some("too many".to_owned());
    let coverage = zone.coverage.as_mut().unwrap();
    coverage.uncovered_instances = vec!["ci-1".to_owned()];
    configure(&port, &runner, &bad);
    let answer = get(port.address, "/").await;
    is_harmless(&answer);
    assert!(
        answer.contains(
            "<h1><span aria-hidden=\"true\">✕ </span>Not everything is backed up: 5 of 6 instances lack"
        ),
        "{answer}"
    );
    // The worst is the first, and each has a command.
    let table = answer.split("id=\"instances\"").nth(1).unwrap().split("id=\"policies\"").next().unwrap();
    let names = ["none-1", "ci-1", "old-1", "uncopied-1", "vanished-1", "web-1", "exempt-1"];
    let places: Vec<usize> =
        names.iter().map(|name| table.find(name).unwrap_or_else(|| panic!("{name}"))).collect();
    assert!(places.is_sorted(), "{places:?}");
    for (row, name) in table.split("<tr").skip(2).zip(names) {
        let (is_bad, commands) =
            (row.contains("✕") || row.contains("! </span>"), row.matches("class=\"run\"").count());
        assert_eq!(
            (is_bad, commands > 0),
            (names[..5].contains(&name), names[..5].contains(&name)),
            "{name}: {row}"
        );
    }
    let wrong = answer.split("id=\"wrong\"").nth(1).unwrap().split("id=\"running\"").next().unwrap();
    assert!(wrong.split("<li").skip(1).all(|entry| entry.contains("class=\"run\"><code>")), "{wrong}");
    // An instance that lacks several things is one entry.
    assert_eq!(wrong.matches(">none-1</bdi>").count(), 1, "{wrong}");
    for text in [
        "blocked by the guard: too many<span class=\"run\"><code>snapwarden plan nightly</code>",
        "archive vault: newest verified copy of",
        "<code>snapwarden once nightly --instance 00000000-0000-0000-0000-000000000004</code>",
    ] {
        assert!(wrong.contains(text), "{text}: {wrong}");
    }

    // How many there are of each state, and the way to these.
    let link = r#"<li><a class="bad" href="/?q=no+snapshot&amp;page=1#instances">1 no snapshot</a></li>"#;
    assert!(table.contains(link), "{table}");

    // A state is a word and a sign, never a color alone.
    for word in ["no snapshot", "not covered", "too old", "copy missing", "vanished", "backed up", "exempt"] {
        assert!(table.contains(&format!(" </span>{word}</span>")), "{word}: {table}");
    }
    configure(&port, &stage.runner(PRUNING), &fine);
    assert!(get(port.address, "/").await.contains("no enabled policy takes or exports its snapshots"));
}

#[tokio::test]
async fn ten_thousand_instances_are_pages_of_fifty() {
    let (port, stage) = (open().await, Stage::new());
    let mut instances: Vec<_> =
        (0..10_000).map(|number| counts(number, &format!("web-{number:05}"))).collect();
    instances[7_777].newest_at = None;
    configure(&port, &stage.runner(NIGHTLY), &remembered(&stage, instances));
    for (path, rows, first, page) in [
        ("/", 50, "web-07777", "Page 1 of 200"),
        ("/?page=2", 50, "web-00049", "Page 2 of 200"),
        ("/?q=&page=200", 50, "web-09950", "Page 200 of 200"),
        ("/?page=99999999", 50, "web-09950", "Page 200 of 200"),
        ("/?page=-1", 50, "web-07777", "Page 1 of 200"),
        ("/?q=WEB-0123", 10, "web-01230", "10 instances"),
        ("/?q=no+snapshot", 1, "web-07777", "1 instance"),
        ("/?q=00000000-0000-0000-0000-0000000003e8", 1, "web-01000", "1 instance"),
        ("/?q=nowhere", 0, "None is found", "None is found"),
    ] {
        let answer = get(port.address, path).await;
        let table = answer.split("id=\"instances\"").nth(1).unwrap();
        let table = table.split("id=\"policies\"").next().unwrap();
        assert_eq!(table.matches("/instance/ch-gva-2/").count(), rows, "{path}");
        let shown = table.find(first).unwrap_or_else(|| panic!("{path}: {table}"));
        assert!(!table[..shown].contains("<bdi>") || rows > 0, "{path}");
        assert!(table.contains(page) && answer.len() < 100_000, "{path}: {}", answer.len());
    }
}

#[tokio::test]
async fn an_instance_has_its_snapshots_and_copies_with_what_keeps_each() {
    let (port, stage) = (open().await, Stage::new());
    let [web, _] = ["web-1", "db-1"].map(|name| {
        let id = stage.world.add_instance(&stage.zone, name, &[]);
        stage.days(id, 1..8);
        id
    });
    let runner = stage.runner(NIGHTLY);
    configure(&port, &runner, &LastRuns::default());
    let path = format!("/instance/ch-gva-2/{web}");
    assert_eq!(status_of(&get(port.address, &path).await), "404");
    // Before the first run nothing is known of what it would delete.
    assert!(get(port.address, "/").await.contains("not known before this daemon has run it"));
    run(&port.telemetry, &runner).await;
    let there: Vec<_> = stage.world.snapshots(&stage.zone);
    let oldest =
        there.iter().filter(|one| one.instance_id == Some(web)).min_by_key(|one| one.created_at).unwrap();
    let answer = get(port.address, &path).await;
    is_harmless(&answer);
    for text in [
        "backed up",
        "newest 1 of 5 (keep_last)",
        "newest 5 of 5 (keep_last)",
        "<svg",
        "now</text>",
        "for ever: its archive has no retention",
    ] {
        assert!(answer.contains(text), "{text}: {answer}");
    }
    // The next run takes one more, so the fifth is deleted.
    let row = answer.split("<tr").find(|row| row.contains(&oldest.id.short())).unwrap();
    assert!(row.contains("next run"), "{row}");
    let index = get(port.address, "/").await;
    let next = index.split("id=\"next\"").nth(1).unwrap().split("id=\"last\"").next().unwrap();
    assert!(next.contains(&oldest.id.short()) && next.contains("no keep rule wants it"), "{next}");
    assert_eq!(next.matches("<tr").count(), 3, "{next}");
    stage.step(SignedDuration::from_hours(24));
    let report = run(&port.telemetry, &runner).await;
    let deleted: Vec<_> = crate::stage::steps(&report, snapwarden::state::audit::Action::Delete);
    assert!(deleted.iter().any(|step| step.facts.snapshot.id == Some(oldest.id)), "{deleted:?}");

    // Another process ran it since: what it left is not known in detail.
    let mut later = runner.state.last_runs(&report.policy).await.unwrap();
    later.zones.get_mut(&stage.zone).unwrap().last_run_at =
        Some(report.finished_at + SignedDuration::from_secs(1));
    port.telemetry.recall(&report.policy, later);
    let answer = get(port.address, &path).await;
    assert!(
        answer.contains("is known once this daemon has run it") && !answer.contains("keep_last"),
        "{answer}"
    );
}

#[tokio::test]
async fn an_instance_that_no_policy_knows_is_not_found() {
    let port = open().await;
    for path in [
        "/instance/ch-gva-2/9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec",
        "/instance/ch-gva-2/x",
        "/instance/UPPER/9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec",
        "/instance/a%2Fb/9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec",
    ] {
        let answer = get(port.address, path).await;
        assert_eq!(status_of(&answer), "404", "{path}");
        is_harmless(&answer);
    }
}

#[tokio::test]
async fn on_loopback_only_this_machine_is_answered() {
    let ask = |host: &str, path: &str| format!("GET {path} HTTP/1.1\r\n{host}\r\n\r\n");
    let port = open().await;
    for path in ["/", "/api/v1/status", "/metrics", "/livez", "/nothing"] {
        for host in [
            "Host: evil.example",
            "Host: evil.example:9788",
            "Host: localhost.evil.example",
            "Host: 127.0.0.1.evil.example",
            "Host: a b",
            "Host: ",
        ] {
            let answer = say(port.address, &ask(host, path)).await;
            assert!(["421", "400"].contains(&status_of(&answer)), "{host} {path}: {answer}");
        }
    }
    for host in [
        "Host: localhost",
        "Host: LOCALHOST:9788",
        "Host: snap.localhost",
        "Host: 127.0.0.1",
        "Host: [::1]:9788",
        "Host: 10.0.0.7:1",
    ] {
        assert_eq!(status_of(&say(port.address, &ask(host, "/api/v1/status")).await), "200", "{host}");
    }
    assert_eq!(status_of(&say(port.address, "GET /livez HTTP/1.0\r\n\r\n").await), "200");
    // Elsewhere it has whatever name people gave it.
    let port = open_at([0, 0, 0, 0]).await;
    assert_eq!(status_of(&say(port.address, &ask("Host: backup.example", "/")).await), "200");
}

#[tokio::test(start_paused = true)]
async fn a_daemon_shows_what_was_deleted_last_by_it_and_before_it() {
    let stage = Stage::new();
    let id = stage.world.add_instance(&stage.zone, "web-1", &[]);
    stage.days(id, 1..9);
    let by_hand = stage.run(NIGHTLY).await;
    let play = play(&stage, NIGHTLY).await;
    until(&stage, "2026-11-01T12:05:00Z").await;
    let of = |telemetry: &Telemetry| telemetry.overview().deleted_last;
    let before = of(&play.telemetry);
    assert_eq!(before.len(), 4, "{before:?}");
    assert!(before.iter().all(|change| change.run_id == Some(by_hand.run_id)));
    until(&stage, "2026-11-02T02:40:00Z").await;
    let after = of(&play.telemetry);
    assert_eq!(after.len(), 5, "{after:?}");
    assert!(after[0].at > after[1].at && after[0].reasons[0].contains("no keep rule wants it"), "{after:?}");
    assert_eq!(play.telemetry.overview().deleted_next[0].count, Some(1));
    play.stop().await;
}
