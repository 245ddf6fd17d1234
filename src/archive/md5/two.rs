//! Two MD5s of the same bytes at once.
//!
//! Each step of an MD5 waits for the one before, so one alone leaves most of a core idle: the steps of a second one fit in
//! between.

use crate::archive::md5::four::{ROTATIONS, SINES};

/// Hashes one block into both states.
#[inline]
#[expect(clippy::many_single_char_names, reason = "RFC 1321 has these, once")]
fn block(states: &mut [[u32; 4]; 2], block: &[u8; 64]) {
    let mut words = [0_u32; 16];
    for (word, bytes) in words.iter_mut().zip(block.as_chunks().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    let [[mut a, mut b, mut c, mut d], [mut e, mut f, mut g, mut h]] = *states;
    macro_rules! step {
        ($round:literal, $step:literal) => {
            let word = match $round {
                0 => $step,
                1 => (5 * $step + 1) % 16,
                2 => (3 * $step + 5) % 16,
                _ => (7 * $step) % 16,
            };
            let known = words[word].wrapping_add(SINES[$round][$step]);
            let step = |a: u32, b: u32, c: u32, d: u32| {
                // What is known beforehand first: the rest of the step waits for `b`.
                let sum = a.wrapping_add(known);
                let sum = match $round {
                    0 => sum.wrapping_add(d ^ (b & (c ^ d))),
                    1 => sum.wrapping_add(c & !d).wrapping_add(b & d),
                    2 => sum.wrapping_add(b ^ (c ^ d)),
                    _ => sum.wrapping_add(c ^ (b | !d)),
                };
                sum.rotate_left(const { ROTATIONS[$round][$step % 4] }).wrapping_add(b)
            };
            (a, b, c, d) = (d, step(a, b, c, d), b, c);
            (e, f, g, h) = (h, step(e, f, g, h), f, g);
        };
    }
    macro_rules! round {
        ($round:literal: $($step:literal)*) => { $(step!($round, $step);)* };
    }
    round!(0: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    round!(1: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    round!(2: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    round!(3: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    for (state, added) in states.iter_mut().zip([[a, b, c, d], [e, f, g, h]]) {
        for (word, added) in state.iter_mut().zip(added) {
            *word = word.wrapping_add(added);
        }
    }
}

/// Hashes blocks into both states.
pub(super) fn blocks(states: &mut [[u32; 4]; 2], blocks: &[[u8; 64]]) {
    for one in blocks {
        block(states, one);
    }
}
