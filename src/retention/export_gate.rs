//! The export gate: verified copies that must exist before a snapshot may be deleted.

use std::collections::{HashMap, HashSet};
use std::fmt::{self, Display};
use std::sync::Arc;

use jiff::Timestamp;

use crate::policy::name::ArchiveName;
use crate::policy::{Policy, Which};
use crate::retention::expiry::first_second_from;
use crate::retention::grouping::counted_from;
use crate::retention::inventory::{ArchivedCopy, Copies, Inventory};
use crate::retention::verdict::CopyNeeded;
use crate::snapshot::{InstanceId, Snapshot, SnapshotId};
use crate::text::excerpt;

/// The most characters that are repeated of another program's words.
const QUOTED_CHARACTERS: usize = 500;

/// A copy that some policy requires, and what its archive holds.
#[derive(Debug)]
pub(crate) struct Requirement {
    pub(crate) copy: CopyNeeded,
    /// Why it keeps the snapshots for which it does not pass.
    pub(crate) unmet: Arc<Unmet>,
    copies: Arc<CopyIndex>,
    /// Those that have the copy of the last due run of a policy that does not prune.
    up_to_date: Option<UpToDate>,
}

/// The instances of which the newest snapshot was exported by the last due run of a policy, or since.
#[derive(Debug)]
struct UpToDate {
    instances: HashSet<InstanceId>,
    /// The second at which the policy is due again; then they are not up to date any more.
    until: i64,
}

/// Why a requirement is not met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unmet {
    Missing(CopyNeeded),
    Unreachable {
        archive: ArchiveName,
        /// May hold another program's words.
        cause: Box<str>,
    },
    /// Not a copy is missing, but all that this program knew: nothing may be deleted.
    Unadopted(ArchiveName),
}

impl Unmet {
    pub(crate) fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Unadopted(_))
    }
}

/// What an archive holds, made for looking up.
#[derive(Debug)]
enum CopyIndex {
    Unreachable(Box<str>),
    Assumed,
    Known { snapshots: HashSet<SnapshotId>, instances: HashMap<InstanceId, NewestCopy> },
}

/// The newest copy of an instance.
#[derive(Debug, Default)]
struct NewestCopy {
    /// Of those that are not dated in the future: those do not count yet.
    counted: Option<(Timestamp, SnapshotId)>,
    /// When the first of the others will count.
    counts_from: Option<Timestamp>,
}

/// The requirements of each of these policies, in their order, each with when it was paused: then only the copies of that
/// time count. Equal ones are shared.
pub(crate) fn requirements<'p>(
    policies: impl Iterator<Item = (&'p Policy, Option<Timestamp>)>,
    inventory: &Inventory,
    now: Timestamp,
) -> Vec<Vec<Arc<Requirement>>> {
    let mut indexes: HashMap<ArchiveName, Arc<CopyIndex>> = HashMap::new();
    let mut known: Vec<Arc<Requirement>> = Vec::new();
    let mut requirement = |policy: &Policy, paused_at: Option<Timestamp>, mut copy: CopyNeeded| {
        let mut up_to_date = None;
        if paused_at.is_some() {
            // Shared with none.
        } else if let Some((at, found)) = up_to_date_for(policy, &copy, inventory, now) {
            copy.or_since = Some(at);
            up_to_date = Some(found);
        } else if let Some(requirement) = known.iter().find(|requirement| requirement.copy == copy) {
            return requirement.clone();
        }
        let index = || Arc::new(CopyIndex::new(inventory.archives.get(&copy.archive), paused_at, now));
        let copies = match paused_at {
            Some(_) => index(),
            None => indexes.entry(copy.archive.clone()).or_insert_with(index).clone(),
        };
        let unmet = match &*copies {
            CopyIndex::Unreachable(cause) => {
                Unmet::Unreachable { archive: copy.archive.clone(), cause: cause.clone() }
            }
            CopyIndex::Assumed | CopyIndex::Known { .. } => Unmet::Missing(copy.clone()),
        };
        let is_shared = up_to_date.is_none() && paused_at.is_none();
        let requirement = Arc::new(Requirement { copy, unmet: Arc::new(unmet), copies, up_to_date });
        known.extend(is_shared.then(|| requirement.clone()));
        requirement
    };
    let unadopted = inventory.unadopted.as_ref().map(|archive| Arc::new(Requirement::unadopted(archive)));
    let requirements = policies.map(|(policy, paused_at)| {
        let own = required(policy).map(|copy| requirement(policy, paused_at, copy));
        unadopted.clone().into_iter().chain(own).collect()
    });
    requirements.collect()
}

