//! The content of an archive, read back from its files.
//!
//! A copy counts if its manifest is valid and its image is a regular file of exactly the manifest's length, or
//! marked as pruned. Everything else that looks like ours is a [`Problem`]; nothing is changed or removed, and
//! links are not followed. The same rules hold for every kind of archive.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::OsStr;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;

use crate::archive::layout::{self, CopyPaths, HoldMark, MARKS, Role, manifest_end};
use crate::archive::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::archive::manifest_cache::ManifestCache;
use crate::archive::marker::{MARKER_BYTES_MAX, MARKER_FILE, Marker, MarkerProblem};
use crate::archive::proof::VerifiedCopy;
use crate::copies::{CopyId, CopySet};
use crate::disk::{Disk, Entry, Kind, Metadata, read_file};
use crate::policy::Which;
use crate::policy::name::ArchiveName;
use crate::policy::shard::Shard;
use crate::snapshot::{InstanceId, Snapshot, SnapshotId, ZoneName};
use crate::text::{excerpt, printable};

/// The content of an archive. Only reading an archive makes one.
#[derive(Debug, Clone)]
pub struct Catalogue {
    archive: ArchiveName,
    marker: Result<Option<Marker>, MarkerProblem>,
    copies: Vec<StoredCopy>,
    /// Those that were found corrupt, although the archive does not say so.
    unmarked: Vec<(StoredCopy, Timestamp)>,
    /// Those that the archive says to be corrupt.
    corrupt: Vec<StoredCopy>,
    /// By snapshot; ended ones may be among them.
    holds: BTreeMap<SnapshotId, BTreeSet<HoldMark>>,
    problems: Vec<Problem>,
    /// The places of the copies of each instance that count, by zone. The first of each has its image.
    of_instance: BTreeMap<InstanceId, Vec<Range<usize>>>,
}

/// A verified copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredCopy {
    /// The record of the copy.
    pub manifest: Arc<Manifest>,
    /// The folder of its files; all copies of an instance share it.
    pub folder: Arc<Path>,
    /// Whether a file has that path. Where the copy is marked as pruned, a crash has left it.
    pub has_image: bool,
}

impl StoredCopy {
    /// The path of its image, which is there unless it was pruned.
    pub fn image(&self) -> PathBuf {
        self.folder.join(CopyPaths::new(Path::new(""), &self.manifest.id()).image_name())
    }

    /// The path of its files, relative to the archive and without an ending.
    pub(crate) fn stem(&self) -> String {
        self.manifest.id().to_string()
    }
}

/// What an archive says of an image without giving its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ImageHead {
    pub(crate) bytes: u64,
    pub(crate) etag: Option<String>,
    /// The MD5 in its metadata.
    pub(crate) md5: Option<String>,
}

/// Which copies are meant: by default all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CopyFilter {
    /// Only copies of this instance.
    pub instance: Option<InstanceId>,
    /// Only copies of this zone's snapshots.
    pub zone: Option<ZoneName>,
}

impl CopyFilter {
    /// Whether a copy is meant.
    pub(crate) fn includes(&self, manifest: &Manifest) -> bool {
        self.instance.is_none_or(|id| id == manifest.instance.id) && self.includes_zone(&manifest.zone)
    }

    /// Whether copies of this zone are meant.
    pub(crate) fn includes_zone(&self, zone: &ZoneName) -> bool {
        self.zone.as_ref().is_none_or(|wanted| wanted == zone)
    }

    /// Whether a file is meant, by the folders that it is in.
    pub(crate) fn includes_path(&self, path: &Path) -> bool {
        let folders: Vec<_> = path.iter().filter_map(OsStr::to_str).collect();
        let instance = self.instance.map(|id| id.to_string());
        let is_in = |folder: Option<&str>| folder.is_none_or(|folder| folders.contains(&folder));
        is_in(instance.as_deref()) && is_in(self.zone.as_ref().map(ZoneName::as_str))
    }
}

/// The zone, the instance and the name of a copy's file, without its ending.
fn stem_of(path: &Path) -> String {
    let parts: Vec<_> = path.iter().rev().take(3).collect();
    let path = parts.into_iter().rev().map(|part| part.to_string_lossy()).collect::<Vec<_>>().join("/");
    // The folders are of a zone and an id, which have no dots.
    path.split_once('.').map_or(path.clone(), |(stem, _)| stem.to_owned())
}

