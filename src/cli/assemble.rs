//! Builds the parts of a command from the configuration.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::archive::backend::Archive;
use crate::archive::local::LocalArchive;
use crate::archive::manifest_cache::ManifestCache;
use crate::archive::restic;
use crate::archive::restic::archive::ResticArchive;
use crate::archive::restic::files::ResticFileError;
use crate::archive::restic::repository::ResticSettings;
use crate::archive::s3;
use crate::archive::s3::archive::S3Archive;
use crate::archive::s3::client::S3Location;
use crate::archive::s3::credentials::BucketKey;
use crate::archive::s3::memory::PartMemory;
use crate::archive::transfer::hash::Hashers;
use crate::cli::args::Global;
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::Output;
use crate::clock::{Clock, SystemClock};
use crate::config;
use crate::config::ConfigError;
use crate::config::keys::nearest;
use crate::config::sections::{ArchiveSettings, Config};
use crate::credentials::{Credentials, Search};
use crate::daemon::web::WebFile;
use crate::disk::{Disk, RealDisk, read_named_file};
use crate::exoscale::client::{Client, Settings};
use crate::exoscale::credentials;
use crate::exoscale::metadata::Metadata;
use crate::policy::Policy;
use crate::policy::name::{ArchiveName, PolicyName};
use crate::policy::notifier::{NotifierKind, NotifierSettings};
use crate::policy::shard::Shard;
use crate::process::{Processes, RealProcesses};
use crate::randomness::{Randomness, SystemRandomness};
use crate::run::context::Runner;
use crate::run::downloads::Downloads;
use crate::run::pauses;
use crate::snapshot::ZoneName;
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;
use crate::telemetry::notifier::{Notifier, Wires};
use crate::text::{chain, excerpt, printable};
use crate::transport::{HttpTransport, Transport};

/// How many shards there are, where Kubernetes gives each pod of an Indexed Job its number.
const SHARDS_VARIABLE: &str = "SNAPWARDEN_SHARDS";

/// That number.
const INDEX_VARIABLE: &str = "JOB_COMPLETION_INDEX";

/// The default state directory.
const STATE_DIRECTORY: &str = "/var/lib/snapwarden";

/// A bundle of all authorities that browsers trust has a quarter of this.
const CA_FILE_BYTES_MAX: u64 = 1 << 20;

/// Printed if no policy is named and none is enabled: silence would look like success.
pub(super) const NOTHING_ENABLED: &str = "no policy is enabled, so there is nothing to do";

/// The five seams, and the name of this machine.
#[derive(Debug, Clone)]
pub struct Seams {
    /// HTTP.
    pub transport: Arc<dyn Transport>,
    /// Files.
    pub disk: Arc<dyn Disk>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Jitter and ids.
    pub randomness: Arc<dyn Randomness>,
    /// Other programs.
    pub processes: Arc<dyn Processes>,
    /// The host name, by which daemons of one configuration on several machines begin at different times.
    pub host: Arc<str>,
}

impl Seams {
    /// The real implementations.
    pub fn real() -> Self {
        Self {
            transport: Arc::new(HttpTransport::default()),
            disk: Arc::new(RealDisk),
            clock: Arc::new(SystemClock::start()),
            randomness: Arc::new(SystemRandomness),
            processes: Arc::new(RealProcesses::default()),
            host: rustix::system::uname().nodename().to_string_lossy().into(),
        }
    }
}

/// Reads the configuration, looks where the folders of its archives lead, and finds out for which shard this process is.
///
/// # Errors
/// [`Refusal`] with all its errors.
pub fn configuration(global: &Global) -> Result<Config, Refusal> {
    let shard = shard(global)?;
    Ok(Config { shard, ..configuration_at(&global.config)? })
}

/// The shard that this process is for: by the command line, or by the variables of an Indexed Job.
fn shard(global: &Global) -> Result<Option<Shard>, Refusal> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let (None, Some(of)) = (global.shard, variable(SHARDS_VARIABLE)) else { return Ok(global.shard) };
    let Some(index) = variable(INDEX_VARIABLE) else {
        return Err(Refusal::usage(format!(
            "{SHARDS_VARIABLE} is {}, and {INDEX_VARIABLE}, which Kubernetes sets for an Indexed Job, is missing: set it, or give \
             `--shard I/N`",
            excerpt(&of, 32)
        )));
    };
    let shard = format!("{index}/{of}").parse::<Shard>();
    shard
        .map(Some)
        .map_err(|error| Refusal::usage(format!("{INDEX_VARIABLE} and {SHARDS_VARIABLE}: {error}")))
}

