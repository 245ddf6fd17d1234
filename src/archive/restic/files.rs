//! The files beside the configuration that restic needs: its password, and the environment of its backend.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use secrecy::SecretString;

use crate::disk::read_named_file;
use crate::policy::name::ArchiveName;

/// Backends take some variables; a longer file is the wrong one.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// The beginnings of names that the configuration decides, or that restic must never get.
const RESERVED: [&str; 4] = ["RESTIC_REPOSITORY", "RESTIC_PASSWORD", "RESTIC_CACHE_DIR", "EXOSCALE_"];

/// A file that restic needs can't be used. Nothing of its content is shown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResticFileError {
    /// There is no password.
    #[error(
        "archive `{0}` has no password: name the file with the repository's password as `password_file` in `[archives.{0}]`, \
         or give a systemd credential `archive-{0}`"
    )]
    NoPassword(ArchiveName),
    /// The environment can't be read.
    #[error("read the environment of archive `{archive}` from {}", .path.display())]
    Unreadable {
        archive: ArchiveName,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A line of it is no variable.
    #[error("line {line} of {}, the environment of archive `{archive}`, {why}", .path.display())]
    Line { archive: ArchiveName, path: PathBuf, line: usize, why: &'static str },
}

/// The file with the repository's password: as configured, else the credential that systemd gives.
pub(crate) fn password_file(
    archive: &ArchiveName,
    configured: Option<&Path>,
    systemd: Option<&Path>,
) -> Result<PathBuf, ResticFileError> {
    let credential = || Some(systemd?.join(format!("archive-{archive}"))).filter(|path| path.is_file());
    let found = configured.map(Path::to_owned).or_else(credential);
    found.ok_or_else(|| ResticFileError::NoPassword(archive.clone()))
}

/// The variables in a file with lines `KEY=value`; empty lines, and those that begin with `#`, are none.
pub(crate) fn environment(
    archive: &ArchiveName,
    path: &Path,
) -> Result<BTreeMap<String, SecretString>, ResticFileError> {
    let text = read_named_file(path, FILE_BYTES_MAX).map_err(|source| ResticFileError::Unreadable {
        archive: archive.clone(),
        path: path.to_owned(),
        source,
    })?;
    let mut variables = BTreeMap::new();
    for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = |why| {
            let (archive, path) = (archive.clone(), path.to_owned());
            Err(ResticFileError::Line { archive, path, line: number + 1, why })
        };
        let Some((name, value)) = line.split_once('=') else {
            return wrong("is neither a comment nor of the form `KEY=value`");
        };
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        if name.is_empty() || !name.bytes().all(is_name) || name.as_bytes()[0].is_ascii_digit() {
            return wrong("has a name with characters other than letters, digits and `_`");
        }
        if RESERVED.iter().any(|reserved| name.starts_with(reserved)) {
            return wrong("sets a variable that the configuration decides, or that restic must not get");
        }
        if value.chars().any(char::is_control) {
            return wrong("has a value with control characters");
        }
        let quoted = ['"', '\''].iter().find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote));
        variables.insert(name.to_owned(), SecretString::from(quoted.unwrap_or(value)));
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;
    use crate::disk::{Access, RealDisk, replace_file};
    use crate::text::chain;

    fn read(text: &str) -> Result<Vec<(String, String)>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("env");
        replace_file(&RealDisk, &path, text.as_bytes(), Access::Owner).unwrap();
        let read = environment(&"vault".parse().unwrap(), &path);
        let shown = |(name, value): (String, SecretString)| (name, value.expose_secret().to_owned());
        read.map(|read| read.into_iter().map(shown).collect()).map_err(|error| chain(&error))
    }

    #[test]
    fn lines_are_variables_and_what_is_wrong_is_named_and_never_shown() {
        let read_well =
            read("# of the store\n\nAWS_ACCESS_KEY_ID=A\r\nAWS_SECRET_ACCESS_KEY=\"a=b c\"\n").unwrap();
        let expected = [("AWS_ACCESS_KEY_ID", "A"), ("AWS_SECRET_ACCESS_KEY", "a=b c")];
        assert_eq!(read_well, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        for (text, why) in [
            ("hush", "neither a comment"),
            ("A B=hush", "has a name with"),
            ("1A=hush", "has a name with"),
            ("=hush", "has a name with"),
            ("A=hu\u{1}sh", "control characters"),
            ("RESTIC_PASSWORD_COMMAND=hush", "that the configuration decides"),
            ("EXOSCALE_API_SECRET=hush", "restic must not get"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains("line 1 of") && error.contains(why) && !error.contains("hush"), "{error}");
        }
    }

    #[test]
    fn the_password_is_in_the_named_file_or_in_the_credential_of_the_archive() {
        let (archive, folder) = ("vault".parse().unwrap(), tempfile::tempdir().unwrap());
        let named = Path::new("/etc/snapwarden/password");
        let found = |configured, systemd| password_file(&archive, configured, systemd).ok();
        assert_eq!(found(Some(named), Some(folder.path())), Some(named.to_owned()));
        assert_eq!(found(None, Some(folder.path())), None);
        let credential = folder.path().join("archive-vault");
        replace_file(&RealDisk, &credential, b"hush", Access::Owner).unwrap();
        assert_eq!(found(None, Some(folder.path())), Some(credential));
        assert_eq!(found(None, None), None);
    }
}
