//! snapwarden keeps the snapshots of Exoscale Compute instances in order.
//!
//! The architecture, layer by layer. A module may use the layers below it, never one beside or above it; a test
//! (`tests/all/layers.rs`) reads the sources and checks this.
//!
//! ```text
//! main · cli                     parse arguments, run a command, print, set the exit status
//! daemon                         the long-running service: schedules, the HTTP port, notifications to systemd
//! telemetry                      metrics, status, logging
//! restore                        finds a copy; makes a file or a template of it
//! picture                        snapshots over time, as a line of text and as SVG
//! run                            one run: list, select, plan, execute, report
//! config │ retention │ exoscale │ archive │ state
//!                                configuration file │ decisions (pure) │ API client │ exported images │ state on
//!                                disk: none imports another
//! judge                          reads the rules again before anything is deleted: by policy, schedule and snapshot alone
//! policy · schedule · snapshot · copies · lookup · text    data types; no I/O
//! clock · disk · process · randomness · transport
//!                                the five seams: a small trait and its real implementation each
//! retry · lock · credentials                  when a failed attempt is repeated; waiting for a lock; where keys are
//!                                found
//! sim                            a simulated zone and simulated seams, in builds with the feature `demo`; only
//!                                `cli` (demo) and tests use it
//! ```
//!
//! This file lists the modules and re-exports nothing: an import names the module that defines the item.

pub mod archive;
pub mod cli;
pub mod clock;
pub mod config;
pub mod copies;
pub mod credentials;
pub mod daemon;
pub mod disk;
pub mod exoscale;
pub mod judge;
pub mod lock;
pub mod lookup;
pub mod picture;
pub mod policy;
pub mod process;
pub mod randomness;
pub mod restore;
pub mod retention;
mod retry;
pub mod run;
pub mod schedule;
#[cfg(feature = "demo")]
pub mod sim;
pub mod snapshot;
pub mod state;
pub mod telemetry;
pub mod text;
pub mod transport;
