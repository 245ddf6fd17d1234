//! Makes a template of a copy.
//!
//! Registering a template must not be repeated blindly: a repeat makes a second one. So a name that is taken is refused
//! before anything is begun, and after a lost response the template is looked for by its name.

use std::collections::HashSet;
use std::time::Duration;

use clap::ValueEnum;
use futures_util::FutureExt as _;
use secrecy::{ExposeSecret as _, SecretString};
use tracing::{info, warn};

use crate::archive::backend::Archive;
use crate::archive::catalogue::StoredCopy;
use crate::archive::copy_reader::CopyReader;
use crate::archive::manifest::{BuildFacts, Manifest, TemplateOrigin, TemplateRecord};
use crate::archive::s3::archive::S3Archive;
use crate::archive::store::TEMPLATE_VIRTUAL_MAX;
use crate::archive::transfer::throttle::Throttle;
use crate::exoscale::client::ZoneClient;
use crate::exoscale::error::ApiError;
use crate::exoscale::wire::RegisterRequest;
use crate::randomness::fresh_id;
use crate::restore::copy::{Destination, copy_first_good};
use crate::restore::error::RestoreError;
use crate::restore::find::ArchivedCopy;
use crate::run::archive_presence::remember_write;
use crate::run::archive_retention::subject_of;
use crate::run::context::Runner;
use crate::run::downloads::ReadWatch;
use crate::run::promote::look;
use crate::run::report::Step;
use crate::run::step::{Done, Recorder, StepError};
use crate::snapshot::{TemplateId, ZoneName};
use crate::state::audit::{Action, StepFacts};
use crate::text::{chain, printable};

/// How long the presigned URL is valid: the platform may queue the import before it fetches the image.
const URL_VALID_FOR: Duration = Duration::from_hours(6);

/// The pauses before each search for a template whose response was lost. It is listed once the platform has made it,
/// which takes minutes.
const SEARCH_PAUSES: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_secs(15),
    Duration::from_secs(30),
    Duration::from_mins(1),
    Duration::from_mins(3),
];

/// How a machine boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BootMode {
    /// With a BIOS.
    Legacy,
    /// With UEFI.
    Uefi,
}

impl BootMode {
    /// The API's name of it.
    fn as_str(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Uefi => "uefi",
        }
    }
}

/// The template to make.
#[derive(Debug, Clone)]
pub struct NewTemplate {
    /// Its name, which no template of the zone has yet.
    pub name: String,
    /// Its zone.
    pub zone: ZoneName,
    /// How its instances boot; without it, as the manifest says.
    pub boot_mode: Option<BootMode>,
    /// Also if the disk is larger than templates are documented for.
    pub force: bool,
}

/// Makes a template of one of these copies. Its properties are those of the instance's own template, as the manifest
/// recorded them.
///
/// # Errors
/// [`RestoreError`] if it was not begun. Later failures are reported in the step.
pub async fn to_template(
    runner: &Runner,
    copies: &[ArchivedCopy],
    facts: &BuildFacts,
    wanted: &NewTemplate,
    throttle: Option<&Throttle>,
) -> Result<Step, RestoreError> {
    let Some(first) = copies.first() else { return Err(RestoreError::NoGoodCopy(Vec::new())) };
    let (boot_mode, bucket) = check(runner, copies, wanted)?;
    let record = template_record(copies);
    let client = runner.client.zone(&wanted.zone);
    let templates = client.list_templates().await?;
    if let Some(existing) = templates.iter().find(|template| template.name == wanted.name) {
        return Err(RestoreError::TemplateExists {
            zone: wanted.zone.clone(),
            name: wanted.name.clone(),
            id: existing.id,
        });
    }
    let known: HashSet<TemplateId> = templates.iter().map(|template| template.id).collect();

    let run_id = fresh_id(&*runner.randomness, runner.clock.now());
    let recorder = Recorder::manual(runner.state.clone(), runner.clock.clone(), run_id);
    let intent = StepFacts {
        archive: Some(bucket.name().clone()),
        ..StepFacts::new(
            Action::Restore,
            &wanted.zone,
            subject_of(&first.copy.manifest),
            vec![format!("a manual restore to a template named {}", printable(&wanted.name))],
        )
    };
    let work = async {
        let copy = stored_in(&bucket, runner, copies, throttle)
            .await
            .map_err(|error| StepError::failed(chain(&error)))?;
        let url = bucket.presign_get(&copy, URL_VALID_FOR).await;
        let url = url.map_err(|error| StepError::failed(chain(&error)))?;
        let request = request(&copy.manifest, (record, &facts.origin), &wanted.name, boot_mode, url);
        info!(
            "registering template {}: the platform fetches the image, which may take long",
            printable(&wanted.name)
        );
        register_and_find(runner, &client, &request, &known).await
    };
    // Boxed, as it would make every future that restores too large.
    Ok(recorder.step(intent, work.boxed()).await)
}

