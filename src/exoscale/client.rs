//! The client: one method per operation of the API, each zone on its own.
//!
//! A [`Client`] is shared by everything in the process, so that the pace of requests and the operations in
//! flight are counted once. A [`ZoneClient`] speaks with one zone: ids mean something in their zone alone,
//! and a running operation is known only where it was started.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use tokio::sync::Semaphore;
use url::Url;

use crate::clock::{Clock, TimedOut, timeout};
use crate::exoscale::credentials::Credentials;
use crate::exoscale::error::{ApiError, ErrorKind};
use crate::exoscale::pace::Pace;
use crate::exoscale::sign::{VALID_FOR_SECONDS, authorization};
use crate::exoscale::wire::{
    self, DecodeError, Deleted, Operation, PromoteRequest, Quota, RegisterRequest, SnapshotDetails, Template,
    Zone,
};
use crate::randomness::Randomness;
use crate::retry::{Attempts, REQUESTS, retry_after};
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, TemplateId, ZoneName};
use crate::text::printable;
use crate::transport::{
    BodyError, Purpose, Reached, Request, Transport, TransportError, http_date, read_body,
};

/// Lists are not paged. 100,000 snapshots take some 40 MB.
const MAX_LIST_BYTES: usize = 64 << 20;

/// Everything else is small.
const MAX_BODY_BYTES: usize = 1 << 20;

/// How the client behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The API's address including `/v2`; `{zone}` in it stands for the zone's name.
    pub endpoint: String,
    /// For one try of one request, until its last byte.
    pub request_timeout: Duration,
    /// The first wait between two polls of an operation.
    pub poll_interval: Duration,
    /// Then an operation counts as failed.
    pub operation_timeout: Duration,
    /// All zones and policies together.
    pub requests_per_second: NonZeroU32,
    /// Operations in flight per zone.
    pub concurrency: NonZeroUsize,
}

/// Hears of every exchange, for metrics. It must not block.
pub trait Observer: Send + Sync + Debug {
    /// A request ended after `took`: with this status, or without an answer.
    fn answered(&self, zone: &ZoneName, operation: &'static str, status: Option<StatusCode>, took: Duration);

    /// A request, or the poll of an operation, is sent again.
    fn retried(&self, operation: &'static str, reason: ErrorKind);

    /// A listing told the time: this machine's clock is ahead of the API's by so much.
    fn clock_compared(&self, zone: &ZoneName, ahead: SignedDuration);
}

/// Speaks with the API. Cloning is cheap and shares everything.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    credentials: Option<Credentials>,
    transport: Arc<dyn Transport>,
    clock: Arc<dyn Clock>,
    randomness: Arc<dyn Randomness>,
    observer: Option<Arc<dyn Observer>>,
    pace: Pace,
    /// Per zone, the permits for operations in flight.
    permits: Mutex<BTreeMap<ZoneName, Arc<Semaphore>>>,
}

/// Speaks with the API of one zone. Cloning is cheap and shares everything.
#[derive(Debug, Clone)]
pub struct ZoneClient {
    shared: Arc<Shared>,
    zone: ZoneName,
    permits: Arc<Semaphore>,
}

/// A complete listing of a zone's snapshots.
#[derive(Debug, Clone)]
pub struct SnapshotListing {
    /// Every snapshot, in the order listed.
    pub snapshots: Vec<Snapshot>,
    /// The instances as named inside the snapshots, each once; the id stands for a name that was not given.
    pub mentioned: Vec<Instance>,
    /// The API's clock, by the answer's `Date`.
    pub date: Option<Timestamp>,
    /// Our clock when the head of the answer came.
    pub received_at: Timestamp,
}

/// When it is safe to send a request again that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repeat {
    /// It reads, or doing it twice is doing it once.
    Freely,
    /// A second time makes a second thing: only if the first was certainly not carried out.
    IfNotCarriedOut,
}

/// One call as it is to be sent.
pub(super) struct Call<'a> {
    /// The API's name for it.
    operation: &'static str,
    method: Method,
    /// Beneath the endpoint; what a name from outside could change in it is encoded.
    path: &'a [&'a str],
    query: Option<(&'static str, &'static str)>,
    /// Empty for none.
    body: Bytes,
    repeat: Repeat,
    max_bytes: usize,
    signed: bool,
}

/// A good answer.
pub(super) struct Answer {
    body: Bytes,
    date: Option<Timestamp>,
    received_at: Timestamp,
}

