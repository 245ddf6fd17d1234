//! One step: its intent is written to the audit log, the work is done, the outcome is written.
//!
//! Everything that changes something passes here, so that the audit log, the report and the log agree, and so that nothing
//! is begun that could not be written to the audit log first.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::clock::Clock;
use crate::exoscale::error::ApiError;
use crate::policy::Policy;
use crate::policy::name::PolicyName;
use crate::run::context::{ConfigurationChanged, RunOptions, Runner};
use crate::run::report::{CHANGED, IN_DOUBT, LATE, REPORTED, STOPPED, Step};
use crate::snapshot::{OperationId, TemplateId};
use crate::state::audit::{Action, DeletedBy, Ending, INTENDED, Line, StepFacts, StepOutcome, Subject};
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;
use crate::text::{chain, printable};

/// Records the steps of one run.
#[derive(Debug)]
pub struct Recorder {
    state: StateDirectory,
    clock: Arc<dyn Clock>,
    policy: Option<PolicyName>,
    run_id: Uuid,
    stop: CancellationToken,
    changed: ConfigurationChanged,
    /// By which pauses the run decides: of each policy that can be paused by hand.
    pauses: Vec<(PolicyName, Option<Timestamp>)>,
    /// Cancelled once no deletion may rest any more on what is remembered.
    in_doubt: CancellationToken,
    /// From then on, by the clock's elapsed time, no create, export or promotion is begun.
    late_from: Option<Duration>,
}

/// The result of a step that was done.
#[derive(Debug, Clone, Default)]
pub struct Done {
    pub(crate) operation_id: Option<OperationId>,
    /// The template that was made.
    pub(crate) template_id: Option<TemplateId>,
    /// The snapshot that was taken.
    pub(crate) snapshot: Option<Subject>,
    pub(crate) message: Option<String>,
}

/// Why a step was not done.
#[derive(Debug, Clone)]
pub struct StepError {
    /// Any outcome but `Done`.
    pub(crate) outcome: StepOutcome,
    /// What keeps the snapshot of a deletion that is blocked, as `plan` calls it; none if the platform is busy.
    pub(crate) blocked_by: Option<&'static str>,
    /// The API's operation, if there was one.
    pub(crate) operation_id: Option<OperationId>,
    pub(crate) message: String,
}

impl StepError {
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        let outcome = StepOutcome::Failed;
        Self { outcome, blocked_by: None, operation_id: None, message: message.into() }
    }

    /// For a step that must not be begun.
    pub(crate) fn skipped(message: impl Into<String>) -> Self {
        Self { outcome: StepOutcome::Skipped, ..Self::failed(message) }
    }

    /// For a deletion that the next run may well do.
    pub(crate) fn blocked(message: impl Into<String>) -> Self {
        Self { outcome: StepOutcome::Blocked, ..Self::failed(message) }
    }

    /// A deletion that failed is only blocked if the snapshot is busy, in use or in conflict.
    pub(crate) fn of_deletion(error: ApiError) -> Self {
        let outcome = if error.is_busy() { StepOutcome::Blocked } else { StepOutcome::Failed };
        Self { outcome, ..error.into() }
    }
}

/// A request that failed. One for a busy snapshot has failed as well, since an expected copy is missing then. Only a
/// deletion may just as well be done by the next run (`StepError::of_deletion`).
impl From<ApiError> for StepError {
    fn from(error: ApiError) -> Self {
        Self { operation_id: error.operation_id(), ..Self::failed(chain(&error)) }
    }
}

impl Recorder {
    /// For the steps of one run, which begins now.
    pub fn new(runner: &Runner, policy: &Policy, run_id: Uuid, options: &RunOptions) -> Self {
        let pausable = runner.policies.iter().filter(|policy| policy.is_enabled_in_file());
        let late_from = policy.deadline.map(|deadline| runner.clock.elapsed().saturating_add(deadline));
        Self {
            policy: Some(policy.name.clone()),
            stop: options.stop.clone(),
            changed: options.changed.clone(),
            pauses: pausable.map(|policy| (policy.name.clone(), policy.paused_since)).collect(),
            late_from,
            ..Self::manual(runner.state.clone(), Arc::clone(&runner.clock), run_id)
        }
    }

    /// For the steps of one manual command.
    pub fn manual(state: StateDirectory, clock: Arc<dyn Clock>, run_id: Uuid) -> Self {
        let stop = CancellationToken::new();
        Self {
            state,
            clock,
            policy: None,
            run_id,
            stop,
            changed: ConfigurationChanged::default(),
            pauses: Vec::new(),
            in_doubt: CancellationToken::new(),
            late_from: None,
        }
    }

    pub(crate) fn run_id(&self) -> Uuid {
        self.run_id
    }

    /// Cancelled once no new step begins.
    pub(crate) fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    /// No deletion begins any more, since something that could keep a snapshot could not be remembered.
    pub(crate) fn stop_deletions(&self) {
        self.in_doubt.cancel();
    }

