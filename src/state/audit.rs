//! The audit log: what was intended, and what came of it.
//!
//! One JSON object a line. It is written and synced before the request as `intended`, and after it as `done`,
//! `failed` or `blocked`, so that whatever happens to this process, what it began stands there:
//!
//! ```json
//! {"at":"2026-11-01T02:30:07Z","outcome":"intended","policy":"nightly","run_id":"0198…",
//!  "zone":"ch-gva-2","action":"delete","snapshot":{"id":"9ee8…","name":"web-1_ROOT-1_20260901023000",
//!  "created_at":"2026-09-01T02:30:00Z","instance_id":"c0ff…","instance_name":"web-1"},
//!  "rule":"max_age","reasons":["older than 30d: …"]}
//! ```
//!
//! The newest lines are in `audit.jsonl`. The first line of another month (UTC) renames that file to
//! `audit-<month of its first line>.jsonl`, so that no file grows for ever and old ones can be removed.
//!
//! Each line ends with `"prev"`, the hash of the line before it, also across files: [`super::audit_chain`] says what that
//! finds. So lines are written one at a time, under `audit.lock`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::disk::{Access, Disk, DiskFile, Open, is_sync_failure};
use crate::policy::name::{ArchiveName, PolicyName};
use crate::policy::span::Span;
use crate::snapshot::{Instance, InstanceId, OperationId, Snapshot, SnapshotId, TemplateId, ZoneName};
use crate::state::audit_chain::{self, AuditHead, ChainReport, Chained, LINE_BEGINS, RemovedFile, Tail};
use crate::state::error::StateError;
use crate::text::safe_json;

/// What is done to a snapshot, or to a template made of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// A snapshot is taken.
    Create,
    /// It is exported, downloaded and verified.
    Export,
    /// It becomes a template.
    Promote,
    /// It is deleted.
    Delete,
    /// A template that a policy made of it is deleted.
    DeleteTemplate,
    /// Its copy in an archive is removed, by the archive's retention.
    PruneCopy,
    /// A verified copy of it is copied to another archive.
    Copy,
    /// A verified copy of it becomes a template.
    Restore,
    /// Its instance is stopped, to be reverted to it.
    StopInstance,
    /// Its instance is reverted to it.
    Revert,
    /// An instance is reset with a template that was made of a verified copy of it.
    Reset,
    /// Its instance is started again.
    StartInstance,
    /// It is not listed any more, though no run of this program deleted it. Nothing is done: the line says how it [ended](Ending).
    Vanish,
}

impl Action {
    /// The action for people, as in the column of a table.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Export => "export",
            Self::Promote => "promote",
            Self::Delete => "delete",
            Self::DeleteTemplate => "delete template",
            Self::PruneCopy => "prune copy",
            Self::Copy => "copy",
            Self::Restore => "restore",
            Self::StopInstance => "stop instance",
            Self::Revert => "revert",
            Self::Reset => "reset",
            Self::StartInstance => "start instance",
            Self::Vanish => "vanish",
        }
    }

    /// For a sentence that continues with the snapshot: `deleted snapshot …`, `not deleted: snapshot …`.
    pub(crate) fn past(self) -> &'static str {
        match self {
            Self::Create => "created",
            Self::Export => "exported",
            Self::Promote => "promoted",
            Self::Delete => "deleted",
            Self::DeleteTemplate => "deleted the template of",
            Self::PruneCopy => "pruned the copy of",
            Self::Copy => "copied",
            Self::Restore => "restored",
            Self::StopInstance => "stopped for the revert to",
            Self::Revert => "reverted to",
            Self::Reset => "reset to",
            Self::StartInstance => "started after the change to",
            Self::Vanish => "found the end of",
        }
    }
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepOutcome {
    /// It was done.
    Done,
    /// It was not, or not wholly.
    Failed,
    /// The platform was busy with it, or an archive did not confirm a copy that it needs; the next run tries again.
    Blocked,
    /// It was not begun.
    Skipped,
}

impl StepOutcome {
    /// The word in the audit log, where a step that was not begun after all counts as blocked.
    pub(crate) fn in_log(self) -> &'static str {
        match self {
            Self::Done => DONE,
            Self::Failed => FAILED,
            Self::Blocked | Self::Skipped => "blocked",
        }
    }
}

/// How a snapshot ended that is not listed any more, as far as no run of this program is known to have deleted it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// By this program: a run had tried to, and whether it was deleted was not certain.
    DeletedByUs,
    /// By another key, or a user.
    DeletedByOther,
    /// Its instance was deleted, which deletes its snapshots.
    DeletedWithInstance,
    /// Nothing says why.
    Unexplained,
}

impl Ending {
    /// The outcome in the audit log.
    pub fn in_log(self) -> &'static str {
        match self {
            Self::DeletedByUs => "deleted_by_us",
            Self::DeletedByOther => "deleted_by_other",
            Self::DeletedWithInstance => "deleted_with_instance",
            Self::Unexplained => "unexplained",
        }
    }
}

