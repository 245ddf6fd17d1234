//! A bucket of a simulated store: it keeps versions, and enforces locks by the simulated clock.
//!
//! Like the rest of the simulation it is a reading of its own, of Amazon's pages "How S3 Object Lock works" and "Deleting object
//! versions": a delete without a version only hides, a locked version can't be deleted or unlocked before its time, and a lock of
//! mode `GOVERNANCE` only by a key that may bypass it. It is used by its transport, and inspected by its methods.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream;
use http::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, DATE, ETAG, IF_MATCH, IF_NONE_MATCH, RANGE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};

use crate::clock::Clock;
use crate::text::hex;
use crate::transport::{Request, Response, Transport, TransportError};

/// A bucket. Clones are one bucket.
#[derive(Debug, Clone)]
pub struct SimBucket {
    clock: Arc<dyn Clock>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    keeps_versions: bool,
    may_bypass: bool,
    refused: BTreeSet<&'static str>,
    /// By key, the oldest version first.
    objects: BTreeMap<String, Vec<Version>>,
    uploads: BTreeMap<String, Upload>,
    /// Of versions and uploads that were made.
    count: u64,
    /// The requests so far, by what they were.
    requests: BTreeMap<String, u64>,
}

/// A version of an object.
#[derive(Debug, Clone)]
pub struct Version {
    /// Its name in the store.
    pub id: String,
    /// None for a delete marker.
    pub bytes: Option<Bytes>,
    /// Without quotes.
    pub etag: String,
    /// The mode and the end of its lock.
    pub lock: Option<(String, Timestamp)>,
    /// Whether it has a legal hold.
    pub has_legal_hold: bool,
    md5: Option<String>,
}

#[derive(Debug)]
struct Upload {
    key: String,
    md5: Option<String>,
    initiated: Timestamp,
    parts: BTreeMap<u32, (Bytes, String)>,
}

/// The status, the headers and the body of an answer.
struct Answer {
    status: StatusCode,
    headers: Vec<(HeaderName, String)>,
    body: Bytes,
}

impl Answer {
    fn new(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self { status, headers: Vec::new(), body: body.into() }
    }

    fn xml(root: &str, content: &str) -> Self {
        Self::new(StatusCode::OK, format!("<{root}>{content}</{root}>"))
    }

    fn with(mut self, name: impl Into<HeaderName>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }
}

fn refusal(status: StatusCode, code: &str) -> Answer {
    Answer::new(status, format!("<Error><Code>{code}</Code><Message>simulated</Message></Error>"))
}

fn denied() -> Answer {
    refusal(StatusCode::FORBIDDEN, "AccessDenied")
}

