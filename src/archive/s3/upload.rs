//! An image on its destination into a bucket.
//!
//! Its bytes are gathered to parts, and up to two parts are sent while the next one fills. All uploads of the process share one
//! budget of memory for that. A part for which there is none, or which is larger than a share of it, is sent while it arrives: its
//! MD5 is known only afterwards, and compared with the `ETag` that the store gives it. If it fails on its destination, its bytes are read
//! from their source again. Nothing is visible in the bucket until the upload is completed, and only [`Sink::publish`] completes
//! it, that is, once the image is verified.
//!
//! An upload that was interrupted is continued by the next one of the same image, in whichever process: the image is downloaded
//! anew, since all of it has to be hashed, and a part is not sent whose length and MD5 the store has. So two processes may work
//! on one upload, and do not disturb each other: they send the same bytes, and the one that completes it second finds it done.
//! It is aborted only by the process that began it, if the image is another one.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};

use crate::archive::manifest::{ImageRecord, Manifest};
use crate::archive::md5::Md5Sum;
use crate::archive::s3::bucket::{Bucket, ExistingCopy, ImageLock};
use crate::archive::s3::client::{Part, PartOf, UploadAttempts};
use crate::archive::s3::error::{S3Cause, S3Error};
use crate::archive::s3::memory::{PartMemory, Reserved};
use crate::archive::s3::xml::ListedPart;
use crate::archive::transfer::buffer::BUFFER_BYTES;
use crate::archive::transfer::parts::{PARTS_MAX, PartSums, part_range};
use crate::archive::transfer::sink::{ImageVersion, Sink, SinkError};
use crate::copies::CopyId;
use crate::disk::blocking;
use crate::text::chain;
use crate::transport::{Body, TransportError, piped};

/// Parts that are sent while the next one fills: enough to keep a line busy, and memory flat.
const PARTS_IN_FLIGHT_MAX: usize = 2;

/// Unfinished uploads of an image that are looked at, the newest first: more are there only if exports fail again and again.
const RESUMABLE_MAX: usize = 3;

/// The content type of qcow2 images.
const IMAGE_TYPE: &str = "application/x-qemu-disk";

/// The upload of one image, as an output of its download.
pub(super) struct S3Sink {
    bucket: Arc<Bucket>,
    memory: PartMemory,
    id: CopyId,
    image_key: String,
    /// The objects that had the names of the copy before.
    before: ExistingCopy,
    image: Option<ImageVersion>,
    /// Without them each part is hashed here.
    sums: Option<PartSums>,
    upload: Option<Upload>,
    /// Whether an earlier upload may be continued.
    may_resume: bool,
    /// The upload is not there any more: another process completed it.
    lost: Option<S3Error>,
    /// The bytes that were taken, and the parts that were begun.
    at: u64,
    parts: usize,
    filling: Option<Filling>,
    missing: VecDeque<MissingPart>,
    _lock: ImageLock,
}

/// The part that the next bytes belong to.
struct Filling {
    number: usize,
    range: Range<u64>,
    destination: Destination,
}

/// Where the bytes of a part go.
enum Destination {
    /// They are gathered.
    Memory(Vec<Bytes>, Reserved),
    /// They are sent as they arrive, until the request fails.
    Stream(Option<mpsc::Sender<Result<Bytes, TransportError>>>),
    /// Nowhere: the store may have them, or wants to know their MD5 before.
    Nowhere,
}

/// A part that could not be sent while it arrived.
struct MissingPart {
    number: usize,
    range: Range<u64>,
    md5: Md5Sum,
    attempts: UploadAttempts,
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
    in_flight: JoinSet<Result<Sent, S3Error>>,
}

/// What became of a part.
enum Sent {
    /// The store has it, by this `ETag`.
    Stored(usize, String),
    /// It failed on its destination, and is not in memory.
    Missing(MissingPart),
}

/// How an upload ended.
enum Completed {
    /// The image is there, by this `ETag` and as this version.
    Ours { etag: String, version_id: Option<String> },
    /// Another process stored a verified copy first, with this manifest.
    Theirs(Box<Manifest>),
}

