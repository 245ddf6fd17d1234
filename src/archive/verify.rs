//! Verifies copies again: every byte is read and hashed as during the export.
//!
//! A good copy gets a new `verified_at`. A corrupt one is marked in its manifest, and no longer counts; its image stays as it
//! is, and is read again each time: once it is good again, the mark is removed. One that can't be read is neither: nothing is marked, and it is reported. So are the problems that the catalogue
//! finds by itself (an image that is missing or has another length). Where the archive can't be written, the caller has to
//! remember what was found.

use std::collections::HashSet;
use std::error::Error;

use jiff::Timestamp;

use crate::archive::backend::Archive;
use crate::archive::catalogue::{Catalogue, Problem, ProblemKind, StoredCopy};
use crate::archive::copy_reader::CopyReader;
use crate::archive::manifest::Manifest;
use crate::archive::manifest_update::{ManifestUpdate, UpdateError};
use crate::archive::restic::archive::Damaged;
use crate::archive::transfer::download::Fetched;
use crate::archive::transfer::error::DownloadError;
use crate::archive::transfer::outputs::Outputs;
use crate::archive::transfer::sink::shown;
use crate::policy::name::ArchiveName;
use crate::text::{chain, printable};

/// The result for one copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Every byte is as it was.
    Good,
    /// Every byte is as it was, although the copy was marked as corrupt since then: it counts again.
    Repaired(Timestamp),
    /// Its bytes have changed, for this reason, so it must not count any more.
    Corrupt(String),
    /// It could not be read, or the result could not be written, for this reason.
    Failed(String),
}

impl Outcome {
    /// Whether every byte is as it was.
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Good | Self::Repaired(_))
    }
}

/// The result for one copy, and whether the archive has it.
#[derive(Debug)]
pub struct Verified {
    /// The result.
    pub outcome: Outcome,
    /// Why the result could not be written into the manifest; none also if nothing was to be written.
    pub(crate) unwritten: Option<UpdateError>,
}

impl Verified {
    fn new(outcome: Outcome) -> Self {
        Self { outcome, unwritten: None }
    }

    fn unwritten(outcome: Outcome, error: UpdateError) -> Self {
        Self { outcome, unwritten: Some(error) }
    }

    /// Whether the manifest has the result.
    pub(crate) fn is_written(&self) -> bool {
        self.unwritten.is_none() && !matches!(self.outcome, Outcome::Failed(_))
    }
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
        self.problems.is_empty() && self.copies.iter().all(|(_, outcome)| outcome.is_good())
    }

    /// One of this archive, of which no image was read yet.
    pub(crate) fn of(catalogue: &Catalogue) -> Self {
        // Those are read again.
        let corrupt: HashSet<String> = corrupt(catalogue).map(StoredCopy::stem).collect();
        let is_read = |problem: &Problem| {
            matches!(problem.kind, ProblemKind::Corrupt(_)) && corrupt.contains(&problem.stem())
        };
        let problems = catalogue.damaged().filter(|problem| !is_read(problem));
        Self { copies: Vec::new(), problems: problems.cloned().collect() }
    }
}

/// The copies to read next: a share of an archive's images, in percent, at least one; those come first whose last
/// verification is oldest, or lies ahead of `now`: a clock that was wrong dated it, and would put the next one off for as long.
/// In addition those that were found corrupt, whether or not the archive says so.
pub(crate) fn due(catalogue: &Catalogue, percent: u64, now: Timestamp) -> Vec<StoredCopy> {
    let mut copies: Vec<StoredCopy> = catalogue.unpruned().cloned().collect();
    let read_at = |manifest: &Manifest| Some(manifest.verified_at).filter(|at| *at <= now);
    copies.sort_by_key(|copy| (read_at(&copy.manifest), copy.manifest.snapshot.id));
    let share = (copies.len() as u64).saturating_mul(percent).div_ceil(100);
    copies.truncate(usize::try_from(share).unwrap_or(usize::MAX));
    copies.extend(corrupt(catalogue).cloned());
    copies
}

/// The copies that were found corrupt and whose image is there.
fn corrupt(catalogue: &Catalogue) -> impl Iterator<Item = &StoredCopy> {
    let unmarked = catalogue.unmarked().iter().map(|(copy, _)| copy);
    unmarked.chain(catalogue.corrupt().iter().filter(|copy| copy.has_image))
}

