//! A snapshot while one rule after the other is applied to it.

use jiff::Timestamp;

use crate::retention::calendar::Periods;
use crate::retention::reason::Reason;
use crate::retention::verdict::Rule;

/// What a policy by itself says about a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opinion {
    NotSelected,
    Ignores(Rule),
    Keeps(Rule),
    Deletes(Rule),
}

/// A good snapshot of an instance.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub(crate) created_at: Timestamp,
    pub(crate) periods: Periods,
    pub(crate) is_consistent: bool,
    pub(crate) opinion: Opinion,
    /// The last instant at which a rule keeps it; the end of time if that does not depend on its age.
    pub(crate) kept_until: Timestamp,
    /// Those that keep it, then the others.
    pub(crate) reasons: Vec<Reason>,
    /// How many of the reasons keep it.
    keeping: usize,
}

impl Candidate {
    /// One that no rule keeps yet. `reasons` is an empty list, passed in so that its memory is used again.
    pub(crate) fn new(
        created_at: Timestamp,
        periods: Periods,
        is_consistent: bool,
        mut reasons: Vec<Reason>,
    ) -> Self {
        reasons.push(Reason::NotWanted);
        let opinion = Opinion::Deletes(Rule::NotWanted);
        Self { created_at, periods, is_consistent, opinion, kept_until: Timestamp::MIN, reasons, keeping: 0 }
    }

    pub(crate) fn is_kept(&self) -> bool {
        matches!(self.opinion, Opinion::Keeps(_))
    }

    /// A keep rule keeps it until then. The first one gives the decision its name.
    pub(crate) fn keep(&mut self, rule: Rule, until: Timestamp, reason: Reason) {
        if !self.is_kept() {
            self.opinion = Opinion::Keeps(rule);
        }
        self.kept_until = self.kept_until.max(until);
        self.reasons.insert(self.keeping, reason);
        self.keeping += 1;
    }

    /// A keep rule does not keep it, for this reason.
    pub(crate) fn pass_over(&mut self, reason: Reason) {
        self.reasons.push(reason);
    }

    /// A limit deletes it, even if keep rules keep it.
    pub(crate) fn delete(&mut self, rule: Rule, reason: Reason) {
        self.opinion = Opinion::Deletes(rule);
        self.keeping = 0;
        self.reasons.clear();
        self.reasons.push(reason);
    }

    /// Of one that is kept, only the reasons that keep it are shown.
    pub(crate) fn forget_other_reasons(&mut self) {
        if self.is_kept() {
            self.reasons.truncate(self.keeping);
        }
    }
}
