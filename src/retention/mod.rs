//! Judges: which snapshots stay, which go, and why.
//!
//! Pure and total: no clock, no I/O, no logging, no error for values of the ground. [`plan::plan`] decides every
//! snapshot that a policy selects exactly once, with its reasons; execution has no choice left.

mod age;
mod council;
mod gate;
pub mod guard;
pub mod inventory;
mod judge;
mod order;
pub mod plan;
pub mod reason;

#[cfg(test)]
mod tests;
