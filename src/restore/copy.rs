//! Copies the image of the first good copy to a file or to a bucket.

use std::path::Path;
use std::sync::Arc;

use tracing::{info, warn};

use crate::archive::copy_reader::{CopyReader, ReadError};
use crate::archive::manifest::{Manifest, Written, without_user_data};
use crate::archive::s3::archive::S3Archive;
use crate::archive::transfer::sink::{Begin, Output};
use crate::archive::transfer::source::ImageSource;
use crate::disk::Disk;
use crate::policy::name::ArchiveName;
use crate::restore::error::RestoreError;
use crate::restore::file;
use crate::restore::find::ArchivedCopy;
use crate::restore::stream::Stream;
use crate::run::downloads::ReadWatch;
use crate::text::chain;

/// The destination of an image.
#[derive(Clone, Copy)]
pub enum Destination<'a> {
    /// A new file.
    File {
        /// The disk.
        disk: &'a Arc<dyn Disk>,
        /// The path, where nothing exists yet.
        path: &'a Path,
    },
    /// A stream, which can't be taken back.
    Stream(&'a Stream),
    /// A bucket, where it is a verified copy like any other. An existing copy stays as it is.
    Bucket {
        /// The bucket.
        bucket: &'a S3Archive,
        /// Whether the manifests there may hold the user data of instances.
        user_data: bool,
    },
}

/// The copy that was used.
#[derive(Debug)]
pub struct Restored<'a> {
    /// The copy, verified again.
    pub used: &'a ArchivedCopy,
    /// Why the copies before it were not used, each a sentence.
    pub passed_over: Vec<String>,
}

/// Copies the image of the first copy that is still good.
///
/// # Errors
/// [`RestoreError`]; nothing new exists then.
pub async fn copy_first_good<'a>(
    copies: &'a [ArchivedCopy],
    reader: CopyReader<'_>,
    watch: ReadWatch<'_>,
    destination: Destination<'_>,
) -> Result<Restored<'a>, RestoreError> {
    let mut passed_over = Vec::new();
    for used in copies {
        let ArchivedCopy { archive, copy } = used;
        let (id, bytes) = (copy.manifest.snapshot.id, copy.manifest.image.bytes);
        info!("reading the copy of snapshot {id} in archive {}: {bytes} bytes", archive.name());
        let source = archive.image(copy);
        let before = match destination {
            Destination::File { .. } | Destination::Stream(_) => None,
            Destination::Bucket { user_data, .. } => manifest_of(used, user_data).await,
        };
        let manifest = Manifest { written: before.map(Written::over), ..(*copy.manifest).clone() };
        let shown = watch.begin("restoring", archive.name(), &manifest);
        let progress = |progress| shown.note_all(progress);
        let reader = CopyReader { progress: &progress, ..reader };
        let result = copy_image(archive.name(), &*source, &manifest, reader, destination).await;
        let written = match destination {
            Destination::Stream(stream) => stream.written(),
            Destination::File { .. } | Destination::Bucket { .. } => 0,
        };
        match result {
            Ok(()) => return Ok(Restored { used, passed_over }),
            Err(error) if written > 0 => {
                return Err(RestoreError::HalfWritten { written, why: chain(&error) });
            }
            Err(RestoreError::Copy(error)) => {
                warn!("{}", chain(&error));
                passed_over.push(chain(&error));
            }
            Err(error) if passed_over.is_empty() => return Err(error),
            Err(error) => {
                // The destination failed, so no other copy can help. The damaged copies are part of the answer.
                passed_over.push(chain(&error));
                break;
            }
        }
    }
    Err(RestoreError::NoGoodCopy(passed_over))
}

/// The file of a copy's manifest, with what is not kept in memory; without it, the new one lacks that.
async fn manifest_of(ArchivedCopy { archive, copy }: &ArchivedCopy, user_data: bool) -> Option<Vec<u8>> {
    match archive.manifest_bytes(copy).await {
        Ok(bytes) => bytes.map(|bytes| if user_data { bytes } else { without_user_data(bytes) }),
        Err(error) => {
            warn!("how to build the instance again is not copied along: {}", chain(&error));
            None
        }
    }
}

