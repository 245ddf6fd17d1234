//! `simulate`: plays a policy forward and shows the result as a table, as JSON or as a picture.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;

use jiff::tz::TimeZone;
use jiff::{Timestamp, Unit};
use serde_json::{Value, json};

use crate::cli::args::{Global, Simulate, ZoneFile};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::{Output, plain};
use crate::cli::plan::files::{Files, inventories};
use crate::config::sections::Config;
use crate::picture::svg::{self, Curve, Picture, Row};
use crate::policy::span::Span;
use crate::policy::{Policy, Retention};
use crate::retention::inventory::{Copies, Inventory};
use crate::retention::simulate::{self, Forecast, Lifetime, Moment, Simulation, SimulationError};
use crate::retention::verdict::Rule;
use crate::run::list::{FoundArchives, complete, list, memories};
use crate::run::self_instance;
use crate::snapshot::{InstanceId, ZoneName};
use crate::text::{chain, counted, excerpt, printable, to_the_second};

/// The disk size of an imagined instance.
const IMAGINED_GIB: u64 = 10;

/// The most lines of a table: about a screen.
const LINES_MAX: usize = 24;

/// The times of interest after the start.
const LOOKS: &str = "1m 5m 15m 1h 3h 6h 12h 1d 2d 3d 5d 7d 14d 21d 1mo 2mo 3mo 4mo 6mo 9mo 1y 15mo 18mo 21mo 2y 3y 4y \
                     5y 7y 10y 20y 50y 100y";

/// A simulated policy with its result.
struct Simulated<'a> {
    policy: &'a Policy,
    zone: ZoneName,
    from: Timestamp,
    until: Timestamp,
    forecast: Forecast,
    names: HashMap<InstanceId, Box<str>>,
    notes: Vec<String>,
}

/// Shows which snapshots a policy will keep, and when it deletes them.
///
/// # Errors
/// [`Refusal`] if it can't be simulated.
pub async fn simulate(global: &Global, simulate: &Simulate, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let policy = assemble::policy(&config, &simulate.policy)?;
    let zone = assemble::zone_of(policy, simulate.zone.as_ref())?;
    let seams = Seams::real();
    let from = simulate.from.back_from(to_the_second(seams.clock.now()))?;
    let until = simulate.length.after(from, &policy.time_zone).ok_or_else(|| {
        let text = format!("{} after {from} is beyond the end of the calendar", simulate.length);
        Refusal::usage(text)
    })?;
    if !simulate.empty {
        self_instance::check(policy)
            .map_err(|failure| Refusal::failed(format!("{failure}; or see --empty")))?;
    }
    let found = match (&simulate.snapshots, simulate.empty) {
        (_, true) => None,
        (Some(snapshots), _) => {
            let narrowed = Policy { zones: vec![zone.clone()], ..policy.clone() };
            let file = |file: &std::path::PathBuf| ZoneFile { zone: None, file: file.clone() };
            let instances: Vec<ZoneFile> = simulate.instances.iter().map(file).collect();
            inventories(&config, &narrowed, &[file(snapshots)], &instances, &mut Files::default())?
                .pop()
                .map(|(inventory, _)| inventory)
        }
        (None, false) => Some(listed(&config, policy, &zone, &seams).await?),
    };
    let simulated = simulated(&config, policy, zone, found, from, until)?;
    if output.is_svg() {
        output.print(&picture(&simulated, &simulate.length));
    } else {
        output.show(|| json(&simulated), || render(&simulated, output));
    }
    Ok(Exit::Done)
}

/// The zone's current snapshots. Archives are not read: exports count as done.
async fn listed(
    config: &Config,
    policy: &Policy,
    zone: &ZoneName,
    seams: &Seams,
) -> Result<Inventory, Refusal> {
    let credentials = assemble::credentials(config)?;
    let runner = assemble::runner(config, credentials, seams, Use::Reading)?;
    let failed = |failure| Refusal::failed(format!("policy {}, zone {zone}: {failure}", policy.name));
    let seen = list(&runner, zone).await.map_err(failed)?;
    let before = runner.state.last_runs(&policy.name).await.map_err(|error| failed(chain(&error)))?;
    let memories = memories(&runner, policy, &before).await;
    let archives = FoundArchives::default();
    let listed = complete(&runner, &policy.name, &memories, zone, seen, &archives).await.map_err(failed)?;
    let archives = config.archives.keys().map(|name| (name.clone(), Copies::Assumed)).collect();
    Ok(Inventory { archives, ..listed.inventory })
}

