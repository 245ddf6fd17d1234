//! Spans of time as people write them: `36h`, `14d`, `1y6mo`.
//!
//! A **span** belongs to the calendar: a day may have 23 or 25 hours, a month 28 to 31 days, and what it
//! reaches depends on where it is counted from and in which zone. A **duration** ([`parse_duration`]) is
//! absolute time, for timeouts and waits, where a day is 24 hours and a month is refused.

use std::fmt::{self, Display};
use std::str::FromStr;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use crate::text::excerpt;

/// The most years that a span may have: far beyond any rule, and far from the end of the calendar.
const YEARS_MAX: u64 = 1000;
/// The most months, as many as [`YEARS_MAX`].
const MONTHS_MAX: u64 = YEARS_MAX * 12;
/// The most weeks, about as many as [`YEARS_MAX`].
const WEEKS_MAX: u64 = YEARS_MAX * 53;
/// The most days, about as many as [`YEARS_MAX`].
const DAYS_MAX: u64 = YEARS_MAX * 366;
/// The most milliseconds, about as many as [`YEARS_MAX`].
const MILLISECONDS_MAX: u64 = DAYS_MAX * DAY;

const SECOND: u64 = 1000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
const WEEK: u64 = 7 * DAY;

/// A span; never empty. Days and longer are the calendar's, hours and shorter are absolute time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    years: u32,
    months: u32,
    weeks: u32,
    days: u32,
    milliseconds: u64,
}

/// A text that is no span, or no duration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SpanError {
    /// There is no text.
    Empty,
    /// A number stands alone.
    NoUnit(String),
    /// It does not begin with a number.
    NoNumber(String),
    /// Something follows a number that is no unit.
    UnknownUnit {
        /// The whole text.
        text: String,
        /// What stands in the unit's place.
        unit: String,
    },
    /// It amounts to nothing.
    Zero(String),
    /// It is longer than a thousand years, or, as a duration, than a hundred.
    TooLong(String),
    /// A month or a year where absolute time is wanted.
    NotAbsolute(String),
}

impl SpanError {
    /// What is wrong.
    pub fn fact(&self) -> String {
        match self {
            Self::Empty => "it is empty".to_owned(),
            Self::NoUnit(text) => format!("`{text}` has no unit"),
            Self::NoNumber(text) => format!("`{text}` does not begin with a number"),
            Self::UnknownUnit { text, unit } => format!("`{text}` has the unknown unit `{unit}`"),
            Self::Zero(text) => format!("`{text}` is no time at all"),
            Self::TooLong(text) => format!("`{text}` is too long"),
            Self::NotAbsolute(text) => format!("`{text}` has no fixed length"),
        }
    }

    /// The way out.
    pub fn help(&self) -> &'static str {
        match self {
            Self::Empty | Self::NoUnit(_) => "use a number with a unit, such as `30d` or `720h`",
            Self::NoNumber(_) => "use whole numbers, each with a unit, such as `30d` or `1y6mo`",
            Self::UnknownUnit { .. } => {
                "use whole numbers, each with one of the units `ms`, `s`, `m` (minutes), `h`, `d`, `w`, \
                 `mo` (months) and `y`, such as `30d` or `1y6mo`"
            }
            Self::Zero(_) => "use more than zero, or leave the key out",
            Self::TooLong(_) => "use something below a hundred years",
            Self::NotAbsolute(_) => "months and years differ in length: use days or less, such as `30d`",
        }
    }
}

impl Display for SpanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.fact(), self.help())
    }
}

impl std::error::Error for SpanError {}

impl FromStr for Span {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Self, SpanError> {
        let sums = Sums::read(text)?;
        let bounded = |sum: u64, max: u64| {
            u32::try_from(sum).ok().filter(|_| sum <= max).ok_or_else(|| SpanError::TooLong(shown(text)))
        };
        let span = Self {
            years: bounded(sums.years, YEARS_MAX)?,
            months: bounded(sums.months, MONTHS_MAX)?,
            weeks: bounded(sums.weeks, WEEKS_MAX)?,
            days: bounded(sums.days, DAYS_MAX)?,
            milliseconds: sums.milliseconds,
        };
        if span.milliseconds > MILLISECONDS_MAX {
            return Err(SpanError::TooLong(shown(text)));
        }
        Ok(span)
    }
}

