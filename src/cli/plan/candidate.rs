//! The changes by another configuration: only the snapshots whose verdict differs.
//!
//! Both configurations are applied to the same listings at the same time, each with all its policies. A snapshot that only
//! one of them selects counts as a change as well, so that none drops out unnoticed.

use std::collections::HashMap;
use std::fmt::Write as _;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::cli::once::plan_sums;
use crate::cli::output::{Output, Row, Tone, plain};
use crate::cli::plan::decisions::{PolicyInZone, decided, decision_json, snapshot_json};
use crate::cli::plan::keys::{self, ChangedKey};
use crate::cli::plan::table::{age, called, shown, taken, title, why};
use crate::policy::name::PolicyName;
use crate::retention::plan::Decision;
use crate::retention::verdict::{Rule, Verdict};
use crate::run::preview::Preview;
use crate::run::report::sums_of;
use crate::snapshot::{InstanceId, Snapshot, SnapshotId, ZoneName};
use crate::text::{counted, to_the_second};

/// The differences for a policy in a zone; a configuration without it has no plan.
pub(super) struct Difference<'a> {
    policy: &'a PolicyName,
    zone: &'a ZoneName,
    now: Option<&'a Preview>,
    candidate: Option<&'a Preview>,
    pairs: Vec<Pair<'a>>,
}

/// A snapshot with the decision of each configuration.
struct Pair<'a> {
    snapshot: &'a Snapshot,
    /// A plan that knows the snapshot.
    planned: &'a Preview,
    now: Option<Side<'a>>,
    candidate: Option<Side<'a>>,
}

/// A decision, and its plan.
type Side<'a> = (&'a Preview, &'a Decision);

/// Identifies a snapshot in both plans. One that the run will create has no id yet: its instance identifies it.
fn key(planned: &Preview, snapshot: &Snapshot) -> (Option<SnapshotId>, Option<InstanceId>) {
    let is_coming = planned.listing.inventory.coming.contains(&snapshot.id);
    if is_coming { (None, snapshot.instance_id) } else { (Some(snapshot.id), None) }
}

/// The differences, in the order of the current configuration, then of the candidate. A zone that could not be planned
/// with both is left out: the caller reports it.
pub(super) fn differences<'a>(now: &'a [PolicyInZone], candidate: &'a [PolicyInZone]) -> Vec<Difference<'a>> {
    let same = |one: &PolicyInZone, other: &PolicyInZone| one.name == other.name && one.zone == other.zone;
    let mut pairs: Vec<(Option<&PolicyInZone>, Option<&PolicyInZone>)> =
        now.iter().map(|one| (Some(one), candidate.iter().find(|other| same(one, other)))).collect();
    let new = candidate.iter().filter(|other| !now.iter().any(|one| same(one, other)));
    pairs.extend(new.map(|other| (None, Some(other))));
    let mut differences = Vec::new();
    for (now, candidate) in pairs {
        let Some(PolicyInZone { name, zone, .. }) = now.or(candidate) else { continue };
        let planned = |side: Option<&'a PolicyInZone>| side.map(|side| side.planned.as_ref()).transpose();
        let (Ok(now), Ok(candidate)) = (planned(now), planned(candidate)) else { continue };
        let pairs = pairs_of(now, candidate);
        if now.is_none() || candidate.is_none() || !pairs.is_empty() {
            differences.push(Difference { policy: name, zone, now, candidate, pairs });
        }
    }
    differences
}

/// The snapshots with different verdicts, by instance, newest first.
fn pairs_of<'a>(now: Option<&'a Preview>, candidate: Option<&'a Preview>) -> Vec<Pair<'a>> {
    let mut others: HashMap<_, Side<'a>> = candidate.map_or_else(HashMap::new, |planned| {
        decided(planned).map(|(decision, snapshot)| (key(planned, snapshot), (planned, decision))).collect()
    });
    let mut pairs: Vec<Pair<'a>> = Vec::new();
    if let Some(planned) = now {
        for (decision, snapshot) in decided(planned) {
            let other = others.remove(&key(planned, snapshot));
            // What would wait for the change to settle would be deleted after that, so it is a difference.
            let result = |decision: &Decision| (decision.verdict, decision.rule == Rule::Change);
            if other.map(|(_, other)| result(other)) != Some(result(decision)) {
                pairs.push(Pair { snapshot, planned, now: Some((planned, decision)), candidate: other });
            }
        }
    }
    if let Some(planned) = candidate {
        for (decision, snapshot) in decided(planned) {
            if others.contains_key(&key(planned, snapshot)) {
                pairs.push(Pair { snapshot, planned, now: None, candidate: Some((planned, decision)) });
            }
        }
    }
    pairs.sort_by(|one, other| {
        let name =
            |pair: &Pair<'a>| pair.planned.listing.instance_of(pair.snapshot).map(|instance| &*instance.name);
        let place = |pair: &Pair<'a>| (name(pair).is_none(), name(pair), pair.snapshot.instance_id.is_none());
        let newest = |pair: &Pair<'a>| std::cmp::Reverse((pair.snapshot.created_at, pair.snapshot.id));
        (place(one), one.snapshot.instance_id, newest(one)).cmp(&(
            place(other),
            other.snapshot.instance_id,
            newest(other),
        ))
    });
    pairs
}

