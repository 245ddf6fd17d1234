//! `hold`, `unhold` and `holds`: snapshots that stay whatever the policies say.

use crate::cli::args::{Global, HoldSnapshot, Unhold};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::output::{Output, Tone, to_the_second};
use crate::cli::{Exit, Refusal};
use crate::snapshot::SnapshotId;
use crate::state::holds::Hold;
use crate::text::printable;

#[derive(serde::Serialize)]
struct Unheld {
    snapshot: SnapshotId,
    was_held: bool,
}

/// Pins a snapshot. Whether there is such a snapshot is not looked at.
///
/// # Errors
/// [`Refusal`] if it could not be done.
pub async fn hold(global: &Global, hold: &HoldSnapshot, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let seams = Seams::real();
    let now = seams.clock.now();
    if let Some(until) = hold.until.filter(|until| *until <= now) {
        let text = format!(
            "--until {until} has passed: name a moment that is to come, or leave it out to hold for ever"
        );
        return Err(Refusal::new(Exit::Usage, text));
    }
    let state = assemble::state(&config, &seams, Use::Running)?;
    let new = Hold { snapshot: hold.snapshot, until: hold.until, reason: hold.reason.clone(), since: now };
    let replaced = state.hold(&*seams.clock, new.clone()).await.map_err(|error| Refusal::failed(&error))?;
    if output.is_json() {
        output.print_json(&new);
    } else {
        let before = replaced.map_or_else(String::new, |before| format!(" (before: {})", terms(&before)));
        output.print(&format!("snapshot {} is held {}{before}\n", new.snapshot, terms(&new)));
    }
    Ok(Exit::Done)
}

/// Takes the pin of a snapshot away. One that had none is no failure: it is as it should be.
///
/// # Errors
/// [`Refusal`] if it could not be done.
pub async fn unhold(global: &Global, unhold: &Unhold, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let seams = Seams::real();
    let state = assemble::state(&config, &seams, Use::Running)?;
    let snapshot = unhold.snapshot;
    let was = state.unhold(&*seams.clock, snapshot).await.map_err(|error| Refusal::failed(&error))?;
    if output.is_json() {
        output.print_json(&Unheld { snapshot, was_held: was.is_some() });
    } else if let Some(was) = was {
        output.print(&format!("snapshot {snapshot} is not held any more (before: {})\n", terms(&was)));
    } else {
        output.print(&format!(
            "snapshot {snapshot} was not held, so nothing changed; `snapwarden holds` shows what is held\n"
        ));
    }
    Ok(Exit::Done)
}

/// Shows what is held now.
///
/// # Errors
/// [`Refusal`] if it can't be told.
pub async fn holds(global: &Global, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let seams = Seams::real();
    let state = assemble::state(&config, &seams, Use::Looking)?;
    let mut holds = state.holds().await.map_err(|error| Refusal::failed(&error))?.holds;
    let now = seams.clock.now();
    holds.retain(|hold| hold.counts_at(now));
    if output.is_json() {
        output.print_json(&holds);
    } else if holds.is_empty() {
        output.print("nothing is held\n");
    } else {
        output
            .print(&output.table(&["SNAPSHOT", "SINCE", "UNTIL", "REASON"], holds.iter().map(row).collect()));
    }
    Ok(Exit::Done)
}

fn row(hold: &Hold) -> Vec<(String, Tone)> {
    let until = hold.until.map_or_else(|| "for ever".to_owned(), |until| until.to_string());
    let reason = hold.reason.clone().unwrap_or_default();
    [hold.snapshot.to_string(), to_the_second(hold.since).to_string(), until, reason]
        .map(|text| (text, Tone::Plain))
        .into()
}

/// `until 2027-01-01T00:00:00Z: an audit`, or `for ever`.
fn terms(hold: &Hold) -> String {
    let until = hold.until.map_or_else(|| "for ever".to_owned(), |until| format!("until {until}"));
    match &hold.reason {
        Some(reason) => format!("{until}: {}", printable(reason)),
        None => until,
    }
}