/// A try that failed.
pub(super) struct Failed {
    pub(super) error: ApiError,
    /// Whether it may go better in a while.
    pub(super) passing: bool,
    /// Whether the server may have carried the request out.
    perhaps_carried_out: bool,
    pub(super) retry_after: Option<Duration>,
}

/// Why a whole answer did not come.
enum Lost {
    Head(TransportError),
    Body(BodyError),
    Late(TimedOut),
}

impl<'a> Call<'a> {
    pub(super) fn get(operation: &'static str, path: &'a [&'a str]) -> Self {
        Self {
            operation,
            method: Method::GET,
            path,
            query: None,
            body: Bytes::new(),
            repeat: Repeat::Freely,
            max_bytes: MAX_BODY_BYTES,
            signed: true,
        }
    }

    fn list(operation: &'static str, path: &'a [&'a str]) -> Self {
        Self { max_bytes: MAX_LIST_BYTES, ..Self::get(operation, path) }
    }

    fn delete(operation: &'static str, path: &'a [&'a str]) -> Self {
        Self { method: Method::DELETE, ..Self::get(operation, path) }
    }

    fn post(operation: &'static str, path: &'a [&'a str], repeat: Repeat) -> Self {
        Self { method: Method::POST, repeat, ..Self::get(operation, path) }
    }

    fn with_json(self, body: &impl Serialize) -> Self {
        let body = serde_json::to_vec(body).expect("a request of texts, numbers and flags becomes JSON");
        Self { body: body.into(), ..self }
    }

    fn changes_something(&self) -> bool {
        self.method != Method::GET
    }
}

impl Client {
    /// A client; without credentials only [`Client::list_zones`] and [`Client::clock_skew`] work.
    pub fn new(
        settings: Settings,
        credentials: Option<Credentials>,
        transport: Arc<dyn Transport>,
        clock: Arc<dyn Clock>,
        randomness: Arc<dyn Randomness>,
    ) -> Self {
        let pace = Pace::new(settings.requests_per_second);
        let permits = Mutex::new(BTreeMap::new());
        let observer = None;
        let shared = Shared { settings, credentials, transport, clock, randomness, observer, pace, permits };
        Self { shared: Arc::new(shared) }
    }

    /// The same client, with somebody who hears of every exchange. Only a client that nobody shares yet gets one.
    #[must_use]
    pub fn with_observer(mut self, observer: Arc<dyn Observer>) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.observer = Some(observer);
        }
        self
    }

    /// The client of one zone.
    pub fn zone(&self, zone: &ZoneName) -> ZoneClient {
        let mut permits = self.shared.permits.lock().unwrap_or_else(PoisonError::into_inner);
        let permits = permits
            .entry(zone.clone())
            .or_insert_with(|| Arc::new(Semaphore::new(self.shared.settings.concurrency.get())));
        ZoneClient { shared: Arc::clone(&self.shared), zone: zone.clone(), permits: Arc::clone(permits) }
    }

    /// `list-zones`, asked of one zone's API.
    ///
    /// It is public and sent without a signature: with one, a key that may do little is refused.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn list_zones(&self, ask: &ZoneName) -> Result<Vec<Zone>, ApiError> {
        let call = Call { signed: false, ..Call::list("list-zones", &["zone"]) };
        self.zone(ask).read(&call, wire::decode_zones).await
    }

    /// How far this machine's clock is ahead of the API's in this zone; none if its answer has no date. As public as
    /// [`Self::list_zones`].
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn clock_skew(&self, ask: &ZoneName) -> Result<Option<SignedDuration>, ApiError> {
        let call = Call { signed: false, ..Call::list("list-zones", &["zone"]) };
        let answer = self.zone(ask).send(&call).await?;
        Ok(answer.date.map(|date| answer.received_at.duration_since(date)))
    }
}

impl ZoneClient {
    /// Where.
    pub fn zone(&self) -> &ZoneName {
        &self.zone
    }

    /// `list-snapshots`: all of them, or an error.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn list_snapshots(&self) -> Result<SnapshotListing, ApiError> {
        let call = Call::list("list-snapshots", &["snapshot"]);
        let answer = self.send(&call).await?;
        let listed = wire::decode_snapshots(&answer.body).map_err(|error| self.malformed(&call, error))?;
        if let (Some(observer), Some(date)) = (&self.shared.observer, answer.date) {
            observer.clock_compared(&self.zone, answer.received_at.duration_since(date));
        }
        Ok(SnapshotListing {
            snapshots: listed.snapshots,
            mentioned: listed.mentioned,
            date: answer.date,
            received_at: answer.received_at,
        })
    }

