//! Lists zones, and adds everything else that decisions depend on: holds, ownership, and the copies in archives.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::BoxFuture;
use futures_util::future::{FutureExt as _, join, join_all};
use jiff::{SignedDuration, Timestamp};

use crate::archive::catalogue::Catalogue;
use crate::policy::Policy;
use crate::policy::name::{ArchiveName, PolicyName};
use crate::policy::select::Pattern;
use crate::retention::export_gate::unadopted_text;
use crate::retention::inventory::{ArchivedCopy, ClockSkew, Copies, Hold, Inventory, Missing, Ownership};
use crate::retention::memory::Memory;
use crate::run::archive_presence::{Looker, Presence};
use crate::run::context::Runner;
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, SnapshotState, ZoneName};
use crate::state::audit::Subject;
use crate::state::holds::{self, Holds};
use crate::state::last_runs::{LastRuns, Unparsed};
use crate::state::policy_state::{Creation, Owner, PolicyState};
use crate::text::{chain, counted, printable};

/// The catalogue of each archive, or why it cannot be read.
pub type Catalogues = BTreeMap<ArchiveName, Result<Arc<Catalogue>, String>>;

/// A complete listing of a zone, with everything else that decisions depend on.
#[derive(Debug, Clone)]
pub struct Listing {
    /// The input of `retention`.
    pub inventory: Inventory,
    /// The source of `inventory.archives`, from which a deletion takes its proofs.
    pub catalogues: Catalogues,
    /// Sentences for people.
    pub warnings: Vec<String>,
    /// What the last accepted run of the policy rested on here; empty if there was none.
    pub(crate) memory: Arc<Memory>,
    /// A warning for each archive from which copies vanished, to be said once in a run: all zones have the same archives.
    pub(crate) losses: Vec<String>,
    /// How each archive that could be read stands to this state.
    presences: BTreeMap<ArchiveName, Presence>,
    /// Indexes in `inventory.instances`.
    instances: HashMap<InstanceId, usize>,
}

impl Listing {
    /// The instance of a snapshot, if it is listed.
    pub fn instance_of(&self, snapshot: &Snapshot) -> Option<&Instance> {
        let index = self.instances.get(&snapshot.instance_id?)?;
        self.inventory.instances.get(*index)
    }

    /// Whether the instance is one of `only`; without that all are. One that is not listed has no name.
    pub(crate) fn is_one_of(&self, only: Option<&Pattern<InstanceId>>, id: InstanceId) -> bool {
        let instance = self.instances.get(&id).and_then(|index| self.inventory.instances.get(*index));
        only.is_none_or(|only| only.matches(&id, instance.map(|instance| &*instance.name)))
    }

    /// Forgets what the archives hold, of which there may be a lot. Nothing may be decided by this listing any more.
    pub(crate) fn forget_copies(&mut self) {
        self.inventory.archives.clear();
        self.catalogues.clear();
    }

    /// How an archive that could be read stands to this state.
    pub(crate) fn presence(&self, archive: &ArchiveName) -> Option<&Presence> {
        self.presences.get(archive)
    }

    /// A listed snapshot, as the audit log and the report name it.
    pub(crate) fn subject(&self, snapshot: &Snapshot) -> Subject {
        Subject::of(snapshot, self.instance_of(snapshot))
    }
}

/// Both listings of a zone as the API returned them, without what other shards are for, and how far this machine's clock was from the API's then.
#[derive(Debug, Clone)]
pub struct RawListing {
    snapshots: Vec<Snapshot>,
    instances: Vec<Instance>,
    /// The instances of other shards.
    elsewhere: Vec<Instance>,
    clock: ClockSkew,
}

impl RawListing {
    /// The zone, of which nothing else is known.
    pub(crate) fn on_paper(self, zone: &ZoneName) -> Inventory {
        let inventory = Inventory::on_paper(zone.clone(), self.snapshots, self.instances);
        Inventory { clock: self.clock, elsewhere: self.elsewhere, ..inventory }
    }
}

/// What zones listed before, so that several previews are over the same listings.
#[derive(Debug, Default)]
pub struct ListingCache(Mutex<BTreeMap<ZoneName, RawListing>>);

impl ListingCache {
    fn known(&self) -> MutexGuard<'_, BTreeMap<ZoneName, RawListing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The zone's listing from the cache, or else a fresh one. Failures are not cached.
    async fn list(&self, runner: &Runner, zone: &ZoneName) -> Result<RawListing, String> {
        if let Some(listing) = self.known().get(zone) {
            return Ok(listing.clone());
        }
        let listing = list(runner, zone).await?;
        self.known().insert(zone.clone(), listing.clone());
        Ok(listing)
    }
}

