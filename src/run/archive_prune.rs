//! Prunes the copies in an archive, by the archive's own retention.
//!
//! Nothing is pruned from an archive that cannot be read. A pruned copy leaves its manifest, marked: so the export gate knows
//! that the copy existed. The manifest is removed once its snapshot is not there any more.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::archive::backend::Archive;
use crate::archive::catalogue::{CopyFilter, StoredCopy};
use crate::archive::manifest_update::{ManifestUpdate, UpdateError};
use crate::archive::marker::Marker;
use crate::clock::Clock;
use crate::policy::name::ArchiveName;
use crate::policy::{ArchiveRules, Guard, Policy};
use crate::retention::export_gate::unadopted_text;
use crate::retention::inventory::ClockSkew;
use crate::run::archive_presence::{Looker, Presence, is_in_doubt, remember_write};
use crate::run::archive_retention::{CopyDecision, CopyPlan, Judged};
use crate::run::context::Runner;
use crate::run::guard::valid;
use crate::run::plan::ZonePlan;
use crate::run::report::Step;
use crate::run::step::{Done, Recorder, StepError};
use crate::run::zone_run::{ZoneRun, add_steps};
use crate::snapshot::{SnapshotId, ZoneName};
use crate::state::allowances::{Allowance, AllowanceOf};
use crate::state::archives::Archives;
use crate::state::audit::{Action, StepOutcome, Subject};
use crate::state::directory::StateDirectory;
use crate::state::holds::Holds;
use crate::state::last_runs::AcceptedListing;
use crate::text::chain;

/// The most manifests of pruned copies that a run removes; the next run removes more.
const FORGOTTEN_MAX: usize = 1000;

/// Prunes one archive.
#[derive(Debug, Clone)]
pub struct ArchivePruner {
    /// Has the holds, the allowances and the audit log.
    pub(crate) state: StateDirectory,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) archive: Arc<Archive>,
    pub(crate) rules: ArchiveRules,
    /// Every policy of the configuration: allowances wait for the runs of those that export, and copies for those that take snapshots.
    pub(crate) policies: Vec<Policy>,
    /// The copies that are pruned. All are judged, so that no more are pruned than without a filter.
    pub(crate) only: CopyFilter,
}

impl ArchivePruner {
    /// The copies that would be pruned, in these zones or in all, if these came; nothing is changed.
    ///
    /// # Errors
    /// Why that is unknown, as a sentence.
    pub(crate) async fn plan(
        &self,
        zones: Option<&[ZoneName]>,
        coming: &[(ZoneName, Subject)],
    ) -> Result<CopyPlan, String> {
        let allowances = if self.prunes_all() {
            self.state.allowances(&self.allowed()).await.map_err(|error| chain(&error))?
        } else {
            Vec::new()
        };
        self.plan_with(zones, coming, allowances).await
    }

    async fn plan_with(
        &self,
        zones: Option<&[ZoneName]>,
        coming: &[(ZoneName, Subject)],
        allowances: Vec<Allowance>,
    ) -> Result<CopyPlan, String> {
        let looker = Looker::new(&self.state).await?;
        let archive = self.archive.name();
        let found = looker.look(&self.archive, &self.rules.guard).await?;
        match found.presence {
            Presence::Closed(why) | Presence::InDoubt { why, .. } => return Err(why),
            Presence::Unadopted => return Err(unadopted_text(archive)),
            Presence::Known | Presence::FirstUse => {}
        }
        let now = self.clock.now();
        let exports = |policy: &&Policy| {
            policy.export.as_ref().is_some_and(|export| policy.enabled && export.archives.contains(archive))
        };
        let exporting: Vec<&Policy> = self.policies.iter().filter(exports).collect();
        let judged = Judged {
            archive,
            rules: &self.rules,
            policies: &self.policies,
            states: &self.state.all_policy_states().await.map_err(|error| chain(&error))?,
            catalogue: &found.catalogue,
            holds: &self.holds().await?,
            memory: &found.memory,
            allowances: &valid(allowances, &exporting, now),
            coming,
        };
        let mut plan = judged.plan(zones, now)?;
        plan.decisions.retain(|decision| self.only.includes(&decision.copy.manifest));
        plan.note_kept(&found.catalogue);
        plan.held.retain(|zone, _| self.only.includes_zone(zone));
        plan.pending.retain(|zone, _| self.only.includes_zone(zone));
        Ok(plan)
    }

