//! Prunes the copies in an archive, by the archive's own retention.
//!
//! The same engine judges as for snapshots: each verified copy stands for the snapshot that it is of. Corrupt copies, and
//! whatever else does not count, are neither counted nor pruned, and an archive that can't be read loses nothing. A copy that
//! goes leaves its manifest, marked: so the gate knows that it was there.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::archive::backend::Archive;
use crate::archive::catalogue::{Catalogue, StoredCopy};
use crate::archive::manifest::Manifest;
use crate::archive::manifest_update::ManifestUpdate;
use crate::clock::Clock;
use crate::policy::select::Select;
use crate::policy::{ArchiveName, Guard, OnStart, Policy, PolicyName, Retention};
use crate::retention;
use crate::retention::inventory::{ClockSkew, Hold, Inventory};
use crate::retention::verdict::Verdict;
use crate::run::report::{Step, ZoneReport};
use crate::run::step::{Done, Recorder, StepError};
use crate::run::{Runner, ZonePlan};
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, SnapshotState, ZoneName};
use crate::state::audit::{Action, StepFacts, StepOutcome, Subject};
use crate::state::directory::StateDirectory;
use crate::state::holds::Holds;
use crate::text::chain;

/// A copy that goes, and why.
#[derive(Debug, Clone)]
pub struct CopyToPrune {
    /// Which.
    pub copy: StoredCopy,
    /// The key to blame; none of what an earlier pruning left.
    pub rule: Option<&'static str>,
    /// Why.
    pub reasons: Vec<String>,
}

/// An archive with its retention, and what pruning it takes.
#[derive(Debug, Clone)]
pub struct ArchivePruner {
    /// The memory: what is held, and the audit log.
    pub state: StateDirectory,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// The archive.
    pub archive: Arc<Archive>,
    /// What stays.
    pub retention: Retention,
}

impl ArchivePruner {
    /// Which copies would go, in these zones or in all; nothing is changed.
    ///
    /// # Errors
    /// Why nothing can be told, as a sentence.
    pub async fn plan(&self, zones: Option<&[ZoneName]>) -> Result<Vec<CopyToPrune>, String> {
        let catalogue = self.archive.catalogue().await.map_err(|error| chain(&error))?;
        let holds = self.holds().await?;
        let mut going = going(&catalogue, &self.retention, &holds, self.clock.now())?;
        going.retain(|going| zones.is_none_or(|zones| zones.contains(&going.copy.manifest.zone)));
        Ok(going)
    }

    async fn holds(&self) -> Result<Holds, String> {
        self.state.holds().await.map_err(|error| format!("it can't be told what is held: {}", chain(&error)))
    }

    /// Prunes the copies that go, each written down before and after; steps come with their zones.
    ///
    /// # Errors
    /// Why nothing was begun, as a sentence.
    pub async fn prune(
        &self,
        recorder: &Recorder,
        zones: Option<&[ZoneName]>,
    ) -> Result<Vec<(ZoneName, Step)>, String> {
        let mut steps = Vec::new();
        for CopyToPrune { copy, rule, reasons } in self.plan(zones).await? {
            let manifest = &copy.manifest;
            let intent = StepFacts {
                archive: Some(self.archive.name().clone()),
                rule,
                ..StepFacts::new(Action::PruneCopy, &manifest.zone, subject_of(manifest), reasons)
            };
            let step = recorder.step(intent, self.prune_one(&copy)).await;
            steps.push((manifest.zone.clone(), step));
        }
        Ok(steps)
    }

