//! The archive in a bucket: its catalogue, new copies, and changes to those that are there.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _};
use secrecy::SecretString;

use crate::archive::catalogue::{self, Catalogue, ProblemKind, StoredCopy};
use crate::archive::layout::{self, CopyId, Role};
use crate::archive::manifest_update::{ManifestUpdate, UpdateError};
use crate::archive::marker::{
    MARKER_BYTES_MAX, MARKER_FILE, Marker, MarkerProblem, PROBE, PROBE_FILE, ProbeSteps, read_back,
};
use crate::archive::md5::Md5Sum;
use crate::archive::proof::VerifiedCopy;
use crate::archive::s3::bucket::{Bucket, ReadManifest};
use crate::archive::s3::client::{Client, S3Location};
use crate::archive::s3::error::{S3Cause, S3Error};
use crate::archive::s3::upload::S3Sink;
use crate::archive::s3::xml::{self, ListedObject};
use crate::archive::transfer::sink::{Begin, Output};
use crate::archive::transfer::source::{ImageSource, ImageStream, SourceError};
use crate::clock::Clock;
use crate::credentials::Credentials;
use crate::policy::name::ArchiveName;
use crate::randomness::Randomness;
use crate::text::chain;
use crate::transport::{BodyError, Transport};

/// Manifests that are read at once: a store answers each in some ten milliseconds, and there may be thousands.
const READERS: usize = 8;

/// What a bucket does with objects that are overwritten or deleted. Empty texts mean that it is off.
#[derive(Debug)]
pub(crate) struct BucketSettings {
    /// The status of its versioning: `Enabled` or `Suspended`.
    pub(crate) versioning: Result<String, S3Error>,
    /// How long, and how strictly, a new object is locked.
    pub(crate) object_lock: Result<String, S3Error>,
}

/// An archive in a bucket. Clones are one archive.
#[derive(Debug, Clone)]
pub struct S3Archive {
    pub(super) bucket: Arc<Bucket>,
    /// The manifests of the last listing, by key: one that has not changed since is not read again.
    manifests: Arc<Mutex<HashMap<String, ReadManifest>>>,
}

impl S3Archive {
    /// The archive `name` at `location`. Nothing is sent yet.
    pub fn new(
        name: ArchiveName,
        location: S3Location,
        credentials: Credentials,
        transport: Arc<dyn Transport>,
        clock: Arc<dyn Clock>,
        randomness: Arc<dyn Randomness>,
    ) -> Self {
        let client = Client::new(location, credentials, transport, clock, randomness);
        Self { bucket: Arc::new(Bucket::new(name, client)), manifests: Arc::default() }
    }

    /// The name in the configuration.
    pub fn name(&self) -> &ArchiveName {
        &self.bucket.name
    }

    /// The bucket and the prefix as people write them.
    pub fn place(&self) -> String {
        self.bucket.client.shown(self.bucket.prefix())
    }

