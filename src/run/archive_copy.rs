//! Copies verified images from one archive to another.
//!
//! An image is read once, hashed as it is written, and published only if its MD5 is the one of its manifest. What a stop or a
//! crash leaves is resumed as that of an export is. The other archive is used as exports use it: by its marker and its locks.

use std::collections::{BTreeMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _};

use crate::archive::backend::Archive;
use crate::archive::catalogue::{Catalogue, CopyFilter, StoredCopy};
use crate::archive::copy_reader::{CopyReader, ReadError};
use crate::archive::manifest::{ImageRecord, Manifest, Written, without_user_data};
use crate::archive::manifest_update::{ManifestUpdate, UpdateError};
use crate::archive::store::StoreError;
use crate::archive::transfer::hash::Hashers;
use crate::archive::transfer::sink::{Begin, SinkError};
use crate::clock::Clock;
use crate::copies::CopySet;
use crate::policy::Guard;
use crate::randomness::{Randomness, fresh_id};
use crate::run::archive_holds::{HoldMarker, unmarked_text};
use crate::run::archive_presence::{
    Looker, Presence, forget_to_store_again, is_still_there, mark, remember_write,
};
use crate::run::archive_retention::subject_of;
use crate::run::export::is_there;
use crate::run::report::Step;
use crate::run::step::{Done, Recorder, StepError};
use crate::snapshot::{InstanceId, SnapshotId};
use crate::state::audit::{Action, StepFacts};
use crate::state::directory::StateDirectory;
use crate::text::chain;

/// Another process that stores the same image needs minutes or hours.
const BUSY_POLL: Duration = Duration::from_secs(2);

/// Copies from one archive to another.
pub struct ArchiveCopier<'a> {
    /// Has the holds, and what is remembered of the archives.
    pub state: &'a StateDirectory,
    /// Gives the time, and waits.
    pub clock: &'a Arc<dyn Clock>,
    /// For pauses and ids.
    pub randomness: &'a dyn Randomness,
    /// They verify the bytes.
    pub hashers: &'a Hashers,
    /// The name of this machine.
    pub host: &'a str,
    /// The archive that is read.
    pub from: &'a Archive,
    /// The archive that gets the copies.
    pub to: &'a Archive,
    /// How the archives lose copies that were not deleted.
    pub guards: [&'a Guard; 2],
    /// Whether the other archive's retention may delete the last copy of an instance: then it is not stored again.
    pub may_empty: bool,
    /// Whether the archive that gets the copies may hold the user data of instances.
    pub user_data: bool,
}

/// Which copies are copied on.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Of these instances and zones.
    pub only: CopyFilter,
    /// Of this snapshot.
    pub snapshot: Option<SnapshotId>,
    /// Only the newest of each instance.
    pub newest: bool,
}

impl Selection {
    /// The copies that are meant, those of each instance newest first.
    fn of<'c>(&self, catalogue: &'c Catalogue) -> Vec<&'c StoredCopy> {
        let meant = |copy: &&StoredCopy| {
            let manifest = &copy.manifest;
            self.only.includes(manifest) && self.snapshot.is_none_or(|id| id == manifest.snapshot.id)
        };
        let mut seen: HashSet<InstanceId> = HashSet::new();
        // Newest first within an instance and a zone; the same instance is in one zone alone.
        let meant = catalogue.unpruned().filter(meant);
        meant.filter(|copy| seen.insert(copy.manifest.instance.id) || !self.newest).collect()
    }
}

/// What was done.
#[derive(Debug, Default)]
pub struct Copying {
    /// The copies that the other archive lacked.
    pub steps: Vec<Step>,
    /// How many it has.
    pub there: usize,
    /// Those that it had until its own retention removed them, and of whose instance it has a newer one: they are not stored again.
    pub pruned: Vec<Arc<Manifest>>,
}

