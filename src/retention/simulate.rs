//! Simulates the runs of a policy to come: which snapshots will exist, and when each is created and deleted.
//!
//! The engine itself decides at each moment of the policy's own schedule. Just before it does, a new snapshot of each
//! listed instance that the policy selects is added, whether the policy takes it or something else does; then what the
//! policy would delete is deleted. Everything else succeeds: each snapshot is good at once, required copies are
//! what the inventory says (a caller that looks ahead assumes them), no run is late or missed, and no guard trips.
//! Other policies protect snapshots, as always, but have no runs of their own.
//!
//! A run costs as much as what exists at that moment: deleted snapshots leave the inventory, and instances
//! that the policy does not select are left out from the start.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use crate::policy::Policy;
use crate::policy::name::PolicyName;
use crate::policy::select::Select;
use crate::retention::combine::{combine, rules_for};
use crate::retention::inventory::{Inventory, Ownership};
use crate::retention::plan::PolicyPlan;
use crate::retention::rules::PolicyRules;
use crate::retention::verdict::{Rule, Verdict};
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, SnapshotState, ZoneName};

/// The most runs: one every five minutes for two years.
pub const RUNS_MAX: usize = 250_000;

/// The most snapshots that may come into being: each is remembered to the end.
pub const CREATED_MAX: usize = 1_000_000;

/// The most judgements of a snapshot, all runs together: a policy that deletes nothing would make each run more
/// expensive than the one before.
pub const JUDGEMENTS_MAX: usize = 200_000_000;

/// What to simulate.
#[derive(Debug, Clone, Copy)]
pub struct Simulation<'a> {
    /// All policies, including the simulated one.
    pub policies: &'a [Policy],
    /// The one whose runs are simulated.
    pub policy: &'a Policy,
    /// The beginning; a run that is due exactly then is over.
    pub from: Timestamp,
    /// The end; a run that is due exactly then is included.
    pub until: Timestamp,
    /// The disk size of instances without a snapshot that shows it.
    pub size_gib: Option<u64>,
}

/// Why nothing can be simulated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SimulationError {
    /// It runs only manually, at unknown times.
    #[error(
        "policy `{0}` has no `schedule`, so the times of its runs are unknown: give it one, such as \"30 2 * * *\""
    )]
    NoSchedule(PolicyName),
    /// The engine does not apply it.
    #[error("policy `{policy}` is not enabled, or does not name zone {zone}: there is nothing to simulate")]
    NotSpoken {
        /// Which policy.
        policy: PolicyName,
        /// Where.
        zone: ZoneName,
    },
    /// More than [`RUNS_MAX`].
    #[error("policy `{0}` has more than {RUNS_MAX} runs in that time: simulate a shorter one")]
    TooManyRuns(PolicyName),
    /// More than [`CREATED_MAX`].
    #[error(
        "{runs} runs over {instances} instances take more than {CREATED_MAX} snapshots: simulate a shorter time"
    )]
    TooManySnapshots {
        /// How many runs there are.
        runs: usize,
        /// How many instances each run creates a snapshot of.
        instances: usize,
    },
    /// More than [`JUDGEMENTS_MAX`].
    #[error(
        "policy `{policy}` keeps too much ({held} snapshots by {at}) for a simulation of this length: simulate a shorter time"
    )]
    TooMuch {
        /// Which policy.
        policy: PolicyName,
        /// How many snapshots there are by then.
        held: usize,
        /// When it became too much.
        at: Timestamp,
    },
}

/// The result of a simulation.
#[derive(Debug, Clone)]
pub struct Forecast {
    /// The beginning, then the state after each run. Only snapshots that the policy selects are included.
    pub moments: Vec<Moment>,
    /// Every snapshot that exists at some moment, in the order of their creation.
    pub lifetimes: Vec<Lifetime>,
    /// The most at once: after a run created its snapshots, and before it deletes any.
    pub count_max: usize,
    /// The largest sum of disk sizes at once, likewise.
    pub storage_gib_max: u64,
    /// How many instances each run creates a snapshot of.
    pub instances: usize,
    /// The name of the first new snapshot that the policy does not select, if any: such are left out.
    pub not_selected: Option<Box<str>>,
}

/// The state after a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Moment {
    /// When.
    pub at: Timestamp,
    /// How many snapshots there are, those included that are not judged.
    pub held: usize,
    /// When the oldest good one was taken.
    pub oldest: Option<Timestamp>,
    /// The sum of the disk sizes as far as they are known.
    pub storage_gib: u64,
}

