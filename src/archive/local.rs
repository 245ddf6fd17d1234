//! An archive in a folder of this machine.
//!
//! While an image comes in it is a `.part`, which nothing lists, with a **journal** beside it that says how much of it is
//! safe on the disk, and of which image: so much needs not come in again. When it is proved, its bytes are synced, it
//! gets its name, the `.md5` and last the manifest are put beside it, and the folder is synced: stopped at any
//! moment, there is a verified copy or none.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::archive::catalogue::{self, Catalogue, StoredCopy};
use crate::archive::journal::{JOURNAL_BYTES_MAX, Journal};
use crate::archive::layout::Place;
use crate::archive::manifest::Manifest;
use crate::archive::manifest_update::{ManifestUpdate, UpdateError};
use crate::archive::proof::VerifiedCopy;
use crate::archive::sink::{Begin, Sink, SinkError, Target, Whole, shown};
use crate::archive::store::{ImageToStore, StoreError};
use crate::archive::transfer::part_file::PartFile;
use crate::archive::transfer::queue::{Queue, Worker};
use crate::disk::{
    Access, Disk, DiskFile, DiskLock, Kind, Open, blocking, create_folders, read_file, replace_file,
};
use crate::policy::ArchiveName;
use crate::snapshot::{InstanceId, ZoneName};

/// Left free on the file system beside an image, in bytes: for its manifest, and for everybody else.
const SPARE_BYTES: u64 = 64 << 20;
/// Whenever so much has come in, it is made safe while the rest comes: after a crash no more than about this comes again,
/// and at the end there is little left to wait for.
const SYNC_BYTES: u64 = if cfg!(test) { 1 << 20 } else { 64 << 20 };

/// Held by whoever amends a copy. It stays: so two can't hold a lock of this name, each on a file of its own.
const AMEND_LOCK: &str = "archive.lock";

