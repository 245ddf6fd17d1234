//! How a request can fail, in words that say what to do about it.
//!
//! The API's own message is read leniently (`message`, `error`, `detail`, `title`, else the raw text), cut
//! short, made printable, and any address in it loses its query, since a presigned address is a secret.

use std::error::Error;
use std::fmt::Write as _;

use http::StatusCode;
use uuid::Uuid;

use crate::snapshot::{OperationId, ZoneName};
use crate::text::excerpt;

/// Characters of a message from outside that are shown.
const MAX_MESSAGE: usize = 300;

/// What kind of failure it was: a closed list, for decisions, scripts and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request needs a signature, and there are no credentials.
    NoCredentials,
    /// 401, or a 403 that speaks of the signature or the key.
    Credentials,
    /// 403 otherwise: a role's or the organization's policy does not allow the operation.
    Permission,
    /// 404 where something had to be there.
    NotFound,
    /// 409, 412, 423, or an operation that failed so: another operation is in progress on the same resource.
    Conflict,
    /// A quota is used up; the service says so with 409.
    Quota,
    /// 429, in every attempt.
    RateLimited,
    /// 5xx, in every attempt (501 is not repeated).
    Server,
    /// Any other status.
    Refused,
    /// No complete response.
    Transport,
    /// No complete response in time.
    TimedOut,
    /// A response that is not the JSON of the API.
    Malformed,
    /// The endpoint is not an address.
    Endpoint,
    /// The operation ended in `failure`.
    OperationFailed,
    /// The operation ended in `timeout`, or was still pending after `operation_timeout`.
    OperationTimedOut,
    /// The operation is in an unknown state.
    OperationUnknown,
}

impl ErrorKind {
    /// The kind as metrics and JSON name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoCredentials => "no_credentials",
            Self::Credentials => "credentials",
            Self::Permission => "permission",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::Quota => "quota",
            Self::RateLimited => "rate_limited",
            Self::Server => "server",
            Self::Refused => "refused",
            Self::Transport => "transport",
            Self::TimedOut => "timeout",
            Self::Malformed => "malformed",
            Self::Endpoint => "endpoint",
            Self::OperationFailed => "operation_failed",
            Self::OperationTimedOut => "operation_timeout",
            Self::OperationUnknown => "operation_unknown",
        }
    }
}

