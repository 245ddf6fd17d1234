//! When something that failed is attempted again, and after which pause: for requests, polls and downloads alike.
//!
//! An attempt that fails without progress is counted; after [`MAX_ATTEMPTS`] of them in a row the caller gives up, and
//! progress begins the count again. Whether repeating is safe at all is for the caller to decide. A caller that is
//! stopped drops the future that waits; nothing here needs a signal.

use std::time::Duration;

use http::{HeaderMap, StatusCode, header};
use jiff::Timestamp;

use crate::randomness::{Randomness, up_to};
use crate::transport::http_date;

/// Attempts in a row without progress, after which a request, a poll or a download is given up. The vendor's Go client
/// (go-retryablehttp) makes as many.
pub(crate) const MAX_ATTEMPTS: u32 = 5;

/// The longest pause between two attempts, whatever the server asks for: it may be wrong, and a run has a schedule.
pub(crate) const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// How often something is attempted, and how the pauses between the attempts grow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RetryPolicy {
    pub(crate) max_attempts: u32,
    /// The first pause, before jitter.
    pub(crate) first_pause: Duration,
    /// Each pause is this many times as long as the one before.
    pub(crate) growth: u32,
}

/// For requests to an API or a store: pauses of 2, 4, 8 and 16 s before jitter.
pub(crate) const REQUESTS: RetryPolicy =
    RetryPolicy { max_attempts: MAX_ATTEMPTS, first_pause: Duration::from_secs(2), growth: 2 };

/// The attempts at one thing: how many in a row have failed without progress.
#[derive(Debug)]
pub(crate) struct Attempts {
    policy: RetryPolicy,
    failed: u32,
}

impl Attempts {
    pub(crate) fn new(policy: RetryPolicy) -> Self {
        Self { policy, failed: 0 }
    }

    /// Counts an attempt that failed without progress.
    pub(crate) fn count_failure(&mut self) {
        self.failed = self.failed.saturating_add(1);
    }

    /// There was progress: the count begins again.
    pub(crate) fn reset(&mut self) {
        self.failed = 0;
    }

    /// How many in a row have failed without progress.
    pub(crate) fn failed(&self) -> u32 {
        self.failed
    }

    /// Whether it is time to give up.
    pub(crate) fn are_exhausted(&self) -> bool {
        self.failed >= self.policy.max_attempts
    }

    /// The pause before the next attempt: the one that the server asked for, else between half and all of a span that
    /// grows with each failure. The random half keeps many clients from coming back all at once.
    pub(crate) fn pause(&self, retry_after: Option<Duration>, randomness: &dyn Randomness) -> Duration {
        if let Some(asked) = retry_after {
            return asked.min(LONGEST_PAUSE);
        }
        let growth = self.policy.growth.saturating_pow(self.failed.saturating_sub(1));
        let half = self.policy.first_pause.saturating_mul(growth).min(LONGEST_PAUSE) / 2;
        half + up_to(randomness, half)
    }
}

/// The pause that a `Retry-After` header asks for, in seconds or as a date. It counts for 429 and 503 alone, where it is
/// defined (RFC 6585, RFC 9110).
pub(crate) fn retry_after(status: StatusCode, headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    if !matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        return None;
    }
    let value = headers.get(header::RETRY_AFTER)?;
    if let Ok(seconds) = value.to_str().ok()?.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = http_date(value)?;
    Some(Duration::try_from(until.duration_since(now)).unwrap_or(Duration::ZERO))
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

    const STEEP: RetryPolicy = RetryPolicy { growth: 4, ..REQUESTS };

    fn after(policy: RetryPolicy, failed: u32) -> Attempts {
        Attempts { policy, failed }
    }

    #[test]
    fn pauses_grow_with_jitter_and_stay_within_a_minute() {
        for (policy, seconds) in [(REQUESTS, [2, 4, 8, 16]), (STEEP, [2, 8, 32, 60])] {
            for (failed, seconds) in (1..).zip(seconds) {
                let attempts = after(policy, failed);
                let (least, most) = (attempts.pause(None, &Fixed(0)), attempts.pause(None, &Fixed(u64::MAX)));
                let whole = Duration::from_secs(seconds);
                assert_eq!(least, whole / 2, "{policy:?} {failed}");
                assert!(most < whole && most + Duration::from_millis(1) > whole, "{policy:?} {failed}");
            }
            for failed in [0, 5, 6, 40, u32::MAX] {
                assert!(after(policy, failed).pause(None, &Fixed(u64::MAX)) <= LONGEST_PAUSE);
            }
            // Progress was made just now: the shortest pause, but one.
            assert_eq!(after(policy, 0).pause(None, &Fixed(0)), Duration::from_secs(1));
        }
    }

    #[test]
    fn five_failures_in_a_row_exhaust_the_attempts_and_progress_begins_the_count_again() {
        let mut attempts = Attempts::new(REQUESTS);
        for _ in 0..4 {
            attempts.count_failure();
        }
        assert!(!attempts.are_exhausted());
        attempts.reset();
        for failed in 1..=5 {
            assert!(!attempts.are_exhausted());
            attempts.count_failure();
            assert_eq!(attempts.failed(), failed);
        }
        assert!(attempts.are_exhausted());
    }

    #[test]
    fn the_server_may_ask_for_a_pause_of_up_to_a_minute() {
        let asked = |seconds| {
            let asked = Some(Duration::from_secs(seconds));
            after(REQUESTS, 1).pause(asked, &Fixed(u64::MAX)).as_secs()
        };
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
