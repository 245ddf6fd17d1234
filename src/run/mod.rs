//! Conducts one run of a policy: list → select → plan → create → export → promote → list again → plan again → delete →
//! report.
//!
//! The way of a snapshot: [`create`] takes it, [`list`] lists its zone, `retention` decides, [`export`] and
//! [`promote`] make copies of what stays, [`guard`] hears whether a zone must be left alone, [`prune`] deletes what
//! goes, [`archive_prune`] prunes the archives, [`downloads`] knows what comes in at this moment, [`step`] writes everything down
//! before and after, [`report`] is what is left to tell, and [`persist`] what the next run has to know. Nothing here decides what stays: that is `retention`'s alone.
//!
//! Work that goes side by side is put into lists of boxed futures, not made by closures that lend what they are given:
//! the compiler can't see that such a run may move between threads, as the daemon's do.
//!
//! A run takes no input but the policies and what they remember ([`policy_memory`]). It repeats nothing by itself: requests
//! are repeated inside the client, and a run by the next run.

pub mod archive_prune;
pub mod create;
pub mod downloads;
pub mod export;
pub mod guard;
pub mod instance_counts;
pub mod list;
pub mod persist;
pub mod policy_memory;
pub mod promote;
pub mod prune;
pub mod report;
pub mod self_instance;
pub mod source;
pub mod step;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::future::{FutureExt as _, join_all};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, error, info, info_span, warn};
use uuid::Uuid;

use crate::archive::backend::Archive;
use crate::archive::transfer::hash::Hashers;
use crate::clock::{Clock, timeout};
use crate::disk::DiskLock;
use crate::exoscale::client::Client;
use crate::exoscale::metadata::Metadata;
use crate::exoscale::wire::Quota;
use crate::policy::{ArchiveName, ArchiveRules, Policy};
use crate::randomness::{Randomness, fresh_id};
use crate::retention;
use crate::retention::guard::Held;
use crate::retention::inventory::Inventory;
use crate::retention::plan::PolicyPlan;
use crate::run::downloads::Downloads;
use crate::run::list::{Catalogues, Listing, RawListing};
use crate::run::policy_memory::PolicyMemory;
use crate::run::report::{RunReport, Step, ZoneReport, sums_of};
use crate::run::step::Recorder;
use crate::snapshot::{SnapshotState, ZoneName};
use crate::state::audit::{Action, StepOutcome, Subject};
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;
use crate::state::last_runs::{AcceptedListing, LastRuns};
use crate::text::chain;
use crate::transport::Transport;

/// So long a run waits for the quotas at its end.
const QUOTAS_WAIT_MAX: Duration = Duration::from_secs(5);

/// What runs need, whichever policy it is.
#[derive(Debug, Clone)]
pub struct Runner {
    /// The API.
    pub client: Client,
    /// Which instance this machine is.
    pub metadata: Metadata,
    /// For the bytes of images.
    pub transport: Arc<dyn Transport>,
    /// Every archive of the configuration.
    pub archives: BTreeMap<ArchiveName, Arc<Archive>>,
    /// What becomes of the copies in them.
    pub archive_rules: BTreeMap<ArchiveName, ArchiveRules>,
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
    /// What comes in at this moment.
    pub downloads: Downloads,
    /// They prove it.
    pub hashers: Hashers,
}

/// What may differ from run to run.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// Lets the guard pass a run of at most so many deletions.
    pub allow_deletes: Option<u64>,
    /// The moment of the schedule that the run is for; without it, the moment at which it begins.
    pub slot: Option<Timestamp>,
    /// Once cancelled, no new step begins; those in flight go on.
    pub stop: CancellationToken,
}

/// A zone's listing with what is decided for one policy.
#[derive(Debug)]
pub struct Planned {
    /// What was found.
    pub listed: Listing,
    /// What is decided.
    pub plan: PolicyPlan,
    /// Why nothing of it would be deleted, if so.
    pub held: Option<Held>,
    /// Whether its listing is taken for the truth, so that later ones are compared with it.
    pub is_accepted: bool,
    /// What a run would do first; told by a preview alone.
    pub ahead: Vec<PlannedAction>,
}

/// An export or a promotion that a run would begin with.
#[derive(Debug)]
pub struct PlannedAction {
    /// What.
    pub action: Action,
    /// Of which snapshot.
    pub snapshot: Subject,
    /// Why.
    pub why: String,
}

/// A zone, and what is decided there, or why nothing can be.
pub type ZonePlan = (ZoneName, Result<Planned, String>);

/// What zones listed, so that several previews look at the same.
#[derive(Debug, Default)]
pub struct ListingCache(Mutex<BTreeMap<ZoneName, RawListing>>);

