//! Nothing is lost, over all that a run can do at once: two zones, policies that both decide about some instances,
//! creation, holds, allowances, retention of copies, two downloads at a time, and slow lines, so that crashes hit downloads
//! whose journal has been written. On some days there is a mishap beside all that.
//!
//! `SNAPWARDEN_SEEDS=1000` plays more of it, `SNAPWARDEN_SEED=7` plays one of it again.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use snapwarden::archive::md5::Md5Sum;
use snapwarden::cli::assemble::{self, Seams, Use};
use snapwarden::clock::{self, Clock as _};
use snapwarden::config;
use snapwarden::config::sections::Config;
use snapwarden::credentials::Credentials;
use snapwarden::disk::{Access, Disk as _, Kind, Open, read_file};
use snapwarden::run::context::{RunOptions, Runner};
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::sim::call::Call;
use snapwarden::sim::clock::SimClock;
use snapwarden::sim::disk::{DiskCall, MemoryDisk};
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::image::Image;
use snapwarden::sim::randomness::SeededRandomness;
use snapwarden::sim::world::{API_KEY, API_SECRET, World};
use snapwarden::snapshot::{InstanceId, Snapshot, SnapshotId, SnapshotState, ZoneName};
use snapwarden::state::allowances::{Allowance, AllowanceOf};
use snapwarden::state::audit::StepOutcome;
use snapwarden::state::directory::StateDirectory;
use snapwarden::state::holds::Hold;

use crate::crashes::{Death, Dice, OPERATIONS_END, Repeat, TINY, any_disk_failure, any_fault, md5_of, used};
use crate::stage::{NOW, audit_log, config_text};

const FOLDER: &str = "/srv";

/// How many snapshots the policies keep: `nightly` of all instances, `weekly` of databases.
const NIGHTLY_KEEPS: usize = 3;
const WEEKLY_KEEPS: usize = 5;
const COPIES_KEPT: usize = 2;

/// How many more `weekly` keeps for a day.
const MORE: usize = 3;

/// Longer than a change takes to settle, and than the snapshots stay failed.
const FAILED_AFTER: &str = "30h";

/// How many fortnights are played, unless more are asked for.
const SEEDS: u64 = 8;
const DAYS: u64 = 12;

/// Which policy takes, exports and owns the snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Setup {
    /// `nightly` exports, and prunes whatever there is.
    Usual,
    /// Each policy prunes only what it took or what served its slot; `weekly` takes snapshots, too.
    Owners,
    /// A third policy exports, and prunes nothing.
    Exporter,
}

impl Setup {
    const ALL: [Self; 3] = [Self::Usual, Self::Owners, Self::Exporter];

    fn edit(self, config: String) -> String {
        match self {
            Self::Usual => config,
            Self::Owners => config
                .replace("ownership = \"all\"", "ownership = \"created\"")
                .replace("[policies.weekly]", "[policies.weekly]\ncreate = true"),
            Self::Exporter => {
                let zones = "zones = [\"ch-gva-2\", \"de-fra-1\"]";
                let exporter = format!("[policies.offsite]\n{zones}\n[policies.offsite.export]");
                config.replace("[policies.nightly.export]", &exporter)
            }
        }
    }
}

/// What happens to a day: an edit of the configuration that is taken back before it has settled, a volume that is not
/// mounted, or a platform that fails. Nothing may be lost by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mishap {
    None,
    Mistyped,
    Renamed,
    Removed,
    /// For longer than it takes to settle.
    Paused,
    /// What is kept by it stays after the next edit, too, until that has settled.
    Raised,
    CopiesMistyped,
    ArchiveRenamed,
    ArchiveNotMounted,
    StateNotMounted,
    CopiesRemoved,
    CreationRefused,
    /// The newest snapshots of an instance, for longer than it takes to settle.
    SnapshotsFailed,
    NoSnapshotsListed,
    NoInstancesListed,
}

impl Mishap {
    /// In the order in which they come: what more is kept by one is mistyped by the next.
    const ALL: [Self; 14] = [
        Self::Paused,
        Self::CopiesMistyped,
        Self::CreationRefused,
        Self::SnapshotsFailed,
        Self::StateNotMounted,
        Self::Removed,
        Self::CopiesRemoved,
        Self::Raised,
        Self::Mistyped,
        Self::NoSnapshotsListed,
        Self::ArchiveRenamed,
        Self::Renamed,
        Self::ArchiveNotMounted,
        Self::NoInstancesListed,
    ];

    /// For how many more days it lasts.
    fn more_days(self, dice: &Dice) -> u64 {
        match self {
            Self::Paused => 1 + dice.below(2),
            Self::SnapshotsFailed => 1,
            _ => 0,
        }
    }

