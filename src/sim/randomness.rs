//! Simulated randomness: numbers that look random and repeat from run to run.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::randomness::Randomness;

/// The step of splitmix64 (Steele, Lea and Flood, 2014).
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// A generator whose whole sequence follows from its seed.
#[derive(Debug)]
pub struct SeededRandomness(AtomicU64);

impl SeededRandomness {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }
}

impl Randomness for SeededRandomness {
    fn next_u64(&self) -> u64 {
        mixed(self.0.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP))
    }
}

/// The `n`-th number of the sequence of `seed`, without drawing those before it.
pub(super) fn nth(seed: u64, n: u64) -> u64 {
    mixed(seed.wrapping_add(STEP.wrapping_mul(n.wrapping_add(1))))
}

/// The output function of splitmix64.
fn mixed(state: u64) -> u64 {
    let a = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let b = (a ^ (a >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    b ^ (b >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_is_that_of_splitmix64() {
        let randomness = SeededRandomness::new(1_234_567);
        let drawn: Vec<u64> = (0..3).map(|_| randomness.next_u64()).collect();
        assert_eq!(drawn, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
        assert_eq!(nth(1_234_567, 2), drawn[2]);
    }
}