/// Reads a configuration file, and looks where the folders of its archives lead.
///
/// # Errors
/// [`Refusal`] with all its errors.
pub fn configuration_at(path: &Path) -> Result<Config, Refusal> {
    let endpoint = std::env::var("EXOSCALE_API_ENDPOINT").ok().filter(|endpoint| !endpoint.is_empty());
    let checked = || {
        let config = config::load(path, endpoint.as_deref())?;
        config::check_archive_folders(&config, &RealDisk)?;
        Ok(config)
    };
    checked().map_err(|error: ConfigError| Refusal::bad_configuration(&error))
}

/// The policies that a command names; all enabled ones if it names none.
///
/// # Errors
/// [`Refusal`] if a name is not in the configuration, or the policy is not enabled.
pub fn chosen<'a>(config: &'a Config, names: &[PolicyName]) -> Result<Vec<&'a Policy>, Refusal> {
    if names.is_empty() {
        return Ok(config.policies.iter().filter(|policy| policy.enabled).collect());
    }
    names.iter().map(|name| policy(config, name)).collect()
}

/// The policy with this name, if it may run.
///
/// # Errors
/// [`Refusal`] if it is not in the configuration, not enabled, or paused by hand.
pub fn policy<'a>(config: &'a Config, name: &PolicyName) -> Result<&'a Policy, Refusal> {
    let found = configured(config, name)?;
    match found.paused_text() {
        Some(paused) => {
            Err(Refusal::usage(format!("policy `{name}` is {paused}: `snapwarden resume {name}` ends that")))
        }
        None if found.enabled => Ok(found),
        None => Err(Refusal::usage(format!("policy `{name}` is not enabled"))),
    }
}

/// The policy with this name, whether or not it is enabled.
///
/// # Errors
/// [`Refusal`] if it is not in the configuration, with the name that was probably meant.
pub fn configured<'a>(config: &'a Config, name: &PolicyName) -> Result<&'a Policy, Refusal> {
    config.policies.iter().find(|policy| policy.name == *name).ok_or_else(|| {
        let known: Vec<&str> = config.policies.iter().map(|policy| policy.name.as_str()).collect();
        let meant = nearest(name.as_str(), known.iter().copied());
        let meant = meant.map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
        let known = known.join(", ");
        Refusal::usage(format!("there is no policy `{name}`; the configuration has {known}{meant}"))
    })
}

/// Pauses the policies of a configuration that are paused by hand.
///
/// # Errors
/// [`Refusal`] if the state directory cannot be read.
pub async fn heed_pauses(config: &mut Config, seams: &Seams) -> Result<(), Refusal> {
    let paused = state(config, seams, Use::Reading)?.controls().await?.paused;
    pauses::apply(&mut config.policies, &paused);
    Ok(())
}

/// Says which policies are paused by hand, since they are left out where none is named.
pub fn complain_of_paused(config: &Config, output: Output) {
    for policy in &config.policies {
        if let Some(paused) = policy.paused_text() {
            let name = &policy.name;
            output.complain(&format!(
                "policy {name} is {paused}: it does not run, and what it kept stays kept; `snapwarden resume {name}` ends that"
            ));
        }
    }
}

/// The zone that a command names, which must be one of the policy's; its first one if the command names none.
///
/// # Errors
/// [`Refusal`] with the policy's zones.
pub fn zone_of(policy: &Policy, named: Option<&ZoneName>) -> Result<ZoneName, Refusal> {
    let known = named.map_or(policy.zones.first(), |named| policy.zones.iter().find(|zone| *zone == named));
    known.cloned().ok_or_else(|| {
        let (name, named) = (&policy.name, named.map_or("", ZoneName::as_str));
        let zones: Vec<&str> = policy.zones.iter().map(ZoneName::as_str).collect();
        Refusal::usage(format!("policy `{name}` has no zone `{named}`; it has {}", zones.join(", ")))
    })
}

