//! `once`: one run of each policy, and its result.

use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::cli::args::Global;
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::{Output, Row, Tone, moment, plain};
use crate::cli::progress::Progress;
use crate::cli::signals::StopSignals;
use crate::config::sections::Config;
use crate::policy::Policy;
use crate::policy::name::PolicyName;
use crate::process::Processes;
use crate::run::context::{RunOptions, Runner};
use crate::run::report::{RunReport, RunResult, Step};
use crate::state::audit::StepOutcome;
use crate::state::error::StateError;
use crate::state::last_runs::PlanSums;
use crate::telemetry::Telemetry;
use crate::telemetry::model::PolicyView;
use crate::telemetry::notifications::Notifications;
use crate::text::{chain, printable};

/// How long notifications may take at the end: as long as it takes to give one up.
const NOTIFY_GRACE: Duration = Duration::from_secs(40);

/// The notifiers of the configuration at work, and what they read.
#[derive(Debug)]
pub struct Notifying {
    telemetry: Telemetry,
    notifications: Notifications,
}

impl Notifying {
    async fn start(config: &Config, runner: &Runner, seams: &Seams) -> Result<Self, Refusal> {
        let notifiers = assemble::notifiers(config)?;
        let telemetry = Telemetry::new(seams.clock.clone(), env!("CARGO_PKG_VERSION"), "");
        let (schedules, now) = (runner.state.schedules().await?, seams.clock.now());
        let mut views = Vec::new();
        for policy in &config.policies {
            let remembered = runner.state.last_runs(&policy.name).await?;
            views.push(PolicyView::of(policy, &schedules, remembered, now));
        }
        telemetry.configure(&views, &runner.archives.keys().cloned().collect());
        let wires = assemble::wires(seams);
        let notifications = telemetry.notify(notifiers, wires, runner.state.clone(), seams.host.clone());
        Ok(Self { telemetry, notifications })
    }
}

/// Runs the policies one after the other.
///
/// # Errors
/// [`Refusal`] if no run was started.
pub async fn once(
    global: &Global,
    policies: &[PolicyName],
    wanted: RunOptions,
    output: Output,
    progress: &Progress,
) -> Result<Exit, Refusal> {
    let mut config = assemble::configuration(global)?;
    let seams = Seams::real();
    // Before anything is touched.
    assemble::chosen(&config, policies)?;
    let credentials = assemble::credentials(&config)?;
    let mut runner = assemble::runner(&config, credentials, &seams, Use::Changing)?;
    assemble::require_shard(&config, &runner)?;
    assemble::heed_pauses(&mut config, &seams).await?;
    if policies.is_empty() {
        assemble::complain_of_paused(&config, output);
    }
    let policies = assemble::chosen(&config, policies)?;
    if policies.is_empty() {
        output.complain(assemble::NOTHING_ENABLED);
    }
    runner.downloads = progress.downloads();
    let options = RunOptions { stop: stop_on_signal(Arc::clone(&seams.processes))?, ..wanted };
    // A limited run is watched by the person who began it.
    let is_told = options.instances.is_none() && !config.notifiers.is_empty();
    let notifying = if is_told { Some(Notifying::start(&config, &runner, &seams).await?) } else { None };
    let (mut exit, reports) =
        run_all(&runner, &policies, &options, output, progress, notifying.as_ref()).await;
    if let Some(Notifying { notifications, .. }) = notifying {
        notifications.look().await;
        notifications.finish(NOTIFY_GRACE).await;
    }
    if let Some(only) = options.instances.filter(|_| reports.iter().all(is_about_nothing)) {
        let of = config.shard.map_or_else(String::new, |shard| format!(" in shard {shard}"));
        output.complain(&format!("no instance that these policies select matches `{only}`{of}"));
        exit = exit.worse(Exit::Failed);
    }
    output.show(|| &reports, || reports.iter().map(|report| render(report, output)).collect());
    Ok(exit)
}

/// Runs the policies one after the other. One that cannot start does not stop the next.
pub async fn run_all(
    runner: &Runner,
    policies: &[&Policy],
    options: &RunOptions,
    output: Output,
    progress: &Progress,
    notifying: Option<&Notifying>,
) -> (Exit, Vec<RunReport>) {
    let mut exit = Exit::Done;
    let mut reports = Vec::new();
    for policy in policies {
        if options.stop.is_cancelled() {
            output.complain(&format!("policy {} was not started: stopping", policy.name));
            exit = exit.worse(Exit::Failed);
            continue;
        }
        if let Some(Notifying { notifications, .. }) = notifying {
            notifications.run_begun(&policy.name);
        }
        let run = runner.run(policy, options);
        match progress.during(&runner.downloads, &*runner.clock, run).await {
            Ok(report) => {
                exit = exit.worse(exit_of(&report));
                if let Some(Notifying { telemetry, notifications }) = notifying {
                    telemetry.run_ended(&report);
                    notifications.run_ended(&policy.name, Some(&report));
                }
                reports.push(report);
            }
            Err(error) => {
                output.complain(&format!("policy {} did not run: {}", policy.name, chain(&error)));
                let is_running = matches!(error, StateError::Locked { .. });
                if let Some(Notifying { telemetry, notifications }) = notifying.filter(|_| !is_running) {
                    telemetry.run_panicked_or_refused(&policy.name, runner.clock.now());
                    notifications.run_ended(&policy.name, None);
                }
                exit = exit.worse(Exit::Failed);
            }
        }
    }
    (exit, reports)
}

