//! What an operator wants: policies and their parts, as checked values.
//!
//! `config` makes them from TOML, `retention` judges by them, `run` carries them out. Every value here is
//! already valid: a count is not zero, a name is safe in a path, an archive that is named exists.

pub mod rate;
pub mod select;
pub mod span;
pub mod template_name;

use std::fmt::{self, Display};
use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::policy::select::Select;
use crate::policy::span::Span;
use crate::policy::template_name::TemplateName;
use crate::schedule::Schedule;
use crate::snapshot::ZoneName;

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text; safe in a path.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = BadName;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                if is_name(text) { Ok(Self(text.into())) } else { Err(BadName) }
            }
        }

        impl Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }
    };
}

name!(
    /// A policy's name.
    PolicyName
);
name!(
    /// An archive's name.
    ArchiveName
);

/// A text that can't name a policy, an archive or a notifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a name has 1 to 63 lower-case letters, digits, `_` and `-`, and begins with a letter or a digit")]
pub struct BadName;

fn is_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=63).contains(&text.len())
        && text.as_bytes().first().is_some_and(|b| plain(*b))
        && text.bytes().all(|b| plain(b) || b == b'_' || b == b'-')
}

/// One policy: when, which snapshots, what is done with them.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Its name.
    pub name: PolicyName,
    /// Whether it runs, and has a say about what other policies delete.
    pub enabled: bool,
    /// When it runs by itself; without one, only by hand.
    pub schedule: Option<Schedule>,
    /// For its schedule, and for days, weeks, months and years of its rules.
    pub time_zone: TimeZone,
    /// A run begins at most so much later than its schedule says, always by the same span for a policy.
    pub jitter: Duration,
    /// What becomes of runs that were missed.
    pub on_start: OnStart,
    /// So long after a run began, no creation, export or promotion begins in it.
    pub deadline: Option<Duration>,
    /// Whether a run takes a snapshot of each selected instance first.
    pub create: bool,
    /// Where; at least one, each once.
    pub zones: Vec<ZoneName>,
    /// Which snapshots.
    pub select: Select,
    /// What stays; without it nothing is pruned.
    pub retention: Option<Retention>,
    /// What holds a deletion back.
    pub guard: Guard,
    /// What is exported, and where to.
    pub export: Option<Export>,
    /// What becomes a template.
    pub promote: Option<Promote>,
}

/// What becomes of runs that were missed, since the program or the machine was not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnStart {
    /// One run makes up for them. A policy that never ran has missed nothing.
    IfMissed,
    /// They are counted, and the next one is waited for.
    Wait,
    /// The policy runs whenever the program starts.
    Now,
}

/// What stays. At least one of the keep rules, `max_age` and `max_count` is there.
#[derive(Debug, Clone, PartialEq)]
pub struct Retention {
    /// The newest so many are kept.
    pub keep_last: Option<Count>,
    /// What is younger than this, or exactly so old, is kept.
    pub keep_within: Option<Span>,
    /// The newest of each of the last so many periods that have one is kept.
    pub keep: ByPeriod<Option<Count>>,
    /// The newest of each period is kept while it is not older than this.
    pub keep_within_each: ByPeriod<Option<Span>>,
    /// Whether the oldest is kept for a period rule that has a slot left.
    pub keep_oldest: bool,
    /// What is older goes, even if a keep rule wants it.
    pub max_age: Option<Span>,
    /// Of what is still held then, the newest so many stay, even if a keep rule wants more.
    pub max_count: Option<NonZeroU32>,
    /// The newest so many good ones stay whatever any rule says.
    pub min_keep: u32,
    /// Failed ones that are older go, once a newer good one exists; without it, they are left alone.
    pub failed_after: Option<Span>,
}

/// How many a keep rule wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Count {
    /// So many.
    Of(NonZeroU32),
    /// `"all"`: without end.
    All,
}

/// A stretch of the calendar of which a keep rule wants the newest. Hours are absolute, the others are the calendar's
/// in the policy's time zone; weeks are those of ISO 8601.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Period {
    /// An hour of absolute time.
    Hour,
    /// A day of the calendar: 23, 24 or 25 hours.
    Day,
    /// Monday to Sunday.
    Week,
    /// A month of the calendar.
    Month,
    /// A year of the calendar.
    Year,
}

/// One value for each [`Period`], in their order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ByPeriod<T>([T; 5]);

