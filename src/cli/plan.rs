//! `plan`: what a run would do, and why, snapshot by snapshot.

pub(super) mod candidate;
pub(super) mod table;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Serialize;

use crate::cli::args::{Global, Plan, ZoneFile};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::output::Output;
use crate::cli::{Exit, Refusal};
use crate::config::sections::Config;
use crate::disk;
use crate::exoscale::wire::{self, ListedSnapshots};
use crate::policy::{Policy, PolicyName};
use crate::retention::inventory::{ClockSkew, Copies, Inventory};
use crate::retention::plan::Decision;
use crate::run::list::ListingCache;
use crate::run::preview::{Preview, preview_offline};
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, ZoneName};
use crate::text::chain;

/// A listing of 100,000 snapshots has about 40 MB; a million should still be read.
const LISTING_BYTES_MAX: u64 = 1024 * 1024 * 1024;

/// One policy in one zone, or why that can't be told.
pub(super) struct PolicyInZone {
    name: PolicyName,
    zone: ZoneName,
    planned: Result<Preview, String>,
}

/// Shows what a run of the policies would do, or what another configuration would change.
///
/// # Errors
/// [`Refusal`] if it can't be told at all.
pub async fn plan(global: &Global, plan: &Plan, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let seams = Seams::real();
    let at = plan.at.unwrap_or_else(|| seams.clock.now());
    let mut look = Look { plan, seams, at, files: Files::default(), listings: ListingCache::default() };
    let Some(candidate) = &plan.candidate else {
        let policies = assemble::chosen(&config, &plan.policies)?;
        if policies.is_empty() {
            output.complain(assemble::NOTHING_ENABLED);
        }
        check_files(&policies, &plan.snapshots)?;
        check_files(&policies, &plan.instances)?;
        let all = look.over(&config, &policies, plan.at).await?;
        let exit = complain("", &all, output);
        if output.is_json() {
            output.print_json(&json(at, &all));
        } else {
            let told = all.iter().filter_map(|one| Some((&one.name, one.planned.as_ref().ok()?)));
            output.print(&table::render(told, at, output));
        }
        return Ok(exit);
    };
    let candidate = assemble::configuration_at(candidate)?;
    let [now, then] = chosen_of_both(&config, &candidate, &plan.policies)?;
    let both = [now.clone(), then.clone()].concat();
    check_files(&both, &plan.snapshots)?;
    check_files(&both, &plan.instances)?;
    // Both at the same moment, and over the same listings if they ask the same API.
    let now = look.over(&config, &now, Some(at)).await?;
    if config.exoscale.endpoint != candidate.exoscale.endpoint {
        look.listings = ListingCache::default();
    }
    let then = look.over(&candidate, &then, Some(at)).await?;
    let exit = complain("now, ", &now, output).worse(complain("by the candidate, ", &then, output));
    let differences = candidate::differences(&now, &then);
    if output.is_json() {
        output.print_json(&candidate::json(at, &differences));
    } else {
        output.print(&candidate::render(&differences, at, output));
    }
    Ok(exit)
}

/// What a look at plans goes by.
struct Look<'a> {
    plan: &'a Plan,
    seams: Seams,
    at: Timestamp,
    files: Files,
    listings: ListingCache,
}

impl Look<'_> {
    /// The plans of these policies: over the files that the command line names, else over what the zones list.
    async fn over(
        &mut self,
        config: &Config,
        policies: &[&Policy],
        at: Option<Timestamp>,
    ) -> Result<Vec<PolicyInZone>, Refusal> {
        let mut all = Vec::new();
        let mut add = |policy: &Policy, zones: Vec<_>| {
            let name = &policy.name;
            all.extend(zones.into_iter().map(|(zone, planned)| PolicyInZone {
                name: name.clone(),
                zone,
                planned,
            }));
        };
        if self.plan.snapshots.is_empty() {
            let credentials = assemble::credentials(config)?;
            let runner = assemble::runner(config, credentials, &self.seams, Use::Reading)?;
            for policy in policies {
                add(policy, runner.preview(&self.listings, policy, at).await);
            }
        } else {
            for policy in policies {
                let inventories =
                    inventories(config, policy, &self.plan.snapshots, &self.plan.instances, &mut self.files)?;
                let randomness = &*self.seams.randomness;
                add(policy, preview_offline(&config.policies, policy, inventories, self.at, randomness));
            }
        }
        Ok(all)
    }
}

/// Says what can't be told.
fn complain(side: &str, all: &[PolicyInZone], output: Output) -> Exit {
    let mut exit = Exit::Done;
    for PolicyInZone { name, zone, planned } in all {
        if let Err(failure) = planned {
            output.complain(&format!("{side}policy {name}, zone {zone}: {failure}"));
            exit = Exit::Failed;
        }
    }
    exit
}

