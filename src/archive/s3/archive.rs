//! The archive in a bucket: its catalogue, new copies, and changes to those that are there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _};
use secrecy::SecretString;
use uuid::Uuid;

use crate::archive::catalogue::{self, Catalogue, ImageHead, Leftover, ProblemKind, StoredCopy};
use crate::archive::layout::{self, HoldMark, Role};
use crate::archive::manifest::Manifest;
use crate::archive::manifest_cache::ManifestCache;
use crate::archive::manifest_update::{ManifestUpdate, UpdateError, check_holds};
use crate::archive::marker::{
    MARKER_BYTES_MAX, MARKER_FILE, Marker, MarkerProblem, PROBE, PROBE_FILE, ProbeSteps, read_back,
};
use crate::archive::md5::Md5Sum;
use crate::archive::proof::VerifiedCopy;
use crate::archive::s3::bucket::Bucket;
use crate::archive::s3::client::{Client, S3Location};
use crate::archive::s3::credentials::BucketKey;
use crate::archive::s3::error::{S3Cause, S3Error};
use crate::archive::s3::memory::PartMemory;
use crate::archive::s3::upload::S3Sink;
use crate::archive::s3::xml::{ListedObject, UnfinishedUpload};
use crate::archive::transfer::sink::{Begin, Output};
use crate::archive::transfer::source::{ImageSource, ImageStream, SourceError};
use crate::clock::Clock;
use crate::copies::CopyId;
use crate::disk::blocking;
use crate::policy::bucket::Noncurrent;
use crate::policy::name::ArchiveName;
use crate::randomness::Randomness;
use crate::text::{chain, excerpt};
use crate::transport::{BodyError, Transport};

/// Manifests that are read at once: a store answers each in some ten milliseconds, and there may be thousands.
const READERS: usize = 8;

/// An archive in a bucket. Clones are one archive.
#[derive(Debug, Clone)]
pub struct S3Archive {
    pub(super) bucket: Arc<Bucket>,
    manifests: Arc<ManifestCache>,
    memory: PartMemory,
}

/// A manifest, or why its copy does not count.
type ReadManifest = Result<Arc<Manifest>, ProblemKind>;

impl S3Archive {
    /// The archive `name` at `location`. Nothing is sent yet.
    pub fn new(
        name: ArchiveName,
        location: S3Location,
        key: impl Into<BucketKey>,
        transport: Arc<dyn Transport>,
        clock: Arc<dyn Clock>,
        randomness: Arc<dyn Randomness>,
    ) -> Self {
        let client = Client::new(location, key.into(), transport, clock, randomness);
        let bucket = Arc::new(Bucket::new(name, client));
        Self { bucket, manifests: Arc::default(), memory: PartMemory::default() }
    }

    /// The name in the configuration.
    pub fn name(&self) -> &ArchiveName {
        &self.bucket.name
    }

    /// The bucket and the prefix as people write them.
    pub fn place(&self) -> String {
        self.bucket.client.shown(self.bucket.prefix())
    }

    /// With the manifests that earlier processes read.
    #[must_use]
    pub fn with_cache(self, manifests: ManifestCache) -> Self {
        Self { manifests: Arc::new(manifests), ..self }
    }

    /// With a budget of memory that it shares with other archives.
    #[must_use]
    pub fn with_memory(self, memory: PartMemory) -> Self {
        Self { memory, ..self }
    }

