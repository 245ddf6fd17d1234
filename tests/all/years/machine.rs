//! The machine beside the platform: its processes, and a witness of every request that they make.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::future::Future;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, pending};
use futures_util::stream;
use http::{HeaderMap, Method, StatusCode};
use jiff::Timestamp;
use serde_json::Value;
use snapwarden::archive::md5::Md5;
use snapwarden::cli::assemble::{self, Seams, Use};
use snapwarden::config::sections::{Config, ServerSettings};
use snapwarden::credentials::Credentials;
use snapwarden::daemon::service::ServiceManager;
use snapwarden::daemon::{Daemon, Loaded, Order};
use snapwarden::disk::{Access, Disk as _, RealDisk, replace_file};
use snapwarden::policy::name::PolicyName;
use snapwarden::process::{Command, Processes, ProgramError, Started};
use snapwarden::run::context::{RunOptions, Runner};
use snapwarden::run::report::RunReport;
use snapwarden::sim::bucket::SimBucket;
use snapwarden::sim::clock::SimClock;
use snapwarden::sim::disk::MemoryDisk;
use snapwarden::sim::processes::SimProcesses;
use snapwarden::sim::randomness::SeededRandomness;
use snapwarden::sim::restic::SimRestic;
use snapwarden::sim::world::{API_KEY, API_SECRET, Somebody, World};
use snapwarden::snapshot::{InstanceId, Snapshot, SnapshotId, SnapshotState, ZoneName};
use snapwarden::telemetry::Telemetry;
use snapwarden::transport::{Reached, Request, Response, Transport, TransportError, read_body};
use tokio::sync::{Notify, mpsc};

use super::book::{Action, Book, End};
use super::fleet::{FOLDER, REPOSITORY, STORE};

/// What a listing is of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Listing {
    #[default]
    Snapshots,
    Instances,
}

impl Listing {
    /// Its key in the answer.
    fn key(self) -> &'static str {
        match self {
            Self::Snapshots => "snapshots",
            Self::Instances => "instances",
        }
    }

    fn is_asked_for(self, request: &Request) -> bool {
        let path = request.url.path().strip_prefix("/v2/").unwrap_or_default();
        request.method == Method::GET && Some(path) == self.key().strip_suffix('s')
    }
}

/// What a listing says instead of the truth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lie {
    /// What it said the time before.
    Stale,
    /// Each one is there twice.
    Doubled,
    /// Every second one is missing.
    Half,
    /// There is none.
    Empty,
}

/// What goes wrong on the way between a process and the platform.
#[derive(Debug, Clone, Default)]
pub(super) struct Line {
    pub(super) lie: Option<Lie>,
    pub(super) lies_about: Listing,
    /// Before which requests to the platform, by their number, somebody else takes or deletes a snapshot; and a number that says
    /// which.
    pub(super) meddling: Vec<(u64, u64)>,
    /// Requests arrive twice, but for creations.
    pub(super) is_doubling: bool,
    /// Which requests to the bucket fail, by their number, and how.
    pub(super) store_faults: Vec<(u64, StoreFault)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StoreFault {
    Unreachable,
    LostAnswer,
    Busy,
    Denied,
}

/// The machine.
pub(super) struct Machine {
    pub(super) world: World,
    pub(super) clock: SimClock,
    pub(super) zones: Vec<ZoneName>,
    pub(super) disk: MemoryDisk,
    pub(super) bucket: SimBucket,
    pub(super) restic: SimRestic,
    pub(super) book: Arc<Mutex<Book>>,
    /// For ids and jitter: each process draws others.
    started: AtomicU64,
}

/// A process of the program. Dropped, it is dead: nothing of it reaches anything any more.
pub(super) struct Process {
    pub(super) witness: Arc<Witness>,
    seams: Seams,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.witness.is_dead.store(true, Ordering::Relaxed);
    }
}

impl Machine {
    pub(super) fn new(seed: u64, zones: &[&str], keeps_versions: bool, start: Timestamp) -> Self {
        let clock = SimClock::starting_at(start);
        let world = World::new(Arc::new(clock.clone()), seed);
        let zones = zones.iter().map(|name| world.add_zone(name)).collect();
        let disk = MemoryDisk::new();
        disk.create_dir_all(Path::new(FOLDER), Access::Owner).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        let bucket = SimBucket::new(Arc::new(clock.clone()), keeps_versions);
        let restic = SimRestic::default();
        restic.init(REPOSITORY);
        let book = Arc::default();
        Self { world, clock, zones, disk, bucket, restic, book, started: AtomicU64::new(seed << 20) }
    }

