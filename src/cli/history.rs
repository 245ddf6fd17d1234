//! `history`: the audit log for people, one row a change.

use jiff::Timestamp;
use serde_json::json;
use uuid::Uuid;

use crate::cli::args::{self, Global};
use crate::cli::assemble::{self, Seams};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::{Output, Row, Tone, plain};
use crate::lookup::{self, Kind};
use crate::state::audit::INTENDED;
use crate::state::history::{Change, DamagedLine};
use crate::text::{chain, counted, excerpt, to_the_second};

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
        "failed" => (format!("{action} FAILED"), Tone::Bad),
        INTENDED => (format!("{action} begun"), Tone::Dim),
        outcome => (format!("{action} {outcome}"), Tone::Dim),
    }
}

/// Who did it, and why; or why it was not done.
fn why(change: &Change) -> String {
    let who = change.policy.as_ref().map(|policy| format!("policy {policy}"));
    let archive = change.archive.as_ref().map(|archive| format!("archive {archive}"));
    let of: Vec<String> = who.into_iter().chain(archive).collect();
    let reasons = change.reasons.join("; ");
    let why = match (&change.message, change.outcome.as_str()) {
        (Some(message), "done") => format!("{reasons} ({message})"),
        (Some(message), _) => message.clone(),
        (None, INTENDED) => format!("no result is known: it is still running, or was killed; {reasons}"),
        (None, _) => reasons,
    };
    [of.join(", "), why].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": ")
}
