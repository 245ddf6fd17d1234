//! Remembers what a run found in the archives, for later runs to compare with.

use std::collections::BTreeSet;
use std::sync::Arc;

use uuid::Uuid;

use crate::policy::name::ArchiveName;
use crate::policy::shard::Shard;
use crate::retention::guard::is_clock_trusted;
use crate::run::archive_adopt::{Adopted, adopt};
use crate::run::archive_presence::Presence;
use crate::run::archive_rules::remember;
use crate::run::context::Runner;
use crate::run::list::Listing;
use crate::snapshot::ZoneName;
use crate::state::archives::{ArchiveMemory, Archives};
use crate::state::error::StateError;
use crate::state::last_runs::LastRuns;
use crate::text::chain;

impl Runner {
    /// Remembers that this state knew none of the archives before its first run: it may have lost everything. That must be
    /// on disk before anything of the run is: the next run finds a state that remembers one.
    ///
    /// # Errors
    /// [`StateError`]: then the run must not begin.
    pub(crate) async fn remember_new_archives(&self, last_runs: &LastRuns) -> Result<(), StateError> {
        let is_first = |runs: &LastRuns| runs.last.is_none();
        if !is_first(last_runs) || !self.state.all_last_runs().await?.iter().all(|(_, runs)| is_first(runs)) {
            return Ok(());
        }
        let names: Vec<ArchiveName> = self.archives.keys().cloned().collect();
        let remember = move |all: &mut Archives| {
            for name in names {
                let memory = all.archives.entry(name).or_default();
                memory.was_new |= memory.id.is_none();
            }
        };
        self.state.change_archives(&*self.clock, remember).await
    }

    /// Gives its marker to each archive of a listing that has copies already, and moves what is remembered of one by another
    /// name. Returns what failed.
    pub(crate) async fn mark_used_archives(&self, listing: &Listing) -> Vec<String> {
        let ids = listing.catalogues.iter().filter_map(|(name, catalogue)| {
            Some((name.clone(), catalogue.as_ref().ok()?.marker().as_ref().ok()?.as_ref()?.id))
        });
        let ids: Vec<(ArchiveName, Uuid)> = ids.collect();
        let configured: BTreeSet<ArchiveName> = self.archives.keys().cloned().collect();
        let rename = move |all: &mut Archives| {
            for (name, id) in ids {
                let memory = all.of_marked(&name, Some(id));
                if memory.id.is_some() && all.of(&name).id.is_none() {
                    all.accept(name, memory, &configured);
                }
            }
        };
        let renamed = self.state.change_archives(&*self.clock, rename).await;
        let failure = |error| format!("another name of an archive is not remembered: {}", chain(&error));
        let mut failures: Vec<String> = renamed.err().map(failure).into_iter().collect();
        for (name, catalogue) in &listing.catalogues {
            let is_used = catalogue.as_ref().is_ok_and(|catalogue| {
                !catalogue.copies().is_empty()
                    || !catalogue.problems().is_empty()
                    || matches!(catalogue.marker(), Ok(Some(_)))
            });
            // The others wait for its marker, also where it has nothing to store.
            let is_first_shard = self.state.shard().is_some_and(Shard::is_first);
            if (is_used || is_first_shard) && listing.presence(name).is_some_and(Presence::is_first_use) {
                let marked = self.make_ready(name).await;
                failures.extend(marked.err().map(|why| format!("archive {name} gets no marker: {why}")));
            }
        }
        failures
    }

    /// Remembers the copies in the archives of a listing, to find later what vanished, and by which rules they stay in these
    /// zones. Returns what failed.
    pub(crate) async fn accept_archives(&self, listing: &Listing, zones: &[ZoneName]) -> Vec<String> {
        let now = self.clock.now();
        let mut seen = Vec::new();
        for (name, catalogue) in &listing.catalogues {
            if listing.presence(name) != Some(&Presence::Known) {
                continue;
            }
            let (Ok(catalogue), Some(rules)) = (catalogue, self.archive_rules.get(name)) else { continue };
            let id = catalogue.marker().as_ref().ok().and_then(|marker| Some(marker.as_ref()?.id));
            // A clock in doubt must not make a change look older than it is.
            let is_trusted = is_clock_trusted(&rules.guard, listing.inventory.clock);
            let zones = if is_trusted { zones.to_vec() } else { Vec::new() };
            seen.push((name.clone(), id, Arc::new(catalogue.present()), rules.clone(), zones));
        }
        let configured: BTreeSet<ArchiveName> = self.archives.keys().cloned().collect();
        let policies = self.policies.clone();
        let accept = move |all: &mut Archives| {
            let mut failures = Vec::new();
            for (name, id, copies, rules, zones) in seen {
                let mut memory = ArchiveMemory { id, copies, ..all.of_marked(&name, id) };
                for zone in zones {
                    match remember(&name, (&rules, &policies), &memory, &zone, now) {
                        Ok(rested_on) => memory.rested_on.extend(rested_on.map(|memory| (zone, memory))),
                        Err(why) => failures.push(why),
                    }
                }
                all.accept(name, memory, &configured);
            }
            failures
        };
        match self.state.change_archives(&*self.clock, accept).await {
            Ok(failures) => failures,
            Err(error) => vec![format!("the copies in the archives are not remembered: {}", chain(&error))],
        }
    }

    /// Takes an archive over as it is: see [`adopt`].
    ///
    /// # Errors
    /// Why it can't be taken over, as a sentence.
    pub async fn adopt_archive(&self, name: &ArchiveName) -> Result<Adopted, String> {
        let archive = self.archives.get(name).ok_or_else(|| format!("archive {name} is not configured"))?;
        adopt(&self.state, &*self.clock, &*self.randomness, archive).await
    }
}