/// Also of a policy without a retention table: a copy that is required is required of all that prune.
fn required(policy: &Policy) -> impl Iterator<Item = CopyNeeded> {
    let export = policy.export.iter().filter(|export| export.required);
    export.flat_map(|export| {
        export.archives.iter().map(|archive| CopyNeeded {
            archive: archive.clone(),
            of: export.snapshots,
            or_since: None,
        })
    })
}

/// When a policy was last due that exports the newest snapshots and does not prune, and the instances of which an archive
/// has the copy of that run. Such a policy would otherwise keep all that others take until it is due again.
///
/// None of a policy that is paused or has no schedule: its next run is not known.
fn up_to_date_for(
    policy: &Policy,
    copy: &CopyNeeded,
    inventory: &Inventory,
    now: Timestamp,
) -> Option<(Timestamp, UpToDate)> {
    if !policy.enabled || policy.retention.is_some() || copy.of != Which::Newest {
        return None;
    }
    let Some(Copies::Known(copies)) = inventory.archives.get(&copy.archive) else { return None };
    let schedule = policy.schedule.as_ref()?;
    let last_due = schedule.last_until(now, Timestamp::UNIX_EPOCH, &policy.time_zone)?;
    let until = schedule.next_after(now, &policy.time_zone).map_or(i64::MAX, first_second_from);
    let mut exported: HashMap<InstanceId, (Timestamp, SnapshotId)> = HashMap::new();
    for copy in copies {
        let is_of_run = copy.exported_at.is_some_and(|at| (last_due..=now).contains(&at));
        if is_of_run && counted_from(copy.created_at) <= now {
            let newest = exported.entry(copy.instance_id).or_insert((copy.created_at, copy.snapshot_id));
            *newest = (*newest).max((copy.created_at, copy.snapshot_id));
        }
    }
    // An older one could have been exported since for another reason.
    for snapshot in &inventory.snapshots {
        let Some(id) = snapshot.instance_id else { continue };
        let was_there = snapshot.created_at <= last_due && inventory.was_good(snapshot);
        let is_newer = exported.get(&id).is_some_and(|newest| (snapshot.created_at, snapshot.id) > *newest);
        if was_there && is_newer && policy.select.selects_snapshot(snapshot) {
            exported.remove(&id);
        }
    }
    Some((last_due, UpToDate { instances: exported.into_keys().collect(), until }))
}

impl Requirement {
    /// One that no copy meets.
    fn unadopted(archive: &ArchiveName) -> Self {
        Self {
            copy: CopyNeeded { archive: archive.clone(), of: Which::All, or_since: None },
            unmet: Arc::new(Unmet::Unadopted(archive.clone())),
            copies: Arc::new(CopyIndex::Unreachable("".into())),
            up_to_date: None,
        }
    }

    /// Whether a snapshot may be deleted as far as this copy is concerned. `newer_stays`: a newer good one of its instance
    /// is not deleted.
    pub(crate) fn passes(&self, snapshot: &Snapshot, newer_stays: bool) -> bool {
        self.is_up_to_date(snapshot, newer_stays).is_some() || self.has_copy_from(snapshot) == i64::MIN
    }

    /// The first second, `from` or later, at which it passes if nothing comes or changes; the last of all if it never does.
    pub(crate) fn passes_from(&self, snapshot: &Snapshot, newer_stays: bool, from: i64) -> i64 {
        match self.is_up_to_date(snapshot, newer_stays) {
            Some(until) if from < until => from,
            _ => from.max(self.has_copy_from(snapshot)),
        }
    }

    /// Until when the last due run's copy of its instance is enough for a snapshot, if it is.
    fn is_up_to_date(&self, snapshot: &Snapshot, newer_stays: bool) -> Option<i64> {
        let up_to_date = self.up_to_date.as_ref().filter(|_| newer_stays)?;
        let is_included = snapshot.instance_id.is_some_and(|id| up_to_date.instances.contains(&id));
        is_included.then_some(up_to_date.until)
    }

