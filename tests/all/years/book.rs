//! What is true, as nobody in the simulation could know it all, and the judgement of each deletion by it.
//!
//! A deletion is judged as things were when it was requested: the snapshots of the zone, the instances, the holds, and the bytes
//! in the archives. The reading of the rules is that of the second judge, from facts that are made here, of the world; what must
//! not depend on it either ([`Book::plain_objection`]) is said once more.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use http::Method;
use jiff::{SignedDuration, Timestamp};
use snapwarden::config::sections::Config;
use snapwarden::judge;
use snapwarden::judge::facts::{
    CopyFacts, Facts, FailedFacts, HoldFacts, Holdings, InstanceFacts, MissingFacts, Owner, Situation,
    SnapshotFacts,
};
use snapwarden::judge::ruling::{Ruling, Verdict};
use snapwarden::policy::Policy;
use snapwarden::policy::name::{ArchiveName, PolicyName};
use snapwarden::retention::deciding_keys::deciding_keys;
use snapwarden::run::pauses;
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::sim::bucket::SimBucket;
use snapwarden::sim::disk::MemoryDisk;
use snapwarden::sim::restic::SimRestic;
use snapwarden::sim::world::{Template, World};
use snapwarden::snapshot::{InstanceId, Snapshot, SnapshotId, SnapshotState, ZoneName};
use snapwarden::transport::Request;

use super::fleet::{FOLDER, Parts, PolicyPart, REPOSITORY, Store};
use super::told::selects;

/// Clocks may differ by this much before nothing is deleted, and runs take their time.
const TOLERANCE: SignedDuration = SignedDuration::from_mins(20);

/// What is requested of the platform that changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Create,
    Export,
    Promote,
    Delete,
    DeleteTemplate,
}

impl Action {
    /// What a request changes, and the id in its path.
    pub(super) fn of(request: &Request) -> Option<(Self, String)> {
        let path = request.url.path().strip_prefix("/v2/")?;
        let (kind, rest) = path.split_once('/')?;
        let (id, verb) = rest.split_once(':').unwrap_or((rest, ""));
        let action = match (&request.method, kind, verb) {
            (&Method::POST, "instance", "create-snapshot") => Self::Create,
            (&Method::POST, "snapshot", "export") => Self::Export,
            (&Method::POST, "snapshot", "promote") => Self::Promote,
            (&Method::DELETE, "snapshot", "") => Self::Delete,
            (&Method::DELETE, "template", "") => Self::DeleteTemplate,
            _ => return None,
        };
        Some((action, id.to_owned()))
    }

    pub(super) fn in_log(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Export => "export",
            Self::Promote => "promote",
            Self::Delete => "delete",
            Self::DeleteTemplate => "delete_template",
        }
    }
}

/// A snapshot that ever was.
#[derive(Debug)]
pub(super) struct Known {
    /// As it was when it was last seen in a state that lasts.
    pub(super) snapshot: Snapshot,
    pub(super) image: Bytes,
    pub(super) zone: ZoneName,
    /// Whether the program took it.
    pub(super) is_ours: bool,
    /// Since when it has failed.
    pub(super) failed_at: Option<Timestamp>,
    /// When a run of each policy has surely seen that, since the last listing that was not the truth.
    pub(super) seen_failed_at: BTreeMap<PolicyName, Timestamp>,
    /// The policies of which a run has surely seen it good.
    pub(super) seen_good_by: BTreeSet<PolicyName>,
    /// Whether a listing surely had it.
    pub(super) was_listed: bool,
}

/// The copies in an archive, by their bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Copies {
    /// Those that are whole, or of whose damage nobody can know yet.
    pub(super) intact: BTreeMap<SnapshotId, CopyFacts>,
    /// Those that the archive's retention removed.
    pub(super) pruned: BTreeMap<SnapshotId, CopyFacts>,
}

impl Copies {
    /// Those that count for the gate: one that was removed counts while one of its instance stays that is at least as new.
    fn counted(&self) -> Vec<CopyFacts> {
        let key = |copy: &CopyFacts| (copy.created_at, copy.snapshot_id);
        let stays = |pruned: &&CopyFacts| {
            self.intact
                .values()
                .any(|copy| copy.instance_id == pruned.instance_id && key(copy) >= key(pruned))
        };
        self.intact.values().chain(self.pruned.values().filter(stays)).copied().collect()
    }
}

