//! The parts in which an image is sent to a store, and the MD5 of each.
//!
//! They are computed beside that of the whole, by the thread that sees every byte anyway: together they take little more time
//! than one. Who sends a part waits for its MD5, which comes as soon as its last byte was hashed.

use std::ops::Range;

use tokio::sync::watch;

use crate::archive::md5::{Md5, Md5Sum};

const MIB: u64 = 1 << 20;

/// The smallest part. S3 takes no less than 5 MiB but for the last one, and each request costs time and money.
const PART_BYTES_MIN: u64 = 8 * MIB;

/// The most parts of an upload, by Amazon's "Amazon S3 multipart upload limits"; Exoscale's store has the same limit.
pub(crate) const PARTS_MAX: usize = 10_000;

/// The most parts that an image of known length is cut into: fewer than [`PARTS_MAX`], in case it is longer than announced.
const PARTS_PLANNED: u64 = 9000;

/// While the length is not known, parts double in size after this many: ten thousand hold 8 TiB then, more than any store
/// takes as one object.
const PARTS_OF_A_SIZE: u64 = 1000;

/// Where the part of this number, which counts from zero, ends that begins at this byte. The last one may end earlier. All
/// begin at whole MiB, so that the MD5 of a part fills its blocks at the same bytes as that of the whole.
pub(crate) fn part_range(number: usize, start: u64, whole: Option<u64>) -> Range<u64> {
    let bytes = match whole {
        Some(bytes) => bytes.div_ceil(PARTS_PLANNED).next_multiple_of(MIB).max(PART_BYTES_MIN),
        None => PART_BYTES_MIN << (number as u64 / PARTS_OF_A_SIZE).min(9),
    };
    start..start.saturating_add(bytes)
}

/// The MD5s of an image's parts, as they become known. Clones are the same.
#[derive(Debug, Clone)]
pub struct PartSums {
    /// The length of the image by which it was cut.
    pub(crate) whole: Option<u64>,
    known: watch::Receiver<Vec<Md5Sum>>,
}

impl PartSums {
    /// The MD5 of the part of this number, as soon as it is known; none if the image is not hashed any more.
    pub(crate) async fn of(&self, number: usize) -> Option<Md5Sum> {
        let mut sums = self.known.clone();
        let known = sums.wait_for(|sums| sums.len() > number).await.ok()?;
        known.get(number).copied()
    }
}

/// Hashes the parts of an image beside the whole.
pub(crate) struct PartHasher {
    whole: Option<u64>,
    /// The part at hand.
    part: Range<u64>,
    md5: Md5,
    at: u64,
    sums: watch::Sender<Vec<Md5Sum>>,
}

impl PartHasher {
    /// For an image of this length, from its first byte on.
    pub(crate) fn new(whole: Option<u64>) -> (Self, PartSums) {
        let (sums, known) = watch::channel(Vec::new());
        (
            Self { whole, part: part_range(0, 0, whole), md5: Md5::new(), at: 0, sums },
            PartSums { whole, known },
        )
    }

    /// Hashes the next bytes, of the whole too.
    pub(crate) fn update(&mut self, whole: &mut Md5, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let left = usize::try_from(self.part.end - self.at).unwrap_or(usize::MAX);
            let (next, rest) = bytes.split_at(bytes.len().min(left));
            Md5::update_both(whole, &mut self.md5, next);
            self.at += next.len() as u64;
            if self.at == self.part.end || Some(self.at) == self.whole {
                self.end_part();
            }
            bytes = rest;
        }
    }

    /// There are no more bytes.
    pub(crate) fn finish(&mut self) {
        let is_begun = self.at > self.part.start;
        // An empty image has one part.
        if is_begun || self.sums.borrow().is_empty() {
            self.end_part();
        }
    }

    fn end_part(&mut self) {
        let md5 = std::mem::replace(&mut self.md5, Md5::new()).finish();
        let mut number = 0;
        self.sums.send_modify(|sums| {
            sums.push(md5);
            number = sums.len();
        });
        self.part = part_range(number, self.at, self.whole);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(whole: Option<u64>, count: usize) -> Vec<u64> {
        (0..count).map(|number| part_range(number, 0, whole).end).collect()
    }

    #[test]
    fn parts_are_as_few_as_a_store_takes_and_as_small_as_that_allows() {
        const GIB: u64 = 1 << 30;
        assert_eq!(lengths(Some(1), 1), [8 << 20]);
        assert_eq!(part_range(9000, 5, Some(70 * GIB)), 5..5 + (8 << 20));
        for whole in [GIB, 71 * GIB, 1024 * GIB, 4096 * GIB] {
            let part = part_range(0, 0, Some(whole)).end;
            assert!(whole.div_ceil(part) <= PARTS_PLANNED && part <= 5 * GIB, "{whole}: {part}");
            assert_eq!(part % MIB, 0);
        }
        // Unknown: at 8 GiB parts double, and ten thousand hold more than any store takes.
        let all = lengths(None, PARTS_MAX);
        assert_eq!([0, 999, 1000, 2500].map(|number| all[number] >> 20), [8, 8, 16, 32]);
        assert!(all.iter().sum::<u64>() > 4096 * GIB && all[PARTS_MAX - 1] <= 5 * GIB);
    }

    #[tokio::test]
    async fn each_part_has_the_md5_that_it_has_alone() {
        let image: Vec<u8> = (0..20 * MIB).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect();
        let alone = |bytes: &[u8]| {
            let mut md5 = Md5::new();
            md5.update(bytes);
            md5.finish()
        };
        for whole in [Some(20 * MIB), None] {
            let (mut parts, sums) = PartHasher::new(whole);
            let mut md5 = Md5::new();
            for chunk in image.chunks(700_001) {
                parts.update(&mut md5, chunk);
            }
            if whole.is_none() {
                parts.finish();
            }
            assert_eq!(md5.finish(), alone(&image));
            for (number, part) in image.chunks(8 << 20).enumerate() {
                assert_eq!(sums.of(number).await, Some(alone(part)), "{number}");
            }
            drop(parts);
            assert_eq!(sums.of(3).await, None);
        }
        let (mut empty, sums) = PartHasher::new(Some(0));
        empty.finish();
        assert_eq!(sums.of(0).await, Some(alone(b"")));
    }
}
