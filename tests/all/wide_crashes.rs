//! Nothing is lost, over all that a run can do at once: two zones, policies that both decide about some instances,
//! creation, holds, allowances, templates, retention of copies, two downloads at a time, and slow lines, so that crashes hit
//! downloads whose journal has been written. On some days there is a mishap beside all that: see `mishaps`.
//!
//! The judge knows what is truly there and the plain rules, and takes from the program only its reports, which must be true.
//! `tests/guards.py` switches off the guards of `tests/guards.toml` one after the other, and says which seed finds it.
//!
//! `SNAPWARDEN_SEEDS=1000` plays more of it, `SNAPWARDEN_SEED=7` plays one of it again.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::select;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use snapwarden::archive::md5::Md5Sum;
use snapwarden::cli::assemble::{self, Seams, Use};
use snapwarden::clock::{self, Clock as _};
use snapwarden::config;
use snapwarden::config::sections::Config;
use snapwarden::credentials::Credentials;
use snapwarden::disk::{Access, Disk as _, Kind, read_file, replace_file};
use snapwarden::policy::name::PolicyName;
use snapwarden::run::context::{RunOptions, Runner};
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::sim::call::Call;
use snapwarden::sim::clock::SimClock;
use snapwarden::sim::disk::{DiskCall, MemoryDisk};
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::image::Image;
use snapwarden::sim::processes::SimProcesses;
use snapwarden::sim::randomness::SeededRandomness;
use snapwarden::sim::world::{API_KEY, API_SECRET, Template, World};
use snapwarden::snapshot::{InstanceId, Snapshot, SnapshotId, SnapshotState, TemplateId, ZoneName};
use snapwarden::state::allowances::{Allowance, AllowanceOf};
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::directory::StateDirectory;
use snapwarden::state::holds::Hold;
use snapwarden::transport::Transport;

use crate::crashes::{Death, Dice, OPERATIONS_END, Repeat, TINY, any_disk_failure, any_fault, md5_of, used};
use crate::mishaps::{Event, MORE, Mishap, Occasion, damage};
use crate::stage::{NOW, audit_log, config_text};

pub(crate) const FOLDER: &str = "/srv";

/// How many snapshots the policies keep: `nightly` of all instances, `weekly` of databases.
const NIGHTLY_KEEPS: usize = 3;
pub(crate) const WEEKLY_KEEPS: usize = 5;

/// Which copies the archive keeps.
pub(crate) const COPIES: &str = "keep_last = 2\nkeep_within = \"4d\"";
const COPIES_KEPT: usize = 2;
const COPIES_KEPT_WITHIN: SignedDuration = SignedDuration::from_hours(4 * 24);

pub(crate) const TEMPLATES_KEPT: usize = 2;

/// So many snapshots has the instance of which most vanish.
const CI_SNAPSHOTS: usize = 40;

/// Longer than a change takes to settle, and than the snapshots stay failed.
const FAILED_AFTER: &str = "30h";

const OPERATIONS_TAKE: Duration = Duration::from_secs(2);

/// Longer than the deadline of a policy.
const SLOW: Duration = Duration::from_mins(40);

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

/// The folder that a process finds at the path of the missing one: an empty one.
fn in_place_of(folder: &str, day: u64) -> String {
    format!("{folder}-not-mounted-{day}")
}