/// A request or an operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("`{operation}` in zone {zone}{}: {}", self.of_operation(), self.text())]
pub struct ApiError {
    zone: ZoneName,
    operation: &'static str,
    kind: ErrorKind,
    /// The status and the API's own message, or a detail found here; safe to show; may be empty.
    detail: Box<str>,
    attempts: u32,
    may_have_happened: bool,
    operation_id: Option<OperationId>,
    /// What the operation was about to make, if it named that; boxed, since errors are returned everywhere.
    reference: Option<Box<Uuid>>,
    #[source]
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl ApiError {
    pub(super) fn new(zone: &ZoneName, operation: &'static str, kind: ErrorKind) -> Self {
        Self {
            zone: zone.clone(),
            operation,
            kind,
            detail: Box::default(),
            attempts: 1,
            may_have_happened: false,
            operation_id: None,
            reference: None,
            source: None,
        }
    }

    /// A response with a status other than success.
    pub(super) fn from_status(
        zone: &ZoneName,
        operation: &'static str,
        status: StatusCode,
        body: &[u8],
    ) -> Self {
        let message = message_of(body);
        let error = Self::new(zone, operation, kind_of(status, &message));
        let status = status.as_str();
        let detail = if message.is_empty() { status.to_owned() } else { format!("{status}: `{message}`") };
        error.with_detail(detail)
    }

    pub(super) fn with_detail(self, detail: String) -> Self {
        Self { detail: detail.into(), ..self }
    }

    pub(super) fn caused_by(self, source: impl Error + Send + Sync + 'static) -> Self {
        Self { source: Some(Box::new(source)), ..self }
    }

    pub(super) fn after(self, attempts: u32) -> Self {
        Self { attempts, ..self }
    }

    pub(super) fn perhaps_carried_out(mut self, perhaps: bool) -> Self {
        self.may_have_happened |= perhaps;
        self
    }

    pub(super) fn in_operation(self, id: Option<OperationId>) -> Self {
        Self { operation_id: id.or(self.operation_id), ..self }
    }

    pub(super) fn with_reference(self, reference: Option<Uuid>) -> Self {
        Self { reference: reference.map(Box::new).or(self.reference), ..self }
    }

    /// The zone that was asked.
    pub fn zone(&self) -> &ZoneName {
        &self.zone
    }

    /// The operation, by the API's own name (`operationId`), such as `list-snapshots`, which is also its name in a role's
    /// policy.
    pub fn operation(&self) -> &'static str {
        self.operation
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether another operation is in progress on the same resource, so that a later run may succeed.
    pub fn is_busy(&self) -> bool {
        self.kind == ErrorKind::Conflict
    }

    /// Whether the request may still have been carried out: a response was lost, or an operation was started whose end is
    /// not known. Look for the result before asking again.
    pub fn may_have_happened(&self) -> bool {
        self.may_have_happened
    }

    /// The operation that was started, if it is known.
    pub fn operation_id(&self) -> Option<OperationId> {
        self.operation_id
    }

    /// What the failed operation was about to make, as far as the API named it.
    pub fn reference(&self) -> Option<Uuid> {
        self.reference.as_deref().copied()
    }

    fn of_operation(&self) -> String {
        self.operation_id.map_or_else(String::new, |id| format!(", operation {id}"))
    }

    fn text(&self) -> String {
        let operation = self.operation;
        let (problem, hint) = match self.kind {
            ErrorKind::NoCredentials => (
                "it needs API credentials and there are none",
                "set `EXOSCALE_API_KEY` and `EXOSCALE_API_SECRET`",
            ),
            ErrorKind::Credentials => (
                "the API refused the key or its signature",
                "check the API key, its secret, and this machine's clock",
            ),
            ErrorKind::Permission => ("the API key lacks the permission", ""),
            ErrorKind::NotFound => ("it does not exist", "it may have been deleted, or be in another zone"),
            ErrorKind::Conflict => ("another operation is in progress on it", "the next run tries again"),
            ErrorKind::Quota => {
                ("a quota of the organization is used up", "delete something, or ask for a higher quota")
            }
            ErrorKind::RateLimited => {
                ("too many requests for the API", "lower `requests_per_second` if this happens again")
            }
            ErrorKind::Server => ("the API failed", "the next run tries again"),
            ErrorKind::Refused => ("the API refused it", ""),
            ErrorKind::Transport => ("incomplete response", ""),
            ErrorKind::TimedOut => ("no complete response in time", ""),
            ErrorKind::Malformed => (
                "unexpected response",
                "check that the endpoint is Exoscale's API and no proxy answers for it",
            ),
            ErrorKind::Endpoint => ("the endpoint is not an address", "correct `endpoint` in `[exoscale]`"),
            ErrorKind::OperationFailed => ("the operation failed", ""),
            ErrorKind::OperationTimedOut => ("the operation did not end in time", ""),
            ErrorKind::OperationUnknown => ("the operation is in an unknown state", ""),
        };
        let mut text = problem.to_owned();
        if self.attempts > 1 {
            let _ = write!(text, " after {} attempts", self.attempts);
        }
        if !self.detail.is_empty() {
            let _ = write!(text, " ({})", self.detail);
        }
        if self.kind == ErrorKind::Permission {
            let _ = write!(text, "; allow `{operation}` in the policy of its role and in the organization's");
        } else if !hint.is_empty() {
            let _ = write!(text, "; {hint}");
        }
        if self.may_have_happened {
            text.push_str("; it may still have been carried out");
        }
        text
    }
}

/// What a status means. Bad signatures and missing permissions are both 403 with this service, and a used-up quota is 409
/// like a conflict: only the message distinguishes them.
fn kind_of(status: StatusCode, message: &str) -> ErrorKind {
    let message = message.to_lowercase();
    let speaks_of = |words: &[&str]| words.iter().any(|word| message.contains(word));
    match status.as_u16() {
        401 => ErrorKind::Credentials,
        403 if speaks_of(&["signature"]) => ErrorKind::Credentials,
        403 if speaks_of(&["policy", "role"]) => ErrorKind::Permission,
        403 if speaks_of(&["key", "credential", "expired"]) => ErrorKind::Credentials,
        403 => ErrorKind::Permission,
        404 => ErrorKind::NotFound,
        409 if speaks_of(&["quota", "maximum number"]) => ErrorKind::Quota,
        409 | 412 | 423 => ErrorKind::Conflict,
        400 | 422 if is_busy_message(&message) => ErrorKind::Conflict,
        429 => ErrorKind::RateLimited,
        500.. => ErrorKind::Server,
        _ => ErrorKind::Refused,
    }
}

/// Whether a message says that another operation is in progress on the same resource.
pub(super) fn is_busy_message(message: &str) -> bool {
    let message = message.to_lowercase();
    message.contains("in use") || message.split(|c: char| !c.is_alphanumeric()).any(|word| word == "busy")
}

/// The API's own message, whatever its form, safe to show.
fn message_of(body: &[u8]) -> String {
    let json = serde_json::from_slice::<serde_json::Value>(body).ok();
    let message = json.as_ref().and_then(|json| {
        ["message", "error", "detail", "title"]
            .iter()
            .find_map(|name| json.get(name)?.as_str().filter(|text| !text.trim().is_empty()))
    });
    match message {
        Some(text) => safe_message(text),
        None if is_markup(body) => "(a page of HTML or XML)".to_owned(),
        None => safe_message(&String::from_utf8_lossy(body)),
    }
}

/// Whether a body is HTML or XML instead of JSON.
pub(super) fn is_markup(body: &[u8]) -> bool {
    body.trim_ascii_start().first() == Some(&b'<')
}

/// A message from outside, safe to show: short, printable, and without the query of any address in it.
pub(super) fn safe_message(text: &str) -> String {
    let text = text.trim();
    // What is cut off is not looked at; the secret part of an address can't come back by cutting.
    let end = text.char_indices().nth(4 * MAX_MESSAGE).map_or(text.len(), |(end, _)| end);
    let words = text[..end].split(' ').map(|word| match word.split_once('?') {
        Some((address, query)) if query.contains('=') => format!("{address}?…"),
        _ => word.to_owned(),
    });
    let mut safe = excerpt(&words.collect::<Vec<_>>().join(" "), MAX_MESSAGE);
    if end < text.len() && !safe.ends_with('…') {
        safe.push('…');
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(status: u16, body: &str) -> ApiError {
        let zone = "ch-gva-2".parse().unwrap();
        ApiError::from_status(
            &zone,
            "delete-snapshot",
            StatusCode::from_u16(status).unwrap(),
            body.as_bytes(),
        )
    }

    #[test]
    fn a_status_and_its_message_decide_the_kind() {
        let cases = [
            (401, r#"{"message":"nope"}"#, ErrorKind::Credentials),
            (403, r#"{"message":"Invalid request signature"}"#, ErrorKind::Credentials),
            (403, r#"{"message":"Unknown API key"}"#, ErrorKind::Credentials),
            (403, r#"{"message":"Forbidden by role policy for compute"}"#, ErrorKind::Permission),
            (403, r#"{"message":"api-key denied by the organization policy"}"#, ErrorKind::Permission),
            (403, "", ErrorKind::Permission),
            (404, r#"{"message":"not found"}"#, ErrorKind::NotFound),
            (409, r#"{"message":"Snapshot quota exceeded"}"#, ErrorKind::Quota),
            (409, r#"{"message":"The maximum number of resources has been exceeded"}"#, ErrorKind::Quota),
            (409, r#"{"message":"snapshot is being exported"}"#, ErrorKind::Conflict),
            (412, "", ErrorKind::Conflict),
            (400, r#"{"error":"the volume is in use"}"#, ErrorKind::Conflict),
            (400, r#"{"message":"missing keys 'level'"}"#, ErrorKind::Refused),
            (429, "", ErrorKind::RateLimited),
            (500, "", ErrorKind::Server),
            (302, "", ErrorKind::Refused),
        ];
        for (status, body, kind) in cases {
            assert_eq!(error(status, body).kind(), kind, "{status} {body}");
        }
    }

    #[test]
    fn messages_are_read_in_every_form() {
        let cases = [
            (r#"{"message":"m","error":"e"}"#, "m"),
            (r#"{"message":"","error":"e","detail":"d"}"#, "e"),
            (r#"{"type":"about:blank","title":"t","detail":"d","errors":["x"]}"#, "d"),
            (r#"{"title":"t","status":503}"#, "t"),
            ("Service Unavailable\n", "Service Unavailable"),
            ("<html><body>502</body></html>", "(a page of HTML or XML)"),
            (r#"{"code":7}"#, r#"{"code":7}"#),
            ("\u{1b}[31mred", "\\u{1b}[31mred"),
        ];
        for (body, message) in cases {
            assert_eq!(message_of(body.as_bytes()), message, "{body}");
        }
        assert_eq!(message_of(&[0xff, b'x']), "\u{fffd}x");
        assert_eq!(message_of("y".repeat(10_000).as_bytes()).chars().count(), MAX_MESSAGE + 1);
    }

    #[test]
    fn an_address_in_a_message_loses_its_query() {
        let shown = safe_message(
            "can't fetch https://bucket/x.qcow2?X-Amz-Signature=hush&a=b, really? \"/x?Sig=hush\"",
        );
        assert_eq!(shown, "can't fetch https://bucket/x.qcow2?… really? \"/x?…");
        let long = format!("{} https://bucket/x?X-Amz-Signature=hush", "é".repeat(MAX_MESSAGE - 20));
        assert!(!safe_message(&long).contains("hush"));
    }

    #[test]
    fn a_missing_permission_is_named_and_a_bad_signature_says_what_to_check() {
        assert_eq!(
            error(403, r#"{"message":"Forbidden by role policy for compute"}"#).to_string(),
            "`delete-snapshot` in zone ch-gva-2: the API key lacks the permission (403: `Forbidden by role \
             policy for compute`); allow `delete-snapshot` in the policy of its role and in the organization's"
        );
        assert_eq!(
            error(403, r#"{"message":"Invalid request signature"}"#).to_string(),
            "`delete-snapshot` in zone ch-gva-2: the API refused the key or its signature (403: `Invalid \
             request signature`); check the API key, its secret, and this machine's clock"
        );
    }
}
