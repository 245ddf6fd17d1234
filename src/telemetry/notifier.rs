//! How a notifier is reached: one message, a few attempts, each bounded. The address and the password are secrets.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};
use url::Url;

use crate::clock::{Clock, timeout};
use crate::policy::notifier::{NotifierKind, NotifierSettings, WebhookFormat};
use crate::randomness::{Randomness, fresh_id};
use crate::retry::{Attempts, REQUESTS, RetryPolicy, retry_after};
use crate::telemetry::mail;
use crate::telemetry::message::Message;
use crate::text::{chain, excerpt};
use crate::transport::{BodyError, Purpose, Request, Response, Transport, is_loopback, read_body};

/// An attempt takes no longer.
const ATTEMPT_MAX: Duration = Duration::from_secs(10);

/// What was not delivered by then is noticed again soon.
const TRIES: RetryPolicy = RetryPolicy { max_attempts: 3, ..REQUESTS };

/// Of an answer no more is read.
const ANSWER_MAX: usize = 64 * 1024;

/// The longest address, in bytes.
const ADDRESS_MAX: usize = 2048;

/// What delivering needs: HTTP, time, and jitter.
#[derive(Debug, Clone)]
pub struct Wires {
    /// HTTP.
    pub transport: Arc<dyn Transport>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Jitter.
    pub randomness: Arc<dyn Randomness>,
}

/// A notifier with its secret.
#[derive(Debug, Clone)]
pub struct Notifier {
    pub(super) settings: NotifierSettings,
    /// An address, or the password of a mail server.
    secret: Option<SecretString>,
}

/// Which of the pings of healthchecks.io a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ping {
    Start,
    Success,
    Fail,
    Log,
}

/// A secret that can't be used. Nothing of it is shown.
#[derive(Debug, thiserror::Error)]
#[error("the address of notifier `{notifier}` {fact}")]
pub struct InvalidAddress {
    notifier: String,
    fact: &'static str,
}

/// Why an attempt failed.
struct Undelivered {
    why: String,
    /// Whether another attempt can't help.
    is_final: bool,
    /// The pause that the other side asked for.
    retry_after: Option<Duration>,
}

impl Undelivered {
    fn again(why: String) -> Self {
        Self { why, is_final: false, retry_after: None }
    }
}

impl Notifier {
    /// A notifier with its address, or its password if it has one.
    ///
    /// # Errors
    /// [`InvalidAddress`].
    pub fn new(settings: NotifierSettings, secret: Option<SecretString>) -> Result<Self, InvalidAddress> {
        if let (NotifierKind::Webhook { .. } | NotifierKind::Healthchecks { .. }, Some(address)) =
            (&settings.kind, &secret)
        {
            let invalid = |fact| InvalidAddress { notifier: settings.name.to_string(), fact };
            check(address.expose_secret()).map_err(invalid)?;
        }
        Ok(Self { settings, secret })
    }

    pub(super) fn is_healthchecks(&self) -> bool {
        matches!(self.settings.kind, NotifierKind::Healthchecks { .. })
    }

    /// Sends a message, in a few attempts. Returns what the other side answered, or why it failed.
    pub(super) async fn deliver(
        &self,
        wires: &Wires,
        message: &Message,
        ping: Ping,
    ) -> Result<String, String> {
        let mut attempts = Attempts::new(TRIES);
        loop {
            let undelivered = match self.attempt(wires, message, ping).await {
                Ok(answer) => return Ok(answer),
                Err(undelivered) => undelivered,
            };
            attempts.count_failure();
            if undelivered.is_final || attempts.are_exhausted() {
                return Err(undelivered.why);
            }
            wires.clock.sleep(attempts.pause(undelivered.retry_after, &*wires.randomness)).await;
        }
    }

