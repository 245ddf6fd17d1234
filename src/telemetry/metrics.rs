//! The model in the text format of Prometheus.
//!
//! `METRICS` lists every gauge and counter. They are made anew from the model for each scrape, so that no series can
//! outlive its policy; only histograms are kept between scrapes, and are removed with their policy. Names from outside
//! are cut and made printable before they become the value of a label, and escaped where the format needs it.

use std::fmt::Write as _;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::MetricFamily;
use prometheus::{HistogramOpts, HistogramVec, TextEncoder};

use crate::archive::stats::ArchiveStats;
use crate::policy::name::PolicyName;
use crate::run::coverage::InstanceStates;
use crate::run::downloads::RunningDownload;
use crate::state::last_runs::{InstanceCounts, PlanSums, ZoneCoverage};
use crate::telemetry::model::{Counts, LABEL_CHARACTERS_MAX, Model, PolicyModel, ZoneModel};
use crate::text::excerpt;

/// From a run that finds nothing to do to one that exports for hours.
const RUN_SECONDS: [f64; 10] = [1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 21600.0];

/// From a small image on a fast line to a large one on a slow line.
const EXPORT_SECONDS: [f64; 9] = [10.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0];

/// Up to the default of `request_timeout`.
const REQUEST_SECONDS: [f64; 9] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Kept between scrapes, since a distribution can't be made from the model. Clones share their series.
#[derive(Debug, Clone)]
pub(super) struct Histograms {
    run: HistogramVec,
    export: HistogramVec,
    request: HistogramVec,
}

impl Histograms {
    pub(super) fn new() -> Self {
        Self {
            run: histogram(
                "snapwarden_policy_run_duration_seconds",
                "How long the policy's runs took.",
                &["policy"],
                &RUN_SECONDS,
            ),
            export: histogram(
                "snapwarden_export_duration_seconds",
                "How long the download and verification of exported images took, without failed ones.",
                &["policy"],
                &EXPORT_SECONDS,
            ),
            request: histogram(
                "snapwarden_api_request_duration_seconds",
                "How long requests to the API took, including those without an answer.",
                &["operation"],
                &REQUEST_SECONDS,
            ),
        }
    }

    /// Adds the policy's series, at zero.
    pub(super) fn begin(&self, policy: &PolicyName) {
        for of_policy in [&self.run, &self.export] {
            of_policy.with_label_values(&[policy.as_str()]);
        }
    }

    /// Removes the policy's series.
    pub(super) fn forget(&self, policy: &PolicyName) {
        for of_policy in [&self.run, &self.export] {
            // An error says that there was none, which is as good.
            let _ = of_policy.remove_label_values(&[policy.as_str()]);
        }
    }

    pub(super) fn run_took(&self, policy: &PolicyName, took: SignedDuration) {
        // By the wall clock, which may have been set back.
        self.run.with_label_values(&[policy.as_str()]).observe(took.as_secs_f64().max(0.0));
    }

    pub(super) fn export_took(&self, policy: &PolicyName, seconds: f64) {
        self.export.with_label_values(&[policy.as_str()]).observe(seconds);
    }

    pub(super) fn request_took(&self, operation: &'static str, took: Duration) {
        self.request.with_label_values(&[operation]).observe(took.as_secs_f64());
    }
}

fn histogram(name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
    HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)
        .expect("the names and buckets of our own histograms are valid")
}

/// A gauge or a counter.
struct Metric {
    is_counter: bool,
    name: &'static str,
    help: &'static str,
    read: Read,
}

