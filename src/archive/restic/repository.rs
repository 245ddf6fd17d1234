//! A repository of restic: the calls of the program, and what it answers.

use std::collections::{BTreeMap, HashSet};
use std::fmt::{self, Debug};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::{join, join3};
use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{OwnedRwLockReadGuard, RwLock, RwLockWriteGuard};

use crate::archive::restic::error::{ResticCause, ResticError};
use crate::clock::{Clock, timeout};
use crate::disk::{Access, Disk, DiskLock, blocking, create_folders};
use crate::policy::name::ArchiveName;
use crate::process::{Command, Output, Processes, Started};
use crate::text::json_error;

/// Marks the snapshots that are files of an archive of ours, in a repository that may hold others.
const TAG: &str = "snapwarden";

/// How long a call may take that reads or writes little. Opening a repository takes half a second of computing, and a listing
/// of 5,000 snapshots one; the rest is for slow lines.
const CALL_TIMEOUT: Duration = Duration::from_mins(10);

/// How long what deletes data may take: it reads and writes up to [`REPACK_MAX`].
const PRUNE_TIMEOUT: Duration = Duration::from_hours(6);

/// What `prune` may leave unused, and write anew at a time: bounded, so that one call does not read a whole repository.
const UNUSED_MAX: &str = "10%";
const REPACK_MAX: &str = "4G";

/// The pauses in seconds before a repository is listed again of which restic could not read a snapshot.
const UNREAD_PAUSES: [u64; 2] = [1, 5];

/// The pauses between attempts while another process has the repository locked, in seconds: two minutes and a half in all.
const LOCKED_PAUSES: [u64; 5] = [5, 10, 20, 40, 75];

/// The most bytes of a listing: some 400 for each of half a million snapshots.
const LISTING_BYTES_MAX: usize = 256 << 20;

/// The most bytes of what restic says of its work.
const SAID_BYTES_MAX: usize = 1 << 20;

/// The most bytes of an error that are kept, from its end.
const STDERR_BYTES_MAX: usize = 8 << 10;

/// Which repository, and how restic is started.
#[derive(Debug, Clone)]
pub struct ResticSettings {
    /// As restic takes it in `RESTIC_REPOSITORY`; it may hold a password.
    pub repository: SecretString,
    /// The file with the repository's password.
    pub password_file: PathBuf,
    /// The program: an absolute path, or a name to be found in `PATH`.
    pub program: String,
    /// Where restic keeps its cache.
    pub cache: PathBuf,
    /// The folder of the locks of images that are stored or changed: what several processes of this machine share.
    pub locks: PathBuf,
    /// More variables, such as those that its backend needs.
    pub environment: BTreeMap<String, SecretString>,
    /// The name of this machine, with which snapshots are marked.
    pub host: Arc<str>,
}

/// A restic snapshot that is a file of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Object {
    /// The whole id. It names this very content for ever.
    pub(super) id: String,
    /// The id of its tree: of its path, its time and its bytes.
    pub(super) tree: String,
    /// The file's path in the archive.
    pub(super) key: String,
    pub(super) time: Timestamp,
    /// The machine that wrote it.
    pub(super) host: String,
}

/// A snapshot as restic lists it. What it has beside that is of no use here.
#[derive(Debug, Deserialize)]
struct Listed {
    time: Timestamp,
    tree: String,
    #[serde(default)]
    paths: Vec<String>,
    #[serde(default)]
    hostname: String,
    id: String,
}

/// The last line of a backup.
#[derive(Debug, Deserialize)]
struct Summary {
    message_type: String,
    #[serde(default)]
    snapshot_id: String,
}

/// A repository. What adds to it and what reads it may run at once; what deletes has it alone.
pub(super) struct Repository {
    pub(super) name: ArchiveName,
    settings: ResticSettings,
    processes: Arc<dyn Processes>,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) clock: Arc<dyn Clock>,
    in_use: Arc<RwLock<()>>,
    /// The keys of the images that this process stores or changes.
    locked: Mutex<HashSet<String>>,
}

impl Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repository").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Excludes all other work of this process on one image; with a file, also that of other processes that store it, or delete what is
/// left of it, with the same state directory. Dropping it ends that.
pub(super) struct ImageLock {
    key: String,
    repository: Arc<Repository>,
    file: Option<Box<dyn DiskLock>>,
}