/// Who deleted a snapshot, by the API's list of events. All of it is hostile text.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeletedBy {
    /// The name of the API key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_name: Option<String>,
    /// The API key's id, which is no secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The address of the user's mail.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The network address that the request came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// When.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<Timestamp>,
    /// The API's id of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

/// What the log says of the end of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deletion {
    /// To delete it was tried, and failed as far as is known.
    Tried,
    /// To delete it was begun, and nothing says how that ended.
    Begun,
    /// It was deleted.
    Done,
    /// How it ended is in the log already, as an [`Ending`].
    Ended,
    /// The same, but nothing explained it.
    Unexplained,
}

/// What the log says since a mark of the snapshots of a zone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TakenAndDeleted {
    /// Those that were taken, with the times of their lines.
    pub taken: BTreeMap<SnapshotId, (Subject, Timestamp)>,
    /// Those that ended, or should have, with the times of the last such lines.
    pub ended: BTreeMap<SnapshotId, (Deletion, Timestamp)>,
    /// Those that this program deleted, whatever was said of them later.
    pub deleted: BTreeSet<SnapshotId>,
}

/// The outcome of a line that is written before the step.
pub const INTENDED: &str = "intended";

const DONE: &str = "done";

const FAILED: &str = "failed";

/// The snapshot that a step is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Subject {
    /// None if the snapshot is yet to be taken.
    pub id: Option<SnapshotId>,
    /// Empty if the snapshot is yet to be taken.
    pub name: String,
    /// When the snapshot was taken, or is to be taken.
    pub created_at: Timestamp,
    /// The instance whose disk it holds.
    pub instance_id: Option<InstanceId>,
    /// The name of that instance, if it is known.
    pub instance_name: Option<String>,
}

impl Subject {
    /// A listed snapshot, with its instance if that is listed.
    pub fn of(snapshot: &Snapshot, instance: Option<&Instance>) -> Self {
        Self {
            id: Some(snapshot.id),
            name: snapshot.name.to_string(),
            created_at: snapshot.created_at,
            instance_id: snapshot.instance_id,
            instance_name: instance.map(|instance| instance.name.to_string()),
        }
    }
}

/// What a step does, to which snapshot, and why. The audit log, the report and the metrics all have it from here.
#[derive(Debug, Clone, Serialize)]
pub struct StepFacts {
    /// What is done.
    pub action: Action,
    /// The snapshot's zone. A line of the log has it beside the run, and a report has its steps by zone.
    #[serde(skip)]
    pub zone: ZoneName,
    /// The snapshot that it is done to.
    pub snapshot: Subject,
    /// The archive that gets a copy, gives one, or has one pruned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub archive: Option<ArchiveName>,
    /// The template, as far as it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template_id: Option<TemplateId>,
    /// The configuration key that decided it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<&'static str>,
    /// Sentences for people.
    pub reasons: Vec<String>,
}

impl StepFacts {
    /// Without archive, template and rule.
    pub fn new(action: Action, zone: &ZoneName, snapshot: Subject, reasons: Vec<String>) -> Self {
        Self { action, zone: zone.clone(), snapshot, archive: None, template_id: None, rule: None, reasons }
    }
}

/// One line.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// When it was written.
    pub at: Timestamp,
    /// `intended` before the step, and how it ended after it.
    pub outcome: &'static str,
    /// None for a manual command.
    pub policy: Option<PolicyName>,
    /// The run that the step belongs to.
    pub run_id: Uuid,
    /// As in `step`.
    pub zone: ZoneName,
    /// What the step does.
    #[serde(flatten)]
    pub step: StepFacts,
    /// The API's operation, once there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operation_id: Option<OperationId>,
    /// An error, or what else is worth knowing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Who deleted a snapshot that this program did not delete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<DeletedBy>,
}

const FILE: &str = "audit.jsonl";

/// The name of an earlier file begins so, and then comes its month.
const EARLIER: &str = "audit-";

/// As `2026-11`.
const MONTH_BYTES: usize = 7;

/// The months of a file are looked for in this number of its first and last bytes: a crash may have left pieces of lines there.
const END_BYTES: usize = 64 << 10;

/// A place in the log, from which it is read on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditMark {
    /// The month of the file's first line, as `2026-11`; none if there was no file, or it was not recorded.
    pub month: Option<String>,
    /// In bytes.
    pub offset: u64,
}

/// A file of the log.
struct Part {
    path: PathBuf,
    /// The month of its first line, where one is readable.
    month: Option<String>,
    file: Box<dyn DiskFile>,
}

/// The log's file, with what this process knows about it from its own failures. Its calls block.
#[derive(Debug)]
pub(super) struct AuditLog {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    path: PathBuf,
    /// A line could not be made safe. Later ones would seem to be and might not, so there are none.
    is_unsafe: AtomicBool,
    /// One line at a time: the disk reports a failed sync only once, and a line beside it would seem to be safe.
    writing: Mutex<()>,
    /// Whose turn it is in this process to wait for the lock of the log.
    pub(super) turn: Arc<tokio::sync::Mutex<()>>,
}

