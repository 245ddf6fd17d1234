//! The HTTP port: read only, and bounded against slow, many and malformed clients.
//!
//! The same is served by a socket in the state directory (see [`crate::daemon::live`]), without TLS and passwords: whoever may
//! open that may read the directory.
//!
//! A connection carries one request, so the bound on the time of a connection is a bound on the time of an answer. No
//! body is read, and no route calls the API. Neither clients that ask for nothing nor large scrapes keep a probe waiting:
//! the former make room for newer ones, and the latter are made one at a time, beside the threads of the network.

use std::collections::VecDeque;
use std::future::ready;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, REFERRER_POLICY,
    WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::uri::Authority;
use axum::http::{HeaderValue, StatusCode, Uri};
use axum::middleware::{Next, from_fn, from_fn_with_state, map_request, map_response};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use bytes::Bytes;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Mutex;
use tokio::task::{AbortHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use url::form_urlencoded;

use crate::clock::{Clock, timeout};
use crate::daemon::page;
use crate::daemon::passwords::Verdict;
use crate::daemon::web::Access;
use crate::disk::begin_blocking;
use crate::telemetry::Telemetry;
use crate::text::safe_json;

/// Connections at once. They stay well below the 1,024 open files that a process may have by default.
const CONNECTIONS_MAX: usize = 256;

/// Between two bytes of a request's head, and for all of it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// From the first byte to the last.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);

/// A longer head is refused. It is twice what hyper needs at least.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// After a connection that could not be taken, mostly since too many files are open.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A name at Exoscale has at most 255 characters.
const QUERY_CHARACTERS_MAX: usize = 255;

/// The longest wait for responses in flight when the port is closed.
const STOP_WAIT_MAX: Duration = Duration::from_secs(1);

/// A port that can't be opened.
#[derive(Debug, thiserror::Error)]
#[error("open the HTTP port {address}{}", advice(.source))]
pub struct BindError {
    address: SocketAddr,
    #[source]
    source: io::Error,
}

impl BindError {
    /// Whether another socket has the address.
    pub fn is_in_use(&self) -> bool {
        self.source.kind() == io::ErrorKind::AddrInUse
    }
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            ", which another process has (`ss -ltnp` names it): stop that one, or set `listen` in `[server]`"
        }
        io::ErrorKind::AddrNotAvailable => {
            ", which is no address of this machine: set `listen` in `[server]`"
        }
        io::ErrorKind::PermissionDenied => {
            ", which only root may open: set `listen` in `[server]` to a port from 1024 on"
        }
        _ => ", as `listen` in `[server]` says",
    }
}

/// Opens the port. Until it is served, clients that connect wait.
///
/// # Errors
/// [`BindError`], which says what to do.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { address, source })
}

/// Serves the port until `stop`; responses in flight then get a second.
pub async fn serve(
    listener: TcpListener,
    telemetry: Telemetry,
    access: Arc<Access>,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
) {
    let is_loopback = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
    let port = Port { telemetry, clock: Arc::clone(&clock), last_scrape: Arc::default() };
    let routes = with_access(routes(port), &access);
    let routes = if is_loopback { routes.layer(from_fn(for_this_machine)) } else { routes };
    serve_all(Door::Port(listener, access), routes, clock, stop).await;
}

/// Serves a socket of this machine as [`serve`] serves the port, to everybody who may open it.
pub async fn serve_socket(
    listener: UnixListener,
    telemetry: Telemetry,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
) {
    let port = Port { telemetry, clock: Arc::clone(&clock), last_scrape: Arc::default() };
    serve_all(Door::Socket(listener), routes(port), clock, stop).await;
}

/// Where connections come from.
enum Door {
    Port(TcpListener, Arc<Access>),
    Socket(UnixListener),
}

/// A connection that was taken.
enum Taken {
    Port(TcpStream, Option<Arc<ServerConfig>>),
    Socket(UnixStream),
}

impl Door {
    async fn accept(&self) -> io::Result<Taken> {
        match self {
            Self::Port(listener, access) => Ok(Taken::Port(listener.accept().await?.0, access.tls())),
            Self::Socket(listener) => Ok(Taken::Socket(listener.accept().await?.0)),
        }
    }
}

