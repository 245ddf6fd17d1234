//! Any bytes as a body of list-snapshots and of list-instances.
#![no_main]

mod claims;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| claims::listing(bytes));
