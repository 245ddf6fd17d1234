//! An image on its way into a bucket.
//!
//! Its bytes are gathered to parts, and up to two parts are under way while the next one fills: three are in memory,
//! however large the image. Nothing can be seen in the bucket until the upload is completed, and it is completed only
//! by [`Sink::publish`], that is, once the image is proved.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use tokio::task::JoinSet;

use crate::archive::layout::CopyId;
use crate::archive::manifest::Manifest;
use crate::archive::md5::Md5Sum;
use crate::archive::s3::client::{Fault, Payload, S3Error};
use crate::archive::s3::{Before, Busy, Keys, S3Archive, warn_of_leftovers};
use crate::archive::transfer::sink::{ImageVersion, Sink, SinkError};
use crate::disk::blocking;

/// The smallest part: stores want 5 MiB at least, and each request costs.
const PART_BYTES_MIN: u64 = 8 << 20;

/// An image of known length is cut into at most so many parts: fewer than [`PARTS_MAX`], should it be longer than told.
const PARTS_PLANNED: u64 = 9000;

/// A store takes no more parts than that.
const PARTS_MAX: usize = 10_000;

/// While the length is not known, parts double after so many: the ten thousandth would end at 8 TiB, above what any
/// store takes.
const PARTS_OF_A_SIZE: u64 = 1000;

/// Parts under way while the next one fills.
const UNDER_WAY_MAX: usize = 2;

/// What a template's source and a download are called.
const IMAGE_TYPE: &str = "application/x-qemu-disk";

/// How long the part of this number is, counted from zero.
fn part_bytes(number: usize, whole: Option<u64>) -> u64 {
    match whole {
        Some(bytes) => bytes.div_ceil(PARTS_PLANNED).max(PART_BYTES_MIN),
        None => PART_BYTES_MIN << (number as u64 / PARTS_OF_A_SIZE).min(9),
    }
}

/// The end of an upload that is in the archive.
pub(super) struct S3Sink {
    archive: S3Archive,
    of: CopyId,
    keys: Keys,
    before: Before,
    whole: Option<ImageVersion>,
    upload: Option<Upload>,
    filling: BytesMut,
    _busy: Busy,
}

/// An upload that was begun.
struct Upload {
    id: String,
    /// What its metadata has.
    md5: Option<Md5Sum>,
    /// By number; empty where the part is still under way.
    etags: Vec<String>,
    bytes: u64,
    under_way: JoinSet<Result<(usize, String), S3Error>>,
}

