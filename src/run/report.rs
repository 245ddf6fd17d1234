//! The result of a run as data: the exit status, the log line, the page and the metrics are made from it.

use std::fmt::{self, Display};

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use crate::exoscale::wire::Quota;
use crate::policy::name::PolicyName;
use crate::retention::plan::PolicyPlan;
use crate::retention::verdict::Verdict;
use crate::run::details::ZoneDetails;
use crate::snapshot::ZoneName;
use crate::state::audit::{Action, StepFacts, StepOutcome};
use crate::state::last_runs::{InstanceCounts, PlanSums, ZoneCoverage};

/// The result of a run.
#[derive(Debug, Clone, Serialize)]
pub struct RunReport {
    /// The id that the audit log has, too.
    pub run_id: Uuid,
    /// The policy's name.
    pub policy: PolicyName,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
    /// The whole run in one word.
    pub result: RunResult,
    /// Zone by zone, in the policy's order.
    pub zones: Vec<ZoneReport>,
    /// The policy's hooks that were started, or could not be, in their order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hooks: Vec<HookReport>,
    /// The organization's quotas when the run ended; none if they could not be read. For metrics, so no part of the
    /// printed report.
    #[serde(skip)]
    pub quotas: Vec<Quota>,
}

/// When a hook is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Hook {
    /// Before anything else in a run.
    Before,
    /// At the end of every run.
    After,
    /// At the end of a run that failed, also in part.
    OnFailure,
}

impl Hook {
    /// Its key in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::After => "after",
            Self::OnFailure => "on_failure",
        }
    }
}

/// A hook that was started, or could not be.
#[derive(Debug, Clone, Serialize)]
pub struct HookReport {
    /// Which one.
    pub hook: Hook,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Why it failed; none if it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// A run in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunResult {
    /// All was done, or nothing was to do.
    Success,
    /// Some failed, or was not begun since the program was stopping or the deadline had passed; some was done. Or an instance
    /// has no good snapshot, or a pattern of the policy matches nothing.
    Partial,
    /// No zone could be worked in.
    Failed,
    /// Nothing failed, and a guard blocked deletions.
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

/// The result of a run in one zone.
#[derive(Debug, Clone, Serialize)]
pub struct ZoneReport {
    /// The zone.
    pub zone: ZoneName,
    /// Failures of the zone as a whole, as sentences.
    pub failures: Vec<String>,
    /// Sentences about what did not fail but needs attention.
    pub warnings: Vec<String>,
    /// Why the guard blocked all deletions, if it did.
    pub held: Option<String>,
    /// The deletions that wait until a change has settled, if there are any, and how to let them pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pending: Option<String>,
    /// Which of the policy's instances have no good snapshot, though they are old enough.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing: Option<String>,
    /// Which of the policy's patterns match no instance in any of its zones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unmatched: Option<String>,
    /// The sums of the delete phase's plan; none if the zone could not be listed.
    pub plan: Option<PlanSums>,
    /// What each selected instance has after the run, also one without any snapshot.
    pub instances: Vec<InstanceCounts>,
    /// How many instances the policy selects that other shards are for; for metrics, so no part of the printed report.
    #[serde(skip)]
    pub elsewhere: u64,
    /// How all policies together cover the zone; for metrics, so no part of the printed report.
    #[serde(skip)]
    pub coverage: Option<ZoneCoverage>,
    /// What keeps each snapshot and copy, if that was asked for.
    #[serde(skip)]
    pub details: Option<ZoneDetails>,
    /// In the order of the phases.
    pub steps: Vec<Step>,
}

/// Adds up a plan.
pub fn sums_of(plan: &PolicyPlan) -> PlanSums {
    let mut sums = PlanSums::default();
    for decision in &plan.decisions {
        match decision.verdict {
            Verdict::Delete => sums.delete += 1,
            Verdict::Ignore => sums.ignore += 1,
            Verdict::Keep => sums.keep += 1,
        }
        match decision.blocked_by() {
            Some("hold") => sums.blocked_by_hold += 1,
            Some("policy") => sums.blocked_by_policy += 1,
            Some("paused") => sums.blocked_by_paused += 1,
            Some("source") => sums.blocked_by_source += 1,
            Some("export") => sums.blocked_by_export += 1,
            Some("archive") => sums.blocked_by_archive += 1,
            Some("guard") => sums.blocked_by_guard += 1,
            Some("change") => sums.pending += 1,
            _ => {}
        }
    }
    sums
}

/// One action of a run, and how it ended.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// What was to be done, or was done.
    #[serde(flatten)]
    pub facts: StepFacts,
    /// How it ended.
    pub outcome: StepOutcome,
    /// What keeps the snapshot of a deletion that was blocked, as `plan` calls it; none if the platform was busy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_by: Option<&'static str>,
    /// An error, or what else is worth knowing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The download of an export, if any byte arrived. One download may feed several archives: only the first of their
    /// steps has it, so that it is counted once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
}

