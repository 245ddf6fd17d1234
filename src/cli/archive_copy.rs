//! `archive copy`: verified images from one archive to another.

use std::num::NonZeroUsize;

use serde_json::{Value, json};

use crate::archive::catalogue::StoredCopy;
use crate::archive::transfer::hash::Hashers;
use crate::cli::archive::{filter_of, show_daemon};
use crate::cli::args::{Copies, Global};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::{Output, Row, Tone, plain};
use crate::cli::signals::StopSignals;
use crate::lookup::{self, Kind, Known};
use crate::policy::name::ArchiveName;
use crate::run::archive_copy::{ArchiveCopier, Copying, Selection};
use crate::run::report::Step;
use crate::snapshot::SnapshotId;
use crate::state::audit::StepOutcome;
use crate::text::{counted, printable, to_the_second};

/// Copies what the other archive lacks.
///
/// # Errors
/// [`Refusal`] if nothing was begun.
pub(super) async fn copy(
    global: &Global,
    [from, to]: [&ArchiveName; 2],
    (snapshot, newest, which): (Option<&str>, bool, &Copies),
    concurrency: NonZeroUsize,
    output: Output,
) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    assemble::check_archives(&config, [from, to])?;
    if from == to {
        return Err(Refusal::usage(format!("archive `{from}` cannot be copied to itself")));
    }
    let seams = Seams::real();
    let open = |name: &ArchiveName| {
        let settings =
            config.archives.get(name).ok_or_else(|| Refusal::usage(format!("no archive `{name}`")))?;
        assemble::archive(name, settings, &seams, (&config.state_directory, Use::Changing))
    };
    let (source, target) = (open(from)?, open(to)?);
    let state = assemble::state(&config, &seams, Use::Changing)?;
    let catalogue = source.catalogue().await?;
    let only = filter_of(which, catalogue.copies())?;
    let snapshot = snapshot.map(|text| {
        let known = catalogue.copies().iter().map(known);
        let found = lookup::find(Kind::Snapshot, text, known);
        found.map(SnapshotId).map_err(|error| Refusal::usage(format!("in archive {from}, {error}")))
    });
    let snapshot = snapshot.transpose()?;
    if let Some(id) =
        snapshot.filter(|id| catalogue.copies().iter().all(|copy| copy.manifest.snapshot.id != *id))
    {
        return Err(Refusal::usage(format!("archive {from} has no copy of snapshot {id}")));
    }
    let rules = |name: &ArchiveName| {
        config.archive_rules.get(name).ok_or_else(|| Refusal::usage(format!("archive `{name}` has no rules")))
    };
    let hashers = Hashers::default();
    let work = ArchiveCopier {
        state: &state,
        clock: &seams.clock,
        randomness: &*seams.randomness,
        hashers: &hashers,
        host: &seams.host,
        from: &source,
        to: &target,
        guards: [&rules(from)?.guard, &rules(to)?.guard],
        may_empty: rules(to)?.may_empty(),
        user_data: rules(to)?.user_data,
    };
    let report = |step: &Step| {
        if step.outcome != StepOutcome::Done {
            let why = step.message.clone().unwrap_or_else(|| "it was not begun".to_owned());
            let id = step.facts.snapshot.id.map_or_else(String::new, |id| id.to_string());
            output.complain(&format!("archive {to}: snapshot {id} is not copied: {why}"));
        }
    };
    let mut stop = StopSignals::install()?;
    let selection = Selection { only, snapshot, newest };
    let ended = tokio::select! {
        ended = work.copy(&selection, concurrency, &report) => ended,
        () = stop.next() => {
            return Err(Refusal::failed(format!(
                "stopped: what was published stays, and the same command goes on from there; `snapwarden archive list {to}` \
                 shows it"
            )));
        }
    };
    let copying = ended.map_err(Refusal::failed)?;
    show_daemon(&state, &seams, output).await;
    output.show(|| json(from, to, &copying), || render(from, to, &copying, output));
    let all_done = copying.steps.iter().all(|step| step.outcome == StepOutcome::Done);
    Ok(if all_done { Exit::Done } else { Exit::Failed })
}

/// The snapshot of a copy, as it is looked up.
pub(super) fn known(copy: &StoredCopy) -> Known {
    Known {
        id: copy.manifest.snapshot.id.0,
        name: Some(copy.manifest.snapshot.name.to_string()),
        zone: Some(copy.manifest.zone.clone()),
        taken_at: Some(copy.manifest.snapshot.created_at),
    }
}

fn json(from: &ArchiveName, to: &ArchiveName, copying: &Copying) -> Value {
    let step = |step: &Step| {
        let facts = &step.facts;
        json!({
            "zone": facts.zone, "snapshot": facts.snapshot, "outcome": step.outcome, "message": step.message,
        })
    };
    json!({
        "from": from,
        "to": to,
        "copies": copying.steps.iter().map(step).collect::<Value>(),
        "already_there": copying.there,
        "pruned_there": copying.pruned.len(),
    })
}

fn render(from: &ArchiveName, to: &ArchiveName, copying: &Copying, output: Output) -> String {
    let done = copying.steps.iter().filter(|step| step.outcome == StepOutcome::Done).count();
    let mut text = format!(
        "archive {to}: {} copied from archive {from}, {} there already\n",
        counted(done, "verified image"),
        copying.there
    );
    if !copying.pruned.is_empty() {
        let pruned = counted(copying.pruned.len(), "copy");
        text.push_str(&output.note(
            "SKIPPED:",
            Tone::Dim,
            &format!("{pruned} that archive {to} had and pruned"),
        ));
    }
    let row = |step: &Step| -> (Row, String) {
        let (word, tone) = match step.outcome {
            StepOutcome::Done => ("copied", Tone::Good),
            _ => ("FAILED", Tone::Bad),
        };
        let snapshot = &step.facts.snapshot;
        let id = || snapshot.instance_id.map_or_else(String::new, |id| id.to_string());
        let row = vec![
            (word.to_owned(), tone),
            plain(step.facts.zone.to_string()),
            plain(snapshot.instance_name.clone().unwrap_or_else(id)),
            plain(snapshot.id.map_or_else(|| "-".to_owned(), SnapshotId::short)),
            plain(to_the_second(snapshot.created_at).to_string()),
        ];
        (row, printable(&step.message.clone().unwrap_or_default()).into_owned())
    };
    if !copying.steps.is_empty() {
        let head = &["RESULT", "ZONE", "INSTANCE", "SNAPSHOT", "TAKEN"];
        text.push_str(&output.table_with_text(head, copying.steps.iter().map(row).collect(), "MESSAGE"));
    }
    text
}
