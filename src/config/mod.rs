//! Reads: a TOML file becomes checked values, or the list of all that is wrong with it.
//!
//! [`load`] reads the file, [`parse`] understands its text and is pure: it opens no file that the text
//! names and asks no environment. Every key is known here, also those whose work comes later; these are
//! refused, never ignored. A default stands once, as a constant with its reason.
//!
//! `keys` lists what may be written, `walk` goes along the table that knows where everything stands,
//! `collector` collects what is wrong and prints it, `policies` reads the policies.

pub mod diagnostics;
mod keys;
pub mod policies;
mod toml_reader;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::num::{NonZeroU32, NonZeroUsize};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeTable;
use url::{Host, Url};

use crate::config::diagnostics::{Diagnostics, Diagnostic, Collector, Kind};
use crate::config::toml_reader::{Place, Table, Value};
use crate::disk::read_named_file;
use crate::policy::{ArchiveName, ArchiveRules, Policy, VerifyPlan};
use crate::schedule::Schedule;
use crate::snapshot::ZoneName;
use crate::text::{counted, excerpt};

/// The most bytes of a configuration: some thousand policies. More is another file, named by mistake.
pub const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// The variable that overrides `exoscale.endpoint`; the caller reads it.
pub const ENDPOINT_VARIABLE: &str = "EXOSCALE_API_ENDPOINT";

/// Where Exoscale's API is (the servers of its published description).
const ENDPOINT: &str = "https://api-{zone}.exoscale.com/v2";
/// Long enough for a listing of thousands, short enough to notice a dead connection soon.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The first wait between two polls of an operation, as the vendor's own clients do (egoscale v3).
const POLL_INTERVAL: Duration = Duration::from_secs(3);
/// An export of a large disk takes many minutes; beyond an hour something is stuck.
const OPERATION_TIMEOUT: Duration = Duration::from_hours(1);
/// Gentle with an API whose limits are not published.
const REQUESTS_PER_SECOND: NonZeroU32 = NonZeroU32::new(10).unwrap();
/// The most requests per second that may be asked for.
const REQUESTS_PER_SECOND_MAX: u64 = 1000;
/// Operations in flight per zone: some, so that one slow export does not stop the rest.
const CONCURRENCY: NonZeroUsize = NonZeroUsize::new(4).unwrap();
/// The most of anything at once that may be asked for: beyond it threads and connections run out first.
const CONCURRENCY_MAX: u64 = 256;

/// Whoever wants less of an archive to be read at once says so.
const VERIFY_PERCENT: u64 = 100;

/// This machine alone: who may see it from elsewhere is to be decided by somebody.
const LISTEN: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9788));
/// Well within the 90 s that systemd gives a service to stop.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(30);

/// A whole configuration, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// How to speak with Exoscale.
    pub exoscale: ExoscaleSettings,
    /// The port, and the end.
    pub server: ServerSettings,
    /// Where state is kept, if the file says so.
    pub state_directory: Option<PathBuf>,
    /// Where exports go, by name.
    pub archives: BTreeMap<ArchiveName, ArchiveSettings>,
    /// What becomes of the copies in each of them.
    pub archive_rules: BTreeMap<ArchiveName, ArchiveRules>,
    /// At least one, in the order of the file; every archive that one names is there.
    pub policies: Vec<Policy>,
}

/// How to speak with Exoscale.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExoscaleSettings {
    /// The API's address, without a slash at its end; `{zone}` stands for the zone. It has none only where
    /// the policies name one zone.
    pub endpoint: String,
    /// A file with `api_key` and `api_secret`.
    pub credentials_file: Option<PathBuf>,
    /// A request without an answer is given up after so long.
    pub request_timeout: Duration,
    /// The first wait between two polls of an operation.
    pub poll_interval: Duration,
    /// An operation that has not ended after so long counts as failed.
    pub operation_timeout: Duration,
    /// All policies together.
    pub requests_per_second: NonZeroU32,
    /// Operations in flight per zone.
    pub concurrency: NonZeroUsize,
    /// Whether `http://` is allowed to hosts other than this machine.
    pub allow_plain_http: bool,
}

/// What the daemon alone needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerSettings {
    /// Where the HTTP port is.
    pub listen: SocketAddr,
    /// So long steps in flight may go on once the daemon was told to stop.
    pub shutdown_grace: Duration,
}