    /// Reads the copies that are there.
    ///
    /// # Errors
    /// [`S3Error`] if the listing can't be read, or a manifest although it may be read: nothing is known of the archive then.
    pub async fn catalogue(&self) -> Result<Catalogue, S3Error> {
        let prefix = self.bucket.prefix();
        let (mut listed, mut images, mut holds) = (Vec::new(), BTreeMap::new(), Vec::new());
        let (marker_key, mut has_marker) = (self.marker_key(), false);
        let each = |object: ListedObject| {
            has_marker |= object.key == marker_key;
            // A store may list more than was asked for: other keys do not count.
            let path = object.key.strip_prefix(prefix).and_then(layout::read_path);
            match path.and_then(|(_, _, name)| Some(layout::read_name(name.as_ref())?.1)) {
                Some(Role::Image) => {
                    images.insert(object.key, object.bytes);
                }
                Some(Role::Manifest(_)) => listed.push(object),
                Some(Role::Hold(_)) => holds.push(object.key),
                None => {}
            }
        };
        self.bucket.client.list(prefix, each).await?;

        let marker = if has_marker { self.marker().await? } else { Ok(None) };

        let cache = Arc::clone(&self.manifests);
        blocking(move || cache.load()).await;
        let read = self.read_manifests(listed).await;
        // After a failure, too: what was read before it need not be read again.
        let cache = Arc::clone(&self.manifests);
        blocking(move || cache.save()).await;
        let manifests = read?;
        let root = self.bucket.root();
        let path = PathBuf::from(format!("{root}{prefix}"));
        let keys =
            manifests.keys().chain(images.keys()).chain(&holds).filter_map(|key| key.strip_prefix(prefix));
        Ok(catalogue::read_listed(self.name(), marker, &path, keys, |[here, image]| {
            let Some(manifest) = key_of(here, &root).and_then(|key| manifests.get(key)) else {
                return Err(ProblemKind::Unreadable("it was deleted while it was listed".to_owned()));
            };
            let manifest = manifest.clone()?;
            let counts = catalogue::check_image(&manifest, || {
                Ok(key_of(image, &root).and_then(|key| images.get(key)).copied())
            });
            Ok((manifest, counts))
        }))
    }

    fn marker_key(&self) -> String {
        format!("{}{MARKER_FILE}", self.bucket.prefix())
    }

    /// Reads the marker. The outer error is the store's.
    pub(crate) async fn marker(&self) -> Result<Result<Option<Marker>, MarkerProblem>, S3Error> {
        let max = usize::try_from(MARKER_BYTES_MAX).unwrap_or(usize::MAX);
        Ok(match self.bucket.client.get(&self.marker_key(), max).await {
            Ok(found) => found.map(|(bytes, _)| Marker::from_bytes(&bytes)).transpose(),
            Err(S3Error { cause: S3Cause::Body(BodyError::TooLong { .. }), .. }) => {
                Err(MarkerProblem::Damaged("it is too long".to_owned()))
            }
            Err(error) => return Err(error),
        })
    }

    /// Writes the marker.
    pub(crate) async fn write_marker(&self, marker: &Marker) -> Result<(), S3Error> {
        self.bucket.client.put(&self.marker_key(), "application/json", marker.to_bytes()).await
    }

    /// Writes a small object beside the marker.
    pub(crate) async fn write_beside_marker(&self, name: &str, bytes: Vec<u8>) -> Result<(), S3Error> {
        let key = format!("{}{name}", self.bucket.prefix());
        self.bucket.client.put(&key, "application/json", bytes).await
    }

    /// Reads a small object beside the marker.
    pub(crate) async fn read_beside_marker(
        &self,
        name: &str,
        max: usize,
    ) -> Result<Option<Vec<u8>>, S3Error> {
        let key = format!("{}{name}", self.bucket.prefix());
        Ok(self.bucket.client.get(&key, max).await?.map(|(bytes, _)| bytes.to_vec()))
    }

    /// Whether the store answers at all within `limit`.
    pub(crate) async fn answers(&self, limit: Duration) -> Result<(), S3Error> {
        self.bucket.client.answers(&format!("{}{MARKER_FILE}", self.bucket.prefix()), limit).await
    }