impl ImageLock {
    /// Removes the file: of use once there is a copy that counts, which makes a process that has opened it write nothing. Removed
    /// earlier, two processes could hold a lock of this name, each on a file of its own.
    pub(super) fn remove_file(&self) {
        if self.file.is_some() {
            let _ = self.repository.disk.remove_file(&self.repository.lock_path(&self.key));
        }
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        // Before the next one of this process may try it.
        drop(self.file.take());
        self.repository.locked().remove(&self.key);
    }
}

/// What a call gave.
struct Answer {
    stdout: Bytes,
    stderr: String,
    status: String,
    is_success: bool,
}

impl Repository {
    pub(super) fn new(
        name: ArchiveName,
        settings: ResticSettings,
        processes: Arc<dyn Processes>,
        disk: Arc<dyn Disk>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self { name, settings, processes, disk, clock, in_use: Arc::default(), locked: Mutex::default() }
    }

    fn locked(&self) -> MutexGuard<'_, HashSet<String>> {
        self.locked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks an image, unless this process works on it already. Other processes are not excluded.
    pub(super) fn lock_here(self: &Arc<Self>, image_key: &str) -> Option<ImageLock> {
        let is_free = self.locked().insert(image_key.to_owned());
        is_free.then(|| ImageLock { key: image_key.to_owned(), repository: Arc::clone(self), file: None })
    }

    /// Locks an image, unless it is locked already.
    ///
    /// # Errors
    /// [`ResticCause::Busy`] if it is locked, or the disk's error.
    pub(super) async fn lock(self: &Arc<Self>, image_key: &str) -> Result<ImageLock, ResticCause> {
        let mut lock = self.lock_here(image_key).ok_or(ResticCause::Busy)?;
        let (disk, path) = (Arc::clone(&self.disk), self.lock_path(image_key));
        let locked = blocking(move || {
            path.parent().map_or(Ok(()), |folder| create_folders(&*disk, folder, Access::Owner))?;
            disk.lock(&path)
        });
        match locked.await {
            Ok(file) => lock.file = Some(file),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(ResticCause::Busy),
            Err(error) => return Err(ResticCause::Lock(self.lock_path(image_key), error)),
        }
        Ok(lock)
    }

    /// Whether an image is not being stored now. Nothing is written to find that out.
    pub(super) async fn is_free(&self, image_key: &str) -> bool {
        if self.locked().contains(image_key) {
            return false;
        }
        let (disk, path) = (Arc::clone(&self.disk), self.lock_path(image_key));
        blocking(move || match disk.metadata(&path) {
            Err(error) => error.kind() == io::ErrorKind::NotFound,
            Ok(_) => disk.lock(&path).is_ok(),
        })
        .await
    }

    /// The file that is locked for an image. Its name has the snapshot's id, so no two images share one.
    fn lock_path(&self, image_key: &str) -> PathBuf {
        let name = Path::new(image_key).file_name().unwrap_or_default();
        self.settings.locks.join(name).with_extension("lock")
    }

    /// The repository for people.
    pub(super) fn place(&self) -> String {
        without_user(self.settings.repository.expose_secret())
    }

    /// The folder, if the repository is one of this machine.
    pub(super) fn folder(&self) -> Option<PathBuf> {
        let text = self.settings.repository.expose_secret();
        text.starts_with('/').then(|| PathBuf::from(text))
    }

    pub(super) fn host(&self) -> &str {
        &self.settings.host
    }

    pub(super) fn error(&self, doing: &'static str, cause: impl Into<ResticCause>) -> ResticError {
        ResticError::new(doing, &self.place(), cause.into())
    }

    fn command(&self, arguments: &[&str], has_input: bool) -> Command {
        let settings = &self.settings;
        let text = |path: &PathBuf| path.to_string_lossy().into_owned();
        let mut environment: BTreeMap<String, String> = BTreeMap::from([
            // Not among the arguments, which everybody on this machine can see.
            ("RESTIC_REPOSITORY".to_owned(), settings.repository.expose_secret().to_owned()),
            ("RESTIC_PASSWORD_FILE".to_owned(), text(&settings.password_file)),
            ("RESTIC_CACHE_DIR".to_owned(), text(&settings.cache)),
            // `--time` is in the time zone of the process, and errors are in no language but English.
            ("TZ".to_owned(), "UTC".to_owned()),
            ("LANG".to_owned(), "C".to_owned()),
        ]);
        let more = settings.environment.iter();
        environment.extend(more.map(|(name, value)| (name.clone(), value.expose_secret().to_owned())));
        Command {
            program: settings.program.clone(),
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            environment,
            has_input,
        }
    }

