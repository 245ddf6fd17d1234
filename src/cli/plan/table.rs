//! A plan as text: for each instance a timeline and a table, newest first; then the sums and the guard's verdict.

use std::fmt::Write as _;

use jiff::Timestamp;

use crate::cli::once::{instance, plan_sums};
use crate::cli::output::{Output, Row, Tone, moment, plain};
use crate::cli::plan::decisions::{Filter, decided, filtered};
use crate::picture::line::{self, Fate, LEGEND, date};
use crate::policy::name::PolicyName;
use crate::retention::inventory::ClockSkew;
use crate::retention::plan::Decision;
use crate::retention::reason::ReasonText;
use crate::retention::verdict::{Rule, Verdict};
use crate::run::archive_retention::CopyDecision;
use crate::run::preview::Preview;
use crate::run::promote::TemplateDecision;
use crate::run::report::sums_of;
use crate::snapshot::{InstanceId, Snapshot};
use crate::state::last_runs::PlanSums;
use crate::text::{counted, printable, span_of_minutes, to_the_second};

/// The width of a timeline without a terminal.
const LINE_WIDTH: usize = 98;

/// A timeline does not become more readable beyond this width.
const LINE_WIDTH_MAX: usize = 120;

const CONSISTENT: &str = "application-consistent";

/// The most reasons in the table beside the first; JSON has all of them.
const MORE_REASONS_MAX: usize = 5;

/// All plans, and their total.
pub(crate) fn render<'a>(
    plans: impl IntoIterator<Item = (&'a PolicyName, &'a Preview)>,
    filter: &Filter,
    at: Timestamp,
    output: Output,
) -> String {
    let mut text = String::new();
    let (mut plans_made, mut blocked, mut sums) = (0, 0, PlanSums::default());
    for (policy, planned) in plans {
        if plans_made == 0 && !filter.is_summary {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "timelines: {LEGEND}\n");
        }
        text.push_str(&render_one(policy, planned, filter, at, output));
        let more = sums_of(&planned.plan);
        sums.keep += more.keep;
        sums.delete += more.delete;
        sums.ignore += more.ignore;
        blocked += usize::from(planned.held.is_some());
        plans_made += 1;
    }
    if plans_made > 1 {
        let _ = writeln!(text, "total: {}", plan_sums(&sums));
        if blocked > 0 {
            let verb = if blocked == 1 { "is" } else { "are" };
            let _ = writeln!(text, "{blocked} of {plans_made} plans {verb} BLOCKED by the guard: see above");
        }
    }
    text
}

