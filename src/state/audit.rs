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

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::disk::{Access, Open, is_sync_failure};
use crate::policy::{ArchiveName, PolicyName};
use crate::snapshot::{InstanceId, OperationId, SnapshotId, TemplateId, ZoneName};
use crate::state::{StateDirectory, StateError};
use crate::text::safe_json;

/// What is done to a snapshot, or to a template made of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// It is taken.
    Create,
    /// It is exported, downloaded and proved.
    Export,
    /// It becomes a template.
    Promote,
    /// It is deleted.
    Delete,
    /// A template that a policy made of it is deleted.
    DeleteTemplate,
    /// Its copy in an archive is removed, by the archive's retention.
    PruneCopy,
    /// A verified export of it becomes a template.
    Restore,
}

/// How far it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Its id; none of one that is not there yet.
    pub id: Option<SnapshotId>,
    /// Its name; empty of one that is not there yet.
    pub name: String,
    /// When it was taken; of one that is not there yet, when that was set out for.
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
    /// Into which archive, for an export; in which, for a copy.
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

/// What a look back needs of a line.
#[derive(Deserialize)]
struct PastLine {
    outcome: Outcome,
    action: Action,
    zone: ZoneName,
    snapshot: PastSubject,
}

#[derive(Deserialize)]
struct PastSubject {
    id: SnapshotId,
}

impl StateDirectory {
    /// How long the audit log is, in bytes; nothing if there is none yet.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub fn audit_len(&self) -> Result<u64, StateError> {
        let path = self.path.join(FILE);
        match self.disk.metadata(&path) {
            Ok(found) => Ok(found.len),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(source) => Err(StateError::File { verb: "look at", path, source }),
        }
    }

    /// Every snapshot of a zone that we deleted, or set out to delete, by the lines from this byte on; by all of
    /// them if the log is shorter by now, thus another one.
    ///
    /// A line that can't be read is passed over: its snapshot then counts as one that we did not delete.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub fn deleted_since(&self, zone: &ZoneName, from: u64) -> Result<BTreeSet<SnapshotId>, StateError> {
        let path = self.path.join(FILE);
        let mut deleted = BTreeSet::new();
        let file = match self.disk.open(&path, Open::Read, Access::Owner) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(deleted),
            Err(source) => return Err(StateError::File { verb: "open", path, source }),
        };
        let failed = |source| StateError::File { verb: "read", path: path.clone(), source };
        let mut offset = if file.len().map_err(failed)? < from { 0 } else { from };
        let mut note = |line: &[u8]| {
            let Ok(line) = serde_json::from_slice::<PastLine>(line) else { return };
            let is_deletion =
                line.action == Action::Delete && matches!(line.outcome, Outcome::Intended | Outcome::Done);
            if is_deletion && line.zone == *zone {
                deleted.insert(line.snapshot.id);
            }
        };
        let mut buffer = vec![0; 64 * 1024];
        let mut begun = Vec::new();
        loop {
            let count = file.read_at(&mut buffer, offset).map_err(failed)?;
            if count == 0 {
                note(&begun);
                return Ok(deleted);
            }
            offset += count as u64;
            let mut pieces = buffer[..count].split(|byte| *byte == b'\n').peekable();
            while let Some(piece) = pieces.next() {
                begun.extend_from_slice(piece);
                if pieces.peek().is_some() {
                    note(&begun);
                    begun.clear();
                }
            }
        }
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

    fn line(outcome: Outcome, action: Action, zone: &str, snapshot: u128) -> Line {
        let snapshot = Subject {
            id: Some(SnapshotId(Uuid::from_u128(snapshot))),
            name: "a\n\u{1b}[31m\"b".to_owned(),
            created_at: Timestamp::UNIX_EPOCH,
            instance_id: None,
            instance_name: None,
        };
        Line {
            at: Timestamp::UNIX_EPOCH,
            outcome,
            action,
            policy: None,
            run_id: Uuid::nil(),
            zone: zone.parse().unwrap(),
            snapshot,
            archive: None,
            template_id: None,
            rule: Some("max_age"),
            reasons: Vec::new(),
            operation_id: None,
            message: None,
        }
    }

    #[test]
    fn a_look_back_finds_our_deletions_in_the_zone_from_there_on() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDirectory::open(Arc::new(RealDisk), folder.path()).unwrap();
        let zone: ZoneName = "ch-gva-2".parse().unwrap();
        let since = |from| -> Vec<u128> {
            let found = state.deleted_since(&zone, from).unwrap();
            found.into_iter().map(|id| id.0.as_u128()).collect()
        };
        assert_eq!((state.audit_len().unwrap(), since(0), since(9)), (0, vec![], vec![]));
        state.audit(&line(Outcome::Intended, Action::Delete, "ch-gva-2", 1)).unwrap();
        let from = state.audit_len().unwrap();
        for (outcome, action, zone, snapshot) in [
            (Outcome::Intended, Action::Delete, "ch-gva-2", 2),
            (Outcome::Blocked, Action::Delete, "ch-gva-2", 3),
            (Outcome::Done, Action::Delete, "de-fra-1", 4),
            (Outcome::Done, Action::Export, "ch-gva-2", 5),
            (Outcome::Done, Action::DeleteTemplate, "ch-gva-2", 6),
        ] {
            state.audit(&line(outcome, action, zone, snapshot)).unwrap();
        }
        for unreadable in ["half a li\n", "\u{fffd}\n", "{}\n", "\n"] {
            RealDisk.append(&folder.path().join(FILE), unreadable.as_bytes(), Access::Owner).unwrap();
        }
        // More than is read at once, so that lines are cut anywhere.
        for snapshot in 100..500 {
            state.audit(&line(Outcome::Done, Action::Delete, "ch-gva-2", snapshot)).unwrap();
        }
        let expected: Vec<u128> = std::iter::once(2).chain(100..500).collect();
        assert_eq!(since(from), expected);
        assert_eq!(since(from + 1), expected[1..], "in the middle of a line");
        assert_eq!(since(state.audit_len().unwrap()), [0; 0]);
        let all: Vec<u128> = [1, 2].into_iter().chain(100..500).collect();
        assert_eq!(since(0), all);
        assert_eq!(since(state.audit_len().unwrap() + 1), all, "another log, thus all of it");
    }

    #[test]
    fn a_line_left_unfinished_by_a_crash_is_ended_before_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        RealDisk.append(&path, b"{\"at\":", Access::Owner).unwrap();
        let state = StateDirectory::open(Arc::new(RealDisk), folder.path()).unwrap();
        let line = line(Outcome::Intended, Action::Delete, "ch-gva-2", 1);
        state.audit(&line).unwrap();
        let text = String::from_utf8(disk::read_file(&RealDisk, &path, 10_000).unwrap()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        let read: serde_json::Value = serde_json::from_str(lines[1]).unwrap();
        assert_eq!(read["snapshot"]["name"], line.snapshot.name);
        assert_eq!(read["outcome"], "intended");
        assert!(!text.contains('\u{1b}'));
    }
}
