//! Several connections at once, for stores that limit each of them.
//!
//! What is left of the image is cut into **pieces**, and each connection asks for one piece after the other and writes it
//! to its place; the hash reads behind the first gap. A store that refuses a further connection gets fewer; one that
//! ignores ranges gets one, and the usual way.

use std::collections::VecDeque;
use std::error::Error;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;

use crate::archive::source::SourceError;
use crate::archive::transfer::buffer::Buffers;
use crate::archive::transfer::download::{
    Download, DownloadError, Ended, Failure, Outputs, Reached, changed, judge,
};
use crate::archive::transfer::hash::Hash;
use crate::archive::transfer::part_file::PartFile;
use crate::clock::timeout;

/// Large enough that asking anew costs little, small enough that the hash stays close behind.
pub(crate) const PIECE_BYTES: u64 = 8 << 20;
/// So much is written at once.
const WRITE_BYTES: usize = 256 << 10;

/// What is left of an image, by piece.
#[derive(Debug)]
pub(crate) struct Pieces {
    todo: VecDeque<Range<u64>>,
    /// Connections at once.
    allowed: usize,
}

impl Pieces {
    /// The bytes of `left`, over so many connections.
    pub(crate) fn of(left: Range<u64>, connections: usize) -> Self {
        let step = usize::try_from(PIECE_BYTES).unwrap_or(usize::MAX);
        let begins = left.clone().step_by(step);
        let todo = begins.map(|from| from..(from + PIECE_BYTES).min(left.end)).collect();
        Self { todo, allowed: connections }
    }
}

/// What came of a piece.
struct Done {
    /// What is still to come of it.
    rest: Range<u64>,
    why: Why,
}

enum Why {
    Whole,
    /// The connection was refused, or broke.
    Failed(Box<dyn Error + Send + Sync>),
    Source(SourceError),
    Ignored,
    Changed(&'static str),
    /// The disk failed; its archive hears of it with what it is given next.
    Disk,
}

impl Download<'_> {
    /// Brings all pieces in. Outputs early only if the last connection that is left fails; none if ranges are ignored.
    pub(crate) async fn ranges(
        &self,
        reached: &mut Reached,
        pieces: &mut Pieces,
        part_file: &Arc<PartFile>,
        outputs: &mut Outputs,
        hash: &Hash,
    ) -> Result<Option<Ended>, DownloadError> {
        let came = AtomicU64::new(reached.bytes);
        let before = Reached { bytes: reached.bytes, whole: reached.whole.clone(), expired: false };
        let mut at_work: FuturesUnordered<BoxFuture<'_, Done>> = FuturesUnordered::new();
        let mut ended = None;
        loop {
            while ended.is_none() && at_work.len() < pieces.allowed {
                let Some(piece) = pieces.todo.pop_front() else { break };
                at_work.push(self.piece(piece, &before, part_file, &came).boxed());
            }
            let Some(Done { rest, why }) = at_work.next().await else { break };
            if !rest.is_empty() {
                pieces.todo.push_front(rest);
            }
            reached.bytes = came.load(Ordering::Relaxed);
            // It looks how far the file has come.
            outputs.write(&Bytes::new()).await?;
            hash.take(Bytes::new()).await?;
            let alone = pieces.allowed == 1;
            match why {
                Why::Whole | Why::Disk => {}
                Why::Changed(why) => ended = Some(Some(Ended::Changed(why))),
                Why::Ignored => ended = Some(None),
                // One that is over is over for all of them.
                Why::Failed(failure) if alone => ended = Some(Some(Ended::Failed(failure))),
                Why::Source(error) if alone || matches!(error, SourceError::Changed) => {
                    ended = Some(Some(judge(error, reached)?));
                }
                Why::Failed(_) | Why::Source(_) => pieces.allowed -= 1,
            }
        }
        match ended {
            Some(Some(ended)) => Ok(Some(ended)),
            Some(None) => {
                // From the first gap on, the usual way.
                let _ = part_file.rest().await;
                reached.bytes = part_file.frontier();
                Ok(None)
            }
            None => {
                reached.bytes = reached.whole.bytes.unwrap_or(reached.bytes);
                Ok(Some(Ended::Whole))
            }
        }
    }

    /// One piece over one connection.
    async fn piece(
        &self,
        piece: Range<u64>,
        before: &Reached,
        part_file: &PartFile,
        came: &AtomicU64,
    ) -> Done {
        let mut rest = piece;
        let why = self.piece_into(&mut rest, before, part_file, came).await;
        Done { rest, why }
    }

    async fn piece_into(
        &self,
        rest: &mut Range<u64>,
        before: &Reached,
        part_file: &PartFile,
        came: &AtomicU64,
    ) -> Why {
        let opened = self.source.open(rest.start, Some(rest.end), before.whole.etag.as_deref());
        let mut stream = match timeout(self.clock, self.stall_timeout, opened).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Why::Source(error),
            Err(stalled) => return Why::Failed(Failure::Stalled(stalled.0).into()),
        };
        if let Some(why) = changed(before, &stream) {
            return Why::Changed(why);
        }
        if stream.offset != rest.start {
            return Why::Ignored;
        }
        let mut gathered = Buffers::of(WRITE_BYTES);
        loop {
            let next = timeout(self.clock, self.stall_timeout, stream.body.next()).await;
            let (mut chunk, failure) = match next {
                Ok(Some(Ok(chunk))) => (chunk, None),
                Ok(Some(Err(error))) => (Bytes::new(), Some(error.into())),
                Ok(None) => (Bytes::new(), Some(Failure::Short.into())),
                Err(stalled) => (Bytes::new(), Some(Failure::Stalled(stalled.0).into())),
            };
            if let Some(throttle) = self.throttle {
                throttle.take(self.clock, chunk.len() as u64).await;
            }
            // What is sent beyond the piece is another's.
            let wanted = rest.end - rest.start - gathered.len() as u64;
            chunk.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
            loop {
                let full = gathered.fill(&mut chunk);
                let len = gathered.len() as u64;
                let whole = rest.start + len == rest.end;
                if !(full || whole || failure.is_some()) {
                    break;
                }
                if len > 0 && part_file.write_at(rest.start, gathered.take()).await.is_err() {
                    return Why::Disk;
                }
                rest.start += len;
                let bytes = came.fetch_add(len, Ordering::Relaxed) + len;
                self.tell(bytes, before.whole.bytes);
                if whole {
                    return Why::Whole;
                }
                if !full {
                    break;
                }
            }
            if let Some(failure) = failure {
                return Why::Failed(failure);
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
            let pieces = Pieces::of(from..to, 4);
            let mut at = from;
            for piece in pieces.todo {
                assert!(piece.start == at && piece.end - at <= PIECE_BYTES && piece.end > at);
                at = piece.end;
            }
            assert_eq!(at, to);
        }
    }
}