/// One policy in one zone.
fn render_one(
    policy: &PolicyName,
    planned: &Preview,
    filter: &Filter,
    at: Timestamp,
    output: Output,
) -> String {
    let zone = &planned.listing.inventory.zone;
    let mut text = format!("policy {policy}, zone {zone}, as of {}\n", to_the_second(at));
    let hooks: Vec<String> =
        planned.hooks.each().map(|(key, program)| format!("`{key}` {}", printable(&program.name))).collect();
    if !hooks.is_empty() && !filter.is_summary {
        let _ = writeln!(text, "  hooks, which only a run starts: {}", hooks.join(", "));
    }
    let all: Vec<_> = decided(planned).collect();
    let shown: Vec<_> = filtered(planned, filter).collect();
    for group in shown.chunk_by(|(_, one), (_, next)| one.instance_id == next.instance_id) {
        let Some((_, first)) = group.first() else { continue };
        let count = |verdict| {
            let of_it =
                |(decision, _): &&(&Decision, &Snapshot)| decision.verdict == verdict && !is_coming(decision);
            group.iter().filter(of_it).count() as u64
        };
        let sums = PlanSums {
            keep: count(Verdict::Keep),
            delete: count(Verdict::Delete),
            ignore: count(Verdict::Ignore),
            ..PlanSums::default()
        };
        let _ = writeln!(text, "\n  {}: {}", title(planned, first, output), plan_sums(&sums));
        let _ = writeln!(text, "  {}", timeline(group, at, output));
        let rows =
            group.iter().map(|(decision, snapshot)| row(planned, decision, snapshot, at, output)).collect();
        let head = ["VERDICT", "AGE", "TAKEN", "UNTIL", "ID", "SNAPSHOT", "WHY"];
        text.push_str(&output.indented_table(&head, rows));
    }
    if !planned.actions.is_empty() && !filter.is_summary {
        let rows = planned.actions.iter().map(|action| {
            let (snapshot, is_coming) = (&action.snapshot, action.snapshot.id.is_none());
            vec![
                plain(action.action.as_str()),
                plain(instance(snapshot.instance_name.as_deref())),
                plain(taken(snapshot.created_at, is_coming, output)),
                plain(called(&snapshot.name, is_coming)),
                plain(&action.why),
            ]
        });
        text.push_str("\n  before deleting:\n");
        let head = ["ACTION", "INSTANCE", "TAKEN", "SNAPSHOT", "WHY"];
        text.push_str(&output.indented_table(&head, rows.collect()));
    }
    if !planned.templates.is_empty() && !filter.is_summary {
        let rows = planned.templates.iter().map(|TemplateDecision { facts, name, needed, .. }| {
            vec![
                deleted_unless(needed.is_some()),
                plain(name),
                plain(instance(facts.snapshot.instance_name.as_deref())),
                plain(taken(facts.snapshot.created_at, false, output)),
                plain(needed.clone().unwrap_or_else(|| facts.reasons.join("; "))),
            ]
        });
        text.push_str("\n  templates that `promote.keep` does not keep:\n");
        let head = ["VERDICT", "TEMPLATE", "INSTANCE", "TAKEN", "WHY"];
        text.push_str(&output.indented_table(&head, rows.collect()));
    }
    if !planned.copies.is_empty() && !filter.is_summary {
        let rows = planned.copies.iter().map(|CopyDecision { facts, blocked_by, .. }| {
            vec![
                deleted_unless(blocked_by.is_some()),
                plain(facts.archive.as_ref().map(ToString::to_string).unwrap_or_default()),
                plain(instance(facts.snapshot.instance_name.as_deref())),
                plain(taken(facts.snapshot.created_at, false, output)),
                plain(facts.reasons.join("; ")),
            ]
        });
        text.push_str("\n  copies that the archives' retention does not keep:\n");
        let head = ["VERDICT", "ARCHIVE", "INSTANCE", "TAKEN", "WHY"];
        text.push_str(&output.indented_table(&head, rows.collect()));
    }
    for warning in &planned.listing.warnings {
        text.push('\n');
        text.push_str(&output.note("note:", Tone::Dim, warning));
    }
    text.push_str(&summary(planned, &all, output));
    text.push('\n');
    text
}

fn deleted_unless(is_kept: bool) -> (String, Tone) {
    let (word, tone) = if is_kept { ("keep", Tone::Good) } else { ("DELETE", Tone::Bad) };
    (word.to_owned(), tone)
}

/// The sums, and the guard's verdict.
fn summary(planned: &Preview, all: &[(&Decision, &Snapshot)], output: Output) -> String {
    let sums = sums_of(&planned.plan);
    let coming = all.iter().filter(|(decision, _)| is_coming(decision)).count();
    let listed = PlanSums { keep: sums.keep.saturating_sub(coming as u64), ..sums.clone() };
    // Writing to a String cannot fail.
    let mut text = format!("\n  {}: {}\n", counted(all.len() - coming, "snapshot"), plan_sums(&listed));
    if coming > 0 {
        let _ = writeln!(text, "  {} to be taken first", counted(coming, "snapshot"));
    }
    for (count, reason) in [
        (sums.blocked_by_hold, "they are on hold"),
        (sums.blocked_by_policy, "another policy keeps them"),
        (sums.blocked_by_paused, "a paused policy kept them"),
        (sums.blocked_by_export, "a verified copy is missing"),
        (sums.blocked_by_archive, "an archive cannot be read"),
        (sums.blocked_by_source, "a newer snapshot of their instance is missing"),
    ] {
        if count > 0 {
            let _ = writeln!(text, "  kept only because {reason}: {count}");
        }
    }
    for (allowance, ends_at) in &planned.allowances {
        let whole = if allowance.zone.is_none() { "in all its zones" } else { "in this zone" };
        let deletes = usize::try_from(allowance.deletes).unwrap_or(usize::MAX);
        let _ = writeln!(
            text,
            "  allowed until {}: {} {whole}",
            to_the_second(*ends_at),
            counted(deletes, "deletion")
        );
    }
    if let Some(pending) = &planned.pending {
        text.push_str(&output.note("PENDING:", Tone::Bad, pending));
    }
    for blocked in &planned.copies_blocked {
        text.push_str(&output.note("BLOCKED:", Tone::Bad, blocked));
    }
    if let Some(held) = &planned.held {
        text.push_str(&output.note("BLOCKED:", Tone::Bad, &format!("by the guard: {held}")));
    } else if sums.delete > 0 {
        text.push_str(match planned.listing.inventory.clock {
            ClockSkew::OnPaper => {
                "  the guard allows this; a run also checks its clock and what disappeared\n"
            }
            _ => "  the guard allows this\n",
        });
    }
    text
}