    /// Writes, reads back and deletes a small object. Each is tried whatever became of the one before.
    pub(crate) async fn probe(&self) -> ProbeSteps {
        let (client, key) = (&self.bucket.client, format!("{}{PROBE_FILE}", self.bucket.prefix()));
        let written = client.put(&key, "text/plain", PROBE.to_vec()).await;
        let read = client.get(&key, PROBE.len()).await.map(|found| found.map(|(bytes, _)| bytes));
        let read = match read {
            Ok(None) if written.is_err() => None,
            read => read_back(read, |error| chain(&error)),
        };
        let deleted = client.delete(&key).await;
        let failure = |done: Result<(), S3Error>| done.err().map(|error| chain(&error));
        vec![("write", failure(written)), ("read back", read), ("delete", failure(deleted))]
    }

    /// The listed manifests by their keys: those that are not known with the same `ETag` are read.
    async fn read_manifests(
        &self,
        listed: Vec<ListedObject>,
    ) -> Result<BTreeMap<String, ReadManifest>, S3Error> {
        let reads = stream::iter(listed).map(|object| async move {
            let read = self.read_manifest(&object).await;
            read.map(|read| Some((object.key, read?)))
        });
        let mut reading = reads.buffer_unordered(READERS);
        let mut manifests = BTreeMap::new();
        while let Some(read) = reading.next().await {
            manifests.extend(read?);
        }
        Ok(manifests)
    }

    /// A listed manifest; `None` if it was deleted since.
    async fn read_manifest(&self, object: &ListedObject) -> Result<Option<ReadManifest>, S3Error> {
        let path = object.key.strip_prefix(self.bucket.prefix()).unwrap_or(&object.key);
        if let Some(known) = self.manifests.get(Path::new(path), &object.etag) {
            return Ok(Some(Ok(known)));
        }
        let bytes = match self.bucket.read_manifest(&object.key, object.bytes).await {
            Ok(None) => return Ok(None),
            Ok(Some(read)) => read,
            // This one alone may not be read, or not now: its copy does not count.
            Err(error)
                if error.status().is_some_and(|status| status.is_client_error())
                    && !error.cause.is_transient() =>
            {
                Err(ProblemKind::Unreadable(excerpt(&chain(&error.cause), 200)))
            }
            Err(error) => return Err(error),
        };
        let here = Path::new(&object.key);
        let read =
            bytes.and_then(|bytes| catalogue::read_manifest(&bytes, Path::new(self.bucket.prefix()), here));
        // With the `ETag` as listings write it, since the next listing is compared with it.
        Ok(Some(read.map(|manifest| self.manifests.put(&object.etag, manifest))))
    }

    /// Begins to store an image, or finds that a verified copy of it is, or was, there already.
    ///
    /// # Errors
    /// [`S3Error`] if a request fails, or this process is storing the same image already.
    pub async fn begin(&self, id: &CopyId) -> Result<Begin, S3Error> {
        let bucket = &self.bucket;
        bucket.clean_daily().await;
        let key = bucket.image_key(id);
        let image = bucket.client.shown(&key);
        let Some(lock) = bucket.lock(&key) else {
            return Err(S3Error::new("store", image, S3Cause::Busy));
        };
        let existing = bucket.existing(id).await?;
        if let Some(manifest) = existing.verified() {
            return Ok(Begin::Stored(VerifiedCopy::new(&bucket.name, manifest)));
        }
        let sink = S3Sink::new(Arc::clone(bucket), id.clone(), existing, lock, self.memory.clone());
        Ok(Begin::Missing(Output::new(bucket.name.clone(), image, Box::new(sink))))
    }

    /// Whether the copy still counts.
    pub(crate) async fn has(&self, copy: &StoredCopy) -> Result<bool, S3Error> {
        let existing = self.bucket.existing(&copy.manifest.id()).await?;
        Ok(existing.verified().is_some_and(|found| found.image == copy.manifest.image))
    }

    /// What the store says of an image; none if there is none.
    pub(crate) async fn head(&self, copy: &StoredCopy) -> Result<Option<ImageHead>, S3Error> {
        let key = self.bucket.image_key(&copy.manifest.id());
        let version = copy.manifest.image.version_id.as_deref();
        let found = self.bucket.client.head_version(&key, version).await?;
        Ok(found.map(|found| ImageHead {
            bytes: found.bytes.unwrap_or_default(),
            etag: Some(found.etag).filter(|etag| !etag.is_empty()),
            md5: found.md5,
        }))
    }

