//! The claim of this target's name, for any bytes.
#![no_main]

mod claims;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    claims::claim(env!("CARGO_BIN_NAME"))(bytes);
});