impl Upload {
    fn new(id: String, md5: Option<Md5Sum>, found: Option<HashMap<usize, ListedPart>>) -> Self {
        Self { id, md5, found, etags: Vec::new(), in_flight: JoinSet::new() }
    }

    fn set(&mut self, number: usize, etag: String) {
        if self.etags.len() <= number {
            self.etags.resize(number + 1, String::new());
        }
        self.etags[number] = etag;
    }
}

impl S3Sink {
    pub(super) fn new(
        bucket: Arc<Bucket>,
        id: CopyId,
        before: ExistingCopy,
        lock: ImageLock,
        memory: PartMemory,
    ) -> Self {
        Self {
            image_key: bucket.image_key(&id),
            bucket,
            memory,
            id,
            before,
            image: None,
            sums: None,
            upload: None,
            may_resume: true,
            lost: None,
            at: 0,
            parts: 0,
            filling: None,
            missing: VecDeque::new(),
            _lock: lock,
        }
    }

    fn error(&self, doing: &'static str, why: impl Into<String>) -> S3Error {
        S3Error::new(doing, self.bucket.client.shown(&self.image_key), S3Cause::Differs(why.into()))
    }

    /// A part of the upload; before it was begun, with an empty id.
    fn part_of(&self, number: usize) -> PartOf {
        let upload = self.upload.as_ref().map_or_else(String::new, |upload| upload.id.clone());
        PartOf { key: self.image_key.clone(), upload, number }
    }

    async fn take(&mut self, mut bytes: Bytes) -> Result<(), S3Error> {
        while !bytes.is_empty() && self.lost.is_none() {
            let taken = self.take_some(&mut bytes).await;
            match taken.and_then(|()| self.note_ended()) {
                // The process that did so has the image, or begins anew: at the end it is looked what became of it.
                Err(error) if error.is_missing() => self.lose(error),
                taken => taken?,
            }
        }
        Ok(())
    }

    fn lose(&mut self, error: S3Error) {
        (self.filling, self.lost) = (None, Some(error));
        self.missing.clear();
    }

    /// Takes the bytes that belong to the same part.
    async fn take_some(&mut self, bytes: &mut Bytes) -> Result<(), S3Error> {
        let mut filling = match self.filling.take() {
            Some(filling) => filling,
            None => self.begin_part().await?,
        };
        let left = usize::try_from(filling.range.end - self.at).unwrap_or(usize::MAX);
        let next = bytes.split_to(bytes.len().min(left));
        self.at += next.len() as u64;
        match &mut filling.destination {
            // A piece of a buffer would hold all of it.
            Destination::Memory(chunks, _) if next.len() < BUFFER_BYTES => {
                chunks.push(Bytes::copy_from_slice(&next));
            }
            Destination::Memory(chunks, _) => chunks.push(next),
            Destination::Stream(sender) => {
                if let Some(to) = sender
                    && to.send(Ok(next)).await.is_err()
                {
                    *sender = None;
                }
            }
            Destination::Nowhere => {}
        }
        if self.at == filling.range.end {
            self.end_part(filling).await?;
        } else {
            self.filling = Some(filling);
        }
        Ok(())
    }

    async fn begin_part(&mut self) -> Result<Filling, S3Error> {
        let number = self.parts;
        if number >= PARTS_MAX {
            let why = format!("it has more than {PARTS_MAX} parts, which no store takes");
            return Err(self.error("upload", why));
        }
        let whole = match &self.sums {
            Some(sums) => sums.whole,
            None => self.image.as_ref().and_then(|image| image.bytes),
        };
        let mut range = part_range(number, self.at, whole);
        range.end = whole.filter(|whole| *whole > self.at).map_or(range.end, |whole| whole.min(range.end));
        let bytes = range.end - range.start;
        let reserved = loop {
            if let Some(reserved) = self.memory.try_reserve(bytes) {
                break Some(reserved);
            }
            if !self.can_stream() {
                break Some(self.memory.reserve(&*self.bucket.client.clock, bytes).await);
            }
            match &self.upload {
                // The store's answer shows whether `ETag`s are MD5s.
                None => self.upload = Some(self.begin(bytes, None).await?),
                Some(upload) if upload.in_flight.is_empty() || bytes > self.memory.share() => break None,
                Some(_) => self.wait().await?,
            }
        };
        let destination = match reserved {
            Some(reserved) => Destination::Memory(Vec::new(), reserved),
            None => self.begin_stream(number, &range).await?,
        };
        self.parts += 1;
        Ok(Filling { number, range, destination })
    }

