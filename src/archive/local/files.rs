//! The files of one copy in a folder, under a lock.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::archive::catalogue;
use crate::archive::journal::{JOURNAL_BYTES_MAX, Journal};
use crate::archive::layout::{self, CopyPaths, HoldMark, Role};
use crate::archive::manifest::Manifest;
use crate::archive::manifest_update::ManifestUpdate;
use crate::archive::store::StoreError;
use crate::archive::transfer::part_file::PartFile;
use crate::archive::transfer::sink::{ImageVersion, SinkError, shown};
use crate::disk::{
    Access, Disk, DiskFile, DiskLock, Entry, Kind, Open, create_folders, read_file, replace_file,
};

/// One copy's files. The lock is held until the last step on the blocking pool has ended, even if its caller was dropped
/// before, so no two processes ever work on the same names.
pub(super) struct CopyFiles {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) paths: CopyPaths,
    _lock: Box<dyn DiskLock>,
}

impl CopyFiles {
    /// Creates the folders durably, and takes the lock.
    pub(super) fn lock(disk: Arc<dyn Disk>, paths: CopyPaths) -> Result<Self, StoreError> {
        let [corrupt, pruned, plain] = &paths.manifests();
        let names = [
            corrupt,
            pruned,
            plain,
            &paths.image(),
            &paths.md5(),
            &paths.part(),
            &paths.journal(),
            &paths.bad(),
            &paths.lock(),
        ];
        let folders = [&paths.zone_folder, &paths.folder];
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

        create_folders(&*disk, &paths.folder, Access::Group)
            .map_err(|error| SinkError::disk("create the folder", &paths.folder, error))?;

        let lock = disk.lock(&paths.lock()).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => StoreError::Busy { image: shown(&paths.image()) },
            _ => SinkError::disk("lock", &paths.lock(), error).into(),
        })?;
        Ok(Self { disk, paths, _lock: lock })
    }

    /// The manifest with its bytes, if the copy counts in the archive at `archive`.
    pub(super) fn find_copy(&self, archive: &Path) -> Option<(Manifest, Vec<u8>)> {
        catalogue::find_copy(&*self.disk, archive, &self.paths)
    }

    /// The manifest with its bytes, if it is valid in the archive at `archive`, whether or not the copy counts.
    pub(super) fn find_manifest(&self, archive: &Path) -> Option<(Manifest, Vec<u8>)> {
        catalogue::find_manifest(&*self.disk, archive, &self.paths)
    }

    /// Removes the files that are of no use beside a copy that counts.
    ///
    /// The lock's file is the last: a process that waits for it finds the copy then, and writes nothing. Removed before
    /// there is a copy, two processes could hold a lock of this name, each on a file of its own.
    pub(super) fn remove_leftovers(&self) {
        for path in [self.paths.journal(), self.paths.part(), self.paths.lock()] {
            let _ = self.disk.remove_file(&path);
        }
    }

    /// The part file that an earlier download left, cut to the bytes that were synced.
    pub(super) fn open_part(&self) -> Option<(Arc<dyn DiskFile>, Journal)> {
        let bytes = read_file(&*self.disk, &self.paths.journal(), JOURNAL_BYTES_MAX).ok()?;
        let journal = Journal::from_bytes(&bytes)?;
        let file = self.disk.open(&self.paths.part(), Open::Update, Access::Group).ok()?;
        let len = file.len().ok().filter(|len| *len >= journal.bytes_synced)?;
        if len > journal.bytes_synced {
            file.set_len(journal.bytes_synced).ok()?;
        }
        Some((Arc::from(file), journal))
    }

    /// An empty part file.
    ///
    /// It is a new file rather than the old one truncated: after a failed sync the state of the old one is unknown. The
    /// journal is durably removed first, so it never vouches for bytes that it was not written for.
    pub(super) fn create_part(&self) -> Result<Arc<dyn DiskFile>, SinkError> {
        self.discard()?;
        let part = self.paths.part();
        let file = self.disk.open(&part, Open::CreateNew, Access::Group);
        Ok(Arc::from(file.map_err(|error| SinkError::disk("create", &part, error))?))
    }

    /// Removes the part file and its journal.
    pub(super) fn discard(&self) -> Result<(), SinkError> {
        self.remove_journal()?;
        self.remove(&self.paths.part()).map(drop)
    }

    fn remove_journal(&self) -> Result<(), SinkError> {
        if self.remove(&self.paths.journal())? {
            self.sync_folder()?;
        }
        Ok(())
    }

    fn sync_folder(&self) -> Result<(), SinkError> {
        sync_folder(&*self.disk, &self.paths.folder)
    }

    fn remove(&self, path: &Path) -> Result<bool, SinkError> {
        remove(&*self.disk, path)
    }

    /// Keeps a part file whose MD5 is wrong; the last one replaces an earlier one.
    pub(super) fn keep_bad(&self) -> Result<(), SinkError> {
        self.remove_journal()?;
        let bad = self.paths.bad();
        self.disk
            .rename(&self.paths.part(), &bad)
            .map_err(|error| SinkError::disk("keep the bad file as", &bad, error))
    }

    /// Syncs the part file up to its frontier, and writes the journal after it.
    pub(super) fn write_journal(&self, part_file: &PartFile, image: &ImageVersion) -> io::Result<()> {
        let bytes_synced = part_file.frontier();
        part_file.file().sync()?;
        part_file.set_synced(bytes_synced);
        let journal = Journal::new(image, bytes_synced);
        replace_file(&*self.disk, &self.paths.journal(), &journal.to_bytes(), Access::Group)
    }

    /// Syncs the whole image.
    pub(super) fn sync_image(&self, part_file: &PartFile, expected: u64) -> Result<(), SinkError> {
        let (path, file) = (self.paths.part(), part_file.file());
        file.sync().map_err(|error| SinkError::disk("sync", &path, error))?;
        part_file.set_synced(expected);
        let found = file.len().map_err(|error| SinkError::disk("measure", &path, error))?;
        if found == expected { Ok(()) } else { Err(SinkError::Length { path, expected, found }) }
    }

    /// Renames the verified image to its name, and writes the manifest last.
    pub(super) fn publish(&self, manifest: &Manifest) -> Result<(), SinkError> {
        let paths = &self.paths;
        // An old manifest does not count, or there would be nothing to publish: it must not vouch for the new image.
        remove_manifests(&*self.disk, paths)?;
        let (part, image) = (paths.part(), paths.image());
        self.disk.rename(&part, &image).map_err(|error| SinkError::disk("rename", &part, error))?;
        let sums = format!("{}  {}\n", manifest.image.md5, paths.image_name());
        let beside = [(paths.md5(), sums.into_bytes()), (paths.manifest(None), manifest.to_bytes())];
        for (path, bytes) in beside {
            if let Err(error) = replace_file(&*self.disk, &path, &bytes, Access::Group) {
                // A manifest that may not be durable must not make the image a copy.
                for path in [paths.manifest(None), paths.md5(), image] {
                    let _ = self.remove(&path);
                }
                let _ = self.disk.sync_dir(&paths.folder);
                return Err(SinkError::disk("write", &path, error));
            }
        }
        self.remove_leftovers();
        Ok(())
    }

    /// Replaces the manifest, whose file has these bytes, and then removes the image of one that is pruned.
    pub(super) fn update_manifest(
        &self,
        before: &Manifest,
        bytes: &[u8],
        update: ManifestUpdate,
    ) -> Result<(), SinkError> {
        let (manifest, bytes) = update.apply(before, bytes);
        let path = self.paths.manifest(manifest.mark());
        replace_file(&*self.disk, &path, &bytes, Access::Group)
            .map_err(|error| SinkError::disk("write", &path, error))?;
        if let ManifestUpdate::Pruned(_) = update {
            // As long as the image is there, its manifest is, too: should this end here, it counts again without the mark.
            self.remove(&self.paths.image())?;
            self.remove(&self.paths.md5())?;
            self.sync_folder()?;
        }
        let mut has_changed_names = manifest.mark().is_some();
        for other in self.paths.manifests().iter().filter(|other| **other != path) {
            has_changed_names |= self.remove(other)?;
        }
        if has_changed_names { self.sync_folder() } else { Ok(()) }
    }
}

