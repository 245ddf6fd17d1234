//! Stores an image in all archives that lack it, by one download.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use crate::archive::layout::CopyPaths;
use crate::archive::manifest::{
    ImageRecord, InstanceRecord, MANIFEST_VERSION, Manifest, SnapshotRecord, TemplateRecord, Written,
};
use crate::archive::md5::Md5Sum;
use crate::archive::proof::VerifiedCopy;
use crate::archive::qcow2::{Qcow2, Qcow2Error};
use crate::archive::transfer::connection::Download;
use crate::archive::transfer::download::Fetched;
use crate::archive::transfer::error::DownloadError;
use crate::archive::transfer::outputs::Outputs;
use crate::archive::transfer::progress::Progress;
use crate::archive::transfer::sink::{Output, SinkError, shown};
use crate::copies::CopyId;
use crate::policy::name::{ArchiveName, PolicyName};
use crate::snapshot::{Instance, Machine, Snapshot, SnapshotId, ZoneName};

/// Longer names are cut in the manifest, and longer label text is left out, so that it keeps its bound.
const NAME_CHARACTERS_MAX: usize = 4096;
const LABEL_BYTES_MAX: usize = 128 << 10;

/// The largest disk that the platform is documented to make a template of, in bytes (custom templates: 10 to 100 GB). The page is
/// old, so a larger one may work.
pub const TEMPLATE_VIRTUAL_MAX: u64 = 100 << 30;

/// A snapshot whose image is to be stored, with all that its manifest records.
#[derive(Debug, Clone)]
pub struct ImageToStore {
    /// The zone of the snapshot.
    pub zone: ZoneName,
    /// The snapshot, as it was listed.
    pub snapshot: Snapshot,
    /// Its instance, if it is still listed.
    pub instance: Option<Instance>,
    /// The policy that exports it; none for a manual command.
    pub policy: Option<PolicyName>,
    /// The run that exports it.
    pub run_id: Uuid,
    /// The instance's template, where it is known.
    pub template: Option<TemplateRecord>,
    /// How to build the instance again, where that is known.
    pub machine: Option<Machine>,
    /// The archives that may hold the instance's user data.
    pub user_data_in: BTreeSet<ArchiveName>,
    /// What is missing in the manifest and why, each a sentence.
    pub missing: Vec<String>,
}

impl ImageToStore {
    /// The snapshot, as the names of the files have it.
    ///
    /// # Errors
    /// [`StoreError::NoInstance`] if the service does not give its instance.
    pub(crate) fn id(&self) -> Result<CopyId, StoreError> {
        let snapshot = &self.snapshot;
        Ok(CopyId {
            zone: self.zone.clone(),
            instance_id: snapshot.instance_id.ok_or(StoreError::NoInstance(snapshot.id))?,
            created_at: snapshot.created_at,
            snapshot_id: snapshot.id,
        })
    }
}

/// Why an image was not stored. The archive is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It has no place in the archive.
    #[error(
        "store snapshot {0}: the service does not say which instance it is of, so it has no place in an archive"
    )]
    NoInstance(SnapshotId),
    /// Another run is storing it.
    #[error("store {image}: it is being stored at this moment by another run")]
    Busy {
        /// The image.
        image: String,
    },
    /// A name is taken.
    #[error("store: {} is in the way: the archive would not create such a thing there; move it away", shown(.path))]
    InTheWay {
        /// The file, folder or link.
        path: PathBuf,
    },
    /// This archive failed.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The image was not received, or is not the one that was exported.
    #[error("{} {image}{}", .reason.step(), kept(.bad.as_ref()))]
    Unverified {
        /// The image.
        image: String,
        /// The file in which bytes with a wrong MD5 were kept.
        bad: Option<PathBuf>,
        /// The same for all archives.
        #[source]
        reason: Arc<Unverified>,
    },
}

impl StoreError {
    /// What the archive could not write, unless that was for want of space.
    pub(crate) fn failed_write(&self) -> Option<&SinkError> {
        match self {
            Self::Sink(error) if !error.is_full() => Some(error),
            _ => None,
        }
    }

    /// Whether the archive lacks space.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self, Self::Sink(error) if error.is_full())
    }
}