impl Count {
    /// Whether the place, counted from 1, is among so many.
    pub fn has_place(self, place: u32) -> bool {
        match self {
            Self::Of(count) => place <= count.get(),
            Self::All => true,
        }
    }
}

impl Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Of(count) => count.fmt(f),
            Self::All => f.write_str("all"),
        }
    }
}

impl Period {
    /// All of them, the shortest first.
    pub const ALL: [Self; 5] = [Self::Hour, Self::Day, Self::Week, Self::Month, Self::Year];

    /// What it is called: `day`.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Hour => "hour",
            Self::Day => "day",
            Self::Week => "week",
            Self::Month => "month",
            Self::Year => "year",
        }
    }

    /// What comes once in each is so: `daily`. The names of the keep rules end in it.
    pub fn adverb(self) -> &'static str {
        match self {
            Self::Hour => "hourly",
            Self::Day => "daily",
            Self::Week => "weekly",
            Self::Month => "monthly",
            Self::Year => "yearly",
        }
    }
}

impl<T> ByPeriod<T> {
    /// Makes the value of each period.
    pub fn of(value: impl FnMut(Period) -> T) -> Self {
        Self(Period::ALL.map(value))
    }

    /// The value of one period.
    pub fn get(&self, period: Period) -> &T {
        &self.0[period as usize]
    }

    /// The value of one period, to be changed.
    pub fn get_mut(&mut self, period: Period) -> &mut T {
        &mut self.0[period as usize]
    }
}

/// What holds the deletions of a run, or of a zone in it, back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    /// At most so many per run, all zones together.
    pub max_deletes: Option<u64>,
    /// At most this share, in percent, of a zone's selected good snapshots; counts only where more than 10 go.
    pub max_delete_percent: u8,
    /// At most this share, in percent, of the zone's snapshots may have vanished since the last accepted listing, those
    /// that we deleted aside; counts only where more than 10 did.
    pub max_listing_drop_percent: u8,
    /// At most so far may this machine's clock be from the API's.
    pub max_clock_skew: Duration,
}

/// What becomes of the copies in an archive.
#[derive(Debug, Clone, Default)]
pub struct ArchiveRules {
    /// Which stay, per instance; without it all do.
    pub retention: Option<Retention>,
    /// When they are proved again by themselves.
    pub verify: Option<VerifyPlan>,
}

/// When copies are proved again by themselves, and how many.
#[derive(Debug, Clone)]
pub struct VerifyPlan {
    /// When, in UTC.
    pub schedule: Schedule,
    /// So many of them, in percent; those first that were not proved for longest.
    pub percent: u64,
}

/// Which good snapshots of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The newest good one.
    Newest,
    /// All good ones that stay.
    All,
}

/// What is exported, and where to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// Into each of these; at least one, each once.
    pub archives: Vec<ArchiveName>,
    /// Which ones.
    pub snapshots: Which,
    /// Whether a snapshot may go only once each archive holds, or has held, a verified copy.
    pub required: bool,
    /// What is kept for so long only for want of a copy becomes an alert.
    pub alert_after: Duration,
    /// Downloads at once.
    pub concurrency: NonZeroUsize,
    /// Ranged requests at once per download, as far as the store allows them.
    pub connections: NonZeroUsize,
    /// So long without a byte, and a download goes on over a new connection.
    pub stall_timeout: Duration,
    /// All downloads of the policy together stay below so many bytes per second.
    pub bandwidth_limit: Option<NonZeroU64>,
}

/// What becomes a template.
#[derive(Debug, Clone, PartialEq)]
pub struct Promote {
    /// The template's name.
    pub name: TemplateName,
    /// Which ones; never twice for one snapshot.
    pub snapshots: Which,
    /// So many of the templates that this policy made stay per instance; without it, all.
    pub keep: Option<NonZeroU32>,
    /// The template's description, at most 255 characters.
    pub description: Option<String>,
    /// The template's default user.
    pub default_user: Option<String>,
    /// Whether one may log in by password.
    pub password_enabled: Option<bool>,
    /// Whether one may log in by SSH key.
    pub ssh_key_enabled: Option<bool>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_in_paths_and_labels() {
        for good in ["a", "nightly", "0-a_b", &"a".repeat(63)] {
            assert!(good.parse::<PolicyName>().is_ok(), "{good:?}");
        }
        for bad in ["", "-a", "_a", "A", "a.b", "a/b", "..", "é", &"a".repeat(64)] {
            assert!(bad.parse::<PolicyName>().is_err(), "{bad:?}");
        }
    }
}
