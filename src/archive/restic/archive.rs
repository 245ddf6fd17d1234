//! The archive in a repository of restic: its catalogue, new copies, and changes to those that are there.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::io::AsyncReadExt as _;
use tokio::task::JoinHandle;
use tracing::warn;
use uuid::Uuid;

use crate::archive::catalogue::{self, Catalogue, ImageHead, Leftover, ProblemKind, StoredCopy};
use crate::archive::layout::{self, HoldMark, Role};
use crate::archive::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::archive::manifest_cache::ManifestCache;
use crate::archive::manifest_update::{ManifestUpdate, UpdateError, check_holds};
use crate::archive::marker::{
    MARKER_BYTES_MAX, MARKER_FILE, Marker, MarkerProblem, PROBE, PROBE_FILE, ProbeSteps, read_back,
};
use crate::archive::proof::VerifiedCopy;
use crate::archive::restic::error::{ResticCause, ResticError};
use crate::archive::restic::existing::{Existing, Names, is_image, key};
use crate::archive::restic::repository::{ImageLock, Object, Repository, ResticSettings, read_end};
use crate::archive::restic::sink::ResticSink;
use crate::archive::transfer::sink::{Begin, Output};
use crate::archive::transfer::source::{ImageSource, ImageStream, SourceError};
use crate::clock::Clock;
use crate::copies::CopyId;
use crate::disk::{Disk, blocking, free_bytes_at};
use crate::policy::name::ArchiveName;
use crate::process::{self, Process, Processes, Started};
use crate::text::{chain, excerpt};
use crate::transport::{Reached, TransportError};

/// Manifests that are read at once: each takes half a second of computing and 54 MB.
const READERS: usize = 2;

/// Bytes of an image that are read at once.
const CHUNK_BYTES: usize = 256 << 10;

/// An archive in a repository of restic. Clones are one archive.
#[derive(Debug, Clone)]
pub struct ResticArchive {
    repository: Arc<Repository>,
    manifests: Arc<ManifestCache>,
    /// The marker that was read last, by the id of its snapshot.
    marker: Arc<Mutex<Option<(String, Marker)>>>,
}

/// A manifest, or why its copy does not count.
type ReadManifest = Result<Arc<Manifest>, ProblemKind>;

impl ResticArchive {
    /// The archive `name`. restic is not started yet.
    pub fn new(
        name: ArchiveName,
        settings: ResticSettings,
        processes: Arc<dyn Processes>,
        disk: Arc<dyn Disk>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let repository = Arc::new(Repository::new(name, settings, processes, disk, clock));
        Self { repository, manifests: Arc::default(), marker: Arc::default() }
    }

    /// With the manifests that earlier processes read.
    #[must_use]
    pub fn with_cache(self, manifests: ManifestCache) -> Self {
        Self { manifests: Arc::new(manifests), ..self }
    }

    /// The name in the configuration.
    pub fn name(&self) -> &ArchiveName {
        &self.repository.name
    }

    /// The repository for people.
    pub fn place(&self) -> String {
        format!("restic:{}", self.repository.place())
    }

    /// Reads the copies that are there.
    ///
    /// # Errors
    /// [`ResticError`] if the repository can't be read: nothing is known of the archive then.
    pub async fn catalogue(&self) -> Result<Catalogue, ResticError> {
        self.catalogue_of(&self.repository.list().await?).await
    }