/// Where an archive is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArchiveSettings {
    /// In a folder.
    Local {
        /// Absolute; no other archive is in it or around it.
        path: PathBuf,
    },
    /// In a bucket of a store that speaks S3.
    S3 {
        /// The store's address, without a slash at its end.
        endpoint: Url,
        /// The region that requests are signed for.
        region: String,
        /// The bucket.
        bucket: String,
        /// What all keys begin with: empty, or ending with a slash; no other archive is in it or around it.
        prefix: String,
        /// A file with `api_key` and `api_secret`.
        credentials_file: Option<PathBuf>,
    },
}

/// A configuration that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is none.
    #[error("there is no configuration file `{path}`: write one, or name another by --config FILE")]
    Missing {
        /// Where it was looked for.
        path: String,
    },
    /// It is larger than any configuration.
    #[error("configuration file `{path}` has more than {FILE_BYTES_MAX} bytes: is it the right file?")]
    TooLarge {
        /// Which file.
        path: String,
    },
    /// It is not text.
    #[error("configuration file `{path}` is not UTF-8 text: is it the right file?")]
    NotText {
        /// Which file.
        path: String,
    },
    /// It can't be read.
    #[error("can't read configuration file `{path}`")]
    Read {
        /// Which file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was read, and something in it is wrong.
    #[error("{0}")]
    Invalid(Diagnostics),
}

/// Reads a configuration file. `endpoint` overrides `exoscale.endpoint`; an empty one does not.
///
/// # Errors
/// One for a file that can't be read; else all that is wrong in it, at once.
pub fn load(path: &Path, endpoint: Option<&str>) -> Result<Config, ConfigError> {
    let shown = excerpt(&path.to_string_lossy(), 200);
    let text = read_named_file(path, FILE_BYTES_MAX).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => ConfigError::Missing { path: shown.clone() },
        io::ErrorKind::FileTooLarge => ConfigError::TooLarge { path: shown.clone() },
        io::ErrorKind::InvalidData => ConfigError::NotText { path: shown.clone() },
        _ => ConfigError::Read { path: shown.clone(), source },
    })?;
    parse(&text, &shown, endpoint).map_err(ConfigError::Invalid)
}

/// Understands a configuration. `file_name` is for the diagnostics; `endpoint` overrides
/// `exoscale.endpoint`, an empty one does not.
///
/// # Errors
/// All that is wrong, at once, in the order of the file.
pub fn parse(text: &str, file_name: &str, endpoint: Option<&str>) -> Result<Config, Diagnostics> {
    let collector = Collector::default();
    let (table, errors) = DeTable::parse_recoverable(text);
    let unread = report_syntax(text, &errors, &collector);
    let root = Table::root(table.get_ref(), &collector);

    let mut archive_rules = BTreeMap::new();
    let archives = read_archives(&root.table("archives"), &mut archive_rules);
    let named_policies = root.table("policies");
    if named_policies.is_empty() && !root.has_typo_of("policies") && !root.has_other_than_table("policies") {
        Place::outside(file_name, &collector).missing(
            "there is no policy",
            "write one: a line `[policies.nightly]`, and below it `zones = [\"ch-gva-2\"]`",
        );
    }
    let policies = policies::read(&named_policies, &archives);
    let config = Config {
        exoscale: read_exoscale(&root.table("exoscale"), endpoint, &policies, &collector),
        server: read_server(&root.table("server")),
        state_directory: root.table("state").path("directory"),
        archives: archives.into_iter().filter_map(|(name, settings)| Some((name, settings?))).collect(),
        archive_rules,
        policies,
    };
    check_notify(&root.table("notify"));

    collector.into_diagnostics(text, file_name, &unread).map_or(Ok(config), Err)
}

/// Reports what is not TOML. Returns the parts of the text that may have been misread for it: from the line
/// of an error to the next section.
fn report_syntax(text: &str, errors: &[toml::de::Error], collector: &Collector) -> Vec<Range<usize>> {
    let mut errors: Vec<(Range<usize>, &str)> = errors
        .iter()
        .map(|error| (error.span().unwrap_or(text.len()..text.len()), error.message()))
        .collect();
    errors.sort_by_key(|(span, _)| span.start);
    let mut unread: Vec<Range<usize>> = Vec::new();
    let mut line_end = None;
    for (span, message) in errors {
        // What follows on a line is mostly the first one's doing.
        if line_end.is_some_and(|end| span.start <= end) {
            continue;
        }
        let rest = text.get(span.start..).unwrap_or_default();
        line_end = Some(span.start + rest.find('\n').unwrap_or(rest.len()));
        collector.add(Diagnostic {
            span: Some(span.clone()),
            subject: String::new(),
            fact: excerpt(message, 200),
            help: help_with_syntax(message).to_owned(),
            kind: Kind::Syntax,
        });
        // Of duplicates the first stands; nothing else is misread.
        let misread = !message.starts_with(DUPLICATE);
        if misread && unread.last().is_none_or(|part| span.start >= part.end) {
            let line_start = text.get(..span.start).and_then(|before| before.rfind('\n'));
            let next = rest.find("\n[").map_or(usize::MAX, |at| span.start + at + 1);
            unread.push(line_start.map_or(0, |at| at + 1)..next);
        }
    }
    unread
}

