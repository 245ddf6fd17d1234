//! Signature version 4 of requests to S3, in a header or in the address itself.
//!
//! From Amazon's pages "Authenticating Requests: Using the Authorization Header" and "… Using Query Parameters".
//! Every header that a request has when it is signed is signed, and so is the SHA-256 of its body, but for a part whose way is
//! encrypted: a store that checks signatures refuses a body that changed on the way.

use std::fmt::Write as _;

use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderMap, HeaderValue, Method, header};
use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};
use url::Url;

use crate::credentials::Credentials;
use crate::text::hex;

/// In place of the body's hash where there is none.
pub(super) const UNSIGNED: &str = "UNSIGNED-PAYLOAD";

/// The key, the region and the time of a signature.
pub(super) struct Signer<'a> {
    pub(super) credentials: &'a Credentials,
    pub(super) region: &'a str,
    pub(super) now: Timestamp,
}

impl Signer<'_> {
    /// Adds the date, the body's hash and the signature to `headers`. `url` has to be encoded as by [`encode`].
    pub(super) fn sign(&self, method: &Method, url: &Url, body_sha256: &str, headers: &mut HeaderMap) {
        let value = |text: &str| HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static(""));
        headers.insert("x-amz-content-sha256", value(body_sha256));
        headers.insert("x-amz-date", value(&self.time()));
        if let Some(token) = &self.credentials.session_token {
            let mut token = value(token.expose_secret());
            token.set_sensitive(true);
            headers.insert("x-amz-security-token", token);
        }

        let mut lines: Vec<(&str, String)> = headers
            .iter()
            .map(|(name, value)| (name.as_str(), String::from_utf8_lossy(value.as_bytes()).trim().to_owned()))
            .collect();
        lines.push((header::HOST.as_str(), host(url)));
        lines.sort();
        let names = lines.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
        let lines = lines.iter().fold(String::new(), |mut text, (name, value)| {
            let _ = writeln!(text, "{name}:{value}");
            text
        });
        let query = url.query().unwrap_or_default();
        let signature = self.signature(method, url.path(), query, &lines, &names, body_sha256);
        let mut authorization = value(&format!(
            "AWS4-HMAC-SHA256 Credential={}/{},SignedHeaders={names},Signature={signature}",
            self.credentials.key,
            self.scope()
        ));
        authorization.set_sensitive(true);
        headers.insert(header::AUTHORIZATION, authorization);
    }

    /// An address at which anybody may send this request, for `seconds`.
    pub(super) fn presign(&self, method: &Method, url: &Url, seconds: u64) -> SecretString {
        let mut arguments = vec![
            ("X-Amz-Algorithm", "AWS4-HMAC-SHA256".to_owned()),
            ("X-Amz-Credential", format!("{}/{}", self.credentials.key, self.scope())),
            ("X-Amz-Date", self.time()),
            ("X-Amz-Expires", seconds.to_string()),
        ];
        if let Some(token) = &self.credentials.session_token {
            arguments.push(("X-Amz-Security-Token", token.expose_secret().to_owned()));
        }
        arguments.push(("X-Amz-SignedHeaders", "host".to_owned()));
        let own: Vec<(String, String)> = url.query_pairs().into_owned().collect();
        let own = own.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let query = query(arguments.iter().map(|(name, value)| (*name, value.as_str())).chain(own));
        let lines = format!("host:{}\n", host(url));
        let signature = self.signature(method, url.path(), &query, &lines, "host", UNSIGNED);
        let mut signed = url.clone();
        signed.set_query(Some(&format!("{query}&X-Amz-Signature={signature}")));
        SecretString::from(String::from(signed))
    }

    fn signature(
        &self,
        method: &Method,
        path: &str,
        query: &str,
        header_lines: &str,
        header_names: &str,
        body: &str,
    ) -> String {
        let canonical = format!("{method}\n{path}\n{query}\n{header_lines}\n{header_names}\n{body}");
        let scope = self.scope();
        let message =
            format!("AWS4-HMAC-SHA256\n{}\n{scope}\n{}", self.time(), sha256_hex(canonical.as_bytes()));
        let mut secret = b"AWS4".to_vec();
        secret.extend_from_slice(self.credentials.secret.expose_secret().as_bytes());
        let key = scope.split('/').fold(secret, |key, part| mac(&key, part.as_bytes()));
        hex(&mac(&key, message.as_bytes()))
    }

    fn time(&self) -> String {
        self.now.strftime("%Y%m%dT%H%M%SZ").to_string()
    }

    fn scope(&self) -> String {
        format!("{}/{}/s3/aws4_request", self.now.strftime("%Y%m%d"), self.region)
    }
}

