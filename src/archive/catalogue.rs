//! What an archive holds, read back from its files.
//!
//! A copy counts if its manifest is valid and its image is a regular file of exactly the manifest's length, or
//! marked as pruned. Everything else that looks like ours is a [`Problem`]; nothing is changed or removed, and
//! links are not followed. What a store of another kind lists is judged by the same rules: it gives its `Files`.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::archive::layout::{self, Place, Role};
use crate::archive::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::archive::proof::VerifiedCopy;
use crate::disk::{Disk, Entry, Kind, read_file};
use crate::policy::{ArchiveName, Which};
use crate::snapshot::{InstanceId, Snapshot, ZoneName};
use crate::text::{excerpt, printable};

/// What an archive holds. Only reading an archive makes one.
#[derive(Debug, Clone)]
pub struct Catalogue {
    archive: ArchiveName,
    copies: Vec<StoredCopy>,
    problems: Vec<Problem>,
}

/// A verified copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredCopy {
    /// Its record.
    pub manifest: Manifest,
    /// The path of its image, which is there unless it was pruned.
    pub image: PathBuf,
    /// Whether something has that path; beside a mark of pruning it is what a crash left.
    pub has_image: bool,
}

/// Something in the archive that is no verified copy, though it looks like one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub path: PathBuf,
    /// What.
    pub what: ProblemKind,
}

/// What is wrong with a file or folder of an archive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProblemKind {
    /// An image that nothing vouches for.
    #[error("there is no manifest beside it, so it was never proved; the next export fetches it anew")]
    NoManifest,
    /// A manifest that is no manifest.
    #[error("the manifest can't be read ({0}), so the copy does not count")]
    Unreadable(String),
    /// A manifest of something else.
    #[error("the manifest is about another {0} than its file name, so the copy does not count")]
    Misplaced(&'static str),
    /// A manifest without its image.
    #[error("the image is missing, so the copy does not count")]
    NoImage,
    /// An image that changed.
    #[error("the image has {found} bytes where the manifest says {expected}, so the copy does not count")]
    Length {
        /// In bytes, by the manifest.
        expected: u64,
        /// In bytes.
        found: u64,
    },
    /// An image that was read again and found different.
    #[error("the image is corrupt since {0}, so the copy does not count")]
    Corrupt(Timestamp),
    /// A link or a folder under a name of ours.
    #[error("it is not a regular file; it is left alone")]
    Foreign,
    /// A folder that can't be read.
    #[error("the folder can't be read ({0}), so nothing in it counts")]
    Folder(String),
}

impl Problem {
    /// One line for people.
    pub fn describe(&self) -> String {
        format!("{}: {}", printable(&self.path.to_string_lossy()), self.what)
    }
}

impl Catalogue {
    /// Which archive.
    pub fn archive(&self) -> &ArchiveName {
        &self.archive
    }

    /// The verified copies, those included that the archive's retention removed since: by zone and instance,
    /// newest first.
    pub fn copies(&self) -> &[StoredCopy] {
        &self.copies
    }

    /// What is in the archive and can't be relied on, by path.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// The copy without which `snapshot` may not go: of itself for [`Which::All`], of it or a newer one of its
    /// instance for [`Which::Newest`].
    pub fn proof(&self, snapshot: &Snapshot, of: Which) -> Option<VerifiedCopy> {
        self.copies
            .iter()
            .map(|copy| VerifiedCopy::new(&self.archive, &copy.manifest))
            .find(|copy| copy.covers(snapshot, of))
    }
}

/// Where the files of an archive are looked at, whatever kind of store it is.
pub(super) trait Files {
    /// Reads the manifest that has this path.
    fn manifest(&self, path: &Path) -> Result<Manifest, ProblemKind>;

    /// What has the path of an image.
    fn image(&self, path: &Path) -> Found;
}

/// What has the path of an image.
pub(super) enum Found {
    /// A file of so many bytes.
    File(u64),
    /// Something else.
    Foreign,
    /// Nothing.
    Nothing,
    /// It could not be looked at.
    Unreadable(String),
}

impl Files for &dyn Disk {
    fn manifest(&self, path: &Path) -> Result<Manifest, ProblemKind> {
        let bytes = read_file(*self, path, MANIFEST_BYTES_MAX).map_err(|error| unreadable(&error))?;
        read_manifest(&bytes)
    }

    fn image(&self, path: &Path) -> Found {
        match self.metadata(path) {
            Ok(found) if found.kind == Kind::File => Found::File(found.len),
            Ok(_) => Found::Foreign,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Found::Nothing,
            Err(error) => Found::Unreadable(error.to_string()),
        }
    }
}

fn unreadable(error: &dyn std::error::Error) -> ProblemKind {
    ProblemKind::Unreadable(excerpt(&error.to_string(), 200))
}

/// Understands the bytes of a manifest.
pub(super) fn read_manifest(bytes: &[u8]) -> Result<Manifest, ProblemKind> {
    Manifest::from_bytes(bytes).map_err(|error| unreadable(&error))
}

/// Reads the whole archive; a folder that does not exist yet holds nothing.
pub(super) fn read(disk: &dyn Disk, archive: &ArchiveName, path: &Path) -> io::Result<Catalogue> {
    let zones = match disk.list(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        listed => listed?,
    };
    let mut catalogue = Catalogue::empty(archive);
    for entry in zones {
        let Some(zone) = entry.name.to_str().and_then(|name| name.parse::<ZoneName>().ok()) else { continue };
        let folder = path.join(zone.as_str());
        for entry in catalogue.list(disk, &folder, &entry) {
            let Some(instance_id) = layout::read_instance(&entry.name) else { continue };
            let entries = catalogue.list(disk, &folder.join(instance_id.to_string()), &entry);
            catalogue.read_instance(&disk, path, &zone, instance_id, &entries);
        }
    }
    Ok(catalogue.sorted())
}

