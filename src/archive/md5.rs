//! The MD5 of an image: the one checksum that the API gives.
//!
//! It verifies that the received bytes are those that were exported. It is no defence against a forger of both.

use std::fmt::{self, Debug, Display, Write as _};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

mod four;
mod two;

/// An MD5 that is being computed.
pub struct Md5 {
    state: [u32; 4],
    /// The bytes so far.
    len: u64,
    /// Begins with the bytes that do not fill a block yet.
    block: [u8; BLOCK],
}

const BLOCK: usize = fast_md5::BLOCK_SIZE;

impl Md5 {
    /// Of nothing yet.
    #[expect(clippy::new_without_default, reason = "a hash of nothing is no sensible default")]
    pub fn new() -> Self {
        // RFC 1321, 3.3.
        Self { state: [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476], len: 0, block: [0; BLOCK] }
    }

    /// Hashes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        let (blocks, rest) = self.head(bytes).as_chunks();
        self.blocks(blocks);
        self.rest(rest);
    }

    /// Hashes the next bytes of several images. Three or four are hashed together, in less than twice the time of one.
    pub fn update_together(each: &mut [(&mut Self, &[u8])]) {
        for four in each.chunks_mut(4) {
            for (md5, bytes) in four.iter_mut() {
                *bytes = md5.head(bytes);
            }
            let common = four.iter().map(|(_, bytes)| bytes.len() / BLOCK).min().unwrap_or(0);
            if let [first, _, third @ ..] = &*four
                && !third.is_empty()
            {
                // Where there is no fourth, the first is computed twice.
                let lane = |lane: usize| four.get(lane).unwrap_or(first);
                let mut states = std::array::from_fn(|nth| lane(nth).0.state);
                four::blocks(&mut states, std::array::from_fn(|nth| &lane(nth).1.as_chunks().0[..common]));
                for ((md5, bytes), state) in four.iter_mut().zip(states) {
                    md5.state = state;
                    md5.len += (common * BLOCK) as u64;
                    *bytes = &bytes[common * BLOCK..];
                }
            }
            for (md5, bytes) in four {
                md5.update(bytes);
            }
        }
    }

    /// Hashes the same next bytes for two, in little more than the time of one, if both have as many bytes in their last
    /// block.
    pub fn update_both(first: &mut Self, second: &mut Self, bytes: &[u8]) {
        // In a build that is not optimised the steps in pairs take many times as long.
        if first.begun() == second.begun() && !cfg!(debug_assertions) {
            return Self::update_in_pairs(first, second, bytes);
        }
        first.update(bytes);
        second.update(bytes);
    }

    /// The same, where both have as many bytes in their last block.
    fn update_in_pairs(first: &mut Self, second: &mut Self, bytes: &[u8]) {
        let (blocks, rest) = first.head(bytes).as_chunks();
        second.head(bytes);
        let mut states = [first.state, second.state];
        two::blocks(&mut states, blocks);
        for (md5, state) in [first, second].into_iter().zip(states) {
            md5.state = state;
            md5.len += blocks.as_flattened().len() as u64;
            md5.rest(rest);
        }
    }

    /// Fills up the block that was begun; returns the rest of `bytes`.
    fn head<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let begun = self.begun();
        if begun == 0 {
            return bytes;
        }
        let (head, left) = bytes.split_at(bytes.len().min(BLOCK - begun));
        self.block[begun..begun + head.len()].copy_from_slice(head);
        self.len += head.len() as u64;
        if self.begun() == 0 {
            fast_md5::transform(&mut self.state, &self.block);
        }
        left
    }

    fn blocks(&mut self, blocks: &[[u8; BLOCK]]) {
        for block in blocks {
            fast_md5::transform(&mut self.state, block);
        }
        self.len += blocks.as_flattened().len() as u64;
    }

    /// The MD5 of all bytes.
    pub fn finish(mut self) -> Md5Sum {
        let bits = self.len.wrapping_mul(8).to_le_bytes();
        // RFC 1321, 3.1 and 3.2: a bit, zeros up to the last eight bytes of a block, and the length in them.
        let mut padding = [0; BLOCK];
        padding[0] = 0x80;
        let begun = self.begun();
        self.update(&padding[..if begun < 56 { 56 - begun } else { 120 - begun }]);
        self.update(&bits);
        let mut sum = [0; 16];
        for (bytes, word) in sum.as_chunks_mut().0.iter_mut().zip(self.state) {
            *bytes = word.to_le_bytes();
        }
        Md5Sum(sum)
    }

    /// The number of bytes in the block that was begun.
    #[expect(clippy::cast_possible_truncation, reason = "a block is short")]
    fn begun(&self) -> usize {
        (self.len % BLOCK as u64) as usize
    }

    /// Begins a block.
    fn rest(&mut self, rest: &[u8]) {
        if !rest.is_empty() {
            self.block[..rest.len()].copy_from_slice(rest);
            self.len += rest.len() as u64;
        }
    }
}
/// A finished MD5; as text 32 hexadecimal digits, written in lower case and read in any.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Md5Sum([u8; 16]);