    /// The first second at which there is a copy of the snapshot or of a newer one, as it is required, if nothing comes or
    /// changes: the first of all if it is there now, the last of all if it never is.
    fn has_copy_from(&self, snapshot: &Snapshot) -> i64 {
        match &*self.copies {
            CopyIndex::Unreachable(_) => i64::MAX,
            CopyIndex::Assumed => i64::MIN,
            CopyIndex::Known { snapshots, instances } => {
                let newest = snapshot.instance_id.and_then(|id| instances.get(&id));
                let newest = newest.filter(|_| self.copy.of == Which::Newest);
                let itself_or_newer = Some((snapshot.created_at, snapshot.id));
                if newest.is_some_and(|newest| newest.counted >= itself_or_newer)
                    || snapshots.contains(&snapshot.id)
                {
                    i64::MIN
                } else {
                    newest.and_then(|newest| newest.counts_from).map_or(i64::MAX, first_second_from)
                }
            }
        }
    }
}

/// The copies to verify for these requirements, one for each archive; a copy of the snapshot itself is also one of it or
/// a newer one.
pub(crate) fn copies_needed<'r>(
    requirements: impl Iterator<Item = &'r Arc<Requirement>>,
    snapshot: &Snapshot,
) -> Vec<CopyNeeded> {
    let mut copies: Vec<CopyNeeded> = Vec::new();
    for requirement in requirements {
        let mut needed = requirement.copy.clone();
        needed.or_since = needed.or_since.filter(|_| requirement.has_copy_from(snapshot) != i64::MIN);
        match copies.iter_mut().find(|copy| copy.archive == needed.archive) {
            Some(copy) => {
                if needed.of == Which::All {
                    copy.of = Which::All;
                }
                // The later one is enough for both; where one policy has more than that, all do.
                copy.or_since = copy.or_since.zip(needed.or_since).map(|(one, other)| one.max(other));
            }
            None => copies.push(needed),
        }
    }
    copies
}

impl CopyIndex {
    fn new(copies: Option<&Copies>, paused_at: Option<Timestamp>, now: Timestamp) -> Self {
        match copies {
            None => Self::Unreachable("it was not asked".into()),
            Some(Copies::Unreachable(cause)) => Self::Unreachable(cause.as_str().into()),
            Some(Copies::Assumed) => Self::Assumed,
            Some(Copies::Known(copies)) => {
                // One that does not say when it was exported is of an early version, and so of before.
                let was_there = |copy: &&ArchivedCopy| {
                    paused_at.is_none_or(|then| copy.exported_at.is_none_or(|at| at <= then))
                };
                Self::known(copies.iter().filter(was_there), now)
            }
        }
    }

    fn known<'c>(copies: impl Iterator<Item = &'c ArchivedCopy>, now: Timestamp) -> Self {
        let mut instances: HashMap<InstanceId, NewestCopy> = HashMap::new();
        let mut snapshots = HashSet::new();
        for copy in copies {
            snapshots.insert(copy.snapshot_id);
            let newest = instances.entry(copy.instance_id).or_default();
            let counted_from = counted_from(copy.created_at);
            if counted_from <= now {
                newest.counted = newest.counted.max(Some((copy.created_at, copy.snapshot_id)));
            } else {
                let first = newest.counts_from.map_or(counted_from, |first| first.min(counted_from));
                newest.counts_from = Some(first);
            }
        }
        Self::Known { snapshots, instances }
    }
}

/// Why nothing is deleted beside an archive that others used, and what to do.
pub(crate) fn unadopted_text(archive: &ArchiveName) -> String {
    format!(
        "archive `{archive}` was used before, but this state directory remembers no run, so its holds and all else that \
         keeps snapshots may be lost: nothing is deleted; bring the state directory back, or, if it is right, take the \
         archive over: snapwarden archive adopt {archive}"
    )
}

impl Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(CopyNeeded { archive, of: Which::Newest, or_since }) => {
                write!(f, "no verified copy of it or a newer one in archive `{archive}`")?;
                let Some(at) = or_since else { return Ok(()) };
                write!(f, ", nor of its instance's newest one since a policy was last to export it, at {at}")
            }
            Self::Missing(CopyNeeded { archive, of: Which::All, .. }) => {
                write!(f, "no verified copy of it in archive `{archive}`")
            }
            Self::Unadopted(archive) => write!(f, "{}", unadopted_text(archive)),
            Self::Unreachable { archive, cause } => {
                write!(f, "archive `{archive}` can't be reached: {}", excerpt(cause, QUOTED_CHARACTERS))
            }
        }
    }
}
