//! One seed: the nights of a fleet, and what must hold after each of them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::{FutureExt as _, join};
use http::StatusCode;
use jiff::{SignedDuration, Timestamp};
use snapwarden::archive::backend::Archive;
use snapwarden::cli::assemble::Use;
use snapwarden::clock::{self, Clock as _};
use snapwarden::config;
use snapwarden::config::sections::Config;
use snapwarden::disk::Disk as _;
use snapwarden::judge::facts::InstanceFacts;
use snapwarden::policy::name::PolicyName;
use snapwarden::run::context::Runner;
use snapwarden::run::report::{RunReport, RunResult, Step};
use snapwarden::sim::world::Somebody;
use snapwarden::snapshot::{InstanceId, Snapshot, SnapshotId, SnapshotState, ZoneName};
use snapwarden::state::allowances::{Allowance, AllowanceOf};
use snapwarden::state::audit::{Action, StepOutcome};
use snapwarden::state::holds::Hold;

use super::book::{Copies, End as Ended};
use super::fleet::{Edit, FOLDER, Fleet, Parts, REPOSITORY, Store};
use super::machine::{Line, Machine, audit_files, is_intention, key_file, killed_after};
use super::told::{Told, Truth, selects};
use super::troubles::{Attempt, Crew, End, Reload};
use crate::crashes::{Death, Dice, OPERATIONS_END, TINY};

/// What was played.
#[derive(Debug, Default)]
pub(super) struct Played {
    pub(super) nights: u64,
    pub(super) hours: f64,
    /// How often each thing happened.
    counts: BTreeMap<&'static str, u64>,
}

impl Played {
    pub(super) fn add(&mut self, other: &Self) {
        self.nights += other.nights;
        self.hours += other.hours;
        for (what, count) in &other.counts {
            *self.counts.entry(what).or_default() += count;
        }
    }

    fn count(&mut self, what: &'static str, count: usize) {
        *self.counts.entry(what).or_default() += count as u64;
    }

    pub(super) fn sums(&self) -> String {
        let sums = self.counts.iter().map(|(what, count)| format!("{count} {what}"));
        sums.collect::<Vec<_>>().join(", ")
    }

    /// Whether everything happened that the program is for, and everything by which it may be stopped.
    pub(super) fn has_all(&self) -> bool {
        const ALL: [&str; 9] = [
            "created",
            "deleted",
            "copies",
            "pruned copies",
            "deleted templates",
            "killed",
            "daemons",
            "pending deletions",
            "successful runs",
        ];
        ALL.iter().all(|what| self.counts.get(what).is_some_and(|count| *count > 0))
    }
}

/// A copy's place in the order of its instance's copies.
type CopyKey = (Timestamp, SnapshotId);

struct Life {
    seed: u64,
    dice: Dice,
    fleet: Fleet,
    machine: Machine,
    /// As it is now.
    parts: Parts,
    /// For how many more nights the edit lasts.
    edited_for: u64,
    /// What no archive may have fewer of: the least that any configuration of the last days kept.
    kept_copies: Vec<(Timestamp, Parts)>,
    copies: BTreeMap<Store, Copies>,
    /// Copies that strangers damaged or removed.
    lost: BTreeSet<(&'static str, SnapshotId)>,
    slot_creations: BTreeMap<InstanceId, Vec<SnapshotId>>,
    played: Played,
    told: Told,
    /// An archive needs its operator.
    is_to_adopt: bool,
    /// A run met the archive's folder without its disk.
    was_unmounted: bool,
    /// The configurations so far, by their texts.
    configs: RefCell<BTreeMap<String, Arc<Config>>>,
}

fn state_directory() -> PathBuf {
    Path::new(FOLDER).join("state")
}

/// Slots and the API's timestamps have no fractions.
fn whole_second(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap()
}

/// Plays a seed, or its first nights.
pub(super) async fn a_life(seed: u64, nights: u64) -> Played {
    live(&mut Life::new(seed), nights).await
}

/// All that is seen of a seed's first nights, line by line.
pub(super) async fn a_traced_life(seed: u64, nights: u64) -> Vec<String> {
    let mut life = Life::new(seed);
    life.machine.book().trace = Some(Vec::new());
    live(&mut life, nights).await;
    life.machine.book().trace.take().unwrap_or_default()
}

async fn live(life: &mut Life, nights: u64) -> Played {
    let seed = life.seed;
    let started = life.machine.clock.now();
    for night in 0..life.fleet.pace.nights().min(nights) {
        let context = format!("seed {seed}, night {night}");
        let step = life.fleet.pace.step(&life.dice);
        life.machine.clock.step(step);
        if night > 0 {
            life.strangers_act();
            life.operator_acts().await;
        }
        let slot = whole_second(life.machine.clock.now());
        life.slot_creations.clear();
        for attempt in 0..=life.dice.below(3).saturating_sub(life.dice.below(2)) {
            let drawn = if night == 0 { Attempt::quiet() } else { life.draw() };
            life.night(slot, &drawn, &format!("{context}, attempt {attempt}, {drawn:?}")).boxed_local().await;
            if life.dice.one_in(2) {
                life.machine
                    .clock
                    .step(SignedDuration::from_mins(i64::try_from(life.dice.below(180)).unwrap()));
            }
        }
    }
    life.rest().boxed_local().await;
    life.played.hours = life.machine.clock.now().duration_since(started).as_secs_f64() / 3600.0;
    std::mem::take(&mut life.played)
}

impl Life {
    fn new(seed: u64) -> Self {
        let dice = Dice(snapwarden::sim::randomness::SeededRandomness::new(seed));
        let fleet = Fleet::draw(&dice);
        // Near the clock changes, the leap day and the ends of years.
        let starts =
            ["2026-11-01T02:30:00Z", "2027-03-20T02:30:00Z", "2027-12-20T02:30:00Z", "2028-02-10T02:30:00Z"];
        let start = dice.any(&starts).parse().unwrap();
        let machine = Machine::new(seed, &fleet.zones, fleet.keeps_versions, start);
        let mut life = Self {
            seed,
            dice,
            parts: fleet.parts.clone(),
            kept_copies: vec![(start, fleet.parts.clone())],
            fleet,
            machine,
            edited_for: 0,
            copies: BTreeMap::new(),
            lost: BTreeSet::new(),
            slot_creations: BTreeMap::new(),
            played: Played::default(),
            told: Told::default(),
            is_to_adopt: false,
            was_unmounted: false,
            configs: RefCell::default(),
        };
        for (zone, name, tier) in life.fleet.instances.clone() {
            let instance = life.add_instance(&life.machine.zones[zone].clone(), name, tier);
            for nights in (1..=life.dice.below(6)).rev() {
                let ago = life.fleet.pace.step(&life.dice) * i32::try_from(nights).unwrap();
                life.machine.world.add_snapshot(instance, life.machine.clock.now() - ago);
            }
        }
        life.remember();
        life
    }

