//! The way back: a copy's bytes are read again, proved by their MD5, and given to a new file or to another archive.
//!
//! Nothing of the copy is changed, whatever is found. A file gets its name only once every byte of it is proved and
//! safe; until then it is a `.part` beside it, and nothing that is there is ever overwritten.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream;

use crate::archive::Archive;
use crate::archive::catalogue::StoredCopy;
use crate::archive::manifest::Manifest;
use crate::archive::md5::Md5Sum;
use crate::archive::proof::VerifiedCopy;
use crate::archive::qcow2::Qcow2Error;
use crate::archive::s3::client::S3Error;
use crate::archive::s3::{ImageOf, S3Archive};
use crate::archive::sink::{Begin, Sink, SinkError, shown};
use crate::archive::source::{ImageFacts, ImageSource, ImageStream, SourceError};
use crate::archive::transfer::download::{Download, DownloadError, Output, Outputs};
use crate::archive::transfer::part_file::PartFile;
use crate::disk::{Access, Disk, DiskFile, Open, blocking};
use crate::policy::ArchiveName;
use crate::transport::{Body, Reached, TransportError};

/// So much is read from a disk at once.
const READ_BYTES: usize = 256 << 10;

/// Why a copy did not come back. The copy is as it was, and so is whatever was there before.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The name of the file to be is no name.
    #[error("`{}` is no name of a file", shown(.0))]
    NoName(PathBuf),
    /// Something has the name already.
    #[error(
        "{} is there already, and nothing is overwritten: give another name, or move it away", shown(.0)
    )]
    Taken(PathBuf),
    /// Something has the name that the file has on the way.
    #[error(
        "{} is in the way: it may be of a restore that goes on, or of one that was stopped; if none goes on, remove it",
        shown(.0)
    )]
    InTheWay(PathBuf),
    /// It would not fit.
    #[error("the image has {needs} bytes, and {free} are free in {}: make room there, or restore it elsewhere", shown(.folder))]
    NoRoom {
        /// Where.
        folder: PathBuf,
        /// In bytes.
        needs: u64,
        /// In bytes.
        free: u64,
    },
    /// Where it should go failed on the way.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The copy can't be read.
    #[error("read the copy in archive `{archive}`")]
    Unreadable {
        /// The archive.
        archive: ArchiveName,
        /// Why.
        #[source]
        source: DownloadError,
    },
    /// The bytes are not those that were proved.
    #[error(
        "the copy in archive `{archive}` is damaged: its MD5 is {found} where its manifest says {expected}; nothing of \
         it was given out"
    )]
    Damaged {
        /// The archive.
        archive: ArchiveName,
        /// By the manifest.
        expected: Md5Sum,
        /// Of the bytes.
        found: Md5Sum,
    },
    /// The other archive can't be asked.
    #[error("store it in archive `{archive}`")]
    Through {
        /// The archive that it should go to.
        archive: ArchiveName,
        /// Why.
        #[source]
        source: Box<S3Error>,
    },
}

impl RestoreError {
    /// Whether it is the copy's fault, so that one in another archive may serve.
    pub fn is_of_the_copy(&self) -> bool {
        matches!(self, Self::Unreadable { .. } | Self::Damaged { .. })
    }
}

impl Archive {
    /// The bytes of a copy that it holds, for bringing it back.
    pub fn image(&self, copy: &StoredCopy) -> Box<dyn ImageSource> {
        match self {
            Self::Local(archive) => Box::new(LocalImage {
                disk: Arc::clone(&archive.disk),
                path: copy.image.clone(),
                md5: copy.manifest.image.md5,
            }),
            Self::S3(archive) => Box::new(archive.image(copy)),
        }
    }
}

/// The image of a copy in a folder, to be read like one of the service.
#[derive(Debug)]
struct LocalImage {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    md5: Md5Sum,
}

impl ImageSource for LocalImage {
    fn facts(&self) -> ImageFacts {
        ImageFacts { md5: Some(self.md5.to_string()) }
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
                io::Result::Ok((file, total))
            });
            let (file, total) = opened.await.map_err(|error| SourceError::Refused(Box::new(error)))?;
            let end = until.unwrap_or(total).min(total);
            let body = pieces(file, offset, end);
            Ok(ImageStream { offset, is_part: true, total: Some(total), etag: None, body })
        })
    }

    /// A file needs no new address.
    fn renew(&self) -> BoxFuture<'_, Result<(), SourceError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// The bytes of a file from one place to another.
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
                TransportError::because(Reached::Unknown, "the disk can't read it", error)
            })?;
            let next = at + buffer.len() as u64;
            Ok((!buffer.is_empty()).then(|| (Bytes::from(buffer), next)))
        }
    };
    Box::pin(stream::try_unfold(from, piece))
}

/// What came back, and what is odd about it although every byte is proved.
#[derive(Debug)]
pub struct Restored {
    /// The copy that served: it was read whole, and proved again.
    pub copy: VerifiedCopy,
    /// The file does not read as a sound qcow2 image.
    pub unsound: Option<Qcow2Error>,
}

