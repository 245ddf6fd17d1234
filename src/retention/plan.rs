//! The plan: one decision per snapshot, with its reasons.
//!
//! Each policy first judges what it selects by itself (`judge`); then pins, the other policies and required
//! copies bring back what they protect (`council`).

use std::fmt::{self, Display};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use crate::policy::{ArchiveName, Policy, PolicyName, Which};
use crate::retention::council::Council;
use crate::retention::inventory::Inventory;
use crate::retention::judge::Judgement;
use crate::retention::order::groups;
use crate::retention::reason::Reason;
use crate::snapshot::ZoneName;

/// So far in the future a snapshot may be dated and still be judged, as if taken now: clocks differ a little.
const FUTURE_TOLERANCE: SignedDuration = SignedDuration::from_mins(5);

/// From when on a snapshot that was taken then is judged.
pub(crate) fn counted_from(taken: Timestamp) -> Timestamp {
    taken.checked_sub(FUTURE_TOLERANCE).unwrap_or(Timestamp::MIN)
}

/// What is decided for a zone at one moment.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The moment that everything was judged at.
    pub at: Timestamp,
    /// Where.
    pub zone: ZoneName,
    /// For each enabled policy that speaks about the zone, in the order given.
    pub policies: Vec<PolicyPlan>,
}

/// What is decided for the snapshots that one policy selects.
#[derive(Debug, Clone)]
pub struct PolicyPlan {
    /// Whose.
    pub policy: PolicyName,
    /// Every selected snapshot once: by instance (name, then id), newest first within one.
    pub decisions: Vec<Decision>,
    /// How many of them are judged, thus good: what the guard's percentage is of.
    pub good: u64,
    /// How many of them go.
    pub deletes: u64,
    /// Those of all decisions, one after the other.
    pub(crate) reasons: Vec<Reason>,
}

/// What becomes of one snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It stays, and something says so.
    Keep,
    /// It goes.
    Delete,
    /// It is not judged at all: it stays.
    Ignore,
}

/// One decision. Its reasons are kept by its plan: [`PolicyPlan::reasons`].
#[derive(Debug, Clone)]
pub struct Decision {
    /// Which snapshot: its place in the inventory's list.
    pub index: u32,
    /// What becomes of it.
    pub verdict: Verdict,
    /// The key to blame.
    pub rule: Rule,
    /// For one that is kept: the first instant at which it would go if nothing came and nothing changed.
    pub expires_at: Option<Timestamp>,
    /// For one that goes: the copies that must be proved first, for every policy that requires one.
    pub copies: Arc<[CopyNeeded]>,
    pub(crate) first_reason: u32,
    pub(crate) reason_count: u16,
}

/// A verified copy without which a snapshot may not go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyNeeded {
    /// In this archive.
    pub archive: ArchiveName,
    /// Of the snapshot itself (`All`), or of it or a newer one of its instance (`Newest`).
    pub of: Which,
}

/// The key to blame for a verdict: a closed list, for scripts and metrics.
///
/// For one that is kept it is the first that holds it, in the order that stands here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// Kept: among the newest so many.
    KeepLast,
    /// Kept: young enough.
    KeepWithin,
    /// Kept: there is no keep rule, so all are wanted; or no retention table, so nothing is pruned.
    NoKeepRule,
    /// Kept: among the newest good ones that stay whatever the rules say.
    MinKeep,
    /// Kept, though the policy would let it go: somebody pinned it.
    Hold,
    /// Kept, though the policy would let it go: a copy that it requires is missing.
    Export,
    /// Kept, though the policy would let it go: another policy keeps it.
    Policy,
    /// Goes: no keep rule wants it.
    NotWanted,
    /// Goes: too old, even if a keep rule wants it.
    MaxAge,
    /// Goes: too many, even if a keep rule wants it.
    MaxCount,
    /// Not judged: dated in the future.
    Future,
    /// Not judged: not in a good state.
    State,
    /// Not judged: its instance is not listed any more, or not known.
    Orphan,
}

impl Rule {
    /// The key, as in the configuration where it stands there.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::KeepLast => "keep_last",
            Self::KeepWithin => "keep_within",
            Self::NoKeepRule => "none",
            Self::MinKeep => "min_keep",
            Self::Hold => "hold",
            Self::Policy => "policy",
            Self::Export => "export",
            Self::NotWanted => "keep",
            Self::MaxAge => "max_age",
            Self::MaxCount => "max_count",
            Self::Future => "future",
            Self::State => "state",
            Self::Orphan => "orphan",
        }
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Verdict {
    /// The verdict as a word: `keep`, `delete` or `ignore`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Delete => "delete",
            Self::Ignore => "ignore",
        }
    }
}

impl Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl PolicyPlan {
    /// Why: the reason of the decision's rule first, then whatever else bears on it.
    pub fn reasons(&self, decision: &Decision) -> &[Reason] {
        let first = decision.first_reason as usize;
        self.reasons.get(first..first + usize::from(decision.reason_count)).unwrap_or_default()
    }
}

/// Judges every snapshot of the inventory for every enabled policy that speaks about its zone.
pub fn plan(policies: &[Policy], inventory: &Inventory, now: Timestamp) -> Plan {
    let policies = policies.iter().filter(|policy| policy.enabled && policy.zones.contains(&inventory.zone));
    let groups = groups(inventory);
    let counted = inventory.snapshots.iter().filter(|snapshot| snapshot.state.is_good());
    let counted = counted.map(|snapshot| snapshot.created_at).filter(|taken| counted_from(*taken) <= now);
    let taken = counted.clone().min().zip(counted.max());
    let judgements: Vec<Judgement<'_>> = policies
        .map(|policy| Judgement::new(policy, &groups, inventory.snapshots.len(), taken, now))
        .collect();
    let policies = Council::new(judgements, inventory, now).conclude(&groups);
    Plan { at: now, zone: inventory.zone.clone(), policies }
}