    /// What restic wrote to its standard error, without secrets.
    fn redacted(&self, text: &str) -> String {
        let mut text = text.replace(self.settings.repository.expose_secret(), &self.place());
        for value in self.settings.environment.values() {
            let value = value.expose_secret();
            // Shorter ones are numbers and words that stand everywhere.
            if value.len() >= 6 {
                text = text.replace(value, "…");
            }
        }
        without_user(&text)
    }

    /// Starts restic.
    fn start(&self, arguments: &[&str], has_input: bool) -> Result<Started, ResticCause> {
        Ok(self.processes.start(&self.command(arguments, has_input))?)
    }

    /// Calls restic once, with `input` for it to read, and takes up to `max` bytes of what it writes.
    async fn call_once(
        &self,
        arguments: &[&str],
        input: Option<&[u8]>,
        max: usize,
        limit: Duration,
    ) -> Result<Answer, ResticCause> {
        let Started { mut process, stdin, stdout, stderr } = self.start(arguments, input.is_some())?;
        let writing = async {
            if let (Some(mut stdin), Some(input)) = (stdin, input) {
                // It may end before it has read all; its status says why.
                let _ = stdin.write_all(input).await;
                let _ = stdin.shutdown().await;
            }
        };
        let all = join(join3(writing, read_all(stdout, max), read_end(stderr)), process.wait());
        let (((), stdout, stderr), status) = timeout(&*self.clock, limit, all).await?;
        let status = status?;
        Ok(Answer {
            stdout: stdout?,
            stderr: self.redacted(&stderr),
            status: status.to_string(),
            is_success: status.success(),
        })
    }

    /// Calls restic, and returns what it wrote to its standard output.
    async fn call(
        &self,
        doing: &'static str,
        arguments: &[&str],
        input: Option<&[u8]>,
        limits: (usize, Duration),
    ) -> Result<Bytes, ResticError> {
        Ok(self.answer(doing, arguments, input, limits).await?.stdout)
    }

    /// Calls restic; where another process has the repository locked, again, after locks of dead processes were removed.
    async fn answer(
        &self,
        doing: &'static str,
        arguments: &[&str],
        input: Option<&[u8]>,
        (max, limit): (usize, Duration),
    ) -> Result<Answer, ResticError> {
        let mut pauses = LOCKED_PAUSES.into_iter().map(Duration::from_secs);
        loop {
            let answer = self.call_once(arguments, input, max, limit).await;
            let answer = answer.map_err(|cause| self.error(doing, cause))?;
            if answer.is_success {
                return Ok(answer);
            }
            let cause = ResticCause::of(&answer.status, &answer.stderr);
            let pause = if matches!(cause, ResticCause::Locked(_)) { pauses.next() } else { None };
            let Some(pause) = pause else { return Err(self.error(doing, cause)) };
            // It removes those of dead processes of this machine, and of others only once they are stale.
            let _ = self.call_once(&["unlock", "--quiet"], None, 1 << 10, CALL_TIMEOUT).await;
            self.clock.sleep(pause).await;
        }
    }

    /// All files of the archive, in the order of time and id.
    pub(super) async fn list(&self) -> Result<Vec<Object>, ResticError> {
        self.listed("list", &["snapshots", "--json", "--no-lock", "--tag", TAG]).await
    }

