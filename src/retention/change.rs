//! Changes in what decisions rest on, and since when each was seen.

use std::fmt::{self, Display};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::policy::name::PolicyName;
use crate::retention::deciding_keys::ENABLED;
use crate::snapshot::{Instance, InstanceId, SnapshotId};
use crate::text::{counted, excerpt, printable};

/// The most characters that a reason repeats of a value.
const QUOTED_CHARACTERS: usize = 80;

/// The most changes that are named one by one.
const NAMED_CHANGES: usize = 3;

/// A change, and when it was first seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// When the run began that first saw it.
    pub since: Timestamp,
    /// The last run before that of the policy that remembers it: then the change was not there yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before: Option<Timestamp>,
    /// Since when a policy is paused that was paused by hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_since: Option<Timestamp>,
    /// The change.
    pub change: Change,
}

/// One difference between what one run found and what the next one did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// A deciding key of a policy has another value.
    Key {
        /// The policy.
        policy: PolicyName,
        /// Its key.
        key: String,
        /// The value before; none if the key was not set.
        was: Option<Value>,
        /// The value after; none if the key is not set.
        is: Option<Value>,
    },
    /// A policy does not exist any more, or not in this zone.
    PolicyGone(PolicyName),
    /// An instance has another name.
    Renamed {
        /// The instance.
        id: InstanceId,
        /// Its name before.
        was: String,
        /// Its name after.
        is: String,
    },
    /// An instance has another value of a label, or lost or got the label.
    Label {
        /// The instance.
        id: InstanceId,
        /// Its present name.
        name: String,
        /// The label.
        label: String,
        /// The value before.
        was: Option<String>,
        /// The value after.
        is: Option<String>,
    },
    /// An instance became a member of an instance pool or a node pool, or is none any more.
    Managed {
        /// The instance.
        id: InstanceId,
        /// Its present name.
        name: String,
        /// Whether it was one before.
        #[serde(default)]
        was: bool,
        /// Whether it is one after.
        is: bool,
    },
    /// An instance is not listed any more.
    Vanished {
        /// The instance.
        id: InstanceId,
        /// Its remembered name.
        name: String,
    },
    /// A good snapshot failed.
    Failed(SnapshotId),
}

/// The thing that a change is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Subject<'a> {
    // In this order: a policy or an instance is brought back before one of its values.
    Policy(&'a PolicyName),
    Key(&'a PolicyName, &'a str),
    Instance(InstanceId),
    Name(InstanceId),
    Label(InstanceId, &'a str),
    Managed(InstanceId),
    Snapshot(SnapshotId),
}

impl Change {
    pub(crate) fn subject(&self) -> Subject<'_> {
        match self {
            Self::Key { policy, key, .. } => Subject::Key(policy, key),
            Self::PolicyGone(policy) => Subject::Policy(policy),
            Self::Renamed { id, .. } => Subject::Name(*id),
            Self::Label { id, label, .. } => Subject::Label(*id, label),
            Self::Managed { id, .. } => Subject::Managed(*id),
            Self::Vanished { id, .. } => Subject::Instance(*id),
            Self::Failed(id) => Subject::Snapshot(*id),
        }
    }

    /// Whether it is that something is not there, or not good, any more; it is over where that is there again.
    pub(crate) fn is_loss(&self) -> bool {
        matches!(self, Self::PolicyGone(_) | Self::Vanished { .. } | Self::Failed(_))
    }

    /// The change back; none of a loss.
    pub(crate) fn reversed(&self) -> Option<Self> {
        let mut reversed = self.clone();
        match &mut reversed {
            Self::Key { was, is, .. } => std::mem::swap(was, is),
            Self::Renamed { was, is, .. } => std::mem::swap(was, is),
            Self::Label { was, is, .. } => std::mem::swap(was, is),
            Self::Managed { was, is, .. } => std::mem::swap(was, is),
            Self::PolicyGone(_) | Self::Vanished { .. } | Self::Failed(_) => return None,
        }
        Some(reversed)
    }

    /// Whether everything is after it as it was before. A policy that is paused anew keeps something else.
    pub(crate) fn is_none(&self) -> bool {
        match self {
            Self::Key { key, was, is, .. } => {
                was == is && !(key == ENABLED && *is == Some(Value::Bool(false)))
            }
            Self::Renamed { was, is, .. } => was == is,
            Self::Label { was, is, .. } => was == is,
            Self::Managed { was, is, .. } => was == is,
            Self::PolicyGone(_) | Self::Vanished { .. } | Self::Failed(_) => false,
        }
    }

    /// Whether the same is there after both, of which each is about the same thing.
    pub(crate) fn has_same_end(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Key { is, .. }, Self::Key { is: other, .. }) => is == other,
            (Self::Renamed { is, .. }, Self::Renamed { is: other, .. }) => is == other,
            (Self::Label { is, .. }, Self::Label { is: other, .. }) => is == other,
            (Self::Managed { is, .. }, Self::Managed { is: other, .. }) => is == other,
            _ => true,
        }
    }

    /// Takes the value before from an earlier change of the same thing.
    pub(crate) fn begin_with(&mut self, earlier: &Self) {
        match (self, earlier) {
            (Self::Key { was, .. }, Self::Key { was: first, .. }) => was.clone_from(first),
            (Self::Renamed { was, .. }, Self::Renamed { was: first, .. }) => was.clone_from(first),
            (Self::Label { was, .. }, Self::Label { was: first, .. }) => was.clone_from(first),
            (Self::Managed { was, .. }, Self::Managed { was: first, .. }) => *was = *first,
            _ => {}
        }
    }

    /// The listed instance that it is about.
    pub(crate) fn instance(&self) -> Option<InstanceId> {
        match self {
            Self::Renamed { id, .. } | Self::Label { id, .. } | Self::Managed { id, .. } => Some(*id),
            Self::Key { .. } | Self::PolicyGone(_) | Self::Vanished { .. } | Self::Failed(_) => None,
        }
    }

    /// Gives its instance the value before.
    pub(crate) fn take_back_from(&self, instance: &mut Instance) {
        match self {
            Self::Renamed { was, .. } => instance.name = was.as_str().into(),
            Self::Label { label, was: Some(was), .. } => {
                instance.labels.insert(label.as_str().into(), was.as_str().into());
            }
            Self::Label { label, was: None, .. } => drop(instance.labels.remove(label)),
            Self::Managed { was, .. } => instance.is_managed = *was,
            Self::Key { .. } | Self::PolicyGone(_) | Self::Vanished { .. } | Self::Failed(_) => {}
        }
    }
}

