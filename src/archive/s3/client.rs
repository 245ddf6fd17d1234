//! Requests to a bucket: signed, bounded, and repeated where that may help.
//!
//! All requests here may be sent twice: a second time has no further effect. (Beginning an upload twice leaves one behind,
//! which is cleaned up like all abandoned ones.) A key that may have expired is read anew.

use std::fmt::{self, Debug, Write as _};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use jiff::Timestamp;
use secrecy::SecretString;
use sha2::{Digest as _, Sha256};
use url::Url;

use crate::archive::md5::{Md5, Md5Sum};
use crate::archive::s3::credentials::BucketKey;
use crate::archive::s3::error::{S3Cause, S3Error};
use crate::archive::s3::sign::{Signer, UNSIGNED, encode, query, sha256_hex};
use crate::archive::s3::xml::{self, ListedObject, ListedPart, ListedVersion, Page, UnfinishedUpload};
use crate::clock::{Clock, timeout};
use crate::credentials::Credentials;
use crate::disk::blocking;
use crate::policy::bucket::{Addressing, BucketRules, LockMode};
use crate::randomness::Randomness;
use crate::retry::{Attempts, REQUESTS, retry_after};
use crate::text::{hex, printable};
use crate::transport::{Body, Purpose, Request, Response, Transport, read_body};

/// The limit of a request, beside the time that its body takes.
const REQUEST_TIMEOUT: Duration = Duration::from_mins(1);

/// The limit of completing an upload: Amazon's documentation says that a large one may take several minutes.
const COMPLETE_TIMEOUT: Duration = Duration::from_mins(10);

/// A request of an upload that fails for now is repeated at least for this time: an image is long on its way, and a store that asks
/// for less may do so for a minute or two.
const UPLOAD_PATIENCE: Duration = Duration::from_mins(2);

/// Also for a store that asks for no pause.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);

/// A request with a body has a second more for each of these: the slowest line on which an image is worth sending.
const SLOWEST_BYTES_PER_SECOND: u64 = 64 << 10;

/// The longest response in XML: a listing of 1000 keys of 1 KiB each, percent-encoded, fits.
const XML_BYTES_MAX: usize = 8 << 20;

/// The longest listing: ten million keys. A store that has more pages never ends its listing.
const PAGES_MAX: usize = 10_000;

/// The most bytes of all pages of a listing, since what is listed is kept in memory: some 400 for each of a million keys.
const LISTING_BYTES_MAX: usize = 512 << 20;

/// The longest validity of a presigned address: a week, the limit of signature version 4.
const PRESIGNED_SECONDS_MAX: u64 = 7 * 24 * 60 * 60;

/// The header by which a key with the right to that ends locks of mode `GOVERNANCE` before their time.
const BYPASS: &str = "x-amz-bypass-governance-retention";

/// Where the objects of an archive are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Location {
    /// The store's address, without a slash at its end.
    pub endpoint: Url,
    /// The region that requests are signed for.
    pub region: String,
    /// The bucket's name.
    pub bucket: String,
    /// The beginning of all keys of the archive: empty, or ending with a slash.
    pub prefix: String,
    /// How the bucket is used.
    pub rules: BucketRules,
}

/// A request before it is signed.
struct S3Request<'a> {
    /// For errors: "list", "read".
    doing: &'static str,
    method: Method,
    key: &'a str,
    query: Vec<(&'a str, &'a str)>,
    headers: Vec<(&'static str, String)>,
    body: Bytes,
    /// In place of `body`.
    part: Option<Part>,
    /// The signature covers it, where it is one.
    body_sha256: String,
    /// Beside the time that the body takes.
    timeout: Duration,
    /// The pauses between its attempts last at least this time together.
    patience: Duration,
}

impl<'a> S3Request<'a> {
    fn new(doing: &'static str, method: Method, key: &'a str) -> Self {
        Self {
            doing,
            method,
            key,
            query: Vec::new(),
            headers: Vec::new(),
            body: Bytes::new(),
            part: None,
            body_sha256: sha256_hex(&[]),
            timeout: REQUEST_TIMEOUT,
            patience: Duration::ZERO,
        }
    }

    fn set_body(&mut self, body: impl Into<Bytes>) {
        self.body = body.into();
        self.body_sha256 = sha256_hex(&self.body);
    }
}