/// The lifetime of a snapshot.
#[derive(Debug, Clone)]
pub struct Lifetime {
    /// Which one; its id is invented if the simulation created it.
    pub snapshot: Snapshot,
    /// Whether the simulation created it.
    pub is_new: bool,
    /// The run that let it go, if one did.
    pub deleted_at: Option<Timestamp>,
    /// What held it, and how long; in the order in which the intervals end.
    pub intervals: Vec<Interval>,
}

/// A rule held a snapshot without a break from one run to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval {
    /// The rule; for one that is not judged, why it is not.
    pub rule: Rule,
    /// The first run after which it was held by it, or the beginning.
    pub from: Timestamp,
    /// The run that ended it, or the end of the play.
    pub until: Timestamp,
}

impl Lifetime {
    /// Every rule that ever held it.
    pub fn holders(&self) -> BTreeSet<Rule> {
        self.intervals.iter().map(|stay| stay.rule).collect()
    }

    /// The rules that held it to its end, or to the end of the play.
    pub fn last_holders(&self) -> BTreeSet<Rule> {
        let last = self.intervals.iter().map(|stay| stay.until).max();
        self.intervals.iter().filter(|stay| Some(stay.until) == last).map(|stay| stay.rule).collect()
    }
}

/// A policy of the same rules, and a zone with one instance of which there is no snapshot yet: to be played where there
/// is nothing real. The policy selects everything.
pub fn imaginary_instance(policy: &Policy, zone: &ZoneName) -> (Policy, Inventory) {
    let instance = Instance {
        id: InstanceId(Uuid::max()),
        name: "imagined".into(),
        labels: BTreeMap::new(),
        template_id: None,
        is_managed: false,
        created_at: None,
    };
    let inventory = Inventory::on_paper(zone.clone(), Vec::new(), vec![instance]);
    // All required copies are assumed, since there is no archive to ask.
    (Policy { select: Select::default(), export: None, ..policy.clone() }, inventory)
}

/// Simulates the runs of a policy over the snapshots of a zone.
///
/// # Errors
/// [`SimulationError`] if the policy has no runs to play, or far too many.
pub fn simulate(simulation: Simulation<'_>, inventory: Inventory) -> Result<Forecast, SimulationError> {
    let runs = runs(simulation)?;
    let mut timeline = Timeline::new(simulation, inventory)?;
    if runs.len().saturating_mul(timeline.sources.len()) > CREATED_MAX {
        let instances = timeline.sources.len();
        return Err(SimulationError::TooManySnapshots { runs: runs.len(), instances });
    }
    for at in runs {
        timeline.run(at)?;
    }
    Ok(timeline.end())
}

/// When the policy runs in that time.
fn runs(simulation: Simulation<'_>) -> Result<Vec<Timestamp>, SimulationError> {
    let Some(schedule) = &simulation.policy.schedule else {
        return Err(SimulationError::NoSchedule(simulation.policy.name.clone()));
    };
    let mut runs = Vec::new();
    let mut last = simulation.from;
    while let Some(next) =
        schedule.next_after(last, &simulation.policy.time_zone).filter(|next| *next <= simulation.until)
    {
        if runs.len() == RUNS_MAX {
            return Err(SimulationError::TooManyRuns(simulation.policy.name.clone()));
        }
        runs.push(next);
        last = next;
    }
    Ok(runs)
}

/// What is there at a moment of the play.
struct Timeline<'a> {
    simulation: Simulation<'a>,
    rules: Vec<PolicyRules<'a>>,
    inventory: Inventory,
    /// What is known of each snapshot of the inventory, in its order.
    known: Vec<Known>,
    /// What a snapshot is taken of at each run.
    sources: Vec<Source>,
    /// Ids that the listing used.
    taken_ids: HashSet<SnapshotId>,
    next_id: u128,
    judgements: usize,
    forecast: Forecast,
}

/// A snapshot that is there.
#[derive(Default)]
struct Known {
    /// Its place among the lifetimes; none if the policy does not select it.
    life: Option<usize>,
    /// What holds it now, and since when.
    holders: Vec<(Rule, Timestamp)>,
}

/// An instance of which each run takes a snapshot.
struct Source {
    id: InstanceId,
    name: Box<str>,
    size_gib: Option<u64>,
    application_consistent: Option<bool>,
}

