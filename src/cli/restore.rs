//! `restore`: a verified copy comes back, as a file or as a template.

use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use crate::archive::Archive;
use crate::archive::manifest::Manifest;
use crate::archive::transfer::hash::Hashers;
use crate::cli::args::{Global, Restore};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::output::Output;
use crate::cli::promote::sound_name;
use crate::cli::{Exit, Refusal};
use crate::config::sections::Config;
use crate::policy::ArchiveName;
use crate::run::restore::{self, Found, Reading, Shelves, TemplateToMake, Wanted};
use crate::snapshot::{InstanceId, SnapshotId, TemplateId, ZoneName};
use crate::state::audit::StepOutcome;
use crate::text::printable;

#[derive(Serialize)]
struct Restored<'a> {
    snapshot_id: SnapshotId,
    instance_id: InstanceId,
    instance_name: Option<&'a str>,
    created_at: Timestamp,
    archive: &'a ArchiveName,
    #[serde(flatten)]
    form: Form<'a>,
    /// Copies that did not serve, each as a sentence.
    passed_over: Vec<String>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Form<'a> {
    File { file: String, bytes: u64, md5: String },
    Template { zone: &'a ZoneName, template_id: Option<TemplateId>, template_name: &'a str, next: &'a str },
}

impl<'a> Restored<'a> {
    fn new(
        manifest: &'a Manifest,
        archive: &'a ArchiveName,
        form: Form<'a>,
        passed_over: Vec<String>,
    ) -> Self {
        Self {
            snapshot_id: manifest.snapshot.id,
            instance_id: manifest.instance.id,
            instance_name: manifest.instance.name.as_deref(),
            created_at: manifest.snapshot.created_at,
            archive,
            form,
            passed_over,
        }
    }
}

/// Brings a copy back.
///
/// # Errors
/// [`Refusal`] if it could not be done.
pub async fn restore(global: &Global, restore: &Restore, output: Output) -> Result<Exit, Refusal> {
    let mut config = assemble::configuration(global)?;
    let seams = Seams::real();
    let wanted = match (&restore.snapshot, &restore.latest) {
        (Some(id), _) => Wanted::Snapshot(*id),
        (None, Some(instance)) => Wanted::Latest { instance: instance.clone(), before: restore.before },
        (None, None) => {
            return Err(Refusal::new(Exit::Usage, "name a snapshot, or an instance with `--latest`"));
        }
    };
    let credentials = match (&restore.to_template, &restore.zone) {
        (Some(name), Some(zone)) => {
            sound_name(name)?;
            Some((name, zone, assemble::credentials(&config)?))
        }
        _ => None,
    };
    let shelves = look(&mut config, restore.archive.as_ref(), &seams).await?;
    let found = shelves.find(&wanted).map_err(|error| Refusal::new(Exit::Failed, error.to_string()))?;
    for complaint in shelves.unreadable() {
        output.complain(&complaint);
    }
    match (credentials, &restore.to) {
        (Some((name, zone, credentials)), _) => {
            let runner = assemble::runner(&config, credentials, &seams, Use::Running)?;
            let template =
                TemplateToMake { name: name.clone(), zone: zone.clone(), boot_mode: restore.boot_mode };
            let step = restore::to_template(&runner, &found, &template)
                .await
                .map_err(|text| Refusal::new(Exit::Failed, text))?;
            if step.outcome != StepOutcome::Done {
                let why = step.message.unwrap_or_else(|| "it was not begun".to_owned());
                return Err(Refusal::new(Exit::Failed, format!("restore to a template: {why}")));
            }
            let archive = step.facts.archive.as_ref();
            tell_template(&found, &template, step.facts.template_id, archive, output);
            Ok(Exit::Done)
        }
        (None, Some(file)) => to_file(&found, file, &seams, output).await,
        (None, None) => Err(Refusal::new(Exit::Usage, "say where to: `--to FILE`, or `--to-template NAME`")),
    }
}

