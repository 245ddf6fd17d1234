//! When something is due: cron lines in a time zone.
//!
//! A line has five fields (minute, hour, day of month, month, day of week), or six with seconds first, or is
//! one of `@hourly`, `@daily`, `@weekly`, `@monthly`, `@yearly`. It means what it means to Debian's cron, where a
//! field is a **wildcard** if it begins with `*`, as `*` and `*/2` do. `L`, `W` and `#` work as in other crons.
//!
//! The days: if neither day field is a wildcard, either one is enough (`0 0 1 * FRI`: the 1st, and each Friday). If one
//! is, both must fit (`0 0 */2 * 1`: Mondays with an odd date); `+` before the day of the week asks for that as well.
//!
//! Clock changes: a line whose minutes or hours are a wildcard follows real time, so it fires in both of two hours with
//! one name and skips what the clock skips. Any other line names **fixed times**: one that the clock skips fires at the
//! first instant after the gap, and one that comes twice fires once, at the first of the two. The seconds don't matter
//! here: `*/20 30 2 * * *` names three fixed times.
//!
//! `croner` reads the line and searches the calendar; wildcards are recognized here, since `croner` takes only a lone
//! `*` for one, and a line of several hours (`30 1,2 * * *`) for one without fixed times.

use std::cmp::Ordering;
use std::str::FromStr;

use croner::errors::CronError;
use croner::parser::{CronParser, Seconds, Year};
use croner::{CivilDate, CivilDateTime, CivilTime, Cron, CronDateTime, Resolution, Weekday};
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{SignedDuration, Timestamp};

use crate::text::{InvalidText, excerpt};

/// A valid cron line that fires at some time.
#[derive(Debug, Clone)]
pub struct Schedule {
    text: String,
    cron: Cron,
    fixed_times: bool,
}

/// The words, and the lines that they stand for.
const WORDS: [(&str, &str); 5] = [
    ("@hourly", "0 * * * *"),
    ("@daily", "0 0 * * *"),
    ("@weekly", "0 0 * * 0"),
    ("@monthly", "0 0 1 * *"),
    ("@yearly", "0 0 1 1 *"),
];

const EXAMPLE: &str =
    "write minute, hour, day of month, month, day of week, such as `30 2 * * *` for 02:30 every day";

/// How many due times are searched for the longest gap: enough for each day of the week and for a clock change of most
/// schedules, and few enough for each reload.
const DUE_TIMES_COMPARED: usize = 128;

/// How far ahead they are searched for, in days: a leap year comes within it.
const DAYS_COMPARED: i64 = 5 * 366;

/// The six fields: name, allowed values, and the letters allowed beside digits.
const FIELDS: [(&str, &str, &str); 6] = [
    ("second", "0 to 59", ""),
    ("minute", "0 to 59", ""),
    ("hour", "0 to 23", ""),
    ("day of the month", "1 to 31", "LW?"),
    ("month", "1 to 12 or JAN to DEC", "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    (
        "day of the week",
        "0 (Sunday) to 7 or SUN to SAT",
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ#+?",
    ),
];

/// The indices, among the six, of the fields that decide about clock changes, and of the two day fields.
const MINUTE_AND_HOUR: [usize; 2] = [1, 2];
const DAYS: [usize; 2] = [3, 5];

impl FromStr for Schedule {
    type Err = InvalidText;

