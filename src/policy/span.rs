//! Spans of time as people write them: `36h`, `14d`, `1y6mo`.
//!
//! A **span** belongs to the calendar: a day may have 23 or 25 hours, a month 28 to 31 days, and what it
//! reaches depends on where it is counted from and in which zone. A **duration** ([`parse_duration`]) is
//! absolute time, for timeouts and waits, where a day is 24 hours and a month is refused.

use std::fmt::{self, Display};
use std::str::FromStr;
use std::time::Duration;

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use crate::schedule::instant_on_wall_clock;
use crate::text::{InvalidText, excerpt};

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
    years: u64,
    months: u64,
    weeks: u64,
    days: u64,
    milliseconds: u64,
}

impl FromStr for Span {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let span = Self::unbounded(text)?;
        let is_bounded = span.years <= YEARS_MAX
            && span.months <= MONTHS_MAX
            && span.weeks <= WEEKS_MAX
            && span.days <= DAYS_MAX
            && span.milliseconds <= MILLISECONDS_MAX;
        if is_bounded { Ok(span) } else { Err(too_long(text)) }
    }
}

impl Span {
    /// Days of the calendar.
    pub(crate) const fn days(days: u64) -> Self {
        Self { years: 0, months: 0, weeks: 0, days, milliseconds: 0 }
    }

    /// Reads the span of a retention rule, where the unit `m` is an error: here it is minutes, but in other tools months,
    /// and a rule of six minutes deletes what one of six months keeps.
    pub(crate) fn of_rule(text: &str) -> Result<Self, InvalidText> {
        let span = text.parse()?;
        let (months, minutes) = (with_unit_for_m(text, "mo"), with_unit_for_m(text, "min"));
        if months == text {
            return Ok(span);
        }
        Err(InvalidText::new(
            format!("the unit `m` of `{}` could be months or minutes", shown(text)),
            format!("write `{}` for months, `{}` for minutes", shown(&months), shown(&minutes)),
        ))
    }

    /// The sums of a text's parts, however long they are; never all zero.
    fn unbounded(text: &str) -> Result<Self, InvalidText> {
        let invalid = |fact: String, help: &str| Err(InvalidText::new(fact, help));
        let shown = shown(text);
        let with_unit = "use a number with a unit, such as `30d` or `720h`";
        if text.is_empty() {
            return invalid("it is empty".to_owned(), with_unit);
        }
        let mut sums = Self { years: 0, months: 0, weeks: 0, days: 0, milliseconds: 0 };
        let mut rest = text;
        while !rest.is_empty() {
            let (digits, behind) = split_where(rest, |character| !character.is_ascii_digit());
            let (unit, next) = split_where(behind, |character| character.is_ascii_digit());
            rest = next;
            if digits.is_empty() {
                return invalid(
                    format!("`{shown}` does not begin with a number"),
                    "use whole numbers, each with a unit, such as `30d` or `1y6mo`",
                );
            }
            let (sum, factor) = match unit {
                "y" => (&mut sums.years, 1),
                "mo" => (&mut sums.months, 1),
                "w" => (&mut sums.weeks, 1),
                "d" => (&mut sums.days, 1),
                "h" => (&mut sums.milliseconds, HOUR),
                "m" | "min" => (&mut sums.milliseconds, MINUTE),
                "s" => (&mut sums.milliseconds, SECOND),
                "ms" => (&mut sums.milliseconds, 1),
                "" => return invalid(format!("`{shown}` has no unit"), with_unit),
                _ => {
                    return invalid(
                        format!("`{shown}` has the unknown unit `{}`", excerpt(unit, 12)),
                        "use whole numbers, each with one of the units `ms`, `s`, `min` (minutes), `h`, `d`, `w`, \
                         `mo` (months) and `y`, such as `30d` or `1y6mo`",
                    );
                }
            };
            *sum = digits
                .parse::<u64>()
                .ok()
                .and_then(|count| count.checked_mul(factor)?.checked_add(*sum))
                .ok_or_else(|| too_long(text))?;
        }
        if sums.years | sums.months | sums.weeks | sums.days | sums.milliseconds == 0 {
            return invalid(
                format!("`{shown}` is no time at all"),
                "use more than zero, or leave the key out",
            );
        }
        Ok(sums)
    }

