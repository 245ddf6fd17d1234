//! How the bytes of an image reach the archives: from a source, over one or several connections, past the hash.
//!
//! [`download`] receives the bytes and hands them to the [`hash`] and to each archive. `ranges` receives over several
//! connections at once into one [`part_file`], which the hash reads back. What blocks (disk and hash) works in a `queue` of
//! its own, beside the network; `buffer` keeps the memory flat, and [`throttle`] the rate.

pub(crate) mod buffer;
pub mod download;
pub mod hash;
pub mod part_file;
pub(crate) mod queue;
pub(crate) mod ranges;
pub mod throttle;
