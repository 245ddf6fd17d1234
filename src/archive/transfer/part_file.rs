//! A file that an image grows in, from several places at once if need be, and that is read behind them.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::archive::transfer::queue::{Queue, Worker};
use crate::disk::DiskFile;

/// Bytes that may wait for the disk: enough to ride out a slow write, little enough to keep memory flat.
const QUEUE_BYTES: u32 = 6 << 20;

/// The file of an image that is received. Its **frontier** is where the first gap begins.
pub struct PartFile {
    file: Arc<dyn DiskFile>,
    written: Arc<Mutex<Written>>,
    writer: Queue<Writer>,
}

struct Writer {
    file: Arc<dyn DiskFile>,
    written: Arc<Mutex<Written>>,
}

impl Worker for Writer {
    type Item = (u64, Bytes);

    fn work(&mut self, (offset, bytes): Self::Item) -> io::Result<()> {
        self.file.write_all_at(&bytes, offset)?;
        lock(&self.written).add(offset, bytes.len() as u64);
        Ok(())
    }
}

/// The places that are written, and how far the page cache can be released.
#[derive(Debug, Default)]
struct Written {
    frontier: u64,
    /// Written places beyond the frontier, their ends by their beginnings; they neither touch nor overlap.
    beyond: BTreeMap<u64, u64>,
    /// Synced up to here.
    synced: u64,
    /// Hashed up to here, if the hash reads this file.
    hashed: Option<u64>,
    released: u64,
}

impl Written {
    fn add(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        if offset > self.frontier {
            let last = self.beyond.entry(offset).or_insert(end);
            *last = end.max(*last);
            return;
        }
        self.frontier = self.frontier.max(end);
        while let Some(next) = self.beyond.first_entry().filter(|next| *next.key() <= self.frontier) {
            self.frontier = self.frontier.max(next.remove());
        }
    }

    /// The bytes that are no longer needed in the page cache: they are synced, and hashed or never read.
    fn release(&mut self) -> Range<u64> {
        let upto = self.synced.min(self.hashed.unwrap_or(u64::MAX)).max(self.released);
        std::mem::replace(&mut self.released, upto)..upto
    }
}

fn lock(written: &Mutex<Written>) -> MutexGuard<'_, Written> {
    written.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PartFile {
    /// `bytes` are in the file already.
    pub(crate) fn new(file: Arc<dyn DiskFile>, bytes: u64) -> Self {
        let written = Arc::new(Mutex::new(Written { frontier: bytes, ..Written::default() }));
        let writer = Writer { file: Arc::clone(&file), written: Arc::clone(&written) };
        Self { file, written, writer: Queue::new(writer, QUEUE_BYTES) }
    }

    /// Queues a write; waits while the queue is full.
    ///
    /// # Errors
    /// An earlier write failed.
    pub(crate) async fn write_at(&self, offset: u64, bytes: Bytes) -> io::Result<()> {
        let len = bytes.len();
        self.writer.push((offset, bytes), len).await
    }

    /// Waits until all is written.
    ///
    /// # Errors
    /// A write failed.
    pub(crate) async fn wait_idle(&self) -> io::Result<()> {
        self.writer.wait_idle().await
    }

    /// The hash reads this file: what it has not read yet stays in the page cache.
    pub(crate) fn expect_hash(&self) {
        lock(&self.written).hashed.get_or_insert(0);
    }

    /// The hash has read up to here.
    pub(crate) fn set_hashed(&self, upto: u64) {
        lock(&self.written).hashed = Some(upto);
        self.release();
    }

    /// It is synced up to here.
    pub(crate) fn set_synced(&self, upto: u64) {
        lock(&self.written).synced = upto;
        self.release();
    }

    fn release(&self) {
        let bytes = lock(&self.written).release();
        self.file.release(bytes);
    }

    /// Waits until all is written, and forgets the places behind the first gap: they are to be written again, in order.
    /// Returns how far it is written without a gap.
    pub(crate) async fn forget_beyond(&self) -> u64 {
        // Should a write have failed, the archive reports it when it is next called.
        let _ = self.wait_idle().await;
        let mut written = lock(&self.written);
        written.beyond.clear();
        written.frontier
    }

    /// How far it is written without a gap.
    pub(crate) fn frontier(&self) -> u64 {
        lock(&self.written).frontier
    }

    /// The file itself.
    pub(crate) fn file(&self) -> &Arc<dyn DiskFile> {
        &self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_synced_and_hashed_leaves_the_page_cache_once() {
        let mut written = Written { synced: 8, ..Written::default() };
        assert_eq!((written.release(), written.release()), (0..8, 8..8));
        let mut written = Written { hashed: Some(0), ..Written::default() };
        let steps = [(8, 0, 0..0), (8, 4, 0..4), (8, 12, 4..8), (16, 12, 8..12), (16, 12, 12..12)];
        for (synced, hashed, expected) in steps {
            (written.synced, written.hashed) = (synced, Some(hashed));
            assert_eq!(written.release(), expected);
        }
    }

    proptest! {
        #[test]
        fn the_frontier_is_where_the_first_gap_begins(order in Just((0..24_u64).collect::<Vec<_>>()).prop_shuffle()) {
            let mut written = Written::default();
            let mut done = std::collections::BTreeSet::new();
            for piece in order {
                written.add(piece * 10, 10);
                done.insert(piece);
                let expected = (0..24).find(|piece| !done.contains(piece)).unwrap_or(24) * 10;
                prop_assert_eq!(written.frontier, expected);
            }
            prop_assert!(written.beyond.is_empty());
        }
    }
}
