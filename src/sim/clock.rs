//! The simulated clock: its start can be chosen, and it can be made to jump.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use crate::clock::Clock;

/// A clock that runs with tokio's time: as fast as tests let it where that is paused (it then jumps to the next
/// instant that any task waits for), in real time else.
///
/// Clones are the same clock. A machine whose clock disagrees with the platform's is two clocks.
#[derive(Debug, Clone)]
pub struct SimClock {
    start: Timestamp,
    started: Instant,
    stepped: Arc<Mutex<SignedDuration>>,
}

impl SimClock {
    /// A clock that shows `start` now.
    pub fn starting_at(start: Timestamp) -> Self {
        Self { start, started: Instant::now(), stepped: Arc::default() }
    }

    /// Makes the wall clock jump by `by`; elapsed time and sleepers don't notice.
    pub fn step(&self, by: SignedDuration) {
        let mut stepped = self.stepped.lock().unwrap_or_else(PoisonError::into_inner);
        *stepped = stepped.saturating_add(by);
    }
}

impl Clock for SimClock {
    fn now(&self) -> Timestamp {
        let stepped = *self.stepped.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed = SignedDuration::try_from(self.elapsed()).unwrap_or(SignedDuration::MAX);
        // Saturating: a test that steps beyond the calendar meets its end, not a panic.
        self.start
            .checked_add(elapsed)
            .and_then(|now| now.checked_add(stepped))
            .unwrap_or(if stepped.is_negative() { Timestamp::MIN } else { Timestamp::MAX })
    }

    fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    #[expect(clippy::disallowed_methods, reason = "this is the seam's simulated form")]
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn years_pass_in_no_time() {
        let clock = SimClock::starting_at("2026-01-01T00:00:00Z".parse().unwrap());
        clock.sleep(Duration::from_hours(3 * 365 * 24)).await;
        assert_eq!(clock.now().to_string(), "2028-12-31T00:00:00Z");
    }

    #[tokio::test(start_paused = true)]
    async fn a_step_moves_the_wall_clock_of_every_clone_and_nothing_else() {
        let clock = SimClock::starting_at("2026-01-01T00:00:00Z".parse().unwrap());
        let clone = clock.clone();
        clock.step(SignedDuration::from_mins(-20));
        assert_eq!(clone.now().to_string(), "2025-12-31T23:40:00Z");
        assert_eq!(clone.elapsed(), Duration::ZERO);
    }
}
