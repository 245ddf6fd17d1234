//! Reads the policies.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::str::FromStr;
use std::time::Duration;

use jiff::tz::{self, TimeZone};

use crate::config::toml_reader::{Table, Value};
use crate::config::{ArchiveSettings, keys, read_concurrency, read_schedule};
use crate::policy::rate::Rate;
use crate::policy::select::{NameGlob, Pattern, Select, ThisMachine};
use crate::policy::template_name::TemplateName;
use crate::policy::{
    ArchiveName, ByPeriod, Export, Guard, OnStart, Period, Policy, PolicyName, Promote, Retention, Which,
};
use crate::snapshot::{InstanceId, ZoneName};
use crate::text::excerpt;

/// Half of a zone at once is no routine.
const MAX_DELETE_PERCENT: u8 = 50;
/// A listing that lost half of its snapshots by itself is not to be trusted.
const MAX_LISTING_DROP_PERCENT: u8 = 50;
/// How far this machine's clock may be from the API's, unless a policy says otherwise. Clocks that are kept by NTP are off by
/// milliseconds, so one that is further off is not kept; at ten minutes slow it could not even sign a request.
pub const MAX_CLOCK_SKEW: Duration = Duration::from_mins(5);
/// Whatever the rules say, the newest good snapshot of an instance is not pruned.
const MIN_KEEP: u32 = 1;
/// A night's export may fail once; that the next one does as well should be heard.
const ALERT_AFTER: Duration = Duration::from_hours(36);
/// Two downloads keep a line and a disk busy; more compete.
const DOWNLOADS: NonZeroUsize = NonZeroUsize::new(2).unwrap();
/// No store that limits a connection gives more to more of them.
const CONNECTIONS_MAX: u64 = 16;
/// A minute without a byte: no store is so slow, and a dead connection is noticed.
const STALL_TIMEOUT: Duration = Duration::from_mins(1);

/// The most characters of a template's description that Exoscale takes everywhere.
const DESCRIPTION_MAX: usize = 255;
/// The most characters of a user's name that Exoscale takes.
const USER_MAX: usize = 255;

/// The way out of a policy without zones.
const ZONES_EXAMPLE: &str = "name at least one, such as `zones = [\"ch-gva-2\"]`";

/// The archives that the file names; whether their settings are right is their own matter.
type Archives = BTreeMap<ArchiveName, Option<ArchiveSettings>>;

/// All policies, in the order of the file.
pub(super) fn read(table: &Table<'_>, archives: &Archives) -> Vec<Policy> {
    table
        .named::<PolicyName>()
        .into_iter()
        .map(|(name, policy)| read_policy(name, &policy, archives))
        .collect()
}

fn read_policy(name: PolicyName, table: &Table<'_>, archives: &Archives) -> Policy {
    let on_start = [("if_missed", OnStart::IfMissed), ("wait", OnStart::Wait), ("now", OnStart::Now)];
    let create = table.boolean("create").unwrap_or(false);
    let zones = table.required("zones", ZONES_EXAMPLE);
    Policy {
        name,
        enabled: table.boolean("enabled").unwrap_or(true),
        schedule: table.value("schedule").and_then(|value| read_schedule(&value)),
        time_zone: table.value("timezone").and_then(|value| read_time_zone(&value)).unwrap_or(TimeZone::UTC),
        jitter: table.duration("jitter").unwrap_or(Duration::ZERO),
        on_start: table.choice("on_start", &on_start).unwrap_or(OnStart::IfMissed),
        deadline: table.duration("deadline"),
        create,
        zones: zones.map_or_else(Vec::new, |zones| {
            zones.list(Some(ZONES_EXAMPLE), |zone| zone.parsed::<ZoneName>("a zone"))
        }),
        select: read_select(&table.table("select"), create),
        retention: read_retention(&table.table("retention")),
        guard: read_guard(&table.table("guard")),
        export: read_export(&table.table("export"), archives),
        promote: read_promote(&table.table("promote")),
    }
}