    pub(super) fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes down all that is there, if this life is compared with another.
    pub(super) fn trace(&self) {
        let mut book = self.book();
        // The port is whichever is free.
        let is_traced = |path: &Path| path.file_name().is_none_or(|name| name != "daemon.json");
        for (path, bytes) in
            self.disk.files(Path::new(FOLDER)).into_iter().filter(|(path, _)| is_traced(path))
        {
            book.trace(|| format!("{}: {}", path.display(), shown(&bytes)));
        }
        for (key, bytes) in self.bucket.contents() {
            book.trace(|| format!("{key}: {}", shown(&bytes)));
        }
        self.restic.with(REPOSITORY, |all| {
            for one in &all.snapshots {
                book.trace(|| format!("{} {}: {}", one.id, one.path, shown(&one.bytes)));
            }
        });
        for one in self.zones.iter().flat_map(|zone| self.world.snapshots(zone)) {
            book.trace(|| format!("{one:?}"));
        }
    }

    /// A process that is about to start, with its state in this folder.
    pub(super) fn process(&self, state: &str, line: Line) -> Process {
        let witness = Arc::new(Witness {
            world: self.world.clone(),
            zones: self.zones.clone(),
            bucket: self.bucket.clone(),
            restic: self.restic.clone(),
            disk: self.disk.clone(),
            book: Arc::clone(&self.book),
            state: Path::new(FOLDER).join(state),
            line,
            listings: Mutex::default(),
            store_requests: AtomicU64::new(0),
            api_requests: AtomicU64::new(0),
            policy: Mutex::default(),
            said_before: Mutex::default(),
            is_dead: AtomicBool::new(false),
        });
        let clock: Arc<SimClock> = Arc::new(self.clock.clone());
        let programs = SimProcesses::new(clock.clone());
        programs.install_tool("restic", Arc::new(self.restic.clone()));
        let seams = Seams {
            transport: witness.clone(),
            disk: Arc::new(self.disk.clone()),
            clock,
            randomness: Arc::new(SeededRandomness::new(self.started.fetch_add(1, Ordering::Relaxed))),
            processes: Arc::new(Mortal { programs, witness: witness.clone() }),
            host: "backup-1".into(),
        };
        Process { witness, seams }
    }
}

impl Process {
    pub(super) fn runner(&self, config: &Config, purpose: Use) -> Option<Runner> {
        let credentials = Credentials::new(API_KEY, API_SECRET, None).unwrap();
        assemble::runner(config, credentials, &self.seams, purpose).ok()
    }

    /// Runs policies, one after the other, as `once` does; the reports of those that ended.
    pub(super) async fn once(
        &self,
        config: &Config,
        slot: Timestamp,
        is_backward: bool,
        reports: &Mutex<Vec<RunReport>>,
    ) {
        let Some(runner) = self.runner(config, Use::Changing) else { return };
        let options = RunOptions { slot: Some(slot), ..RunOptions::default() };
        let mut config = config.clone();
        if assemble::heed_pauses(&mut config, &self.seams).await.is_err() {
            return;
        }
        let mut due: Vec<_> = config.policies.iter().filter(|policy| policy.enabled).collect();
        if is_backward {
            due.reverse();
        }
        for policy in due {
            self.witness.begin(Some(&policy.name));
            if let Ok(report) = runner.run(policy, &options).await {
                self.witness.book().end_run(&report);
                reports.lock().unwrap().push(report);
            }
        }
    }

