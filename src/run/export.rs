//! Exports the snapshots that the policy wants in its archives and that are not there yet.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{self, BoxFuture, join_all};
use futures_util::stream::{self, StreamExt as _};
use jiff::Timestamp;
use tokio::sync::{Mutex, oneshot};
use tracing::info;

use crate::archive::backend::Archive;
use crate::archive::catalogue::{Catalogue, StoredCopy};
use crate::archive::manifest::Manifest;
use crate::archive::manifest_update::{ManifestUpdate, UpdateError};
use crate::archive::proof::VerifiedCopy;
use crate::archive::store::{self, ImageToStore, StoreError};
use crate::archive::transfer::connection::Download;
use crate::archive::transfer::progress::Progress;
use crate::archive::transfer::sink::Begin;
use crate::archive::transfer::throttle::Throttle;
use crate::policy::name::ArchiveName;
use crate::policy::{ArchiveRules, Export, Policy, Which};
use crate::run::archive_presence::{Presence, forget_to_store_again, is_still_there, remember_write};
use crate::run::build_facts;
use crate::run::context::Runner;
use crate::run::downloads::{HowFar, RunningDownload};
use crate::run::list::Listing;
use crate::run::plan::{PlannedAction, ZonePlan};
use crate::run::report::{Step, Transfer};
use crate::run::source::ExportedImage;
use crate::run::step::{Done, Recorder, StepError};
use crate::snapshot::{InstanceId, OperationId, Snapshot, SnapshotId};
use crate::state::audit::{Action, StepFacts};
use crate::text::{chain, printable};

/// Another process that stores the same image needs minutes or hours, so a look every 2 s costs nothing and loses nothing.
const BUSY_POLL: Duration = Duration::from_secs(2);

/// One snapshot, and the archives that lack it.
struct Missing<'a> {
    plan: &'a ZonePlan,
    snapshot: &'a Snapshot,
    /// In the order of their names: two processes that store the same take them in the same order, so that they never
    /// wait for each other.
    archives: Vec<&'a ArchiveName>,
    /// The time of the instance's newest copy, in the archive where that is oldest. An instance without a copy comes
    /// first.
    newest_copy: Option<Timestamp>,
}

/// Adds up the progress of a download; with the position of the download in the image.
#[derive(Default)]
struct TransferCounter(std::sync::Mutex<(Transfer, u64)>);

impl TransferCounter {
    /// Counts, and returns the bytes that were received so far.
    fn note(&self, progress: Progress) -> u64 {
        let (transfer, position) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match progress {
            Progress::Downloading { bytes, .. } => {
                // A position before the last one is a restart that was not reported.
                transfer.bytes += bytes.checked_sub(*position).unwrap_or(bytes);
                *position = bytes;
            }
            Progress::Resumed { bytes } => {
                transfer.resumes += 1;
                if transfer.bytes == 0 {
                    // These bytes are from an earlier download.
                    *position = bytes;
                }
            }
            Progress::StartedOver => *position = 0,
            Progress::ChecksumMismatch => {
                transfer.checksum_mismatches += 1;
                *position = 0;
            }
            Progress::Verifying => {}
        }
        transfer.bytes
    }

    fn ended(&self, took: Duration) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0.seconds = took.as_secs_f64();
    }

    /// None if nothing was received.
    fn transfer(&self) -> Option<Transfer> {
        let (transfer, _) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (transfer.bytes > 0 || transfer.resumes > 0).then_some(transfer)
    }
}

/// Stores in each archive of the policy what it lacks, each snapshot by one download. The instance whose newest verified
/// copy is oldest comes first. Returns the steps, and the archives that are full.
pub(crate) async fn export(
    runner: &Runner,
    recorder: &Recorder,
    policy: &Policy,
    export: &Export,
    plans: &[&ZonePlan],
) -> (Vec<Step>, BTreeSet<ArchiveName>) {
    let throttle = export.bandwidth_limit.map(|limit| Throttle::new(limit.get()));
    let (marked, full) = (Mutex::default(), Mutex::default());
    let throttle = throttle.as_ref();
    let exporter = Exporter { runner, recorder, policy, export, throttle, marked: &marked, full: &full };
    let mut missing: Vec<Missing<'_>> =
        plans.iter().flat_map(|plan| missing(export, plan, &runner.archive_rules)).collect();
    missing.sort_by_key(|missing| (missing.newest_copy, missing.snapshot.created_at));
    let mut exports: Vec<BoxFuture<'_, _>> = Vec::new();
    for missing in missing {
        exports.push(exporter.export(missing).boxed());
    }
    let steps = stream::iter(exports).buffer_unordered(export.concurrency.get()).concat().await;
    (steps, full.into_inner())
}

