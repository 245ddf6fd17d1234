//! The client: one method per operation of the API, each zone on its own.
//!
//! A [`Client`] is shared by everything in the process, so that the rate of requests and the operations in flight are
//! counted once. A [`ZoneClient`] asks one zone: ids are valid in their zone alone, and a running operation is known only
//! where it was started.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::fmt::Debug;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use serde_json::json;
use tokio::sync::Semaphore;
use url::Url;
use uuid::Uuid;

use crate::clock::{Clock, timeout};
use crate::credentials::Credentials;
use crate::exoscale::error::{ApiError, ErrorKind};
use crate::exoscale::pace::Pace;
use crate::exoscale::sign::{VALID_FOR_SECONDS, authorization};
use crate::exoscale::wire::{
    self, DecodeError, Deleted, DeletionEvent, InstanceDetails, ListedSnapshots, Operation, PromoteRequest,
    Quota, RegisterRequest, ResetRequest, SnapshotDetails, Template, Zone,
};
use crate::randomness::Randomness;
use crate::retry::{Attempts, REQUESTS, RetryPolicy, retry_after};
use crate::snapshot::{Instance, InstanceId, SnapshotId, TemplateId, ZoneName};
use crate::text::{printable, to_the_second};
use crate::transport::{BodyError, Purpose, Reached, Request, Transport, http_date, read_body};

/// The longest listing. The API has no pages; a listing of 100,000 snapshots takes some 40 MB.
const MAX_LIST_BYTES: usize = 64 << 20;

/// The longest response that is not a listing: those have a few KiB.
const MAX_BODY_BYTES: usize = 1 << 20;

/// The longest list of events in one response; an event has a KiB or two.
const MAX_EVENTS_BYTES: usize = 8 << 20;

/// How often the time is halved for which events are asked.
const EVENT_SPLITS_MAX: usize = 30;

/// How the client behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The API's address including `/v2`; `{zone}` in it stands for the zone's name.
    pub endpoint: String,
    /// The limit of one attempt at one request, until the last byte of the response.
    pub request_timeout: Duration,
    /// The first wait between two polls of an operation.
    pub poll_interval: Duration,
    /// How long an operation may stay pending before it counts as failed.
    pub operation_timeout: Duration,
    /// The limit over all zones and policies together.
    pub requests_per_second: NonZeroU32,
    /// How many processes share that limit, this one included.
    pub shards: NonZeroU32,
    /// The limit of operations in flight per zone.
    pub concurrency: NonZeroUsize,
}

