//! Removes from archives, once a day, what interrupted exports left; in a repository of restic that frees the space of
//! pruned copies, too.

use jiff::SignedDuration;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::policy::{Export, Policy};
use crate::run::archive_presence::Presence;
use crate::run::archive_prune::refusal;
use crate::run::context::Runner;
use crate::run::zone_run::ZoneRun;
use crate::state::archives::ArchiveMemory;
use crate::text::chain;

/// How often: less than a day, so that a daily run that begins a little earlier than the one before does not leave it out.
const INTERVAL: SignedDuration = SignedDuration::from_hours(23);

impl Runner {
    /// Removes what is left in each archive of the policy where that was not done for a day. As with copies, nothing is removed
    /// where deletions were blocked, from an archive that is in doubt, or where this machine's clock is not known to be right.
    /// What can't be removed is a warning: the next run tries again.
    pub(super) async fn remove_leftovers(
        &self,
        policy: &Policy,
        export: &Export,
        zones: &mut [ZoneRun],
        stop: &CancellationToken,
    ) {
        if refusal(zones).is_some() {
            return;
        }
        let (mut warnings, mut failures) = (Vec::new(), Vec::new());
        for name in &export.archives {
            let may_delete = |presence: &Presence| *presence == Presence::Known || presence.is_first_use();
            let is_there = |zone: &ZoneRun| {
                zone.plan.as_ref().is_some_and(|plan| plan.listing.presence(name).is_some_and(may_delete))
            };
            let Some(archive) = self.archives.get(name).filter(|_| zones.iter().all(is_there)) else {
                continue;
            };
            // Where it can't be read, the run has failed already.
            let Ok(known) = self.state.archives().await else { return };
            let now = self.clock.now();
            let is_done = |at| now.duration_since(at).abs() < INTERVAL;
            if known.of(name).leftovers_removed_at.is_some_and(is_done) {
                continue;
            }
            if !self.is_clock_right(policy, &policy.guard, zones).await {
                return;
            }
            let Some(removed) = stop.run_until_cancelled(archive.remove_leftovers()).await else { return };
            let removed = match removed {
                Ok(removed) => removed,
                Err(error) => {
                    let why = chain(&error);
                    warnings.push(format!(
                        "archive {name}: what interrupted exports left stays until the next run tries again: {why}"
                    ));
                    continue;
                }
            };
            for leftover in removed {
                let path = leftover.path.display();
                info!(archive = %name, "archive {name}: removed {path}, which an interrupted export left");
            }
            let remember = move |memory: &mut ArchiveMemory| memory.leftovers_removed_at = Some(now);
            if let Err(error) = self.state.change_archive(&*self.clock, name, remember).await {
                failures.push(chain(&error));
            }
        }
        // It concerns archives, and a report has zones alone.
        if let Some(ZoneRun { report, .. }) = zones.first_mut() {
            report.warnings.extend(warnings);
            report.failures.extend(failures);
        }
    }
}