fn kept(bad: Option<&PathBuf>) -> String {
    bad.map_or_else(String::new, |bad| {
        format!(" (bytes with a wrong MD5 are kept as {} for you to look at)", shown(bad))
    })
}

/// Why no archive gets the image.
#[derive(Debug, thiserror::Error)]
pub enum Unverified {
    /// The download failed.
    #[error(transparent)]
    Download(DownloadError),
    /// The second download failed, after one with a wrong MD5.
    #[error(
        "the first download had the MD5 {found} where the service gives {expected}, and the second failed"
    )]
    SecondDownload {
        /// By the service.
        expected: Md5Sum,
        /// Of the bytes.
        found: Md5Sum,
        /// Why the second failed.
        #[source]
        source: DownloadError,
    },
    /// The bytes are not those that were exported, twice.
    #[error("its MD5 is {found} where the service gives {expected}, and was wrong before: it is no copy")]
    Mismatch {
        /// By the service.
        expected: Md5Sum,
        /// Of the bytes.
        found: Md5Sum,
    },
    /// The service exported something that can't be used.
    #[error("its MD5 is right, but it is not a valid image")]
    Invalid(#[source] Qcow2Error),
}

impl Unverified {
    fn step(&self) -> &'static str {
        match self {
            Self::Download(_) | Self::SecondDownload { .. } => "download",
            Self::Mismatch { .. } | Self::Invalid(_) => "verify",
        }
    }

    /// Whether the bytes must not be resumed.
    fn is_useless(&self) -> bool {
        match self {
            Self::Download(error) | Self::SecondDownload { source: error, .. } => {
                // What can't be read back now could not be tomorrow, either.
                matches!(
                    error,
                    DownloadError::Unsteady(_) | DownloadError::Invalid(_) | DownloadError::ReadBack(_)
                )
            }
            Self::Mismatch { .. } | Self::Invalid(_) => true,
        }
    }

    fn has_wrong_md5(&self) -> bool {
        matches!(self, Self::SecondDownload { .. } | Self::Mismatch { .. })
    }
}

/// Downloads an image into each of these archives, and verifies it. An archive that fails does not keep the others from
/// their copy; there is a result for each.
///
/// If it is dropped before the end, or after an error, nothing is published, and the parts that can be resumed stay.
pub async fn store(
    image: &ImageToStore,
    outputs: Vec<Output>,
    download: &Download<'_>,
) -> Vec<(ArchiveName, Result<VerifiedCopy, StoreError>)> {
    let Ok(id) = image.id() else {
        let refused = |output: Output| (output.archive, Err(StoreError::NoInstance(image.snapshot.id)));
        return outputs.into_iter().map(refused).collect();
    };
    let exported_at = download.clock.now();
    let mut outputs = Outputs { open: outputs, failed: Vec::new() };
    let mut stored = Vec::new();
    match download_verified(&mut outputs, download).await {
        Ok((fetched, qcow2)) => {
            let manifest = manifest(image, &id, &fetched, &qcow2, [exported_at, download.clock.now()]);
            for Output { archive, sink, .. } in outputs.open {
                let mut manifest = manifest.clone();
                let machine = manifest.written.as_mut().and_then(|written| written.machine.as_mut());
                if let Some(machine) = machine.filter(|_| !image.user_data_in.contains(&archive)) {
                    machine.user_data = None;
                }
                let published = sink.publish(manifest).await;
                let copy = published.map(|manifest| VerifiedCopy::new(&archive, &manifest));
                stored.push((archive, copy.map_err(StoreError::Sink)));
            }
        }
        Err(reason) => {
            let reason = Arc::new(reason);
            for Output { archive, image, bad, mut sink, .. } in outputs.open {
                if reason.is_useless() {
                    // Should this fail, so will the next step.
                    let _ = sink.restart().await;
                }
                sink.abandon().await;
                let bad = bad.filter(|_| reason.has_wrong_md5());
                let reason = Arc::clone(&reason);
                stored.push((archive, Err(StoreError::Unverified { image, bad, reason })));
            }
        }
    }
    stored.extend(outputs.failed.into_iter().map(|(archive, error)| (archive, Err(StoreError::Sink(error)))));
    stored
}

