//! Signatures, as the platform reads them: those of API requests, and those of presigned addresses.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use jiff::Timestamp;
use sha2::Sha256;
use url::Url;

use crate::text::hex;

/// The `Authorization` header of the API.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Authorization<'a> {
    /// The API key.
    pub(super) credential: &'a str,
    signed_query_args: Vec<&'a str>,
    expires: i64,
    signature: Vec<u8>,
}

impl<'a> Authorization<'a> {
    /// Reads `EXO2-HMAC-SHA256 credential=…[,signed-query-args=a;b],expires=…,signature=…`.
    pub(super) fn read(header: &'a str) -> Option<Self> {
        let mut read = Self::default();
        let mut names = Vec::new();
        for field in header.strip_prefix("EXO2-HMAC-SHA256 ")?.split(',') {
            // The signature may end in `=`.
            let (name, value) = field.split_once('=')?;
            match name {
                "credential" => read.credential = value,
                "signed-query-args" => read.signed_query_args = value.split(';').collect(),
                "expires" => read.expires = value.parse().ok()?,
                "signature" => read.signature = STANDARD.decode(value).ok()?,
                _ => return None,
            }
            names.push(name);
        }
        let whole = ["credential", "signed-query-args", "expires", "signature"];
        let expected = whole.iter().filter(|name| **name != whole[1] || names.contains(name));
        names.iter().eq(expected).then_some(read)
    }

    /// Whether it signs exactly this request, with every query argument, and has not expired at `now`.
    pub(super) fn signs(&self, secret: &str, method: &str, url: &Url, body: &[u8], now: Timestamp) -> bool {
        let mut arguments: Vec<(String, String)> =
            url.query_pairs().map(|(name, value)| (name.into_owned(), value.into_owned())).collect();
        // Signed in the order of their names, as the official clients do it.
        arguments.sort();
        if !arguments.iter().map(|(name, _)| name.as_str()).eq(self.signed_query_args.iter().copied()) {
            return false;
        }
        let values: String = arguments.iter().map(|(_, value)| value.as_str()).collect();
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret.as_bytes()) else { return false };
        mac.update(format!("{method} {}\n", url.path()).as_bytes());
        mac.update(body);
        mac.update(format!("\n{values}\n\n{}", self.expires).as_bytes());
        mac.verify_slice(&self.signature).is_ok() && self.expires > now.as_second()
    }
}

/// The query of a presigned address in the form of AWS' signature version 4. Its signature is our own: only
/// this world has to know it again.
pub(super) fn presign(secret: u64, zone: &str, key: &str, at: Timestamp, lifetime_seconds: u64) -> String {
    let date = at.strftime("%Y%m%dT%H%M%SZ");
    let day = at.strftime("%Y%m%d");
    let query = format!(
        "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=EXOplatform%2F{day}%2F{zone}%2Fs3%2Faws4_request\
         &X-Amz-Date={date}&X-Amz-Expires={lifetime_seconds}&X-Amz-SignedHeaders=host"
    );
    let signature = sign_address(secret, zone, key, &query);
    format!("{query}&X-Amz-Signature={signature}")
}

/// The end of the address' validity, if its signature is ours.
pub(super) fn presigned_until(secret: u64, zone: &str, key: &str, query: &str) -> Option<Timestamp> {
    let (signed, signature) = query.rsplit_once("&X-Amz-Signature=")?;
    if sign_address(secret, zone, key, signed) != signature {
        return None;
    }
    let field = |name: &str| signed.split('&').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
    let at = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", field("X-Amz-Date")?).ok()?;
    let at = jiff::tz::TimeZone::UTC.to_timestamp(at).ok()?;
    let seconds: i64 = field("X-Amz-Expires")?.parse().ok()?;
    at.checked_add(jiff::SignedDuration::from_secs(seconds)).ok()
}