/// A deletion that was requested, and what was true then.
#[derive(Debug, Clone)]
pub(super) struct Deletion {
    /// Whose run it was, where that is known.
    policy: Option<PolicyName>,
    pub(super) snapshot: SnapshotId,
    pub(super) zone: ZoneName,
    at: Timestamp,
    there: Vec<Snapshot>,
    copies: BTreeMap<ArchiveName, Copies>,
    present: Situation,
}

/// A situation that a run of a policy remembers.
#[derive(Debug, Clone)]
pub(super) struct Former {
    situation: Situation,
    /// When a run first saw another one.
    pub(super) replaced_at: Option<Timestamp>,
}

/// How a snapshot ended that the program did not delete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// Somebody deleted it, from this network address.
    Somebody(String),
    /// It vanished, and the platform does not say why.
    Nobody,
    /// Its instance was deleted.
    WithInstance,
}

#[derive(Debug, Default)]
pub(super) struct Book {
    /// What strangers did to snapshots, and when.
    pub(super) ends: BTreeMap<SnapshotId, (End, Timestamp)>,
    pub(super) known: BTreeMap<SnapshotId, Known>,
    /// Until when each snapshot is on hold.
    pub(super) on_hold: BTreeMap<SnapshotId, Timestamp>,
    /// The instances that are there.
    pub(super) instances: BTreeMap<InstanceId, (ZoneName, InstanceFacts)>,
    /// When each instance was created.
    pub(super) created_at: BTreeMap<InstanceId, Timestamp>,
    /// As they are by the configuration and the pauses.
    pub(super) policies: Vec<Policy>,
    /// As they were until a daemon read another configuration in this night.
    pub(super) policies_before: Option<Vec<Policy>>,
    /// Since when each policy is paused by hand.
    pub(super) paused: BTreeMap<PolicyName, Timestamp>,
    /// The policies of which an operator lets a run pass.
    pub(super) allowed: BTreeSet<PolicyName>,
    /// Those of which one has passed in this night.
    pub(super) used_up: BTreeSet<PolicyName>,
    /// The slot for which policies run now.
    pub(super) slot: Option<Timestamp>,
    /// Damaged copies that no verification has found, by archive.
    pub(super) unfound: BTreeSet<(&'static str, SnapshotId)>,
    pub(super) memories: BTreeMap<(PolicyName, ZoneName), Vec<Former>>,
    /// The snapshots of which a report said that the program has taken them.
    pub(super) surely_ours: BTreeSet<SnapshotId>,
    /// Whether a listing ever was not the truth.
    pub(super) has_lied: bool,
    // Of this night:
    /// Snapshots that others took or deleted while the program ran.
    pub(super) meddled: BTreeSet<SnapshotId>,
    /// What is said against deletions of templates.
    pub(super) wrong_templates: Vec<String>,
    /// How many templates were asked to be deleted.
    pub(super) deleted_templates: usize,
    pub(super) deletions: Vec<Deletion>,
    pub(super) creations: BTreeSet<SnapshotId>,
    /// Requests of which no safe line of the audit log said before that they were intended.
    pub(super) unwritten: Vec<String>,
    /// All that was seen of this life, line by line, if two plays are to be compared.
    pub(super) trace: Option<Vec<String>>,
}

fn id_in(name: &str, end: &str) -> Option<SnapshotId> {
    let stem = name.strip_suffix(end)?;
    // `20261101T023000Z-` comes before the id.
    stem.get(17..)?.parse().ok()
}

/// The files of an archive, by their names alone.
fn files(
    store: Store,
    (disk, bucket, restic): (&MemoryDisk, &SimBucket, &SimRestic),
    vault: &str,
) -> Vec<(String, Bytes)> {
    let last = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
    match store {
        Store::Folder => {
            let all = disk.files(&std::path::Path::new(FOLDER).join(vault)).into_iter();
            all.map(|(path, bytes)| (last(&path.to_string_lossy()), Bytes::from(bytes.as_ref().clone())))
                .collect()
        }
        Store::Bucket => bucket.contents().into_iter().map(|(key, bytes)| (last(&key), bytes)).collect(),
        Store::Repository => {
            let all = |all: &mut snapwarden::sim::restic::SimRepository| {
                // What is lost is listed, and has other bytes than it had.
                let bytes =
                    |bytes: &Bytes| if all.lost.contains(bytes) { Bytes::new() } else { bytes.clone() };
                all.snapshots.iter().map(|one| (last(&one.path), bytes(&one.bytes))).collect()
            };
            restic.with(REPOSITORY, all).unwrap_or_default()
        }
    }
}

impl Book {
    /// Writes a line down, if this life is compared with another.
    pub(super) fn trace(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(line());
        }
    }

