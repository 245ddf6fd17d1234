//! Which policies are due: pure, fed with the time by the daemon's loop.
//!
//! A **slot** is a moment of a policy's schedule; its run begins there, or later by the policy's jitter. Slots up to
//! the persisted watermark are dealt with; the one to run is the last in `(watermark, now]`, however the clock came
//! to `now`. Two marks are kept: up to `seen` slots were begun, skipped or counted as missed; `watermark` follows when
//! the run that was begun has ended. So no slot is run twice because a clock was set back. The slot of a run that has begun is
//! persisted until that has ended, so that one which was cut short is begun again by the next start.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use sha2::{Digest as _, Sha256};

use crate::policy::name::PolicyName;
use crate::policy::{OnStart, Policy};
use crate::schedule::Schedule;
use crate::state::schedules::{Schedules, Served};

/// A run that begins later than this after its slot makes up for a missed one; earlier, it is on time. A minute, so that a loop
/// that is held up for a moment misses nothing, and every step of a cron line is longer.
const LATE: SignedDuration = SignedDuration::from_mins(1);

/// A clock that is set back by at most this repeats nothing; one that is set back further was wrong before, and the slots
/// that it passed are due again. Three hours, as in Debian's cron(8).
const BACK_MAX: SignedDuration = SignedDuration::from_hours(3);

/// Missed slots are counted up to here: a schedule of every second has millions after a year.
const COUNT_MAX: u64 = 1000;

/// How far back the slot of a run on start is looked for: 29 February, whatever the century.
const SLOT_BACK_MAX: SignedDuration = SignedDuration::from_hours(24 * 366 * 8);

/// When the policies of a configuration are due.
#[derive(Debug, Default)]
pub struct Timetable {
    entries: BTreeMap<PolicyName, Entry>,
}

#[derive(Debug)]
struct Entry {
    /// None for a policy whose runs are all manual, or that is not enabled.
    schedule: Option<(Schedule, TimeZone)>,
    /// From its jitter: see [`jitter_offset`].
    delay: SignedDuration,
    on_start: OnStart,
    served: Served,
    seen: Timestamp,
    running: bool,
    is_enabled: bool,
    /// From when on `served.begun` begins again, whatever the schedule says, unless a newer slot is due before.
    again_from: Option<Timestamp>,
    /// When it is next due, jitter included: what `seen` alone decides.
    due_at: Option<Timestamp>,
}

/// What is to be done, or to be counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A run begins, for this slot.
    Begin(PolicyName, Timestamp),
    /// This many slots passed while the policy still ran.
    Skipped(PolicyName, u64),
    /// This many slots passed without a run, and are not made up for one by one.
    Missed(PolicyName, u64),
}

/// What becomes of the slot of a run that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It is dealt with.
    Done,
    /// It is left to the next start.
    CutShort,
    /// It begins again, unless the policy is not enabled any more, or a newer one is due before.
    Again {
        /// Which.
        slot: Timestamp,
        /// From when on.
        from: Timestamp,
    },
}

impl Timetable {
    /// The timetable of a configuration on the machine of this name, as of `now`: at a start, and again after each reload.
    /// `before` is the persisted state; policies that existed before a reload continue.
    pub fn new(policies: &[Policy], host: &str, before: &Schedules, now: Timestamp) -> Self {
        let entry = |policy: &Policy| {
            let fresh = Served { first_seen_at: now, watermark: now, begun: None, missed: None };
            let mut served = before.policies.get(&policy.name).copied().unwrap_or(fresh);
            if !policy.enabled {
                (served.begun, served.missed) = (None, None);
            }
            let schedule = policy
                .schedule
                .clone()
                .filter(|_| policy.enabled)
                .map(|line| (line, policy.time_zone.clone()));
            let mut entry = Entry {
                delay: jitter_offset(&policy.name, host, policy.jitter),
                on_start: policy.on_start,
                seen: served.watermark,
                served,
                running: false,
                is_enabled: policy.enabled,
                again_from: served.begun.map(|_| now),
                due_at: None,
                schedule,
            };
            entry.see(served.begun.map_or(served.watermark, |begun| begun.max(served.watermark)));
            (policy.name.clone(), entry)
        };
        Self { entries: policies.iter().map(entry).collect() }
    }