impl Md5Sum {
    /// Its bytes, in the order in which they are written.
    pub(crate) fn bytes(self) -> [u8; 16] {
        self.0
    }
}

const BAD_MD5: &str = "an MD5 has 32 hexadecimal digits";

impl FromStr for Md5Sum {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(BAD_MD5);
        }
        u128::from_str_radix(text, 16).map(|number| Self(number.to_be_bytes())).map_err(|_| BAD_MD5)
    }
}

impl Display for Md5Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::with_capacity(32);
        for byte in self.0 {
            write!(text, "{byte:02x}")?;
        }
        f.pad(&text)
    }
}

impl Debug for Md5Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Md5Sum({self})")
    }
}

impl Serialize for Md5Sum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Md5Sum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::md5::Digest as _;
    use proptest::prelude::*;

    #[test]
    fn text_is_read_in_any_case_and_nothing_else_is_an_md5() {
        let text = "D41D8CD98F00b204e9800998ecf8427e";
        assert_eq!(text.parse::<Md5Sum>().unwrap(), Md5::new().finish());
        assert_eq!(Md5::new().finish().to_string(), text.to_lowercase());
        for bad in ["", " ", "d41d8cd9", "+41d8cd98f00b204e9800998ecf8427e", &"g".repeat(32), &"é".repeat(16)]
        {
            assert_eq!(bad.parse::<Md5Sum>(), Err(BAD_MD5), "{bad:?}");
        }
    }

    fn oracle(bytes: &[u8]) -> Md5Sum {
        Md5Sum(::md5::Md5::digest(bytes).into())
    }

    proptest! {
        #[test]
        fn it_is_the_md5_however_the_bytes_are_split(
            bytes in proptest::collection::vec(any::<u8>(), 0..3000),
            cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.sort_unstable();
            let mut hash = Md5::new();
            let mut at = 0;
            for cut in cuts {
                hash.update(&bytes[at..cut]);
                at = cut;
            }
            hash.update(&bytes[at..]);
            prop_assert_eq!(hash.finish(), oracle(&bytes));
        }

        #[test]
        fn two_of_the_same_bytes_are_each_what_they_are_alone(
            heads in [0..200_usize, 0..200],
            cut in 0..600_usize,
            bytes in proptest::collection::vec(any::<u8>(), 800),
        ) {
            // Often the same head, as parts of an image have it.
            for heads in [heads, [heads[0]; 2], [heads[0], heads[0] % 64]] {
                let [mut first, mut second] = heads.map(|head| {
                    let mut md5 = Md5::new();
                    md5.update(&bytes[..head]);
                    md5
                });
                let (one, other) = bytes[200..].split_at(cut);
                let update = if first.begun() == second.begun() { Md5::update_in_pairs } else { Md5::update_both };
                update(&mut first, &mut second, one);
                update(&mut first, &mut second, other);
                for (md5, head) in [(first, heads[0]), (second, heads[1])] {
                    prop_assert_eq!(md5.finish(), oracle(&[&bytes[..head], &bytes[200..]].concat()));
                }
            }
        }

        #[test]
        fn several_at_once_are_each_what_they_are_alone(
            heads in proptest::collection::vec((0..200_usize, 0..600_usize), 0..7),
            bytes in proptest::collection::vec(any::<u8>(), 800),
        ) {
            let mut hashes: Vec<_> = heads.iter().map(|_| Md5::new()).collect();
            let mut together = Vec::new();
            for (hash, (head, len)) in hashes.iter_mut().zip(&heads) {
                hash.update(&bytes[..*head]);
                together.push((hash, &bytes[*head..head + len]));
            }
            Md5::update_together(&mut together);
            for (hash, (head, len)) in hashes.into_iter().zip(heads) {
                prop_assert_eq!(hash.finish(), oracle(&bytes[..head + len]));
            }
        }
    }
}