impl Span {
    /// The instant that lies so long before `now`: years and months first, clamped at a month's end, then
    /// weeks and days by the clock on the wall of `zone`, then hours and less by absolute time.
    ///
    /// What lies before the smallest timestamp is the smallest timestamp.
    pub fn before(&self, now: Timestamp, zone: &TimeZone) -> Timestamp {
        now.to_zoned_datetime(zone.clone())
            .checked_sub(self.calendar_part())
            .and_then(|then| then.timestamp().checked_sub(self.absolute_part()))
            .unwrap_or(Timestamp::MIN)
    }

    /// The instant that lies so long after `then`, counted as [`Span::before`] does; `None` beyond the
    /// largest timestamp.
    ///
    /// It is not always the inverse of [`Span::before`]: a month after 31 January is 28 February, and a
    /// month before 28 February is 28 January.
    pub fn after(&self, then: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        then.to_zoned_datetime(zone.clone())
            .checked_add(self.calendar_part())
            .and_then(|later| later.timestamp().checked_add(self.absolute_part()))
            .ok()
    }

    /// Within jiff's limits, since the parser's are narrower.
    fn calendar_part(&self) -> jiff::Span {
        jiff::Span::new()
            .try_years(self.years)
            .and_then(|span| span.try_months(self.months))
            .and_then(|span| span.try_weeks(self.weeks))
            .and_then(|span| span.try_days(self.days))
            .unwrap_or_default()
    }

    fn absolute_part(&self) -> SignedDuration {
        i64::try_from(self.milliseconds).map_or(SignedDuration::MAX, SignedDuration::from_millis)
    }
}

/// The canonical form: the largest unit first, hours the largest of absolute time.
impl Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |f: &mut fmt::Formatter<'_>, count: u64, unit: &str| {
            if count == 0 { Ok(()) } else { write!(f, "{count}{unit}") }
        };
        part(f, self.years.into(), "y")?;
        part(f, self.months.into(), "mo")?;
        part(f, self.weeks.into(), "w")?;
        part(f, self.days.into(), "d")?;
        part(f, self.milliseconds / HOUR, "h")?;
        part(f, self.milliseconds % HOUR / MINUTE, "m")?;
        part(f, self.milliseconds % MINUTE / SECOND, "s")?;
        part(f, self.milliseconds % SECOND, "ms")
    }
}

/// Reads absolute time, in the same words as a span: a day is 24 hours, a week 7 such days.
///
/// # Errors
/// As for a span; months and years are refused, and what is longer than 36,525 days (a hundred years), so
/// that no sum of a time and a duration can overflow.
pub fn parse_duration(text: &str) -> Result<Duration, SpanError> {
    let sums = Sums::read(text)?;
    if sums.years > 0 || sums.months > 0 {
        return Err(SpanError::NotAbsolute(shown(text)));
    }
    let weeks = sums.weeks.checked_mul(WEEK);
    let days = sums.days.checked_mul(DAY);
    weeks
        .zip(days)
        .and_then(|(weeks, days)| weeks.checked_add(days)?.checked_add(sums.milliseconds))
        .filter(|sum| *sum <= 36_525 * DAY)
        .map(Duration::from_millis)
        .ok_or_else(|| SpanError::TooLong(shown(text)))
}

/// What the parts of a text add up to; never all zero.
#[derive(Default)]
struct Sums {
    years: u64,
    months: u64,
    weeks: u64,
    days: u64,
    milliseconds: u64,
}

