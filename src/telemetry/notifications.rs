//! Notifies the notifiers of a configuration: finds out what is new, what lasts and what is over, and delivers it beside
//! everything else. A run never waits for it, and a notifier that can't be reached never fails one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::clock::timeout;
use crate::policy::name::{NotifierName, PolicyName};
use crate::policy::notifier::Event;
use crate::run::report::{RunReport, RunResult};
use crate::state::directory::StateDirectory;
use crate::state::notifications::{Sent, SentByNotifier};
use crate::telemetry::conditions::{Condition, conditions};
use crate::telemetry::message::Message;
use crate::telemetry::model::Model;
use crate::telemetry::notifier::{Notifier, Ping, Wires};
use crate::telemetry::problem::ProblemLine;
use crate::text::chain;

/// How many messages wait for one notifier; beyond that, the oldest is dropped.
const QUEUE_MAX: usize = 100;

/// The notifiers of a configuration at work. Dropping it lets what is queued be delivered.
#[derive(Debug)]
pub struct Notifications {
    workers: Vec<Worker>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    wires: Wires,
    state: StateDirectory,
    host: Arc<str>,
    model: Arc<RwLock<Model>>,
    /// What is remembered, as it was last read or changed: the file may not be readable.
    sent: Mutex<SentByNotifier>,
    /// Why it could not be read or changed, as it was last logged.
    state_error: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Worker {
    notifier: Arc<Notifier>,
    queue: Arc<Queue>,
    task: JoinHandle<()>,
}

/// A message on its way.
#[derive(Debug)]
struct Job {
    message: Message,
    ping: Ping,
    /// What is remembered once it was delivered.
    then: Option<(String, Option<Sent>)>,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: Mutex<Jobs>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    /// What the one is about that is being delivered.
    in_flight: Option<String>,
    is_closed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Notifications {
    /// Begins to work for these notifiers, on tokio's runtime.
    pub(super) fn start(
        notifiers: Vec<Notifier>,
        wires: Wires,
        state: StateDirectory,
        host: Arc<str>,
        model: Arc<RwLock<Model>>,
    ) -> Self {
        let (sent, state_error) = (Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { wires, state, host, model, sent, state_error });
        let work = |notifier| {
            let (notifier, queue) = (Arc::new(notifier), Arc::new(Queue::default()));
            let work = deliver_all(Arc::clone(&shared), Arc::clone(&notifier), Arc::clone(&queue));
            Worker { notifier, queue, task: tokio::spawn(work) }
        };
        let workers = notifiers.into_iter().map(work).collect();
        Self { workers, shared }
    }

    /// A run of the policy began.
    pub fn run_begun(&self, policy: &PolicyName) {
        self.ping(policy, "a run began", None, |_| (Ping::Start, "start"));
    }

    /// A run of the policy ended; without a report it could not begin, or ended by a bug.
    pub fn run_ended(&self, policy: &PolicyName, report: Option<&RunReport>) {
        let summary = report.map_or_else(
            || "the run could not begin, or ended by a bug in the program".to_owned(),
            |report| format!("{}: {}", report.result.as_str(), report.sums()),
        );
        let result = report.map_or(RunResult::Failed, |report| report.result);
        self.ping(policy, &summary, report, |on| match result {
            RunResult::Failed | RunResult::Partial => (Ping::Fail, "failure"),
            RunResult::Held if on.contains(&Event::Held) => (Ping::Fail, "held"),
            RunResult::Held | RunResult::Success => (Ping::Success, "success"),
        });
    }

    /// Queues a ping of each run for those that get them.
    fn ping(
        &self,
        policy: &PolicyName,
        summary: &str,
        report: Option<&RunReport>,
        which: impl Fn(&BTreeSet<Event>) -> (Ping, &'static str),
    ) {
        let zones = report.iter().flat_map(|report| &report.zones);
        let problems = zones.flat_map(|zone| {
            let lacking = zone.failures.iter().chain(&zone.held).chain(&zone.missing).chain(&zone.unmatched);
            lacking.map(|text| ProblemLine::new(None, format!("zone {}: {text}", zone.zone)))
        });
        let problems: Vec<ProblemLine> = problems.collect();
        for worker in self.workers.iter().filter(|worker| worker.notifier.is_healthchecks()) {
            let (ping, event) = which(&worker.notifier.settings.on);
            let message = Message {
                event,
                at: self.shared.wires.clock.now(),
                host: self.shared.host.to_string(),
                policy: Some(policy.clone()),
                zone: None,
                run_id: report.map(|report| report.run_id),
                title: format!("policy {policy}: {summary}"),
                summary: summary.to_owned(),
                problems: problems.clone(),
                next_command: "snapwarden status".to_owned(),
            };
            self.enqueue(worker, Job { message, ping, then: None });
        }
    }

    /// Looks at everything, and queues what notifiers are to be notified of now.
    pub async fn look(&self) {
        if self.workers.is_empty() {
            return;
        }
        let shared = &self.shared;
        match shared.state.sent_notifications().await {
            Ok(read) => *lock(&shared.sent) = read,
            Err(error) => shared.state_failed(&chain(&error)),
        }
        let now = shared.wires.clock.now();
        let conditions = conditions(&shared.model.read().unwrap_or_else(PoisonError::into_inner), now);
        for worker in &self.workers {
            let name = &worker.notifier.settings.name;
            let sent = lock(&shared.sent).0.get(name).cloned().unwrap_or_default();
            let changes = self.queue_news(worker, &conditions, &sent, now);
            shared.remember(&worker.notifier, changes).await;
        }
    }

    /// Queues what is new, lasts for long or is over. Returns what else is to be remembered.
    fn queue_news(
        &self,
        worker: &Worker,
        conditions: &[Condition],
        sent: &BTreeMap<String, Sent>,
        now: Timestamp,
    ) -> Vec<(String, Option<Sent>)> {
        let settings = &worker.notifier.settings;
        let is_healthchecks = worker.notifier.is_healthchecks();
        // Each run is a ping of its own, and what it does in a zone is part of it.
        let is_pinged = |condition: &Condition| {
            let is_of_a_run = matches!(condition.event, Event::Failure | Event::Held);
            is_healthchecks && is_of_a_run && condition.zone.is_some()
        };
        let repeat = SignedDuration::try_from(settings.repeat).unwrap_or(SignedDuration::MAX);
        let mut changes = Vec::new();
        for condition in conditions.iter().filter(|condition| !is_pinged(condition)) {
            let key = condition.key();
            if worker.queue.is_about(&key) {
                continue;
            }
            let before = sent.get(&key);
            let message = |over| Message::of(condition, over, now, &self.shared.host);
            match before {
                Some(before) if condition.problems.is_empty() => {
                    // An instance that is listed again is another one, or no news.
                    let is_told =
                        settings.on.contains(&Event::Recovered) && condition.event != Event::Vanished;
                    if is_told && !is_healthchecks {
                        let then = Some((key, None));
                        self.enqueue(
                            worker,
                            Job { message: message(Some(before.at)), ping: Ping::Log, then },
                        );
                    } else {
                        changes.push((key, None));
                    }
                }
                _ if condition.problems.is_empty() || !settings.on.contains(&condition.event) => {}
                Some(before) if !is_due(before, condition, repeat, now) => {
                    // One that is over, and begins again later, is news then.
                    let subjects: BTreeSet<String> =
                        before.subjects.intersection(&condition.subjects).cloned().collect();
                    if subjects != before.subjects {
                        changes.push((key, Some(Sent { at: before.at, subjects })));
                    }
                }
                _ => {
                    let then = Some((key, Some(Sent { at: now, subjects: condition.subjects.clone() })));
                    self.enqueue(worker, Job { message: message(None), ping: Ping::Log, then });
                }
            }
        }
        changes
    }

    fn enqueue(&self, worker: &Worker, job: Job) {
        let name = &worker.notifier.settings.name;
        if let Some(dropped) = worker.queue.push(job) {
            self.shared.notified(name, "dropped");
            warn!(
                "notifier {name}: too much waits for it, so the oldest is dropped: {}",
                dropped.message.line()
            );
        }
    }

    /// Waits until all that is queued was delivered or given up, for `grace` at most; the rest is dropped.
    pub async fn finish(mut self, grace: Duration) {
        self.workers.iter().for_each(|worker| worker.queue.close());
        let clock = Arc::clone(&self.shared.wires.clock);
        let mut workers = std::mem::take(&mut self.workers);
        let all = join_all(workers.iter_mut().map(|worker| &mut worker.task));
        if timeout(&*clock, grace, all).await.is_ok() {
            return;
        }
        for worker in &workers {
            worker.task.abort();
            let left = worker.queue.left();
            if left > 0 {
                let name = &worker.notifier.settings.name;
                warn!("notifier {name}: {left} not sent in time; what lasts is sent after the next start");
            }
        }
    }
}

impl Drop for Notifications {
    fn drop(&mut self) {
        self.workers.iter().for_each(|worker| worker.queue.close());
    }
}

/// Sends a sample, and returns what the other side answered.
///
/// # Errors
/// Why it failed, as a sentence.
pub async fn send_sample(notifier: &Notifier, wires: &Wires, host: &str) -> Result<String, String> {
    let message = Message {
        event: "test",
        at: wires.clock.now(),
        host: host.to_owned(),
        policy: None,
        zone: None,
        run_id: None,
        title: format!("snapwarden on {host}: a test of notifier {}", notifier.settings.name),
        summary: "a test".to_owned(),
        problems: vec![ProblemLine::new(None, "nothing is wrong: `snapwarden notify test` sent this")],
        next_command: "snapwarden status".to_owned(),
    };
    notifier.deliver(wires, &message, Ping::Log).await
}

/// Whether there is something new in a condition, or it has lasted for long.
fn is_due(before: &Sent, condition: &Condition, repeat: SignedDuration, now: Timestamp) -> bool {
    let since = now.duration_since(before.at);
    // A clock that was wrong by years must not silence it for years.
    since >= repeat || since.is_negative() || !condition.subjects.is_subset(&before.subjects)
}

impl Queue {
    /// Adds a job, and returns the one that was dropped for it.
    fn push(&self, job: Job) -> Option<Job> {
        let mut jobs = lock(&self.jobs);
        jobs.waiting.push_back(job);
        let dropped = if jobs.waiting.len() > QUEUE_MAX { jobs.waiting.pop_front() } else { None };
        self.changed.notify_one();
        dropped
    }

    /// The next job; none once it is closed and empty.
    async fn next(&self) -> Option<Job> {
        loop {
            {
                let mut jobs = lock(&self.jobs);
                let next = jobs.waiting.pop_front();
                jobs.in_flight = next.as_ref().and_then(|job| Some(job.then.as_ref()?.0.clone()));
                if next.is_some() || jobs.is_closed {
                    return next;
                }
            }
            self.changed.notified().await;
        }
    }

    fn is_about(&self, key: &String) -> bool {
        let jobs = lock(&self.jobs);
        let about = |job: &Job| job.then.as_ref().is_some_and(|(about, _)| about == key);
        jobs.in_flight.as_ref() == Some(key) || jobs.waiting.iter().any(about)
    }

    fn close(&self) {
        lock(&self.jobs).is_closed = true;
        self.changed.notify_one();
    }

    fn left(&self) -> usize {
        lock(&self.jobs).waiting.len()
    }
}

/// Delivers what is queued, one after the other.
async fn deliver_all(shared: Arc<Shared>, notifier: Arc<Notifier>, queue: Arc<Queue>) {
    let name = &notifier.settings.name;
    let mut is_failing = false;
    while let Some(Job { message, ping, then }) = queue.next().await {
        match notifier.deliver(&shared.wires, &message, ping).await {
            Ok(_) => {
                shared.notified(name, "sent");
                if is_failing {
                    info!("notifier {name} is reached again");
                }
                is_failing = false;
                shared.remember(&notifier, then.into_iter().collect()).await;
            }
            Err(why) => {
                shared.notified(name, "failed");
                // It is tried again with the next look at what is wrong.
                if !is_failing {
                    warn!("notifier {name} can't be reached: {why}; not sent: {}", message.line());
                }
                is_failing = true;
            }
        }
    }
}

impl Shared {
    fn notified(&self, name: &NotifierName, result: &'static str) {
        self.model.write().unwrap_or_else(PoisonError::into_inner).notified(name, result);
    }

    async fn remember(&self, notifier: &Notifier, changes: Vec<(String, Option<Sent>)>) {
        if changes.is_empty() {
            return;
        }
        let name = notifier.settings.name.clone();
        {
            let mut sent = lock(&self.sent);
            let known = sent.0.entry(name.clone()).or_default();
            for (key, sent) in &changes {
                match sent {
                    Some(sent) => drop(known.insert(key.clone(), sent.clone())),
                    None => drop(known.remove(key)),
                }
            }
        }
        if let Err(error) = self.state.remember_notifications(&*self.wires.clock, name, changes).await {
            self.state_failed(&chain(&error));
        }
    }

    /// Logs once that what was sent is remembered by this process alone.
    fn state_failed(&self, error: &str) {
        let mut logged = lock(&self.state_error);
        if logged.as_deref() != Some(error) {
            warn!("what notifiers were notified of is forgotten with a restart: {error}");
            *logged = Some(error.to_owned());
        }
    }
}
