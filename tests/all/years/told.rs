//! What a run must say: silence is a fault.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use snapwarden::judge::facts::InstanceFacts;
use snapwarden::policy::name::PolicyName;
use snapwarden::run::report::{RunReport, RunResult, ZoneReport};
use snapwarden::snapshot::{InstanceId, Snapshot, SnapshotState, ZoneName};

use super::book::Book;
use super::fleet::{Pace, Parts, PolicyPart};

/// What runs have said so far.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// The instances of which the last whole run of each policy said that they are there.
    listed: BTreeMap<(PolicyName, ZoneName), BTreeSet<InstanceId>>,
}

/// What is there when a run has ended.
#[derive(Debug)]
pub(super) struct Truth<'a> {
    pub(super) book: &'a Book,
    pub(super) parts: &'a Parts,
    pub(super) pace: Pace,
    pub(super) snapshots: &'a [Snapshot],
    pub(super) now: Timestamp,
}

impl Truth<'_> {
    /// The instances of a zone.
    fn instances<'b>(&'b self, zone: &'b ZoneName) -> impl Iterator<Item = &'b InstanceFacts> {
        self.book.instances.values().filter(move |(of, _)| of == zone).map(|(_, facts)| facts)
    }
}

/// A plain reading of `select`, as far as the fleets have it.
pub(super) fn selects(policy: &PolicyPart, instance: &InstanceFacts) -> bool {
    let is_excluded = policy.get("select", "exclude_instances").is_some() && instance.name.starts_with("ci-");
    let lacks_label = policy.get("select", "labels").is_some()
        && instance.labels.get("tier").is_none_or(|tier| tier != "db");
    let has_other_name = policy.get("select", "instances").is_some() && !instance.name.starts_with("db-");
    !is_excluded && !lacks_label && !has_other_name
}

impl Told {
    /// What a report should have said, and did not; of runs that could see everything.
    pub(super) fn silence(&mut self, report: &RunReport, truth: &Truth<'_>) -> Option<String> {
        let part = truth.parts.policy(report.policy.as_str())?;
        report.zones.iter().find_map(|zone| {
            let silence = uncovered(zone, truth).or_else(|| self.vanished(report, zone, truth));
            silence.or_else(|| missing(part, report, zone, truth)).or_else(|| pending(report, zone, truth))
        })
    }

    /// What was said by a run that did not end is not known here.
    pub(super) fn forget(&mut self) {
        self.listed.clear();
    }

    /// What a report says counts, also of a run that could not see everything.
    pub(super) fn hear(&mut self, report: &RunReport) {
        let named = report.zones.iter().flat_map(|zone| &zone.instances);
        // One that a policy does not select any more is for others to name.
        let named: BTreeSet<InstanceId> =
            named.filter(|one| one.vanished_at.is_some()).map(|one| one.id).collect();
        self.listed.values_mut().for_each(|listed| listed.retain(|id| !named.contains(id)));
    }

    fn vanished(&mut self, report: &RunReport, zone: &ZoneReport, truth: &Truth<'_>) -> Option<String> {
        // Without a plan nothing is known of the zone.
        zone.plan.as_ref()?;
        let listed = self.listed.entry((report.policy.clone(), zone.zone.clone())).or_default();
        let gone = listed.iter().find(|id| !truth.book.instances.contains_key(id));
        let silence = gone.map(|id| format!("no word of instance {id}, which vanished"));
        if report.result == RunResult::Success {
            let there = zone.instances.iter().filter(|one| one.is_listed && !one.is_exempt);
            *listed = there.map(|one| one.id).collect();
        }
        silence
    }
}

/// Each instance that no policy takes or exports snapshots of is named.
fn uncovered(zone: &ZoneReport, truth: &Truth<'_>) -> Option<String> {
    let coverage = zone.coverage.as_ref()?;
    let covers =
        |policy: &&PolicyPart| policy.get("", "create").is_some() || policy.sections.contains_key("export");
    let covers = |policy: &&PolicyPart| covers(policy) && truth.book.is_enabled(policy.name);
    let covering: Vec<&PolicyPart> = truth.parts.policies.iter().filter(covers).collect();
    truth.instances(&zone.zone).find_map(|instance| {
        let is_covered = covering.iter().any(|policy| selects(policy, instance));
        let is_exempt = instance.name.starts_with("ci-");
        let is_named = coverage.uncovered_instances.contains(&instance.name);
        let is_wrong = is_named == (is_covered || is_exempt);
        // Of several with one name, one may be covered.
        let is_only = truth.instances(&zone.zone).filter(|other| other.name == instance.name).count() == 1;
        (is_wrong && is_only).then(|| format!("{} is covered: {is_covered}; {coverage:?}", instance.name))
    })
}

/// An instance without any good snapshot, though it is old enough.
fn missing(part: &PolicyPart, report: &RunReport, zone: &ZoneReport, truth: &Truth<'_>) -> Option<String> {
    zone.plan.as_ref()?;
    let gap = match truth.pace {
        Pace::Daily => 1,
        Pace::Weekly => 7,
        Pace::Monthly => 31,
    };
    let old = truth.now - SignedDuration::from_hours(24 * (2 * gap + 2));
    let lacking = truth.instances(&zone.zone).find(|instance| {
        let mut of = truth.snapshots.iter().filter(|one| one.instance_id == Some(instance.id));
        let is_old = truth.book.created_at.get(&instance.id).is_some_and(|at| *at < old);
        let is_exempt = instance.name.starts_with("ci-");
        let has_good = of.any(|one| one.state.is_good() || one.state == SnapshotState::Snapshotting);
        selects(part, instance) && is_old && !is_exempt && !has_good
    });
    let is_told = zone.missing.is_some() && matches!(report.result, RunResult::Partial | RunResult::Failed);
    lacking
        .filter(|_| !is_told)
        .map(|instance| format!("no word of {}, which has no snapshot", instance.name))
}

/// What only a change deletes waits, and that is said.
fn pending(report: &RunReport, zone: &ZoneReport, truth: &Truth<'_>) -> Option<String> {
    // What is in a state that nobody knows is left alone.
    let is_known = !zone.warnings.iter().any(|warning| warning.contains("unknown state"));
    let is_judged = is_known && zone.plan.is_some() && zone.held.is_none() && zone.failures.is_empty();
    if !is_judged || zone.pending.is_some() || truth.book.allowed.contains(&report.policy) {
        return None;
    }
    let waiting =
        |there: &[Snapshot]| truth.book.waiting(&report.policy, &zone.zone, there, truth.parts, truth.now);
    // Another policy may have taken some since. The platform gives whole seconds.
    let is_of_then = |one: &&Snapshot| one.created_at + SignedDuration::from_secs(1) <= report.finished_at;
    let by_then = truth.snapshots.iter().filter(is_of_then);
    let by_then: Vec<Snapshot> = by_then.cloned().collect();
    let waiting = waiting(truth.snapshots).filter(|_| waiting(&by_then).is_some());
    waiting.map(|id| format!("no word of {id}, which waits until a change has settled"))
}
