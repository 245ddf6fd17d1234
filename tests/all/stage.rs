//! What whole runs are played on: a simulated zone, real files in a temporary folder, and the program itself,
//! put together from a configuration as it is for a user.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use snapwarden::cli::assemble::{self, Seams, Use};
use snapwarden::cli::exit::Refusal;
use snapwarden::clock::Clock as _;
use snapwarden::config;
use snapwarden::credentials::Credentials;
use snapwarden::disk::{Access, Disk, RealDisk, read_file, replace_file};
use snapwarden::run::context::{RunOptions, Runner};
use snapwarden::run::report::{RunReport, Step};
use snapwarden::sim::clock::SimClock;
use snapwarden::sim::image::DiskShape;
use snapwarden::sim::processes::SimProcesses;
use snapwarden::sim::randomness::SeededRandomness;
use snapwarden::sim::world::{API_KEY, API_SECRET, World};
use snapwarden::snapshot::{InstanceId, SnapshotId, ZoneName};
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::directory::StateDirectory;

/// The instant at which every test begins.
pub(crate) const NOW: &str = "2026-11-01T12:00:00Z";

/// A policy with every kind of step, for one zone and one archive.
pub(crate) const NIGHTLY: &str = r#"
[policies.nightly]
zones = ["ch-gva-2"]
[policies.nightly.retention]
max_age = "15d"
max_count = 10
[policies.nightly.guard]
max_delete_percent = 100
[policies.nightly.export]
archives = ["vault"]
[policies.nightly.promote]
name = "{instance}-{created:%Y%m%d}"
keep = 2
"#;

/// A zone with what a run needs around it.
pub(crate) struct Stage {
    pub(crate) world: World,
    pub(crate) clock: SimClock,
    pub(crate) processes: SimProcesses,
    pub(crate) zone: ZoneName,
    pub(crate) seams: Seams,
    pub(crate) folder: tempfile::TempDir,
}

/// This many days before the test begins.
pub(crate) fn days_ago(days: i64) -> Timestamp {
    NOW.parse::<Timestamp>().unwrap() - SignedDuration::from_hours(24 * days)
}

impl Stage {
    /// An empty zone `ch-gva-2`, over real files.
    pub(crate) fn new() -> Self {
        Self::over(Arc::new(RealDisk))
    }

    /// An empty zone `ch-gva-2`, over this disk.
    pub(crate) fn over(disk: Arc<dyn Disk>) -> Self {
        let clock = SimClock::starting_at(NOW.parse().unwrap());
        let world = World::new(Arc::new(clock.clone()), 7);
        let zone = world.add_zone("ch-gva-2");
        let processes = SimProcesses::new(Arc::new(clock.clone()));
        let seams = Seams {
            transport: world.transport(),
            disk,
            clock: Arc::new(clock.clone()),
            randomness: Arc::new(SeededRandomness::new(11)),
            processes: Arc::new(processes.clone()),
            host: "backup-1".into(),
        };
        Self { world, clock, processes, zone, seams, folder: tempfile::tempdir().unwrap() }
    }

    /// Another machine with this name beside the same zone, with a state directory of its own.
    pub(crate) fn beside(&self, host: &str) -> Self {
        let randomness = Arc::new(SeededRandomness::new(12));
        let seams = Seams { host: host.into(), randomness, ..self.seams.clone() };
        let (world, clock, zone) = (self.world.clone(), self.clock.clone(), self.zone.clone());
        let processes = self.processes.clone();
        Self { world, clock, processes, zone, seams, folder: tempfile::tempdir().unwrap() }
    }

    /// Two instances with a snapshot a day for 20 days, the newest of today; small images.
    pub(crate) fn two_by_twenty() -> (Self, [Vec<SnapshotId>; 2]) {
        let stage = Self::new();
        let ids = ["web-1", "db-1"].map(|name| stage.instance(name, 20));
        (stage, ids)
    }

    /// An instance with a snapshot a day, oldest first; the newest is of today.
    pub(crate) fn instance(&self, name: &str, snapshots: i64) -> Vec<SnapshotId> {
        let instance = self.world.add_instance(&self.zone, name, &[]);
        self.world.set_disk(instance, DiskShape::with_data_mib(1));
        self.days(instance, (0..snapshots).rev())
    }

    pub(crate) fn days(&self, instance: InstanceId, days: impl Iterator<Item = i64>) -> Vec<SnapshotId> {
        days.map(|day| self.world.add_snapshot(instance, days_ago(day))).collect()
    }

