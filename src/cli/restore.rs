//! `restore`: a verified copy to a file, to a template or to an instance.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::sync::Arc;

use futures_util::FutureExt as _;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::archive::backend::Archive;
use crate::archive::copy_reader::CopyReader;
use crate::archive::manifest::Manifest;
use crate::archive::transfer::hash::Hashers;
use crate::archive::transfer::throttle::Throttle;
use crate::cli::args::{Global, Restore, Safety};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::in_place::{carry_out, check_consent};
use crate::cli::output::Output;
use crate::cli::progress::Progress;
use crate::cli::promote::{check_template_name, described, done};
use crate::cli::signals::StopSignals;
use crate::cli::survey::{Survey, ZoneListing};
use crate::config::sections::Config;
use crate::lookup::{self, Kind, Known, LookupError};
use crate::policy::name::ArchiveName;
use crate::restore::copy::{Destination, Restored, copy_first_good};
use crate::restore::error::RestoreError;
use crate::restore::find::{ArchiveIndex, ArchivedCopy, Wanted};
use crate::restore::in_place::{Change, OnTheWay};
use crate::restore::rebuild::{Rebuilding, facts_of, rebuilding};
use crate::restore::stream::Stream;
use crate::restore::template::{NewTemplate, to_template};
use crate::run::context::Runner;
use crate::run::downloads::ReadWatch;
use crate::snapshot::{InstanceId, Snapshot, SnapshotId};
use crate::text::{chain, printable, to_the_second};

/// What was restored, for programs; `made` are the fields of the file or the template.
fn json(manifest: &Manifest, archive: &ArchiveName, passed_over: &[String], made: Value) -> Value {
    let mut json = json!({
        "snapshot_id": manifest.snapshot.id,
        "instance_id": manifest.instance.id,
        "instance_name": manifest.instance.name,
        "created_at": manifest.snapshot.created_at,
        "archive": archive,
        // Why other copies were not used, each a sentence.
        "passed_over": passed_over,
    });
    if let (Value::Object(json), Value::Object(made)) = (&mut json, made) {
        json.extend(made);
    }
    json
}

/// The snapshot of a copy, for people.
fn snapshot(manifest: &Manifest) -> String {
    let Manifest { snapshot, instance, .. } = manifest;
    let instance = match &instance.name {
        Some(name) => format!("instance {} ({})", printable(name), instance.id),
        None => format!("instance {}", instance.id),
    };
    format!("snapshot {} of {instance}, taken {}", snapshot.id, snapshot.created_at)
}

