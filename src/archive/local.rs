//! An archive in a folder of this machine.
//!
//! While an image comes in it is a `.part`, which nothing lists. When it is proved, its bytes are synced, it
//! gets its name, the `.md5` and last the manifest are put beside it, and the folder is synced: stopped at any
//! moment, there is a verified copy or none.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use crate::archive::catalogue::{self, Catalogue};
use crate::archive::download::{Download, DownloadError, Fetched, Progress, expected_md5};
use crate::archive::is_full;
use crate::archive::layout::Place;
use crate::archive::manifest::{
    ImageRecord, InstanceRecord, MANIFEST_VERSION, Manifest, SnapshotRecord, TemplateRecord,
};
use crate::archive::md5::Md5Sum;
use crate::archive::proof::VerifiedCopy;
use crate::archive::qcow2::{self, Qcow2, Qcow2Error};
use crate::archive::source::ImageSource;
use crate::clock::Clock;
use crate::disk::{Access, Disk, DiskFile, DiskLock, Kind, Open, blocking, create_folders, replace_file};
use crate::policy::{ArchiveName, PolicyName};
use crate::randomness::Randomness;
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, ZoneName};
use crate::text::printable;

/// Longer names are cut in the manifest, and more label text is left out, so that it keeps its bound.
const NAME_CHARACTERS_MAX: usize = 4096;
const LABEL_BYTES_MAX: usize = 128 << 10;

/// An archive in a folder.
#[derive(Debug, Clone)]
pub struct LocalArchive {
    name: ArchiveName,
    pub(super) path: PathBuf,
    pub(super) disk: Arc<dyn Disk>,
    clock: Arc<dyn Clock>,
    randomness: Arc<dyn Randomness>,
}

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

/// How to store.
#[derive(Debug, Clone, Copy)]
pub struct StoreOptions {
    /// So long without a byte, and the download goes on over a new connection.
    pub stall_timeout: Duration,
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
    #[error("store {}: it is being stored at this moment by another run", shown(.path))]
    Busy {
        /// The image.
        path: PathBuf,
    },
    /// A name that is taken.
    #[error("store: {} is in the way: it is not what the archive would make; move it away", shown(.path))]
    InTheWay {
        /// What is in the way.
        path: PathBuf,
    },
    /// It ran full on the way.
    #[error("{doing} {}: the file system is full: make room there, or move the archive to a larger one", shown(.path))]
    Full {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
    /// The disk refused something.
    #[error("{doing} {}", shown(.path))]
    Disk {
        /// What was tried.
        doing: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
    /// It did not come in.
    #[error("download {}", shown(.path))]
    Download {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: DownloadError,
    },
    /// After a wrong MD5, it did not come in anew.
    #[error(
        "download {} anew, since its MD5 was {found} where the service gives {expected} (those bytes are kept as {})",
        shown(.path), shown(.bad)
    )]
    FetchAnew {
        /// The image.
        path: PathBuf,
        /// The file that was kept.
        bad: PathBuf,
        /// By the service.
        expected: Md5Sum,
        /// Of the bytes.
        found: Md5Sum,
        /// Why.
        #[source]
        source: DownloadError,
    },
    /// The bytes are not those that were exported, twice.
    #[error(
        "the MD5 of the image is {found} where the service gives {expected}, and was wrong before: it is kept as {} \
         for you to look at, and is no copy",
        shown(.bad)
    )]
    ChecksumMismatch {
        /// The file that was kept.
        bad: PathBuf,
        /// By the service.
        expected: Md5Sum,
        /// Of the bytes.
        found: Md5Sum,
    },
    /// The file has not the length that came in.
    #[error("verify {}: it has {found} bytes on disk where {expected} came in", shown(.path))]
    Length {
        /// The image.
        path: PathBuf,
        /// In bytes.
        expected: u64,
        /// In bytes.
        found: u64,
    },
    /// The service exported something that can't be used.
    #[error("verify {}: its MD5 is right, but it is not a sound image", shown(.path))]
    Unsound {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: Qcow2Error,
    },
}

fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy()).into_owned()
}

impl StoreError {
    /// Whether the bytes were not those that the service's MD5 is of.
    pub fn is_checksum_mismatch(&self) -> bool {
        matches!(self, Self::ChecksumMismatch { .. } | Self::FetchAnew { .. })
    }
}

