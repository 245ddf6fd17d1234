//! Prunes the copies in an archive, by the archive's own retention.
//!
//! The same engine decides as for snapshots: each verified copy stands for its snapshot. Corrupt copies, and everything else
//! that does not count as a copy, are neither counted nor pruned, and nothing is pruned from an archive that cannot be read.
//! A pruned copy leaves its manifest, marked: so the export gate knows that the copy existed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::archive::backend::Archive;
use crate::archive::catalogue::{Catalogue, StoredCopy};
use crate::archive::manifest::Manifest;
use crate::archive::manifest_update::{ManifestUpdate, UpdateError};
use crate::clock::Clock;
use crate::policy::name::{ArchiveName, PolicyName};
use crate::policy::select::Select;
use crate::policy::{Guard, OnStart, Policy, Retention};
use crate::retention;
use crate::retention::export_gate::unadopted_text;
use crate::retention::inventory::{ClockSkew, Inventory};
use crate::retention::verdict::Verdict;
use crate::run::archive_presence::{Looker, Presence, remember_write};
use crate::run::context::Runner;
use crate::run::list::holds_by_snapshot;
use crate::run::report::Step;
use crate::run::step::{Done, Recorder, StepError};
use crate::run::zone_run::{ZoneRun, add_steps};
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, SnapshotState, ZoneName};
use crate::state::audit::{Action, StepFacts, StepOutcome, Subject};
use crate::state::directory::StateDirectory;
use crate::state::holds::Holds;
use crate::text::chain;

/// Prunes one archive.
#[derive(Debug, Clone)]
pub struct ArchivePruner {
    /// Has the holds and the audit log.
    pub(crate) state: StateDirectory,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) archive: Arc<Archive>,
    pub(crate) retention: Retention,
    pub(crate) guard: Guard,
}

impl ArchivePruner {
    /// The copies that would be pruned, in these zones or in all, each with the step that prunes it; nothing is changed.
    ///
    /// # Errors
    /// Why that is unknown, as a sentence.
    pub(crate) async fn plan(
        &self,
        zones: Option<&[ZoneName]>,
    ) -> Result<Vec<(StoredCopy, StepFacts)>, String> {
        let looker = Looker::new(&self.state).await?;
        let found = looker.look(&self.archive, &self.guard).await?;
        match found.presence {
            Presence::Closed(why) | Presence::WriteFailed { why, .. } => return Err(why),
            Presence::Unadopted => return Err(unadopted_text(self.archive.name())),
            Presence::Known | Presence::FirstUse => {}
        }
        let catalogue = found.catalogue;
        let holds = self.holds().await?;
        let mut all = copies_to_prune(&catalogue, &self.retention, &holds, self.clock.now())?;
        all.retain(|(_, facts)| zones.is_none_or(|zones| zones.contains(&facts.zone)));
        Ok(all)
    }

    async fn holds(&self) -> Result<Holds, String> {
        self.state.holds().await.map_err(|error| format!("the holds cannot be read: {}", chain(&error)))
    }

    /// Prunes these copies, each recorded before and after.
    ///
    /// # Errors
    /// Why nothing was begun, as a sentence.
    pub async fn prune(&self, recorder: &Recorder, zones: Option<&[ZoneName]>) -> Result<Vec<Step>, String> {
        let mut steps = Vec::new();
        for (copy, intent) in self.plan(zones).await? {
            steps.push(recorder.step(intent, self.prune_one(&copy)).await);
        }
        Ok(steps)
    }

    async fn prune_one(&self, copy: &StoredCopy) -> Result<Done, StepError> {
        // Again, so that a hold that was placed since the plan still counts.
        let holds = self.holds().await.map_err(StepError::failed)?;
        let now = self.clock.now();
        if holds.on(copy.manifest.snapshot.id, now).is_some() {
            return Err(StepError::skipped("its snapshot has been put on hold since the plan"));
        }
        let pruned = self.archive.update_manifest(copy, ManifestUpdate::Pruned(now)).await;
        let failure = pruned.as_ref().err().and_then(UpdateError::failed_write).map(|error| chain(error));
        if pruned.is_ok() || failure.is_some() {
            let remembered = remember_write(&self.state, &*self.clock, self.archive.name(), failure).await;
            remembered.map_err(StepError::failed)?;
        }
        pruned.map(|()| Done::default()).map_err(|error| StepError::failed(chain(&error)))
    }
}

/// The snapshot of a copy, as the audit log and the report name it.
pub fn subject_of(manifest: &Manifest) -> Subject {
    Subject {
        id: Some(manifest.snapshot.id),
        name: manifest.snapshot.name.clone(),
        created_at: manifest.snapshot.created_at,
        instance_id: Some(manifest.instance.id),
        instance_name: manifest.instance.name.clone(),
    }
}

