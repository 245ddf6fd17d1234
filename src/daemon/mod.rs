//! The long-running service: schedules, the HTTP port, notifications to the service manager.
//!
//! One loop ([`Daemon::run`]): a tick of [`scheduler`] each second, [`timetable`] says which policies are due, each run
//! is a task of its own, and its report is added to `telemetry`, which [`server`] serves. Orders (reload, stop) are
//! received from signals; [`service`] notifies systemd, and
//! [`live`] answers commands of this machine. [`web`] says who may use the port. Nothing here decides about snapshots.

pub mod live;
mod page;
mod passwords;
pub mod scheduler;
pub mod server;
pub mod service;
pub mod timetable;
mod tls;
pub mod web;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio::task::{Id, JoinError, JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::archive::backend::Archive;
use crate::archive::transfer::throttle::Throttle;
use crate::archive::verify::{Outcome, describe};
use crate::clock::timeout;
use crate::config::sections::ServerSettings;
use crate::daemon::server::BindError;
use crate::daemon::service::ServiceManager;
use crate::daemon::timetable::{Ended, Event, Timetable};
use crate::daemon::web::{Access, WebFile};
use crate::disk::{DiskLock, Metadata, begin_blocking};
use crate::policy::name::{ArchiveName, PolicyName};
use crate::policy::{Policy, VerifyPlan};
use crate::retention::deciding_keys::deciding_keys;
use crate::run::archive_verify::ArchiveVerifier;
use crate::run::context::{ConfigurationChanged, RunOptions, Runner};
use crate::run::pauses;
use crate::run::report::{CHANGED, RunReport, RunResult, Step};
use crate::state::allowances::AllowanceOf;
use crate::state::audit::{Action, AuditMark};
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;
use crate::state::history::Change;
use crate::state::last_runs::{LastRun, LastRuns};
use crate::state::schedules::Schedules;
use crate::telemetry::model::PolicyView;
use crate::telemetry::notifications::Notifications;
use crate::telemetry::notifier::{Notifier, Wires};
use crate::telemetry::{DELETED_LAST_MAX, Telemetry};
use crate::text::{chain, counted};

/// The loop turns at least this often, with or without a tick: after the machine's clock was set back the ticker is
/// silent for as long as it was set back.
const TURN: Duration = Duration::from_secs(2);

/// What is done beside the daemon is seen within a minute.
const LOOK_AGAIN: Duration = Duration::from_secs(50);

/// A run that was asked for this long before the daemon started is not begun: it would surprise.
const TRIGGER_LASTS: SignedDuration = SignedDuration::from_hours(1);

/// A run that could not begin for a cause that may pass is tried again after this: time for a disk that is busy or full, and not so
/// often that the log is full of it.
const TRY_AGAIN: SignedDuration = SignedDuration::from_mins(5);

/// A run by hand that began this long before a slot may stand for it: a person may be that early, and its snapshots are hardly older than
/// those of the slot's own run would be.
const EARLY_MAX: SignedDuration = SignedDuration::from_mins(15);

/// How long what is queued for notifiers may take at the end.
const NOTIFY_GRACE: Duration = Duration::from_secs(5);

/// How many policies' files are read and parsed at once: each may be a megabyte in memory.
const READ_AT_ONCE: usize = 2;

/// A clock that is corrected by less is no jump.
const JUMP: SignedDuration = SignedDuration::from_secs(10);

/// A configuration, put together.
#[derive(Debug)]
pub struct Loaded {
    /// For the runs of its policies.
    pub runner: Runner,
    /// The port, and the end.
    pub server: ServerSettings,
    /// Who may use the port; without a file everybody.
    pub web: Option<WebFile>,
    /// Who is notified, with what notifications are sent by.
    pub notifiers: (Vec<Notifier>, Wires),
}

/// Reads the configuration anew; the error is a text for people.
pub type Load = Box<dyn Fn() -> Result<Loaded, String> + Send>;

/// What a signal asks of a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Take over the configuration as it is now.
    Reload,
    /// Finish what is in flight, begin nothing, end.
    Stop,
}

/// How a daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// In order, whether or not all that was in flight has finished in time: the next start resumes it.
    Orderly,
    /// At the second request to stop.
    AtOnce,
}

