//! Any text as a span and as a duration.
#![no_main]

mod claims;

libfuzzer_sys::fuzz_target!(|text: &str| claims::span(text));