/// Is notified of every exchange, for metrics. It must not block.
pub trait Observer: Send + Sync + Debug {
    /// A request ended after `took`: with this status, or without a response.
    fn answered(&self, zone: &ZoneName, operation: &'static str, status: Option<StatusCode>, took: Duration);

    /// A request, or the poll of an operation, is sent again.
    fn retried(&self, operation: &'static str, reason: ErrorKind);

    /// A listing gave the API's time: this machine's clock is ahead of it by `ahead`.
    fn clock_compared(&self, zone: &ZoneName, ahead: SignedDuration);
}

/// The client of all zones. Clones share the rate of requests and the limits of operations.
#[derive(Debug, Clone)]
pub struct Client {
    settings: Settings,
    credentials: Option<Credentials>,
    transport: Arc<dyn Transport>,
    clock: Arc<dyn Clock>,
    randomness: Arc<dyn Randomness>,
    observer: Option<Arc<dyn Observer>>,
    retry: RetryPolicy,
    pace: Arc<Pace>,
    /// Per zone, the permits for operations in flight.
    permits: Arc<Mutex<BTreeMap<ZoneName, Arc<Semaphore>>>>,
}

/// The client of one zone.
#[derive(Debug, Clone)]
pub struct ZoneClient {
    client: Client,
    zone: ZoneName,
    permits: Arc<Semaphore>,
}

/// A request before it is signed.
pub(super) struct ApiRequest<'a> {
    /// The API's name for it.
    operation: &'static str,
    method: Method,
    /// Segments below the endpoint's path; they are percent-encoded.
    path: &'a [&'a str],
    query: Vec<(&'static str, String)>,
    /// Empty for none.
    body: Bytes,
    /// Whether a second time has no further effect. Otherwise it is repeated only if the first was certainly not carried
    /// out.
    is_idempotent: bool,
    max_bytes: usize,
    is_signed: bool,
}

/// An attempt that failed.
pub(super) struct FailedAttempt {
    pub(super) error: ApiError,
    /// Whether another attempt may succeed.
    pub(super) is_transient: bool,
    /// Whether the server may have carried the request out.
    perhaps_carried_out: bool,
    pub(super) retry_after: Option<Duration>,
}

impl<'a> ApiRequest<'a> {
    pub(super) fn get(operation: &'static str, path: &'a [&'a str]) -> Self {
        Self {
            operation,
            method: Method::GET,
            path,
            query: Vec::new(),
            body: Bytes::new(),
            is_idempotent: true,
            max_bytes: MAX_BODY_BYTES,
            is_signed: true,
        }
    }

    fn list(operation: &'static str, path: &'a [&'a str]) -> Self {
        Self { max_bytes: MAX_LIST_BYTES, ..Self::get(operation, path) }
    }

    /// `list-zones` is public and sent without a signature: with one, a key of few permissions is refused.
    fn list_zones() -> Self {
        Self { is_signed: false, ..Self::list("list-zones", &["zone"]) }
    }

    fn delete(operation: &'static str, path: &'a [&'a str]) -> Self {
        Self { method: Method::DELETE, ..Self::get(operation, path) }
    }

    fn post(operation: &'static str, path: &'a [&'a str]) -> Self {
        Self { method: Method::POST, is_idempotent: false, ..Self::get(operation, path) }
    }

    fn put(operation: &'static str, path: &'a [&'a str]) -> Self {
        Self { method: Method::PUT, ..Self::post(operation, path) }
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
        let pace = Arc::new(Pace::new(settings.requests_per_second, settings.shards));
        let permits = Arc::default();
        let retry = REQUESTS;
        Self { settings, credentials, transport, clock, randomness, observer: None, retry, pace, permits }
    }

    /// The same client with an observer.
    #[must_use]
    pub fn with_observer(self, observer: Arc<dyn Observer>) -> Self {
        Self { observer: Some(observer), ..self }
    }

    /// The same client, but each request is sent once alone and takes at most `limit`.
    #[must_use]
    pub fn trying_once(mut self, limit: Duration) -> Self {
        self.settings.request_timeout = self.settings.request_timeout.min(limit);
        self.retry.max_attempts = 1;
        self
    }

    /// The client of one zone.
    pub fn zone(&self, zone: &ZoneName) -> ZoneClient {
        let mut permits = self.permits.lock().unwrap_or_else(PoisonError::into_inner);
        let permits = permits
            .entry(zone.clone())
            .or_insert_with(|| Arc::new(Semaphore::new(self.settings.concurrency.get())));
        ZoneClient { client: self.clone(), zone: zone.clone(), permits: Arc::clone(permits) }
    }

    /// `list-zones`, asked of one zone's API, and how far this machine's clock is ahead of that API's, if the response has
    /// a date. It needs no credentials.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn list_zones(&self, ask: &ZoneName) -> Result<(Vec<Zone>, Option<SignedDuration>), ApiError> {
        let (zone, request) = (self.zone(ask), ApiRequest::list_zones());
        let (body, clock_skew) = zone.send(&request).await?;
        let zones = wire::decode_zones(&body).map_err(|error| zone.malformed(&request, error))?;
        Ok((zones, clock_skew))
    }

    /// How far this machine's clock is ahead of the API's in this zone; `None` if its response has no date. It needs no
    /// credentials.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn clock_skew(&self, ask: &ZoneName) -> Result<Option<SignedDuration>, ApiError> {
        Ok(self.zone(ask).send(&ApiRequest::list_zones()).await?.1)
    }
}

impl ZoneClient {
    /// The zone that it asks.
    pub fn zone(&self) -> &ZoneName {
        &self.zone
    }

    /// `list-snapshots`: all of them, and how far this machine's clock is ahead of the API's, if the response has a date.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn list_snapshots(&self) -> Result<(ListedSnapshots, Option<SignedDuration>), ApiError> {
        let request = ApiRequest::list("list-snapshots", &["snapshot"]);
        let (body, clock_skew) = self.send(&request).await?;
        let listed = wire::decode_snapshots(&body).map_err(|error| self.malformed(&request, error))?;
        if let (Some(observer), Some(ahead)) = (&self.client.observer, clock_skew) {
            observer.clock_compared(&self.zone, ahead);
        }
        Ok((listed, clock_skew))
    }

    /// `list-instances`: all of them.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn list_instances(&self) -> Result<Vec<Instance>, ApiError> {
        self.read(&ApiRequest::list("list-instances", &["instance"]), wire::decode_instances).await
    }

    /// `get-instance`; `None` if there is none in this zone.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn get_instance(&self, id: InstanceId) -> Result<Option<InstanceDetails>, ApiError> {
        let path = ["instance", &id.to_string()];
        self.read_if_any(&ApiRequest::get("get-instance", &path), wire::decode_instance).await
    }

