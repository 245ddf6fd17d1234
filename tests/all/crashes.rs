//! Nothing is lost: whole runs over a disk that forgets what was not synced, with crashes at every moment and
//! faults of every kind, in virtual time.
//!
//! What must hold after each crash, whatever went before it, stands in [`Play::check`]. It is judged by the
//! world's own truth and by an oracle of the retention rules that is written here anew.
//!
//! Here the configuration stays, and no volume is lost: that is played by `wide_crashes`.
//!
//! `SNAPWARDEN_SEEDS=1000` plays more of the random campaign, `SNAPWARDEN_SEED=7` plays one of it again.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, header};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use snapwarden::archive::md5::{Md5, Md5Sum};
use snapwarden::cli::assemble::{self, Seams, Use};
use snapwarden::cli::exit::Refusal;
use snapwarden::clock::{self, Clock as _};
use snapwarden::config;
use snapwarden::config::sections::Config;
use snapwarden::credentials::Credentials;
use snapwarden::disk::{Access, Disk as _, Kind, read_file};
use snapwarden::policy::name::PolicyName;
use snapwarden::randomness::Randomness as _;
use snapwarden::run::context::{RunOptions, Runner};
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::sim::call::Call;
use snapwarden::sim::clock::SimClock;
use snapwarden::sim::disk::{DiskCall, MemoryDisk};
use snapwarden::sim::fault::{Effect, Ending, Fault, When};
use snapwarden::sim::image::{DiskShape, Image};
use snapwarden::sim::processes::SimProcesses;
use snapwarden::sim::randomness::SeededRandomness;
use snapwarden::sim::world::{API_KEY, API_SECRET, World};
use snapwarden::snapshot::{InstanceId, Snapshot, SnapshotId, SnapshotState, TemplateId, ZoneName};
use snapwarden::state::audit::{Action, AuditMark, INTENDED, Line, StepFacts, StepOutcome, Subject};
use snapwarden::state::directory::StateDirectory;
use snapwarden::state::error::StateError;
use uuid::Uuid;

use crate::stage::{NOW, audit_log, config_text};

/// Where state and archive are; it is there and safe from the start, what is below it is not.
const FOLDER: &str = "/srv";

const KEEP_LAST: usize = 3;
const MAX_AGE: SignedDuration = SignedDuration::from_hours(20 * 24);
const MIN_KEEP: usize = 1;
const FUTURE_TOLERANCE: SignedDuration = SignedDuration::from_mins(5);

/// A few clusters of 4 KiB.
pub(crate) const TINY: DiskShape = DiskShape { size_gib: 1, data_clusters: 2, cluster_bits: 12 };

/// Longer than an operation takes that ends at all.
pub(crate) const OPERATIONS_END: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exports {
    Newest,
    All,
}

impl Exports {
    fn config(self) -> Arc<Config> {
        let snapshots = match self {
            Self::Newest => "newest",
            Self::All => "all",
        };
        // One thing at a time, so that a play repeats.
        let policy = format!(
            r#"
[exoscale]
concurrency = 1
[policies.nightly]
zones = ["ch-gva-2"]
[policies.nightly.retention]
keep_last = {KEEP_LAST}
max_age = "20d"
[policies.nightly.guard]
max_delete_percent = 100
[policies.nightly.export]
archives = ["vault"]
snapshots = "{snapshots}"
concurrency = 1
[policies.nightly.promote]
name = "{{instance}}-{{created:%Y%m%d}}"
keep = 1
"#
        );
        let config = config::parse(&config_text(Path::new(FOLDER), &policy), "test.toml", None);
        Arc::new(config.unwrap_or_else(|found| panic!("{found}")))
    }
}

/// A zone, the machine beside it, and what has truly been there.
struct Play {
    world: World,
    clock: SimClock,
    zone: ZoneName,
    disk: MemoryDisk,
    exports: Exports,
    config: Arc<Config>,
    is_quiet: bool,
    /// As it was after the last night.
    audit_log: String,
    /// Every snapshot that ever was: its image and its instance.
    taken: BTreeMap<SnapshotId, (Arc<Image>, InstanceId)>,
    /// Every template that a snapshot ever became.
    templates: BTreeMap<String, BTreeSet<TemplateId>>,
}

/// One run, and the world before it.
struct Night {
    before: Vec<Snapshot>,
    started: Timestamp,
    ended: Timestamp,
    /// None if the run could not begin, or was killed on the way.
    report: Option<RunReport>,
    /// No call was struck.
    is_quiet: bool,
    audit_log_before: String,
}

impl Night {
    fn said(&self) -> String {
        let Some(report) = &self.report else { return "no report".to_owned() };
        let zones = report.zones.iter();
        let mut all: Vec<String> = zones.clone().flat_map(|zone| zone.failures.clone()).collect();
        all.extend(zones.flat_map(|zone| &zone.steps).map(|step| {
            let message = step.message.as_deref().unwrap_or_default();
            format!("{:?} {:?} {:?} {message}", step.facts.action, step.facts.snapshot.id, step.outcome)
        }));
        format!("{:?}\n{}", report.result, all.join("\n"))
    }

