//! `hold`, `unhold` and `holds`: snapshots that no policy deletes.

use jiff::Timestamp;
use serde_json::json;

use crate::cli::args::{self, Global};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::once::instance;
use crate::cli::output::{Output, Row, plain};
use crate::cli::survey::{IDS_ARE_SHOWN, LOOK_WAIT_MAX, Survey};
use crate::clock::timeout;
use crate::config::sections::Config;
use crate::lookup::{self, Kind, Known, LookupError};
use crate::run::archive_holds::{HoldMarker, unmarked_text};
use crate::snapshot::SnapshotId;
use crate::state::directory::StateDirectory;
use crate::state::holds::Hold;
use crate::text::{chain, counted, excerpt, printable, to_the_second};

/// Puts a snapshot on hold. One that no zone and no archive knows is refused; if that can't be asked, a whole id is taken.
///
/// # Errors
/// [`Refusal`] if the snapshot is unknown, or the state cannot be changed.
pub async fn hold(global: &Global, hold: &args::Hold, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let seams = Seams::real();
    let now = seams.clock.now();
    let until = hold.until.as_ref().map(|until| until.ahead_of(to_the_second(now))).transpose()?;
    if let Some(until) = until.filter(|until| *until <= now) {
        let text = format!("--until {until} is in the past: give a future time, or leave it out for no end");
        return Err(Refusal::usage(text));
    }
    let reading = assemble::state(&config, &seams, Use::Reading)?;
    let mut survey = Survey::default();
    survey.ask_zones(&config, &seams).await;
    // Also for a listed one: its copies are marked as well.
    survey.ask_archives(&config, &seams, &reading).await;
    let holds = reading.holds().await?.holds;
    let known = survey.snapshots().chain(holds.iter().map(Hold::known));
    let snapshot = lookup::find(Kind::Snapshot, &hold.snapshot, known);
    let snapshot = snapshot.map(SnapshotId).map_err(|error| survey.not_found(&error))?;
    let about = survey.about(snapshot);
    let shard = reading.shard().zip(survey.instance_of(snapshot));
    if let Some((_, instance)) = shard.filter(|(shard, instance)| !shard.has(*instance)) {
        let of = shard.map(|(shard, _)| shard.of(instance).to_string()).unwrap_or_default();
        return Err(Refusal::usage(format!(
            "snapshot {snapshot} is of an instance of shard {of}: a hold here would protect nothing; put it on hold there"
        )));
    }
    let doubts = survey.doubts().join("; ");
    if about.is_none() && doubts.is_empty() {
        let places = survey.asked();
        let text = format!("snapshot {snapshot} is not in {places}: check the id; {IDS_ARE_SHOWN}");
        return Err(Refusal::usage(text));
    }
    if about.is_none() {
        output.complain(&format!(
            "warning: whether snapshot {snapshot} exists was not checked ({doubts}); it is put on hold all the same"
        ));
    }
    let about = about.or_else(|| holds.into_iter().find(|hold| hold.snapshot == snapshot)?.about);
    let state = assemble::state(&config, &seams, Use::Changing)?;
    let new = Hold { snapshot, until, reason: hold.reason.clone(), since: now, about };
    let replaced = state.hold(&*seams.clock, new.clone()).await?;
    mark(&config, &seams, &state, &survey, &new, output).await;
    let before = replaced.map_or_else(String::new, |before| format!(" (previously {})", terms(&before)));
    output.show(|| &new, || format!("{} is on hold {}{before}\n", described(&new), terms(&new)));
    Ok(Exit::Done)
}

/// Marks a hold in the archives that have copies, so that the pruning of other hosts sees it. What can't be marked now, the
/// next run marks.
async fn mark(
    config: &Config,
    seams: &Seams,
    state: &StateDirectory,
    survey: &Survey,
    hold: &Hold,
    output: Output,
) {
    if survey.archives.is_empty() {
        return;
    }
    let marker = match HoldMarker::new(state, &*seams.clock, &*seams.randomness, &seams.host).await {
        Ok(marker) => marker,
        Err(why) => {
            return output.complain(&format!("warning: the hold is not marked in the archives: {why}"));
        }
    };
    for catalogue in &survey.archives {
        let name = catalogue.archive();
        let Some(settings) = config.archives.get(name) else { continue };
        let archive = assemble::archive(name, settings, seams, (&config.state_directory, Use::Changing));
        // One without credentials could not have been read.
        let Ok(archive) = archive else { continue };
        if let Err(error) = marker.mark(&archive, catalogue, hold).await {
            output.complain(&format!("warning: {}", unmarked_text(name, hold.snapshot, &error)));
        }
    }
}

/// Removes the marks of a hold from the archives, or those of others too. Returns how many stay that others put, and complains
/// of the archives whose marks may stay.
async fn unmark(
    config: &Config,
    seams: &Seams,
    state: &StateDirectory,
    snapshot: SnapshotId,
    others: bool,
    output: Output,
) -> usize {
    let mut stay = 0;
    if config.archives.is_empty() {
        return stay;
    }
    let marker = match HoldMarker::new(state, &*seams.clock, &*seams.randomness, &seams.host).await {
        Ok(marker) => marker,
        Err(why) => {
            output.complain(&format!("warning: marks of the hold may stay in the archives: {why}"));
            return 0;
        }
    };
    for (name, settings) in &config.archives {
        let removed = async {
            let archive = assemble::archive(name, settings, seams, (&config.state_directory, Use::Changing));
            let archive = archive.map_err(|refusal| refusal.text)?;
            let catalogue = timeout(&*seams.clock, LOOK_WAIT_MAX, archive.catalogue()).await;
            let catalogue = catalogue.map_err(|late| late.to_string())?.map_err(|error| chain(&error))?;
            let marks = catalogue.holds().get(&snapshot).into_iter().flatten();
            let now = seams.clock.now();
            let of_others =
                marks.filter(|mark| mark.state != marker.state_id() && mark.counts_at(now)).count();
            marker.unmark(&archive, &catalogue, snapshot, others).await.map_err(|error| chain(&error))?;
            Ok::<_, String>(if others { 0 } else { of_others })
        };
        match removed.await {
            Ok(of_others) => stay += of_others,
            Err(why) => output.complain(&format!(
                "warning: if archive {name} has a mark of the hold, it stays, and its copy with it: {why}; run `snapwarden \
                 unhold {snapshot}` again once the archive is there"
            )),
        }
    }
    stay
}

