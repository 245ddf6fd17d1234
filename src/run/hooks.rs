//! Programs that a policy starts around its runs: `before`, `after` and `on_failure` of `[policies.NAME.hooks]`.
//!
//! A hook decides nothing: without a successful `before` the run does nothing, and whatever the others do, the run's result
//! stays. They are started without a shell and without our environment, so they receive no key. What they write is put into
//! the log, within limits. Their process groups are killed once they are too late.

use std::collections::BTreeMap;
use std::pin::pin;
use std::process::ExitStatus;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::{Either, FutureExt as _, join, select};
use jiff::Timestamp;
use tokio::io::AsyncReadExt as _;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::clock::timeout;
use crate::policy::{Policy, Program};
use crate::process::{Command, Output, Process, Started};
use crate::run::context::{RunOptions, Runner};
use crate::run::persist;
use crate::run::report::{Hook, HookReport, REPORTED, RunReport, RunResult};
use crate::snapshot::ZoneName;
use crate::text::{chain, excerpt, printable};

/// How long a group of processes that was asked to end may go on.
const KILL_AFTER: Duration = Duration::from_secs(5);

/// How long what a hook wrote is waited for after its end: what it left in the background may hold the pipe for ever.
const DRAIN: Duration = Duration::from_secs(1);

/// The most lines of a hook that are logged.
const LINES_MAX: u64 = 200;

/// The most characters of a line that are logged.
const LINE_MAX: usize = 500;

/// The most bytes of a line that are kept: a character has at most four.
const LINE_BYTES_MAX: usize = 4 * LINE_MAX + 4;

/// The most problems in the environment of a hook.
const PROBLEMS_MAX: usize = 50;

/// The most characters of one of them. All together are far below the 128 KiB that Linux takes in a variable.
const PROBLEM_MAX: usize = 300;

/// The hooks of one run.
pub(crate) struct Hooks<'a> {
    pub(crate) runner: &'a Runner,
    pub(crate) policy: &'a Policy,
    pub(crate) options: &'a RunOptions,
    pub(crate) run_id: Uuid,
    pub(crate) started_at: Timestamp,
}

impl Hooks<'_> {
    /// Starts `before`, if there is one, and waits for its end.
    pub(crate) async fn before(&self) -> Option<HookReport> {
        let program = self.policy.hooks.before.as_ref()?;
        if self.options.stop.is_cancelled() {
            let failure = Some("not started: the program is stopping".to_owned());
            return Some(HookReport { hook: Hook::Before, seconds: 0.0, failure });
        }
        Some(self.run(Hook::Before, program, BTreeMap::new()).await)
    }

    /// Starts the hooks for the end of a run, one after the other, and adds them to its report. They are started also where
    /// the program is stopping: what `before` froze must not stay so.
    pub(crate) async fn finish(&self, report: &mut RunReport) {
        let hooks = &self.policy.hooks;
        let has_failed = matches!(report.result, RunResult::Failed | RunResult::Partial);
        let on_failure = hooks.on_failure.as_ref().filter(|_| has_failed);
        let all = [(Hook::OnFailure, on_failure), (Hook::After, hooks.after.as_ref())];
        for (hook, program) in all.into_iter().filter_map(|(hook, program)| Some((hook, program?))) {
            let ended = self.run(hook, program, facts_of(report)).await;
            report.hooks.push(ended);
        }
    }

    /// Starts a hook and waits for its end, for as long as it may take.
    async fn run(&self, hook: Hook, program: &Program, more: BTreeMap<String, String>) -> HookReport {
        let clock = &*self.runner.clock;
        let begun = clock.elapsed();
        let name = hook.as_str();
        let mut environment = self.facts(hook);
        environment.extend(more);
        let (program, arguments) = (program.name.clone(), program.arguments.clone());
        let command = Command { program, arguments, environment, has_input: false };
        let result = match self.runner.processes.start(&command) {
            Ok(started) => self.watch(hook, started).await,
            Err(error) => Err(chain(&error)),
        };
        let seconds = clock.elapsed().saturating_sub(begun).as_secs_f64();
        let failure =
            result.err().map(|why| format!("hook `{name}` ({}): {why}", printable(&command.program)));
        if let Some(failure) = &failure {
            warn!(target: REPORTED, "{failure}");
        } else {
            info!("hook `{name}` ended after {seconds:.1} s");
        }
        HookReport { hook, seconds, failure }
    }

    /// What a hook learns of its run.
    fn facts(&self, hook: Hook) -> BTreeMap<String, String> {
        let zones: Vec<&str> = self.policy.zones.iter().map(ZoneName::as_str).collect();
        let mut facts = BTreeMap::from([
            (variable("HOOK"), hook.as_str().to_owned()),
            (variable("POLICY"), self.policy.name.to_string()),
            (variable("RUN_ID"), self.run_id.to_string()),
            (variable("ZONES"), zones.join(" ")),
            (variable("STARTED_AT"), self.started_at.to_string()),
        ]);
        if let Some(shard) = self.runner.state.shard() {
            facts.insert(variable("SHARD"), shard.to_string());
        }
        if let Some(only) = &self.options.instances {
            facts.insert(variable("INSTANCE"), only.to_string());
        }
        facts
    }

    /// Waits for the end of a hook, and logs what it writes meanwhile.
    async fn watch(&self, hook: Hook, started: Started) -> Result<(), String> {
        let Started { mut process, stdout, stderr, .. } = started;
        let lines = Mutex::new(Lines { hook, logged: 0, not_logged: 0, last: None });
        let reading = pin!(join(read(stdout, &lines), read(stderr, &lines)));
        let ending = pin!(self.end_of(&mut *process));
        let ended = match select(ending, reading).await {
            Either::Left((ended, reading)) => {
                let _ = timeout(&*self.runner.clock, DRAIN, reading).await;
                ended
            }
            Either::Right((_, ending)) => ending.await,
        };
        let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.not_logged > 0 {
            info!("hook `{}` wrote {} lines more, which are not logged", hook.as_str(), lines.not_logged);
        }
        let why = match ended {
            Ok(status) if status.success() => return Ok(()),
            Ok(status) => format!("it ended with {status}"),
            Err(why) => why,
        };
        let last = lines.last.iter().map(|line| format!("; its last line is: {line}"));
        Err(last.fold(why, |text, more| text + &more))
    }

    /// The end of a process. After the policy's time-out, or if the program stops and its grace is over, the whole group is
    /// asked to end, and killed if it does not.
    async fn end_of(&self, process: &mut dyn Process) -> Result<ExitStatus, String> {
        let (clock, limit) = (&*self.runner.clock, self.policy.hooks.timeout);
        let over = {
            let too_long = pin!(clock.sleep(limit));
            let stopped = pin!(self.stopped(&self.options.stop));
            let over = select(too_long, stopped).map(|over| match over {
                Either::Left(_) => {
                    format!("it was ended, since it took longer than {} s (`timeout`)", limit.as_secs_f64())
                }
                Either::Right(_) => "it was ended, since the program is stopping".to_owned(),
            });
            match select(process.wait(), pin!(over)).await {
                Either::Left((ended, _)) => {
                    return ended.map_err(|error| format!("its end is not known: {error}"));
                }
                Either::Right((over, _)) => over,
            }
        };
        process.terminate();
        let _ = timeout(clock, KILL_AFTER, process.wait()).await;
        process.kill();
        // What not even this ends is left alone.
        let _ = timeout(clock, KILL_AFTER, process.wait()).await;
        Err(over)
    }

    /// Completes once the program stops and a hook in flight may not go on any more: before the grace is over, so that it
    /// can still be asked to end.
    async fn stopped(&self, stop: &CancellationToken) {
        stop.cancelled().await;
        self.runner.clock.sleep(self.runner.shutdown_grace.saturating_sub(KILL_AFTER)).await;
    }
}