/// Lists zones for a run of the policy `own`, from the cache if there is one; the listings are in the order of the zones. An error is why the zone
/// cannot be judged, as a sentence.
pub(crate) async fn list_zones(
    runner: &Runner,
    own: &PolicyName,
    cache: Option<&ListingCache>,
    memories: &Memories,
    zones: &[ZoneName],
) -> Vec<Result<Listing, String>> {
    let archives = look_at_archives(runner).await;
    let mut listings: Vec<BoxFuture<'_, _>> = Vec::new();
    for zone in zones {
        let archives = &archives;
        let listing = async move {
            let raw = match cache {
                Some(cache) => cache.list(runner, zone).await?,
                None => list(runner, zone).await?,
            };
            complete(runner, own, memories, zone, raw, archives).await
        };
        listings.push(listing.boxed());
    }
    join_all(listings).await
}

/// The archives that policies name, as they were found.
#[derive(Debug, Default)]
pub struct FoundArchives {
    catalogues: Catalogues,
    presences: BTreeMap<ArchiveName, Presence>,
    losses: Vec<String>,
}

impl FoundArchives {
    /// Why the copies in archives are not known, in sentences.
    pub(crate) fn failures(&self) -> Vec<String> {
        let why = |(name, catalogue): (&ArchiveName, &Result<_, String>)| {
            let closed = || self.presences.get(name).and_then(Presence::closed);
            let why = catalogue.as_ref().err().map(String::as_str).or_else(closed)?;
            Some(format!("archive {name}: {why}"))
        };
        self.catalogues.iter().filter_map(why).collect()
    }

    /// The first that others used, where this state remembered no run.
    fn unadopted(&self) -> Option<&ArchiveName> {
        let mut presences = self.presences.iter();
        presences.find(|(_, presence)| **presence == Presence::Unadopted).map(|(name, _)| name)
    }
}

/// Reads every archive that an enabled policy names, or that one which is paused requires a copy in.
pub(crate) async fn look_at_archives(runner: &Runner) -> FoundArchives {
    let names: BTreeSet<&ArchiveName> = runner
        .policies
        .iter()
        .filter_map(|policy| policy.export.as_ref().filter(|export| policy.enabled || export.required))
        .flat_map(|export| &export.archives)
        .collect();
    let looker = match Looker::new(&runner.state).await {
        Ok(looker) => looker,
        Err(error) => {
            let unknown = |name: &ArchiveName| (name.clone(), Err(error.clone()));
            let catalogues = names.into_iter().map(unknown).collect();
            return FoundArchives { catalogues, ..FoundArchives::default() };
        }
    };
    let mut read: Vec<BoxFuture<'_, _>> = Vec::new();
    for name in names {
        let looker = &looker;
        read.push(async move { (name.clone(), runner.look_at(looker, name).await) }.boxed());
    }
    let mut archives = FoundArchives::default();
    for (name, found) in join_all(read).await {
        let catalogue = found.map(|found| {
            archives.presences.insert(name.clone(), found.presence);
            archives.losses.extend(found.loss);
            found.catalogue
        });
        archives.catalogues.insert(name, catalogue);
    }
    archives
}

/// Lists the part of a zone that this process is for. Anything less than both listings, complete and decoded, is an error.
///
/// # Errors
/// Why the zone cannot be judged, as a sentence.
pub async fn list(runner: &Runner, zone: &ZoneName) -> Result<RawListing, String> {
    let client = runner.client.zone(zone);
    match join(client.list_snapshots(), client.list_instances()).await {
        (Ok((listed, clock_skew)), Ok(instances)) => {
            let clock = clock_skew.map_or(ClockSkew::Unknown, ClockSkew::Known);
            let mut snapshots = listed.snapshots;
            let (mut instances, mut elsewhere) = (instances, Vec::new());
            if let Some(shard) = runner.state.shard() {
                snapshots.retain(|snapshot| shard.has_snapshot(snapshot));
                (instances, elsewhere) = instances.into_iter().partition(|instance| shard.has(instance.id));
            }
            Ok(RawListing { snapshots, instances, elsewhere, clock })
        }
        (Err(error), _) | (_, Err(error)) => {
            Err(format!("nothing is done here, since the listing is not complete: {}", chain(&error)))
        }
    }
}

