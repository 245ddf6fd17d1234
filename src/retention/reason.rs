//! Reasons: why a snapshot stays, goes or is not judged, as data and in words.

use std::fmt::{self, Display};
use std::sync::Arc;

use jiff::Timestamp;

use crate::policy::span::Span;
use crate::policy::{ArchiveName, PolicyName, Which};
use crate::retention::inventory::Hold;
use crate::retention::verdict::{CopyNeeded, Rule};
use crate::snapshot::SnapshotState;
use crate::text::excerpt;

/// So much of what somebody wrote, or of what another program said, is repeated in a reason.
const QUOTED_CHARACTERS: usize = 200;

/// One reason. Places count from 1, which is the newest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// The run would take it first.
    Create,
    /// Among the newest `count`.
    Last {
        /// Its place.
        place: u32,
        /// `keep_last`.
        count: u32,
    },
    /// Not past the limit of a rule that keeps what is young.
    Within(Arc<Cutoff>),
    /// No keep rule is given, so everything is wanted.
    NoKeepRule,
    /// The policy has no retention table.
    NothingPruned,
    /// Among the newest `count` good ones, which stay whatever the rules say.
    MinKeep {
        /// Its place.
        place: u32,
        /// `min_keep`.
        count: u32,
    },
    /// Somebody pinned it.
    Pinned(Box<Hold>),
    /// Another policy keeps it.
    OtherPolicy {
        /// Which policy.
        policy: PolicyName,
        /// By what.
        rule: Rule,
    },
    /// A copy that is required is not there.
    MissingCopy(Arc<CopyNeeded>),
    /// An archive in which a copy is required can't be asked.
    ArchiveUnreachable(Arc<UnreachableArchive>),
    /// But for the reasons before this one, it would go by this rule; why stands behind it.
    WouldGo(Rule),
    /// No keep rule wants it; why not stands behind it.
    NotWanted,
    /// Not among the newest `count`.
    NotLast {
        /// Its place.
        place: u32,
        /// `keep_last`.
        count: u32,
    },
    /// Past a rule's limit.
    TooOld(Arc<Cutoff>),
    /// More are wanted than may be.
    TooMany {
        /// Its place among those that are wanted and not too old.
        place: u32,
        /// `max_count`.
        count: u32,
    },
    /// Dated too far in the future to be believed.
    Future {
        /// When it claims to be taken.
        taken: Timestamp,
    },
    /// In a state in which nothing is done to it.
    State(SnapshotState),
    /// Its instance is not listed any more.
    Orphan,
    /// The API does not say whose it is.
    NoInstance,
    /// Somebody else made it.
    Foreign,
}

/// A rule's limit to ages at the moment of judging.
#[derive(Debug, Clone, PartialEq)]
pub struct Cutoff {
    /// Whose limit.
    pub rule: Rule,
    /// The span, as configured.
    pub span: Span,
    /// What was taken before this is past the limit.
    pub at: Timestamp,
}

// A span compares field by field; it holds no floats.
impl Eq for Cutoff {}

/// An archive that can't be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreachableArchive {
    /// Which one.
    pub archive: ArchiveName,
    /// Why not; may hold another program's words.
    pub cause: Box<str>,
}

impl Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create => f.write_str("the run takes it first (create)"),
            Self::Last { place, count } => write!(f, "newest {place} of {count} (keep_last)"),
            Self::Within(cutoff) => {
                let Cutoff { rule, span, .. } = &**cutoff;
                write!(f, "not older than {span} ({rule})")
            }
            Self::NoKeepRule => f.write_str("there is no keep_* rule, so all are wanted"),
            Self::NothingPruned => f.write_str("the policy has no retention table: it prunes nothing"),
            Self::MinKeep { place, count } => {
                write!(f, "newest {place} of {count} that stay whatever the rules say (min_keep)")
            }
            Self::Pinned(hold) => {
                match hold.until {
                    Some(until) => write!(f, "pinned until {until}")?,
                    None => f.write_str("pinned for ever")?,
                }
                match &hold.reason {
                    Some(reason) => write!(f, ": {}", excerpt(reason, QUOTED_CHARACTERS)),
                    None => Ok(()),
                }
            }
            Self::OtherPolicy { policy, rule } => match rule {
                Rule::NoKeepRule => {
                    write!(f, "policy `{policy}` keeps it: it has no keep_* rule, so it wants all")
                }
                rule => write!(f, "policy `{policy}` keeps it ({rule})"),
            },
            Self::MissingCopy(missing) => match missing.of {
                Which::Newest => {
                    write!(f, "no verified copy of it or a newer one in archive `{}`", missing.archive)
                }
                Which::All => write!(f, "no verified copy of it in archive `{}`", missing.archive),
            },
            Self::ArchiveUnreachable(unreachable) => write!(
                f,
                "archive `{}` can't be reached: {}",
                unreachable.archive,
                excerpt(&unreachable.cause, QUOTED_CHARACTERS)
            ),
            Self::WouldGo(_) => f.write_str("but for this it would go"),
            Self::NotWanted => f.write_str("no keep rule wants it"),
            Self::NotLast { place, count } => {
                write!(f, "number {place} from the newest (keep_last = {count})")
            }
            Self::TooOld(cutoff) => {
                let Cutoff { rule, span, at } = &**cutoff;
                // Fractions of a second help nobody.
                let at = at.round(jiff::Unit::Second).unwrap_or(*at);
                write!(f, "older than {span} ({rule}: taken before {at})")
            }
            Self::TooMany { place, count } => {
                write!(f, "number {place} from the newest of those wanted (max_count = {count})")
            }
            Self::Future { taken } => {
                write!(f, "dated more than 5 minutes in the future: {taken}; not judged before")
            }
            Self::State(state) => match state {
                SnapshotState::Snapshotting | SnapshotState::Exporting => {
                    write!(f, "not finished yet: its state is `{state}`")
                }
                SnapshotState::Deleting | SnapshotState::Deleted => {
                    write!(f, "going already: its state is `{state}`")
                }
                SnapshotState::Error => write!(f, "failed: its state is `{state}`, and no rule prunes those"),
                SnapshotState::Exported | SnapshotState::Ready => write!(f, "good: its state is `{state}`"),
                SnapshotState::Unknown(word) if word.is_empty() => f.write_str("it has no state; left alone"),
                SnapshotState::Unknown(word) => {
                    write!(f, "its state is unknown: `{}`; left alone", excerpt(word, QUOTED_CHARACTERS))
                }
            },
            Self::Orphan => f.write_str("its instance is not listed any more, and orphans are kept"),
            Self::NoInstance => f.write_str("the API does not say which instance it is of"),
            Self::Foreign => f.write_str("not known to be made by this program (ownership = \"created\")"),
        }
    }
}
