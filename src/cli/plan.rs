//! `plan`: what a run would do, and why, snapshot by snapshot.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use jiff::{Timestamp, Unit};
use serde::Serialize;

use crate::cli::args::{Global, Plan, ZoneFile};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::output::{Output, Tone};
use crate::cli::{Exit, Refusal};
use crate::config::Config;
use crate::disk;
use crate::exoscale::wire;
use crate::policy::{Policy, PolicyName};
use crate::retention::inventory::{Copies, Inventory};
use crate::retention::plan::{Decision, Verdict};
use crate::run::report::PlanSums;
use crate::run::{Planned, preview_offline};
use crate::snapshot::{InstanceId, Snapshot, SnapshotId, ZoneName};
use crate::text::{chain, counted, printable};

/// A listing of 100,000 snapshots has about 40 MB; a million should still be read.
const LISTING_BYTES_MAX: u64 = 1024 * 1024 * 1024;

/// One policy in one zone, or why that can't be told.
struct PolicyInZone<'a> {
    policy: &'a Policy,
    zone: ZoneName,
    planned: Result<Planned, String>,
}

/// Shows what a run of the policies would do.
///
/// # Errors
/// [`Refusal`] if it can't be told at all.
pub async fn plan(global: &Global, plan: &Plan, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let policies = assemble::chosen(&config, &plan.policies)?;
    let seams = Seams::real()?;
    let at = plan.at.unwrap_or_else(|| seams.clock.now());
    let mut all = Vec::new();
    if plan.snapshots.is_empty() {
        let credentials = assemble::credentials(&config)?;
        let runner = assemble::runner(&config, credentials, &seams, Use::Looking)?;
        for policy in policies {
            let zones = runner.preview(policy, plan.at).await.into_iter();
            all.extend(zones.map(|(zone, planned)| PolicyInZone { policy, zone, planned }));
        }
    } else {
        for policy in policies {
            let inventories = inventories(&config, policy, &plan.snapshots, &plan.instances)?;
            let zones = preview_offline(&config.policies, policy, inventories, at).into_iter();
            all.extend(zones.map(|(zone, planned)| PolicyInZone { policy, zone, planned }));
        }
    }
    let mut exit = Exit::Done;
    for one in &all {
        if let Err(failure) = &one.planned {
            output.complain(&format!("policy {}, zone {}: {failure}", one.policy.name, one.zone));
            exit = Exit::Failed;
        }
    }
    if output.is_json() {
        output.print_json(&json(at, &all));
    } else {
        let shown = all
            .iter()
            .filter_map(|one| Some(render(&one.policy.name, one.planned.as_ref().ok()?, at, output)));
        output.print(&shown.collect::<String>());
    }
    Ok(exit)
}

/// Reads the files that stand for listings of the policy's zones.
fn inventories(
    config: &Config,
    policy: &Policy,
    snapshots: &[ZoneFile],
    instances: &[ZoneFile],
) -> Result<Vec<Inventory>, Refusal> {
    let zone_of = |file: &ZoneFile| file.zone.as_ref().or(policy.zones.first()).cloned();
    let mut inventories = Vec::new();
    for zone in &policy.zones {
        let Some(file) = snapshots.iter().find(|file| zone_of(file).as_ref() == Some(zone)) else { continue };
        let listing =
            wire::decode_snapshots(&read(&file.file)?).map_err(|error| unreadable(&file.file, &error))?;
        let instances = match instances.iter().find(|file| zone_of(file).as_ref() == Some(zone)) {
            Some(file) => {
                wire::decode_instances(&read(&file.file)?).map_err(|error| unreadable(&file.file, &error))?
            }
            None => listing.mentioned,
        };
        inventories.push(Inventory {
            zone: zone.clone(),
            snapshots: listing.snapshots,
            instances,
            holds: BTreeMap::new(),
            archives: config.archives.keys().map(|name| (name.clone(), Copies::Assumed)).collect(),
            clock_skew: None,
        });
    }
    Ok(inventories)
}

fn read(path: &Path) -> Result<Vec<u8>, Refusal> {
    disk::read_named_file(path, LISTING_BYTES_MAX)
        .map(String::into_bytes)
        .map_err(|error| unreadable(path, &error))
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
struct JsonSnapshot<'a> {
    id: SnapshotId,
    name: &'a str,
    created_at: Timestamp,
    state: &'a str,
    size_gib: Option<u64>,
    instance_id: Option<InstanceId>,
    instance_name: Option<&'a str>,
}

