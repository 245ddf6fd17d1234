//! The way back: finds the copy that is wanted, and makes a file or a template of it.
//!
//! It reads archives and changes nothing in them, but that a copy from a folder goes through a bucket on its way to a
//! template, and stays there: the platform fetches a template's image from an address. Registering a template can't be
//! repeated blindly: a repeat makes a second one. So after a lost answer the template is looked for by its name, and a
//! name that is taken is refused before anything is begun.

use std::collections::{BTreeMap, HashSet};
use std::fmt::{self, Display, Write as _};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};
use tracing::{info, warn};

use crate::archive::Archive;
use crate::archive::catalogue::{Catalogue, StoredCopy};
use crate::archive::manifest::{Manifest, TemplateRecord};
use crate::archive::restore;
use crate::archive::s3::S3Archive;
use crate::archive::source::ImageSource;
use crate::archive::transfer::download::Download;
use crate::archive::transfer::hash::Hashers;
use crate::clock::Clock;
use crate::disk::Disk;
use crate::exoscale::client::ZoneClient;
use crate::exoscale::error::ApiError;
use crate::exoscale::wire::RegisterRequest;
use crate::policy::ArchiveName;
use crate::randomness::{Randomness, fresh_id};
use crate::run::Runner;
use crate::run::archive_prune::subject_of;
use crate::run::promote::look;
use crate::run::report::Step;
use crate::run::step::{Done, Recorder, StepError};
use crate::snapshot::{InstanceId, SnapshotId, TemplateId, ZoneName};
use crate::state::audit::{Action, StepFacts};
use crate::text::{chain, printable};

/// So long the platform may take until it begins to fetch an image.
const ADDRESS_GOOD_FOR: Duration = Duration::from_hours(6);

/// When to look for a template whose answer was lost, each so long after the one before: it is listed once it is made.
const LOOKS: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_secs(15),
    Duration::from_secs(30),
    Duration::from_mins(1),
    Duration::from_mins(3),
];

/// A connection that brings nothing for so long is given up for another.
const STALL_TIMEOUT: Duration = Duration::from_mins(1);

/// Which copy is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// One of this snapshot.
    Snapshot(SnapshotId),
    /// One of the newest snapshot of an instance.
    Latest {
        /// The instance's id, or its name as the manifests have it.
        instance: String,
        /// Only of snapshots that were taken before then.
        before: Option<Timestamp>,
    },
}

/// How a machine boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootMode {
    /// By a BIOS.
    Legacy,
    /// By UEFI.
    Uefi,
}

/// A word that is no boot mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is neither `legacy` nor `uefi`")]
pub struct BadBootMode;

impl FromStr for BootMode {
    type Err = BadBootMode;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "legacy" => Ok(Self::Legacy),
            "uefi" => Ok(Self::Uefi),
            _ => Err(BadBootMode),
        }
    }
}

impl Display for BootMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Legacy => "legacy",
            Self::Uefi => "uefi",
        })
    }
}

/// What the archives were seen to hold.
#[derive(Debug, Default)]
pub struct Shelves {
    read: Vec<(Arc<Archive>, Catalogue)>,
    unreadable: BTreeMap<ArchiveName, String>,
}

/// A verified copy, and where it is.
#[derive(Debug, Clone)]
pub struct Found {
    /// Where.
    pub archive: Arc<Archive>,
    /// The copy.
    pub copy: StoredCopy,
}

/// Why no copy can be given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// There is none.
    #[error("no archive holds a verified copy of snapshot {id}{}: `snapwarden archive list` shows what there is", listed(.notes))]
    NoCopy {
        /// Of which snapshot.
        id: SnapshotId,
        /// What is known of it all the same.
        notes: Vec<String>,
    },
    /// There is none of the instance.
    #[error(
        "no archive holds a verified copy of an instance with the id or name `{}`: `snapwarden archive list` shows what there is",
        printable(.0)
    )]
    NoInstance(String),
    /// Several instances have the name.
    #[error("{} instances were named `{}`: give the id of one of them{}", .instances.len(), printable(.name), listed(.instances))]
    Ambiguous {
        /// The name.
        name: String,
        /// Each as a line.
        instances: Vec<String>,
    },
    /// All copies of it are too new.
    #[error("instance {instance_id} has no verified copy from before {before}: the oldest is from {oldest}")]
    NoneBefore {
        /// Of which instance.
        instance_id: InstanceId,
        /// Before when.
        before: Timestamp,
        /// The oldest that there is.
        oldest: Timestamp,
    },
    /// The newest may be where nobody can look.
    #[error(
        "the newest copy may be in an archive that can't be read{}\nto take the newest of another archive, name that one with `--archive`",
        listed(.0)
    )]
    Blind(Vec<String>),
}