/// What all exports of a run share.
#[derive(Clone, Copy)]
struct Exporter<'a> {
    runner: &'a Runner,
    recorder: &'a Recorder,
    policy: &'a Policy,
    export: &'a Export,
    throttle: Option<&'a Throttle>,
    /// The archives that got their marker in this run, or why not.
    marked: &'a Mutex<BTreeMap<ArchiveName, Result<(), String>>>,
    /// The archives that had no space for an image.
    full: &'a Mutex<BTreeSet<ArchiveName>>,
}

/// A step whose intent is in the audit log, so that its archive may get the image.
struct Waiting<'a> {
    archive: &'a ArchiveName,
    result: oneshot::Sender<Result<Done, StepError>>,
}

impl<'a> Exporter<'a> {
    /// One download, and a step for each archive that it feeds.
    async fn export(self, missing: Missing<'a>) -> Vec<Step> {
        let counter = TransferCounter::default();
        let mut steps: Vec<BoxFuture<'_, Step>> = Vec::new();
        let mut ready = Vec::new();
        for archive in &missing.archives {
            let subject = missing.plan.listing.subject(missing.snapshot);
            let reasons = vec![why(self.export.snapshots, archive)];
            let intent = StepFacts {
                archive: Some((*archive).clone()),
                ..StepFacts::new(Action::Export, missing.plan.zone(), subject, reasons)
            };
            // The work of a step begins once its intent is in the log; if the step is refused, `start` is dropped.
            let (start, started) = oneshot::channel();
            ready.push(started);
            let work = async move {
                let (result, received) = oneshot::channel();
                let _ = start.send(Waiting { archive, result });
                received
                    .await
                    .unwrap_or_else(|_| Err(StepError::failed("the download ended without a result")))
            };
            steps.push(self.recorder.step(intent, work).boxed());
        }
        let download = async {
            let waiting: Vec<Waiting<'_>> = join_all(ready).await.into_iter().flatten().collect();
            if !waiting.is_empty() {
                self.store(&missing, waiting, &counter).await;
            }
        };
        let (mut steps, ()) = future::join(join_all(steps), download).await;
        // One download is counted once.
        if let Some(first) = steps.first_mut() {
            first.transfer = counter.transfer();
        }
        steps
    }

