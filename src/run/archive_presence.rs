//! Whether an archive is the one that this state used: by its marker, and by what is remembered of it.
//!
//! An empty folder may be an archive's first use, or the place at which its disk is not mounted. In doubt the archive is
//! not there: nothing is stored in it, and whatever needs a copy there is kept.

use std::sync::Arc;

use uuid::Uuid;

use crate::archive::backend::Archive;
use crate::archive::catalogue::Catalogue;
use crate::archive::marker::{MARKER_FILE, Marker};
use crate::archive::stats::ArchiveStats;
use crate::clock::Clock;
use crate::policy::Guard;
use crate::policy::name::ArchiveName;
use crate::randomness::{Randomness, fresh_id};
use crate::retention::guard::{VERY_FEW, is_beyond};
use crate::run::context::Runner;
use crate::state::archives::{ArchiveMemory, Archives};
use crate::state::directory::StateDirectory;
use crate::text::{chain, counted};

/// How many copies that vanished are named.
const NAMED: usize = 3;

/// How an archive that can be read stands to this state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Presence {
    /// It is the one that was used before.
    Known,
    /// Nothing speaks against using it for the first time.
    FirstUse,
    /// It is the one that was used before, but nothing may be deleted that needs a copy in it, for this reason.
    Closed(String),
    /// Others used it, and this state remembered no run when it first looked: it may have lost everything.
    Unadopted,
}

/// Looks at archives as this state remembers them.
#[derive(Debug, Clone)]
pub(crate) struct Looker {
    state: StateDirectory,
    archives: Archives,
    remembers_runs: bool,
}

/// An archive as it was found.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) catalogue: Arc<Catalogue>,
    pub(crate) presence: Presence,
    /// The remembered copies that vanished without a mark, if they are too many.
    pub(crate) vanished: Vec<String>,
}

impl Looker {
    /// Reads what the state remembers.
    ///
    /// # Errors
    /// Why that is unknown, as a sentence.
    pub(crate) async fn new(state: &StateDirectory) -> Result<Self, String> {
        let archives = state.archives().await.map_err(|error| chain(&error))?;
        let runs = state.all_last_runs().await.map_err(|error| chain(&error))?;
        let remembers_runs = runs.iter().any(|(_, runs)| runs.last.is_some());
        Ok(Self { state: state.clone(), archives, remembers_runs })
    }

    /// Reads an archive, and judges what was found.
    ///
    /// # Errors
    /// Why it can't be read or is not there, as the end of a sentence about it.
    pub(crate) async fn look(&self, archive: &Archive, guard: &Guard) -> Result<Found, String> {
        let mut catalogue = archive.catalogue().await.map_err(|error| chain(&error))?;
        let memory = self.archives.of(archive.name());
        let presence = self.presence(archive, &memory, &catalogue).await?;
        let vanished: Vec<String> = match &presence {
            Presence::Known => catalogue.vanished(&memory.copies).into_iter().map(str::to_owned).collect(),
            _ => Vec::new(),
        };
        catalogue.exclude_corrupt(&memory.corrupt);
        let (dropped, all) = (vanished.len() as u64, memory.copies.len() as u64);
        let is_drop = dropped > VERY_FEW && is_beyond(dropped, all, guard.max_listing_drop_percent);
        let presence = if is_drop {
            Presence::Closed(vanished_text(archive, &vanished, memory.copies.len()))
        } else if let (Some(why), Presence::Known) = (&memory.write_failure, &presence) {
            Presence::Closed(format!("the last write to it failed, so its copies are in doubt: {why}"))
        } else {
            presence
        };
        let vanished = if is_drop { vanished } else { Vec::new() };
        Ok(Found { catalogue: Arc::new(catalogue), presence, vanished })
    }

