//! The daemon as a process: what a reload and a changed file bring without a restart, and `notify test`.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;

use rustix::process::Signal;
use snapwarden::clock::{Clock as _, SystemClock, timeout};
use snapwarden::disk::{Disk as _, RealDisk, create_folders};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use wiremock::matchers::{body_partial_json, method, path};
use wiremock::{Mock, MockServer, ResponseTemplate};

use crate::certificates::Authority;
use crate::http_port;
use crate::process::{Ground, PATIENCE, Running, YEARLY};
use crate::stage::{Said, read};
use crate::web_config::HASH;

/// A port of this machine that nobody has.
fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn is_open(address: SocketAddr) -> bool {
    TcpStream::connect(address).is_ok()
}

fn status(ground: &Ground, arguments: &[&str]) -> Said {
    let mut status = Command::new(env!("CARGO_BIN_EXE_snapwarden"));
    status.env_clear().arg("--config").arg(ground.path("snapwarden.toml")).arg("status").args(arguments);
    Said::of(status.output().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_moves_the_port_and_one_that_can_not_be_opened_leaves_the_old_one() {
    let ground = Ground::new(YEARLY).await;
    let mut daemon = Running::ready(&ground).await;
    let first = daemon.port();
    let listen = async |daemon: &mut Running, address: SocketAddr, word: &str| {
        ground.configure(&address.to_string(), &ground.path("state"), YEARLY);
        daemon.signal(Signal::HUP);
        daemon.says(word).await
    };
    let second = free_port();
    listen(&mut daemon, second, &format!("listens on {second} now")).await;
    daemon.says("reloaded: 1 policy now").await;
    assert!(http_port::get(second, "/readyz").await.starts_with("HTTP/1.1 200"));
    let clock = SystemClock::start();
    while is_open(first) {
        assert!(clock.elapsed() < PATIENCE, "the old port stays open");
    }
    assert!(read(&ground.path("state/daemon.json")).contains(&second.to_string()));

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let said = listen(&mut daemon, taken.local_addr().unwrap(), "not reloaded").await;
    assert!(said.contains("which another process has") && said.contains("stays in force"), "{said}");
    let all = SocketAddr::from(([0, 0, 0, 0], second.port()));
    let said = listen(&mut daemon, all, "not reloaded").await;
    assert!(
        said.contains(&format!("is this daemon's own at {second}: name another port, or restart")),
        "{said}"
    );
    assert!(
        http_port::get(second, "/metrics").await.contains("\nsnapwarden_config_last_reload_successful 0\n")
    );
    assert!(read(&ground.path("state/daemon.json")).contains(&second.to_string()));
    listen(&mut daemon, second, "reloaded: 1 policy now").await;
    assert!(
        http_port::get(second, "/metrics").await.contains("\nsnapwarden_config_last_reload_successful 1\n")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_and_check_read_included_files_anew() {
    let ground = Ground::new(YEARLY).await;
    let included = |name: &str| YEARLY.replace("policies.p", &format!("policies.{name}"));
    create_folders(&RealDisk, &ground.path("conf.d"), snapwarden::disk::Access::Owner).unwrap();
    ground.write("conf.d/a.toml", &included("a"));
    let main = read(&ground.path("snapwarden.toml"));
    ground.write("snapwarden.toml", &format!("include = [\"conf.d/*.toml\"]\n{main}"));
    let mut daemon = Running::ready(&ground).await;
    assert_eq!(daemon.in_force(), (true, vec!["a".to_owned(), "p".to_owned()]));
    ground.write("conf.d/b.toml", &included("b"));
    daemon.signal(Signal::HUP);
    daemon.says("reloaded: 3 policies now").await;
    let said = Said::of(ground.command("check").output().unwrap());
    let (a, b) = (ground.path("conf.d/a.toml"), ground.path("conf.d/b.toml"));
    assert_eq!(said.status, 0, "{said:?}");
    said.has(&[
        "snapwarden.toml: valid, 3 policies\n",
        &format!("  includes {}\n  includes {}\n", a.display(), b.display()),
    ]);
    let said = Said::of(ground.command("check").args(["--output", "json"]).output().unwrap());
    assert_eq!(said.json()["files"].as_array().unwrap().len(), 3);

    ground.write("conf.d/b.toml", &included("b").replace("keep_last = 2", "keep_last = 0"));
    daemon.signal(Signal::HUP);
    daemon.says("not reloaded").await;
    daemon.says("keep_last = 0").await;
    assert_eq!(daemon.in_force().1, ["a", "b", "p"]);
    let said = status(&ground, &[]);
    let place = format!("the configuration file is not valid: {}:5:13: policies.b", b.display());
    said.complained(&[&place, "the configuration could not be reloaded"]);
    assert_eq!(said.status, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_with_tls_and_passwords_is_asked_by_the_socket_and_its_file_is_read_anew() {
    let ground = Ground::new(YEARLY).await;
    let authority = Authority::new();
    authority.sign().write(&ground.path(""), "server");
    let web = |user: &str| {
        format!(
            "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\nbasic_auth_users:\n  {user}: {HASH}\n"
        )
    };
    ground.write("web.yml", &web("a"));
    let main = read(&ground.path("snapwarden.toml"));
    let file = format!("[server]\nweb_config_file = \"{}\"\n", ground.path("web.yml").display());
    ground.write("snapwarden.toml", &main.replace("[server]\n", &file));
    assert_eq!(Said::of(ground.command("check").output().unwrap()).status, 0);
    let mut daemon = Running::ready(&ground).await;
    assert!(http_port::get(daemon.port(), "/livez").await.contains("ask for https://"));
    let said = status(&ground, &[]);
    assert_eq!((said.status, said.err.as_str()), (0, ""), "{said:?}");
    said.has(&["p  ", "snapwarden "]);
    assert_eq!(status(&ground, &["--live"]).status, 0);

    ground.write("web.yml", &web("a").replace("$2y$04", "$2y$99"));
    let said =
        daemon.says("the web configuration file is not read anew, the one from before stays in force").await;
    assert!(said.contains("web.yml:5:6: basic_auth_users.a"), "{said}");
    let said = status(&ground, &[]);
    assert_eq!(said.status, 1);
    said.complained(&["the web configuration file can't be used, the previous one is in use", "web.yml:5:6"]);
    Said::of(ground.command("check").output().unwrap())
        .refused(78, &["web.yml:5:6", "the cost of this hash is 99"]);
    ground.write("web.yml", &web("b"));
    daemon.says("the web configuration file and its certificates are read anew").await;
    let clock = SystemClock::start();
    while status(&ground, &[]).status != 0 {
        assert!(clock.elapsed() < PATIENCE, "the error stays");
    }

    // As where the socket can't be opened.
    RealDisk.remove_file(&ground.path("state/daemon.sock")).unwrap();
    let said = status(&ground, &[]);
    assert_eq!(said.status, 1);
    said.complained(&["wants TLS or a password: ask as root or as the daemon's user"]);

    RealDisk.remove_file(&ground.path("server.key")).unwrap();
    daemon.signal(Signal::HUP);
    let said = daemon.says("not reloaded, the configuration from before stays in force").await;
    assert!(said.contains("server.key can't be read"), "{said}");
    let (code, said) = Running::start(ground.run()).ended().await;
    assert!(code == Some(78) && said.contains("server.key can't be read"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn notify_test_sends_a_sample_and_says_what_was_answered() {
    for (response, status, said) in [
        (ResponseTemplate::new(200).set_body_string("thanks"), 0, "ops: sent: 200 OK: thanks"),
        (ResponseTemplate::new(404), 1, "ops: FAILED: 404 Not Found"),
    ] {
        let server = MockServer::start().await;
        Mock::given(method("POST"))
            .and(path("/hook/T0PSECRET1"))
            .and(body_partial_json(serde_json::json!({ "version": 1, "event": "test" })))
            .respond_with(response)
            .expect(1)
            .mount(&server)
            .await;
        let ground = Ground::new("").await;
        ground.write("ops", &format!("{}/hook/T0PSECRET1\n", server.uri()));
        let notify = format!(
            "{YEARLY}[notify.ops]\ntype = \"webhook\"\nurl_file = \"{}\"\n",
            ground.path("ops").display()
        );
        ground.configure("127.0.0.1:0", &ground.path("state"), &notify);
        let test = |name: &'static str| {
            let mut command = ground.command("notify");
            tokio::task::spawn_blocking(move || Said::of(command.args(["test", name]).output().unwrap()))
        };
        let ended = test("ops").await.unwrap();
        assert_eq!(ended.status, status, "{ended:?}");
        ended.has(&[said]);
        assert!(!format!("{ended:?}").contains("T0PSECRET1"), "{ended:?}");
        test("opps").await.unwrap().refused(2, &["there is no notifier `opps`", "did you mean `ops`?"]);
    }
}

/// A mail server with TLS from the beginning, or after `STARTTLS`; returns what it was told under TLS.
async fn mail_server(
    listener: tokio::net::TcpListener,
    acceptor: tokio_rustls::TlsAcceptor,
    implicit: bool,
) -> String {
    let (mut stream, _) = listener.accept().await.unwrap();
    if !implicit {
        stream.write_all(b"220 mail.example ESMTP\r\n").await.unwrap();
        let mut lines = BufReader::new(&mut stream).lines();
        while let Some(line) = lines.next_line().await.unwrap() {
            let answer = match line.as_str() {
                line if line.starts_with("EHLO") => "250-mail.example\r\n250 STARTTLS\r\n",
                "STARTTLS" => "220 go on\r\n",
                // Nothing may be said in the clear.
                line => panic!("{line}"),
            };
            lines.get_mut().get_mut().write_all(answer.as_bytes()).await.unwrap();
            if line == "STARTTLS" {
                break;
            }
        }
    }
    let Ok(stream) = acceptor.accept(stream).await else { return String::new() };
    let (reader, mut writer) = tokio::io::split(stream);
    let (mut lines, mut heard, mut in_data) = (BufReader::new(reader).lines(), String::new(), false);
    if implicit {
        writer.write_all(b"220 mail.example ESMTP\r\n").await.unwrap();
    }
    while let Ok(Some(line)) = lines.next_line().await {
        heard.push_str(&line);
        heard.push('\n');
        let answer = match line.as_str() {
            "." => "250 queued as 4711",
            _ if in_data => continue,
            line if line.starts_with("EHLO") => "250-mail.example\r\n250 AUTH PLAIN",
            line if line.starts_with("AUTH") => "235 welcome",
            "DATA" => "354 go on",
            "QUIT" => "221 bye",
            _ => "250 ok",
        };
        in_data = answer.starts_with("354");
        writer.write_all(format!("{answer}\r\n").as_bytes()).await.unwrap();
        if line == "QUIT" {
            break;
        }
    }
    heard
}

#[tokio::test(flavor = "multi_thread")]
async fn mail_goes_by_tls_to_a_server_whose_certificate_is_trusted_and_to_no_other() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    for (tls, trusted, is_sent) in [
        ("starttls", &authority, true),
        ("implicit", &authority, true),
        ("starttls", &stranger, false),
        ("implicit", &stranger, false),
    ] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(mail_server(listener, authority.sign().acceptor(), tls == "implicit"));
        let ground = Ground::new("").await;
        ground.write("password", "T0PSECRET1\n");
        let notify = format!(
            "{YEARLY}[notify.ops]\ntype = \"mail\"\nserver = \"localhost\"\nport = {port}\ntls = \"{tls}\"\nusername = \"warden\"\n\
             password_file = \"{}\"\nfrom = \"a@example.com\"\nto = [\"b@example.com\"]\n",
            ground.path("password").display()
        );
        ground.configure("127.0.0.1:0", &ground.path("state"), &notify);
        let mut command = ground.command("notify");
        command.args(["test", "ops"]).env("SSL_CERT_FILE", trusted.write(&ground.path("")));
        let ended = tokio::task::spawn_blocking(move || Said::of(command.output().unwrap())).await.unwrap();
        assert_eq!(ended.status, i32::from(!is_sent), "{tls}: {ended:?}");
        ended.has(&[if is_sent { "ops: sent: 250 queued as 4711" } else { "ops: FAILED: " }]);
        let heard = timeout(&SystemClock::start(), PATIENCE, server).await.unwrap().unwrap();
        let parts =
            ["AUTH PLAIN", "MAIL FROM:<a@example.com>", "RCPT TO:<b@example.com>", "Subject: [snapwarden "];
        assert!(!is_sent || parts.iter().all(|part| heard.contains(part)), "{heard}");
        assert!(is_sent || heard.is_empty(), "{heard}");
    }
}
