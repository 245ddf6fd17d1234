//! Where the bytes of an image come from.
//!
//! The archive asks through [`ImageSource`]. Addresses, which are secrets, and HTTP stay on the other side of it.

use std::error::Error;

use futures_util::future::BoxFuture;
use http::StatusCode;
use http::header::{self, HeaderMap, HeaderValue};

use crate::transport::Body;

/// Something that has the bytes of one image, and can give them from the middle.
pub trait ImageSource: Send + Sync {
    /// The MD5 of the whole image as the service wrote it: it may be missing, empty or nonsense. [`Self::renew`] may
    /// change it.
    fn md5(&self) -> Option<String>;

    /// Whether a response of this length in bytes is of the image, whatever its bytes are: no proxy can have answered in its place.
    /// Then bytes that are none mean damage, and the MD5 says so.
    fn is_image(&self, _length: Option<u64>) -> bool {
        false
    }

    /// Whether the image was just exported: then its header alone may refuse it. Of a copy every byte is read, since the MD5
    /// says whether it is damaged.
    fn is_export(&self) -> bool {
        false
    }

    /// Opens the bytes from `offset` on, up to `until` if that is given. The stream may begin elsewhere (a server that
    /// ignores ranges begins at 0) and end later, and says so. `etag` is that of the bytes received so far, for a source to
    /// which another one means another image.
    ///
    /// # Errors
    /// [`SourceError`], which decides the next attempt.
    fn open<'a>(
        &'a self,
        offset: u64,
        until: Option<u64>,
        etag: Option<&'a str>,
    ) -> BoxFuture<'a, Result<ImageStream, SourceError>>;

    /// Asks the service for a new address, that is, for a new export. A copy in an archive has no address that expires.
    ///
    /// # Errors
    /// [`SourceError`]; after any but [`SourceError::Refused`] it is tried again.
    fn renew(&self) -> BoxFuture<'_, Result<(), SourceError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// The bytes of an image from some offset on.
pub struct ImageStream {
    /// Where the bytes begin.
    pub offset: u64,
    /// The server honoured the range.
    pub is_part: bool,
    /// The length of the whole image in bytes, if the server gives it.
    pub total: Option<u64>,
    /// The server's name of this very version of the image, if it gives one.
    pub etag: Option<String>,
    /// The bytes.
    pub body: Body,
}

impl ImageStream {
    /// A server's response, whole or in part. Whether its status is a success is for the caller to decide.
    ///
    /// # Errors
    /// [`SourceError::Broken`] if it is a part of unknown place.
    pub fn from_response(status: StatusCode, headers: &HeaderMap, body: Body) -> Result<Self, SourceError> {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let is_part = status == StatusCode::PARTIAL_CONTENT;
        let (offset, total) = if is_part {
            text(header::CONTENT_RANGE).and_then(part_of).ok_or_else(|| {
                SourceError::Broken(
                    "the server sends a part of the image, and does not say which part".into(),
                )
            })?
        } else {
            (0, text(header::CONTENT_LENGTH).and_then(|length| length.parse().ok()))
        };
        let etag = text(header::ETAG).filter(|etag| !etag.is_empty()).map(str::to_owned);
        Ok(Self { offset, is_part, total, etag, body })
    }
}

/// Where the part begins that a `Content-Range` names, and the length of the whole, if it is there. One that is not within
/// its whole is none, as RFC 9110 has it.
fn part_of(range: &str) -> Option<(u64, Option<u64>)> {
    let (span, total) = range.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = span.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    // `*`, mostly.
    let total: Option<u64> = total.parse().ok();
    (first <= last && total.is_none_or(|total| last < total)).then_some((first, total))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_is_not_within_its_whole_is_none() {
        assert_eq!(part_of("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(part_of("bytes 5-9/*"), Some((5, None)));
        for odd in ["bytes 5-9/9", "bytes 9-5/10", "bytes 5-/10", "bytes */10", "bytes -5-9/10", "5-9/10", ""]
        {
            assert_eq!(part_of(odd), None, "{odd}");
        }
    }
}