    /// `list-instances`: all of them, or an error.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn list_instances(&self) -> Result<Vec<Instance>, ApiError> {
        self.read(&Call::list("list-instances", &["instance"]), wire::decode_instances).await
    }

    /// `get-instance`; `None` if there is none in this zone.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn get_instance(&self, id: InstanceId) -> Result<Option<Instance>, ApiError> {
        let id = id.to_string();
        found(self.read(&Call::get("get-instance", &["instance", &id]), wire::decode_instance).await)
    }

    /// `get-snapshot`; `None` if there is none in this zone.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn get_snapshot(&self, id: SnapshotId) -> Result<Option<SnapshotDetails>, ApiError> {
        let id = id.to_string();
        found(self.read(&Call::get("get-snapshot", &["snapshot", &id]), wire::decode_snapshot).await)
    }

    /// `export-snapshot`, until it is done; [`ZoneClient::get_snapshot`] has the address then. Doing it twice
    /// does no harm, so it is repeated freely.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn export_snapshot(&self, id: SnapshotId) -> Result<Operation, ApiError> {
        let action = format!("{id}:export");
        self.operate(&Call::post("export-snapshot", &["snapshot", &action], Repeat::Freely)).await
    }

    /// `delete-snapshot`, until it is done.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn delete_snapshot(&self, id: SnapshotId) -> Result<Deleted, ApiError> {
        let id = id.to_string();
        self.delete(&Call::delete("delete-snapshot", &["snapshot", &id])).await
    }

    /// `promote-snapshot-to-template`, until it is done; the reference is the template. A second time makes a
    /// second template, so it is never repeated blindly.
    ///
    /// # Errors
    /// [`ApiError`]; after one that [may have happened](ApiError::may_have_happened) look for the template.
    pub async fn promote_snapshot(
        &self,
        id: SnapshotId,
        request: &PromoteRequest,
    ) -> Result<Operation, ApiError> {
        let action = format!("{id}:promote");
        let path = ["snapshot", action.as_str()];
        let call = Call::post("promote-snapshot-to-template", &path, Repeat::IfNotCarriedOut);
        self.operate(&call.with_json(request)).await
    }

    /// `create-snapshot`, until it is done; the reference is the snapshot. A second time makes a second
    /// snapshot, so it is never repeated blindly.
    ///
    /// # Errors
    /// [`ApiError`]; after one that [may have happened](ApiError::may_have_happened) look for the snapshot.
    pub async fn create_snapshot(&self, of: InstanceId) -> Result<Operation, ApiError> {
        let action = format!("{of}:create-snapshot");
        let path = ["instance", action.as_str()];
        self.operate(&Call::post("create-snapshot", &path, Repeat::IfNotCarriedOut)).await
    }

    /// `list-templates`, the organization's own (`visibility=private`; the API's default is the public ones).
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn list_templates(&self) -> Result<Vec<Template>, ApiError> {
        let call = Call::list("list-templates", &["template"]);
        self.read(&Call { query: Some(("visibility", "private")), ..call }, wire::decode_templates).await
    }

    /// `get-template`; `None` if there is none in this zone.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn get_template(&self, id: TemplateId) -> Result<Option<Template>, ApiError> {
        let id = id.to_string();
        found(self.read(&Call::get("get-template", &["template", &id]), wire::decode_template).await)
    }

    /// `delete-template`, until it is done.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn delete_template(&self, id: TemplateId) -> Result<Deleted, ApiError> {
        let id = id.to_string();
        self.delete(&Call::delete("delete-template", &["template", &id])).await
    }

    /// `register-template`, until it is done; the reference is the template. Never repeated blindly.
    ///
    /// # Errors
    /// [`ApiError`]; after one that [may have happened](ApiError::may_have_happened) look for the template.
    pub async fn register_template(&self, request: &RegisterRequest) -> Result<Operation, ApiError> {
        let call = Call::post("register-template", &["template"], Repeat::IfNotCarriedOut);
        self.operate(&call.with_json(request)).await
    }

    /// `list-quotas`.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn list_quotas(&self) -> Result<Vec<Quota>, ApiError> {
        self.read(&Call::list("list-quotas", &["quota"]), wire::decode_quotas).await
    }

    /// `get-quota` of something, such as `snapshot`; `None` if there is no such quota.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn get_quota(&self, entity: &str) -> Result<Option<Quota>, ApiError> {
        found(self.read(&Call::get("get-quota", &["quota", entity]), wire::decode_quota).await)
    }

    /// Starts an operation and waits for its end. A permit is held meanwhile.
    async fn operate(&self, call: &Call<'_>) -> Result<Operation, ApiError> {
        let _permit = self.permits.acquire().await.expect("the semaphore is never closed");
        let answer = self.send(call).await?;
        let first = wire::decode_operation(&answer.body).map_err(|error| self.malformed(call, error))?;
        self.settle(call.operation, first).await
    }

    async fn delete(&self, call: &Call<'_>) -> Result<Deleted, ApiError> {
        match self.operate(call).await {
            Ok(operation) => Ok(Deleted::Done(operation)),
            // Not of a poll, which asks for something else.
            Err(error) if error.kind() == ErrorKind::NotFound && error.operation() == call.operation => {
                Ok(Deleted::AlreadyGone)
            }
            Err(error) => Err(error),
        }
    }

    async fn read<T>(
        &self,
        call: &Call<'_>,
        decode: impl FnOnce(&[u8]) -> Result<T, DecodeError>,
    ) -> Result<T, ApiError> {
        let answer = self.send(call).await?;
        decode(&answer.body).map_err(|error| self.malformed(call, error))
    }

    pub(super) fn malformed(&self, call: &Call<'_>, source: DecodeError) -> ApiError {
        ApiError::new(&self.zone, call.operation, ErrorKind::Malformed)
            .because(source)
            .perhaps_carried_out(call.changes_something())
    }

    /// Sends until a good answer comes, or it is no use, or it is not safe.
    async fn send(&self, call: &Call<'_>) -> Result<Answer, ApiError> {
        let mut perhaps_carried_out = false;
        let mut attempts = Attempts::new(REQUESTS);
        loop {
            let failed = match self.send_once(call).await {
                Ok(answer) => return Ok(answer),
                Err(failed) => failed,
            };
            attempts.count_failure();
            perhaps_carried_out |= failed.perhaps_carried_out && call.changes_something();
            let safe = call.repeat == Repeat::Freely || !failed.perhaps_carried_out;
            if attempts.are_exhausted() || !failed.passing || !safe {
                return Err(failed.error.after(attempts.failed()).perhaps_carried_out(perhaps_carried_out));
            }
            let span = attempts.pause(failed.retry_after, &*self.shared.randomness);
            tracing::debug!(
                zone = %self.zone, operation = call.operation, reason = failed.error.kind().as_str(),
                "`{}` is tried again in {} ms", call.operation, span.as_millis()
            );
            self.retried(call.operation, failed.error.kind());
            self.shared.clock.sleep(span).await;
        }
    }

    /// One try, with a signature of its own.
    pub(super) async fn send_once(&self, call: &Call<'_>) -> Result<Answer, Failed> {
        let shared = &*self.shared;
        let clock = &*shared.clock;
        shared.pace.wait(clock).await;
        let request = self.request(call).map_err(Failed::before_sending)?;

        let begun = clock.elapsed();
        let exchange = async {
            let response = shared.transport.send(request).await.map_err(Lost::Head)?;
            let received_at = clock.now();
            let (status, headers) = (response.status, response.headers);
            let max = if status.is_success() { call.max_bytes } else { MAX_BODY_BYTES };
            let body = match read_body(response.body, max).await {
                Ok(body) => body,
                // The status says enough.
                Err(_) if !status.is_success() => Bytes::new(),
                Err(error) => return Err(Lost::Body(error)),
            };
            Ok((status, headers, received_at, body))
        };
        let outcome = match timeout(clock, shared.settings.request_timeout, exchange).await {
            Ok(outcome) => outcome,
            Err(late) => Err(Lost::Late(late)),
        };

        let took = clock.elapsed().saturating_sub(begun);
        let elapsed_ms = took.as_millis();
        if let Some(observer) = &shared.observer {
            let status = outcome.as_ref().ok().map(|(status, ..)| *status);
            observer.answered(&self.zone, call.operation, status, took);
        }
        let (status, headers, received_at, body) = match outcome {
            Ok(answer) => answer,
            Err(lost) => {
                let failed = self.lost(call.operation, lost);
                tracing::debug!(
                    zone = %self.zone, operation = call.operation, elapsed_ms,
                    "`{}` got no answer: {}", call.operation, failed.error.kind().as_str()
                );
                return Err(failed);
            }
        };
        tracing::debug!(
            zone = %self.zone, operation = call.operation, status = status.as_u16(), elapsed_ms,
            "`{}` was answered with {}", call.operation, status.as_u16()
        );
        if !status.is_success() {
            let carried_out = status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED;
            return Err(Failed {
                error: ApiError::from_status(&self.zone, call.operation, status, &body),
                passing: carried_out || status == StatusCode::TOO_MANY_REQUESTS,
                perhaps_carried_out: carried_out,
                retry_after: retry_after(status, &headers, clock.now()),
            });
        }
        let date = headers.get(header::DATE).and_then(http_date);
        Ok(Answer { body, date, received_at })
    }

    fn lost(&self, operation: &'static str, lost: Lost) -> Failed {
        let error = |kind| ApiError::new(&self.zone, operation, kind);
        let (error, passing, perhaps_carried_out) = match lost {
            Lost::Head(source) => {
                let perhaps = source.reached == Reached::Unknown;
                (error(ErrorKind::Transport).because(source), true, perhaps)
            }
            Lost::Body(BodyError::TooLong { max }) => {
                (error(ErrorKind::Malformed).because(DecodeError::TooLong(max)), false, true)
            }
            Lost::Body(source @ BodyError::Broken(_)) => {
                (error(ErrorKind::Transport).because(source), true, true)
            }
            Lost::Late(source) => (error(ErrorKind::TimedOut).because(source), true, true),
        };
        Failed { error, passing, perhaps_carried_out, retry_after: None }
    }

    /// The request, signed as of now.
    fn request(&self, call: &Call<'_>) -> Result<Request, ApiError> {
        let error = |kind| ApiError::new(&self.zone, call.operation, kind);
        let url = self.url(call).ok_or_else(|| {
            error(ErrorKind::Endpoint).saying(format!("`{}`", printable(&self.shared.settings.endpoint)))
        })?;
        let mut headers =
            HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static("application/json"))]);
        if !call.body.is_empty() {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        } else if call.method == Method::POST {
            // HTTP/1.1 asks for it, as the vendor's clients do it; without it some servers answer 411.
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        if call.signed {
            let credentials =
                self.shared.credentials.as_ref().ok_or_else(|| error(ErrorKind::NoCredentials))?;
            let expires = self.shared.clock.now().as_second() + VALID_FOR_SECONDS;
            let value = authorization(credentials, &call.method, &url, &call.body, expires);
            headers.insert(header::AUTHORIZATION, value);
        }
        let (method, body) = (call.method.clone(), call.body.clone());
        Ok(Request { method, url, headers, body, purpose: Purpose::Api })
    }

    fn url(&self, call: &Call<'_>) -> Option<Url> {
        let endpoint = self.shared.settings.endpoint.replace("{zone}", self.zone.as_str());
        let mut url = Url::parse(&endpoint).ok()?;
        url.path_segments_mut().ok()?.pop_if_empty().extend(call.path);
        if let Some((name, value)) = call.query {
            url.query_pairs_mut().append_pair(name, value);
        }
        Some(url)
    }

    /// Tells the observer that a request is sent again.
    pub(super) fn retried(&self, operation: &'static str, reason: ErrorKind) {
        if let Some(observer) = &self.shared.observer {
            observer.retried(operation, reason);
        }
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    pub(super) fn clock(&self) -> &dyn Clock {
        &*self.shared.clock
    }
}

