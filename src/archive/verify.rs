//! Proves copies again: every byte is read and hashed as when it came in.
//!
//! A good one gets a new `verified_at`. A corrupt one is marked in its manifest, and does not count from then on; its image
//! stays as it is. One that can't be read is neither: nothing is marked, and it is told. What the catalogue finds wrong by
//! itself (an image that is gone or has another length) is told as well.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::archive::catalogue::{Catalogue, Problem, ProblemKind, StoredCopy};
use crate::archive::manifest::Manifest;
use crate::archive::manifest_update::{ManifestUpdate, UpdateError};
use crate::archive::md5::{Md5, Md5Sum};
use crate::archive::qcow2::{Checker, Qcow2, Qcow2Error};
use crate::archive::s3::S3Archive;
use crate::archive::sink::{Sink, SinkError};
use crate::archive::transfer::download::{Download, Output, Outputs};
use crate::archive::transfer::hash::Hashers;
use crate::archive::{Archive, ArchiveError};
use crate::clock::Clock;
use crate::disk::{Access, Disk, DiskFile, Open, blocking};
use crate::policy::ArchiveName;
use crate::randomness::Randomness;
use crate::text::chain;

/// Read at once: enough to keep a disk busy, little enough to stop soon.
const PIECE_BYTES: usize = 1 << 20;

/// A store that sends nothing for so long is asked anew.
const STALL_TIMEOUT: Duration = Duration::from_mins(1);

/// What came of one copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Every byte is as it was.
    Good,
    /// It is no copy any more, and why.
    Corrupt(String),
    /// It could not be told, or could not be noted, and why.
    Failed(String),
}

/// What came of an archive.
#[derive(Debug)]
pub struct Verification {
    /// The copies that were read again, in that order.
    pub copies: Vec<(StoredCopy, Outcome)>,
    /// What can't be relied on without reading it.
    pub problems: Vec<Problem>,
}

impl Verification {
    /// Whether all that was looked at is good.
    pub fn is_good(&self) -> bool {
        self.problems.is_empty() && self.copies.iter().all(|(_, outcome)| *outcome == Outcome::Good)
    }
}

/// Reads so many percent of an archive's images again, at least one, those first that were not proved for longest; `tell`
/// hears of each as soon as it is done.
///
/// # Errors
/// [`ArchiveError`] if the archive can't be read; nothing was verified then.
pub async fn verify_archive(
    archive: &Archive,
    percent: u64,
    clock: &dyn Clock,
    randomness: &dyn Randomness,
    tell: &(dyn Fn(&StoredCopy, &Outcome) + Send + Sync),
) -> Result<Verification, ArchiveError> {
    let catalogue = archive.catalogue().await?;
    let lost = catalogue.problems().iter().filter(|problem| problem.what != ProblemKind::NoManifest);
    let mut verification = Verification { copies: Vec::new(), problems: lost.cloned().collect() };
    for copy in due(&catalogue, percent) {
        let outcome = verify(archive, &copy, clock, randomness).await;
        tell(&copy, &outcome);
        verification.copies.push((copy, outcome));
    }
    Ok(verification)
}

/// The copies that are read again next.
fn due(catalogue: &Catalogue, percent: u64) -> Vec<StoredCopy> {
    let there = catalogue.copies().iter().filter(|copy| copy.manifest.pruned_at.is_none());
    let mut there: Vec<StoredCopy> = there.cloned().collect();
    there.sort_by_key(|copy| (copy.manifest.verified_at, copy.manifest.snapshot.id));
    let share = (there.len() as u64).saturating_mul(percent).div_ceil(100);
    there.truncate(usize::try_from(share).unwrap_or(usize::MAX));
    there
}

/// Reads one copy again, and notes what it is.
pub async fn verify(
    archive: &Archive,
    copy: &StoredCopy,
    clock: &dyn Clock,
    randomness: &dyn Randomness,
) -> Outcome {
    let read = match archive {
        Archive::Local(local) => read_file(Arc::clone(&local.disk), &copy.image).await,
        Archive::S3(bucket) => read_object(bucket, copy, clock, randomness).await,
    };
    let outcome = match read {
        Ok(read) => read.compare(&copy.manifest),
        Err(why) => return Outcome::Failed(why),
    };
    let now = clock.now();
    match outcome {
        Ok(()) => match archive.update_manifest(copy, ManifestUpdate::Verified(now)).await {
            Ok(()) => Outcome::Good,
            Err(error) => Outcome::Failed(format!("it is good, and that can't be noted: {}", chain(&error))),
        },
        Err(why) => match archive.update_manifest(copy, ManifestUpdate::Corrupt(now)).await {
            Ok(()) => Outcome::Corrupt(why),
            // Whoever replaced or removed it meanwhile may be the reason; what is there now was not read.
            Err(error @ UpdateError::Changed { .. }) => {
                Outcome::Failed(format!("{why}, but {}", chain(&error)))
            }
            Err(error) => {
                Outcome::Corrupt(format!("{why}; that can't be noted, so it still counts: {}", chain(&error)))
            }
        },
    }
}