fn variable(name: &str) -> String {
    format!("SNAPWARDEN_{name}")
}

/// What a hook learns of the run that ended.
fn facts_of(report: &RunReport) -> BTreeMap<String, String> {
    let sums = report.sums();
    let counts = [
        ("CREATED", sums.created),
        ("EXPORTED", sums.exported),
        ("PROMOTED", sums.promoted),
        ("DELETED", sums.deleted),
        ("TEMPLATES_DELETED", sums.templates_deleted),
        ("COPIES_PRUNED", sums.copies_pruned),
        ("BLOCKED", sums.blocked),
        ("SKIPPED", sums.skipped),
        ("FAILED", sums.failed),
        ("BLOCKED_BY_GUARD", sums.blocked_by_guard),
        ("PENDING", sums.pending),
    ];
    let mut facts: BTreeMap<String, String> =
        counts.into_iter().map(|(name, count)| (variable(name), count.to_string())).collect();
    facts.insert(variable("RESULT"), report.result.as_str().to_owned());
    let mut problems: Vec<String> = Vec::new();
    for zone in &report.zones {
        let whole = zone.failures.iter().chain(&zone.held).chain(&zone.missing).chain(&zone.unmatched);
        let whole = whole.chain(&zone.pending).chain(&zone.warnings).cloned();
        let steps = zone.steps.iter().filter_map(persist::failure_of);
        let of_zone =
            whole.chain(steps).map(|text| excerpt(&format!("zone {}: {text}", zone.zone), PROBLEM_MAX));
        problems.extend(of_zone);
    }
    problems.extend(report.hooks.iter().filter_map(|hook| hook.failure.clone()));
    let more = problems.len().saturating_sub(PROBLEMS_MAX);
    problems.truncate(PROBLEMS_MAX);
    problems.extend((more > 0).then(|| format!("and {more} more: see the log")));
    facts.insert(variable("PROBLEMS"), problems.join("\n"));
    facts
}

/// The lines that a hook has written.
struct Lines {
    hook: Hook,
    logged: u64,
    not_logged: u64,
    /// The last one that is not empty.
    last: Option<String>,
}

impl Lines {
    fn add(&mut self, line: &[u8]) {
        let line = excerpt(String::from_utf8_lossy(line).trim_end(), LINE_MAX);
        if line.is_empty() {
            return;
        }
        if self.logged < LINES_MAX {
            self.logged += 1;
            info!("hook `{}`: {line}", self.hook.as_str());
        } else {
            self.not_logged += 1;
        }
        self.last = Some(line);
    }
}

/// Reads to the end, so that the program never waits for us, and keeps no more than a line.
async fn read(mut output: Output, lines: &Mutex<Lines>) {
    let mut buffer = vec![0; 8 << 10];
    let mut line = Vec::new();
    let add = |line: &mut Vec<u8>| {
        lines.lock().unwrap_or_else(PoisonError::into_inner).add(line);
        line.clear();
    };
    // What can't be read any more is over.
    while let Ok(count @ 1..) = output.read(&mut buffer).await {
        for byte in buffer.iter().take(count) {
            match byte {
                b'\n' => add(&mut line),
                _ if line.len() < LINE_BYTES_MAX => line.push(*byte),
                _ => {}
            }
        }
    }
    add(&mut line);
}