/// Simulates with the snapshots found; with an imagined instance if the policy selects nothing.
fn simulated<'a>(
    config: &'a Config,
    policy: &'a Policy,
    zone: ZoneName,
    found: Option<Inventory>,
    from: Timestamp,
    until: Timestamp,
) -> Result<Simulated<'a>, Refusal> {
    let simulate_with = |policies: &[Policy], policy: &Policy, inventory: Inventory, size_gib| {
        let instances = inventory.instances.iter();
        let names = instances.map(|instance| (instance.id, instance.name.clone())).collect();
        let simulation = Simulation { policies, policy, from, until, size_gib };
        let forecast = simulate::simulate(simulation, inventory);
        let refused = |error: SimulationError| Refusal::usage(error.to_string());
        forecast.map(|forecast| (forecast, names)).map_err(refused)
    };
    let mut notes = Vec::new();
    let mut real: Option<(Forecast, HashMap<_, _>)> = None;
    if let Some(inventory) = found {
        real = Some(simulate_with(&config.policies, policy, inventory, None)?);
        if real.take_if(|(forecast, _)| forecast.instances == 0 && forecast.lifetimes.is_empty()).is_some() {
            notes.push(format!("the policy selects nothing in zone {zone}, neither instances nor snapshots"));
        }
    }
    let (forecast, names) = if let Some(real) = real {
        real
    } else {
        notes.push(format!(
            "nothing here is real: it begins with one imagined instance, whose disk has {IMAGINED_GIB} GiB, and no \
             snapshot"
        ));
        let (alone, inventory) = simulate::imaginary_instance(policy, &zone);
        simulate_with(std::slice::from_ref(&alone), &alone, inventory, Some(IMAGINED_GIB))?
    };
    if forecast.moments.len() < 2 {
        notes.push("the schedule has no run in that time, so nothing is taken or deleted".to_owned());
    }
    if forecast.instances == 0 {
        notes.push("no listed instance is selected, so no new snapshots are taken".to_owned());
    } else if !policy.create {
        notes.push(
            "the policy takes no snapshots itself: it is assumed that one of each instance is taken just before each \
             of its runs"
                .to_owned(),
        );
    }
    if let Some(name) = &forecast.not_selected {
        notes.push(format!(
            "new snapshots are left out: the policy does not select names such as `{}`",
            excerpt(name, 80)
        ));
    }
    let unknown = forecast.lifetimes.iter().filter(|life| life.snapshot.size_gib.is_none()).count();
    if unknown > 0 {
        notes.push(format!("{} of unknown size, counted as 0 GiB", counted(unknown, "snapshot")));
    }
    if policy.export.is_some() {
        notes.push("exports count as done: no snapshot waits for its copy".to_owned());
    }
    Ok(Simulated { policy, zone, from, until, forecast, names, notes })
}

fn json(simulated: &Simulated<'_>) -> Value {
    let forecast = &simulated.forecast;
    let life = |life: &Lifetime| {
        let snapshot = &life.snapshot;
        json!({
            // None for one that will be taken.
            "id": Some(snapshot.id).filter(|_| !life.is_new),
            "name": snapshot.name,
            "instance_id": snapshot.instance_id,
            "instance_name": snapshot.instance_id.and_then(|id| simulated.names.get(&id)),
            "size_gib": snapshot.size_gib,
            "born": snapshot.created_at,
            "died": life.deleted_at,
            "held_by": life.holders().into_iter().map(Rule::as_str).collect::<Value>(),
        })
    };
    json!({
        "policy": simulated.policy.name,
        "zone": simulated.zone,
        "from": simulated.from,
        "to": simulated.until,
        "ticks": simulated.runs(),
        "samples": forecast.moments,
        "snapshots": forecast.lifetimes.iter().map(life).collect::<Value>(),
        "max_held": forecast.count_max,
        "max_storage_gib": forecast.storage_gib_max,
        "final_held": forecast.moments.last().map_or(0, |moment| moment.held),
        "notes": simulated.notes,
    })
}