/// What a template of these copies needs: how it boots, and the bucket that the platform fetches the image from. Nothing is asked
/// of anybody.
///
/// # Errors
/// [`RestoreError`] if it can't be made.
pub(super) fn check(
    runner: &Runner,
    copies: &[ArchivedCopy],
    wanted: &NewTemplate,
) -> Result<(BootMode, S3Archive), RestoreError> {
    let bytes = copies.first().and_then(|first| virtual_bytes(&first.copy.manifest));
    if let Some(disk_bytes) = bytes.filter(|bytes| *bytes > TEMPLATE_VIRTUAL_MAX && !wanted.force) {
        return Err(RestoreError::TooLargeForTemplate { disk_bytes });
    }
    let recorded = || recorded_boot_mode(template_record(copies)?);
    let boot_mode = wanted.boot_mode.or_else(recorded).ok_or(RestoreError::NoBootMode)?;
    Ok((boot_mode, bucket(runner, copies)?))
}

/// The size of the disk in the image; of the snapshot's disk if that is not recorded.
pub(super) fn virtual_bytes(manifest: &Manifest) -> Option<u64> {
    let of_snapshot = || manifest.snapshot.size_gib.map(|gib| gib.saturating_mul(1 << 30));
    manifest.image.virtual_size_bytes.or_else(of_snapshot)
}

/// The instance's template as the export recorded it. Archives may hold copies of several exports: one that knows the
/// boot mode is preferred.
fn template_record(copies: &[ArchivedCopy]) -> Option<&TemplateRecord> {
    let records = || copies.iter().filter_map(|found| found.copy.manifest.template.as_deref());
    records().find(|record| recorded_boot_mode(record).is_some()).or_else(|| records().next())
}

fn recorded_boot_mode(template: &TemplateRecord) -> Option<BootMode> {
    BootMode::from_str(template.boot_mode.as_deref()?, false).ok()
}

/// The bucket that the platform fetches the image from: one that has a copy, else the first of the configuration.
fn bucket(runner: &Runner, copies: &[ArchivedCopy]) -> Result<S3Archive, RestoreError> {
    let with_copy = copies.iter().map(|found| &found.archive);
    let bucket = with_copy.chain(runner.archives.values()).find_map(|archive| match &**archive {
        Archive::S3(bucket) => Some(bucket.clone()),
        Archive::Local(_) | Archive::Restic(_) => None,
    });
    bucket.ok_or(RestoreError::NoBucket)
}

/// The copy in the bucket; it is stored there first if only other archives have one.
async fn stored_in(
    bucket: &S3Archive,
    runner: &Runner,
    copies: &[ArchivedCopy],
    throttle: Option<&Throttle>,
) -> Result<StoredCopy, RestoreError> {
    if let Some(here) = copies.iter().find(|found| found.archive.name() == bucket.name()) {
        return Ok(here.copy.clone());
    }
    let reader =
        CopyReader { throttle, ..CopyReader::new(&*runner.clock, &*runner.randomness, &runner.hashers) };
    let watch = ReadWatch { downloads: &runner.downloads, clock: &runner.clock };
    let name = bucket.name();
    let ready = runner.make_ready(name).await;
    ready.map_err(|why| RestoreError::NotThere { archive: name.clone(), why })?;
    info!("storing the image in archive {name} first");
    let user_data = runner.archive_rules.get(name).is_some_and(|rules| rules.user_data);
    let restored = copy_first_good(copies, reader, watch, Destination::Bucket { bucket, user_data }).await;
    let failure = match &restored {
        Ok(_) => Some(None),
        Err(RestoreError::Destination(error)) if !error.is_full() => Some(Some(chain(error))),
        Err(_) => None,
    };
    if let Some(failure) = failure
        && let Err(why) = remember_write(&runner.state, &*runner.clock, name, failure).await
    {
        warn!("{why}");
    }
    let restored = restored?;
    let id = restored.used.copy.manifest.snapshot.id;
    // Read from the bucket: if it had a copy before, its manifest may be of another export.
    let catalogue = bucket
        .catalogue()
        .await
        .map_err(|error| RestoreError::Bucket { archive: bucket.name().clone(), source: Box::new(error) })?;
    let mut stored = catalogue.copies().iter();
    stored
        .find(|copy| copy.manifest.snapshot.id == id && copy.manifest.pruned_at.is_none())
        .cloned()
        .ok_or_else(|| RestoreError::PrunedInBucket(bucket.name().clone()))
}