    /// Runs the daemon for so long, then asks it to stop. In between it may be asked to read another configuration.
    pub(super) async fn daemon(&self, config: &Config, lasts: Duration, reloaded: Option<Arc<Config>>) {
        let load = |process: &Self, config: &Config| {
            let server = ServerSettings {
                listen: "127.0.0.1:0".parse().unwrap(),
                web_config_file: None,
                shutdown_grace: Duration::from_secs(30),
            };
            let notifiers = (Vec::new(), assemble::wires(&process.seams));
            process.runner(config, Use::Changing).map(|runner| Loaded {
                runner,
                server,
                web: None,
                notifiers,
            })
        };
        let Some(loaded) = load(self, config) else { return };
        self.witness.begin(None);
        let copy = Self { witness: Arc::clone(&self.witness), seams: self.seams.clone() };
        let is_reloaded = reloaded.is_some();
        let load = Box::new(move || {
            let loaded = reloaded.as_ref().and_then(|config| {
                copy.witness.book().configure_anew(config, copy.witness.world.now());
                load(&copy, config)
            });
            loaded.ok_or_else(|| "it cannot be put together".to_owned())
        });
        let clock = self.seams.clock.clone();
        let telemetry = Telemetry::new(clock.clone(), "0", "test");
        let Ok(daemon) = Daemon::open(loaded, load, telemetry, ServiceManager::new(&|_| None, 1)).await
        else {
            return;
        };
        let (orders, receiver) = mpsc::unbounded_channel();
        let stop = async move {
            clock.sleep(lasts / 2).await;
            if is_reloaded {
                let _ = orders.send(Order::Reload);
            }
            clock.sleep(lasts / 2).await;
            let _ = orders.send(Order::Stop);
            pending::<()>().await;
        };
        tokio::select! {
            biased;
            _ = daemon.run(receiver, Arc::new(Notify::new())) => {}
            () = stop => {}
        }
    }
}

/// The files of the audit log as they will survive a crash, the newest last.
pub(super) fn audit_files(disk: &MemoryDisk, state: &Path) -> Vec<Arc<Vec<u8>>> {
    let is_log = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("audit") && name.ends_with(".jsonl")
    };
    disk.safe_files(state).into_iter().filter(|(path, _)| is_log(path)).map(|(_, bytes)| bytes).collect()
}

/// Whether a line of the audit log says that this is intended, to what has this id.
pub(super) fn is_intention(line: &[u8], action: &str, id: &str) -> bool {
    let line = String::from_utf8_lossy(line);
    line.contains(id)
        && line.contains(&format!("\"action\":\"{action}\""))
        && line.contains("\"outcome\":\"intended\"")
}

/// No two lines are the same, since each has the digest of the one before.
fn digest(line: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    line.hash(&mut hasher);
    hasher.finish()
}

/// Text as it is, and of all else a digest.
fn shown(bytes: &[u8]) -> String {
    std::str::from_utf8(bytes).map_or_else(
        |_| {
            let mut md5 = Md5::new();
            md5.update(bytes);
            format!("{} bytes with the MD5 {}", bytes.len(), md5.finish())
        },
        str::to_owned,
    )
}

/// A future that ends before its next step once it has made this number of them, wherever it waits then.
pub(super) async fn killed_after<F: Future>(steps: u64, future: F) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    let mut left = steps;
    std::future::poll_fn(move |context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        future.as_mut().poll(context).map(Some)
    })
    .await
}

/// A file with the key to the bucket.
pub(super) fn key_file() -> &'static Path {
    static FILE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = FILE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        replace_file(&RealDisk, &path, b"api_key=EXO1\napi_secret=hush\n", Access::Owner).unwrap();
        (folder, path)
    });
    path
}

/// Programs that only a living process can start.
#[derive(Debug)]
struct Mortal {
    programs: SimProcesses,
    witness: Arc<Witness>,
}

impl Processes for Mortal {
    fn find(&self, program: &str) -> Result<PathBuf, ProgramError> {
        self.programs.find(program)
    }

    fn start(&self, command: &Command) -> Result<Started, ProgramError> {
        if self.witness.is_dead.load(Ordering::Relaxed) {
            return Err(ProgramError::NotFound(command.program.clone()));
        }
        self.programs.start(command)
    }

    fn kill_all(&self) {}
}

/// Sees each request of a process before the platform does, and writes down what was true then.
pub(super) struct Witness {
    world: World,
    zones: Vec<ZoneName>,
    bucket: SimBucket,
    restic: SimRestic,
    disk: MemoryDisk,
    book: Arc<Mutex<Book>>,
    state: PathBuf,
    line: Line,
    listings: Mutex<BTreeMap<String, Bytes>>,
    store_requests: AtomicU64,
    api_requests: AtomicU64,
    policy: Mutex<Option<PolicyName>>,
    /// The lines of the audit log from before the run.
    said_before: Mutex<HashSet<u64>>,
    is_dead: AtomicBool,
}

