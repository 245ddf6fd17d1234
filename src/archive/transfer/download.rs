//! Brings an image in: network, hash and archives side by side, memory flat.
//!
//! The network's chunks are gathered into **batches** of 1 MiB, and each batch goes to the hash and to every archive's
//! [`Sink`], which work through theirs beside the network. What waits is bounded, so a slow disk slows the network down
//! and nothing piles up. Nothing blocks for longer than what is at hand, so that waiting for the network is never anything
//! but waiting on the clock.
//!
//! What breaks is taken up again where it broke (a **pass** is one connection); what changed is begun anew (a
//! **start**). What is safe in an archive since an earlier download is not fetched again: it is hashed anew while the rest
//! comes in. Whether the bytes are right is decided by their MD5, which the caller compares.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;

use crate::archive::md5::Md5Sum;
use crate::archive::qcow2::{MAGIC, Qcow2, Qcow2Error};
use crate::archive::sink::{Resumable, Sink, SinkError, Whole};
use crate::archive::source::{ImageFacts, ImageSource, ImageStream, SourceError};
use crate::archive::transfer::buffer::Buffers;
use crate::archive::transfer::hash::{Hash, Hashers};
use crate::archive::transfer::part_file::PartFile;
use crate::archive::transfer::ranges::{PIECE_BYTES, Pieces};
use crate::archive::transfer::throttle::Throttle;
use crate::clock::{Clock, timeout};
use crate::disk::{DiskFile, blocking};
use crate::policy::ArchiveName;
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
    /// The connection broke or stalled, or what an earlier download left is taken up: a new one goes on at this byte.
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
    /// What is safe on the disk can't be read back.
    #[error("read back what is there of the image")]
    ReadBack(#[source] io::Error),
    /// Each archive failed on its own, and told why.
    #[error("no archive takes it any more")]
    NoArchive,
}

fn of(total: Option<u64>) -> String {
    total.map_or_else(String::new, |total| format!(" of {total}"))
}

const NO_IMAGE: &str = "what the server sends is no qcow2 image";

/// One connection's failure that a later one may not have.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("no byte came for {} s", .0.as_secs_f64())]
    Stalled(Duration),
    #[error("the image ended early")]
    Short,
    #[error("the server answers from another place than asked")]
    WrongOffset,
    #[error("the server gives parts of the image no more")]
    NoRanges,
    #[error("{NO_IMAGE}: it begins with {0:?}")]
    NoImage(String),
}

/// So many tries in a row without progress, and it is given up.
const TRIES: u32 = 5;
/// At most so long between two of them.
const BACKOFF_MAX: Duration = Duration::from_mins(1);
/// So many times an image that changes is begun: one that changes more often is no image.
const STARTS: u32 = 3;
/// Large enough to make the hand-over between threads cheap, small enough to keep memory flat.
const BATCH_BYTES: usize = 1 << 20;

/// What a download needs beside the archives that it feeds.
#[derive(Clone, Copy)]
pub struct Download<'a> {
    /// Where the bytes come from.
    pub source: &'a dyn ImageSource,
    /// For stalls and for the waits between tries.
    pub clock: &'a dyn Clock,
    /// For the waits between tries.
    pub randomness: &'a dyn Randomness,
    /// So long without a byte, and it goes on over a new connection.
    pub stall_timeout: Duration,
    /// So many connections at once, as far as the store allows them and one archive alone is fed, on this machine.
    pub connections: usize,
    /// They prove it.
    pub hashers: &'a Hashers,
    /// Keeps it below a rate, together with all others that share it.
    pub throttle: Option<&'a Throttle>,
    /// Hears how it goes.
    pub progress: &'a (dyn Fn(Progress) + Send + Sync),
}

/// What came in.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) bytes: u64,
    /// Of the bytes.
    pub(crate) md5: Md5Sum,
    /// By the service.
    pub(crate) expected: Md5Sum,
    /// What the bytes are.
    pub(crate) qcow2: Result<Qcow2, Qcow2Error>,
}

