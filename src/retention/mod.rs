//! Judges: which snapshots stay, which go, and why.
//!
//! Pure and total: no clock, no I/O, no logging, no error for values of the ground. [`plan()`] decides every
//! snapshot that a policy selects exactly once, with its reasons; execution has no choice left. Each policy first
//! judges what it selects by itself (`judge`); then pins, required copies and the other policies bring back what they
//! protect (`council`).

mod age;
mod council;
mod gate;
pub mod guard;
pub mod inventory;
mod judge;
pub(crate) mod order;
pub mod plan;
pub mod reason;
pub mod verdict;

#[cfg(test)]
mod tests;

use jiff::Timestamp;

use crate::policy::Policy;
use crate::retention::council::Council;
use crate::retention::inventory::Inventory;
use crate::retention::judge::Judgement;
use crate::retention::order::{counted_from, groups};
use crate::retention::plan::Plan;

/// Judges every snapshot of the inventory for every enabled policy that speaks about its zone.
pub fn plan(policies: &[Policy], inventory: &Inventory, now: Timestamp) -> Plan {
    let policies = policies.iter().filter(|policy| policy.enabled && policy.zones.contains(&inventory.zone));
    let groups = groups(inventory);
    let counted = inventory.snapshots.iter().filter(|snapshot| snapshot.state.is_good());
    let counted = counted.map(|snapshot| snapshot.created_at).filter(|taken| counted_from(*taken) <= now);
    let taken = counted.clone().min().zip(counted.max());
    let judgements: Vec<Judgement<'_>> =
        policies.map(|policy| Judgement::new(policy, &groups, inventory, taken, now)).collect();
    let policies = Council::new(judgements, inventory, now).conclude(&groups);
    Plan { at: now, zone: inventory.zone.clone(), policies }
}
