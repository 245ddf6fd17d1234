//! The decisions of plans, and their form in JSON.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::policy::name::PolicyName;
use crate::policy::select::Pattern;
use crate::retention::plan::Decision;
use crate::retention::verdict::Verdict;
use crate::run::archive_retention::CopyDecision;
use crate::run::preview::Preview;
use crate::run::promote::TemplateDecision;
use crate::run::report::sums_of;
use crate::snapshot::{InstanceId, Snapshot, ZoneName};

/// The plan of a policy in a zone, or why there is none.
pub(super) struct PolicyInZone {
    pub(super) name: PolicyName,
    pub(super) zone: ZoneName,
    pub(super) planned: Result<Preview, String>,
}

/// Which decisions are shown; sums are of all of them.
#[derive(Debug, Default)]
pub(crate) struct Filter {
    /// Those with this verdict; all without it.
    pub(crate) only: Option<Verdict>,
    /// Those about snapshots of these instances; all without it.
    pub(crate) instances: Option<Pattern<InstanceId>>,
    /// None at all.
    pub(crate) is_summary: bool,
}

impl Filter {
    fn shows(&self, planned: &Preview, decision: &Decision, snapshot: &Snapshot) -> bool {
        let name = planned.listing.instance_of(snapshot).map(|instance| &*instance.name);
        let is_of = |pattern: &Pattern<InstanceId>| {
            snapshot.instance_id.is_some_and(|instance| pattern.matches(&instance, name))
        };
        !self.is_summary
            && self.only.is_none_or(|only| only == decision.verdict)
            && self.instances.as_ref().is_none_or(is_of)
    }
}

/// The decisions that are shown, each with its snapshot, in the plan's order.
pub(super) fn filtered<'a>(
    planned: &'a Preview,
    filter: &'a Filter,
) -> impl Iterator<Item = (&'a Decision, &'a Snapshot)> {
    decided(planned).filter(move |(decision, snapshot)| filter.shows(planned, decision, snapshot))
}

/// The plans for programs.
pub(super) fn json(at: Timestamp, all: &[PolicyInZone], filter: &Filter) -> Value {
    let policies = all.iter().filter_map(|PolicyInZone { name, zone, planned }| {
        let planned = planned.as_ref().ok()?;
        let decisions = filtered(planned, filter).map(|(decision, snapshot)| {
            let mut json = decision_json(planned, decision);
            json["application_consistent"] = json!(snapshot.application_consistent);
            json["snapshot"] = snapshot_json(planned, snapshot);
            json
        });
        let held = planned.held.as_ref().map(ToString::to_string);
        let decisions = decisions.collect::<Value>();
        let mut json = json!({ "policy": name, "zone": zone, "held": held, "decisions": decisions });
        if filter.is_summary {
            json["plan"] = json!(sums_of(&planned.plan));
        } else {
            if !planned.templates.is_empty() {
                json["templates"] = planned.templates.iter().map(template_json).collect();
            }
            if !planned.copies.is_empty() {
                json["copies"] = planned.copies.iter().map(copy_json).collect();
            }
        }
        let hooks: BTreeMap<&str, &str> =
            planned.hooks.each().map(|(key, program)| (key, &*program.name)).collect();
        if !hooks.is_empty() {
            json["hooks"] = json!(hooks);
        }
        if let Some(pending) = &planned.pending {
            json["pending"] = json!(pending);
        }
        Some(json)
    });
    json!({ "at": at, "policies": policies.collect::<Value>() })
}

/// A template that `promote.keep` does not keep.
fn template_json(TemplateDecision { facts, name, needed, .. }: &TemplateDecision) -> Value {
    json!({
        "template_id": facts.template_id,
        "template_name": name,
        "snapshot": facts.snapshot,
        "verdict": if needed.is_some() { Verdict::Keep.as_str() } else { Verdict::Delete.as_str() },
        "rule": facts.rule,
        "reasons": needed.as_ref().map_or_else(|| facts.reasons.clone(), |why| vec![why.clone()]),
    })
}

/// A copy that an archive's retention does not keep.
fn copy_json(CopyDecision { facts, blocked_by, .. }: &CopyDecision) -> Value {
    json!({
        "archive": facts.archive,
        "snapshot": facts.snapshot,
        "verdict": if blocked_by.is_some() { Verdict::Keep.as_str() } else { Verdict::Delete.as_str() },
        "rule": facts.rule,
        "reasons": facts.reasons,
        "blocked_by": blocked_by,
    })
}

/// A decision of this plan for programs.
pub(crate) fn decision_json(planned: &Preview, decision: &Decision) -> Value {
    let is_blocked = planned.held.is_some() && decision.verdict == Verdict::Delete;
    let by_guard = is_blocked.then_some("guard");
    let mut json = json!({
        "verdict": decision.verdict.as_str(),
        "rule": decision.rule.as_str(),
        "reasons": decision.reasons().map(|reason| reason.to_string()).collect::<Value>(),
        "expires_at": decision.expires_at,
        "blocked_by": decision.blocked_by().or(by_guard),
    });
    if planned.after_export.contains(&decision.index) {
        json["after_export"] = json!(true);
    }
    json
}

/// A snapshot for programs; without an id if the run would take it first.
pub(super) fn snapshot_json(planned: &Preview, snapshot: &Snapshot) -> Value {
    json!({
        "id": Some(snapshot.id).filter(|id| !planned.listing.inventory.coming.contains(id)),
        "name": snapshot.name,
        "created_at": snapshot.created_at,
        "state": snapshot.state.as_str(),
        "size_gib": snapshot.size_gib,
        "instance_id": snapshot.instance_id,
        "instance_name": planned.listing.instance_of(snapshot).map(|instance| &*instance.name),
    })
}

/// Every decision with its snapshot, in the plan's order.
pub(crate) fn decided(planned: &Preview) -> impl Iterator<Item = (&Decision, &Snapshot)> {
    let snapshots = &planned.listing.inventory.snapshots;
    planned
        .plan
        .decisions
        .iter()
        .filter_map(|decision| Some((decision, snapshots.get(decision.index as usize)?)))
}