/// How the TOML parser calls a key or a section that stands there twice.
const DUPLICATE: &str = "duplicate key";

/// The way out of the TOML parser's commonest errors, by how their texts begin.
fn help_with_syntax(message: &str) -> &'static str {
    let helps = [
        (DUPLICATE, "a key stands once in its section, a section once in the file: take one of them out"),
        ("string values must be quoted", "put it in double quotes"),
        ("key with no value", "write `key = value`"),
        ("missing comma between array elements", "put a comma between two values, and `]` behind the last"),
        ("invalid basic string", "end the text by a double quote on the same line"),
        ("unclosed table", "end the section's name by `]`"),
        ("unclosed array", "end the list by `]`"),
    ];
    let help = helps.iter().find(|(beginning, _)| message.starts_with(beginning));
    help.map_or("this is not TOML as <https://toml.io> has it", |(_, help)| help)
}

fn read_exoscale(
    table: &Table<'_>,
    endpoint: Option<&str>,
    policies: &[Policy],
    collector: &Collector,
) -> ExoscaleSettings {
    let allow_plain_http = table.boolean("allow_plain_http").unwrap_or(false);
    let written = table.value("endpoint").and_then(|value| {
        let text = value.text()?;
        check_endpoint(text, allow_plain_http, value.place());
        Some((text.to_owned(), value.place().clone()))
    });
    let endpoint = endpoint.filter(|text| !text.is_empty()).map(|text| {
        let place = Place::outside(ENDPOINT_VARIABLE, collector);
        check_endpoint(text, allow_plain_http, &place);
        (text.to_owned(), place)
    });
    if let Some((text, place)) = endpoint.as_ref().or(written.as_ref()) {
        check_endpoint_serves(text, policies, place);
    }
    let number = |key, max| table.number(key, 1..=max).and_then(|number| u32::try_from(number).ok());
    ExoscaleSettings {
        endpoint: endpoint.or(written).map_or_else(|| ENDPOINT.to_owned(), |(text, _)| text),
        credentials_file: table.path("credentials_file"),
        request_timeout: table.duration("request_timeout").unwrap_or(REQUEST_TIMEOUT),
        poll_interval: table.duration("poll_interval").unwrap_or(POLL_INTERVAL),
        operation_timeout: table.duration("operation_timeout").unwrap_or(OPERATION_TIMEOUT),
        requests_per_second: number("requests_per_second", REQUESTS_PER_SECOND_MAX)
            .and_then(NonZeroU32::new)
            .unwrap_or(REQUESTS_PER_SECOND),
        concurrency: read_concurrency(table).unwrap_or(CONCURRENCY),
        allow_plain_http,
    }
}

fn read_concurrency(table: &Table<'_>) -> Option<NonZeroUsize> {
    let number = table.number("concurrency", 1..=CONCURRENCY_MAX)?;
    usize::try_from(number).ok().and_then(NonZeroUsize::new)
}

/// The API's address.
fn check_endpoint(text: &str, allow_plain_http: bool, place: &Place<'_>) {
    let sample = text.replace("{zone}", "ch-gva-2");
    let example = "write it like `https://api-{zone}.exoscale.com/v2`";
    if sample.contains(['{', '}']) {
        return place.wrong("the address has a placeholder other than `{zone}`", example);
    }
    check_address(&sample, text, example, allow_plain_http, place);
}