    fn add_instance(&mut self, zone: &ZoneName, name: &str, tier: &str) -> InstanceId {
        let id = self.machine.world.add_instance(zone, name, &[("tier", tier)]);
        self.machine.world.set_disk(id, TINY);
        self.machine.book().created_at.insert(id, self.machine.clock.now());
        self.tell_of_instance(id, zone, name, tier);
        id
    }

    fn tell_of_instance(&mut self, id: InstanceId, zone: &ZoneName, name: &str, tier: &str) {
        let labels = BTreeMap::from([("tier".to_owned(), tier.to_owned())]);
        let facts = InstanceFacts { id, name: name.to_owned(), labels, is_managed: false };
        self.machine.book().instances.insert(id, (zone.clone(), facts));
    }

    fn remember(&self) {
        self.machine.book().remember(&self.machine.world, &self.machine.zones);
    }

    fn snapshots(&self) -> Vec<Snapshot> {
        self.machine.zones.iter().flat_map(|zone| self.machine.world.snapshots(zone)).collect()
    }

    /// The configuration of now.
    fn config(&self, vault: &str) -> Arc<Config> {
        let text = self.parts.text("state", vault, key_file());
        let read = |text: &String| {
            let read = config::parse(text, "test.toml", None);
            Arc::new(read.unwrap_or_else(|found| panic!("{found}\n{text}")))
        };
        let mut configs = self.configs.borrow_mut();
        Arc::clone(configs.entry(text).or_insert_with_key(read))
    }

    /// A process that is let do its work; what it changes is safe.
    fn runner(&self, purpose: Use) -> (super::machine::Process, Runner) {
        let process = self.machine.process("state", Line::default());
        let runner = process.runner(&self.config("vault"), purpose);
        (process, runner.unwrap_or_else(|| panic!("seed {}: no runner", self.seed)))
    }

    /// What people do in the portal.
    fn strangers_act(&mut self) {
        let (world, now) = (self.machine.world.clone(), self.machine.clock.now());
        let instances: Vec<InstanceId> = self.machine.book().instances.keys().copied().collect();
        let (dice, there) = (&self.dice, self.snapshots());
        if dice.one_in(5) && !instances.is_empty() {
            let id = world.add_snapshot(*dice.any(&instances), now);
            if dice.one_in(3) {
                world.set_state(id, SnapshotState::Error);
            }
        }
        if dice.one_in(12) && !there.is_empty() {
            let id = dice.any(&there).id;
            let end = if dice.one_in(4) {
                world.remove_snapshot(id);
                Ended::Nobody
            } else {
                let address = format!("192.0.2.{}", dice.below(256));
                let by = if dice.one_in(2) {
                    Somebody::User("ops@example.org".to_owned())
                } else {
                    Somebody::Key("terraform".to_owned(), "EXOfedcba9876543210".to_owned())
                };
                world.delete_snapshot_as(id, by, &address);
                Ended::Somebody(address)
            };
            self.machine.book().ends.insert(id, (end, now));
        }
        if dice.one_in(25) && !instances.is_empty() {
            let id = *dice.any(&instances);
            let (name, tier) =
                *dice.any(&[("web-7", "web"), ("db-7", "db"), ("db-8", "web"), ("other", "none")]);
            world.rename_instance(id, name, &[("tier", tier)]);
            let zone = self.machine.book().instances[&id].0.clone();
            self.tell_of_instance(id, &zone, name, tier);
        }
        if self.dice.one_in(40) && instances.len() > 1 {
            let id = *self.dice.any(&instances);
            for snapshot in self.snapshots().iter().filter(|snapshot| snapshot.instance_id == Some(id)) {
                self.machine.book().ends.insert(snapshot.id, (Ended::WithInstance, now));
            }
            world.remove_instance(id);
            self.machine.book().instances.remove(&id);
        }
        if self.dice.one_in(40) {
            let zone = self.dice.any(&self.machine.zones).clone();
            let (name, tier) = *self.dice.any(&[("web-9", "web"), ("db-9", "db"), ("ci-9", "none")]);
            self.add_instance(&zone, name, tier);
        }
        self.remember();
    }