    /// `get-instance-type`: family and size, such as `standard.medium`; `None` if there is no such type, or it has none.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn get_instance_type(&self, id: Uuid) -> Result<Option<String>, ApiError> {
        let path = ["instance-type", &id.to_string()];
        let request = ApiRequest::get("get-instance-type", &path);
        Ok(self.read_if_any(&request, wire::decode_instance_type).await?.flatten())
    }

    /// `stop-instance`, until it is done. It is never repeated blindly: an instance that is stopped already refuses it.
    ///
    /// # Errors
    /// [`ApiError`]; after one that [may have happened](ApiError::may_have_happened) look at the instance's state.
    pub async fn stop_instance(&self, id: InstanceId) -> Result<Operation, ApiError> {
        let path = ["instance", &format!("{id}:stop")];
        self.operate(&ApiRequest::put("stop-instance", &path)).await
    }

    /// `start-instance`, until it is done. It is never repeated blindly: an instance that runs already refuses it.
    ///
    /// # Errors
    /// [`ApiError`]; after one that [may have happened](ApiError::may_have_happened) look at the instance's state.
    pub async fn start_instance(&self, id: InstanceId) -> Result<Operation, ApiError> {
        let path = ["instance", &format!("{id}:start")];
        self.operate(&ApiRequest::put("start-instance", &path).with_json(&json!({}))).await
    }

    /// `revert-instance-to-snapshot`, until it is done: all that was written since the snapshot is lost. The instance must be
    /// stopped.
    ///
    /// # Errors
    /// [`ApiError`]; after one that [may have happened](ApiError::may_have_happened) the disk may be either.
    pub async fn revert_instance(&self, id: InstanceId, to: SnapshotId) -> Result<Operation, ApiError> {
        let path = ["instance", &format!("{id}:revert-snapshot")];
        let request = ApiRequest::post("revert-instance-to-snapshot", &path);
        self.operate(&request.with_json(&json!({ "id": to }))).await
    }

    /// `reset-instance`, until it is done: all that is on the disk is lost.
    ///
    /// # Errors
    /// [`ApiError`]; after one that [may have happened](ApiError::may_have_happened) look at the instance's template.
    pub async fn reset_instance(&self, id: InstanceId, reset: &ResetRequest) -> Result<Operation, ApiError> {
        let path = ["instance", &format!("{id}:reset")];
        self.operate(&ApiRequest::put("reset-instance", &path).with_json(reset)).await
    }