    async fn catalogue_of(&self, objects: &[Object]) -> Result<Catalogue, ResticError> {
        let marker = self.marker_in(objects).await?;
        // Of several with one name the newest counts; of images, the one that a manifest names.
        let mut listed: BTreeMap<&str, Vec<&Object>> = BTreeMap::new();
        for object in objects {
            if layout::read_path(&object.key).is_some() {
                listed.entry(&object.key).or_default().push(object);
            }
        }
        let is_manifest = |key: &str| matches!(stem_and_role(key), Some((_, Role::Manifest(_))));
        // Owned, since the stream below may move between threads.
        let newest: Vec<Object> = listed
            .iter()
            .filter(|(key, _)| is_manifest(key))
            .filter_map(|(_, all)| all.last().map(|object| (*object).clone()))
            .collect();

        let cache = Arc::clone(&self.manifests);
        blocking(move || cache.load()).await;
        let reads = stream::iter(newest).map(|object| async move {
            let read = self.read_manifest(&object).await;
            read.map(|read| (object.key, read))
        });
        let read: Result<HashMap<String, ReadManifest>, ResticError> =
            reads.buffer_unordered(READERS).try_collect().await;
        // After a failure, too: what was read before it need not be read again.
        let cache = Arc::clone(&self.manifests);
        blocking(move || cache.save()).await;
        let manifests = read?;
        let root = self.root();
        let text = |path: &Path| path.strip_prefix(&root).unwrap_or(path).to_string_lossy().into_owned();
        let keys = listed.keys().copied();
        Ok(catalogue::read_listed(self.name(), marker, &root, keys, |[here, image]| {
            let Some(manifest) = manifests.get(&text(here)) else {
                return Err(ProblemKind::Unreadable("it was deleted while it was listed".to_owned()));
            };
            let (manifest, image) = (manifest.clone()?, text(image));
            let images = listed.get(&*image).into_iter().flatten();
            let is_there = images.clone().any(|object| is_image(object, &image, &manifest));
            let counts = catalogue::check_image(&manifest, || Ok(is_there.then_some(manifest.image.bytes)));
            Ok((manifest, counts))
        }))
    }

    /// The beginning of all paths in the catalogue.
    fn root(&self) -> PathBuf {
        PathBuf::from(self.place())
    }

    /// A listed manifest.
    async fn read_manifest(&self, object: &Object) -> Result<ReadManifest, ResticError> {
        if let Some(known) = self.manifests.get(Path::new(&object.key), &object.id) {
            return Ok(Ok(known));
        }
        let bytes = match self.bytes(object, MANIFEST_BYTES_MAX).await {
            Ok(bytes) => bytes,
            // The repository has lost data of this one: its copy does not count.
            Err(error) if matches!(error.cause, ResticCause::Damaged(_) | ResticCause::Broken(_)) => {
                return Ok(Err(ProblemKind::Unreadable(excerpt(&chain(&error.cause), 200))));
            }
            Err(error) => return Err(error),
        };
        let read = catalogue::read_manifest(&bytes, Path::new(""), Path::new(&object.key));
        Ok(read.map(|manifest| self.manifests.put(&object.id, manifest)))
    }

    async fn bytes(&self, object: &Object, max: u64) -> Result<Vec<u8>, ResticError> {
        Ok(self.repository.get(object, usize::try_from(max).unwrap_or(usize::MAX)).await?.to_vec())
    }

    /// Reads the marker. The outer error is restic's.
    pub(crate) async fn marker(&self) -> Result<Result<Option<Marker>, MarkerProblem>, ResticError> {
        let objects = self.repository.list().await?;
        self.marker_in(&objects).await
    }

