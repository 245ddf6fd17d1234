//! Faults on demand.
//!
//! A [`Fault`] says which requests it applies to (a call; if wanted, one zone, one id, only some of them) and
//! its [`Effect`] on them. Several may apply to the same request, in the order in which they were added.
//!
//! ```
//! use std::time::Duration;
//! use snapwarden::sim::call::Call;
//! use snapwarden::sim::fault::{Effect, Fault};
//!
//! // The second and third listing come late; every deletion loses its answer once.
//! let late = Fault::on(Call::ListSnapshots, Effect::Delay(Duration::from_secs(40))).after(1).times(2);
//! let lost = Fault::on(Call::DeleteSnapshot, Effect::CutAfter).times(1).each();
//! # drop((late, lost));
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use http::{HeaderName, HeaderValue, StatusCode};
use jiff::SignedDuration;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::sim::call::Call;
use crate::snapshot::ZoneName;

/// What happens to a request that a fault applies to.
#[derive(Debug, Clone)]
pub enum Effect {
    /// The host can't be reached: nothing is carried out, and the client can know that. Behind a socket
    /// it is the same as [`Effect::CutBefore`].
    Unreachable,
    /// The connection breaks before the request is carried out; the client can't know that.
    CutBefore,
    /// The request is carried out, and the connection breaks before a byte of the answer.
    CutAfter,
    /// The request is carried out at once, its answer arrives later by this duration.
    Delay(Duration),
    /// This answer instead of the world's; nothing is carried out.
    Answer {
        /// The status.
        status: StatusCode,
        /// The media type.
        content_type: &'static str,
        /// The body.
        body: String,
    },
    /// Sets a header of the answer, or removes it: `Retry-After`, a `Content-Length` that lies, no `Date`
    /// (behind a socket the HTTP server puts the real time in its place).
    Header(HeaderName, Option<HeaderValue>),
    /// The `Date` header is off by this much.
    DateSkew(SignedDuration),
    /// Sets the value at a JSON pointer in the answer, or removes it: an unknown state of a snapshot
    /// or an operation, no `md5sum`, a hostile name. An answer without the parent of that value is unchanged.
    Edit(&'static str, Option<Value>),
    /// This number of spaces follows the body, which stays valid JSON.
    Pad(u64),
    /// The body breaks off after this number of bytes.
    CutBody(u64),
    /// After this number of bytes of the body nothing more arrives, not even its end.
    Stall(u64),
    /// A slow line: each chunk of the body, at most a cluster of an image, arrives after this pause.
    Slow(Duration),
    /// The operation that the request starts ends otherwise. Unless the state is `success` it has no effect;
    /// a snapshot that was to be created ends in state `error`.
    Operation(Ending),
    /// Object store: `Range` is ignored, the answer is 200 and the whole image.
    IgnoreRange,
    /// Object store: the image has this entity tag, also for `If-Range`.
    Etag(&'static str),
    /// Object store: the byte at this offset of the image arrives with all its bits flipped.
    Corrupt(u64),
    /// Object store: the address expires; this answer breaks off after this number of bytes (0: it is the 403).
    Expire(u64),
}

impl Effect {
    /// An error of the API.
    pub fn status(status: u16, message: &str) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = json!({ "message": message }).to_string();
        Self::Answer { status, content_type: "application/json", body }
    }

    /// An HTML page with status 200, such as a proxy in between sends.
    pub fn html() -> Self {
        let body = "<!DOCTYPE html><title>Sign in</title><h1>Please sign in</h1>".to_owned();
        Self::Answer { status: StatusCode::OK, content_type: "text/html", body }
    }

    /// Status 200, and a body that stops being JSON in the middle.
    pub fn malformed_json() -> Self {
        let body = r#"{"snapshots": [{"id": "#.to_owned();
        Self::Answer { status: StatusCode::OK, content_type: "application/json", body }
    }

    /// The operation fails in the usual time.
    pub fn operation_fails(reason: &'static str, message: &'static str) -> Self {
        Self::Operation(Ending {
            state: "failure",
            reason: Some(reason),
            message: Some(message),
            when: When::Usual,
        })
    }

    /// The operation has failed in the first answer already.
    pub fn fails_inline(reason: &'static str, message: &'static str) -> Self {
        Self::Operation(Ending {
            state: "failure",
            reason: Some(reason),
            message: Some(message),
            when: When::AtOnce,
        })
    }

    /// The operation stays `pending` forever.
    pub fn operation_hangs() -> Self {
        Self::Operation(Ending { state: "success", reason: None, message: None, when: When::Never })
    }

    /// Sets a header of the answer.
    pub fn header(name: HeaderName, value: &'static str) -> Self {
        Self::Header(name, Some(HeaderValue::from_static(value)))
    }
}

/// How an operation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ending {
    /// Its last state; any word.
    pub state: &'static str,
    /// The reason, one of the API's closed set.
    pub reason: Option<&'static str>,
    /// The reason as a sentence.
    pub message: Option<&'static str>,
    /// When it ends.
    pub when: When,
}

