//! What interrupted exports left in a folder: parts of images that no export will resume.
//!
//! The next export of the same snapshot resumes a part, so it is of no use only if it is old; and a bad image is kept for
//! people to look at. The process that works on one holds its lock; the lock's file stays, since removing it could make two processes hold it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};

use crate::archive::catalogue::Leftover;
use crate::archive::layout::{self, LEFTOVERS};
use crate::archive::local::files::remove;
use crate::archive::transfer::sink::SinkError;
use crate::disk::{Disk, Kind};
use crate::snapshot::ZoneName;

/// A part of a snapshot of this age, that no process works on, is of no use: an export would have resumed it long ago.
const USELESS_AFTER: SignedDuration = SignedDuration::from_hours(7 * 24);

/// The leftovers in an instance's folder, by the beginning of their names.
fn in_folder(disk: &dyn Disk, folder: &Path) -> io::Result<BTreeMap<String, Vec<PathBuf>>> {
    let mut found: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for entry in disk.list(folder)?.into_iter().filter(|entry| entry.kind == Kind::File) {
        if let Some((stem, _)) = layout::read_leftover(&entry.name) {
            found.entry(stem.to_owned()).or_default().push(folder.join(&entry.name));
        }
    }
    Ok(found)
}

/// Whether leftovers with this beginning of their names are so old that they are of no use.
fn is_useless(stem: &str, now: Timestamp) -> bool {
    layout::time_of(stem).is_some_and(|at| now.duration_since(at) > USELESS_AFTER)
}

/// Removes the useless leftovers in an instance's folder, but those that another process works on.
pub(super) fn remove_in(disk: &dyn Disk, folder: &Path, now: Timestamp) {
    let found = in_folder(disk, folder).unwrap_or_default();
    for (stem, paths) in found.iter().filter(|(stem, _)| is_useless(stem, now)) {
        // What can't be removed now, the next export tries again.
        let _ = remove_unlocked(disk, folder, stem, paths);
    }
}

/// Removes these files of one copy; false if another process works on them.
fn remove_unlocked(disk: &dyn Disk, folder: &Path, stem: &str, paths: &[PathBuf]) -> Result<bool, SinkError> {
    let lock = folder.join(format!("{stem}.qcow2.lock"));
    let _lock = match disk.lock(&lock) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
        Err(error) => return Err(SinkError::disk("lock", &lock, error)),
    };
    // The journal before the part that it vouches for: in the order of `LEFTOVERS`.
    for end in LEFTOVERS {
        let path = folder.join(format!("{stem}{end}"));
        if paths.contains(&path) {
            remove(disk, &path)?;
        }
    }
    Ok(true)
}

/// Every leftover in the archive at `path`, the useless ones marked so.
pub(super) fn find(disk: &dyn Disk, path: &Path, now: Timestamp) -> Vec<Leftover> {
    let mut leftovers = Vec::new();
    for folder in instance_folders(disk, path) {
        let Ok(found) = in_folder(disk, &folder) else { continue };
        for (stem, paths) in found {
            let is_useless = is_useless(&stem, now);
            leftovers.extend(paths.into_iter().filter_map(|path| {
                let bytes = Some(disk.metadata(&path).ok()?.len);
                Some(Leftover { path, bytes, is_useless })
            }));
        }
    }
    leftovers
}

/// Removes the useless ones, but those that another process works on. Returns what was removed, and the first failure.
pub(super) fn remove_useless(
    disk: &dyn Disk,
    path: &Path,
    now: Timestamp,
) -> (Vec<Leftover>, Option<SinkError>) {
    let (mut removed, mut failure) = (Vec::new(), None);
    let useless = find(disk, path, now).into_iter().filter(|leftover| leftover.is_useless);
    for leftover in useless {
        let (folder, name) = (leftover.path.parent(), leftover.path.file_name());
        let stem = name.and_then(layout::read_leftover).map(|(stem, _)| stem.to_owned());
        let Some((folder, stem)) = folder.map(Path::to_owned).zip(stem) else { continue };
        match remove_unlocked(disk, &folder, &stem, std::slice::from_ref(&leftover.path)) {
            Ok(true) => removed.push(leftover),
            Ok(false) => {}
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    (removed, failure)
}

fn instance_folders(disk: &dyn Disk, path: &Path) -> Vec<PathBuf> {
    let folders = |path: &Path, is_ours: &dyn Fn(&OsStr) -> bool| -> Vec<PathBuf> {
        let entries = disk.list(path).unwrap_or_default().into_iter();
        let ours = entries.filter(|entry| entry.kind == Kind::Folder && is_ours(&entry.name));
        ours.map(|entry| path.join(entry.name)).collect()
    };
    let is_zone = |name: &OsStr| name.to_str().is_some_and(|name| name.parse::<ZoneName>().is_ok());
    let is_instance = |name: &OsStr| layout::read_instance(name).is_some();
    folders(path, &is_zone).iter().flat_map(|zone| folders(zone, &is_instance)).collect()
}
