//! All metrics, in the text format of Prometheus.
//!
//! Gauges and counters are built from the model for each scrape, so that no series can outlive its subject;
//! only histograms are kept between scrapes, and are removed with their policy. Names from outside are cut and made printable
//! before they become the value of a label, and the encoder escapes what the format asks for.

use std::borrow::Cow;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{CounterVec, GaugeVec, HistogramOpts, HistogramVec, Opts, TextEncoder};

use crate::policy::PolicyName;
use crate::run::downloads::RunningDownload;
use crate::state::last_runs::PlanSums;
use crate::telemetry::model::{Counts, Model, PolicyModel, ZoneModel};
use crate::text::excerpt;

/// The most characters of a label's value that comes from outside.
const LABEL_CHARACTERS_MAX: usize = 255;

/// From a run that finds nothing to do to one that exports for hours.
const RUN_SECONDS: [f64; 10] = [1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 21600.0];

/// From a small image on a fast network to a large one on a slow network.
const EXPORT_SECONDS: [f64; 9] = [10.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0];

/// Up to the default of `request_timeout`.
const REQUEST_SECONDS: [f64; 9] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// The metrics that are kept between scrapes.
#[derive(Debug)]
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

    /// Adds the policy's series.
    pub(super) fn begin(&self, policy: &PolicyName) {
        for of_policy in [&self.run, &self.export] {
            of_policy.with_label_values(&[policy.as_str()]);
        }
    }

    /// Removes the policy's series.
    pub(super) fn forget(&self, policy: &PolicyName) {
        for of_policy in [&self.run, &self.export] {
            // An error means that there was none, which is fine.
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

/// Everything as text.
pub(super) fn text(model: &Model, running: &[RunningDownload], histograms: &Histograms) -> String {
    let mut scrape = Scrape::default();
    program(model, &mut scrape);
    policies(model, &mut scrape);
    zones(model, &mut scrape);
    instances(model, &mut scrape);
    steps(model, &mut scrape);
    downloads(model, running, &mut scrape);
    archives(model, &mut scrape);
    api(model, &mut scrape);
    scrape.tell(&histograms.run);
    scrape.tell(&histograms.export);
    scrape.tell(&histograms.request);
    scrape.tell(&ProcessCollector::for_self());
    scrape.text
}

/// The values of a series' labels, and its own.
type Series<'a> = (Vec<Cow<'a, str>>, f64);

/// One scrape as it grows. Each family becomes text at once, so that never all of them are in memory as values.
#[derive(Default)]
struct Scrape {
    text: String,
}

impl Scrape {
    fn tell(&mut self, collector: &dyn Collector) {
        let mut families = collector.collect();
        // What has no series has no text.
        families.retain(|family| !family.get_metric().is_empty());
        TextEncoder::new().encode_utf8(&families, &mut self.text).expect("valid families become text");
    }

    fn gauge<'a>(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
        series: impl IntoIterator<Item = Series<'a>>,
    ) {
        let gauge =
            GaugeVec::new(Opts::new(name, help), labels).expect("the names of our own gauges are valid");
        for (values, value) in series {
            gauge.with_label_values(&values).set(value);
        }
        self.tell(&gauge);
    }

    fn counter<'a>(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str],
        series: impl IntoIterator<Item = Series<'a>>,
    ) {
        let counter =
            CounterVec::new(Opts::new(name, help), labels).expect("the names of our own counters are valid");
        for (values, value) in series {
            counter.with_label_values(&values).inc_by(value);
        }
        self.tell(&counter);
    }
}

fn program(model: &Model, scrape: &mut Scrape) {
    scrape.gauge(
        "snapwarden_build_info",
        "Always 1; the labels say which program this is.",
        &["version", "revision"],
        [(vec![model.version.as_str().into(), model.revision.as_str().into()], 1.0)],
    );
    scrape.gauge(
        "snapwarden_config_last_reload_successful",
        "Whether the last attempt to read the configuration succeeded; if not, the previous one is in use.",
        &[],
        [(vec![], flag(model.reload_ok))],
    );
    scrape.gauge(
        "snapwarden_config_last_reload_success_timestamp_seconds",
        "When the configuration in use was read.",
        &[],
        model.loaded_at.map(|at| (vec![], seconds(at))),
    );
    scrape.gauge(
        "snapwarden_state_last_write_successful",
        "Whether the daemon's last attempt to write its state succeeded; if not, a restart may repeat runs.",
        &[],
        [(vec![], flag(model.state_error.is_none()))],
    );
    scrape.gauge(
        "snapwarden_scheduler_last_tick_timestamp_seconds",
        "When the scheduler's loop last ran.",
        &[],
        model.ticked_at.map(|at| (vec![], seconds(at))),
    );
    scrape.gauge(
        "snapwarden_clock_skew_seconds",
        "How far this machine's clock is ahead of the API's, by the last listing of the zone.",
        &["zone"],
        model.clock_skew.iter().map(|(zone, skew)| (vec![zone.as_str().into()], *skew)),
    );
    scrape.gauge(
        "snapwarden_quota_usage",
        "Used amount of a quota of the organization.",
        &["resource"],
        model.quotas.iter().map(|(resource, (usage, _))| (vec![named(resource)], number(*usage))),
    );
    scrape.gauge(
        "snapwarden_quota_limit",
        "Limit of a quota of the organization; absent if there is none.",
        &["resource"],
        model
            .quotas
            .iter()
            .filter_map(|(resource, (_, limit))| Some((vec![named(resource)], number((*limit)?)))),
    );
}