/// A daemon that could not start; nothing was begun.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// What it must remember can't be used, or another daemon has it.
    #[error(transparent)]
    State(#[from] StateError),
    /// The port can't be opened.
    #[error(transparent)]
    Port(#[from] BindError),
}

/// What was last read of what commands change beside the daemon.
#[derive(Debug, Default)]
struct Beside {
    /// When, on the clock's elapsed time.
    read_at: Duration,
    /// Which version of the last runs of each policy.
    runs: HashMap<PolicyName, Option<Metadata>>,
    /// Which version of what is remembered of the archives.
    archives: Option<Metadata>,
    /// Up to where deletions were read in the audit log; none before the first time.
    deletions: Option<AuditMark>,
}

/// A run that has not ended.
struct Running {
    policy: PolicyName,
    slot: Timestamp,
    /// Whether it was asked for, and was not due.
    is_asked_for: bool,
    changed: ConfigurationChanged,
}

/// A daemon that is ready to run.
pub struct Daemon {
    runner: Arc<Runner>,
    server: ServerSettings,
    load: Load,
    telemetry: Telemetry,
    service: ServiceManager,
    access: Arc<Access>,
    /// Until it is served.
    listener: Option<TcpListener>,
    address: SocketAddr,
    /// Closes the port that is served now.
    close_port: CancellationToken,
    /// Looks whether the web configuration file has changed.
    looking: Option<JoinHandle<()>>,
    timetable: Timetable,
    runs: JoinSet<Result<RunReport, StateError>>,
    /// By the order in which they began.
    running: BTreeMap<Id, Running>,
    /// Up to when the `verify` schedule of each archive was served: from when a daemon first had it, so that one that was
    /// due while no daemon ran is made up for.
    verified_until: BTreeMap<ArchiveName, Timestamp>,
    /// The last verification of each archive that had one.
    verifying: BTreeMap<ArchiveName, JoinHandle<()>>,
    stop: CancellationToken,
    status: String,
    beside: Beside,
    notifications: Option<Notifications>,
    /// Whether the schedules could not be saved; each turn of the loop tries again.
    unsaved: bool,
    /// Why the pauses and triggers could not be read or changed at the last turn of the loop.
    controls_error: Option<String>,
    /// When each run was asked for that waits for another process, or that has begun.
    asked_for: BTreeMap<PolicyName, Timestamp>,
    /// The slots of policies that another process ran when they were due, each with the last run until then. For the timetable
    /// they run until that has ended.
    displaced: BTreeMap<PolicyName, (Timestamp, Option<Uuid>)>,
    _lock: Box<dyn DiskLock>,
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon").finish_non_exhaustive()
    }
}

