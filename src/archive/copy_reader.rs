//! Reads stored copies again: every byte is hashed, and compared with the manifest.

use std::time::Duration;

use crate::archive::md5::Md5Sum;
use crate::archive::qcow2::Qcow2Error;
use crate::archive::transfer::connection::Download;
use crate::archive::transfer::error::DownloadError;
use crate::archive::transfer::hash::Hashers;
use crate::archive::transfer::outputs::Outputs;
use crate::archive::transfer::progress::Progress;
use crate::archive::transfer::sink::{Output, Sink, SinkError};
use crate::archive::transfer::source::ImageSource;
use crate::archive::transfer::throttle::Throttle;
use crate::clock::Clock;
use crate::policy::name::ArchiveName;
use crate::randomness::Randomness;

/// A connection without data for this long is replaced.
const STALL_TIMEOUT: Duration = Duration::from_mins(1);

/// Why a copy was not read to its end, or not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The copy cannot be read.
    #[error("read the copy in archive `{archive}`")]
    Unreadable {
        /// The archive.
        archive: ArchiveName,
        /// The cause.
        #[source]
        source: DownloadError,
    },
    /// The MD5 differs.
    #[error(
        "the copy in archive `{archive}` is damaged: its MD5 is {found}, but its manifest says {expected}; no data of it \
         is used"
    )]
    Damaged {
        /// The archive.
        archive: ArchiveName,
        /// From the manifest.
        expected: Md5Sum,
        /// Of the bytes.
        found: Md5Sum,
    },
    /// The destination failed, not the copy.
    #[error(transparent)]
    Sink(#[from] SinkError),
}

/// Reads copies with these seams.
#[derive(Clone, Copy)]
pub struct CopyReader<'a> {
    /// For time-outs and the pauses between attempts.
    pub clock: &'a dyn Clock,
    /// For the pauses between attempts.
    pub randomness: &'a dyn Randomness,
    /// They verify the bytes.
    pub hashers: &'a Hashers,
    /// Keeps the reading below a rate.
    pub throttle: Option<&'a Throttle>,
    /// Called for each event.
    pub progress: &'a (dyn Fn(Progress) + Send + Sync),
}

impl<'a> CopyReader<'a> {
    /// One that reads as fast as it can, and reports nothing.
    pub fn new(clock: &'a dyn Clock, randomness: &'a dyn Randomness, hashers: &'a Hashers) -> Self {
        Self { clock, randomness, hashers, throttle: None, progress: &|_| {} }
    }

    /// The download of a copy's image.
    pub(crate) fn download(&self, source: &'a dyn ImageSource) -> Download<'a> {
        Download {
            source,
            clock: self.clock,
            randomness: self.randomness,
            stall_timeout: STALL_TIMEOUT,
            connections: 1,
            hashers: self.hashers,
            throttle: self.throttle,
            progress: self.progress,
        }
    }

    /// Reads a copy's image from `source` into `output`. Returns its sink, ready to be published, once every byte is
    /// verified, with the reason if the image is not a valid qcow2 image all the same.
    ///
    /// # Errors
    /// [`ReadError`]; the sink is abandoned then.
    pub(crate) async fn read(
        &self,
        archive: &ArchiveName,
        source: &'a dyn ImageSource,
        output: Output,
    ) -> Result<(Box<dyn Sink>, Option<Qcow2Error>), ReadError> {
        let mut outputs = Outputs { open: vec![output], failed: Vec::new() };
        let error = match self.download(source).fetch(&mut outputs, false).await {
            Ok(fetched) if fetched.md5 == fetched.expected => match outputs.open.pop() {
                Some(Output { sink, .. }) => return Ok((sink, fetched.qcow2.err())),
                None => ReadError::Unreadable { archive: archive.clone(), source: DownloadError::NoArchive },
            },
            Ok(fetched) => ReadError::Damaged {
                archive: archive.clone(),
                expected: fetched.expected,
                found: fetched.md5,
            },
            Err(source) => match outputs.failed.pop() {
                Some((_, error)) => ReadError::Sink(error),
                None => ReadError::Unreadable { archive: archive.clone(), source },
            },
        };
        for Output { mut sink, .. } in outputs.open {
            if matches!(error, ReadError::Damaged { .. }) {
                // These bytes must not be resumed. Should this fail, so will the next step.
                let _ = sink.restart().await;
            }
            sink.abandon().await;
        }
        Err(error)
    }
}