    /// Downloads the image into the archives that wait for it, and sends each its result.
    async fn store(&self, missing: &Missing<'_>, waiting: Vec<Waiting<'_>>, counter: &TransferCounter) {
        let (mut outputs, mut results) = (Vec::new(), BTreeMap::new());
        let (zone, snapshot) = (missing.plan.zone(), missing.snapshot);
        let client = self.runner.client.zone(zone);
        let instance = missing.plan.listing.instance_of(snapshot);
        let found = build_facts::find(&client, snapshot.instance_id, instance).await;
        let image = ImageToStore {
            zone: zone.clone(),
            snapshot: snapshot.clone(),
            instance: instance.cloned(),
            template: found.template,
            machine: found.machine,
            user_data_in: self.runner.user_data_in(),
            missing: found.missing,
            policy: Some(self.policy.name.clone()),
            run_id: self.recorder.run_id(),
        };
        for Waiting { archive, result } in waiting {
            // An export may take hours, so its begin is logged as well.
            let (name, id) = (printable(&snapshot.name), snapshot.id);
            info!(zone.name = %zone, snapshot.id = %id, "exporting snapshot {name} into archive {archive}");
            match self.begin(missing.plan, archive, &image).await {
                Ok(Begin::Stored(copy)) => {
                    drop(result.send(is_there(&copy).map(|()| done(&copy, None)).map_err(StepError::failed)));
                }
                Ok(Begin::Missing(output)) => {
                    outputs.push(output);
                    results.insert(archive.clone(), result);
                }
                Err(error) => drop(result.send(Err(StepError::failed(error)))),
            }
        }
        if outputs.is_empty() {
            return;
        }
        let exported = ExportedImage::export(self.runner, client, snapshot.id).await;
        let (source, operation_id) = match exported {
            Ok(exported) => exported,
            Err(error) => {
                for output in outputs {
                    output.sink.abandon().await;
                }
                for result in results.into_values() {
                    drop(result.send(Err(error.clone())));
                }
                return;
            }
        };
        let running = self.runner.downloads.begin(
            RunningDownload {
                doing: "exporting",
                policy: Some(self.policy.name.clone()),
                zone: zone.clone(),
                snapshot_id: snapshot.id,
                snapshot_name: snapshot.name.to_string(),
                instance_name: instance.map(|instance| instance.name.to_string()),
                archives: results.keys().cloned().collect(),
                started_at: self.runner.clock.now(),
                how_far: HowFar::default(),
            },
            Arc::clone(&self.runner.clock),
        );
        let started = self.runner.clock.elapsed();
        let download = Download {
            source: &source,
            clock: &*self.runner.clock,
            randomness: &*self.runner.randomness,
            stall_timeout: self.export.stall_timeout,
            connections: self.export.connections.get(),
            hashers: &self.runner.hashers,
            throttle: self.throttle,
            progress: &|progress| running.note(progress, counter.note(progress)),
        };
        let stored = store::store(&image, outputs, &download).await;
        drop(running);
        counter.ended(self.runner.clock.elapsed().saturating_sub(started));
        for (archive, stored) in stored {
            let Some(result) = results.remove(&archive) else { continue };
            drop(result.send(match stored {
                Ok(copy) => {
                    // If this can't be remembered, the archive stays closed until the next write.
                    let _ = self.remember(&archive, None).await;
                    Ok(done(&copy, operation_id))
                }
                Err(error) => {
                    let message = self.failed(&archive, &error).await;
                    Err(StepError { operation_id, ..StepError::failed(message) })
                }
            }));
        }
    }

    async fn remember(&self, archive: &ArchiveName, failure: Option<String>) -> Result<(), String> {
        remember_write(&self.runner.state, &*self.runner.clock, archive, failure).await
    }

    /// Remembers why an archive could not be written, since a disk that fails may have lost older copies, too. Returns
    /// the whole message.
    async fn failed(&self, archive: &ArchiveName, error: &StoreError) -> String {
        let mut message = chain(error);
        if error.is_full() {
            self.full.lock().await.insert(archive.clone());
        }
        if let Some(failure) = error.failed_write().map(|error| chain(error))
            && let Err(why) = self.remember(archive, Some(failure)).await
        {
            self.recorder.stop_deletions();
            message = format!("{message}; {why}");
        }
        message
    }

    /// Has the marker of an archive written, once in this run.
    async fn mark(&self, name: &ArchiveName) -> Result<(), String> {
        let mut marked = self.marked.lock().await;
        if let Some(known) = marked.get(name) {
            return known.clone();
        }
        let result = self.runner.make_ready(name).await;
        let result =
            result.map_err(|why| format!("nothing is stored in archive {name}, which gets no marker: {why}"));
        marked.insert(name.clone(), result.clone());
        result
    }

    /// Makes an archive ready. Another policy, or `once` beside the daemon, may be storing the same image: then waits, and
    /// finds its copy, or stores one after all.
    async fn begin(
        &self,
        plan: &ZonePlan,
        name: &ArchiveName,
        image: &ImageToStore,
    ) -> Result<Begin, String> {
        let archive = self.runner.archives.get(name);
        let archive = archive.ok_or_else(|| format!("archive {name} is not configured"))?;
        if plan.listing.presence(name).is_some_and(Presence::is_first_use) {
            self.mark(name).await?;
        } else if let Some(Ok(catalogue)) = plan.listing.catalogues.get(name) {
            // Its disk may have been unmounted since: then it would be stored on the disk below.
            is_still_there(archive, catalogue).await?;
        }
        if let Some(Ok(catalogue)) = plan.listing.catalogues.get(name) {
            self.mark_corrupt(archive, catalogue, image).await?;
            let (state, clock) = (&self.runner.state, &*self.runner.clock);
            forget_to_store_again(state, clock, catalogue, image.snapshot.id).await?;
            if let Err(error) = archive.forget_pruned_without_newer(catalogue, image.snapshot.id).await {
                let why = match &error {
                    UpdateError::Archive(error) => self.failed(name, error).await,
                    error => chain(error),
                };
                return Err(format!("the manifest of the pruned copy cannot be removed: {why}"));
            }
        }
        loop {
            match archive.begin(image).await {
                Err(error) => {
                    let is_refused = !matches!(self.recorder.refusal(Action::Export).await, Ok(None));
                    if is_refused || !matches!(error, StoreError::Busy { .. }) {
                        return Err(self.failed(name, &error).await);
                    }
                    self.runner.clock.sleep(BUSY_POLL).await;
                }
                Ok(begun) => return Ok(begun),
            }
        }
    }

