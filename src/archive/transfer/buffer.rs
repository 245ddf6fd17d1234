//! Buffers that are filled, handed on, and used again.
//!
//! Each byte from the network is copied once, while it is still in the processor's cache. That frees the connection's own
//! buffer at once. Were it kept instead, the connection would have to allocate another, and touching fresh memory costs more
//! than the copy.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};

/// Gathered bytes are handed on after this time, even if the buffer is not full, so that the journal of a download moves
/// on a slow line too.
pub(crate) const FLUSH_INTERVAL: Duration = Duration::from_secs(5);

/// Large enough to make handing over between threads cheap, small enough to keep memory flat.
pub(crate) const BUFFER_BYTES: usize = 1 << 20;

/// Buffers that are not used any more are kept up to this many, to be used again.
const SPARE_MAX: usize = 2;

/// The buffer that is filled, and those that were handed out.
pub(crate) struct Buffers {
    bytes_max: usize,
    filling: BytesMut,
    handed_out: VecDeque<Bytes>,
}

impl Buffers {
    /// `bytes_max` is the size of each buffer.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, filling: BytesMut::new(), handed_out: VecDeque::new() }
    }

    /// Takes as much of `chunk` as fits; true if the buffer is full.
    pub(crate) fn fill(&mut self, chunk: &mut Bytes) -> bool {
        if self.filling.capacity() == 0 && !chunk.is_empty() {
            self.filling = self.returned().unwrap_or_else(|| BytesMut::with_capacity(self.bytes_max));
        }
        let count = chunk.len().min(self.bytes_max - self.filling.len());
        self.filling.extend_from_slice(&chunk[..count]);
        chunk.advance(count);
        self.filling.len() == self.bytes_max
    }

    /// The bytes in the buffer that is filled.
    pub(crate) fn len(&self) -> usize {
        self.filling.len()
    }

    /// Hands out the buffer that is filled.
    pub(crate) fn take(&mut self) -> Bytes {
        let full = std::mem::take(&mut self.filling).freeze();
        if !full.is_empty() {
            self.handed_out.push_back(full.clone());
        }
        full
    }

    /// A buffer that is no longer used; the first to be handed out is the first to be free again.
    fn returned(&mut self) -> Option<BytesMut> {
        while self.handed_out.get(SPARE_MAX).is_some_and(Bytes::is_unique) {
            self.handed_out.pop_front();
        }
        let mut buffer = self.handed_out.pop_front_if(|first| first.is_unique())?.try_into_mut().ok()?;
        buffer.clear();
        Some(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_in_comes_out_in_buffers() {
        let mut buffers = Buffers::new(4);
        let mut chunk = Bytes::from_static(b"abcdefghij");
        let mut out = Vec::new();
        while buffers.fill(&mut chunk) {
            out.push(buffers.take());
        }
        assert_eq!((out, buffers.len()), (vec![Bytes::from_static(b"abcd"), Bytes::from_static(b"efgh")], 2));
        assert_eq!((buffers.take(), buffers.take()), (Bytes::from_static(b"ij"), Bytes::new()));
    }

    #[test]
    fn a_buffer_is_used_again_once_it_is_no_longer_held() {
        let mut buffers = Buffers::new(4);
        let mut full = |bytes: &'static [u8]| {
            assert!(buffers.fill(&mut Bytes::from_static(bytes)));
            buffers.take()
        };
        let (first, second) = (full(b"1111"), full(b"2222"));
        let place = first.as_ptr();
        assert_ne!(second.as_ptr(), place);
        drop(first);
        let third = full(b"3333");
        assert_eq!((third.as_ptr(), &third[..], &second[..]), (place, &b"3333"[..], &b"2222"[..]));
    }

    #[test]
    fn few_buffers_are_kept_once_many_were_held() {
        let mut buffers = Buffers::new(4);
        let held: Vec<Bytes> = (0..30)
            .map(|_| {
                buffers.fill(&mut Bytes::from_static(b"1111"));
                buffers.take()
            })
            .collect();
        assert_eq!(buffers.handed_out.len(), held.len());
        drop(held);
        buffers.fill(&mut Bytes::from_static(b"2"));
        assert!(buffers.handed_out.len() <= SPARE_MAX);
    }
}
