//! Locks the copies that an archive keeps, where its bucket can: until then their bytes cannot be deleted, not even with the key of
//! this program.
//!
//! Each run does it after its exports, and before anything is deleted that needs these copies. A copy is locked until the archive's
//! retention would delete it, and no longer than `lock_for` from now; a later run locks it again. Locks are never shortened.
//! What was locked is remembered, so that only what changed costs a request.

use std::collections::{BTreeMap, HashMap};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _};
use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;

use crate::archive::backend::{Archive, ArchiveError};
use crate::archive::catalogue::StoredCopy;
use crate::policy::{Export, Policy};
use crate::retention::plan::Decision;
use crate::retention::verdict::Verdict;
use crate::run::archive_presence::{Looker, Presence};
use crate::run::archive_retention::Judged;
use crate::run::context::Runner;
use crate::run::zone_run::ZoneRun;
use crate::snapshot::{SnapshotId, ZoneName};
use crate::state::archives::{ArchiveMemory, CopyLock};
use crate::text::{chain, counted};

/// Copies that are locked at once: a store answers each request in some ten milliseconds, and there may be thousands.
const LOCKERS: usize = 8;

/// A lock is made longer only if that adds more than this part of it: runs of every hour would pay for every copy each time.
const STEPS: i32 = 100;

/// What is to be done about one copy.
struct Task<'a> {
    copy: &'a StoredCopy,
    /// None: the retention deletes it now.
    until: Option<Timestamp>,
    is_held: bool,
    known: Option<CopyLock>,
}

impl Task<'_> {
    /// Does what is missing, and returns what is to be remembered. A lock that ends at most `step` early is long enough.
    async fn carry_out(
        &self,
        archive: &Archive,
        step: SignedDuration,
    ) -> Result<Option<CopyLock>, ArchiveError> {
        let (is_held, verified_at) = (self.is_held, self.copy.manifest.verified_at);
        // A manifest that was written since is another version.
        let valid = self.known.filter(|known| known.verified_at == verified_at);
        if is_held != self.known.is_some_and(|known| known.is_held) || (is_held && valid.is_none()) {
            archive.set_legal_hold(self.copy, is_held).await?;
        }
        let is_enough = |known: Timestamp, until| known.checked_add(step).is_ok_and(|known| until <= known);
        let until = match (self.until, valid) {
            (Some(until), Some(known)) if is_enough(known.until, until) => known.until,
            (Some(until), _) => {
                archive.lock_copy(self.copy, until).await?;
                self.known.map_or(until, |known| until.max(known.until))
            }
            (None, Some(known)) => known.until,
            (None, None) => return Ok(None),
        };
        Ok(Some(CopyLock { until, verified_at, is_held }))
    }
}

impl Runner {
    /// Locks the copies in the archives of the policy, as far as these lock any. Failures are in the report.
    pub(super) async fn lock_copies(
        &self,
        policy: &Policy,
        export: &Export,
        zones: &mut [ZoneRun],
        stop: &CancellationToken,
    ) {
        for name in &export.archives {
            let Some(archive) = self.archives.get(name) else { continue };
            let now = self.clock.now();
            let Some(longest) = archive.lock_until(now).filter(|_| !stop.is_cancelled()) else { continue };
            let Some(rules) = self.archive_rules.get(name) else { continue };
            // A wrong clock would lock for years.
            let failure = if self.is_clock_right(policy, &rules.guard, zones).await {
                self.lock_archive(archive, now, longest).await.err()
            } else {
                Some("this machine's clock may be wrong".to_owned())
            };
            // It concerns the archive, and a report has zones alone: it is said once, in the first.
            if let Some(ZoneRun { report, .. }) = zones.first_mut() {
                let text = |why| format!("archive {name}: copies are not locked: {why}");
                report.failures.extend(failure.map(text));
            }
        }
    }

    /// Locks what an archive keeps.
    ///
    /// # Errors
    /// Why some are not locked, as a sentence.
    async fn lock_archive(
        &self,
        archive: &Archive,
        now: Timestamp,
        longest: Timestamp,
    ) -> Result<(), String> {
        let name = archive.name();
        let found = self.look_at(&Looker::new(&self.state).await?, name).await?;
        // One that is not there is in the report already.
        if let Presence::Closed(_) | Presence::Unadopted = found.presence {
            return Ok(());
        }
        let rules = self.archive_rules.get(name).ok_or("it is not configured")?;
        let holds = &self.state.holds().await.map_err(|error| chain(&error))?;
        let (catalogue, memory) = (&*found.catalogue, &found.memory);
        let states = &*self.state.all_policy_states().await.map_err(|error| chain(&error))?;
        let policies = &*self.policies;
        let judged = Judged {
            archive: name,
            rules,
            policies,
            states,
            catalogue,
            holds,
            memory,
            allowances: &[],
            coming: &[],
        };
        let mut kept: BTreeMap<&ZoneName, Option<HashMap<SnapshotId, Decision>>> = BTreeMap::new();
        let mut tasks = Vec::new();
        for copy in catalogue.unpruned() {
            let (zone, id) = (&copy.manifest.zone, copy.manifest.snapshot.id);
            let kept = kept.entry(zone).or_insert_with(|| judged.kept(zone, now));
            let decision = kept.as_ref().and_then(|kept| kept.get(&id));
            let until = match decision {
                Some(decision) if decision.verdict == Verdict::Delete => None,
                Some(Decision { expires_at: Some(expires_at), .. }) => Some(longest.min(*expires_at)),
                // Kept without end, or for an unknown time.
                _ => Some(longest),
            };
            let mut marks = catalogue.holds().get(&id).into_iter().flatten();
            let is_held = holds.on(id, now).is_some() || marks.any(|mark| mark.counts_at(now));
            let known = memory.locked.get(&copy.stem()).copied();
            tasks.push(Task { copy, until: until.filter(|until| *until > now), is_held, known });
        }

        let step = longest.duration_since(now) / STEPS;
        let mut work: Vec<BoxFuture<'_, _>> = Vec::new();
        for task in &tasks {
            work.push(async move { (task, task.carry_out(archive, step).await) }.boxed());
        }
        let (mut locked, mut failed, mut first) = (BTreeMap::new(), 0, None);
        let done: Vec<_> = stream::iter(work).buffer_unordered(LOCKERS).collect().await;
        for (task, done) in done {
            let lock = done.unwrap_or_else(|error| {
                failed += 1;
                first.get_or_insert_with(|| chain(&error));
                task.known
            });
            locked.extend(lock.map(|lock| (task.copy.stem(), lock)));
        }
        let remember = move |memory: &mut ArchiveMemory| memory.locked.clone_from(&locked);
        let remembered = self.state.change_archive(&*self.clock, name, remember).await;
        if let Some(why) = first {
            return Err(format!("{} of {}; the first: {why}", failed, counted(tasks.len(), "copy")));
        }
        remembered.map_err(|error| format!("they are, but this is not remembered: {}", chain(&error)))
    }
}