    /// A corrupt copy that the archive could not be written to mark would pass there for a good one, and not be replaced.
    async fn mark_corrupt(
        &self,
        archive: &Archive,
        catalogue: &Catalogue,
        image: &ImageToStore,
    ) -> Result<(), String> {
        let mut unmarked = catalogue.unmarked().iter();
        let Some((copy, since)) = unmarked.find(|(copy, _)| copy.manifest.snapshot.id == image.snapshot.id)
        else {
            return Ok(());
        };
        let why = match archive.update_manifest(copy, ManifestUpdate::Corrupt(*since)).await {
            // One that has changed was stored or marked by another process.
            Ok(()) | Err(UpdateError::Changed { .. }) => return Ok(()),
            Err(UpdateError::Archive(error)) => self.failed(archive.name(), &error).await,
            Err(error @ (UpdateError::Busy { .. } | UpdateError::Held(_))) => chain(&error),
        };
        Err(format!(
            "the corrupt copy that is there cannot be marked as such, so it cannot be replaced: {why}"
        ))
    }
}

/// Why a copy that was found stored is none: its image was deleted, and its manifest could not be removed.
pub(crate) fn is_there(copy: &VerifiedCopy) -> Result<(), String> {
    match copy.pruned_at() {
        None => Ok(()),
        Some(at) => Err(format!(
            "it was deleted from archive {} at {at}, and is not stored again, since its manifest changed meanwhile",
            copy.archive()
        )),
    }
}

fn done(copy: &VerifiedCopy, operation_id: Option<OperationId>) -> Done {
    let mut message = format!("{} bytes verified in archive {}", copy.bytes(), copy.archive());
    for warning in copy.warnings() {
        message.push_str("; ");
        message.push_str(warning);
    }
    Done { operation_id, message: Some(message), ..Done::default() }
}

/// The exports that a run would begin with in a zone.
pub(crate) fn planned(
    export: &Export,
    plan: &ZonePlan,
    rules: &BTreeMap<ArchiveName, ArchiveRules>,
) -> Vec<PlannedAction> {
    let all = missing(export, plan, rules).into_iter().flat_map(|Missing { snapshot, archives, .. }| {
        archives.into_iter().map(move |archive| PlannedAction {
            action: Action::Export,
            archive: Some(archive.clone()),
            snapshot: plan.listing.subject(snapshot),
            why: why(export.snapshots, archive),
        })
    });
    all.collect()
}

/// The policy's archives that cannot be read, each as a sentence. Nothing is exported into them, and nothing is deleted
/// that needs a copy there, so each is a failure of the zone.
pub(crate) fn unreadable(export: &Export, listing: &Listing) -> Vec<String> {
    let failure = |name: &ArchiveName| match listing.catalogues.get(name)? {
        Ok(_) => match listing.presence(name)? {
            Presence::Closed(reason) => Some(format!("nothing is exported into archive {name}: {reason}")),
            // An export may end that the last write failed.
            Presence::InDoubt { .. } | Presence::Known | Presence::FirstUse | Presence::Unadopted => None,
        },
        Err(reason) => {
            Some(format!("nothing is exported into archive {name}, since it cannot be read: {reason}"))
        }
    };
    export.archives.iter().filter_map(failure).collect()
}

/// The policy's archives to which the last write failed, each as a sentence: a failure of the run, also if it had nothing
/// to export into them.
pub(crate) fn write_failed(export: &Export, listing: &Listing) -> Vec<String> {
    let failure = |name: &ArchiveName| match listing.presence(name)? {
        Presence::InDoubt { why, .. } => Some(format!("archive {name}: {why}")),
        _ => None,
    };
    export.archives.iter().filter_map(failure).collect()
}

