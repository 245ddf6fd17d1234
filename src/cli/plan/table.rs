//! A plan for people: per instance a timeline and a table, newest first; then the sums, and what the guard says.

use std::fmt::Write as _;

use jiff::tz::TimeZone;
use jiff::{Timestamp, Unit};

use crate::cli::once;
use crate::cli::output::{Output, Tone, to_the_second};
use crate::cli::plan::decided;
use crate::picture::line::{self, Fate, LEGEND, Mark};
use crate::policy::PolicyName;
use crate::retention::inventory::ClockSkew;
use crate::retention::plan::Decision;
use crate::retention::reason::ReasonText;
use crate::retention::verdict::{Rule, Verdict};
use crate::run::Planned;
use crate::run::report::sums_of;
use crate::snapshot::Snapshot;
use crate::state::last_runs::PlanSums;
use crate::text::{counted, printable};

/// On a terminal narrower than this the names of snapshots are left out: the instance and the time say the same, and
/// the reasons need the room.
const NAMES_FROM: usize = 130;

/// So wide is a timeline where no terminal bounds it.
const LINE_WIDTH: usize = 98;

/// On a wide terminal a timeline needs no more.
const LINE_WIDTH_MAX: usize = 120;

/// So many reasons stand in the table beside the first at most; JSON has them all.
const MORE_REASONS_MAX: usize = 5;

/// All plans, and at the end what they add up to.
pub(crate) fn render<'a>(
    plans: impl IntoIterator<Item = (&'a PolicyName, &'a Planned)>,
    at: Timestamp,
    output: Output,
) -> String {
    let mut text = String::new();
    let (mut plans_made, mut held, mut sums) = (0, 0, PlanSums::default());
    for (policy, planned) in plans {
        if plans_made == 0 {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "timelines: {LEGEND}\n");
        }
        text.push_str(&render_one(policy, planned, at, output));
        let more = sums_of(&planned.plan);
        sums.keep += more.keep;
        sums.delete += more.delete;
        sums.ignore += more.ignore;
        held += usize::from(planned.held.is_some());
        plans_made += 1;
    }
    if plans_made > 1 {
        let _ = writeln!(text, "in all: {}", told(sums.keep, sums.delete, sums.ignore));
        if held > 0 {
            let verb = if held == 1 { "is" } else { "are" };
            let _ = writeln!(text, "{held} of {plans_made} plans {verb} HELD by the guard: see above");
        }
    }
    text
}

/// One policy in one zone.
fn render_one(policy: &PolicyName, planned: &Planned, at: Timestamp, output: Output) -> String {
    let zone = &planned.listed.inventory.zone;
    let mut text = format!("policy {policy}, zone {zone}, as of {}\n", to_the_second(at));
    let all: Vec<_> = decided(planned).collect();
    for group in all.chunk_by(|(_, one), (_, next)| one.instance_id == next.instance_id) {
        let Some((_, first)) = group.first() else { continue };
        let count = |verdict| {
            let of_it =
                |(decision, _): &&(&Decision, &Snapshot)| decision.verdict == verdict && !is_coming(decision);
            group.iter().filter(of_it).count() as u64
        };
        let sums = told(count(Verdict::Keep), count(Verdict::Delete), count(Verdict::Ignore));
        let _ = writeln!(text, "\n  {}: {sums}", title(planned, first));
        let _ = writeln!(text, "  {}", timeline(group, at, output));
        let rows = group.iter().map(|(decision, snapshot)| row(decision, snapshot, at)).collect();
        let head = ["VERDICT", "AGE", "TAKEN", "UNTIL", "SNAPSHOT", "WHY"];
        text.push_str(&indented_table(&head, rows, output));
    }
    if !planned.ahead.is_empty() {
        let rows = planned.ahead.iter().map(|ahead| {
            let (is_coming, why) = (ahead.snapshot.id.is_none(), ahead.why.clone());
            let words = [
                ahead.action.as_str().to_owned(),
                once::instance(ahead.snapshot.instance_name.as_deref()),
                taken(ahead.snapshot.created_at, is_coming),
                called(&ahead.snapshot.name, is_coming),
                why,
            ];
            words.map(|word| (word, Tone::Plain)).to_vec()
        });
        text.push('\n');
        let head = ["FIRST", "INSTANCE", "TAKEN", "SNAPSHOT", "WHY"];
        text.push_str(&indented_table(&head, rows.collect(), output));
    }
    for warning in &planned.listed.warnings {
        text.push('\n');
        text.push_str(&noted("note:", Tone::Dim, warning, output));
    }
    text.push_str(&summary(planned, &all, output));
    text.push('\n');
    text
}

/// What it adds up to, and what the guard says.
fn summary(planned: &Planned, all: &[(&Decision, &Snapshot)], output: Output) -> String {
    let sums = sums_of(&planned.plan);
    let coming = all.iter().filter(|(decision, _)| is_coming(decision)).count();
    let kept = sums.keep.saturating_sub(coming as u64);
    // Writing to a String cannot fail.
    let mut text = format!(
        "\n  {}: {}\n",
        counted(all.len() - coming, "snapshot"),
        told(kept, sums.delete, sums.ignore)
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
        text.push_str(&noted("HELD:", Tone::Bad, &held.to_string(), output));
    } else if sums.delete > 0 {
        text.push_str(match planned.listed.inventory.clock {
            ClockSkew::OnPaper => {
                "  the guard lets this pass; a run also looks at its clock, and at what vanished since the last one\n"
            }
            _ => "  the guard lets this pass\n",
        });
    }
    text
}

/// How many stay, go and are left alone.
pub(super) fn told(keep: u64, delete: u64, ignore: u64) -> String {
    format!("{keep} kept, {delete} to delete, {ignore} ignored")
}

