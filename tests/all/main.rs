//! Tests across modules: one binary, a module for each subject.
#![expect(clippy::unwrap_used, reason = "a test that meets what it did not expect should panic")]

mod archives;
mod client;
mod command_line;
mod config_files;
mod crashes;
mod creation;
mod daemon;
mod demo;
mod downloads;
mod file_server;
mod fuzz;
mod http_port;
mod kills;
mod layers;
mod ordinary_nights;
mod ownership;
mod planning;
mod plans;
mod points;
mod process;
mod restoring;
mod restraint;
mod s3;
mod simulated_zone;
mod simulation;
mod sources;
mod sources_fail;
mod stage;
mod status;
mod systemd;
mod telemetry;
mod this_machine;
mod vendor_client;
mod whole_runs;
mod wide_crashes;
