//! Reads the tables of a TOML file, and collects every error with its place.
//!
//! A [`Table`] and a [`Value`] know their path and their place, and report what is wrong with them: a getter
//! returns `None` both for a missing key and for a wrong value, so that a reader continues with the next key. The
//! result counts only if [`OpenFile::finish`] finds no diagnostics.

use std::cell::RefCell;
use std::collections::HashSet;
use std::num::{NonZeroU32, NonZeroUsize};
use std::ops::{Range, RangeInclusive};
use std::path::{Component, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use crate::config::diagnostics::{Diagnostic, Diagnostics, Kind, Sources};
use crate::config::keys::{self, KnownKeys};
use crate::policy::Count;
use crate::policy::span::{Span, parse_duration};
use crate::schedule::Schedule;
use crate::text::{InvalidText, excerpt};

/// More operations or downloads at once than this exhaust threads and connections.
const CONCURRENCY_MAX: u64 = 256;

/// A file while it is read.
#[derive(Default)]
pub(super) struct OpenFile {
    /// Every key that a file may have. Without any, no key is unknown.
    known: KnownKeys,
    /// Whether it is YAML, which is written another way than TOML.
    is_yaml: bool,
    /// The keys that the readers have asked for.
    asked: RefCell<KnownKeys>,
    diagnostics: RefCell<Vec<Diagnostic>>,
}

impl OpenFile {
    pub(super) fn new(known: KnownKeys) -> Self {
        Self { known, ..Self::default() }
    }

    pub(super) fn of_yaml(known: KnownKeys) -> Self {
        Self { known, is_yaml: true, ..Self::default() }
    }

    /// The table that holds all others.
    pub(super) fn root<'t>(&'t self, entries: &'t DeTable<'t>) -> Table<'t> {
        Table::open(self.outside(""), entries)
    }

    /// A place outside the file, such as an environment variable.
    pub(super) fn outside(&self, name: &str) -> Place<'_> {
        Place { path: excerpt(name, 200), label: String::new(), span: None, file: self }
    }

    pub(super) fn report(&self, diagnostic: Diagnostic) {
        self.diagnostics.borrow_mut().push(diagnostic);
    }

    /// The keys that the readers have asked for.
    pub(super) fn into_asked(self) -> KnownKeys {
        self.asked.into_inner()
    }

    /// All errors of the file, if there are any. `unread` are the parts of its text that are no TOML.
    pub(super) fn finish(self, sources: &Sources<'_>, unread: &[Range<usize>]) -> Option<Diagnostics> {
        Diagnostics::of(self.diagnostics.into_inner(), sources, unread)
    }
}

/// A path in the file, and its place in the text.
#[derive(Clone)]
pub(super) struct Place<'t> {
    /// Such as `policies.nightly.zones`.
    path: String,
    /// Such as `policies.*.zones`.
    label: String,
    span: Option<Range<usize>>,
    file: &'t OpenFile,
}

impl Place<'_> {
    fn child(&self, name: &str, label: &str, span: Option<Range<usize>>) -> Self {
        let join = |parent: &str, name: &str| {
            if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") }
        };
        Self {
            path: join(&self.path, &shown_key(name)),
            label: join(&self.label, label),
            span,
            file: self.file,
        }
    }

    /// Reports an error here; `help` says how to correct it.
    pub(super) fn wrong(&self, fact: impl Into<String>, help: impl Into<String>) {
        self.add(Kind::Wrong, fact.into(), help.into());
    }

    /// Reports an error of a value that may be a secret.
    pub(super) fn wrong_secret(&self, fact: impl Into<String>, help: impl Into<String>) {
        self.add(Kind::Secret, fact.into(), help.into());
    }

    /// Reports that something is missing, or missing somewhere else.
    pub(super) fn missing(&self, fact: impl Into<String>, help: impl Into<String>) {
        self.add(Kind::Missing, fact.into(), help.into());
    }

    fn add(&self, kind: Kind, fact: String, help: String) {
        let (span, subject) = (self.span.clone(), self.path.clone());
        self.file.report(Diagnostic { span, subject, fact, help, kind });
    }
}

/// A key as a path shows it: in quotes where TOML wants them.
pub(super) fn shown_key(name: &str) -> String {
    let bare = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if bare { excerpt(name, 64) } else { format!("\"{}\"", excerpt(name, 64)) }
}

/// A section of the file, or one that is not there.
pub(super) struct Table<'t> {
    place: Place<'t>,
    entries: Option<&'t DeTable<'t>>,
}

