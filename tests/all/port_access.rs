//! TLS and passwords of the HTTP port, over real sockets.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::version::{TLS12, TLS13};
use snapwarden::daemon::web::{Access, WebFile};
use snapwarden::disk::{self, RealDisk, replace_file};
use snapwarden::randomness::SystemRandomness;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::certificates::{Authority, Pair};
use crate::http_port::{self, Port, open_with, status_of};
use crate::web_config::HASH;

const TLS: &str = "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n";

fn write(folder: &Path, text: &str) {
    replace_file(&RealDisk, &folder.join("web.yml"), text.as_bytes(), disk::Access::Owner).unwrap();
}

fn read(folder: &Path) -> Result<WebFile, String> {
    WebFile::read(&folder.join("web.yml")).map_err(|error| snapwarden::text::chain(&error))
}

/// A port with this web configuration file in this folder.
async fn open(folder: &Path, text: &str) -> (Port, Arc<Access>) {
    write(folder, text);
    let access = Arc::new(Access::new(Some(read(folder).unwrap()), &SystemRandomness));
    (open_with([127, 0, 0, 1], Arc::clone(&access)).await, access)
}

/// What comes back for a path, with these lines of the head.
async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, path: &str, head: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A server need not say goodbye in TLS.
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

async fn tcp(port: &Port) -> TcpStream {
    TcpStream::connect(port.address).await.unwrap()
}

fn basic(user: &str, password: &str) -> String {
    format!("Authorization: Basic {}\r\n", STANDARD.encode(format!("{user}:{password}")))
}

#[tokio::test]
async fn with_a_certificate_the_port_speaks_tls_alone_and_takes_a_renewed_one() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let first = authority.sign();
    first.write(folder.path(), "server");
    let (port, access) = open(folder.path(), TLS).await;
    let shown = async || {
        let stream = authority.connect(tcp(&port).await, None, &[&TLS12, &TLS13]).await.unwrap();
        let certificate = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
        assert_eq!(status_of(&ask(stream, "/livez", "").await), "200");
        certificate
    };
    let before = shown().await;
    let plain = http_port::get(port.address, "/livez").await;
    assert!(status_of(&plain) == "400" && plain.contains("ask for https://"), "{plain}");
    assert_eq!(access.look_again(), Ok(false), "nothing changed");

    // The certificate is there before its key is.
    let second = authority.sign();
    Pair { key: first.key, ..second.clone() }.write(folder.path(), "server");
    let error = access.look_again().unwrap_err();
    assert!(error.contains("server.key is not the key of the certificate in "), "{error}");
    assert_eq!(shown().await, before, "the old one stays");
    second.write(folder.path(), "server");
    assert_eq!(access.look_again(), Ok(true));
    assert_ne!(shown().await, before);

    write(folder.path(), "tls_server_config: 7\n");
    assert!(access.look_again().unwrap_err().contains("web.yml:1:20"));
    assert!(access.look_again().is_err(), "as long as it is so");
    assert_ne!(shown().await, before);
    write(folder.path(), "http_server_config:\n  headers:\n    X-Frame-Options: sameorigin\n");
    assert_eq!(access.look_again(), Ok(true));
    let plain = http_port::get(port.address, "/livez").await;
    assert!(status_of(&plain) == "200" && plain.contains("x-frame-options: sameorigin"), "{plain}");
}

#[tokio::test]
async fn versions_and_the_certificates_of_clients_are_as_the_file_says() {
    let folder = tempfile::tempdir().unwrap();
    let (authority, stranger) = (Authority::new(), Authority::new());
    authority.sign().write(folder.path(), "server");
    authority.write(folder.path());
    let (ours, theirs) = (authority.sign(), stranger.sign());
    for (keys, certificate, versions, is_let_in) in [
        ("  min_version: TLS13\n", None, &TLS12, false),
        ("  min_version: TLS13\n", None, &TLS13, true),
        ("  max_version: TLS12\n", None, &TLS13, false),
        ("  cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384]\n", None, &TLS12, true),
        ("  cipher_suites: [TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384]\n", None, &TLS12, false),
        ("  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.pem\n", None, &TLS13, false),
        (
            "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.pem\n",
            Some(&ours),
            &TLS13,
            true,
        ),
        (
            "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.pem\n",
            Some(&theirs),
            &TLS13,
            false,
        ),
        ("  client_auth_type: VerifyClientCertIfGiven\n  client_ca_file: ca.pem\n", None, &TLS12, true),
        (
            "  client_auth_type: VerifyClientCertIfGiven\n  client_ca_file: ca.pem\n",
            Some(&theirs),
            &TLS12,
            false,
        ),
    ] {
        let (port, _) = open(folder.path(), &format!("{TLS}{keys}")).await;
        // With TLS 1.3 a client hears of the refusal only once it reads.
        let answer = match authority.connect(tcp(&port).await, certificate, &[versions]).await {
            Ok(mut stream) => {
                let _ = stream.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
                let mut answer = Vec::new();
                let _ = stream.read_to_end(&mut answer).await;
                String::from_utf8(answer).unwrap()
            }
            Err(_) => String::new(),
        };
        assert_eq!(answer.starts_with("HTTP/1.1 200"), is_let_in, "{keys} {answer}");
    }
}

