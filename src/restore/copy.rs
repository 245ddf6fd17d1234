//! Copies the image of the first good copy to a file or to a bucket.

use std::path::Path;
use std::sync::Arc;

use tracing::{info, warn};

use crate::archive::copy_reader::{CopyReader, ReadError};
use crate::archive::manifest::Manifest;
use crate::archive::s3::archive::S3Archive;
use crate::archive::transfer::sink::Begin;
use crate::archive::transfer::source::ImageSource;
use crate::disk::Disk;
use crate::policy::name::ArchiveName;
use crate::restore::error::RestoreError;
use crate::restore::file;
use crate::restore::find::ArchivedCopy;
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
    /// A bucket, where it is a verified copy like any other. An existing copy stays as it is.
    Bucket(&'a S3Archive),
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
    destination: Destination<'_>,
) -> Result<Restored<'a>, RestoreError> {
    let mut passed_over = Vec::new();
    for used in copies {
        let ArchivedCopy { archive, copy } = used;
        let (id, bytes) = (copy.manifest.snapshot.id, copy.manifest.image.bytes);
        info!("reading the copy of snapshot {id} in archive {}: {bytes} bytes", archive.name());
        let source = archive.image(copy);
        match copy_image(archive.name(), &*source, &copy.manifest, reader, destination).await {
            Ok(()) => return Ok(Restored { used, passed_over }),
            Err(RestoreError::Copy(error)) => {
                warn!("{}", chain(&error));
                passed_over.push(chain(&error));
            }
            Err(error) => return Err(error),
        }
    }
    Err(RestoreError::NoGoodCopy(passed_over))
}

/// Reads one image, verifies it, and publishes it at the destination.
pub(super) async fn copy_image(
    archive: &ArchiveName,
    source: &dyn ImageSource,
    manifest: &Manifest,
    reader: CopyReader<'_>,
    destination: Destination<'_>,
) -> Result<(), RestoreError> {
    let sink = match destination {
        Destination::File { disk, path } => file::create(disk, path, manifest.image.bytes).await?,
        Destination::Bucket(bucket) => match begin_in(bucket, manifest).await? {
            Begin::Stored(_) => return Ok(()),
            Begin::Missing(output) => output.sink,
        },
    };
    let (sink, invalid) = match reader.read(archive, source, sink).await {
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
