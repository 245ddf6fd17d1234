//! Hashes an image, and reads its structure, beside the writing into the archives.

use std::fmt::{self, Debug};
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread::available_parallelism;

use bytes::Bytes;

use crate::archive::md5::{Md5, Md5Sum};
use crate::archive::qcow2::{Checker, Qcow2, Qcow2Error};
use crate::archive::transfer::error::DownloadError;
use crate::archive::transfer::part_file::PartFile;
use crate::archive::transfer::parts::PartHasher;
use crate::archive::transfer::queue::{Pool, Queue, Worker};

/// The threads that hash images, for all downloads that share them. The machine has one core more than there are threads, for
/// the network and the disk; where there are more images than threads, one thread hashes several together, which takes less time.
#[derive(Clone)]
pub struct Hashers(Arc<Pool<Hasher>>);

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

/// [`Md5::update_together`] has four lanes.
const TOGETHER_MAX: usize = 4;

/// Sees every byte of one image, in order.
struct Hasher {
    md5: Md5,
    /// Those of its parts, where an archive has a use for them.
    parts: Option<PartHasher>,
    checker: Checker,
    bytes: u64,
    buffer: Vec<u8>,
}

/// The next bytes.
enum Input {
    /// Of the image from its first byte on, the parts as well.
    Parts(Box<PartHasher>),
    /// These bytes.
    Bytes(Bytes),
    /// Those in this file, up to here.
    FileUpTo(Arc<PartFile>, u64),
}

/// Bytes that may wait: as many as for the disk, so that neither slows the other down.
const QUEUE_BYTES: u32 = 6 << 20;
/// Read back at once: small enough to stay in the processor's cache until it is hashed.
const READ_BACK_BYTES: usize = 256 << 10;
/// Hashed in one go of an earlier download's part: an item is always finished, also after the download was dropped.
const STEP_BYTES: usize = 16 << 20;

impl Hasher {
    fn new() -> Self {
        let (md5, checker) = (Md5::new(), Checker::default());
        Self { md5, parts: None, checker, bytes: 0, buffer: Vec::new() }
    }

    fn take(&mut self, bytes: &[u8]) {
        match &mut self.parts {
            Some(parts) => parts.update(&mut self.md5, bytes),
            None => self.md5.update(bytes),
        }
        self.inspect(bytes);
    }

    /// All except for the MD5.
    fn inspect(&mut self, bytes: &[u8]) {
        self.checker.update(bytes);
        self.bytes += bytes.len() as u64;
    }
}

impl Worker for Hasher {
    type Item = Input;

    fn work(&mut self, input: Input) -> io::Result<()> {
        match input {
            Input::Parts(parts) => self.parts = Some(*parts),
            Input::Bytes(bytes) => self.take(&bytes),
            Input::FileUpTo(part_file, upto) => {
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
                part_file.set_hashed(self.bytes);
            }
        }
        Ok(())
    }

    fn work_together(each: &mut [(Self, Option<Input>)]) -> Vec<io::Result<()>> {
        // Hashers that share a pool are given bytes alone, so none waits for the disk of another.
        let (mut together, mut done) = (Vec::new(), Vec::new());
        for (hasher, input) in &mut *each {
            done.push(match (input.take(), &hasher.parts) {
                (Some(Input::Bytes(bytes)), None) => {
                    hasher.inspect(&bytes);
                    together.push((&mut hasher.md5, bytes));
                    Ok(())
                }
                // With those of its parts the core is as busy as with those of others.
                (Some(input), _) => hasher.work(input),
                (None, _) => Ok(()),
            });
        }
        let mut together: Vec<_> = together.iter_mut().map(|(md5, bytes)| (&mut **md5, &bytes[..])).collect();
        Md5::update_together(&mut together);
        done
    }
}

/// The hash of one image: of the bytes as they arrive, or read back from the part file that they are written to.
pub(crate) struct Hash {
    queue: Queue<Hasher>,
    part_file: Option<Arc<PartFile>>,
}

impl Hash {
    /// On the shared threads, or on a thread of its own if it reads a file, since it may have to wait for the disk.
    pub(crate) fn new(hashers: &Hashers, part_file: Option<Arc<PartFile>>) -> Self {
        let queue = match &part_file {
            None => Queue::on_pool(&hashers.0, Hasher::new(), QUEUE_BYTES),
            Some(part_file) => {
                part_file.expect_hash();
                Queue::new(Hasher::new(), QUEUE_BYTES)
            }
        };
        Self { queue, part_file }
    }

    /// The part file that it reads, if it does.
    pub(crate) fn part_file(&self) -> Option<&Arc<PartFile>> {
        self.part_file.as_ref()
    }

    /// Hashes the parts as well, of an image of which nothing was hashed yet.
    pub(crate) async fn add_parts(&self, parts: PartHasher) -> Result<(), DownloadError> {
        self.queue.push(Input::Parts(Box::new(parts)), 1).await.map_err(DownloadError::ReadBack)
    }

    /// Reads the bytes that an earlier download left in the part file.
    pub(crate) async fn read_back(&self, bytes: u64) -> Result<(), DownloadError> {
        let Some(part_file) = &self.part_file else { return Ok(()) };
        for upto in (0..bytes).step_by(STEP_BYTES).skip(1).chain([bytes]) {
            let step = Input::FileUpTo(Arc::clone(part_file), upto);
            self.queue.push(step, 1).await.map_err(DownloadError::ReadBack)?;
        }
        Ok(())
    }

    /// Takes the bytes that the archives are given too, or looks how far the part file is written.
    pub(crate) async fn take(&self, bytes: Bytes) -> Result<(), DownloadError> {
        let weight = bytes.len();
        let pushed = match &self.part_file {
            None => self.queue.push(Input::Bytes(bytes), weight).await,
            // It looks again when it is done.
            Some(_) if !self.queue.is_idle() => Ok(()),
            Some(part_file) => {
                self.queue.push(Input::FileUpTo(Arc::clone(part_file), part_file.frontier()), 1).await
            }
        };
        pushed.map_err(DownloadError::ReadBack)
    }

    /// The MD5 and the structure of all `bytes` of the image.
    pub(crate) async fn finish(
        self,
        bytes: u64,
    ) -> Result<(Md5Sum, Result<Qcow2, Qcow2Error>), DownloadError> {
        if let Some(part_file) = &self.part_file {
            let last = Input::FileUpTo(Arc::clone(part_file), bytes);
            self.queue.push(last, 1).await.map_err(DownloadError::ReadBack)?;
        }
        let mut hasher = self.queue.into_worker().await.map_err(DownloadError::ReadBack)?;
        if let Some(parts) = &mut hasher.parts {
            parts.finish();
        }
        Ok((hasher.md5.finish(), hasher.checker.finish()))
    }
}
