//! Keeps the end of the audit log's chain in the archives, so that a log that was cut at its end, or made anew, is found.
//!
//! It is a small file at the root of each archive that this state uses, `snapwarden-audit-<id of the state>.json`, replaced after
//! each run that wrote to the log. It takes one request for a bucket.

use std::time::Duration;

use futures_util::future::join_all;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use uuid::Uuid;

use crate::archive::backend::Archive;
use crate::clock::timeout;
use crate::policy::name::ArchiveName;
use crate::run::context::Runner;
use crate::state::audit_chain::AuditHead;
use crate::text::{chain, excerpt};

/// An archive that does not answer does not keep the run from its end for ever; restic takes its time, and one that is stopped in
/// between may leave its repository locked. What is not written is written by the next run that writes to the log.
const WAIT_MAX: Duration = Duration::from_mins(5);

/// More than the file has.
const BYTES_MAX: usize = 64 << 10;

const VERSION: u64 = 1;

/// What the file holds.
#[derive(Debug, Serialize, Deserialize)]
struct KeptHead {
    version: u64,
    /// The state directory's id, as the archive's marker has it.
    state: Uuid,
    #[serde(flatten)]
    head: AuditHead,
}

fn file_name(state: Uuid) -> String {
    format!("snapwarden-audit-{state}.json")
}

impl Runner {
    /// Writes the end of the audit log to the archives that this state uses, if it is another one than `before`. An archive
    /// that can't be written is no failure of the run.
    pub(crate) async fn keep_audit_head(&self, before: Option<&AuditHead>, stop: &CancellationToken) {
        let head = match self.state.audit_head().await {
            Ok(head) => head.filter(|head| Some(head) != before),
            Err(error) => {
                warn!("the end of the audit log is not kept in the archives: {}", chain(&error));
                None
            }
        };
        let (Some(head), false) = (head, self.archives.is_empty() || stop.is_cancelled()) else { return };
        let Ok(known) = self.state.archives().await else { return };
        let Some(state) = known.state_id else { return };
        let kept = KeptHead { version: VERSION, state, head };
        let Ok(bytes) = serde_json::to_vec(&kept) else { return };
        let used =
            self.archives.iter().filter_map(|(name, archive)| Some((name, archive, known.of(name).id?)));
        let writes = used.map(|(name, archive, id)| {
            let (bytes, file) = (bytes.clone(), file_name(state));
            async move {
                let written =
                    timeout(&*self.clock, WAIT_MAX, archive.write_beside_marker(id, &file, bytes)).await;
                let why = match written {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => chain(&error),
                    Err(late) => late.to_string(),
                };
                warn!("the end of the audit log is not kept in archive {name}: {why}");
            }
        });
        join_all(writes).await;
    }
}

/// The end of the log as an archive has it, of this state; none if it has none.
///
/// # Errors
/// Why it can't be read, as a sentence.
pub async fn kept_head(archive: &Archive, state: Uuid) -> Result<Option<AuditHead>, String> {
    let file = file_name(state);
    let Some(bytes) = archive.read_beside_marker(&file, BYTES_MAX).await.map_err(|error| chain(&error))?
    else {
        return Ok(None);
    };
    match serde_json::from_slice::<KeptHead>(&bytes) {
        Ok(kept) if kept.version > VERSION => {
            Err(format!("{file} is of version {}: a later snapwarden wrote it, use that one", kept.version))
        }
        Ok(kept) => Ok(Some(kept.head)),
        Err(error) => Err(format!("{file} is damaged: {}", excerpt(&error.to_string(), 200))),
    }
}

/// The end of the log as an archive has it.
#[derive(Debug, Serialize)]
pub struct HeadInArchive {
    /// The archive.
    pub archive: ArchiveName,
    /// When the line was written that it has; none if it has none.
    pub at: Option<Timestamp>,
    /// Whether the log has that line; none if that is not known.
    pub is_in_log: Option<bool>,
    /// Why the archive can't be read.
    pub error: Option<String>,
}
