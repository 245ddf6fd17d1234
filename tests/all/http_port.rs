//! The HTTP port against clients of every kind, over real sockets.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::future::join_all;
use snapwarden::clock::Clock;
use snapwarden::daemon::server;
use snapwarden::daemon::web::Access;
use snapwarden::randomness::SystemRandomness;
use snapwarden::sim::clock::SimClock;
use snapwarden::telemetry::Telemetry;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

/// A port that is being served; stopped when it is dropped.
pub(crate) struct Port {
    pub(crate) address: SocketAddr,
    pub(crate) telemetry: Telemetry,
    stop: CancellationToken,
    served: tokio::task::JoinHandle<()>,
}

pub(crate) async fn open() -> Port {
    open_at([127, 0, 0, 1]).await
}

pub(crate) async fn open_at(address: [u8; 4]) -> Port {
    open_with(address, Arc::new(Access::new(None, &SystemRandomness))).await
}

/// A port that may be used so.
pub(crate) async fn open_with(address: [u8; 4], access: Arc<Access>) -> Port {
    let clock: Arc<dyn Clock> = Arc::new(SimClock::starting_at(crate::stage::NOW.parse().unwrap()));
    let telemetry = Telemetry::new(clock.clone(), "1.2.3", "abc");
    let listener = server::bind(SocketAddr::from((address, 0))).await.unwrap();
    let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
    let served = tokio::spawn(server::serve(listener, telemetry.clone(), access, clock, stop.clone()));
    Port { address, telemetry, stop, served }
}

/// All that comes back until the connection ends, however it ends.
async fn rest(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        bytes.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8(bytes).unwrap()
}

pub(crate) async fn say(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // Whoever is refused early may not be heard to the end.
    let _ = stream.write_all(request.as_bytes()).await;
    rest(stream).await
}