    /// What the operator does, and what happens to the archives meanwhile.
    async fn operator_acts(&mut self) {
        if self.edited_for > 0 {
            self.edited_for -= 1;
            if self.edited_for == 0 {
                self.edit(self.fleet.parts.clone());
            }
        } else if self.dice.one_in(8) {
            let edit = *self.dice.any(&Edit::ALL);
            self.edited_for = 1 + self.dice.below(2);
            self.edit(edit.of(&self.fleet.parts, &self.dice));
        }
        if self.is_to_adopt && self.dice.one_in(2) {
            self.adopt().await;
        }
        let there = self.snapshots();
        if self.dice.one_in(10) && !there.is_empty() {
            let snapshot = self.dice.any(&there).id;
            let until = self.machine.clock.now() + self.fleet.pace.step(&self.dice) * 3;
            let hold = Hold {
                snapshot,
                until: Some(until),
                reason: None,
                since: self.machine.clock.now(),
                about: None,
            };
            let (_process, runner) = self.runner(Use::Changing);
            runner.state.hold(&self.machine.clock, hold).await.unwrap();
            self.machine.book().on_hold.insert(snapshot, until);
        }
        if self.dice.one_in(15) {
            self.allow().await;
        }
        self.pause_or_resume().await;
        if self.dice.one_in(12) {
            self.lose_copies().await;
        }
    }

    /// Policies are paused by hand, and resumed some nights later.
    async fn pause_or_resume(&mut self) {
        let paused: Vec<PolicyName> = self.machine.book().paused.keys().cloned().collect();
        for policy in paused {
            if self.dice.one_in(3) {
                self.resume(policy).await;
            }
        }
        if self.dice.one_in(14) {
            let policy: PolicyName = self.dice.any(&self.parts.policies).name.parse().unwrap();
            let since = self.machine.clock.now();
            let (_process, runner) = self.runner(Use::Changing);
            runner.state.pause(&self.machine.clock, policy.clone(), since).await.unwrap();
            self.machine.book().paused.entry(policy).or_insert(since);
            self.played.count("pauses", 1);
        }
    }

    async fn resume(&mut self, policy: PolicyName) {
        let (_process, runner) = self.runner(Use::Changing);
        runner.state.resume(&self.machine.clock, policy.clone()).await.unwrap();
        self.machine.book().paused.remove(&policy);
    }

    fn draw(&self) -> Attempt {
        let all_settles = self.parts.policies.iter().all(|policy| !policy.settle().is_zero());
        let all_settles = all_settles && self.machine.book().allowed.is_empty();
        Attempt::draw(&self.dice, &self.machine, all_settles)
    }

    fn edit(&mut self, parts: Parts) {
        if parts != self.parts {
            self.kept_copies.push((self.machine.clock.now(), parts.clone()));
            self.parts = parts;
        }
    }

    async fn allow(&mut self) {
        let (_process, runner) = self.runner(Use::Changing);
        let given_at = self.machine.clock.now();
        for policy in &runner.policies {
            let of = AllowanceOf::Policy(policy.name.clone());
            let allowance = Allowance { of, zone: None, deletes: 1000, given_at, ends_at: None };
            runner.state.allow(&self.machine.clock, allowance).await.unwrap();
            self.machine.book().allowed.insert(policy.name.clone());
        }
    }

    async fn adopt(&mut self) {
        let (_process, runner) = self.runner(Use::Changing);
        for name in runner.archives.keys() {
            runner.adopt_archive(name).await.unwrap_or_else(|error| panic!("seed {}: {error:?}", self.seed));
        }
        self.is_to_adopt = false;
    }

    /// Copies rot, or are removed by others: one, or all of an archive.
    async fn lose_copies(&mut self) {
        let stores: Vec<Store> = self.parts.archives.keys().copied().collect();
        if stores.is_empty() {
            return;
        }
        let store = *self.dice.any(&stores);
        let intact: Vec<SnapshotId> = self.true_copies(store).intact.into_keys().collect();
        if intact.is_empty() {
            return;
        }
        let count = if self.dice.one_in(4) { intact.len() } else { 1 };
        let is_rotten = self.dice.one_in(2);
        let first = usize::try_from(self.dice.below(intact.len() as u64)).unwrap();
        let chosen: BTreeSet<SnapshotId> = intact.iter().cycle().skip(first).take(count).copied().collect();
        for id in &chosen {
            self.lost.insert((store.name(), *id));
            if is_rotten {
                self.machine.book().unfound.insert((store.name(), *id));
                damage(&self.machine, store, *id);
            } else {
                remove(&self.machine, store, *id);
                self.is_to_adopt = true;
            }
        }
        if let Some(copies) = self.copies.get_mut(&store) {
            copies.intact.retain(|id, _| !chosen.contains(id));
        }
        if is_rotten && !self.dice.one_in(3) {
            self.verify().await;
        }
    }

