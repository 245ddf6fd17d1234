//! The API key and its secret, and where they are found.
//!
//! First found: `EXOSCALE_API_KEY` and `EXOSCALE_API_SECRET`; `EXOSCALE_API_KEY_FILE` and
//! `EXOSCALE_API_SECRET_FILE`; the systemd credentials `exoscale-api-key` and `exoscale-api-secret`; a
//! credentials file. A place that has only one of the two is an error: going on to the next place would run
//! under a key that the operator did not mean. An empty variable counts as none. No error shows a secret.

use std::io;
use std::path::{Path, PathBuf};

use secrecy::SecretString;

use crate::disk::read_named_file;

/// A key is 27 characters and a secret 43; a file that has much more is the wrong file.
const MAX_FILE_BYTES: u64 = 16 * 1024;

/// An API key and its secret.
#[derive(Debug, Clone)]
pub struct Credentials {
    key: String,
    secret: SecretString,
}

/// No usable credentials.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// There are none anywhere.
    #[error(
        "no API credentials found in {}; set `EXOSCALE_API_KEY` and `EXOSCALE_API_SECRET`, \
        or name a file with `api_key=…` and `api_secret=…` as `credentials_file` in `[exoscale]`",
        .looked.join(", nor in ")
    )]
    Missing {
        /// Where they were looked for.
        looked: Vec<String>,
    },
    /// One of the two is there, the other is not.
    #[error("{have} is there, but {lack} is not; API credentials come in pairs: give both or neither")]
    Half {
        /// What was found.
        have: String,
        /// What was not.
        lack: String,
    },
    /// A file that should hold one of them can't be read.
    #[error("read {what} from {}; it must be a readable text file", .path.display())]
    Read {
        /// What it should hold.
        what: String,
        /// Which file.
        path: PathBuf,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
    /// A credentials file whose lines are not understood.
    #[error("read API credentials from {}", .path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: FileError,
    },
    /// A key or a secret that can't be one.
    #[error("API credentials from {place}")]
    Unusable {
        /// Where it was found.
        place: String,
        /// What is wrong with it.
        #[source]
        source: BadCredentials,
    },
}

/// A text that can't be a key or a secret. It is never shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadCredentials {
    /// The key.
    #[error("the API key is empty or has characters other than letters, digits, `-` and `_`")]
    Key,
    /// The secret.
    #[error("the API secret is empty, or has spaces or control characters in it")]
    Secret,
}

/// A credentials file whose lines are not understood. Its text is never shown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// A line that is nothing we know.
    #[error("line {0} is neither `api_key=…` nor `api_secret=…` nor a comment")]
    Line(usize),
    /// The same key twice.
    #[error("`{0}` stands there twice; leave one")]
    Twice(&'static str),
    /// A key is not there.
    #[error("`{0}=…` is missing")]
    Lacks(&'static str),
    /// A value can't be what it should be.
    #[error(transparent)]
    Unusable(#[from] BadCredentials),
}

impl Credentials {
    /// A key and its secret, checked for shape only.
    ///
    /// # Errors
    /// [`BadCredentials`] if one can't be what it should be.
    pub fn new(key: &str, secret: &str) -> Result<Self, BadCredentials> {
        // It stands in a header among commas.
        if key.is_empty() || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
            return Err(BadCredentials::Key);
        }
        if secret.is_empty() || secret.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(BadCredentials::Secret);
        }
        Ok(Self { key: key.to_owned(), secret: secret.into() })
    }

    /// The key, which is no secret: it names who asks.
    pub fn key(&self) -> &str {
        &self.key
    }

    pub(super) fn secret(&self) -> &SecretString {
        &self.secret
    }
}

