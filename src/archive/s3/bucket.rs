//! The bucket as the archive and its uploads share it: the objects of a copy, and the uploads of this process.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};

use crate::archive::catalogue::{self, ProblemKind};
use crate::archive::layout::{self, CopyPaths, HoldMark, Mark, Role};
use crate::archive::manifest::{MANIFEST_BYTES_MAX, Manifest};
use crate::archive::s3::client::{Client, Head};
use crate::archive::s3::error::{S3Cause, S3Error};
use crate::archive::s3::xml::{ListedVersion, UnfinishedUpload};
use crate::copies::CopyId;
use crate::policy::bucket::BucketRules;
use crate::policy::name::ArchiveName;
use crate::text::chain;
use crate::transport::BodyError;

/// An unfinished upload of this age, that this process does not work on, is abandoned. A younger one may belong to
/// another process: an upload of 4 TiB, the largest object, takes less at 25 MiB/s.
const ABANDONED_AFTER: SignedDuration = SignedDuration::from_hours(48);

/// Abandoned uploads are looked for so often.
const DAY: Duration = Duration::from_hours(24);

/// The bucket of an archive.
#[derive(Debug)]
pub(super) struct Bucket {
    pub(super) name: ArchiveName,
    pub(super) client: Client,
    uploads: Mutex<Uploads>,
    /// When abandoned uploads were last looked for.
    cleaned: tokio::sync::Mutex<Option<Timestamp>>,
}

/// The uploads of this process.
#[derive(Debug, Default)]
struct Uploads {
    /// The keys of images that are being stored or changed.
    locked: HashSet<String>,
    /// Uploads that ended and could not be aborted, by key and id.
    left_behind: Vec<(String, String)>,
}

/// Excludes all other work of this process on one image. Dropping it ends that.
pub(super) struct ImageLock {
    key: String,
    bucket: Arc<Bucket>,
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        self.bucket.uploads().locked.remove(&self.key);
    }
}

/// The objects that have the names of a copy.
pub(super) struct ExistingCopy {
    /// The manifest with its bytes, if it is valid.
    pub(super) manifest: Option<(Manifest, Bytes)>,
    /// Whether the copy counts.
    pub(super) counts: bool,
    /// The keys of all its manifests, in the order in which to delete them: one that is marked after the one that is not,
    /// which would count without it.
    pub(super) manifests: Vec<String>,
    pub(super) image: Option<Head>,
    /// The marks of holds on its snapshot, with their keys.
    pub(super) holds: Vec<(HoldMark, String)>,
}

impl ExistingCopy {
    /// The manifest, if the copy counts.
    pub(super) fn verified(&self) -> Option<&Manifest> {
        self.manifest.as_ref().filter(|_| self.counts).map(|(manifest, _)| manifest)
    }
}

impl Bucket {
    pub(super) fn new(name: ArchiveName, client: Client) -> Self {
        Self { name, client, uploads: Mutex::default(), cleaned: tokio::sync::Mutex::default() }
    }

    pub(super) fn prefix(&self) -> &str {
        &self.client.location.prefix
    }

    pub(super) fn rules(&self) -> &BucketRules {
        &self.client.location.rules
    }

    /// Puts a legal hold on a copy, or removes it.
    pub(super) async fn set_legal_hold(&self, manifest: &Manifest, is_on: bool) -> Result<(), S3Error> {
        let id = manifest.id();
        let image = (self.image_key(&id), manifest.image.version_id.as_deref());
        for (key, version) in [image, (self.manifest_key(&id, manifest.mark()), None)] {
            // What was pruned meanwhile needs no hold.
            let Some(found) = self.client.head_version(&key, version).await? else { continue };
            if found.has_legal_hold != is_on {
                self.client.set_legal_hold(&key, found.version_id.as_deref(), is_on).await?;
            }
        }
        Ok(())
    }

