//! Downloads an image: network, hash and archives work side by side, and memory stays flat.
//!
//! The network's chunks are gathered into buffers of 1 MiB. Each buffer is handed to the hash and to every archive, which work
//! through them beside the network. Their queues are bounded, so a slow disk slows the network down and nothing piles up.
//! No task blocks for longer than the item at hand, so waiting for the network is always waiting on the clock.
//!
//! When a connection breaks, the next one continues where it broke; an image that changed starts over. What an earlier
//! download left in an archive is not fetched again: it is read back and hashed while the rest is received. Whether the
//! bytes are right is decided by their MD5, which the caller compares.

use std::io;
use std::sync::Arc;

use bytes::{Buf as _, Bytes};
use futures_util::future::join;

use crate::archive::md5::Md5Sum;
use crate::archive::qcow2::{HEADER_BYTES, MAGIC, Qcow2, Qcow2Error, check_header};
use crate::archive::transfer::buffer::{BUFFER_BYTES, Buffers};
use crate::archive::transfer::connection::Download;
use crate::archive::transfer::error::{DownloadError, Interruption, NOT_AN_IMAGE, STARTS};
use crate::archive::transfer::hash::Hash;
use crate::archive::transfer::outputs::Outputs;
use crate::archive::transfer::parts::PartHasher;
use crate::archive::transfer::progress::Progress;
use crate::archive::transfer::ranges::{PIECE_BYTES, Pieces};
use crate::archive::transfer::sink::{ImageVersion, Output, Received};
use crate::archive::transfer::source::SourceError;
use crate::disk::{DiskFile, blocking};
use crate::policy::name::ArchiveName;
use crate::retry::{Attempts, REQUESTS, RetryPolicy};
use crate::text::excerpt;
use crate::transport::{Reached, TransportError, piped};

/// Pauses of 2, 8, 32 and 60 s before jitter: together they outlast a minute or so without a network, which would
/// otherwise cost a large image.
const CONNECTIONS: RetryPolicy = RetryPolicy { growth: 4, ..REQUESTS };

/// An image that was received.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) bytes: u64,
    /// The MD5 of the received bytes.
    pub(crate) md5: Md5Sum,
    /// The MD5 that the service gave.
    pub(crate) expected: Md5Sum,
    /// The structure of the image.
    pub(crate) qcow2: Result<Qcow2, Qcow2Error>,
}

/// One start of a download: it receives one version of the image, over as many connections as it takes.
struct Start {
    received: Received,
    /// The next connection needs a new address.
    expired: bool,
    /// Several connections may be used.
    parallel: bool,
    /// What several connections have still to receive; known once the length is.
    pieces: Option<Pieces>,
    buffers: Buffers,
    hash: Hash,
    /// The first bytes of the image, where this start receives it from the first on.
    header: Vec<u8>,
}

impl Start {
    /// Refuses an image by its header, so that the rest is not received.
    fn check_header(&mut self, chunk: &[u8]) -> Result<(), DownloadError> {
        let missing = HEADER_BYTES - self.header.len();
        if missing > 0 && self.header.len() as u64 == self.received.bytes {
            self.header.extend(chunk.iter().take(missing));
            if self.header.len() == HEADER_BYTES {
                check_header(&self.header).map_err(DownloadError::Invalid)?;
            }
        }
        Ok(())
    }

    /// Gathers as much of `chunk` as fits; true if the buffer is full. What did not fit is not received: should the connection
    /// be given up first, the next one brings it.
    fn fill(&mut self, chunk: &mut Bytes) -> bool {
        let before = chunk.len();
        let is_full = self.buffers.fill(chunk);
        self.received.bytes += (before - chunk.len()) as u64;
        is_full
    }

    /// Hands on the gathered bytes, as soon as they fit into the queues.
    async fn flush(&mut self, outputs: &mut Outputs) -> Result<(), DownloadError> {
        let bytes = self.buffers.take();
        // The hash first: in the end everything else waits for it.
        self.hash.take(bytes.clone()).await?;
        outputs.write(&bytes).await
    }
}

