//! Keeps all downloads of a policy together below a rate.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Clock;

/// How far the downloads may be ahead of the rate: few waits of some length instead of one per chunk.
const BURST: Duration = Duration::from_millis(250);

/// A leaky bucket of bytes.
#[derive(Debug)]
pub struct Throttle {
    bytes_per_second: u64,
    /// When all bytes that were taken so far would have arrived at the rate; by the clock's elapsed time.
    paid_until: Mutex<Duration>,
}

impl Throttle {
    /// At least one byte per second.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), paid_until: Mutex::new(Duration::ZERO) }
    }

    /// Counts bytes that were received, and waits until the rate allows the next ones.
    pub async fn take(&self, clock: &dyn Clock, bytes: u64) {
        let now = clock.elapsed();
        let wait = {
            let mut paid_until = self.paid_until.lock().unwrap_or_else(PoisonError::into_inner);
            let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
            let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
            *paid_until = paid_until.max(now).saturating_add(cost);
            paid_until.saturating_sub(now).saturating_sub(BURST)
        };
        if wait > Duration::ZERO {
            clock.sleep(wait).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::clock::SimClock;
    use futures_util::future::join_all;

    #[tokio::test(start_paused = true)]
    async fn all_that_share_it_stay_below_the_rate_together() {
        let clock = SimClock::starting_at("2026-11-01T00:00:00Z".parse().unwrap());
        let throttle = Throttle::new(1_000_000);
        let one = async || {
            for _ in 0..100 {
                throttle.take(&clock, 10_000).await;
            }
        };
        let before = tokio::time::Instant::now();
        join_all([one(), one(), one(), one()]).await;
        let took = before.elapsed();
        assert!(took <= Duration::from_secs(4) && took > Duration::from_millis(3_700), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn time_that_passed_unused_is_not_made_up_for() {
        let clock = SimClock::starting_at("2026-11-01T00:00:00Z".parse().unwrap());
        let throttle = Throttle::new(1000);
        clock.sleep(Duration::from_hours(1)).await;
        let before = tokio::time::Instant::now();
        throttle.take(&clock, 10_000).await;
        assert!(before.elapsed() > Duration::from_secs(9));
    }
}
