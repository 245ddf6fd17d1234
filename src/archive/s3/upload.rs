//! An image on its way into a bucket.
//!
//! Its bytes are gathered to parts, and up to two parts are sent while the next one fills: three are in memory, however
//! large the image. Nothing is visible in the bucket until the upload is completed, and only [`Sink::publish`] completes
//! it, that is, once the image is verified.
//!
//! An upload that was interrupted is continued by the next one of the same image, in whichever process: the image is downloaded
//! anew, since all of it has to be hashed, and a part is not sent whose length and MD5 the store has. So two processes may work
//! on one upload, and do not disturb each other: they send the same bytes, and the one that completes it second finds it done.
//! It is aborted only by the process that began it, if the image is another one.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use tokio::task::JoinSet;

use crate::archive::layout::CopyId;
use crate::archive::manifest::{ImageRecord, Manifest};
use crate::archive::md5::{Md5, Md5Sum};
use crate::archive::s3::bucket::{Bucket, ExistingCopy, ImageLock};
use crate::archive::s3::error::{S3Cause, S3Error};
use crate::archive::s3::xml::ListedPart;
use crate::archive::transfer::sink::{ImageVersion, Sink, SinkError};
use crate::disk::blocking;
use crate::text::chain;

/// The smallest part. S3 takes no less than 5 MiB but for the last one, and each request costs time and money.
const PART_BYTES_MIN: u64 = 8 << 20;

/// The most parts of an upload, by Amazon's "Amazon S3 multipart upload limits"; Exoscale's store has the same limit.
const PARTS_MAX: usize = 10_000;

/// The most parts that an image of known length is cut into: fewer than [`PARTS_MAX`], in case it is longer than announced.
const PARTS_PLANNED: u64 = 9000;

/// While the length is not known, parts double in size after this many: ten thousand hold 8 TiB then, more than any store
/// takes as one object.
const PARTS_OF_A_SIZE: u64 = 1000;

/// Parts that are sent while the next one fills: enough to keep a line busy, and memory flat.
const PARTS_IN_FLIGHT_MAX: usize = 2;

/// Unfinished uploads of an image that are looked at, the newest first: more are there only if exports fail again and again.
const RESUMABLE_MAX: usize = 3;

/// The content type of qcow2 images.
const IMAGE_TYPE: &str = "application/x-qemu-disk";

/// The length of a part by its number, which counts from zero.
fn part_bytes(number: usize, whole: Option<u64>) -> u64 {
    match whole {
        Some(bytes) => bytes.div_ceil(PARTS_PLANNED).max(PART_BYTES_MIN),
        None => PART_BYTES_MIN << (number as u64 / PARTS_OF_A_SIZE).min(9),
    }
}

/// The upload of one image, as an output of its download.
pub(super) struct S3Sink {
    bucket: Arc<Bucket>,
    id: CopyId,
    image_key: String,
    /// The objects that had the names of the copy before.
    before: ExistingCopy,
    image: Option<ImageVersion>,
    upload: Option<Upload>,
    /// Whether an earlier upload may be continued.
    may_resume: bool,
    /// The upload is not there any more: another process completed it.
    lost: Option<S3Error>,
    filling: BytesMut,
    _lock: ImageLock,
}

/// An upload that was begun.
struct Upload {
    id: String,
    /// In the metadata that the object will have; not known of one that is resumed.
    md5: Option<Md5Sum>,
    /// What the store has of an upload that is resumed, by number; none for one that was begun here.
    found: Option<HashMap<usize, ListedPart>>,
    /// By number; empty while the part is in flight.
    etags: Vec<String>,
    bytes: u64,
    in_flight: JoinSet<Result<(usize, String), S3Error>>,
}

/// How an upload ended.
enum Completed {
    /// The image is there, by this `ETag` and as this version.
    Ours { etag: String, version_id: Option<String> },
    /// Another process stored a verified copy first, with this manifest.
    Theirs(Box<Manifest>),
}

impl Upload {
    /// Waits for one part.
    async fn wait(&mut self) -> Result<(), S3Error> {
        match self.in_flight.join_next().await {
            Some(Ok(sent)) => {
                let (number, etag) = sent?;
                if let Some(slot) = self.etags.get_mut(number) {
                    *slot = etag;
                }
                Ok(())
            }
            Some(Err(lost)) => match lost.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // the runtime ends.
                Err(_) => std::future::pending().await,
            },
            None => Ok(()),
        }
    }
}

