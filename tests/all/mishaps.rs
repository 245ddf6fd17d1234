//! What may go wrong in a fortnight of `wide_crashes`, beside faults of the platform and of the disk: each mishap is a
//! variant of [`Mishap`], and each function of it says one thing that the day then differs in. What must hold all the same
//! is for the judge there.
//!
//! An [`Event`] happens between two requests of a run: the simulated zone is wrapped in an [`Occasion`] for that.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use futures_util::future::BoxFuture;
use http::{Method, StatusCode};
use jiff::SignedDuration;
use serde_json::json;
use snapwarden::archive::marker::MARKER_FILE;
use snapwarden::clock::Clock as _;
use snapwarden::disk::{Access, Disk as _, Open, read_file, replace_file};
use snapwarden::run::context::{ConfigurationChanged, Runner};
use snapwarden::sim::call::Call;
use snapwarden::sim::clock::SimClock;
use snapwarden::sim::disk::MemoryDisk;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::world::World;
use snapwarden::snapshot::{SnapshotId, SnapshotState, ZoneName};
use snapwarden::state::holds::Hold;
use snapwarden::transport::{Purpose, Request, Response, Transport, TransportError};
use tokio_util::sync::CancellationToken;

use crate::crashes::Dice;
use crate::wide_crashes::{COPIES, FOLDER, TEMPLATES_KEPT, WEEKLY_KEEPS};

/// How many more `weekly` keeps for a day.
pub(crate) const MORE: usize = 3;

/// How far a clock jumps.
const JUMP: SignedDuration = SignedDuration::from_hours(400 * 24);

/// What happens to a day: an edit of the configuration that is taken back before it has settled, a volume that is not
/// mounted, or a platform that fails. Nothing may be lost by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mishap {
    None,
    Mistyped,
    /// And on the next day it is taken back for an hour, in which the other policy runs.
    MistypedTwice,
    Renamed,
    Removed,
    /// For longer than it takes to settle.
    Paused,
    /// What is kept by it stays after the next edit, too, until that has settled.
    Raised,
    CopiesMistyped,
    TemplatesMistyped,
    ArchiveRenamed,
    ArchiveNotMounted,
    StateNotMounted,
    /// The state directory of some days ago is back.
    StateRestored,
    CopiesRemoved,
    CreationRefused,
    /// So slow that the deadline passes before the last one begins.
    CreationSlow,
    /// The newest snapshots of an instance, for longer than it takes to settle.
    SnapshotsFailed,
    /// A snapshot that was never exported, for longer than `failed_after`, while no export succeeds.
    FailedWithoutExport,
    /// The platform does not say any more which snapshots are application-consistent.
    ConsistencyForgotten,
    NoSnapshotsListed,
    /// While no change has to settle.
    NoInstancesListed,
    /// Most snapshots of a zone, though not of any instance that is selected.
    ManyVanished,
    /// All snapshots of an instance that is not selected.
    InstanceEmptied,
    /// A snapshot that is read again lacks its name.
    NamesLacking,
    /// A snapshot that is read again lacks its instance.
    InstancesLacking,
    DeletionsChangeNothing,
    /// During a download; and what is listed then can't be read.
    ClockJumps,
    Between(Event),
}

/// What happens between two deletions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    ArchiveVanishes,
    /// All copies, which a verification finds; the archive can't be written to say so.
    CopiesRot,
    CopiesVanish,
    Held,
    Changed,
    Reloaded,
    PausedByHand,
    Killed,
    ClockJumps,
}

impl Mishap {
    /// In the order in which they come: what more is kept by one is mistyped by the next.
    pub(crate) const ALL: [Self; 37] = [
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
        Self::MistypedTwice,
        Self::Between(Event::ArchiveVanishes),
        Self::TemplatesMistyped,
        Self::ConsistencyForgotten,
        Self::Between(Event::Held),
        Self::ManyVanished,
        Self::FailedWithoutExport,
        Self::Between(Event::CopiesRot),
        Self::DeletionsChangeNothing,
        Self::StateRestored,
        Self::Between(Event::Changed),
        Self::NamesLacking,
        Self::ClockJumps,
        Self::CreationSlow,
        Self::Between(Event::Reloaded),
        Self::InstanceEmptied,
        Self::Between(Event::Killed),
        Self::InstancesLacking,
        Self::Between(Event::PausedByHand),
        Self::Between(Event::ClockJumps),
        Self::Between(Event::CopiesVanish),
        Self::Raised,
        Self::Mistyped,
    ];

