//! Notifications: what is said when, over the simulated zone in virtual time, and what arrives at real listeners.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::{HeaderMap, StatusCode};
use serde_json::Value;
use snapwarden::cli::assemble::{self, Seams};
use snapwarden::clock::Clock as _;
use snapwarden::config;
use snapwarden::disk::{Access, RealDisk, replace_file};
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::processes::SimProgram;
use snapwarden::telemetry::notifications::send_sample;
use snapwarden::telemetry::notifier::Notifier;
use snapwarden::transport::{Purpose, Request, Response, Transport, TransportError};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;
use wiremock::matchers::{method, path};
use wiremock::{Mock, MockServer, ResponseTemplate};

use crate::daemon::{Play, creating, play, stage_at, until};
use crate::stage::Stage;

/// Keeps what is sent to notifiers, and answers by what is set; with nothing set, by 200.
#[derive(Debug)]
struct Recorder {
    zone: Arc<dyn Transport>,
    sent: Mutex<Vec<(String, String)>>,
    /// The next answers; none is one that never comes.
    answers: Mutex<VecDeque<Option<u16>>>,
}

impl Transport for Recorder {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        if request.purpose != Purpose::Notification {
            return self.zone.send(request);
        }
        let body = String::from_utf8(request.body.to_vec()).unwrap();
        self.sent.lock().unwrap().push((request.url.path().to_owned(), body));
        let answer = self.answers.lock().unwrap().pop_front().unwrap_or(Some(200));
        Box::pin(async move {
            let Some(status) = answer else { return std::future::pending().await };
            let body = Box::pin(futures_util::stream::empty());
            Ok(Response { status: StatusCode::from_u16(status).unwrap(), headers: HeaderMap::new(), body })
        })
    }
}

impl Recorder {
    fn over(stage: &mut Stage) -> Arc<Self> {
        let recorder = Arc::new(Self {
            zone: stage.world.transport(),
            sent: Mutex::default(),
            answers: Mutex::default(),
        });
        stage.seams.transport = recorder.clone();
        recorder
    }

    fn taken(&self) -> Vec<(String, String)> {
        std::mem::take(&mut *self.sent.lock().unwrap())
    }

    /// The events of what was sent as JSON.
    fn events(&self) -> Vec<String> {
        let event = |(_, body): &(String, String)| {
            serde_json::from_str::<Value>(body).unwrap()["event"].as_str().unwrap().to_owned()
        };
        self.taken().iter().map(event).collect()
    }
}

fn secret_file(stage: &Stage, text: &str) -> PathBuf {
    let path = stage.folder.path().join("secret");
    replace_file(&RealDisk, &path, text.as_bytes(), Access::Owner).unwrap();
    path
}

fn notified(stage: &Stage, keys: &str) -> String {
    let file = secret_file(stage, "https://hooks.example/services/T0PSECRET1\n");
    format!(
        "{}[notify.ops]\nurl_file = \"{}\"\n{keys}\n",
        creating("schedule = \"@hourly\"\n[policies.p.select]\ninstances = [\"web-*\"]"),
        file.display()
    )
}

fn refused() -> Fault {
    Fault::on(Call::CreateSnapshot, Effect::status(400, "no")).times(u64::MAX)
}

const WEBHOOK: &str = "type = \"webhook\"\n";