impl Ending {
    /// The usual end of an operation.
    pub const SUCCESS: Self = Self { state: "success", reason: None, message: None, when: When::Usual };
}

/// When an operation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// In the answer that started it.
    AtOnce,
    /// After the time that operations take in this world.
    Usual,
    /// Never.
    Never,
}

/// Which requests have which effect.
#[derive(Debug, Clone)]
pub struct Fault {
    call: Call,
    zone: Option<ZoneName>,
    id: Option<Uuid>,
    skipped: u64,
    times: Option<u64>,
    each: bool,
    effect: Effect,
    /// Matching requests so far, by id where each id is counted separately.
    seen: BTreeMap<Option<Uuid>, u64>,
}

impl Fault {
    /// Applies to every such call, without end.
    pub fn on(call: Call, effect: Effect) -> Self {
        let seen = BTreeMap::new();
        Self { call, zone: None, id: None, skipped: 0, times: None, each: false, effect, seen }
    }

    /// Only in this zone.
    #[must_use]
    pub fn in_zone(mut self, zone: &ZoneName) -> Self {
        self.zone = Some(zone.clone());
        self
    }

    /// Only where the request names this snapshot, instance, template or operation. An operation is also
    /// named by what it works on, an image by its snapshot.
    #[must_use]
    pub fn of(mut self, id: Uuid) -> Self {
        self.id = Some(id);
        self
    }

    /// Not the first `skipped` of them.
    #[must_use]
    pub fn after(mut self, skipped: u64) -> Self {
        self.skipped = skipped;
        self
    }

    /// No more than `times` of them.
    #[must_use]
    pub fn times(mut self, times: u64) -> Self {
        self.times = Some(times);
        self
    }

    /// Counts separately for each id: with [`times`](Self::times) 2 on `get-operation`, the
    /// first two polls of every operation.
    #[must_use]
    pub fn each(mut self) -> Self {
        self.each = true;
        self
    }

    /// Counts this request; returns its effect if it applies. The first of `ids` is the one in the path.
    pub(super) fn apply(&mut self, call: Call, zone: &ZoneName, ids: &[Uuid]) -> Option<Effect> {
        let is_meant = self.call == call
            && self.zone.as_ref().is_none_or(|only| only == zone)
            && self.id.is_none_or(|only| ids.contains(&only));
        if !is_meant {
            return None;
        }
        let count = self.seen.entry(if self.each { ids.first().copied() } else { None }).or_default();
        *count += 1;
        let applies = *count > self.skipped && self.times.is_none_or(|times| *count - self.skipped <= times);
        applies.then(|| self.effect.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_applies_to_what_it_names_and_as_often_as_it_says() {
        let (zone, other): (ZoneName, ZoneName) = ("a".parse().unwrap(), "b".parse().unwrap());
        let (x, y) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let mut requests =
            [(&zone, x), (&other, x), (&zone, y), (&zone, x), (&zone, y), (&zone, x)].into_iter();
        let all: Vec<_> = requests.by_ref().collect();
        let applied = |mut fault: Fault| -> Vec<bool> {
            all.iter().map(|(zone, id)| fault.apply(Call::GetSnapshot, zone, &[*id]).is_some()).collect()
        };
        let fault = || Fault::on(Call::GetSnapshot, Effect::CutAfter);
        assert_eq!(applied(fault()), [true; 6]);
        assert_eq!(applied(Fault::on(Call::GetImage, Effect::CutAfter)), [false; 6]);
        assert_eq!(applied(fault().in_zone(&other)), [false, true, false, false, false, false]);
        assert_eq!(applied(fault().of(y)), [false, false, true, false, true, false]);
        assert_eq!(applied(fault().after(1).times(2)), [false, true, true, false, false, false]);
        assert_eq!(applied(fault().times(1).each()), [true, false, true, false, false, false]);
    }
}
