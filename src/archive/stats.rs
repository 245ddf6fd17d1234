//! The sums of an archive, for metrics and status.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::archive::backend::Archive;
use crate::archive::catalogue::Catalogue;
use crate::text::chain;

/// The sums of an archive.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ArchiveStats {
    /// Whether it is there: readable, and by its marker the one that was used before, if any was.
    pub is_present: bool,
    /// Verified copies whose image is there.
    pub images: u64,
    /// The length of all these images in bytes.
    pub bytes: u64,
    /// Copies that were lost or damaged. An image that was never verified is none of them: the next export fetches it again.
    pub corrupt: u64,
    /// The oldest of the images' last verifications; none without an image.
    pub verified_at: Option<Timestamp>,
    /// Bytes that may still be written on its file system; none where that is unknown.
    pub free_bytes: Option<u64>,
    /// The length of what was overwritten or deleted, and is kept as noncurrent versions; none where the archive keeps none.
    pub noncurrent_bytes: Option<u64>,
    /// The reason if it can't be read; the sums are zero then.
    pub error: Option<String>,
}

impl ArchiveStats {
    /// Reads the whole archive, whichever it is. A failure is part of the result.
    pub async fn read(archive: &Archive) -> Self {
        let free_bytes = archive.free_bytes().await;
        match archive.catalogue().await {
            Ok(catalogue) => Self::of(&catalogue, free_bytes),
            Err(error) => Self { free_bytes, error: Some(chain(&error)), ..Self::default() },
        }
    }

    /// The sums of what was read.
    pub(crate) fn of(catalogue: &Catalogue, free_bytes: Option<u64>) -> Self {
        let images = || catalogue.unpruned().map(|copy| &copy.manifest);
        Self {
            is_present: true,
            images: images().count() as u64,
            bytes: images().map(|manifest| manifest.image.bytes).fold(0, u64::saturating_add),
            corrupt: catalogue.damaged().count() as u64,
            verified_at: images().map(|manifest| manifest.verified_at).min(),
            free_bytes,
            noncurrent_bytes: None,
            error: None,
        }
    }
}