/// The bytes of a part, as they arrived. Clones are the same bytes.
#[derive(Debug, Clone, Default)]
pub(super) struct Part(pub(super) Arc<Vec<Bytes>>);

impl Part {
    pub(super) fn len(&self) -> u64 {
        self.0.iter().map(|chunk| chunk.len() as u64).sum()
    }

    fn sha256(&self) -> String {
        let mut sha256 = Sha256::new();
        self.0.iter().for_each(|chunk| sha256.update(chunk));
        hex(&sha256.finalize())
    }

    pub(super) fn md5(&self) -> Md5Sum {
        let mut md5 = Md5::new();
        self.0.iter().for_each(|chunk| md5.update(chunk));
        md5.finish()
    }

    fn body(&self) -> Body {
        let chunks = Arc::clone(&self.0);
        Box::pin(stream::iter((0..chunks.len()).filter_map(move |nth| Some(Ok(chunks.get(nth)?.clone())))))
    }
}

/// Where a part belongs.
#[derive(Debug, Clone)]
pub(super) struct PartOf {
    pub(super) key: String,
    pub(super) upload: String,
    /// Counts from zero.
    pub(super) number: usize,
}

/// An object without its bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) bytes: Option<u64>,
    pub(super) etag: String,
    /// The MD5 of the image, by the object's metadata.
    pub(super) md5: Option<String>,
    /// The store's name of this version; none where the bucket keeps no versions.
    pub(super) version_id: Option<String>,
    /// Until when it is locked; none also where the key may not know.
    pub(super) locked_until: Option<Timestamp>,
    pub(super) has_legal_hold: bool,
}

impl Head {
    fn of(headers: &HeaderMap) -> Self {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        Self {
            bytes: text("content-length").and_then(|length| length.parse().ok()),
            etag: etag(headers),
            md5: text("x-amz-meta-md5").map(str::to_owned),
            version_id: version_id(headers),
            locked_until: text("x-amz-object-lock-retain-until-date").and_then(|time| time.parse().ok()),
            has_legal_hold: text("x-amz-object-lock-legal-hold") == Some("ON"),
        }
    }
}

/// The client of one bucket.
pub(super) struct Client {
    pub(super) location: S3Location,
    pub(super) key: Arc<BucketKey>,
    transport: Arc<dyn Transport>,
    pub(super) clock: Arc<dyn Clock>,
    randomness: Arc<dyn Randomness>,
    /// Whether the bucket requires a `Content-MD5` with every body, as one with object locks does.
    requires_md5: AtomicBool,
    /// Whether parts have to be signed, also where their way is encrypted: the `ETag` of a part is not its MD5, which nothing
    /// else shows of a part that is not signed, or the store takes no others.
    signs_parts: AtomicBool,
}

impl Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("location", &self.location).finish_non_exhaustive()
    }
}

impl Client {
    pub(super) fn new(
        location: S3Location,
        key: BucketKey,
        transport: Arc<dyn Transport>,
        clock: Arc<dyn Clock>,
        randomness: Arc<dyn Randomness>,
    ) -> Self {
        let (key, requires_md5, signs_parts) =
            (Arc::new(key), AtomicBool::new(false), AtomicBool::new(false));
        Self { location, key, transport, clock, randomness, requires_md5, signs_parts }
    }

    /// An object's address as people write it.
    pub(super) fn shown(&self, key: &str) -> String {
        format!("s3://{}/{}", self.location.bucket, printable(key))
    }

    fn url(&self, key: &str, arguments: &[(&str, &str)]) -> Url {
        let mut url = self.location.endpoint.clone();
        let root = url.path().trim_end_matches('/').to_owned();
        let (bucket, key) = (encode(&self.location.bucket, false), encode(key, true));
        let host = format!("{bucket}.{}", url.host_str().unwrap_or_default());
        let is_virtual = self.location.rules.addressing == Addressing::Virtual;
        if is_virtual && url.set_host(Some(&host)).is_ok() {
            url.set_path(&format!("{root}/{key}"));
        } else {
            let slash = if key.is_empty() { "" } else { "/" };
            url.set_path(&format!("{root}/{bucket}{slash}{key}"));
        }
        url.set_query((!arguments.is_empty()).then(|| query(arguments.iter().copied())).as_deref());
        url
    }

