//! Canaries: a daemon and its commands have a secret of every kind, and what they say and write is searched for each.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::process::Signal;
use snapwarden::disk::{Access, Disk as _, RealDisk};
use snapwarden::sim::world::API_SECRET;
use wiremock::{Mock, MockServer, Request, ResponseTemplate};

use crate::command_line::secrets;
use crate::process::{AT_ONCE, Ground, Running};
use crate::stage::files;
use crate::web_config::HASH;

/// The secrets in files of their own, which alone may have them.
const BUCKET: &str = "canary-of-the-bucket-71c0";
const REPOSITORY: &str = "canary-of-the-repository-8d12";
const REPOSITORY_USER: &str = "canary-of-the-user-4f77";
const BACKEND: &str = "canary-of-the-backend-90aa";
const WEBHOOK: &str = "canary-of-the-webhook-2b3e";
const MAIL: &str = "canary-of-the-mail-66f1";
/// It belongs to [`HASH`].
const PASSWORD: &str = "secret";

/// Beside the policy that exports to `vault`: it can export nothing to the other archives.
const OTHERS: &str = r#"
[policies.q]
schedule = "@hourly"
on_start = "now"
zones = ["ch-gva-2"]
[policies.q.export]
archives = ["bucket", "dedup"]
"#;

/// A store that refuses, and a webhook that fails and repeats the address.
fn refuse(request: &Request) -> ResponseTemplate {
    if request.url.path().starts_with("/backups") {
        let body = "<Error><Code>AccessDenied</Code><Message>not you</Message></Error>";
        return ResponseTemplate::new(403).set_body_string(body);
    }
    ResponseTemplate::new(400).set_body_string(format!("cannot post to {}", request.url))
}