    pub(crate) fn archive(&self) -> PathBuf {
        self.folder.path().join("vault")
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// A whole configuration around the given policies.
    pub(crate) fn config(&self, policies: &str) -> String {
        config_text(self.folder.path(), policies)
    }

    /// The program, put together from the configuration.
    pub(crate) fn runner(&self, policies: &str) -> Runner {
        self.assemble(policies).unwrap_or_else(|refusal| panic!("{}", refusal.text))
    }

    /// The program, or why it could not be put together.
    pub(crate) fn assemble(&self, policies: &str) -> Result<Runner, Refusal> {
        let config = config::parse(&self.config(policies), "test.toml", None)
            .unwrap_or_else(|diagnostics| panic!("{diagnostics}"));
        let credentials = Credentials::new(API_KEY, API_SECRET, None).unwrap();
        assemble::runner(&config, credentials, &self.seams, Use::Changing)
    }

    /// One run of the first policy.
    pub(crate) async fn run(&self, policies: &str) -> RunReport {
        self.run_with(policies, &RunOptions::default()).await
    }

    pub(crate) async fn run_with(&self, policies: &str, options: &RunOptions) -> RunReport {
        let runner = self.runner(policies);
        runner.run(&runner.policies[0], options).await.unwrap()
    }

    /// The ids of the snapshots that are there, oldest first.
    pub(crate) fn there(&self) -> Vec<SnapshotId> {
        self.world.snapshots(&self.zone).into_iter().map(|snapshot| snapshot.id).collect()
    }

    /// The lines of the audit log.
    pub(crate) fn audit(&self) -> Vec<Value> {
        let text = audit_log(&RealDisk, &self.state()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Moves the wall clock.
    pub(crate) fn step(&self, by: SignedDuration) {
        self.clock.step(by);
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }
}

/// A whole configuration around the given policies, with everything in one folder.
pub(crate) fn config_text(folder: &Path, policies: &str) -> String {
    format!(
        "[state]\ndirectory = \"{0}/state\"\n[archives.vault]\ntype = \"local\"\npath = \"{0}/vault\"\n{policies}",
        folder.display()
    )
}

/// Replaces the state of a policy by a file of the first version, which knew no changes beside it, edited.
pub(crate) async fn rewrite_as_version_1(state: &Path, policy: &str, edit: impl FnOnce(&mut Value)) {
    let directory = StateDirectory::at(Arc::new(RealDisk), state);
    let whole = directory.policy_state(&policy.parse().unwrap()).await.unwrap();
    let mut json = serde_json::to_value(&whole).unwrap();
    json["version"] = 1.into();
    json.as_object_mut().unwrap().remove("generation");
    edit(&mut json);
    let path = state.join(format!("policy-{policy}.json"));
    replace_file(&RealDisk, &path, json.to_string().as_bytes(), Access::Owner).unwrap();
    let changes = format!("policy-{policy}.");
    let is_of_it = |name: &str| name.starts_with(&changes) && name.strip_suffix(".jsonl").is_some();
    for entry in RealDisk.list(state).unwrap() {
        if entry.name.to_str().is_some_and(is_of_it) {
            RealDisk.remove_file(&state.join(entry.name)).unwrap();
        }
    }
}

/// The audit log in a state directory: the files of earlier months, then the newest. Empty if there is none.
pub(crate) fn audit_log(disk: &dyn Disk, state: &Path) -> io::Result<String> {
    let mut text = String::new();
    let names = disk.list(state)?.into_iter().filter_map(|entry| entry.name.into_string().ok());
    let earlier = names.filter(|name| name.starts_with("audit-"));
    for name in earlier.chain(["audit.jsonl".to_owned()]) {
        match read_file(disk, &state.join(name), 1 << 30) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            read => text.push_str(&String::from_utf8(read?).unwrap()),
        }
    }
    Ok(text)
}

/// A file's text.
pub(crate) fn read(path: &Path) -> String {
    snapwarden::disk::read_named_file(path, 1 << 30)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The steps of a report that did, or set out to do, this.
pub(crate) fn steps(report: &RunReport, action: Action) -> Vec<&Step> {
    report.zones.iter().flat_map(|zone| &zone.steps).filter(|step| step.facts.action == action).collect()
}

/// How many steps of a report ended so.
pub(crate) fn ended(report: &RunReport, action: Action, outcome: StepOutcome) -> usize {
    steps(report, action).iter().filter(|step| step.outcome == outcome).count()
}

/// Every file below a folder, as it is found at this moment.
pub(crate) fn paths(folder: &Path) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    let Ok(entries) = RealDisk.list(folder) else { return paths };
    for entry in entries {
        let path = folder.join(&entry.name);
        match entry.kind {
            snapwarden::disk::Kind::Folder => paths.extend(self::paths(&path)),
            _ => paths.push(path),
        }
    }
    paths
}

/// Every file below a folder, with its bytes.
pub(crate) fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let bytes = |path: &Path| snapwarden::disk::read_file(&RealDisk, path, 1 << 30).unwrap();
    paths(folder).into_iter().map(|path| (path.clone(), bytes(&path))).collect()
}

/// Prints that a test was skipped, around the capturing of test output: it must be seen.
pub(crate) fn skipped(why: std::fmt::Arguments<'_>) {
    let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED: {why}\n"));
}

/// What the program said, and how it ended.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) status: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Said {
    pub(crate) fn of(ended: Output) -> Self {
        Self {
            status: ended.status.code().unwrap_or_else(|| panic!("it was killed: {ended:?}")),
            out: String::from_utf8(ended.stdout).unwrap(),
            err: String::from_utf8(ended.stderr).unwrap(),
        }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// It printed all of this.
    pub(crate) fn has(&self, lines: &[&str]) {
        for line in lines {
            assert!(self.out.contains(line), "`{line}` is missing:\n{}\n{}", self.out, self.err);
        }
    }

    /// It ended with this status, said all of this on stderr, and printed no data.
    pub(crate) fn refused(&self, status: i32, words: &[&str]) {
        assert_eq!((self.status, &*self.out), (status, ""), "{self:?}");
        self.complained(words);
    }

    /// It said all of this on stderr.
    pub(crate) fn complained(&self, words: &[&str]) {
        for word in words {
            assert!(self.err.contains(word), "`{word}` is missing: {self:?}");
        }
    }
}