    /// Each snapshot must be known before it can be deleted.
    pub(super) fn remember(&mut self, world: &World, zones: &[ZoneName]) {
        for zone in zones {
            for snapshot in world.snapshots(zone) {
                let lasts = matches!(
                    snapshot.state,
                    SnapshotState::Exported | SnapshotState::Ready | SnapshotState::Error
                );
                let is_ours = self.creations.contains(&snapshot.id);
                let (is_failed, at) = (snapshot.state == SnapshotState::Error, world.now());
                let known = self.known.entry(snapshot.id).or_insert_with(|| {
                    let image = world.image(snapshot.id);
                    Known {
                        snapshot: snapshot.clone(),
                        image: image.read(0..image.file_bytes()).into(),
                        zone: zone.clone(),
                        is_ours,
                        failed_at: None,
                        seen_failed_at: BTreeMap::new(),
                        seen_good_by: BTreeSet::new(),
                        was_listed: false,
                    }
                });
                if lasts {
                    known.snapshot = snapshot;
                }
                if is_failed {
                    known.failed_at.get_or_insert(at);
                } else {
                    known.failed_at = None;
                    known.seen_failed_at.clear();
                }
            }
        }
    }

    /// What an archive really holds.
    pub(super) fn copies(&self, store: Store, stores: (&MemoryDisk, &SimBucket, &SimRestic)) -> Copies {
        let files = files(store, stores, "vault");
        let mut copies = Copies::default();
        let facts = |id: SnapshotId, manifest: &[u8]| {
            let known = self.known.get(&id)?;
            // The first text behind the key, since reading the JSON of all manifests again and again takes most of the time.
            let manifest = std::str::from_utf8(manifest).ok()?;
            let exported_at =
                manifest.split_once("\"exported_at\"").and_then(|(_, rest)| rest.split('"').nth(1));
            Some(CopyFacts {
                snapshot_id: id,
                instance_id: known.snapshot.instance_id?,
                created_at: known.snapshot.created_at,
                exported_at: exported_at.and_then(|at| at.parse().ok()),
            })
        };
        let mut images: BTreeMap<SnapshotId, Vec<&Bytes>> = BTreeMap::new();
        for (name, bytes) in &files {
            if let Some(id) = id_in(name, ".qcow2") {
                images.entry(id).or_default().push(bytes);
            }
        }
        for (name, bytes) in &files {
            if let Some(id) = id_in(name, ".pruned.json") {
                copies.pruned.extend(facts(id, bytes).map(|facts| (id, facts)));
            } else if let Some(id) = id_in(name, ".json") {
                let is_whole = |image: &&Bytes| {
                    let is_unfound = self.unfound.contains(&(store.name(), id));
                    is_unfound || self.known.get(&id).is_some_and(|known| known.image == **image)
                };
                if images.get(&id).is_some_and(|images| images.iter().any(is_whole)) {
                    copies.intact.extend(facts(id, bytes).map(|facts| (id, facts)));
                }
            }
        }
        copies
    }

    /// A configuration comes into force.
    pub(super) fn configure(&mut self, config: &Config) {
        self.policies.clone_from(&config.policies);
        pauses::apply(&mut self.policies, &self.paused);
        self.policies_before = None;
    }

    /// A running daemon reads another configuration. Runs that have begun go on by the one before.
    pub(super) fn configure_anew(&mut self, config: &Config, at: Timestamp) {
        let before = self.policies_before.take().unwrap_or_else(|| self.policies.clone());
        self.configure(config);
        self.policies_before = Some(before);
        self.begin_run(None, at);
    }

    /// Whether the policy is there, and neither disabled nor paused.
    pub(super) fn is_enabled(&self, policy: &str) -> bool {
        self.policies.iter().any(|one| one.name.as_str() == policy && one.enabled)
    }

