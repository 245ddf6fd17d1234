//! An archive of the configuration, of whichever kind.

use std::path::PathBuf;

use jiff::Timestamp;
use uuid::Uuid;

use crate::archive::catalogue::{Catalogue, ImageHead, Leftover, StoredCopy};
use crate::archive::layout::HoldMark;
use crate::archive::local::LocalArchive;
use crate::archive::manifest_update::{ManifestUpdate, UpdateError};
use crate::archive::marker::{MARKER_FILE, Marker, MarkerProblem, ProbeSteps};
use crate::archive::restic::archive::ResticArchive;
use crate::archive::restic::error::ResticError;
use crate::archive::s3::archive::S3Archive;
use crate::archive::s3::error::S3Error;
use crate::archive::s3::versions::Versions;
use crate::archive::store::{ImageToStore, StoreError};
use crate::archive::transfer::sink::{Begin, SinkError, shown};
use crate::archive::transfer::source::ImageSource;
use crate::copies::CopyId;
use crate::policy::name::ArchiveName;
use crate::snapshot::SnapshotId;

/// An archive. Clones are one archive.
#[derive(Debug, Clone)]
pub enum Archive {
    /// In a folder of this machine.
    Local(LocalArchive),
    /// In a bucket.
    S3(S3Archive),
    /// In a repository of restic.
    Restic(ResticArchive),
}

