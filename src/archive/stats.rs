//! What an archive adds up to, for metrics and status.

use std::error::Error;
use std::io;
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;

use crate::archive::Archive;
use crate::archive::catalogue::{Catalogue, ProblemKind};
use crate::disk::{Disk, blocking};
use crate::text::chain;

/// What an archive adds up to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ArchiveStats {
    /// Verified copies whose image is there.
    pub images: u64,
    /// The length of all these images in bytes.
    pub bytes: u64,
    /// Copies that were lost or damaged: what looks like one of ours and can't be relied on. An image that was never
    /// proved is none of them: the next export fetches it anew.
    pub corrupt: u64,
    /// When the image that was not proved for longest was last proved; none without an image.
    pub verified_at: Option<Timestamp>,
    /// Bytes that may still be written on its file system; none if that can't be told.
    pub free_bytes: Option<u64>,
    /// Why it can't be read, if so; the sums are zero then.
    pub error: Option<String>,
}

impl ArchiveStats {
    /// Reads the whole archive and adds up what it holds. What goes wrong stands in the facts.
    pub async fn read(archive: &Archive) -> Self {
        let free_bytes = match archive {
            Archive::Local(local) => {
                let (disk, path) = (Arc::clone(&local.disk), local.path.clone());
                blocking(move || free_bytes(&*disk, &path)).await
            }
            // A bucket has no end that anybody tells.
            Archive::S3(_) => None,
        };
        Self::of(archive.catalogue().await, free_bytes)
    }

    /// Adds up what an archive holds, or says why it can't be read.
    pub(super) fn of<E: Error + 'static>(catalogue: Result<Catalogue, E>, free_bytes: Option<u64>) -> Self {
        let catalogue = match catalogue {
            Ok(catalogue) => catalogue,
            Err(error) => return Self { free_bytes, error: Some(chain(&error)), ..Self::default() },
        };
        let there = || {
            let copies = catalogue.copies().iter().map(|copy| &copy.manifest);
            copies.filter(|manifest| manifest.pruned_at.is_none())
        };
        let corrupt = catalogue.problems().iter().filter(|problem| problem.what != ProblemKind::NoManifest);
        Self {
            images: there().count() as u64,
            bytes: there().map(|manifest| manifest.image.bytes).fold(0, u64::saturating_add),
            corrupt: corrupt.count() as u64,
            verified_at: there().map(|manifest| manifest.verified_at).min(),
            free_bytes,
            error: None,
        }
    }
}

/// Of the archive's folder, or of the nearest one above it while it is not made yet.
fn free_bytes(disk: &dyn Disk, path: &Path) -> Option<u64> {
    for folder in path.ancestors() {
        match disk.free_bytes(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            answer => return answer.ok(),
        }
    }
    None
}
