//! The plan: one decision per snapshot, with its reasons.

use std::sync::Arc;

use jiff::Timestamp;

use crate::policy::name::PolicyName;
use crate::retention::reason::{Reason, ReasonText};
use crate::retention::verdict::{CopyNeeded, Rule, Verdict};
use crate::snapshot::ZoneName;

/// The decisions about a zone's snapshots at one moment.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The moment that every age is counted to.
    pub at: Timestamp,
    /// The zone of the inventory.
    pub zone: ZoneName,
    /// One for each enabled policy that names the zone, in the order given.
    pub policies: Vec<PolicyPlan>,
}

/// The decisions about the snapshots that one policy selects.
#[derive(Debug, Clone)]
pub struct PolicyPlan {
    /// The policy's name.
    pub policy: PolicyName,
    /// The moment that every age is counted to.
    pub at: Timestamp,
    /// Every selected snapshot once: by instance (name, then id), newest first within one.
    pub decisions: Vec<Decision>,
    /// How many of them the rules are applied to, thus good ones: the guard's percentage is of these.
    pub good: u64,
    /// How many of them are to be deleted.
    pub deletes: u64,
    /// How many of those to be deleted are good, or were before they failed.
    pub good_deletes: u64,
    /// How many are kept only because a change has not settled that would delete them, or because a snapshot of their
    /// instance is missing.
    pub pending: u64,
}

/// What is decided about one snapshot, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The snapshot: its place in the inventory's list.
    pub index: u32,
    /// Whether it is kept, deleted or ignored.
    pub verdict: Verdict,
    /// The key to blame.
    pub rule: Rule,
    /// Of one that is kept: the first whole second at which it would be deleted if nothing came and nothing changed.
    pub expires_at: Option<Timestamp>,
    pub(crate) created_at: Timestamp,
    /// Shared by all that need the same copies.
    pub(crate) copies: Option<Arc<Vec<CopyNeeded>>>,
    /// The reasons of all decisions about the same instance: a list for each of a million decisions would cost more time
    /// than all rules.
    pub(crate) instance_reasons: Arc<Box<[Reason]>>,
    /// Where its own ones begin in that list.
    pub(crate) first_reason: u32,
    pub(crate) reason_count: u16,
}

impl Decision {
    /// Keeps what would be deleted otherwise.
    pub(crate) fn keep(&mut self, rule: Rule, reason: Reason) {
        let own = self.own_reasons().iter().cloned();
        let reasons: Box<[Reason]> = [reason, Reason::OtherwiseDeleted].into_iter().chain(own).collect();
        self.verdict = Verdict::Keep;
        self.rule = rule;
        self.copies = None;
        self.reason_count = u16::try_from(reasons.len()).unwrap_or(u16::MAX);
        self.first_reason = 0;
        self.instance_reasons = Arc::new(reasons);
    }

    /// The reason of the decision's rule first, then everything else that bears on it.
    pub(crate) fn reasons(&self) -> impl ExactSizeIterator<Item = ReasonText<'_>> {
        self.own_reasons().iter().map(|reason| ReasonText { reason, created_at: self.created_at })
    }

    pub(crate) fn own_reasons(&self) -> &[Reason] {
        let first = self.first_reason as usize;
        self.instance_reasons.get(first..first + usize::from(self.reason_count)).unwrap_or_default()
    }

    /// Of one to be deleted: the copies that must be verified first, for every policy that requires one.
    pub(crate) fn copies(&self) -> &[CopyNeeded] {
        self.copies.as_deref().map_or(&[], Vec::as_slice)
    }

    /// Why it is not deleted although its policy would delete it: a closed list, for scripts and metrics.
    pub fn blocked_by(&self) -> Option<&'static str> {
        let first = self.own_reasons().first();
        match self.rule {
            Rule::Hold => Some("hold"),
            Rule::Change => Some("change"),
            Rule::Source => Some("source"),
            Rule::Guard => Some("guard"),
            Rule::Policy if matches!(first, Some(Reason::PausedPolicy(..))) => Some("paused"),
            Rule::Policy => Some("policy"),
            Rule::Export if matches!(first, Some(Reason::Unmet(unmet)) if unmet.is_unreachable()) => {
                Some("archive")
            }
            Rule::Export => Some("export"),
            _ => None,
        }
    }

    /// The rules of the policy itself that keep it; none if only others do.
    pub(crate) fn keep_rules(&self) -> Vec<Rule> {
        let is_kept = self.verdict == Verdict::Keep;
        self.own_reasons().iter().filter(|_| is_kept).filter_map(Reason::keep_rule).collect()
    }
}