    async fn marker_in(
        &self,
        objects: &[Object],
    ) -> Result<Result<Option<Marker>, MarkerProblem>, ResticError> {
        let Some(object) = objects.iter().rfind(|object| object.key == MARKER_FILE) else {
            return Ok(Ok(None));
        };
        let last = || self.marker.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, marker)) = last().as_ref().filter(|(id, _)| *id == object.id) {
            return Ok(Ok(Some(marker.clone())));
        }
        match self.bytes(object, MARKER_BYTES_MAX).await {
            Ok(bytes) => {
                let read = Marker::from_bytes(&bytes);
                *last() = read.as_ref().ok().map(|marker| (object.id.clone(), marker.clone()));
                Ok(read.map(Some))
            }
            Err(error) if matches!(error.cause, ResticCause::Damaged(_) | ResticCause::Broken(_)) => {
                Ok(Err(MarkerProblem::Unreadable(excerpt(&chain(&error.cause), 200))))
            }
            Err(error) => Err(error),
        }
    }

    /// Writes the marker.
    pub(crate) async fn write_marker(&self, marker: &Marker) -> Result<(), ResticError> {
        self.replace(MARKER_FILE, &marker.to_bytes()).await
    }

    /// Writes a small file beside the marker.
    pub(crate) async fn write_beside_marker(&self, name: &str, bytes: Vec<u8>) -> Result<(), ResticError> {
        self.replace(name, &bytes).await
    }

    /// Reads a small file beside the marker.
    pub(crate) async fn read_beside_marker(
        &self,
        name: &str,
        max: usize,
    ) -> Result<Option<Vec<u8>>, ResticError> {
        let objects = self.repository.list().await?;
        let Some(object) = objects.iter().rfind(|object| object.key == name) else { return Ok(None) };
        Ok(Some(self.bytes(object, max as u64).await?))
    }

    /// Writes a file in the place of those of its name.
    async fn replace(&self, key: &str, bytes: &[u8]) -> Result<(), ResticError> {
        // Listed before it is written: what another process writes at the same time stays, and so one of the two does.
        let mut older = self.repository.list().await?;
        older.retain(|object| object.key == key);
        self.repository.put(key, bytes).await?;
        self.repository.forget(&older).await
    }

    /// Writes, reads back and deletes a small file. Each is tried whatever became of the one before.
    pub(crate) async fn probe(&self) -> ProbeSteps {
        let written = self.repository.put(PROBE_FILE, PROBE).await;
        let mut steps: ProbeSteps = vec![("write", written.as_ref().err().map(|error| chain(error)))];
        if let Ok((object, _)) = &written {
            let read = self.bytes(object, PROBE.len() as u64).await;
            steps.push(("read back", read_back(read.map(Some), |error| chain(&error))));
        }
        let deleted = async {
            let mut all = self.repository.list().await?;
            all.retain(|object| object.key == PROBE_FILE);
            self.repository.forget(&all).await
        };
        steps.push(("delete", deleted.await.err().map(|error| chain(&error))));
        steps
    }

    /// Looks for the files of a copy.
    async fn existing(&self, names: &Names) -> Result<Existing, ResticError> {
        self.existing_in(self.repository.list().await?, names).await
    }

    async fn existing_in(&self, mut objects: Vec<Object>, names: &Names) -> Result<Existing, ResticError> {
        let stem = key(&names.paths.stem());
        objects.retain(|object| {
            // The id in it has a fixed length, so a dot follows.
            object.key.strip_prefix(&stem).is_some_and(|end| end.starts_with('.'))
        });
        let newest = |key: &String| objects.iter().rfind(|object| object.key == *key);
        let mut manifest = None;
        if let Some(here) = names.manifests.iter().find_map(newest) {
            let bytes = self.bytes(here, MANIFEST_BYTES_MAX).await?;
            let read = catalogue::read_manifest(&bytes, Path::new(""), Path::new(&here.key)).ok();
            manifest = read.map(|manifest| (manifest, bytes));
        }
        let counts = manifest.as_ref().is_some_and(|(manifest, _)| {
            let is_there = objects.iter().any(|object| is_image(object, &names.image, manifest));
            catalogue::check_image(manifest, || Ok(is_there.then_some(manifest.image.bytes))).is_ok()
        });
        Ok(Existing { objects, manifest, counts })
    }

    /// Begins to store an image, or finds that a verified copy of it is, or was, there already.
    ///
    /// # Errors
    /// [`ResticError`] if restic fails, or this process is storing the same image already.
    pub async fn begin(&self, id: &CopyId) -> Result<Begin, ResticError> {
        let repository = &self.repository;
        let names = Names::new(id);
        let lock = repository.lock(&names.image).await;
        let lock = lock.map_err(|cause| repository.error("store an image", cause))?;
        let existing = self.existing(&names).await?;
        if let Some(manifest) = existing.verified() {
            lock.remove_file();
            return Ok(Begin::Stored(VerifiedCopy::new(self.name(), manifest)));
        }
        let image = self.root().join(&names.image).display().to_string();
        let sink = ResticSink::new(Arc::clone(repository), names, id.clone(), existing, lock);
        Ok(Begin::Missing(Output::new(self.name().clone(), image, Box::new(sink))))
    }

    /// Whether the copy still counts.
    pub(crate) async fn has(&self, copy: &StoredCopy) -> Result<bool, ResticError> {
        let existing = self.existing(&Names::new(&copy.manifest.id())).await?;
        Ok(existing.verified().is_some_and(|found| found.image == copy.manifest.image))
    }

    /// What the repository says of an image; none if there is none. A tree's id says which bytes it has.
    pub(crate) async fn head(&self, copy: &StoredCopy) -> Result<Option<ImageHead>, ResticError> {
        let names = Names::new(&copy.manifest.id());
        let existing = self.existing(&names).await?;
        let mut images = existing.objects.iter().filter(|object| object.key == names.image);
        let ours = existing.image(&names, &copy.manifest);
        Ok(ours.or_else(|| images.next_back()).map(|object| ImageHead {
            bytes: copy.manifest.image.bytes,
            etag: Some(object.tree.clone()),
            md5: None,
        }))
    }

    /// The image of a copy, to be read again or restored.
    pub(crate) fn image(&self, copy: &StoredCopy) -> ResticImage {
        let manifest = Arc::clone(&copy.manifest);
        let names = Names::new(&manifest.id());
        ResticImage { archive: self.clone(), names, manifest, damage: Arc::default() }
    }

    /// Locks a copy's image, and looks for its files.
    async fn locked(&self, id: &CopyId) -> Result<(Names, Existing, ImageLock), UpdateError> {
        let names = Names::new(id);
        let Some(lock) = self.repository.lock_here(&names.image) else {
            return Err(UpdateError::Busy { image: self.shown(&names) });
        };
        let existing = self.existing(&names).await.map_err(|error| self.update_failed(error, &names))?;
        Ok((names, existing, lock))
    }

    fn shown(&self, names: &Names) -> String {
        self.root().join(&names.image).display().to_string()
    }

    fn update_failed(&self, error: ResticError, names: &Names) -> UpdateError {
        if error.is_busy() {
            return UpdateError::Busy { image: self.shown(names) };
        }
        UpdateError::Archive(error.into_sink_error("update the manifest").into())
    }

    /// Writes the new manifest of a copy, and deletes the image of one that is pruned. Its space is freed by
    /// `remove_leftovers`.
    ///
    /// # Errors
    /// [`UpdateError`]: nothing changed, or the manifest is the new one, and the image may still be there.
    pub async fn update_manifest(
        &self,
        copy: &StoredCopy,
        update: ManifestUpdate,
    ) -> Result<(), UpdateError> {
        let id = copy.manifest.id();
        let (names, existing, _lock) = self.locked(&id).await?;
        check_holds(update, existing.holds().map(|(mark, _)| mark))?;
        let found = existing.manifest.as_ref().filter(|(found, _)| *found == *copy.manifest);
        // One that is marked as corrupt does not count; that is what the update may end.
        let is_valid = existing.counts || copy.manifest.corrupt_since.is_some();
        let Some((before, bytes)) = found.filter(|_| is_valid) else {
            return Err(UpdateError::Changed { image: self.shown(&names) });
        };
        let failed = |error| self.update_failed(error, &names);
        // The manifest is marked before the image is deleted: without its image and unmarked, the copy would not count any
        // more, and snapshots that need it could not be deleted.
        let (manifest, new_bytes) = update.apply(before, bytes);
        let new_key = key(&names.paths.manifest(manifest.mark()));
        let (made, listed) = self.repository.put(&new_key, &new_bytes).await.map_err(failed)?;
        let mut old: Vec<Object> = existing.named(&names.manifests.each_ref().map(|key| &**key)).collect();
        old.retain(|object| object.id != made.id);
        if let ManifestUpdate::Pruned(_) = update {
            // A hold that was marked since: its process finds the new manifest, or this one finds its mark.
            let now = self.existing_in(listed, &names).await.map_err(failed)?;
            if let Err(held) = check_holds(update, now.holds().map(|(mark, _)| mark)) {
                self.repository.forget(&[made]).await.map_err(failed)?;
                return Err(held);
            }
            // As long as the image is there, its manifest is, too: should this end here, it counts again without the mark.
            let holds = now.holds().map(|(_, object)| object.clone());
            let image: Vec<Object> = now.named(&[&names.image]).chain(holds).collect();
            self.repository.forget(&image).await.map_err(failed)?;
        }
        self.repository.forget(&old).await.map_err(failed)
    }

    /// Removes a copy that is marked as corrupt.
    pub(crate) async fn remove_corrupt(&self, copy: &StoredCopy) -> Result<(), UpdateError> {
        let (names, existing, _lock) = self.locked(&copy.manifest.id()).await?;
        let is_same = existing.manifest.as_ref().is_some_and(|(found, _)| *found == *copy.manifest);
        if copy.manifest.corrupt_since.is_none() || !is_same {
            return Err(UpdateError::Changed { image: self.shown(&names) });
        }
        self.repository.forget(&existing.objects).await.map_err(|error| self.update_failed(error, &names))
    }

    /// Deletes the manifest of a pruned copy.
    pub(crate) async fn forget_pruned(&self, copy: &StoredCopy) -> Result<(), UpdateError> {
        let (names, existing, _lock) = self.locked(&copy.manifest.id()).await?;
        let is_same = existing.verified().is_some_and(|found| *found == *copy.manifest);
        let has_image = existing.named(&[&names.image]).next().is_some();
        if copy.manifest.pruned_at.is_none() || has_image || !is_same {
            return Err(UpdateError::Changed { image: self.shown(&names) });
        }
        self.repository.forget(&existing.objects).await.map_err(|error| self.update_failed(error, &names))
    }

    /// The bytes of a copy's manifest.
    pub(crate) async fn manifest_bytes(&self, copy: &StoredCopy) -> Result<Option<Vec<u8>>, ResticError> {
        let found = self.existing(&Names::new(&copy.manifest.id())).await?.manifest;
        let same = found.filter(|(found, _)| found.image == copy.manifest.image);
        Ok(same.map(|(_, bytes)| bytes))
    }

    /// Marks a hold on a copy's snapshot, in the place of an earlier one of the same state directory; false if the copy has
    /// no image any more.
    pub(crate) async fn mark_hold(
        &self,
        id: &CopyId,
        mark: HoldMark,
        text: Vec<u8>,
    ) -> Result<bool, UpdateError> {
        let names = Names::new(id);
        let failed = |error| self.update_failed(error, &names);
        // Those from before alone are replaced: what another process marks at the same time stays.
        let before = self.existing(&names).await.map_err(failed)?;
        let put = self.repository.put(&key(&names.paths.hold(&mark)), &text).await;
        // Listed after the mark, so that a pruning at the same time sees it, or is seen here.
        let (made, listed) = put.map_err(failed)?;
        let existing = self.existing_in(listed, &names).await.map_err(failed)?;
        if existing.manifest.as_ref().is_none_or(|(manifest, _)| manifest.pruned_at.is_some()) {
            self.repository.forget(&[made]).await.map_err(failed)?;
            return Ok(false);
        }
        let ours = before.holds().filter(|(other, _)| other.state == mark.state);
        let ours: Vec<Object> = ours.map(|(_, object)| object.clone()).collect();
        self.repository.forget(&ours).await.map_err(failed)?;
        Ok(true)
    }

    /// Removes the marks of holds on a copy's snapshot that this state directory put there, or all; how many.
    pub(crate) async fn remove_holds(&self, id: &CopyId, of: Option<Uuid>) -> Result<usize, UpdateError> {
        let names = Names::new(id);
        let failed = |error| self.update_failed(error, &names);
        let existing = self.existing(&names).await.map_err(failed)?;
        let meant = existing.holds().filter(|(mark, _)| of.is_none_or(|of| of == mark.state));
        let meant: Vec<Object> = meant.map(|(_, object)| object.clone()).collect();
        self.repository.forget(&meant).await.map_err(failed)?;
        Ok(meant.len())
    }

    /// The images among these files that no manifest among them names, and the ids of the manifests. Beside a manifest that does not count no
    /// image is among them: what it says of the image is not known.
    async fn unnamed_in(&self, objects: &[Object]) -> Result<(Vec<Object>, HashSet<String>), ResticError> {
        let catalogue = self.catalogue_of(objects).await?;
        let named: HashMap<String, Arc<Manifest>> = catalogue
            .copies()
            .iter()
            .chain(catalogue.corrupt())
            .map(|copy| (Names::new(&copy.manifest.id()).image, Arc::clone(&copy.manifest)))
            .collect();
        let with_manifest: HashSet<&str> = objects.iter().filter_map(manifest_stem).collect();
        let is_unnamed = |object: &Object| {
            let Some((stem, Role::Image)) = stem_and_role(&object.key) else { return false };
            match named.get(&object.key) {
                Some(manifest) => !is_image(object, &object.key, manifest),
                None => !with_manifest.contains(stem),
            }
        };
        let unnamed = objects.iter().filter(|object| is_unnamed(object)).cloned().collect();
        let manifests = objects.iter().filter(|object| manifest_stem(object).is_some());
        Ok((unnamed, manifests.map(|object| object.id.clone()).collect()))
    }

    /// Images that no manifest names.
    pub(crate) async fn leftovers(&self) -> Result<Vec<Leftover>, ResticError> {
        let (unnamed, _) = self.unnamed_in(&self.repository.list().await?).await?;
        let mut leftovers = Vec::new();
        for object in &unnamed {
            let is_useless = self.is_ours(object) && self.repository.is_free(&object.key).await;
            leftovers.push(self.leftover(object, is_useless));
        }
        Ok(leftovers)
    }

    /// Another machine may be about to write the manifest of what it has stored.
    fn is_ours(&self, image: &Object) -> bool {
        image.host == self.repository.host()
    }

    /// Deletes the images that no manifest names, and frees the space of all that was deleted.
    pub(crate) async fn remove_leftovers(&self) -> Result<Vec<Leftover>, ResticError> {
        let (mut useless, manifests) = self.unnamed_in(&self.repository.list().await?).await?;
        useless.retain(|object| self.is_ours(object));
        if !useless.is_empty() {
            self.remove_unnamed(&mut useless, &manifests).await?;
        }
        self.repository.prune().await?;
        Ok(useless.iter().map(|object| self.leftover(object, true)).collect())
    }

    /// Deletes those of these images that are not being stored, and that have no other manifests than these by now; the rest is taken
    /// from the list.
    async fn remove_unnamed(
        &self,
        images: &mut Vec<Object>,
        manifests: &HashSet<String>,
    ) -> Result<(), ResticError> {
        let alone = self.repository.alone().await;
        let mut locks = BTreeMap::new();
        for object in &*images {
            if locks.contains_key(&object.key) {
                continue;
            }
            match self.repository.lock(&object.key).await {
                Ok(lock) => drop(locks.insert(object.key.clone(), lock)),
                Err(ResticCause::Busy) => {}
                Err(cause) => return Err(self.repository.error("delete what exports left", cause)),
            }
        }
        let are_as_before = |listed: &[Object], image: &Object| {
            let stem = stem_and_role(&image.key).map(|(stem, _)| stem);
            let mut now = listed.iter().filter(|object| manifest_stem(object) == stem);
            now.all(|object| manifests.contains(&object.id))
        };
        // Before it was locked, an export may have written the manifest.
        let listed = self.repository.list().await?;
        images.retain(|image| {
            let Some(lock) = locks.get(&image.key) else { return false };
            let is_left = are_as_before(&listed, image);
            if !is_left {
                lock.remove_file();
            }
            is_left
        });
        if images.is_empty() {
            return Ok(());
        }
        let left = alone.forget(images).await?;
        let name = self.name();
        for image in images.iter().filter(|image| !are_as_before(&left, image)) {
            let key = &image.key;
            warn!(
                archive = %name,
                "archive {name}: the image {key} was deleted as a leftover while a process with another state directory wrote its \
                 manifest: that copy has no image, and the next export fetches it again"
            );
        }
        Ok(())
    }

    fn leftover(&self, object: &Object, is_useless: bool) -> Leftover {
        Leftover { path: self.root().join(&object.key), bytes: None, is_useless }
    }

    /// Bytes that may still be written, where the repository is a folder of this machine.
    pub(crate) async fn free_bytes(&self) -> Option<u64> {
        let (folder, disk) = (self.repository.folder()?, Arc::clone(&self.repository.disk));
        blocking(move || free_bytes_at(&*disk, &folder)).await
    }
}

