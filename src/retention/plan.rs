//! The plan: one decision per snapshot, with its reasons.

use std::sync::Arc;

use jiff::Timestamp;

use crate::policy::PolicyName;
use crate::retention::reason::Reason;
use crate::retention::verdict::{CopyNeeded, Rule, Verdict};
use crate::snapshot::ZoneName;

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

impl PolicyPlan {
    /// Why: the reason of the decision's rule first, then whatever else bears on it.
    pub fn reasons(&self, decision: &Decision) -> &[Reason] {
        let first = decision.first_reason as usize;
        self.reasons.get(first..first + usize::from(decision.reason_count)).unwrap_or_default()
    }
}