fn json<'a>(at: Timestamp, all: &'a [PolicyInZone<'a>]) -> JsonPlan<'a> {
    let policies = all.iter().filter_map(|one| {
        let planned = one.planned.as_ref().ok()?;
        Some(JsonPolicy {
            policy: &one.policy.name,
            zone: &one.zone,
            held: planned.held.as_ref().map(ToString::to_string),
            decisions: decided(planned)
                .map(|(decision, snapshot)| JsonDecision {
                    snapshot: JsonSnapshot {
                        id: snapshot.id,
                        name: &snapshot.name,
                        created_at: snapshot.created_at,
                        state: snapshot.state.as_str(),
                        size_gib: snapshot.size_gib,
                        instance_id: snapshot.instance_id,
                        instance_name: planned.listed.instance_of(snapshot).map(|instance| &*instance.name),
                    },
                    verdict: decision.verdict.as_str(),
                    rule: Some(decision.rule.as_str()),
                    reasons: planned.plan.reasons(decision).iter().map(ToString::to_string).collect(),
                    expires_at: decision.expires_at,
                })
                .collect(),
        })
    });
    JsonPlan { at, policies: policies.collect() }
}

fn decided(planned: &Planned) -> impl Iterator<Item = (&Decision, &Snapshot)> {
    let snapshots = &planned.listed.inventory.snapshots;
    planned
        .plan
        .decisions
        .iter()
        .filter_map(|decision| Some((decision, snapshots.get(decision.index as usize)?)))
}

/// One policy in one zone, for people: a table per instance, newest first, and the sums.
pub fn render(policy: &PolicyName, planned: &Planned, at: Timestamp, output: Output) -> String {
    let zone = &planned.listed.inventory.zone;
    let mut text = format!("policy {policy}, zone {zone}, as of {}\n", to_the_second(at));
    let all: Vec<_> = decided(planned).collect();
    for group in all.chunk_by(|(_, one), (_, next)| one.instance_id == next.instance_id) {
        let instance = group.first().and_then(|(_, snapshot)| planned.listed.instance_of(snapshot));
        let id = group.first().and_then(|(_, snapshot)| snapshot.instance_id);
        let title = match (instance, id) {
            (Some(instance), _) => format!("{} ({})", printable(&instance.name), instance.id),
            (None, Some(id)) => format!("instance {id}, not listed any more"),
            (None, None) => "no instance".to_owned(),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "\n  {title}");
        let rows = group.iter().map(|(decision, snapshot)| row(planned, decision, snapshot, at)).collect();
        let head = ["VERDICT", "RULE", "AGE", "TAKEN", "STATE", "SNAPSHOT", "WHY"];
        for line in output.table(&head, rows).lines() {
            let _ = writeln!(text, "  {line}");
        }
    }
    for warning in &planned.listed.warnings {
        let _ = writeln!(text, "\n  note: {}", printable(warning));
    }
    let sums = PlanSums::of(&planned.plan);
    let _ = writeln!(
        text,
        "\n  {}: {} kept, {} to delete, {} ignored",
        counted(all.len(), "snapshot"),
        sums.keep,
        sums.delete,
        sums.ignore
    );
    for (count, why) in [
        (sums.blocked_by_hold, "a hold"),
        (sums.blocked_by_policy, "another policy"),
        (sums.blocked_by_export, "a missing verified copy"),
    ] {
        if count > 0 {
            let _ = writeln!(text, "  of the kept, {count} would go but for {why}");
        }
    }
    if let Some(held) = &planned.held {
        let _ = writeln!(text, "  HELD, nothing would be deleted: {held}");
    }
    text.push('\n');
    text
}

fn row(planned: &Planned, decision: &Decision, snapshot: &Snapshot, at: Timestamp) -> Vec<(String, Tone)> {
    let tone = match decision.verdict {
        Verdict::Keep => Tone::Good,
        Verdict::Delete => Tone::Bad,
        Verdict::Ignore => Tone::Dim,
    };
    let reasons: Vec<String> = planned.plan.reasons(decision).iter().map(ToString::to_string).collect();
    vec![
        (decision.verdict.as_str().to_owned(), tone),
        (decision.rule.as_str().to_owned(), Tone::Plain),
        (age(snapshot.created_at, at), Tone::Plain),
        (snapshot.created_at.to_string(), Tone::Plain),
        (snapshot.state.as_str().to_owned(), Tone::Plain),
        (snapshot.name.to_string(), Tone::Plain),
        (reasons.join("; "), Tone::Plain),
    ]
}

/// Fractions of a second help nobody.
fn to_the_second(at: Timestamp) -> Timestamp {
    at.round(Unit::Second).unwrap_or(at)
}

/// `3d 4h`, `4h 5m` or `5m`; `-` for what is not yet.
fn age(created_at: Timestamp, at: Timestamp) -> String {
    let Ok(span) = at.since((Unit::Minute, created_at)) else { return "?".to_owned() };
    let minutes = span.get_minutes();
    if minutes < 0 {
        return "-".to_owned();
    }
    let (days, hours, minutes) = (minutes / 1440, minutes / 60 % 24, minutes % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes}m"),
        (0, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}