    /// What is so in a zone now.
    fn present(&self, zone: &ZoneName) -> Situation {
        let here = || self.policies.iter().filter(|policy| policy.zones.contains(zone));
        let instances = self.instances.values().filter(|(of, _)| of == zone);
        let paused = |policy: &Policy| Some((policy.name.clone(), policy.paused_since?));
        Situation {
            policies: here().map(|policy| (policy.name.clone(), deciding_keys(policy))).collect(),
            paused: here().filter_map(paused).collect(),
            instances: instances.map(|(_, facts)| facts.clone()).collect(),
            good: BTreeSet::new(),
        }
    }

    /// A run of a policy begins, or of any of them: what it sees for the first time has changed now.
    pub(super) fn begin_run(&mut self, policy: Option<&PolicyName>, at: Timestamp) {
        let zones: BTreeSet<ZoneName> = self.memories.keys().map(|(_, zone)| zone.clone()).collect();
        let present: BTreeMap<ZoneName, Situation> =
            zones.into_iter().map(|zone| (zone.clone(), self.present(&zone))).collect();
        // What a policy that is paused would have seen it learns from the memories of others.
        let enabled: BTreeSet<PolicyName> =
            self.policies.iter().filter(|policy| policy.enabled).map(|policy| policy.name.clone()).collect();
        for ((name, zone), formers) in &mut self.memories {
            if policy.is_none_or(|policy| policy == name || !enabled.contains(name)) {
                let replaced = formers.iter_mut().filter(|former| former.situation != present[zone]);
                replaced.for_each(|former| former.replaced_at = former.replaced_at.or(Some(at)));
            }
        }
    }

    /// A run ended, and what it saw is remembered if it was whole.
    pub(super) fn end_run(&mut self, report: &RunReport) {
        if report.result != RunResult::Success {
            return;
        }
        self.used_up.insert(report.policy.clone());
        for zone in &report.zones {
            let situation = self.present(&zone.zone);
            let formers = self.memories.entry((report.policy.clone(), zone.zone.clone())).or_default();
            formers.retain(|former| former.situation != situation);
            formers.push(Former { situation, replaced_at: None });
        }
    }

    /// A deletion is requested.
    pub(super) fn note_deletion(
        &mut self,
        policy: Option<PolicyName>,
        id: &str,
        zone: &ZoneName,
        (world, zones): (&World, &[ZoneName]),
        stores: (&MemoryDisk, &SimBucket, &SimRestic),
    ) {
        self.remember(world, zones);
        let Ok(snapshot) = id.parse() else { return };
        let mut there = world.snapshots(zone);
        // Nor does the plan know what others deleted since.
        let was_deleted = |id: &&SnapshotId| self.known[*id].zone == *zone && self.ends.contains_key(*id);
        let gone = self.meddled.iter().filter(was_deleted).map(|id| self.known[id].snapshot.clone());
        there.extend(gone);
        // The plan was made with those that have been deleted since.
        for deletion in &self.deletions {
            let is_gone = there.iter().all(|one| one.id != deletion.snapshot);
            if is_gone && deletion.zone == *zone {
                there.push(self.known[&deletion.snapshot].snapshot.clone());
            }
        }
        for one in &mut there {
            let is_ours = self.deletions.iter().any(|deletion| deletion.snapshot == one.id);
            if is_ours && one.state == SnapshotState::Deleting {
                one.state = self.known[&one.id].snapshot.state.clone();
            }
        }
        let copies = Store::ALL.map(|store| (store.name().parse().unwrap(), self.copies(store, stores)));
        let present = self.present(zone);
        let (copies, at) = (BTreeMap::from(copies), world.now());
        self.deletions.push(Deletion { policy, snapshot, zone: zone.clone(), at, there, copies, present });
    }