#[test]
fn certificates_that_can_not_be_used_are_named_without_being_quoted() {
    let folder = tempfile::tempdir().unwrap();
    let pair = Authority::new().sign();
    let damaged = pair.key.replacen('M', "!", 1);
    for (cert, key, why) in [
        (None, Some(&*pair.key), "server.crt can't be read: No such file"),
        (Some(&*pair.cert), None, "server.key can't be read: No such file"),
        (Some(""), Some(&*pair.key), "server.crt has no certificate in it"),
        (Some(&*pair.cert), Some(&*pair.cert), "server.key has no private key in it"),
        (Some(&*pair.cert), Some(&*damaged), "server.key is not PEM: a section is damaged"),
        (Some(&pair.cert[..200]), Some(&*pair.key), "server.crt is not PEM: a section has no end"),
    ] {
        for (end, text) in [("crt", cert), ("key", key)] {
            let path = folder.path().join(format!("server.{end}"));
            match text {
                Some(text) => replace_file(&RealDisk, &path, text.as_bytes(), disk::Access::Owner).unwrap(),
                None => drop(disk::Disk::remove_file(&RealDisk, &path)),
            }
        }
        write(folder.path(), TLS);
        let error = read(folder.path()).unwrap_err();
        assert!(error.contains("web.yml: ") && error.contains(why), "{why}: {error}");
        assert!(error.lines().count() == 1 && error.len() < 400, "{error}");
    }
}

#[tokio::test]
async fn everything_but_the_probes_asks_for_a_password() {
    let folder = tempfile::tempdir().unwrap();
    let (port, access) = open(folder.path(), &format!("basic_auth_users:\n  prometheus: {HASH}\n")).await;
    let get = async |path: &str, head: &str| ask(tcp(&port).await, path, head).await;
    for path in ["/livez", "/healthz", "/readyz"] {
        assert_ne!(status_of(&get(path, "").await), "401", "{path}");
    }
    let right = basic("prometheus", "secret");
    for path in [
        "/",
        "/metrics",
        "/api/v1/status",
        "/instance/a/b",
        "/nothing",
        "/livez/",
        "//livez",
        "/livez?x/../metrics",
    ] {
        let without = get(path, "").await;
        let is_probe = path.starts_with("/livez?");
        assert_eq!(status_of(&without) == "401", !is_probe, "{path}: {without}");
        assert!(is_probe || without.contains("www-authenticate: Basic realm=\"snapwarden\""), "{without}");
        assert_ne!(status_of(&get(path, &right).await), "401", "{path}");
    }
    for wrong in [
        basic("prometheus", "Secret"),
        basic("prometheus", ""),
        basic("Prometheus", "secret"),
        basic("", "secret"),
        right.replace("Basic", "Bearer"),
        "Authorization: Basic !!!\r\n".to_owned(),
        "Authorization: Basic\r\n".to_owned(),
        format!("Authorization: Basic {}\r\n", STANDARD.encode("prometheus")),
        format!("Authorization: Basic {}\r\n", STANDARD.encode(b"\xff:secret")),
    ] {
        for _ in 0..2 {
            assert_eq!(status_of(&get("/metrics", &wrong).await), "401", "{wrong}");
        }
    }
    assert_eq!(status_of(&get("/metrics", &right.replace("Basic", "bASIC")).await), "200");

    // Once the password is another one, the old one is not remembered.
    let other = "$2b$04$ZbcdefghijklmnopqrstuOJSno.bzBEKw9Uh.TDJQXdb1n5/tM8om";
    write(folder.path(), &format!("basic_auth_users:\n  prometheus: {other}\n"));
    assert_eq!(access.look_again(), Ok(true));
    assert_eq!(status_of(&get("/metrics", &right).await), "401");
    assert_eq!(status_of(&get("/metrics", &basic("prometheus", "other")).await), "200");
}

#[tokio::test]
async fn clients_that_never_shake_hands_make_room_and_a_probe_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    authority.sign().write(folder.path(), "server");
    let (port, _) = open(folder.path(), TLS).await;
    let mut silent = Vec::new();
    // A hundred and twenty-eight more than may be open.
    for _ in 0..256 + 128 {
        silent.push(tcp(&port).await);
    }
    let stream = authority.connect(tcp(&port).await, None, &[&TLS13]).await.unwrap();
    assert_eq!(status_of(&ask(stream, "/livez", "").await), "200");
    let mut first = silent.swap_remove(0);
    assert!(matches!(first.read(&mut [0]).await, Ok(0) | Err(_)), "the oldest had to go");
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_does_not_begin_or_end_is_cut_off_in_time() {
    let folder = tempfile::tempdir().unwrap();
    Authority::new().sign().write(folder.path(), "server");
    let (port, _) = open(folder.path(), TLS).await;
    for beginning in [&b""[..], b"\x16", b"\x16\x03\x01\x02\x00\x01"] {
        let began = tokio::time::Instant::now();
        let mut stream = tcp(&port).await;
        stream.write_all(beginning).await.unwrap();
        assert!(matches!(stream.read(&mut [0]).await, Ok(0) | Err(_)));
        let took = began.elapsed();
        assert!(Duration::from_secs(10) <= took && took < Duration::from_secs(30), "{took:?}");
    }
}
