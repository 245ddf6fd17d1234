//! Claims about archives in buckets, against a store in memory that fails as a test wants it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream;
use http::{HeaderMap, StatusCode, header};
use secrecy::ExposeSecret as _;
use url::Url;

use crate::archive::backend::Archive;
use crate::archive::catalogue::{ProblemKind, StoredCopy};
use crate::archive::copy_reader::CopyReader;
use crate::archive::manifest::Manifest;
use crate::archive::manifest_cache::ManifestCache;
use crate::archive::manifest_update::ManifestUpdate;
use crate::archive::md5::{Md5, Md5Sum};
use crate::archive::proof::VerifiedCopy;
use crate::archive::s3::archive::S3Archive;
use crate::archive::s3::client::S3Location;
use crate::archive::s3::credentials::BucketKey;
use crate::archive::s3::sign::{encode, sha256_hex};
use crate::archive::stats::ArchiveStats;
use crate::archive::testing::{NoRandomness, TestClock, image, manifest_of};
use crate::archive::tests::contract::{Fixture, without_etag};
use crate::archive::transfer::hash::Hashers;
use crate::archive::transfer::sink;
use crate::archive::transfer::sink::{ImageVersion, Sink, SinkError};
use crate::archive::transfer::source::{ImageSource as _, SourceError};
use crate::archive::verify::{self, Outcome};
use crate::clock::Clock as _;
use crate::copies::CopyId;
use crate::credentials::Credentials;
use crate::disk::{Access, Disk as _, read_file, replace_file};
use crate::policy::bucket::{Addressing, BucketRules, Encryption, LockMode, LockRule, Noncurrent};
use crate::sim::bucket::SimBucket;
use crate::sim::clock::SimClock;
use crate::sim::disk::MemoryDisk;
use crate::text::chain;
use crate::transport::{Reached, Request, Response, Transport, TransportError, read_body};

mod parts;

const MIB: usize = 1 << 20;
const NOW: &str = "2026-11-01T02:30:00Z";
const INSTANCE: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";
const SNAPSHOT: &str = "b0c0ab00-0000-4000-8000-00000000f105";
const FOLDER: &str = "snapwarden/ch-gva-2/9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";

/// What the store does instead of what it should.
#[derive(Debug, Clone)]
enum Effect {
    /// Answers so, and does nothing.
    Answer(u16, String),
    /// Never answers.
    Hang,
    /// Does nothing, and the connection breaks.
    Cut,
    /// Does what it should, and the answer is lost.
    Lose,
    /// Answers well, and does nothing.
    Forget,
    /// Stores other bytes.
    Flip,
}

/// What is special about a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// The `ETag` of a part is anything.
    OtherEtags,
    /// The same, and it says so.
    Kms,
    /// It refuses what is not signed.
    WantsSignatures,
    /// It refuses what has no `Content-MD5`.
    WantsMd5,
}

/// How a part was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PartSent {
    Signed,
    WithMd5,
    WithNothing,
}

fn refuse(status: u16, code: &str) -> Effect {
    Effect::Answer(status, format!("<Error><Code>{code}</Code><Message>no {code}</Message></Error>"))
}

fn html() -> Effect {
    Effect::Answer(200, "<html><body>Please sign in</body></html>".to_owned())
}

#[derive(Debug, Clone, Default)]
struct Object {
    bytes: Bytes,
    etag: String,
    md5: Option<String>,
}

#[derive(Debug)]
struct Begin {
    key: String,
    /// With their `ETag`s.
    parts: BTreeMap<usize, (Bytes, String)>,
    md5: Option<String>,
    initiated: String,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Object>,
    uploads: BTreeMap<String, Begin>,
    /// The effect on the next request whose name begins so; `true`: on all of them.
    faults: Vec<(&'static str, Effect, bool)>,
    log: VecDeque<String>,
    /// Keys in one page; 0 for all.
    page: usize,
    /// Every page names another, with the same token.
    is_ring: bool,
    /// More is there, without a word how to get it.
    is_cut: bool,
    counter: usize,
    manner: Option<Manner>,
    parts_sent: Vec<PartSent>,
}

/// A bucket `bucket` in memory.
#[derive(Debug, Default)]
struct Store {
    state: Mutex<State>,
    parts_in_flight: AtomicUsize,
    parts_in_flight_max: AtomicUsize,
}

impl Store {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn fault(&self, on: &'static str, effect: Effect) {
        self.state().faults.push((on, effect, false));
    }

    fn always(&self, on: &'static str, effect: Effect) {
        self.state().faults.push((on, effect, true));
    }

    fn put(&self, key: &str, bytes: impl Into<Bytes>) {
        let state = &mut *self.state();
        state.counter += 1;
        let etag = format!("e{}", state.counter);
        state.objects.insert(key.to_owned(), Object { bytes: bytes.into(), etag, md5: None });
    }

    fn keys(&self) -> Vec<String> {
        let short = |key: &String| key.strip_prefix(FOLDER).unwrap_or(key).to_owned();
        self.state().objects.keys().map(short).collect()
    }

    /// What was asked since this was last asked, but for looking.
    fn done(&self) -> Vec<String> {
        let log = std::mem::take(&mut self.state().log);
        log.into_iter().filter(|name| !name.starts_with("list") && !name.starts_with("head")).collect()
    }

    fn asked(&self, on: &str) -> usize {
        self.state().log.iter().filter(|name| name.starts_with(on)).count()
    }
}

fn answer(status: u16, body: impl Into<Bytes>) -> Response {
    let body: Bytes = body.into();
    let headers = HeaderMap::from_iter([(header::CONTENT_LENGTH, body.len().into())]);
    let body = Box::pin(stream::iter([Ok(body)]));
    Response { status: StatusCode::from_u16(status).unwrap(), headers, body }
}

fn error(status: u16, code: &str) -> Response {
    let Effect::Answer(status, body) = refuse(status, code) else { unreachable!() };
    answer(status, body)
}

/// What a request is called in the log.
fn name_of(request: &Request, key: &str, query: &BTreeMap<String, String>) -> String {
    let end = key.strip_prefix(FOLDER).unwrap_or(key).trim_start_matches('/');
    let end = end.split_once(SNAPSHOT).map_or(end, |(_, end)| end);
    let part = query.get("partNumber");
    match (request.method.as_str(), part, query.contains_key("uploads"), query.contains_key("uploadId")) {
        ("GET", _, true, _) => "list-uploads".to_owned(),
        ("GET", _, _, true) => "list-parts".to_owned(),
        ("GET", ..) if query.contains_key("list-type") => "list".to_owned(),
        ("POST", _, true, _) => "begin".to_owned(),
        ("POST", _, _, true) => "complete".to_owned(),
        ("PUT", Some(part), ..) => format!("part {part}"),
        ("DELETE", _, _, true) => "abort".to_owned(),
        (method, ..) => format!("{} {end}", method.to_lowercase()),
    }
}

fn how_sent(request: &Request) -> PartSent {
    let is_unsigned =
        request.headers.get("x-amz-content-sha256").is_none_or(|signed| signed == "UNSIGNED-PAYLOAD");
    match (is_unsigned, request.headers.contains_key("content-md5")) {
        (false, _) => PartSent::Signed,
        (true, true) => PartSent::WithMd5,
        (true, false) => PartSent::WithNothing,
    }
}

/// A token that only the store understands.
fn hex(key: &str) -> String {
    key.bytes().fold(String::new(), |mut token, byte| {
        write!(token, "{byte:02x}").unwrap();
        token
    })
}

fn unhex(token: &str) -> String {
    let digits = token.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap());
    digits.map(|pair| char::from(u8::from_str_radix(pair, 16).unwrap())).collect()
}