/// The MD5 that the service gives.
pub(crate) fn expected_md5(facts: &ImageFacts) -> Result<Md5Sum, DownloadError> {
    match facts.md5.as_deref().map(str::trim) {
        None | Some("") => Err(DownloadError::NoMd5),
        Some(text) => text.parse().map_err(|_| DownloadError::BadMd5(excerpt(text, 64))),
    }
}

/// An archive's end of the download.
pub(crate) struct Output {
    pub(crate) archive: ArchiveName,
    pub(crate) sink: Box<dyn Sink>,
    /// What it has of the image.
    pub(crate) resumable: Option<Resumable>,
}

/// All outputs of a download: those that still take bytes, and why the others do not.
#[derive(Default)]
pub(crate) struct Outputs {
    pub(crate) open: Vec<Output>,
    pub(crate) failed: Vec<(ArchiveName, SinkError)>,
}

impl Outputs {
    /// Those go on for which it went well.
    async fn drop_failed(&mut self, failures: Vec<(usize, SinkError)>) -> Result<(), DownloadError> {
        for (place, failure) in failures.into_iter().rev() {
            let end = self.open.remove(place);
            end.sink.abandon().await;
            self.failed.push((end.archive, failure));
        }
        if self.open.is_empty() { Err(DownloadError::NoArchive) } else { Ok(()) }
    }

    async fn expect(&mut self, whole: &Whole) -> Result<(), DownloadError> {
        let open = self.open.iter_mut().enumerate();
        let failures = open.filter_map(|(place, end)| Some((place, end.sink.expect(whole).err()?))).collect();
        self.drop_failed(failures).await
    }

    pub(crate) async fn write(&mut self, bytes: &Bytes) -> Result<(), DownloadError> {
        let mut failures = Vec::new();
        for (place, end) in self.open.iter_mut().enumerate() {
            failures.extend(end.sink.write(bytes.clone()).await.err().map(|failure| (place, failure)));
        }
        self.drop_failed(failures).await
    }

    /// Each begins at zero, but for the one at this place.
    async fn restart(&mut self, but: Option<usize>) -> Result<(), DownloadError> {
        let mut failures = Vec::new();
        for (place, end) in self.open.iter_mut().enumerate().filter(|(place, _)| Some(*place) != but) {
            end.resumable = None;
            failures.extend(end.sink.restart().await.err().map(|failure| (place, failure)));
        }
        self.drop_failed(failures).await
    }

    pub(crate) async fn keep_bad(&mut self) -> Result<(), DownloadError> {
        let mut failures = Vec::new();
        for (place, end) in self.open.iter_mut().enumerate() {
            failures.extend(end.sink.keep_bad().await.err().map(|failure| (place, failure)));
        }
        self.drop_failed(failures).await
    }
}

/// How a start, or one pass of it, ended.
pub(crate) enum Ended {
    /// The image is whole.
    Whole,
    /// What is there is no use any more.
    Changed(&'static str),
    /// Another connection may go on.
    Failed(Box<dyn Error + Send + Sync>),
}

/// How far a start has come, and of what.
pub(crate) struct Reached {
    pub(crate) bytes: u64,
    pub(crate) whole: Whole,
    /// Before the next opening a new address is needed.
    pub(crate) expired: bool,
}

/// Over how many connections it comes.
enum Connections {
    One,
    /// Into this file; what is left, once it is known.
    Several(Arc<PartFile>, Option<Pieces>),
}

impl Download<'_> {
    /// Brings the image into all outputs. With `anew` what they have of it is no use, and neither is the old address.
    pub(crate) async fn fetch(&self, outputs: &mut Outputs, anew: bool) -> Result<Fetched, DownloadError> {
        let mut why = "";
        for start in 0..STARTS {
            let expected = expected_md5(&self.source.facts())?;
            let first = start == 0 && !anew;
            if start > 0 {
                (self.progress)(Progress::StartedOver);
                outputs.restart(None).await?;
            }
            let (mut reached, hash) = if first {
                self.resume(outputs, expected).await?
            } else {
                (Reached::zero(expected), self.hash_from_zero(outputs))
            };
            reached.expired = anew && start == 0;
            let (ended, bytes) = self.receive(&mut reached, outputs, &hash).await?;
            match ended {
                None => {
                    if let Some(part_file) = hash.behind() {
                        // What failed there is told by the archive, which hears of it with what it is given next.
                        let _ = part_file.rest().await;
                        outputs.write(&Bytes::new()).await?;
                    }
                    let (md5, qcow2) = hash.finish(bytes).await?;
                    return Ok(Fetched { bytes, md5, expected, qcow2 });
                }
                Some(changed) => why = changed,
            }
        }
        Err(DownloadError::Unsteady(why))
    }