fn why(which: Which, archive: &ArchiveName) -> String {
    match which {
        Which::Newest => {
            format!("the newest good one of its instance, and archive {archive} has no copy of it")
        }
        Which::All => format!("it is kept, and archive {archive} has no copy of it"),
    }
}

/// What an archive has of the snapshots of a zone.
struct Stored<'a> {
    archive: &'a ArchiveName,
    /// Those of which it has a copy, or had one that its retention deleted.
    snapshots: HashSet<SnapshotId>,
    /// Of these, those whose copy was deleted, and does not count any more: no newer one stands for it.
    without_newer: HashSet<SnapshotId>,
    /// When the newest copy of each instance was taken.
    newest: HashMap<InstanceId, Timestamp>,
}

impl<'a> Stored<'a> {
    fn new(archive: &'a ArchiveName, catalogue: &Catalogue, may_empty: bool) -> Self {
        let ids = |copy: &StoredCopy| copy.manifest.snapshot.id;
        let mut newest: HashMap<InstanceId, Timestamp> = HashMap::new();
        for copy in catalogue.unpruned() {
            let Manifest { snapshot, instance, .. } = &*copy.manifest;
            let newest = newest.entry(instance.id).or_insert(snapshot.created_at);
            *newest = snapshot.created_at.max(*newest);
        }
        // An image that is still there is for a person to bring back.
        let without_newer = catalogue.pruned_without_newer().filter(|copy| !copy.has_image && !may_empty);
        let without_newer = without_newer.map(ids).collect();
        Self { archive, snapshots: catalogue.copies().iter().map(ids).collect(), without_newer, newest }
    }

    /// Which of the wanted snapshots it lacks. One whose copy was deleted is stored again only if no newer one is stored: with that
    /// it counts again.
    fn lacking(&self, wanted: &[(&Snapshot, InstanceId)]) -> HashSet<SnapshotId> {
        let lacks = |id: SnapshotId| !self.snapshots.contains(&id) || self.without_newer.contains(&id);
        let mut newest: HashMap<InstanceId, &Snapshot> = HashMap::new();
        for (snapshot, instance) in wanted.iter().filter(|(snapshot, _)| lacks(snapshot.id)) {
            let newest = newest.entry(*instance).or_insert(snapshot);
            if (snapshot.created_at, snapshot.id) > (newest.created_at, newest.id) {
                *newest = snapshot;
            }
        }
        let never = wanted.iter().map(|(snapshot, _)| snapshot.id).filter(|id| !self.snapshots.contains(id));
        never.chain(newest.into_values().map(|snapshot| snapshot.id)).collect()
    }
}

/// The wanted snapshots that an archive lacks. One that cannot be read gets nothing: its copies are unknown. Nor does one
/// from which copies vanished: new ones of the same snapshots would end the alert before anybody has looked. What its retention
/// deleted it does not lack, while it has a newer one; and also without that, if its retention may delete the last one.
fn missing<'a>(
    export: &'a Export,
    plan: &'a ZonePlan,
    rules: &BTreeMap<ArchiveName, ArchiveRules>,
) -> Vec<Missing<'a>> {
    let names: BTreeSet<&ArchiveName> = export.archives.iter().collect();
    let stored = names.into_iter().filter_map(|name| {
        let Some(Ok(catalogue)) = plan.listing.catalogues.get(name) else { return None };
        let is_closed = matches!(plan.listing.presence(name), Some(Presence::Closed(_)));
        let may_empty = rules.get(name).is_some_and(ArchiveRules::may_empty);
        (!is_closed).then(|| Stored::new(name, catalogue, may_empty))
    });
    let wanted = plan.wanted(export.snapshots);
    let with_lacking = |stored: Stored<'a>| {
        let lacking = stored.lacking(&wanted);
        (stored, lacking)
    };
    let stored: Vec<(Stored<'_>, HashSet<SnapshotId>)> = stored.map(with_lacking).collect();
    let missing = wanted.into_iter().filter_map(|(snapshot, instance_id)| {
        let lacking = || stored.iter().filter(|(_, lacking)| lacking.contains(&snapshot.id));
        let newest_copy = lacking().map(|(stored, _)| stored.newest.get(&instance_id).copied()).min()?;
        let archives = lacking().map(|(stored, _)| stored.archive).collect();
        Some(Missing { plan, snapshot, archives, newest_copy })
    });
    missing.collect()
}