    /// The instant at which this span after `then` ends: years and months first, then weeks and days on the wall clock
    /// of `zone`, then hours and less as absolute time. `None` if that is beyond the calendar.
    ///
    /// A day that the month lacks counts as the end of that month: a month after 31 January is 1 March, 00:00, not
    /// 28 February. So a later `then` never ends earlier, except in the hour that comes twice when clocks go back: both
    /// of its instants stand for one time on the wall clock.
    pub fn after(&self, then: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let has_calendar_part = self.years > 0 || self.months > 0 || self.weeks > 0 || self.days > 0;
        let end = if has_calendar_part {
            instant_on_wall_clock(self.on_wall_clock(zone.to_datetime(then))?, zone)?
        } else {
            then
        };
        end.checked_add(self.absolute_part()).ok()
    }

    /// The calendar's part of the span after a time on the wall clock.
    pub(crate) fn on_wall_clock(&self, then: DateTime) -> Option<DateTime> {
        let months = i64::try_from(12 * self.years + self.months).ok()?;
        let month = 12 * i64::from(then.year()) + i64::from(then.month()) - 1 + months;
        let (year, month) =
            (i16::try_from(month.div_euclid(12)).ok()?, i8::try_from(month.rem_euclid(12) + 1).ok()?);
        let first_of_month = Date::new(year, month, 1).ok()?;
        let time = match Date::new(year, month, then.day()) {
            Ok(date) => date.to_datetime(then.time()),
            Err(_) => first_of_month.last_of_month().tomorrow().ok()?.to_datetime(Time::midnight()),
        };
        let days = i64::try_from(7 * self.weeks + self.days).ok()?;
        time.checked_add(jiff::Span::new().try_days(days).ok()?).ok()
    }

    /// Hours and less.
    pub(crate) fn absolute_part(&self) -> SignedDuration {
        i64::try_from(self.milliseconds).map_or(SignedDuration::MAX, SignedDuration::from_millis)
    }
}

/// The canonical form: the largest unit first, hours the largest of absolute time, and no `m`, which a retention rule
/// does not take.
impl Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |f: &mut fmt::Formatter<'_>, count: u64, unit: &str| {
            if count == 0 { Ok(()) } else { write!(f, "{count}{unit}") }
        };
        part(f, self.years, "y")?;
        part(f, self.months, "mo")?;
        part(f, self.weeks, "w")?;
        part(f, self.days, "d")?;
        part(f, self.milliseconds / HOUR, "h")?;
        part(f, self.milliseconds % HOUR / MINUTE, "min")?;
        part(f, self.milliseconds % MINUTE / SECOND, "s")?;
        part(f, self.milliseconds % SECOND, "ms")
    }
}

/// Reads absolute time, in the same words as a span: a day is 24 hours, a week 7 such days.
///
/// # Errors
/// As for a span; months and years are refused, and what is longer than 36,525 days (a hundred years), so
/// that no sum of a time and a duration can overflow.
pub fn parse_duration(text: &str) -> Result<Duration, InvalidText> {
    let sums = Span::unbounded(text)?;
    if sums.years > 0 || sums.months > 0 {
        return Err(InvalidText::new(
            format!("`{}` has no fixed length", shown(text)),
            "months and years differ in length: use days or less, such as `30d`",
        ));
    }
    let weeks = sums.weeks.checked_mul(WEEK);
    let days = sums.days.checked_mul(DAY);
    weeks
        .zip(days)
        .and_then(|(weeks, days)| weeks.checked_add(days)?.checked_add(sums.milliseconds))
        .filter(|sum| *sum <= 36_525 * DAY)
        .map(Duration::from_millis)
        .ok_or_else(|| too_long(text))
}

fn split_where(text: &str, begins_next: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(begins_next).unwrap_or(text.len()))
}

/// A valid span's text with another unit where it has `m`.
fn with_unit_for_m(text: &str, unit: &str) -> String {
    let mut written = String::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (digits, behind) = split_where(rest, |character| !character.is_ascii_digit());
        let (old, next) = split_where(behind, |character| character.is_ascii_digit());
        written.extend([digits, if old == "m" { unit } else { old }]);
        rest = next;
    }
    written
}

