//! Takes an archive over: one that another state directory used, one from which copies vanished, or a new empty one.

use std::collections::BTreeMap;
use std::sync::Arc;

use uuid::Uuid;

use crate::archive::backend::Archive;
use crate::archive::marker::MarkerProblem;
use crate::clock::Clock;
use crate::randomness::{Randomness, fresh_id};
use crate::run::archive_presence::mark;
use crate::run::archive_rules::kept_by_others;
use crate::state::archives::{ArchiveMemory, Archives};
use crate::state::directory::StateDirectory;
use crate::text::chain;

/// What was taken over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adopted {
    /// Verified copies in the archive.
    pub copies: usize,
    /// Copies that this state remembered, and that are not there any more.
    pub vanished: Vec<String>,
    /// Whether the archive was in use, by its marker, before this state knew it.
    pub was_foreign: bool,
}

/// Writes the marker if the archive has none that can be read, and remembers the archive as it is from now on.
///
/// # Errors
/// Why it can't be taken over, as a sentence.
pub async fn adopt(
    state: &StateDirectory,
    clock: &dyn Clock,
    randomness: &dyn Randomness,
    archive: &Archive,
) -> Result<Adopted, String> {
    let name = archive.name().clone();
    let mut catalogue = archive.catalogue().await.map_err(|error| chain(&error))?;
    catalogue.retain_shard(state.shard());
    let found: Option<Uuid> = match catalogue.marker() {
        Ok(marker) => marker.as_ref().map(|marker| marker.id),
        Err(problem @ (MarkerProblem::Later(_) | MarkerProblem::Unreadable(_))) => {
            return Err(format!("its marker {} {problem}", archive.marker_place()));
        }
        Err(MarkerProblem::Damaged(_)) => None,
    };
    let memory = state.archives().await.map_err(|error| chain(&error))?.of_marked(&name, found);
    let copies = Arc::new(catalogue.present());
    // A new disk is another archive: the old one may come back, beside it or in its place.
    let is_same = memory.copies.is_empty() || memory.copies.iter().any(|copy| copies.contains(&copy));
    let known = memory.id.filter(|_| is_same);
    let id = known.unwrap_or_else(|| fresh_id(randomness, clock.now()));
    let is_ours = known.is_some() && (found.is_none() || found == known);
    let rested_on = if is_ours { BTreeMap::new() } else { kept_by_others(&catalogue)? };
    mark(state, clock, randomness, archive, Some(id), rested_on).await?;
    let adopted = Adopted {
        copies: copies.len(),
        vanished: catalogue.vanished(&memory.copies).iter().map(ToString::to_string).collect(),
        was_foreign: found.is_some() && found != memory.id,
    };
    let remember = move |all: &mut Archives| {
        let now = all.of(&name);
        let mut adopted = ArchiveMemory { id: now.id, copies, write_failure: None, was_new: false, ..memory };
        // What another process found since that was read.
        adopted.corrupt.extend(now.corrupt);
        adopted.corruption_at = adopted.corruption_at.max(now.corruption_at);
        adopted.locked.extend(now.locked);
        adopted.rested_on.extend(now.rested_on);
        all.archives.insert(name, adopted);
    };
    state.change_archives(clock, remember).await.map_err(|error| chain(&error))?;
    Ok(adopted)
}
