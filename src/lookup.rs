//! Finds the snapshot or the instance that a user names: by its id, by how the id begins, or by its name.
//!
//! Names come from outside and are not unique. So a whole id always means that id, whatever else is named so, and a text
//! that means several is an error that lists them.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Write as _};

use jiff::Timestamp;
use uuid::Uuid;

use crate::snapshot::ZoneName;
use crate::text::printable;

/// The fewest characters of an id that are taken for it: as many as tables show.
const PREFIX_MIN: usize = 8;

/// The most matches that an error lists.
const LISTED_MAX: usize = 20;

/// What is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A snapshot.
    Snapshot,
    /// An instance.
    Instance,
}

impl Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Snapshot => "snapshot",
            Self::Instance => "instance",
        })
    }
}

/// A snapshot or an instance that is known. Several may be about the same one, as by a listing and by an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Its id.
    pub id: Uuid,
    /// Its name, if it is known; hostile text.
    pub name: Option<String>,
    /// Its zone, if it is known.
    pub zone: Option<ZoneName>,
    /// When the snapshot was taken; of an instance, when its newest known snapshot was.
    pub taken_at: Option<Timestamp>,
}

/// Why a text names nothing, or nothing alone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// Nothing that is known.
    #[error(
        "no {kind} is known with the name `{}`, or with an id that is or begins so{}",
        printable(.text),
        if is_short_prefix(.text) { " (give at least 8 characters of an id)" } else { "" }
    )]
    Unknown {
        /// What was looked for.
        kind: Kind,
        /// What the user gave.
        text: String,
    },
    /// Several.
    #[error("{}", several(*.kind, .text, .matches))]
    Several {
        /// What was looked for.
        kind: Kind,
        /// What the user gave.
        text: String,
        /// Each once, by id.
        matches: Vec<Known>,
    },
}

/// A whole id.
pub fn whole_id(text: &str) -> Option<Uuid> {
    Uuid::parse_str(text).ok()
}

/// Whether the text may mean the one with this id and this name.
pub fn is_meant(text: &str, id: Uuid, name: Option<&str>) -> bool {
    match whole_id(text) {
        Some(whole) => whole == id,
        None => is_name(text, name) || is_prefix(text, id),
    }
}

fn is_name(text: &str, name: Option<&str>) -> bool {
    !text.is_empty() && name == Some(text)
}

fn is_prefix(text: &str, id: Uuid) -> bool {
    digits(text)
        .is_some_and(|digits| digits.len() >= PREFIX_MIN && id.as_simple().to_string().starts_with(&digits))
}

/// The digits of what may be a part of an id, without its hyphens.
fn digits(text: &str) -> Option<String> {
    let digits = text.replace('-', "").to_ascii_lowercase();
    digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then_some(digits)
}

fn is_short_prefix(text: &str) -> bool {
    digits(text).is_some_and(|digits| (1..PREFIX_MIN).contains(&digits.len()))
}

/// The id that the text means. A whole id is taken as it is, also if it is not known.
///
/// # Errors
/// [`LookupError`] if the text means none, or several.
pub fn find(kind: Kind, text: &str, known: impl IntoIterator<Item = Known>) -> Result<Uuid, LookupError> {
    if let Some(id) = whole_id(text) {
        return Ok(id);
    }
    let mut matches: BTreeMap<Uuid, Known> = BTreeMap::new();
    for one in known.into_iter().filter(|one| is_meant(text, one.id, one.name.as_deref())) {
        let found = matches.entry(one.id).or_insert_with(|| one.clone());
        // By the name that was given, if it ever had that.
        if is_name(text, one.name.as_deref()) || found.name.is_none() {
            found.name = one.name;
        }
        found.zone = found.zone.take().or(one.zone);
        found.taken_at = found.taken_at.max(one.taken_at);
    }
    let text = text.to_owned();
    match matches.len() {
        0 => Err(LookupError::Unknown { kind, text }),
        1 => Ok(matches.into_keys().next().unwrap_or_default()),
        _ => Err(LookupError::Several { kind, text, matches: matches.into_values().collect() }),
    }
}

