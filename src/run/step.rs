//! One step: written down, done, written down again.
//!
//! Everything that changes something passes here, so that the audit log, the report and the log can't
//! disagree, and so that nothing is begun that could not be written down first.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::clock::Clock;
use crate::disk::blocking;
use crate::exoscale::error::ApiError;
use crate::policy::{ArchiveName, Policy, PolicyName};
use crate::run::Runner;
use crate::run::report::{LATE, STOPPED, Step, StepOutcome};
use crate::snapshot::{Instance, OperationId, Snapshot, TemplateId, ZoneName};
use crate::state::audit::{Action, Line, Outcome, Subject};
use crate::state::{StateDirectory, StateError};
use crate::text::{chain, printable};

/// Writes the steps of one run down.
#[derive(Debug)]
pub struct Recorder {
    state: StateDirectory,
    clock: Arc<dyn Clock>,
    policy: Option<PolicyName>,
    run_id: Uuid,
    stop: CancellationToken,
    /// From then on, by the clock's elapsed time, nothing is begun that adds something.
    late_from: Option<Duration>,
}

/// What is about to be done, and why.
#[derive(Debug, Clone)]
pub struct Intent {
    /// What.
    pub action: Action,
    /// Where.
    pub zone: ZoneName,
    /// To which snapshot.
    pub snapshot: Subject,
    /// Into which archive.
    pub archive: Option<ArchiveName>,
    /// Which template.
    pub template_id: Option<TemplateId>,
    /// The key to blame.
    pub rule: Option<&'static str>,
    /// Why.
    pub reasons: Vec<String>,
}

/// How a step went well.
#[derive(Debug, Clone, Default)]
pub struct Done {
    /// The API's operation.
    pub operation_id: Option<OperationId>,
    /// The template that came of it.
    pub template_id: Option<TemplateId>,
    /// The snapshot that came of it.
    pub snapshot: Option<Subject>,
    /// What is worth saying.
    pub message: Option<String>,
}

/// How a step did not go well.
#[derive(Debug)]
pub struct StepError {
    /// How it ended.
    pub outcome: StepOutcome,
    /// The API's operation, if it came so far.
    pub operation_id: Option<OperationId>,
    /// Why.
    pub message: String,
}

impl StepError {
    /// It failed.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { outcome: StepOutcome::Failed, operation_id: None, message: message.into() }
    }

    /// It was found that it must not be begun.
    pub fn skipped(message: impl Into<String>) -> Self {
        Self { outcome: StepOutcome::Skipped, operation_id: None, message: message.into() }
    }

    /// A deletion that failed; one of what is busy, in use or in conflict is only blocked.
    pub fn of_deletion(error: ApiError) -> Self {
        let outcome = if error.is_busy() { StepOutcome::Blocked } else { StepOutcome::Failed };
        Self { outcome, ..error.into() }
    }
}

/// A call that failed. A copy that is busy does not come about either, and whoever waits for it must hear of it:
/// only what would be deleted may as well stay until the next run ([`StepError::of_deletion`]).
impl From<ApiError> for StepError {
    fn from(error: ApiError) -> Self {
        Self { operation_id: error.operation_id(), ..Self::failed(chain(&error)) }
    }
}

impl Recorder {
    /// For the steps of one run, which begins now.
    pub fn new(runner: &Runner, policy: &Policy, run_id: Uuid, stop: CancellationToken) -> Self {
        let late_from = policy.deadline.map(|deadline| runner.clock.elapsed().saturating_add(deadline));
        Self {
            policy: Some(policy.name.clone()),
            stop,
            late_from,
            ..Self::manual(runner.state.clone(), Arc::clone(&runner.clock), run_id)
        }
    }

    /// For the steps of one command given by hand.
    pub fn manual(state: StateDirectory, clock: Arc<dyn Clock>, run_id: Uuid) -> Self {
        Self { state, clock, policy: None, run_id, stop: CancellationToken::new(), late_from: None }
    }

    /// The run's id.
    pub fn run_id(&self) -> Uuid {
        self.run_id
    }

