//! The changes by another configuration: only the snapshots whose verdict differs.
//!
//! Both configurations are applied to the same listings at the same time, each with all its policies. A snapshot that only
//! one of them selects counts as a change as well, so that none drops out unnoticed.

use std::collections::HashMap;
use std::fmt::Write as _;

use jiff::Timestamp;
use serde::Serialize;

use crate::cli::once::plan_sums;
use crate::cli::output::{Output, Tone, to_the_second};
use crate::cli::plan::decisions::{DecisionOutput, PolicyInZone, SnapshotOutput, decided};
use crate::cli::plan::table::{age, called, shown, taken, title, why};
use crate::policy::name::PolicyName;
use crate::retention::plan::Decision;
use crate::retention::verdict::Verdict;
use crate::run::preview::Preview;
use crate::run::report::sums_of;
use crate::snapshot::{InstanceId, Snapshot, SnapshotId, ZoneName};
use crate::text::counted;

/// The change of a policy in a zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Change {
    /// Both configurations have it.
    Changed,
    /// Only the candidate has it.
    New,
    /// Only the current configuration has it.
    #[serde(rename = "gone")]
    Removed,
}

/// The differences for a policy in a zone.
pub(super) struct Difference<'a> {
    policy: &'a PolicyName,
    zone: &'a ZoneName,
    change: Change,
    now: Option<&'a Preview>,
    candidate: Option<&'a Preview>,
    pairs: Vec<Pair<'a>>,
}

/// A snapshot with the decision of each configuration.
struct Pair<'a> {
    snapshot: &'a Snapshot,
    /// The plan that knows the snapshot.
    planned: &'a Preview,
    now: Option<&'a Decision>,
    candidate: Option<&'a Decision>,
}

/// A snapshot that the run will create has no id yet: its instance identifies it.
#[derive(PartialEq, Eq, Hash)]
enum Key {
    There(SnapshotId),
    Coming(Option<InstanceId>),
}

fn key(planned: &Preview, snapshot: &Snapshot) -> Key {
    if planned.listing.inventory.coming.contains(&snapshot.id) {
        Key::Coming(snapshot.instance_id)
    } else {
        Key::There(snapshot.id)
    }
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
        let change = match (now, candidate) {
            (Some(_), None) => Change::Removed,
            (None, _) => Change::New,
            (Some(_), Some(_)) => Change::Changed,
        };
        let planned = |side: Option<&'a PolicyInZone>| side.map(|side| side.planned.as_ref().ok());
        let (now, candidate) = match (planned(now), planned(candidate)) {
            (Some(None), _) | (_, Some(None)) => continue,
            (now, candidate) => (now.flatten(), candidate.flatten()),
        };
        let pairs = pairs_of(now, candidate);
        if change != Change::Changed || !pairs.is_empty() {
            differences.push(Difference { policy: name, zone, change, now, candidate, pairs });
        }
    }
    differences
}

/// The snapshots with different verdicts, by instance, newest first.
fn pairs_of<'a>(now: Option<&'a Preview>, candidate: Option<&'a Preview>) -> Vec<Pair<'a>> {
    let mut others: HashMap<Key, &Decision> = candidate.map_or_else(HashMap::new, |planned| {
        decided(planned).map(|(decision, snapshot)| (key(planned, snapshot), decision)).collect()
    });
    let mut pairs: Vec<Pair<'a>> = Vec::new();
    if let Some(planned) = now {
        for (decision, snapshot) in decided(planned) {
            let other = others.remove(&key(planned, snapshot));
            if other.map(|other| other.verdict) != Some(decision.verdict) {
                pairs.push(Pair { snapshot, planned, now: Some(decision), candidate: other });
            }
        }
    }
    if let Some(planned) = candidate {
        for (decision, snapshot) in decided(planned) {
            if others.contains_key(&key(planned, snapshot)) {
                pairs.push(Pair { snapshot, planned, now: None, candidate: Some(decision) });
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

#[derive(Serialize)]
pub(super) struct CandidateOutput<'a> {
    at: Timestamp,
    policies: Vec<DifferenceOutput<'a>>,
}

#[derive(Serialize)]
struct DifferenceOutput<'a> {
    policy: &'a PolicyName,
    zone: &'a ZoneName,
    change: Change,
    changes: Vec<ChangeOutput<'a>>,
}

#[derive(Serialize)]
struct ChangeOutput<'a> {
    snapshot: SnapshotOutput<'a>,
    now: Option<DecisionOutput>,
    candidate: Option<DecisionOutput>,
}

impl<'a> CandidateOutput<'a> {
    pub(super) fn new(at: Timestamp, differences: &'a [Difference<'a>]) -> Self {
        let policies = differences.iter().map(|difference| DifferenceOutput {
            policy: difference.policy,
            zone: difference.zone,
            change: difference.change,
            changes: difference
                .pairs
                .iter()
                .map(|pair| ChangeOutput {
                    snapshot: SnapshotOutput::new(pair.planned, pair.snapshot),
                    now: pair.now.map(DecisionOutput::new),
                    candidate: pair.candidate.map(DecisionOutput::new),
                })
                .collect(),
        });
        Self { at, policies: policies.collect() }
    }
}