/// When a change that was first seen then has settled; never beyond the calendar.
pub(crate) fn settles_at(since: Timestamp, settle: Duration) -> Option<Timestamp> {
    since.checked_add(SignedDuration::try_from(settle).ok()?).ok()
}

/// The changes as one text; several snapshots that failed are counted.
pub(crate) fn describe<'c>(changes: impl Iterator<Item = &'c Change>) -> String {
    let (failed, others): (Vec<&Change>, Vec<&Change>) =
        changes.partition(|change| matches!(change, Change::Failed(_)));
    let mut texts: Vec<String> = others.iter().take(NAMED_CHANGES).map(ToString::to_string).collect();
    if others.len() > NAMED_CHANGES {
        texts.push(counted(others.len() - NAMED_CHANGES, "other change"));
    }
    if !failed.is_empty() {
        texts.push(format!("{} turned to `error`", counted(failed.len(), "snapshot")));
    }
    texts.join("; ")
}

impl Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: &Option<Value>| {
            value.as_ref().map_or("not set".to_owned(), |value| {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                excerpt(&text, QUOTED_CHARACTERS).clone()
            })
        };
        match self {
            Self::Key { policy, key, was, is } if key == ENABLED => {
                let is_paused = *is == Some(Value::Bool(false));
                let how = match (is_paused, was == is) {
                    (true, false) => "paused",
                    (true, true) => "paused anew",
                    (false, _) => "not paused any more",
                };
                write!(f, "policy {policy} is {how}")
            }
            Self::Key { policy, key, was, is } => {
                write!(f, "policy {policy}: {key} was {}, is {}", shown(was), shown(is))
            }
            Self::PolicyGone(policy) => write!(f, "policy {policy} is gone"),
            Self::Renamed { was, is, .. } => {
                write!(f, "instance {} is called {} now", printable(was), printable(is))
            }
            Self::Label { name, label, was, is, .. } => {
                let (name, label) = (printable(name), printable(label));
                match (was, is) {
                    (Some(was), None) => write!(f, "{name} lost the label {label}={}", printable(was)),
                    (None, Some(is)) => write!(f, "{name} got the label {label}={}", printable(is)),
                    (was, is) => {
                        let [was, is] =
                            [was, is].map(|value| printable(value.as_deref().unwrap_or_default()));
                        write!(f, "{name}: label {label} was {was}, is {is}")
                    }
                }
            }
            Self::Managed { name, is, .. } => {
                let verb = if *is { "joined" } else { "left" };
                write!(f, "{} {verb} an instance pool or node pool", printable(name))
            }
            Self::Vanished { name, .. } => write!(f, "instance {} is not listed any more", printable(name)),
            Self::Failed(id) => write!(f, "snapshot {id} turned to `error`"),
        }
    }
}
