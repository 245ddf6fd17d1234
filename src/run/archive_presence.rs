//! Whether an archive is the one that this state used: by its marker, and by what is remembered of it.
//!
//! An empty folder may be an archive's first use, or the place at which its disk is not mounted. In doubt the archive is
//! not there: nothing is stored in it, and whatever needs a copy there is kept.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;
use tracing::debug;
use uuid::Uuid;

use crate::archive::backend::Archive;
use crate::archive::catalogue::{Catalogue, StoredCopy};
use crate::archive::marker::{MARKER_FILE, Marker, MarkerProblem};
use crate::archive::stats::ArchiveStats;
use crate::archive::transfer::sink::SinkError;
use crate::clock::Clock;
use crate::copies::CopyId;
use crate::policy::Guard;
use crate::policy::name::ArchiveName;
use crate::randomness::{Randomness, fresh_id};
use crate::retention::guard::{VERY_FEW, is_beyond};
use crate::run::archive_rules::kept_by_others;
use crate::run::context::Runner;
use crate::snapshot::{InstanceId, SnapshotId, ZoneName};
use crate::state::archives::{ArchiveMemory, Archives, CorruptCopy, Doubts};
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;
use crate::text::{chain, counted, printable};

/// How often a shard tries to add itself to a marker that others write as well.
const MARK_TRIES: u32 = 10;

/// Between two of these attempts.
const MARK_POLL: Duration = Duration::from_millis(200);

/// How many copies that vanished are named.
const NAMED: usize = 3;

/// How an archive that can be read stands to this state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Presence {
    /// It is the one that was used before.
    Known,
    /// Nothing speaks against using it for the first time.
    FirstUse,
    /// It is the one that was used before, but nothing may be stored in it or deleted that needs a copy in it, for this reason.
    Closed(String),
    /// Nothing may be deleted that needs a copy in it, since the last write to it failed, or since its copies share data of which
    /// some was found damaged. It is still written to and verified, which may end this.
    InDoubt {
        /// As the end of a sentence about it, with what to do.
        why: String,
        /// Whether it had not been used before.
        is_first_use: bool,
    },
    /// Others used it, and this state remembered no run when it first looked: it may have lost everything.
    Unadopted,
}

impl Presence {
    /// Why nothing may be deleted that needs a copy in it, if so.
    pub(crate) fn closed(&self) -> Option<&str> {
        match self {
            Self::Closed(why) | Self::InDoubt { why, .. } => Some(why),
            Self::Known | Self::FirstUse | Self::Unadopted => None,
        }
    }

    /// Whether it gets its marker before anything is stored in it.
    pub(crate) fn is_first_use(&self) -> bool {
        matches!(self, Self::FirstUse | Self::InDoubt { is_first_use: true, .. })
    }
}

/// Looks at archives as this state remembers them.
#[derive(Debug, Clone)]
pub(crate) struct Looker {
    state: StateDirectory,
    archives: Archives,
}

/// An archive as it was found.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) catalogue: Arc<Catalogue>,
    pub(crate) presence: Presence,
    /// The remembered copies that vanished without a mark, if they are too many.
    pub(crate) vanished: Vec<String>,
    /// A warning about copies that vanished without a mark, if they are too few to close the archive: the next run that accepts
    /// it as it is does not miss them any more.
    pub(crate) loss: Option<String>,
    /// What the state remembers of it.
    pub(crate) memory: ArchiveMemory,
}

impl Looker {
    /// Reads what the state remembers.
    ///
    /// # Errors
    /// Why that is unknown, as a sentence.
    pub(crate) async fn new(state: &StateDirectory) -> Result<Self, String> {
        let archives = state.archives().await.map_err(|error| chain(&error))?;
        Ok(Self { state: state.clone(), archives })
    }

