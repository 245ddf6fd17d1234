//! The audit log: what was intended, and what came of it.
//!
//! One JSON object a line. It is written and synced before the request as `intended`, and after it as `done`,
//! `failed` or `blocked`, so that whatever happens to this process, what it began stands there:
//!
//! ```json
//! {"at":"2026-11-01T02:30:07Z","outcome":"intended","action":"delete","policy":"nightly",
//!  "run_id":"0198…","zone":"ch-gva-2","snapshot":{"id":"9ee8…","name":"web-1_ROOT-1_20260901023000",
//!  "created_at":"2026-09-01T02:30:00Z","instance_id":"c0ff…","instance_name":"web-1"},
//!  "rule":"max_age","reasons":["older than 30d: …"]}
//! ```

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use crate::disk::{Access, Open, is_sync_failure};
use crate::policy::{ArchiveName, PolicyName};
use crate::snapshot::{InstanceId, OperationId, SnapshotId, TemplateId, ZoneName};
use crate::state::{StateDirectory, StateError};
use crate::text::safe_json;

/// What is done to a snapshot, or to a template made of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// It is exported, downloaded and proved.
    Export,
    /// It becomes a template.
    Promote,
    /// It is deleted.
    Delete,
    /// A template that a policy made of it is deleted.
    DeleteTemplate,
}

/// How far it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is about to be done.
    Intended,
    /// It was done.
    Done,
    /// It was not, or not wholly.
    Failed,
    /// The platform was busy with it; nothing was done.
    Blocked,
}

/// The snapshot that a line speaks about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Subject {
    /// Its id.
    pub id: SnapshotId,
    /// Its name.
    pub name: String,
    /// When it was taken.
    pub created_at: Timestamp,
    /// Whose disk.
    pub instance_id: Option<InstanceId>,
    /// Whose disk, by name.
    pub instance_name: Option<String>,
}

/// One line.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// When it was written.
    pub at: Timestamp,
    /// How far it came.
    pub outcome: Outcome,
    /// What is done.
    pub action: Action,
    /// For which policy; none for a command given by hand.
    pub policy: Option<PolicyName>,
    /// In which run.
    pub run_id: Uuid,
    /// Where.
    pub zone: ZoneName,
    /// To which snapshot.
    pub snapshot: Subject,
    /// Into which archive, for an export.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub archive: Option<ArchiveName>,
    /// Which template, as far as it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template_id: Option<TemplateId>,
    /// The key to blame.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<&'static str>,
    /// Why.
    pub reasons: Vec<String>,
    /// The API's operation, once there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operation_id: Option<OperationId>,
    /// What went wrong, or else is worth saying.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl StateDirectory {
    /// Adds a line and returns once it is safe from a crash.
    ///
    /// # Errors
    /// [`StateError`]: then what was intended must not be done.
    pub fn audit(&self, line: &Line) -> Result<(), StateError> {
        let path = self.path.join(FILE);
        let failed = |source| StateError::File { verb: "append to", path: path.clone(), source };
        let json = serde_json::to_string(line).map_err(|error| failed(error.into()))?;
        let text = safe_json(&json).into_owned() + "\n";
        if self.log.is_unsafe.load(Ordering::Relaxed) {
            return Err(StateError::Unsafe { path });
        }
        if self.log.is_torn.load(Ordering::Relaxed) {
            mend(self)?;
            self.log.is_torn.store(false, Ordering::Relaxed);
        }
        self.disk.append(&path, text.as_bytes(), Access::Owner).map_err(|source| {
            self.log.is_torn.store(true, Ordering::Relaxed);
            self.log.is_unsafe.fetch_or(is_sync_failure(&source), Ordering::Relaxed);
            failed(source)
        })
    }
}

/// What this process knows about the audit log from its own failures.
#[derive(Debug, Default)]
pub(super) struct LogHealth {
    /// The last line may not be whole, as on a disk that was full.
    is_torn: AtomicBool,
    /// A line could not be made safe. Later ones would seem to be and might not, so there are none.
    is_unsafe: AtomicBool,
}

const FILE: &str = "audit.jsonl";

/// Ends a line that a crash or a full disk left unfinished, so that the next one stands alone, and makes the
/// file's name safe, should its maker have been stopped before.
pub(super) fn mend(state: &StateDirectory) -> Result<(), StateError> {
    let path = state.path.join(FILE);
    let failed = |verb| {
        let path = path.clone();
        move |source| StateError::File { verb, path, source }
    };
    let file = match state.disk.open(&path, Open::Read, Access::Owner) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("open")(error)),
    };
    state.disk.sync_dir(&state.path).map_err(failed("make safe"))?;
    let len = file.len().map_err(failed("read"))?;
    let mut last = [b'\n'];
    if len > 0 {
        file.read_at(&mut last, len - 1).map_err(failed("read"))?;
    }
    if last != *b"\n" {
        state.disk.append(&path, b"\n", Access::Owner).map_err(failed("append to"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::disk::{self, Disk as _, RealDisk};

    #[test]
    fn a_line_left_unfinished_by_a_crash_is_ended_before_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        RealDisk.append(&path, b"{\"at\":", Access::Owner).unwrap();
        let state = StateDirectory::open(Arc::new(RealDisk), folder.path()).unwrap();
        let subject = Subject {
            id: SnapshotId(Uuid::nil()),
            name: "a\n\u{1b}[31m\"b".to_owned(),
            created_at: Timestamp::UNIX_EPOCH,
            instance_id: None,
            instance_name: None,
        };
        let line = Line {
            at: Timestamp::UNIX_EPOCH,
            outcome: Outcome::Intended,
            action: Action::Delete,
            policy: None,
            run_id: Uuid::nil(),
            zone: "ch-gva-2".parse().unwrap(),
            snapshot: subject.clone(),
            archive: None,
            template_id: None,
            rule: Some("max_age"),
            reasons: Vec::new(),
            operation_id: None,
            message: None,
        };
        state.audit(&line).unwrap();
        let text = String::from_utf8(disk::read_file(&RealDisk, &path, 10_000).unwrap()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        let read: serde_json::Value = serde_json::from_str(lines[1]).unwrap();
        assert_eq!(read["snapshot"]["name"], subject.name);
        assert_eq!(read["outcome"], "intended");
        assert!(!text.contains('\u{1b}'));
    }
}