/// All that another configuration changes.
pub(super) struct Changes<'a> {
    pub(super) keys: Vec<ChangedKey<'a>>,
    /// Sentences about instances that get no backups any more.
    pub(super) losses: Vec<String>,
    pub(super) differences: Vec<Difference<'a>>,
}

/// The changes for programs.
pub(super) fn json(at: Timestamp, Changes { keys, losses, differences }: &Changes<'_>) -> Value {
    let change = |pair: &Pair<'_>| {
        json!({
            "snapshot": snapshot_json(pair.planned, pair.snapshot),
            "now": pair.now.map(|(planned, decision)| decision_json(planned, decision)),
            "candidate": pair.candidate.map(|(planned, decision)| decision_json(planned, decision)),
        })
    };
    let policies = differences.iter().map(|Difference { policy, zone, now, candidate, pairs }| {
        let word = match (now, candidate) {
            (Some(_), None) => "gone",
            (None, _) => "new",
            (Some(_), Some(_)) => "changed",
        };
        let changes = pairs.iter().map(change).collect::<Value>();
        json!({ "policy": policy, "zone": zone, "change": word, "changes": changes })
    });
    let policies = policies.collect::<Value>();
    json!({ "at": at, "keys": keys::json(keys), "losses": losses, "policies": policies })
}

/// The changes as text.
pub(super) fn render(
    Changes { keys, losses, differences }: &Changes<'_>,
    at: Timestamp,
    output: Output,
) -> String {
    let mut text = format!("changes by the candidate, as of {}\n", to_the_second(at));
    if !keys.is_empty() {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n{}", keys::render(keys));
    }
    for loss in losses {
        text.push_str(&output.note("LOST:", Tone::Bad, loss));
    }
    let (mut more, mut fewer) = (0, 0);
    for difference in differences {
        let Difference { policy, zone, now, candidate, pairs } = difference;
        let change = match (now, candidate) {
            (Some(_), None) => ": REMOVED, no longer applied",
            (None, _) => ": NEW",
            (Some(_), Some(_)) => "",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "\npolicy {policy}, zone {zone}{change}");
        for group in pairs.chunk_by(|one, next| one.snapshot.instance_id == next.snapshot.instance_id) {
            let Some(first) = group.first() else { continue };
            let _ = writeln!(text, "\n  {}", title(first.planned, first.snapshot, output));
            let rows = group.iter().flat_map(|pair| rows(pair, at, output)).collect();
            let head = ["NOW", "CANDIDATE", "AGE", "TAKEN", "SNAPSHOT", "WHY"];
            text.push_str(&output.indented_table(&head, rows));
        }
        let deletes =
            |side: Option<Side<'_>>| side.is_some_and(|(_, decision)| decision.verdict == Verdict::Delete);
        let more_here = pairs.iter().filter(|pair| deletes(pair.candidate)).count();
        let fewer_here = pairs.iter().filter(|pair| deletes(pair.now)).count();
        let _ = writeln!(
            text,
            "\n  {}: {more_here} more to delete, {fewer_here} fewer to delete",
            counted(pairs.len(), "change")
        );
        let sides = [("now:", now), ("candidate:", candidate)].into_iter();
        let sums = sides.filter_map(|(side, planned)| {
            let sums = sums_of(&planned.as_ref()?.plan);
            Some(vec![plain(side), plain(plan_sums(&sums))])
        });
        text.push_str(&output.indented_table(&[], sums.collect()));
        if let Some(held) = candidate.and_then(|planned| planned.held.as_ref()) {
            text.push_str(&output.note("BLOCKED:", Tone::Bad, &format!("by the candidate's guard: {held}")));
        }
        more += more_here;
        fewer += fewer_here;
    }
    let _ = if differences.is_empty() {
        let what = if keys.is_empty() { "changes" } else { "verdict changes" };
        writeln!(text, "\nno {what}: every selected snapshot has the same verdict")
    } else {
        writeln!(text, "\ntotal: {more} more to delete, {fewer} fewer to delete")
    };
    text
}

/// A row for the change with the current reason, and one for the candidate's reason.
fn rows(pair: &Pair<'_>, at: Timestamp, output: Output) -> [Row; 2] {
    let word = |side: Option<Side<'_>>| {
        let (word, tone) = side.map_or(("-", Tone::Dim), |(_, decision)| shown(decision));
        (word.to_owned(), tone)
    };
    let reason = |side: Option<Side<'_>>| {
        side.map_or_else(|| "not selected".to_owned(), |(planned, decision)| why(planned, decision))
    };
    let is_coming = pair.planned.listing.inventory.coming.contains(&pair.snapshot.id);
    let now = vec![
        word(pair.now),
        word(pair.candidate),
        plain(age(pair.snapshot.created_at, at, is_coming)),
        plain(taken(pair.snapshot.created_at, is_coming, output)),
        plain(called(&pair.snapshot.name, is_coming)),
        plain(format!("now: {}", reason(pair.now))),
    ];
    let candidate = plain(format!("candidate: {}", reason(pair.candidate)));
    [now, vec![plain(""), plain(""), plain(""), plain(""), plain(""), candidate]]
}