fn total(play: &Play, result: &str) -> Option<f64> {
    play.value(&format!("snapwarden_notifications_total{{notifier=\"ops\",result=\"{result}\"}}"))
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_said_once_repeated_after_a_day_and_recovered_only_after_it_also_over_a_restart() {
    let mut stage = stage_at("2026-11-03T00:10:00Z");
    let recorder = Recorder::over(&mut stage);
    let text = notified(&stage, WEBHOOK);
    let first = play(&stage, &text).await;
    assert_eq!(total(&first, "sent"), Some(0.0), "the series are there from the start");
    until(&stage, "2026-11-03T02:30:00Z").await;
    assert!(recorder.taken().is_empty(), "nothing failed, so nothing recovered");
    stage.world.fault(refused());
    until(&stage, "2026-11-03T03:50:00Z").await;
    let sent = recorder.taken();
    assert_eq!(sent.len(), 1, "{sent:?}");
    let json: Value = serde_json::from_str(&sent[0].1).unwrap();
    assert_eq!(
        (&json["version"], &json["event"], &json["host"]),
        (&1.into(), &"failure".into(), &"backup-1".into())
    );
    assert_eq!((&json["policy"], &json["zone"]), (&"p".into(), &"ch-gva-2".into()));
    assert!(json["run_id"].is_string() && json["problems"][0]["text"].is_string(), "{json}");
    first.stop().await;
    let second = play(&stage, &text).await;
    until(&stage, "2026-11-04T02:30:00Z").await;
    assert!(recorder.taken().is_empty(), "it lasts, and was said");
    until(&stage, "2026-11-04T05:30:00Z").await;
    assert_eq!(recorder.events(), ["failure"], "it is said again after a day");
    stage.world.clear_faults();
    until(&stage, "2026-11-04T07:30:00Z").await;
    assert_eq!(recorder.events(), ["recovered"]);
    assert_eq!(total(&second, "sent"), Some(2.0));
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_was_not_delivered_is_not_remembered_and_no_run_waits_for_it() {
    let mut stage = stage_at("2026-11-03T00:59:00Z");
    let recorder = Recorder::over(&mut stage);
    stage.world.fault(refused());
    // It never answers.
    recorder.answers.lock().unwrap().extend(vec![None; 60]);
    let play = play(&stage, &notified(&stage, WEBHOOK)).await;
    until(&stage, "2026-11-03T01:10:00Z").await;
    assert!(total(&play, "failed").unwrap() >= 1.0);
    assert_eq!(total(&play, "sent"), Some(0.0));
    let runs = play.value("snapwarden_policy_runs_total{policy=\"p\",result=\"partial\"}");
    assert_eq!(runs, Some(1.0), "the run ended all the same");
    recorder.answers.lock().unwrap().clear();
    recorder.taken();
    until(&stage, "2026-11-03T01:20:00Z").await;
    assert_eq!(recorder.events(), ["failure"], "it is sent as soon as there is an answer");
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_vanishes_and_one_without_a_backup_are_said_with_their_names_where_asked_for() {
    let mut stage = stage_at("2026-11-03T00:10:00Z");
    let recorder = Recorder::over(&mut stage);
    stage.instance("db-1", 0);
    let text = notified(&stage, &format!("{WEBHOOK}on = [\"vanished\", \"uncovered\", \"recovered\"]"));
    let play = play(&stage, &text).await;
    until(&stage, "2026-11-03T01:30:00Z").await;
    let sent = recorder.taken();
    let json: Value = serde_json::from_str(&sent[0].1).unwrap();
    assert_eq!((sent.len(), &json["event"]), (1, &"uncovered".into()));
    assert_eq!((&json["policy"], &json["problems"][0]["instance"]), (&Value::Null, &"db-1".into()));
    stage.instance("db-2", 0);
    until(&stage, "2026-11-03T02:30:00Z").await;
    assert_eq!(recorder.events(), ["uncovered"], "one more is news");
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn each_run_is_a_start_and_a_success_or_a_failure_for_healthchecks_without_names() {
    let mut stage = stage_at("2026-11-03T00:10:00Z");
    let recorder = Recorder::over(&mut stage);
    stage.instance("db-1", 0);
    let play =
        play(&stage, &notified(&stage, "type = \"healthchecks\"\non = [\"failure\", \"uncovered\"]")).await;
    until(&stage, "2026-11-03T01:30:00Z").await;
    let root = "/services/T0PSECRET1";
    let paths = |sent: &[(String, String)]| -> Vec<String> {
        sent.iter().map(|(path, _)| path.strip_prefix(root).unwrap().to_owned()).collect()
    };
    let sent = recorder.taken();
    assert_eq!(paths(&sent), ["/start", "", "/log"], "{sent:?}");
    assert_eq!(sent[1].1, "success: 1 created");
    stage.world.fault(refused());
    until(&stage, "2026-11-03T02:30:00Z").await;
    let failed = recorder.taken();
    assert_eq!(paths(&failed), ["/start", "/fail"]);
    for (_, body) in sent.iter().chain(&failed) {
        assert!(!body.contains("web-1") && !body.contains("db-1") && !body.contains("ch-gva-2"), "{body}");
    }
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_hook_that_fails_after_a_good_run_is_said_by_each_kind_and_recovers() {
    for (keys, first, over) in [
        (WEBHOOK, vec!["failure"], vec!["recovered"]),
        ("type = \"healthchecks\"", vec!["/start", "", "/log"], vec!["/start", ""]),
    ] {
        let mut stage = stage_at("2026-11-03T00:10:00Z");
        let recorder = Recorder::over(&mut stage);
        stage.processes.install("thaw", SimProgram { status: 1, ..SimProgram::default() });
        let text = notified(&stage, keys) + "[policies.p.hooks]\nafter = [\"thaw\"]\n";
        let play = play(&stage, &text).await;
        let said = |sent: Vec<(String, String)>| -> Vec<String> {
            let of = |(path, body): &(String, String)| match serde_json::from_str::<Value>(body) {
                Ok(json) => json["event"].as_str().unwrap().to_owned(),
                Err(_) => path.strip_prefix("/services/T0PSECRET1").unwrap().to_owned(),
            };
            sent.iter().map(of).collect()
        };
        until(&stage, "2026-11-03T01:30:00Z").await;
        let sent = recorder.taken();
        assert_eq!(said(sent.clone()), first, "{sent:?}");
        assert!(keys != WEBHOOK || sent[0].1.contains("hook `after` (thaw): it ended with exit status: 1"));
        stage.processes.install("thaw", SimProgram::default());
        until(&stage, "2026-11-03T02:30:00Z").await;
        assert_eq!(said(recorder.taken()), over);
        play.stop().await;
    }
}

fn ops(stage: &Stage, secret: &str, keys: &str) -> Notifier {
    let file = secret_file(stage, secret);
    let text =
        format!("{}[notify.ops]\n{keys}\n", creating("")).replace("SECRET", &file.display().to_string());
    let config =
        config::parse(&stage.config(&text), "test.toml", None).unwrap_or_else(|wrong| panic!("{wrong}"));
    assemble::notifiers(&config).unwrap_or_else(|refusal| panic!("{}", refusal.text)).remove(0)
}

async fn answered(response: ResponseTemplate) -> Result<String, String> {
    let server = MockServer::start().await;
    Mock::given(method("POST")).and(path("/hook/T0PSECRET1")).respond_with(response).mount(&server).await;
    let stage = Stage::new();
    let url = format!("{}/hook/T0PSECRET1", server.uri());
    let notifier = ops(&stage, &url, "type = \"webhook\"\nurl_file = \"SECRET\"");
    assert!(!format!("{notifier:?}").contains("T0PSECRET1"));
    let sent = send_sample(&notifier, &assemble::wires(&Seams::real()), "backup-1").await;
    let (Ok(text) | Err(text)) = &sent;
    assert!(!text.contains("T0PSECRET1") && text.len() < 400, "{text}");
    sent
}

#[tokio::test]
async fn a_real_listener_is_heard_and_bounded_whatever_it_answers() {
    assert_eq!(answered(ResponseTemplate::new(200).set_body_string("ok\n")).await.unwrap(), "200 OK: ok");
    let long = "x".repeat(5 << 20);
    let text = answered(ResponseTemplate::new(200).set_body_string(long)).await.unwrap();
    assert_eq!(text, "200 OK: the body is longer than 65536 bytes");
    let away = ResponseTemplate::new(302).insert_header("location", "https://evil.example/");
    assert!(answered(away).await.unwrap_err().contains("redirects are not followed"));
    let echo = ResponseTemplate::new(404).set_body_string("no /hook/T0PSECRET1 here\u{1b}[31m");
    let text = answered(echo).await.unwrap_err();
    assert_eq!(text, "404 Not Found: no (secret) here\\u{1b}[31m");
}

#[tokio::test(start_paused = true)]
async fn one_that_hangs_is_given_up_after_three_attempts_of_ten_seconds() {
    let mut stage = Stage::new();
    let recorder = Recorder::over(&mut stage);
    recorder.answers.lock().unwrap().extend(vec![None; 9]);
    let notifier = ops(&stage, "https://hooks.example/x", "type = \"webhook\"\nurl_file = \"SECRET\"");
    let began = stage.clock.elapsed();
    let sent = send_sample(&notifier, &assemble::wires(&stage.seams), "backup-1").await;
    let took = stage.clock.elapsed().saturating_sub(began);
    assert_eq!((sent.unwrap_err().as_str(), recorder.taken().len()), ("no answer within 10 s", 3));
    assert!(took <= Duration::from_secs(36), "{took:?}");
}

#[test]
fn an_address_that_can_not_be_used_is_refused_without_being_shown() {
    let stage = Stage::new();
    for (secret, why) in [
        ("http://hooks.example/T0PSECRET1", "use `https://`"),
        ("ftp://hooks.example/T0PSECRET1", "neither"),
        ("T0PSECRET1", "is not a web address"),
        ("https://hooks.example/T0PSECRET1\nhttps://b.example", "in it: write it alone into its file"),
    ] {
        let file = secret_file(&stage, secret);
        let text = format!("{}[notify.ops]\n{WEBHOOK}url_file = \"{}\"\n", creating(""), file.display());
        let config = config::parse(&stage.config(&text), "test.toml", None).unwrap();
        let refusal = assemble::notifiers(&config).unwrap_err();
        assert!(refusal.text.contains(why) && !refusal.text.contains("T0PSECRET1"), "{}", refusal.text);
    }
    let text = format!("{}[notify.ops]\n{WEBHOOK}", creating(""));
    let config = config::parse(&stage.config(&text), "test.toml", None).unwrap();
    let refusal = assemble::notifiers(&config).unwrap_err();
    assert!(refusal.text.contains("`url_file` in `[notify.ops]`, or give a systemd credential `notify-ops`"));
}

/// A mail server that says so to each command; returns what it was sent.
async fn mail_server(listener: TcpListener, refuse: Option<&'static str>) -> String {
    let (mut stream, _) = listener.accept().await.unwrap();
    let (reader, mut writer) = stream.split();
    let (mut lines, mut heard, mut in_data) = (BufReader::new(reader).lines(), String::new(), false);
    writer.write_all(b"220 mail.example ESMTP\r\n").await.unwrap();
    while let Ok(Some(line)) = lines.next_line().await {
        heard.push_str(&line);
        heard.push('\n');
        let answer = match line.as_str() {
            "." => "250 queued as 4711",
            _ if in_data => continue,
            line if refuse.is_some_and(|command| line.starts_with(command)) => "550 no such user here",
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

#[tokio::test]
async fn mail_is_taken_by_a_real_server_or_its_refusal_is_shown() {
    let wires = assemble::wires(&Seams::real());
    for refuse in [None, Some("RCPT")] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(mail_server(listener, refuse));
        let stage = Stage::new();
        let keys = format!(
            "type = \"mail\"\nserver = \"127.0.0.1\"\nport = {port}\ntls = \"none\"\nusername = \"warden\"\n\
             password_file = \"SECRET\"\nfrom = \"a@example.com\"\nto = [\"b@example.com\"]"
        );
        let notifier = ops(&stage, "T0PSECRET1", &keys);
        assert!(!format!("{notifier:?}").contains("T0PSECRET1"));
        let sent = send_sample(&notifier, &wires, "backup-1").await;
        match refuse {
            None => {
                assert_eq!(sent.unwrap(), "250 queued as 4711");
                let heard = server.await.unwrap();
                for part in [
                    "EHLO backup-1",
                    "MAIL FROM:<a@example.com>",
                    "RCPT TO:<b@example.com>",
                    "Subject: [snapwarden backup-1] ",
                ] {
                    assert!(heard.contains(part), "{part}: {heard}");
                }
            }
            Some(_) => assert!(sent.unwrap_err().contains("no such user here")),
        }
    }
}
