//! Exports what the policy wants in its archives and is not there yet.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _};
use jiff::Timestamp;
use tracing::{info, warn};

use crate::archive::download::Progress;
use crate::archive::local::{ImageToStore, LocalArchive, StoreError, StoreOptions};
use crate::archive::manifest::TemplateRecord;
use crate::archive::proof::VerifiedCopy;
use crate::exoscale::client::ZoneClient;
use crate::policy::{ArchiveName, Export, Policy, Which};
use crate::retention::plan::PolicyPlan;
use crate::retention::verdict::Verdict;
use crate::run::inventory::Catalogues;
use crate::run::report::{Step, Transfer};
use crate::run::source::ExportedImage;
use crate::run::step::{Done, Intent, NotDone, Recorder, subject};
use crate::run::{Ahead, Planned, Runner};
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, ZoneName};
use crate::state::audit::Action;
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
    fn note(&self, progress: Progress) {
        let (transfer, position) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match progress {
            Progress::Downloading { bytes, .. } => {
                // Further back than before is a new beginning that was not told of.
                transfer.bytes += bytes.checked_sub(*position).unwrap_or(bytes);
                *position = bytes;
            }
            Progress::Resumed { .. } => transfer.resumes += 1,
            Progress::StartedOver => *position = 0,
            Progress::ChecksumMismatch => {
                transfer.checksum_mismatches += 1;
                *position = 0;
            }
            Progress::Verifying => {}
        }
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

/// Stores in each archive of the policy what it lacks: the instance whose newest verified copy is oldest
/// comes first. Steps come back with the place of their zone.
pub async fn export(
    runner: &Runner,
    recorder: &Recorder,
    policy: &Policy,
    export: &Export,
    zones: &[(usize, &ZoneName, &Planned)],
) -> Vec<(usize, Step)> {
    let mut missing = Vec::new();
    for (place, zone, planned) in zones {
        for archive in &export.archives {
            missing.extend(missing_in(*place, zone, planned, export.snapshots, archive));
        }
    }
    missing.sort_by_key(|missing| (missing.newest_copy, missing.snapshot.created_at));
    let mut exports: Vec<BoxFuture<'_, _>> = Vec::new();
    for missing in missing {
        exports.push(
            async move {
                let intent = Intent {
                    action: Action::Export,
                    zone: missing.zone.clone(),
                    snapshot: subject(missing.snapshot, missing.planned.listed.instance_of(missing.snapshot)),
                    archive: Some(missing.archive.clone()),
                    template_id: None,
                    rule: None,
                    reasons: vec![why(export.snapshots, missing.archive)],
                };
                let place = missing.place;
                let coming = Coming::default();
                let mut step =
                    recorder.step(intent, store(runner, recorder, policy, export, missing, &coming)).await;
                step.transfer = coming.transfer();
                (place, step)
            }
            .boxed(),
        );
    }
    stream::iter(exports).buffer_unordered(export.concurrency.get()).collect().await
}

/// What would be exported in a zone, and why; nothing is changed.
pub fn ahead(export: &Export, zone: &ZoneName, planned: &Planned) -> Vec<Ahead> {
    let missing =
        export.archives.iter().flat_map(|archive| missing_in(0, zone, planned, export.snapshots, archive));
    let tell = |missing: Missing<'_>| Ahead {
        action: Action::Export,
        snapshot: subject(missing.snapshot, planned.listed.instance_of(missing.snapshot)),
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

async fn store(
    runner: &Runner,
    recorder: &Recorder,
    policy: &Policy,
    export: &Export,
    missing: Missing<'_>,
    coming: &Coming,
) -> Result<Done, NotDone> {
    let archive: &LocalArchive = runner
        .archives
        .get(missing.archive)
        .ok_or_else(|| NotDone::failed(format!("archive {} is not configured", missing.archive)))?;
    // It may take hours: whoever looks should see that it began.
    let (name, id) = (printable(&missing.snapshot.name), missing.snapshot.id);
    info!(zone.name = %missing.zone, snapshot.id = %id, "exporting snapshot {name} into archive {}", missing.archive);
    let client = runner.client.zone(missing.zone);
    let (source, operation_id) = ExportedImage::export(runner, client.clone(), missing.snapshot.id).await?;
    let instance = missing.planned.listed.instance_of(missing.snapshot);
    let image = ImageToStore {
        zone: missing.zone.clone(),
        snapshot: missing.snapshot.clone(),
        instance: instance.cloned(),
        template: template_of(&client, instance).await,
        policy: policy.name.clone(),
        run_id: recorder.run_id(),
    };
    let options = StoreOptions { stall_timeout: export.stall_timeout };
    let begun = runner.clock.elapsed();
    let stored = loop {
        let stored = archive.store(&image, &source, &options, &|progress| coming.note(progress)).await;
        // Another policy, or `once` beside the daemon, is at it: what it leaves is found, or made after all.
        let wait =
            matches!(stored, Err(StoreError::Busy { .. })) && recorder.refusal(Action::Export).is_none();
        if !wait {
            break stored;
        }
        runner.clock.sleep(BUSY_POLL).await;
    };
    coming.ended(runner.clock.elapsed().saturating_sub(begun));
    match stored {
        Ok(stored) => Ok(Done { operation_id, message: Some(told(&stored)), ..Done::default() }),
        Err(error) => Err(NotDone { operation_id, ..NotDone::failed(chain(&error)) }),
    }
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
