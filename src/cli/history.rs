//! `history`: the audit log for people, one row a change.

use futures_util::future::join_all;
use jiff::Timestamp;
use serde_json::json;
use uuid::Uuid;

use crate::cli::args::{self, Global};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::{Output, Row, Tone, plain};
use crate::cli::survey::LOOK_WAIT_MAX;
use crate::clock::timeout;
use crate::config::sections::Config;
use crate::lookup::{self, Kind};
use crate::policy::name::ArchiveName;
use crate::run::audit_heads::{HeadInArchive, kept_head};
use crate::state::audit::INTENDED;
use crate::state::audit_chain::{AuditHead, ChainReport};
use crate::state::directory::StateDirectory;
use crate::state::history::{Change, DamagedLine};
use crate::text::{chain, counted, excerpt, printable, to_the_second};

/// The most changes in the table if no time is given: a few screens.
const NEWEST: usize = 50;

/// The most damaged lines that are named.
const DAMAGED_MAX: usize = 5;

/// The width of an instance's name on a narrow terminal.
const NAME_WIDTH: usize = 20;

/// Shows the audit log.
///
/// # Errors
/// [`Refusal`] if the instance is unknown, or the log cannot be read.
pub async fn history(global: &Global, wanted: &args::History, output: Output) -> Result<Exit, Refusal> {
    let seams = Seams::real();
    let (config, state) = assemble::configuration_and_state(&global.config, &seams);
    if let Err(why) = &config {
        output.complain(why);
    }
    if wanted.verify {
        return Box::pin(verify(config.as_ref().ok(), &seams, &state, output)).await;
    }
    let now = to_the_second(seams.clock.now());
    let since = wanted.since.as_ref().map(|since| since.back_from(now)).transpose()?;
    let instance: Option<Uuid> = match &wanted.instance {
        Some(text) => {
            let known = state.known_in_history(Kind::Instance, text).await?;
            let found = lookup::find(Kind::Instance, text, known);
            Some(found.map_err(|error| Refusal::usage(format!("{error}, in the audit log")))?)
        }
        None => None,
    };
    let most = if since.is_some() || output.is_json() { usize::MAX } else { NEWEST };
    let (policy, action) = (wanted.policy.as_ref().map(ToString::to_string), wanted.action.clone());
    let is_wanted = move |change: &Change| {
        since.is_none_or(|since| change.at >= since)
            && instance.is_none_or(|id| change.snapshot.instance_id.is_some_and(|of| of.0 == id))
            && policy.as_ref().is_none_or(|policy| change.policy.as_ref() == Some(policy))
            && action.as_ref().is_none_or(|action| change.action == *action)
    };
    let found = state.history(most, is_wanted).await?;
    for error in &found.unread {
        output.complain(&format!("{}; the changes in it are not shown", chain(error)));
    }
    complain_of_damaged(&found.damaged, output);
    if found.left_out > 0 {
        let more = counted(usize::try_from(found.left_out).unwrap_or(usize::MAX), "earlier change");
        output.complain(&format!("the newest {NEWEST}; {more} with --since, such as --since 30d"));
    }
    let none = "no such change stands in the audit log\n".to_owned();
    output.show(
        || json!(found.changes),
        || if found.changes.is_empty() { none } else { table(&found.changes, output) },
    );
    Ok(if config.is_ok() && found.unread.is_empty() { Exit::Done } else { Exit::Failed })
}