impl Daemon {
    /// Reads all that is remembered and opens the port, last of all; nothing is begun.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub async fn open(
        loaded: Loaded,
        load: Load,
        telemetry: Telemetry,
        service: ServiceManager,
    ) -> Result<Self, DaemonError> {
        let Loaded { mut runner, server, web, notifiers } = loaded;
        let lock = runner.state.lock_daemon(&*runner.clock).await?;
        pauses::apply(&mut runner.policies, &runner.state.controls().await?.paused);
        let before = runner.state.schedules().await?;
        warn_of_removed(&before, &runner.policies);
        let now = runner.clock.now();
        let timetable = Timetable::new(&runner.policies, &runner.host, &before, now);
        let mut daemon = Self {
            access: Arc::new(Access::new(web, &*runner.randomness)),
            runner: Arc::new(runner),
            address: server.listen,
            server,
            load,
            telemetry,
            service,
            listener: None,
            close_port: CancellationToken::new(),
            looking: None,
            timetable,
            runs: JoinSet::new(),
            running: BTreeMap::new(),
            verified_until: before.archives,
            verifying: BTreeMap::new(),
            stop: CancellationToken::new(),
            status: String::new(),
            beside: Beside::default(),
            notifications: None,
            unsaved: false,
            controls_error: None,
            asked_for: BTreeMap::new(),
            displaced: BTreeMap::new(),
            _lock: lock,
        };
        for policy in &daemon.runner.policies {
            // Before they are read: one that is saved meanwhile is read again.
            let version = daemon.runner.state.last_runs_version(&policy.name).await;
            daemon.beside.runs.insert(policy.name.clone(), version);
        }
        let remembered = remembered(&daemon.runner).await?;
        daemon.configure(&remembered);
        daemon.notifications = Some(daemon.notify_from_now(notifiers));
        daemon.telemetry.reloaded(Ok(()), now);
        daemon.take_port(server::bind(daemon.server.listen).await?).await;
        Ok(daemon)
    }

    /// Where the port is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes a port that was opened, and says so in the state directory. It is not served yet.
    async fn take_port(&mut self, listener: TcpListener) {
        self.address = listener.local_addr().unwrap_or(self.server.listen);
        self.listener = Some(listener);
        if let Err(error) = self.runner.state.set_daemon_address(self.address).await {
            warn!("`snapwarden status` may not find this daemon: {}", chain(&error));
        }
    }

    /// Serves the port that was taken last, and closes the one from before.
    fn serve_port(&mut self) {
        let Some(listener) = self.listener.take() else { return };
        let (telemetry, access) = (self.telemetry.clone(), Arc::clone(&self.access));
        let (clock, stop) = (Arc::clone(&self.runner.clock), CancellationToken::new());
        tokio::spawn(server::serve(listener, telemetry, access, clock, stop.clone()));
        std::mem::replace(&mut self.close_port, stop).cancel();
    }

    /// Runs until an order to stop, then waits for what is in flight, for `shutdown_grace` at most, or until a second
    /// order to stop. Returns which it was.
    pub async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>, tick: Arc<Notify>) -> Ending {
        let clock = Arc::clone(&self.runner.clock);
        let close_socket = CancellationToken::new();
        self.serve_port();
        match live::bind(self.runner.state.path()).await {
            Ok(listener) => {
                let (telemetry, stop) = (self.telemetry.clone(), close_socket.clone());
                tokio::spawn(server::serve_socket(listener, telemetry, Arc::clone(&clock), stop));
            }
            Err(error) => warn!(
                "`snapwarden status --live` can't ask this daemon: no socket in the state directory: {error}"
            ),
        }
        self.telemetry.tick(clock.now());
        self.service.ready(&self.status_now());
        info!(
            "{} {} keeps {}, listens on {}",
            env!("CARGO_PKG_NAME"),
            env!("CARGO_PKG_VERSION"),
            counted(self.runner.policies.iter().filter(|policy| policy.enabled).count(), "policy"),
            self.address,
        );
        self.look_beside().await;
        self.look_at_archives();
        self.look_at_deletions().await;
        // What is new to us is known from now on, however soon we are killed.
        self.save().await;
        let due = self.timetable.look_at_start(clock.now());
        self.follow(due).await;
        let started_at = clock.now();
        let mut seen = [(clock.now(), clock.elapsed()); 2];
        loop {
            // In this order, so that a simulation repeats: none of them has others wait, since every turn does all that
            // follows.
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some(Order::Reload) => self.reload().await,
                    Some(Order::Stop) | None => break,
                },
                Some(ended) = self.runs.join_next_with_id() => self.ended(ended).await,
                _ = timeout(&*clock, TURN, tick.notified()) => {}
            }
            let triggered = self.heed_pauses().await;
            self.make_up_for_displaced().await;
            let due = self.timetable.look(clock.now());
            self.follow(due).await;
            self.heed_triggers(triggered, started_at).await;
            seen = [seen[1], (clock.now(), clock.elapsed())];
            let jump = jump_text(seen);
            if let Some(jump) = &jump {
                warn!("{jump}");
                // The timetable has looked at it; what is shown was computed before.
                self.report_next();
            }
            if self.unsaved || jump.is_some() {
                self.save().await;
            }
            if self.verify_archives(clock.now()) {
                self.save().await;
            }
            if clock.elapsed().saturating_sub(self.beside.read_at) >= LOOK_AGAIN {
                if self.look_beside().await {
                    self.look_at_archives();
                    self.look_at_deletions().await;
                }
                self.notify().await;
            }
            self.look_at_web_file();
            self.telemetry.tick(clock.now());
            self.service.alive();
        }
        let ending = self.drain(&mut orders).await;
        self.close_port.cancel();
        close_socket.cancel();
        // What is left is replaced by the next daemon.
        let _ = live::remove(self.runner.state.path()).await;
        ending
    }

    /// Pauses and resumes what was paused and resumed beside the daemon. Returns which runs were asked for, and when.
    async fn heed_pauses(&mut self) -> BTreeMap<PolicyName, Timestamp> {
        let controls = match self.runner.state.controls_blocking() {
            Ok(controls) => controls,
            Err(error) => {
                self.controls_failed(Some(chain(&error)));
                return BTreeMap::new();
            }
        };
        if pauses::have_changed(&self.runner.policies, &controls.paused) {
            let mut policies = self.runner.policies.clone();
            pauses::apply(&mut policies, &controls.paused);
            for (was, is) in self.runner.policies.iter().zip(&policies) {
                if was.paused_since != is.paused_since {
                    let text = is.paused_text().unwrap_or_else(|| "not paused any more".to_owned());
                    info!(policy.name = %is.name, "policy {} is {text}", is.name);
                }
            }
            self.replace_runner(Runner { policies, ..Runner::clone(&self.runner) }, &HashMap::new());
            self.save().await;
        }
        if controls.triggered.is_empty() {
            self.controls_failed(None);
        }
        controls.triggered
    }

    /// Begins the runs that were due while another process ran their policy, once it has ended, unless that run was one of all
    /// instances that succeeded or was held: else a night would be left out.
    async fn make_up_for_displaced(&mut self) {
        for (name, (slot, before)) in self.displaced.clone() {
            if self.runner.state.is_running(&name).await.unwrap_or_default() {
                continue;
            }
            self.displaced.remove(&name);
            let slot = self.timetable.unserved(&name).map_or(slot, |newest| newest.max(slot));
            // A run of some instances is not remembered. An error is one of the run itself.
            let last = last_run(&self.runner, &name).await.filter(|last| Some(last.run_id) != before);
            let is_done = last.is_some_and(|last| {
                [RunResult::Success, RunResult::Held].iter().any(|result| result.as_str() == last.result)
                    && self.can_stand_for(&name, slot, last.started_at)
            });
            let is_enabled = self.runner.policies.iter().any(|policy| policy.name == name && policy.enabled);
            if is_enabled && !is_done {
                info!(policy.name = %name, "policy {name} runs now, since it was due at {slot}");
                self.timetable.ended(&name, Ended::Again { slot, from: self.runner.clock.now() });
            } else {
                self.timetable.ended(&name, Ended::Done);
                let why = if is_done { "another process has run it" } else { "it is not enabled any more" };
                info!(policy.name = %name, "policy {name}, which was due at {slot}, does not run for that: {why}");
                self.save().await;
            }
        }
    }

    /// Whether a run of the policy that began then and succeeded stands for the slot: its snapshots must not be too old for that.
    fn can_stand_for(&self, name: &PolicyName, slot: Timestamp, began_at: Timestamp) -> bool {
        let creates = self.runner.policies.iter().any(|policy| policy.name == *name && policy.create);
        !creates || slot.duration_since(began_at) <= EARLY_MAX
    }

    /// Begins the runs that were asked for beside the daemon. One whose policy runs, here or in another process, waits for
    /// the end of that run.
    async fn heed_triggers(&mut self, triggered: BTreeMap<PolicyName, Timestamp>, started_at: Timestamp) {
        for (name, asked_at) in triggered {
            if self.running.values().any(|running| running.policy == name)
                || self.displaced.contains_key(&name)
            {
                continue;
            }
            // An error is one of the run itself.
            if self.runner.state.is_running(&name).await.unwrap_or_default() {
                if self.asked_for.insert(name.clone(), asked_at) != Some(asked_at) {
                    info!(policy.name = %name, "policy {name} runs, as asked for at {asked_at}, once another process has run it");
                }
                continue;
            }
            let clock = Arc::clone(&self.runner.clock);
            let asked_at = match self.runner.state.take_trigger(&*clock, name.clone()).await {
                // It may have been asked for once more.
                Ok(Some(taken)) => {
                    self.controls_failed(None);
                    taken
                }
                Ok(None) => continue,
                Err(error) => {
                    self.controls_failed(Some(chain(&error)));
                    continue;
                }
            };
            let policy = self.runner.policies.iter().find(|policy| policy.name == name);
            let is_old = started_at.duration_since(asked_at) > TRIGGER_LASTS;
            let why = match policy {
                None => "the configuration has no such policy".to_owned(),
                Some(policy) if !policy.enabled => {
                    format!("it is {}", policy.paused_text().unwrap_or_else(|| "not enabled".to_owned()))
                }
                Some(_) if is_old => "no daemon ran for an hour after that".to_owned(),
                Some(_) => {
                    info!(policy.name = %name, "policy {name} runs now, as asked for at {asked_at}");
                    let begin = self.timetable.begin_now(&name, asked_at);
                    self.asked_for.insert(name, asked_at);
                    self.follow(begin.into_iter().collect()).await;
                    continue;
                }
            };
            warn!(policy.name = %name, "policy {name} does not run, as asked for at {asked_at}: {why}");
        }
    }

    /// Logs once why pauses and triggers can't be heeded.
    fn controls_failed(&mut self, error: Option<String>) {
        if self.controls_error != error {
            if let Some(error) = &error {
                error!("what was paused or triggered is not known: {error}");
            } else {
                info!("what was paused or triggered is known again");
            }
        }
        self.controls_error = error;
    }

    /// Carries out what the timetable says.
    async fn follow(&mut self, events: Vec<Event>) {
        if events.is_empty() {
            return;
        }
        for event in &events {
            match event {
                Event::Begin(..) => {}
                Event::Skipped(policy, slots) => {
                    warn!(policy.name = %policy, "policy {policy} still runs: {} skipped", runs(*slots));
                    self.telemetry.skipped(policy, *slots);
                }
                Event::Missed(policy, slots) => {
                    warn!(policy.name = %policy, "policy {policy} missed {}", runs(*slots));
                    self.telemetry.missed(policy, *slots);
                }
            }
        }
        // Before anything begins, so that a run that is killed is known to have begun.
        self.save().await;
        for event in events {
            if let Event::Begin(policy, slot) = event {
                self.begin(policy, slot);
            }
        }
        self.report_next();
    }

    fn begin(&mut self, policy: PolicyName, slot: Timestamp) {
        let Some(place) = self.runner.policies.iter().position(|known| known.name == policy) else { return };
        let changed = ConfigurationChanged::default();
        let options = RunOptions {
            slot: Some(slot),
            stop: self.stop.clone(),
            changed: changed.clone(),
            with_details: true,
            ..RunOptions::default()
        };
        self.telemetry.run_begun(&policy, self.runner.clock.now());
        self.notifications.iter().for_each(|notifications| notifications.run_begun(&policy));
        let runner = Arc::clone(&self.runner);
        let task = self.runs.spawn(async move { runner.run(&runner.policies[place], &options).await });
        let is_asked_for = self.asked_for.get(&policy) == Some(&slot);
        self.running.insert(task.id(), Running { policy, slot, is_asked_for, changed });
    }

    /// Takes down what came of a run.
    async fn ended(&mut self, ended: Result<(Id, Result<RunReport, StateError>), JoinError>) {
        let (id, outcome) = match ended {
            Ok((id, outcome)) => (id, Ok(outcome)),
            Err(lost) => (lost.id(), Err(lost)),
        };
        let Some(running) = self.running.remove(&id) else { return };
        let how = self.how_ended(&running, &outcome);
        let Running { policy, slot, is_asked_for, .. } = running;
        if is_asked_for && how == Ended::Done {
            self.asked_for.remove(&policy);
        }
        let mut notified = Some(None);
        match outcome {
            Ok(Ok(report)) => {
                self.telemetry.run_ended(&report);
                notified = Some(Some(report));
            }
            Ok(Err(error)) if error.is_run_of(&policy) => {
                warn!(policy.name = %policy, "policy {policy} is not run now: {}", chain(&error));
                self.telemetry.displaced(&policy);
                notified = None;
                if is_asked_for {
                    let again = self.runner.state.trigger(&*self.runner.clock, policy.clone()).await;
                    self.controls_failed(again.err().map(|error| chain(&error)));
                } else {
                    let last = last_run(&self.runner, &policy).await.map(|last| last.run_id);
                    self.displaced.insert(policy.clone(), (slot, last));
                }
            }
            Ok(Err(error)) => {
                error!(policy.name = %policy, "policy {policy} did not run: {}", chain(&error));
                self.telemetry.run_panicked_or_refused(&policy, self.runner.clock.now());
            }
            Err(lost) => {
                error!(policy.name = %policy, "the run of policy {policy} ended by a bug in the program: {lost}");
                self.telemetry.run_panicked_or_refused(&policy, self.runner.clock.now());
            }
        }
        if let Ended::Again { slot, from } = how {
            info!(policy.name = %policy, "policy {policy} begins again for {slot}, at {from}, unless it is not enabled any more");
        }
        if !self.displaced.contains_key(&policy) {
            self.timetable.ended(&policy, how);
        }
        self.save().await;
        self.look_beside().await;
        if let (Some(report), Some(notifications)) = (notified, &self.notifications) {
            notifications.run_ended(&policy, report.as_ref());
        }
        self.notify().await;
        self.look_at_archives();
        self.look_at_deletions().await;
        self.report_next();
    }

    /// What becomes of the slot of a run that ended so. One that was asked for stands for a slot that came meanwhile only if it
    /// succeeded, and began about then.
    fn how_ended(
        &self,
        &Running { ref policy, slot, is_asked_for, .. }: &Running,
        outcome: &Result<Result<RunReport, StateError>, JoinError>,
    ) -> Ended {
        let now = self.runner.clock.now();
        let displaced = self.timetable.unserved(policy).filter(|_| is_asked_for);
        let newest = displaced.map_or(slot, |displaced| displaced.max(slot));
        match outcome {
            Ok(Ok(report)) if matches!(report.result, RunResult::Success | RunResult::Held) => {
                let lacking = displaced.filter(|slot| !self.can_stand_for(policy, *slot, report.started_at));
                lacking.map_or(Ended::Done, |slot| Ended::Again { slot, from: now })
            }
            Ok(Ok(_)) if self.stop.is_cancelled() => Ended::CutShort,
            Ok(Ok(report)) if lacks_what_a_change_stopped(report) => Ended::Again { slot: newest, from: now },
            Ok(Err(error)) if may_pass(error, policy) => {
                Ended::Again { slot: newest, from: now.checked_add(TRY_AGAIN).unwrap_or(now) }
            }
            _ => displaced.map_or(Ended::Done, |slot| Ended::Again { slot, from: now }),
        }
    }

    /// Loads the configuration anew, or keeps the old one and says why.
    async fn reload(&mut self) {
        self.service.reloading();
        let now = self.runner.clock.now();
        match self.take_over().await {
            Ok(()) => {
                self.telemetry.reloaded(Ok(()), now);
                info!("reloaded: {} now", counted(self.runner.policies.len(), "policy"));
            }
            Err(reason) => {
                error!("not reloaded, the configuration from before stays in force: {reason}");
                self.telemetry.reloaded(Err(reason), now);
            }
        }
        self.service.ready(&self.status_now());
    }

    async fn take_over(&mut self) -> Result<(), String> {
        let Loaded { mut runner, server, web, notifiers } = (self.load)()?;
        if runner.state.path() != self.runner.state.path() {
            return Err("the state directory is another one now: that takes a restart".to_owned());
        }
        // It knows what happened to the audit log in this process.
        runner.state = self.runner.state.clone();
        let remembered = remembered(&runner).await.map_err(|error| chain(&error))?;
        let controls = runner.state.controls().await.map_err(|error| chain(&error))?;
        let is_same = server.listen == self.server.listen;
        let listener = if is_same { None } else { Some(open_other_port(server.listen, self.address).await?) };
        // From here on nothing fails.
        warn_of_removed(&self.timetable.schedules(), &runner.policies);
        self.server = server;
        self.access.replace(web);
        self.telemetry.web_file(None);
        if let Some(listener) = listener {
            self.take_port(listener).await;
            self.serve_port();
            info!("listens on {} now", self.address);
        }
        pauses::apply(&mut runner.policies, &controls.paused);
        self.replace_runner(runner, &remembered);
        // Those from before deliver what they have.
        self.notifications = Some(self.notify_from_now(notifiers));
        self.save().await;
        self.look_at_archives();
        Ok(())
    }

    /// Has the web configuration file looked at, beside everything else: its disk may hang.
    fn look_at_web_file(&mut self) {
        if !self.access.has_file() || self.looking.as_ref().is_some_and(|looking| !looking.is_finished()) {
            return;
        }
        let (access, telemetry) = (Arc::clone(&self.access), self.telemetry.clone());
        self.looking = Some(begin_blocking(move || {
            let error = match access.look_again() {
                Ok(is_renewed) => {
                    if is_renewed {
                        info!("the web configuration file and its certificates are read anew");
                    }
                    None
                }
                Err(error) => Some(error),
            };
            if telemetry.web_file(error.clone())
                && let Some(error) = error
            {
                error!(
                    "the web configuration file is not read anew, the one from before stays in force: {error}"
                );
            }
        }));
    }

    /// Has all runs from now on decide by another configuration, or by other pauses.
    fn replace_runner(&mut self, runner: Runner, remembered: &HashMap<PolicyName, LastRuns>) {
        self.stop_what_changed(&runner);
        self.runner = Arc::new(runner);
        let now = self.runner.clock.now();
        let Runner { policies, host, .. } = &*self.runner;
        self.timetable =
            Timetable::new(policies, host, &self.timetable.schedules(), now).reloaded(&self.timetable, now);
        self.configure(remembered);
    }

    /// Runs in flight decided by the configuration before. Where any deciding key is another one now, they delete no more;
    /// where it is one of their own policy, they begin nothing more.
    fn stop_what_changed(&self, new: &Runner) {
        let keys = |runner: &Runner| -> BTreeMap<PolicyName, _> {
            let policies = runner.policies.iter();
            policies
                .map(|policy| (policy.name.clone(), (policy.zones.clone(), deciding_keys(policy))))
                .collect()
        };
        let copies = |runner: &Runner| -> BTreeMap<ArchiveName, _> {
            runner.archive_rules.iter().map(|(name, rules)| (name.clone(), rules.retention.clone())).collect()
        };
        let (before, now) = (keys(&self.runner), keys(new));
        if before == now && copies(&self.runner) == copies(new) {
            return;
        }
        for Running { policy: name, changed, .. } in self.running.values() {
            changed.deletions.cancel();
            let has_changed = before.get(name) != now.get(name);
            if has_changed {
                changed.policy.cancel();
            }
            warn!(
                policy.name = %name,
                "the run of policy {name} {}: the configuration, or what is paused, has changed since it began",
                if has_changed { "begins nothing more" } else { "deletes nothing more" }
            );
        }
    }

    /// Waits for runs in flight.
    async fn drain(&mut self, orders: &mut mpsc::UnboundedReceiver<Order>) -> Ending {
        self.service.stopping(self.server.shutdown_grace);
        self.telemetry.draining();
        self.stop.cancel();
        let clock = Arc::clone(&self.runner.clock);
        if !self.runs.is_empty() {
            info!(
                "stopping: {} in flight may go on for {} s",
                counted(self.runs.len(), "run"),
                self.server.shutdown_grace.as_secs()
            );
        }
        let until = clock.elapsed() + self.server.shutdown_grace;
        let mut ending = Ending::Orderly;
        while !self.runs.is_empty() {
            let left = until.saturating_sub(clock.elapsed());
            if left.is_zero() || ending == Ending::AtOnce {
                let names: Vec<&str> = self.running.values().map(|running| running.policy.as_str()).collect();
                warn!("no longer waiting for {}; the next start runs it again", names.join(", "));
                self.runs.abort_all();
                break;
            }
            tokio::select! {
                biased;
                Some(ended) = self.runs.join_next_with_id() => self.ended(ended).await,
                Some(Order::Stop) = orders.recv() => ending = Ending::AtOnce,
                () = clock.sleep(left.min(TURN)) => {}
            }
            self.service.alive();
        }
        self.save().await;
        if let Some(notifications) = self.notifications.take().filter(|_| ending == Ending::Orderly) {
            notifications.finish(NOTIFY_GRACE).await;
        }
        info!("stopped");
        ending
    }

    fn notify_from_now(&self, (notifiers, wires): (Vec<Notifier>, Wires)) -> Notifications {
        let (state, host) = (self.runner.state.clone(), Arc::clone(&self.runner.host));
        self.telemetry.notify(notifiers, wires, state, host)
    }

    /// Has notifiers be notified of all that is to be said now.
    async fn notify(&mut self) {
        if let Some(notifications) = &self.notifications {
            notifications.look().await;
        }
    }

    /// Gives telemetry the policies and archives of the configuration.
    fn configure(&mut self, remembered: &HashMap<PolicyName, LastRuns>) {
        let now = self.runner.clock.now();
        let schedules = self.timetable.schedules();
        let remembered = |policy: &Policy| remembered.get(&policy.name).cloned().unwrap_or_default();
        let policies = self.runner.policies.iter();
        let views: Vec<PolicyView<'_>> =
            policies.map(|policy| PolicyView::of(policy, &schedules, remembered(policy), now)).collect();
        let archives = self.runner.archives.keys().cloned().collect();
        self.telemetry.configure(&views, &archives);
        let rules = self.runner.archive_rules.iter();
        let verified = rules.filter(|(_, rules)| rules.verify.is_some()).map(|(name, _)| name.clone());
        let until = |name| {
            let until = self.verified_until.get(&name).copied().unwrap_or(now);
            (name, until)
        };
        self.verified_until = verified.map(until).collect();
        self.report_next();
    }

    fn report_next(&self) {
        for policy in self.timetable.policies() {
            self.telemetry.next_run(policy, self.timetable.next(policy));
        }
    }

    fn status_now(&self) -> String {
        let next =
            self.timetable.policies().filter_map(|policy| Some((self.timetable.next(policy)?, policy)));
        let next = next.min().map_or_else(
            || "no policy has a schedule".to_owned(),
            |(at, policy)| format!("next: {policy} at {}", at.strftime("%Y-%m-%d %H:%M:%SZ")),
        );
        match self.running.len() {
            0 => next,
            running => format!("{} in flight; {next}", counted(running, "run")),
        }
    }

    async fn save(&mut self) {
        let schedules = Schedules { archives: self.verified_until.clone(), ..self.timetable.schedules() };
        let written = self.runner.state.set_schedules(schedules).await;
        let error = written.err().map(|error| chain(&error));
        match &error {
            Some(error) if !self.unsaved => {
                error!("the schedules' state can't be saved, so a restart may repeat runs: {error}");
            }
            None if self.unsaved => info!("the schedules' state is saved again"),
            _ => {}
        }
        self.unsaved = error.is_some();
        self.telemetry.state_written(error);
        let status = self.status_now();
        if status != self.status {
            self.service.status(&status);
            self.status = status;
        }
    }

    /// Begins to verify the archives that are due, and returns whether any was.
    fn verify_archives(&mut self, now: Timestamp) -> bool {
        let mut due = Vec::new();
        for (name, until) in &mut self.verified_until {
            // The clock's own time, also if it was set back: one that was wrong by years must not put it off for years.
            let served = std::mem::replace(until, now);
            let plan = self.runner.archive_rules.get(name).and_then(|rules| rules.verify.as_ref());
            let next = |plan: &VerifyPlan| plan.schedule.next_after(served, &TimeZone::UTC);
            due.extend(
                plan.filter(|plan| next(plan).is_some_and(|next| next <= now))
                    .map(|plan| (name.clone(), plan.clone())),
            );
        }
        let any = !due.is_empty();
        for (name, plan) in due {
            let Some(archive) = self.runner.archives.get(&name).map(Arc::clone) else { continue };
            if self.verifying.get(&name).is_some_and(|running| !running.is_finished()) {
                warn!("archive {name} is still being verified: this time is skipped");
                continue;
            }
            let (runner, telemetry) = (Arc::clone(&self.runner), self.telemetry.clone());
            let (stop, of_archive) = (self.stop.clone(), name.clone());
            let running = tokio::spawn(async move {
                tokio::select! {
                    biased;
                    // Every copy is noted by itself, so nothing is lost.
                    () = stop.cancelled() => {}
                    () = verify_one(&runner, &archive, &plan) => {}
                }
                telemetry.archive(&name, runner.archive_stats(&archive).await);
            });
            self.verifying.insert(of_archive, running);
        }
        any
    }

    /// Reads what commands change beside the daemon: holds, allowances, which runs use up, and last runs, if there are others.
    /// Returns whether there may be anything else in the archives.
    async fn look_beside(&mut self) -> bool {
        let Self { runner, telemetry, beside, .. } = self;
        beside.read_at = runner.clock.elapsed();
        let archives = runner.state.archives_version().await;
        let mut has_changed = archives != beside.archives;
        beside.archives = archives;
        let now = runner.clock.now();
        // Where they can't be read, each run fails and says why.
        let holds = runner.state.holds().await.ok();
        telemetry.holds(holds.map(|holds| holds.count_at(now)));
        telemetry.audit_head(runner.state.audit_head().await.ok().flatten());
        for policy in &runner.policies {
            let name = &policy.name;
            telemetry.allowance(name, runner.allowance(policy).await);
            let version = runner.state.last_runs_version(name).await;
            if beside.runs.get(name) == Some(&version) {
                continue;
            }
            // One that can't be read fails the policy's next run.
            if let Ok(runs) = runner.state.last_runs(name).await {
                telemetry.recall(name, runs);
                beside.runs.insert(name.clone(), version);
                has_changed = true;
            }
        }
        has_changed
    }

    /// Has what was deleted since the last time read from the audit log, beside everything else; at first of this month and the
    /// one before.
    async fn look_at_deletions(&mut self) {
        let Ok(end) = self.runner.state.audit_end().await else { return };
        let month_before = self.runner.clock.now().saturating_sub(SignedDuration::from_hours(31 * 24));
        let month = month_before.ok().map(|at| at.strftime("%Y-%m").to_string());
        let at_first = || AuditMark { month, offset: 0 };
        let from = self.beside.deletions.replace(end).unwrap_or_else(at_first);
        let (state, telemetry) = (self.runner.state.clone(), self.telemetry.clone());
        tokio::spawn(async move {
            let is_deletion = |change: &Change| {
                change.outcome == "done"
                    && matches!(&*change.action, "delete" | "delete_template" | "prune_copy")
            };
            match state.history_from(Some(from), DELETED_LAST_MAX, is_deletion).await {
                Ok(history) => telemetry.deleted(history.changes),
                Err(error) => warn!("the page may lack deletions: {}", chain(&error)),
            }
        });
    }

    /// Has every archive looked at, beside everything else.
    fn look_at_archives(&self) {
        for (name, archive) in &self.runner.archives {
            let (name, archive, telemetry) = (name.clone(), Arc::clone(archive), self.telemetry.clone());
            let runner = Arc::clone(&self.runner);
            tokio::spawn(async move {
                let stats = runner.archive_stats(&archive).await;
                telemetry.archive(&name, stats);
            });
        }
    }
}

