//! The key to a bucket, and where it is found.
//!
//! First found: the archive's own `credentials_file`; the systemd credential `archive-<name>`, which holds the same
//! text; `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, with `AWS_SESSION_TOKEN` where the key is a passing one. What
//! was given for this archive comes before what stands in the environment for all. A place with half a pair is an
//! error, and an empty variable counts as none. No error shows a secret.

use std::io;
use std::path::{Path, PathBuf};

use secrecy::SecretString;

use crate::disk::read_named_file;
use crate::policy::ArchiveName;

/// A key, a secret and a token have some hundred characters; a file that has much more is the wrong file.
const MAX_FILE_BYTES: u64 = 16 * 1024;

/// What a file may call the three, and how they are told.
const KEY_NAMES: [&str; 3] = ["api_key", "access_key_id", "aws_access_key_id"];
const SECRET_NAMES: [&str; 3] = ["api_secret", "secret_access_key", "aws_secret_access_key"];
const TOKEN_NAMES: [&str; 2] = ["session_token", "aws_session_token"];

/// A key to a bucket.
#[derive(Debug, Clone)]
pub struct S3Credentials {
    /// It names who asks, and is no secret.
    pub(super) access_key_id: String,
    pub(super) secret_access_key: SecretString,
    pub(super) session_token: Option<SecretString>,
}

/// No usable credentials.
#[derive(Debug, thiserror::Error)]
pub enum S3CredentialsError {
    /// There are none anywhere.
    #[error(
        "archive `{archive}`: no credentials found in {}; set `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or name \
         a file with `api_key=…` and `api_secret=…` as `credentials_file` in `[archives.{archive}]`",
        .looked.join(", nor in ")
    )]
    Missing {
        /// Which archive.
        archive: ArchiveName,
        /// Where they were looked for.
        looked: Vec<String>,
    },
    /// One of the two is there, the other is not.
    #[error(
        "archive `{archive}`: `{have}` is there, but `{lack}` is not; credentials come in pairs: give both or neither"
    )]
    Half {
        /// Which archive.
        archive: ArchiveName,
        /// What was found.
        have: &'static str,
        /// What was not.
        lack: &'static str,
    },
    /// A file that should hold them can't be read.
    #[error("archive `{archive}`: read its credentials from {}; it must be a readable text file", .path.display())]
    Read {
        /// Which archive.
        archive: ArchiveName,
        /// Which file.
        path: PathBuf,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
    /// What was found is none.
    #[error("archive `{archive}`: credentials from {place}")]
    Unusable {
        /// Which archive.
        archive: ArchiveName,
        /// Where they were found.
        place: String,
        /// What is wrong with them.
        #[source]
        source: BadS3Credentials,
    },
}

/// A text that holds no credentials. It is never shown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadS3Credentials {
    /// A line that is nothing we know.
    #[error(
        "line {0} is neither `api_key=…` nor `api_secret=…` (or `aws_access_key_id`, `aws_secret_access_key`, `aws_session_token`) nor a comment"
    )]
    Line(usize),
    /// The same thing twice.
    #[error("line {0} gives a second value for what stands above it; leave one")]
    Twice(usize),
    /// A key is not there.
    #[error("`api_key=…` is missing")]
    LacksKey,
    /// A secret is not there.
    #[error("`api_secret=…` is missing")]
    LacksSecret,
    /// The key can't be one.
    #[error("the key is empty or has characters other than letters, digits, `-`, `_`, `.` and `:`")]
    Key,
    /// The secret can't be one.
    #[error("the secret is empty, or has spaces or control characters in it")]
    Secret,
    /// The token can't be one.
    #[error("the session token has spaces, control characters or letters outside of ASCII in it")]
    Token,
}

impl S3Credentials {
    /// A key, checked for shape only.
    ///
    /// # Errors
    /// [`BadS3Credentials`] if a part can't be what it should be.
    pub fn new(key: &str, secret: &str, token: Option<&str>) -> Result<Self, BadS3Credentials> {
        // It stands in a header among commas and slashes.
        if key.is_empty() || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b)) {
            return Err(BadS3Credentials::Key);
        }
        if secret.is_empty() || secret.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(BadS3Credentials::Secret);
        }
        let token = token.filter(|token| !token.is_empty());
        if token.is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(BadS3Credentials::Token);
        }
        Ok(Self {
            access_key_id: key.to_owned(),
            secret_access_key: secret.into(),
            session_token: token.map(SecretString::from),
        })
    }

    /// Looks in `credentials_file`, among systemd's credentials, and in the environment, in this order.
    ///
    /// # Errors
    /// [`S3CredentialsError`], which says what was looked for and where.
    pub fn find(
        archive: &ArchiveName,
        environment: &dyn Fn(&str) -> Option<String>,
        credentials_file: Option<&Path>,
    ) -> Result<Self, S3CredentialsError> {
        let variable = |name: &str| environment(name).filter(|value| !value.is_empty());
        let unusable = |place: String| {
            let archive = archive.clone();
            move |source| S3CredentialsError::Unusable { archive, place, source }
        };
        let read = |path: PathBuf| {
            let text = read_named_file(&path, MAX_FILE_BYTES);
            text.map_err(|source| S3CredentialsError::Read { archive: archive.clone(), path, source })
        };
        if let Some(path) = credentials_file {
            return parse(&read(path.to_owned())?).map_err(unusable(path.display().to_string()));
        }

        let name = format!("archive-{archive}");
        let place = format!("the systemd credential `{name}`");
        if let Some(folder) = variable("CREDENTIALS_DIRECTORY") {
            match read(Path::new(&folder).join(&name)) {
                Ok(text) => return parse(&text).map_err(unusable(place)),
                Err(S3CredentialsError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }

        let (key, secret) = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY");
        let variables = format!("`{key}` and `{secret}`");
        let half = |have, lack| S3CredentialsError::Half { archive: archive.clone(), have, lack };
        match (variable(key), variable(secret)) {
            (Some(key), Some(secret)) => {
                let token = variable("AWS_SESSION_TOKEN");
                Self::new(key.trim(), secret.trim(), token.as_deref().map(str::trim))
                    .map_err(unusable(variables))
            }
            (None, None) => {
                Err(S3CredentialsError::Missing { archive: archive.clone(), looked: vec![place, variables] })
            }
            (Some(_), None) => Err(half(key, secret)),
            (None, Some(_)) => Err(half(secret, key)),
        }
    }
}

/// Reads the text of a credentials file:
///
/// ```text
/// # made for this bucket alone
/// api_key = EXO0123456789abcdef01234567
/// api_secret = "…"
/// ```
///
/// Empty lines, comments (`#`, `;`) and the line `[default]` are skipped; values may stand in quotes. The names of AWS
/// are understood as well.
fn parse(text: &str) -> Result<S3Credentials, BadS3Credentials> {
    let (mut key, mut secret, mut token) = (None, None, None);
    for (number, line) in (1..).zip(text.trim_start_matches('\u{feff}').lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) || line == "[default]" {
            continue;
        }
        let (name, value) = line.split_once('=').ok_or(BadS3Credentials::Line(number))?;
        let name = name.trim();
        let slot = if KEY_NAMES.contains(&name) {
            &mut key
        } else if SECRET_NAMES.contains(&name) {
            &mut secret
        } else if TOKEN_NAMES.contains(&name) {
            &mut token
        } else {
            return Err(BadS3Credentials::Line(number));
        };
        if slot.replace(unquoted(value.trim())).is_some() {
            return Err(BadS3Credentials::Twice(number));
        }
    }
    let (key, secret) =
        (key.ok_or(BadS3Credentials::LacksKey)?, secret.ok_or(BadS3Credentials::LacksSecret)?);
    S3Credentials::new(key, secret, token)
}

