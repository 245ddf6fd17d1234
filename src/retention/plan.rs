//! The plan: one decision per snapshot, with its reasons.

use jiff::Timestamp;

use crate::policy::{ArchiveName, PolicyName, Which};
use crate::retention::inventory::Inventory;
use crate::snapshot::ZoneName;

/// What is decided for a zone at one moment.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The moment that everything was judged at.
    pub at: Timestamp,
    /// Where.
    pub zone: ZoneName,
    /// For each enabled policy that speaks about the zone, in the order given.
    pub policies: Vec<PolicyPlan>,
}

/// What is decided for the snapshots that one policy selects.
#[derive(Debug, Clone)]
pub struct PolicyPlan {
    /// Whose.
    pub policy: PolicyName,
    /// Every selected snapshot once: by instance (name, then id), newest first within one.
    pub decisions: Vec<Decision>,
    /// How many of them are good: what the guard's percentage is of.
    pub good: u64,
    /// How many of them go.
    pub deletes: u64,
}

/// What becomes of one snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It stays, and something says so.
    Keep,
    /// It goes.
    Delete,
    /// It is not judged at all: it stays.
    Ignore,
}

/// One decision.
#[derive(Debug, Clone)]
pub struct Decision {
    /// Which snapshot: its place in the inventory's list.
    pub index: u32,
    /// What becomes of it.
    pub verdict: Verdict,
    /// The key to blame.
    pub rule: Rule,
    /// Why, the first one first.
    pub reasons: Vec<Reason>,
    /// For one that is kept: the first instant at which it would go if nothing came and nothing changed.
    pub expires_at: Option<Timestamp>,
    /// For one that goes: the copies that must be proved first, for every policy that requires one.
    pub copies: Vec<CopyNeeded>,
}

/// A verified copy without which a snapshot may not go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyNeeded {
    /// In this archive.
    pub archive: ArchiveName,
    /// Of the snapshot itself (`All`), or of it or a newer one of its instance (`Newest`).
    pub of: Which,
}

/// The key to blame for a verdict: a closed list, for scripts and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Kept: among the newest `keep_last`.
    KeepLast,
}

/// One reason, as data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {}

/// Judges every snapshot of the inventory for every enabled policy that speaks about its zone.
pub fn plan(policies: &[crate::policy::Policy], inventory: &Inventory, now: Timestamp) -> Plan {
    let _ = policies;
    Plan { at: now, zone: inventory.zone.clone(), policies: Vec::new() }
}