    fn result(&self) -> Option<RunResult> {
        self.report.as_ref().map(|report| report.result)
    }
}

impl Play {
    fn new(exports: Exports, seed: u64) -> Self {
        let clock = SimClock::starting_at(NOW.parse().unwrap());
        let world = World::new(Arc::new(clock.clone()), seed);
        let zone = world.add_zone("ch-gva-2");
        let disk = MemoryDisk::new();
        disk.create_dir_all(Path::new(FOLDER), Access::Owner).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        Self {
            world,
            clock,
            zone,
            disk,
            exports,
            config: exports.config(),
            is_quiet: true,
            audit_log: String::new(),
            taken: BTreeMap::new(),
            templates: BTreeMap::new(),
        }
    }

    fn instance(&self, name: &str) -> InstanceId {
        let instance = self.world.add_instance(&self.zone, name, &[]);
        self.world.set_disk(instance, TINY);
        instance
    }

    fn snapshot(&mut self, instance: InstanceId, hours_ago: i64) -> SnapshotId {
        let taken = self.clock.now() - SignedDuration::from_hours(hours_ago);
        let id = self.world.add_snapshot(instance, taken);
        self.taken.insert(id, (self.world.image(id), instance));
        id
    }

    fn assemble(&self, purpose: Use) -> Result<Runner, Refusal> {
        let seams = Seams {
            transport: self.world.transport(),
            disk: Arc::new(self.disk.clone()),
            clock: Arc::new(self.clock.clone()),
            randomness: Arc::new(SeededRandomness::new(11)),
            processes: Arc::new(SimProcesses::new(Arc::new(self.clock.clone()))),
            host: "backup-1".into(),
        };
        let credentials = Credentials::new(API_KEY, API_SECRET, None).unwrap();
        assemble::runner(&self.config, credentials, &seams, purpose)
    }

    /// A run in a process of its own, which is killed after `limit`; the platform then ends what it began.
    async fn night_of_at_most(&mut self, limit: Duration) -> Night {
        let audit_log_before = std::mem::take(&mut self.audit_log);
        self.world.clear_log();
        let before = self.world.snapshots(&self.zone);
        let started = self.clock.now();
        let is_quiet = self.is_quiet;
        let report = match self.assemble(Use::Changing) {
            Ok(runner) => {
                let options = RunOptions::default();
                let run = runner.run(&runner.policies[0], &options);
                clock::timeout(&self.clock, limit, run).await.ok().and_then(Result::ok)
            }
            Err(_) => None,
        };
        self.clock.sleep(OPERATIONS_END).await;
        let ended = self.clock.now();
        for template in self.world.templates(&self.zone) {
            self.templates.entry(template.description).or_default().insert(template.id);
        }
        Night { before, started, ended, report, is_quiet, audit_log_before }
    }

    async fn night(&mut self) -> Night {
        self.night_of_at_most(Duration::MAX).await
    }

    /// Those of the world's snapshots that the rules count.
    fn judged(snapshots: &[Snapshot], at: Timestamp) -> BTreeMap<InstanceId, Vec<&Snapshot>> {
        let mut judged: BTreeMap<InstanceId, Vec<&Snapshot>> = BTreeMap::new();
        for snapshot in snapshots {
            let counts = snapshot.state.is_good() && snapshot.created_at <= at + FUTURE_TOLERANCE;
            if let Some(instance) = snapshot.instance_id.filter(|_| counts) {
                judged.entry(instance).or_default().push(snapshot);
            }
        }
        for of_instance in judged.values_mut() {
            of_instance.sort_by_key(|snapshot| std::cmp::Reverse((snapshot.created_at, snapshot.id)));
        }
        judged
    }

    /// The snapshots that the rules alone delete, without regard to copies.
    fn to_delete(snapshots: &[Snapshot], at: Timestamp) -> BTreeSet<SnapshotId> {
        let judged = Self::judged(snapshots, at);
        let places = judged.values().flat_map(|of_instance| of_instance.iter().enumerate());
        places
            .filter(|(place, snapshot)| {
                let is_too_old = at.duration_since(snapshot.created_at) > MAX_AGE;
                *place >= MIN_KEEP && (*place >= KEEP_LAST || is_too_old)
            })
            .map(|(_, snapshot)| snapshot.id)
            .collect()
    }

    /// The snapshots that exist and are not being deleted.
    fn there(&self) -> BTreeSet<SnapshotId> {
        let all = self.world.snapshots(&self.zone).into_iter();
        all.filter(|snapshot| snapshot.state != SnapshotState::Deleting).map(|snapshot| snapshot.id).collect()
    }