/// Whether a change of the policy kept the run from adding what was due. What it did not delete can wait until the next slot.
fn lacks_what_a_change_stopped(report: &RunReport) -> bool {
    let is_lacking = |step: &Step| {
        matches!(step.facts.action, Action::Create | Action::Export | Action::Promote)
            && step.message.as_deref() == Some(CHANGED)
    };
    report.zones.iter().flat_map(|zone| &zone.steps).any(is_lacking)
}

/// Whether a run that could not begin for this may begin soon: a file could not be read or written, or its lock was not given. What
/// a file says changes only once somebody mends it, and a run by another process is waited for.
fn may_pass(error: &StateError, policy: &PolicyName) -> bool {
    let is_of_a_file = matches!(
        error,
        StateError::Directory { .. }
            | StateError::File { .. }
            | StateError::Locked { .. }
            | StateError::Stopped { .. }
    );
    is_of_a_file && !error.is_run_of(policy)
}

/// The last whole run of a policy. An error is one of its next run.
async fn last_run(runner: &Runner, policy: &PolicyName) -> Option<LastRun> {
    runner.state.last_runs(policy).await.ok()?.last
}

/// Opens the port that a new configuration names beside the one from before.
async fn open_other_port(listen: SocketAddr, before: SocketAddr) -> Result<TcpListener, String> {
    server::bind(listen).await.map_err(|error| {
        // All addresses of the machine and one of them can't both be listened on.
        if error.is_in_use() && listen.port() == before.port() {
            format!(
                "the HTTP port {listen} is this daemon's own at {before}: name another port, or restart the daemon"
            )
        } else {
            chain(&error)
        }
    })
}

