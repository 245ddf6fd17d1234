//! Marks this state's holds in the archives, so that the pruning of other hosts sees them.
//!
//! The state directory has the holds; the marks repeat them. They are set when a hold is put, and again by each run, for
//! copies that are new and archives that were not there. Only `unhold` removes them: a state directory that was restored from
//! an older backup knows fewer holds than it put, and in doubt a copy is kept.

use jiff::Timestamp;
use serde_json::json;
use uuid::Uuid;

use crate::archive::backend::Archive;
use crate::archive::catalogue::Catalogue;
use crate::archive::layout::HoldMark;
use crate::archive::manifest_update::UpdateError;
use crate::clock::Clock;
use crate::copies::CopyId;
use crate::policy::name::ArchiveName;
use crate::randomness::{Randomness, fresh_id};
use crate::run::archive_presence::Presence;
use crate::run::context::Runner;
use crate::run::list::Listing;
use crate::snapshot::SnapshotId;
use crate::state::archives::Archives;
use crate::state::directory::StateDirectory;
use crate::state::holds::Hold;
use crate::text::chain;

/// Marks holds in archives, as this state directory.
pub struct HoldMarker<'a> {
    state_id: Uuid,
    host: &'a str,
    now: Timestamp,
}

impl<'a> HoldMarker<'a> {
    /// With the id by which this state directory is known in archives; it gets one if it has none yet.
    ///
    /// # Errors
    /// Why it gets none, as a sentence.
    pub async fn new(
        state: &StateDirectory,
        clock: &dyn Clock,
        randomness: &dyn Randomness,
        host: &'a str,
    ) -> Result<Self, String> {
        let now = clock.now();
        let known = state.archives().await.map_err(|error| chain(&error))?.state_id;
        let state_id = if let Some(id) = known {
            id
        } else {
            let new = fresh_id(randomness, now);
            let reserve = move |all: &mut Archives| *all.state_id.get_or_insert(new);
            state.change_archives(clock, reserve).await.map_err(|error| chain(&error))?
        };
        Ok(Self { state_id, host, now })
    }

    /// The id of this state directory.
    pub fn state_id(&self) -> Uuid {
        self.state_id
    }

    /// Marks a hold beside each copy of its snapshot that has an image and not this mark yet. Returns how many were marked.
    ///
    /// # Errors
    /// Why the first of them was not.
    pub async fn mark(
        &self,
        archive: &Archive,
        catalogue: &Catalogue,
        hold: &Hold,
    ) -> Result<usize, UpdateError> {
        let mark = self.mark_of(hold);
        let is_marked = catalogue.holds().get(&hold.snapshot).is_some_and(|marks| marks.contains(&mark));
        if is_marked || !hold.counts_at(self.now) {
            return Ok(0);
        }
        let mut count = 0;
        let copies = catalogue.unpruned().chain(catalogue.corrupt());
        for copy in copies.filter(|copy| copy.manifest.snapshot.id == hold.snapshot) {
            count += usize::from(self.mark_copy(archive, hold, &copy.manifest.id()).await?);
        }
        Ok(count)
    }

    /// Marks a hold beside one copy of its snapshot; false if that has no image any more.
    ///
    /// # Errors
    /// Why it was not marked.
    pub(crate) async fn mark_copy(
        &self,
        archive: &Archive,
        hold: &Hold,
        id: &CopyId,
    ) -> Result<bool, UpdateError> {
        let text = json!({
            "snapshot": hold.snapshot,
            "state": self.state_id,
            "host": self.host,
            "since": hold.since,
            "until": hold.until,
            "reason": hold.reason,
        });
        archive.mark_hold(id, self.mark_of(hold), format!("{text:#}\n").into_bytes()).await
    }

    fn mark_of(&self, hold: &Hold) -> HoldMark {
        HoldMark::new(self.state_id, hold.until)
    }

    /// Removes the marks of holds on a snapshot that this state directory put there, or all. Returns how many.
    ///
    /// # Errors
    /// Why the first of them stays.
    pub async fn unmark(
        &self,
        archive: &Archive,
        catalogue: &Catalogue,
        snapshot: SnapshotId,
        all: bool,
    ) -> Result<usize, UpdateError> {
        if !catalogue.holds().contains_key(&snapshot) {
            return Ok(0);
        }
        let of = (!all).then_some(self.state_id);
        let copies = catalogue.copies().iter().chain(catalogue.corrupt());
        let mut count = 0;
        for copy in copies.filter(|copy| copy.manifest.snapshot.id == snapshot) {
            count += archive.remove_holds(&copy.manifest.id(), of).await?;
        }
        Ok(count)
    }
}

impl Runner {
    /// Marks this state's holds in the archives of a listing. Returns what failed.
    pub(crate) async fn mark_holds(&self, listing: &Listing) -> Vec<String> {
        let holds = match self.state.holds().await {
            Ok(holds) if holds.holds.is_empty() => return Vec::new(),
            Ok(holds) => holds.holds,
            Err(error) => return vec![format!("holds are not marked in the archives: {}", chain(&error))],
        };
        let marker = HoldMarker::new(&self.state, &*self.clock, &*self.randomness, &self.host).await;
        let marker = match marker {
            Ok(marker) => marker,
            Err(why) => return vec![format!("holds are not marked in the archives: {why}")],
        };
        let known =
            listing.catalogues.iter().filter(|(name, _)| listing.presence(name) == Some(&Presence::Known));
        let mut failures = Vec::new();
        for (name, catalogue) in known.filter_map(|(name, catalogue)| Some((name, catalogue.as_ref().ok()?)))
        {
            let Some(archive) = self.archives.get(name) else { continue };
            for hold in &holds {
                if let Err(error) = marker.mark(archive, catalogue, hold).await {
                    failures.push(unmarked_text(name, hold.snapshot, &error));
                    break;
                }
            }
        }
        failures
    }
}

/// That a hold is not marked in an archive, and what that means.
pub fn unmarked_text(archive: &ArchiveName, snapshot: SnapshotId, error: &UpdateError) -> String {
    format!(
        "archive {archive}: the hold on snapshot {snapshot} is not marked there, so a pruning by another host does not see it; \
         the next run tries again: {}",
        chain(error)
    )
}