/// Reads one copy again, and writes the result into its manifest.
pub async fn verify(archive: &Archive, copy: &StoredCopy, reader: CopyReader<'_>) -> Verified {
    let source = archive.image(copy);
    // Without an output the image is hashed, and not kept.
    let compared = match reader.download(&*source).fetch(&mut Outputs::default(), false).await {
        Ok(fetched) => compare(&fetched, &copy.manifest),
        Err(error) if is_damage(&error) => Err(chain(&error)),
        Err(error) => {
            return Verified::new(Outcome::Failed(format!("it can't be read: {}", chain(&error))));
        }
    };
    let (now, corrupt_since) = (reader.clock.now(), copy.manifest.corrupt_since);
    match compared {
        Ok(()) => match archive.update_manifest(copy, ManifestUpdate::Verified(now)).await {
            Ok(()) => Verified::new(corrupt_since.map_or(Outcome::Good, Outcome::Repaired)),
            Err(error) => {
                let why = format!("it is good, but its manifest can't be updated: {}", chain(&error));
                Verified::unwritten(Outcome::Failed(why), error)
            }
        },
        Err(reason) if corrupt_since.is_some() => Verified::new(Outcome::Corrupt(reason)),
        Err(reason) => match archive.update_manifest(copy, ManifestUpdate::Corrupt(now)).await {
            Ok(()) => Verified::new(Outcome::Corrupt(reason)),
            // The change may be the reason; the bytes that are there now were not read.
            Err(error @ UpdateError::Changed { .. }) => {
                Verified::unwritten(Outcome::Failed(format!("{reason}, but {}", chain(&error))), error)
            }
            Err(error) => {
                let why = format!("{reason}; its manifest can't be updated: {}", chain(&error));
                Verified::unwritten(Outcome::Corrupt(why), error)
            }
        },
    }
}

/// Compares what the archive says of an image with its manifest. No byte is read, so it proves little, and nothing is recorded.
pub async fn look(archive: &Archive, copy: &StoredCopy) -> Look {
    let found = match archive.head(copy).await {
        Ok(Some(found)) => found,
        Ok(None) => {
            return Look { outcome: Outcome::Failed("its image is missing".to_owned()), has_etag: false };
        }
        Err(error) => {
            let why = format!("it can't be looked at: {}", chain(&error));
            return Look { outcome: Outcome::Failed(why), has_etag: false };
        }
    };
    let image = &copy.manifest.image;
    let known = image.etag.as_deref().zip(found.etag.as_deref());
    let why = if found.bytes != image.bytes {
        Some(format!("it has {} bytes where the manifest says {}", found.bytes, image.bytes))
    } else if let Some((expected, found)) = known.filter(|(expected, found)| expected != found) {
        Some(format!(
            "its ETag is {} and was {} when it was stored: it was written since, by a copy or by a stranger; verify its bytes",
            printable(found),
            printable(expected)
        ))
    } else if found.md5.is_some_and(|md5| md5 != image.md5.to_string()) {
        Some("its metadata has another MD5 than its manifest: verify its bytes".to_owned())
    } else {
        None
    };
    Look { outcome: why.map_or(Outcome::Good, Outcome::Failed), has_etag: known.is_some() }
}

/// What [`look`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look {
    /// Never [`Outcome::Corrupt`]: that takes a look at the bytes.
    pub outcome: Outcome,
    /// Whether an `ETag` was compared, and not the length alone.
    pub has_etag: bool,
}

/// Whether a copy can't be read since the archive has lost data of it.
fn is_damage(error: &DownloadError) -> bool {
    let first: &(dyn Error + 'static) = error;
    std::iter::successors(Some(first), |error| (*error).source()).any(<dyn Error>::is::<Damaged>)
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
    let image = shown(&copy.image());
    match outcome {
        Outcome::Good => None,
        Outcome::Repaired(since) => Some(format!(
            "archive {archive}: {image} is good again: it was marked as corrupt since {since}, and counts"
        )),
        Outcome::Corrupt(why) => Some(format!("archive {archive}: {image} is CORRUPT: {why}")),
        Outcome::Failed(why) => Some(format!("archive {archive}: {image} is not verified: {why}")),
    }
}

#[cfg(test)]
mod tests;