    /// Whether a part may be sent while it arrives: its length has to be known, and its `ETag` has to be its MD5.
    fn can_stream(&self) -> bool {
        self.sums.as_ref().is_some_and(|sums| sums.whole.is_some()) && !self.bucket.client.signs_parts()
    }

    async fn begin_stream(&mut self, number: usize, range: &Range<u64>) -> Result<Destination, S3Error> {
        let bytes = range.end - range.start;
        self.wait_for_room().await?;
        let of = self.part_of(number);
        let (Some(upload), Some(sums)) = (&mut self.upload, &self.sums) else {
            return Ok(Destination::Nowhere);
        };
        let may_be_there = upload.found.as_ref().and_then(|found| found.get(&number));
        if may_be_there.is_some_and(|found| found.bytes == bytes) || self.bucket.client.requires_md5() {
            return Ok(Destination::Nowhere);
        }
        let (bucket, sums, range) = (Arc::clone(&self.bucket), sums.clone(), range.clone());
        let (sender, body) = piped();
        upload.in_flight.spawn(async move {
            let sent = bucket.client.stream_part(&of, body, bytes, None).await;
            let md5 = sum(&sums, &of, &bucket).await?;
            Ok(match sent {
                Ok(etag) if etag == md5.to_string() => Sent::Stored(number, etag),
                Err(error) if error.is_missing() => return Err(error),
                failed => {
                    if let Err(error) = failed {
                        tracing::debug!("part {number} is sent again: {}", chain(&error));
                    }
                    Sent::Missing(MissingPart { number, range, md5, attempts: UploadAttempts::default() })
                }
            })
        });
        Ok(Destination::Stream(Some(sender)))
    }

    /// All bytes of the part were taken.
    async fn end_part(&mut self, Filling { number, range, destination }: Filling) -> Result<(), S3Error> {
        match destination {
            // What becomes of it is found by `wait`.
            Destination::Stream(_) => Ok(()),
            Destination::Nowhere => {
                let Some(sums) = &self.sums else { return Ok(()) };
                let md5 = sum(sums, &self.part_of(number), &self.bucket).await?;
                self.end_unsent(MissingPart { number, range, md5, attempts: UploadAttempts::default() }).await
            }
            Destination::Memory(chunks, reserved) => {
                let part = Part(Arc::new(chunks));
                if self.upload.is_none() {
                    let sums = self.sums.as_ref();
                    let md5 = md5_of(sums, &self.part_of(number), &part, &self.bucket).await?;
                    self.upload = Some(self.begin(part.len(), Some(md5)).await?);
                }
                self.wait_for_room().await?;
                let (of, sums, bucket) = (self.part_of(number), self.sums.clone(), Arc::clone(&self.bucket));
                let Some(upload) = &mut self.upload else { return Ok(()) };
                let found = upload.found.as_ref().and_then(|found| found.get(&number));
                let found = found.filter(|found| found.bytes == part.len()).map(|found| found.etag.clone());
                upload.in_flight.spawn(async move {
                    let _reserved = reserved;
                    let md5 = md5_of(sums.as_ref(), &of, &part, &bucket).await?;
                    let etag = match found {
                        Some(etag) if etag == md5.to_string() => etag,
                        _ => bucket.client.upload_part(&of, &part, md5).await?,
                    };
                    Ok(Sent::Stored(number, etag))
                });
                Ok(())
            }
        }
    }

    /// A part was taken and not sent, since the store may have it.
    async fn end_unsent(&mut self, part: MissingPart) -> Result<(), S3Error> {
        let Some(upload) = &mut self.upload else { return Ok(()) };
        let found = upload.found.as_ref().and_then(|found| found.get(&part.number));
        if let Some(found) = found.filter(|found| found.etag == part.md5.to_string()) {
            let etag = found.etag.clone();
            upload.set(part.number, etag);
            return Ok(());
        }
        // The upload of another image is left as it is.
        if part.number == 0 && upload.found.is_some() {
            self.upload = Some(self.begin_anew().await?);
        }
        self.missing.push_back(part);
        Ok(())
    }

