//! All errors of a configuration, each with its place, the line itself, and how to correct it.

use std::collections::HashSet;
use std::fmt::{self, Display, Write as _};
use std::ops::Range;

use crate::text::{counted, excerpt, printable};

/// The most diagnostics that are printed: more than a person reads at once.
const PRINTED_MAX: usize = 50;

/// The most characters of a line that are printed; a longer one is cut around the spot.
const LINE_MAX: usize = 100;

/// The texts of the files that make a configuration, one behind the other, so that a place in any of them is one number.
#[derive(Debug, Default)]
pub(super) struct Sources<'t>(Vec<Source<'t>>);

#[derive(Debug)]
struct Source<'t> {
    name: String,
    text: &'t str,
    /// Where it begins among all.
    start: usize,
}

impl<'t> Sources<'t> {
    pub(super) fn of_one(name: &str, text: &'t str) -> Self {
        let mut sources = Self::default();
        sources.add(name, text);
        sources
    }

    /// Adds a file, and returns where it begins among all.
    pub(super) fn add(&mut self, name: &str, text: &'t str) -> usize {
        // One more than its length, so that the end of a text is not the beginning of the next.
        let start = self.0.last().map_or(0, |last| last.start + last.text.len() + 1);
        self.0.push(Source { name: excerpt(name, 200), text, start });
        start
    }

    /// The names of the files.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|source| source.name.as_str())
    }

    /// The file at a place, and the place in its text.
    fn at(&self, place: usize) -> Option<(&Source<'t>, usize)> {
        let source = self.0.iter().rev().find(|source| source.start <= place)?;
        Some((source, place - source.start))
    }

    /// The file and the line of a place, such as `/etc/snapwarden/snapwarden.toml:7`.
    pub(super) fn line_of(&self, place: usize) -> String {
        self.at(place).map_or_else(String::new, |(source, offset)| {
            format!("{}:{}", source.name, locate(source.text, offset).0)
        })
    }
}

/// One error.
#[derive(Debug)]
pub(super) struct Diagnostic {
    /// Where in the texts; `None` if it is about something outside of it.
    pub(super) span: Option<Range<usize>>,
    /// A key's path; empty for errors of TOML syntax.
    pub(super) subject: String,
    pub(super) fact: String,
    /// How to correct it.
    pub(super) help: String,
    pub(super) kind: Kind,
}

/// How far a diagnostic can be trusted, and how much of its line may be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Not TOML.
    Syntax,
    /// Its value may be a secret, and is not shown.
    UnknownKey,
    Wrong,
    /// Not to be trusted if parts of the configuration can't be read: they may contain what seems to be missing.
    Missing,
    /// A whole file can't be read.
    Unreadable,
    /// Its line is not shown, since it may hold a secret.
    Secret,
}

impl Diagnostic {
    fn print(&self, sources: &Sources<'_>) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail, here and below.
        if let Some((span, (source, start))) =
            self.span.as_ref().and_then(|span| Some((span, sources.at(span.start)?)))
        {
            let (number, line, column) = locate(source.text, start);
            let _ = write!(text, "{}:{number}:{}: ", source.name, column + 1);
            self.print_head(&mut text);
            let gutter = number.to_string().len().max(4);
            if self.kind == Kind::Secret || may_hold_a_secret(line) {
                let _ = write!(text, "\n  {number:>gutter$} | (not shown: it may hold a secret)");
            } else {
                let spot = source.text.get(start..start + span.len()).unwrap_or_default();
                let (shown, before, marks) = mark(line, column, spot, self.kind == Kind::UnknownKey);
                let _ = write!(text, "\n  {number:>gutter$} | {shown}");
                let _ = write!(text, "\n  {:gutter$} | {:before$}{}", "", "", "^".repeat(marks));
            }
        } else {
            self.print_head(&mut text);
        }
        if !self.help.is_empty() {
            let _ = write!(text, "\n  {}", self.help);
        }
        text
    }

    fn print_head(&self, text: &mut String) {
        if !self.subject.is_empty() {
            let _ = write!(text, "{}: ", self.subject);
        }
        text.push_str(&self.fact);
    }
}