impl std::fmt::Debug for Witness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Witness").field("line", &self.line).finish_non_exhaustive()
    }
}

impl Witness {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A policy begins to run; any may, where none is named.
    fn begin(&self, policy: Option<&PolicyName>) {
        *self.policy.lock().unwrap() = policy.cloned();
        let files = audit_files(&self.disk, &self.state);
        let lines = files.iter().flat_map(|bytes| bytes.split(|byte| *byte == b'\n'));
        *self.said_before.lock().unwrap() = lines.map(digest).collect();
        self.book().begin_run(policy, self.world.now());
    }

    /// Whether a line of this run that will survive a crash says that this was intended.
    fn is_written(&self, action: Action, id: &str) -> bool {
        let said_before = self.said_before.lock().unwrap();
        let is_new = |line: &[u8]| !said_before.contains(&digest(line));
        audit_files(&self.disk, &self.state)
            .iter()
            .rev()
            .flat_map(|bytes| bytes.rsplit(|byte| *byte == b'\n'))
            .any(|line| is_intention(line, action.in_log(), id) && is_new(line))
    }

    async fn of_the_api(&self, request: Request) -> Result<Response, TransportError> {
        self.meddle();
        let zone = self
            .zones
            .iter()
            .find(|zone| request.url.host_str().is_some_and(|host| host.contains(zone.as_str())));
        let change = zone.zip(Action::of(&request));
        if let Some((zone, (action, id))) = &change {
            if !self.is_written(*action, id) {
                self.book().unwritten.push(format!("{} {}", request.method, request.url.path()));
            }
            if *action == Action::DeleteTemplate {
                self.book().note_template_deletion(id, &self.world.templates(zone), self.world.now());
            }
            if *action == Action::Delete {
                let policy = self.policy.lock().unwrap().clone();
                let stores = (&self.disk, &self.bucket, &self.restic);
                self.book().note_deletion(policy, id, zone, (&self.world, &self.zones), stores);
            }
        }
        let creating = match &change {
            Some((zone, (Action::Create, _))) => Some(Creating::begin(self, zone)),
            _ => None,
        };
        let is_listing = self.line.lies_about.is_asked_for(&request);
        let is_doubled = self.line.is_doubling
            && request.headers.contains_key(http::header::AUTHORIZATION)
            && !matches!(change, Some((_, (Action::Create | Action::Promote, _))));
        let host = request.url.host_str().unwrap_or_default().to_owned();
        if is_doubled {
            drop(self.world.send(request.clone()).await);
        }
        let answer = self.world.send(request).await;
        drop(creating);
        match (self.line.lie, answer) {
            (Some(lie), Ok(answer)) if is_listing && answer.status == StatusCode::OK => {
                self.lied(lie, host, answer).await
            }
            (_, answer) => answer,
        }
    }

    /// Somebody else takes or deletes a snapshot.
    fn meddle(&self) {
        let number = self.api_requests.fetch_add(1, Ordering::Relaxed);
        let now = self.world.now();
        for (_, which) in self.line.meddling.iter().filter(|(at, _)| *at == number) {
            let mut book = self.book();
            book.remember(&self.world, &self.zones);
            let one_of = |count: usize| usize::try_from(which / 2).unwrap() % count.max(1);
            if which % 2 == 0 {
                let instances: Vec<InstanceId> = book.instances.keys().copied().collect();
                let Some(instance) = instances.get(one_of(instances.len())) else { continue };
                let id = self.world.add_snapshot(*instance, now);
                book.meddled.insert(id);
            } else {
                let all = self.zones.iter().flat_map(|zone| self.world.snapshots(zone));
                let lasting: Vec<Snapshot> = all.filter(|one| one.state == SnapshotState::Exported).collect();
                let Some(one) = lasting.get(one_of(lasting.len())) else { continue };
                let by = Somebody::User("ops@example.org".to_owned());
                self.world.delete_snapshot_as(one.id, by, "192.0.2.7");
                book.ends.insert(one.id, (End::Somebody("192.0.2.7".to_owned()), now));
                book.meddled.insert(one.id);
            }
            book.remember(&self.world, &self.zones);
        }
    }

