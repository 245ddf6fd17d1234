//! Reads the policies, and the retention rules that archives share with them.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::num::{NonZeroU64, NonZeroUsize};
use std::time::Duration;

use jiff::tz::{self, TimeZone};

use crate::config::keys;
use crate::config::toml_reader::{Table, Value};
use crate::policy::name::{ArchiveName, PolicyName};
use crate::policy::rate::parse_rate;
use crate::policy::select::{Exemption, NameGlob, Pattern, Select, ThisMachine};
use crate::policy::template_name::TemplateName;
use crate::policy::{ByPeriod, Export, Guard, Hooks, OnStart, Policy, Program, Promote, Retention, Which};
use crate::snapshot::{InstanceId, ZoneName};
use crate::text::excerpt;

/// Deleting half of a zone in one run is no routine.
const MAX_DELETE_PERCENT: u8 = 50;
/// A listing that lacks half of its former snapshots is not to be trusted.
const MAX_LISTING_DROP_PERCENT: u8 = 50;
/// The default for the largest difference between this machine's clock and the API's. With NTP it is milliseconds, so a
/// larger one means that nothing sets the clock; ten minutes slow it could not even sign a request.
pub const MAX_CLOCK_SKEW: Duration = Duration::from_mins(5);
/// Long enough to see the result of an edit on the next working day, and less than a day, so that a daily run that begins a
/// little earlier deletes what it was about to delete the day before.
const SETTLE: Duration = Duration::from_hours(20);
/// Whatever the rules say, the newest good snapshot of an instance is kept.
const MIN_KEEP: u32 = 1;
/// One nightly export may fail; a second failure in a row should alert.
const ALERT_AFTER: Duration = Duration::from_hours(36);
/// Two keep a network link and a disk busy; more compete for them.
const DOWNLOADS: NonZeroUsize = NonZeroUsize::new(2).unwrap();
/// Stores that limit a connection gain nothing from more connections than this.
const CONNECTIONS_MAX: u64 = 16;
/// No store is silent for a minute, and a dead connection is noticed soon enough.
const STALL_TIMEOUT: Duration = Duration::from_mins(1);
/// Freezing a guest or mounting a disk takes seconds; a program that hangs must not delay the snapshots for long.
const HOOK_TIMEOUT: Duration = Duration::from_mins(5);

/// The most characters of a template's description that Exoscale takes everywhere.
const DESCRIPTION_MAX: usize = 255;
/// The most characters of a user's name that Exoscale takes.
const USER_MAX: usize = 255;

/// The help for a policy without zones.
const ZONES_EXAMPLE: &str = "name at least one, such as `zones = [\"ch-gva-2\"]`";

/// All policies, in the order of the file. `archives` are the names that the file has, also those of archives with
/// invalid settings, which are reported elsewhere.
pub(super) fn read(table: &Table<'_>, archives: &BTreeSet<ArchiveName>) -> Vec<Policy> {
    table
        .named::<PolicyName>()
        .into_iter()
        .map(|(name, policy)| read_policy(name, &policy, archives))
        .collect()
}

fn read_policy(name: PolicyName, table: &Table<'_>, archives: &BTreeSet<ArchiveName>) -> Policy {
    let on_start = [("if_missed", OnStart::IfMissed), ("wait", OnStart::Wait), ("now", OnStart::Now)];
    let create = || table.read("create", Value::boolean).unwrap_or(false);
    Policy {
        name,
        enabled: table.read("enabled", Value::boolean).unwrap_or(true),
        paused_since: None,
        schedule: table.read("schedule", Value::schedule),
        time_zone: table.read("timezone", read_time_zone).unwrap_or(TimeZone::UTC),
        zones: table.required("zones", ZONES_EXAMPLE).map_or_else(Vec::new, |zones| {
            zones.list(Some(ZONES_EXAMPLE), |zone| zone.parsed::<ZoneName>("a zone"))
        }),
        jitter: table.read("jitter", Value::duration).unwrap_or(Duration::ZERO),
        on_start: table.choice("on_start", &on_start).unwrap_or(OnStart::IfMissed),
        deadline: table.read("deadline", Value::duration),
        create: create(),
        select: read_select(&table.table("select"), create()),
        retention: read_retention(&table.table("retention")),
        guard: read_guard(&table.table("guard")),
        export: read_export(&table.table("export"), archives),
        promote: read_promote(&table.table("promote")),
        hooks: read_hooks(&table.table("hooks")),
    }
}

