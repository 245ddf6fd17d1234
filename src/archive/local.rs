//! An archive in a folder of this machine.
//!
//! While an image is received it is a `.part`, which nothing lists, with a **journal** beside it that says how much of it is
//! synced, and of which image: those bytes need not be received again. Once it is verified, its bytes are synced, it
//! is renamed, the `.md5` and last the manifest are written beside it, and the folder is synced. So there is a verified
//! copy or none, whenever the program is stopped.

mod files;
mod image;
mod leftovers;
mod space;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::archive::catalogue::{self, Catalogue, ImageHead, Leftover, StoredCopy};
use crate::archive::layout::{CopyPaths, HoldMark};
use crate::archive::local::files::{CopyFiles, holds_of, remove, remove_manifests};
use crate::archive::local::image::LocalImage;
use crate::archive::local::space::{Share, Space};
use crate::archive::manifest::Manifest;
use crate::archive::manifest_cache::ManifestCache;
use crate::archive::manifest_update::{ManifestUpdate, UpdateError, check_holds};
use crate::archive::marker::{
    MARKER_BYTES_MAX, MARKER_FILE, Marker, MarkerProblem, PROBE, PROBE_FILE, ProbeSteps, read_back,
};
use crate::archive::proof::VerifiedCopy;
use crate::archive::store::StoreError;
use crate::archive::transfer::part_file::PartFile;
use crate::archive::transfer::queue::{Queue, Worker};
use crate::archive::transfer::sink::{Begin, ImageVersion, Output, Sink, SinkError, shown};
use crate::clock::Clock;
use crate::copies::CopyId;
use crate::disk::{
    Access, Disk, DiskFile, DiskLock, Kind, blocking, create_folders, free_bytes_at, read_file, replace_file,
};
use crate::lock::{LockOutcome, LockWait, wait_for_lock};
use crate::policy::name::ArchiveName;
use crate::snapshot::ZoneName;
use crate::text::chain;

/// Left free on the file system beside an image, in bytes: for its manifest, and for other programs.
const SPARE_BYTES: u64 = 64 << 20;
/// The part file is synced, and the journal written, after this many bytes, beside the download: a crash loses hardly
/// more, and at the end there is little left to sync.
const SYNC_BYTES: u64 = if cfg!(test) { 1 << 20 } else { 64 << 20 };
/// And after this time, so that a slow line loses little too.
const SYNC_INTERVAL: Duration = Duration::from_secs(5);

/// Locked while a manifest is updated. The file stays: removed, two processes could hold a lock of this name, each on a
/// file of its own.
const UPDATE_LOCK: &str = "archive.lock";

/// How long an update waits for others.
const UPDATE_WAIT: LockWait = LockWait { poll: Duration::from_millis(50), max: Duration::from_secs(10) };

/// An archive in a folder.
#[derive(Debug, Clone)]
pub struct LocalArchive {
    name: ArchiveName,
    path: PathBuf,
    disk: Arc<dyn Disk>,
    clock: Arc<dyn Clock>,
    manifests: Arc<ManifestCache>,
    space: Arc<Space>,
}

impl LocalArchive {
    /// The archive `name` in the folder `path`, which is created when something is first stored.
    pub fn new(name: ArchiveName, path: PathBuf, disk: Arc<dyn Disk>, clock: Arc<dyn Clock>) -> Self {
        Self { name, path, disk, clock, manifests: Arc::default(), space: Arc::default() }
    }

    /// With the manifests that earlier processes read.
    #[must_use]
    pub fn with_cache(self, manifests: ManifestCache) -> Self {
        Self { manifests: Arc::new(manifests), ..self }
    }

