//! Age limits: what is too old now, and from when on something will be.
//!
//! An age is measured from now, back over the calendar of the policy's time zone. The calendar makes that
//! uneven: a month before 28, 29, 30 and 31 March is 28 February each time, and a day before a clock change is
//! 23 or 25 hours. So a limit does not only move forward as time goes on: it stands, jumps, and even falls
//! back. [`AgeLimit::first_passed`] answers exactly all the same, for as many snapshots as wanted, by a table
//! of the stretches of time over which the limit moves evenly.

use std::cell::OnceCell;

use jiff::Timestamp;
use jiff::civil::Time;
use jiff::tz::TimeZone;

use crate::policy::span::Span;

/// By how much going a span back and going it forward may differ: the lengths of months, of clamped month
/// ends and of clock changes come to less than so many days.
const SLACK_DAYS: i128 = 10;

const DAY: i128 = 24 * 60 * 60 * 1_000_000_000;

/// The limit that one rule of one policy sets to ages.
#[derive(Debug)]
pub(crate) struct AgeLimit<'a> {
    span: &'a Span,
    zone: &'a TimeZone,
    now: Timestamp,
    /// The first and the last time at which anything judged was taken.
    taken: Option<(Timestamp, Timestamp)>,
    cutoff: Timestamp,
    /// Made when it is first asked for: many only want to know about now.
    future: OnceCell<Future>,
}

/// Where the limit will be.
#[derive(Debug)]
struct Future {
    /// In the order of time, without gaps.
    stretches: Vec<Stretch>,
    /// From then on everything that was judged is past the limit; without it, not before the end of time.
    end: Option<Timestamp>,
    /// The furthest back that the limit will ever be, now included.
    lowest: Timestamp,
}

/// A stretch of time over which the limit keeps the same distance. In nanoseconds.
#[derive(Debug)]
struct Stretch {
    from: i128,
    until: i128,
    /// The limit is so far before each instant of the stretch.
    distance: i128,
    /// How far the limit has come by the end of this stretch, or had in an earlier one.
    reach: i128,
}

impl<'a> AgeLimit<'a> {
    /// The limit at `now`. `taken` are the first and the last time at which anything judged was taken.
    pub(crate) fn new(
        span: &'a Span,
        zone: &'a TimeZone,
        now: Timestamp,
        taken: Option<(Timestamp, Timestamp)>,
    ) -> Self {
        Self { span, zone, now, taken, cutoff: span.before(now, zone), future: OnceCell::new() }
    }

    /// Whether what was taken then is past the limit now; exactly on it is not.
    pub(crate) fn is_passed(&self, taken: Timestamp) -> bool {
        taken < self.cutoff
    }

    /// Whether what was taken then is inside the limit now, or will be: limits also fall back.
    pub(crate) fn is_ever_inside(&self, taken: Timestamp) -> bool {
        !self.is_passed(taken) || taken >= self.future().lowest
    }

    /// The first instant, `from` or later, at which what was taken then is past the limit.
    /// `from` is not before now.
    pub(crate) fn first_passed(&self, taken: Timestamp, from: Timestamp) -> Option<Timestamp> {
        if from == self.now && self.is_passed(taken) {
            return Some(from);
        }
        let future = self.future();
        let short = future.stretches.partition_point(|stretch| stretch.reach <= taken.as_nanosecond());
        match future.stretches.iter().skip(short).find_map(|stretch| stretch.first_passed(taken, from)) {
            Some(passed) => Timestamp::from_nanosecond(passed).ok(),
            None => future.end.map(|end| end.max(from)),
        }
    }

    /// The instants, `from` or later, at which what was taken then may get past the limit, or the limit may fall
    /// back for any.
    pub(crate) fn turns(&self, taken: Timestamp, from: Timestamp) -> impl Iterator<Item = Timestamp> {
        let future = self.future();
        let turns = future.stretches.iter().flat_map(move |stretch| {
            [Some(stretch.from), stretch.first_passed(taken, from)].into_iter().flatten()
        });
        let turns = turns.filter_map(|turn| Timestamp::from_nanosecond(turn).ok());
        turns.chain(future.end).filter(move |turn| *turn >= from)
    }