impl ArchiveCopier<'_> {
    /// Copies what the other archive lacks; `report` is called for each as soon as it ended.
    ///
    /// # Errors
    /// Why nothing was begun, as a sentence.
    pub async fn copy(
        &self,
        selection: &Selection,
        concurrency: NonZeroUsize,
        report: &(dyn Fn(&Step) + Send + Sync),
    ) -> Result<Copying, String> {
        let looker = Looker::new(self.state).await?;
        let look = async |archive: &Archive, guard| {
            let found = looker.look(archive, guard).await;
            found.map_err(|why| format!("archive {}: {why}", archive.name()))
        };
        let source = look(self.from, self.guards[0]).await?;
        let target = look(self.to, self.guards[1]).await?;
        if let Presence::Closed(why) = &target.presence {
            return Err(format!("nothing is stored in archive {}: {why}", self.to.name()));
        }
        let known: BTreeMap<String, &StoredCopy> =
            target.catalogue.copies().iter().map(|copy| (copy.stem(), copy)).collect();
        // An image that is still there is for a person to bring back.
        let without_newer = target.catalogue.pruned_without_newer();
        let without_newer = without_newer.filter(|copy| !copy.has_image && !self.may_empty);
        let without_newer: CopySet = without_newer.map(|copy| copy.manifest.id()).collect();
        let mut copying = Copying::default();
        let mut lacking = Vec::new();
        for copy in selection.of(&source.catalogue) {
            match known.get(&copy.stem()) {
                None => lacking.push(copy),
                Some(there) if without_newer.contains(&there.manifest.id()) => lacking.push(copy),
                Some(there) if there.manifest.pruned_at.is_some() => {
                    copying.pruned.push(there.manifest.clone());
                }
                Some(_) => copying.there += 1,
            }
        }
        if lacking.is_empty() {
            return Ok(copying);
        }
        if target.presence.is_first_use() {
            let rested_on = target.memory.rested_on.clone();
            mark(self.state, &**self.clock, self.randomness, self.to, None, rested_on).await?;
        }
        // A corrupt copy that the archive could not be written to mark would pass there for a good one, and not be replaced.
        for (corrupt, since) in target.catalogue.unmarked() {
            if lacking.iter().any(|copy| copy.stem() == corrupt.stem()) {
                match self.to.update_manifest(corrupt, ManifestUpdate::Corrupt(*since)).await {
                    // One that has changed was stored or marked by another process.
                    Ok(()) | Err(UpdateError::Changed { .. }) => {}
                    Err(error) => {
                        let (to, why) = (self.to.name(), chain(&error));
                        return Err(format!(
                            "the corrupt copies in archive {to} cannot be marked as such, so they cannot be replaced: {why}"
                        ));
                    }
                }
            }
        }
        // Read again, with the marker that it has now.
        let target = self.to.catalogue().await.map_err(|error| chain(&error))?;
        let run_id = fresh_id(self.randomness, self.clock.now());
        let recorder = &Recorder::manual(self.state.clone(), Arc::clone(self.clock), run_id);
        let mut steps: Vec<BoxFuture<'_, Step>> = Vec::new();
        for copy in lacking {
            let reasons = vec![format!("a manual copy from archive {}", self.from.name())];
            let manifest = &copy.manifest;
            let intent = StepFacts {
                archive: Some(self.to.name().clone()),
                ..StepFacts::new(Action::Copy, &manifest.zone, subject_of(manifest), reasons)
            };
            let target = &target;
            let step = async move {
                let step = recorder.step(intent, self.copy_one(copy, target).boxed()).await;
                report(&step);
                step
            };
            steps.push(step.boxed());
        }
        copying.steps = stream::iter(steps).buffered(concurrency.get()).collect().await;
        Ok(copying)
    }

    async fn copy_one(&self, copy: &StoredCopy, target: &Catalogue) -> Result<Done, StepError> {
        let (from, to, id) = (self.from.name(), self.to.name(), copy.manifest.id());
        // Its disk may have been unmounted since: then it would be stored on the disk below.
        is_still_there(self.to, target).await.map_err(StepError::failed)?;
        let forgotten = forget_to_store_again(self.state, &**self.clock, target, id.snapshot_id).await;
        forgotten.map_err(StepError::failed)?;
        if let Err(error) = self.to.forget_pruned_without_newer(target, id.snapshot_id).await {
            let why = format!("the manifest of the pruned copy in {to} cannot be removed: {}", chain(&error));
            let failure = match &error {
                UpdateError::Archive(error) => error.failed_write(),
                _ => None,
            };
            return Err(self.failed(failure, why).await);
        }
        let output = loop {
            match self.to.begin_copy(&id).await {
                Ok(Begin::Missing(output)) => break output,
                Ok(Begin::Stored(stored)) => {
                    is_there(&stored).map_err(StepError::failed)?;
                    let message = Some("another process stored it in the meantime".to_owned());
                    return Ok(Done { message, ..Done::default() });
                }
                Err(StoreError::Busy { .. }) => self.clock.sleep(BUSY_POLL).await,
                Err(error) => return Err(self.failed(error.failed_write(), chain(&error)).await),
            }
        };
        let before = self.from.manifest_bytes(copy).await;
        let before = before.map_err(|error| StepError::failed(chain(&error)))?;
        let source = self.from.image(copy);
        let (clock, randomness, hashers) = (&**self.clock, self.randomness, self.hashers);
        let read = CopyReader::new(clock, randomness, hashers).read(from, &*source, output).await;
        let sink = match read {
            Ok((sink, None)) => sink,
            Ok((sink, Some(invalid))) => {
                sink.abandon().await;
                return Err(StepError::failed(format!(
                    "its MD5 is right, but it is not a valid image: {}; `snapwarden archive verify {from}` marks it",
                    chain(&invalid)
                )));
            }
            Err(ReadError::Sink(error)) => {
                let failure = Some(&error).filter(|error| !error.is_full());
                return Err(self.failed(failure, chain(&error)).await);
            }
            Err(error) => {
                let look = format!(
                    "`snapwarden archive verify {from}` reads it again, and marks it if it is damaged"
                );
                return Err(StepError::failed(format!("{}; {look}", chain(&error))));
            }
        };
        let Manifest { image, .. } = (*copy.manifest).clone();
        let manifest = Manifest {
            verified_at: self.clock.now(),
            // Of the other store, if it has any.
            image: ImageRecord { etag: None, version_id: None, ..image },
            written: before.map(|bytes| Written::over(self.allowed(bytes))),
            ..(*copy.manifest).clone()
        };
        let bytes = manifest.image.bytes;
        if let Err(error) = sink.publish(manifest).await {
            return Err(self.failed(Some(&error).filter(|error| !error.is_full()), chain(&error)).await);
        }
        let mut message = format!("{bytes} bytes verified in archive {to}");
        let noted = remember_write(self.state, clock, to, None).await.err();
        for why in noted.into_iter().chain(self.mark_holds(copy).await) {
            message = format!("{message}; {why}");
        }
        Ok(Done { message: Some(message), ..Done::default() })
    }

    /// What the manifest in the other archive may hold.
    fn allowed(&self, manifest: Vec<u8>) -> Vec<u8> {
        if self.user_data { manifest } else { without_user_data(manifest) }
    }

    /// Marks this state's hold on the snapshot beside the new copy. Returns why not.
    async fn mark_holds(&self, copy: &StoredCopy) -> Option<String> {
        let id = copy.manifest.snapshot.id;
        let holds = match self.state.holds().await {
            Ok(holds) => holds,
            Err(error) => return Some(format!("the holds cannot be read: {}", chain(&error))),
        };
        let hold = holds.on(id, self.clock.now())?;
        let marker = HoldMarker::new(self.state, &**self.clock, self.randomness, self.host).await;
        let result = match marker {
            Ok(marker) => marker.mark_copy(self.to, hold, &copy.manifest.id()).await,
            Err(why) => return Some(why),
        };
        result.err().map(|error| unmarked_text(self.to.name(), id, &error))
    }

    /// Remembers a write that failed, since a disk that fails may have lost older copies, too.
    async fn failed(&self, failure: Option<&SinkError>, message: String) -> StepError {
        let Some(failure) = failure.map(|error| chain(error)) else { return StepError::failed(message) };
        match remember_write(self.state, &**self.clock, self.to.name(), Some(failure)).await {
            Ok(()) => StepError::failed(message),
            Err(why) => StepError::failed(format!("{message}; {why}")),
        }
    }
}
