//! Reads every section but the policies and the notifiers, which have readers of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeTable;
use url::Url;

use crate::config::include;
use crate::config::keys::KnownKeys;
use crate::config::notifiers;
use crate::config::policies;
use crate::config::toml_reader::{OpenFile, Place, Table, Value};
use crate::policy::bucket::{Addressing, BucketRules, Encryption, LOCK_MAX, LockMode, LockRule, Noncurrent};
use crate::policy::name::ArchiveName;
use crate::policy::notifier::NotifierSettings;
use crate::policy::select::Exemption;
use crate::policy::shard::Shard;
use crate::policy::span::Span;
use crate::policy::{ArchiveRules, Policy, VerifyPlan};
use crate::snapshot::ZoneName;
use crate::text::{counted, excerpt};
use crate::transport::is_loopback;

/// The environment variable that overrides `exoscale.endpoint`; the caller reads it.
pub const ENDPOINT_VARIABLE: &str = "EXOSCALE_API_ENDPOINT";

/// From the `servers` of Exoscale's published API description.
const ENDPOINT: &str = "https://api-{zone}.exoscale.com/v2";
/// Long enough for a listing of thousands, short enough to notice a dead connection soon.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// As in the vendor's own client (egoscale v3).
const POLL_INTERVAL: Duration = Duration::from_secs(3);
/// An export of a large disk takes many minutes; beyond an hour something is stuck.
const OPERATION_TIMEOUT: Duration = Duration::from_hours(1);
/// Careful, since the API's limits are not published.
const REQUESTS_PER_SECOND: NonZeroU32 = NonZeroU32::new(10).unwrap();
/// A higher limit is no limit: one process does not send more.
const REQUESTS_PER_SECOND_MAX: u64 = 1000;
/// Several, so that one slow export does not hold up the rest of its zone.
const CONCURRENCY: NonZeroUsize = NonZeroUsize::new(4).unwrap();

/// As Debian's package has it.
const RESTIC: &str = "restic";

/// All copies, unless the operator wants less to be read at once.
const VERIFY_PERCENT: u64 = 100;

/// A year, and a month to look back at it.
const KEEP_AUDIT: Span = Span::days(400);

/// This machine alone: the port has no password, so the operator decides who else may see it.
const LISTEN: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9788));
/// Well within the 90 s that systemd gives a service to stop.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(30);

/// A file with one section of each kind: reading it asks for every key that a file may have.
const ONE_OF_EACH: &str = "[archives.a]\ntype = \"local\"\n[policies.a]\n[notify.a]\ntype = \"webhook\"\n";

/// A whole configuration, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// The section `[exoscale]`.
    pub exoscale: ExoscaleSettings,
    /// The section `[server]`.
    pub server: ServerSettings,
    /// `None` leaves the choice to the caller: `$STATE_DIRECTORY`, else the default.
    pub state_directory: Option<PathBuf>,
    /// How long files of the audit log are kept after the end of their month.
    pub keep_audit: Span,
    /// Where exports are stored, by name.
    pub archives: BTreeMap<ArchiveName, ArchiveSettings>,
    /// Retention and verification of the copies in each archive.
    pub archive_rules: BTreeMap<ArchiveName, ArchiveRules>,
    /// At least one, in the order of the files; every archive that a policy names exists in `archives`.
    pub policies: Vec<Policy>,
    /// The file, and those that it includes, in the order in which they were read.
    pub files: Vec<String>,
    /// Every key of the files with its value, such as `policies.nightly.zones`.
    pub written: BTreeMap<String, serde_json::Value>,
    /// The section `[coverage]`: the instances that are meant to be without a backup.
    pub exempt: Exemption,
    /// The sections `[notify.NAME]`: who is notified, and of what.
    pub notifiers: Vec<NotifierSettings>,
    /// The part of the instances that this process is for; none for all. No key of the file: processes of one configuration
    /// differ in it.
    pub shard: Option<Shard>,
}

/// How the API is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExoscaleSettings {
    /// The API's address, without a slash at its end; `{zone}` stands for the zone. It may be left out only if
    /// all policies name the same zone.
    pub endpoint: String,
    /// A file with `api_key` and `api_secret`.
    pub credentials_file: Option<PathBuf>,
    /// How long a request may take.
    pub request_timeout: Duration,
    /// The first wait between two polls of an operation.
    pub poll_interval: Duration,
    /// How long an operation may take before it counts as failed.
    pub operation_timeout: Duration,
    /// The limit for all policies together.
    pub requests_per_second: NonZeroU32,
    /// Operations in flight per zone.
    pub concurrency: NonZeroUsize,
    /// Whether `http://` is allowed to hosts other than this machine.
    pub allow_plain_http: bool,
}