    /// The image of a copy, to be read again or restored.
    pub fn image(&self, copy: &StoredCopy) -> StoredImage {
        let manifest = &copy.manifest;
        let key = self.bucket.image_key(&manifest.id());
        let version_id = manifest.image.version_id.clone();
        let (bytes, md5) = (manifest.image.bytes, manifest.image.md5);
        StoredImage { bucket: Arc::clone(&self.bucket), key, version_id, bytes, md5 }
    }

    /// An address, itself a secret, at which anybody can read the image for `valid_for`, at most a week.
    ///
    /// # Errors
    /// [`S3Error`] if the store can't be asked which version of it is there.
    pub async fn presign_get(&self, copy: &StoredCopy, valid_for: Duration) -> Result<SecretString, S3Error> {
        let (client, key) = (&self.bucket.client, self.bucket.image_key(&copy.manifest.id()));
        let version = match copy.manifest.image.version_id.as_deref() {
            // In a bucket that was copied it is another.
            Some(version) => client.head_version(&key, Some(version)).await?.and_then(|head| head.version_id),
            None => None,
        };
        Ok(client.presign_get(&key, version.as_deref(), valid_for))
    }

    /// Writes the new manifest of a copy, and deletes the image of one that is pruned. No store has locks, so another
    /// process may write between the check and the change; then at worst a copy that could count does not.
    ///
    /// # Errors
    /// [`UpdateError`]: nothing changed, or the manifest is the new one, and the image may still be there.
    pub async fn update_manifest(
        &self,
        copy: &StoredCopy,
        update: ManifestUpdate,
    ) -> Result<(), UpdateError> {
        let (bucket, client) = (&self.bucket, &self.bucket.client);
        let id = copy.manifest.id();
        let key = bucket.image_key(&id);
        let image = client.shown(&key);
        let Some(_lock) = bucket.lock(&key) else {
            return Err(UpdateError::Busy { image });
        };
        let existing = bucket.existing(&id).await.map_err(update_failed)?;
        check_holds(update, existing.holds.into_iter().map(|(mark, _)| mark))?;
        let found = existing.manifest.filter(|(found, _)| *found == *copy.manifest);
        // One that is marked as corrupt does not count; that is what the update may end.
        let is_valid = existing.counts || copy.manifest.corrupt_since.is_some();
        let Some((before, bytes)) = found.filter(|_| is_valid) else {
            return Err(UpdateError::Changed { image });
        };
        // The manifest is marked before the image is deleted: without its image and unmarked, the copy would not count any
        // more, and snapshots that need it could not be deleted.
        let (manifest, new_bytes) = update.apply(&before, &bytes);
        let new_key = bucket.manifest_key(&id, manifest.mark());
        client.put(&new_key, "application/json", new_bytes).await.map_err(update_failed)?;
        if let ManifestUpdate::Pruned(_) = update {
            // A hold that was marked since: its process finds the new manifest, or this one finds its mark.
            let holds = bucket.holds_of(&id).await.map_err(update_failed)?;
            if let Err(held) = check_holds(update, holds.iter().map(|(mark, _)| *mark)) {
                // The manifest before is still there.
                if before.pruned_at.is_none() {
                    client.delete(&new_key).await.map_err(update_failed)?;
                }
                return Err(held);
            }
            for (_, ended) in &holds {
                client.delete(ended).await.map_err(update_failed)?;
            }
        }
        if let ManifestUpdate::Pruned(_) = update {
            // As long as the image is there, its manifest is, too: should this end here, it counts again without the mark.
            client.delete(&key).await.map_err(update_failed)?;
            client.delete(&bucket.md5_key(&id)).await.map_err(update_failed)?;
        }
        for key in existing.manifests.iter().filter(|key| **key != new_key) {
            client.delete(key).await.map_err(update_failed)?;
        }
        Ok(())
    }

