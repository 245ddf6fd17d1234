//! The audit log, read back for people: what was changed, when, and why.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::lookup::{Kind, Known, is_meant};
use crate::snapshot::{InstanceId, SnapshotId, ZoneName};
use crate::state::audit::{AuditMark, DeletedBy, INTENDED};
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;
use crate::text::excerpt;

/// A change, by its last line: `outcome` is `intended` if there is no other line, since it is still being made or
/// the program was killed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// When that line was written.
    pub at: Timestamp,
    /// When the change was begun, if its first line was read, too.
    #[serde(skip_deserializing)]
    pub begun_at: Option<Timestamp>,
    /// The policy; none for a manual command.
    #[serde(default)]
    pub policy: Option<String>,
    /// The run that it belongs to.
    #[serde(default)]
    pub run_id: Option<Uuid>,
    /// The zone of the snapshot.
    #[serde(default)]
    pub zone: Option<ZoneName>,
    /// What was done, in the log's words, also those of a later version.
    pub action: String,
    /// How it ended, in the log's words.
    pub outcome: String,
    /// The snapshot that it was done to.
    pub snapshot: ChangedSnapshot,
    /// The archive that got a copy, gave one, or had one pruned.
    #[serde(default)]
    pub archive: Option<String>,
    /// The template that was made or deleted.
    #[serde(default)]
    pub template_id: Option<Uuid>,
    /// The configuration key that decided it.
    #[serde(default)]
    pub rule: Option<String>,
    /// Sentences for people.
    #[serde(default)]
    pub reasons: Vec<String>,
    /// The API's operation.
    #[serde(default)]
    pub operation_id: Option<Uuid>,
    /// An error, or what else is worth knowing.
    #[serde(default)]
    pub message: Option<String>,
    /// Who deleted a snapshot that this program did not delete; hostile text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<DeletedBy>,
    /// The file of the audit log that `keep_audit` removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
}

/// The snapshot of a change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedSnapshot {
    /// None if it was yet to be taken.
    #[serde(default)]
    pub id: Option<SnapshotId>,
    /// Empty if it was yet to be taken; hostile text.
    #[serde(default)]
    pub name: String,
    /// When it was taken, or was to be.
    #[serde(default)]
    pub created_at: Option<Timestamp>,
    /// Its instance.
    #[serde(default)]
    pub instance_id: Option<InstanceId>,
    /// The name of that instance then; hostile text.
    #[serde(default)]
    pub instance_name: Option<String>,
}

impl Change {
    /// What the last line of a change has in common with its first.
    fn key(&self) -> (Option<Uuid>, String, String) {
        let of = match self.action.as_str() {
            // Not taken yet when the first line is written.
            "create" => format!("{:?}", self.snapshot.instance_id),
            // The archive and the template turn out in between.
            "restore" | "promote" => format!("{:?}", self.snapshot.id),
            "delete_template" => format!("{:?}", self.template_id),
            _ => format!("{:?} {:?}", self.snapshot.id, self.archive),
        };
        (self.run_id, self.action.clone(), format!("{:?} {of}", self.zone))
    }

    /// The snapshot or the instance, as it is looked up.
    fn known(&self, kind: Kind) -> Option<Known> {
        let snapshot = &self.snapshot;
        let (id, name) = match kind {
            Kind::Snapshot => (snapshot.id?.0, Some(&snapshot.name).filter(|name| !name.is_empty())),
            Kind::Instance => (snapshot.instance_id?.0, snapshot.instance_name.as_ref()),
        };
        Some(Known { id, name: name.cloned(), zone: self.zone.clone(), taken_at: snapshot.created_at })
    }
}

/// A line that can't be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedLine {
    /// Its file.
    pub file: PathBuf,
    /// Its number in the file, from 1.
    pub number: u64,
    /// What is wrong with it.
    pub why: String,
}

/// The changes that were asked for, in the order in which they ended.
#[derive(Debug, Default)]
pub struct History {
    /// The newest.
    pub changes: Vec<Change>,
    /// How many earlier ones were left out.
    pub left_out: u64,
    /// The lines that can't be read; what they said is not known.
    pub damaged: Vec<DamagedLine>,
    /// Why files can't be read; what they say is not known.
    pub unread: Vec<StateError>,
}

/// Brings the first and the last line of each change together, and keeps the newest changes.
struct Gathering {
    most: usize,
    /// With the numbers of their lines.
    ended: VecDeque<(u64, Change)>,
    begun: HashMap<(Option<Uuid>, String, String), (u64, Change)>,
    left_out: u64,
}

impl Gathering {
    fn add(&mut self, number: u64, mut change: Change) {
        let begun = if change.outcome == INTENDED {
            change.begun_at = Some(change.at);
            // One of the same was never ended: the program was killed.
            self.begun.insert(change.key(), (number, change))
        } else {
            let begun = self.begun.remove(&change.key());
            change.begun_at = begun.and_then(|(_, begun)| begun.begun_at);
            Some((number, change))
        };
        self.ended.extend(begun);
        if self.ended.len() > self.most {
            self.ended.pop_front();
            self.left_out += 1;
        }
    }