impl<'t> Table<'t> {
    /// A table. Where its label has keys of its own, all others are reported.
    fn open(place: Place<'t>, entries: &'t DeTable<'t>) -> Self {
        let table = Self { place, entries: Some(entries) };
        if let Some(known) = table.place.file.known.of(&table.place.label) {
            for key in entries.keys() {
                if !keys::contains(known, key.get_ref()) {
                    table.report_unknown(key.get_ref(), key.span(), known);
                }
            }
        }
        table
    }

    fn report_unknown(&self, key: &str, span: Range<usize>, known: &[String]) {
        let place = self.place.child(key, key, Some(span));
        let (above, beside) = self.sections_with(key);
        let help = if matches!(key, "api_key" | "api_secret") {
            "secrets never stand here: write them to a file of their own, and name it by `credentials_file`"
                .to_owned()
        } else if let [above, ..] = above.as_slice() {
            format!("`{key}` belongs to `{above}` itself: write it above the line `[{}]`", self.place.path)
        } else if let Some(near) = keys::nearest(key, known.iter().map(String::as_str)) {
            format!("did you mean `{near}`?")
        } else if !beside.is_empty() {
            let beside: Vec<_> = beside.iter().map(|section| format!("`[{section}]`")).collect();
            format!("`{key}` belongs under {}", beside.join(" or "))
        } else {
            format!("the keys here are {}", listed(known))
        };
        place.add(Kind::UnknownKey, "unknown key".to_owned(), help);
    }

    /// Whether an unknown key here was probably meant to be this one, so that it is not missing as well. Of a
    /// section with hundreds of keys only some are looked at.
    pub(super) fn has_typo_of(&self, key: &str) -> bool {
        let known = self.place.file.known.of(&self.place.label).unwrap_or_default();
        self.entries.is_some_and(|entries| {
            entries.keys().take(100).map(|written| &**written.get_ref()).any(|written| {
                !keys::contains(known, written)
                    && keys::nearest(written, known.iter().map(String::as_str)) == Some(key)
            })
        })
    }

    /// The sections above this one, and those beside it, that have a key, as the file would name them.
    fn sections_with(&self, key: &str) -> (Vec<String>, Vec<String>) {
        let (mut above, mut beside) = (Vec::new(), Vec::new());
        let names: Vec<&str> = self.place.path.split('.').collect();
        let labels: Vec<&str> = self.place.label.split('.').collect();
        for label in self.place.file.known.sections_with(key).filter(|label| *label != self.place.label) {
            let parts: Vec<&str> = label.split('.').collect();
            let shared = parts.iter().zip(&labels).take_while(|(one, other)| one == other).count();
            // The names here also name the section there: `policies.*` is the same policy.
            let section = parts.iter().enumerate().map(|(index, part)| match names.get(index) {
                Some(name) if index < shared => *name,
                _ => *part,
            });
            let section = section.collect::<Vec<_>>().join(".").replace('*', "NAME");
            if shared == parts.len() {
                above.push(section);
            } else if shared + 1 >= parts.len() {
                beside.push(section);
            }
        }
        (above, beside)
    }

    /// The values here of the keys that a reader would ask for.
    pub(super) fn values_read_by<T>(&self, read: impl Fn(&Table<'_>) -> T) -> Vec<Value<'t>> {
        let file = OpenFile::default();
        read(&Table { place: Place { file: &file, ..self.place.clone() }, entries: None });
        let asked = file.into_asked();
        asked.of(&self.place.label).unwrap_or_default().iter().filter_map(|key| self.value(key)).collect()
    }

    pub(super) fn place(&self) -> &Place<'t> {
        &self.place
    }

    pub(super) fn is_there(&self) -> bool {
        self.entries.is_some()
    }

    /// Whether it has no keys, or is not there.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_none_or(DeTable::is_empty)
    }

    /// Whether a key has a value that is no table, which is reported where it is read.
    pub(super) fn has_other_than_table(&self, key: &str) -> bool {
        self.entries.and_then(|entries| entries.get(key)).is_some_and(|value| !value.get_ref().is_table())
    }