    fn future(&self) -> &Future {
        self.future.get_or_init(|| {
            let first = self.taken.and_then(|(first, _)| self.span.after(first, self.zone));
            let last = self.taken.and_then(|(_, last)| self.span.after(last, self.zone));
            let end = last.and_then(|last| shifted(last, SLACK_DAYS * DAY)).map(|end| end.max(self.now));
            let stretches = first.map_or_else(Vec::new, |first| {
                let from = shifted(first, -SLACK_DAYS * DAY).unwrap_or(Timestamp::MIN).max(self.now);
                stretches(self.span, self.zone, from, end.unwrap_or(Timestamp::MAX))
            });
            let starts = stretches.iter().map(|stretch| stretch.from - stretch.distance);
            let lowest = starts.min().and_then(|lowest| Timestamp::from_nanosecond(lowest).ok());
            let lowest = lowest.map_or(self.cutoff, |lowest| lowest.min(self.cutoff));
            Future { stretches, end, lowest }
        })
    }
}

impl Stretch {
    /// The first instant of it, `from` or later, at which what was taken then is past the limit.
    fn first_passed(&self, taken: Timestamp, from: Timestamp) -> Option<i128> {
        let passed = (taken.as_nanosecond() + self.distance + 1).max(self.from).max(from.as_nanosecond());
        (passed < self.until).then_some(passed)
    }
}

fn shifted(instant: Timestamp, by: i128) -> Option<Timestamp> {
    Timestamp::from_nanosecond(instant.as_nanosecond() + by).ok()
}

/// The stretches between two instants.
///
/// A calendar's distance changes at a day's start, where the time zone's offset changes, and where it changed
/// at the limit's end. The first two are looked up; the third shows in that a distance is another at the end
/// of a stretch than at its start, and is found by halving.
fn stretches(span: &Span, zone: &TimeZone, from: Timestamp, until: Timestamp) -> Vec<Stretch> {
    let limit = |instant: i128| {
        let instant = Timestamp::from_nanosecond(instant).unwrap_or(Timestamp::MIN);
        span.before(instant, zone).as_nanosecond()
    };
    let distance = |instant: i128| instant - limit(instant);
    let beginning = Timestamp::MIN.as_nanosecond();

    let mut bounds = bounds(zone, from, until);
    bounds.push(until.as_nanosecond());
    let mut stretches: Vec<Stretch> = Vec::new();
    for (mut start, end) in bounds.iter().copied().zip(bounds.iter().copied().skip(1)) {
        while start < end && limit(end - 1) > beginning {
            if limit(start) == beginning {
                // The span reaches back before time itself here; nothing is past that.
                start = first(start, end - 1, |instant| limit(instant) > beginning);
                continue;
            }
            let even = distance(start);
            let stop = if distance(end - 1) == even {
                end
            } else {
                first(start, end - 1, |instant| distance(instant) != even)
            };
            match stretches.last_mut() {
                Some(last) if last.until == start && last.distance == even => {
                    last.until = stop;
                    last.reach = last.reach.max(stop - 1 - even);
                }
                last => {
                    let reach = last.map_or(i128::MIN, |last| last.reach).max(stop - 1 - even);
                    stretches.push(Stretch { from: start, until: stop, distance: even, reach });
                }
            }
            start = stop;
        }
    }
    stretches
}

/// `from`, and after it, before `until`, the starts of the zone's days and the changes of its offset; in order.
fn bounds(zone: &TimeZone, from: Timestamp, until: Timestamp) -> Vec<i128> {
    let midnight = |date: jiff::civil::Date| {
        let start = zone.to_ambiguous_timestamp(date.to_datetime(Time::midnight())).compatible();
        start.ok().filter(|start| *start < until)
    };
    let first_day = zone.to_datetime(from).date();
    let days =
        std::iter::successors(first_day.tomorrow().ok(), |day| day.tomorrow().ok()).map_while(midnight);
    let changes = zone.following(from).map(|change| change.timestamp()).take_while(|change| *change < until);
    let mut bounds: Vec<i128> =
        std::iter::once(from).chain(days).chain(changes).map(Timestamp::as_nanosecond).collect();
    bounds.sort_unstable();
    bounds.dedup();
    bounds
}

/// The first instant after `before` for which `holds`, given that it holds for `after`.
fn first(mut before: i128, mut after: i128, holds: impl Fn(i128) -> bool) -> i128 {
    while after - before > 1 {
        let middle = before + (after - before) / 2;
        if holds(middle) {
            after = middle;
        } else {
            before = middle;
        }
    }
    after
}
