//! Requests to a bucket: signed, bounded, and repeated where that may help.
//!
//! All requests here may be sent twice: doing them again is doing them once. (Beginning an upload twice leaves one
//! behind; those are cleaned up like all others that were abandoned.) Addresses are path-style, which every store
//! understands.

use std::fmt::{self, Debug, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use secrecy::SecretString;
use url::Url;

use crate::archive::s3::answer::{self, Listed, NotIt, Page, Unfinished};
use crate::archive::s3::credentials::S3Credentials;
use crate::archive::s3::sign::{Signer, encode, query, sha256_hex};
use crate::clock::{Clock, TimedOut, timeout};
use crate::disk::blocking;
use crate::randomness::Randomness;
use crate::retry::{Attempts, REQUESTS, retry_after};
use crate::text::printable;
use crate::transport::{Body, BodyError, Purpose, Request, Response, Transport, TransportError, read_body};

/// So long a small request may take.
const ANSWER_WITHIN: Duration = Duration::from_mins(1);

/// So long a store may think about a large upload that is to be completed: Amazon speaks of minutes.
const COMPLETED_WITHIN: Duration = Duration::from_mins(10);

/// What is sent has beside that a second for so many bytes: the slowest line on which an image is worth sending.
const SLOWEST_BYTES_PER_SECOND: u64 = 64 << 10;

/// An answer in XML is never longer: a listing of 1000 keys of 1 KiB each, percent-encoded, fits.
const XML_BYTES_MAX: usize = 8 << 20;

/// So many pages a listing may have; a store that has more goes in a ring.
const PAGES_MAX: usize = 10_000;

/// The longest that a presigned address may be good for.
const PRESIGNED_SECONDS_MAX: u64 = 7 * 24 * 60 * 60;

/// Where a bucket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Place {
    /// The store's address, without a slash at its end.
    pub endpoint: Url,
    /// The region that requests are signed for.
    pub region: String,
    /// The bucket.
    pub bucket: String,
    /// What all keys of the archive begin with: empty, or ending with a slash.
    pub prefix: String,
}

/// Why a bucket did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {on}")]
pub struct S3Error {
    doing: &'static str,
    on: String,
    #[source]
    pub(super) fault: Fault,
}

impl S3Error {
    pub(super) fn new(doing: &'static str, on: String, fault: Fault) -> Self {
        Self { doing, on, fault }
    }

    /// Whether nothing was asked, since this process is at the same image already.
    pub fn is_busy(&self) -> bool {
        matches!(self.fault, Fault::Busy)
    }

