//! Verdicts: whether a snapshot is kept, by which rule, and which copies its deletion requires.

use std::fmt::{self, Display};

use jiff::Timestamp;

use crate::policy::name::ArchiveName;
use crate::policy::{Period, Which};

/// The decision about one snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is kept by a rule.
    Keep,
    /// It is to be deleted.
    Delete,
    /// No rule applies to it, so it is kept.
    Ignore,
}

/// A verified copy without which a snapshot may not be deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyNeeded {
    /// In this archive.
    pub archive: ArchiveName,
    /// Of the snapshot itself (`All`), or of it or a newer one of its instance (`Newest`).
    pub of: Which,
    /// Or else of any snapshot of its instance, exported at this time or later: when the policy that requires it was last
    /// due, if that does not prune.
    pub or_since: Option<Timestamp>,
}

/// The rule that decided a verdict: a closed list, for scripts and metrics.
///
/// For a kept snapshot it is the first rule that keeps it, in the order of this list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// Kept: the run would take it first. Only a preview has such.
    Create,
    /// Kept: among the newest N.
    KeepLast,
    /// Kept: young enough.
    KeepWithin,
    /// Kept: the newest of one of the last N periods, or the oldest of all.
    KeepEach(Period),
    /// Kept: the newest of its period, or the oldest of all, and young enough.
    KeepWithinEach(Period),
    /// Kept: there is no keep rule, so all are wanted; or no retention table, so nothing is pruned.
    NoKeepRule,
    /// Kept: among the newest good ones that are kept whatever the rules say.
    MinKeep,
    /// Kept: among the newest good and application-consistent ones that are kept whatever the rules say.
    MinKeepConsistent,
    /// Kept, though the policy would delete it: it is on hold.
    Hold,
    /// Kept, though the policy would delete it: a copy that it requires is missing.
    Export,
    /// Kept, though the policy would delete it: another policy keeps it.
    Policy,
    /// Kept, though the policy would delete it: only a change would delete it that has not settled.
    Change,
    /// Kept, though the policy would delete it: all other snapshots of its instance vanished from the listing.
    Guard,
    /// Kept, though the policy would delete it: a snapshot of its instance is missing.
    Source,
    /// Deleted: no keep rule wants it.
    NotWanted,
    /// Deleted: too old, even if a keep rule wants it.
    MaxAge,
    /// Deleted: too many, even if a keep rule wants it.
    MaxCount,
    /// Deleted: failed, too old, and there is a newer good one.
    FailedAfter,
    /// Ignored: dated in the future.
    Future,
    /// Ignored: not in a good state.
    State,
    /// Ignored: its instance is not listed any more, or not known.
    Orphan,
    /// Ignored: the policy selects only snapshots that this program created.
    Foreign,
}

impl Rule {
    /// The period of which it wants the newest, if it is such a rule.
    pub fn period(self) -> Option<Period> {
        match self {
            Self::KeepEach(period) | Self::KeepWithinEach(period) => Some(period),
            _ => None,
        }
    }

    /// The key, as in the configuration where it stands there.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::KeepLast => "keep_last",
            Self::KeepWithin => "keep_within",
            Self::KeepEach(Period::Hour) => "keep_hourly",
            Self::KeepEach(Period::Day) => "keep_daily",
            Self::KeepEach(Period::Week) => "keep_weekly",
            Self::KeepEach(Period::Month) => "keep_monthly",
            Self::KeepEach(Period::Year) => "keep_yearly",
            Self::KeepWithinEach(Period::Hour) => "keep_within_hourly",
            Self::KeepWithinEach(Period::Day) => "keep_within_daily",
            Self::KeepWithinEach(Period::Week) => "keep_within_weekly",
            Self::KeepWithinEach(Period::Month) => "keep_within_monthly",
            Self::KeepWithinEach(Period::Year) => "keep_within_yearly",
            Self::NoKeepRule => "none",
            Self::MinKeep => "min_keep",
            Self::MinKeepConsistent => "min_keep_consistent",
            Self::Hold => "hold",
            Self::Policy => "policy",
            Self::Change => "change",
            Self::Source => "source",
            Self::Guard => "guard",
            Self::Export => "export",
            Self::NotWanted => "keep",
            Self::MaxAge => "max_age",
            Self::MaxCount => "max_count",
            Self::FailedAfter => "failed_after",
            Self::Future => "future",
            Self::State => "state",
            Self::Orphan => "orphan",
            Self::Foreign => "foreign",
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
