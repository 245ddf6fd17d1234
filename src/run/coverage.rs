//! Which instances lack the snapshots that they should have: for reports, previews, metrics and status. `retention` judges.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::Write as _;

use futures_util::future::{BoxFuture, FutureExt as _, join_all};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::policy::Policy;
use crate::policy::name::PolicyName;
use crate::policy::select::Exemption;
use crate::retention::coverage::{
    CoverageState, Expectation, Freshness, InstanceCoverage, VanishedInstance, coverage, state_of,
    uncopied_text,
};
use crate::retention::inventory::Inventory;
use crate::run::context::Runner;
use crate::run::instance_counts::{count, is_remembered};
use crate::run::list::{archived_copies, list, look_at_archives};
use crate::run::pauses;
use crate::run::plan::ZonePlan;
use crate::run::self_instance;
use crate::snapshot::{Instance, InstanceId, ZoneName};
use crate::state::last_runs::{InstanceCounts, LastRuns, ZoneCoverage};
use crate::text::{chain, counted, printable};

/// How many instances are named in one sentence.
const NAMED: usize = 10;

/// How many of the instances that a policy selects in a zone have the snapshot that it expects.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct InstanceStates {
    /// They have it, or are too young to have one.
    pub fresh: u64,
    /// Their newest good snapshot is too old.
    pub stale: u64,
    /// They have no good snapshot.
    pub none: u64,
    /// They were listed, and are not any more; for a week.
    pub vanished: u64,
}

/// The instances of a policy in a zone, judged at one moment.
#[derive(Debug, Default)]
pub struct Judged {
    /// How many there are in each state.
    pub states: InstanceStates,
    /// Which have no good snapshot, as a sentence.
    pub missing: Option<String>,
    /// Which have none that is new enough, as a sentence.
    pub stale: Option<String>,
    /// Both, by name, with when their newest good snapshot was taken.
    pub lacking: Vec<(String, Option<Timestamp>)>,
}

/// Judges the instances of a policy, with the longest gap of its schedule. A policy that is not enabled expects nothing.
pub fn judge(
    policy: &Policy,
    longest_gap: Option<SignedDuration>,
    instances: &[InstanceCounts],
    now: Timestamp,
) -> Judged {
    if !policy.enabled {
        return Judged::default();
    }
    let expectation = Expectation::new(policy, longest_gap);
    let (mut states, mut missing, mut stale) = (InstanceStates::default(), Vec::new(), Vec::new());
    let mut lacking = Vec::new();
    for instance in instances {
        if is_remembered(instance, now) {
            states.vanished += 1;
        }
        if !instance.is_listed || instance.is_exempt {
            continue;
        }
        let freshness = expectation.judge(instance.newest_at, instance.created_at, now);
        if freshness != Freshness::Fresh {
            lacking.push((instance.name.clone(), instance.newest_at));
        }
        match freshness {
            Freshness::Fresh => states.fresh += 1,
            Freshness::Stale => {
                states.stale += 1;
                let newest = instance.newest_at.map(|at| format!(" ({at})")).unwrap_or_default();
                stale.push(format!("{}{newest}", printable(&instance.name)));
            }
            Freshness::None => {
                states.none += 1;
                missing.push(&*instance.name);
            }
        }
    }
    let missing = missing_text(missing.into_iter());
    let stale = named(&stale).map(|names| {
        let of = counted(stale.len(), "instance");
        format!(
            "no good snapshot of {of} is new enough (policy {}: {}): {names}",
            policy.name,
            expectation.text()
        )
    });
    Judged { states, missing, stale, lacking }
}

/// What an instance lacks by one policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lack {
    /// It has no good snapshot.
    Snapshot(String),
    /// Its newest good snapshot is too old.
    NewSnapshot(String),
    /// This archive lacks a verified copy of a snapshot that is old enough to have one.
    Copy(String),
}

/// What an instance lacks by one policy as of `now`, in the words of `coverage`.
pub fn lacks(
    policy: &Policy,
    longest_gap: Option<SignedDuration>,
    instance: &InstanceCounts,
    now: Timestamp,
) -> Vec<Lack> {
    if !policy.enabled || !instance.is_listed || instance.is_exempt {
        return Vec::new();
    }
    let expectation = Expectation::new(policy, longest_gap);
    let mut lacks = Vec::new();
    match (expectation.judge(instance.newest_at, instance.created_at, now), instance.newest_at) {
        (Freshness::None, _) => {
            lacks.push(Lack::Snapshot(format!("policy {}: no good snapshot", policy.name)));
        }
        (Freshness::Stale, Some(newest)) => lacks.push(Lack::NewSnapshot(expectation.stale_text(newest))),
        _ => {}
    }
    let late = instance.uncopied_since.iter().filter(|(_, since)| expectation.is_late(**since, now));
    lacks.extend(late.map(|(archive, since)| {
        let copy = instance.newest_verified_at.get(archive).copied();
        Lack::Copy(uncopied_text(archive, copy, *since))
    }));
    lacks
}