/// Verifies an archive and logs the result.
async fn verify_one(runner: &Runner, archive: &Archive, plan: &VerifyPlan) {
    let (name, percent) = (archive.name(), plan.percent);
    let throttle = plan.bandwidth_limit.map(|limit| Throttle::new(limit.get()));
    let work = ArchiveVerifier { throttle: throttle.as_ref(), ..runner.verifier(archive) };
    info!("archive {name}: verifying {percent} % of it");
    let report = |copy: &_, outcome: &Outcome| match describe(name, copy, outcome) {
        Some(line) if outcome.is_good() => info!("{line}"),
        Some(line) => error!("{line}"),
        None => {}
    };
    match work.verify(percent, &report).await {
        Ok(verified) => {
            for problem in &verified.problems {
                error!("archive {name}: {}", problem.describe());
            }
            info!("archive {name}: {} verified", counted(verified.copies.len(), "image"));
        }
        Err(error) => error!("archive {name} is not verified: {error}"),
    }
}

/// That the wall clock jumped between two turns of the loop, if it did: how far, against the elapsed time.
fn jump_text([(was, then), (is, now)]: [(Timestamp, Duration); 2]) -> Option<String> {
    let passed = SignedDuration::try_from(now.saturating_sub(then)).ok()?;
    let jump = is.duration_since(was).saturating_sub(passed);
    if jump.abs() <= JUMP {
        return None;
    }
    let (direction, cause) = if jump.is_negative() {
        ("back", "it was set")
    } else {
        ("forward", "it was set, or the machine slept")
    };
    let (by, is) = (SignedDuration::from_secs(jump.abs().as_secs()), is.strftime("%Y-%m-%dT%H:%M:%SZ"));
    Some(format!("this machine's clock jumped {direction} by {by:#}, to {is}: {cause}"))
}

