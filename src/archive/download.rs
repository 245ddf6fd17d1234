//! Brings an image in: network, hash and disk side by side, memory flat.
//!
//! Three parts of one future: the network's chunks are gathered into **batches** of 1 MiB, and each batch goes
//! to the hash and to the disk at once, which work through theirs on the blocking pool. Batches are bounded, so
//! a slow disk slows the network down and nothing piles up. Nothing blocks for longer than what is at hand, so
//! that waiting for the network is never anything but waiting on the clock.
//!
//! What breaks is taken up again where it broke (a **pass** is one connection); what changed is begun anew (a
//! **start**). Whether the bytes are right is decided by their MD5, which the caller compares.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::archive::is_full;
use crate::archive::md5::{Md5, Md5Sum};
use crate::archive::source::{ImageFacts, ImageSource, ImageStream, SourceError};
use crate::clock::{Clock, timeout};
use crate::disk::{DiskFile, blocking};
use crate::randomness::{Randomness, up_to};
use crate::text::excerpt;

/// How it goes, as told to whoever wants to show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// So far has it come.
    Downloading {
        /// Bytes that arrived.
        bytes: u64,
        /// The length of the image, where it is known.
        total: Option<u64>,
    },
    /// The connection broke or stalled; a new one goes on at this byte.
    Resumed {
        /// Bytes that arrived.
        bytes: u64,
    },
    /// The image changed on the way: from zero again.
    StartedOver,
    /// The MD5 differs: the file is kept aside, and fetched anew if this was the first time.
    ChecksumMismatch,
    /// All bytes are there; they are being made safe on disk and read back.
    Verifying,
}