impl SimBucket {
    /// An empty bucket. One that does not keep versions has no locks either.
    pub fn new(clock: Arc<dyn Clock>, keeps_versions: bool) -> Self {
        let state = State { keeps_versions, ..State::default() };
        Self { clock, state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the key may bypass locks of mode `GOVERNANCE` from now on.
    pub fn let_bypass(&self, may_bypass: bool) {
        self.state().may_bypass = may_bypass;
    }

    /// Denies requests with this argument from now on, such as `retention`.
    pub fn deny(&self, argument: &'static str) {
        self.state().refused.insert(argument);
    }

    /// Every version by key, the oldest first.
    pub fn versions(&self) -> BTreeMap<String, Vec<Version>> {
        self.state().objects.clone()
    }

    /// The keys that stand for bytes now.
    pub fn keys(&self) -> Vec<String> {
        let state = self.state();
        let is_there = |versions: &[Version]| versions.last().is_some_and(|last| last.bytes.is_some());
        state.objects.iter().filter(|(_, versions)| is_there(versions)).map(|(key, _)| key.clone()).collect()
    }

    /// The bytes that each key stands for now.
    pub fn contents(&self) -> BTreeMap<String, Bytes> {
        let state = self.state();
        let newest = |versions: &Vec<Version>| versions.last().and_then(|last| last.bytes.clone());
        state.objects.iter().filter_map(|(key, versions)| Some((key.clone(), newest(versions)?))).collect()
    }

    /// Somebody removes an object, with all its versions.
    pub fn remove(&self, key: &str) {
        self.state().objects.remove(key);
    }

    /// The newest version of an object changes in a byte.
    pub fn damage(&self, key: &str) {
        let mut state = self.state();
        let newest = state.objects.get_mut(key).and_then(|versions| versions.last_mut());
        if let Some(bytes) = newest.and_then(|newest| newest.bytes.as_mut()) {
            let mut damaged = bytes.to_vec();
            if let Some(last) = damaged.last_mut() {
                // Not a bit that is turned: twice would be never.
                *last = last.wrapping_add(1);
            }
            *bytes = damaged.into();
        }
    }

    /// How many requests there were since this was last asked, by method and first argument.
    pub fn requests(&self) -> BTreeMap<String, u64> {
        std::mem::take(&mut self.state().requests)
    }
}

impl Transport for SimBucket {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        Box::pin(async move {
            let now = self.clock.now();
            let path = request.url.path().trim_start_matches('/');
            let (_, key) = path.split_once('/').unwrap_or((path, ""));
            let query: BTreeMap<String, String> = request.url.query_pairs().into_owned().collect();
            let call = Call { request: &request, key, query: &query, now };
            let answer = if request.headers.contains_key(AUTHORIZATION) {
                self.state().answer(&call)
            } else {
                denied()
            };
            let date = now.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
            let length = answer.body.len().to_string();
            let is_head = request.method == Method::HEAD;
            let mut headers = HeaderMap::new();
            for (name, value) in [(DATE, date), (CONTENT_LENGTH, length)].into_iter().chain(answer.headers) {
                headers.extend(HeaderValue::try_from(value).ok().map(|value| (name, value)));
            }
            let body = if is_head { Bytes::new() } else { answer.body };
            let body = Box::pin(stream::iter([Ok(body)]));
            Ok(Response { status: answer.status, headers, body })
        })
    }
}

/// A request, taken apart.
struct Call<'a> {
    request: &'a Request,
    key: &'a str,
    query: &'a BTreeMap<String, String>,
    now: Timestamp,
}

impl Call<'_> {
    fn has(&self, argument: &str) -> bool {
        self.query.contains_key(argument)
    }

    fn argument(&self, name: &str) -> &str {
        self.query.get(name).map_or("", String::as_str)
    }

    fn header(&self, name: impl AsRef<str>) -> Option<&str> {
        self.request.headers.get(name.as_ref()).and_then(|value| value.to_str().ok())
    }

    /// The text between the first such element's tags in the body.
    fn element(&self, name: &str) -> Option<&str> {
        let text = std::str::from_utf8(&self.request.body).ok()?;
        Some(text.split_once(&format!("<{name}>"))?.1.split_once('<')?.0)
    }

    fn bypasses(&self) -> bool {
        self.header("x-amz-bypass-governance-retention") == Some("true")
    }
}

fn md5_of(bytes: &[u8]) -> [u8; 16] {
    let mut md5 = fast_md5::Md5::new();
    md5.update(bytes);
    md5.finalize()
}

fn md5(bytes: &[u8]) -> String {
    hex(&md5_of(bytes))
}

/// Whether the body is the one that was signed, and has the MD5 that was promised. Only a part may be unsigned.
fn is_as_sent(call: &Call<'_>) -> bool {
    let body = &call.request.body;
    let is_signed = match call.header("x-amz-content-sha256") {
        Some("UNSIGNED-PAYLOAD") => call.has("partNumber"),
        signed => signed == Some(&hex(&Sha256::digest(body))),
    };
    is_signed
        && call.header("content-md5").is_none_or(|sent| STANDARD.decode(sent) == Ok(md5_of(body).to_vec()))
}