impl Upload {
    /// Waits for one part.
    async fn wait(&mut self) -> Result<(), S3Error> {
        match self.under_way.join_next().await {
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
    pub(super) fn new(archive: S3Archive, of: CopyId, keys: Keys, before: Before, busy: Busy) -> Self {
        Self { archive, of, keys, before, whole: None, upload: None, filling: BytesMut::new(), _busy: busy }
    }

    fn error(&self, doing: &'static str, why: impl Into<String>) -> S3Error {
        S3Error::new(doing, self.archive.client.shown(&self.keys.image), Fault::Differs(why.into()))
    }

    /// How long the part is that fills now.
    fn part_bytes(&self) -> usize {
        let number = self.upload.as_ref().map_or(0, |upload| upload.etags.len());
        let bytes = part_bytes(number, self.whole.as_ref().and_then(|whole| whole.bytes));
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    async fn take(&mut self, mut bytes: Bytes) -> Result<(), S3Error> {
        while !bytes.is_empty() {
            let part = self.part_bytes();
            if self.filling.is_empty() {
                self.filling.reserve(part);
            }
            let next = bytes.split_to(bytes.len().min(part.saturating_sub(self.filling.len())));
            self.filling.extend_from_slice(&next);
            if self.filling.len() >= part {
                self.send_part().await?;
            }
        }
        Ok(())
    }

    /// Sends what was gathered; waits while too much is under way.
    async fn send_part(&mut self) -> Result<(), S3Error> {
        let part = std::mem::take(&mut self.filling).freeze();
        let client = Arc::clone(&self.archive.client);
        if self.upload.is_none() {
            let md5 = self.whole.as_ref().map(|whole| whole.md5);
            let id =
                client.begin_upload(&self.keys.image, IMAGE_TYPE, md5.map(|md5| md5.to_string())).await?;
            let under_way = JoinSet::new();
            self.upload = Some(Upload { id, md5, etags: Vec::new(), bytes: 0, under_way });
        }
        let too_long =
            self.error("upload", format!("it has more than {PARTS_MAX} parts, which no store takes"));
        let Some(upload) = &mut self.upload else { return Ok(()) };
        if upload.etags.len() >= PARTS_MAX {
            return Err(too_long);
        }
        while upload.under_way.len() >= UNDER_WAY_MAX {
            upload.wait().await?;
        }
        let (number, key, id) = (upload.etags.len(), self.keys.image.clone(), upload.id.clone());
        upload.etags.push(String::new());
        upload.bytes += part.len() as u64;
        upload.under_way.spawn(async move {
            let payload = blocking(move || Payload::new(part)).await;
            // Stores count from one.
            let etag = client.upload_part(&key, &id, number + 1, payload).await?;
            Ok((number, etag))
        });
        Ok(())
    }

    /// Gives back what was uploaded.
    async fn give_back(&mut self) {
        self.filling = BytesMut::new();
        // It stays ours until it is given back, should we be dropped meanwhile.
        let Some(upload) = &mut self.upload else { return };
        upload.under_way.shutdown().await;
        match self.archive.client.abort(&self.keys.image, &upload.id).await {
            Ok(_) => self.upload = None,
            Err(error) => {
                warn_of_leftovers(&self.archive.name, &error);
                self.remember();
            }
        }
    }

    /// What is not given back is remembered, for whoever cleans up.
    fn remember(&mut self) {
        if let Some(upload) = self.upload.take() {
            self.archive.shared.work().left.push((self.keys.image.clone(), upload.id));
        }
    }

    async fn publish(&mut self, manifest: Manifest) -> Result<Manifest, S3Error> {
        if !self.filling.is_empty() || self.upload.is_none() {
            self.send_part().await?;
        }
        let Some(upload) = &mut self.upload else { return Err(self.error("store", "nothing came")) };
        while !upload.under_way.is_empty() {
            upload.wait().await?;
        }
        let (bytes, declared) = (upload.bytes, upload.md5);
        if bytes != manifest.image.bytes {
            let expected = manifest.image.bytes;
            return Err(
                self.error("store", format!("{bytes} bytes were uploaded of {expected} that are proved"))
            );
        }
        if declared.is_some_and(|md5| md5 != manifest.image.md5) {
            return Err(self.error("store", "it was uploaded under another MD5 than the one that is proved"));
        }
        if let Some(theirs) = self.complete(&manifest).await? {
            return Ok(theirs);
        }
        let client = &self.archive.client;
        let sums = format!("{}  {}\n", manifest.image.md5, self.keys.file);
        client.put(&self.keys.md5, "text/plain", sums.into_bytes()).await?;
        client.put(&self.keys.manifest, "application/json", manifest.to_bytes()).await?;
        Ok(manifest)
    }

    /// Makes the image visible. If somebody else stored a good one meanwhile, theirs is the copy.
    async fn complete(&mut self, manifest: &Manifest) -> Result<Option<Manifest>, S3Error> {
        let client = Arc::clone(&self.archive.client);
        let key = self.keys.image.clone();
        // It does not count, or there would be nothing to upload: it must not vouch for the new image.
        if self.before.has_manifest {
            client.delete(&self.keys.manifest).await?;
        }
        let Some(upload) = &self.upload else { return Ok(None) };
        let is_new = self.before.image.is_none();
        let mut completed = client.complete(&key, &upload.id, &upload.etags, is_new).await;
        if is_new && completed.as_ref().is_err_and(S3Error::is_unsupported) {
            completed = client.complete(&key, &upload.id, &upload.etags, false).await;
        }
        match completed {
            Ok(_) => {}
            Err(error) if error.is_precondition() => {
                self.give_back().await;
                let (theirs, _) = self.archive.look(&self.of, &self.keys).await?;
                return theirs.map(Some).ok_or(error);
            }
            // An earlier try may have done it, and only its answer was lost.
            Err(error) if error.is_missing() => {
                if !self.is_there_now(manifest).await? {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
        self.upload = None;
        let Some(found) = client.head(&key).await? else {
            return Err(self.error("store", "the store says that it is complete, and does not have it"));
        };
        if found.bytes != Some(manifest.image.bytes) {
            let found =
                found.bytes.map_or_else(|| "none that it tells".to_owned(), |bytes| bytes.to_string());
            let expected = manifest.image.bytes;
            return Err(
                self.error("store", format!("the store has {found} bytes of it where {expected} were sent"))
            );
        }
        let expected = manifest.image.md5.to_string();
        if found.md5.as_ref().is_some_and(|md5| *md5 != expected) {
            return Err(self.error("store", "somebody else stored another image of it at the same moment"));
        }
        Ok(None)
    }

    /// Whether the object is certainly what this upload made: another than before, of this MD5 and length.
    async fn is_there_now(&self, manifest: &Manifest) -> Result<bool, S3Error> {
        let Some(found) = self.archive.client.head(&self.keys.image).await? else { return Ok(false) };
        let is_another = self.before.image.as_ref().is_none_or(|before| before.etag != found.etag);
        let (bytes, md5) = (manifest.image.bytes, manifest.image.md5.to_string());
        Ok(is_another && found.bytes == Some(bytes) && found.md5 == Some(md5))
    }
}

impl Drop for S3Sink {
    fn drop(&mut self) {
        self.remember();
    }
}

fn sink_error(error: S3Error) -> SinkError {
    SinkError::Remote { doing: "store in the bucket".to_owned(), source: Box::new(error) }
}

impl Sink for S3Sink {
    fn expect(&mut self, whole: &ImageVersion) -> Result<(), SinkError> {
        self.whole = Some(whole.clone());
        Ok(())
    }

    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move { self.take(bytes).await.map_err(sink_error) })
    }

    fn restart(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move {
            self.give_back().await;
            Ok(())
        })
    }

    fn publish(mut self: Box<Self>, manifest: Manifest) -> BoxFuture<'static, Result<Manifest, SinkError>> {
        Box::pin(async move {
            let published = S3Sink::publish(&mut self, manifest).await;
            if published.is_err() {
                self.give_back().await;
            }
            published.map_err(sink_error)
        })
    }

    /// An upload that is not complete can't be read, and one that is complete can be seen: nothing is kept.
    fn keep_bad(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        self.restart()
    }

    fn abandon(mut self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move { self.give_back().await })
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
