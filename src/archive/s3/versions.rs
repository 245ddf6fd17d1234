//! What a bucket keeps beside its objects: earlier versions, what hides them, and locks.
//!
//! Where a bucket keeps versions, deleting hides an object by a delete marker, and its bytes stay as a noncurrent version. A lock
//! is on one version: it cannot be deleted before its time, but anybody who may write can still hide it, or store another one
//! above it. So a manifest names the version of its image.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;

use crate::archive::catalogue::StoredCopy;
use crate::archive::layout::{self, Mark, Role};
use crate::archive::marker::{PROBE, PROBE_FILE, ProbeSteps};
use crate::archive::s3::archive::S3Archive;
use crate::archive::s3::error::{S3Cause, S3Error};
use crate::archive::s3::xml::{self, ListedVersion};
use crate::policy::bucket::{LockMode, LockRule, Noncurrent};
use crate::text::chain;

/// How long the probe is locked: as short as a store takes it, and longer than the attempts to break it.
const PROBE_LOCK: Duration = Duration::from_mins(1);

/// After this, a rule of the bucket deletes noncurrent versions, where nothing is locked for longer.
const RULE_DAYS: u64 = 30;

/// What a bucket does with objects that are overwritten or deleted. Empty texts mean that it is off.
#[derive(Debug)]
pub(crate) struct BucketSettings {
    /// The status of its versioning: `Enabled` or `Suspended`.
    pub(crate) versioning: Result<String, S3Error>,
    /// How long, and how strictly, a new object is locked.
    pub(crate) object_lock: Result<String, S3Error>,
}

impl BucketSettings {
    /// Whether what is deleted stays as a noncurrent version.
    pub(crate) fn keeps_versions(&self) -> bool {
        self.versioning.as_ref().is_ok_and(|status| status == "Enabled")
    }
}

/// What an archive's bucket keeps beside the objects that are there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Versions {
    /// Noncurrent versions of files of the archive.
    pub(crate) count: u64,
    /// The length of all these.
    pub(crate) bytes: u64,
    /// The images that are hidden by a delete marker, although the archive's retention did not delete them.
    pub(crate) hidden: Vec<PathBuf>,
    /// The length of the versions that are left of the images that were asked for.
    pub(crate) left_bytes: u64,
    /// The keys of images that are marked as pruned, with the versions that are left of them: some have bytes.
    deleted: BTreeMap<String, Vec<ListedVersion>>,
}

impl S3Archive {
    /// Whether the bucket keeps what is overwritten and deleted in it, and whether it locks what is written.
    pub(crate) async fn bucket_settings(&self) -> BucketSettings {
        let client = &self.bucket.client;
        BucketSettings {
            versioning: client.setting("read the versioning of", "versioning", xml::versioning).await,
            object_lock: client.setting("read the object lock of", "object-lock", xml::object_lock).await,
        }
    }

    /// What the bucket keeps beside the objects; none where it keeps no versions. `asked` are copies of which it is to be said
    /// how much is left.
    ///
    /// # Errors
    /// [`S3Error`] if it can't be listed.
    pub(crate) async fn versions(&self, asked: &[&StoredCopy]) -> Result<Option<Versions>, S3Error> {
        let (client, prefix) = (&self.bucket.client, self.bucket.prefix());
        if client.setting("read the versioning of", "versioning", xml::versioning).await?.is_empty() {
            return Ok(None);
        }
        let asked: HashSet<String> =
            asked.iter().map(|copy| self.bucket.image_key(&copy.manifest.id())).collect();
        let (mut versions, mut deleted) =
            (Versions::default(), BTreeMap::<String, Vec<ListedVersion>>::new());
        // By the beginning of a copy's keys: whose manifest is, or ever was, marked; and is marked as pruned now.
        let (mut marked, mut pruned) = (HashSet::new(), HashSet::new());
        client
            .list_versions(prefix, |version| {
                let path = version.key.strip_prefix(prefix).and_then(layout::read_path);
                let Some((stem, role)) = path.and_then(|(_, _, name)| {
                    let (stem, role) = layout::read_name(name.as_ref())?;
                    Some((version.key.rsplit_once('/')?.0.to_owned() + "/" + stem, role))
                }) else {
                    return;
                };
                if let Some(bytes) = version.bytes.filter(|_| !version.is_latest) {
                    versions.count += 1;
                    versions.bytes += bytes;
                }
                match role {
                    Role::Manifest(Some(mark)) => {
                        let is_there = version.is_latest && version.bytes.is_some();
                        if mark == Mark::Pruned && is_there {
                            pruned.insert(stem.clone());
                        }
                        marked.insert(stem);
                    }
                    Role::Image => {
                        if asked.contains(&version.key) {
                            versions.left_bytes += version.bytes.unwrap_or_default();
                        }
                        // In whichever order they come: some stores list all markers last.
                        if !version.is_latest || version.bytes.is_none() {
                            deleted.entry(version.key.clone()).or_default().push(version);
                        }
                    }
                    Role::Manifest(None) | Role::Hold(_) => {}
                }
            })
            .await?;
        let stem_of = |key: &str| key.strip_suffix(".qcow2").unwrap_or(key).to_owned();
        let root = self.bucket.root();
        for (key, of_key) in deleted {
            let is_hidden = of_key.iter().any(|one| one.is_latest && one.bytes.is_none());
            let has_bytes = of_key.iter().any(|one| one.bytes.is_some());
            if !is_hidden || !has_bytes {
                continue;
            }
            let stem = stem_of(&key);
            if !marked.contains(&stem) {
                versions.hidden.push(PathBuf::from(format!("{root}{key}")));
            }
            // A mark that is not there any more may have been taken back: what another hid since is not for us to delete.
            if pruned.contains(&stem) {
                versions.deleted.insert(key, of_key);
            }
        }
        Ok(Some(versions))
    }