/// The copies that the retention does not keep, oldest first in each zone.
fn copies_to_prune(
    catalogue: &Catalogue,
    retention: &Retention,
    holds: &Holds,
    now: Timestamp,
) -> Result<Vec<(StoredCopy, StepFacts)>, String> {
    let mut by_zone: BTreeMap<&ZoneName, Vec<&StoredCopy>> = BTreeMap::new();
    // The rule is the configuration key that decided it; none for what an earlier pruning left behind.
    let facts = |manifest: &Manifest, rule, reasons| StepFacts {
        archive: Some(catalogue.archive().clone()),
        rule,
        ..StepFacts::new(Action::PruneCopy, &manifest.zone, subject_of(manifest), reasons)
    };
    let mut all = Vec::new();
    for copy in catalogue.copies() {
        match copy.manifest.pruned_at {
            None => by_zone.entry(&copy.manifest.zone).or_default().push(copy),
            Some(at) if copy.has_image && holds.on(copy.manifest.snapshot.id, now).is_none() => {
                let reason = format!("it was marked as pruned at {at}, and its image is still there");
                all.push((copy.clone(), facts(&copy.manifest, None, vec![reason])));
            }
            Some(_) => {}
        }
    }
    for (zone, copies) in by_zone {
        let mut times: HashMap<SnapshotId, usize> = HashMap::new();
        for copy in &copies {
            *times.entry(copy.manifest.snapshot.id).or_default() += 1;
        }
        // Two copies of one snapshot, of different instances: something is odd, so both stay.
        let copies: Vec<&StoredCopy> =
            copies.into_iter().filter(|copy| times.get(&copy.manifest.snapshot.id) == Some(&1)).collect();
        let policy = policy(catalogue.archive(), zone, retention)?;
        let inventory = inventory(zone, &copies, holds);
        let plan = retention::decide(&[policy], &inventory, now);
        let mut here = Vec::new();
        for plan in &plan.policies {
            for decision in plan.decisions.iter().filter(|decision| decision.verdict == Verdict::Delete) {
                let Some(copy) = copies.get(decision.index as usize) else { continue };
                let reasons = decision.reasons().map(|reason| reason.to_string()).collect();
                let facts = facts(&copy.manifest, Some(decision.rule.as_str()), reasons);
                here.push(((*copy).clone(), facts));
            }
        }
        here.sort_by_key(|(copy, _)| (copy.manifest.snapshot.created_at, copy.manifest.snapshot.id));
        all.extend(here);
    }
    Ok(all)
}

/// A policy that keeps what the archive's retention keeps, and selects every copy.
fn policy(archive: &ArchiveName, zone: &ZoneName, retention: &Retention) -> Result<Policy, String> {
    let name: PolicyName = archive.as_str().parse().map_err(|error| format!("archive {archive}: {error}"))?;
    Ok(Policy {
        name,
        enabled: true,
        schedule: None,
        time_zone: TimeZone::UTC,
        jitter: std::time::Duration::ZERO,
        on_start: OnStart::Wait,
        deadline: None,
        create: false,
        zones: vec![zone.clone()],
        // Copies outlive their instances: that is their purpose.
        select: Select { judge_orphans: true, ..Select::default() },
        retention: Some(retention.clone()),
        guard: Guard {
            max_deletes: None,
            max_delete_percent: 100,
            max_listing_drop_percent: 100,
            max_clock_skew: std::time::Duration::MAX,
            settle: std::time::Duration::ZERO,
            expect_newest: None,
        },
        export: None,
        promote: None,
    })
}

/// The copies of a zone, in this order, as if they were its snapshots.
fn inventory(zone: &ZoneName, copies: &[&StoredCopy], holds: &Holds) -> Inventory {
    let mut instances: BTreeMap<InstanceId, Instance> = BTreeMap::new();
    let snapshot = |copy: &&StoredCopy| {
        let Manifest { snapshot, instance, .. } = &copy.manifest;
        instances.entry(instance.id).or_insert_with(|| Instance {
            id: instance.id,
            name: instance.name.clone().unwrap_or_default().into(),
            labels: BTreeMap::new(),
            template_id: None,
            is_managed: false,
        });
        Snapshot {
            id: snapshot.id,
            name: snapshot.name.clone().into(),
            created_at: snapshot.created_at,
            state: SnapshotState::Exported,
            size_gib: snapshot.size_gib,
            instance_id: Some(instance.id),
            application_consistent: snapshot.application_consistent,
        }
    };
    let snapshots = copies.iter().map(snapshot).collect();
    let instances = instances.into_values().collect();
    Inventory { holds: holds_by_snapshot(holds), ..Inventory::on_paper(zone.clone(), snapshots, instances) }
}

impl Runner {
    /// The pruner of this archive, if the archive has a retention.
    pub(crate) fn pruner(&self, name: &ArchiveName) -> Option<ArchivePruner> {
        Some(ArchivePruner {
            state: self.state.clone(),
            clock: Arc::clone(&self.clock),
            archive: Arc::clone(self.archives.get(name)?),
            retention: self.archive_rules.get(name)?.retention.clone()?,
            guard: self.archive_rules.get(name)?.guard.clone(),
        })
    }

    /// Whether this machine's clock is right, by the listings of the run and at this moment: hours may have passed.
    async fn is_clock_right(&self, policy: &Policy, zones: &[ZoneRun]) -> bool {
        let is_right = |skew: ClockSkew| match skew {
            ClockSkew::Known(skew) => skew.unsigned_abs() <= policy.guard.max_clock_skew,
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
    ) {
        let steps = zones.iter().flat_map(|zone| &zone.report.steps);
        let exports =
            steps.filter(|step| (step.facts.action, step.outcome) == (Action::Export, StepOutcome::Done));
        let mut stored: BTreeSet<ArchiveName> =
            exports.filter_map(|step| step.facts.archive.clone()).collect();
        stored.extend(full);
        let refusal = if stored.is_empty() {
            None
        } else if zones.iter().any(|zone| zone.report.held.is_some()) {
            Some("deletions are blocked by the guard")
        } else if zones.iter().any(|zone| zone.report.plan.is_none()) {
            Some("a zone could not be listed for deletions")
        } else if !self.is_clock_right(policy, zones).await {
            Some("this machine's clock may be wrong")
        } else {
            None
        };
        for pruner in stored.iter().filter_map(|name| self.pruner(name)) {
            let pruned = match refusal {
                None => pruner.prune(recorder, Some(&policy.zones)).await,
                Some(_) => Ok(Vec::new()),
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
            add_steps(zones, pruned.unwrap_or_default());
        }
    }
}

#[cfg(test)]
mod tests;
