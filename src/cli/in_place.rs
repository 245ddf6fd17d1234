//! The change of an existing instance: the question, the signals, and what is shown at the end.

use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::archive::backend::Archive;
use crate::cli::args::Safety;
use crate::cli::confirm::{can_ask, is_confirmed};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::Output;
use crate::cli::progress::Progress;
use crate::cli::signals::StopSignals;
use crate::config::sections::Config;
use crate::policy::name::ArchiveName;
use crate::restore::in_place::{Change, Changed};
use crate::run::context::Runner;
use crate::snapshot::Instance;
use crate::text::{printable, to_the_second};

/// Refuses to change an instance if nobody can be asked, before anything else is done.
pub(super) fn check_consent(safety: &Safety) -> Result<(), Refusal> {
    if safety.yes || can_ask() {
        return Ok(());
    }
    Err(Refusal::usage(
        "the instance's disk would be replaced, and nobody can be asked without a terminal: add `--yes` if that is meant",
    ))
}

/// Asks, carries the change out, and shows what was done; `past` is the word for it, such as `reverted`.
pub(super) async fn carry_out(
    (runner, config): (&Runner, &Config),
    (change, past): (&Change<'_>, &str),
    safety: &Safety,
    output: Output,
    progress: &Progress,
) -> Result<Exit, Refusal> {
    let id = change.instance.instance.id;
    if let Some(shard) = config.shard.filter(|shard| !shard.has(id)) {
        let of = shard.of(id);
        return Err(Refusal::usage(format!(
            "instance {id} is of shard {of}: a hold here would protect nothing, and deletions there would not wait; change it there"
        )));
    }
    let archive = copy_archive(runner, config, &change.instance.instance, change, safety)?;
    let copy = archive.as_ref().map(|archive| archive.name().clone());
    let described = change.described();
    if !safety.yes {
        let copied = match &copy {
            Some(name) => format!(", and exported to archive {name}"),
            None => ", and not exported: it would die with the instance".to_owned(),
        };
        output.complain(&format!(
            "{described}\nwhat is on its disk now is lost, except in a snapshot that is taken before, put on hold for 30 days{copied}"
        ));
        if !is_confirmed("replace its disk?")? {
            return Err(Refusal::failed("nothing was changed"));
        }
    }
    let mut signals = StopSignals::install()?;
    let stop = CancellationToken::new();
    let work = change.carry_out(archive.as_ref(), &stop);
    let work = progress.during(&runner.downloads, &*runner.clock, work);
    let mut work = std::pin::pin!(work);
    let changed = loop {
        tokio::select! {
            changed = &mut work => break changed,
            () = signals.next() => {
                if stop.is_cancelled() {
                    return Err(Refusal::failed(
                        "ended at once: `snapwarden history` shows the last step that was intended; look at the instance before you go on",
                    ));
                }
                stop.cancel();
                output.complain("stopping: if the change of the instance has begun, it is ended first");
            }
        }
    };
    let changed = changed?;
    show((change, past), &changed, copy.as_ref(), output);
    Ok(Exit::Done)
}

fn show((change, past): (&Change<'_>, &str), changed: &Changed, copy: Option<&ArchiveName>, output: Output) {
    let Changed { safety, held_until, template_id, notes } = changed;
    output.show(
        || {
            json!({
                "zone": change.zone(),
                "instance_id": change.instance.instance.id,
                "instance_name": change.instance.instance.name,
                "snapshot_id": change.snapshot_id(),
                // The snapshot from before, how long it is on hold, and the archive with a verified copy of it.
                "before_snapshot_id": safety,
                "before_held_until": held_until,
                "before_archive": copy,
                // Of a reset.
                "template_id": template_id,
                // Each a sentence.
                "notes": notes,
            })
        },
        || {
            let until = to_the_second(*held_until);
            let copied =
                copy.map_or_else(String::new, |name| format!(", with a verified copy in archive {name}"));
            let mut text = format!(
                "{past} {}\nas it was before: snapshot {safety}, on hold until {until}{copied}\n",
                change.described()
            );
            for note in notes {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "note: {note}");
            }
            text
        },
    );
}

/// The archive that gets the snapshot from before the change: as named, else one that a policy exports the instance to, else the
/// only one.
fn copy_archive(
    runner: &Runner,
    config: &Config,
    instance: &Instance,
    change: &Change<'_>,
    safety: &Safety,
) -> Result<Option<Arc<Archive>>, Refusal> {
    if safety.without_copy {
        return Ok(None);
    }
    let exported = || {
        let policies = config.policies.iter().filter(|policy| policy.zones.contains(change.zone()));
        let mut selecting = policies.filter(|policy| policy.select.selects_listed(instance));
        selecting.find_map(|policy| policy.export.as_ref()?.archives.first())
    };
    let only = || runner.archives.keys().next().filter(|_| runner.archives.len() == 1);
    let name = safety.copy_to.as_ref().or_else(exported).or_else(only);
    let name = name.ok_or_else(|| {
        Refusal::usage(format!(
            "no policy exports instance {}, so which archive should get the snapshot from before is not known: name one with \
             `--copy-to`, or go on without by `--without-copy`",
            printable(&instance.name)
        ))
    })?;
    let archive = runner.archives.get(name);
    let archive = archive
        .ok_or_else(|| Refusal::usage(format!("there is no archive `{name}` in the configuration")))?;
    Ok(Some(Arc::clone(archive)))
}
