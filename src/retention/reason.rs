//! Reasons: everything that bears on one decision.

use std::fmt::{self, Display};
use std::sync::Arc;

use jiff::{Timestamp, Unit};

use crate::policy::name::PolicyName;
use crate::policy::{Count, Period};
use crate::retention::age::AgeLimit;
use crate::retention::calendar;
use crate::retention::export_gate::Unmet;
use crate::retention::inventory::Hold;
use crate::retention::verdict::Rule;
use crate::snapshot::SnapshotState;
use crate::text::excerpt;

/// The most characters that a reason repeats of a text from outside.
const QUOTED_CHARACTERS: usize = 500;

/// One thing that bears on a decision. Places count from the newest good snapshot of the instance, which has 1.
///
/// A plan has several for each of a million snapshots: 16 bytes each, and larger terms are shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The run takes it first.
    Create,
    /// Kept by `keep_last`.
    Last {
        place: u32,
        of: Count,
    },
    /// Kept by `keep_within`.
    Within(Arc<AgeLimit>),
    /// Kept by `keep_daily` or its like, as the newest of the period with this number.
    NewestOf {
        period: Period,
        number: i32,
        place: u32,
        of: Count,
    },
    /// Kept by `keep_within_daily` or its like, as the newest of the period with this number.
    NewestWithin {
        period: Period,
        number: i32,
        limit: Arc<AgeLimit>,
    },
    /// Kept by a period rule as the oldest of all.
    Oldest(Rule),
    NoKeepRule,
    NoRetention,
    MinKeep {
        place: u32,
        of: u32,
    },
    MinKeepConsistent {
        place: u32,
        of: u32,
    },
    OnHold(Arc<Hold>),
    /// Another policy keeps it, by this rule.
    OtherPolicy(Arc<PolicyName>, Rule),
    /// Another policy kept it, by this rule, when it was paused.
    PausedPolicy(Arc<PolicyName>, Rule),
    /// Only these changes, which have not settled, would delete it.
    Change(Arc<ChangeText>),
    /// A snapshot of its instance is missing.
    Source(Arc<MissingText>),
    Unmet(Arc<Unmet>),
    /// None of the snapshots that its instance had is listed any more.
    Emptied,
    /// Without the reasons before this one it would be deleted.
    OtherwiseDeleted,
    NotWanted,
    /// Not kept by `keep_last`.
    NotLast {
        place: u32,
        of: Count,
    },
    /// Not kept by a period rule: that keeps a newer one of its period, created at this second.
    NotNewestOf {
        rule: Rule,
        newest: i64,
    },
    /// Not kept by `keep_daily` or its like: newer periods use all of its slots.
    NoSlot {
        period: Period,
        slots: Count,
    },
    TooOld(Arc<AgeLimit>),
    /// Its place among those that are kept otherwise is beyond `max_count`.
    TooMany {
        place: u32,
        max: u32,
    },
    Failed(Arc<AgeLimit>),
    FailedYoung(Arc<AgeLimit>),
    /// Failed, and there is no newer good one.
    FailedLast,
    Future,
    State(Box<SnapshotState>),
    Orphan,
    NoInstance,
    Foreign,
}

impl Reason {
    /// The rule of the policy itself that keeps a snapshot by this.
    pub(crate) fn keep_rule(&self) -> Option<Rule> {
        match self {
            Self::Last { .. } => Some(Rule::KeepLast),
            Self::Within(_) => Some(Rule::KeepWithin),
            Self::NewestOf { period, .. } => Some(Rule::KeepEach(*period)),
            Self::NewestWithin { period, .. } => Some(Rule::KeepWithinEach(*period)),
            Self::Oldest(rule) => Some(*rule),
            Self::NoKeepRule | Self::NoRetention => Some(Rule::NoKeepRule),
            Self::MinKeep { .. } => Some(Rule::MinKeep),
            Self::MinKeepConsistent { .. } => Some(Rule::MinKeepConsistent),
            _ => None,
        }
    }

    /// Whether it is not the policy's own rules that keep the snapshot: a hold, or another policy.
    pub(crate) fn is_from_outside(&self) -> bool {
        matches!(self, Self::OtherPolicy(..) | Self::PausedPolicy(..) | Self::OnHold(_))
    }
}

/// Changes that would delete a snapshot, and when the last of them settles; none if never.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChangeText {
    pub(crate) text: String,
    pub(crate) settles_at: Option<Timestamp>,
}

/// Why a newer snapshot of an instance is missing, and the policies that miss it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MissingText {
    pub(crate) policies: Vec<PolicyName>,
    pub(crate) text: String,
}

/// A reason as a text, about a snapshot that was created then.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReasonText<'d> {
    pub(crate) reason: &'d Reason,
    pub(crate) created_at: Timestamp,
}

