//! Archives in repositories of restic: deduplicated, compressed, encrypted, and on every backend that restic has.
//!
//! Each file of an archive is a restic snapshot of its own, with its path and the tag `snapwarden`. A copy exists by the snapshot
//! of its manifest, which is written last and names the image's tree: restic saves a snapshot of a cut image, too, if this
//! program is killed, and that one has no manifest. Anybody with restic and the password can restore a copy without this
//! program: `restic dump <snapshot> <path>`.
//!
//! What is built on was measured with restic 0.14: see `docs/archives.md`.

pub mod archive;
pub mod error;
mod existing;
pub(crate) mod files;
pub mod repository;
mod sink;
#[cfg(test)]
pub(in crate::archive) mod tests;