/// What an archive holds whose files have these paths, all of them below `path`.
pub(super) fn read_listed<'a>(
    files: &dyn Files,
    archive: &ArchiveName,
    path: &Path,
    paths: impl IntoIterator<Item = &'a str>,
) -> Catalogue {
    let mut folders: BTreeMap<(ZoneName, InstanceId), Vec<Entry>> = BTreeMap::new();
    for (zone, instance_id, name) in paths.into_iter().filter_map(layout::read_path) {
        let entry = Entry { name: name.into(), kind: Kind::File };
        folders.entry((zone, instance_id)).or_default().push(entry);
    }
    let mut catalogue = Catalogue::empty(archive);
    for ((zone, instance_id), entries) in &folders {
        catalogue.read_instance(files, path, zone, *instance_id, entries);
    }
    catalogue.sorted()
}

impl Catalogue {
    fn empty(archive: &ArchiveName) -> Self {
        Self { archive: archive.clone(), copies: Vec::new(), problems: Vec::new() }
    }

    fn sorted(mut self) -> Self {
        self.copies.sort_by(|a, b| {
            let key = |copy: &StoredCopy| (copy.manifest.snapshot.created_at, copy.manifest.snapshot.id);
            (&a.manifest.zone, a.manifest.instance.id)
                .cmp(&(&b.manifest.zone, b.manifest.instance.id))
                .then_with(|| key(b).cmp(&key(a)))
        });
        self.problems.sort_by(|a, b| a.path.cmp(&b.path));
        self
    }

    /// The names in a folder of ours; what keeps it from being read is a problem of that folder alone.
    fn list(&mut self, disk: &dyn Disk, folder: &Path, entry: &Entry) -> Vec<Entry> {
        let listed = match entry.kind {
            Kind::Folder => disk.list(folder),
            // Somebody's own file; a link, though, may hide a whole instance.
            Kind::File => return Vec::new(),
            Kind::Other => Err(io::Error::other("it is a link, not a folder")),
        };
        listed.unwrap_or_else(|error| {
            self.add_problem(folder.to_owned(), ProblemKind::Folder(error.to_string()));
            Vec::new()
        })
    }

    fn read_instance(
        &mut self,
        files: &dyn Files,
        path: &Path,
        zone: &ZoneName,
        instance_id: InstanceId,
        entries: &[Entry],
    ) {
        let folder = path.join(zone.as_str()).join(instance_id.to_string());
        let names: HashSet<&OsStr> = entries.iter().map(|entry| &*entry.name).collect();
        for entry in entries {
            let Some((stem, role)) = layout::read_name(&entry.name) else { continue };
            let here = folder.join(&entry.name);
            match role {
                _ if entry.kind != Kind::File => self.add_problem(here, ProblemKind::Foreign),
                Role::Image if !names.contains(OsStr::new(&format!("{stem}.json"))) => {
                    self.add_problem(here, ProblemKind::NoManifest);
                }
                // Its manifest speaks about it.
                Role::Image => {}
                Role::Manifest => match files.manifest(&here) {
                    Ok(manifest) => {
                        let of = &manifest.snapshot;
                        let place = Place::new(path, zone, instance_id, of.created_at, of.id);
                        match judge(files, &place, &here, zone, instance_id, &manifest) {
                            Ok(()) => {
                                let has_image = names.contains(OsStr::new(&place.image_name()));
                                self.copies.push(StoredCopy { manifest, image: place.image(), has_image });
                            }
                            Err(what) => self.add_problem(here, what),
                        }
                    }
                    Err(what) => self.add_problem(here, what),
                },
            }
        }
    }

    fn add_problem(&mut self, path: PathBuf, what: ProblemKind) {
        self.problems.push(Problem { path, what });
    }
}

/// Reads the manifest at `place`, if there is a copy that counts.
pub(super) fn read_copy(
    disk: &dyn Disk,
    place: &Place,
    zone: &ZoneName,
    instance_id: InstanceId,
) -> Result<Manifest, ProblemKind> {
    let manifest = disk.manifest(&place.manifest())?;
    judge(&disk, place, &place.manifest(), zone, instance_id, &manifest)?;
    Ok(manifest)
}

/// Whether a copy counts. `here` is where the manifest was found, `place` where it should be by its own words.
pub(super) fn judge(
    files: &dyn Files,
    place: &Place,
    here: &Path,
    zone: &ZoneName,
    instance_id: InstanceId,
    manifest: &Manifest,
) -> Result<(), ProblemKind> {
    if manifest.zone != *zone {
        return Err(ProblemKind::Misplaced("zone"));
    }
    if manifest.instance.id != instance_id {
        return Err(ProblemKind::Misplaced("instance"));
    }
    if place.manifest() != here {
        return Err(ProblemKind::Misplaced("snapshot"));
    }
    if let Some(since) = manifest.corrupt_since {
        return Err(ProblemKind::Corrupt(since));
    }
    if manifest.pruned_at.is_some() {
        return Ok(());
    }
    let expected = manifest.image.bytes;
    match files.image(&place.image()) {
        Found::File(found) if found != expected => Err(ProblemKind::Length { expected, found }),
        Found::File(_) => Ok(()),
        Found::Foreign => Err(ProblemKind::Foreign),
        Found::Nothing => Err(ProblemKind::NoImage),
        Found::Unreadable(why) => Err(ProblemKind::Unreadable(why)),
    }
}