/// Restores a copy.
///
/// # Errors
/// [`Refusal`] if nothing was restored.
pub async fn restore(
    global: &Global,
    restore: &Restore,
    output: Output,
    progress: &Progress,
) -> Result<Exit, Refusal> {
    check_usage(restore, output)?;
    let mut config = assemble::configuration(global)?;
    if restore.to_instance.is_none() {
        // Whatever the shard, everything can be restored.
        config.shard = None;
    }
    let seams = Seams::real();
    let wanted = match (&restore.snapshot, &restore.latest) {
        (Some(text), _) => Wanted::Snapshot(text.clone()),
        (None, Some(instance)) => {
            let now = to_the_second(seams.clock.now());
            let before = restore.before.as_ref().map(|before| before.back_from(now)).transpose()?;
            Wanted::Latest { instance: instance.clone(), before }
        }
        (None, None) => {
            return Err(Refusal::usage("give a snapshot, or an instance with `--latest`"));
        }
    };
    let template = match (&restore.to_template, &restore.to_instance, &restore.zone) {
        (Some(name), _, Some(zone)) => {
            check_template_name(name)?;
            Some((name.clone(), zone))
        }
        (None, Some(_), Some(zone)) => Some((name_on_the_way(&seams), zone)),
        _ => None,
    };
    let template = template.map(|(name, zone)| {
        let (zone, boot_mode, force) = (zone.clone(), restore.boot_mode, restore.force);
        // Missing credentials are reported before the archives are read, which may take long.
        Ok::<_, Refusal>((NewTemplate { name, zone, boot_mode, force }, assemble::credentials(&config)?))
    });
    let template = template.transpose()?;
    if restore.to_instance.is_some() {
        check_consent(&restore.safety)?;
        assemble::check_archives(&config, restore.safety.copy_to.as_ref())?;
    }
    let index = read_archives(&mut config, restore.archive.as_ref(), &seams).await?;
    let copies = match index.find(&wanted) {
        Ok(copies) => copies,
        Err(error) => return Err(without_copy(&error, &wanted, &config, &seams).await),
    };
    for unreadable in index.unreadable() {
        output.complain(&unreadable);
    }
    let throttle = restore.bandwidth_limit.map(|limit| Throttle::new(limit.get()));
    let exit = match (template, &restore.to) {
        (Some((template, credentials)), _) => {
            let mut runner = assemble::runner(&config, credentials, &seams, Use::Changing)?;
            runner.downloads = progress.downloads();
            let parts = (&runner, &config, throttle.as_ref());
            if let Some(instance) = &restore.to_instance {
                let wanted = (template, instance.as_str());
                reset(parts, copies.clone(), wanted, restore, output, progress).boxed().await
            } else {
                let work = make_template(parts, &copies, &template, output).boxed();
                progress.during(&runner.downloads, &*runner.clock, work).await
            }
        }
        (None, Some(file)) if file == Path::new("-") => {
            let stream = Stream::new(io::stdout());
            let destination = Destination::Stream(&stream);
            let restored = read(&copies, destination, &seams, throttle.as_ref(), progress).await;
            let Restored { used, .. } = restored?;
            let (manifest, archive) = (&used.copy.manifest, used.archive.name());
            let (bytes, md5) = (manifest.image.bytes, manifest.image.md5);
            let snapshot = snapshot(manifest);
            // Stdout has the image.
            output
                .complain(&format!("{snapshot}, from archive {archive}: {bytes} bytes, MD5 {md5} verified"));
            Ok(Exit::Done)
        }
        (None, Some(file)) => {
            let destination = Destination::File { disk: &seams.disk, path: file };
            let restored = read(&copies, destination, &seams, throttle.as_ref(), progress).await?;
            show_file(&restored, file, output);
            Ok(Exit::Done)
        }
        (None, None) => Err(Refusal::usage(
            "give a destination: `--to FILE`, `--to-template NAME` or `--to-instance INSTANCE`",
        )),
    }?;
    if let (Wanted::Latest { before, .. }, Some(used)) = (&wanted, copies.first()) {
        complain_of_newer(&used.copy.manifest, *before, &config, &seams, output).await;
    }
    Ok(exit)
}

/// Reads the archives of the configuration, or the one that is named. An archive without credentials is removed from
/// the configuration: it must not make the others unusable.
async fn read_archives(
    config: &mut Config,
    only: Option<&ArchiveName>,
    seams: &Seams,
) -> Result<ArchiveIndex, Refusal> {
    assemble::check_archives(config, only)?;
    let mut usable: Vec<Arc<Archive>> = Vec::new();
    let mut unusable: Vec<(ArchiveName, Refusal)> = Vec::new();
    let state = (&config.state_directory, Use::Reading);
    config.archives.retain(|name, settings| {
        let wanted = only.is_none_or(|only| only == name);
        match assemble::archive(name, settings, seams, state) {
            Ok(archive) if wanted => usable.push(Arc::new(archive)),
            Ok(_) => {}
            Err(refusal) => {
                unusable.extend(wanted.then(|| (name.clone(), refusal)));
                return false;
            }
        }
        true
    });
    let mut index = ArchiveIndex::read(usable).await;
    for (name, refusal) in unusable {
        if only.is_some() {
            return Err(refusal);
        }
        index.add_unreadable(name, refusal.text);
    }
    Ok(index)
}