    fn signer<'a>(&'a self, credentials: &'a Credentials) -> Signer<'a> {
        Signer { credentials, region: &self.location.region, now: self.clock.now() }
    }

    /// The headers by which the store encrypts what it is given.
    fn encryption(&self) -> Option<(&'static str, String)> {
        let encryption = self.location.rules.encryption?;
        Some(("x-amz-server-side-encryption", encryption.as_str().to_owned()))
    }

    /// Whether parts have to be signed, and so to be in memory.
    pub(super) fn signs_parts(&self) -> bool {
        self.signs_parts.load(Ordering::Relaxed)
    }

    /// Whether the MD5 of every body has to be known before it is sent.
    pub(super) fn requires_md5(&self) -> bool {
        self.requires_md5.load(Ordering::Relaxed)
    }

    pub(super) fn sign_parts(&self, why: &str) {
        if !self.signs_parts.swap(true, Ordering::Relaxed) {
            tracing::debug!("s3://{}: parts are signed from now on: {why}", self.location.bucket);
        }
    }

    /// Sends a request once and waits for the head of a response with a status of success.
    async fn send(&self, request: &S3Request<'_>) -> Result<Response, S3Cause> {
        self.send_with(request, None).await
    }

    /// The same, with a body that can be sent only once.
    async fn send_with(
        &self,
        request: &S3Request<'_>,
        streamed: Option<(Body, u64)>,
    ) -> Result<Response, S3Cause> {
        let url = self.url(request.key, &request.query);
        let mut headers = HeaderMap::new();
        for (name, value) in &request.headers {
            let value = HeaderValue::from_str(value)
                .map_err(|_| S3Cause::Unexpected(format!("it gave a `{name}` that can't be sent back")))?;
            headers.insert(HeaderName::from_static(name), value);
        }
        if self.requires_md5() && !request.body.is_empty() {
            let bytes = request.body.clone();
            let md5 = blocking(move || content_md5(&bytes)).await;
            headers
                .extend(HeaderValue::try_from(md5).map(|md5| (HeaderName::from_static("content-md5"), md5)));
        }
        let used = self.key.current();
        self.signer(&used).sign(&request.method, &url, &request.body_sha256, &mut headers);
        let (method, body) = (request.method.clone(), request.body.clone());
        let bare = Request { method, url, headers, body, purpose: Purpose::Image };
        let can_be_repeated = streamed.is_none();
        let streamed = streamed.or_else(|| request.part.as_ref().map(|part| (part.body(), part.len())));
        let response = match streamed {
            Some((body, length)) => self.transport.send_stream(bare, body, length).await?,
            None => self.transport.send(bare).await?,
        };
        if response.status.is_success() {
            return Ok(response);
        }
        let status = response.status;
        let retry_after = retry_after(status, &response.headers, self.clock.now());
        // The status decides, even if the body can't be read.
        let body = read_body(response.body, XML_BYTES_MAX).await.unwrap_or_default();
        let (code, message) = xml::error(&body);
        if code == "InvalidRequest" && message.contains("Content-MD5") {
            let is_known = self.requires_md5.swap(true, Ordering::Relaxed);
            if !is_known && can_be_repeated {
                return Box::pin(self.send(request)).await;
            }
        }
        if may_be_of_an_old_key(status, &code) {
            let key = Arc::clone(&self.key);
            if blocking(move || key.renew(&used)).await && can_be_repeated {
                return Box::pin(self.send(request)).await;
            }
        }
        Err(S3Cause::Refused { status, code, message, retry_after })
    }