    pub(super) fn status(&self) -> Option<StatusCode> {
        match &self.fault {
            Fault::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    fn code(&self) -> &str {
        match &self.fault {
            Fault::Refused { code, .. } => code,
            _ => "",
        }
    }

    /// Whether there is no such thing.
    pub(super) fn is_missing(&self) -> bool {
        self.status() == Some(StatusCode::NOT_FOUND) && self.code() != "NoSuchBucket"
    }

    /// Whether what was asked for exists already, where it must not.
    pub(super) fn is_precondition(&self) -> bool {
        self.status() == Some(StatusCode::PRECONDITION_FAILED)
            // Amazon's word for two conditional writes at the same moment.
            || self.code() == "ConditionalRequestConflict"
    }

    /// Whether the store can't do such a thing at all.
    pub(super) fn is_unsupported(&self) -> bool {
        matches!(self.status(), Some(StatusCode::NOT_IMPLEMENTED | StatusCode::METHOD_NOT_ALLOWED))
            || self.code() == "NotImplemented"
    }
}

/// What went wrong with a request, after all tries.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The store said no.
    #[error("the store answers {status}{}{}", said(.code, .message), help(*.status, .code))]
    Refused {
        /// The status; 200 may hold an error as well.
        status: StatusCode,
        /// The store's word for it; may be empty.
        code: String,
        /// What the store says about it; may be empty.
        message: String,
        /// So long it asks to be left alone.
        retry_after: Option<Duration>,
    },
    /// The answer is none of S3.
    #[error("the answer {0}: is `endpoint` the address of an S3 store?")]
    Strange(String),
    /// No answer in time.
    #[error(transparent)]
    TimedOut(#[from] TimedOut),
    /// No whole answer.
    #[error(transparent)]
    Broken(#[from] TransportError),
    /// An answer that broke off, or has no end.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// Nothing was asked: this process is at the same image already.
    #[error("it is being stored at this moment by another run")]
    Busy,
    /// What the store holds is not what was sent.
    #[error("{0}")]
    Differs(String),
}

fn said(code: &str, message: &str) -> String {
    let text = [code, message].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": ");
    if text.is_empty() { text } else { format!(" ({})", printable(&text)) }
}

/// What may be done about an answer.
fn help(status: StatusCode, code: &str) -> &'static str {
    match (code, status.as_u16()) {
        ("InvalidAccessKeyId" | "SignatureDoesNotMatch", _) => {
            "; look at the archive's credentials and its `region`"
        }
        ("RequestTimeTooSkewed", _) => "; set this machine's clock",
        ("NoSuchBucket", _) => "; make the bucket, or correct `bucket`, `endpoint` and `region`",
        ("QuotaExceeded" | "InsufficientStorage", _) | (_, 507) => "; make room in the bucket",
        ("AuthorizationHeaderMalformed" | "PermanentRedirect" | "TemporaryRedirect", _)
        | (_, 301 | 307 | 308) => "; the bucket is elsewhere: correct `endpoint` and `region`",
        (_, 403) => "; the archive's key must be allowed to list, read, write and delete in this bucket",
        _ => "",
    }
}

impl Fault {
    /// Whether another try may go better.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Refused { status, code, .. } => {
                status.is_server_error() && *status != StatusCode::NOT_IMPLEMENTED && status.as_u16() != 507
                    || matches!(*status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
                    || matches!(
                        &**code,
                        "InternalError" | "SlowDown" | "ServiceUnavailable" | "RequestTimeout"
                            // What was sent changed on the way.
                            | "BadDigest" | "XAmzContentSHA256Mismatch" | "IncompleteBody"
                    )
            }
            Self::Strange(_) | Self::TimedOut(_) | Self::Broken(_) => true,
            Self::Body(error) => matches!(error, BodyError::Broken(_)),
            Self::Busy | Self::Differs(_) => false,
        }
    }
}

impl From<NotIt> for Fault {
    fn from(what: NotIt) -> Self {
        match what {
            NotIt::Error(code, message) => {
                Self::Refused { status: StatusCode::OK, code, message, retry_after: None }
            }
            NotIt::Strange(why) => Self::Strange(format!("is not understood: {why}")),
        }
    }
}

/// What is sent, with its hash.
#[derive(Clone)]
pub(super) struct Payload {
    bytes: Bytes,
    sha256: String,
}

impl Payload {
    pub(super) fn new(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        let sha256 = sha256_hex(&bytes);
        Self { bytes, sha256 }
    }
}

/// One request, as often as it takes.
struct Call<'a> {
    doing: &'static str,
    method: Method,
    key: &'a str,
    query: Vec<(&'a str, &'a str)>,
    headers: Vec<(&'static str, String)>,
    payload: Payload,
    /// Beside the time that the payload takes.
    within: Duration,
}

/// An answer, with its body as far as it was asked for.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    body: Bytes,
    /// The body, where it is to be read as it comes.
    pub(super) rest: Option<Body>,
}

impl Answer {
    /// Without the quotes that most stores put around it; empty if there is none.
    pub(super) fn etag(&self) -> String {
        let text = self.headers.get(header::ETAG).and_then(|etag| etag.to_str().ok());
        text.unwrap_or_default().trim_matches('"').to_owned()
    }
}

/// What is known of an object without its bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) bytes: Option<u64>,
    pub(super) etag: String,
    /// What its metadata calls its MD5.
    pub(super) md5: Option<String>,
}

/// Speaks with one bucket.
pub(super) struct Client {
    pub(super) place: S3Place,
    credentials: S3Credentials,
    transport: Arc<dyn Transport>,
    pub(super) clock: Arc<dyn Clock>,
    randomness: Arc<dyn Randomness>,
    /// The bucket takes nothing without an MD5 beside it, as one does that locks its objects.
    wants_md5: AtomicBool,
}

