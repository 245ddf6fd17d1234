//! A new file for a restored image: it gets its name only once every byte is verified and on the disk.
//!
//! Until then it is a `.part` beside it. Nothing that exists is ever overwritten.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::archive::manifest::Manifest;
use crate::archive::transfer::part_file::PartFile;
use crate::archive::transfer::sink::{Sink, SinkError};
use crate::disk::{Access, Disk, DiskFile, Open, blocking};
use crate::restore::error::RestoreError;

/// Creates the `.part` of a new file that will have `bytes` bytes.
///
/// # Errors
/// [`RestoreError`] if something with either name exists, or the disk is too small.
pub(super) async fn create(
    disk: &Arc<dyn Disk>,
    to: &Path,
    bytes: u64,
) -> Result<Box<dyn Sink>, RestoreError> {
    let (disk, to) = (Arc::clone(disk), to.to_owned());
    let part = blocking(move || Part::create(disk, &to, bytes)).await?;
    let part_file = PartFile::new(Arc::clone(&part.file), 0);
    Ok(Box::new(FileSink { part, part_file, position: 0 }))
}

/// The temporary file. Dropped before it has its final name, it is removed.
struct Part {
    disk: Arc<dyn Disk>,
    to: PathBuf,
    path: PathBuf,
    file: Arc<dyn DiskFile>,
    is_named: bool,
}

impl Part {
    fn create(disk: Arc<dyn Disk>, to: &Path, bytes: u64) -> Result<Self, RestoreError> {
        let Some(name) = to.file_name() else { return Err(RestoreError::NoFileName(to.to_owned())) };
        let mut part_name = OsString::from(name);
        part_name.push(".part");
        let folder = folder_of(to);
        let (path, to) = (folder.join(part_name), folder.join(name));
        match disk.metadata(&to) {
            Ok(_) => return Err(RestoreError::FileExists(to)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(SinkError::disk("look at", &to, error).into()),
        }
        let free = disk.free_bytes(folder).map_err(|error| SinkError::disk("open", folder, error))?;
        if free < bytes {
            return Err(RestoreError::NoSpace { folder: folder.to_owned(), needs: bytes, free });
        }
        let file = match disk.open(&path, Open::CreateNew, Access::Owner) {
            Ok(file) => Arc::from(file),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(RestoreError::PartExists(path));
            }
            Err(error) => return Err(SinkError::disk("create", &path, error).into()),
        };
        Ok(Self { disk, to, path, file, is_named: false })
    }

    /// Syncs all bytes, and renames the file to its final name.
    fn publish(&mut self, bytes: u64) -> Result<(), SinkError> {
        let failed = |doing, path: &Path, source| SinkError::Disk { doing, path: path.to_owned(), source };
        self.file.sync().map_err(|error| failed("sync", &self.path, error))?;
        let found = self.file.len().map_err(|error| failed("measure", &self.path, error))?;
        if found != bytes {
            return Err(SinkError::Length { path: self.path.clone(), expected: bytes, found });
        }
        // A rename replaces an existing file, so the name is reserved first: a file that another process has created
        // in the meantime is not overwritten.
        drop(
            self.disk
                .open(&self.to, Open::CreateNew, Access::Owner)
                .map_err(|error| failed("reserve the name", &self.to, error))?,
        );
        if let Err(error) = self.disk.rename(&self.path, &self.to) {
            let _ = self.disk.remove_file(&self.to);
            return Err(failed("rename", &self.path, error));
        }
        self.is_named = true;
        let folder = folder_of(&self.to);
        self.disk.sync_dir(folder).map_err(|error| failed("sync the folder", folder, error))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.is_named {
            let _ = self.disk.remove_file(&self.path);
        }
    }
}

/// A path without a folder is in the current one, which the disk needs as `.`.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."))
}

struct FileSink {
    part: Part,
    part_file: PartFile,
    position: u64,
}

impl FileSink {
    fn failed(&self, source: io::Error) -> SinkError {
        SinkError::Disk { doing: "write", path: self.part.path.clone(), source }
    }
}

