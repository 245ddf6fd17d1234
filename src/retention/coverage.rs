//! Coverage: which instances have the snapshots and the copies that they should have.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};

use crate::policy::Policy;
use crate::policy::name::{ArchiveName, PolicyName};
use crate::policy::select::Exemption;
use crate::retention::grouping::latest_counted;
use crate::retention::inventory::{Copies, Inventory};
use crate::snapshot::{Instance, InstanceId, Snapshot, ZoneName};

/// How long a machine may be without a snapshot where the policy has no schedule: two days, since commands and
/// timers mostly run daily.
const GRACE_WITHOUT_SCHEDULE: SignedDuration = SignedDuration::from_hours(48);

/// Whether an instance is meant to have a backup, and whether any policy makes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CoverageState {
    /// An enabled policy takes or exports its snapshots.
    Covered,
    /// None does.
    Uncovered,
    /// It is meant to be without a backup.
    Exempt,
    /// It was listed, and is not any more.
    Vanished,
}

/// Whether an instance has the snapshot that a policy expects of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// It has, or it is too young to have one.
    Fresh,
    /// Its newest good snapshot is too old.
    Stale,
    /// It has no good snapshot.
    None,
}

/// What a policy expects of the snapshots of its instances.
#[derive(Debug, Clone, Copy)]
pub struct Expectation<'a> {
    policy: &'a Policy,
    longest_gap: Option<SignedDuration>,
}

/// An instance that was listed, and is not any more.
#[derive(Debug, Clone)]
pub struct VanishedInstance {
    /// Its id.
    pub id: InstanceId,
    /// Its last known name.
    pub name: String,
    /// When that was found first.
    pub since: Timestamp,
    /// The policies that selected it.
    pub policies: Vec<PolicyName>,
}

/// What an instance has, and what it lacks.
#[derive(Debug, Clone)]
pub struct InstanceCoverage {
    /// Its zone.
    pub zone: ZoneName,
    /// Its id.
    pub id: InstanceId,
    /// Its name.
    pub name: String,
    /// Whether it is meant to have a backup.
    pub state: CoverageState,
    /// The enabled policies that select it.
    pub policies: Vec<PolicyName>,
    /// When its newest good snapshot was taken, also if this program did not take it.
    pub newest_snapshot: Option<Timestamp>,
    /// When the newest snapshot was taken of which an archive has a verified copy.
    pub newest_copy: Option<Timestamp>,
    /// The archives that have a verified copy of it.
    pub archives: Vec<ArchiveName>,
    /// The policies of `policies` for which it has no good snapshot.
    pub missing: Vec<PolicyName>,
    /// Everything that it lacks, in sentences.
    pub problems: Vec<String>,
}

impl CoverageState {
    /// The word for JSON and for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Covered => "covered",
            Self::Uncovered => "uncovered",
            Self::Exempt => "exempt",
            Self::Vanished => "vanished",
        }
    }
}

impl<'a> Expectation<'a> {
    /// With the longest gap between two due times of the policy's schedule, if it has one.
    pub fn new(policy: &'a Policy, longest_gap: Option<SignedDuration>) -> Self {
        Self { policy, longest_gap }
    }

    /// With the longest gap from now on.
    pub fn of(policy: &'a Policy, now: Timestamp) -> Self {
        let schedule = policy.schedule.as_ref();
        Self::new(policy, schedule.and_then(|schedule| schedule.longest_gap(now, &policy.time_zone)))
    }

    /// How long the policy may take for what it does: one run may fail.
    fn grace(&self) -> SignedDuration {
        self.longest_gap.map_or(GRACE_WITHOUT_SCHEDULE, |gap| gap.saturating_add(gap))
    }

    /// Judges an instance by its newest good snapshot and by when it was created.
    pub fn judge(
        &self,
        newest: Option<Timestamp>,
        created_at: Option<Timestamp>,
        now: Timestamp,
    ) -> Freshness {
        match newest {
            Some(newest) if self.is_stale(newest, now) => Freshness::Stale,
            Some(_) => Freshness::Fresh,
            None if created_at.is_some_and(|created_at| !is_after(created_at, self.grace(), now)) => {
                Freshness::Fresh
            }
            None => Freshness::None,
        }
    }

    /// Whether a snapshot that was taken then, and has no copy, should have one.
    pub fn is_late(&self, taken_at: Timestamp, now: Timestamp) -> bool {
        is_after(taken_at, self.grace(), now)
    }

    fn is_stale(&self, newest: Timestamp, now: Timestamp) -> bool {
        match &self.policy.guard.expect_newest {
            Some(span) => span.after(newest, &self.policy.time_zone).is_some_and(|end| now > end),
            None => self.policy.create && self.longest_gap.is_some() && is_after(newest, self.grace(), now),
        }
    }

    /// That the newest good snapshot is too old.
    pub fn stale_text(&self, newest: Timestamp) -> String {
        let expected = self.text();
        format!(
            "newest good snapshot of {newest}: policy {} expects one not older than {expected}",
            self.policy.name
        )
    }

