//! The operations of the API that a configuration needs: tried by `check --online`, and allowed by the policy of an API key's
//! role that `check --print-role` prints.

use serde_json::{Value, json};

use crate::cli::args::RolePart;
use crate::policy::Policy;

/// A kind of work that needs operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// Any run or plan of a policy.
    Any,
    Create,
    Export,
    Promote,
    Prune,
    PruneTemplates,
    /// `restore`, `revert` and `promote`.
    Restore,
}

/// The one operation without which all works: it says who deleted a snapshot that no run deleted.
pub(super) const LIST_EVENTS: &str = "list-events";

/// The operations as a role's policy spells them, and the work that needs each. `list-zones` is none of them: it is asked
/// without a signature.
const OPERATIONS: [(&str, &[Work]); 21] = [
    ("list-snapshots", &[Work::Any, Work::Restore]),
    ("list-instances", &[Work::Any, Work::Restore]),
    ("list-quotas", &[Work::Any]),
    (LIST_EVENTS, &[Work::Any]),
    ("get-snapshot", &[Work::Create, Work::Export, Work::Prune, Work::Restore]),
    ("get-instance", &[Work::Create, Work::Export, Work::Restore]),
    ("get-instance-type", &[Work::Export, Work::Restore]),
    ("get-quota", &[Work::Create]),
    ("create-snapshot", &[Work::Create, Work::Restore]),
    ("delete-snapshot", &[Work::Prune]),
    ("export-snapshot", &[Work::Export, Work::Restore]),
    ("get-template", &[Work::Export, Work::Restore]),
    ("list-templates", &[Work::Promote, Work::PruneTemplates, Work::Restore]),
    ("promote-snapshot-to-template", &[Work::Promote, Work::Restore]),
    ("register-template", &[Work::Restore]),
    ("delete-template", &[Work::PruneTemplates]),
    ("stop-instance", &[Work::Restore]),
    ("revert-instance-to-snapshot", &[Work::Restore]),
    ("reset-instance", &[Work::Restore]),
    ("start-instance", &[Work::Restore]),
    (
        "get-operation",
        &[Work::Create, Work::Export, Work::Promote, Work::Prune, Work::PruneTemplates, Work::Restore],
    ),
];

/// The work that these policies do.
pub(super) fn work_of(policies: &[&Policy]) -> Vec<Work> {
    let any = |does: fn(&Policy) -> bool| policies.iter().any(|policy| does(policy));
    let work = [
        (Work::Any, !policies.is_empty()),
        (Work::Create, any(|policy| policy.create)),
        (Work::Export, any(|policy| policy.export.is_some())),
        (Work::Promote, any(|policy| policy.promote.is_some())),
        (Work::Prune, any(|policy| policy.retention.is_some())),
        (
            Work::PruneTemplates,
            any(|policy| policy.promote.as_ref().is_some_and(|promote| promote.keep.is_some())),
        ),
    ];
    work.into_iter().filter_map(|(work, is_done)| is_done.then_some(work)).collect()
}

/// The operations that this work needs.
pub(super) fn operations(work: &[Work]) -> Vec<&'static str> {
    let is_needed = |by: &[Work]| by.iter().any(|one| work.contains(one));
    OPERATIONS.iter().filter_map(|(operation, by)| is_needed(by).then_some(*operation)).collect()
}

/// The policy of a role that allows what these policies need, or a part of it; `None` if that is nothing.
pub(super) fn role(policies: &[&Policy], part: Option<RolePart>) -> Option<Value> {
    let mut work = work_of(policies);
    match part {
        None => {}
        Some(RolePart::Keeper) => work.retain(|one| !matches!(one, Work::Prune | Work::PruneTemplates)),
        Some(RolePart::Pruner) => {
            work.retain(|one| matches!(one, Work::Any | Work::Prune | Work::PruneTemplates));
        }
        Some(RolePart::Restorer) => work = vec![Work::Restore],
    }
    let operations = operations(&work);
    let list = operations.iter().map(|operation| format!("'{operation}'")).collect::<Vec<_>>().join(", ");
    let rule = json!({ "action": "allow", "expression": format!("operation in [{list}]") });
    let services = json!({ "compute": { "type": "rules", "rules": [rule] } });
    (!operations.is_empty()).then(|| json!({ "default-service-strategy": "deny", "services": services }))
}