/// What each archive holds of a zone.
pub(crate) fn archived_copies(archives: &FoundArchives, zone: &ZoneName) -> BTreeMap<ArchiveName, Copies> {
    let copies = archives.catalogues.iter().map(|(name, catalogue)| {
        let copies = match (catalogue, archives.presences.get(name)) {
            (Err(reason), _) => Copies::Unreachable(reason.clone()),
            (Ok(catalogue), presence) => match presence.and_then(Presence::closed) {
                Some(reason) => Copies::Unreachable(reason.to_owned()),
                None => Copies::Known(copies_in(catalogue, zone)),
            },
        };
        (name.clone(), copies)
    });
    copies.collect()
}

/// Adds the holds, the snapshots that this program made, the copies in archives, and what the policy `own` remembers, whose run it is for.
///
/// # Errors
/// Why the zone cannot be judged, as a sentence.
pub async fn complete(
    runner: &Runner,
    own: &PolicyName,
    memories: &Memories,
    zone: &ZoneName,
    raw: RawListing,
    archives: &FoundArchives,
) -> Result<Listing, String> {
    let holds = runner.state.holds().await.map_err(|error| {
        format!("nothing is done here, since the holds cannot be read: {}", chain(&error))
    })?;
    let memory = memories.get(zone).cloned().unwrap_or_else(|| Ok(Arc::default()))?;
    // After the listing, so that they include everything listed.
    let states = runner.state.all_policy_states().await.map_err(|error| {
        let error = chain(&error);
        format!("nothing is done here, since the snapshots that this program made are not known: {error}")
    })?;
    let mut inventory = Inventory {
        created: created(&states, zone),
        missing: [missing(&states, zone), overdue(runner, own, zone).await].concat(),
        holds: holds_by_snapshot(
            &holds,
            archives.catalogues.values().flatten().map(|catalogue| &**catalogue),
        ),
        archives: archived_copies(archives, zone),
        unadopted: archives.unadopted().cloned(),
        ..raw.on_paper(zone)
    };
    memory.add_to(&mut inventory, &runner.policies, runner.clock.now());
    let listing = with_warnings(inventory, archives.catalogues.clone());
    let mut warnings = listing.warnings;
    for (name, presence) in &archives.presences {
        let closed = |why| format!("archive {name}: every snapshot that needs a copy there is kept: {why}");
        warnings.extend(presence.closed().map(closed));
        warnings.extend((*presence == Presence::Unadopted).then(|| unadopted_text(name)));
    }
    let (presences, losses) = (archives.presences.clone(), archives.losses.clone());
    Ok(Listing { warnings, memory, losses, presences, ..listing })
}

/// What the policy's last accepted run in each of its zones rested on, or why that cannot be read.
pub(crate) type Memories = BTreeMap<ZoneName, Result<Arc<Memory>, String>>;

/// Reads them, once for a run; `before` is what the policy's last runs left.
pub async fn memories(runner: &Runner, policy: &Policy, before: &LastRuns) -> Memories {
    let mut memories = Memories::new();
    for zone in &policy.zones {
        let memory = remembered(runner, policy, before, zone).await.map(Arc::new);
        memories.insert(zone.clone(), memory);
    }
    memories
}

/// What the policy's last accepted run in the zone rested on; of a policy without such a run, that of the policy that last
/// ran there, since a new policy may be an old one by another name.
async fn remembered(
    runner: &Runner,
    policy: &Policy,
    before: &LastRuns,
    zone: &ZoneName,
) -> Result<Memory, String> {
    let failed = |why: String| {
        format!("nothing is done here, since what the last run rested on cannot be read: {why}")
    };
    let read = |name: &PolicyName, memory: &Unparsed| {
        memory.parse::<Memory>().map_err(|error| {
            failed(format!(
                "`rested_on` of zone {zone} in runs-{name}.json in the state directory: {error}; if nothing else helps, \
                 remove that key: then changes since that run are not found"
            ))
        })
    };
    let of_zone = |mut runs: LastRuns| {
        let memory = runs.zones.remove(zone)?;
        Some((memory.last_run_at, memory.rested_on?))
    };
    let own = before.zones.get(zone).and_then(|own| Some((own.last_run_at, own.rested_on.as_ref()?)));
    let mut last = match own {
        Some((at, own)) => Some((at, read(&policy.name, own)?)),
        None => None,
    };
    if last.as_ref().is_some_and(|(_, own)| own.changes.is_empty()) {
        return Ok(last.map(|(_, own)| own).unwrap_or_default());
    }
    // Those of others, in the order of their runs: they show what was there in the meantime.
    let all = runner.state.all_last_runs().await.map_err(|error| failed(chain(&error)))?;
    let others = all.into_iter().filter(|(name, _)| *name != policy.name);
    let mut others: Vec<_> = others.filter_map(|(name, runs)| Some((name, of_zone(runs)?))).collect();
    others.sort_by_key(|(_, (at, _))| *at);
    let has_own = last.is_some();
    let mut gone: Vec<(PolicyName, Unparsed)> = Vec::new();
    for (name, (at, other)) in others {
        gone.push((name.clone(), other.clone()));
        match &mut last {
            Some((own_at, own)) if has_own => {
                if at > *own_at {
                    own.forget_interrupted(&read(&name, &other)?);
                }
            }
            _ => last = Some((at, read(&name, &other)?)),
        }
    }
    let mut memory = last.map(|(_, memory)| memory).unwrap_or_default();
    if !has_own && memory.at.is_some() {
        // The one by another name may have run long before: of one that was removed, what it kept itself counts.
        let is_gone = |name: &PolicyName| runner.policies.iter().all(|policy| policy.name != *name);
        for (name, other) in gone.into_iter().filter(|(name, _)| is_gone(name)) {
            memory.add_gone(&name, &read(&name, &other)?);
        }
    }
    Ok(memory)
}