fn policies(model: &Model, scrape: &mut Scrape) {
    let each = |value: fn(&PolicyModel) -> Option<f64>| {
        model
            .policies
            .iter()
            .filter_map(move |(name, policy)| Some((vec![name.as_str().into()], value(policy)?)))
    };
    scrape.gauge(
        "snapwarden_policy_enabled",
        "Whether the policy is enabled.",
        &["policy"],
        each(|policy| Some(flag(policy.enabled))),
    );
    scrape.gauge(
        "snapwarden_policy_created_timestamp_seconds",
        "When the configuration first had the policy.",
        &["policy"],
        each(|policy| Some(seconds(policy.first_seen_at))),
    );
    scrape.gauge(
        "snapwarden_policy_next_run_timestamp_seconds",
        "When the policy is due next; absent if it is not scheduled.",
        &["policy"],
        each(|policy| policy.next_run_at.map(seconds)),
    );
    scrape.gauge(
        "snapwarden_policy_expected_interval_seconds",
        "The longest span between two due times of the policy's schedule; absent without a schedule.",
        &["policy"],
        each(|policy| policy.expected_interval.map(|span| span.as_secs_f64())),
    );
    scrape.counter(
        "snapwarden_policy_missed_runs_total",
        "Runs of the policy that were due while the program or the machine was not running.",
        &["policy"],
        each(|policy| Some(number(policy.missed_runs))),
    );
    results(
        model,
        scrape,
        "snapwarden_policy_runs_total",
        "Runs of the policy by result; skipped are those that were due during another run.",
        |policy| &policy.runs,
    );
}

/// A counter of every policy by result.
fn results(model: &Model, scrape: &mut Scrape, name: &str, help: &str, of: fn(&PolicyModel) -> &Counts) {
    let series = model.policies.iter().flat_map(|(name, policy)| {
        of(policy)
            .iter()
            .map(|(result, count)| (vec![name.as_str().into(), (*result).into()], number(*count)))
    });
    scrape.counter(name, help, &["policy", "result"], series);
}

fn zones(model: &Model, scrape: &mut Scrape) {
    let each = |value: fn(&ZoneModel) -> Option<f64>| {
        model.policies.iter().flat_map(move |(name, policy)| {
            policy.zones.iter().filter_map(move |(zone, known)| {
                Some((vec![name.as_str().into(), zone.as_str().into()], value(known)?))
            })
        })
    };
    let labels = &["policy", "zone"];
    scrape.gauge(
        "snapwarden_policy_last_run_timestamp_seconds",
        "When a run of the policy last ended in the zone; absent until the first.",
        labels,
        each(|zone| zone.memory.last_run_at.map(seconds)),
    );
    scrape.gauge(
        "snapwarden_policy_last_success_timestamp_seconds",
        "When the last run ended in which nothing failed and nothing was blocked by the guard in the zone; absent until the first.",
        labels,
        each(|zone| zone.memory.last_success_at.map(seconds)),
    );
    scrape.gauge(
        "snapwarden_policy_held",
        "Whether the guard blocked the last run's deletions in the zone.",
        labels,
        each(|zone| Some(flag(zone.memory.held.is_some()))),
    );
    scrape.gauge(
        "snapwarden_policy_unmatched",
        "Whether the policy selected nothing in the zone when it was last listed.",
        labels,
        each(|zone| Some(flag(is_unmatched(zone)))),
    );
    scrape.gauge(
        "snapwarden_export_gate_oldest_timestamp_seconds",
        "Since when snapshots in the zone are kept only because a verified copy is missing, without a break; absent if none are.",
        labels,
        each(|zone| zone.memory.gate_since.map(seconds)),
    );
    scrape.gauge(
        "snapwarden_planned_deletes",
        "Snapshots that the policy's last plan in the zone deletes.",
        labels,
        each(|zone| Some(number(zone.memory.plan.as_ref().map_or(0, |plan| plan.delete)))),
    );
    let blocked = model.policies.iter().flat_map(|(name, policy)| {
        policy.zones.iter().flat_map(move |(zone, known)| {
            blocked(known)
                .map(|(reason, count)| {
                    (vec![name.as_str().into(), zone.as_str().into(), reason.into()], number(count))
                })
                .into_iter()
        })
    });
    scrape.gauge(
        "snapwarden_blocked_deletes",
        "Snapshots that the policy's last run in the zone would have deleted, by what kept them.",
        &["policy", "zone", "reason"],
        blocked,
    );
}

