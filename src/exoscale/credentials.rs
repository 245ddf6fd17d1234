//! Where the API key and its secret are found.

use std::path::Path;

use crate::credentials::{Credentials, CredentialsError, Search, Source};

/// The files of which the service's unit makes its systemd credentials, so that a command beside the daemon uses its key.
pub(crate) const UNIT_FILES: [&str; 2] =
    ["/etc/snapwarden/exoscale-api-key", "/etc/snapwarden/exoscale-api-secret"];

/// Looks in the environment, among systemd's credentials, in `credentials_file`, and in two files such as
/// [`UNIT_FILES`], in this order. The text is where they were found.
///
/// # Errors
/// [`CredentialsError`], which says where it looked.
pub(crate) fn find(
    environment: &dyn Fn(&str) -> Option<String>,
    credentials_file: Option<&Path>,
    [key, secret]: [&Path; 2],
) -> Result<(Credentials, String), CredentialsError> {
    let search = Search {
        purpose: "API credentials".to_owned(),
        hint: "set `EXOSCALE_API_KEY` and `EXOSCALE_API_SECRET`, or name a file with `api_key=…` and `api_secret=…` as \
               `credentials_file` in `[exoscale]`"
            .to_owned(),
        environment,
        is_bucket: false,
    };
    let mut sources = vec![
        Source::Variables { key: "EXOSCALE_API_KEY", secret: "EXOSCALE_API_SECRET", token: None },
        Source::NamedFiles { key: "EXOSCALE_API_KEY_FILE", secret: "EXOSCALE_API_SECRET_FILE" },
        Source::SystemdPair { key: "exoscale-api-key", secret: "exoscale-api-secret" },
    ];
    sources.extend(credentials_file.map(Source::File));
    sources.push(Source::Files { key, secret });
    search.find(&sources).map(|(found, source)| (found, source.to_string()))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::disk::{Access, RealDisk, replace_file};
    use crate::text::chain;

    fn find_with(
        variables: &[(&str, &str)],
        credentials_file: Option<&Path>,
    ) -> Result<Credentials, CredentialsError> {
        let environment = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        find(&environment, credentials_file, NOWHERE.map(Path::new)).map(|(found, _)| found)
    }

    const NOWHERE: [&str; 2] = ["/nowhere/key", "/nowhere/secret"];

    fn file(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(name);
        replace_file(&RealDisk, &path, text.as_bytes(), Access::Owner).unwrap();
        path
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
        let found = |variables: &[(&str, &str)]| find_with(variables, Some(&named)).unwrap().key;
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
    fn the_files_of_the_unit_come_last_and_one_that_may_not_be_read_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let named = file(folder.path(), "credentials", "api_key=EXO4\napi_secret=s4\n");
        let key = file(folder.path(), "exoscale-api-key", "EXO5\n");
        let secret = folder.path().join("exoscale-api-secret");
        let found = |credentials_file| find(&|_: &str| None, credentials_file, [&key, &secret]);
        let half = chain(&found(None).unwrap_err());
        assert!(half.contains("exoscale-api-secret` is missing; give both or neither"), "{half}");
        file(folder.path(), "exoscale-api-secret", "s5\n");
        let (credentials, place) = found(None).unwrap();
        assert_eq!(
            (&*credentials.key, place),
            ("EXO5", format!("{} and {}", key.display(), secret.display()))
        );
        assert_eq!(found(Some(&named)).unwrap().0.key, "EXO4");

        // A folder can't be read as a file by any user.
        let unreadable = chain(&find(&|_: &str| None, None, [folder.path(), &secret]).unwrap_err());
        assert!(unreadable.contains("; it must be a readable text file"), "{unreadable}");
    }

    #[test]
    fn half_a_pair_is_an_error_even_where_a_later_place_has_both() {
        let folder = tempfile::tempdir().unwrap();
        let named = file(folder.path(), "credentials", "api_key=EXO4\napi_secret=s4\n");
        file(folder.path(), "exoscale-api-secret", "hush");
        let cases = [
            (
                vec![("EXOSCALE_API_KEY", "EXO1")],
                "API credentials in `EXOSCALE_API_KEY` and `EXOSCALE_API_SECRET`: `EXOSCALE_API_SECRET` is missing",
            ),
            (
                vec![("EXOSCALE_API_SECRET", "hush")],
                "API credentials in `EXOSCALE_API_KEY` and `EXOSCALE_API_SECRET`: `EXOSCALE_API_KEY` is missing",
            ),
            (
                vec![("EXOSCALE_API_KEY_FILE", "/x")],
                "API credentials in the files of `EXOSCALE_API_KEY_FILE` and `EXOSCALE_API_SECRET_FILE`: \
                 `EXOSCALE_API_SECRET_FILE` is missing; give both or neither",
            ),
            (
                vec![("CREDENTIALS_DIRECTORY", folder.path().to_str().unwrap())],
                "API credentials in the systemd credentials `exoscale-api-key` and `exoscale-api-secret`: \
                 `exoscale-api-key` is missing",
            ),
        ];
        for (variables, beginning) in cases {
            let message = chain(&find_with(&variables, Some(&named)).unwrap_err());
            assert!(message.starts_with(beginning), "{message}");
            assert!(!message.contains("hush"), "{message}");
        }
    }

    #[test]
    fn nothing_found_says_where_it_was_searched_and_what_to_do() {
        let message = chain(&find_with(&[], None).unwrap_err());
        assert_eq!(
            message,
            "no API credentials found in `EXOSCALE_API_KEY` and `EXOSCALE_API_SECRET`, nor in the files of \
             `EXOSCALE_API_KEY_FILE` and `EXOSCALE_API_SECRET_FILE`, nor in the systemd credentials \
             `exoscale-api-key` and `exoscale-api-secret`, nor in /nowhere/key and /nowhere/secret; set `EXOSCALE_API_KEY` and `EXOSCALE_API_SECRET`, \
             or name a file with `api_key=…` and `api_secret=…` as `credentials_file` in `[exoscale]`"
        );
        let message = chain(&find_with(&[], Some(Path::new("/nowhere/file"))).unwrap_err());
        assert!(message.starts_with("read API credentials from /nowhere/file; it must be"), "{message}");
        let folder = tempfile::tempdir().unwrap();
        let aws = file(folder.path(), "aws", "aws_access_key_id=A\naws_secret_access_key=hush\n");
        let message = chain(&find_with(&[], Some(&aws)).unwrap_err());
        assert!(
            message.ends_with("line 1 is neither `api_key=…` nor `api_secret=…` nor a comment"),
            "{message}"
        );
    }
}
