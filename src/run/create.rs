//! Takes a snapshot of each instance that the policy selects, once for a slot of its schedule.
//!
//! A creation must not simply be repeated: that makes a second snapshot. So a request is remembered before it is sent, and
//! after a lost answer, or in the next process if this one is killed, its snapshot is looked for by instance and date. One
//! that is found so counts for its slot, but somebody else may have taken it, so it is never ours: only what the operation
//! names is. A slot that another policy's snapshot served is remembered, too, since that snapshot belongs to both.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::future::{FutureExt as _, join_all};
use futures_util::stream::{self, StreamExt as _};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::{Mutex, Semaphore, SemaphorePermit};

use crate::disk::DiskLock;
use crate::exoscale::client::ZoneClient;
use crate::exoscale::error::ApiError;
use crate::exoscale::wire::SnapshotDetails;
use crate::policy::Policy;
use crate::policy::name::PolicyName;
use crate::policy::select::Pattern;
use crate::retention::grouping::counted_from;
use crate::run::context::{RunOptions, Runner};
use crate::run::plan::{ZonePlan, dated_ahead, served};
use crate::run::policy_memory::PolicyMemory;
use crate::run::report::{STOPPED, Step, ZoneReport};
use crate::run::step::{Done, Recorder, StepError};
use crate::run::zone_run::ZoneRun;
use crate::snapshot::{Instance, InstanceId, OperationId, Snapshot, SnapshotId, SnapshotState, ZoneName};
use crate::state::audit::{Action, StepFacts, StepOutcome, Subject};
use crate::state::error::StateError;
use crate::state::last_runs::{AcceptedListing, LastRuns};
use crate::state::policy_state::{Creation, MissingSnapshot, Owner, PolicyState};
use crate::text::{chain, printable};

/// A snapshot's date may be this far from the time of our request, if our clock differs from the platform's.
const DATED_OFF: SignedDuration = SignedDuration::from_mins(10);

/// How often a snapshot is requested, each time after the request before is known not to have been carried out.
const MAX_TRIES: u32 = 5;

/// A snapshot that neither this listing nor the last accepted one has is forgotten after this, and not before, since a
/// new snapshot may not be listed yet.
const REMEMBERED_FOR: SignedDuration = SignedDuration::from_hours(24);

/// For how long an instance that is not selected any more, by its listing, is remembered to lack a snapshot.
const MISSING_FOR: SignedDuration = SignedDuration::from_hours(30 * 24);

/// A listing from right before a request serves for others, too, until it is this old: else many instances would make as
/// many listings.
const LISTING_REUSED: Duration = Duration::from_secs(2);

/// Between two looks at a snapshot that is being taken and whose operation is not known.
const WATCH_POLL: Duration = Duration::from_secs(10);

/// What is said of a snapshot that no operation named.
const FOUND: &str =
    "found by its instance and date, so it counts for its slot, and is not deleted where only ours are";

/// The longest wait for another policy's request of which no snapshot is known: a request is tried five times, with at most a minute between
/// two.
const UNKNOWN_MAX: Duration = Duration::from_mins(10);

/// The longest wait for a new snapshot to be shown, once its operation has ended.
const SHOWN_MAX: Duration = Duration::from_mins(2);

/// The longest wait for a snapshot that is being taken, as in the vendor's own tools.
const WATCH_MAX: Duration = Duration::from_hours(1);

/// Takes a snapshot of every selected instance that has none for this slot yet, or of these alone. Those that others took since
/// `since` serve it, too; `before` is what the last run remembered.
pub(crate) async fn create(
    runner: &Runner,
    recorder: &Recorder,
    policy: &Policy,
    (slot, since, only): (Timestamp, Timestamp, Option<&Pattern<InstanceId>>),
    zones: &mut [ZoneRun],
    before: &LastRuns,
) {
    let memory = PolicyMemory::read(runner, policy).await;
    let begun = runner.clock.elapsed();
    let mut creations: Vec<BoxFuture<'_, _>> = Vec::new();
    for ZoneRun { plan, report } in &mut *zones {
        let Some(plan) = &*plan else { continue };
        let memory = match &memory {
            Ok(memory) => memory,
            Err(error) => {
                report.failures.push(format!("no snapshot is taken: {}", chain(error)));
                continue;
            }
        };
        let zone = plan.zone();
        let client = runner.client.zone(zone);
        let accepted = before.zones.get(zone).and_then(|zone| zone.accepted.as_ref());
        let latest = Mutex::default();
        let turns = || Semaphore::new(runner.concurrency.get());
        let (asking, waiting) = (turns(), turns());
        let creator = ZoneCreator {
            runner,
            recorder,
            policy,
            memory,
            slot,
            since,
            only,
            begun,
            zone,
            client,
            accepted,
            latest,
            asking,
            waiting,
        };
        creations.push(async move { creator.run(plan, report).await }.boxed());
    }
    join_all(creations).await;
    let memory = match memory {
        // What could not be read once may be readable by now: that the snapshots are missing must be remembered.
        Err(_) => PolicyMemory::read(runner, policy).await,
        memory => memory,
    };
    match &memory {
        Ok(memory) => note_missing(memory, policy, slot, only.is_none(), zones).await,
        Err(error) => delete_nothing(zones, &chain(error)),
    }
}

/// Warns of the snapshots of this run that are not application-consistent although their instance asks for it: the
/// platform takes them all the same, and says no word. The plans are of a listing that has these snapshots.
pub(crate) async fn warn_of_inconsistent(runner: &Runner, zones: &mut [ZoneRun]) {
    for ZoneRun { plan, report } in zones {
        let Some(plan) = plan else { continue };
        let steps = report.steps.iter().filter(|step| step.facts.action == Action::Create);
        let taken: HashSet<SnapshotId> = steps.filter_map(|step| step.facts.snapshot.id).collect();
        let listed = plan.listing.inventory.snapshots.iter();
        let inconsistent: Vec<(&Snapshot, InstanceId)> = listed
            .filter(|one| taken.contains(&one.id) && one.application_consistent == Some(false))
            .filter_map(|one| Some((one, one.instance_id?)))
            .collect();
        let client = runner.client.zone(plan.zone());
        let mut asked: Vec<BoxFuture<'_, _>> = Vec::new();
        for (snapshot, instance) in inconsistent {
            let client = &client;
            asked.push(async move { (snapshot, client.get_instance(instance).await) }.boxed());
        }
        let answers: Vec<_> = stream::iter(asked).buffered(runner.concurrency.get()).collect().await;
        let failed = answers.iter().find_map(|(_, answer)| answer.as_ref().err());
        report.warnings.extend(failed.map(|error| {
            let error = chain(error);
            format!("whether instances ask for application-consistent snapshots cannot be read: {error}")
        }));
        for (snapshot, answer) in answers {
            let Ok(Some(details)) = answer else { continue };
            if details.machine.application_consistent_snapshots == Some(true) {
                report.warnings.push(format!(
                    "snapshot {} ({}) of instance {} is not application-consistent, although the instance asks for it: \
                     does its guest agent (qemu-guest-agent) run?",
                    printable(&snapshot.name),
                    snapshot.id,
                    printable(&details.instance.name),
                ));
            }
        }
    }
}