/// A file or folder that looks like a part of a copy, and is of none that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Of the file or folder.
    pub path: PathBuf,
    /// What is wrong with it.
    pub kind: ProblemKind,
}

/// What is wrong with a file or folder of an archive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProblemKind {
    /// An image without a manifest.
    #[error("there is no manifest beside it, so it was never verified; the next export fetches it again")]
    NoManifest,
    /// A manifest that is not valid, or can't be read.
    #[error("the manifest can't be read ({0}), so the copy does not count")]
    Unreadable(String),
    /// A manifest under the name of another copy.
    #[error("the manifest is about another {0} than its file name, so the copy does not count")]
    Misplaced(&'static str),
    /// A manifest without its image.
    #[error("the image is missing, so the copy does not count")]
    NoImage,
    /// An image of another length.
    #[error("the image has {found} bytes where the manifest says {expected}, so the copy does not count")]
    Length {
        /// Bytes, by the manifest.
        expected: u64,
        /// Bytes of the image.
        found: u64,
    },
    /// An image that was read again and differed.
    #[error("the image is corrupt since {0}, so the copy does not count")]
    Corrupt(Timestamp),
    /// A link or a folder under a name of ours.
    #[error("it is not a regular file; it is left alone")]
    Foreign,
    /// A folder that can't be read.
    #[error("the folder can't be read ({0}), so nothing in it counts")]
    Folder(String),
}

/// What an interrupted export left: a part of an image, or one with a wrong MD5. It is listed, and counts for nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// Of the file, or of the upload.
    pub path: PathBuf,
    /// Its length; none where it is not known.
    pub bytes: Option<u64>,
    /// Whether no export will use it, so that it may be removed.
    pub is_useless: bool,
}

impl Problem {
    /// One line for people.
    pub fn describe(&self) -> String {
        format!("{}: {}", printable(&self.path.to_string_lossy()), self.kind)
    }

    /// The path of the copy's files that it is about, relative to the archive and without an ending.
    pub(crate) fn stem(&self) -> String {
        stem_of(&self.path)
    }
}

impl Catalogue {
    /// The archive that was read.
    pub fn archive(&self) -> &ArchiveName {
        &self.archive
    }

    /// The archive's marker, if there is one; an error if it is there and can't be used.
    pub fn marker(&self) -> &Result<Option<Marker>, MarkerProblem> {
        &self.marker
    }

    /// The verified copies, those included that the archive's retention removed since: by zone and instance,
    /// newest first.
    pub fn copies(&self) -> &[StoredCopy] {
        &self.copies
    }

    /// Everything that looks like a copy and does not count, by path.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// The copies whose images are there.
    pub(crate) fn present(&self) -> CopySet {
        self.unpruned().map(|copy| copy.manifest.id()).collect()
    }

    /// Those of the remembered copies that vanished without a mark: their images were there, and neither the archive's
    /// retention removed them nor did a verification find them corrupt.
    pub(crate) fn vanished(&self, remembered: &CopySet) -> Vec<CopyId> {
        let corrupt = |problem: &&Problem| matches!(problem.kind, ProblemKind::Corrupt(_));
        let corrupt = self.problems.iter().filter(corrupt).filter_map(|problem| problem.stem().parse().ok());
        let explained: CopySet = self.copies.iter().map(|copy| copy.manifest.id()).chain(corrupt).collect();
        remembered.iter().filter(|id| !explained.contains(id)).collect()
    }

    /// Copies that were found corrupt, where the archive could not be written to say so, do not count; `corrupt_since`
    /// knows of them.
    pub(crate) fn exclude_corrupt(&mut self, corrupt_since: impl Fn(&StoredCopy) -> Option<Timestamp>) {
        let since = |copy: &StoredCopy| corrupt_since(copy).filter(|_| copy.manifest.pruned_at.is_none());
        let unmarked = self.copies.extract_if(.., |copy| since(copy).is_some());
        let unmarked: Vec<_> = unmarked.filter_map(|copy| since(&copy).map(|since| (copy, since))).collect();
        for (copy, since) in &unmarked {
            self.add_problem(copy.image(), ProblemKind::Corrupt(*since));
        }
        self.unmarked.extend(unmarked);
        self.problems.sort_by(|a, b| a.path.cmp(&b.path));
        self.index();
    }