/// Why there is no copy to restore, and whether the snapshot itself still exists, which could be promoted.
async fn without_copy(error: &RestoreError, wanted: &Wanted, config: &Config, seams: &Seams) -> Refusal {
    let mut text = chain(error);
    let is_missing = matches!(
        error,
        RestoreError::NoCopy { .. } | RestoreError::NothingNamed { .. } | RestoreError::NoneBefore { .. }
    );
    if is_missing {
        let mut survey = Survey::default();
        survey.ask_zones(config, seams).await;
        let found = match wanted {
            Wanted::Snapshot(text) => {
                let found = lookup::find(Kind::Snapshot, text, survey.snapshots());
                found.map(|id| survey.listed(SnapshotId(id)))
            }
            Wanted::Latest { instance, before } => {
                let found = lookup::find(Kind::Instance, instance, survey.instances());
                found.map(|id| survey.newest_of(InstanceId(id), *before))
            }
        };
        // Writing to a String cannot fail.
        let _ = match found {
            Ok(Some((listing, snapshot))) => write!(text, "\n{}", still_exists(listing, snapshot)),
            Err(several @ LookupError::Several { .. }) => write!(text, "\nin the zones, {several}"),
            _ if survey.unasked.is_empty() => {
                write!(text, "\nthere is no such snapshot in {} either", survey.asked())
            }
            _ => write!(
                text,
                "\nwhether the snapshot itself still exists is not known: {}",
                survey.unasked.join("; ")
            ),
        };
    }
    Refusal::failed(text)
}

/// A snapshot that a zone still has, and how to get it.
fn still_exists(listing: &ZoneListing, snapshot: &Snapshot) -> String {
    let (id, name, zone) = (snapshot.id, printable(&snapshot.name), &listing.zone);
    let at = to_the_second(snapshot.created_at);
    format!(
        "snapshot {id} ({name}), taken {at}, still exists in zone {zone}. To make a template of it:\n  \
         snapwarden promote {id} --zone {zone} --name NAME"
    )
}

/// Says if a zone has a newer snapshot of the instance than the copy that was restored. Without credentials nothing is
/// asked: a restore needs none.
async fn complain_of_newer(
    restored: &Manifest,
    before: Option<Timestamp>,
    config: &Config,
    seams: &Seams,
    output: Output,
) {
    if assemble::credentials(config).is_err() {
        return;
    }
    let mut survey = Survey::default();
    survey.ask_zones(config, seams).await;
    let newest = survey.newest_of(restored.instance.id, before);
    if let Some((listing, snapshot)) =
        newest.filter(|(_, snapshot)| snapshot.created_at > restored.snapshot.created_at)
    {
        output.complain(&format!("this was not the newest: {}", still_exists(listing, snapshot)));
    }
}

/// Refuses what the arguments alone forbid.
fn check_usage(restore: &Restore, output: Output) -> Result<(), Refusal> {
    let Safety { yes, without_copy, copy_to } = &restore.safety;
    let is_of_instance = *yes || *without_copy || copy_to.is_some() || restore.from_other;
    if restore.to_instance.is_none() && is_of_instance {
        return Err(Refusal::usage(
            "`--yes`, `--from-other`, `--without-copy` and `--copy-to` are for `--to-instance`",
        ));
    }
    if restore.to.as_deref() != Some(Path::new("-")) {
        return Ok(());
    }
    if output.is_json() {
        return Err(Refusal::usage("with `--to -` stdout has the image, so there is no place for JSON"));
    }
    if io::stdout().is_terminal() {
        return Err(Refusal::usage(
            "`--to -` writes an image, and stdout is a terminal: give it a pipe or a file",
        ));
    }
    Ok(())
}

/// The name of a template that is made on the way to an instance: no template has it yet.
fn name_on_the_way(seams: &Seams) -> String {
    format!("snapwarden-restore-{}", seams.clock.now().strftime("%Y%m%dT%H%M%SZ"))
}

/// What the destinations that the platform provides have in common.
type Parts<'a> = (&'a Runner, &'a Config, Option<&'a Throttle>);