impl Sums {
    fn read(text: &str) -> Result<Self, SpanError> {
        if text.is_empty() {
            return Err(SpanError::Empty);
        }
        let mut sums = Self::default();
        let mut rest = text;
        while !rest.is_empty() {
            let (digits, behind) = split_where(rest, |character| !character.is_ascii_digit());
            let (unit, next) = split_where(behind, |character| character.is_ascii_digit());
            rest = next;
            if digits.is_empty() {
                return Err(SpanError::NoNumber(shown(text)));
            }
            let (sum, factor) = match unit {
                "y" => (&mut sums.years, 1),
                "mo" => (&mut sums.months, 1),
                "w" => (&mut sums.weeks, 1),
                "d" => (&mut sums.days, 1),
                "h" => (&mut sums.milliseconds, HOUR),
                "m" => (&mut sums.milliseconds, MINUTE),
                "s" => (&mut sums.milliseconds, SECOND),
                "ms" => (&mut sums.milliseconds, 1),
                "" => return Err(SpanError::NoUnit(shown(text))),
                _ => return Err(SpanError::UnknownUnit { text: shown(text), unit: excerpt(unit, 12) }),
            };
            *sum = digits
                .parse::<u64>()
                .ok()
                .and_then(|count| count.checked_mul(factor)?.checked_add(*sum))
                .ok_or_else(|| SpanError::TooLong(shown(text)))?;
        }
        if sums.years | sums.months | sums.weeks | sums.days | sums.milliseconds == 0 {
            return Err(SpanError::Zero(shown(text)));
        }
        Ok(sums)
    }
}

fn split_where(text: &str, begins_next: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(begins_next).unwrap_or(text.len()))
}