/// What only the daemon needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerSettings {
    /// The address of the HTTP port.
    pub listen: SocketAddr,
    /// A file that says who may use the port, in the form of Prometheus' exporter-toolkit; see [`crate::config::web`].
    pub web_config_file: Option<PathBuf>,
    /// How long steps in flight may continue once the daemon is stopping.
    pub shutdown_grace: Duration,
}

/// Where an archive keeps its copies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArchiveSettings {
    /// In a folder.
    Local {
        /// Absolute; neither inside another archive nor around one.
        path: PathBuf,
    },
    /// In a bucket of an S3-compatible store.
    S3 {
        /// The store's address, without a slash at its end.
        endpoint: Url,
        /// The region that requests are signed for.
        region: String,
        /// The bucket's name.
        bucket: String,
        /// The beginning of all keys: empty, or with a slash at its end; neither inside another archive nor around
        /// one.
        prefix: String,
        /// A file with `api_key` and `api_secret`.
        credentials_file: Option<PathBuf>,
        /// The certificates of the authorities that the store's is checked by; none: the system's.
        ca_file: Option<PathBuf>,
        /// How the bucket is used.
        rules: BucketRules,
    },
    /// In a repository of restic.
    Restic {
        /// As restic takes it: an absolute path, or an address such as `rest:https://host/`, without a password.
        repository: String,
        /// A file with the repository's password; else a systemd credential has it.
        password_file: Option<PathBuf>,
        /// The program: an absolute path, or a name to be found in `PATH`.
        program: String,
        /// Where restic keeps its cache; `None` leaves the choice to the caller.
        cache_directory: Option<PathBuf>,
        /// Lines `KEY=value`: more environment of restic, for its backend.
        environment_file: Option<PathBuf>,
    },
}

/// Every key that a file may have, found by reading a sample: so a key is known as soon as a reader asks for it.
pub(super) fn known_keys() -> KnownKeys {
    let file = OpenFile::default();
    let (table, _) = DeTable::parse_recoverable(ONE_OF_EACH);
    read(&file.root(table.get_ref()), None, &file, "");
    file.into_asked()
}

/// Reads all sections. The result counts only if `file` has no diagnostics.
pub(super) fn read(root: &Table<'_>, endpoint: Option<&str>, file: &OpenFile, file_name: &str) -> Config {
    if let Some(list) = root.value("include") {
        list.list(Some(include::EMPTY), |value| value.valid(include::check(value.text()?)));
    }
    let (archive_names, archives, archive_rules) = read_archives(&root.table("archives"));
    let named_policies = root.table("policies");
    if named_policies.is_empty() && !root.has_typo_of("policies") && !root.has_other_than_table("policies") {
        file.outside(file_name).missing(
            "there is no policy",
            "write one: a line `[policies.nightly]`, and below it `zones = [\"ch-gva-2\"]`",
        );
    }
    let policies = policies::read(&named_policies, &archive_names);
    let state = root.table("state");
    Config {
        files: Vec::new(),
        written: BTreeMap::new(),
        exoscale: read_exoscale(&root.table("exoscale"), endpoint, &policies, file),
        server: read_server(&root.table("server")),
        state_directory: state.read("directory", Value::path),
        keep_audit: state.read("keep_audit", Value::span).unwrap_or(KEEP_AUDIT),
        archives,
        archive_rules,
        policies,
        exempt: policies::read_exemption(&root.table("coverage")),
        notifiers: notifiers::read(&root.table("notify")),
        shard: None,
    }
}

fn read_exoscale(
    table: &Table<'_>,
    endpoint: Option<&str>,
    policies: &[Policy],
    file: &OpenFile,
) -> ExoscaleSettings {
    let allow_plain_http = table.read("allow_plain_http", Value::boolean).unwrap_or(false);
    // Both are checked: the one in the file is used again once the variable is not set any more.
    let written = table.value("endpoint").and_then(|value| Some((value.text()?, value.place().clone())));
    let overriding =
        endpoint.filter(|text| !text.is_empty()).map(|text| (text, file.outside(ENDPOINT_VARIABLE)));
    for (text, place) in written.iter().chain(&overriding) {
        check_endpoint(text, allow_plain_http, place);
    }
    let endpoint = overriding.or(written);
    if let Some((text, place)) = &endpoint {
        check_endpoint_serves(text, policies, place);
    }
    ExoscaleSettings {
        endpoint: endpoint.map_or(ENDPOINT, |(text, _)| text).to_owned(),
        credentials_file: table.read("credentials_file", Value::path),
        request_timeout: table.read("request_timeout", Value::duration).unwrap_or(REQUEST_TIMEOUT),
        poll_interval: table.read("poll_interval", Value::duration).unwrap_or(POLL_INTERVAL),
        operation_timeout: table.read("operation_timeout", Value::duration).unwrap_or(OPERATION_TIMEOUT),
        requests_per_second: table
            .number("requests_per_second", 1..=REQUESTS_PER_SECOND_MAX)
            .and_then(NonZeroU32::new)
            .unwrap_or(REQUESTS_PER_SECOND),
        concurrency: table.concurrency().unwrap_or(CONCURRENCY),
        allow_plain_http,
    }
}