/// Why an image did not come in.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// Nothing to prove it by.
    #[error(
        "unverified: the service gives no MD5 of the image, so it could not be proved and was not fetched"
    )]
    NoMd5,
    /// Nothing sensible to prove it by.
    #[error(
        "unverified: the service gives `{0}` as the MD5 of the image, which is none, so it could not be proved \
         and was not fetched"
    )]
    BadMd5(String),
    /// It would not fit.
    #[error(
        "the image needs {} MiB beside {} MiB to spare, and {} MiB are free: make room on this file system, or \
         move the archive to a larger one",
        .needs.div_ceil(MIB), SPARE_BYTES / MIB, .free / MIB
    )]
    NoRoom {
        /// In bytes, as far as it is known.
        needs: u64,
        /// In bytes.
        free: u64,
    },
    /// Trying again does not help.
    #[error("give up after {bytes} bytes")]
    Refused {
        /// Bytes that had arrived.
        bytes: u64,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// It did not get any further.
    #[error("give up at byte {bytes}{} after {TRIES} tries in a row without progress", of(*.total))]
    GaveUp {
        /// Bytes that had arrived.
        bytes: u64,
        /// The length of the image, where it is known.
        total: Option<u64>,
        /// What went wrong the last time.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// It changed again and again.
    #[error("give up after {STARTS} starts: {0}")]
    Unsteady(&'static str),
    /// The disk ran full on the way.
    #[error("the file system is full: make room on it, or move the archive to a larger one")]
    Full(#[source] io::Error),
    /// The disk failed.
    #[error("write what arrived")]
    Disk(#[source] io::Error),
}

impl DownloadError {
    fn disk(error: io::Error) -> Self {
        if is_full(&error) { Self::Full(error) } else { Self::Disk(error) }
    }
}

fn of(total: Option<u64>) -> String {
    total.map_or_else(String::new, |total| format!(" of {total}"))
}

/// One connection's failure that a later one may not have.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("no byte came for {} s", .0.as_secs_f64())]
    Stalled(Duration),
    #[error("the image ended early")]
    Short,
    #[error("the server answers from another place than asked")]
    WrongOffset,
}

const MIB: u64 = 1 << 20;
/// Left free on the file system beside an image, in bytes: for its manifest, and for everybody else.
const SPARE_BYTES: u64 = 64 * MIB;
/// So many tries in a row without progress, and it is given up.
const TRIES: u32 = 5;
/// At most so long between two of them.
const BACKOFF_MAX: Duration = Duration::from_mins(1);
/// So many times an image that changes is begun: one that changes more often is no image.
const STARTS: u32 = 3;
/// Large enough to make the hand-over between threads cheap, small enough to keep memory flat.
const BATCH_BYTES: usize = 1 << 20;
/// Full batches between network, hash and disk; one more is being filled.
const BATCHES_IN_FLIGHT: usize = 7;
/// Smaller chunks are copied together, so that a server that sends single bytes can't make a batch large.
const SMALL_BYTES: usize = 4096;

/// What a download needs beside the file.
pub(super) struct Download<'a> {
    pub(super) source: &'a dyn ImageSource,
    pub(super) clock: &'a dyn Clock,
    pub(super) randomness: &'a dyn Randomness,
    pub(super) stall_timeout: Duration,
    pub(super) progress: &'a (dyn Fn(Progress) + Send + Sync),
}

/// What came in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fetched {
    pub(super) bytes: u64,
    /// Of the bytes.
    pub(super) md5: Md5Sum,
    /// By the service.
    pub(super) expected: Md5Sum,
}

/// The MD5 that the service gives.
pub(super) fn expected_md5(facts: &ImageFacts) -> Result<Md5Sum, DownloadError> {
    match facts.md5.as_deref().map(str::trim) {
        None | Some("") => Err(DownloadError::NoMd5),
        Some(text) => text.parse().map_err(|_| DownloadError::BadMd5(excerpt(text, 64))),
    }
}

/// How a start, or one pass of it, ended.
enum Ended {
    /// The image is whole.
    Whole,
    /// What is there is no use any more.
    Changed(&'static str),
    /// Another connection may go on.
    Failed(Box<dyn Error + Send + Sync>),
}

/// How far a start has come, and of what.
#[derive(Default)]
struct Reached {
    bytes: u64,
    total: Option<u64>,
    etag: Option<String>,
    /// Before the next opening a new address is needed.
    expired: bool,
}

impl Download<'_> {
    /// Brings the image into `file`, which is empty and belongs to this download alone. `free` is how many bytes
    /// its file system has; with `renew` the old address is no good.
    pub(super) async fn fetch(
        &self,
        file: &Arc<dyn DiskFile>,
        free: u64,
        renew: bool,
    ) -> Result<Fetched, DownloadError> {
        let mut why = "";
        for start in 0..STARTS {
            let expected = expected_md5(&self.source.facts())?;
            if start > 0 {
                (self.progress)(Progress::StartedOver);
                let file = Arc::clone(file);
                blocking(move || file.set_len(0)).await.map_err(DownloadError::disk)?;
            }
            let (to_hash, from_hash) = unbounded_channel();
            let (to_disk, from_disk) = unbounded_channel();
            let sink = Sink::new(to_hash, to_disk);
            let written = async { write(file, from_disk).await.map_err(DownloadError::disk) };
            let hashed = async { Ok(hash(from_hash).await) };
            let received = self.receive(expected, sink, free, renew && start == 0);
            let ((ended, bytes), md5, ()) = tokio::try_join!(received, hashed, written)?;
            match ended {
                None => return Ok(Fetched { bytes, md5, expected }),
                Some(changed) => why = changed,
            }
        }
        Err(DownloadError::Unsteady(why))
    }

    /// Feeds the sink until the image is whole (`None`), or what came is no use any more (why).
    async fn receive(
        &self,
        expected: Md5Sum,
        mut sink: Sink,
        free: u64,
        renew: bool,
    ) -> Result<(Option<&'static str>, u64), DownloadError> {
        let mut reached = Reached { expired: renew, ..Reached::default() };
        let mut failures = 0;
        loop {
            let before = reached.bytes;
            let source = match self.pass(expected, &mut reached, &mut sink, free).await? {
                Ended::Whole => {
                    sink.flush().await;
                    return Ok((None, reached.bytes));
                }
                Ended::Changed(why) => return Ok((Some(why), reached.bytes)),
                Ended::Failed(source) => source,
            };
            failures = if reached.bytes > before { 0 } else { failures + 1 };
            if failures == TRIES {
                return Err(DownloadError::GaveUp { bytes: reached.bytes, total: reached.total, source });
            }
            // A new address is asked for at once the first time: the old one simply grew old.
            if failures > 1 || !reached.expired {
                self.clock.sleep(backoff(self.randomness, failures)).await;
            }
            (self.progress)(Progress::Resumed { bytes: reached.bytes });
        }
    }

    /// One connection, from where the last one came to.
    async fn pass(
        &self,
        expected: Md5Sum,
        reached: &mut Reached,
        sink: &mut Sink,
        free: u64,
    ) -> Result<Ended, DownloadError> {
        if reached.expired {
            if let Err(error) = self.source.renew().await {
                return judge(error, reached);
            }
            reached.expired = false;
            if expected_md5(&self.source.facts())? != expected {
                return Ok(Ended::Changed("the MD5 of the image changed with a new export"));
            }
        }
        let etag = reached.etag.clone().filter(|_| reached.bytes > 0);
        let opened = self.source.open(reached.bytes, etag.as_deref());
        let mut stream = match timeout(self.clock, self.stall_timeout, opened).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return judge(error, reached),
            Err(stalled) => return Ok(Ended::Failed(Failure::Stalled(stalled.0).into())),
        };
        if reached.bytes == 0 {
            // Nothing came of it yet, so it does not matter what it was.
            (reached.total, reached.etag) = (None, None);
        }
        if let Some(why) = changed(reached, &stream) {
            return Ok(Ended::Changed(why));
        }
        // What a server that ignores ranges sends once more is passed over.
        let Some(mut again) = reached.bytes.checked_sub(stream.offset) else {
            return Ok(Ended::Failed(Failure::WrongOffset.into()));
        };
        reached.total = reached.total.or(stream.total);
        reached.etag = reached.etag.take().or_else(|| stream.etag.take());
        let fits = |needs: u64| {
            let fits = needs <= free.saturating_sub(SPARE_BYTES);
            if fits { Ok(()) } else { Err(DownloadError::NoRoom { needs, free }) }
        };
        if let Some(total) = reached.total {
            fits(total)?;
        }

        while reached.total != Some(reached.bytes) {
            let mut chunk = match timeout(self.clock, self.stall_timeout, stream.body.next()).await {
                Ok(Some(Ok(chunk))) => chunk,
                Ok(Some(Err(error))) => return Ok(Ended::Failed(error.into())),
                Ok(None) if reached.total.is_none() && again == 0 => return Ok(Ended::Whole),
                Ok(None) => return Ok(Ended::Failed(Failure::Short.into())),
                Err(stalled) => return Ok(Ended::Failed(Failure::Stalled(stalled.0).into())),
            };
            let passed_over = chunk.len().min(usize::try_from(again).unwrap_or(usize::MAX));
            let _ = chunk.split_to(passed_over);
            again -= passed_over as u64;
            reached.bytes += chunk.len() as u64;
            if reached.total.is_some_and(|total| reached.bytes > total) {
                return Ok(Ended::Changed("the server sends more bytes than it promised"));
            }
            fits(reached.bytes)?;
            if sink.push(chunk).await {
                (self.progress)(Progress::Downloading { bytes: reached.bytes, total: reached.total });
            }
        }
        (self.progress)(Progress::Downloading { bytes: reached.bytes, total: reached.total });
        Ok(Ended::Whole)
    }
}

