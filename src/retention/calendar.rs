//! Which hour, day, week, month and year a snapshot belongs to.

use jiff::civil::Date;
use jiff::tz::{Offset, TimeZone};
use jiff::{Span, Timestamp};

use crate::policy::Period;

const HOUR_SECONDS: i64 = 3600;
const DAY_SECONDS: i64 = 24 * HOUR_SECONDS;
/// 1 January 1970 was a Thursday: this many days after a Monday.
const EPOCH_WEEKDAY: i32 = 3;

/// The periods that an instant lies in, each by its number: hours, days and weeks since 1970, months and years of the
/// calendar. Two instants have the same number if and only if they lie in the same period.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Periods([i32; 5]);

impl Periods {
    pub(crate) fn number(&self, period: Period) -> i32 {
        self.0[period as usize]
    }

    pub(crate) fn day(&self) -> i32 {
        self.number(Period::Day)
    }
}

/// The calendar of a time zone.
///
/// Looking up the zone's offset anew for each of a million instants takes longer than all rules; offsets change rarely,
/// and neighbours mostly share one, and often the day as well.
#[derive(Debug)]
pub(crate) struct Calendar {
    zone: TimeZone,
    /// From when until before when each known offset holds; the one used last comes first.
    offsets: Vec<(Timestamp, Timestamp, Offset)>,
    /// The day of the last instant, with its week, month and year.
    last_day: (i32, [i32; 3]),
}

impl Calendar {
    pub(crate) fn new(zone: &TimeZone) -> Self {
        Self { zone: zone.clone(), offsets: Vec::new(), last_day: (i32::MIN, [0; 3]) }
    }

    fn offset(&mut self, instant: Timestamp) -> Offset {
        let holds = |(from, until, _): &(Timestamp, Timestamp, Offset)| *from <= instant && instant < *until;
        if let Some(place) = self.offsets.iter().position(holds) {
            self.offsets.swap(0, place);
        } else {
            let next = self.zone.following(instant).next();
            let until = next.map_or(Timestamp::MAX, |change| change.timestamp());
            let offset = self.zone.to_offset(instant);
            // A change at the instant itself is none before it: then the offset holds from here on.
            let last = self.zone.preceding(instant).next().map(|change| change.timestamp());
            let from = last.filter(|last| self.zone.to_offset(*last) == offset).unwrap_or(instant);
            self.offsets.insert(0, (from, until, offset));
        }
        self.offsets.first().map_or(Offset::UTC, |(.., offset)| *offset)
    }

    pub(crate) fn periods(&mut self, instant: Timestamp) -> Periods {
        // Rounded down, also before 1970.
        let second = instant.as_second() - i64::from(instant.subsec_nanosecond() < 0);
        let offset = self.offset(instant);
        let whole = |count: i64| i32::try_from(count).unwrap_or(i32::MAX);
        let day = whole((second + i64::from(offset.seconds())).div_euclid(DAY_SECONDS));
        if self.last_day.0 != day {
            let date = offset.to_datetime(instant).date();
            let (year, month) = (i32::from(date.year()), i32::from(date.month()));
            // Weeks of ISO 8601 run from Monday to Sunday, whatever year they are counted to.
            self.last_day = (day, [(day + EPOCH_WEEKDAY).div_euclid(7), 12 * year + month - 1, year]);
        }
        let [week, month, year] = self.last_day.1;
        Periods([whole(second.div_euclid(HOUR_SECONDS)), day, week, month, year])
    }
}

/// The date of a day by its number.
pub(crate) fn date_of(day: i32) -> Option<Date> {
    Date::constant(1970, 1, 1).checked_add(Span::new().try_days(day).ok()?).ok()
}

/// The usual name of a period: `2026-11-22`, `2026-W47`, `2026-11`; an hour's is its first instant, since that is the
/// same everywhere.
pub(crate) fn name(period: Period, number: i32) -> String {
    let named = match period {
        Period::Hour => {
            Timestamp::from_second(i64::from(number) * HOUR_SECONDS).map(|start| start.to_string()).ok()
        }
        Period::Day => date_of(number).map(|date| date.to_string()),
        Period::Week => date_of(7 * number - EPOCH_WEEKDAY).map(|monday| {
            let week = monday.iso_week_date();
            format!("{}-W{:02}", week.year(), week.week())
        }),
        Period::Month => Some(format!("{}-{:02}", number.div_euclid(12), number.rem_euclid(12) + 1)),
        Period::Year => None,
    };
    named.unwrap_or_else(|| number.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The name by jiff's own calendar.
    fn name_by_jiff(period: Period, instant: Timestamp, zone: &TimeZone) -> String {
        let date = zone.to_datetime(instant).date();
        let week = date.iso_week_date();
        match period {
            Period::Hour => {
                let hour = instant.as_nanosecond().div_euclid(3_600_000_000_000);
                Timestamp::from_nanosecond(hour * 3_600_000_000_000).unwrap().to_string()
            }
            Period::Day => date.to_string(),
            Period::Week => format!("{}-W{:02}", week.year(), week.week()),
            Period::Month => format!("{}-{:02}", date.year(), date.month()),
            Period::Year => date.year().to_string(),
        }
    }

    #[test]
    fn edges_belong_to_what_begins_there() {
        // Neighbours share what was looked up for the first of them. In Cairo midnight is set back to eleven.
        for (zone, instant, day, hour) in [
            ("Europe/Zurich", "1969-12-31T22:59:59.5Z", "1969-12-31", "1969-12-31T22:00:00Z"),
            ("Europe/Zurich", "1969-12-31T23:59:59.5Z", "1970-01-01", "1969-12-31T23:00:00Z"),
            ("Africa/Cairo", "2026-10-29T21:00:00Z", "2026-10-29", "2026-10-29T21:00:00Z"),
            ("Africa/Cairo", "2026-10-29T22:00:00Z", "2026-10-30", "2026-10-29T22:00:00Z"),
        ] {
            let mut calendar = Calendar::new(&TimeZone::get(zone).unwrap());
            let instant: Timestamp = instant.parse().unwrap();
            calendar.periods(instant - Span::new().seconds(1));
            let periods = calendar.periods(instant);
            assert_eq!(name(Period::Day, periods.day()), day, "{instant}");
            assert_eq!(name(Period::Hour, periods.number(Period::Hour)), hour, "{instant}");
        }
    }

    proptest! {
        /// Zone by zone, across clock changes and before 1970.
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
            let mut calendar = Calendar::new(&zone);
            for pair in instants.windows(2).rev() {
                let [a, b] = [pair[0], pair[1]].map(|instant| calendar.periods(instant));
                for period in Period::ALL {
                    let names = [pair[0], pair[1]].map(|instant| name_by_jiff(period, instant, &zone));
                    prop_assert_eq!(&name(period, a.number(period)), &names[0]);
                    prop_assert_eq!(a.number(period) == b.number(period), names[0] == names[1], "{:?} {:?}", period, pair);
                }
            }
        }
    }
}