fn is_about_nothing(report: &RunReport) -> bool {
    report.zones.iter().all(|zone| zone.instances.is_empty())
}

fn exit_of(report: &RunReport) -> Exit {
    match report.result {
        RunResult::Success if report.zones.iter().any(|zone| zone.pending.is_some()) => Exit::Held,
        RunResult::Success => Exit::Done,
        RunResult::Held => Exit::Held,
        RunResult::Partial | RunResult::Failed => Exit::Failed,
    }
}

/// A token that the first SIGINT or SIGTERM cancels; the second one ends the process at once, and its hooks with it.
fn stop_on_signal(processes: Arc<dyn Processes>) -> io::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let mut signals = StopSignals::install()?;
    let token = stop.clone();
    tokio::spawn(async move {
        signals.next().await;
        warn!("stopping: no new step begins, running steps finish; a second signal exits at once");
        token.cancel();
        signals.next().await;
        processes.kill_all();
        std::process::exit(Exit::Failed as i32);
    });
    Ok(stop)
}

/// The report of a run as text.
pub fn render(report: &RunReport, output: Output) -> String {
    let mut text = format!("policy {}: {}\n", report.policy, report.result.as_str());
    for zone in &report.zones {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "\n  zone {}", zone.zone);
        for failure in &zone.failures {
            let _ = writeln!(text, "  FAILED: {}", printable(failure));
        }
        if let Some(held) = &zone.held {
            let _ = writeln!(text, "  BLOCKED by the guard: {}", printable(held));
        }
        for missing in zone.missing.iter().chain(&zone.unmatched) {
            let _ = writeln!(text, "  MISSING: {}", printable(missing));
        }
        if let Some(pending) = &zone.pending {
            let _ = writeln!(text, "  PENDING: {}", printable(pending));
        }
        for warning in &zone.warnings {
            let _ = writeln!(text, "  note: {}", printable(warning));
        }
        if !zone.steps.is_empty() {
            let head = ["ACTION", "RESULT", "INSTANCE", "TAKEN", "SNAPSHOT", "WHY"];
            text.push_str(
                &output.indented_table(&head, zone.steps.iter().map(|step| row(step, output)).collect()),
            );
        }
        if let Some(plan) = &zone.plan {
            let _ = writeln!(text, "  plan: {}", plan_sums(plan));
        }
    }
    for failure in report.hooks.iter().filter_map(|hook| hook.failure.as_ref()) {
        let _ = writeln!(text, "\n  FAILED: {}", printable(failure));
    }
    let _ = writeln!(text, "\n  total: {}\n", report.sums());
    text
}

fn row(step: &Step, output: Output) -> Row {
    // A snapshot that was not created has neither a date nor a name.
    let is_there = step.facts.snapshot.id.is_some();
    let (result, tone) = match step.outcome {
        StepOutcome::Done => ("done", Tone::Good),
        StepOutcome::Failed => ("FAILED", Tone::Bad),
        StepOutcome::Blocked => ("blocked", Tone::Bad),
        StepOutcome::Skipped => ("skipped", Tone::Dim),
    };
    let why = match &step.message {
        Some(message) if step.outcome == StepOutcome::Done => {
            format!("{} ({message})", step.facts.reasons.join("; "))
        }
        Some(message) => message.clone(),
        None => step.facts.reasons.join("; "),
    };
    vec![
        plain(step.facts.action.as_str()),
        (result.to_owned(), tone),
        plain(instance(step.facts.snapshot.instance_name.as_deref())),
        plain(if is_there { moment(step.facts.snapshot.created_at, output) } else { "-".to_owned() }),
        plain(if is_there { &step.facts.snapshot.name } else { "-" }),
        plain(why),
    ]
}

/// The sums of a plan, as text.
pub(super) fn plan_sums(sums: &PlanSums) -> String {
    let PlanSums { keep, delete, ignore, .. } = sums;
    format!("{keep} kept, {delete} to delete, {ignore} ignored")
}

/// An instance's name, if it is known.
pub(super) fn instance(name: Option<&str>) -> String {
    name.unwrap_or("(not listed)").to_owned()
}
