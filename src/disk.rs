//! The disk seam: files of archive and state.
//!
//! Calls block; async callers make them on the blocking pool. The real form is [`RealDisk`]; the simulated
//! one (`sim::disk::MemoryDisk`) keeps files in memory and, on a crash, forgets what was not synced, so every
//! promise made here is spelled out: **bytes** are safe after [`DiskFile::sync`], **names** (created, renamed,
//! removed) after [`Disk::sync_dir`] of their folder, and not before.

use std::cell::Cell;
use std::ffi::OsString;
use std::fmt::Debug;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::sync::Once;

use rustix::fs::{Access as Wanted, Advice, AtFlags, OFlags};
use rustix::io::Errno;
use tokio::task::{JoinHandle, spawn_blocking};

/// The kind of a directory entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link, a device, a socket …: never made by this program.
    Other,
}

/// One name in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name alone, as the file system has it.
    pub name: OsString,
    /// What it is; links are not followed.
    pub kind: Kind,
}

/// What is known of a name without opening it; links are not followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metadata {
    /// What it is.
    pub kind: Kind,
    /// Its length in bytes.
    pub len: u64,
    /// Two numbers that are others once a file is replaced or written to, such as its inode and when it was modified.
    pub stamp: (u64, i128),
}

/// How to open a file. No form follows a symbolic link in the last place of the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    Update,
    /// For reading and writing; made if missing, never shortened.
    UpdateOrCreate,
    /// For reading and writing; an error of kind `AlreadyExists` if the name is taken.
    CreateNew,
}

/// Who may read new files and folders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only the owner (0600, folders 0700).
    Owner,
    /// The owner, and the group to read (0640, folders 0750).
    Group,
    /// Everyone to read (0644, folders 0755).
    Everyone,
}

impl Access {
    fn mode(self, folder: bool) -> u32 {
        match (self, folder) {
            (Self::Owner, false) => 0o600,
            (Self::Owner, true) => 0o700,
            (Self::Group, false) => 0o640,
            (Self::Group, true) => 0o750,
            (Self::Everyone, false) => 0o644,
            (Self::Everyone, true) => 0o755,
        }
    }
}

/// An open file. Reading and writing name their offset, so that several threads may share it.
pub trait DiskFile: Send + Sync + Debug {
    /// Reads at most `buffer.len()` bytes; 0 at the end.
    ///
    /// # Errors
    /// Any error of the disk.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes all of `bytes`, growing the file where needed.
    ///
    /// # Errors
    /// Any error of the disk; part of `bytes` may have been written then.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Shortens or grows the file.
    ///
    /// # Errors
    /// Any error of the disk.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// The length in bytes.
    ///
    /// # Errors
    /// Any error of the disk.
    fn len(&self) -> io::Result<u64>;

    /// Whether the file has no bytes.
    ///
    /// # Errors
    /// Any error of the disk.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Returns once all that was written is safe from a crash. After an error nothing may be trusted: a
    /// second call can succeed although bytes were lost.
    ///
    /// # Errors
    /// Any error of the disk.
    fn sync(&self) -> io::Result<()>;

    /// Advises the kernel to drop these bytes from the page cache, as far as they are safe: an image that streams
    /// through should not displace other data, and a later read of it should come from the disk itself.
    fn release(&self, bytes: Range<u64>);
}

/// A lock that lasts until it is dropped, or its process ends.
pub trait DiskLock: Send + Sync + Debug {}

/// What was written could not be made safe from a crash.
#[derive(Debug, thiserror::Error)]
#[error("it could not be made safe from a crash")]
struct SyncFailure(#[source] io::Error);

/// Marks the error of a sync within [`Disk::append`].
pub(crate) fn sync_failure(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), SyncFailure(error))
}

/// Whether [`Disk::append`] failed because its bytes could not be made safe.
pub fn is_sync_failure(error: &io::Error) -> bool {
    error.get_ref().and_then(|inner| inner.downcast_ref::<SyncFailure>()).is_some()
}