fn read_time_zone(value: &Value<'_>) -> Option<TimeZone> {
    let text = value.text()?;
    // Only the characters of zone names: the name becomes a path in the system's folder of zones.
    let plain = !text.is_empty()
        && !text.contains("..")
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/_+-".contains(&b));
    let zone = plain.then(|| TimeZone::get(text).ok()).flatten().filter(|zone| !zone.is_unknown());
    if zone.is_none() {
        let names: Vec<String> = tz::db().available().map(|name| name.to_string()).collect();
        let example = || "use an IANA name, such as `Europe/Zurich`".to_owned();
        let help = keys::help_with(text, names.iter().map(String::as_str), example);
        value.place().wrong(format!("the time zone `{}` is not known", excerpt(text, 64)), help);
    }
    zone
}

/// By default a policy that creates snapshots prunes only those that it created.
fn read_select(table: &Table<'_>, create: bool) -> Select {
    let (mut is_selected, mut is_excluded) = (false, false);
    let instances = table.value("instances").map(|list| {
        let (instances, with_self) = instances(&list, Some(EMPTY_SELECTS_NOTHING));
        is_selected = with_self;
        instances
    });
    let exclude_instances = table.value("exclude_instances").map_or_else(Vec::new, |list| {
        let (instances, with_self) = self::instances(&list, None);
        is_excluded = with_self;
        instances
    });
    Select {
        instances,
        exclude_instances,
        labels: read_labels(&table.table("labels")),
        exclude_labels: read_labels(&table.table("exclude_labels")),
        exclude_managed: !table.read("managed", Value::boolean).unwrap_or(true),
        snapshot_names: table
            .value("snapshot_names")
            .map(|list| list.list(Some(EMPTY_SELECTS_NOTHING), |value| read_pattern(value, NameGlob::new))),
        exclude_snapshots: table
            .value("exclude_snapshots")
            .map_or_else(Vec::new, |list| list.list(None, |value| read_pattern(value, Pattern::new))),
        only_created: table.choice("ownership", &[("all", false), ("created", true)]).unwrap_or(create),
        judge_orphans: table.choice("orphans", &[("keep", false), ("apply", true)]).unwrap_or(false),
        this_machine: ThisMachine { is_selected, is_excluded, ..ThisMachine::default() },
    }
}

/// The instances that are meant to be without a backup.
pub(super) fn read_exemption(table: &Table<'_>) -> Exemption {
    let instance = |value: &Value<'_>| match value.text()? {
        SELF => value.wrong("`self` has no meaning here", "write the name or the id of the instance"),
        _ => read_pattern(value, Pattern::new),
    };
    Exemption {
        instances: table.value("exempt").map_or_else(Vec::new, |list| list.list(None, instance)),
        labels: read_labels(&table.table("exempt_labels")),
    }
}

/// Globs of the values of labels.
fn read_labels(table: &Table<'_>) -> BTreeMap<String, NameGlob> {
    let glob = |value: &Value<'_>| {
        let text = value.text()?;
        let wrong = |reason| {
            let fact = format!("`{}` is no pattern: {reason}", excerpt(text, 64));
            value.wrong(fact, "write a value of the label, or a glob such as `*`")
        };
        NameGlob::new(text).map_or_else(wrong, Some)
    };
    table.each(glob).into_iter().collect()
}

/// Instances by name or id, and whether the list contains `self`.
fn instances(list: &Value<'_>, empty: Option<&str>) -> (Vec<Pattern<InstanceId>>, bool) {
    let named = list.list(empty, |value| match value.text()? {
        SELF => Some(None),
        _ => read_pattern(value, Pattern::new).map(Some),
    });
    let with_self = named.iter().any(Option::is_none);
    (named.into_iter().flatten().collect(), with_self)
}