    /// Whether nothing is filtered. Only then are allowances used, and is it remembered what the plan rested on: both are
    /// about all copies.
    fn prunes_all(&self) -> bool {
        self.only == CopyFilter::default()
    }

    fn allowed(&self) -> AllowanceOf {
        AllowanceOf::Archive(self.archive.name().clone())
    }

    async fn holds(&self) -> Result<Holds, String> {
        self.state.holds().await.map_err(|error| format!("the holds cannot be read: {}", chain(&error)))
    }

    /// Prunes the copies in these zones or in all, each recorded before and after. If some are blocked, the allowances are used
    /// up.
    ///
    /// # Errors
    /// Why nothing was begun, as a sentence.
    pub async fn prune(
        &self,
        recorder: &Recorder,
        zones: Option<&[ZoneName]>,
        stop: &CancellationToken,
    ) -> Result<(CopyPlan, Vec<Step>), String> {
        let mut plan = self.plan_with(zones, &[], Vec::new()).await?;
        // Where nothing is blocked, an allowance stays for the pruning that needs it.
        if self.prunes_all() && !(plan.held.is_empty() && plan.pending.is_empty()) {
            let allowances = self.state.take_allowances(&self.allowed(), &*self.clock, stop).await;
            plan = self.plan_with(zones, &[], allowances.map_err(|error| chain(&error))?).await?;
        }
        // Before anything is pruned: else a change could seem to be new again for ever.
        if self.prunes_all() {
            let (name, memories) = (self.archive.name().clone(), plan.memories.clone());
            let remember =
                move |all: &mut Archives| all.archives.entry(name).or_default().rested_on.extend(memories);
            self.state.change_archives(&*self.clock, remember).await.map_err(|error| chain(&error))?;
        }
        let mut steps = Vec::new();
        for CopyDecision { copy, facts, .. } in plan.deletions() {
            let kept = plan.newest_kept.get(&copy.manifest.instance.id);
            steps.push(recorder.step(facts.clone(), self.prune_one(copy, kept)).await);
        }
        // What an earlier pruning left may not be locked any more.
        if let Err(error) = self.archive.delete_noncurrent().await {
            warn!("archive {}: noncurrent versions stay: {}", self.archive.name(), chain(&error));
        }
        Ok((plan, steps))
    }

    /// Prunes a copy, in place of which this newest one stays, if it still does.
    async fn prune_one(&self, copy: &StoredCopy, kept: Option<&StoredCopy>) -> Result<Done, StepError> {
        if let Some(kept) = kept {
            let doubts = self.state.doubts(self.archive.name()).await;
            let doubts = doubts.map_err(|error| StepError::failed(chain(&error)))?;
            let counts = !is_in_doubt(&doubts, kept, self.clock.now())
                && self.archive.has(kept).await.map_err(|error| StepError::failed(chain(&error)))?;
            if !counts {
                return Err(StepError::blocked(format!(
                    "the newest copy that would stay, of snapshot {}, does not count any more since the plan: see `snapwarden archive list {}`",
                    kept.manifest.snapshot.id,
                    self.archive.name()
                )));
            }
        }
        // Again, so that a hold that was placed since the plan still counts.
        let holds = self.holds().await.map_err(StepError::failed)?;
        let now = self.clock.now();
        if holds.on(copy.manifest.snapshot.id, now).is_some() {
            return Err(StepError::skipped("its snapshot has been put on hold since the plan"));
        }
        let pruned = self.archive.update_manifest(copy, ManifestUpdate::Pruned(now)).await;
        if let Err(held @ UpdateError::Held(_)) = &pruned {
            return Err(StepError::skipped(chain(held)));
        }
        let failure = pruned.as_ref().err().and_then(UpdateError::failed_write).map(|error| chain(error));
        if pruned.is_ok() || failure.is_some() {
            let remembered = remember_write(&self.state, &*self.clock, self.archive.name(), failure).await;
            remembered.map_err(StepError::failed)?;
        }
        pruned.map(|()| Done::default()).map_err(|error| StepError::failed(chain(&error)))
    }
}