    /// Removes a copy that is marked as corrupt.
    pub(crate) async fn remove_corrupt(&self, copy: &StoredCopy) -> Result<(), UpdateError> {
        let (bucket, client) = (&self.bucket, &self.bucket.client);
        let id = copy.manifest.id();
        let key = bucket.image_key(&id);
        let Some(_lock) = bucket.lock(&key) else {
            return Err(UpdateError::Busy { image: client.shown(&key) });
        };
        let existing = bucket.existing(&id).await.map_err(update_failed)?;
        let is_same = existing.manifest.is_some_and(|(found, _)| found == *copy.manifest);
        if copy.manifest.corrupt_since.is_none() || !is_same {
            return Err(UpdateError::Changed { image: client.shown(&key) });
        }
        let holds = existing.holds.into_iter().map(|(_, key)| key);
        // The manifests last: until then it can be removed again.
        for key in [key, bucket.md5_key(&id)].into_iter().chain(holds).chain(existing.manifests) {
            client.delete(&key).await.map_err(update_failed)?;
        }
        Ok(())
    }

    /// The bytes of a copy's manifest.
    pub(crate) async fn manifest_bytes(&self, copy: &StoredCopy) -> Result<Option<Vec<u8>>, S3Error> {
        let found = self.bucket.existing(&copy.manifest.id()).await?.manifest;
        let same = found.filter(|(found, _)| found.image == copy.manifest.image);
        Ok(same.map(|(_, bytes)| bytes.to_vec()))
    }

    /// Marks a hold on a copy's snapshot, in the place of an earlier one of the same state directory; false if the copy has
    /// no image any more.
    pub(crate) async fn mark_hold(
        &self,
        id: &CopyId,
        mark: HoldMark,
        text: Vec<u8>,
    ) -> Result<bool, UpdateError> {
        let (bucket, client) = (&self.bucket, &self.bucket.client);
        let key = bucket.hold_key(id, &mark);
        client.put(&key, "application/json", text).await.map_err(update_failed)?;
        // After the mark, so that a pruning at the same time sees it, or is seen here.
        let existing = bucket.existing(id).await.map_err(update_failed)?;
        let manifest = existing.manifest.map(|(manifest, _)| manifest);
        let Some(manifest) = manifest.filter(|manifest| manifest.pruned_at.is_none()) else {
            client.delete(&key).await.map_err(update_failed)?;
            return Ok(false);
        };
        if bucket.rules().lock.is_some() {
            bucket.set_legal_hold(&manifest, true).await.map_err(update_failed)?;
        }
        let others = existing.holds.iter().filter(|(other, _)| other.state == mark.state && *other != mark);
        for (_, key) in others {
            client.delete(key).await.map_err(update_failed)?;
        }
        Ok(true)
    }

    /// Removes the marks of holds on a copy's snapshot that this state directory put there, or all; how many.
    pub(crate) async fn remove_holds(&self, id: &CopyId, of: Option<Uuid>) -> Result<usize, UpdateError> {
        let existing = self.bucket.existing(id).await.map_err(update_failed)?;
        let mut count = 0;
        for (_, key) in existing.holds.iter().filter(|(mark, _)| of.is_none_or(|of| of == mark.state)) {
            self.bucket.client.delete(key).await.map_err(update_failed)?;
            count += 1;
        }
        if let Some((manifest, _)) = existing.manifest.filter(|_| count == existing.holds.len())
            && self.bucket.rules().lock.is_some()
        {
            self.bucket.set_legal_hold(&manifest, false).await.map_err(update_failed)?;
        }
        Ok(count)
    }

    /// The unfinished uploads. How much of them is there is not listed.
    pub(crate) async fn leftovers(&self) -> Result<Vec<Leftover>, S3Error> {
        let uploads = self.bucket.our_uploads().await?.into_iter();
        let leftover = |(upload, is_useless): (UnfinishedUpload, bool)| Leftover {
            path: PathBuf::from(format!("{}{}", self.bucket.root(), upload.key)),
            bytes: None,
            is_useless,
        };
        Ok(uploads.map(leftover).collect())
    }