fn unquoted(value: &str) -> &str {
    ['"', '\''].into_iter().find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote)).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;
    use crate::disk::{Access, RealDisk, replace_file};
    use crate::text::chain;

    fn find(variables: &[(&str, &str)], file: Option<&Path>) -> Result<S3Credentials, S3CredentialsError> {
        let environment = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        S3Credentials::find(&"offsite".parse().unwrap(), &environment, file)
    }

    fn file(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(name);
        replace_file(&RealDisk, &path, text.as_bytes(), Access::Owner).unwrap();
        path
    }

    #[test]
    fn what_is_given_for_this_archive_comes_before_what_is_given_for_all() {
        let folder = tempfile::tempdir().unwrap();
        let named =
            file(folder.path(), "named", "\u{feff}# mine\r\n api_key = 'EXO1' \napi_secret=\"a=b/c+d\"\n");
        let variables = [
            ("CREDENTIALS_DIRECTORY", folder.path().to_str().unwrap()),
            ("AWS_ACCESS_KEY_ID", "EXO3"),
            ("AWS_SECRET_ACCESS_KEY", "s3"),
            ("AWS_SESSION_TOKEN", "t"),
        ];
        let found = find(&variables, Some(&named)).unwrap();
        assert_eq!((&*found.access_key_id, found.secret_access_key.expose_secret()), ("EXO1", "a=b/c+d"));
        assert_eq!(find(&variables, None).unwrap().access_key_id, "EXO3");
        assert!(find(&variables, None).unwrap().session_token.is_some());
        let aws = "[default]\naws_access_key_id=EXO2\naws_secret_access_key=s\naws_session_token=t\n";
        file(folder.path(), "archive-offsite", aws);
        let found = find(&variables, None).unwrap();
        assert_eq!((&*found.access_key_id, found.session_token.is_some()), ("EXO2", true));
    }

    #[test]
    fn what_is_missing_half_or_broken_is_told_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let cases = [
            ("", "`api_key=…` is missing"),
            ("api_key=A\n", "`api_secret=…` is missing"),
            ("# x\nhush\n", "line 2 is neither"),
            ("api_key=A\naccess_key_id=hush\n", "line 2 gives a second value"),
            ("api_key=A,hush\napi_secret=hush\n", "the key is empty or has characters"),
            ("api_key=A\napi_secret=hush hush\n", "the secret is empty, or has spaces"),
            ("api_key=A\napi_secret=hush\nsession_token=hush hush\n", "the session token has spaces"),
        ];
        for (text, message) in cases {
            let error = find(&[], Some(&file(folder.path(), "named", text))).unwrap_err();
            let shown = chain(&error);
            assert!(shown.starts_with("archive `offsite`: ") && shown.contains(message), "{shown}");
            assert!(!format!("{error:?}{shown}").contains("hush"), "{error:?}");
        }
        let half = chain(&find(&[("AWS_SECRET_ACCESS_KEY", "hush")], None).unwrap_err());
        assert!(half.contains("`AWS_SECRET_ACCESS_KEY` is there, but `AWS_ACCESS_KEY_ID` is not"), "{half}");
        let nowhere = chain(&find(&[("AWS_ACCESS_KEY_ID", "")], None).unwrap_err());
        assert!(
            nowhere.contains("no credentials found in the systemd credential `archive-offsite`, nor in"),
            "{nowhere}"
        );
        let gone = chain(&find(&[], Some(Path::new("/nowhere/file"))).unwrap_err());
        assert!(gone.contains("read its credentials from /nowhere/file"), "{gone}");
        let credentials = S3Credentials::new("A", "hush", Some("hush")).unwrap();
        assert!(!format!("{credentials:?}").contains("hush"));
    }
}
