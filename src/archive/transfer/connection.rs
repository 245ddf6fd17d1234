//! One connection of a download: it is opened, read with a time limit, and kept below the rate.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;

use crate::archive::md5::Md5Sum;
use crate::archive::transfer::buffer::FLUSH_INTERVAL;
use crate::archive::transfer::error::{DownloadError, Interruption};
use crate::archive::transfer::hash::Hashers;
use crate::archive::transfer::progress::Progress;
use crate::archive::transfer::sink::Received;
use crate::archive::transfer::source::{ImageSource, ImageStream};
use crate::archive::transfer::throttle::Throttle;
use crate::clock::{Clock, timeout};
use crate::randomness::Randomness;
use crate::text::excerpt;

/// All that a download needs, except for the archives that it feeds.
#[derive(Clone, Copy)]
pub struct Download<'a> {
    /// Where the bytes come from.
    pub source: &'a dyn ImageSource,
    /// For stalls and for the pauses between attempts.
    pub clock: &'a dyn Clock,
    /// For the jitter of the pauses.
    pub randomness: &'a dyn Randomness,
    /// A connection that sends no byte for this long is replaced.
    pub stall_timeout: Duration,
    /// Connections at once. One, unless the server supports ranges and a single archive, a local one, is fed.
    pub connections: usize,
    /// They hash the image.
    pub hashers: &'a Hashers,
    /// Keeps it below a rate, together with all others that share it.
    pub throttle: Option<&'a Throttle>,
    /// Called for each event.
    pub progress: &'a (dyn Fn(Progress) + Send + Sync),
}

impl Download<'_> {
    /// The MD5 that the service gives now.
    pub(crate) fn expected_md5(&self) -> Result<Md5Sum, DownloadError> {
        match self.source.md5().as_deref().map(str::trim) {
            None | Some("") => Err(DownloadError::NoMd5),
            Some(text) => text.parse().map_err(|_| DownloadError::BadMd5(excerpt(text, 64))),
        }
    }

    /// Opens a connection for the bytes from `offset` on, of the image of which some bytes were received.
    pub(crate) async fn open(
        &self,
        offset: u64,
        until: Option<u64>,
        received: &Received,
    ) -> Result<ImageStream, Interruption> {
        let etag = received.image.etag.as_deref().filter(|_| offset > 0);
        let opened = timeout(self.clock, self.stall_timeout, self.source.open(offset, until, etag)).await;
        let stream = opened.map_err(Interruption::stalled)??;
        // Before the first byte it does not matter which version an earlier connection offered.
        if received.bytes > 0 {
            check_unchanged(received, &stream)?;
        }
        Ok(stream)
    }

    /// The next bytes of a connection; none at its end.
    pub(crate) async fn next_chunk(&self, stream: &mut ImageStream) -> Result<Option<Bytes>, Interruption> {
        let next = timeout(self.clock, self.stall_timeout, stream.body.next()).await;
        let Some(chunk) = next.map_err(Interruption::stalled)? else { return Ok(None) };
        let chunk = chunk.map_err(Interruption::broken)?;
        if let Some(throttle) = self.throttle {
            throttle.take(self.clock, chunk.len() as u64).await;
        }
        Ok(Some(chunk))
    }

    /// Whether gathered bytes have waited long enough since then, by the clock's elapsed time.
    pub(crate) fn is_flush_due(&self, since: Duration) -> bool {
        self.clock.elapsed().saturating_sub(since) >= FLUSH_INTERVAL
    }

    pub(crate) fn report(&self, bytes: u64, total: Option<u64>) {
        (self.progress)(Progress::Downloading { bytes, total });
    }
}

/// Whether a connection may offer the image of which some bytes were received. Another `ETag` alone means nothing: a new
/// export of the same bytes has one too, and the MD5 judges in the end.
fn check_unchanged(received: &Received, stream: &ImageStream) -> Result<(), Interruption> {
    let total = received.image.bytes;
    let other_total = total.is_some() && stream.total.is_some() && total != stream.total;
    if other_total || stream.total.is_some_and(|total| total < received.bytes) {
        Err(Interruption::Changed("the length of the image changed during the download"))
    } else {
        Ok(())
    }
}
