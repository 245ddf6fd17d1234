//! One zone of a run, which the sequence owns and hands from phase to phase.

use crate::run::plan::ZonePlan;
use crate::run::report::{Step, ZoneReport};
use crate::snapshot::ZoneName;

/// One zone of a run.
#[derive(Debug)]
pub struct ZoneRun {
    /// The plan that creation, export and promotion work by; none if the zone could not be listed. Deletions work by a
    /// plan of their own, from a fresh listing.
    pub(crate) plan: Option<ZonePlan>,
    /// The zone's part of the report, which names the zone.
    pub(crate) report: ZoneReport,
}

impl ZoneRun {
    pub(crate) fn new(zone: &ZoneName, plan: Result<ZonePlan, String>) -> Self {
        let mut run = Self { plan: None, report: ZoneReport::new(zone.clone()) };
        run.set_plan(plan);
        run
    }

    /// Replaces the plan; a plan that failed is a failure of the zone.
    pub(crate) fn set_plan(&mut self, plan: Result<ZonePlan, String>) {
        self.plan = plan.map_err(|failure| self.report.failures.push(failure)).ok();
    }
}

/// Puts each step into the report of its zone.
pub(crate) fn add_steps(zones: &mut [ZoneRun], steps: Vec<Step>) {
    for step in steps {
        if let Some(zone) = zones.iter_mut().find(|zone| zone.report.zone == step.facts.zone) {
            zone.report.steps.push(step);
        }
    }
}