    /// Reads an archive, and judges what was found.
    ///
    /// # Errors
    /// Why it can't be read or is not there, as the end of a sentence about it.
    pub(crate) async fn look(&self, archive: &Archive, guard: &Guard) -> Result<Found, String> {
        let mut catalogue = archive.catalogue().await.map_err(|error| chain(&error))?;
        catalogue.retain_shard(self.state.shard());
        let id = catalogue.marker().as_ref().ok().and_then(|marker| Some(marker.as_ref()?.id));
        let mut memory = self.archives.of_marked(archive.name(), id);
        let presence = self.presence(archive, &memory, &catalogue).await?;
        if presence == Presence::FirstUse
            && memory.rested_on.is_empty()
            && self.is_filled_by_others(archive, &catalogue).await?
        {
            memory.rested_on = kept_by_others(&catalogue)?;
        }
        let vanished: Vec<CopyId> = match &presence {
            Presence::Known => catalogue.vanished(&memory.copies),
            _ => Vec::new(),
        };
        exclude_corrupt(&mut catalogue, &memory);
        let (dropped, all) = (vanished.len() as u64, memory.copies.len() as u64);
        let max = guard.max_listing_drop_percent;
        let is_drop = dropped > VERY_FEW
            && (is_beyond(dropped, all, max)
                || (max < 100 && is_one_emptied(&catalogue, &memory, &vanished)));
        let failed = memory.write_failure.as_ref().map(|why| write_failed_text(archive, why));
        let doubt = failed.or_else(|| shared_damage_text(archive, &catalogue, &memory));
        let presence = match (presence, doubt) {
            _ if is_drop => Presence::Closed(vanished_text(archive, &vanished, memory.copies.len())),
            (presence @ (Presence::Known | Presence::FirstUse), Some(why)) => {
                Presence::InDoubt { why, is_first_use: presence == Presence::FirstUse }
            }
            (presence, _) => presence,
        };
        let is_accepted = presence == Presence::Known && !vanished.is_empty();
        let loss = is_accepted.then(|| loss_text(&catalogue, &vanished, memory.copies.len()));
        let vanished = if is_drop { vanished.iter().map(ToString::to_string).collect() } else { Vec::new() };
        Ok(Found { catalogue: Arc::new(catalogue), presence, vanished, loss, memory })
    }

    async fn presence(
        &self,
        archive: &Archive,
        memory: &ArchiveMemory,
        catalogue: &Catalogue,
    ) -> Result<Presence, String> {
        let (name, place) = (archive.name(), archive.marker_place());
        let adopt = format!("if this is the right archive, take it over: snapwarden archive adopt {name}");
        let was_new = memory.was_new || (memory.id.is_none() && !self.remembers_runs().await?);
        let marker = catalogue.marker().as_ref().map_err(|problem| {
            format!(
                "its marker {place} {problem}; look at that file, and restore it from a backup or another copy; {adopt}"
            )
        })?;
        // Two that mark it at once would not know each other's marker.
        let follows = self.state.shard().filter(|shard| marker.is_none() && !shard.is_first());
        if let (Some(shard), None) = (follows, memory.id) {
            return Err(format!(
                "it is not used yet: it has no {MARKER_FILE}, which the first shard writes, and this is shard {shard}; it follows \
                 once that one has run"
            ));
        }
        match (marker, memory.id) {
            (Some(marker), Some(id)) if marker.id == id => Ok(Presence::Known),
            (Some(_), Some(_)) => Err(format!(
                "it is not there: {place} is the marker of another archive; mount the right one; {adopt}"
            )),
            (Some(marker), None) => {
                let is_ours = self.archives.state_id.is_some_and(|id| marker.states.contains(&id));
                // Other shards use it, too: only copies of this one's instances are of a state that may be lost.
                let is_used = self.state.shard().is_none() || catalogue.unpruned().next().is_some();
                Ok(if was_new && !is_ours && is_used { Presence::Unadopted } else { Presence::FirstUse })
            }
            (None, Some(_)) => Err(missing_text(archive, &adopt)),
            (None, None) if !catalogue.copies().is_empty() || !catalogue.problems().is_empty() => {
                Ok(if was_new { Presence::Unadopted } else { Presence::FirstUse })
            }
            (None, None) => {
                // From before there were markers.
                let used = self.remembers_runs().await?
                    && self.state.has_export_to(name).await.map_err(|e| chain(&e))?;
                if used { Err(missing_text(archive, &adopt)) } else { Ok(Presence::FirstUse) }
            }
        }
    }

    /// Whether copies in an archive that is used for the first time may not be this state's: from before there were markers,
    /// it may have filled the archive itself.
    async fn is_filled_by_others(&self, archive: &Archive, catalogue: &Catalogue) -> Result<bool, String> {
        let own = self.archives.state_id;
        let marker = catalogue.marker().as_ref().ok().and_then(Option::as_ref);
        let has_others = marker.is_some_and(|marker| marker.states.iter().any(|id| Some(*id) != own));
        let has_copies = catalogue.unpruned().next().is_some();
        let is_known = || self.state.has_export_to(archive.name());
        Ok(has_copies && (has_others || !is_known().await.map_err(|error| chain(&error))?))
    }

