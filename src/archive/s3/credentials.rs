//! Where the key to a bucket is found, at first and once it has expired.

use std::fmt::{self, Debug};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use secrecy::ExposeSecret as _;

use crate::credentials::{Credentials, CredentialsError, Search, Source};
use crate::policy::name::ArchiveName;

type Find = dyn Fn() -> Result<Credentials, CredentialsError> + Send + Sync;

/// The key to a bucket. A temporary one is replaced by its issuer, mostly in the file that it was read from.
pub struct BucketKey {
    current: Mutex<Credentials>,
    find: Option<Box<Find>>,
}

impl Debug for BucketKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BucketKey").finish_non_exhaustive()
    }
}

/// A key that stays.
impl From<Credentials> for BucketKey {
    fn from(credentials: Credentials) -> Self {
        Self { current: Mutex::new(credentials), find: None }
    }
}

impl BucketKey {
    /// The key that `find` finds, now and whenever the store refuses it.
    ///
    /// # Errors
    /// That of `find`.
    pub fn read_by(
        find: impl Fn() -> Result<Credentials, CredentialsError> + Send + Sync + 'static,
    ) -> Result<Self, CredentialsError> {
        Ok(Self { current: Mutex::new(find()?), find: Some(Box::new(find)) })
    }

    pub(super) fn current(&self) -> Credentials {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the key again. Whether it is another than the one that was used.
    pub(super) fn renew(&self, used: &Credentials) -> bool {
        match self.find.as_ref().map(|find| find()) {
            Some(Ok(found)) if !is_same(&found, used) => {
                *self.current.lock().unwrap_or_else(PoisonError::into_inner) = found;
                true
            }
            // What the store says of the old one explains more.
            _ => false,
        }
    }
}

fn is_same(one: &Credentials, other: &Credentials) -> bool {
    let token = |of: &Credentials| of.session_token.as_ref().map(|token| token.expose_secret().to_owned());
    one.key == other.key
        && one.secret.expose_secret() == other.secret.expose_secret()
        && token(one) == token(other)
}

/// Looks in `credentials_file`, among systemd's credentials, and in the environment, in this order: what is given for this
/// archive comes before what is given for all.
///
/// # Errors
/// [`CredentialsError`], which says where it looked.
pub fn find(
    archive: &ArchiveName,
    environment: &dyn Fn(&str) -> Option<String>,
    credentials_file: Option<&Path>,
) -> Result<Credentials, CredentialsError> {
    let search = Search {
        purpose: format!("credentials of archive `{archive}`"),
        hint: format!(
            "set `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or name a file with `api_key=…` and `api_secret=…` as \
             `credentials_file` in `[archives.{archive}]`"
        ),
        environment,
        is_bucket: true,
    };
    let name = format!("archive-{archive}");
    let mut sources: Vec<_> = credentials_file.map(Source::File).into_iter().collect();
    let (key, secret) = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY");
    sources.extend([
        Source::Systemd(&name),
        Source::Variables { key, secret, token: Some("AWS_SESSION_TOKEN") },
    ]);
    Ok(search.find(&sources)?.0)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::disk::{Access, RealDisk, replace_file};
    use crate::text::chain;

    fn find(variables: &[(&str, &str)], file: Option<&Path>) -> Result<Credentials, CredentialsError> {
        let environment = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        super::find(&"offsite".parse().unwrap(), &environment, file)
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
        assert_eq!((&*found.key, found.secret.expose_secret()), ("EXO1", "a=b/c+d"));
        assert_eq!(find(&variables, None).unwrap().key, "EXO3");
        assert!(find(&variables, None).unwrap().session_token.is_some());
        let aws = "[default]\naws_access_key_id=EXO2\naws_secret_access_key=s\naws_session_token=t\n";
        file(folder.path(), "archive-offsite", aws);
        let found = find(&variables, None).unwrap();
        assert_eq!((&*found.key, found.session_token.is_some()), ("EXO2", true));
    }

    #[test]
    fn what_is_missing_half_or_invalid_is_reported_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let cases = [
            ("", "`api_key=…` is missing"),
            ("api_key=A\n", "`api_secret=…` is missing"),
            ("# x\nhush\n", "line 2 is neither"),
            ("api_key=A\naccess_key_id=hush\n", "line 2 gives `api_key` a second time"),
            ("api_key=A,hush\napi_secret=hush\n", "the key is empty or has characters"),
            ("api_key=A\napi_secret=hush hush\n", "the secret is empty, or has spaces"),
            ("api_key=A\napi_secret=hush\nsession_token=hush hush\n", "the session token has spaces"),
        ];
        for (text, message) in cases {
            let error = find(&[], Some(&file(folder.path(), "named", text))).unwrap_err();
            let shown = chain(&error);
            assert!(
                shown.starts_with("credentials of archive `offsite` from ") && shown.contains(message),
                "{shown}"
            );
            assert!(!format!("{error:?}{shown}").contains("hush"), "{error:?}");
        }
        let half = chain(&find(&[("AWS_SECRET_ACCESS_KEY", "hush")], None).unwrap_err());
        assert!(half.contains("`AWS_SECRET_ACCESS_KEY`: `AWS_ACCESS_KEY_ID` is missing"), "{half}");
        let nowhere = chain(&find(&[("AWS_ACCESS_KEY_ID", "")], None).unwrap_err());
        assert!(
            nowhere.contains("no credentials of archive `offsite` found in the systemd credential `archive-offsite`, nor in"),
            "{nowhere}"
        );
        let missing = chain(&find(&[], Some(Path::new("/nowhere/file"))).unwrap_err());
        assert!(missing.contains("read credentials of archive `offsite` from /nowhere/file"), "{missing}");
    }
}
