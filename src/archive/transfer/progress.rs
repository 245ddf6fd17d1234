//! How far a download is, for progress bars, metrics and the log.

/// An event of a download.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Bytes were received.
    Downloading {
        /// All that are there by now, from the first on.
        bytes: u64,
        /// The length of the image, where it is known.
        total: Option<u64>,
    },
    /// A new connection continues at this byte, since the last one broke or stalled, or since an earlier download left a part.
    Resumed {
        /// The bytes that are there.
        bytes: u64,
    },
    /// The image changed while it was received: it starts over at zero.
    StartedOver,
    /// The MD5 differs: the file is kept aside, and fetched again if this was the first time.
    ChecksumMismatch,
    /// All bytes are there; they are being synced and read back.
    Verifying,
}