/// Checks the chain of the audit log, and whether it has the ends that the archives have.
async fn verify(
    config: Option<&Config>,
    seams: &Seams,
    state: &StateDirectory,
    output: Output,
) -> Result<Exit, Refusal> {
    // Before the log: a run that ends meanwhile must not have kept an end there that is not read here.
    let kept = match config {
        Some(config) => kept_heads(config, seams, state).await?,
        None => Vec::new(),
    };
    let report = state.verify_audit_log().await?;
    let mut archives = Vec::new();
    for (archive, kept) in kept {
        archives.push(match kept {
            Ok(head) => {
                let is_in_log = head.as_ref().map(|head| report.has(head));
                HeadInArchive { archive, at: head.map(|head| head.at), is_in_log, error: None }
            }
            Err(error) => HeadInArchive { archive, at: None, is_in_log: None, error: Some(error) },
        });
    }
    let is_cut = archives.iter().any(|kept| kept.is_in_log == Some(false));
    let is_intact = report.breaks.is_empty() && !is_cut;
    let is_whole = config.is_some() && archives.iter().all(|kept| kept.error.is_none());
    output.show(
        || {
            let mut json = json!(report);
            json["is_intact"] = json!(is_intact);
            json["archives"] = json!(archives);
            json
        },
        || verified_text(&report, &archives, is_intact),
    );
    Ok(if is_intact && is_whole { Exit::Done } else { Exit::Failed })
}

/// The end of the log as each archive has it that this state uses, or why that is not known.
async fn kept_heads(
    config: &Config,
    seams: &Seams,
    state: &StateDirectory,
) -> Result<Vec<(ArchiveName, Result<Option<AuditHead>, String>)>, Refusal> {
    let known = state.archives().await?;
    let Some(id) = known.state_id else { return Ok(Vec::new()) };
    let used = config.archives.iter().filter(|(name, _)| known.of(name).id.is_some());
    let asked = used.map(async |(name, settings)| {
        let archive = assemble::archive(name, settings, seams, (&config.state_directory, Use::Reading));
        let kept = match &archive {
            Ok(archive) => {
                let kept = kept_head(archive, id);
                timeout(&*seams.clock, LOOK_WAIT_MAX, kept).await.unwrap_or_else(|late| Err(late.to_string()))
            }
            Err(refusal) => Err(refusal.text.clone()),
        };
        (name.clone(), kept)
    });
    Ok(join_all(asked).await)
}

fn verified_text(report: &ChainReport, archives: &[HeadInArchive], is_intact: bool) -> String {
    let count = |count: u64, noun| counted(usize::try_from(count).unwrap_or(usize::MAX), noun);
    let mut lines = Vec::new();
    lines.push(match &report.begins {
        Some(begins) => format!("{} checked, from {begins} on", count(report.lines, "line")),
        None => "no line has a link yet: the next one that is written begins the chain".to_owned(),
    });
    if report.unlinked > 0 {
        lines.push(format!(
            "{} without a link, by an earlier version: not checked",
            count(report.unlinked, "line")
        ));
    }
    if report.pieces > 0 {
        lines.push(format!("{} left by crashes", count(report.pieces, "piece of a line")));
    }
    for part in &report.removed {
        lines.push(format!(
            "{} removed by `keep_audit` at {}",
            printable(&part.file),
            to_the_second(part.removed_at)
        ));
    }
    if let Some(head) = &report.head {
        lines.push(format!("last line of {}, hash {}", to_the_second(head.at), head.hash));
    }
    for kept in archives {
        let what = match (kept.at.map(to_the_second), kept.is_in_log, &kept.error) {
            (_, _, Some(error)) => format!("not known: {}", printable(error)),
            (Some(at), Some(false), _) => {
                format!(
                    "BROKEN: it has a last line of {at} that the log does not have: the log was cut at its end, or made anew"
                )
            }
            (Some(at), ..) => format!("its last line of {at} is in the log"),
            (None, ..) => "it has no last line yet".to_owned(),
        };
        lines.push(format!("archive {}: {what}", kept.archive));
    }
    for broken in &report.breaks {
        lines.push(format!("BROKEN: {}: {}", printable(&broken.place.to_string()), broken.problem));
    }
    lines.push(if is_intact { "the audit log is intact" } else { "the audit log was CHANGED" }.to_owned());
    lines.join("\n") + "\n"
}

