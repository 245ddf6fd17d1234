//! Restores a verified copy: to a new file, or to a template.
//!
//! [`find`] decides which copies serve, [`copy`] reads one of them again, verifies it and writes it to a [`file`] or a
//! bucket, and [`template`] registers a template of a copy in a bucket. Archives are only read, except that a copy from a
//! folder is stored in a bucket on its way to a template, and stays there: the platform fetches a template's image from
//! a URL.

pub mod copy;
pub mod error;
mod file;
pub mod find;
pub mod template;
