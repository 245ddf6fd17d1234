//! The page for people, as HTML: no script, nothing from outside, and one stylesheet, which a hash allows.
//!
//! It is made from an [`Overview`] alone. Names from outside are cut and made printable; the templates escape them.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use sha2::{Digest as _, Sha256};
use url::form_urlencoded;

use crate::archive::stats::ArchiveStats;
use crate::picture::svg::{self, Picture, Row};
use crate::policy::name::PolicyName;
use crate::retention::verdict::Verdict;
use crate::run::details::{COPIES_MAX, CopyDetails, CopyKept, SNAPSHOTS_MAX, SnapshotDetails};
use crate::snapshot::SnapshotId;
use crate::state::history::Change;
use crate::state::last_runs::ZoneCoverage;
use crate::telemetry::overview::{
    InstanceOverview, InstanceState, InstanceSummary, NextDeletion, NextDeletions, Overview, PolicyOfInstance,
};
use crate::telemetry::status::{DownloadStatus, PolicyStatus, Problem};
use crate::text::{counted, excerpt, size, span_of_minutes};

/// Instances on one page.
const ROWS: usize = 50;

/// The most policies, archives, downloads or problems on a page: the rest is in `snapwarden status`.
const LISTED: usize = 50;

/// Instances among what is wrong; all are in the table.
const WORST: usize = 8;

/// What an instance lacks, where others are listed beside it; its own page has all.
const LACKS: usize = 3;

/// A name at Exoscale has at most 255 characters.
const NAME: usize = 255;

/// An error may quote a long answer.
const SENTENCE: usize = 1000;

static STYLE: LazyLock<String> =
    LazyLock::new(|| format!("{}{}", include_str!("page/style.css"), svg::STYLE));

/// What a browser may do with the page: show it, with its own stylesheet, and send the search to where it came from.
pub(crate) static CONTENT_SECURITY_POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = STANDARD.encode(Sha256::digest(STYLE.as_bytes()));
    format!(
        "default-src 'none'; style-src 'sha256-{hash}'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
});

/// The page of all: the instances that a text is found in, and everything else where none is asked for.
pub(crate) fn index(overview: &Overview, query: &str, page: usize) -> String {
    let query = query.trim();
    let is_first = query.is_empty() && page <= 1;
    let now = overview.status.at.unwrap_or(Timestamp::UNIX_EPOCH);
    let (tone, headline) = verdict(overview);
    let body = html! {
        (banner(overview, tone, &headline))
        @if is_first {
            (wrong(overview))
            (running(overview, now))
            (deleted_next(&overview.deleted_next, now))
            (deleted_last(&overview.deleted_last, now))
        }
        (instances(overview, query, page, now))
        @if is_first {
            (policies(overview, now))
            (archives(overview, now))
        }
    };
    document(&format!("{} {headline}", tone.sign()), Some(is_first), &body, now, &overview.status.version)
}

/// The page of one instance.
pub(crate) fn instance(instance: &InstanceOverview, version: &str) -> String {
    let InstanceOverview { at, summary, .. } = instance;
    let (name, tone) = (excerpt(&summary.name, NAME), tone(summary.state));
    let id = summary.id.map(|id| id.to_string()).unwrap_or_default();
    let policies: Vec<&str> = summary.policies.iter().map(PolicyName::as_str).collect();
    let body = html! {
        section class={ "verdict " (tone.class()) } {
            h1 { bdi { (name) } }
            p { (state(summary.state)) " · zone " (summary.zone) " · " code { (id) } }
        }
        dl {
            dt { "Newest snapshot" }
            dd { (moment(summary.newest_snapshot, *at, "none")) }
            dt { "Newest verified copy" }
            dd {
                (moment(summary.newest_copy.as_ref().map(|(at, _)| *at), *at, "none: if the instance is deleted, so are its snapshots"))
                @if let Some((_, archive)) = &summary.newest_copy { " in archive " (archive) }
            }
            dt { "Policies" }
            dd { (policies.join(", ")) }
        }
        @if !summary.problems.is_empty() {
            h2 id="wrong" { "What is wrong" }
            ul class="list" { @for problem in &summary.problems { (problem_item(std::slice::from_ref(problem), None, tone)) } }
        }
        (timeline(instance))
        (snapshots(instance))
        (copies(instance))
        h2 { "Look closer" }
        ul {
            li { code { "snapwarden coverage " (id) } }
            li { code { "snapwarden history --instance " (id) } }
            li { code { "snapwarden archive list --instance " (id) } }
            @if summary.newest_copy.is_some() {
                li { "Restore the newest copy: " code { "snapwarden restore --latest " (id) " --to disk.qcow2" } }
            }
        }
    };
    document(&format!("{} {name}", tone.sign()), None, &body, *at, version)
}