    async fn listed(&self, doing: &'static str, arguments: &[&str]) -> Result<Vec<Object>, ResticError> {
        let list = || self.answer(doing, arguments, None, (LISTING_BYTES_MAX, CALL_TIMEOUT));
        let mut pauses = UNREAD_PAUSES.into_iter().map(Duration::from_secs);
        // It ends well all the same, without those snapshots. One that was deleted meanwhile is not listed the next time.
        let answer = loop {
            let answer = list().await?;
            let Some(unread) = ResticCause::unread(&answer.stderr) else { break answer };
            let Some(pause) = pauses.next() else { return Err(self.error(doing, unread)) };
            self.clock.sleep(pause).await;
        };
        // A repository without any snapshot may say `null`.
        let listed: Option<Vec<Listed>> = serde_json::from_slice(&answer.stdout).map_err(|error| {
            let why = json_error(&error);
            self.error(doing, ResticCause::Unexpected(format!("its listing is not valid: {why}")))
        })?;
        let object = |listed: Listed| {
            let [path] = &listed.paths[..] else { return None };
            let key = path.strip_prefix('/')?.to_owned();
            let Listed { id, tree, time, hostname: host, .. } = listed;
            // They become arguments.
            let is_id = |id: &str| id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
            (is_id(&id) && is_id(&tree)).then_some(Object { id, tree, key, time, host })
        };
        let mut objects: Vec<Object> = listed.into_iter().flatten().filter_map(object).collect();
        objects.sort_by(|a, b| (a.time, &a.id).cmp(&(b.time, &b.id)));
        Ok(objects)
    }

    /// The bytes of a file, if they are no more than `max`.
    pub(super) async fn get(&self, object: &Object, max: usize) -> Result<Bytes, ResticError> {
        let _shared = self.in_use.read().await;
        let path = format!("/{}", object.key);
        self.call("read", &["dump", "--", &object.id, &path], None, (max, CALL_TIMEOUT)).await
    }

    /// Writes a file that is small: it, and all files that are there then.
    pub(super) async fn put(&self, key: &str, bytes: &[u8]) -> Result<(Object, Vec<Object>), ResticError> {
        let _shared = self.in_use.read().await;
        let time = time_text(self.clock.now());
        let arguments = self.backup_arguments(key, &time);
        let said = self.call("write", &arguments, Some(bytes), (SAID_BYTES_MAX, CALL_TIMEOUT)).await?;
        let id = self.id_made("write", &said)?;
        let listed = self.list().await?;
        Ok((self.made("write", key, &id, &listed)?, listed))
    }

    fn backup_arguments<'a>(&'a self, key: &'a str, time: &'a str) -> Vec<&'a str> {
        let host = self.host();
        let fixed = ["backup", "--json", "--quiet", "--stdin", "--stdin-filename", key, "--time", time];
        fixed.into_iter().chain(["--host", host, "--tag", TAG]).collect()
    }

    /// The id, or the beginning of it, of the snapshot that a backup says to have made.
    fn id_made(&self, doing: &'static str, said: &[u8]) -> Result<String, ResticError> {
        let lines = said.split(|byte| *byte == b'\n').rev();
        let summary = lines.filter_map(|line| serde_json::from_slice::<Summary>(line).ok());
        let id = summary.filter(|line| line.message_type == "summary").map(|line| line.snapshot_id).next();
        let id = id.filter(|id| id.len() >= 8 && id.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let why = || ResticCause::Unexpected("it did not name the snapshot that it made".to_owned());
        id.ok_or_else(|| self.error(doing, why()))
    }

    /// The snapshot with an id, among those that are listed.
    fn made(
        &self,
        doing: &'static str,
        key: &str,
        id: &str,
        listed: &[Object],
    ) -> Result<Object, ResticError> {
        let found = listed.iter().find(|object| object.id.starts_with(id) && object.key == key).cloned();
        let why = || ResticCause::Unexpected(format!("it does not list the snapshot {id} that it made"));
        found.ok_or_else(|| self.error(doing, why()))
    }

    /// Waits until nothing is read or written, and keeps it so.
    pub(super) async fn alone(&self) -> Alone<'_> {
        Alone { repository: self, _guard: self.in_use.write().await }
    }

    /// Deletes files. That frees no space before [`Self::prune`].
    pub(super) async fn forget(&self, objects: &[Object]) -> Result<(), ResticError> {
        if objects.is_empty() {
            return Ok(());
        }
        self.alone().await.forget(objects).await.map(drop)
    }

    /// Deletes files, and lists those that are there then.
    async fn forget_alone(&self, objects: &[Object]) -> Result<Vec<Object>, ResticError> {
        for some in objects.chunks(100) {
            let ids = some.iter().map(|object| &*object.id);
            let arguments: Vec<&str> = ["forget", "--quiet", "--"].into_iter().chain(ids).collect();
            self.call("delete", &arguments, None, (SAID_BYTES_MAX, CALL_TIMEOUT)).await?;
        }
        // It ends well also where it has deleted nothing.
        let left = self.list().await?;
        match left.iter().find(|left| objects.iter().any(|object| object.id == left.id)) {
            Some(left) => {
                let why = format!("restic reports success, but the snapshot {} is still listed", left.id);
                Err(self.error("delete", ResticCause::Differs(why)))
            }
            None => Ok(left),
        }
    }

    /// Frees the space of what was deleted, as far as one bounded call does.
    pub(super) async fn prune(&self) -> Result<(), ResticError> {
        let _alone = self.in_use.write().await;
        let arguments = ["prune", "--quiet", "--max-unused", UNUSED_MAX, "--max-repack-size", REPACK_MAX];
        self.call("prune", &arguments, None, (SAID_BYTES_MAX, PRUNE_TIMEOUT)).await.map(drop)
    }

    /// Begins to write an image that was taken at `time`.
    pub(super) async fn begin_image(&self, key: &str, time: Timestamp) -> Result<Writing, ResticError> {
        let shared = Arc::clone(&self.in_use).read_owned().await;
        let time = time_text(time);
        let started = self.start(&self.backup_arguments(key, &time), true);
        let started = started.map_err(|cause| self.error("store an image", cause))?;
        Ok(Writing { started, _shared: shared })
    }

    /// Opens the bytes of an image.
    pub(super) fn open_image(&self, object: &Object) -> Result<Started, ResticCause> {
        let path = format!("/{}", object.key);
        self.start(&["dump", "--", &object.id, &path], false)
    }

    /// Why restic ended, by its status and what it wrote.
    pub(super) fn cause(&self, status: std::process::ExitStatus, stderr: &str) -> ResticCause {
        ResticCause::of(&status.to_string(), &self.redacted(stderr))
    }

    /// The snapshot that the backup of an image made.
    pub(super) async fn image_made(&self, key: &str, said: &[u8]) -> Result<Object, ResticError> {
        let doing = "store an image";
        let id = self.id_made(doing, said)?;
        let listed = self.listed(doing, &["snapshots", "--json", "--no-lock", "--", &id]).await?;
        self.made(doing, key, &id, &listed)
    }
}

