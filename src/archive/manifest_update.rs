//! What is found out about a copy later, or done to it: a new manifest in the place of the old one.

use std::error::Error;

use jiff::Timestamp;

use crate::archive::manifest::Manifest;

/// What becomes of a copy that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ManifestUpdate {
    /// Its bytes were proved again then.
    Verified(Timestamp),
    /// Its bytes were found to differ then: it counts no more. The image stays, for somebody to look at.
    Corrupt(Timestamp),
    /// The archive's retention removes its image. First the manifest is marked, and so the copy counts as before.
    Pruned(Timestamp),
}

impl ManifestUpdate {
    /// The new manifest.
    pub(super) fn of(self, manifest: &Manifest) -> Manifest {
        let mut manifest = manifest.clone();
        match self {
            Self::Verified(at) => manifest.verified_at = at,
            Self::Corrupt(at) => manifest.corrupt_since = Some(at),
            // One whose image was left by a crash is not pruned a second time.
            Self::Pruned(at) => manifest.pruned_at = manifest.pruned_at.or(Some(at)),
        }
        manifest
    }
}

/// A copy could not be amended.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// Somebody else is at it.
    #[error("{image}: another process works on it at this moment; the next time is soon enough")]
    Busy {
        /// The image.
        image: String,
    },
    /// It is not what was looked at any more. Nothing was written.
    #[error("{image}: it changed meanwhile, so nothing was noted; look again")]
    Changed {
        /// The image.
        image: String,
    },
    /// The archive refused something: either nothing changed, or the manifest is the new one.
    #[error(transparent)]
    Archive(#[from] Box<dyn Error + Send + Sync>),
}