    /// Takes over what the timetable before a reload knew of policies that stay: a reload is no start.
    #[must_use]
    pub fn reloaded(mut self, before: &Self, now: Timestamp) -> Self {
        for (name, entry) in &mut self.entries {
            if let Some(old) = before.entries.get(name) {
                entry.served = old.served;
                entry.running = old.running;
                entry.again_from = old.again_from.filter(|_| entry.is_enabled);
                if !entry.is_enabled && !entry.running {
                    (entry.served.begun, entry.served.missed) = (None, None);
                }
                // Slots of a new schedule before it existed were never promised.
                let same = entry.schedule_text() == old.schedule_text();
                let dealt_with = now.checked_sub(old.delay).unwrap_or(now);
                entry.see(if same { old.seen } else { old.seen.max(dealt_with) });
                if !same {
                    entry.served.watermark = entry.served.watermark.max(entry.seen);
                }
            }
        }
        self
    }

    /// What is to be persisted of the policies.
    pub fn schedules(&self) -> Schedules {
        let served = |(name, entry): (&PolicyName, &Entry)| (name.clone(), entry.served);
        Schedules { policies: self.entries.iter().map(served).collect(), ..Schedules::default() }
    }

    /// What is due by the first look after a start; later looks are [`Timetable::look`]'s.
    pub fn look_at_start(&mut self, now: Timestamp) -> Vec<Event> {
        let runs_now = |entry: &&mut Entry| entry.on_start == OnStart::Now && entry.schedule.is_some();
        for entry in self.entries.values_mut().filter(runs_now) {
            // What was missed is made up for by the run that begins anyway, as is a slot that jitter delays still.
            let slot = entry.slot_at(now);
            entry.see(slot.max(entry.seen));
            entry.served.begun = entry.served.begun.max(Some(slot));
            entry.again_from = Some(now);
        }
        self.look_with(now, SignedDuration::ZERO)
    }

    /// What is due by `now`.
    pub fn look(&mut self, now: Timestamp) -> Vec<Event> {
        self.look_with(now, LATE)
    }

    fn look_with(&mut self, now: Timestamp, late: SignedDuration) -> Vec<Event> {
        let mut events = Vec::new();
        for (name, entry) in &mut self.entries {
            entry.look(name, now, late, &mut events);
        }
        events
    }

    /// The policy's run ended.
    pub fn ended(&mut self, policy: &PolicyName, how: Ended) {
        let Some(entry) = self.entries.get_mut(policy) else { return };
        entry.running = false;
        match how {
            Ended::Again { slot, from } if entry.is_enabled => {
                (entry.served.begun, entry.again_from) = (Some(slot), Some(from));
            }
            Ended::Done | Ended::Again { .. } => {
                entry.served.begun = None;
                entry.served.watermark = entry.served.watermark.max(entry.seen);
            }
            Ended::CutShort => {}
        }
    }

    /// A run of the policy begins that was asked for at `slot`, unless one is running.
    pub fn begin_now(&mut self, policy: &PolicyName, slot: Timestamp) -> Option<Event> {
        let entry = self.entries.get_mut(policy).filter(|entry| !entry.running)?;
        Some(entry.begin(policy, slot))
    }

    /// The latest slot of the policy that came and is not dealt with.
    pub fn unserved(&self, policy: &PolicyName) -> Option<Timestamp> {
        let entry = self.entries.get(policy)?;
        Some(entry.seen).filter(|seen| *seen > entry.served.watermark)
    }

    /// When the policy is next due, if it has a schedule, or a run that is to begin again.
    pub fn next(&self, policy: &PolicyName) -> Option<Timestamp> {
        let entry = self.entries.get(policy)?;
        entry.due_at.into_iter().chain(entry.again_from).min()
    }

    /// Which policies there are.
    pub fn policies(&self) -> impl Iterator<Item = &PolicyName> {
        self.entries.keys()
    }
}

impl Entry {
    fn schedule_text(&self) -> Option<(&str, Option<&str>)> {
        self.schedule.as_ref().map(|(schedule, zone)| (schedule.as_str(), zone.iana_name()))
    }

    /// Slots up to here are dealt with.
    fn see(&mut self, slot: Timestamp) {
        self.seen = slot;
        self.due_at = self
            .schedule
            .as_ref()
            .and_then(|(schedule, zone)| schedule.next_after(slot, zone)?.checked_add(self.delay).ok());
    }

