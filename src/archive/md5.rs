//! The MD5 of an image: the one checksum that the API gives.
//!
//! It proves that what arrived is what was exported. It is no defence against somebody who forges both.

use std::fmt::{self, Debug, Display, Write as _};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// An MD5 in the making.
pub struct Md5(fast_md5::Md5);

impl Md5 {
    /// Of nothing yet.
    #[expect(clippy::new_without_default, reason = "a hash of nothing is no sensible default")]
    pub fn new() -> Self {
        Self(fast_md5::Md5::new())
    }

    /// Takes in what comes next.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The MD5 of all that was taken in.
    pub fn finish(self) -> Md5Sum {
        Md5Sum(self.0.finalize())
    }
}

/// A finished MD5; as text 32 hexadecimal digits, written in lower case and read in any.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Md5Sum([u8; 16]);

/// A text that is no MD5.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an MD5 has 32 hexadecimal digits")]
pub struct BadMd5;

impl FromStr for Md5Sum {
    type Err = BadMd5;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(BadMd5);
        }
        u128::from_str_radix(text, 16).map(|number| Self(number.to_be_bytes())).map_err(|_| BadMd5)
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
            assert_eq!(bad.parse::<Md5Sum>(), Err(BadMd5), "{bad:?}");
        }
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
            let expected: [u8; 16] = ::md5::Md5::digest(&bytes).into();
            prop_assert_eq!(hash.finish(), Md5Sum(expected));
        }
    }
}