/// Releases a snapshot. One that is not on hold is no error. Of several with a name, the only one on hold is meant; nothing
/// is asked unless none on hold has it.
///
/// # Errors
/// [`Refusal`] if the snapshot is unknown, or the state cannot be changed.
pub async fn unhold(global: &Global, text: &str, others: bool, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let seams = Seams::real();
    let reading = assemble::state(&config, &seams, Use::Reading)?;
    let holds = reading.holds().await?.holds;
    // Holds of earlier versions have no names; the audit log may.
    let mut known: Vec<Known> = holds.iter().map(Hold::known).collect();
    if lookup::whole_id(text).is_none() {
        let logged = reading.known_in_history(Kind::Snapshot, text).await.unwrap_or_default();
        let is_held = |known: &Known| holds.iter().any(|hold| hold.snapshot.0 == known.id);
        known.extend(logged.into_iter().filter(is_held));
    }
    let snapshot = match lookup::find(Kind::Snapshot, text, known) {
        Ok(id) => id,
        Err(several @ LookupError::Several { .. }) => return Err(Refusal::usage(several.to_string())),
        Err(LookupError::Unknown { .. }) => {
            let mut survey = Survey::default();
            survey.ask_zones(&config, &seams).await;
            survey.ask_archives(&config, &seams, &reading).await;
            let found = lookup::find(Kind::Snapshot, text, survey.snapshots());
            found.map_err(|error| survey.not_found(&error))?
        }
    };
    let snapshot = SnapshotId(snapshot);
    let state = assemble::state(&config, &seams, Use::Changing)?;
    let was = state.unhold(&*seams.clock, snapshot).await?;
    let stay = unmark(&config, &seams, &state, snapshot, others, output).await;
    if stay > 0 {
        output.complain(&format!(
            "snapshot {snapshot} stays on hold by {} that other hosts put in the archives; if those hosts are gone: snapwarden \
             unhold {snapshot} --others",
            counted(stay, "mark")
        ));
    }
    let text = match &was {
        Some(was) => format!("{} is no longer on hold (previously {})\n", described(was), terms(was)),
        None => format!(
            "snapshot {snapshot} was not on hold, so nothing changed; `snapwarden holds` lists the holds\n"
        ),
    };
    output
        .show(|| json!({ "snapshot": snapshot, "was_held": was.is_some(), "held_by_others": stay }), || text);
    Ok(Exit::Done)
}

/// Lists the snapshots on hold.
///
/// # Errors
/// [`Refusal`] if the state cannot be read.
pub async fn holds(global: &Global, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let seams = Seams::real();
    let state = assemble::state(&config, &seams, Use::Reading)?;
    let mut holds = state.holds().await?.holds;
    let now = seams.clock.now();
    holds.retain(|hold| hold.counts_at(now));
    let is_narrow = output.is_narrow();
    let rows = holds.iter().map(|hold| (row(hold, is_narrow), hold.reason.clone().unwrap_or_default()));
    let rows: Vec<(Row, String)> = rows.collect();
    let none = "no snapshot is on hold\n".to_owned();
    let head = &["SNAPSHOT", "INSTANCE", "TAKEN", "SINCE", "UNTIL"];
    let table = || output.table_with_text(head, rows, "REASON");
    output.show(|| &holds, || if holds.is_empty() { none } else { table() });
    Ok(Exit::Done)
}

fn row(hold: &Hold, is_narrow: bool) -> Row {
    // Without seconds if there is little space.
    let time = |at: Timestamp| {
        if is_narrow { at.strftime("%Y-%m-%d").to_string() } else { to_the_second(at).to_string() }
    };
    let about = hold.about.as_ref();
    let instance = about.map_or_else(|| "-".to_owned(), |about| instance(about.instance_name.as_deref()));
    vec![
        plain(if is_narrow { hold.snapshot.short() } else { hold.snapshot.to_string() }),
        plain(if is_narrow { excerpt(&instance, 24) } else { instance }),
        plain(about.map_or_else(|| "-".to_owned(), |about| time(about.created_at))),
        plain(time(hold.since)),
        plain(hold.until.map_or_else(|| "forever".to_owned(), time)),
    ]
}

/// `snapshot 9ee8… (web-1_ROOT-1_20261101023000)`.
fn described(hold: &Hold) -> String {
    let name = hold.about.as_ref().map(|about| format!(" ({})", printable(&about.name)));
    format!("snapshot {}{}", hold.snapshot, name.unwrap_or_default())
}

/// `until 2027-01-01T00:00:00Z: an audit`, or `forever`.
fn terms(hold: &Hold) -> String {
    let until = hold.until.map_or_else(|| "forever".to_owned(), |until| format!("until {until}"));
    match &hold.reason {
        Some(reason) => format!("{until}: {}", printable(reason)),
        None => until,
    }
}
