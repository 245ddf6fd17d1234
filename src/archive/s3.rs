//! An archive in a bucket of any store that speaks S3.
//!
//! The keys are those of a local archive's files, below the archive's prefix. An image is uploaded in parts while it is
//! downloaded (`upload`), and becomes visible only once it is verified; its manifest is written last. An upload that was
//! interrupted is resumed; those that are not resumed are aborted after two days. What the bucket holds is read from its listing and its manifests by the
//! same rules as a folder (`archive`); what cannot be read completely is an error, never a short list, so that nothing
//! is deleted because of it.
//!
//! From the bottom: `sign` signs, `xml` reads responses, `client` sends requests, `bucket` knows the objects of a copy and
//! the uploads of this process. The client is our own, over the seams of transport, clock and randomness, because the
//! crates for it bring an HTTP client, a clock and retries of their own, and none lists abandoned uploads.

pub mod archive;
mod bucket;
pub mod client;
pub mod credentials;
pub mod error;
pub mod memory;
mod sign;
mod upload;
pub(crate) mod versions;
mod xml;

#[cfg(test)]
pub(super) mod tests;
