//! How a request to a bucket can fail, in words that say what to do about it.

use std::time::Duration;

use http::StatusCode;

use crate::archive::transfer::sink::SinkError;
use crate::clock::TimedOut;
use crate::text::printable;
use crate::transport::{BodyError, TransportError};

/// A request to a bucket that failed: the action, the object, and the cause.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {on}{}", self.lacks())]
pub struct S3Error {
    doing: &'static str,
    on: String,
    #[source]
    pub(super) cause: S3Cause,
}

impl S3Error {
    pub(super) fn new(doing: &'static str, on: String, cause: S3Cause) -> Self {
        Self { doing, on, cause }
    }

    /// Whether nothing was sent, since this process is storing the same image already.
    pub fn is_busy(&self) -> bool {
        matches!(self.cause, S3Cause::Busy)
    }

    /// The same as an error of an archive that was to be written.
    pub(crate) fn into_sink_error(self, doing: impl Into<String>) -> SinkError {
        let is_full = matches!(&self.cause, S3Cause::Refused { status, code, .. } if is_full(*status, code));
        SinkError::Remote { doing: doing.into(), is_full, source: Box::new(self) }
    }

    pub(super) fn status(&self) -> Option<StatusCode> {
        match &self.cause {
            S3Cause::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    fn code(&self) -> &str {
        match &self.cause {
            S3Cause::Refused { code, .. } => code,
            _ => "",
        }
    }

    /// The permission that the key seems to lack, in brackets.
    fn lacks(&self) -> String {
        let permission = match self.doing {
            "list" => "s3:ListBucket",
            "read" | "look up" => "s3:GetObject",
            "delete" => "s3:DeleteObject",
            "list the unfinished uploads of" => "s3:ListBucketMultipartUploads",
            "list the parts of" => "s3:ListMultipartUploadParts",
            "abort the upload of" => "s3:AbortMultipartUpload",
            "lock" => "s3:PutObjectRetention",
            "put a legal hold on" => "s3:PutObjectLegalHold",
            "list the versions in" => "s3:ListBucketVersions",
            "delete a version of" => "s3:DeleteObjectVersion",
            "read the versioning of" => "s3:GetBucketVersioning",
            "read the object lock of" => "s3:GetBucketObjectLockConfiguration",
            _ => "s3:PutObject",
        };
        // The response to a HEAD has no body, and so no code.
        let is_denied =
            self.status() == Some(StatusCode::FORBIDDEN) && matches!(self.code(), "AccessDenied" | "");
        if is_denied { format!(" (needs `{permission}`)") } else { String::new() }
    }

    /// Whether the object or the upload does not exist.
    pub(super) fn is_missing(&self) -> bool {
        self.status() == Some(StatusCode::NOT_FOUND) && self.code() != "NoSuchBucket"
    }

    /// Whether the store does not have the version that was asked for. The response to a HEAD has no code.
    pub(super) fn is_missing_version(&self) -> bool {
        self.is_missing() || self.status() == Some(StatusCode::BAD_REQUEST)
    }

    /// Whether the store refused, for this request's own sake.
    pub(super) fn is_refusal(&self) -> bool {
        self.status().is_some_and(|status| status.is_client_error()) && !self.cause.is_transient()
    }

    /// Whether the object exists already, where it must not.
    pub(super) fn is_precondition(&self) -> bool {
        self.status() == Some(StatusCode::PRECONDITION_FAILED)
            // Amazon's code for two conditional writes at the same moment.
            || self.code() == "ConditionalRequestConflict"
    }

    /// Whether what the store holds is not what was sent.
    pub(super) fn is_difference(&self) -> bool {
        matches!(self.cause, S3Cause::Differs(_))
    }

    /// Whether the store does not support such a request.
    pub(super) fn is_unsupported(&self) -> bool {
        matches!(self.status(), Some(StatusCode::NOT_IMPLEMENTED | StatusCode::METHOD_NOT_ALLOWED))
            || self.code() == "NotImplemented"
    }
}

/// What went wrong with a request, in its last attempt.
#[derive(Debug, thiserror::Error)]
pub enum S3Cause {
    /// The store refused it.
    #[error("the store answers {status}{}{}", in_brackets(.code, .message), hint(*.status, .code))]
    Refused {
        /// The status; 200 may hold an error as well.
        status: StatusCode,
        /// The store's error code; may be empty.
        code: String,
        /// The store's message; may be empty.
        message: String,
        /// The pause that the store asks for.
        retry_after: Option<Duration>,
    },
    /// The response is not what S3 answers.
    #[error("unexpected response ({0}): is `endpoint` the address of an S3 store?")]
    Unexpected(String),
    /// No response in time.
    #[error(transparent)]
    TimedOut(#[from] TimedOut),
    /// No complete response.
    #[error(transparent)]
    Broken(#[from] TransportError),
    /// A response that broke off, or is too long.
    #[error(transparent)]
    Body(#[from] BodyError),
    /// Nothing was sent: this process is storing the same image already.
    #[error("it is being stored at this moment by another run")]
    Busy,
    /// What the store holds is not what was sent.
    #[error("{0}")]
    Differs(String),
}

fn in_brackets(code: &str, message: &str) -> String {
    let text = [code, message].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": ");
    if text.is_empty() { text } else { format!(" ({})", printable(&text)) }
}

/// Whether a store has no space left, in all or for this bucket. Several stores have codes of their own.
fn is_full(status: StatusCode, code: &str) -> bool {
    status == StatusCode::INSUFFICIENT_STORAGE
        || ["QuotaExceeded", "InsufficientStorage", "StorageFull"].iter().any(|word| code.ends_with(word))
}

/// What to do about a refusal.
fn hint(status: StatusCode, code: &str) -> &'static str {
    match (code, status.as_u16()) {
        ("InvalidAccessKeyId" | "SignatureDoesNotMatch", _) => {
            "; check the archive's credentials and its `region`"
        }
        ("ExpiredToken" | "TokenRefreshRequired" | "InvalidToken", _) => {
            "; put a new key where the archive's is read from: it is read again with the next request"
        }
        ("RequestTimeTooSkewed", _) => "; set this machine's clock",
        ("NoSuchBucket", _) => "; create the bucket, or correct `bucket`, `endpoint` and `region`",
        _ if is_full(status, code) => "; free some space in the bucket",
        ("AuthorizationHeaderMalformed" | "PermanentRedirect" | "TemporaryRedirect", _)
        | (_, 301 | 307 | 308) => "; the bucket is elsewhere: correct `endpoint` and `region`",
        (_, 403) => "; the archive's key must be allowed to list, read, write and delete in this bucket",
        _ => "",
    }
}

impl S3Cause {
    /// Whether another attempt may succeed.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Refused { status, code, .. } => {
                status.is_server_error() && *status != StatusCode::NOT_IMPLEMENTED && !is_full(*status, code)
                    || matches!(*status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
                    || matches!(
                        &**code,
                        "InternalError" | "SlowDown" | "ServiceUnavailable" | "RequestTimeout"
                            // The body was changed on its way.
                            | "BadDigest" | "XAmzContentSHA256Mismatch" | "IncompleteBody"
                    )
            }
            Self::Unexpected(_) | Self::TimedOut(_) | Self::Broken(_) => true,
            Self::Body(error) => matches!(error, BodyError::Broken(_)),
            Self::Busy | Self::Differs(_) => false,
        }
    }
}