/// Remembers the snapshots that could not be taken: while one is missing, no policy deletes any of its instance. A zone in
/// which that cannot be remembered is left alone for the rest of the run.
async fn note_missing(
    memory: &PolicyMemory<'_>,
    policy: &Policy,
    slot: Timestamp,
    is_whole: bool,
    zones: &mut [ZoneRun],
) {
    let before = memory.own().await.missing.clone();
    let mut missing: Vec<MissingSnapshot> =
        zones.iter().flat_map(|zone| missing_in(zone, policy, slot, &before)).collect();
    if !is_whole {
        // A run that is limited to some instances says nothing of a whole zone.
        missing.retain(|one| one.instance_id.is_some());
        missing.extend(before.iter().filter(|one| one.instance_id.is_none()).cloned());
    }
    if missing == before {
        return;
    }
    if let Err(error) = memory.change(|state| state.missing = missing).await {
        delete_nothing(zones, &error.message);
    }
}

/// Remembers that a run could not begin, so that none of its snapshots was taken.
pub(crate) async fn note_not_begun(runner: &Runner, policy: &Policy, options: &RunOptions, why: &StateError) {
    if !policy.create {
        return;
    }
    // What can't be read or written still is in the way of other policies as well: then they delete nothing.
    let Ok(memory) = PolicyMemory::read(runner, policy).await else { return };
    let slot = options.slot.unwrap_or_else(|| runner.clock.now());
    let not_begun = |zone| ZoneRun::new(zone, Err(format!("the run did not begin: {}", chain(why))));
    let mut zones: Vec<ZoneRun> = policy.zones.iter().map(not_begun).collect();
    note_missing(&memory, policy, slot, options.instances.is_none(), &mut zones).await;
}

/// Leaves the zones alone for the rest of the run.
fn delete_nothing(zones: &mut [ZoneRun], why: &str) {
    for ZoneRun { plan, report } in zones {
        *plan = None;
        report.failures.push(format!("nothing is deleted: {why}"));
    }
}

fn missing_in(
    ZoneRun { plan, report }: &ZoneRun,
    policy: &Policy,
    slot: Timestamp,
    before: &[MissingSnapshot],
) -> Vec<MissingSnapshot> {
    let missing = |instance_id, cause: &str| MissingSnapshot {
        zone: report.zone.clone(),
        instance_id,
        slot,
        cause: cause.to_owned(),
    };
    let earlier = before.iter().filter(|one| one.zone == report.zone && one.instance_id.is_some()).cloned();
    let (Some(plan), None) = (plan, report.failures.first()) else {
        // Nothing but the listing and the creation can have failed by now.
        let cause = report.failures.first().map_or("the zone could not be listed", String::as_str);
        return earlier.chain([missing(None, cause)]).collect();
    };
    let steps = report.steps.iter().filter(|step| step.facts.action == Action::Create);
    let mut results: BTreeMap<InstanceId, Option<MissingSnapshot>> = BTreeMap::new();
    for step in steps {
        let Some(id) = step.facts.snapshot.instance_id else { continue };
        let is_missing = step.outcome == StepOutcome::Failed || step.was_stopped();
        let cause = step.message.as_deref().unwrap_or("it failed");
        results.insert(id, is_missing.then(|| missing(Some(id), cause)));
    }
    let inventory = &plan.listing.inventory;
    let selected: HashSet<InstanceId> = inventory.selected_by(policy).map(|instance| instance.id).collect();
    let is_there = |one: &MissingSnapshot| {
        let since = |snapshot: &&Snapshot| {
            snapshot.instance_id == one.instance_id
                && snapshot.state.is_good()
                && snapshot.created_at >= one.slot
        };
        inventory.snapshots.iter().any(|snapshot| since(&snapshot))
    };
    // One listing that lacks an instance, or its label, is no reason to forget that its snapshot is missing. That an instance vanished
    // has settled once the memory lacks it, too.
    let memory = &plan.listing.memory;
    let is_gone = |id: &InstanceId| {
        memory.at.is_some()
            && !memory.instances.contains_key(id)
            && !inventory.instances.iter().any(|one| one.id == *id)
    };
    let still = earlier.filter(|one| {
        let may_come_back = |id| slot.duration_since(one.slot) < MISSING_FOR && !is_gone(&id);
        let is_about_it = |id| selected.contains(&id) || may_come_back(id);
        one.instance_id.is_some_and(|id| is_about_it(id) && !results.contains_key(&id)) && !is_there(one)
    });
    still.collect::<Vec<_>>().into_iter().chain(results.into_values().flatten()).collect()
}

/// Takes the snapshots of one zone.
struct ZoneCreator<'a> {
    runner: &'a Runner,
    recorder: &'a Recorder,
    policy: &'a Policy,
    memory: &'a PolicyMemory<'a>,
    slot: Timestamp,
    /// From when on the snapshots of others serve the slot, too: from the slot, or later where a hook prepared the instances.
    since: Timestamp,
    /// The instances of which one may be taken; without them all.
    only: Option<&'a Pattern<InstanceId>>,
    /// When this began, by the clock's elapsed time: every request of an earlier process had been sent by then.
    begun: Duration,
    zone: &'a ZoneName,
    client: ZoneClient,
    /// The last accepted listing.
    accepted: Option<&'a AcceptedListing>,
    /// The latest listing.
    latest: Mutex<Option<Latest>>,
    /// How many snapshots are asked for, and taken, at once.
    asking: Semaphore,
    /// How many that others take are waited for at once. None of them keeps one from being asked for: two daemons that waited
    /// for each other's would ask for the next ones at the same moment.
    waiting: Semaphore,
}