impl Answer {
    pub(super) fn body(&self) -> &[u8] {
        &self.body
    }
}

impl Failed {
    fn before_sending(error: ApiError) -> Self {
        Self { error, passing: false, perhaps_carried_out: false, retry_after: None }
    }

    pub(super) fn passing(error: ApiError) -> Self {
        Self { error, passing: true, perhaps_carried_out: false, retry_after: None }
    }
}

/// 404 as `None`.
fn found<T>(answer: Result<T, ApiError>) -> Result<Option<T>, ApiError> {
    match answer {
        Ok(thing) => Ok(Some(thing)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use secrecy::SecretString;

    use super::*;
    use crate::exoscale::scripted::{Script, Step, ok, status};
    use crate::text::chain;

    const ID: &str = "b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105";
    const LISTING: &str = r#"{"snapshots":[{"id":"b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105","created-at":"2026-10-01T02:30:00Z"}]}"#;
    const SUCCESS: &str = r#"{"id":"e2047130-b86e-11ef-83b3-0d8312b2c2d7","state":"success","reference":{"id":"b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105"}}"#;

    fn id() -> SnapshotId {
        ID.parse().unwrap()
    }

    fn promotion() -> PromoteRequest {
        PromoteRequest {
            name: "golden".to_owned(),
            description: None,
            default_user: None,
            ssh_key_enabled: Some(true),
            password_enabled: None,
        }
    }

    /// Everything that may go better in a while, and whether the request may have been carried out.
    fn passing_failures() -> Vec<(Step, bool)> {
        vec![
            (Step::Lost(Reached::Nothing), false),
            (status(429, "slow down"), false),
            (Step::Lost(Reached::Unknown), true),
            (Step::Cut(r#"{"id":"#), true),
            (Step::Silence, true),
            (status(500, "oops"), true),
            (status(503, "Endpoint template temporarily unavailable"), true),
        ]
    }

    #[tokio::test(start_paused = true)]
    async fn a_listing_comes_with_both_clocks() {
        let date = &[(header::DATE, "Sun, 01 Nov 2026 02:29:58 GMT")];
        let (zone, script) = Script::play([Step::Answer(200, date, LISTING.to_owned())]);
        let listing = zone.list_snapshots().await.unwrap();
        assert_eq!(listing.snapshots.len(), 1);
        assert_eq!(listing.date, Some("2026-11-01T02:29:58Z".parse().unwrap()));
        assert_eq!(listing.received_at, "2026-11-01T02:30:00Z".parse().unwrap());
        let sent = &script.sent()[0];
        assert_eq!(
            (sent.method.as_str(), sent.url.as_str()),
            ("GET", "https://api-ch-gva-2.example/v2/snapshot")
        );
    }

    #[tokio::test(start_paused = true)]
    async fn reading_deleting_and_exporting_are_repeated_whatever_passing_thing_went_wrong() {
        for (failure, _) in passing_failures() {
            let (zone, _) = Script::play([failure.clone(), ok(LISTING)]);
            assert_eq!(zone.list_snapshots().await.unwrap().snapshots.len(), 1, "{failure:?}");
            let (zone, _) = Script::play([failure.clone(), ok(SUCCESS)]);
            assert!(matches!(zone.delete_snapshot(id()).await.unwrap(), Deleted::Done(_)), "{failure:?}");
            let (zone, _) = Script::play([failure.clone(), ok(SUCCESS)]);
            assert_eq!(zone.export_snapshot(id()).await.unwrap().reference, Some(id().0), "{failure:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn creating_promoting_and_registering_are_repeated_only_if_certainly_not_carried_out() {
        let registration = RegisterRequest {
            name: "n".to_owned(),
            url: SecretString::from("https://x/y?hush"),
            checksum: "AB".to_owned(),
            ssh_key_enabled: true,
            password_enabled: false,
            boot_mode: None,
            description: None,
            default_user: None,
            size: None,
        };
        for (failure, perhaps) in passing_failures() {
            for call in 0..3 {
                let (zone, script) = Script::play([failure.clone(), ok(SUCCESS)]);
                let outcome = match call {
                    0 => zone.promote_snapshot(id(), &promotion()).await,
                    1 => zone.create_snapshot(InstanceId(id().0)).await,
                    _ => zone.register_template(&registration).await,
                };
                if perhaps {
                    let error = outcome.unwrap_err();
                    assert!(error.may_have_happened(), "{failure:?}");
                    assert!(chain(&error).contains("may have been carried out"), "{error}");
                    assert_eq!(script.sent().len(), 1, "{failure:?}");
                } else {
                    assert_eq!(outcome.unwrap().reference, Some(id().0), "{failure:?}");
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_is_given_up_after_five_tries_with_growing_pauses() {
        let (zone, script) = Script::play(vec![status(502, "bad gateway"); 5]);
        let error = zone.list_snapshots().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Server);
        assert!(!error.may_have_happened());
        assert_eq!(script.seconds(), [0, 1, 3, 7, 15]);
        assert_eq!(
            chain(&error),
            "`list-snapshots` in zone ch-gva-2: the API is in trouble, in 5 tries (502: `bad gateway`); the \
             next run tries again"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_that_the_server_asks_for_is_kept_up_to_a_minute() {
        let asks = |status, after| Step::Answer(status, after, String::new());
        let (zone, script) = Script::play([
            asks(429, &[(header::RETRY_AFTER, "20")]),
            asks(503, &[(header::RETRY_AFTER, "Sun, 01 Nov 2026 02:30:50 GMT")]),
            asks(503, &[(header::RETRY_AFTER, "3600")]),
            ok("{}"),
        ]);
        zone.list_instances().await.unwrap();
        assert_eq!(script.seconds(), [0, 20, 50, 110]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_will_not_pass_is_not_repeated() {
        let cases = [
            (status(400, "missing keys"), ErrorKind::Refused),
            (status(401, ""), ErrorKind::Credentials),
            (status(403, "Invalid request signature"), ErrorKind::Credentials),
            (status(403, "Forbidden by role policy for compute"), ErrorKind::Permission),
            (status(501, "not implemented"), ErrorKind::Server),
            (status(301, "moved"), ErrorKind::Refused),
            (ok("<html>welcome</html>"), ErrorKind::Malformed),
            (ok(""), ErrorKind::Malformed),
            (ok(r#"{"snapshots":[{}]}"#), ErrorKind::Malformed),
        ];
        for (step, kind) in cases {
            let (zone, script) = Script::play([step.clone()]);
            let error = zone.list_snapshots().await.unwrap_err();
            assert_eq!((error.kind(), error.operation()), (kind, "list-snapshots"), "{step:?}");
            assert_eq!(script.sent().len(), 1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_no_json_says_so() {
        let (zone, _) = Script::play([ok("<html>welcome</html>")]);
        let error = zone.list_snapshots().await.unwrap_err();
        assert!(error.source().is_some());
        assert_eq!(
            chain(&error),
            "`list-snapshots` in zone ch-gva-2: the answer can't be understood; check that the endpoint is \
             Exoscale's API and no proxy answers for it: it is a page of HTML or XML where JSON was expected"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn lists_may_be_long_and_single_things_may_not() {
        let padded = |json: &str| ok(format!("{json}{}", " ".repeat(MAX_BODY_BYTES)));
        let (zone, _) = Script::play([padded(LISTING), padded(r#"{"id":"x"}"#)]);
        assert_eq!(zone.list_snapshots().await.unwrap().snapshots.len(), 1);
        let error = zone.get_snapshot(id()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed);
        assert!(chain(&error).ends_with("it is longer than 1048576 bytes"), "{}", chain(&error));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_server_ends_each_try_after_the_request_timeout() {
        let (zone, script) = Script::play(vec![Step::Silence; 5]);
        let error = zone.list_instances().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(script.seconds(), [0, 31, 63, 97, 135]);
    }

    #[tokio::test(start_paused = true)]
    async fn each_try_has_a_signature_of_its_own() {
        let (zone, script) = Script::play([Step::Silence, ok(SUCCESS)]);
        zone.export_snapshot(id()).await.unwrap();
        let sent = script.sent();
        // 2026-11-01T02:40:00Z, and 31 s later.
        assert!(sent[0].authorization().contains(",expires=1793500800,"), "{}", sent[0].authorization());
        assert!(sent[1].authorization().contains(",expires=1793500831,"), "{}", sent[1].authorization());
        assert_ne!(sent[0].authorization(), sent[1].authorization());
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_request_with_a_body_has_a_content_type() {
        let (zone, script) = Script::play([ok(SUCCESS), ok(SUCCESS)]);
        zone.export_snapshot(id()).await.unwrap();
        zone.promote_snapshot(id(), &promotion()).await.unwrap();
        let sent = script.sent();
        assert!(sent[0].body.is_empty() && !sent[0].headers.contains_key(header::CONTENT_TYPE));
        assert_eq!(sent[0].url, format!("https://api-ch-gva-2.example/v2/snapshot/{ID}:export"));
        assert_eq!(&sent[1].body[..], br#"{"name":"golden","ssh-key-enabled":true}"#);
        assert_eq!(sent[1].headers[header::CONTENT_TYPE], "application/json");
    }

    #[tokio::test(start_paused = true)]
    async fn zones_are_listed_without_a_signature_and_templates_are_the_private_ones() {
        let (client, script) = Script::play_to_all([ok(r#"{"zones":[{"name":"de-fra-1"}]}"#), ok("{}")]);
        let ask = "ch-gva-2".parse().unwrap();
        assert_eq!(client.list_zones(&ask).await.unwrap()[0].name.as_str(), "de-fra-1");
        client.zone(&ask).list_templates().await.unwrap();
        let sent = script.sent();
        assert!(!sent[0].headers.contains_key(header::AUTHORIZATION));
        assert!(sent[1].url.ends_with("/v2/template?visibility=private"), "{}", sent[1].url);
        assert!(sent[1].authorization().contains(",signed-query-args=visibility,"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_thing_that_is_not_there_is_none_and_its_deletion_is_done() {
        let (zone, _) = Script::play(vec![status(404, "not found"); 4]);
        assert!(zone.get_snapshot(id()).await.unwrap().is_none());
        assert!(zone.get_instance(InstanceId(id().0)).await.unwrap().is_none());
        assert!(zone.get_template(TemplateId(id().0)).await.unwrap().is_none());
        assert_eq!(zone.delete_snapshot(id()).await.unwrap(), Deleted::AlreadyGone);
        // The first answer was lost after the deed.
        let (zone, _) = Script::play([Step::Lost(Reached::Unknown), status(404, "not found")]);
        assert_eq!(zone.delete_snapshot(id()).await.unwrap(), Deleted::AlreadyGone);
        let (zone, _) = Script::play([status(404, "not found")]);
        assert_eq!(zone.export_snapshot(id()).await.unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[tokio::test(start_paused = true)]
    async fn a_deletion_whose_first_answer_was_lost_may_have_happened_whatever_came_then() {
        let (zone, _) = Script::play([Step::Lost(Reached::Unknown), status(409, "snapshot is deleting")]);
        let error = zone.delete_snapshot(id()).await.unwrap_err();
        assert!(error.is_busy() && error.may_have_happened());
        let (zone, _) = Script::play([status(409, "snapshot is deleting")]);
        let error = zone.delete_snapshot(id()).await.unwrap_err();
        assert!(error.is_busy() && !error.may_have_happened());
    }

    #[tokio::test(start_paused = true)]
    async fn no_second_has_more_requests_than_allowed_over_all_zones() {
        let (client, script) = Script::play_to_all(vec![ok("{}"); 24]);
        let zones = ["ch-gva-2", "de-fra-1"].map(|name| client.zone(&name.parse().unwrap()));
        let asked = (0..12).flat_map(|_| &zones).map(ZoneClient::list_quotas);
        let answers = futures_util::future::join_all(asked).await;
        assert!(answers.iter().all(Result::is_ok));
        let at: Vec<u128> = script.sent().iter().map(|sent| sent.at.as_millis()).collect();
        let expected: Vec<u128> = [[0; 10], [1000; 10]].concat().into_iter().chain([2000; 4]).collect();
        assert_eq!(at, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn operations_of_a_zone_wait_for_a_permit() {
        let pending = r#"{"id":"e2047130-b86e-11ef-83b3-0d8312b2c2d7","state":"pending"}"#;
        let steps = [ok(pending), ok(pending), ok(SUCCESS), ok(SUCCESS), ok(SUCCESS)];
        let (zone, script) = Script::play(steps);
        let (a, b, c) =
            tokio::join!(zone.export_snapshot(id()), zone.export_snapshot(id()), zone.export_snapshot(id()));
        assert!(a.is_ok() && b.is_ok() && c.is_ok());
        let methods: Vec<String> = script.sent().iter().map(|sent| sent.method.to_string()).collect();
        assert_eq!(methods, ["POST", "POST", "GET", "POST", "GET"]);
    }

    #[tokio::test(start_paused = true)]
    async fn without_credentials_nothing_but_the_list_of_zones_is_sent() {
        let (with, script) = Script::play_to_all([]);
        let shared = &with.shared;
        let without = Client::new(
            shared.settings.clone(),
            None,
            Arc::clone(&shared.transport),
            Arc::clone(&shared.clock),
            Arc::clone(&shared.randomness),
        );
        let error = without.zone(&"ch-gva-2".parse().unwrap()).list_snapshots().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoCredentials);
        assert!(script.sent().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_quota_name_can_not_leave_its_place_in_the_path() {
        let (zone, script) = Script::play([ok(r#"{"resource":"x"}"#)]);
        zone.get_quota("../snapshot?a=b#c").await.unwrap();
        assert_eq!(script.sent()[0].url, "https://api-ch-gva-2.example/v2/quota/..%2Fsnapshot%3Fa=b%23c");
    }

    #[test]
    fn the_secret_is_not_in_the_clients_debug_text() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _inside = runtime.enter();
        let (client, _) = Script::play_to_all([]);
        let shown = format!("{client:?}");
        assert!(shown.contains("EXO1") && !shown.contains("hush"), "{shown}");
    }
}