impl<'a> Timeline<'a> {
    /// How things are before anything happens.
    fn new(simulation: Simulation<'a>, mut inventory: Inventory) -> Result<Self, SimulationError> {
        let select = &simulation.policy.select;
        let selected = inventory.instances.iter();
        let selected = selected.filter(|instance| select.selects_listed(instance));
        // Disks only grow, so the newest snapshot knows best.
        let mut sizes: BTreeMap<InstanceId, (Timestamp, u64)> = BTreeMap::new();
        for snapshot in &inventory.snapshots {
            if let (Some(id), Some(size)) = (snapshot.instance_id, snapshot.size_gib) {
                let known = sizes.entry(id).or_insert((snapshot.created_at, size));
                *known = (*known).max((snapshot.created_at, size));
            }
        }
        let size_of = |id| sizes.get(&id).map(|(_, size)| *size).or(simulation.size_gib);
        // As the newest one was; without any, as a policy hopes that asks for it.
        let consistency = |id| {
            let of_it = inventory.snapshots.iter().filter(|snapshot| snapshot.instance_id == Some(id));
            let flags = of_it.filter_map(|one| Some((one.created_at, one.application_consistent?)));
            Some(flags.max().is_none_or(|(_, is_consistent)| is_consistent))
        };
        let sources: Vec<Source> = selected
            .map(|instance| Source {
                id: instance.id,
                name: instance.name.clone(),
                size_gib: size_of(instance.id),
                application_consistent: consistency(instance.id),
            })
            .collect();
        // Snapshots that are being created will exist; those that are being deleted will not.
        inventory
            .snapshots
            .retain(|snapshot| !matches!(snapshot.state, SnapshotState::Deleting | SnapshotState::Deleted));
        for snapshot in &mut inventory.snapshots {
            if snapshot.state.is_in_flight() {
                snapshot.state = SnapshotState::Exported;
            }
        }
        let mut timeline = Self {
            simulation,
            rules: rules_for(simulation.policies, &inventory, simulation.from),
            known: inventory.snapshots.iter().map(|_| Known::default()).collect(),
            taken_ids: inventory.snapshots.iter().map(|snapshot| snapshot.id).collect(),
            next_id: 0,
            judgements: 0,
            forecast: Forecast {
                moments: Vec::new(),
                lifetimes: Vec::new(),
                count_max: 0,
                storage_gib_max: 0,
                instances: sources.len(),
                not_selected: None,
            },
            sources,
            inventory,
        };
        let first = timeline.judge(simulation.from)?;
        timeline.take_note(&first, simulation.from, false);
        timeline.leave_out_strangers();
        Ok(timeline)
    }

    /// Instances are judged one by one: those that the policy does not select can't matter.
    fn leave_out_strangers(&mut self) {
        let mut spoken: HashSet<Option<InstanceId>> =
            self.sources.iter().map(|source| Some(source.id)).collect();
        spoken.extend(self.forecast.lifetimes.iter().map(|life| life.snapshot.instance_id));
        self.inventory.instances.retain(|instance| spoken.contains(&Some(instance.id)));
        let mut known = std::mem::take(&mut self.known).into_iter();
        self.inventory.snapshots.retain(|snapshot| {
            let known = known.next();
            let is_spoken = spoken.contains(&snapshot.instance_id);
            self.known.extend(known.filter(|_| is_spoken));
            is_spoken
        });
    }

    fn run(&mut self, at: Timestamp) -> Result<(), SimulationError> {
        let first_new = self.inventory.snapshots.len();
        self.take(at);
        let plan = self.judge(at)?;
        let mut gone = self.take_note(&plan, at, true);
        for (index, known) in self.known.iter().enumerate().skip(first_new) {
            if known.life.is_none() {
                gone.push(index);
                let name = self.inventory.snapshots.get(index).map(|snapshot| snapshot.name.clone());
                self.forecast.not_selected = self.forecast.not_selected.take().or(name);
            }
        }
        // From the end, so that a snapshot which is swapped into a removed one's place is not removed itself.
        gone.sort_unstable();
        for index in gone.into_iter().rev() {
            let snapshot = self.inventory.snapshots.swap_remove(index);
            self.known.swap_remove(index);
            self.inventory.created.remove(&snapshot.id);
            self.inventory.holds.remove(&snapshot.id);
        }
        Ok(())
    }