/// The holds as `retention` reads them: those of this state, and those that are marked in archives. Of several on one snapshot
/// the longest counts.
pub(crate) fn holds_by_snapshot<'c>(
    holds: &Holds,
    catalogues: impl IntoIterator<Item = &'c Catalogue>,
) -> BTreeMap<SnapshotId, Hold> {
    let own = |hold: &holds::Hold| (hold.snapshot, Hold { until: hold.until, reason: hold.reason.clone() });
    let mut all: BTreeMap<SnapshotId, Hold> = BTreeMap::new();
    let ends = |hold: &Hold| hold.until.unwrap_or(Timestamp::MAX);
    for (id, hold) in holds.holds.iter().map(own).chain(catalogues.into_iter().flat_map(marked_holds)) {
        match all.get_mut(&id) {
            // The mark of the same hold ends with its second.
            Some(known) if ends(&hold).duration_since(ends(known)) < SignedDuration::from_secs(1) => {}
            _ => drop(all.insert(id, hold)),
        }
    }
    all
}

/// The holds that are marked in an archive.
fn marked_holds(catalogue: &Catalogue) -> impl Iterator<Item = (SnapshotId, Hold)> {
    let reason = format!("marked in archive {}", catalogue.archive());
    catalogue.holds().iter().flat_map(move |(id, marks)| {
        let reason = reason.clone();
        marks.iter().map(move |mark| (*id, Hold { until: mark.until, reason: Some(reason.clone()) }))
    })
}

/// The snapshots that policies could not take when they were last due, also policies that are removed by now: that change has
/// to settle.
pub(crate) fn missing(states: &[(PolicyName, PolicyState)], zone: &ZoneName) -> Vec<Missing> {
    let missing = states.iter().flat_map(|(policy, state)| {
        state.missing.iter().filter(|missing| missing.zone == *zone).map(move |missing| Missing {
            policy: policy.clone(),
            instance: missing.instance_id,
            slot: missing.slot,
            cause: missing.cause.clone(),
        })
    });
    missing.collect()
}

/// A run begins, and takes its snapshots, within this after its time and its longest delay.
const OVERDUE: SignedDuration = SignedDuration::from_hours(1);

/// The policies that take snapshots and whose last due run a daemon has not done: then nothing says whether those could be taken.
/// What the run of `own` can't take, it remembers itself. Without a daemon something else decides when policies run.
pub(crate) async fn overdue(runner: &Runner, own: &PolicyName, zone: &ZoneName) -> Vec<Missing> {
    let served = async {
        let has_daemon = runner.state.has_daemon().await?;
        if has_daemon { runner.state.schedules().await.map(Some) } else { Ok(None) }
    };
    let served = served.await.map_err(|error| format!("it is not known when it ran: {}", chain(&error)));
    let Some(served) = served.transpose() else { return Vec::new() };
    let now = runner.clock.now();
    let takes = |policy: &&Policy| {
        policy.enabled && policy.create && policy.zones.contains(zone) && policy.name != *own
    };
    let overdue = runner.policies.iter().filter(takes).filter_map(|policy| {
        let schedule = policy.schedule.as_ref()?;
        let (slot, cause) = match &served {
            Err(cause) => (now, cause.clone()),
            Ok(served) => {
                let served = served.policies.get(&policy.name)?;
                let late = SignedDuration::try_from(policy.jitter)
                    .unwrap_or(SignedDuration::MAX)
                    .saturating_add(OVERDUE);
                let until = now.saturating_sub(late).unwrap_or(Timestamp::MIN);
                let (slot, cause) = match (served.begun, served.missed) {
                    (Some(begun), _) => (begun, "its run of then has not ended"),
                    (None, Some(missed)) => {
                        (missed, "its run of then was missed, and is not made up for by itself")
                    }
                    (None, None) => {
                        let slot = schedule.last_until(until, served.watermark, &policy.time_zone)?;
                        (slot, "its run of then has not begun")
                    }
                };
                let name = &policy.name;
                (
                    Some(slot).filter(|slot| *slot <= until)?,
                    format!("{cause}; to run it now: snapwarden trigger {name}"),
                )
            }
        };
        Some(Missing { policy: policy.name.clone(), instance: None, slot, cause })
    });
    overdue.collect()
}

