//! Verifies an archive again, and remembers what could not be written into it.

use crate::archive::backend::Archive;
use crate::archive::catalogue::{CopyFilter, StoredCopy};
use crate::archive::manifest_update::UpdateError;
use crate::archive::verify::{Outcome, Verification, Verified, due, verify};
use crate::clock::Clock;
use crate::randomness::Randomness;
use crate::run::archive_presence::exclude_corrupt;
use crate::run::context::Runner;
use crate::state::archives::{ArchiveMemory, CorruptCopy};
use crate::state::directory::StateDirectory;
use crate::text::chain;

/// Verifies one archive.
#[derive(Debug, Clone, Copy)]
pub struct ArchiveVerifier<'a> {
    pub(crate) state: &'a StateDirectory,
    pub(crate) clock: &'a dyn Clock,
    pub(crate) randomness: &'a dyn Randomness,
    pub(crate) archive: &'a Archive,
    /// The copies that are read again.
    pub(crate) only: &'a CopyFilter,
}

/// Every copy.
const ALL: CopyFilter = CopyFilter { instance: None, zone: None };

impl Runner {
    /// The verifier of this archive.
    pub fn verifier<'a>(&'a self, archive: &'a Archive) -> ArchiveVerifier<'a> {
        let Self { state, clock, randomness, .. } = self;
        ArchiveVerifier { state, clock: &**clock, randomness: &**randomness, archive, only: &ALL }
    }
}

impl ArchiveVerifier<'_> {
    /// Reads a share of the images again, in percent, at least one; those come first whose last verification is oldest.
    /// `report` is called for each as soon as it is done.
    ///
    /// # Errors
    /// Why the archive can't be read; nothing was verified then.
    pub async fn verify(
        self,
        percent: u64,
        report: &(dyn Fn(&StoredCopy, &Outcome) + Send + Sync),
    ) -> Result<Verification, String> {
        let mut catalogue = self.archive.catalogue().await.map_err(|error| chain(&error))?;
        catalogue.retain_shard(self.state.shard());
        // If it can't be read, these are read again like all others.
        if let Ok(archives) = self.state.archives().await {
            exclude_corrupt(&mut catalogue, &archives.of(self.archive.name()));
        }
        catalogue.retain(self.only);
        let mut verification = Verification::of(&catalogue);
        for copy in due(&catalogue, percent) {
            let verified = verify(self.archive, &copy, self.clock, self.randomness).await;
            let outcome = self.remember(&copy, verified).await;
            report(&copy, &outcome);
            verification.copies.push((copy, outcome));
        }
        Ok(verification)
    }

    /// Remembers a corrupt copy that the archive does not say to be so, and how the write ended.
    async fn remember(&self, copy: &StoredCopy, verified: Verified) -> Outcome {
        let is_written = verified.is_written();
        let Verified { outcome, unwritten } = verified;
        let is_corrupt = matches!(outcome, Outcome::Corrupt(_));
        let failure = unwritten.as_ref().and_then(UpdateError::failed_write).map(|error| chain(error));
        let found = CorruptCopy { since: self.clock.now(), verified_at: copy.manifest.verified_at };
        let stem = copy.stem();
        let change = move |memory: &mut ArchiveMemory| {
            if is_written {
                memory.corrupt.remove(&stem);
                memory.write_failure = None;
            } else if is_corrupt {
                let known = memory.corrupt.entry(stem.clone()).or_insert(found);
                if known.verified_at != found.verified_at {
                    *known = found;
                }
            }
            if failure.is_some() {
                memory.write_failure.clone_from(&failure);
            }
        };
        let remembered = self.state.change_archive(self.clock, self.archive.name(), change).await;
        match (outcome, remembered) {
            (Outcome::Corrupt(why), _) if is_written => {
                Outcome::Corrupt(format!("{why}; the copy does not count any more"))
            }
            (Outcome::Corrupt(why), Ok(())) => Outcome::Corrupt(format!(
                "{why}; that is noted in the state directory instead, and the copy does not count any more"
            )),
            (Outcome::Corrupt(why), Err(error)) => Outcome::Corrupt(format!(
                "{why}; nor can that be noted in the state directory, so the copy still counts: {}",
                chain(&error)
            )),
            (outcome, _) => outcome,
        }
    }
}
