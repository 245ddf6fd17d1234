//! How the bytes of an image reach the archives: from a source, over one or several connections, past the hash.
//!
//! `download` receives the bytes and hands them to the `hash` and to the `outputs`, each an archive's `sink`.
//! `ranges` receives over several connections at once into one `part_file`, which the hash reads back. Disk and hash
//! block, so each works through a `queue` of its own, beside the network; `buffer` keeps the memory flat, and
//! `throttle` the rate.

pub(crate) mod buffer;
pub mod connection;
pub(crate) mod download;
pub(crate) mod error;
pub mod hash;
pub(crate) mod outputs;
pub mod part_file;
pub mod parts;
pub mod progress;
pub(crate) mod queue;
pub(crate) mod ranges;
pub mod sink;
pub mod source;
pub mod throttle;
