//! What this state directory remembers of each archive: that it used it, and what was in it.
//!
//! Commands change the file, also beside a running daemon, so it has a lock of its own. Reading needs none, since the
//! file is replaced in one step.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::clock::Clock;
use crate::copies::CopySet;
use crate::disk::Metadata;
use crate::policy::name::ArchiveName;
use crate::policy::shard::Shard;
use crate::snapshot::{InstanceId, ZoneName};
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;
use crate::state::file;

/// The version of the file that this program writes. Version 1 had the copies as a list of paths.
const VERSION: u64 = 2;

const FILE: &str = "archives.json";

/// All archives that this state met.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Archives {
    /// The id by which markers name this state; none until it first used an archive.
    pub state_id: Option<Uuid>,
    /// By name.
    pub archives: BTreeMap<ArchiveName, ArchiveMemory>,
    /// When a command last changed what is in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub changed_at: Option<Timestamp>,
}

/// What is remembered of one archive.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ArchiveMemory {
    /// The id in its marker; none until it was first used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Uuid>,
    /// The id for the marker that is about to be written, so that two processes write the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reserved: Option<Uuid>,
    /// This state remembered no run when it first looked for the archive.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub was_new: bool,
    /// The verified copies whose images were there when that was last accepted.
    #[serde(skip_serializing_if = "has_none")]
    pub copies: Arc<CopySet>,
    /// The copies that were found corrupt where the archive could not be written to say so.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub corrupt: BTreeMap<String, CorruptCopy>,
    /// When a copy was last found corrupt in an archive whose copies share their data: none that was last verified before counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corruption_at: Option<Timestamp>,
    /// Why the last write failed, unless that was for want of space.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_failure: Option<String>,
    /// The copies that this state locked, or put a legal hold on.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub locked: BTreeMap<String, CopyLock>,
    /// When what interrupted exports left in it was last removed by a run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leftovers_removed_at: Option<Timestamp>,
    /// By zone, what the last accepted pruning rested on; what it means is for `retention` to say.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rested_on: BTreeMap<ZoneName, Value>,
}

/// How a copy was locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyLock {
    /// Until when.
    pub until: Timestamp,
    /// The last verification in its manifest then. A manifest that was written since is another version, and not locked.
    pub verified_at: Timestamp,
    /// Whether it has a legal hold beside.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_held: bool,
}

/// A copy that was found corrupt where the archive could not be written to say so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CorruptCopy {
    /// When it was first found so.
    pub since: Timestamp,
    /// The last verification in its manifest then. One that was stored or verified anew since has another, and counts.
    pub verified_at: Timestamp,
}

/// What puts the copies in an archive in doubt, as [`ArchiveMemory`] has it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Doubts {
    /// The copies that were found corrupt where the archive could not be written to say so.
    pub corrupt: BTreeMap<String, CorruptCopy>,
    /// When a copy was last found corrupt in an archive whose copies share their data.
    pub corruption_at: Option<Timestamp>,
    /// Why the last write failed, unless that was for want of space.
    pub write_failure: Option<String>,
}

/// The file without all that grows with the number of copies.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DoubtsAlone {
    archives: BTreeMap<ArchiveName, Doubts>,
}

fn has_none(copies: &CopySet) -> bool {
    copies.is_empty()
}

impl Archives {
    /// What is remembered of an archive; the default if it is not known.
    pub fn of(&self, name: &ArchiveName) -> ArchiveMemory {
        self.archives.get(name).cloned().unwrap_or_default()
    }

    /// What is remembered of an archive with this id in its marker. One that was not used by that name yet may be known by
    /// the name that the configuration had for it before.
    pub fn of_marked(&self, name: &ArchiveName, id: Option<Uuid>) -> ArchiveMemory {
        let mut own = self.of(name);
        let other = self.archives.values().find(|memory| id.is_some() && memory.id == id);
        match other {
            Some(other) if own.id.is_none() => {
                // A verification by the new name may have been the first to look.
                let mut memory = other.clone();
                memory.corrupt.append(&mut own.corrupt);
                memory.write_failure = own.write_failure.or(memory.write_failure);
                memory.corruption_at = memory.corruption_at.max(own.corruption_at);
                memory
            }
            _ => own,
        }
    }

