//! Stores: exported images, each of which counts as a copy only once it is proved.
//!
//! An **image** is the qcow2 file that an export of a snapshot gives. A **copy** is an image in an archive with
//! its **manifest** beside it. It is **verified**: the MD5 of every byte is the one that the API gave, the
//! length fits, and the file reads as a sound qcow2 image. The manifest is written last, so there is never one
//! beside an image that is not proved, whenever the program or the machine stops.
//!
//! The way of an image: [`source`] gives its bytes, [`download`] brings them in while [`md5`] hashes them,
//! [`qcow2`] reads its structure, and [`local`] publishes it under the names of `layout` with a [`manifest`].
//! [`catalogue`] reads an archive back, and [`facts`] adds it up: there is no database beside it. [`proof`] is the value without which a
//! snapshot whose export is required is not deleted; nothing outside of this room can make one.
//!
//! Left to others: asking the service for an export and talking HTTP (`run` makes a source of the client), and
//! which snapshots need a copy (`retention`).

pub mod catalogue;
pub mod download;
pub mod facts;
mod layout;
pub mod local;
pub mod manifest;
pub mod md5;
pub mod proof;
pub mod qcow2;
pub mod source;
#[cfg(test)]
mod testing;

/// Whether there is no space left, on the disk or in a quota.
fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}