    /// The listing that arrives instead of this one.
    async fn lied(&self, lie: Lie, host: String, answer: Response) -> Result<Response, TransportError> {
        let Response { status, mut headers, body } = answer;
        let Ok(body) = read_body(body, 1 << 24).await else {
            return Err(TransportError::new(Reached::Unknown, "the answer is cut"));
        };
        let body = match lie {
            Lie::Stale => self.listings.lock().unwrap().entry(host).or_insert(body).clone(),
            _ => match serde_json::from_slice::<Value>(&body) {
                Ok(mut json) => {
                    if let Some(all) = json.get_mut(self.line.lies_about.key()).and_then(Value::as_array_mut)
                    {
                        *all = match lie {
                            Lie::Doubled => all.iter().flat_map(|one| [one.clone(), one.clone()]).collect(),
                            Lie::Half => all.iter().step_by(2).cloned().collect(),
                            _ => Vec::new(),
                        };
                    }
                    json.to_string().into()
                }
                Err(_) => body,
            },
        };
        headers.remove(http::header::CONTENT_LENGTH);
        Ok(Response { status, headers, body: Box::pin(stream::iter([Ok(body)])) })
    }

    async fn of_the_store(&self, request: Request) -> Result<Response, TransportError> {
        let number = self.store_requests.fetch_add(1, Ordering::Relaxed);
        let fault = self.line.store_faults.iter().find(|(at, _)| *at == number).map(|(_, fault)| *fault);
        let refused = |status, code: &str| {
            let text = format!("<Error><Code>{code}</Code><Message>simulated</Message></Error>");
            let body = Box::pin(stream::iter([Ok(Bytes::from(text))]));
            Ok(Response { status, headers: HeaderMap::new(), body })
        };
        match fault {
            Some(StoreFault::Unreachable) => Err(TransportError::new(Reached::Nothing, "no connection")),
            Some(StoreFault::Busy) => refused(StatusCode::SERVICE_UNAVAILABLE, "SlowDown"),
            Some(StoreFault::Denied) => refused(StatusCode::FORBIDDEN, "AccessDenied"),
            Some(StoreFault::LostAnswer) => {
                drop(self.bucket.send(request).await);
                Err(TransportError::new(Reached::Unknown, "the answer is lost"))
            }
            None => self.bucket.send(request).await,
        }
    }
}

/// Notes what a creation makes, also if the process is killed while it waits for the answer.
struct Creating<'a> {
    witness: &'a Witness,
    zone: &'a ZoneName,
    before: BTreeSet<SnapshotId>,
}

impl<'a> Creating<'a> {
    fn begin(witness: &'a Witness, zone: &'a ZoneName) -> Self {
        let before = witness.world.snapshots(zone).iter().map(|one| one.id).collect();
        Self { witness, zone, before }
    }
}

impl Drop for Creating<'_> {
    fn drop(&mut self) {
        let made = self.witness.world.snapshots(self.zone).into_iter().map(|one| one.id);
        // Another request may have seen the same.
        let mut book = self.witness.book();
        let made: Vec<SnapshotId> =
            made.filter(|id| !self.before.contains(id) && !book.meddled.contains(id)).collect();
        for id in made {
            if let Some(known) = book.known.get_mut(&id) {
                known.is_ours = true;
            }
            book.creations.insert(id);
        }
    }
}

impl Transport for Witness {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        Box::pin(async move {
            if self.is_dead.load(Ordering::Relaxed) {
                return pending().await;
            }
            let asked = format!("{} {}", request.method, request.url);
            self.book().trace(|| {
                let Request { headers, body, .. } = &request;
                format!("{} {asked} {headers:?} {}", self.world.now(), String::from_utf8_lossy(body))
            });
            let answer = if request.url.host_str() == Some(STORE) {
                self.of_the_store(request).await
            } else {
                self.of_the_api(request).await
            };
            self.book().trace(|| format!("{} {asked}: {answer:?}", self.world.now()));
            answer
        })
    }
}