    /// Forgets the copies of instances of other shards, which will not be looked at. A copy's path has its instance's id.
    pub(crate) fn retain_shard(&mut self, shard: Shard) {
        let is_of_shard = |stem: &str| {
            stem.split('/').find_map(|part| part.parse().ok()).is_none_or(|id: InstanceId| shard.has(id))
        };
        for memory in self.archives.values_mut() {
            Arc::make_mut(&mut memory.copies).retain_instances(|id| shard.has(id));
            memory.corrupt.retain(|stem, _| is_of_shard(stem));
            memory.locked.retain(|stem, _| is_of_shard(stem));
        }
    }

    /// Replaces what is remembered of an archive. Names of it that are not configured any more are forgotten: by such a name it
    /// would be remembered as it was then, if it came back.
    pub fn accept(&mut self, name: ArchiveName, memory: ArchiveMemory, configured: &BTreeSet<ArchiveName>) {
        let id = memory.id;
        self.archives
            .retain(|other, memory| configured.contains(other) || memory.id.is_none() || memory.id != id);
        self.archives.insert(name, memory);
    }
}

impl StateDirectory {
    /// What is remembered of all archives.
    ///
    /// # Errors
    /// A file that can't be read, is damaged, or was written by a later program: then nothing may be deleted.
    pub async fn archives(&self) -> Result<Archives, StateError> {
        self.load(FILE, VERSION).await
    }

    /// Which version of [`Self::archives`] is there: another value once something was remembered.
    pub async fn archives_version(&self) -> Option<Metadata> {
        self.version_of(FILE.to_owned()).await
    }

    /// Remembers that a command changed what is in an archive, or what is known of it, for the daemon to look at.
    ///
    /// # Errors
    /// [`StateError`]; the daemon then sees it after its next run.
    pub async fn note_manual_change(&self, clock: &dyn Clock) -> Result<(), StateError> {
        let now = clock.now();
        self.change_archives(clock, move |all| all.changed_at = Some(now)).await
    }

    /// What puts the copies in an archive in doubt at this moment: it is asked for often.
    ///
    /// # Errors
    /// As [`Self::archives`].
    pub async fn doubts(&self, name: &ArchiveName) -> Result<Doubts, StateError> {
        let read = self
            .blocking(|state| file::read_part::<DoubtsAlone>(&*state.disk, &state.path.join(FILE), VERSION));
        Ok(read.await?.archives.remove(name).unwrap_or_default())
    }

    /// Changes what is remembered of one archive. A change that changes nothing writes nothing, and waits for no lock.
    ///
    /// # Errors
    /// [`StateError`]; the file is as it was then, or new.
    pub async fn change_archive(
        &self,
        clock: &dyn Clock,
        name: &ArchiveName,
        change: impl Fn(&mut ArchiveMemory) + Send + 'static,
    ) -> Result<(), StateError> {
        let before = self.archives().await?.of(name);
        let mut after = before.clone();
        change(&mut after);
        if after == before {
            return Ok(());
        }
        let name = name.clone();
        self.change_archives(clock, move |all| change(all.archives.entry(name).or_default())).await
    }

    /// Changes what is remembered, one process at a time, and returns the result; a change that changes nothing writes
    /// nothing.
    ///
    /// # Errors
    /// [`StateError`]; the file is as it was then, or new.
    pub async fn change_archives<T: Send + 'static>(
        &self,
        clock: &dyn Clock,
        change: impl FnOnce(&mut Archives) -> T + Send + 'static,
    ) -> Result<T, StateError> {
        // It takes milliseconds, so a stop need not end the waiting.
        let never = CancellationToken::new();
        self.change_shared("archives", clock, &never, move |state| {
            let before: Archives = state.read(FILE, VERSION)?;
            let mut archives = before.clone();
            let result = change(&mut archives);
            if archives != before {
                state.write(FILE, VERSION, &archives)?;
            }
            Ok(result)
        })
        .await
    }
}