/// The marks of holds on a copy's snapshot, with their files.
pub(super) fn holds_of(disk: &dyn Disk, paths: &CopyPaths) -> Result<Vec<(HoldMark, PathBuf)>, SinkError> {
    let entries = match disk.list(&paths.folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        listed => listed.map_err(|error| SinkError::disk("list", &paths.folder, error))?,
    };
    let mark = |entry: &Entry| match layout::read_name(&entry.name)? {
        (stem, Role::Hold(mark)) if stem == paths.stem_name() => Some((mark, paths.folder.join(&entry.name))),
        _ => None,
    };
    Ok(entries.iter().filter_map(mark).collect())
}

/// Removes a file; false if there was none.
pub(super) fn remove(disk: &dyn Disk, path: &Path) -> Result<bool, SinkError> {
    match disk.remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(SinkError::disk("remove", path, error)),
    }
}

/// Durably removes a manifest under all its names, one after the other: one that is marked after the one that is not, which
/// would count without it.
pub(super) fn remove_manifests(disk: &dyn Disk, paths: &CopyPaths) -> Result<(), SinkError> {
    for path in paths.manifests().iter().rev() {
        if remove(disk, path)? {
            sync_folder(disk, &paths.folder)?;
        }
    }
    Ok(())
}

fn sync_folder(disk: &dyn Disk, folder: &Path) -> Result<(), SinkError> {
    disk.sync_dir(folder).map_err(|error| SinkError::disk("sync the folder", folder, error))
}