/// The enabled policies of each configuration that the command names; all, if it names none. One of both has to have
/// each that is named.
fn chosen_of_both<'a>(
    config: &'a Config,
    candidate: &'a Config,
    names: &[PolicyName],
) -> Result<[Vec<&'a Policy>; 2], Refusal> {
    let both = [config, candidate].map(|config| -> Vec<&Policy> {
        let is_meant =
            |policy: &&Policy| policy.enabled && (names.is_empty() || names.contains(&policy.name));
        config.policies.iter().filter(is_meant).collect()
    });
    match names.iter().find(|name| !both.iter().flatten().any(|policy| policy.name == **name)) {
        Some(name) => {
            let text = format!("neither configuration has an enabled policy `{name}`");
            Err(Refusal::new(Exit::Usage, text))
        }
        None => Ok(both),
    }
}

/// A file that would not be looked at is a mistake: what it holds would be missing from the plan without a word.
fn check_files(policies: &[&Policy], files: &[ZoneFile]) -> Result<(), Refusal> {
    for (place, file) in files.iter().enumerate() {
        let why = if files.iter().take(place).any(|earlier| earlier.zone == file.zone) {
            "another one stands for the same zone".to_owned()
        } else if let Some(zone) = &file.zone
            && !policies.iter().any(|policy| policy.zones.contains(zone))
        {
            format!("no policy that is planned has zone `{zone}`")
        } else {
            continue;
        };
        let text = format!("the listing {} is of no use: {why}", file.file.display());
        return Err(Refusal::new(Exit::Usage, text));
    }
    Ok(())
}

/// The file that stands for a zone: the one that names it, else for the policy's first zone the one that names none.
fn file_of<'a>(files: &'a [ZoneFile], policy: &Policy, zone: &ZoneName) -> Option<&'a ZoneFile> {
    let named = files.iter().find(|file| file.zone.as_ref() == Some(zone));
    named.or_else(|| files.iter().find(|file| file.zone.is_none() && policy.zones.first() == Some(zone)))
}

/// Files that stand for listings, each read once: policies share them, and a pipe can't be read twice.
#[derive(Default)]
pub(super) struct Files {
    snapshots: BTreeMap<PathBuf, ListedSnapshots>,
    instances: BTreeMap<PathBuf, Vec<Instance>>,
}

/// What the files say of the policy's zones.
pub(super) fn inventories(
    config: &Config,
    policy: &Policy,
    snapshots: &[ZoneFile],
    instances: &[ZoneFile],
    files: &mut Files,
) -> Result<Vec<Inventory>, Refusal> {
    let mut inventories = Vec::new();
    for zone in &policy.zones {
        let Some(file) = file_of(snapshots, policy, zone) else { continue };
        let listing = once(&mut files.snapshots, &file.file, wire::decode_snapshots)?.clone();
        let instances = match file_of(instances, policy, zone) {
            Some(file) => once(&mut files.instances, &file.file, wire::decode_instances)?.clone(),
            None => listing.mentioned,
        };
        inventories.push(Inventory {
            zone: zone.clone(),
            // There is no memory to ask, so all count as made by this program.
            created: listing.snapshots.iter().map(|snapshot| snapshot.id).collect(),
            coming: HashSet::new(),
            snapshots: listing.snapshots,
            instances,
            holds: BTreeMap::new(),
            archives: config.archives.keys().map(|name| (name.clone(), Copies::Assumed)).collect(),
            clock: ClockSkew::OnPaper,
        });
    }
    Ok(inventories)
}

/// What the file holds; it is read at its first use.
fn once<'f, T>(
    known: &'f mut BTreeMap<PathBuf, T>,
    path: &Path,
    decode: impl Fn(&[u8]) -> Result<T, wire::DecodeError>,
) -> Result<&'f T, Refusal> {
    match known.entry(path.to_owned()) {
        Entry::Occupied(known) => Ok(known.into_mut()),
        Entry::Vacant(place) => {
            let text =
                disk::read_named_file(path, LISTING_BYTES_MAX).map_err(|error| unreadable(path, &error))?;
            Ok(place.insert(decode(text.as_bytes()).map_err(|error| unreadable(path, &error))?))
        }
    }
}

fn unreadable(path: &Path, error: &(dyn std::error::Error + 'static)) -> Refusal {
    Refusal::new(Exit::Failed, format!("read the listing {}: {}", path.display(), chain(error)))
}

#[derive(Serialize)]
struct JsonPlan<'a> {
    at: Timestamp,
    policies: Vec<JsonPolicy<'a>>,
}