    /// What the platform answers to all policies for as long as it lasts.
    fn fault(self) -> Option<Fault> {
        match self {
            Self::CreationRefused => Some(Fault::on(Call::CreateSnapshot, Effect::status(403, "no"))),
            Self::NoSnapshotsListed => {
                Some(Fault::on(Call::ListSnapshots, Effect::Edit("/snapshots", Some(json!([])))))
            }
            Self::NoInstancesListed => {
                Some(Fault::on(Call::ListInstances, Effect::Edit("/instances", Some(json!([])))))
            }
            _ => None,
        }
    }

    /// Whether nothing may be deleted.
    fn keeps_all(self) -> bool {
        self.missing().is_some()
            || matches!(self, Self::CopiesRemoved | Self::NoSnapshotsListed | Self::NoInstancesListed)
    }

    fn edit(self, config: &str) -> String {
        let fewer_copies = |text: &str| text.replace(&format!("keep_last = {COPIES_KEPT}"), "keep_last = 1");
        match self {
            Self::Mistyped => config.replace(&format!("keep_last = {WEEKLY_KEEPS}"), "keep_last = 1"),
            Self::Renamed => config
                .replace("policies.weekly", "policies.monthly")
                .replace(&format!("keep_last = {WEEKLY_KEEPS}"), "keep_last = 1"),
            Self::Removed => {
                let end = config.find("[policies.weekly]").unwrap();
                config[..end].to_owned()
            }
            Self::Paused => config.replace("[policies.weekly]", "[policies.weekly]\nenabled = false"),
            Self::Raised => config.replace(
                &format!("keep_last = {WEEKLY_KEEPS}"),
                &format!("keep_last = {}", WEEKLY_KEEPS + MORE),
            ),
            Self::CopiesMistyped => fewer_copies(config),
            Self::ArchiveRenamed => fewer_copies(config)
                .replace("archives.vault", "archives.store")
                .replace("archives = [\"vault\"]", "archives = [\"store\"]"),
            _ => config.to_owned(),
        }
    }

    /// The folder that is not there.
    fn missing(self) -> Option<&'static str> {
        match self {
            Self::ArchiveNotMounted => Some("vault"),
            Self::StateNotMounted => Some("state"),
            _ => None,
        }
    }
}

/// The folder that a process finds at the path of the missing one: an empty one.
fn in_place_of(folder: &str, day: u64) -> String {
    format!("{folder}-not-mounted-{day}")
}

fn config(setup: Setup, mishap: Mishap, day: u64) -> Arc<Config> {
    let policies = format!(
        r#"
[archives.vault.retention]
keep_last = {COPIES_KEPT}
[policies.nightly]
zones = ["ch-gva-2", "de-fra-1"]
create = true
[policies.nightly.select]
ownership = "all"
orphans = "apply"
[policies.nightly.retention]
keep_last = {NIGHTLY_KEEPS}
failed_after = "{FAILED_AFTER}"
[policies.nightly.guard]
max_delete_percent = 100
[policies.nightly.export]
archives = ["vault"]
snapshots = "newest"
concurrency = 2
[policies.weekly]
zones = ["ch-gva-2", "de-fra-1"]
[policies.weekly.select]
instances = ["db-*"]
ownership = "all"
[policies.weekly.retention]
keep_last = {WEEKLY_KEEPS}
[policies.weekly.guard]
max_delete_percent = 100
"#
    );
    let mut text = mishap.edit(&setup.edit(config_text(Path::new(FOLDER), &policies)));
    if let Some(folder) = mishap.missing() {
        text = text
            .replace(&format!("{FOLDER}/{folder}\""), &format!("{FOLDER}/{}\"", in_place_of(folder, day)));
    }
    let config = config::parse(&text, "test.toml", None);
    Arc::new(config.unwrap_or_else(|found| panic!("{found}")))
}

/// A copy's place in the order of its instance's copies.
type CopyKey = (Timestamp, SnapshotId);

