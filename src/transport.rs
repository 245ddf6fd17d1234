//! The transport seam: HTTP exchanges.
//!
//! A [`Transport`] sends one request and gives back one answer, whatever its status. It repeats nothing,
//! follows no redirect, signs nothing and has no opinion: the client and the archive decide. The real form
//! is [`HttpTransport`]; the simulated zone in this process is the other (`sim`).

use std::error::Error;
use std::fmt::{self, Debug};
use std::pin::Pin;
use std::sync::OnceLock;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use jiff::Timestamp;
use tokio::sync::mpsc;
use url::{Host, Url};

/// What an exchange is for. It decides which connections are used, and whether the address is a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A call of the API: small bodies, HTTP/2 where offered.
    Api,
    /// The bytes of an image from a presigned address, which is itself a credential: never shown.
    Image,
    /// A notification to an address that is itself a credential: never shown.
    Notification,
    /// A request that is never sent through a proxy: to the platform's metadata server, whose response would be about the
    /// proxy's instance, and to the daemon on this machine.
    Direct,
}

/// One request.
#[derive(Clone)]
pub struct Request {
    /// The HTTP method.
    pub method: Method,
    /// Where to; a bearer secret if the purpose is [`Purpose::Image`] or [`Purpose::Notification`].
    pub url: Url,
    /// Headers beside those that HTTP itself needs.
    pub headers: HeaderMap,
    /// The body; empty for none.
    pub body: Bytes,
    /// Decides about connections and secrecy.
    pub purpose: Purpose,
}

impl Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Headers may hold a signature, and the address may be one.
        let url = match self.purpose {
            Purpose::Api | Purpose::Direct => self.url.path(),
            Purpose::Image | Purpose::Notification => "(secret address)",
        };
        f.debug_struct("Request").field("method", &self.method).field("url", &url).finish_non_exhaustive()
    }
}

/// Whether an address is on this machine, so that nobody else can read what plain HTTP sends there.
pub fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// The bytes of an answer as they arrive.
pub type Body = Pin<Box<dyn Stream<Item = Result<Bytes, TransportError>> + Send>>;

/// One answer: the head, and a body still to be read.
pub struct Response {
    /// The status, whatever it is.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body. Dropping it ends the exchange.
    pub body: Body,
}

impl Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Response").field("status", &self.status).finish_non_exhaustive()
    }
}

/// How far an exchange got before it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reached {
    /// There was no connection: the request was certainly not carried out.
    Nothing,
    /// The request may have been carried out; the answer is lost or cut.
    Unknown,
}

/// An exchange without a complete answer. The text never contains the address.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct TransportError {
    /// Whether the request may have been carried out.
    pub reached: Reached,
    what: &'static str,
    #[source]
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl TransportError {
    /// An error without a cause of its own, such as a cut connection in the simulated zone.
    pub fn new(reached: Reached, what: &'static str) -> Self {
        Self { reached, what, source: None }
    }

    /// An error with its cause, whose text must not contain the address.
    pub fn because(reached: Reached, what: &'static str, source: impl Error + Send + Sync + 'static) -> Self {
        Self { reached, what, source: Some(Box::new(source)) }
    }
}

/// Sends requests.
pub trait Transport: Send + Sync + Debug {
    /// Sends `request` and waits for the head of the answer. Any status is an answer.
    ///
    /// # Errors
    /// [`TransportError`] if no head of an answer came.
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>>;

    /// Sends `request` with a body of `length` bytes that is not in memory as a whole. By default it is gathered, which will do
    /// for a simulation.
    ///
    /// # Errors
    /// [`TransportError`] if no head of an answer came, or the body ended early.
    fn send_stream(
        &self,
        mut request: Request,
        mut body: Body,
        length: u64,
    ) -> BoxFuture<'_, Result<Response, TransportError>> {
        Box::pin(async move {
            let mut whole = bytes::BytesMut::new();
            while let Some(chunk) = body.next().await {
                whole.extend_from_slice(&chunk?);
            }
            if whole.len() as u64 != length {
                return Err(TransportError::new(Reached::Unknown, "the body of the request ended early"));
            }
            request.body = whole.freeze();
            self.send(request).await
        })
    }
}

/// The sender of a body that is made while it is sent. It waits while two chunks are on their way, and fails once nobody reads
/// them any more.
pub(crate) fn piped() -> (mpsc::Sender<Result<Bytes, TransportError>>, Body) {
    let (sender, receiver) = mpsc::channel(2);
    let chunks = stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
    (sender, Box::pin(chunks))
}

/// Reads a whole body of at most `max` bytes.
///
/// # Errors
/// [`BodyError::TooLong`] beyond `max`; [`BodyError::Broken`] if it ends early.
pub async fn read_body(mut body: Body, max: usize) -> Result<Bytes, BodyError> {
    let mut whole = bytes::BytesMut::new();
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(BodyError::Broken)?;
        if whole.len() + chunk.len() > max {
            return Err(BodyError::TooLong { max });
        }
        whole.extend_from_slice(&chunk);
    }
    Ok(whole.freeze())
}

/// The instant that a header such as `Date` names.
pub(crate) fn http_date(value: &HeaderValue) -> Option<Timestamp> {
    Timestamp::try_from(httpdate::parse_http_date(value.to_str().ok()?.trim()).ok()?).ok()
}