impl AuditLog {
    /// The log in the state directory `folder`.
    pub(super) fn new(disk: Arc<dyn Disk>, folder: &Path) -> Self {
        Self {
            disk,
            folder: folder.to_owned(),
            path: folder.join(FILE),
            is_unsafe: AtomicBool::default(),
            writing: Mutex::default(),
            turn: Arc::default(),
        }
    }

    fn failed(&self, verb: &'static str) -> impl FnOnce(io::Error) -> StateError {
        failed(verb, &self.path)
    }

    /// Adds a line and returns once it is safe from a crash. The caller has the log's lock.
    ///
    /// # Errors
    /// [`StateError`].
    pub(super) fn append(&self, line: &Line) -> Result<(), StateError> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.write(line.at, line)
    }

    /// What could not be made safe is read all the same, until the machine stops: nothing that outlasts it may rest on that.
    fn require_safe(&self) -> Result<(), StateError> {
        if self.is_unsafe.load(Ordering::Relaxed) {
            return Err(StateError::Unsafe { path: self.path.clone() });
        }
        Ok(())
    }

    fn write<T: Serialize>(&self, at: Timestamp, line: &T) -> Result<(), StateError> {
        self.require_safe()?;
        self.rotate(at)?;
        let failed = self.failed("append to");
        let prev = self.last_hash()?;
        let json = match serde_json::to_string(&Chained { line, prev }) {
            Ok(json) => json,
            Err(error) => return Err(failed(error.into())),
        };
        let text = safe_json(&json).into_owned() + "\n";
        self.disk.append(&self.path, text.as_bytes(), Access::Owner).map_err(|source| {
            self.is_unsafe.fetch_or(is_sync_failure(&source), Ordering::Relaxed);
            failed(source)
        })
    }

    /// The hash of the last line, for the next; none if there is no line yet. A line that is not whole is ended.
    fn last_hash(&self) -> Result<Option<String>, StateError> {
        if let Some(part) = self.open(self.path.clone())? {
            let tail = tail_of(&part)?;
            if !tail.is_ended {
                self.mend()?;
            }
            if let Some(last) = tail.last {
                return Ok(Some(last.hash));
            }
        }
        Ok(self.end_of_earlier()?.map(|head| head.hash))
    }

    /// The last line of the earlier files: of that one which no other follows.
    fn end_of_earlier(&self) -> Result<Option<AuditHead>, StateError> {
        let (mut tails, mut followed) = (Vec::new(), BTreeSet::new());
        for (month, path) in self.earlier()? {
            let Some(part) = self.open(path)? else { continue };
            let follows = audit_chain::follows(&*part.file).map_err(failed("read", &part.path))?;
            followed.extend(follows);
            let Tail { last, is_chained, .. } = tail_of(&part)?;
            tails.extend(last.map(|last| (is_chained, month, last)));
        }
        tails.retain(|(_, _, last)| !followed.contains(&last.hash));
        // Those of earlier versions are not chained, and are followed by nothing but for the last.
        let last = tails.into_iter().max_by(|one, other| (one.0, &one.1).cmp(&(other.0, &other.1)));
        Ok(last.map(|(_, _, last)| last))
    }

    /// The last whole line; none if there is none. One that is just being written is not there yet.
    ///
    /// # Errors
    /// [`StateError::File`], [`StateError::Unsafe`].
    pub(super) fn head(&self) -> Result<Option<AuditHead>, StateError> {
        self.require_safe()?;
        let current = self.open(self.path.clone())?.as_ref().map(tail_of).transpose()?;
        match current.and_then(|tail| tail.ended) {
            Some(head) => Ok(Some(head)),
            None => self.end_of_earlier(),
        }
    }

    /// Checks the chain of all lines.
    ///
    /// # Errors
    /// [`StateError::File`] if it is not known which files there are, or one can't be read.
    pub(super) fn verify(&self) -> Result<ChainReport, StateError> {
        // The newest file first: should it be renamed meanwhile, it is found twice, and not missed.
        let current = self.open(self.path.clone())?;
        let mut parts = Vec::new();
        for path in self.earlier()?.into_values() {
            parts.extend(self.open(path)?);
        }
        parts.extend(current);
        let mut check = audit_chain::Check::default();
        for part in &parts {
            check.begin(&part.path);
            read_lines(part, 0, &mut |_, line| check.line(line))?;
            check.end();
        }
        Ok(check.report())
    }

    /// The end, from which later lines are read on.
    ///
    /// # Errors
    /// [`StateError::File`], [`StateError::Unsafe`].
    pub(super) fn end(&self) -> Result<AuditMark, StateError> {
        self.require_safe()?;
        let Some(part) = self.open(self.path.clone())? else { return Ok(AuditMark::default()) };
        Ok(AuditMark { offset: part.file.len().map_err(self.failed("read"))?, month: part.month })
    }

    /// What the lines from this mark on say of the zone's snapshots; those of the whole log if the mark is of another one.
    ///
    /// # Errors
    /// [`StateError::File`], [`StateError::Unsafe`].
    pub(super) fn taken_and_deleted_since(
        &self,
        zone: &ZoneName,
        from: &AuditMark,
    ) -> Result<TakenAndDeleted, StateError> {
        self.require_safe()?;
        let mut all = TakenAndDeleted::default();
        self.read_from(from, |_, line| {
            let Ok(line) = serde_json::from_slice::<Value>(line) else { return };
            let text = |value: &Value| value.as_str().map(str::to_owned);
            let id = text(&line["snapshot"]["id"]).and_then(|id| id.parse::<SnapshotId>().ok());
            let at = text(&line["at"]).and_then(|at| at.parse::<Timestamp>().ok());
            let (Some(id), Some(at)) = (id.filter(|_| line["zone"] == zone.as_str()), at) else { return };
            let unexplained = Ending::Unexplained.in_log();
            let was_requested = matches!(all.ended.get(&id), Some((Deletion::Begun | Deletion::Tried, _)));
            let said = match (line["action"].as_str(), line["outcome"].as_str()) {
                (Some("create"), Some(DONE)) => {
                    let of = &line["snapshot"];
                    let subject = Subject {
                        id: Some(id),
                        name: text(&of["name"]).unwrap_or_default(),
                        created_at: text(&of["created_at"]).and_then(|at| at.parse().ok()).unwrap_or(at),
                        instance_id: text(&of["instance_id"]).and_then(|id| id.parse().ok()),
                        instance_name: text(&of["instance_name"]),
                    };
                    all.taken.insert(id, (subject, at));
                    return;
                }
                (Some("delete"), Some(INTENDED)) => Deletion::Begun,
                (Some("delete"), Some(DONE)) => Deletion::Done,
                (Some("delete"), Some(FAILED)) => Deletion::Tried,
                // Refused, as one of a busy snapshot is: an earlier request whose response was lost may do it all the same.
                (Some("delete"), _) if was_requested => Deletion::Tried,
                (Some("vanish"), Some(outcome)) if outcome == unexplained => Deletion::Unexplained,
                (Some("vanish"), _) => Deletion::Ended,
                // It was not even requested.
                _ => return,
            };
            let is_by_other = said == Deletion::Ended && line["outcome"] == Ending::DeletedByOther.in_log();
            if said == Deletion::Done || is_by_other {
                all.deleted.insert(id);
            }
            all.ended.insert(id, (said, at));
        })?;
        Ok(all)
    }

    /// Every snapshot of the zone that the lines from this mark on say to be deleted, or about to be; those of the
    /// whole log if the mark is of another one.
    ///
    /// # Errors
    /// [`StateError::File`], [`StateError::Unsafe`].
    pub(super) fn deleted_since(
        &self,
        zone: &ZoneName,
        from: &AuditMark,
    ) -> Result<BTreeSet<SnapshotId>, StateError> {
        self.require_safe()?;
        let mut deleted = BTreeSet::new();
        self.read_from(from, |_, line| {
            let Ok(line) = serde_json::from_slice::<Value>(line) else { return };
            let is_deletion =
                line["action"] == "delete" && [INTENDED, DONE].iter().any(|word| line["outcome"] == *word);
            if is_deletion && line["zone"] == zone.as_str() {
                deleted.extend(line["snapshot"]["id"].as_str().and_then(|id| id.parse::<SnapshotId>().ok()));
            }
        })?;
        Ok(deleted)
    }

    /// Whether any line says that an image was stored in the archive.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub(super) fn has_export_to(&self, archive: &ArchiveName) -> Result<bool, StateError> {
        let mut found = false;
        self.read_from(&AuditMark::default(), |_, line| {
            let Ok(line) = serde_json::from_slice::<Value>(line) else { return };
            found |=
                line["action"] == "export" && line["outcome"] == DONE && line["archive"] == archive.as_str();
        })?;
        Ok(found)
    }

    /// Reads all lines, each with the file that it is in, and returns why files can't be read.
    ///
    /// # Errors
    /// [`StateError::File`] if it is not known which files there are.
    pub(super) fn read_all(&self, mut note: impl FnMut(&Path, &[u8])) -> Result<Vec<StateError>, StateError> {
        let read = |part: Result<Part, StateError>| read_lines(&part?, 0, &mut note);
        Ok(self.parts()?.map(read).filter_map(Result::err).collect())
    }

    /// Reads the lines from this mark on, each with the file that it is in; all if the mark is of another log, or of a month that has not
    /// come yet.
    pub(super) fn read_from(
        &self,
        from: &AuditMark,
        mut note: impl FnMut(&Path, &[u8]),
    ) -> Result<(), StateError> {
        let mut parts = self.parts()?.collect::<Result<Vec<Part>, _>>()?;
        let is_marked = |part: &Part| from.month.is_some() && part.month == from.month;
        let is_only_one = from.month.is_none() && parts.len() == 1;
        // The files are in the order of their months. After a clock that ran ahead, lines of earlier ones are newer than the mark.
        let was_ahead = parts.last().is_some_and(|last| last.month < from.month);
        let marked = parts.iter().position(is_marked).filter(|_| !was_ahead);
        let marked = marked.or(is_only_one.then_some(0));
        let begins = marked.and_then(|place| parts.get(place)).map(|part| is_line_begin(part, from.offset));
        // A disk that lost lines in a crash, though it had said that they were safe, has others there now.
        let mut offset = if begins.transpose()? == Some(true) { from.offset } else { 0 };
        for part in parts.drain(marked.unwrap_or(0)..) {
            read_lines(&part, std::mem::take(&mut offset), &mut note)?;
        }
        Ok(())
    }

    /// Removes the files whose last month ended longer than `keep` ago, each after a line that says so, with its ends: without
    /// it the log would seem to be cut. The caller has the log's lock.
    ///
    /// # Errors
    /// [`StateError`].
    pub(super) fn remove_old(&self, keep: &Span, now: Timestamp) -> Result<(), StateError> {
        let is_over = |month: &str| {
            let end = first_day(month).and_then(|first| first.last_of_month().tomorrow().ok());
            let end = end.and_then(|end| TimeZone::UTC.to_timestamp(end.at(0, 0, 0, 0)).ok());
            end.and_then(|end| keep.after(end, &TimeZone::UTC)).is_some_and(|until| until < now)
        };
        for (month, path) in self.earlier()? {
            // One that could not be renamed in time, as by earlier versions, has lines of later months than its first.
            if !is_over(&month) || self.last_month(&path)?.is_some_and(|month| !is_over(&month)) {
                continue;
            }
            if let Some(part) = self.open(path.clone())? {
                let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let line = RemovedFile::new(now, file, tail_of(&part)?.last);
                let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
                self.write(now, &line)?;
            }
            self.disk.remove_file(&path).map_err(failed("remove", &path))?;
        }
        Ok(())
    }

    /// The latest month of the last lines of a file, where one is readable.
    fn last_month(&self, path: &Path) -> Result<Option<String>, StateError> {
        let Some(Part { file, .. }) = self.open(path.to_owned())? else { return Ok(None) };
        let len = file.len().map_err(failed("read", path))?;
        let mut last = vec![0; END_BYTES];
        let count = file.read_at(&mut last, len.saturating_sub(END_BYTES as u64));
        let count = count.map_err(failed("read", path))?;
        Ok(last[..count].split(|byte| *byte == b'\n').filter_map(month_of_line).max())
    }

    /// Renames the file if its first line is of another month than `at`.
    fn rotate(&self, at: Timestamp) -> Result<(), StateError> {
        let month_now = at.strftime("%Y-%m").to_string();
        let is_due = |part: &Part| part.month.as_ref().is_some_and(|month| *month != month_now);
        let Some(Part { month: Some(month), .. }) = self.open(self.path.clone())?.filter(is_due) else {
            return Ok(());
        };
        let to = self.folder.join(format!("{EARLIER}{month}.jsonl"));
        // A clock that was wrong for a while brought the same month twice: nothing may be written over, nor where that is not known.
        let there = self.disk.metadata(&to);
        if !there.is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            return Ok(());
        }
        self.mend()?;
        // Some make the file append-only; then it stays as it is, and grows.
        if self.disk.rename(&self.path, &to).is_err() {
            return Ok(());
        }
        self.disk.sync_dir(&self.folder).map_err(self.failed("make safe"))
    }

    /// All files, the oldest first. They are opened while none is renamed by this process.
    fn parts(&self) -> Result<impl Iterator<Item = Result<Part, StateError>>, StateError> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let earlier = self.earlier()?.into_values();
        let parts: Vec<_> = earlier.chain([self.path.clone()]).map(|path| self.open(path)).collect();
        Ok(parts.into_iter().filter_map(Result::transpose))
    }

    /// The files that were renamed, by their months.
    fn earlier(&self) -> Result<BTreeMap<String, PathBuf>, StateError> {
        let entries = match self.disk.list(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(failed("list", &self.folder)(error)),
        };
        let month_of = |name: &str| {
            let month = name.strip_prefix(EARLIER)?.strip_suffix(".jsonl")?;
            first_day(month).map(|_| month.to_owned())
        };
        let names = entries.iter().filter_map(|entry| entry.name.to_str());
        Ok(names.filter_map(|name| Some((month_of(name)?, self.folder.join(name)))).collect())
    }

    /// Opens a file for reading; none if it is not there.
    fn open(&self, path: PathBuf) -> Result<Option<Part>, StateError> {
        let file = match self.disk.open(&path, Open::Read, Access::Owner) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", &path)(error)),
        };
        let mut first = vec![0; END_BYTES];
        let count = file.read_at(&mut first, 0).map_err(failed("read", &path))?;
        let month = first[..count].split(|byte| *byte == b'\n').find_map(month_of_line);
        Ok(Some(Part { path, month, file }))
    }

    /// Makes the file's name safe, should its maker have been stopped before.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub(super) fn secure_name(&self) -> Result<(), StateError> {
        match self.disk.metadata(&self.path) {
            Ok(_) => self.disk.sync_dir(&self.folder).map_err(self.failed("make safe")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(self.failed("open")(error)),
        }
    }

    /// Ends a line that a crash or a full disk left unfinished, so that the next one stands alone. The caller has the log's
    /// lock: what another process is just writing is not unfinished.
    fn mend(&self) -> Result<(), StateError> {
        let file = match self.disk.open(&self.path, Open::Read, Access::Owner) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(self.failed("open")(error)),
        };
        let len = file.len().map_err(self.failed("read"))?;
        let mut last = [b'\n'];
        if len > 0 {
            file.read_at(&mut last, len - 1).map_err(self.failed("read"))?;
        }
        if last != *b"\n" {
            self.disk.append(&self.path, b"\n", Access::Owner).map_err(self.failed("append to"))?;
        }
        Ok(())
    }
}

