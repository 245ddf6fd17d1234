//! The certificates of the HTTP port: the one file that knows rustls.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{Error as PemError, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::version::{TLS12, TLS13};
use rustls::{CipherSuite, Error as TlsError, InconsistentKeys, RootCertStore, ServerConfig};

use crate::config::web::{ClientAuth, TlsSettings};
use crate::disk::read_named_file;
use crate::text::printable;

/// Some hundred certificates, which make a bundle of authorities.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A certificate that can't be used: the file, and why. A key's text is not in it.
#[derive(Debug, thiserror::Error)]
#[error("{} {what}", printable(&.path.to_string_lossy()))]
pub struct CertificateError {
    path: PathBuf,
    what: String,
}

impl CertificateError {
    fn new(path: &Path, what: impl Into<String>) -> Self {
        Self { path: path.to_owned(), what: what.into() }
    }
}

/// Reads the certificates that settings name.
///
/// # Errors
/// [`CertificateError`] for the first that can't be used.
pub(super) fn server_config(settings: &TlsSettings) -> Result<ServerConfig, CertificateError> {
    let chain = certificates(&settings.cert_file)?;
    let key = private_key(&settings.key_file)?;
    let mut provider = ring::default_provider();
    if let Some(named) = &settings.cipher_suites {
        let is_named = |suite: CipherSuite| suite.as_str().is_some_and(|name| named.contains(&name));
        provider.cipher_suites.retain(|suite| suite.tls13().is_some() || is_named(suite.suite()));
    }
    let provider = Arc::new(provider);
    let versions = [(settings.tls12, &TLS12), (settings.tls13, &TLS13)];
    let versions: Vec<_> =
        versions.into_iter().filter_map(|(spoken, version)| spoken.then_some(version)).collect();
    let of_certificate = |error: &TlsError| match error {
        TlsError::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            let what = format!(
                "is not the key of the certificate in {}",
                printable(&settings.cert_file.to_string_lossy())
            );
            CertificateError::new(&settings.key_file, what)
        }
        error => {
            CertificateError::new(&settings.cert_file, format!("can't be used as a certificate: {error}"))
        }
    };
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&versions)
        .map_err(|error| of_certificate(&error))?;
    let builder = match &settings.client_auth {
        None => builder.with_no_client_auth(),
        Some((mode, path)) => builder.with_client_cert_verifier(client_verifier(path, *mode, provider)?),
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| of_certificate(&error))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn client_verifier(
    path: &Path,
    mode: ClientAuth,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>, CertificateError> {
    let unusable = |error: &dyn std::error::Error| {
        CertificateError::new(path, format!("can't be used as authorities of clients: {error}"))
    };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| unusable(&error))?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    let builder = match mode {
        ClientAuth::IfGiven => builder.allow_unauthenticated(),
        ClientAuth::Required => builder,
    };
    builder.build().map_err(|error| unusable(&error))
}

/// All certificates of a file; at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let text = read(path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        Ok(_) => Err(CertificateError::new(path, "has no certificate in it: write it in PEM")),
        Err(error) => Err(CertificateError::new(path, not_pem(&error))),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, CertificateError> {
    let text = secrecy::SecretString::from(read(path)?);
    PrivateKeyDer::from_pem_slice(secrecy::ExposeSecret::expose_secret(&text).as_bytes()).map_err(|error| {
        match error {
            PemError::NoItemsFound => {
                CertificateError::new(path, "has no private key in it: write it in PEM, without a password")
            }
            error => CertificateError::new(path, not_pem(&error)),
        }
    })
}

/// The error's own text may quote lines of the file.
fn not_pem(error: &PemError) -> String {
    let why = match error {
        PemError::MissingSectionEnd { .. } => "a section has no end",
        PemError::IllegalSectionStart { .. } => "a section's first line is damaged",
        PemError::Base64Decode(_) => "a section is damaged",
        _ => "it can't be read",
    };
    format!("is not PEM: {why}")
}

fn read(path: &Path) -> Result<String, CertificateError> {
    read_named_file(path, FILE_BYTES_MAX)
        .map_err(|error| CertificateError::new(path, format!("can't be read: {error}")))
}