/// What the port answers, asked with a password or without.
fn get(address: SocketAddr, path: &str, head: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn basic() -> String {
    STANDARD.encode(format!("prometheus:{PASSWORD}"))
}

/// Every archive, every notifier and the port with their secrets, in the folder `keys`.
async fn ground(server: &MockServer) -> Ground {
    let ground = Ground::new("").await;
    let keys = ground.path("keys");
    RealDisk.create_dir_all(&keys, Access::Owner).unwrap();
    let address = server.address();
    ground.write("keys/bucket", &format!("api_key = \"EXO2\"\napi_secret = \"{BUCKET}\"\n"));
    ground.write("keys/password", &format!("{REPOSITORY}\n"));
    ground.write(
        "keys/environment",
        &format!("B2_ACCOUNT_KEY={BACKEND}\nRESTIC_REST_PASSWORD={REPOSITORY_USER}\n"),
    );
    ground.write("keys/webhook", &format!("http://{address}/services/{WEBHOOK}\n"));
    ground.write("keys/mail", &format!("{MAIL}\n"));
    ground.write("keys/web.yml", &format!("basic_auth_users:\n  prometheus: {HASH}\n"));
    // Not restic, but as talkative as a program can be that fails.
    let said = "$* with $B2_ACCOUNT_KEY and $RESTIC_REST_PASSWORD at $RESTIC_REPOSITORY";
    ground.write("restic", &format!("#!/bin/sh\nenv >&2\necho \"Fatal: cannot {said}\" >&2\nexit 1\n"));
    std::fs::set_permissions(ground.path("restic"), std::fs::Permissions::from_mode(0o700)).unwrap();
    let rest = format!(
        r#"
[archives.bucket]
type = "s3"
endpoint = "http://{address}"
region = "ch-gva-2"
bucket = "backups"
credentials_file = "{keys}/bucket"
[archives.dedup]
type = "restic"
repository = "rest:https://127.0.0.1:1/"
password_file = "{keys}/password"
environment_file = "{keys}/environment"
program = "{restic}"
cache_directory = "{cache}"
[notify.ops]
type = "webhook"
url_file = "{keys}/webhook"
[notify.mail]
type = "mail"
server = "127.0.0.1"
port = 1
tls = "none"
username = "warden"
password_file = "{keys}/mail"
from = "a@example.com"
to = ["b@example.com"]
{AT_ONCE}{OTHERS}"#,
        keys = keys.display(),
        restic = ground.path("restic").display(),
        cache = ground.path("cache").display(),
    );
    ground.configure("127.0.0.1:0", &ground.path("state"), &rest);
    let text = crate::stage::read(&ground.path("snapwarden.toml"));
    let web = format!("[server]\nweb_config_file = \"{}/web.yml\"\n", keys.display());
    ground.write("snapwarden.toml", &text.replace("[server]\n", &web));
    ground
}

#[tokio::test(flavor = "multi_thread")]
async fn no_canary_stands_in_anything_that_is_said_or_written() {
    let server = MockServer::start().await;
    Mock::given(wiremock::matchers::any()).respond_with(refuse).mount(&server).await;
    let ground = ground(&server).await;
    let all = "trace,hyper=trace,hyper_util=trace,reqwest=trace,h2=trace,rustls=trace";
    let command = |arguments: &[&str]| {
        let mut command = ground.command("--log-format=text");
        command.args(arguments).env("RUST_LOG", all);
        command
    };

    let mut daemon = Running::start(command(&["run"]));
    daemon.says("listens on").await;
    while !["p: success", "q: failed"].iter().all(|word| daemon.said.iter().any(|line| line.contains(word))) {
        daemon.says("").await;
    }
    let mut told = String::new();
    let address = daemon.port();
    for path in ["/", "/metrics", "/api/v1/status", "/livez", "/readyz", "/nothing"] {
        let with_password = get(address, path, &format!("Authorization: Basic {}\r\n", basic()));
        assert!(!with_password.contains(" 401 "), "{path}: {with_password}");
        told.push_str(&with_password);
        told.push_str(&get(address, path, "Authorization: Basic bm9ib2R5Om5vdGhpbmc=\r\n"));
    }
    daemon.signal(Signal::TERM);
    let (code, said) = daemon.ended().await;
    assert_eq!(code, Some(0), "{said}");
    told.push_str(&said);

    for arguments in [
        &["check"][..],
        &["check", "--online"],
        &["check", "--print-role"],
        &["plan"],
        &["plan", "--output", "json"],
        &["once", "q"],
        &["once", "q", "--output", "json"],
        &["status"],
        &["history", "--output", "json"],
        &["coverage"],
        &["archive", "list", "--output", "json"],
        &["archive", "verify", "dedup"],
        &["archive", "adopt", "bucket"],
        &["notify", "test", "ops"],
        &["notify", "test", "mail"],
    ] {
        let mut command = command(arguments);
        let ended = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        assert!(ended.status.code().is_some_and(|code| code != 2), "{arguments:?}: {ended:?}");
        told.push_str(&String::from_utf8(ended.stdout).unwrap());
        told.push_str(&String::from_utf8(ended.stderr).unwrap());
    }

    let is_given = |path: &Path| path.starts_with(ground.path("keys"));
    for (path, bytes) in files(&ground.path("")).into_iter().filter(|(path, _)| !is_given(path)) {
        told.push_str(&path.to_string_lossy());
        told.push_str(&String::from_utf8_lossy(&bytes));
    }
    // Each of them had its part.
    for did in ["1 created, 1 exported", "AccessDenied", "Fatal: cannot", "cannot post to"] {
        assert!(told.contains(did), "`{did}` is missing: {told}");
    }
    let canaries = [BUCKET, REPOSITORY, REPOSITORY_USER, BACKEND, WEBHOOK, MAIL, API_SECRET, &HASH[8..]];
    let of_zone = secrets(&ground.world).into_iter().filter(|secret| secret != "hush");
    for secret in canaries.into_iter().map(str::to_owned).chain([basic()]).chain(of_zone) {
        let found = told.find(&secret).map(|at| {
            let start = told.floor_char_boundary(at.saturating_sub(300));
            &told[start..told.ceil_char_boundary(at + 100)]
        });
        assert_eq!(found, None, "`{secret}`");
    }
}