    /// Aborts the abandoned uploads, and returns them.
    pub(crate) async fn remove_leftovers(&self) -> Result<Vec<Leftover>, S3Error> {
        let mut leftovers = self.leftovers().await?;
        self.bucket.clean().await?;
        leftovers.retain(|leftover| leftover.is_useless);
        Ok(leftovers)
    }

    /// Deletes the manifest of a pruned copy of which no version is to be deleted any more: by its mark these are found.
    pub(crate) async fn forget_pruned(&self, copy: &StoredCopy) -> Result<(), UpdateError> {
        let key = self.bucket.image_key(&copy.manifest.id());
        if self.bucket.rules().noncurrent == Noncurrent::Delete
            && self.bucket.has_versions(&key).await.map_err(update_failed)?
        {
            return Err(UpdateError::Changed { image: self.bucket.client.shown(&key) });
        }
        self.forget_to_store_again(copy).await
    }

    /// Deletes the manifest of a pruned copy that is about to be stored again: its versions are found once that is pruned.
    pub(crate) async fn forget_to_store_again(&self, copy: &StoredCopy) -> Result<(), UpdateError> {
        let (bucket, client) = (&self.bucket, &self.bucket.client);
        let id = copy.manifest.id();
        let existing = bucket.existing(&id).await.map_err(update_failed)?;
        let is_same = existing.verified().is_some_and(|found| *found == *copy.manifest);
        if copy.manifest.pruned_at.is_none() || existing.image.is_some() || !is_same {
            return Err(UpdateError::Changed { image: client.shown(&bucket.image_key(&id)) });
        }
        client.delete(&bucket.md5_key(&id)).await.map_err(update_failed)?;
        for key in &existing.manifests {
            client.delete(key).await.map_err(update_failed)?;
        }
        Ok(())
    }
}

fn update_failed(error: S3Error) -> UpdateError {
    UpdateError::Archive(error.into_sink_error("update the manifest").into())
}

/// The key in a path that begins with `root`.
fn key_of<'a>(path: &'a Path, root: &str) -> Option<&'a str> {
    path.to_str()?.strip_prefix(root)
}

/// The image of a copy in a bucket, to be read like one of the service.
#[derive(Debug)]
pub struct StoredImage {
    bucket: Arc<Bucket>,
    key: String,
    /// Of which version.
    version_id: Option<Box<str>>,
    /// Its length.
    bytes: u64,
    md5: Md5Sum,
}

impl ImageSource for StoredImage {
    fn md5(&self) -> Option<String> {
        Some(self.md5.to_string())
    }

    /// A page of a proxy has another length.
    fn is_image(&self, length: Option<u64>) -> bool {
        length == Some(self.bytes)
    }

    fn open<'a>(
        &'a self,
        offset: u64,
        until: Option<u64>,
        etag: Option<&'a str>,
    ) -> BoxFuture<'a, Result<ImageStream, SourceError>> {
        Box::pin(async move {
            let client = &self.bucket.client;
            let version = self.version_id.as_deref();
            let mut opened = client.open((&self.key, version), offset, until, etag).await;
            if version.is_some() && opened.as_ref().is_err_and(S3Error::is_missing_version) {
                // In a bucket that was copied it is another: the MD5 says whether it is the same image.
                opened = client.open((&self.key, None), offset, until, etag).await;
            }
            let response = opened.map_err(source_error)?;
            ImageStream::from_response(response.status, &response.headers, response.body)
        })
    }
}

fn source_error(error: S3Error) -> SourceError {
    match error.status().map(|status| status.as_u16()) {
        Some(412 | 416) => SourceError::Changed,
        _ if error.cause.is_transient() => SourceError::Broken(Box::new(error)),
        _ => SourceError::Refused(Box::new(error)),
    }
}