/// The latest listing since the plan's: when it arrived, by the clock's elapsed time, and the snapshots that serve the slot
/// by then; or why there are no such listings.
type Latest = Result<(Duration, HashMap<InstanceId, Snapshot>), String>;

/// An instance of which a snapshot is due.
struct Due<'a> {
    instance: &'a Instance,
    /// When its newest good one was taken.
    newest: Option<Timestamp>,
    /// Whether somebody takes one at this moment.
    is_being_taken: bool,
    /// A request of an earlier run whose result is unknown.
    open: Option<Creation>,
    /// Its snapshots of about now that exist already.
    listed_before: Vec<SnapshotId>,
}

/// Who asks for a snapshot.
enum Asked {
    /// This run, now.
    Now(Creation),
    /// Another policy did.
    By(PolicyName, Creation),
    /// Somebody else, who has this one by now or is taking it.
    Before(Creation, Snapshot),
}

/// What came of another policy's request.
enum Outcome {
    /// There is a snapshot, or there may be.
    Served,
    /// There is none, but for this one if it failed.
    Lacking(Option<SnapshotId>),
}

/// Held while a snapshot is asked for, or waited for. None only of a closed semaphore, and these are never closed.
type Turn<'a> = Option<SemaphorePermit<'a>>;

/// The snapshots in a listing that may have come from a request whose answer was lost.
enum Found {
    Nothing,
    One(Snapshot),
    Several(usize),
}

