//! Takes an existing instance back: to a snapshot that still exists, or to a verified copy.
//!
//! Either loses what is on the disk. So before that a snapshot is taken, put on hold, waited for until the platform has copied
//! it to its object storage, and exported to an archive: a snapshot dies with its instance, a copy does not. No policy deletes
//! in the zone meanwhile. Each step is in the audit log; none is repeated blindly.
//!
//! A copy becomes a template first, which changes nothing of the instance and takes longest: the snapshot is then taken as
//! late as possible, and nothing is lost but what the instance writes after that.

use std::fmt::{self, Display};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use uuid::Uuid;

use crate::archive::backend::Archive;
use crate::archive::manifest::BuildFacts;
use crate::archive::transfer::throttle::Throttle;
use crate::exoscale::client::ZoneClient;
use crate::exoscale::error::ApiError;
use crate::exoscale::wire::{InstanceDetails, Operation, ResetRequest, TemplateReference};
use crate::randomness::fresh_id;
use crate::restore::error::RestoreError;
use crate::restore::find::ArchivedCopy;
use crate::restore::template::{self, NewTemplate, to_template, virtual_bytes};
use crate::run::archive_retention::subject_of;
use crate::run::context::Runner;
use crate::run::report::{STOPPED, Step};
use crate::run::single_export::SingleExport;
use crate::run::step::{Done, Recorder, StepError};
use crate::snapshot::{InstanceId, Machine, Snapshot, SnapshotId, SnapshotState, TemplateId, ZoneName};
use crate::state::audit::{Action, StepFacts, StepOutcome, Subject};
use crate::state::holds::{About, Hold};
use crate::text::{chain, printable, to_the_second};

/// How long the snapshot from before the change is on hold: long enough to notice what was lost by it.
pub const HELD_FOR: SignedDuration = SignedDuration::from_hours(30 * 24);

/// Between two looks at a snapshot that is being taken.
const WATCH_POLL: Duration = Duration::from_secs(10);

/// The longest wait for it, as in the vendor's own tools.
const WATCH_MAX: Duration = Duration::from_hours(1);

/// The states of an instance in which it can be changed.
const STATE_RUNNING: &str = "running";
const STATE_STOPPED: &str = "stopped";

/// What an instance is taken back to.
#[derive(Debug)]
enum Back<'a> {
    /// One of its snapshots.
    Snapshot(SnapshotId),
    /// A copy in an archive, by way of a template.
    Copy {
        /// The copies, in the order in which to try them; at least one.
        copies: Vec<ArchivedCopy>,
        on_the_way: Box<OnTheWay<'a>>,
    },
}

/// The template between a copy and an instance.
#[derive(Debug)]
pub struct OnTheWay<'a> {
    /// What the copies' manifests say beside.
    pub facts: BuildFacts,
    /// The template, in the zone of the instance.
    pub template: NewTemplate,
    /// Keeps the reading of a copy below a rate.
    pub throttle: Option<&'a Throttle>,
}

/// A change of an instance that nothing speaks against.
#[derive(Debug)]
pub struct Change<'a> {
    runner: &'a Runner,
    zone: ZoneName,
    /// As it was found.
    pub instance: InstanceDetails,
    /// What it is taken back to.
    back: Back<'a>,
    /// The snapshot of that.
    subject: Subject,
    run_id: Uuid,
}

/// What was done.
#[derive(Debug)]
pub struct Changed {
    /// The snapshot from before the change.
    pub safety: SnapshotId,
    /// How long it is on hold.
    pub held_until: Timestamp,
    /// The template that the instance was reset with.
    pub template_id: Option<TemplateId>,
    /// What to know about the result; each a sentence.
    pub notes: Vec<String>,
}

/// A change that was not carried out, or not wholly.
#[derive(Debug)]
pub struct Interrupted {
    /// What failed, and why.
    pub failure: String,
    /// What was done by then, and how to go on; each a sentence.
    pub so_far: Vec<String>,
}

impl Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.failure)?;
        self.so_far.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

impl std::error::Error for Interrupted {}

