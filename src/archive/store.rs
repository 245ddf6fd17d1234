//! Stores an image in all archives that lack it, by one download.

use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use crate::archive::layout::image_name;
use crate::archive::manifest::{
    ImageRecord, InstanceRecord, MANIFEST_VERSION, Manifest, SnapshotRecord, TemplateRecord,
};
use crate::archive::md5::Md5Sum;
use crate::archive::proof::VerifiedCopy;
use crate::archive::qcow2::{Qcow2, Qcow2Error};
use crate::archive::sink::{Sink, SinkError, Target, shown};
use crate::archive::transfer::download::{Download, DownloadError, Fetched, Output, Outputs, Progress};
use crate::policy::{ArchiveName, PolicyName};
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, ZoneName};

/// Longer names are cut in the manifest, and more label text is left out, so that it keeps its bound.
const NAME_CHARACTERS_MAX: usize = 4096;
const LABEL_BYTES_MAX: usize = 128 << 10;

/// What is to be stored, and what its manifest should know.
#[derive(Debug, Clone)]
pub struct ImageToStore {
    /// Where the snapshot is.
    pub zone: ZoneName,
    /// The snapshot, as it was listed.
    pub snapshot: Snapshot,
    /// Its instance, if it is still listed.
    pub instance: Option<Instance>,
    /// Who asks for it.
    pub policy: PolicyName,
    /// In which run.
    pub run_id: Uuid,
    /// The instance's template, where it is known.
    pub template: Option<TemplateRecord>,
}

impl ImageToStore {
    /// The instance that the snapshot is of.
    ///
    /// # Errors
    /// [`StoreError::NoInstance`] if the service does not say.
    pub fn instance_id(&self) -> Result<InstanceId, StoreError> {
        self.snapshot.instance_id.ok_or(StoreError::NoInstance(self.snapshot.id))
    }
}

/// Why a copy did not come about. Whatever was in the archive before is as it was.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It has no place in the archive.
    #[error(
        "store snapshot {0}: the service does not say which instance it is of, so it has no place in an archive"
    )]
    NoInstance(SnapshotId),
    /// Somebody else is at it.
    #[error("store {image}: it is being stored at this moment by another run")]
    Busy {
        /// The image.
        image: String,
    },
    /// A name that is taken.
    #[error("store: {} is in the way: it is not what the archive would make; move it away", shown(.path))]
    InTheWay {
        /// What is in the way.
        path: PathBuf,
    },
    /// This archive failed.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// It did not come in.
    #[error("download {image}")]
    Download {
        /// The image.
        image: String,
        /// Why; for all archives the same.
        #[source]
        source: Arc<DownloadError>,
    },
    /// After a wrong MD5, it did not come in anew.
    #[error(
        "download {image} anew, since its MD5 was {found} where the service gives {expected}{}", kept(.bad.as_ref())
    )]
    FetchAnew {
        /// The image.
        image: String,
        /// The file that was kept.
        bad: Option<PathBuf>,
        /// By the service.
        expected: Md5Sum,
        /// Of the bytes.
        found: Md5Sum,
        /// Why; for all archives the same.
        #[source]
        source: Arc<DownloadError>,
    },
    /// The bytes are not those that were exported, twice.
    #[error(
        "the MD5 of the image is {found} where the service gives {expected}, and was wrong before: it is no copy{}",
        kept(.bad.as_ref())
    )]
    ChecksumMismatch {
        /// The file that was kept.
        bad: Option<PathBuf>,
        /// By the service.
        expected: Md5Sum,
        /// Of the bytes.
        found: Md5Sum,
    },
    /// The service exported something that can't be used.
    #[error("verify {image}: its MD5 is right, but it is not a sound image")]
    Invalid {
        /// The image.
        image: String,
        /// Why; for all archives the same.
        #[source]
        source: Arc<Qcow2Error>,
    },
}

fn kept(bad: Option<&PathBuf>) -> String {
    bad.map_or_else(String::new, |bad| {
        format!(" (those bytes are kept as {} for you to look at)", shown(bad))
    })
}

impl StoreError {
    /// Whether the bytes were not those that the service's MD5 is of.
    pub fn is_checksum_mismatch(&self) -> bool {
        matches!(self, Self::ChecksumMismatch { .. } | Self::FetchAnew { .. })
    }
}

/// Brings an image into each of these archives and proves it. What one of them fails at does not keep the others from
/// it; an answer comes for each.
///
/// Dropped on the way, or after an error, nothing is published, and what can be resumed stays.
pub async fn store(
    image: &ImageToStore,
    begun: Vec<(ArchiveName, Box<dyn Sink>, Target)>,
    download: &Download<'_>,
) -> Vec<(ArchiveName, Result<VerifiedCopy, StoreError>)> {
    let exported_at = download.clock.now();
    let mut outputs = Outputs::default();
    let mut standings = Vec::new();
    for (archive, sink, standing) in begun {
        let resumable = standing.resumable.clone();
        standings.push((archive.clone(), standing));
        outputs.open.push(Output { archive, sink, resumable });
    }
    let proved = prove(&mut outputs, download).await;
    let mut stored = Vec::new();
    match proved {
        Ok((fetched, qcow2)) => {
            let now = download.clock.now();
            for Output { archive, sink, .. } in outputs.open {
                let published = match describe(image, &fetched, &qcow2, [exported_at, now]) {
                    Ok(manifest) => match sink.publish(manifest).await {
                        Ok(stored) => Ok(VerifiedCopy::new(&archive, &stored)),
                        Err(error) => Err(StoreError::Sink(error)),
                    },
                    Err(error) => {
                        sink.abandon().await;
                        Err(error)
                    }
                };
                stored.push((archive, published));
            }
        }
        Err(failure) => {
            for Output { archive, mut sink, .. } in outputs.open {
                if failure.is_useless() {
                    // What fails here fails in the next step as well.
                    let _ = sink.restart().await;
                }
                sink.abandon().await;
                let standing = standings.iter().find(|(name, _)| *name == archive);
                let error = standing.map(|(_, standing)| failure.of(standing));
                stored.extend(error.map(|error| (archive, Err(error))));
            }
        }
    }
    stored.extend(outputs.failed.into_iter().map(|(archive, error)| (archive, Err(StoreError::Sink(error)))));
    stored
}