    /// For how many more days it lasts.
    pub(crate) fn more_days(self, dice: &Dice) -> u64 {
        match self {
            Self::Paused => 1 + dice.below(2),
            Self::SnapshotsFailed | Self::MistypedTwice => 1,
            Self::FailedWithoutExport => 4,
            _ => 0,
        }
    }

    /// What the platform answers to all policies for as long as it lasts.
    pub(crate) fn fault(self) -> Option<Fault> {
        let edit = |call, place, value| Some(Fault::on(call, Effect::Edit(place, value)));
        match self {
            Self::CreationRefused => Some(Fault::on(Call::CreateSnapshot, Effect::status(403, "no"))),
            Self::FailedWithoutExport => Some(Fault::on(Call::ExportSnapshot, Effect::status(403, "no"))),
            Self::NoSnapshotsListed => edit(Call::ListSnapshots, "/snapshots", Some(json!([]))),
            Self::NoInstancesListed => edit(Call::ListInstances, "/instances", Some(json!([]))),
            Self::NamesLacking => edit(Call::GetSnapshot, "/name", None),
            Self::InstancesLacking => edit(Call::GetSnapshot, "/instance", None),
            Self::DeletionsChangeNothing => {
                let body =
                    "{\"id\":\"00000000-0000-4000-8000-000000000001\",\"state\":\"success\"}".to_owned();
                let (status, content_type) = (StatusCode::OK, "application/json");
                Some(Fault::on(Call::DeleteSnapshot, Effect::Answer { status, content_type, body }))
            }
            _ => None,
        }
    }

    /// Whether nothing may be deleted.
    pub(crate) fn keeps_all(self) -> bool {
        self.missing().is_some()
            || matches!(
                self,
                Self::CopiesRemoved
                    | Self::NoSnapshotsListed
                    | Self::NoInstancesListed
                    | Self::NamesLacking
                    | Self::InstancesLacking
            )
    }

    /// Whether the listing is none in which an operator can trust: that is no success.
    pub(crate) fn is_listing_cut(self) -> bool {
        matches!(
            self,
            Self::NoSnapshotsListed | Self::NoInstancesListed | Self::ManyVanished | Self::InstanceEmptied
        )
    }

    /// Whether nothing else goes wrong meanwhile: else it would hardly ever come to that.
    pub(crate) fn comes_alone(self) -> bool {
        self.event().is_some() || self == Self::CreationSlow
    }

    /// What happens at one of the requests of a run.
    pub(crate) fn event(self) -> Option<Event> {
        match self {
            Self::Between(event) => Some(event),
            Self::ClockJumps => Some(Event::ClockJumps),
            _ => None,
        }
    }

    /// The configuration of the day.
    pub(crate) fn edit(self, config: &str) -> String {
        let weekly_keeps = format!("keep_last = {WEEKLY_KEEPS}");
        let one_copy = |text: &str| text.replace(COPIES, "keep_last = 1");
        match self {
            Self::Mistyped | Self::MistypedTwice => config.replace(&weekly_keeps, "keep_last = 1"),
            Self::Renamed => {
                config.replace("policies.weekly", "policies.monthly").replace(&weekly_keeps, "keep_last = 1")
            }
            Self::Removed => {
                let end = config.find("[policies.weekly]").unwrap();
                config[..end].to_owned()
            }
            Self::Paused => config.replace("[policies.weekly]", "[policies.weekly]\nenabled = false"),
            Self::Raised => config.replace(&weekly_keeps, &format!("keep_last = {}", WEEKLY_KEEPS + MORE)),
            Self::CopiesMistyped => one_copy(config),
            Self::TemplatesMistyped => config.replace(&format!("keep = {TEMPLATES_KEPT}"), "keep = 1"),
            Self::ArchiveRenamed => one_copy(config)
                .replace("archives.vault", "archives.store")
                .replace("archives = [\"vault\"]", "archives = [\"store\"]"),
            Self::NoInstancesListed => config.replace(".guard]\n", ".guard]\nsettle = \"0s\"\n"),
            // One after the other, so that there is a moment between two.
            Self::Between(_) | Self::CreationSlow => format!("[exoscale]\nconcurrency = 1\n{config}"),
            _ => config.to_owned(),
        }
    }

    /// The folder that is not there.
    pub(crate) fn missing(self) -> Option<&'static str> {
        match self {
            Self::ArchiveNotMounted => Some("vault"),
            Self::StateNotMounted => Some("state"),
            _ => None,
        }
    }
}

