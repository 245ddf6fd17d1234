//! `EXO2-HMAC-SHA256`: the signature of a request.
//!
//! The message is five segments joined by a line feed: verb and path as on the wire; the body; the values of
//! the query arguments, decoded, in the order of their names; signed headers, of which there are none; the
//! expiry in Unix seconds. From the vendor's page "API request signature" and its Python client
//! (`requests-exoscale-auth` 1.1.2). The bytes that are signed must be the bytes that are sent.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use http::{HeaderValue, Method};
use secrecy::ExposeSecret;
use sha2::Sha256;
use url::Url;

use crate::credentials::Credentials;

/// How long a signature holds, in seconds: as in both of the vendor's clients.
pub(super) const VALID_FOR_SECONDS: i64 = 600;

/// The `Authorization` header of a request; it is marked as sensitive.
///
/// Every query argument is signed, each may stand once only: the vendor's clients disagree about others.
pub(super) fn authorization(
    credentials: &Credentials,
    method: &Method,
    url: &Url,
    body: &[u8],
    expires: i64,
) -> HeaderValue {
    let arguments: BTreeMap<_, _> = url.query_pairs().collect();
    let expires = expires.to_string();

    let mut mac = Hmac::<Sha256>::new_from_slice(credentials.secret.expose_secret().as_bytes())
        .expect("HMAC takes a key of any length");
    mac.update(method.as_str().as_bytes());
    mac.update(b" ");
    mac.update(url.path().as_bytes());
    mac.update(b"\n");
    mac.update(body);
    mac.update(b"\n");
    for value in arguments.values() {
        mac.update(value.as_bytes());
    }
    mac.update(b"\n\n");
    mac.update(expires.as_bytes());
    let signature = STANDARD.encode(mac.finalize().into_bytes());

    let names = arguments.keys().map(AsRef::as_ref).collect::<Vec<&str>>().join(";");
    let signed = if names.is_empty() { String::new() } else { format!(",signed-query-args={names}") };
    let key = &credentials.key;
    let mut header = HeaderValue::try_from(format!(
        "EXO2-HMAC-SHA256 credential={key}{signed},expires={expires},signature={signature}"
    ))
    .expect("a key has letters and digits, and the arguments' names are ours");
    header.set_sensitive(true);
    header
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use serde::Deserialize;

    use super::*;

    const KEY: &str = "EXOabcdef0123456789abcdef01";
    const SECRET: &str = "AbCdEfGhIjKlMnOpQrStUvWxYz-0123456789aBcDef";
    const SNAPSHOT: &str =
        "https://api-ch-gva-2.exoscale.com/v2/snapshot/b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105";

    fn signed(key: &str, secret: &str, method: &str, url: &str, body: &str, expires: i64) -> String {
        let credentials = Credentials::new(key, secret, None).unwrap();
        let (method, url) = (method.parse().unwrap(), Url::parse(url).unwrap());
        let header = authorization(&credentials, &method, &url, body.as_bytes(), expires);
        assert!(header.is_sensitive());
        header.to_str().unwrap().to_owned()
    }

    /// Signatures made by the vendor's Python client.
    #[test]
    fn signatures_are_those_of_the_vendors_client() {
        let cases = [
            (
                "GET",
                "https://api-ch-gva-2.exoscale.com/v2/snapshot".to_owned(),
                "",
                "",
                "/kdNYZ9CZdvS/5/S6OqJEQGvreVvUXUaOdIxypwAtb8=",
            ),
            (
                "GET",
                "https://api-ch-gva-2.exoscale.com/v2/template?visibility=private&family=ubuntu".to_owned(),
                "",
                ",signed-query-args=family;visibility",
                "Ho/dBpvzQqxSUw0dsb3GJPfIqGWXbRJUghCX7yluc6o=",
            ),
            (
                "GET",
                "https://api-ch-gva-2.exoscale.com/v2/instance?labels=%7B%22env%22%3A+%22prod+%26+test%22%7D"
                    .to_owned(),
                "",
                ",signed-query-args=labels",
                "o2SWCcPq0Ts1M4h6EY5XyK0K8X2Br9LSUix6TNYQmjE=",
            ),
            ("POST", format!("{SNAPSHOT}:export"), "", "", "g8BrPMl+oOjBp+RvczAa6YnBjWub7eR1VzndhS8LbTk="),
            (
                "POST",
                format!("{SNAPSHOT}:promote"),
                "{\"name\":\"café\"}",
                "",
                "4dhM3O+o1lG4BuZo3FS7T6jjvCZl99DCOExjEMeu95U=",
            ),
            ("DELETE", SNAPSHOT.to_owned(), "", "", "oGh3C++Cfcu3mQykIV7NM4swKaYsm45cTehQZDn5zow="),
        ];
        for (method, url, body, arguments, signature) in cases {
            assert_eq!(
                signed(KEY, SECRET, method, &url, body, 1_700_000_000),
                format!(
                    "EXO2-HMAC-SHA256 credential={KEY}{arguments},expires=1700000000,signature={signature}"
                ),
                "{method} {url}"
            );
        }
    }

    #[derive(Deserialize)]
    struct Vectors {
        key: String,
        secret: String,
        expires: i64,
        #[serde(rename = "vectors")]
        cases: Vec<Vector>,
    }

    #[derive(Deserialize)]
    struct Vector {
        name: String,
        method: String,
        url: String,
        body: String,
        authorization: String,
    }

    /// A folder of test vectors may lie beside the project, or be named by `SNAPWARDEN_SHARED`.
    #[test]
    fn every_vector_of_the_shared_file_is_met() {
        let folder = std::env::var_os("SNAPWARDEN_SHARED")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
        let path = folder.join("sign-vectors.json");
        let Ok(text) = crate::disk::read_named_file(&path, 1 << 20) else {
            crate::text::skipped(format_args!("there is no {}", path.display()));
            return;
        };
        let Vectors { key, secret, expires, cases } = serde_json::from_str(&text).unwrap();
        assert!(!cases.is_empty());
        for vector in cases {
            let found = signed(&key, &secret, &vector.method, &vector.url, &vector.body, expires);
            assert_eq!(found, vector.authorization, "{}", vector.name);
        }
    }
}
