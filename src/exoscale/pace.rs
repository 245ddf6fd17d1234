//! How fast requests follow each other.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Clock;

/// Limits how many requests are sent within any one window, over all zones and policies together. Requests below the
/// limit are sent at once, so a burst of a few is not delayed.
#[derive(Debug)]
pub(super) struct Pace {
    /// At least one.
    per_window: usize,
    /// A second; of one of several processes that share the limit, in which it has its share of at least one request.
    window: Duration,
    /// When the requests of the last window were sent, or will be, on the clock's elapsed time.
    slots: Mutex<VecDeque<Duration>>,
}

impl Pace {
    /// For one of several processes that share the limit.
    pub(super) fn new(requests_per_second: NonZeroU32, shards: NonZeroU32) -> Self {
        let per_window = (requests_per_second.get() / shards).max(1);
        let window = Duration::from_secs(1) * per_window * shards.get() / requests_per_second.get();
        let per_window = usize::try_from(per_window).unwrap_or(usize::MAX);
        Self { per_window, window, slots: Mutex::default() }
    }

    /// Waits for the next free slot.
    pub(super) async fn wait(&self, clock: &dyn Clock) {
        let now = clock.elapsed();
        let wait = self.take(now).saturating_sub(now);
        if !wait.is_zero() {
            clock.sleep(wait).await;
        }
    }

    /// Takes the next free slot.
    fn take(&self, now: Duration) -> Duration {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        while slots.front().is_some_and(|oldest| *oldest + self.window <= now) {
            slots.pop_front();
        }
        // With `per_window` slots taken, the next is a window after the oldest of these; never before the newest.
        let oldest = slots.len().checked_sub(self.per_window).and_then(|nth| slots.get(nth));
        let slot = oldest
            .map_or(now, |oldest| *oldest + self.window)
            .max(slots.back().copied().unwrap_or(now))
            .max(now);
        slots.push_back(slot);
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_second_has_more_requests_than_allowed_and_what_fits_is_sent_at_once() {
        let pace = Pace::new(3.try_into().unwrap(), NonZeroU32::MIN);
        let mut slots = Vec::new();
        // Milliseconds at which a request is made.
        for now in [0, 0, 10, 20, 30, 30, 40, 1500, 2040, 2500, 9000, 9000, 9000, 9000] {
            slots.push(u64::try_from(pace.take(Duration::from_millis(now)).as_millis()).unwrap());
        }
        assert_eq!(slots, [0, 0, 10, 1000, 1000, 1010, 2000, 2000, 2040, 3000, 9000, 9000, 9000, 10_000]);
        for nth in slots.windows(4) {
            assert!(nth[3] - nth[0] >= 1000, "{slots:?}");
        }
    }

    #[test]
    fn processes_that_share_the_limit_send_as_many_together_as_one_alone() {
        for (per_second, shards) in [(10, 3), (10, 50), (1, 2), (7, 7)] {
            let pace = Pace::new(per_second.try_into().unwrap(), shards.try_into().unwrap());
            // A whole number of windows.
            let last = (0..=210).map(|_| pace.take(Duration::ZERO)).last().unwrap();
            let together = 210.0 / last.as_secs_f64() * f64::from(shards);
            let most = f64::from(per_second) * 1.001;
            assert!((most * 0.99..=most).contains(&together), "{per_second} over {shards}: {together}");
        }
    }
}