    /// Leaves out the copies and problems that are not meant. What is left is not the whole archive any more: nothing may be
    /// decided by it.
    pub(crate) fn retain(&mut self, wanted: &CopyFilter) {
        self.copies.retain(|copy| wanted.includes(&copy.manifest));
        self.unmarked.retain(|(copy, _)| wanted.includes(&copy.manifest));
        self.corrupt.retain(|copy| wanted.includes(&copy.manifest));
        self.problems.retain(|problem| wanted.includes_path(&problem.path));
        self.index();
    }

    /// Leaves out the copies and problems of instances of other shards: for this one the rest is the whole archive.
    pub(crate) fn retain_shard(&mut self, shard: Option<Shard>) {
        let Some(shard) = shard else { return };
        self.copies.retain(|copy| shard.has(copy.manifest.instance.id));
        self.unmarked.retain(|(copy, _)| shard.has(copy.manifest.instance.id));
        self.corrupt.retain(|copy| shard.has(copy.manifest.instance.id));
        // One that is in no folder of an instance is for all to see.
        let instance_of =
            |path: &Path| path.iter().filter_map(OsStr::to_str).find_map(|part| part.parse().ok());
        self.problems.retain(|problem| instance_of(&problem.path).is_none_or(|id| shard.has(id)));
        self.index();
    }

    /// The same archive without the image of one copy, as if that were pruned.
    pub(crate) fn without(&self, copy: &StoredCopy) -> Self {
        let mut without = self.clone();
        let is_it =
            |other: &&mut StoredCopy| other.image() == copy.image() && other.manifest.pruned_at.is_none();
        for other in without.copies.iter_mut().filter(is_it) {
            let pruned_at = Some(other.manifest.snapshot.created_at);
            other.manifest = Arc::new(Manifest { pruned_at, ..(*other.manifest).clone() });
        }
        without.index();
        without
    }

    /// The copies that were found corrupt, although the archive does not say so, with the time.
    pub(crate) fn unmarked(&self) -> &[(StoredCopy, Timestamp)] {
        &self.unmarked
    }

    /// The copies that the archive says to be corrupt. Those whose image is there may have been repaired since.
    pub(crate) fn corrupt(&self) -> &[StoredCopy] {
        &self.corrupt
    }

    /// The holds that state directories marked in the archive, by snapshot; ended ones may be among them.
    pub fn holds(&self) -> &BTreeMap<SnapshotId, BTreeSet<HoldMark>> {
        &self.holds
    }

    /// The copies whose image should be there.
    pub(crate) fn unpruned(&self) -> impl Iterator<Item = &StoredCopy> {
        self.copies.iter().filter(|copy| copy.manifest.pruned_at.is_none())
    }

    /// The problems that mean loss or damage; an image that was never verified is none of them.
    pub(crate) fn damaged(&self) -> impl Iterator<Item = &Problem> {
        self.problems.iter().filter(|problem| problem.kind != ProblemKind::NoManifest)
    }

    /// The copies that count as such: those whose images are there, and those that the archive's retention removed while
    /// an intact one of the same instance is there that is at least as new. Without that, nothing could be restored.
    pub(crate) fn counting(&self) -> impl Iterator<Item = &StoredCopy> {
        self.of_instance
            .values()
            .flatten()
            .flat_map(|range| self.copies.get(range.clone()).unwrap_or_default())
    }

    /// The copies that the archive's retention removed and that do not count, since no intact one of their instance is as new. An
    /// interrupted pruning may have left their images.
    pub(crate) fn pruned_without_newer(&self) -> impl Iterator<Item = &StoredCopy> {
        // As in `index`: newest first.
        let instances = self.copies.chunk_by(is_of_same_instance);
        instances.flat_map(|copies| copies.iter().take_while(|copy| copy.manifest.pruned_at.is_some()))
    }

    /// Finds the copies that count.
    fn index(&mut self) {
        self.of_instance.clear();
        let mut start = 0;
        // They are in the order of zone and instance, newest first.
        for group in self.copies.chunk_by(is_of_same_instance) {
            let end = start + group.len();
            let mut copies = group.iter().enumerate();
            if let Some((place, intact)) = copies.find(|(_, copy)| copy.manifest.pruned_at.is_none()) {
                let ranges = self.of_instance.entry(intact.manifest.instance.id).or_default();
                ranges.push(start + place..end);
            }
            start = end;
        }
    }