impl Display for ReasonText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason {
            Reason::Create => f.write_str("the run takes it first (create)"),
            Reason::Last { place, of } => write!(f, "newest {place} of {of} (keep_last)"),
            Reason::Within(limit) => write!(f, "not older than {} (keep_within)", limit.span),
            Reason::NewestOf { period, number, place, of } => {
                let (adverb, name) = (period.adverb(), calendar::name(*period, *number));
                match of {
                    Count::Of(count) => write!(f, "{adverb} {place} of {count}: newest of {name}"),
                    Count::All => write!(f, "{adverb} {place}, without end: newest of {name}"),
                }
            }
            Reason::NewestWithin { period, number, limit } => {
                let (adverb, name) = (period.adverb(), calendar::name(*period, *number));
                write!(f, "{adverb} within {}: newest of {name}", limit.span)
            }
            Reason::Oldest(rule) => write!(f, "the oldest, and {rule} has a slot left (keep_oldest)"),
            Reason::NoKeepRule => f.write_str("there is no keep_* rule, so all are kept"),
            Reason::NoRetention => f.write_str("the policy has no retention table: it prunes nothing"),
            Reason::MinKeep { place, of } => {
                write!(f, "newest {place} of {of} that are always kept (min_keep)")
            }
            Reason::MinKeepConsistent { place, of } => {
                write!(
                    f,
                    "newest {place} of {of} application-consistent ones that are always kept (min_keep_consistent)"
                )
            }
            Reason::OnHold(hold) => on_hold(f, hold),
            Reason::OtherPolicy(policy, Rule::NoKeepRule) => {
                write!(f, "policy `{policy}` keeps it: it has no keep_* rule, so it keeps all")
            }
            Reason::OtherPolicy(policy, rule @ (Rule::State | Rule::Future | Rule::Orphan)) => {
                write!(f, "policy `{policy}` leaves it alone ({rule})")
            }
            Reason::OtherPolicy(policy, rule) => write!(f, "policy `{policy}` keeps it ({rule})"),
            Reason::PausedPolicy(policy, rule) => {
                write!(f, "policy `{policy}`, which is paused, kept it when it was paused ({rule})")
            }
            Reason::Change(change) => match change.settles_at {
                Some(at) => write!(f, "{}: deleted only since then, so not before {at}", change.text),
                None => write!(f, "{}: deleted only since then, so not before it is allowed", change.text),
            },
            Reason::Source(missing) => f.write_str(&missing.text),
            Reason::Unmet(unmet) => unmet.fmt(f),
            Reason::Emptied => f.write_str(
                "none of the snapshots that its instance had is listed any more (max_listing_drop_percent)",
            ),
            Reason::OtherwiseDeleted => f.write_str("otherwise it would be deleted"),
            Reason::NotWanted => f.write_str("no keep rule wants it"),
            Reason::NotLast { place, of } => write!(f, "number {place} from the newest (keep_last = {of})"),
            Reason::NotNewestOf { rule, newest } => {
                let period = rule.period().map_or("period", Period::noun);
                let newest = Timestamp::from_second(*newest).unwrap_or(self.created_at);
                write!(f, "its {period} is kept by the one of {newest} ({rule})")
            }
            Reason::NoSlot { period, slots } => {
                let plural = if slots.has_place(2) { "s" } else { "" };
                write!(f, "{slots} of {slots} {}{plural} used ({})", period.noun(), Rule::KeepEach(*period))
            }
            Reason::TooOld(limit) => self.too_old(f, limit),
            Reason::TooMany { place, max } => {
                write!(f, "number {place} from the newest of those wanted (max_count = {max})")
            }
            Reason::Failed(limit) => {
                f.write_str("failed, and a newer good one exists; ")?;
                self.too_old(f, limit)
            }
            Reason::FailedYoung(limit) => {
                write!(f, "failed: its state is `error`; not older than {} yet (failed_after)", limit.span)
            }
            Reason::FailedLast => f.write_str(
                "failed: its state is `error`; kept while there is no newer good one (failed_after)",
            ),
            Reason::Future => {
                write!(f, "dated more than 5 minutes in the future: {}; not judged before", self.created_at)
            }
            Reason::State(state) => not_good(f, state),
            Reason::Orphan => f.write_str("its instance is not listed any more, and orphans are kept"),
            Reason::NoInstance => f.write_str("the API does not say which instance it is of"),
            Reason::Foreign => f.write_str("this policy did not take it (ownership = \"created\")"),
        }
    }
}

impl ReasonText<'_> {
    fn too_old(&self, f: &mut fmt::Formatter<'_>, limit: &AgeLimit) -> fmt::Result {
        let end = limit.end(self.created_at);
        // Fractions of a second only distract.
        let end = end.round(Unit::Second).unwrap_or(end);
        write!(f, "older than {} since {end} ({})", limit.span, limit.rule)
    }
}

fn on_hold(f: &mut fmt::Formatter<'_>, hold: &Hold) -> fmt::Result {
    match hold.until {
        Some(until) => write!(f, "on hold until {until}")?,
        None => f.write_str("on hold")?,
    }
    match &hold.reason {
        Some(reason) => write!(f, ": {}", excerpt(reason, QUOTED_CHARACTERS)),
        None => Ok(()),
    }
}

fn not_good(f: &mut fmt::Formatter<'_>, state: &SnapshotState) -> fmt::Result {
    match state {
        SnapshotState::Snapshotting | SnapshotState::Exporting => {
            write!(f, "not finished yet: its state is `{state}`")
        }
        SnapshotState::Deleting | SnapshotState::Deleted => {
            write!(f, "being deleted: its state is `{state}`")
        }
        SnapshotState::Error => write!(f, "failed: its state is `{state}`, and no rule prunes those"),
        SnapshotState::Exported | SnapshotState::Ready => write!(f, "good: its state is `{state}`"),
        SnapshotState::Unknown(word) if word.is_empty() => f.write_str("it has no state; left alone"),
        SnapshotState::Unknown(word) => {
            write!(f, "its state is unknown: `{}`; left alone", excerpt(word, QUOTED_CHARACTERS))
        }
    }
}
