//! Asks the platform which instance this machine is: the metadata server answers every instance at one
//! link-local address, in plain text.
//!
//! It offers plain HTTP only: the address leads nowhere beyond the host that the instance runs on, and the transport
//! never uses a proxy for it. The answer is accepted only if it has the form of Exoscale's ids, since other clouds have
//! such a server too, with other ids.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use url::Url;

use crate::clock::{Clock, TimedOut, timeout};
use crate::randomness::Randomness;
use crate::retry::{Attempts, RetryPolicy};
use crate::snapshot::InstanceId;
use crate::text::excerpt;
use crate::transport::{BodyError, Purpose, Request, Transport, TransportError, read_body};

/// Where the id is.
const INSTANCE_ID: &str = "http://169.254.169.254/latest/meta-data/instance-id";

/// The server is one hop away: without an answer by then there is none.
const WAIT_MAX: Duration = Duration::from_secs(2);

/// A machine that is just starting may have its network a moment later; where there is no such server, a start must not
/// wait for it for long.
const ATTEMPTS: RetryPolicy =
    RetryPolicy { max_attempts: 3, first_pause: Duration::from_millis(500), growth: 1 };

/// An id has 36 bytes; a page of a proxy has more.
const BODY_BYTES_MAX: usize = 4096;

/// The metadata server. Clones share its answer: the instance of a machine does not change.
#[derive(Debug, Clone)]
pub struct Metadata {
    transport: Arc<dyn Transport>,
    clock: Arc<dyn Clock>,
    randomness: Arc<dyn Randomness>,
    known: Arc<OnceLock<InstanceId>>,
}

/// It is not known which instance this machine is.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// There is no such server, or it refuses the connection.
    #[error("the metadata server at 169.254.169.254 does not answer")]
    Silent(#[source] TransportError),
    /// It did not answer in time.
    #[error("the metadata server at 169.254.169.254 does not answer")]
    Late(#[source] TimedOut),
    /// Its response broke off, or is much too long.
    #[error("the metadata server at 169.254.169.254 gave an incomplete response")]
    Body(#[source] BodyError),
    /// It answered with an error.
    #[error("the metadata server at 169.254.169.254 answered with status {0}")]
    Status(StatusCode),
    /// It answered with something else.
    #[error(
        "the metadata server at 169.254.169.254 answered `{0}`, which is not the id of an Exoscale instance"
    )]
    NoId(String),
}

impl Metadata {
    /// Nothing is asked yet.
    pub fn new(
        transport: Arc<dyn Transport>,
        clock: Arc<dyn Clock>,
        randomness: Arc<dyn Randomness>,
    ) -> Self {
        Self { transport, clock, randomness, known: Arc::default() }
    }

    /// Which instance this machine is. Once known, it is not asked again.
    ///
    /// # Errors
    /// [`MetadataError`]: this is not an Exoscale instance, or the server does not answer now.
    pub async fn this_machine(&self) -> Result<InstanceId, MetadataError> {
        if let Some(known) = self.known.get() {
            return Ok(*known);
        }
        let mut attempts = Attempts::new(ATTEMPTS);
        loop {
            let error = match self.ask().await {
                Ok(id) => return Ok(*self.known.get_or_init(|| id)),
                Err(error) => error,
            };
            attempts.count_failure();
            if attempts.are_exhausted() || !error.is_transient() {
                return Err(error);
            }
            self.clock.sleep(attempts.pause(None, &*self.randomness)).await;
        }
    }

    async fn ask(&self) -> Result<InstanceId, MetadataError> {
        let asked = async {
            let request = Request {
                method: Method::GET,
                url: Url::parse(INSTANCE_ID).expect("a constant address"),
                headers: HeaderMap::new(),
                body: Bytes::new(),
                purpose: Purpose::Direct,
            };
            let answer = self.transport.send(request).await.map_err(MetadataError::Silent)?;
            if answer.status != StatusCode::OK {
                return Err(MetadataError::Status(answer.status));
            }
            let body = read_body(answer.body, BODY_BYTES_MAX).await.map_err(MetadataError::Body)?;
            let text = String::from_utf8_lossy(&body);
            text.trim().parse().map_err(|_| MetadataError::NoId(excerpt(text.trim(), 64)))
        };
        timeout(&*self.clock, WAIT_MAX, asked).await.map_err(MetadataError::Late)?
    }
}

