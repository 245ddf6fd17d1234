//! Reads the web configuration file: who may use the HTTP port, in the form of Prometheus' exporter-toolkit
//! (<https://github.com/prometheus/exporter-toolkit/blob/master/docs/web-configuration.md>).
//!
//! What that form has and this port does not is refused, rather than relied on in vain.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use crate::config::diagnostics::{Diagnostic, Diagnostics, Kind, Sources};
use crate::config::keys::KnownKeys;
use crate::config::toml_reader::{OpenFile, Table, Value};
use crate::config::yaml;
use crate::text::InvalidText;

/// The most bytes of the file: some hundred users.
pub const FILE_BYTES_MAX: u64 = 64 * 1024;

/// With 15 a password takes about two seconds; each more doubles that, and one waits for the other.
const COST_MAX: u32 = 15;

/// The versions of bcrypt that are one and the same but for their names.
const BCRYPT_VERSIONS: [&str; 3] = ["$2a$", "$2b$", "$2y$"];

/// The suites of TLS 1.2 that can be named: rustls has no weaker ones.
const CIPHER_SUITES: [&str; 6] = [
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
];

/// Section, key, why it is not possible: what the form has beside the keys that are read.
const NOT_SUPPORTED: [(&str, &str, &str); 9] = [
    ("tls_server_config", "cert", "write it to a file, and name it as `cert_file`"),
    ("tls_server_config", "key", "write it to a file, and name it as `key_file`"),
    ("tls_server_config", "client_ca", "write it to a file, and name it as `client_ca_file`"),
    (
        "tls_server_config",
        "client_allowed_sans",
        "let an authority of its own sign the certificates of those who may ask",
    ),
    ("tls_server_config", "prefer_server_cipher_suites", "take it out: the server's order always counts"),
    ("tls_server_config", "curve_preferences", "take it out"),
    ("http_server_config.headers", "Content-Security-Policy", "take it out: this port sets its own"),
    ("", "rate_limit", "take it out: connections are limited in number and time already"),
    ("", "auth_excluded_paths", "take it out: `/livez`, `/readyz` and `/healthz` never ask for a password"),
];

/// Who may use the port, and how.
#[derive(Debug, Default)]
pub struct WebSettings {
    /// Certificates; without them the port speaks plain HTTP.
    pub tls: Option<TlsSettings>,
    /// Headers of every response.
    pub headers: Vec<(&'static str, String)>,
    /// Users and the hashes of their passwords; without any, no password is asked for.
    pub users: BTreeMap<String, PasswordHash>,
}

/// The section `tls_server_config`.
#[derive(Debug, PartialEq, Eq)]
pub struct TlsSettings {
    /// The certificate, and those that lead to its authority, in PEM.
    pub cert_file: PathBuf,
    /// Its key, in PEM.
    pub key_file: PathBuf,
    /// Whether clients need a certificate, and the authorities, in PEM, of which one must have signed it.
    pub client_auth: Option<(ClientAuth, PathBuf)>,
    /// Whether TLS 1.2 is spoken.
    pub tls12: bool,
    /// Whether TLS 1.3 is spoken.
    pub tls13: bool,
    /// The suites of TLS 1.2 that may be used; `None` for all.
    pub cipher_suites: Option<Vec<&'static str>>,
}

/// Whether clients need a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// One that has none is let in, one that has a wrong one is not.
    IfGiven,
    /// All.
    Required,
}

/// A password's hash by bcrypt. It is not shown: a weak password can be guessed from it.
#[derive(Clone, PartialEq, Eq)]
pub struct PasswordHash(String);

impl fmt::Debug for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordHash(…)")
    }
}