    /// Waits until one more part may be in flight.
    async fn wait_for_room(&mut self) -> Result<(), S3Error> {
        while self.upload.as_ref().is_some_and(|upload| upload.in_flight.len() >= PARTS_IN_FLIGHT_MAX) {
            self.wait().await?;
        }
        Ok(())
    }

    /// Waits for one part.
    async fn wait(&mut self) -> Result<(), S3Error> {
        let Some(upload) = &mut self.upload else { return Ok(()) };
        let ended = upload.in_flight.join_next().await;
        ended.map_or(Ok(()), |ended| self.note(ended))
    }

    /// Looks which parts ended, without waiting.
    fn note_ended(&mut self) -> Result<(), S3Error> {
        while let Some(ended) = self.upload.as_mut().and_then(|upload| upload.in_flight.try_join_next()) {
            self.note(ended)?;
        }
        Ok(())
    }

    fn note(&mut self, ended: Result<Result<Sent, S3Error>, JoinError>) -> Result<(), S3Error> {
        match ended.map_err(JoinError::try_into_panic) {
            Ok(sent) => match (sent?, &mut self.upload) {
                (Sent::Stored(number, etag), Some(upload)) => upload.set(number, etag),
                (Sent::Stored(..), None) => {}
                (Sent::Missing(part), _) => self.missing.push_back(part),
            },
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            // The runtime ends, and this with it.
            Err(Err(_)) => {}
        }
        Ok(())
    }

    /// Waits for all parts.
    async fn wait_for_all(&mut self) -> Result<(), S3Error> {
        while self.upload.as_ref().is_some_and(|upload| !upload.in_flight.is_empty()) {
            match self.wait().await {
                Err(error) if error.is_missing() => self.lose(error),
                waited => waited?,
            }
        }
        Ok(())
    }

    /// Sends a missing part, whose bytes are read again.
    async fn send_missing(&mut self, body: Body) -> Result<(), S3Error> {
        let Some(mut part) = self.missing.pop_front() else { return Ok(()) };
        let of = self.part_of(part.number);
        let (Some(upload), client) = (&mut self.upload, &self.bucket.client) else { return Ok(()) };
        let failed = |cause| S3Error::new("upload a part of", client.shown(&of.key), cause);
        let (bytes, is_signed) = (part.range.end - part.range.start, client.signs_parts());
        let sent = if is_signed {
            let _reserved = self.memory.reserve(&*client.clock, bytes).await;
            match gather(body, bytes).await {
                Ok(gathered) if gathered.md5() == part.md5 => {
                    client.upload_part(&of, &gathered, part.md5).await
                }
                Ok(_) => {
                    Err(failed(S3Cause::Unexpected("its source gives other bytes than before".to_owned())))
                }
                Err(broken) => Err(failed(broken.into())),
            }
        } else {
            client.stream_part(&of, body, bytes, Some(part.md5)).await
        };
        match sent {
            Ok(etag) if is_signed || etag == part.md5.to_string() => upload.set(part.number, etag),
            Ok(_) => {
                client.sign_parts("the `ETag` of a part is not its MD5");
                self.missing.push_front(part);
            }
            Err(error) if error.is_missing() => self.lose(error),
            // It was refused for not being signed.
            Err(_) if !is_signed && client.signs_parts() => self.missing.push_front(part),
            Err(error) => {
                if !error.cause.is_transient() || !client.pause(&mut part.attempts, &error.cause).await {
                    return Err(error);
                }
                self.missing.push_front(part);
            }
        }
        Ok(())
    }

    /// Continues an upload whose first part has this length, and this MD5 if that is known already, or begins one.
    async fn begin(&self, bytes: u64, md5: Option<Md5Sum>) -> Result<Upload, S3Error> {
        match self.resumable(bytes, md5).await {
            Some(upload) => Ok(upload),
            None => self.begin_anew().await,
        }
    }

    async fn begin_anew(&self) -> Result<Upload, S3Error> {
        let md5 = self.image.as_ref().map(|image| image.md5);
        let md5_text = md5.map(|md5| md5.to_string());
        let id = self.bucket.client.begin_upload(&self.image_key, IMAGE_TYPE, md5_text).await?;
        Ok(Upload::new(id, md5, None))
    }

