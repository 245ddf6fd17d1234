//! Names of templates made from snapshots: `{instance}-{created:%Y%m%d}`.
//!
//! A **pattern** is text with placeholders; `{{` and `}}` stand for braces. Names of instances may be
//! hostile text, so a template's name is made printable; the API takes at most [`NAME_MAX`] characters.

use std::str::FromStr;

use jiff::Timestamp;
use jiff::fmt::strtime;
use jiff::tz::TimeZone;

use crate::policy::name::PolicyName;
use crate::snapshot::{SnapshotId, ZoneName};
use crate::text::{InvalidText, excerpt, printable};

/// The most characters of a template's name (Exoscale's API: 1 to 255).
pub const NAME_MAX: usize = 255;

/// How `{created}` alone writes the time: compact, and sorted as text it is sorted by time.
const CREATED_FORMAT: &str = "%Y%m%dT%H%M%S";

/// A valid pattern for a template's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateName {
    text: String,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Literal(String),
    Instance,
    Zone,
    Policy,
    Snapshot,
    Created(String),
}

/// The values of a pattern's placeholders.
#[derive(Debug, Clone, Copy)]
pub struct TemplateNameValues<'a> {
    /// The instance's name; hostile text.
    pub instance: &'a str,
    /// The snapshot's zone.
    pub zone: &'a ZoneName,
    /// The policy that promotes it.
    pub policy: &'a PolicyName,
    /// The snapshot's id.
    pub snapshot: SnapshotId,
    /// When the snapshot was taken.
    pub created: Timestamp,
    /// The policy's time zone, for `created`.
    pub time_zone: &'a TimeZone,
}

impl FromStr for TemplateName {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let example = "write something like `{instance}-{created:%Y%m%d}`";
        if text.is_empty() {
            return Err(InvalidText::new("it is empty", example));
        }
        if text.chars().count() > NAME_MAX {
            return Err(InvalidText::new(format!("it has more than {NAME_MAX} characters"), example));
        }
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            let (before, from) = rest.split_at(at);
            literal.push_str(before);
            if let Some(behind) = from.strip_prefix("{{") {
                literal.push('{');
                rest = behind;
            } else if let Some(behind) = from.strip_prefix("}}") {
                literal.push('}');
                rest = behind;
            } else if let Some(inside) = from.strip_prefix('{') {
                let (placeholder, behind) = inside.split_once('}').ok_or_else(|| {
                    InvalidText::new(
                        "a `{` is not closed",
                        "close it by `}`, or write `{{` for a brace itself",
                    )
                })?;
                if !literal.is_empty() {
                    parts.push(Part::Literal(std::mem::take(&mut literal)));
                }
                parts.push(Part::read(placeholder)?);
                rest = behind;
            } else {
                return Err(InvalidText::new(
                    "a `}` has no `{` before it",
                    "open it by `{`, or write `}}` for a brace itself",
                ));
            }
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Literal(literal));
        }
        Ok(Self { text: text.to_owned(), parts })
    }
}

impl Part {
    fn read(placeholder: &str) -> Result<Self, InvalidText> {
        match placeholder {
            "instance" => Ok(Self::Instance),
            "zone" => Ok(Self::Zone),
            "policy" => Ok(Self::Policy),
            "snapshot" => Ok(Self::Snapshot),
            "created" => Ok(Self::Created(CREATED_FORMAT.to_owned())),
            other => {
                let format = other.strip_prefix("created:").ok_or_else(|| {
                    InvalidText::new(
                        format!("the placeholder `{{{}}}` is not known", excerpt(other, 30)),
                        "the placeholders are `{instance}`, `{zone}`, `{policy}`, `{snapshot}` (its id), `{created}` \
                         and `{created:%Y%m%d}`",
                    )
                })?;
                let bad = |reason: &str| {
                    InvalidText::new(
                        format!("`{}` is not a time format: {reason}", excerpt(format, 40)),
                        "use strftime's letters, such as `%Y%m%d` or `%H%M`",
                    )
                };
                if format.is_empty() {
                    return Err(bad("it is empty"));
                }
                // The sample has all that any snapshot's time has: what works for it works for all.
                write_time(format, Timestamp::UNIX_EPOCH, &TimeZone::UTC)
                    .map_err(|error| bad(&excerpt(&error.to_string(), 120)))?;
                Ok(Self::Created(format.to_owned()))
            }
        }
    }
}