    /// Why nothing of this kind is begun any more, if so. What goes may go however late it is.
    pub fn refusal(&self, action: Action) -> Option<&'static str> {
        let adds = match action {
            Action::Create | Action::Export | Action::Promote | Action::Restore => true,
            Action::Delete | Action::DeleteTemplate | Action::PruneCopy => false,
        };
        if self.stop.is_cancelled() {
            Some(STOPPED)
        } else if adds && self.late_from.is_some_and(|late| self.clock.elapsed() >= late) {
            Some(LATE)
        } else {
            None
        }
    }

    /// Writes the intent down, does the work, writes down what came of it.
    pub async fn step<W>(&self, intent: Intent, work: W) -> Step
    where
        W: Future<Output = Result<Done, StepError>>,
    {
        let mut step = Step {
            action: intent.action,
            snapshot: intent.snapshot.clone(),
            archive: intent.archive.clone(),
            template_id: intent.template_id,
            rule: intent.rule,
            reasons: intent.reasons.clone(),
            outcome: StepOutcome::Skipped,
            message: None,
            transfer: None,
        };
        if let Some(refusal) = self.refusal(intent.action) {
            step.message = Some(refusal.to_owned());
            return step;
        }
        let mut line = Line {
            at: self.clock.now(),
            outcome: Outcome::Intended,
            action: intent.action,
            policy: self.policy.clone(),
            run_id: self.run_id,
            zone: intent.zone,
            snapshot: intent.snapshot,
            archive: intent.archive,
            template_id: intent.template_id,
            rule: intent.rule,
            reasons: intent.reasons,
            operation_id: None,
            message: None,
        };
        if let Err(error) = self.write(&line).await {
            step.outcome = StepOutcome::Failed;
            step.message = Some(format!("not begun, since it can't be written down: {}", chain(&error)));
            tell(&line.zone, &step);
            return step;
        }
        match work.await {
            Ok(done) => {
                step.outcome = StepOutcome::Done;
                step.template_id = done.template_id.or(step.template_id);
                step.snapshot = done.snapshot.unwrap_or(step.snapshot);
                step.message = done.message;
                line.operation_id = done.operation_id;
            }
            Err(step_error) => {
                step.outcome = step_error.outcome;
                step.message = Some(step_error.message);
                line.operation_id = step_error.operation_id;
            }
        }
        line.at = self.clock.now();
        line.outcome = match step.outcome {
            StepOutcome::Done => Outcome::Done,
            StepOutcome::Failed => Outcome::Failed,
            StepOutcome::Blocked | StepOutcome::Skipped => Outcome::Blocked,
        };
        line.template_id = step.template_id;
        line.snapshot.clone_from(&step.snapshot);
        line.message.clone_from(&step.message);
        if let Err(error) = self.write(&line).await {
            // It was done or not; what can't be told any more must at least be heard of.
            step.outcome = StepOutcome::Failed;
            let came = step.message.take().map_or_else(String::new, |message| format!(" ({message})"));
            step.message = Some(format!(
                "{}{came}, and that can't be written down: {}",
                word(line.outcome),
                chain(&error)
            ));
        }
        tell(&line.zone, &step);
        step
    }

    async fn write(&self, line: &Line) -> Result<(), StateError> {
        let (state, line) = (self.state.clone(), line.clone());
        blocking(move || state.audit(&line)).await
    }
}

/// A snapshot as the audit log and the report name it.
pub fn subject(snapshot: &Snapshot, instance: Option<&Instance>) -> Subject {
    Subject {
        id: Some(snapshot.id),
        name: snapshot.name.to_string(),
        created_at: snapshot.created_at,
        instance_id: snapshot.instance_id,
        instance_name: instance.map(|instance| instance.name.to_string()),
    }
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Intended => "intended",
        Outcome::Done => "done",
        Outcome::Failed => "failed",
        Outcome::Blocked => "not done",
    }
}

/// The log line of a step.
fn tell(zone: &ZoneName, step: &Step) {
    // One that was not taken has no id; its instance is all that can be told.
    let id = step.snapshot.id.map(tracing::field::display);
    let of = step.snapshot.instance_name.as_deref().filter(|_| id.is_none());
    let name = of.map_or_else(|| step.snapshot.name.clone(), |instance| format!("of instance {instance}"));
    let name = printable(&name);
    let done = match step.action {
        Action::Create => "created",
        Action::Export => "exported",
        Action::Promote => "promoted",
        Action::Delete => "deleted",
        Action::DeleteTemplate => "deleted the template of",
        Action::PruneCopy => "pruned the copy of",
        Action::Restore => "restored",
    };
    let told = step.message.as_ref().map_or_else(String::new, |message| format!(": {message}"));
    let reasons = step.reasons.join("; ");
    match step.outcome {
        StepOutcome::Done => {
            info!(zone.name = %zone, snapshot.id = id, reasons, "{done} snapshot {name}{told}");
        }
        StepOutcome::Failed => {
            error!(zone.name = %zone, snapshot.id = id, reasons, "not {done}: snapshot {name}{told}");
        }
        StepOutcome::Blocked | StepOutcome::Skipped => {
            warn!(zone.name = %zone, snapshot.id = id, reasons, "not {done}: snapshot {name}{told}");
        }
    }
}
