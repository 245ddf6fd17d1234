//! How fast requests follow each other.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Clock;

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
}