fn read_time_zone(value: &Value<'_>) -> Option<TimeZone> {
    let text = value.text()?;
    // Only what a name may have: what is asked for must not leave the folder of the zones.
    let plain = !text.is_empty()
        && !text.contains("..")
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/_+-".contains(&b));
    let zone = plain.then(|| TimeZone::get(text).ok()).flatten().filter(|zone| !zone.is_unknown());
    if zone.is_none() {
        let names: Vec<String> = tz::db().available().map(|name| name.to_string()).collect();
        let near = keys::nearest(text, names.iter().map(String::as_str));
        value.place().wrong(
            format!("the time zone `{}` is not known", excerpt(text, 64)),
            near.map_or_else(
                || "use an IANA name, such as `Europe/Zurich`".to_owned(),
                |near| format!("did you mean `{near}`?"),
            ),
        );
    }
    zone
}

/// A policy that takes snapshots prunes its own alone, unless told otherwise.
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
        labels: table.table("labels").texts().into_iter().collect(),
        snapshot_names: table
            .value("snapshot_names")
            .map(|list| list.list(Some(EMPTY_SELECTS_NOTHING), |value| read_pattern(value, NameGlob::new))),
        exclude_snapshots: table
            .value("exclude_snapshots")
            .map_or_else(Vec::new, |list| patterns(&list, None)),
        only_created: table.choice("ownership", &[("all", false), ("created", true)]).unwrap_or(create),
        judge_orphans: table.choice("orphans", &[("keep", false), ("apply", true)]).unwrap_or(false),
        this_machine: ThisMachine { is_selected, is_excluded, unknown: None },
    }
}

/// Instances by name or id, and whether this machine is among them.
fn instances(list: &Value<'_>, empty: Option<&str>) -> (Vec<Pattern<InstanceId>>, bool) {
    let named = list.list(empty, |value| match value.text()? {
        SELF => Some(None),
        _ => read_pattern(value, Pattern::new).map(Some),
    });
    let with_self = named.iter().any(Option::is_none);
    (named.into_iter().flatten().collect(), with_self)
}

/// The instance that this program runs on. One that is called so can be named by its id, or as `[s]elf`.
const SELF: &str = "self";

const EMPTY_SELECTS_NOTHING: &str = "an empty list selects nothing: leave the key out to select all";

/// What stays, if the section is there.
pub(super) fn read_retention(table: &Table<'_>) -> Option<Retention> {
    let keep = |period: Period| format!("keep_{}", period.adverb());
    let keep_within = |period: Period| format!("keep_within_{}", period.adverb());
    let count_or_all = |key: &str| table.value(key).and_then(|value| value.count_or_all());
    let mut rules =
        vec!["keep_last".to_owned(), "keep_within".to_owned(), "max_age".to_owned(), "max_count".to_owned()];
    for period in Period::ALL {
        rules.extend([keep(period), keep_within(period)]);
    }
    if table.is_there() && !rules.iter().any(|rule| table.value(rule).is_some() || table.has_typo_of(rule)) {
        table.place().missing(
            "there is no rule in it",
            "write at least one of `keep_last`, `keep_within`, `max_age`, `max_count`, or take the section out to prune nothing",
        );
    }
    let min_keep = table.number("min_keep", 0..=u32::MAX.into());
    if min_keep == Some(0)
        && table.boolean("allow_empty") != Some(true)
        && let Some(value) = table.value("min_keep")
    {
        value.place().wrong(
            "`0` would let the last good snapshot go",
            "use 1 or more; 0 is possible only beside `allow_empty = true`",
        );
    }
    let retention = Retention {
        keep_last: count_or_all("keep_last"),
        keep_within: table.span("keep_within"),
        keep: ByPeriod::of(|period| count_or_all(&keep(period))),
        keep_within_each: ByPeriod::of(|period| table.span(&keep_within(period))),
        keep_oldest: table.boolean("keep_oldest").unwrap_or(true),
        max_age: table.span("max_age"),
        max_count: table.count("max_count"),
        min_keep: min_keep.and_then(|number| u32::try_from(number).ok()).unwrap_or(MIN_KEEP),
        failed_after: table.span("failed_after"),
    };
    table.is_there().then_some(retention)
}