fn is_unmatched(zone: &ZoneModel) -> bool {
    let nothing = |plan: &PlanSums| *plan == PlanSums::default();
    zone.memory.plan.as_ref().is_some_and(nothing) && zone.memory.instances.is_empty()
}

/// How many snapshots are kept although the policy would delete them, by reason.
fn blocked(zone: &ZoneModel) -> [(&'static str, u64); 5] {
    let plan = zone.memory.plan.clone().unwrap_or_default();
    let guarded = if zone.memory.held.is_some() { plan.delete } else { 0 };
    [
        ("hold", plan.blocked_by_hold),
        ("policy", plan.blocked_by_policy),
        ("export", plan.blocked_by_export),
        ("busy", zone.busy),
        ("guard", guarded),
    ]
}

fn instances(model: &Model, scrape: &mut Scrape) {
    let mut snapshots = Vec::new();
    let mut newest = Vec::new();
    let mut oldest = Vec::new();
    let mut verified = Vec::new();
    for (name, policy) in &model.policies {
        for (zone, known) in &policy.zones {
            for tally in &known.memory.instances {
                let labels: Vec<Cow<'_, str>> = vec![
                    name.as_str().into(),
                    zone.as_str().into(),
                    tally.id.to_string().into(),
                    named(&tally.name),
                ];
                let with = |more: &'static str| [&labels[..], &[more.into()]].concat();
                let by_state = [
                    ("good", tally.good),
                    ("failed", tally.failed),
                    ("in_flight", tally.in_flight),
                    ("other", tally.other),
                ];
                snapshots.extend(by_state.map(|(state, count)| (with(state), number(count))));
                newest.extend(tally.newest_at.map(|at| (labels.clone(), seconds(at))));
                oldest.extend(tally.oldest_at.map(|at| (labels.clone(), seconds(at))));
                for (archive, at) in &tally.newest_verified_at {
                    verified.push(([&labels[..], &[archive.as_str().into()]].concat(), seconds(*at)));
                }
            }
        }
    }
    let labels = ["policy", "zone", "instance_id", "instance_name"];
    let with = |more| [&labels[..], &[more]].concat();
    scrape.gauge(
        "snapwarden_snapshots",
        "Snapshots of the instance that the policy selects, by state.",
        &with("state"),
        snapshots,
    );
    scrape.gauge(
        "snapwarden_snapshot_newest_timestamp_seconds",
        "When the newest good snapshot of the instance was taken; absent if there is none.",
        &labels,
        newest,
    );
    scrape.gauge(
        "snapwarden_snapshot_oldest_timestamp_seconds",
        "When the oldest good snapshot of the instance was taken; absent if there is none.",
        &labels,
        oldest,
    );
    scrape.gauge(
        "snapwarden_export_newest_verified_timestamp_seconds",
        "When the newest snapshot of the instance was taken of which the archive has a verified copy.",
        &with("archive"),
        verified,
    );
}

fn steps(model: &Model, scrape: &mut Scrape) {
    results(
        model,
        scrape,
        "snapwarden_snapshot_creates_total",
        "Snapshots to be created, by result.",
        |policy| &policy.steps.creates,
    );
    results(model, scrape, "snapwarden_exports_total", "Exports into an archive, by result.", |policy| {
        &policy.steps.exports
    });
    results(model, scrape, "snapwarden_promotes_total", "Promotions to a template, by result.", |policy| {
        &policy.steps.promotes
    });
    results(
        model,
        scrape,
        "snapwarden_snapshot_deletes_total",
        "Snapshots to be deleted, by result; blocked are those that the platform was busy with.",
        |policy| &policy.steps.deletes,
    );
    let each = |value: fn(&PolicyModel) -> u64| {
        model.policies.iter().map(move |(name, policy)| (vec![name.as_str().into()], number(value(policy))))
    };
    scrape.counter(
        "snapwarden_export_bytes_total",
        "Bytes of images that were downloaded, including those that were downloaded again.",
        &["policy"],
        each(|policy| policy.export_bytes),
    );
    scrape.counter(
        "snapwarden_export_resumes_total",
        "How often a download continued on a new connection.",
        &["policy"],
        each(|policy| policy.export_resumes),
    );
    scrape.counter(
        "snapwarden_export_checksum_mismatches_total",
        "How often the MD5 of an image differed from the API's.",
        &["policy"],
        each(|policy| policy.export_checksum_mismatches),
    );
}