    pub(crate) fn name(&self) -> &ArchiveName {
        &self.name
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads all that the archive holds.
    ///
    /// # Errors
    /// The archive's folder can't be read; one that does not exist is empty.
    pub(crate) async fn catalogue(&self) -> io::Result<Catalogue> {
        let Self { name, path, disk, manifests, .. } = self.clone();
        blocking(move || catalogue::read(&*disk, &manifests, &name, &path)).await
    }

    pub(super) async fn marker(&self) -> Result<Option<Marker>, MarkerProblem> {
        let Self { path, disk, .. } = self.clone();
        blocking(move || catalogue::read_marker(&*disk, &path)).await
    }

    /// Writes the marker, and creates the folder if it is missing.
    pub(super) async fn write_marker(&self, marker: &Marker) -> io::Result<()> {
        let (Self { path, disk, .. }, bytes) = (self.clone(), marker.to_bytes());
        blocking(move || {
            create_folders(&*disk, &path, Access::Group)?;
            replace_file(&*disk, &path.join(MARKER_FILE), &bytes, Access::Group)
        })
        .await
    }

    /// Writes a small file beside the marker of the archive with this id.
    pub(super) async fn write_beside_marker(&self, id: Uuid, name: &str, bytes: Vec<u8>) -> io::Result<()> {
        let (Self { path, disk, .. }, name) = (self.clone(), name.to_owned());
        blocking(move || {
            let marker = catalogue::read_marker(&*disk, &path).ok().flatten();
            if marker.is_none_or(|marker| marker.id != id) {
                return Err(io::Error::new(io::ErrorKind::NotFound, "the archive's marker is not there"));
            }
            replace_file(&*disk, &path.join(name), &bytes, Access::Group)
        })
        .await
    }

    /// Reads a small file beside the marker.
    pub(super) async fn read_beside_marker(&self, name: &str, max: usize) -> io::Result<Option<Vec<u8>>> {
        let (Self { path, disk, .. }, name) = (self.clone(), name.to_owned());
        blocking(move || match read_file(&*disk, &path.join(name), max as u64) {
            Ok(bytes) => Ok(Some(bytes)),
            // An empty folder is not one without a file.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                disk.metadata(&path.join(MARKER_FILE)).map(|_| None)
            }
            Err(error) => Err(error),
        })
        .await
    }

    /// Writes, reads back and deletes a small file. A folder that does not exist yet is not created: whether it could be is
    /// asked of the nearest one above it.
    pub(super) async fn probe(&self) -> ProbeSteps {
        let Self { path, disk, .. } = self.clone();
        blocking(move || {
            let is_there = |folder: &&Path| !matches!(disk.metadata(folder), Err(error) if error.kind() == io::ErrorKind::NotFound);
            let failed = |doing, path: &Path, error| chain(&SinkError::disk(doing, path, error));
            let folder = path.ancestors().find(is_there).unwrap_or(&path);
            if folder != path {
                let allowed = disk.may_write(folder).err();
                return vec![("write", allowed.map(|error| failed("create the archive's folder in", folder, error)))];
            }
            let probe = path.join(PROBE_FILE);
            let written = replace_file(&*disk, &probe, PROBE, Access::Group).err();
            if let Some(error) = written {
                return vec![("write", Some(failed("write", &probe, error)))];
            }
            let read = read_file(&*disk, &probe, MARKER_BYTES_MAX).map(Some);
            let read = read_back(read, |error| failed("read", &probe, error));
            let removed = disk.remove_file(&probe).and_then(|()| disk.sync_dir(&path));
            let removed = removed.err().filter(|error| error.kind() != io::ErrorKind::NotFound);
            let removed = removed.map(|error| failed("delete", &probe, error));
            // Exports go into a folder for each zone.
            let folders = disk.list(&path).unwrap_or_default();
            let folders = folders.iter().filter(|entry| entry.kind == Kind::Folder);
            let zones = folders.filter(|entry| entry.name.to_str().is_some_and(|name| name.parse::<ZoneName>().is_ok()));
            let unwritable = zones.map(|entry| path.join(&entry.name)).find_map(|zone| {
                let error = disk.may_write(&zone).err()?;
                Some(failed("write in", &zone, error))
            });
            vec![("write", unwritable), ("read back", read), ("delete", removed)]
        })
        .await
    }

    /// Free bytes of the archive's folder, or of the nearest one above it while it does not exist.
    pub(crate) async fn free_bytes(&self) -> Option<u64> {
        let Self { path, disk, .. } = self.clone();
        blocking(move || free_bytes_at(&*disk, &path)).await
    }

    /// The bytes of a copy, for reading it again.
    pub(crate) fn image(&self, copy: &StoredCopy) -> LocalImage {
        let (disk, path) = (Arc::clone(&self.disk), copy.image());
        LocalImage { disk, path, md5: copy.manifest.image.md5 }
    }