/// The page where there is none.
pub(crate) fn not_found(now: Timestamp, version: &str) -> String {
    let body = html! {
        h1 { "There is no such instance here" }
        p { "No policy knows it since its last run. It may have another id, or be deleted for more than a week." }
        p { a href="/" { "All instances" } }
        p { "What is known of it: " code { "snapwarden history --instance NAME" } }
    };
    document("Not found", None, &body, now, version)
}

/// How good or bad something is: shown by a sign, a word and a color.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tone {
    Bad,
    Warn,
    Good,
    Dim,
}

impl Tone {
    fn class(self) -> &'static str {
        match self {
            Self::Bad => "bad",
            Self::Warn => "warn",
            Self::Good => "good",
            Self::Dim => "dim",
        }
    }

    fn sign(self) -> &'static str {
        match self {
            Self::Bad => "✕",
            Self::Warn => "!",
            Self::Good => "✓",
            Self::Dim => "–",
        }
    }
}

fn tone(state: InstanceState) -> Tone {
    match state {
        InstanceState::NoSnapshot
        | InstanceState::Uncovered
        | InstanceState::Stale
        | InstanceState::NoCopy => Tone::Bad,
        InstanceState::Vanished => Tone::Warn,
        InstanceState::BackedUp => Tone::Good,
        InstanceState::New | InstanceState::Exempt | InstanceState::SnapshotsOnly => Tone::Dim,
    }
}

/// A result of a run.
fn tone_of(result: &str) -> Tone {
    match result {
        "success" => Tone::Good,
        "held" => Tone::Warn,
        _ => Tone::Bad,
    }
}

fn signed(tone: Tone, word: &str) -> Markup {
    html! { span class={ "state " (tone.class()) } { span aria-hidden="true" { (tone.sign()) " " } (word) } }
}

fn state(state: InstanceState) -> Markup {
    signed(tone(state), state.as_str())
}

/// A time with how long ago or ahead it is.
fn moment(at: Option<Timestamp>, now: Timestamp, none: &str) -> Markup {
    let Some(at) = at else { return html! { span class="dim" { (none) } } };
    html! {
        span class="moment" {
            time class="nowrap" datetime=(at.strftime("%Y-%m-%dT%H:%M:%SZ")) { (at.strftime("%Y-%m-%d %H:%MZ")) }
            " " span class="dim nowrap" { (ago(at, now)) }
        }
    }
}

/// As `3d 4h ago` or `in 5m`.
fn ago(at: Timestamp, now: Timestamp) -> String {
    let passed = now.duration_since(at);
    match (passed.abs().as_mins(), passed.is_negative()) {
        (0, true) => "in a moment".to_owned(),
        (0, false) => "just now".to_owned(),
        (minutes, true) => format!("in {}", span_of_minutes(minutes)),
        (minutes, false) => format!("{} ago", span_of_minutes(minutes)),
    }
}

fn document(title: &str, index: Option<bool>, body: &Markup, now: Timestamp, version: &str) -> String {
    let links = [
        ("wrong", "What is wrong"),
        ("running", "Running"),
        ("next", "Deleted next"),
        ("last", "Deleted last"),
        ("instances", "Instances"),
        ("policies", "Policies"),
        ("archives", "Archives"),
    ];
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="robots" content="noindex";
                title { (title) " · snapwarden" }
                style { (PreEscaped(STYLE.as_str())) }
            }
            body {
                a class="skip" href="#main" { "Skip to the content" }
                header {
                    p class="name" { a href="/" { "snapwarden" } }
                    nav aria-label="Parts of the page" {
                        ul {
                            @if index == Some(true) {
                                @for (id, text) in links { li { a href={ "#" (id) } { (text) } } }
                            } @else {
                                li { a href="/" { "Overview" } }
                                li { a href="/#instances" { "All instances" } }
                            }
                        }
                    }
                }
                main id="main" { (body) }
                footer {
                    p { "As of " (now.strftime("%Y-%m-%d %H:%M:%SZ")) "; reload for later. All times are UTC. It shows what the last runs found: nothing is asked of the cloud or the archives for it." }
                    p { "snapwarden " (excerpt(version, NAME)) " · " a href="/metrics" { "metrics" } " · " a href="/api/v1/status" { "status as JSON" } " · " a href="/livez" { "livez" } " · " a href="/readyz" { "readyz" } }
                }
            }
        }
    };
    page.into_string()
}

