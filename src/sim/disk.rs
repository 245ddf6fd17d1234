//! The simulated disk: files in memory that a crash resets to their synced contents.
//!
//! It keeps every file's bytes and every folder's names twice: as they are, and as they would be found after
//! a crash. [`DiskFile::sync`] and [`Disk::sync_dir`] copy the first to the second, and nothing else does. Links
//! and permissions are left to tests of the real implementation.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fmt, io};

use crate::disk::{Access, Disk, DiskFile, DiskLock, Entry, Kind, Metadata, Open, sync_failure};
use crate::randomness::Randomness;

/// A kind of call, for [`MemoryDisk::fail`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DiskCall {
    /// [`Disk::open`]
    Open,
    /// [`DiskFile::read_at`]
    Read,
    /// [`DiskFile::write_all_at`]
    Write,
    /// [`DiskFile::set_len`]
    SetLen,
    /// [`DiskFile::len`]
    Len,
    /// [`DiskFile::sync`]
    Sync,
    /// [`Disk::create_dir_all`]
    CreateDir,
    /// [`Disk::rename`]
    Rename,
    /// [`Disk::remove_file`]
    Remove,
    /// [`Disk::list`]
    List,
    /// [`Disk::metadata`]
    Metadata,
    /// [`Disk::sync_dir`]
    SyncDir,
    /// [`Disk::free_bytes`]
    FreeBytes,
    /// [`Disk::lock`]
    Lock,
}

impl DiskCall {
    /// Whether it can leave something behind that a crash before it would not have.
    fn changes(self) -> bool {
        !matches!(self, Self::Read | Self::Len | Self::List | Self::Metadata | Self::FreeBytes)
    }
}

/// A disk in memory, as one process sees it; clones share it.
///
/// After [`crash`](Self::crash) or [`kill`](Self::kill) every call on the old value and on all that it opened fails,
/// since a dead process must not reach the disk; the value returned is the next process.
#[derive(Clone)]
pub struct MemoryDisk {
    shared: Arc<Mutex<Shared>>,
    life: u64,
}

impl fmt::Debug for MemoryDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryDisk").field("life", &self.life).finish_non_exhaustive()
    }
}

struct Shared {
    /// By absolute path without `..`; the root is always there.
    folders: BTreeMap<PathBuf, Folder>,
    /// The number of the current process.
    life: u64,
    locked: Vec<Arc<Mutex<Inode>>>,
    capacity: Option<u64>,
    failures: Vec<Failure>,
    /// What can't be changed, with all below it.
    unwritable: BTreeMap<PathBuf, io::ErrorKind>,
    /// How many more changing calls succeed.
    changes_left: Option<u64>,
    /// How often the bytes of any file have become others.
    versions: u64,
}

#[derive(Default)]
struct Folder {
    names: BTreeMap<OsString, Node>,
    safe: BTreeMap<OsString, Node>,
}

#[derive(Clone)]
enum Node {
    File(Arc<Mutex<Inode>>),
    Folder,
}

#[derive(Default)]
struct Inode {
    bytes: Arc<Vec<u8>>,
    /// Shared with `bytes` until the next write, so that a sync costs nothing.
    safe: Arc<Vec<u8>>,
    /// A sync failed: later ones succeed, and save nothing.
    lossy: bool,
    /// The number of the last change of `bytes`.
    version: u64,
}

impl fmt::Debug for Inode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inode").finish_non_exhaustive()
    }
}

struct Failure {
    call: DiskCall,
    /// Only of this file.
    path: Option<PathBuf>,
    /// Calls of this kind until it happens.
    in_calls: u64,
    kind: io::ErrorKind,
}

#[derive(Debug)]
struct MemoryFile {
    disk: MemoryDisk,
    /// By which it was opened.
    path: PathBuf,
    inode: Arc<Mutex<Inode>>,
    writable: bool,
}

#[derive(Debug)]
struct MemoryLock {
    disk: MemoryDisk,
    inode: Arc<Mutex<Inode>>,
}

impl DiskLock for MemoryLock {}

impl Drop for MemoryLock {
    fn drop(&mut self) {
        let mut shared = self.disk.shared();
        // Another process may hold the lock of the same file by now.
        if shared.life == self.disk.life {
            shared.locked.retain(|held| !Arc::ptr_eq(held, &self.inode));
        }
    }
}

