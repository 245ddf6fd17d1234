//! Reads the image of a copy in a folder again.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream;

use crate::archive::md5::Md5Sum;
use crate::archive::transfer::source::{ImageSource, ImageStream, SourceError};
use crate::disk::{Access, Disk, DiskFile, Open, blocking};
use crate::transport::{Body, Reached, TransportError};

/// Large enough to keep a disk busy, small enough to stop soon.
const READ_BYTES: usize = 256 << 10;

/// The image of a copy in a folder.
#[derive(Debug)]
pub(crate) struct LocalImage {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) path: PathBuf,
    pub(super) md5: Md5Sum,
}

impl ImageSource for LocalImage {
    fn md5(&self) -> Option<String> {
        Some(self.md5.to_string())
    }

    fn is_image(&self, _length: Option<u64>) -> bool {
        true
    }

    fn open<'a>(
        &'a self,
        offset: u64,
        until: Option<u64>,
        _etag: Option<&'a str>,
    ) -> BoxFuture<'a, Result<ImageStream, SourceError>> {
        let (disk, path) = (Arc::clone(&self.disk), self.path.clone());
        Box::pin(async move {
            let opened = blocking(move || {
                let file: Arc<dyn DiskFile> = Arc::from(disk.open(&path, Open::Read, Access::Group)?);
                let total = file.len()?;
                // The bytes are to be read from the disk, not from the page cache, which would hide a damage of the disk.
                file.release(0..total);
                io::Result::Ok((file, total))
            });
            let (file, total) = opened.await.map_err(|error| SourceError::Refused(Box::new(error)))?;
            let end = until.unwrap_or(total).min(total);
            let body = pieces(file, offset, end);
            Ok(ImageStream { offset, is_part: true, total: Some(total), etag: None, body })
        })
    }
}

/// The bytes of a file between two offsets.
fn pieces(file: Arc<dyn DiskFile>, from: u64, end: u64) -> Body {
    let piece = move |at: u64| {
        let file = Arc::clone(&file);
        async move {
            let wanted = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX).min(READ_BYTES);
            if wanted == 0 {
                return Ok(None);
            }
            let read = blocking(move || {
                let mut buffer = vec![0; wanted];
                let count = file.read_at(&mut buffer, at)?;
                file.release(at..at + count as u64);
                buffer.truncate(count);
                io::Result::Ok(buffer)
            });
            let buffer = read.await.map_err(|error| {
                TransportError::because(Reached::Unknown, "the disk cannot read it", error)
            })?;
            let next = at + buffer.len() as u64;
            Ok((!buffer.is_empty()).then(|| (Bytes::from(buffer), next)))
        }
    };
    Box::pin(stream::try_unfold(from, piece))
}

#[cfg(test)]
mod tests {
    use futures_util::TryStreamExt as _;

    use super::*;
    use crate::archive::testing::{image, manifest_of};
    use crate::disk::{RealDisk, replace_file};

    #[tokio::test]
    async fn a_file_is_read_from_any_place_to_any_other() {
        let bytes = image(READ_BYTES * 2 + 17, 1);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        replace_file(&RealDisk, &path, &bytes, Access::Owner).unwrap();
        let md5 = manifest_of(&bytes).image.md5;
        let source = LocalImage { disk: Arc::new(RealDisk), path, md5 };
        let len = bytes.len() as u64;
        for (from, until) in
            [(0, None), (1, None), (len, None), (5, Some(9)), (READ_BYTES as u64, Some(len + 9))]
        {
            let stream = source.open(from, until, None).await.unwrap();
            assert_eq!((stream.offset, stream.total), (from, Some(len)));
            let pieces: Vec<Bytes> = stream.body.try_collect().await.unwrap();
            let end = until.unwrap_or(len).min(len);
            let span = usize::try_from(from).unwrap()..usize::try_from(end).unwrap();
            assert!(pieces.concat() == bytes[span], "{from} {until:?}");
        }
    }
}
