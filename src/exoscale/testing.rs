//! For tests: a transport that gives the answers of a script, and a clock that runs on tokio's paused time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};
use http::{HeaderMap, HeaderName, Method, StatusCode, header};
use jiff::Timestamp;

use crate::clock::Clock;
use crate::credentials::Credentials;
use crate::exoscale::client::{Client, Settings, ZoneClient};
use crate::randomness::Randomness;
use crate::transport::{Reached, Request, Response, Transport, TransportError};

/// What happens to one request.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Answer(u16, &'static [(HeaderName, &'static str)], String),
    /// The head comes, and the body breaks off after this.
    Cut(&'static str),
    Lost(Reached),
    Silence,
}

pub(super) fn ok(body: impl Into<String>) -> Step {
    Step::Answer(200, &[], body.into())
}

pub(super) fn status(status: u16, message: &str) -> Step {
    Step::Answer(status, &[], serde_json::json!({ "message": message }).to_string())
}

/// A request as it came.
#[derive(Debug, Clone)]
pub(super) struct Sent {
    pub(super) at: Duration,
    pub(super) method: Method,
    pub(super) url: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Sent {
    pub(super) fn authorization(&self) -> &str {
        self.headers[header::AUTHORIZATION].to_str().unwrap()
    }
}

#[derive(Debug)]
pub(super) struct Script {
    steps: Mutex<VecDeque<Step>>,
    sent: Mutex<Vec<Sent>>,
    clock: PausedClock,
}

impl Script {
    /// A client of `ch-gva-2` that meets these steps, and the script that remembers what it sent.
    pub(super) fn play(steps: impl IntoIterator<Item = Step>) -> (ZoneClient, Arc<Self>) {
        let (client, script) = Self::play_to_all(steps);
        (client.zone(&"ch-gva-2".parse().unwrap()), script)
    }

    pub(super) fn play_to_all(steps: impl IntoIterator<Item = Step>) -> (Client, Arc<Self>) {
        let clock = PausedClock(tokio::time::Instant::now());
        let steps = Mutex::new(steps.into_iter().collect());
        let script = Arc::new(Self { steps, sent: Mutex::default(), clock });
        let settings = Settings {
            endpoint: "https://api-{zone}.example/v2".to_owned(),
            request_timeout: Duration::from_secs(30),
            poll_interval: Duration::from_secs(3),
            operation_timeout: Duration::from_hours(1),
            requests_per_second: 10.try_into().unwrap(),
            shards: 1.try_into().unwrap(),
            concurrency: 2.try_into().unwrap(),
        };
        let credentials = Credentials::new("EXO1", "hush", None).unwrap();
        let transport = Arc::clone(&script);
        let client = Client::new(settings, Some(credentials), transport, Arc::new(clock), Arc::new(NoJitter));
        (client, script)
    }

    pub(super) fn sent(&self) -> Vec<Sent> {
        self.sent.lock().unwrap().clone()
    }

    /// When the requests came, in whole seconds.
    pub(super) fn seconds(&self) -> Vec<u64> {
        self.sent().iter().map(|sent| sent.at.as_secs()).collect()
    }
}

impl Transport for Script {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        let Request { method, url, headers, body, .. } = request;
        let at = self.clock.elapsed();
        self.sent.lock().unwrap().push(Sent { at, method, url: url.into(), headers, body });
        let step = self.steps.lock().unwrap().pop_front().expect("a request that the script does not know");
        let answer = |status, headers: &[(HeaderName, &str)], body| {
            let headers =
                headers.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect();
            Ok(Response { status: StatusCode::from_u16(status).unwrap(), headers, body })
        };
        async move {
            match step {
                Step::Answer(status, headers, body) => {
                    answer(status, headers, stream::iter([Ok(body.into())]).boxed())
                }
                Step::Cut(body) => {
                    let cut = Err(TransportError::new(Reached::Unknown, "cut"));
                    answer(200, &[], stream::iter([Ok(body.into()), cut]).boxed())
                }
                Step::Lost(reached) => Err(TransportError::new(reached, "lost")),
                Step::Silence => std::future::pending().await,
            }
        }
        .boxed()
    }
}

/// Begins at 2026-11-01T02:30:00Z.
#[derive(Debug, Clone, Copy)]
struct PausedClock(tokio::time::Instant);

impl Clock for PausedClock {
    fn now(&self) -> Timestamp {
        "2026-11-01T02:30:00Z".parse::<Timestamp>().unwrap() + self.elapsed()
    }

    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }

    #[expect(clippy::disallowed_methods, reason = "this is a form of the seam, on tokio's paused time")]
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        tokio::time::sleep(duration).boxed()
    }
}

#[derive(Debug)]
struct NoJitter;

impl Randomness for NoJitter {
    fn next_u64(&self) -> u64 {
        0
    }
}
