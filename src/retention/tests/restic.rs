//! What a well-known tool keeps, and where this one would decide otherwise.
//!
//! The cases lie beside the project, or where `SNAPWARDEN_SHARED` says: policies in restic's words over snapshots of one
//! host, with what restic keeps of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::*;
use crate::policy::Period;

/// One case of the file.
#[derive(Deserialize)]
struct Case {
    name: String,
    policy: BTreeMap<String, Words>,
    timezone: String,
    snapshots: Vec<Timestamp>,
    /// Each time as often as it is kept.
    keep: Vec<Timestamp>,
}

/// A count, where -1 is all; or a span, where `m` are months.
#[derive(Deserialize)]
#[serde(untagged)]
enum Words {
    Count(i64),
    Span(String),
}

impl Words {
    fn count(&self) -> Count {
        match self {
            Self::Count(-1) => Count::All,
            Self::Count(count) => slots(u32::try_from(*count).unwrap()).unwrap(),
            Self::Span(text) => panic!("{text} is no count"),
        }
    }

    /// Years beyond a thousand are no span of ours; nothing in the file is so old.
    fn span(&self) -> Span {
        match self {
            Self::Span(text) => span(&text.replace('m', "mo").replace("9999y", "1000y")),
            Self::Count(count) => panic!("{count} is no span"),
        }
    }
}

impl Case {
    fn retention(&self) -> Retention {
        let mut rules = no_rules();
        for (key, words) in &self.policy {
            let period = |adverb: &str| *Period::ALL.iter().find(|period| period.adverb() == adverb).unwrap();
            match (key.as_str(), key.strip_prefix("within_")) {
                ("last", _) => rules.keep_last = Some(words.count()),
                ("within", _) => rules.keep_within = Some(words.span()),
                (_, Some(adverb)) => *rules.keep_within_each.get_mut(period(adverb)) = Some(words.span()),
                (adverb, None) => *rules.keep.get_mut(period(adverb)) = Some(words.count()),
            }
        }
        rules
    }
}

/// The cases; none where the file is not there.
fn cases() -> Vec<Case> {
    let folder = std::env::var_os("SNAPWARDEN_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let path = folder.join("retention-cases/restic.json");
    let Ok(text) = crate::disk::read_named_file(&path, 1 << 24) else {
        crate::text::skipped(format_args!("there is no {}", path.display()));
        return Vec::new();
    };
    let cases: Vec<Case> = serde_json::from_str(&text).unwrap();
    assert_eq!(cases.len(), 36);
    cases
}

/// In none of the 36 the edge cases decide otherwise than restic: none has a snapshot exactly on a cut-off (17), a
/// month before a 31st (16), an hour that comes twice (12) or a date in the future (9). A difference that is meant would
/// stand here with its number.
#[test]
fn restic_keeps_the_same() {
    for case in cases() {
        let zone = inventory(case.snapshots.iter().map(|taken| snap("web-1", *taken)));
        // Windows are measured there from the newest snapshot.
        let newest = *case.snapshots.iter().max().unwrap();
        let policy = policy("nightly").in_zone(&case.timezone).with(case.retention());
        let plan = plan_of(&[policy], &zone, newest);
        let kept = plan.decisions.iter().filter(|decision| decision.verdict == Verdict::Keep);
        let mut kept: Vec<Timestamp> =
            kept.map(|decision| zone.snapshots[decision.index as usize].created_at).collect();
        let mut theirs = case.keep;
        kept.sort_unstable();
        theirs.sort_unstable();
        assert_eq!(kept, theirs, "{}: kept by us, by restic", case.name);
    }
}

/// What the cases don't show: where the edge cases have it otherwise than restic.
#[test]
fn where_restic_differs_the_edge_cases_say_so() {
    let kept = |taken: &str, rules: Retention, now: &str| {
        let zone = inventory([snap("web-1", at(taken))]);
        plan_of(&[policy("nightly").with(rules)], &zone, at(now)).deletes == 0
    };
    // 17: restic's window is open at its end.
    assert!(kept("2026-09-09T12:00:00Z", keep_within("7d"), "2026-09-16T12:00:00Z"));
    // 16: for restic a month before 31 March is 3 March; here a month after 1 March is 1 April.
    assert!(kept("2026-03-01T12:00:00Z", keep_within("1mo"), "2026-03-31T12:00:00Z"));
    // 12: restic takes the hour from the clock on the wall, with the offset that the snapshot has.
    let zone = inventory(
        ["02:30:00+02:00", "02:30:00+01:00"].map(|time| snap("web-1", at(&format!("2026-10-25T{time}")))),
    );
    let mut hourly = Retention { keep_oldest: false, ..no_rules() };
    *hourly.keep.get_mut(Period::Hour) = slots(9);
    let plan = plan_of(&[policy("nightly").in_zone("Europe/Zurich").with(hourly)], &zone, now());
    assert_eq!(plan.deletes, 0);
}