impl PasswordHash {
    fn new(text: &str) -> Result<Self, InvalidText> {
        let help = "write the hash that `htpasswd -nBC 10 NAME` prints behind the colon";
        let wrong = |fact: &str| InvalidText::new(fact, help);
        let parts: bcrypt::HashParts =
            text.parse().map_err(|_| wrong("this is no hash of a password by bcrypt"))?;
        if !BCRYPT_VERSIONS.iter().any(|version| text.starts_with(version)) {
            return Err(wrong("this version of bcrypt is broken"));
        }
        if !(4..=COST_MAX).contains(&parts.get_cost()) {
            return Err(InvalidText::new(
                format!("the cost of this hash is {}", parts.get_cost()),
                format!(
                    "4 to {COST_MAX} are possible, 10 to 12 are usual: the port would take too long to answer"
                ),
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// The hash as it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is the password. It takes a tenth of a second or more.
    pub fn fits(&self, password: &[u8]) -> bool {
        bcrypt::verify(password, &self.0).unwrap_or(false)
    }
}

/// Reads the text of a web configuration file. Paths in it are relative to `folder`; `file_name` is for the diagnostics.
///
/// # Errors
/// All errors at once, in the order of the file.
pub fn parse(text: &str, file_name: &str, folder: &Path) -> Result<WebSettings, Diagnostics> {
    let file = OpenFile::of_yaml(known_keys());
    let mut root = yaml::read(text, &file);
    refuse_unsupported(&mut root, &file);
    let settings = read(&file.root(&root), folder);
    match file.finish(&Sources::of_one(file_name, text), &[]) {
        None => Ok(settings),
        Some(diagnostics) => Err(diagnostics),
    }
}

/// Every key that a file may have, found by reading one without any.
fn known_keys() -> KnownKeys {
    let file = OpenFile::default();
    read(&file.root(&DeTable::new()), Path::new(""));
    file.into_asked()
}

/// Takes out what the form has and this port does not.
fn refuse_unsupported(root: &mut DeTable<'_>, file: &OpenFile) {
    for (section, key, help) in NOT_SUPPORTED {
        let mut table = Some(&mut *root);
        for name in section.split('.').filter(|name| !name.is_empty()) {
            table = table.and_then(|table| match table.get_mut(name)?.get_mut() {
                toml::de::DeValue::Table(table) => Some(table),
                _ => None,
            });
        }
        if let Some((found, _)) = table.and_then(|table| table.remove_entry(key)) {
            let subject = if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
            let (span, fact, help) =
                (Some(found.span()), "this is not supported".to_owned(), help.to_owned());
            file.report(Diagnostic { span, subject, fact, help, kind: Kind::Secret });
        }
    }
}

fn read(root: &Table<'_>, folder: &Path) -> WebSettings {
    let users = root.table("basic_auth_users").each(|value| {
        let hash = value.hidden_text().map(PasswordHash::new);
        match hash.unwrap_or_else(|| PasswordHash::new("")) {
            Ok(hash) => Some(hash),
            Err(InvalidText { fact, help }) => {
                value.place().wrong_secret(fact, help);
                None
            }
        }
    });
    let http = root.table("http_server_config");
    if let Some(value) = http.value("http2")
        && value.boolean() == Some(true)
    {
        value.place().wrong("this port speaks HTTP/1.1 alone", "write `false`, or take the key out");
    }
    WebSettings {
        tls: read_tls(&root.table("tls_server_config"), folder),
        headers: read_headers(&http.table("headers")),
        users: users.into_iter().collect(),
    }
}

fn read_headers(table: &Table<'_>) -> Vec<(&'static str, String)> {
    let choice = |name, choices: &[(&str, &'static str)]| table.choice(name, choices).map(str::to_owned);
    let is_plain = |text: &str| !text.is_empty() && text.bytes().all(|b| matches!(b, b' '..=b'~'));
    let text = |name| table.value(name)?.written("a header's value", "plain ASCII text", is_plain);
    // That one is always sent.
    choice("X-Content-Type-Options", &[("nosniff", "nosniff")]);
    let headers = [
        ("X-Frame-Options", choice("X-Frame-Options", &[("deny", "deny"), ("sameorigin", "sameorigin")])),
        ("X-XSS-Protection", text("X-XSS-Protection")),
        ("Strict-Transport-Security", text("Strict-Transport-Security")),
    ];
    headers.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

fn read_tls(table: &Table<'_>, folder: &Path) -> Option<TlsSettings> {
    let path = |value: &Value<'_>| value.line(4096).map(|text| folder.join(text));
    let cert_file = table.required("cert_file", "write the file with the certificate, in PEM");
    let key_file = table.required("key_file", "write the file with the certificate's key, in PEM");
    let modes = [
        ("NoClientCert", None),
        ("VerifyClientCertIfGiven", Some(ClientAuth::IfGiven)),
        ("RequireAndVerifyClientCert", Some(ClientAuth::Required)),
    ];
    let mode = table.choice("client_auth_type", &modes);
    let client_ca = table.value("client_ca_file");
    match (mode, &client_ca) {
        (Some(Some(_)), None) => table.place().missing(
            "`client_ca_file` is missing",
            "write the file with the authorities that sign the clients' certificates, in PEM",
        ),
        (mode, Some(value)) if mode == Some(None) || table.value("client_auth_type").is_none() => {
            value.place().wrong(
                "no client is asked for a certificate",
                "write `client_auth_type: RequireAndVerifyClientCert`, or take it out",
            );
        }
        _ => {}
    }
    let versions = [("TLS12", 12), ("TLS13", 13)];
    let (min, max) = (table.choice("min_version", &versions), table.choice("max_version", &versions));
    let (min, max) = (min.unwrap_or(12), max.unwrap_or(13));
    if min > max
        && let Some(value) = table.value("min_version")
    {
        value.place().wrong("it is later than `max_version`", "correct one of them");
    }
    let cipher_suites = table.value("cipher_suites").map(|list| {
        let suites = CIPHER_SUITES.map(|name| (name, name));
        list.list(Some("name at least one, or take the key out"), |value| value.choice(&suites))
    });
    let client_ca_file = client_ca.and_then(|value| path(&value));
    Some(TlsSettings {
        cert_file: path(&cert_file?)?,
        key_file: path(&key_file?)?,
        client_auth: mode.flatten().zip(client_ca_file),
        tls12: min == 12,
        tls13: max == 13,
        cipher_suites,
    })
}