/// Whether a line may contain a secret, written where none belongs. Diagnostics end up in logs.
fn may_hold_a_secret(line: &str) -> bool {
    let line = line.to_ascii_lowercase().replace("password_enabled", "");
    let user_in_address = line.split_once(':').is_some_and(|(_, behind)| behind.contains('@'));
    let words = ["secret", "password", "token", "api_key"];
    user_in_address || words.iter().any(|word| line.contains(word))
}

/// A line as it can be printed, the spot's first column, and its width, both in characters. With `hide_behind`
/// the text behind the spot is left out.
fn mark(line: &str, column: usize, spot: &str, hide_behind: bool) -> (String, usize, usize) {
    let mut line: Vec<char> =
        line.chars().map(|character| if character == '\t' { ' ' } else { character }).collect();
    let key_length = spot.lines().next().unwrap_or_default().chars().count();
    let rest = line.get(column + key_length..).unwrap_or_default();
    let sign = if rest.contains(&'=') { '=' } else { ':' };
    // In YAML there may be blanks before the colon, and a key may be empty.
    let is_yaml = rest.iter().find(|character| !" \"'".contains(**character)) == Some(&':');
    let hidden = hide_behind && (sign == '=' || is_yaml);
    if hidden {
        line.truncate(column + key_length);
    }
    let spot_length = key_length.max(1);
    let from = if line.len() > LINE_MAX { column.saturating_sub(LINE_MAX / 3) } else { 0 };
    let until = line.len().min(from + LINE_MAX);
    let part = |range: Range<usize>| {
        let text: String = line.get(range).unwrap_or_default().iter().collect();
        printable(&text).into_owned()
    };
    let spot_from = column.clamp(from, until);
    let spot_until = (spot_from + spot_length).min(until);
    let head = if from > 0 { "…" } else { "" };
    let tail = match (until < line.len(), hidden) {
        (true, _) => "…",
        (false, true) if sign == ':' => ": …",
        (false, true) => " = …",
        (false, false) => "",
    };
    let (before, marked, behind) =
        (part(from..spot_from), part(spot_from..spot_until), part(spot_until..until));
    (
        format!("{head}{before}{marked}{behind}{tail}"),
        head.chars().count() + before.chars().count(),
        marked.chars().count().max(1),
    )
}

/// The line at an offset: its number from 1, its text without the line break, and the column from 0, in characters.
fn locate(text: &str, offset: usize) -> (usize, &str, usize) {
    // An unexpected end is reported at the end of the text: show the last line that has any.
    let before = text.get(..offset.min(text.trim_end().len())).unwrap_or_default();
    let start = before.rfind('\n').map_or(0, |at| at + 1);
    let column = before.get(start..).unwrap_or_default().chars().count();
    let line = text.get(start..).unwrap_or_default().lines().next().unwrap_or_default();
    (before.matches('\n').count() + 1, line, column)
}

/// All errors of a configuration, ready to be printed; at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostics {
    count: usize,
    printed: Vec<String>,
}

impl Diagnostics {
    /// All diagnostics in the order of the texts, or `None` if there are none; of several about one spot only the
    /// first. `unread` are the parts of the texts that the parser skipped or misread: diagnostics that may be
    /// due to them are left out.
    pub(super) fn of(
        mut diagnostics: Vec<Diagnostic>,
        sources: &Sources<'_>,
        unread: &[Range<usize>],
    ) -> Option<Self> {
        let is_whole =
            unread.is_empty() && !diagnostics.iter().any(|diagnostic| diagnostic.kind == Kind::Unreadable);
        let mut spots = HashSet::new();
        diagnostics.retain(|diagnostic| {
            // Several keys may be missing in one section, several files of one pattern; any other spot has one diagnostic.
            let is_one_of_several = matches!(diagnostic.kind, Kind::Missing | Kind::Unreadable);
            let fact = is_one_of_several.then(|| diagnostic.fact.clone());
            spots.insert((diagnostic.subject.clone(), diagnostic.span.clone(), fact))
        });
        diagnostics.retain(|diagnostic| {
            let in_unread = |span: &Range<usize>| {
                // The parts are sorted and do not overlap.
                let next = unread.partition_point(|part| part.end <= span.start);
                unread.get(next).is_some_and(|part| part.contains(&span.start))
            };
            match diagnostic.kind {
                Kind::Syntax | Kind::Unreadable | Kind::Secret => true,
                Kind::Missing => is_whole,
                Kind::UnknownKey | Kind::Wrong => !diagnostic.span.as_ref().is_some_and(in_unread),
            }
        });
        diagnostics.sort_by_key(|diagnostic| diagnostic.span.as_ref().map(|span| span.start));
        let printed = diagnostics.iter().take(PRINTED_MAX).map(|diagnostic| diagnostic.print(sources));
        (!diagnostics.is_empty()).then(|| Self { count: diagnostics.len(), printed: printed.collect() })
    }