impl Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Client {
    pub(super) fn new(
        place: S3Place,
        credentials: S3Credentials,
        transport: Arc<dyn Transport>,
        clock: Arc<dyn Clock>,
        randomness: Arc<dyn Randomness>,
    ) -> Self {
        Self { place, credentials, transport, clock, randomness, wants_md5: AtomicBool::new(false) }
    }

    /// A key as people write it.
    pub(super) fn shown(&self, key: &str) -> String {
        format!("s3://{}/{}", self.place.bucket, printable(key))
    }

    fn url(&self, key: &str, arguments: &[(&str, &str)]) -> Url {
        let mut url = self.place.endpoint.clone();
        let root = url.path().trim_end_matches('/').to_owned();
        let slash = if key.is_empty() { "" } else { "/" };
        url.set_path(&format!("{root}/{}{slash}{}", encode(&self.place.bucket, false), encode(key, true)));
        url.set_query((!arguments.is_empty()).then(|| query(arguments.iter().copied())).as_deref());
        url
    }

    fn signer(&self) -> Signer<'_> {
        Signer { credentials: &self.credentials, region: &self.place.region, now: self.clock.now() }
    }

    /// Sends it once and waits for the head of an answer that is a good one.
    async fn send(&self, call: &Call<'_>) -> Result<Response, Fault> {
        let url = self.url(call.key, &call.query);
        let mut headers = HeaderMap::new();
        for (name, value) in &call.headers {
            let value = HeaderValue::from_str(value)
                .map_err(|_| Fault::Strange("before had something that can't be sent back".to_owned()))?;
            headers.insert(HeaderName::from_static(name), value);
        }
        if self.wants_md5.load(Ordering::Relaxed) && !call.payload.bytes.is_empty() {
            let bytes = call.payload.bytes.clone();
            let md5 = blocking(move || content_md5(&bytes)).await;
            headers
                .extend(HeaderValue::try_from(md5).map(|md5| (HeaderName::from_static("content-md5"), md5)));
        }
        self.signer().sign(&call.method, &url, &call.payload.sha256, &mut headers);
        let body = call.payload.bytes.clone();
        let request = Request { method: call.method.clone(), url, headers, body, purpose: Purpose::Image };
        let response = self.transport.send(request).await?;
        if response.status.is_success() {
            return Ok(response);
        }
        let status = response.status;
        let retry_after = retry_after(status, &response.headers, self.clock.now());
        // An error is an error, whatever becomes of its text.
        let body = read_body(response.body, XML_BYTES_MAX).await.unwrap_or_default();
        let (code, message) = answer::error(&body);
        if code == "InvalidRequest" && message.contains("Content-MD5") {
            let is_known = self.wants_md5.swap(true, Ordering::Relaxed);
            if !is_known {
                return Box::pin(self.send(call)).await;
            }
        }
        Err(Fault::Refused { status, code, message, retry_after })
    }

    /// Sends it until the answer is good, as `take` understands it, or trying again does not help. The body is read
    /// whole if it has at most `answer_max` bytes, and left to `take` where there is no such bound.
    async fn call<T>(
        &self,
        call: &Call<'_>,
        answer_max: Option<usize>,
        take: impl Fn(Answer) -> Result<T, Fault>,
    ) -> Result<T, S3Error> {
        let seconds = call.payload.bytes.len() as u64 / SLOWEST_BYTES_PER_SECOND;
        let limit = call.within + Duration::from_secs(seconds);
        let mut attempts = Attempts::new(REQUESTS);
        loop {
            let attempt = async {
                let Response { status, headers, body } = self.send(call).await?;
                let answer = match answer_max {
                    Some(max) => Answer { status, headers, body: read_body(body, max).await?, rest: None },
                    None => Answer { status, headers, body: Bytes::new(), rest: Some(body) },
                };
                take(answer)
            };
            let fault = match timeout(&*self.clock, limit, attempt).await {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(fault)) => fault,
                Err(timed_out) => Fault::from(timed_out),
            };
            attempts.count_failure();
            if attempts.are_exhausted() || !fault.may_pass() {
                return Err(S3Error::new(call.doing, self.shown(call.key), fault));
            }
            let retry_after = match &fault {
                Fault::Refused { retry_after, .. } => *retry_after,
                _ => None,
            };
            self.clock.sleep(attempts.pause(retry_after, &*self.randomness)).await;
        }
    }

    fn simple<'a>(doing: &'static str, method: Method, key: &'a str) -> Call<'a> {
        let payload = Payload::new(Bytes::new());
        Call { doing, method, key, query: Vec::new(), headers: Vec::new(), payload, within: ANSWER_WITHIN }
    }

    /// All pages of a listing, item by item. Either all of it was read, or this is an error.
    async fn pages<T>(
        &self,
        doing: &'static str,
        fixed: &[(&str, &str)],
        read: impl Fn(&[u8]) -> Result<Page<T>, NotIt>,
        mut each: impl FnMut(T),
    ) -> Result<(), S3Error> {
        let mut next: Vec<(&'static str, String)> = Vec::new();
        for _ in 0..PAGES_MAX {
            let mut call = Self::simple(doing, Method::GET, "");
            call.query = fixed.to_vec();
            call.query.extend(next.iter().map(|(name, value)| (*name, value.as_str())));
            let page = self.call(&call, Some(XML_BYTES_MAX), |answer| Ok(read(&answer.body)?)).await?;
            page.items.into_iter().for_each(&mut each);
            match page.next {
                None => return Ok(()),
                Some(same) if same == next => break,
                Some(more) => next = more,
            }
        }
        let why = "goes in a ring: each part of the listing promises another".to_owned();
        Err(S3Error::new(doing, self.shown(&self.place.prefix), Fault::Strange(why)))
    }

    /// Everything whose key begins with the archive's prefix.
    pub(super) async fn list(&self, each: impl FnMut(Listed)) -> Result<(), S3Error> {
        let fixed = [
            ("list-type", "2"),
            ("encoding-type", "url"),
            ("prefix", &*self.place.prefix),
            ("max-keys", "1000"),
        ];
        self.pages("list", &fixed, answer::objects, each).await
    }

    /// Every unfinished upload whose key begins with `prefix`; `None` where the store can't tell.
    pub(super) async fn list_uploads(&self, prefix: &str) -> Result<Option<Vec<Unfinished>>, S3Error> {
        let fixed = [("uploads", ""), ("encoding-type", "url"), ("prefix", prefix), ("max-uploads", "1000")];
        let mut found = Vec::new();
        match self
            .pages("list the unfinished uploads of", &fixed, answer::uploads, |upload| found.push(upload))
            .await
        {
            Ok(()) => Ok(Some(found)),
            Err(error) if error.is_unsupported() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The bytes of a small object, and its `ETag`; `None` if there is none.
    pub(super) async fn get(&self, key: &str, max: usize) -> Result<Option<(Bytes, String)>, S3Error> {
        let call = Self::simple("read", Method::GET, key);
        let got = self.call(&call, Some(max), |answer| Ok((answer.body.clone(), answer.etag()))).await;
        or_missing(got)
    }

    /// The bytes from `offset` on, as they come; of the object with this `ETag`, where one is given.
    pub(super) async fn open(
        &self,
        key: &str,
        offset: u64,
        until: Option<u64>,
        etag: Option<&str>,
    ) -> Result<Answer, S3Error> {
        let mut call = Self::simple("read", Method::GET, key);
        if offset > 0 || until.is_some() {
            let last = until.map_or_else(String::new, |until| until.saturating_sub(1).to_string());
            call.headers.push(("range", format!("bytes={offset}-{last}")));
        }
        if let Some(etag) = etag {
            call.headers.push(("if-match", etag.to_owned()));
        }
        self.call(&call, None, Ok).await
    }

    /// What is known of an object; `None` if there is none.
    pub(super) async fn head(&self, key: &str) -> Result<Option<Head>, S3Error> {
        let call = Self::simple("look at", Method::HEAD, key);
        let found = self.call(&call, Some(0), |answer| {
            let text = |name: &str| answer.headers.get(name).and_then(|value| value.to_str().ok());
            Ok(Head {
                bytes: text("content-length").and_then(|length| length.parse().ok()),
                etag: answer.etag(),
                md5: text("x-amz-meta-md5").map(str::to_owned),
            })
        });
        or_missing(found.await)
    }

    /// Writes a small object.
    pub(super) async fn put(&self, key: &str, kind: &str, bytes: Vec<u8>) -> Result<(), S3Error> {
        let mut call = Self::simple("write", Method::PUT, key);
        call.headers.push(("content-type", kind.to_owned()));
        // What is locked there wants it, and for so little it costs nothing.
        call.headers.push(("content-md5", content_md5(&bytes)));
        call.payload = Payload::new(bytes);
        self.call(&call, Some(XML_BYTES_MAX), |_| Ok(())).await
    }

    /// Removes an object, if there is one.
    pub(super) async fn delete(&self, key: &str) -> Result<(), S3Error> {
        let call = Self::simple("remove", Method::DELETE, key);
        or_missing(self.call(&call, Some(XML_BYTES_MAX), |_| Ok(())).await).map(|_| ())
    }

    /// Begins an upload; its id.
    pub(super) async fn begin_upload(
        &self,
        key: &str,
        kind: &str,
        md5: Option<String>,
    ) -> Result<String, S3Error> {
        let mut call = Self::simple("begin the upload of", Method::POST, key);
        call.query = vec![("uploads", "")];
        call.headers.push(("content-type", kind.to_owned()));
        call.headers.extend(md5.map(|md5| ("x-amz-meta-md5", md5)));
        self.call(&call, Some(XML_BYTES_MAX), |answer| Ok(answer::upload_id(&answer.body)?)).await
    }

    /// Sends a part; its `ETag`, which the end of the upload has to name.
    pub(super) async fn upload_part(
        &self,
        key: &str,
        id: &str,
        number: usize,
        payload: Payload,
    ) -> Result<String, S3Error> {
        let number = number.to_string();
        let mut call = Self::simple("upload a part of", Method::PUT, key);
        call.query = vec![("partNumber", &number), ("uploadId", id)];
        call.payload = payload;
        self.call(&call, Some(XML_BYTES_MAX), |answer| match answer.etag() {
            etag if etag.is_empty() => Err(Fault::Strange("names no `ETag` for a part".to_owned())),
            etag => Ok(etag),
        })
        .await
    }

    /// Makes an object of the parts; its `ETag`. With `is_new`, only if the key is still free, where the store can tell.
    pub(super) async fn complete(
        &self,
        key: &str,
        id: &str,
        etags: &[String],
        is_new: bool,
    ) -> Result<String, S3Error> {
        let mut body = String::from("<CompleteMultipartUpload>");
        for (number, etag) in (1..).zip(etags) {
            let etag: String = etag.chars().filter(|character| !"<>&\"".contains(*character)).collect();
            // Writing to a String cannot fail.
            let _ = write!(body, "<Part><PartNumber>{number}</PartNumber><ETag>\"{etag}\"</ETag></Part>");
        }
        body.push_str("</CompleteMultipartUpload>");
        let mut call = Self::simple("complete the upload of", Method::POST, key);
        call.within = COMPLETED_WITHIN;
        call.query = vec![("uploadId", id)];
        call.headers.push(("content-type", "application/xml".to_owned()));
        if is_new {
            call.headers.push(("if-none-match", "*".to_owned()));
        }
        call.payload = Payload::new(body);
        self.call(&call, Some(XML_BYTES_MAX), |answer| Ok(answer::completed(&answer.body)?)).await
    }

    /// Gives back what was uploaded so far; false if there was nothing.
    pub(super) async fn abort(&self, key: &str, id: &str) -> Result<bool, S3Error> {
        let mut call = Self::simple("abort the upload of", Method::DELETE, key);
        call.query = vec![("uploadId", id)];
        or_missing(self.call(&call, Some(XML_BYTES_MAX), |_| Ok(())).await).map(|done| done.is_some())
    }

    /// An address at which anybody can read the object for so long: a secret.
    pub(super) fn presign_get(&self, key: &str, good_for: Duration) -> SecretString {
        let seconds = good_for.as_secs().clamp(1, PRESIGNED_SECONDS_MAX);
        self.signer().presign(&Method::GET, &self.url(key, &[]), seconds)
    }
}

fn content_md5(bytes: &[u8]) -> String {
    let mut md5 = fast_md5::Md5::new();
    md5.update(bytes);
    STANDARD.encode(md5.finalize())
}

fn or_missing<T>(got: Result<T, S3Error>) -> Result<Option<T>, S3Error> {
    match got {
        Ok(got) => Ok(Some(got)),
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => Err(error),
    }
}