/// A table that is a list of cards where the screen is narrow.
fn table(caption: &Markup, heads: &[&str], rows: impl Iterator<Item = Vec<Markup>>) -> Markup {
    html! {
        table role="table" {
            caption { (caption) }
            thead role="rowgroup" {
                tr role="row" { @for head in heads { th role="columnheader" scope="col" { (head) } } }
            }
            tbody role="rowgroup" {
                @for row in rows {
                    tr role="row" {
                        @for (head, cell) in heads.iter().zip(&row) {
                            td role="cell" data-label=(head) class=[cell.0.is_empty().then_some("empty")] { div { (cell) } }
                        }
                    }
                }
            }
        }
    }
}

fn command(text: &str) -> Markup {
    html! { span class="run" { code { (text) } } }
}

/// The commands to begin with, each once.
fn commands(problems: &[Problem]) -> Markup {
    let mut all: Vec<&str> = problems.iter().map(|problem| problem.command.as_str()).collect();
    all.dedup();
    html! { @for text in all { (command(text)) } }
}

/// One entry of what is wrong; an instance that lacks several things is one entry.
fn problem_item(problems: &[Problem], of: Option<&InstanceSummary>, tone: Tone) -> Markup {
    html! {
        li class=(tone.class()) {
            div {
                @if let Some(instance) = of { (link(instance)) ": " }
                @for (number, problem) in problems.iter().enumerate() {
                    @if number > 0 { "; " }
                    (excerpt(&problem.text, SENTENCE))
                }
                (commands(problems))
            }
        }
    }
}

fn link(instance: &InstanceSummary) -> Markup {
    let name = excerpt(&instance.name, NAME);
    let name = if name.is_empty() { "(no name)".to_owned() } else { name };
    html! {
        @match instance.id {
            Some(id) => a href={ "/instance/" (instance.zone) "/" (id) } { bdi { (name) } },
            None => bdi { (name) },
        }
    }
}

fn first(problems: &[Problem]) -> &[Problem] {
    problems.get(..LACKS).unwrap_or(problems)
}

fn lacking(overview: &Overview) -> impl Iterator<Item = &InstanceSummary> {
    overview.instances.iter().filter(|instance| !instance.problems.is_empty())
}

fn meant(overview: &Overview) -> usize {
    overview.instances.iter().filter(|instance| instance.state != InstanceState::Exempt).count()
}

fn snapshots_only(overview: &Overview) -> usize {
    overview.instances.iter().filter(|one| one.state == InstanceState::SnapshotsOnly).count()
}

/// Whether everything is backed up, in one line.
fn verdict(overview: &Overview) -> (Tone, String) {
    let (lacking, meant) = (lacking(overview).count(), meant(overview));
    let status = &overview.status;
    let is_listed = |at: Option<Timestamp>| at.is_some();
    if status.policies.is_empty() {
        (Tone::Bad, "Nothing is backed up: there is no policy".to_owned())
    } else if !status.policies.values().any(|policy| policy.enabled) {
        (Tone::Bad, "Nothing is backed up: no policy is enabled".to_owned())
    } else if lacking > 0 {
        let verb = if lacking == 1 { "lacks" } else { "lack" };
        (
            Tone::Bad,
            format!(
                "Not everything is backed up: {lacking} of {} {verb} what they should have",
                counted(meant, "instance")
            ),
        )
    } else if status.zones.values().any(|zone| !is_listed(zone.at)) {
        (Tone::Warn, "Not known yet whether everything is backed up: no run has listed every zone".to_owned())
    } else {
        let all = counted(meant, "instance");
        let good = match snapshots_only(overview) {
            0 => format!("Everything is backed up: {all}"),
            only => format!("Nothing is missing: {all}, {only} of them with snapshots only"),
        };
        match overview.problems.len() {
            0 => (Tone::Good, good),
            1 => (Tone::Warn, format!("{good}; but there is 1 problem")),
            problems => (Tone::Warn, format!("{good}; but there are {problems} problems")),
        }
    }
}