impl TemplateName {
    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The name of one template: printable, 1 to [`NAME_MAX`] characters.
    pub fn render(&self, values: &TemplateNameValues<'_>) -> String {
        let mut name = String::new();
        for part in &self.parts {
            match part {
                Part::Literal(text) => name.push_str(text),
                Part::Instance => name.push_str(values.instance),
                Part::Zone => name.push_str(values.zone.as_str()),
                Part::Policy => name.push_str(values.policy.as_str()),
                Part::Snapshot => name.push_str(&values.snapshot.to_string()),
                Part::Created(format) => name.push_str(
                    &write_time(format, values.created, values.time_zone)
                        .unwrap_or_else(|_| values.created.to_string()),
                ),
            }
        }
        let name: String = printable(&name).chars().take(NAME_MAX).collect();
        // The API wants a name even where an instance has none.
        if name.trim().is_empty() { values.snapshot.to_string() } else { name }
    }
}

fn write_time(format: &str, time: Timestamp, zone: &TimeZone) -> Result<String, jiff::Error> {
    strtime::format(format, &time.to_zoned_datetime(zone.clone()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn render(pattern: &str, instance: &str) -> String {
        pattern.parse::<TemplateName>().unwrap().render(&TemplateNameValues {
            instance,
            zone: &"ch-gva-2".parse().unwrap(),
            policy: &"nightly".parse().unwrap(),
            snapshot: "0b6cd8ea-2f9c-4d6e-8a4c-d3c1a6a7f3b1".parse().unwrap(),
            created: "2026-10-31T23:30:05Z".parse().unwrap(),
            time_zone: &TimeZone::get("Europe/Zurich").unwrap(),
        })
    }

    #[test]
    fn placeholders_are_filled_in_the_policys_zone() {
        for (pattern, expected) in [
            ("{instance}-{created:%Y%m%d}", "web-1-20261101"),
            ("{zone}/{policy}: {created}", "ch-gva-2/nightly: 20261101T003005"),
            ("{snapshot}", "0b6cd8ea-2f9c-4d6e-8a4c-d3c1a6a7f3b1"),
            ("golden", "golden"),
            ("{{{instance}}} }}{{", "{web-1} }{"),
            ("{created:%H:%M %Z}", "00:30 CET"),
        ] {
            assert_eq!(render(pattern, "web-1"), expected);
        }
    }

    #[test]
    fn hostile_names_become_printable_and_fit() {
        assert_eq!(render("{instance}!", "a\u{1b}[2J\nb\u{202e}"), "a\\u{1b}[2J\\u{a}b\\u{202e}!");
        assert_eq!(render("{instance}-{zone}", &"é".repeat(300)), "é".repeat(255));
        assert_eq!(render("{instance}", " "), "0b6cd8ea-2f9c-4d6e-8a4c-d3c1a6a7f3b1");
    }

    #[test]
    fn a_bad_pattern_is_refused_with_the_way_out() {
        for (pattern, message) in [
            ("", "it is empty: write something like"),
            (&*"x".repeat(256), "it has more than 255 characters: "),
            ("{name}", "the placeholder `{name}` is not known: the placeholders are `{instance}`, `{zone}`"),
            ("{}", "the placeholder `{}` is not known: "),
            ("{instance", "a `{` is not closed: close it by `}`"),
            ("instance}", "a `}` has no `{` before it: open it by `{`"),
            ("{created:}", "`` is not a time format: it is empty: "),
            ("{created:%Y%!}", "`%Y%!` is not a time format: "),
            ("{created:%}", "`%` is not a time format: "),
        ] {
            let error = pattern.parse::<TemplateName>().unwrap_err().to_string();
            assert!(error.starts_with(message), "{pattern:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_renders_to_a_name_that_fits(
            pattern in prop_oneof![any::<String>(), r"(\{created:(%[-_0^#:]{0,2}[0-9]{0,3}[A-Za-z%]){1,3}\}|[a-z{}]){1,4}"],
            instance in any::<String>(),
        ) {
            if pattern.parse::<TemplateName>().is_ok() {
                let name = render(&pattern, &instance);
                prop_assert!((1..=NAME_MAX).contains(&name.chars().count()));
                prop_assert!(!name.chars().any(char::is_control));
            }
        }
    }
}
