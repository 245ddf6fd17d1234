//! Later findings about a copy, and its removal: a new manifest replaces the old one.

use jiff::Timestamp;
use serde_json::Value;

use crate::archive::manifest::Manifest;
use crate::archive::store::StoreError;
use crate::archive::transfer::sink::SinkError;

/// A change of a copy's manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ManifestUpdate {
    /// Its bytes were verified again.
    Verified(Timestamp),
    /// Its bytes were found to differ: it no longer counts. The image stays for an inspection.
    Corrupt(Timestamp),
    /// The archive's retention removes its image. The manifest is marked first, so the copy continues to count.
    Pruned(Timestamp),
}

impl ManifestUpdate {
    /// The new manifest, and the content of its file. `bytes` are those of the file that the manifest was read from: what a
    /// later version wrote there stays.
    pub(super) fn apply(self, manifest: &Manifest, bytes: &[u8]) -> (Manifest, Vec<u8>) {
        let mut manifest = manifest.clone();
        match self {
            Self::Verified(at) => manifest.verified_at = at,
            Self::Corrupt(at) => manifest.corrupt_since = Some(at),
            // A crash may have left the image of one that was pruned before: that time stays.
            Self::Pruned(at) => manifest.pruned_at = manifest.pruned_at.or(Some(at)),
        }
        let ours = manifest.to_bytes();
        let read = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes);
        let merged = match (read(bytes), read(&ours)) {
            (Ok(mut merged), Ok(ours)) => {
                merge(&mut merged, ours);
                serde_json::to_vec_pretty(&merged)
            }
            (Err(error), _) | (_, Err(error)) => Err(error),
        };
        let bytes = merged.map_or(ours, |mut bytes| {
            bytes.push(b'\n');
            bytes
        });
        (manifest, bytes)
    }
}

/// Puts each field of `ours` in the place of the one that is there.
fn merge(there: &mut Value, ours: Value) {
    match (there, ours) {
        (Value::Object(there), Value::Object(ours)) => {
            for (name, value) in ours {
                merge(there.entry(name).or_insert(Value::Null), value);
            }
        }
        (there, ours) => *there = ours,
    }
}

/// A manifest could not be updated.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// Another process works on the copy.
    #[error("{image}: another process is working on it; try again later")]
    Busy {
        /// The image.
        image: String,
    },
    /// The copy has changed since it was read. Nothing was written.
    #[error("{image}: it has changed in the meantime, so nothing was written; try again")]
    Changed {
        /// The image.
        image: String,
    },
    /// The archive failed: either nothing changed, or the manifest is the new one.
    #[error(transparent)]
    Archive(#[from] StoreError),
}

impl UpdateError {
    /// What the archive could not write, unless that was for want of space.
    pub(crate) fn failed_write(&self) -> Option<&SinkError> {
        match self {
            Self::Archive(error) => error.failed_write(),
            Self::Busy { .. } | Self::Changed { .. } => None,
        }
    }
}
