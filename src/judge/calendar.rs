//! Ages and periods, read off a calendar on the wall.

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use crate::policy::Period;

/// An age such as `1y1mo2d12h`: what belongs to the calendar, and what to the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Age {
    months: i64,
    days: i64,
    clock: SignedDuration,
}

impl Age {
    /// None if the text is no age.
    pub(crate) fn read(text: &str) -> Option<Self> {
        let mut age = Self { months: 0, days: 0, clock: SignedDuration::ZERO };
        let mut rest = text;
        while !rest.is_empty() {
            let digits = rest.find(|character: char| !character.is_ascii_digit())?;
            let (number, unit) = rest.split_at(digits);
            let end = unit.find(|character: char| character.is_ascii_digit()).unwrap_or(unit.len());
            let (unit, next) = unit.split_at(end);
            let number: i64 = number.parse().ok()?;
            let milliseconds = |of: i64| Some(SignedDuration::from_millis(number.checked_mul(of)?));
            match unit {
                "y" => age.months = age.months.checked_add(number.checked_mul(12)?)?,
                "mo" => age.months = age.months.checked_add(number)?,
                "w" => age.days = age.days.checked_add(number.checked_mul(7)?)?,
                "d" => age.days = age.days.checked_add(number)?,
                "h" => age.clock = age.clock.checked_add(milliseconds(3_600_000)?)?,
                "min" => age.clock = age.clock.checked_add(milliseconds(60_000)?)?,
                "s" => age.clock = age.clock.checked_add(milliseconds(1000)?)?,
                "ms" => age.clock = age.clock.checked_add(milliseconds(1)?)?,
                _ => return None,
            }
            rest = next;
        }
        Some(age)
    }

    /// Whether something of then is older now. Exactly as old is not older.
    pub(super) fn is_exceeded(&self, then: Timestamp, zone: &TimeZone, now: Timestamp) -> bool {
        self.end(then, zone).is_some_and(|end| now > end)
    }

    /// The last instant at which something of then is not older: months and days are counted forward on the calendar, then
    /// hours and less by the clock. None beyond the calendar.
    pub(crate) fn end(&self, then: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let mut end = then;
        if self.months > 0 || self.days > 0 {
            let wall = zone.to_datetime(then);
            let month = i64::from(wall.year())
                .checked_mul(12)?
                .checked_add(i64::from(wall.month()) - 1)?
                .checked_add(self.months)?;
            let year = i16::try_from(month.div_euclid(12)).ok()?;
            let first = Date::new(year, i8::try_from(month.rem_euclid(12) + 1).ok()?, 1).ok()?;
            let (date, time) = if wall.day() <= first.days_in_month() {
                (first.with().day(wall.day()).build().ok()?, wall.time())
            } else {
                // The month lacks such a day: its end.
                (first.last_of_month().tomorrow().ok()?, Time::midnight())
            };
            let date = date.checked_add(jiff::Span::new().try_days(self.days).ok()?).ok()?;
            end = first_time_the_clock_shows(date.to_datetime(time), zone)?;
        }
        end.checked_add(self.clock).ok()
    }
}

/// The first instant at which the clock of a zone shows this time or a later one.
fn first_time_the_clock_shows(wall: DateTime, zone: &TimeZone) -> Option<Timestamp> {
    let about = TimeZone::UTC.to_timestamp(wall).ok()?;
    let mut from = about.checked_sub(SignedDuration::from_hours(48)).unwrap_or(Timestamp::MIN);
    for change in zone.following(from).map(|change| change.timestamp()).chain([Timestamp::MAX]) {
        // The offset does not change from here to there.
        let shown = zone.to_offset(from).to_timestamp(wall).ok()?;
        if shown < change {
            return Some(shown.max(from));
        }
        from = change;
    }
    None
}

/// The period that an instant lies in: hours by their number since 1970, the others by the calendar's two words for them.
pub(super) fn period_of(period: Period, instant: Timestamp, date: Date) -> (i64, i64) {
    let (year, month) = (i64::from(date.year()), i64::from(date.month()));
    match period {
        Period::Hour => {
            let (second, nanosecond) = (instant.as_second(), instant.subsec_nanosecond());
            // Rounded down, also before 1970.
            ((second - i64::from(nanosecond < 0)).div_euclid(3600), 0)
        }
        Period::Day => (year, i64::from(date.day_of_year())),
        Period::Week => {
            let week = date.iso_week_date();
            (week.year().into(), week.week().into())
        }
        Period::Month => (year, month),
        Period::Year => (year, 0),
    }
}
