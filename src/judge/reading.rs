//! Reads the deciding keys of a policy. What it can't read is an error: then it is not known what the policy keeps.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::Value;

use crate::judge::calendar::Age;
use crate::judge::facts::{InstanceFacts, Keys, SnapshotFacts};
use crate::judge::table::{PERIODS, Table};
use crate::policy::select::NameGlob;
use crate::schedule::Schedule;
use crate::snapshot::{InstanceId, SnapshotId};

/// What a policy asks for.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each stands for a key of its own")]
pub(super) struct Reading {
    pub(super) is_enabled: bool,
    pub(super) time_zone: TimeZone,
    pub(super) creates: bool,
    pub(super) expect_newest: Option<Age>,
    pub(super) only_created: bool,
    pub(super) judges_orphans: bool,
    pub(super) table: Option<Table>,
    /// The archives in which it requires a copy before a deletion.
    pub(super) required: Vec<String>,
    /// Whether that must be of the snapshot itself.
    pub(super) requires_all: bool,
    /// When it was last due, if it has a schedule that matters.
    pub(super) last_due: Option<Timestamp>,
    instances: Option<Vec<Named<InstanceId>>>,
    exclude_instances: Vec<Named<InstanceId>>,
    labels: Vec<(String, NameGlob)>,
    exclude_labels: Vec<(String, NameGlob)>,
    excludes_managed: bool,
    snapshot_names: Option<Vec<NameGlob>>,
    exclude_snapshots: Vec<Named<SnapshotId>>,
}

/// An instance or a snapshot by what names it.
#[derive(Debug)]
enum Named<Id> {
    /// `self`, where it is not known which instance that is.
    AnyMachine,
    Id(Id),
    Name(NameGlob),
}

impl Reading {
    /// The keys as of now.
    ///
    /// # Errors
    /// The key that can't be read.
    pub(super) fn new(keys: &Keys, this_machine: Option<InstanceId>, now: Timestamp) -> Result<Self, String> {
        let reader = Reader(keys);
        if let Some(unknown) = keys.keys().find(|key| !KNOWN.contains(&key.as_str()) && !is_period_key(key)) {
            return Err(unknown.clone());
        }
        let time_zone = reader.of("timezone", |zone| TimeZone::get(zone.as_str()?).ok())?;
        let time_zone = time_zone.unwrap_or(TimeZone::UTC);
        let schedule = reader.of("schedule", |line| line.as_str()?.parse::<Schedule>().ok())?;
        let machine = |text: &str| match this_machine {
            _ if text != "self" => named(text),
            Some(id) => Some(Named::Id(id)),
            None => Some(Named::AnyMachine),
        };
        let has_table = reader.of("retention", Value::as_bool)?.unwrap_or(false);
        let is_required = reader.of("export.required", Value::as_bool)?.unwrap_or(false);
        let archives = reader.list("export.archives", |text| Some(text.to_owned()))?.unwrap_or_default();
        Ok(Self {
            is_enabled: reader.of("enabled", Value::as_bool)?.unwrap_or(true),
            creates: reader.of("create", Value::as_bool)?.unwrap_or(false),
            expect_newest: reader.age("guard.expect_newest")?,
            only_created: reader.word("ownership")? == Some("created"),
            judges_orphans: reader.word("orphans")? == Some("apply"),
            table: if has_table { Some(reader.table()?) } else { None },
            required: if is_required { archives } else { Vec::new() },
            requires_all: reader.word("export.snapshots")? == Some("all"),
            last_due: schedule.and_then(|one| one.last_until(now, Timestamp::UNIX_EPOCH, &time_zone)),
            time_zone,
            instances: reader.list("instances", machine)?,
            exclude_instances: reader.list("exclude_instances", machine)?.unwrap_or_default(),
            labels: reader.labels("labels")?,
            exclude_labels: reader.labels("exclude_labels")?,
            excludes_managed: !reader.of("managed", Value::as_bool)?.unwrap_or(true),
            snapshot_names: reader.list("snapshot_names", |text| NameGlob::new(text).ok())?,
            exclude_snapshots: reader.list("exclude_snapshots", named)?.unwrap_or_default(),
        })
    }

    /// Whether it is not known which instances it selects.
    pub(super) fn is_in_doubt(&self) -> bool {
        let mut all = self.instances.iter().flatten().chain(&self.exclude_instances);
        all.any(|named| matches!(named, Named::AnyMachine))
    }