/// An address that requests are sent to, signed: it must say exactly what it means. `written` is how the operator wrote
/// it.
fn check_address(
    sample: &str,
    written: &str,
    example: &str,
    allow_plain_http: bool,
    place: &Place<'_>,
) -> Option<Url> {
    let wrong = |fact: String, help: &str| {
        place.wrong(fact, help);
        None
    };
    // The parser drops tabs and line breaks, and takes `\` for `/`: what is sent would not be what is read.
    if sample
        .chars()
        .any(|character| character.is_whitespace() || character.is_control() || character == '\\')
    {
        return wrong("the address has a blank, a `\\` or a control character in it".to_owned(), example);
    }
    // First of all, since it is never shown: it may be a secret.
    if sample.contains('@') {
        return wrong(
            "the address has a user or a password in it".to_owned(),
            "take them out: credentials never stand in the configuration",
        );
    }
    let Ok(url) = Url::parse(sample) else {
        return wrong(format!("`{}` is not a web address", excerpt(written, 100)), example);
    };
    if !matches!(url.scheme(), "http" | "https") {
        return wrong(format!("`{}:` is neither `https:` nor `http:`", excerpt(url.scheme(), 20)), example);
    }
    if sample.contains(['?', '#']) {
        return wrong("the address has a `?` or a `#` in it".to_owned(), example);
    }
    if sample.ends_with('/') {
        return wrong("the address ends with `/`".to_owned(), "take the last `/` away");
    }
    if url.scheme() == "http" && !allow_plain_http && !is_loopback(&url) {
        return wrong(
            "`http://` to another machine can be read and changed on the way".to_owned(),
            "use `https://`, or set `allow_plain_http = true` if the way is safe",
        );
    }
    Some(url)
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => IpAddr::V4(address).is_loopback(),
        Some(Host::Ipv6(address)) => IpAddr::V6(address).is_loopback(),
        None => false,
    }
}

/// An address without `{zone}` is that of one zone.
fn check_endpoint_serves(text: &str, policies: &[Policy], place: &Place<'_>) {
    let mut zones: Vec<&str> =
        policies.iter().flat_map(|policy| &policy.zones).map(ZoneName::as_str).collect();
    zones.sort_unstable();
    zones.dedup();
    if !text.contains("{zone}") && zones.len() > 1 {
        place.wrong(
            format!("there is no `{{zone}}` in it, but the policies name {}", counted(zones.len(), "zone")),
            format!(
                "write `{{zone}}` where the zone's name belongs, or name one of {} only",
                excerpt(&zones.join(", "), 100)
            ),
        );
    }
}

/// Every archive that the file names, with its settings where they are right.
fn read_archives(
    table: &Table<'_>,
    rules: &mut BTreeMap<ArchiveName, ArchiveRules>,
) -> BTreeMap<ArchiveName, Option<ArchiveSettings>> {
    let mut archives: BTreeMap<ArchiveName, Option<ArchiveSettings>> = BTreeMap::new();
    for (name, archive) in table.named::<ArchiveName>() {
        let settings = read_archive(&archive);
        rules.insert(name.clone(), read_archive_rules(&archive));
        if let Some(settings) = &settings {
            let mut others = archives.iter().filter_map(|(name, other)| Some((name, other.as_ref()?)));
            if let Some((other, _)) = others.find(|(_, other)| is_near(settings, other)) {
                let (key, fact, help) = match settings {
                    ArchiveSettings::Local { .. } => {
                        ("path", "this folder", "give each archive a folder of its own")
                    }
                    ArchiveSettings::S3 { .. } => (
                        "bucket",
                        "this place in the bucket",
                        "give each archive a `prefix` or a bucket of its own",
                    ),
                };
                if let Some(value) = archive.value(key) {
                    let fact = format!("{fact} is also that of archive `{other}`, or one lies in the other");
                    value.place().wrong(fact, help);
                }
            }
        }
        archives.insert(name, settings);
    }
    archives
}

/// Whether one archive is, or lies in, the other.
fn is_near(one: &ArchiveSettings, other: &ArchiveSettings) -> bool {
    match (one, other) {
        (ArchiveSettings::Local { path: one }, ArchiveSettings::Local { path: other }) => {
            one.starts_with(other) || other.starts_with(one)
        }
        (
            ArchiveSettings::S3 { endpoint, bucket, prefix, .. },
            ArchiveSettings::S3 {
                endpoint: other_endpoint, bucket: other_bucket, prefix: other_prefix, ..
            },
        ) => {
            (endpoint, bucket) == (other_endpoint, other_bucket)
                && (prefix.starts_with(other_prefix) || other_prefix.starts_with(prefix))
        }
        _ => false,
    }
}

/// What only an archive of one type has.
const LOCAL_KEYS: [&str; 1] = ["path"];
const S3_KEYS: [&str; 6] = ["endpoint", "region", "bucket", "prefix", "credentials_file", "allow_plain_http"];

/// What becomes of the copies.
fn read_archive_rules(table: &Table<'_>) -> ArchiveRules {
    let retention = policies::read_retention(&table.table("retention"));
    let verify = table.table("verify");
    let schedule = verify.required("schedule", "write when, such as `schedule = \"0 5 * * 0\"`");
    let schedule = schedule.and_then(|value| read_schedule(&value));
    let percent = verify.number("percent", 1..=100).unwrap_or(VERIFY_PERCENT);
    ArchiveRules { retention, verify: schedule.map(|schedule| VerifyPlan { schedule, percent }) }
}

