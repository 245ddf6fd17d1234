//! Policies and their parts, as checked values.
//!
//! `config` reads them from TOML, `retention` decides by them, `run` carries them out. Every value here is
//! already valid: a count is not zero, a name is safe in a path, an archive that is named exists.

pub mod bucket;
pub mod name;
pub mod notifier;
pub mod rate;
pub mod select;
pub mod shard;
pub mod span;
pub mod template_name;

use std::fmt::{self, Display};
use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::policy::name::{ArchiveName, PolicyName};
use crate::policy::select::Select;
use crate::policy::span::Span;
use crate::policy::template_name::TemplateName;
use crate::schedule::Schedule;
use crate::snapshot::ZoneName;

/// One policy: when it runs, which snapshots it selects, and what it does with them.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Unique in a configuration.
    pub name: PolicyName,
    /// Whether it runs, and keeps its snapshots from being deleted by other policies.
    pub enabled: bool,
    /// Since when it is paused by hand; then it is not `enabled`, whatever the configuration says.
    pub paused_since: Option<Timestamp>,
    /// Without one it runs only manually.
    pub schedule: Option<Schedule>,
    /// For the schedule, and for days, weeks, months and years of the rules.
    pub time_zone: TimeZone,
    /// The longest delay of a run after its time in the schedule. Each policy has its own delay, always the same on one
    /// machine.
    pub jitter: Duration,
    /// What to do about missed runs.
    pub on_start: OnStart,
    /// This long after a run's beginning, no creation, export or promotion begins in it.
    pub deadline: Option<Duration>,
    /// Whether a run first creates a snapshot of each selected instance.
    pub create: bool,
    /// At least one, each once.
    pub zones: Vec<ZoneName>,
    /// Which snapshots it is about.
    pub select: Select,
    /// Which snapshots are kept; without it nothing is deleted.
    pub retention: Option<Retention>,
    /// The limits that block deletions.
    pub guard: Guard,
    /// Which snapshots are exported, and into which archives.
    pub export: Option<Export>,
    /// Which snapshots become templates.
    pub promote: Option<Promote>,
    /// The programs that its runs start.
    pub hooks: Hooks,
}

impl Policy {
    /// Pauses it as if `enabled = false` stood in the configuration, or undoes that. One that is not enabled there stays so.
    pub fn pause(&mut self, since: Option<Timestamp>) {
        if self.is_enabled_in_file() {
            (self.enabled, self.paused_since) = (since.is_none(), since);
        }
    }

    /// Whether the configuration enables it, so that it can be paused by hand.
    pub fn is_enabled_in_file(&self) -> bool {
        self.enabled || self.paused_since.is_some()
    }

    /// Since when it is paused by hand, for people; none if it is not.
    pub fn paused_text(&self) -> Option<String> {
        self.paused_since
            .map(|since| format!("paused by hand since {}", since.strftime("%Y-%m-%dT%H:%M:%SZ")))
    }
}

/// What to do about runs that were missed because the program or the machine was not running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnStart {
    /// One run makes up for them. A policy that never ran is late from the moment at which it was first seen.
    IfMissed,
    /// They are counted, and the next one is waited for.
    Wait,
    /// The policy runs whenever the program starts.
    Now,
}

/// Which snapshots are kept. At least one of the keep rules, `max_age` and `max_count` is there.
#[derive(Debug, Clone, PartialEq)]
pub struct Retention {
    /// How many of the newest are kept.
    pub keep_last: Option<Count>,
    /// Those that are not older than this are kept.
    pub keep_within: Option<Span>,
    /// The newest of each of the last N periods that have one is kept.
    pub keep: ByPeriod<Option<Count>>,
    /// The newest of each period is kept while it is not older than this.
    pub keep_within_each: ByPeriod<Option<Span>>,
    /// Whether the oldest is kept for a period rule that has not reached its count.
    pub keep_oldest: bool,
    /// Older ones are deleted, even if a keep rule wants them.
    pub max_age: Option<Span>,
    /// How many of the remaining ones are kept, the newest, even if a keep rule wants more.
    pub max_count: Option<NonZeroU32>,
    /// How many of the newest good ones are kept whatever the rules say.
    pub min_keep: u32,
    /// How many of the newest good ones that are application-consistent are kept whatever the rules say.
    pub min_keep_consistent: u32,
    /// Failed ones that are older are deleted, once a newer good one exists; without it, they are left alone.
    pub failed_after: Option<Span>,
}

impl Retention {
    /// Whether it has any of the rules `keep_last`, `keep_within`, `keep_daily` and the like.
    pub fn has_keep_rule(&self) -> bool {
        let has_rule_for =
            |period| self.keep.get(period).is_some() || self.keep_within_each.get(period).is_some();
        self.keep_last.is_some() || self.keep_within.is_some() || Period::ALL.into_iter().any(has_rule_for)
    }
}

/// The count of a keep rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Count {
    /// A number.
    Of(NonZeroU32),
    /// `"all"`: no limit.
    All,
}