/// The instance that this program runs on. An instance whose name is `self` can be selected by its id, or as `[s]elf`.
const SELF: &str = "self";

const EMPTY_SELECTS_NOTHING: &str = "an empty list selects nothing: leave the key out to select all";

/// `None` if the section is not there: then nothing is pruned.
pub(super) fn read_retention(table: &Table<'_>) -> Option<Retention> {
    let has_rule = Cell::new(false);
    // An invalid rule, or a typo of one, is reported as such, and not as a section without rules.
    let rule = |key: &str| {
        let value = table.value(key);
        has_rule.set(has_rule.get() || value.is_some() || table.has_typo_of(key));
        value
    };
    let count_or_all = |key: &str| rule(key).and_then(|value| value.count_or_all());
    let span = |key: &str| rule(key).and_then(|value| value.span());
    let retention = Retention {
        keep_last: count_or_all("keep_last"),
        keep_within: span("keep_within"),
        keep: ByPeriod::of(|period| count_or_all(&format!("keep_{}", period.adverb()))),
        keep_within_each: ByPeriod::of(|period| span(&format!("keep_within_{}", period.adverb()))),
        keep_oldest: table.read("keep_oldest", Value::boolean).unwrap_or(true),
        max_age: span("max_age"),
        max_count: rule("max_count").and_then(|value| value.count()),
        min_keep: read_min_keep(table),
        min_keep_consistent: table.number("min_keep_consistent", 0..=u32::MAX.into()).unwrap_or(0),
        failed_after: table.read("failed_after", Value::span),
    };
    if table.is_there() && !has_rule.get() {
        table.place().missing(
            "there is no rule in it",
            "write at least one of `keep_last`, `keep_within`, `max_age`, `max_count`, or take the section out to prune nothing",
        );
    }
    table.is_there().then_some(retention)
}

fn read_min_keep(table: &Table<'_>) -> u32 {
    let min_keep = table.number("min_keep", 0..=u32::MAX.into()).unwrap_or(MIN_KEEP);
    let allow_empty = table.read("allow_empty", Value::boolean).unwrap_or(false);
    if min_keep == 0
        && !allow_empty
        && let Some(value) = table.value("min_keep")
    {
        value.place().wrong(
            "`0` would delete the last good snapshot",
            "use 1 or more; 0 is possible only beside `allow_empty = true`",
        );
    }
    min_keep
}

pub(super) fn read_guard(table: &Table<'_>) -> Guard {
    let percent = |key| table.number(key, 0..=100);
    Guard {
        max_deletes: table.number("max_deletes", 0..=u64::MAX),
        max_delete_percent: percent("max_delete_percent").unwrap_or(MAX_DELETE_PERCENT),
        max_listing_drop_percent: percent("max_listing_drop_percent").unwrap_or(MAX_LISTING_DROP_PERCENT),
        max_clock_skew: table.read("max_clock_skew", Value::duration).unwrap_or(MAX_CLOCK_SKEW),
        settle: table.read("settle", read_settle).unwrap_or(SETTLE),
        expect_newest: table.read("expect_newest", Value::span),
    }
}

/// A duration; `"0s"` switches it off.
fn read_settle(value: &Value<'_>) -> Option<Duration> {
    if value.text()? == "0s" { Some(Duration::ZERO) } else { value.duration() }
}

fn read_export(table: &Table<'_>, archives: &BTreeSet<ArchiveName>) -> Option<Export> {
    let example = "name at least one, such as `archives = [\"vault\"]`";
    let named = table.required("archives", example);
    let export = Export {
        archives: named.map_or_else(Vec::new, |list| {
            list.list(Some(example), |value| read_archive_name(value, archives))
        }),
        snapshots: read_which(table),
        required: table.read("required", Value::boolean).unwrap_or(true),
        alert_after: table.read("alert_after", Value::duration).unwrap_or(ALERT_AFTER),
        concurrency: table.concurrency().unwrap_or(DOWNLOADS),
        connections: table
            .number("connections", 1..=CONNECTIONS_MAX)
            .and_then(NonZeroUsize::new)
            .unwrap_or(NonZeroUsize::MIN),
        stall_timeout: table.read("stall_timeout", Value::duration).unwrap_or(STALL_TIMEOUT),
        bandwidth_limit: read_bandwidth_limit(table),
    };
    table.is_there().then_some(export)
}