impl Store {
    fn serve(&self, request: &Request, name: &str, key: &str, query: &BTreeMap<String, String>) -> Response {
        let state = &mut *self.state();
        state.counter += 1;
        let text = |name: &str| request.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
        let id = query.get("uploadId").cloned().unwrap_or_default();
        match name.split(' ').next().unwrap_or_default() {
            "list" => {
                let prefix = &query["prefix"];
                let after = query.get("continuation-token").map(|token| unhex(token)).unwrap_or_default();
                let all: Vec<_> = state
                    .objects
                    .iter()
                    .filter(|(key, _)| key.starts_with(prefix) && **key > after)
                    .collect();
                let page = if state.page == 0 { all.len() } else { state.page };
                let mut body = String::from("<ListBucketResult><EncodingType>url</EncodingType>");
                for (key, object) in all.iter().take(page) {
                    let (key, size, etag) = (encode(key, false), object.bytes.len(), &object.etag);
                    let etag = format!("<ETag>&quot;{etag}&quot;</ETag>");
                    write!(body, "<Contents><Key>{key}</Key><Size>{size}</Size>{etag}</Contents>").unwrap();
                }
                let last =
                    all.get(page.wrapping_sub(1)).filter(|_| all.len() > page).map(|(key, _)| (*key).clone());
                let last = if state.is_ring { Some("again".to_owned()) } else { last };
                match last {
                    Some(_) if state.is_cut => body.push_str("<IsTruncated>true</IsTruncated>"),
                    Some(key) => write!(
                        body,
                        "<IsTruncated>true</IsTruncated><NextContinuationToken>{}</NextContinuationToken>",
                        hex(&key)
                    )
                    .unwrap(),
                    None => body.push_str("<IsTruncated>false</IsTruncated>"),
                }
                answer(200, body + "</ListBucketResult>")
            }
            "list-uploads" => {
                let mut body = String::from("<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>");
                for (id, begun) in &state.uploads {
                    if begun.key.starts_with(&query["prefix"]) {
                        let (key, at) = (&begun.key, &begun.initiated);
                        write!(
                            body,
                            "<Upload><Key>{key}</Key><UploadId>{id}</UploadId><Initiated>{at}</Initiated></Upload>"
                        )
                        .unwrap();
                    }
                }
                answer(200, body + "</ListMultipartUploadsResult>")
            }
            "list-parts" => {
                let Some(begun) = state.uploads.get(&id) else { return error(404, "NoSuchUpload") };
                let mut body = String::from("<ListPartsResult><IsTruncated>false</IsTruncated>");
                for (number, (bytes, etag)) in &begun.parts {
                    let size = bytes.len();
                    write!(
                        body,
                        "<Part><PartNumber>{number}</PartNumber><Size>{size}</Size><ETag>&quot;{etag}&quot;</ETag></Part>"
                    )
                    .unwrap();
                }
                answer(200, body + "</ListPartsResult>")
            }
            "begin" => {
                let id = format!("u/{}+", state.counter);
                let begun = Begin {
                    key: key.to_owned(),
                    parts: BTreeMap::new(),
                    md5: text("x-amz-meta-md5"),
                    initiated: NOW.to_owned(),
                };
                state.uploads.insert(id.clone(), begun);
                let body = format!("<UploadId>{id}</UploadId>");
                let mut answer = answer(
                    200,
                    format!("<InitiateMultipartUploadResult>{body}</InitiateMultipartUploadResult>"),
                );
                if state.manner == Some(Manner::Kms) {
                    answer.headers.insert("x-amz-server-side-encryption", "aws:kms".parse().unwrap());
                }
                answer
            }
            "part" => {
                let (body, sent) = (&request.body, how_sent(request));
                state.parts_sent.push(sent);
                let Some(begun) = state.uploads.get_mut(&id) else { return error(404, "NoSuchUpload") };
                let is_good =
                    text("content-md5").is_none_or(|sent| sent == STANDARD.encode(md5(body).bytes()));
                let etag = match state.manner {
                    Some(Manner::WantsSignatures) if sent != PartSent::Signed => {
                        return error(403, "AccessDenied");
                    }
                    Some(Manner::WantsMd5) if text("content-md5").is_none() => {
                        let why = "<Error><Code>InvalidRequest</Code><Message>Content-MD5 is missing</Message></Error>";
                        return answer(400, why);
                    }
                    _ if !is_good => return error(400, "BadDigest"),
                    Some(Manner::OtherEtags | Manner::Kms) => format!("{:032x}", state.counter),
                    _ => md5(body).to_string(),
                };
                begun
                    .parts
                    .insert(query["partNumber"].parse().unwrap(), (request.body.clone(), etag.clone()));
                let mut answer = answer(200, "");
                answer.headers.insert(header::ETAG, format!("\"{etag}\"").parse().unwrap());
                answer
            }
            "complete" => {
                let Some(begun) = state.uploads.get(&id) else { return error(404, "NoSuchUpload") };
                if text("if-none-match").is_some() && state.objects.contains_key(key) {
                    return error(412, "PreconditionFailed");
                }
                let wanted = std::str::from_utf8(&request.body).unwrap();
                for (number, (_, etag)) in &begun.parts {
                    if !wanted.contains(&format!("<PartNumber>{number}</PartNumber><ETag>\"{etag}\"</ETag>"))
                    {
                        return error(400, "InvalidPart");
                    }
                }
                if wanted.matches("<Part>").count() != begun.parts.len() {
                    return error(400, "InvalidPart");
                }
                let begun = state.uploads.remove(&id).unwrap();
                let parts: Vec<&[u8]> = begun.parts.values().map(|(part, _)| &**part).collect();
                let bytes = parts.concat().into();
                let etag = format!("m{}", state.counter);
                state.objects.insert(key.to_owned(), Object { bytes, etag, md5: begun.md5 });
                answer(
                    200,
                    "<CompleteMultipartUploadResult><ETag>\"m\"</ETag></CompleteMultipartUploadResult>",
                )
            }
            "abort" => match state.uploads.remove(&id) {
                Some(_) => answer(204, ""),
                None => error(404, "NoSuchUpload"),
            },
            "put" => {
                assert!(request.headers.contains_key("content-md5"));
                let etag = format!("e{}", state.counter);
                let object = Object { bytes: request.body.clone(), etag, md5: None };
                state.objects.insert(key.to_owned(), object);
                answer(200, "")
            }
            "delete" => {
                state.objects.remove(key);
                answer(204, "")
            }
            verb @ ("get" | "head") => {
                let Some(object) = state.objects.get(key) else { return error(404, "NoSuchKey") };
                let from = text("range").map(|range| {
                    range.strip_prefix("bytes=").unwrap().trim_end_matches('-').parse::<usize>().unwrap()
                });
                let mut answer = match from {
                    _ if text("if-match").is_some_and(|etag| etag.trim_matches('"') != object.etag) => {
                        return error(412, "PreconditionFailed");
                    }
                    Some(from) => {
                        let mut answer = answer(206, object.bytes.slice(from..));
                        let all = object.bytes.len();
                        let range = format!("bytes {from}-{}/{all}", all - 1);
                        answer.headers.insert(header::CONTENT_RANGE, range.parse().unwrap());
                        answer
                    }
                    None => answer(200, object.bytes.clone()),
                };
                if verb == "head" {
                    answer.body = Box::pin(stream::empty());
                }
                answer.headers.insert(header::ETAG, format!("\"{}\"", object.etag).parse().unwrap());
                if let Some(md5) = &object.md5 {
                    answer.headers.insert("x-amz-meta-md5", md5.parse().unwrap());
                }
                answer
            }
            other => panic!("{other}"),
        }
    }
}

impl Transport for Store {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        Box::pin(async move {
            assert!(request.headers[header::AUTHORIZATION].is_sensitive());
            let is_part = request.url.query().is_some_and(|query| query.contains("partNumber"));
            let signed = &request.headers["x-amz-content-sha256"];
            assert!(signed == &*sha256_hex(&request.body) || is_part && signed == "UNSIGNED-PAYLOAD");
            let key = request.url.path().strip_prefix("/bucket").unwrap().trim_start_matches('/');
            let key = key.replace("%1B", "\u{1b}").replace("%5B", "[");
            let query: BTreeMap<String, String> = request.url.query_pairs().into_owned().collect();
            let name = name_of(&request, &key, &query);
            let effect = {
                let mut state = self.state();
                state.log.push_back(name.clone());
                let found = state.faults.iter().position(|(on, ..)| {
                    name.strip_prefix(on).is_some_and(|rest| rest.is_empty() || !rest.starts_with('-'))
                });
                found.map(|at| {
                    if state.faults[at].2 { state.faults[at].1.clone() } else { state.faults.remove(at).1 }
                })
            };
            if name.starts_with("part") {
                let now = self.parts_in_flight.fetch_add(1, Ordering::SeqCst) + 1;
                self.parts_in_flight_max.fetch_max(now, Ordering::SeqCst);
                tokio::task::yield_now().await;
                self.parts_in_flight.fetch_sub(1, Ordering::SeqCst);
            }
            let cut = || TransportError::new(Reached::Unknown, "the connection broke");
            match effect {
                None => Ok(self.serve(&request, &name, &key, &query)),
                Some(Effect::Answer(status, body)) => {
                    let mut answer = answer(status, body);
                    answer.headers.insert(header::RETRY_AFTER, "7".parse().unwrap());
                    Ok(answer)
                }
                Some(Effect::Hang) => std::future::pending().await,
                Some(Effect::Cut) => Err(cut()),
                Some(Effect::Lose) => {
                    self.serve(&request, &name, &key, &query);
                    Err(cut())
                }
                Some(Effect::Flip) => {
                    let mut body = request.body.to_vec();
                    body[0] ^= 1;
                    let other = Request { body: body.into(), headers: HeaderMap::new(), ..request };
                    Ok(self.serve(&other, &name, &key, &query))
                }
                Some(Effect::Forget) => {
                    let mut answer = answer(200, "");
                    let etag = sha256_hex(&request.body);
                    answer.headers.insert(header::ETAG, format!("\"{etag}\"").parse().unwrap());
                    Ok(answer)
                }
            }
        })
    }
}

struct Scene {
    store: Arc<Store>,
    archive: S3Archive,
}

fn archive(store: &Arc<Store>) -> S3Archive {
    archive_at("https://sos-ch-gva-2.exo.io", store)
}

fn archive_at(endpoint: &str, store: &Arc<Store>) -> S3Archive {
    let location = S3Location {
        endpoint: Url::parse(endpoint).unwrap(),
        region: "ch-gva-2".to_owned(),
        bucket: "bucket".to_owned(),
        prefix: "snapwarden/".to_owned(),
        rules: BucketRules::default(),
    };
    let credentials = Credentials::new("EXO1", "hush", None).unwrap();
    let name = "offsite".parse().unwrap();
    let clock = Arc::new(TestClock::at(NOW));
    S3Archive::new(name, location, credentials, store.clone(), clock, Arc::new(NoRandomness))
}

fn scene() -> Scene {
    let store = Arc::default();
    let archive = archive(&store);
    Scene { store, archive }
}

fn of() -> CopyId {
    CopyId {
        zone: "ch-gva-2".parse().unwrap(),
        instance_id: INSTANCE.parse().unwrap(),
        created_at: NOW.parse().unwrap(),
        snapshot_id: SNAPSHOT.parse().unwrap(),
    }
}

fn md5(bytes: &[u8]) -> Md5Sum {
    let mut md5 = Md5::new();
    md5.update(bytes);
    md5.finish()
}

fn bytes(len: usize) -> Bytes {
    let mut bytes = (0..251).collect::<Vec<u8>>().repeat(len / 251 + 1);
    bytes.truncate(len);
    bytes.into()
}