impl Default for MemoryDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryDisk {
    /// An empty disk without a limit.
    pub fn new() -> Self {
        let shared = Shared {
            folders: BTreeMap::from([(PathBuf::from("/"), Folder::default())]),
            life: 0,
            locked: Vec::new(),
            capacity: None,
            failures: Vec::new(),
            unwritable: BTreeMap::new(),
            changes_left: None,
            versions: 0,
        };
        Self { shared: Arc::new(Mutex::new(shared)), life: 0 }
    }

    /// Sets how many bytes all files may have together; what exceeds it is `StorageFull`.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.shared().capacity = bytes;
    }

    /// Makes the `nth` call of this kind from now (1 is the next) fail with `kind`, without effect but for a
    /// failed [`DiskCall::Sync`]: what was not safe by then never will be, although later syncs succeed.
    pub fn fail(&self, call: DiskCall, nth: u64, kind: io::ErrorKind) {
        self.shared().failures.push(Failure { call, path: None, in_calls: nth.max(1), kind });
    }

    /// Makes the next call of this kind on this file fail with `kind`; of those on open files alone and of renames.
    pub fn fail_at(&self, call: DiskCall, path: &Path, kind: io::ErrorKind) {
        self.shared().failures.push(Failure { call, path: Some(path.to_owned()), in_calls: 1, kind });
    }

    /// From now on every change of this file or folder, and of all below it, fails with `kind`; without one, none does any
    /// more.
    pub fn set_unwritable(&self, path: &Path, kind: Option<io::ErrorKind>) {
        let mut shared = self.shared();
        match kind {
            Some(kind) => drop(shared.unwritable.insert(path.to_owned(), kind)),
            None => drop(shared.unwritable.remove(path)),
        }
    }

    /// Lets `changes` more calls that change something through; from then on every call fails, as if the
    /// machine had stopped. With [`crash`](Self::crash) after it, a loop over `changes` tries every moment.
    pub fn stop_after(&self, changes: u64) {
        self.shared().changes_left = Some(changes);
    }

    /// The machine loses power: everything is reset to what was synced, and locks are released.
    #[must_use = "the next process's disk; every call on the old one fails"]
    pub fn crash(&self) -> Self {
        self.crash_where(&mut || false)
    }

    /// Like [`crash`](Self::crash), but of what was not synced each file's bytes and each folder's names
    /// survive or not by chance, since a machine may write things back before it is asked to.
    #[must_use = "the next process's disk; every call on the old one fails"]
    pub fn crash_by_chance(&self, randomness: &dyn Randomness) -> Self {
        self.crash_where(&mut || randomness.next_u64().is_multiple_of(2))
    }

    /// The process is killed and the machine keeps running: nothing is lost, and locks are released.
    #[must_use = "the next process's disk; every call on the old one fails"]
    pub fn kill(&self) -> Self {
        self.crash_where(&mut || true)
    }

    fn crash_where(&self, survives: &mut dyn FnMut() -> bool) -> Self {
        let mut shared = self.shared();
        shared.life += 1;
        shared.locked.clear();
        shared.failures.clear();
        shared.unwritable.clear();
        shared.changes_left = None;
        for folder in shared.folders.values_mut() {
            if survives() {
                folder.safe = folder.names.clone();
            } else {
                folder.names = folder.safe.clone();
            }
        }
        let mut seen: Vec<Arc<Mutex<Inode>>> = Vec::new();
        let mut versions = shared.versions;
        for node in shared.folders.values().flat_map(|folder| folder.names.values()) {
            let Node::File(inode) = node else { continue };
            // One file may have two names after a rename of which only half was safe.
            if seen.iter().any(|other| Arc::ptr_eq(other, inode)) {
                continue;
            }
            seen.push(inode.clone());
            let mut contents = lock(inode);
            if survives() {
                contents.safe = contents.bytes.clone();
            } else if !Arc::ptr_eq(&contents.bytes, &contents.safe) {
                contents.bytes = contents.safe.clone();
                versions += 1;
                contents.version = versions;
            }
            contents.lossy = false;
        }
        shared.versions = versions;
        // Parents come before their children.
        let mut kept: BTreeMap<PathBuf, Folder> = BTreeMap::new();
        for (path, folder) in std::mem::take(&mut shared.folders) {
            let named = match (path.parent(), path.file_name()) {
                (Some(above), Some(name)) => {
                    kept.get(above).is_some_and(|above| matches!(above.names.get(name), Some(Node::Folder)))
                }
                _ => true,
            };
            if named {
                kept.insert(path, folder);
            }
        }
        shared.folders = kept;
        Self { shared: self.shared.clone(), life: shared.life }
    }

    /// Every file below a folder, by its path, whatever fails: a look from outside that no process makes.
    pub fn files(&self, below: &Path) -> Vec<(PathBuf, Arc<Vec<u8>>)> {
        self.looked_at(below, |folder| &folder.names, |inode| &inode.bytes)
    }

    /// As [`files`](Self::files), as a crash at this moment would leave them.
    pub fn safe_files(&self, below: &Path) -> Vec<(PathBuf, Arc<Vec<u8>>)> {
        self.looked_at(below, |folder| &folder.safe, |inode| &inode.safe)
    }

    fn looked_at(
        &self,
        below: &Path,
        names: fn(&Folder) -> &BTreeMap<OsString, Node>,
        bytes: fn(&Inode) -> &Arc<Vec<u8>>,
    ) -> Vec<(PathBuf, Arc<Vec<u8>>)> {
        let shared = self.shared();
        let mut found = Vec::new();
        let folders = shared.folders.range(below.to_owned()..);
        for (path, folder) in folders.take_while(|(path, _)| path.starts_with(below)) {
            for (name, node) in names(folder) {
                if let Node::File(inode) = node {
                    found.push((path.join(name), Arc::clone(bytes(&lock(inode)))));
                }
            }
        }
        found
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        lock(&self.shared)
    }

    /// The checks that every call makes first.
    fn begin(&self, call: DiskCall) -> io::Result<MutexGuard<'_, Shared>> {
        self.begin_at(call, None)
    }

    fn begin_at(&self, call: DiskCall, path: Option<&Path>) -> io::Result<MutexGuard<'_, Shared>> {
        let mut shared = self.shared();
        if shared.life != self.life {
            return Err(io::Error::other("this process is dead"));
        }
        match &mut shared.changes_left {
            Some(0) => return Err(io::Error::other("the machine has stopped")),
            Some(left) if call.changes() => *left -= 1,
            _ => {}
        }
        let mut failed = None;
        let is_meant = |failure: &&mut Failure| {
            failure.call == call && (failure.path.is_none() || failure.path.as_deref() == path)
        };
        for failure in shared.failures.iter_mut().filter(is_meant) {
            failure.in_calls -= 1;
            if failure.in_calls == 0 {
                failed = Some(failure.kind);
            }
        }
        shared.failures.retain(|failure| failure.in_calls > 0);
        match failed {
            Some(kind) => Err(io::Error::new(kind, "an injected failure")),
            None => Ok(shared),
        }
    }
}