    /// What must hold on the disk that survived, and in the world.
    async fn check(&mut self, night: &Night, context: &str) {
        let context = &format!("{context}\n{}", night.said());
        let there = self.there();
        let deleted: Vec<&Snapshot> =
            night.before.iter().filter(|snapshot| !there.contains(&snapshot.id)).collect();
        let copies = self.check_archive(context).await;
        let lines = self.check_state(night, context).await;

        // A deleted snapshot was to be deleted by the rules, and its instance has the copy that they require.
        let allowed = Self::to_delete(&night.before, night.ended);
        for snapshot in &deleted {
            // One that was being deleted already was checked in an earlier night.
            if snapshot.state == SnapshotState::Deleting {
                continue;
            }
            assert!(allowed.contains(&snapshot.id), "{context}\ndeleted against the rules: {snapshot:?}");
            let key = (snapshot.created_at, snapshot.id);
            let is_covered = match self.exports {
                Exports::All => copies.iter().any(|(_, copy)| *copy == key),
                Exports::Newest => copies
                    .iter()
                    .any(|(instance, copy)| Some(*instance) == snapshot.instance_id && *copy >= key),
            };
            assert!(is_covered, "{context}\ndeleted without a verified copy: {snapshot:?}");
        }

        // Each request for a change had been written down before, and is in the report.
        for exchange in self.world.changes() {
            let (action, key) = match exchange.call {
                Call::DeleteSnapshot => (Action::Delete, "/snapshot/id"),
                Call::ExportSnapshot => (Action::Export, "/snapshot/id"),
                Call::PromoteSnapshot => (Action::Promote, "/snapshot/id"),
                Call::DeleteTemplate => (Action::DeleteTemplate, "/template_id"),
                _ => panic!("{context}\na run asks for {:?}", exchange.call),
            };
            let id = exchange.path.rsplit('/').next().unwrap().split(':').next().unwrap();
            let is_written = lines.iter().any(|line| {
                line["outcome"] == "intended"
                    && line["action"] == json!(action)
                    && line.pointer(key).and_then(Value::as_str) == Some(id)
            });
            assert!(is_written, "{context}\nrequested, but not written down: {exchange:?}");
            if let Some(report) = &night.report {
                let mut steps = report.zones.iter().flat_map(|zone| &zone.steps);
                let is_reported = steps.any(|step| {
                    let template_id = step.facts.template_id.map(|template_id| template_id.to_string());
                    step.facts.action == action
                        && (step.facts.snapshot.id.is_some_and(|of| of.to_string() == id)
                            || template_id.as_deref() == Some(id))
                });
                assert!(is_reported, "{context}\nrequested, but not reported: {exchange:?}");
            }
        }

        // A template a snapshot.
        for (description, made) in &self.templates {
            assert!(made.len() <= 1, "{context}\ntwo templates: {description}");
        }
        if let Some(report) = &night.report {
            self.check_report(report, night, &there, &copies, context);
        }
    }

    /// What the report says must be so, on the disk that survived as well.
    fn check_report(
        &self,
        report: &RunReport,
        night: &Night,
        there: &BTreeSet<SnapshotId>,
        copies: &BTreeSet<(InstanceId, (Timestamp, SnapshotId))>,
        context: &str,
    ) {
        let sums = report.sums();
        let mut blocked = 0;
        let steps = || report.zones.iter().flat_map(|zone| &zone.steps);
        for step in steps() {
            let id = step.facts.snapshot.id.unwrap();
            match (step.facts.action, step.outcome) {
                (_, StepOutcome::Blocked | StepOutcome::Skipped) => blocked += 1,
                (Action::Delete, StepOutcome::Done) => {
                    assert!(!there.contains(&id), "{context}\nsaid to be deleted: {id}");
                }
                (Action::Export, StepOutcome::Done) => {
                    assert!(
                        copies.iter().any(|(_, copy)| copy.1 == id),
                        "{context}\nsaid to be exported: {id}"
                    );
                }
                (Action::Promote, StepOutcome::Done) => {
                    let made = self.templates.contains_key(&format!("Promoted snapshot - {id}"));
                    // One that is older than another of its instance is deleted again at once.
                    let is_deleted = steps().any(|other| {
                        other.facts.action == Action::DeleteTemplate && other.facts.snapshot.id == Some(id)
                    });
                    assert!(made || is_deleted, "{context}\nsaid to be promoted: {id}");
                }
                _ => {}
            }
        }
        let failures: usize = report.zones.iter().map(|zone| zone.failures.len()).sum();
        let added = sums.exported
            + sums.promoted
            + sums.deleted
            + sums.templates_deleted
            + sums.blocked
            + sums.skipped
            + sums.failed;
        assert_eq!(added, steps().count() + failures, "{context}");
        let went_well = sums.failed == 0;
        assert_eq!(
            went_well,
            matches!(report.result, RunResult::Success | RunResult::Held),
            "{context}\n{sums:?}"
        );

        if report.result != RunResult::Success || blocked > 0 || !night.is_quiet {
            return;
        }
        // No silence: a success has done all that was to do.
        for zone in &report.zones {
            let plan = zone.plan.as_ref().unwrap_or_else(|| panic!("{context}\nno plan"));
            let judged = plan.keep + plan.delete + plan.ignore;
            assert_eq!(judged, night.before.len() as u64, "{context}\n{plan:?}");
        }
        let due = Self::to_delete(&night.before, night.started);
        let left: Vec<_> = due.intersection(there).collect();
        assert!(left.is_empty(), "{context}\na success that left {left:?}");
        for (instance, of_instance) in Self::judged(&night.before, night.started) {
            let newest = of_instance[0];
            assert!(
                copies.contains(&(instance, (newest.created_at, newest.id))),
                "{context}\na success without a copy of {newest:?}"
            );
        }
    }