    /// The number of errors, including those beyond the 50 that are printed.
    pub fn count(&self) -> usize {
        self.count
    }
}

impl Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.printed.join("\n\n"))?;
        match self.count - self.printed.len() {
            0 => Ok(()),
            more => write!(f, "\n\nand {}", counted(more, "more error")),
        }
    }
}

impl std::error::Error for Diagnostics {}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(text: &str, span: Range<usize>) -> String {
        let diagnostic = Diagnostic {
            span: Some(span),
            subject: "a".to_owned(),
            fact: "is wrong".to_owned(),
            help: "make it right".to_owned(),
            kind: Kind::Wrong,
        };
        Diagnostics::of(vec![diagnostic], &Sources::of_one("x.toml", text), &[]).unwrap().to_string()
    }

    #[test]
    fn the_spot_is_marked_in_characters_also_behind_tabs_and_escapes() {
        assert_eq!(
            printed("b = 1\r\né\t\u{1b} = [bad]\r\n", 14..19),
            "x.toml:2:7: a: is wrong\n     2 | é \\u{1b} = [bad]\n       |            ^^^^^\n  make it right"
        );
    }

    #[test]
    fn a_line_that_may_hold_a_secret_is_not_shown() {
        for line in ["api_secret = \"s3cr3t\"", "url = \"https://u:s3cr3t@host\"", "Password = \"s3cr3t\""] {
            let shown = printed(line, 0..3);
            assert!(!shown.contains("s3cr3t") && shown.contains("(not shown"), "{shown}");
        }
        assert!(printed("schedule = \"@daily\"", 11..19).contains("@daily"));
        assert!(printed("password_enabled = 1", 19..20).contains("enabled = 1"));
        assert_eq!(mark("{ hook = \"https://x\" }", 2, "hook", true).0, "{ hook = …");
    }

    #[test]
    fn a_long_line_is_cut_around_the_spot() {
        let text = format!("a = [{}BAD{}]", "x".repeat(500), "y".repeat(500));
        let shown = printed(&text, 505..508);
        let line = shown.lines().nth(1).unwrap();
        let marks = shown.lines().nth(2).unwrap();
        assert!(line.chars().count() < 120 && line.contains('…'), "{line}");
        let at = marks.chars().position(|c| c == '^').unwrap();
        assert_eq!(line.chars().skip(at).take(3).collect::<String>(), "BAD");
        assert!(marks.ends_with(" ^^^"));
    }

    #[test]
    fn a_spot_over_several_lines_is_marked_on_its_first() {
        assert!(printed("a = [\n1,\n]\n", 4..10).contains("1 | a = [\n       |     ^\n"));
    }

    #[test]
    fn a_spot_at_the_very_end_has_a_mark() {
        assert!(printed("a = \n", 5..5).contains("     1 | a = \n       |    ^"));
    }

    #[test]
    fn a_spot_has_one_diagnostic_and_the_list_is_bounded() {
        let diagnostics = (0..120).map(|index| Diagnostic {
            span: Some(index / 2..index / 2 + 1),
            subject: "a".to_owned(),
            fact: format!("wrong {index}"),
            help: String::new(),
            kind: Kind::Wrong,
        });
        let text = "x".repeat(100);
        let all = Diagnostics::of(diagnostics.collect(), &Sources::of_one("x.toml", &text), &[]).unwrap();
        assert_eq!(all.count(), 60);
        assert!(all.to_string().contains("wrong 0\n") && !all.to_string().contains("wrong 1\n"));
        assert!(all.to_string().ends_with("and 10 more errors"));
    }
}