    /// Deletes the versions of images that are marked as pruned, where the archive's `noncurrent` says so; those that are
    /// still locked stay for a later time.
    ///
    /// # Errors
    /// [`S3Error`] if they can't be listed, or one can't be deleted for another reason than a lock.
    pub(crate) async fn delete_noncurrent(&self) -> Result<(), S3Error> {
        let client = &self.bucket.client;
        if !self.deletes_noncurrent() {
            return Ok(());
        }
        let Some(versions) = self.versions(&[]).await? else { return Ok(()) };
        for (key, versions) in versions.deleted {
            let (bytes, markers): (Vec<_>, Vec<_>) =
                versions.into_iter().partition(|version| version.bytes.is_some());
            let mut is_locked = false;
            for version in bytes {
                match client.delete_version(&key, &version.id, false).await {
                    Ok(()) => {}
                    Err(error) if error.is_refusal() => {
                        tracing::debug!("a noncurrent version stays: {}", chain(&error));
                        is_locked = true;
                    }
                    Err(error) => return Err(error),
                }
            }
            // What they hid is deleted: until then a marker must not go, or the image would be there again.
            for version in markers.into_iter().filter(|_| !is_locked) {
                client.delete_version(&key, &version.id, false).await?;
            }
        }
        Ok(())
    }

    /// The rule of the bucket that deletes what pruning leaves, in the form that `put-bucket-lifecycle-configuration` takes.
    pub(crate) fn lifecycle_rule(&self, now: Timestamp) -> String {
        let locked =
            self.lock_until(now).map_or(Duration::ZERO, |until| until.duration_since(now).unsigned_abs());
        // What is locked for longer is not deleted before.
        let days = RULE_DAYS.max(locked.as_secs().div_ceil(24 * 60 * 60));
        let prefix = self.bucket.prefix();
        format!(
            "{{\"Rules\": [{{\"ID\": \"snapwarden\", \"Status\": \"Enabled\", \"Filter\": {{\"Prefix\": \"{prefix}\"}}, \
             \"NoncurrentVersionExpiration\": {{\"NoncurrentDays\": {days}}}, \
             \"Expiration\": {{\"ExpiredObjectDeleteMarker\": true}}}}]}}"
        )
    }

    /// Whether pruning deletes noncurrent versions, too.
    pub(crate) fn deletes_noncurrent(&self) -> bool {
        self.bucket.rules().noncurrent == Noncurrent::Delete
    }

    /// Until when what is kept now is locked; none where nothing is.
    pub(crate) fn lock_until(&self, now: Timestamp) -> Option<Timestamp> {
        self.bucket.rules().lock.as_ref().map(|rule| rule.until(now))
    }