    /// The last slot that is due by `now` and not dealt with, and how many there are, at most [`COUNT_MAX`].
    fn passed(&self, now: Timestamp) -> Option<(Timestamp, u64)> {
        let (schedule, zone) = self.schedule.as_ref()?;
        let until = now.checked_sub(self.delay).ok()?;
        let mut latest = schedule.next_after(self.seen, zone).filter(|next| *next <= until)?;
        for count in 1..COUNT_MAX {
            match schedule.next_after(latest, zone).filter(|next| *next <= until) {
                Some(next) => latest = next,
                None => return Some((latest, count)),
            }
        }
        Some((schedule.last_until(until, latest, zone).unwrap_or(latest), COUNT_MAX))
    }

    fn look(&mut self, name: &PolicyName, now: Timestamp, late: SignedDuration, events: &mut Vec<Event>) {
        if self.schedule.is_some() {
            self.look_at_schedule(name, now, late, events);
        } else if !self.running {
            // What is not due misses nothing, also by the time at which it has a schedule again.
            self.served.watermark = self.served.watermark.max(now);
        }
        if let Some(begun) = self.served.begun.filter(|_| self.is_due_again(now)) {
            // A clock that was ahead may have begun it.
            events.push(self.begin(name, begun.min(now)));
        }
    }

    fn look_at_schedule(
        &mut self,
        name: &PolicyName,
        now: Timestamp,
        late: SignedDuration,
        events: &mut Vec<Event>,
    ) {
        if self.seen > now && self.seen.duration_since(now) > BACK_MAX {
            self.served.watermark = self.served.watermark.min(now);
            self.see(now);
        }
        if self.due_at.is_none_or(|due| due > now) {
            return;
        }
        let Some((latest, count)) = self.passed(now) else { return };
        self.see(latest);
        if self.running {
            events.push(Event::Skipped(name.clone(), count));
            return;
        }
        let begun_late = now.duration_since(latest).saturating_sub(self.delay) > late;
        if begun_late && self.on_start == OnStart::Wait {
            (self.served.watermark, self.served.missed) = (latest, Some(latest));
            events.push(Event::Missed(name.clone(), count));
            return;
        }
        if count > 1 {
            events.push(Event::Missed(name.clone(), count - 1));
        }
        events.push(self.begin(name, latest));
    }

    fn begin(&mut self, name: &PolicyName, slot: Timestamp) -> Event {
        self.running = true;
        (self.served.begun, self.served.missed) = (Some(slot), None);
        self.again_from = None;
        Event::Begin(name.clone(), slot)
    }

    fn is_due_again(&self, now: Timestamp) -> bool {
        // A clock that was ahead must not put it off.
        let is_later = |from: Timestamp| from > now && from.duration_since(now) <= BACK_MAX;
        !self.running && self.again_from.is_some_and(|from| !is_later(from))
    }

    /// The slot that a run at `now` stands for: the last one that there was, so that a program which is started again
    /// and again takes no snapshot each time.
    fn slot_at(&self, now: Timestamp) -> Timestamp {
        let last = self.schedule.as_ref().and_then(|(schedule, zone)| {
            schedule.last_until(now, now.checked_sub(SLOT_BACK_MAX).ok()?, zone)
        });
        last.unwrap_or(now)
    }
}