    /// The copy without which `snapshot` may not be deleted: of itself for [`Which::All`], of it or a newer one of its
    /// instance for [`Which::Newest`].
    pub fn proof(&self, snapshot: &Snapshot, of: Which) -> Option<VerifiedCopy> {
        self.evidence(snapshot, of, None).map(|(copy, _)| VerifiedCopy::new(&self.archive, &copy.manifest))
    }

    /// That copy, or else one of its instance that was exported at `or_since` or later.
    pub(crate) fn proof_or_since(
        &self,
        snapshot: &Snapshot,
        of: Which,
        or_since: Option<Timestamp>,
    ) -> Option<VerifiedCopy> {
        let evidence = self.evidence(snapshot, of, or_since);
        evidence.map(|(copy, _)| VerifiedCopy::new(&self.archive, &copy.manifest))
    }

    /// That copy, and the one whose image is there that makes it count; mostly it is the same.
    pub(crate) fn evidence(
        &self,
        snapshot: &Snapshot,
        of: Which,
        or_since: Option<Timestamp>,
    ) -> Option<(&StoredCopy, &StoredCopy)> {
        let verified = |copy: &StoredCopy| VerifiedCopy::new(&self.archive, &copy.manifest);
        let ranges: Vec<&Range<usize>> = match snapshot.instance_id {
            Some(id) => self.of_instance.get(&id).into_iter().flatten().collect(),
            None => self.of_instance.values().flatten().collect(),
        };
        let copies = || {
            let ranges = ranges.iter().filter_map(|range| self.copies.get((*range).clone()));
            ranges.flat_map(|copies| copies.iter().zip(std::iter::repeat(copies.first())))
        };
        let covering = copies().find(|(copy, _)| verified(copy).covers(snapshot, of));
        let since = || {
            let since = or_since.filter(|_| of == Which::Newest)?;
            // The newest of the instance that was.
            copies().find(|(copy, _)| verified(copy).is_of_run_since(snapshot, since))
        };
        let (copy, intact) = covering.or_else(since)?;
        Some((copy, intact?))
    }
}

fn is_of_same_instance(one: &StoredCopy, other: &StoredCopy) -> bool {
    let [one, other] = [&one.manifest, &other.manifest];
    one.instance.id == other.instance.id && one.zone == other.zone
}

/// A copy's manifest with the bytes of its file, if the copy counts in the archive at `path`.
pub(super) fn find_copy(disk: &dyn Disk, path: &Path, paths: &CopyPaths) -> Option<(Manifest, Vec<u8>)> {
    let (manifest, bytes) = find_manifest(disk, path, paths)?;
    check_image(&manifest, || image_bytes(disk, &paths.image())).ok()?;
    Some((manifest, bytes))
}

/// A manifest with the bytes of its file, if it is valid in the archive at `path`, whether or not its copy counts.
pub(super) fn find_manifest(disk: &dyn Disk, path: &Path, paths: &CopyPaths) -> Option<(Manifest, Vec<u8>)> {
    let is_there = |here: &PathBuf| !matches!(disk.metadata(here), Err(error) if error.kind() == io::ErrorKind::NotFound);
    let here = paths.manifests().into_iter().find(is_there)?;
    read_at(disk, path, &here).ok()
}

/// The manifest at `here` in the archive at `path`, if it is valid there, with its bytes.
fn read_at(disk: &dyn Disk, path: &Path, here: &Path) -> Result<(Manifest, Vec<u8>), ProblemKind> {
    let bytes = read_file(disk, here, MANIFEST_BYTES_MAX).map_err(|error| unreadable(&error))?;
    Ok((read_manifest(&bytes, path, here)?, bytes))
}

/// A valid manifest, and why its copy does not count if it does not; or why the manifest can't be used.
pub(super) type ReadCopy = Result<(Arc<Manifest>, Result<(), ProblemKind>), ProblemKind>;

/// The manifest at `here` in the archive at `path`; read only if it is not in the cache.
fn read_copy(disk: &dyn Disk, cache: &ManifestCache, path: &Path, [here, image]: [&Path; 2]) -> ReadCopy {
    let Metadata { len, stamp: (inode, modified), .. } =
        disk.metadata(here).map_err(|error| unreadable(&error))?;
    let tag = format!("{inode:x}-{modified:x}-{len:x}");
    let manifest = if let Some(known) = cache.get(here.strip_prefix(path).unwrap_or(here), &tag) {
        known
    } else {
        cache.put(&tag, read_at(disk, path, here)?.0)
    };
    let counts = check_image(&manifest, || image_bytes(disk, image));
    Ok((manifest, counts))
}