/// Makes a template, and prints the commands that build the whole instance again.
async fn make_template(
    (runner, _, throttle): Parts<'_>,
    copies: &[ArchivedCopy],
    template: &NewTemplate,
    output: Output,
) -> Result<Exit, Refusal> {
    let build = facts_of(copies).await;
    let step = to_template(runner, copies, &build, template, throttle).boxed().await?;
    let facts = done(step, "restore to a template")?;
    let Some(ArchivedCopy { archive, copy }) = copies.first() else { return Ok(Exit::Failed) };
    let (manifest, id) = (&copy.manifest, facts.template_id);
    let archive = facts.archive.as_ref().unwrap_or(archive.name());
    let NewTemplate { zone, name, .. } = template;
    let next = rebuilding(manifest, &build, zone, id);
    let made = json!({
        "zone": zone,
        "template_id": id,
        "template_name": name,
        // The command that creates the instance, those for after that, and what they can't do.
        "next": next.create.join(" "),
        "then": next.then,
        "notes": next.notes,
    });
    output.show(
        || json(manifest, archive, &[], made),
        || {
            let (template, snapshot) = (described(id, name), snapshot(manifest));
            format!("{template} in zone {zone}: {snapshot}\n{}", rebuilding_text(&next))
        },
    );
    Ok(Exit::Done)
}

/// Resets an instance with a template of a copy.
async fn reset(
    (runner, config, throttle): Parts<'_>,
    copies: Vec<ArchivedCopy>,
    (template, instance): (NewTemplate, &str),
    restore: &Restore,
    output: Output,
    progress: &Progress,
) -> Result<Exit, Refusal> {
    let zone = &template.zone;
    let listed = runner.client.zone(zone).list_instances().await?;
    let known = listed.iter().map(|listed| Known {
        id: listed.id.0,
        name: Some(listed.name.to_string()),
        zone: Some(zone.clone()),
        taken_at: None,
    });
    let found = lookup::find(Kind::Instance, instance, known);
    let id = InstanceId(found.map_err(|error| Refusal::usage(format!("zone {zone}: {error}")))?);
    let build = facts_of(&copies).await;
    let on_the_way = OnTheWay { facts: build, template, throttle };
    let change = Change::to_copy(runner, id, copies, on_the_way, restore.from_other).await?;
    carry_out((runner, config), (&change, "reset"), &restore.safety, output, progress).boxed().await
}

/// Reads the first good copy into a file or a stream.
async fn read<'a>(
    copies: &'a [ArchivedCopy],
    destination: Destination<'_>,
    seams: &Seams,
    throttle: Option<&Throttle>,
    progress: &Progress,
) -> Result<Restored<'a>, Refusal> {
    let mut stop = StopSignals::install()?;
    let hashers = Hashers::default();
    let reader = CopyReader { throttle, ..CopyReader::new(&*seams.clock, &*seams.randomness, &hashers) };
    let downloads = progress.downloads();
    let watch = ReadWatch { downloads: &downloads, clock: &seams.clock };
    let work = copy_first_good(copies, reader, watch, destination);
    // If it is dropped here, it removes the file that it began.
    tokio::select! {
        restored = progress.during(&downloads, &*seams.clock, work) => Ok(restored?),
        () = stop.next() => Err(Refusal::failed(match destination {
            Destination::Stream(_) => "stopped: what was written to stdout is not the whole image, and must not be used",
            _ => "stopped: nothing was restored, and no file is left",
        })),
    }
}

fn show_file(Restored { used, passed_over }: &Restored<'_>, file: &Path, output: Output) {
    let (manifest, archive, file) = (&used.copy.manifest, used.archive.name(), file.display().to_string());
    let (bytes, md5) = (manifest.image.bytes, manifest.image.md5);
    output.show(
        || {
            json(
                manifest,
                archive,
                passed_over,
                json!({ "file": file, "bytes": bytes, "md5": md5.to_string() }),
            )
        },
        || {
            let (file, snapshot) = (printable(&file), snapshot(manifest));
            format!("{file}: {snapshot}, from archive {archive}: {bytes} bytes, MD5 {md5} verified\n")
        },
    );
}

/// The commands that build the instance again, for people.
fn rebuilding_text(rebuilding: &Rebuilding) -> String {
    let mut text = format!("to build the instance again:\n  {}\n", rebuilding.create.join(" \\\n    "));
    for command in &rebuilding.then {
        text.push_str("  ");
        text.push_str(command);
        text.push('\n');
    }
    for note in &rebuilding.notes {
        text.push_str("note: ");
        text.push_str(note);
        text.push('\n');
    }
    text
}
