//! The keys of a policy that decide what is deleted, as values that can be compared, remembered, and set again.
//!
//! The names are those of the configuration, and so are the values, as JSON. A key that is left out has no value.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::num::{NonZeroU32, NonZeroUsize};
use std::str::FromStr;
use std::time::Duration;

use jiff::tz::TimeZone;
use serde_json::Value;

use crate::policy::name::PolicyName;
use crate::policy::select::{NameGlob, Pattern, Select};
use crate::policy::span::Span;
use crate::policy::{ByPeriod, Count, Export, Guard, Hooks, OnStart, Period, Policy, Retention, Which};
use crate::snapshot::InstanceId;

/// The word for the instance that this program runs on, among names of instances.
const SELF: &str = "self";

/// How many application-consistent ones are always kept.
pub(crate) const MIN_KEEP_CONSISTENT: &str = "min_keep_consistent";

/// Whether a policy runs.
pub(crate) const ENABLED: &str = "enabled";

/// Whether members of pools are selected.
pub(crate) const MANAGED: &str = "managed";

/// The labels by which instances are selected or excluded.
pub(crate) const LABEL_KEYS: [&str; 2] = ["labels", "exclude_labels"];

/// When a policy runs: it decides until when the copy of the last due run counts, where the policy does not prune.
const SCHEDULE: &str = "schedule";

/// How many templates stay per instance.
pub(crate) const PROMOTE_KEEP: &str = "promote.keep";

/// The deciding keys that a policy has. Its zones are not among them: they decide whether it is a policy of a zone at all.
pub fn deciding_keys(policy: &Policy) -> BTreeMap<String, Value> {
    // Each field by name, so that a new one cannot be forgotten here.
    let Policy { name: _, enabled, schedule, time_zone, jitter: _, on_start: _, deadline: _, .. } = policy;
    // Hooks change nothing about what is kept.
    let Policy { create, zones: _, select, retention, guard, export, promote, hooks: _, .. } = policy;
    let mut keys = vec![
        (ENABLED.to_owned(), Some(Value::from(*enabled))),
        ("timezone".to_owned(), Some(Value::from(time_zone.iana_name().unwrap_or("UTC")))),
        ("create".to_owned(), Some(Value::from(*create))),
    ];
    let expected = guard.expect_newest.as_ref().map(|span| Value::from(span.to_string()));
    keys.push(("guard.expect_newest".to_owned(), expected));
    add_select(&mut keys, select);
    if let Some(retention) = retention {
        add_retention(&mut keys, retention);
    }
    if let Some(Export { archives, snapshots, required, .. }) = export {
        keys.push(("export.archives".to_owned(), Some(texts(archives))));
        let which = if *snapshots == Which::All { "all" } else { "newest" };
        keys.push(("export.snapshots".to_owned(), Some(Value::from(which))));
        keys.push(("export.required".to_owned(), Some(Value::from(*required))));
    }
    let decides = export.as_ref().is_some_and(|export| export.required && export.snapshots == Which::Newest);
    if let (true, None, Some(schedule)) = (decides, retention, schedule) {
        keys.push((SCHEDULE.to_owned(), Some(Value::from(schedule.as_str()))));
    }
    if let Some(keep) = promote.as_ref().and_then(|promote| promote.keep) {
        keys.push((PROMOTE_KEEP.to_owned(), Some(Value::from(keep.get()))));
    }
    keys.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
}

