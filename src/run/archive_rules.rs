//! The rules of an archive as a policy, so that the same engine judges them as those for snapshots, and what is remembered of
//! them: a change of the rules has to settle.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde_json::Value;

use crate::archive::catalogue::Catalogue;
use crate::policy::name::{ArchiveName, PolicyName};
use crate::policy::select::Select;
use crate::policy::{ArchiveRules, Policy};
use crate::retention::deciding_keys::{deciding_keys, policy_of_keys};
use crate::retention::inventory::Inventory;
use crate::retention::memory::Memory;
use crate::snapshot::ZoneName;
use crate::state::archives::ArchiveMemory;

/// The name of the policy that stands for an archive's retention; always the same, since the name of an archive decides
/// nothing.
pub(super) const COPIES: &str = "copies";

/// What decides about the copies of a zone: first a policy that keeps what the archive's retention keeps, and selects every copy.
/// Then, of `all`, those that take snapshots in the zone: while one of an instance is missing, its copies stay, whichever policy
/// exports them. They keep nothing else, and count for every instance of which there are copies, since the labels of those are not
/// known.
pub(super) fn policies(zone: &ZoneName, rules: &ArchiveRules, all: &[Policy]) -> Result<Vec<Policy>, String> {
    let mut own =
        Policy { retention: rules.retention.clone(), guard: rules.guard.clone(), ..keeping_all(zone)? };
    let mut takers = Vec::new();
    for taker in all.iter().filter(|policy| policy.create && policy.zones.contains(zone)) {
        if taker.name == own.name {
            // Two of one name would be one to the engine.
            own.create = true;
            continue;
        }
        let nothing = policy_of_keys(taker.name.clone(), &BTreeMap::new())?;
        takers.push(Policy { enabled: taker.enabled, create: true, zones: own.zones.clone(), ..nothing });
    }
    Ok([vec![own], takers].concat())
}

fn keeping_all(zone: &ZoneName) -> Result<Policy, String> {
    let name: PolicyName = COPIES.parse().map_err(|error| format!("{COPIES}: {error}"))?;
    Ok(Policy {
        zones: vec![zone.clone()],
        // Copies outlive their instances: that is their purpose.
        select: Select { judge_orphans: true, ..Select::default() },
        ..policy_of_keys(name, &BTreeMap::new())?
    })
}

/// What is remembered of an archive that others filled, for the first use by this state: that every copy was kept. So the
/// retention is a change.
///
/// # Errors
/// Why that cannot be written, as a sentence.
pub(super) fn kept_by_others(catalogue: &Catalogue) -> Result<BTreeMap<ZoneName, Value>, String> {
    let zones: BTreeSet<&ZoneName> = catalogue.unpruned().map(|copy| &copy.manifest.zone).collect();
    let memory = |zone: &ZoneName| {
        let policy = keeping_all(zone)?;
        let policies = BTreeMap::from([(policy.name.clone(), deciding_keys(&policy))]);
        let memory = serde_json::to_value(Memory { policies, ..Memory::default() });
        Ok((zone.clone(), memory.map_err(|error| error.to_string())?))
    };
    zones.into_iter().map(memory).collect()
}

/// The memory of an archive in a zone after a time at which nothing was deleted: changes that have settled are accepted.
/// None if it would only have another time.
///
/// # Errors
/// Why the memory before cannot be read, as a sentence.
pub(super) fn remember(
    archive: &ArchiveName,
    (rules, all): (&ArchiveRules, &[Policy]),
    memory: &ArchiveMemory,
    zone: &ZoneName,
    now: Timestamp,
) -> Result<Option<Value>, String> {
    let policies = policies(zone, rules, all)?;
    let nothing = Inventory::on_paper(zone.clone(), Vec::new(), Vec::new());
    let before = remembered(archive, memory, zone)?;
    let unsettled = before.unsettled(&policies, &nothing, now, rules.guard.settle);
    let renewed = before.renewed(&policies, &nothing, now, unsettled);
    let is_same = before == Memory { at: before.at, ..renewed.clone() };
    if is_same && memory.rested_on.contains_key(zone) {
        return Ok(None);
    }
    serde_json::to_value(renewed).map(Some).map_err(|error| error.to_string())
}

/// What the archive's last accepted plan in the zone rested on. A zone that had none yet has that of another zone, since the
/// archive's rules are the same for all.
pub(super) fn remembered(
    archive: &ArchiveName,
    memory: &ArchiveMemory,
    zone: &ZoneName,
) -> Result<Memory, String> {
    let read = |value: &Value| {
        serde_json::from_value::<Memory>(value.clone()).map_err(|error| {
            format!(
                "what the last pruning rested on cannot be read, `rested_on` of archive {archive} in archives.json in the \
                 state directory: {error}; if nothing else helps, remove that key: then changes since are not found"
            )
        })
    };
    if let Some(own) = memory.rested_on.get(zone) {
        return read(own);
    }
    let all: Result<Vec<Memory>, String> = memory.rested_on.values().map(read).collect();
    Ok(all?.into_iter().max_by_key(|memory| memory.at).unwrap_or_default())
}