impl S3Sink {
    pub(super) fn new(bucket: Arc<Bucket>, id: CopyId, before: ExistingCopy, lock: ImageLock) -> Self {
        let image_key = bucket.image_key(&id);
        let (image, upload, lost, filling) = (None, None, None, BytesMut::new());
        Self { bucket, id, image_key, before, image, upload, may_resume: true, lost, filling, _lock: lock }
    }

    fn error(&self, doing: &'static str, why: impl Into<String>) -> S3Error {
        S3Error::new(doing, self.bucket.client.shown(&self.image_key), S3Cause::Differs(why.into()))
    }

    /// The length of the part that fills now.
    fn part_bytes(&self) -> usize {
        let number = self.upload.as_ref().map_or(0, |upload| upload.etags.len());
        let bytes = part_bytes(number, self.image.as_ref().and_then(|image| image.bytes));
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    async fn take(&mut self, mut bytes: Bytes) -> Result<(), S3Error> {
        while !bytes.is_empty() && self.lost.is_none() {
            let part = self.part_bytes();
            if self.filling.is_empty() {
                self.filling.reserve(part);
            }
            let next = bytes.split_to(bytes.len().min(part.saturating_sub(self.filling.len())));
            self.filling.extend_from_slice(&next);
            if self.filling.len() >= part {
                match self.send_part().await {
                    // The process that did so has the image, or begins anew: at the end it is looked what became of it.
                    Err(error) if error.is_missing() => self.lost = Some(error),
                    sent => sent?,
                }
            }
        }
        Ok(())
    }

    /// Continues an upload whose first part is this one, or begins one.
    async fn begin(&self, first: &Bytes) -> Result<Upload, S3Error> {
        if let Some(upload) = self.resumable(first).await {
            return Ok(upload);
        }
        let md5 = self.image.as_ref().map(|image| image.md5);
        let md5_text = md5.map(|md5| md5.to_string());
        let id = self.bucket.client.begin_upload(&self.image_key, IMAGE_TYPE, md5_text).await?;
        Ok(Upload { id, md5, found: None, etags: Vec::new(), bytes: 0, in_flight: JoinSet::new() })
    }

    /// An upload that was interrupted, and began with this part.
    async fn resumable(&self, first: &Bytes) -> Option<Upload> {
        if !self.may_resume {
            return None;
        }
        let uploads = match self.bucket.uploads_of(&self.image_key).await {
            Ok(uploads) => uploads,
            Err(error) => {
                tracing::debug!("no upload is resumed: {}", chain(&error));
                return None;
            }
        };
        for upload in uploads.into_iter().take(RESUMABLE_MAX) {
            // One that ended meanwhile, or that can't be looked at, is no worse than none.
            let Ok(parts) = self.bucket.client.list_parts(&self.image_key, &upload.id).await else {
                continue;
            };
            let found: HashMap<_, _> =
                parts.into_iter().filter_map(|part| Some((part.number.checked_sub(1)?, part))).collect();
            if is_there(&found, 0, first).await {
                tracing::info!(
                    "the upload of {} is resumed: {} parts are there",
                    self.bucket.client.shown(&self.image_key),
                    found.len()
                );
                let (found, etags, in_flight) = (Some(found), Vec::new(), JoinSet::new());
                return Some(Upload { id: upload.id, md5: None, found, etags, bytes: 0, in_flight });
            }
        }
        None
    }

    /// Begins to send what was gathered; waits while too many parts are in flight.
    async fn send_part(&mut self) -> Result<(), S3Error> {
        let part = std::mem::take(&mut self.filling).freeze();
        if self.upload.is_none() {
            self.upload = Some(self.begin(&part).await?);
        }
        let too_long =
            self.error("upload", format!("it has more than {PARTS_MAX} parts, which no store takes"));
        let Some(upload) = &mut self.upload else { return Ok(()) };
        if upload.etags.len() >= PARTS_MAX {
            return Err(too_long);
        }
        while upload.in_flight.len() >= PARTS_IN_FLIGHT_MAX {
            upload.wait().await?;
        }
        let number = upload.etags.len();
        if let Some(found) = &upload.found
            && is_there(found, number, &part).await
        {
            upload.etags.push(found.get(&number).map(|part| part.etag.clone()).unwrap_or_default());
            upload.bytes += part.len() as u64;
            return Ok(());
        }
        let id = upload.id.clone();
        let (bucket, key) = (Arc::clone(&self.bucket), self.image_key.clone());
        upload.etags.push(String::new());
        upload.bytes += part.len() as u64;
        upload.in_flight.spawn(async move {
            // Stores count from one.
            let etag = bucket.client.upload_part(&key, &id, number + 1, part).await?;
            Ok((number, etag))
        });
        Ok(())
    }

    /// Aborts the upload, if it was begun here: what was resumed may be another process's as well.
    async fn abort(&mut self) {
        self.filling = BytesMut::new();
        self.may_resume = false;
        let Some(mut upload) = self.upload.take() else { return };
        upload.in_flight.shutdown().await;
        if upload.found.is_none()
            && let Err(error) = self.bucket.client.abort(&self.image_key, &upload.id).await
        {
            self.bucket.warn_of_leftovers(&error);
            self.bucket.leave_behind(&self.image_key, upload.id);
        }
    }

    /// The copy of another process, if it stored one; else this error.
    async fn theirs(&self, error: S3Error) -> Result<Manifest, S3Error> {
        let theirs = self.bucket.existing(&self.id).await?;
        theirs.verified().cloned().ok_or(error)
    }

    async fn publish(&mut self, manifest: Manifest) -> Result<Manifest, S3Error> {
        if let Err(error) = self.send_last().await {
            return if error.is_missing() { self.theirs(error).await } else { Err(error) };
        }
        let Some(upload) = &mut self.upload else { return Err(self.error("store", "it has no bytes")) };
        let (bytes, declared) = (upload.bytes, upload.md5);
        let expected = manifest.image.bytes;
        if bytes != expected {
            return Err(
                self.error("store", format!("{bytes} bytes were uploaded of {expected} verified bytes"))
            );
        }
        if declared.is_some_and(|md5| md5 != manifest.image.md5) {
            return Err(self.error("store", "it was uploaded with another MD5 than the verified one"));
        }
        let image = match self.complete(&manifest).await? {
            Completed::Theirs(theirs) => return Ok(*theirs),
            Completed::Ours { etag, version_id } => {
                let etag = Some(etag).filter(|etag| !etag.is_empty());
                ImageRecord { etag, version_id, ..manifest.image }
            }
        };
        let manifest = Manifest { image, ..manifest };
        // The manifest is last: it makes the copy count, so everything else must be there already.
        let client = &self.bucket.client;
        let name = self.bucket.image_name(&self.id);
        let sums = format!("{}  {name}\n", manifest.image.md5);
        client.put(&self.bucket.md5_key(&self.id), "text/plain", sums.into_bytes()).await?;
        let key = self.bucket.manifest_key(&self.id, None);
        client.put(&key, "application/json", manifest.to_bytes()).await?;
        Ok(manifest)
    }

    /// Sends what is left, and waits until the store has all parts.
    async fn send_last(&mut self) -> Result<(), S3Error> {
        if let Some(lost) = self.lost.take() {
            return Err(lost);
        }
        if !self.filling.is_empty() || self.upload.is_none() {
            self.send_part().await?;
        }
        if let Some(upload) = &mut self.upload {
            while !upload.in_flight.is_empty() {
                upload.wait().await?;
            }
        }
        Ok(())
    }

    /// Makes the image visible, unless another process stored a verified copy meanwhile.
    async fn complete(&mut self, manifest: &Manifest) -> Result<Completed, S3Error> {
        let bucket = Arc::clone(&self.bucket);
        let (client, key) = (&bucket.client, self.image_key.clone());
        // The old manifest does not count, or there would be nothing to upload. Beside the new image it might, although
        // it was not written for it.
        for key in &self.before.manifests {
            client.delete(key).await?;
        }
        let Some(upload) = &self.upload else { return Err(self.error("store", "it has no bytes")) };
        let is_new = self.before.image.is_none();
        let mut completed = client.complete(&key, &upload.id, &upload.etags, is_new).await;
        if is_new && completed.as_ref().is_err_and(S3Error::is_unsupported) {
            completed = client.complete(&key, &upload.id, &upload.etags, false).await;
        }
        match completed {
            Ok(()) => {}
            Err(error) if error.is_precondition() => {
                self.abort().await;
                return Ok(Completed::Theirs(Box::new(self.theirs(error).await?)));
            }
            // An attempt may have completed it, and its response was lost, or in a form of the store's own.
            Err(error) if error.is_missing() || error.cause.is_transient() => {
                if !self.is_there_now(manifest).await? {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
        self.upload = None;
        let Some(found) = client.head(&key).await? else {
            return Err(self.error("store", "the store reports it as complete, but does not have it"));
        };
        let expected = manifest.image.bytes;
        if found.bytes != Some(expected) {
            let found =
                found.bytes.map_or_else(|| "an unknown number of".to_owned(), |bytes| bytes.to_string());
            let why = format!("the store has {found} bytes of it where {expected} were sent");
            return Err(self.error("store", why));
        }
        let expected = manifest.image.md5.to_string();
        if found.md5.as_ref().is_some_and(|md5| *md5 != expected) {
            return Err(self.error("store", "another process stored another image of it at the same moment"));
        }
        Ok(Completed::Ours { etag: found.etag, version_id: found.version_id })
    }

    /// Whether the object is certainly what this upload made: another than before, of this MD5 and length.
    async fn is_there_now(&self, manifest: &Manifest) -> Result<bool, S3Error> {
        let Some(found) = self.bucket.client.head(&self.image_key).await? else { return Ok(false) };
        let is_another = self.before.image.as_ref().is_none_or(|before| before.etag != found.etag);
        let (bytes, md5) = (manifest.image.bytes, manifest.image.md5.to_string());
        Ok(is_another && found.bytes == Some(bytes) && found.md5 == Some(md5))
    }
}

/// Whether the store has this part, by its length and its MD5. Where a store's `ETag`s are none, no part is found.
async fn is_there(found: &HashMap<usize, ListedPart>, number: usize, part: &Bytes) -> bool {
    let Some(found) = found.get(&number).filter(|found| found.bytes == part.len() as u64) else {
        return false;
    };
    let part = part.clone();
    let md5 = blocking(move || {
        let mut md5 = Md5::new();
        md5.update(&part);
        md5.finish().to_string()
    });
    md5.await == found.etag
}

fn sink_error(error: S3Error) -> SinkError {
    error.into_sink_error("store in the bucket")
}

impl Sink for S3Sink {
    fn expect(&mut self, image: &ImageVersion) -> Result<(), SinkError> {
        self.image = Some(image.clone());
        Ok(())
    }

    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move { self.take(bytes).await.map_err(sink_error) })
    }

    fn restart(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move {
            self.abort().await;
            Ok(())
        })
    }

    fn publish(mut self: Box<Self>, manifest: Manifest) -> BoxFuture<'static, Result<Manifest, SinkError>> {
        Box::pin(async move {
            let published = S3Sink::publish(&mut self, manifest).await;
            if published.as_ref().is_err_and(S3Error::is_difference) {
                self.abort().await;
            }
            published.map_err(sink_error)
        })
    }

    /// The next upload of the image continues it.
    fn abandon(mut self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            if let Some(upload) = &mut self.upload {
                upload.in_flight.shutdown().await;
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_as_few_as_a_store_takes_and_as_small_as_that_allows() {
        const GIB: u64 = 1 << 30;
        assert_eq!(part_bytes(0, Some(1)), 8 << 20);
        assert_eq!(part_bytes(9000, Some(70 * GIB)), 8 << 20);
        for whole in [GIB, 71 * GIB, 1024 * GIB, 4096 * GIB] {
            let part = part_bytes(0, Some(whole));
            assert!(whole.div_ceil(part) <= PARTS_PLANNED && part <= 5 * GIB, "{whole}: {part}");
        }
        // Unknown: at 8 GiB parts double, and ten thousand hold more than any store takes.
        assert_eq!([0, 999, 1000, 2500].map(|number| part_bytes(number, None) >> 20), [8, 8, 16, 32]);
        let all: u64 = (0..PARTS_MAX).map(|number| part_bytes(number, None)).sum();
        assert!(all > 4096 * GIB && part_bytes(PARTS_MAX - 1, None) <= 5 * GIB);
    }
}