fn image_bytes(disk: &dyn Disk, image: &Path) -> Result<Option<u64>, ProblemKind> {
    match disk.metadata(image) {
        Ok(found) if found.kind == Kind::File => Ok(Some(found.len)),
        Ok(_) => Err(ProblemKind::Foreign),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unreadable(&error)),
    }
}

fn unreadable(error: &dyn std::error::Error) -> ProblemKind {
    ProblemKind::Unreadable(excerpt(&error.to_string(), 200))
}

/// Reads the bytes of the manifest at `here` in the archive at `path`, and checks that it is about the copy that its name says.
pub(super) fn read_manifest(bytes: &[u8], path: &Path, here: &Path) -> Result<Manifest, ProblemKind> {
    let manifest = Manifest::from_bytes(bytes).map_err(|error| unreadable(&error))?;
    let paths = CopyPaths::new(path, &manifest.id());
    let folder = here.parent();
    if folder.and_then(Path::parent) != Some(&paths.zone_folder) {
        return Err(ProblemKind::Misplaced("zone"));
    }
    if folder != Some(&paths.folder) {
        return Err(ProblemKind::Misplaced("instance"));
    }
    let name = here.file_name().and_then(layout::read_name);
    let mark = name.and_then(|(_, role)| if let Role::Manifest(mark) = role { mark } else { None });
    if paths.manifest(mark) != here {
        return Err(ProblemKind::Misplaced("snapshot"));
    }
    if mark.is_some() && mark != manifest.mark() {
        return Err(ProblemKind::Unreadable("it lacks the mark that its name has".to_owned()));
    }
    Ok(manifest)
}

/// Reads the marker of the archive at `path`.
pub(super) fn read_marker(disk: &dyn Disk, path: &Path) -> Result<Option<Marker>, MarkerProblem> {
    match read_file(disk, &path.join(MARKER_FILE), MARKER_BYTES_MAX) {
        Ok(bytes) => Marker::from_bytes(&bytes).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(MarkerProblem::Unreadable(error.to_string())),
    }
}

/// Reads the whole archive; a folder that does not exist yet is empty.
pub(super) fn read(
    disk: &dyn Disk,
    cache: &ManifestCache,
    archive: &ArchiveName,
    path: &Path,
) -> io::Result<Catalogue> {
    cache.load();
    let zones = match disk.list(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        listed => listed?,
    };
    let mut catalogue = Catalogue::empty(archive, read_marker(disk, path));
    for entry in zones {
        let Some(zone) = entry.name.to_str().and_then(|name| name.parse::<ZoneName>().ok()) else { continue };
        let folder = path.join(zone.as_str());
        for entry in catalogue.list(disk, &folder, &entry) {
            let Some(instance_id) = layout::read_instance(&entry.name) else { continue };
            let folder = folder.join(instance_id.to_string());
            let entries = catalogue.list(disk, &folder, &entry);
            catalogue.read_instance(&folder, &entries, |files| read_copy(disk, cache, path, files));
        }
    }
    cache.save();
    Ok(catalogue.sorted())
}

/// The content of an archive whose files have these paths, relative to `path`. `read` reads the manifest at the first path, whose
/// image has the second.
pub(super) fn read_listed<'a>(
    archive: &ArchiveName,
    marker: Result<Option<Marker>, MarkerProblem>,
    path: &Path,
    paths: impl IntoIterator<Item = &'a str>,
    read: impl Fn([&Path; 2]) -> ReadCopy,
) -> Catalogue {
    let mut folders: BTreeMap<PathBuf, Vec<Entry>> = BTreeMap::new();
    for (zone, instance_id, name) in paths.into_iter().filter_map(layout::read_path) {
        let folder = path.join(zone.as_str()).join(instance_id.to_string());
        folders.entry(folder).or_default().push(Entry { name: name.into(), kind: Kind::File });
    }
    let mut catalogue = Catalogue::empty(archive, marker);
    for (folder, entries) in &folders {
        catalogue.read_instance(folder, entries, &read);
    }
    catalogue.sorted()
}