/// Two zones with two instances each, and the machine beside them.
struct Play {
    world: World,
    clock: SimClock,
    setup: Setup,
    zones: [ZoneName; 2],
    /// Every instance, and how many of its snapshots the policies keep.
    instances: BTreeMap<InstanceId, usize>,
    /// How many more of a database no run may delete today.
    more: usize,
    disk: MemoryDisk,
    config: Arc<Config>,
    images: BTreeMap<SnapshotId, Arc<Image>>,
    on_hold: BTreeSet<SnapshotId>,
    /// Those that other people took.
    by_hand: BTreeSet<SnapshotId>,
    /// What no run may delete as long as the mishap lasts.
    kept: BTreeSet<SnapshotId>,
    /// Whether an operator lets pass what waits for a newer snapshot.
    is_allowed: bool,
    copies: BTreeMap<InstanceId, BTreeSet<CopyKey>>,
    /// The snapshots whose copies have rotted in the archive.
    rotten: BTreeSet<SnapshotId>,
    audit_log: String,
    /// Where the configuration has the state at the moment.
    state_folder: String,
}

/// The runs of all policies, and the world before them.
struct Night {
    before: Vec<Snapshot>,
    slot: Timestamp,
    /// How many policies should run.
    due: usize,
    reports: Vec<RunReport>,
}

impl Night {
    fn is_success(&self) -> bool {
        self.reports.len() == self.due
            && self.reports.iter().all(|report| report.result == RunResult::Success)
    }

    /// Whether `nightly` has taken what it could.
    fn has_created(&self) -> bool {
        self.reports.first().is_some_and(|report| report.policy.as_str() == "nightly")
    }
}

impl Play {
    fn new(seed: u64) -> Self {
        let clock = SimClock::starting_at(NOW.parse().unwrap());
        let world = World::new(Arc::new(clock.clone()), seed);
        let zones = ["ch-gva-2", "de-fra-1"].map(|name| world.add_zone(name));
        let setup = Setup::ALL[usize::try_from(seed).unwrap() % Setup::ALL.len()];
        let mut instances = BTreeMap::new();
        let mut by_hand = BTreeSet::new();
        for zone in &zones {
            for (name, keeps) in [("web-1", NIGHTLY_KEEPS), ("db-1", WEEKLY_KEEPS)] {
                let instance = world.add_instance(zone, name, &[]);
                world.set_disk(instance, TINY);
                for days in (1..6).rev() {
                    let taken = clock.now() - SignedDuration::from_hours(24 * days);
                    by_hand.insert(world.add_snapshot(instance, taken));
                }
                // Of others' snapshots each policy says nothing.
                instances.insert(instance, if setup == Setup::Owners { NIGHTLY_KEEPS } else { keeps });
            }
        }
        let disk = MemoryDisk::new();
        disk.create_dir_all(Path::new(FOLDER), Access::Owner).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        let config = config(setup, Mishap::None, 0);
        Self {
            world,
            clock,
            setup,
            zones,
            instances,
            more: 0,
            disk,
            config,
            images: BTreeMap::new(),
            on_hold: BTreeSet::new(),
            by_hand,
            kept: BTreeSet::new(),
            is_allowed: false,
            copies: BTreeMap::new(),
            rotten: BTreeSet::new(),
            audit_log: String::new(),
            state_folder: "state".to_owned(),
        }
    }

    fn snapshots(&self) -> Vec<Snapshot> {
        self.zones.iter().flat_map(|zone| self.world.snapshots(zone)).collect()
    }

    /// All images must be known before they can be deleted.
    fn remember_images(&mut self) {
        for snapshot in self.snapshots() {
            self.images.entry(snapshot.id).or_insert_with(|| self.world.image(snapshot.id));
        }
    }

    fn runner(&self, purpose: Use) -> Option<Runner> {
        let seams = Seams {
            transport: self.world.transport(),
            disk: Arc::new(self.disk.clone()),
            clock: Arc::new(self.clock.clone()),
            randomness: Arc::new(SeededRandomness::new(11)),
            host: "backup-1".into(),
        };
        let credentials = Credentials::new(API_KEY, API_SECRET, None).unwrap();
        assemble::runner(&self.config, credentials, &seams, purpose).ok()
    }

    fn state(&self) -> StateDirectory {
        StateDirectory::open(Arc::new(self.disk.clone()), &Path::new(FOLDER).join("state")).unwrap()
    }

    /// Nothing is stored in place of a volume that is not mounted, and a listing of nothing is no success.
    fn check_mishap(&self, night: &Night, mishap: Mishap, context: &str) {
        if mishap == Mishap::ArchiveNotMounted {
            let stored = self.files(Path::new(FOLDER), ".qcow2");
            let stored = stored.iter().find(|path| path.to_string_lossy().contains("not-mounted"));
            assert!(stored.is_none(), "{context}\nstored in place of the archive: {stored:?}");
        }
        let mut pruning = night.reports.iter().filter(|report| report.policy.as_str() != "offsite");
        if matches!(mishap, Mishap::NoSnapshotsListed | Mishap::NoInstancesListed) {
            let is_silent = pruning.any(|report| report.result == RunResult::Success);
            assert!(!is_silent, "{context}\nno word of what is not listed");
        }
    }

