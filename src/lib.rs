//! snapwarden keeps the snapshots of Exoscale Compute instances in order.
//!
//! The house, floor by floor. A room may use the floors below it, never one beside or above it; a test
//! (`tests/all/floors.rs`) reads the sources and holds this.
//!
//! ```text
//! main · cli                     parse, run, print, exit status
//! daemon                         lives long: schedules, the HTTP port, the word with systemd
//! telemetry                      tells: metrics, status, logging
//! picture                        what is held when, as a line of text and as SVG
//! run                            conducts one run: list, select, plan, execute, report
//! config │ retention │ exoscale │ archive │ state
//!                                reads │ judges (pure) │ speaks │ stores │ remembers: none imports another
//! policy · schedule · snapshot · text         the nouns; no I/O
//! clock · disk · randomness · transport       the four seams: a small trait and its real form each
//! retry                                       when something that failed is attempted again
//! sim                            a simulated zone and the seams' simulated forms; only `cli` (demo) and tests know it
//! ```
//!
//! This file lists the rooms and re-exports nothing: an import names the module that defines the thing.

pub mod archive;
pub mod cli;
pub mod clock;
pub mod config;
pub mod daemon;
pub mod disk;
pub mod exoscale;
pub mod picture;
pub mod policy;
pub mod randomness;
pub mod retention;
mod retry;
pub mod run;
pub mod schedule;
pub mod sim;
pub mod snapshot;
pub mod state;
pub mod telemetry;
pub mod text;
pub mod transport;