impl Sink for FileSink {
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move {
            let len = bytes.len() as u64;
            let written = self.part_file.write_at(self.position, bytes).await;
            self.position += len;
            written.map_err(|error| self.failed(error))
        })
    }

    fn restart(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        Box::pin(async move {
            self.part_file.wait_idle().await.map_err(|error| self.failed(error))?;
            let file = Arc::clone(&self.part.file);
            blocking(move || file.set_len(0)).await.map_err(|error| self.failed(error))?;
            self.part_file = PartFile::new(Arc::clone(&self.part.file), 0);
            self.position = 0;
            Ok(())
        })
    }

    fn publish(self: Box<Self>, manifest: Manifest) -> BoxFuture<'static, Result<Manifest, SinkError>> {
        Box::pin(async move {
            self.part_file.wait_idle().await.map_err(|error| self.failed(error))?;
            let Self { mut part, position, .. } = *self;
            blocking(move || part.publish(position)).await?;
            Ok(manifest)
        })
    }

    fn abandon(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(blocking(move || drop(self)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use super::*;
    use crate::archive::copy_reader::{CopyReader, ReadError};
    use crate::archive::testing::{
        FakeSource, Fault, NoRandomness, Offer, Shared, TestClock, TestDisk, image, manifest_of,
    };
    use crate::archive::transfer::hash::Hashers;
    use crate::clock::{self, Clock as _};
    use crate::disk::{RealDisk, read_file, replace_file};
    use crate::restore::copy::{Destination, copy_image};
    use crate::text::chain;

    /// Restores the image that the source has to `disk.raw` in a folder.
    async fn restore(
        bytes: &[u8],
        source: &FakeSource,
        disk: Arc<dyn Disk>,
        folder: &Path,
    ) -> Result<(), RestoreError> {
        let (clock, hashers) = (TestClock::at("2026-11-01T12:00:00Z"), Hashers::default());
        let reader = CopyReader::new(&clock, &NoRandomness, &hashers);
        let destination = Destination::File { disk: &disk, path: &folder.join("disk.raw") };
        copy_image(&"vault".parse().unwrap(), source, &manifest_of(bytes), reader, destination).await
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = RealDisk.list(folder).unwrap();
        entries.into_iter().map(|entry| entry.name.into_string().unwrap()).collect()
    }

    fn whole(folder: &Path, name: &str, bytes: &[u8]) -> bool {
        read_file(&RealDisk, &folder.join(name), 1 << 30).is_ok_and(|found| found == bytes)
    }

    #[tokio::test(start_paused = true)]
    async fn stopped_at_any_moment_there_is_a_whole_file_or_none_that_could_be_taken_for_one() {
        let bytes = image(300_000, 1);
        for changes in 0.. {
            let folder = tempfile::tempdir().unwrap();
            let disk = Arc::new(TestDisk::default());
            disk.changes.store(changes, Ordering::Relaxed);
            let source = FakeSource::new(Offer::of(&bytes), []);
            let restored = restore(&bytes, &source, Arc::new(Shared(Arc::clone(&disk))), folder.path()).await;
            if restored.is_ok() {
                assert!(changes > 3, "nothing was ever stopped");
                assert_eq!(names(folder.path()), ["disk.raw"]);
                assert!(whole(folder.path(), "disk.raw", &bytes));
                return;
            }
            let is_named = RealDisk.metadata(&folder.path().join("disk.raw")).is_ok();
            // The name alone may have been taken, by an empty file.
            assert!(
                !is_named
                    || whole(folder.path(), "disk.raw", &bytes)
                    || whole(folder.path(), "disk.raw", b""),
                "after {changes} changes"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_or_is_given_up_on_the_way_leaves_nothing() {
        let bytes = image(300_000, 1);
        let folder = tempfile::tempdir().unwrap();

        let disk = Arc::new(TestDisk::default());
        disk.room.store(100_000, Ordering::Relaxed);
        let source = FakeSource::new(Offer::of(&bytes), []);
        let full = restore(&bytes, &source, Arc::new(Shared(disk)), folder.path()).await.unwrap_err();
        assert!(
            matches!(full, RestoreError::Destination(_)) && chain(&full).contains("disk.raw.part"),
            "{}",
            chain(&full)
        );
        assert_eq!(names(folder.path()), [""; 0]);

        let disk = Arc::new(TestDisk::default());
        disk.free.store(299_999, Ordering::Relaxed);
        let little = restore(&bytes, &source, Arc::new(Shared(disk)), folder.path()).await.unwrap_err();
        assert!(matches!(little, RestoreError::NoSpace { needs: 300_000, free: 299_999, .. }), "{little}");
        assert_eq!(names(folder.path()), [""; 0]);

        let flipped = FakeSource::new(Offer::of(&bytes), [Fault::Flip]);
        let damaged = restore(&bytes, &flipped, Arc::new(RealDisk), folder.path()).await.unwrap_err();
        assert!(matches!(damaged, RestoreError::Copy(ReadError::Damaged { .. })), "{damaged}");
        assert_eq!(names(folder.path()), [""; 0]);

        let hanging = FakeSource::new(Offer::of(&bytes), [Fault::Stall(150_000)]);
        let going = restore(&bytes, &hanging, Arc::new(RealDisk), folder.path());
        let clock = TestClock::at("2026-11-01T12:00:00Z");
        let dropped = clock::timeout(&clock, Duration::from_secs(30), going).await;
        assert!(dropped.is_err());
        assert_eq!(names(folder.path()), [""; 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_comes_to_have_the_name_meanwhile_is_not_replaced() {
        let bytes = image(300_000, 1);
        let folder = tempfile::tempdir().unwrap();
        let theirs = folder.path().join("disk.raw");
        let source = FakeSource::new(Offer::of(&bytes), [Fault::Stall(150_000)]);
        let going = restore(&bytes, &source, Arc::new(RealDisk), folder.path());
        let meanwhile = async {
            TestClock::at("2026-11-01T12:00:00Z").sleep(Duration::from_secs(30)).await;
            replace_file(&RealDisk, &theirs, b"theirs", Access::Owner).unwrap();
        };
        let (restored, ()) = tokio::join!(going, meanwhile);
        assert!(chain(&restored.unwrap_err()).contains("reserve the name"));
        assert_eq!(names(folder.path()), ["disk.raw"]);
        assert!(whole(folder.path(), "disk.raw", b"theirs"));
    }
}