/// Whether a line begins at this byte of a file.
fn is_line_begin(part: &Part, offset: u64) -> Result<bool, StateError> {
    let Some(before) = offset.checked_sub(1) else { return Ok(true) };
    let mut byte = [0];
    let count = part.file.read_at(&mut byte, before).map_err(failed("read", &part.path))?;
    Ok(count == 1 && byte == *b"\n")
}

fn tail_of(part: &Part) -> Result<Tail, StateError> {
    Tail::of(&*part.file).map_err(failed("read", &part.path))
}

/// Reads the lines from this offset on; all if the file is shorter.
fn read_lines(
    Part { path, file, .. }: &Part,
    mut offset: u64,
    note: &mut impl FnMut(&Path, &[u8]),
) -> Result<(), StateError> {
    let failed = || failed("read", path);
    if file.len().map_err(failed())? < offset {
        offset = 0;
    }
    let mut buffer = vec![0; 64 * 1024];
    let mut begun = Vec::new();
    loop {
        let count = file.read_at(&mut buffer, offset).map_err(failed())?;
        if count == 0 {
            note(path, &begun);
            return Ok(());
        }
        offset += count as u64;
        let mut pieces = buffer[..count].split(|byte| *byte == b'\n').peekable();
        while let Some(piece) = pieces.next() {
            begun.extend_from_slice(piece);
            if pieces.peek().is_some() {
                note(path, &begun);
                begun.clear();
            }
        }
    }
}

