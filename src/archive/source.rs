//! Where the bytes of an image come from.
//!
//! The archive asks through [`ImageSource`] and knows nothing of addresses, which are secrets, nor of HTTP.

use std::error::Error;

use futures_util::future::BoxFuture;
use http::StatusCode;
use http::header::{self, HeaderMap, HeaderValue};

use crate::transport::Body;

/// Something that has the bytes of one image, and can give them from the middle.
pub trait ImageSource: Send + Sync {
    /// What the service says about the image now; [`Self::renew`] may change it.
    fn facts(&self) -> ImageFacts;

    /// Opens the bytes from `offset` on, up to `until` if that is given. The answer may begin elsewhere (a server that
    /// ignores ranges begins at 0) and go further, and says so. With `etag`, the offset is meant for the image that had it.
    ///
    /// # Errors
    /// [`SourceError`], which decides what is tried next.
    fn open<'a>(
        &'a self,
        offset: u64,
        until: Option<u64>,
        etag: Option<&'a str>,
    ) -> BoxFuture<'a, Result<ImageStream, SourceError>>;

    /// Asks the service for a new address, that is, for a new export.
    ///
    /// # Errors
    /// [`SourceError`]; after any but [`SourceError::Refused`] it is tried again.
    fn renew(&self) -> BoxFuture<'_, Result<(), SourceError>>;
}

/// What the service says about an image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ImageFacts {
    /// The MD5 of the whole file, as the service wrote it: it may be missing, empty or nonsense.
    pub md5: Option<String>,
}

/// The bytes of an image from some offset on.
pub struct ImageStream {
    /// Where the bytes begin.
    pub offset: u64,
    /// The server heeded the range.
    pub is_part: bool,
    /// The length of the whole image in bytes, where it is told.
    pub total: Option<u64>,
    /// What names this very version of the image, where it is told.
    pub etag: Option<String>,
    /// The bytes.
    pub body: Body,
}

impl ImageStream {
    /// What a server sends for an image, whole or in part. Whether its status is a good one is for the caller to say.
    ///
    /// # Errors
    /// [`SourceError::Refused`] if it sends a part and does not say which.
    pub fn of_answer(status: StatusCode, headers: &HeaderMap, body: Body) -> Result<Self, SourceError> {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let is_part = status == StatusCode::PARTIAL_CONTENT;
        let (offset, total) = if is_part {
            let range = text(header::CONTENT_RANGE).and_then(|range| {
                let (span, total) = range.strip_prefix("bytes ")?.split_once('/')?;
                Some((span.split_once('-')?.0.parse().ok()?, total.parse().ok()))
            });
            range.ok_or_else(|| {
                SourceError::Refused("the store answers with a part, and does not say which".into())
            })?
        } else {
            (0, text(header::CONTENT_LENGTH).and_then(|length| length.parse().ok()))
        };
        let etag = text(header::ETAG).filter(|etag| !etag.is_empty()).map(str::to_owned);
        Ok(Self { offset, is_part, total, etag, body })
    }
}

/// Why a source could not be opened or renewed. No text in it holds an address.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The address is not valid any more; a new one helps.
    #[error("the address of the image has expired")]
    Expired,
    /// The image is not the one that the `ETag` or the offset was meant for; starting over helps.
    #[error("the image has changed at its address")]
    Changed,
    /// Trying again does not help.
    #[error("the image is refused")]
    Refused(#[source] Box<dyn Error + Send + Sync>),
    /// It may work another time.
    #[error("the image can't be reached at the moment")]
    Broken(#[source] Box<dyn Error + Send + Sync>),
}