/// A word, and a text beside it that keeps to its column.
pub(super) fn noted(word: &str, tone: Tone, text: &str, output: Output) -> String {
    let row = vec![(word.to_owned(), tone), (text.to_owned(), Tone::Plain)];
    indented_table(&[], vec![row], output)
}

/// A table, without the names of snapshots where there is no room for them.
pub(super) fn indented_table(head: &[&str], mut rows: Vec<Vec<(String, Tone)>>, output: Output) -> String {
    let mut head = head.to_vec();
    let is_narrow = output.width().is_some_and(|width| width < NAMES_FROM);
    if let Some(names) = head.iter().position(|word| *word == "SNAPSHOT").filter(|_| is_narrow) {
        head.remove(names);
        for row in &mut rows {
            row.remove(names);
        }
    }
    output.table(&head, rows).lines().fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "  {line}");
        text
    })
}

/// Whose snapshots these are.
pub(super) fn title(planned: &Planned, snapshot: &Snapshot) -> String {
    match (planned.listed.instance_of(snapshot), snapshot.instance_id) {
        (Some(instance), _) => format!("{} ({})", printable(&instance.name), instance.id),
        (None, Some(id)) => format!("instance {id}, not listed any more"),
        (None, None) => "no instance".to_owned(),
    }
}

fn timeline(group: &[(&Decision, &Snapshot)], at: Timestamp, output: Output) -> String {
    let marks: Vec<Mark> = group
        .iter()
        .map(|(decision, snapshot)| Mark {
            at: snapshot.created_at,
            fate: match decision.verdict {
                Verdict::Keep if is_coming(decision) => Fate::ToBeTaken,
                Verdict::Keep => Fate::Keep,
                Verdict::Delete => Fate::Delete,
                Verdict::Ignore => Fate::Ignore,
            },
        })
        .collect();
    let width = output.width().map_or(LINE_WIDTH, |width| width.saturating_sub(2).min(LINE_WIDTH_MAX));
    line::line(&marks, at, width)
}

fn row(decision: &Decision, snapshot: &Snapshot, at: Timestamp) -> Vec<(String, Tone)> {
    let (verdict, tone) = shown(Some(decision.verdict));
    let is_coming = is_coming(decision);
    let until = match decision.verdict {
        Verdict::Keep => decision.expires_at.map_or_else(|| "-".to_owned(), date),
        Verdict::Delete | Verdict::Ignore => String::new(),
    };
    vec![
        (verdict.to_owned(), tone),
        (age(snapshot.created_at, at, is_coming), Tone::Plain),
        (taken(snapshot.created_at, is_coming), Tone::Plain),
        (until, Tone::Plain),
        (called(&snapshot.name, is_coming), Tone::Plain),
        (why(decision), Tone::Plain),
    ]
}

/// A verdict as people see it: what goes must catch the eye, also without colours.
pub(super) fn shown(verdict: Option<Verdict>) -> (&'static str, Tone) {
    match verdict {
        Some(Verdict::Keep) => ("keep", Tone::Good),
        Some(Verdict::Delete) => ("DELETE", Tone::Bad),
        Some(Verdict::Ignore) => ("ignore", Tone::Dim),
        None => ("-", Tone::Dim),
    }
}

/// The reasons that matter most: of one that stays the first in words, the other rules that hold it by name, and who
/// else does; of one that goes the rule that let it go, and its nearest misses.
pub(super) fn why(decision: &Decision) -> String {
    let holders = decision.keep_rules();
    let mut told: Vec<String> = decision.reasons().take(1).map(|reason| reason.to_string()).collect();
    let mut others: Vec<&str> = Vec::new();
    for rule in &holders {
        let name = rule.as_str();
        if *rule != decision.rule && !others.contains(&name) {
            others.push(name);
        }
    }
    if !others.is_empty() {
        let short: Vec<&str> = others.iter().map(|name| name.strip_prefix("keep_").unwrap_or(name)).collect();
        told.push(format!("also {}", short.join(", ")));
    }
    // Each rule that holds it has one reason, and those come first. Beside them it matters who else holds it; that a
    // copy is missing matters only where nothing else does.
    let matters = |text: &ReasonText<'_>| holders.is_empty() || text.reason.is_from_outside();
    let rest = decision.reasons().skip(holders.len().max(1)).filter(matters);
    let rest: Vec<String> = rest.map(|reason| reason.to_string()).collect();
    let (shown, left) =
        rest.split_at(if rest.len() > MORE_REASONS_MAX { MORE_REASONS_MAX - 1 } else { rest.len() });
    told.extend_from_slice(shown);
    if !left.is_empty() {
        told.push(format!("and {} more", left.len()));
    }
    told.join("; ")
}

fn is_coming(decision: &Decision) -> bool {
    decision.rule == Rule::Create
}

/// When it was taken; `-` of one that is to be.
pub(super) fn taken(at: Timestamp, is_coming: bool) -> String {
    if is_coming { "-".to_owned() } else { at.to_string() }
}

/// Its name; one that is to be taken has none yet.
pub(super) fn called(name: &str, is_coming: bool) -> String {
    if is_coming { "(to be taken)".to_owned() } else { name.to_owned() }
}

/// A day, in UTC as all times.
fn date(at: Timestamp) -> String {
    TimeZone::UTC.to_datetime(at).date().to_string()
}

/// `3d 4h`, `4h 5m` or `5m`; `-` for what is not yet.
pub(super) fn age(created_at: Timestamp, at: Timestamp, is_coming: bool) -> String {
    if is_coming {
        return "-".to_owned();
    }
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
