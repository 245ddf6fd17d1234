//! Verifies an archive again, and remembers what could not be written into it.

use std::num::NonZeroUsize;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _};

use crate::archive::backend::Archive;
use crate::archive::catalogue::{Catalogue, CopyFilter, Problem, StoredCopy};
use crate::archive::copy_reader::CopyReader;
use crate::archive::manifest_update::UpdateError;
use crate::archive::transfer::hash::Hashers;
use crate::archive::transfer::throttle::Throttle;
use crate::archive::verify::{Look, Outcome, Verification, Verified, due, look, verify};
use crate::clock::Clock;
use crate::randomness::Randomness;
use crate::run::archive_presence::exclude_corrupt;
use crate::run::context::Runner;
use crate::run::downloads::ReadWatch;
use crate::state::archives::{ArchiveMemory, CorruptCopy};
use crate::state::directory::StateDirectory;
use crate::text::chain;

/// How many images are read at a time, unless a command says otherwise: one more than most machines hash at once, so that the
/// disk and the network stay busy.
pub const CONCURRENCY: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1);

/// How many images are looked at at a time: each takes a short request.
const LOOKS: usize = 8;

/// Verifies one archive.
#[derive(Debug, Clone, Copy)]
pub struct ArchiveVerifier<'a> {
    pub(crate) state: &'a StateDirectory,
    pub(crate) clock: &'a dyn Clock,
    pub(crate) randomness: &'a dyn Randomness,
    pub(crate) archive: &'a Archive,
    /// They verify the bytes.
    pub(crate) hashers: &'a Hashers,
    /// The copies that are read again.
    pub(crate) only: &'a CopyFilter,
    /// How many are read at a time.
    pub(crate) concurrency: NonZeroUsize,
    /// Keeps all reading below a rate.
    pub(crate) throttle: Option<&'a Throttle>,
    /// Shows the reading.
    pub(crate) watch: Option<ReadWatch<'a>>,
}

/// Every copy.
const ALL: CopyFilter = CopyFilter { instance: None, zone: None };

impl Runner {
    /// The verifier of this archive.
    pub fn verifier<'a>(&'a self, archive: &'a Archive) -> ArchiveVerifier<'a> {
        let Self { state, clock, randomness, hashers, .. } = self;
        let (clock, randomness) = (&**clock, &**randomness);
        ArchiveVerifier {
            state,
            clock,
            randomness,
            archive,
            hashers,
            only: &ALL,
            concurrency: CONCURRENCY,
            throttle: None,
            watch: None,
        }
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
        let catalogue = self.catalogue().await?;
        let mut verification = Verification::of(&catalogue);
        let mut reads: Vec<BoxFuture<'_, _>> = Vec::new();
        for copy in due(&catalogue, percent, self.clock.now()) {
            let Self { clock, randomness, hashers, throttle, watch, .. } = self;
            let read = async move {
                let shown = watch.map(|watch| watch.begin("verifying", self.archive.name(), &copy.manifest));
                let progress = |progress| shown.iter().for_each(|shown| shown.note_all(progress));
                let reader = CopyReader {
                    throttle,
                    progress: &progress,
                    ..CopyReader::new(clock, randomness, hashers)
                };
                let verified = verify(self.archive, &copy, reader).await;
                let outcome = self.remember(&copy, verified).await;
                report(&copy, &outcome);
                (copy, outcome)
            };
            reads.push(read.boxed());
        }
        verification.copies = stream::iter(reads).buffered(self.concurrency.get()).collect().await;
        Ok(verification)
    }

    /// Compares what the archive says of its images with the manifests, without reading a byte. Nothing is recorded.
    ///
    /// # Errors
    /// Why the archive can't be read.
    pub async fn look(self) -> Result<(Vec<(StoredCopy, Look)>, Vec<Problem>), String> {
        let catalogue = self.catalogue().await?;
        let mut looks: Vec<BoxFuture<'_, _>> = Vec::new();
        for copy in catalogue.unpruned().cloned() {
            let look = async move {
                let found = look(self.archive, &copy).await;
                (copy, found)
            };
            looks.push(look.boxed());
        }
        let looks = stream::iter(looks).buffered(LOOKS).collect().await;
        Ok((looks, catalogue.damaged().cloned().collect()))
    }

    async fn catalogue(&self) -> Result<Catalogue, String> {
        let mut catalogue = self.archive.catalogue().await.map_err(|error| chain(&error))?;
        catalogue.retain_shard(self.state.shard());
        // If it can't be read, these are read again like all others.
        if let Ok(archives) = self.state.archives().await {
            exclude_corrupt(&mut catalogue, &archives.of(self.archive.name()));
        }
        catalogue.retain(self.only);
        Ok(catalogue)
    }

    /// Remembers a corrupt copy that the archive does not say to be so, and how the write ended.
    async fn remember(&self, copy: &StoredCopy, verified: Verified) -> Outcome {
        let is_written = verified.is_written();
        let Verified { outcome, unwritten } = verified;
        let is_corrupt = matches!(outcome, Outcome::Corrupt(_));
        // The archive says so already: nothing had to be written, so nothing is known of how a write would end.
        let was_marked = is_corrupt && copy.manifest.corrupt_since.is_some();
        let failure = unwritten.as_ref().and_then(UpdateError::failed_write).map(|error| chain(error));
        let found = CorruptCopy { since: self.clock.now(), verified_at: copy.manifest.verified_at };
        let stem = copy.stem();
        let is_new_corruption = is_corrupt && !was_marked && self.archive.shares_data();
        let change = move |memory: &mut ArchiveMemory| {
            if is_new_corruption && !memory.corrupt.contains_key(&stem) {
                memory.corruption_at = Some(found.since);
            }
            if is_written {
                memory.corrupt.remove(&stem);
                if !was_marked {
                    memory.write_failure = None;
                }
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