    async fn prune_one(&self, copy: &StoredCopy) -> Result<Done, StepError> {
        // Again, so that a hold that comes meanwhile still counts.
        let holds = self.holds().await.map_err(StepError::failed)?;
        let now = self.clock.now();
        if holds.on(copy.manifest.snapshot.id, now).is_some() {
            return Err(StepError::skipped("its snapshot has been pinned meanwhile"));
        }
        let pruned = self.archive.update_manifest(copy, ManifestUpdate::Pruned(now)).await;
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

/// The copies that go, oldest first in each zone.
///
/// # Errors
/// Why it can't be told.
fn going(
    catalogue: &Catalogue,
    retention: &Retention,
    holds: &Holds,
    now: Timestamp,
) -> Result<Vec<CopyToPrune>, String> {
    let mut by_zone: BTreeMap<&ZoneName, Vec<&StoredCopy>> = BTreeMap::new();
    let mut all = Vec::new();
    for copy in catalogue.copies() {
        match copy.manifest.pruned_at {
            None => by_zone.entry(&copy.manifest.zone).or_default().push(copy),
            Some(at) if copy.has_image && holds.on(copy.manifest.snapshot.id, now).is_none() => {
                let reason = format!("it was marked as pruned at {at}, and its image is still there");
                all.push(CopyToPrune { copy: copy.clone(), rule: None, reasons: vec![reason] });
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
                here.push(CopyToPrune { copy: (*copy).clone(), rule: Some(decision.rule.as_str()), reasons });
            }
        }
        here.sort_by_key(|going| (going.copy.manifest.snapshot.created_at, going.copy.manifest.snapshot.id));
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
        // Copies outlive their instances: that is what they are for.
        select: Select { judge_orphans: true, ..Select::default() },
        retention: Some(retention.clone()),
        guard: Guard {
            max_deletes: None,
            max_delete_percent: 100,
            max_listing_drop_percent: 100,
            max_clock_skew: std::time::Duration::MAX,
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
        });
        Snapshot {
            id: snapshot.id,
            name: snapshot.name.clone().into(),
            created_at: snapshot.created_at,
            state: SnapshotState::Exported,
            size_gib: snapshot.size_gib,
            instance_id: Some(instance.id),
        }
    };
    let snapshots = copies.iter().map(snapshot).collect();
    let holds = holds.holds.iter().map(|hold| {
        let pin = Hold { until: hold.until, reason: hold.reason.clone() };
        (hold.snapshot, pin)
    });
    Inventory {
        zone: zone.clone(),
        snapshots,
        instances: instances.into_values().collect(),
        created: HashSet::new(),
        coming: HashSet::new(),
        holds: holds.collect(),
        archives: BTreeMap::new(),
        clock: ClockSkew::OnPaper,
    }
}

impl Runner {
    /// What pruning this archive takes, if it has a retention.
    pub fn pruner(&self, name: &ArchiveName) -> Option<ArchivePruner> {
        Some(ArchivePruner {
            state: self.state.clone(),
            clock: Arc::clone(&self.clock),
            archive: Arc::clone(self.archives.get(name)?),
            retention: self.archive_rules.get(name)?.retention.clone()?,
        })
    }

    /// Prunes each archive that this run stored something in, in the run's zones. Where deletions were held, or this
    /// machine's clock is not known to be right, the copies stay as well.
    pub(super) async fn prune_archives(
        &self,
        policy: &Policy,
        recorder: &Recorder,
        first: &[ZonePlan],
        zones: &mut [ZoneReport],
    ) {
        let exports = zones.iter().flat_map(|zone| &zone.steps);
        let exports =
            exports.filter(|step| (step.facts.action, step.outcome) == (Action::Export, StepOutcome::Done));
        let stored: BTreeSet<ArchiveName> = exports.filter_map(|step| step.facts.archive.clone()).collect();
        let pruners: Vec<ArchivePruner> = stored.iter().filter_map(|name| self.pruner(name)).collect();
        if pruners.is_empty() {
            return;
        }
        let is_right = |clock: ClockSkew| match clock {
            ClockSkew::Known(skew) => skew.unsigned_abs() <= policy.guard.max_clock_skew,
            ClockSkew::Unknown | ClockSkew::OnPaper => false,
        };
        let mut known = first.iter().filter_map(|(_, planned)| planned.as_ref().ok());
        let is_right = known.all(|planned| is_right(planned.listed.inventory.clock));
        let is_held = zones.iter().any(|zone| zone.held.is_some());
        for pruner in pruners {
            let name = pruner.archive.name().clone();
            if !is_right || is_held {
                let why =
                    if is_held { "deletions are held back" } else { "this machine's clock is in doubt" };
                let warning = format!("no copy in archive {name} is pruned, since {why}");
                zones.iter_mut().take(1).for_each(|zone| zone.warnings.push(warning.clone()));
                continue;
            }
            match pruner.prune(recorder, Some(&policy.zones)).await {
                Ok(steps) => {
                    for (zone, step) in steps {
                        zones.iter_mut().filter(|report| report.zone == zone).for_each(|report| {
                            report.steps.push(step.clone());
                        });
                    }
                }
                Err(why) => {
                    let failure = format!("no copy in archive {name} is pruned: {why}");
                    zones.iter_mut().take(1).for_each(|zone| zone.failures.push(failure.clone()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
