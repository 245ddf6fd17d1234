//! The manifests of an archive as they were last read, so that one which has not changed is not read again.
//!
//! They are kept in a file, a line of JSON for each: the version of its form, the manifest's tag, and the manifest. The tag is
//! another one once the manifest is: the `ETag` of an object, or the inode of a file, its length and when it was modified. New
//! lines are appended, and a later one replaces an earlier one. In memory and in the file the tag is a hash of it. What can't be read or written is read from the archive instead:
//! nothing of this is ever an error.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::archive::layout::{self, CopyPaths, Role};
use crate::archive::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::disk::{Access, Disk, Open};
use crate::snapshot::{InstanceId, SnapshotId};

/// The version of a line that this program writes; others are skipped. Lines of version 1 had the manifest's path, too, and up to version
/// 2 the tag itself.
const VERSION: u64 = 3;
/// Bytes that are read or written at once.
const CHUNK_BYTES: usize = 1 << 20;
/// A larger file is written anew, without being read. Half a million copies stay below.
const FILE_BYTES_MAX: u64 = 512 << 20;
/// After this many catalogues that did not ask for it, a manifest is dropped.
const KEPT_FOR: u64 = 8;
/// The file is written anew once this many of its lines, beyond half of all, are of no use.
const USELESS_LINES_MAX: usize = 1000;

/// The manifests of one archive.
#[derive(Debug, Default)]
pub struct ManifestCache {
    file: Option<CacheFile>,
    content: Mutex<Content>,
}

#[derive(Debug)]
struct CacheFile {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    is_written: bool,
}

#[derive(Debug, Default)]
struct Content {
    is_loaded: bool,
    /// By snapshot, which has one manifest at a time. Where a stranger's copy has the same, one of them is read again each time.
    manifests: BTreeMap<SnapshotId, Cached>,
    /// The one of each instance that was read last: others mostly say the same of it.
    last: HashMap<InstanceId, Arc<Manifest>>,
    /// Those that the file lacks.
    new: Vec<SnapshotId>,
    /// How many lines the file has.
    lines: usize,
    is_damaged: bool,
    /// Catalogues that were read.
    catalogues: u64,
}

/// The first half of a tag's SHA-256.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Tag(u128);

impl Tag {
    /// None of an empty one: the store gave none.
    fn of(tag: &str) -> Option<Self> {
        let hash: [u8; 32] = Sha256::digest(tag).into();
        let half = hash.first_chunk().map(|half| Self(u128::from_be_bytes(*half)));
        half.filter(|_| !tag.is_empty())
    }
}

#[derive(Debug)]
struct Cached {
    tag: Tag,
    manifest: Arc<Manifest>,
    /// The number of the last catalogue that asked for it.
    asked: u64,
}