/// How an image was downloaded, or the part of it that was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Transfer {
    /// Bytes received, including those that were received again.
    pub bytes: u64,
    /// From the first request for the image until it was verified and published, or given up.
    pub seconds: f64,
    /// How often a new connection resumed where one broke or stalled.
    pub resumes: u64,
    /// How often the MD5 of all bytes differed from the API's.
    pub checksum_mismatches: u64,
}

impl Step {
    /// Whether it was not begun because the program was stopping, the configuration had changed, it was too late, or the
    /// state could not be written.
    pub fn was_stopped(&self) -> bool {
        let refusals = [STOPPED, LATE, CHANGED, IN_DOUBT];
        let refused = self.message.as_deref().is_some_and(|message| refusals.contains(&message));
        self.outcome == StepOutcome::Skipped && refused
    }

    /// Whether it deleted a snapshot.
    pub(crate) fn has_deleted_a_snapshot(&self) -> bool {
        self.facts.action == Action::Delete && self.outcome == StepOutcome::Done
    }
}

/// The target of log lines that a run's report repeats.
pub const REPORTED: &str = "snapwarden::report";

/// The message of a step that was not begun because the program was stopping.
pub(crate) const STOPPED: &str = "not begun: the program is stopping";

/// The message of a step that was not begun because the run's `deadline` had passed.
pub(crate) const LATE: &str = "not begun: the run's deadline has passed";

/// The message of a step that was not begun because another configuration was loaded, or policies are paused by hand, or are
/// not any more.
pub(crate) const CHANGED: &str = "not begun: the configuration has changed, or a policy was paused or resumed, since the run \
                                  began, so the next run decides";

/// The message of a deletion that was not begun because the state directory could not be written.
pub(crate) const IN_DOUBT: &str =
    "not begun: that an archive could not be written could not be remembered, so its copies are in doubt";

/// The steps of a run, counted by action and outcome.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepSums {
    /// Snapshots that were taken.
    pub created: usize,
    /// Exports that were verified and published.
    pub exported: usize,
    /// Snapshots that became templates.
    pub promoted: usize,
    /// Snapshots that were deleted.
    pub deleted: usize,
    /// Templates that were deleted.
    pub templates_deleted: usize,
    /// Copies that an archive's retention removed.
    pub copies_pruned: usize,
    /// Steps that were blocked.
    pub blocked: usize,
    /// Steps that were not begun.
    pub skipped: usize,
    /// Steps and zones that failed.
    pub failed: usize,
    /// Deletions that the guard blocked, in zones where it blocked all.
    pub blocked_by_guard: usize,
    /// Deletions that wait for a change to settle, or for a newer snapshot.
    pub pending: usize,
}

