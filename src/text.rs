//! Text from outside made safe to show, and text for people.
//!
//! Names of snapshots, instances and files, and every message of the API, come from outside and may contain
//! control characters, terminal escapes or text that turns the reading direction. [`printable`] makes them
//! safe for a terminal, a log line and an error message; JSON and HTML have escapes of their own on top.

use std::borrow::Cow;
use std::error::Error;
use std::fmt::Write as _;

use indicatif::BinaryBytes;
use jiff::{Timestamp, Unit};

/// A text of a configuration that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{fact}: {help}")]
pub struct InvalidText {
    /// The error alone.
    pub fact: String,
    /// How to correct it.
    pub help: String,
}

impl InvalidText {
    pub(crate) fn new(fact: impl Into<String>, help: impl Into<String>) -> Self {
        Self { fact: fact.into(), help: help.into() }
    }
}

/// `text` with everything that could move a cursor, break a line, or hide or reorder text written as `\u{…}`.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.chars().any(is_treacherous) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if is_treacherous(character) {
            // Writing to a String cannot fail.
            let _ = write!(safe, "{}", character.escape_unicode());
        } else {
            safe.push(character);
        }
    }
    Cow::Owned(safe)
}

/// A span of minutes: `3d 4h`, `4h 5m` or `5m`.
pub fn span_of_minutes(minutes: i64) -> String {
    let (days, hours, minutes) = (minutes / 1440, minutes / 60 % 24, minutes % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes}m"),
        (0, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// What is wrong with a JSON text. The parser may quote the text, of whatever length.
pub(crate) fn json_error(error: &serde_json::Error) -> String {
    excerpt(&error.to_string(), 200)
}

/// Like [`printable`], and cut to at most `max` characters; a cut is shown by `…`.
pub fn excerpt(text: &str, max: usize) -> String {
    let mut characters = text.chars();
    let head: String = characters.by_ref().take(max).collect();
    let mut safe = printable(&head).into_owned();
    if characters.next().is_some() {
        safe.push('…');
    }
    safe
}

/// Control characters; line and paragraph separators; zero-width and direction marks; Unicode tags.
fn is_treacherous(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{ad}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

/// JSON that is safe to show: what [`printable`] escapes is written as `\\uXXXX`, which reads back as
/// the same text. (JSON itself asks this only of the first 32 characters.)
pub fn safe_json(json: &str) -> Cow<'_, str> {
    let harmful = |character: char| character != '\n' && is_treacherous(character);
    if !json.chars().any(harmful) {
        return Cow::Borrowed(json);
    }
    let mut safe = String::with_capacity(json.len() + 16);
    for character in json.chars() {
        if harmful(character) {
            for unit in character.encode_utf16(&mut [0; 2]) {
                let _ = write!(safe, "\\u{unit:04x}");
            }
        } else {
            safe.push(character);
        }
    }
    Cow::Owned(safe)
}

/// An error with its whole chain of causes, each once, joined by `: `.
///
/// `Display` of this crate's errors does not repeat the source, so the chain reads as one sentence.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

/// A number of bytes for people: `1.50 GiB`.
pub fn size(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

/// `1 snapshot`, `2 snapshots`.
pub fn counted(count: usize, noun: &str) -> String {
    match noun.strip_suffix('y') {
        _ if count == 1 => format!("1 {noun}"),
        // Nouns that end in a vowel and `y` are not counted anywhere.
        Some(stem) => format!("{count} {stem}ies"),
        None => format!("{count} {noun}s"),
    }
}

/// A time for people, without fractions of a second.
pub fn to_the_second(at: Timestamp) -> Timestamp {
    at.round(Unit::Second).unwrap_or(at)
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Prints that a test skipped something, without the capture of test output, so that it is noticed.
#[cfg(test)]
pub(crate) fn skipped(why: std::fmt::Arguments<'_>) {
    let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("SKIPPED: {why}\n"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_spelled_as_people_do() {
        let table = [(1, "policy", "1 policy"), (2, "policy", "2 policies"), (0, "run", "0 runs")];
        for (count, noun, expected) in table {
            assert_eq!(counted(count, noun), expected);
        }
    }

    #[test]
    fn plain_text_is_left_alone() {
        assert!(matches!(printable("web-1 café 日本"), Cow::Borrowed(_)));
    }

    #[test]
    fn terminal_escapes_newlines_and_direction_marks_are_spelled_out() {
        assert_eq!(printable("a\u{1b}[31mb\nc\u{202e}d"), "a\\u{1b}[31mb\\u{a}c\\u{202e}d");
    }

    #[test]
    fn safe_json_reads_back_as_the_same_text() {
        let name = "a\u{9b}31m\u{202e}b\u{e0041}\n\"é";
        let json = serde_json::to_string(&[name]).unwrap();
        let safe = safe_json(&json);
        assert!(!safe.chars().any(is_treacherous), "{safe}");
        assert_eq!(serde_json::from_str::<[String; 1]>(&safe).unwrap(), [name]);
    }

    #[test]
    fn an_excerpt_says_that_it_was_cut() {
        assert_eq!(excerpt("abcdef", 3), "abc…");
        assert_eq!(excerpt("abc", 3), "abc");
    }
}
