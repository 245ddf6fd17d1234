//! The state of the whole fleet for a person, as the daemon's page shows it: is everything backed up, what is wrong, and
//! what will be deleted.
//!
//! It is made from the model alone: from what the last runs left, judged as of now.

use std::collections::{BTreeMap, HashMap, HashSet};

use jiff::{SignedDuration, Timestamp};

use crate::policy::name::{ArchiveName, PolicyName};
use crate::run::coverage::{Lack, lacks};
use crate::run::details::{CopyDetails, CopyKept, SnapshotDetails};
use crate::run::downloads::RunningDownload;
use crate::run::instance_counts::is_remembered;
use crate::snapshot::{InstanceId, SnapshotId, ZoneName};
use crate::state::history::Change;
use crate::telemetry::model::{Model, PolicyModel, ZoneModel};
use crate::telemetry::status::{Problem, Status};

/// The most deletions of one policy in one zone that are listed.
const DELETIONS_MAX: usize = 10;

/// The whole fleet.
#[derive(Debug)]
pub struct Overview {
    /// The moment, the policies, the archives and the downloads.
    pub status: Status,
    /// What is wrong with anything but an instance.
    pub problems: Vec<Problem>,
    /// Every instance that a policy knows, the worst first.
    pub instances: Vec<InstanceSummary>,
    /// What each policy's next run deletes in each zone, the soonest first.
    pub deleted_next: Vec<NextDeletions>,
    /// What was deleted last, the newest first.
    pub deleted_last: Vec<Change>,
}

/// The state of an instance; the worst is the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum InstanceState {
    /// It has no good snapshot.
    NoSnapshot,
    /// No enabled policy takes or exports its snapshots.
    Uncovered,
    /// Its newest good snapshot is too old.
    Stale,
    /// An archive lacks a copy that it should have.
    NoCopy,
    /// It was listed, and is not any more.
    Vanished,
    /// It is so new that it needs no snapshot yet.
    New,
    /// It has the snapshots that it should have, and no copy: they are deleted with it.
    SnapshotsOnly,
    /// It has what it should have, and a copy of it.
    BackedUp,
    /// It is meant to be without a backup.
    Exempt,
}

/// An instance.
#[derive(Debug, Clone)]
pub struct InstanceSummary {
    /// Its zone.
    pub zone: ZoneName,
    /// Its id; not known of one that no policy selects.
    pub id: Option<InstanceId>,
    /// Its name; hostile text.
    pub name: String,
    /// Its state.
    pub state: InstanceState,
    /// When the newest good snapshot was taken.
    pub newest_snapshot: Option<Timestamp>,
    /// When the newest snapshot was taken of which there is a verified copy, and where that is.
    pub newest_copy: Option<(Timestamp, ArchiveName)>,
    /// The policies that select it.
    pub policies: Vec<PolicyName>,
    /// What it lacks.
    pub problems: Vec<Problem>,
}

/// What the next run of a policy deletes in a zone.
#[derive(Debug)]
pub struct NextDeletions {
    /// The policy.
    pub policy: PolicyName,
    /// The zone.
    pub zone: ZoneName,
    /// When that run is due; none if it is manual.
    pub at: Option<Timestamp>,
    /// That others take its snapshots: each new one may make an older one too many.
    pub others_take: bool,
    /// That the guard blocked the last run's deletions.
    pub is_blocked: bool,
    /// How many there are; none if no run in this process has ended yet.
    pub count: Option<usize>,
    /// The first of them.
    pub first: Vec<NextDeletion>,
}

/// A snapshot that the next run deletes.
#[derive(Debug)]
pub struct NextDeletion {
    /// Its id.
    pub snapshot_id: SnapshotId,
    /// When it was taken.
    pub created_at: Timestamp,
    /// Its instance.
    pub instance_id: InstanceId,
    /// The name of that; hostile text.
    pub instance_name: String,
    /// Why it is deleted.
    pub why: String,
}