    /// Reads a cron line. The error says which field is wrong, or that the line can never fire.
    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let line = match WORDS.iter().find(|(word, _)| *word == text.trim()) {
            Some((_, line)) => *line,
            None if text.trim_start().starts_with('@') => {
                return Err(InvalidText::new(
                    format!("`{}` is not known", excerpt(text.trim(), 20)),
                    "the words are `@hourly`, `@daily`, `@weekly`, `@monthly` and `@yearly`",
                ));
            }
            None => text,
        };
        let mut fields: Vec<&str> = line.split_ascii_whitespace().collect();
        if fields.len() == 5 {
            fields.insert(0, "0");
        }
        if fields.len() != FIELDS.len() {
            let fact = match fields.len() {
                0 => "it is empty".to_owned(),
                1 => "one field is no cron line".to_owned(),
                count => format!("a cron line has five or six fields, not {count}"),
            };
            return Err(InvalidText::new(fact, EXAMPLE));
        }
        for (index, (field, (name, range, letters))) in fields.iter().zip(FIELDS).enumerate() {
            if !reads_alone(index, field, letters) {
                return Err(InvalidText::new(
                    format!("`{}` can't be the {name}", excerpt(field, 30)),
                    format!("use {range}, alone or as `*`, `*/2`, `1-5`, `1,3`"),
                ));
            }
        }
        let shown = excerpt(text.trim(), 60);
        let any_wildcard =
            |indices: [usize; 2]| indices.into_iter().filter_map(|index| fields.get(index)).any(is_wildcard);
        let cron = parser(any_wildcard(DAYS))
            .parse(&fields.join(" "))
            .map_err(|_| InvalidText::new(format!("`{shown}` can't be read as a cron line"), EXAMPLE))?;
        // The year 2000 begins a cycle of the calendar: a line that does not fire in the years that croner
        // searches from there never fires.
        if cron.find_next_occurrence(&Wall(DateTime::constant(2000, 1, 1, 0, 0, 0, 0)), true).is_err() {
            return Err(InvalidText::new(format!("`{shown}` never fires"), "name a day that exists"));
        }
        Ok(Self { text: text.trim().to_owned(), cron, fixed_times: !any_wildcard(MINUTE_AND_HOUR) })
    }
}

impl Schedule {
    /// The line as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The first instant after `after` at which it is due by the clocks of `zone`; `None` only at the end of
    /// the calendar.
    pub fn next_after(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        if self.fixed_times { self.next_fixed(after, zone) } else { self.next_real(after, zone) }
    }

    /// The last instant at which it is due in `(after, until]`; `None` if there is none.
    pub fn last_until(&self, until: Timestamp, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let due_by = |second: i64| {
            let from = Timestamp::from_second(second).ok()?;
            self.next_after(from, zone).filter(|next| *next <= until)
        };
        // Bisection: the result grows with its argument, and all times are whole seconds.
        let mut best = self.next_after(after, zone).filter(|next| *next <= until)?;
        let (mut fits, mut fits_not) = (best.as_second(), until.as_second());
        while fits < fits_not {
            let middle = fits + (fits_not - fits) / 2;
            match due_by(middle) {
                Some(next) => {
                    best = next;
                    fits = next.as_second();
                }
                None => fits_not = middle,
            }
        }
        Some(best)
    }

    /// The longest span between two successive due times, among the next 128 within five years after `from`, but of two at
    /// least; `None` only at the end of the calendar. A policy that did not run for longer than this is late.
    pub fn longest_gap(&self, from: Timestamp, zone: &TimeZone) -> Option<SignedDuration> {
        let mut last = self.next_after(from, zone)?;
        let end =
            from.saturating_add(SignedDuration::from_hours(24 * DAYS_COMPARED)).unwrap_or(Timestamp::MAX);
        let mut longest = None;
        for _ in 1..DUE_TIMES_COMPARED {
            let Some(next) = self.next_after(last, zone) else { break };
            longest = longest.max(Some(next.duration_since(last)));
            if next > end {
                break;
            }
            last = next;
        }
        longest
    }

    /// Searches along the wall clock; a time on it stands for one instant.
    fn next_fixed(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let mut wall = zone.to_datetime(after);
        loop {
            wall = self.next_on_wall(wall, false)?;
            let due = instant_on_wall_clock(wall, zone)?;
            // In the second of two hours with one name, the wall clock's times were all due already.
            if due > after {
                return Some(due);
            }
        }
    }

    /// Searches along real time, from one clock change to the next.
    fn next_real(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let (mut from, mut inclusive) = (after, false);
        loop {
            let wall = zone.to_datetime(from);
            let ahead = self.next_on_wall(wall, inclusive)?;
            let due = zone.to_offset(from).to_timestamp(ahead).ok();
            let change = zone.following(from).next().map(|transition| transition.timestamp());
            match (due, change) {
                (due, None) => return due,
                (Some(due), Some(change)) if due < change => return Some(due),
                (_, Some(change)) => (from, inclusive) = (change, true),
            }
        }
    }

