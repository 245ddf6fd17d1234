//! Where the bytes of an image go while they are received.
//!
//! One download feeds as many archives as lack the image. Each gives an [`Output`] with a [`Sink`]; the download hashes the
//! bytes once, and its caller says to all of them whether the image is verified.

use std::error::Error;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::{BoxFuture, ready};

use crate::archive::manifest::Manifest;
use crate::archive::md5::Md5Sum;
use crate::archive::proof::VerifiedCopy;
use crate::archive::transfer::part_file::PartFile;
use crate::archive::transfer::parts::PartSums;
use crate::policy::name::ArchiveName;
use crate::text::printable;
use crate::transport::Body;

/// Takes the bytes of one image into an archive. Dropping it is like being killed: nothing is published, and the next
/// download can rely on the bytes that were synced by then.
pub trait Sink: Send {
    /// Called with what is known of the image, before its first byte and whenever it is another.
    ///
    /// # Errors
    /// [`SinkError`] if there is no space for it.
    fn expect(&mut self, _image: &ImageVersion) -> Result<(), SinkError> {
        Ok(())
    }

    /// Offers the MD5s of the image's parts, before its first byte; whether the archive has a use for them.
    fn take_part_sums(&mut self, _sums: &PartSums) -> bool {
        false
    }

    /// Takes the next bytes of the image, in order and without gaps; may wait (back-pressure).
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), SinkError>>;

    /// The image was given whole: waits until all of it is stored, or known to be [missing](Self::missing).
    fn wait_until_stored(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(ready(Ok(())))
    }

    /// Bytes that were given and could not be stored: they have to be read from their source again.
    fn missing(&mut self) -> Option<Range<u64>> {
        None
    }

    /// Takes the missing bytes once more. If it did not work, and another attempt may help, they are missing still.
    fn write_missing(&mut self, _bytes: Body) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(ready(Ok(())))
    }

    /// The bytes so far are useless: the image starts over at zero.
    fn restart(&mut self) -> BoxFuture<'_, Result<(), SinkError>>;

    /// The image is complete and verified: make it durable and visible, the manifest last. Returns the manifest that is
    /// there now: another process may have stored the image first.
    fn publish(self: Box<Self>, manifest: Manifest) -> BoxFuture<'static, Result<Manifest, SinkError>>;

    /// The MD5 of the image differs: keep the bytes aside once if the archive can (`.bad`), and be ready to start over. Most
    /// can't: what is not published can't be read there, or is elsewhere still.
    fn keep_bad(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        self.restart()
    }

    /// Not to be published. What can be resumed later stays (a local `.part` with its journal), the rest is removed.
    fn abandon(self: Box<Self>) -> BoxFuture<'static, ()>;

    /// The file that the bytes are written to, where they can be written at any place and read back at once.
    fn part_file(&self) -> Option<Arc<PartFile>> {
        None
    }
}

/// One archive of a download.
pub struct Output {
    pub(crate) archive: ArchiveName,
    /// The place of the image in the archive, for people.
    pub(crate) image: String,
    /// Where bytes with a wrong MD5 are kept, if the archive can.
    pub(crate) bad: Option<PathBuf>,
    /// What an earlier download left there.
    pub(crate) resumable: Option<Received>,
    /// Takes the bytes.
    pub sink: Box<dyn Sink>,
}

impl Output {
    /// One that keeps nothing of an unfinished download.
    pub(crate) fn new(archive: ArchiveName, image: String, sink: Box<dyn Sink>) -> Self {
        Self { archive, image, bad: None, resumable: None, sink }
    }
}

/// How an archive begins with an image.
pub enum Begin {
    /// A verified copy is there already.
    Stored(VerifiedCopy),
    /// The image has to be downloaded.
    Missing(Output),
}

/// What is known of an image that is received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageVersion {
    /// The MD5 that the service gives.
    pub md5: Md5Sum,
    /// The length in bytes, once it is known.
    pub bytes: Option<u64>,
    /// The server's name of this very version of the image, if it gives one.
    pub etag: Option<String>,
}

/// The beginning of an image that was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// All bytes before this one.
    pub bytes: u64,
    /// The image.
    pub image: ImageVersion,
}

/// Why a sink gave up. The archive is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The file system has too little space for it.
    #[error(
        "the image needs {} MiB beside {} MiB to spare, and {} MiB are free{}: free some space on this file system, or \
         move the archive to a larger one",
        .needs.div_ceil(MIB), .spare / MIB, .free / MIB, beside_others(*.taken)
    )]
    NoSpace {
        /// Bytes of the image, as far as it is known.
        needs: u64,
        /// Bytes that are to stay free.
        spare: u64,
        /// Bytes that are free for it.
        free: u64,
        /// Bytes that other images take, which are being stored at the same time.
        taken: u64,
    },
    /// The file system ran full while the image was received.
    #[error("{doing} {}: the file system is full: free some space there, or move the archive to a larger one", shown(.path))]
    Full {
        /// The action that failed.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the disk.
        #[source]
        source: io::Error,
    },
    /// The disk refused something.
    #[error("{doing} {}", shown(.path))]
    Disk {
        /// The action that failed.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The error of the disk.
        #[source]
        source: io::Error,
    },
    /// The file has another length than was received.
    #[error("verify {}: it has {found} bytes on disk where {expected} were received", shown(.path))]
    Length {
        /// The image.
        path: PathBuf,
        /// Bytes that were received.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// An archive elsewhere failed.
    #[error("{doing}")]
    Remote {
        /// The action that failed, and on what.
        doing: String,
        /// Whether it has no space left.
        is_full: bool,
        /// The reason.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
}

const MIB: u64 = 1 << 20;

fn beside_others(taken: u64) -> String {
    if taken == 0 {
        return String::new();
    }
    format!(", {} MiB for other images that are being stored now not counted", taken.div_ceil(MIB))
}

impl SinkError {
    /// An error of the disk at `path`; a full one gets its own advice.
    pub(crate) fn disk(doing: &'static str, path: &Path, source: io::Error) -> Self {
        let (path, source) = (path.to_owned(), explain_read_only(source));
        if is_full(&source) { Self::Full { doing, path, source } } else { Self::Disk { doing, path, source } }
    }

    /// Whether nothing is wrong but that the archive lacks space.
    pub(crate) fn is_full(&self) -> bool {
        match self {
            Self::NoSpace { .. } | Self::Full { .. } => true,
            Self::Remote { is_full, .. } => *is_full,
            Self::Disk { .. } | Self::Length { .. } => false,
        }
    }
}

/// Says what to do about a file system that is read-only: to the hardened systemd unit all are that it does not name.
fn explain_read_only(error: io::Error) -> io::Error {
    if error.kind() != io::ErrorKind::ReadOnlyFilesystem {
        return error;
    }
    let text = format!(
        "{error}: it is mounted so, or the systemd unit has no line `ReadWritePaths=` for the archive (`systemctl edit snapwarden`)"
    );
    io::Error::new(error.kind(), text)
}

/// Whether there is no space left, on the disk or in a quota.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// A path in a message.
pub(crate) fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy()).into_owned()
}
