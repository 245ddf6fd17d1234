//! Restores a verified copy: to a new file, or to a template.
//!
//! [`find`] decides which copies serve, [`copy`] reads one of them again, verifies it and writes it to a [`file`], a
//! [`stream`] or a bucket, and [`template`] registers a template of a copy in a bucket. Archives are only read, except that a copy from a
//! folder is stored in a bucket on its way to a template, and stays there: the platform fetches a template's image from
//! a URL. [`in_place`] takes an existing instance back: to a snapshot,
//! or to such a template. [`rebuild`] gives the commands that build the whole instance again.

pub mod copy;
pub mod error;
mod file;
pub mod find;
pub mod in_place;
pub mod rebuild;
pub mod stream;
pub mod template;