/// How the names of all files of a copy begin, its folder with them, and what this one of them is.
fn stem_and_role(key: &str) -> Option<(&str, Role)> {
    let (_, _, name) = layout::read_path(key)?;
    let (stem, role) = layout::read_name(name.as_ref())?;
    Some((&key[..key.len() - name.len() + stem.len()], role))
}

/// How the names of all files of a copy begin, if this one is its manifest.
fn manifest_stem(object: &Object) -> Option<&str> {
    match stem_and_role(&object.key)? {
        (stem, Role::Manifest(_)) => Some(stem),
        _ => None,
    }
}

/// The image of a copy in a repository, to be read like one of the service.
#[derive(Debug)]
pub(crate) struct ResticImage {
    archive: ResticArchive,
    names: Names,
    manifest: Arc<Manifest>,
    /// What restic said of data that is lost or damaged: asking again gives no more.
    damage: Arc<OnceLock<String>>,
}

/// Data of a copy is lost or damaged, although the archive can be read.
#[derive(Debug, thiserror::Error)]
#[error("its data is lost or damaged: {0}")]
pub(crate) struct Damaged(String);

impl ImageSource for ResticImage {
    fn md5(&self) -> Option<String> {
        Some(self.manifest.image.md5.to_string())
    }

    /// Bytes that are no image mean damage: no proxy is between.
    fn is_image(&self, _length: Option<u64>) -> bool {
        true
    }

