//! Reads a TOML file into checked values, or reports all errors in it at once.
//!
//! [`load`] reads the file and those that it includes, [`parse`] a text. `parse` is pure: it opens no file that the text
//! names and reads no environment variables. A default is a constant with its reason.
//!
//! `include` finds and reads the included files, `merge` makes one configuration of several files, `toml_reader` reads tables and values and knows their places, `keys` finds out what an unknown key meant,
//! `diagnostics` prints errors, `policies` reads the policies, `notifiers` the notifiers, `sections` all other sections, `warnings`
//! finds what is valid but invites a loss, `web` reads the web configuration file, by `yaml`.

pub mod diagnostics;
mod include;
pub(crate) mod keys;
mod merge;
mod notifiers;
pub mod policies;
pub mod sections;
mod toml_reader;
pub mod warnings;
pub mod web;
mod yaml;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use crate::config::diagnostics::{Diagnostic, Diagnostics, Kind, Sources};
use crate::config::sections::{ArchiveSettings, Config};
use crate::config::toml_reader::{OpenFile, shown_key};
use crate::disk::{Disk, read_named_file};
use crate::policy::name::ArchiveName;
use crate::text::excerpt;

/// The most bytes of a configuration: some thousand policies. More is another file, named by mistake.
pub const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// A configuration that can't be used. The texts of the first four name the file's path.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is no such file.
    #[error("there is no configuration file `{0}`: write one, or name another by --config FILE")]
    Missing(String),
    /// The file is larger than [`FILE_BYTES_MAX`].
    #[error("configuration file `{0}` has more than {FILE_BYTES_MAX} bytes: is it the right file?")]
    TooLarge(String),
    /// The file is not UTF-8.
    #[error("configuration file `{0}` is not UTF-8 text: is it the right file?")]
    NotText(String),
    /// The file can't be read.
    #[error("can't read configuration file `{0}`")]
    Read(String, #[source] io::Error),
    /// Two archives whose paths lead to one folder, or to one inside the other: names, paths and the folders.
    #[error(
        "archives `{}` and `{}` keep their copies in one folder, or one in the other's: `{}` leads to `{}`, `{}` to `{}`; \
         give each archive a folder of its own",
        .0[0].name, .0[1].name, .0[0].path, .0[0].resolved, .0[1].path, .0[1].resolved
    )]
    SharedFolder(Box<[ArchiveFolder; 2]>),
    /// The file was read, and its text has errors.
    #[error("{0}")]
    Invalid(Diagnostics),
}

/// The folder of a local archive.
#[derive(Debug)]
pub struct ArchiveFolder {
    name: ArchiveName,
    /// As it is written.
    path: String,
    /// With all links followed.
    resolved: String,
}

/// Refuses two local archives whose paths lead to one folder, or to one inside the other: they would wait for each
/// other's locks, and each would take the other's copies for its own. [`parse`], which opens nothing, compares only the
/// paths' text. A folder that can't be looked into counts as it is written.
///
/// # Errors
/// [`ConfigError::SharedFolder`] for the first two.
pub fn check_archive_folders(config: &Config, disk: &dyn Disk) -> Result<(), ConfigError> {
    let mut folders: Vec<(&ArchiveName, &Path, PathBuf)> = Vec::new();
    for (name, settings) in &config.archives {
        let ArchiveSettings::Local { path } = settings else { continue };
        let resolved = disk.resolve(path).unwrap_or_else(|_| path.clone());
        let meets = |other: &Path| other.starts_with(&resolved) || resolved.starts_with(other);
        if let Some((other, other_path, other_resolved)) = folders.iter().find(|(_, _, other)| meets(other)) {
            let shown = |path: &Path| excerpt(&path.to_string_lossy(), 200);
            let folder = |name: &ArchiveName, path: &Path, resolved: &Path| ArchiveFolder {
                name: name.clone(),
                path: shown(path),
                resolved: shown(resolved),
            };
            let both = [folder(other, other_path, other_resolved), folder(name, path, &resolved)];
            return Err(ConfigError::SharedFolder(Box::new(both)));
        }
        folders.push((name, path, resolved));
    }
    Ok(())
}