/// The pruned copies of the plan's zone whose snapshots are listed neither now nor in the accepted listing before: no gate
/// asks for them any more. Only of archives that no other state uses.
pub(crate) fn stale_manifests(plan: &ZonePlan, before: &AcceptedListing) -> Vec<(ArchiveName, StoredCopy)> {
    let listing = &plan.listing;
    let snapshots = listing.inventory.snapshots.iter().map(|snapshot| snapshot.id);
    let listed: HashSet<SnapshotId> = snapshots.chain(before.snapshots.iter().copied()).collect();
    let is_stale = |copy: &&StoredCopy| {
        let id = copy.manifest.snapshot.id;
        let is_pruned = copy.manifest.pruned_at.is_some() && !copy.has_image;
        let is_known = listed.contains(&id) || listing.inventory.holds.contains_key(&id);
        is_pruned && copy.manifest.zone == *plan.zone() && !is_known
    };
    let known =
        listing.catalogues.iter().filter(|(name, _)| listing.presence(name) == Some(&Presence::Known));
    let catalogues = known.filter_map(|(name, catalogue)| Some((name, catalogue.as_ref().ok()?)));
    // Another state may still remember a copy with its image: then the mark explains where that is.
    let is_alone = |marker: &Marker| marker.states.len() <= 1;
    let ours = catalogues
        .filter(|(_, catalogue)| matches!(catalogue.marker(), Ok(Some(marker)) if is_alone(marker)));
    let stale = ours.flat_map(|(name, catalogue)| {
        catalogue.copies().iter().filter(is_stale).map(|copy| (name.clone(), copy.clone()))
    });
    stale.take(FORGOTTEN_MAX).collect()
}

/// Why this run may delete nothing in archives, if so.
pub(super) fn refusal(zones: &[ZoneRun]) -> Option<&'static str> {
    if zones.iter().any(|zone| zone.report.held.is_some()) {
        Some("deletions are blocked by the guard")
    } else if zones.iter().any(|zone| zone.report.plan.is_none()) {
        Some("a zone could not be listed for deletions")
    } else {
        None
    }
}

impl Runner {
    /// Removes these manifests, but those of copies that this state remembers with their images.
    ///
    /// # Errors
    /// Why the first of them stays, and with it the rest.
    pub(crate) async fn forget_pruned(
        &self,
        stale: &[(ArchiveName, StoredCopy)],
        stop: &CancellationToken,
    ) -> Result<(), String> {
        if stale.is_empty() {
            return Ok(());
        }
        let known = self.state.archives().await.map_err(|error| chain(&error))?;
        for (name, copy) in stale {
            let Some(archive) = self.archives.get(name).filter(|_| !stop.is_cancelled()) else { continue };
            let memory = known.archives.get(name);
            if memory.is_some_and(|memory| memory.copies.contains(&copy.manifest.id())) {
                continue;
            }
            match archive.forget_pruned(copy).await {
                // Another process is at it, or was: the next run looks again.
                Ok(())
                | Err(UpdateError::Changed { .. } | UpdateError::Busy { .. } | UpdateError::Held(_)) => {}
                Err(error) => {
                    return Err(format!(
                        "archive {name}: the manifests of copies that were pruned, and whose snapshots are deleted, stay: {}",
                        chain(&error)
                    ));
                }
            }
        }
        Ok(())
    }