/// Finds the credentials.
///
/// # Errors
/// [`Refusal`] that lists where they were expected.
pub fn credentials(config: &Config) -> Result<Credentials, Refusal> {
    found_credentials(config).map(|(credentials, _)| credentials)
}

/// Finds the credentials, and says where.
///
/// # Errors
/// [`Refusal`] that lists where they were expected.
pub fn found_credentials(config: &Config) -> Result<(Credentials, String), Refusal> {
    let environment = |name: &str| std::env::var(name).ok();
    let unit_files = credentials::UNIT_FILES.map(Path::new);
    credentials::find(&environment, config.exoscale.credentials_file.as_deref(), unit_files)
        .map_err(|error| Refusal::bad_configuration(&error))
}

/// The first of the folders that systemd created for the service.
fn systemd_state_directory() -> Option<PathBuf> {
    let folders = std::env::var("STATE_DIRECTORY").ok()?;
    folders.split(':').next().filter(|folder| !folder.is_empty()).map(PathBuf::from)
}

/// The first of the folders that systemd created for the service's cache.
fn systemd_cache_directory() -> Option<PathBuf> {
    let folders = std::env::var("CACHE_DIRECTORY").ok()?;
    folders.split(':').next().filter(|folder| !folder.is_empty()).map(PathBuf::from)
}

/// The archives of the configuration. None is accessed yet.
///
/// # Errors
/// [`Refusal`] for one without credentials.
pub fn archives(
    config: &Config,
    seams: &Seams,
    purpose: Use,
) -> Result<BTreeMap<ArchiveName, Arc<Archive>>, Refusal> {
    let make = |(name, settings): (&ArchiveName, &ArchiveSettings)| {
        let archive = archive(name, settings, seams, (&config.state_directory, purpose))?;
        Ok((name.clone(), Arc::new(archive)))
    };
    config.archives.iter().map(make).collect()
}

/// Refuses names that no archive of the configuration has.
///
/// # Errors
/// [`Refusal`] that gives the first of them.
pub fn check_archives<'a>(
    config: &Config,
    names: impl IntoIterator<Item = &'a ArchiveName>,
) -> Result<(), Refusal> {
    match names.into_iter().find(|name| !config.archives.contains_key(*name)) {
        Some(name) => Err(Refusal::usage(format!("there is no archive `{name}` in the configuration"))),
        None => Ok(()),
    }
}

/// An archive of the configuration, whose manifests are kept in the state directory. It is not accessed yet.
///
/// # Errors
/// [`Refusal`] for one without credentials.
pub fn archive(
    name: &ArchiveName,
    settings: &ArchiveSettings,
    seams: &Seams,
    (state_directory, purpose): (&Option<PathBuf>, Use),
) -> Result<Archive, Refusal> {
    let file = state_path(state_directory.clone()).join(format!("manifests-{name}.jsonl"));
    let cache = ManifestCache::in_file(seams.disk.clone(), file, purpose == Use::Changing);
    match settings {
        ArchiveSettings::Local { path } => {
            let (disk, clock) = (seams.disk.clone(), seams.clock.clone());
            let archive = LocalArchive::new(name.clone(), path.clone(), disk, clock);
            Ok(Archive::Local(archive.with_cache(cache)))
        }
        ArchiveSettings::S3 { endpoint, region, bucket, prefix, credentials_file, ca_file, rules } => {
            let (of, file) = (name.clone(), credentials_file.clone());
            let find =
                move || s3::credentials::find(&of, &|name: &str| std::env::var(name).ok(), file.as_deref());
            let key = BucketKey::read_by(find).map_err(|error| Refusal::bad_configuration(&error))?;
            let transport = match ca_file {
                Some(path) => trusting(name, path)?,
                None => seams.transport.clone(),
            };
            let location = S3Location {
                endpoint: endpoint.clone(),
                region: region.clone(),
                bucket: bucket.clone(),
                prefix: prefix.clone(),
                rules: rules.clone(),
            };
            let archive = S3Archive::new(
                name.clone(),
                location,
                key,
                transport,
                seams.clock.clone(),
                seams.randomness.clone(),
            );
            Ok(Archive::S3(archive.with_cache(cache).with_memory(PartMemory::of_process())))
        }
        ArchiveSettings::Restic { repository, password_file, program, cache_directory, environment_file } => {
            let bad = |error: &ResticFileError| Refusal::bad_configuration(error);
            let systemd = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
            let password_file =
                restic::files::password_file(name, password_file.as_deref(), systemd.as_deref());
            let environment = environment_file.as_deref().map(|path| restic::files::environment(name, path));
            let settings = ResticSettings {
                repository: repository.as_str().into(),
                password_file: password_file.map_err(|error| bad(&error))?,
                program: program.clone(),
                cache: cache_directory
                    .clone()
                    .or_else(systemd_cache_directory)
                    .unwrap_or_else(|| state_path(state_directory.clone()).join(format!("restic-{name}"))),
                locks: state_path(state_directory.clone()).join(format!("restic-{name}.locks")),
                environment: environment.transpose().map_err(|error| bad(&error))?.unwrap_or_default(),
                host: seams.host.clone(),
            };
            let (processes, disk, clock) = (seams.processes.clone(), seams.disk.clone(), seams.clock.clone());
            let archive = ResticArchive::new(name.clone(), settings, processes, disk, clock);
            Ok(Archive::Restic(archive.with_cache(cache)))
        }
    }
}