    /// Takes up what an earlier download left in one of the archives; the others get it from there.
    async fn resume(&self, outputs: &mut Outputs, md5: Md5Sum) -> Result<(Reached, Hash), DownloadError> {
        let left =
            |end: &Output| end.resumable.clone().filter(|left| left.whole.md5 == md5 && left.bytes > 0);
        let all = outputs.open.iter().enumerate();
        let most = all.filter_map(|(place, end)| Some((left(end)?, place, end.sink.part_file()?)));
        let Some((left, place, part_file)) = most.max_by_key(|(left, ..)| left.bytes) else {
            if outputs.open.iter().any(|end| end.resumable.is_some()) {
                outputs.restart(None).await?;
            }
            return Ok((Reached::zero(md5), self.hash_from_zero(outputs)));
        };
        let hash = Hash::new(self.hashers, (outputs.open.len() == 1).then_some(Arc::clone(&part_file)));
        if hash.behind().is_some() {
            // The network needs not wait for it.
            hash.read_back(&part_file, left.bytes).await?;
        } else {
            self.copy(outputs, place, part_file.file(), left.bytes, &hash).await?;
        }
        (self.progress)(Progress::Resumed { bytes: left.bytes });
        Ok((Reached { bytes: left.bytes, whole: left.whole, expired: false }, hash))
    }

    /// Hands what one archive has to the others, and to the hash.
    async fn copy(
        &self,
        outputs: &mut Outputs,
        from: usize,
        file: &Arc<dyn DiskFile>,
        bytes: u64,
        hash: &Hash,
    ) -> Result<(), DownloadError> {
        let name = outputs.open[from].archive.clone();
        outputs.restart(Some(from)).await?;
        let mut at = 0;
        while at < bytes {
            let wanted = usize::try_from(bytes - at).unwrap_or(usize::MAX).min(BATCH_BYTES);
            let theirs = Arc::clone(file);
            let read = blocking(move || {
                let mut buffer = vec![0; wanted];
                let count = theirs.read_at(&mut buffer, at)?;
                buffer.truncate(count);
                if count == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { io::Result::Ok(buffer) }
            });
            let piece = Bytes::from(read.await.map_err(DownloadError::ReadBack)?);
            at += piece.len() as u64;
            hash.take(piece.clone()).await?;
            let mut failures = Vec::new();
            let others = outputs.open.iter_mut().enumerate().filter(|(_, end)| end.archive != name);
            for (place, end) in others {
                failures.extend(end.sink.write(piece.clone()).await.err().map(|failure| (place, failure)));
            }
            outputs.drop_failed(failures).await?;
        }
        Ok(())
    }

