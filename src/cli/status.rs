//! `status`: the state of the running daemon, or what the state directory remembers.

use std::collections::BTreeSet;
use std::fmt::{Display, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use jiff::Timestamp;
use serde_json::{Value, json};
use url::Url;

use crate::archive::stats::ArchiveStats;
use crate::cli::args::Global;
use crate::cli::assemble::{self, Seams};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::once::{instance, plan_sums};
use crate::cli::output::{Output, Row, Tone, plain};
use crate::clock::timeout;
use crate::config::sections::Config;
use crate::daemon::live::{self, SocketError};
use crate::daemon::timetable::Timetable;
use crate::policy::name::PolicyName;
use crate::run::coverage::{InstanceStates, uncovered_text};
use crate::run::pauses;
use crate::snapshot::ZoneName;
use crate::state::controls::Controls;
use crate::state::directory::StateDirectory;
use crate::state::last_runs::{LastRuns, ZoneCoverage, ZoneMemory};
use crate::state::schedules::Schedules;
use crate::telemetry::Telemetry;
use crate::telemetry::model::PolicyView;
use crate::telemetry::status::{DownloadStatus, Last, PolicyStatus, Status, ZoneStatus};
use crate::text::{chain, printable, size, to_the_second};
use crate::transport::{Purpose, Request, read_body};

/// Enough for some thousand policies with ten zones each.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// The daemon answers from memory, so a slow response means that it hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Shows the status of the daemon on the state directory; without one that answers, what the directory remembers. With
/// `live`, says nothing but whether the daemon's loop turns.
///
/// # Errors
/// [`Refusal`] if neither can be read.
pub async fn status(global: &Global, live: bool, output: Output) -> Result<Exit, Refusal> {
    let seams = Seams::real();
    let (config, state) = assemble::configuration_and_state(&global.config, &seams);
    if live {
        return match live::is_alive(state.path(), &*seams.clock).await {
            Ok(()) => Ok(Exit::Done),
            Err(why) => Err(Refusal::failed(printable(&why).to_string())),
        };
    }
    let mut attention: Vec<String> = config.as_ref().err().cloned().into_iter().collect();
    let config = config.as_ref().ok();
    match answer(&seams, &state, config.map(|config| config.server.listen)).await {
        Ok((mut json, mut status)) => {
            // The daemon reads them each second; who has just paused a policy need not wait for that.
            if let Ok(controls) = state.controls().await {
                heed(&controls, &mut json, &mut status);
            }
            output.show(|| &json, || render(&status, output));
            attention.extend(status.problems().into_iter().map(|problem| problem.text));
        }
        Err(NoAnswer::Unknown(why)) => {
            attention.push(format!("{why}: {START}"));
            return Err(Refusal::failed(attention.join("\n")));
        }
        Err(no_answer) => {
            let (status, unread) = remembered(config, &state, &seams).await;
            let is_scheduled = |policy: &PolicyStatus| policy.enabled && policy.schedule.is_some();
            let heading = if let NoAnswer::Silent(why) = no_answer {
                attention.push(format!("{why}: {SILENT}"));
                "the daemon on this state directory does not answer"
            } else {
                attention.extend(status.policies.values().any(is_scheduled).then(|| NO_DAEMON.to_owned()));
                "no daemon runs on this state directory"
            };
            let heading = format!("{heading}: {}\n", printable(&state.path().to_string_lossy()));
            output.show(|| &status, || heading + &render(&status, output));
            attention.extend(unread);
            attention.extend(status.problems().into_iter().map(|problem| problem.text));
        }
    }
    for line in &attention {
        output.complain(line);
    }
    Ok(if attention.is_empty() { Exit::Done } else { Exit::Failed })
}

/// Why there is no answer of a daemon.
enum NoAnswer {
    /// None runs.
    NotRunning,
    /// One runs, and for this reason does not answer.
    Silent(String),
    /// Whether one runs is not known, since the state directory can't be read, and none answers.
    Unknown(String),
}

const NO_DAEMON: &str = "no policy runs by its schedule: see `systemctl status snapwarden`, or start the daemon with `snapwarden run`";

/// One that does not answer still runs, so a second one would not start.
const SILENT: &str = "a daemon runs, since it has the lock of the state directory: see its log (`journalctl -u snapwarden`), and restart it \
                      if it hangs (`systemctl restart snapwarden`)";

const START: &str = "see `systemctl status snapwarden`, or start the daemon with `snapwarden run`";

const STATUS_PATH: &str = "/api/v1/status";

/// What a port with TLS answers to a request without, and one with users to a request without a password.
const LOCKED: [StatusCode; 2] = [StatusCode::BAD_REQUEST, StatusCode::UNAUTHORIZED];

/// The likely cause if the response is not the daemon's.
const OTHER_SERVICE: &str = "another service may use the port of `listen` in `[server]`";

/// The status that the daemon on this state directory gives, by its socket there. Where that can't be opened, as by another
/// user or from outside its container, its port is asked, or the one that listens as the configuration says.
async fn answer(
    seams: &Seams,
    state: &StateDirectory,
    listen: Option<SocketAddr>,
) -> Result<(Value, Status), NoAnswer> {
    let (address, no_answer): (_, fn(String) -> NoAnswer) = match state.has_daemon().await {
        Ok(false) => return Err(NoAnswer::NotRunning),
        Ok(true) => {
            match live::ask(state.path(), STATUS_PATH, &*seams.clock).await {
                Ok((StatusCode::OK, answer)) => {
                    return parse(&answer, &"the daemon").map_err(NoAnswer::Silent);
                }
                // A daemon of an older version.
                Ok(_) | Err(SocketError::Connect(..)) => {}
                Err(silent @ SocketError::Silent(..)) => return Err(NoAnswer::Silent(chain(&silent))),
            }
            // An older one may not have said where it listens, either.
            (state.daemon_address().await.ok().flatten().or(listen), NoAnswer::Silent)
        }
        Err(error) if listen.is_none() => return Err(NoAnswer::Unknown(chain(&error))),
        Err(_) => (listen, NoAnswer::Unknown),
    };
    let Some(address) = address.map(reachable) else {
        return Err(no_answer("it has not said where it listens".to_owned()));
    };
    let answer = ask(seams, address).await.map_err(no_answer)?;
    parse(&answer, &address).map_err(no_answer)
}

/// The status in an answer of `who`.
fn parse(answer: &[u8], who: &dyn Display) -> Result<(Value, Status), String> {
    let parsed = serde_json::from_slice(answer).and_then(|json| Ok((json, serde_json::from_slice(answer)?)));
    parsed.map_err(|error| format!("{who} does not respond like snapwarden ({error}): {OTHER_SERVICE}"))
}

/// Shows policies that were paused by hand since the daemon last looked as paused, and those that were resumed as enabled.
fn heed(controls: &Controls, json: &mut Value, status: &mut Status) {
    for (name, policy) in &mut status.policies {
        let since = name.parse().ok().and_then(|name: PolicyName| controls.paused.get(&name).copied());
        if policy.paused_since == since || (policy.paused_since.is_none() && !policy.enabled) {
            continue;
        }
        (policy.enabled, policy.paused_since, policy.next_run_at) = (since.is_none(), since, None);
        if let Some(shown) = json.get_mut("policies").and_then(|all| all.get_mut(name)?.as_object_mut()) {
            shown.insert("enabled".to_owned(), since.is_none().into());
            shown.insert("paused_since".to_owned(), json!(since));
            shown.insert("next_run_at".to_owned(), Value::Null);
        }
    }
}

/// What the state directory remembers, and what of it can't be read.
async fn remembered(config: Option<&Config>, state: &StateDirectory, seams: &Seams) -> (Status, Vec<String>) {
    let now = seams.clock.now();
    let mut unread = Vec::new();
    let schedules = state.schedules().await.unwrap_or_else(|error| {
        unread.push(chain(&error));
        Schedules::default()
    });
    let controls = state.controls().await.unwrap_or_else(|error| {
        unread.push(chain(&error));
        Controls::default()
    });
    let paused = controls.paused;
    let audit = state.audit_head().await.unwrap_or_else(|error| {
        unread.push(chain(&error));
        None
    });
    let Some(config) = config else {
        let runs = state.all_last_runs().await.unwrap_or_else(|error| {
            unread.push(chain(&error));
            Vec::new()
        });
        let policies = runs.into_iter().map(|(name, runs)| {
            let zone = |(zone, memory): (&ZoneName, &ZoneMemory)| {
                (zone.to_string(), ZoneStatus::of(memory, None, now))
            };
            let policy = PolicyStatus {
                enabled: !paused.contains_key(&name),
                paused_since: paused.get(&name).copied(),
                last: runs.last.as_ref().map(Last::from),
                zones: runs.zones.iter().map(zone).collect(),
                ..PolicyStatus::default()
            };
            (name.to_string(), policy)
        });
        let policies = policies.collect();
        return (Status { remembered: true, at: Some(now), policies, audit, ..Status::default() }, unread);
    };
    let telemetry = Telemetry::new(Arc::clone(&seams.clock), env!("CARGO_PKG_VERSION"), "");
    let mut policies = config.policies.clone();
    pauses::apply(&mut policies, &paused);
    let mut views = Vec::new();
    for policy in &policies {
        let runs = state.last_runs(&policy.name).await.unwrap_or_else(|error| {
            unread.push(chain(&error));
            LastRuns::default()
        });
        views.push(PolicyView::of(policy, &schedules, runs, now));
    }
    telemetry.configure(&views, &BTreeSet::new());
    let timetable = Timetable::new(&policies, &seams.host, &schedules, now);
    for policy in timetable.policies() {
        telemetry.next_run(policy, timetable.next(policy));
    }
    (Status { remembered: true, audit, ..telemetry.status_json() }, unread)
}

/// A daemon that listens on every address is reached on the loopback address.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

/// The body of the daemon's response, or the reason why there is none.
async fn ask(seams: &Seams, address: SocketAddr) -> Result<Bytes, String> {
    let no_daemon = |why: String| format!("no snapwarden daemon responds at {address} ({why})");
    let url =
        Url::parse(&format!("http://{address}{STATUS_PATH}")).map_err(|error| no_daemon(chain(&error)))?;
    let request = Request {
        method: Method::GET,
        url,
        headers: HeaderMap::new(),
        body: Bytes::new(),
        purpose: Purpose::Direct,
    };
    let exchange = async {
        let response = seams.transport.send(request).await.map_err(|error| no_daemon(chain(&error)))?;
        if LOCKED.contains(&response.status) {
            return Err(format!(
                "{address} wants TLS or a password: ask as root or as the daemon's user, who need neither, since they may open the \
                 socket in the state directory"
            ));
        }
        if response.status != StatusCode::OK {
            return Err(format!("{address} responds with {}: {OTHER_SERVICE}", response.status.as_u16()));
        }
        read_body(response.body, ANSWER_BYTES_MAX).await.map_err(|error| no_daemon(chain(&error)))
    };
    match timeout(&*seams.clock, ANSWER_TIMEOUT, exchange).await {
        Ok(answer) => answer,
        Err(late) => Err(no_daemon(late.to_string())),
    }
}

fn render(status: &Status, output: Output) -> String {
    let mut text = String::new();
    if !status.remembered {
        let _ = write!(text, "snapwarden {}", printable(&status.version));
        if status.draining {
            text.push_str(", stopping");
        }
        if let Some(at) = status.config.loaded_at {
            // Writing to a String cannot fail.
            let _ = write!(text, ", configuration loaded at {}", to_the_second(at));
        }
        text.push('\n');
    }
    if !status.policies.is_empty() {
        let rows = status.policies.iter().flat_map(|(name, policy)| policy_rows(name, policy)).collect();
        text.push('\n');
        text.push_str(&policies_table(rows, output));
    }
    if status.zones.values().any(|zone| zone.at.is_some()) {
        let head = &["ZONE", "COVERED", "UNCOVERED", "EXEMPT", "NOTE"];
        let rows = status.zones.iter().map(|(name, zone)| zone_row(name, zone)).collect();
        text.push('\n');
        text.push_str(&output.table(head, rows));
    }
    if !status.archives.is_empty() {
        let head = &["ARCHIVE", "IMAGES", "SIZE", "FREE", "NOTE"];
        let rows = status.archives.iter().map(|(name, archive)| archive_row(name, archive)).collect();
        text.push('\n');
        text.push_str(&output.table(head, rows));
    }
    if !status.downloads.is_empty() {
        let head = &["DOWNLOAD", "INSTANCE", "SNAPSHOT", "INTO", "SINCE", "PROGRESS"];
        text.push('\n');
        text.push_str(&output.table(head, status.downloads.iter().map(download_row).collect()));
    }
    text
}

/// Where the terminal is narrow, the last columns stand below each row.
fn policies_table(rows: Vec<Row>, output: Output) -> String {
    let head = ["POLICY", "NEXT RUN", "LAST RUN", "RESULT", "ZONE", "LAST SUCCESS", "PLAN", "NOTE"];
    if !output.is_narrow() {
        return output.table(&head, rows);
    }
    let (columns, _) = head.split_at(5);
    let split = |mut row: Row| {
        let mut below = row.split_off(columns.len().min(row.len())).into_iter().map(|(text, _)| text);
        let mut texts: Vec<String> =
            below.next().map(|at| format!("last success {at}")).into_iter().collect();
        texts.extend(below.filter(|text| !text.is_empty()));
        (row, texts.join(", "))
    };
    output.table_with_text(columns, rows.into_iter().map(split).collect(), "")
}

/// A row for each zone; the policy's own cells are in the first.
fn policy_rows(name: &str, policy: &PolicyStatus) -> Vec<Row> {
    let next = match (policy.running_since, policy.enabled) {
        (Some(since), _) => (format!("running since {}", to_the_second(since)), Tone::Good),
        (None, false) => match policy.paused_since {
            Some(since) => (format!("paused by hand since {}", to_the_second(since)), Tone::Bad),
            None => ("(not enabled)".to_owned(), Tone::Dim),
        },
        // Every policy that is known has a time zone.
        (None, true) if policy.timezone.is_none() => moment(None, "(not known)"),
        (None, true) => moment(policy.next_run_at, "(manual)"),
    };
    let (last, result) = match &policy.last {
        Some(last) => {
            let tone = match (&*last.result, policy.enabled) {
                (_, false) => Tone::Dim,
                ("success", true) => Tone::Good,
                (_, true) => Tone::Bad,
            };
            (moment(Some(last.finished_at), ""), (last.result.clone(), tone))
        }
        None => (moment(None, "(never)"), plain("")),
    };
    let of_policy = [plain(name), next, last, result];
    let blank = || [(); 4].map(|()| plain(""));
    let mut rows: Vec<Row> = Vec::new();
    for (zone, known) in &policy.zones {
        let first = if rows.is_empty() { of_policy.clone() } else { blank() };
        rows.push(first.into_iter().chain(zone_cells(zone, known)).collect());
    }
    if rows.is_empty() {
        rows.push(of_policy.into());
    }
    rows
}

fn zone_cells(zone: &str, known: &ZoneStatus) -> [(String, Tone); 4] {
    let plan = known.plan.as_ref().map_or_else(String::new, plan_sums);
    let note = match (&known.failure, &known.held) {
        (None, None) if known.gate_alert.is_some() => {
            (format!("ALERT: {}", known.gate_alert.clone().unwrap_or_default()), Tone::Bad)
        }
        (Some(failure), _) => (format!("FAILED: {failure}"), Tone::Bad),
        (None, Some(held)) => (format!("BLOCKED by the guard: {held}"), Tone::Bad),
        (None, None) => {
            let pending = known.plan.as_ref().map_or(0, |plan| plan.pending + plan.blocked_by_source);
            let InstanceStates { stale, none, vanished, .. } = known.instances;
            let counts = [(none, "without snapshot"), (stale, "stale"), (vanished, "vanished")];
            let mut notes: Vec<String> = counts
                .iter()
                .filter(|(count, _)| *count > 0)
                .map(|(count, state)| format!("{count} {state}"))
                .collect();
            let tone = if none + stale > 0 { Tone::Bad } else { Tone::Plain };
            if pending > 0 {
                notes.push(format!("{pending} pending: see `snapwarden plan`"));
            }
            (notes.join(", "), tone)
        }
    };
    [plain(zone), moment(known.last_success_at, "(never)"), plain(plan), note]
}

fn zone_row(name: &str, zone: &ZoneCoverage) -> Row {
    vec![
        plain(name),
        plain(zone.covered.to_string()),
        plain(zone.uncovered.to_string()),
        plain(zone.exempt.to_string()),
        plain(uncovered_text(zone).unwrap_or_default()),
    ]
}

fn archive_row(name: &str, archive: &ArchiveStats) -> Row {
    let note = match (&archive.error, archive.corrupt) {
        (Some(error), _) => (error.clone(), Tone::Bad),
        (None, 0) => plain(""),
        (None, corrupt) => (format!("{corrupt} damaged"), Tone::Bad),
    };
    vec![
        plain(name),
        plain(archive.images.to_string()),
        plain(size(archive.bytes)),
        plain(archive.free_bytes.map_or_else(String::new, size)),
        note,
    ]
}

fn download_row(download: &DownloadStatus) -> Row {
    vec![
        plain(format!("{} {}", download.policy, download.zone)),
        plain(instance(download.instance_name.as_deref())),
        plain(&download.snapshot_name),
        plain(download.archives.join(", ")),
        moment(download.started_at, ""),
        (download.how_far.to_string(), Tone::Good),
    ]
}

fn moment(at: Option<Timestamp>, none: &str) -> (String, Tone) {
    match at {
        Some(at) => plain(to_the_second(at).to_string()),
        None => (none.to_owned(), Tone::Dim),
    }
}