    async fn attempt(&self, wires: &Wires, message: &Message, ping: Ping) -> Result<String, Undelivered> {
        let url =
            || Url::parse(self.secret()).map_err(|_| Undelivered::again("it has no address".to_owned()));
        match &self.settings.kind {
            NotifierKind::Webhook { format } => {
                let body = match format {
                    WebhookFormat::Json => message.json(),
                    WebhookFormat::Slack => message.slack(),
                };
                self.post(wires, url()?, "application/json", body).await
            }
            NotifierKind::Healthchecks { details } => {
                let mut url = url()?;
                let suffix = match ping {
                    Ping::Start => Some("start"),
                    Ping::Success => None,
                    Ping::Fail => Some("fail"),
                    Ping::Log => Some("log"),
                };
                if let (Some(suffix), Ok(mut path)) = (suffix, url.path_segments_mut()) {
                    path.pop_if_empty().push(suffix);
                }
                self.post(wires, url, "text/plain; charset=utf-8", message.ping(*details)).await
            }
            NotifierKind::Mail(settings) => {
                let id = fresh_id(&*wires.randomness, wires.clock.now());
                let sent = mail::send(settings, self.secret(), message, id);
                timeout(&*wires.clock, ATTEMPT_MAX, sent)
                    .await
                    .map_err(|late| Undelivered::again(late.to_string()))?
                    .map_err(|(why, is_final)| Undelivered {
                        is_final,
                        ..Undelivered::again(self.hiding_secret(&why))
                    })
            }
        }
    }

    async fn post(
        &self,
        wires: &Wires,
        url: Url,
        content_type: &'static str,
        body: String,
    ) -> Result<String, Undelivered> {
        let clock = &*wires.clock;
        let until = clock.elapsed() + ATTEMPT_MAX;
        let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(content_type))]);
        let body = Bytes::from(body);
        let request = Request { method: Method::POST, url, headers, body, purpose: Purpose::Notification };
        let sent = timeout(clock, ATTEMPT_MAX, wires.transport.send(request)).await;
        let response = sent
            .map_err(|late| Undelivered::again(late.to_string()))?
            .map_err(|error| Undelivered::again(self.hiding_secret(&chain(&error))))?;
        let Response { status, headers, body } = response;
        // The head alone decides.
        let left = until.saturating_sub(clock.elapsed());
        let body = match timeout(clock, left, read_body(body, ANSWER_MAX)).await {
            Ok(Ok(bytes)) => self.hiding_secret(&String::from_utf8_lossy(&bytes)),
            Ok(Err(error @ BodyError::TooLong { .. })) => error.to_string(),
            Ok(Err(error)) => self.hiding_secret(&chain(&error)),
            Err(late) => format!("the body did not end: {late}"),
        };
        let body = excerpt(body.trim(), 200);
        let answer = if body.is_empty() { status.to_string() } else { format!("{status}: {body}") };
        if status.is_success() {
            return Ok(answer);
        }
        let why = if status.is_redirection() {
            format!("{status}: redirects are not followed, so give the address where it ends")
        } else {
            answer
        };
        let may_pass = status.is_server_error()
            || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT);
        let now: Timestamp = clock.now();
        Err(Undelivered { why, is_final: !may_pass, retry_after: retry_after(status, &headers, now) })
    }

    fn secret(&self) -> &str {
        self.secret.as_ref().map_or("", |secret| secret.expose_secret())
    }

    /// A text from the other side, which may repeat what it was sent.
    fn hiding_secret(&self, text: &str) -> String {
        let secret = self.secret();
        let mut parts = vec![secret.to_owned()];
        if let Ok(url) = Url::parse(secret) {
            parts.extend([url.path(), url.query().unwrap_or_default()].map(str::to_owned));
            parts.extend(url.path_segments().into_iter().flatten().map(str::to_owned));
        }
        // Shorter parts are no secrets, and are in any text.
        parts.retain(|part| part.len() >= 8);
        parts.iter().fold(text.to_owned(), |text, part| text.replace(part, "(secret)"))
    }
}

fn check(address: &str) -> Result<(), &'static str> {
    if address.len() > ADDRESS_MAX {
        return Err("is longer than 2048 bytes");
    }
    if address
        .chars()
        .any(|character| character.is_whitespace() || character.is_control() || character == '\\')
    {
        return Err(
            "has a blank, a line break, a `\\` or a control character in it: write it alone into its file",
        );
    }
    let url = Url::parse(address).map_err(|_| "is not a web address")?;
    match url.scheme() {
        "https" => Ok(()),
        "http" if is_loopback(&url) => Ok(()),
        "http" => Err("is `http://` to another machine, which can be read on the way: use `https://`"),
        _ => Err("is neither `https:` nor `http:`"),
    }
}
