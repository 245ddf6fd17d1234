//! Age limits: until when a snapshot is not too old.
//!
//! Age counts forward from the snapshot: it is too old as soon as `now > created_at + span`. So there is one instant
//! for each snapshot and limit, and no verdict changes back as time passes.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::civil::{Date, Time};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use crate::policy::span::Span;
use crate::retention::calendar::date_of;
use crate::retention::verdict::Rule;

/// The age that one key of a retention table sets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct AgeLimit {
    pub(crate) rule: Rule,
    pub(crate) span: Span,
    zone: TimeZone,
}

impl AgeLimit {
    /// The last instant at which a snapshot created then is not too old; the end of time if that is never.
    pub(crate) fn end(&self, created_at: Timestamp) -> Timestamp {
        self.span.after(created_at, &self.zone).unwrap_or(Timestamp::MAX)
    }
}

/// An age limit for a million snapshots: [`AgeLimit::end`] asks the calendar each time, this once a day.
#[derive(Debug)]
pub(crate) struct AgeTable {
    pub(crate) limit: Arc<AgeLimit>,
    /// How far away the limit's end is for all instants of a local day; nothing where it is not the same for all.
    days: HashMap<i32, Option<SignedDuration>>,
    /// The day that was asked for last: neighbours in a list mostly share it.
    last: Option<(i32, Option<SignedDuration>)>,
}

impl AgeTable {
    pub(crate) fn new(rule: Rule, span: &Span, zone: &TimeZone) -> Self {
        let limit = AgeLimit { rule, span: span.clone(), zone: zone.clone() };
        Self { limit: Arc::new(limit), days: HashMap::new(), last: None }
    }

    /// [`AgeLimit::end`] of a snapshot that was created then, on that local day.
    pub(crate) fn end(&mut self, created_at: Timestamp, day: i32) -> Timestamp {
        let distance = match self.last {
            Some((last, distance)) if last == day => distance,
            _ => *self.days.entry(day).or_insert_with(|| distance_on(&self.limit, day)),
        };
        self.last = Some((day, distance));
        match distance {
            Some(distance) => created_at.checked_add(distance).unwrap_or(Timestamp::MAX),
            None => self.limit.end(created_at),
        }
    }
}

/// How far the limit's end is from each instant of a local day, if it is the same for all of them: neither that day nor
/// the one of the end has a clock change, and the month of the end has such a day.
fn distance_on(limit: &AgeLimit, day: i32) -> Option<SignedDuration> {
    let date = date_of(day)?;
    let start = regular_day(date, &limit.zone)?;
    let noon = date.to_datetime(Time::constant(12, 0, 0, 0));
    let target = limit.span.on_wall_clock(noon)?;
    // The end of a month is a midnight.
    if target.time() != noon.time() {
        return None;
    }
    let target = regular_day(target.date(), &limit.zone)?;
    target.duration_since(start).checked_add(limit.span.absolute_part())
}

/// The first instant of a day on which no clock changes.
fn regular_day(date: Date, zone: &TimeZone) -> Option<Timestamp> {
    let midnight =
        |date: Date| zone.to_ambiguous_timestamp(date.to_datetime(Time::midnight())).unambiguous().ok();
    let (start, end) = (midnight(date)?, midnight(date.tomorrow().ok()?)?);
    let change = zone.following(start).next();
    change.is_none_or(|change| change.timestamp() >= end).then_some(start)
}