impl Catalogue {
    fn empty(archive: &ArchiveName, marker: Result<Option<Marker>, MarkerProblem>) -> Self {
        Self {
            archive: archive.clone(),
            marker,
            copies: Vec::new(),
            unmarked: Vec::new(),
            corrupt: Vec::new(),
            holds: BTreeMap::new(),
            problems: Vec::new(),
            of_instance: BTreeMap::new(),
        }
    }

    fn sorted(mut self) -> Self {
        self.copies.sort_by(|a, b| {
            let key = |copy: &StoredCopy| (copy.manifest.snapshot.created_at, copy.manifest.snapshot.id);
            (&a.manifest.zone, a.manifest.instance.id)
                .cmp(&(&b.manifest.zone, b.manifest.instance.id))
                .then_with(|| key(b).cmp(&key(a)))
        });
        self.copies.shrink_to_fit();
        self.problems.sort_by(|a, b| a.path.cmp(&b.path));
        self.index();
        self
    }

    /// The names in a folder of ours; a failure is a problem of that folder alone.
    fn list(&mut self, disk: &dyn Disk, folder: &Path, entry: &Entry) -> Vec<Entry> {
        let listed = match entry.kind {
            Kind::Folder => disk.list(folder),
            // A file here is none of ours; a link, though, may hide a whole instance.
            Kind::File => return Vec::new(),
            Kind::Other => Err(io::Error::other("it is a link, not a folder")),
        };
        listed.unwrap_or_else(|error| {
            self.add_problem(folder.to_owned(), ProblemKind::Folder(error.to_string()));
            Vec::new()
        })
    }

    /// Reads the copies in an instance's folder.
    fn read_instance(&mut self, folder: &Path, entries: &[Entry], read: impl Fn([&Path; 2]) -> ReadCopy) {
        let names: HashSet<&OsStr> = entries.iter().map(|entry| &*entry.name).collect();
        let has = |stem: &str, end: &str| names.contains(OsStr::new(&format!("{stem}{end}")));
        let shared: Arc<Path> = folder.into();
        for entry in entries {
            let Some((stem, role)) = layout::read_name(&entry.name) else { continue };
            let here = folder.join(&entry.name);
            match role {
                _ if entry.kind != Kind::File => self.add_problem(here, ProblemKind::Foreign),
                Role::Image if !MARKS.iter().any(|mark| has(stem, manifest_end(*mark))) => {
                    self.add_problem(here, ProblemKind::NoManifest);
                }
                // It is checked with its manifest.
                Role::Image => {}
                Role::Hold(mark) => {
                    if let Some(id) = layout::snapshot_of(stem) {
                        self.holds.entry(id).or_default().insert(mark);
                    }
                }
                // What a crash left of one that is marked.
                Role::Manifest(mark)
                    if MARKS.iter().find(|mark| has(stem, manifest_end(**mark))) != Some(&mark) => {}
                Role::Manifest(_) => {
                    let image = folder.join(format!("{stem}.qcow2"));
                    match read([&here, &image]) {
                        Ok((manifest, counts)) => {
                            let has_image = has(stem, ".qcow2");
                            let copy = StoredCopy { manifest, folder: Arc::clone(&shared), has_image };
                            match counts {
                                Ok(()) => self.copies.push(copy),
                                Err(kind) => {
                                    let is_corrupt = matches!(kind, ProblemKind::Corrupt(_));
                                    self.add_problem(here, kind);
                                    if is_corrupt && copy.manifest.pruned_at.is_none() {
                                        self.corrupt.push(copy);
                                    }
                                }
                            }
                        }
                        Err(kind) => self.add_problem(here, kind),
                    }
                }
            }
        }
    }

    fn add_problem(&mut self, path: PathBuf, kind: ProblemKind) {
        self.problems.push(Problem { path, kind });
    }
}

/// Whether the copy of a manifest counts. `image_bytes` gives the length of its image; none if there is no file.
pub(super) fn check_image(
    manifest: &Manifest,
    image_bytes: impl FnOnce() -> Result<Option<u64>, ProblemKind>,
) -> Result<(), ProblemKind> {
    if let Some(since) = manifest.corrupt_since {
        return Err(ProblemKind::Corrupt(since));
    }
    if manifest.pruned_at.is_some() {
        return Ok(());
    }
    let expected = manifest.image.bytes;
    match image_bytes()? {
        Some(found) if found == expected => Ok(()),
        Some(found) => Err(ProblemKind::Length { expected, found }),
        None => Err(ProblemKind::NoImage),
    }
}