/// The instance of a group of snapshots.
pub(super) fn title(planned: &Preview, snapshot: &Snapshot, output: Output) -> String {
    let shown = |id: InstanceId| if output.is_narrow() { id.short() } else { id.to_string() };
    match (planned.listing.instance_of(snapshot), snapshot.instance_id) {
        (Some(instance), _) => format!("{} ({})", printable(&instance.name), shown(instance.id)),
        (None, Some(id)) => format!("instance {id}, no longer listed"),
        (None, None) => "no instance".to_owned(),
    }
}

fn timeline(group: &[(&Decision, &Snapshot)], at: Timestamp, output: Output) -> String {
    let mark = |(decision, snapshot): &(&Decision, &Snapshot)| {
        let fate = match decision.verdict {
            Verdict::Keep if is_coming(decision) => Fate::ToBeTaken,
            Verdict::Keep => Fate::Keep,
            Verdict::Delete => Fate::Delete,
            Verdict::Ignore => Fate::Ignore,
        };
        (snapshot.created_at, fate)
    };
    let marks: Vec<_> = group.iter().map(mark).collect();
    let width = output.width().map_or(LINE_WIDTH, |width| width.saturating_sub(2).min(LINE_WIDTH_MAX));
    line::line(&marks, at, width)
}

fn row(planned: &Preview, decision: &Decision, snapshot: &Snapshot, at: Timestamp, output: Output) -> Row {
    let (verdict, tone) = shown(decision);
    let is_coming = is_coming(decision);
    let until = match decision.verdict {
        Verdict::Keep => decision.expires_at.map_or_else(|| "-".to_owned(), date),
        Verdict::Delete | Verdict::Ignore => String::new(),
    };
    vec![
        (verdict.to_owned(), tone),
        plain(age(snapshot.created_at, at, is_coming)),
        plain(taken(snapshot.created_at, is_coming, output)),
        plain(until),
        plain(if is_coming { "-".to_owned() } else { snapshot.id.short() }),
        plain(called(&snapshot.name, is_coming)),
        plain(with_consistency(why(planned, decision), snapshot)),
    ]
}

/// Says of a snapshot that it is application-consistent: most are not.
fn with_consistency(why: String, snapshot: &Snapshot) -> String {
    let is_said = snapshot.application_consistent != Some(true) || why.contains(CONSISTENT);
    if is_said { why } else { format!("{why}; {CONSISTENT}") }
}

/// A verdict for people: a deletion must be obvious even without colors.
pub(crate) fn shown(decision: &Decision) -> (&'static str, Tone) {
    match decision.verdict {
        Verdict::Keep => ("keep", Tone::Good),
        Verdict::Delete => ("DELETE", Tone::Bad),
        Verdict::Ignore => ("ignore", Tone::Dim),
    }
}

/// The most important reasons. For a kept snapshot: the first in full, other rules that keep it by name, and other
/// policies and holds. For a deleted one: whether that waits for an export, the rule that deletes it, and the keep rules
/// that it missed.
pub(super) fn why(planned: &Preview, decision: &Decision) -> String {
    let holders = decision.keep_rules();
    let after_export = after_export(planned, decision).map(str::to_owned);
    let first = decision.reasons().take(1).map(|reason| reason.to_string());
    let mut told: Vec<String> = after_export.into_iter().chain(first).collect();
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

/// Says of a deletion that it waits for an export of this very run.
pub(crate) fn after_export(planned: &Preview, decision: &Decision) -> Option<&'static str> {
    let waits = decision.verdict == Verdict::Delete && planned.after_export.contains(&decision.index);
    waits.then_some("after export")
}

fn is_coming(decision: &Decision) -> bool {
    decision.rule == Rule::Create
}

/// When it was taken; `-` for one that the run will create.
pub(super) fn taken(at: Timestamp, is_coming: bool, output: Output) -> String {
    if is_coming { "-".to_owned() } else { moment(at, output) }
}

/// Its name; one that the run will create has none yet.
pub(super) fn called(name: &str, is_coming: bool) -> String {
    if is_coming { "(to be taken)".to_owned() } else { name.to_owned() }
}

/// `3d 4h`, `4h 5m` or `5m`; `-` for one that the run will create.
pub(crate) fn age(created_at: Timestamp, at: Timestamp, is_coming: bool) -> String {
    if is_coming {
        return "-".to_owned();
    }
    let passed = at.duration_since(created_at);
    if passed.as_mins() < 0 { "-".to_owned() } else { span_of_minutes(passed.as_mins()) }
}