/// A period of which a keep rule wants the newest snapshot. Hours are absolute, the others are the calendar's
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
    /// Whether a place, counted from 1, is within the count.
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

    /// Such as `day`.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Hour => "hour",
            Self::Day => "day",
            Self::Week => "week",
            Self::Month => "month",
            Self::Year => "year",
        }
    }

    /// Such as `daily`; the keys of the keep rules end with it.
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

    /// The value of one period, mutable.
    pub fn get_mut(&mut self, period: Period) -> &mut T {
        &mut self.0[period as usize]
    }
}

/// The limits beyond which all deletions of a run, or of a zone in it, are blocked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    /// The most deletions per run, all zones together.
    pub max_deletes: Option<u64>,
    /// The largest share, in percent, of a zone's selected good snapshots; checked only if more than 10 are deleted.
    pub max_delete_percent: u8,
    /// The largest share, in percent, of the zone's snapshots that may have vanished since the last accepted listing
    /// without being deleted by this program; checked only if more than 10 did.
    pub max_listing_drop_percent: u8,
    /// The largest difference between this machine's clock and the API's.
    pub max_clock_skew: Duration,
    /// How long deletions wait that only a change brought about.
    pub settle: Duration,
    /// If the newest good snapshot of an instance is older than this, nothing of the instance is deleted.
    pub expect_newest: Option<Span>,
}

/// The programs that runs of a policy start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Before anything else; unless it succeeds, the run does nothing.
    pub before: Option<Program>,
    /// At the end of every run, whatever its result.
    pub after: Option<Program>,
    /// At the end of a run that failed, also in part, before `after`.
    pub on_failure: Option<Program>,
    /// How long each of them may take.
    pub timeout: Duration,
}

/// A program with its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// An absolute path, or a name to be found in `PATH`.
    pub name: String,
    /// Its arguments.
    pub arguments: Vec<String>,
}

impl Hooks {
    /// Each hook that there is, with its key in the configuration.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, &Program)> {
        let Self { before, after, on_failure, timeout: _ } = self;
        let all = [("before", before), ("after", after), ("on_failure", on_failure)];
        all.into_iter().filter_map(|(key, program)| Some((key, program.as_ref()?)))
    }
}

/// Retention and verification of the copies in an archive.
#[derive(Debug, Clone)]
pub struct ArchiveRules {
    /// Which are kept, per instance; without it all are.
    pub retention: Option<Retention>,
    /// When the daemon verifies them again; without it, only the command does.
    pub verify: Option<VerifyPlan>,
    /// The limits beyond which no copy is pruned, and beyond which copies that vanished close the archive.
    pub guard: Guard,
    /// Whether the manifests hold the user data of the instances, which often has secrets in it.
    pub user_data: bool,
}

impl ArchiveRules {
    /// Whether the retention may delete the last copy of an instance.
    pub(crate) fn may_empty(&self) -> bool {
        self.retention.as_ref().is_some_and(|retention| retention.min_keep == 0)
    }
}

/// When the daemon verifies copies again, and how many of them.
#[derive(Debug, Clone)]
pub struct VerifyPlan {
    /// In UTC.
    pub schedule: Schedule,
    /// The share that is verified each time, in percent, beginning with the longest unverified.
    pub percent: u64,
    /// Bytes per second, all images that are read at the same time together.
    pub bandwidth_limit: Option<NonZeroU64>,
}

/// Which good snapshots of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// The newest good one.
    Newest,
    /// All good ones that are kept.
    All,
}

/// Which snapshots are exported, and into which archives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// At least one, each once.
    pub archives: Vec<ArchiveName>,
    /// Which snapshots are exported.
    pub snapshots: Which,
    /// Whether a snapshot may be deleted only once each archive has, or has had, a verified copy.
    pub required: bool,
    /// A snapshot that is kept for this long only because a copy is missing is an alert.
    pub alert_after: Duration,
    /// Downloads at once.
    pub concurrency: NonZeroUsize,
    /// Ranged requests at once per download, as far as the store allows them.
    pub connections: NonZeroUsize,
    /// After this long without a byte, a download continues on a new connection.
    pub stall_timeout: Duration,
    /// Bytes per second, for all downloads of the policy together.
    pub bandwidth_limit: Option<NonZeroU64>,
}

/// Which snapshots become templates.
#[derive(Debug, Clone, PartialEq)]
pub struct Promote {
    /// The pattern of a template's name.
    pub name: TemplateName,
    /// Which snapshots are promoted, each at most once.
    pub snapshots: Which,
    /// How many of the templates that this policy made are kept per instance; without it, all.
    pub keep: Option<NonZeroU32>,
    /// The template's description, at most 255 characters.
    pub description: Option<String>,
    /// The template's default user.
    pub default_user: Option<String>,
    /// Whether the template offers to log in by password.
    pub password_enabled: Option<bool>,
    /// Whether the template offers to log in by SSH key.
    pub ssh_key_enabled: Option<bool>,
}