fn key(end: &str) -> String {
    format!("{FOLDER}/20261101T023000Z-{SNAPSHOT}{end}")
}

async fn sink(archive: &S3Archive) -> Box<dyn Sink> {
    match archive.begin(&of()).await.unwrap() {
        sink::Begin::Missing(output) => output.sink,
        sink::Begin::Stored(copy) => panic!("{copy:?}"),
    }
}

async fn write(sink: &mut Box<dyn Sink>, bytes: &Bytes) -> Result<(), SinkError> {
    let whole = ImageVersion { md5: md5(bytes), bytes: Some(bytes.len() as u64), etag: None };
    sink.expect(&whole)?;
    let mut rest = bytes.clone();
    while !rest.is_empty() {
        sink.write(rest.split_to(rest.len().min(700_001))).await?;
    }
    Ok(())
}

/// Writes the bytes of this range, of an image that is known.
async fn write_some(sink: &mut Box<dyn Sink>, image: &Bytes, range: std::ops::Range<usize>) {
    let whole = ImageVersion { md5: md5(image), bytes: Some(image.len() as u64), etag: None };
    sink.expect(&whole).unwrap();
    sink.write(image.slice(range)).await.unwrap();
}

/// One whole upload.
async fn store(archive: &S3Archive, bytes: &Bytes) -> Result<Manifest, SinkError> {
    let mut sink = sink(archive).await;
    match write(&mut sink, bytes).await {
        Ok(()) => sink.publish(manifest_of(bytes)).await,
        Err(error) => {
            sink.abandon().await;
            Err(error)
        }
    }
}

const WHOLE: [&str; 3] = [".json", ".qcow2", ".qcow2.md5"];

fn whole() -> Vec<String> {
    WHOLE.map(|end| key(end).strip_prefix(FOLDER).unwrap().to_owned()).to_vec()
}

#[tokio::test(start_paused = true)]
async fn an_image_is_uploaded_in_parts_and_visible_only_once_it_is_verified() {
    let Scene { store, archive } = scene();
    let image = bytes(20 * MIB);
    let mut sink = sink(&archive).await;
    write(&mut sink, &image).await.unwrap();
    assert!(store.keys().is_empty());
    let published = sink.publish(manifest_of(&image)).await.unwrap();
    let copy = VerifiedCopy::new(archive.name(), &published);
    assert_eq!((copy.bytes(), copy.archive().as_str()), (20 << 20, "offsite"));
    assert_eq!(store.keys(), whole());
    let mut done = store.done();
    done.retain(|name| !name.starts_with("get"));
    // Parts may arrive in any order; the manifest is the last word.
    done[1..4].sort();
    assert_eq!(done, ["begin", "part 1", "part 2", "part 3", "complete", "put .qcow2.md5", "put .json"]);
    assert!(store.parts_in_flight_max.load(Ordering::SeqCst) <= 2);
    let stored = store.state().objects[&key(".qcow2")].clone();
    assert_eq!((stored.bytes, stored.md5), (image.clone(), Some(md5(&image).to_string())));
    let sums = store.state().objects[&key(".qcow2.md5")].bytes.clone();
    assert_eq!(sums, format!("{}  20261101T023000Z-{SNAPSHOT}.qcow2\n", md5(&image)));
    // It is there now, and is not uploaded again.
    assert!(matches!(archive.begin(&of()).await.unwrap(), sink::Begin::Stored(again) if again == copy));
    let found = archive.catalogue().await.unwrap().copies()[0].manifest.clone();
    assert_eq!(without_etag(&found), manifest_of(&image));
    assert!(found.image.etag.is_some());
}