impl Download<'_> {
    /// Downloads the image into all outputs. With `restart` what they have of it is useless, and so is the old address.
    pub(crate) async fn fetch(&self, outputs: &mut Outputs, restart: bool) -> Result<Fetched, DownloadError> {
        let mut reason = "";
        for number in 0..STARTS {
            let expected = self.expected_md5()?;
            if number > 0 {
                (self.progress)(Progress::StartedOver);
                outputs.restart(None).await?;
            }
            let mut start = if number == 0 && !restart {
                self.resume(outputs, expected).await?
            } else {
                self.start(outputs, expected)
            };
            start.expired = number == 0 && restart;
            match self.receive(&mut start, outputs).await {
                Ok(None) => {}
                Ok(Some(changed)) => {
                    reason = changed;
                    continue;
                }
                // Once more: the header may have been damaged on its way, and no MD5 can show that yet.
                Err(DownloadError::Invalid(_)) if number == 0 => continue,
                Err(error) => return Err(error),
            }
            if let Some(part_file) = start.hash.part_file() {
                // Should a write have failed, the archive reports it when it is next called.
                let _ = part_file.wait_idle().await;
                outputs.write(&Bytes::new()).await?;
            }
            let bytes = start.received.bytes;
            let (md5, qcow2) = start.hash.finish(bytes).await?;
            return Ok(Fetched { bytes, md5, expected, qcow2 });
        }
        Err(DownloadError::Unsteady(reason))
    }

    /// Starts at zero. Bytes that arrive at several places at once are hashed from the file, the others as they arrive.
    fn start(&self, outputs: &Outputs, md5: Md5Sum) -> Start {
        let part_file = match &outputs.open[..] {
            [output] if self.connections > 1 => output.sink.part_file(),
            _ => None,
        };
        let image = ImageVersion { md5, bytes: None, etag: None };
        self.start_at(Received { bytes: 0, image }, Hash::new(self.hashers, part_file))
    }

    fn start_at(&self, received: Received, hash: Hash) -> Start {
        let parallel = self.connections > 1 && hash.part_file().is_some();
        Start {
            received,
            expired: false,
            parallel,
            pieces: None,
            buffers: Buffers::new(BUFFER_BYTES),
            hash,
            header: Vec::new(),
        }
    }

    /// Starts with the longest part that an earlier download left in an archive; the other archives get a copy of it.
    async fn resume(&self, outputs: &mut Outputs, md5: Md5Sum) -> Result<Start, DownloadError> {
        let left = |output: &Output| {
            let received = output.resumable.clone().filter(|received| received.image.md5 == md5)?;
            Some((received, output.archive.clone(), output.sink.part_file()?))
        };
        let longest = outputs.open.iter().filter_map(left).max_by_key(|(received, ..)| received.bytes);
        let Some((received, archive, part_file)) = longest else {
            if outputs.open.iter().any(|output| output.resumable.is_some()) {
                outputs.restart(None).await?;
            }
            return Ok(self.start(outputs, md5));
        };
        let hash = if outputs.open.len() == 1 {
            // It is read back beside the network.
            let hash = Hash::new(self.hashers, Some(Arc::clone(&part_file)));
            hash.read_back(received.bytes).await?;
            hash
        } else {
            let hash = Hash::new(self.hashers, None);
            outputs.restart(Some(&archive)).await?;
            outputs.expect(&received.image).await?;
            hash_parts(&hash, received.image.bytes, outputs).await?;
            self.copy(outputs, &archive, part_file.file(), received.bytes, &hash).await?;
            hash
        };
        (self.progress)(Progress::Resumed { bytes: received.bytes });
        Ok(self.start_at(received, hash))
    }

    /// Hands the bytes that one archive has to the other archives, and to the hash.
    async fn copy(
        &self,
        outputs: &mut Outputs,
        from: &ArchiveName,
        file: &Arc<dyn DiskFile>,
        bytes: u64,
        hash: &Hash,
    ) -> Result<(), DownloadError> {
        let mut at = 0;
        while at < bytes {
            let wanted = usize::try_from(bytes - at).unwrap_or(usize::MAX).min(BUFFER_BYTES);
            let file = Arc::clone(file);
            let read = blocking(move || {
                let mut buffer = vec![0; wanted];
                let count = file.read_at(&mut buffer, at)?;
                buffer.truncate(count);
                if count == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { io::Result::Ok(buffer) }
            });
            let piece = Bytes::from(read.await.map_err(DownloadError::ReadBack)?);
            at += piece.len() as u64;
            hash.take(piece.clone()).await?;
            outputs.copy(&piece, from).await?;
        }
        Ok(())
    }

    /// Receives until the image is complete, or has changed: then with the reason.
    async fn receive(
        &self,
        start: &mut Start,
        outputs: &mut Outputs,
    ) -> Result<Option<&'static str>, DownloadError> {
        let mut attempts = Attempts::new(CONNECTIONS);
        loop {
            let before = start.received.bytes;
            let source = match self.connect_until_stored(start, outputs).await {
                Ok(()) => return Ok(None),
                Err(Interruption::Changed(reason)) => return Ok(Some(reason)),
                Err(Interruption::Fatal(error)) => return Err(error),
                Err(Interruption::Refused(source)) => {
                    return Err(DownloadError::Refused { bytes: start.received.bytes, source });
                }
                Err(Interruption::RangesIgnored) => {
                    (start.parallel, start.pieces) = (false, None);
                    continue;
                }
                Err(Interruption::Expired) => {
                    start.expired = true;
                    SourceError::Expired.into()
                }
                Err(Interruption::Broken(source)) => source,
            };
            if start.received.bytes > before {
                attempts.reset();
            } else {
                attempts.count_failure();
            }
            if attempts.are_exhausted() {
                // A later download may resume what is there.
                start.flush(outputs).await?;
                let Received { bytes, image } = &start.received;
                return Err(DownloadError::GaveUp { bytes: *bytes, total: image.bytes, source });
            }
            // The first time a new address is asked for at once: the old one just reached its age.
            if attempts.failed() > 1 || !start.expired {
                self.clock.sleep(attempts.pause(None, self.randomness)).await;
            }
            (self.progress)(Progress::Resumed { bytes: start.received.bytes });
        }
    }

    /// Receives the rest, and waits until the archives have all of it.
    async fn connect_until_stored(
        &self,
        start: &mut Start,
        outputs: &mut Outputs,
    ) -> Result<(), Interruption> {
        self.connect(start, outputs).await?;
        loop {
            self.flush(start, outputs).await?;
            outputs.wait_until_stored().await?;
            if outputs.missing().is_none() {
                return Ok(());
            }
        }
    }

    /// Hands on the gathered bytes, and once more those that an archive could not store.
    async fn flush(&self, start: &mut Start, outputs: &mut Outputs) -> Result<(), Interruption> {
        start.flush(outputs).await?;
        while let Some((index, range)) = outputs.missing() {
            let mut stream = self.open(range.start, Some(range.end), &start.received).await?;
            let mut skip = range.start.checked_sub(stream.offset).ok_or_else(begins_behind)?;
            let mut left = range.end - range.start;
            let (bytes, body) = piped();
            let feed = async move {
                while left > 0 {
                    let mut chunk = match self.next_chunk(&mut stream).await {
                        Ok(Some(chunk)) => chunk,
                        ended => {
                            let why = "the image can't be read again at the moment";
                            // Where nothing waits for it any more, there is a reason, too.
                            let _ = bytes.send(Err(TransportError::new(Reached::Unknown, why))).await;
                            return Err(ended.err().unwrap_or_else(Interruption::short));
                        }
                    };
                    drop_skipped(&mut chunk, &mut skip);
                    chunk.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                    left -= chunk.len() as u64;
                    if !chunk.is_empty() && bytes.send(Ok(chunk)).await.is_err() {
                        break;
                    }
                }
                Ok(())
            };
            let (refilled, read) = join(outputs.write_missing(index, body), feed).await;
            refilled?;
            read?;
        }
        Ok(())
    }

    /// One connection, or several at once, from where the last one ended to the end of the image.
    async fn connect(&self, start: &mut Start, outputs: &mut Outputs) -> Result<(), Interruption> {
        if start.expired {
            self.source.renew().await?;
            start.expired = false;
            if self.expected_md5()? != start.received.image.md5 {
                return Err(Interruption::Changed("the MD5 of the image changed with a new export"));
            }
        }
        let received = &mut start.received;
        if received.bytes > 0 && received.image.bytes == Some(received.bytes) {
            return Ok(());
        }
        if let Some(pieces) = &mut start.pieces {
            return self.receive_pieces(received, pieces, &start.hash, outputs).await;
        }
        // The first of several connections receives one piece, and learns the length of the image.
        let until = start.parallel.then(|| received.bytes.saturating_add(PIECE_BYTES));
        let mut stream = self.open(received.bytes, until, received).await?;
        // A server that ignores ranges begins at zero: the bytes that are there are skipped.
        let mut skip = received.bytes.checked_sub(stream.offset).ok_or_else(begins_behind)?;
        let image = &mut received.image;
        if received.bytes == 0 {
            (image.bytes, image.etag) = (stream.total, stream.etag.take());
        } else {
            image.bytes = image.bytes.or(stream.total);
            image.etag = image.etag.take().or_else(|| stream.etag.take());
        }
        let total = image.bytes;
        outputs.expect(image).await?;
        if received.bytes == 0 {
            hash_parts(&start.hash, total, outputs).await?;
        }

        let end = match (total, until) {
            (Some(total), Some(until)) if stream.is_part => Some(total.min(until)),
            _ => total,
        };
        let mut flushed_at = self.clock.elapsed();
        while end != Some(start.received.bytes) {
            let Some(mut chunk) = self.next_chunk(&mut stream).await? else {
                return match (total, until) {
                    // Several connections need to know the length.
                    (None, Some(_)) if stream.is_part => Err(Interruption::RangesIgnored),
                    (None, _) if skip == 0 => Ok(()),
                    _ => Err(Interruption::short()),
                };
            };
            drop_skipped(&mut chunk, &mut skip);
            if !self.source.is_image(total) {
                check_magic(start.received.bytes, &chunk)?;
            }
            if self.source.is_export() {
                start.check_header(&chunk)?;
            }
            if let Some(end) = end.filter(|_| stream.is_part && until.is_some()) {
                // A server may send more than was asked for; that belongs to the next request.
                let wanted = end.saturating_sub(start.received.bytes);
                chunk.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
            }
            if end.is_some_and(|end| start.received.bytes + chunk.len() as u64 > end) {
                return Err(Interruption::Changed("the server sends more bytes than it promised"));
            }
            while start.fill(&mut chunk) {
                self.flush(start, outputs).await?;
                self.report(start.received.bytes, total);
            }
            if self.is_flush_due(flushed_at) {
                self.flush(start, outputs).await?;
                flushed_at = self.clock.elapsed();
            }
        }
        self.report(start.received.bytes, total);
        match total {
            Some(total) if start.parallel && start.received.bytes < total => {
                start.flush(outputs).await?;
                let left = Pieces::new(start.received.bytes..total, self.connections);
                let pieces = start.pieces.insert(left);
                self.receive_pieces(&mut start.received, pieces, &start.hash, outputs).await
            }
            _ => Ok(()),
        }
    }
}