/// Whose the snapshots are that this program is known to have taken; whatever the policies ask for now, since a policy
/// that was removed may have asked for its own.
fn created(states: &[(PolicyName, PolicyState)], zone: &ZoneName) -> HashMap<SnapshotId, Ownership> {
    let mut owned: HashMap<SnapshotId, Ownership> = HashMap::new();
    let in_zone = |made: &&Creation| made.zone == *zone;
    for (policy, state) in states {
        for made in state.created.iter().filter(in_zone) {
            let Some(id) = made.snapshot_id else { continue };
            match made.owner {
                Owner::Everyone => drop(owned.insert(id, Ownership::default())),
                Owner::ThisPolicy => {
                    let of_policy = Ownership { maker: Some(policy.clone()), served: Vec::new() };
                    owned.entry(id).or_insert(of_policy);
                }
                Owner::Nobody | Owner::ServedBy(_) => {}
            }
        }
    }
    for (policy, state) in states {
        for made in state.created.iter().filter(in_zone) {
            let server = states.iter().find(|(other, _)| Some(other) == made.server());
            let id = server.and_then(|(_, state)| made.served_from(&state.created)?.snapshot_id);
            // One that belongs to no policy does not belong to one by serving a slot.
            if let Some(ownership) = id.and_then(|id| owned.get_mut(&id)) {
                ownership.served.push(policy.clone());
            }
        }
    }
    owned
}

/// Adds the warnings.
pub(crate) fn with_warnings(inventory: Inventory, catalogues: Catalogues) -> Listing {
    let instances: HashMap<_, _> =
        inventory.instances.iter().enumerate().map(|(index, instance)| (instance.id, index)).collect();
    let mut warnings: Vec<String> = Vec::new();
    for snapshot in &inventory.snapshots {
        if let SnapshotState::Unknown(word) = &snapshot.state {
            warnings.push(format!(
                "snapshot {} ({}) is in the unknown state `{}`: it is left alone",
                printable(&snapshot.name),
                snapshot.id,
                printable(word),
            ));
        }
    }
    for (name, catalogue) in &catalogues {
        match catalogue {
            Ok(catalogue) => warnings.extend(damaged(name, catalogue)),
            Err(reason) => warnings.push(format!(
                "archive {name} cannot be read, so every snapshot that needs a copy there is kept: {reason}"
            )),
        }
    }
    let (memory, losses, presences) = (Arc::default(), Vec::new(), BTreeMap::new());
    Listing { inventory, catalogues, warnings, memory, losses, presences, instances }
}

/// A lost copy is announced here, since its snapshot may be deleted: no one may look for it otherwise.
fn damaged(name: &ArchiveName, catalogue: &Catalogue) -> Option<String> {
    let first = catalogue.problems().first()?;
    Some(format!(
        "archive {name} has {} with problems, such as {}; see `snapwarden archive list {name}`",
        counted(catalogue.problems().len(), "file"),
        first.describe()
    ))
}

fn copies_in(catalogue: &Catalogue, zone: &ZoneName) -> Vec<ArchivedCopy> {
    let manifests =
        || catalogue.counting().map(|copy| &copy.manifest).filter(|manifest| manifest.zone == *zone);
    // There may be hundreds of thousands: no more memory than they need.
    let mut copies = Vec::with_capacity(manifests().count());
    copies.extend(manifests().map(|manifest| ArchivedCopy {
        snapshot_id: manifest.snapshot.id,
        instance_id: manifest.instance.id,
        created_at: manifest.snapshot.created_at,
        exported_at: manifest.exported_at,
    }));
    copies
}
