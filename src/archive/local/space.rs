//! The free space of an archive, shared by the images that this process stores in it at the same time.
//!
//! Each looks once how much is free, and has to leave what the others are still going to write.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What all images of an archive have written, and what they will.
#[derive(Debug, Default)]
pub(super) struct Space(Mutex<Ledger>);

#[derive(Debug, Default)]
struct Ledger {
    /// Bytes that were ever written.
    written: u64,
    /// By share, the bytes that are still to be written.
    outstanding: BTreeMap<u64, u64>,
    next: u64,
}

/// One image's share. Dropping it gives back what was not written.
#[derive(Debug)]
pub(super) struct Share {
    space: Arc<Space>,
    key: u64,
    /// As found when this began.
    free: u64,
    /// What all had written by then.
    written_before: u64,
    written: u64,
}

impl Space {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// The share of an image that begins now, of the bytes that are free.
    pub(super) fn new(space: &Arc<Space>, free: u64) -> Self {
        let mut ledger = space.ledger();
        let (key, written_before) = (ledger.next, ledger.written);
        ledger.next += 1;
        drop(ledger);
        Self { space: Arc::clone(space), key, free, written_before, written: 0 }
    }

    /// The share of the same image, which starts over: what it wrote was removed.
    pub(super) fn again(&self) -> Self {
        Self::new(&self.space, self.free().0)
    }

    /// How many bytes are free for this image, what it has written included, and how many others have taken or will take.
    pub(super) fn free(&self) -> (u64, u64) {
        let ledger = self.space.ledger();
        let others = ledger.outstanding.iter().filter(|(key, _)| **key != self.key).map(|(_, bytes)| bytes);
        let written = ledger.written.saturating_sub(self.written_before).saturating_sub(self.written);
        let taken = others.fold(written, |sum, bytes| sum.saturating_add(*bytes));
        (self.free.saturating_sub(taken), taken)
    }

    /// This image is going to write this number of bytes more.
    pub(super) fn reserve(&self, bytes: u64) {
        self.space.ledger().outstanding.insert(self.key, bytes);
    }

    /// This image has written this number of bytes more.
    pub(super) fn wrote(&mut self, bytes: u64) {
        self.written += bytes;
        let mut ledger = self.space.ledger();
        ledger.written += bytes;
        if let Some(left) = ledger.outstanding.get_mut(&self.key) {
            *left = left.saturating_sub(bytes);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.space.ledger().outstanding.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_space_is_counted_once_whoever_writes_it() {
        let space = Arc::<Space>::default();
        let mut first = Share::new(&space, 100);
        first.reserve(60);
        first.wrote(10);
        // The disk has 90 by now, of which the first will take 50.
        let second = Share::new(&space, 90);
        assert_eq!(second.free(), (40, 50));
        first.wrote(50);
        assert_eq!(second.free(), (40, 50), "written, not given back");
        assert_eq!(first.free(), (100, 0));
        second.reserve(40);
        assert_eq!(first.free(), (60, 40));
        drop(second);
        assert_eq!(first.free(), (100, 0), "what was not written is free again");
    }
}