/// Each on a line of its own, below what was said.
fn listed(notes: &[String]) -> String {
    notes.iter().fold(String::new(), |mut text, note| {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n  {note}");
        text
    })
}

impl Shelves {
    /// Looks into the archives, those in folders first. One that can't be read does not keep the others from it.
    pub async fn look(archives: impl IntoIterator<Item = Arc<Archive>>) -> Self {
        let mut archives: Vec<Arc<Archive>> = archives.into_iter().collect();
        archives.sort_by_key(|archive| matches!(**archive, Archive::S3(_)));
        let mut shelves = Self::default();
        for archive in archives {
            match archive.catalogue().await {
                Ok(catalogue) => shelves.read.push((archive, catalogue)),
                Err(error) => shelves.add_unreadable(archive.name().clone(), chain(&error)),
            }
        }
        shelves
    }

    /// One more that can't be read, and why.
    pub fn add_unreadable(&mut self, archive: ArchiveName, why: String) {
        self.unreadable.insert(archive, why);
    }

    /// The archives that can't be read, each as a sentence.
    pub fn unreadable(&self) -> Vec<String> {
        let tell = |(name, why): (&ArchiveName, &String)| format!("archive {name} can't be read: {why}");
        self.unreadable.iter().map(tell).collect()
    }

    /// The verified copies whose images are there.
    fn copies(&self) -> impl Iterator<Item = (&Arc<Archive>, &StoredCopy)> {
        self.read.iter().flat_map(|(archive, catalogue)| {
            let there = catalogue.copies().iter().filter(|copy| copy.manifest.pruned_at.is_none());
            there.map(move |copy| (archive, copy))
        })
    }

    /// The copies of the snapshot that is wanted, in the order in which to try them; at least one.
    ///
    /// # Errors
    /// [`FindError`].
    pub fn find(&self, wanted: &Wanted) -> Result<Vec<Found>, FindError> {
        let id = match wanted {
            Wanted::Snapshot(id) => *id,
            Wanted::Latest { instance, before } => self.latest(instance, *before)?,
        };
        let of = self.copies().filter(|(_, copy)| copy.manifest.snapshot.id == id);
        let found: Vec<Found> =
            of.map(|(archive, copy)| Found { archive: Arc::clone(archive), copy: copy.clone() }).collect();
        if found.is_empty() { Err(FindError::NoCopy { id, notes: self.notes(id) }) } else { Ok(found) }
    }

    /// What is known of a snapshot that has no copy to bring back.
    fn notes(&self, id: SnapshotId) -> Vec<String> {
        let mut notes = self.unreadable();
        for (archive, catalogue) in &self.read {
            let name = archive.name();
            let of_it = |copy: &&StoredCopy| copy.manifest.snapshot.id == id;
            for at in catalogue.copies().iter().filter(of_it).filter_map(|copy| copy.manifest.pruned_at) {
                notes.push(format!("archive {name} had one, and its retention removed the image at {at}"));
            }
            let text = id.to_string();
            let problems = catalogue.problems().iter().filter(|problem| {
                problem.path.file_name().is_some_and(|name| name.to_string_lossy().contains(&text))
            });
            notes.extend(problems.map(|problem| format!("archive {name}: {}", problem.describe())));
        }
        notes
    }

    /// The newest snapshot of an instance that has a copy.
    fn latest(&self, instance: &str, before: Option<Timestamp>) -> Result<SnapshotId, FindError> {
        if !self.unreadable.is_empty() {
            return Err(FindError::Blind(self.unreadable()));
        }
        let instance_id = self.instance(instance)?;
        let of = self.copies().map(|(_, copy)| &copy.manifest).filter(|of| of.instance.id == instance_id);
        let taken: Vec<(Timestamp, SnapshotId)> =
            of.map(|manifest| (manifest.snapshot.created_at, manifest.snapshot.id)).collect();
        let good = taken.iter().filter(|(at, _)| before.is_none_or(|before| *at < before));
        match (good.max(), before, taken.iter().min()) {
            (Some((_, id)), _, _) => Ok(*id),
            (None, Some(before), Some((oldest, _))) => {
                Err(FindError::NoneBefore { instance_id, before, oldest: *oldest })
            }
            _ => Err(FindError::NoInstance(instance.to_owned())),
        }
    }

