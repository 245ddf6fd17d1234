//! Exports one snapshot into one archive, for a manual command.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::archive::backend::Archive;
use crate::archive::store::{self, ImageToStore, StoreError};
use crate::archive::transfer::connection::Download;
use crate::archive::transfer::sink::{Begin, Output};
use crate::exoscale::client::ZoneClient;
use crate::run::archive_holds::{HoldMarker, unmarked_text};
use crate::run::archive_presence::remember_write;
use crate::run::build_facts;
use crate::run::context::Runner;
use crate::run::downloads::{HowFar, RunningDownload};
use crate::run::report::STOPPED;
use crate::run::source::ExportedImage;
use crate::run::step::{Done, StepError};
use crate::snapshot::{Instance, Snapshot};
use crate::state::holds::Hold;
use crate::text::chain;

/// Another process that stores the same image needs minutes or hours.
const BUSY_POLL: Duration = Duration::from_secs(2);

/// A connection without data for this long is replaced, as a policy's default is.
const STALL_TIMEOUT: Duration = Duration::from_mins(1);

/// The export of one snapshot.
pub(crate) struct SingleExport<'a> {
    pub(crate) runner: &'a Runner,
    pub(crate) client: &'a ZoneClient,
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) instance: &'a Instance,
    pub(crate) archive: &'a Arc<Archive>,
    pub(crate) run_id: Uuid,
    /// The hold on the snapshot, which is marked beside the copy.
    pub(crate) hold: &'a Hold,
    /// Once cancelled, it ends; a download can be resumed.
    pub(crate) stop: &'a CancellationToken,
}

impl SingleExport<'_> {
    /// Exports, downloads and verifies it.
    pub(crate) async fn run(self) -> Result<Done, StepError> {
        tokio::select! {
            biased;
            done = self.store() => done,
            () = self.stop.cancelled() => Err(StepError::skipped(STOPPED)),
        }
    }

    async fn store(&self) -> Result<Done, StepError> {
        let Self { runner, client, snapshot, instance, archive, run_id, hold, .. } = self;
        let name = archive.name();
        runner.make_ready(name).await.map_err(|why| StepError::failed(format!("archive {name}: {why}")))?;
        let found = build_facts::find(client, Some(instance.id), Some(instance)).await;
        let user_data_in: BTreeSet<_> = runner.user_data_in();
        let image = ImageToStore {
            zone: client.zone().clone(),
            snapshot: (*snapshot).clone(),
            instance: Some((*instance).clone()),
            policy: None,
            run_id: *run_id,
            template: found.template,
            machine: found.machine,
            user_data_in,
            missing: found.missing,
        };
        let mut message = match self.begin(&image).await? {
            None => format!("a verified copy is in archive {name} already"),
            Some(output) => self.download(&image, output).await?,
        };
        let id = image.id().map_err(|error| StepError::failed(chain(&error)))?;
        let marker = HoldMarker::new(&runner.state, &*runner.clock, &*runner.randomness, &runner.host).await;
        let unmarked = match marker {
            Ok(marker) => {
                let result = marker.mark_copy(archive, hold, &id).await;
                result.err().map(|error| unmarked_text(name, snapshot.id, &error))
            }
            Err(why) => Some(why),
        };
        if let Some(why) = unmarked {
            message = format!("{message}; {why}");
        }
        Ok(Done { message: Some(message), ..Done::default() })
    }

    async fn begin(&self, image: &ImageToStore) -> Result<Option<Output>, StepError> {
        loop {
            match self.archive.begin(image).await {
                Ok(Begin::Missing(output)) => return Ok(Some(output)),
                Ok(Begin::Stored(_)) => return Ok(None),
                Err(StoreError::Busy { .. }) => self.runner.clock.sleep(BUSY_POLL).await,
                Err(error) => return Err(self.failed(&error).await),
            }
        }
    }

    async fn download(&self, image: &ImageToStore, output: Output) -> Result<String, StepError> {
        let Self { runner, client, snapshot, instance, archive, .. } = self;
        let exported = ExportedImage::export(runner, (*client).clone(), snapshot.id).await;
        let (source, operation_id) = match exported {
            Ok(exported) => exported,
            Err(error) => {
                output.sink.abandon().await;
                return Err(error);
            }
        };
        let running = runner.downloads.begin(
            RunningDownload {
                doing: "exporting",
                policy: None,
                zone: client.zone().clone(),
                snapshot_id: snapshot.id,
                snapshot_name: snapshot.name.to_string(),
                instance_name: Some(instance.name.to_string()),
                archives: vec![archive.name().clone()],
                started_at: runner.clock.now(),
                how_far: HowFar::default(),
            },
            Arc::clone(&runner.clock),
        );
        let download = Download {
            source: &source,
            clock: &*runner.clock,
            randomness: &*runner.randomness,
            stall_timeout: STALL_TIMEOUT,
            connections: 1,
            hashers: &runner.hashers,
            throttle: None,
            progress: &|progress| running.note_all(progress),
        };
        let stored = store::store(image, vec![output], &download).await.pop();
        match stored {
            Some((_, Ok(copy))) => {
                let remembered = remember_write(&runner.state, &*runner.clock, archive.name(), None).await;
                let mut message = format!("{} bytes verified in archive {}", copy.bytes(), copy.archive());
                for more in copy.warnings().iter().cloned().chain(remembered.err()) {
                    message = format!("{message}; {more}");
                }
                Ok(message)
            }
            Some((_, Err(error))) => Err(StepError { operation_id, ..self.failed(&error).await }),
            None => Err(StepError::failed("the download ended without a result")),
        }
    }

    /// Remembers why the archive could not be written, since a disk that fails may have lost older copies, too.
    async fn failed(&self, error: &StoreError) -> StepError {
        let message = chain(error);
        let Some(failure) = error.failed_write().map(|error| chain(error)) else {
            return StepError::failed(message);
        };
        let Runner { state, clock, .. } = self.runner;
        match remember_write(state, &**clock, self.archive.name(), Some(failure)).await {
            Ok(()) => StepError::failed(message),
            Err(why) => StepError::failed(format!("{message}; {why}")),
        }
    }
}