impl ListingCache {
    fn known(&self) -> MutexGuard<'_, BTreeMap<ZoneName, RawListing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the zone listed before, else what it lists now. What fails is not kept.
    async fn see(&self, runner: &Runner, zone: &ZoneName) -> Result<RawListing, String> {
        if let Some(seen) = self.known().get(zone) {
            return Ok(seen.clone());
        }
        let seen = list::list(runner, zone).await?;
        self.known().insert(zone.clone(), seen.clone());
        Ok(seen)
    }
}

impl Runner {
    /// Decides what a run of the policy would do now, or as of `at`. Sends nothing that changes anything.
    pub async fn preview(&self, policy: &Policy, at: Option<Timestamp>) -> Vec<ZonePlan> {
        self.preview_over(&ListingCache::default(), policy, at).await
    }

    /// Like [`Runner::preview`], over what zones listed before, if they did.
    pub async fn preview_over(
        &self,
        listings: &ListingCache,
        policy: &Policy,
        at: Option<Timestamp>,
    ) -> Vec<ZonePlan> {
        match self_instance::known(self, policy).await {
            Some((runner, policy)) => runner.preview_known(listings, &policy, at).await,
            None => self.preview_known(listings, policy, at).await,
        }
    }

    async fn preview_known(
        &self,
        listings: &ListingCache,
        policy: &Policy,
        at: Option<Timestamp>,
    ) -> Vec<ZonePlan> {
        let mut zones = self.list_and_plan(Some(listings), policy, &policy.zones, at).await;
        if policy.create {
            let at = at.unwrap_or_else(|| self.clock.now());
            for (_, planned) in &mut zones {
                let Ok(Planned { listed, .. }) = planned else { continue };
                create::add_coming(policy, &mut listed.inventory, at, &*self.randomness);
                *planned = decide(&self.policies, policy, listed.clone(), at);
            }
        }
        guard::preview(self, policy, &mut zones).await;
        self.tell_overdue(policy, at, &mut zones).await;
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
            let coming = &planned.listed.inventory.coming;
            for ahead in &mut planned.ahead {
                ahead.snapshot.id = ahead.snapshot.id.filter(|id| !coming.contains(id));
            }
        }
        zones
    }

    /// Says in each zone what waits too long for an export. What is remembered may be damaged: a run says so.
    async fn tell_overdue(&self, policy: &Policy, at: Option<Timestamp>, zones: &mut [ZonePlan]) {
        let Ok(before) = self.state.last_runs(&policy.name).await else { return };
        let at = at.unwrap_or_else(|| self.clock.now());
        for (_, planned) in zones {
            let Ok(planned) = planned else { continue };
            planned.listed.warnings.extend(overdue(policy, &before, planned, at));
        }
    }

    /// Runs the policy once.
    ///
    /// # Errors
    /// [`StateError`] if the run could not begin, for example since the policy runs already, or since what it
    /// remembers can't be read. What fails later stands in the report.
    pub async fn run(&self, policy: &Policy, options: &RunOptions) -> Result<RunReport, StateError> {
        let _lock = self.state.lock_policy(&policy.name).await?;
        // Whoever can't remember what was done must not go on deleting: this is looked at before anything else.
        self.state.policy_state(&policy.name).await?;
        let before = self.state.last_runs(&policy.name).await?;
        let run_id = fresh_id(&*self.randomness, self.clock.now());
        let span = info_span!("policy_run", policy.name = %policy.name, run.id = %run_id);
        // It is large, and whoever runs it should not have to be.
        let run = Box::pin(async {
            let known = self_instance::known(self, policy).await;
            let (runner, policy) = known.as_ref().map_or((self, policy), |(runner, policy)| (runner, policy));
            let (mut report, accepted) = runner.run_locked(policy, options, run_id, &before).await;
            persist::persist(runner, policy, before, accepted, &mut report).await;
            report
        });
        let report = run.instrument(span.clone()).await;
        span.in_scope(|| tell(&report));
        Ok(report)
    }

    /// What came of it, and the listings that were accepted.
    async fn run_locked(
        &self,
        policy: &Policy,
        options: &RunOptions,
        run_id: Uuid,
        before: &LastRuns,
    ) -> (RunReport, BTreeMap<ZoneName, AcceptedListing>) {
        let started_at = self.clock.now();
        let recorder = Recorder::new(self, policy, run_id, options.stop.clone());

        let mut first = self.list_and_plan(None, policy, &policy.zones, None).await;
        let mut zones: Vec<ZoneReport> = first
            .iter()
            .map(|(zone, planned)| ZoneReport::new(zone.clone(), planned.as_ref().err().cloned()))
            .collect();
        if policy.create {
            let slot = options.slot.unwrap_or(started_at);
            self.create(policy, slot, &recorder, &mut first, &mut zones, before).await;
        }
        let listed = listed(&first);

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
        let accepted = self.delete_phase(policy, options, &recorder, &first, before, &mut zones).await;
        // Boxed, since a run is large enough without it.
        self.prune_archives(policy, &recorder, &first, &mut zones).boxed().await;
        let finished_at = self.clock.now();
        let quotas = self.quotas(policy, &options.stop).await;
        let report = RunReport::new(run_id, policy.name.clone(), started_at, finished_at, zones);
        (RunReport { quotas, ..report }, accepted)
    }

    /// The organization's quotas, for metrics: nothing depends on them, so a run does not wait long for them.
    async fn quotas(&self, policy: &Policy, stop: &CancellationToken) -> Vec<Quota> {
        let Some(zone) = policy.zones.first().filter(|_| !stop.is_cancelled()) else { return Vec::new() };
        let client = self.client.zone(zone);
        match timeout(&*self.clock, QUOTAS_WAIT_MAX, client.list_quotas()).await {
            Ok(Ok(quotas)) => quotas,
            Ok(Err(error)) => {
                debug!(zone.name = %zone, "the quotas can't be read: {}", chain(&error));
                Vec::new()
            }
            Err(late) => {
                debug!(zone.name = %zone, "the quotas can't be read: {late}");
                Vec::new()
            }
        }
    }

    /// Takes the snapshots of this slot; where it did, what was listed and planned is put in place of the old.
    async fn create(
        &self,
        policy: &Policy,
        slot: Timestamp,
        recorder: &Recorder,
        first: &mut [ZonePlan],
        reports: &mut [ZoneReport],
        before: &LastRuns,
    ) {
        let creations = create::create(self, recorder, policy, slot, &listed(first), before).await;
        let mut changed: Vec<usize> = Vec::new();
        for (place, creation) in creations {
            if creation.steps.iter().any(|step| step.outcome != StepOutcome::Skipped) {
                changed.push(place);
            }
            reports[place].steps.extend(creation.steps);
            reports[place].warnings.extend(creation.warnings);
            reports[place].failures.extend(creation.failure);
        }
        let names: Vec<ZoneName> = changed.iter().map(|place| first[*place].0.clone()).collect();
        let again = self.list_and_plan(None, policy, &names, None).await;
        for (place, planned) in changed.into_iter().zip(again) {
            reports[place].failures.extend(planned.1.as_ref().err().cloned());
            first[place] = planned;
        }
    }

    /// Lists anew, plans anew, and deletes what that plan lets go, in every zone that this run could list. Returns
    /// the listings that were accepted.
    async fn delete_phase(
        &self,
        policy: &Policy,
        options: &RunOptions,
        recorder: &Recorder,
        first: &[ZonePlan],
        before: &LastRuns,
        reports: &mut [ZoneReport],
    ) -> BTreeMap<ZoneName, AcceptedListing> {
        // Taken in one order everywhere, so that two runs can't wait for each other in a ring.
        let mut order: Vec<usize> = (0..first.len()).filter(|place| first[*place].1.is_ok()).collect();
        order.sort_by(|a, b| first[*a].0.cmp(&first[*b].0));
        let mut locks: Vec<(usize, Box<dyn DiskLock>)> = Vec::new();
        for place in order {
            match self.state.lock_zone(&first[place].0, &*self.clock, &options.stop).await {
                Ok(lock) => locks.push((place, lock)),
                Err(error) => reports[place].failures.push(format!("nothing is deleted: {}", chain(&error))),
            }
        }
        if options.stop.is_cancelled() {
            // What would have gone is not known, so no step can tell of it.
            for (place, _) in &locks {
                reports[*place].failures.push("nothing is deleted: the program was told to stop".to_owned());
            }
            return BTreeMap::new();
        }

        let places: Vec<usize> = locks.iter().map(|(place, _)| *place).collect();
        let names: Vec<ZoneName> = places.iter().map(|place| first[*place].0.clone()).collect();
        // Before the listing: whatever is deleted after it stands behind.
        let mark = self.state.audit_len().await;
        let mut again = self.list_and_plan(None, policy, &names, None).await;
        let listed_at = self.clock.now();
        guard::judge_run(self, policy, &mut again, before, options.allow_deletes, &options.stop).await;
        let memory = match &policy.promote {
            Some(promote) => {
                Some((promote, PolicyMemory::read(self, policy).await.map_err(|error| chain(&error))))
            }
            None => None,
        };
        let memory = &memory;
        let mut deletes: Vec<BoxFuture<'_, _>> = Vec::new();
        for (place, (zone, planned)) in places.iter().zip(&again) {
            deletes.push(
                async move {
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
                }
                .boxed(),
            );
        }

        let done = join_all(deletes).await;
        let mut accepted = BTreeMap::new();
        for (place, (zone, planned)) in places.iter().zip(&again) {
            let report = &mut reports[*place];
            report.planned(planned);
            let Ok(planned) = planned else { continue };
            report.warnings.extend(overdue(policy, before, planned, listed_at));
            report.instances = instance_counts::count(policy, planned);
            match &mark {
                Ok(audit_from) if planned.is_accepted => {
                    accepted.insert(zone.clone(), accepted_listing(listed_at, *audit_from, planned));
                }
                Ok(_) => {}
                // With the older one more is read of the log, and nothing is missed.
                Err(error) => report.failures.push(format!("the listing is not accepted: {}", chain(error))),
            }
        }
        for (place, steps, failure) in done {
            reports[place].steps.extend(steps);
            reports[place].failures.extend(failure);
        }
        accepted
    }

    async fn list_and_plan(
        &self,
        listings: Option<&ListingCache>,
        policy: &Policy,
        zones: &[ZoneName],
        at: Option<Timestamp>,
    ) -> Vec<ZonePlan> {
        let catalogues = list::catalogues(self).await;
        let mut planned: Vec<BoxFuture<'_, _>> = Vec::new();
        for zone in zones {
            planned.push({
                let catalogues = &catalogues;
                async move {
                    let seen = match listings {
                        Some(listings) => listings.see(self, zone).await,
                        None => list::list(self, zone).await,
                    };
                    let listed = match seen {
                        Ok(seen) => list::complete(self, zone, seen, catalogues).await,
                        Err(failure) => Err(failure),
                    };
                    let at = at.unwrap_or_else(|| self.clock.now());
                    (zone.clone(), listed.and_then(|listed| decide(&self.policies, policy, listed, at)))
                }
                .boxed()
            });
        }

        join_all(planned).await
    }
}