/// A transport that trusts the certificate authorities in a file alone.
fn trusting(archive: &ArchiveName, path: &Path) -> Result<Arc<dyn Transport>, Refusal> {
    let read = read_named_file(path, CA_FILE_BYTES_MAX).map_err(|error| error.to_string());
    match read.and_then(|text| HttpTransport::trusting(text.as_bytes())) {
        Ok(transport) => Ok(Arc::new(transport)),
        Err(why) => {
            let path = printable(&path.display().to_string()).into_owned();
            let text = format!("`ca_file` of archive `{archive}`, {path}, can't be used: {why}");
            Err(Refusal::new(Exit::BadConfiguration, text))
        }
    }
}

/// The notifiers of the configuration, with their secrets. Nothing is sent.
///
/// # Errors
/// [`Refusal`] for one whose address or password is missing or can't be used.
pub fn notifiers(config: &Config) -> Result<Vec<Notifier>, Refusal> {
    config.notifiers.iter().map(notifier).collect()
}

/// A notifier with its secret. Nothing is sent.
///
/// # Errors
/// [`Refusal`] if its address or password is missing or can't be used.
pub fn notifier(settings: &NotifierSettings) -> Result<Notifier, Refusal> {
    let name = &settings.name;
    let (secret, key) = match &settings.kind {
        NotifierKind::Mail(_) => ("password", "password_file"),
        NotifierKind::Webhook { .. } | NotifierKind::Healthchecks { .. } => ("address", "url_file"),
    };
    let search = Search {
        purpose: format!("the {secret} of notifier `{name}`"),
        hint: String::new(),
        environment: &|name: &str| std::env::var(name).ok(),
        is_bucket: false,
    };
    let credential = format!("notify-{name}");
    let found = search
        .secret(settings.secret_file.as_deref(), &credential)
        .map_err(|error| Refusal::bad_configuration(&error))?;
    let needs_one = match &settings.kind {
        NotifierKind::Mail(mail) => mail.username.is_some(),
        NotifierKind::Webhook { .. } | NotifierKind::Healthchecks { .. } => true,
    };
    if needs_one && found.is_none() {
        return Err(Refusal::new(
            Exit::BadConfiguration,
            format!(
                "notifier `{name}` has no {secret}: name a file with it as `{key}` in `[notify.{name}]`, or give a systemd \
                 credential `{credential}`"
            ),
        ));
    }
    Notifier::new(settings.clone(), found).map_err(|error| Refusal::bad_configuration(&error))
}

/// The web configuration file, if the configuration names one, with its certificates.
///
/// # Errors
/// [`Refusal`] if it can't be used.
pub fn web_file(config: &Config) -> Result<Option<WebFile>, Refusal> {
    let file = config.server.web_config_file.as_deref().map(WebFile::read).transpose();
    file.map_err(|error| Refusal::bad_configuration(&error))
}

/// What notifications are sent by.
pub fn wires(seams: &Seams) -> Wires {
    let (transport, clock) = (seams.transport.clone(), seams.clock.clone());
    Wires { transport, clock, randomness: seams.randomness.clone() }
}

/// Whether a command may change something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// It only reads: the state directory may be missing, and is not changed.
    Reading,
    /// It may change something: the state directory is created if it is missing, and must be writable.
    Changing,
}

