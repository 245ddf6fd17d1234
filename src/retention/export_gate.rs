//! The gate: verified copies without which a snapshot may not go.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use jiff::Timestamp;

use crate::policy::{ArchiveName, Policy, Which};
use crate::retention::grouping::counted_from;
use crate::retention::inventory::{ArchivedCopy, Copies, Inventory};
use crate::retention::verdict::CopyNeeded;
use crate::snapshot::{InstanceId, Snapshot, SnapshotId};

/// A copy that some policy requires, and what its archive holds.
#[derive(Debug)]
pub(crate) struct Need {
    /// Its number: the same copy has the same for all policies.
    pub(crate) number: usize,
    pub(crate) copy: CopyNeeded,
    vault: Arc<Vault>,
}

/// Why a need is not met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unmet {
    /// There is no such copy.
    Missing(CopyNeeded),
    /// Whether there is one can't be told.
    Unreachable {
        archive: ArchiveName,
        /// May hold another program's words.
        cause: Box<str>,
    },
}

/// What an archive holds, made for looking up.
#[derive(Debug)]
enum Vault {
    Closed(Unmet),
    Open,
    Known { snapshots: HashSet<SnapshotId>, instances: HashMap<InstanceId, Newest> },
}

/// The newest copy of an instance.
#[derive(Debug, Default)]
struct Newest {
    /// Of those that are not dated in the future: those move nothing.
    counted: Option<(Timestamp, SnapshotId)>,
    /// When the first of the others will count.
    coming: Option<Timestamp>,
}

/// What each of these policies requires, in their order.
pub(crate) fn needs(policies: &[&Policy], inventory: &Inventory, now: Timestamp) -> Vec<Vec<Arc<Need>>> {
    let mut vaults: HashMap<ArchiveName, Arc<Vault>> = HashMap::new();
    let mut known: Vec<Arc<Need>> = Vec::new();
    let mut need = |copy: CopyNeeded| {
        if let Some(need) = known.iter().find(|need| need.copy == copy) {
            return need.clone();
        }
        let open = || Arc::new(Vault::new(&copy.archive, inventory.archives.get(&copy.archive), now));
        let vault = vaults.entry(copy.archive.clone()).or_insert_with(open).clone();
        let need = Arc::new(Need { number: known.len(), copy, vault });
        known.push(need.clone());
        need
    };
    policies.iter().map(|policy| required(policy).map(&mut need).collect()).collect()
}

/// What a policy without a retention table requires keeps nothing: it has no say.
fn required(policy: &Policy) -> impl Iterator<Item = CopyNeeded> + '_ {
    let export = policy.export.as_ref().filter(|export| export.required && policy.retention.is_some());
    export.into_iter().flat_map(|export| {
        export.archives.iter().map(|archive| CopyNeeded { archive: archive.clone(), of: export.snapshots })
    })
}

impl Need {
    /// The first instant, `from` or later, at which it is met for a snapshot, if nothing comes or changes.
    pub(crate) fn opens(&self, snapshot: &Snapshot, from: Timestamp) -> Option<Timestamp> {
        match &*self.vault {
            Vault::Closed(_) => None,
            Vault::Open => Some(from),
            Vault::Known { snapshots, instances } => {
                let newest = snapshot.instance_id.and_then(|id| instances.get(&id));
                let newest = newest.filter(|_| self.copy.of == Which::Newest);
                let itself_or_newer = Some((snapshot.created_at, snapshot.id));
                if newest.is_some_and(|newest| newest.counted >= itself_or_newer)
                    || snapshots.contains(&snapshot.id)
                {
                    Some(from)
                } else {
                    newest.and_then(|newest| newest.coming).map(|coming| coming.max(from))
                }
            }
        }
    }

    /// Why it keeps the snapshots for which it is not met.
    pub(crate) fn unmet(&self) -> Unmet {
        match &*self.vault {
            Vault::Closed(unmet) => unmet.clone(),
            Vault::Open | Vault::Known { .. } => Unmet::Missing(self.copy.clone()),
        }
    }
}

/// These needs as copies to prove; a copy of the snapshot itself is one of it or a newer one, too.
pub(crate) fn copies(needs: &[Arc<Need>]) -> Vec<CopyNeeded> {
    let mut copies: Vec<CopyNeeded> = Vec::new();
    for need in needs {
        match copies.iter_mut().find(|copy| copy.archive == need.copy.archive) {
            Some(copy) if need.copy.of == Which::All => copy.of = Which::All,
            Some(_) => {}
            None => copies.push(need.copy.clone()),
        }
    }
    copies
}

impl Vault {
    fn new(archive: &ArchiveName, copies: Option<&Copies>, now: Timestamp) -> Self {
        let closed =
            |cause: &str| Self::Closed(Unmet::Unreachable { archive: archive.clone(), cause: cause.into() });
        match copies {
            None => closed("it was not asked"),
            Some(Copies::Unreachable(cause)) => closed(cause),
            Some(Copies::Assumed) => Self::Open,
            Some(Copies::Known(copies)) => Self::known(copies, now),
        }
    }

    fn known(copies: &[ArchivedCopy], now: Timestamp) -> Self {
        let mut instances: HashMap<InstanceId, Newest> = HashMap::new();
        for copy in copies {
            let newest = instances.entry(copy.instance_id).or_default();
            let counted_from = counted_from(copy.created_at);
            if counted_from <= now {
                newest.counted = newest.counted.max(Some((copy.created_at, copy.snapshot_id)));
            } else {
                newest.coming = Some(newest.coming.map_or(counted_from, |coming| coming.min(counted_from)));
            }
        }
        Self::Known { snapshots: copies.iter().map(|copy| copy.snapshot_id).collect(), instances }
    }
}
