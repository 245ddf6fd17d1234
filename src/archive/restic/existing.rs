//! The files of one copy in a repository.

use std::path::Path;

use crate::archive::layout::{self, CopyPaths, HoldMark, Role};
use crate::archive::manifest::Manifest;
use crate::archive::restic::repository::Object;
use crate::copies::CopyId;

/// The names of a copy's files.
#[derive(Debug, Clone)]
pub(super) struct Names {
    pub(super) paths: CopyPaths,
    pub(super) image: String,
    /// Of the manifest without a mark.
    pub(super) manifest: String,
    /// Of all manifests: the first one that is there counts.
    pub(super) manifests: [String; 3],
}

impl Names {
    pub(super) fn new(id: &CopyId) -> Self {
        let paths = CopyPaths::new(Path::new(""), id);
        Self {
            image: key(&paths.image()),
            manifest: key(&paths.manifest(None)),
            manifests: paths.manifests().map(|path| key(&path)),
            paths,
        }
    }
}

/// The files that have the names of a copy.
#[derive(Debug, Clone, Default)]
pub(super) struct Existing {
    /// All of them, the newest last.
    pub(super) objects: Vec<Object>,
    /// The manifest with its bytes, if it is valid.
    pub(super) manifest: Option<(Manifest, Vec<u8>)>,
    /// Whether the copy counts.
    pub(super) counts: bool,
}

impl Existing {
    /// The manifest, if the copy counts.
    pub(super) fn verified(&self) -> Option<&Manifest> {
        self.manifest.as_ref().filter(|_| self.counts).map(|(manifest, _)| manifest)
    }

    /// The image that the manifest is about.
    pub(super) fn image(&self, names: &Names, manifest: &Manifest) -> Option<&Object> {
        self.objects.iter().rfind(|object| is_image(object, &names.image, manifest))
    }

    /// The marks of holds on the copy's snapshot.
    pub(super) fn holds(&self) -> impl Iterator<Item = (HoldMark, &Object)> {
        self.objects.iter().filter_map(|object| {
            match layout::read_name(Path::new(&object.key).file_name()?)? {
                (_, Role::Hold(mark)) => Some((mark, object)),
                _ => None,
            }
        })
    }

    /// The files with one of these names.
    pub(super) fn named<'a>(&'a self, keys: &'a [&str]) -> impl Iterator<Item = Object> + 'a {
        self.objects.iter().filter(|object| keys.contains(&&*object.key)).cloned()
    }
}

/// Whether a file is the very image of a manifest.
pub(super) fn is_image(object: &Object, key: &str, manifest: &Manifest) -> bool {
    object.key == key && manifest.image.etag.as_deref() == Some(&object.tree)
}

pub(super) fn key(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