    /// A template is asked to be deleted: the snapshot that it was made of gave it its name.
    pub(super) fn note_template_deletion(&mut self, id: &str, there: &[Template], now: Timestamp) {
        self.deleted_templates += 1;
        let of = |template: &Template| {
            let made_of = self.known.values().find(|known| *known.snapshot.name == *template.name)?;
            Some((made_of.snapshot.instance_id?, made_of.snapshot.created_at, made_of.snapshot.id))
        };
        let Some(victim) = there.iter().find(|one| one.id.to_string() == id).and_then(of) else { return };
        let newer = there.iter().filter(|one| one.id.to_string() != id).filter_map(of);
        let newer = newer.filter(|one| one.0 == victim.0 && *one >= victim).count();
        let keep = self.policies.iter().filter_map(|policy| policy.promote.as_ref()?.keep).max();
        let is_on_hold = self.on_hold.get(&victim.2).is_some_and(|until| now + TOLERANCE < *until);
        if is_on_hold || keep.is_none_or(|keep| newer < keep.get() as usize) {
            let why = format!("{id}: {victim:?} has {newer} newer, of {keep:?}; on hold: {is_on_hold}");
            self.wrong_templates.push(why);
        }
    }

    /// What is said against the deletions that were requested, with the victim: by the configuration, and if a daemon read it
    /// in this night, by the one from before as well.
    pub(super) fn objections(&mut self, [parts, before]: [&Parts; 2]) -> Option<(SnapshotId, String)> {
        let deletions = self.deletions.clone();
        deletions.into_iter().find_map(|mut deletion| {
            let objection = self.objection(&deletion, parts)?;
            let Some(policies) = self.policies_before.clone() else {
                return Some((deletion.snapshot, objection));
            };
            let policies = std::mem::replace(&mut self.policies, policies);
            let mut before_it = || {
                deletion.present = self.present(&deletion.zone);
                self.objection(&deletion, before)
            };
            let objection_before = before_it();
            self.policies = policies;
            Some((deletion.snapshot, format!("{objection}\nand before the reload: {}", objection_before?)))
        })
    }

    /// What is said against a deletion that was requested.
    fn objection(&self, deletion: &Deletion, parts: &Parts) -> Option<String> {
        if let Some(objection) = self.plain_objection(deletion) {
            return Some(objection);
        }
        let named = |policy: &&Policy| deletion.policy.as_ref().is_none_or(|name| policy.name == *name);
        let mut against = Vec::new();
        for policy in self.policies.iter().filter(|policy| policy.enabled).filter(named) {
            // A span may have ended within what the clocks differ by.
            for now in [deletion.at, deletion.at + TOLERANCE] {
                against.push(self.rules_against(policy, deletion, parts, now)?);
            }
        }
        Some(against.join("\n"))
    }

    /// What a policy's rules say against a deletion at this moment; nothing if they delete it, too.
    fn rules_against(
        &self,
        policy: &Policy,
        deletion: &Deletion,
        parts: &Parts,
        now: Timestamp,
    ) -> Option<String> {
        let facts = self.facts(policy, deletion, parts, now);
        let rulings = match judge::rulings(&facts) {
            Ok(rulings) => rulings,
            Err(why) => return Some(why),
        };
        let of = facts.snapshots.iter().zip(rulings).find(|(one, _)| one.id == deletion.snapshot);
        match of.and_then(|(_, ruling)| ruling) {
            Some(ruling) if ruling.verdict == Verdict::Delete => None,
            Some(ruling) => Some(format!("{}: {ruling}\n{facts:#?}", policy.name)),
            None => Some(format!("{}: it does not select it", policy.name)),
        }
    }

    /// What no reading of rules is needed for.
    fn plain_objection(&self, deletion: &Deletion) -> Option<String> {
        if self.on_hold.get(&deletion.snapshot).is_some_and(|until| deletion.at < *until) {
            return Some("it is on hold".to_owned());
        }
        let victim = &self.known[&deletion.snapshot].snapshot;
        let key = |one: &Snapshot| (one.created_at, one.id);
        let newer = deletion.there.iter().filter(|one| {
            one.instance_id == victim.instance_id
                && key(one) > key(victim)
                && (one.state.is_good() || one.state == SnapshotState::Deleting)
        });
        let is_last = newer.count() == 0 && victim.state.is_good();
        is_last.then(|| "it is the newest good one of its instance".to_owned())
    }