/// One instance with all that is known of it.
#[derive(Debug)]
pub struct InstanceOverview {
    /// The moment.
    pub at: Timestamp,
    /// As in the list of all.
    pub summary: InstanceSummary,
    /// What each policy says of its snapshots.
    pub policies: Vec<PolicyOfInstance>,
    /// Its copies, by archive, the newest first.
    pub copies: Vec<CopyDetails>,
}

/// What a policy says of the snapshots of an instance.
#[derive(Debug)]
pub struct PolicyOfInstance {
    /// The policy.
    pub policy: PolicyName,
    /// Whether it deletes any.
    pub prunes: bool,
    /// When it is due next.
    pub next_run_at: Option<Timestamp>,
    /// When it was listed; none if no run in this process has ended yet.
    pub listed_at: Option<Timestamp>,
    /// Its snapshots, the newest first.
    pub snapshots: Vec<SnapshotDetails>,
}

impl InstanceState {
    /// The state for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoSnapshot => "no snapshot",
            Self::Uncovered => "not covered",
            Self::Stale => "too old",
            Self::NoCopy => "copy missing",
            Self::Vanished => "vanished",
            Self::New => "new",
            Self::SnapshotsOnly => "snapshots only",
            Self::BackedUp => "backed up",
            Self::Exempt => "exempt",
        }
    }
}

impl InstanceSummary {
    fn new(zone: &ZoneName, id: Option<InstanceId>, name: &str) -> Self {
        Self {
            zone: zone.clone(),
            id,
            name: name.to_owned(),
            state: InstanceState::Exempt,
            newest_snapshot: None,
            newest_copy: None,
            policies: Vec::new(),
            problems: Vec::new(),
        }
    }

    fn lacks(&mut self, state: InstanceState, text: String, command: String) {
        self.state = self.state.min(state);
        if self.problems.iter().all(|problem| problem.text != text) {
            self.problems.push(Problem { text, command });
        }
    }
}

/// What is added up of an instance before it is judged.
struct Gathered<'m> {
    summary: InstanceSummary,
    is_listed: bool,
    is_exempt: bool,
    is_covered: bool,
    vanished_at: Option<Timestamp>,
    /// A policy that is paused by hand.
    paused: Option<&'m PolicyName>,
}

impl Model {
    pub(super) fn overview(&self, running: Vec<RunningDownload>, now: Timestamp) -> Overview {
        let status = self.status(running, now);
        let mut instances = self.summaries(None, now);
        instances.sort_by(|one, other| {
            let key = |one: &InstanceSummary| (one.state, one.newest_snapshot);
            key(one).cmp(&key(other)).then_with(|| (&one.name, one.id).cmp(&(&other.name, other.id)))
        });
        let mut deleted_next = Vec::new();
        for (name, policy) in self.policies.iter().filter(|(_, policy)| policy.status.enabled) {
            let zones = policy.zones.iter();
            deleted_next.extend(zones.filter_map(|(zone, known)| policy.deleted_next(name, zone, known)));
        }
        // A manual run may come at any time.
        deleted_next.sort_by_key(|next| (next.at.is_none(), next.at));
        // Those of instances stand with each instance.
        let is_of_instances = |policy: &str, zone: &str, text: &str| {
            let known = self.policies.iter().find(|(name, _)| name.as_str() == policy);
            let known =
                known.and_then(|(_, known)| known.zones.iter().find(|(name, _)| name.as_str() == zone));
            known.is_some_and(|(_, zone)| zone.memory.unmatched.as_deref() != Some(text))
        };
        let problems = [status.problems_but(is_of_instances), status.paused()].concat();
        let deleted_last = self.deleted_last.iter().rev().cloned().collect();
        Overview { status, problems, instances, deleted_next, deleted_last }
    }

