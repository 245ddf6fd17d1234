//! `check`: reads the configuration, and warns where it invites a loss; `--online` also tests the zones, the permissions that
//! the policies need, and the archives.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{join, join_all};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::archive::backend::Archive;
use crate::archive::s3::archive::S3Archive;
use crate::cli::archive::clock_problem;
use crate::cli::args::{Global, RolePart};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::{Output, Row, Tone, plain};
use crate::cli::role::{LIST_EVENTS, operations, role, work_of};
use crate::config::keys::help_with;
use crate::config::sections::Config;
use crate::config::warnings::warnings;
use crate::disk::is_world_readable;
use crate::exoscale::credentials::UNIT_FILES;
use crate::exoscale::error::{ApiError, ErrorKind};
use crate::exoscale::wire::PromoteRequest;
use crate::policy::Policy;
use crate::policy::name::ArchiveName;
use crate::process::Processes;
use crate::randomness::fresh_id;
use crate::retention::export_gate::unadopted_text;
use crate::run::archive_presence::{Found, Looker, Presence};
use crate::run::context::Runner;
use crate::run::coverage::missing_text;
use crate::schedule::Schedule;
use crate::snapshot::{InstanceId, SnapshotId, TemplateId, ZoneName};
use crate::text::{chain, counted, printable, size};

/// How long a request may take by which a zone is found to be there.
const PATIENCE: Duration = Duration::from_secs(5);

/// The zone that is asked for the list of zones if none of the configuration answers: the vendor's default.
const BEST_KNOWN_ZONE: &str = "ch-gva-2";

/// Free space of the state directory, in bytes, below which it is warned of: a year of large runs takes less.
const STATE_SPACE: u64 = 100 << 20;

/// No disk is smaller, in bytes: the API's own bound. It stands for the image of an archive that has no copy yet.
const SMALLEST_DISK: u64 = 10 << 30;

/// A test of `--online`.
#[derive(Serialize)]
struct Tried {
    #[serde(rename = "where")]
    place: String,
    what: &'static str,
    /// The failure, if any.
    error: Option<String>,
    /// What was found, if there is more to say of it.
    note: Option<String>,
}

impl Tried {
    fn new(place: impl Into<String>, what: &'static str, error: Option<String>) -> Self {
        Self { place: place.into(), what, error, note: None }
    }

    fn noted(place: impl Into<String>, what: &'static str, note: impl Into<String>) -> Self {
        Self { note: Some(note.into()), ..Self::new(place, what, None) }
    }
}