/// Reads a configuration file, and the files that it includes. `endpoint` overrides `exoscale.endpoint`; an empty one
/// does not.
///
/// # Errors
/// One for a file that can't be read; else all errors in the texts at once.
pub fn load(path: &Path, endpoint: Option<&str>) -> Result<Config, ConfigError> {
    let shown = excerpt(&path.to_string_lossy(), 200);
    let text = read_named_file(path, FILE_BYTES_MAX).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => ConfigError::Missing(shown.clone()),
        io::ErrorKind::FileTooLarge => ConfigError::TooLarge(shown.clone()),
        io::ErrorKind::InvalidData => ConfigError::NotText(shown.clone()),
        _ => ConfigError::Read(shown.clone(), source),
    })?;
    let included = include::read(path, &text, FILE_BYTES_MAX);
    let mut sources = vec![(shown.as_str(), text.as_str())];
    sources.extend(included.files.iter().map(|(name, text)| (name.as_str(), text.as_str())));
    parse_all(&sources, included.problems, endpoint).map_err(ConfigError::Invalid)
}

/// Reads the text of a configuration; what it includes is left out. `file_name` is for the diagnostics; `endpoint`
/// overrides `exoscale.endpoint`, an empty one does not.
///
/// # Errors
/// All errors at once, in the order of the file.
pub fn parse(text: &str, file_name: &str, endpoint: Option<&str>) -> Result<Config, Diagnostics> {
    parse_all(&[(file_name, text)], Vec::new(), endpoint)
}

/// Reads one configuration from several files, by name; `problems` are those with the files themselves.
fn parse_all(
    files: &[(&str, &str)],
    problems: Vec<Diagnostic>,
    endpoint: Option<&str>,
) -> Result<Config, Diagnostics> {
    let open = OpenFile::new(sections::known_keys());
    for problem in problems {
        open.report(problem);
    }
    let (mut sources, mut unread, mut root) = (Sources::default(), Vec::new(), DeTable::new());
    for (name, text) in files {
        let start = sources.add(name, text);
        let (table, errors) = DeTable::parse_recoverable(text);
        unread.extend(report_syntax(text, start, &errors, &open));
        merge::add(&mut root, table.into_inner(), start, &sources, &open);
    }
    let config =
        sections::read(&open.root(&root), endpoint, &open, files.first().map_or("", |(name, _)| name));
    match open.finish(&sources, &unread) {
        None => Ok(Config {
            written: files.iter().flat_map(|(_, text)| written_keys(text)).collect(),
            files: sources.names().map(str::to_owned).collect(),
            ..config
        }),
        Some(diagnostics) => Err(diagnostics),
    }
}

/// The state directory that a file or one that it includes names, as far as it can be found there: the rest of them may be
/// no TOML at all.
pub fn state_directory_in(path: &Path) -> Option<PathBuf> {
    let text = read_named_file(path, FILE_BYTES_MAX).ok()?;
    let included = include::read(path, &text, FILE_BYTES_MAX).files;
    let mut texts = std::iter::once(&text).chain(included.iter().map(|(_, text)| text));
    texts.find_map(|text| {
        let (table, _) = DeTable::parse_recoverable(text);
        let directory =
            table.get_ref().get("state")?.get_ref().as_table()?.get("directory")?.get_ref().as_str()?;
        Some(PathBuf::from(directory)).filter(|directory| directory.is_absolute())
    })
}