/// A sentence about instances without a good snapshot, if there are any.
pub fn missing_text<'a>(names: impl Iterator<Item = &'a str>) -> Option<String> {
    let names: Vec<String> = names.map(|name| printable(name).into_owned()).collect();
    let verb = if names.len() == 1 { "has" } else { "have" };
    named(&names)
        .map(|named| format!("{} {verb} no good snapshot: {named}", counted(names.len(), "instance")))
}

/// The first names of a list, and how many more there are; none for an empty list.
fn named(names: &[String]) -> Option<String> {
    let mut text = names.get(..names.len().min(NAMED))?.join(", ");
    if names.len() > NAMED {
        // Writing to a String cannot fail.
        let _ = write!(text, " and {} more: see `snapwarden coverage`", names.len() - NAMED);
    }
    (!names.is_empty()).then_some(text)
}

/// The longest gap of a policy's schedule from now on.
pub(crate) fn longest_gap(policy: &Policy, now: Timestamp) -> Option<SignedDuration> {
    policy.schedule.as_ref()?.longest_gap(now, &policy.time_zone)
}

/// A sentence about the instances that were first found to be not listed any more at `now`.
pub(crate) fn vanished_text(instances: &[InstanceCounts], now: Timestamp) -> Option<String> {
    let copy = |instance: &InstanceCounts| {
        let newest = instance.newest_verified_at.iter().max_by_key(|(_, at)| **at);
        newest.map_or_else(
            || "no verified copy".to_owned(),
            |(archive, at)| format!("newest verified copy of {at} in {archive}"),
        )
    };
    let vanished = instances.iter().filter(|instance| instance.vanished_at == Some(now));
    let vanished: Vec<String> =
        vanished.map(|instance| format!("{} ({})", printable(&instance.name), copy(instance))).collect();
    let verb = if vanished.len() == 1 { "is" } else { "are" };
    named(&vanished)
        .map(|names| format!("{} {verb} not listed any more: {names}", counted(vanished.len(), "instance")))
}

/// A sentence about the patterns of a policy that match no instance in any of its zones; none unless all are listed.
pub(crate) fn unmatched_text<'a>(
    policy: &Policy,
    inventories: impl IntoIterator<Item = Option<&'a Inventory>>,
) -> Option<String> {
    let inventories: Vec<&Inventory> = inventories.into_iter().collect::<Option<_>>()?;
    let is_listed = |zone: &ZoneName| inventories.iter().any(|inventory| inventory.zone == *zone);
    if !policy.zones.iter().all(is_listed) {
        return None;
    }
    let of = |inventory: &&'a Inventory| inventory.instances.iter().chain(&inventory.elsewhere);
    let instances: Vec<&Instance> = inventories.iter().flat_map(of).collect();
    unmatched_in(policy, &instances)
}

fn unmatched_in(policy: &Policy, instances: &[&Instance]) -> Option<String> {
    let unmatched = policy.select.unmatched(instances);
    let verb = if unmatched.len() == 1 { "matches" } else { "match" };
    let zones: Vec<&str> = policy.zones.iter().map(ZoneName::as_str).collect();
    named(&unmatched).map(|patterns| {
        format!(
            "{patterns} {verb} no instance in {}: correct or remove {} in policy {}",
            zones.join(", "),
            if unmatched.len() == 1 { "it" } else { "them" },
            policy.name
        )
    })
}

/// What a plan says of the instances of its zone: which will have no good snapshot, or none that is new enough, if the run
/// takes those that it would take, which vanished, and which no policy covers.
pub(crate) fn planned_texts(
    policies: &[Policy],
    exempt: &Exemption,
    policy: &Policy,
    plan: &ZonePlan,
    before: &LastRuns,
) -> Vec<String> {
    let at = plan.plan.at;
    let before = before.zones.get(plan.zone()).map_or(&[][..], |zone| &zone.instances);
    let instances = count(policy, exempt, plan, &HashSet::new(), before, at);
    let Judged { missing, stale, .. } = judge(policy, longest_gap(policy, at), &instances, at);
    let uncovered = of_zone(policies, exempt, &plan.listing.inventory, at);
    let stale = stale.filter(|_| policy.guard.expect_newest.is_none());
    let texts = [missing, stale, vanished_text(&instances, at), uncovered_text(&uncovered)];
    texts.into_iter().flatten().collect()
}

/// How all policies together cover the instances of a zone.
pub(crate) fn of_zone(
    policies: &[Policy],
    exempt: &Exemption,
    inventory: &Inventory,
    at: Timestamp,
) -> ZoneCoverage {
    let mut coverage = ZoneCoverage { at: Some(at), ..ZoneCoverage::default() };
    for instance in &inventory.instances {
        match state_of(policies, exempt, &inventory.zone, instance) {
            CoverageState::Covered => coverage.covered += 1,
            CoverageState::Exempt => coverage.exempt += 1,
            CoverageState::Uncovered | CoverageState::Vanished => {
                coverage.uncovered += 1;
                coverage.uncovered_instances.push(instance.name.to_string());
            }
        }
    }
    coverage
}