impl Simulated<'_> {
    /// The first moment is the start, not a run.
    fn runs(&self) -> usize {
        self.forecast.moments.len().saturating_sub(1)
    }

    fn schedule(&self) -> String {
        let line = self.policy.schedule.as_ref().map_or("", |schedule| schedule.as_str());
        format!("{line} ({})", self.policy.time_zone.iana_name().unwrap_or("UTC"))
    }

    /// The day in the policy's time zone.
    fn date(&self, at: Timestamp) -> String {
        self.policy.time_zone.to_datetime(at).strftime("%-d %b %Y").to_string()
    }
}

/// As text: the counts over time, the snapshots that are retained longest, and the sums.
fn render(simulated: &Simulated<'_>, output: Output) -> String {
    let forecast = &simulated.forecast;
    let mut text = format!(
        "policy {}, zone {}, from {} to {}: {} by {}\n",
        simulated.policy.name,
        simulated.zone,
        to_the_second(simulated.from),
        to_the_second(simulated.until),
        counted(simulated.runs(), "run"),
        simulated.schedule()
    );
    let instant =
        |at: Option<Timestamp>| at.map_or_else(|| "-".to_owned(), |at| to_the_second(at).to_string());
    let table = |text: &mut String, head: &[&str], rows| {
        text.push('\n');
        for line in output.table(head, rows).lines() {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  {line}");
        }
    };
    let moments = looks(&forecast.moments, simulated.from, LINES_MAX);
    let rows = moments.into_iter().enumerate().map(|(index, moment)| {
        vec![
            plain(if index == 0 { "start".to_owned() } else { length(simulated.from, moment.at) }),
            plain(to_the_second(moment.at).to_string()),
            plain(moment.held.to_string()),
            plain(instant(moment.oldest)),
            plain(moment.oldest.map_or_else(|| "-".to_owned(), |oldest| length(oldest, moment.at))),
            plain(moment.storage_gib.to_string()),
        ]
    });
    table(&mut text, &["AFTER", "AT", "SNAPSHOTS", "OLDEST", "REACHES BACK", "GIB"], rows.collect());

    let shown = longest(simulated);
    let rows = shown.iter().map(|life| {
        let created_at = life.snapshot.created_at;
        let kept_by: Vec<&str> = life.last_holders().into_iter().map(Rule::as_str).collect();
        vec![
            plain(excerpt(&life.snapshot.name, 60)),
            plain(to_the_second(created_at).to_string()),
            plain(instant(life.deleted_at)),
            plain(length(created_at, life.deleted_at.unwrap_or(simulated.until))),
            plain(kept_by.join(", ")),
        ]
    });
    table(&mut text, &["SNAPSHOT", "CREATED", "DELETED", "RETAINED", "KEPT LAST BY"], rows.collect());
    let others = forecast.lifetimes.len() - shown.len();
    if others > 0 {
        let _ = writeln!(text, "  and {others} that are retained no longer; `--output json` lists all");
    }

    let deleted = forecast.lifetimes.iter().filter(|life| life.deleted_at.is_some()).count();
    let taken = forecast.lifetimes.iter().filter(|life| life.is_new).count();
    let last = forecast.moments.last();
    let _ = writeln!(
        text,
        "\n  {} taken, {deleted} deleted, {} left at the end",
        counted(taken, "snapshot"),
        last.map_or(0, |moment| moment.held)
    );
    let _ = writeln!(
        text,
        "  most at the same time: {} with {} GiB, when a run has taken new ones and not yet deleted any",
        counted(forecast.count_max, "snapshot"),
        forecast.storage_gib_max
    );
    if let Some((at, oldest)) = last.and_then(|moment| Some((moment.at, moment.oldest?))) {
        let (oldest, age) = (to_the_second(oldest), length(oldest, at));
        let _ = writeln!(text, "  oldest restore point at the end: {oldest}, {age} back");
    } else {
        text.push_str("  no restore point at the end\n");
    }
    for note in &simulated.notes {
        let _ = writeln!(text, "  note: {}", printable(note));
    }
    text
}