fn banner(overview: &Overview, tone: Tone, headline: &str) -> Markup {
    let sum = |count: fn(&ZoneCoverage) -> u64| -> u64 { overview.status.zones.values().map(count).sum() };
    let only_snapshots = snapshots_only(overview);
    let listed = overview.status.zones.values().filter_map(|zone| zone.at).min();
    html! {
        section class={ "verdict " (tone.class()) } {
            h1 { span aria-hidden="true" { (tone.sign()) " " } (headline) }
            p {
                (sum(|zone| zone.covered)) " covered, " (sum(|zone| zone.uncovered)) " not covered, " (sum(|zone| zone.exempt)) " exempt"
                @if let (Some(at), Some(now)) = (listed, overview.status.at) { "; listed " (moment(Some(at), now, "")) }
            }
            @if only_snapshots > 0 {
                p { "Snapshots are deleted with their instance: only an export is kept elsewhere." }
            }
            @if overview.status.draining { p { strong { "The daemon is stopping: no new run begins." } } }
        }
    }
}

fn wrong(overview: &Overview) -> Markup {
    let all = lacking(overview).count();
    html! {
        h2 id="wrong" { "What is wrong, and what to do now" }
        @if overview.problems.is_empty() && all == 0 {
            p { "Nothing." }
        } @else {
            ul class="list" {
                @for problem in overview.problems.iter().take(LISTED) { (problem_item(std::slice::from_ref(problem), None, Tone::Warn)) }
                @for instance in lacking(overview).take(WORST) {
                    (problem_item(first(&instance.problems), Some(instance), tone(instance.state)))
                }
            }
            @if all > WORST { p { a href="#instances" { (all - WORST) " more instances with problems" } } }
            @if overview.problems.len() > LISTED { p { (overview.problems.len() - LISTED) " more problems: " code { "snapwarden status" } } }
        }
    }
}

fn running(overview: &Overview, now: Timestamp) -> Markup {
    let status = &overview.status;
    let runs: Vec<_> =
        status.policies.iter().filter_map(|(name, policy)| Some((name, policy.running_since?))).collect();
    let next = status.policies.iter().filter_map(|(name, policy)| Some((policy.next_run_at?, name))).min();
    html! {
        h2 id="running" { "What runs" }
        @for (name, since) in runs.iter().take(LISTED) {
            p { "Policy " strong { (name) } " runs since " (moment(Some(*since), now, "")) }
        }
        @if runs.is_empty() { p { "No policy runs." } }
        @if let Some((at, name)) = next { p { "Next: policy " strong { (name) } " at " (moment(Some(at), now, "")) } }
        @if !status.downloads.is_empty() {
            (table(&html! { "Images on their way into archives" }, &["Instance", "Snapshot", "Into", "Progress"], status.downloads.iter().take(LISTED).map(download)))
        }
    }
}

fn download(download: &DownloadStatus) -> Vec<Markup> {
    let name = excerpt(download.instance_name.as_deref().unwrap_or("(not listed)"), NAME);
    let how_far = &download.how_far;
    let percent = how_far.percent();
    vec![
        html! { bdi { (name) } },
        html! { code { (excerpt(&download.snapshot_name, NAME)) } },
        html! { (download.archives.join(", ")) },
        html! {
            @if let Some(percent) = percent { progress max="100" value=(percent) aria-label={ "download of " (name) } {} " " }
            (how_far.to_string())
        },
    ]
}

