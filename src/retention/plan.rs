//! The plan: one decision per snapshot, with its reasons.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::policy::{PolicyName, Retention};
use crate::retention::export_gate::Unmet;
use crate::retention::inventory::Hold;
use crate::retention::reason::{Reason, Why};
use crate::retention::verdict::{CopyNeeded, Rule, Verdict};
use crate::snapshot::{SnapshotState, ZoneName};

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
    /// The moment that everything was judged at.
    pub at: Timestamp,
    /// Every selected snapshot once: by instance (name, then id), newest first within one.
    pub decisions: Vec<Decision>,
    /// How many of them are judged, thus good: what the guard's percentage is of.
    pub good: u64,
    /// How many of them go.
    pub deletes: u64,
    /// How many of those that go are good; the others have failed.
    pub good_deletes: u64,
    /// Those of all decisions, one after the other.
    pub(crate) reasons: Vec<Reason>,
    pub(crate) terms: Terms,
}

/// What the numbers in a plan's decisions and reasons stand for.
#[derive(Debug, Clone)]
pub(crate) struct Terms {
    pub(crate) retention: Option<Retention>,
    pub(crate) time_zone: TimeZone,
    pub(crate) holds: Vec<Hold>,
    pub(crate) policies: Vec<PolicyName>,
    pub(crate) unmet: Vec<Unmet>,
    pub(crate) states: Vec<SnapshotState>,
    /// Different lists of copies; policies make few.
    pub(crate) copies: Vec<Vec<CopyNeeded>>,
}

/// One decision. Its reasons are kept by its plan: [`PolicyPlan::reasons`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Which snapshot: its place in the inventory's list.
    pub index: u32,
    /// What becomes of it.
    pub verdict: Verdict,
    /// The key to blame.
    pub rule: Rule,
    /// When the snapshot was taken.
    pub taken: Timestamp,
    /// For one that is kept: the first instant at which it would go if nothing came and nothing changed.
    pub expires_at: Option<Timestamp>,
    /// Which list of copies must be proved first; none of what stays.
    pub(crate) copies: Option<u32>,
    pub(crate) first_reason: u32,
    pub(crate) reason_count: u16,
}

impl PolicyPlan {
    /// Why: the reason of the decision's rule first, then whatever else bears on it.
    pub fn reasons<'p>(&'p self, decision: &'p Decision) -> impl ExactSizeIterator<Item = Why<'p>> {
        let first = decision.first_reason as usize;
        let reasons = self.reasons.get(first..first + usize::from(decision.reason_count)).unwrap_or_default();
        reasons.iter().map(|reason| Why { reason: *reason, plan: self, decision })
    }

    /// For one that goes: the copies that must be proved first, for every policy that requires one.
    pub fn copies(&self, decision: &Decision) -> &[CopyNeeded] {
        let list = decision.copies.and_then(|list| self.terms.copies.get(list as usize));
        list.map_or(&[], Vec::as_slice)
    }

    /// The rules of the policy itself that hold one that is kept; none of what others hold.
    pub fn holders(&self, decision: &Decision) -> Vec<Rule> {
        let is_kept = decision.verdict == Verdict::Keep;
        self.reasons(decision).filter(|_| is_kept).filter_map(|why| why.reason.holder()).collect()
    }
}