    /// The instance that has this id, or else had this name.
    fn instance(&self, text: &str) -> Result<InstanceId, FindError> {
        let manifests = || self.copies().map(|(_, copy)| &copy.manifest);
        if let Ok(id) = text.parse::<InstanceId>()
            && manifests().any(|manifest| manifest.instance.id == id)
        {
            return Ok(id);
        }
        let mut named: BTreeMap<InstanceId, (&ZoneName, Timestamp)> = BTreeMap::new();
        for manifest in manifests().filter(|manifest| manifest.instance.name.as_deref() == Some(text)) {
            let taken = manifest.snapshot.created_at;
            let newest = named.entry(manifest.instance.id).or_insert((&manifest.zone, taken));
            newest.1 = newest.1.max(taken);
        }
        match (named.len(), named.first_key_value()) {
            (1, Some((id, _))) => Ok(*id),
            (_, None) => Err(FindError::NoInstance(text.to_owned())),
            _ => {
                let tell = |(id, (zone, taken)): (&InstanceId, &(&ZoneName, Timestamp))| {
                    format!("{id} in zone {zone}, its newest copy from {taken}")
                };
                Err(FindError::Ambiguous {
                    name: text.to_owned(),
                    instances: named.iter().map(tell).collect(),
                })
            }
        }
    }
}

/// What reading a copy takes.
#[derive(Clone, Copy)]
pub struct Reading<'a> {
    /// Time.
    pub clock: &'a dyn Clock,
    /// For the waits between tries.
    pub randomness: &'a dyn Randomness,
    /// They prove it.
    pub hashers: &'a Hashers,
}

impl Reading<'_> {
    fn of<'a>(&'a self, source: &'a dyn ImageSource) -> Download<'a> {
        Download {
            source,
            clock: self.clock,
            randomness: self.randomness,
            stall_timeout: STALL_TIMEOUT,
            connections: 1,
            hashers: self.hashers,
            throttle: None,
            progress: &|_| {},
        }
    }
}

/// Makes a new file of the first of these copies that proves good; which one. Each that does not is told to `passed`.
///
/// # Errors
/// Why there is no file: what is wrong with the last copy, or with the place for it.
pub async fn to_file(
    found: &[Found],
    reading: Reading<'_>,
    disk: &Arc<dyn Disk>,
    to: &Path,
    mut passed: impl FnMut(String),
) -> Result<Found, String> {
    for Found { archive, copy } in found {
        let name = archive.name();
        let bytes = copy.manifest.image.bytes;
        info!("restoring snapshot {} from archive {name}: {bytes} bytes", copy.manifest.snapshot.id);
        let image = archive.image(copy);
        match restore::to_file(name, copy, &reading.of(&*image), disk, to).await {
            Ok(restored) => {
                if let Some(error) = restored.unsound {
                    warn!("the file is what the manifest says, but it is no sound image: {}", chain(&error));
                }
                return Ok(Found { archive: Arc::clone(archive), copy: copy.clone() });
            }
            Err(error) if error.is_of_the_copy() => passed(chain(&error)),
            Err(error) => return Err(chain(&error)),
        }
    }
    Err("no copy of it can be given".to_owned())
}

/// What template is to be made.
#[derive(Debug, Clone)]
pub struct TemplateToMake {
    /// Its name.
    pub name: String,
    /// Where.
    pub zone: ZoneName,
    /// How a machine of it boots, if that is not for the manifest to say.
    pub boot_mode: Option<BootMode>,
}