fn deleted_next(all: &[NextDeletions], now: Timestamp) -> Markup {
    let row = |next: &NextDeletions, one: &NextDeletion| {
        vec![
            html! { (moment(next.at, now, "when it is run manually")) },
            html! { a href={ "/instance/" (next.zone) "/" (one.instance_id) } { bdi { (excerpt(&one.instance_name, NAME)) } } },
            html! { (moment(Some(one.created_at), now, "")) " " code { (one.snapshot_id.short()) } },
            html! { "policy " (next.policy) ": " (excerpt(&one.why, SENTENCE)) },
        ]
    };
    let is_any = |next: &&NextDeletions| next.count.is_some_and(|count| count > 0);
    let rows: Vec<_> = all
        .iter()
        .filter(is_any)
        .flat_map(|next| next.first.iter().map(move |one| row(next, one)))
        .take(LISTED)
        .collect();
    html! {
        h2 id="next" { "What will be deleted next" }
        @if all.is_empty() { p { "Nothing: no enabled policy has a retention." } }
        @if !rows.is_empty() {
            (table(&html! { "By the next run of each policy, if nothing changes before: snapshots" }, &["When", "Instance", "Snapshot of", "Why"], rows.into_iter()))
        }
        @for next in all.iter().take(LISTED) {
            @let more = next.count.unwrap_or_default().saturating_sub(next.first.len());
            @if next.is_blocked {
                p { (signed(Tone::Warn, "blocked")) " Policy " strong { (next.policy) } " in " (next.zone) ": the guard blocked the last run's deletions; until they are allowed, none is made." (command(&format!("snapwarden plan {}", next.policy))) }
            } @else if more > 0 {
                p { "Policy " strong { (next.policy) } " in " (next.zone) ": " (more) " more." (command(&format!("snapwarden plan {} --only delete", next.policy))) }
            } @else if next.count.is_none() {
                p { "Policy " strong { (next.policy) } " in " (next.zone) ": not known before this daemon has run it, " (moment(next.at, now, "manually")) "." (command(&format!("snapwarden plan {} --only delete", next.policy))) }
            } @else if next.count == Some(0) {
                p { "Policy " strong { (next.policy) } " in " (next.zone) ": nothing at its next run, " (moment(next.at, now, "manually")) @if next.others_take { ", unless others take snapshots before" } "." }
            }
        }
    }
}

fn deleted_last(all: &[Change], now: Timestamp) -> Markup {
    let row = |change: &Change| {
        let snapshot = &change.snapshot;
        let name = excerpt(snapshot.instance_name.as_deref().unwrap_or("(not listed)"), NAME);
        let kind = match change.action.as_str() {
            "prune_copy" => "copy",
            "delete_template" => "template",
            _ => "snapshot",
        };
        let reason = change.reasons.first().map(|why| excerpt(why, SENTENCE)).unwrap_or_default();
        let why = change
            .policy
            .as_ref()
            .map_or(reason.clone(), |policy| format!("policy {}: {reason}", excerpt(policy, NAME)));
        vec![
            html! { (moment(Some(change.at), now, "")) },
            html! {
                @match (snapshot.instance_id, &change.zone) {
                    (Some(id), Some(zone)) => a href={ "/instance/" (zone) "/" (id) } { bdi { (name) } },
                    _ => bdi { (name) },
                }
            },
            html! {
                (kind) " of " (moment(snapshot.created_at, now, "?")) " "
                @if let Some(id) = snapshot.id { code { (id.short()) } }
                @if let Some(archive) = &change.archive { " in archive " (excerpt(archive, NAME)) }
            },
            html! { (why) },
        ]
    };
    html! {
        h2 id="last" { "What was deleted last" }
        @if all.is_empty() {
            p { "Nothing that the audit log of the last month has." }
        } @else {
            (table(&html! { "The newest first; more by " code { "snapwarden history --action delete" } }, &["When", "Instance", "What", "Why"], all.iter().map(row)))
        }
    }
}

fn is_found(instance: &InstanceSummary, query: &str) -> bool {
    let query = query.to_lowercase();
    let has = |text: &str| text.to_lowercase().contains(&query);
    query.is_empty()
        || has(&instance.name)
        || has(instance.state.as_str())
        || instance.zone.as_str().starts_with(&query)
        || instance.policies.iter().any(|policy| policy.as_str() == query)
        || instance.id.is_some_and(|id| id.to_string().starts_with(&query))
}

/// Where a part of the instances is.
fn address(query: &str, page: usize) -> String {
    let query = form_urlencoded::Serializer::new(String::new())
        .append_pair("q", query)
        .append_pair("page", &page.to_string())
        .finish();
    format!("/?{query}#instances")
}