    /// Every copy that the archive lists is what it says; the copies.
    async fn check_archive(&self, context: &str) -> BTreeSet<(InstanceId, (Timestamp, SnapshotId))> {
        let runner =
            self.assemble(Use::Reading).unwrap_or_else(|refusal| panic!("{context}\n{}", refusal.text));
        let archive = runner.archives.values().next().unwrap();
        let catalogue = archive.catalogue().await.unwrap_or_else(|error| panic!("{context}\n{error}"));
        let mut copies = BTreeSet::new();
        for copy in catalogue.copies() {
            let manifest = &copy.manifest;
            let bytes = read_file(&self.disk, &copy.image(), 1 << 30)
                .unwrap_or_else(|error| panic!("{context}\n{}: {error}", copy.image().display()));
            let truth: Md5Sum = self.taken[&manifest.snapshot.id].0.md5().parse().unwrap();
            assert_eq!(md5_of(&bytes), truth, "{context}\nwrong bytes: {}", copy.image().display());
            assert_eq!(manifest.image.md5, truth, "{context}\n{}", copy.image().display());
            let sums = read_file(&self.disk, &beside(&copy.image(), ".md5"), 4096).unwrap_or_default();
            assert!(
                sums.starts_with(truth.to_string().as_bytes()),
                "{context}\nno .md5: {}",
                copy.image().display()
            );
            copies.insert((manifest.instance.id, (manifest.snapshot.created_at, manifest.snapshot.id)));
        }
        copies
    }

    /// The audit log as it is; nothing if there is none.
    fn read_audit_log(&self) -> io::Result<String> {
        match audit_log(&self.disk, &Path::new(FOLDER).join("state")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            read => read,
        }
    }

    /// All that is remembered can be read; the lines that the night added to the audit log.
    async fn check_state(&mut self, night: &Night, context: &str) -> Vec<Value> {
        let state = StateDirectory::at(Arc::new(self.disk.clone()), &Path::new(FOLDER).join("state"));
        let nightly: PolicyName = "nightly".parse().unwrap();
        state.policy_state(&nightly).await.unwrap_or_else(|error| panic!("{context}\n{error}"));
        let runs = state.last_runs(&nightly).await.unwrap_or_else(|error| panic!("{context}\n{error}"));
        if let Some(report) = night.report.as_ref().filter(|report| report.result == RunResult::Success) {
            let last_success = runs.zones.get(&self.zone).and_then(|zone| zone.last_success_at);
            assert_eq!(last_success, Some(report.finished_at), "{context}\na success that is not remembered");
        }
        let log = self.read_audit_log().unwrap_or_else(|error| panic!("{context}\n{error}"));
        assert!(log.starts_with(&night.audit_log_before), "{context}\nolder lines are missing");
        let mut lines = Vec::new();
        for line in log[night.audit_log_before.len()..].lines() {
            match serde_json::from_str(line) {
                Ok(line) => lines.push(line),
                // A full disk cuts a line short; the next one must not be on it.
                Err(error) => assert!(
                    error.is_eof() && line.matches("\"outcome\"").count() <= 1,
                    "{context}\nmixed lines: {line}"
                ),
            }
        }
        self.audit_log = log;
        lines
    }

    /// After the last night nothing is left to do, and nothing too much was done.
    fn check_end(&self, last: &Night, context: &str) {
        let snapshots = self.world.snapshots(&self.zone);
        let steps = last.report.iter().flat_map(|report| &report.zones).flat_map(|zone| &zone.steps);
        // An operation that hangs for ever keeps its snapshot busy for ever.
        let busy: BTreeSet<SnapshotId> = steps
            .filter(|step| step.facts.action == Action::Delete && step.outcome == StepOutcome::Blocked)
            .filter_map(|step| step.facts.snapshot.id)
            .collect();
        let left = &Self::to_delete(&snapshots, self.clock.now()) - &busy;
        assert!(left.is_empty(), "{context}\nshould be deleted: {left:?}");
        let of_snapshot: BTreeMap<String, SnapshotId> =
            self.taken.keys().map(|id| (format!("Promoted snapshot - {id}"), *id)).collect();
        let mut templates: BTreeMap<InstanceId, Vec<SnapshotId>> = BTreeMap::new();
        for template in self.world.templates(&self.zone) {
            let snapshot = of_snapshot[&template.description];
            templates.entry(self.taken[&snapshot].1).or_default().push(snapshot);
        }
        for (instance, of_instance) in Self::judged(&snapshots, self.clock.now()) {
            assert_eq!(templates.get(&instance), Some(&vec![of_instance[0].id]), "{context}\n{instance}");
        }
    }
}

fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}

pub(crate) fn md5_of(bytes: &[u8]) -> Md5Sum {
    let mut md5 = Md5::new();
    md5.update(bytes);
    md5.finish()
}

/// What becomes of the machine.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Death {
    /// Power is lost.
    Crash,
    /// The process is killed.
    Kill,
    /// Power is lost, and some of what was not synced is there.
    Chance(u64),
}

impl Death {
    pub(crate) fn of(self, disk: &MemoryDisk) -> MemoryDisk {
        match self {
            Self::Crash => disk.crash(),
            Self::Kill => disk.kill(),
            Self::Chance(seed) => disk.crash_by_chance(&SeededRandomness::new(seed)),
        }
    }
}

/// Two instances with eight snapshots each; those of the second are too old but for one.
fn two_by_eight(exports: Exports) -> (Play, [InstanceId; 2]) {
    let mut play = Play::new(exports, 7);
    let instances = ["web-1", "db-1"].map(|name| play.instance(name));
    for (instance, days) in
        instances.into_iter().zip([[7, 6, 5, 4, 3, 2, 1, 0], [40, 35, 30, 28, 26, 24, 22, 0]])
    {
        for day in days {
            play.snapshot(instance, day * 24);
        }
    }
    (play, instances)
}

/// The machine stops at each fifth change of the disk, unless all moments are asked for.
const MOMENTS_APART: usize = 5;

/// Stops the machine after this many changes of the disk, in the first night or the second, and continues. True if
/// the night was over by then.
async fn stopped(exports: Exports, nights_before: usize, death: Death, changes: u64) -> bool {
    let context = &format!("{exports:?}, {death:?} after {changes} changes in night {nights_before}");
    let (mut play, instances) = two_by_eight(exports);
    for _ in 0..nights_before {
        let night = play.night().await;
        assert_eq!(night.result(), Some(RunResult::Success), "{context}\n{}", night.said());
        play.disk = play.disk.crash();
        play.check(&night, context).await;
        play.check_end(&night, context);
        play.clock.step(SignedDuration::from_hours(24));
        for instance in instances {
            play.snapshot(instance, 0);
        }
    }

    play.disk.stop_after(changes);
    let mut night = play.night().await;
    let is_over = play.disk.metadata(Path::new("/")).is_ok();
    play.disk = death.of(&play.disk);
    play.check(&night, context).await;

    // What came of a promotion may not be known before two hours have passed.
    for wait in [SignedDuration::from_mins(5), SignedDuration::from_hours(3)] {
        play.clock.step(wait);
        night = play.night().await;
        assert_eq!(night.result(), Some(RunResult::Success), "{context}\n{}", night.said());
        play.disk = play.disk.crash();
        play.check(&night, &format!("{context}, {wait:#} later")).await;
        if night.report.as_ref().is_some_and(|report| report.sums().skipped == 0) {
            break;
        }
    }
    play.check_end(&night, context);
    is_over
}