#[tokio::test(start_paused = true)]
async fn what_was_interrupted_is_resumed_and_no_part_is_sent_twice() {
    let image = bytes(41 * MIB);
    // Given up after an error; dropped as if killed, and continued by another process.
    for is_killed in [false, true] {
        let Scene { store, archive } = scene();
        let mut first = sink(&archive).await;
        write_some(&mut first, &image, 0..33 * MIB).await;
        if is_killed {
            drop(first);
        } else {
            first.abandon().await;
        }
        // The two before those that were on their way.
        let there = store.state().uploads.values().next().unwrap().parts.len();
        assert!((2..=4).contains(&there), "{there}");
        assert!(store.keys().is_empty(), "nothing is visible");
        store.done();
        let again = if is_killed { self::archive(&store) } else { archive };
        self::store(&again, &image).await.unwrap();
        let done = store.done();
        let sent = done.iter().filter(|name| name.starts_with("part")).count();
        assert_eq!((sent, done.iter().any(|name| name == "begin")), (6 - there, false), "{done:?}");
        assert_eq!(store.keys(), whole());
        assert_eq!(store.state().objects[&key(".qcow2")].bytes, image);
        assert!(store.state().uploads.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn an_upload_of_another_image_is_not_resumed_and_a_part_that_differs_is_sent_again() {
    let Scene { store, archive } = scene();
    let image = bytes(33 * MIB);
    let mut first = sink(&archive).await;
    write(&mut first, &image).await.unwrap();
    first.abandon().await;
    let mut other = image.to_vec();
    other[0] ^= 1;
    self::store(&archive, &other.clone().into()).await.unwrap();
    assert_eq!(store.state().objects[&key(".qcow2")].bytes, other);
    assert_eq!(store.state().uploads.len(), 1, "it is for the daily look");

    let Scene { store, archive } = scene();
    let mut first = sink(&archive).await;
    write(&mut first, &image).await.unwrap();
    first.abandon().await;
    for begun in store.state().uploads.values_mut() {
        begun.parts.get_mut(&2).unwrap().1 = "other".to_owned();
        begun.parts.remove(&4);
    }
    store.done();
    self::store(&archive, &image).await.unwrap();
    let sent = store.done().into_iter().filter(|name| name.starts_with("part")).collect::<Vec<_>>();
    assert!(sent.contains(&"part 2".to_owned()) && !sent.contains(&"part 1".to_owned()), "{sent:?}");
    assert_eq!(store.state().objects[&key(".qcow2")].bytes, image);
    // One that can't be looked at is no worse than none.
    for fault in ["list-uploads", "list-parts"] {
        let Scene { store, archive } = scene();
        let mut first = sink(&archive).await;
        write(&mut first, &image).await.unwrap();
        first.abandon().await;
        store.always(fault, refuse(403, "AccessDenied"));
        self::store(&archive, &image).await.unwrap();
        assert_eq!(store.keys(), whole(), "{fault}");
    }
}

#[tokio::test(start_paused = true)]
async fn two_processes_at_one_image_do_not_disturb_each_other() {
    let Scene { store, archive } = scene();
    let image = bytes(33 * MIB);
    let mut one = sink(&archive).await;
    write_some(&mut one, &image, 0..25 * MIB).await;
    let other = self::archive(&store);
    let mut two = sink(&other).await;
    write_some(&mut two, &image, 0..17 * MIB).await;
    one.write(image.slice(25 * MIB..)).await.unwrap();
    let first = one.publish(manifest_of(&image)).await.unwrap();
    // The upload is complete; the other continues, and finds the copy.
    two.write(image.slice(17 * MIB..)).await.unwrap();
    let second = two.publish(manifest_of(&image)).await.unwrap();
    assert_eq!(first, second);
    assert_eq!(store.keys(), whole());
    assert_eq!(archive.catalogue().await.unwrap().copies().len(), 1);

    // One that gives up, since its image is another, leaves the upload of the other.
    let Scene { store, archive } = scene();
    let mut one = sink(&archive).await;
    write_some(&mut one, &image, 0..25 * MIB).await;
    let mut two = sink(&self::archive(&store)).await;
    write_some(&mut two, &image, 0..17 * MIB).await;
    two.restart().await.unwrap();
    two.abandon().await;
    one.write(image.slice(25 * MIB..)).await.unwrap();
    one.publish(manifest_of(&image)).await.unwrap();
    assert_eq!(store.keys(), whole());
}

#[tokio::test(start_paused = true)]
async fn an_upload_outlasts_two_minutes_of_a_store_that_asks_for_less() {
    for on in ["begin", "part 1", "complete", "put .json"] {
        let Scene { store, archive } = scene();
        let began = tokio::time::Instant::now();
        store.always(on, refuse(503, "SlowDown"));
        let calm = Arc::clone(&store);
        tokio::spawn(async move {
            TestClock::at(NOW).sleep(Duration::from_secs(110)).await;
            calm.state().faults.clear();
        });
        self::store(&archive, &bytes(9 * MIB)).await.unwrap_or_else(|error| panic!("{on}: {error:?}"));
        assert!(began.elapsed() >= Duration::from_secs(110), "{on}");
    }
}

#[tokio::test(start_paused = true)]
async fn abandoned_uploads_are_looked_for_once_a_day() {
    let store: Arc<Store> = Arc::default();
    let (clock, name) = (Arc::new(SimClock::starting_at(NOW.parse().unwrap())), "offsite".parse().unwrap());
    let location = archive(&store).bucket.client.location.clone();
    let credentials = Credentials::new("EXO1", "hush", None).unwrap();
    let randomness = Arc::new(NoRandomness);
    let archive = S3Archive::new(name, location, credentials, store.clone(), clock.clone(), randomness);
    for (hours, looks) in [(0, 1), (1, 1), (22, 1), (2, 2), (25, 3)] {
        clock.step(jiff::SignedDuration::from_hours(hours));
        drop(sink(&archive).await);
        assert_eq!(store.asked("list-uploads"), looks, "after {hours} hours");
    }
}

#[tokio::test(start_paused = true)]
async fn what_can_not_be_aborted_is_tried_again_by_the_daily_look() {
    let Scene { store, archive } = scene();
    let mut sink = sink(&archive).await;
    write(&mut sink, &bytes(17 * MIB)).await.unwrap();
    store.always("abort", Effect::Answer(403, String::new()));
    sink.restart().await.unwrap();
    assert!(archive.bucket.clean().await.is_err());
    store.state().faults.clear();
    assert_eq!(archive.bucket.clean().await.unwrap(), 1);
    assert!(store.state().uploads.is_empty() && store.keys().is_empty());
}

#[tokio::test(start_paused = true)]
async fn an_image_that_begins_anew_is_the_second_one_alone() {
    let Scene { store, archive } = scene();
    let (first, second) = (bytes(9 * MIB), bytes(10 * MIB));
    let mut sink = sink(&archive).await;
    write(&mut sink, &first).await.unwrap();
    sink.restart().await.unwrap();
    write(&mut sink, &first).await.unwrap();
    sink.keep_bad().await.unwrap();
    write(&mut sink, &second).await.unwrap();
    sink.publish(manifest_of(&second)).await.unwrap();
    assert_eq!(store.state().objects[&key(".qcow2")].bytes, second);
    assert!(store.state().uploads.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_goes_wrong_now_and_then_is_tried_again() {
    let image = bytes(9 * MIB);
    for on in ["begin", "part 1", "part 2", "complete", "put .qcow2.md5", "put .json", "head", "list-uploads"]
    {
        for effect in [refuse(503, "SlowDown"), refuse(500, ""), Effect::Hang, Effect::Cut, html()] {
            // A page where nothing but the status is read is good news.
            if matches!(&effect, Effect::Answer(200, _)) && (on.starts_with("put") || on == "head") {
                continue;
            }
            let Scene { store, archive } = scene();
            store.fault(on, effect.clone());
            store.fault(on, effect.clone());
            self::store(&archive, &image).await.unwrap_or_else(|error| panic!("{on} {effect:?}: {error:?}"));
            assert_eq!(store.keys(), whole(), "{on} {effect:?}");
            assert_eq!(archive.catalogue().await.unwrap().copies().len(), 1);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_asks_for_time_gets_it() {
    let Scene { store, archive } = scene();
    store.fault("list", refuse(503, "SlowDown"));
    let began = tokio::time::Instant::now();
    archive.catalogue().await.unwrap();
    assert_eq!(began.elapsed().as_secs(), 7);
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_fails_leaves_nothing_that_can_be_read_and_says_why() {
    let image = bytes(9 * MIB);
    let cases = [
        ("begin", refuse(403, "AccessDenied"), "must be allowed to list, read, write and delete"),
        ("begin", refuse(404, "NoSuchBucket"), "create the bucket, or correct `bucket`"),
        ("begin", html(), "is `endpoint` the address of an S3 store?"),
        ("part 2", refuse(503, "SlowDown"), "upload a part of s3://bucket/snapwarden/ch-gva-2/"),
        ("part 2", Effect::Hang, "no answer within"),
        ("part 2", Effect::Forget, "InvalidPart"),
        (
            "complete",
            refuse(200, "InternalError"),
            "the store answers 200 OK (InternalError: no InternalError)",
        ),
        ("complete", refuse(403, "SignatureDoesNotMatch"), "check the archive's credentials"),
        ("complete", html(), "it is `html` instead of `CompleteMultipartUploadResult`"),
    ];
    for (on, effect, why) in cases {
        let Scene { store, archive } = scene();
        store.always(on, effect.clone());
        let error = self::store(&archive, &image).await.unwrap_err();
        let shown = chain(&error);
        assert!(shown.contains(why), "{on} {effect:?}: {shown}");
        assert!(!shown.contains("hush") && !shown.contains("Signature="), "{shown}");
        assert!(store.keys().is_empty(), "{on} {effect:?}: {:?}", store.keys());
        // Once it is mended, the parts that are there are used.
        store.state().faults.clear();
        self::store(&archive, &image).await.unwrap();
        assert_eq!((store.keys(), store.state().uploads.len()), (whole(), 0), "{on} {effect:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_without_its_manifest_is_no_copy_and_comes_anew() {
    let Scene { store, archive } = scene();
    let image = bytes(9 * MIB);
    store.always("put .json", refuse(503, "SlowDown"));
    self::store(&archive, &image).await.unwrap_err();
    let catalogue = archive.catalogue().await.unwrap();
    assert!(catalogue.copies().is_empty());
    assert_eq!(catalogue.problems()[0].kind, ProblemKind::NoManifest);
    store.state().faults.clear();
    self::store(&archive, &image).await.unwrap();
    assert_eq!(archive.catalogue().await.unwrap().copies().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_manifest_of_an_image_that_does_not_count_never_counts_for_the_next() {
    let Scene { store, archive } = scene();
    let image = bytes(9 * MIB);
    let corrupt = Manifest { corrupt_since: Some(NOW.parse().unwrap()), ..manifest_of(&image) };
    store.put(&key(".json"), corrupt.to_bytes());
    store.put(&key(".qcow2"), bytes(3));
    store.always("complete", refuse(400, "InvalidPart"));
    self::store(&archive, &image).await.unwrap_err();
    let done = store.done();
    let place = |wanted: &str| done.iter().position(|name| name == wanted).unwrap();
    assert!(place("delete .json") < place("complete"), "{done:?}");
    assert!(archive.catalogue().await.unwrap().copies().is_empty());
    store.state().faults.clear();
    self::store(&archive, &image).await.unwrap();
    let found = archive.catalogue().await.unwrap().copies()[0].manifest.clone();
    assert_eq!(without_etag(&found), manifest_of(&image));
    assert!(found.image.etag.is_some());
}

#[tokio::test(start_paused = true)]
async fn bytes_other_than_the_verified_ones_are_not_published() {
    let Scene { store, archive } = scene();
    let (image, other) = (bytes(9 * MIB), bytes(9 * MIB + 1));
    let mut sink = sink(&archive).await;
    write(&mut sink, &image).await.unwrap();
    let shown = chain(&sink.publish(manifest_of(&other)).await.unwrap_err());
    assert!(shown.contains("9437184 bytes were uploaded of 9437185 verified bytes"), "{shown}");
    assert!(store.keys().is_empty() && store.state().uploads.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_completed_upload_whose_answer_was_lost_is_known_again() {
    let Scene { store, archive } = scene();
    let image = bytes(9 * MIB);
    store.fault("complete", Effect::Lose);
    self::store(&archive, &image).await.unwrap();
    assert_eq!(store.keys(), whole());
    // But not where the upload is unknown, and the object is another one.
    let Scene { store, archive } = scene();
    store.put(&key(".qcow2"), image.clone());
    store.fault("complete", refuse(404, "NoSuchUpload"));
    self::store(&archive, &image).await.unwrap_err();
    assert!(archive.catalogue().await.unwrap().copies().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_second_of_two_processes_takes_the_copy_of_the_first_or_none() {
    let Scene { store, archive } = scene();
    let image = bytes(9 * MIB);
    let mut late = sink(&archive).await;
    write(&mut late, &image).await.unwrap();
    let other = self::archive(&store);
    let theirs = Manifest { policy: Some("theirs".into()), ..manifest_of(&image) };
    store.put(&key(".qcow2"), image.clone());
    let shown = chain(&late.publish(manifest_of(&image)).await.unwrap_err());
    assert!(shown.contains("412"), "{shown}");
    assert_eq!(store.keys().len(), 1);
    store.state().objects.clear();
    let mut late = sink(&other).await;
    write(&mut late, &image).await.unwrap();
    store.put(&key(".qcow2"), image.clone());
    store.put(&key(".json"), theirs.to_bytes());
    late.publish(manifest_of(&image)).await.unwrap();
    assert_eq!(archive.catalogue().await.unwrap().copies()[0].manifest, theirs.into());
    assert!(store.state().uploads.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_store_without_conditions_or_with_locks_is_served_as_well() {
    let Scene { store, archive } = scene();
    let image = bytes(9 * MIB);
    store.fault("complete", refuse(501, "NotImplemented"));
    store.fault(
        "part 1",
        Effect::Answer(
            400,
            "<Error><Code>InvalidRequest</Code><Message>Content-MD5 OR x-amz-checksum- HTTP header is required</Message></Error>"
                .to_owned(),
        ),
    );
    store.always("list-uploads", refuse(501, "NotImplemented"));
    self::store(&archive, &image).await.unwrap();
    assert_eq!(store.asked("part 1"), 2);
    assert_eq!(archive.bucket.clean().await.unwrap(), 0);
    assert_eq!(store.keys(), whole());
}

#[tokio::test(start_paused = true)]
async fn one_image_is_stored_by_one_at_a_time() {
    let Scene { archive, .. } = scene();
    let first = sink(&archive).await;
    let shown = chain(&archive.clone().begin(&of()).await.err().unwrap());
    assert!(shown.contains("it is being stored at this moment by another run"), "{shown}");
    drop(first);
    drop(sink(&archive).await);
}

#[tokio::test(start_paused = true)]
async fn a_catalogue_counts_verified_copies_and_no_false_manifests() {
    let Scene { store, archive } = scene();
    let image = bytes(5);
    let good = manifest_of(&image);
    store.put(&key(".json"), good.to_bytes());
    store.put(&key(".qcow2"), image.clone());
    store.put(&key(".qcow2.md5"), "x");
    let at = |number: u32, end: &str| {
        format!("{FOLDER}/2026110{number}T023000Z-b0c0ab00-0000-4000-8000-00000000f10{number}{end}")
    };
    let lie = |number: u32, change: &dyn Fn(&mut Manifest)| {
        let mut manifest = good.clone();
        manifest.snapshot.id = format!("b0c0ab00-0000-4000-8000-00000000f10{number}").parse().unwrap();
        manifest.snapshot.created_at = format!("2026-11-0{number}T02:30:00Z").parse().unwrap();
        change(&mut manifest);
        manifest.to_bytes()
    };
    store.put(&at(2, ".json"), lie(2, &|m| m.zone = "de-fra-1".parse().unwrap()));
    store.put(&at(3, ".json"), lie(3, &|m| Arc::make_mut(&mut m.instance).id = SNAPSHOT.parse().unwrap()));
    store.put(&at(4, ".json"), lie(5, &|_| {}));
    store.put(&at(5, ".json"), lie(5, &|m| m.image.bytes = 6));
    store.put(&at(5, ".qcow2"), image.clone());
    store.put(&at(6, ".json"), lie(6, &|_| {}));
    store.put(&at(7, ".json"), "<html>");
    store.put(&at(8, ".json"), vec![b' '; 2 * MIB]);
    store.put(&at(9, ".json"), lie(9, &|m| m.pruned_at = Some(NOW.parse().unwrap())));
    store.put(&at(1, ".qcow2"), image.clone());
    for foreign in [
        "snapwarden/../ch-gva-2/x.json",
        "snapwarden/notes.txt",
        "snapwarden/ch-gva-2/\u{1b}[31m.json",
        "snapwarden/ch-gva-2/9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec/deep/er.json",
        "elsewhere/notes.json",
    ] {
        store.put(foreign, "x");
    }
    for page in [0, 1, 3] {
        store.state().page = page;
        let catalogue = archive.catalogue().await.unwrap();
        let copies: Vec<_> =
            catalogue.copies().iter().map(|copy| copy.image().to_string_lossy().into_owned()).collect();
        assert_eq!(copies, [at(9, ".qcow2"), key(".qcow2")].map(|key| format!("s3://bucket/{key}")));
        let problems: Vec<_> = catalogue.problems().iter().map(|problem| problem.kind.to_string()).collect();
        let beginnings = [
            "there is no manifest beside it",
            "the manifest is about another zone",
            "the manifest is about another instance",
            "the manifest is about another snapshot",
            "the image has 5 bytes where the manifest says 6",
            "the image is missing",
            "the manifest can't be read",
            "the manifest can't be read (it is too long)",
        ];
        assert_eq!(problems.len(), beginnings.len(), "{problems:?}");
        for (problem, beginning) in problems.iter().zip(beginnings) {
            assert!(problem.starts_with(beginning), "{problem} where {beginning} should be");
        }
    }
    let facts = ArchiveStats::read(&Archive::S3(archive.clone())).await;
    assert_eq!((facts.images, facts.bytes, facts.corrupt, facts.error), (1, 5, 7, None));
}

#[tokio::test(start_paused = true)]
async fn a_manifest_is_read_once_as_long_as_it_does_not_change() {
    let Scene { store, archive } = scene();
    let image = bytes(5);
    store.put(&key(".json"), manifest_of(&image).to_bytes());
    store.put(&key(".qcow2"), image.clone());
    for _ in 0..3 {
        assert_eq!(archive.catalogue().await.unwrap().copies().len(), 1);
    }
    assert_eq!(store.asked("get"), 1);
    let copy = archive.catalogue().await.unwrap().copies()[0].clone();
    archive.update_manifest(&copy, ManifestUpdate::Corrupt(NOW.parse().unwrap())).await.unwrap();
    // The update reads it to see that it is still the same.
    assert_eq!(store.asked("get"), 2);
    assert!(archive.catalogue().await.unwrap().copies().is_empty());
    assert_eq!(store.asked("get"), 3);
}

#[tokio::test(start_paused = true)]
async fn a_manifest_that_may_not_be_read_is_one_problem_and_is_asked_for_again() {
    let Scene { store, archive } = scene();
    let image = bytes(5);
    store.put(&key(".json"), manifest_of(&image).to_bytes());
    store.put(&key(".qcow2"), image.clone());
    let mut other = manifest_of(&image);
    other.snapshot.id = "b0c0ab00-0000-4000-8000-00000000f106".parse().unwrap();
    let named = |end: &str| key(end).replace("f105", "f106");
    store.put(&named(".json"), other.to_bytes());
    store.put(&named(".qcow2"), image.clone());
    store.fault("get", refuse(403, "InvalidObjectState"));
    let catalogue = archive.catalogue().await.unwrap();
    assert_eq!((catalogue.copies().len(), catalogue.problems().len()), (1, 1));
    let shown = catalogue.problems()[0].describe();
    assert!(shown.contains("InvalidObjectState") && shown.contains("the copy does not count"), "{shown}");
    let catalogue = archive.catalogue().await.unwrap();
    assert_eq!((catalogue.copies().len(), catalogue.problems().len()), (2, 0));
    assert_eq!(store.asked("get"), 3);
}

#[tokio::test(start_paused = true)]
async fn a_second_process_reads_no_manifest_that_the_first_has_read() {
    let Scene { store, .. } = scene();
    let disk = Arc::new(MemoryDisk::new());
    disk.create_dir_all(Path::new("/state"), Access::Owner).unwrap();
    let file = Path::new("/state/manifests-offsite.jsonl");
    let process = |is_written| {
        let cache = ManifestCache::in_file(disk.clone(), file.to_owned(), is_written);
        self::archive(&store).with_cache(cache)
    };
    let expected = manifest_of(&bytes(5));
    store.put(&key(".json"), expected.to_bytes());
    store.put(&key(".qcow2"), bytes(5));
    let copies = async |archive: S3Archive| archive.catalogue().await.unwrap().copies().to_vec();
    // One that may change nothing reads it, and leaves no file.
    assert_eq!(copies(process(false)).await.len(), 1);
    assert_eq!((store.asked("get"), read_file(&*disk, file, 1 << 20).is_err()), (1, true));
    let read = copies(process(true)).await;
    for is_written in [true, false] {
        assert_eq!(copies(process(is_written)).await, read);
    }
    assert_eq!((store.asked("get"), store.asked("list")), (2, 4));
    // Another object of that name has another tag.
    let again = Manifest { verified_at: NOW.parse().unwrap(), ..expected };
    store.put(&key(".json"), again.to_bytes());
    assert_eq!(*copies(process(true)).await[0].manifest, again);
    assert_eq!(store.asked("get"), 3);
    // Whatever is wrong with the file, the archive is read.
    let whole = read_file(&*disk, file, 1 << 20).unwrap();
    assert_eq!(whole.split(|byte| *byte == b'\n').count(), 3);
    let torn = &whole[..whole.len() - 9];
    let of = |version: &str| String::from_utf8(whole.clone()).unwrap().replace("[3,", version);
    let (earlier, later) = (of("[1,\"its path\","), of("[4,"));
    let odd: [(&[u8], usize); 6] = [
        (torn, 4),
        (&whole, 4),
        (b"\0\0\0", 5),
        (later.as_bytes(), 6),
        (b"[2,1]\n\n", 7),
        (earlier.as_bytes(), 8),
    ];
    for (bytes, gets) in odd {
        replace_file(&*disk, file, bytes, Access::Owner).unwrap();
        assert_eq!(*copies(process(true)).await[0].manifest, again);
        assert_eq!(store.asked("get"), gets);
        let mended = read_file(&*disk, file, 1 << 20).unwrap();
        assert!(mended.ends_with(b"\n") && mended.starts_with(b"[3,"));
        assert_eq!(copies(process(false)).await.len(), 1);
        assert_eq!(store.asked("get"), gets);
    }
}

#[tokio::test(start_paused = true)]
async fn thousands_of_copies_cost_a_second_process_no_request_beside_the_listing() {
    const COPIES: usize = 5000;
    let Scene { store, .. } = scene();
    store.state().page = 1000;
    let mut manifest = manifest_of(&bytes(5));
    for number in 0..COPIES {
        manifest.snapshot.id = format!("b0c0ab00-0000-4000-8000-{number:012x}").parse().unwrap();
        let stem = format!("{FOLDER}/20261101T023000Z-{}", manifest.snapshot.id);
        store.put(&format!("{stem}.json"), manifest.to_bytes());
        store.put(&format!("{stem}.qcow2"), bytes(5));
    }
    let disk = Arc::new(MemoryDisk::new());
    disk.create_dir_all(Path::new("/state"), Access::Owner).unwrap();
    for gets in [COPIES, 0] {
        let cache = ManifestCache::in_file(disk.clone(), "/state/manifests-offsite.jsonl".into(), true);
        store.done();
        let catalogue = self::archive(&store).with_cache(cache).catalogue().await.unwrap();
        assert_eq!(catalogue.copies().len(), COPIES);
        let log = std::mem::take(&mut store.state().log);
        let lists = log.iter().filter(|name| *name == "list").count();
        assert_eq!((log.len() - lists, lists), (gets, 2 * COPIES / 1000));
    }
}

#[tokio::test(start_paused = true)]
async fn what_can_not_be_listed_whole_is_an_error_and_never_a_short_list() {
    let image = bytes(5);
    let faults: [(&'static str, Effect, &str); 7] = [
        // One that may be read, but not at this moment.
        ("get", refuse(503, "SlowDown"), "read s3://bucket/snapwarden/"),
        ("list", refuse(403, "AccessDenied"), "must be allowed to list"),
        ("list", refuse(404, "NoSuchBucket"), "create the bucket"),
        ("list", refuse(301, "PermanentRedirect"), "the bucket is elsewhere"),
        ("list", html(), "is `endpoint` the address of an S3 store?"),
        ("list", Effect::Hang, "no answer within 60 s"),
        ("list", Effect::Answer(200, "<ListBucketResult><IsTr".to_owned()), "not XML"),
    ];
    let listed = |store: &Store| {
        store.put(&key(".json"), manifest_of(&image).to_bytes());
        store.put(&key(".qcow2"), image.clone());
    };
    for (on, effect, why) in faults {
        let Scene { store, archive } = scene();
        listed(&store);
        store.always(on, effect);
        let shown = chain(&archive.catalogue().await.unwrap_err());
        assert!(shown.contains(why), "{shown}");
        assert!(ArchiveStats::read(&Archive::S3(archive.clone())).await.error.is_some());
    }
    let Scene { store, archive } = scene();
    listed(&store);
    store.state().page = 1;
    store.state().is_cut = true;
    let shown = chain(&archive.catalogue().await.unwrap_err());
    assert!(shown.contains("it is incomplete, and does not say how to continue"), "{shown}");
    store.state().is_ring = true;
    store.state().is_cut = false;
    let shown = chain(&archive.catalogue().await.unwrap_err());
    assert!(shown.contains("the listing has no end"), "{shown}");
}

/// A store whose listing never ends, by pages as long as may be.
#[derive(Debug, Default)]
struct Endless(AtomicUsize);

impl Transport for Endless {
    fn send(&self, _request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        let number = self.0.fetch_add(1, Ordering::Relaxed);
        let page = format!(
            "{}<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>{number}</NextContinuationToken>\
             </ListBucketResult>",
            " ".repeat(8 * MIB - 1024)
        );
        let body = Box::pin(stream::once(std::future::ready(Ok(page.into()))));
        Box::pin(std::future::ready(Ok(Response { status: StatusCode::OK, headers: HeaderMap::new(), body })))
    }
}

#[tokio::test(start_paused = true)]
async fn a_listing_without_end_is_an_error_before_it_fills_the_memory() {
    let store = Arc::new(Endless::default());
    let location = S3Location {
        endpoint: Url::parse("https://store.example").unwrap(),
        region: "r".to_owned(),
        bucket: "backups".to_owned(),
        prefix: String::new(),
        rules: BucketRules::default(),
    };
    let key = Credentials::new("EXO1", "hush", None).unwrap();
    let (name, clock) = ("offsite".parse().unwrap(), Arc::new(TestClock::at(NOW)));
    let archive = S3Archive::new(name, location, key, store.clone(), clock, Arc::new(NoRandomness));
    let error = archive.bucket.client.list("", |_| {}).await.unwrap_err();
    assert!(chain(&error).contains("the listing has no end"), "{}", chain(&error));
    assert!(store.0.load(Ordering::Relaxed) < 70, "{store:?}");
}

#[tokio::test(start_paused = true)]
async fn old_uploads_of_ours_are_aborted_and_no_others() {
    let Scene { store, archive } = scene();
    let begin = |id: &str, key: String, initiated: &str| {
        let begun = Begin { key, parts: BTreeMap::new(), md5: None, initiated: initiated.to_owned() };
        store.state().uploads.insert(id.to_owned(), begun);
    };
    begin("old", key(".qcow2"), "2026-10-30T02:29:59.000Z");
    begin("young", key(".qcow2"), "2026-10-30T02:30:01.000Z");
    begin("undated", key(".qcow2"), "long ago");
    begin("foreign", "snapwarden/movie.mkv".to_owned(), "2020-01-01T00:00:00Z");
    begin("elsewhere", "other/movie.qcow2".to_owned(), "2020-01-01T00:00:00Z");
    assert_eq!(archive.bucket.clean().await.unwrap(), 1);
    assert_eq!(
        store.state().uploads.keys().collect::<Vec<_>>(),
        ["elsewhere", "foreign", "undated", "young"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_pruned_copy_leaves_its_manifest_and_still_counts() {
    let Scene { store, archive } = scene();
    let image = bytes(9 * MIB);
    self::store(&archive, &image).await.unwrap();
    let copy = archive.catalogue().await.unwrap().copies()[0].clone();
    let pruned = ManifestUpdate::Pruned(NOW.parse().unwrap());
    // The manifest is marked first: after a stop in between the copy still counts.
    store.always("delete .qcow2", refuse(403, "AccessDenied"));
    archive.update_manifest(&copy, pruned).await.unwrap_err();
    let marked = archive.catalogue().await.unwrap().copies()[0].clone();
    assert!(marked.manifest.pruned_at.is_some() && marked.has_image);
    store.state().faults.clear();
    // By hand: without its mark it counts again.
    let mark = store.state().objects.remove(&key(".pruned.json")).unwrap();
    assert_eq!(archive.catalogue().await.unwrap().copies()[0].manifest, copy.manifest);
    store.state().objects.insert(key(".pruned.json"), mark);
    archive.update_manifest(&marked, pruned).await.unwrap();
    assert_eq!(store.keys(), [whole()[0].replace(".json", ".pruned.json")]);
    let catalogue = archive.catalogue().await.unwrap();
    assert!(catalogue.copies()[0].manifest.pruned_at.is_some() && catalogue.problems().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_copy_is_read_back_from_any_offset_and_no_other_image_for_it() {
    let Scene { store, archive } = scene();
    let image = bytes(9 * MIB);
    self::store(&archive, &image).await.unwrap();
    let copy = archive.catalogue().await.unwrap().copies()[0].clone();
    let stored = archive.image(&copy);
    assert_eq!(stored.md5(), Some(md5(&image).to_string()));
    let opened = stored.open(0, None, None).await.unwrap();
    assert_eq!((opened.offset, opened.total), (0, Some(9 << 20)));
    let etag = opened.etag;
    let opened = stored.open(1000, None, etag.as_deref()).await.unwrap();
    assert_eq!((opened.offset, opened.total), (1000, Some(9 << 20)));
    assert_eq!(crate::transport::read_body(opened.body, 9 * MIB).await.unwrap(), image.slice(1000..));
    assert!(matches!(stored.open(1000, None, Some("other")).await, Err(SourceError::Changed)));
    store.always("get .qcow2", Effect::Cut);
    assert!(matches!(stored.open(0, None, None).await, Err(SourceError::Broken(_))));
    store.state().faults.clear();
    store.state().objects.clear();
    assert!(matches!(stored.open(0, None, None).await, Err(SourceError::Refused(_))));
}

/// An archive with one copy of a valid image.
async fn scene_with_an_image() -> (Scene, Archive, StoredCopy, Bytes) {
    let scene = scene();
    let image = Bytes::from(image(9 * MIB, 3));
    store(&scene.archive, &image).await.unwrap();
    let copy = scene.archive.catalogue().await.unwrap().copies()[0].clone();
    let archive = Archive::S3(scene.archive.clone());
    (scene, archive, copy, image)
}

async fn verify_one(archive: &Archive, copy: &StoredCopy) -> Outcome {
    let (clock, hashers) = (TestClock::at("2026-11-20T00:00:00Z"), Hashers::default());
    let reader = CopyReader::new(&clock, &NoRandomness, &hashers);
    verify::verify(archive, copy, reader).await.outcome
}

#[tokio::test(start_paused = true)]
async fn a_copy_in_a_bucket_is_verified_again_also_over_connections_that_break() {
    let (Scene { store, .. }, archive, copy, _) = scene_with_an_image().await;
    store.fault("get .qcow2", Effect::Cut);
    assert_eq!(verify_one(&archive, &copy).await, Outcome::Good);
    let catalogue = archive.catalogue().await.unwrap();
    let expected =
        Manifest { verified_at: "2026-11-20T00:00:00Z".parse().unwrap(), ..(*copy.manifest).clone() };
    assert_eq!(catalogue.copies()[0].manifest, expected.into());
}

#[tokio::test(start_paused = true)]
async fn a_bucket_that_can_not_be_read_marks_nothing() {
    let (Scene { store, .. }, archive, copy, _) = scene_with_an_image().await;
    let manifest = |store: &Store| store.state().objects[&key(".json")].bytes.clone();
    let before = manifest(&store);
    for effect in [Effect::Cut, Effect::Hang, refuse(403, "AccessDenied"), refuse(503, "SlowDown"), html()] {
        store.always("get .qcow2", effect.clone());
        assert!(matches!(verify_one(&archive, &copy).await, Outcome::Failed(_)), "{effect:?}");
        store.state().faults.clear();
    }
    store.state().objects.remove(&key(".qcow2"));
    assert!(matches!(verify_one(&archive, &copy).await, Outcome::Failed(_)));
    assert_eq!(manifest(&store), before);
}

#[tokio::test(start_paused = true)]
async fn a_bucket_that_lacks_space_is_full_and_any_other_refusal_is_a_failed_write() {
    for (effect, is_full) in [
        (refuse(507, "InsufficientStorage"), true),
        (refuse(507, ""), true),
        (refuse(403, "QuotaExceeded"), true),
        (refuse(400, "XMinioAdminBucketQuotaExceeded"), true),
        (refuse(507, "XMinioStorageFull"), true),
        (refuse(403, "AccessDenied"), false),
        (refuse(503, "SlowDown"), false),
        (Effect::Cut, false),
        (Effect::Hang, false),
    ] {
        let (Scene { store, archive }, shared, copy, image) = scene_with_an_image().await;
        store.always("put .corrupt.json", effect.clone());
        store.always("put .json", effect.clone());
        let update = shared.update_manifest(&copy, ManifestUpdate::Corrupt(NOW.parse().unwrap())).await;
        assert_eq!(update.unwrap_err().failed_write().is_none(), is_full, "{effect:?}");
        store.state().objects.clear();
        let error = self::store(&archive, &image).await.unwrap_err();
        assert_eq!(error.is_full(), is_full, "{effect:?}: {}", chain(&error));
        assert_eq!(chain(&error).contains("free some space in the bucket"), is_full, "{}", chain(&error));
    }
}

#[tokio::test(start_paused = true)]
async fn corruption_that_a_bucket_does_not_let_be_noted_is_told_apart() {
    let (Scene { store, .. }, archive, copy, image) = scene_with_an_image().await;
    let mut flipped = image.to_vec();
    flipped[9 * MIB - 1] ^= 1;
    store.put(&key(".qcow2"), Bytes::from(flipped));
    store.always("put .corrupt.json", refuse(403, "AccessDenied"));
    let (clock, hashers) = (TestClock::at(NOW), Hashers::default());
    let reader = CopyReader::new(&clock, &NoRandomness, &hashers);
    let verified = verify::verify(&archive, &copy, reader).await;
    assert!(
        matches!(&verified.outcome, Outcome::Corrupt(why) if why.contains("AccessDenied")),
        "{verified:?}"
    );
    assert!(!verified.is_written() && verified.unwritten.unwrap().failed_write().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_copy_in_a_bucket_that_was_pruned_meanwhile_stays_marked() {
    let (Scene { store, .. }, archive, copy, image) = scene_with_an_image().await;
    archive.update_manifest(&copy, ManifestUpdate::Pruned(NOW.parse().unwrap())).await.unwrap();
    assert!(!store.keys().iter().any(|key| key.contains(".qcow2")));
    store.put(&key(".qcow2"), image);
    assert!(matches!(verify_one(&archive, &copy).await, Outcome::Failed(_)));
    let again = archive.catalogue().await.unwrap().copies()[0].clone();
    assert!(again.manifest.pruned_at.is_some() && again.has_image, "as a crash may leave it");
    archive.update_manifest(&again, ManifestUpdate::Pruned(NOW.parse().unwrap())).await.unwrap();
    assert!(!store.keys().iter().any(|key| key.contains(".qcow2")));
    assert_eq!(archive.catalogue().await.unwrap().copies()[0].manifest, again.manifest);
}

#[tokio::test(start_paused = true)]
async fn a_probe_names_each_permission_that_the_key_lacks() {
    for (on, step, permission) in [
        ("put", "write", "s3:PutObject"),
        ("get", "read back", "s3:GetObject"),
        ("delete", "delete", "s3:DeleteObject"),
    ] {
        let scene = scene();
        scene.store.always(on, refuse(403, "AccessDenied"));
        let steps = scene.archive.probe().await;
        let failed: Vec<_> = steps.iter().filter(|(_, failure)| failure.is_some()).collect();
        let [(name, Some(failure))] = failed[..] else { panic!("{on}: {steps:?}") };
        assert!(*name == step && failure.contains(&format!("(needs `{permission}`)")), "{failure}");
    }
    let scene = scene();
    scene.store.always("list", refuse(403, "AccessDenied"));
    let refused = chain(&scene.archive.catalogue().await.unwrap_err());
    assert!(refused.contains("(needs `s3:ListBucket`)"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn a_store_is_asked_once_whether_it_answers_and_a_refusal_is_an_answer() {
    for (effect, failure) in [
        (refuse(403, "AccessDenied"), None),
        (refuse(503, "SlowDown"), None),
        (Effect::Hang, Some("no answer within 5 s")),
        (Effect::Cut, Some("read s3://bucket/snapwarden/")),
    ] {
        let scene = scene();
        // The next one would be answered.
        scene.store.fault("get", effect);
        let answer = scene.archive.answers(Duration::from_secs(5)).await.map_err(|error| chain(&error));
        match failure {
            None => answer.unwrap(),
            Some(part) => assert!(answer.unwrap_err().contains(part)),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn versioning_and_locks_of_a_bucket_are_read() {
    let settings = async |versioning: &str, lock: &str| {
        let scene = scene();
        scene.store.fault(
            "get",
            Effect::Answer(200, format!("<VersioningConfiguration>{versioning}</VersioningConfiguration>")),
        );
        scene.store.fault(
            "get",
            Effect::Answer(200, format!("<ObjectLockConfiguration>{lock}</ObjectLockConfiguration>")),
        );
        let settings = scene.archive.bucket_settings().await;
        (settings.versioning.unwrap(), settings.object_lock.unwrap())
    };
    let (mode, days) = ("<Mode>COMPLIANCE</Mode>", "<Days>30</Days>");
    let lock = format!("<Rule><DefaultRetention>{mode}{days}</DefaultRetention></Rule>");
    let read = settings("<Status>Enabled</Status>", &lock).await;
    assert_eq!(read, ("Enabled".to_owned(), "COMPLIANCE for 30 days".to_owned()));
    let read = settings("", "").await;
    assert_eq!(read, (String::new(), "nothing is locked by default".to_owned()));
    let scene = scene();
    scene.store.fault("get", Effect::Answer(200, "<VersioningConfiguration/>".to_owned()));
    scene.store.fault("get", refuse(404, "ObjectLockConfigurationNotFoundError"));
    let settings = scene.archive.bucket_settings().await;
    assert_eq!((settings.versioning.unwrap(), settings.object_lock.unwrap()), Default::default());
}

#[tokio::test(start_paused = true)]
async fn a_presigned_address_is_a_secret_that_ends() {
    let Scene { archive, .. } = scene();
    let copy =
        StoredCopy { manifest: manifest_of(&bytes(5)).into(), folder: Path::new("").into(), has_image: true };
    let address = archive.presign_get(&copy, Duration::from_hours(1_000_000)).await.unwrap();
    assert!(!format!("{address:?}").contains("exo.io"));
    let url = Url::parse(address.expose_secret()).unwrap();
    assert_eq!(url.path(), format!("/bucket/{}", key(".qcow2")));
    assert!(url.query().unwrap().contains("X-Amz-Expires=604800"));
}

/// A bucket for the claims that hold for every kind of archive.
pub(in crate::archive) struct Bucket {
    store: Arc<Store>,
    archive: Archive,
}

impl Default for Bucket {
    fn default() -> Self {
        let Scene { store, archive } = scene();
        Self { store, archive: Archive::S3(archive) }
    }
}

impl Fixture for Bucket {
    fn archive(&self) -> &Archive {
        &self.archive
    }

    fn files(&self) -> BTreeMap<String, Bytes> {
        let state = self.store.state();
        let path = |key: &String| key.strip_prefix("snapwarden/").unwrap().to_owned();
        state.objects.iter().map(|(key, object)| (path(key), object.bytes.clone())).collect()
    }

    fn write(&self, path: &str, bytes: &[u8]) {
        self.store.put(&format!("snapwarden/{path}"), bytes.to_vec());
    }

    fn remove(&self, path: &str) {
        self.store.state().objects.remove(&format!("snapwarden/{path}")).unwrap();
    }
}

/// An archive in a simulated bucket that locks.
fn locking(bucket: &SimBucket, mode: LockMode) -> S3Archive {
    let lock = LockRule::new("30d".parse().unwrap(), mode);
    let location = S3Location {
        endpoint: Url::parse("https://sos-ch-gva-2.exo.io").unwrap(),
        region: "ch-gva-2".to_owned(),
        bucket: "bucket".to_owned(),
        prefix: "snapwarden/".to_owned(),
        rules: BucketRules { lock, ..BucketRules::default() },
    };
    let (credentials, clock) =
        (Credentials::new("EXO1", "hush", None).unwrap(), Arc::new(TestClock::at(NOW)));
    let (name, transport) = ("offsite".parse().unwrap(), Arc::new(bucket.clone()));
    S3Archive::new(name, location, credentials, transport, clock, Arc::new(NoRandomness))
}

#[tokio::test(start_paused = true)]
async fn a_probe_finds_out_whether_a_lock_holds_against_the_archives_own_key() {
    let bucket = SimBucket::new(Arc::new(TestClock::at(NOW)), true);
    for mode in [LockMode::Governance, LockMode::Compliance] {
        let steps = locking(&bucket, mode).probe_lock().await.unwrap();
        assert_eq!(steps, [("lock", None), ("keep the lock", None)], "{mode:?}");
    }
    assert!(bucket.keys().is_empty());
    bucket.let_bypass(true);
    let steps = locking(&bucket, LockMode::Governance).probe_lock().await.unwrap();
    let why = steps[1].1.as_ref().unwrap();
    assert!(why.contains("shorten it by a bypass, delete what is locked by a bypass"), "{why}");
    let steps = locking(&bucket, LockMode::Compliance).probe_lock().await.unwrap();
    assert_eq!(steps[1].1, None, "nobody bypasses it");
    let unversioned = SimBucket::new(Arc::new(TestClock::at(NOW)), false);
    let steps = locking(&unversioned, LockMode::Governance).probe_lock().await.unwrap();
    assert!(steps[0].1.as_ref().unwrap().contains("keeps no versions"), "{steps:?}");
    assert!(scene().archive.probe_lock().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_pinned_version_is_read_whatever_stands_above_it_and_wherever_it_was_copied_to() {
    let bucket = SimBucket::new(Arc::new(TestClock::at(NOW)), true);
    let archive = locking(&bucket, LockMode::Governance);
    let image = bytes(20 * MIB);
    let manifest = store(&archive, &image).await.unwrap();
    let pinned = manifest.image.version_id.clone().unwrap();
    let found = archive.catalogue().await.unwrap();
    let copy = &found.copies()[0];
    let read = async |archive: &S3Archive, copy: &StoredCopy| {
        let opened = archive.image(copy).open(0, None, None).await.unwrap();
        md5(&read_body(opened.body, 32 * MIB).await.unwrap())
    };
    assert_eq!(read(&archive, copy).await, md5(&image));

    archive.bucket.client.put(&key(".qcow2"), "text/plain", image.to_vec()).await.unwrap();
    archive.bucket.client.put(&key(".qcow2"), "text/plain", b"overwritten".to_vec()).await.unwrap();
    assert_eq!(read(&archive, copy).await, md5(&image));
    let address = archive.presign_get(copy, Duration::from_mins(1)).await.unwrap();
    assert!(address.expose_secret().contains(&format!("&versionId={pinned}")));
    let found = archive.catalogue().await.unwrap();
    assert!(matches!(found.problems()[0].kind, ProblemKind::Length { .. }), "it does not count");

    archive.bucket.client.delete(&key(".qcow2")).await.unwrap();
    let versions = archive.versions(&[copy]).await.unwrap().unwrap();
    let hidden = PathBuf::from(format!("s3://bucket/{}", key(".qcow2")));
    assert_eq!((versions.hidden, versions.count), (vec![hidden], 3));
    assert_eq!(versions.left_bytes, 2 * 20 * MIB as u64 + 11);
    assert_eq!(read(&archive, copy).await, md5(&image));

    // A copy of the bucket, where every version has another name.
    let other = SimBucket::new(Arc::new(TestClock::at(NOW)), true);
    let there = locking(&other, LockMode::Governance);
    for _ in 0..9 {
        there.bucket.client.put("other", "text/plain", Vec::new()).await.unwrap();
    }
    there.bucket.client.put(&key(".qcow2"), "text/plain", image.to_vec()).await.unwrap();
    there.bucket.client.put(&key(".json"), "application/json", manifest.to_bytes()).await.unwrap();
    let found = there.catalogue().await.unwrap();
    assert_eq!(read(&there, &found.copies()[0]).await, md5(&image));
}

/// Keeps every request, and answers as the bucket does.
#[derive(Debug)]
struct Spy {
    bucket: SimBucket,
    requests: Mutex<Vec<Request>>,
}

impl Transport for Spy {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        self.requests.lock().unwrap().push(request.clone());
        self.bucket.send(request)
    }
}

fn spied(rules: BucketRules, key: impl Into<BucketKey>) -> (S3Archive, Arc<Spy>) {
    let bucket = SimBucket::new(Arc::new(TestClock::at(NOW)), false);
    let spy = Arc::new(Spy { bucket, requests: Mutex::default() });
    let location = S3Location {
        endpoint: Url::parse("https://store.example:8443/s3").unwrap(),
        region: "r".to_owned(),
        bucket: "backups".to_owned(),
        prefix: "env=prod/".to_owned(),
        rules,
    };
    let (name, clock) = ("offsite".parse().unwrap(), Arc::new(TestClock::at(NOW)));
    (S3Archive::new(name, location, key, spy.clone(), clock, Arc::new(NoRandomness)), spy)
}

#[tokio::test(start_paused = true)]
async fn addresses_classes_and_encryption_are_as_configured() {
    let key = || Credentials::new("EXO1", "hush", None).unwrap();
    for (addressing, address) in [
        (Addressing::Path, "https://store.example:8443/s3/backups/env%3Dprod/a"),
        (Addressing::Virtual, "https://backups.store.example:8443/s3/env%3Dprod/a"),
    ] {
        let (archive, spy) = spied(BucketRules { addressing, ..BucketRules::default() }, key());
        let client = &archive.bucket.client;
        client.put("env=prod/a", "text/plain", b"a".to_vec()).await.unwrap();
        let request = spy.requests.lock().unwrap().pop().unwrap();
        assert_eq!(request.url.as_str(), address);
        assert!(!request.headers.contains_key("x-amz-server-side-encryption"));
        // With the bucket alone.
        let _ = client.list("", |_| ()).await;
        let request = spy.requests.lock().unwrap().pop().unwrap();
        assert!(request.url.path().ends_with(if addressing == Addressing::Path {
            "/backups"
        } else {
            "/s3/"
        }));
    }
    let storage_class = Some("STANDARD_IA".to_owned());
    for encryption in [Encryption::Aes256, Encryption::Kms] {
        let rules = BucketRules {
            storage_class: storage_class.clone(),
            encryption: Some(encryption),
            ..Default::default()
        };
        let (archive, spy) = spied(rules, key());
        store(&archive, &bytes(MIB)).await.unwrap();
        let requests = spy.requests.lock().unwrap();
        let text = |request: &Request, name: &str| {
            request.headers.get(name).map(|value| value.to_str().unwrap().to_owned())
        };
        let writes: Vec<_> = requests
            .iter()
            .filter(|one| {
                one.method == "PUT" && one.url.query().is_none() || one.url.query() == Some("uploads=")
            })
            .map(|one| (text(one, "x-amz-server-side-encryption"), text(one, "x-amz-storage-class")))
            .collect();
        let encrypted = Some(encryption.as_str().to_owned());
        let small = (encrypted.clone(), None);
        // The image; its manifest is read by every run, so it is as the bucket says.
        assert_eq!(writes, [(encrypted, storage_class.clone()), small.clone(), small]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_that_expired_is_read_anew_and_one_that_stays_wrong_is_not_tried_for_ever() {
    let reads = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&reads);
    let key = BucketKey::read_by(move || {
        let number = counted.fetch_add(1, Ordering::SeqCst).min(1);
        Ok(Credentials::new(["OLD", "NEW"][number], "hush", Some("token")).unwrap())
    });
    let store: Arc<Store> = Arc::default();
    let location = archive(&store).bucket.client.location.clone();
    let (name, clock) = ("offsite".parse().unwrap(), Arc::new(TestClock::at(NOW)));
    let archive = S3Archive::new(name, location, key.unwrap(), store.clone(), clock, Arc::new(NoRandomness));
    assert_eq!(archive.bucket.client.put("a", "text/plain", Vec::new()).await.map_err(|_| ()), Ok(()));
    assert_eq!(reads.load(Ordering::SeqCst), 1, "nothing was refused");
    store.fault("put", refuse(400, "ExpiredToken"));
    archive.bucket.client.put("a", "text/plain", Vec::new()).await.unwrap();
    assert_eq!((reads.load(Ordering::SeqCst), archive.bucket.client.key.current().key.as_str()), (2, "NEW"));
    store.done();
    store.always("put", refuse(403, "InvalidAccessKeyId"));
    let error = archive.bucket.client.put("a", "text/plain", Vec::new()).await.unwrap_err();
    assert_eq!((reads.load(Ordering::SeqCst), store.done().len()), (3, 1), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_another_form_to_completing_is_decided_by_a_look() {
    for effect in [Effect::Lose, Effect::Answer(200, "<Completed/>".to_owned())] {
        let Scene { store, archive } = scene();
        // It is done the first time, and the answers do not say so.
        store.fault("complete", Effect::Lose);
        for _ in 0..9 {
            store.fault("complete", effect.clone());
        }
        self::store(&archive, &bytes(9 * MIB)).await.unwrap();
        assert_eq!(store.keys(), whole());
    }
    let Scene { store, archive } = scene();
    store.always("complete", Effect::Answer(200, "<Completed/>".to_owned()));
    assert!(self::store(&archive, &bytes(9 * MIB)).await.is_err(), "it is not there");
}

#[tokio::test(start_paused = true)]
async fn only_what_is_marked_as_pruned_is_deleted_for_good_and_its_mark_stays_as_long() {
    let clock = Arc::new(SimClock::starting_at(NOW.parse().unwrap()));
    let bucket = SimBucket::new(clock.clone(), true);
    let make = |noncurrent| {
        let mut archive = locking(&bucket, LockMode::Compliance);
        let mut location = archive.bucket.client.location.clone();
        location.rules.noncurrent = noncurrent;
        let (credentials, transport) =
            (Credentials::new("EXO1", "hush", None).unwrap(), Arc::new(bucket.clone()));
        let name = archive.name().clone();
        archive =
            S3Archive::new(name, location, credentials, transport, clock.clone(), Arc::new(NoRandomness));
        archive
    };
    let archive = make(Noncurrent::Delete);
    let image = bytes(9 * MIB);
    store(&archive, &image).await.unwrap();
    let there = |bucket: &SimBucket| {
        let versions = bucket.versions();
        versions.get(&key(".qcow2")).map_or(0, |all| all.iter().filter(|one| one.bytes.is_some()).count())
    };
    let copy = || async { archive.catalogue().await.unwrap().copies()[0].clone() };
    // A mark that was taken back, and an image that was hidden.
    let stored = copy().await;
    let client = &archive.bucket.client;
    client.put(&key(".pruned.json"), "application/json", b"{}".to_vec()).await.unwrap();
    client.delete(&key(".pruned.json")).await.unwrap();
    client.delete(&key(".qcow2")).await.unwrap();
    archive.delete_noncurrent().await.unwrap();
    assert_eq!(there(&bucket), 1, "it was not pruned");
    // Brought back, locked, and pruned.
    let marker = bucket.versions()[&key(".qcow2")].last().unwrap().id.clone();
    client.delete_version(&key(".qcow2"), &marker, false).await.unwrap();
    archive.lock_copy(&stored, "2026-11-05T00:00:00Z".parse().unwrap()).await.unwrap();
    archive.update_manifest(&stored, ManifestUpdate::Pruned(NOW.parse().unwrap())).await.unwrap();
    make(Noncurrent::Keep).delete_noncurrent().await.unwrap();
    archive.delete_noncurrent().await.unwrap();
    assert_eq!(there(&bucket), 1, "it is locked");
    let pruned = copy().await;
    assert!(archive.forget_pruned(&pruned).await.is_err(), "by its mark it is found");
    clock.step(jiff::SignedDuration::from_hours(5 * 24));
    make(Noncurrent::Keep).delete_noncurrent().await.unwrap();
    assert_eq!(there(&bucket), 1, "a rule of the bucket deletes it");
    archive.delete_noncurrent().await.unwrap();
    assert_eq!((there(&bucket), bucket.versions().contains_key(&key(".qcow2"))), (0, false));
    archive.forget_pruned(&pruned).await.unwrap();
    assert!(archive.catalogue().await.unwrap().copies().is_empty());
}
