//! Who may use the HTTP port: the web configuration file, read anew when it or a certificate changes.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use http::{HeaderMap, HeaderName, HeaderValue};
use rustls::ServerConfig;

use crate::config::diagnostics::Diagnostics;
use crate::config::web::{FILE_BYTES_MAX, TlsSettings, WebSettings, parse};
use crate::daemon::passwords::{Passwords, Verdict};
use crate::daemon::tls::{CertificateError, server_config};
use crate::disk::{Stamp, read_named_file, stamp_of};
use crate::randomness::Randomness;
use crate::text::{chain, excerpt};

/// A web configuration file that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum WebFileError {
    /// It can't be read.
    #[error("can't read {0}, which `web_config_file` in `[server]` names")]
    Read(String, #[source] std::io::Error),
    /// Its text has errors.
    #[error("{0}")]
    Invalid(Diagnostics),
    /// A certificate that it names can't be used.
    #[error("{0}: {1}")]
    Certificate(String, CertificateError),
}

/// A web configuration file that was read, with all that it names.
#[derive(Debug)]
pub struct WebFile {
    path: PathBuf,
    /// The file and those that it names, as they were just before they were read.
    stamps: Vec<(PathBuf, Option<Stamp>)>,
    settings: WebSettings,
    tls: Option<Arc<ServerConfig>>,
    headers: HeaderMap,
}

impl WebFile {
    /// Reads a web configuration file, and the certificates that it names.
    ///
    /// # Errors
    /// [`WebFileError`].
    pub fn read(path: &Path) -> Result<Self, WebFileError> {
        let shown = excerpt(&path.to_string_lossy(), 200);
        let mut stamps = vec![(path.to_owned(), stamp_of(path))];
        let text = read_named_file(path, FILE_BYTES_MAX)
            .map_err(|error| WebFileError::Read(shown.clone(), error))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let settings = parse(&text, &shown, folder).map_err(WebFileError::Invalid)?;
        stamps.extend(settings.tls.iter().flat_map(files).map(|file| (file.clone(), stamp_of(file))));
        let tls = settings.tls.as_ref().map(server_config).transpose();
        let tls = tls.map_err(|error| WebFileError::Certificate(shown, error))?.map(Arc::new);
        let header = |(name, value): &(&'static str, String)| {
            // Both were checked before.
            Some((HeaderName::try_from(*name).ok()?, HeaderValue::from_str(value).ok()?))
        };
        let headers = settings.headers.iter().filter_map(header).collect();
        Ok(Self { path: path.to_owned(), stamps, settings, tls, headers })
    }

    fn has_changed(&self) -> bool {
        self.stamps.iter().any(|(path, stamp)| stamp_of(path) != *stamp)
    }
}

fn files(tls: &TlsSettings) -> impl Iterator<Item = &PathBuf> {
    [&tls.cert_file, &tls.key_file].into_iter().chain(tls.client_auth.iter().map(|(_, path)| path))
}

/// Who may use the port now.
pub struct Access {
    file: RwLock<Option<Arc<WebFile>>>,
    passwords: Passwords,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access").finish_non_exhaustive()
    }
}

impl Access {
    /// As a file says; without one everybody may use the port, without TLS.
    pub fn new(file: Option<WebFile>, randomness: &dyn Randomness) -> Self {
        Self { file: RwLock::new(file.map(Arc::new)), passwords: Passwords::new(randomness) }
    }

    /// Takes over another file.
    pub fn replace(&self, file: Option<WebFile>) {
        *self.file.write().unwrap_or_else(PoisonError::into_inner) = file.map(Arc::new);
    }

    /// Whether a file says who may use the port.
    pub fn has_file(&self) -> bool {
        self.current().is_some()
    }

    /// Reads the file anew if it or a certificate has changed, and says whether it did so. One that can't be used leaves
    /// everything as it is, and is tried again the next time.
    ///
    /// # Errors
    /// Why the changed file, or what it names, can't be used.
    pub fn look_again(&self) -> Result<bool, String> {
        let Some(before) = self.current().filter(|file| file.has_changed()) else { return Ok(false) };
        let read = WebFile::read(&before.path).map_err(|error| chain(&error))?;
        let mut file = self.file.write().unwrap_or_else(PoisonError::into_inner);
        // Unless a reload came between.
        let is_current = file.as_ref().is_some_and(|now| Arc::ptr_eq(now, &before));
        if is_current {
            *file = Some(Arc::new(read));
        }
        Ok(is_current)
    }

    fn current(&self) -> Option<Arc<WebFile>> {
        self.file.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What a new connection is encrypted by; none if it is not.
    pub(super) fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.current()?.tls.clone()
    }

    /// Headers of every response.
    pub(super) fn headers(&self) -> HeaderMap {
        self.current().map(|file| file.headers.clone()).unwrap_or_default()
    }

    /// Whether a request with this `Authorization` may be answered.
    pub(super) async fn check(&self, authorization: Option<&HeaderValue>) -> Verdict {
        match (self.current().filter(|file| !file.settings.users.is_empty()), authorization) {
            (None, _) => Verdict::Right,
            (Some(_), None) => Verdict::Wrong,
            (Some(file), Some(header)) => self.passwords.check(&file.settings.users, header).await,
        }
    }
}