fn check_endpoint(text: &str, allow_plain_http: bool, place: &Place<'_>) {
    let sample = text.replace("{zone}", "ch-gva-2");
    let example = "write it like `https://api-{zone}.exoscale.com/v2`";
    if sample.contains(['{', '}']) {
        return place.wrong("the address has a placeholder other than `{zone}`", example);
    }
    check_address(&sample, text, example, allow_plain_http, place);
}

/// Checks an address that signed requests are sent to: it must mean exactly what it seems to mean. `written` is the
/// operator's text, `sample` the same with a zone in it.
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
    // The parser drops tabs and line breaks, and takes `\` for `/`: the requests would not go where the text says.
    if sample
        .chars()
        .any(|character| character.is_whitespace() || character.is_control() || character == '\\')
    {
        return wrong("the address has a blank, a `\\` or a control character in it".to_owned(), example);
    }
    // Before anything that shows the address: this one may hold a secret.
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

/// An address without `{zone}` can serve one zone only.
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

/// The names of all archives in the file, and the settings and rules of those whose settings are valid.
fn read_archives(
    table: &Table<'_>,
) -> (BTreeSet<ArchiveName>, BTreeMap<ArchiveName, ArchiveSettings>, BTreeMap<ArchiveName, ArchiveRules>) {
    let (mut names, mut archives, mut rules) = (BTreeSet::new(), BTreeMap::new(), BTreeMap::new());
    for (name, archive) in table.named::<ArchiveName>() {
        names.insert(name.clone());
        if let Some(settings) = read_archive(&archive) {
            report_overlap(&archive, &settings, &archives);
            archives.insert(name.clone(), settings);
        }
        rules.insert(name, read_archive_rules(&archive));
    }
    (names, archives, rules)
}

fn report_overlap(
    archive: &Table<'_>,
    settings: &ArchiveSettings,
    others: &BTreeMap<ArchiveName, ArchiveSettings>,
) {
    let Some((other, _)) = others.iter().find(|(_, other)| overlap(settings, other)) else { return };
    let (key, fact, help) = match settings {
        ArchiveSettings::Local { .. } => ("path", "this folder", "give each archive a folder of its own"),
        ArchiveSettings::S3 { .. } => {
            ("bucket", "this place in the bucket", "give each archive a `prefix` or a bucket of its own")
        }
        ArchiveSettings::Restic { .. } => {
            ("repository", "this repository", "give each archive a repository of its own")
        }
    };
    if let Some(value) = archive.value(key) {
        let fact = format!("{fact} is also that of archive `{other}`, or one lies in the other");
        value.place().wrong(fact, help);
    }
}

/// Whether two archives are the same place, or one is inside the other.
fn overlap(one: &ArchiveSettings, other: &ArchiveSettings) -> bool {
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
            bucket == other_bucket
                && is_same_store(endpoint, other_endpoint)
                && (prefix.starts_with(other_prefix) || other_prefix.starts_with(prefix))
        }
        (
            ArchiveSettings::Restic { repository: one, .. },
            ArchiveSettings::Restic { repository: other, .. },
        ) => one.trim_end_matches('/') == other.trim_end_matches('/'),
        // A folder in which restic keeps its files is none for images.
        (ArchiveSettings::Local { path }, ArchiveSettings::Restic { repository, .. })
        | (ArchiveSettings::Restic { repository, .. }, ArchiveSettings::Local { path }) => {
            let folder = Path::new(repository);
            path.starts_with(folder) || folder.starts_with(path)
        }
        _ => false,
    }
}

/// Whether two addresses are those of one store. With and without TLS on the usual ports it is one and the same.
fn is_same_store(one: &Url, other: &Url) -> bool {
    let same_port = one.port_or_known_default() == other.port_or_known_default()
        || (one.port().is_none() && other.port().is_none());
    same_port && one.host() == other.host() && one.path() == other.path()
}