    /// Puts a snapshot on hold, or ends a hold.
    async fn change_holds(&mut self, dice: &Dice) {
        let found = self.snapshots();
        let snapshot = dice.any(&found).id;
        if self.on_hold.remove(&snapshot) {
            self.state().unhold(&self.clock, snapshot).await.unwrap();
        } else {
            let hold = Hold { snapshot, until: None, reason: None, since: self.clock.now(), about: None };
            self.state().hold(&self.clock, hold).await.unwrap();
            self.on_hold.insert(snapshot);
        }
    }

    /// What a policy keeps that is paused today: one snapshot more will have been taken when it is first found so.
    fn keep_paused(&mut self) {
        let databases = self.instances.iter().filter(|(_, keeps)| **keeps == WEEKLY_KEEPS);
        let kept = databases.flat_map(|(id, _)| self.newest_good(*id).into_iter().take(WEEKLY_KEEPS - 1));
        self.kept = kept.map(|snapshot| snapshot.id).collect();
    }

    /// One more snapshot has been taken before it was found.
    fn keep_fewer(&mut self) {
        for instance in self.instances.keys() {
            let good = self.newest_good(*instance);
            let oldest = good.iter().rfind(|snapshot| self.kept.contains(&snapshot.id));
            if let Some(oldest) = oldest {
                self.kept.remove(&oldest.id);
            }
        }
    }

    /// Somebody takes a snapshot of an instance.
    fn take_by_hand(&mut self, dice: &Dice) {
        let instances: Vec<InstanceId> = self.instances.keys().copied().collect();
        self.by_hand.insert(self.world.add_snapshot(*dice.any(&instances), self.clock.now()));
        self.remember_images();
    }

    /// An operator lets a run of each policy pass, or let one pass long ago.
    async fn allow(&mut self, hours_ago: i64) {
        self.is_allowed = hours_ago == 0;
        for name in ["nightly", "weekly"] {
            let of = AllowanceOf::Policy(name.parse().unwrap());
            let given_at = self.clock.now() - SignedDuration::from_hours(hours_ago);
            let allowance = Allowance { of, zone: None, deletes: 20, given_at, ends_at: None };
            self.state().allow(&self.clock, allowance).await.unwrap();
        }
    }

    /// The newest snapshots of an instance fail.
    fn fail_newest(&mut self, dice: &Dice) {
        let instances: Vec<InstanceId> = self.instances.keys().copied().collect();
        for snapshot in self.newest_good(*dice.any(&instances)).into_iter().take(2) {
            self.world.set_state(snapshot.id, SnapshotState::Error);
            self.kept.insert(snapshot.id);
        }
    }

    /// The good snapshots of an instance, newest first.
    fn newest_good(&self, instance: InstanceId) -> Vec<Snapshot> {
        let mut good = self.snapshots();
        good.retain(|snapshot| snapshot.instance_id == Some(instance) && snapshot.state.is_good());
        good.sort_by_key(|snapshot| std::cmp::Reverse((snapshot.created_at, snapshot.id)));
        good
    }

    /// Whatever the mishap did to the world is over.
    async fn end(&mut self, mishap: Mishap) {
        let kept = std::mem::take(&mut self.kept);
        match mishap {
            Mishap::SnapshotsFailed => {
                for snapshot in kept {
                    self.world.set_state(snapshot, SnapshotState::Exported);
                }
            }
            Mishap::CopiesRemoved => {
                let runner = self.runner(Use::Changing).unwrap();
                runner.adopt_archive(&"vault".parse().unwrap()).await.unwrap();
            }
            _ => {}
        }
    }

    /// Somebody removes all copies, if there are enough to be missed.
    async fn remove_copies(&mut self) -> bool {
        let remembered = self.state().archives().await.unwrap().of(&"vault".parse().unwrap());
        if remembered.copies.len() <= 2 {
            return false;
        }
        for path in self
            .zones
            .clone()
            .iter()
            .flat_map(|zone| self.files(&Path::new(FOLDER).join("vault").join(zone.as_str()), ""))
        {
            self.disk.remove_file(&path).unwrap();
            self.disk.sync_dir(path.parent().unwrap()).unwrap();
        }
        self.copies.clear();
        true
    }

