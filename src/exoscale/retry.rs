//! When a request is sent again, and how fast requests follow each other at all.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::{HeaderMap, StatusCode, header};
use jiff::Timestamp;

use crate::clock::Clock;
use crate::randomness::{Randomness, up_to};

/// So many tries in a row without progress, and a request is given up; the vendor's Go client (go-retryablehttp)
/// does the same.
pub(super) const MAX_TRIES: u32 = 5;

/// At most so long between two tries, whatever the server asks for.
const MAX_PAUSE: Duration = Duration::from_mins(1);

/// The first pause at its longest; it doubles with each try.
const FIRST_PAUSE: Duration = Duration::from_secs(2);

/// When it is safe to send a request again that was not answered well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    /// It reads, or doing it twice is doing it once.
    Freely,
    /// A second time makes a second thing: only if the first was certainly not carried out.
    IfNotCarriedOut,
}

/// The pause before the next try, after `tries` of them: what the server asked for, else between half and
/// all of a span that doubles, so that many clients do not come back together.
pub(super) fn pause(tries: u32, retry_after: Option<Duration>, randomness: &dyn Randomness) -> Duration {
    if let Some(asked) = retry_after {
        return asked.min(MAX_PAUSE);
    }
    let half =
        (FIRST_PAUSE / 2).saturating_mul(2u32.saturating_pow(tries.saturating_sub(1))).min(MAX_PAUSE / 2);
    half + up_to(randomness, half)
}

/// What a `Retry-After` header asks for, in seconds or as a date; counted for 429 and 503 alone, where it is
/// defined.
pub(super) fn retry_after(status: StatusCode, headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    if !matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        return None;
    }
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = http_date(text)?;
    Some(Duration::try_from(until.duration_since(now)).unwrap_or(Duration::ZERO))
}

/// A date as HTTP writes it.
pub(super) fn http_date(text: &str) -> Option<Timestamp> {
    Timestamp::try_from(httpdate::parse_http_date(text).ok()?).ok()
}

/// Lets no more than so many requests go within any one second, over all zones and policies together. Those that fit go at
/// once: a run of a few requests is not kept waiting.
#[derive(Debug)]
pub(super) struct Pace {
    per_second: usize,
    /// When the last of them went or will go, on the clock's elapsed time; none that no longer matters.
    places: Mutex<VecDeque<Duration>>,
}

impl Pace {
    pub(super) fn new(requests_per_second: std::num::NonZeroU32) -> Self {
        let per_second = usize::try_from(requests_per_second.get()).unwrap_or(usize::MAX);
        Self { per_second, places: Mutex::default() }
    }

    /// Waits for the next free place.
    pub(super) async fn wait(&self, clock: &dyn Clock) {
        let now = clock.elapsed();
        let wait = self.take(now).saturating_sub(now);
        if !wait.is_zero() {
            clock.sleep(wait).await;
        }
    }

    /// Takes the next free place.
    fn take(&self, now: Duration) -> Duration {
        const SECOND: Duration = Duration::from_secs(1);
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        while places.front().is_some_and(|oldest| *oldest + SECOND <= now) {
            places.pop_front();
        }
        let full = places.len().checked_sub(self.per_second).and_then(|nth| places.get(nth));
        // Never before one that was given already.
        let place = full.map_or(now, |nth| *nth + SECOND).max(places.back().copied().unwrap_or(now)).max(now);
        places.push_back(place);
        place
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Fixed(u64);
    impl Randomness for Fixed {
        fn next_u64(&self) -> u64 {
            self.0
        }
    }

    #[test]
    fn no_second_has_more_requests_than_allowed_and_what_fits_goes_at_once() {
        let pace = Pace::new(3.try_into().unwrap());
        let mut places = Vec::new();
        // Milliseconds at which somebody asks.
        for now in [0, 0, 10, 20, 30, 30, 40, 1500, 2040, 2500, 9000, 9000, 9000, 9000] {
            places.push(u64::try_from(pace.take(Duration::from_millis(now)).as_millis()).unwrap());
        }
        assert_eq!(places, [0, 0, 10, 1000, 1000, 1010, 2000, 2000, 2040, 3000, 9000, 9000, 9000, 10_000]);
        for nth in places.windows(4) {
            assert!(nth[3] - nth[0] >= 1000, "{places:?}");
        }
    }

    #[test]
    fn pauses_double_with_jitter_and_stay_within_a_minute() {
        let least: Vec<u64> = (1..=4).map(|tries| pause(tries, None, &Fixed(0)).as_secs()).collect();
        assert_eq!(least, [1, 2, 4, 8]);
        for tries in [1, 2, 5, 6, 40, u32::MAX] {
            let (least, most) = (pause(tries, None, &Fixed(0)), pause(tries, None, &Fixed(u64::MAX)));
            assert!(least < most && most < least * 2 && most <= MAX_PAUSE, "{tries}: {least:?} {most:?}");
        }
    }

    #[test]
    fn the_server_may_ask_for_a_pause_of_up_to_a_minute() {
        let asked = |seconds| pause(1, Some(Duration::from_secs(seconds)), &Fixed(u64::MAX)).as_secs();
        assert_eq!([asked(0), asked(7), asked(86_400)], [0, 7, 60]);
    }

    #[test]
    fn retry_after_is_read_as_seconds_or_as_a_date_for_429_and_503_alone() {
        let now = "2026-11-01T02:30:00Z".parse().unwrap();
        let read = |status: u16, text: &'static str| {
            let headers = HeaderMap::from_iter([(header::RETRY_AFTER, text.parse().unwrap())]);
            retry_after(StatusCode::from_u16(status).unwrap(), &headers, now).map(|span| span.as_secs())
        };
        assert_eq!(read(429, "12"), Some(12));
        assert_eq!(read(503, "Sun, 01 Nov 2026 02:30:40 GMT"), Some(40));
        assert_eq!(read(503, "Sun, 01 Nov 2026 02:29:00 GMT"), Some(0));
        assert_eq!(read(500, "12"), None);
        for bad in ["soon", "-1", "", "1.5"] {
            assert_eq!(read(429, bad), None, "{bad:?}");
        }
    }
}