    /// A snapshot of which the rules say by now that only a change deletes it, which has not settled.
    pub(super) fn waiting(
        &self,
        policy: &PolicyName,
        zone: &ZoneName,
        snapshots: &[Snapshot],
        parts: &Parts,
        now: Timestamp,
    ) -> Option<SnapshotId> {
        let policy = self.policies.iter().find(|one| one.name == *policy)?;
        let here = |one: &&Snapshot| {
            one.instance_id.and_then(|id| self.instances.get(&id)).is_some_and(|(of, _)| of == zone)
        };
        let deletion = Deletion {
            policy: None,
            snapshot: snapshots.first()?.id,
            zone: zone.clone(),
            at: now,
            there: snapshots.iter().filter(here).cloned().collect(),
            copies: BTreeMap::new(),
            present: self.present(zone),
        };
        let mut facts = self.facts(policy, &deletion, parts, now);
        // What the gate keeps waits for nothing else.
        facts.archives = facts.archives.into_keys().map(|name| (name, Holdings::Unreachable)).collect();
        let waits = |facts: &Facts| -> Option<BTreeSet<SnapshotId>> {
            let rulings = judge::rulings(facts).ok()?;
            let waits =
                |ruling: &Option<Ruling>| ruling.as_ref().is_some_and(|ruling| ruling.rule == "change");
            let of = facts.snapshots.iter().zip(&rulings);
            Some(of.filter(|(_, ruling)| waits(ruling)).map(|(one, _)| one.id).collect())
        };
        let with_gate = waits(&facts)?;
        // A run that did not end may have seen a failed one while it was good; one that a listing lacked for a time is new to the
        // program; and after a lost answer it does not know its own.
        let mut as_it_may_know = facts.clone();
        for one in &mut as_it_may_know.snapshots {
            let Some(known) = self.known.get(&one.id) else { continue };
            one.owner = one.owner.take().filter(|_| self.surely_ours.contains(&one.id));
            let since = known.seen_failed_at.get(&policy.name).copied().unwrap_or(now);
            one.failed = known.failed_at.map(|_| FailedFacts { since, was_good: true });
        }
        let as_it_may_know = waits(&as_it_may_know)?;
        // Nor does what an edit of the gate alone lets go: whether it has its copy is not asked here.
        for situation in std::iter::once(&mut facts.present).chain(&mut facts.before) {
            for terms in situation.policies.values_mut() {
                terms.remove("export.required");
            }
        }
        let without_gate = waits(&facts)?;
        with_gate.into_iter().find(|id| without_gate.contains(id) && as_it_may_know.contains(id))
    }

    /// What the rules delete by now, and nothing did, though nothing is in the way.
    pub(super) fn left_over(
        &self,
        zone: &ZoneName,
        (there, busy): (&[Snapshot], &BTreeSet<SnapshotId>),
        parts: &Parts,
        copies: &BTreeMap<ArchiveName, Copies>,
        now: Timestamp,
    ) -> Option<String> {
        let deletion = Deletion {
            policy: None,
            snapshot: there.first()?.id,
            zone: zone.clone(),
            at: now,
            there: there.to_vec(),
            copies: copies.clone(),
            present: self.present(zone),
        };
        let here = |policy: &&Policy| policy.enabled && policy.zones.contains(zone);
        self.policies.iter().filter(here).find_map(|policy| {
            let mut facts = self.facts(policy, &deletion, parts, now);
            for one in &mut facts.snapshots {
                // After a lost answer the program does not know its own, and forgets those that listings lacked for a time.
                let is_known = !self.has_lied && self.surely_ours.contains(&one.id);
                one.owner = one.owner.take().filter(|_| is_known);
                // When it failed is known from the policy's first run that saw it.
                let known = self.known.get(&one.id);
                let since =
                    known.and_then(|known| known.seen_failed_at.get(&policy.name)).copied().unwrap_or(now);
                if let Some(until) = one.hold.as_mut().and_then(|hold| hold.until.as_mut()) {
                    *until += TOLERANCE * 2;
                }
                one.failed = one.failed.take().map(|_| FailedFacts { since, was_good: true });
            }
            let rulings = judge::rulings(&facts).ok()?;
            let is_deleted = |ruling: &Option<Ruling>| {
                ruling.as_ref().is_some_and(|ruling| ruling.verdict == Verdict::Delete)
            };
            let of = facts.snapshots.iter().zip(&rulings);
            let mut left = of.filter(|(one, ruling)| is_deleted(ruling) && !busy.contains(&one.id));
            left.next().map(|(one, _)| format!("{} by {}\n{facts:#?}", one.id, policy.name))
        })
    }