    /// The pruner of this archive, if the archive has a retention.
    pub(crate) fn pruner(&self, name: &ArchiveName) -> Option<ArchivePruner> {
        let rules = self.archive_rules.get(name).filter(|rules| rules.retention.is_some())?;
        Some(ArchivePruner {
            state: self.state.clone(),
            clock: Arc::clone(&self.clock),
            archive: Arc::clone(self.archives.get(name)?),
            rules: rules.clone(),
            policies: self.policies.clone(),
            only: CopyFilter::default(),
        })
    }

    /// Whether this machine's clock is right, by the listings of the run and at this moment: hours may have passed.
    pub(super) async fn is_clock_right(&self, policy: &Policy, guard: &Guard, zones: &[ZoneRun]) -> bool {
        let is_right = |skew: ClockSkew| match skew {
            ClockSkew::Known(skew) => skew.unsigned_abs() <= guard.max_clock_skew,
            ClockSkew::Unknown | ClockSkew::OnPaper => false,
        };
        let mut plans = zones.iter().filter_map(|zone| zone.plan.as_ref());
        if !plans.all(|plan| is_right(plan.listing.inventory.clock)) {
            return false;
        }
        let Some(zone) = policy.zones.first() else { return false };
        let now = self.client.clock_skew(zone).await;
        is_right(now.ok().flatten().map_or(ClockSkew::Unknown, ClockSkew::Known))
    }

    /// Prunes each archive that this run stored something in, or that is `full`, in the run's zones. Nothing is pruned
    /// where deletions were blocked, or where this machine's clock is not known to be right: a wrong clock makes every
    /// copy old.
    pub(super) async fn prune_archives(
        &self,
        policy: &Policy,
        recorder: &Recorder,
        zones: &mut [ZoneRun],
        full: BTreeSet<ArchiveName>,
        stop: &CancellationToken,
    ) {
        let steps = zones.iter().flat_map(|zone| &zone.report.steps);
        let exports =
            steps.filter(|step| (step.facts.action, step.outcome) == (Action::Export, StepOutcome::Done));
        let mut stored: BTreeSet<ArchiveName> =
            exports.filter_map(|step| step.facts.archive.clone()).collect();
        stored.extend(full);
        let refusal = refusal(zones);
        for pruner in stored.iter().filter_map(|name| self.pruner(name)) {
            let refusal = match refusal {
                None if self.is_clock_right(policy, &pruner.rules.guard, zones).await => None,
                None => Some("this machine's clock may be wrong"),
                refusal => refusal,
            };
            let pruned = match refusal {
                None => pruner.prune(recorder, Some(&policy.zones), stop).await,
                Some(_) => Ok((CopyPlan::default(), Vec::new())),
            };
            let name = pruner.archive.name();
            // It concerns the archive, and a report has zones alone: it is said once, in the first.
            if let Some(ZoneRun { report, .. }) = zones.first_mut() {
                let why = refusal.map(|why| format!("no copy in archive {name} is pruned, since {why}"));
                report.warnings.extend(why);
                let error = pruned.as_ref().err();
                report
                    .failures
                    .extend(error.map(|why| format!("no copy in archive {name} is pruned: {why}")));
            }
            let (plan, steps) = pruned.unwrap_or_default();
            for ZoneRun { report, .. } in &mut *zones {
                report.held = report.held.take().or_else(|| plan.held.get(&report.zone).cloned());
                let pending =
                    report.pending.take().into_iter().chain(plan.pending.get(&report.zone).cloned());
                report.pending = pending.reduce(|one, other| format!("{one}; {other}"));
                report.warnings.extend(plan.warnings.get(&report.zone).into_iter().flatten().cloned());
            }
            add_steps(zones, steps);
        }
    }
}

#[cfg(test)]
mod tests;