/// The platform, at one of whose requests an event happens: just before that is carried out.
pub(crate) struct Occasion {
    event: Event,
    /// Which download it is, or else which deletion.
    at_download: bool,
    nth: u64,
    world: World,
    disk: MemoryDisk,
    clock: SimClock,
    /// Of another process.
    other: Runner,
    /// The run's reload, and its death.
    pub(crate) changed: ConfigurationChanged,
    pub(crate) killed: CancellationToken,
    seen: AtomicU64,
    /// The request at which it happened: how many others there had been, its zone and path.
    happened: OnceLock<(usize, ZoneName, String)>,
    /// What there was before, to bring it back: the archive's marker, and the snapshots that it concerned.
    marker: Mutex<Vec<u8>>,
    pub(crate) concerned: Mutex<Vec<SnapshotId>>,
}

impl std::fmt::Debug for Occasion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Occasion").field("event", &self.event).finish_non_exhaustive()
    }
}

impl Occasion {
    pub(crate) fn new(
        mishap: Mishap,
        dice: &Dice,
        (world, disk, clock): (&World, &MemoryDisk, &SimClock),
        other: Runner,
    ) -> Option<Arc<Self>> {
        let at_download = mishap == Mishap::ClockJumps;
        Some(Arc::new(Self {
            event: mishap.event()?,
            at_download,
            nth: 1 + dice.below(3),
            world: world.clone(),
            disk: disk.clone(),
            clock: clock.clone(),
            other,
            changed: ConfigurationChanged::default(),
            killed: CancellationToken::new(),
            seen: AtomicU64::new(0),
            happened: OnceLock::new(),
            marker: Mutex::default(),
            concerned: Mutex::default(),
        }))
    }

    /// Whether another policy would decide by what is different now.
    pub(crate) fn ends_the_night(&self) -> bool {
        self.happened.get().is_some()
            && matches!(self.event, Event::Changed | Event::Reloaded | Event::PausedByHand)
    }

    async fn happen(&self, zone: &ZoneName) {
        let archive = self.other.archives.values().next().unwrap();
        let snapshots = self.world.snapshots(zone);
        let good = || snapshots.iter().filter(|snapshot| snapshot.state.is_good());
        let vault = Path::new(FOLDER).join("vault");
        match self.event {
            Event::ArchiveVanishes => {
                let marker = vault.join(MARKER_FILE);
                *self.marker.lock().unwrap() = read_file(&self.disk, &marker, 1 << 20).unwrap();
                self.disk.remove_file(&marker).unwrap();
                self.disk.sync_dir(&vault).unwrap();
            }
            Event::CopiesRot | Event::CopiesVanish => {
                let copies = archive.catalogue().await.unwrap().copies().to_vec();
                for copy in copies.iter().filter(|copy| copy.manifest.pruned_at.is_none()) {
                    self.concerned.lock().unwrap().push(copy.manifest.snapshot.id);
                    if self.event == Event::CopiesRot {
                        damage(&self.disk, &copy.image());
                    } else {
                        let md5 = copy.image().with_extension("qcow2.md5");
                        for file in [&copy.image(), &md5, &copy.image().with_extension("json")] {
                            self.disk.remove_file(file).unwrap();
                        }
                        self.disk.sync_dir(copy.image().parent().unwrap()).unwrap();
                    }
                }
                if self.event == Event::CopiesRot {
                    self.disk.set_unwritable(&vault, Some(ErrorKind::ReadOnlyFilesystem));
                    self.other.verifier(archive).verify(100, &|_, _| {}).await.unwrap();
                }
            }
            Event::Held => {
                for snapshot in &snapshots {
                    let since = self.clock.now();
                    let hold = Hold { snapshot: snapshot.id, until: None, reason: None, since, about: None };
                    self.other.state.hold(&self.clock, hold).await.unwrap();
                    self.concerned.lock().unwrap().push(snapshot.id);
                }
            }
            Event::Changed => {
                for snapshot in good() {
                    self.world.set_state(snapshot.id, SnapshotState::Ready);
                    self.concerned.lock().unwrap().push(snapshot.id);
                }
            }
            Event::Reloaded => self.changed.deletions.cancel(),
            Event::PausedByHand => {
                let (name, now) = ("nightly".parse().unwrap(), self.clock.now());
                self.other.state.pause(&self.clock, name, now).await.unwrap();
            }
            Event::Killed => self.killed.cancel(),
            Event::ClockJumps => {
                self.clock.step(JUMP);
                self.world.set_skew(-JUMP);
                if self.at_download {
                    self.world.fault(Fault::on(Call::ListSnapshots, Effect::status(500, "no")));
                }
            }
        }
    }

