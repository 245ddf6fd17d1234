//! The decisions of plans, and their form in JSON.

use jiff::Timestamp;
use serde::Serialize;

use crate::policy::name::PolicyName;
use crate::retention::plan::Decision;
use crate::run::preview::Preview;
use crate::snapshot::{InstanceId, Snapshot, SnapshotId, ZoneName};

/// The plan of a policy in a zone, or why there is none.
pub(super) struct PolicyInZone {
    pub(super) name: PolicyName,
    pub(super) zone: ZoneName,
    pub(super) planned: Result<Preview, String>,
}

#[derive(Serialize)]
pub(super) struct PlanOutput<'a> {
    at: Timestamp,
    policies: Vec<PolicyOutput<'a>>,
}

#[derive(Serialize)]
struct PolicyOutput<'a> {
    policy: &'a PolicyName,
    zone: &'a ZoneName,
    held: Option<String>,
    decisions: Vec<SnapshotDecision<'a>>,
}

#[derive(Serialize)]
struct SnapshotDecision<'a> {
    snapshot: SnapshotOutput<'a>,
    #[serde(flatten)]
    decision: DecisionOutput,
}

#[derive(Serialize)]
pub(super) struct DecisionOutput {
    verdict: &'static str,
    rule: &'static str,
    reasons: Vec<String>,
    expires_at: Option<Timestamp>,
}

impl DecisionOutput {
    pub(super) fn new(decision: &Decision) -> Self {
        Self {
            verdict: decision.verdict.as_str(),
            rule: decision.rule.as_str(),
            reasons: decision.reasons().map(|reason| reason.to_string()).collect(),
            expires_at: decision.expires_at,
        }
    }
}

#[derive(Serialize)]
pub(super) struct SnapshotOutput<'a> {
    /// `None` for a snapshot that the run would take first.
    id: Option<SnapshotId>,
    name: &'a str,
    created_at: Timestamp,
    state: &'a str,
    size_gib: Option<u64>,
    instance_id: Option<InstanceId>,
    instance_name: Option<&'a str>,
}

impl<'a> PlanOutput<'a> {
    pub(super) fn new(at: Timestamp, all: &'a [PolicyInZone]) -> Self {
        let policies = all.iter().filter_map(|one| {
            let planned = one.planned.as_ref().ok()?;
            Some(PolicyOutput {
                policy: &one.name,
                zone: &one.zone,
                held: planned.held.as_ref().map(ToString::to_string),
                decisions: decided(planned)
                    .map(|(decision, snapshot)| SnapshotDecision {
                        snapshot: SnapshotOutput::new(planned, snapshot),
                        decision: DecisionOutput::new(decision),
                    })
                    .collect(),
            })
        });
        Self { at, policies: policies.collect() }
    }
}

impl<'a> SnapshotOutput<'a> {
    pub(super) fn new(planned: &'a Preview, snapshot: &'a Snapshot) -> Self {
        Self {
            id: Some(snapshot.id).filter(|id| !planned.listing.inventory.coming.contains(id)),
            name: &snapshot.name,
            created_at: snapshot.created_at,
            state: snapshot.state.as_str(),
            size_gib: snapshot.size_gib,
            instance_id: snapshot.instance_id,
            instance_name: planned.listing.instance_of(snapshot).map(|instance| &*instance.name),
        }
    }
}

/// Every decision with its snapshot, in the plan's order.
pub(super) fn decided(planned: &Preview) -> impl Iterator<Item = (&Decision, &Snapshot)> {
    let snapshots = &planned.listing.inventory.snapshots;
    planned
        .plan
        .decisions
        .iter()
        .filter_map(|decision| Some((decision, snapshots.get(decision.index as usize)?)))
}