pub(super) fn read_bandwidth_limit(table: &Table<'_>) -> Option<NonZeroU64> {
    table.value("bandwidth_limit").and_then(|value| value.valid(parse_rate(value.text()?)))
}

fn read_archive_name(value: &Value<'_>, archives: &BTreeSet<ArchiveName>) -> Option<ArchiveName> {
    let name = value.parsed::<ArchiveName>("an archive's name")?;
    if !archives.contains(&name) {
        let section = || format!("write a section `[archives.{name}]`");
        let help = keys::help_with(name.as_str(), archives.iter().map(ArchiveName::as_str), section);
        value.place().missing(format!("there is no archive `{name}`"), help);
    }
    Some(name)
}

fn read_promote(table: &Table<'_>) -> Option<Promote> {
    let line = |key, max| table.value(key).and_then(|value| value.line(max));
    let help = "write how templates are called, such as `name = \"{instance}-{created:%Y%m%d}\"`";
    let name =
        table.required("name", help).and_then(|value| value.valid(value.text()?.parse::<TemplateName>()));
    Some(Promote {
        snapshots: read_which(table),
        keep: table.read("keep", Value::count),
        description: line("description", DESCRIPTION_MAX),
        default_user: line("default_user", USER_MAX),
        password_enabled: table.read("password_enabled", Value::boolean),
        ssh_key_enabled: table.read("ssh_key_enabled", Value::boolean),
        // Last, so that without a name the other keys are checked all the same.
        name: name?,
    })
}

fn read_hooks(table: &Table<'_>) -> Hooks {
    let program = |key| table.read(key, read_program);
    let hooks = Hooks {
        before: program("before"),
        after: program("after"),
        on_failure: program("on_failure"),
        timeout: table.read("timeout", Value::duration).unwrap_or(HOOK_TIMEOUT),
    };
    let is_written = |key| table.value(key).is_some() || table.has_typo_of(key);
    if table.is_there() && !["before", "after", "on_failure"].into_iter().any(is_written) {
        table.place().missing(
            "there is no hook in it",
            "write at least one of `before`, `after`, `on_failure`, or take the section out",
        );
    }
    hooks
}

/// A program and its arguments. Whether there is such a program is found out where it is started.
fn read_program(value: &Value<'_>) -> Option<Program> {
    let example = "write a program and its arguments, such as `[\"/usr/local/bin/freeze\", \"db-1\"]`; there is no shell";
    let mut texts = value.texts(example)?.into_iter();
    let Some(name) = texts.next() else { return value.wrong("the list is empty", example) };
    if name.is_empty() || name.contains('/') && !name.starts_with('/') {
        let fact = format!("`{}` is no program", excerpt(&name, 64));
        return value.wrong(fact, "write an absolute path, or the name of a program in PATH");
    }
    Some(Program { name, arguments: texts.collect() })
}

fn read_which(table: &Table<'_>) -> Which {
    table.choice("snapshots", &[("newest", Which::Newest), ("all", Which::All)]).unwrap_or(Which::Newest)
}

fn read_pattern<T>(value: &Value<'_>, read: impl Fn(&str) -> Result<T, String>) -> Option<T> {
    let text = value.text()?;
    let help = "write a name, a glob such as `web-*`, or an id";
    if text.is_empty() {
        return value.wrong("an empty name fits nothing", help);
    }
    let wrong = |reason| value.wrong(format!("`{}` is no pattern: {reason}", excerpt(text, 64)), help);
    read(text).map_or_else(wrong, Some)
}