fn add_select(keys: &mut Vec<(String, Option<Value>)>, select: &Select) {
    let Select { instances, exclude_instances, labels: included, snapshot_names, exclude_snapshots, .. } =
        select;
    let Select { exclude_labels, exclude_managed, only_created, judge_orphans, this_machine, .. } = select;
    // This machine is the same one before and after its id is known.
    let name = |pattern: &Pattern<InstanceId>| match (pattern, this_machine.id) {
        (Pattern::Id(id), Some(this_machine)) if *id == this_machine => SELF.to_owned(),
        (pattern, _) => pattern.to_string(),
    };
    let with_self = |names: &[Pattern<InstanceId>], has_self: bool| {
        Value::from(names.iter().map(name).chain(has_self.then(|| SELF.to_owned())).collect::<Vec<_>>())
    };
    let are_selected = instances.is_some() || this_machine.is_selected;
    let selected = with_self(instances.as_deref().unwrap_or_default(), this_machine.is_selected);
    let excluded = with_self(exclude_instances, this_machine.is_excluded);
    let labels = |labels: &BTreeMap<String, NameGlob>| {
        let texts = labels.iter().map(|(key, glob)| (key.clone(), Value::from(glob.to_string())));
        (!labels.is_empty()).then(|| Value::Object(texts.collect()))
    };
    let has_some = |list: &Value| list.as_array().is_some_and(|list| !list.is_empty());
    let snapshots = texts(exclude_snapshots);
    keys.extend([
        ("instances".to_owned(), are_selected.then_some(selected)),
        ("exclude_instances".to_owned(), Some(excluded).filter(has_some)),
        ("labels".to_owned(), labels(included)),
        ("exclude_labels".to_owned(), labels(exclude_labels)),
        (MANAGED.to_owned(), exclude_managed.then(|| Value::from(false))),
        ("snapshot_names".to_owned(), snapshot_names.as_deref().map(texts)),
        ("exclude_snapshots".to_owned(), Some(snapshots).filter(has_some)),
        ("ownership".to_owned(), Some(Value::from(if *only_created { "created" } else { "all" }))),
        ("orphans".to_owned(), Some(Value::from(if *judge_orphans { "apply" } else { "keep" }))),
    ]);
}

fn add_retention(keys: &mut Vec<(String, Option<Value>)>, retention: &Retention) {
    let Retention { keep_last, keep_within, keep, keep_within_each, keep_oldest, .. } = retention;
    let Retention { max_age, max_count, min_keep, min_keep_consistent, failed_after, .. } = retention;
    let count = |count: &Count| match count {
        Count::Of(count) => Value::from(count.get()),
        Count::All => Value::from("all"),
    };
    let span = |span: &Span| Value::from(span.to_string());
    keys.extend([
        ("retention".to_owned(), Some(Value::from(true))),
        ("keep_last".to_owned(), keep_last.as_ref().map(count)),
        ("keep_within".to_owned(), keep_within.as_ref().map(span)),
        ("keep_oldest".to_owned(), Some(Value::from(*keep_oldest))),
        ("max_age".to_owned(), max_age.as_ref().map(span)),
        ("max_count".to_owned(), max_count.map(|count| Value::from(count.get()))),
        ("min_keep".to_owned(), Some(Value::from(*min_keep))),
        (
            MIN_KEEP_CONSISTENT.to_owned(),
            (*min_keep_consistent > 0).then(|| Value::from(*min_keep_consistent)),
        ),
        ("failed_after".to_owned(), failed_after.as_ref().map(span)),
    ]);
    for period in Period::ALL {
        let adverb = period.adverb();
        keys.push((format!("keep_{adverb}"), keep.get(period).as_ref().map(count)));
        keys.push((format!("keep_within_{adverb}"), keep_within_each.get(period).as_ref().map(span)));
    }
}

/// Sets deciding keys of a policy, or clears those without a value.
///
/// # Errors
/// The name of a key that this version does not know, or whose value it cannot read.
pub fn set_deciding_keys<'k>(
    policy: &mut Policy,
    keys: impl Iterator<Item = (&'k str, Option<&'k Value>)>,
) -> Result<(), String> {
    let keys: Vec<_> = keys.collect();
    // A table first: the keys in it need it, and without it they have no value.
    if let Some((_, value)) = keys.iter().find(|(name, _)| *name == "retention") {
        let table = policy.retention.take().unwrap_or_else(no_rules);
        policy.retention = value.is_some().then_some(table);
    }
    if keys.iter().any(|(name, value)| name.starts_with("export.") && value.is_some()) {
        policy.export.get_or_insert_with(no_archives);
    }
    for (name, value) in keys {
        set_key(policy, name, value).ok_or_else(|| name.to_owned())?;
    }
    if policy.export.as_ref().is_some_and(|export| export.archives.is_empty()) {
        policy.export = None;
    }
    Ok(())
}

