//! Several connections at once, for stores that limit each of them.
//!
//! The rest of the image is cut into **pieces**. Each connection requests one piece after the other and writes it to its
//! place; the hash reads behind the first gap. Where a store refuses a further connection there are fewer of them. One that
//! ignores ranges gets a single connection.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;

use crate::archive::transfer::buffer::{Buffers, FLUSH_INTERVAL};
use crate::archive::transfer::connection::Download;
use crate::archive::transfer::error::Interruption;
use crate::archive::transfer::hash::Hash;
use crate::archive::transfer::outputs::Outputs;
use crate::archive::transfer::part_file::PartFile;
use crate::archive::transfer::sink::Received;
use crate::clock::timeout;

/// Large enough that a further request costs little, small enough that the hash stays close behind.
pub(crate) const PIECE_BYTES: u64 = 8 << 20;
/// Written at once, per connection: each has a buffer of its own, and memory stays flat.
const WRITE_BYTES: usize = 256 << 10;

/// The rest of an image.
#[derive(Debug)]
pub(crate) struct Pieces {
    todo: VecDeque<Range<u64>>,
    /// How many connections the store allows at once, as far as is known.
    connections: usize,
}

impl Pieces {
    pub(crate) fn new(rest: Range<u64>, connections: usize) -> Self {
        let step = usize::try_from(PIECE_BYTES).unwrap_or(usize::MAX);
        let begins = rest.clone().step_by(step);
        let todo = begins.map(|from| from..(from + PIECE_BYTES).min(rest.end)).collect();
        Self { todo, connections }
    }
}

impl Download<'_> {
    /// Receives all pieces into the part file that `hash` reads. It ends early only if the last connection fails, or if
    /// one shows that no other can do better.
    pub(crate) async fn receive_pieces(
        &self,
        received: &mut Received,
        pieces: &mut Pieces,
        hash: &Hash,
        outputs: &mut Outputs,
    ) -> Result<(), Interruption> {
        let Some(part_file) = hash.part_file() else { return Err(Interruption::RangesIgnored) };
        let (arrived, before) = (AtomicU64::new(received.bytes), received.clone());
        let mut active: FuturesUnordered<BoxFuture<'_, _>> = FuturesUnordered::new();
        let mut interrupted = None;
        loop {
            while interrupted.is_none() && active.len() < pieces.connections {
                let Some(piece) = pieces.todo.pop_front() else { break };
                active.push(self.receive_piece(piece, &before, part_file, &arrived).boxed());
            }
            // On a slow line a piece takes long: meanwhile the journal has to move.
            let next = timeout(self.clock, FLUSH_INTERVAL, active.next()).await;
            received.bytes = arrived.load(Ordering::Relaxed);
            // The archive and the hash look how far the file is written, and whether a write failed.
            outputs.write(&Bytes::new()).await?;
            hash.take(Bytes::new()).await?;
            let Ok(next) = next else { continue };
            let Some((rest, result)) = next else { break };
            if !rest.is_empty() {
                pieces.todo.push_front(rest);
            }
            match result {
                Ok(()) => {}
                Err(end @ (Interruption::Changed(_) | Interruption::RangesIgnored)) => {
                    interrupted = Some(end);
                }
                Err(_) if pieces.connections > 1 => pieces.connections -= 1,
                Err(end) => interrupted = Some(end),
            }
        }
        match interrupted {
            Some(Interruption::RangesIgnored) => {
                // The single connection begins at the first gap, and receives all behind it.
                received.bytes = part_file.forget_beyond().await;
                Err(Interruption::RangesIgnored)
            }
            Some(interruption) => Err(interruption),
            None => {
                received.bytes = received.image.bytes.unwrap_or(received.bytes);
                Ok(())
            }
        }
    }

    /// Receives one piece over one connection; gives the rest of it that was not received.
    async fn receive_piece(
        &self,
        mut piece: Range<u64>,
        before: &Received,
        part_file: &PartFile,
        arrived: &AtomicU64,
    ) -> (Range<u64>, Result<(), Interruption>) {
        let result = self.fill_piece(&mut piece, before, part_file, arrived).await;
        (piece, result)
    }

    async fn fill_piece(
        &self,
        rest: &mut Range<u64>,
        before: &Received,
        part_file: &PartFile,
        arrived: &AtomicU64,
    ) -> Result<(), Interruption> {
        let mut stream = self.open(rest.start, Some(rest.end), before).await?;
        if stream.offset != rest.start {
            return Err(Interruption::RangesIgnored);
        }
        let (mut buffers, mut written_at) = (Buffers::new(WRITE_BYTES), self.clock.elapsed());
        loop {
            let chunk = self.next_chunk(&mut stream).await;
            let (mut chunk, interrupted) = match chunk {
                Ok(Some(chunk)) => (chunk, None),
                Ok(None) => (Bytes::new(), Some(Interruption::short())),
                Err(interruption) => (Bytes::new(), Some(interruption)),
            };
            // A server may send more than was asked for; that belongs to the next piece.
            let wanted = rest.end - rest.start - buffers.len() as u64;
            chunk.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
            loop {
                let full = buffers.fill(&mut chunk);
                let len = buffers.len() as u64;
                let complete = rest.start + len == rest.end;
                if !(full || complete || interrupted.is_some() || self.is_flush_due(written_at)) {
                    break;
                }
                if len > 0 && part_file.write_at(rest.start, buffers.take()).await.is_err() {
                    // The archive reports the failure when it is next called.
                    return Ok(());
                }
                written_at = self.clock.elapsed();
                rest.start += len;
                let bytes = arrived.fetch_add(len, Ordering::Relaxed) + len;
                self.report(bytes, before.image.bytes);
                if complete {
                    return Ok(());
                }
                if !full {
                    break;
                }
            }
            if let Some(interruption) = interrupted {
                return Err(interruption);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pieces_are_the_whole_without_gaps() {
        for (from, to) in
            [(0, 0), (5, 6), (1, PIECE_BYTES + 1), (0, 5 * PIECE_BYTES), (7, 3 * PIECE_BYTES + 7)]
        {
            let pieces = Pieces::new(from..to, 4);
            let mut at = from;
            for piece in pieces.todo {
                assert!(piece.start == at && piece.end - at <= PIECE_BYTES && piece.end > at);
                at = piece.end;
            }
            assert_eq!(at, to);
        }
    }
}
