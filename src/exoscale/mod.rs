//! Speaks with Exoscale's API, version 2: signs, sends, repeats what may be repeated, waits for operations.
//!
//! The way of a call: [`client`] builds it, `sign` signs each attempt, the transport seam carries it,
//! [`error`] names what went wrong, `pace` keeps requests below a rate, [`wire`] decodes the answer,
//! and [`operation`] waits until what was started is settled. [`metadata`] is another server: it tells an instance
//! which one it is.
//!
//! Decoding is lenient (unknown fields and states survive, nearly everything is optional), judgement is
//! strict: a listing in which a snapshot has no id or no date is no listing at all, since nothing may be
//! deleted on half of one. What is done with the answers is up to the caller; nothing here decides.

pub mod client;
pub mod credentials;
pub mod error;
pub mod metadata;
pub mod operation;
mod pace;
#[cfg(test)]
mod scripted;
mod sign;
pub mod wire;
