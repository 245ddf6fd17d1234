//! How fast requests follow each other.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Clock;

/// Limits how many requests are sent within any one second, over all zones and policies together. Requests below the
/// limit are sent at once, so a burst of a few is not delayed.
#[derive(Debug)]
pub(super) struct Pace {
    per_second: usize,
    /// When the requests of the last second were sent, or will be, on the clock's elapsed time.
    slots: Mutex<VecDeque<Duration>>,
}

impl Pace {
    pub(super) fn new(requests_per_second: std::num::NonZeroU32) -> Self {
        let per_second = usize::try_from(requests_per_second.get()).unwrap_or(usize::MAX);
        Self { per_second, slots: Mutex::default() }
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
        const SECOND: Duration = Duration::from_secs(1);
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        while slots.front().is_some_and(|oldest| *oldest + SECOND <= now) {
            slots.pop_front();
        }
        // With `per_second` slots taken, the next is a second after the oldest of these; never before the newest.
        let oldest = slots.len().checked_sub(self.per_second).and_then(|nth| slots.get(nth));
        let slot =
            oldest.map_or(now, |oldest| *oldest + SECOND).max(slots.back().copied().unwrap_or(now)).max(now);
        slots.push_back(slot);
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_second_has_more_requests_than_allowed_and_what_fits_is_sent_at_once() {
        let pace = Pace::new(3.try_into().unwrap());
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
}