/// Looks in the environment, among systemd's credentials, and in `credentials_file`, in this order.
///
/// # Errors
/// [`CredentialsError`], which says what was looked for and where.
pub fn find(
    environment: &dyn Fn(&str) -> Option<String>,
    credentials_file: Option<&Path>,
) -> Result<Credentials, CredentialsError> {
    let variable = |name: &str| environment(name).filter(|value| !value.is_empty());
    let mut looked = Vec::new();

    let (key, secret) = ("EXOSCALE_API_KEY", "EXOSCALE_API_SECRET");
    let place = format!("`{key}` and `{secret}`");
    if let Some((key, secret)) =
        pair((&format!("`{key}`"), variable(key)), (&format!("`{secret}`"), variable(secret)))?
    {
        return usable(place, &key, &secret);
    }
    looked.push(place);

    let (key, secret) = ("EXOSCALE_API_KEY_FILE", "EXOSCALE_API_SECRET_FILE");
    let place = format!("the files of `{key}` and `{secret}`");
    if let Some((key_file, secret_file)) =
        pair((&format!("`{key}`"), variable(key)), (&format!("`{secret}`"), variable(secret)))?
    {
        let read = |what: &str, path: String| {
            let path = PathBuf::from(path);
            read_named_file(&path, MAX_FILE_BYTES).map_err(|source| CredentialsError::Read {
                what: what.to_owned(),
                path,
                source,
            })
        };
        return usable(place, &read("the API key", key_file)?, &read("the API secret", secret_file)?);
    }
    looked.push(place);

    let place = "the systemd credentials `exoscale-api-key` and `exoscale-api-secret`".to_owned();
    if let Some(folder) = variable("CREDENTIALS_DIRECTORY") {
        let read = |name: &str| {
            let path = Path::new(&folder).join(name);
            match read_named_file(&path, MAX_FILE_BYTES) {
                Ok(text) => Ok(Some(text)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(source) => {
                    Err(CredentialsError::Read { what: format!("the credential `{name}`"), path, source })
                }
            }
        };
        if let Some((key, secret)) = pair(
            ("the systemd credential `exoscale-api-key`", read("exoscale-api-key")?),
            ("the systemd credential `exoscale-api-secret`", read("exoscale-api-secret")?),
        )? {
            return usable(place, &key, &secret);
        }
    }
    looked.push(place);

    let Some(path) = credentials_file else {
        return Err(CredentialsError::Missing { looked });
    };
    let path = path.to_owned();
    match read_named_file(&path, MAX_FILE_BYTES) {
        Ok(text) => parse_file(&text).map_err(|source| CredentialsError::File { path, source }),
        Err(source) => Err(CredentialsError::Read { what: "API credentials".to_owned(), path, source }),
    }
}

/// Both, or neither.
fn pair(
    (key_name, key): (&str, Option<String>),
    (secret_name, secret): (&str, Option<String>),
) -> Result<Option<(String, String)>, CredentialsError> {
    match (key, secret) {
        (Some(key), Some(secret)) => Ok(Some((key, secret))),
        (None, None) => Ok(None),
        (Some(_), None) => {
            Err(CredentialsError::Half { have: key_name.to_owned(), lack: secret_name.to_owned() })
        }
        (None, Some(_)) => {
            Err(CredentialsError::Half { have: secret_name.to_owned(), lack: key_name.to_owned() })
        }
    }
}

/// What was found, without the line end that a file usually has.
fn usable(place: String, key: &str, secret: &str) -> Result<Credentials, CredentialsError> {
    Credentials::new(key.trim(), secret.trim()).map_err(|source| CredentialsError::Unusable { place, source })
}

/// Reads the text of a credentials file:
///
/// ```text
/// # made for snapwarden
/// api_key = EXO0123456789abcdef01234567
/// api_secret = "…"
/// ```
///
/// Empty lines and lines that begin with `#` or `;` are skipped; values may stand in quotes.
///
/// # Errors
/// [`FileError`], which names the line but never shows it.
pub fn parse_file(text: &str) -> Result<Credentials, FileError> {
    let (mut key, mut secret) = (None, None);
    for (number, line) in (1..).zip(text.trim_start_matches('\u{feff}').lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        let (name, value) = line.split_once('=').ok_or(FileError::Line(number))?;
        let (name, slot) = match name.trim() {
            "api_key" => ("api_key", &mut key),
            "api_secret" => ("api_secret", &mut secret),
            _ => return Err(FileError::Line(number)),
        };
        if slot.replace(unquoted(value.trim())).is_some() {
            return Err(FileError::Twice(name));
        }
    }
    let key = key.ok_or(FileError::Lacks("api_key"))?;
    let secret = secret.ok_or(FileError::Lacks("api_secret"))?;
    Ok(Credentials::new(key, secret)?)
}

fn unquoted(value: &str) -> &str {
    ['"', '\''].into_iter().find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote)).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;
    use crate::disk::{Access, RealDisk, replace_file};
    use crate::text::chain;

    fn shown(credentials: &Credentials) -> (&str, &str) {
        (credentials.key(), credentials.secret().expose_secret())
    }

    fn find_with(
        variables: &[(&str, &str)],
        credentials_file: Option<&Path>,
    ) -> Result<Credentials, CredentialsError> {
        let environment = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        find(&environment, credentials_file)
    }

    fn file(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(name);
        replace_file(&RealDisk, &path, text.as_bytes(), Access::Owner).unwrap();
        path
    }

    #[test]
    fn a_file_may_have_comments_blanks_and_quotes() {
        let text = "\u{feff}# made by hand\r\n\r\n api_key = 'EXO1' \n; old\napi_secret=\"a=b-c_d\"\n";
        assert_eq!(shown(&parse_file(text).unwrap()), ("EXO1", "a=b-c_d"));
    }

    #[test]
    fn a_bad_file_is_told_by_line_and_never_shown() {
        let cases = [
            ("", "`api_key=…` is missing"),
            ("api_key=EXO1\n", "`api_secret=…` is missing"),
            ("api_secret=hush\n", "`api_key=…` is missing"),
            ("# x\nhush\n", "line 2 is neither `api_key=…` nor `api_secret=…` nor a comment"),
            ("api_key=EXO1\nsecret=hush\n", "line 2 is neither `api_key=…` nor `api_secret=…` nor a comment"),
            ("api_key=A\napi_secret=hush\napi_secret=hush\n", "`api_secret` stands there twice; leave one"),
            (
                "api_key=A,hush\napi_secret=hush\n",
                "the API key is empty or has characters other than letters, digits, `-` and `_`",
            ),
            (
                "api_key=A\napi_secret=hush hush\n",
                "the API secret is empty, or has spaces or control characters in it",
            ),
        ];
        for (text, message) in cases {
            let error = parse_file(text).unwrap_err();
            assert_eq!(error.to_string(), message, "{text:?}");
            assert!(!format!("{error:?}").contains("hush"), "{error:?}");
        }
    }

    #[test]
    fn places_are_searched_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let named = file(path, "credentials", "api_key=EXO4\napi_secret=s4\n");
        let key = file(path, "key", "EXO2\n");
        let secret = file(path, "secret", "s2\n");
        file(path, "exoscale-api-key", "EXO3\n");
        file(path, "exoscale-api-secret", "s3");
        let mut variables = vec![
            ("EXOSCALE_API_KEY", "EXO1"),
            ("EXOSCALE_API_SECRET", "s1"),
            ("EXOSCALE_API_KEY_FILE", key.to_str().unwrap()),
            ("EXOSCALE_API_SECRET_FILE", secret.to_str().unwrap()),
            ("CREDENTIALS_DIRECTORY", path.to_str().unwrap()),
        ];
        let found = |variables: &[(&str, &str)]| find_with(variables, Some(&named)).unwrap().key().to_owned();
        assert_eq!(found(&variables), "EXO1");
        variables.drain(..2);
        assert_eq!(found(&variables), "EXO2");
        variables.drain(..2);
        assert_eq!(found(&variables), "EXO3");
        variables.clear();
        assert_eq!(found(&variables), "EXO4");
        // A service with systemd credentials of its own, none of them ours.
        assert_eq!(found(&[("CREDENTIALS_DIRECTORY", "/nowhere"), ("EXOSCALE_API_KEY", "")]), "EXO4");
    }

    #[test]
    fn half_a_pair_is_an_error_even_where_a_later_place_has_both() {
        let folder = tempfile::tempdir().unwrap();
        let named = file(folder.path(), "credentials", "api_key=EXO4\napi_secret=s4\n");
        file(folder.path(), "exoscale-api-secret", "hush");
        let cases = [
            (vec![("EXOSCALE_API_KEY", "EXO1")], "`EXOSCALE_API_KEY` is there, but `EXOSCALE_API_SECRET` is"),
            (
                vec![("EXOSCALE_API_SECRET", "hush")],
                "`EXOSCALE_API_SECRET` is there, but `EXOSCALE_API_KEY` is",
            ),
            (vec![("EXOSCALE_API_KEY_FILE", "/x")], "`EXOSCALE_API_KEY_FILE` is there, but"),
            (
                vec![("CREDENTIALS_DIRECTORY", folder.path().to_str().unwrap())],
                "the systemd credential `exoscale-api-secret` is there, but the systemd credential",
            ),
        ];
        for (variables, beginning) in cases {
            let message = chain(&find_with(&variables, Some(&named)).unwrap_err());
            assert!(message.starts_with(beginning), "{message}");
            assert!(!message.contains("hush"), "{message}");
        }
    }

    #[test]
    fn nothing_found_says_where_it_was_looked_for_and_what_to_do() {
        let message = chain(&find_with(&[], None).unwrap_err());
        assert_eq!(
            message,
            "no API credentials found in `EXOSCALE_API_KEY` and `EXOSCALE_API_SECRET`, nor in the files of \
             `EXOSCALE_API_KEY_FILE` and `EXOSCALE_API_SECRET_FILE`, nor in the systemd credentials \
             `exoscale-api-key` and `exoscale-api-secret`; set `EXOSCALE_API_KEY` and `EXOSCALE_API_SECRET`, \
             or name a file with `api_key=…` and `api_secret=…` as `credentials_file` in `[exoscale]`"
        );
        let message = chain(&find_with(&[], Some(Path::new("/nowhere/file"))).unwrap_err());
        assert!(message.starts_with("read API credentials from /nowhere/file; it must be"), "{message}");
    }

    #[test]
    fn a_secret_is_never_shown() {
        let credentials = Credentials::new("EXO1", "hush").unwrap();
        assert!(!format!("{credentials:?}").contains("hush"));
    }
}