impl<'a> Change<'a> {
    /// Back to a snapshot. Nothing is changed yet.
    ///
    /// # Errors
    /// [`RestoreError`] if that is not possible, or not safe.
    pub async fn to_snapshot(
        runner: &'a Runner,
        zone: &ZoneName,
        id: SnapshotId,
    ) -> Result<Self, RestoreError> {
        let client = runner.client.zone(zone);
        let snapshot = good_snapshot(&client, id).await?;
        let instance_id = snapshot.instance_id.ok_or(RestoreError::Orphan(id))?;
        let instance = changeable(&client, instance_id).await?;
        let needs = snapshot.size_gib.map(|gib| gib.saturating_mul(1 << 30));
        fits(&instance, needs)?;
        let subject = Subject::of(&snapshot, Some(&instance.instance));
        Ok(Self::new(runner, zone, instance, Back::Snapshot(snapshot.id), subject))
    }

    /// Back to the first good one of these copies. Nothing is changed yet.
    ///
    /// # Errors
    /// [`RestoreError`] if that is not possible, or not safe.
    pub async fn to_copy(
        runner: &'a Runner,
        instance: InstanceId,
        copies: Vec<ArchivedCopy>,
        on_the_way: OnTheWay<'a>,
        from_other: bool,
    ) -> Result<Self, RestoreError> {
        let Some(first) = copies.first() else { return Err(RestoreError::NoGoodCopy(Vec::new())) };
        let manifest = &first.copy.manifest;
        let (of, name) = (manifest.instance.id, manifest.instance.name.clone());
        if of != instance && !from_other {
            return Err(RestoreError::OfOther { of, name, id: instance });
        }
        template::check(runner, &copies, &on_the_way.template)?;
        let zone = on_the_way.template.zone.clone();
        let details = changeable(&runner.client.zone(&zone), instance).await?;
        fits(&details, virtual_bytes(manifest))?;
        let subject = subject_of(manifest);
        let back = Back::Copy { copies, on_the_way: Box::new(on_the_way) };
        Ok(Self::new(runner, &zone, details, back, subject))
    }

    fn new(
        runner: &'a Runner,
        zone: &ZoneName,
        instance: InstanceDetails,
        back: Back<'a>,
        subject: Subject,
    ) -> Self {
        let run_id = fresh_id(&*runner.randomness, runner.clock.now());
        Self { runner, zone: zone.clone(), instance, back, subject, run_id }
    }

    /// The zone of the instance.
    pub fn zone(&self) -> &ZoneName {
        &self.zone
    }

    /// The snapshot that it is taken back to.
    pub fn snapshot_id(&self) -> Option<SnapshotId> {
        self.subject.id
    }

    /// What is done, as the end of a sentence.
    pub fn described(&self) -> String {
        let (id, name) = (self.instance.instance.id, printable(&self.instance.instance.name));
        let what = match &self.back {
            Back::Snapshot(_) => "snapshot",
            Back::Copy { .. } => "the copy of snapshot",
        };
        let Subject { id: snapshot, created_at, .. } = &self.subject;
        let snapshot = snapshot.map_or_else(String::new, |id| id.to_string());
        format!("instance {name} ({id}) in zone {} to {what} {snapshot}, taken {created_at}", self.zone)
    }

    /// Carries it out; the snapshot from before is exported to this archive, if one is given. Once `stop` is cancelled, nothing
    /// of the instance is changed any more; what was begun by then is ended.
    ///
    /// # Errors
    /// [`Interrupted`], with what was done by then, and how to go on.
    pub async fn carry_out(
        &self,
        copy_to: Option<&Arc<Archive>>,
        stop: &CancellationToken,
    ) -> Result<Changed, Interrupted> {
        let Runner { state, clock, .. } = self.runner;
        let mut work = Work {
            change: self,
            client: self.runner.client.zone(&self.zone),
            recorder: Recorder::manual(state.clone(), Arc::clone(clock), self.run_id),
            stop,
            so_far: Vec::new(),
        };
        match work.carry_out(copy_to).boxed().await {
            Ok(changed) => Ok(changed),
            Err(failure) => Err(Interrupted { failure, so_far: work.so_far }),
        }
    }
}

/// The snapshot, if an instance can be reverted to it.
async fn good_snapshot(client: &ZoneClient, id: SnapshotId) -> Result<Snapshot, RestoreError> {
    let Some(found) = client.get_snapshot(id).await? else {
        return Err(RestoreError::NoSnapshot { zone: client.zone().clone(), id });
    };
    let snapshot = found.snapshot;
    if snapshot.state.is_good() {
        return Ok(snapshot);
    }
    Err(RestoreError::NotGood { id, state: snapshot.state.to_string() })
}