    /// The newest copy of an instance rots, or all of them; a verification finds it. If the archive's disk has become
    /// read-only, that can be noted nowhere but in the state, and nothing may be deleted.
    async fn rot(&mut self, dice: &Dice) -> bool {
        let runner = self.runner(Use::Changing).unwrap();
        let archive = runner.archives.values().next().unwrap();
        let mut copies = archive.catalogue().await.unwrap().copies().to_vec();
        copies.retain(|copy| copy.manifest.pruned_at.is_none());
        let instances: Vec<InstanceId> = copies.iter().map(|copy| copy.manifest.instance.id).collect();
        if instances.is_empty() {
            return false;
        }
        let instance = *dice.any(&instances);
        // Newest first.
        let count = if dice.one_in(2) { 1 } else { copies.len() };
        for copy in copies.iter().filter(|copy| copy.manifest.instance.id == instance).take(count) {
            let key = (copy.manifest.snapshot.created_at, copy.manifest.snapshot.id);
            self.copies.entry(instance).or_default().remove(&key);
            if !self.rotten.insert(copy.manifest.snapshot.id) {
                continue;
            }
            let file = self.disk.open(&copy.image, Open::Update, Access::Group).unwrap();
            let last = file.len().unwrap() - 1;
            let mut byte = [0];
            file.read_at(&mut byte, last).unwrap();
            file.write_all_at(&[byte[0] ^ 1], last).unwrap();
            file.sync().unwrap();
        }
        let is_read_only = dice.one_in(2);
        let read_only = is_read_only.then_some(ErrorKind::ReadOnlyFilesystem);
        self.disk.set_unwritable(&Path::new(FOLDER).join("vault"), read_only);
        runner.verifier(archive).verify(100, &|_, _| {}).await.unwrap();
        is_read_only
    }

    /// All policies, one after the other, in a process of its own, which is killed after `limit`.
    async fn night(&mut self, slot: Timestamp, limit: Duration) -> Night {
        self.world.clear_log();
        let before = self.snapshots();
        let (mut reports, mut due) = (Vec::new(), 1);
        if let Some(runner) = self.runner(Use::Changing) {
            let options = RunOptions { slot: Some(slot), ..RunOptions::default() };
            due = runner.policies.iter().filter(|policy| policy.enabled).count();
            let all = async {
                for policy in runner.policies.iter().filter(|policy| policy.enabled) {
                    reports.extend(runner.run(policy, &options).await);
                }
            };
            let _ = clock::timeout(&self.clock, limit, all).await;
        }
        self.clock.sleep(OPERATIONS_END).await;
        self.remember_images();
        Night { before, slot, due, reports }
    }

    /// What must hold on the disk that survived, and in the world.
    async fn check(&mut self, night: &Night, mishap: Mishap, keeps_all: bool, context: &str) {
        let context = &format!("{context}\n{:#?}", night.reports);
        self.check_mishap(night, mishap, context);
        if mishap != Mishap::ArchiveNotMounted {
            let before = self.copies.clone();
            self.check_copies(context).await;
            let is_pruned = mishap == Mishap::StateNotMounted
                && before.iter().any(|(instance, copies)| !copies.is_subset(&self.copies[instance]));
            assert!(!is_pruned, "{context}\ncopies were deleted by a state that remembers nothing");
        }
        let after = self.snapshots();
        let there: BTreeSet<SnapshotId> = after.iter().map(|snapshot| snapshot.id).collect();

        // A deleted snapshot was neither on hold nor kept by one of the policies, and a copy of it or of a newer one
        // of its instance is in the archive.
        for snapshot in night.before.iter().filter(|snapshot| !there.contains(&snapshot.id)) {
            assert!(!keeps_all, "{context}\ndeleted: {snapshot:?}");
            assert!(!self.on_hold.contains(&snapshot.id), "{context}\ndeleted on hold: {snapshot:?}");
            assert!(!self.kept.contains(&snapshot.id), "{context}\ndeleted in a mishap: {snapshot:?}");
            let is_foreign = self.setup == Setup::Owners && self.by_hand.contains(&snapshot.id);
            assert!(!is_foreign, "{context}\ndeleted what others took: {snapshot:?}");
            let instance = snapshot.instance_id.unwrap();
            let key = (snapshot.created_at, snapshot.id);
            let is_newer = |other: &&Snapshot| {
                let is_good = other.state.is_good() || other.state == SnapshotState::Deleting;
                other.instance_id == Some(instance) && is_good && (other.created_at, other.id) > key
            };
            let newer: BTreeSet<SnapshotId> =
                night.before.iter().chain(&after).filter(is_newer).map(|other| other.id).collect();
            let keeps = self.instances[&instance];
            let keeps = if keeps == WEEKLY_KEEPS { keeps + self.more } else { keeps };
            assert!(newer.len() >= keeps, "{context}\ndeleted too early: {snapshot:?}");
            let newest_copy = self.copies.get(&instance).and_then(BTreeSet::last);
            assert!(newest_copy >= Some(&key), "{context}\ndeleted without a verified copy: {snapshot:?}");
            let is_of_slot = |other: &&Snapshot| {
                other.instance_id == Some(instance)
                    && other.created_at >= night.slot
                    && (other.state.is_good() || other.state.is_in_flight())
            };
            let is_missing =
                night.has_created() && !self.is_allowed && !after.iter().any(|other| is_of_slot(&other));
            assert!(!is_missing, "{context}\ndeleted although the newest is missing: {snapshot:?}");
        }

        // One snapshot for a slot, however often the run was repeated.
        for instance in self.instances.keys() {
            let of_slot = after.iter().filter(|snapshot| {
                snapshot.instance_id == Some(*instance)
                    && snapshot.created_at >= night.slot
                    && snapshot.state != SnapshotState::Error
                    && !self.by_hand.contains(&snapshot.id)
            });
            // While none is listed, one that was asked for in vain can't be found.
            assert!(
                mishap == Mishap::NoSnapshotsListed || of_slot.count() <= 1,
                "{context}\ntwo snapshots of {instance} for {}",
                night.slot
            );
        }
        self.check_audit_log(context);
    }