/// Names the lines that can't be read.
pub(super) fn complain_of_damaged(damaged: &[DamagedLine], output: Output) {
    for DamagedLine { file, number, why } in damaged.iter().take(DAMAGED_MAX) {
        let file = file.file_name().unwrap_or_default().display();
        output.complain(&format!("line {number} of {file} can't be read, so its change is not shown: {why}"));
    }
    if damaged.len() > DAMAGED_MAX {
        let more = counted(damaged.len() - DAMAGED_MAX, "more line");
        output.complain(&format!("{more} of the audit log can't be read"));
    }
}

/// The changes as a table, the newest last.
pub(super) fn table(changes: &[Change], output: Output) -> String {
    let is_narrow = output.is_narrow();
    let rows = changes.iter().map(|change| (row(change, is_narrow), why(change))).collect();
    output.table_with_text(&["WHEN", "CHANGE", "INSTANCE", "SNAPSHOT", "TAKEN"], rows, "WHY")
}

fn row(change: &Change, is_narrow: bool) -> Row {
    // Without seconds, or without the time of the day, if there is little space.
    let time = |at: Timestamp, short: &str| {
        if is_narrow { at.strftime(short).to_string() } else { to_the_second(at).to_string() }
    };
    let snapshot = &change.snapshot;
    let unknown = || "-".to_owned();
    let instance = snapshot.instance_name.clone().or_else(|| Some(snapshot.instance_id?.to_string()));
    let instance = instance.unwrap_or_else(unknown);
    let id = snapshot.id.map(|id| if is_narrow { id.short() } else { id.to_string() });
    vec![
        plain(time(change.at, "%Y-%m-%d %H:%M")),
        what(change),
        plain(if is_narrow { excerpt(&instance, NAME_WIDTH) } else { instance }),
        plain(id.unwrap_or_else(unknown)),
        plain(snapshot.created_at.map_or_else(unknown, |at| time(at, "%Y-%m-%d"))),
    ]
}

/// What was done, or was not: `deleted`, `delete FAILED`.
fn what(change: &Change) -> (String, Tone) {
    let action = change.action.replace('_', " ");
    match change.outcome.as_str() {
        "done" => match action.as_str() {
            "create" => ("created".to_owned(), Tone::Good),
            "export" => ("exported".to_owned(), Tone::Good),
            "promote" => ("promoted".to_owned(), Tone::Good),
            "restore" => ("restored".to_owned(), Tone::Good),
            "delete" => ("DELETED".to_owned(), Tone::Bad),
            "prune copy" => ("copy pruned".to_owned(), Tone::Bad),
            "delete template" => ("template deleted".to_owned(), Tone::Bad),
            other => (format!("{other} done"), Tone::Plain),
        },
        // How it ended; this program did nothing.
        outcome if action == "vanish" => match outcome {
            "deleted_by_us" => ("deleted after all".to_owned(), Tone::Bad),
            "deleted_by_other" => ("DELETED by other".to_owned(), Tone::Bad),
            "deleted_with_instance" => ("DELETED with its instance".to_owned(), Tone::Bad),
            outcome => (outcome.to_uppercase(), Tone::Bad),
        },
        "failed" => (format!("{action} FAILED"), Tone::Bad),
        INTENDED => (format!("{action} begun"), Tone::Dim),
        outcome => (format!("{action} {outcome}"), Tone::Dim),
    }
}

/// Who did it, and why; or why it was not done.
fn why(change: &Change) -> String {
    // A run that finds how a snapshot ended did not do it.
    let is_finding = change.action == "vanish";
    let who = change.policy.as_ref().filter(|_| !is_finding).map(|policy| format!("policy {policy}"));
    let file = change.file.as_deref().map(|file| printable(file).into_owned());
    let archive = change.archive.as_ref().map(|archive| format!("archive {archive}"));
    let of: Vec<String> = who.into_iter().chain(archive).chain(file).collect();
    let reasons = change.reasons.join("; ");
    let why = match (&change.message, change.outcome.as_str()) {
        (Some(message), "done") => format!("{reasons} ({message})"),
        (Some(message), _) => message.clone(),
        (None, INTENDED) => format!("no result is known: it is still running, or was killed; {reasons}"),
        (None, _) => reasons,
    };
    [of.join(", "), why].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": ")
}
