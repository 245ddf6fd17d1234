//! Why a download ends without an image, and why a connection ends before its time.

use std::error::Error;
use std::io;

use crate::archive::qcow2::Qcow2Error;
use crate::archive::transfer::source::SourceError;
use crate::clock::TimedOut;
use crate::retry::MAX_ATTEMPTS;

/// An image that changes while it is received is started over at most this often: one that changes more often is not an
/// image that was exported once.
pub(crate) const STARTS: u32 = 3;

/// Why an image was not received.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// There is nothing to verify it by.
    #[error(
        "unverified: the service gives no MD5 of the image, so it could not be verified and was not fetched"
    )]
    NoMd5,
    /// There is nothing valid to verify it by.
    #[error(
        "unverified: the service gives `{0}` as the MD5 of the image, which is none, so it could not be verified \
         and was not fetched"
    )]
    BadMd5(String),
    /// Another attempt does not help.
    #[error("give up after {bytes} bytes")]
    Refused {
        /// Bytes that were received.
        bytes: u64,
        /// The reason.
        #[source]
        source: SourceError,
    },
    /// All attempts failed.
    #[error(
        "give up at byte {bytes}{} after {MAX_ATTEMPTS} attempts in a row without progress", of_total(*.total)
    )]
    GaveUp {
        /// Bytes that were received.
        bytes: u64,
        /// The length of the image, where it is known.
        total: Option<u64>,
        /// The last failure.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// It can't be restored, whatever follows its header.
    #[error("it is not a valid image by its header, so the rest of it was not fetched")]
    Invalid(#[source] Qcow2Error),
    /// It changed again and again.
    #[error("give up after {STARTS} starts: {0}")]
    Unsteady(&'static str),
    /// The part file can't be read back.
    #[error("read back the part of the image that is there")]
    ReadBack(#[source] io::Error),
    /// Each archive failed, for reasons of its own.
    #[error("every archive failed while it was received")]
    NoArchive,
}

fn of_total(total: Option<u64>) -> String {
    total.map_or_else(String::new, |total| format!(" of {total}"))
}

pub(crate) const NOT_AN_IMAGE: &str = "the server's response is not a qcow2 image";

/// Why a connection ended before the image was complete. It decides the next attempt.
pub(crate) enum Interruption {
    /// Another connection may continue.
    Broken(Box<dyn Error + Send + Sync>),
    /// Another connection may continue, after the address was renewed.
    Expired,
    /// The server ignores ranges: a single connection may continue.
    RangesIgnored,
    /// The image is another one now, and has to start over.
    Changed(&'static str),
    /// The source says that no other attempt helps.
    Refused(SourceError),
    /// The download has failed, for a reason that is none of the connection's.
    Fatal(DownloadError),
}

impl From<SourceError> for Interruption {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Refused(_) => Self::Refused(error),
            SourceError::Changed => Self::Changed("the image changed at its address"),
            SourceError::Expired => Self::Expired,
            SourceError::Broken(_) => Self::broken(error),
        }
    }
}

impl Interruption {
    /// A failure of one connection that the next one may not have.
    pub(crate) fn broken(why: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Broken(why.into())
    }

    pub(crate) fn stalled(stalled: TimedOut) -> Self {
        Self::broken(format!("no byte was received for {} s", stalled.0.as_secs_f64()))
    }

    pub(crate) fn short() -> Self {
        Self::broken("the image ended early")
    }
}

impl From<DownloadError> for Interruption {
    fn from(error: DownloadError) -> Self {
        Self::Fatal(error)
    }
}