    async fn presence(
        &self,
        archive: &Archive,
        memory: &ArchiveMemory,
        catalogue: &Catalogue,
    ) -> Result<Presence, String> {
        let (name, place) = (archive.name(), archive.marker_place());
        let adopt = format!("if this is the right archive, take it over: snapwarden archive adopt {name}");
        let was_new = memory.was_new || (memory.id.is_none() && !self.remembers_runs);
        let marker = catalogue.marker().as_ref().map_err(|problem| {
            format!(
                "its marker {place} {problem}; look at that file, and restore it from a backup or another copy; {adopt}"
            )
        })?;
        match (marker, memory.id) {
            (Some(marker), Some(id)) if marker.id == id => Ok(Presence::Known),
            (Some(_), Some(_)) => Err(format!(
                "it is not there: {place} is the marker of another archive; mount the right one; {adopt}"
            )),
            (Some(marker), None) => {
                let is_ours = self.archives.state_id.is_some_and(|id| marker.states.contains(&id));
                Ok(if was_new && !is_ours { Presence::Unadopted } else { Presence::FirstUse })
            }
            (None, Some(_)) => Err(missing_text(archive, &adopt)),
            (None, None) if !catalogue.copies().is_empty() || !catalogue.problems().is_empty() => {
                Ok(if was_new { Presence::Unadopted } else { Presence::FirstUse })
            }
            (None, None) => {
                // From before there were markers.
                let used =
                    self.remembers_runs && self.state.has_export_to(name).await.map_err(|e| chain(&e))?;
                if used { Err(missing_text(archive, &adopt)) } else { Ok(Presence::FirstUse) }
            }
        }
    }

    /// Whether the state directory remembers any run.
    pub(crate) fn remembers_runs(&self) -> bool {
        self.remembers_runs
    }
}

fn missing_text(archive: &Archive, adopt: &str) -> String {
    format!(
        "it is not there: images were stored in it, and {} has no {MARKER_FILE}: is its disk not mounted? Mount it; {adopt}",
        archive.place()
    )
}

fn vanished_text(archive: &Archive, vanished: &[String], of: usize) -> String {
    let name = archive.name();
    let named =
        vanished.iter().take(NAMED).map(|stem| format!("{stem}.qcow2")).collect::<Vec<_>>().join(", ");
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

/// Writes the marker if the archive has none yet, with this state among those that use it, and remembers it.
///
/// # Errors
/// Why the archive can't be used, as a sentence.
pub(crate) async fn mark(
    state: &StateDirectory,
    clock: &dyn Clock,
    randomness: &dyn Randomness,
    archive: &Archive,
    id: Option<Uuid>,
) -> Result<(), String> {
    let name = archive.name().clone();
    let new_id = || fresh_id(randomness, clock.now());
    let (new_state, new_archive) = (new_id(), id.unwrap_or_else(new_id));
    // Remembered before it stands in a marker: after a crash between the two, the marker is known as ours.
    let of = name.clone();
    let reserve = move |all: &mut Archives| {
        let state_id = *all.state_id.get_or_insert(new_state);
        let memory = all.archives.entry(of).or_default();
        (state_id, *memory.reserved.get_or_insert(new_archive))
    };
    let (state_id, reserved) = state.change_archives(clock, reserve).await.map_err(|error| chain(&error))?;
    let found = archive.marker().await.map_err(|error| chain(&error))?;
    let found = match (found, id) {
        (Ok(found), _) => found,
        // Whoever takes it over has seen that it is damaged.
        (Err(_), Some(_)) => None,
        (Err(problem), None) => return Err(format!("its marker {} {problem}", archive.marker_place())),
    };
    let mut marker = found.clone().unwrap_or_else(|| Marker::new(id.unwrap_or(reserved)));
    marker.states.insert(state_id);
    if found.as_ref() != Some(&marker) {
        archive.write_marker(&marker).await.map_err(|error| chain(&error))?;
    }
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

    /// Looks at an archive, for metrics and status.
    pub(crate) async fn archive_stats(&self, archive: &Archive) -> ArchiveStats {
        let free_bytes = archive.free_bytes().await;
        let found = match Looker::new(&self.state).await {
            Ok(looker) => self.look_at(&looker, archive.name()).await,
            Err(error) => Err(error),
        };
        match found {
            Ok(found) => {
                let stats = ArchiveStats::of(&found.catalogue, free_bytes);
                ArchiveStats { corrupt: stats.corrupt.max(found.vanished.len() as u64), ..stats }
            }
            Err(error) => ArchiveStats { free_bytes, error: Some(error), ..ArchiveStats::default() },
        }
    }

    /// Writes the marker of an archive that is used for the first time, and remembers it.
    ///
    /// # Errors
    /// Why the archive can't be used, as a sentence.
    pub(crate) async fn mark_archive(&self, name: &ArchiveName) -> Result<(), String> {
        let archive = self.archives.get(name).ok_or_else(|| format!("archive {name} is not configured"))?;
        mark(&self.state, &*self.clock, &*self.randomness, archive, None).await
    }
}