    /// How new the newest snapshot has to be, such as `2d, twice the longest gap of its schedule`.
    pub fn text(&self) -> String {
        match &self.policy.guard.expect_newest {
            Some(span) => format!("{span}, by `expect_newest`"),
            None => format!("{}, twice the longest gap of its schedule", span_text(self.grace())),
        }
    }
}

/// That an archive lacks the copy of a good snapshot, which was taken then.
pub fn uncopied_text(archive: &ArchiveName, newest_copy: Option<Timestamp>, taken_at: Timestamp) -> String {
    match newest_copy {
        None => format!("archive {archive} has no verified copy"),
        Some(copy) => {
            format!(
                "archive {archive}: newest verified copy of {copy}, though a good snapshot is of {taken_at}"
            )
        }
    }
}

/// Whether more than `span` has passed since then.
fn is_after(then: Timestamp, span: SignedDuration, now: Timestamp) -> bool {
    now.duration_since(then) > span
}

/// A duration in its largest unit that leaves no rest.
fn span_text(span: SignedDuration) -> String {
    let seconds = span.as_secs();
    let units = [(86400, "d"), (3600, "h"), (60, "min")];
    let unit = units.into_iter().find(|(unit, _)| seconds % unit == 0);
    unit.map_or_else(|| format!("{seconds}s"), |(unit, word)| format!("{}{word}", seconds / unit))
}

/// Whether a listed instance is meant to have a backup, and whether a policy of its zone makes one.
pub fn state_of(
    policies: &[Policy],
    exempt: &Exemption,
    zone: &ZoneName,
    instance: &Instance,
) -> CoverageState {
    if exempt.includes(instance) {
        CoverageState::Exempt
    } else if selecting(policies, zone, instance).any(makes_backups) {
        CoverageState::Covered
    } else {
        CoverageState::Uncovered
    }
}

/// Whether it takes or exports snapshots.
fn makes_backups(policy: &Policy) -> bool {
    policy.create || policy.export.is_some()
}

/// The enabled policies of the zone that select an instance. One of which that is not known, since `self` is not resolved,
/// does nothing, so it selects none here.
fn selecting<'a>(
    policies: &'a [Policy],
    zone: &'a ZoneName,
    instance: &'a Instance,
) -> impl Iterator<Item = &'a Policy> {
    of_zone(policies, zone)
        .filter(|policy| policy.enabled)
        .filter(|policy| policy.select.selects_listed(instance))
}

fn of_zone<'a>(policies: &'a [Policy], zone: &'a ZoneName) -> impl Iterator<Item = &'a Policy> {
    policies.iter().filter(|policy| policy.zones.contains(zone) && !policy.select.is_in_doubt())
}

/// Judges every listed instance of a zone, and those that vanished.
pub fn coverage(
    policies: &[Policy],
    exempt: &Exemption,
    inventory: &Inventory,
    vanished: &[VanishedInstance],
    now: Timestamp,
) -> Vec<InstanceCoverage> {
    let zone = &inventory.zone;
    let expectations: HashMap<&PolicyName, Expectation<'_>> =
        policies.iter().map(|policy| (&policy.name, Expectation::of(policy, now))).collect();
    let good = good_snapshots(inventory, now);
    let copies = newest_copies(inventory, now);
    let mut all: Vec<InstanceCoverage> = Vec::new();
    for instance in &inventory.instances {
        let good = good.get(&instance.id).map_or(&[][..], Vec::as_slice);
        let state = state_of(policies, exempt, zone, instance);
        let mut covered = InstanceCoverage {
            state,
            policies: selecting(policies, zone, instance).map(|policy| policy.name.clone()).collect(),
            newest_snapshot: good.first().map(|snapshot| snapshot.created_at),
            ..with_copies(inventory, instance.id, instance.name.to_string(), &copies)
        };
        if state != CoverageState::Exempt {
            for policy in selecting(policies, zone, instance) {
                let Some(expectation) = expectations.get(&policy.name) else { continue };
                find_problems(&mut covered, expectation, instance, good, inventory, &copies, now);
            }
        }
        if state == CoverageState::Uncovered {
            covered.problems.insert(0, why_uncovered(policies, zone, instance));
        }
        all.push(covered);
    }
    all.extend(vanished.iter().map(|one| {
        let mut covered = with_copies(inventory, one.id, one.name.clone(), &copies);
        covered.state = CoverageState::Vanished;
        covered.policies.clone_from(&one.policies);
        let good = good.get(&one.id).map_or(&[][..], Vec::as_slice);
        covered.newest_snapshot = good.first().map(|snapshot| snapshot.created_at);
        covered.problems.push(format!("not listed any more since {}", one.since));
        covered
    }));
    all
}