/// The moments to show: all if they are few, else closer to each other near the start.
fn looks(moments: &[Moment], from: Timestamp, lines_max: usize) -> Vec<&Moment> {
    if moments.len() <= lines_max {
        return moments.iter().collect();
    }
    let mut indices = BTreeSet::from([0, 1, moments.len() - 1]);
    let spans = LOOKS.split(' ').filter_map(|text| text.parse::<Span>().ok());
    for look in spans.filter_map(|span| span.after(from, &TimeZone::UTC)) {
        let after = moments.partition_point(|moment| moment.at <= look);
        // Only times that the simulation covers.
        if after < moments.len() {
            indices.insert(after.saturating_sub(1));
        }
    }
    let step = indices.len().div_ceil(lines_max).max(1);
    let last = indices.len() - 1;
    let wanted = indices.into_iter().enumerate().filter(|(nth, _)| nth % step == 0 || *nth == last);
    wanted.filter_map(|(_, index)| moments.get(index)).collect()
}

/// The snapshots that are retained longest, oldest first.
fn longest<'a>(simulated: &'a Simulated<'_>) -> Vec<&'a Lifetime> {
    let duration =
        |life: &Lifetime| life.deleted_at.unwrap_or(simulated.until).duration_since(life.snapshot.created_at);
    let mut lives: Vec<&Lifetime> = simulated.forecast.lifetimes.iter().collect();
    lives.sort_by_key(|life| std::cmp::Reverse(duration(life)));
    lives.truncate(LINES_MAX);
    lives.sort_by_key(|life| (life.snapshot.created_at, life.snapshot.id));
    lives
}

/// `1y 3mo`, `5mo 2d`, `4d 6h`, `6h 30m`: the two largest units.
fn length(from: Timestamp, to: Timestamp) -> String {
    let (from, to) = (from.to_zoned_datetime(TimeZone::UTC), to.to_zoned_datetime(TimeZone::UTC));
    let Ok(span) = to.since((Unit::Year, &from)) else { return "?".to_owned() };
    // The parts of any duration between two timestamps.
    let parts = [
        (i64::from(span.get_years()), "y"),
        (i64::from(span.get_months()), "mo"),
        (i64::from(span.get_days()), "d"),
        (i64::from(span.get_hours()), "h"),
        (span.get_minutes(), "m"),
        (span.get_seconds(), "s"),
    ];
    let first = parts.iter().position(|(count, _)| *count != 0);
    let Some(first) = first else { return "0s".to_owned() };
    let shown = parts.iter().skip(first).take(2).filter(|(count, _)| *count != 0);
    shown.map(|(count, unit)| format!("{count}{unit}")).collect::<Vec<_>>().join(" ")
}

/// The same of a span in seconds, as long as the calendar's are on average.
fn length_of(seconds: u64) -> String {
    let end = i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    end.map_or_else(|| "?".to_owned(), |end| length(Timestamp::UNIX_EPOCH, end))
}

/// The picture of one instance: the one with the most snapshots.
fn picture(simulated: &Simulated<'_>, ahead: &Span) -> String {
    let mut by_instance: BTreeMap<Option<InstanceId>, Vec<&Lifetime>> = BTreeMap::new();
    for life in &simulated.forecast.lifetimes {
        by_instance.entry(life.snapshot.instance_id).or_default().push(life);
    }
    let instances = by_instance.len();
    let name_of = |id: Option<InstanceId>| id.and_then(|id| simulated.names.get(&id)).map(|name| &**name);
    let most = by_instance
        .into_iter()
        .max_by_key(|(id, lives)| (lives.len(), std::cmp::Reverse(name_of(*id).map(str::to_owned))));
    let (instance, lives) = most.unwrap_or_default();
    let mut whose = match (name_of(instance), instance) {
        (Some(name), _) => format!("instance {}", excerpt(name, 40)),
        (None, Some(id)) => format!("instance {id}, no longer listed"),
        (None, None) => "no instance".to_owned(),
    };
    if instances > 1 {
        let _ = write!(whose, ", of {instances} the one with the most snapshots");
    }
    let subtitle = format!(
        "zone {} · {whose} · {} to {} · {}",
        simulated.zone,
        simulated.date(simulated.from),
        simulated.date(simulated.until),
        simulated.schedule()
    );
    let title = format!("{}: {ahead} ahead", simulated.policy.name);

    let mut spans: BTreeMap<Rule, Vec<(Timestamp, Timestamp)>> = BTreeMap::new();
    for stay in lives.iter().flat_map(|life| &life.intervals) {
        spans.entry(stay.rule).or_default().push((stay.from, stay.until));
    }
    let rows = spans.into_iter().map(|(rule, spans)| Row {
        label: rule.as_str(),
        detail: wanted(simulated.policy.retention.as_ref(), rule),
        spans,
    });
    svg::draw(&Picture {
        title: &title,
        subtitle: &subtitle,
        from: simulated.from,
        until: simulated.until,
        now: None,
        time_zone: &simulated.policy.time_zone,
        curves: curves(&lives, simulated.from),
        rows: rows.collect(),
        notes: simulated.notes.clone(),
    })
}