    /// The paths of the deletions that were requested: up to the event, after it in its zone, and in the other one.
    fn deletions(&self) -> [Vec<String>; 3] {
        let mut deletions = [const { Vec::new() }; 3];
        let Some((place, zone, path)) = self.happened.get() else { return deletions };
        deletions[0].push(path.clone());
        for (number, exchange) in self.world.log().into_iter().enumerate() {
            let of = if number < *place { 0 } else { 1 + usize::from(exchange.zone != *zone) };
            let is_known = deletions.iter().flatten().any(|known| *known == exchange.path);
            if exchange.call == Call::DeleteSnapshot && !is_known {
                deletions[of].push(exchange.path.clone());
            }
        }
        deletions
    }

    /// The deletions that were requested after it, though nothing permitted them any more.
    pub(crate) fn forbidden_deletions(&self) -> Vec<String> {
        let [_, here, elsewhere] = self.deletions();
        match self.event {
            Event::Killed | Event::ClockJumps => Vec::new(),
            Event::Held | Event::Changed => here,
            // One was on its way.
            _ => here.into_iter().chain(elsewhere.into_iter().skip(1)).collect(),
        }
    }

    /// The deletions that were requested before it, or were on their way.
    pub(crate) fn earlier_deletions(&self) -> Vec<String> {
        let [before, _, elsewhere] = self.deletions();
        before.into_iter().chain(elsewhere.into_iter().take(1)).collect()
    }

    /// Everything is as it was; the disk is that of the next process. Returns the copies that are lost.
    pub(crate) async fn end(
        &self,
        disk: &MemoryDisk,
        on_hold: impl Fn(&SnapshotId) -> bool,
    ) -> Vec<SnapshotId> {
        if self.happened.get().is_none() {
            return Vec::new();
        }
        let concerned = std::mem::take(&mut *self.concerned.lock().unwrap());
        let state = snapwarden::state::directory::StateDirectory::open(
            Arc::new(disk.clone()),
            &Path::new(FOLDER).join("state"),
        );
        let state = state.unwrap();
        let vault = Path::new(FOLDER).join("vault");
        match self.event {
            Event::ArchiveVanishes => {
                let marker = self.marker.lock().unwrap().clone();
                replace_file(disk, &vault.join(MARKER_FILE), &marker, Access::Group).unwrap();
            }
            Event::CopiesRot | Event::CopiesVanish => {
                disk.set_unwritable(&vault, None);
                return concerned;
            }
            Event::Held => {
                for id in concerned.into_iter().filter(|id| !on_hold(id)) {
                    state.unhold(&self.clock, id).await.unwrap();
                }
            }
            Event::Changed => {
                let there = |id: &SnapshotId| {
                    let zones = &self.happened.get().map(|(_, zone, _)| zone.clone());
                    zones
                        .iter()
                        .flat_map(|zone| self.world.snapshots(zone))
                        .any(|snapshot| snapshot.id == *id)
                };
                for id in concerned.into_iter().filter(there) {
                    self.world.set_state(id, SnapshotState::Exported);
                }
            }
            Event::PausedByHand => drop(state.resume(&self.clock, "nightly".parse().unwrap()).await.unwrap()),
            Event::ClockJumps => {
                self.clock.step(-JUMP);
                self.world.set_skew(SignedDuration::ZERO);
            }
            Event::Reloaded | Event::Killed => {}
        }
        Vec::new()
    }
}

impl Transport for Occasion {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        Box::pin(async move {
            let (host, path) = (request.url.host_str().unwrap_or_default(), request.url.path());
            let is_deletion = request.method == Method::DELETE && path.contains("/snapshot/");
            let is_meant = if self.at_download { request.purpose == Purpose::Image } else { is_deletion };
            if is_meant && self.seen.fetch_add(1, Ordering::Relaxed) + 1 == self.nth {
                let zone: ZoneName =
                    if host.contains("gva") { "ch-gva-2" } else { "de-fra-1" }.parse().unwrap();
                let _ = self.happened.set((self.world.log().len(), zone.clone(), path.to_owned()));
                self.happen(&zone).await;
                if self.event == Event::Killed {
                    if self.nth == 2 {
                        let _ = self.world.send(request).await;
                    }
                    return std::future::pending().await;
                }
            }
            self.world.send(request).await
        })
    }
}

/// The last byte of a file is another one, also if it was damaged before.
pub(crate) fn damage(disk: &MemoryDisk, path: &Path) {
    let file = disk.open(path, Open::Update, Access::Group).unwrap();
    let last = file.len().unwrap() - 1;
    let mut byte = [0];
    file.read_at(&mut byte, last).unwrap();
    file.write_all_at(&[byte[0].wrapping_add(1)], last).unwrap();
    file.sync().unwrap();
}