fn request(
    manifest: &Manifest,
    (template, origin): (Option<&TemplateRecord>, &TemplateOrigin),
    name: &str,
    boot_mode: BootMode,
    url: SecretString,
) -> RegisterRequest {
    let valid = |text: Option<&str>| {
        let is_valid =
            |text: &&str| (1..=255).contains(&text.chars().count()) && !text.chars().any(char::is_control);
        text.filter(is_valid).map(str::to_owned)
    };
    RegisterRequest {
        name: name.to_owned(),
        url,
        checksum: manifest.image.md5.to_string(),
        // Where nothing is recorded both are offered, as the vendor's own tools do.
        ssh_key_enabled: template.and_then(|template| template.ssh_key_enabled).unwrap_or(true),
        password_enabled: template.and_then(|template| template.password_enabled).unwrap_or(true),
        boot_mode: Some(boot_mode.as_str().to_owned()),
        description: Some(format!(
            "restored from snapshot {} of instance {}, taken {}",
            manifest.snapshot.id,
            manifest.instance.id,
            manifest.snapshot.created_at.strftime("%Y-%m-%dT%H:%M:%SZ")
        )),
        default_user: valid(template.and_then(|template| template.default_user.as_deref())),
        // The platform reads it from the image.
        size: None,
        application_consistent_snapshot_enabled: template
            .and_then(|template| template.application_consistent),
        version: valid(origin.version.as_deref()),
        build: valid(origin.build.as_deref()),
        maintainer: valid(origin.maintainer.as_deref()),
    }
}

/// Registers the template. Where the response was lost, or does not name the template, searches for it by name.
async fn register_and_find(
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
    for pause in SEARCH_PAUSES {
        runner.clock.sleep(pause).await;
        if let Some(template_id) = look(client, &request.name, since, known).await {
            let message = Some("the response did not name the template: found by its name".to_owned());
            return Ok(Done { operation_id, template_id: Some(template_id), message, ..Done::default() });
        }
    }
    let why = match lost {
        Some(error) => failed(&error, &request.url).message,
        None => "the API does not name the new template".to_owned(),
    };
    Err(StepError {
        operation_id,
        ..StepError::failed(format!(
            "{why}; no template named {} is listed in zone {} yet: it may still appear, so check the list before you \
             restore again",
            printable(&request.name),
            client.zone()
        ))
    })
}

/// The platform's refusal, which may repeat the URL.
fn failed(error: &ApiError, url: &SecretString) -> StepError {
    let message = without(&chain(error), url);
    StepError { operation_id: error.operation_id(), ..StepError::failed(message) }
}

/// Removes a presigned URL from a text. Its signature is removed even if the URL is quoted in another way or cut.
fn without(text: &str, url: &SecretString) -> String {
    let url = url.expose_secret();
    let text = text.replace(url, "(presigned URL)");
    let Some((_, signature)) = url.split_once("X-Amz-Signature=") else { return text };
    // Eight of its 64 digits identify it, and do not reveal it.
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
    fn a_url_is_removed_however_it_is_quoted_or_cut() {
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
            assert!(clean.contains("(presigned URL)") || clean.contains("(hidden)"), "{clean}");
        }
        assert_eq!(without("no such zone", &secret), "no such zone");
    }
}
