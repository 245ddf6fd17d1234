//! Names of an archive's files.
//!
//! `<archive>/<zone>/<instance id>/<created as 20261101T023000Z>-<snapshot id>.qcow2` and the files beside
//! it: `….json`, the manifest, or `….pruned.json` or `….corrupt.json`, a marked one; `….qcow2.md5`; and, while it is received, `….qcow2.part`, its journal `….qcow2.part.json`,
//! `….qcow2.bad` and `….qcow2.lock`. A path is formed of ids, a zone's name and a time, never of a text from outside. Fractions of a second
//! are dropped from the time; the id keeps the names apart.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::snapshot::{InstanceId, SnapshotId, ZoneName};

/// The snapshot that a copy is of, as the names of its files have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyId {
    /// The zone of the snapshot.
    pub zone: ZoneName,
    /// The instance that it was taken of.
    pub instance_id: InstanceId,
    /// When it was taken.
    pub created_at: Timestamp,
    /// The snapshot.
    pub snapshot_id: SnapshotId,
}

/// The paths of one copy's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CopyPaths {
    /// The zone's folder.
    pub(super) zone_folder: PathBuf,
    /// The instance's folder in it, which holds all files of the copy.
    pub(super) folder: PathBuf,
    /// The beginning of all names of the copy.
    stem: String,
}

impl CopyPaths {
    pub(super) fn new(archive: &Path, id: &CopyId) -> Self {
        let zone_folder = archive.join(id.zone.as_str());
        let folder = zone_folder.join(id.instance_id.to_string());
        let stem = format!("{}-{}", id.created_at.strftime("%Y%m%dT%H%M%SZ"), id.snapshot_id);
        Self { zone_folder, folder, stem }
    }

    /// The name of the image without its folder.
    pub(super) fn image_name(&self) -> String {
        format!("{}{IMAGE_END}", self.stem)
    }

    /// The image: verified, if the manifest is beside it.
    pub(super) fn image(&self) -> PathBuf {
        self.beside(IMAGE_END)
    }

    /// The manifest with this mark.
    pub(super) fn manifest(&self, mark: Option<Mark>) -> PathBuf {
        self.beside(manifest_end(mark))
    }

    /// All names of the manifest. A crash may leave several: the first one that is there counts.
    pub(super) fn manifests(&self) -> [PathBuf; 3] {
        MARKS.map(|mark| self.manifest(mark))
    }

    /// For `md5sum -c`.
    pub(super) fn md5(&self) -> PathBuf {
        self.beside(".qcow2.md5")
    }

    /// The image while it is received.
    pub(super) fn part(&self) -> PathBuf {
        self.beside(".qcow2.part")
    }

    /// Says how much of the `.part` is synced.
    pub(super) fn journal(&self) -> PathBuf {
        self.beside(".qcow2.part.json")
    }

    /// An image whose MD5 was wrong, kept for an inspection.
    pub(super) fn bad(&self) -> PathBuf {
        self.beside(".qcow2.bad")
    }

    /// Locked by the process that stores this snapshot.
    pub(super) fn lock(&self) -> PathBuf {
        self.beside(".qcow2.lock")
    }

    /// The beginning of the paths of all files.
    pub(super) fn stem(&self) -> PathBuf {
        self.beside("")
    }

    fn beside(&self, end: &str) -> PathBuf {
        self.folder.join(format!("{}{end}", self.stem))
    }
}

const IMAGE_END: &str = ".qcow2";

/// A finding about a copy that the name of its manifest says, so that a listing alone shows it. Manifests without one in their
/// name may have it inside, as all had before there were such names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mark {
    /// The archive's retention removed the image.
    Pruned,
    /// The image was found to differ from its MD5.
    Corrupt,
}

/// Which marks a manifest may have: where a crash leaves several, the first counts.
pub(super) const MARKS: [Option<Mark>; 3] = [Some(Mark::Corrupt), Some(Mark::Pruned), None];

/// The end of the name of a manifest with this mark.
pub(super) fn manifest_end(mark: Option<Mark>) -> &'static str {
    match mark {
        None => ".json",
        Some(Mark::Pruned) => ".pruned.json",
        Some(Mark::Corrupt) => ".corrupt.json",
    }
}