    /// Every archive is verified, and no damage is unknown any more.
    async fn verify(&mut self) {
        let (_process, runner) = self.runner(Use::Changing);
        for archive in runner.archives.values() {
            let verified = runner.verifier(archive).verify(100, &|_, _| {}).await;
            if verified.is_ok() {
                self.machine.book().unfound.retain(|(name, _)| *name != archive.name().as_str());
            }
        }
    }

    fn true_copies(&self, store: Store) -> Copies {
        let Machine { disk, bucket, restic, .. } = &self.machine;
        self.machine.book().copies(store, (disk, bucket, restic))
    }

    /// One attempt to run all policies, and what must hold after it.
    async fn night(&mut self, slot: Timestamp, attempt: &Attempt, context: &str) -> Vec<RunReport> {
        self.played.nights += 1;
        let vault = if attempt.is_unmounted { "not-mounted" } else { "vault" };
        let config = self.config(vault);
        let before = self.parts.clone();
        {
            let mut book = self.machine.book();
            book.configure(&config);
            book.meddled.clear();
            book.slot = (attempt.crew == Crew::Once).then_some(slot);
            book.deletions.clear();
            book.creations.clear();
            book.unwritten.clear();
            book.wrong_templates.clear();
            book.deleted_templates = 0;
        }
        self.machine.world.clear_log();
        if attempt.reload == Some(Reload::Edited) {
            let edit = *self.dice.any(&Edit::ALL);
            self.edited_for = 1 + self.dice.below(2);
            self.edit(edit.of(&self.fleet.parts, &self.dice));
        }
        let reloaded = attempt.reload.map(|_| self.config(vault));
        let reports = self.run(slot, attempt, (&config, reloaded)).boxed_local().await;
        let death = match self.dice.below(3) {
            0 => Death::Crash,
            1 => Death::Kill,
            _ => Death::Chance(self.dice.below(u64::MAX)),
        };
        self.machine.disk = death.of(&self.machine.disk);
        attempt.clear(&self.machine);
        self.machine.clock.sleep(OPERATIONS_END).await;
        self.machine.book().trace(|| format!("{context}: {reports:?}"));
        self.machine.trace();
        self.check(attempt, &reports, &before, context).await;
        reports
    }

    async fn run(
        &mut self,
        slot: Timestamp,
        attempt: &Attempt,
        (config, reloaded): (&Config, Option<Arc<Config>>),
    ) -> Vec<RunReport> {
        self.was_unmounted |= attempt.is_unmounted;
        let reports = Mutex::new(Vec::new());
        let process = self.machine.process("state", attempt.line.clone());
        let work = async {
            match attempt.crew {
                Crew::Once => process.once(config, slot, false, &reports).await,
                Crew::Twice => {
                    let other = self.machine.process("state", attempt.line.clone());
                    let both = [
                        process.once(config, slot, false, &reports),
                        other.once(config, slot, true, &reports),
                    ];
                    let [one, two] = both;
                    join(one, two).await;
                }
                Crew::Daemon => {
                    process.daemon(config, Duration::from_secs(150), reloaded).await;
                }
            }
        };
        let is_over = match attempt.end {
            End::Orderly => {
                work.await;
                Some(())
            }
            End::Killed(steps) => killed_after(steps, work.boxed_local()).await,
            End::Late(limit) => clock::timeout(&self.machine.clock, limit, work.boxed_local()).await.ok(),
        };
        drop(process);
        if is_over.is_none() {
            self.played.count("killed", 1);
        }
        if attempt.crew == Crew::Daemon {
            self.played.count("daemons", 1);
        }
        reports.into_inner().unwrap()
    }