impl ManifestCache {
    /// Kept in this file, whose folder exists; it is only read where nothing may be changed.
    pub fn in_file(disk: Arc<dyn Disk>, path: PathBuf, is_written: bool) -> Self {
        Self { file: Some(CacheFile { disk, path, is_written }), content: Mutex::default() }
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the file, unless that was done before.
    pub(super) fn load(&self) {
        let mut content = self.content();
        if let Some(file) = self.file.as_ref().filter(|_| !content.is_loaded) {
            let read = content.read(file);
            content.is_damaged |= read.is_err_and(|error| error.kind() != io::ErrorKind::NotFound);
        }
        content.is_loaded = true;
    }

    /// The manifest at this path, if it still has this tag.
    pub(super) fn get(&self, path: &Path, tag: &str) -> Option<Arc<Manifest>> {
        let (stem, Role::Manifest(mark)) = layout::read_name(path.file_name()?)? else { return None };
        let id = layout::snapshot_of(stem)?;
        let mut content = self.content();
        let now = content.catalogues;
        let cached = content.manifests.get_mut(&id).filter(|cached| Tag::of(tag) == Some(cached.tag))?;
        let is_its_path = CopyPaths::new(Path::new(""), &cached.manifest.id()).manifest(mark) == path;
        // A renamed file has the tag that it had: it is read again, and refused.
        let is_its_mark = mark.is_none() || mark == cached.manifest.mark();
        (is_its_path && is_its_mark).then(|| {
            cached.asked = now;
            Arc::clone(&cached.manifest)
        })
    }

    /// Keeps a manifest that is valid where it was found.
    pub(super) fn put(&self, tag: &str, manifest: Manifest) -> Arc<Manifest> {
        let mut content = self.content();
        let manifest = content.shared(manifest);
        if let Some(tag) = Tag::of(tag) {
            content.insert(tag, Arc::clone(&manifest));
            content.new.push(manifest.snapshot.id);
        }
        manifest
    }

    /// Ends a catalogue: drops what several did not ask for, and writes what is new to the file.
    pub(super) fn save(&self) {
        let mut content = self.content();
        let now = content.catalogues;
        content.manifests.retain(|_, cached| cached.asked + KEPT_FOR >= now);
        content.last.retain(|_, manifest| Arc::strong_count(manifest) > 1);
        content.catalogues += 1;
        let new = std::mem::take(&mut content.new);
        let Some(file) = self.file.as_ref().filter(|file| file.is_written) else { return };
        let all = content.manifests.len();
        let written = if content.is_damaged || content.lines + new.len() > 2 * all + USELESS_LINES_MAX {
            content.rewrite(file).map(|()| content.lines = all)
        } else {
            let append = |chunk: &[u8]| file.disk.append(&file.path, chunk, Access::Owner);
            let lines = new.iter().filter_map(|id| content.manifests.get(id));
            write_lines(lines, append).map(|()| content.lines += new.len())
        };
        if let Err(error) = &written {
            tracing::debug!("{} is not written: {error}", file.path.display());
        }
        content.is_damaged = written.is_err();
    }
}

impl Content {
    /// The manifest, which shares with another of its instance what both say alike.
    fn shared(&mut self, mut manifest: Manifest) -> Arc<Manifest> {
        let id = manifest.instance.id;
        if let Some(last) = self.last.get(&id) {
            share(&mut manifest.zone, &last.zone);
            share(&mut manifest.instance, &last.instance);
            share(&mut manifest.template, &last.template);
            share(&mut manifest.policy, &last.policy);
        }
        let manifest = Arc::new(manifest);
        self.last.insert(id, Arc::clone(&manifest));
        manifest
    }

    fn insert(&mut self, tag: Tag, manifest: Arc<Manifest>) {
        let asked = self.catalogues;
        self.manifests.insert(manifest.snapshot.id, Cached { tag, manifest, asked });
    }

    /// Reads the file line by line; those that can't be used are skipped.
    fn read(&mut self, file: &CacheFile) -> io::Result<()> {
        let opened = file.disk.open(&file.path, Open::Read, Access::Owner)?;
        if opened.len()? > FILE_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let (mut buffer, mut rest, mut offset) = (vec![0; CHUNK_BYTES], Vec::new(), 0);
        loop {
            let count = opened.read_at(&mut buffer, offset)?;
            offset += count as u64;
            rest.extend_from_slice(&buffer[..count]);
            let whole = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            for line in rest[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                self.lines += 1;
                match serde_json::from_slice::<(u64, Tag, Manifest)>(line) {
                    Ok((VERSION, tag, manifest)) => {
                        let manifest = self.shared(manifest);
                        self.insert(tag, manifest);
                    }
                    _ => self.is_damaged = true,
                }
            }
            rest.drain(..whole);
            if count == 0 || rest.len() as u64 > 2 * MANIFEST_BYTES_MAX {
                self.is_damaged |= !rest.is_empty();
                return Ok(());
            }
        }
    }

    fn rewrite(&self, file: &CacheFile) -> io::Result<()> {
        let beside = file.path.with_extension("new");
        match file.disk.remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let opened = file.disk.open(&beside, Open::CreateNew, Access::Owner)?;
        let mut offset = 0;
        // Not synced: what a crash takes is read again.
        write_lines(self.manifests.values(), |chunk| {
            opened.write_all_at(chunk, offset)?;
            offset += chunk.len() as u64;
            Ok(())
        })?;
        file.disk.rename(&beside, &file.path)
    }
}

/// Replaces a value by an equal one, whose memory both then share.
fn share<T: PartialEq + Clone>(own: &mut T, known: &T) {
    if own == known {
        own.clone_from(known);
    }
}

/// Gives `write` the lines of these manifests, several at once.
fn write_lines<'a>(
    manifests: impl Iterator<Item = &'a Cached>,
    mut write: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut chunk = Vec::new();
    for Cached { tag, manifest, .. } in manifests {
        serde_json::to_writer(&mut chunk, &(VERSION, tag, &**manifest))?;
        chunk.push(b'\n');
        if chunk.len() >= CHUNK_BYTES {
            write(&chunk)?;
            chunk.clear();
        }
    }
    if chunk.is_empty() { Ok(()) } else { write(&chunk) }
}