    /// Whether the state directory remembers any run. Asked for where an archive is not known, since it reads a lot.
    async fn remembers_runs(&self) -> Result<bool, String> {
        let runs = self.state.all_last_runs().await.map_err(|error| chain(&error))?;
        Ok(runs.iter().any(|(_, runs)| runs.last.is_some()))
    }
}

/// Copies that this state knows to be corrupt do not count, also where the archive could not be written to say so.
pub(crate) fn exclude_corrupt(catalogue: &mut Catalogue, memory: &ArchiveMemory) {
    catalogue.exclude_corrupt(|copy| corrupt_since(&memory.corrupt, copy));
}

/// Whether a copy was found corrupt since it was last read, or may be, since it shares its data with one that was.
pub(crate) fn is_in_doubt(doubts: &Doubts, copy: &StoredCopy, now: Timestamp) -> bool {
    // A verification that is dated ahead of now is of a clock that was wrong.
    let is_read_since = |at| (at..=now).contains(&copy.manifest.verified_at);
    // Of one that the archive's retention removed there is nothing left to read: it counts by a newer one.
    let has_data = copy.manifest.pruned_at.is_none();
    doubts.corruption_at.is_some_and(|at| has_data && !is_read_since(at))
        || corrupt_since(&doubts.corrupt, copy).is_some()
}

/// Since when this state knows a copy to be corrupt, if it does.
pub(crate) fn corrupt_since(corrupt: &BTreeMap<String, CorruptCopy>, copy: &StoredCopy) -> Option<Timestamp> {
    let known = corrupt.get(&copy.stem())?;
    (known.verified_at == copy.manifest.verified_at).then_some(known.since)
}

fn write_failed_text(archive: &Archive, why: &str) -> String {
    let name = archive.name();
    format!(
        "the last write to it failed, so its copies are in doubt: {why}. Once that is mended, the next write that succeeds \
         ends this, such as an export or `snapwarden archive verify {name}`; to accept it as it is: snapwarden archive \
         adopt {name}"
    )
}

/// Why the copies in an archive that share their data are in doubt: one of them was found corrupt, and the others were not all
/// read since.
fn shared_damage_text(archive: &Archive, catalogue: &Catalogue, memory: &ArchiveMemory) -> Option<String> {
    let name = archive.name();
    let corrupt = catalogue.corrupt().len() + catalogue.unmarked().len();
    if !archive.shares_data() || (corrupt == 0 && memory.corruption_at.is_none()) {
        return None;
    }
    if corrupt > 0 {
        return Some(format!(
            "{corrupt} of its copies are corrupt, and its copies share their data, so all are in doubt: repair the repository with \
             restic, or remove the corrupt ones by `snapwarden archive rm {name} SNAPSHOT`, then run `snapwarden archive verify {name}`"
        ));
    }
    let at = memory.corruption_at?;
    let unread = catalogue.unpruned().filter(|copy| copy.manifest.verified_at < at).count();
    (unread > 0).then(|| {
        format!(
            "a copy in it was found corrupt at {at}, and its copies share their data: {unread} of them were not read since; run \
             `snapwarden archive verify {name}`"
        )
    })
}

fn missing_text(archive: &Archive, adopt: &str) -> String {
    format!(
        "it is not there: images were stored in it, and {} has no {MARKER_FILE}: is its disk not mounted? Mount it; {adopt}",
        archive.place()
    )
}

/// Whether an instance lost all its remembered copies, and more than very few.
fn is_one_emptied(catalogue: &Catalogue, memory: &ArchiveMemory, vanished: &[CopyId]) -> bool {
    let ids = catalogue.unpruned().map(|copy| copy.manifest.id());
    let left: HashSet<InstanceId> =
        ids.filter(|id| memory.copies.contains(id)).map(|id| id.instance_id).collect();
    let mut lost: HashMap<InstanceId, u64> = HashMap::new();
    for copy in vanished {
        *lost.entry(copy.instance_id).or_default() += 1;
    }
    lost.iter().any(|(instance, count)| *count > VERY_FEW && !left.contains(instance))
}

