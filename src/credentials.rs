//! API keys and their secrets, and the places where they are found.
//!
//! Each service lists its sources, and the first that has credentials decides. A source with half a pair is an error:
//! going on to the next one would run under a key that the operator did not mean. An empty variable counts as none.
//! No error and no `Debug` text shows a secret.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;

use secrecy::SecretString;

use crate::disk::read_named_file;

/// A key and a secret have some 70 characters, with a session token some hundred more; a file of this size is the wrong
/// file.
const MAX_FILE_BYTES: u64 = 16 * 1024;

/// The names of a key, a secret and a session token in a credentials file. The API's file has the first key and the first
/// secret only: a session token there would be ignored, and AWS's names belong to a bucket.
const KEY_NAMES: [&str; 3] = ["api_key", "access_key_id", "aws_access_key_id"];
const SECRET_NAMES: [&str; 3] = ["api_secret", "secret_access_key", "aws_secret_access_key"];
const TOKEN_NAMES: [&str; 2] = ["session_token", "aws_session_token"];

/// An API key and its secret.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// It says who sends a request, and is no secret.
    pub(crate) key: String,
    pub(crate) secret: SecretString,
    /// With a temporary key of S3.
    pub(crate) session_token: Option<SecretString>,
}

/// A place where credentials may be.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source<'a> {
    /// In environment variables: the key, the secret, and the session token if the service has one.
    Variables { key: &'a str, secret: &'a str, token: Option<&'a str> },
    /// In two files that environment variables name.
    NamedFiles { key: &'a str, secret: &'a str },
    /// In two of systemd's credentials.
    SystemdPair { key: &'a str, secret: &'a str },
    /// In one of systemd's credentials, with the text of a credentials file.
    Systemd(&'a str),
    /// In a credentials file.
    File(&'a Path),
    /// In two files, if they exist.
    Files { key: &'a Path, secret: &'a Path },
}

impl fmt::Display for Source<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Variables { key, secret, .. } => write!(f, "`{key}` and `{secret}`"),
            Self::NamedFiles { key, secret } => write!(f, "the files of `{key}` and `{secret}`"),
            Self::SystemdPair { key, secret } => write!(f, "the systemd credentials `{key}` and `{secret}`"),
            Self::Systemd(name) => write!(f, "the systemd credential `{name}`"),
            Self::File(path) => path.display().fmt(f),
            Self::Files { key, secret } => write!(f, "{} and {}", key.display(), secret.display()),
        }
    }
}

/// No usable credentials. The text says for what, and where they were looked for.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct CredentialsError {
    text: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

/// Why a text holds no credentials. Nothing of the text is shown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidCredentials(Cow<'static, str>);

impl Credentials {
    /// A key and its secret, with a session token for a temporary key; only their form is checked.
    ///
    /// # Errors
    /// [`InvalidCredentials`].
    pub fn new(key: &str, secret: &str, token: Option<&str>) -> Result<Self, InvalidCredentials> {
        // It is sent in a header, among commas and slashes.
        if key.is_empty() || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b)) {
            return invalid(
                "the key is empty or has characters other than letters, digits, `-`, `_`, `.` and `:`",
            );
        }
        if secret.is_empty() || secret.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return invalid("the secret is empty, or has spaces or control characters in it");
        }
        let token = token.filter(|token| !token.is_empty());
        if token.is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            return invalid(
                "the session token has spaces, control characters or letters outside of ASCII in it",
            );
        }
        let session_token = token.map(SecretString::from);
        Ok(Self { key: key.to_owned(), secret: secret.into(), session_token })
    }
}

fn invalid<T>(why: impl Into<Cow<'static, str>>) -> Result<T, InvalidCredentials> {
    Err(InvalidCredentials(why.into()))
}

/// A search for credentials.
pub(crate) struct Search<'a> {
    /// What they are for, in errors: "API credentials".
    pub(crate) purpose: String,
    /// How to give them, if there are none.
    pub(crate) hint: String,
    /// Environment variables by name.
    pub(crate) environment: &'a dyn Fn(&str) -> Option<String>,
    /// Whether a credentials file may have what is in AWS's files: their names, `[default]`, a session token.
    pub(crate) is_bucket: bool,
}

