//! Which hour, day, week, month and year a snapshot belongs to.

use std::cell::Cell;

use jiff::Timestamp;
use jiff::tz::{Offset, TimeZone};

use crate::policy::Period;

const HOUR_SECONDS: i64 = 3600;
const DAY_SECONDS: i64 = 24 * HOUR_SECONDS;
/// 1 January 1970 was a Thursday: so many days after a Monday.
const EPOCH_WEEKDAY: i64 = 3;

/// A number for each period that holds an instant: the same for two instants if both lie in the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Periods([i64; 5]);

impl Periods {
    pub(crate) fn of(&self, period: Period) -> i64 {
        self.0[period as usize]
    }
}

/// The calendar of a time zone between two instants.
///
/// Looking up the offset of each of a million instants anew takes longer than all judging of them; there are
/// few changes of it, and neighbours mostly share one, and often the day as well.
#[derive(Debug)]
pub(crate) struct Calendar {
    /// From when on each offset holds, in order; the first holds before its instant, too.
    offsets: Vec<(Timestamp, Offset)>,
    /// Where the last one was found.
    near: Cell<usize>,
    /// The last day, and its week, month and year.
    day: Cell<(i64, [i64; 3])>,
}

impl Calendar {
    /// The calendar for instants from `first` to `last`.
    pub(crate) fn new(zone: &TimeZone, first: Timestamp, last: Timestamp) -> Self {
        let changes = zone.following(first).take_while(|change| change.timestamp() <= last);
        let changes = changes.map(|change| (change.timestamp(), change.offset()));
        let offsets = std::iter::once((first, zone.to_offset(first))).chain(changes).collect();
        Self { offsets, near: Cell::new(0), day: Cell::new((i64::MIN, [0; 3])) }
    }

    fn offset(&self, instant: Timestamp) -> Offset {
        let holds_at = |place: usize| {
            let (from, offset) = self.offsets.get(place)?;
            let ends = self.offsets.get(place + 1).is_some_and(|(next, _)| *next <= instant);
            ((place == 0 || *from <= instant) && !ends).then_some(*offset)
        };
        holds_at(self.near.get()).unwrap_or_else(|| {
            let place = self.offsets.partition_point(|(from, _)| *from <= instant).saturating_sub(1);
            self.near.set(place);
            holds_at(place).unwrap_or(Offset::UTC)
        })
    }

    /// Which periods an instant between the two lies in.
    pub(crate) fn periods(&self, instant: Timestamp) -> Periods {
        // Rounded down, also before 1970.
        let second = instant.as_second() - i64::from(instant.subsec_nanosecond() < 0);
        let offset = self.offset(instant);
        let day = (second + i64::from(offset.seconds())).div_euclid(DAY_SECONDS);
        let (known, mut longer) = self.day.get();
        if known != day {
            let date = offset.to_datetime(instant).date();
            let (year, month) = (i64::from(date.year()), i64::from(date.month()));
            // Weeks of ISO 8601 run from Monday to Sunday, whatever year they are counted to.
            longer = [(day + EPOCH_WEEKDAY).div_euclid(7), 12 * year + month, year];
            self.day.set((day, longer));
        }
        let [week, month, year] = longer;
        Periods([second.div_euclid(HOUR_SECONDS), day, week, month, year])
    }
}

/// What people call the period that an instant lies in: `2026-11-22`, `2026-W47`, `2026-11`; an hour by its first
/// instant, since it is the same everywhere.
pub(crate) fn name(period: Period, instant: Timestamp, zone: &TimeZone) -> String {
    let date = zone.to_datetime(instant).date();
    match period {
        Period::Hour => {
            let second = instant.as_second() - i64::from(instant.subsec_nanosecond() < 0);
            let start = Timestamp::from_second(second - second.rem_euclid(HOUR_SECONDS)).unwrap_or(instant);
            start.to_string()
        }
        Period::Day => date.to_string(),
        Period::Week => {
            let week = date.iso_week_date();
            format!("{}-W{:02}", week.year(), week.week())
        }
        Period::Month => format!("{}-{:02}", date.year(), date.month()),
        Period::Year => date.year().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// By jiff's own calendar, zone by zone, across clock changes and before 1970.
        #[test]
        fn two_instants_share_a_period_if_and_only_if_its_name_is_the_same(
            zone in prop::sample::select(vec!["UTC", "Europe/Zurich", "America/New_York", "Australia/Lord_Howe"]),
            start in -70_000_000_000_i64..70_000_000_000,
            steps in prop::collection::vec((0..2_000_000_i64, 0..1_000_000_000_i32), 1..40),
        ) {
            let zone = TimeZone::get(zone).unwrap();
            let mut second = start;
            let mut instants = vec![Timestamp::new(second, 0).unwrap()];
            for (step, nanosecond) in steps {
                second += step;
                instants.push(Timestamp::new(second, nanosecond).unwrap());
            }
            let calendar = Calendar::new(&zone, instants[0], instants[instants.len() - 1]);
            for pair in instants.windows(2).rev() {
                let [a, b] = [pair[0], pair[1]].map(|instant| calendar.periods(instant));
                for period in Period::ALL {
                    let [name_a, name_b] = [pair[0], pair[1]].map(|instant| name(period, instant, &zone));
                    prop_assert_eq!(a.of(period) == b.of(period), name_a == name_b, "{:?} {:?}", period, pair);
                }
            }
        }
    }
}