/// The instance, if it may be changed.
async fn changeable(client: &ZoneClient, id: InstanceId) -> Result<InstanceDetails, RestoreError> {
    let found = client.get_instance(id).await?;
    let found = found.ok_or_else(|| RestoreError::NoInstance { zone: client.zone().clone(), id })?;
    if found.instance.is_managed { Err(RestoreError::Managed(id)) } else { Ok(found) }
}

fn fits(instance: &InstanceDetails, needs: Option<u64>) -> Result<(), RestoreError> {
    let disk_gib = instance.machine.disk_size_gib;
    let disk_gib = disk_gib.ok_or(RestoreError::SizeUnknown("the size of the instance's disk"))?;
    let needs = needs.ok_or(RestoreError::SizeUnknown("the size of the disk in the image"))?;
    if needs <= disk_gib.saturating_mul(1 << 30) {
        return Ok(());
    }
    Err(RestoreError::SmallerDisk { id: instance.instance.id, disk_gib, needs })
}

/// A change in progress.
struct Work<'a> {
    change: &'a Change<'a>,
    client: ZoneClient,
    recorder: Recorder,
    stop: &'a CancellationToken,
    /// What was done, and how to go on; each a sentence.
    so_far: Vec<String>,
}

impl Work<'_> {
    async fn carry_out(&mut self, copy_to: Option<&Arc<Archive>>) -> Result<Changed, String> {
        let Change { runner, zone, .. } = self.change;
        // Until the end: no policy deletes the snapshots that this rests on.
        let lock = runner.state.lock_zone(zone, &*runner.clock, self.stop).await;
        let _lock = lock.map_err(|error| self.nothing_changed(&chain(&error)))?;
        let template_id = self.template().await?;
        if self.stop.is_cancelled() {
            return Err(self.nothing_changed(STOPPED));
        }
        let (safety, hold) = self.take_safety_snapshot().await?;
        if let Some(archive) = copy_to {
            self.export(&safety, &hold, archive).await?;
        }
        if self.stop.is_cancelled() {
            return Err(self.nothing_changed(STOPPED));
        }
        let mut notes = Vec::new();
        match template_id {
            None => self.revert().await?,
            Some(template_id) => notes = self.reset(template_id).await?,
        }
        let held_until = hold.until.unwrap_or(Timestamp::MAX);
        Ok(Changed { safety: safety.id, held_until, template_id, notes })
    }

    fn nothing_changed(&self, why: &str) -> String {
        let id = self.change.instance.instance.id;
        format!("instance {id} was not changed: {why}")
    }

    fn id(&self) -> InstanceId {
        self.change.instance.instance.id
    }

    /// Makes the template on the way from a copy.
    async fn template(&mut self) -> Result<Option<TemplateId>, String> {
        let Back::Copy { copies, on_the_way } = &self.change.back else { return Ok(None) };
        let OnTheWay { facts, template, throttle } = &**on_the_way;
        let step = to_template(self.change.runner, copies, facts, template, *throttle).boxed().await;
        let step = step.map_err(|error| self.nothing_changed(&chain(&error)))?;
        if step.outcome != StepOutcome::Done {
            return Err(self.nothing_changed(&format!("no template was made: {}", why(step))));
        }
        let id = step.facts.template_id;
        let id = id.ok_or_else(|| self.nothing_changed("the API does not name the template that it made"))?;
        self.so_far.push(format!(
            "template {id} ({}) was made in zone {}: `exo compute instance reset {} --template {id} --template-visibility \
             private --zone {}` resets the instance with it, or delete it",
            printable(&template.name),
            self.change.zone,
            self.id(),
            self.change.zone
        ));
        Ok(Some(id))
    }

    /// Takes a snapshot of the instance as it is, puts it on hold, and waits until the platform has stored it.
    async fn take_safety_snapshot(&mut self) -> Result<(Snapshot, Hold), String> {
        let Change { runner, zone, instance, .. } = self.change;
        let subject = Subject {
            id: None,
            name: String::new(),
            created_at: runner.clock.now(),
            instance_id: Some(self.id()),
            instance_name: Some(instance.instance.name.to_string()),
        };
        let intent = StepFacts::new(Action::Create, zone, subject, self.reasons());
        let (mut on_hold, mut stored) = (None, None);
        let work = async {
            let operation =
                self.client.create_snapshot(self.id()).await.map_err(|error| may_be_there(&error))?;
            let Operation { id: operation_id, reference } = operation;
            let in_operation = |error: StepError| StepError { operation_id, ..error };
            let hold = self.hold(reference.map(SnapshotId)).await.map_err(in_operation)?;
            on_hold = Some(hold.clone());
            let snapshot = self.watch(hold.snapshot).await.map_err(in_operation)?;
            let hold = self.hold_by_name(hold, &snapshot).await;
            let message = Some(format!("on hold until {}", until_text(&hold)));
            let subject = Some(Subject::of(&snapshot, Some(&instance.instance)));
            stored = Some((snapshot, hold));
            Ok(Done { operation_id, snapshot: subject, message, ..Done::default() })
        };
        let step = self.recorder.step(intent, work).await;
        if let Some(hold) = &on_hold {
            let id = hold.snapshot;
            self.so_far.push(format!(
                "snapshot {id} is of the instance before the change: it is on hold until {}, and `snapwarden unhold {id}` ends that",
                until_text(hold)
            ));
        }
        match stored.filter(|_| step.outcome == StepOutcome::Done) {
            Some(stored) => Ok(stored),
            None => Err(self.nothing_changed(&format!("there is no whole snapshot of it: {}", why(step)))),
        }
    }

    fn reasons(&self) -> Vec<String> {
        vec![format!("a manual change of {}", self.change.described())]
    }

    async fn hold(&self, snapshot: Option<SnapshotId>) -> Result<Hold, StepError> {
        let Change { runner, zone, instance, .. } = self.change;
        let snapshot = snapshot.ok_or_else(|| {
            StepError::failed(
                "the API does not say which snapshot it made, so it cannot be put on hold: `snapwarden plan` shows it",
            )
        })?;
        let now = runner.clock.now();
        let hold = Hold {
            snapshot,
            until: now.checked_add(HELD_FOR).ok(),
            reason: Some(format!("before the change of {}", self.change.described())),
            since: now,
            about: Some(About {
                zone: zone.clone(),
                name: String::new(),
                created_at: now,
                instance_name: Some(instance.instance.name.to_string()),
            }),
        };
        let result = runner.state.hold(&*runner.clock, hold.clone()).await;
        result.map_err(|error| {
            let why = chain(&error);
            StepError::failed(format!("snapshot {snapshot} was taken, and cannot be put on hold: {why}"))
        })?;
        Ok(hold)
    }

    /// Puts the snapshot's name and date into its hold, for people who list holds. It is on hold already.
    async fn hold_by_name(&self, mut hold: Hold, snapshot: &Snapshot) -> Hold {
        let Runner { state, clock, .. } = self.change.runner;
        if let Some(about) = &mut hold.about {
            about.name = snapshot.name.to_string();
            about.created_at = snapshot.created_at;
        }
        if let Err(error) = state.hold(&**clock, hold.clone()).await {
            warn!("the hold on snapshot {} has no name: {}", snapshot.id, chain(&error));
        }
        hold
    }

    /// Waits until the platform has copied a snapshot to its object storage.
    async fn watch(&self, id: SnapshotId) -> Result<Snapshot, StepError> {
        let clock = &self.change.runner.clock;
        let deadline = clock.elapsed() + WATCH_MAX;
        loop {
            let found = self.client.get_snapshot(id).await?;
            let found =
                found.ok_or_else(|| StepError::failed(format!("snapshot {id} has disappeared")))?.snapshot;
            let state = match &found.state {
                SnapshotState::Exported => return Ok(found),
                SnapshotState::Error => {
                    return Err(StepError::failed(format!(
                        "the platform failed to take it: snapshot {id} is in state `error`"
                    )));
                }
                state => printable(state.as_str()).into_owned(),
            };
            if clock.elapsed() >= deadline {
                return Err(StepError::failed(format!(
                    "snapshot {id} is in state `{state}` after an hour, and not `exported`"
                )));
            }
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(StepError::skipped(STOPPED)),
                () = clock.sleep(WATCH_POLL) => {}
            }
        }
    }

    /// Exports the snapshot from before the change: it dies with its instance, a copy does not.
    async fn export(
        &mut self,
        snapshot: &Snapshot,
        hold: &Hold,
        archive: &Arc<Archive>,
    ) -> Result<(), String> {
        let Change { runner, zone, instance, run_id, .. } = self.change;
        let instance = &instance.instance;
        let intent = StepFacts {
            archive: Some(archive.name().clone()),
            ..StepFacts::new(Action::Export, zone, Subject::of(snapshot, Some(instance)), self.reasons())
        };
        let (client, run_id, stop) = (&self.client, *run_id, self.stop);
        let work = SingleExport { runner, client, snapshot, instance, archive, run_id, hold, stop };
        let exported = self.recorder.step(intent, work.run().boxed()).await;
        if exported.outcome != StepOutcome::Done {
            return Err(self.nothing_changed(&format!(
                "snapshot {} is not in archive {}: {}; `--copy-to` names another archive, and `--without-copy` goes on without",
                snapshot.id,
                archive.name(),
                why(exported)
            )));
        }
        self.so_far.push(format!("a verified copy of it is in archive {}", archive.name()));
        Ok(())
    }

    /// Stops the instance if it runs, reverts it, and starts it again.
    async fn revert(&mut self) -> Result<(), String> {
        let Back::Snapshot(snapshot) = self.change.back else { return Ok(()) };
        let (id, zone) = (self.id(), &self.change.zone);
        let was_running = self.check_again(Some(snapshot)).await?;
        if was_running {
            let stopped = self.client.stop_instance(id);
            let step = self.step(Action::StopInstance, None, stopped).await;
            if step.outcome != StepOutcome::Done {
                self.so_far
                    .push(format!("look whether it runs: `exo compute instance show {id} --zone {zone}`"));
                return Err(self.nothing_changed(&format!("it does not stop: {}", why(step))));
            }
        }
        let mut is_refused = false;
        let reverted = async {
            let reverted = self.client.revert_instance(id, snapshot).await;
            is_refused = reverted.as_ref().is_err_and(is_refusal);
            reverted
        };
        let step = self.step(Action::Revert, None, reverted).await;
        let failure = (step.outcome != StepOutcome::Done).then(|| why(step));
        let by_hand = format!("`exo compute instance snapshot revert {snapshot} {id} --zone {zone}`");
        if let Some(failure) = failure.as_ref().filter(|_| !is_refused) {
            self.so_far.push(format!(
                "the instance is stopped, and its disk may be reverted, or in part: revert it again, by {by_hand} or by this command, \
                 before you start it"
            ));
            return Err(format!("whether instance {id} was reverted is not known: {failure}"));
        }
        if was_running {
            let step = self.step(Action::StartInstance, None, self.client.start_instance(id)).await;
            if step.outcome != StepOutcome::Done {
                let start = format!("start it: `exo compute instance start {id} --zone {zone}`");
                self.so_far.push(start);
                let what = if failure.is_some() { "is unchanged" } else { "was reverted" };
                return Err(format!("instance {id} {what}, and does not start: {}", why(step)));
            }
        }
        match failure {
            None => Ok(()),
            Some(failure) => {
                self.so_far.push(format!(
                    "once the cause is gone, this command or {by_hand} (on the stopped instance) reverts it"
                ));
                Err(self.nothing_changed(&failure))
            }
        }
    }

    /// Resets the instance with a template. Returns what to know about it.
    async fn reset(&mut self, template_id: TemplateId) -> Result<Vec<String>, String> {
        let (id, zone) = (self.id(), &self.change.zone);
        let was_running = self.check_again(None).await?;
        let template = TemplateReference { id: template_id };
        // As it is: without a size the platform might take the template's.
        let request = ResetRequest { template, disk_size: self.change.instance.machine.disk_size_gib };
        let reset = self.client.reset_instance(id, &request);
        let step = self.step(Action::Reset, Some(template_id), reset).await;
        if step.outcome != StepOutcome::Done {
            self.so_far.push(format!(
                "look at its template and its state: `exo compute instance show {id} --zone {zone}`; if the template is another one, \
                 it was not reset"
            ));
            return Err(format!("instance {id} was perhaps not reset: {}", why(step)));
        }
        let after = match self.client.get_instance(id).await {
            Ok(Some(after)) => after,
            Ok(None) => {
                return Err(format!("instance {id} was reset, and zone {zone} does not have it any more"));
            }
            Err(error) => return Ok(vec![format!("how it is now cannot be read: {}", chain(&error))]),
        };
        if was_running && after.state == STATE_STOPPED {
            let step =
                self.step(Action::StartInstance, Some(template_id), self.client.start_instance(id)).await;
            if step.outcome != StepOutcome::Done {
                self.so_far.push(format!("start it: `exo compute instance start {id} --zone {zone}`"));
                return Err(format!("instance {id} was reset, and does not start: {}", why(step)));
            }
        }
        Ok(self.differences(&after, template_id))
    }

    /// What the platform does not promise, as it was found.
    fn differences(&self, after: &InstanceDetails, template_id: TemplateId) -> Vec<String> {
        let before = &self.change.instance;
        let address = |details: &InstanceDetails| {
            details
                .public_ip
                .as_deref()
                .map_or_else(|| "none".to_owned(), |address| printable(address).into_owned())
        };
        let (was, is) = (address(before), address(after));
        let addresses = if was == is {
            format!(
                "its id and its public address ({is}) are the same as before, which the platform does not promise"
            )
        } else {
            format!("its public address was {was}, and is {is}")
        };
        let mut notes = vec![addresses, format!("it runs on template {template_id}: keep that")];
        if before.state != after.state {
            let (was, is) = (printable(&before.state), printable(&after.state));
            notes.push(format!("it was in state `{was}`, and was `{is}` right after the reset"));
        }
        if after.instance.template_id != Some(template_id) {
            notes.push(
                "the API does not show the template yet: look at the instance before you rely on it"
                    .to_owned(),
            );
        }
        let lost = |machine: &Machine| Machine { user_data: None, ..machine.clone() };
        if lost(&before.machine) != lost(&after.machine) {
            notes.push("the API shows other groups, networks, keys or sizes than before: compare them with its manifest".to_owned());
        }
        notes
    }

    /// Hours may have passed: looks once more whether the instance may be changed. Returns whether it runs.
    async fn check_again(&self, snapshot: Option<SnapshotId>) -> Result<bool, String> {
        let checked = async {
            if let Some(snapshot) = snapshot {
                good_snapshot(&self.client, snapshot).await?;
            }
            changeable(&self.client, self.id()).await
        };
        let now = checked.await.map_err(|error| self.nothing_changed(&chain(&error)))?;
        if now.machine.disk_size_gib != self.change.instance.machine.disk_size_gib {
            return Err(self.nothing_changed("its disk has another size by now: try again"));
        }
        match now.state.as_str() {
            STATE_RUNNING => Ok(true),
            STATE_STOPPED => Ok(false),
            other => Err(self.nothing_changed(&format!("it is in state `{}`: try again", printable(other)))),
        }
    }

    async fn step(
        &self,
        action: Action,
        template_id: Option<TemplateId>,
        work: impl Future<Output = Result<Operation, ApiError>>,
    ) -> Step {
        let Change { zone, subject, .. } = self.change;
        let intent =
            StepFacts { template_id, ..StepFacts::new(action, zone, subject.clone(), self.reasons()) };
        let work = async {
            let Operation { id: operation_id, .. } = work.await?;
            Ok(Done { operation_id, ..Done::default() })
        };
        self.recorder.step(intent, work).await
    }
}

/// Whether the platform refused a request before anything began.
fn is_refusal(error: &ApiError) -> bool {
    !error.may_have_happened() && error.operation_id().is_none()
}

/// A request for a snapshot that failed.
fn may_be_there(error: &ApiError) -> StepError {
    let hint = if error.may_have_happened() {
        "; there may be one all the same: `snapwarden plan` shows it"
    } else {
        ""
    };
    let message = format!("{}{hint}", chain(error));
    StepError { operation_id: error.operation_id(), ..StepError::failed(message) }
}

fn why(step: Step) -> String {
    step.message.unwrap_or_else(|| "it was not begun".to_owned())
}

fn until_text(hold: &Hold) -> String {
    hold.until.map_or_else(|| "it is released".to_owned(), |until| to_the_second(until).to_string())
}