/// How many instances are in each state, each with a link to these alone.
fn states(instances: &[InstanceSummary]) -> Markup {
    let mut counts: BTreeMap<InstanceState, usize> = BTreeMap::new();
    for instance in instances {
        *counts.entry(instance.state).or_default() += 1;
    }
    html! {
        @if counts.len() > 1 {
            ul class="states" aria-label="Instances by state" {
                @for (state, count) in counts {
                    li { a class=(tone(state).class()) href=(address(state.as_str(), 1)) { (count) " " (state.as_str()) } }
                }
            }
        }
    }
}

fn instances(overview: &Overview, query: &str, page: usize, now: Timestamp) -> Markup {
    let found: Vec<&InstanceSummary> =
        overview.instances.iter().filter(|instance| is_found(instance, query)).collect();
    let pages = found.len().div_ceil(ROWS).max(1);
    let page = page.clamp(1, pages);
    let row = |instance: &&&InstanceSummary| {
        let policies: Vec<&str> = instance.policies.iter().map(PolicyName::as_str).collect();
        vec![
            html! { (link(instance)) " " span class="dim nowrap" { (instance.zone) } },
            html! {
                (state(instance.state))
                @for problem in first(&instance.problems) { p { (excerpt(&problem.text, SENTENCE)) } }
                (commands(first(&instance.problems)))
            },
            html! { (moment(instance.newest_snapshot, now, "none")) },
            html! {
                (moment(instance.newest_copy.as_ref().map(|(at, _)| *at), now, "none"))
                @if let Some((_, archive)) = &instance.newest_copy { br; span class="dim" { "in " (archive) } }
            },
            html! { (policies.join(", ")) },
        ]
    };
    let to = |page: usize| address(query, page);
    let shown = found.iter().skip((page - 1) * ROWS).take(ROWS);
    html! {
        h2 id="instances" { "Instances" }
        form method="get" action="/" role="search" {
            label for="q" { "Name, id, zone, policy or state" }
            input id="q" name="q" type="search" value=(excerpt(query, NAME)) maxlength="255";
            button { "Find" }
            @if !query.is_empty() { a href="/#instances" { "Show all" } }
        }
        (states(&overview.instances))
        @if found.is_empty() {
            p { @if query.is_empty() { "None is known: no run has ended yet." } @else { "None is found." } }
        } @else {
            (table(&html! { (counted(found.len(), "instance")) ", the worst first" @if pages > 1 { "; page " (page) " of " (pages) } }, &["Instance", "State", "Newest snapshot", "Newest copy", "Policies"], shown.map(|one| row(&one))))
        }
        @if pages > 1 {
            nav class="pages" aria-label="Pages of instances" {
                @if page > 1 { a href=(to(1)) { "First" } a rel="prev" href=(to(page - 1)) { "Previous" } }
                span { "Page " (page) " of " (pages) }
                @if page < pages { a rel="next" href=(to(page + 1)) { "Next" } a href=(to(pages)) { "Last" } }
            }
        }
    }
}

fn policies(overview: &Overview, now: Timestamp) -> Markup {
    let row = |(name, policy): (&String, &PolicyStatus)| {
        let schedule = match (&policy.schedule, policy.paused_since) {
            (_, Some(since)) => {
                html! { (signed(Tone::Warn, "paused")) " since " (moment(Some(since), now, "")) }
            }
            _ if !policy.enabled => html! { span class="dim" { "not enabled" } },
            (None, _) => html! { span class="dim" { "manual" } },
            (Some(schedule), _) => {
                html! { code { (excerpt(schedule, NAME)) } " " span class="dim" { (policy.timezone.as_deref().unwrap_or("")) } }
            }
        };
        let next = html! {
            @match policy.running_since {
                Some(since) => { "running since " (moment(Some(since), now, "")) }
                None => (moment(policy.next_run_at, now, "-")),
            }
        };
        let last = html! {
            @match &policy.last {
                Some(last) => { (signed(tone_of(&last.result), &last.result)) " " (moment(Some(last.finished_at), now, "")) }
                None => span class="dim" { "never" },
            }
        };
        let zones: Vec<&str> = policy.zones.keys().map(String::as_str).collect();
        let success = policy.zones.values().map(|zone| zone.last_success_at).min().flatten();
        vec![
            html! { strong { (name) } },
            schedule,
            next,
            last,
            html! { (moment(success, now, "never")) },
            html! { (zones.join(", ")) },
        ]
    };
    let all = &overview.status.policies;
    html! {
        h2 id="policies" { "Policies" }
        @if all.is_empty() { p { "None." (command("snapwarden check")) } } @else {
            (table(&html! { (counted(all.len(), "policy")) @if all.len() > LISTED { ", of which " (LISTED) " are shown; all: " code { "snapwarden status" } } }, &["Policy", "Schedule", "Next run", "Last run", "Last success", "Zones"], all.iter().take(LISTED).map(row)))
        }
    }
}