async fn stopped_at_any_moment(exports: Exports, nights_before: usize) {
    let all = std::env::var("SNAPWARDEN_MOMENTS").is_ok_and(|moments| moments == "all");
    let mut is_over = false;
    for (turn, changes) in (0..).step_by(if all { 1 } else { MOMENTS_APART }).enumerate() {
        let deaths = [Death::Crash, Death::Kill, Death::Chance(changes)];
        for death in deaths.into_iter().skip(if all { 0 } else { turn % 3 }).take(if all { 3 } else { 1 }) {
            is_over |= stopped(exports, nights_before, death, changes).await;
        }
        if is_over {
            assert!(changes > 50, "a night changes more than that");
            return;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn point_33_a_first_night_may_stop_at_any_moment() {
    stopped_at_any_moment(Exports::Newest, 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_first_night_that_exports_all_may_stop_at_any_moment() {
    stopped_at_any_moment(Exports::All, 0).await;
}

#[tokio::test(start_paused = true)]
async fn a_later_night_may_stop_at_any_moment() {
    stopped_at_any_moment(Exports::Newest, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_later_night_that_exports_all_may_stop_at_any_moment() {
    stopped_at_any_moment(Exports::All, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_state_file_that_cannot_be_written_hides_nothing_that_was_done() {
    // Files are put in their places by renaming: one after the other fails.
    for nth in 1.. {
        let (mut play, instances) = two_by_eight(Exports::Newest);
        // Until the first templates went with their snapshots, and are forgotten next.
        for _ in 0..5 {
            let night = play.night().await;
            assert_eq!(night.result(), Some(RunResult::Success), "{}", night.said());
            play.clock.step(SignedDuration::from_hours(24));
            for instance in instances {
                play.snapshot(instance, 0);
            }
        }
        play.audit_log = play.read_audit_log().unwrap();
        play.disk.fail(DiskCall::Rename, nth, io::ErrorKind::PermissionDenied);
        let night = play.night().await;
        play.check(&night, &format!("rename {nth} fails")).await;
        if night.result() == Some(RunResult::Success) {
            assert!(nth > 8, "a night renames more than that");
            return;
        }
    }
}

fn a_line(text: &str) -> Line {
    let zone = "ch-gva-2".parse().unwrap();
    let snapshot = Subject {
        id: Some(SnapshotId(Uuid::nil())),
        name: text.to_owned(),
        created_at: NOW.parse().unwrap(),
        instance_id: None,
        instance_name: None,
    };
    Line {
        at: NOW.parse().unwrap(),
        outcome: INTENDED,
        policy: None,
        run_id: Uuid::nil(),
        step: StepFacts::new(Action::Delete, &zone, snapshot, Vec::new()),
        zone,
        operation_id: None,
        message: None,
        by: None,
    }
}

async fn audit(state: &StateDirectory, text: &str) -> Result<(), StateError> {
    state.audit(&SimClock::starting_at(NOW.parse().unwrap()), a_line(text)).await
}

/// A disk in memory with the state directory on it, and its audit log's path.
fn a_state() -> (MemoryDisk, StateDirectory, PathBuf) {
    let disk = MemoryDisk::new();
    let state = StateDirectory::open(Arc::new(disk.clone()), Path::new("/state")).unwrap();
    (disk, state, PathBuf::from("/state/audit.jsonl"))
}

#[tokio::test]
async fn once_an_audit_line_could_not_be_made_safe_this_process_writes_no_more() {
    // The first line also makes the file's name safe.
    for (call, lines_before) in [(DiskCall::Sync, 0), (DiskCall::Sync, 2), (DiskCall::SyncDir, 0)] {
        let (disk, state, log) = a_state();
        for _ in 0..lines_before {
            audit(&state, "before").await.unwrap();
        }
        disk.fail(call, 1, io::ErrorKind::Other);
        assert!(matches!(audit(&state, "lost").await, Err(StateError::File { .. })), "{call:?}");
        let error = audit(&state.clone(), "later").await.unwrap_err();
        assert!(matches!(error, StateError::Unsafe { .. }), "{call:?}: {error}");
        // Nor does anything that is saved rest on a line that is read, and that a crash takes away.
        let zone: ZoneName = "ch-gva-2".parse().unwrap();
        let errors = [
            state.taken_and_deleted_since(&zone, AuditMark::default()).await.err(),
            state.deleted_since(&zone, AuditMark::default()).await.err(),
            state.audit_end().await.err(),
            state.audit_head().await.err(),
        ];
        assert!(errors.iter().all(|error| matches!(error, Some(StateError::Unsafe { .. }))), "{errors:?}");

        // The next process has no such doubt, and what it writes stays.
        let disk = disk.crash();
        let state = StateDirectory::open(Arc::new(disk.clone()), Path::new("/state")).unwrap();
        audit(&state, "again").await.unwrap();
        let text = String::from_utf8(read_file(&disk.crash(), &log, 1 << 20).unwrap()).unwrap();
        assert_eq!(text.matches("before").count(), lines_before);
        assert!(text.ends_with('\n') && text.contains("again"), "{call:?}: {text}");
    }
}

#[tokio::test]
async fn a_line_cut_short_by_a_full_disk_spoils_no_other() {
    let (disk, state, log) = a_state();
    audit(&state, "before").await.unwrap();
    disk.set_capacity(Some(used(&disk, Path::new("/")) + 20));
    for _ in 0..2 {
        assert!(audit(&state, "cut").await.is_err());
    }
    disk.set_capacity(None);
    audit(&state, "after").await.unwrap();
    let disk = disk.crash();
    let text = String::from_utf8(read_file(&disk, &log, 1 << 20).unwrap()).unwrap();
    let whole = text.lines().filter(|line| serde_json::from_str::<Value>(line).is_ok());
    assert_eq!(whole.count(), 2, "{text}");
    // Nor does it break the chain, or hide that a line is cut out before it.
    let state = StateDirectory::at(Arc::new(disk), Path::new("/state"));
    let report = state.verify_audit_log().await.unwrap();
    assert_eq!((report.lines, report.breaks), (2, Vec::new()), "{text}");
    assert!(report.pieces > 0, "{text}");
}

#[tokio::test]
async fn an_audit_log_whose_maker_was_killed_keeps_its_name_after_a_crash() {
    for changes in 0..6 {
        let (disk, state, log) = a_state();
        disk.stop_after(changes);
        let _ = audit(&state, "first").await;
        let disk = disk.kill();
        let state = StateDirectory::open(Arc::new(disk.clone()), Path::new("/state")).unwrap();
        audit(&state, "second").await.unwrap();
        let disk = disk.crash();
        let text = String::from_utf8(read_file(&disk, &log, 1 << 20).unwrap()).unwrap();
        assert!(text.contains("second"), "{changes}: {text}");
        let state = StateDirectory::at(Arc::new(disk), Path::new("/state"));
        let report = state.verify_audit_log().await.unwrap();
        assert!(report.breaks.is_empty() && report.lines > 0, "{changes}: {report:?}");
    }
}

/// How many months are played, unless more are asked for.
const SEEDS: u64 = 20;

const DAYS: u64 = 30;

/// Chance that repeats.
pub(crate) struct Dice(pub(crate) SeededRandomness);

impl Dice {
    pub(crate) fn below(&self, bound: u64) -> u64 {
        self.0.next_u64() % bound
    }

    pub(crate) fn one_in(&self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    pub(crate) fn any<'a, T>(&self, of: &'a [T]) -> &'a T {
        &of[usize::try_from(self.below(of.len() as u64)).unwrap()]
    }

    pub(crate) fn seconds(&self, bound: u64) -> Duration {
        Duration::from_secs(self.below(bound))
    }
}

/// Says how to repeat what panics.
pub(crate) struct Repeat(pub(crate) u64);

impl Drop for Repeat {
    #[expect(clippy::print_stderr, reason = "so that a failed play can be repeated")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to repeat: SNAPWARDEN_SEED={}", self.0);
        }
    }
}

/// Something that goes wrong a few times. No effect is a lie about what there is: what the platform says that
/// can be read is believed.
pub(crate) fn any_fault(dice: &Dice) -> Fault {
    const CALLS: &[Call] = &[
        Call::ListInstances,
        Call::ListSnapshots,
        Call::GetSnapshot,
        Call::DeleteSnapshot,
        Call::ExportSnapshot,
        Call::PromoteSnapshot,
        Call::ListTemplates,
        Call::GetTemplate,
        Call::DeleteTemplate,
        Call::GetOperation,
        Call::GetImage,
    ];
    let call = *dice.any(CALLS);
    let bytes = dice.below(40_000);
    let effect = match (call, dice.below(12)) {
        (_, 0) => Effect::Unreachable,
        (_, 1) => Effect::CutBefore,
        (_, 2) => Effect::CutAfter,
        (_, 3) => Effect::Delay(dice.seconds(90)),
        (_, 4) => Effect::status(*dice.any(&[400, 403, 409, 429, 500, 502, 503]), "no"),
        (_, 5) => dice.any(&[Effect::html(), Effect::malformed_json(), Effect::Pad(100_000)]).clone(),
        (_, 6) => Effect::CutBody(bytes / 40),
        (_, 7) => Effect::Stall(bytes / 40),
        (Call::GetImage, 8) => Effect::Corrupt(bytes),
        (Call::GetImage, 9) => Effect::Expire(bytes),
        (Call::GetImage, 10) => Effect::IgnoreRange,
        (Call::GetImage, 11) => Effect::Etag("\"other\""),
        (Call::ListSnapshots, 8) => Effect::DateSkew(SignedDuration::from_mins(-20)),
        (Call::ListSnapshots, 9) => Effect::Header(header::DATE, None),
        (Call::ListSnapshots, 10) => Effect::Edit("/snapshots/1/state", Some(json!("dreaming"))),
        (Call::ListSnapshots, 11) => Effect::Edit("/snapshots/2/created-at", None),
        (Call::GetSnapshot, 8) => Effect::Edit("/export", None),
        (Call::GetSnapshot, 9) => Effect::Edit("/export/md5sum", None),
        (Call::GetSnapshot, 10) => Effect::Edit("/export/md5sum", Some(json!("0".repeat(32)))),
        (Call::GetOperation, 8) => Effect::Edit("/state", Some(json!("dreaming"))),
        (Call::GetOperation, 9) => Effect::Edit("/reference", None),
        (Call::GetOperation, _) => Effect::header(header::RETRY_AFTER, "50"),
        (Call::GetImage | Call::ListInstances | Call::ListTemplates, _) => {
            Effect::Header(header::CONTENT_LENGTH, Some(HeaderValue::from(bytes)))
        }
        (_, 8) => Effect::operation_fails("fault", "storage failed"),
        (_, 9) => Effect::fails_inline("busy", "the snapshot is busy"),
        (_, 10) => Effect::operation_hangs(),
        _ => Effect::Operation(Ending { when: When::AtOnce, ..Ending::SUCCESS }),
    };
    let fault = Fault::on(call, effect).after(dice.below(4)).times(1 + dice.below(6));
    if dice.one_in(2) { fault.each() } else { fault }
}

pub(crate) fn any_disk_failure(dice: &Dice, disk: &MemoryDisk) {
    const CALLS: &[DiskCall] = &[
        DiskCall::Open,
        DiskCall::Read,
        DiskCall::Write,
        DiskCall::Len,
        DiskCall::Sync,
        DiskCall::CreateDir,
        DiskCall::Rename,
        DiskCall::Remove,
        DiskCall::List,
        DiskCall::Metadata,
        DiskCall::SyncDir,
        DiskCall::FreeBytes,
        DiskCall::Lock,
    ];
    let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::PermissionDenied, io::ErrorKind::Other];
    disk.fail(*dice.any(CALLS), 1 + dice.below(30), *dice.any(&kinds));
}

/// What all files have together.
pub(crate) fn used(disk: &MemoryDisk, folder: &Path) -> u64 {
    let entries = disk.list(folder).unwrap_or_default().into_iter();
    entries
        .map(|entry| match entry.kind {
            Kind::Folder => used(disk, &folder.join(entry.name)),
            _ => disk.metadata(&folder.join(entry.name)).map_or(0, |found| found.len),
        })
        .sum()
}

/// A month in which everything may go wrong, and a few good days at its end.
async fn a_month(seed: u64) {
    let _repeat = Repeat(seed);
    let dice = Dice(SeededRandomness::new(seed));
    let mut play = Play::new(*dice.any(&[Exports::Newest, Exports::All]), seed);
    let mut instances = vec![play.instance("web-1"), play.instance("db-1")];
    let mut in_flight: Vec<SnapshotId> = Vec::new();
    for day in 0..DAYS {
        let context = &format!("seed {seed}, day {day}");
        let hours = match dice.below(20) {
            0 => -3,
            1 => 10 * 24,
            _ => 20 + i64::try_from(dice.below(8)).unwrap(),
        };
        play.clock.step(SignedDuration::from_hours(hours));
        if dice.one_in(15) {
            instances.push(play.instance("guest"));
        } else if dice.one_in(15) && instances.len() > 2 {
            play.world.remove_instance(instances.pop().unwrap());
        }
        let there = play.there();
        for id in in_flight.drain(..).filter(|id| there.contains(id)) {
            play.world.set_state(id, SnapshotState::Exported);
        }
        for instance in instances.clone() {
            match dice.below(20) {
                0 => {}
                1 => {
                    let id = play.snapshot(instance, 0);
                    play.world.set_state(id, SnapshotState::Error);
                }
                2 => {
                    let id = play.snapshot(instance, 0);
                    play.world.set_state(id, SnapshotState::Snapshotting);
                    in_flight.push(id);
                }
                3 => drop(play.snapshot(instance, -1 - i64::try_from(dice.below(48)).unwrap())),
                _ => drop(play.snapshot(instance, 0)),
            }
        }

        let faults = dice.below(5);
        for _ in 0..faults {
            play.world.fault(any_fault(&dice));
        }
        if dice.one_in(10) {
            // With a clock further off a template whose answer was lost is not known again, and stays.
            let seconds = i64::try_from(dice.below(1_080)).unwrap() - 540;
            play.world.set_skew(SignedDuration::from_secs(seconds));
        }
        if dice.one_in(10) {
            play.disk.set_capacity(Some(used(&play.disk, Path::new("/")) + dice.below(100_000)));
        }
        let disk_failures = dice.below(6).saturating_sub(3);
        for _ in 0..disk_failures {
            any_disk_failure(&dice, &play.disk);
        }
        if dice.one_in(4) {
            play.disk.stop_after(dice.below(120));
        }
        let limit = if dice.one_in(6) { dice.seconds(150) } else { Duration::MAX };
        play.is_quiet = faults + disk_failures == 0;
        let night = play.night_of_at_most(limit).await;
        let death = *dice.any(&[Death::Crash, Death::Kill, Death::Chance(seed + day)]);
        play.disk = death.of(&play.disk);
        play.disk.set_capacity(None);
        play.world.clear_faults();
        play.world.set_skew(SignedDuration::ZERO);
        play.check(&night, context).await;
    }

    play.is_quiet = true;
    for days_left in (0..3).rev() {
        let context = &format!("seed {seed}, {days_left} quiet days to go");
        // Beyond what is dated in the future.
        play.clock.step(SignedDuration::from_hours(50));
        for instance in instances.clone() {
            play.snapshot(instance, 0);
        }
        let night = play.night().await;
        play.disk = play.disk.crash();
        play.check(&night, context).await;
        assert_eq!(night.result(), Some(RunResult::Success), "{context}\n{}", night.said());
        if days_left == 0 {
            play.check_end(&night, context);
        }
    }
}

#[test]
fn whatever_goes_wrong_in_a_month_nothing_is_lost() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds: Vec<u64> = match number("SNAPWARDEN_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("SNAPWARDEN_SEEDS").unwrap_or(SEEDS)).collect(),
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for first in 0..threads {
            let seeds = seeds.iter().skip(first).step_by(threads);
            scope.spawn(move || {
                let mut runtime = tokio::runtime::Builder::new_current_thread();
                let runtime = runtime.enable_time().start_paused(true).build().unwrap();
                runtime.block_on(async {
                    for seed in seeds {
                        a_month(*seed).await;
                    }
                });
            });
        }
    });
}