fn read_guard(table: &Table<'_>) -> Guard {
    let percent = |key| table.number(key, 0..=100).and_then(|number| u8::try_from(number).ok());
    Guard {
        max_deletes: table.number("max_deletes", 0..=u64::MAX),
        max_delete_percent: percent("max_delete_percent").unwrap_or(MAX_DELETE_PERCENT),
        max_listing_drop_percent: percent("max_listing_drop_percent").unwrap_or(MAX_LISTING_DROP_PERCENT),
        max_clock_skew: table.duration("max_clock_skew").unwrap_or(MAX_CLOCK_SKEW),
    }
}

fn read_export(table: &Table<'_>, archives: &Archives) -> Option<Export> {
    let example = "name at least one, such as `archives = [\"vault\"]`";
    let named = table.required("archives", example);
    let export = Export {
        archives: named.map_or_else(Vec::new, |list| {
            list.list(Some(example), |value| read_archive_name(value, archives))
        }),
        snapshots: read_which(table),
        required: table.boolean("required").unwrap_or(true),
        alert_after: table.duration("alert_after").unwrap_or(ALERT_AFTER),
        concurrency: read_concurrency(table).unwrap_or(DOWNLOADS),
        connections: table
            .number("connections", 1..=CONNECTIONS_MAX)
            .and_then(|number| usize::try_from(number).ok())
            .and_then(NonZeroUsize::new)
            .unwrap_or(NonZeroUsize::MIN),
        stall_timeout: table.duration("stall_timeout").unwrap_or(STALL_TIMEOUT),
        bandwidth_limit: table
            .value("bandwidth_limit")
            .and_then(|value| value.parsed::<Rate>("a rate"))
            .map(|rate| rate.0),
    };
    table.is_there().then_some(export)
}

fn read_archive_name(value: &Value<'_>, archives: &Archives) -> Option<ArchiveName> {
    let name = value.parsed::<ArchiveName>("an archive's name")?;
    if !archives.contains_key(&name) {
        let near = keys::nearest(name.as_str(), archives.keys().map(ArchiveName::as_str));
        value.place().missing(
            format!("there is no archive `{name}`"),
            near.map_or_else(
                || format!("write a section `[archives.{name}]`"),
                |near| format!("did you mean `{near}`?"),
            ),
        );
    }
    Some(name)
}

fn read_promote(table: &Table<'_>) -> Option<Promote> {
    let line = |key, max| table.value(key).and_then(|value| value.line(max));
    let name = table
        .required("name", "write how templates are called, such as `name = \"{instance}-{created:%Y%m%d}\"`");
    let (snapshots, keep) = (read_which(table), table.count("keep"));
    let (description, default_user) = (line("description", DESCRIPTION_MAX), line("default_user", USER_MAX));
    let (password_enabled, ssh_key_enabled) =
        (table.boolean("password_enabled"), table.boolean("ssh_key_enabled"));
    let name = name.and_then(|value| {
        let name = value.text()?.parse::<TemplateName>();
        name.map_err(|error| value.place().wrong(error.fact(), error.help())).ok()
    });
    Some(Promote {
        name: name?,
        snapshots,
        keep,
        description,
        default_user,
        password_enabled,
        ssh_key_enabled,
    })
}

fn read_which(table: &Table<'_>) -> Which {
    table.choice("snapshots", &[("newest", Which::Newest), ("all", Which::All)]).unwrap_or(Which::Newest)
}

/// Names as globs, or ids.
fn patterns<Id: FromStr + PartialEq>(list: &Value<'_>, empty: Option<&str>) -> Vec<Pattern<Id>> {
    list.list(empty, |value| read_pattern(value, Pattern::new))
}

fn read_pattern<T>(value: &Value<'_>, read: impl Fn(&str) -> Result<T, String>) -> Option<T> {
    let text = value.text()?;
    let help = "write a name, a glob such as `web-*`, or an id";
    if text.is_empty() {
        value.place().wrong("an empty name fits nothing", help);
        return None;
    }
    read(text)
        .map_err(|reason| {
            value.place().wrong(format!("`{}` is no pattern: {reason}", excerpt(text, 64)), help);
        })
        .ok()
}
