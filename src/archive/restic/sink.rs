//! An image on its way into a repository: restic reads it from us, and saves a snapshot of it at the end.
//!
//! That snapshot is no copy yet. It is read back and hashed, since restic reuses data that it had stored earlier and does not look
//! whether that is still there; then the snapshot of the manifest makes it one.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::{BoxFuture, join};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinHandle;
use tracing::warn;

use crate::archive::manifest::{ImageRecord, Manifest};
use crate::archive::md5::{Md5, Md5Sum};
use crate::archive::restic::error::{ResticCause, ResticError};
use crate::archive::restic::existing::{Existing, Names};
use crate::archive::restic::repository::{ImageLock, Object, Repository, Writing, read_end};
use crate::archive::transfer::sink::{Sink, SinkError};
use crate::clock::timeout;
use crate::copies::CopyId;
use crate::disk::blocking;
use crate::process::Started;
use crate::text::chain;

/// restic may take no bytes for this long: then this archive has failed, and the others go on.
const STALL_TIMEOUT: Duration = Duration::from_mins(5);

/// How long restic may take at the end of an image, for what it has gathered.
const END_TIMEOUT: Duration = Duration::from_mins(30);

/// How long restic may take to end once it is asked to.
const KILL_AFTER: Duration = Duration::from_secs(10);

/// Bytes that are read back at once.
const CHUNK_BYTES: usize = 1 << 20;

/// The end of what restic says: the line of its summary is far shorter.
type Said = JoinHandle<String>;

/// The backup of one image, as an output of its download.
pub(super) struct ResticSink {
    repository: Arc<Repository>,
    names: Names,
    id: CopyId,
    /// The files that had the names of the copy before.
    before: Existing,
    backup: Option<Backup>,
    lock: ImageLock,
}

/// A restic that reads from us. Dropped, it is killed before its input ends.
struct Backup {
    writing: Writing,
    stdout: Said,
    stderr: Said,
    bytes: u64,
}

impl ResticSink {
    pub(super) fn new(
        repository: Arc<Repository>,
        names: Names,
        id: CopyId,
        before: Existing,
        lock: ImageLock,
    ) -> Self {
        Self { repository, names, id, before, backup: None, lock }
    }

    fn error(&self, cause: impl Into<ResticCause>) -> ResticError {
        self.repository.error("store an image", cause)
    }

    async fn begin(&mut self) -> Result<(), ResticError> {
        let mut writing = self.repository.begin_image(&self.names.image, self.id.created_at).await?;
        let nothing = || Box::pin(tokio::io::empty());
        // They are read beside the rest: a full pipe would stop it.
        let stdout = std::mem::replace(&mut writing.started.stdout, nothing());
        let stderr = std::mem::replace(&mut writing.started.stderr, nothing());
        let (stdout, stderr) = (tokio::spawn(read_end(stdout)), tokio::spawn(read_end(stderr)));
        self.backup = Some(Backup { writing, stdout, stderr, bytes: 0 });
        Ok(())
    }