/// Copies that vanished, though not so many that the archive is in doubt.
fn loss_text(catalogue: &Catalogue, vanished: &[CopyId], of: usize) -> String {
    let named = vanished.iter().take(NAMED).map(|copy| {
        let others = catalogue.copies().iter().map(|other| &other.manifest.instance);
        let name = others.filter(|other| other.id == copy.instance_id).find_map(|other| other.name.as_ref());
        let name = name.map_or_else(|| copy.instance_id.to_string(), |name| printable(name).to_string());
        format!("{name} of {}", copy.created_at)
    });
    let named = named.collect::<Vec<_>>().join(", ");
    let more = if vanished.len() > NAMED { ", …" } else { "" };
    format!(
        "archive {}: {} of {} vanished from it, though snapwarden did not delete them ({named}{more}); find out what deletes files \
         there, such as a person, a script or a lifecycle rule of the bucket, and bring them back: what is \
         not there at the end of the run is not missed by later ones",
        catalogue.archive(),
        vanished.len(),
        counted(of, "verified copy"),
    )
}

fn vanished_text(archive: &Archive, vanished: &[CopyId], of: usize) -> String {
    let name = archive.name();
    let named =
        vanished.iter().take(NAMED).map(|copy| format!("{copy}.qcow2")).collect::<Vec<_>>().join(", ");
    let more = if vanished.len() > NAMED { ", …" } else { "" };
    format!(
        "{} of {} vanished from it, though snapwarden did not delete them ({named}{more}); bring them back, or, if that is \
         right, accept it: snapwarden archive adopt {name}",
        vanished.len(),
        counted(of, "verified copy"),
    )
}

/// Whether the archive is still the one that was read.
///
/// # Errors
/// Why it is not, as a sentence.
pub(crate) async fn is_still_there(archive: &Archive, catalogue: &Catalogue) -> Result<(), String> {
    let found = archive.marker().await.map_err(|error| chain(&error))?;
    let id = |marker: &Result<Option<Marker>, _>| {
        marker.as_ref().ok().map(|marker| marker.as_ref().map(|it| it.id))
    };
    if id(&found) == id(catalogue.marker()) {
        return Ok(());
    }
    Err(format!(
        "archive {} is not there any more: its marker {} is missing or another one; is its disk still mounted?",
        archive.name(),
        archive.marker_place()
    ))
}

/// Remembers that a write to an archive succeeded, or why it failed.
///
/// # Errors
/// Why that can't be remembered, as a sentence.
pub(crate) async fn remember_write(
    state: &StateDirectory,
    clock: &dyn Clock,
    archive: &ArchiveName,
    failure: Option<String>,
) -> Result<(), String> {
    let remembered = async {
        if state.doubts(archive).await?.write_failure == failure {
            return Ok(());
        }
        let change = move |memory: &mut ArchiveMemory| memory.write_failure.clone_from(&failure);
        state.change_archive(clock, archive, change).await
    };
    remembered.await.map_err(|error: StateError| {
        format!("how a write to archive {archive} ended is not remembered: {}", chain(&error))
    })
}

/// Forgets that a pruned copy was there that is about to be stored again, since no newer one stands for it: should nothing be
/// stored after all, it has not vanished.
///
/// # Errors
/// Why that can't be remembered, as a sentence.
pub(crate) async fn forget_to_store_again(
    state: &StateDirectory,
    clock: &dyn Clock,
    catalogue: &Catalogue,
    snapshot: SnapshotId,
) -> Result<(), String> {
    let mut pruned = catalogue.pruned_without_newer();
    let Some(copy) = pruned.find(|copy| copy.manifest.snapshot.id == snapshot) else { return Ok(()) };
    let id = copy.manifest.id();
    let forget = move |memory: &mut ArchiveMemory| Arc::make_mut(&mut memory.copies).remove(&id);
    let forgotten = state.change_archive(clock, catalogue.archive(), forget).await;
    forgotten
        .map_err(|error| format!("that its pruned copy is forgotten is not remembered: {}", chain(&error)))
}