/// An archive can't be read, so its content is unknown.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// One in a folder.
    #[error("read archive `{archive}` in {}", shown(.path))]
    Local {
        /// The archive.
        archive: ArchiveName,
        /// Its folder.
        path: PathBuf,
        /// The error of the disk.
        #[source]
        source: std::io::Error,
    },
    /// One in a bucket.
    #[error(transparent)]
    S3(#[from] S3Error),
    /// One in a repository of restic.
    #[error(transparent)]
    Restic(#[from] ResticError),
}

impl Archive {
    /// The name by which policies refer to it.
    pub fn name(&self) -> &ArchiveName {
        match self {
            Self::Local(archive) => archive.name(),
            Self::S3(archive) => archive.name(),
            Self::Restic(archive) => archive.name(),
        }
    }

    /// Reads all that the archive holds.
    ///
    /// # Errors
    /// [`ArchiveError`] if it can't be read; one that does not exist yet is empty.
    pub async fn catalogue(&self) -> Result<Catalogue, ArchiveError> {
        match self {
            Self::Local(archive) => archive.catalogue().await.map_err(|source| {
                let (archive, path) = (archive.name().clone(), archive.path().to_owned());
                ArchiveError::Local { archive, path, source }
            }),
            Self::S3(archive) => Ok(archive.catalogue().await?),
            Self::Restic(archive) => Ok(archive.catalogue().await?),
        }
    }

    /// The folder, or the bucket and the prefix, for people.
    pub fn place(&self) -> String {
        match self {
            Self::Local(archive) => shown(archive.path()),
            Self::S3(archive) => archive.place(),
            Self::Restic(archive) => archive.place(),
        }
    }

    /// The marker's place, for people.
    pub fn marker_place(&self) -> String {
        match self {
            Self::Local(archive) => shown(&archive.path().join(MARKER_FILE)),
            Self::S3(archive) => format!("{}{MARKER_FILE}", archive.place()),
            Self::Restic(archive) => format!("{} in {}", MARKER_FILE, archive.place()),
        }
    }

    /// Reads the marker alone.
    ///
    /// # Errors
    /// [`ArchiveError`] if the archive can't be read.
    pub async fn marker(&self) -> Result<Result<Option<Marker>, MarkerProblem>, ArchiveError> {
        Ok(match self {
            Self::Local(archive) => archive.marker().await,
            Self::S3(archive) => archive.marker().await?,
            Self::Restic(archive) => archive.marker().await?,
        })
    }

    /// Writes the marker, whole or not at all; a folder that is missing is created.
    ///
    /// # Errors
    /// [`SinkError`].
    pub async fn write_marker(&self, marker: &Marker) -> Result<(), SinkError> {
        match self {
            Self::Local(archive) => archive
                .write_marker(marker)
                .await
                .map_err(|error| SinkError::disk("write", &archive.path().join(MARKER_FILE), error)),
            Self::S3(archive) => archive
                .write_marker(marker)
                .await
                .map_err(|error| error.into_sink_error(format!("write the marker of {}", archive.place()))),
            Self::Restic(archive) => archive
                .write_marker(marker)
                .await
                .map_err(|error| error.into_sink_error(format!("write the marker of {}", archive.place()))),
        }
    }

    /// Writes a small file beside the marker, whole or not at all; in a folder only if it has the marker of the archive with
    /// this id: without its disk it is another folder.
    ///
    /// # Errors
    /// [`SinkError`].
    pub(crate) async fn write_beside_marker(
        &self,
        id: Uuid,
        name: &str,
        bytes: Vec<u8>,
    ) -> Result<(), SinkError> {
        match self {
            Self::Local(archive) => archive
                .write_beside_marker(id, name, bytes)
                .await
                .map_err(|error| SinkError::disk("write", &archive.path().join(name), error)),
            Self::S3(archive) => archive
                .write_beside_marker(name, bytes)
                .await
                .map_err(|error| error.into_sink_error(format!("write {name} in {}", archive.place()))),
            Self::Restic(archive) => archive
                .write_beside_marker(name, bytes)
                .await
                .map_err(|error| error.into_sink_error(format!("write {name} in {}", archive.place()))),
        }
    }

    /// Reads a small file beside the marker; none if there is none.
    ///
    /// # Errors
    /// [`ArchiveError`] if the archive can't be read.
    pub(crate) async fn read_beside_marker(
        &self,
        name: &str,
        max: usize,
    ) -> Result<Option<Vec<u8>>, ArchiveError> {
        match self {
            Self::Local(archive) => archive.read_beside_marker(name, max).await.map_err(|source| {
                let (archive, path) = (archive.name().clone(), archive.path().to_owned());
                ArchiveError::Local { archive, path, source }
            }),
            Self::S3(archive) => Ok(archive.read_beside_marker(name, max).await?),
            Self::Restic(archive) => Ok(archive.read_beside_marker(name, max).await?),
        }
    }

    /// Finds out whether the archive can be written to, read and deleted from, by a small file that no catalogue lists. It is
    /// for an archive that is known to be there.
    pub(crate) async fn probe(&self) -> ProbeSteps {
        match self {
            Self::Local(archive) => archive.probe().await,
            Self::S3(archive) => archive.probe().await,
            Self::Restic(archive) => archive.probe().await,
        }
    }

    /// Prepares to store an image. One of which the archive has, or had, a verified copy is not stored again.
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::Busy`] while another process stores it.
    pub async fn begin(&self, image: &ImageToStore) -> Result<Begin, StoreError> {
        self.begin_copy(&image.id()?).await
    }

    /// Prepares to store the image of a copy that another archive has.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub(crate) async fn begin_copy(&self, id: &CopyId) -> Result<Begin, StoreError> {
        match self {
            Self::Local(archive) => archive.begin(id).await,
            Self::S3(archive) => archive.begin(id).await.map_err(|error| {
                if error.is_busy() {
                    return StoreError::Busy { image: archive.place() };
                }
                let doing = format!("begin to store in {}", archive.place());
                StoreError::Sink(error.into_sink_error(doing))
            }),
            Self::Restic(archive) => archive.begin(id).await.map_err(|error| {
                if error.is_busy() {
                    return StoreError::Busy { image: archive.place() };
                }
                let doing = format!("begin to store in {}", archive.place());
                StoreError::Sink(error.into_sink_error(doing))
            }),
        }
    }

    /// Whether a copy of the catalogue still counts.
    ///
    /// # Errors
    /// [`ArchiveError`] if the archive can't be read.
    pub async fn has(&self, copy: &StoredCopy) -> Result<bool, ArchiveError> {
        match self {
            Self::Local(archive) => Ok(archive.has(copy).await),
            Self::S3(archive) => Ok(archive.has(copy).await?),
            Self::Restic(archive) => Ok(archive.has(copy).await?),
        }
    }

    /// What the archive says of a copy's image without giving its bytes; none if there is no image.
    ///
    /// # Errors
    /// [`ArchiveError`] if the archive can't be read.
    pub(crate) async fn head(&self, copy: &StoredCopy) -> Result<Option<ImageHead>, ArchiveError> {
        match self {
            Self::Local(archive) => archive.head(copy).await.map_err(|source| {
                let (archive, path) = (archive.name().clone(), archive.path().to_owned());
                ArchiveError::Local { archive, path, source }
            }),
            Self::S3(archive) => Ok(archive.head(copy).await?),
            Self::Restic(archive) => Ok(archive.head(copy).await?),
        }
    }

    /// Updates the manifest of a copy, if it is still the one in `copy`; removes the image of one that is pruned.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn update_manifest(
        &self,
        copy: &StoredCopy,
        update: ManifestUpdate,
    ) -> Result<(), UpdateError> {
        match self {
            Self::Local(archive) => archive.update_manifest(copy, update).await,
            Self::S3(archive) => archive.update_manifest(copy, update).await,
            Self::Restic(archive) => archive.update_manifest(copy, update).await,
        }
    }

    /// Removes the manifest of a pruned copy, if it is still the one in `copy`, and its image is not there.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub(crate) async fn forget_pruned(&self, copy: &StoredCopy) -> Result<(), UpdateError> {
        match self {
            Self::Local(archive) => archive.forget_pruned(copy).await,
            Self::S3(archive) => archive.forget_pruned(copy).await,
            Self::Restic(archive) => archive.forget_pruned(copy).await,
        }
    }

    /// Removes the manifest of a pruned copy for which no newer one stands any more: it would keep the image from being stored again.
    /// Nothing is done if `catalogue` has no such copy of the snapshot, or if it has changed since.
    ///
    /// # Errors
    /// [`UpdateError`], but for [`UpdateError::Changed`].
    pub(crate) async fn forget_pruned_without_newer(
        &self,
        catalogue: &Catalogue,
        snapshot: SnapshotId,
    ) -> Result<(), UpdateError> {
        let mut pruned = catalogue.pruned_without_newer();
        let Some(copy) = pruned.find(|copy| copy.manifest.snapshot.id == snapshot) else { return Ok(()) };
        let forgotten = match self {
            Self::S3(archive) => archive.forget_to_store_again(copy).await,
            Self::Local(_) | Self::Restic(_) => self.forget_pruned(copy).await,
        };
        match forgotten {
            Err(UpdateError::Changed { .. }) => Ok(()),
            done => done,
        }
    }

    /// Marks a hold on a copy's snapshot, in the place of an earlier one of the same state directory. `text` is for people who
    /// open the file. False if the copy has no image any more.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub(crate) async fn mark_hold(
        &self,
        id: &CopyId,
        mark: HoldMark,
        text: Vec<u8>,
    ) -> Result<bool, UpdateError> {
        match self {
            Self::Local(archive) => archive.mark_hold(id, mark, text).await,
            Self::S3(archive) => archive.mark_hold(id, mark, text).await,
            Self::Restic(archive) => archive.mark_hold(id, mark, text).await,
        }
    }

    /// Removes the marks of holds on a copy's snapshot that this state directory put there, or all; how many.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub(crate) async fn remove_holds(&self, id: &CopyId, of: Option<Uuid>) -> Result<usize, UpdateError> {
        match self {
            Self::Local(archive) => archive.remove_holds(id, of).await,
            Self::S3(archive) => archive.remove_holds(id, of).await,
            Self::Restic(archive) => archive.remove_holds(id, of).await,
        }
    }

    /// What interrupted exports left.
    ///
    /// # Errors
    /// [`ArchiveError`] if the archive can't be read.
    pub async fn leftovers(&self) -> Result<Vec<Leftover>, ArchiveError> {
        match self {
            Self::Local(archive) => Ok(archive.leftovers().await),
            Self::S3(archive) => Ok(archive.leftovers().await?),
            Self::Restic(archive) => Ok(archive.leftovers().await?),
        }
    }

    /// Removes the leftovers that no export will use. Returns those that were removed.
    ///
    /// # Errors
    /// [`SinkError`]; some may have been removed then.
    pub(crate) async fn remove_leftovers(&self) -> Result<Vec<Leftover>, SinkError> {
        match self {
            Self::Local(archive) => {
                let (removed, failure) = archive.remove_leftovers().await;
                failure.map_or(Ok(removed), Err)
            }
            Self::S3(archive) => archive
                .remove_leftovers()
                .await
                .map_err(|error| error.into_sink_error("abort abandoned uploads".to_owned())),
            Self::Restic(archive) => archive
                .remove_leftovers()
                .await
                .map_err(|error| error.into_sink_error("free the space of deleted images".to_owned())),
        }
    }

    /// Removes a copy that the archive says to be corrupt, its manifest included, if that is still the one in `copy`.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub(crate) async fn remove_corrupt(&self, copy: &StoredCopy) -> Result<(), UpdateError> {
        match self {
            Self::Local(archive) => archive.remove_corrupt(copy).await,
            Self::S3(archive) => archive.remove_corrupt(copy).await,
            Self::Restic(archive) => archive.remove_corrupt(copy).await,
        }
    }

    /// The bytes of a copy's manifest, with all that later versions wrote there; none if it is not the one in `copy` any more.
    ///
    /// # Errors
    /// [`ArchiveError`] if the archive can't be read.
    pub(crate) async fn manifest_bytes(&self, copy: &StoredCopy) -> Result<Option<Vec<u8>>, ArchiveError> {
        match self {
            Self::Local(archive) => Ok(archive.manifest_bytes(copy).await),
            Self::S3(archive) => Ok(archive.manifest_bytes(copy).await?),
            Self::Restic(archive) => Ok(archive.manifest_bytes(copy).await?),
        }
    }

    /// The bytes of a copy, for reading it again.
    pub fn image(&self, copy: &StoredCopy) -> Box<dyn ImageSource> {
        match self {
            Self::Local(archive) => Box::new(archive.image(copy)),
            Self::S3(archive) => Box::new(archive.image(copy)),
            Self::Restic(archive) => Box::new(archive.image(copy)),
        }
    }

    /// Until when what is kept now is locked; none where nothing is.
    pub(crate) fn lock_until(&self, now: Timestamp) -> Option<Timestamp> {
        match self {
            Self::Local(_) | Self::Restic(_) => None,
            Self::S3(archive) => archive.lock_until(now),
        }
    }

    /// Locks a copy at least until then, so that its bytes cannot be deleted before. What is locked for longer stays so.
    ///
    /// # Errors
    /// [`ArchiveError`]; a part of it may be locked by then.
    pub(crate) async fn lock_copy(&self, copy: &StoredCopy, until: Timestamp) -> Result<(), ArchiveError> {
        match self {
            Self::Local(_) | Self::Restic(_) => Ok(()),
            Self::S3(archive) => Ok(archive.lock_copy(copy, until).await?),
        }
    }

    /// Keeps anybody from deleting the bytes of a copy, or ends that, where the archive locks its copies.
    ///
    /// # Errors
    /// [`ArchiveError`].
    pub(crate) async fn set_legal_hold(&self, copy: &StoredCopy, is_on: bool) -> Result<(), ArchiveError> {
        match self {
            Self::Local(_) | Self::Restic(_) => Ok(()),
            Self::S3(archive) => Ok(archive.set_legal_hold(copy, is_on).await?),
        }
    }

    /// What the archive keeps of files that were overwritten or deleted; none where it keeps nothing. `asked` are copies of
    /// which it is to be said how much is left.
    ///
    /// # Errors
    /// [`ArchiveError`] if the archive can't be read.
    pub(crate) async fn versions(&self, asked: &[&StoredCopy]) -> Result<Option<Versions>, ArchiveError> {
        match self {
            Self::Local(_) | Self::Restic(_) => Ok(None),
            Self::S3(archive) => Ok(archive.versions(asked).await?),
        }
    }

    /// Deletes what is left of copies that the retention deleted, where the archive's `noncurrent` says so and no lock keeps it.
    ///
    /// # Errors
    /// [`ArchiveError`]; what was not deleted is found the next time.
    pub(crate) async fn delete_noncurrent(&self) -> Result<(), ArchiveError> {
        match self {
            Self::Local(_) | Self::Restic(_) => Ok(()),
            Self::S3(archive) => Ok(archive.delete_noncurrent().await?),
        }
    }

    /// Whether copies share their data, so that a damage of one may be one of others.
    pub(crate) fn shares_data(&self) -> bool {
        matches!(self, Self::Restic(_))
    }

    /// Bytes that may still be written, as far as the archive can say: a bucket has no limit of its own.
    pub(crate) async fn free_bytes(&self) -> Option<u64> {
        match self {
            Self::Local(archive) => archive.free_bytes().await,
            Self::S3(_) => None,
            Self::Restic(archive) => archive.free_bytes().await,
        }
    }
}