impl State {
    fn answer(&mut self, call: &Call<'_>) -> Answer {
        let method = call.request.method.as_str();
        let first =
            ["versions", "versioning", "object-lock", "uploads", "list-type", "retention", "legal-hold"];
        let first = first.into_iter().find(|name| call.has(name));
        *self.requests.entry(format!("{method} {}", first.unwrap_or("object"))).or_default() += 1;
        if self.refused.iter().any(|argument| call.has(argument)) {
            return denied();
        }
        if !is_as_sent(call) {
            return refusal(StatusCode::BAD_REQUEST, "BadDigest");
        }
        match (method, first) {
            ("GET", Some("versioning")) => {
                let status = if self.keeps_versions { "<Status>Enabled</Status>" } else { "" };
                Answer::xml("VersioningConfiguration", status)
            }
            ("GET", Some("object-lock")) if self.keeps_versions => {
                Answer::xml("ObjectLockConfiguration", "<ObjectLockEnabled>Enabled</ObjectLockEnabled>")
            }
            ("GET", Some("object-lock")) => {
                refusal(StatusCode::NOT_FOUND, "ObjectLockConfigurationNotFoundError")
            }
            ("GET", Some("list-type")) => self.list(call),
            ("GET", Some("versions")) => self.list_versions(call),
            ("GET", Some("uploads")) => self.list_uploads(call),
            ("POST", Some("uploads")) => self.begin(call),
            ("PUT", Some("retention")) => self.lock(call),
            ("PUT", Some("legal-hold")) => self.hold(call),
            ("GET", _) if call.has("uploadId") => self.list_parts(call),
            ("POST", _) => self.complete(call),
            ("PUT", _) if call.has("uploadId") => self.part(call),
            ("DELETE", _) if call.has("uploadId") => match self.uploads.remove(call.argument("uploadId")) {
                Some(_) => Answer::new(StatusCode::NO_CONTENT, ""),
                None => refusal(StatusCode::NOT_FOUND, "NoSuchUpload"),
            },
            ("PUT", _) => self.put(call),
            ("DELETE", _) => self.delete(call),
            ("GET" | "HEAD", _) => self.get(call),
            _ => refusal(StatusCode::NOT_IMPLEMENTED, "NotImplemented"),
        }
    }

    fn list(&self, call: &Call<'_>) -> Answer {
        let mut content = "<IsTruncated>false</IsTruncated>".to_owned();
        let prefix = call.argument("prefix");
        for (key, versions) in self.objects.iter().filter(|(key, _)| key.starts_with(prefix)) {
            let Some((bytes, etag)) =
                versions.last().and_then(|last| Some((last.bytes.as_ref()?, &last.etag)))
            else {
                continue;
            };
            // Writing to a String cannot fail.
            let _ = write!(
                content,
                "<Contents><Key>{key}</Key><Size>{}</Size><ETag>&quot;{etag}&quot;</ETag></Contents>",
                bytes.len()
            );
        }
        Answer::xml("ListBucketResult", &content)
    }

    fn list_versions(&self, call: &Call<'_>) -> Answer {
        let mut content = "<IsTruncated>false</IsTruncated>".to_owned();
        // Last, as some stores have them.
        let mut markers = String::new();
        let prefix = call.argument("prefix");
        for (key, versions) in self.objects.iter().filter(|(key, _)| key.starts_with(prefix)) {
            for (place, version) in versions.iter().rev().enumerate() {
                let (id, is_latest) = (&version.id, place == 0);
                let inner =
                    format!("<Key>{key}</Key><VersionId>{id}</VersionId><IsLatest>{is_latest}</IsLatest>");
                let _ = match &version.bytes {
                    Some(bytes) => write!(content, "<Version>{inner}<Size>{}</Size></Version>", bytes.len()),
                    None => write!(markers, "<DeleteMarker>{inner}</DeleteMarker>"),
                };
            }
        }
        content.push_str(&markers);
        Answer::xml("ListVersionsResult", &content)
    }

    fn list_uploads(&self, call: &Call<'_>) -> Answer {
        let mut content = "<IsTruncated>false</IsTruncated>".to_owned();
        let prefix = call.argument("prefix");
        for (id, Upload { key, initiated, .. }) in &self.uploads {
            if key.starts_with(prefix) {
                let _ = write!(
                    content,
                    "<Upload><Key>{key}</Key><UploadId>{id}</UploadId><Initiated>{initiated}</Initiated></Upload>"
                );
            }
        }
        Answer::xml("ListMultipartUploadsResult", &content)
    }

    fn begin(&mut self, call: &Call<'_>) -> Answer {
        self.count += 1;
        let id = format!("upload-{}", self.count);
        let md5 = call.header("x-amz-meta-md5").map(str::to_owned);
        let upload = Upload { key: call.key.to_owned(), md5, initiated: call.now, parts: BTreeMap::new() };
        self.uploads.insert(id.clone(), upload);
        Answer::xml("InitiateMultipartUploadResult", &format!("<UploadId>{id}</UploadId>"))
    }

