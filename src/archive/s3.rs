//! An archive in a bucket of any store that speaks S3.
//!
//! The keys are those of a local archive's files, below the archive's prefix. An image is uploaded in parts while it
//! comes in (`upload`) and can be seen only once it is proved; its manifest is written last. Abandoned uploads are
//! given back when the archive is next used. What the bucket holds is read from its listing and its manifests by the
//! same rules as a folder; what can't be read whole is an error, never a short list, so that nothing is deleted for it.
//!
//! [`client`] speaks with the store: `sign` signs, `answer` reads. It is a client of our own, over the seams of
//! transport, clock and randomness, because the crates for it bring an HTTP client, a clock and retries of their own,
//! and none lists abandoned uploads.

mod answer;
pub mod client;
pub mod credentials;
mod sign;
mod upload;

use std::collections::{HashMap, HashSet};
use std::fmt::{self, Debug};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _};
use jiff::{SignedDuration, Timestamp};
use secrecy::SecretString;
use tokio::sync::OnceCell;

use crate::archive::catalogue::{self, Catalogue, Files, ProblemKind, StoredCopy};
use crate::archive::layout::{self, CopyId, CopyPaths, Role};
use crate::archive::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::archive::manifest_update::{ManifestUpdate, UpdateError};
use crate::archive::md5::Md5Sum;
use crate::archive::proof::VerifiedCopy;
use crate::archive::s3::client::{Client, Fault, Head, S3Error, S3Place};
use crate::archive::s3::credentials::S3Credentials;
use crate::archive::s3::upload::S3Sink;
use crate::archive::transfer::sink::{Begin, Output};
use crate::archive::transfer::source::{ImageSource, ImageStream, SourceError};
use crate::clock::Clock;
use crate::policy::ArchiveName;
use crate::randomness::Randomness;
use crate::text::chain;
use crate::transport::{BodyError, Transport};

/// So many manifests are read at once: stores answer each in some ten milliseconds, and there may be thousands.
const READERS: usize = 8;

/// An upload that began so long ago, and that nobody here is at, is nobody's any more. Another process may be at a
/// younger one.
const ABANDONED_AFTER: SignedDuration = SignedDuration::from_hours(48);

/// An archive in a bucket. Clones are one archive.
#[derive(Debug, Clone)]
pub struct S3Archive {
    name: ArchiveName,
    client: Arc<Client>,
    shared: Arc<Shared>,
}

/// What a manifest says.
#[derive(Debug, Clone)]
struct Read {
    /// Of the object; empty where it is not told.
    etag: String,
    said: Result<Manifest, ProblemKind>,
}

/// By key.
type Manifests = HashMap<String, Read>;

/// What all that use the archive in this process know of it.
#[derive(Default)]
struct Shared {
    /// As they were when the archive was last listed: what did not change is not read again.
    manifests: Mutex<Manifests>,
    work: Mutex<Work>,
    /// Whether what an earlier process abandoned was looked for.
    cleaned: OnceCell<()>,
}

impl Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Work {
    /// The keys of images that are being uploaded.
    busy: HashSet<String>,
    /// Uploads that ended without being given back, by key and id.
    left: Vec<(String, String)>,
}

impl Shared {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whoever has it is alone at an image, in this process.
struct Busy {
    key: String,
    shared: Arc<Shared>,
}

impl Busy {
    fn take(key: &str, shared: &Arc<Shared>) -> Option<Self> {
        let is_free = shared.work().busy.insert(key.to_owned());
        is_free.then(|| Self { key: key.to_owned(), shared: Arc::clone(shared) })
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.shared.work().busy.remove(&self.key);
    }
}

/// The keys of one copy.
#[derive(Debug, Clone)]
struct Keys {
    image: String,
    manifest: String,
    md5: String,
    /// The image's name without its folder.
    file: String,
}

/// What a bucket was seen to hold, as the judge of an archive asks for it.
struct Seen<'a> {
    /// What stands before a key in a path that people see.
    root: String,
    manifests: &'a Manifests,
    images: &'a HashMap<String, u64>,
}

impl Seen<'_> {
    fn key<'p>(&self, path: &'p Path) -> &'p str {
        path.to_str().and_then(|path| path.strip_prefix(&*self.root)).unwrap_or_default()
    }
}

