//! Plays a case again about which the plan and the second judge disagreed.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::{Output, Tone, plain};
use crate::disk;
use crate::judge;
use crate::judge::facts::SnapshotFacts;
use crate::judge::ruling::{self, Ruling};
use crate::retention::verdict::{Rule, Verdict};
use crate::run::second_judge::{Disagreement, Victim, plan_again};
use crate::snapshot::SnapshotId;
use crate::text::{chain, counted, printable, to_the_second};

/// As for listings.
const CASE_BYTES_MAX: u64 = 1024 * 1024 * 1024;

/// A snapshot of the case with what each judge says now.
struct Both<'c> {
    snapshot: SnapshotId,
    facts: Option<&'c SnapshotFacts>,
    /// What was said in the run.
    victim: Option<&'c Victim>,
    plan: Option<(Verdict, Rule)>,
    second: Option<&'c Ruling>,
}

impl Both<'_> {
    /// Whether the plan deletes what the second judge does not.
    fn disagree(&self) -> bool {
        let is_deleted = self.plan.is_some_and(|(verdict, _)| verdict == Verdict::Delete);
        is_deleted && self.second.is_none_or(|ruling| ruling.verdict != ruling::Verdict::Delete)
    }
}

/// Shows both verdicts, as this version gives them, for each snapshot about which the judges disagreed or disagree.
///
/// # Errors
/// [`Refusal`] if the file is no such case.
pub(super) fn play_again(file: &Path, output: Output) -> Result<Exit, Refusal> {
    let failed = |why: &str| Refusal::failed(format!("read the case {}: {why}", file.display()));
    let text = disk::read_named_file(file, CASE_BYTES_MAX).map_err(|error| failed(&chain(&error)))?;
    let case: Disagreement = serde_json::from_str(&text).map_err(|error| failed(&chain(&error)))?;
    let facts = &case.facts;
    let plan = plan_again(facts).map_err(|why| failed(&why))?;
    let rulings = judge::rulings(facts).map_err(|why| failed(&why))?;
    let listed = facts.snapshots.iter().zip(&rulings).map(|(one, ruling)| Both {
        snapshot: one.id,
        facts: Some(one),
        victim: case.victims.iter().find(|victim| victim.snapshot == one.id),
        plan: plan.get(&one.id).copied(),
        second: ruling.as_ref(),
    });
    let is_listed = |victim: &&Victim| facts.snapshots.iter().any(|one| one.id == victim.snapshot);
    let unlisted = case.victims.iter().filter(|victim| !is_listed(victim)).map(|victim| Both {
        snapshot: victim.snapshot,
        facts: None,
        victim: Some(victim),
        plan: None,
        second: None,
    });
    let all: Vec<Both<'_>> =
        listed.chain(unlisted).filter(|both| both.victim.is_some() || both.disagree()).collect();
    output.show(|| json_of(&case, &all), || render(&case, &all, output));
    Ok(if all.iter().any(Both::disagree) { Exit::Held } else { Exit::Done })
}

fn json_of(case: &Disagreement, all: &[Both<'_>]) -> Value {
    let one = |both: &Both<'_>| {
        let plan =
            both.plan.map(|(verdict, rule)| json!({ "verdict": verdict.as_str(), "rule": rule.as_str() }));
        json!({
            "snapshot": both.snapshot,
            "name": both.facts.map(|facts| &facts.name),
            "created_at": both.facts.map(|facts| facts.created_at),
            "plan": plan,
            "second_judge": both.second,
            "in_run": both.victim.map(|victim| json!({ "plan": victim.rule, "second_judge": victim.second_judge })),
        })
    };
    let facts = &case.facts;
    json!({
        "at": facts.now,
        "policy": facts.policy,
        "zone": facts.zone,
        "program": case.program,
        "disagree": all.iter().any(Both::disagree),
        "snapshots": all.iter().map(one).collect::<Value>(),
    })
}

fn render(case: &Disagreement, all: &[Both<'_>], output: Output) -> String {
    let facts = &case.facts;
    let at = to_the_second(facts.now);
    let mut text = format!("policy {}, zone {}, as of {at}\n\n", facts.policy, facts.zone);
    let said = |verdict: &str, rule: &str| format!("{verdict} ({rule})");
    let rows = all.iter().map(|both| {
        let tone = if both.disagree() { Tone::Bad } else { Tone::Good };
        let plan = both.plan.map(|(verdict, rule)| said(verdict.as_str(), rule.as_str()));
        let second = both.second.map(ToString::to_string);
        let none = || "not selected".to_owned();
        vec![
            plain(both.snapshot.short()),
            plain(both.facts.map(|facts| printable(&facts.name).into_owned()).unwrap_or_default()),
            (plan.unwrap_or_else(none), tone),
            (second.unwrap_or_else(none), tone),
            plain(both.victim.map(|victim| victim.second_judge.clone()).unwrap_or_default()),
        ]
    });
    let head = ["ID", "SNAPSHOT", "PLAN", "SECOND JUDGE", "SECOND JUDGE IN THE RUN"];
    text.push_str(&output.indented_table(&head, rows.collect()));
    let count = all.iter().filter(|both| both.disagree()).count();
    // Writing to a String cannot fail.
    let _ = match count {
        0 => writeln!(
            text,
            "\n  this version agrees with its second judge; the case was written by {}",
            case.program
        ),
        _ => writeln!(
            text,
            "\n  the judges disagree about {}: one of them has a fault",
            counted(count, "snapshot")
        ),
    };
    text
}