impl MetadataError {
    /// Whether another attempt may succeed.
    fn is_transient(&self) -> bool {
        match self {
            Self::Silent(_) | Self::Late(_) | Self::Body(_) => true,
            Self::Status(status) => status.is_server_error(),
            Self::NoId(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use futures_util::future::BoxFuture;
    use wiremock::matchers::{method, path};
    use wiremock::{Mock, MockServer, ResponseTemplate};

    use super::*;
    use crate::clock::SystemClock;
    use crate::randomness::SystemRandomness;
    use crate::text::chain;
    use crate::transport::{HttpTransport, Response};

    const ID: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";

    /// The real transport, sent to a server of the test's instead of the link-local address.
    #[derive(Debug)]
    struct Diverted {
        real: HttpTransport,
        to: Option<std::net::SocketAddr>,
        sent: AtomicU32,
    }

    impl Transport for Diverted {
        fn send(&self, mut request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
            self.sent.fetch_add(1, Ordering::Relaxed);
            assert_eq!(request.url.as_str(), INSTANCE_ID);
            assert_eq!(request.purpose, Purpose::Direct);
            let Some(to) = self.to else { return Box::pin(std::future::pending()) };
            request.url.set_ip_host(to.ip()).unwrap();
            request.url.set_port(Some(to.port())).unwrap();
            self.real.send(request)
        }
    }

    fn diverted(to: Option<std::net::SocketAddr>) -> (Metadata, Arc<Diverted>) {
        let transport = Arc::new(Diverted { real: HttpTransport::default(), to, sent: AtomicU32::new(0) });
        let clock = Arc::new(SystemClock::start());
        (Metadata::new(transport.clone(), clock, Arc::new(SystemRandomness)), transport)
    }

    async fn answering(answer: ResponseTemplate) -> (MockServer, Metadata, Arc<Diverted>) {
        let server = MockServer::start().await;
        let there = Mock::given(method("GET")).and(path("/latest/meta-data/instance-id"));
        there.respond_with(answer).mount(&server).await;
        let (metadata, transport) = diverted(Some(*server.address()));
        (server, metadata, transport)
    }

    #[tokio::test]
    async fn an_id_is_accepted_and_asked_for_once() {
        let (_server, metadata, transport) =
            answering(ResponseTemplate::new(200).set_body_string(format!("{ID}\n"))).await;
        for _ in 0..3 {
            assert_eq!(metadata.clone().this_machine().await.unwrap(), ID.parse().unwrap());
        }
        assert_eq!(transport.sent.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn what_is_not_an_id_of_exoscale_is_not_accepted() {
        let ok = |text: &str| ResponseTemplate::new(200).set_body_string(text);
        for (answer, said) in [
            (
                ok("i-0123456789abcdef0"),
                "answered `i-0123456789abcdef0`, which is not the id of an Exoscale instance",
            ),
            (ok(""), "answered ``, which is not the id of an Exoscale instance"),
            (ok("<h1>Sign in\u{1b}[2J</h1>"), "answered `<h1>Sign in\\u{1b}[2J</h1>`"),
            (ok(&"x".repeat(5000)), "an incomplete response: the body is longer than 4096 bytes"),
            (ResponseTemplate::new(404), "status 404"),
            (ResponseTemplate::new(302).insert_header("location", "/elsewhere"), "status 302"),
        ] {
            let (_server, metadata, _) = answering(answer).await;
            let error = chain(&metadata.this_machine().await.unwrap_err());
            assert!(error.contains(said), "{error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_not_there_is_given_up_soon() {
        let (metadata, transport) = diverted(None);
        let error = chain(&metadata.this_machine().await.unwrap_err());
        assert_eq!(error, "the metadata server at 169.254.169.254 does not answer: no answer within 2 s");
        assert_eq!(transport.sent.load(Ordering::Relaxed), 3);
    }
}