/// Why what came so far does not go with what this connection offers.
fn changed(reached: &Reached, stream: &ImageStream) -> Option<&'static str> {
    let other_etag = reached.etag.is_some() && stream.etag.is_some() && reached.etag != stream.etag;
    let other_total = reached.total.is_some() && stream.total.is_some() && reached.total != stream.total;
    if other_etag {
        Some("the ETag of the image changed on the way")
    } else if other_total || stream.total.is_some_and(|total| total < reached.bytes) {
        Some("the length of the image changed on the way")
    } else {
        None
    }
}

/// What is done about a source that did not open.
fn judge(error: SourceError, reached: &mut Reached) -> Result<Ended, DownloadError> {
    match error {
        SourceError::Refused(_) => Err(DownloadError::Refused { bytes: reached.bytes, source: error }),
        SourceError::Changed => Ok(Ended::Changed("the image changed at its address")),
        SourceError::Expired => {
            reached.expired = true;
            Ok(Ended::Failed(error.into()))
        }
        SourceError::Broken(_) => Ok(Ended::Failed(error.into())),
    }
}

/// The wait after so many tries in a row without progress: from 2 s, each four times the last, half of it at random. All
/// together outlast a minute or so without a network, which would otherwise cost a large image.
fn backoff(randomness: &dyn Randomness, failures: u32) -> Duration {
    let whole = Duration::from_secs(2)
        .saturating_mul(4_u32.saturating_pow(failures.saturating_sub(1)))
        .min(BACKOFF_MAX);
    whole / 2 + up_to(randomness, whole / 2)
}