    fn next_on_wall(&self, wall: DateTime, inclusive: bool) -> Option<DateTime> {
        self.cron.find_next_occurrence(&Wall(wall), inclusive).ok().map(|next| next.0)
    }
}

/// `both_days`: the day of the month and the day of the week must both fit.
fn parser(both_days: bool) -> CronParser {
    CronParser::builder().seconds(Seconds::Required).year(Year::Disallowed).dom_and_dow(both_days).build()
}

/// Whether a field begins with `*`, or with `?`, which is the same.
fn is_wildcard(field: &&str) -> bool {
    field.starts_with(['*', '?'])
}

/// Whether a field can be read with `*` in all others. The characters are looked at first: croner skips
/// empty parts of a list, and replaces names of months and days wherever they stand.
fn reads_alone(index: usize, field: &str, letters: &str) -> bool {
    let known = |character: char| {
        character.is_ascii_digit() || "*/,-".contains(character) || letters.contains(character)
    };
    let mut fields = ["*"; 6];
    if let Some(place) = fields.get_mut(index) {
        *place = field;
    }
    field.chars().all(known)
        && field.split(',').all(|part| !part.is_empty())
        && parser(false).parse(&fields.join(" ")).is_ok()
}

/// The one instant that a time on the wall clock stands for: the first of two where clocks go back, and the first after
/// the gap where they go forward.
pub(crate) fn instant_on_wall_clock(wall: DateTime, zone: &TimeZone) -> Option<Timestamp> {
    let ambiguous = zone.to_ambiguous_timestamp(wall);
    if let AmbiguousOffset::Gap { .. } = ambiguous.offset() {
        // Read by the offset after the gap, the time lies before the gap.
        let before = ambiguous.earlier().ok()?;
        return zone.following(before).next().map(|transition| transition.timestamp());
    }
    ambiguous.earlier().ok()
}

/// A time of the wall clock, without a zone, in croner's terms.
#[derive(Clone)]
struct Wall(DateTime);

impl CronDateTime for Wall {
    fn to_civil(&self) -> CivilDateTime {
        let part = |number: i8| u32::from(number.unsigned_abs());
        CivilDateTime::new(
            CivilDate::from_parts_unchecked(self.0.year().into(), part(self.0.month()), part(self.0.day())),
            CivilTime::from_parts_unchecked(
                part(self.0.hour()),
                part(self.0.minute()),
                part(self.0.second()),
            ),
        )
    }

    fn civil_weekday(&self) -> Weekday {
        Weekday::from_days_from_sunday(u32::from(self.0.weekday().to_sunday_zero_offset().unsigned_abs()))
    }

    fn resolve_civil(&self, civil: CivilDateTime) -> Result<Resolution<Self>, CronError> {
        let part = |number: u32| i8::try_from(number).map_err(|_| CronError::InvalidDate);
        let year = i16::try_from(civil.year()).map_err(|_| CronError::InvalidDate)?;
        DateTime::new(
            year,
            part(civil.month())?,
            part(civil.day())?,
            part(civil.hour())?,
            part(civil.minute())?,
            part(civil.second())?,
            0,
        )
        .map(|wall| Resolution::Single(Self(wall)))
        .map_err(|_| CronError::InvalidDate)
    }

    fn checked_add_seconds(&self, seconds: i64) -> Option<Self> {
        self.0.checked_add(SignedDuration::from_secs(seconds)).ok().map(Self)
    }

