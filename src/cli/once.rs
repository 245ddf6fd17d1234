//! `once`: one run of each policy, and what came of it.

use std::fmt::Write as _;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::cli::args::{Global, Once};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::bars::Bars;
use crate::cli::output::{Output, Tone};
use crate::cli::{Exit, Refusal};
use crate::policy::Policy;
use crate::run::report::{RunReport, RunResult, Step};
use crate::run::{RunOptions, Runner};
use crate::state::audit::StepOutcome;
use crate::text::{chain, printable};

/// Runs the policies one after the other.
///
/// # Errors
/// [`Refusal`] if nothing could be begun.
pub async fn once(global: &Global, once: &Once, output: Output, bars: &Bars) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let policies = assemble::chosen(&config, &once.policies)?;
    if policies.is_empty() {
        output.complain(assemble::NOTHING_ENABLED);
    }
    let credentials = assemble::credentials(&config)?;
    let mut runner = assemble::runner(&config, credentials, &Seams::real(), Use::Running)?;
    runner.downloads = bars.downloads();
    let options = RunOptions { allow_deletes: once.allow_deletes, slot: None, stop: stop_on_signal()? };
    let (exit, reports) = run_all(&runner, &policies, &options, output, bars).await;
    if output.is_json() {
        output.print_json(&reports);
    } else {
        output.print(&reports.iter().map(|report| render(report, output)).collect::<String>());
    }
    Ok(exit)
}

/// Runs each policy; one that can't begin does not stop the next.
pub async fn run_all(
    runner: &Runner,
    policies: &[&Policy],
    options: &RunOptions,
    output: Output,
    bars: &Bars,
) -> (Exit, Vec<RunReport>) {
    let mut exit = Exit::Done;
    let mut reports = Vec::new();
    for policy in policies {
        if options.stop.is_cancelled() {
            output.complain(&format!("policy {} was not begun: told to stop", policy.name));
            exit = exit.worse(Exit::Failed);
            continue;
        }
        let run = runner.run(policy, options);
        match bars.beside(&runner.downloads, &*runner.clock, run).await {
            Ok(report) => {
                exit = exit.worse(exit_of(&report));
                reports.push(report);
            }
            Err(error) => {
                output.complain(&format!("policy {} did not run: {}", policy.name, chain(&error)));
                exit = exit.worse(Exit::Failed);
            }
        }
    }
    (exit, reports)
}

fn exit_of(report: &RunReport) -> Exit {
    match report.result {
        RunResult::Success => Exit::Done,
        RunResult::Held => Exit::Held,
        RunResult::Partial | RunResult::Failed => Exit::Failed,
    }
}

/// A token that the first SIGINT or SIGTERM cancels; the second ends the process at once.
fn stop_on_signal() -> Result<CancellationToken, Refusal> {
    let stop = CancellationToken::new();
    let failed = |error| Refusal::failed(&error);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let token = stop.clone();
    tokio::spawn(async move {
        for signals in 0.. {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if signals > 0 {
                std::process::exit(Exit::Failed as i32);
            }
            warn!("told to stop: no new step begins, those in flight are finished; once more ends at once");
            token.cancel();
        }
    });
    Ok(stop)
}

/// What came of a run, for people.
pub fn render(report: &RunReport, output: Output) -> String {
    let mut text = format!("policy {}: {}\n", report.policy, report.result.as_str());
    for zone in &report.zones {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "\n  zone {}", zone.zone);
        for failure in &zone.failures {
            let _ = writeln!(text, "  FAILED: {}", printable(failure));
        }
        if let Some(held) = &zone.held {
            let _ = writeln!(text, "  HELD: {}", printable(held));
        }
        for warning in &zone.warnings {
            let _ = writeln!(text, "  note: {}", printable(warning));
        }
        if !zone.steps.is_empty() {
            let rows = zone.steps.iter().map(row).collect();
            for line in output.table(&["DONE", "INSTANCE", "TAKEN", "SNAPSHOT", "WHY"], rows).lines() {
                let _ = writeln!(text, "  {line}");
            }
        }
        if let Some(plan) = &zone.plan {
            let _ = writeln!(
                text,
                "  the plan: {} kept, {} let go, {} ignored",
                plan.keep, plan.delete, plan.ignore
            );
        }
    }
    let _ = writeln!(text, "\n  in all: {}\n", report.sums());
    text
}

fn row(step: &Step) -> Vec<(String, Tone)> {
    let what = step.facts.action.as_str();
    // One that was to be taken and was not has neither date nor name.
    let is_there = step.facts.snapshot.id.is_some();
    let (word, tone) = match step.outcome {
        StepOutcome::Done => (what.to_owned(), Tone::Good),
        StepOutcome::Failed => (format!("{what} FAILED"), Tone::Bad),
        StepOutcome::Blocked => (format!("{what} blocked"), Tone::Bad),
        StepOutcome::Skipped => (format!("{what} skipped"), Tone::Dim),
    };
    let why = match &step.message {
        Some(message) if step.outcome == StepOutcome::Done => {
            format!("{} ({message})", step.facts.reasons.join("; "))
        }
        Some(message) => message.clone(),
        None => step.facts.reasons.join("; "),
    };
    vec![
        (word, tone),
        (instance(step.facts.snapshot.instance_name.as_deref()), Tone::Plain),
        (if is_there { step.facts.snapshot.created_at.to_string() } else { "-".to_owned() }, Tone::Plain),
        (if is_there { step.facts.snapshot.name.clone() } else { "-".to_owned() }, Tone::Plain),
        (why, Tone::Plain),
    ]
}

/// An instance's name, if it is known.
pub(super) fn instance(name: Option<&str>) -> String {
    name.unwrap_or("(not listed)").to_owned()
}
