//! `archive list`: the verified exports.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;

use crate::archive::catalogue::{Problem, StoredCopy};
use crate::archive::local::LocalArchive;
use crate::cli::args::{ArchiveList, Global};
use crate::cli::assemble::{self, Seams};
use crate::cli::output::{Output, Tone, to_the_second};
use crate::cli::{Exit, Refusal};
use crate::policy::ArchiveName;
use crate::snapshot::{InstanceId, SnapshotId, ZoneName};
use crate::text::{chain, counted, printable};

#[derive(Serialize)]
struct JsonArchive<'a> {
    archive: &'a ArchiveName,
    /// Why it can't be read, if so.
    error: Option<String>,
    images: Vec<JsonImage>,
    problems: Vec<String>,
}

#[derive(Serialize)]
struct JsonImage {
    zone: ZoneName,
    instance_id: InstanceId,
    instance_name: Option<String>,
    snapshot_id: SnapshotId,
    snapshot_name: String,
    created_at: Timestamp,
    verified_at: Timestamp,
    size_bytes: u64,
    md5: String,
    file: String,
}

/// Lists what the archives hold.
///
/// # Errors
/// [`Refusal`] if an archive is named that is not configured.
pub async fn list(global: &Global, list: &ArchiveList, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let archives = assemble::archives(&config, &Seams::real());
    for name in &list.archives {
        if !archives.contains_key(name) {
            return Err(Refusal::new(
                Exit::Usage,
                format!("there is no archive `{name}` in the configuration"),
            ));
        }
    }
    Ok(show(&archives, &list.archives, output).await)
}

/// Prints what the archives with these names hold; all, if none is named.
pub async fn show(
    archives: &BTreeMap<ArchiveName, Arc<LocalArchive>>,
    names: &[ArchiveName],
    output: Output,
) -> Exit {
    let mut exit = Exit::Done;
    let mut all = Vec::new();
    for (name, archive) in archives.iter().filter(|(name, _)| names.is_empty() || names.contains(name)) {
        let json = match archive.catalogue().await {
            Ok(catalogue) => JsonArchive {
                archive: name,
                error: None,
                images: catalogue
                    .copies()
                    .iter()
                    .filter(|copy| copy.manifest.pruned_at.is_none())
                    .map(image)
                    .collect(),
                problems: catalogue.problems().iter().map(Problem::describe).collect(),
            },
            Err(error) => {
                JsonArchive { archive: name, error: Some(chain(&error)), images: vec![], problems: vec![] }
            }
        };
        if let Some(error) = &json.error {
            output.complain(&format!("archive {name}: {error}"));
            exit = Exit::Failed;
        }
        all.push(json);
    }
    if output.is_json() {
        output.print_json(&all);
    } else {
        output.print(&all.iter().map(|archive| render(archive, output)).collect::<String>());
    }
    exit
}

fn image(copy: &StoredCopy) -> JsonImage {
    let manifest = &copy.manifest;
    JsonImage {
        zone: manifest.zone.clone(),
        instance_id: manifest.instance.id,
        instance_name: manifest.instance.name.clone(),
        snapshot_id: manifest.snapshot.id,
        snapshot_name: manifest.snapshot.name.clone(),
        created_at: manifest.snapshot.created_at,
        verified_at: manifest.verified_at,
        size_bytes: manifest.image.bytes,
        md5: manifest.image.md5.to_string(),
        file: copy.image.display().to_string(),
    }
}

fn render(archive: &JsonArchive<'_>, output: Output) -> String {
    let bytes: u64 = archive.images.iter().map(|image| image.size_bytes).sum();
    let mut text = format!(
        "archive {}: {}, {bytes} bytes\n",
        archive.archive,
        counted(archive.images.len(), "verified image")
    );
    if !archive.images.is_empty() {
        let plain = |text: String| (text, Tone::Plain);
        let rows = archive
            .images
            .iter()
            .map(|image| {
                vec![
                    plain(image.instance_name.clone().unwrap_or_else(|| image.instance_id.to_string())),
                    plain(image.created_at.to_string()),
                    plain(image.size_bytes.to_string()),
                    plain(to_the_second(image.verified_at).to_string()),
                    plain(image.md5.clone()),
                    plain(image.file.clone()),
                ]
            })
            .collect();
        text.push_str(&output.table(&["INSTANCE", "TAKEN", "BYTES", "VERIFIED", "MD5", "FILE"], rows));
    }
    for problem in &archive.problems {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "problem: {}", printable(problem));
    }
    text
}