/// Copies the image that `download` reads to a new file: proved, synced, and only then given its name.
///
/// # Errors
/// [`RestoreError`]. Nothing has the name then that had not before, and what was begun is removed.
pub async fn to_file(
    archive: &ArchiveName,
    copy: &StoredCopy,
    download: &Download<'_>,
    disk: &Arc<dyn Disk>,
    to: &Path,
) -> Result<Restored, RestoreError> {
    let (theirs, path, needs) = (Arc::clone(disk), to.to_owned(), copy.manifest.image.bytes);
    let (name, part) = (archive.clone(), blocking(move || Part::begin(theirs, path, needs)).await?);
    give(archive, &copy.manifest, download, Box::new(FileSink::new(name, part))).await
}

/// Copies the image that `download` reads into a bucket, where it is a verified copy like any other; one that is there
/// already is left as it is.
///
/// # Errors
/// [`RestoreError`]; the bucket holds nothing new then.
pub async fn into_bucket(
    archive: &ArchiveName,
    copy: &StoredCopy,
    download: &Download<'_>,
    bucket: &S3Archive,
) -> Result<VerifiedCopy, RestoreError> {
    let manifest = &copy.manifest;
    let of = ImageOf {
        zone: manifest.zone.clone(),
        instance_id: manifest.instance.id,
        created_at: manifest.snapshot.created_at,
        snapshot_id: manifest.snapshot.id,
    };
    let begun = bucket.begin(&of).await;
    match begun.map_err(|source| RestoreError::Through {
        archive: bucket.name().clone(),
        source: Box::new(source),
    })? {
        Begin::Stored(copy) => Ok(copy),
        Begin::Sink(sink, _) => {
            let manifest = Manifest { verified_at: download.clock.now(), ..manifest.clone() };
            give(archive, &manifest, download, sink).await.map(|restored| restored.copy)
        }
    }
}

/// Gives the bytes to a sink, and lets it publish them if they are proved.
async fn give(
    archive: &ArchiveName,
    manifest: &Manifest,
    download: &Download<'_>,
    sink: Box<dyn Sink>,
) -> Result<Restored, RestoreError> {
    let mut outputs = Outputs {
        open: vec![Output { archive: archive.clone(), sink, resumable: None }],
        failed: Vec::new(),
    };
    let why = match download.fetch(&mut outputs, false).await {
        Ok(fetched) if fetched.md5 == fetched.expected => match outputs.open.pop() {
            Some(Output { sink, .. }) => {
                let copy = sink.publish(manifest.clone()).await?;
                return Ok(Restored { copy, unsound: fetched.qcow2.err() });
            }
            None => RestoreError::Unreadable { archive: archive.clone(), source: DownloadError::NoArchive },
        },
        Ok(fetched) => {
            RestoreError::Damaged { archive: archive.clone(), expected: fetched.expected, found: fetched.md5 }
        }
        Err(source) => match outputs.failed.pop() {
            Some((_, error)) => RestoreError::Sink(error),
            None => RestoreError::Unreadable { archive: archive.clone(), source },
        },
    };
    for Output { sink, .. } in outputs.open {
        sink.abandon().await;
    }
    Err(why)
}

/// The file on its way. Dropped before it has its name, it is removed.
#[derive(Debug)]
struct Part {
    disk: Arc<dyn Disk>,
    to: PathBuf,
    path: PathBuf,
    file: Arc<dyn DiskFile>,
    is_named: bool,
}

impl Part {
    /// Makes the `.part`, if nothing is in the way and there is room.
    fn begin(disk: Arc<dyn Disk>, to: PathBuf, needs: u64) -> Result<Self, RestoreError> {
        let Some(name) = to.file_name() else { return Err(RestoreError::NoName(to)) };
        let mut part_name = OsString::from(name);
        part_name.push(".part");
        // A name alone is one in the folder where we are, which a disk has to be told.
        let folder = folder_of(&to);
        let (path, to) = (folder.join(part_name), folder.join(name));
        match disk.metadata(&to) {
            Ok(_) => return Err(RestoreError::Taken(to)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(SinkError::disk("look at", &to, error).into()),
        }
        let folder = folder_of(&to);
        let free = disk.free_bytes(folder).map_err(|error| SinkError::disk("look into", folder, error))?;
        if free < needs {
            return Err(RestoreError::NoRoom { folder: folder.to_owned(), needs, free });
        }
        let file = match disk.open(&path, Open::CreateNew, Access::Owner) {
            Ok(file) => Arc::from(file),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(RestoreError::InTheWay(path));
            }
            Err(error) => return Err(SinkError::disk("make", &path, error).into()),
        };
        Ok(Self { disk, to, path, file, is_named: false })
    }

