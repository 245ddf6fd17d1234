//! Stores: exported images, each of which counts as a copy only once it is proved.
//!
//! An **image** is the qcow2 file that an export of a snapshot gives. A **copy** is an image in an archive with
//! its **manifest** beside it. It is **verified**: the MD5 of every byte is the one that the API gave, the
//! length fits, and the file reads as a sound qcow2 image. The manifest is written last, so there is never one
//! beside an image that is not proved, whenever the program or the machine stops.
//!
//! The way of an image: [`source`] gives its bytes, [`download`] brings them in and hands them to the hash ([`md5`]), to
//! [`qcow2`], which reads its structure, and to every archive's end ([`sink`]), each of which works beside the others
//! (`lane`); [`store`] has it proved and published under the names of `layout` with a [`manifest`]. An archive is a folder
//! ([`local`], whose `journal` says what can be resumed) or stands in a bucket ([`s3`]).
//! [`copy_reader`] reads a copy's bytes again and verifies them, for a file or another archive.
//! [`catalogue`] reads an archive back, and [`facts`] adds it up: there is no database beside it. [`verify`] proves copies
//! again, and [`amend`] writes down what becomes of one. [`proof`] is the value
//! without which a snapshot whose export is required is not deleted; nothing outside of this room can make one.
//!
//! Left to others: asking the service for an export and talking HTTP (`run` makes a source of the client), and
//! which snapshots need a copy (`retention`).

pub mod catalogue;
pub mod copy_reader;
mod journal;
mod layout;
pub mod local;
pub mod manifest;
pub mod manifest_update;
pub mod md5;
pub mod proof;
pub mod qcow2;
pub mod s3;
pub mod sink;
pub mod source;
pub mod stats;
pub mod store;
#[cfg(test)]
pub(crate) mod testing;
pub mod transfer;
pub mod verify;

use std::error::Error;

use crate::archive::catalogue::{Catalogue, StoredCopy};
use crate::archive::local::LocalArchive;
use crate::archive::manifest_update::{ManifestUpdate, UpdateError};
use crate::archive::s3::{ImageOf, S3Archive};
use crate::archive::sink::{Begin, SinkError};
use crate::archive::store::{ImageToStore, StoreError};
use crate::policy::ArchiveName;

/// An archive of the configuration.
#[derive(Debug, Clone)]
pub enum Archive {
    /// In a folder of this machine.
    Local(LocalArchive),
    /// In a bucket.
    S3(S3Archive),
}

/// An archive can't be read. It says what was tried, on what, and what to do.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct ArchiveError(Box<dyn Error + Send + Sync>);

impl Archive {
    /// Its name.
    pub fn name(&self) -> &ArchiveName {
        match self {
            Self::Local(archive) => archive.name(),
            Self::S3(archive) => archive.name(),
        }
    }

    /// What is there.
    ///
    /// # Errors
    /// [`ArchiveError`] if it can't be read; one that is not there yet holds nothing.
    pub async fn catalogue(&self) -> Result<Catalogue, ArchiveError> {
        match self {
            Self::Local(archive) => archive.catalogue().await.map_err(|error| ArchiveError(error.into())),
            Self::S3(archive) => archive.catalogue().await.map_err(|error| ArchiveError(error.into())),
        }
    }

    /// Makes ready to store an image. One that is, or was, there as a verified copy is not stored again.
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::Busy`] while another stores it.
    pub async fn begin(&self, image: &ImageToStore) -> Result<Begin, StoreError> {
        match self {
            Self::Local(archive) => archive.begin(image).await,
            Self::S3(archive) => {
                let of = ImageOf {
                    zone: image.zone.clone(),
                    instance_id: image.instance_id()?,
                    created_at: image.snapshot.created_at,
                    snapshot_id: image.snapshot.id,
                };
                archive.begin(&of).await.map_err(|error| {
                    if error.is_busy() {
                        return StoreError::Busy { image: archive.place() };
                    }
                    let doing = format!("begin to store in {}", archive.place());
                    StoreError::Sink(SinkError::Remote { doing, source: error.into() })
                })
            }
        }
    }
}

impl Archive {
    /// Writes down what became of a copy, as long as it is still the one that `copy` was read as; removes the image of one
    /// that is pruned.
    ///
    /// # Errors
    /// [`UpdateError`].
    pub async fn update_manifest(&self, copy: &StoredCopy, what: ManifestUpdate) -> Result<(), UpdateError> {
        match self {
            Self::Local(archive) => archive.update_manifest(copy, what).await,
            Self::S3(archive) => archive.update_manifest(copy, what).await,
        }
    }
}

/// Whether there is no space left, on the disk or in a quota.
fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}
