//! Where an image is hashed, and looked at, beside its way into the archives.

use std::fmt::{self, Debug};
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread::available_parallelism;

use bytes::Bytes;

use crate::archive::md5::{Md5, Md5Sum};
use crate::archive::qcow2::{Checker, Qcow2, Qcow2Error};
use crate::archive::transfer::download::DownloadError;
use crate::archive::transfer::part_file::PartFile;
use crate::archive::transfer::queue::{Pool, Queue, Worker};

/// Those who hash what comes in, for all downloads that share them. There are fewer than the machine has cores, so that the
/// network and the disk have one; where images outnumber them, several are hashed at once, which takes less time.
#[derive(Clone)]
pub struct Hashers(Arc<Pool<Proof>>);

impl Debug for Hashers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hashers").finish_non_exhaustive()
    }
}

impl Default for Hashers {
    fn default() -> Self {
        let cores = available_parallelism().map_or(1, NonZeroUsize::get);
        Self(Pool::new(cores.saturating_sub(1).max(1), TOGETHER_MAX))
    }
}

/// So many [`Md5::update_together`] takes at a time.
const TOGETHER_MAX: usize = 4;

/// What every byte passes, in its order.
struct Proof {
    md5: Md5,
    checker: Checker,
    bytes: u64,
    buffer: Vec<u8>,
}

/// What comes next.
enum Next {
    /// These bytes.
    Bytes(Bytes),
    /// What stands in this file up to there.
    Upto(Arc<PartFile>, u64),
}

/// So many bytes may wait.
const ROOM_BYTES: u32 = 6 << 20;
/// So much is read back at once.
const READ_BACK_BYTES: usize = 256 << 10;
/// So much of what an earlier download left is hashed in one go.
const STEP_BYTES: usize = 16 << 20;

impl Proof {
    fn new() -> Self {
        Self { md5: Md5::new(), checker: Checker::default(), bytes: 0, buffer: Vec::new() }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.md5.update(bytes);
        self.look_at(bytes);
    }

    /// All but the MD5.
    fn look_at(&mut self, bytes: &[u8]) {
        self.checker.update(bytes);
        self.bytes += bytes.len() as u64;
    }
}

impl Worker for Proof {
    type Item = Next;

    fn work(&mut self, next: Next) -> io::Result<()> {
        match next {
            Next::Bytes(bytes) => self.take(&bytes),
            Next::Upto(part_file, upto) => {
                let mut buffer = std::mem::take(&mut self.buffer);
                buffer.resize(READ_BACK_BYTES, 0);
                while self.bytes < upto {
                    let wanted = usize::try_from(upto - self.bytes).unwrap_or(usize::MAX).min(buffer.len());
                    match part_file.file().read_at(&mut buffer[..wanted], self.bytes)? {
                        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                        count => self.take(&buffer[..count]),
                    }
                }
                self.buffer = buffer;
                part_file.was_read(self.bytes);
            }
        }
        Ok(())
    }

    fn work_together(each: &mut [(Self, Option<Next>)]) -> Vec<io::Result<()>> {
        // Nothing but bytes at hand comes to those who share their crew, so nobody waits for another's disk.
        let mut together = Vec::new();
        for (proof, next) in &mut *each {
            if let Some(Next::Bytes(bytes)) = next {
                proof.look_at(bytes);
                together.push((&mut proof.md5, &bytes[..]));
            }
        }
        Md5::update_together(&mut together);
        let rest = |next: &mut Option<Next>| next.take().filter(|next| !matches!(next, Next::Bytes(_)));
        each.iter_mut().map(|(proof, next)| rest(next).map_or(Ok(()), |next| proof.work(next))).collect()
    }
}

/// Where the bytes are hashed: as they come, or read back behind a file that they go to.
pub(crate) struct Hash {
    lane: Queue<Proof>,
    behind: Option<Arc<PartFile>>,
}

impl Hash {
    /// By the hashers, or by one of its own behind a file: that one may have to wait for the disk.
    pub(crate) fn new(hashers: &Hashers, behind: Option<Arc<PartFile>>) -> Self {
        let lane = match &behind {
            None => Queue::on_pool(&hashers.0, Proof::new(), ROOM_BYTES),
            Some(part_file) => {
                part_file.read_behind();
                Queue::new(Proof::new(), ROOM_BYTES)
            }
        };
        Self { lane, behind }
    }

    /// Whether it reads behind the file that the bytes go to.
    pub(crate) fn behind(&self) -> Option<&Arc<PartFile>> {
        self.behind.as_ref()
    }

    /// Takes what an earlier download left in the file, as soon as it can.
    pub(crate) async fn read_back(&self, part_file: &Arc<PartFile>, bytes: u64) -> Result<(), DownloadError> {
        // In steps, since what is begun is done to its end.
        for upto in (0..bytes).step_by(STEP_BYTES).skip(1).chain([bytes]) {
            let step = Next::Upto(Arc::clone(part_file), upto);
            self.lane.push(step, 1).await.map_err(DownloadError::ReadBack)?;
        }
        Ok(())
    }

    /// Takes what was handed to the archives, or looks how far it has come there.
    pub(crate) async fn take(&self, bytes: Bytes) -> Result<(), DownloadError> {
        let weight = bytes.len();
        let pushed = match &self.behind {
            None => self.lane.push(Next::Bytes(bytes), weight).await,
            // It looks again when it is through.
            Some(_) if !self.lane.is_idle() => Ok(()),
            Some(part_file) => {
                self.lane.push(Next::Upto(Arc::clone(part_file), part_file.frontier()), 1).await
            }
        };
        pushed.map_err(DownloadError::ReadBack)
    }

    /// What all the bytes are, of which there are so many.
    pub(crate) async fn finish(
        self,
        bytes: u64,
    ) -> Result<(Md5Sum, Result<Qcow2, Qcow2Error>), DownloadError> {
        if let Some(part_file) = &self.behind {
            let last = Next::Upto(Arc::clone(part_file), bytes);
            self.lane.push(last, 1).await.map_err(DownloadError::ReadBack)?;
        }
        let proof = self.lane.into_worker().await.map_err(DownloadError::ReadBack)?;
        Ok((proof.md5.finish(), proof.checker.finish()))
    }
}