    /// Why no step of this kind is begun any more, if so. Deletions are begun however late it is. The pauses are read again.
    ///
    /// # Errors
    /// [`StateError`] if the pauses cannot be read: then no step is begun either.
    pub async fn refusal(&self, action: Action) -> Result<Option<&'static str>, StateError> {
        if !self.pauses.is_empty() {
            let paused = self.state.controls().await?.paused;
            for (name, _) in self.pauses.iter().filter(|(name, since)| paused.get(name) != since.as_ref()) {
                self.changed.deletions.cancel();
                if self.policy.as_ref() == Some(name) {
                    self.changed.policy.cancel();
                }
            }
        }
        let adds = match action {
            Action::Delete | Action::DeleteTemplate | Action::PruneCopy => false,
            Action::Create
            | Action::Export
            | Action::Promote
            | Action::Copy
            | Action::Restore
            | Action::StopInstance
            | Action::Revert
            | Action::Reset
            | Action::StartInstance
            | Action::Vanish => true,
        };
        Ok(if self.stop.is_cancelled() {
            Some(STOPPED)
        } else if self.changed.policy.is_cancelled() || !adds && self.changed.deletions.is_cancelled() {
            Some(CHANGED)
        } else if !adds && self.in_doubt.is_cancelled() {
            Some(IN_DOUBT)
        } else if adds && self.late_from.is_some_and(|late| self.clock.elapsed() >= late) {
            Some(LATE)
        } else {
            None
        })
    }

    /// Writes the intent down, does the work, writes down how it ended.
    pub async fn step<W>(&self, intent: StepFacts, work: W) -> Step
    where
        W: Future<Output = Result<Done, StepError>>,
    {
        let outcome = StepOutcome::Skipped;
        let mut step = Step { facts: intent, outcome, blocked_by: None, message: None, transfer: None };
        // Boxed, as it would make every future that has steps too large.
        match self.begin(&step).boxed().await {
            Ok(None) => {}
            Ok(Some(refusal)) => {
                step.message = Some(refusal.to_owned());
                return step;
            }
            Err(why) => {
                step.outcome = StepOutcome::Failed;
                step.message = Some(format!("not begun, since {why}"));
                log(&step);
                return step;
            }
        }
        let operation_id = match work.await {
            Ok(done) => {
                step.outcome = StepOutcome::Done;
                step.facts.template_id = done.template_id.or(step.facts.template_id);
                step.facts.snapshot = done.snapshot.unwrap_or(step.facts.snapshot);
                step.message = done.message;
                done.operation_id
            }
            Err(error) => {
                step.outcome = error.outcome;
                step.blocked_by = error.blocked_by;
                step.message = Some(error.message);
                error.operation_id
            }
        };
        let in_log = step.outcome.in_log();
        if let Err(error) = self.write(in_log, &step, operation_id).await {
            // Done or not, the log does not have it: only a failure makes people look.
            step.outcome = StepOutcome::Failed;
            let message = step.message.take().map_or_else(String::new, |message| format!(" ({message})"));
            step.message = Some(format!(
                "{in_log}{message}, and that cannot be written to the audit log: {}",
                chain(&error)
            ));
        }
        log(&step);
        step
    }

    /// Writes the intent down, unless the step must not begin.
    async fn begin(&self, step: &Step) -> Result<Option<&'static str>, String> {
        let refusal = self.refusal(step.facts.action).await;
        let refusal = refusal
            .map_err(|error| format!("whether policies were paused cannot be read: {}", chain(&error)))?;
        if refusal.is_none() {
            let written = self.write(INTENDED, step, None).await;
            written.map_err(|error| format!("it cannot be written to the audit log: {}", chain(&error)))?;
        }
        Ok(refusal)
    }

    async fn write(
        &self,
        outcome: &'static str,
        step: &Step,
        operation_id: Option<OperationId>,
    ) -> Result<(), StateError> {
        let line = Line {
            at: self.clock.now(),
            outcome,
            policy: self.policy.clone(),
            run_id: self.run_id,
            zone: step.facts.zone.clone(),
            step: step.facts.clone(),
            operation_id,
            message: step.message.clone(),
            by: None,
        };
        self.state.audit(&*self.clock, line).await
    }

    /// Writes down how a snapshot ended that is not listed any more.
    ///
    /// # Errors
    /// [`StateError`]: then it is looked into again.
    pub(crate) async fn ended(
        &self,
        facts: StepFacts,
        ending: Ending,
        by: Option<DeletedBy>,
    ) -> Result<(), StateError> {
        let line = Line {
            at: self.clock.now(),
            outcome: ending.in_log(),
            policy: self.policy.clone(),
            run_id: self.run_id,
            zone: facts.zone.clone(),
            step: facts,
            operation_id: None,
            message: None,
            by,
        };
        self.state.audit(&*self.clock, line).await
    }
}

fn log(step: &Step) {
    let StepFacts { action, zone, snapshot, reasons, .. } = &step.facts;
    let id = snapshot.id.map(tracing::field::display);
    // One that was not taken has no id and no name.
    let instance = snapshot.instance_name.as_deref().filter(|_| id.is_none());
    let name = instance.map_or_else(|| snapshot.name.clone(), |instance| format!("of instance {instance}"));
    let (name, done) = (printable(&name), action.past());
    let message = step.message.as_ref().map_or_else(String::new, |message| format!(": {message}"));
    let reasons = reasons.join("; ");
    match step.outcome {
        StepOutcome::Done => {
            info!(target: REPORTED, { zone.name = %zone, snapshot.id = id, reasons }, "{done} snapshot {name}{message}");
        }
        // The run's last line is the error, once.
        StepOutcome::Failed | StepOutcome::Blocked | StepOutcome::Skipped => {
            warn!(target: REPORTED, { zone.name = %zone, snapshot.id = id, reasons }, "not {done}: snapshot {name}{message}");
        }
    }
}