    async fn check(&mut self, attempt: &Attempt, reports: &[RunReport], before: &Parts, context: &str) {
        self.remember();
        let config = self.parts.text("state", "vault", key_file());
        let said = |context: &str| format!("{context}\n{config}\n{reports:#?}");
        {
            let mut book = self.machine.book();
            assert!(
                book.unwritten.is_empty(),
                "not written down before: {:?}\n{}",
                book.unwritten,
                said(context)
            );
            assert!(
                book.wrong_templates.is_empty(),
                "templates deleted: {:?}\n{}",
                book.wrong_templates,
                said(context)
            );
            if let Some((victim, objection)) = book.objections([&self.parts, before]) {
                panic!("deleted: {objection}\n{:?}\n{}", book.known[&victim].snapshot, said(context));
            }
        }
        let disagreement = self.machine.disk.files(&state_directory()).into_iter().find(|(path, _)| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("disagreement-"))
        });
        if let Some((_, case)) = disagreement {
            panic!("the judges disagree: {}\n{}", String::from_utf8_lossy(&case), said(context));
        }
        // What an earlier night broke may still be in the way of a run, but it begins.
        if attempt.is_quiet && attempt.crew == Crew::Once {
            let enabled = self.machine.book().policies.iter().filter(|policy| policy.enabled).count();
            assert_eq!(reports.len(), enabled, "a policy did not run\n{}", said(context));
        }
        self.check_creations(attempt, &said, context);
        self.check_copies(&said, context).await;
        self.check_reports(attempt, reports, &said, context);
        let there: BTreeSet<SnapshotId> = self.snapshots().iter().map(|snapshot| snapshot.id).collect();
        let now = self.machine.world.now();
        let book = &mut *self.machine.book();
        if !attempt.is_seeing() {
            book.has_lied |= attempt.line.lie.is_some();
            book.known.values_mut().for_each(|known| known.seen_failed_at.clear());
        }
        let steps = reports.iter().flat_map(|report| &report.zones).flat_map(|zone| &zone.steps);
        for step in
            steps.filter(|step| step.facts.action == Action::Create && step.outcome == StepOutcome::Done)
        {
            // After a lost answer it is nobody's.
            book.surely_ours.extend(step.facts.snapshot.id.filter(|_| step.message.is_none()));
        }
        for policy in std::mem::take(&mut book.used_up) {
            if book.allowed.remove(&policy) {
                // What was allowed has settled.
                for (_, formers) in book.memories.iter_mut().filter(|((name, _), _)| *name == policy) {
                    formers.retain(|former| former.replaced_at.is_none());
                }
            }
        }
        let (deletions, creations) = (book.deletions.len(), std::mem::take(&mut book.creations));
        self.played.count("deleted templates", book.deleted_templates);
        self.played.count("created", creations.len());
        self.played.count("deleted", deletions);
        let names: BTreeSet<&PolicyName> = book.policies.iter().map(|policy| &policy.name).collect();
        for known in book.known.values_mut() {
            known.seen_failed_at.retain(|name, _| names.contains(name));
            known.seen_good_by.retain(|name| names.contains(name));
        }
        let enabled = book.policies.iter().filter(|policy| policy.enabled).count();
        if attempt.crew == Crew::Once
            && reports.len() == enabled
            && reports.iter().all(|report| report.result == RunResult::Success)
        {
            let zones: BTreeSet<&ZoneName> =
                reports.iter().flat_map(|report| &report.zones).map(|report| &report.zone).collect();
            for (id, known) in book.known.iter_mut().filter(|(id, _)| !book.meddled.contains(id)) {
                for RunReport { policy, .. } in reports {
                    if known.snapshot.state.is_good() {
                        known.seen_good_by.insert(policy.clone());
                    }
                    if attempt.is_seeing() && known.failed_at.is_some() {
                        known.seen_failed_at.entry(policy.clone()).or_insert(now);
                    }
                }
                known.was_listed |= attempt.is_seeing() && there.contains(id) && zones.contains(&known.zone);
            }
        }
    }

    /// One snapshot for a slot, however often the run was repeated.
    fn check_creations(&mut self, attempt: &Attempt, said: &dyn Fn(&str) -> String, context: &str) {
        let book = self.machine.book();
        if attempt.crew == Crew::Daemon {
            return;
        }
        if !attempt.is_seeing() {
            self.slot_creations.clear();
            return;
        }
        for id in &book.creations {
            let known = &book.known[id];
            self.slot_creations.extend(
                known
                    .snapshot
                    .instance_id
                    .map(|instance| (instance, Vec::new()))
                    .filter(|(instance, _)| !self.slot_creations.contains_key(instance)),
            );
            if let Some(of) = known.snapshot.instance_id.and_then(|id| self.slot_creations.get_mut(&id)) {
                of.push(*id);
            }
        }
        for (instance, made) in &self.slot_creations {
            let counts = |id: &&SnapshotId| {
                book.known[*id].failed_at.is_none()
                    && !matches!(book.ends.get(*id), Some((Ended::Somebody(_), _)))
            };
            let counts = made.iter().filter(counts).count();
            assert!(counts <= 1, "two snapshots of {instance} for one slot\n{}", said(context));
        }
    }

    /// Each copy that is listed has the bytes of its snapshot, and none was pruned that the archive keeps.
    async fn check_copies(&mut self, said: &dyn Fn(&str) -> String, context: &str) {
        let stores: Vec<Store> = self.parts.archives.keys().copied().collect();
        let (process, runner) = self.runner(Use::Reading);
        for store in stores {
            let now = self.true_copies(store);
            let before = self.copies.remove(&store).unwrap_or_default();
            // Reading an archive takes its time.
            if now != before || self.played.nights.is_multiple_of(4) {
                let archive = &runner.archives[&store.name().parse().unwrap()];
                self.check_listed(archive, store, &now, said, context).await;
            }
            self.check_pruned(store, &before, &now, said, context);
            // What was exported again is whole again.
            let book = self.machine.book();
            self.lost.retain(|lost| {
                lost.0 != store.name() || !now.intact.contains_key(&lost.1) || book.unfound.contains(lost)
            });
            drop(book);
            self.copies.insert(store, now);
        }
        drop(process);
    }

    async fn check_listed(
        &self,
        archive: &Archive,
        store: Store,
        now: &Copies,
        said: &dyn Fn(&str) -> String,
        context: &str,
    ) {
        let catalogue = archive.catalogue().await;
        let catalogue = catalogue.unwrap_or_else(|error| panic!("{error}\n{}", said(context)));
        let copies = catalogue.copies().iter().filter(|copy| copy.manifest.pruned_at.is_none());
        for copy in copies.filter(|copy| copy.manifest.corrupt_since.is_none()) {
            let id = copy.manifest.snapshot.id;
            let is_true = now.intact.contains_key(&id) || self.lost.contains(&(store.name(), id));
            assert!(is_true, "a copy in {} that is none: {id}\n{}", store.name(), said(context));
        }
    }

    fn check_pruned(
        &mut self,
        store: Store,
        before: &Copies,
        now: &Copies,
        said: &dyn Fn(&str) -> String,
        context: &str,
    ) {
        let time = self.machine.clock.now();
        // What was in force until an edit counts until that has settled.
        let is_old = |at: &Timestamp| time.duration_since(*at) > SignedDuration::from_hours(24);
        while self.kept_copies.len() > 1 && is_old(&self.kept_copies[1].0) {
            self.kept_copies.remove(0);
        }
        let archives = || self.kept_copies.iter().filter_map(|(_, parts)| parts.archives.get(&store));
        let keeps_all = archives().any(|archive| archive.keep_last.is_none());
        // A guard may have been allowed to let an edit pass.
        let least = archives().filter_map(|archive| archive.keep_last).min().unwrap_or(1);
        let key = |(id, copy): (&SnapshotId, &snapwarden::judge::facts::CopyFacts)| -> CopyKey {
            (copy.created_at, *id)
        };
        let audit = audit_files(&self.machine.disk, &state_directory());
        let mut all: BTreeMap<InstanceId, BTreeSet<CopyKey>> = BTreeMap::new();
        for (id, copy) in before.intact.iter().chain(&now.intact) {
            all.entry(copy.instance_id).or_default().insert(key((id, copy)));
        }
        for (id, copy) in before.intact.iter().filter(|(id, _)| !now.intact.contains_key(id)) {
            // One of which an earlier night could not delete the image was judged then.
            let (keeps_all, least) =
                if before.pruned.contains_key(id) { (false, 1) } else { (keeps_all, least) };
            if self.lost.contains(&(store.name(), *id)) {
                continue;
            }
            self.played.count("pruned copies", 1);
            let of_archive = format!("\"archive\":\"{}\"", store.name());
            let is_written = audit.iter().flat_map(|bytes| bytes.rsplit(|byte| *byte == b'\n')).any(|line| {
                let is_of_archive = String::from_utf8_lossy(line).contains(&of_archive);
                is_of_archive && is_intention(line, "prune_copy", &id.to_string())
            });
            assert!(
                is_written,
                "the audit log does not say that the copy of {id} in {} is pruned\n{}",
                store.name(),
                said(context)
            );
            let newer =
                all[&copy.instance_id].iter().filter(|other| **other > key((id, copy))).count() as u64;
            let until = self.machine.book().on_hold.get(id).copied();
            let is_on_hold = until.is_some_and(|until| time < until);
            let is_wrong = keeps_all || newer < least || is_on_hold;
            assert!(
                !is_wrong,
                "the copy of {id} in {} was pruned too early\n{}",
                store.name(),
                said(context)
            );
        }
        let new = now.intact.keys().filter(|id| !before.intact.contains_key(id)).count();
        self.played.count("copies", new);
    }

    /// What a report says is so.
    fn check_reports(
        &mut self,
        attempt: &Attempt,
        reports: &[RunReport],
        said: &dyn Fn(&str) -> String,
        context: &str,
    ) {
        let snapshots = self.snapshots();
        let there: BTreeSet<SnapshotId> = snapshots.iter().map(|snapshot| snapshot.id).collect();
        let book = self.machine.book();
        let (parts, pace, now) = (&self.parts, self.fleet.pace, self.machine.world.now());
        let truth = Truth { book: &book, parts, pace, snapshots: &snapshots, now };
        if attempt.end != End::Orderly || attempt.crew != Crew::Once {
            self.told.forget();
        }
        for report in reports {
            self.told.hear(report);
        }
        // What others do while a run goes on the next one sees.
        let is_seeing = attempt.is_seeing() && book.meddled.is_empty();
        for report in reports.iter().filter(|_| attempt.crew == Crew::Once && is_seeing) {
            let silence = self.told.silence(report, &truth);
            assert!(silence.is_none(), "{}: {silence:?}\n{}", report.policy, said(context));
        }
        drop(book);
        for report in reports {
            let steps: Vec<&Step> = report.zones.iter().flat_map(|zone| &zone.steps).collect();
            for step in &steps {
                let is_there = step.facts.snapshot.id.is_some_and(|id| there.contains(&id));
                let is_false =
                    is_there && (step.facts.action, step.outcome) == (Action::Delete, StepOutcome::Done);
                assert!(!is_false, "reported as deleted: {step:?}\n{}", said(context));
            }
            if report.result == RunResult::Success {
                self.played.count("successful runs", 1);
            }
            let pending = report.zones.iter().filter(|zone| zone.pending.is_some()).count();
            self.played.count("pending deletions", pending);
        }
    }

    /// The audit log is whole, and each snapshot that was listed is there, or the log says how it ended.
    async fn check_ends(&mut self, context: &str) {
        let (_process, runner) = self.runner(Use::Changing);
        let is_listed = |zone: &ZoneName| runner.policies.iter().any(|policy| policy.zones.contains(zone));
        let chain = runner.state.verify_audit_log().await.unwrap();
        assert!(
            chain.breaks.is_empty(),
            "the chain of the audit log is broken: {:?}\n{context}",
            chain.breaks
        );
        let mut said: BTreeMap<SnapshotId, Said> = BTreeMap::new();
        for change in runner.state.history(usize::MAX, |_| true).await.unwrap().changes {
            let Some(id) = change.snapshot.id else { continue };
            match change.action.as_str() {
                "delete" => said.entry(id).or_default().deletions.push((change.outcome, change.at)),
                "vanish" => {
                    let address = change.by.and_then(|by| by.address);
                    said.entry(id).or_default().ends.push((change.outcome, address, change.at));
                }
                _ => {}
            }
        }
        let there: BTreeSet<SnapshotId> = self.snapshots().iter().map(|snapshot| snapshot.id).collect();
        let (mut attributed, mut unexplained) = (0, 0);
        {
            let book = self.machine.book();
            for (id, known) in &book.known {
                let none = Said::default();
                let (said, truth) = (said.get(id).unwrap_or(&none), book.ends.get(id));
                let about = || format!("{id}: {said:?}, but {truth:?}\n{:?}\n{context}", known.snapshot);
                if there.contains(id) {
                    // Of one that the platform denied, when it was asked for as well, nothing explains that.
                    let was_denied =
                        |(outcome, ..): &(String, _, _)| book.has_lied && outcome == "unexplained";
                    assert!(said.ends.iter().all(was_denied), "there, and said to be gone: {}", about());
                    continue;
                }
                let explained = said.ends.iter().filter(|(outcome, ..)| outcome != "unexplained").count();
                // What the platform denied while it was there may come back, and end once more.
                let unexplained_max = if book.has_lied { usize::MAX } else { 1 };
                assert!(
                    explained <= 1 && said.ends.len() - explained <= unexplained_max,
                    "said twice: {}",
                    about()
                );
                let Some((outcome, address, at)) = said.ends.last() else {
                    let was_listed = known.was_listed && is_listed(&known.zone);
                    assert!(
                        !self.parts.keeps_audit || !said.deletions.is_empty() || !was_listed,
                        "nothing says how it ended: {}",
                        about()
                    );
                    continue;
                };
                // The platform had said of one that was there that it was not.
                if said.deletions.iter().any(|(_, deleted)| deleted > at) {
                    continue;
                }
                // The platform keeps events for 30 days, and what the instance took with it needs none.
                let is_late =
                    |since: &Timestamp| at.duration_since(*since) > SignedDuration::from_hours(29 * 24);
                let has_instance =
                    known.snapshot.instance_id.is_some_and(|id| book.instances.contains_key(&id));
                // Where old files of the log are let go, what asked for a deletion may be older than what is left.
                let was_asked = !said.deletions.is_empty() || !self.parts.keeps_audit;
                let fits = match (outcome.as_str(), truth) {
                    ("deleted_by_other", Some((Ended::Somebody(from), _))) => address.as_ref() == Some(from),
                    ("deleted_by_us", _) => was_asked,
                    ("deleted_with_instance", Some((end, since))) => {
                        !has_instance && (!matches!(end, Ended::Somebody(_)) || is_late(since))
                    }
                    // Whether we had, or the instance did, nobody can say any more.
                    ("deleted_with_instance", None) => !has_instance && was_asked,
                    ("unexplained", Some((Ended::Somebody(_), since))) => is_late(since),
                    ("unexplained", Some((_, since))) if book.has_lied && at < since => true,
                    ("unexplained", Some((end, _))) => *end == Ended::Nobody,
                    _ => false,
                };
                assert!(fits, "not how it ended: {}", about());
                attributed += usize::from(outcome == "deleted_by_other");
                unexplained += usize::from(outcome == "unexplained");
            }
        }
        self.played.count("deletions of others with their names", attributed);
        self.played.count("unexplained ends", unexplained);
    }

    /// Once nothing goes wrong any more, two runs bring the fleet to rest.
    async fn rest(&mut self) {
        let context = format!("seed {}, at the end", self.seed);
        self.edit(self.fleet.parts.clone());
        let paused: Vec<PolicyName> = self.machine.book().paused.keys().cloned().collect();
        for policy in paused {
            self.resume(policy).await;
        }
        // The repository is repaired.
        self.machine.restic.with(REPOSITORY, |all| all.lost.clear());
        self.verify().await;
        // What was first stored while the disk was not mounted is below the mount point, and the archive is not there.
        if self.is_to_adopt || self.was_unmounted {
            self.adopt().await;
        }
        for night in ["the first", "the second"] {
            self.machine.clock.step(SignedDuration::from_hours(25));
            self.allow().await;
            let slot = whole_second(self.machine.clock.now());
            self.slot_creations.clear();
            self.night(slot, &Attempt::quiet(), &format!("{context}, {night} quiet night"))
                .boxed_local()
                .await;
        }
        let slot = whole_second(self.machine.clock.now()) - SignedDuration::from_mins(10);
        // What one policy takes, those that ran before it export and promote in their next run.
        if self.parts.policies.iter().skip(1).any(|policy| policy.get("", "create").is_some()) {
            self.night(slot, &Attempt::quiet(), &format!("{context}, the second quiet night again"))
                .boxed_local()
                .await;
        }
        let begun = self.machine.world.now();
        let reports =
            self.night(slot, &Attempt::quiet(), &format!("{context}, once more")).boxed_local().await;
        let context = format!("{context}\n{}\n{reports:#?}", self.parts.text("state", "vault", key_file()));
        // An operation that never ends keeps its snapshot busy for ever.
        let is_busy = |status: Option<StatusCode>| status == Some(StatusCode::CONFLICT);
        let mut changes = self.machine.world.changes();
        changes.retain(|exchange| !is_busy(exchange.status()));
        assert!(changes.is_empty(), "not at rest: {changes:?}\n{context}");
        self.check_ends(&context).await;
        for zone in reports.iter().flat_map(|report| &report.zones) {
            assert!(zone.failures.is_empty(), "no rest: {:?}\n{context}", zone.failures);
            let failed = zone.steps.iter().find(|step| step.outcome == StepOutcome::Failed);
            assert!(failed.is_none(), "no rest: {failed:?}\n{context}");
        }
        let busy: BTreeSet<SnapshotId> = self.busy();
        self.check_done(begun, &busy, &context);
    }

    /// Snapshots that the platform would not delete, since an operation on them never ends.
    fn busy(&self) -> BTreeSet<SnapshotId> {
        let changes = self.machine.world.changes();
        let busy = changes.iter().filter(|exchange| exchange.status() == Some(StatusCode::CONFLICT));
        busy.filter_map(|exchange| exchange.path.rsplit(['/', ':']).find_map(|part| part.parse().ok()))
            .collect()
    }

    /// At rest all is done: what the rules deleted when the last run began is gone, and the newest snapshots have their copies.
    fn check_done(&self, begun: Timestamp, busy: &BTreeSet<SnapshotId>, context: &str) {
        let copies = |store: Store| (store.name().parse().unwrap(), self.true_copies(store));
        let copies: BTreeMap<_, _> = self.parts.archives.keys().map(|store| copies(*store)).collect();
        let book = self.machine.book();
        for zone in &self.machine.zones {
            let there = self.machine.world.snapshots(zone);
            let left = book.left_over(zone, (&there, busy), &self.parts, &copies, begun);
            assert!(left.is_none(), "not deleted: {left:?}\n{context}");
        }
        for policy in book.policies.iter().filter(|policy| policy.enabled) {
            let Some(export) = &policy.export else { continue };
            let Some(part) = self.parts.policy(policy.name.as_str()) else { continue };
            for (id, (zone, instance)) in &book.instances {
                if !policy.zones.contains(zone) || !selects(part, instance) {
                    continue;
                }
                let there = self.machine.world.snapshots(zone);
                let of_it = there.iter().filter(|one| one.instance_id == Some(*id) && one.state.is_good());
                let Some(newest) = of_it.max_by_key(|one| (one.created_at, one.id)) else { continue };
                for archive in &export.archives {
                    // Or of one that somebody deleted since, which the archive keeps instead.
                    let has_it = copies[archive].intact.values().any(|copy| {
                        copy.instance_id == *id
                            && (copy.created_at, copy.snapshot_id) >= (newest.created_at, newest.id)
                    });
                    assert!(has_it, "{archive} has no copy of {newest:?}\n{context}");
                }
            }
        }
    }
}