/// Opens the state directory: as configured, else `$STATE_DIRECTORY` of systemd, else the default.
///
/// # Errors
/// [`Refusal`] if it is unusable.
pub fn state(config: &Config, seams: &Seams, purpose: Use) -> Result<StateDirectory, Refusal> {
    let path = state_path(config.state_directory.clone());
    let state = match purpose {
        Use::Reading => StateDirectory::at(seams.disk.clone(), &path),
        Use::Changing => StateDirectory::open(seams.disk.clone(), &path)?,
    };
    let state = state.in_shard(config.shard).map_err(|error| of_other_shard(&error))?;
    if purpose == Use::Changing {
        state.remember_shard()?;
    }
    Ok(state)
}

/// Refuses a run for another shard than the state directory's.
///
/// # Errors
/// [`Refusal`].
pub fn require_shard(config: &Config, runner: &Runner) -> Result<(), Refusal> {
    runner.state.require_shard(config.shard).map_err(|error| of_other_shard(&error))
}

/// Another attempt would find the same.
fn of_other_shard(error: &StateError) -> Refusal {
    match error {
        StateError::OtherShard { .. } => Refusal::bad_configuration(error),
        _ => Refusal::failed(chain(error)),
    }
}

fn state_path(configured: Option<PathBuf>) -> PathBuf {
    configured.or_else(systemd_state_directory).unwrap_or_else(|| PathBuf::from(STATE_DIRECTORY))
}

/// The configuration, or a sentence that says why it cannot be used; and the state directory, for reading. If the
/// configuration cannot be used, the directory is the one that its text names all the same, or else as [`state`] has it.
pub fn configuration_and_state(path: &Path, seams: &Seams) -> (Result<Config, String>, StateDirectory) {
    let (config, directory) = match configuration_at(path) {
        Ok(config) => {
            let directory = config.state_directory.clone();
            (Ok(config), directory)
        }
        Err(refusal) => {
            let first = refusal.text.lines().next().unwrap_or_default();
            let why = format!("the configuration file is not valid: {first} (`snapwarden check` says where)");
            (Err(why), config::state_directory_in(path))
        }
    };
    (config, StateDirectory::at(seams.disk.clone(), &state_path(directory)))
}

/// A client of the API; without credentials only for public requests.
pub fn client(config: &Config, credentials: Option<Credentials>, seams: &Seams) -> Client {
    let exoscale = &config.exoscale;
    let settings = Settings {
        endpoint: exoscale.endpoint.clone(),
        request_timeout: exoscale.request_timeout,
        poll_interval: exoscale.poll_interval,
        operation_timeout: exoscale.operation_timeout,
        requests_per_second: exoscale.requests_per_second,
        shards: config.shard.map_or(NonZeroU32::MIN, Shard::count),
        concurrency: exoscale.concurrency,
    };
    let (transport, clock) = (seams.transport.clone(), seams.clock.clone());
    Client::new(settings, credentials, transport, clock, seams.randomness.clone())
}

/// Everything that runs and plans need.
///
/// # Errors
/// [`Refusal`] if the state directory is unusable.
pub fn runner(
    config: &Config,
    credentials: Credentials,
    seams: &Seams,
    purpose: Use,
) -> Result<Runner, Refusal> {
    let exoscale = &config.exoscale;
    let state = state(config, seams, purpose)?;
    Ok(Runner {
        client: client(config, Some(credentials), seams),
        metadata: Metadata::new(seams.transport.clone(), seams.clock.clone(), seams.randomness.clone()),
        transport: seams.transport.clone(),
        archives: archives(config, seams, purpose)?,
        archive_rules: config.archive_rules.clone(),
        state,
        clock: seams.clock.clone(),
        randomness: seams.randomness.clone(),
        processes: seams.processes.clone(),
        host: seams.host.clone(),
        policies: config.policies.clone(),
        keep_audit: config.keep_audit.clone(),
        exempt: config.exempt.clone(),
        allow_plain_http: exoscale.allow_plain_http,
        request_timeout: exoscale.request_timeout,
        concurrency: exoscale.concurrency,
        shutdown_grace: config.server.shutdown_grace,
        downloads: Downloads::default(),
        hashers: Hashers::default(),
    })
}