/// A policy of the past, of which nothing else is known any more: it has these keys, and no schedule and no limits.
///
/// # Errors
/// As [`set_deciding_keys`].
pub fn policy_of_keys(name: PolicyName, keys: &BTreeMap<String, Value>) -> Result<Policy, String> {
    let mut policy = Policy {
        name,
        enabled: true,
        paused_since: None,
        schedule: None,
        time_zone: TimeZone::UTC,
        jitter: Duration::ZERO,
        on_start: OnStart::Wait,
        deadline: None,
        create: false,
        zones: Vec::new(),
        select: Select::default(),
        retention: None,
        guard: Guard {
            max_deletes: None,
            max_delete_percent: 100,
            max_listing_drop_percent: 100,
            max_clock_skew: Duration::ZERO,
            settle: Duration::ZERO,
            expect_newest: None,
        },
        export: None,
        promote: None,
        hooks: Hooks::default(),
    };
    set_deciding_keys(&mut policy, keys.iter().map(|(key, value)| (key.as_str(), Some(value))))?;
    Ok(policy)
}

/// `None` if the key is unknown or its value cannot be read.
fn set_key(policy: &mut Policy, name: &str, value: Option<&Value>) -> Option<()> {
    let select = &mut policy.select;
    match name {
        "retention" => {}
        PROMOTE_KEEP => {
            let keep = optional(value, number)?;
            if let Some(promote) = &mut policy.promote {
                promote.keep = keep;
            }
        }
        ENABLED => policy.enabled = value?.as_bool()?,
        SCHEDULE => policy.schedule = optional(value, parsed)?,
        "create" => policy.create = value?.as_bool()?,
        "guard.expect_newest" => policy.guard.expect_newest = optional(value, parsed)?,
        "timezone" => policy.time_zone = TimeZone::get(value?.as_str()?).ok()?,
        "instances" => {
            let (names, has_self) = instances(value)?;
            select.this_machine.is_selected = has_self;
            select.instances = value.is_some().then_some(names);
        }
        "exclude_instances" => {
            (select.exclude_instances, select.this_machine.is_excluded) = instances(value)?;
        }
        "labels" => select.labels = labels(value)?,
        "exclude_labels" => select.exclude_labels = labels(value)?,
        MANAGED => select.exclude_managed = !value.map_or(Some(true), Value::as_bool)?,
        "snapshot_names" => {
            let names = list(value, |text| NameGlob::new(text).ok())?;
            select.snapshot_names = value.is_some().then_some(names);
        }
        "exclude_snapshots" => select.exclude_snapshots = list(value, |text| Pattern::new(text).ok())?,
        "ownership" => select.only_created = one_of(value?, ["all", "created"])?,
        "orphans" => select.judge_orphans = one_of(value?, ["keep", "apply"])?,
        _ => match name.strip_prefix("export.") {
            Some(name) => set_export_key(policy.export.as_mut(), name, value)?,
            None => set_retention_key(policy.retention.as_mut(), name, value)?,
        },
    }
    Some(())
}

fn set_export_key(export: Option<&mut Export>, name: &str, value: Option<&Value>) -> Option<()> {
    let Some(export) = export else { return value.is_none().then_some(()) };
    match name {
        "archives" => export.archives = list(value, |text| text.parse().ok())?,
        "snapshots" => {
            let is_all = value.map_or(Some(false), |value| one_of(value, ["newest", "all"]))?;
            export.snapshots = if is_all { Which::All } else { Which::Newest };
        }
        "required" => export.required = value.map_or(Some(false), Value::as_bool)?,
        _ => return None,
    }
    Some(())
}

