//! The archives that a download feeds.

use std::ops::Range;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, ready};

use crate::archive::transfer::error::DownloadError;
use crate::archive::transfer::parts::PartSums;
use crate::archive::transfer::sink::{ImageVersion, Output, SinkError};
use crate::policy::name::ArchiveName;
use crate::transport::Body;

/// The archives that still take bytes, and the errors of the others. An archive that fails does not keep the others from
/// their copy; the download ends early only when all have failed. Without any archive the image is hashed, and not kept.
#[derive(Default)]
pub(crate) struct Outputs {
    pub(crate) open: Vec<Output>,
    pub(crate) failed: Vec<(ArchiveName, SinkError)>,
}

impl Outputs {
    pub(crate) async fn expect(&mut self, image: &ImageVersion) -> Result<(), DownloadError> {
        self.each(None, |output| ready(output.sink.expect(image)).boxed()).await
    }

    /// Offers the MD5s of the image's parts; whether any archive has a use for them.
    pub(crate) fn take_part_sums(&mut self, sums: &PartSums) -> bool {
        let mut are_wanted = false;
        for output in &mut self.open {
            are_wanted |= output.sink.take_part_sums(sums);
        }
        are_wanted
    }

    pub(crate) async fn write(&mut self, bytes: &Bytes) -> Result<(), DownloadError> {
        self.each(None, |output| output.sink.write(bytes.clone())).await
    }

    /// Writes to all archives but one.
    pub(crate) async fn copy(&mut self, bytes: &Bytes, from: &ArchiveName) -> Result<(), DownloadError> {
        self.each(Some(from), |output| output.sink.write(bytes.clone())).await
    }

    /// All archives, or all but one, start over at zero.
    pub(crate) async fn restart(&mut self, except: Option<&ArchiveName>) -> Result<(), DownloadError> {
        let restart = |output: &mut Output| output.resumable = None;
        self.open.iter_mut().filter(|output| Some(&output.archive) != except).for_each(restart);
        self.each(except, |output| output.sink.restart()).await
    }

    pub(crate) async fn wait_until_stored(&mut self) -> Result<(), DownloadError> {
        self.each(None, |output| output.sink.wait_until_stored()).await
    }

    /// Bytes that an archive could not store, and which one.
    pub(crate) fn missing(&mut self) -> Option<(usize, Range<u64>)> {
        let mut each = self.open.iter_mut().enumerate();
        each.find_map(|(index, output)| Some((index, output.sink.missing()?)))
    }

    /// Gives one archive its missing bytes.
    pub(crate) async fn write_missing(&mut self, index: usize, bytes: Body) -> Result<(), DownloadError> {
        let Some(output) = self.open.get_mut(index) else { return Ok(()) };
        match output.sink.write_missing(bytes).await {
            Ok(()) => Ok(()),
            Err(error) => self.drop_failed(vec![(index, error)]).await,
        }
    }

    pub(crate) async fn keep_bad(&mut self) -> Result<(), DownloadError> {
        self.each(None, |output| output.sink.keep_bad()).await
    }

    /// Calls `action` on each archive but `except`, and drops those for which it fails.
    async fn each(
        &mut self,
        except: Option<&ArchiveName>,
        action: impl for<'a> Fn(&'a mut Output) -> BoxFuture<'a, Result<(), SinkError>> + Send + Sync,
    ) -> Result<(), DownloadError> {
        let mut failed = Vec::new();
        for (index, output) in self.open.iter_mut().enumerate() {
            if Some(&output.archive) != except
                && let Err(error) = action(output).await
            {
                failed.push((index, error));
            }
        }
        self.drop_failed(failed).await
    }

    async fn drop_failed(&mut self, failed: Vec<(usize, SinkError)>) -> Result<(), DownloadError> {
        for (index, error) in failed.into_iter().rev() {
            let output = self.open.remove(index);
            output.sink.abandon().await;
            self.failed.push((output.archive, error));
        }
        if self.open.is_empty() && !self.failed.is_empty() { Err(DownloadError::NoArchive) } else { Ok(()) }
    }
}