    /// Feeds the outputs until the image is whole (`None`), or what came is no use any more (why).
    async fn receive(
        &self,
        reached: &mut Reached,
        outputs: &mut Outputs,
        hash: &Hash,
    ) -> Result<(Option<&'static str>, u64), DownloadError> {
        let mut gathered = Buffers::of(BATCH_BYTES);
        let mut ways = match hash.behind() {
            Some(part_file) if self.connections > 1 => Connections::Several(Arc::clone(part_file), None),
            _ => Connections::One,
        };
        let mut failures = 0;
        loop {
            let before = reached.bytes;
            let source = match self.pass(reached, &mut ways, &mut gathered, outputs, hash).await? {
                Ended::Whole => {
                    flush(&mut gathered, outputs, hash).await?;
                    return Ok((None, reached.bytes));
                }
                Ended::Changed(why) => return Ok((Some(why), reached.bytes)),
                Ended::Failed(source) => source,
            };
            failures = if reached.bytes > before { 0 } else { failures + 1 };
            if failures == TRIES {
                // What came may be resumed one day.
                flush(&mut gathered, outputs, hash).await?;
                let (bytes, total) = (reached.bytes, reached.whole.bytes);
                return Err(DownloadError::GaveUp { bytes, total, source });
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
        reached: &mut Reached,
        ways: &mut Connections,
        gathered: &mut Buffers,
        outputs: &mut Outputs,
        hash: &Hash,
    ) -> Result<Ended, DownloadError> {
        if reached.expired {
            if let Err(error) = self.source.renew().await {
                return judge(error, reached);
            }
            reached.expired = false;
            if expected_md5(&self.source.facts())? != reached.whole.md5 {
                return Ok(Ended::Changed("the MD5 of the image changed with a new export"));
            }
        }
        if reached.bytes > 0 && reached.whole.bytes == Some(reached.bytes) {
            return Ok(Ended::Whole);
        }
        if let Connections::Several(part_file, Some(pieces)) = ways {
            let part_file = Arc::clone(part_file);
            match self.ranges(reached, pieces, &part_file, outputs, hash).await? {
                Some(ended) => return Ok(ended),
                None => *ways = Connections::One,
            }
        }
        let etag = reached.whole.etag.clone().filter(|_| reached.bytes > 0);
        // The first of several tells how long the whole is.
        let several = matches!(ways, Connections::Several(..));
        let until = several.then(|| reached.bytes.saturating_add(PIECE_BYTES));
        let opened = self.source.open(reached.bytes, until, etag.as_deref());
        let mut stream = match timeout(self.clock, self.stall_timeout, opened).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return judge(error, reached),
            Err(stalled) => return Ok(Ended::Failed(Failure::Stalled(stalled.0).into())),
        };
        if reached.bytes == 0 {
            // Nothing came of it yet, so it does not matter what it was.
            (reached.whole.bytes, reached.whole.etag) = (None, None);
        }
        if let Some(why) = changed(reached, &stream) {
            return Ok(Ended::Changed(why));
        }
        // What a server that ignores ranges sends once more is passed over.
        let Some(mut again) = reached.bytes.checked_sub(stream.offset) else {
            return Ok(Ended::Failed(Failure::WrongOffset.into()));
        };
        let whole = &mut reached.whole;
        whole.bytes = whole.bytes.or(stream.total);
        whole.etag = whole.etag.take().or_else(|| stream.etag.take());
        outputs.expect(whole).await?;

        let end = match (reached.whole.bytes, until) {
            (Some(total), Some(until)) if stream.is_part => Some(total.min(until)),
            (total, _) => total,
        };
        while end != Some(reached.bytes) {
            let mut chunk = match timeout(self.clock, self.stall_timeout, stream.body.next()).await {
                Ok(Some(Ok(chunk))) => chunk,
                Ok(Some(Err(error))) => return Ok(Ended::Failed(error.into())),
                Ok(None) if reached.whole.bytes.is_none() && again == 0 => return Ok(Ended::Whole),
                Ok(None) => return Ok(Ended::Failed(Failure::Short.into())),
                Err(stalled) => return Ok(Ended::Failed(Failure::Stalled(stalled.0).into())),
            };
            if let Some(throttle) = self.throttle {
                throttle.take(self.clock, chunk.len() as u64).await;
            }
            let passed_over = chunk.len().min(usize::try_from(again).unwrap_or(usize::MAX));
            let _ = chunk.split_to(passed_over);
            again -= passed_over as u64;
            if let Some(failure) = no_image(reached.bytes, &chunk) {
                // Nothing of it is kept.
                return Ok(if reached.bytes == 0 {
                    Ended::Failed(failure.into())
                } else {
                    Ended::Changed(NO_IMAGE)
                });
            }
            reached.bytes += chunk.len() as u64;
            if end.is_some_and(|end| reached.bytes > end) {
                return Ok(Ended::Changed("the server sends more bytes than it promised"));
            }
            while gathered.fill(&mut chunk) {
                flush(gathered, outputs, hash).await?;
                self.tell(reached.bytes, reached.whole.bytes);
            }
        }
        self.tell(reached.bytes, reached.whole.bytes);
        match (&mut *ways, reached.whole.bytes) {
            (Connections::Several(part_file, pieces), Some(total)) if reached.bytes < total => {
                flush(gathered, outputs, hash).await?;
                let part_file = Arc::clone(part_file);
                let left = Pieces::of(reached.bytes..total, self.connections);
                let ended = self.ranges(reached, pieces.insert(left), &part_file, outputs, hash).await?;
                Ok(ended.unwrap_or_else(|| {
                    *ways = Connections::One;
                    Ended::Failed(Failure::NoRanges.into())
                }))
            }
            _ => Ok(Ended::Whole),
        }
    }

    /// What begins at zero is hashed as it comes, unless it comes to several places at once.
    fn hash_from_zero(&self, outputs: &Outputs) -> Hash {
        let part_file = match &outputs.open[..] {
            [end] if self.connections > 1 => end.sink.part_file(),
            _ => None,
        };
        Hash::new(self.hashers, part_file)
    }

    pub(crate) fn tell(&self, bytes: u64, total: Option<u64>) {
        (self.progress)(Progress::Downloading { bytes, total });
    }
}

impl Reached {
    fn zero(md5: Md5Sum) -> Self {
        Self { bytes: 0, whole: Whole { md5, bytes: None, etag: None }, expired: false }
    }
}

/// A page of a proxy, an error of a store, another kind of image: known by its first bytes, before anything is kept of it.
fn no_image(at: u64, chunk: &[u8]) -> Option<Failure> {
    let expected = usize::try_from(at).ok().and_then(|at| MAGIC.get(at..)).unwrap_or_default();
    let count = expected.len().min(chunk.len());
    let text = || excerpt(&String::from_utf8_lossy(&chunk[..chunk.len().min(40)]), 40);
    (chunk[..count] != expected[..count]).then(|| Failure::NoImage(text()))
}

/// Why what came so far does not go with what this connection offers.
pub(crate) fn changed(reached: &Reached, stream: &ImageStream) -> Option<&'static str> {
    let (etag, total) = (&reached.whole.etag, reached.whole.bytes);
    let other_etag = etag.is_some() && stream.etag.is_some() && *etag != stream.etag;
    let other_total = total.is_some() && stream.total.is_some() && total != stream.total;
    if other_etag {
        Some("the ETag of the image changed on the way")
    } else if other_total || stream.total.is_some_and(|total| total < reached.bytes) {
        Some("the length of the image changed on the way")
    } else {
        None
    }
}

/// What is done about a source that did not open.
pub(crate) fn judge(error: SourceError, reached: &mut Reached) -> Result<Ended, DownloadError> {
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

/// Hands on what there is, as soon as there is room.
async fn flush(gathered: &mut Buffers, outputs: &mut Outputs, hash: &Hash) -> Result<(), DownloadError> {
    let batch = gathered.take();
    // The hash first: it is what everything else waits for in the end.
    hash.take(batch.clone()).await?;
    outputs.write(&batch).await
}
