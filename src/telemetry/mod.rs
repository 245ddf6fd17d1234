//! Tells: what the program did and how it is, as log lines, as metrics, and as a status.
//!
//! Everything is folded in one place, [`model`], from which [`metrics`] and [`status`] are made: so they can't
//! disagree. The log is apart from them.

pub mod logging;
pub mod metrics;
pub mod model;
pub mod status;