/// Has the parts of an image hashed too, where an archive has a use for their MD5s. Nothing of it was hashed yet.
async fn hash_parts(hash: &Hash, whole: Option<u64>, outputs: &mut Outputs) -> Result<(), DownloadError> {
    let (parts, sums) = PartHasher::new(whole);
    if outputs.take_part_sums(&sums) { hash.add_parts(parts).await } else { Ok(()) }
}

fn begins_behind() -> Interruption {
    Interruption::broken("the server's response begins behind the requested byte")
}

/// Drops the bytes of a chunk that are still to be skipped.
fn drop_skipped(chunk: &mut Bytes, skip: &mut u64) {
    let skipped = chunk.len().min(usize::try_from(*skip).unwrap_or(usize::MAX));
    chunk.advance(skipped);
    *skip -= skipped as u64;
}

/// Whether the response begins as a qcow2 image does. A page of a proxy, an error of a store, or another kind of image is
/// known by its first bytes, before anything of it is kept.
fn check_magic(at: u64, chunk: &[u8]) -> Result<(), Interruption> {
    let expected = usize::try_from(at).ok().and_then(|at| MAGIC.get(at..)).unwrap_or_default();
    let count = expected.len().min(chunk.len());
    if chunk[..count] == expected[..count] {
        Ok(())
    } else if at == 0 {
        let text = String::from_utf8_lossy(&chunk[..chunk.len().min(40)]);
        Err(Interruption::broken(format!("{NOT_AN_IMAGE}: it begins with {:?}", excerpt(&text, 40))))
    } else {
        // Some of it was kept already.
        Err(Interruption::Changed(NOT_AN_IMAGE))
    }
}