/// A file system.
pub trait Disk: Send + Sync + Debug {
    /// Opens `path`. A new file belongs to the owner of its folder, if this process may set that.
    ///
    /// # Errors
    /// Any error of the disk.
    fn open(&self, path: &Path, how: Open, access: Access) -> io::Result<Box<dyn DiskFile>>;

    /// Adds `bytes` to the end of `path` (made if missing) and returns once they are safe from a crash, and
    /// so is the name if it was made. Several processes may add to one file: pieces are never mixed.
    ///
    /// # Errors
    /// Any error of the disk; part of `bytes` may be there then. After one that [`is_sync_failure`] recognizes,
    /// later additions can't be trusted either, as after a failed [`DiskFile::sync`].
    fn append(&self, path: &Path, bytes: &[u8], access: Access) -> io::Result<()>;

    /// Makes the folder and all above it that are missing.
    ///
    /// # Errors
    /// Any error of the disk; a name that is taken by something else is an error.
    fn create_dir_all(&self, path: &Path, access: Access) -> io::Result<()>;

    /// Renames a file on the same file system, atomically replacing a file of the new name.
    ///
    /// # Errors
    /// Any error of the disk.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// Any error of the disk; `NotFound` if there is none.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// The names in a folder, sorted.
    ///
    /// # Errors
    /// Any error of the disk.
    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>>;

    /// The kind and length of a directory entry.
    ///
    /// # Errors
    /// Any error of the disk; `NotFound` if it is not there.
    fn metadata(&self, path: &Path) -> io::Result<Metadata>;

    /// An absolute path with all symbolic links followed, as far as it exists: two paths that lead to one folder become
    /// equal. A disk without links returns it as it is.
    ///
    /// # Errors
    /// Any error of the disk but `NotFound`.
    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(path.to_owned())
    }

    /// Returns once the names in this folder are safe from a crash.
    ///
    /// # Errors
    /// Any error of the disk.
    fn sync_dir(&self, folder: &Path) -> io::Result<()>;

    /// Whether this process may create files in `folder`, as far as that can be known without trying.
    ///
    /// # Errors
    /// Why it may not.
    fn may_write(&self, _folder: &Path) -> io::Result<()> {
        Ok(())
    }

    /// Bytes that we may still write on the file system of `folder`.
    ///
    /// # Errors
    /// Any error of the disk.
    fn free_bytes(&self, folder: &Path) -> io::Result<u64>;

    /// Locks `path` (made if missing) against other processes, and against this one.
    ///
    /// # Errors
    /// `WouldBlock` if another holds it; else any error of the disk.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn DiskLock>>;
}

thread_local! {
    static HAS_THREADS: Cell<bool> = const { Cell::new(true) };
}

/// From now on, what blocks is a task of the runtime on this thread, and no work for another one: a simulation with a runtime of
/// one thread then has no other.
pub fn without_threads() {
    HAS_THREADS.set(false);
}

/// Begins work that may block, on the blocking pool.
pub(crate) fn begin_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    if HAS_THREADS.get() { spawn_blocking(work) } else { tokio::spawn(async { work() }) }
}

/// Runs blocking work (these calls, hashing) on the blocking pool, so that nothing else waits for it.
///
/// A panic in it continues in the caller. Work that the runtime refuses, since it is ending, never returns: the
/// caller is about to be dropped as well.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match begin_blocking(work).await {
        Ok(done) => done,
        Err(lost) => match lost.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => std::future::pending().await,
        },
    }
}

/// Reads a whole file of at most `max` bytes.
///
/// # Errors
/// `FileTooLarge` beyond `max`; else any error of the disk.
pub fn read_file(disk: &dyn Disk, path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let file = disk.open(path, Open::Read, Access::Owner)?;
    let len = file.len()?;
    if len > max {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it has {len} bytes, more than {max}"),
        ));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or_default());
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = file.read_at(&mut buffer, bytes.len() as u64)?;
        if count == 0 {
            return Ok(bytes);
        }
        bytes.extend_from_slice(&buffer[..count]);
        if bytes.len() as u64 > max {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {max} bytes")));
        }
    }
}

