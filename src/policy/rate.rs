//! Bytes per second, as people write them: `"80MiB"`.

use std::num::NonZeroU64;

use crate::text::{InvalidText, excerpt};

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

/// Reads a number of bytes with a unit.
pub(crate) fn parse_rate(text: &str) -> Result<NonZeroU64, InvalidText> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start().to_ascii_lowercase();
    let bytes = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, bytes)| *bytes);
    number
        .parse::<u64>()
        .ok()
        .zip(bytes)
        .and_then(|(number, bytes)| NonZeroU64::new(number.checked_mul(bytes)?))
        .ok_or_else(|| {
            InvalidText::new(
                format!("`{}` is not a rate", excerpt(text, 64)),
                "write a whole number and its unit for the bytes per second, such as `\"80MiB\"` or `\"500kB\"`",
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_number_with_a_unit_and_nothing_else() {
        let read = |text: &str| parse_rate(text).ok().map(NonZeroU64::get);
        assert_eq!(read("80MiB"), Some(80 << 20));
        assert_eq!(read("500kB"), Some(500_000));
        assert_eq!(read("1 gib"), Some(1 << 30));
        assert_eq!(read("7B"), Some(7));
        for bad in
            ["", "80", "MiB", "0MiB", "-1MiB", "1.5MiB", "1Mi", "1MiB/s", "99999999999GiB", " 1MiB", "1é"]
        {
            assert_eq!(read(bad), None, "{bad:?}");
            assert_eq!(parse_rate(bad).unwrap_err().fact, format!("`{bad}` is not a rate"));
        }
    }
}