    async fn take(&mut self, bytes: Bytes) -> Result<(), ResticError> {
        if self.backup.is_none() {
            self.begin().await?;
        }
        let clock = Arc::clone(&self.repository.clock);
        let Some(backup) = &mut self.backup else { return Ok(()) };
        let Some(stdin) = &mut backup.writing.started.stdin else {
            return Err(self.error(ResticCause::Unexpected("it reads nothing".to_owned())));
        };
        backup.bytes += bytes.len() as u64;
        match timeout(&*clock, STALL_TIMEOUT, stdin.write_all(&bytes)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.why_it_ended(error).await),
            Err(too_long) => Err(self.error(too_long)),
        }
    }

    /// The error of a restic that has ended before it had read all.
    async fn why_it_ended(&mut self, error: std::io::Error) -> ResticError {
        let clock = Arc::clone(&self.repository.clock);
        let Some(mut backup) = self.backup.take() else { return self.error(error) };
        let Ok(Ok(status)) = timeout(&*clock, KILL_AFTER, backup.writing.started.process.wait()).await else {
            return self.error(error);
        };
        let stderr = (&mut backup.stderr).await.unwrap_or_default();
        self.error(self.repository.cause(status, &stderr))
    }

    /// Ends a backup without a snapshot: restic must not see the end of its input, which it would take for the image's.
    async fn abort(&mut self) {
        let Some(mut backup) = self.backup.take() else { return };
        let clock = &*self.repository.clock;
        let process = &mut backup.writing.started.process;
        // So it removes its lock.
        process.interrupt();
        if timeout(clock, KILL_AFTER, process.wait()).await.is_err() {
            process.kill();
            let _ = timeout(clock, KILL_AFTER, process.wait()).await;
        }
    }

    async fn publish(&mut self, manifest: Manifest) -> Result<Manifest, ResticError> {
        let expected = manifest.image.bytes;
        let Some(backup) = self.backup.as_ref() else {
            return Err(self.error(ResticCause::Differs("it has no bytes".to_owned())));
        };
        if backup.bytes != expected {
            let why = format!("{} bytes were written of {expected} verified bytes", backup.bytes);
            return Err(self.error(ResticCause::Differs(why)));
        }
        let made = self.end().await?;
        let repository = Arc::clone(&self.repository);
        if let Err(error) = read_back(&repository, &made, &manifest.image).await {
            // Without a manifest it is no copy; this is to leave nothing behind.
            let _ = self.repository.forget(&[made]).await;
            return Err(error);
        }
        let image = ImageRecord { etag: Some(made.tree.as_str().into()), ..manifest.image };
        let manifest = Manifest { image, ..manifest };
        // What was there before may say that the copy is corrupt, and would count more than the new manifest.
        let manifests = self.names.manifests.each_ref().map(|key| &**key);
        let manifests: Vec<Object> = self.before.named(&manifests).collect();
        self.repository.forget(&manifests).await?;
        // The manifest is last: it makes the copy count, so everything else must be there already.
        let (written, listed) = self.repository.put(&self.names.manifest, &manifest.to_bytes()).await?;
        if !listed.iter().any(|object| object.id == made.id) {
            // Another state directory of this machine may have taken it for the rest of an export that ended.
            let what = "its snapshot was deleted before the manifest was written";
            let why = match self.repository.forget(&[written]).await {
                Ok(()) => what.to_owned(),
                Err(error) => format!("{what}, and the manifest stays: {}", chain(&error)),
            };
            return Err(self.error(ResticCause::Differs(why)));
        }
        self.lock.remove_file();
        let images: Vec<Object> = self.before.named(&[&self.names.image]).collect();
        if let Err(error) = self.repository.forget(&images).await {
            // It has no manifest: a leftover, which `archive prune` deletes.
            let name = &self.repository.name;
            warn!(archive = %name, "archive {name}: an older image stays: {}", chain(&error));
        }
        Ok(manifest)
    }

    /// Ends the input of restic, and waits for its snapshot.
    async fn end(&mut self) -> Result<Object, ResticError> {
        let clock = Arc::clone(&self.repository.clock);
        let Some(mut backup) = self.backup.take() else {
            return Err(self.error(ResticCause::Differs("it has no bytes".to_owned())));
        };
        drop(backup.writing.started.stdin.take());
        let ended = timeout(&*clock, END_TIMEOUT, backup.writing.started.process.wait()).await;
        let status = ended.map_err(|error| self.error(error))?.map_err(|error| self.error(error))?;
        let said = (&mut backup.stdout).await.unwrap_or_default();
        if !status.success() {
            let stderr = (&mut backup.stderr).await.unwrap_or_default();
            return Err(self.error(self.repository.cause(status, &stderr)));
        }
        drop(backup);
        self.repository.image_made(&self.names.image, said.as_bytes()).await
    }
}

/// Reads an image back, every byte.
async fn read_back(repository: &Repository, made: &Object, image: &ImageRecord) -> Result<(), ResticError> {
    let (bytes, md5) =
        hash(repository, made).await.map_err(|cause| repository.error("read an image back", cause))?;
    if (bytes, md5) == (image.bytes, image.md5) {
        return Ok(());
    }
    let why = format!(
        "it has {bytes} bytes and the MD5 {md5} instead of {} and {}: data that restic had stored earlier is damaged; `restic \
         check --read-data` finds it",
        image.bytes, image.md5
    );
    Err(repository.error("read an image back", ResticCause::Differs(why)))
}

/// The length and the MD5 of what restic gives of an image.
async fn hash(repository: &Repository, made: &Object) -> Result<(u64, Md5Sum), ResticCause> {
    let clock = &*repository.clock;
    let Started { mut process, mut stdout, stderr, .. } = repository.open_image(made)?;
    let stderr = tokio::spawn(read_end(stderr));
    let (mut md5, mut bytes) = (Md5::new(), 0);
    // One is hashed while the next one is read.
    let [mut read, mut hashed] = [(); 2].map(|()| BytesMut::with_capacity(CHUNK_BYTES));
    loop {
        let reading = async {
            while read.len() < CHUNK_BYTES
                && timeout(clock, STALL_TIMEOUT, stdout.read_buf(&mut read)).await?? > 0
            {}
            Ok::<_, ResticCause>(())
        };
        let hashing = blocking(move || {
            md5.update(&hashed);
            hashed.clear();
            (md5, hashed)
        });
        let (is_read, done) = join(reading, hashing).await;
        is_read?;
        (md5, hashed) = done;
        if read.is_empty() {
            break;
        }
        bytes += read.len() as u64;
        std::mem::swap(&mut read, &mut hashed);
    }
    let status = timeout(clock, KILL_AFTER, process.wait()).await??;
    if !status.success() {
        return Err(repository.cause(status, &stderr.await.unwrap_or_default()));
    }
    Ok((bytes, md5.finish()))
}

fn sink_error(error: ResticError) -> SinkError {
    error.into_sink_error("store in the restic repository")
}

impl Sink for ResticSink {
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
            let published = ResticSink::publish(&mut self, manifest).await;
            if published.is_err() {
                self.abort().await;
            }
            published.map_err(sink_error)
        })
    }

    fn abandon(mut self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(async move { self.abort().await })
    }
}