    fn end(mut self, damaged: Vec<DamagedLine>, unread: Vec<StateError>) -> History {
        self.ended.extend(self.begun.into_values());
        let mut all: Vec<_> = self.ended.into();
        all.sort_by_key(|(number, _)| *number);
        let more = all.len().saturating_sub(self.most);
        let changes = all.drain(more..).map(|(_, change)| change).collect();
        History { changes, left_out: self.left_out + more as u64, damaged, unread }
    }
}

impl StateDirectory {
    /// The newest changes that are wanted, at most that number. A line or a file that can't be read does not hide the others.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub async fn history(
        &self,
        most: usize,
        wanted: impl Fn(&Change) -> bool + Send + 'static,
    ) -> Result<History, StateError> {
        self.history_from(None, most, wanted).await
    }

    /// As [`Self::history`], of the lines from this mark on.
    ///
    /// # Errors
    /// [`StateError::File`], also of a single file if there is a mark.
    pub async fn history_from(
        &self,
        from: Option<AuditMark>,
        most: usize,
        wanted: impl Fn(&Change) -> bool + Send + 'static,
    ) -> Result<History, StateError> {
        self.blocking(move |state| {
            let (ended, begun) = (VecDeque::new(), HashMap::new());
            let mut gathering = Gathering { most, ended, begun, left_out: 0 };
            let mut damaged = Vec::new();
            let mut number = 0;
            let unread = state.for_each_change(from.as_ref(), |change| {
                number += 1;
                match change {
                    Ok(change) if wanted(&change) => gathering.add(number, change),
                    Ok(_) => {}
                    Err(line) => damaged.push(line),
                }
            })?;
            Ok(gathering.end(damaged, unread))
        })
        .await
    }

    /// The snapshots or the instances in the log that the text may mean.
    ///
    /// # Errors
    /// [`StateError::File`], also of a single file if no other has any.
    pub async fn known_in_history(&self, kind: Kind, text: &str) -> Result<Vec<Known>, StateError> {
        let text = text.to_owned();
        self.blocking(move |state| {
            // One of each id and name, with the newest time.
            let mut found: BTreeMap<(Uuid, Option<String>), Known> = BTreeMap::new();
            let mut unread = state.for_each_change(None, |change| {
                let known = change.ok().and_then(|change| change.known(kind));
                let meant = known.filter(|known| is_meant(&text, known.id, known.name.as_deref()));
                if let Some(known) = meant {
                    let key = (known.id, known.name.clone());
                    let same = found.entry(key).or_insert_with(|| known.clone());
                    same.taken_at = same.taken_at.max(known.taken_at);
                }
            })?;
            // Where nothing is found, it may stand in a file that can't be read.
            if found.is_empty()
                && let Some(error) = unread.pop()
            {
                return Err(error);
            }
            Ok(found.into_values().collect())
        })
        .await
    }

    /// Reads every line, or those from a mark on, and returns why files can't be read; for work that is on the blocking pool already.
    fn for_each_change(
        &self,
        from: Option<&AuditMark>,
        mut each: impl FnMut(Result<Change, DamagedLine>),
    ) -> Result<Vec<StateError>, StateError> {
        let (mut number, mut of) = (0, PathBuf::new());
        let note = |file: &Path, line: &[u8]| {
            if file != of {
                (number, of) = (0, file.to_owned());
            }
            number += 1;
            if !line.trim_ascii().is_empty() {
                let damaged = |why| DamagedLine { file: file.to_owned(), number, why };
                let read = serde_json::from_slice::<Change>(line);
                each(read.map_err(|error| damaged(excerpt(&error.to_string(), 200))));
            }
        };
        match from {
            None => self.audit_log.read_all(note),
            Some(from) => self.audit_log.read_from(from, note).map(|()| Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::disk::{Access, Disk as _, RealDisk};

    const WEB: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";

    fn line(second: u8, run: u8, action: &str, outcome: &str, snapshot: Option<u8>, more: &str) -> String {
        let id =
            snapshot.map_or_else(|| "null".to_owned(), |id| format!("\"{}\"", Uuid::from_u128(id.into())));
        let run = Uuid::from_u128(run.into());
        format!(
            "{{\"at\":\"2026-11-01T02:30:{second:02}Z\",\"outcome\":\"{outcome}\",\"policy\":\"nightly\",\"run_id\":\"{run}\",\
             \"zone\":\"ch-gva-2\",\"action\":\"{action}\",\"snapshot\":{{\"id\":{id},\"name\":\"db-{}\",\"created_at\":\
             \"2026-09-01T00:00:00Z\",\"instance_id\":\"{WEB}\",\"instance_name\":\"web-1\"}},\"reasons\":[\"why\"]{more}}}\n",
            snapshot.unwrap_or_default()
        )
    }

    async fn read(folder: &Path, text: &str, most: usize) -> History {
        RealDisk.append(&folder.join("audit.jsonl"), text.as_bytes(), Access::Owner).unwrap();
        let state = StateDirectory::at(Arc::new(RealDisk), folder);
        state.history(most, |_| true).await.unwrap()
    }

    fn told(history: &History) -> Vec<(String, String, Option<u128>)> {
        let told = |change: &Change| {
            let id = change.snapshot.id.map(|id| id.0.as_u128());
            (change.action.clone(), change.outcome.clone(), id)
        };
        history.changes.iter().map(told).collect()
    }

    #[tokio::test]
    async fn the_lines_of_a_change_are_one_change() {
        let folder = tempfile::tempdir().unwrap();
        let (vault, attic) = (",\"archive\":\"vault\"", ",\"archive\":\"attic\"");
        let text = [
            line(1, 1, "create", "intended", None, ""),
            line(2, 1, "export", "intended", Some(5), vault),
            line(3, 1, "export", "intended", Some(5), attic),
            line(4, 1, "create", "done", Some(5), ""),
            line(5, 1, "export", "failed", Some(5), attic),
            line(6, 1, "export", "done", Some(5), vault),
            line(7, 2, "delete", "intended", Some(6), ""),
            line(8, 3, "delete", "intended", Some(6), ""),
            line(9, 3, "delete", "done", Some(6), ",\"message\":\"a later version says more\",\"more\":{}"),
            line(10, 3, "restore", "intended", Some(7), ""),
            line(11, 3, "restore", "done", Some(7), vault),
        ]
        .concat();
        let history = read(folder.path(), &text, 100).await;
        let change = |action: &str, outcome: &str, id| (action.to_owned(), outcome.to_owned(), Some(id));
        assert_eq!(
            told(&history),
            [
                change("create", "done", 5),
                change("export", "failed", 5),
                change("export", "done", 5),
                // The program was killed.
                change("delete", "intended", 6),
                change("delete", "done", 6),
                change("restore", "done", 7),
            ]
        );
        let begun: Vec<String> = history
            .changes
            .iter()
            .map(|change| change.begun_at.unwrap().strftime("%S").to_string())
            .collect();
        assert_eq!(begun, ["01", "03", "02", "07", "08", "10"]);
        assert!(history.damaged.is_empty() && history.left_out == 0, "{history:?}");
        let history = read(folder.path(), "", 2).await;
        assert_eq!(told(&history), [change("delete", "done", 6), change("restore", "done", 7)]);
        assert_eq!(history.left_out, 4);
        assert_eq!(read(folder.path(), "", 0).await.left_out, 6);
    }

    #[tokio::test]
    async fn a_damaged_line_is_named_and_hides_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let whole = line(1, 1, "delete", "done", Some(1), "");
        let text = format!(
            "{whole}{}\n\u{0}\n\n{{}}\n{}{}",
            &whole[..90],
            whole.replace("db-1", "db-2"),
            &whole[..50]
        );
        let history = read(folder.path(), &text, 100).await;
        assert_eq!(history.changes.len(), 2, "{history:?}");
        let numbers: Vec<u64> = history.damaged.iter().map(|line| line.number).collect();
        assert_eq!(numbers, [2, 3, 5, 7], "{history:?}");
        assert!(history.damaged[2].why.contains("missing field"), "{history:?}");
        // Nor does a file: this one is none.
        RealDisk.create_dir_all(&folder.path().join("audit-2026-09.jsonl"), Access::Owner).unwrap();
        let history = read(folder.path(), "", 100).await;
        assert_eq!((history.changes.len(), history.unread.len()), (2, 1), "{history:?}");
        assert!(history.unread[0].to_string().contains("audit-2026-09.jsonl"), "{history:?}");
        // No log at all is no change.
        let nothing = tempfile::tempdir().unwrap();
        let state = StateDirectory::at(Arc::new(RealDisk), nothing.path());
        assert!(state.history(9, |_| true).await.unwrap().changes.is_empty());
    }

    #[tokio::test]
    async fn what_the_log_names_is_found_by_name_and_prefix() {
        let folder = tempfile::tempdir().unwrap();
        let text = line(1, 1, "delete", "intended", Some(1), "") + &line(2, 1, "delete", "done", Some(1), "");
        read(folder.path(), &text, 1).await;
        let state = StateDirectory::at(Arc::new(RealDisk), folder.path());
        for (kind, text, id) in [
            (Kind::Instance, "web-1", WEB.to_owned()),
            (Kind::Instance, "9ee8cb98", WEB.to_owned()),
            (Kind::Snapshot, "db-1", Uuid::from_u128(1).to_string()),
        ] {
            let [known] = &state.known_in_history(kind, text).await.unwrap()[..] else { panic!("{text}") };
            assert_eq!((known.id.to_string(), known.zone.is_some()), (id, true));
        }
        assert!(state.known_in_history(Kind::Snapshot, "web-1").await.unwrap().is_empty());
    }
}