fn read_archive_rules(table: &Table<'_>) -> ArchiveRules {
    let retention = policies::read_retention(&table.table("retention"));
    let verify = table.table("verify");
    let schedule = verify.required("schedule", "write when, such as `schedule = \"0 5 * * 0\"`");
    let percent = verify.number("percent", 1..=100).unwrap_or(VERIFY_PERCENT);
    let bandwidth_limit = policies::read_bandwidth_limit(&verify);
    let verify = schedule.and_then(|value| value.schedule());
    let verify = verify.map(|schedule| VerifyPlan { schedule, percent, bandwidth_limit });
    let user_data = table.read("user_data", Value::boolean).unwrap_or(false);
    ArchiveRules { retention, verify, guard: policies::read_guard(&table.table("guard")), user_data }
}

fn read_archive(table: &Table<'_>) -> Option<ArchiveSettings> {
    type Reader = fn(&Table<'_>) -> Option<ArchiveSettings>;
    let kinds: [(&str, Reader); 3] = [("local", read_local), ("s3", read_s3), ("restic", read_restic)];
    let (kind, read) = table
        .required("type", "write `type = \"local\"`, `type = \"s3\"` or `type = \"restic\"`")?
        .choice(&kinds.map(|kind| (kind.0, kind)))?;
    for (other, read_other) in kinds.into_iter().filter(|other| other.0 != kind) {
        for value in table.values_read_by(read_other) {
            value.place().wrong(
                format!("an archive of type `{kind}` has no such key"),
                format!("take it out: it is for archives of type `{other}`"),
            );
        }
    }
    read(table)
}

fn read_restic(table: &Table<'_>) -> Option<ArchiveSettings> {
    let example =
        "write where the repository is, such as `repository = \"/srv/restic\"`, or an address of restic's";
    let repository = table.required("repository", example).and_then(|value| {
        let text = value.text()?;
        if text.is_empty() || text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return value
                .wrong("the repository is empty, or has a blank or a control character in it", example);
        }
        let user = text.split_once("://").map_or("", |(_, rest)| rest).split('/').next().unwrap_or_default();
        if user.rsplit_once('@').is_some_and(|(user, _)| user.contains(':')) {
            return value.wrong(
                "the address has a password in it",
                "take it out: give it as a variable in the file that `environment_file` names",
            );
        }
        if !text.starts_with('/') && !text.contains(':') {
            return value.wrong("the repository is neither an absolute path nor an address", example);
        }
        Some(text.to_owned())
    });
    let program = table.read("program", |value| {
        let text = value.text()?;
        let is_name = !text.is_empty() && (text.starts_with('/') || !text.contains('/'));
        let help = "write an absolute path, or the name of a program in PATH";
        if is_name { Some(text.to_owned()) } else { value.wrong("it is a relative path", help) }
    });
    Some(ArchiveSettings::Restic {
        password_file: table.read("password_file", Value::path),
        program: program.unwrap_or_else(|| RESTIC.to_owned()),
        cache_directory: table.read("cache_directory", Value::path),
        environment_file: table.read("environment_file", Value::path),
        repository: repository?,
    })
}

fn read_local(table: &Table<'_>) -> Option<ArchiveSettings> {
    let help = "write where exports go, such as `path = \"/var/lib/snapwarden/archive\"`";
    Some(ArchiveSettings::Local { path: table.required("path", help)?.path()? })
}

fn read_s3(table: &Table<'_>) -> Option<ArchiveSettings> {
    let allow_plain_http = table.read("allow_plain_http", Value::boolean).unwrap_or(false);
    let example = "write the store's address, such as `endpoint = \"https://sos-de-fra-1.exo.io\"`";
    let endpoint = table.required("endpoint", example).and_then(|value| {
        let text = value.text()?;
        if text.contains(['{', '}']) {
            return value.wrong("the address has a placeholder in it", example);
        }
        check_address(text, text, example, allow_plain_http, value.place())
    });
    let region = table
        .required("region", "write the region or the zone of the bucket, such as `region = \"de-fra-1\"`")
        .and_then(|value| value.written("a region", "letters, digits and hyphens", is_region));
    let form = "3 to 63 lower-case letters, digits, hyphens and dots, a letter or a digit at both ends";
    let bucket = table
        .required("bucket", "write the bucket's name, such as `bucket = \"acme-backups\"`")
        .and_then(|value| value.written("a bucket's name", form, is_bucket));
    let form = "at most 256 letters, digits, `-_.=@,:~` and `/`, with `/` at the end and not at the \
                beginning, such as `snapwarden/`";
    let prefix = table
        .value("prefix")
        .map_or_else(|| Some(String::new()), |value| value.written("a prefix", form, is_prefix));
    // An invalid one is reported like any other, and makes the whole configuration invalid.
    let credentials_file = table.read("credentials_file", Value::path);
    let ca_file = table.read("ca_file", Value::path);
    let rules = read_bucket_rules(table);
    if let (Addressing::Virtual, Some(value), Some(bucket), Some(endpoint)) =
        (rules.addressing, table.value("addressing"), &bucket, &endpoint)
    {
        let has_name = matches!(endpoint.host(), Some(url::Host::Domain(_)));
        if !has_name {
            value
                .place()
                .wrong("the store's address has no name to put the bucket's before", "use `\"path\"`");
        } else if bucket.contains('.') && endpoint.scheme() == "https" {
            let help = "use `\"path\"`, or a bucket without dots";
            value.place().wrong("no certificate is for a bucket's name with dots in it", help);
        }
    }
    Some(ArchiveSettings::S3 {
        endpoint: endpoint?,
        region: region?,
        bucket: bucket?,
        prefix: prefix?,
        credentials_file,
        ca_file,
        rules,
    })
}