/// A repository in which this process does nothing else.
pub(super) struct Alone<'a> {
    repository: &'a Repository,
    _guard: RwLockWriteGuard<'a, ()>,
}

impl Alone<'_> {
    /// Deletes files, and lists those that are there then. That frees no space.
    pub(super) async fn forget(&self, objects: &[Object]) -> Result<Vec<Object>, ResticError> {
        self.repository.forget_alone(objects).await
    }
}

/// A backup that reads an image from us. Until it has ended, nothing is deleted in the repository.
pub(super) struct Writing {
    pub(super) started: Started,
    _shared: OwnedRwLockReadGuard<()>,
}

/// A time as `--time` takes it.
fn time_text(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// A text in which addresses such as `rest:https://user:password@host` have no user any more.
fn without_user(text: &str) -> String {
    let mut rest = text;
    let mut shown = String::with_capacity(text.len());
    while let Some((before, after)) = rest.split_once("://") {
        shown.push_str(before);
        shown.push_str("://");
        let end = after.find(|c: char| c == '/' || c.is_whitespace()).unwrap_or(after.len());
        let (host, after) = after.split_at(end);
        match host.rsplit_once('@') {
            Some((_, host)) => shown.extend(["…@", host]),
            None => shown.push_str(host),
        }
        rest = after;
    }
    shown.push_str(rest);
    shown
}

/// Everything that a program writes, if it is no more than `max` bytes; the rest is read and dropped.
async fn read_all(mut output: Output, max: usize) -> std::io::Result<Bytes> {
    let mut bytes = BytesMut::new();
    let mut is_too_long = false;
    loop {
        let count = output.read_buf(&mut bytes).await?;
        if count == 0 {
            break;
        }
        if bytes.len() > max {
            is_too_long = true;
            bytes.clear();
        }
    }
    if is_too_long {
        return Err(std::io::Error::other(format!("it has more than {max} bytes")));
    }
    Ok(bytes.freeze())
}

/// The end of what a program writes, as text.
pub(super) async fn read_end(mut output: Output) -> String {
    let mut bytes = BytesMut::new();
    while output.read_buf(&mut bytes).await.is_ok_and(|count| count > 0) {
        if bytes.len() > 2 * STDERR_BYTES_MAX {
            bytes = bytes.split_off(bytes.len() - STDERR_BYTES_MAX);
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