/// The zones that could be listed, with their places.
fn listed(zones: &[ZonePlan]) -> Vec<(usize, &ZoneName, &Planned)> {
    let zones = zones.iter().enumerate();
    zones.filter_map(|(place, (zone, planned))| Some((place, zone, planned.as_ref().ok()?))).collect()
}

/// Decides what a run of the policy would do over the given listings: no network, no memory.
pub fn preview_offline(
    policies: &[Policy],
    policy: &Policy,
    inventories: Vec<Inventory>,
    at: Timestamp,
    randomness: &dyn Randomness,
) -> Vec<ZonePlan> {
    let policies = self_instance::on_paper(policies);
    let policy = policies.iter().find(|known| known.name == policy.name).unwrap_or(policy);
    let plan = |mut inventory: Inventory| {
        let zone = inventory.zone.clone();
        create::add_coming(policy, &mut inventory, at, randomness);
        (zone, decide(&policies, policy, list::listed(inventory, Catalogues::new()), at))
    };
    let mut zones: Vec<ZonePlan> = inventories.into_iter().map(plan).collect();
    guard::judge_on_paper(policy, &mut zones);
    zones
}

fn decide(
    policies: &[Policy],
    policy: &Policy,
    mut listed: Listing,
    at: Timestamp,
) -> Result<Planned, String> {
    self_instance::check(policy)?;
    let here = policies.iter().filter(|other| other.zones.contains(&listed.inventory.zone));
    for warning in here.filter_map(self_instance::warning) {
        if !listed.warnings.contains(&warning) {
            listed.warnings.push(warning);
        }
    }
    retention::plan(policies, &listed.inventory, at)
        .policies
        .into_iter()
        .find(|plan| plan.policy == policy.name)
        .map(|plan| Planned { listed, plan, held: None, is_accepted: true, ahead: Vec::new() })
        .ok_or_else(|| "the policy is not enabled, or does not speak about this zone".to_owned())
}

/// What waits too long for an export in the zone of this plan, as a sentence.
fn overdue(policy: &Policy, before: &LastRuns, planned: &Planned, at: Timestamp) -> Option<String> {
    let alert_after = policy.export.as_ref().map(|export| export.alert_after);
    let since = before.zones.get(&planned.listed.inventory.zone)?.gate_since;
    persist::overdue(alert_after, sums_of(&planned.plan).blocked_by_export, since, at)
}

fn accepted_listing(at: Timestamp, audit_from: u64, planned: &Planned) -> AcceptedListing {
    // One on its way out will not be missed, and what set it on its way may stand before the mark.
    let is_leaving =
        |state: &SnapshotState| matches!(state, SnapshotState::Deleting | SnapshotState::Deleted);
    let snapshots = planned.listed.inventory.snapshots.iter();
    let staying = snapshots.filter(|snapshot| !is_leaving(&snapshot.state)).map(|snapshot| snapshot.id);
    AcceptedListing { at, audit_from, snapshots: staying.collect() }
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
    info!(result = report.result.as_str(), "{}: {}", report.result.as_str(), report.sums());
}