    fn cmp_instant(&self, other: &Self) -> Ordering {
        self.0.cmp(&other.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn zone(name: &str) -> TimeZone {
        TimeZone::get(name).unwrap()
    }

    /// What is due in `(from, until]`.
    fn due(line: &str, name: &str, from: &str, until: &str) -> Vec<String> {
        let (schedule, zone) = (Schedule::from_str(line).unwrap(), zone(name));
        let until = at(until);
        let mut all = Vec::new();
        let mut last = at(from);
        while let Some(next) = schedule.next_after(last, &zone).filter(|next| *next <= until) {
            assert!(next > last, "{line} in {name}: {next} after {last}");
            all.push(next.to_string());
            last = next;
        }
        all
    }

    #[test]
    fn the_longest_gap_is_between_due_times_and_knows_clock_changes_and_weekends() {
        let cases = [
            ("30 2 * * *", "UTC", "2026-11-01T00:00:00Z", 24 * 3600),
            // The night on which 02:30 comes twice is in reach.
            ("30 2 * * *", "Europe/Zurich", "2026-08-01T00:00:00Z", 25 * 3600),
            // From Friday to Monday.
            ("0 12 * * 1-5", "UTC", "2026-11-01T00:00:00Z", 72 * 3600),
            ("0 8,20 * * *", "UTC", "2026-11-01T09:00:00Z", 12 * 3600),
            ("*/20 * * * * *", "UTC", "2026-11-01T00:00:01Z", 20),
            ("@yearly", "UTC", "2026-11-01T00:00:00Z", 366 * 86400),
            // However far apart.
            ("0 0 29 2 *", "UTC", "2095-11-01T00:00:00Z", (8 * 365 + 1) * 86400),
        ];
        for (line, name, from, seconds) in cases {
            let gap = Schedule::from_str(line).unwrap().longest_gap(at(from), &zone(name));
            assert_eq!(gap, Some(SignedDuration::from_secs(seconds)), "{line} in {name}");
        }
    }

    #[test]
    fn point_12_and_13_half_past_two_fires_once_a_day_through_the_clock_changes_of_2027() {
        for (name, from, until, expected) in [
            // Skipped: 02:00 to 03:00 on 28 March. Twice: 02:00 to 03:00 on 31 October.
            (
                "Europe/Zurich",
                "2027-03-27T00:00:00Z",
                "2027-03-29T12:00:00Z",
                ["2027-03-27T01:30:00Z", "2027-03-28T01:00:00Z", "2027-03-29T00:30:00Z"],
            ),
            (
                "Europe/Zurich",
                "2027-10-30T00:00:00Z",
                "2027-11-01T12:00:00Z",
                ["2027-10-30T00:30:00Z", "2027-10-31T00:30:00Z", "2027-11-01T01:30:00Z"],
            ),
            // Skipped: 02:00 to 03:00 on 14 March. On 7 November the hour from 01:00 comes twice, not this one.
            (
                "America/New_York",
                "2027-03-13T00:00:00Z",
                "2027-03-15T12:00:00Z",
                ["2027-03-13T07:30:00Z", "2027-03-14T07:00:00Z", "2027-03-15T06:30:00Z"],
            ),
            (
                "America/New_York",
                "2027-11-06T00:00:00Z",
                "2027-11-08T12:00:00Z",
                ["2027-11-06T06:30:00Z", "2027-11-07T07:30:00Z", "2027-11-08T07:30:00Z"],
            ),
            // Half an hour each: skipped 02:00 to 02:30 on 3 October; twice 01:30 to 02:00 on 4 April.
            (
                "Australia/Lord_Howe",
                "2027-10-01T12:00:00Z",
                "2027-10-04T12:00:00Z",
                ["2027-10-01T16:00:00Z", "2027-10-02T15:30:00Z", "2027-10-03T15:30:00Z"],
            ),
            (
                "Australia/Lord_Howe",
                "2027-04-02T12:00:00Z",
                "2027-04-05T12:00:00Z",
                ["2027-04-02T15:30:00Z", "2027-04-03T16:00:00Z", "2027-04-04T16:00:00Z"],
            ),
        ] {
            assert_eq!(due("30 2 * * *", name, from, until), expected, "{name} from {from}");
        }
    }

    #[test]
    fn other_fixed_times_in_a_gap_or_twice_fire_once() {
        // Lord Howe: 02:15 does not exist on 3 October; 01:45 comes twice on 4 April.
        assert_eq!(
            due("15 2 * * *", "Australia/Lord_Howe", "2027-10-02T12:00:00Z", "2027-10-03T12:00:00Z"),
            ["2027-10-02T15:30:00Z"]
        );
        assert_eq!(
            due("45 1 * * *", "Australia/Lord_Howe", "2027-04-03T12:00:00Z", "2027-04-04T12:00:00Z"),
            ["2027-04-03T14:45:00Z"]
        );
        // Several hours, one of them skipped, one of them twice.
        assert_eq!(
            due("30 1,2,3 * * *", "Europe/Zurich", "2027-03-28T00:00:00Z", "2027-03-28T12:00:00Z"),
            ["2027-03-28T00:30:00Z", "2027-03-28T01:00:00Z", "2027-03-28T01:30:00Z"]
        );
        assert_eq!(
            due("30 1,2,3 * * *", "Europe/Zurich", "2027-10-30T23:00:00Z", "2027-10-31T12:00:00Z"),
            ["2027-10-30T23:30:00Z", "2027-10-31T00:30:00Z", "2027-10-31T02:30:00Z"]
        );
        // Two skipped times are due at one instant, once.
        assert_eq!(
            due("0,30 2 * * *", "Europe/Zurich", "2027-03-28T00:00:00Z", "2027-03-28T12:00:00Z"),
            ["2027-03-28T01:00:00Z"]
        );
        // Midnight is skipped in Beirut on 28 March 2027.
        assert_eq!(
            due("@daily", "Asia/Beirut", "2027-03-27T12:00:00Z", "2027-03-29T12:00:00Z"),
            ["2027-03-27T22:00:00Z", "2027-03-28T21:00:00Z"]
        );
    }

    #[test]
    fn every_hour_means_every_hour_that_there_is() {
        assert_eq!(
            due("@hourly", "Europe/Zurich", "2027-03-28T00:00:00Z", "2027-03-28T03:00:00Z"),
            ["2027-03-28T01:00:00Z", "2027-03-28T02:00:00Z", "2027-03-28T03:00:00Z"]
        );
        assert_eq!(
            due("30 * * * *", "Europe/Zurich", "2027-10-30T23:00:00Z", "2027-10-31T03:00:00Z"),
            ["2027-10-30T23:30:00Z", "2027-10-31T00:30:00Z", "2027-10-31T01:30:00Z", "2027-10-31T02:30:00Z"]
        );
        assert_eq!(
            due("15 * * * *", "Australia/Lord_Howe", "2027-10-02T15:00:00Z", "2027-10-02T17:30:00Z"),
            ["2027-10-02T16:15:00Z", "2027-10-02T17:15:00Z"],
            "02:15 does not exist there"
        );
    }

    #[test]
    fn after_means_after() {
        let daily = Schedule::from_str("30 2 * * *").unwrap();
        let next = |after: &str| daily.next_after(at(after), &TimeZone::UTC).unwrap().to_string();
        assert_eq!(next("2027-01-01T02:29:59.999Z"), "2027-01-01T02:30:00Z");
        assert_eq!(next("2027-01-01T02:30:00Z"), "2027-01-02T02:30:00Z");
        assert_eq!(next("2027-01-01T02:30:00.5Z"), "2027-01-02T02:30:00Z");
        assert_eq!(next("1927-01-01T02:30:00Z"), "1927-01-02T02:30:00Z");
        // From within the second of the two hours.
        let zurich = zone("Europe/Zurich");
        assert_eq!(daily.next_after(at("2027-10-31T01:10:00Z"), &zurich), Some(at("2027-11-01T01:30:00Z")));
        assert_eq!(daily.next_after(Timestamp::MAX, &zurich), None);
    }

    #[test]
    fn seconds_come_first_and_either_day_is_enough() {
        assert_eq!(
            due("*/20 0 0 * * *", "UTC", "2027-01-01T00:00:00Z", "2027-01-01T01:00:00Z"),
            ["2027-01-01T00:00:20Z", "2027-01-01T00:00:40Z"]
        );
        // Friday the 1st; the Fridays after it; the 1st of February.
        assert_eq!(
            due("0 0 1 * FRI", "UTC", "2026-12-31T23:00:00Z", "2027-02-01T12:00:00Z"),
            [1, 8, 15, 22, 29]
                .map(|day| format!("2027-01-{day:02}T00:00:00Z"))
                .into_iter()
                .chain(["2027-02-01T00:00:00Z".to_owned()])
                .collect::<Vec<_>>()
        );
        assert_eq!(
            due("0 0 29 2 *", "UTC", "2027-01-01T00:00:00Z", "2033-01-01T00:00:00Z"),
            ["2028-02-29T00:00:00Z", "2032-02-29T00:00:00Z"]
        );
        assert_eq!(
            due("0 0 * * 7", "UTC", "2027-01-01T00:00:00Z", "2027-01-04T00:00:00Z"),
            ["2027-01-03T00:00:00Z"]
        );
    }

    #[test]
    fn a_day_field_that_begins_with_a_star_is_joined_with_the_other_by_and() {
        // Mondays with an odd date.
        for line in ["0 0 */2 * 1", "0 0 */2 * MON", "0 0 ?/2 * 1", "0 0 0 */2 * 1", "0 0 */2 * +1"] {
            assert_eq!(
                due(line, "UTC", "2027-01-01T12:00:00Z", "2027-01-31T12:00:00Z"),
                ["2027-01-11T00:00:00Z", "2027-01-25T00:00:00Z"],
                "{line}"
            );
        }
        // Wednesdays with an odd date.
        assert_eq!(
            due("37 2 */2 * 3", "UTC", "2027-01-01T00:00:00Z", "2027-01-31T00:00:00Z"),
            ["2027-01-13T02:37:00Z", "2027-01-27T02:37:00Z"]
        );
        // The 1st, if it is a Sunday, a Tuesday, a Thursday or a Saturday.
        assert_eq!(
            due("0 0 1 * */2", "UTC", "2026-12-31T12:00:00Z", "2027-07-31T12:00:00Z"),
            ["2027-04-01T00:00:00Z", "2027-05-01T00:00:00Z", "2027-06-01T00:00:00Z", "2027-07-01T00:00:00Z"]
        );
    }

    #[test]
    fn minutes_or_hours_that_begin_with_a_star_follow_real_time() {
        // 02:00 comes twice on 31 October, from 00:00 and from 01:00 UTC.
        let (from, until) = ("2027-10-30T23:30:00Z", "2027-10-31T02:30:00Z");
        let half_hours = [
            "2027-10-31T00:00:00Z",
            "2027-10-31T00:30:00Z",
            "2027-10-31T01:00:00Z",
            "2027-10-31T01:30:00Z",
            "2027-10-31T02:00:00Z",
            "2027-10-31T02:30:00Z",
        ];
        for line in ["*/30 */1 * * *", "0,30 */1 * * *", "*/30 * * * *", "0 */30 */1 * * *"] {
            assert_eq!(due(line, "Europe/Zurich", from, until), half_hours, "{line}");
        }
        assert_eq!(due("*/30 2 * * *", "Europe/Zurich", from, until), half_hours[..4]);
        assert_eq!(due("0-59/30 2 * * *", "Europe/Zurich", from, until), half_hours[..2]);
        assert_eq!(
            due("*/30 0 2 * * *", "Europe/Zurich", from, until),
            ["2027-10-31T00:00:00Z", "2027-10-31T00:00:30Z"]
        );
        // 02:00 to 03:00 is skipped on 28 March.
        let gap = |line| due(line, "Europe/Zurich", "2027-03-28T00:30:00Z", "2027-03-28T01:30:00Z");
        assert_eq!(gap("*/30 */1 * * *"), ["2027-03-28T01:00:00Z", "2027-03-28T01:30:00Z"]);
        assert_eq!(gap("*/30 2 * * *"), [""; 0]);
        assert_eq!(gap("*/30 0 2 * * *"), ["2027-03-28T01:00:00Z"]);
    }

    #[test]
    fn a_bad_line_is_refused_with_the_field_to_blame() {
        for (line, message) in [
            ("", "it is empty: write minute, hour"),
            ("30", "one field is no cron line: "),
            ("30 2 * *", "a cron line has five or six fields, not 4: "),
            ("0 30 2 * * * 2027", "a cron line has five or six fields, not 7: "),
            ("61 2 * * *", "`61` can't be the minute: use 0 to 59, alone or as `*`"),
            ("30 24 * * *", "`24` can't be the hour: use 0 to 23"),
            ("30 2 0 * *", "`0` can't be the day of the month: "),
            ("30 2 * 13 *", "`13` can't be the month: use 1 to 12 or JAN to DEC"),
            ("30 2 * * 8", "`8` can't be the day of the week: "),
            ("30 2 * * MONDAY", "`MONDAY` can't be the day of the week: "),
            ("JAN 2 * * *", "`JAN` can't be the minute: "),
            ("1,,2 2 * * *", "`1,,2` can't be the minute: "),
            ("*/0 2 * * *", "`*/0` can't be the minute: "),
            ("5-1 2 * * *", "`5-1` can't be the minute: "),
            ("-5 2 * * *", "`-5` can't be the minute: "),
            ("30 2 * ſEP *", "`ſEP` can't be the month: "),
            ("@reboot", "`@reboot` is not known: the words are `@hourly`"),
            ("0 0 30 2 *", "`0 0 30 2 *` never fires: name a day that exists"),
            ("0 0 31 4,6,9,11 *", "`0 0 31 4,6,9,11 *` never fires"),
        ] {
            let error = Schedule::from_str(line).unwrap_err().to_string();
            assert!(error.starts_with(message), "{line:?}: {error}");
        }
    }

    #[test]
    fn the_line_is_shown_as_it_was_written() {
        assert_eq!(Schedule::from_str(" @daily ").unwrap().as_str(), "@daily");
        assert_eq!(Schedule::from_str("30  2 * * mon-fri").unwrap().as_str(), "30  2 * * mon-fri");
    }

    /// A line as Debian's cron has it, read anew and tried at each second: what the search must come to.
    struct Oracle {
        fields: Vec<(bool, Vec<i8>)>,
    }

    impl Oracle {
        fn new(line: &str) -> Self {
            let mut texts: Vec<&str> = line.split(' ').collect();
            if texts.len() == 5 {
                texts.insert(0, "0");
            }
            let ranges = [(0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 7)];
            let fields =
                texts.iter().zip(ranges).map(|(text, range)| (text.starts_with('*'), values(text, range)));
            Self { fields: fields.collect() }
        }

        fn fits(&self, wall: DateTime) -> bool {
            let weekday = wall.weekday().to_sunday_zero_offset();
            let now = [wall.second(), wall.minute(), wall.hour(), wall.day(), wall.month(), weekday];
            let has = |index: usize| {
                let (_, values) = &self.fields[index];
                values.contains(&now[index]) || (index == 5 && now[5] == 0 && values.contains(&7))
            };
            let days = if self.fields[3].0 || self.fields[5].0 { has(3) && has(5) } else { has(3) || has(5) };
            has(0) && has(1) && has(2) && has(4) && days
        }

        /// What is due in `(from, until]`, a second at a time. The clock that cron looks at never turns back: a fixed time
        /// that it showed before is not due again, and those that it jumped over are due at once.
        fn due(&self, from: Timestamp, until: Timestamp, zone: &TimeZone) -> Vec<Timestamp> {
            let is_wildcard = self.fields[1].0 || self.fields[2].0;
            let second = SignedDuration::from_secs(1);
            // Begins early enough to know whether an hour comes for the second time.
            let mut now = from - SignedDuration::from_hours(3);
            let mut latest = zone.to_datetime(now);
            let mut due = Vec::new();
            while now < until {
                now += second;
                let wall = zone.to_datetime(now);
                let is_due = if is_wildcard {
                    self.fits(wall)
                } else {
                    let mut any = false;
                    while latest < wall {
                        latest = latest.checked_add(second).unwrap();
                        any |= self.fits(latest);
                    }
                    any
                };
                if is_due && now > from {
                    due.push(now);
                }
            }
            due
        }
    }

    fn values(text: &str, (least, most): (i8, i8)) -> Vec<i8> {
        let part = |part: &str| {
            let (range, step) = part.split_once('/').unwrap_or((part, "1"));
            let (from, until) = match range.split_once('-') {
                _ if range == "*" => (least, most),
                Some((from, until)) => (from.parse().unwrap(), until.parse().unwrap()),
                None => (range.parse().unwrap(), range.parse().unwrap()),
            };
            (from..=until).step_by(step.parse().unwrap()).collect::<Vec<i8>>()
        };
        text.split(',').flat_map(part).collect()
    }

    /// A field: a wildcard, one with a step, a value, a range, a list.
    fn field(least: i8, most: i8) -> impl Strategy<Value = String> {
        let value = least..=most;
        prop_oneof![
            2 => Just("*".to_owned()),
            2 => (1..=most).prop_map(|step| format!("*/{step}")),
            2 => value.clone().prop_map(|value| value.to_string()),
            1 => (value.clone(), value.clone(), 1..4i8).prop_map(|(one, other, step)| {
                format!("{}-{}/{step}", one.min(other), one.max(other))
            }),
            1 => (value.clone(), value).prop_map(|(one, other)| format!("{one},{other}")),
        ]
    }

    fn zone_name() -> impl Strategy<Value = &'static str> {
        prop::sample::select(vec![
            "UTC",
            "Europe/Zurich",
            "America/New_York",
            "Australia/Lord_Howe",
            "Asia/Beirut",
        ])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn around_a_clock_change_it_is_due_when_debians_cron_would_run_it(
            second in prop_oneof![4 => Just(String::new()), 1 => field(0, 59).prop_map(|field| field + " ")],
            minute in field(0, 59), hour in prop_oneof![1 => field(0, 23), 2 => field(0, 4)],
            name in zone_name(), skipped in 0..4usize, before in 0..9000i64,
        ) {
            let line = format!("{second}{minute} {hour} * * *");
            let zone = zone(name);
            let change = zone.following(at("2026-12-01T00:00:00Z")).nth(skipped).map(|change| change.timestamp());
            let from = change.unwrap_or(at("2027-03-28T01:00:00Z")) - SignedDuration::from_secs(before);
            // Few enough of a line of every second.
            let hours = if second.is_empty() { 5 } else { 3 };
            let until = from + SignedDuration::from_hours(hours);
            let expected: Vec<String> = Oracle::new(&line).due(from, until, &zone).iter().map(ToString::to_string).collect();
            prop_assert_eq!(due(&line, name, &from.to_string(), &until.to_string()), expected, "{} in {}", line, name);
        }

        #[test]
        fn it_is_due_on_the_days_on_which_debians_cron_would_run_it(
            day in field(1, 31), month in field(1, 12), weekday in field(0, 7), start in 0..2000i64,
        ) {
            let line = format!("0 12 {day} {month} {weekday}");
            let noon = at("2026-11-03T12:00:00Z") + SignedDuration::from_hours(24 * start);
            let oracle = Oracle::new(&line);
            let expected: Vec<String> = (1..800)
                .map(|day| noon + SignedDuration::from_hours(24 * day))
                .filter(|noon| oracle.fits(TimeZone::UTC.to_datetime(*noon)))
                .map(|noon| noon.to_string())
                .collect();
            let until = noon + SignedDuration::from_hours(24 * 799);
            match Schedule::from_str(&line) {
                Ok(_) => prop_assert_eq!(due(&line, "UTC", &noon.to_string(), &until.to_string()), expected, "{}", line),
                Err(error) => prop_assert!(expected.is_empty(), "{}: {}", line, error),
            }
        }
    }

    proptest! {
        #[test]
        fn reading_never_panics(
            text in any::<String>(),
            near in r"(([*0-9LW#?+,/-]|[A-Z]{3}){1,5} ){4,6}[*0-9]",
        ) {
            let _ = Schedule::from_str(&text);
            let _ = Schedule::from_str(&near);
        }

        #[test]
        fn what_is_next_lies_ahead_and_nothing_lies_between(
            minute in 0..60u8, hour in 0..24u8, second in 1_790_000_000i64..1_890_000_000,
            name in prop::sample::select(vec!["UTC", "Europe/Zurich", "America/New_York", "Australia/Lord_Howe"]),
        ) {
            let zone = zone(name);
            let after = Timestamp::from_second(second).unwrap();
            let fixed = Schedule::from_str(&format!("{minute} {hour} * * *")).unwrap();
            let next = fixed.next_after(after, &zone).unwrap();
            let ahead = next.duration_since(after);
            prop_assert!(ahead > SignedDuration::ZERO && ahead <= SignedDuration::from_hours(25));
            prop_assert_eq!(fixed.next_after(next - SignedDuration::from_secs(1), &zone), Some(next));
            // Every day exactly once.
            let later = fixed.next_after(next, &zone).unwrap();
            let day = |instant| zone.to_datetime(instant).date();
            prop_assert_eq!(day(later), day(next).tomorrow().unwrap());
        }
    }
}
