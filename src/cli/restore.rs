//! `restore`: a verified copy to a file or to a template.

use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;

use crate::archive::backend::Archive;
use crate::archive::copy_reader::CopyReader;
use crate::archive::manifest::Manifest;
use crate::archive::transfer::hash::Hashers;
use crate::cli::args::{Global, Restore};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::Output;
use crate::cli::promote::check_template_name;
use crate::cli::signals::StopSignals;
use crate::config::sections::Config;
use crate::policy::name::ArchiveName;
use crate::restore::copy::{Destination, Restored, copy_first_good};
use crate::restore::find::{ArchiveIndex, ArchivedCopy, Wanted};
use crate::restore::template::{NewTemplate, to_template};
use crate::snapshot::{InstanceId, SnapshotId, TemplateId, ZoneName};
use crate::state::audit::StepOutcome;
use crate::text::printable;

#[derive(Serialize)]
struct RestoreOutput {
    snapshot_id: SnapshotId,
    instance_id: InstanceId,
    instance_name: Option<String>,
    created_at: Timestamp,
    archive: ArchiveName,
    #[serde(flatten)]
    made: Made,
    /// Why other copies were not used, each a sentence.
    passed_over: Vec<String>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Made {
    File { file: String, bytes: u64, md5: String },
    Template { zone: ZoneName, template_id: Option<TemplateId>, template_name: String, next: String },
}

impl RestoreOutput {
    fn new(manifest: &Manifest, archive: &ArchiveName, made: Made, passed_over: Vec<String>) -> Self {
        Self {
            snapshot_id: manifest.snapshot.id,
            instance_id: manifest.instance.id,
            instance_name: manifest.instance.name.clone(),
            created_at: manifest.snapshot.created_at,
            archive: archive.clone(),
            made,
            passed_over,
        }
    }

    fn text(&self) -> String {
        let instance = match &self.instance_name {
            Some(name) => format!("instance {} ({})", printable(name), self.instance_id),
            None => format!("instance {}", self.instance_id),
        };
        let snapshot = format!("snapshot {} of {instance}, taken {}", self.snapshot_id, self.created_at);
        match &self.made {
            Made::File { file, bytes, md5 } => format!(
                "{}: {snapshot}, from archive {}: {bytes} bytes, MD5 {md5} verified\n",
                printable(file),
                self.archive
            ),
            Made::Template { zone, template_id, template_name, next } => format!(
                "template {} ({}) in zone {zone}: {snapshot}\nto start an instance from it:\n  {next}\n",
                template_id.map_or_else(|| "(not named by the API)".to_owned(), |id| id.to_string()),
                printable(template_name)
            ),
        }
    }
}

/// Restores a copy.
///
/// # Errors
/// [`Refusal`] if nothing was restored.
pub async fn restore(global: &Global, restore: &Restore, output: Output) -> Result<Exit, Refusal> {
    let mut config = assemble::configuration(global)?;
    let seams = Seams::real();
    let wanted = match (&restore.snapshot, &restore.latest) {
        (Some(id), _) => Wanted::Snapshot(*id),
        (None, Some(instance)) => Wanted::Latest { instance: instance.clone(), before: restore.before },
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
    let copies = index.find(&wanted)?;
    for unreadable in index.unreadable() {
        output.complain(&unreadable);
    }
    let restored = match (template, &restore.to) {
        (Some((template, credentials)), _) => {
            let runner = assemble::runner(&config, credentials, &seams, Use::Changing)?;
            let step = to_template(&runner, &copies, &template).await;
            let step = step?;
            if step.outcome != StepOutcome::Done {
                let why = step.message.unwrap_or_else(|| "it was not started".to_owned());
                return Err(Refusal::failed(format!("restore to a template: {why}")));
            }
            let Some(ArchivedCopy { archive, copy }) = copies.first() else { return Ok(Exit::Failed) };
            let next = start_command(&copy.manifest, &template, step.facts.template_id);
            let archive = step.facts.archive.as_ref().unwrap_or(archive.name());
            let NewTemplate { zone, name: template_name, .. } = template;
            let made = Made::Template { zone, template_id: step.facts.template_id, template_name, next };
            RestoreOutput::new(&copy.manifest, archive, made, Vec::new())
        }
        (None, Some(file)) => to_file(&copies, file, &seams).await?,
        (None, None) => {
            return Err(Refusal::usage("give a destination: `--to FILE` or `--to-template NAME`"));
        }
    };
    output.show(&restored, RestoreOutput::text);
    Ok(Exit::Done)
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
    config.archives.retain(|name, settings| {
        let wanted = only.is_none_or(|only| only == name);
        match assemble::archive(name, settings, seams) {
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

async fn to_file(copies: &[ArchivedCopy], file: &Path, seams: &Seams) -> Result<RestoreOutput, Refusal> {
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
    let manifest = &used.copy.manifest;
    let made = Made::File {
        file: file.display().to_string(),
        bytes: manifest.image.bytes,
        md5: manifest.image.md5.to_string(),
    };
    Ok(RestoreOutput::new(manifest, used.archive.name(), made, passed_over))
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