fn config(setup: Setup, mishap: Mishap, day: u64) -> Arc<Config> {
    let policies = format!(
        r#"
[archives.vault.retention]
{COPIES}
[policies.nightly]
zones = ["ch-gva-2", "de-fra-1"]
deadline = "30m"
create = true
[policies.nightly.select]
exclude_instances = ["ci-*"]
ownership = "all"
orphans = "apply"
[policies.nightly.retention]
keep_last = {NIGHTLY_KEEPS}
failed_after = "{FAILED_AFTER}"
min_keep_consistent = 1
[policies.nightly.guard]
max_delete_percent = 100
[policies.nightly.export]
archives = ["vault"]
snapshots = "newest"
concurrency = 2
[policies.nightly.promote]
name = "{{snapshot}}"
keep = {TEMPLATES_KEPT}
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
    /// Every snapshot that ever was, and its image.
    known: BTreeMap<SnapshotId, (Snapshot, Arc<Image>)>,
    /// The one snapshot of each zone that is application-consistent.
    consistent: BTreeSet<SnapshotId>,
    /// Nobody selects these: one with many snapshots, and one with a few.
    ci: [InstanceId; 2],
    /// The templates of ours of which instances were made anew.
    runs_on: BTreeMap<InstanceId, TemplateId>,
    backup: Option<Backup>,
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

/// The state directory of an earlier day, and what was known then.
struct Backup {
    files: Vec<(PathBuf, Vec<u8>)>,
    on_hold: BTreeSet<SnapshotId>,
    audit_log: String,
}

/// The runs of all policies, and the world before them.
struct Night {
    before: Vec<Snapshot>,
    templates_before: Vec<Template>,
    /// The snapshots that were deleted before something happened between two deletions.
    deleted_earlier: BTreeSet<SnapshotId>,
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
        let (mut by_hand, mut consistent) = (BTreeSet::new(), BTreeSet::new());
        for zone in &zones {
            for (name, keeps) in [("web-1", NIGHTLY_KEEPS), ("db-1", WEEKLY_KEEPS)] {
                let instance = world.add_instance(zone, name, &[]);
                world.set_disk(instance, TINY);
                for days in (1..6).rev() {
                    let taken = clock.now() - SignedDuration::from_hours(24 * days);
                    let snapshot = world.add_snapshot(instance, taken);
                    by_hand.insert(snapshot);
                    if name == "web-1" && days == 5 {
                        world.set_consistent(snapshot, Some(true));
                        consistent.insert(snapshot);
                    }
                }
                // Of others' snapshots each policy says nothing.
                instances.insert(instance, if setup == Setup::Owners { NIGHTLY_KEEPS } else { keeps });
            }
        }
        let ci = [("ci-1", CI_SNAPSHOTS), ("ci-2", 3)].map(|(name, count)| {
            let instance = world.add_instance(&zones[0], name, &[]);
            world.set_disk(instance, TINY);
            for _ in 0..count {
                by_hand.insert(world.add_snapshot(instance, clock.now()));
            }
            instance
        });
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
            known: BTreeMap::new(),
            consistent,
            ci,
            runs_on: BTreeMap::new(),
            backup: None,
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

    fn templates(&self) -> Vec<Template> {
        self.zones.iter().flat_map(|zone| self.world.templates(zone)).collect()
    }

    /// All images must be known before they can be deleted.
    fn remember_images(&mut self) {
        for snapshot in self.snapshots() {
            let image = || (snapshot.clone(), self.world.image(snapshot.id));
            self.known.entry(snapshot.id).or_insert_with(image);
        }
    }

    fn runner(&self, purpose: Use) -> Option<Runner> {
        self.runner_over(self.world.transport(), purpose)
    }

    fn runner_over(&self, transport: Arc<dyn Transport>, purpose: Use) -> Option<Runner> {
        let seams = Seams {
            transport,
            disk: Arc::new(self.disk.clone()),
            clock: Arc::new(self.clock.clone()),
            randomness: Arc::new(SeededRandomness::new(11)),
            processes: Arc::new(SimProcesses::new(Arc::new(self.clock.clone()))),
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
        if mishap.is_listing_cut() {
            let is_silent = pruning.any(|report| report.result == RunResult::Success);
            assert!(!is_silent, "{context}\nno word of what is not listed");
        }
    }

    /// Puts a snapshot on hold, or ends a hold.
    async fn change_holds(&mut self, dice: &Dice) {
        let mut found = self.snapshots();
        found.retain(|snapshot| snapshot.instance_id.is_some_and(|id| self.instances.contains_key(&id)));
        let snapshot = dice.any(&found).id;
        if self.on_hold.remove(&snapshot) {
            self.state().unhold(&self.clock, snapshot).await.unwrap();
            for mark in self.hold_marks(snapshot) {
                self.disk.remove_file(&mark).unwrap();
            }
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

    /// The newest snapshots of an instance fail, which mostly no other policy keeps.
    fn fail_newest(&mut self, dice: &Dice, count: usize) {
        let mut instances: Vec<InstanceId> = self.instances.keys().copied().collect();
        if count == 1 || !dice.one_in(4) {
            instances.retain(|id| self.webs().contains(id));
        }
        for snapshot in self.newest_good(*dice.any(&instances)).into_iter().take(count) {
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
            Mishap::SnapshotsFailed | Mishap::FailedWithoutExport => {
                for snapshot in kept {
                    self.world.set_state(snapshot, SnapshotState::Exported);
                }
            }
            Mishap::CopiesRemoved | Mishap::Between(Event::CopiesVanish) => {
                let runner = self.runner(Use::Changing).unwrap();
                runner.adopt_archive(&"vault".parse().unwrap()).await.unwrap();
            }
            Mishap::ManyVanished | Mishap::InstanceEmptied => {
                for (instance, count) in self.ci.into_iter().zip([CI_SNAPSHOTS, 3]) {
                    let there = self.of(instance).len();
                    for _ in there..count {
                        self.by_hand.insert(self.world.add_snapshot(instance, self.clock.now()));
                    }
                }
                self.remember_images();
            }
            Mishap::ConsistencyForgotten => self.say_consistency(Some(true)),
            Mishap::CreationSlow => self.world.set_operations_take(OPERATIONS_TAKE),
            _ => {}
        }
    }

    /// What the platform says of the one snapshot of each zone that is application-consistent.
    fn say_consistency(&self, is_consistent: Option<bool>) {
        for snapshot in &self.consistent {
            self.world.set_consistent(*snapshot, is_consistent);
        }
    }

    /// Those of which one policy alone keeps snapshots.
    fn webs(&self) -> Vec<InstanceId> {
        let of_zone = |zone| {
            let of = self.consistent.iter().filter_map(|id| self.known[id].0.instance_id);
            of.filter(|id| self.world.snapshots(zone).iter().any(|one| one.instance_id == Some(*id)))
                .collect::<Vec<_>>()
        };
        self.zones.iter().flat_map(of_zone).collect()
    }

    /// The snapshots of an instance.
    fn of(&self, instance: InstanceId) -> Vec<Snapshot> {
        let mut all = self.snapshots();
        all.retain(|snapshot| snapshot.instance_id == Some(instance));
        all
    }

    /// Strangers delete all snapshots of an instance, but for some.
    fn remove_others(&self, instance: InstanceId, left: usize) {
        for snapshot in self.of(instance).iter().skip(left) {
            self.world.remove_snapshot(snapshot.id);
        }
    }

    /// There are more to delete than the one of each night.
    fn add_old(&mut self) {
        for instance in self.webs() {
            for hours in 0..4 {
                let taken = self.clock.now() - SignedDuration::from_hours(20 * 24 + hours);
                self.by_hand.insert(self.world.add_snapshot(instance, taken));
            }
        }
        self.remember_images();
    }

    /// An instance is made anew of its oldest template.
    fn use_template(&mut self, dice: &Dice) {
        let instance = *dice.any(&self.webs());
        let is_of =
            |template: &&Template| self.made_of(template).is_some_and(|of| of.instance_id == Some(instance));
        let templates = self.templates();
        let oldest = templates.iter().filter(is_of).min_by_key(|template| template.created_at);
        if let Some(oldest) = oldest {
            self.world.set_template(instance, oldest.id);
            self.runs_on.insert(instance, oldest.id);
        }
    }

    /// The snapshot that a template was made of.
    fn made_of(&self, template: &Template) -> Option<&Snapshot> {
        Some(&self.known.get(&template.name.parse().ok()?)?.0)
    }

    /// An edit is taken back for an hour, in which one of two policies runs.
    async fn take_back_for_an_hour(&mut self, context: &str) {
        self.config = config(self.setup, Mishap::None, 0);
        let slot = whole_second(self.clock.now());
        let night = self.night_with(slot, Duration::MAX, None, |name| name.as_str() == "nightly").await;
        self.disk = self.disk.crash();
        self.check(&night, Mishap::None, false, context).await;
        // What more was kept before is no matter any more.
        self.more = 0;
        self.clock.step(SignedDuration::from_hours(1));
    }

    /// A copy of the state directory, made while nothing is wrong.
    fn back_up(&mut self) {
        let read = |path: PathBuf| {
            let bytes = read_file(&self.disk, &path, 1 << 24).unwrap();
            (path, bytes)
        };
        let files = self.files(&Path::new(FOLDER).join("state"), "").into_iter().map(read).collect();
        let (on_hold, audit_log) = (self.on_hold.clone(), self.audit_log.clone());
        self.backup = Some(Backup { files, on_hold, audit_log });
    }

    /// The state directory is as it was then. What was found corrupt since, and could be noted nowhere else, can't be known.
    fn restore_state(&mut self) -> bool {
        if self.backup.is_none() || !self.rotten.is_empty() {
            return false;
        }
        let Some(Backup { files, on_hold, audit_log }) = self.backup.take() else { return false };
        for path in self.files(&Path::new(FOLDER).join("state"), "") {
            self.disk.remove_file(&path).unwrap();
        }
        for (path, bytes) in files {
            replace_file(&self.disk, &path, &bytes, Access::Owner).unwrap();
        }
        (self.on_hold, self.audit_log) = (on_hold, audit_log);
        true
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
            damage(&self.disk, &copy.image());
        }
        let is_read_only = dice.one_in(2);
        let read_only = is_read_only.then_some(ErrorKind::ReadOnlyFilesystem);
        self.disk.set_unwritable(&Path::new(FOLDER).join("vault"), read_only);
        runner.verifier(archive).verify(100, &|_, _| {}).await.unwrap();
        is_read_only
    }

    /// All policies, one after the other, in a process of its own, which is killed after `limit`.
    async fn night(&mut self, slot: Timestamp, limit: Duration) -> Night {
        self.night_with(slot, limit, None, |_| true).await
    }

    async fn night_with(
        &mut self,
        slot: Timestamp,
        limit: Duration,
        occasion: Option<Arc<Occasion>>,
        runs: fn(&PolicyName) -> bool,
    ) -> Night {
        self.world.clear_log();
        let (before, templates_before) = (self.snapshots(), self.templates());
        let (mut reports, mut due) = (Vec::new(), 1);
        let changed = occasion.as_ref().map(|occasion| occasion.changed.clone()).unwrap_or_default();
        let killed = occasion.as_ref().map(|occasion| occasion.killed.clone()).unwrap_or_default();
        let transport: Arc<dyn Transport> = match &occasion {
            Some(occasion) => occasion.clone(),
            None => self.world.transport(),
        };
        if let Some(runner) = self.runner_over(transport, Use::Changing) {
            let options = RunOptions { slot: Some(slot), changed, ..RunOptions::default() };
            due = runner.policies.iter().filter(|policy| policy.enabled).count();
            let all = std::pin::pin!(async {
                for policy in runner.policies.iter().filter(|policy| policy.enabled && runs(&policy.name)) {
                    if !occasion.as_ref().is_some_and(|occasion| occasion.ends_the_night()) {
                        reports.extend(runner.run(policy, &options).await);
                    }
                }
            });
            let killed = std::pin::pin!(killed.cancelled());
            let _ = clock::timeout(&self.clock, limit, select(all, killed)).await;
        }
        self.clock.sleep(OPERATIONS_END).await;
        self.remember_images();
        let id = |path: String| path.rsplit('/').next().and_then(|id| id.parse().ok());
        let deleted_earlier = occasion.iter().flat_map(|occasion| occasion.earlier_deletions());
        let deleted_earlier = deleted_earlier.filter_map(id).collect();
        Night { before, templates_before, deleted_earlier, slot, due, reports }
    }

    /// The event of the night is over; the deletions after it are judged.
    async fn end_of(&mut self, occasion: &Occasion, context: &str) {
        let lost = occasion.end(&self.disk, |id| self.on_hold.contains(id)).await;
        for snapshot in lost {
            self.rotten.insert(snapshot);
            for copies in self.copies.values_mut() {
                copies.retain(|copy| copy.1 != snapshot);
            }
        }
        let forbidden = occasion.forbidden_deletions();
        assert!(forbidden.is_empty(), "{context}\ndeleted after {occasion:?}: {forbidden:?}");
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
            assert!(!self.consistent.contains(&snapshot.id), "{context}\nthe consistent one: {snapshot:?}");
            let instance = snapshot.instance_id.unwrap();
            assert!(!self.ci.contains(&instance), "{context}\nno policy selects it: {snapshot:?}");
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
            assert!(
                newest_copy >= Some(&key) || night.deleted_earlier.contains(&snapshot.id),
                "{context}\ndeleted without a verified copy: {snapshot:?}"
            );
            let is_of_slot = |other: &&Snapshot| {
                other.instance_id == Some(instance)
                    && other.created_at >= night.slot
                    && (other.state.is_good() || other.state.is_in_flight())
            };
            let is_missing =
                night.has_created() && !self.is_allowed && !after.iter().any(|other| is_of_slot(&other));
            assert!(!is_missing, "{context}\ndeleted although the newest is missing: {snapshot:?}");
        }

        // What is reported as deleted is not there.
        let steps = night.reports.iter().flat_map(|report| &report.zones).flat_map(|zone| &zone.steps);
        let mut done =
            steps.filter(|step| (step.facts.action, step.outcome) == (Action::Delete, StepOutcome::Done));
        let false_report = done.find(|step| step.facts.snapshot.id.is_some_and(|id| there.contains(&id)));
        assert!(false_report.is_none(), "{context}\nreported as deleted: {false_report:?}");
        self.check_templates(night, context);

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

    /// A template that was deleted had newer ones beside it, no instance runs on it, and its snapshot is not on hold.
    fn check_templates(&self, night: &Night, context: &str) {
        let after = self.templates();
        for template in &night.templates_before {
            if after.iter().any(|other| other.id == template.id) {
                continue;
            }
            let Some(of) = self.made_of(template) else { panic!("{context}\nnot ours: {template:?}") };
            let is_newer = |other: &&Template| {
                let other = self.made_of(other);
                other.is_some_and(|other| {
                    other.instance_id == of.instance_id && other.created_at > of.created_at
                })
            };
            let newer: BTreeSet<&String> = night
                .templates_before
                .iter()
                .chain(&after)
                .filter(is_newer)
                .map(|other| &other.name)
                .collect();
            assert!(newer.len() >= TEMPLATES_KEPT, "{context}\ndeleted too early: {template:?}");
            assert!(!self.on_hold.contains(&of.id), "{context}\nits snapshot is on hold: {template:?}");
            let is_used = self.runs_on.values().any(|used| *used == template.id);
            assert!(!is_used, "{context}\nan instance runs on it: {template:?}");
        }
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
                Call::PromoteSnapshot => ("promote", "/snapshot/id"),
                Call::DeleteTemplate => ("delete_template", "/template_id"),
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
            let (snapshot, image) = (&copy.manifest.snapshot, copy.image().display().to_string());
            let bytes = read_file(&self.disk, &copy.image(), 1 << 30);
            let bytes = bytes.unwrap_or_else(|error| panic!("{context}\n{image}: {error}"));
            let truth: Md5Sum = self.known[&snapshot.id].1.md5().parse().unwrap();
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
            let is_young = |copy: &CopyKey| copy.0 + COPIES_KEPT_WITHIN >= self.world.now();
            let must_stay = |(place, copy): &(usize, &CopyKey)| *place < COPIES_KEPT || is_young(copy);
            for (_, copy) in all.iter().rev().enumerate().filter(must_stay) {
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
            // A mark in the archive outlives a state that was restored from before its hold.
            let is_on_hold = |id: &SnapshotId| self.on_hold.contains(id) || !self.hold_marks(*id).is_empty();
            let is_kept = |id: &SnapshotId| is_on_hold(id) || self.consistent.contains(id);
            let may_stay = |id: &SnapshotId| is_kept(id) || busy.contains(id);
            let left = of_instance.iter().skip(*keeps).find(|snapshot| !may_stay(&snapshot.id));
            assert!(left.is_none(), "{context}\nshould be deleted: {left:?}");
            let is_old = |copy: &CopyKey| {
                copy.0 + COPIES_KEPT_WITHIN + SignedDuration::from_hours(1) < self.world.now()
            };
            let copies = self.copies[instance].iter().rev().skip(COPIES_KEPT);
            let copies = copies.filter(|copy| is_old(copy)).find(|copy| !is_on_hold(&copy.1));
            assert!(
                copies.is_none(),
                "{context}\na copy that should be deleted: {copies:?}\n{:#?}",
                night.reports
            );
        }
    }

    /// The marks of holds on a snapshot, beside its copies.
    fn hold_marks(&self, snapshot: SnapshotId) -> Vec<PathBuf> {
        let mut found = self.files(Path::new(FOLDER), ".json");
        found.retain(|path| path.to_string_lossy().contains(&format!("{snapshot}.hold-")));
        found
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
    let first = usize::try_from(seed).unwrap() * 5 % Mishap::ALL.len();
    let mut mishaps = Mishap::ALL.iter().cycle().skip(first);
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
            match mishap {
                Mishap::Paused if !was_found => play.keep_fewer(),
                Mishap::FailedWithoutExport if play.kept.is_empty() => play.fail_newest(&dice, 1),
                Mishap::MistypedTwice => {
                    play.take_back_for_an_hour(&format!("seed {seed}, day {day}, taken back")).await;
                }
                _ => {}
            }
        } else {
            play.end(mishap).await;
            // Most never for two days: by then they have settled. And not before a run has seen that the last one was taken
            // back. But another edit may follow at once on one that kept more.
            let may_happen = was_seen && matches!(mishap, Mishap::None | Mishap::Raised);
            let (was_quiet, was_raised) =
                (was_seen && mishap == Mishap::None, was_seen && mishap == Mishap::Raised);
            mishap = if may_happen && !dice.one_in(4) { *mishaps.next().unwrap() } else { Mishap::None };
            play.more = if was_raised || mishap == Mishap::Raised { MORE } else { 0 };
            // An allowance for which there is no need is used up all the same.
            match mishap {
                Mishap::None if was_quiet && dice.one_in(2) => play.allow(0).await,
                Mishap::None if was_quiet => play.back_up(),
                Mishap::Mistyped | Mishap::Renamed | Mishap::Removed => play.allow(8 * 24).await,
                Mishap::CopiesRemoved if !play.remove_copies().await => mishap = Mishap::None,
                Mishap::StateRestored if !play.restore_state() => mishap = Mishap::None,
                Mishap::SnapshotsFailed => play.fail_newest(&dice, 2),
                Mishap::ManyVanished => play.remove_others(play.ci[0], 1),
                Mishap::InstanceEmptied => play.remove_others(play.ci[1], 0),
                Mishap::ConsistencyForgotten => play.say_consistency(None),
                Mishap::CreationSlow => {
                    play.world.set_operations_take(SLOW);
                    play.add_old();
                }
                Mishap::Between(_) => play.add_old(),
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
        if dice.one_in(3) {
            play.use_template(&dice);
        }
        let is_lost = mishap == Mishap::StateNotMounted;
        let audit_log = is_lost.then(|| std::mem::take(&mut play.audit_log));
        play.state_folder = if is_lost { in_place_of("state", day) } else { "state".to_owned() };
        // The same slot again after each crash, as the daemon does.
        let slot = whole_second(play.clock.now());
        for attempt in 0..=dice.below(3) {
            let context = &format!("{context}, attempt {attempt}");
            // Before anything else goes wrong: what nothing could be written down of is not known.
            let is_alone = mishap.comes_alone();
            let has_archive = mishap.missing().is_none() && mishap != Mishap::CopiesRemoved;
            let may_rot = has_archive && !is_alone && dice.one_in(6);
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
            let mut limit = Duration::MAX;
            if !is_alone {
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
                if dice.one_in(2) {
                    limit = dice.seconds(90);
                }
            }
            let journals = play.files(Path::new(FOLDER), ".part.json").len();
            let occasion = match play.runner(Use::Changing) {
                Some(other) if is_alone => {
                    Occasion::new(mishap, &dice, (&play.world, &play.disk, &play.clock), other)
                }
                _ => None,
            };
            let night = play.night_with(slot, limit, occasion.clone(), |_| true).await;
            if mishap == Mishap::CreationSlow {
                play.clock.sleep(SLOW).await;
            }
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
            if let Some(occasion) = &occasion {
                play.end_of(occasion, &format!("{context}\n{:#?}", night.reports)).await;
            }
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