fn downloads(model: &Model, running: &[RunningDownload], scrape: &mut Scrape) {
    let each = |value: fn(&RunningDownload) -> u64| {
        model.policies.keys().map(move |name| {
            let of_policy = running.iter().filter(|download| download.policy == *name);
            (vec![name.as_str().into()], number(of_policy.map(value).sum()))
        })
    };
    scrape.gauge(
        "snapwarden_exports_in_progress",
        "Images of the policy that are being downloaded or verified now.",
        &["policy"],
        each(|_| 1),
    );
    scrape.gauge(
        "snapwarden_export_progress_bytes",
        "Bytes downloaded so far of the images that are being downloaded now.",
        &["policy"],
        each(|download| download.how_far.bytes),
    );
}

fn archives(model: &Model, scrape: &mut Scrape) {
    // Nothing is known about one that can't be read.
    let readable = || model.archives.iter().filter(|(_, facts)| facts.error.is_none());
    scrape.gauge(
        "snapwarden_archive_readable",
        "Whether the archive can be read; if not, its other series are absent.",
        &["archive"],
        model.archives.iter().map(|(name, facts)| (vec![name.as_str().into()], flag(facts.error.is_none()))),
    );
    scrape.gauge(
        "snapwarden_archive_images",
        "Verified copies in the archive whose image exists.",
        &["archive"],
        readable().map(|(name, facts)| (vec![name.as_str().into()], number(facts.images))),
    );
    scrape.gauge(
        "snapwarden_archive_bytes",
        "The length of all images in the archive.",
        &["archive"],
        readable().map(|(name, facts)| (vec![name.as_str().into()], number(facts.bytes))),
    );
    scrape.gauge(
        "snapwarden_archive_free_bytes",
        "Free bytes on the archive's file system.",
        &["archive"],
        model
            .archives
            .iter()
            .filter_map(|(name, facts)| Some((vec![name.as_str().into()], number(facts.free_bytes?)))),
    );
    scrape.gauge(
        "snapwarden_archive_last_verify_timestamp_seconds",
        "The oldest time of last verification among the archive's copies; absent without a copy.",
        &["archive"],
        readable()
            .filter_map(|(name, facts)| Some((vec![name.as_str().into()], seconds(facts.verified_at?)))),
    );
    scrape.gauge(
        "snapwarden_archive_corrupt_images",
        "Copies in the archive that are missing or damaged.",
        &["archive"],
        readable().map(|(name, facts)| (vec![name.as_str().into()], number(facts.corrupt))),
    );
}

fn api(model: &Model, scrape: &mut Scrape) {
    let requests = model.api_requests.iter().map(|((zone, operation, status), count)| {
        let code = status.as_ref().map_or("none", |status| status.as_str());
        (vec![zone.as_str().into(), (*operation).into(), code.into()], number(*count))
    });
    scrape.counter(
        "snapwarden_api_requests_total",
        "Requests to the API by the status of the answer; `none` if there was no answer.",
        &["zone", "operation", "code"],
        requests,
    );
    let retries = model
        .api_retries
        .iter()
        .map(|((operation, reason), count)| (vec![(*operation).into(), (*reason).into()], number(*count)));
    scrape.counter(
        "snapwarden_api_retries_total",
        "Requests to the API that were repeated, by the reason.",
        &["operation", "reason"],
        retries,
    );
}

/// A name from outside as a label's value.
fn named(name: &str) -> Cow<'_, str> {
    excerpt(name, LABEL_CHARACTERS_MAX).into()
}

fn flag(yes: bool) -> f64 {
    if yes { 1.0 } else { 0.0 }
}

fn seconds(at: Timestamp) -> f64 {
    at.duration_since(Timestamp::UNIX_EPOCH).as_secs_f64()
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a metric is a floating-point number; counts beyond 2^53 don't occur"
)]
fn number(count: u64) -> f64 {
    count as f64
}