    fn part(&mut self, call: &Call<'_>) -> Answer {
        let Some(upload) = self.uploads.get_mut(call.argument("uploadId")) else {
            return refusal(StatusCode::NOT_FOUND, "NoSuchUpload");
        };
        let Ok(number) = call.argument("partNumber").parse() else {
            return refusal(StatusCode::BAD_REQUEST, "InvalidArgument");
        };
        let bytes = call.request.body.clone();
        let etag = md5(&bytes);
        upload.parts.insert(number, (bytes, etag.clone()));
        Answer::new(StatusCode::OK, "").with(ETAG, format!("\"{etag}\""))
    }

    fn list_parts(&self, call: &Call<'_>) -> Answer {
        let Some(upload) = self.uploads.get(call.argument("uploadId")) else {
            return refusal(StatusCode::NOT_FOUND, "NoSuchUpload");
        };
        let mut content = "<IsTruncated>false</IsTruncated>".to_owned();
        for (number, (bytes, etag)) in &upload.parts {
            let _ = write!(
                content,
                "<Part><PartNumber>{number}</PartNumber><Size>{}</Size><ETag>&quot;{etag}&quot;</ETag></Part>",
                bytes.len()
            );
        }
        Answer::xml("ListPartsResult", &content)
    }

    fn complete(&mut self, call: &Call<'_>) -> Answer {
        let is_there =
            self.objects.get(call.key).and_then(|all| all.last()).is_some_and(|last| last.bytes.is_some());
        if call.header(IF_NONE_MATCH).is_some() && is_there {
            return refusal(StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
        }
        let Some(upload) = self.uploads.remove(call.argument("uploadId")) else {
            return refusal(StatusCode::NOT_FOUND, "NoSuchUpload");
        };
        let parts: Vec<&[u8]> = upload.parts.values().map(|(bytes, _)| &**bytes).collect();
        let bytes = Bytes::from(parts.concat());
        let etag = format!("{}-{}", md5(&bytes), parts.len());
        let id = self.add(call, Some(bytes), etag, upload.md5.clone());
        Answer::xml("CompleteMultipartUploadResult", "<ETag>&quot;e&quot;</ETag>").with(VERSION_ID, id)
    }

    fn put(&mut self, call: &Call<'_>) -> Answer {
        let bytes = call.request.body.clone();
        let etag = md5(&bytes);
        let id = self.add(call, Some(bytes), etag.clone(), None);
        Answer::new(StatusCode::OK, "").with(VERSION_ID, id).with(ETAG, format!("\"{etag}\""))
    }

    /// Adds a version, with the lock that the request asks for; its id.
    fn add(&mut self, call: &Call<'_>, bytes: Option<Bytes>, etag: String, md5: Option<String>) -> String {
        self.count += 1;
        let id = if self.keeps_versions { format!("v{}", self.count) } else { "null".to_owned() };
        let until = call.header("x-amz-object-lock-retain-until-date").and_then(|time| time.parse().ok());
        let lock = call.header("x-amz-object-lock-mode").map(str::to_owned).zip(until);
        let version = Version { id: id.clone(), bytes, etag, lock, has_legal_hold: false, md5 };
        let versions = self.objects.entry(call.key.to_owned()).or_default();
        if !self.keeps_versions {
            versions.clear();
        }
        versions.push(version);
        id
    }

    /// The version that the request names; without one the newest.
    fn version(&mut self, call: &Call<'_>) -> Option<&mut Version> {
        let versions = self.objects.get_mut(call.key)?;
        match call.query.get("versionId") {
            Some(id) => versions.iter_mut().find(|version| version.id == *id),
            None => versions.last_mut(),
        }
        .filter(|version| version.bytes.is_some())
    }

    fn get(&mut self, call: &Call<'_>) -> Answer {
        let Some(Version { id, bytes: Some(bytes), etag, lock, has_legal_hold, md5 }) = self.version(call)
        else {
            return refusal(StatusCode::NOT_FOUND, "NoSuchKey");
        };
        if call.header(IF_MATCH).is_some_and(|wanted| wanted.trim_matches('"') != etag) {
            return refusal(StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
        }
        let all = bytes.len();
        let range = call.header(RANGE).and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
        let mut answer = match range {
            Some((from, to)) => {
                let (from, to) = (from.parse().unwrap_or(0), to.parse::<usize>().map_or(all, |to| to + 1));
                if from >= to.min(all) {
                    return refusal(StatusCode::RANGE_NOT_SATISFIABLE, "InvalidRange");
                }
                let part = bytes.slice(from..to.min(all));
                let range = format!("bytes {from}-{}/{all}", from + part.len() - 1);
                Answer::new(StatusCode::PARTIAL_CONTENT, part).with(CONTENT_RANGE, range)
            }
            None => Answer::new(StatusCode::OK, bytes.clone()),
        };
        answer = answer.with(ETAG, format!("\"{etag}\"")).with(VERSION_ID, id.clone());
        if let Some(md5) = md5 {
            answer = answer.with(META_MD5, md5.clone());
        }
        if let Some((mode, until)) = lock {
            answer = answer.with(LOCK_MODE, mode.clone()).with(LOCK_UNTIL, until.to_string());
        }
        if *has_legal_hold {
            answer = answer.with(LEGAL_HOLD, "ON");
        }
        answer
    }

    fn delete(&mut self, call: &Call<'_>) -> Answer {
        let (may_bypass, keeps_versions) = (self.may_bypass, self.keeps_versions);
        let gone = || Answer::new(StatusCode::NO_CONTENT, "");
        let Some(id) = call.query.get("versionId") else {
            if keeps_versions {
                self.add(call, None, String::new(), None);
            } else {
                self.objects.remove(call.key);
            }
            return gone();
        };
        let Some(versions) = self.objects.get_mut(call.key) else { return gone() };
        let is_locked = |version: &Version| {
            let is_active = |(mode, until): &(String, Timestamp)| {
                *until > call.now && !(mode == "GOVERNANCE" && call.bypasses() && may_bypass)
            };
            version.has_legal_hold || version.lock.as_ref().is_some_and(is_active)
        };
        if versions.iter().any(|version| version.id == *id && is_locked(version)) {
            return denied();
        }
        versions.retain(|version| version.id != *id);
        if versions.is_empty() {
            self.objects.remove(call.key);
        }
        gone()
    }

    fn lock(&mut self, call: &Call<'_>) -> Answer {
        let may_bypass = self.may_bypass && call.bypasses();
        let keeps_versions = self.keeps_versions;
        let wanted = call.element("RetainUntilDate").and_then(|time| time.parse::<Timestamp>().ok());
        let Some((mode, until)) = call.element("Mode").zip(wanted) else {
            return refusal(StatusCode::BAD_REQUEST, "MalformedXML");
        };
        if until <= call.now || !keeps_versions {
            return refusal(StatusCode::BAD_REQUEST, "InvalidRequest");
        }
        let Some(version) = self.version(call) else { return refusal(StatusCode::NOT_FOUND, "NoSuchKey") };
        if let Some((before, end)) = version.lock.as_ref().filter(|(_, end)| *end > call.now) {
            let is_weaker = until < *end || (before == "COMPLIANCE" && mode != "COMPLIANCE");
            if is_weaker && (before == "COMPLIANCE" || !may_bypass) {
                return denied();
            }
        }
        version.lock = Some((mode.to_owned(), until));
        Answer::new(StatusCode::OK, "")
    }

    fn hold(&mut self, call: &Call<'_>) -> Answer {
        let is_on = call.element("Status") == Some("ON");
        let Some(version) = self.version(call) else { return refusal(StatusCode::NOT_FOUND, "NoSuchKey") };
        version.has_legal_hold = is_on;
        Answer::new(StatusCode::OK, "")
    }
}

const VERSION_ID: HeaderName = HeaderName::from_static("x-amz-version-id");
const META_MD5: HeaderName = HeaderName::from_static("x-amz-meta-md5");
const LOCK_MODE: HeaderName = HeaderName::from_static("x-amz-object-lock-mode");
const LOCK_UNTIL: HeaderName = HeaderName::from_static("x-amz-object-lock-retain-until-date");
const LEGAL_HOLD: HeaderName = HeaderName::from_static("x-amz-object-lock-legal-hold");