/// Bytes on their way to hash and disk. The last to let go of it makes room for another.
struct Batch {
    offset: u64,
    pieces: Vec<Bytes>,
    _room: OwnedSemaphorePermit,
}

/// Where the network's chunks become batches.
struct Sink {
    offset: u64,
    len: usize,
    pieces: Vec<Bytes>,
    small: BytesMut,
    room: Arc<Semaphore>,
    // They hold no more than there is room for.
    to_hash: UnboundedSender<Arc<Batch>>,
    to_disk: UnboundedSender<Arc<Batch>>,
}

impl Sink {
    fn new(to_hash: UnboundedSender<Arc<Batch>>, to_disk: UnboundedSender<Arc<Batch>>) -> Self {
        let room = Arc::new(Semaphore::new(BATCHES_IN_FLIGHT));
        Self { offset: 0, len: 0, pieces: Vec::new(), small: BytesMut::new(), room, to_hash, to_disk }
    }

    /// Takes a chunk in; true if a batch went out.
    async fn push(&mut self, mut chunk: Bytes) -> bool {
        let mut sent = false;
        while !chunk.is_empty() {
            let piece = chunk.split_to(chunk.len().min(BATCH_BYTES - self.len));
            self.len += piece.len();
            if piece.len() < SMALL_BYTES {
                self.small.extend_from_slice(&piece);
            } else {
                self.seal();
                self.pieces.push(piece);
            }
            if self.len == BATCH_BYTES {
                self.flush().await;
                sent = true;
            }
        }
        sent
    }

    /// Ends the run of small chunks.
    fn seal(&mut self) {
        if !self.small.is_empty() {
            self.pieces.push(self.small.split().freeze());
        }
    }

    /// Sends what there is, as soon as there is room.
    async fn flush(&mut self) {
        self.seal();
        if self.len == 0 {
            return;
        }
        // The semaphore is never closed, and whoever stopped taking batches has ended the whole download.
        let Ok(room) = Arc::clone(&self.room).acquire_owned().await else { return };
        let pieces = std::mem::take(&mut self.pieces);
        let batch = Arc::new(Batch { offset: self.offset, pieces, _room: room });
        self.offset += self.len as u64;
        self.len = 0;
        let _ = self.to_hash.send(Arc::clone(&batch));
        let _ = self.to_disk.send(batch);
    }
}

/// Hashes all batches in their order.
async fn hash(mut batches: UnboundedReceiver<Arc<Batch>>) -> Md5Sum {
    let mut md5 = Md5::new();
    let mut ready = Vec::new();
    while batches.recv_many(&mut ready, BATCHES_IN_FLIGHT).await > 0 {
        let work = std::mem::take(&mut ready);
        md5 = blocking(move || {
            for batch in work {
                for piece in &batch.pieces {
                    md5.update(piece);
                }
            }
            md5
        })
        .await;
    }
    md5.finish()
}

/// Writes all batches to their places.
async fn write(file: &Arc<dyn DiskFile>, mut batches: UnboundedReceiver<Arc<Batch>>) -> io::Result<()> {
    let mut ready = Vec::new();
    while batches.recv_many(&mut ready, BATCHES_IN_FLIGHT).await > 0 {
        let work = std::mem::take(&mut ready);
        let file = Arc::clone(file);
        blocking(move || {
            for batch in work {
                let mut offset = batch.offset;
                for piece in &batch.pieces {
                    file.write_all_at(piece, offset)?;
                    offset += piece.len() as u64;
                }
            }
            io::Result::Ok(())
        })
        .await?;
    }
    Ok(())
}