/// An archive that can't be read: nothing is known of what it holds.
#[derive(Debug, thiserror::Error)]
#[error("read archive `{archive}` in {}", shown(.path))]
pub struct ArchiveError {
    archive: ArchiveName,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl LocalArchive {
    /// The archive `name` in the folder `path`, which is made when something is first stored.
    pub fn new(
        name: ArchiveName,
        path: PathBuf,
        disk: Arc<dyn Disk>,
        clock: Arc<dyn Clock>,
        randomness: Arc<dyn Randomness>,
    ) -> Self {
        Self { name, path, disk, clock, randomness }
    }

    /// Its name.
    pub fn name(&self) -> &ArchiveName {
        &self.name
    }

    /// What is there.
    ///
    /// # Errors
    /// [`ArchiveError`] if the archive's folder can't be read; one that is not there holds nothing.
    pub async fn catalogue(&self) -> Result<Catalogue, ArchiveError> {
        let (disk, name, path) = (Arc::clone(&self.disk), self.name.clone(), self.path.clone());
        blocking(move || {
            catalogue::read(&*disk, &name, &path).map_err(|source| ArchiveError {
                archive: name,
                path,
                source,
            })
        })
        .await
    }

    /// Stores an image and proves it. One that is, or was, in the archive as a verified copy is not fetched
    /// again; anything else under its name is replaced once the new one is proved.
    ///
    /// # Errors
    /// [`StoreError`]: nothing was published then. Dropped on the way, it leaves at most a `.part`, which the
    /// next one replaces.
    pub async fn store(
        &self,
        image: &ImageToStore,
        source: &dyn ImageSource,
        options: &StoreOptions,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<VerifiedCopy, StoreError> {
        let snapshot = &image.snapshot;
        let instance_id = snapshot.instance_id.ok_or(StoreError::NoInstance(snapshot.id))?;
        let place = Place::new(&self.path, &image.zone, instance_id, snapshot.created_at, snapshot.id);

        let (disk, taken) = (Arc::clone(&self.disk), place.clone());
        let work = Arc::new(blocking(move || Work::begin(disk, taken)).await?);
        let (theirs, zone) = (Arc::clone(&work), image.zone.clone());
        if let Some(manifest) = blocking(move || theirs.find(&zone, instance_id)).await {
            return Ok(VerifiedCopy::new(&self.name, &manifest));
        }
        expected_md5(&source.facts())
            .map_err(|source| StoreError::Download { path: place.image(), source })?;

        let stored = self.store_anew(image, instance_id, source, options, progress, &work).await;
        if stored.is_err() {
            blocking(move || work.discard_part()).await;
        }
        stored
    }

    async fn store_anew(
        &self,
        image: &ImageToStore,
        instance_id: InstanceId,
        source: &dyn ImageSource,
        options: &StoreOptions,
        progress: &(dyn Fn(Progress) + Send + Sync),
        work: &Arc<Work>,
    ) -> Result<VerifiedCopy, StoreError> {
        let download = Download {
            source,
            clock: &*self.clock,
            randomness: &*self.randomness,
            stall_timeout: options.stall_timeout,
            progress,
        };
        let exported_at = self.clock.now();
        let (path, bad) = (work.place.image(), work.place.bad());
        let mut mismatch: Option<Fetched> = None;
        let (file, fetched) = loop {
            let theirs = Arc::clone(work);
            let (file, free) = blocking(move || theirs.fresh_part()).await?;
            let fetched = match (download.fetch(&file, free, mismatch.is_some()).await, mismatch) {
                (Ok(fetched), _) => fetched,
                (Err(source), None) => return Err(StoreError::Download { path, source }),
                (Err(source), Some(Fetched { expected, md5: found, .. })) => {
                    return Err(StoreError::FetchAnew { path, bad, expected, found, source });
                }
            };
            if fetched.md5 == fetched.expected {
                break (file, fetched);
            }
            progress(Progress::ChecksumMismatch);
            let theirs = Arc::clone(work);
            blocking(move || theirs.keep_bad()).await?;
            if mismatch.is_some() {
                let Fetched { expected, md5: found, .. } = fetched;
                return Err(StoreError::ChecksumMismatch { bad, expected, found });
            }
            mismatch = Some(fetched);
        };

        progress(Progress::Verifying);
        let theirs = Arc::clone(work);
        let qcow2 = blocking(move || theirs.verify(&*file, fetched.bytes)).await?;
        let record = ImageRecord {
            file: work.place.image_name(),
            bytes: fetched.bytes,
            md5: fetched.md5,
            qcow2_version: Some(qcow2.version),
            virtual_size_bytes: Some(qcow2.virtual_size_bytes),
        };
        let manifest = describe(image, instance_id, record, &qcow2, [exported_at, self.clock.now()]);
        let proof = VerifiedCopy::new(&self.name, &manifest);
        let theirs = Arc::clone(work);
        blocking(move || theirs.publish(&manifest)).await?;
        Ok(proof)
    }
}

/// The manifest of an image that is proved.
fn describe(
    image: &ImageToStore,
    instance_id: InstanceId,
    record: ImageRecord,
    qcow2: &Qcow2,
    [exported_at, verified_at]: [Timestamp; 2],
) -> Manifest {
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
    Manifest {
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
        image: record,
        exported_at: Some(exported_at),
        verified_at,
        policy: Some(image.policy.to_string()),
        run_id: Some(image.run_id),
        program_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        template: image.template.clone(),
        warnings,
        pruned_at: None,
        corrupt_since: None,
    }
}

/// The work on one copy's files. Its lock lasts until the last step on the blocking pool has ended, also if
/// whoever waited for it went away, so that no two ever work on the same names.
struct Work {
    disk: Arc<dyn Disk>,
    place: Place,
    _lock: Box<dyn DiskLock>,
}

impl Work {
    /// Makes the folders, safe from a crash, and takes the lock.
    fn begin(disk: Arc<dyn Disk>, place: Place) -> Result<Self, StoreError> {
        let names =
            [&place.image(), &place.manifest(), &place.md5(), &place.part(), &place.bad(), &place.lock()];
        let folders = [&place.zone_folder, &place.folder];
        let ours = folders.map(|path| (path, Kind::Folder)).into_iter();
        for (path, kind) in ours.chain(names.map(|path| (path, Kind::File))) {
            match disk.metadata(path) {
                Ok(found) if found.kind != kind => {
                    return Err(StoreError::InTheWay { path: path.clone() });
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("look at", path)(error));
                }
                _ => {}
            }
        }

        create_folders(&*disk, &place.folder, Access::Group)
            .map_err(failed("make the folder", &place.folder))?;

        let lock = disk.lock(&place.lock()).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => StoreError::Busy { path: place.image() },
            _ => failed("lock", &place.lock())(error),
        })?;
        Ok(Self { disk, place, _lock: lock })
    }

    /// The manifest of the copy that counts, if there is one already.
    fn find(&self, zone: &ZoneName, instance_id: InstanceId) -> Option<Manifest> {
        let found = catalogue::read_copy(&*self.disk, &self.place, zone, instance_id).ok()?;
        self.remove_lock();
        Some(found)
    }

    /// Removes the lock's file once there is a copy that counts: whoever waits for it finds the copy, and writes
    /// nothing. Before, two could hold a lock of this name, each on a file of its own.
    fn remove_lock(&self) {
        let _ = self.disk.remove_file(&self.place.lock());
    }

    /// An empty file for the image, and how many bytes are free for it.
    ///
    /// It is a new file, not an old one emptied: a write of a download that was dropped may still be on its way.
    fn fresh_part(&self) -> Result<(Arc<dyn DiskFile>, u64), StoreError> {
        let (part, folder) = (self.place.part(), &self.place.folder);
        self.remove(&part)?;
        let free = self.disk.free_bytes(folder).map_err(failed("ask for the free space of", folder))?;
        let file = self.disk.open(&part, Open::CreateNew, Access::Group).map_err(failed("make", &part))?;
        Ok((Arc::from(file), free))
    }

    /// Keeps a file whose MD5 is wrong, once.
    fn keep_bad(&self) -> Result<(), StoreError> {
        let bad = self.place.bad();
        self.disk.rename(&self.place.part(), &bad).map_err(failed("keep the bad file as", &bad))
    }

    /// Nothing can take up what is left of a failed download yet.
    fn discard_part(&self) {
        // It is in nobody's way: the next download begins by removing it.
        let _ = self.disk.remove_file(&self.place.part());
    }

    /// Makes the bytes safe and reads the image's structure back.
    fn verify(&self, file: &dyn DiskFile, expected: u64) -> Result<Qcow2, StoreError> {
        let path = self.place.part();
        file.sync().map_err(failed("make safe", &path))?;
        let found = file.len().map_err(failed("measure", &path))?;
        if found != expected {
            return Err(StoreError::Length { path, expected, found });
        }
        qcow2::read(found, &|buffer, offset| file.read_at(buffer, offset))
            .map_err(|source| StoreError::Unsound { path: self.place.image(), source })
    }

    /// Gives the proved image its name, and puts the manifest beside it last.
    fn publish(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let place = &self.place;
        // One that does not count, or there would be nothing to publish: it must not vouch for the new image.
        if self.remove(&place.manifest())? {
            self.disk.sync_dir(&place.folder).map_err(failed("sync the folder", &place.folder))?;
        }
        let (part, image) = (place.part(), place.image());
        self.disk.rename(&part, &image).map_err(failed("give its name to", &part))?;
        let sums = format!("{}  {}\n", manifest.image.md5, place.image_name());
        let beside = [(place.md5(), sums.into_bytes()), (place.manifest(), manifest.to_bytes())];
        for (path, bytes) in beside {
            if let Err(error) = replace_file(&*self.disk, &path, &bytes, Access::Group) {
                // Without its manifest the image is no copy, and with one that may not last it must not be.
                for path in [place.manifest(), place.md5(), image] {
                    let _ = self.remove(&path);
                }
                let _ = self.disk.sync_dir(&place.folder);
                return Err(failed("write", &path)(error));
            }
        }
        self.remove_lock();
        Ok(())
    }

    /// Removes a file; false if there was none.
    fn remove(&self, path: &Path) -> Result<bool, StoreError> {
        match self.disk.remove_file(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed("remove", path)(error)),
        }
    }
}

/// What the disk's error on `path` is for the archive.
fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| {
        if is_full(&source) {
            StoreError::Full { doing, path, source }
        } else {
            StoreError::Disk { doing, path, source }
        }
    }
}

#[cfg(test)]
mod tests;
