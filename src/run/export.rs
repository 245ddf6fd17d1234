//! Exports what the policy wants in its archives and is not there yet.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{self, BoxFuture, join_all};
use futures_util::stream::{self, StreamExt as _};
use jiff::Timestamp;
use tokio::sync::oneshot;
use tracing::{info, warn};

use crate::archive::manifest::TemplateRecord;
use crate::archive::proof::VerifiedCopy;
use crate::archive::store::{self, ImageToStore, StoreError};
use crate::archive::transfer::connection::Download;
use crate::archive::transfer::progress::Progress;
use crate::archive::transfer::sink::Begin;
use crate::archive::transfer::throttle::Throttle;
use crate::exoscale::client::ZoneClient;
use crate::policy::{ArchiveName, Export, Policy, Which};
use crate::retention::plan::PolicyPlan;
use crate::retention::verdict::Verdict;
use crate::run::downloads::{HowFar, RunningDownload};
use crate::run::list::Catalogues;
use crate::run::report::{Step, Transfer};
use crate::run::source::ExportedImage;
use crate::run::step::{Done, Recorder, StepError};
use crate::run::{Planned, PlannedAction, Runner};
use crate::snapshot::{Instance, InstanceId, OperationId, Snapshot, SnapshotId, ZoneName};
use crate::state::audit::{Action, StepFacts};
use crate::text::{chain, printable};

/// Between two looks at an image that somebody else is storing.
const BUSY_POLL: Duration = Duration::from_secs(2);

/// One snapshot that an archive lacks.
struct Missing<'a> {
    place: usize,
    zone: &'a ZoneName,
    planned: &'a Planned,
    snapshot: &'a Snapshot,
    archive: &'a ArchiveName,
    /// When the newest verified copy of the instance there was taken; none yet sorts first.
    newest_copy: Option<Timestamp>,
}

/// How an image comes in, added up from what its download tells.
#[derive(Default)]
struct Coming(Mutex<(Transfer, u64)>);

impl Coming {
    /// Adds up; gives the bytes that came over the line so far.
    fn note(&self, progress: Progress) -> u64 {
        let (transfer, position) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match progress {
            Progress::Downloading { bytes, .. } => {
                // Further back than before is a new beginning that was not told of.
                transfer.bytes += bytes.checked_sub(*position).unwrap_or(bytes);
                *position = bytes;
            }
            Progress::Resumed { bytes } => {
                transfer.resumes += 1;
                if transfer.bytes == 0 {
                    // An earlier download left it.
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

    /// None if no connection brought anything.
    fn transfer(&self) -> Option<Transfer> {
        let (transfer, _) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (transfer.bytes > 0 || transfer.resumes > 0).then_some(transfer)
    }
}

/// One snapshot, and the archives that lack it, in the order of their names: two that store the same take them alike, so
/// that neither waits for the other in a ring.
struct Wanted<'a> {
    missing: Missing<'a>,
    archives: Vec<&'a ArchiveName>,
}

/// Stores in each archive of the policy what it lacks, each snapshot by one download: the instance whose newest verified
/// copy is oldest comes first. Steps come back with the place of their zone.
pub async fn export(
    runner: &Runner,
    recorder: &Recorder,
    policy: &Policy,
    export: &Export,
    zones: &[(usize, &ZoneName, &Planned)],
) -> Vec<(usize, Step)> {
    let throttle = export.bandwidth_limit.map(|limit| Throttle::new(limit.get()));
    let mut wanted: Vec<Wanted<'_>> = Vec::new();
    for (place, zone, planned) in zones {
        let names: BTreeSet<&ArchiveName> = export.archives.iter().collect();
        for archive in names {
            for missing in missing_in(*place, zone, planned, export.snapshots, archive) {
                let same = |other: &&mut Wanted<'_>| {
                    other.missing.place == missing.place && other.missing.snapshot.id == missing.snapshot.id
                };
                match wanted.iter_mut().find(same) {
                    Some(other) => {
                        other.archives.push(archive);
                        other.missing.newest_copy = other.missing.newest_copy.min(missing.newest_copy);
                    }
                    None => wanted.push(Wanted { missing, archives: vec![archive] }),
                }
            }
        }
    }
    wanted.sort_by_key(|wanted| (wanted.missing.newest_copy, wanted.missing.snapshot.created_at));
    let mut exports: Vec<BoxFuture<'_, _>> = Vec::new();
    for wanted in wanted {
        let with = With { runner, recorder, policy, export, throttle: throttle.as_ref() };
        exports.push(with.export(wanted).boxed());
    }
    let steps: Vec<Vec<(usize, Step)>> =
        stream::iter(exports).buffer_unordered(export.concurrency.get()).collect().await;
    steps.into_iter().flatten().collect()
}

/// What all exports of a run share.
#[derive(Clone, Copy)]
struct With<'a> {
    runner: &'a Runner,
    recorder: &'a Recorder,
    policy: &'a Policy,
    export: &'a Export,
    throttle: Option<&'a Throttle>,
}

/// An archive for which it is written down that a copy is on its way, and where to say what came of it.
struct Waiting<'a> {
    archive: &'a ArchiveName,
    told: oneshot::Sender<Result<Done, StepError>>,
}