/// Every key of a valid file with its value.
fn written_keys(text: &str) -> BTreeMap<String, serde_json::Value> {
    let mut keys = BTreeMap::new();
    // The text has been read without an error before.
    let mut tables = vec![(String::new(), toml::from_str::<toml::Table>(text).unwrap_or_default())];
    while let Some((path, table)) = tables.pop() {
        for (name, value) in table {
            let name = shown_key(&name);
            let path = if path.is_empty() { name } else { format!("{path}.{name}") };
            match value {
                toml::Value::Table(table) => tables.push((path, table)),
                value => drop(serde_json::to_value(value).map(|value| keys.insert(path, value))),
            }
        }
    }
    keys
}

/// Reports errors of TOML syntax in the text that begins at `start` among all. Returns the parts of it that the parser may
/// have skipped or misread because of them: from the line of an error to the next section.
fn report_syntax(text: &str, start: usize, errors: &[toml::de::Error], file: &OpenFile) -> Vec<Range<usize>> {
    let mut errors: Vec<(Range<usize>, &str)> = errors
        .iter()
        .map(|error| (error.span().unwrap_or(text.len()..text.len()), error.message()))
        .collect();
    errors.sort_by_key(|(span, _)| span.start);
    let mut unread: Vec<Range<usize>> = Vec::new();
    let mut line_end = None;
    for (span, message) in errors {
        // Further errors on a line mostly follow from its first.
        if line_end.is_some_and(|end| span.start <= end) {
            continue;
        }
        let rest = text.get(span.start..).unwrap_or_default();
        line_end = Some(span.start + rest.find('\n').unwrap_or(rest.len()));
        file.report(Diagnostic {
            span: Some(start + span.start..start + span.end),
            subject: String::new(),
            fact: excerpt(message, 200),
            help: help_with_syntax(message).to_owned(),
            kind: Kind::Syntax,
        });
        // Of duplicates the first one counts; nothing else is misread.
        let misread = !message.starts_with(DUPLICATE);
        if misread && unread.last().is_none_or(|part| start + span.start >= part.end) {
            let line_start = text.get(..span.start).and_then(|before| before.rfind('\n'));
            let next = rest.find("\n[").map_or(text.len() + 1, |at| span.start + at + 1);
            unread.push(start + line_start.map_or(0, |at| at + 1)..start + next);
        }
    }
    unread
}

/// The TOML parser's message for a key or a section that is written twice.
const DUPLICATE: &str = "duplicate key";

/// The help for the TOML parser's commonest errors, by the beginnings of their messages.
fn help_with_syntax(message: &str) -> &'static str {
    let helps = [
        (DUPLICATE, "write a key once in its section, a section once in the file: take one of them out"),
        ("string values must be quoted", "put it in double quotes"),
        ("key with no value", "write `key = value`"),
        ("missing comma between array elements", "put a comma between two values, and `]` behind the last"),
        ("invalid basic string", "end the text by a double quote on the same line"),
        ("unclosed table", "end the section's name by `]`"),
        ("unclosed array", "end the list by `]`"),
    ];
    let help = helps.iter().find(|(beginning, _)| message.starts_with(beginning));
    help.map_or("this is not TOML as <https://toml.io> has it", |(_, help)| help)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_full_example_shows_every_key_that_is_available() {
        let example = include_str!("../../config/full.toml");
        let shown = |key: &str| {
            let is_shown =
                |line: &str| line.starts_with(&format!("{key} = ")) || line.ends_with(&format!(".{key}]"));
            example.lines().any(is_shown)
        };
        let known = sections::known_keys();
        // Archives have their keys by type; those of the top level are the sections themselves.
        let by_type = |label: &str| ["", "archives.*"].contains(&label);
        assert!(shown("include"));
        for (label, keys) in known.all().filter(|(label, _)| !by_type(label)) {
            for key in keys {
                assert!(shown(key), "{label}.{key}");
            }
        }
        for (label, key) in [("", "policies"), ("exoscale", "endpoint"), ("notify.*", "url_file")] {
            assert!(known.of(label).unwrap().contains(&key.to_owned()), "{label}.{key}");
        }
    }
}
