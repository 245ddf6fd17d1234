//! Archives: exported images, each of which counts as a copy only once it is verified.
//!
//! An **image** is the qcow2 file that an export of a snapshot gives. A **copy** is an image in an archive with
//! its **manifest** beside it. It is **verified**: the MD5 of every byte is the one that the API gave, the
//! length fits, and the file is a valid qcow2 image. The manifest is written last, so there is never one
//! beside an unverified image, whenever the program or the machine stops.
//!
//! [`store`] downloads an image ([`transfer`]) into all archives that lack it, has it verified by its MD5 ([`md5`]) and its
//! structure ([`qcow2`]), and published under the names of [`layout`] with a [`manifest`]. An archive ([`backend`]) is a
//! folder ([`local`], whose `journal` says what can be resumed), a prefix in a bucket ([`s3`]), or a repository of restic
//! ([`restic`]).
//! [`catalogue`] reads an archive back, and [`stats`] adds it up: there is no database beside it, though a [`manifest_cache`]
//! spares reading what has not changed. [`copy_reader`] reads a
//! copy's bytes again, for a restore; [`verify`] does to check them, and [`manifest_update`] records the result. [`proof`] is the value without which a snapshot whose export is
//! required is not deleted; no other module can make one. By the [`marker`] an archive differs from an empty folder.
//!
//! Left to others: asking the service for an export and talking HTTP (`run` makes a source of the client), and
//! which snapshots need a copy (`retention`).

pub mod backend;
pub mod catalogue;
pub mod copy_reader;
mod journal;
pub mod layout;
pub mod local;
pub mod manifest;
pub mod manifest_cache;
pub mod manifest_update;
pub mod marker;
pub mod md5;
pub mod proof;
pub mod qcow2;
pub mod restic;
pub mod s3;
pub mod stats;
pub mod store;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests {
    pub(in crate::archive) mod contract;
}
pub mod transfer;
pub mod verify;