/// How the series of a metric are read from the model, which also says what labels they have. `None` leaves a series
/// out.
enum Read {
    /// One series without labels.
    Program(fn(&Model) -> Option<f64>),
    /// By `policy`.
    Policy(fn(&PolicyModel) -> Option<f64>),
    /// By `policy` and `result`; every result is there from the start.
    Results(fn(&PolicyModel) -> &Counts),
    /// By `policy`: the sum over its downloads in flight.
    Downloads(fn(&RunningDownload) -> u64),
    /// By `policy` and `zone`.
    Zone(fn(&ZoneModel) -> Option<f64>),
    /// By `policy`, `zone` and `reason`.
    Blocked(fn(&ZoneModel) -> [(&'static str, u64); 10]),
    /// By `policy`, `zone`, `instance_id` and `instance_name`.
    Instance(fn(&InstanceCounts) -> Option<f64>),
    /// As [`Read::Instance`], and by one more label.
    InstanceBy(&'static str, fn(&InstanceCounts, Add<'_>)),
    /// By `archive`.
    Archive(fn(&ArchiveStats) -> Option<f64>),
    /// By these labels.
    By(&'static [&'static str], fn(&Model, Add<'_>)),
}

/// Adds a series: the values of its labels, in their order, and its own.
type Add<'a> = &'a mut dyn FnMut(&[&str], f64);

const fn gauge(name: &'static str, help: &'static str, read: Read) -> Metric {
    Metric { is_counter: false, name, help, read }
}

const fn counter(name: &'static str, help: &'static str, read: Read) -> Metric {
    Metric { is_counter: true, name, help, read }
}

const METRICS: &[Metric] = &[
    gauge(
        "snapwarden_build_info",
        "Always 1; the labels say which program this is.",
        Read::By(&["version", "revision"], |model, add| {
            add(&[&model.status.version, &model.revision], 1.0);
        }),
    ),
    gauge(
        "snapwarden_config_last_reload_successful",
        "Whether the last attempt to read the configuration, or the web configuration file and its certificates, succeeded; if not, \
         the previous one is in use.",
        Read::Program(|model| {
            let config = &model.status.config;
            Some(flag(config.last_reload_successful && config.web_config_error.is_none()))
        }),
    ),
    gauge(
        "snapwarden_config_last_reload_success_timestamp_seconds",
        "When the configuration in use was read.",
        Read::Program(|model| model.status.config.loaded_at.map(seconds)),
    ),
    gauge(
        "snapwarden_state_last_write_successful",
        "Whether the daemon's last attempt to write its state succeeded; if not, a restart may repeat runs.",
        Read::Program(|model| Some(flag(model.status.state_error.is_none()))),
    ),
    gauge(
        "snapwarden_holds",
        "Snapshots on hold by hand; absent if they can't be read, and then nothing is deleted.",
        Read::Program(|model| model.holds.map(number)),
    ),
    gauge(
        "snapwarden_scheduler_last_tick_timestamp_seconds",
        "When the scheduler's loop last ran.",
        Read::Program(|model| model.ticked_at.map(seconds)),
    ),
    gauge(
        "snapwarden_clock_skew_seconds",
        "How far this machine's clock is ahead of the API's, by the last listing of the zone.",
        Read::By(&["zone"], |model, add| {
            for (zone, skew) in &model.clock_skew {
                add(&[zone.as_str()], *skew);
            }
        }),
    ),
    gauge(
        "snapwarden_quota_usage",
        "Used amount of a quota of the organization.",
        Read::By(&["resource"], |model, add| {
            for (resource, (usage, _)) in &model.quotas {
                add(&[resource], number(*usage));
            }
        }),
    ),
    gauge(
        "snapwarden_quota_limit",
        "Limit of a quota of the organization; absent if there is none.",
        Read::By(&["resource"], |model, add| {
            for (resource, (_, limit)) in &model.quotas {
                if let Some(limit) = limit {
                    add(&[resource], number(*limit));
                }
            }
        }),
    ),
    gauge(
        "snapwarden_policy_enabled",
        "Whether the policy is enabled.",
        Read::Policy(|policy| Some(flag(policy.status.enabled))),
    ),
    gauge(
        "snapwarden_policy_created_timestamp_seconds",
        "When the configuration first had the policy.",
        Read::Policy(|policy| Some(seconds(policy.first_seen_at))),
    ),
    gauge(
        "snapwarden_policy_next_run_timestamp_seconds",
        "When the policy is due next; absent if it is not scheduled.",
        Read::Policy(|policy| policy.status.next_run_at.map(seconds)),
    ),
    gauge(
        "snapwarden_policy_expected_interval_seconds",
        "The longest span between two due times of the policy's schedule; absent without a schedule.",
        Read::Policy(|policy| policy.expected_interval.map(|span| span.as_secs_f64())),
    ),
    counter(
        "snapwarden_policy_missed_runs_total",
        "Runs of the policy that were due while the program or the machine was not running.",
        Read::Policy(|policy| Some(number(policy.status.missed_runs))),
    ),
    counter(
        "snapwarden_policy_runs_total",
        "Runs of the policy by result; skipped are those that were due during another run.",
        Read::Results(|policy| &policy.runs),
    ),
    gauge(
        "snapwarden_policy_last_run_timestamp_seconds",
        "When a run of the policy last ended in the zone; absent until the first.",
        Read::Zone(|zone| zone.memory.last_run_at.map(seconds)),
    ),
    gauge(
        "snapwarden_policy_last_success_timestamp_seconds",
        "When the last run ended in which nothing failed and nothing was blocked by the guard in the zone; absent until the first.",
        Read::Zone(|zone| zone.memory.last_success_at.map(seconds)),
    ),
    gauge(
        "snapwarden_policy_held",
        "Whether the guard blocked the last run's deletions in the zone.",
        Read::Zone(|zone| Some(flag(zone.in_force().held.is_some()))),
    ),
    gauge(
        "snapwarden_policy_unmatched",
        "Whether the policy selected nothing in the zone when it was last listed.",
        Read::Zone(|zone| Some(flag(is_unmatched(zone)))),
    ),
    gauge(
        "snapwarden_policy_last_run_result",
        "How the policy's last run ended in the zone: 0 success, also before the first run, 1 partial, 2 failed, 3 held.",
        Read::Zone(|zone| Some(result_number(zone))),
    ),
    gauge(
        "snapwarden_policy_instances",
        "Listed instances that the policy selects and that are not exempt, by their newest good snapshot: fresh also if they are too new to have one, stale, or none; and vanished, for a week.",
        Read::By(&["policy", "zone", "state"], |model, add| {
            for (policy, known) in &model.policies {
                for (zone, known) in &known.zones {
                    let InstanceStates { fresh, stale, none, vanished } = known.states;
                    let states = [("fresh", fresh), ("stale", stale), ("none", none), ("vanished", vanished)];
                    for (state, count) in states {
                        add(&[policy.as_str(), zone.as_str(), state], number(count));
                    }
                }
            }
        }),
    ),
    gauge(
        "snapwarden_instances",
        "Instances of the zone when it was last listed: covered if an enabled policy takes or exports their snapshots, exempt if they are meant to be without a backup, else uncovered.",
        Read::By(&["zone", "state"], |model, add| {
            for (zone, coverage) in model.coverage() {
                let ZoneCoverage { covered, uncovered, exempt, .. } = coverage;
                for (state, count) in [("covered", covered), ("uncovered", uncovered), ("exempt", exempt)] {
                    add(&[zone.as_str(), state], number(count));
                }
            }
        }),
    ),
    gauge(
        "snapwarden_snapshots_unexplained",
        "Snapshots of the zone that vanished within a week while neither the audit log nor the API's events nor the end of their instance explains it.",
        Read::By(&["zone"], |model, add| {
            for (zone, coverage) in model.coverage() {
                add(&[zone.as_str()], number(coverage.unexplained));
            }
        }),
    ),
    gauge(
        "snapwarden_guard_allowance",
        "The most deletions that the guard may let pass in the policy's next run, as `snapwarden allow` gave it; 0 without.",
        Read::Policy(|policy| Some(number(policy.allowance))),
    ),
    gauge(
        "snapwarden_export_gate_oldest_timestamp_seconds",
        "Since when snapshots in the zone are kept only because a verified copy is missing, without a break; absent if none are.",
        Read::Zone(|zone| zone.in_force().gate_since.map(seconds)),
    ),
    gauge(
        "snapwarden_planned_deletes",
        "Snapshots that the policy's last plan in the zone deletes and that the run has not deleted.",
        Read::Zone(|zone| Some(number(zone.in_force().plan.as_ref().map_or(0, |plan| plan.delete)))),
    ),
    gauge(
        "snapwarden_pending_deletes",
        "Snapshots that the policy's last plan in the zone keeps until a change has settled (`settle`).",
        Read::Zone(|zone| Some(number(zone.in_force().plan.as_ref().map_or(0, |plan| plan.pending)))),
    ),
    gauge(
        "snapwarden_blocked_deletes",
        "Snapshots that the policy's last run in the zone would have deleted, by what kept them.",
        Read::Blocked(blocked),
    ),
    gauge(
        "snapwarden_snapshots",
        "Snapshots of the instance that the policy selects, by state.",
        Read::InstanceBy("state", |instance, add| {
            add(&["good"], number(instance.good));
            add(&["failed"], number(instance.failed));
            add(&["in_flight"], number(instance.in_flight));
            add(&["other"], number(instance.other));
        }),
    ),
    gauge(
        "snapwarden_snapshot_newest_timestamp_seconds",
        "When the newest good snapshot of the instance was taken; absent if there is none.",
        Read::Instance(|instance| instance.newest_at.map(seconds)),
    ),
    gauge(
        "snapwarden_snapshot_oldest_timestamp_seconds",
        "When the oldest good snapshot of the instance was taken; absent if there is none.",
        Read::Instance(|instance| instance.oldest_at.map(seconds)),
    ),
    gauge(
        "snapwarden_snapshot_newest_consistent_timestamp_seconds",
        "When the newest good and application-consistent snapshot of the instance was taken; absent if there is none.",
        Read::Instance(|instance| instance.newest_consistent_at.map(seconds)),
    ),
    gauge(
        "snapwarden_export_newest_verified_timestamp_seconds",
        "When the newest snapshot of the instance was taken of which the archive has a verified copy.",
        Read::InstanceBy("archive", |instance, add| {
            for (archive, at) in &instance.newest_verified_at {
                add(&[archive.as_str()], seconds(*at));
            }
        }),
    ),
    counter(
        "snapwarden_snapshot_creates_total",
        "Snapshots to be created, by result.",
        Read::Results(|policy| &policy.creates),
    ),
    counter(
        "snapwarden_exports_total",
        "Exports into an archive, by result.",
        Read::Results(|policy| &policy.exports),
    ),
    counter(
        "snapwarden_promotes_total",
        "Promotions to a template, by result.",
        Read::Results(|policy| &policy.promotes),
    ),
    counter(
        "snapwarden_snapshot_deletes_total",
        "Snapshots to be deleted, by result; blocked are those that the platform was busy with.",
        Read::Results(|policy| &policy.deletes),
    ),
    counter(
        "snapwarden_export_bytes_total",
        "Bytes of images that were downloaded, including those that were downloaded again.",
        Read::Policy(|policy| Some(number(policy.export_bytes))),
    ),
    counter(
        "snapwarden_export_resumes_total",
        "How often a download continued on a new connection.",
        Read::Policy(|policy| Some(number(policy.export_resumes))),
    ),
    counter(
        "snapwarden_export_checksum_mismatches_total",
        "How often the MD5 of an image differed from the API's.",
        Read::Policy(|policy| Some(number(policy.export_checksum_mismatches))),
    ),
    counter(
        "snapwarden_hook_failures_total",
        "Hooks of the policy's runs that failed, took too long, or could not be started.",
        Read::Policy(|policy| Some(number(policy.hook_failures))),
    ),
    gauge(
        "snapwarden_exports_in_progress",
        "Images of the policy that are being downloaded or verified now.",
        Read::Downloads(|_| 1),
    ),
    gauge(
        "snapwarden_export_progress_bytes",
        "Bytes downloaded so far of the images that are being downloaded now.",
        Read::Downloads(|download| download.how_far.bytes),
    ),
    gauge(
        "snapwarden_archive_readable",
        "Whether the archive can be read; if not, its other series are absent.",
        Read::Archive(|stats| Some(flag(stats.error.is_none()))),
    ),
    gauge(
        "snapwarden_archive_present",
        "Whether the archive is there: readable, and by its marker the one that was used before.",
        Read::Archive(|stats| Some(flag(stats.is_present))),
    ),
    gauge(
        "snapwarden_archive_images",
        "Verified copies in the archive whose image exists.",
        Read::Archive(|stats| readable(stats).map(|stats| number(stats.images))),
    ),
    gauge(
        "snapwarden_archive_bytes",
        "The length of all images in the archive.",
        Read::Archive(|stats| readable(stats).map(|stats| number(stats.bytes))),
    ),
    gauge(
        "snapwarden_archive_free_bytes",
        "Free bytes on the archive's file system.",
        Read::Archive(|stats| stats.free_bytes.map(number)),
    ),
    gauge(
        "snapwarden_archive_noncurrent_bytes",
        "The length of what the archive's bucket keeps of deleted and overwritten files; absent where it keeps no versions.",
        Read::Archive(|stats| stats.noncurrent_bytes.map(number)),
    ),
    gauge(
        "snapwarden_archive_last_verify_timestamp_seconds",
        "The oldest time of last verification among the archive's copies; absent without a copy.",
        Read::Archive(|stats| readable(stats)?.verified_at.map(seconds)),
    ),
    gauge(
        "snapwarden_archive_corrupt_images",
        "Copies in the archive that are missing or damaged.",
        Read::Archive(|stats| readable(stats).map(|stats| number(stats.corrupt))),
    ),
    counter(
        "snapwarden_api_requests_total",
        "Requests to the API by the status of the answer; `none` if there was no answer.",
        Read::By(&["zone", "operation", "code"], |model, add| {
            for ((zone, operation, status), count) in &model.api_requests {
                let code = status.as_ref().map_or("none", |status| status.as_str());
                add(&[zone.as_str(), operation, code], number(*count));
            }
        }),
    ),
    counter(
        "snapwarden_api_retries_total",
        "Requests to the API that were repeated, by the reason.",
        Read::By(&["operation", "reason"], |model, add| {
            for ((operation, reason), count) in &model.api_retries {
                add(&[operation, reason], number(*count));
            }
        }),
    ),
    counter(
        "snapwarden_notifications_total",
        "Notifications by result: sent, failed after all attempts, or dropped since too many waited.",
        Read::By(&["notifier", "result"], |model, add| {
            for (notifier, counts) in &model.notifications {
                for (result, count) in counts {
                    add(&[notifier.as_str(), result], number(*count));
                }
            }
        }),
    ),
];

impl Read {
    fn labels(&self) -> Vec<&'static str> {
        match self {
            Self::Program(_) => Vec::new(),
            Self::Policy(_) | Self::Downloads(_) => vec!["policy"],
            Self::Results(_) => vec!["policy", "result"],
            Self::Zone(_) => vec!["policy", "zone"],
            Self::Blocked(_) => vec!["policy", "zone", "reason"],
            Self::Instance(_) => INSTANCE.to_vec(),
            Self::InstanceBy(label, _) => [&INSTANCE[..], &[*label]].concat(),
            Self::Archive(_) => vec!["archive"],
            Self::By(labels, _) => labels.to_vec(),
        }
    }

    fn each(&self, model: &Model, running: &[RunningDownload], add: Add<'_>) {
        match self {
            Self::Program(read) => add_some(add, &[], read(model)),
            Self::Archive(read) => {
                for (name, stats) in &model.archives {
                    add_some(add, &[name.as_str()], read(stats));
                }
            }
            Self::By(_, read) => read(model, add),
            _ => {
                for (name, policy) in &model.policies {
                    self.each_of_policy(name.as_str(), policy, running, add);
                }
            }
        }
    }

    fn each_of_policy(&self, name: &str, policy: &PolicyModel, running: &[RunningDownload], add: Add<'_>) {
        match self {
            Self::Policy(read) => add_some(add, &[name], read(policy)),
            Self::Results(read) => {
                for (result, count) in read(policy) {
                    add(&[name, result], number(*count));
                }
            }
            Self::Downloads(read) => {
                let own = running.iter().filter(|download| {
                    download.policy.as_ref().is_some_and(|policy| policy.as_str() == name)
                });
                add(&[name], number(own.map(read).sum()));
            }
            _ => {
                for (zone, known) in &policy.zones {
                    self.each_of_zone([name, zone.as_str()], known, add);
                }
            }
        }
    }

    fn each_of_zone(&self, [policy, zone]: [&str; 2], known: &ZoneModel, add: Add<'_>) {
        match self {
            Self::Zone(read) => add_some(add, &[policy, zone], read(known)),
            Self::Blocked(read) => {
                for (reason, count) in read(known) {
                    add(&[policy, zone, reason], number(count));
                }
            }
            _ => {
                for instance in &known.memory.instances {
                    let (id, name) = (instance.id.to_string(), named(&instance.name));
                    let labels = [policy, zone, &id, &name];
                    match self {
                        Self::Instance(read) => add_some(add, &labels, read(instance)),
                        Self::InstanceBy(_, read) => read(instance, &mut |more, value| {
                            add(&[&labels[..], more].concat(), value);
                        }),
                        _ => {}
                    }
                }
            }
        }
    }
}

const INSTANCE: [&str; 4] = ["policy", "zone", "instance_id", "instance_name"];

fn add_some(add: Add<'_>, labels: &[&str], value: Option<f64>) {
    if let Some(value) = value {
        add(labels, value);
    }
}

/// Everything as text.
pub(super) fn text(model: &Model, running: &[RunningDownload], histograms: &Histograms) -> String {
    let mut text = String::new();
    for metric in METRICS {
        metric.write(model, running, &mut text);
    }
    encode(histograms.run.collect(), &mut text);
    encode(histograms.export.collect(), &mut text);
    encode(histograms.request.collect(), &mut text);
    encode(ProcessCollector::for_self().collect(), &mut text);
    text
}

impl Metric {
    /// Written directly: as values for the encoder, each of many series would hold copies of all names of its labels.
    fn write(&self, model: &Model, running: &[RunningDownload], text: &mut String) {
        let kind = if self.is_counter { "counter" } else { "gauge" };
        let before = text.len();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# HELP {} {}\n# TYPE {} {kind}", self.name, self.help, self.name);
        let head = text.len();
        let names = self.read.labels();
        let mut order: Vec<usize> = (0..names.len()).collect();
        order.sort_by_key(|place| names.get(*place));
        self.read.each(model, running, &mut |values, value| {
            text.push_str(self.name);
            let mut separator = '{';
            for place in &order {
                let (Some(name), Some(of_label)) = (names.get(*place), values.get(*place)) else { continue };
                text.push(separator);
                text.push_str(name);
                text.push_str("=\"");
                push_escaped(text, of_label);
                text.push('"');
                separator = ',';
            }
            text.push_str(if separator == ',' { "} " } else { " " });
            let _ = writeln!(text, "{value}");
        });
        if text.len() == head {
            text.truncate(before);
        }
    }
}

/// A label's value, with the escapes of the text format.
fn push_escaped(text: &mut String, value: &str) {
    let mut rest = value;
    while let Some((plain, special)) = rest.find(['\\', '"', '\n']).and_then(|at| rest.split_at_checked(at)) {
        text.push_str(plain);
        let mut characters = special.chars();
        text.extend(characters.next().into_iter().flat_map(char::escape_default));
        rest = characters.as_str();
    }
    text.push_str(rest);
}

fn encode(mut families: Vec<MetricFamily>, text: &mut String) {
    // The encoder refuses a family without series.
    families.retain(|family| !family.get_metric().is_empty());
    TextEncoder::new().encode_utf8(&families, text).expect("valid families become text");
}

fn is_unmatched(zone: &ZoneModel) -> bool {
    let nothing = |plan: &PlanSums| *plan == PlanSums::default();
    let would_create = zone.creates && zone.memory.instances.iter().any(|instance| instance.is_listed);
    let is_elsewhere = zone.memory.elsewhere > 0;
    zone.in_force().plan.as_ref().is_some_and(nothing) && !would_create && !is_elsewhere
}

/// The result of the last run as a number.
fn result_number(zone: &ZoneModel) -> f64 {
    match zone.in_force().result.as_deref() {
        Some("partial") => 1.0,
        Some("failed") => 2.0,
        Some("held") => 3.0,
        _ => 0.0,
    }
}

/// How many snapshots stay although the policy would delete them, by the reason.
fn blocked(zone: &ZoneModel) -> [(&'static str, u64); 10] {
    let plan = zone.in_force().plan.clone().unwrap_or_default();
    let late = |reason| zone.blocked_late(reason);
    [
        ("hold", plan.blocked_by_hold),
        ("policy", plan.blocked_by_policy),
        ("paused", plan.blocked_by_paused),
        ("source", plan.blocked_by_source),
        ("export", plan.blocked_by_export + late("export")),
        ("archive", plan.blocked_by_archive + late("archive")),
        ("change", plan.pending),
        ("busy", late("busy")),
        ("guard", plan.blocked_by_guard),
        ("judge", plan.blocked_by_judge),
    ]
}

/// The sums of an archive that can't be read mean nothing.
fn readable(stats: &ArchiveStats) -> Option<&ArchiveStats> {
    Some(stats).filter(|stats| stats.error.is_none())
}

/// A name from outside as a label's value.
fn named(name: &str) -> String {
    excerpt(name, LABEL_CHARACTERS_MAX)
}

fn flag(yes: bool) -> f64 {
    if yes { 1.0 } else { 0.0 }
}

fn seconds(at: Timestamp) -> f64 {
    at.duration_since(Timestamp::UNIX_EPOCH).as_secs_f64()
}

#[expect(clippy::cast_precision_loss, reason = "a metric is a floating-point number, exact up to 2^53")]
fn number(count: u64) -> f64 {
    count as f64
}