impl Files for Seen<'_> {
    fn manifest(&self, path: &Path) -> Result<Manifest, ProblemKind> {
        match self.manifests.get(self.key(path)) {
            Some(read) => read.said.clone(),
            None => Err(ProblemKind::Unreadable("it went away while it was listed".to_owned())),
        }
    }

    fn image_bytes(&self, path: &Path) -> Result<Option<u64>, ProblemKind> {
        Ok(self.images.get(self.key(path)).copied())
    }
}

impl S3Archive {
    /// The archive `name` at `place`. Nothing is asked yet.
    pub fn new(
        name: ArchiveName,
        place: S3Place,
        credentials: S3Credentials,
        transport: Arc<dyn Transport>,
        clock: Arc<dyn Clock>,
        randomness: Arc<dyn Randomness>,
    ) -> Self {
        let client = Arc::new(Client::new(place, credentials, transport, clock, randomness));
        Self { name, client, shared: Arc::default() }
    }

    /// Its name.
    pub fn name(&self) -> &ArchiveName {
        &self.name
    }

    /// Where it is, for people.
    pub fn place(&self) -> String {
        self.client.shown(&self.client.place.prefix)
    }

    fn root(&self) -> String {
        format!("s3://{}/", self.client.place.bucket)
    }

    fn keys(&self, of: &CopyId) -> Keys {
        let prefix = Path::new(&self.client.place.prefix);
        let place = CopyPaths::new(prefix, of);
        let key = |path: PathBuf| path.to_string_lossy().into_owned();
        Keys {
            image: key(place.image()),
            manifest: key(place.manifest()),
            md5: key(place.md5()),
            file: place.image_name(),
        }
    }

