//! Four MD5s at once, in the lanes of one vector.
//!
//! Each step of an MD5 waits for the one before, so one alone leaves most of a core idle. Four independent ones take less
//! than twice the time of one.

use wide::u32x4;

/// RFC 1321, 3.4: the sines, and by how much each step rotates.
#[rustfmt::skip]
pub(super) const SINES: [[u32; 16]; 4] = [
    [
        0xd76a_a478, 0xe8c7_b756, 0x2420_70db, 0xc1bd_ceee, 0xf57c_0faf, 0x4787_c62a, 0xa830_4613, 0xfd46_9501,
        0x6980_98d8, 0x8b44_f7af, 0xffff_5bb1, 0x895c_d7be, 0x6b90_1122, 0xfd98_7193, 0xa679_438e, 0x49b4_0821,
    ],
    [
        0xf61e_2562, 0xc040_b340, 0x265e_5a51, 0xe9b6_c7aa, 0xd62f_105d, 0x0244_1453, 0xd8a1_e681, 0xe7d3_fbc8,
        0x21e1_cde6, 0xc337_07d6, 0xf4d5_0d87, 0x455a_14ed, 0xa9e3_e905, 0xfcef_a3f8, 0x676f_02d9, 0x8d2a_4c8a,
    ],
    [
        0xfffa_3942, 0x8771_f681, 0x6d9d_6122, 0xfde5_380c, 0xa4be_ea44, 0x4bde_cfa9, 0xf6bb_4b60, 0xbebf_bc70,
        0x289b_7ec6, 0xeaa1_27fa, 0xd4ef_3085, 0x0488_1d05, 0xd9d4_d039, 0xe6db_99e5, 0x1fa2_7cf8, 0xc4ac_5665,
    ],
    [
        0xf429_2244, 0x432a_ff97, 0xab94_23a7, 0xfc93_a039, 0x655b_59c3, 0x8f0c_cc92, 0xffef_f47d, 0x8584_5dd1,
        0x6fa8_7e4f, 0xfe2c_e6e0, 0xa301_4314, 0x4e08_11a1, 0xf753_7e82, 0xbd3a_f235, 0x2ad7_d2bb, 0xeb86_d391,
    ],
];
pub(super) const ROTATIONS: [[u32; 4]; 4] =
    [[7, 12, 17, 22], [5, 9, 14, 20], [4, 11, 16, 23], [6, 10, 15, 21]];

/// Hashes one block into each of four states.
#[inline]
fn block(states: &mut [u32x4; 4], blocks: [&[u8; 64]; 4]) {
    let [first, second, third, fourth] = blocks;
    let mut words = [u32x4::ZERO; 16];
    for (nth, word) in words.iter_mut().enumerate() {
        let lane = |block: &[u8; 64]| {
            let at = 4 * nth;
            u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
        };
        *word = u32x4::new([lane(first), lane(second), lane(third), lane(fourth)]);
    }
    let [mut a, mut b, mut c, mut d] = *states;
    macro_rules! step {
        ($round:literal, $step:literal) => {
            let (mixed, word) = match $round {
                0 => (d ^ (b & (c ^ d)), $step),
                1 => (c ^ (d & (b ^ c)), (5 * $step + 1) % 16),
                2 => (b ^ c ^ d, (3 * $step + 5) % 16),
                _ => (c ^ (b | !d), (7 * $step) % 16),
            };
            let rotation = const { ROTATIONS[$round][$step % 4] };
            // What is known beforehand first: the rest of the step waits for `mixed`.
            let sum = (a + (words[word] + u32x4::splat(SINES[$round][$step]))) + mixed;
            (a, b, c, d) = (d, ((sum << rotation) | (sum >> (32 - rotation))) + b, b, c);
        };
    }
    macro_rules! round {
        ($round:literal: $($step:literal)*) => { $(step!($round, $step);)* };
    }
    round!(0: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    round!(1: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    round!(2: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    round!(3: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    let [before_a, before_b, before_c, before_d] = *states;
    *states = [before_a + a, before_b + b, before_c + c, before_d + d];
}

/// Hashes blocks into four states, as many as all four have.
pub(super) fn blocks(states: &mut [[u32; 4]; 4], [first, second, third, fourth]: [&[[u8; 64]]; 4]) {
    let mut words = [u32x4::ZERO; 4];
    for (nth, word) in words.iter_mut().enumerate() {
        *word = u32x4::new(states.map(|state| state[nth]));
    }
    let count = first.len().min(second.len()).min(third.len()).min(fourth.len());
    for nth in 0..count {
        block(&mut words, [&first[nth], &second[nth], &third[nth], &fourth[nth]]);
    }
    let words = words.map(u32x4::to_array);
    *states = std::array::from_fn(|lane| words.map(|word| word[lane]));
}