impl<'a> With<'a> {
    /// One download, and a step for each archive that it feeds.
    async fn export(self, wanted: Wanted<'a>) -> Vec<(usize, Step)> {
        let Wanted { missing, archives } = wanted;
        let coming = Coming::default();
        let mut steps: Vec<BoxFuture<'_, Step>> = Vec::new();
        let mut ready = Vec::new();
        for archive in archives {
            let intent = StepFacts {
                archive: Some(archive.clone()),
                ..StepFacts::new(
                    Action::Export,
                    missing.zone,
                    missing.planned.listed.subject(missing.snapshot),
                    vec![why(self.export.snapshots, archive)],
                )
            };
            // The step's work begins once its intent is written down; where it is refused, its end is dropped.
            let (go, gone) = oneshot::channel();
            ready.push(gone);
            let work = async move {
                let (told, what) = oneshot::channel();
                let _ = go.send(Waiting { archive, told });
                what.await.unwrap_or_else(|_| Err(StepError::failed("the download ended without a word")))
            };
            steps.push(self.recorder.step(intent, work).boxed());
        }
        let download = async {
            let waiting: Vec<Waiting<'_>> = join_all(ready).await.into_iter().flatten().collect();
            if !waiting.is_empty() {
                self.store(&missing, waiting, &coming).await;
            }
        };
        let (mut steps, ()) = future::join(join_all(steps), download).await;
        // One download is counted once.
        if let Some(first) = steps.first_mut() {
            first.transfer = coming.transfer();
        }
        steps.into_iter().map(|step| (missing.place, step)).collect()
    }

    /// Brings the image into the archives that wait for it, and tells each what came of it.
    async fn store(&self, missing: &Missing<'_>, waiting: Vec<Waiting<'_>>, coming: &Coming) {
        let (mut outputs, mut still) = (Vec::new(), BTreeMap::new());
        let client = self.runner.client.zone(missing.zone);
        let instance = missing.planned.listed.instance_of(missing.snapshot);
        let image = ImageToStore {
            zone: missing.zone.clone(),
            snapshot: missing.snapshot.clone(),
            instance: instance.cloned(),
            template: template_of(&client, instance).await,
            policy: self.policy.name.clone(),
            run_id: self.recorder.run_id(),
        };
        for Waiting { archive, told } in waiting {
            // It may take hours: whoever looks should see that it began.
            let (name, id) = (printable(&missing.snapshot.name), missing.snapshot.id);
            info!(zone.name = %missing.zone, snapshot.id = %id, "exporting snapshot {name} into archive {archive}");
            match self.begin(archive, &image).await {
                Ok(Begin::Stored(copy)) => drop(told.send(Ok(done(&copy, None)))),
                Ok(Begin::Missing(output)) => {
                    outputs.push(output);
                    still.insert(archive.clone(), told);
                }
                Err(error) => drop(told.send(Err(StepError::failed(error)))),
            }
        }
        if outputs.is_empty() {
            return;
        }
        let exported = ExportedImage::export(self.runner, client, missing.snapshot.id).await;
        let (source, operation_id) = match exported {
            Ok(exported) => exported,
            Err(error) => {
                for output in outputs {
                    output.sink.abandon().await;
                }
                for told in still.into_values() {
                    let StepError { outcome, operation_id, message } = &error;
                    let same = StepError {
                        outcome: *outcome,
                        operation_id: *operation_id,
                        message: message.clone(),
                    };
                    drop(told.send(Err(same)));
                }
                return;
            }
        };
        let running = self.runner.downloads.begin(
            RunningDownload {
                policy: self.policy.name.clone(),
                zone: missing.zone.clone(),
                snapshot_id: missing.snapshot.id,
                snapshot_name: missing.snapshot.name.to_string(),
                instance_name: instance.map(|instance| instance.name.to_string()),
                archives: still.keys().cloned().collect(),
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
            progress: &|progress| running.note(progress, coming.note(progress)),
        };
        let stored = store::store(&image, outputs, &download).await;
        drop(running);
        coming.ended(self.runner.clock.elapsed().saturating_sub(started));
        for (archive, stored) in stored {
            let Some(told) = still.remove(&archive) else { continue };
            drop(told.send(match stored {
                Ok(copy) => Ok(done(&copy, operation_id)),
                Err(error) => Err(StepError { operation_id, ..StepError::failed(chain(&error)) }),
            }));
        }
    }

    /// Makes an archive ready. Another policy, or `once` beside the daemon, may be at it: what it leaves is found, or made
    /// after all.
    async fn begin(&self, name: &ArchiveName, image: &ImageToStore) -> Result<Begin, String> {
        let archive = self.runner.archives.get(name);
        let archive = archive.ok_or_else(|| format!("archive {name} is not configured"))?;
        loop {
            match archive.begin(image).await {
                Err(StoreError::Busy { .. }) if self.recorder.refusal(Action::Export).is_none() => {
                    self.runner.clock.sleep(BUSY_POLL).await;
                }
                begun => return begun.map_err(|error| chain(&error)),
            }
        }
    }
}

fn done(copy: &VerifiedCopy, operation_id: Option<OperationId>) -> Done {
    Done { operation_id, message: Some(told(copy)), ..Done::default() }
}

/// What would be exported in a zone, and why; nothing is changed.
pub fn ahead(export: &Export, zone: &ZoneName, planned: &Planned) -> Vec<PlannedAction> {
    let missing =
        export.archives.iter().flat_map(|archive| missing_in(0, zone, planned, export.snapshots, archive));
    let tell = |missing: Missing<'_>| PlannedAction {
        action: Action::Export,
        snapshot: planned.listed.subject(missing.snapshot),
        why: why(export.snapshots, missing.archive),
    };
    missing.map(tell).collect()
}