fn archives(overview: &Overview, now: Timestamp) -> Markup {
    let all = &overview.status.archives;
    let row = |(name, archive): (&String, &ArchiveStats)| {
        let (tone, word) = match (&archive.error, archive.corrupt) {
            (Some(_), _) => (Tone::Bad, "cannot be read".to_owned()),
            (None, 0) => (Tone::Good, "readable".to_owned()),
            (None, corrupt) => (Tone::Bad, format!("{corrupt} damaged")),
        };
        vec![
            html! { strong { (name) } },
            signed(tone, &word),
            html! { (archive.images) },
            html! { (size(archive.bytes)) },
            html! { (archive.free_bytes.map_or_else(|| "-".to_owned(), size)) },
            html! { (moment(archive.verified_at, now, "-")) },
        ]
    };
    html! {
        h2 id="archives" { "Archives" }
        @if all.is_empty() { p { "None is configured, or none was read yet." } } @else {
            (table(&html! { "Verified copies by archive" }, &["Archive", "State", "Copies", "Size", "Free", "All verified since"], all.iter().take(LISTED).map(row)))
        }
    }
}

/// A policy that deletes nothing says nothing of its snapshots, unless there is no other.
fn is_shown(instance: &InstanceOverview, policy: &PolicyOfInstance) -> bool {
    policy.prunes || !instance.policies.iter().any(|policy| policy.prunes)
}

/// What policies, by their places, say of a snapshot.
type Said<'i> = Vec<(usize, &'i SnapshotDetails)>;

/// A snapshot with what each policy says of it.
fn by_snapshot(instance: &InstanceOverview) -> Vec<(SnapshotId, Said<'_>)> {
    let mut all: BTreeMap<(Reverse<Timestamp>, SnapshotId), Said<'_>> = BTreeMap::new();
    for (place, policy) in
        instance.policies.iter().enumerate().filter(|(_, policy)| is_shown(instance, policy))
    {
        for snapshot in &policy.snapshots {
            all.entry((Reverse(snapshot.created_at), snapshot.id)).or_default().push((place, snapshot));
        }
    }
    all.into_iter().map(|((_, id), said)| (id, said)).collect()
}

fn snapshots(instance: &InstanceOverview) -> Markup {
    let now = instance.at;
    let policy = |place: usize| instance.policies.get(place);
    let expires = |(place, snapshot): &(usize, &SnapshotDetails)| {
        let due = policy(*place).and_then(|policy| policy.next_run_at);
        match (snapshot.deleted_next.is_some(), snapshot.is_blocked(), snapshot.decision.expires_at) {
            (_, true, _) => html! { (signed(Tone::Warn, "to delete")) " but not deleted by the last run" },
            (true, ..) => html! { (signed(Tone::Warn, "next run")) " " (moment(due, now, "manually")) },
            (_, _, Some(at)) => moment(Some(at), now, ""),
            (_, _, None) => html! { span class="dim" { "no date" } },
        }
    };
    let row = |(id, said): &(SnapshotId, Said<'_>)| {
        let taken = said.first().map(|(_, snapshot)| snapshot.created_at);
        vec![
            moment(taken, now, ""),
            html! { code { (id.short()) } },
            html! {
                @for (place, snapshot) in said {
                    p {
                        @if let Some(policy) = policy(*place) { strong { (policy.policy) } ": " }
                        code { (snapshot.decision.rule) } " " span class="dim" { (excerpt(&snapshot.why(), SENTENCE)) }
                    }
                }
            },
            html! { @for one in said { p { (expires(one)) } } },
        ]
    };
    let all = by_snapshot(instance);
    let unknown =
        instance.policies.iter().filter(|policy| policy.listed_at.is_none() && is_shown(instance, policy));
    html! {
        h2 id="snapshots" { "Snapshots" }
        @for policy in unknown {
            p { "What policy " strong { (policy.policy) } " keeps is known once this daemon has run it, " (moment(policy.next_run_at, now, "manually")) "." (command(&format!("snapwarden plan {}", policy.policy))) }
        }
        @if !all.is_empty() {
            (table(&html! { "What keeps each, and when it expires if no newer one comes and nothing changes" }, &["Taken", "Snapshot", "Kept by", "Expires"], all.iter().take(2 * SNAPSHOTS_MAX).map(row)))
        }
    }
}

