//! Finds and reads the files that `include` names.
//!
//! A pattern that finds nothing is an error: a policy would be missing in silence. So is a file that others may write: it
//! would decide what is deleted.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::DeTable;

use crate::config::diagnostics::{Diagnostic, Kind};
use crate::disk::{Disk as _, FoundFile, RealDisk, read_found_file, trusted_users};
use crate::policy::select::NameGlob;
use crate::text::{InvalidText, excerpt};

/// The help for an empty list.
pub(super) const EMPTY: &str =
    "name at least one, such as `include = [\"conf.d/*.toml\"]`, or leave the key out";

/// Some policies a file make more than anybody has. More matches are of a pattern that went wrong.
const FILES_MAX: usize = 1000;

/// The characters that make a pattern of a name.
const GLOB_CHARACTERS: [char; 4] = ['*', '?', '[', '{'];

/// What was included.
#[derive(Debug, Default)]
pub(super) struct Included {
    /// Paths and texts, in order.
    pub(super) files: Vec<(String, String)>,
    /// What is wrong with the patterns and the files.
    pub(super) problems: Vec<Diagnostic>,
}

/// Whether a text can be a pattern of files.
pub(super) fn check(pattern: &str) -> Result<(), InvalidText> {
    let example = "write the path of a file, or a pattern such as `conf.d/*.toml`, relative to this file";
    let parts = || pattern.split('/');
    if pattern.is_empty() || pattern.ends_with('/') || pattern.chars().any(char::is_control) {
        return Err(InvalidText::new(format!("`{}` names no file", excerpt(pattern, 64)), example));
    }
    if let Some(part) = parts().find(|part| matches!(*part, ".." | "**")) {
        return Err(InvalidText::new(format!("the pattern has a `{part}` in it"), example));
    }
    for part in parts() {
        NameGlob::new(part).map_err(|reason| {
            InvalidText::new(format!("`{}` is no pattern: {reason}", excerpt(pattern, 64)), example)
        })?;
    }
    Ok(())
}

/// Reads the files that the text of the file `main` includes, of at most `max` bytes each: pattern after pattern, the matches
/// of each sorted, each file once. Patterns that [`check`] refuses are left out.
pub(super) fn read(main: &Path, text: &str, max: u64) -> Included {
    let (table, _) = DeTable::parse_recoverable(text);
    let patterns = table.get_ref().get("include").and_then(|value| value.get_ref().as_array());
    let mut included = Included::default();
    let Some(patterns) = patterns else { return included };
    let folder = main.parent().unwrap_or(Path::new(""));
    let trusted = trusted_users(main);
    // The first is the main file, unless that is no file.
    let mut known = vec![read_found_file(main, max).ok().map(|file| file.identity)];
    for pattern in patterns {
        let Some(text) = pattern.get_ref().as_str().filter(|text| check(text).is_ok()) else { continue };
        let found = match find(folder, text) {
            Ok(found) if found.is_empty() => {
                included.problem(
                    pattern,
                    format!("`{}` matches no file", excerpt(text, 64)),
                    "correct it, or take it out: with a file missing, its policies would be missing in silence",
                );
                continue;
            }
            Ok(found) if found.len() > FILES_MAX => {
                let fact = format!("`{}` matches more than {FILES_MAX} files", excerpt(text, 64));
                included.problem(pattern, fact, "is it the right folder?");
                continue;
            }
            Ok(found) => found,
            Err((folder, error)) => {
                let fact = format!("can't read the folder {}: {error}", shown(&folder));
                included.problem(pattern, fact, "let the user that runs snapwarden read it");
                continue;
            }
        };
        for path in found {
            let file = read_found_file(&path, max);
            included.add(&path, file, pattern, &trusted, &mut known);
        }
    }
    included
}

impl Included {
    /// Takes a file that was read, unless it is known already.
    fn add<T>(
        &mut self,
        path: &Path,
        read: io::Result<FoundFile>,
        pattern: &Spanned<T>,
        trusted: &[u32],
        known: &mut Vec<Option<(u64, u64)>>,
    ) {
        let name = shown(path);
        let file = match read {
            Ok(file) => file,
            Err(error) => {
                let help = match error.kind() {
                    io::ErrorKind::InvalidData => "a configuration is UTF-8 text: is it the right file?",
                    io::ErrorKind::FileTooLarge | io::ErrorKind::InvalidInput => "is it the right file?",
                    io::ErrorKind::PermissionDenied => "let the user that runs snapwarden read it",
                    _ => "correct it, or take it out",
                };
                return self.problem(pattern, format!("can't read {name}: {error}"), help);
            }
        };
        if let Some(place) = known.iter().position(|known| *known == Some(file.identity)) {
            if place == 0 {
                let help = "put included files into a folder of their own, such as `conf.d`";
                self.problem(pattern, "it includes this file itself", help);
            }
            return;
        }
        known.push(Some(file.identity));
        if !trusted.contains(&file.owner) {
            self.problem(
                pattern,
                format!("{name} belongs to user {}, who could change it", file.owner),
                format!("give it to root: chown root {name}"),
            );
        } else if file.is_world_writable {
            self.problem(
                pattern,
                format!("every user of this machine may change {name}"),
                format!("take that right away: chmod o-w {name}"),
            );
        } else {
            self.files.push((name, file.text));
        }
    }

    fn problem<T>(&mut self, pattern: &Spanned<T>, fact: impl Into<String>, help: impl Into<String>) {
        self.problems.push(Diagnostic {
            span: Some(pattern.span()),
            subject: "include".to_owned(),
            fact: fact.into(),
            help: help.into(),
            kind: Kind::Unreadable,
        });
    }
}

/// The paths that match a pattern, sorted. As in a shell, a name that begins with a dot matches only a part that does so,
/// too: those are the leftovers of editors.
///
/// # Errors
/// A folder that can't be read, and why.
fn find(folder: &Path, pattern: &str) -> Result<Vec<PathBuf>, (PathBuf, io::Error)> {
    let start = if pattern.starts_with('/') { Path::new("/") } else { folder };
    let mut found = vec![start.to_owned()];
    for part in pattern.split('/').filter(|part| !matches!(*part, "" | ".")) {
        let glob = NameGlob::new(part).ok().filter(|_| part.contains(GLOB_CHARACTERS));
        let Some(glob) = glob else {
            for path in &mut found {
                path.push(part);
            }
            continue;
        };
        let mut next = Vec::new();
        for folder in found {
            // An empty path is the folder in which the program was started.
            let listed = if folder.as_os_str().is_empty() { Path::new(".") } else { &folder };
            let entries = match RealDisk.list(listed) {
                Ok(entries) => entries,
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
                {
                    continue;
                }
                Err(error) => return Err((folder, error)),
            };
            let matches = |name: &OsStr| {
                let name = name.to_string_lossy();
                glob.matches(&name) && (part.starts_with('.') || !name.starts_with('.'))
            };
            next.extend(
                entries.iter().filter(|entry| matches(&entry.name)).map(|entry| folder.join(&entry.name)),
            );
        }
        found = next;
    }
    found.retain(|path| RealDisk.metadata(path).is_ok());
    found.sort();
    Ok(found)
}

fn shown(path: &Path) -> String {
    excerpt(&path.to_string_lossy(), 200)
}