/// Makes a template of one of these copies. What it is like is as the manifest has it from the instance's template.
///
/// # Errors
/// Why it was not even begun, as a sentence.
pub async fn to_template(runner: &Runner, found: &[Found], wanted: &TemplateToMake) -> Result<Step, String> {
    let Some(first) = found.first() else { return Err("there is no copy".to_owned()) };
    let manifest = &first.copy.manifest;
    let template = template_of(found);
    let boot_mode = boot_mode(template, wanted.boot_mode)?;
    let bucket = bucket(runner, found)?;
    let client = runner.client.zone(&wanted.zone);
    let templates = client.list_templates().await.map_err(|error| chain(&error))?;
    if let Some(taken) = templates.iter().find(|template| template.name == wanted.name) {
        return Err(format!(
            "a template named {} is there already in zone {} ({}): it may be of an earlier restore; use it, or give \
             another name",
            printable(&wanted.name),
            wanted.zone,
            taken.id
        ));
    }
    let known: HashSet<TemplateId> = templates.iter().map(|template| template.id).collect();

    let run_id = fresh_id(&*runner.randomness, runner.clock.now());
    let recorder = Recorder::manual(runner.state.clone(), runner.clock.clone(), run_id);
    let intent = StepFacts {
        archive: Some(bucket.name().clone()),
        ..StepFacts::new(
            Action::Restore,
            &wanted.zone,
            subject_of(manifest),
            vec![format!("asked for by hand, to be a template named {}", printable(&wanted.name))],
        )
    };
    let work = async {
        let copy = stored_in(&bucket, runner, found).await.map_err(StepError::failed)?;
        let address = bucket.presign_get(&copy, ADDRESS_GOOD_FOR);
        let request = request(&copy.manifest, template, &wanted.name, boot_mode, address);
        info!(
            "registering template {}: the platform fetches it, which may take long",
            printable(&wanted.name)
        );
        register_and_look(runner, &client, &request, &known).await
    };
    Ok(recorder.step(intent, work).await)
}

/// What the export kept of the instance's template, in whichever archive it is told best.
fn template_of(found: &[Found]) -> Option<&TemplateRecord> {
    let records = || found.iter().filter_map(|found| found.copy.manifest.template.as_ref());
    records().find(|record| kept_boot_mode(record).is_some()).or_else(|| records().next())
}

fn kept_boot_mode(template: &TemplateRecord) -> Option<BootMode> {
    template.boot_mode.as_deref()?.parse().ok()
}

/// How the template boots: as was asked for, else as the instance's template did.
fn boot_mode(template: Option<&TemplateRecord>, asked: Option<BootMode>) -> Result<BootMode, String> {
    asked.or_else(|| kept_boot_mode(template?)).ok_or_else(|| {
        "the manifest does not say how the instance booted, since its template could not be read at the export: say \
         `--boot-mode legacy` or `--boot-mode uefi` (with the wrong one it does not boot; the template can be made \
         again then)"
            .to_owned()
    })
}

/// The bucket that the platform is to fetch it from: one that has it, else the first of the configuration.
fn bucket(runner: &Runner, found: &[Found]) -> Result<S3Archive, String> {
    let has_it = found.iter().map(|found| &found.archive);
    let bucket = has_it.chain(runner.archives.values()).find_map(|archive| match &**archive {
        Archive::S3(bucket) => Some(bucket.clone()),
        Archive::Local(_) => None,
    });
    bucket.ok_or_else(|| {
        "the platform fetches a template's image from an address, so it takes an archive of type `s3`, and the \
         configuration has none that can be used: add one, or restore to a file with `--to` and put that where the \
         platform can fetch it"
            .to_owned()
    })
}

/// The copy in the bucket; it is stored there first if only other archives have it.
async fn stored_in(bucket: &S3Archive, runner: &Runner, found: &[Found]) -> Result<StoredCopy, String> {
    if let Some(here) = found.iter().find(|found| found.archive.name() == bucket.name()) {
        return Ok(here.copy.clone());
    }
    let reading =
        Reading { clock: &*runner.clock, randomness: &*runner.randomness, hashers: &runner.hashers };
    let mut why = Vec::new();
    for Found { archive, copy } in found {
        let (name, id) = (archive.name(), copy.manifest.snapshot.id);
        info!("storing snapshot {id} of archive {name} in archive {} on its way", bucket.name());
        let image = archive.image(copy);
        match restore::into_bucket(name, copy, &reading.of(&*image), bucket).await {
            Ok(_) => {
                // Its manifest may be of another export, if it was there before.
                let catalogue = bucket.catalogue().await.map_err(|error| chain(&error))?;
                let is_it =
                    |copy: &&StoredCopy| copy.manifest.snapshot.id == id && copy.manifest.pruned_at.is_none();
                return catalogue.copies().iter().find(is_it).cloned().ok_or_else(|| {
                    format!(
                        "archive {} had a copy of it that its retention removed, and takes none again: name another \
                         archive of type `s3`, or restore to a file with `--to`",
                        bucket.name()
                    )
                });
            }
            Err(error) => {
                let may_do = error.is_of_the_copy();
                why.push(chain(&error));
                if !may_do {
                    break;
                }
            }
        }
    }
    Err(why.join("; "))
}