/// A sentence about the instances that no policy covers.
pub fn uncovered_text(coverage: &ZoneCoverage) -> Option<String> {
    let names: Vec<String> =
        coverage.uncovered_instances.iter().map(|name| printable(name).into_owned()).collect();
    named(&names).map(|named| {
        let count = counted(names.len(), "instance");
        let verb = if names.len() == 1 { "is" } else { "are" };
        format!("{count} {verb} uncovered, since no policy takes or exports snapshots there: {named}")
    })
}

/// The coverage of all zones of the configuration.
#[derive(Debug)]
pub struct FleetCoverage {
    /// When it was judged.
    pub at: Timestamp,
    /// The instances of all zones that could be listed.
    pub instances: Vec<InstanceCoverage>,
    /// Why a zone could not be judged, or an archive not be read, in sentences.
    pub failures: Vec<String>,
    /// Of each enabled policy of which all zones are listed: which patterns match nothing, as a sentence.
    pub unmatched: Vec<(PolicyName, String)>,
}

impl Runner {
    /// Lists all zones that policies name, and judges every instance.
    ///
    /// # Errors
    /// The state directory cannot be read, as a sentence.
    pub async fn coverage(&self) -> Result<FleetCoverage, String> {
        let Some(policy) = self.policies.first() else {
            let (at, failures, unmatched) = (self.clock.now(), Vec::new(), Vec::new());
            return Ok(FleetCoverage { at, instances: Vec::new(), failures, unmatched });
        };
        let (runner, policy) = pauses::heed(self, policy).await.map_err(|error| chain(&error))?;
        let (runner, _) = self_instance::resolve(&runner, &policy).await;
        let runner = &*runner;
        let archives = look_at_archives(runner).await;
        let last_runs = runner.state.all_last_runs().await.map_err(|error| chain(&error))?;
        let names: BTreeSet<&ZoneName> = runner.policies.iter().flat_map(|policy| &policy.zones).collect();
        let mut listings: Vec<BoxFuture<'_, _>> = Vec::new();
        for zone in names {
            let archives = &archives;
            let listing = async move {
                let raw = list(runner, zone).await?;
                Ok(Inventory { archives: archived_copies(archives, zone), ..raw.on_paper(zone) })
            };
            listings.push(async move { (zone, listing.await) }.boxed());
        }
        let zones: BTreeMap<&ZoneName, Result<Inventory, String>> =
            join_all(listings).await.into_iter().collect();
        let at = runner.clock.now();
        let (mut instances, mut failures) = (Vec::new(), archives.failures());
        for (zone, inventory) in &zones {
            match inventory {
                Ok(inventory) => {
                    let vanished = vanished(&runner.policies, &last_runs, inventory, at);
                    let policies = &runner.policies;
                    instances.extend(coverage(policies, &runner.exempt, inventory, &vanished, at));
                }
                Err(failure) => failures.push(format!("zone {zone}: {failure}")),
            }
        }
        // The worst first.
        instances.sort_by_cached_key(|one| {
            let is_exempt = one.state == CoverageState::Exempt;
            let newest = one.newest_snapshot.max(one.newest_copy);
            (one.problems.is_empty(), is_exempt, newest, one.name.clone(), one.id)
        });
        let enabled = runner.policies.iter().filter(|policy| policy.enabled && !policy.select.is_in_doubt());
        let unmatched = enabled.filter_map(|policy| {
            let inventories = policy.zones.iter().map(|zone| zones.get(zone)?.as_ref().ok());
            Some((policy.name.clone(), unmatched_text(policy, inventories)?))
        });
        let unmatched = unmatched.collect();
        Ok(FleetCoverage { at, instances, failures, unmatched })
    }
}

/// The instances that enabled policies remember, and that are not listed any more, for a week.
fn vanished(
    policies: &[Policy],
    last_runs: &[(PolicyName, LastRuns)],
    inventory: &Inventory,
    now: Timestamp,
) -> Vec<VanishedInstance> {
    let listed: HashSet<InstanceId> = inventory.instances.iter().map(|instance| instance.id).collect();
    let is_enabled = |name: &PolicyName| policies.iter().any(|policy| policy.enabled && policy.name == *name);
    let mut all: BTreeMap<InstanceId, VanishedInstance> = BTreeMap::new();
    for (policy, runs) in last_runs.iter().filter(|(name, _)| is_enabled(name)) {
        let Some(memory) = runs.zones.get(&inventory.zone) else { continue };
        for instance in memory.instances.iter().filter(|instance| !instance.is_exempt) {
            let was_listed = instance.is_listed || is_remembered(instance, now);
            if !was_listed || listed.contains(&instance.id) {
                continue;
            }
            let since = instance.vanished_at.unwrap_or(now);
            let known = all.entry(instance.id).or_insert_with(|| VanishedInstance {
                id: instance.id,
                name: instance.name.clone(),
                since,
                policies: Vec::new(),
            });
            known.since = known.since.min(since);
            known.policies.push(policy.clone());
        }
    }
    all.into_values().collect()
}
