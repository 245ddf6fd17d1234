//! The randomness seam: jitter and ids.
//!
//! The simulated form is `sim::randomness::SeededRandomness`.

use std::fmt::Debug;
use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

/// The source of random numbers.
pub trait Randomness: Send + Sync + Debug {
    /// 64 random bits.
    fn next_u64(&self) -> u64;
}

/// The operating system's random numbers.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemRandomness;

impl Randomness for SystemRandomness {
    #[expect(clippy::disallowed_methods, reason = "this is the seam's real form")]
    fn next_u64(&self) -> u64 {
        let mut bytes = [0; 8];
        // These numbers spread retries and name runs; without a source, a poor number is good enough.
        let _ = getrandom::fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }
}

/// A span between zero and `max`, uniformly distributed.
pub fn up_to(randomness: &dyn Randomness, max: Duration) -> Duration {
    let nanos = u64::try_from(max.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(
        u64::try_from((u128::from(randomness.next_u64()) * u128::from(nanos)) >> 64).unwrap_or(0),
    )
}

/// A fresh id whose text sorts by time (UUID version 7).
pub fn fresh_id(randomness: &dyn Randomness, now: Timestamp) -> Uuid {
    let millis = u64::try_from(now.as_millisecond()).unwrap_or(0);
    let (a, b) = (randomness.next_u64().to_le_bytes(), randomness.next_u64().to_le_bytes());
    let bytes = [a[0], a[1], a[2], a[3], a[4], b[0], b[1], b[2], b[3], b[4]];
    uuid::Builder::from_unix_timestamp_millis(millis, &bytes).into_uuid()
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
    fn up_to_stays_below_its_bound() {
        let bound = Duration::from_secs(3);
        assert_eq!(up_to(&Fixed(0), bound), Duration::ZERO);
        assert!(up_to(&Fixed(u64::MAX), bound) < bound);
    }

    #[test]
    fn fresh_ids_sort_by_time() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let earlier = fresh_id(&Fixed(u64::MAX), at(1_700_000_000));
        let later = fresh_id(&Fixed(0), at(1_700_000_001));
        assert!(earlier.to_string() < later.to_string());
    }
}