fn read_bucket_rules(table: &Table<'_>) -> BucketRules {
    let addressing = [("path", Addressing::Path), ("virtual", Addressing::Virtual)];
    let addressing = table.choice("addressing", &addressing).unwrap_or_default();
    let storage_class = table.read("storage_class", |value| {
        let form = "a store's word, such as `STANDARD`";
        let class = value.written("a storage class", form, is_storage_class)?;
        // Their objects have to be ordered hours before they can be read.
        if matches!(class.as_str(), "GLACIER" | "DEEP_ARCHIVE") {
            return value.wrong(
                format!("what is stored as `{class}` can't be read at once"),
                "use another: a copy that can't be read is neither verified nor restored",
            );
        }
        Some(class)
    });
    let encryption = table.choice("sse", &[("AES256", Encryption::Aes256), ("aws:kms", Encryption::Kms)]);
    let noncurrent = [("keep", Noncurrent::Keep), ("delete", Noncurrent::Delete)];
    let noncurrent = table.choice("noncurrent", &noncurrent).unwrap_or_default();
    let modes = [("governance", LockMode::Governance), ("compliance", LockMode::Compliance)];
    let mode = table.choice("lock_mode", &modes);
    let lock = table.read("lock_for", |value| {
        let days = LOCK_MAX.as_secs() / (24 * 60 * 60);
        let rule = LockRule::new(value.span()?, mode.unwrap_or(LockMode::Governance));
        rule.map_or_else(
            || {
                let fact = format!("a lock of more than {days} days");
                value.wrong(
                    fact,
                    "write less: what is locked can't be deleted by anybody, and each run locks again what is still kept",
                )
            },
            Some,
        )
    });
    if let (Some(value), None) = (table.value("lock_mode"), table.value("lock_for")) {
        let help = "write for how long as well, such as `lock_for = \"30d\"`, or take this out";
        value.place().wrong("nothing is locked without `lock_for`", help);
    }
    BucketRules { addressing, storage_class, encryption, noncurrent, lock }
}

fn is_region(text: &str) -> bool {
    (1..=63).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn is_storage_class(text: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_';
    (1..=40).contains(&text.len()) && text.bytes().all(is_plain)
}

fn is_bucket(text: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (3..=63).contains(&text.len())
        && text.bytes().all(|b| is_plain(b) || b == b'-' || b == b'.')
        && !text.contains("..")
        && text.bytes().next().is_some_and(is_plain)
        && text.bytes().next_back().is_some_and(is_plain)
}

/// Addresses are normalized: a key with a part such as `..` could not be reached.
fn is_prefix(text: &str) -> bool {
    let is_part = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.=@,:~".contains(&b))
    };
    text.is_empty()
        || text.len() <= 256 && text.strip_suffix('/').is_some_and(|parts| parts.split('/').all(is_part))
}

fn read_server(table: &Table<'_>) -> ServerSettings {
    let help = "write an address and a port, such as `127.0.0.1:9788`, or `0.0.0.0:9788` for all of this machine's \
                addresses";
    let listen = table.read("listen", |value| {
        let text = value.text()?;
        let wrong = |_| value.wrong(format!("`{}` is not an address with a port", excerpt(text, 64)), help);
        text.parse().map_or_else(wrong, Some)
    });
    ServerSettings {
        listen: listen.unwrap_or(LISTEN),
        web_config_file: table.read("web_config_file", Value::path),
        shutdown_grace: table.read("shutdown_grace", Value::duration).unwrap_or(SHUTDOWN_GRACE),
    }
}