pub(crate) async fn get(address: SocketAddr, path: &str) -> String {
    say(address, &format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await
}

pub(crate) fn status_of(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or_else(|| panic!("no answer: {answer:?}"))
}

#[tokio::test]
async fn every_route_answers_as_promised() {
    let port = open().await;
    let cases = [
        (
            "/metrics",
            "200",
            "text/plain; version=0.0.4",
            "snapwarden_build_info{revision=\"abc\",version=\"1.2.3\"} 1",
        ),
        ("/livez", "200", "text/plain", "ok"),
        ("/healthz", "200", "text/plain", "ok"),
        ("/readyz", "503", "text/plain", "not read yet"),
        ("/api/v1/status", "200", "application/json", "\"version\": \"1.2.3\""),
        ("/", "200", "text/html", "/metrics"),
        ("/metrics/", "404", "text/plain", "see /"),
        ("/../etc/passwd", "404", "text/plain", "see /"),
    ];
    for (path, status, kind, word) in cases {
        let answer = get(port.address, path).await;
        assert_eq!(status_of(&answer), status, "{path}: {answer}");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-type: {kind}")), "{path}: {head}");
        assert!(head.contains("x-content-type-options: nosniff"), "{path}: {head}");
        assert!(body.contains(word), "{path}: {body}");
    }
    port.telemetry.configure(&[], &BTreeSet::new());
    assert_eq!(status_of(&get(port.address, "/readyz").await), "200");
    port.telemetry.draining();
    assert!(get(port.address, "/readyz").await.contains("stopping"));
}

#[tokio::test]
async fn other_methods_are_refused_and_head_has_no_body() {
    let port = open().await;
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "NONSENSE"] {
        let request = format!("{method} /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n");
        let answer = say(port.address, &request).await;
        assert_eq!(status_of(&answer), "405", "{answer}");
        assert!(answer.to_lowercase().contains("allow: get"), "{answer}");
    }
    let head = say(port.address, "HEAD /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert!(status_of(&head) == "200" && head.ends_with("\r\n\r\n"), "{head}");
    assert!(head.contains("content-length: 3"), "{head}");
}

#[tokio::test]
async fn malformed_and_oversized_requests_are_refused() {
    let port = open().await;
    let long = "a".repeat(64 << 10);
    let cases = [
        ("hello\r\n\r\n".to_owned(), "400"),
        ("GET /livez HTTP/1.1\r\nno colon\r\n\r\n".to_owned(), "400"),
        ("\u{16}\u{3}\u{1}\u{2}\u{0}\u{1}\u{0}".to_owned(), "400"),
        (format!("GET /livez HTTP/1.1\r\nHost: localhost\r\nX: {long}\r\n\r\n"), "431"),
        (format!("GET /livez HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(2000)), "431"),
    ];
    for (request, status) in cases {
        let answer = say(port.address, &request).await;
        assert_eq!(status_of(&answer), status, "{}: {answer}", &request[..request.len().min(40)]);
    }
    assert_eq!(status_of(&get(port.address, "/livez").await), "200");
}

#[tokio::test]
async fn a_connection_carries_one_request() {
    let port = open().await;
    let pipelined =
        "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\nGET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let answer = say(port.address, pipelined).await;
    assert!(answer.contains("connection: close") && answer.ends_with("\r\n\r\nok\n"), "{answer}");
}

#[tokio::test]
async fn two_hundred_at_once_all_get_their_answer() {
    let port = open().await;
    let answers = join_all((0..200).map(|_| get(port.address, "/livez"))).await;
    assert!(answers.iter().all(|answer| status_of(answer) == "200"), "{answers:?}");
}

#[tokio::test]
async fn clients_that_ask_for_nothing_make_room_for_newer_ones_the_oldest_first() {
    let port = open().await;
    let mut silent = Vec::new();
    // A hundred and twenty-eight more than may be open.
    for _ in 0..256 + 128 {
        silent.push(TcpStream::connect(port.address).await.unwrap());
    }
    assert_eq!(status_of(&get(port.address, "/livez").await), "200");
    let mut newest = silent.split_off(129);
    for closed in silent {
        assert_eq!(rest(closed).await, "");
    }
    // Those that are left are served when they ask.
    for stream in &mut newest {
        stream.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    }
    for stream in newest {
        assert_eq!(status_of(&rest(stream).await), "200");
    }
}

#[tokio::test]
async fn sixty_scrapes_at_once_each_say_how_it_was_when_they_asked() {
    let port = open().await;
    let scrapes = tokio::spawn(join_all((0..60).map(move |_| get(port.address, "/metrics"))));
    let not_reloaded = "config_last_reload_successful 0";
    for answer in scrapes.await.unwrap() {
        assert!(status_of(&answer) == "200" && !answer.contains(not_reloaded), "{answer}");
    }
    port.telemetry.reloaded(Err("line 7".to_owned()), crate::stage::NOW.parse().unwrap());
    let scrapes = join_all((0..60).map(|_| get(port.address, "/metrics"))).await;
    assert!(scrapes.iter().all(|answer| answer.contains(not_reloaded)));
}

#[tokio::test(start_paused = true)]
async fn whoever_is_slow_with_the_head_is_cut_off() {
    let port = open().await;
    for begun in ["", "GET", "GET /livez HTTP/1.1\r\nHost: localhost\r\n"] {
        let mut stream = TcpStream::connect(port.address).await.unwrap();
        stream.write_all(begun.as_bytes()).await.unwrap();
        // Nothing more comes from here; the end comes from there.
        assert!(!rest(stream).await.contains("200 OK"), "{begun}");
    }
}

#[tokio::test]
async fn a_port_in_use_says_what_to_do_and_one_that_is_stopped_is_free() {
    let port = open().await;
    let error = server::bind(port.address).await.unwrap_err();
    let text = snapwarden::text::chain(&error);
    for word in [&*port.address.to_string(), "another process has", "`listen` in `[server]`"] {
        assert!(text.contains(word), "{text}");
    }
    port.stop.cancel();
    port.served.await.unwrap();
    assert!(server::bind(port.address).await.is_ok());
}