impl Search<'_> {
    /// The credentials of the first of `sources` that has any, and that source.
    pub(crate) fn find<'a, 'b>(
        self,
        sources: &'b [Source<'a>],
    ) -> Result<(Credentials, &'b Source<'a>), CredentialsError> {
        for source in sources {
            if let Some(found) = self.read(source)? {
                return found.map(|found| (found, source)).map_err(|error| CredentialsError {
                    text: format!("{} from {source}", self.purpose),
                    source: Some(error.into()),
                });
            }
        }
        let searched = sources.iter().map(ToString::to_string).collect::<Vec<_>>().join(", nor in ");
        let text = format!("no {} found in {searched}; {}", self.purpose, self.hint);
        Err(CredentialsError { text, source: None })
    }

    /// A secret alone: the text of `file`, else that of one of systemd's credentials, if there is one.
    pub(crate) fn secret(
        &self,
        file: Option<&Path>,
        systemd: &str,
    ) -> Result<Option<SecretString>, CredentialsError> {
        let text = match file {
            Some(file) => Some(self.file(file)?),
            None => self.systemd(systemd)?,
        };
        // Files usually end with a line break.
        Ok(text.map(|text| SecretString::from(text.trim_start_matches('\u{feff}').trim())))
    }

    /// The credentials in one source; `None` if it has none.
    fn read(
        &self,
        source: &Source<'_>,
    ) -> Result<Option<Result<Credentials, InvalidCredentials>>, CredentialsError> {
        let (key, secret) = match *source {
            Source::File(path) => return Ok(Some(parse(&self.file(path)?, self.is_bucket))),
            Source::Systemd(name) => return Ok(self.systemd(name)?.map(|text| parse(&text, self.is_bucket))),
            Source::SystemdPair { key, secret } => {
                self.pair(source, (key, self.systemd(key)?), (secret, self.systemd(secret)?))?
            }
            Source::Files { key, secret } => {
                let name = |path: &Path| path.display().to_string();
                let (read_key, read_secret) = (self.file_if_any(key)?, self.file_if_any(secret)?);
                self.pair(source, (&name(key), read_key), (&name(secret), read_secret))?
            }
            Source::Variables { key, secret, .. } | Source::NamedFiles { key, secret } => {
                self.pair(source, (key, self.variable(key)), (secret, self.variable(secret)))?
            }
        }
        .unzip();
        let (Some(mut key), Some(mut secret)) = (key, secret) else { return Ok(None) };
        let mut token = None;
        match source {
            Source::NamedFiles { .. } => {
                (key, secret) = (self.file(key.as_ref())?, self.file(secret.as_ref())?);
            }
            Source::Variables { token: name, .. } => token = name.and_then(|name| self.variable(name)),
            _ => {}
        }
        // Files usually end with a line break.
        Ok(Some(Credentials::new(key.trim(), secret.trim(), token.as_deref().map(str::trim))))
    }

    fn variable(&self, name: &str) -> Option<String> {
        (self.environment)(name).filter(|value| !value.is_empty())
    }

    fn file(&self, path: &Path) -> Result<String, CredentialsError> {
        read_named_file(path, MAX_FILE_BYTES).map_err(|error| self.unreadable(path, error))
    }

    fn unreadable(&self, path: &Path, error: io::Error) -> CredentialsError {
        let wanted = match error.kind() {
            io::ErrorKind::PermissionDenied => {
                "this user may not read it: run snapwarden as root or as a user that may"
            }
            _ => "it must be a readable text file",
        };
        let text = format!("read {} from {}; {wanted}", self.purpose, path.display());
        CredentialsError { text, source: Some(error.into()) }
    }

    /// One of systemd's credentials, which are files in a folder.
    fn systemd(&self, name: &str) -> Result<Option<String>, CredentialsError> {
        let Some(folder) = self.variable("CREDENTIALS_DIRECTORY") else { return Ok(None) };
        self.file_if_any(&Path::new(&folder).join(name))
    }

    fn file_if_any(&self, path: &Path) -> Result<Option<String>, CredentialsError> {
        match read_named_file(path, MAX_FILE_BYTES) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.unreadable(path, error)),
        }
    }

    /// Both, or neither.
    fn pair(
        &self,
        source: &Source<'_>,
        (key_name, key): (&str, Option<String>),
        (secret_name, secret): (&str, Option<String>),
    ) -> Result<Option<(String, String)>, CredentialsError> {
        let missing = match (&key, &secret) {
            (Some(_), None) => secret_name,
            (None, Some(_)) => key_name,
            _ => return Ok(key.zip(secret)),
        };
        let text = format!("{} in {source}: `{missing}` is missing; give both or neither", self.purpose);
        Err(CredentialsError { text, source: None })
    }
}

/// Reads the text of a credentials file:
///
/// ```text
/// # for snapwarden
/// api_key = EXO0123456789abcdef01234567
/// api_secret = "…"
/// ```
///
/// Empty lines and comments (`#`, `;`) are skipped; values may be quoted. A bucket's file may also be one of AWS's, with
/// their names, a session token, and the line `[default]`.
fn parse(text: &str, is_bucket: bool) -> Result<Credentials, InvalidCredentials> {
    let for_buckets = if is_bucket {
        " (or `aws_access_key_id`, `aws_secret_access_key`, `aws_session_token`)"
    } else {
        ""
    };
    let is_one_of = |names: &[&str], name| {
        if is_bucket { names.contains(&name) } else { names.first() == Some(&name) }
    };
    let (mut key, mut secret, mut token) = (None, None, None);
    for (number, line) in (1..).zip(text.trim_start_matches('\u{feff}').lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) || (is_bucket && line == "[default]") {
            continue;
        }
        let (name, value) = line.split_once('=').unwrap_or_default();
        let name = name.trim();
        let (slot, name) = if is_one_of(&KEY_NAMES, name) {
            (&mut key, KEY_NAMES[0])
        } else if is_one_of(&SECRET_NAMES, name) {
            (&mut secret, SECRET_NAMES[0])
        } else if is_bucket && TOKEN_NAMES.contains(&name) {
            (&mut token, TOKEN_NAMES[0])
        } else {
            return invalid(format!(
                "line {number} is neither `api_key=…` nor `api_secret=…`{for_buckets} nor a comment"
            ));
        };
        if slot.replace(unquoted(value.trim())).is_some() {
            return invalid(format!("line {number} gives `{name}` a second time: leave one"));
        }
    }
    let Some(key) = key else { return invalid("`api_key=…` is missing") };
    let Some(secret) = secret else { return invalid("`api_secret=…` is missing") };
    Credentials::new(key, secret, token)
}