/// Replaces `path` by `bytes` in one step: after a crash at any moment it holds the old or the new, whole.
///
/// # Errors
/// Any error of the disk; `path` is as it was then, or new.
pub fn replace_file(disk: &dyn Disk, path: &Path, bytes: &[u8], access: Access) -> io::Result<()> {
    let folder = folder_of(path)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let beside = folder.join(name);
    match disk.remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        // A file that a crash left, or none.
        _ => {}
    }
    let made = disk.open(&beside, Open::CreateNew, access).and_then(|file| {
        file.write_all_at(bytes, 0)?;
        file.sync()?;
        disk.rename(&beside, path)
    });
    if let Err(error) = made {
        // Leave no unfinished file on a full disk.
        let _ = disk.remove_file(&beside);
        return Err(error);
    }
    disk.sync_dir(&folder)
}

/// Free bytes of a folder, or of the nearest one above it while it does not exist; `None` if the disk can't say.
pub(crate) fn free_bytes_at(disk: &dyn Disk, path: &Path) -> Option<u64> {
    let mut answers = path.ancestors().map(|folder| disk.free_bytes(folder));
    let is_missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    answers.find(|answer| !answer.as_ref().is_err_and(is_missing))?.ok()
}

/// Makes the folder and all above it that are missing, and returns once their names are safe from a crash.
///
/// Each name is made safe before the next folder is made. So of those that are there already only the last may
/// not be safe yet, if its maker was stopped just then: its name is made safe as well.
///
/// # Errors
/// Any error of the disk; a name that is taken by something else is an error.
pub fn create_folders(disk: &dyn Disk, path: &Path, access: Access) -> io::Result<()> {
    let mut missing = Vec::new();
    for folder in path.ancestors().filter(|folder| !folder.as_os_str().is_empty()) {
        match disk.metadata(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(folder),
            Err(error) => return Err(error),
            Ok(_) => {
                match folder.parent().map_or(Ok(()), |above| sync_names(disk, above)) {
                    // In a folder that we may not read we have made nothing.
                    Err(error) if error.kind() != io::ErrorKind::PermissionDenied => return Err(error),
                    _ => break,
                }
            }
        }
    }
    for folder in missing.into_iter().rev() {
        disk.create_dir_all(folder, access)?;
        folder.parent().map_or(Ok(()), |above| sync_names(disk, above))?;
    }
    disk.create_dir_all(path, access)
}

fn sync_names(disk: &dyn Disk, folder: &Path) -> io::Result<()> {
    disk.sync_dir(if folder.as_os_str().is_empty() { Path::new(".") } else { folder })
}

fn folder_of(path: &Path) -> io::Result<PathBuf> {
    path.parent()
        .map(Path::to_owned)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a path without a folder"))
}

/// The machine's file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealDisk;

#[derive(Debug)]
struct RealLock(File);

impl Drop for RealLock {
    fn drop(&mut self) {
        // Closing the file would do, unless a process that is just being started still has it open.
        let _ = self.0.unlock();
    }
}

impl DiskLock for RealLock {}

impl DiskFile for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn release(&self, bytes: Range<u64>) {
        if let Some(len) = NonZeroU64::new(bytes.end.saturating_sub(bytes.start)) {
            let _ = rustix::fs::fadvise(self, bytes.start, Some(len), Advice::DontNeed);
        }
    }
}

/// Gives what root made in a folder of another user to that user; elsewhere this does nothing.
fn give_to_owner_of_folder(path: &Path, made: &File) -> io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let folder = fs::symlink_metadata(folder_of(path)?)?;
    let mine = made.metadata()?;
    if (folder.uid(), folder.gid()) != (mine.uid(), mine.gid()) {
        std::os::unix::fs::fchown(made, Some(folder.uid()), Some(folder.gid()))?;
    }
    Ok(())
}

/// Neither follows a link in the last place nor waits for the other end of a pipe.
fn no_follow() -> i32 {
    i32::try_from((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits()).unwrap_or_default()
}

impl RealDisk {
    fn open_file(path: &Path, how: Open, access: Access) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).mode(access.mode(false)).custom_flags(no_follow());
        match how {
            Open::Read => options.open(path),
            Open::Update => options.write(true).open(path),
            Open::CreateNew => {
                let file = options.write(true).create_new(true).open(path)?;
                give_to_owner_of_folder(path, &file)?;
                Ok(file)
            }
            Open::UpdateOrCreate => match options.clone().write(true).create_new(true).open(path) {
                Ok(file) => {
                    give_to_owner_of_folder(path, &file)?;
                    Ok(file)
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => options.write(true).open(path),
                Err(error) => Err(error),
            },
        }
    }
}

