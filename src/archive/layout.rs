//! Names of an archive's files.
//!
//! `<archive>/<zone>/<instance id>/<created as 20261101T023000Z>-<snapshot id>.qcow2` and the files beside
//! it: `….json`, the manifest, or `….pruned.json` or `….corrupt.json`, a marked one; `….qcow2.md5`; and, while it is received, `….qcow2.part`, its journal `….qcow2.part.json`,
//! `….qcow2.bad` and `….qcow2.lock`. A hold on the snapshot is a file `….hold-<id of the state directory>.json`, or
//! `….hold-<id>-<until>.json`. A path is formed of ids, a zone's name and a time, never of a text from outside. Fractions of a second
//! are dropped from the time; the id keeps the names apart.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use uuid::Uuid;

use crate::copies::{CopyId, TIME, read_time};
use crate::snapshot::{InstanceId, SnapshotId, ZoneName};

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
        Self { zone_folder, folder, stem: id.stem() }
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

    /// The mark of a hold.
    pub(super) fn hold(&self, mark: &HoldMark) -> PathBuf {
        self.beside(&mark.end())
    }

    /// The beginning of the paths of all files.
    pub(super) fn stem(&self) -> PathBuf {
        self.beside("")
    }

    /// The beginning of the names of all files.
    pub(super) fn stem_name(&self) -> &str {
        &self.stem
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
    Hold(HoldMark),
}

/// A hold that a state directory put on a copy's snapshot, marked in the archive by a name alone, so that other machines see it
/// in a listing. Each state directory has a mark of its own: one that releases its hold leaves those of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HoldMark {
    /// The id of the state directory.
    pub state: Uuid,
    /// The hold ends at this whole second; without it, it never ends.
    pub until: Option<Timestamp>,
}

impl HoldMark {
    /// The mark of a hold. One that ends within a second counts until that is over.
    pub fn new(state: Uuid, until: Option<Timestamp>) -> Self {
        let whole = |until: Timestamp| {
            let up = i64::from(until.subsec_nanosecond() > 0);
            Timestamp::from_second(until.as_second().saturating_add(up)).unwrap_or(Timestamp::MAX)
        };
        Self { state, until: until.map(whole) }
    }

    /// Whether it has not ended by then.
    pub fn counts_at(&self, now: Timestamp) -> bool {
        self.until.is_none_or(|until| until > now)
    }

    /// The end of its file's name.
    pub(super) fn end(&self) -> String {
        let until = self.until.map_or_else(String::new, |until| format!("-{}", until.strftime(TIME)));
        format!(".hold-{}{until}.json", self.state)
    }

    /// The mark with this end of its file's name, without the dot. A time that can't be read is no end: in doubt it holds.
    fn read(end: &str) -> Option<Self> {
        let text = end.strip_prefix("hold-")?.strip_suffix(".json")?;
        let (state, rest) = text.split_at_checked(36)?;
        let until = rest.strip_prefix('-').and_then(read_time);
        (is_id(state) && (rest.is_empty() || rest.starts_with('-')))
            .then_some(())
            .and_then(|()| Some(Self { state: state.parse().ok()?, until }))
    }
}

/// The stem and the role of an image or a manifest of ours; `None` for all other names.
pub(super) fn read_name(name: &OsStr) -> Option<(&str, Role)> {
    let name = name.to_str()?;
    let (stem, role) = match name.split_once('.')? {
        (stem, "qcow2") => (stem, Role::Image),
        (stem, "json") => (stem, Role::Manifest(None)),
        (stem, "pruned.json") => (stem, Role::Manifest(Some(Mark::Pruned))),
        (stem, "corrupt.json") => (stem, Role::Manifest(Some(Mark::Corrupt))),
        (stem, end) => (stem, Role::Hold(HoldMark::read(end)?)),
    };
    is_stem(stem).then_some((stem, role))
}

/// Whether the names of a copy's files begin so.
fn is_stem(stem: &str) -> bool {
    let Some((time, id)) = stem.split_once('-') else { return false };
    let shape = time.bytes().map(|byte| if byte.is_ascii_digit() { b'0' } else { byte });
    shape.eq(*b"00000000T000000Z") && is_id(id)
}

/// The ends of the names that an interrupted export leaves, in the order in which to remove them.
pub(super) const LEFTOVERS: [&str; 3] = [".qcow2.part.json", ".qcow2.part", ".qcow2.bad"];

/// The stem and the end of a name that an interrupted export left; `None` for all other names.
pub(super) fn read_leftover(name: &OsStr) -> Option<(&str, &'static str)> {
    let name = name.to_str()?;
    let (stem, end) = LEFTOVERS.iter().find_map(|end| Some((name.strip_suffix(end)?, *end)))?;
    is_stem(stem).then_some((stem, end))
}

/// When the snapshot was taken, by the beginning of its files' names.
pub(super) fn time_of(stem: &str) -> Option<Timestamp> {
    read_time(stem.split_once('-')?.0)
}

/// The snapshot, by the beginning of its files' names.
pub(super) fn snapshot_of(stem: &str) -> Option<SnapshotId> {
    stem.split_once('-')?.1.parse().ok()
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
    fn the_name_of_a_hold_says_whose_it_is_and_until_when() {
        let stem = "20261101T023000Z-b0c0ab00-0000-4000-8000-00000000f105";
        let state = "0198c0de-0000-7000-8000-00000000000a".parse().unwrap();
        let until = |text: &str| Some(text.parse::<Timestamp>().unwrap());
        for (given, whole) in [
            (None, None),
            (until("2027-01-31T00:00:00Z"), until("2027-01-31T00:00:00Z")),
            (until("2027-01-31T00:00:00.001Z"), until("2027-01-31T00:00:01Z")),
        ] {
            let mark = HoldMark::new(state, given);
            assert_eq!(mark.until, whole);
            let name = format!("{stem}{}", mark.end());
            assert_eq!(read_name(OsStr::new(&name)), Some((stem, Role::Hold(mark))));
        }
        let odd = format!("{stem}.hold-{state}-soon.json");
        assert_eq!(read_name(OsStr::new(&odd)), Some((stem, Role::Hold(HoldMark { state, until: None }))));
        for end in [".hold-.json", ".hold-x.json", ".hold-0198c0de-0000-7000-8000-00000000000a.json.new"] {
            assert_eq!(read_name(OsStr::new(&format!("{stem}{end}"))), None, "{end}");
        }
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