    /// A new snapshot of each selected instance.
    fn take(&mut self, at: Timestamp) {
        for source in &self.sources {
            let id = loop {
                self.next_id += 1;
                let id = SnapshotId(Uuid::from_u128(self.next_id));
                if !self.taken_ids.contains(&id) {
                    break id;
                }
            };
            let maker = Some(self.simulation.policy.name.clone());
            self.inventory.created.insert(id, Ownership { maker, served: Vec::new() });
            self.inventory.snapshots.push(Snapshot {
                id,
                // As the platform names them.
                name: format!("{}_ROOT-1_{}", source.name, at.strftime("%Y%m%d%H%M%S")).into(),
                created_at: at,
                state: SnapshotState::Exported,
                size_gib: source.size_gib,
                instance_id: Some(source.id),
                application_consistent: source.application_consistent,
            });
            self.known.push(Known::default());
        }
    }

    fn judge(&mut self, at: Timestamp) -> Result<PolicyPlan, SimulationError> {
        let held = self.inventory.snapshots.len();
        self.judgements = self.judgements.saturating_add(held);
        let name = &self.simulation.policy.name;
        if self.judgements > JUDGEMENTS_MAX {
            return Err(SimulationError::TooMuch { policy: name.clone(), held, at });
        }
        let plans = combine(&mut self.rules, &self.inventory, at, false).policies;
        plans.into_iter().find(|plan| plan.policy == *name).ok_or_else(|| SimulationError::NotSpoken {
            policy: name.clone(),
            zone: self.inventory.zone.clone(),
        })
    }

    /// Writes down what is decided. Returns the places of those that go, which none do unless they may.
    fn take_note(&mut self, plan: &PolicyPlan, at: Timestamp, may_go: bool) -> Vec<usize> {
        let mut gone = Vec::new();
        let mut moment = Moment { at, held: 0, oldest: None, storage_gib: 0 };
        let mut storage_before: u64 = 0;
        for decision in &plan.decisions {
            let index = decision.index as usize;
            let at_index = self.inventory.snapshots.get(index).zip(self.known.get_mut(index));
            let Some((snapshot, known)) = at_index else { continue };
            let lifetimes = &mut self.forecast.lifetimes;
            let place = *known.life.get_or_insert_with(|| {
                // At the beginning all were there before; later, only new ones are seen for the first time.
                let life = Lifetime {
                    snapshot: snapshot.clone(),
                    is_new: may_go,
                    deleted_at: None,
                    intervals: Vec::new(),
                };
                lifetimes.push(life);
                lifetimes.len() - 1
            });
            let Some(life) = lifetimes.get_mut(place) else { continue };
            let size = snapshot.size_gib.unwrap_or(0);
            storage_before = storage_before.saturating_add(size);
            let holders = match decision.verdict {
                Verdict::Delete => Vec::new(),
                Verdict::Keep => Some(decision.keep_rules())
                    .filter(|own| !own.is_empty())
                    // Kept by a hold, a missing copy or another policy.
                    .unwrap_or_else(|| vec![decision.rule]),
                Verdict::Ignore => vec![decision.rule],
            };
            known.hold(&holders, at, &mut life.intervals);
            if decision.verdict == Verdict::Delete && may_go {
                life.deleted_at = Some(at);
                gone.push(index);
                continue;
            }
            moment.held += 1;
            moment.storage_gib = moment.storage_gib.saturating_add(size);
            if snapshot.state.is_good() && decision.verdict != Verdict::Ignore {
                let oldest =
                    moment.oldest.map_or(snapshot.created_at, |oldest| oldest.min(snapshot.created_at));
                moment.oldest = Some(oldest);
            }
        }
        self.forecast.count_max = self.forecast.count_max.max(plan.decisions.len());
        self.forecast.storage_gib_max = self.forecast.storage_gib_max.max(storage_before);
        self.forecast.moments.push(moment);
        gone
    }

    /// Whatever still holds something holds it to the end.
    fn end(mut self) -> Forecast {
        for known in &mut self.known {
            if let Some(life) = known.life.and_then(|place| self.forecast.lifetimes.get_mut(place)) {
                known.hold(&[], self.simulation.until, &mut life.intervals);
            }
        }
        self.forecast
    }
}

