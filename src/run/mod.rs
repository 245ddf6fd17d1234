//! Conducts one run of a policy: list → select → plan → export → promote → list again → plan again → delete →
//! report.
//!
//! The way of a snapshot: [`inventory`] lists its zone, `retention` decides, [`export`] and [`promote`] make
//! copies of what stays, [`prune`] deletes what goes, [`step`] writes everything down before and after, and
//! [`report`] is what is left to tell. Nothing here decides what stays: that is `retention`'s alone.
//!
//! A run takes no input but the policies. It repeats nothing by itself: requests are repeated inside the
//! client, and a run by the next run.

pub mod export;
pub mod inventory;
pub mod promote;
pub mod prune;
pub mod report;
pub mod source;
pub mod step;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, error, info, info_span, warn};
use uuid::Uuid;

use crate::archive::local::LocalArchive;
use crate::clock::Clock;
use crate::disk::{DiskLock, blocking};
use crate::exoscale::client::Client;
use crate::policy::{ArchiveName, Policy};
use crate::randomness::{Randomness, fresh_id};
use crate::retention;
use crate::retention::guard::{self, Held, ZoneCase};
use crate::retention::inventory::Inventory;
use crate::retention::plan::PolicyPlan;
use crate::run::inventory::{Catalogues, Listed};
use crate::run::promote::Memory;
use crate::run::report::{RunReport, Step, ZoneReport};
use crate::run::step::Recorder;
use crate::snapshot::ZoneName;
use crate::state::audit::{Action, Subject};
use crate::state::{StateDirectory, StateError};
use crate::text::{chain, counted};
use crate::transport::Transport;

/// Between two looks at a zone's lock that another delete phase holds.
const ZONE_LOCK_POLL: Duration = Duration::from_secs(1);

/// So long a delete phase waits for another one in its zone. One that takes longer is left alone: the next
/// run deletes what this one could not.
const ZONE_LOCK_WAIT_MAX: Duration = Duration::from_mins(15);

/// What runs need, whichever policy it is.
#[derive(Debug, Clone)]
pub struct Runner {
    /// The API.
    pub client: Client,
    /// For the bytes of images.
    pub transport: Arc<dyn Transport>,
    /// Every archive of the configuration.
    pub archives: BTreeMap<ArchiveName, Arc<LocalArchive>>,
    /// The memory.
    pub state: StateDirectory,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// For run ids.
    pub randomness: Arc<dyn Randomness>,
    /// Every policy of the configuration: each has a say about what others delete.
    pub policies: Vec<Policy>,
    /// Whether an image may come over plain HTTP from another machine.
    pub allow_plain_http: bool,
    /// So long an answer's head may take.
    pub request_timeout: Duration,
    /// Deletions and promotions at once in a zone.
    pub concurrency: NonZeroUsize,
}

/// What may differ from run to run.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// Lets the guard pass a run of at most so many deletions.
    pub allow_deletes: Option<u64>,
    /// Once cancelled, no new step begins; those in flight go on.
    pub stop: CancellationToken,
}

/// A zone's listing with what is decided for one policy.
#[derive(Debug)]
pub struct Planned {
    /// What was found.
    pub listed: Listed,
    /// What is decided.
    pub plan: PolicyPlan,
    /// Why nothing of it would be deleted, if so.
    pub held: Option<Held>,
    /// What a run would do first; told by a preview alone.
    pub ahead: Vec<Ahead>,
}

/// An export or a promotion that a run would begin with.
#[derive(Debug)]
pub struct Ahead {
    /// What.
    pub action: Action,
    /// Of which snapshot.
    pub snapshot: Subject,
    /// Why.
    pub why: String,
}

/// A zone, and what is decided there, or why nothing can be.
pub type ZonePlan = (ZoneName, Result<Planned, String>);

impl Runner {
    /// Decides what a run of the policy would do now, or as of `at`. Sends nothing that changes anything.
    pub async fn preview(&self, policy: &Policy, at: Option<Timestamp>) -> Vec<ZonePlan> {
        let mut zones = self.list_and_plan(policy, &policy.zones, at).await;
        guard(policy, &mut zones, None);
        for (zone, planned) in &mut zones {
            let Ok(planned) = planned else { continue };
            if let Some(export) = &policy.export {
                planned.ahead.extend(export::ahead(export, zone, planned));
            }
            if let Some(promote) = &policy.promote {
                match promote::ahead(self, policy, promote, planned).await {
                    Ok(ahead) => planned.ahead.extend(ahead),
                    Err(error) => planned.listed.warnings.push(chain(&error)),
                }
            }
        }
        zones
    }