/// What was read.
struct Read {
    bytes: u64,
    md5: Md5Sum,
    qcow2: Result<Qcow2, Qcow2Error>,
}

impl Read {
    /// Whether it is what the manifest says; if not, why.
    fn compare(&self, manifest: &Manifest) -> Result<(), String> {
        let (expected, bytes) = (manifest.image.md5, manifest.image.bytes);
        if self.bytes != bytes {
            return Err(format!("it has {} bytes where the manifest says {bytes}", self.bytes));
        }
        if self.md5 != expected {
            return Err(format!("its MD5 is {} where the manifest says {expected}", self.md5));
        }
        match &self.qcow2 {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("its MD5 is right, but it is not a sound image: {}", chain(error))),
        }
    }
}

/// A file that is being read again.
struct Reading {
    file: Box<dyn DiskFile>,
    at: u64,
    md5: Md5,
    checker: Checker,
    buffer: Vec<u8>,
}

impl Reading {
    /// Reads the next piece; false at the end.
    fn go_on(&mut self) -> std::io::Result<bool> {
        let count = self.file.read_at(&mut self.buffer, self.at)?;
        let piece = self.buffer.get(..count).unwrap_or_default();
        self.md5.update(piece);
        self.checker.update(piece);
        self.file.release(self.at..self.at + count as u64);
        self.at += count as u64;
        Ok(count > 0)
    }
}

/// In pieces, so that whoever is told to stop does not wait for a whole disk.
async fn read_file(disk: Arc<dyn Disk>, path: &Path) -> Result<Read, String> {
    let failed = |error: std::io::Error| format!("it can't be read: {error}");
    let path = path.to_owned();
    let open = move || {
        let file = disk.open(&path, Open::Read, Access::Group)?;
        // What is verified is the disk, not the memory that stands for it.
        file.release(0..file.len()?);
        let buffer = vec![0; PIECE_BYTES];
        Ok(Reading { file, at: 0, md5: Md5::new(), checker: Checker::default(), buffer })
    };
    let mut reading = blocking(open).await.map_err(failed)?;
    loop {
        let (again, more) = blocking(move || {
            let more = reading.go_on();
            (reading, more)
        })
        .await;
        reading = again;
        if !more.map_err(failed)? {
            let Reading { at, md5, checker, .. } = reading;
            return Ok(Read { bytes: at, md5: md5.finish(), qcow2: checker.finish() });
        }
    }
}

async fn read_object(
    bucket: &S3Archive,
    copy: &StoredCopy,
    clock: &dyn Clock,
    randomness: &dyn Randomness,
) -> Result<Read, String> {
    let (source, hashers) = (bucket.image(copy), Hashers::default());
    let download = Download {
        source: &source,
        clock,
        randomness,
        stall_timeout: STALL_TIMEOUT,
        connections: 1,
        hashers: &hashers,
        throttle: None,
        progress: &|_| {},
    };
    let end = Output { archive: bucket.name().clone(), sink: Box::new(Nowhere), resumable: None };
    let mut outputs = Outputs { open: vec![end], ..Outputs::default() };
    let fetched = download.fetch(&mut outputs, false).await;
    let fetched = fetched.map_err(|error| format!("it can't be read: {}", chain(&error)))?;
    Ok(Read { bytes: fetched.bytes, md5: fetched.md5, qcow2: fetched.qcow2 })
}

/// Where bytes go that are hashed alone.
struct Nowhere;

impl Sink for Nowhere {
    fn write(&mut self, _: Bytes) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn restart(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Nothing is kept, so nothing can be vouched for.
    fn publish(self: Box<Self>, _: Manifest) -> BoxFuture<'static, Result<Manifest, SinkError>> {
        let nothing =
            SinkError::Remote { doing: "keep it".to_owned(), source: "it is only read again".into() };
        Box::pin(std::future::ready(Err(nothing)))
    }

    fn keep_bad(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn abandon(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// One line about a copy, for people.
pub fn describe(archive: &ArchiveName, copy: &StoredCopy, outcome: &Outcome) -> Option<String> {
    let image = crate::archive::sink::shown(&copy.image);
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