    /// Prepares to store an image. One of which the archive has, or had, a verified copy is not stored again; anything else
    /// under its name is replaced once the new image is verified.
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::Busy`] while another process stores it.
    pub(crate) async fn begin(&self, id: &CopyId) -> Result<Begin, StoreError> {
        let (archive, id) = (self.clone(), id.clone());
        blocking(move || {
            let files = CopyFiles::lock(Arc::clone(&archive.disk), CopyPaths::new(&archive.path, &id))?;
            if let Some((manifest, _)) = files.find_copy(&archive.path) {
                files.remove_leftovers();
                return Ok(Begin::Stored(VerifiedCopy::new(&archive.name, &manifest)));
            }
            let (file, resumable) = match files.open_part() {
                Some((file, journal)) => (file, Some(journal.received())),
                None => (files.create_part()?, None),
            };
            let folder = &files.paths.folder;
            let free = archive.disk.free_bytes(folder);
            let free = free.map_err(|error| SinkError::disk("ask for the free space of", folder, error))?;
            let (image, bad) = (shown(&files.paths.image()), Some(files.paths.bad()));
            let bytes = resumable.as_ref().map_or(0, |received| received.bytes);
            let share = Share::new(&archive.space, free.saturating_add(bytes));
            let sink = Box::new(LocalSink::new(Arc::new(files), file, bytes, share, archive.clock));
            Ok(Begin::Missing(Output { archive: archive.name, image, bad, resumable, sink }))
        })
        .await
    }

    /// Whether the copy still counts.
    pub(super) async fn has(&self, copy: &StoredCopy) -> bool {
        let (Self { path, disk, .. }, manifest) = (self.clone(), copy.manifest.clone());
        blocking(move || {
            let found = catalogue::find_copy(&*disk, &path, &CopyPaths::new(&path, &manifest.id()));
            found.is_some_and(|(found, _)| found.image == manifest.image)
        })
        .await
    }

    /// What the disk says of an image; none if there is none.
    pub(super) async fn head(&self, copy: &StoredCopy) -> io::Result<Option<ImageHead>> {
        let (disk, image) = (Arc::clone(&self.disk), copy.image());
        blocking(move || match disk.metadata(&image) {
            Ok(found) => Ok(Some(ImageHead { bytes: found.len, etag: None, md5: None })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        })
        .await
    }

    /// Updates the manifest of a copy, and removes the image of one that is pruned.
    pub(super) async fn update_manifest(
        &self,
        copy: &StoredCopy,
        update: ManifestUpdate,
    ) -> Result<(), UpdateError> {
        let (archive, before) = (self.clone(), copy.manifest.clone());
        let lock = self.lock_updates(&before.id()).await?;
        blocking(move || {
            let _lock = lock;
            let paths = CopyPaths::new(&archive.path, &before.id());
            let image = shown(&paths.image());
            let files = CopyFiles::lock(archive.disk, paths).map_err(not_locked)?;
            let holds = holds_of(&*files.disk, &files.paths).map_err(update_failed)?;
            check_holds(update, holds.iter().map(|(mark, _)| *mark))?;
            // One that is marked as corrupt does not count; that is what the update may end.
            let found = match before.corrupt_since {
                Some(_) => files.find_manifest(&archive.path),
                None => files.find_copy(&archive.path),
            };
            let updated = match found {
                Some((found, bytes)) if found == *before => {
                    files.update_manifest(&found, &bytes, update).map_err(update_failed)
                }
                _ => Err(UpdateError::Changed { image }),
            };
            if matches!(update, ManifestUpdate::Pruned(_)) && updated.is_ok() {
                // They have ended.
                for (_, path) in &holds {
                    let _ = files.disk.remove_file(path);
                }
            }
            let counts = || updated.is_ok() || files.find_copy(&archive.path).is_some();
            if !matches!(update, ManifestUpdate::Corrupt(_)) && counts() {
                // Only a copy that counts makes a waiting process write nothing, so only then the lock's file is removed.
                let _ = files.disk.remove_file(&files.paths.lock());
            }
            updated
        })
        .await
    }

    /// Removes a copy that is marked as corrupt.
    pub(super) async fn remove_corrupt(&self, copy: &StoredCopy) -> Result<(), UpdateError> {
        let (archive, before) = (self.clone(), copy.manifest.clone());
        let lock = self.lock_updates(&before.id()).await?;
        blocking(move || {
            let _lock = lock;
            let paths = CopyPaths::new(&archive.path, &before.id());
            let image = shown(&paths.image());
            let files = CopyFiles::lock(archive.disk, paths).map_err(not_locked)?;
            let is_same = files.find_manifest(&archive.path).is_some_and(|(found, _)| found == *before);
            if before.corrupt_since.is_none() || !is_same {
                return Err(UpdateError::Changed { image });
            }
            let (disk, paths) = (&*files.disk, &files.paths);
            let holds = holds_of(disk, paths).map_err(update_failed)?.into_iter().map(|(_, path)| path);
            for path in [paths.image(), paths.md5()].into_iter().chain(holds) {
                remove(disk, &path).map_err(update_failed)?;
            }
            // Last: until then it can be removed again.
            remove_manifests(disk, paths).map_err(update_failed)
        })
        .await
    }

    /// The bytes of a copy's manifest.
    pub(super) async fn manifest_bytes(&self, copy: &StoredCopy) -> Option<Vec<u8>> {
        let (Self { path, disk, .. }, manifest) = (self.clone(), copy.manifest.clone());
        blocking(move || {
            let found = catalogue::find_manifest(&*disk, &path, &CopyPaths::new(&path, &manifest.id()));
            found.filter(|(found, _)| found.image == manifest.image).map(|(_, bytes)| bytes)
        })
        .await
    }

    /// Marks a hold on a copy's snapshot, in the place of an earlier one of the same state directory; false if the copy has
    /// no image any more.
    pub(super) async fn mark_hold(
        &self,
        id: &CopyId,
        mark: HoldMark,
        text: Vec<u8>,
    ) -> Result<bool, UpdateError> {
        let (archive, id) = (self.clone(), id.clone());
        let lock = self.lock_updates(&id).await?;
        blocking(move || {
            let _lock = lock;
            let paths = CopyPaths::new(&archive.path, &id);
            let found = catalogue::find_manifest(&*archive.disk, &archive.path, &paths);
            if found.is_none_or(|(manifest, _)| manifest.pruned_at.is_some()) {
                return Ok(false);
            }
            let (path, disk) = (paths.hold(&mark), &*archive.disk);
            replace_file(disk, &path, &text, Access::Group)
                .map_err(|error| update_failed(SinkError::disk("write", &path, error)))?;
            let others = holds_of(disk, &paths).map_err(update_failed)?.into_iter();
            for (_, path) in others.filter(|(other, _)| other.state == mark.state && *other != mark) {
                remove(disk, &path).map_err(update_failed)?;
            }
            Ok(true)
        })
        .await
    }

    /// Removes the marks of holds on a copy's snapshot that this state directory put there, or all; how many.
    pub(super) async fn remove_holds(&self, id: &CopyId, of: Option<Uuid>) -> Result<usize, UpdateError> {
        let (archive, id) = (self.clone(), id.clone());
        let lock = self.lock_updates(&id).await?;
        blocking(move || {
            let _lock = lock;
            let (paths, disk) = (CopyPaths::new(&archive.path, &id), &*archive.disk);
            let all = holds_of(disk, &paths).map_err(update_failed)?.into_iter();
            let mut count = 0;
            for (_, path) in all.filter(|(mark, _)| of.is_none_or(|of| of == mark.state)) {
                count += usize::from(remove(disk, &path).map_err(update_failed)?);
            }
            let synced = if count > 0 { disk.sync_dir(&paths.folder) } else { Ok(()) };
            synced
                .map_err(|error| update_failed(SinkError::disk("sync the folder", &paths.folder, error)))?;
            Ok(count)
        })
        .await
    }

    /// What interrupted exports left.
    pub(super) async fn leftovers(&self) -> Vec<Leftover> {
        let (Self { path, disk, .. }, now) = (self.clone(), self.clock.now());
        blocking(move || leftovers::find(&*disk, &path, now)).await
    }

    /// Removes what no export will use. Returns what was removed, and the first failure.
    pub(super) async fn remove_leftovers(&self) -> (Vec<Leftover>, Option<SinkError>) {
        let (Self { path, disk, .. }, now) = (self.clone(), self.clock.now());
        blocking(move || leftovers::remove_useless(&*disk, &path, now)).await
    }

    /// Waits for other updates, each of which takes milliseconds.
    async fn lock_updates(&self, id: &CopyId) -> Result<Box<dyn DiskLock>, UpdateError> {
        let lock = self.path.join(UPDATE_LOCK);
        let never = CancellationToken::new();
        match wait_for_lock(&self.disk, &lock, UPDATE_WAIT, &*self.clock, &never).await {
            Ok(LockOutcome::Acquired(lock)) => Ok(lock),
            Ok(LockOutcome::GaveUp | LockOutcome::Stopped) => {
                Err(UpdateError::Busy { image: shown(&CopyPaths::new(&self.path, id).image()) })
            }
            Err(error) => Err(update_failed(SinkError::disk("lock", &lock, error))),
        }
    }

    /// Removes the manifest of a pruned copy. The copy itself need not be locked: while the manifest is there, nothing is
    /// stored under its name.
    pub(super) async fn forget_pruned(&self, copy: &StoredCopy) -> Result<(), UpdateError> {
        let (archive, before) = (self.clone(), copy.manifest.clone());
        let lock = self.lock_updates(&before.id()).await?;
        blocking(move || {
            let _lock = lock;
            let paths = CopyPaths::new(&archive.path, &before.id());
            let image = shown(&paths.image());
            let disk = &*archive.disk;
            let is_same = catalogue::find_copy(disk, &archive.path, &paths).is_some_and(|(found, _)| found == *before);
            let has_image = !matches!(disk.metadata(&paths.image()), Err(error) if error.kind() == io::ErrorKind::NotFound);
            if before.pruned_at.is_none() || has_image || !is_same {
                return Err(UpdateError::Changed { image });
            }
            let removed = remove(disk, &paths.md5()).and_then(|_| remove_manifests(disk, &paths));
            removed.map_err(update_failed)
        })
        .await
    }
}

fn not_locked(error: StoreError) -> UpdateError {
    match error {
        StoreError::Busy { image } => UpdateError::Busy { image },
        error => UpdateError::Archive(error),
    }
}

fn update_failed(error: SinkError) -> UpdateError {
    UpdateError::Archive(error.into())
}

/// Takes an image into a folder.
struct LocalSink {
    files: Arc<CopyFiles>,
    part_file: Arc<PartFile>,
    syncer: Queue<Syncer>,
    clock: Arc<dyn Clock>,
    /// Where the next bytes are written.
    position: u64,
    /// Bytes that were synced, or are about to be.
    synced: u64,
    /// When they were, by the clock's elapsed time.
    synced_at: Duration,
    /// The image, once it is known.
    image: Option<ImageVersion>,
    /// The space for the whole image.
    share: Share,
    /// The part file can't be relied on.
    has_failed: bool,
}

/// Syncs the part file beside the download.
struct Syncer {
    files: Arc<CopyFiles>,
    part_file: Arc<PartFile>,
}

impl Worker for Syncer {
    type Item = ImageVersion;

    fn work(&mut self, image: ImageVersion) -> io::Result<()> {
        self.files.write_journal(&self.part_file, &image)
    }
}

impl LocalSink {
    fn new(
        files: Arc<CopyFiles>,
        file: Arc<dyn DiskFile>,
        bytes: u64,
        share: Share,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let part_file = Arc::new(PartFile::new(file, bytes));
        let syncer = Syncer { files: Arc::clone(&files), part_file: Arc::clone(&part_file) };
        Self {
            files,
            part_file,
            syncer: Queue::new(syncer, 1),
            position: bytes,
            synced: bytes,
            synced_at: clock.elapsed(),
            clock,
            image: None,
            share,
            has_failed: false,
        }
    }

    fn fits(&self, needs: u64) -> Result<(), SinkError> {
        let (free, taken) = self.share.free();
        if needs <= free.saturating_sub(SPARE_BYTES) {
            Ok(())
        } else {
            Err(SinkError::NoSpace { needs, spare: SPARE_BYTES, free, taken })
        }
    }

    async fn take(&mut self, bytes: Bytes) -> Result<(), SinkError> {
        let len = bytes.len() as u64;
        // Several connections may have written further.
        let position = self.position.max(self.part_file.frontier());
        self.share.wrote(position - self.position);
        self.position = position;
        self.fits(self.position.saturating_add(len))?;
        let failed = |error| SinkError::disk("write", &self.files.paths.part(), error);
        self.part_file.write_at(self.position, bytes).await.map_err(failed)?;
        self.position += len;
        self.share.wrote(len);
        let (written, now) = (self.part_file.frontier(), self.clock.elapsed());
        let is_due = written.saturating_sub(self.synced) >= SYNC_BYTES
            || (written > self.synced && now.saturating_sub(self.synced_at) >= SYNC_INTERVAL);
        if let Some(image) = self.image.clone().filter(|_| is_due && self.syncer.is_idle()) {
            (self.synced, self.synced_at) = (written, now);
            self.syncer.push(image, 1).await.map_err(failed)?;
        }
        Ok(())
    }

    /// Waits until all bytes are written.
    async fn wait_idle(&self) -> Result<(), SinkError> {
        let (written, synced) = (self.part_file.wait_idle().await, self.syncer.wait_idle().await);
        written.and(synced).map_err(|error| SinkError::disk("write", &self.files.paths.part(), error))
    }

    /// Starts over with an empty part file, once `first` is done with the old one.
    async fn start_over(
        &mut self,
        first: impl FnOnce(&CopyFiles) -> Result<(), SinkError> + Send + 'static,
    ) -> Result<(), SinkError> {
        // A failure of the old file does not matter to the new one.
        let _ = self.wait_idle().await;
        let files = Arc::clone(&self.files);
        let created = blocking(move || first(&files).and_then(|()| files.create_part()));
        let file = created.await.inspect_err(|_| self.has_failed = true)?;
        let (files, share) = (Arc::clone(&self.files), self.share.again());
        *self = Self::new(files, file, 0, share, Arc::clone(&self.clock));
        Ok(())
    }
}

impl Sink for LocalSink {
    fn expect(&mut self, image: &ImageVersion) -> Result<(), SinkError> {
        self.image = Some(image.clone());
        let Some(bytes) = image.bytes else { return Ok(()) };
        self.fits(bytes).inspect_err(|_| self.has_failed = true)?;
        self.share.reserve(bytes.saturating_sub(self.position));
        Ok(())
    }

    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move { self.take(bytes).await.inspect_err(|_| self.has_failed = true) })
    }

    fn restart(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(self.start_over(|_| Ok(())))
    }

    fn publish(self: Box<Self>, manifest: Manifest) -> BoxFuture<'static, Result<Manifest, SinkError>> {
        Box::pin(async move {
            let idle = self.wait_idle().await;
            let Self { files, part_file, clock, .. } = *self;
            blocking(move || {
                let published = idle
                    .and_then(|()| files.sync_image(&part_file, manifest.image.bytes))
                    .and_then(|()| files.publish(&manifest));
                if published.is_err() {
                    // A disk that failed is not trusted with these bytes again; if they can't be removed, they do no harm.
                    let _ = files.discard();
                } else {
                    leftovers::remove_in(&*files.disk, &files.paths.folder, clock.now());
                }
                published.map(|()| manifest)
            })
            .await
        })
    }

    fn keep_bad(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(self.start_over(CopyFiles::keep_bad))
    }

    fn abandon(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let is_usable = self.wait_idle().await.is_ok() && !self.has_failed && self.position > 0;
            let Self { files, part_file, image, .. } = *self;
            blocking(move || match image.filter(|_| is_usable) {
                // If it can't be removed now, the next download begins with removing it.
                Some(image) => drop(files.write_journal(&part_file, &image).or_else(|_| files.discard())),
                None => drop(files.discard()),
            })
            .await;
        })
    }

    fn part_file(&self) -> Option<Arc<PartFile>> {
        Some(Arc::clone(&self.part_file))
    }
}

#[cfg(test)]
mod tests;
