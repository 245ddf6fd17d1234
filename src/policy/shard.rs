//! Shards: several processes, each with a state directory of its own, that divide the instances among them.

use std::fmt::{self, Display};
use std::num::NonZeroU32;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::snapshot::{InstanceId, Snapshot, SnapshotId};
use crate::text::{InvalidText, excerpt};

/// More shards than this are a mistake: each lists the zones.
const SHARDS_MAX: u32 = 1000;

/// One of several parts of the instances, such as `0/4`.
///
/// An instance belongs to the shard that the jump consistent hash of Lamping and Veach (arXiv:1406.2294) chooses for the first
/// eight bytes, big-endian, of the SHA-256 of its id in lower-case text. With one shard more, only as many instances move as
/// the new one gets. This never changes: with another function the states of all shards would be of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Shard {
    /// From 0.
    index: u32,
    /// How many shards there are.
    of: NonZeroU32,
}

impl Shard {
    /// Number `index` of `count`, counted from 0.
    ///
    /// # Errors
    /// A number that is not one of these, or too many shards.
    pub fn new(index: u32, of: u32) -> Result<Self, InvalidText> {
        let wrong = |fact: String| InvalidText::new(fact, "write I/N with I from 0 to N - 1, such as `0/4`");
        let count = NonZeroU32::new(of).filter(|of| of.get() <= SHARDS_MAX);
        let Some(count) = count else {
            return Err(wrong(format!("{of} shards are not possible: 1 to {SHARDS_MAX} are")));
        };
        if index >= of {
            return Err(wrong(format!(
                "there is no shard {index} of {of}: the first is 0, the last {}",
                of - 1
            )));
        }
        Ok(Self { index, of: count })
    }

    /// Whether it is number 0.
    pub fn is_first(self) -> bool {
        self.index == 0
    }

    /// How many shards there are.
    pub fn count(self) -> NonZeroU32 {
        self.of
    }

    /// Whether an instance belongs to it.
    pub fn has(self, instance: InstanceId) -> bool {
        self.of(instance) == self
    }

    /// Whether a snapshot belongs to it: with its instance, also if that is not listed any more, and by its own id if it has
    /// none.
    pub fn has_snapshot(self, snapshot: &Snapshot) -> bool {
        self.has_of(snapshot.id, snapshot.instance_id)
    }

    /// As [`Self::has_snapshot`].
    pub(crate) fn has_of(self, snapshot: SnapshotId, instance: Option<InstanceId>) -> bool {
        self.has(instance.unwrap_or(InstanceId(snapshot.0)))
    }

    /// The one of these shards to which an instance belongs.
    #[must_use]
    pub fn of(self, instance: InstanceId) -> Self {
        Self { index: jump(key(instance.0), self.of.get()), ..self }
    }
}

/// The number of an id.
fn key(id: Uuid) -> u64 {
    let digest = Sha256::digest(id.hyphenated().to_string());
    digest.iter().take(8).fold(0, |number, byte| (number << 8) | u64::from(*byte))
}

/// The jump consistent hash, as in the paper.
fn jump(mut key: u64, buckets: u32) -> u32 {
    let (mut bucket, mut next) = (0, 0.0);
    while next < f64::from(buckets) {
        // Below `buckets`, so it is a whole number that fits.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 <= next < 2^32")]
        let chosen = next as u32;
        bucket = chosen;
        key = key.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(1);
        #[expect(clippy::cast_precision_loss, reason = "at most 2^31")]
        let part = ((key >> 33) + 1) as f64;
        next = (f64::from(bucket) + 1.0) * (2_147_483_648.0 / part);
        next = next.floor();
    }
    bucket
}

impl Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

impl From<Shard> for String {
    fn from(shard: Shard) -> Self {
        shard.to_string()
    }
}

impl TryFrom<String> for Shard {
    type Error = InvalidText;

    fn try_from(text: String) -> Result<Self, InvalidText> {
        text.parse()
    }
}

impl FromStr for Shard {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let numbers =
            text.split_once('/').and_then(|(index, of)| Some((index.parse().ok()?, of.parse().ok()?)));
        let Some((index, of)) = numbers else {
            return Err(InvalidText::new(
                format!("`{}` is no shard", excerpt(text, 32)),
                "write I/N with I from 0 to N - 1, such as `0/4`",
            ));
        };
        Self::new(index, of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fleet: ids as random as those of a cloud, the same each time.
    fn ids(count: u64) -> impl Iterator<Item = InstanceId> {
        (0..count).map(|number| {
            let digest = Sha256::digest(number.to_be_bytes());
            let bytes: [u8; 16] = digest[..16].try_into().unwrap();
            InstanceId(uuid::Builder::from_random_bytes(bytes).into_uuid())
        })
    }

    #[test]
    fn a_hundred_thousand_instances_are_spread_evenly_over_fifty_shards_each_in_one() {
        let shards: Vec<Shard> = (0..50).map(|index| Shard::new(index, 50).unwrap()).collect();
        let mut load = vec![0_u32; shards.len()];
        for (number, id) in ids(100_000).enumerate() {
            let chosen = shards[0].of(id);
            load[chosen.index as usize] += 1;
            // Asked one by one, too, for some.
            if number % 100 == 0 {
                assert_eq!(shards.iter().filter(|shard| shard.has(id)).count(), 1);
                assert!(chosen.has(id));
            }
        }
        assert_eq!(load.iter().sum::<u32>(), 100_000);
        let most = f64::from(*load.iter().max().unwrap());
        assert!(most <= 1.15 * 2000.0, "{load:?}");
    }

    #[test]
    fn one_shard_more_moves_only_what_it_gets() {
        let [before, after] = [50, 51].map(|of| Shard::new(0, of).unwrap());
        let moved = ids(20_000).filter(|id| before.of(*id).index != after.of(*id).index);
        let to: Vec<u32> = moved.map(|id| after.of(id).index).collect();
        assert!(to.iter().all(|index| *index == 50));
        assert!(to.len() < 2 * 20_000 / 51, "{}", to.len());
    }

    #[test]
    fn the_shards_of_these_instances_never_change() {
        let ids = ["00000000-0000-0000-0000-000000000000", "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec"];
        let shards = |of| {
            let shard = Shard::new(0, of).unwrap();
            ids.map(|id| shard.of(InstanceId(id.parse().unwrap())).index)
        };
        // By a program of a few lines in Python, from the paper.
        assert_eq!([shards(1), shards(4), shards(50), shards(1000)], [[0, 0], [1, 3], [8, 6], [72, 512]]);
    }

    #[test]
    fn only_a_shard_that_there_is_can_be_named() {
        assert_eq!("3/4".parse::<Shard>().unwrap().to_string(), "3/4");
        for wrong in ["", "4/4", "1/0", "-1/4", "0/1001", "1", "1/2/3", "a/b", "0/4294967296"] {
            assert!(wrong.parse::<Shard>().is_err(), "{wrong}");
        }
    }
}