    /// `get-snapshot`; `None` if there is none in this zone.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn get_snapshot(&self, id: SnapshotId) -> Result<Option<SnapshotDetails>, ApiError> {
        let path = ["snapshot", &id.to_string()];
        self.read_if_any(&ApiRequest::get("get-snapshot", &path), wire::decode_snapshot).await
    }

    /// `export-snapshot`, until it is done; [`ZoneClient::get_snapshot`] has the address then. A second export does no
    /// harm, so it is repeated freely.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn export_snapshot(&self, id: SnapshotId) -> Result<Operation, ApiError> {
        let path = ["snapshot", &format!("{id}:export")];
        let request = ApiRequest { is_idempotent: true, ..ApiRequest::post("export-snapshot", &path) };
        self.operate(&request).await
    }

    /// `delete-snapshot`, until it is done.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn delete_snapshot(&self, id: SnapshotId) -> Result<Deleted, ApiError> {
        let path = ["snapshot", &id.to_string()];
        self.delete(&ApiRequest::delete("delete-snapshot", &path)).await
    }

    /// `promote-snapshot-to-template`, until it is done; the reference is the template. A second time makes a
    /// second template, so it is never repeated blindly.
    ///
    /// # Errors
    /// [`ApiError`]; after one that [may have happened](ApiError::may_have_happened) look for the template.
    pub async fn promote_snapshot(
        &self,
        id: SnapshotId,
        promotion: &PromoteRequest,
    ) -> Result<Operation, ApiError> {
        let path = ["snapshot", &format!("{id}:promote")];
        let request = ApiRequest::post("promote-snapshot-to-template", &path);
        self.operate(&request.with_json(promotion)).await
    }

    /// `create-snapshot`, until it is done; the reference is the snapshot. A second time makes a second
    /// snapshot, so it is never repeated blindly.
    ///
    /// # Errors
    /// [`ApiError`]; after one that [may have happened](ApiError::may_have_happened) look for the snapshot.
    pub async fn create_snapshot(&self, of: InstanceId) -> Result<Operation, ApiError> {
        let path = ["instance", &format!("{of}:create-snapshot")];
        self.operate(&ApiRequest::post("create-snapshot", &path)).await
    }

    /// `list-templates`, the organization's own (`visibility=private`; the API's default is the public ones).
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn list_templates(&self) -> Result<Vec<Template>, ApiError> {
        let query = vec![("visibility", "private".to_owned())];
        let request = ApiRequest { query, ..ApiRequest::list("list-templates", &["template"]) };
        self.read(&request, wire::decode_templates).await
    }

    /// `get-template`; `None` if there is none in this zone.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn get_template(&self, id: TemplateId) -> Result<Option<Template>, ApiError> {
        let path = ["template", &id.to_string()];
        self.read_if_any(&ApiRequest::get("get-template", &path), wire::decode_template).await
    }

    /// `delete-template`, until it is done.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn delete_template(&self, id: TemplateId) -> Result<Deleted, ApiError> {
        let path = ["template", &id.to_string()];
        self.delete(&ApiRequest::delete("delete-template", &path)).await
    }

    /// `register-template`, until it is done; the reference is the template. Never repeated blindly.
    ///
    /// # Errors
    /// [`ApiError`]; after one that [may have happened](ApiError::may_have_happened) look for the template.
    pub async fn register_template(&self, registration: &RegisterRequest) -> Result<Operation, ApiError> {
        let request = ApiRequest::post("register-template", &["template"]);
        self.operate(&request.with_json(registration)).await
    }

    /// `list-quotas`.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn list_quotas(&self) -> Result<Vec<Quota>, ApiError> {
        self.read(&ApiRequest::list("list-quotas", &["quota"]), wire::decode_quotas).await
    }

    /// `get-quota` of one resource, such as `snapshot`; `None` if there is no such quota.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn get_quota(&self, entity: &str) -> Result<Option<Quota>, ApiError> {
        self.read_if_any(&ApiRequest::get("get-quota", &["quota", entity]), wire::decode_quota).await
    }

    /// `list-events`: who deleted these snapshots between two times, as far as the platform says so; it keeps events for 30
    /// days. Of several deletions of one snapshot the last one counts. Where there are too many events for one response, they
    /// are asked for in parts.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn list_deletions(
        &self,
        of: &BTreeSet<SnapshotId>,
        [from, to]: [Timestamp; 2],
    ) -> Result<BTreeMap<SnapshotId, DeletionEvent>, ApiError> {
        let mut found: BTreeMap<SnapshotId, DeletionEvent> = BTreeMap::new();
        let mut parts = vec![[from, to]];
        let mut splits = EVENT_SPLITS_MAX;
        while let Some([from, to]) = parts.pop() {
            let query =
                vec![("from", to_the_second(from).to_string()), ("to", to_the_second(to).to_string())];
            let request = ApiRequest {
                query,
                max_bytes: MAX_EVENTS_BYTES,
                ..ApiRequest::get("list-events", &["event"])
            };
            match self.read(&request, |body| wire::decode_deletions(body, of)).await {
                Ok(events) => {
                    for (id, event) in events {
                        if found.get(&id).is_none_or(|known| known.at <= event.at) {
                            found.insert(id, event);
                        }
                    }
                }
                Err(error) if is_too_long(&error) && splits > 0 => {
                    splits -= 1;
                    let half = to.duration_since(from) / 2;
                    let middle = from.checked_add(half).unwrap_or(to);
                    parts.extend([[from, middle], [middle, to]]);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// The key that signs the requests; none without credentials.
    pub fn key(&self) -> Option<&str> {
        self.client.credentials.as_ref().map(|credentials| credentials.key.as_str())
    }

    /// Starts an operation and waits for its end. A permit is held meanwhile.
    async fn operate(&self, request: &ApiRequest<'_>) -> Result<Operation, ApiError> {
        let _permit = self.permits.acquire().await.expect("the semaphore is never closed");
        let first = self.read(request, wire::decode_operation).await?;
        self.settle(request.operation, first).await
    }

    async fn delete(&self, request: &ApiRequest<'_>) -> Result<Deleted, ApiError> {
        match self.operate(request).await {
            Ok(operation) => Ok(Deleted::Done(operation)),
            // The deletion was answered with 404, not a poll of its operation.
            Err(error) if error.kind() == ErrorKind::NotFound && error.operation() == request.operation => {
                Ok(Deleted::AlreadyGone)
            }
            Err(error) => Err(error),
        }
    }

    async fn read<T>(
        &self,
        request: &ApiRequest<'_>,
        decode: impl FnOnce(&[u8]) -> Result<T, DecodeError>,
    ) -> Result<T, ApiError> {
        let (body, _) = self.send(request).await?;
        decode(&body).map_err(|error| self.malformed(request, error))
    }

    /// Like [`Self::read`], with 404 as `None`.
    async fn read_if_any<T>(
        &self,
        request: &ApiRequest<'_>,
        decode: impl FnOnce(&[u8]) -> Result<T, DecodeError>,
    ) -> Result<Option<T>, ApiError> {
        match self.read(request, decode).await {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn malformed(&self, request: &ApiRequest<'_>, source: DecodeError) -> ApiError {
        ApiError::new(&self.zone, request.operation, ErrorKind::Malformed)
            .caused_by(source)
            .perhaps_carried_out(request.changes_something())
    }

    /// Sends a request until it succeeds, or another attempt is useless or unsafe. Returns what
    /// [`Self::send_once`] does.
    async fn send(&self, request: &ApiRequest<'_>) -> Result<(Bytes, Option<SignedDuration>), ApiError> {
        let mut perhaps_carried_out = false;
        let mut attempts = Attempts::new(self.client.retry);
        loop {
            let failed = match self.send_once(request).await {
                Ok(response) => return Ok(response),
                Err(failed) => failed,
            };
            attempts.count_failure();
            perhaps_carried_out |= failed.perhaps_carried_out && request.changes_something();
            let is_safe = request.is_idempotent || !failed.perhaps_carried_out;
            if attempts.are_exhausted() || !failed.is_transient || !is_safe {
                return Err(failed.error.after(attempts.failed()).perhaps_carried_out(perhaps_carried_out));
            }
            let pause = attempts.pause(failed.retry_after, &*self.client.randomness);
            tracing::debug!(
                zone = %self.zone, operation = request.operation, reason = failed.error.kind().as_str(),
                "`{}` is tried again in {} ms", request.operation, pause.as_millis()
            );
            self.retried(request.operation, failed.error.kind());
            self.client.clock.sleep(pause).await;
        }
    }

    /// One attempt, with a signature of its own: a signature expires. Returns the body of a response of success, and
    /// how far this machine's clock is ahead of the API's, if the response has a `Date`.
    pub(super) async fn send_once(
        &self,
        request: &ApiRequest<'_>,
    ) -> Result<(Bytes, Option<SignedDuration>), FailedAttempt> {
        let Client { transport, clock, settings, pace, observer, .. } = &self.client;
        let operation = request.operation;
        let error = |kind| ApiError::new(&self.zone, operation, kind);
        pace.wait(&**clock).await;
        let signed = self.signed(request).map_err(FailedAttempt::for_good)?;

        let begun = clock.elapsed();
        let exchange = async {
            let response = transport.send(signed).await.map_err(|source| {
                let perhaps = source.reached == Reached::Unknown;
                FailedAttempt::transient(error(ErrorKind::Transport).caused_by(source), perhaps)
            })?;
            let received_at = clock.now();
            let (status, headers) = (response.status, response.headers);
            let max = if status.is_success() { request.max_bytes } else { MAX_BODY_BYTES };
            let body = match read_body(response.body, max).await {
                Ok(body) => body,
                // The status says enough.
                Err(_) if !status.is_success() => Bytes::new(),
                Err(BodyError::TooLong { max }) => {
                    let too_long = error(ErrorKind::Malformed).caused_by(DecodeError::TooLong(max));
                    return Err(FailedAttempt {
                        perhaps_carried_out: true,
                        ..FailedAttempt::for_good(too_long)
                    });
                }
                Err(broken @ BodyError::Broken(_)) => {
                    let broken = error(ErrorKind::Transport).caused_by(broken);
                    return Err(FailedAttempt::transient(broken, true));
                }
            };
            Ok((status, headers, received_at, body))
        };
        let outcome = timeout(&**clock, settings.request_timeout, exchange).await.unwrap_or_else(|late| {
            Err(FailedAttempt::transient(error(ErrorKind::TimedOut).caused_by(late), true))
        });

        let took = clock.elapsed().saturating_sub(begun);
        let elapsed_ms = took.as_millis();
        if let Some(observer) = observer {
            let status = outcome.as_ref().ok().map(|(status, ..)| *status);
            observer.answered(&self.zone, operation, status, took);
        }
        let (status, headers, received_at, body) = outcome.inspect_err(|failed| {
            tracing::debug!(
                zone = %self.zone, operation, elapsed_ms,
                "`{operation}` got no response: {}", failed.error.kind().as_str()
            );
        })?;
        tracing::debug!(
            zone = %self.zone, operation, status = status.as_u16(), elapsed_ms,
            "`{operation}` was answered with {}", status.as_u16()
        );
        if !status.is_success() {
            let perhaps_carried_out = status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED;
            return Err(FailedAttempt {
                error: ApiError::from_status(&self.zone, operation, status, &body),
                is_transient: perhaps_carried_out || status == StatusCode::TOO_MANY_REQUESTS,
                perhaps_carried_out,
                retry_after: retry_after(status, &headers, clock.now()),
            });
        }
        let date = headers.get(header::DATE).and_then(http_date);
        Ok((body, date.map(|date| received_at.duration_since(date))))
    }

    /// The request, signed as of now.
    fn signed(&self, request: &ApiRequest<'_>) -> Result<Request, ApiError> {
        let error = |kind| ApiError::new(&self.zone, request.operation, kind);
        let url = self.url(request).ok_or_else(|| {
            error(ErrorKind::Endpoint).with_detail(format!("`{}`", printable(&self.client.settings.endpoint)))
        })?;
        let mut headers =
            HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static("application/json"))]);
        if !request.body.is_empty() {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        } else if request.method == Method::POST {
            // HTTP/1.1 requires it, and the vendor's clients send it; without it some servers answer 411.
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        if request.is_signed {
            let credentials =
                self.client.credentials.as_ref().ok_or_else(|| error(ErrorKind::NoCredentials))?;
            let expires = self.client.clock.now().as_second() + VALID_FOR_SECONDS;
            let value = authorization(credentials, &request.method, &url, &request.body, expires);
            headers.insert(header::AUTHORIZATION, value);
        }
        let (method, body) = (request.method.clone(), request.body.clone());
        Ok(Request { method, url, headers, body, purpose: Purpose::Api })
    }

    fn url(&self, request: &ApiRequest<'_>) -> Option<Url> {
        let endpoint = self.client.settings.endpoint.replace("{zone}", self.zone.as_str());
        let mut url = Url::parse(&endpoint).ok()?;
        url.path_segments_mut().ok()?.pop_if_empty().extend(request.path);
        // Without any, there is no `?` either.
        if !request.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&request.query);
        }
        Some(url)
    }

    /// Notifies the observer that a request is sent again.
    pub(super) fn retried(&self, operation: &'static str, reason: ErrorKind) {
        if let Some(observer) = &self.client.observer {
            observer.retried(operation, reason);
        }
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.client.settings
    }

    pub(super) fn clock(&self) -> &dyn Clock {
        &*self.client.clock
    }
}

fn is_too_long(error: &ApiError) -> bool {
    let cause = error.source().and_then(|source| source.downcast_ref::<DecodeError>());
    matches!(cause, Some(DecodeError::TooLong(_)))
}

impl FailedAttempt {
    /// Before anything was sent, or with an answer that will not change.
    fn for_good(error: ApiError) -> Self {
        Self { error, is_transient: false, perhaps_carried_out: false, retry_after: None }
    }

    pub(super) fn transient(error: ApiError, perhaps_carried_out: bool) -> Self {
        Self { error, is_transient: true, perhaps_carried_out, retry_after: None }
    }
}

#[cfg(test)]
mod tests {
    use secrecy::SecretString;

    use super::*;
    use crate::exoscale::testing::{Script, Step, ok, status};
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

    /// Every kind of transient failure, and whether the request may have been carried out.
    fn transient_failures() -> Vec<(Step, bool)> {
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
    async fn a_listing_comes_with_the_difference_of_both_clocks() {
        let date = &[(header::DATE, "Sun, 01 Nov 2026 02:29:58 GMT")];
        let (zone, script) = Script::play([Step::Answer(200, date, LISTING.to_owned())]);
        let (listed, clock_skew) = zone.list_snapshots().await.unwrap();
        assert_eq!(listed.snapshots.len(), 1);
        assert_eq!(clock_skew, Some(SignedDuration::from_secs(2)));
        let sent = &script.sent()[0];
        assert_eq!(
            (sent.method.as_str(), sent.url.as_str()),
            ("GET", "https://api-ch-gva-2.example/v2/snapshot")
        );
    }

    #[tokio::test(start_paused = true)]
    async fn reading_deleting_and_exporting_are_repeated_after_every_transient_failure() {
        for (failure, _) in transient_failures() {
            let (zone, _) = Script::play([failure.clone(), ok(LISTING)]);
            assert_eq!(zone.list_snapshots().await.unwrap().0.snapshots.len(), 1, "{failure:?}");
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
            application_consistent_snapshot_enabled: None,
            version: None,
            build: None,
            maintainer: None,
        };
        for (failure, perhaps) in transient_failures() {
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
                    assert!(chain(&error).contains("may still have been carried out"), "{error}");
                    assert_eq!(script.sent().len(), 1, "{failure:?}");
                } else {
                    assert_eq!(outcome.unwrap().reference, Some(id().0), "{failure:?}");
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_is_given_up_after_five_attempts_with_growing_pauses() {
        let (zone, script) = Script::play(vec![status(502, "bad gateway"); 5]);
        let error = zone.list_snapshots().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Server);
        assert!(!error.may_have_happened());
        assert_eq!(script.seconds(), [0, 1, 3, 7, 15]);
        assert_eq!(
            chain(&error),
            "`list-snapshots` in zone ch-gva-2: the API failed after 5 attempts (502: `bad gateway`); the next \
             run tries again"
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
    async fn what_is_not_transient_is_not_repeated() {
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
            "`list-snapshots` in zone ch-gva-2: unexpected response; check that the endpoint is Exoscale's API \
             and no proxy answers for it: it is a page of HTML or XML where JSON was expected"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn lists_may_be_long_and_single_things_may_not() {
        let padded = |json: &str| ok(format!("{json}{}", " ".repeat(MAX_BODY_BYTES)));
        let (zone, _) = Script::play([padded(LISTING), padded(r#"{"id":"x"}"#)]);
        assert_eq!(zone.list_snapshots().await.unwrap().0.snapshots.len(), 1);
        let error = zone.get_snapshot(id()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed);
        assert!(chain(&error).ends_with("it is longer than 1048576 bytes"), "{}", chain(&error));
    }

    #[tokio::test(start_paused = true)]
    async fn too_many_events_are_asked_for_in_halves() {
        let event = |at: &str, key: &str| {
            format!(
                r#"[{{"uri":"/v2/snapshot/{ID}","status":200,"timestamp":"{at}","iam-api-key":{{"key":"{key}"}}}}]"#
            )
        };
        let too_long = ok(" ".repeat(MAX_EVENTS_BYTES + 1));
        let (zone, script) = Script::play([
            too_long.clone(),
            ok(event("2026-11-01T13:00:00.123Z", "EXO2")),
            ok(event("2026-11-01T01:00:00.000Z", "EXO1")),
        ]);
        let times = ["2026-11-01T00:00:00Z", "2026-11-02T00:00:00Z"].map(|at| at.parse().unwrap());
        let found = zone.list_deletions(&BTreeSet::from([id()]), times).await.unwrap();
        assert_eq!(found[&id()].key.as_deref(), Some("EXO2"), "the last one counts");
        let sent: Vec<String> = script.sent().into_iter().map(|sent| sent.url).collect();
        assert!(
            sent[0].ends_with("/v2/event?from=2026-11-01T00%3A00%3A00Z&to=2026-11-02T00%3A00%3A00Z"),
            "{sent:?}"
        );
        assert!(sent[1].contains("from=2026-11-01T12") && sent[2].contains("to=2026-11-01T12"), "{sent:?}");
        assert!(script.sent()[0].authorization().contains(",signed-query-args=from;to,"));
        // Not for ever.
        let (zone, script) = Script::play(vec![too_long; EVENT_SPLITS_MAX + 1]);
        let error = zone.list_deletions(&BTreeSet::from([id()]), times).await.unwrap_err();
        assert_eq!((error.kind(), script.sent().len()), (ErrorKind::Malformed, EVENT_SPLITS_MAX + 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_server_ends_each_attempt_after_the_request_timeout() {
        let (zone, script) = Script::play(vec![Step::Silence; 5]);
        let error = zone.list_instances().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(script.seconds(), [0, 31, 63, 97, 135]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_tries_once_gives_up_at_its_own_limit() {
        let (client, script) = Script::play_to_all([Step::Silence, Step::Lost(Reached::Nothing)]);
        let (client, zone) = (client.trying_once(Duration::from_secs(5)), "ch-gva-2".parse().unwrap());
        assert_eq!(client.list_zones(&zone).await.unwrap_err().kind(), ErrorKind::TimedOut);
        assert_eq!(client.list_zones(&zone).await.unwrap_err().kind(), ErrorKind::Transport);
        assert_eq!(script.seconds(), [0, 5]);
    }

    #[tokio::test(start_paused = true)]
    async fn each_attempt_has_a_signature_of_its_own() {
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
        assert_eq!(client.list_zones(&ask).await.unwrap().0[0].name.as_str(), "de-fra-1");
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
        let without = Client { credentials: None, ..with };
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