    /// Runs the policy once.
    ///
    /// # Errors
    /// [`StateError`] if the run could not begin, for example since the policy runs already, or since what it
    /// remembers can't be read. What fails later stands in the report.
    pub async fn run(&self, policy: &Policy, options: &RunOptions) -> Result<RunReport, StateError> {
        let _lock = self.state.lock_policy(&policy.name)?;
        // Whoever can't remember what was done must not go on deleting: this is looked at before anything else.
        let (state, name) = (self.state.clone(), policy.name.clone());
        blocking(move || state.policy_state(&name)).await?;
        let run_id = fresh_id(&*self.randomness, self.clock.now());
        let span = info_span!("policy_run", policy.name = %policy.name, run.id = %run_id);
        let report = self.run_locked(policy, options, run_id).instrument(span.clone()).await;
        span.in_scope(|| tell(&report));
        Ok(report)
    }

    async fn run_locked(&self, policy: &Policy, options: &RunOptions, run_id: Uuid) -> RunReport {
        let started_at = self.clock.now();
        let recorder = Recorder::new(self, Some(policy.name.clone()), run_id, options.stop.clone());

        let first = self.list_and_plan(policy, &policy.zones, None).await;
        let mut zones: Vec<ZoneReport> = first
            .iter()
            .map(|(zone, planned)| ZoneReport::new(zone.clone(), planned.as_ref().err().cloned()))
            .collect();
        let listed: Vec<(usize, &ZoneName, &Planned)> = first
            .iter()
            .enumerate()
            .filter_map(|(place, (zone, planned))| Some((place, zone, planned.as_ref().ok()?)))
            .collect();

        if let Some(export) = &policy.export {
            for (place, _, planned) in &listed {
                zones[*place].failures.extend(export::unreadable(export, &planned.listed.catalogues));
            }
            let steps = export::export(self, &recorder, policy, export, &listed).await;
            add(&mut zones, steps);
        }
        if let Some(promote) = &policy.promote {
            let steps = promote::promote(self, &recorder, policy, promote, &listed).await;
            add(&mut zones, steps);
        }
        drop(listed);
        self.delete_phase(policy, options, &recorder, &first, &mut zones).await;
        RunReport::new(run_id, policy.name.clone(), started_at, self.clock.now(), zones)
    }

    /// Lists anew, plans anew, and deletes what that plan lets go, in every zone that this run could list.
    async fn delete_phase(
        &self,
        policy: &Policy,
        options: &RunOptions,
        recorder: &Recorder,
        first: &[ZonePlan],
        reports: &mut [ZoneReport],
    ) {
        // Taken in one order everywhere, so that two runs can't wait for each other in a ring.
        let mut order: Vec<usize> = (0..first.len()).filter(|place| first[*place].1.is_ok()).collect();
        order.sort_by(|a, b| first[*a].0.cmp(&first[*b].0));
        let mut locks: Vec<(usize, Box<dyn DiskLock>)> = Vec::new();
        for place in order {
            match self.lock_zone(&first[place].0, &options.stop).await {
                Ok(lock) => locks.push((place, lock)),
                Err(failure) => reports[place].failures.push(failure),
            }
        }
        if options.stop.is_cancelled() {
            // What would have gone is not known, so no step can tell of it.
            for (place, _) in &locks {
                reports[*place].failures.push("nothing is deleted: the program was told to stop".to_owned());
            }
            return;
        }

        let places: Vec<usize> = locks.iter().map(|(place, _)| *place).collect();
        let names: Vec<ZoneName> = places.iter().map(|place| first[*place].0.clone()).collect();
        let mut again = self.list_and_plan(policy, &names, None).await;
        guard(policy, &mut again, options.allow_deletes);
        let memory = match &policy.promote {
            Some(promote) => Some((promote, Memory::read(self, policy).await.map_err(|error| chain(&error)))),
            None => None,
        };
        let memory = &memory;
        let deletes = places.iter().zip(&again).map(|(place, (zone, planned))| async move {
            match planned {
                Ok(planned) if planned.held.is_none() => {
                    let mut steps = prune::prune(self, recorder, zone, planned).await;
                    let pruned = match memory {
                        Some((promote, Ok(memory))) => {
                            promote::prune_templates(memory, recorder, promote, zone, planned).await
                        }
                        Some((_, Err(failure))) => Err(failure.clone()),
                        None => Ok(Vec::new()),
                    };
                    match pruned {
                        Ok(more) => {
                            steps.extend(more);
                            (*place, steps, None)
                        }
                        Err(failure) => (*place, steps, Some(failure)),
                    }
                }
                _ => (*place, Vec::new(), None),
            }
        });
        let done = join_all(deletes).await;
        for (place, (_, planned)) in places.iter().zip(&again) {
            reports[*place].planned(planned);
        }
        for (place, steps, failure) in done {
            reports[place].steps.extend(steps);
            reports[place].failures.extend(failure);
        }
    }

