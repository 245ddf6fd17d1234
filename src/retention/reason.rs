//! Reasons: what bears on one decision, kept small, and told in words when somebody asks.

use std::fmt::{self, Display};

use jiff::Unit;

use crate::policy::span::Span;
use crate::policy::{Count, Period, Retention, Which};
use crate::retention::calendar;
use crate::retention::export_gate::Unmet;
use crate::retention::plan::{Decision, PolicyPlan};
use crate::retention::verdict::Rule;
use crate::snapshot::SnapshotState;
use crate::text::excerpt;

/// So much of what somebody wrote, or of what another program said, is repeated in a reason.
const QUOTED_CHARACTERS: usize = 500;

/// One thing that bears on a decision. Places count from the newest good snapshot of the instance, which has 1.
///
/// There are several for each of a million snapshots, so it holds numbers alone; what they stand for is in the plan
/// that it belongs to, and [`Why`] tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The run would take it first.
    Create,
    /// Among the newest of a rule.
    Last {
        /// Its place.
        place: u32,
    },
    /// Not past the limit of `keep_within`.
    Within,
    /// The newest of its period.
    NewestOf {
        /// `keep_daily` or one of its kind, or `keep_within_daily` or one of its kind.
        rule: Rule,
        /// The place of the period among those that have one.
        place: u32,
    },
    /// The oldest of all, for which a period rule has a slot left.
    Oldest {
        /// The rule.
        rule: Rule,
    },
    /// There is no keep rule, so all are wanted.
    NoKeepRule,
    /// The policy has no retention table.
    NothingPruned,
    /// Among the newest that stay whatever the rules say.
    MinKeep {
        /// Its place.
        place: u32,
    },
    /// Somebody pinned it.
    OnHold {
        /// Which of the plan's holds.
        hold: u32,
    },
    /// Another policy that selects it does not let it go.
    OtherPolicy {
        /// Which of the plan's policies.
        policy: u32,
        /// Why that one holds it.
        rule: Rule,
    },
    /// A copy that a policy requires is not there, or that can't be told.
    Unmet {
        /// Which of the plan's needs.
        need: u32,
    },
    /// What would become of it if nothing held it.
    WouldGo(Rule),
    /// No keep rule wants it.
    NotWanted,
    /// Not among the newest of a rule.
    NotLast {
        /// Its place.
        place: u32,
    },
    /// A newer one of its period stands for it.
    NotNewestOf {
        /// The rule.
        rule: Rule,
        /// Which one: its place among the plan's decisions.
        holder: u32,
    },
    /// The newest of its period, or none that a newer one stands for, but newer periods used all slots of the rule.
    NoSlot {
        /// The rule.
        rule: Rule,
    },
    /// Past a rule's limit.
    TooOld(Rule),
    /// More are wanted than may be.
    TooMany {
        /// Its place among those that are wanted and not too old.
        place: u32,
    },
    /// Failed, past the limit of `failed_after`, and there is a newer good one.
    Failed,
    /// Failed, and not past the limit of `failed_after` yet.
    FailedYoung,
    /// Failed, and there is no newer good one.
    FailedLast,
    /// Dated in the future.
    Future,
    /// In this state.
    State {
        /// Which of the plan's states.
        state: u32,
    },
    /// Its instance is not listed any more.
    Orphan,
    /// The API does not say whose it is.
    NoInstance,
    /// Not known to be made by this program.
    Foreign,
}

impl Reason {
    /// The rule of the policy itself that holds a snapshot by this.
    pub fn holder(self) -> Option<Rule> {
        match self {
            Self::Last { .. } => Some(Rule::KeepLast),
            Self::Within => Some(Rule::KeepWithin),
            Self::NewestOf { rule, .. } | Self::Oldest { rule } => Some(rule),
            Self::NoKeepRule | Self::NothingPruned => Some(Rule::NoKeepRule),
            Self::MinKeep { .. } => Some(Rule::MinKeep),
            _ => None,
        }
    }
}

