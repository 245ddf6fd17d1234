//! The record beside a `.part`: how much of it is safe on the disk, and of which image it is.
//!
//! ```json
//! { "version": 1, "md5": "…", "bytes": 10737418240, "etag": "\"…\"", "bytes_synced": 67108864 }
//! ```
//!
//! It is written only after the bytes that it vouches for were synced, and removed before they are given up. Read back it
//! is judged as hostile; one that is not understood is none, and the image comes in from its first byte.

use serde::{Deserialize, Serialize};

use crate::archive::md5::Md5Sum;
use crate::archive::sink::{Resumable, Whole};

/// A journal is never larger, in bytes.
pub(super) const JOURNAL_BYTES_MAX: u64 = 16 << 10;

const VERSION: u64 = 1;
/// Longer ones name nothing that can be asked for.
const ETAG_BYTES_MAX: usize = 1024;

/// What is known of a `.part`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Journal {
    version: u64,
    md5: Md5Sum,
    /// The length of the whole image, where it is told.
    bytes: Option<u64>,
    etag: Option<String>,
    /// So many bytes from the first one on are safe.
    pub(super) bytes_synced: u64,
}

impl Journal {
    pub(super) fn new(whole: &Whole, bytes_synced: u64) -> Self {
        let Whole { md5, bytes, etag } = whole.clone();
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
        let sound = read.version == VERSION
            && read.bytes_synced > 0
            && read.bytes.is_none_or(|bytes| read.bytes_synced <= bytes)
            && read.etag.as_ref().is_none_or(sendable);
        sound.then_some(read)
    }

    pub(super) fn resumable(self) -> Resumable {
        let whole = Whole { md5: self.md5, bytes: self.bytes, etag: self.etag };
        Resumable { bytes: self.bytes_synced, whole }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> Journal {
        let whole = Whole {
            md5: "d41d8cd98f00b204e9800998ecf8427e".parse().unwrap(),
            bytes: Some(10),
            etag: Some("\"a\"".to_owned()),
        };
        Journal::new(&whole, 4)
    }

    #[test]
    fn what_is_written_is_read_back_and_what_is_odd_is_no_journal() {
        let sound = journal();
        assert_eq!(Journal::from_bytes(&sound.to_bytes()).unwrap(), sound);
        let odd = [
            Journal { version: 2, ..sound.clone() },
            Journal { bytes_synced: 0, ..sound.clone() },
            Journal { bytes_synced: 11, ..sound.clone() },
            Journal { etag: Some("a\r\nX: y".to_owned()), ..sound.clone() },
            Journal { etag: Some("a".repeat(2000)), ..sound },
        ];
        for odd in odd {
            assert_eq!(Journal::from_bytes(&odd.to_bytes()), None, "{odd:?}");
        }
        for text in ["", "{", "null", "[]", "{\"version\": 1}"] {
            assert_eq!(Journal::from_bytes(text.as_bytes()), None, "{text}");
        }
    }
}