    /// Whether any bytes are left of an object that was deleted.
    pub(super) async fn has_versions(&self, key: &str) -> Result<bool, S3Error> {
        let mut has_versions = false;
        let each = |version: ListedVersion| has_versions |= version.key == key && version.bytes.is_some();
        let listed = self.client.list_versions(key, each).await;
        match listed {
            Err(error) if error.is_unsupported() => Ok(false),
            listed => listed.map(|()| has_versions),
        }
    }

    /// The beginning of all paths in a catalogue of this bucket, which is not part of the keys.
    pub(super) fn root(&self) -> String {
        format!("s3://{}/", self.client.location.bucket)
    }

    fn paths(&self, id: &CopyId) -> CopyPaths {
        CopyPaths::new(Path::new(self.prefix()), id)
    }

    pub(super) fn image_key(&self, id: &CopyId) -> String {
        key(&self.paths(id).image())
    }

    pub(super) fn manifest_key(&self, id: &CopyId, mark: Option<Mark>) -> String {
        key(&self.paths(id).manifest(mark))
    }

    pub(super) fn hold_key(&self, id: &CopyId, mark: &HoldMark) -> String {
        key(&self.paths(id).hold(mark))
    }

    /// The file name of an image, for the `.md5` beside it.
    pub(super) fn image_name(&self, id: &CopyId) -> String {
        self.paths(id).image_name()
    }

    pub(super) fn md5_key(&self, id: &CopyId) -> String {
        key(&self.paths(id).md5())
    }

    fn uploads(&self) -> MutexGuard<'_, Uploads> {
        self.uploads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks an image, unless this process works on it already. Other processes are not excluded: no store has locks.
    pub(super) fn lock(self: &Arc<Self>, image_key: &str) -> Option<ImageLock> {
        let is_free = self.uploads().locked.insert(image_key.to_owned());
        is_free.then(|| ImageLock { key: image_key.to_owned(), bucket: Arc::clone(self) })
    }

    /// The bytes of a manifest; `None` if there is none. `bytes` is its length by the listing, or 0.
    pub(super) async fn read_manifest(
        &self,
        key: &str,
        bytes: u64,
    ) -> Result<Option<Result<Bytes, ProblemKind>>, S3Error> {
        let too_long = || Ok(Some(Err(ProblemKind::Unreadable("it is too long".to_owned()))));
        if bytes > MANIFEST_BYTES_MAX {
            return too_long();
        }
        match self.client.get(key, usize::try_from(MANIFEST_BYTES_MAX).unwrap_or(usize::MAX)).await {
            Ok(found) => Ok(found.map(|(bytes, _)| Ok(bytes))),
            Err(S3Error { cause: S3Cause::Body(BodyError::TooLong { .. }), .. }) => too_long(),
            Err(error) => Err(error),
        }
    }

    /// Looks for the objects of a copy.
    pub(super) async fn existing(&self, id: &CopyId) -> Result<ExistingCopy, S3Error> {
        let names = self.paths(id).manifests();
        let mut listed: HashSet<String> = HashSet::new();
        let beginning = key(&self.paths(id).stem());
        self.client.list(&beginning, |object| listed.extend([object.key])).await?;
        let here = names.iter().find(|name| listed.contains(&key(name)));
        let read = match here {
            Some(here) => self.read_manifest(&key(here), 0).await?,
            None => None,
        };
        let image = self.client.head(&self.image_key(id)).await?;
        let manifest = here.zip(read).and_then(|(here, bytes)| {
            let bytes = bytes.ok()?;
            let manifest = catalogue::read_manifest(&bytes, Path::new(self.prefix()), here).ok()?;
            Some((manifest, bytes))
        });
        let image_bytes = || Ok(image.as_ref().and_then(|image| image.bytes));
        let counts = manifest
            .as_ref()
            .is_some_and(|(manifest, _)| catalogue::check_image(manifest, image_bytes).is_ok());
        let holds = listed.iter().filter_map(|key| hold_at(key)).collect();
        let manifests = names.iter().rev().map(|name| key(name)).filter(|key| listed.contains(key)).collect();
        Ok(ExistingCopy { manifest, counts, manifests, image, holds })
    }