    /// Whether it selects an instance, of which nothing but the id is known if it is not listed. While it is not known which
    /// one `self` is, that selects all and excludes none: so other policies delete nothing that may be kept.
    pub(super) fn selects_instance(&self, id: Option<InstanceId>, listed: Option<&InstanceFacts>) -> bool {
        let name = listed.map(|instance| instance.name.as_str());
        let is_meant = |one: &Named<InstanceId>, of_any_machine: bool| match (one, id) {
            (Named::AnyMachine, _) => of_any_machine,
            (_, None) => false,
            (Named::Id(meant), Some(id)) => *meant == id,
            (Named::Name(glob), Some(_)) => name.is_some_and(|name| glob.matches(name)),
        };
        let has = |(label, glob): &(String, NameGlob)| {
            let value = listed.and_then(|instance| instance.labels.get(label));
            value.is_some_and(|value| glob.matches(value))
        };
        if self.instances.as_ref().is_some_and(|all| !all.iter().any(|one| is_meant(one, true))) {
            return false;
        }
        if self.exclude_instances.iter().any(|one| is_meant(one, false)) || !self.labels.iter().all(has) {
            return false;
        }
        if let Some(instance) = listed {
            let is_excluded = self.excludes_managed && instance.is_managed;
            return !is_excluded && !self.exclude_labels.iter().any(has);
        }
        // Its name, its labels and its manager are unknown: it may be excluded by them.
        let by_name = self.exclude_instances.iter().any(|one| matches!(one, Named::Name(_)));
        !self.excludes_managed && self.exclude_labels.is_empty() && !by_name
    }

    /// Whether it selects a snapshot of an instance that it selects.
    pub(super) fn selects_snapshot(&self, snapshot: &SnapshotFacts) -> bool {
        let is_excluded = |one: &Named<SnapshotId>| match one {
            Named::AnyMachine => false,
            Named::Id(id) => *id == snapshot.id,
            Named::Name(glob) => glob.matches(&snapshot.name),
        };
        let names = self.snapshot_names.as_ref();
        names.is_none_or(|globs| globs.iter().any(|glob| glob.matches(&snapshot.name)))
            && !self.exclude_snapshots.iter().any(is_excluded)
    }
}

/// The keys that this reads, or that say nothing about snapshots, beside those of the periods.
const KNOWN: [&str; 27] = [
    "create",
    "enabled",
    "exclude_instances",
    "exclude_labels",
    "exclude_snapshots",
    "export.archives",
    "export.required",
    "export.snapshots",
    "failed_after",
    "guard.expect_newest",
    "instances",
    "keep_last",
    "keep_oldest",
    "keep_within",
    "labels",
    "managed",
    "max_age",
    "max_count",
    "min_keep",
    "min_keep_consistent",
    "orphans",
    "ownership",
    "promote.keep",
    "retention",
    "schedule",
    "snapshot_names",
    "timezone",
];

fn is_period_key(key: &str) -> bool {
    PERIODS.iter().any(|(_, keep, within)| key == *keep || key == *within)
}

fn named<Id: std::str::FromStr>(text: &str) -> Option<Named<Id>> {
    text.parse().map(Named::Id).or_else(|_| NameGlob::new(text).map(Named::Name)).ok()
}

/// Reads keys, each of which may be left out. An error is the key that can't be read.
struct Reader<'k>(&'k Keys);

impl<'k> Reader<'k> {
    fn of<T>(&self, key: &str, read: impl FnOnce(&'k Value) -> Option<T>) -> Result<Option<T>, String> {
        self.0.get(key).map(|value| read(value).ok_or_else(|| key.to_owned())).transpose()
    }

    fn word(&self, key: &str) -> Result<Option<&'k str>, String> {
        let words = ["created", "all", "apply", "keep", "newest"];
        self.of(key, |value| value.as_str().filter(|word| words.contains(word)))
    }

    fn age(&self, key: &str) -> Result<Option<Age>, String> {
        self.of(key, |value| Age::read(value.as_str()?))
    }

    fn count(&self, key: &str) -> Result<Option<u64>, String> {
        self.of(key, |value| if value.as_str() == Some("all") { Some(u64::MAX) } else { value.as_u64() })
    }

    fn list<T>(&self, key: &str, read: impl Fn(&str) -> Option<T>) -> Result<Option<Vec<T>>, String> {
        self.of(key, |value| value.as_array()?.iter().map(|text| read(text.as_str()?)).collect())
    }

    fn labels(&self, key: &str) -> Result<Vec<(String, NameGlob)>, String> {
        let glob = |value: &Value| NameGlob::new(value.as_str()?).ok();
        let read = |value: &Value| {
            value.as_object()?.iter().map(|(label, value)| Some((label.clone(), glob(value)?))).collect()
        };
        Ok(self.of(key, read)?.unwrap_or_default())
    }

    fn table(&self) -> Result<Table, String> {
        let (mut keep, mut keep_within_each) = ([None; 5], [None; 5]);
        for (place, (_, count, within)) in PERIODS.into_iter().enumerate() {
            if let (Some(keep), Some(keep_within)) = (keep.get_mut(place), keep_within_each.get_mut(place)) {
                (*keep, *keep_within) = (self.count(count)?, self.age(within)?);
            }
        }
        Ok(Table {
            keep_last: self.count("keep_last")?,
            keep_within: self.age("keep_within")?,
            keep,
            keep_within_each,
            keep_oldest: self.of("keep_oldest", Value::as_bool)?.unwrap_or(true),
            max_age: self.age("max_age")?,
            max_count: self.count("max_count")?,
            min_keep: self.count("min_keep")?.unwrap_or(1),
            min_keep_consistent: self.count("min_keep_consistent")?.unwrap_or(0),
            failed_after: self.age("failed_after")?,
        })
    }
}
