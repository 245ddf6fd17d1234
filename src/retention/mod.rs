//! Judges: which snapshots stay, which go, and why.
//!
//! Pure and total: no clock, no I/O, no logging, no error for values of the ground. [`plan()`] decides every
//! snapshot that a policy selects exactly once, with its reasons; execution has no choice left. Each policy first
//! judges what it selects by itself (`judge`); then pins, required copies and the other policies bring back what they
//! protect (`council`).

mod age;
mod calendar;
mod council;

mod export_gate;
pub(crate) mod grouping;
pub mod guard;
pub mod inventory;
mod judge;
pub mod plan;
pub mod reason;
pub mod simulate;
pub mod verdict;

#[cfg(test)]
pub(crate) mod tests;

use jiff::Timestamp;

use crate::policy::Policy;
use crate::retention::council::Council;
use crate::retention::grouping::groups;
use crate::retention::inventory::Inventory;
use crate::retention::plan::Plan;

/// Judges every snapshot of the inventory for every enabled policy that speaks about its zone.
pub fn plan(policies: &[Policy], inventory: &Inventory, now: Timestamp) -> Plan {
    judged(policies, inventory, now, true)
}

/// Like [`plan()`], without telling when what is kept would go: for those who ask often.
pub fn decide(policies: &[Policy], inventory: &Inventory, now: Timestamp) -> Plan {
    judged(policies, inventory, now, false)
}

fn judged(policies: &[Policy], inventory: &Inventory, now: Timestamp, foresees: bool) -> Plan {
    let policies = policies.iter().filter(|policy| policy.enabled && policy.zones.contains(&inventory.zone));
    let policies: Vec<&Policy> = policies.collect();
    let (groups, times) = groups(inventory, now);
    let plans = Council::new(&policies, inventory, times, now, foresees).conclude(&groups);
    Plan { at: now, zone: inventory.zone.clone(), policies: plans }
}