/// Why a body could not be read whole.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// Longer than the caller allows.
    #[error("the body is longer than {max} bytes")]
    TooLong {
        /// The bound, in bytes.
        max: usize,
    },
    /// The connection broke.
    #[error("the body broke off")]
    Broken(#[source] TransportError),
}

/// The real form: reqwest over rustls.
///
/// A client for each purpose: calls of the API may share an HTTP/2 connection; images come over HTTP/1.1, one
/// connection each, which drains a fast store in less CPU time than HTTP/2 does; the metadata server and the daemon are asked
/// directly, whatever proxy the environment names. None follows redirects, none has a total timeout: callers bound
/// their exchanges by the clock seam. Each is made when it is first needed: reading the machine's certificates takes
/// time, and many processes never need a client.
///
/// They trust the machine's certificate authorities, or the bundled ones where it has none; or those that they are given, alone.
#[derive(Debug, Clone, Default)]
pub struct HttpTransport {
    /// Empty: the machine's.
    authorities: Vec<reqwest::Certificate>,
    api: OnceLock<reqwest::Client>,
    image: OnceLock<reqwest::Client>,
    direct: OnceLock<reqwest::Client>,
}

impl HttpTransport {
    /// One that trusts these certificate authorities alone, in PEM.
    ///
    /// # Errors
    /// What is wrong with them, as a sentence.
    pub fn trusting(pem: &[u8]) -> Result<Self, String> {
        let authorities = reqwest::Certificate::from_pem_bundle(pem).map_err(|error| error.to_string())?;
        if authorities.is_empty() {
            return Err("there is no certificate in PEM in it".to_owned());
        }
        Ok(Self { authorities, ..Self::default() })
    }

    fn client(&self, purpose: Purpose) -> Result<&reqwest::Client, TransportError> {
        let made = match purpose {
            Purpose::Api => &self.api,
            Purpose::Image | Purpose::Notification => &self.image,
            Purpose::Direct => &self.direct,
        };
        if let Some(client) = made.get() {
            return Ok(client);
        }
        let fresh = match purpose {
            Purpose::Api => self.build(|| client().http2_adaptive_window(true)),
            Purpose::Image | Purpose::Notification => self.build(|| client().http1_only().no_gzip()),
            Purpose::Direct => self.build(|| client().http1_only().no_gzip().no_proxy()),
        }?;
        // One that another thread made meanwhile is as good.
        Ok(made.get_or_init(|| fresh))
    }

    fn build(&self, client: impl Fn() -> reqwest::ClientBuilder) -> Result<reqwest::Client, TransportError> {
        if self.authorities.is_empty() {
            return build(client);
        }
        let client = client().tls_certs_only(self.authorities.iter().cloned()).build();
        client.map_err(|error| {
            let text = "nothing was sent: set up TLS with the certificates of `ca_file`";
            TransportError::because(Reached::Nothing, text, error)
        })
    }
}

/// The settings that all three clients share.
#[expect(clippy::disallowed_methods, reason = "the one place that makes HTTP clients")]
fn client() -> reqwest::ClientBuilder {
    // reqwest brings none. A second call finds the first one's, which is the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        // Guards against a dead route yet allows a slow handshake; several addresses share it.
        .connect_timeout(std::time::Duration::from_secs(10))
        .user_agent(concat!("snapwarden/", env!("CARGO_PKG_VERSION")))
}

fn build(client: impl Fn() -> reqwest::ClientBuilder) -> Result<reqwest::Client, TransportError> {
    // An image without a CA bundle makes the platform's verifier fail (reqwest#2965): fall back to Mozilla's
    // roots that travel with this binary.
    client().build().or_else(|_| {
        let roots = webpki_root_certs::TLS_SERVER_ROOT_CERTS
            .iter()
            .filter_map(|root| reqwest::Certificate::from_der(root).ok());
        client().tls_certs_only(roots).build().map_err(|error| {
            TransportError::because(
                Reached::Nothing,
                "nothing was sent: set up TLS for HTTPS connections",
                error,
            )
        })
    })
}

impl HttpTransport {
    async fn exchange(&self, request: Request, body: reqwest::Body) -> Result<Response, TransportError> {
        let client = self.client(request.purpose)?;
        let sent = client.request(request.method, request.url).headers(request.headers).body(body).send();
        let answer = sent.await.map_err(failed)?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        let body = Box::pin(answer.bytes_stream().map_err(failed));
        Ok(Response { status, headers, body })
    }
}

impl Transport for HttpTransport {
    fn send(&self, mut request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        let body = std::mem::take(&mut request.body);
        Box::pin(self.exchange(request, body.into()))
    }

    fn send_stream(
        &self,
        mut request: Request,
        body: Body,
        length: u64,
    ) -> BoxFuture<'_, Result<Response, TransportError>> {
        // With its length the body is sent as it is, which stores require, and not in chunks.
        request.headers.insert(header::CONTENT_LENGTH, length.into());
        Box::pin(self.exchange(request, reqwest::Body::wrap_stream(body)))
    }
}

/// reqwest's error without the address, which may be a secret.
fn failed(error: reqwest::Error) -> TransportError {
    let (reached, what) = if error.is_connect() {
        (Reached::Nothing, "no connection")
    } else if error.is_body() || error.is_decode() {
        (Reached::Unknown, "the connection broke in the middle of the answer")
    } else {
        (Reached::Unknown, "the connection broke before an answer came")
    };
    TransportError::because(reached, what, error.without_url())
}
