//! Verifies copies again: every byte is read and hashed as during the export.
//!
//! A good copy gets a new `verified_at`. A corrupt one is marked in its manifest, and no longer counts; its image stays as it
//! is. One that can't be read is neither: nothing is marked, and it is reported. So are the problems that the catalogue
//! finds by itself (an image that is missing or has another length).

use crate::archive::backend::{Archive, ArchiveError};
use crate::archive::catalogue::{Catalogue, Problem, StoredCopy};
use crate::archive::copy_reader::CopyReader;
use crate::archive::manifest::Manifest;
use crate::archive::manifest_update::{ManifestUpdate, UpdateError};
use crate::archive::transfer::download::Fetched;
use crate::archive::transfer::hash::Hashers;
use crate::archive::transfer::outputs::Outputs;
use crate::archive::transfer::sink::shown;
use crate::clock::Clock;
use crate::policy::name::ArchiveName;
use crate::randomness::Randomness;
use crate::text::chain;

/// The result for one copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Every byte is as it was.
    Good,
    /// It no longer counts, for this reason.
    Corrupt(String),
    /// It could not be read, or the result could not be written, for this reason.
    Failed(String),
}

/// The result for an archive.
#[derive(Debug)]
pub struct Verification {
    /// The copies that were read, in that order.
    pub copies: Vec<(StoredCopy, Outcome)>,
    /// Losses and damages that were found without reading an image.
    pub problems: Vec<Problem>,
}

impl Verification {
    /// Whether all copies and files are good.
    pub fn is_good(&self) -> bool {
        self.problems.is_empty() && self.copies.iter().all(|(_, outcome)| *outcome == Outcome::Good)
    }
}

/// Reads a share of an archive's images again, in percent, at least one; those come first whose last verification is oldest.
/// `report` is called for each as soon as it is done.
///
/// # Errors
/// [`ArchiveError`] if the archive can't be read; nothing was verified then.
pub async fn verify_archive(
    archive: &Archive,
    percent: u64,
    clock: &dyn Clock,
    randomness: &dyn Randomness,
    report: &(dyn Fn(&StoredCopy, &Outcome) + Send + Sync),
) -> Result<Verification, ArchiveError> {
    let catalogue = archive.catalogue().await?;
    let problems = catalogue.damaged().cloned().collect();
    let mut verification = Verification { copies: Vec::new(), problems };
    for copy in due(&catalogue, percent) {
        let outcome = verify(archive, &copy, clock, randomness).await;
        report(&copy, &outcome);
        verification.copies.push((copy, outcome));
    }
    Ok(verification)
}

/// The copies that are read next.
fn due(catalogue: &Catalogue, percent: u64) -> Vec<StoredCopy> {
    let mut copies: Vec<StoredCopy> = catalogue.unpruned().cloned().collect();
    copies.sort_by_key(|copy| (copy.manifest.verified_at, copy.manifest.snapshot.id));
    let share = (copies.len() as u64).saturating_mul(percent).div_ceil(100);
    copies.truncate(usize::try_from(share).unwrap_or(usize::MAX));
    copies
}

/// Reads one copy again, and writes the result into its manifest.
pub async fn verify(
    archive: &Archive,
    copy: &StoredCopy,
    clock: &dyn Clock,
    randomness: &dyn Randomness,
) -> Outcome {
    let (source, hashers) = (archive.image(copy), Hashers::default());
    let reader = CopyReader { clock, randomness, hashers: &hashers };
    // Without an output the image is hashed, and not kept.
    let compared = match reader.download(&*source).fetch(&mut Outputs::default(), false).await {
        Ok(fetched) => compare(&fetched, &copy.manifest),
        Err(error) => return Outcome::Failed(format!("it can't be read: {}", chain(&error))),
    };
    let now = clock.now();
    match compared {
        Ok(()) => match archive.update_manifest(copy, ManifestUpdate::Verified(now)).await {
            Ok(()) => Outcome::Good,
            Err(error) => {
                Outcome::Failed(format!("it is good, but its manifest can't be updated: {}", chain(&error)))
            }
        },
        Err(reason) => match archive.update_manifest(copy, ManifestUpdate::Corrupt(now)).await {
            Ok(()) => Outcome::Corrupt(reason),
            // The change may be the reason; the bytes that are there now were not read.
            Err(error @ UpdateError::Changed { .. }) => {
                Outcome::Failed(format!("{reason}, but {}", chain(&error)))
            }
            Err(error) => Outcome::Corrupt(format!(
                "{reason}; its manifest can't be updated, so it still counts: {}",
                chain(&error)
            )),
        },
    }
}

/// Whether the bytes are those of the manifest; if not, the reason.
fn compare(fetched: &Fetched, manifest: &Manifest) -> Result<(), String> {
    let (expected, bytes) = (manifest.image.md5, manifest.image.bytes);
    if fetched.bytes != bytes {
        return Err(format!("it has {} bytes where the manifest says {bytes}", fetched.bytes));
    }
    if fetched.md5 != expected {
        return Err(format!("its MD5 is {} where the manifest says {expected}", fetched.md5));
    }
    match &fetched.qcow2 {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("its MD5 is right, but it is not a valid image: {}", chain(error))),
    }
}

/// One line about a copy, for people.
pub fn describe(archive: &ArchiveName, copy: &StoredCopy, outcome: &Outcome) -> Option<String> {
    let image = shown(&copy.image);
    match outcome {
        Outcome::Good => None,
        Outcome::Corrupt(why) => {
            Some(format!("archive {archive}: {image} is CORRUPT: {why}; the copy does not count any more"))
        }
        Outcome::Failed(why) => Some(format!("archive {archive}: {image} is not verified: {why}")),
    }
}

#[cfg(test)]
mod tests;