/// What the audit log says of one snapshot.
#[derive(Debug, Default)]
struct Said {
    /// How the program's own attempts to delete it ended.
    deletions: Vec<(String, Timestamp)>,
    /// How it was found to have ended: the outcome, from which address, and when.
    ends: Vec<(String, Option<String>, Timestamp)>,
}

/// Where the files of a copy are.
fn paths(machine: &Machine, id: SnapshotId) -> Vec<std::path::PathBuf> {
    let files = machine.disk.files(&Path::new(FOLDER).join("vault"));
    files
        .into_iter()
        .map(|(path, _)| path)
        .filter(|path| path.to_string_lossy().contains(&id.to_string()))
        .collect()
}

/// The image of a copy changes below it.
fn damage(machine: &Machine, store: Store, id: SnapshotId) {
    let end = format!("{id}.qcow2");
    match store {
        Store::Folder => {
            let path =
                paths(machine, id).into_iter().find(|path| path.to_string_lossy().ends_with(&end)).unwrap();
            crate::mishaps::damage(&machine.disk, &path);
        }
        Store::Bucket => {
            let keys = machine.bucket.keys();
            machine.bucket.damage(keys.iter().find(|key| key.ends_with(&end)).unwrap());
        }
        Store::Repository => {
            machine.restic.with(REPOSITORY, |all| {
                let lost =
                    all.snapshots.iter().filter(|one| one.path.ends_with(&end)).map(|one| one.bytes.clone());
                all.lost.extend(lost.collect::<Vec<_>>());
            });
        }
    }
}

/// Somebody removes a copy.
fn remove(machine: &Machine, store: Store, id: SnapshotId) {
    let text = id.to_string();
    match store {
        Store::Folder => {
            for path in paths(machine, id) {
                machine.disk.remove_file(&path).unwrap();
                machine.disk.sync_dir(path.parent().unwrap()).unwrap();
            }
        }
        Store::Bucket => {
            let keys = machine.bucket.keys();
            keys.iter().filter(|key| key.contains(&text)).for_each(|key| machine.bucket.remove(key));
        }
        Store::Repository => {
            let _ = machine.restic.with(REPOSITORY, |all| {
                all.snapshots.retain(|one| !one.path.contains(&text));
            });
        }
    }
}