/// The differences as text.
pub(super) fn render(differences: &[Difference<'_>], at: Timestamp, output: Output) -> String {
    let mut text = format!("changes by the candidate, as of {}\n", to_the_second(at));
    let (mut more, mut fewer) = (0, 0);
    for difference in differences {
        let Difference { policy, zone, change, now, candidate, pairs } = difference;
        // Writing to a String cannot fail.
        let _ = match change {
            Change::Changed => writeln!(text, "\npolicy {policy}, zone {zone}"),
            Change::New => writeln!(text, "\npolicy {policy}, zone {zone}: NEW"),
            Change::Removed => {
                writeln!(text, "\npolicy {policy}, zone {zone}: REMOVED, no longer applied")
            }
        };
        for group in pairs.chunk_by(|one, next| one.snapshot.instance_id == next.snapshot.instance_id) {
            let Some(first) = group.first() else { continue };
            let _ = writeln!(text, "\n  {}", title(first.planned, first.snapshot));
            let rows = group.iter().flat_map(|pair| rows(pair, at)).collect();
            let head = ["NOW", "CANDIDATE", "AGE", "TAKEN", "SNAPSHOT", "WHY"];
            text.push_str(&output.indented_table(&head, rows));
        }
        let deletes =
            |side: Option<&Decision>| side.is_some_and(|decision| decision.verdict == Verdict::Delete);
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
            let words = [side.to_owned(), plan_sums(&sums)];
            Some(words.map(|word| (word, Tone::Plain)).to_vec())
        });
        text.push_str(&output.indented_table(&[], sums.collect()));
        if let Some(held) = candidate.and_then(|planned| planned.held.as_ref()) {
            text.push_str(&output.note("BLOCKED:", Tone::Bad, &format!("by the candidate's guard: {held}")));
        }
        more += more_here;
        fewer += fewer_here;
    }
    let _ = if differences.is_empty() {
        writeln!(text, "\nno changes: every selected snapshot has the same verdict")
    } else {
        writeln!(text, "\ntotal: {more} more to delete, {fewer} fewer to delete")
    };
    text
}

/// A row for the change with the current reason, and one for the candidate's reason.
fn rows(pair: &Pair<'_>, at: Timestamp) -> [Vec<(String, Tone)>; 2] {
    let word = |side: Option<&Decision>| {
        let (word, tone) = shown(side.map(|decision| decision.verdict));
        (word.to_owned(), tone)
    };
    let reason = |side: Option<&Decision>| side.map_or_else(|| "not selected".to_owned(), why);
    let is_coming = pair.planned.listing.inventory.coming.contains(&pair.snapshot.id);
    let plain = |text: String| (text, Tone::Plain);
    let nothing = || plain(String::new());
    let now = vec![
        word(pair.now),
        word(pair.candidate),
        plain(age(pair.snapshot.created_at, at, is_coming)),
        plain(taken(pair.snapshot.created_at, is_coming)),
        plain(called(&pair.snapshot.name, is_coming)),
        plain(format!("now: {}", reason(pair.now))),
    ];
    let candidate = plain(format!("candidate: {}", reason(pair.candidate)));
    [now, vec![nothing(), nothing(), nothing(), nothing(), nothing(), candidate]]
}
