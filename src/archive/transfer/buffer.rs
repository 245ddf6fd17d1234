//! Buffers that are filled, handed around, and used again.
//!
//! What comes from the network is copied once, while it is still in the processor's cache. That frees the connection's own
//! buffer for what comes next: a buffer that were kept would be replaced, and memory that is touched for the first time costs
//! more than the copy.

use std::collections::VecDeque;

use bytes::{Buf as _, Bytes, BytesMut};

/// A buffer in the making, and those that were handed out.
pub(crate) struct Buffers {
    bytes_max: usize,
    filling: BytesMut,
    out: VecDeque<Bytes>,
}

impl Buffers {
    /// Of batches of at most so many bytes.
    pub(crate) fn of(bytes_max: usize) -> Self {
        Self { bytes_max, filling: BytesMut::new(), out: VecDeque::new() }
    }

    /// Takes as much of `chunk` as there is room for; true if the batch is full.
    pub(crate) fn fill(&mut self, chunk: &mut Bytes) -> bool {
        if self.filling.capacity() == 0 && !chunk.is_empty() {
            self.filling = self.returned().unwrap_or_else(|| BytesMut::with_capacity(self.bytes_max));
        }
        let count = chunk.len().min(self.bytes_max - self.filling.len());
        self.filling.extend_from_slice(&chunk[..count]);
        chunk.advance(count);
        self.filling.len() == self.bytes_max
    }

    /// How many bytes wait.
    pub(crate) fn len(&self) -> usize {
        self.filling.len()
    }

    /// What was gathered.
    pub(crate) fn take(&mut self) -> Bytes {
        let batch = std::mem::take(&mut self.filling).freeze();
        if !batch.is_empty() {
            self.out.push_back(batch.clone());
        }
        batch
    }

    /// A buffer that nobody uses any more; the first to be handed out is the first to come back.
    fn returned(&mut self) -> Option<BytesMut> {
        let mut buffer = self.out.pop_front_if(|first| first.is_unique())?.try_into_mut().ok()?;
        buffer.clear();
        Some(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_in_comes_out_in_batches() {
        let mut batches = Buffers::of(4);
        let mut chunk = Bytes::from_static(b"abcdefghij");
        let mut out = Vec::new();
        while batches.fill(&mut chunk) {
            out.push(batches.take());
        }
        assert_eq!((out, batches.len()), (vec![Bytes::from_static(b"abcd"), Bytes::from_static(b"efgh")], 2));
        assert_eq!((batches.take(), batches.take()), (Bytes::from_static(b"ij"), Bytes::new()));
    }

    #[test]
    fn a_buffer_is_used_again_once_nobody_holds_it() {
        let mut batches = Buffers::of(4);
        let mut full = |bytes: &'static [u8]| {
            assert!(batches.fill(&mut Bytes::from_static(bytes)));
            batches.take()
        };
        let (first, second) = (full(b"1111"), full(b"2222"));
        let place = first.as_ptr();
        assert_ne!(second.as_ptr(), place);
        drop(first);
        let third = full(b"3333");
        assert_eq!((third.as_ptr(), &third[..], &second[..]), (place, &b"3333"[..], &b"2222"[..]));
    }
}
