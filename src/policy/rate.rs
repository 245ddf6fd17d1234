//! Bytes per second, as people write them: `"80MiB"`.

use std::num::NonZeroU64;
use std::str::FromStr;

/// A rate, written as a number of bytes with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(pub NonZeroU64);

/// The text is no rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write a whole number and its unit for the bytes per second, such as `\"80MiB\"` or `\"500kB\"`")]
pub struct BadRate;

/// In lower case: capitals do not matter, since millibytes make no sense.
const UNITS: &[(&str, u64)] = &[
    ("b", 1),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
];

impl FromStr for Rate {
    type Err = BadRate;

    fn from_str(text: &str) -> Result<Self, BadRate> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = unit.trim_start().to_ascii_lowercase();
        let (_, bytes) = UNITS.iter().find(|(name, _)| *name == unit).ok_or(BadRate)?;
        let number: u64 = number.parse().map_err(|_| BadRate)?;
        number.checked_mul(*bytes).and_then(NonZeroU64::new).map(Self).ok_or(BadRate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_number_with_a_unit_and_nothing_else() {
        let read = |text: &str| text.parse::<Rate>().map(|rate| rate.0.get());
        assert_eq!(read("80MiB"), Ok(80 << 20));
        assert_eq!(read("500kB"), Ok(500_000));
        assert_eq!(read("1 gib"), Ok(1 << 30));
        assert_eq!(read("7B"), Ok(7));
        for bad in
            ["", "80", "MiB", "0MiB", "-1MiB", "1.5MiB", "1Mi", "1MiB/s", "99999999999GiB", " 1MiB", "1é"]
        {
            assert_eq!(read(bad), Err(BadRate), "{bad:?}");
        }
    }
}