/// Reads one image, verifies it, and publishes it at the destination.
pub(super) async fn copy_image(
    archive: &ArchiveName,
    source: &dyn ImageSource,
    manifest: &Manifest,
    reader: CopyReader<'_>,
    destination: Destination<'_>,
) -> Result<(), RestoreError> {
    let output = match destination {
        Destination::File { disk, path } => {
            let sink = file::create(disk, path, manifest.image.bytes).await?;
            Output::new(archive.clone(), String::new(), sink)
        }
        Destination::Stream(stream) => Output::new(archive.clone(), String::new(), stream.sink()),
        Destination::Bucket { bucket, .. } => match begin_in(bucket, manifest).await? {
            Begin::Stored(_) => return Ok(()),
            Begin::Missing(output) => output,
        },
    };
    let (sink, invalid) = match reader.read(archive, source, output).await {
        Ok(read) => read,
        Err(ReadError::Sink(error)) => return Err(error.into()),
        Err(error) => return Err(RestoreError::Copy(error)),
    };
    if let Some(error) = invalid {
        warn!("the image matches its manifest, but it is not a valid qcow2 image: {}", chain(&error));
    }
    sink.publish(Manifest { verified_at: reader.clock.now(), ..manifest.clone() }).await?;
    Ok(())
}

async fn begin_in(bucket: &S3Archive, manifest: &Manifest) -> Result<Begin, RestoreError> {
    let begun = bucket.begin(&manifest.id()).await;
    begun.map_err(|error| RestoreError::Bucket { archive: bucket.name().clone(), source: Box::new(error) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::backend::Archive;
    use crate::archive::catalogue::StoredCopy;
    use crate::archive::local::LocalArchive;
    use crate::archive::testing::{NoRandomness, TestClock, image, manifest_of};
    use crate::archive::transfer::hash::Hashers;
    use crate::clock::Clock;
    use crate::disk::{Access, RealDisk, replace_file};
    use crate::run::downloads::Downloads;

    #[tokio::test(start_paused = true)]
    async fn a_destination_that_fails_after_a_damaged_copy_names_both_causes() {
        let (bytes, folder) = (image(300_000, 1), tempfile::tempdir().unwrap());
        let disk: Arc<dyn Disk> = Arc::new(RealDisk);
        let copy_in = |name: &str, bytes: &[u8], manifest: Manifest| {
            let path = folder.path().join(name);
            let clock = Arc::new(TestClock::at("2026-11-01T12:00:00Z"));
            let archive = LocalArchive::new(name.parse().unwrap(), path.clone(), disk.clone(), clock);
            let copy =
                StoredCopy { manifest: manifest.into(), folder: path.as_path().into(), has_image: true };
            disk.create_dir_all(&path, Access::Owner).unwrap();
            replace_file(&RealDisk, &copy.image(), bytes, Access::Owner).unwrap();
            ArchivedCopy { archive: Arc::new(Archive::Local(archive)), copy }
        };
        let mut too_large = manifest_of(&bytes);
        too_large.image.bytes = u64::MAX;
        let copies =
            [copy_in("spare", &image(300_000, 2), manifest_of(&bytes)), copy_in("vault", &bytes, too_large)];
        let (clock, hashers) = (TestClock::at("2026-11-01T12:00:00Z"), Hashers::default());
        let reader = CopyReader::new(&clock, &NoRandomness, &hashers);
        let path = folder.path().join("disk.raw");
        let destination = Destination::File { disk: &disk, path: &path };
        let watch_clock: Arc<dyn Clock> = Arc::new(TestClock::at("2026-11-01T12:00:00Z"));
        let downloads = Downloads::default();
        let watch = ReadWatch { downloads: &downloads, clock: &watch_clock };
        let refused = copy_first_good(&copies, reader, watch, destination).await.unwrap_err().to_string();
        assert!(refused.contains("the copy in archive `spare` is damaged"), "{refused}");
        assert!(refused.contains("bytes are free in"), "{refused}");
        assert!(disk.metadata(&path).is_err());
    }
}
