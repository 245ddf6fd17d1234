//! `hold`, `unhold` and `holds`: snapshots that no policy deletes.

use serde_json::json;

use crate::cli::args::{self, Global};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::{Output, Row, plain, to_the_second};
use crate::snapshot::SnapshotId;
use crate::state::holds::Hold;
use crate::text::printable;

/// Puts a snapshot on hold. Whether it exists is not checked.
///
/// # Errors
/// [`Refusal`] if the state cannot be changed.
pub async fn hold(global: &Global, hold: &args::Hold, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(&global.config)?;
    let seams = Seams::real();
    let now = seams.clock.now();
    if let Some(until) = hold.until.filter(|until| *until <= now) {
        let text = format!("--until {until} is in the past: give a future time, or leave it out for no end");
        return Err(Refusal::usage(text));
    }
    let state = assemble::state(&config, &seams, Use::Changing)?;
    let new = Hold { snapshot: hold.snapshot, until: hold.until, reason: hold.reason.clone(), since: now };
    let replaced = state.hold(&*seams.clock, new.clone()).await?;
    let before = replaced.map_or_else(String::new, |before| format!(" (previously {})", terms(&before)));
    output.show(|| &new, || format!("snapshot {} is on hold {}{before}\n", new.snapshot, terms(&new)));
    Ok(Exit::Done)
}

/// Releases a snapshot. One that is not on hold is no error.
///
/// # Errors
/// [`Refusal`] if the state cannot be changed.
pub async fn unhold(global: &Global, snapshot: SnapshotId, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(&global.config)?;
    let seams = Seams::real();
    let state = assemble::state(&config, &seams, Use::Changing)?;
    let was = state.unhold(&*seams.clock, snapshot).await?;
    let text = match &was {
        Some(was) => format!("snapshot {snapshot} is no longer on hold (previously {})\n", terms(was)),
        None => format!(
            "snapshot {snapshot} was not on hold, so nothing changed; `snapwarden holds` lists the holds\n"
        ),
    };
    output.show(|| json!({ "snapshot": snapshot, "was_held": was.is_some() }), || text);
    Ok(Exit::Done)
}

/// Lists the snapshots on hold.
///
/// # Errors
/// [`Refusal`] if the state cannot be read.
pub async fn holds(global: &Global, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(&global.config)?;
    let seams = Seams::real();
    let state = assemble::state(&config, &seams, Use::Reading)?;
    let mut holds = state.holds().await?.holds;
    let now = seams.clock.now();
    holds.retain(|hold| hold.counts_at(now));
    let head = &["SNAPSHOT", "SINCE", "UNTIL", "REASON"];
    let rows: Vec<Row> = holds.iter().map(row).collect();
    let none = "no snapshot is on hold\n".to_owned();
    output.show(|| &holds, || if rows.is_empty() { none } else { output.table(head, rows) });
    Ok(Exit::Done)
}

fn row(hold: &Hold) -> Row {
    vec![
        plain(hold.snapshot.to_string()),
        plain(to_the_second(hold.since).to_string()),
        plain(hold.until.map_or_else(|| "forever".to_owned(), |until| until.to_string())),
        plain(hold.reason.clone().unwrap_or_default()),
    ]
}

/// `until 2027-01-01T00:00:00Z: an audit`, or `forever`.
fn terms(hold: &Hold) -> String {
    let until = hold.until.map_or_else(|| "forever".to_owned(), |until| format!("until {until}"));
    match &hold.reason {
        Some(reason) => format!("{until}: {}", printable(reason)),
        None => until,
    }
}
