//! The record beside a `.part`: how much of it is synced, and of which image it is.
//!
//! ```json
//! { "version": 1, "md5": "…", "bytes": 10737418240, "etag": "\"…\"", "bytes_synced": 67108864 }
//! ```
//!
//! It is written only after the bytes that it vouches for were synced, and removed before they are. A journal that is read
//! back is treated as hostile; one that is not valid is ignored, and the image is downloaded from its first byte.

use serde::{Deserialize, Serialize};

use crate::archive::md5::Md5Sum;
use crate::archive::transfer::sink::{ImageVersion, Received};

/// A journal has some 200 bytes, and never more than these.
pub(super) const JOURNAL_BYTES_MAX: u64 = 16 << 10;

const VERSION: u64 = 1;
/// A longer `ETag` would make a request too long for servers.
const ETAG_BYTES_MAX: usize = 1024;

/// The record of a `.part`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Journal {
    version: u64,
    md5: Md5Sum,
    /// The length of the whole image, if it is known.
    bytes: Option<u64>,
    etag: Option<String>,
    /// This many bytes from the first one on are synced.
    pub(super) bytes_synced: u64,
}

impl Journal {
    pub(super) fn new(image: &ImageVersion, bytes_synced: u64) -> Self {
        let ImageVersion { md5, bytes, etag } = image.clone();
        Self { version: VERSION, md5, bytes, etag, bytes_synced }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).expect("JSON can hold all that a journal has");
        bytes.push(b'\n');
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let read: Self = serde_json::from_slice(bytes).ok()?;
        let sendable = |etag: &String| {
            etag.len() <= ETAG_BYTES_MAX && etag.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic())
        };
        let valid = read.version == VERSION
            && read.bytes_synced > 0
            && read.bytes.is_none_or(|bytes| read.bytes_synced <= bytes)
            && read.etag.as_ref().is_none_or(sendable);
        valid.then_some(read)
    }

    pub(super) fn received(self) -> Received {
        let image = ImageVersion { md5: self.md5, bytes: self.bytes, etag: self.etag };
        Received { bytes: self.bytes_synced, image }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> Journal {
        let image = ImageVersion {
            md5: "d41d8cd98f00b204e9800998ecf8427e".parse().unwrap(),
            bytes: Some(10),
            etag: Some("\"a\"".to_owned()),
        };
        Journal::new(&image, 4)
    }

    #[test]
    fn what_is_written_is_read_back_and_what_is_odd_is_no_journal() {
        let valid = journal();
        assert_eq!(Journal::from_bytes(&valid.to_bytes()).unwrap(), valid);
        let odd = [
            Journal { version: 2, ..valid.clone() },
            Journal { bytes_synced: 0, ..valid.clone() },
            Journal { bytes_synced: 11, ..valid.clone() },
            Journal { etag: Some("a\r\nX: y".to_owned()), ..valid.clone() },
            Journal { etag: Some("a".repeat(2000)), ..valid },
        ];
        for odd in odd {
            assert_eq!(Journal::from_bytes(&odd.to_bytes()), None, "{odd:?}");
        }
        for text in ["", "{", "null", "[]", "{\"version\": 1}"] {
            assert_eq!(Journal::from_bytes(text.as_bytes()), None, "{text}");
        }
    }
}