    pub(super) fn instance(
        &self,
        zone: &ZoneName,
        id: InstanceId,
        now: Timestamp,
    ) -> Option<InstanceOverview> {
        let summary = self.summaries(Some((zone, id)), now).into_iter().next()?;
        let (mut policies, mut copies) = (Vec::new(), BTreeMap::new());
        for name in &summary.policies {
            let Some(policy) = self.policies.get(name) else { continue };
            let details = policy.zones.get(zone).and_then(|zone| zone.details.as_ref());
            let snapshots = details.iter().flat_map(|details| &details.snapshots);
            policies.push(PolicyOfInstance {
                policy: name.clone(),
                prunes: policy.policy.retention.is_some(),
                next_run_at: policy.status.next_run_at,
                listed_at: details.map(|details| details.at),
                snapshots: snapshots.filter(|snapshot| snapshot.instance_id == id).cloned().collect(),
            });
            let Some(details) = details else { continue };
            for copy in details.copies.iter().filter(|copy| copy.instance_id == id) {
                // By several policies: as the last one found it.
                let key = (copy.archive.clone(), std::cmp::Reverse(copy.created_at), copy.snapshot_id);
                let known = copies.entry(key).or_insert((details.at, copy));
                if known.0 < details.at {
                    *known = (details.at, copy);
                }
            }
        }
        let copies = copies.into_values().map(|(_, copy)| copy.clone()).collect();
        Some(InstanceOverview { at: now, summary, policies, copies })
    }

    /// Every instance, or one, in any order.
    fn summaries(&self, only: Option<(&ZoneName, InstanceId)>, now: Timestamp) -> Vec<InstanceSummary> {
        let mut all: HashMap<(&ZoneName, InstanceId), Gathered<'_>> = HashMap::new();
        for (name, policy) in &self.policies {
            let gap = policy.expected_interval.and_then(|span| SignedDuration::try_from(span).ok());
            for (zone, known) in &policy.zones {
                for counts in &known.memory.instances {
                    let is_meant = only.is_none_or(|(of, id)| (of, id) == (zone, counts.id));
                    let is_vanished = policy.status.enabled && is_remembered(counts, now);
                    if !is_meant || !(counts.is_listed || is_vanished) {
                        continue;
                    }
                    let one = all.entry((zone, counts.id)).or_insert_with(|| Gathered {
                        summary: InstanceSummary::new(zone, Some(counts.id), &counts.name),
                        is_listed: false,
                        is_exempt: false,
                        is_covered: false,
                        vanished_at: None,
                        paused: None,
                    });
                    one.is_listed |= counts.is_listed;
                    one.is_exempt |= counts.is_exempt;
                    one.vanished_at = one.vanished_at.or(counts.vanished_at);
                    one.is_covered |= policy.status.enabled && policy.makes_backups();
                    if policy.status.paused_since.is_some() {
                        one.paused = Some(name);
                    }
                    let summary = &mut one.summary;
                    summary.policies.push(name.clone());
                    summary.newest_snapshot = summary.newest_snapshot.max(counts.newest_at);
                    for (archive, at) in &counts.newest_verified_at {
                        if summary.newest_copy.as_ref().is_none_or(|(newest, _)| newest < at) {
                            summary.newest_copy = Some((*at, archive.clone()));
                        }
                    }
                    for lack in lacks(&policy.policy, gap, counts, now) {
                        let (state, text) = match lack {
                            Lack::Snapshot(text) => (InstanceState::NoSnapshot, text),
                            Lack::NewSnapshot(text) => (InstanceState::Stale, text),
                            Lack::Copy(text) => (InstanceState::NoCopy, text),
                        };
                        let is_ours = policy.policy.create || state == InstanceState::NoCopy;
                        let command = if is_ours {
                            format!("snapwarden once {name} --instance {}", counts.id)
                        } else {
                            format!("snapwarden coverage {}", counts.id)
                        };
                        summary.lacks(state, text, command);
                    }
                }
            }
        }
        let mut summaries: Vec<InstanceSummary> = all.into_values().map(judged).collect();
        if only.is_none() {
            self.add_unselected(&mut summaries);
        }
        summaries
    }