/// A reason with what it belongs to: prints it in words.
#[derive(Debug, Clone, Copy)]
pub struct Why<'p> {
    /// What.
    pub reason: Reason,
    pub(crate) plan: &'p PolicyPlan,
    pub(crate) decision: &'p Decision,
}

impl Why<'_> {
    fn table(&self) -> Option<&Retention> {
        self.plan.terms.retention.as_ref()
    }

    fn span(&self, rule: Rule) -> Option<&Span> {
        let table = self.table()?;
        match rule {
            Rule::KeepWithin => table.keep_within.as_ref(),
            Rule::KeepWithinEach(period) => table.keep_within_each.get(period).as_ref(),
            Rule::MaxAge => table.max_age.as_ref(),
            Rule::FailedAfter => table.failed_after.as_ref(),
            _ => None,
        }
    }

    fn period(&self, period: Period) -> String {
        calendar::name(period, self.decision.taken, &self.plan.terms.time_zone)
    }

    fn newest_of(&self, f: &mut fmt::Formatter<'_>, rule: Rule, place: u32) -> fmt::Result {
        match rule {
            Rule::KeepEach(period) => {
                let (adverb, name) = (period.adverb(), self.period(period));
                match self.table().and_then(|table| *table.keep.get(period)) {
                    Some(Count::Of(count)) => write!(f, "{adverb} {place} of {count}: newest of {name}"),
                    _ => write!(f, "{adverb} {place}, without end: newest of {name}"),
                }
            }
            Rule::KeepWithinEach(period) => {
                let (adverb, name) = (period.adverb(), self.period(period));
                match self.span(rule) {
                    Some(span) => write!(f, "{adverb} within {span}: newest of {name}"),
                    None => write!(f, "{adverb}: newest of {name}"),
                }
            }
            other => write!(f, "wanted by {other}"),
        }
    }

    fn too_old(&self, f: &mut fmt::Formatter<'_>, rule: Rule) -> fmt::Result {
        let Some(span) = self.span(rule) else { return write!(f, "too old ({rule})") };
        let limit = span.before(self.plan.at, &self.plan.terms.time_zone);
        // Fractions of a second help nobody.
        let limit = limit.round(Unit::Second).unwrap_or(limit);
        write!(f, "older than {span} ({rule}: taken before {limit})")
    }
}

/// What a plan's reasons number.
fn numbered<T>(list: &[T], number: u32) -> Option<&T> {
    list.get(number as usize)
}