fn copies(instance: &InstanceOverview) -> Markup {
    let now = instance.at;
    let row = |copy: &CopyDetails| {
        let expires = match copy.kept {
            CopyKept::By(_, Verdict::Delete, _) => signed(Tone::Warn, "to delete"),
            CopyKept::By(_, _, Some(at)) => moment(Some(at), now, ""),
            _ => html! { span class="dim" { "no date" } },
        };
        vec![
            html! { (moment(Some(copy.created_at), now, "")) " " code { (copy.snapshot_id.short()) } },
            html! { (copy.archive) },
            html! { (size(copy.bytes)) },
            moment(Some(copy.verified_at), now, ""),
            html! { (copy.kept.text()) },
            expires,
        ]
    };
    let all = &instance.copies;
    html! {
        h2 id="copies" { "Copies" }
        @if all.is_empty() {
            p { "None is known." }
        } @else {
            (table(&html! { "Verified copies in archives: the newest " (COPIES_MAX) " in each" }, &["Snapshot of", "Archive", "Size", "Verified", "Kept by", "Expires"], all.iter().map(row)))
        }
    }
}

/// When each snapshot and copy began and ends.
fn timeline(instance: &InstanceOverview) -> Markup {
    let now = instance.at;
    let snapshots = instance.policies.iter().flat_map(|policy| &policy.snapshots);
    let copies = instance.copies.iter().map(|copy| copy.created_at);
    let Some(from) = snapshots.map(|snapshot| snapshot.created_at).chain(copies).min() else {
        return html! {};
    };
    let ahead = (now.duration_since(from) / 3).max(SignedDuration::from_hours(48));
    let until = now.checked_add(ahead).unwrap_or(Timestamp::MAX);
    let mut rows: Vec<Row<'_>> = Vec::new();
    for policy in instance.policies.iter().filter(|policy| is_shown(instance, policy)) {
        let end = |snapshot: &SnapshotDetails| match snapshot.deleted_next {
            Some(_) => policy.next_run_at.unwrap_or(now).max(now),
            None => snapshot.decision.expires_at.unwrap_or(until).min(until),
        };
        let spans = policy.snapshots.iter().map(|snapshot| (snapshot.created_at, end(snapshot)));
        rows.push(Row {
            label: policy.policy.as_str(),
            detail: "snapshots".to_owned(),
            spans: spans.collect(),
        });
    }
    let mut archives: BTreeMap<&str, Vec<(Timestamp, Timestamp)>> = BTreeMap::new();
    for copy in &instance.copies {
        let end = match copy.kept {
            CopyKept::By(_, Verdict::Delete, _) => now,
            CopyKept::By(_, _, Some(at)) => at.min(until),
            _ => until,
        };
        archives.entry(copy.archive.as_str()).or_default().push((copy.created_at, end));
    }
    rows.extend(archives.into_iter().map(|(label, spans)| Row { label, detail: "copies".to_owned(), spans }));
    rows.retain(|row| !row.spans.is_empty());
    let picture = Picture {
        title: &instance.summary.name,
        subtitle: "from when each was taken until it expires, if no newer one comes and nothing changes",
        from,
        until,
        now: Some(now),
        time_zone: &TimeZone::UTC,
        curves: Vec::new(),
        rows,
        notes: Vec::new(),
    };
    html! {
        h2 id="timeline" { "Timeline" }
        figure tabindex="0" role="region" aria-label="Timeline" { (PreEscaped(svg::draw_in_page(&picture))) }
    }
}