    /// Reads the copies that are there.
    ///
    /// # Errors
    /// [`S3Error`] if the listing or a manifest can't be read: nothing is known of the archive then.
    pub async fn catalogue(&self) -> Result<Catalogue, S3Error> {
        let prefix = self.bucket.prefix();
        let (mut listed, mut images) = (Vec::new(), HashMap::new());
        let (marker_key, mut has_marker) = (self.marker_key(), false);
        let each = |object: ListedObject| {
            has_marker |= object.key == marker_key;
            // A store may list more than was asked for: other keys do not count.
            let path = object.key.strip_prefix(prefix).and_then(layout::read_path);
            match path.and_then(|(_, _, name)| Some(layout::read_name(name.as_ref())?.1)) {
                Some(Role::Image) => {
                    images.insert(object.key, object.bytes);
                }
                Some(Role::Manifest) => listed.push(object),
                None => {}
            }
        };
        self.bucket.client.list(each).await?;

        let marker = if has_marker { self.marker().await? } else { Ok(None) };

        let known = std::mem::take(&mut *self.manifests());
        let mut manifests = HashMap::new();
        let complete = self.read_manifests(listed, &known, &mut manifests).await;
        let catalogue = complete.map(|()| {
            let root = self.bucket.root();
            let path = PathBuf::from(format!("{root}{prefix}"));
            let keys = manifests.keys().chain(images.keys()).filter_map(|key| key.strip_prefix(prefix));
            catalogue::read_listed(self.name(), marker, &path, keys, |here| {
                let Some(read) = key_of(here, &root).and_then(|key| manifests.get(key)) else {
                    return Err(ProblemKind::Unreadable("it was deleted while it was listed".to_owned()));
                };
                let manifest = read.manifest.clone()?;
                let image_bytes =
                    |image: &Path| Ok(key_of(image, &root).and_then(|key| images.get(key)).copied());
                catalogue::check_copy(&path, here, &manifest, image_bytes)?;
                Ok(manifest)
            })
        });
        // After a failure, too: what was read before it need not be read again.
        *self.manifests() = manifests;
        catalogue
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

    /// Whether the bucket keeps what is overwritten and deleted in it, and whether it locks what is written.
    pub(crate) async fn bucket_settings(&self) -> BucketSettings {
        let client = &self.bucket.client;
        BucketSettings {
            versioning: client.setting("read the versioning of", "versioning", xml::versioning).await,
            object_lock: client.setting("read the object lock of", "object-lock", xml::object_lock).await,
        }
    }

    /// Reads the listed manifests, but for those in `known` that have the same `ETag`.
    async fn read_manifests(
        &self,
        listed: Vec<ListedObject>,
        known: &HashMap<String, ReadManifest>,
        manifests: &mut HashMap<String, ReadManifest>,
    ) -> Result<(), S3Error> {
        let mut reading = stream::iter(listed)
            .map(|object| {
                let known = known.get(&object.key);
                let same = known.filter(|known| !known.etag.is_empty() && known.etag == object.etag).cloned();
                async move {
                    let read = match same {
                        Some(same) => Some(same),
                        None => self.bucket.read_manifest(&object.key, object.bytes).await?,
                    };
                    // With the `ETag` as listings write it, since the next listing is compared with it.
                    let read = read.map(|read| ReadManifest { etag: object.etag, ..read });
                    Ok::<_, S3Error>((object.key, read))
                }
            })
            .buffer_unordered(READERS);
        while let Some(read) = reading.next().await {
            // `None`: it was deleted since it was listed.
            if let (key, Some(read)) = read? {
                manifests.insert(key, read);
            }
        }
        Ok(())
    }

    fn manifests(&self) -> MutexGuard<'_, HashMap<String, ReadManifest>> {
        self.manifests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to store an image, or finds that a verified copy of it is, or was, there already.
    ///
    /// # Errors
    /// [`S3Error`] if a request fails, or this process is storing the same image already.
    pub async fn begin(&self, id: &CopyId) -> Result<Begin, S3Error> {
        let bucket = &self.bucket;
        bucket.clean_once().await;
        let key = bucket.image_key(id);
        let image = bucket.client.shown(&key);
        let Some(lock) = bucket.lock(&key) else {
            return Err(S3Error::new("store", image, S3Cause::Busy));
        };
        let existing = bucket.existing(id).await?;
        if let Some(manifest) = &existing.verified {
            return Ok(Begin::Stored(VerifiedCopy::new(&bucket.name, manifest)));
        }
        bucket.abort_uploads_of(&key).await;
        let sink = S3Sink::new(Arc::clone(bucket), id.clone(), existing, lock);
        Ok(Begin::Missing(Output::new(bucket.name.clone(), image, Box::new(sink))))
    }

    /// Whether the copy still counts.
    pub(crate) async fn has(&self, copy: &StoredCopy) -> Result<bool, S3Error> {
        let found = self.bucket.existing(&copy.manifest.id()).await?.verified;
        Ok(found.is_some_and(|found| found.image == copy.manifest.image))
    }

    /// The image of a copy, to be read again or restored.
    pub fn image(&self, copy: &StoredCopy) -> StoredImage {
        let manifest = &copy.manifest;
        let key = self.bucket.image_key(&manifest.id());
        StoredImage { bucket: Arc::clone(&self.bucket), key, md5: manifest.image.md5 }
    }

    /// An address, itself a secret, at which anybody can read the image for `valid_for`, at most a week.
    pub fn presign_get(&self, copy: &StoredCopy, valid_for: Duration) -> SecretString {
        self.bucket.client.presign_get(&self.bucket.image_key(&copy.manifest.id()), valid_for)
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
        if existing.verified.as_ref() != Some(&copy.manifest) {
            return Err(UpdateError::Changed { image });
        }
        // The manifest is marked before the image is deleted: without its image and unmarked, the copy would not count any
        // more, and snapshots that need it could not be deleted.
        let manifest = update.apply(&copy.manifest).to_bytes();
        client.put(&bucket.manifest_key(&id), "application/json", manifest).await.map_err(update_failed)?;
        if let ManifestUpdate::Pruned(_) = update {
            client.delete(&key).await.map_err(update_failed)?;
            client.delete(&bucket.md5_key(&id)).await.map_err(update_failed)?;
        }
        Ok(())
    }

    /// Deletes the manifest of a pruned copy.
    pub(crate) async fn forget_pruned(&self, copy: &StoredCopy) -> Result<(), UpdateError> {
        let (bucket, client) = (&self.bucket, &self.bucket.client);
        let id = copy.manifest.id();
        let existing = bucket.existing(&id).await.map_err(update_failed)?;
        let is_same = existing.verified.as_ref() == Some(&copy.manifest);
        if copy.manifest.pruned_at.is_none() || existing.image.is_some() || !is_same {
            return Err(UpdateError::Changed { image: client.shown(&bucket.image_key(&id)) });
        }
        client.delete(&bucket.md5_key(&id)).await.map_err(update_failed)?;
        client.delete(&bucket.manifest_key(&id)).await.map_err(update_failed)
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
    md5: Md5Sum,
}

impl ImageSource for StoredImage {
    fn md5(&self) -> Option<String> {
        Some(self.md5.to_string())
    }

    fn open<'a>(
        &'a self,
        offset: u64,
        until: Option<u64>,
        etag: Option<&'a str>,
    ) -> BoxFuture<'a, Result<ImageStream, SourceError>> {
        Box::pin(async move {
            let opened = self.bucket.client.open(&self.key, offset, until, etag).await;
            let response = opened.map_err(source_error)?;
            ImageStream::from_response(response.status, &response.headers, response.body)
        })
    }

    /// Nothing to do: every request is signed anew.
    fn renew(&self) -> BoxFuture<'_, Result<(), SourceError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

fn source_error(error: S3Error) -> SourceError {
    match error.status().map(|status| status.as_u16()) {
        Some(412 | 416) => SourceError::Changed,
        _ if error.cause.is_transient() => SourceError::Broken(Box::new(error)),
        _ => SourceError::Refused(Box::new(error)),
    }
}