impl Display for Why<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let terms = &self.plan.terms;
        let count = |count: Option<Count>| count.map_or_else(String::new, |count| count.to_string());
        let keep_last = || count(self.table().and_then(|table| table.keep_last));
        match self.reason {
            Reason::Create => f.write_str("the run takes it first (create)"),
            Reason::Last { place } => write!(f, "newest {place} of {} (keep_last)", keep_last()),
            Reason::Within => match self.span(Rule::KeepWithin) {
                Some(span) => write!(f, "not older than {span} (keep_within)"),
                None => f.write_str("young enough (keep_within)"),
            },
            Reason::NewestOf { rule, place } => self.newest_of(f, rule, place),
            Reason::Oldest { rule } => write!(f, "the oldest, and {rule} has a slot left (keep_oldest)"),
            Reason::NoKeepRule => f.write_str("there is no keep_* rule, so all are kept"),
            Reason::NothingPruned => f.write_str("the policy has no retention table: it prunes nothing"),
            Reason::MinKeep { place } => {
                let count = self.table().map_or(0, |table| table.min_keep);
                write!(f, "newest {place} of {count} that are always kept (min_keep)")
            }
            Reason::OnHold { hold } => match numbered(&terms.holds, hold) {
                None => f.write_str("on hold"),
                Some(hold) => {
                    match hold.until {
                        Some(until) => write!(f, "on hold until {until}")?,
                        None => f.write_str("on hold")?,
                    }
                    match &hold.reason {
                        Some(reason) => write!(f, ": {}", excerpt(reason, QUOTED_CHARACTERS)),
                        None => Ok(()),
                    }
                }
            },
            Reason::OtherPolicy { policy, rule } => {
                let Some(policy) = numbered(&terms.policies, policy) else {
                    return f.write_str("another policy keeps it");
                };
                match rule {
                    Rule::NoKeepRule => {
                        write!(f, "policy `{policy}` keeps it: it has no keep_* rule, so it keeps all")
                    }
                    Rule::State | Rule::Future | Rule::Orphan => {
                        write!(f, "policy `{policy}` leaves it alone ({rule})")
                    }
                    rule => write!(f, "policy `{policy}` keeps it ({rule})"),
                }
            }
            Reason::Unmet { need } => match numbered(&terms.unmet, need) {
                Some(unmet) => unmet.fmt(f),
                None => f.write_str("a copy that a policy requires is missing"),
            },
            Reason::WouldGo(_) => f.write_str("otherwise it would be deleted"),
            Reason::NotWanted => f.write_str("no keep rule wants it"),
            Reason::NotLast { place } => {
                write!(f, "number {place} from the newest (keep_last = {})", keep_last())
            }
            Reason::NotNewestOf { rule, holder } => {
                let period = rule.period().map_or("period", Period::noun);
                match numbered(&self.plan.decisions, holder) {
                    Some(holder) => write!(f, "its {period} is kept by the one of {} ({rule})", holder.taken),
                    None => write!(f, "its {period} is kept by a newer one ({rule})"),
                }
            }
            Reason::NoSlot { rule } => {
                let period = rule.period().unwrap_or(Period::Day);
                let slots = count(self.table().and_then(|table| *table.keep.get(period)));
                let plural = if slots == "1" { "" } else { "s" };
                write!(f, "{slots} of {slots} {}{plural} used ({rule})", period.noun())
            }
            Reason::TooOld(rule) => self.too_old(f, rule),
            Reason::TooMany { place } => {
                let count =
                    self.table().and_then(|table| table.max_count).map_or(0, std::num::NonZeroU32::get);
                write!(f, "number {place} from the newest of those wanted (max_count = {count})")
            }
            Reason::Failed => {
                f.write_str("failed, and a newer good one exists; ")?;
                self.too_old(f, Rule::FailedAfter)
            }
            Reason::FailedYoung => match self.span(Rule::FailedAfter) {
                Some(span) => {
                    write!(f, "failed: its state is `error`; not older than {span} yet (failed_after)")
                }
                None => f.write_str("failed: its state is `error`, and no rule prunes those"),
            },
            Reason::FailedLast => f.write_str(
                "failed: its state is `error`; kept while there is no newer good one (failed_after)",
            ),
            Reason::Future => {
                let taken = self.decision.taken;
                write!(f, "dated more than 5 minutes in the future: {taken}; not judged before")
            }
            Reason::State { state } => match numbered(&terms.states, state) {
                Some(state) => tell_state(f, state),
                None => f.write_str("not in a good state"),
            },
            Reason::Orphan => f.write_str("its instance is not listed any more, and orphans are kept"),
            Reason::NoInstance => f.write_str("the API does not say which instance it is of"),
            Reason::Foreign => f.write_str("not known to be made by this program (ownership = \"created\")"),
        }
    }
}

fn tell_state(f: &mut fmt::Formatter<'_>, state: &SnapshotState) -> fmt::Result {
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

impl Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(missing) => match missing.of {
                Which::Newest => {
                    write!(f, "no verified copy of it or a newer one in archive `{}`", missing.archive)
                }
                Which::All => write!(f, "no verified copy of it in archive `{}`", missing.archive),
            },
            Self::Unreachable { archive, cause } => {
                write!(f, "archive `{archive}` can't be reached: {}", excerpt(cause, QUOTED_CHARACTERS))
            }
        }
    }
}