fn runs(slots: u64) -> String {
    counted(usize::try_from(slots).unwrap_or(usize::MAX), "run")
}

/// A name that was misspelled in a configuration must not end a policy in silence.
fn warn_of_removed(before: &Schedules, policies: &[Policy]) {
    let is_gone = |name: &&PolicyName| policies.iter().all(|known| known.name != **name);
    for name in before.policies.keys().filter(is_gone) {
        warn!(policy.name = %name, "policy {name} is not in the configuration any more: it does not run");
    }
}

/// Reads all state that runs will need, so that damage is an error before anything begins.
async fn remembered(runner: &Runner) -> Result<HashMap<PolicyName, LastRuns>, StateError> {
    let state = &runner.state;
    state.holds().await?;
    // Also of policies that are not configured any more: what they took counts as taken.
    state.all_created().await?;
    let names: Vec<_> = runner.policies.iter().map(|policy| policy.name.clone()).collect();
    let each = names.into_iter().map(|name| remembered_of(state.clone(), name));
    stream::iter(each).buffered(READ_AT_ONCE).try_collect().await
}

async fn remembered_of(
    state: StateDirectory,
    name: PolicyName,
) -> Result<(PolicyName, LastRuns), StateError> {
    state.allowances(&AllowanceOf::Policy(name.clone())).await?;
    state.policy_state(&name).await?;
    let mut runs = state.last_runs(&name).await?;
    for zone in runs.zones.values_mut() {
        // Long, and for runs alone, which read them again.
        (zone.accepted, zone.rested_on) = (None, None);
    }
    Ok((name, runs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_of_the_clock_is_told_against_the_elapsed_time() {
        let start: Timestamp = "2026-11-01T12:00:00Z".parse().unwrap();
        // By how much each clock went on.
        for (wall, elapsed, told) in [
            (2, 2, None),
            (0, 10, None),
            (600, 600, None),
            (12, 2, None),
            (13, 2, Some("jumped forward by 11s, to 2026-11-01T12:00:13Z: it was set, or the machine slept")),
            (-3598, 2, Some("jumped back by 1h, to 2026-11-01T11:00:02Z: it was set")),
            (7202, 2, Some("jumped forward by 2h")),
        ] {
            let now = (start + SignedDuration::from_secs(wall), Duration::from_secs(5 + elapsed));
            let text = jump_text([(start, Duration::from_secs(5)), now]);
            let fits = match (&text, told) {
                (Some(text), Some(told)) => text.contains(told),
                (text, told) => text.is_none() && told.is_none(),
            };
            assert!(fits, "{wall} s in {elapsed} s: {text:?}");
        }
    }
}