/// Checks the configuration.
///
/// # Errors
/// [`Refusal`] if the configuration or the credentials are unusable.
pub async fn check(global: &Global, online: bool, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    assemble::web_file(&config)?;
    let seams = Seams::real();
    let now = seams.clock.now();
    check_hooks(&config, &*seams.processes)?;
    let mut warnings = warnings(&config);
    warnings.extend(readable_secrets(&config));
    let online = if online {
        let (credentials, place) = assemble::found_credentials(&config)?;
        let runner = assemble::runner(&config, credentials, &seams, Use::Reading)?;
        // Whether their secrets are there; nothing is sent.
        assemble::notifiers(&config)?;
        let mut tried = vec![Tried::noted("this machine", "API key", format!("found in {place}"))];
        let (all, more) = try_all(&config, &runner).await;
        tried.extend(all);
        warnings.extend(more);
        // A zone that can't be listed is not asked again.
        let lists = ["list-zones", "list-snapshots", "list-instances"];
        if tried.iter().any(|one| one.error.is_some() && lists.contains(&one.what)) {
            let why = "whether each instance has a good snapshot was not tried, since a zone can't be listed";
            warnings.push(why.to_owned());
        } else {
            let (instances, more) = try_instances(&config, &runner).await;
            tried.extend(instances);
            warnings.extend(more);
        }
        Some(tried)
    } else {
        None
    };
    let policy = |policy: &Policy| {
        json!({
            "policy": policy.name,
            "enabled": policy.enabled,
            "schedule": policy.schedule.as_ref().map(Schedule::as_str),
            "next_run": next_run(policy, now),
            "zones": policy.zones,
            "does": does(policy),
        })
    };
    let path = global.config.display().to_string();
    output.show(
        || json!({ "config": path, "files": config.files, "policies": config.policies.iter().map(policy).collect::<Value>(), "online": online, "warnings": warnings }),
        || render(&config, online.as_deref(), &warnings, now, output),
    );
    let failed = online.iter().flatten().any(|tried| tried.error.is_some());
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

/// Refuses hooks that cannot be started. Only here: whatever else a command is for, such as a restore, it needs no hook, and
/// the other policies of a daemon need none of this one's.
fn check_hooks(config: &Config, processes: &dyn Processes) -> Result<(), Refusal> {
    let mut wrong = Vec::new();
    for policy in &config.policies {
        for (key, program) in policy.hooks.each() {
            let error = processes.find(&program.name).err();
            let text = |error| format!("policies.{}.hooks.{key}: {}", policy.name, printable(&chain(&error)));
            wrong.extend(error.map(text));
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(Refusal::new(Exit::BadConfiguration, wrong.join("\n"))) }
}

/// Prints the policy of a role for the enabled policies, or for a part of their work.
///
/// # Errors
/// [`Refusal`] if the configuration is unusable, or enables no policy.
pub fn print_role(global: &Global, part: Option<RolePart>, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let enabled: Vec<&Policy> = config.policies.iter().filter(|policy| policy.enabled).collect();
    let role = role(&enabled, part).ok_or_else(|| Refusal::usage(assemble::NOTHING_ENABLED))?;
    output.print(&format!("{role:#}\n"));
    Ok(Exit::Done)
}

/// Files that hold secrets, and that every user of this machine may read: those that the configuration names by these keys,
/// those that the environment names, and those of the service's unit.
fn readable_secrets(config: &Config) -> Vec<String> {
    const KEYS: [&str; 4] = ["credentials_file", "url_file", "password_file", "environment_file"];
    let is_secret = |key: &str| KEYS.iter().any(|end| key.rsplit('.').next() == Some(end));
    let named =
        config.written.iter().filter(|(key, _)| is_secret(key)).filter_map(|(_, value)| value.as_str());
    let variables = ["EXOSCALE_API_KEY_FILE", "EXOSCALE_API_SECRET_FILE"].map(std::env::var);
    let by_variables = variables.iter().flatten().map(String::as_str);
    let paths: BTreeSet<&str> = named.chain(by_variables).chain(UNIT_FILES).collect();
    let warn = |path: &str| {
        let path = printable(path);
        format!("every user of this machine may read the secret in {path}: chmod 600 {path}")
    };
    paths.into_iter().filter(|path| is_world_readable(Path::new(path))).map(warn).collect()
}

fn next_run(policy: &Policy, now: Timestamp) -> Option<Timestamp> {
    policy.schedule.as_ref()?.next_after(now, &policy.time_zone)
}

fn does(policy: &Policy) -> Vec<&'static str> {
    let does = [
        (policy.hooks.each().next().is_some(), "hooks"),
        (policy.create, "create"),
        (policy.export.is_some(), "export"),
        (policy.promote.is_some(), "promote"),
        (policy.retention.is_some(), "prune"),
    ];
    does.into_iter().filter_map(|(does, word)| does.then_some(word)).collect()
}

fn render(
    config: &Config,
    online: Option<&[Tried]>,
    warnings: &[String],
    now: Timestamp,
    output: Output,
) -> String {
    let Config { policies, files, .. } = config;
    let (file, included) = files.split_first().map_or(("", &[][..]), |(file, included)| (file, included));
    let mut text = format!("{}: valid, {}\n", printable(file), counted(policies.len(), "policy"));
    for file in included {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  includes {}", printable(file));
    }
    let row = |policy: &Policy| -> Row {
        let zones: Vec<&str> = policy.zones.iter().map(ZoneName::as_str).collect();
        let does = does(policy);
        vec![
            plain(policy.name.to_string()),
            plain(if policy.enabled { "yes" } else { "no" }),
            plain(policy.schedule.as_ref().map_or("(manual)", Schedule::as_str)),
            plain(next_run(policy, now).map_or_else(|| "-".to_owned(), |next| next.to_string())),
            plain(zones.join(", ")),
            plain(if does.is_empty() { "list".to_owned() } else { does.join(", ") }),
        ]
    };
    let head = &["POLICY", "ENABLED", "SCHEDULE", "NEXT DUE", "ZONES", "DOES"];
    text.push_str(&output.table(head, policies.iter().map(row).collect()));
    if let Some(tried) = online {
        let row = |tried: &Tried| -> Row {
            let result = match (&tried.error, &tried.note) {
                (Some(error), _) => (error.clone(), Tone::Bad),
                (None, Some(note)) => (note.clone(), Tone::Plain),
                (None, None) => ("ok".to_owned(), Tone::Good),
            };
            vec![plain(&tried.place), plain(tried.what), result]
        };
        let table = output.table(&["WHERE", "WHAT", "RESULT"], tried.iter().map(row).collect());
        // Writing to a String cannot fail.
        let _ = write!(text, "\n{table}");
    }
    for warning in warnings {
        let _ = write!(text, "\nwarning: {warning}\n");
    }
    text
}

/// Tests everything that the enabled policies need, in every zone and archive that they name. The second list is of warnings.
async fn try_all(config: &Config, runner: &Runner) -> (Vec<Tried>, Vec<String>) {
    let mut zones: BTreeMap<&ZoneName, Vec<&Policy>> = BTreeMap::new();
    let mut archives = BTreeSet::new();
    for policy in config.policies.iter().filter(|policy| policy.enabled) {
        archives.extend(policy.export.iter().flat_map(|export| &export.archives));
        for zone in &policy.zones {
            zones.entry(zone).or_default().push(policy);
        }
    }
    let looker = Looker::new(&runner.state).await;
    let in_archives = archives.into_iter().map(|name| try_archive(runner, &looker, name));
    let (mut tried, in_archives) = join(try_zones(config, runner, zones), join_all(in_archives)).await;
    if config.policies.iter().any(|policy| policy.enabled && policy.select.is_in_doubt()) {
        let error = runner.metadata.this_machine().await.err().map(|error| chain(&error));
        tried.push(Tried::new("this machine", "self", error));
    }
    let mut warnings = Vec::new();
    if let Some(free) = runner.state.free_bytes().await {
        tried.push(Tried::noted("state directory", "free space", size(free)));
        warnings.extend((free < STATE_SPACE).then(|| {
            let path = printable(&runner.state.path().display().to_string()).into_owned();
            format!(
                "the state directory {path} has {} free: a run that can't write its state stops",
                size(free)
            )
        }));
    }
    for (in_archive, more) in in_archives {
        tried.extend(in_archive);
        warnings.extend(more);
    }
    (tried, warnings)
}

/// Tests whether an archive is there, and can be written to, read and deleted from. One that is not there, or not adopted, is
/// not touched.
async fn try_archive(
    runner: &Runner,
    looker: &Result<Looker, String>,
    name: &ArchiveName,
) -> (Vec<Tried>, Vec<String>) {
    let (place, mut warnings) = (format!("archive {name}"), Vec::new());
    if let Some(Archive::S3(bucket)) = runner.archives.get(name).map(|archive| &**archive)
        && let Err(error) = bucket.answers(PATIENCE).await
    {
        let error = format!("{}; nothing else of this archive was tried", chain(&error));
        return (vec![Tried::new(&place, "read", Some(error))], warnings);
    }
    let found = match looker {
        Ok(looker) => runner.look_at(looker, name).await,
        Err(error) => Err(error.clone()),
    };
    let (error, catalogue) = match found {
        Ok(Found { presence: Presence::Known | Presence::FirstUse, catalogue, .. }) => {
            (None, Some(catalogue))
        }
        Ok(Found { presence: Presence::InDoubt { why, .. }, catalogue, .. }) => (Some(why), Some(catalogue)),
        Ok(Found { presence: Presence::Closed(why), .. }) | Err(why) => (Some(why), None),
        Ok(Found { presence: Presence::Unadopted, .. }) => (Some(unadopted_text(name)), None),
    };
    let mut tried = vec![Tried::new(&place, "read", error)];
    let (Some(archive), Some(catalogue)) = (runner.archives.get(name), catalogue) else {
        return (tried, warnings);
    };
    tried.extend(archive.probe().await.into_iter().map(|(step, error)| Tried::new(&place, step, error)));
    if let Some(free) = archive.free_bytes().await {
        tried.push(Tried::noted(&place, "free space", size(free)));
        let largest = catalogue.unpruned().map(|copy| copy.manifest.image.bytes).max();
        let needed = largest.unwrap_or(SMALLEST_DISK);
        let least = if largest.is_some() { "its largest copy has" } else { "the smallest disk has" };
        warnings.extend((free < needed).then(|| {
            let (free, needed) = (size(free), size(needed));
            format!("archive `{name}`: {free} are free, and {least} {needed}: the next export may not fit")
        }));
    }
    if let Archive::S3(bucket) = &**archive {
        let prunes = runner.archive_rules.get(name).is_some_and(|rules| rules.retention.is_some());
        let (of_bucket, warning) = try_bucket(bucket, prunes, runner.clock.now(), &place).await;
        tried.extend(of_bucket);
        warnings.extend(warning);
    }
    (tried, warnings)
}

/// Tests what an archive's bucket keeps of deleted files, and whether the archive's key can break a lock.
async fn try_bucket(
    bucket: &S3Archive,
    prunes: bool,
    now: Timestamp,
    place: &str,
) -> (Vec<Tried>, Option<String>) {
    let settings = bucket.bucket_settings().await;
    let warning = (prunes && settings.keeps_versions() && !bucket.deletes_noncurrent()).then(|| {
        format!(
            "archive `{}`: its bucket keeps the versions of what is deleted, so pruning frees no space; set \
             `noncurrent = \"delete\"`, or let a lifecycle rule of the bucket expire noncurrent versions, such as {} (it \
             replaces the rules that the bucket has)",
            bucket.name(),
            bucket.lifecycle_rule(now)
        )
    });
    let mut tried = Vec::new();
    for (what, setting) in [("versioning", settings.versioning), ("object lock", settings.object_lock)] {
        let note = match setting {
            Ok(setting) if setting.is_empty() => "off".to_owned(),
            Ok(setting) => setting,
            Err(error) => format!("unknown: {}", chain(&error)),
        };
        tried.push(Tried::noted(place, what, note));
    }
    if let Some(steps) = bucket.probe_lock().await {
        tried.extend(steps.into_iter().map(|(step, error)| Tried::new(place, step, error)));
    }
    (tried, warning)
}

/// Tests whether each instance that a policy selects has a good snapshot, and whether each of its patterns matches one. What
/// the next run takes itself is no failure: the second list is of warnings.
async fn try_instances(config: &Config, runner: &Runner) -> (Vec<Tried>, Vec<String>) {
    let (mut tried, mut warnings) = (Vec::new(), Vec::new());
    // Whether there are copies is not asked.
    let runner = Runner { archives: BTreeMap::new(), ..runner.clone() };
    let fleet = match runner.coverage().await {
        Ok(fleet) => fleet,
        Err(error) => {
            return (vec![Tried::new("state directory", "instances", Some(error))], warnings);
        }
    };
    for policy in config.policies.iter().filter(|policy| policy.enabled) {
        let place = format!("policy {}", policy.name);
        let unmatched = fleet.unmatched.iter().find(|(name, _)| *name == policy.name);
        let error = unmatched.map(|(_, text)| text.clone());
        tried.push(Tried::new(&place, "patterns", error));
        let missing = fleet.instances.iter().filter(|one| one.missing.contains(&policy.name));
        let missing = missing_text(missing.map(|one| one.name.as_str()));
        if policy.create {
            let next = "the policy's next run takes one";
            warnings.extend(missing.map(|text| format!("policy `{}`: {text}: {next}", policy.name)));
        } else {
            tried.push(Tried::new(&place, "snapshots", missing));
        }
    }
    (tried, warnings)
}

/// Tests the zones. All are asked at once, and once alone, which zones there are: one that does not exist or does not answer
/// is asked nothing else.
async fn try_zones(config: &Config, runner: &Runner, zones: BTreeMap<&ZoneName, Vec<&Policy>>) -> Vec<Tried> {
    let client = runner.client.clone().trying_once(PATIENCE);
    let ask = |zone| client.list_zones(zone).map(move |answer| (zone, answer));
    let mut asked: FuturesUnordered<_> = zones.keys().copied().map(ask).collect();
    let (mut answers, mut known) = (BTreeMap::new(), Vec::new());
    while let Some((zone, answer)) = asked.next().await {
        if let Ok((listed, _)) = &answer {
            known.extend(listed.iter().map(|zone| zone.name.clone()));
        }
        answers.insert(zone, answer);
        let is_awaited = |zone: &&ZoneName| !answers.contains_key(zone) && known.contains(zone);
        if !known.is_empty() && !zones.keys().any(is_awaited) {
            break;
        }
    }
    drop(asked);
    let best_known = BEST_KNOWN_ZONE.parse().ok().filter(|zone| !zones.contains_key(zone));
    if let Some(zone) = best_known.filter(|_| known.is_empty() && config.exoscale.endpoint.contains("{zone}"))
        && let Ok((listed, _)) = client.list_zones(&zone).await
    {
        known.extend(listed.into_iter().map(|zone| zone.name));
    }
    known.sort();
    known.dedup();

    let mut tried = Vec::new();
    for (zone, policies) in zones {
        let place = format!("zone {zone}");
        let skew = match answers.remove(zone) {
            _ if !known.is_empty() && !known.contains(zone) => Err(no_such_zone(zone, &known)),
            Some(Ok((_, skew))) => Ok(skew),
            Some(Err(error)) => Err(nothing_else(&error)),
            None => continue,
        };
        tried.push(Tried::new(&place, "list-zones", skew.as_ref().err().cloned()));
        if let Ok(skew) = skew {
            let max = policies.iter().map(|policy| policy.guard.max_clock_skew).min().unwrap_or_default();
            let problem = clock_problem(skew, max).map(|problem| format!("this machine's clock {problem}"));
            tried.push(Tried::new(&place, "clock", problem));
            tried.extend(try_zone(runner, zone, &policies).await);
        }
    }
    tried
}

fn no_such_zone(zone: &ZoneName, known: &[ZoneName]) -> String {
    let known = known.iter().map(ZoneName::as_str);
    let all = || format!("there are {}", known.clone().collect::<Vec<_>>().join(", "));
    format!("zone `{zone}` does not exist; {}", help_with(zone.as_str(), known.clone(), all))
}

fn nothing_else(error: &ApiError) -> String {
    format!("{}; nothing else of this zone was tried", chain(error))
}

/// Tests each operation that the policies need in a zone, by the API's name of it, as a role's policy spells it.
///
/// Operations that change something are tested with a new random id that does not exist: "not found" means that they are
/// permitted, and nothing can be changed.
async fn try_zone(runner: &Runner, zone: &ZoneName, policies: &[&Policy]) -> Vec<Tried> {
    let nothing: Uuid = fresh_id(&*runner.randomness, runner.clock.now());
    let (instance, snapshot, template) = (InstanceId(nothing), SnapshotId(nothing), TemplateId(nothing));
    let request = PromoteRequest { name: "snapwarden check".to_owned(), ..PromoteRequest::default() };
    let client = runner.client.zone(zone);
    let mut tried = Vec::new();
    for operation in operations(&work_of(policies)) {
        if operation == LIST_EVENTS {
            let now = runner.clock.now();
            if let Err(error) = client.list_deletions(&BTreeSet::new(), [now, now]).await {
                let note = format!(
                    "not needed, but then nothing says who else deleted a snapshot: {}",
                    chain(&error)
                );
                tried.push(Tried::noted(format!("zone {zone}"), operation, note));
            } else {
                tried.push(Tried::new(format!("zone {zone}"), operation, None));
            }
            continue;
        }
        let answer = match operation {
            "list-snapshots" => client.list_snapshots().await.map(drop),
            "list-instances" => client.list_instances().await.map(drop),
            "list-quotas" => client.list_quotas().await.map(drop),
            "list-templates" => client.list_templates().await.map(drop),
            "get-snapshot" => client.get_snapshot(snapshot).await.map(drop),
            "get-instance" => client.get_instance(instance).await.map(drop),
            "get-instance-type" => client.get_instance_type(nothing).await.map(drop),
            "get-template" => client.get_template(template).await.map(drop),
            "get-quota" => client.get_quota("snapshot").await.map(drop),
            "create-snapshot" => client.create_snapshot(instance).await.map(drop),
            "delete-snapshot" => client.delete_snapshot(snapshot).await.map(drop),
            "export-snapshot" => client.export_snapshot(snapshot).await.map(drop),
            "promote-snapshot-to-template" => client.promote_snapshot(snapshot, &request).await.map(drop),
            "delete-template" => client.delete_template(template).await.map(drop),
            // `get-operation`: there is no operation to ask for.
            _ => continue,
        };
        let error = answer.err().filter(|error| error.kind() != ErrorKind::NotFound);
        let is_lost = |error: &ApiError| matches!(error.kind(), ErrorKind::Transport | ErrorKind::TimedOut);
        let lost = error.as_ref().filter(|error| is_lost(error)).map(nothing_else);
        let is_lost = lost.is_some();
        let error = lost.or_else(|| error.map(|error| chain(&error)));
        tried.push(Tried::new(format!("zone {zone}"), operation, error));
        if is_lost {
            break;
        }
    }
    tried
}
