//! Times on the command line, as people write them.

use std::str::FromStr;

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, ToSpan as _};

use crate::cli::exit::Refusal;
use crate::text::excerpt;

/// A point in time; some forms depend on the current one. Without an offset, a time is in UTC.
#[derive(Debug, Clone)]
pub struct When(Form);

#[derive(Debug, Clone)]
enum Form {
    Now,
    Yesterday,
    At(Timestamp),
    /// A span that is not said to be in the past or in the future.
    Span(Span),
    Ago(Span),
    In(Span),
}

/// The text is no time.
#[derive(Debug, thiserror::Error)]
#[error(
    "`{}` is no time: give one such as 2027-01-31T02:30:00Z, a date (midnight UTC), `now`, `yesterday`, or a span such \
     as 36h, 30d or `2 days ago`",
    excerpt(.0, 60)
)]
pub struct NoTime(String);

impl FromStr for When {
    type Err = NoTime;

    fn from_str(text: &str) -> Result<Self, NoTime> {
        let text = text.trim();
        let form = match text {
            "now" => Some(Form::Now),
            "yesterday" => Some(Form::Yesterday),
            _ => instant(text).map(Form::At).or_else(|| relative(text)),
        };
        form.map(Self).ok_or_else(|| NoTime(text.to_owned()))
    }
}

/// RFC 3339, or a date or time in UTC.
fn instant(text: &str) -> Option<Timestamp> {
    // An offset or a time zone must not be ignored.
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit() || b"-:T .".contains(&byte));
    let in_utc = || {
        let time = text.parse::<DateTime>().ok().filter(|_| is_plain && text.matches('-').count() == 2)?;
        TimeZone::UTC.to_timestamp(time).ok()
    };
    text.parse::<Timestamp>().ok().or_else(in_utc)
}

/// A span, perhaps with `ago` or `in`.
fn relative(text: &str) -> Option<Form> {
    let (text, form): (&str, fn(Span) -> Form) = match (text.strip_suffix(" ago"), text.strip_prefix("in ")) {
        (Some(text), None) => (text, Form::Ago),
        (None, Some(text)) => (text, Form::In),
        (None, None) => (text, Form::Span),
        (Some(_), Some(_)) => return None,
    };
    // Signs, ISO 8601 and a second `ago` are left out: they would only be surprising here.
    let is_friendly = text.starts_with(|first: char| first.is_ascii_digit());
    text.parse::<Span>().ok().filter(|span| is_friendly && !span.is_negative()).map(form)
}

impl When {
    /// The time; a span is counted back from now.
    ///
    /// # Errors
    /// [`Refusal`] if the calendar does not have it.
    pub fn back_from(&self, now: Timestamp) -> Result<Timestamp, Refusal> {
        self.resolve(now, false)
    }

    /// The time; a span is counted from now on.
    ///
    /// # Errors
    /// [`Refusal`] if the calendar does not have it.
    pub fn ahead_of(&self, now: Timestamp) -> Result<Timestamp, Refusal> {
        self.resolve(now, true)
    }

    fn resolve(&self, now: Timestamp, spans_are_ahead: bool) -> Result<Timestamp, Refusal> {
        let utc = TimeZone::UTC.to_datetime(now);
        let then = match &self.0 {
            Form::Now => return Ok(now),
            Form::At(at) => return Ok(*at),
            Form::Yesterday => utc.date().checked_sub(1.day()).map(DateTime::from),
            Form::In(span) => utc.checked_add(*span),
            Form::Span(span) if spans_are_ahead => utc.checked_add(*span),
            Form::Ago(span) | Form::Span(span) => utc.checked_sub(*span),
        };
        then.and_then(|then| TimeZone::UTC.to_timestamp(then))
            .map_err(|_| Refusal::usage("a time is beyond the end of the calendar: give a shorter span"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn back(text: &str) -> String {
        let when = text.parse::<When>().unwrap_or_else(|error| panic!("{error}"));
        when.back_from("2027-03-31T12:30:00Z".parse().unwrap()).unwrap().to_string()
    }

    #[test]
    fn times_are_read_as_people_write_them() {
        for (text, at) in [
            ("2027-01-31T02:30:00Z", "2027-01-31T02:30:00Z"),
            ("2027-01-31T02:30:00.5+01:00", "2027-01-31T01:30:00.5Z"),
            ("2027-01-31 02:30-04", "2027-01-31T06:30:00Z"),
            ("2027-01-31", "2027-01-31T00:00:00Z"),
            ("2027-01-31 02:30", "2027-01-31T02:30:00Z"),
            ("2027-01-31T02:30:10", "2027-01-31T02:30:10Z"),
            ("now", "2027-03-31T12:30:00Z"),
            ("yesterday", "2027-03-30T00:00:00Z"),
            ("30d", "2027-03-01T12:30:00Z"),
            ("36h", "2027-03-30T00:30:00Z"),
            ("1mo", "2027-02-28T12:30:00Z"),
            ("90min", "2027-03-31T11:00:00Z"),
            ("2 days ago", "2027-03-29T12:30:00Z"),
            ("2 days", "2027-03-29T12:30:00Z"),
            ("1 week ago", "2027-03-24T12:30:00Z"),
            ("1 hour 30 minutes ago", "2027-03-31T11:00:00Z"),
            ("1y6mo", "2025-09-30T12:30:00Z"),
            ("in 2 days", "2027-04-02T12:30:00Z"),
        ] {
            assert_eq!(back(text), at, "{text}");
        }
        let ahead = "30d".parse::<When>().unwrap().ahead_of("2027-03-31T12:30:00Z".parse().unwrap());
        assert_eq!(ahead.unwrap().to_string(), "2027-04-30T12:30:00Z");
    }

    #[test]
    fn what_is_no_time_is_refused_with_the_forms_that_are() {
        for text in [
            "",
            "ago",
            "tuesday",
            "30",
            "-2d",
            "P2D",
            "in 2 days ago",
            "2027-02-30",
            "2027-01",
            "20270131",
            "10:00",
            "2027-01-31T02:30[Europe/Zurich]",
        ] {
            let error = text.parse::<When>().unwrap_err().to_string();
            assert!(error.contains("2 days ago") && error.contains("midnight UTC"), "{text}: {error}");
        }
        assert!("9999y".parse::<When>().unwrap().back_from(Timestamp::UNIX_EPOCH).is_ok());
        assert!("9999y".parse::<When>().unwrap().ahead_of(Timestamp::UNIX_EPOCH).is_err());
    }
}
