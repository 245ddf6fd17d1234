//! What crosses rooms: one binary, a module a subject.
#![expect(clippy::unwrap_used, reason = "a test that meets what it did not expect should panic")]

mod client;
mod config_files;
mod simulated_zone;
mod vendor_client;