    /// Locks the image of a copy and its manifest at least until then. What is locked for longer stays so.
    ///
    /// # Errors
    /// [`S3Error`]: one of them may be locked by then.
    pub(crate) async fn lock_copy(&self, copy: &StoredCopy, until: Timestamp) -> Result<(), S3Error> {
        let bucket = &self.bucket;
        let Some(LockRule { mode, .. }) = bucket.rules().lock else { return Ok(()) };
        let id = copy.manifest.id();
        let manifest = bucket.manifest_key(&id, copy.manifest.mark());
        let image = (bucket.image_key(&id), copy.manifest.image.version_id.as_deref());
        // The image first: a manifest without one is nothing.
        for (key, version) in [image, (manifest, None)] {
            let Some(found) = bucket.client.head_version(&key, version).await? else {
                let gone = S3Cause::Differs("it is not there any more".to_owned());
                return Err(S3Error::new("lock", bucket.client.shown(&key), gone));
            };
            if found.locked_until.is_none_or(|locked| locked < until) {
                let version = found.version_id.as_deref();
                bucket.client.set_retention(&key, version, (mode, until), false).await?;
            }
        }
        Ok(())
    }

    /// Puts a legal hold on a copy, or removes it.
    ///
    /// # Errors
    /// [`S3Error`].
    pub(crate) async fn set_legal_hold(&self, copy: &StoredCopy, is_on: bool) -> Result<(), S3Error> {
        self.bucket.set_legal_hold(&copy.manifest, is_on).await
    }

    /// Locks a small object for a minute, and tries to break the lock in every way that this archive's key has. None where
    /// nothing is locked.
    pub(crate) async fn probe_lock(&self) -> Option<ProbeSteps> {
        let mode = self.bucket.rules().lock.as_ref()?.mode;
        let (client, key) = (&self.bucket.client, format!("{}{PROBE_FILE}", self.bucket.prefix()));
        self.delete_probes().await;
        let now = client.clock.now();
        let until = |time: Duration| now.checked_add(time).unwrap_or(now);
        let (whole, half) = (until(PROBE_LOCK), until(PROBE_LOCK / 2));

        let written = client.put_locked(&key, PROBE.to_vec(), mode, whole).await;
        let version = match written {
            Ok(Some(version)) => version,
            Ok(None) => {
                let why = "the bucket keeps no versions, so nothing in it can be locked: an object lock is switched on where a \
                           bucket is made";
                return Some(vec![("lock", Some(why.to_owned()))]);
            }
            Err(error) => return Some(vec![("lock", Some(chain(&error)))]),
        };
        let shown = client.head_version(&key, Some(&version)).await;
        let lock = match shown.map(|head| head.and_then(|head| head.locked_until)) {
            Ok(Some(locked)) if locked >= half => None,
            Ok(_) => Some("the store took the lock, and does not show it".to_owned()),
            Err(error) => Some(chain(&error)),
        };
        let attempts = [
            ("shorten it", client.set_retention(&key, Some(&version), (mode, half), false).await),
            ("shorten it by a bypass", client.set_retention(&key, Some(&version), (mode, half), true).await),
            ("delete what is locked", client.delete_version(&key, &version, false).await),
            ("delete what is locked by a bypass", client.delete_version(&key, &version, true).await),
        ];
        let broken = broken_text(mode, &attempts);
        // It hides the version, which stays for its minute.
        let hidden = client.delete(&key).await.err().map(|error| chain(&error));
        Some(vec![("lock", lock.or(hidden)), ("keep the lock", broken)])
    }

    /// Deletes what earlier probes left, as far as that can be done: what stays is small.
    async fn delete_probes(&self) {
        let (client, key) = (&self.bucket.client, format!("{}{PROBE_FILE}", self.bucket.prefix()));
        let mut versions = Vec::new();
        let each = |version: ListedVersion| versions.extend((version.key == key).then_some(version.id));
        // Where it can't be listed, the locks are tried all the same.
        let _ = client.list_versions(&key, each).await;
        for version in versions {
            // The newest may still be locked.
            let _ = client.delete_version(&key, &version, false).await;
        }
    }
}

/// Which attempts at a lock succeeded, or are not known to have failed.
fn broken_text(mode: LockMode, attempts: &[(&str, Result<(), S3Error>)]) -> Option<String> {
    let done: Vec<&str> =
        attempts.iter().filter(|(_, done)| done.is_ok()).map(|(attempt, _)| *attempt).collect();
    if !done.is_empty() {
        let way_out = match mode {
            LockMode::Governance => {
                "take `s3:BypassGovernanceRetention` from its role, or set `lock_mode = \"compliance\"`"
            }
            LockMode::Compliance => "this store does not enforce locks",
        };
        return Some(format!("whoever has this key can break a lock ({}): {way_out}", done.join(", ")));
    }
    attempts.iter().find_map(|(attempt, done)| {
        let error = done.as_ref().err().filter(|error| !error.is_refusal())?;
        Some(format!("whether this key can {attempt} is not known: {}", chain(error)))
    })
}
