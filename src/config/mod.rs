//! Reads: a TOML file becomes checked values, or the list of all that is wrong with it.
//!
//! [`load`] reads the file, [`parse`] understands its text and is pure: it opens no file that the text
//! names and asks no environment. Every key is known here, also those whose work comes later; these are
//! refused, never ignored. A default stands once, as a constant with its reason.
//!
//! `keys` lists what may be written, `walk` goes along the table that knows where everything stands,
//! `findings` collects what is wrong and prints it, `policies` reads the policies.

pub mod findings;
mod keys;
mod policies;
mod walk;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::num::{NonZeroU32, NonZeroUsize};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeTable;
use url::{Host, Url};

use crate::config::findings::{Diagnostics, Finding, Findings, Kind};
use crate::config::walk::{Place, Table, Value};
use crate::disk::read_named_file;
use crate::policy::{ArchiveName, Policy};
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
    let findings = Findings::default();
    let (table, errors) = DeTable::parse_recoverable(text);
    let unread = report_syntax(text, &errors, &findings);
    let root = Table::root(table.get_ref(), &findings);

    let archives = read_archives(&root.table("archives"));
    let named_policies = root.table("policies");
    if named_policies.is_empty() && !root.has_slip_of("policies") && !root.has_other_than_table("policies") {
        Place::outside(file_name, &findings).missing(
            "there is no policy",
            "write one: a line `[policies.nightly]`, and below it `zones = [\"ch-gva-2\"]`",
        );
    }
    let policies = policies::read(&named_policies, &archives);
    let config = Config {
        exoscale: read_exoscale(&root.table("exoscale"), endpoint, &policies, &findings),
        server: read_server(&root.table("server")),
        state_directory: root.table("state").path("directory"),
        archives: archives.into_iter().filter_map(|(name, settings)| Some((name, settings?))).collect(),
        policies,
    };
    check_notify(&root.table("notify"));

    findings.into_diagnostics(text, file_name, &unread).map_or(Ok(config), Err)
}

/// Reports what is not TOML. Returns the parts of the text that may have been misread for it: from the line
/// of an error to the next section.
fn report_syntax(text: &str, errors: &[toml::de::Error], findings: &Findings) -> Vec<Range<usize>> {
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
        findings.add(Finding {
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
    findings: &Findings,
) -> ExoscaleSettings {
    let allow_plain_http = table.boolean("allow_plain_http").unwrap_or(false);
    let written = table.value("endpoint").and_then(|value| {
        let text = value.text()?;
        check_endpoint(text, allow_plain_http, value.place());
        Some((text.to_owned(), value.place().clone()))
    });
    let endpoint = endpoint.filter(|text| !text.is_empty()).map(|text| {
        let place = Place::outside(ENDPOINT_VARIABLE, findings);
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

/// An address that requests are sent to, signed: it must say exactly what it means.
fn check_endpoint(text: &str, allow_plain_http: bool, place: &Place<'_>) {
    let sample = text.replace("{zone}", "ch-gva-2");
    let example = "write it like `https://api-{zone}.exoscale.com/v2`";
    // The parser drops tabs and line breaks, and takes `\` for `/`: what is sent would not be what is read.
    if sample
        .chars()
        .any(|character| character.is_whitespace() || character.is_control() || character == '\\')
    {
        return place.wrong("the address has a blank, a `\\` or a control character in it", example);
    }
    if sample.contains(['{', '}']) {
        return place.wrong("the address has a placeholder other than `{zone}`", example);
    }
    // First of all, since it is never shown: it may be a secret.
    if sample.contains('@') {
        return place.wrong(
            "the address has a user or a password in it",
            "take them out: credentials never stand in the configuration",
        );
    }
    let Ok(url) = Url::parse(&sample) else {
        return place.wrong(format!("`{}` is not a web address", excerpt(text, 100)), example);
    };
    if !matches!(url.scheme(), "http" | "https") {
        return place
            .wrong(format!("`{}:` is neither `https:` nor `http:`", excerpt(url.scheme(), 20)), example);
    }
    if sample.contains(['?', '#']) {
        return place.wrong("the address has a `?` or a `#` in it", example);
    }
    if sample.ends_with('/') {
        return place.wrong("the address ends with `/`", "take the last `/` away");
    }
    if url.scheme() == "http" && !allow_plain_http && !is_loopback(&url) {
        place.wrong(
            "`http://` to another machine can be read and changed on the way",
            "use `https://`, or set `allow_plain_http = true` if the way is safe",
        );
    }
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
fn read_archives(table: &Table<'_>) -> BTreeMap<ArchiveName, Option<ArchiveSettings>> {
    let mut folders: Vec<(ArchiveName, PathBuf)> = Vec::new();
    let mut archives = BTreeMap::new();
    for (name, archive) in table.named::<ArchiveName>() {
        let settings = read_archive(&archive);
        if let Some(ArchiveSettings::Local { path }) = &settings {
            let near =
                |(_, other): &&(ArchiveName, PathBuf)| path.starts_with(other) || other.starts_with(path);
            if let Some((other, _)) = folders.iter().find(near)
                && let Some(value) = archive.value("path")
            {
                value.place().wrong(
                    format!("this folder is also that of archive `{other}`, or one lies in the other"),
                    "give each archive a folder of its own",
                );
            }
            folders.push((name.clone(), path.clone()));
        }
        archives.insert(name, settings);
    }
    archives
}

/// What only an archive of type `s3` has.
const S3_KEYS: [&str; 5] = ["endpoint", "region", "bucket", "prefix", "credentials_file"];

fn read_archive(table: &Table<'_>) -> Option<ArchiveSettings> {
    policies::read_retention(&table.table("retention"));
    let verify = table.table("verify");
    verify.value("schedule").and_then(|value| read_schedule(&value));
    verify.number("percent", 1..=100);

    let is_local =
        table.required("type", "write `type = \"local\"`")?.choice(&[("local", true), ("s3", false)])?;
    if !is_local {
        for key in S3_KEYS {
            table.text(key);
        }
        return None;
    }
    for value in S3_KEYS.iter().filter_map(|key| table.value(key)) {
        value
            .place()
            .wrong("a local archive has no such key", "take it out: it is for archives of type `s3`");
    }
    let path =
        table.required("path", "write where exports go, such as `path = \"/var/lib/snapwarden/archive\"`");
    Some(ArchiveSettings::Local { path: path?.path()? })
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