    /// Makes attempts at `request` until one succeeds, or another would not help.
    async fn with_retries<T, F: Future<Output = Result<T, S3Cause>>>(
        &self,
        request: &S3Request<'_>,
        attempt: impl Fn() -> F,
    ) -> Result<T, S3Error> {
        let bytes = request.part.as_ref().map_or(request.body.len() as u64, Part::len);
        let limit = limit_of(request.timeout, bytes);
        let (mut attempts, mut waited) = (Attempts::new(REQUESTS), Duration::ZERO);
        loop {
            let cause = match timeout(&*self.clock, limit, attempt()).await {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(cause)) => cause,
                Err(timed_out) => S3Cause::from(timed_out),
            };
            attempts.count_failure();
            let is_exhausted = attempts.are_exhausted() && waited >= request.patience;
            if is_exhausted || !cause.is_transient() {
                return Err(S3Error::new(request.doing, self.shown(request.key), cause));
            }
            let pause = self.pause_after(&attempts, &cause);
            waited += pause;
            self.clock.sleep(pause).await;
        }
    }

    /// Sends one request, once alone and for at most `limit`: any answer will do.
    pub(super) async fn answers(&self, key: &str, limit: Duration) -> Result<(), S3Error> {
        let request = S3Request::new("read", Method::GET, key);
        let cause = match timeout(&*self.clock, limit, self.send(&request)).await {
            Ok(Ok(_) | Err(S3Cause::Refused { .. })) => return Ok(()),
            Ok(Err(cause)) => cause,
            Err(timed_out) => S3Cause::from(timed_out),
        };
        Err(S3Error::new(request.doing, self.shown(key), cause))
    }

    /// Sends a request until the response, with a body of at most `max` bytes, is one that `read` accepts.
    async fn call<T>(
        &self,
        request: &S3Request<'_>,
        max: usize,
        read: impl Fn(&HeaderMap, Bytes) -> Result<T, S3Cause>,
    ) -> Result<T, S3Error> {
        self.with_retries(request, || async {
            let response = self.send(request).await?;
            let body = read_body(response.body, max).await?;
            read(&response.headers, body)
        })
        .await
    }

    /// All pages of a listing, item by item. Either all of it was read, or this is an error.
    async fn pages<T>(
        &self,
        (doing, key): (&'static str, &str),
        fixed: &[(&str, &str)],
        read: impl Fn(&[u8]) -> Result<Page<T>, S3Cause>,
        mut each: impl FnMut(T),
    ) -> Result<(), S3Error> {
        let (mut next, mut bytes): (Vec<(&'static str, String)>, usize) = (Vec::new(), 0);
        for _ in 0..PAGES_MAX {
            let mut request = S3Request::new(doing, Method::GET, key);
            request.query = fixed.to_vec();
            request.query.extend(next.iter().map(|(name, value)| (*name, value.as_str())));
            let read = |_: &HeaderMap, body: Bytes| Ok((body.len(), read(&body)?));
            let (len, page) = self.call(&request, XML_BYTES_MAX, read).await?;
            bytes += len;
            page.items.into_iter().for_each(&mut each);
            match page.next {
                None => return Ok(()),
                Some(same) if same == next || bytes > LISTING_BYTES_MAX => break,
                Some(more) => next = more,
            }
        }
        let endless = S3Cause::Unexpected("the listing has no end".to_owned());
        Err(S3Error::new(doing, self.shown(&self.location.prefix), endless))
    }

    /// Every object whose key begins with `prefix`.
    pub(super) async fn list(&self, prefix: &str, each: impl FnMut(ListedObject)) -> Result<(), S3Error> {
        let fixed = [("list-type", "2"), ("encoding-type", "url"), ("prefix", prefix), ("max-keys", "1000")];
        self.pages(("list", ""), &fixed, xml::objects, each).await
    }

    /// Every unfinished upload whose key begins with `prefix`; none where the store does not list them.
    pub(super) async fn list_uploads(&self, prefix: &str) -> Result<Vec<UnfinishedUpload>, S3Error> {
        let fixed = [("uploads", ""), ("encoding-type", "url"), ("prefix", prefix), ("max-uploads", "1000")];
        let mut found = Vec::new();
        let listed = self
            .pages(("list the unfinished uploads of", ""), &fixed, xml::uploads, |upload| found.push(upload))
            .await;
        match listed {
            Err(error) if error.is_unsupported() => Ok(Vec::new()),
            listed => listed.map(|()| found),
        }
    }

    /// The parts of an unfinished upload.
    pub(super) async fn list_parts(&self, key: &str, id: &str) -> Result<Vec<ListedPart>, S3Error> {
        let fixed = [("uploadId", id), ("max-parts", "1000")];
        let mut found = Vec::new();
        self.pages(("list the parts of", key), &fixed, xml::parts, |part| found.push(part)).await?;
        Ok(found)
    }

    /// A setting of the bucket, as `read` finds it in the response; empty where there is none.
    pub(super) async fn setting(
        &self,
        doing: &'static str,
        name: &'static str,
        read: impl Fn(&[u8]) -> Result<String, S3Cause>,
    ) -> Result<String, S3Error> {
        let mut request = S3Request::new(doing, Method::GET, "");
        request.query = vec![(name, "")];
        let found = self.call(&request, XML_BYTES_MAX, |_, body| read(&body)).await;
        none_if_missing(found).map(Option::unwrap_or_default)
    }

    /// The bytes of a small object, and its `ETag`; `None` if there is none.
    pub(super) async fn get(&self, key: &str, max: usize) -> Result<Option<(Bytes, String)>, S3Error> {
        let request = S3Request::new("read", Method::GET, key);
        none_if_missing(self.call(&request, max, |headers, body| Ok((body, etag(headers)))).await)
    }

    /// The bytes of an object, or of one version of it, from `offset` on, up to `until`, with their body still to be read;
    /// only if it has this `ETag`, where one is given.
    pub(super) async fn open(
        &self,
        (key, version): (&str, Option<&str>),
        offset: u64,
        until: Option<u64>,
        etag: Option<&str>,
    ) -> Result<Response, S3Error> {
        let mut request = S3Request::new("read", Method::GET, key);
        if offset > 0 || until.is_some() {
            let last = until.map_or_else(String::new, |until| until.saturating_sub(1).to_string());
            request.headers.push(("range", format!("bytes={offset}-{last}")));
        }
        if let Some(etag) = etag {
            request.headers.push(("if-match", etag.to_owned()));
        }
        request.query.extend(version.map(|version| ("versionId", version)));
        self.with_retries(&request, || self.send(&request)).await
    }

    /// An object without its bytes; `None` if there is none.
    pub(super) async fn head(&self, key: &str) -> Result<Option<Head>, S3Error> {
        self.head_version(key, None).await
    }

    /// A version of an object without its bytes. What has the key now, where the store does not have that version: in a bucket
    /// that was copied every object has another.
    pub(super) async fn head_version(
        &self,
        key: &str,
        version: Option<&str>,
    ) -> Result<Option<Head>, S3Error> {
        let mut request = S3Request::new("look up", Method::HEAD, key);
        request.query.extend(version.map(|version| ("versionId", version)));
        match self.call(&request, 0, |headers, _| Ok(Head::of(headers))).await {
            Err(error) if version.is_some() && error.is_missing_version() => {
                let request = S3Request::new("look up", Method::HEAD, key);
                none_if_missing(self.call(&request, 0, |headers, _| Ok(Head::of(headers))).await)
            }
            found => none_if_missing(found),
        }
    }

    /// Writes a small object.
    pub(super) async fn put(&self, key: &str, kind: &str, bytes: Vec<u8>) -> Result<(), S3Error> {
        self.put_with(key, kind, bytes, Vec::new()).await.map(drop)
    }

    /// Writes a small object that is locked from the beginning; its version.
    pub(super) async fn put_locked(
        &self,
        key: &str,
        bytes: Vec<u8>,
        mode: LockMode,
        until: Timestamp,
    ) -> Result<Option<String>, S3Error> {
        let headers = vec![
            ("x-amz-object-lock-mode", mode.as_str().to_owned()),
            ("x-amz-object-lock-retain-until-date", time_of_lock(until)),
        ];
        self.put_with(key, "text/plain", bytes, headers).await
    }

    async fn put_with(
        &self,
        key: &str,
        kind: &str,
        bytes: Vec<u8>,
        headers: Vec<(&'static str, String)>,
    ) -> Result<Option<String>, S3Error> {
        let mut request = S3Request::new("write", Method::PUT, key);
        // The last words of an upload are written so.
        (request.headers, request.patience) = (headers, UPLOAD_PATIENCE);
        request.headers.extend(self.encryption());
        request.headers.push(("content-type", kind.to_owned()));
        // A bucket with object locks requires it, and for small objects it costs nothing.
        request.headers.push(("content-md5", content_md5(&bytes)));
        request.set_body(bytes);
        self.call(&request, XML_BYTES_MAX, |headers, _| Ok(version_id(headers))).await
    }

    /// Sets until when a version is locked. A store never shortens a lock, unless `bypasses` is set and the key has the right to
    /// that.
    pub(super) async fn set_retention(
        &self,
        key: &str,
        version: Option<&str>,
        (mode, until): (LockMode, Timestamp),
        bypasses: bool,
    ) -> Result<(), S3Error> {
        let (mode, until) = (mode.as_str(), time_of_lock(until));
        let body =
            format!("<Retention><Mode>{mode}</Mode><RetainUntilDate>{until}</RetainUntilDate></Retention>");
        let mut request = S3Request::new("lock", Method::PUT, key);
        request.headers.extend(bypasses.then(|| (BYPASS, "true".to_owned())));
        self.put_setting(request, "retention", version, body).await
    }

    /// Puts a legal hold on a version, or removes it.
    pub(super) async fn set_legal_hold(
        &self,
        key: &str,
        version: Option<&str>,
        is_on: bool,
    ) -> Result<(), S3Error> {
        let status = if is_on { "ON" } else { "OFF" };
        let body = format!("<LegalHold><Status>{status}</Status></LegalHold>");
        let request = S3Request::new("put a legal hold on", Method::PUT, key);
        self.put_setting(request, "legal-hold", version, body).await
    }

    async fn put_setting<'a>(
        &self,
        mut request: S3Request<'a>,
        name: &'static str,
        version: Option<&'a str>,
        body: String,
    ) -> Result<(), S3Error> {
        request.query.push((name, ""));
        request.query.extend(version.map(|version| ("versionId", version)));
        request.headers.push(("content-type", "application/xml".to_owned()));
        request.headers.push(("content-md5", content_md5(body.as_bytes())));
        request.set_body(body);
        self.call(&request, XML_BYTES_MAX, |_, _| Ok(())).await
    }

    /// Deletes one version of an object, for good.
    pub(super) async fn delete_version(
        &self,
        key: &str,
        version: &str,
        bypasses: bool,
    ) -> Result<(), S3Error> {
        let mut request = S3Request::new("delete a version of", Method::DELETE, key);
        request.query.push(("versionId", version));
        request.headers.extend(bypasses.then(|| (BYPASS, "true".to_owned())));
        none_if_missing(self.call(&request, XML_BYTES_MAX, |_, _| Ok(())).await).map(|_| ())
    }

    /// Every version of every object whose key begins with `prefix`, and what hides them.
    pub(super) async fn list_versions(
        &self,
        prefix: &str,
        each: impl FnMut(ListedVersion),
    ) -> Result<(), S3Error> {
        let fixed = [("versions", ""), ("encoding-type", "url"), ("prefix", prefix), ("max-keys", "1000")];
        self.pages(("list the versions in", ""), &fixed, xml::versions, each).await
    }

    /// Deletes an object, if there is one.
    pub(super) async fn delete(&self, key: &str) -> Result<(), S3Error> {
        let request = S3Request::new("delete", Method::DELETE, key);
        none_if_missing(self.call(&request, XML_BYTES_MAX, |_, _| Ok(())).await).map(|_| ())
    }

    /// Begins an upload; its id.
    pub(super) async fn begin_upload(
        &self,
        key: &str,
        kind: &str,
        md5: Option<String>,
    ) -> Result<String, S3Error> {
        let mut request = S3Request::new("begin the upload of", Method::POST, key);
        request.patience = UPLOAD_PATIENCE;
        request.query = vec![("uploads", "")];
        request.headers.push(("content-type", kind.to_owned()));
        request.headers.extend(md5.map(|md5| ("x-amz-meta-md5", md5)));
        request.headers.extend(self.encryption());
        let class = self.location.rules.storage_class.clone();
        request.headers.extend(class.map(|class| ("x-amz-storage-class", class)));
        let (id, has_other_etags) = self
            .call(&request, XML_BYTES_MAX, |headers, body| {
                Ok((xml::upload_id(&body)?, has_other_etags(headers)))
            })
            .await?;
        if has_other_etags {
            self.sign_parts("the bucket is encrypted so that `ETag`s are no MD5s");
        }
        Ok(id)
    }

    /// Sends a part; its `ETag`, which completing the upload has to name.
    pub(super) async fn upload_part(&self, of: &PartOf, part: &Part, md5: Md5Sum) -> Result<String, S3Error> {
        if !self.signs_parts() {
            match self.upload_part_once(of, part, md5, self.is_encrypted()).await {
                Ok(etag) if etag == md5.to_string() => return Ok(etag),
                Ok(etag) => {
                    self.sign_parts("the `ETag` of a part is not its MD5");
                    // Whose signature the store has just checked.
                    if !self.is_encrypted() {
                        return Ok(etag);
                    }
                }
                Err(error) if self.is_encrypted() && error.is_refusal() && !error.is_missing() => {
                    self.sign_parts("the store refuses one that is not");
                }
                Err(error) => return Err(error),
            }
        }
        self.upload_part_once(of, part, md5, false).await
    }

    async fn upload_part_once(
        &self,
        of: &PartOf,
        part: &Part,
        md5: Md5Sum,
        is_unsigned: bool,
    ) -> Result<String, S3Error> {
        let number = (of.number + 1).to_string();
        let mut request = part_request(of, &number, Some(md5));
        request.patience = UPLOAD_PATIENCE;
        request.part = Some(part.clone());
        if !is_unsigned {
            let part = part.clone();
            request.body_sha256 = blocking(move || part.sha256()).await;
        }
        self.call(&request, XML_BYTES_MAX, |headers, _| etag_of_part(headers)).await
    }

    /// Sends a part of `length` bytes while it arrives, once and unsigned; its `ETag`. Without an MD5 the caller has to compare
    /// that.
    pub(super) async fn stream_part(
        &self,
        of: &PartOf,
        body: Body,
        length: u64,
        md5: Option<Md5Sum>,
    ) -> Result<String, S3Error> {
        let number = (of.number + 1).to_string();
        let request = part_request(of, &number, md5);
        let sent = async {
            let response = self.send_with(&request, Some((body, length))).await?;
            read_body(response.body, XML_BYTES_MAX).await?;
            etag_of_part(&response.headers)
        };
        let limit = limit_of(request.timeout, length);
        let cause = match timeout(&*self.clock, limit, sent).await {
            Ok(Ok(etag)) => return Ok(etag),
            Ok(Err(cause)) => cause,
            Err(timed_out) => S3Cause::from(timed_out),
        };
        let error = S3Error::new(request.doing, self.shown(&of.key), cause);
        if error.is_refusal() && !error.is_missing() && !self.requires_md5() {
            self.sign_parts("the store refuses one that is not");
        }
        Err(error)
    }

    /// Waits before the next attempt at something of an upload; false if there should be none.
    pub(super) async fn pause(&self, attempts: &mut UploadAttempts, cause: &S3Cause) -> bool {
        attempts.attempts.count_failure();
        if attempts.attempts.are_exhausted() && attempts.waited >= UPLOAD_PATIENCE {
            return false;
        }
        let pause = self.pause_after(&attempts.attempts, cause);
        attempts.waited += pause;
        self.clock.sleep(pause).await;
        true
    }

    fn pause_after(&self, attempts: &Attempts, cause: &S3Cause) -> Duration {
        let retry_after = match cause {
            S3Cause::Refused { retry_after, .. } => *retry_after,
            _ => None,
        };
        attempts.pause(retry_after, &*self.randomness).max(SHORTEST_PAUSE)
    }

    /// Whether what is sent can be neither read nor changed on its way.
    fn is_encrypted(&self) -> bool {
        self.location.endpoint.scheme() == "https"
    }

    /// Makes an object of the parts. With `is_new`, only if the key is still free, where the store supports that.
    pub(super) async fn complete(
        &self,
        key: &str,
        id: &str,
        etags: &[String],
        is_new: bool,
    ) -> Result<(), S3Error> {
        let mut body = String::from("<CompleteMultipartUpload>");
        for (number, etag) in (1..).zip(etags) {
            let etag: String = etag.chars().filter(|character| !"<>&\"".contains(*character)).collect();
            // Writing to a String cannot fail.
            let _ = write!(body, "<Part><PartNumber>{number}</PartNumber><ETag>\"{etag}\"</ETag></Part>");
        }
        body.push_str("</CompleteMultipartUpload>");
        let mut request = S3Request::new("complete the upload of", Method::POST, key);
        (request.timeout, request.patience) = (COMPLETE_TIMEOUT, UPLOAD_PATIENCE);
        request.query = vec![("uploadId", id)];
        request.headers.push(("content-type", "application/xml".to_owned()));
        if is_new {
            request.headers.push(("if-none-match", "*".to_owned()));
        }
        request.set_body(body);
        self.call(&request, XML_BYTES_MAX, |_, body| xml::completed(&body)).await
    }

    /// Aborts an upload, which deletes its parts; false if there was no such upload.
    pub(super) async fn abort(&self, key: &str, id: &str) -> Result<bool, S3Error> {
        let mut request = S3Request::new("abort the upload of", Method::DELETE, key);
        request.query = vec![("uploadId", id)];
        none_if_missing(self.call(&request, XML_BYTES_MAX, |_, _| Ok(())).await).map(|done| done.is_some())
    }

    /// An address, itself a secret, at which anybody can read the object, or one version of it, for `valid_for`, at most a week.
    pub(super) fn presign_get(&self, key: &str, version: Option<&str>, valid_for: Duration) -> SecretString {
        let seconds = valid_for.as_secs().clamp(1, PRESIGNED_SECONDS_MAX);
        let arguments: Vec<_> = version.map(|version| ("versionId", version)).into_iter().collect();
        self.signer(&self.key.current()).presign(&Method::GET, &self.url(key, &arguments), seconds)
    }
}

/// The attempts at a part that is read from its source again.
#[derive(Debug)]
pub(super) struct UploadAttempts {
    attempts: Attempts,
    waited: Duration,
}

impl Default for UploadAttempts {
    fn default() -> Self {
        Self { attempts: Attempts::new(REQUESTS), waited: Duration::ZERO }
    }
}

fn part_request<'a>(of: &'a PartOf, number: &'a str, md5: Option<Md5Sum>) -> S3Request<'a> {
    let mut request = S3Request::new("upload a part of", Method::PUT, &of.key);
    request.query = vec![("partNumber", number), ("uploadId", &of.upload)];
    request.headers.extend(md5.map(|md5| ("content-md5", STANDARD.encode(md5.bytes()))));
    UNSIGNED.clone_into(&mut request.body_sha256);
    request
}

fn etag_of_part(headers: &HeaderMap) -> Result<String, S3Cause> {
    match etag(headers) {
        etag if etag.is_empty() => Err(S3Cause::Unexpected("no `ETag` for a part".to_owned())),
        etag => Ok(etag),
    }
}

/// Whether the store says that it encrypts in a way by which the `ETag` of a part is not its MD5.
fn has_other_etags(headers: &HeaderMap) -> bool {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    text("x-amz-server-side-encryption").starts_with("aws:kms")
        || !text("x-amz-server-side-encryption-customer-algorithm").is_empty()
}

/// The limit of a request whose body has these bytes.
fn limit_of(limit: Duration, bytes: u64) -> Duration {
    limit + Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND)
}

/// Without the quotes that most stores put around it; empty if there is none.
fn etag(headers: &HeaderMap) -> String {
    let text = headers.get(header::ETAG).and_then(|etag| etag.to_str().ok());
    text.unwrap_or_default().trim_matches('"').to_owned()
}

/// Whether a refusal may mean that the key has expired or was replaced. The response to a HEAD has no code.
fn may_be_of_an_old_key(status: StatusCode, code: &str) -> bool {
    let is_about_keys = matches!(
        code,
        "ExpiredToken"
            | "InvalidToken"
            | "TokenRefreshRequired"
            | "InvalidAccessKeyId"
            | "SignatureDoesNotMatch"
    );
    is_about_keys || code.is_empty() && matches!(status.as_u16(), 400 | 403)
}

/// The version of the object; none where the bucket keeps no versions. One with the id `null` is overwritten by the next.
fn version_id(headers: &HeaderMap) -> Option<String> {
    let text = headers.get("x-amz-version-id").and_then(|id| id.to_str().ok())?;
    (!text.is_empty() && text != "null").then(|| text.to_owned())
}

fn time_of_lock(until: Timestamp) -> String {
    until.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn content_md5(bytes: &[u8]) -> String {
    let mut md5 = fast_md5::Md5::new();
    md5.update(bytes);
    STANDARD.encode(md5.finalize())
}

fn none_if_missing<T>(got: Result<T, S3Error>) -> Result<Option<T>, S3Error> {
    match got {
        Ok(got) => Ok(Some(got)),
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => Err(error),
    }
}