fn sign_address(secret: u64, zone: &str, key: &str, query: &str) -> String {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&secret.to_be_bytes()) else { return String::new() };
    mac.update(format!("GET\n{zone}\n{key}\n{query}").as_bytes());
    hex(&mac.finalize().into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "AbCdEfGhIjKlMnOpQrStUvWxYz-0123456789aBcDef";
    const SNAPSHOT: &str = "/v2/snapshot/b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105";

    fn header(arguments: &str, signature: &str) -> String {
        format!(
            "EXO2-HMAC-SHA256 credential=EXOabcdef0123456789abcdef01,{arguments}expires=1700000000,signature={signature}"
        )
    }

    fn signs(method: &str, path: &str, body: &str, header: &str, now: i64) -> bool {
        let url = Url::parse(&format!("https://api-ch-gva-2.exoscale.com{path}")).unwrap();
        let now = Timestamp::from_second(now).unwrap();
        Authorization::read(header).is_some_and(|read| read.signs(SECRET, method, &url, body.as_bytes(), now))
    }

    /// Made with the vendor's Python library for fixed inputs.
    #[test]
    fn signatures_of_the_vendors_library_are_good() {
        let promote = format!("{SNAPSHOT}:promote");
        let table = [
            ("GET", "/v2/snapshot", "", "", "/kdNYZ9CZdvS/5/S6OqJEQGvreVvUXUaOdIxypwAtb8="),
            (
                "GET",
                "/v2/template?visibility=private&family=ubuntu",
                "",
                "signed-query-args=family;visibility,",
                "Ho/dBpvzQqxSUw0dsb3GJPfIqGWXbRJUghCX7yluc6o=",
            ),
            (
                "POST",
                &promote,
                r#"{"name": "nightly-web-1", "description": "Promoted by daemon", "ssh-key-enabled": true}"#,
                "",
                "rgSibVofE7nul7TOAXwZvHEspsV2ajQ0JWbUKONnP5g=",
            ),
            ("POST", &format!("{SNAPSHOT}:export"), "", "", "g8BrPMl+oOjBp+RvczAa6YnBjWub7eR1VzndhS8LbTk="),
            ("DELETE", SNAPSHOT, "", "", "oGh3C++Cfcu3mQykIV7NM4swKaYsm45cTehQZDn5zow="),
            (
                "GET",
                "/v2/instance?labels=%7B%22env%22%3A+%22prod+%26+test%22%7D",
                "",
                "signed-query-args=labels,",
                "o2SWCcPq0Ts1M4h6EY5XyK0K8X2Br9LSUix6TNYQmjE=",
            ),
            (
                "GET",
                "/v2/operation/e2047130-b86e-11ef-83b3-0d8312b2c2d7",
                "",
                "",
                "85df1PXbA0Cq7QsEK+QCyNNp0ZX8QBX4ZlI/zJhhS4Q=",
            ),
            ("POST", &promote, r#"{"name":"café"}"#, "", "4dhM3O+o1lG4BuZo3FS7T6jjvCZl99DCOExjEMeu95U="),
        ];
        for (method, path, body, arguments, signature) in table {
            let header = header(arguments, signature);
            assert!(signs(method, path, body, &header, 1_699_999_999), "{method} {path}");
            assert!(!signs(method, path, body, &header, 1_700_000_000), "expired: {method} {path}");
            assert!(!signs("PUT", path, body, &header, 1_699_999_999), "another verb: {path}");
            assert!(
                !signs(method, path, &format!("{body} "), &header, 1_699_999_999),
                "another body: {path}"
            );
        }
    }

    #[test]
    fn an_unsigned_query_argument_is_refused() {
        let header = header("", "/kdNYZ9CZdvS/5/S6OqJEQGvreVvUXUaOdIxypwAtb8=");
        assert!(signs("GET", "/v2/snapshot", "", &header, 0));
        assert!(!signs("GET", "/v2/snapshot?a=", "", &header, 0));
    }

    #[test]
    fn a_header_of_another_shape_is_refused() {
        for header in [
            "",
            "EXO2-HMAC-SHA256",
            "EXO2-HMAC-SHA256 credential=a,signature=YQ==,expires=1",
            "EXO2-HMAC-SHA256 credential=a,expires=1",
            "EXO2-HMAC-SHA256 credential=a,expires=1,signature=YQ==,more=1",
            "EXO2-HMAC-SHA256 credential=a, expires=1,signature=YQ==",
            "EXO2-HMAC-SHA256 credential=a,expires=1,signature=YQ",
            "EXO-HMAC-SHA256 credential=a,expires=1,signature=YQ==",
        ] {
            assert_eq!(Authorization::read(header), None, "{header}");
        }
    }

    #[test]
    fn a_presigned_address_names_its_end_and_no_part_of_it_can_be_changed() {
        let at = "2026-11-23T10:00:00Z".parse().unwrap();
        let query = presign(1, "ch-gva-2", "a/b.qcow2", at, 3600);
        let until = presigned_until(1, "ch-gva-2", "a/b.qcow2", &query).unwrap();
        assert_eq!(until.to_string(), "2026-11-23T11:00:00Z");
        assert_eq!(presigned_until(1, "ch-gva-2", "a/c.qcow2", &query), None);
        assert_eq!(presigned_until(1, "ch-gva-2", "a/b.qcow2", &query.replace("3600", "9999")), None);
    }
}