    /// Each change that was requested had been written down before.
    fn check_audit_log(&mut self, context: &str) {
        let log = audit_log(&self.disk, &Path::new(FOLDER).join(&self.state_folder)).unwrap_or_default();
        assert!(log.starts_with(&self.audit_log), "{context}\nolder lines are missing");
        let lines = log[self.audit_log.len()..].lines().filter_map(|line| serde_json::from_str(line).ok());
        let intended: Vec<Value> = lines.filter(|line: &Value| line["outcome"] == "intended").collect();
        for exchange in self.world.changes() {
            let id = exchange.path.rsplit('/').next().unwrap().split(':').next().unwrap();
            let (action, key) = match exchange.call {
                Call::CreateSnapshot => ("create", "/instance_id"),
                Call::ExportSnapshot => ("export", "/snapshot/id"),
                Call::DeleteSnapshot => ("delete", "/snapshot/id"),
                _ => panic!("{context}\na run requests {:?}", exchange.call),
            };
            let is_of = |line: &&Value| {
                let keys = [key, "/snapshot/instance_id"];
                line["action"] == action
                    && keys.iter().any(|key| line.pointer(key).and_then(Value::as_str) == Some(id))
            };
            assert!(intended.iter().any(|line| is_of(&line)), "{context}\nnot written down: {exchange:?}");
        }
        self.audit_log = log;
    }

    /// Each copy has the bytes of its snapshot, and of no instance one of the newest was deleted.
    async fn check_copies(&mut self, context: &str) {
        let runner = self.runner(Use::Reading).unwrap_or_else(|| panic!("{context}\nno runner"));
        let archive = runner.archives.values().next().unwrap();
        let catalogue = archive.catalogue().await.unwrap_or_else(|error| panic!("{context}\n{error}"));
        let mut found: BTreeMap<InstanceId, BTreeSet<CopyKey>> = BTreeMap::new();
        // One that the retention of copies deleted keeps its manifest.
        for copy in catalogue.copies().iter().filter(|copy| copy.manifest.pruned_at.is_none()) {
            let (snapshot, image) = (&copy.manifest.snapshot, copy.image.display());
            let bytes = read_file(&self.disk, &copy.image, 1 << 30);
            let bytes = bytes.unwrap_or_else(|error| panic!("{context}\n{image}: {error}"));
            let truth: Md5Sum = self.images[&snapshot.id].md5().parse().unwrap();
            if self.rotten.contains(&snapshot.id) && md5_of(&bytes) != truth {
                continue;
            }
            assert_eq!(md5_of(&bytes), truth, "{context}\nwrong bytes: {image}");
            self.rotten.remove(&snapshot.id);
            let of_instance = found.entry(copy.manifest.instance.id).or_default();
            of_instance.insert((snapshot.created_at, snapshot.id));
        }
        for (instance, before) in &self.copies {
            let now = found.entry(*instance).or_default();
            let all: BTreeSet<CopyKey> = before.union(now).copied().collect();
            for copy in all.iter().rev().take(COPIES_KEPT) {
                assert!(now.contains(copy), "{context}\na copy was deleted too early: {copy:?}");
            }
        }
        self.copies = found;
    }