/// Their number, the age of the oldest, and their size.
fn curves<'a>(lives: &[&Lifetime], from: Timestamp) -> Vec<Curve<'a>> {
    let mut changes: Vec<(Timestamp, bool, usize)> = Vec::new();
    for (index, life) in lives.iter().enumerate() {
        let begin = if life.is_new { life.snapshot.created_at } else { from };
        changes.push((begin, true, index));
        changes.extend(life.deleted_at.map(|end| (end, false, index)));
    }
    changes.sort_unstable();
    let (mut count, mut back, mut size) = (vec![(from, 0)], vec![(from, 0)], vec![(from, 0)]);
    let mut existing: BTreeSet<(Timestamp, usize)> = BTreeSet::new();
    let mut gib: u64 = 0;
    for at_once in changes.chunk_by(|(one, ..), (next, ..)| one == next) {
        let Some((at, ..)) = at_once.first() else { continue };
        for (_, begins, index) in at_once {
            let Some(life) = lives.get(*index) else { continue };
            let (key, size_gib) = ((life.snapshot.created_at, *index), life.snapshot.size_gib.unwrap_or(0));
            if *begins {
                existing.insert(key);
                gib = gib.saturating_add(size_gib);
            } else {
                existing.remove(&key);
                gib = gib.saturating_sub(size_gib);
            }
        }
        let is_good = |index: usize| lives.get(index).is_some_and(|life| life.snapshot.state.is_good());
        let oldest = existing.iter().find(|(_, index)| is_good(*index));
        let age = oldest.map_or(0, |(oldest, _)| at.duration_since(*oldest).as_secs().max(0).unsigned_abs());
        count.push((*at, existing.len() as u64));
        back.push((*at, age));
        size.push((*at, gib));
    }
    let is_sized = size.iter().any(|(_, gib)| *gib > 0);
    let mut curves = vec![
        Curve { label: "snapshots", points: count, format: |count| count.to_string() },
        Curve { label: "reaches back", points: back, format: length_of },
    ];
    if is_sized {
        curves.push(Curve { label: "disk sizes", points: size, format: |gib| format!("{gib} GiB") });
    }
    curves
}

/// The value of this rule in the policy.
fn wanted(retention: Option<&Retention>, rule: Rule) -> String {
    let equals = |value: Option<String>| value.map_or_else(String::new, |value| format!("= {value}"));
    let Some(retention) = retention else { return "nothing is pruned".to_owned() };
    match rule {
        Rule::KeepLast => equals(retention.keep_last.map(|count| count.to_string())),
        Rule::KeepWithin => equals(retention.keep_within.as_ref().map(ToString::to_string)),
        Rule::KeepEach(period) => equals(retention.keep.get(period).map(|count| count.to_string())),
        Rule::KeepWithinEach(period) => {
            equals(retention.keep_within_each.get(period).as_ref().map(ToString::to_string))
        }
        Rule::MinKeep => equals(Some(retention.min_keep.to_string())),
        Rule::MinKeepConsistent => equals(Some(retention.min_keep_consistent.to_string())),
        Rule::NoKeepRule => "no keep rule".to_owned(),
        Rule::Policy => "another policy".to_owned(),
        _ => String::new(),
    }
}
