//! The world as a service: it answers HTTP exchanges as the platform does, with the faults that apply to them.
//!
//! In this process the hosts are the real ones (`api-<zone>.exoscale.com`,
//! `exported-snapshots-<zone>-prod.sos-<zone>.exo.io`); behind a socket one address serves all:
//! `http://127.0.0.1:PORT/<zone>/v2/…`, and its presigned addresses point back at it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::StreamExt as _;
use http::StatusCode;
use uuid::Uuid;

use crate::clock::Clock;
use crate::sim::answer::{Answer, Content, as_received, cut, finished};
use crate::sim::api::ApiRequest;
use crate::sim::call::Call;
use crate::sim::fault::{Effect, Ending};
use crate::sim::host::{Host, Resource, Target};
use crate::sim::store;
use crate::sim::world::{Exchange, World};
use crate::snapshot::{OperationId, SnapshotId};
use crate::transport::{Reached, Request, Response, Transport, TransportError};

/// The address at which every instance reaches the metadata server.
const METADATA_HOST: &str = "169.254.169.254";

fn no_connection() -> TransportError {
    TransportError::new(Reached::Nothing, "no connection")
}

/// The answer over a slow line.
fn slowed(answer: Response, clock: Arc<dyn Clock>, pause: Duration) -> Response {
    let body = answer.body.then(move |chunk| {
        let sleep = clock.sleep(pause);
        async move {
            sleep.await;
            chunk
        }
    });
    Response { body: Box::pin(body), ..answer }
}

impl Transport for World {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        Box::pin(async move { Ok(as_received(self.exchange(request).await?)) })
    }
}

impl World {
    /// This world as a transport in this process.
    pub fn transport(&self) -> Arc<dyn Transport> {
        Arc::new(self.clone())
    }

    /// Carries out one request, with all faults that apply to it.
    ///
    /// # Errors
    /// If no host has this name, or a fault cuts the connection before an answer.
    pub async fn exchange(&self, request: Request) -> Result<Response, TransportError> {
        if request.url.host_str() == Some(METADATA_HOST) {
            return self.metadata(&request);
        }
        let target = Target::of(&request.url).ok_or_else(no_connection)?;
        let (call, id) = match &target.resource {
            Resource::Api(path) => Call::of(&request.method, path),
            Resource::Object(key) => (Call::GetImage, store::snapshot_of(key).map(|id| id.0)),
        };
        let exchange = Arc::new(Exchange {
            at: self.now(),
            zone: target.zone.clone(),
            call,
            method: request.method.clone(),
            path: request.url.path().to_owned(),
            status: OnceLock::new(),
            body_bytes: Arc::default(),
        });
        let effects = {
            let mut state = self.settled();
            // In this process a zone that does not exist is a host that does not exist.
            if !state.zones.contains_key(&target.zone) && target.host == Host::Real {
                return Err(no_connection());
            }
            let mut ids: Vec<Uuid> = id.into_iter().collect();
            if let (Call::GetOperation, Some(id), Some(zone)) = (call, id, state.zones.get(&target.zone))
                && let Some(operation) = zone.operations.get(&OperationId(id))
            {
                ids.push(operation.work.reference());
                ids.extend(operation.work.snapshot().map(|snapshot| snapshot.0));
            }
            state.log.push(exchange.clone());
            let faults = state.faults.iter_mut();
            faults.filter_map(|fault| fault.apply(call, &target.zone, &ids)).collect::<Vec<_>>()
        };
        let answer = self.answer(&request, &target, id, &effects, &exchange)?;
        for effect in &effects {
            match effect {
                Effect::Delay(duration) => self.clock.sleep(*duration).await,
                Effect::CutAfter => return Err(cut("the connection broke before an answer came")),
                _ => {}
            }
        }
        // Set once: an exchange has one answer.
        let _ = exchange.status.set(answer.status);
        let pauses = effects.iter().filter_map(|effect| match effect {
            Effect::Slow(pause) => Some(*pause),
            _ => None,
        });
        let pause = pauses.sum();
        let answer = finished(answer, effects, exchange.at, exchange.body_bytes.clone());
        Ok(if pause > Duration::ZERO { slowed(answer, self.clock.clone(), pause) } else { answer })
    }

    /// The metadata server's answer, if there is such a server.
    fn metadata(&self, request: &Request) -> Result<Response, TransportError> {
        let this_machine = self.state().this_machine.ok_or_else(no_connection)?;
        let (status, text) = match request.url.path() {
            "/latest/meta-data/instance-id" => (StatusCode::OK, this_machine.to_string()),
            _ => (StatusCode::NOT_FOUND, "not found".to_owned()),
        };
        let answer = Answer::new(status, Content::Text("text/plain", text));
        Ok(finished(answer, Vec::new(), self.now(), Arc::default()))
    }

    /// The answer; changes the state as the request asks.
    fn answer(
        &self,
        request: &Request,
        target: &Target,
        id: Option<Uuid>,
        effects: &[Effect],
        exchange: &Exchange,
    ) -> Result<Answer, TransportError> {
        for effect in effects {
            match effect {
                Effect::Unreachable => return Err(no_connection()),
                Effect::CutBefore => return Err(cut("the connection broke before an answer came")),
                Effect::Answer { status, content_type, body } => {
                    return Ok(Answer::new(*status, Content::Text(content_type, body.clone())));
                }
                _ => {}
            }
        }
        let (call, now) = (exchange.call, exchange.at);
        if let Resource::Object(key) = &target.resource {
            return Ok(store::answer(&mut self.state(), request, &target.zone, key, effects, now));
        }
        let id = id.unwrap_or_default();
        if call == Call::ExportSnapshot {
            // The MD5 of a large image takes seconds: computed without the lock, so that other requests don't wait.
            let image = self
                .state()
                .zones
                .get(&target.zone)
                .and_then(|zone| zone.snapshots.get(&SnapshotId(id)))
                .map(|record| record.image.clone());
            if let Some(image) = image {
                image.md5();
            }
        }
        let ending = effects.iter().find_map(|effect| match effect {
            Effect::Operation(ending) => Some(*ending),
            _ => None,
        });
        let ending = ending.unwrap_or(Ending::SUCCESS);
        let elapsed = self.clock.elapsed();
        let state = &mut self.state();
        let request = ApiRequest { state, request, target, call, id, ending, elapsed, now };
        let (status, body) = request.answer();
        Ok(Answer::new(status, Content::Json(body)))
    }
}