    /// After a quiet night nothing is left to do.
    fn check_end(&self, night: &Night, context: &str) {
        for report in &night.reports {
            assert_eq!(report.result, RunResult::Success, "{context}\n{report:#?}");
        }
        assert_eq!(night.reports.len(), night.due, "{context}");
        // An operation that never ends keeps its snapshot busy for ever.
        let steps = night.reports.iter().flat_map(|report| &report.zones).flat_map(|zone| &zone.steps);
        let busy: BTreeSet<SnapshotId> = steps
            .filter(|step| step.outcome == StepOutcome::Blocked && step.blocked_by.is_none())
            .filter_map(|step| step.facts.snapshot.id)
            .collect();
        for (instance, keeps) in &self.instances {
            let of_instance = self.newest_good(*instance);
            let newest = of_instance.first().unwrap();
            assert!(newest.created_at >= night.slot, "{context}\nno snapshot was created: {of_instance:?}");
            if self.setup == Setup::Owners {
                // What counts as ours depends on which answers were lost.
                continue;
            }
            let key = (newest.created_at, newest.id);
            assert_eq!(self.copies[instance].last(), Some(&key), "{context}\nno copy of {newest:?}");
            let may_stay = |id: &SnapshotId| self.on_hold.contains(id) || busy.contains(id);
            let left = of_instance.iter().skip(*keeps).find(|snapshot| !may_stay(&snapshot.id));
            assert!(left.is_none(), "{context}\nshould be deleted: {left:?}");
            let held = |copy: &&CopyKey| self.on_hold.contains(&copy.1);
            let copies = self.copies[instance].iter().rev().skip(COPIES_KEPT).find(|copy| !held(copy));
            assert!(copies.is_none(), "{context}\na copy that should be deleted: {copies:?}");
        }
    }

    /// The files below a folder whose names have this end.
    fn files(&self, folder: &Path, end: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for entry in self.disk.list(folder).unwrap_or_default() {
            let path = folder.join(&entry.name);
            if entry.kind == Kind::Folder {
                found.extend(self.files(&path, end));
            } else if path.to_string_lossy().ends_with(end) {
                found.push(path);
            }
        }
        found
    }
}

/// Slots and the API's timestamps have no fractions.
fn whole_second(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap()
}