    /// Makes all bytes safe, and gives the file its name.
    fn name(&mut self, bytes: u64) -> Result<(), SinkError> {
        let failed = |doing, path: &Path, source| SinkError::Disk { doing, path: path.to_owned(), source };
        self.file.sync().map_err(|error| failed("make safe", &self.path, error))?;
        let found = self.file.len().map_err(|error| failed("measure", &self.path, error))?;
        if found != bytes {
            return Err(SinkError::Length { path: self.path.clone(), expected: bytes, found });
        }
        // Whoever takes the name first has it: what has come there meanwhile is not replaced.
        drop(
            self.disk
                .open(&self.to, Open::CreateNew, Access::Owner)
                .map_err(|error| failed("take the name", &self.to, error))?,
        );
        if let Err(error) = self.disk.rename(&self.path, &self.to) {
            let _ = self.disk.remove_file(&self.to);
            return Err(failed("give its name to", &self.path, error));
        }
        self.is_named = true;
        let folder = folder_of(&self.to);
        self.disk.sync_dir(folder).map_err(|error| failed("make safe the name in", folder, error))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.is_named {
            let _ = self.disk.remove_file(&self.path);
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// A new file's end of a download.
struct FileSink {
    archive: ArchiveName,
    part: Part,
    part_file: PartFile,
    position: u64,
}

impl FileSink {
    fn new(archive: ArchiveName, part: Part) -> Self {
        let part_file = PartFile::new(Arc::clone(&part.file), 0);
        Self { archive, part, part_file, position: 0 }
    }

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
            self.part_file.rest().await.map_err(|error| self.failed(error))?;
            let file = Arc::clone(&self.part.file);
            blocking(move || file.set_len(0)).await.map_err(|error| self.failed(error))?;
            self.part_file = PartFile::new(Arc::clone(&self.part.file), 0);
            self.position = 0;
            Ok(())
        })
    }

    fn publish(self: Box<Self>, manifest: Manifest) -> BoxFuture<'static, Result<VerifiedCopy, SinkError>> {
        Box::pin(async move {
            self.part_file.rest().await.map_err(|error| self.failed(error))?;
            let Self { archive, mut part, position, .. } = *self;
            blocking(move || part.name(position)).await?;
            Ok(VerifiedCopy::new(&archive, &manifest))
        })
    }

    /// Bytes of a damaged copy are where that copy is: they are not kept a second time.
    fn keep_bad(&mut self) -> BoxFuture<'_, Result<(), SinkError>> {
        self.restart()
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
    use crate::archive::testing::{
        FakeSource, Fault, NoRandomness, Offer, Shared, TestClock, TestDisk, image, manifest_of,
    };
    use crate::archive::transfer::hash::Hashers;
    use crate::clock::{self, Clock as _};
    use crate::disk::{RealDisk, read_file, replace_file};
    use crate::text::chain;

    /// A copy of these bytes, which a source is to give.
    fn copy_of(bytes: &[u8]) -> StoredCopy {
        StoredCopy { manifest: manifest_of(bytes), image: PathBuf::new(), has_image: true }
    }

    /// Restores what the source gives to `disk.raw` in a folder.
    async fn restore(
        bytes: &[u8],
        source: &FakeSource,
        disk: Arc<dyn Disk>,
        folder: &Path,
    ) -> Result<Restored, RestoreError> {
        let download = Download {
            source,
            clock: &TestClock::at("2026-11-01T12:00:00Z"),
            randomness: &NoRandomness,
            stall_timeout: Duration::from_mins(1),
            connections: 1,
            hashers: &Hashers::default(),
            throttle: None,
            progress: &|_| {},
        };
        let archive = "vault".parse().unwrap();
        to_file(&archive, &copy_of(bytes), &download, &disk, &folder.join("disk.raw")).await
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
        assert!(!full.is_of_the_copy() && chain(&full).contains("disk.raw.part"), "{}", chain(&full));
        assert_eq!(names(folder.path()), [""; 0]);

        let disk = Arc::new(TestDisk::default());
        disk.free.store(299_999, Ordering::Relaxed);
        let little = restore(&bytes, &source, Arc::new(Shared(disk)), folder.path()).await.unwrap_err();
        assert!(matches!(little, RestoreError::NoRoom { needs: 300_000, free: 299_999, .. }), "{little}");
        assert_eq!(names(folder.path()), [""; 0]);

        let flipped = FakeSource::new(Offer::of(&bytes), [Fault::Flip]);
        let damaged = restore(&bytes, &flipped, Arc::new(RealDisk), folder.path()).await.unwrap_err();
        assert!(matches!(damaged, RestoreError::Damaged { .. }) && damaged.is_of_the_copy(), "{damaged}");
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
        assert!(chain(&restored.unwrap_err()).contains("take the name"));
        assert_eq!(names(folder.path()), ["disk.raw"]);
        assert!(whole(folder.path(), "disk.raw", b"theirs"));
    }

    #[tokio::test]
    async fn a_file_is_read_from_any_place_to_any_other() {
        use futures_util::TryStreamExt as _;
        let bytes = image(READ_BYTES * 2 + 17, 1);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        replace_file(&RealDisk, &path, &bytes, Access::Owner).unwrap();
        let md5 = copy_of(&bytes).manifest.image.md5;
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