/// An archive in a folder.
#[derive(Debug, Clone)]
pub struct LocalArchive {
    name: ArchiveName,
    pub(super) path: PathBuf,
    pub(super) disk: Arc<dyn Disk>,
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
    pub fn new(name: ArchiveName, path: PathBuf, disk: Arc<dyn Disk>) -> Self {
        Self { name, path, disk }
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

    /// Makes ready to store an image. One that is, or was, in the archive as a verified copy is not stored again; anything
    /// else under its name is replaced once the new one is proved.
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::Busy`] while another stores it.
    pub async fn begin(&self, image: &ImageToStore) -> Result<Begin, StoreError> {
        let snapshot = &image.snapshot;
        let instance_id = image.instance_id()?;
        let place = Place::new(&self.path, &image.zone, instance_id, snapshot.created_at, snapshot.id);
        let (disk, archive, zone) = (Arc::clone(&self.disk), self.name.clone(), image.zone.clone());
        blocking(move || {
            let work = Work::begin(disk, place)?;
            if let Some(manifest) = work.find(&zone, instance_id) {
                return Ok(Begin::Stored(VerifiedCopy::new(&archive, &manifest)));
            }
            let standing =
                Target { image: shown(&work.place.image()), bad: Some(work.place.bad()), resumable: None };
            let (file, resumable) = match work.left() {
                Some((file, journal)) => (file, Some(journal.resumable())),
                None => (work.fresh_part()?, None),
            };
            let folder = &work.place.folder;
            let free = work
                .disk
                .free_bytes(folder)
                .map_err(|error| SinkError::disk("ask for the free space of", folder, error))?;
            let bytes = resumable.as_ref().map_or(0, |left| left.bytes);
            let sink = LocalSink::new(archive, Arc::new(work), file, bytes, free.saturating_add(bytes));
            Ok(Begin::Sink(Box::new(sink), Target { resumable, ..standing }))
        })
        .await
    }
}

impl LocalArchive {
    /// Writes down what became of a copy, and removes the image of one that is pruned.
    pub(super) async fn update_manifest(
        &self,
        copy: &StoredCopy,
        what: ManifestUpdate,
    ) -> Result<(), UpdateError> {
        let before = copy.manifest.clone();
        let (zone, instance_id) = (before.zone.clone(), before.instance.id);
        let of = &before.snapshot;
        let place = Place::new(&self.path, &zone, instance_id, of.created_at, of.id);
        let (disk, lock) = (Arc::clone(&self.disk), self.path.join(AMEND_LOCK));
        blocking(move || {
            let image = shown(&place.image());
            let refused = |error: SinkError| UpdateError::Archive(error.into());
            let _alone = disk.lock(&lock).map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => UpdateError::Busy { image: image.clone() },
                _ => refused(SinkError::disk("lock", &lock, error)),
            })?;
            let work = Work::begin(disk, place).map_err(|error| match error {
                StoreError::Busy { image } => UpdateError::Busy { image },
                error => UpdateError::Archive(error.into()),
            })?;
            let found = catalogue::read_copy(&*work.disk, &work.place, &zone, instance_id);
            let amended = if found.is_ok_and(|found| found == before) {
                work.update_manifest(&before, what).map_err(refused)
            } else {
                Err(UpdateError::Changed { image })
            };
            if !matches!(what, ManifestUpdate::Corrupt(_)) {
                // It may be gone only while what is there counts: who waits for it then writes nothing.
                let _ = work.disk.remove_file(&work.place.lock());
            }
            amended
        })
        .await
    }
}

/// A local archive's end of a download.
struct LocalSink {
    archive: ArchiveName,
    work: Arc<Work>,
    part_file: Arc<PartFile>,
    syncer: Queue<Syncer>,
    /// Where the next bytes go.
    position: u64,
    /// So much was made safe, or will be by what is on its way.
    noted: u64,
    /// What the image is, once it is known.
    whole: Option<Whole>,
    /// For the whole image, in bytes.
    free: u64,
    /// What is there is not to be relied on.
    has_failed: bool,
}

/// Makes safe what is there, beside what comes in.
struct Syncer {
    work: Arc<Work>,
    part_file: Arc<PartFile>,
}

impl Worker for Syncer {
    type Item = Whole;

    fn work(&mut self, whole: Whole) -> io::Result<()> {
        self.work.note(&self.part_file, &whole)
    }
}

impl LocalSink {
    fn new(archive: ArchiveName, work: Arc<Work>, file: Arc<dyn DiskFile>, bytes: u64, free: u64) -> Self {
        let part_file = Arc::new(PartFile::new(file, bytes));
        let syncer = Syncer { work: Arc::clone(&work), part_file: Arc::clone(&part_file) };
        Self {
            archive,
            work,
            part_file,
            syncer: Queue::new(syncer, 1),
            position: bytes,
            noted: bytes,
            whole: None,
            free,
            has_failed: false,
        }
    }

    fn fits(&self, needs: u64) -> Result<(), SinkError> {
        let free = self.free;
        if needs <= free.saturating_sub(SPARE_BYTES) {
            Ok(())
        } else {
            Err(SinkError::NoRoom { needs, spare: SPARE_BYTES, free })
        }
    }

    async fn take(&mut self, bytes: Bytes) -> Result<(), SinkError> {
        let len = bytes.len() as u64;
        // More may have come to other places of the file.
        self.position = self.position.max(self.part_file.frontier());
        self.fits(self.position.saturating_add(len))?;
        let failed = |error| SinkError::disk("write", &self.work.place.part(), error);
        self.part_file.write_at(self.position, bytes).await.map_err(failed)?;
        self.position += len;
        let written = self.part_file.frontier();
        if let Some(whole) = self.whole.clone()
            && written.saturating_sub(self.noted) >= SYNC_BYTES
            && self.syncer.is_idle()
        {
            self.noted = written;
            self.syncer.push(whole, 1).await.map_err(failed)?;
        }
        Ok(())
    }

    /// Waits until nothing works on the file any more.
    async fn rest(&self) -> Result<(), SinkError> {
        let (written, synced) = (self.part_file.rest().await, self.syncer.rest().await);
        written.and(synced).map_err(|error| SinkError::disk("write", &self.work.place.part(), error))
    }

    /// Does something with the files while nothing works on them, and begins at zero.
    async fn begin_anew(
        &mut self,
        with: impl FnOnce(&Work) -> Result<(), SinkError> + Send + 'static,
    ) -> Result<(), SinkError> {
        // What failed in the old file is of no interest in the new one.
        let _ = self.rest().await;
        let work = Arc::clone(&self.work);
        let fresh = blocking(move || {
            with(&work)?;
            work.fresh_part()
        });
        let fresh = fresh.await.inspect_err(|_| self.has_failed = true)?;
        *self = Self::new(self.archive.clone(), Arc::clone(&self.work), fresh, 0, self.free);
        Ok(())
    }

    async fn finish(self, manifest: Manifest) -> Result<Manifest, SinkError> {
        let at_rest = self.rest().await;
        let (work, part_file) = (self.work, self.part_file);
        blocking(move || {
            let published = at_rest
                .and_then(|()| work.secure(&part_file, manifest.image.bytes))
                .and_then(|()| work.publish(&manifest));
            if published.is_err() {
                // A disk that failed is not given the same again; what can't be removed is in nobody's way.
                let _ = work.discard();
            }
            published.map(|()| manifest)
        })
        .await
    }

    async fn leave(self) {
        let at_rest = self.rest().await;
        let useless = self.has_failed || at_rest.is_err() || self.position == 0;
        let (work, part_file) = (self.work, self.part_file);
        blocking(move || match self.whole {
            // What can't be removed now is in nobody's way: the next download begins by removing it.
            Some(whole) if !useless => drop(work.note(&part_file, &whole).or_else(|_| work.discard())),
            _ => drop(work.discard()),
        })
        .await;
    }
}

impl Sink for LocalSink {
    fn expect(&mut self, whole: &Whole) -> Result<(), SinkError> {
        self.whole = Some(whole.clone());
        whole.bytes.map_or(Ok(()), |bytes| self.fits(bytes)).inspect_err(|_| self.has_failed = true)
    }

    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move { self.take(bytes).await.inspect_err(|_| self.has_failed = true) })
    }

    fn restart(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(self.begin_anew(|_| Ok(())))
    }

    fn publish(self: Box<Self>, manifest: Manifest) -> BoxFuture<'static, Result<Manifest, SinkError>> {
        Box::pin(self.finish(manifest))
    }

    fn keep_bad(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(self.begin_anew(Work::keep_bad))
    }

    fn abandon(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(self.leave())
    }

    fn part_file(&self) -> Option<Arc<PartFile>> {
        Some(Arc::clone(&self.part_file))
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
        let names = [
            &place.image(),
            &place.manifest(),
            &place.md5(),
            &place.part(),
            &place.journal(),
            &place.bad(),
            &place.lock(),
        ];
        let folders = [&place.zone_folder, &place.folder];
        let ours = folders.map(|path| (path, Kind::Folder)).into_iter();
        for (path, kind) in ours.chain(names.map(|path| (path, Kind::File))) {
            match disk.metadata(path) {
                Ok(found) if found.kind != kind => {
                    return Err(StoreError::InTheWay { path: path.clone() });
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(SinkError::disk("look at", path, error).into());
                }
                _ => {}
            }
        }

        create_folders(&*disk, &place.folder, Access::Group)
            .map_err(|error| SinkError::disk("make the folder", &place.folder, error))?;

        let lock = disk.lock(&place.lock()).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => StoreError::Busy { image: shown(&place.image()) },
            _ => SinkError::disk("lock", &place.lock(), error).into(),
        })?;
        Ok(Self { disk, place, _lock: lock })
    }

    /// The manifest of the copy that counts, if there is one already.
    fn find(&self, zone: &ZoneName, instance_id: InstanceId) -> Option<Manifest> {
        let found = catalogue::read_copy(&*self.disk, &self.place, zone, instance_id).ok()?;
        self.tidy();
        Some(found)
    }

    /// Removes what is of no use beside a copy that counts.
    ///
    /// The lock's file goes last: whoever waits for it finds the copy, and writes nothing. Before there was one, two could
    /// hold a lock of this name, each on a file of its own.
    fn tidy(&self) {
        for path in [self.place.journal(), self.place.part(), self.place.lock()] {
            let _ = self.disk.remove_file(&path);
        }
    }

    /// What an earlier download left that can be relied on; the file has what is safe of it and no more.
    fn left(&self) -> Option<(Arc<dyn DiskFile>, Journal)> {
        let bytes = read_file(&*self.disk, &self.place.journal(), JOURNAL_BYTES_MAX).ok()?;
        let journal = Journal::from_bytes(&bytes)?;
        let file = self.disk.open(&self.place.part(), Open::Update, Access::Group).ok()?;
        let len = file.len().ok().filter(|len| *len >= journal.bytes_synced)?;
        if len > journal.bytes_synced {
            file.set_len(journal.bytes_synced).ok()?;
        }
        Some((Arc::from(file), journal))
    }

    /// An empty file for the image.
    ///
    /// It is a new file, not an old one emptied: what a failed sync left in the old one can't be known. The journal is
    /// gone before, for good, so that it never vouches for bytes that it was not written for.
    fn fresh_part(&self) -> Result<Arc<dyn DiskFile>, SinkError> {
        self.discard()?;
        let part = self.place.part();
        let file = self.disk.open(&part, Open::CreateNew, Access::Group);
        Ok(Arc::from(file.map_err(|error| SinkError::disk("make", &part, error))?))
    }

    /// Removes what came so far.
    fn discard(&self) -> Result<(), SinkError> {
        self.remove_journal()?;
        self.remove(&self.place.part()).map(drop)
    }

    fn remove_journal(&self) -> Result<(), SinkError> {
        if self.remove(&self.place.journal())? {
            self.sync_folder()?;
        }
        Ok(())
    }

    fn sync_folder(&self) -> Result<(), SinkError> {
        let folder = &self.place.folder;
        self.disk.sync_dir(folder).map_err(|error| SinkError::disk("sync the folder", folder, error))
    }

    /// Keeps a file whose MD5 is wrong, once.
    fn keep_bad(&self) -> Result<(), SinkError> {
        self.remove_journal()?;
        let bad = self.place.bad();
        self.disk
            .rename(&self.place.part(), &bad)
            .map_err(|error| SinkError::disk("keep the bad file as", &bad, error))
    }

    /// Makes safe what is there, and says so.
    fn note(&self, part_file: &PartFile, whole: &Whole) -> io::Result<()> {
        let bytes_synced = part_file.frontier();
        part_file.file().sync()?;
        part_file.is_safe(bytes_synced);
        let journal = Journal::new(whole, bytes_synced);
        replace_file(&*self.disk, &self.place.journal(), &journal.to_bytes(), Access::Group)
    }

    /// Makes the bytes of the whole image safe.
    fn secure(&self, part_file: &PartFile, expected: u64) -> Result<(), SinkError> {
        let (path, file) = (self.place.part(), part_file.file());
        file.sync().map_err(|error| SinkError::disk("make safe", &path, error))?;
        part_file.is_safe(expected);
        let found = file.len().map_err(|error| SinkError::disk("measure", &path, error))?;
        if found == expected { Ok(()) } else { Err(SinkError::Length { path, expected, found }) }
    }

    /// Gives the proved image its name, and puts the manifest beside it last.
    fn publish(&self, manifest: &Manifest) -> Result<(), SinkError> {
        let place = &self.place;
        // One that does not count, or there would be nothing to publish: it must not vouch for the new image.
        if self.remove(&place.manifest())? {
            self.sync_folder()?;
        }
        let (part, image) = (place.part(), place.image());
        self.disk.rename(&part, &image).map_err(|error| SinkError::disk("give its name to", &part, error))?;
        let sums = format!("{}  {}\n", manifest.image.md5, place.image_name());
        let beside = [(place.md5(), sums.into_bytes()), (place.manifest(), manifest.to_bytes())];
        for (path, bytes) in beside {
            if let Err(error) = replace_file(&*self.disk, &path, &bytes, Access::Group) {
                // Without its manifest the image is no copy, and with one that may not last it must not be.
                for path in [place.manifest(), place.md5(), image] {
                    let _ = self.remove(&path);
                }
                let _ = self.disk.sync_dir(&place.folder);
                return Err(SinkError::disk("write", &path, error));
            }
        }
        self.tidy();
        Ok(())
    }

    /// Replaces the manifest, and then removes the image of one that is pruned.
    fn update_manifest(&self, before: &Manifest, what: ManifestUpdate) -> Result<(), SinkError> {
        let path = self.place.manifest();
        replace_file(&*self.disk, &path, &what.of(before).to_bytes(), Access::Group)
            .map_err(|error| SinkError::disk("write", &path, error))?;
        if let ManifestUpdate::Pruned(_) = what {
            self.remove(&self.place.image())?;
            self.remove(&self.place.md5())?;
            self.sync_folder()?;
        }
        Ok(())
    }

    /// Removes a file; false if there was none.
    fn remove(&self, path: &Path) -> Result<bool, SinkError> {
        match self.disk.remove_file(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(SinkError::disk("remove", path, error)),
        }
    }
}

#[cfg(test)]
mod tests;