    /// The marks of holds on a copy's snapshot, with their keys.
    pub(super) async fn holds_of(&self, id: &CopyId) -> Result<Vec<(HoldMark, String)>, S3Error> {
        let (beginning, mut holds) = (format!("{}.hold-", key(&self.paths(id).stem())), Vec::new());
        self.client.list(&beginning, |object| holds.extend(hold_at(&object.key))).await?;
        Ok(holds)
    }

    /// The unfinished uploads of this image, the newest first.
    pub(super) async fn uploads_of(&self, image_key: &str) -> Result<Vec<UnfinishedUpload>, S3Error> {
        let mut uploads = self.client.list_uploads(image_key).await?;
        uploads.retain(|upload| upload.key == image_key);
        uploads.sort_by_key(|upload| Reverse(began(upload)));
        Ok(uploads)
    }

    /// Looks for abandoned uploads when the archive is first used for storing, and once a day from then on.
    pub(super) async fn clean_daily(&self) {
        let (mut cleaned, now) = (self.cleaned.lock().await, self.client.clock.now());
        let is_due = |at: Timestamp| now.duration_since(at).unsigned_abs() >= DAY;
        if cleaned.is_none_or(is_due) {
            *cleaned = Some(now);
            // What is left costs money, but does not prevent another upload.
            if let Err(error) = self.clean().await {
                self.warn_of_leftovers(&error);
            }
        }
    }

    /// Aborts the uploads that were abandoned, by this process or an earlier one; how many. Those that began within the
    /// last two days may belong to another process, and are left. Where a store does not list its uploads, only those
    /// of this process are found, and a rule of the bucket has to remove the others.
    ///
    /// # Errors
    /// [`S3Error`]; what could not be aborted is tried again by the next call.
    pub(super) async fn clean(&self) -> Result<usize, S3Error> {
        let mut count = 0;
        loop {
            let Some((key, id)) = self.uploads().left_behind.last().cloned() else { break };
            count += usize::from(self.client.abort(&key, &id).await?);
            self.uploads().left_behind.retain(|(_, other)| *other != id);
        }
        for (upload, _) in self.our_uploads().await?.iter().filter(|(_, is_abandoned)| *is_abandoned) {
            count += usize::from(self.client.abort(&upload.key, &upload.id).await?);
        }
        Ok(count)
    }

    /// The unfinished uploads of images, each with whether it is abandoned.
    pub(super) async fn our_uploads(&self) -> Result<Vec<(UnfinishedUpload, bool)>, S3Error> {
        let old = self.client.clock.now().checked_sub(ABANDONED_AFTER).unwrap_or(Timestamp::MIN);
        let mut ours = Vec::new();
        for upload in self.client.list_uploads(self.prefix()).await? {
            let path = upload.key.strip_prefix(self.prefix()).and_then(layout::read_path);
            let is_ours = path.is_some_and(|(_, _, name)| {
                layout::read_name(name.as_ref()).is_some_and(|(_, role)| role == Role::Image)
            });
            let is_old = began(&upload).is_some_and(|began| began < old);
            if is_ours {
                let is_abandoned = is_old && !self.uploads().locked.contains(&upload.key);
                ours.push((upload, is_abandoned));
            }
        }
        Ok(ours)
    }

    /// Remembers an upload that ended and is not aborted, for [`Self::clean`].
    pub(super) fn leave_behind(&self, key: &str, id: String) {
        self.uploads().left_behind.push((key.to_owned(), id));
    }

    pub(super) fn warn_of_leftovers(&self, error: &S3Error) {
        tracing::warn!(
            archive = %self.name,
            "archive {}: parts of abandoned uploads may be left in the bucket, and cost: {}",
            self.name,
            chain(error)
        );
    }
}

fn began(upload: &UnfinishedUpload) -> Option<Timestamp> {
    upload.initiated.as_ref()?.parse().ok()
}

fn hold_at(key: &str) -> Option<(HoldMark, String)> {
    match layout::read_name(Path::new(key).file_name()?)? {
        (_, Role::Hold(mark)) => Some((mark, key.to_owned())),
        _ => None,
    }
}

fn key(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