impl Display for StepSums {
    /// What there was of it: `3 exported, 1 deleted`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [
            (self.created, "created"),
            (self.exported, "exported"),
            (self.promoted, "promoted"),
            (self.deleted, "deleted"),
            (
                self.templates_deleted,
                if self.templates_deleted == 1 { "old template deleted" } else { "old templates deleted" },
            ),
            (self.copies_pruned, if self.copies_pruned == 1 { "copy pruned" } else { "copies pruned" }),
            (self.blocked, "blocked"),
            (self.skipped, "skipped"),
            (self.failed, "failed"),
            (self.blocked_by_guard, "not deleted, blocked by the guard"),
            (self.pending, "not deleted, pending"),
        ];
        let some: Vec<String> = all
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        f.write_str(if some.is_empty() { "nothing was to do" } else { "" })?;
        f.write_str(&some.join(", "))
    }
}

impl ZoneReport {
    pub(crate) fn new(zone: ZoneName) -> Self {
        Self {
            zone,
            failures: Vec::new(),
            warnings: Vec::new(),
            held: None,
            pending: None,
            missing: None,
            unmatched: None,
            plan: None,
            instances: Vec::new(),
            elsewhere: 0,
            coverage: None,
            details: None,
            steps: Vec::new(),
        }
    }

    /// The result of the run in this zone alone.
    pub(crate) fn result(&self) -> RunResult {
        let failed = |step: &Step| step.outcome == StepOutcome::Failed || step.was_stopped();
        if !self.failures.is_empty() && self.steps.is_empty() {
            RunResult::Failed
        } else if !self.failures.is_empty() || self.lacks_snapshots() || self.steps.iter().any(failed) {
            RunResult::Partial
        } else if self.held.is_some() {
            RunResult::Held
        } else {
            RunResult::Success
        }
    }

    /// Whether an instance, or a pattern, has nothing to show.
    pub(crate) fn lacks_snapshots(&self) -> bool {
        self.missing.is_some() || self.unmatched.is_some()
    }
}

impl RunReport {
    pub(crate) fn new(
        run_id: Uuid,
        policy: PolicyName,
        [started_at, finished_at]: [Timestamp; 2],
        zones: Vec<ZoneReport>,
        hooks: Vec<HookReport>,
        quotas: Vec<Quota>,
    ) -> Self {
        let result = RunResult::Success;
        let mut report = Self { run_id, policy, started_at, finished_at, result, zones, hooks, quotas };
        report.result = report.judge();
        report
    }

    /// Says of each zone that this failed as well.
    pub(crate) fn fail(&mut self, failure: &str) {
        for zone in &mut self.zones {
            zone.failures.push(failure.to_owned());
        }
        self.result = self.judge();
    }

    fn judge(&self) -> RunResult {
        let is_any = |result| self.zones.iter().any(|zone| zone.result() == result);
        if !self.zones.is_empty() && self.zones.iter().all(|zone| zone.result() == RunResult::Failed) {
            RunResult::Failed
        } else if is_any(RunResult::Failed) || is_any(RunResult::Partial) {
            RunResult::Partial
        } else if is_any(RunResult::Held) {
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
        for plan in self.zones.iter().filter_map(|zone| zone.plan.as_ref()) {
            let counted = |count| usize::try_from(count).unwrap_or(usize::MAX);
            sums.blocked_by_guard += counted(plan.blocked_by_guard + plan.blocked_by_judge);
            sums.pending += counted(plan.pending + plan.blocked_by_source);
        }
        for step in self.steps() {
            match step.outcome {
                StepOutcome::Failed => sums.failed += 1,
                StepOutcome::Blocked => sums.blocked += 1,
                StepOutcome::Skipped => sums.skipped += 1,
                StepOutcome::Done => match step.facts.action {
                    Action::Create => sums.created += 1,
                    Action::Export => sums.exported += 1,
                    Action::Promote => sums.promoted += 1,
                    Action::Delete => sums.deleted += 1,
                    Action::DeleteTemplate => sums.templates_deleted += 1,
                    Action::PruneCopy => sums.copies_pruned += 1,
                    // Only a manual command restores.
                    Action::Copy
                    | Action::Restore
                    | Action::StopInstance
                    | Action::Revert
                    | Action::Reset
                    | Action::StartInstance
                    // No step.
                    | Action::Vanish => {}
                },
            }
        }
        sums
    }
}