/// Downloads the image, a second time if its MD5 was wrong, and checks that it is a valid image.
async fn download_verified(
    outputs: &mut Outputs,
    download: &Download<'_>,
) -> Result<(Fetched, Qcow2), Unverified> {
    let mut mismatch: Option<(Md5Sum, Md5Sum)> = None;
    let fetched = loop {
        let fetched = match (download.fetch(outputs, mismatch.is_some()).await, mismatch) {
            (Ok(fetched), _) => fetched,
            (Err(error), None) => return Err(Unverified::Download(error)),
            (Err(source), Some((expected, found))) => {
                return Err(Unverified::SecondDownload { expected, found, source });
            }
        };
        let (expected, found) = (fetched.expected, fetched.md5);
        if found == expected {
            break fetched;
        }
        (download.progress)(Progress::ChecksumMismatch);
        let kept = outputs.keep_bad().await;
        if mismatch.replace((expected, found)).is_some() {
            return Err(Unverified::Mismatch { expected, found });
        }
        kept.map_err(Unverified::Download)?;
    };
    (download.progress)(Progress::Verifying);
    match fetched.qcow2 {
        Ok(qcow2) => Ok((fetched, qcow2)),
        Err(error) => Err(Unverified::Invalid(error)),
    }
}

/// The manifest of an image that is verified.
fn manifest(
    image: &ImageToStore,
    id: &CopyId,
    fetched: &Fetched,
    qcow2: &Qcow2,
    [exported_at, verified_at]: [Timestamp; 2],
) -> Manifest {
    let cut = |text: &str| -> String { text.chars().take(NAME_CHARACTERS_MAX).collect() };
    let mut warnings = image.missing.clone();
    let snapshot = &image.snapshot;
    let virtual_size = qcow2.virtual_size_bytes;
    if let Some(size_gib) = snapshot.size_gib.filter(|gib| gib.checked_mul(1 << 30) != Some(virtual_size)) {
        warnings.push(format!(
            "the disk in the image has {virtual_size} bytes, although the snapshot is listed with {size_gib} GiB"
        ));
    }
    if virtual_size > TEMPLATE_VIRTUAL_MAX {
        warnings.push(format!(
            "the disk has {} GiB, and templates are documented for at most {} GiB: a restore to a file is possible, one to a \
             template or to an instance perhaps not",
            virtual_size.div_ceil(1 << 30),
            TEMPLATE_VIRTUAL_MAX >> 30
        ));
    }
    if qcow2.dirty {
        warnings
            .push("the image was not closed properly: `qemu-img check -r all` repairs its copy".to_owned());
    }
    let mut labels = image.instance.as_ref().map(|instance| instance.labels.clone()).unwrap_or_default();
    if labels.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>() > LABEL_BYTES_MAX {
        labels.clear();
        warnings.push("the instance's labels are left out, since they are too long".to_owned());
    }
    let written = Written {
        run_id: Some(image.run_id),
        program_version: Some(env!("CARGO_PKG_VERSION")),
        machine: image.machine.clone(),
        made_of: None,
    };
    Manifest {
        version: MANIFEST_VERSION,
        zone: image.zone.clone(),
        snapshot: SnapshotRecord {
            id: snapshot.id,
            name: cut(&snapshot.name).into(),
            created_at: snapshot.created_at,
            state: cut(snapshot.state.as_str()).into(),
            size_gib: snapshot.size_gib,
            application_consistent: snapshot.application_consistent,
        },
        instance: Arc::new(InstanceRecord {
            id: id.instance_id,
            name: image.instance.as_ref().map(|instance| cut(&instance.name)),
            labels,
        }),
        image: ImageRecord {
            file: CopyPaths::new(Path::new(""), id).image_name().into(),
            bytes: fetched.bytes,
            md5: fetched.md5,
            qcow2_version: Some(qcow2.version),
            virtual_size_bytes: Some(qcow2.virtual_size_bytes),
            etag: None,
            version_id: None,
        },
        exported_at: Some(exported_at),
        verified_at,
        policy: image.policy.as_ref().map(|name| name.as_str().into()),
        template: image.template.clone().map(Arc::new),
        warnings,
        pruned_at: None,
        corrupt_since: None,
        written: Some(Box::new(written)),
    }
}
