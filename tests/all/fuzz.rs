//! A short cut of the fuzz targets, of a fixed seed: tens of thousands of inputs that are nearly right.

#[path = "../fuzz/claims.rs"]
mod claims;

/// Numbers of a fixed seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % end.max(1)
    }

    fn pick<'t>(&mut self, list: &[&'t str]) -> &'t str {
        list[self.below(list.len())]
    }

    /// A range within `length` bytes.
    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        start..start + self.below((length - start).min(24) + 1)
    }

    /// One of the texts, changed in a few places: bytes and pieces removed, doubled, inserted, or taken from another.
    fn nearly(&mut self, texts: &[&str], pieces: &[&str]) -> Vec<u8> {
        let mut bytes = self.pick(texts).as_bytes().to_vec();
        for _ in 0..self.below(4) {
            let range = self.range(bytes.len());
            let piece = match self.below(6) {
                0 => Vec::new(),
                1 => bytes[range.clone()].repeat(2),
                2 => {
                    let other = self.pick(texts).as_bytes();
                    other[self.range(other.len())].to_vec()
                }
                3 => vec![u8::try_from(self.below(256)).unwrap()],
                _ => self.pick(pieces).as_bytes().to_vec(),
            };
            bytes.splice(range, piece);
        }
        if self.below(20) == 0 {
            bytes.truncate(self.below(bytes.len() + 1));
        }
        bytes
    }
}

#[test]
fn no_listing_is_too_strange() {
    let texts = [
        r#"{"snapshots":[{"id":"b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105","name":"web-1_ROOT-1_20261101023000","created-at":"2026-11-01T02:30:00Z","state":"exported","size":50,"application-consistent":false,"instance":{"id":"9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec"},"export":{"presigned-url":"https://x","md5sum":"9e10"}},{"id":"b0c0ef2c-106a-4f3c-a5aa-5e6176d0f106","created-at":"2026-10-25T02:30:00.5+02:00","instance":{"id":"9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec","name":"web-1","labels":{"a":"b"},"template":{"id":"b0c0ef2c-106a-4f3c-a5aa-5e6176d0f107"}}}]}"#,
        r#"{"snapshots":[{"id":"b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105","created-at":"2026-11-01T02:30:00Z"}]}"#,
        r#"{"snapshots":null,"other":[{"a":[1,2.5e3,"\u001b\ud83d\ude00"]}]}"#,
        r#"{"instances":[{"id":"9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec","name":"web-1","labels":{"backup":"nightly"}},{"id":"9ee8cb98-ea6e-4d57-bdde-b85d8bc959ed","name":null,"labels":null,"template":{}}]}"#,
    ];
    let pieces = [
        "null",
        "{}",
        "[]",
        "\"\"",
        "-1",
        "1e999",
        "18446744073709551616",
        "true",
        ",",
        ":",
        "{",
        "}",
        "[",
        "]",
        "\"snapshots\":",
        "\"instances\":",
        "\"id\":",
        "\"created-at\":\"",
        "\"state\":\"",
        "\"size\":",
        "\"instance\":",
        "\"name\":\"\u{1b}[2J",
        "\\u0000",
        "\\ud800",
        "é",
        "\u{202e}",
        "2026-02-30T00:00:00Z",
        "2026-11-01T02:30:60Z",
        "9999-12-31T23:59:59Z",
        "-009999-01-01T00:00:00Z",
        "+24:00",
        "00000000-0000-0000-0000-000000000000",
        "<html>",
    ];
    let mut dice = Dice(4);
    let read = (0..20_000).filter(|_| claims::listing(&dice.nearly(&texts, &pieces))).count();
    // Enough of both kinds, else this would show nothing.
    assert!((3_000..17_000).contains(&read), "{read}");
}

#[test]
fn no_span_is_too_strange() {
    let texts =
        ["100ms", "90s", "45m", "36h", "14d", "8w", "6mo", "2y", "1y1d1mo", "1000y", "366000d", "12000mo"];
    let pieces = [
        "0",
        "00",
        "1",
        "9",
        "99999",
        "18446744073709551615",
        "y",
        "mo",
        "w",
        "d",
        "h",
        "m",
        "s",
        "ms",
        "-",
        "+",
        ".",
        " ",
        "é",
        "٣",
        "\u{1b}",
        "\u{202e}",
        "M",
        "min",
        "PT1H",
        "_",
    ];
    let mut dice = Dice(4);
    let mut read = 0;
    for _ in 0..20_000 {
        let text = String::from_utf8_lossy(&dice.nearly(&texts, &pieces)).into_owned();
        read += usize::from(claims::span(&text));
    }
    assert!((3_000..17_000).contains(&read), "{read}");
}
