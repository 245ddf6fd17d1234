//! Where the bytes of an image go while they come in.
//!
//! One download feeds as many archives as lack the image. Each gives its end, a [`Sink`]; who feeds them hashes the
//! bytes once, and tells all of them whether the image is proved.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::archive::is_full;
use crate::archive::manifest::Manifest;
use crate::archive::md5::Md5Sum;
use crate::archive::proof::VerifiedCopy;
use crate::archive::transfer::part_file::PartFile;
use crate::text::printable;

/// One archive's end of a download. Dropping it is to be killed: nothing is published, and what the next one may rely on
/// is what was made safe by then.
pub trait Sink: Send {
    /// Hears what the whole image is, before its first byte and whenever it is another.
    ///
    /// # Errors
    /// [`SinkError`] if it has no place for it.
    fn expect(&mut self, _whole: &Whole) -> Result<(), SinkError> {
        Ok(())
    }

    /// Takes the next bytes of the image, in order and without gaps; may wait (back-pressure).
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), SinkError>>;

    /// What came so far is no use any more: the image begins anew at zero.
    fn restart(&mut self) -> BoxFuture<'_, Result<(), SinkError>>;

    /// The image is whole and verified: make it durable and visible, the manifest last. Returns the manifest that stands
    /// there now: another process may have stored the image first.
    fn publish(self: Box<Self>, manifest: Manifest) -> BoxFuture<'static, Result<Manifest, SinkError>>;

    /// The MD5 of the whole differs: keep the bytes aside once if the archive can (`.bad`), and be ready to begin at zero.
    fn keep_bad(&mut self) -> BoxFuture<'_, Result<(), SinkError>>;

    /// Not to be published. What can be resumed later stays (a local `.part` with its journal), the rest is given back.
    fn abandon(self: Box<Self>) -> BoxFuture<'static, ()>;

    /// The file that the bytes go to, where they can be written at any place and read back at once.
    fn part_file(&self) -> Option<Arc<PartFile>> {
        None
    }
}

/// What is known of an image as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Whole {
    /// The MD5 that the service gives.
    pub md5: Md5Sum,
    /// The length in bytes, where it is told.
    pub bytes: Option<u64>,
    /// What names this very version of it, where it is told.
    pub etag: Option<String>,
}

/// The beginning of an image that is safe in an archive since an earlier download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resumable {
    /// So many bytes; the sink takes those that follow.
    pub bytes: u64,
    /// Of which image.
    pub whole: Whole,
}

/// How an archive begins with an image.
pub enum Begin {
    /// A good copy is there already.
    Stored(VerifiedCopy),
    /// It is to be brought in.
    Sink(Box<dyn Sink>, Target),
}

/// What stands in an archive's place for an image that is to be brought in.
#[derive(Debug, Clone)]
pub struct Target {
    /// The image's place, for people.
    pub image: String,
    /// Where bytes with a wrong MD5 are kept, if the archive can.
    pub bad: Option<PathBuf>,
    /// What is there of it.
    pub resumable: Option<Resumable>,
}

/// Why an archive's end gave up. Whatever was in the archive before is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// It would not fit.
    #[error(
        "the image needs {} MiB beside {} MiB to spare, and {} MiB are free: make room on this file system, or \
         move the archive to a larger one",
        .needs.div_ceil(MIB), .spare / MIB, .free / MIB
    )]
    NoRoom {
        /// In bytes, as far as it is known.
        needs: u64,
        /// Left free beside it, in bytes.
        spare: u64,
        /// In bytes.
        free: u64,
    },
    /// It ran full on the way.
    #[error("{doing} {}: the file system is full: make room there, or move the archive to a larger one", shown(.path))]
    Full {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
    /// The disk refused something.
    #[error("{doing} {}", shown(.path))]
    Disk {
        /// What was tried.
        doing: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
    /// The file has not the length that came in.
    #[error("verify {}: it has {found} bytes on disk where {expected} came in", shown(.path))]
    Length {
        /// The image.
        path: PathBuf,
        /// In bytes.
        expected: u64,
        /// In bytes.
        found: u64,
    },
    /// An archive elsewhere refused something.
    #[error("{doing}")]
    Remote {
        /// What was tried, on what, and what may be done about it.
        doing: String,
        /// What it said.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
}

const MIB: u64 = 1 << 20;

impl SinkError {
    /// What the disk's error on `path` is for an archive.
    pub(crate) fn disk(doing: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        if is_full(&source) { Self::Full { doing, path, source } } else { Self::Disk { doing, path, source } }
    }
}

/// A path in a message.
pub(crate) fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy()).into_owned()
}