/// Adds what an instance lacks that one policy selects.
fn find_problems(
    covered: &mut InstanceCoverage,
    expectation: &Expectation<'_>,
    instance: &Instance,
    good: &[&Snapshot],
    inventory: &Inventory,
    copies: &NewestCopies<'_>,
    now: Timestamp,
) {
    let policy = expectation.policy;
    let selected = || good.iter().filter(|snapshot| policy.select.selects_snapshot(snapshot));
    let newest = selected().next().map(|snapshot| snapshot.created_at);
    match (expectation.judge(newest, instance.created_at, now), newest) {
        (Freshness::None, _) => {
            covered.missing.push(policy.name.clone());
            let text = if good.is_empty() {
                "no good snapshot".to_owned()
            } else {
                format!("policy {} selects none of its good snapshots", policy.name)
            };
            if !covered.problems.contains(&text) {
                covered.problems.push(text);
            }
        }
        (Freshness::Stale, Some(newest)) => covered.problems.push(expectation.stale_text(newest)),
        _ => {}
    }
    for archive in policy.export.iter().flat_map(|export| &export.archives) {
        let problem = match inventory.archives.get(archive) {
            Some(Copies::Unreachable(_)) => Some(format!("its copies in archive {archive} are not known")),
            Some(Copies::Known(_)) => {
                let newest_copy = copies.get(&instance.id).and_then(|copies| copies.get(archive)).copied();
                // From the oldest on; what runs skip after an outage is made up for by a newer one.
                let first_uncopied = selected()
                    .map(|snapshot| snapshot.created_at)
                    .take_while(|at| newest_copy.is_none_or(|copy| *at > copy))
                    .last();
                let late = first_uncopied.filter(|at| expectation.is_late(*at, now));
                late.map(|late| uncopied_text(archive, newest_copy, late))
            }
            Some(Copies::Assumed) | None => None,
        };
        covered.problems.extend(problem.filter(|problem| !covered.problems.contains(problem)));
    }
}

fn why_uncovered(policies: &[Policy], zone: &ZoneName, instance: &Instance) -> String {
    let names = |are_enabled: bool| -> Vec<String> {
        let here = of_zone(policies, zone).filter(|policy| policy.enabled == are_enabled);
        let name = |policy: &Policy| match policy.paused_text() {
            Some(paused) => format!("{} ({paused})", policy.name),
            None => policy.name.to_string(),
        };
        here.filter(|policy| policy.select.selects_listed(instance)).map(name).collect()
    };
    let (enabled, paused) = (names(true), names(false));
    match (&enabled[..], &paused[..]) {
        ([], []) => "no policy selects it".to_owned(),
        ([], paused) => format!("no enabled policy selects it; not enabled: {}", paused.join(", ")),
        (enabled, _) => format!(
            "no policy takes or exports its snapshots; {} {} neither",
            enabled.join(", "),
            if enabled.len() == 1 { "does" } else { "do" }
        ),
    }
}

/// The good snapshots of each instance, newest first. What a preview adds has not been taken yet.
fn good_snapshots(inventory: &Inventory, now: Timestamp) -> HashMap<InstanceId, Vec<&Snapshot>> {
    let latest = latest_counted(now);
    let mut good: HashMap<InstanceId, Vec<&Snapshot>> = HashMap::new();
    for snapshot in &inventory.snapshots {
        let is_counted = snapshot.state.is_good() && snapshot.created_at <= latest;
        if let (true, Some(id)) =
            (is_counted && !inventory.coming.contains(&snapshot.id), snapshot.instance_id)
        {
            good.entry(id).or_default().push(snapshot);
        }
    }
    for snapshots in good.values_mut() {
        snapshots.sort_unstable_by_key(|snapshot| std::cmp::Reverse(snapshot.created_at));
    }
    good
}

/// When the newest snapshot of each instance was taken of which an archive has a verified copy, by archive.
type NewestCopies<'a> = HashMap<InstanceId, HashMap<&'a ArchiveName, Timestamp>>;

fn newest_copies(inventory: &Inventory, now: Timestamp) -> NewestCopies<'_> {
    let latest = latest_counted(now);
    let mut newest: NewestCopies<'_> = HashMap::new();
    for (archive, copies) in &inventory.archives {
        let Copies::Known(copies) = copies else { continue };
        // One that was pruned counts only where an intact one is at least as new, so it is never the newest alone.
        for copy in copies.iter().filter(|copy| copy.created_at <= latest) {
            let of_instance = newest.entry(copy.instance_id).or_default();
            let at = of_instance.entry(archive).or_insert(copy.created_at);
            *at = copy.created_at.max(*at);
        }
    }
    newest
}

/// An instance with the copies that it has, and nothing else.
fn with_copies(
    inventory: &Inventory,
    id: InstanceId,
    name: String,
    copies: &NewestCopies<'_>,
) -> InstanceCoverage {
    let copies = copies.get(&id);
    // In the order of the names.
    let has_copy = |archive: &&ArchiveName| copies.is_some_and(|copies| copies.contains_key(archive));
    InstanceCoverage {
        zone: inventory.zone.clone(),
        id,
        name,
        state: CoverageState::Uncovered,
        policies: Vec::new(),
        newest_snapshot: None,
        newest_copy: copies.and_then(|copies| copies.values().max().copied()),
        archives: inventory.archives.keys().filter(has_copy).cloned().collect(),
        missing: Vec::new(),
        problems: Vec::new(),
    }
}