impl Disk for RealDisk {
    fn open(&self, path: &Path, how: Open, access: Access) -> io::Result<Box<dyn DiskFile>> {
        let file = Self::open_file(path, how, access)?;
        // Opened without blocking, so that a pipe put in our way can't stall us; it is refused here.
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
        }
        Ok(Box::new(file))
    }

    fn append(&self, path: &Path, bytes: &[u8], access: Access) -> io::Result<()> {
        let folder = folder_of(path)?;
        // Created before it is opened, so that it gets the folder's owner and its name is made safe.
        match Self::open_file(path, Open::CreateNew, access) {
            Ok(_) => self.sync_dir(&folder).map_err(sync_failure)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        let mut file = OpenOptions::new().append(true).custom_flags(no_follow()).open(path)?;
        file.write_all(bytes)?;
        file.sync_data().map_err(sync_failure)
    }

    fn create_dir_all(&self, path: &Path, access: Access) -> io::Result<()> {
        if path.as_os_str().is_empty() || fs::metadata(path).is_ok_and(|found| found.is_dir()) {
            return Ok(());
        }
        self.create_dir_all(&folder_of(path)?, access)?;
        match DirBuilder::new().mode(access.mode(true)).create(path) {
            Ok(()) => {
                // The umask may have taken bits away that the group needs.
                fs::set_permissions(path, Permissions::from_mode(access.mode(true)))?;
                give_to_owner_of_folder(path, &OpenOptions::new().read(true).open(path)?)
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            Err(error) => Err(error),
        }
    }

    #[expect(clippy::disallowed_methods, reason = "this is the seam's real form")]
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    #[expect(clippy::disallowed_methods, reason = "this is the seam's real form")]
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    #[expect(clippy::disallowed_methods, reason = "this is the seam's real form")]
    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            entries.push(Entry { name: entry.file_name(), kind: kind_of(entry.file_type()?) });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        let found = fs::symlink_metadata(path)?;
        let modified = i128::from(found.mtime()) * 1_000_000_000 + i128::from(found.mtime_nsec());
        let stamp = (found.ino(), modified);
        Ok(Metadata { kind: kind_of(found.file_type()), len: found.len(), stamp })
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        for existing in path.ancestors() {
            match fs::canonicalize(existing) {
                Ok(resolved) => {
                    let missing = path.strip_prefix(existing).unwrap_or(Path::new(""));
                    // Joined with nothing, a path would get a slash at its end.
                    return Ok(resolved.components().chain(missing.components()).collect());
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(path.to_owned())
    }

    fn sync_dir(&self, folder: &Path) -> io::Result<()> {
        match OpenOptions::new().read(true).open(folder)?.sync_all() {
            // Shares over SMB have no sync of folders. A rename is done by their server before it returns, so a crash of
            // this machine loses none; what a crash of the server loses, no call could prevent.
            Err(error) if is_unsupported(&error) => {
                static WARNED: Once = Once::new();
                WARNED.call_once(|| {
                    tracing::warn!(
                        "the file system of {} cannot sync folders ({error}): whether the names of new files survive a \
                         crash of its server is up to that server",
                        folder.display()
                    );
                });
                Ok(())
            }
            synced => synced,
        }
    }

    fn may_write(&self, folder: &Path) -> io::Result<()> {
        let wanted = Wanted::WRITE_OK | Wanted::EXEC_OK;
        Ok(rustix::fs::accessat(rustix::fs::CWD, folder, wanted, AtFlags::EACCESS)?)
    }

    fn free_bytes(&self, folder: &Path) -> io::Result<u64> {
        let found = rustix::fs::statvfs(folder)?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn DiskLock>> {
        let file = Self::open_file(path, Open::UpdateOrCreate, Access::Owner)?;
        match file.try_lock() {
            Ok(()) => Ok(Box::new(RealLock(file))),
            Err(TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
            Err(TryLockError::Error(error)) => Err(explain_lock(error)),
        }
    }
}

/// Whether a file system does not offer what was asked of it.
fn is_unsupported(error: &io::Error) -> bool {
    let unsupported = [Errno::INVAL, Errno::OPNOTSUPP, Errno::NOSYS];
    error.raw_os_error().is_some_and(|code| unsupported.iter().any(|errno| errno.raw_os_error() == code))
}

/// Says what to do about a file system without locks. Without one, two processes could write one file, so nothing is done then.
fn explain_lock(error: io::Error) -> io::Error {
    let has_no_locks = error.raw_os_error() == Some(Errno::NOLCK.raw_os_error()) || is_unsupported(&error);
    if !has_no_locks {
        return error;
    }
    let text = format!(
        "its file system has no locks ({error}): mount it with locks, over NFS with `local_lock=flock` or with rpc.statd \
         running on both sides"
    );
    io::Error::new(error.kind(), text)
}

fn kind_of(found: fs::FileType) -> Kind {
    if found.is_file() {
        Kind::File
    } else if found.is_dir() {
        Kind::Folder
    } else {
        Kind::Other
    }
}

/// Whether every user of this machine may read a file that the operator named; not if that can't be found out.
pub(crate) fn is_world_readable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.mode() & 0o004 != 0)
}

/// Reads a small file that the operator named (configuration, credentials, a listing), following links.
///
/// # Errors
/// `FileTooLarge` beyond `max` bytes; `InvalidData` if it is not UTF-8; else any error of the disk.
pub fn read_named_file(path: &Path, max: u64) -> io::Result<String> {
    read_text(&OpenOptions::new().read(true).open(path)?, max)
}

/// Another one once the file at a path was replaced or written, or the path leads elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    file: (u64, u64),
    len: u64,
    changed: (i64, i64),
}

/// The stamp of a file that the operator named, following links; none if it is not there.
pub(crate) fn stamp_of(path: &Path) -> Option<Stamp> {
    let found = fs::metadata(path).ok()?;
    let changed = (found.ctime(), found.ctime_nsec());
    Some(Stamp { file: (found.dev(), found.ino()), len: found.len(), changed })
}

fn no_wait() -> i32 {
    i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default()
}

/// Who may write what this process obeys: root, this process' own user, and the owner of a file that it obeys already.
pub(crate) fn trusted_users(obeyed: &Path) -> Vec<u32> {
    let owner = fs::metadata(obeyed).ok().map(|metadata| metadata.uid());
    [0, rustix::process::geteuid().as_raw()].into_iter().chain(owner).collect()
}

/// A file that a pattern of the operator's found.
pub(crate) struct FoundFile {
    pub(crate) text: String,
    /// The user's number.
    pub(crate) owner: u32,
    pub(crate) is_world_writable: bool,
    /// Equal for two names of one file: its device and its inode.
    pub(crate) identity: (u64, u64),
}

/// Reads a small file that a pattern found, following links.
///
/// # Errors
/// As [`read_named_file`]; `InvalidInput` for what is no file.
pub(crate) fn read_found_file(path: &Path, max: u64) -> io::Result<FoundFile> {
    // A pipe would wait for a writer, and others may have put it there.
    let file = OpenOptions::new().read(true).custom_flags(no_wait()).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file"));
    }
    Ok(FoundFile {
        text: read_text(&file, max)?,
        owner: metadata.uid(),
        is_world_writable: metadata.mode() & 0o002 != 0,
        identity: (metadata.dev(), metadata.ino()),
    })
}

fn read_text(file: &fs::File, max: u64) -> io::Result<String> {
    let mut text = String::new();
    // What a pipe will bring is known only at its end; of a file it is known before anything is read.
    if file.metadata()?.len() <= max {
        file.take(max + 1).read_to_string(&mut text)?;
        if text.len() as u64 <= max {
            return Ok(text);
        }
    }
    Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {max} bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replacing_leaves_nothing_beside_and_is_for_the_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        for text in ["old", "new"] {
            replace_file(&RealDisk, &path, text.as_bytes(), Access::Owner).unwrap();
        }
        assert_eq!(read_file(&RealDisk, &path, 10).unwrap(), b"new");
        assert_eq!(RealDisk.list(folder.path()).unwrap().len(), 1);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn links_are_followed_as_far_as_a_path_exists() {
        let folder = tempfile::tempdir().unwrap();
        let there = fs::canonicalize(folder.path()).unwrap();
        fs::create_dir_all(there.join("data/vault")).unwrap();
        std::os::unix::fs::symlink(there.join("data"), there.join("link")).unwrap();
        std::os::unix::fs::symlink("link/vault", there.join("second")).unwrap();
        std::os::unix::fs::symlink("loop", there.join("loop")).unwrap();
        for (path, resolved) in [
            ("data/vault", "data/vault"),
            ("link", "data"),
            ("link/vault/", "data/vault"),
            ("second", "data/vault"),
            ("link/new/deep", "data/new/deep"),
            ("none/new", "none/new"),
        ] {
            assert_eq!(RealDisk.resolve(&there.join(path)).unwrap(), there.join(resolved), "{path}");
        }
        assert!(RealDisk.resolve(&there.join("loop/new")).is_err());
        assert_eq!(RealDisk.resolve(Path::new("/")).unwrap(), Path::new("/"));
    }

    #[test]
    fn links_and_pipes_are_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        let (target, link) = (folder.path().join("target"), folder.path().join("link"));
        replace_file(&RealDisk, &target, b"x", Access::Owner).unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        for how in [Open::Read, Open::Update, Open::UpdateOrCreate, Open::CreateNew] {
            assert!(RealDisk.open(&link, how, Access::Owner).is_err(), "{how:?}");
        }
        assert_eq!(RealDisk.metadata(&link).unwrap().kind, Kind::Other);
    }

    #[test]
    fn a_lock_is_held_once_and_ends_with_its_value() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = RealDisk.lock(&path).unwrap();
        assert_eq!(RealDisk.lock(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(held);
        RealDisk.lock(&path).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_synced_is_no_failure_and_a_lock_that_cannot_be_had_says_what_to_do() {
        // Its folders answer EINVAL, as those of SMB do.
        let answer = OpenOptions::new().read(true).open("/proc/self").unwrap().sync_all().unwrap_err();
        assert_eq!(answer.raw_os_error(), Some(Errno::INVAL.raw_os_error()));
        RealDisk.sync_dir(Path::new("/proc/self")).unwrap();
        assert!(RealDisk.sync_dir(Path::new("/proc/self/none")).is_err());

        let explained = explain_lock(Errno::NOLCK.into()).to_string();
        assert!(
            explained.contains("local_lock=flock") && explained.contains("No locks available"),
            "{explained}"
        );
        let other = explain_lock(Errno::ACCESS.into());
        assert_eq!(other.raw_os_error(), Some(Errno::ACCESS.raw_os_error()));
    }

    #[test]
    fn what_is_appended_comes_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        for line in ["one\n", "two\n"] {
            RealDisk.append(&path, line.as_bytes(), Access::Owner).unwrap();
        }
        assert_eq!(read_file(&RealDisk, &path, 100).unwrap(), b"one\ntwo\n");
    }

    #[test]
    fn a_file_beyond_its_bound_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("large");
        replace_file(&RealDisk, &path, b"12345", Access::Owner).unwrap();
        assert_eq!(read_file(&RealDisk, &path, 4).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(read_file(&RealDisk, &path, 5).unwrap(), b"12345");
    }

    #[test]
    fn a_lock_ends_when_it_is_dropped_though_a_child_that_is_being_started_has_the_file_open() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let file = RealDisk::open_file(&path, Open::UpdateOrCreate, Access::Owner).unwrap();
        file.try_lock().unwrap();
        // As between fork and exec.
        let _inherited = file.try_clone().unwrap();
        let lock = RealLock(file);
        assert!(RealDisk.lock(&path).is_err());
        drop(lock);
        assert!(RealDisk.lock(&path).is_ok());
    }
}
