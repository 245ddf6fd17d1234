//! Later findings about a copy, and its removal: a new manifest replaces the old one.

use jiff::Timestamp;

use crate::archive::layout::HoldMark;
use crate::archive::manifest::{Manifest, Written};
use crate::archive::store::StoreError;
use crate::archive::transfer::sink::SinkError;

/// A change of a copy's manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ManifestUpdate {
    /// Its bytes were verified again. One that was corrupt counts again.
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
            Self::Verified(at) => (manifest.verified_at, manifest.corrupt_since) = (at, None),
            Self::Corrupt(at) => manifest.corrupt_since = manifest.corrupt_since.or(Some(at)),
            // A crash may have left the image of one that was pruned before: that time stays.
            Self::Pruned(at) => manifest.pruned_at = manifest.pruned_at.or(Some(at)),
        }
        let file = Manifest { written: Some(Written::over(bytes)), ..manifest.clone() }.to_bytes();
        (manifest, file)
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
    /// Its snapshot is on hold, so it is not pruned.
    #[error("its snapshot is on hold{}, by a mark in the archive", until_text(.0))]
    Held(HoldMark),
    /// The archive failed: either nothing changed, or the manifest is the new one.
    #[error(transparent)]
    Archive(#[from] StoreError),
}

fn until_text(mark: &HoldMark) -> String {
    mark.until.map_or_else(String::new, |until| format!(" until {until}"))
}

/// The first of these marks that keeps a copy from such an update.
pub(super) fn check_holds(
    update: ManifestUpdate,
    mut marks: impl Iterator<Item = HoldMark>,
) -> Result<(), UpdateError> {
    let ManifestUpdate::Pruned(now) = update else { return Ok(()) };
    marks.find(|mark| mark.counts_at(now)).map_or(Ok(()), |mark| Err(UpdateError::Held(mark)))
}

impl UpdateError {
    /// What the archive could not write, unless that was for want of space.
    pub(crate) fn failed_write(&self) -> Option<&SinkError> {
        match self {
            Self::Archive(error) => error.failed_write(),
            Self::Busy { .. } | Self::Changed { .. } | Self::Held(_) => None,
        }
    }
}