    async fn lock_zone(
        &self,
        zone: &ZoneName,
        stop: &CancellationToken,
    ) -> Result<Box<dyn DiskLock>, String> {
        let deadline = self.clock.elapsed() + ZONE_LOCK_WAIT_MAX;
        loop {
            match self.state.lock_zone(zone) {
                Ok(lock) => return Ok(lock),
                Err(StateError::Locked { .. }) if self.clock.elapsed() < deadline && !stop.is_cancelled() => {
                    self.clock.sleep(ZONE_LOCK_POLL).await;
                }
                Err(error) => return Err(format!("nothing is deleted: {}", chain(&error))),
            }
        }
    }

    async fn list_and_plan(
        &self,
        policy: &Policy,
        zones: &[ZoneName],
        at: Option<Timestamp>,
    ) -> Vec<ZonePlan> {
        let catalogues = inventory::catalogues(self).await;
        let planned = zones.iter().map(|zone| {
            let catalogues = &catalogues;
            async move {
                let listed = inventory::list(self, zone, catalogues).await;
                let at = at.unwrap_or_else(|| self.clock.now());
                (zone.clone(), listed.and_then(|listed| decide(&self.policies, policy, listed, at)))
            }
        });
        join_all(planned).await
    }
}

/// Decides what a run of the policy would do over the given listings: no network, no memory.
pub fn preview_offline(
    policies: &[Policy],
    policy: &Policy,
    inventories: Vec<Inventory>,
    at: Timestamp,
) -> Vec<ZonePlan> {
    let plan = |inventory: Inventory| {
        let zone = inventory.zone.clone();
        (zone, decide(policies, policy, inventory::listed(inventory, Catalogues::new()), at))
    };
    let mut zones: Vec<ZonePlan> = inventories.into_iter().map(plan).collect();
    guard(policy, &mut zones, None);
    zones
}

fn decide(policies: &[Policy], policy: &Policy, listed: Listed, at: Timestamp) -> Result<Planned, String> {
    retention::plan(policies, &listed.inventory, at)
        .policies
        .into_iter()
        .find(|plan| plan.policy == policy.name)
        .map(|plan| Planned { listed, plan, held: None, ahead: Vec::new() })
        .ok_or_else(|| "the policy is not enabled, or does not speak about this zone".to_owned())
}

/// Writes into each plan whether the guard holds it back.
fn guard(policy: &Policy, zones: &mut [ZonePlan], allowed: Option<u64>) {
    let mut listed: Vec<(&ZoneName, &mut Planned)> =
        zones.iter_mut().filter_map(|(zone, planned)| Some((&*zone, planned.as_mut().ok()?))).collect();
    let cases: Vec<ZoneCase> = listed
        .iter()
        .map(|(zone, planned)| ZoneCase {
            zone: (*zone).clone(),
            deletes: planned.plan.deletes,
            good: planned.plan.good,
            clock: planned.listed.inventory.clock,
        })
        .collect();
    for ((_, planned), held) in
        listed.iter_mut().zip(guard::hold(&policy.name, &policy.guard, &cases, allowed))
    {
        planned.held = held;
    }
}

fn add(zones: &mut [ZoneReport], steps: Vec<(usize, Step)>) {
    for (place, step) in steps {
        zones[place].steps.push(step);
    }
}

/// The one line of a run.
fn tell(report: &RunReport) {
    for zone in &report.zones {
        for failure in &zone.failures {
            error!(zone.name = %zone.zone, "zone {}: {failure}", zone.zone);
        }
        for warning in &zone.warnings {
            warn!(zone.name = %zone.zone, "zone {}: {warning}", zone.zone);
        }
        if let Some(held) = &zone.held {
            warn!(zone.name = %zone.zone, "zone {}: deletions are held back: {held}", zone.zone);
        }
    }
    let sums = report.sums();
    info!(
        result = report.result.as_str(),
        "policy {}: {}: {}, {}, {}, {} blocked, {} skipped, {} failed",
        report.policy,
        report.result.as_str(),
        counted(sums.exported, "export"),
        counted(sums.promoted, "promotion"),
        counted(sums.deleted, "deletion"),
        sums.blocked,
        sums.skipped,
        sums.failed,
    );
}