    /// A key's value. To ask for a key is also what makes it known.
    pub(super) fn value(&self, key: &str) -> Option<Value<'t>> {
        let (file, label) = (self.place.file, &self.place.label);
        file.asked.borrow_mut().add(label, key);
        debug_assert!(
            file.known.of(label).is_none_or(|known| keys::contains(known, key)),
            "`{key}` of `{label}` is not asked for in every file"
        );
        let value = self.entries?.get(key)?;
        Some(Value::open(self.place.child(key, key, Some(value.span())), value.get_ref()))
    }

    /// A key's value; it must be there.
    pub(super) fn required(&self, key: &str, help: &str) -> Option<Value<'t>> {
        let value = self.value(key);
        if value.is_none() && self.is_there() && !self.has_typo_of(key) {
            self.place.missing(format!("`{key}` is missing"), help);
        }
        value
    }

    /// A table within this one; an absent one if the file does not have it.
    pub(super) fn table(&self, key: &str) -> Table<'t> {
        self.value(key)
            .and_then(|value| value.table())
            .unwrap_or_else(|| Self { place: self.place.child(key, key, None), entries: None })
    }

    /// The tables within this one that have names, in the order of the file. A bad name is reported.
    pub(super) fn named<N: FromStr<Err: ToString>>(&self) -> Vec<(N, Table<'t>)> {
        let mut found = Vec::new();
        for (key, value) in self.entries.into_iter().flatten() {
            let place = self.place.child(key.get_ref(), "*", Some(key.span()));
            let name = key.get_ref().parse::<N>();
            if let Err(error) = &name {
                place.wrong("not a name", error.to_string());
            }
            let value = Value::open(Place { span: Some(value.span()), ..place }, value.get_ref());
            if let Some((table, name)) = value.table().zip(name.ok()) {
                found.push((key.span().start, name, table));
            }
        }
        found.sort_by_key(|(start, ..)| *start);
        found.into_iter().map(|(_, name, table)| (name, table)).collect()
    }

    /// All keys with what is read from their values.
    pub(super) fn each<T>(&self, read: impl Fn(&Value<'t>) -> Option<T>) -> Vec<(String, T)> {
        let entries = self.entries.into_iter().flatten();
        entries
            .filter_map(|(key, value)| {
                let place = self.place.child(key.get_ref(), "*", Some(value.span()));
                Some((key.get_ref().to_string(), read(&Value::open(place, value.get_ref()))?))
            })
            .collect()
    }

    /// A key's value, read by one of the readers of [`Value`].
    pub(super) fn read<T>(&self, key: &str, read: impl Fn(&Value<'t>) -> Option<T>) -> Option<T> {
        read(&self.value(key)?)
    }

    /// A whole number within a range that its type can hold.
    pub(super) fn number<N: TryFrom<u64>>(&self, key: &str, range: RangeInclusive<u64>) -> Option<N> {
        self.value(key)?.number(range)?.try_into().ok()
    }

    /// How much may be done at once.
    pub(super) fn concurrency(&self) -> Option<NonZeroUsize> {
        self.number("concurrency", 1..=CONCURRENCY_MAX).and_then(NonZeroUsize::new)
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(&self, key: &str, choices: &[(&str, T)]) -> Option<T> {
        self.value(key)?.choice(choices)
    }
}

/// The value of a key, or an element of a list.
pub(super) struct Value<'t> {
    place: Place<'t>,
    value: &'t DeValue<'t>,
}

impl<'t> Value<'t> {
    fn open(place: Place<'t>, value: &'t DeValue<'t>) -> Self {
        Self { place, value }
    }

    fn plain(&self) -> Option<&str> {
        match self.value {
            DeValue::String(text) => Some(text),
            DeValue::Integer(number) => Some(number.as_str()),
            DeValue::Boolean(true) => Some("true"),
            DeValue::Boolean(false) => Some("false"),
            _ => None,
        }
    }

    pub(super) fn place(&self) -> &Place<'t> {
        &self.place
    }

    /// Reports an error; `help` says how to correct it. Returns `None` in place of a value.
    pub(super) fn wrong<T>(&self, fact: impl Into<String>, help: impl Into<String>) -> Option<T> {
        self.place.wrong(fact, help);
        None
    }

    fn wrong_type<T>(&self, wanted: &str, help: &str) -> Option<T> {
        let found = match self.value {
            DeValue::String(_) => "text",
            DeValue::Integer(_) => "a whole number",
            DeValue::Float(_) => "a number with a point",
            DeValue::Boolean(_) => "`true` or `false`",
            DeValue::Datetime(_) => "a date or a time",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        self.wrong(format!("this is {found}, but must be {wanted}"), help)
    }

    fn table(&self) -> Option<Table<'t>> {
        if let DeValue::Table(entries) = self.value {
            return Some(Table::open(self.place.clone(), entries));
        }
        if self.place.file.is_yaml {
            let name = self.place.path.rsplit('.').next().unwrap_or_default();
            let help = format!("write its keys below `{name}:`, further to the right");
            self.place.wrong_secret("this is no mapping", help);
            return None;
        }
        // Where the tables have names, keys stand in `[policies.NAME]`, not in `[policies]`.
        let named =
            if self.place.file.known.of(&format!("{}.*", self.place.label)).is_some() { ".NAME" } else { "" };
        self.wrong_type("a table", &format!("write its keys below a line `[{}{named}]`", self.place.path))
    }

    pub(super) fn boolean(&self) -> Option<bool> {
        match self.value {
            DeValue::Boolean(value) => Some(*value),
            _ => self.wrong_type("`true` or `false`", "write `true` or `false`, without quotes"),
        }
    }

    pub(super) fn text(&self) -> Option<&'t str> {
        match self.value {
            DeValue::String(text) => Some(text),
            _ => self.wrong_type("text", "put it in double quotes"),
        }
    }

    /// Text that may be a secret; whatever else it is, is not reported.
    pub(super) fn hidden_text(&self) -> Option<&'t str> {
        self.value.as_str()
    }

    /// Text for people: not empty, at most `max` characters, without control characters.
    pub(super) fn line(&self, max: usize) -> Option<String> {
        let text = self.text()?;
        let length = text.chars().count();
        if text.trim().is_empty() {
            self.wrong("it is empty", "write something, or leave the key out")
        } else if length > max {
            self.wrong(format!("it has {length} characters"), format!("at most {max} are possible"))
        } else if text.chars().any(char::is_control) {
            self.wrong("it has a line break or another control character", "write one plain line")
        } else {
            Some(text.to_owned())
        }
    }

    /// Text that has a form; `what` and `form` describe it.
    pub(super) fn written(&self, what: &str, form: &str, is_so: impl Fn(&str) -> bool) -> Option<String> {
        let text = self.text()?;
        if is_so(text) {
            return Some(text.to_owned());
        }
        self.wrong(format!("`{}` is not {what}", excerpt(text, 64)), format!("write {form}"))
    }

    /// Text that is parsed as a `T`; its error's text is the help.
    pub(super) fn parsed<T: FromStr<Err: ToString>>(&self, what: &str) -> Option<T> {
        let text = self.text()?;
        text.parse::<T>().map_or_else(
            |error| self.wrong(format!("`{}` is not {what}", excerpt(text, 64)), error.to_string()),
            Some,
        )
    }

    /// What was read from the text, or `None` once its error is reported.
    pub(super) fn valid<T>(&self, read: Result<T, InvalidText>) -> Option<T> {
        read.map_or_else(|error| self.wrong(error.fact, error.help), Some)
    }

    /// Absolute time, such as `"30s"`.
    pub(super) fn duration(&self) -> Option<Duration> {
        let text = self.span_text("10s")?;
        self.valid(parse_duration(text))
    }

    /// Calendar time of a retention rule, such as `"14d"`.
    pub(super) fn span(&self) -> Option<Span> {
        let text = self.span_text("30d")?;
        self.valid(Span::of_rule(text))
    }

    /// A cron line.
    pub(super) fn schedule(&self) -> Option<Schedule> {
        let text = self.text()?;
        self.valid(text.parse())
    }

    fn span_text(&self, example: &str) -> Option<&'t str> {
        let help = format!("write a number with a unit in double quotes, such as `\"{example}\"`");
        match self.value {
            DeValue::Integer(number) => {
                self.wrong(format!("`{}` has no unit", excerpt(number.as_str(), 20)), help)
            }
            DeValue::String(text) => Some(text),
            _ => self.wrong_type("a span of time", &help),
        }
    }

    fn number(&self, range: RangeInclusive<u64>) -> Option<u64> {
        let number = self.integer()?;
        if let Some(number) = u64::try_from(number).ok().filter(|number| range.contains(number)) {
            return Some(number);
        }
        let help = match (*range.start(), *range.end()) {
            (least, most) if most < u32::MAX.into() => format!("use {least} to {most}"),
            (least, _) if number < least.into() => format!("use {least} or more"),
            (_, most) => format!("use at most {most}"),
        };
        self.wrong(format!("`{}` is out of range", self.integer_text()), help)
    }

    /// A count of a rule, which is switched off by leaving the key out, not by 0.
    pub(super) fn count(&self) -> Option<NonZeroU32> {
        if self.integer()? == 0 {
            return self.wrong("`0` is not possible", "leave the key out to switch the rule off");
        }
        self.number(1..=u32::MAX.into())
            .and_then(|number| u32::try_from(number).ok())
            .and_then(NonZeroU32::new)
    }

    /// A count, or `"all"`.
    pub(super) fn count_or_all(&self) -> Option<Count> {
        match self.value {
            DeValue::String(text) if text == "all" => Some(Count::All),
            DeValue::String(_) => {
                self.wrong_type("a whole number, or `\"all\"`", "write the number without quotes")
            }
            _ => self.count().map(Count::Of),
        }
    }

    fn integer(&self) -> Option<i128> {
        match self.value {
            DeValue::Integer(number) => {
                let (digits, negative) = (number.as_str(), number.as_str().starts_with('-'));
                // Beyond 128 bits it is out of every range.
                let beyond = if negative { i128::MIN } else { i128::MAX };
                Some(i128::from_str_radix(digits, number.radix()).unwrap_or(beyond))
            }
            DeValue::String(_) => {
                self.wrong_type("a whole number", "write a number such as `7`, without quotes")
            }
            _ => self.wrong_type("a whole number", "write a number such as `7`"),
        }
    }

    fn integer_text(&self) -> String {
        match self.value {
            DeValue::Integer(number) if number.radix() == 10 => excerpt(number.as_str(), 30),
            _ => self.integer().unwrap_or_default().to_string(),
        }
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(&self, choices: &[(&str, T)]) -> Option<T> {
        let text = self.text()?;
        if let Some((_, choice)) = choices.iter().find(|(word, _)| *word == text) {
            return Some(*choice);
        }
        let words: Vec<_> = choices.iter().map(|(word, _)| format!("`\"{word}\"`")).collect();
        self.wrong(format!("`{}` is not possible", excerpt(text, 64)), format!("use {}", words.join(" or ")))
    }

    /// An absolute path.
    pub(super) fn path(&self) -> Option<PathBuf> {
        let text = self.text()?;
        let path = PathBuf::from(text);
        if text.is_empty() || text.chars().any(char::is_control) {
            self.wrong("not a path", "write an absolute path, such as `/var/lib/snapwarden`")
        } else if !path.is_absolute() {
            self.wrong(
                format!("`{}` is not an absolute path", excerpt(text, 64)),
                "begin it with `/`: what a relative path means depends on where the program is started",
            )
        } else if path.components().any(|part| part == Component::ParentDir) {
            self.wrong("the path has a `..` in it", "write it without")
        } else {
            Some(path)
        }
    }

    /// The values of a list, each only once, read by `read`. `empty` is the help for an empty list; without it
    /// a list may be empty.
    pub(super) fn list<T>(&self, empty: Option<&str>, read: impl Fn(&Value<'t>) -> Option<T>) -> Vec<T> {
        let DeValue::Array(values) = self.value else {
            let _: Option<()> = self.wrong_type("a list", "put it in brackets, such as `[\"one\", \"two\"]`");
            return Vec::new();
        };
        if values.is_empty()
            && let Some(help) = empty
        {
            self.place.wrong("the list is empty", help);
        }
        let mut seen = HashSet::new();
        let mut all = Vec::new();
        for value in values {
            let value = Self::open(self.element(value.span()), value.get_ref());
            if value.plain().is_some_and(|text| !seen.insert(text.to_owned())) {
                let text = value.plain().map(|text| excerpt(text, 64)).unwrap_or_default();
                value.place.wrong(format!("`{text}` is listed twice"), "take one of them out");
            }
            all.extend(read(&value));
        }
        all
    }

    /// Texts in their order, which may repeat. `None` unless all are texts, without the character that no program takes as
    /// an argument.
    pub(super) fn texts(&self, example: &str) -> Option<Vec<String>> {
        let DeValue::Array(values) = self.value else { return self.wrong_type("a list", example) };
        let text = |value: Self| match value.text()? {
            text if text.contains('\0') => value.wrong("it contains the character U+0000", "take it out"),
            text => Some(text.to_owned()),
        };
        let values = values.iter().map(|value| Self::open(self.element(value.span()), value.get_ref()));
        // All errors are reported.
        let texts: Vec<Option<String>> = values.map(text).collect();
        texts.into_iter().collect()
    }

    /// An element has the path of its list, and a place of its own.
    fn element(&self, span: Range<usize>) -> Place<'t> {
        Place { label: format!("{}.*", self.place.label), span: Some(span), ..self.place.clone() }
    }
}

/// `a`, `b` and `c`.
fn listed<'a>(words: impl IntoIterator<Item = &'a String>) -> String {
    let quoted: Vec<_> = words.into_iter().map(|word| format!("`{word}`")).collect();
    match quoted.as_slice() {
        [] => "none".to_owned(),
        [one] => one.clone(),
        [all @ .., last] => format!("{} and {last}", all.join(", ")),
    }
}
