//! `restore`: a verified copy to a file or to a template.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::archive::backend::Archive;
use crate::archive::copy_reader::CopyReader;
use crate::archive::manifest::Manifest;
use crate::archive::transfer::hash::Hashers;
use crate::cli::args::{Global, Restore};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::Output;
use crate::cli::promote::{check_template_name, described, done};
use crate::cli::signals::StopSignals;
use crate::cli::survey::{Survey, ZoneListing};
use crate::config::sections::Config;
use crate::lookup::{self, Kind, LookupError};
use crate::policy::name::ArchiveName;
use crate::restore::copy::{Destination, Restored, copy_first_good};
use crate::restore::error::RestoreError;
use crate::restore::find::{ArchiveIndex, ArchivedCopy, Wanted};
use crate::restore::template::{NewTemplate, to_template};
use crate::snapshot::{InstanceId, Snapshot, SnapshotId, TemplateId};
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
pub async fn restore(global: &Global, restore: &Restore, output: Output) -> Result<Exit, Refusal> {
    let mut config = assemble::configuration(global)?;
    // Whatever the shard, everything can be restored.
    config.shard = None;
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
    let template = match (&restore.to_template, &restore.zone) {
        (Some(name), Some(zone)) => {
            check_template_name(name)?;
            let (name, zone) = (name.clone(), zone.clone());
            let template = NewTemplate { name, zone, boot_mode: restore.boot_mode };
            // Missing credentials are reported before the archives are read, which may take long.
            Some((template, assemble::credentials(&config)?))
        }
        _ => None,
    };
    let index = read_archives(&mut config, restore.archive.as_ref(), &seams).await?;
    let copies = match index.find(&wanted) {
        Ok(copies) => copies,
        Err(error) => return Err(without_copy(&error, &wanted, &config, &seams).await),
    };
    for unreadable in index.unreadable() {
        output.complain(&unreadable);
    }
    let exit = match (template, &restore.to) {
        (Some((template, credentials)), _) => {
            let runner = assemble::runner(&config, credentials, &seams, Use::Changing)?;
            let facts = done(to_template(&runner, &copies, &template).await?, "restore to a template")?;
            let Some(ArchivedCopy { archive, copy }) = copies.first() else { return Ok(Exit::Failed) };
            let (manifest, id) = (&copy.manifest, facts.template_id);
            let archive = facts.archive.as_ref().unwrap_or(archive.name());
            let next = start_command(manifest, &template, id);
            let NewTemplate { zone, name, .. } = &template;
            let made = json!({ "zone": zone, "template_id": id, "template_name": name, "next": next });
            output.show(
                || json(manifest, archive, &[], made),
                || {
                    let (template, snapshot) = (described(id, name), snapshot(manifest));
                    format!(
                        "{template} in zone {zone}: {snapshot}\nto start an instance from it:\n  {next}\n"
                    )
                },
            );
            Ok(Exit::Done)
        }
        (None, Some(file)) => to_file(&copies, file, &seams, output).await,
        (None, None) => Err(Refusal::usage("give a destination: `--to FILE` or `--to-template NAME`")),
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

async fn to_file(
    copies: &[ArchivedCopy],
    file: &Path,
    seams: &Seams,
    output: Output,
) -> Result<Exit, Refusal> {
    let mut stop = StopSignals::install()?;
    let hashers = Hashers::default();
    let reader = CopyReader { clock: &*seams.clock, randomness: &*seams.randomness, hashers: &hashers };
    let destination = Destination::File { disk: &seams.disk, path: file };
    // If it is dropped here, it removes the file that it began.
    let restored = tokio::select! {
        restored = copy_first_good(copies, reader, destination) => restored,
        () = stop.next() => {
            return Err(Refusal::failed("stopped: nothing was restored, and no file is left"));
        }
    };
    let Restored { used, passed_over } = restored?;
    let (manifest, archive, file) = (&used.copy.manifest, used.archive.name(), file.display().to_string());
    let (bytes, md5) = (manifest.image.bytes, manifest.image.md5);
    output.show(
        || {
            json(
                manifest,
                archive,
                &passed_over,
                json!({ "file": file, "bytes": bytes, "md5": md5.to_string() }),
            )
        },
        || {
            let (file, snapshot) = (printable(&file), snapshot(manifest));
            format!("{file}: {snapshot}, from archive {archive}: {bytes} bytes, MD5 {md5} verified\n")
        },
    );
    Ok(Exit::Done)
}

/// The command that starts an instance from the template. It is meant to be pasted into a shell, so it contains no text
/// from outside, except a name of harmless characters.
fn start_command(manifest: &Manifest, template: &NewTemplate, template_id: Option<TemplateId>) -> String {
    let harmless = |name: &&str| {
        let mut characters = name.chars();
        name.len() <= 255
            && characters.next().is_some_and(|c| c.is_ascii_alphanumeric())
            && characters.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
    };
    let name = manifest.instance.name.as_deref().filter(harmless).unwrap_or("NAME");
    let id = template_id.map_or_else(|| "TEMPLATE_ID".to_owned(), |id| id.to_string());
    let size_gib = manifest.image.virtual_size_bytes.map(|bytes| bytes.div_ceil(1 << 30));
    let size = size_gib.or(manifest.snapshot.size_gib).map(|gib| format!(" --disk-size {gib}"));
    format!(
        "exo compute instance create {name} --zone {} --template {id} --template-visibility private{}",
        template.zone,
        size.unwrap_or_default()
    )
}
