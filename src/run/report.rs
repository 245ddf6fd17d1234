//! What came of a run, as data: the exit status, the log line, the page and the metrics all read this.

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use crate::policy::{ArchiveName, PolicyName};
use crate::retention::verdict::{Rule, Verdict};
use crate::run::Planned;
use crate::snapshot::{TemplateId, ZoneName};
use crate::state::audit::{Action, Subject};

/// What came of a run.
#[derive(Debug, Clone, Serialize)]
pub struct RunReport {
    /// Which run.
    pub run_id: Uuid,
    /// Of which policy.
    pub policy: PolicyName,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
    /// All in one word.
    pub result: RunResult,
    /// Zone by zone, in the policy's order.
    pub zones: Vec<ZoneReport>,
}

/// A run in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunResult {
    /// All was done, or nothing was to do.
    Success,
    /// Some failed, or was not begun since the program was told to stop; some was done.
    Partial,
    /// No zone could be worked in.
    Failed,
    /// Nothing failed, and a guard held deletions back.
    Held,
}

impl RunResult {
    /// The word for metrics and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Partial => "partial",
            Self::Failed => "failed",
            Self::Held => "held",
        }
    }
}

/// What came of a run in one zone.
#[derive(Debug, Clone, Serialize)]
pub struct ZoneReport {
    /// Where.
    pub zone: ZoneName,
    /// What failed for the zone as a whole; nothing was deleted there then.
    pub failures: Vec<String>,
    /// What went well but should be looked at.
    pub warnings: Vec<String>,
    /// Why the guard let nothing be deleted.
    pub held: Option<String>,
    /// What the last plan said; none if the zone could not be listed.
    pub plan: Option<PlanSums>,
    /// What was set out to be done, in that order.
    pub steps: Vec<Step>,
}

/// How many snapshots a plan keeps, lets go and ignores.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PlanSums {
    /// Kept.
    pub keep: u64,
    /// Let go.
    pub delete: u64,
    /// Not judged.
    pub ignore: u64,
    /// Of the kept: would go but for a hold.
    pub blocked_by_hold: u64,
    /// Of the kept: would go but for another policy.
    pub blocked_by_policy: u64,
    /// Of the kept: would go but for a missing verified copy.
    pub blocked_by_export: u64,
}

impl PlanSums {
    /// Adds up a plan.
    pub fn of(plan: &crate::retention::plan::PolicyPlan) -> Self {
        let mut sums = Self::default();
        for decision in &plan.decisions {
            match (decision.verdict, decision.rule) {
                (Verdict::Delete, _) => sums.delete += 1,
                (Verdict::Ignore, _) => sums.ignore += 1,
                (Verdict::Keep, rule) => {
                    sums.keep += 1;
                    match rule {
                        Rule::Hold => sums.blocked_by_hold += 1,
                        Rule::Policy => sums.blocked_by_policy += 1,
                        Rule::Export => sums.blocked_by_export += 1,
                        _ => {}
                    }
                }
            }
        }
        sums
    }
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StepOutcome {
    /// It was done.
    Done,
    /// It was not, or not wholly.
    Failed,
    /// The platform was busy with it; the next run tries again.
    Blocked,
    /// It was not begun.
    Skipped,
}

/// One thing that was set out to be done.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// What.
    pub action: Action,
    /// To which snapshot.
    pub snapshot: Subject,
    /// Into which archive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub archive: Option<ArchiveName>,
    /// Which template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template_id: Option<TemplateId>,
    /// The key to blame.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<&'static str>,
    /// Why.
    pub reasons: Vec<String>,
    /// How it ended.
    pub outcome: StepOutcome,
    /// What went wrong, or else is worth saying.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl Step {
    /// Whether it was not begun since the program was told to stop.
    pub fn was_stopped(&self) -> bool {
        self.outcome == StepOutcome::Skipped && self.message.as_deref() == Some(STOPPED)
    }
}

/// What a step says that was not begun since the program was told to stop.
pub(crate) const STOPPED: &str = "not begun: the program was told to stop";

/// What all steps of a run add up to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepSums {
    /// Exports that were proved and published.
    pub exported: usize,
    /// Snapshots that became templates.
    pub promoted: usize,
    /// Snapshots that were deleted.
    pub deleted: usize,
    /// Templates that were deleted.
    pub templates_deleted: usize,
    /// Steps that were blocked.
    pub blocked: usize,
    /// Steps that were not begun.
    pub skipped: usize,
    /// Steps and zones that failed.
    pub failed: usize,
}

impl ZoneReport {
    pub(crate) fn new(zone: ZoneName, failure: Option<String>) -> Self {
        Self {
            zone,
            failures: failure.into_iter().collect(),
            warnings: Vec::new(),
            held: None,
            plan: None,
            steps: Vec::new(),
        }
    }

    /// Takes over what the plan of the delete phase says.
    pub(crate) fn planned(&mut self, planned: &Result<Planned, String>) {
        match planned {
            Ok(planned) => {
                self.plan = Some(PlanSums::of(&planned.plan));
                self.held = planned.held.as_ref().map(ToString::to_string);
                self.warnings.extend(planned.listed.warnings.iter().cloned());
            }
            Err(failure) => self.failures.push(failure.clone()),
        }
    }
}

impl RunReport {
    pub(crate) fn new(
        run_id: Uuid,
        policy: PolicyName,
        started_at: Timestamp,
        finished_at: Timestamp,
        zones: Vec<ZoneReport>,
    ) -> Self {
        let mut report = Self { run_id, policy, started_at, finished_at, result: RunResult::Success, zones };
        report.result = report.judge();
        report
    }

    fn judge(&self) -> RunResult {
        if !self.zones.is_empty()
            && self.zones.iter().all(|zone| !zone.failures.is_empty() && zone.steps.is_empty())
        {
            RunResult::Failed
        } else if self.sums().failed > 0 || self.steps().any(Step::was_stopped) {
            RunResult::Partial
        } else if self.zones.iter().any(|zone| zone.held.is_some()) {
            RunResult::Held
        } else {
            RunResult::Success
        }
    }

    fn steps(&self) -> impl Iterator<Item = &Step> {
        self.zones.iter().flat_map(|zone| &zone.steps)
    }

    /// Adds up all steps.
    pub fn sums(&self) -> StepSums {
        let failed = self.zones.iter().map(|zone| zone.failures.len()).sum();
        let mut sums = StepSums { failed, ..StepSums::default() };
        for step in self.steps() {
            match step.outcome {
                StepOutcome::Failed => sums.failed += 1,
                StepOutcome::Blocked => sums.blocked += 1,
                StepOutcome::Skipped => sums.skipped += 1,
                StepOutcome::Done => match step.action {
                    Action::Export => sums.exported += 1,
                    Action::Promote => sums.promoted += 1,
                    Action::Delete => sums.deleted += 1,
                    Action::DeleteTemplate => sums.templates_deleted += 1,
                },
            }
        }
        sums
    }
}
