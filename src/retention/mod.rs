//! Judges: which snapshots stay, which go, and why.
//!
//! Pure and total: no clock, no I/O, no logging, no error for values of the ground. [`plan`] decides every
//! snapshot that a policy selects exactly once, with its reasons; execution has no choice left.

pub mod guard;
pub mod inventory;
pub mod plan;
