//! `plan`: what a run would do, and why, snapshot by snapshot.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::path::Path;

use jiff::{Timestamp, Unit};
use serde::Serialize;

use crate::cli::args::{Global, Plan, ZoneFile};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::once;
use crate::cli::output::{Output, Tone, to_the_second};
use crate::cli::{Exit, Refusal};
use crate::config::Config;
use crate::disk;
use crate::exoscale::wire;
use crate::policy::{Policy, PolicyName};
use crate::retention::inventory::{ClockSkew, Copies, Inventory};
use crate::retention::plan::Decision;
use crate::retention::verdict::{Rule, Verdict};
use crate::run::report::sums_of;
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
    if policies.is_empty() {
        output.complain(assemble::NOTHING_ENABLED);
    }
    let seams = Seams::real();
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
        check_files(&policies, &plan.snapshots)?;
        check_files(&policies, &plan.instances)?;
        for policy in policies {
            let inventories = inventories(&config, policy, &plan.snapshots, &plan.instances)?;
            let zones = preview_offline(&config.policies, policy, inventories, at, &*seams.randomness);
            let zones = zones.into_iter();
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

/// Reads the files that stand for listings of the policy's zones.
fn inventories(
    config: &Config,
    policy: &Policy,
    snapshots: &[ZoneFile],
    instances: &[ZoneFile],
) -> Result<Vec<Inventory>, Refusal> {
    let mut inventories = Vec::new();
    for zone in &policy.zones {
        let Some(file) = file_of(snapshots, policy, zone) else { continue };
        let listing =
            wire::decode_snapshots(&read(&file.file)?).map_err(|error| unreadable(&file.file, &error))?;
        let instances = match file_of(instances, policy, zone) {
            Some(file) => {
                wire::decode_instances(&read(&file.file)?).map_err(|error| unreadable(&file.file, &error))?
            }
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
    /// None of one that the run would take first.
    id: Option<SnapshotId>,
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
                        id: Some(snapshot.id).filter(|id| !planned.listed.inventory.coming.contains(id)),
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
        let head = ["VERDICT", "RULE", "AGE", "TAKEN", "SNAPSHOT", "WHY"];
        for line in output.table(&head, rows).lines() {
            let _ = writeln!(text, "  {line}");
        }
    }
    if !planned.ahead.is_empty() {
        let plain = |text: String| (text, Tone::Plain);
        let rows = planned.ahead.iter().map(|ahead| {
            vec![
                plain(once::word(ahead.action).to_owned()),
                plain(once::instance(ahead.snapshot.instance_name.as_deref())),
                plain(taken(ahead.snapshot.created_at, ahead.snapshot.id.is_none())),
                plain(called(&ahead.snapshot.name, ahead.snapshot.id.is_none())),
                plain(ahead.why.clone()),
            ]
        });
        let table = output.table(&["FIRST", "INSTANCE", "TAKEN", "SNAPSHOT", "WHY"], rows.collect());
        text.push('\n');
        for line in table.lines() {
            let _ = writeln!(text, "  {line}");
        }
    }
    for warning in &planned.listed.warnings {
        let _ = writeln!(text, "\n  note: {}", printable(warning));
    }
    let sums = sums_of(&planned.plan);
    let coming = all.iter().filter(|(decision, _)| decision.rule == Rule::Create).count();
    let _ = writeln!(
        text,
        "\n  {}: {} kept, {} to delete, {} ignored",
        counted(all.len() - coming, "snapshot"),
        sums.keep.saturating_sub(coming as u64),
        sums.delete,
        sums.ignore
    );
    if coming > 0 {
        let _ = writeln!(text, "  {} to be taken first", counted(coming, "snapshot"));
    }
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
        let _ = writeln!(text, "  HELD: {held}");
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
    let is_coming = decision.rule == Rule::Create;
    // Of one that stays the first reason is enough for people; JSON has them all.
    let enough = if decision.verdict == Verdict::Keep { 1 } else { usize::MAX };
    let reasons: Vec<String> =
        planned.plan.reasons(decision).iter().take(enough).map(ToString::to_string).collect();
    vec![
        (decision.verdict.as_str().to_owned(), tone),
        (decision.rule.as_str().to_owned(), Tone::Plain),
        (if is_coming { "-".to_owned() } else { age(snapshot.created_at, at) }, Tone::Plain),
        (taken(snapshot.created_at, is_coming), Tone::Plain),
        (called(&snapshot.name, is_coming), Tone::Plain),
        (reasons.join("; "), Tone::Plain),
    ]
}

/// When it was taken; `-` of one that is to be.
fn taken(at: Timestamp, is_coming: bool) -> String {
    if is_coming { "-".to_owned() } else { at.to_string() }
}

/// Its name; one that is to be taken has none yet.
fn called(name: &str, is_coming: bool) -> String {
    if is_coming { "(to be taken)".to_owned() } else { name.to_owned() }
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
