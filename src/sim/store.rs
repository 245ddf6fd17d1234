//! The object store: images behind presigned addresses.

use http::header::{ACCEPT_RANGES, AUTHORIZATION, CONTENT_RANGE, ETAG, IF_RANGE, RANGE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use jiff::Timestamp;
use uuid::Uuid;

use crate::sim::answer::{Answer, Content};
use crate::sim::fault::Effect;
use crate::sim::signature::presigned_until;
use crate::sim::world::State;
use crate::snapshot::{SnapshotId, ZoneName};
use crate::transport::Request;

/// The key of an export's object.
pub(super) fn key_of(snapshot: SnapshotId, export: Uuid) -> String {
    format!("{snapshot}/{export}.qcow2")
}

/// The snapshot whose image a key names.
pub(super) fn snapshot_of(key: &str) -> Option<SnapshotId> {
    key.split('/').next()?.parse().ok()
}

fn export_of(key: &str) -> Option<Uuid> {
    key.split_once('/')?.1.strip_suffix(".qcow2")?.parse().ok()
}

/// Answers one request for an object.
pub(super) fn answer(
    state: &mut State,
    request: &Request,
    zone: &ZoneName,
    key: &str,
    effects: &[Effect],
    now: Timestamp,
) -> Answer {
    // S3 refuses two ways of authentication at once, even if both are right.
    if request.headers.contains_key(AUTHORIZATION) {
        return refusal(StatusCode::BAD_REQUEST, "InvalidArgument", "Only one auth mechanism allowed");
    }
    let denied = |message| refusal(StatusCode::FORBIDDEN, "AccessDenied", message);
    // The address was signed for GET.
    if request.method != Method::GET {
        return refusal(StatusCode::FORBIDDEN, "SignatureDoesNotMatch", "The signature does not match");
    }
    let query = request.url.query().unwrap_or_default();
    let Some(until) = presigned_until(state.address_secret, zone.as_str(), key, query) else {
        return refusal(StatusCode::FORBIDDEN, "SignatureDoesNotMatch", "The signature does not match");
    };
    let (Some(snapshot), Some(export)) = (snapshot_of(key), export_of(key)) else {
        return denied("Access Denied");
    };
    let expires = |effect: &Effect| match effect {
        Effect::Expire(after) => Some(*after),
        _ => None,
    };
    let is_expired = state.expired.contains(&export);
    let expires_after = effects.iter().find_map(expires);
    if expires_after.is_some() {
        state.expired.insert(export);
    }
    if now > until || is_expired || expires_after == Some(0) {
        return denied("Request has expired");
    }
    let Some(record) = state.zones.get(zone).and_then(|zone| zone.snapshots.get(&snapshot)) else {
        return refusal(StatusCode::NOT_FOUND, "NoSuchKey", "The specified key does not exist.");
    };
    let image = record.image.clone();
    let length = image.file_bytes();
    let etag = effects.iter().find_map(|effect| match effect {
        Effect::Etag(tag) => Some((*tag).to_owned()),
        _ => None,
    });
    let etag = etag.unwrap_or_else(|| image.etag());
    let mut headers = HeaderMap::new();
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.extend(HeaderValue::try_from(&etag).ok().map(|etag| (ETAG, etag)));
    let ignored = effects.iter().any(|effect| matches!(effect, Effect::IgnoreRange));
    let unchanged = request.headers.get(IF_RANGE).is_none_or(|asked| asked.as_bytes() == etag.as_bytes());
    let asked = request.headers.get(RANGE).filter(|_| unchanged && !ignored);
    match asked.and_then(|value| value.to_str().ok()).and_then(|value| range(value, length)) {
        None => Answer { headers, ..Answer::new(StatusCode::OK, Content::Image(image, 0..length)) },
        Some(Err(())) => {
            headers.extend(content_range(&format!("bytes */{length}")));
            let refused =
                refusal(StatusCode::RANGE_NOT_SATISFIABLE, "InvalidRange", "The range is not satisfiable");
            Answer { headers, ..refused }
        }
        Some(Ok(range)) => {
            headers.extend(content_range(&format!("bytes {}-{}/{length}", range.start, range.end - 1)));
            Answer { headers, ..Answer::new(StatusCode::PARTIAL_CONTENT, Content::Image(image, range)) }
        }
    }
}

fn content_range(value: &str) -> Option<(http::HeaderName, HeaderValue)> {
    Some((CONTENT_RANGE, HeaderValue::try_from(value).ok()?))
}

/// `bytes=a-`, `bytes=a-b` or `bytes=-n`; none for any other text, which is ignored.
fn range(text: &str, length: u64) -> Option<Result<std::ops::Range<u64>, ()>> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let range = match (first, last) {
        ("", last) => length.saturating_sub(last.parse().ok()?)..length,
        (first, "") => first.parse().ok()?..length,
        (first, last) => first.parse().ok()?..last.parse::<u64>().ok()?.saturating_add(1).min(length),
    };
    Some(if range.is_empty() { Err(()) } else { Ok(range) })
}

fn refusal(status: StatusCode, code: &str, message: &str) -> Answer {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    );
    Answer::new(status, Content::Text("application/xml", body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_http_means_them() {
        let table = [
            ("bytes=0-", Some(Ok(0..10))),
            ("bytes=4-6", Some(Ok(4..7))),
            ("bytes=9-99", Some(Ok(9..10))),
            ("bytes=-3", Some(Ok(7..10))),
            ("bytes=10-", Some(Err(()))),
            ("bytes=0-1,4-5", None),
            ("pages=1-2", None),
        ];
        for (text, expected) in table {
            assert_eq!(range(text, 10), expected, "{text}");
        }
    }
}