fn unquoted(value: &str) -> &str {
    ['"', '\''].into_iter().find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote)).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    fn shown(credentials: &Credentials) -> (&str, &str, Option<&str>) {
        let token = credentials.session_token.as_ref().map(SecretString::expose_secret);
        (&credentials.key, credentials.secret.expose_secret(), token)
    }

    #[test]
    fn a_file_may_have_comments_blanks_and_quotes() {
        let text = "\u{feff}# written manually\r\n\r\n api_key = 'EXO1' \n; old\napi_secret=\"a=b-c_d/+\"\n";
        assert_eq!(shown(&parse(text, false).unwrap()), ("EXO1", "a=b-c_d/+", None));
        assert_eq!(shown(&parse(text, true).unwrap()), ("EXO1", "a=b-c_d/+", None));
        let aws = "[default]\naws_access_key_id=EXO2\naws_secret_access_key=s\naws_session_token=t\n";
        assert_eq!(shown(&parse(aws, true).unwrap()), ("EXO2", "s", Some("t")));
    }

    #[test]
    fn an_invalid_file_is_reported_by_line_and_never_shown() {
        let cases = [
            ("", "`api_key=…` is missing"),
            ("api_key=EXO1\n", "`api_secret=…` is missing"),
            ("api_secret=hush\n", "`api_key=…` is missing"),
            (
                "api_key=A\napi_secret=hush\napi_secret=hush\n",
                "line 3 gives `api_secret` a second time: leave one",
            ),
            ("api_key=A\naccess_key_id=hush\n", "line 2 gives `api_key` a second time: leave one"),
            (
                "api_key=A,hush\napi_secret=hush\n",
                "the key is empty or has characters other than letters, digits, `-`, `_`, `.` and `:`",
            ),
            (
                "api_key=A\napi_secret=hush hush\n",
                "the secret is empty, or has spaces or control characters in it",
            ),
            (
                "api_key=A\napi_secret=hush\nsession_token=hush hush\n",
                "the session token has spaces, control characters or letters outside of ASCII in it",
            ),
        ];
        for (text, message) in cases {
            let error = parse(text, true).unwrap_err();
            assert_eq!(error.to_string(), message, "{text:?}");
            assert!(!format!("{error:?}").contains("hush"), "{error:?}");
        }
    }

    #[test]
    fn the_names_in_a_file_depend_on_the_service_and_an_unknown_line_is_answered_with_them() {
        let api = "line 2 is neither `api_key=…` nor `api_secret=…` nor a comment";
        let bucket = "line 2 is neither `api_key=…` nor `api_secret=…` (or `aws_access_key_id`, \
                      `aws_secret_access_key`, `aws_session_token`) nor a comment";
        for line in ["hush", "secret=hush"] {
            let text = format!("# x\n{line}\napi_key=A\napi_secret=hush\n");
            assert_eq!(parse(&text, false).unwrap_err().to_string(), api);
            assert_eq!(parse(&text, true).unwrap_err().to_string(), bucket);
        }
        let names_of_a_bucket = [
            "access_key_id=A\nsecret_access_key=hush\n",
            "aws_access_key_id=A\naws_secret_access_key=hush\n",
            "api_key=A\nsecret_access_key=hush\n",
            "api_key=A\naws_secret_access_key=hush\n",
            "session_token=hush\napi_key=A\napi_secret=hush\n",
            "aws_session_token=hush\napi_key=A\napi_secret=hush\n",
            "[default]\napi_key=A\napi_secret=hush\n",
        ];
        for text in names_of_a_bucket {
            assert!(parse(text, true).is_ok(), "{text}");
            let error = parse(text, false).unwrap_err();
            assert!(error.to_string().ends_with("nor `api_secret=…` nor a comment"), "{text}: {error}");
            assert!(!format!("{error:?} {error}").contains("hush"), "{error:?}");
        }
    }

    #[test]
    fn a_secret_is_never_shown() {
        let credentials = Credentials::new("EXO1", "hush", Some("hush")).unwrap();
        assert!(!format!("{credentials:?}").contains("hush"));
    }
}