    /// restic gives an image from its beginning alone: what comes before `offset` is read and dropped.
    fn open<'a>(
        &'a self,
        offset: u64,
        until: Option<u64>,
        etag: Option<&'a str>,
    ) -> BoxFuture<'a, Result<ImageStream, SourceError>> {
        Box::pin(async move {
            let image = &self.manifest.image;
            if offset > image.bytes || etag.is_some_and(|etag| image.etag.as_deref() != Some(etag)) {
                return Err(SourceError::Changed);
            }
            if let Some(why) = self.damage.get() {
                return Err(SourceError::Refused(Box::new(Damaged(why.clone()))));
            }
            let existing = self.archive.existing(&self.names).await.map_err(source_error)?;
            let Some(object) = existing.image(&self.names, &self.manifest) else {
                return Err(SourceError::Refused("the image is missing in the repository".into()));
            };
            let repository = Arc::clone(&self.archive.repository);
            let Started { process, stdout, stderr, .. } = repository
                .open_image(object)
                .map_err(|cause| source_error(repository.error("read", cause)))?;
            let end = until.unwrap_or(image.bytes).min(image.bytes);
            let dump = Dump {
                repository,
                process,
                stdout,
                errors: tokio::spawn(read_end(stderr)),
                skipped: offset,
                left: end.saturating_sub(offset),
                damage: Arc::clone(&self.damage),
            };
            let body = Box::pin(stream::try_unfold(dump, Dump::next));
            Ok(ImageStream {
                offset,
                is_part: true,
                total: Some(image.bytes),
                etag: image.etag.as_deref().map(str::to_owned),
                body,
            })
        })
    }
}

