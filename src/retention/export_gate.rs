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

/// The requirements of each of these policies, in their order; equal ones are shared.
pub(crate) fn requirements<'p>(
    policies: impl Iterator<Item = &'p Policy>,
    inventory: &Inventory,
    now: Timestamp,
) -> Vec<Vec<Arc<Requirement>>> {
    let mut indexes: HashMap<ArchiveName, Arc<CopyIndex>> = HashMap::new();
    let mut known: Vec<Arc<Requirement>> = Vec::new();
    let mut requirement = |copy: CopyNeeded| {
        if let Some(requirement) = known.iter().find(|requirement| requirement.copy == copy) {
            return requirement.clone();
        }
        let index = || Arc::new(CopyIndex::new(inventory.archives.get(&copy.archive), now));
        let copies = indexes.entry(copy.archive.clone()).or_insert_with(index).clone();
        let unmet = match &*copies {
            CopyIndex::Unreachable(cause) => {
                Unmet::Unreachable { archive: copy.archive.clone(), cause: cause.clone() }
            }
            CopyIndex::Assumed | CopyIndex::Known { .. } => Unmet::Missing(copy.clone()),
        };
        let requirement = Arc::new(Requirement { copy, unmet: Arc::new(unmet), copies });
        known.push(requirement.clone());
        requirement
    };
    let unadopted = inventory.unadopted.as_ref().map(|archive| Arc::new(Requirement::unadopted(archive)));
    policies
        .map(|policy| unadopted.clone().into_iter().chain(required(policy).map(&mut requirement)).collect())
        .collect()
}

/// Also of a policy without a retention table: a copy that is required is required of all that prune.
fn required(policy: &Policy) -> impl Iterator<Item = CopyNeeded> + '_ {
    let export = policy.export.as_ref().filter(|export| export.required);
    export.into_iter().flat_map(|export| {
        export.archives.iter().map(|archive| CopyNeeded { archive: archive.clone(), of: export.snapshots })
    })
}

impl Requirement {
    /// One that no copy meets.
    fn unadopted(archive: &ArchiveName) -> Self {
        Self {
            copy: CopyNeeded { archive: archive.clone(), of: Which::All },
            unmet: Arc::new(Unmet::Unadopted(archive.clone())),
            copies: Arc::new(CopyIndex::Unreachable("".into())),
        }
    }

    /// Whether a snapshot may be deleted as far as this copy is concerned.
    pub(crate) fn passes(&self, snapshot: &Snapshot) -> bool {
        self.passes_from(snapshot) == i64::MIN
    }

    /// The first second at which it passes if nothing comes or changes: the first of all if it does now, the last of all
    /// if it never does.
    pub(crate) fn passes_from(&self, snapshot: &Snapshot) -> i64 {
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
pub(crate) fn copies_needed<'r>(requirements: impl Iterator<Item = &'r Arc<Requirement>>) -> Vec<CopyNeeded> {
    let mut copies: Vec<CopyNeeded> = Vec::new();
    for needed in requirements.map(|requirement| &requirement.copy) {
        match copies.iter_mut().find(|copy| copy.archive == needed.archive) {
            Some(copy) if needed.of == Which::All => copy.of = Which::All,
            Some(_) => {}
            None => copies.push(needed.clone()),
        }
    }
    copies
}

impl CopyIndex {
    fn new(copies: Option<&Copies>, now: Timestamp) -> Self {
        match copies {
            None => Self::Unreachable("it was not asked".into()),
            Some(Copies::Unreachable(cause)) => Self::Unreachable(cause.as_str().into()),
            Some(Copies::Assumed) => Self::Assumed,
            Some(Copies::Known(copies)) => Self::known(copies, now),
        }
    }

    fn known(copies: &[ArchivedCopy], now: Timestamp) -> Self {
        let mut instances: HashMap<InstanceId, NewestCopy> = HashMap::new();
        for copy in copies {
            let newest = instances.entry(copy.instance_id).or_default();
            let counted_from = counted_from(copy.created_at);
            if counted_from <= now {
                newest.counted = newest.counted.max(Some((copy.created_at, copy.snapshot_id)));
            } else {
                let first = newest.counts_from.map_or(counted_from, |first| first.min(counted_from));
                newest.counts_from = Some(first);
            }
        }
        Self::Known { snapshots: copies.iter().map(|copy| copy.snapshot_id).collect(), instances }
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
            Self::Missing(CopyNeeded { archive, of: Which::Newest }) => {
                write!(f, "no verified copy of it or a newer one in archive `{archive}`")
            }
            Self::Missing(CopyNeeded { archive, of: Which::All }) => {
                write!(f, "no verified copy of it in archive `{archive}`")
            }
            Self::Unadopted(archive) => write!(f, "{}", unadopted_text(archive)),
            Self::Unreachable { archive, cause } => {
                write!(f, "archive `{archive}` can't be reached: {}", excerpt(cause, QUOTED_CHARACTERS))
            }
        }
    }
}
