//! Reads stored copies again: every byte is hashed, and compared with the manifest.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream;

use crate::archive::Archive;
use crate::archive::catalogue::StoredCopy;
use crate::archive::md5::Md5Sum;
use crate::archive::qcow2::Qcow2Error;
use crate::archive::sink::{Sink, SinkError};
use crate::archive::source::{ImageFacts, ImageSource, ImageStream, SourceError};
use crate::archive::transfer::download::{Download, DownloadError, Output, Outputs};
use crate::archive::transfer::hash::Hashers;
use crate::clock::Clock;
use crate::disk::{Access, Disk, DiskFile, Open, blocking};
use crate::policy::ArchiveName;
use crate::randomness::Randomness;
use crate::transport::{Body, Reached, TransportError};

/// The size of one read from a disk.
const READ_BYTES: usize = 256 << 10;

/// A connection without data for this long is replaced.
const STALL_TIMEOUT: Duration = Duration::from_mins(1);

/// Why a copy was not read to its end, or not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The copy cannot be read.
    #[error("read the copy in archive `{archive}`")]
    Unreadable {
        /// The archive.
        archive: ArchiveName,
        /// The cause.
        #[source]
        source: DownloadError,
    },
    /// The MD5 differs.
    #[error(
        "the copy in archive `{archive}` is damaged: its MD5 is {found}, but its manifest says {expected}; no data of it \
         is used"
    )]
    Damaged {
        /// The archive.
        archive: ArchiveName,
        /// From the manifest.
        expected: Md5Sum,
        /// Of the bytes.
        found: Md5Sum,
    },
    /// The destination failed, not the copy.
    #[error(transparent)]
    Sink(#[from] SinkError),
}

/// Reads copies with these seams.
#[derive(Clone, Copy)]
pub struct CopyReader<'a> {
    /// For time-outs and the pauses between attempts.
    pub clock: &'a dyn Clock,
    /// For the pauses between attempts.
    pub randomness: &'a dyn Randomness,
    /// They verify the bytes.
    pub hashers: &'a Hashers,
}

impl CopyReader<'_> {
    /// Reads a copy's image from `source` into `sink`. Returns the sink, ready to be published, once every byte is
    /// verified, with the reason if the image is not a valid qcow2 image all the same.
    ///
    /// # Errors
    /// [`ReadError`]; the sink is abandoned then.
    pub(crate) async fn read(
        &self,
        archive: &ArchiveName,
        source: &dyn ImageSource,
        sink: Box<dyn Sink>,
    ) -> Result<(Box<dyn Sink>, Option<Qcow2Error>), ReadError> {
        let download = Download {
            source,
            clock: self.clock,
            randomness: self.randomness,
            stall_timeout: STALL_TIMEOUT,
            connections: 1,
            hashers: self.hashers,
            throttle: None,
            progress: &|_| {},
        };
        let mut outputs = Outputs {
            open: vec![Output { archive: archive.clone(), sink, resumable: None }],
            failed: Vec::new(),
        };
        let error = match download.fetch(&mut outputs, false).await {
            Ok(fetched) if fetched.md5 == fetched.expected => match outputs.open.pop() {
                Some(Output { sink, .. }) => return Ok((sink, fetched.qcow2.err())),
                None => ReadError::Unreadable { archive: archive.clone(), source: DownloadError::NoArchive },
            },
            Ok(fetched) => ReadError::Damaged {
                archive: archive.clone(),
                expected: fetched.expected,
                found: fetched.md5,
            },
            Err(source) => match outputs.failed.pop() {
                Some((_, error)) => ReadError::Sink(error),
                None => ReadError::Unreadable { archive: archive.clone(), source },
            },
        };
        for Output { sink, .. } in outputs.open {
            sink.abandon().await;
        }
        Err(error)
    }
}

impl Archive {
    /// The bytes of a copy that this archive has.
    pub(crate) fn image(&self, copy: &StoredCopy) -> Box<dyn ImageSource> {
        match self {
            Self::Local(archive) => Box::new(LocalImage {
                disk: Arc::clone(&archive.disk),
                path: copy.image.clone(),
                md5: copy.manifest.image.md5,
            }),
            Self::S3(archive) => Box::new(archive.image(copy)),
        }
    }
}

/// The image of a copy in a folder.
#[derive(Debug)]
struct LocalImage {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    md5: Md5Sum,
}

impl ImageSource for LocalImage {
    fn facts(&self) -> ImageFacts {
        ImageFacts { md5: Some(self.md5.to_string()) }
    }

    fn open<'a>(
        &'a self,
        offset: u64,
        until: Option<u64>,
        _etag: Option<&'a str>,
    ) -> BoxFuture<'a, Result<ImageStream, SourceError>> {
        let (disk, path) = (Arc::clone(&self.disk), self.path.clone());
        Box::pin(async move {
            let opened = blocking(move || {
                let file: Arc<dyn DiskFile> = Arc::from(disk.open(&path, Open::Read, Access::Group)?);
                let total = file.len()?;
                io::Result::Ok((file, total))
            });
            let (file, total) = opened.await.map_err(|error| SourceError::Refused(Box::new(error)))?;
            let end = until.unwrap_or(total).min(total);
            let body = pieces(file, offset, end);
            Ok(ImageStream { offset, is_part: true, total: Some(total), etag: None, body })
        })
    }

    /// A file has no URL that expires.
    fn renew(&self) -> BoxFuture<'_, Result<(), SourceError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// The bytes of a file between two offsets.
fn pieces(file: Arc<dyn DiskFile>, from: u64, end: u64) -> Body {
    let piece = move |at: u64| {
        let file = Arc::clone(&file);
        async move {
            let wanted = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX).min(READ_BYTES);
            if wanted == 0 {
                return Ok(None);
            }
            let read = blocking(move || {
                let mut buffer = vec![0; wanted];
                let count = file.read_at(&mut buffer, at)?;
                file.release(at..at + count as u64);
                buffer.truncate(count);
                io::Result::Ok(buffer)
            });
            let buffer = read.await.map_err(|error| {
                TransportError::because(Reached::Unknown, "the disk cannot read it", error)
            })?;
            let next = at + buffer.len() as u64;
            Ok((!buffer.is_empty()).then(|| (Bytes::from(buffer), next)))
        }
    };
    Box::pin(stream::try_unfold(from, piece))
}

#[cfg(test)]
mod tests {
    use futures_util::TryStreamExt as _;

    use super::*;
    use crate::archive::testing::{image, manifest_of};
    use crate::disk::{RealDisk, replace_file};

    #[tokio::test]
    async fn a_file_is_read_from_any_place_to_any_other() {
        let bytes = image(READ_BYTES * 2 + 17, 1);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        replace_file(&RealDisk, &path, &bytes, Access::Owner).unwrap();
        let md5 = manifest_of(&bytes).image.md5;
        let source = LocalImage { disk: Arc::new(RealDisk), path, md5 };
        let len = bytes.len() as u64;
        for (from, until) in
            [(0, None), (1, None), (len, None), (5, Some(9)), (READ_BYTES as u64, Some(len + 9))]
        {
            let stream = source.open(from, until, None).await.unwrap();
            assert_eq!((stream.offset, stream.total), (from, Some(len)));
            let pieces: Vec<Bytes> = stream.body.try_collect().await.unwrap();
            let end = until.unwrap_or(len).min(len);
            let span = usize::try_from(from).unwrap()..usize::try_from(end).unwrap();
            assert!(pieces.concat() == bytes[span], "{from} {until:?}");
        }
    }
}