impl ZoneCreator<'_> {
    async fn run(&self, plan: &ZonePlan, report: &mut ZoneReport) {
        match self.recover(plan).await {
            Ok(steps) => report.steps.extend(steps),
            Err(error) => return report.failures.push(format!("no snapshot is taken: {error}")),
        }
        let mut due = self.due(plan).await;
        let now = self.runner.clock.now();
        report.warnings.extend(dated_ahead(self.policy, &plan.listing.inventory, self.slot, now));
        if let Err(error) = self.note_served(plan, &due).await {
            report.failures.push(format!("it is not remembered which snapshots served this slot: {error}"));
        }
        if due.is_empty() {
            return;
        }
        // Where the quota does not suffice for all, the instance whose newest snapshot is oldest comes first; within an hour
        // the order is random, since two daemons that begin at once would else ask for the same ones all the time.
        due.sort_by_cached_key(|due| {
            let hour = due.newest.map(|newest| newest.as_second().div_euclid(3600));
            // Those that others are taking may have been taken once the rest is.
            (due.is_being_taken, hour, self.runner.randomness.next_u64())
        });
        let wanted = due.iter().filter(|due| !due.is_being_taken).count();
        let (available, lacking) = match self.client.get_quota("snapshot").await {
            Ok(quota) => match quota.and_then(|quota| Some((quota.usage, quota.limit?))) {
                Some((usage, limit)) => (
                    usize::try_from(limit.saturating_sub(usage)).unwrap_or(usize::MAX),
                    lacking(usage, limit, wanted),
                ),
                None => (usize::MAX, String::new()),
            },
            Err(error) => {
                report.warnings.push(format!(
                    "the quota of snapshots cannot be read, so they are requested nevertheless: {}",
                    chain(&error)
                ));
                (usize::MAX, String::new())
            }
        };
        let lacking = &lacking;
        let mut takes: Vec<BoxFuture<'_, _>> = Vec::new();
        for (index, due) in due.into_iter().enumerate() {
            takes.push(
                async move {
                    let turn = turn_of(&self.asking).await;
                    let intent = StepFacts {
                        rule: Some("create"),
                        ..StepFacts::new(
                            Action::Create,
                            self.zone,
                            self.subject_of(due.instance),
                            vec![format!(
                                "the policy takes one of each selected instance; this one for {}",
                                self.slot.strftime("%Y-%m-%dT%H:%M:%SZ")
                            )],
                        )
                    };
                    let work = async {
                        if index < available || due.is_being_taken {
                            self.take(&due, turn).await
                        } else {
                            Err(StepError::failed(lacking.clone()))
                        }
                    };
                    self.recorder.step(intent, work).await
                }
                .boxed(),
            );
        }

        report.steps.extend(join_all(takes).await);
        if let Some(Err(error)) = &*self.latest.lock().await {
            report.warnings.push(format!(
                "whether others took snapshots since this run began cannot be listed, so some may be taken twice: {error}"
            ));
        }
    }

    /// A snapshot that is not there yet.
    fn subject_of(&self, instance: &Instance) -> Subject {
        Subject {
            id: None,
            name: String::new(),
            created_at: self.runner.clock.now(),
            instance_id: Some(instance.id),
            instance_name: Some(instance.name.to_string()),
        }
    }

    /// Finds the snapshots of earlier requests, and forgets those that no longer exist.
    async fn recover(&self, plan: &ZonePlan) -> Result<Vec<Step>, String> {
        let inventory = &plan.listing.inventory;
        let is_open = |made: &&Creation| made.zone == *self.zone && made.is_open();
        let open: Vec<Creation> = self.memory.own().await.created.iter().filter(is_open).cloned().collect();
        let mut steps = Vec::new();
        for asked in open {
            let known = self.known().await.map_err(|error| chain(&error))?;
            let found = match found(&inventory.snapshots, &asked, self.dated_until(&asked), &known) {
                Found::Nothing => continue,
                Found::One(snapshot) => Ok(snapshot),
                Found::Several(count) => Err(count),
            };
            let instance = inventory.instances.iter().find(|instance| instance.id == asked.instance_id);
            let snapshot = match &found {
                Ok(snapshot) => Subject::of(snapshot, instance),
                Err(_) => Subject {
                    id: None,
                    name: String::new(),
                    created_at: asked.requested_at,
                    instance_id: Some(asked.instance_id),
                    instance_name: instance.map(|instance| instance.name.to_string()),
                },
            };
            let intent = StepFacts {
                rule: Some("create"),
                ..StepFacts::new(
                    Action::Create,
                    self.zone,
                    snapshot,
                    vec![format!("it was requested at {}, and the answer was lost", asked.requested_at)],
                )
            };
            let work = async {
                let snapshot = match found {
                    Ok(snapshot) => snapshot,
                    Err(count) => return Err(self.doubt(&asked, count).await?),
                };
                self.settle(&asked, snapshot.id, Owner::Nobody).await?;
                whole(&snapshot)?;
                let still = if snapshot.state.is_in_flight() { ", still being taken" } else { "" };
                Ok(Done { message: Some(format!("{FOUND}{still}")), ..Done::default() })
            };
            steps.push(self.recorder.step(intent, work).await);
        }

        // One listing alone may be incomplete: a run must have accepted that the snapshot is missing.
        let accepted = self.accepted.map_or(&[][..], |accepted| &accepted.snapshots);
        let listed = inventory.snapshots.iter().map(|snapshot| snapshot.id);
        let listed: HashSet<SnapshotId> = listed.chain(accepted.iter().copied()).collect();
        let now = self.runner.clock.now();
        // One that was ever listed is forgotten only once its end is known.
        let Ok(known) = self.runner.state.listed_zone(self.zone).await else {
            // The account of endings says why it can't be read. It must not keep snapshots from being taken.
            return Ok(steps);
        };
        let open = known.missing.iter().filter(|(_, missing)| missing.unexplained_at.is_none());
        let not_ended: HashSet<SnapshotId> =
            open.map(|(id, _)| *id).chain(known.snapshots(now).map(|(id, _)| id)).collect();
        let all = self.runner.state.all_created().await.map_err(|error| chain(&error))?;
        let id_of = |made: &Creation| {
            let Some(server) = made.server() else { return made.snapshot_id };
            let (_, created) = all.iter().find(|(policy, _)| policy == server)?;
            made.served_from(created)?.snapshot_id
        };
        let is_over = |made: &Creation| {
            made.zone == *self.zone
                && id_of(made).is_none_or(|id| !listed.contains(&id) && !not_ended.contains(&id))
                && now.duration_since(made.requested_at) > REMEMBERED_FOR
        };
        if self.memory.own().await.created.iter().any(is_over) {
            let forget = |state: &mut PolicyState| state.created.retain(|made| !is_over(made));
            self.memory.change(forget).await.map_err(|step_error| step_error.message)?;
        }
        Ok(steps)
    }

    /// The selected instances that have no snapshot of this slot yet.
    async fn due<'p>(&'p self, plan: &'p ZonePlan) -> Vec<Due<'p>> {
        let inventory = &plan.listing.inventory;
        let now = self.runner.clock.now();
        let mut newest: BTreeMap<InstanceId, Timestamp> = BTreeMap::new();
        // One that is being taken may fail.
        let (taken, being_taken): (HashMap<_, _>, HashMap<_, _>) =
            served(&inventory.snapshots, self.since, now)
                .into_iter()
                .partition(|(_, one)| one.state.is_good());
        let mut made: HashSet<InstanceId> = taken.into_keys().collect();
        let mut failed: HashSet<SnapshotId> = HashSet::new();
        for snapshot in &inventory.snapshots {
            let (state, taken) = (&snapshot.state, snapshot.created_at);
            if *state == SnapshotState::Error {
                failed.insert(snapshot.id);
            }
            // One that is dated far ahead does not count until then.
            let Some(id) = snapshot.instance_id.filter(|_| counted_from(taken) <= now) else { continue };
            if state.is_good() {
                newest.entry(id).and_modify(|newest| *newest = taken.max(*newest)).or_insert(taken);
            }
        }
        let memory = self.memory.own().await;
        let of_zone = || memory.created.iter().filter(|made| made.zone == *self.zone);
        // The platform's clock may have dated ours before the slot.
        let is_made = |made: &&Creation| {
            made.slot == self.slot && made.server().is_none() && !made.is_open() && !has_failed(made, &failed)
        };
        made.extend(of_zone().filter(is_made).map(|made| made.instance_id));
        let due = inventory.selected_by(self.policy).filter(|instance| !made.contains(&instance.id));
        let from = now.checked_sub(DATED_OFF).unwrap_or(Timestamp::MIN);
        let listed_before = |instance: &Instance| {
            let of_now = |snapshot: &&Snapshot| {
                snapshot.instance_id == Some(instance.id) && snapshot.created_at >= from
            };
            inventory.snapshots.iter().filter(of_now).map(|snapshot| snapshot.id).collect()
        };
        let due = due.filter(|instance| plan.listing.is_one_of(self.only, instance.id));
        due.map(|instance| Due {
            instance,
            listed_before: listed_before(instance),
            newest: newest.get(&instance.id).copied(),
            is_being_taken: being_taken.contains_key(&instance.id),
            open: of_zone().find(|made| made.is_open() && made.instance_id == instance.id).cloned(),
        })
        .collect()
    }

    /// Remembers for each selected instance that is not due which snapshot of another policy served the slot: the oldest
    /// since then. It belongs to both.
    async fn note_served(&self, plan: &ZonePlan, due: &[Due<'_>]) -> Result<(), String> {
        let inventory = &plan.listing.inventory;
        let due: HashSet<InstanceId> = due.iter().map(|due| due.instance.id).collect();
        let all = self.runner.state.all_created().await.map_err(|error| chain(&error))?;
        // Not that of another policy that has no record of it any more: it was never carried out.
        let is_known = |made: &&Creation| {
            made.server().is_none_or(|server| {
                all.iter().any(|(policy, created)| policy == server && made.served_from(created).is_some())
            })
        };
        let known: HashSet<InstanceId> = {
            let own = self.memory.own().await;
            let of_slot = own.created.iter().filter(|made| made.zone == *self.zone && made.slot == self.slot);
            of_slot.filter(is_known).map(|made| made.instance_id).collect()
        };
        let selected = inventory.selected_by(self.policy).map(|instance| instance.id);
        let selected = selected.filter(|id| plan.listing.is_one_of(self.only, *id));
        let mut unknown: HashSet<InstanceId> =
            selected.filter(|id| !due.contains(id) && !known.contains(id)).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let since: HashSet<SnapshotId> = inventory
            .snapshots
            .iter()
            .filter(|snapshot| snapshot.created_at >= self.since)
            .filter(|snapshot| snapshot.state.is_good() || snapshot.state.is_in_flight())
            .map(|snapshot| snapshot.id)
            .collect();
        let others = all.iter().filter(|(policy, _)| *policy != self.policy.name);
        let now = self.runner.clock.now();
        let serves = |made: &Creation| match made.snapshot_id {
            Some(id) => since.contains(&id),
            None => made.is_since(self.since, now),
        };
        let mut serving: Vec<(&PolicyName, &Creation)> = others
            .flat_map(|(policy, created)| created.iter().map(move |made| (policy, made)))
            .filter(|(_, made)| made.zone == *self.zone && may_be_own(made) && serves(made))
            .collect();
        serving.sort_by_key(|(_, made)| made.requested_at);
        serving.retain(|(_, made)| unknown.remove(&made.instance_id));
        if serving.is_empty() {
            return Ok(());
        }
        let records: Vec<Creation> =
            serving.into_iter().map(|(policy, made)| self.served(policy, made)).collect();
        let noted = self.memory.change(|state| state.created.extend(records)).await;
        noted.map_err(|step_error| step_error.message)
    }

    /// The record that another policy's snapshot serves this slot.
    fn served(&self, policy: &PolicyName, made: &Creation) -> Creation {
        Creation {
            slot: self.slot,
            snapshot_id: None,
            listed_before: Vec::new(),
            owner: Owner::ServedBy(policy.clone()),
            taken_for: Some(made.slot),
            ..made.clone()
        }
    }

    /// Takes one snapshot, in its turn.
    async fn take(&self, due: &Due<'_>, mut turn: Turn<'_>) -> Result<Done, StepError> {
        let mut failed: HashSet<SnapshotId> = HashSet::new();
        let mut has_waited = false;
        if let Some(asked) = &due.open {
            let found = self.find(asked, self.begun, self.dated_until(asked)).await;
            let found = found.map_err(|error| unknown(asked, &error))?;
            if let Some(done) = self.conclude(asked, found, due.instance).await? {
                return Ok(done);
            }
            // It was never carried out.
            self.forget(asked).await?;
        }
        let mut tries = 1;
        loop {
            // Meanwhile the run may have been stopped, or its deadline may have passed.
            if has_waited {
                let refusal = self.recorder.refusal(Action::Create).await;
                if let Some(why) = refusal.map_err(|error| StepError::failed(chain(&error)))? {
                    return Err(StepError::skipped(why));
                }
            }
            has_waited = false;
            let asked = match self.ask(due, &failed).await? {
                Asked::Now(asked) => asked,
                Asked::By(taker, made) => {
                    let Outcome::Lacking(lacking) = self.outcome_of(&taker, &made, turn).await? else {
                        return Err(self.taken_by(&taker));
                    };
                    self.forget(&self.served(&taker, &made)).await?;
                    if lacking.is_some_and(|id| !failed.insert(id)) {
                        return Err(self.taken_by(&taker));
                    }
                    turn = turn_of(&self.asking).await;
                    has_waited = true;
                    continue;
                }
                Asked::Before(asked, snapshot) => {
                    let id = snapshot.id;
                    let (since, name) =
                        (self.since.strftime("%Y-%m-%dT%H:%M:%SZ"), printable(&snapshot.name).into_owned());
                    let is_whole = tokio::select! {
                        biased;
                        () = self.recorder.stop().cancelled() => return Err(StepError::skipped(STOPPED)),
                        watched = self.watch_in_turn(snapshot, turn) => watched.is_ok(),
                    };
                    let now = if is_whole { None } else { Some(self.client.get_snapshot(id).await) };
                    let is_lacking = match now {
                        None | Some(Err(_)) => false,
                        Some(Ok(now)) => now.is_none_or(|now| now.snapshot.state == SnapshotState::Error),
                    };
                    if !is_lacking {
                        let verb = if is_whole { "was" } else { "is being" };
                        let message =
                            format!("another one {verb} taken since {since}: snapshot {name} ({id})");
                        return Err(StepError::skipped(message));
                    }
                    self.forget(&asked).await?;
                    failed.insert(id);
                    turn = turn_of(&self.asking).await;
                    has_waited = true;
                    continue;
                }
            };
            let error = match self.client.create_snapshot(due.instance.id).await {
                Ok(operation) => {
                    let id = operation.reference.map(SnapshotId);
                    return self.taken(&asked, due.instance, operation.id, id).await;
                }
                Err(error) => error,
            };
            if let Some(operation_id) = error.operation_id() {
                return Err(self.begun_and_failed(&asked, operation_id, error).await);
            }
            if !error.may_have_happened() {
                self.forget(&asked).await?;
                return Err(error.into());
            }
            // The answer was lost.
            let (clock, lost_at) = (&self.runner.clock, self.runner.clock.elapsed());
            let until = clock.now().checked_add(DATED_OFF).unwrap_or(Timestamp::MAX);
            let found = match self.find(&asked, lost_at, until).await {
                Ok(found) => found,
                Err(look) => {
                    return Err(StepError::failed(format!(
                        "{}; {}",
                        chain(&error),
                        unknown(&asked, &look).message
                    )));
                }
            };
            if let Some(done) = self.conclude(&asked, found, due.instance).await? {
                return Ok(done);
            }
            self.forget(&asked).await?;
            if tries == MAX_TRIES || !matches!(self.recorder.refusal(Action::Create).await, Ok(None)) {
                return Err(StepError::failed(format!(
                    "{}; no snapshot was made, as the listing shows",
                    chain(&error)
                )));
            }
            tries += 1;
        }
    }

    /// A snapshot of the instance since the slot, in a listing of about now: of a daemon with another state directory, or
    /// by hand. If listing fails, and each has several attempts, the zone is not listed again: one snapshot too many is
    /// better than one too few or too late.
    async fn taken_meanwhile(&self, instance: InstanceId) -> Option<Snapshot> {
        let clock = &self.runner.clock;
        let mut latest = self.latest.lock().await;
        let is_old =
            |latest: &Latest| latest.as_ref().is_ok_and(|(at, _)| clock.elapsed() >= *at + LISTING_REUSED);
        if latest.as_ref().is_none_or(is_old) {
            let listed = self.client.list_snapshots().await.map_err(|error| chain(&error));
            *latest = Some(listed.map(|(listed, _)| {
                let served = served(&listed.snapshots, self.since, clock.now()).into_iter();
                (clock.elapsed(), served.map(|(id, snapshot)| (id, snapshot.clone())).collect())
            }));
        }
        latest.as_ref()?.as_ref().ok()?.1.get(&instance).cloned()
    }

    /// Writes down that a snapshot is asked for, unless there is one by now, or another policy does just that; those that `failed`
    /// do not count.
    async fn ask(&self, due: &Due<'_>, failed: &HashSet<SnapshotId>) -> Result<Asked, StepError> {
        let meanwhile = self.taken_meanwhile(due.instance.id).await;
        let meanwhile = meanwhile.filter(|taken| !failed.contains(&taken.id));
        let _lock = self.lock().await?;
        let all = self.runner.state.all_created().await;
        let all = all.map_err(|error| StepError::failed(chain(&error)))?;
        let others = all.iter().filter(|(policy, _)| *policy != self.policy.name);
        let now = self.runner.clock.now();
        let of_this_slot = |made: &Creation| {
            made.zone == *self.zone
                && made.instance_id == due.instance.id
                && made.is_since(self.since, now)
                && made.server().is_none()
                && !has_failed(made, failed)
        };
        let mut taken = others
            .filter_map(|(policy, created)| Some((policy, created.iter().find(|made| of_this_slot(made))?)));
        if let Some((taker, made)) = taken.next() {
            if may_be_own(made) {
                let served = self.served(taker, made);
                self.memory.change(|state| state.created.push(served)).await?;
            }
            return Ok(Asked::By(taker.clone(), made.clone()));
        }
        let asked = Creation {
            zone: self.zone.clone(),
            instance_id: due.instance.id,
            slot: self.slot,
            requested_at: meanwhile.as_ref().map_or(self.runner.clock.now(), |taken| taken.created_at),
            snapshot_id: meanwhile.as_ref().map(|taken| taken.id),
            is_in_doubt: false,
            listed_before: due.listed_before.clone(),
            // Until the operation names it.
            owner: Owner::Nobody,
            taken_for: None,
        };
        self.memory.change(|state| state.created.push(asked.clone())).await?;
        Ok(match meanwhile {
            Some(taken) => Asked::Before(asked, taken),
            None => Asked::Now(asked),
        })
    }

    /// Why none is taken, since another policy takes one.
    fn taken_by(&self, taker: &PolicyName) -> StepError {
        let is_it = |policy: &Policy| policy.name == *taker && policy.enabled && policy.create;
        // Its own runs see to what came of it, as long as there are any.
        let is_seen_to = self.runner.policies.iter().any(is_it);
        if is_seen_to { taken_by(taker) } else { abandoned_by(taker) }
    }

    /// Waits for a run of another policy, if there is one, to take the snapshot that it asked for.
    async fn outcome_of(
        &self,
        taker: &PolicyName,
        made: &Creation,
        mut turn: Turn<'_>,
    ) -> Result<Outcome, StepError> {
        let Runner { clock, state, .. } = self.runner;
        let mut begun = clock.elapsed();
        let mut is_asking = true;
        let mut hidden_since: Option<Duration> = None;
        let failed = |error: StateError| StepError::failed(chain(&error));
        loop {
            if self.recorder.stop().is_cancelled() {
                return Err(StepError::skipped(STOPPED));
            }
            // Before its record is read: a run that ends meanwhile has written it by then.
            let is_running = state.is_running(taker).await.map_err(failed)?;
            let all = state.all_created().await.map_err(failed)?;
            let served = self.served(taker, made);
            let of_taker = all.iter().find(|(policy, _)| policy == taker);
            let Some(now) = of_taker.and_then(|(_, created)| served.served_from(created)) else {
                // It was not carried out.
                return Ok(Outcome::Lacking(None));
            };
            let mut is_hidden = false;
            if let Some(id) = now.snapshot_id {
                match self.client.get_snapshot(id).await {
                    Ok(Some(details)) if details.snapshot.state == SnapshotState::Error => {
                        return Ok(Outcome::Lacking(Some(id)));
                    }
                    Ok(Some(details)) if details.snapshot.state.is_in_flight() => hidden_since = None,
                    Ok(None) => {
                        let since = *hidden_since.get_or_insert(clock.elapsed());
                        if clock.elapsed() >= since + SHOWN_MAX {
                            return Ok(Outcome::Lacking(Some(id)));
                        }
                        is_hidden = true;
                    }
                    // What can't be read may be there.
                    Ok(Some(_)) | Err(_) => return Ok(Outcome::Served),
                }
            }
            // Once its request and a look for it have had their time, its run has given it up.
            let is_given_up = now.snapshot_id.is_none() && clock.elapsed() >= begun + UNKNOWN_MAX;
            let is_over =
                !is_running || now.is_in_doubt || is_given_up || clock.elapsed() >= begun + WATCH_MAX;
            if is_over && !is_hidden {
                return Ok(Outcome::Served);
            }
            if is_asking {
                drop(turn);
                turn = self.wait_for_turn().await?;
                (is_asking, begun) = (false, clock.elapsed());
            } else {
                clock.sleep(WATCH_POLL).await;
            }
        }
    }

    /// Waits until a snapshot that somebody else takes is whole. What is whole already waits for no turn.
    async fn watch_in_turn(&self, snapshot: Snapshot, turn: Turn<'_>) -> Result<Snapshot, StepError> {
        if !snapshot.state.is_in_flight() {
            return self.watch(snapshot).await;
        }
        drop(turn);
        let _waits = self.wait_for_turn().await?;
        let now = self.client.get_snapshot(snapshot.id).await;
        let now = now.ok().flatten().map_or(snapshot, |details| details.snapshot);
        self.watch(now).await
    }

    /// A turn for waiting.
    async fn wait_for_turn(&self) -> Result<Turn<'_>, StepError> {
        tokio::select! {
            biased;
            () = self.recorder.stop().cancelled() => Err(StepError::skipped(STOPPED)),
            turn = turn_of(&self.waiting) => Ok(turn),
        }
    }

    async fn lock(&self) -> Result<Box<dyn DiskLock>, StepError> {
        let runner = self.runner;
        let lock = runner.state.lock_creation(self.zone, &*runner.clock, self.recorder.stop()).await;
        lock.map_err(|error| match error {
            StateError::Stopped { .. } => StepError::skipped(STOPPED),
            error => StepError::failed(chain(&error)),
        })
    }

    /// The operation went well.
    async fn taken(
        &self,
        asked: &Creation,
        instance: &Instance,
        operation_id: Option<OperationId>,
        id: Option<SnapshotId>,
    ) -> Result<Done, StepError> {
        let Some(id) = id else { return self.taken_unnamed(asked, instance, operation_id).await };
        self.settle(asked, id, Owner::ThisPolicy).await?;
        let (snapshot, message) = match self.shown(id).await {
            Ok(Some(details)) => {
                let snapshot = self.watch(details.snapshot).await;
                let snapshot = snapshot.map_err(|step_error| StepError { operation_id, ..step_error })?;
                (Subject::of(&snapshot, Some(instance)), None)
            }
            Ok(None) => {
                let message = format!("the operation succeeded, but there is no snapshot {id}");
                return Err(StepError { operation_id, ..StepError::failed(message) });
            }
            // It is there all the same; only its name and date are not known.
            Err(why) => (Subject { id: Some(id), ..self.subject_of(instance) }, Some(why)),
        };
        Ok(Done { operation_id, snapshot: Some(snapshot), message, ..Done::default() })
    }

    /// A new snapshot; none if it does not show. An error says why that is not known.
    async fn shown(&self, id: SnapshotId) -> Result<Option<SnapshotDetails>, String> {
        let clock = &self.runner.clock;
        let deadline = clock.elapsed() + SHOWN_MAX;
        let mut is_denied = false;
        loop {
            match self.client.get_snapshot(id).await {
                Ok(Some(details)) => return Ok(Some(details)),
                Ok(None) => is_denied = true,
                Err(error) if !is_denied => return Err(chain(&error)),
                Err(_) => {}
            }
            if clock.elapsed() >= deadline {
                return Ok(None);
            }
            if self.recorder.stop().is_cancelled() {
                return Err("it does not show yet".to_owned());
            }
            clock.sleep(WATCH_POLL).await;
        }
    }

    /// The operation went well, and did not say which snapshot came of it.
    async fn taken_unnamed(
        &self,
        asked: &Creation,
        instance: &Instance,
        operation_id: Option<OperationId>,
    ) -> Result<Done, StepError> {
        let until = self.runner.clock.now().checked_add(DATED_OFF).unwrap_or(Timestamp::MAX);
        let clock = &self.runner.clock;
        let deadline = clock.elapsed() + SHOWN_MAX;
        let found = loop {
            let found = self.look(asked, until).await;
            let is_over = clock.elapsed() >= deadline || self.recorder.stop().is_cancelled();
            if is_over || !matches!(found, Ok(Found::Nothing)) {
                break found;
            }
            clock.sleep(WATCH_POLL).await;
        };
        let says_not = "the API does not say which snapshot it made";
        let (snapshot, so) = match found {
            Ok(Found::One(snapshot)) => {
                self.settle(asked, snapshot.id, Owner::Nobody).await?;
                (Some(Subject::of(&snapshot, Some(instance))), FOUND.to_owned())
            }
            Ok(Found::Nothing) if self.recorder.stop().is_cancelled() => {
                (None, "the next run looks for it".to_owned())
            }
            // The next run looks again, and takes one if there still is none.
            Ok(Found::Nothing) => {
                let message = format!("{says_not}, and no new one is listed");
                return Err(StepError { operation_id, ..StepError::failed(message) });
            }
            Ok(Found::Several(_)) => {
                self.change(asked, |made| made.is_in_doubt = true).await?;
                (None, "so it does not count as ours".to_owned())
            }
            Err(error) => (None, format!("the next run looks for it: {error}")),
        };
        let message = Some(format!("{says_not}: {so}"));
        Ok(Done { operation_id, snapshot, message, ..Done::default() })
    }

    /// The operation began, and failed or was lost sight of: what it left behind is ours, too, if it named that.
    async fn begun_and_failed(
        &self,
        asked: &Creation,
        operation_id: OperationId,
        error: ApiError,
    ) -> StepError {
        let has_failed = !error.may_have_happened();
        let until = self.runner.clock.now().checked_add(DATED_OFF).unwrap_or(Timestamp::MAX);
        let named = self.named_by(&error, asked).await;
        let remembered = match self.look(asked, until).await {
            _ if named.is_some() => {
                self.change(asked, |made| {
                    (made.snapshot_id, made.owner) = (named, Owner::ThisPolicy);
                })
                .await
            }
            Ok(Found::One(snapshot)) => self.settle(asked, snapshot.id, Owner::Nobody).await,
            Ok(Found::Nothing | Found::Several(_)) if has_failed => self.forget(asked).await,
            Ok(Found::Several(count)) => self.doubt(asked, count).await.map(drop),
            // The next run looks again.
            Ok(Found::Nothing) | Err(_) => Ok(()),
        };
        let mut message = chain(&error);
        if let Err(step_error) = remembered {
            message = format!("{message}; {}", step_error.message);
        }
        StepError { operation_id: Some(operation_id), ..StepError::failed(message) }
    }

    /// The snapshot that a failed operation named, if there is such a one of this instance.
    async fn named_by(&self, error: &ApiError, asked: &Creation) -> Option<SnapshotId> {
        let details = self.client.get_snapshot(SnapshotId(error.reference()?)).await.ok()??;
        let is_of_instance = details.snapshot.instance_id == Some(asked.instance_id);
        is_of_instance.then_some(details.snapshot.id)
    }

    /// What a look-up means; nothing if the request was never carried out.
    async fn conclude(
        &self,
        asked: &Creation,
        found: Found,
        instance: &Instance,
    ) -> Result<Option<Done>, StepError> {
        let snapshot = match found {
            Found::Nothing => return Ok(None),
            Found::Several(count) => return Err(self.doubt(asked, count).await?),
            Found::One(snapshot) => snapshot,
        };
        self.settle(asked, snapshot.id, Owner::Nobody).await?;
        let snapshot = self.watch(snapshot).await?;
        let message = Some(format!("the answer was lost: {FOUND}"));
        Ok(Some(Done { snapshot: Some(Subject::of(&snapshot, Some(instance))), message, ..Done::default() }))
    }

    /// Waits until a snapshot is whole.
    async fn watch(&self, mut snapshot: Snapshot) -> Result<Snapshot, StepError> {
        let clock = &self.runner.clock;
        let deadline = clock.elapsed() + WATCH_MAX;
        while snapshot.state.is_in_flight() {
            let id = snapshot.id;
            if clock.elapsed() >= deadline {
                return Err(StepError::failed(format!("snapshot {id} is still being taken after an hour")));
            }
            clock.sleep(WATCH_POLL).await;
            let now = self.shown(id).await.map_err(StepError::failed)?;
            snapshot =
                now.ok_or_else(|| StepError::failed(format!("snapshot {id} has disappeared")))?.snapshot;
        }
        whole(&snapshot)?;
        Ok(snapshot)
    }

    /// Looks for the snapshot of a request, and once more when it cannot be on its way any longer; `sent_by` is when it
    /// was, by the clock's elapsed time.
    async fn find(&self, asked: &Creation, sent_by: Duration, until: Timestamp) -> Result<Found, String> {
        let found = self.look(asked, until).await?;
        let clock = &self.runner.clock;
        let left = (sent_by + self.runner.request_timeout).saturating_sub(clock.elapsed());
        if !matches!(found, Found::Nothing) || left.is_zero() {
            return Ok(found);
        }
        clock.sleep(left).await;
        self.look(asked, until).await
    }

    async fn look(&self, asked: &Creation, until: Timestamp) -> Result<Found, String> {
        let (listing, _) = self.client.list_snapshots().await.map_err(|error| chain(&error))?;
        let known = self.known().await.map_err(|error| chain(&error))?;
        Ok(found(&listing.snapshots, asked, until, &known))
    }

    /// Every snapshot that a policy is known to have taken, also those that run beside this one.
    async fn known(&self) -> Result<HashSet<SnapshotId>, StateError> {
        self.runner.state.created_snapshots().await
    }

    /// The latest date that a snapshot may bear that came of a request of an earlier process.
    fn dated_until(&self, asked: &Creation) -> Timestamp {
        let until = asked.requested_at.checked_add(self.runner.request_timeout);
        until.and_then(|until| until.checked_add(DATED_OFF)).unwrap_or(Timestamp::MAX)
    }

    async fn settle(&self, asked: &Creation, id: SnapshotId, owner: Owner) -> Result<(), StepError> {
        self.change(asked, |made| (made.snapshot_id, made.owner) = (Some(id), owner)).await
    }

    async fn doubt(&self, asked: &Creation, count: usize) -> Result<StepError, StepError> {
        self.change(asked, |made| made.is_in_doubt = true).await?;
        Ok(StepError::skipped(format!(
            "it was requested at {}, the answer was lost, and any of {count} snapshots could be it: it counts as taken, \
             and none of them as ours, so none is pruned where only ours are",
            asked.requested_at
        )))
    }

    async fn change(&self, asked: &Creation, change: impl FnOnce(&mut Creation)) -> Result<(), StepError> {
        let change = |state: &mut PolicyState| {
            if let Some(made) = state.created.iter_mut().find(|made| *made == asked) {
                change(made);
            }
        };
        self.memory.change(change).await
    }

    async fn forget(&self, asked: &Creation) -> Result<(), StepError> {
        self.memory.change(|state| state.created.retain(|made| made != asked)).await
    }
}

