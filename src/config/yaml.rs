//! Reads YAML into the tables that `toml_reader` reads, places included.
//!
//! Of YAML there is what configuration files use: mappings with scalar keys, lists, scalars. Aliases and tags are refused:
//! aliases make a short text a large document. Numbers stay text, since no key takes one.

use std::borrow::Cow;
use std::ops::Range;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Span};
use toml::Spanned;
use toml::de::{DeArray, DeString, DeTable, DeValue};

use crate::config::diagnostics::{Diagnostic, Kind};
use crate::config::toml_reader::{OpenFile, shown_key};
use crate::text::excerpt;

/// More than any configuration has.
const DEPTH_MAX: usize = 16;

/// What has begun and not ended.
enum Open<'t> {
    /// With the key that waits for its value.
    Map(DeTable<'t>, Option<Spanned<DeString<'t>>>),
    List(DeArray<'t>),
}

/// The table that a text is. What is wrong with it is reported, by the place alone: the line may hold a secret.
pub(super) fn read<'t>(text: &'t str, file: &OpenFile) -> DeTable<'t> {
    let reader = Reader { places: text.char_indices().map(|(at, _)| at).collect(), end: text.len(), file };
    reader.read(text).unwrap_or_default()
}

struct Reader<'f> {
    /// The byte at which each character begins.
    places: Vec<usize>,
    end: usize,
    file: &'f OpenFile,
}

impl Reader<'_> {
    fn byte(&self, marker: Marker) -> usize {
        self.places.get(marker.index()).copied().unwrap_or(self.end)
    }

    fn range(&self, span: Span) -> Range<usize> {
        self.byte(span.start)..self.byte(span.end)
    }

    fn wrong<T>(&self, span: Range<usize>, subject: &str, fact: impl Into<String>, help: &str) -> Option<T> {
        let (subject, fact, help) = (subject.to_owned(), fact.into(), help.to_owned());
        self.file.report(Diagnostic { span: Some(span), subject, fact, help, kind: Kind::Secret });
        None
    }

    /// `None` once an error is reported after which nothing can be read.
    fn read<'t>(&self, text: &'t str) -> Option<DeTable<'t>> {
        let mut open: Vec<(usize, Open<'t>)> = Vec::new();
        let (mut root, mut documents) = (None, 0);
        for event in Parser::new_from_str(text) {
            let (event, span) = match event {
                Ok((event, span)) => (event, self.range(span)),
                Err(error) => {
                    let at = self.byte(*error.marker());
                    return self.wrong(at..at, "", excerpt(error.info(), 200), "this is no YAML");
                }
            };
            let ended = match event {
                Event::DocumentStart(_) => {
                    documents += 1;
                    if documents > 1 {
                        return self.wrong(span, "", "a second document begins", "take it out");
                    }
                    continue;
                }
                Event::Alias(_) => {
                    return self.wrong(span, "", "there is an alias", "write what it stands for");
                }
                Event::Scalar(_, _, 1.., _) | Event::SequenceStart(1.., _) | Event::MappingStart(1.., _) => {
                    return self.wrong(span, "", "there is an anchor (`&`)", "take it out");
                }
                Event::Scalar(.., Some(_))
                | Event::SequenceStart(_, Some(_))
                | Event::MappingStart(_, Some(_)) => {
                    return self.wrong(span, "", "there is a tag (`!`)", "take it out");
                }
                Event::MappingStart(..) | Event::SequenceStart(..) if open.len() == DEPTH_MAX => {
                    return self.wrong(span, "", "this is too deep", "is it the right file?");
                }
                Event::MappingStart(..) => {
                    open.push((span.start, Open::Map(DeTable::new(), None)));
                    continue;
                }
                Event::SequenceStart(..) => {
                    open.push((span.start, Open::List(DeArray::new())));
                    continue;
                }
                Event::Scalar(text, style, ..) => {
                    if let Some((_, Open::Map(_, key @ None))) = open.last_mut() {
                        *key = Some(Spanned::new(span, text));
                        continue;
                    }
                    (span, scalar(text, style))
                }
                Event::MappingEnd | Event::SequenceEnd => {
                    let (start, ended) = open.pop()?;
                    let value = match ended {
                        Open::Map(table, _) => DeValue::Table(table),
                        Open::List(list) => DeValue::Array(list),
                    };
                    (start..span.end.max(start), Some(value))
                }
                Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => continue,
            };
            match (open.last_mut(), ended) {
                (None, (_, Some(DeValue::Table(table)))) => root = Some(table),
                // An empty document.
                (None, (_, None)) => {}
                (None, (span, _)) => {
                    return self.wrong(span, "", "this is no mapping", "write lines such as `key: value`");
                }
                (Some((_, Open::List(list))), (span, Some(value))) => list.push(Spanned::new(span, value)),
                (Some((_, Open::Map(table, key))), (span, value)) => {
                    let Some(key) = key.take() else {
                        return self.wrong(
                            span,
                            "",
                            "a key is no plain word",
                            "write lines such as `key: value`",
                        );
                    };
                    let shown = shown_key(key.get_ref());
                    if table.contains_key(&**key.get_ref()) {
                        self.wrong::<()>(
                            key.span(),
                            &shown,
                            "this key is written twice",
                            "take one of them out",
                        );
                    } else if let Some(value) = value {
                        table.insert(key, Spanned::new(span, value));
                    } else {
                        let help = "write one, or take the key out";
                        self.wrong::<()>(key.span(), &shown, "there is no value", help);
                    }
                }
                (Some((_, Open::List(_))), (span, None)) => {
                    self.wrong::<()>(span, "", "an element is empty", "write it, or take it out");
                }
            }
        }
        let help = "write at least one section, or take `web_config_file` out";
        root.or_else(|| self.wrong(0..0, "", "there is nothing in it", help))
    }
}

/// `None` for nothing.
fn scalar(text: Cow<'_, str>, style: ScalarStyle) -> Option<DeValue<'_>> {
    match (&*text, style) {
        ("" | "~" | "null" | "Null" | "NULL", ScalarStyle::Plain) => None,
        ("true" | "True" | "TRUE", ScalarStyle::Plain) => Some(DeValue::Boolean(true)),
        ("false" | "False" | "FALSE", ScalarStyle::Plain) => Some(DeValue::Boolean(false)),
        _ => Some(DeValue::String(text)),
    }
}
