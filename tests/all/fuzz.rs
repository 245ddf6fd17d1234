//! A short cut of the fuzz targets, of a fixed seed: thousands of inputs that are nearly right.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use crate::stage::files;

#[path = "../fuzz/claims.rs"]
mod claims;

/// What is put into a text to make it wrong.
const PIECES: [&str; 64] = [
    "null",
    "{}",
    "[]",
    "\"\"",
    "''",
    "-1",
    "0",
    "00",
    "1",
    "9",
    "99999",
    "1e999",
    "18446744073709551615",
    "18446744073709551616",
    "true",
    ",",
    ":",
    "{",
    "}",
    "[",
    "]",
    "\"",
    "\\u0000",
    "\\ud800",
    "\u{1b}[2J",
    "\u{202e}",
    "é",
    "٣",
    "\0",
    "\r\n",
    "\n",
    " ",
    "\t",
    "#",
    "=",
    "*",
    "/",
    "-",
    "+",
    ".",
    "%",
    "%00",
    "&",
    "&a",
    "*a",
    "!t",
    "<",
    ">",
    "</",
    "<!DOCTYPE a [<!ENTITY x \"y\">]>",
    "&x;",
    "<html>",
    "../../etc",
    "2026-02-30T00:00:00Z",
    "2026-11-01T02:30:60Z",
    "9999-12-31T23:59:59Z",
    "-009999-01-01T00:00:00Z",
    "00000000-0000-0000-0000-000000000000",
    "\"id\":",
    "\"version\":",
    "mo",
    "W",
    "L",
    "Content-Length: 99\r\n",
];

/// Numbers of a fixed seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % end.max(1)
    }

    /// A range within `length` bytes.
    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        start..start + self.below((length - start).min(24) + 1)
    }

    /// One of the seeds, changed in a few places: bytes and pieces removed, doubled, inserted, or taken from another.
    fn nearly(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = seeds[self.below(seeds.len())].clone();
        for _ in 0..self.below(4) {
            let range = self.range(bytes.len());
            let piece = match self.below(7) {
                0 => Vec::new(),
                1 => bytes[range.clone()].repeat(2),
                2 => {
                    let other = &seeds[self.below(seeds.len())];
                    other[self.range(other.len())].to_vec()
                }
                3 => vec![u8::try_from(self.below(256)).unwrap()],
                // Longer than what is shown.
                4 if self.below(20) == 0 => b"a".repeat(5_000),
                _ => PIECES[self.below(PIECES.len())].as_bytes().to_vec(),
            };
            bytes.splice(range, piece);
        }
        if self.below(20) == 0 {
            bytes.truncate(self.below(bytes.len() + 1));
        }
        bytes
    }
}

/// Tries a claim on this many inputs, and on its seeds; `SNAPWARDEN_FUZZ` times as many if that is set.
fn try_claim(name: &str, inputs: usize) {
    let claim = claims::claim(name);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds").join(name);
    let seeds: Vec<Vec<u8>> = files(&folder).into_iter().map(|(_, bytes)| bytes).collect();
    let times = std::env::var("SNAPWARDEN_FUZZ").map_or(1, |times| times.parse().unwrap());
    let mut dice = Dice(4);
    let mutated = (0..inputs * times).map(|_| dice.nearly(&seeds)).collect::<Vec<_>>();
    let mut read = 0;
    for bytes in seeds.iter().chain(&mutated) {
        // The input, before the panic goes on.
        read += usize::from(catch_unwind(AssertUnwindSafe(|| claim(bytes))).unwrap_or_else(|panic| {
            let shown = bytes.escape_ascii();
            let _ = std::io::Write::write_fmt(
                &mut std::io::stderr(),
                format_args!("{name}: the input was {shown}\n"),
            );
            resume_unwind(panic)
        }));
    }
    // Some of both kinds, else this would show nothing.
    let all = seeds.len() + mutated.len();
    assert!(read * 50 > all && (all - read) * 50 > all, "{name}: {read} of {all} were read");
}

macro_rules! short_cuts {
    ($($test:ident: $name:literal, $inputs:literal;)*) => {
        $(#[test]
        fn $test() {
            try_claim($name, $inputs);
        })*

        #[test]
        fn every_claim_has_its_short_cut_and_its_target() {
            let tried = [$($name),*];
            assert_eq!(tried, claims::CLAIMS.map(|(name, _)| name));
            let package = include_str!("../fuzz/Cargo.toml");
            let targets: Vec<&str> = package.split("[[bin]]\nname = \"").skip(1).collect();
            assert_eq!(targets.len(), tried.len());
            assert!(targets.iter().zip(tried).all(|(target, name)| target.starts_with(&format!("{name}\""))));
        }
    };
}

short_cuts! {
    no_response_of_the_api_is_too_strange: "api", 400;
    no_marker_and_no_manifest_in_an_archive_is_too_strange: "archive", 400;
    no_configuration_is_too_strange: "configuration", 300;
    no_cron_line_is_too_strange: "cron", 100;
    no_journal_of_a_download_is_too_strange: "journal", 50;
    no_listing_is_too_strange: "listing", 5_000;
    no_manifest_is_too_strange: "manifest", 2_000;
    no_request_to_the_port_is_too_strange: "port", 200;
    no_image_is_too_strange: "qcow2", 300;
    no_content_range_is_too_strange: "range", 5_000;
    no_output_of_restic_is_too_strange: "restic", 400;
    no_response_of_a_bucket_is_too_strange: "s3", 400;
    no_span_is_too_strange: "span", 5_000;
    no_state_file_is_too_strange: "state", 200;
    no_web_configuration_file_is_too_strange: "web", 500;
}
