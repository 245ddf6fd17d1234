//! Tells: logging.

pub mod logging;