    /// What is there.
    ///
    /// # Errors
    /// [`S3Error`] if the listing or a manifest can't be had: nothing is known of the archive then.
    pub async fn catalogue(&self) -> Result<Catalogue, S3Error> {
        let prefix = &*self.client.place.prefix;
        let (mut listed, mut images) = (Vec::new(), HashMap::new());
        let each = |object: answer::Listed| {
            // A store that lists what was not asked for is not listened to.
            let path = object.key.strip_prefix(prefix).and_then(layout::read_path);
            match path.and_then(|(_, _, name)| Some(layout::read_name(name.as_ref())?.1)) {
                Some(Role::Image) => {
                    images.insert(object.key, object.bytes);
                }
                Some(Role::Manifest) => listed.push(object),
                None => {}
            }
        };
        self.client.list(each).await?;

        let known = std::mem::take(&mut *self.manifests());
        let mut reading = stream::iter(listed)
            .map(|object| {
                let known = known.get(&object.key);
                let same = known.filter(|known| !known.etag.is_empty() && known.etag == object.etag).cloned();
                async move {
                    let read = match same {
                        Some(same) => Some(same),
                        None => self.read_manifest(&object.key, object.bytes).await?,
                    };
                    // By what the next listing will say, should it say it in another way.
                    let read = read.map(|read| Read { etag: object.etag, ..read });
                    Ok::<_, S3Error>((object.key, read))
                }
            })
            .buffer_unordered(READERS);
        let mut manifests = HashMap::new();
        let mut failure = None;
        while let Some(read) = reading.next().await {
            match read {
                Ok((key, Some(read))) => {
                    manifests.insert(key, read);
                }
                // It went away since it was listed.
                Ok((_, None)) => {}
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        drop(reading);
        let found = failure.map_or(Ok(()), Err).map(|()| {
            let root = self.root();
            let path = PathBuf::from(format!("{root}{prefix}"));
            let files = Seen { root, manifests: &manifests, images: &images };
            let keys = manifests.keys().chain(images.keys()).filter_map(|key| key.strip_prefix(prefix));
            catalogue::read_listed(&files, &self.name, &path, keys)
        });
        // Also what was read before something failed is not read again.
        *self.manifests() = manifests;
        found
    }

    fn manifests(&self) -> MutexGuard<'_, Manifests> {
        self.shared.manifests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a manifest; `None` if there is none.
    async fn read_manifest(&self, key: &str, bytes: u64) -> Result<Option<Read>, S3Error> {
        let too_long = || {
            let said = Err(ProblemKind::Unreadable("it is too long".to_owned()));
            Ok(Some(Read { etag: String::new(), said }))
        };
        if bytes > MANIFEST_BYTES_MAX {
            return too_long();
        }
        match self.client.get(key, usize::try_from(MANIFEST_BYTES_MAX).unwrap_or(usize::MAX)).await {
            Ok(found) => Ok(found.map(|(bytes, etag)| Read { etag, said: catalogue::read_manifest(&bytes) })),
            Err(S3Error { fault: Fault::Body(BodyError::TooLong { .. }), .. }) => too_long(),
            Err(error) => Err(error),
        }
    }

    /// Begins with an image, or finds that a good copy of it is, or was, there already.
    ///
    /// # Errors
    /// [`S3Error`] if the store can't be asked, or this process is at the same image already.
    pub async fn begin(&self, of: &CopyId) -> Result<Begin, S3Error> {
        self.shared.cleaned.get_or_init(|| self.clean_quietly()).await;
        let keys = self.keys(of);
        let image = self.client.shown(&keys.image);
        let Some(busy) = Busy::take(&keys.image, &self.shared) else {
            return Err(S3Error::new("store", image, Fault::Busy));
        };
        let before = match self.look(of, &keys).await? {
            (Some(manifest), _) => return Ok(Begin::Stored(VerifiedCopy::new(&self.name, &manifest))),
            (None, before) => before,
        };
        self.give_back(&keys.image).await;
        let sink = S3Sink::new(self.clone(), of.clone(), keys, before, busy);
        Ok(Begin::Missing(Output::new(self.name.clone(), image, Box::new(sink))))
    }

    /// The manifest of the copy that counts, and what is known of its image.
    async fn look(&self, of: &CopyId, keys: &Keys) -> Result<(Option<Manifest>, Before), S3Error> {
        let manifest = self.read_manifest(&keys.manifest, 0).await?;
        let image = self.client.head(&keys.image).await?;
        let before = Before { has_manifest: manifest.is_some(), image };
        let Some(Read { said: Ok(manifest), .. }) = manifest else { return Ok((None, before)) };
        let length = before.image.as_ref().and_then(|image| image.bytes);
        let images = length.map(|bytes| (keys.image.clone(), bytes)).into_iter().collect();
        let files = Seen { root: self.root(), manifests: &Manifests::new(), images: &images };
        let root = PathBuf::from(format!("{}{}", self.root(), self.client.place.prefix));
        let here = CopyPaths::new(&root, of).manifest();
        let counts = catalogue::check_copy(&files, &root, &here, &manifest);
        Ok((counts.is_ok().then_some(manifest), before))
    }

    /// Gives back what earlier uploads to this key left: whoever calls this is alone at it.
    async fn give_back(&self, key: &str) {
        let given = async {
            for upload in self.client.list_uploads(key).await?.unwrap_or_default() {
                if upload.key == key {
                    self.client.abort(key, &upload.id).await?;
                }
            }
            Ok::<(), S3Error>(())
        };
        // They cost money, but are in nobody's way.
        if let Err(error) = given.await {
            warn_of_leftovers(&self.name, &error);
        }
    }

    async fn clean_quietly(&self) {
        if let Err(error) = self.clean().await {
            warn_of_leftovers(&self.name, &error);
        }
    }

    /// Gives back the parts of uploads that were abandoned, by this process or an earlier one; how many. What began
    /// within the last two days may be at work elsewhere, and is left. Nor is anything found where a store can't list
    /// its uploads: there a rule of the bucket has to remove them.
    ///
    /// # Errors
    /// [`S3Error`]; what could not be given back is tried again by the next call.
    pub async fn clean(&self) -> Result<usize, S3Error> {
        let mut count = 0;
        loop {
            let Some((key, id)) = self.shared.work().left.last().cloned() else { break };
            count += usize::from(self.client.abort(&key, &id).await?);
            self.shared.work().left.retain(|(_, other)| *other != id);
        }
        let prefix = &*self.client.place.prefix;
        let old = self.client.clock.now().checked_sub(ABANDONED_AFTER).unwrap_or(Timestamp::MIN);
        for upload in self.client.list_uploads(prefix).await?.unwrap_or_default() {
            let path = upload.key.strip_prefix(prefix).and_then(layout::read_path);
            let is_ours = path.is_some_and(|(_, _, name)| {
                layout::read_name(name.as_ref()).is_some_and(|(_, role)| role == Role::Image)
            });
            let began = upload.initiated.and_then(|time| time.parse::<Timestamp>().ok());
            let is_old = began.is_some_and(|began| began < old);
            if is_ours && is_old && !self.shared.work().busy.contains(&upload.key) {
                count += usize::from(self.client.abort(&upload.key, &upload.id).await?);
            }
        }
        Ok(count)
    }

    /// The bytes of a copy, for reading it again and for bringing it back.
    pub fn image(&self, copy: &StoredCopy) -> StoredImage {
        let manifest = &copy.manifest;
        StoredImage {
            client: Arc::clone(&self.client),
            key: self.keys(&manifest.id()).image,
            md5: manifest.image.md5,
        }
    }

    /// An address at which anybody can read the image for so long, at most a week: a secret.
    pub fn presign_get(&self, copy: &StoredCopy, good_for: Duration) -> SecretString {
        self.client.presign_get(&self.keys(&copy.manifest.id()).image, good_for)
    }

    /// Writes what is now known of a copy: when it was proved again, or since when it is corrupt.
    ///
    /// # Errors
    /// [`S3Error`]: the old manifest is there, or the new one.
    pub async fn write_manifest(&self, manifest: &Manifest) -> Result<(), S3Error> {
        let key = self.keys(&manifest.id()).manifest;
        self.client.put(&key, "application/json", manifest.to_bytes()).await
    }

    /// Writes down what became of a copy, and removes the image of one that is pruned. No store locks anything, so another
    /// process may come between the look and the writing; then at worst a copy does not count that could.
    pub(super) async fn update_manifest(
        &self,
        copy: &StoredCopy,
        what: ManifestUpdate,
    ) -> Result<(), UpdateError> {
        let of = copy.manifest.id();
        let keys = self.keys(&of);
        let image = self.client.shown(&keys.image);
        let Some(_busy) = Busy::take(&keys.image, &self.shared) else {
            return Err(UpdateError::Busy { image });
        };
        let refused = |error: S3Error| UpdateError::Archive(error.into());
        let (found, _) = self.look(&of, &keys).await.map_err(refused)?;
        if found.as_ref() != Some(&copy.manifest) {
            return Err(UpdateError::Changed { image });
        }
        match what {
            ManifestUpdate::Pruned(at) => self.delete_image(copy, at).await.map(drop),
            ManifestUpdate::Verified(_) | ManifestUpdate::Corrupt(_) => {
                self.write_manifest(&what.apply(&copy.manifest)).await
            }
        }
        .map_err(refused)
    }

    /// Removes the image of a copy and leaves its manifest, marked as pruned; the new manifest.
    ///
    /// # Errors
    /// [`S3Error`]: either nothing changed, or the manifest is marked, and the image may still be there.
    pub async fn delete_image(&self, copy: &StoredCopy, at: Timestamp) -> Result<Manifest, S3Error> {
        let manifest = ManifestUpdate::Pruned(at).apply(&copy.manifest);
        // First what the gate needs: without its image and unmarked, the copy would not count any more.
        self.write_manifest(&manifest).await?;
        let keys = self.keys(&manifest.id());
        self.client.delete(&keys.image).await?;
        self.client.delete(&keys.md5).await?;
        Ok(manifest)
    }
}

fn warn_of_leftovers(archive: &ArchiveName, error: &S3Error) {
    tracing::warn!(
        archive = %archive,
        "archive {archive}: parts of abandoned uploads may be left in the bucket, and cost: {}",
        chain(error)
    );
}

/// What stood under the names of a copy before it was uploaded.
struct Before {
    has_manifest: bool,
    image: Option<Head>,
}

/// The image of a copy in a bucket, to be read like one of the service.
#[derive(Debug)]
pub struct StoredImage {
    client: Arc<Client>,
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
            let answer = self.client.open(&self.key, offset, until, etag).await.map_err(as_source_error)?;
            let body = answer.rest.unwrap_or_else(|| Box::pin(stream::empty()));
            ImageStream::from_response(answer.status, &answer.headers, body)
        })
    }

    /// It is signed anew whenever it is opened.
    fn renew(&self) -> BoxFuture<'_, Result<(), SourceError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

fn as_source_error(error: S3Error) -> SourceError {
    match error.status().map(|status| status.as_u16()) {
        Some(412 | 416) => SourceError::Changed,
        _ if error.fault.may_pass() => SourceError::Broken(Box::new(error)),
        _ => SourceError::Refused(Box::new(error)),
    }
}

#[cfg(test)]
mod tests;