fn read_archive(table: &Table<'_>) -> Option<ArchiveSettings> {
    let is_local = table
        .required("type", "write `type = \"local\"` or `type = \"s3\"`")?
        .choice(&[("local", true), ("s3", false)])?;
    let (foreign, fact, help) = if is_local {
        (&S3_KEYS[..], "a local archive has no such key", "take it out: it is for archives of type `s3`")
    } else {
        (
            &LOCAL_KEYS[..],
            "an archive of type `s3` has no such key",
            "take it out: it is for archives of type `local`",
        )
    };
    for value in foreign.iter().filter_map(|key| table.value(key)) {
        value.place().wrong(fact, help);
    }
    if !is_local {
        return read_s3(table);
    }
    let path =
        table.required("path", "write where exports go, such as `path = \"/var/lib/snapwarden/archive\"`");
    Some(ArchiveSettings::Local { path: path?.path()? })
}

fn read_s3(table: &Table<'_>) -> Option<ArchiveSettings> {
    let allow_plain_http = table.boolean("allow_plain_http").unwrap_or(false);
    let example = "write the store's address, such as `endpoint = \"https://sos-de-fra-1.exo.io\"`";
    let endpoint = table.required("endpoint", example).and_then(|value| {
        let text = value.text()?;
        if text.contains(['{', '}']) {
            value.place().wrong("the address has a placeholder in it", example);
            return None;
        }
        check_address(text, text, example, allow_plain_http, value.place())
    });
    let region = table
        .required("region", "write the region or the zone of the bucket, such as `region = \"de-fra-1\"`")
        .and_then(|value| value.written("a region", "letters, digits and hyphens", is_region));
    let bucket = table
        .required("bucket", "write the bucket's name, such as `bucket = \"acme-backups\"`")
        .and_then(|value| {
            let form =
                "3 to 63 lower-case letters, digits, hyphens and dots, a letter or a digit at both ends";
            value.written("a bucket's name", form, is_bucket)
        });
    let prefix = match table.value("prefix") {
        None => Some(String::new()),
        Some(value) => {
            let form = "at most 256 letters, digits, `-`, `_`, `.` and `/`, with `/` at the end and not at the \
                        beginning, such as `snapwarden/`";
            value.written("a prefix", form, is_prefix)
        }
    };
    let credentials_file = table.value("credentials_file").map(|value| value.path());
    Some(ArchiveSettings::S3 {
        endpoint: endpoint?,
        region: region?,
        bucket: bucket?,
        prefix: prefix?,
        credentials_file: match credentials_file {
            None => None,
            Some(path) => Some(path?),
        },
    })
}

fn is_region(text: &str) -> bool {
    (1..=63).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn is_bucket(text: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (3..=63).contains(&text.len())
        && text.bytes().all(|b| is_plain(b) || b == b'-' || b == b'.')
        && !text.contains("..")
        && text.bytes().next().is_some_and(is_plain)
        && text.bytes().next_back().is_some_and(is_plain)
}

/// An address drops parts such as `..`, so a key that has one could not be reached.
fn is_prefix(text: &str) -> bool {
    let is_part = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    text.is_empty()
        || text.len() <= 256 && text.strip_suffix('/').is_some_and(|parts| parts.split('/').all(is_part))
}

fn read_schedule(value: &Value<'_>) -> Option<Schedule> {
    let text = value.text()?;
    Schedule::parse(text).map_err(|error| value.place().wrong(error.fact(), error.help())).ok()
}

fn read_server(table: &Table<'_>) -> ServerSettings {
    let listen = table.value("listen").and_then(|value| {
        let text = value.text()?;
        let help = "write an address and a port, such as `127.0.0.1:9788`, or `0.0.0.0:9788` for all of this machine's addresses";
        text.parse()
            .map_err(|_| value.place().wrong(format!("`{}` is not an address with a port", excerpt(text, 64)), help))
            .ok()
    });
    ServerSettings {
        listen: listen.unwrap_or(LISTEN),
        shutdown_grace: table.duration("shutdown_grace").unwrap_or(SHUTDOWN_GRACE),
    }
}

/// Its keys are known; its work comes later.
fn check_notify(table: &Table<'_>) {
    for (_, notifier) in table.named::<ArchiveName>() {
        notifier.choice("type", &[("webhook", ()), ("healthchecks", ())]);
        notifier.path("url_file");
        if let Some(on) = notifier.value("on") {
            on.list(Some("name at least one of `failure`, `held` and `recovered`"), |word| {
                word.choice(&[("failure", ()), ("held", ()), ("recovered", ())])
            });
        }
    }
}
