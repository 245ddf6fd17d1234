//! Age limits: what is too old now, and from when on something will be.
//!
//! An age is measured from now, back over the calendar of the policy's time zone. The calendar makes that
//! uneven: a month before 28, 29, 30 and 31 March is 28 February each time, and a day before a clock change is
//! 23 or 25 hours. So a limit does not only move forward as time goes on: it stands, jumps, and even falls
//! back. [`AgeLimit::first_passed`] answers exactly all the same, for as many snapshots as wanted, by a table
//! of the stretches of time over which the limit moves evenly.

use std::sync::Arc;

use jiff::Timestamp;
use jiff::civil::Time;
use jiff::tz::TimeZone;

use crate::policy::span::Span;
use crate::retention::reason::Cutoff;
use crate::retention::verdict::Rule;

/// By how much going a span back and going it forward may differ: the lengths of months, of clamped month
/// ends and of clock changes come to less than so many days.
const SLACK_DAYS: i128 = 10;

const DAY: i128 = 24 * 60 * 60 * 1_000_000_000;

/// The limit that one rule of one policy sets to ages.
#[derive(Debug)]
pub(crate) struct AgeLimit {
    /// Where the limit is now, for reasons to tell.
    pub(crate) cutoff: Arc<Cutoff>,
    now: Timestamp,
    /// In the order of time, without gaps.
    stretches: Vec<Stretch>,
    /// From then on everything that was judged is past the limit; without it, not before the end of time.
    end: Option<Timestamp>,
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

impl AgeLimit {
    /// The limit at `now`. `taken` are the first and the last time at which anything judged was taken.
    pub(crate) fn new(
        rule: Rule,
        span: &Span,
        zone: &TimeZone,
        now: Timestamp,
        taken: Option<(Timestamp, Timestamp)>,
    ) -> Self {
        let at = span.before(now, zone);
        let cutoff = Arc::new(Cutoff { rule, span: span.clone(), at });
        let first = taken.and_then(|(first, _)| span.after(first, zone));
        let last = taken.and_then(|(_, last)| span.after(last, zone));
        let end = last.and_then(|last| shifted(last, SLACK_DAYS * DAY)).map(|end| end.max(now));
        let stretches = first.map_or_else(Vec::new, |first| {
            let from = shifted(first, -SLACK_DAYS * DAY).unwrap_or(Timestamp::MIN).max(now);
            stretches(span, zone, from, end.unwrap_or(Timestamp::MAX))
        });
        Self { cutoff, now, stretches, end }
    }

    /// Whether what was taken then is past the limit now; exactly on it is not.
    pub(crate) fn is_passed(&self, taken: Timestamp) -> bool {
        taken < self.cutoff.at
    }

    /// The first instant, `from` or later, at which what was taken then is past the limit.
    /// `from` is not before now.
    pub(crate) fn first_passed(&self, taken: Timestamp, from: Timestamp) -> Option<Timestamp> {
        if from == self.now && self.is_passed(taken) {
            return Some(from);
        }
        let (taken, instant) = (taken.as_nanosecond(), from.as_nanosecond());
        let short = self.stretches.partition_point(|stretch| stretch.reach <= taken);
        let within = |stretch: &Stretch| {
            let passed = (taken + stretch.distance + 1).max(stretch.from).max(instant);
            (passed < stretch.until).then_some(passed)
        };
        match self.stretches.iter().skip(short).find_map(within) {
            Some(passed) => Timestamp::from_nanosecond(passed).ok(),
            None => self.end.map(|end| end.max(from)),
        }
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
