//! What is known of a zone at the moment of judging.

use std::collections::{BTreeMap, HashMap, HashSet};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::policy::Policy;
use crate::policy::name::{ArchiveName, PolicyName};
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, ZoneName};

/// Everything that a judgement may depend on beside the policies and the moment.
#[derive(Debug, Clone)]
pub struct Inventory {
    /// Where.
    pub zone: ZoneName,
    /// Every snapshot of a complete listing, each id once, in any order.
    pub snapshots: Vec<Snapshot>,
    /// Every instance of a complete listing, each id once, in any order.
    pub instances: Vec<Instance>,
    /// The instances that other shards are for: they are not judged, but a pattern may mean them, and a template be theirs.
    pub elsewhere: Vec<Instance>,
    /// Those that this program took; whatever else is there is foreign to a policy that asks for its own.
    pub created: HashMap<SnapshotId, Ownership>,
    /// Those of `snapshots` that are not there yet: a preview adds what the run would take first.
    pub coming: HashSet<SnapshotId>,
    /// Snapshots on hold.
    pub holds: BTreeMap<SnapshotId, Hold>,
    /// What each archive that an enabled policy names holds.
    pub archives: BTreeMap<ArchiveName, Copies>,
    /// An archive that others used, while this program remembers nothing: it may have lost its holds and all else that
    /// keeps snapshots, so nothing is deleted.
    pub unadopted: Option<ArchiveName>,
    /// Whether this machine's clock can be trusted.
    pub clock: ClockSkew,
    /// The failed ones that are remembered; of any other the age is counted from when it was taken.
    pub failed: BTreeMap<SnapshotId, Failed>,
    /// When each disabled policy was found so; one that is not here counts as found now.
    pub paused: BTreeMap<PolicyName, Timestamp>,
    /// The snapshots that policies could not take when they were last due.
    pub missing: Vec<Missing>,
}

impl Inventory {
    /// A zone of which nothing else is known, to be judged at a given moment.
    pub fn on_paper(zone: ZoneName, snapshots: Vec<Snapshot>, instances: Vec<Instance>) -> Self {
        Self {
            zone,
            snapshots,
            instances,
            elsewhere: Vec::new(),
            created: HashMap::new(),
            coming: HashSet::new(),
            holds: BTreeMap::new(),
            archives: BTreeMap::new(),
            unadopted: None,
            clock: ClockSkew::OnPaper,
            failed: BTreeMap::new(),
            paused: BTreeMap::new(),
            missing: Vec::new(),
        }
    }

    /// The listed instances that the policy selects.
    pub(crate) fn selected_by<'a>(&'a self, policy: &'a Policy) -> impl Iterator<Item = &'a Instance> {
        self.instances.iter().filter(|instance| policy.select.selects_listed(instance))
    }

    /// Whether a snapshot is good, or was before it failed.
    pub(crate) fn was_good(&self, snapshot: &Snapshot) -> bool {
        snapshot.state.is_good() || self.failed.get(&snapshot.id).is_some_and(|failed| failed.was_good)
    }
}

/// Whose a snapshot is that this program took.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ownership {
    /// The policy that took it; none if that is not known, and then it belongs to every policy.
    pub maker: Option<PolicyName>,
    /// The other policies of which it served a slot.
    pub served: Vec<PolicyName>,
}

impl Ownership {
    /// Whether it belongs to the policy, where these are configured: what a policy took that was removed is everyone's.
    pub(crate) fn includes(&self, policy: &PolicyName, configured: &[&PolicyName]) -> bool {
        let Some(maker) = &self.maker else { return true };
        maker == policy || self.served.contains(policy) || !configured.contains(&maker)
    }
}

/// A snapshot that a policy could not take when it was last due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The policy.
    pub policy: PolicyName,
    /// The instance; none if the policy could take none at all in the zone.
    pub instance: Option<InstanceId>,
    /// The time for which it was due.
    pub slot: Timestamp,
    /// Why it could not be taken.
    pub cause: String,
}

/// What is remembered of a snapshot that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// When it was first found in state `error`.
    pub since: Timestamp,
    /// Whether it was ever found good.
    pub was_good: bool,
}

/// How far this machine's clock is from the API's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockSkew {
    /// The listing came with the API's time: this machine's less that.
    Known(SignedDuration),
    /// The listing came without it, so ages are in doubt.
    Unknown,
    /// For decisions on paper: the moment of judging was given.
    OnPaper,
}

impl ClockSkew {
    /// A time of this machine by the API's clock, if that is known.
    pub fn by_platform(self, at: Timestamp) -> Option<Timestamp> {
        let Self::Known(ahead) = self else { return None };
        at.checked_sub(ahead).ok()
    }
}

/// A hold on a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// Without it, for ever.
    pub until: Option<Timestamp>,
    /// The operator's reason.
    pub reason: Option<String>,
}

/// What an archive holds, as far as deletions depend on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Copies {
    /// It can't be read, for this reason; all snapshots that need a copy there are kept.
    Unreachable(String),
    /// For decisions on paper: it holds whatever is required.
    Assumed,
    /// These verified copies, those included that the archive's own retention removed since.
    Known(Vec<ArchivedCopy>),
}

/// A verified copy, as the gate sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArchivedCopy {
    /// Of which snapshot.
    pub snapshot_id: SnapshotId,
    /// Of which instance.
    pub instance_id: InstanceId,
    /// When the snapshot was taken.
    pub created_at: Timestamp,
    /// When its export began; none if that is not known.
    pub exported_at: Option<Timestamp>,
}