impl Shared {
    fn may_change(&self, path: &Path) -> io::Result<()> {
        match self.unwritable.iter().find(|(unwritable, _)| path.starts_with(unwritable)) {
            Some((_, kind)) => Err(io::Error::new(*kind, "an injected failure")),
            None => Ok(()),
        }
    }

    fn folder(&mut self, path: &Path) -> io::Result<&mut Folder> {
        if self.folders.contains_key(path) {
            return self.folders.get_mut(path).ok_or_else(|| io::ErrorKind::NotFound.into());
        }
        // A file in place of a folder is another error than a missing folder.
        for above in path.ancestors() {
            let (Some(parent), Some(name)) = (above.parent(), above.file_name()) else { break };
            let named = self.folders.get(parent).and_then(|folder| folder.names.get(name));
            if matches!(named, Some(Node::File(_))) {
                return Err(io::ErrorKind::NotADirectory.into());
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    fn node(&mut self, path: &Path) -> io::Result<Node> {
        let Some((folder, name)) = split(path) else { return Ok(Node::Folder) };
        self.folder(folder)?.names.get(name).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn file(&mut self, path: &Path) -> io::Result<Arc<Mutex<Inode>>> {
        match self.node(path)? {
            Node::File(inode) => Ok(inode),
            Node::Folder => Err(io::ErrorKind::IsADirectory.into()),
        }
    }

    /// The bytes of all files that have a name.
    fn used(&self) -> u64 {
        let files = self.folders.values().flat_map(|folder| folder.names.values());
        files
            .map(|node| match node {
                Node::File(inode) => lock(inode).bytes.len() as u64,
                Node::Folder => 0,
            })
            .sum()
    }

    /// How many of `more` bytes still fit.
    fn free(&self, more: u64) -> u64 {
        self.capacity.map_or(more, |capacity| more.min(capacity.saturating_sub(self.used())))
    }

    fn open(&mut self, path: &Path, how: Open) -> io::Result<Arc<Mutex<Inode>>> {
        let (folder, name) = split(path).ok_or(io::ErrorKind::IsADirectory)?;
        self.versions += 1;
        let version = self.versions;
        let folder = self.folder(folder)?;
        match (folder.names.get(name), how) {
            (Some(_), Open::CreateNew) => Err(io::ErrorKind::AlreadyExists.into()),
            (Some(Node::Folder), _) => Err(io::ErrorKind::IsADirectory.into()),
            (Some(Node::File(inode)), _) => Ok(inode.clone()),
            (None, Open::Read | Open::Update) => Err(io::ErrorKind::NotFound.into()),
            (None, Open::CreateNew | Open::UpdateOrCreate) => {
                let inode = Arc::new(Mutex::new(Inode { version, ..Inode::default() }));
                folder.names.insert(name.to_owned(), Node::File(inode.clone()));
                Ok(inode)
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pieces that are appended at once are not mixed.
static APPENDING: Mutex<()> = Mutex::new(());

/// The folder and the name in it; nothing for the root.
fn split(path: &Path) -> Option<(&Path, &std::ffi::OsStr)> {
    Some((path.parent()?, path.file_name()?))
}

/// The path from the root; a relative one counts from there.
fn absolute(path: &Path) -> io::Result<PathBuf> {
    let mut whole = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => whole.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "a path with `..`"));
            }
        }
    }
    Ok(whole)
}

impl Disk for MemoryDisk {
    fn open(&self, path: &Path, how: Open, _access: Access) -> io::Result<Box<dyn DiskFile>> {
        let (mut shared, path) = (self.begin(DiskCall::Open)?, absolute(path)?);
        if how != Open::Read {
            shared.may_change(&path)?;
        }
        let inode = shared.open(&path, how)?;
        Ok(Box::new(MemoryFile { disk: self.clone(), path, inode, writable: how != Open::Read }))
    }

    fn append(&self, path: &Path, bytes: &[u8], access: Access) -> io::Result<()> {
        // The steps of the real implementation, each of which may be the last before a crash.
        let _one_at_a_time = lock(&APPENDING);
        match self.open(path, Open::CreateNew, access) {
            Ok(_) => self.sync_dir(path.parent().unwrap_or(path)).map_err(sync_failure)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        let file = self.open(path, Open::Update, access)?;
        file.write_all_at(bytes, file.len()?)?;
        file.sync().map_err(sync_failure)
    }

    fn create_dir_all(&self, path: &Path, _access: Access) -> io::Result<()> {
        let mut shared = self.begin(DiskCall::CreateDir)?;
        let path = absolute(path)?;
        let mut above: Vec<&Path> = path.ancestors().collect();
        above.reverse();
        for folder in above {
            let Some((parent, name)) = split(folder) else { continue };
            match shared.folder(parent)?.names.get(name) {
                Some(Node::Folder) => {}
                Some(Node::File(_)) if folder == path => return Err(io::ErrorKind::AlreadyExists.into()),
                Some(Node::File(_)) => return Err(io::ErrorKind::NotADirectory.into()),
                None => {
                    shared.may_change(folder)?;
                    shared.folder(parent)?.names.insert(name.to_owned(), Node::Folder);
                    shared.folders.insert(folder.to_owned(), Folder::default());
                }
            }
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (from, to) = (absolute(from)?, absolute(to)?);
        let mut shared = self.begin_at(DiskCall::Rename, Some(&from))?;
        shared.may_change(&from)?;
        shared.may_change(&to)?;
        let inode = shared.file(&from)?;
        match shared.node(&to) {
            Ok(Node::Folder) => return Err(io::ErrorKind::IsADirectory.into()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(Node::File(_)) | Err(_) => {}
        }
        let (folder, name) = split(&to).ok_or(io::ErrorKind::IsADirectory)?;
        shared.folder(folder)?.names.insert(name.to_owned(), Node::File(inode));
        if from != to {
            let (folder, name) = split(&from).ok_or(io::ErrorKind::IsADirectory)?;
            shared.folder(folder)?.names.remove(name);
        }
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut shared = self.begin(DiskCall::Remove)?;
        let path = absolute(path)?;
        shared.may_change(&path)?;
        shared.file(&path)?;
        let (folder, name) = split(&path).ok_or(io::ErrorKind::IsADirectory)?;
        shared.folder(folder)?.names.remove(name);
        Ok(())
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        let mut shared = self.begin(DiskCall::List)?;
        let names = &shared.folder(&absolute(folder)?)?.names;
        Ok(names.iter().map(|(name, node)| Entry { name: name.clone(), kind: kind_of(node) }).collect())
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        let node = self.begin(DiskCall::Metadata)?.node(&absolute(path)?)?;
        let (len, stamp) = match &node {
            Node::File(inode) => {
                let contents = lock(inode);
                (contents.bytes.len() as u64, contents.version)
            }
            Node::Folder => (0, 0),
        };
        Ok(Metadata { kind: kind_of(&node), len, stamp: (stamp, 0) })
    }

    fn sync_dir(&self, folder: &Path) -> io::Result<()> {
        let mut shared = self.begin(DiskCall::SyncDir)?;
        let folder = shared.folder(&absolute(folder)?)?;
        folder.safe = folder.names.clone();
        Ok(())
    }

    fn may_write(&self, folder: &Path) -> io::Result<()> {
        self.shared().may_change(&absolute(folder)?)
    }

    fn free_bytes(&self, folder: &Path) -> io::Result<u64> {
        let mut shared = self.begin(DiskCall::FreeBytes)?;
        shared.folder(&absolute(folder)?)?;
        Ok(shared.free(u64::MAX))
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn DiskLock>> {
        let mut shared = self.begin(DiskCall::Lock)?;
        let path = absolute(path)?;
        shared.may_change(&path)?;
        let inode = shared.open(&path, Open::UpdateOrCreate)?;
        if shared.locked.iter().any(|held| Arc::ptr_eq(held, &inode)) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        shared.locked.push(inode.clone());
        Ok(Box::new(MemoryLock { disk: self.clone(), inode }))
    }
}

fn kind_of(node: &Node) -> Kind {
    match node {
        Node::File(_) => Kind::File,
        Node::Folder => Kind::Folder,
    }
}

impl MemoryFile {
    /// The checks of every call that changes the bytes.
    fn begin_change(&self, call: DiskCall) -> io::Result<MutexGuard<'_, Shared>> {
        let shared = self.disk.begin_at(call, Some(&self.path))?;
        shared.may_change(&self.path)?;
        if self.writable { Ok(shared) } else { Err(rustix::io::Errno::BADF.into()) }
    }
}

fn index(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge.into())
}

impl DiskFile for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let _alive = self.disk.begin(DiskCall::Read)?;
        let contents = lock(&self.inode);
        let rest = contents.bytes.get(index(offset)?..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut shared = self.begin_change(DiskCall::Write)?;
        let end = offset + bytes.len() as u64;
        let more = end.saturating_sub(lock(&self.inode).bytes.len() as u64);
        let missing = more - shared.free(more);
        // As a full disk does: what fits is written, the rest is an error.
        let fits = &bytes[..bytes.len().saturating_sub(index(missing)?)];
        if !fits.is_empty() {
            let mut contents = lock(&self.inode);
            shared.versions += 1;
            contents.version = shared.versions;
            let whole = Arc::make_mut(&mut contents.bytes);
            let from = index(offset)?;
            if whole.len() < from + fits.len() {
                whole.resize(from + fits.len(), 0);
            }
            whole[from..from + fits.len()].copy_from_slice(fits);
        }
        if missing == 0 { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut shared = self.begin_change(DiskCall::SetLen)?;
        let mut contents = lock(&self.inode);
        shared.versions += 1;
        contents.version = shared.versions;
        Arc::make_mut(&mut contents.bytes).resize(index(len)?, 0);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        let _alive = self.disk.begin(DiskCall::Len)?;
        Ok(lock(&self.inode).bytes.len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        match self.disk.begin_at(DiskCall::Sync, Some(&self.path)) {
            Ok(_alive) => {
                let mut contents = lock(&self.inode);
                if !contents.lossy {
                    contents.safe = contents.bytes.clone();
                }
                Ok(())
            }
            Err(error) => {
                lock(&self.inode).lossy = true;
                Err(error)
            }
        }
    }

    fn release(&self, _: Range<u64>) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{RealDisk, create_folders, read_file, replace_file};
    use crate::sim::randomness::SeededRandomness;

    /// Runs one claim over both implementations of the seam, each with an empty folder.
    fn on_both(claim: impl Fn(&dyn Disk, &Path)) {
        let folder = tempfile::tempdir().unwrap();
        claim(&RealDisk, folder.path());
        let disk = MemoryDisk::new();
        disk.create_dir_all(Path::new("/srv"), Access::Owner).unwrap();
        claim(&disk, Path::new("/srv"));
    }

    fn write(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Box<dyn DiskFile> {
        let file = disk.open(path, Open::UpdateOrCreate, Access::Owner).unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    #[test]
    fn both_open_files_as_they_are_asked_to() {
        use io::ErrorKind::{AlreadyExists, NotFound};
        // Whether the file exists; how it is opened; the result.
        let table = [
            (false, Open::Read, Err(NotFound)),
            (false, Open::Update, Err(NotFound)),
            (false, Open::UpdateOrCreate, Ok(0)),
            (false, Open::CreateNew, Ok(0)),
            (true, Open::Read, Ok(3)),
            (true, Open::Update, Ok(3)),
            (true, Open::UpdateOrCreate, Ok(3)),
            (true, Open::CreateNew, Err(AlreadyExists)),
        ];
        for (there, how, expected) in table {
            on_both(|disk, folder| {
                let path = folder.join("file");
                if there {
                    write(disk, &path, b"old");
                }
                let found = disk.open(&path, how, Access::Owner).map(|file| file.len().unwrap());
                assert_eq!(found.map_err(|error| error.kind()), expected, "{there} {how:?} {disk:?}");
            });
        }
    }

    #[test]
    fn both_read_and_write_at_offsets() {
        on_both(|disk, folder| {
            let file = write(disk, &folder.join("file"), b"0123456789");
            file.write_all_at(b"ab", 4).unwrap();
            file.write_all_at(b"z", 12).unwrap();
            file.set_len(14).unwrap();
            let mut buffer = [9; 20];
            assert_eq!(file.read_at(&mut buffer, 3).unwrap(), 11, "{disk:?}");
            assert_eq!(&buffer[..11], b"3ab6789\0\0z\0");
            assert_eq!(file.read_at(&mut buffer, 14).unwrap(), 0);
            file.set_len(2).unwrap();
            assert_eq!(read_file(disk, &folder.join("file"), 10).unwrap(), b"01");
            let reader = disk.open(&folder.join("file"), Open::Read, Access::Owner).unwrap();
            assert!(reader.write_all_at(b"x", 0).is_err(), "{disk:?}");
        });
    }

    #[test]
    fn both_list_entries_sorted() {
        on_both(|disk, folder| {
            write(disk, &folder.join("b"), b"12");
            disk.create_dir_all(&folder.join("a/deeper"), Access::Owner).unwrap();
            disk.create_dir_all(&folder.join("a/deeper"), Access::Owner).unwrap();
            let entries: Vec<_> =
                disk.list(folder).unwrap().into_iter().map(|entry| (entry.name, entry.kind)).collect();
            assert_eq!(entries, [("a".into(), Kind::Folder), ("b".into(), Kind::File)], "{disk:?}");
            let found = disk.metadata(&folder.join("b")).unwrap();
            assert_eq!((found.kind, found.len), (Kind::File, 2));
            assert_eq!(disk.metadata(&folder.join("b")).unwrap(), found);
            crate::disk::replace_file(disk, &folder.join("b"), b"34", Access::Owner).unwrap();
            assert_ne!(disk.metadata(&folder.join("b")).unwrap().stamp, found.stamp, "another file");
            assert_eq!(disk.metadata(&folder.join("a")).unwrap().kind, Kind::Folder);
        });
    }

    #[test]
    fn both_rename_over_what_had_the_name_and_remove_once() {
        on_both(|disk, folder| {
            write(disk, &folder.join("new"), b"new");
            let old = write(disk, &folder.join("file"), b"old");
            disk.rename(&folder.join("new"), &folder.join("file")).unwrap();
            assert_eq!(read_file(disk, &folder.join("file"), 10).unwrap(), b"new", "{disk:?}");
            assert_eq!(old.len().unwrap(), 3, "an open file outlives its name");
            disk.remove_file(&folder.join("file")).unwrap();
            assert!(disk.list(folder).unwrap().is_empty());
        });
    }

    #[test]
    fn both_fail_with_the_same_kind_of_error() {
        use io::ErrorKind::{AlreadyExists, IsADirectory, NotADirectory, NotFound};
        type Attempt = fn(&dyn Disk, &Path) -> io::Result<()>;
        let table: [(&str, Attempt, io::ErrorKind); 9] = [
            ("remove nothing", |disk, at| disk.remove_file(&at.join("none")), NotFound),
            ("remove a folder", |disk, at| disk.remove_file(&at.join("folder")), IsADirectory),
            ("rename nothing", |disk, at| disk.rename(&at.join("none"), &at.join("x")), NotFound),
            (
                "rename onto a folder",
                |disk, at| disk.rename(&at.join("file"), &at.join("folder")),
                IsADirectory,
            ),
            ("list nothing", |disk, at| disk.list(&at.join("none")).map(drop), NotFound),
            ("list a file", |disk, at| disk.list(&at.join("file")).map(drop), NotADirectory),
            (
                "open below a file",
                |disk, at| disk.open(&at.join("file/x"), Open::Read, Access::Owner).map(drop),
                NotADirectory,
            ),
            (
                "a folder where a file is",
                |disk, at| disk.create_dir_all(&at.join("file"), Access::Owner),
                AlreadyExists,
            ),
            ("look at nothing", |disk, at| disk.metadata(&at.join("none")).map(drop), NotFound),
        ];
        for (name, attempt, kind) in table {
            on_both(|disk, folder| {
                write(disk, &folder.join("file"), b"x");
                disk.create_dir_all(&folder.join("folder"), Access::Owner).unwrap();
                assert_eq!(attempt(disk, folder).unwrap_err().kind(), kind, "{name} {disk:?}");
            });
        }
    }

    #[test]
    fn both_make_folders_and_refuse_a_file_in_their_place() {
        on_both(|disk, folder| {
            for _ in 0..2 {
                create_folders(disk, &folder.join("a/b"), Access::Owner).unwrap();
            }
            assert_eq!(disk.metadata(&folder.join("a/b")).unwrap().kind, Kind::Folder, "{disk:?}");
            write(disk, &folder.join("file"), b"x");
            for path in ["file", "file/below"] {
                assert!(create_folders(disk, &folder.join(path), Access::Owner).is_err(), "{path} {disk:?}");
            }
        });
    }

    #[test]
    fn folders_once_made_are_safe_also_if_their_first_maker_was_killed_on_the_way() {
        let path = Path::new("/srv/a/b/c");
        for changes in 0..10 {
            let disk = memory();
            disk.stop_after(changes);
            let _ = create_folders(&disk, path, Access::Owner);
            let disk = disk.kill();
            create_folders(&disk, path, Access::Owner).unwrap();
            assert_eq!(disk.crash().metadata(path).unwrap().kind, Kind::Folder, "{changes}");
        }
    }

    #[test]
    fn both_lock_a_file_once() {
        on_both(|disk, folder| {
            let held = disk.lock(&folder.join("lock")).unwrap();
            assert_eq!(disk.lock(&folder.join("lock")).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            disk.lock(&folder.join("other")).unwrap();
            drop(held);
            disk.lock(&folder.join("lock")).unwrap();
        });
    }

    #[test]
    fn both_sync_and_know_their_free_space() {
        on_both(|disk, folder| {
            write(disk, &folder.join("file"), b"x").sync().unwrap();
            disk.sync_dir(folder).unwrap();
            assert!(disk.free_bytes(folder).unwrap() > 0);
            assert!(disk.sync_dir(&folder.join("none")).is_err());
        });
    }

    /// A disk with the safe folder `/srv`.
    fn memory() -> MemoryDisk {
        let disk = MemoryDisk::new();
        disk.create_dir_all(Path::new("/srv"), Access::Owner).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        disk
    }

    const FILE: &str = "/srv/file";

    fn found(disk: &MemoryDisk) -> Option<Vec<u8>> {
        read_file(disk, Path::new(FILE), 100).ok()
    }

    #[test]
    fn a_crash_forgets_what_was_not_synced() {
        // Bytes synced before the second write; the folder synced; what is found.
        let table: [(bool, bool, Option<&[u8]>); 4] =
            [(true, true, Some(b"one")), (false, true, Some(b"")), (true, false, None), (false, false, None)];
        for (bytes, names, expected) in table {
            let disk = memory();
            let file = write(&disk, Path::new(FILE), b"one");
            if bytes {
                file.sync().unwrap();
            }
            if names {
                disk.sync_dir(Path::new("/srv")).unwrap();
            }
            file.write_all_at(b"two", 0).unwrap();
            assert_eq!(found(&disk.crash()).as_deref(), expected, "{bytes} {names}");
        }
    }

    #[test]
    fn a_killed_process_loses_nothing() {
        let disk = memory();
        write(&disk, Path::new(FILE), b"one");
        assert_eq!(found(&disk.kill()).unwrap(), b"one");
    }

    #[test]
    fn a_crash_forgets_renames_removals_and_folders() {
        let disk = memory();
        replace_file(&disk, Path::new(FILE), b"old", Access::Owner).unwrap();
        write(&disk, Path::new("/srv/new"), b"new").sync().unwrap();
        disk.rename(Path::new("/srv/new"), Path::new(FILE)).unwrap();
        disk.create_dir_all(Path::new("/srv/deep/deeper"), Access::Owner).unwrap();
        let disk = disk.crash();
        assert_eq!(found(&disk).unwrap(), b"old");
        assert!(disk.list(Path::new("/srv/deep")).is_err());
        disk.remove_file(Path::new(FILE)).unwrap();
        assert_eq!(found(&disk.crash()).unwrap(), b"old");
    }

    #[test]
    fn a_dead_process_reaches_nothing_and_holds_no_lock() {
        let disk = memory();
        let file = write(&disk, Path::new(FILE), b"x");
        let held = disk.lock(Path::new("/srv/lock")).unwrap();
        let next = disk.kill();
        assert!(file.write_all_at(b"y", 0).is_err() && file.sync().is_err());
        assert!(disk.list(Path::new("/srv")).is_err());
        let held_by_next = next.lock(Path::new("/srv/lock")).unwrap();
        drop(held);
        assert!(
            next.lock(Path::new("/srv/lock")).is_err(),
            "the dead one's value released the living one's lock"
        );
        drop(held_by_next);
    }

    #[test]
    fn after_a_failed_sync_a_second_one_saves_nothing() {
        let disk = memory();
        replace_file(&disk, Path::new(FILE), b"old", Access::Owner).unwrap();
        let file = write(&disk, Path::new(FILE), b"new");
        disk.fail(DiskCall::Sync, 1, io::ErrorKind::Other);
        assert!(file.sync().is_err());
        file.sync().unwrap();
        assert_eq!(found(&disk.crash()).unwrap(), b"old");
    }

    #[test]
    fn a_full_disk_takes_what_fits() {
        let disk = memory();
        disk.set_capacity(Some(5));
        let file = disk.open(Path::new(FILE), Open::CreateNew, Access::Owner).unwrap();
        assert_eq!(file.write_all_at(b"12345678", 0).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(found(&disk).unwrap(), b"12345");
        assert_eq!(disk.free_bytes(Path::new("/srv")).unwrap(), 0);
        file.write_all_at(b"abc", 1).unwrap();
    }

    #[test]
    fn the_nth_call_of_a_kind_fails_once() {
        let disk = memory();
        disk.fail(DiskCall::List, 2, io::ErrorKind::PermissionDenied);
        let mut results = (0..3).map(|_| disk.list(Path::new("/srv")).is_ok());
        assert_eq!([results.next(), results.next(), results.next()], [Some(true), Some(false), Some(true)]);
    }

    #[test]
    fn what_is_unwritable_can_be_read_and_the_rest_be_written() {
        let disk = memory();
        let file = write(&disk, Path::new(FILE), b"old");
        disk.set_unwritable(Path::new(FILE), Some(io::ErrorKind::ReadOnlyFilesystem));
        let refused = file.write_all_at(b"new", 0).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
        assert!(disk.remove_file(Path::new(FILE)).is_err());
        assert_eq!(found(&disk).unwrap(), b"old");
        write(&disk, Path::new("/srv/other"), b"x");
        disk.set_unwritable(Path::new(FILE), None);
        file.write_all_at(b"new", 0).unwrap();
    }

    #[test]
    fn replacing_a_file_is_whole_whenever_the_machine_stops() {
        for seed in 0..20 {
            let randomness = SeededRandomness::new(seed);
            for changes in 0.. {
                let disk = memory();
                replace_file(&disk, Path::new(FILE), b"old", Access::Owner).unwrap();
                disk.stop_after(changes);
                let done = replace_file(&disk, Path::new(FILE), b"new", Access::Owner).is_ok();
                let disk = disk.crash_by_chance(&randomness);
                let found = found(&disk).unwrap();
                assert!(found == b"new" || (!done && found == b"old"), "after {changes} changes: {found:?}");
                if done {
                    break;
                }
            }
        }
    }
}