/// The policy's archives that can't be read, each as a sentence. Nothing is exported into them, and nothing is
/// deleted that needs a copy there: that must not go unheard.
pub(super) fn unreadable(export: &Export, catalogues: &Catalogues) -> Vec<String> {
    let failure = |name: &ArchiveName| match catalogues.get(name)? {
        Ok(_) => None,
        Err(reason) => {
            Some(format!("nothing is exported into archive {name}, since it can't be read: {reason}"))
        }
    };
    export.archives.iter().filter_map(failure).collect()
}

fn why(which: Which, archive: &ArchiveName) -> String {
    match which {
        Which::Newest => {
            format!("the newest good one of its instance, and archive {archive} has no copy of it")
        }
        Which::All => format!("it stays, and archive {archive} has no copy of it"),
    }
}

/// What an archive that can be read lacks. One that can't be read gets nothing: what it holds is unknown.
fn missing_in<'a>(
    place: usize,
    zone: &'a ZoneName,
    planned: &'a Planned,
    which: Which,
    archive: &'a ArchiveName,
) -> Vec<Missing<'a>> {
    let Some(Ok(catalogue)) = planned.listed.catalogues.get(archive) else {
        return Vec::new();
    };
    let copies = || catalogue.copies().iter().map(|copy| &copy.manifest);
    let stored: HashSet<SnapshotId> = copies().map(|copy| copy.snapshot.id).collect();
    wanted(&planned.plan, &planned.listed.inventory.snapshots, which)
        .into_iter()
        .filter(|(snapshot, _)| !stored.contains(&snapshot.id))
        .map(|(snapshot, instance_id)| {
            let of_instance = copies().filter(|copy| copy.instance.id == instance_id);
            let newest_copy = of_instance.map(|copy| copy.snapshot.created_at).max();
            Missing { place, zone, planned, snapshot, archive, newest_copy }
        })
        .collect()
}

/// The good snapshots that a policy speaks of: the newest of each instance, or all that stay.
pub(super) fn wanted<'a>(
    plan: &PolicyPlan,
    snapshots: &'a [Snapshot],
    which: Which,
) -> Vec<(&'a Snapshot, InstanceId)> {
    let mut seen = HashSet::new();
    plan.decisions
        .iter()
        .filter(|decision| decision.verdict != Verdict::Ignore)
        .filter_map(|decision| Some((decision.verdict, snapshots.get(decision.index as usize)?)))
        .filter(|(_, snapshot)| snapshot.state.is_good())
        .filter_map(|(verdict, snapshot)| Some((verdict, snapshot, snapshot.instance_id?)))
        // Within an instance the newest comes first.
        .filter(|(verdict, _, instance_id)| match which {
            Which::Newest => seen.insert(*instance_id),
            Which::All => *verdict == Verdict::Keep,
        })
        .map(|(_, snapshot, instance_id)| (snapshot, instance_id))
        .collect()
}

fn told(stored: &VerifiedCopy) -> String {
    let mut told = format!("{} bytes verified in archive {}", stored.bytes(), stored.archive());
    for warning in stored.warnings() {
        told.push_str("; ");
        told.push_str(warning);
    }
    told
}

/// What a template made from the image should be like one day. An export is worth more than this: if it can't
/// be told, the export goes on without it.
async fn template_of(client: &ZoneClient, instance: Option<&Instance>) -> Option<TemplateRecord> {
    let id = instance?.template_id?;
    match client.get_template(id).await {
        Ok(found) => found.map(|template| TemplateRecord {
            id,
            boot_mode: template.boot_mode,
            default_user: template.default_user,
            password_enabled: template.password_enabled,
            ssh_key_enabled: template.ssh_key_enabled,
        }),
        Err(error) => {
            warn!(
                "template {id} can't be read, so the manifest lacks its boot mode and users: {}",
                chain(&error)
            );
            None
        }
    }
}