/// The snapshots that may have come of a request: of its instance, dated about when it was sent, not listed before
/// it, and not known to have come of another.
fn found(snapshots: &[Snapshot], asked: &Creation, until: Timestamp, known: &HashSet<SnapshotId>) -> Found {
    let from = asked.requested_at.checked_sub(DATED_OFF).unwrap_or(Timestamp::MIN);
    let may_be = |snapshot: &&Snapshot| {
        snapshot.instance_id == Some(asked.instance_id)
            && (from..=until).contains(&snapshot.created_at)
            && !known.contains(&snapshot.id)
            && !asked.listed_before.contains(&snapshot.id)
    };
    let candidates: Vec<&Snapshot> = snapshots.iter().filter(may_be).collect();
    match candidates.as_slice() {
        [] => Found::Nothing,
        [one] => Found::One((*one).clone()),
        several => Found::Several(several.len()),
    }
}

async fn turn_of(semaphore: &Semaphore) -> Turn<'_> {
    semaphore.acquire().await.ok()
}

/// Whether the snapshot is the policy's that asked for it, or may become that once the answer has come.
fn may_be_own(made: &Creation) -> bool {
    made.owner == Owner::ThisPolicy || made.is_open()
}

fn has_failed(made: &Creation, failed: &HashSet<SnapshotId>) -> bool {
    made.snapshot_id.is_some_and(|id| failed.contains(&id))
}

