//! Retention: which snapshots are kept, which are deleted, and why.
//!
//! Pure and total: no clock, no I/O, no logging, no error for values of the ground. [`plan()`] decides every
//! snapshot that a policy selects exactly once, with its reasons; execution has no choice left. Each policy first
//! applies its own rules to what it selects (`rules`); then holds, required copies and the other policies keep what they
//! protect (`combine`).

mod age;
mod calendar;
pub mod change;
pub mod change_guard;
mod combine;
pub mod coverage;
pub mod deciding_keys;
mod expiry;
pub(crate) mod export_gate;
pub(crate) mod grouping;
pub mod guard;
pub mod inventory;
pub mod memory;
pub mod plan;
pub(crate) mod reason;
mod rules;
pub mod simulate;
pub mod sources;
pub mod verdict;

#[cfg(test)]
pub(crate) mod tests;

use jiff::Timestamp;

use crate::policy::Policy;
use crate::retention::combine::{combine, rules_for};
use crate::retention::inventory::Inventory;
use crate::retention::plan::Plan;

/// Decides about every snapshot of the inventory for every enabled policy that names its zone.
pub fn plan(policies: &[Policy], inventory: &Inventory, now: Timestamp) -> Plan {
    combine(&mut rules_for(policies, inventory, now), inventory, now, true)
}

/// Like [`plan()`], but without looking for the time at which each kept snapshot expires.
pub fn decide(policies: &[Policy], inventory: &Inventory, now: Timestamp) -> Plan {
    combine(&mut rules_for(policies, inventory, now), inventory, now, false)
}
