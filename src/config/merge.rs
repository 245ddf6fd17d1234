//! Makes one configuration of the tables of several files.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeArray, DeString, DeTable, DeValue};

use crate::config::diagnostics::{Diagnostic, Kind, Sources};
use crate::config::toml_reader::{OpenFile, shown_key};

/// The sections whose entries have names: they may stand in several files, each entry in one of them.
const NAMED: [&str; 3] = ["policies", "archives", "notify"];

/// Adds the table of a file that begins at `start` among all to those of the files before it. What is there already is
/// reported, and left out.
pub(super) fn add<'t>(
    root: &mut DeTable<'t>,
    table: DeTable<'t>,
    start: usize,
    sources: &Sources<'_>,
    open: &OpenFile,
) {
    if start == 0 {
        *root = table;
        return;
    }
    let twice = |place: Range<usize>, subject: String, first: usize, help: &str| {
        let fact = format!("this is also at {}", sources.line_of(first));
        let (span, help) = (Some(place), help.to_owned());
        open.report(Diagnostic { span, subject, fact, help, kind: Kind::Wrong });
    };
    for (key, value) in moved_table(table, start) {
        let name = shown_key(key.get_ref());
        if name == "include" {
            open.report(Diagnostic {
                span: Some(key.span()),
                subject: name,
                fact: "an included file can't include others".to_owned(),
                help: "name its files in `include` of the main file".to_owned(),
                kind: Kind::Wrong,
            });
            continue;
        }
        let Some((first, _)) = root.get_key_value(&**key.get_ref()) else {
            root.insert(key, value);
            continue;
        };
        let (first, place) = (first.span().start, key.span());
        let known = root.get_mut(&**key.get_ref()).map(Spanned::get_mut);
        match (known, value.into_inner()) {
            (Some(DeValue::Table(known)), DeValue::Table(more)) if NAMED.contains(&name.as_str()) => {
                for (key, value) in more {
                    if let Some((first, _)) = known.get_key_value(&**key.get_ref()) {
                        let subject = format!("{name}.{}", shown_key(key.get_ref()));
                        let help =
                            "give one of them another name, or take it out: all of it stands in one file";
                        twice(key.span(), subject, first.span().start, help);
                    } else {
                        known.insert(key, value);
                    }
                }
            }
            _ => twice(place, name, first, "write it in one of the files only"),
        }
    }
}

/// A table with its places counted from elsewhere.
fn moved_table<'t>(table: DeTable<'t>, by: usize) -> DeTable<'t> {
    let moved = |(key, value): (Spanned<DeString<'t>>, Spanned<DeValue<'t>>)| {
        let span = key.span();
        (Spanned::new(span.start + by..span.end + by, key.into_inner()), moved_value(value, by))
    };
    table.into_iter().map(moved).collect()
}

fn moved_value(value: Spanned<DeValue<'_>>, by: usize) -> Spanned<DeValue<'_>> {
    let span = value.span();
    let moved = match value.into_inner() {
        DeValue::Table(table) => DeValue::Table(moved_table(table, by)),
        DeValue::Array(values) => {
            let mut moved = DeArray::new();
            values.into_iter().for_each(|value| moved.push(moved_value(value, by)));
            DeValue::Array(moved)
        }
        plain => plain,
    };
    Spanned::new(span.start + by..span.end + by, moved)
}