async fn serve_all(door: Door, routes: Router, clock: Arc<dyn Clock>, stop: CancellationToken) {
    let mut tasks = JoinSet::new();
    let mut open: VecDeque<Connection> = VecDeque::new();
    let accept = async {
        loop {
            match door.accept().await {
                Ok(taken) => {
                    while tasks.try_join_next().is_some() {}
                    make_room(&mut open);
                    let has_asked = Arc::new(AtomicBool::new(false));
                    let asked = Arc::clone(&has_asked);
                    let routes = routes.clone().layer(map_request(move |request: Request| {
                        asked.store(true, Ordering::Relaxed);
                        ready(request)
                    }));
                    let clock = Arc::clone(&clock);
                    let task = tasks.spawn(async move {
                        let conversation = converse_with(taken, routes, &*clock);
                        if let Err(late) = timeout(&*clock, CONNECTION_TIMEOUT, conversation).await {
                            debug!("a client of the HTTP port was cut off: {late}");
                        }
                    });
                    open.push_back(Connection { task, has_asked });
                }
                Err(error) => {
                    warn!("the HTTP port could not take a connection: {error}");
                    clock.sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = accept => {}
    }
    drop(door);
    // The end of the process cuts off slower ones.
    let _ = timeout(&*clock, STOP_WAIT_MAX, async { while tasks.join_next().await.is_some() {} }).await;
}

struct Connection {
    task: AbortHandle,
    /// Whether its request has come.
    has_asked: Arc<AtomicBool>,
}

/// Closes one of too many connections: the oldest without a request; if all have one, the oldest of all. So a probe,
/// whose request comes at once, is always taken.
fn make_room(open: &mut VecDeque<Connection>) {
    open.retain(|connection| !connection.task.is_finished());
    if open.len() < CONNECTIONS_MAX {
        return;
    }
    let idle = open.iter().position(|connection| !connection.has_asked.load(Ordering::Relaxed));
    if let Some(closed) = open.remove(idle.unwrap_or(0)) {
        closed.task.abort();
    }
}

/// The handshake, if there is to be one, then one request and its answer.
async fn converse_with(taken: Taken, routes: Router, clock: &dyn Clock) {
    match taken {
        Taken::Socket(stream) => converse(stream, routes).await,
        Taken::Port(stream, None) => converse(stream, routes).await,
        Taken::Port(stream, Some(config)) => {
            let handshake = async {
                let mut first = [0];
                stream.peek(&mut first).await?;
                // Such as `GET`: what begins TLS is no letter.
                if first[0].is_ascii_alphabetic() {
                    return Ok(Err(stream));
                }
                TlsAcceptor::from(config).accept(stream).await.map(Ok)
            };
            match timeout(clock, HEAD_TIMEOUT, handshake).await {
                Ok(Ok(Ok(stream))) => converse(stream, routes).await,
                Ok(Ok(Err(stream))) => converse(stream, Router::new().fallback(needs_tls)).await,
                Ok(Err(error)) => debug!("a client of the HTTP port: no TLS: {error}"),
                Err(late) => debug!("a client of the HTTP port was cut off: no TLS: {late}"),
            }
        }
    }
}

async fn needs_tls() -> Response {
    text(StatusCode::BAD_REQUEST, "this port has TLS: ask for https://\n".to_owned())
}

/// One request and its answer.
async fn converse(stream: impl AsyncRead + AsyncWrite + Unpin, routes: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    if let Err(error) = connection.await {
        debug!("a client of the HTTP port: {error}");
    }
}

/// Where all answers come from.
#[derive(Clone)]
struct Port {
    telemetry: Telemetry,
    clock: Arc<dyn Clock>,
    /// The last scrape, and when making it began, on the clock's elapsed time.
    last_scrape: Arc<Mutex<Option<(Duration, Bytes)>>>,
}

/// Asks for a password, if there are users, and adds the headers of the web configuration file.
fn with_access(routes: Router, access: &Arc<Access>) -> Router {
    let headers = Arc::clone(access);
    routes.layer(from_fn_with_state(Arc::clone(access), with_password)).layer(map_response(
        move |mut response: Response| {
            response.headers_mut().extend(headers.headers());
            ready(response)
        },
    ))
}

/// Probes have no password, and what they are answered is no secret.
const FREE: [&str; 3] = ["/livez", "/readyz", "/healthz"];

async fn with_password(State(access): State<Arc<Access>>, request: Request, next: Next) -> Response {
    if FREE.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let mut response = match access.check(request.headers().get(AUTHORIZATION)).await {
        Verdict::Right => return next.run(request).await,
        Verdict::Wrong => {
            text(StatusCode::UNAUTHORIZED, "a user's name and password are needed\n".to_owned())
        }
        Verdict::Busy => {
            let why = "too many passwords wait to be checked: try again\n";
            text(StatusCode::SERVICE_UNAVAILABLE, why.to_owned())
        }
    };
    if response.status() == StatusCode::UNAUTHORIZED {
        let challenge = HeaderValue::from_static("Basic realm=\"snapwarden\", charset=\"UTF-8\"");
        response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
    }
    guarded(response).await
}

fn routes(port: Port) -> Router {
    Router::new()
        .route("/", get(index))
        .route("/instance/{zone}/{id}", get(instance))
        .route("/metrics", get(metrics))
        .route("/livez", get(livez))
        .route("/healthz", get(livez))
        .route("/readyz", get(readyz))
        .route("/api/v1/status", get(status))
        .fallback(async || text(StatusCode::NOT_FOUND, "there is nothing here; see /\n".to_owned()))
        .layer(map_response(guarded))
        .with_state(port)
}

/// Headers of every answer: browsers must neither guess the type, nor show an old one, nor send its address to others.
async fn guarded(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

/// On a loopback address only this machine asks, by that address or as `localhost`. A page from elsewhere, whose name was
/// made to lead here, would ask by its own name.
async fn for_this_machine(request: Request, next: Next) -> Response {
    let host = request.headers().get(HOST).map(|host| host.to_str().unwrap_or("?").to_owned());
    let host = host.or_else(|| request.uri().authority().map(ToString::to_string));
    // HTTP/1.0 has none; browsers always send one.
    if host.is_none_or(|host| is_this_machine(&host)) {
        return next.run(request).await;
    }
    let why = "this port is for this machine alone: ask for it as localhost, or by its address\n";
    guarded(text(StatusCode::MISDIRECTED_REQUEST, why.to_owned())).await
}

fn is_this_machine(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let name = authority.host().trim_end_matches('.').to_ascii_lowercase();
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    address.is_ok() || name == "localhost" || name.ends_with(".localhost")
}

async fn index(State(port): State<Port>, uri: Uri) -> Response {
    let (mut query, mut page) = (String::new(), 1);
    for (key, value) in form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()) {
        match &*key {
            "q" => query = value.chars().take(QUERY_CHARACTERS_MAX).collect(),
            "page" => page = value.parse().unwrap_or(1),
            _ => {}
        }
    }
    let telemetry = port.telemetry.clone();
    html(move || Some(page::index(&telemetry.overview(), &query, page)), &port).await
}

async fn instance(State(port): State<Port>, Path((zone, id)): Path<(String, String)>) -> Response {
    let telemetry = port.telemetry.clone();
    let found = move || {
        let found = telemetry.instance(&zone.parse().ok()?, id.parse().ok()?)?;
        Some(page::instance(&found, &telemetry.version()))
    };
    html(found, &port).await
}

/// A page, made beside the threads of the network: it may be of a large fleet.
async fn html(made: impl FnOnce() -> Option<String> + Send + 'static, port: &Port) -> Response {
    let (status, page) = match begin_blocking(made).await {
        Ok(Some(page)) => (StatusCode::OK, page),
        Ok(None) => (StatusCode::NOT_FOUND, page::not_found(port.clock.now(), &port.telemetry.version())),
        Err(error) => {
            return text(StatusCode::INTERNAL_SERVER_ERROR, format!("there is no page: {error}\n"));
        }
    };
    let mut response = answer(status, "text/html; charset=utf-8", page);
    let headers = response.headers_mut();
    if let Ok(policy) = HeaderValue::from_str(&page::CONTENT_SECURITY_POLICY) {
        headers.insert(CONTENT_SECURITY_POLICY, policy);
    }
    response
}

async fn metrics(State(port): State<Port>) -> Response {
    let asked_at = port.clock.elapsed();
    let mut last = port.last_scrape.lock().await;
    let text = match &*last {
        // Begun for another client while this one waited: nothing in it is older than this request.
        Some((begun_at, text)) if *begun_at > asked_at => text.clone(),
        _ => {
            let begun_at = port.clock.elapsed();
            match begin_blocking(move || port.telemetry.metrics_text()).await {
                Ok(made) => {
                    let made = Bytes::from(made);
                    *last = Some((begun_at, made.clone()));
                    made
                }
                Err(error) => {
                    return text(
                        StatusCode::INTERNAL_SERVER_ERROR,
                        format!("there are no metrics: {error}\n"),
                    );
                }
            }
        }
    };
    answer(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
}

async fn livez(State(port): State<Port>) -> Response {
    health(port.telemetry.alive())
}

async fn readyz(State(port): State<Port>) -> Response {
    health(port.telemetry.ready())
}

async fn status(State(port): State<Port>) -> Response {
    match serde_json::to_string_pretty(&port.telemetry.status_json()) {
        Ok(json) => answer(StatusCode::OK, "application/json", format!("{}\n", safe_json(&json))),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("the status is no JSON: {error}\n")),
    }
}

fn health(state: Result<(), String>) -> Response {
    match state {
        Ok(()) => text(StatusCode::OK, "ok\n".to_owned()),
        Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

fn text(status: StatusCode, body: String) -> Response {
    answer(status, "text/plain; charset=utf-8", body)
}

fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Body>) -> Response {
    (status, [(CONTENT_TYPE, content_type)], body.into()).into_response()
}