/// The month of a whole line.
fn month_of_line(line: &[u8]) -> Option<String> {
    let month = std::str::from_utf8(line.strip_prefix(LINE_BEGINS)?.get(..MONTH_BYTES)?).ok()?;
    first_day(month).map(|_| month.to_owned())
}

/// The first day of a month such as `2026-11`; none if it is none.
fn first_day(month: &str) -> Option<Date> {
    format!("{month}-01").parse().ok()
}

fn failed(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::File { verb, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{self, RealDisk};
    use crate::sim::disk::{DiskCall, MemoryDisk};

    fn line(outcome: &'static str, action: Action, zone: &str, snapshot: u128) -> Line {
        let snapshot = Subject {
            id: Some(SnapshotId(Uuid::from_u128(snapshot))),
            name: "a\n\u{1b}[31m\"b".to_owned(),
            created_at: Timestamp::UNIX_EPOCH,
            instance_id: None,
            instance_name: None,
        };
        let zone: ZoneName = zone.parse().unwrap();
        Line {
            at: Timestamp::UNIX_EPOCH,
            outcome,
            policy: None,
            run_id: Uuid::nil(),
            zone: zone.clone(),
            step: StepFacts { rule: Some("max_age"), ..StepFacts::new(action, &zone, snapshot, Vec::new()) },
            operation_id: None,
            message: None,
            by: None,
        }
    }

    #[test]
    fn a_look_back_finds_our_deletions_in_the_zone_from_there_on() {
        let folder = tempfile::tempdir().unwrap();
        let log = AuditLog::new(Arc::new(RealDisk), folder.path());
        let zone: ZoneName = "ch-gva-2".parse().unwrap();
        let since = |offset| -> Vec<u128> {
            let mark = AuditMark { offset, ..log.end().unwrap() };
            let found = log.deleted_since(&zone, &mark).unwrap();
            found.into_iter().map(|id| id.0.as_u128()).collect()
        };
        assert_eq!((log.end().unwrap(), since(0), since(9)), (AuditMark::default(), vec![], vec![]));
        log.append(&line(INTENDED, Action::Delete, "ch-gva-2", 1)).unwrap();
        let from = log.end().unwrap().offset;
        for (outcome, action, zone, snapshot) in [
            (INTENDED, Action::Delete, "ch-gva-2", 2),
            ("blocked", Action::Delete, "ch-gva-2", 3),
            ("done", Action::Delete, "de-fra-1", 4),
            ("done", Action::Export, "ch-gva-2", 5),
            ("done", Action::DeleteTemplate, "ch-gva-2", 6),
        ] {
            log.append(&line(outcome, action, zone, snapshot)).unwrap();
        }
        for unreadable in ["half a li\n", "\u{fffd}\n", "{}\n", "\n"] {
            RealDisk.append(&folder.path().join(FILE), unreadable.as_bytes(), Access::Owner).unwrap();
        }
        // More than is read at once, so that lines are cut anywhere.
        for snapshot in 100..500 {
            log.append(&line("done", Action::Delete, "ch-gva-2", snapshot)).unwrap();
        }
        let expected: Vec<u128> = std::iter::once(2).chain(100..500).collect();
        assert_eq!(since(from), expected);
        assert_eq!(since(log.end().unwrap().offset), [0; 0]);
        let all: Vec<u128> = [1, 2].into_iter().chain(100..500).collect();
        assert_eq!(since(0), all);
        for offset in [from + 1, log.end().unwrap().offset + 1] {
            assert_eq!(since(offset), all, "another log, or other lines than there were, thus all of it");
        }
    }

    #[test]
    fn a_deletion_that_was_requested_may_be_done_whatever_its_response_was() {
        let folder = tempfile::tempdir().unwrap();
        let log = AuditLog::new(Arc::new(RealDisk), folder.path());
        for (snapshot, outcomes) in [
            (1, &[INTENDED][..]),
            (2, &[INTENDED, DONE]),
            (3, &[INTENDED, FAILED]),
            (4, &[INTENDED, "blocked"]),
            (5, &[INTENDED, FAILED, "skipped"]),
            (6, &["skipped"]),
            (7, &["blocked"]),
        ] {
            for outcome in outcomes {
                log.append(&line(outcome, Action::Delete, "ch-gva-2", snapshot)).unwrap();
            }
        }
        let zone: ZoneName = "ch-gva-2".parse().unwrap();
        log.append(&line("intended", Action::Create, "ch-gva-2", 8)).unwrap();
        log.append(&line("done", Action::Create, "ch-gva-2", 9)).unwrap();
        log.append(&line("done", Action::Create, "de-fra-1", 10)).unwrap();
        let said = log.taken_and_deleted_since(&zone, &AuditMark::default()).unwrap();
        let taken: Vec<_> = said.taken.into_iter().map(|(id, (of, _))| (id.0.as_u128(), of.id)).collect();
        assert_eq!(taken, [(9, Some(SnapshotId(uuid::Uuid::from_u128(9))))]);
        let said: Vec<_> = said.ended.into_iter().map(|(id, (said, _))| (id.0.as_u128(), said)).collect();
        let (begun, done, tried) = (Deletion::Begun, Deletion::Done, Deletion::Tried);
        assert_eq!(said, [(1, begun), (2, done), (3, tried), (4, tried), (5, tried)]);
    }

    fn line_at(at: &str, snapshot: u128) -> Line {
        Line { at: at.parse().unwrap(), ..line("done", Action::Delete, "ch-gva-2", snapshot) }
    }

    #[test]
    fn a_month_that_came_twice_is_not_written_over_where_the_disk_does_not_answer() {
        let (disk, folder) = (Arc::new(MemoryDisk::new()), Path::new("/state"));
        disk.create_dir_all(folder, Access::Owner).unwrap();
        let log = AuditLog::new(disk.clone(), folder);
        // A clock that ran ahead for one line.
        for (at, snapshot) in
            [("2026-10-31T12:00:00Z", 1), ("2026-12-01T12:00:00Z", 2), ("2026-10-31T13:00:00Z", 3)]
        {
            log.append(&line_at(at, snapshot)).unwrap();
        }
        disk.fail(DiskCall::Metadata, 1, io::ErrorKind::Other);
        log.append(&line_at("2026-11-01T12:00:00Z", 4)).unwrap();
        let mut lines = 0;
        assert!(log.read_all(|_, line| lines += usize::from(!line.is_empty())).unwrap().is_empty());
        assert_eq!((lines, log.verify().unwrap().breaks.len()), (4, 0));
    }

    #[test]
    fn what_follows_a_mark_of_a_month_that_has_not_come_yet_is_read_whatever_files_it_is_in() {
        let (disk, folder) = (Arc::new(MemoryDisk::new()), Path::new("/state"));
        disk.create_dir_all(folder, Access::Owner).unwrap();
        let log = AuditLog::new(disk, folder);
        let zone: ZoneName = "ch-gva-2".parse().unwrap();
        log.append(&line_at("2027-11-17T17:00:00Z", 1)).unwrap();
        let mark = log.end().unwrap();
        for (at, snapshot) in [("2026-12-16T23:00:00Z", 2), ("2027-01-19T00:00:00Z", 3)] {
            log.append(&line_at(at, snapshot)).unwrap();
            let found = log.deleted_since(&zone, &mark).unwrap();
            let wanted: Vec<SnapshotId> = (2..=snapshot).map(|id| SnapshotId(Uuid::from_u128(id))).collect();
            assert!(wanted.iter().all(|id| found.contains(id)), "{found:?} at {at}");
        }
        // Once that month is there, it is the order of the files again.
        log.append(&line_at("2027-12-01T00:00:00Z", 4)).unwrap();
        assert_eq!(log.deleted_since(&zone, &log.end().unwrap()).unwrap().len(), 0);
    }

    #[test]
    fn each_month_has_its_file_and_a_mark_is_found_in_whichever_it_is_now() {
        let folder = tempfile::tempdir().unwrap();
        let log = AuditLog::new(Arc::new(RealDisk), folder.path());
        // Another process that writes to the same log.
        let beside = AuditLog::new(Arc::new(RealDisk), folder.path());
        let zone: ZoneName = "ch-gva-2".parse().unwrap();
        let since = |mark: &AuditMark| -> Vec<u128> {
            let found = log.deleted_since(&zone, mark).unwrap();
            found.into_iter().map(|id| id.0.as_u128()).collect()
        };
        let before = log.end().unwrap();
        log.append(&line_at("2026-10-31T23:59:59Z", 1)).unwrap();
        let october = log.end().unwrap();
        log.append(&line_at("2026-10-31T23:59:59.9Z", 2)).unwrap();
        beside.append(&line_at("2026-11-01T00:00:00Z", 3)).unwrap();
        let november = log.end().unwrap();
        log.append(&line_at("2026-11-30T00:00:00Z", 4)).unwrap();
        log.append(&line_at("2026-12-01T00:00:00Z", 5)).unwrap();
        assert_eq!(log.earlier().unwrap().into_keys().collect::<Vec<_>>(), ["2026-10", "2026-11"]);
        assert_eq!(
            [since(&before), since(&october), since(&november), since(&log.end().unwrap())],
            [vec![1, 2, 3, 4, 5], vec![2, 3, 4, 5], vec![4, 5], vec![],]
        );
        let unknown = AuditMark { month: Some("2026-09".to_owned()), offset: 100 };
        assert_eq!(since(&unknown), [1, 2, 3, 4, 5], "of another log");

        // A clock that is wrong for a while: nothing is written over.
        log.append(&line_at("2026-11-15T00:00:00Z", 6)).unwrap();
        log.append(&line_at("2026-12-02T00:00:00Z", 7)).unwrap();
        log.append(&line_at("2026-12-03T00:00:00Z", 8)).unwrap();
        assert_eq!(since(&before), [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn files_are_removed_when_their_month_ended_long_enough_ago() {
        let folder = tempfile::tempdir().unwrap();
        let log = AuditLog::new(Arc::new(RealDisk), folder.path());
        for (at, snapshot) in
            [("2026-09-01T00:00:00Z", 1), ("2026-10-01T00:00:00Z", 2), ("2026-12-01T00:00:00Z", 3)]
        {
            log.append(&line_at(at, snapshot)).unwrap();
        }
        // Not ours.
        for name in ["audit-old.jsonl", "audit-2026-08.jsonl.gz"] {
            RealDisk.append(&folder.path().join(name), b"x", Access::Owner).unwrap();
        }
        let keep: Span = "90d".parse().unwrap();
        for (now, left) in [
            ("2026-12-30T00:00:00Z", &["2026-09", "2026-10"][..]),
            ("2026-12-30T00:00:01Z", &["2026-10"]),
            // The line that says so begins a month.
            ("2030-01-01T00:00:00Z", &["2026-12"]),
        ] {
            log.remove_old(&keep, now.parse().unwrap()).unwrap();
            assert_eq!(log.earlier().unwrap().into_keys().collect::<Vec<_>>(), left, "{now}");
        }
        assert_eq!(log.end().unwrap().month.unwrap(), "2030-01");
        assert_eq!(RealDisk.list(folder.path()).unwrap().len(), 4);
    }

    #[test]
    fn a_file_with_lines_of_later_months_than_its_name_says_stays_for_the_last_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let log = AuditLog::new(Arc::new(RealDisk), folder.path());
        // As versions before this one wrote it, and as one does that is kept from renaming it.
        for (at, snapshot) in [("2024-01-01T00:00:00Z", 1), ("2026-10-31T00:00:00Z", 2)] {
            let text = serde_json::to_string(&line_at(at, snapshot)).unwrap() + "\n";
            RealDisk.append(&folder.path().join(FILE), text.as_bytes(), Access::Owner).unwrap();
        }
        RealDisk.append(&folder.path().join(FILE), b"half a li", Access::Owner).unwrap();
        log.append(&line_at("2026-11-01T00:00:00Z", 3)).unwrap();
        let keep: Span = "30d".parse().unwrap();
        for (now, left) in [
            ("2026-11-01T00:00:00Z", &["2024-01"][..]),
            ("2026-12-01T00:00:00Z", &["2024-01"]),
            ("2026-12-01T00:00:01Z", &["2026-11"]),
        ] {
            log.remove_old(&keep, now.parse().unwrap()).unwrap();
            assert_eq!(log.earlier().unwrap().into_keys().collect::<Vec<_>>(), left, "{now}");
        }
    }

    #[test]
    fn a_line_left_unfinished_by_a_crash_is_ended_before_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        RealDisk.append(&path, b"{\"at\":", Access::Owner).unwrap();
        let log = AuditLog::new(Arc::new(RealDisk), folder.path());
        let line = line(INTENDED, Action::Delete, "ch-gva-2", 1);
        log.append(&line).unwrap();
        let text = String::from_utf8(disk::read_file(&RealDisk, &path, 10_000).unwrap()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        let read: serde_json::Value = serde_json::from_str(lines[1]).unwrap();
        assert_eq!(read["snapshot"]["name"], line.step.snapshot.name);
        assert_eq!(read["outcome"], "intended");
        assert!(!text.contains('\u{1b}'));
    }
}