    fn facts(&self, policy: &Policy, deletion: &Deletion, parts: &Parts, now: Timestamp) -> Facts {
        let name = policy.name.as_str();
        let settle = parts.policy(name).map_or(SignedDuration::ZERO, PolicyPart::settle);
        let formers = self.memories.get(&(policy.name.clone(), deletion.zone.clone()));
        let is_unsettled = |former: &&Former| {
            let replaced = former.replaced_at;
            former.situation != deletion.present
                && replaced.is_some_and(|at| deletion.at.duration_since(at) + TOLERANCE < settle)
        };
        let before = formers.into_iter().flatten().filter(is_unsettled).map(|former| {
            let mut situation = former.situation.clone();
            let is_known = |one: &InstanceFacts| situation.instances.iter().any(|other| other.id == one.id);
            // What a memory does not know is taken as it is.
            let new = deletion.present.instances.iter().filter(|one| !is_known(one)).cloned();
            let new: Vec<InstanceFacts> = new.collect();
            situation.instances.extend(new);
            situation.instances.retain(|one| self.instances.contains_key(&one.id));
            situation
        });
        let changes_are_allowed = self.allowed.contains(&policy.name);
        let missing = self.slot.filter(|_| policy.create).into_iter().flat_map(|slot| {
            let has_one = move |id: InstanceId| {
                let is_of_slot = |one: &Snapshot| one.instance_id == Some(id) && one.created_at >= slot;
                let is_there = deletion
                    .there
                    .iter()
                    .any(|one| is_of_slot(one) && (one.state.is_good() || one.state.is_in_flight()));
                // What somebody deleted after it was taken is not taken again for the same time.
                let mut ended = self.ends.keys().filter_map(|id| self.known.get(id));
                is_there || ended.any(|known| known.is_ours && is_of_slot(&known.snapshot))
            };
            // Of several policies that take one for the same time one does, and the others do not lack it.
            let takers = move |one: &InstanceFacts| {
                let takes = |part: &&PolicyPart| {
                    part.get("", "create").is_some() && selects(part, one) && self.is_enabled(part.name)
                };
                parts.policies.iter().filter(takes).count()
            };
            let lacks_one = move |one: &&InstanceFacts| !has_one(one.id) && takers(one) < 2;
            let lacking = deletion.present.instances.iter().filter(lacks_one);
            lacking.map(move |one| (one.id, slot))
        });
        let missing = missing.map(|(instance, slot)| MissingFacts {
            policy: policy.name.clone(),
            instance: Some(instance),
            slot,
        });
        let snapshots = deletion.there.iter().map(|one| self.snapshot_facts(one, policy)).collect();
        let counted = deletion.copies.iter();
        Facts {
            policy: policy.name.clone(),
            zone: deletion.zone.clone(),
            now,
            this_machine: None,
            present: deletion.present.clone(),
            before: before.collect(),
            has_too_many_changes: false,
            changes_are_allowed,
            snapshots,
            archives: counted.map(|(name, of)| (name.clone(), Holdings::Known(of.counted()))).collect(),
            unadopted: None,
            missing: missing.collect(),
            emptied: BTreeSet::new(),
        }
    }

    fn snapshot_facts(&self, one: &Snapshot, policy: &Policy) -> SnapshotFacts {
        let known = self.known.get(&one.id);
        let owner = known.filter(|known| known.is_ours);
        SnapshotFacts {
            id: one.id,
            name: one.name.to_string(),
            created_at: one.created_at,
            state: one.state.as_str().to_owned(),
            instance_id: one.instance_id,
            is_consistent: one.application_consistent == Some(true),
            owner: owner.map(|_| Owner { maker: Some(policy.name.clone()), served: Vec::new() }),
            hold: self.on_hold.get(&one.id).map(|until| HoldFacts { until: Some(*until - TOLERANCE) }),
            failed: known.and_then(|known| {
                let was_good = known.seen_good_by.contains(&policy.name);
                // Of one that was never seen good it is not known when it failed.
                let since = |at| if was_good { at } else { one.created_at };
                known.failed_at.map(|at| FailedFacts { since: since(at), was_good })
            }),
        }
    }
}