    /// Adds the uncovered instances that no policy selects, of which only the names are known.
    fn add_unselected(&self, summaries: &mut Vec<InstanceSummary>) {
        for (zone, coverage) in self.coverage() {
            let known =
                summaries.iter().filter(|one| one.zone == *zone && one.state < InstanceState::SnapshotsOnly);
            let known: HashSet<String> = known.map(|one| one.name.clone()).collect();
            for name in coverage.uncovered_instances.iter().filter(|name| !known.contains(*name)) {
                let mut summary = InstanceSummary::new(zone, None, name);
                let text =
                    "no policy selects it: add it to `select` of a policy, or to `exempt` in `[coverage]`";
                summary.lacks(InstanceState::Uncovered, text.to_owned(), "snapwarden coverage".to_owned());
                summaries.push(summary);
            }
        }
    }
}

fn judged(one: Gathered<'_>) -> InstanceSummary {
    let Gathered { mut summary, is_listed, is_exempt, is_covered, vanished_at, paused } = one;
    let id = summary.id.map(|id| id.to_string()).unwrap_or_default();
    if let (Some(at), false) = (vanished_at, is_listed) {
        let at = at.strftime("%Y-%m-%d %H:%M:%SZ");
        let text =
            format!("not listed any more since {at}: if it was not meant to be deleted, restore a copy");
        summary.lacks(InstanceState::Vanished, text, format!("snapwarden archive list --instance {id}"));
    } else if is_exempt {
        summary.problems.clear();
        summary.state = InstanceState::Exempt;
    } else if !is_covered {
        let (text, command) = match paused {
            Some(policy) => (
                format!(
                    "no enabled policy takes or exports its snapshots: policy {policy} is paused by hand"
                ),
                format!("snapwarden resume {policy}"),
            ),
            None => (
                "no enabled policy takes or exports its snapshots".to_owned(),
                format!("snapwarden coverage {id}"),
            ),
        };
        summary.lacks(InstanceState::Uncovered, text, command);
    } else if summary.problems.is_empty() {
        summary.state = match (summary.newest_snapshot, &summary.newest_copy) {
            (None, _) => InstanceState::New,
            (Some(_), None) => InstanceState::SnapshotsOnly,
            (Some(_), Some(_)) => InstanceState::BackedUp,
        };
    }
    summary
}

impl PolicyModel {
    fn makes_backups(&self) -> bool {
        self.policy.create || self.policy.export.is_some()
    }

    fn deleted_next(&self, name: &PolicyName, zone: &ZoneName, known: &ZoneModel) -> Option<NextDeletions> {
        self.policy.retention.as_ref()?;
        let details = known.details.as_ref();
        let snapshots = details.iter().flat_map(|details| &details.snapshots);
        let deleted: Vec<&SnapshotDetails> =
            snapshots.filter(|snapshot| snapshot.deleted_next.is_some()).collect();
        let shown = deleted.iter().take(DELETIONS_MAX).map(|snapshot| {
            let counts = known.memory.instances.iter().find(|counts| counts.id == snapshot.instance_id);
            NextDeletion {
                snapshot_id: snapshot.id,
                created_at: snapshot.created_at,
                instance_id: snapshot.instance_id,
                instance_name: counts
                    .map_or_else(|| snapshot.instance_id.to_string(), |one| one.name.clone()),
                why: snapshot.deleted_next.as_deref().unwrap_or_default().to_owned(),
            }
        });
        Some(NextDeletions {
            policy: name.clone(),
            zone: zone.clone(),
            at: self.status.next_run_at,
            others_take: !self.policy.create,
            is_blocked: known.memory.held.is_some(),
            count: details.map(|_| deleted.len()),
            first: shown.collect(),
        })
    }
}

impl CopyKept {
    /// What keeps it, for people.
    pub fn text(self) -> String {
        match self {
            Self::ForEver => "for ever: its archive has no retention".to_owned(),
            Self::Unknown => "not known: it could not be judged".to_owned(),
            Self::By(rule, ..) => rule.to_string(),
        }
    }
}