fn too_long(text: &str) -> InvalidText {
    InvalidText::new(format!("`{}` is too long", shown(text)), "use something below a hundred years")
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
            ("90s", "1min30s"),
            ("45m", "45min"),
            ("45min", "45min"),
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
        for unit in ["5mins", "5M", "5mon", "1.5h", "1d 2h", "5 d", "5µs", "5D"] {
            let error = unit.parse::<Span>().unwrap_err();
            assert!(error.fact.contains("has the unknown unit"), "{unit}: {error}");
        }
    }

    #[test]
    fn a_rule_refuses_m_and_offers_what_was_meant() {
        for (text, help) in [
            ("6m", "write `6mo` for months, `6min` for minutes"),
            ("1y6m", "write `1y6mo` for months, `1y6min` for minutes"),
            ("6m1y", "write `6mo1y` for months, `6min1y` for minutes"),
            ("1mo2m3ms4m", "write `1mo2mo3ms4mo` for months, `1mo2min3ms4min` for minutes"),
        ] {
            let error = Span::of_rule(text).unwrap_err();
            assert_eq!(error.help, help, "{text}");
            assert!(error.fact.contains(&format!("`{text}`")), "{error}");
            assert!(text.parse::<Span>().is_ok(), "{text} elsewhere");
        }
        for text in ["6mo", "6min", "1y6mo", "90s", "100ms", "1mo2min3ms"] {
            assert_eq!(Span::of_rule(text), text.parse(), "{text}");
            let shown = span(text).to_string();
            assert_eq!(Span::of_rule(&shown).unwrap(), span(text), "{shown} can be written back");
        }
        assert_eq!(span("45min"), span("45m"));
        assert_eq!(parse_duration("45min"), parse_duration("45m"));
        assert_eq!(Span::of_rule("6x"), "6x".parse());
    }

    /// Where a span after a time ends.
    fn end(text: &str, then: &str, zone: &TimeZone) -> String {
        span(text).after(at(then), zone).map_or_else(|| "never".to_owned(), |end| end.to_string())
    }

    #[test]
    fn a_day_that_the_month_lacks_is_the_end_of_that_month() {
        for (text, then, expected) in [
            ("1mo", "2027-01-28T12:00:00Z", "2027-02-28T12:00:00Z"),
            ("1mo", "2027-01-29T00:00:00Z", "2027-03-01T00:00:00Z"),
            ("1mo", "2027-01-31T12:00:00Z", "2027-03-01T00:00:00Z"),
            ("1mo", "2027-02-28T12:00:00Z", "2027-03-28T12:00:00Z"),
            ("1mo", "2028-01-29T12:00:00Z", "2028-02-29T12:00:00Z"),
            ("1mo", "2027-12-31T12:00:00Z", "2028-01-31T12:00:00Z"),
            ("1y", "2028-02-29T12:00:00Z", "2029-03-01T00:00:00Z"),
            ("4y", "2028-02-29T12:00:00Z", "2032-02-29T12:00:00Z"),
            ("1y1mo", "2028-02-29T12:00:00Z", "2029-03-29T12:00:00Z"),
            ("1y6mo", "2026-08-31T12:00:00Z", "2028-03-01T00:00:00Z"),
            ("1mo1d", "2027-01-31T12:00:00Z", "2027-03-02T00:00:00Z"),
            ("1mo12h", "2027-01-31T12:00:00Z", "2027-03-01T12:00:00Z"),
            ("400d", "2026-02-24T12:00:00Z", "2027-03-31T12:00:00Z"),
        ] {
            assert_eq!(end(text, then, &TimeZone::UTC), expected, "{text} after {then}");
        }
        let zurich = zone("Europe/Zurich");
        assert_eq!(end("1mo", "2027-01-31T12:00:00Z", &zurich), "2027-02-28T23:00:00Z");
    }

    #[test]
    fn a_day_is_the_calendars_and_24_hours_are_not() {
        // In Zurich the clock skips an hour on 28 March 2027 and repeats one on 31 October.
        let zurich = zone("Europe/Zurich");
        assert_eq!(end("1d", "2027-03-27T11:00:00Z", &zurich), "2027-03-28T10:00:00Z");
        assert_eq!(end("24h", "2027-03-27T10:00:00Z", &zurich), "2027-03-28T10:00:00Z");
        assert_eq!(end("1d", "2027-10-30T10:00:00Z", &zurich), "2027-10-31T11:00:00Z");
        assert_eq!(end("1w", "2027-10-24T10:00:00Z", &zurich), "2027-10-31T11:00:00Z");
        // 02:30 is skipped: the first instant after the gap. It comes twice: the first of the two.
        assert_eq!(end("1d", "2027-03-27T01:30:00Z", &zurich), "2027-03-28T01:00:00Z");
        assert_eq!(end("1d", "2027-10-30T00:30:00Z", &zurich), "2027-10-31T00:30:00Z");
        // Hours alone never meet the wall clock: the second 02:30 stays itself.
        assert_eq!(end("24h", "2027-10-31T01:30:00Z", &zurich), "2027-11-01T01:30:00Z");
        // In Samoa 30 December 2011 did not exist.
        assert_eq!(end("1d", "2011-12-29T20:00:00Z", &zone("Pacific/Apia")), "2011-12-30T10:00:00Z");
    }

    #[test]
    fn beyond_the_calendar_it_never_ends() {
        let utc = TimeZone::UTC;
        assert_eq!(end("1000y", "9500-01-01T00:00:00Z", &utc), "never");
        assert_eq!(end("1000y", "9999-12-30T00:00:00Z", &zone("Pacific/Apia")), "never");
        assert_eq!(span("1ms").after(Timestamp::MAX, &utc), None);
        assert_eq!(span("1mo").after(Timestamp::MAX, &utc), None);
        assert!(span("1000y").after(Timestamp::MIN, &utc).is_some());
    }

    /// Every half hour of five years, with a leap day and both clock changes of each year: what begins later never ends
    /// earlier, but for the hour that comes twice.
    #[test]
    fn what_begins_later_never_ends_earlier() {
        let spans = ["1d", "1w", "1mo", "2mo", "1mo1d", "6mo", "1y", "1y6mo", "2y", "52w", "36h", "1mo12h"];
        for name in ["UTC", "Europe/Zurich", "America/New_York", "Australia/Lord_Howe"] {
            let zone = zone(name);
            for text in spans {
                let span = span(text);
                // The latest end so far, and the time on the wall clock that it belongs to.
                let mut latest = (Timestamp::MIN, DateTime::MIN);
                for half_hours in 0..5 * 366 * 48_i64 {
                    let then = at("2026-01-01T00:00:00Z") + SignedDuration::from_mins(30 * half_hours);
                    let (end, wall) = (span.after(then, &zone).unwrap(), zone.to_datetime(then));
                    assert!(
                        end >= latest.0 || wall < latest.1,
                        "{text} after {then} in {name} ends at {end}"
                    );
                    latest = latest.max((end, wall));
                }
            }
        }
    }

    #[test]
    fn a_duration_is_absolute() {
        assert_eq!(parse_duration("1w1d").unwrap(), Duration::from_hours(192));
        assert_eq!(parse_duration("1m30s100ms").unwrap(), Duration::from_millis(90_100));
        assert_eq!(parse_duration("36525d").unwrap(), Duration::from_hours(24 * 36_525));
        let fact = |text: &str| parse_duration(text).unwrap_err().fact;
        assert_eq!(fact("1mo"), "`1mo` has no fixed length");
        assert_eq!(fact("1h1y"), "`1h1y` has no fixed length");
        assert_eq!(fact("0s"), "`0s` is no time at all");
        for text in ["36525d1ms", "18446744073709551615w", "18446744073709551615ms1ms"] {
            assert_eq!(fact(text), format!("`{text}` is too long"));
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
        fn display_reads_back(y in 0..1000u64, mo in 0..12000u64, w in 0..53000u64, d in 0..366_000u64, ms in 1..u64::from(u32::MAX)) {
            let span = Span { years: y, months: mo, weeks: w, days: d, milliseconds: ms };
            prop_assert_eq!(span.to_string().parse::<Span>(), Ok(span));
        }

        #[test]
        fn it_ends_later_than_it_begins_and_later_for_what_begins_later_on_the_wall_clock(
            text in "[1-9][0-9]{0,3}(y|mo|w|d|h|m|s|ms)([1-9][0-9]?(mo|d|h))?",
            second in -9_000_000_000i64..9_000_000_000,
            more in 0..4_000_000i64,
            name in proptest::sample::select(vec!["UTC", "Europe/Zurich", "America/New_York", "Australia/Lord_Howe"]),
        ) {
            if let Ok(span) = text.parse::<Span>() {
                let zone = zone(name);
                let (then, later) = (Timestamp::from_second(second).unwrap(), Timestamp::from_second(second + more).unwrap());
                let end = |then: Timestamp| span.after(then, &zone).unwrap_or(Timestamp::MAX);
                // In the hour that comes twice, some minutes may end before they begin.
                prop_assert!(end(then) > then - SignedDuration::from_hours(1));
                if zone.to_datetime(then) <= zone.to_datetime(later) {
                    prop_assert!(end(then) <= end(later), "{} after {} and {}", span, then, later);
                }
            }
        }
    }
}
