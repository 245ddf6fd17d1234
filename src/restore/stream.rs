//! A restored image to a stream, such as stdout, which can't be taken back.
//!
//! The MD5 is known with the last byte. So the end of the image is held back until it is right: what reads the stream gets a
//! whole and verified image, or one that ends too early, and an exit status that says so.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::archive::manifest::Manifest;
use crate::archive::transfer::sink::{Sink, SinkError};
use crate::disk::blocking;

/// Bytes that are held back. A reader that checks nothing else misses a piece of this size: in an image as the platform exports
/// them that is data or tables.
const HELD_BACK: usize = 1 << 20;

/// A stream that takes one image. Clones are the same stream.
#[derive(Clone)]
pub struct Stream {
    out: Arc<Mutex<dyn Write + Send>>,
    written: Arc<AtomicU64>,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("written", &self.written()).finish_non_exhaustive()
    }
}

impl Stream {
    /// Into `out`.
    pub fn new(out: impl Write + Send + 'static) -> Self {
        Self { out: Arc::new(Mutex::new(out)), written: Arc::default() }
    }

    /// The bytes that can't be taken back any more.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    pub(super) fn sink(&self) -> Box<dyn Sink> {
        Box::new(StreamSink { stream: self.clone(), held: VecDeque::new(), held_bytes: 0 })
    }
}

fn failed(source: io::Error) -> SinkError {
    SinkError::Disk { doing: "write", path: Path::new("the standard output").to_owned(), source }
}

struct StreamSink {
    stream: Stream,
    held: VecDeque<Bytes>,
    held_bytes: usize,
}

impl StreamSink {
    /// Writes all but the last `keep` bytes.
    async fn write_beyond(&mut self, keep: usize) -> Result<(), SinkError> {
        let mut due = Vec::new();
        while self.held_bytes > keep {
            let Some(mut first) = self.held.pop_front() else { break };
            let rest = first.split_off(first.len().min(self.held_bytes - keep));
            self.held_bytes -= first.len();
            due.push(first);
            if !rest.is_empty() {
                self.held.push_front(rest);
            }
        }
        if due.is_empty() {
            return Ok(());
        }
        let Stream { out, written } = self.stream.clone();
        let write = move || {
            let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
            due.iter().try_for_each(|bytes| {
                // Counted first: of a write that failed, some may have been written.
                written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                out.write_all(bytes)
            })?;
            out.flush()
        };
        blocking(write).await.map_err(failed)
    }
}

impl Sink for StreamSink {
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), SinkError>> {
        self.held_bytes += bytes.len();
        self.held.push_back(bytes);
        Box::pin(self.write_beyond(HELD_BACK))
    }

    fn restart(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        self.held.clear();
        self.held_bytes = 0;
        let restarted = match self.stream.written() {
            0 => Ok(()),
            _ => Err(failed(io::Error::other(
                "the image starts over, and what was written cannot be taken back",
            ))),
        };
        Box::pin(std::future::ready(restarted))
    }

    fn publish(mut self: Box<Self>, manifest: Manifest) -> BoxFuture<'static, Result<Manifest, SinkError>> {
        Box::pin(async move {
            self.write_beyond(0).await?;
            Ok(manifest)
        })
    }

    fn abandon(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::copy_reader::CopyReader;
    use crate::archive::testing::{FakeSource, Fault, NoRandomness, Offer, TestClock, image, manifest_of};
    use crate::archive::transfer::hash::Hashers;
    use crate::restore::copy::{Destination, copy_image};
    use crate::restore::error::RestoreError;

    #[derive(Clone, Default)]
    struct Out(Arc<Mutex<Vec<u8>>>);

    impl Write for Out {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    async fn copied(bytes: &[u8], source: &FakeSource) -> (Result<(), RestoreError>, Vec<u8>, u64) {
        let (out, clock) = (Out::default(), TestClock::at("2026-11-01T12:00:00Z"));
        let stream = Stream::new(out.clone());
        let hashers = Hashers::default();
        let reader = CopyReader::new(&clock, &NoRandomness, &hashers);
        let destination = Destination::Stream(&stream);
        let done =
            copy_image(&"vault".parse().unwrap(), source, &manifest_of(bytes), reader, destination).await;
        let written = out.0.lock().unwrap().clone();
        (done, written, stream.written())
    }

    #[tokio::test(start_paused = true)]
    async fn a_good_image_is_written_whole_also_over_a_broken_connection() {
        let bytes = image(3_500_000, 1);
        for faults in [vec![], vec![Fault::Cut(2_000_000)]] {
            let (done, written, count) = copied(&bytes, &FakeSource::new(Offer::of(&bytes), faults)).await;
            done.unwrap();
            assert!(written == bytes && count == bytes.len() as u64);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_damaged_image_ends_too_early() {
        let bytes = image(3_500_000, 1);
        let mut damaged = bytes.clone();
        let last = damaged.len() - 1;
        damaged[last] ^= 1;
        let mut offer = Offer::of(&damaged);
        offer.md5 = Offer::of(&bytes).md5;
        let (done, written, count) = copied(&bytes, &FakeSource::new(offer, [])).await;
        assert!(matches!(done, Err(RestoreError::Copy(_))), "{done:?}");
        assert_eq!((written.len(), count), (bytes.len() - HELD_BACK, written.len() as u64));
        // Of a small one nothing is written at all.
        let bytes = image(300_000, 1);
        let mut offer = Offer::of(&image(300_000, 2));
        offer.md5 = Offer::of(&bytes).md5;
        let (done, written, count) = copied(&bytes, &FakeSource::new(offer, [])).await;
        assert!(done.is_err() && written.is_empty() && count == 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_is_gone_is_an_error() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let bytes = image(3_500_000, 1);
        let (clock, hashers, stream) =
            (TestClock::at("2026-11-01T12:00:00Z"), Hashers::default(), Stream::new(Closed));
        let source = FakeSource::new(Offer::of(&bytes), []);
        let reader = CopyReader::new(&clock, &NoRandomness, &hashers);
        let destination = Destination::Stream(&stream);
        let archive = "vault".parse().unwrap();
        let done = copy_image(&archive, &source, &manifest_of(&bytes), reader, destination).await;
        let error = crate::text::chain(&done.unwrap_err());
        assert!(error.starts_with("write the standard output: broken pipe"), "{error}");
    }
}
