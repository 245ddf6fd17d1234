//! The client of Exoscale's API, version 2: signs, sends, repeats what is safe to repeat, waits for operations.
//!
//! The path of a request: [`client`] builds it, `pace` keeps it below the configured rate, `sign` signs each attempt, the
//! transport seam sends it, [`error`] names the failure, [`wire`] decodes the response, and [`operation`] waits
//! until what was started has ended. [`metadata`] asks another server, which instance this machine is.
//!
//! Decoding is lenient (unknown fields and states survive, nearly everything is optional), but a listing in which a
//! snapshot has no id or no date is an error as a whole, since nothing may be deleted on half of one. What to do with
//! the responses is up to the caller; nothing here decides.

pub mod client;
pub mod credentials;
pub mod error;
mod machine;
pub mod metadata;
pub mod operation;
mod pace;
mod sign;
#[cfg(test)]
mod testing;
pub mod wire;
