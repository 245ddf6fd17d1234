//! The keys that another configuration changes, each with both values, and the instances that lose backups by it.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::cli::plan::decisions::PolicyInZone;
use crate::config::sections::Config;
use crate::policy::Policy;
use crate::retention::inventory::Inventory;
use crate::snapshot::{Instance, InstanceId, ZoneName};
use crate::text::{counted, excerpt, printable};

/// The most instances that are named in a sentence.
const NAMES_MAX: usize = 5;

/// A key with its value in each configuration; none if it does not stand there.
pub(super) struct ChangedKey<'a> {
    key: &'a str,
    now: Option<&'a Value>,
    candidate: Option<&'a Value>,
}

/// All keys whose values differ, in the order of their names.
pub(super) fn changed_keys<'a>(now: &'a Config, candidate: &'a Config) -> Vec<ChangedKey<'a>> {
    let all: BTreeSet<&String> = now.written.keys().chain(candidate.written.keys()).collect();
    let both = all.into_iter().map(|key| ChangedKey {
        key,
        now: now.written.get(key),
        candidate: candidate.written.get(key),
    });
    both.filter(|key| key.now != key.candidate).collect()
}

/// What copies and snapshots instances get.
struct Backup {
    /// In a sentence.
    what: &'static str,
    /// The key below the policy.
    key: &'static str,
    is_made_by: fn(&Policy) -> bool,
}

const BACKUPS: [Backup; 2] = [
    Backup { what: "new snapshots", key: "create", is_made_by: |policy| policy.create },
    Backup { what: "new copies", key: "export", is_made_by: |policy| policy.export.is_some() },
];

/// A sentence for each policy by whose change instances get no new snapshots or copies any more, from any policy.
pub(super) fn losses<'a>(
    now: &Config,
    candidate: &Config,
    planned: impl Iterator<Item = &'a PolicyInZone>,
) -> Vec<String> {
    let mut zones: BTreeMap<&ZoneName, &Inventory> = BTreeMap::new();
    for PolicyInZone { zone, planned, .. } in planned {
        if let Ok(preview) = planned {
            zones.insert(zone, &preview.listing.inventory);
        }
    }
    let mut losses = Vec::new();
    for Backup { what, key, is_made_by } in BACKUPS {
        let backed_up = |policies: &[Policy]| -> BTreeSet<InstanceId> {
            let makers = policies.iter().filter(|policy| policy.enabled && is_made_by(policy));
            makers.flat_map(|policy| selected(policy, &zones)).map(|instance| instance.id).collect()
        };
        let then = backed_up(&candidate.policies);
        for policy in now.policies.iter().filter(|policy| policy.enabled && is_made_by(policy)) {
            let lost: Vec<&Instance> =
                selected(policy, &zones).filter(|instance| !then.contains(&instance.id)).collect();
            if lost.is_empty() {
                continue;
            }
            let name = &policy.name;
            let change = match candidate.policies.iter().find(|other| other.name == *name) {
                None => format!("policies.{name}: removed"),
                Some(other) if !other.enabled => format!("policies.{name}: paused"),
                Some(other) if !is_made_by(other) => format!("policies.{name}.{key}: removed"),
                Some(_) => format!("policies.{name}: selects less"),
            };
            losses.push(format!(
                "{change}: {} will have no {what}: {}",
                counted(lost.len(), "instance"),
                names(&lost)
            ));
        }
    }
    losses
}

/// The listed instances that the policy selects in all its zones.
fn selected<'a>(
    policy: &'a Policy,
    zones: &'a BTreeMap<&ZoneName, &Inventory>,
) -> impl Iterator<Item = &'a Instance> {
    let here = policy.zones.iter().filter_map(|zone| zones.get(zone));
    here.flat_map(|inventory| inventory.selected_by(policy))
}

fn names(instances: &[&Instance]) -> String {
    let mut names: Vec<String> =
        instances.iter().take(NAMES_MAX).map(|instance| printable(&instance.name).into_owned()).collect();
    if instances.len() > NAMES_MAX {
        names.push(format!("and {} more", instances.len() - NAMES_MAX));
    }
    names.join(", ")
}

/// The keys for programs.
pub(super) fn json(keys: &[ChangedKey<'_>]) -> Value {
    let one = |ChangedKey { key, now, candidate }: &ChangedKey<'_>| json!({ "key": key, "now": now, "candidate": candidate });
    keys.iter().map(one).collect()
}

/// A line for each key: `+` for a new one, `-` for one that is removed, `~` for another value.
pub(super) fn render(keys: &[ChangedKey<'_>]) -> String {
    let shown = |value: &Value| excerpt(&value.to_string(), 200);
    let line = |ChangedKey { key, now, candidate }: &ChangedKey<'_>| match (now, candidate) {
        (Some(now), Some(candidate)) => format!("  ~ {key}: {} -> {}\n", shown(now), shown(candidate)),
        (Some(now), None) => format!("  - {key}: {} -> not set\n", shown(now)),
        (None, Some(candidate)) => format!("  + {key}: not set -> {}\n", shown(candidate)),
        (None, None) => String::new(),
    };
    keys.iter().map(line).collect()
}