/// A fortnight in which everything may go wrong, and two quiet days at its end. Counts in `resumed` the downloads that
/// went on from a journal.
async fn a_fortnight(seed: u64, resumed: &AtomicU64) {
    let _repeat = Repeat(seed);
    let dice = Dice(SeededRandomness::new(seed));
    let mut play = Play::new(seed);
    play.remember_images();
    // The first night is quiet: before it there is nothing to compare with.
    play.clock.step(SignedDuration::from_hours(24));
    let first = play.night(whole_second(play.clock.now()), Duration::MAX).await;
    play.disk = play.disk.crash();
    play.check(&first, Mishap::None, false, &format!("seed {seed}, the first night")).await;
    // All of them come, if enough seeds are played.
    let mut mishaps = Mishap::ALL.iter().cycle().skip(usize::try_from(seed % 14).unwrap() * 3);
    let mut mishap = Mishap::None;
    let mut was_seen = true;
    let (mut more_days, mut was_found) = (0, false);
    for day in 0..DAYS {
        play.clock.step(SignedDuration::from_hours(24));
        if was_seen {
            play.is_allowed = false;
        }
        was_found |= was_seen;
        if more_days > 0 {
            more_days -= 1;
            if mishap == Mishap::Paused && !was_found {
                play.keep_fewer();
            }
        } else {
            play.end(mishap).await;
            // Most never for two days: by then they have settled. And not before a run has seen that the last one was taken
            // back. But another edit may follow at once on one that kept more.
            let may_happen = was_seen && matches!(mishap, Mishap::None | Mishap::Raised);
            let (was_quiet, was_raised) =
                (was_seen && mishap == Mishap::None, was_seen && mishap == Mishap::Raised);
            mishap = if may_happen && dice.one_in(2) { *mishaps.next().unwrap() } else { Mishap::None };
            play.more = if was_raised || mishap == Mishap::Raised { MORE } else { 0 };
            // An allowance for which there is no need is used up all the same.
            match mishap {
                Mishap::None if was_quiet && dice.one_in(2) => play.allow(0).await,
                Mishap::Mistyped | Mishap::Renamed | Mishap::Removed => play.allow(8 * 24).await,
                Mishap::CopiesRemoved if !play.remove_copies().await => mishap = Mishap::None,
                Mishap::SnapshotsFailed => play.fail_newest(&dice),
                Mishap::Paused => play.keep_paused(),
                _ => {}
            }
            more_days = mishap.more_days(&dice);
            was_found = false;
        }
        was_seen = false;
        play.config = config(play.setup, mishap, day);
        let context = &format!("seed {seed}, day {day}, {mishap:?}");
        if dice.one_in(3) {
            play.change_holds(&dice).await;
        }
        let is_lost = mishap == Mishap::StateNotMounted;
        let audit_log = is_lost.then(|| std::mem::take(&mut play.audit_log));
        play.state_folder = if is_lost { in_place_of("state", day) } else { "state".to_owned() };
        // The same slot again after each crash, as the daemon does.
        let slot = whole_second(play.clock.now());
        for attempt in 0..=dice.below(3) {
            let context = &format!("{context}, attempt {attempt}");
            // Before anything else goes wrong: what nothing could be written down of is not known.
            let may_rot = mishap.missing().is_none() && mishap != Mishap::CopiesRemoved && dice.one_in(6);
            let keeps_all = mishap.keeps_all() | (may_rot && play.rot(&dice).await);
            if play.setup == Setup::Owners && dice.one_in(3) {
                play.world.fault(Fault::on(Call::CreateSnapshot, Effect::CutBefore).times(3).each());
            }
            if let Some(fault) = mishap.fault() {
                play.world.fault(fault);
            }
            if mishap == Mishap::StateNotMounted && dice.one_in(2) {
                let archives = Path::new(FOLDER).join(&play.state_folder).join("archives.json.new");
                play.disk.fail_at(DiskCall::Rename, &archives, ErrorKind::Other);
            }
            let pause = Effect::Slow(Duration::from_millis(500 + dice.below(3000)));
            play.world.fault(Fault::on(Call::GetImage, pause));
            for _ in 0..dice.below(3) {
                play.world.fault(any_fault(&dice));
            }
            if dice.one_in(3) {
                any_disk_failure(&dice, &play.disk);
            }
            if dice.one_in(8) {
                play.disk.set_capacity(Some(used(&play.disk, Path::new("/")) + dice.below(100_000)));
            }
            if dice.one_in(3) {
                play.disk.stop_after(dice.below(160));
            }
            let limit = if dice.one_in(2) { dice.seconds(90) } else { Duration::MAX };
            let journals = play.files(Path::new(FOLDER), ".part.json").len();
            let night = play.night(slot, limit).await;
            let partial = play.world.log().into_iter().filter(|exchange| {
                exchange.call == Call::GetImage && exchange.status().is_some_and(|status| status == 206)
            });
            if journals > 0 {
                resumed.fetch_add(partial.count() as u64, Ordering::Relaxed);
            }
            play.disk = dice.any(&[Death::Crash, Death::Kill, Death::Chance(seed + day)]).of(&play.disk);
            play.disk.set_capacity(None);
            play.world.clear_faults();
            was_seen |= night.is_success();
            play.check(&night, mishap, keeps_all, context).await;
            if play.setup == Setup::Owners && dice.one_in(2) {
                play.take_by_hand(&dice);
            }
        }
        if let Some(of_before) = audit_log {
            play.audit_log = of_before;
            "state".clone_into(&mut play.state_folder);
        }
    }
    play.end(mishap).await;
    play.more = if was_seen && mishap == Mishap::Raised { MORE } else { 0 };
    play.config = config(play.setup, Mishap::None, 0);
    for days_left in (0..2).rev() {
        let context = &format!("seed {seed}, {days_left} quiet days to go");
        play.clock.step(SignedDuration::from_hours(24));
        let slot = whole_second(play.clock.now());
        let night = play.night(slot, Duration::MAX).await;
        play.disk = play.disk.crash();
        play.check(&night, Mishap::None, false, context).await;
        play.more = 0;
        if days_left == 0 {
            play.check_end(&night, context);
        }
    }
}

#[test]
fn whatever_goes_wrong_in_a_fortnight_of_two_zones_and_two_policies_nothing_is_lost() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds: Vec<u64> = match number("SNAPWARDEN_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("SNAPWARDEN_SEEDS").unwrap_or(SEEDS)).collect(),
    };
    let resumed = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for first in 0..threads {
            let (seeds, resumed) = (seeds.iter().skip(first).step_by(threads), &resumed);
            scope.spawn(move || {
                let mut runtime = tokio::runtime::Builder::new_current_thread();
                let runtime = runtime.enable_time().start_paused(true).build().unwrap();
                runtime.block_on(async {
                    for seed in seeds {
                        a_fortnight(*seed, resumed).await;
                    }
                });
            });
        }
    });
    assert!(seeds.len() == 1 || resumed.into_inner() > 0, "no download went on from its journal");
}