/// The role of a file in an instance's folder, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Image,
    Manifest(Option<Mark>),
}

/// The stem and the role of an image or a manifest of ours; `None` for all other names.
pub(super) fn read_name(name: &OsStr) -> Option<(&str, Role)> {
    let name = name.to_str()?;
    let (stem, role) = match name.split_once('.')? {
        (stem, "qcow2") => (stem, Role::Image),
        (stem, "json") => (stem, Role::Manifest(None)),
        (stem, "pruned.json") => (stem, Role::Manifest(Some(Mark::Pruned))),
        (stem, "corrupt.json") => (stem, Role::Manifest(Some(Mark::Corrupt))),
        _ => return None,
    };
    let (time, id) = stem.split_once('-')?;
    let shape = time.bytes().map(|byte| if byte.is_ascii_digit() { b'0' } else { byte });
    (shape.eq(*b"00000000T000000Z") && is_id(id)).then_some((stem, role))
}

/// An instance's id, written as in folder names.
pub(super) fn read_instance(name: &OsStr) -> Option<InstanceId> {
    let name = name.to_str()?;
    if is_id(name) { name.parse().ok() } else { None }
}

/// A path below an archive, taken apart: the zone, the instance, and the name in its folder.
pub(super) fn read_path(path: &str) -> Option<(ZoneName, InstanceId, &str)> {
    let (zone, rest) = path.split_once('/')?;
    let (instance, name) = rest.split_once('/')?;
    (!name.contains('/')).then_some(())?;
    Some((zone.parse().ok()?, read_instance(OsStr::new(instance))?, name))
}

/// Whether it is an id in the one form in which it stands in a name.
fn is_id(text: &str) -> bool {
    let shape = text.bytes().map(|byte| if matches!(byte, b'0'..=b'9' | b'a'..=b'f') { b'0' } else { byte });
    shape.eq(*b"00000000-0000-0000-0000-000000000000")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_made_of_zone_ids_and_time_without_fractions() {
        let id = CopyId {
            zone: "ch-gva-2".parse().unwrap(),
            instance_id: "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec".parse().unwrap(),
            created_at: "2026-11-01T02:30:00.987Z".parse().unwrap(),
            snapshot_id: "B0C0AB00-0000-4000-8000-00000000F105".parse().unwrap(),
        };
        let paths = CopyPaths::new(Path::new("/a"), &id);
        let folder = "/a/ch-gva-2/9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";
        let stem = "20261101T023000Z-b0c0ab00-0000-4000-8000-00000000f105";
        assert_eq!(paths.image(), PathBuf::from(format!("{folder}/{stem}.qcow2")));
        assert_eq!(paths.manifest(None), PathBuf::from(format!("{folder}/{stem}.json")));
        assert_eq!(paths.md5(), PathBuf::from(format!("{folder}/{stem}.qcow2.md5")));
        assert_eq!(read_name(OsStr::new(&paths.image_name())), Some((stem, Role::Image)));
    }

    #[test]
    fn only_images_and_manifests_of_our_shape_are_ours() {
        let ours = "20261101T023000Z-b0c0ab00-0000-4000-8000-00000000f105";
        for end in [".json", ".pruned.json", ".corrupt.json"] {
            assert!(read_name(OsStr::new(&format!("{ours}{end}"))).is_some());
        }
        for end in [
            "",
            ".qcow2.part",
            ".qcow2.part.json",
            ".qcow2.bad",
            ".qcow2.md5",
            ".qcow2.lock",
            ".json.new",
            ".pruned.json.new",
            ".lost.json",
            ".txt",
        ] {
            assert_eq!(read_name(OsStr::new(&format!("{ours}{end}"))), None, "{end}");
        }
        for name in [
            "notes.json",
            "disk.qcow2",
            "20261101T023000Z-B0C0AB00-0000-4000-8000-00000000F105.qcow2",
            "2026-b0c0ab00-0000-4000-8000-00000000f105.qcow2",
        ] {
            assert_eq!(read_name(OsStr::new(name)), None, "{name}");
        }
    }
}