/// Why no archive gets the image.
enum Unverified {
    Download(Arc<DownloadError>),
    /// The second download, after one with a wrong MD5.
    Anew(Arc<DownloadError>, Fetched),
    Mismatch(Fetched),
    Invalid(Arc<Qcow2Error>),
}

impl Unverified {
    /// Whether what came in must not be resumed.
    fn is_useless(&self) -> bool {
        match self {
            Self::Download(error) | Self::Anew(error, _) => matches!(**error, DownloadError::Unsteady(_)),
            Self::Mismatch(_) | Self::Invalid(_) => true,
        }
    }

    /// What it means for one archive.
    fn of(&self, standing: &Target) -> StoreError {
        let (image, bad) = (standing.image.clone(), standing.bad.clone());
        match self {
            Self::Download(source) => StoreError::Download { image, source: Arc::clone(source) },
            Self::Anew(source, Fetched { expected, md5, .. }) => {
                let (expected, found) = (*expected, *md5);
                StoreError::FetchAnew { image, bad, expected, found, source: Arc::clone(source) }
            }
            Self::Mismatch(Fetched { expected, md5, .. }) => {
                StoreError::ChecksumMismatch { bad, expected: *expected, found: *md5 }
            }
            Self::Invalid(source) => StoreError::Invalid { image, source: Arc::clone(source) },
        }
    }
}

/// Brings the image into the outputs, a second time if its MD5 was wrong, and looks what it is.
async fn prove(outputs: &mut Outputs, download: &Download<'_>) -> Result<(Fetched, Qcow2), Unverified> {
    let mut mismatch: Option<Fetched> = None;
    let fetched = loop {
        let fetched = match (download.fetch(outputs, mismatch.is_some()).await, mismatch.take()) {
            (Ok(fetched), None) => fetched,
            (Ok(fetched), Some(_)) if fetched.md5 == fetched.expected => fetched,
            (Ok(fetched), Some(_)) => {
                (download.progress)(Progress::ChecksumMismatch);
                let _ = outputs.keep_bad().await;
                return Err(Unverified::Mismatch(fetched));
            }
            (Err(error), None) => return Err(Unverified::Download(Arc::new(error))),
            (Err(error), Some(before)) => return Err(Unverified::Anew(Arc::new(error), before)),
        };
        if fetched.md5 == fetched.expected {
            break fetched;
        }
        (download.progress)(Progress::ChecksumMismatch);
        outputs.keep_bad().await.map_err(|error| Unverified::Download(Arc::new(error)))?;
        mismatch = Some(fetched);
    };
    (download.progress)(Progress::Verifying);
    match fetched.qcow2 {
        Ok(qcow2) => Ok((fetched, qcow2)),
        Err(error) => Err(Unverified::Invalid(Arc::new(error))),
    }
}

/// The manifest of an image that is proved.
fn describe(
    image: &ImageToStore,
    fetched: &Fetched,
    qcow2: &Qcow2,
    [exported_at, verified_at]: [Timestamp; 2],
) -> Result<Manifest, StoreError> {
    let instance_id = image.instance_id()?;
    let cut = |text: &str| -> String { text.chars().take(NAME_CHARACTERS_MAX).collect() };
    let mut warnings = Vec::new();
    let snapshot = &image.snapshot;
    let virtual_size = qcow2.virtual_size_bytes;
    if let Some(size_gib) = snapshot.size_gib.filter(|gib| gib.checked_mul(1 << 30) != Some(virtual_size)) {
        warnings.push(format!(
            "the disk in the image has {virtual_size} bytes, although the snapshot is listed with {size_gib} GiB"
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
    Ok(Manifest {
        version: MANIFEST_VERSION,
        zone: image.zone.clone(),
        snapshot: SnapshotRecord {
            id: snapshot.id,
            name: cut(&snapshot.name),
            created_at: snapshot.created_at,
            state: cut(snapshot.state.as_str()),
            size_gib: snapshot.size_gib,
        },
        instance: InstanceRecord {
            id: instance_id,
            name: image.instance.as_ref().map(|instance| cut(&instance.name)),
            labels,
        },
        image: ImageRecord {
            file: image_name(snapshot.created_at, snapshot.id),
            bytes: fetched.bytes,
            md5: fetched.md5,
            qcow2_version: Some(qcow2.version),
            virtual_size_bytes: Some(qcow2.virtual_size_bytes),
        },
        exported_at: Some(exported_at),
        verified_at,
        policy: Some(image.policy.to_string()),
        run_id: Some(image.run_id),
        program_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        template: image.template.clone(),
        warnings,
        pruned_at: None,
        corrupt_since: None,
    })
}