impl Known {
    /// From now on these hold it; what held it and does no more is written down.
    fn hold(&mut self, holders: &[Rule], at: Timestamp, intervals: &mut Vec<Interval>) {
        self.holders.retain(|(rule, from)| {
            let still = holders.contains(rule);
            if !still {
                intervals.push(Interval { rule: *rule, from: *from, until: at });
            }
            still
        });
        for rule in holders {
            if self.holders.iter().all(|(holder, _)| holder != rule) {
                self.holders.push((*rule, at));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::time::Duration;

    use jiff::SignedDuration;
    use jiff::tz::TimeZone;

    use super::*;
    use crate::policy::{ByPeriod, Count, Guard, Hooks, OnStart, Period, Retention};
    use crate::retention::inventory::Hold;
    use crate::retention::plan;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn of(count: u32) -> Option<Count> {
        NonZeroU32::new(count).map(Count::Of)
    }

    fn no_rules() -> Retention {
        Retention { min_keep: 1, ..crate::retention::tests::no_rules() }
    }

    /// The last N of each of some periods.
    fn each(counts: &[(Period, u32)]) -> Retention {
        let wanted = |period| counts.iter().find(|(of, _)| *of == period).and_then(|(_, count)| of(*count));
        Retention { keep: ByPeriod::of(wanted), ..no_rules() }
    }

    fn policy(schedule: &str, zone: &str, retention: Retention) -> Policy {
        Policy {
            name: "nightly".parse().unwrap(),
            enabled: true,
            paused_since: None,
            schedule: Some(schedule.parse().unwrap()),
            time_zone: TimeZone::get(zone).unwrap(),
            jitter: Duration::ZERO,
            on_start: OnStart::IfMissed,
            deadline: None,
            create: true,
            zones: vec!["ch-gva-2".parse().unwrap()],
            select: Select::default(),
            retention: Some(retention),
            guard: Guard {
                max_deletes: None,
                max_delete_percent: 50,
                max_listing_drop_percent: 50,
                max_clock_skew: Duration::from_mins(5),
                settle: Duration::from_hours(20),
                expect_newest: None,
            },
            export: None,
            promote: None,
            hooks: Hooks::default(),
        }
    }

    fn over(
        policy: &Policy,
        inventory: Inventory,
        from: &str,
        until: &str,
    ) -> Result<Forecast, SimulationError> {
        let policies = [policy.clone()];
        let [of] = &policies;
        simulate(
            Simulation {
                policies: &policies,
                policy: of,
                from: at(from),
                until: at(until),
                size_gib: Some(10),
            },
            inventory,
        )
    }

    /// Over nothing.
    fn played(policy: &Policy, from: &str, until: &str) -> Forecast {
        let (policy, inventory) = imaginary_instance(policy, &policy.zones[0]);
        over(&policy, inventory, from, until).unwrap()
    }

    /// A zone with `web-1` and snapshots of it.
    fn zone_with(taken: &[&str]) -> Inventory {
        let (_, mut inventory) =
            imaginary_instance(&policy("@daily", "UTC", no_rules()), &"ch-gva-2".parse().unwrap());
        inventory.instances[0].name = "web-1".into();
        let id = inventory.instances[0].id;
        let snapshots = (1..).zip(taken).map(|(number, taken)| Snapshot {
            id: SnapshotId(Uuid::from_u128(number)),
            name: format!("old-{number}").into(),
            created_at: at(taken),
            state: SnapshotState::Exported,
            size_gib: Some(50),
            application_consistent: None,
            instance_id: Some(id),
        });
        inventory.snapshots = snapshots.collect();
        inventory
    }

    /// When those were taken that are there after the run at that moment.
    fn there(forecast: &Forecast, moment: Timestamp) -> BTreeSet<Timestamp> {
        let lifetimes = forecast.lifetimes.iter();
        let there = lifetimes.filter(|life| {
            life.snapshot.created_at <= moment && life.deleted_at.is_none_or(|deleted| deleted > moment)
        });
        there.map(|life| life.snapshot.created_at).collect()
    }

    #[test]
    fn new_snapshots_are_application_consistent_if_the_newest_is() {
        let rules = Retention { keep_last: of(1), min_keep_consistent: 1, ..no_rules() };
        let policy = policy("0 2 * * *", "UTC", rules);
        for (flag, stays) in [(Some(true), false), (None, false), (Some(false), true)] {
            let mut zone = zone_with(&["2026-11-01T02:00:00Z", "2026-11-02T02:00:00Z"]);
            zone.snapshots[0].application_consistent = Some(true);
            zone.snapshots[1].application_consistent = flag;
            let forecast = over(&policy, zone, "2026-11-02T12:00:00Z", "2026-11-06T00:00:00Z").unwrap();
            let left = there(&forecast, at("2026-11-05T12:00:00Z"));
            assert_eq!(left.len(), 1 + usize::from(stays), "{flag:?}: {left:?}");
            assert_eq!(left.contains(&at("2026-11-01T02:00:00Z")), stays, "{flag:?}");
        }
    }

    /// What was never pruned is judged like what was pruned all along: the engine over the whole history, at any
    /// moment, wants exactly what the play has left.
    #[test]
    fn what_is_there_at_any_moment_is_what_the_engine_wants_of_the_whole_history() {
        let mixed = [(Period::Hour, 5), (Period::Day, 4), (Period::Week, 3), (Period::Month, 2)];
        let within = Retention { keep_within: Some("36h".parse().unwrap()), ..no_rules() };
        let capped =
            Retention { keep_last: of(9), max_age: Some("30h".parse().unwrap()), min_keep: 2, ..no_rules() };
        for (name, retention) in [
            ("last", Retention { keep_last: of(7), ..no_rules() }),
            ("within", within),
            ("each", each(&mixed)),
            ("each, without the oldest", Retention { keep_oldest: false, ..each(&mixed) }),
            ("capped", capped),
        ] {
            for zone in
                if name == "each" { &["UTC", "Europe/Zurich", "Australia/Lord_Howe"][..] } else { &["UTC"] }
            {
                let policy = policy("15 */6 * * *", zone, retention.clone());
                let (policy, mut whole) = imaginary_instance(&policy, &policy.zones[0]);
                let forecast =
                    over(&policy, whole.clone(), "2027-03-05T00:00:00Z", "2027-04-10T00:00:00Z").unwrap();
                assert!(forecast.lifetimes.len() > 120, "{name}: {}", forecast.lifetimes.len());
                let mut coming = forecast.lifetimes.iter().map(|life| life.snapshot.clone()).peekable();
                for moment in forecast.moments.iter().skip(1) {
                    whole.snapshots.extend(std::iter::from_fn(|| {
                        coming.next_if(|snapshot| snapshot.created_at <= moment.at)
                    }));
                    let plan = plan(std::slice::from_ref(&policy), &whole, moment.at);
                    let kept = plan.policies[0].decisions.iter();
                    let kept = kept.filter(|decision| decision.verdict == Verdict::Keep);
                    let kept: BTreeSet<Timestamp> =
                        kept.map(|one| whole.snapshots[one.index as usize].created_at).collect();
                    assert_eq!(there(&forecast, moment.at), kept, "{name} in {zone} at {}", moment.at);
                    assert_eq!(moment.held, kept.len());
                    assert_eq!(moment.oldest, kept.first().copied());
                    assert_eq!(moment.storage_gib, 10 * kept.len() as u64);
                }
            }
        }
    }

    #[test]
    fn a_day_has_one_snapshot_through_both_clock_changes() {
        let policy = policy("30 2 * * *", "Europe/Zurich", each(&[(Period::Day, 3)]));
        for (from, until) in [
            ("2027-03-24T12:00:00Z", "2027-04-02T12:00:00Z"),
            ("2027-10-27T12:00:00Z", "2027-11-05T12:00:00Z"),
        ] {
            let forecast = played(&policy, from, until);
            assert_eq!((forecast.lifetimes.len(), forecast.moments.len()), (9, 10), "{from}");
            let held: Vec<usize> = forecast.moments.iter().map(|moment| moment.held).collect();
            assert_eq!(held, [0, 1, 2, 3, 3, 3, 3, 3, 3, 3], "{from}");
            assert_eq!(forecast.count_max, 4, "before a run lets one go, there is one more");
        }
    }

    #[test]
    fn each_life_tells_what_held_it_and_how_long() {
        let retention = Retention { keep_last: of(2), ..each(&[(Period::Month, 1)]) };
        let forecast = played(
            &policy("0 0 * * *", "UTC", Retention { min_keep: 0, keep_oldest: false, ..retention }),
            "2027-01-29T12:00:00Z",
            "2027-02-03T12:00:00Z",
        );
        let shown: Vec<(String, Option<Timestamp>, Vec<String>)> = forecast
            .lifetimes
            .iter()
            .map(|life| {
                let day = |at: Timestamp| at.strftime("%d").to_string();
                let stay = |stay: &Interval| format!("{} {}-{}", stay.rule, day(stay.from), day(stay.until));
                (day(life.snapshot.created_at), life.deleted_at, life.intervals.iter().map(stay).collect())
            })
            .collect();
        let deleted = |day: &str| Some(at(&format!("2027-{day}T00:00:00Z")));
        let expected = [
            ("30", deleted("02-01"), ["keep_monthly 30-31", "keep_last 30-01"]),
            ("31", deleted("02-02"), ["keep_monthly 31-01", "keep_last 31-02"]),
            ("01", deleted("02-03"), ["keep_monthly 01-02", "keep_last 01-03"]),
            ("02", None, ["keep_monthly 02-03", "keep_last 02-03"]),
            ("03", None, ["keep_last 03-03", "keep_monthly 03-03"]),
        ]
        .map(|(day, deleted, intervals)| (day.to_owned(), deleted, intervals.map(str::to_owned).to_vec()));
        assert_eq!(shown, expected);
        assert_eq!(
            forecast.lifetimes[0].holders().into_iter().map(Rule::as_str).collect::<Vec<_>>(),
            ["keep_last", "keep_monthly"]
        );
    }

    #[test]
    fn what_is_there_already_is_played_on_and_goes_at_the_first_run() {
        let retention = Retention { keep_last: of(2), ..no_rules() };
        let zone = zone_with(&["2026-12-01T00:00:00Z", "2026-12-02T00:00:00Z", "2026-12-03T00:00:00Z"]);
        let forecast =
            over(&policy("@daily", "UTC", retention), zone, "2027-01-01T12:00:00Z", "2027-01-03T12:00:00Z")
                .unwrap();
        let first = forecast.moments[0];
        assert_eq!((first.held, first.oldest, first.storage_gib), (3, Some(at("2026-12-01T00:00:00Z")), 150));
        let deleted: Vec<Option<Timestamp>> = forecast.lifetimes.iter().map(|life| life.deleted_at).collect();
        let (second, third) = (Some(at("2027-01-02T00:00:00Z")), Some(at("2027-01-03T00:00:00Z")));
        // The order of the plan: newest first.
        assert_eq!(deleted, [third, second, second, None, None]);
        assert_eq!(
            forecast.lifetimes.iter().map(|life| life.is_new).collect::<Vec<_>>(),
            [false, false, false, true, true]
        );
        assert_eq!(
            forecast.lifetimes[4].snapshot.size_gib,
            Some(50),
            "as large as the newest one of its instance"
        );
        assert_eq!((forecast.count_max, forecast.storage_gib_max), (4, 200));
        let ids: HashSet<SnapshotId> = forecast.lifetimes.iter().map(|life| life.snapshot.id).collect();
        assert_eq!(ids.len(), 5, "an invented id is not used by another snapshot");
    }

    #[test]
    fn pins_and_other_policies_hold_as_they_do_in_truth() {
        let strict = policy("@daily", "UTC", Retention { keep_last: of(1), ..no_rules() });
        let lenient = Policy {
            name: "lenient".parse().unwrap(),
            schedule: None,
            create: false,
            ..policy("@daily", "UTC", Retention { keep_within: Some("48h".parse().unwrap()), ..no_rules() })
        };
        let mut zone = zone_with(&["2026-12-01T00:00:00Z"]);
        let held = zone.snapshots[0].id;
        zone.holds.insert(held, Hold { until: Some(at("2027-01-05T06:00:00Z")), reason: None });
        let policies = [strict, lenient];
        let from = at("2027-01-01T12:00:00Z");
        let asked = Simulation {
            policies: &policies,
            policy: &policies[0],
            from,
            until: from + SignedDuration::from_hours(24 * 9),
            size_gib: None,
        };
        let forecast = simulate(asked, zone).unwrap();
        assert_eq!(forecast.lifetimes[0].deleted_at, Some(at("2027-01-06T00:00:00Z")));
        assert!(forecast.lifetimes[0].intervals.iter().any(|stay| stay.rule == Rule::Hold));
        let new = &forecast.lifetimes[1];
        assert_eq!(new.deleted_at, Some(new.snapshot.created_at + SignedDuration::from_hours(72)));
        assert!(new.intervals.iter().any(|stay| stay.rule == Rule::Policy), "{:?}", new.intervals);
    }

    #[test]
    fn what_the_policy_does_not_select_is_not_told_of_and_new_ones_of_it_do_not_pile_up() {
        let mut selective = policy("@daily", "UTC", Retention { keep_last: of(1), ..no_rules() });
        selective.select.snapshot_names = Some(vec![crate::policy::select::NameGlob::new("old-*").unwrap()]);
        let zone = zone_with(&["2026-12-01T00:00:00Z"]);
        let forecast =
            over(&selective, zone.clone(), "2027-01-01T12:00:00Z", "2027-01-31T12:00:00Z").unwrap();
        assert_eq!((forecast.lifetimes.len(), forecast.count_max), (1, 1));
        assert_eq!(forecast.not_selected.as_deref(), Some("web-1_ROOT-1_20270102000000"));

        // No snapshot is created of an instance that is not selected, and its snapshots do not matter.
        selective.select = Select { instances: Some(Vec::new()), ..Select::default() };
        let forecast = over(&selective, zone, "2027-01-01T12:00:00Z", "2027-01-31T12:00:00Z").unwrap();
        assert_eq!((forecast.lifetimes.len(), forecast.instances, forecast.not_selected), (0, 0, None));
    }

    #[test]
    fn what_is_on_its_way_arrives_or_is_gone() {
        let mut zone = zone_with(&["2026-12-30T00:00:00Z", "2026-12-31T00:00:00Z", "2026-12-31T12:00:00Z"]);
        zone.snapshots[0].state = SnapshotState::Deleting;
        zone.snapshots[1].state = SnapshotState::Error;
        zone.snapshots[2].state = SnapshotState::Snapshotting;
        let keep = policy("@daily", "UTC", Retention { keep_last: of(3), ..no_rules() });
        let forecast = over(&keep, zone, "2026-12-31T13:00:00Z", "2027-02-01T00:00:00Z").unwrap();
        let shown: Vec<_> =
            forecast.lifetimes.iter().take(2).map(|life| (life.deleted_at, life.holders())).collect();
        // The failed one is never judged; the one in flight is kept by its place, then deleted.
        assert!(shown.contains(&(None, BTreeSet::from([Rule::State]))), "{shown:?}");
        assert!(shown.iter().any(|(deleted, _)| *deleted == Some(at("2027-01-03T00:00:00Z"))), "{shown:?}");
        assert_eq!(forecast.moments.last().map(|moment| moment.held), Some(4));
    }

    #[test]
    fn too_much_and_nothing_to_play_are_refused() {
        let keep = Retention { keep_last: of(1), ..no_rules() };
        let by_hand = Policy { schedule: None, ..policy("@daily", "UTC", keep.clone()) };
        let zone = zone_with(&[]);
        let (from, until) = ("2027-01-01T00:00:00Z", "2037-01-01T00:00:00Z");
        assert!(matches!(over(&by_hand, zone.clone(), from, until), Err(SimulationError::NoSchedule(_))));
        let disabled = Policy { enabled: false, ..policy("@daily", "UTC", keep.clone()) };
        assert!(matches!(over(&disabled, zone.clone(), from, until), Err(SimulationError::NotSpoken { .. })));
        let restless = policy("* * * * * *", "UTC", keep.clone());
        assert!(matches!(over(&restless, zone.clone(), from, until), Err(SimulationError::TooManyRuns(_))));
        let mut crowd = zone.clone();
        crowd.instances = (0..400)
            .map(|number| Instance { id: InstanceId(Uuid::from_u128(number)), ..zone.instances[0].clone() })
            .collect();
        let daily = policy("@daily", "UTC", keep);
        let refused = over(&daily, crowd, from, until).unwrap_err();
        assert_eq!(refused, SimulationError::TooManySnapshots { runs: 3653, instances: 400 });
    }

    #[test]
    fn the_ends_of_time_are_no_trouble() {
        let daily = policy("@daily", "Australia/Lord_Howe", each(&[(Period::Year, 2), (Period::Day, 2)]));
        for (from, until, runs) in [
            ("1970-01-01T00:00:00Z", "1970-01-11T00:00:00Z", 10),
            ("4999-12-20T00:00:00Z", "4999-12-30T22:00:00Z", 11),
            // So far no schedule is followed.
            ("-009999-01-02T01:59:59Z", "-009999-01-12T00:00:00Z", 0),
            ("9999-12-20T00:00:00Z", "9999-12-30T22:00:00.999999999Z", 0),
        ] {
            let forecast = played(&daily, from, until);
            assert_eq!((forecast.lifetimes.len(), forecast.moments.len()), (runs, runs + 1), "{from}");
            // What exists lies in the future, or far in the past.
            let forecast = over(&daily, zone_with(&["2026-12-01T00:00:00Z"]), from, until).unwrap();
            assert_eq!(forecast.lifetimes.len(), runs + 1, "{from}");
            assert_eq!(forecast.lifetimes[0].deleted_at, None, "{from}: the oldest, or not judged at all");
        }
    }
}