/// A policy's part of its jitter, in whole milliseconds: spread evenly over policies and hosts, so that two daemons of one
/// configuration begin at different times, and always the same for a policy on one host, so that the gap between two runs is
/// what the schedule says.
fn jitter_offset(policy: &PolicyName, host: &str, jitter: Duration) -> SignedDuration {
    // A policy's name has no `@`.
    let digest = Sha256::digest(format!("{policy}@{host}"));
    let share = digest.iter().take(8).fold(0_u64, |sum, byte| (sum << 8) | u64::from(*byte));
    let millis = u64::try_from(jitter.as_millis()).unwrap_or(u64::MAX);
    let part = (u128::from(share) * (u128::from(millis) + 1)) >> 64;
    SignedDuration::from_millis(i64::try_from(part).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config;

    const HOST: &str = "backup-1";

    fn policies(text: &str) -> Vec<Policy> {
        let table = |keys: &str| format!("[policies.p]\nzones = [\"ch-gva-2\"]\n{keys}\n");
        config::parse(&table(text), "test.toml", None).unwrap_or_else(|wrong| panic!("{wrong}")).policies
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn p() -> PolicyName {
        "p".parse().unwrap()
    }

    fn begin(slot: &str) -> Event {
        Event::Begin(p(), at(slot))
    }

    fn served(watermark: &str) -> Schedules {
        let watermark = at(watermark);
        let served = Served { first_seen_at: watermark, watermark, begun: None, missed: None };
        Schedules { policies: BTreeMap::from([(p(), served)]), ..Schedules::default() }
    }

    /// Every begin from one moment to another, looked for each second; each run ends at once.
    fn begins(timetable: &mut Timetable, from: &str, until: &str) -> Vec<String> {
        let (mut now, until) = (at(from), at(until));
        let mut begun = Vec::new();
        while now <= until {
            for event in timetable.look(now) {
                match event {
                    Event::Begin(policy, slot) => {
                        timetable.ended(&policy, Ended::Done);
                        begun.push(format!("{slot} at {now}"));
                    }
                    other => panic!("{other:?} at {now}"),
                }
            }
            now += SignedDuration::from_secs(1);
        }
        begun
    }

    #[test]
    fn a_run_a_day_through_the_clock_changes_of_2027() {
        for (zone, first, last, expected) in [
            (
                "Europe/Zurich",
                "2027-03-27T12:00:00Z",
                "2027-03-29T12:00:00Z",
                ["2027-03-28T01:00:00Z", "2027-03-29T00:30:00Z"],
            ),
            (
                "Europe/Zurich",
                "2027-10-30T12:00:00Z",
                "2027-11-01T12:00:00Z",
                ["2027-10-31T00:30:00Z", "2027-11-01T01:30:00Z"],
            ),
            (
                "America/New_York",
                "2027-03-13T12:00:00Z",
                "2027-03-15T12:00:00Z",
                ["2027-03-14T07:00:00Z", "2027-03-15T06:30:00Z"],
            ),
            (
                "America/New_York",
                "2027-11-06T12:00:00Z",
                "2027-11-08T12:00:00Z",
                ["2027-11-07T07:30:00Z", "2027-11-08T07:30:00Z"],
            ),
            (
                "Australia/Lord_Howe",
                "2027-04-03T00:00:00Z",
                "2027-04-04T20:00:00Z",
                ["2027-04-03T16:00:00Z", "2027-04-04T16:00:00Z"],
            ),
            (
                "Australia/Lord_Howe",
                "2027-10-02T00:00:00Z",
                "2027-10-04T00:00:00Z",
                ["2027-10-02T15:30:00Z", "2027-10-03T15:30:00Z"],
            ),
        ] {
            let policies = policies(&format!("schedule = \"30 2 * * *\"\ntimezone = \"{zone}\""));
            let mut timetable = Timetable::new(&policies, HOST, &Schedules::default(), at(first));
            let expected: Vec<String> = expected.iter().map(|due| format!("{due} at {due}")).collect();
            assert_eq!(begins(&mut timetable, first, last), expected, "{zone} from {first}");
        }
    }

    #[test]
    fn what_was_missed_is_made_up_for_once_or_waited_for_or_run_whenever_the_program_starts() {
        let (now, slot) = ("2026-11-03T12:00:00Z", "2026-11-03T02:30:00Z");
        let missed = |count| Event::Missed(p(), count);
        for (name, on_start, before, expected) in [
            ("never seen", "if_missed", Schedules::default(), vec![]),
            ("never seen", "wait", Schedules::default(), vec![]),
            ("never seen", "now", Schedules::default(), vec![begin(slot)]),
            ("nothing missed", "if_missed", served(slot), vec![]),
            ("nothing missed", "now", served(slot), vec![begin(slot)]),
            ("one missed", "if_missed", served("2026-11-02T02:30:00Z"), vec![begin(slot)]),
            ("one missed", "wait", served("2026-11-02T02:30:00Z"), vec![missed(1)]),
            ("one missed", "now", served("2026-11-02T02:30:00Z"), vec![begin(slot)]),
            ("three missed", "if_missed", served("2026-10-31T02:30:00Z"), vec![missed(2), begin(slot)]),
            ("three missed", "wait", served("2026-10-31T02:30:00Z"), vec![missed(3)]),
        ] {
            let policies = policies(&format!("schedule = \"30 2 * * *\"\non_start = \"{on_start}\""));
            let mut timetable = Timetable::new(&policies, HOST, &before, at(now));
            assert_eq!(timetable.look_at_start(at(now)), expected, "{name}, {on_start}");
            timetable.ended(&p(), Ended::Done);
            assert_eq!(timetable.look(at(now)), [], "{name}, {on_start}, again");
            assert_eq!(timetable.next(&p()), Some(at("2026-11-04T02:30:00Z")), "{name}, {on_start}");
        }
    }

    #[test]
    fn a_policy_that_never_ran_is_late_from_the_moment_at_which_it_was_first_seen() {
        let (first_seen, now) = ("2026-11-01T08:00:00Z", "2026-11-03T08:00:00Z");
        for (on_start, expected) in [
            ("if_missed", vec![Event::Missed(p(), 1), begin("2026-11-03T02:30:00Z")]),
            ("wait", vec![Event::Missed(p(), 2)]),
            ("now", vec![begin("2026-11-03T02:30:00Z")]),
        ] {
            let policies = policies(&format!("schedule = \"30 2 * * *\"\non_start = \"{on_start}\""));
            // A machine that is on by day only: what was saved on the first day is all that the third one knows.
            let first = Timetable::new(&policies, HOST, &Schedules::default(), at(first_seen));
            let second = Timetable::new(&policies, HOST, &first.schedules(), at("2026-11-02T08:00:00Z"));
            let mut third = Timetable::new(&policies, HOST, &second.schedules(), at(now));
            assert_eq!(third.look_at_start(at(now)), expected, "{on_start}");
            assert_eq!(third.schedules().policies[&p()].first_seen_at, at(first_seen));
        }
    }

    #[test]
    fn a_run_that_was_cut_short_is_begun_again_by_the_next_start_and_one_that_ended_is_not() {
        let policies = policies("schedule = \"30 2 * * *\"");
        let slot = "2026-11-03T02:30:00Z";
        for (how, again) in [(Ended::CutShort, vec![begin(slot)]), (Ended::Done, vec![])] {
            let mut timetable =
                Timetable::new(&policies, HOST, &served("2026-11-02T02:30:00Z"), at("2026-11-03T02:29:00Z"));
            assert_eq!(timetable.look(at(slot)), [begin(slot)]);
            // A kill would leave just this.
            assert_eq!(timetable.schedules().policies[&p()].watermark, at("2026-11-02T02:30:00Z"));
            timetable.ended(&p(), how);
            let now = at("2026-11-03T02:31:00Z");
            let mut next = Timetable::new(&policies, HOST, &timetable.schedules(), now);
            assert_eq!(next.look_at_start(now), again);
        }
    }

    #[test]
    fn what_had_begun_is_begun_again_whatever_on_start_says_about_what_was_missed_since() {
        let (slot, asked_at) = ("2026-11-03T02:30:00Z", "2026-11-03T09:00:00Z");
        let (soon, later, latest) = ("2026-11-03T12:00:00Z", "2026-11-05T12:00:00Z", "2026-11-05T02:30:00Z");
        let missed = |count| Event::Missed(p(), count);
        for (keys, start, expected) in [
            ("on_start = \"if_missed\"", soon, [vec![begin(slot)], vec![begin(asked_at)]]),
            ("on_start = \"wait\"", soon, [vec![begin(slot)], vec![begin(asked_at)]]),
            ("on_start = \"now\"", soon, [vec![begin(slot)], vec![begin(asked_at)]]),
            (
                "on_start = \"if_missed\"",
                later,
                [vec![missed(1), begin(latest)], vec![missed(1), begin(latest)]],
            ),
            ("on_start = \"wait\"", later, [vec![missed(2), begin(slot)], vec![missed(2), begin(asked_at)]]),
            ("on_start = \"now\"", later, [vec![begin(latest)], vec![begin(latest)]]),
            ("enabled = false", later, [vec![], vec![]]),
        ] {
            let (nightly, now) = ("schedule = \"30 2 * * *\"", at(start));
            for (is_asked_for, expected) in [false, true].into_iter().zip(expected) {
                let before = served("2026-11-02T02:30:00Z");
                let begun_at = at(if is_asked_for { asked_at } else { slot });
                let policies_then = policies(nightly);
                let mut timetable = Timetable::new(&policies_then, HOST, &before, at("2026-11-03T00:00:00Z"));
                timetable.look(at(slot));
                if is_asked_for {
                    timetable.ended(&p(), Ended::Done);
                    timetable.begin_now(&p(), begun_at);
                }
                let mut next = Timetable::new(
                    &policies(&format!("{nightly}\n{keys}")),
                    HOST,
                    &timetable.schedules(),
                    now,
                );
                assert_eq!(next.look_at_start(now), expected, "{keys}, {is_asked_for}, at {start}");
                next.ended(&p(), Ended::Done);
                let mut third = Timetable::new(&policies_then, HOST, &next.schedules(), now);
                assert_eq!(third.look_at_start(now), [], "{keys}, {is_asked_for}, at {start}");
            }
        }
    }

    #[test]
    fn a_run_that_is_to_begin_again_waits_for_its_time_and_not_where_a_newer_slot_comes_or_it_is_not_enabled()
    {
        let (hourly, slot) = (policies("schedule = \"0 * * * *\""), "2026-11-03T01:00:00Z");
        let not_enabled = policies("schedule = \"0 * * * *\"\nenabled = false");
        let failed = |from: &str| {
            let mut timetable =
                Timetable::new(&hourly, HOST, &Schedules::default(), at("2026-11-03T00:30:00Z"));
            assert_eq!(timetable.look(at(slot)), [begin(slot)]);
            timetable.ended(&p(), Ended::Again { slot: at(slot), from: at(from) });
            timetable
        };
        let from = "2026-11-03T01:05:00Z";
        let mut again = failed(from);
        assert_eq!(again.next(&p()), Some(at(from)));
        assert_eq!(again.look(at("2026-11-03T01:04:59Z")), []);
        assert_eq!(again.look(at(from)), [begin(slot)]);
        again.ended(&p(), Ended::Done);
        assert_eq!(again.look(at("2026-11-03T01:06:00Z")), []);

        let next = "2026-11-03T02:00:00Z";
        let mut newer = failed("2026-11-03T02:01:00Z");
        assert_eq!(newer.look(at(next)), [begin(next)]);
        newer.ended(&p(), Ended::Done);
        assert_eq!(newer.look(at("2026-11-03T02:02:00Z")), []);

        let before = failed(from);
        let now = at("2026-11-03T01:01:00Z");
        let paused = Timetable::new(&not_enabled, HOST, &before.schedules(), now).reloaded(&before, now);
        let mut resumed = Timetable::new(&hourly, HOST, &paused.schedules(), now).reloaded(&paused, now);
        assert_eq!(resumed.look(at(from)), []);
        let mut restarted = Timetable::new(&hourly, HOST, &paused.schedules(), now);
        assert_eq!(restarted.look_at_start(at(from)), []);

        // A clock that was a day ahead is set right.
        let mut ahead = failed("2026-11-04T01:05:00Z");
        assert_eq!(ahead.look(at("2026-11-03T01:01:00Z")), [begin(slot)]);
    }

    #[test]
    fn a_slot_that_comes_while_the_policy_still_runs_is_skipped_and_counted() {
        let mut timetable = Timetable::new(
            &policies("schedule = \"*/10 * * * *\""),
            HOST,
            &Schedules::default(),
            at("2026-11-03T00:05:00Z"),
        );
        assert_eq!(timetable.look(at("2026-11-03T00:10:00Z")), [begin("2026-11-03T00:10:00Z")]);
        assert_eq!(timetable.look(at("2026-11-03T00:20:00Z")), [Event::Skipped(p(), 1)]);
        assert_eq!(timetable.look(at("2026-11-03T00:25:00Z")), []);
        timetable.ended(&p(), Ended::Done);
        assert_eq!(timetable.look(at("2026-11-03T00:26:00Z")), []);
        assert_eq!(timetable.schedules().policies[&p()].watermark, at("2026-11-03T00:20:00Z"));
        assert_eq!(timetable.look(at("2026-11-03T00:30:00Z")), [begin("2026-11-03T00:30:00Z")]);
    }

    #[test]
    fn a_clock_that_is_set_back_a_little_repeats_nothing_and_one_that_was_wrong_is_forgotten() {
        let policies = policies("schedule = \"30 2 * * *\"");
        let mut timetable =
            Timetable::new(&policies, HOST, &served("2026-11-02T02:30:00Z"), at("2026-11-03T02:00:00Z"));
        assert_eq!(timetable.look(at("2026-11-03T02:30:00Z")), [begin("2026-11-03T02:30:00Z")]);
        timetable.ended(&p(), Ended::Done);
        assert_eq!(begins(&mut timetable, "2026-11-03T01:30:00Z", "2026-11-03T04:00:00Z"), [""; 0]);

        // Three years ahead, and back.
        assert_eq!(timetable.look(at("2029-11-03T02:30:00Z"))[1], begin("2029-11-03T02:30:00Z"));
        timetable.ended(&p(), Ended::Done);
        let again = begins(&mut timetable, "2026-11-03T04:00:00Z", "2026-11-04T04:00:00Z");
        assert_eq!(again, ["2026-11-04T02:30:00Z at 2026-11-04T02:30:00Z"]);
    }

    #[test]
    fn a_clock_set_back_by_three_hours_repeats_nothing_and_by_a_second_more_was_wrong() {
        let policies = policies("schedule = \"0 2,3,4,5 * * *\"");
        let last = "2026-11-03T05:00:00Z";
        for (now, next) in [
            ("2026-11-03T02:00:00Z", "2026-11-04T02:00:00Z"),
            ("2026-11-03T01:59:59Z", "2026-11-03T02:00:00Z"),
        ] {
            let mut timetable =
                Timetable::new(&policies, HOST, &served("2026-11-03T04:00:00Z"), at("2026-11-03T04:30:00Z"));
            assert_eq!(timetable.look(at(last)), [begin(last)]);
            timetable.ended(&p(), Ended::Done);
            assert_eq!(timetable.look(at(now)), []);
            assert_eq!(timetable.next(&p()), Some(at(next)), "set back to {now}");
        }
    }

    #[test]
    fn a_run_is_on_time_for_a_minute_after_its_slot_and_later_it_makes_up_for_a_missed_one() {
        let (slot, begun, missed) =
            ("2026-11-03T02:30:00Z", begin("2026-11-03T02:30:00Z"), Event::Missed(p(), 1));
        for (on_start, now, expected) in [
            ("wait", "2026-11-03T02:31:00Z", &begun),
            ("wait", "2026-11-03T02:31:00.001Z", &missed),
            ("if_missed", "2026-11-03T02:31:00.001Z", &begun),
        ] {
            let policies = policies(&format!("schedule = \"30 2 * * *\"\non_start = \"{on_start}\""));
            let mut timetable =
                Timetable::new(&policies, HOST, &served("2026-11-02T02:30:00Z"), at("2026-11-02T12:00:00Z"));
            assert_eq!(
                timetable.look(at(now)),
                std::slice::from_ref(expected),
                "{on_start}, {now}, for {slot}"
            );
        }
    }

    #[test]
    fn after_a_suspend_or_a_step_forward_one_run_makes_up_and_wait_waits() {
        for (on_start, expected) in [
            ("if_missed", vec![Event::Missed(p(), 2), begin("2026-11-05T02:30:00Z")]),
            ("wait", vec![Event::Missed(p(), 3)]),
        ] {
            let policies = policies(&format!("schedule = \"30 2 * * *\"\non_start = \"{on_start}\""));
            let mut timetable =
                Timetable::new(&policies, HOST, &served("2026-11-02T02:30:00Z"), at("2026-11-02T12:00:00Z"));
            assert_eq!(timetable.look(at("2026-11-02T12:00:01Z")), []);
            assert_eq!(timetable.look(at("2026-11-05T12:00:00Z")), expected, "{on_start}");
        }
    }

    #[test]
    fn jitter_is_within_its_bound_always_the_same_and_moves_the_run_not_the_slot() {
        let policies = policies("schedule = \"0 * * * *\"\njitter = \"5m\"");
        let delay = jitter_offset(&p(), HOST, Duration::from_mins(5));
        assert_eq!(delay, jitter_offset(&p(), HOST, Duration::from_mins(5)));
        let names = ["a", "b", "c", "nightly", "weekly"].map(|name| name.parse().unwrap());
        let parts = names.map(|name: PolicyName| jitter_offset(&name, HOST, Duration::from_mins(5)));
        assert!(parts.iter().all(|part| (0..=300_000).contains(&part.as_millis())), "{parts:?}");
        assert!(parts.windows(2).all(|pair| pair[0] != pair[1]), "{parts:?}");
        let hosts = ["backup-1", "backup-2", "backup-3", ""];
        let parts = hosts.map(|host| jitter_offset(&p(), host, Duration::from_mins(5)));
        assert!(parts.iter().all(|part| (0..=300_000).contains(&part.as_millis())), "{parts:?}");
        assert_eq!(BTreeSet::from(parts).len(), hosts.len(), "{parts:?}");
        assert!(hosts.iter().all(|host| jitter_offset(&p(), host, Duration::ZERO).is_zero()));

        let slot = at("2026-11-03T01:00:00Z");
        let mut timetable =
            Timetable::new(&policies, HOST, &Schedules::default(), at("2026-11-03T00:30:00Z"));
        assert_eq!(timetable.next(&p()), Some(slot + delay));
        assert_eq!(timetable.look(slot + delay - SignedDuration::from_millis(1)), []);
        assert_eq!(timetable.look(slot + delay), [Event::Begin(p(), slot)]);
    }

    #[test]
    fn a_run_at_the_start_stands_for_the_slot_that_jitter_delays() {
        let delay = jitter_offset(&p(), HOST, Duration::from_hours(1));
        let slot = at("2026-11-03T02:30:00Z");
        for (start, begun) in [
            (slot - SignedDuration::from_secs(1), "2026-11-02T02:30:00Z"),
            (slot, "2026-11-03T02:30:00Z"),
            (slot + delay - SignedDuration::from_secs(1), "2026-11-03T02:30:00Z"),
            (slot + delay, "2026-11-03T02:30:00Z"),
        ] {
            let policies = policies("schedule = \"30 2 * * *\"\njitter = \"1h\"\non_start = \"now\"");
            let mut timetable = Timetable::new(&policies, HOST, &served("2026-11-02T02:30:00Z"), start);
            assert_eq!(timetable.look_at_start(start), [begin(begun)], "{start}");
            timetable.ended(&p(), Ended::Done);
            let is_due = at(begun) < slot;
            assert_eq!(timetable.look(slot + delay).len(), usize::from(is_due), "{start}");
            timetable.ended(&p(), Ended::Done);
            assert_eq!(timetable.next(&p()), Some(at("2026-11-04T02:30:00Z") + delay), "{start}");
        }
    }

    #[test]
    fn a_reload_begins_nothing_keeps_what_runs_and_promises_nothing_backwards() {
        let hourly = policies("schedule = \"0 * * * *\"\non_start = \"now\"");
        let now = at("2026-11-03T02:40:00Z");
        let old = Timetable::new(
            &policies("schedule = \"30 2 * * *\""),
            HOST,
            &served("2026-10-01T02:30:00Z"),
            now,
        );
        let mut new = Timetable::new(&hourly, HOST, &old.schedules(), now).reloaded(&old, now);
        assert_eq!(new.look(now), []);
        assert_eq!(new.next(&p()), Some(at("2026-11-03T03:00:00Z")));
        assert_eq!(new.look(at("2026-11-03T03:00:00Z")), [begin("2026-11-03T03:00:00Z")]);
        let mut newer = Timetable::new(&hourly, HOST, &new.schedules(), now).reloaded(&new, now);
        assert_eq!(newer.look(at("2026-11-03T04:00:00Z")), [Event::Skipped(p(), 1)]);
    }

    #[test]
    fn years_of_a_schedule_by_the_second_are_no_work() {
        let policies = policies("schedule = \"* * * * * *\"");
        let mut timetable =
            Timetable::new(&policies, HOST, &served("2020-01-01T00:00:00Z"), at("2026-11-03T00:00:00Z"));
        let events = timetable.look(at("2026-11-03T00:00:00Z"));
        assert_eq!(events, [Event::Missed(p(), COUNT_MAX - 1), begin("2026-11-03T00:00:00Z")]);
    }

    #[test]
    fn what_has_no_schedule_or_is_not_enabled_is_never_due() {
        for text in ["", "enabled = false\nschedule = \"* * * * * *\"\non_start = \"now\""] {
            let now = at("2026-11-03T00:00:00Z");
            let mut timetable = Timetable::new(&policies(text), HOST, &served("2020-01-01T00:00:00Z"), now);
            assert_eq!(timetable.look_at_start(now), []);
            assert_eq!(timetable.next(&p()), None);
        }
    }
}