/// Writes the marker if the archive has none yet, with this state among those that use it, and remembers it, with what its rules
/// rested on before.
///
/// # Errors
/// Why the archive can't be used, as a sentence.
pub(crate) async fn mark(
    state: &StateDirectory,
    clock: &dyn Clock,
    randomness: &dyn Randomness,
    archive: &Archive,
    id: Option<Uuid>,
    rested_on: BTreeMap<ZoneName, Value>,
) -> Result<(), String> {
    let name = archive.name().clone();
    let new_id = || fresh_id(randomness, clock.now());
    let (new_state, new_archive) = (new_id(), id.unwrap_or_else(new_id));
    // Remembered before it stands in a marker: after a crash between the two, the marker is known as ours.
    let of = name.clone();
    let reserve = move |all: &mut Archives| {
        let state_id = *all.state_id.get_or_insert(new_state);
        let memory = all.archives.entry(of).or_default();
        memory.rested_on.extend(rested_on);
        (state_id, *memory.reserved.get_or_insert(new_archive))
    };
    let (state_id, reserved) = state.change_archives(clock, reserve).await.map_err(|error| chain(&error))?;
    let mut tries = MARK_TRIES;
    let marker = loop {
        tries -= 1;
        let found = archive.marker().await.map_err(|error| chain(&error))?;
        let found = match (found, id) {
            (Ok(found), _) => found,
            // The operator who takes it over has seen that it is damaged.
            (Err(_), Some(_)) => None,
            // Another shard may be writing it at this moment.
            (Err(MarkerProblem::Damaged(_)), None) if tries > 0 && state.shard().is_some() => {
                clock.sleep(MARK_POLL).await;
                continue;
            }
            (Err(problem), None) => return Err(format!("its marker {} {problem}", archive.marker_place())),
        };
        let mut marker = found.clone().unwrap_or_else(|| Marker::new(id.unwrap_or(reserved)));
        marker.states.insert(state_id);
        if found.as_ref() == Some(&marker) {
            break marker;
        }
        let written = archive.write_marker(&marker).await;
        // Shards that begin at the same time all add themselves.
        if written.is_err() && tries > 0 && state.shard().is_some() {
            clock.sleep(MARK_POLL).await;
            continue;
        }
        let failure = written.as_ref().err().map(|error| chain(error));
        if !written.as_ref().is_err_and(SinkError::is_full) {
            remember_write(state, clock, &name, failure).await?;
        }
        written.map_err(|error| chain(&error))?;
        break marker;
    };
    let id = marker.id;
    let remember = move |all: &mut Archives| {
        let memory = all.archives.entry(name).or_default();
        (memory.id, memory.reserved, memory.was_new) = (Some(id), None, false);
    };
    state.change_archives(clock, remember).await.map_err(|error| chain(&error))
}

impl Runner {
    /// Looks at an archive.
    ///
    /// # Errors
    /// Why it can't be read or is not there, as the end of a sentence about it.
    pub(crate) async fn look_at(&self, looker: &Looker, name: &ArchiveName) -> Result<Found, String> {
        match (self.archives.get(name), self.archive_rules.get(name)) {
            (Some(archive), Some(rules)) => looker.look(archive, &rules.guard).await,
            _ => Err("it is not configured".to_owned()),
        }
    }

    /// Looks whether something may be stored in an archive, which gets its marker if it is used for the first time.
    ///
    /// # Errors
    /// Why nothing may be stored there, as a sentence.
    pub(crate) async fn make_ready(&self, name: &ArchiveName) -> Result<(), String> {
        let looker = Looker::new(&self.state).await?;
        let found = self.look_at(&looker, name).await?;
        if !found.presence.is_first_use() {
            return Ok(());
        }
        let archive = self.archives.get(name).ok_or_else(|| format!("archive {name} is not configured"))?;
        let rested_on = found.memory.rested_on;
        mark(&self.state, &*self.clock, &*self.randomness, archive, None, rested_on).await
    }

    /// Looks at an archive, for metrics and status.
    pub async fn archive_stats(&self, archive: &Archive) -> ArchiveStats {
        let free_bytes = archive.free_bytes().await;
        let found = match Looker::new(&self.state).await {
            Ok(looker) => self.look_at(&looker, archive.name()).await,
            Err(error) => Err(error),
        };
        match found {
            Ok(found) => {
                let stats = ArchiveStats::of(&found.catalogue, free_bytes);
                let corrupt = stats.corrupt.max(found.vanished.len() as u64);
                let noncurrent_bytes = match archive.versions(&[]).await {
                    Ok(versions) => versions.map(|versions| versions.bytes),
                    Err(error) => {
                        debug!(
                            "archive {}: its noncurrent versions are not known: {}",
                            archive.name(),
                            chain(&error)
                        );
                        None
                    }
                };
                ArchiveStats { corrupt, noncurrent_bytes, ..stats }
            }
            Err(error) => ArchiveStats { free_bytes, error: Some(error), ..ArchiveStats::default() },
        }
    }
}
