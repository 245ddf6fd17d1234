//! A second judge: reads the rules again, slowly and plainly, before anything is deleted.
//!
//! `retention` decides what is deleted, fast and over a million snapshots; a fault in it would delete backups. So each
//! snapshot that a run is about to delete is judged again here, from the same facts, by code that shares nothing with it:
//! of this crate it uses only the nouns `policy`, `schedule` (when a policy was last due) and `snapshot`, and a test reads
//! the sources for that. Where the two disagree, nothing is deleted, and the [`facts`] are written to a file.
//!
//! It is a reading of docs/retention.md in its order, instance by instance: what each policy by itself says (`table`,
//! `case`); holds, required copies and other policies; newer snapshots that are missing; and the same again as things
//! were before each change that has not settled. It answers whatever the facts are, never panics, and in doubt it keeps.

pub(crate) mod calendar;
mod case;
pub mod facts;
mod reading;
pub mod ruling;
mod table;

use std::collections::{BTreeMap, HashMap};

use crate::judge::case::{Case, archives};
use crate::judge::facts::{Facts, SnapshotFacts};
use crate::judge::ruling::{Ruling, Verdict};
use crate::snapshot::{InstanceId, SnapshotId};

/// What is said against deleting a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Objection {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The verdict instead, as a sentence.
    pub says: String,
}

/// What is said against deleting each of these; empty if all of them may be deleted.
pub fn objections(facts: &Facts, victims: &[SnapshotId]) -> Vec<Objection> {
    let rulings = match rulings(facts) {
        Ok(rulings) => rulings,
        Err(why) => {
            let object = |snapshot: &SnapshotId| Objection { snapshot: *snapshot, says: why.clone() };
            return victims.iter().map(object).collect();
        }
    };
    let ruled: HashMap<SnapshotId, Option<&Ruling>> =
        facts.snapshots.iter().zip(&rulings).map(|(one, ruling)| (one.id, ruling.as_ref())).collect();
    // An id that is listed twice is not known.
    let is_unsure = ruled.len() < facts.snapshots.len();
    let object = |snapshot: &SnapshotId| {
        let says = match ruled.get(snapshot) {
            _ if is_unsure => "a snapshot is listed twice".to_owned(),
            None => "it is not listed".to_owned(),
            Some(None) => "ignore (the policy does not select it)".to_owned(),
            Some(Some(ruling)) if ruling.verdict == Verdict::Delete => return None,
            Some(Some(ruling)) => ruling.to_string(),
        };
        Some(Objection { snapshot: *snapshot, says })
    };
    victims.iter().filter_map(object).collect()
}

/// What the policy of the run may do with each snapshot, in the order of the facts; none for one that it does not select.
///
/// # Errors
/// Why the facts can't be read.
pub fn rulings(facts: &Facts) -> Result<Vec<Option<Ruling>>, String> {
    let present = Case::new(facts, &facts.present)?;
    let before: Result<Vec<Case<'_>>, String> =
        facts.before.iter().map(|situation| Case::new(facts, situation)).collect();
    let (before, archives) = (before?, archives(facts));
    let mut rulings: Vec<Option<Ruling>> = vec![None; facts.snapshots.len()];
    for places in by_instance(&facts.snapshots) {
        let group: Vec<&SnapshotFacts> =
            places.iter().filter_map(|place| facts.snapshots.get(*place)).collect();
        let mut ruled = present.judge(&group, &archives);
        let is_deleted =
            |ruling: &Option<Ruling>| ruling.as_ref().is_some_and(|one| one.verdict == Verdict::Delete);
        if !facts.changes_are_allowed && ruled.iter().any(is_deleted) {
            if facts.has_too_many_changes {
                ruled
                    .iter_mut()
                    .filter(|one| is_deleted(one))
                    .for_each(|one| *one = Some(Ruling::keep("change")));
            }
            for case in &before {
                for (now, then) in ruled.iter_mut().zip(case.judge(&group, &archives)) {
                    if is_deleted(now) && !is_deleted(&then) {
                        let then = then.map_or("not selected".to_owned(), |then| then.to_string());
                        *now = Some(Ruling::keep_by(
                            "change",
                            format!("only the change deletes it; before: {then}"),
                        ));
                    }
                }
            }
        }
        let instance = group.first().and_then(|snapshot| snapshot.instance_id);
        let is_emptied = instance.is_some_and(|id| facts.emptied.contains(&id));
        for (place, ruling) in places.into_iter().zip(ruled) {
            let ruling = if is_emptied && is_deleted(&ruling) { Some(Ruling::keep("guard")) } else { ruling };
            if let Some(place) = rulings.get_mut(place) {
                *place = ruling;
            }
        }
    }
    Ok(rulings)
}

/// The places of the snapshots, instance by instance, newest first.
fn by_instance(snapshots: &[SnapshotFacts]) -> Vec<Vec<usize>> {
    let mut groups: BTreeMap<Option<InstanceId>, Vec<(usize, &SnapshotFacts)>> = BTreeMap::new();
    for (place, snapshot) in snapshots.iter().enumerate() {
        groups.entry(snapshot.instance_id).or_default().push((place, snapshot));
    }
    let sorted = groups.into_values().map(|mut group| {
        group.sort_by_key(|(_, snapshot)| std::cmp::Reverse((snapshot.created_at, snapshot.id)));
        group.into_iter().map(|(place, _)| place).collect()
    });
    sorted.collect()
}