#[derive(Serialize)]
struct JsonPolicy<'a> {
    policy: &'a PolicyName,
    zone: &'a ZoneName,
    held: Option<String>,
    decisions: Vec<JsonDecision<'a>>,
}

#[derive(Serialize)]
struct JsonDecision<'a> {
    snapshot: JsonSnapshot<'a>,
    verdict: &'static str,
    rule: Option<&'static str>,
    reasons: Vec<String>,
    expires_at: Option<Timestamp>,
}

#[derive(Serialize)]
pub(super) struct JsonSnapshot<'a> {
    /// None of one that the run would take first.
    id: Option<SnapshotId>,
    name: &'a str,
    created_at: Timestamp,
    state: &'a str,
    size_gib: Option<u64>,
    instance_id: Option<InstanceId>,
    instance_name: Option<&'a str>,
}

fn json(at: Timestamp, all: &[PolicyInZone]) -> JsonPlan<'_> {
    let policies = all.iter().filter_map(|one| {
        let planned = one.planned.as_ref().ok()?;
        Some(JsonPolicy {
            policy: &one.name,
            zone: &one.zone,
            held: planned.held.as_ref().map(ToString::to_string),
            decisions: decided(planned)
                .map(|(decision, snapshot)| JsonDecision {
                    snapshot: json_snapshot(planned, snapshot),
                    verdict: decision.verdict.as_str(),
                    rule: Some(decision.rule.as_str()),
                    reasons: decision.reasons().map(|reason| reason.to_string()).collect(),
                    expires_at: decision.expires_at,
                })
                .collect(),
        })
    });
    JsonPlan { at, policies: policies.collect() }
}

/// A snapshot as programs read it.
pub(super) fn json_snapshot<'a>(planned: &'a Preview, snapshot: &'a Snapshot) -> JsonSnapshot<'a> {
    JsonSnapshot {
        id: Some(snapshot.id).filter(|id| !planned.listing.inventory.coming.contains(id)),
        name: &snapshot.name,
        created_at: snapshot.created_at,
        state: snapshot.state.as_str(),
        size_gib: snapshot.size_gib,
        instance_id: snapshot.instance_id,
        instance_name: planned.listing.instance_of(snapshot).map(|instance| &*instance.name),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_that_no_plan_would_look_at_is_refused() {
        let text = "[policies.nightly]\nzones = [\"ch-gva-2\", \"de-fra-1\"]\n[policies.weekly]\nzones = [\"at-vie-1\"]\n";
        let config = crate::config::parse(text, "test.toml", None).unwrap_or_else(|error| panic!("{error}"));
        let (both, weekly): (Vec<_>, Vec<_>) =
            (config.policies.iter().collect(), config.policies.iter().skip(1).collect());
        for (policies, files, refused) in [
            (&both, &["a.json"][..], None),
            (&both, &["a.json", "de-fra-1=b.json", "at-vie-1=c.json"], None),
            (&both, &["ch-dk-2=a.json"], Some("`ch-dk-2`")),
            (&weekly, &["ch-gva-2=a.json"], Some("`ch-gva-2`")),
            (&both, &["a.json", "b.json"], Some("b.json")),
            (&both, &["de-fra-1=a.json", "de-fra-1=b.json"], Some("b.json")),
        ] {
            let files: Vec<ZoneFile> = files.iter().map(|file| file.parse().unwrap()).collect();
            match (check_files(policies, &files), refused) {
                (Ok(()), None) => {}
                (Err(refusal), Some(word)) => {
                    assert_eq!(refusal.exit, Exit::Usage, "{files:?}");
                    assert!(refusal.text.contains(word), "{files:?}: {}", refusal.text);
                }
                (checked, _) => panic!("{files:?}: {checked:?}"),
            }
        }
    }

    #[test]
    fn a_file_that_names_its_zone_goes_before_one_that_names_none() {
        let text = "[policies.nightly]\nzones = [\"ch-gva-2\", \"de-fra-1\"]\n";
        let config = crate::config::parse(text, "test.toml", None).unwrap_or_else(|error| panic!("{error}"));
        let found = |files: &[&str], zone: &str| {
            let files: Vec<ZoneFile> = files.iter().map(|file| file.parse().unwrap()).collect();
            file_of(&files, &config.policies[0], &zone.parse().unwrap()).map(|file| file.file.clone())
        };
        assert_eq!(found(&["a.json", "ch-gva-2=b.json"], "ch-gva-2"), Some("b.json".into()));
        assert_eq!(found(&["a.json", "de-fra-1=b.json"], "ch-gva-2"), Some("a.json".into()));
        assert_eq!(found(&["a.json"], "de-fra-1"), None);
    }
}