/// An error if the platform failed to take it.
fn whole(snapshot: &Snapshot) -> Result<(), StepError> {
    if snapshot.state == SnapshotState::Error {
        let (name, id) = (printable(&snapshot.name), snapshot.id);
        return Err(StepError::failed(format!(
            "the platform failed to take it: snapshot {name} ({id}) is in state `error`"
        )));
    }
    Ok(())
}

fn unknown(asked: &Creation, error: &str) -> StepError {
    StepError::failed(format!(
        "the result of the request of {} is unknown, so there is no new one; the next run looks again: {error}",
        asked.requested_at
    ))
}

fn taken_by(policy: &PolicyName) -> StepError {
    StepError::skipped(format!("policy {policy} takes one of this instance for the same time"))
}

fn abandoned_by(policy: &PolicyName) -> StepError {
    StepError::failed(format!(
        "policy {policy}, which takes none any more, asked for one of this instance for the same time, so it was not asked for \
         again, and there is none yet; the next run looks again"
    ))
}

fn lacking(usage: u64, limit: u64, wanted: usize) -> String {
    format!(
        "the organization's quota of snapshots: {usage} of {limit} used, and this run needs {wanted} more in this zone, so \
         it was not asked for; delete some, or ask Exoscale for a higher quota"
    )
}