/// A `restic dump` that is being read.
struct Dump {
    repository: Arc<Repository>,
    process: Box<dyn Process>,
    stdout: process::Output,
    errors: JoinHandle<String>,
    /// Bytes that are still to be dropped.
    skipped: u64,
    /// Bytes that are still to be given.
    left: u64,
    damage: Arc<OnceLock<String>>,
}

impl Dump {
    /// The next bytes, an empty chunk where they were dropped; none at the end.
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, TransportError> {
        let broken = |error| TransportError::because(Reached::Unknown, "restic cannot be read", error);
        if self.left > 0 {
            let mut bytes = BytesMut::with_capacity(CHUNK_BYTES);
            if self.stdout.read_buf(&mut bytes).await.map_err(broken)? == 0 {
                return Err(self.why_it_ended().await);
            }
            let skipped = usize::try_from(self.skipped).unwrap_or(usize::MAX).min(bytes.len());
            self.skipped -= skipped as u64;
            let mut bytes = bytes.split_off(skipped);
            bytes.truncate(usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len()));
            self.left -= bytes.len() as u64;
            // Also if it is empty: whoever waits sees that something comes, however long it is until the first byte.
            return Ok(Some((bytes.freeze(), self)));
        }
        Ok(None)
    }

    /// The error of a restic that has given less than the image has.
    async fn why_it_ended(mut self) -> TransportError {
        let broken =
            |error: io::Error| TransportError::because(Reached::Unknown, "restic gives no more of it", error);
        let status = match self.process.wait().await {
            Ok(status) => status,
            Err(error) => return broken(error),
        };
        let cause = self.repository.cause(status, &(&mut self.errors).await.unwrap_or_default());
        if let ResticCause::Damaged(why) = &cause {
            let _ = self.damage.set(why.clone());
        }
        broken(io::Error::other(cause))
    }
}

fn source_error(error: ResticError) -> SourceError {
    if error.is_transient() {
        SourceError::Broken(Box::new(error))
    } else {
        SourceError::Refused(Box::new(error))
    }
}