/// Looks into the archives of the configuration, or into the one that is named. One that can't be put together is taken
/// out of the configuration: it must not keep the others from it.
async fn look(config: &mut Config, only: Option<&ArchiveName>, seams: &Seams) -> Result<Shelves, Refusal> {
    if let Some(name) = only.filter(|name| !config.archives.contains_key(*name)) {
        return Err(Refusal::new(Exit::Usage, format!("there is no archive `{name}` in the configuration")));
    }
    let (mut usable, mut unusable): (Vec<Arc<Archive>>, Vec<(ArchiveName, Refusal)>) = Default::default();
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
    let mut shelves = Shelves::look(usable).await;
    for (name, refusal) in unusable {
        // There is nothing else to look into.
        if only.is_some() {
            return Err(refusal);
        }
        shelves.add_unreadable(name, refusal.text);
    }
    Ok(shelves)
}

async fn to_file(found: &[Found], file: &Path, seams: &Seams, output: Output) -> Result<Exit, Refusal> {
    let failed = |error| Refusal::failed(&error);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut passed_over = Vec::new();
    let hashers = Hashers::default();
    let reading = Reading { clock: &*seams.clock, randomness: &*seams.randomness, hashers: &hashers };
    let passed = |why: String| {
        output.complain(&why);
        passed_over.push(why);
    };
    // Dropped on the way, it takes away what it began.
    let restored = tokio::select! {
        restored = restore::to_file(found, reading, &seams.disk, file, passed) => restored,
        _ = interrupt.recv() => Err("told to stop: nothing was restored, and nothing is left of it".to_owned()),
        _ = terminate.recv() => Err("told to stop: nothing was restored, and nothing is left of it".to_owned()),
    };
    let Found { archive, copy } = restored.map_err(|text| Refusal::new(Exit::Failed, text))?;
    let manifest = &copy.manifest;
    let (bytes, md5) = (manifest.image.bytes, manifest.image.md5.to_string());
    let path = file.display().to_string();
    if output.is_json() {
        let form = Form::File { file: path, bytes, md5 };
        output.print_json(&Restored::new(manifest, archive.name(), form, passed_over));
    } else {
        output.print(&format!(
            "{}: snapshot {} of {}, taken {}, from archive {}: {bytes} bytes, MD5 {md5} verified\n",
            printable(&path),
            manifest.snapshot.id,
            of(manifest),
            manifest.snapshot.created_at,
            archive.name()
        ));
    }
    Ok(Exit::Done)
}

fn tell_template(
    found: &[Found],
    template: &TemplateToMake,
    template_id: Option<TemplateId>,
    archive: Option<&ArchiveName>,
    output: Output,
) {
    let Some(Found { archive: first, copy }) = found.first() else { return };
    let manifest = &copy.manifest;
    let next = next(manifest, template, template_id);
    if output.is_json() {
        let form =
            Form::Template { zone: &template.zone, template_id, template_name: &template.name, next: &next };
        output.print_json(&Restored::new(
            manifest,
            archive.unwrap_or_else(|| first.name()),
            form,
            Vec::new(),
        ));
    } else {
        let id = template_id.map_or_else(|| "(not named by the API)".to_owned(), |id| id.to_string());
        output.print(&format!(
            "template {id} ({}) in zone {}: snapshot {} of {}, taken {}\nto start an instance from it:\n  {next}\n",
            printable(&template.name),
            template.zone,
            manifest.snapshot.id,
            of(manifest),
            manifest.snapshot.created_at
        ));
    }
}

/// The instance of a copy, for people.
fn of(manifest: &Manifest) -> String {
    let id = manifest.instance.id;
    manifest
        .instance
        .name
        .as_deref()
        .map_or_else(|| format!("instance {id}"), |name| format!("instance {} ({id})", printable(name)))
}

/// The command that starts an instance from the template. It is meant to be pasted into a shell, so that no text from
/// outside stands in it but a name of harmless characters.
fn next(manifest: &Manifest, template: &TemplateToMake, template_id: Option<TemplateId>) -> String {
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