fn set_retention_key(table: Option<&mut Retention>, name: &str, value: Option<&Value>) -> Option<()> {
    // A key that was added together with the table is cleared together with it.
    let Some(table) = table else { return Some(()) };
    match name {
        "keep_last" => table.keep_last = optional(value, count)?,
        "keep_within" => table.keep_within = optional(value, parsed)?,
        "keep_oldest" => table.keep_oldest = value.map_or(Some(true), Value::as_bool)?,
        "max_age" => table.max_age = optional(value, parsed)?,
        "max_count" => table.max_count = optional(value, number)?,
        "min_keep" => table.min_keep = value.map_or(Some(1), |value| value.as_u64()?.try_into().ok())?,
        MIN_KEEP_CONSISTENT => {
            table.min_keep_consistent = value.map_or(Some(0), |value| value.as_u64()?.try_into().ok())?;
        }
        "failed_after" => table.failed_after = optional(value, parsed)?,
        _ => {
            let period_of = |prefix: &str| {
                let adverb = name.strip_prefix(prefix)?;
                Period::ALL.into_iter().find(|period| period.adverb() == adverb)
            };
            if let Some(period) = period_of("keep_within_") {
                *table.keep_within_each.get_mut(period) = optional(value, parsed)?;
            } else {
                *table.keep.get_mut(period_of("keep_")?) = optional(value, count)?;
            }
        }
    }
    Some(())
}

/// A table that keeps everything.
fn no_rules() -> Retention {
    Retention {
        keep_last: None,
        keep_within: None,
        keep: ByPeriod::default(),
        keep_within_each: ByPeriod::default(),
        keep_oldest: true,
        max_age: None,
        max_count: None,
        min_keep: 1,
        min_keep_consistent: 0,
        failed_after: None,
    }
}

fn no_archives() -> Export {
    Export {
        archives: Vec::new(),
        snapshots: Which::Newest,
        required: false,
        alert_after: Duration::MAX,
        concurrency: NonZeroUsize::MIN,
        connections: NonZeroUsize::MIN,
        stall_timeout: Duration::MAX,
        bandwidth_limit: None,
    }
}

fn texts<T: Display>(list: &[T]) -> Value {
    Value::from(list.iter().map(ToString::to_string).collect::<Vec<_>>())
}

fn list<T>(value: Option<&Value>, read: impl Fn(&str) -> Option<T>) -> Option<Vec<T>> {
    let Some(value) = value else { return Some(Vec::new()) };
    value.as_array()?.iter().map(|text| read(text.as_str()?)).collect()
}

fn instances<Id: FromStr + PartialEq>(value: Option<&Value>) -> Option<(Vec<Pattern<Id>>, bool)> {
    let names = list(value, |text| match text {
        SELF => Some(None),
        text => Pattern::new(text).ok().map(Some),
    })?;
    let has_self = names.iter().any(Option::is_none);
    Some((names.into_iter().flatten().collect(), has_self))
}

fn labels(value: Option<&Value>) -> Option<BTreeMap<String, NameGlob>> {
    let Some(value) = value else { return Some(BTreeMap::new()) };
    let glob = |value: &Value| NameGlob::new(value.as_str()?).ok();
    value.as_object()?.iter().map(|(key, value)| Some((key.clone(), glob(value)?))).collect()
}

/// Whether it is the second of these two words.
fn one_of(value: &Value, words: [&str; 2]) -> Option<bool> {
    let place = words.iter().position(|word| Some(*word) == value.as_str())?;
    Some(place == 1)
}

#[expect(clippy::option_option, reason = "the outer one is for values that cannot be read")]
fn optional<T>(value: Option<&Value>, read: impl FnOnce(&Value) -> Option<T>) -> Option<Option<T>> {
    value.map_or(Some(None), |value| read(value).map(Some))
}

fn parsed<T: FromStr>(value: &Value) -> Option<T> {
    value.as_str()?.parse().ok()
}

fn number(value: &Value) -> Option<NonZeroU32> {
    NonZeroU32::new(value.as_u64()?.try_into().ok()?)
}

fn count(value: &Value) -> Option<Count> {
    if value.as_str() == Some("all") { Some(Count::All) } else { number(value).map(Count::Of) }
}
