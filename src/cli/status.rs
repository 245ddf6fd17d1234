//! `status`: the state of the running daemon.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use jiff::Timestamp;
use serde_json::Value;
use url::Url;

use crate::archive::stats::ArchiveStats;
use crate::cli::args::Global;
use crate::cli::assemble::{self, Seams};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::once::{instance, plan_sums};
use crate::cli::output::{Output, Row, Tone, plain, to_the_second};
use crate::clock::timeout;
use crate::run::coverage::{InstanceStates, uncovered_text};
use crate::state::last_runs::ZoneCoverage;
use crate::telemetry::status::{DownloadStatus, PolicyStatus, Status, ZoneStatus};
use crate::text::{chain, counted, printable, size};
use crate::transport::{Purpose, Request, read_body};

/// Enough for some thousand policies with ten zones each.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// The daemon answers from memory, so a slow response means that it hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Asks the daemon of this configuration for its status, and prints it.
///
/// # Errors
/// [`Refusal`] if nothing answers, or something that is not snapwarden.
pub async fn status(global: &Global, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(&global.config)?;
    let address = reachable(config.server.listen);
    let answer = ask(&Seams::real(), address).await.map_err(Refusal::failed)?;
    let strange = |error: serde_json::Error| {
        let text = format!("{address} does not respond like snapwarden ({error}): {OTHER_SERVICE}");
        Refusal::failed(text)
    };
    let json: Value = serde_json::from_slice(&answer).map_err(strange)?;
    let status: Status = serde_json::from_slice(&answer).map_err(strange)?;
    output.show(|| &json, || render(&status, output));
    let attention = attention(&status);
    for line in &attention {
        output.complain(line);
    }
    Ok(if attention.is_empty() { Exit::Done } else { Exit::Failed })
}

/// The likely cause if the response is not the daemon's.
const OTHER_SERVICE: &str = "another service may use the port of `listen` in `[server]`";

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
    let no_daemon = |why: String| {
        format!(
            "no snapwarden daemon responds at {address} ({why}): see `systemctl status snapwarden`, or start it \
             with `snapwarden run`"
        )
    };
    let url =
        Url::parse(&format!("http://{address}/api/v1/status")).map_err(|error| no_daemon(chain(&error)))?;
    let request = Request {
        method: Method::GET,
        url,
        headers: HeaderMap::new(),
        body: Bytes::new(),
        purpose: Purpose::Api,
    };
    let exchange = async {
        let response = seams.transport.send(request).await.map_err(|error| no_daemon(chain(&error)))?;
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

/// The problems that need attention, a line each.
fn attention(status: &Status) -> Vec<String> {
    let mut lines = Vec::new();
    if !status.config.last_reload_successful {
        lines.push(
            "the configuration file could not be reloaded, the previous one is in use: see `snapwarden check`"
                .to_owned(),
        );
    }
    if let Some(error) = &status.state_error {
        lines.push(format!("the results of runs cannot be saved: {error}"));
    }
    for (name, policy) in &status.policies {
        let is_told =
            |zone: &ZoneStatus| zone.failure.is_some() || zone.held.is_some() || !zone.problems.is_empty();
        let failed_zones = policy.zones.values().any(is_told);
        for (zone, known) in &policy.zones {
            if let Some(failure) = &known.failure {
                lines.push(format!("policy {name}, zone {zone}: {failure}"));
            }
            if let Some(held) = &known.held {
                lines.push(format!("policy {name}, zone {zone}: deletions are blocked by the guard: {held}"));
            }
            for problem in &known.problems {
                lines.push(format!("policy {name}, zone {zone}: {problem}"));
            }
            if let Some(alert) = &known.gate_alert {
                lines.push(format!("policy {name}, zone {zone}: {alert}"));
            }
        }
        match &policy.last {
            // A failed zone was reported above.
            Some(last) if last.result != "success" && !failed_zones => lines.push(format!(
                "policy {name}: its last run ended at {} with result {}",
                to_the_second(last.finished_at),
                last.result
            )),
            _ => {}
        }
    }
    for (name, archive) in &status.archives {
        if let Some(error) = &archive.error {
            lines.push(format!("archive {name} cannot be read: {error}"));
        }
        if archive.corrupt > 0 {
            lines.push(format!(
                "archive {name} has {}: see `snapwarden archive list {name}`",
                counted(usize::try_from(archive.corrupt).unwrap_or(usize::MAX), "damaged file")
            ));
        }
    }
    lines
}

fn render(status: &Status, output: Output) -> String {
    let mut text = format!("snapwarden {}", printable(&status.version));
    if status.draining {
        text.push_str(", stopping");
    }
    if let Some(at) = status.config.loaded_at {
        // Writing to a String cannot fail.
        let _ = write!(text, ", configuration loaded at {}", to_the_second(at));
    }
    text.push('\n');
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
        (None, false) => ("(not enabled)".to_owned(), Tone::Dim),
        (None, true) => moment(policy.next_run_at, "(manual)"),
    };
    let (last, result) = match &policy.last {
        Some(last) => {
            let tone = if last.result == "success" { Tone::Good } else { Tone::Bad };
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