fn shown(text: &str) -> String {
    excerpt(text, 40)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn span(text: &str) -> Span {
        text.parse().unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn zone(name: &str) -> TimeZone {
        TimeZone::get(name).unwrap()
    }

    #[test]
    fn parts_add_up_in_any_order() {
        assert_eq!(span("1y6mo"), span("6mo1y"));
        assert_eq!(span("1y1d1mo"), span("1d1mo1y"));
        assert_eq!(span("90s"), span("30s1m"));
        assert_eq!(span("1d1d"), span("2d"));
        assert_ne!(span("24h"), span("1d"), "a day may have 23 or 25 hours");
        assert_ne!(span("7d"), span("8d"));
    }

    #[test]
    fn display_is_canonical() {
        for (text, canonical) in [
            ("100ms", "100ms"),
            ("90s", "1m30s"),
            ("45m", "45m"),
            ("36h", "36h"),
            ("720h", "720h"),
            ("14d", "14d"),
            ("8w", "8w"),
            ("6mo", "6mo"),
            ("2y", "2y"),
            ("1d1mo1y", "1y1mo1d"),
            ("007d", "7d"),
            ("0y1h", "1h"),
        ] {
            assert_eq!(span(text).to_string(), canonical);
        }
    }

    #[test]
    fn an_error_names_the_text_and_the_way_out() {
        for (text, message) in [
            ("", "it is empty: use a number with a unit, such as `30d` or `720h`"),
            ("30", "`30` has no unit: use a number with a unit, such as `30d` or `720h`"),
            ("1d12", "`1d12` has no unit: use a number with a unit, such as `30d` or `720h`"),
            (
                "-5d",
                "`-5d` does not begin with a number: use whole numbers, each with a unit, such as `30d` or `1y6mo`",
            ),
            ("0d", "`0d` is no time at all: use more than zero, or leave the key out"),
            ("1001y", "`1001y` is too long: use something below a hundred years"),
            (
                "99999999999999999999d",
                "`99999999999999999999d` is too long: use something below a hundred years",
            ),
        ] {
            assert_eq!(text.parse::<Span>().unwrap_err().to_string(), message);
        }
        for unit in ["5min", "5M", "1.5h", "1d 2h", "5 d", "5µs", "5D"] {
            let error = unit.parse::<Span>().unwrap_err();
            assert!(matches!(error, SpanError::UnknownUnit { .. }), "{unit}: {error}");
        }
    }

    #[test]
    fn a_month_before_the_end_of_march_is_the_end_of_february() {
        let utc = TimeZone::UTC;
        let back = |text: &str, now: &str| span(text).before(at(now), &utc).to_string();
        assert_eq!(back("1mo", "2027-03-31T12:00:00Z"), "2027-02-28T12:00:00Z");
        assert_eq!(back("1mo", "2028-03-31T12:00:00Z"), "2028-02-29T12:00:00Z");
        assert_eq!(back("1y", "2028-02-29T12:00:00Z"), "2027-02-28T12:00:00Z");
        assert_eq!(back("1y1d1mo", "2027-03-31T12:00:00Z"), "2026-02-27T12:00:00Z");
        assert_eq!(back("400d", "2027-03-31T12:00:00Z"), "2026-02-24T12:00:00Z");
    }

    #[test]
    fn a_day_is_the_calendars_and_24_hours_are_not() {
        // In Zurich the clock skips an hour on 28 March 2027 and repeats one on 31 October.
        let zurich = zone("Europe/Zurich");
        let back = |text: &str, now: &str| span(text).before(at(now), &zurich).to_string();
        assert_eq!(back("1d", "2027-03-28T10:00:00Z"), "2027-03-27T11:00:00Z");
        assert_eq!(back("24h", "2027-03-28T10:00:00Z"), "2027-03-27T10:00:00Z");
        assert_eq!(back("1d", "2027-10-31T11:00:00Z"), "2027-10-30T10:00:00Z");
        assert_eq!(back("1w", "2027-10-31T11:00:00Z"), "2027-10-24T10:00:00Z");
        assert_eq!(
            span("1d").after(at("2027-03-27T11:00:00Z"), &zurich),
            Some(at("2027-03-28T10:00:00Z")),
            "and forward"
        );
    }

    #[test]
    fn beyond_the_calendar_it_saturates_backward_and_ends_forward() {
        let utc = TimeZone::UTC;
        assert_eq!(span("1000y").before(at("-009500-01-01T00:00:00Z"), &utc), Timestamp::MIN);
        assert_eq!(span("1h").before(Timestamp::MIN, &utc), Timestamp::MIN);
        assert_eq!(span("1000y").after(at("9500-01-01T00:00:00Z"), &utc), None);
        assert_eq!(span("1ms").after(Timestamp::MAX, &utc), None);
    }

    #[test]
    fn a_duration_is_absolute() {
        assert_eq!(parse_duration("1w1d").unwrap(), Duration::from_hours(192));
        assert_eq!(parse_duration("1m30s100ms").unwrap(), Duration::from_millis(90_100));
        assert_eq!(parse_duration("36525d").unwrap(), Duration::from_hours(24 * 36_525));
        assert_eq!(parse_duration("1mo"), Err(SpanError::NotAbsolute("1mo".to_owned())));
        assert_eq!(parse_duration("1h1y"), Err(SpanError::NotAbsolute("1h1y".to_owned())));
        assert_eq!(parse_duration("0s"), Err(SpanError::Zero("0s".to_owned())));
        for text in ["36525d1ms", "18446744073709551615w", "18446744073709551615ms1ms"] {
            assert_eq!(parse_duration(text), Err(SpanError::TooLong(text.to_owned())));
        }
    }

    proptest! {
        #[test]
        fn reading_never_panics(text in any::<String>(), near in "[0-9]{0,21}[a-z0-9]{0,8}[0-9ymowdhs]{0,6}") {
            for text in [text, near] {
                let _ = text.parse::<Span>().map_err(|error| error.to_string());
                let _ = parse_duration(&text);
            }
        }

        #[test]
        fn display_reads_back(y in 0..1000u32, mo in 0..12000u32, w in 0..53000u32, d in 0..366_000u32, ms in 1..u64::from(u32::MAX)) {
            let span = Span { years: y, months: mo, weeks: w, days: d, milliseconds: ms };
            prop_assert_eq!(span.to_string().parse::<Span>(), Ok(span));
        }

        #[test]
        fn before_lies_before_and_after_after(
            text in "[1-9][0-9]{0,3}(y|mo|w|d|h|m|s|ms)([1-9][0-9]?(mo|d|h))?",
            second in -9_000_000_000i64..9_000_000_000,
        ) {
            if let Ok(span) = text.parse::<Span>() {
                let now = Timestamp::from_second(second).unwrap();
                let zurich = zone("Europe/Zurich");
                // At a clock change half an hour may shift the wall clock by up to one.
                let hour = SignedDuration::from_hours(1);
                prop_assert!(span.before(now, &zurich) < now + hour);
                prop_assert!(span.after(now, &zurich).is_none_or(|later| later > now - hour));
                prop_assert!(span.before(now, &TimeZone::UTC) < now);
            }
        }
    }
}
