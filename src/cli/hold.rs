//! `hold`, `unhold` and `holds`: snapshots that no policy deletes.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;

use crate::archive::backend::Archive;
use crate::cli::args::{self, Global};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::{Output, Row, plain, to_the_second};
use crate::clock::timeout;
use crate::config::sections::Config;
use crate::run::archive_presence::{Found, Looker, Presence};
use crate::snapshot::{SnapshotId, ZoneName};
use crate::state::directory::StateDirectory;
use crate::state::holds::Hold;
use crate::text::{chain, printable};

/// How long zones and archives may take to say whether they know a snapshot.
const LOOK_WAIT_MAX: Duration = Duration::from_secs(20);

/// Puts a snapshot on hold. One that no zone and no archive knows is refused; if that can't be asked, it is taken.
///
/// # Errors
/// [`Refusal`] if the snapshot is unknown, or the state cannot be changed.
pub async fn hold(global: &Global, hold: &args::Hold, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(&global.config)?;
    let seams = Seams::real();
    let now = seams.clock.now();
    let until = hold.until.as_ref().map(|until| until.ahead_of(to_the_second(now))).transpose()?;
    if let Some(until) = until.filter(|until| *until <= now) {
        let text = format!("--until {until} is in the past: give a future time, or leave it out for no end");
        return Err(Refusal::usage(text));
    }
    let reading = assemble::state(&config, &seams, Use::Reading)?;
    match look_for(hold.snapshot, &config, &seams, &reading).await {
        Known::Yes => {}
        Known::No(places) => {
            let text = format!(
                "snapshot {} is not in {places}: check the id; `snapwarden plan` and `snapwarden archive list` show ids",
                hold.snapshot
            );
            return Err(Refusal::usage(text));
        }
        Known::Maybe(why) => output.complain(&format!(
            "warning: whether snapshot {} exists was not checked ({why}); it is put on hold all the same",
            hold.snapshot
        )),
    }
    let state = assemble::state(&config, &seams, Use::Changing)?;
    let new = Hold { snapshot: hold.snapshot, until, reason: hold.reason.clone(), since: now };
    let replaced = state.hold(&*seams.clock, new.clone()).await?;
    let before = replaced.map_or_else(String::new, |before| format!(" (previously {})", terms(&before)));
    output.show(|| &new, || format!("snapshot {} is on hold {}{before}\n", new.snapshot, terms(&new)));
    Ok(Exit::Done)
}

/// Whether a snapshot exists.
enum Known {
    Yes,
    /// In none of these places.
    No(String),
    /// Why that is not known.
    Maybe(String),
}

/// Looks for a snapshot in the zones of all policies, then in all archives.
async fn look_for(snapshot: SnapshotId, config: &Config, seams: &Seams, state: &StateDirectory) -> Known {
    let zones: BTreeSet<&ZoneName> = config.policies.iter().flat_map(|policy| &policy.zones).collect();
    if zones.is_empty() {
        return Known::Maybe("no policy has a zone".to_owned());
    }
    let credentials = match assemble::credentials(config) {
        Ok(credentials) => credentials,
        Err(refusal) => return Known::Maybe(refusal.text),
    };
    let client = assemble::client(config, Some(credentials), seams);
    let in_zone = async |zone: &ZoneName| {
        let listed = client.zone(zone).list_snapshots().await;
        let (listed, _) = listed.map_err(|error| format!("zone {zone}: {}", chain(&error)))?;
        Ok(listed.snapshots.iter().any(|listed| listed.id == snapshot))
    };
    // As a run looks at them: one whose disk is not mounted, or that lost copies, can't be asked.
    let in_archive = async |archive: &Archive| {
        let name = archive.name();
        let because = |why: String| format!("archive {name}: {why}");
        let Some(rules) = config.archive_rules.get(name) else { return Ok(false) };
        let looker = Looker::new(state).await.map_err(because)?;
        let Found { catalogue, presence, .. } = looker.look(archive, &rules.guard).await.map_err(because)?;
        match (catalogue.problems().first(), presence) {
            _ if catalogue.copies().iter().any(|copy| copy.manifest.snapshot.id == snapshot) => Ok(true),
            (_, Presence::Closed(why)) => Err(because(why)),
            (Some(problem), _) => Err(because(problem.describe())),
            (None, _) => Ok(false),
        }
    };
    let look = async {
        let mut answers = join_all(zones.iter().map(|zone| in_zone(zone))).await;
        if !answers.contains(&Ok(true)) {
            match assemble::archives(config, seams) {
                Ok(archives) => {
                    answers.extend(join_all(archives.values().map(|archive| in_archive(archive))).await);
                }
                Err(refusal) => answers.push(Err(refusal.text)),
            }
        }
        answers
    };
    let Ok(answers) = timeout(&*seams.clock, LOOK_WAIT_MAX, look).await else {
        return Known::Maybe(format!("no answer for {} s", LOOK_WAIT_MAX.as_secs()));
    };
    if answers.contains(&Ok(true)) {
        return Known::Yes;
    }
    let unanswered: Vec<String> = answers.into_iter().filter_map(Result::err).collect();
    if !unanswered.is_empty() {
        return Known::Maybe(unanswered.join("; "));
    }
    let zones = zones.iter().map(|zone| format!("zone {zone}"));
    let archives = config.archives.keys().map(|archive| format!("archive {archive}"));
    Known::No(zones.chain(archives).collect::<Vec<_>>().join(", "))
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