fn mac(key: &[u8], message: &[u8]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
    mac.update(message);
    mac.finalize().into_bytes().to_vec()
}

/// As the HTTP client sends it: with the port only where it is not the default one.
fn host(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// The arguments of a query, encoded and in the order in which they are signed.
pub(super) fn query<'a>(arguments: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut parts: Vec<String> = arguments
        .into_iter()
        .map(|(name, value)| format!("{}={}", encode(name, false), encode(value, false)))
        .collect();
    parts.sort();
    parts.join("&")
}

/// Percent-encodes all characters but those that the signature leaves as they are; slashes too, except in a path.
pub(super) fn encode(text: &str, is_path: bool) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || (is_path && byte == b'/') {
            encoded.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

pub(super) fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key of Amazon's own examples.
    fn amazons() -> Credentials {
        Credentials::new("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", None).unwrap()
    }

    fn signer(credentials: &Credentials) -> Signer<'_> {
        Signer { credentials, region: "us-east-1", now: "2013-05-24T00:00:00Z".parse().unwrap() }
    }

    fn signature(method: &Method, url: &str, body: &str, headers: &[(&'static str, &'static str)]) -> String {
        let credentials = amazons();
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, HeaderValue::from_static(value));
        }
        let url = Url::parse(url).unwrap();
        signer(&credentials).sign(method, &url, &sha256_hex(body.as_bytes()), &mut map);
        assert!(map[header::AUTHORIZATION].is_sensitive());
        map[header::AUTHORIZATION].to_str().unwrap().rsplit_once('=').unwrap().1.to_owned()
    }

    /// The four examples of "Signature Calculations for the Authorization Header".
    #[test]
    fn signatures_are_those_of_amazons_examples() {
        let bucket = "https://examplebucket.s3.amazonaws.com";
        let get = &Method::GET;
        assert_eq!(
            signature(get, &format!("{bucket}/test.txt"), "", &[("range", "bytes=0-9")]),
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
        assert_eq!(
            signature(
                &Method::PUT,
                &format!("{bucket}/test%24file.text"),
                "Welcome to Amazon S3.",
                &[("date", "Fri, 24 May 2013 00:00:00 GMT"), ("x-amz-storage-class", "REDUCED_REDUNDANCY")]
            ),
            "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"
        );
        assert_eq!(
            signature(get, &format!("{bucket}/?lifecycle="), "", &[]),
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"
        );
        assert_eq!(
            signature(get, &format!("{bucket}/?{}", query([("prefix", "J"), ("max-keys", "2")])), "", &[]),
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"
        );
    }

    /// The example of "Authenticating Requests: Using Query Parameters".
    #[test]
    fn a_presigned_address_is_that_of_amazons_example() {
        let credentials = amazons();
        let url = Url::parse("https://examplebucket.s3.amazonaws.com/test.txt").unwrap();
        let signed = signer(&credentials).presign(&Method::GET, &url, 86_400);
        assert_eq!(
            signed.expose_secret(),
            "https://examplebucket.s3.amazonaws.com/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256\
             &X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2Faws4_request\
             &X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host\
             &X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
        );
        assert!(!format!("{signed:?}").contains("Signature"));
    }

    #[test]
    fn a_session_token_is_sent_and_signed() {
        let credentials = Credentials::new("A", "s", Some("a/b+c")).unwrap();
        let url = Url::parse("http://127.0.0.1:9000/bucket/key").unwrap();
        let mut headers = HeaderMap::new();
        signer(&credentials).sign(&Method::GET, &url, UNSIGNED, &mut headers);
        assert!(headers["x-amz-security-token"].is_sensitive());
        let authorization = headers[header::AUTHORIZATION].to_str().unwrap();
        assert!(authorization.contains("host;x-amz-content-sha256;x-amz-date;x-amz-security-token"));
        let presigned = signer(&credentials).presign(&Method::GET, &url, 60);
        assert!(presigned.expose_secret().contains("X-Amz-Security-Token=a%2Fb%2Bc&"));
    }

    #[test]
    fn whatever_is_not_plain_is_encoded() {
        assert_eq!(encode("a/b c+ü~", true), "a/b%20c%2B%C3%BC~");
        assert_eq!(encode("a/b", false), "a%2Fb");
    }
}