fn several(kind: Kind, text: &str, matches: &[Known]) -> String {
    let count = matches.len();
    let named = matches.iter().filter(|one| is_name(text, one.name.as_deref())).count();
    let what = match named {
        0 => format!("is how the ids of {count} {kind}s begin"),
        named if named == count => format!("is the name of {count} {kind}s"),
        _ => format!("is the name of one {kind} and how the id of another begins"),
    };
    let mut message = format!("`{}` {what}: give the whole id of the one that is meant", printable(text));
    for one in matches.iter().take(LISTED_MAX) {
        // Writing to a String cannot fail.
        let _ = write!(message, "\n  {}", one.id);
        if let Some(name) = one.name.as_deref().filter(|name| *name != text) {
            let _ = write!(message, " ({})", printable(name));
        }
        if let Some(zone) = &one.zone {
            let _ = write!(message, " in zone {zone}");
        }
        let taken = match kind {
            Kind::Snapshot => "taken",
            Kind::Instance => "newest snapshot of",
        };
        if let Some(at) = one.taken_at {
            let _ = write!(message, ", {taken} {at}");
        }
    }
    if count > LISTED_MAX {
        let _ = write!(message, "\n  and {} more", count - LISTED_MAX);
    }
    message
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ONE: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";
    const TWO: &str = "9ee8cb98-ea6e-4d57-0000-000000000000";
    const THREE: &str = "1b1c9d9e-0b43-4b23-9b2f-6f7f4b2a9a01";

    fn known(id: &str, name: &str) -> Known {
        let id = Uuid::parse_str(id).unwrap();
        let zone = Some("ch-gva-2".parse().unwrap());
        Known { id, name: Some(name.to_owned()), zone, taken_at: Some(Timestamp::UNIX_EPOCH) }
    }

    fn all() -> Vec<Known> {
        vec![known(ONE, "db-1_3"), known(TWO, "db-1_4"), known(THREE, "db-1_3")]
    }

    fn of(text: &str) -> Result<String, String> {
        let found = find(Kind::Snapshot, text, all());
        found.map(|id| id.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn an_id_the_beginning_of_one_and_a_name_mean_the_one_that_has_it() {
        let upper = ONE.to_uppercase();
        for (text, id) in [
            (ONE, ONE),
            (&upper, ONE),
            ("1b1c9d9e", THREE),
            ("1B1C9D9E-0b", THREE),
            ("1b1c9d9e0b43", THREE),
            ("9ee8cb98-ea6e-4d57-b", ONE),
            ("db-1_4", TWO),
            ("00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000001"),
        ] {
            assert_eq!(of(text).as_deref(), Ok(id), "{text}");
        }
    }

    #[test]
    fn several_are_listed_with_all_that_tells_them_apart() {
        let expected = "`db-1_3` is the name of 2 snapshots: give the whole id of the one that is meant\n  \
                        1b1c9d9e-0b43-4b23-9b2f-6f7f4b2a9a01 in zone ch-gva-2, taken 1970-01-01T00:00:00Z\n  \
                        9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec in zone ch-gva-2, taken 1970-01-01T00:00:00Z";
        assert_eq!(of("db-1_3").unwrap_err(), expected);
        let by_prefix = of("9ee8cb98").unwrap_err();
        assert!(by_prefix.starts_with("`9ee8cb98` is how the ids of 2 snapshots begin"), "{by_prefix}");
        assert!(by_prefix.contains("(db-1_3)") && by_prefix.contains("(db-1_4)"), "{by_prefix}");
        let many = (0..50).map(|number| known(&Uuid::from_u128(number).to_string(), "db"));
        let error = find(Kind::Instance, "db", many).unwrap_err().to_string();
        assert!(error.contains("50 instances") && error.ends_with("and 30 more"), "{error}");
    }

    #[test]
    fn what_names_nothing_is_refused() {
        for text in ["", "db", "1b1c9d9", "1b1c9d9e-0b43-4b24", "-", "--------"] {
            let error = of(text).unwrap_err();
            assert!(error.starts_with("no snapshot is known"), "{text}: {error}");
            assert_eq!(error.contains("at least 8"), ["db", "1b1c9d9"].contains(&text), "{text}: {error}");
        }
    }

    /// A name is another's choice: it must never pass for the id of something else.
    #[test]
    fn a_name_that_looks_like_an_id_does_not_take_its_place() {
        let evil = || [known(ONE, "good"), known(THREE, ONE), known(TWO, "1b1c9d9e")];
        assert_eq!(find(Kind::Snapshot, ONE, evil()).unwrap().to_string(), ONE);
        let error = find(Kind::Snapshot, "1b1c9d9e", evil()).unwrap_err().to_string();
        assert!(error.contains("the name of one snapshot and how the id of another begins"), "{error}");
        assert!(!is_meant(ONE, Uuid::parse_str(THREE).unwrap(), Some(ONE)));
    }

    #[test]
    fn one_that_several_places_know_is_one() {
        let mut twice = all();
        twice.push(Known { name: None, zone: None, taken_at: None, ..known(TWO, "") });
        twice.push(known(TWO, "before it was renamed"));
        for text in ["db-1_4", "before it was renamed"] {
            assert_eq!(find(Kind::Instance, text, twice.clone()).unwrap().to_string(), TWO);
        }
    }

    proptest! {
        #[test]
        fn no_text_finds_what_it_does_not_name(text in "[0-9a-f-]{0,36}|.{0,12}") {
            if let Ok(id) = find(Kind::Snapshot, &text, all()) {
                let known = all().into_iter().find(|one| one.id == id);
                let is_name = known.is_some_and(|one| one.name.as_deref() == Some(&*text));
                let simple = id.as_simple().to_string();
                prop_assert!(is_name || simple.starts_with(&text.to_lowercase().replace('-', "")) || whole_id(&text).is_some());
            }
        }
    }
}