/// What the platform is asked for.
fn request(
    manifest: &Manifest,
    template: Option<&TemplateRecord>,
    name: &str,
    boot_mode: BootMode,
    url: SecretString,
) -> RegisterRequest {
    let sound =
        |user: &&str| (1..=255).contains(&user.chars().count()) && !user.chars().any(char::is_control);
    let default_user = template.and_then(|template| template.default_user.as_deref()).filter(sound);
    RegisterRequest {
        name: name.to_owned(),
        url,
        checksum: manifest.image.md5.to_string(),
        // Without a word about it both are offered, as by the vendor's own tools.
        ssh_key_enabled: template.and_then(|template| template.ssh_key_enabled).unwrap_or(true),
        password_enabled: template.and_then(|template| template.password_enabled).unwrap_or(true),
        boot_mode: Some(boot_mode.to_string()),
        description: Some(format!(
            "restored from snapshot {} of instance {}, taken {}",
            manifest.snapshot.id,
            manifest.instance.id,
            manifest.snapshot.created_at.strftime("%Y-%m-%dT%H:%M:%SZ")
        )),
        default_user: default_user.map(str::to_owned),
        // The platform reads it from the image.
        size: None,
    }
}

/// Registers; where the answer was lost, or does not name the template, looks for it by name before saying so.
async fn register_and_look(
    runner: &Runner,
    client: &ZoneClient,
    request: &RegisterRequest,
    known: &HashSet<TemplateId>,
) -> Result<Done, StepError> {
    let since = runner.clock.now();
    let lost = match client.register_template(request).await {
        Ok(operation) => match operation.reference {
            Some(reference) => {
                let template_id = Some(TemplateId(reference));
                return Ok(Done { operation_id: operation.id, template_id, ..Done::default() });
            }
            None => None,
        },
        Err(error) if error.may_have_happened() => Some(error),
        Err(error) => return Err(failed(&error, &request.url)),
    };
    let operation_id = lost.as_ref().and_then(ApiError::operation_id);
    for pause in LOOKS {
        runner.clock.sleep(pause).await;
        if let Some(template_id) = look(client, &request.name, since, known).await {
            let message = Some("the answer did not name the template: found by its name".to_owned());
            return Ok(Done { operation_id, template_id: Some(template_id), message, ..Done::default() });
        }
    }
    let why = match lost {
        Some(error) => failed(&error, &request.url).message,
        None => "the API does not say which template came of it".to_owned(),
    };
    Err(StepError {
        operation_id,
        ..StepError::failed(format!(
            "{why}; no template named {} is listed in zone {} yet: it may come, so look for it before it is asked for \
             again",
            printable(&request.name),
            client.zone()
        ))
    })
}

/// A refusal in the platform's words, which may repeat the address.
fn failed(error: &ApiError, address: &SecretString) -> StepError {
    let message = without(&chain(error), address);
    StepError { operation_id: error.operation_id(), ..StepError::failed(message) }
}

/// A text without an address: what makes it one that anybody may use is taken out, however it is quoted or cut.
fn without(text: &str, address: &SecretString) -> String {
    let address = address.expose_secret();
    let text = text.replace(address, "(presigned address)");
    let Some((_, signature)) = address.split_once("X-Amz-Signature=") else { return text };
    // So many digits of it name it, and tell nothing.
    let Some(beginning) = signature.get(..8) else { return text };
    let mut clean = String::new();
    let mut rest = &*text;
    while let Some((before, after)) = rest.split_once(beginning) {
        clean.push_str(before);
        clean.push_str("(hidden)");
        rest = after.trim_start_matches(|c: char| c.is_ascii_hexdigit());
    }
    clean + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_out_however_it_is_quoted_or_cut() {
        let signature = "0123456789abcdef".repeat(4);
        let address = format!("https://s3/b/k?X-Amz-Date=1&X-Amz-Signature={signature}");
        let secret = SecretString::from(address.clone());
        for text in [
            format!("can't fetch {address}: no"),
            format!("can't fetch {}: no", address.replace('&', "\\u0026")),
            format!("can't fetch {}", &address[..address.len() - 9]),
            format!("{address} {address}"),
        ] {
            let clean = without(&text, &secret);
            assert!(!clean.contains(&signature[..8]), "{clean}");
            assert!(clean.contains("(presigned address)") || clean.contains("(hidden)"), "{clean}");
        }
        assert_eq!(without("no such zone", &secret), "no such zone");
    }
}