    /// An upload that was interrupted, and began with this part.
    async fn resumable(&self, bytes: u64, md5: Option<Md5Sum>) -> Option<Upload> {
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
            // Where a store's `ETag`s are no MD5s, no part is found.
            let is_same =
                |part: &ListedPart| part.bytes == bytes && md5.is_none_or(|md5| md5.to_string() == part.etag);
            if found.get(&0).is_some_and(is_same) {
                tracing::info!(
                    "the upload of {} is resumed: {} parts are there",
                    self.bucket.client.shown(&self.image_key),
                    found.len()
                );
                return Some(Upload::new(upload.id, None, Some(found)));
            }
        }
        None
    }

    /// Aborts the upload, if it was begun here: what was resumed may be another process's as well.
    async fn abort(&mut self) {
        (self.filling, self.at, self.parts) = (None, 0, 0);
        self.missing.clear();
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
        let Some(upload) = &self.upload else { return Err(self.error("store", "it has no bytes")) };
        let (bytes, declared) = (self.at, upload.md5);
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
                let etag = Some(etag.into_boxed_str()).filter(|etag| !etag.is_empty());
                ImageRecord { etag, version_id: version_id.map(String::into_boxed_str), ..manifest.image }
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
        // An empty image has one part.
        let last = match self.filling.take() {
            None if self.parts == 0 => Some(self.begin_part().await?),
            last => last,
        };
        if let Some(last) = last {
            self.end_part(last).await?;
        }
        self.wait_for_all().await?;
        if let Some(lost) = self.lost.take() {
            return Err(lost);
        }
        let is_whole =
            |upload: &Upload| upload.etags.len() == self.parts && !upload.etags.iter().any(String::is_empty);
        if !self.missing.is_empty() || !self.upload.as_ref().is_some_and(is_whole) {
            return Err(self.error("store", "a part of it was not stored"));
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

/// The MD5 of a part that was hashed on its destination.
async fn sum(sums: &PartSums, of: &PartOf, bucket: &Bucket) -> Result<Md5Sum, S3Error> {
    let lost = || {
        let cause = S3Cause::Differs("the image is not hashed any more".to_owned());
        S3Error::new("upload a part of", bucket.client.shown(&of.key), cause)
    };
    sums.of(of.number).await.ok_or_else(lost)
}

/// The MD5 of a part that is in memory.
async fn md5_of(
    sums: Option<&PartSums>,
    of: &PartOf,
    part: &Part,
    bucket: &Bucket,
) -> Result<Md5Sum, S3Error> {
    let part = part.clone();
    match sums {
        Some(sums) => sum(sums, of, bucket).await,
        None => Ok(blocking(move || part.md5()).await),
    }
}

/// Reads a part of this length into memory.
async fn gather(mut body: Body, bytes: u64) -> Result<Part, TransportError> {
    let mut whole = BytesMut::with_capacity(usize::try_from(bytes).unwrap_or(usize::MAX));
    while let Some(chunk) = body.next().await {
        whole.extend_from_slice(&chunk?);
    }
    Ok(Part(Arc::new(vec![whole.freeze()])))
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

    fn take_part_sums(&mut self, sums: &PartSums) -> bool {
        self.sums = Some(sums.clone());
        true
    }

    fn wait_until_stored(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move {
            // Of an image of unknown length the last part ends with `publish`.
            let Some(whole) = self.sums.as_ref().and_then(|sums| sums.whole) else { return Ok(()) };
            // A part that is sent as it arrives would wait for its end, and for its MD5, for ever.
            if self.at != whole && self.lost.is_none() {
                let why = format!("{} bytes of it arrived where it has {whole}", self.at);
                return Err(sink_error(self.error("upload", why)));
            }
            self.wait_for_all().await.map_err(sink_error)
        })
    }

    fn missing(&mut self) -> Option<Range<u64>> {
        self.missing.front().map(|part| part.range.clone())
    }

    fn write_missing(&mut self, bytes: Body) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move { self.send_missing(bytes).await.map_err(sink_error) })
    }

    fn restart(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move {
            self.abort().await;
            self.sums = None;
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
