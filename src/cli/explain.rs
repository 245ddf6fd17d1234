//! `explain`: all that is known of one snapshot, also of one that was deleted.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::archive::catalogue::StoredCopy;
use crate::cli::args::Global;
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::history;
use crate::cli::output::{Output, Row, Tone, plain};
use crate::cli::plan::decisions::{decided, decision_json};
use crate::cli::plan::table::{after_export, age, shown};
use crate::cli::survey::Survey;
use crate::clock::timeout;
use crate::config::sections::Config;
use crate::lookup::{self, Kind};
use crate::policy::Policy;
use crate::policy::name::{ArchiveName, PolicyName};
use crate::retention::plan::Decision;
use crate::retention::verdict::{Rule, Verdict};
use crate::run::list::ListingCache;
use crate::run::preview::Preview;
use crate::snapshot::{InstanceId, SnapshotId, ZoneName};
use crate::state::history::{Change, History};
use crate::state::holds::{About, Hold, Holds};
use crate::text::{chain, printable, size, to_the_second};

/// How long the plans of a policy may take.
const PLAN_WAIT_MAX: Duration = Duration::from_mins(1);

/// Every line about one snapshot.
const ALL: usize = usize::MAX;

/// All that is known.
struct Explained<'a> {
    id: SnapshotId,
    at: Timestamp,
    survey: &'a Survey,
    /// The policies that select it, and what each would do.
    verdicts: Vec<(PolicyName, Preview)>,
    hold: Option<Hold>,
    history: History,
    /// What could not be asked, in sentences.
    unknown: Vec<String>,
}

/// Shows all that is known of a snapshot.
///
/// # Errors
/// [`Refusal`] if nothing knows it, or several are meant.
pub async fn explain(global: &Global, text: &str, output: Output) -> Result<Exit, Refusal> {
    let seams = Seams::real();
    let (config, state) = assemble::configuration_and_state(&global.config, &seams);
    let mut survey = Survey::default();
    match &config {
        Ok(config) => {
            survey.ask_zones(config, &seams).await;
            survey.ask_archives(config, &seams, &state).await;
        }
        Err(why) => survey.unasked.push(format!("no zone and no archive is asked: {why}")),
    }
    let mut unknown = survey.unasked.clone();
    let logged = state.known_in_history(Kind::Snapshot, text).await.unwrap_or_else(|error| {
        unknown.push(chain(&error));
        Vec::new()
    });
    let holds = state.holds().await.unwrap_or_else(|error| {
        unknown.push(chain(&error));
        Holds::default()
    });
    let holds = holds.holds;
    let known = survey.snapshots().chain(logged).chain(holds.iter().map(Hold::known));
    let known: Vec<_> = known.collect();
    let id = lookup::find(Kind::Snapshot, text, known.clone()).map_err(|error| survey.not_found(&error))?;
    if !known.iter().any(|one| one.id == id) {
        let (kind, text) = (Kind::Snapshot, text.to_owned());
        return Err(survey.not_found(&lookup::LookupError::Unknown { kind, text }));
    }
    let id = SnapshotId(id);
    let at = seams.clock.now();
    let history = state.history(ALL, move |change| change.snapshot.id == Some(id)).await;
    let history = history.unwrap_or_else(|error| {
        unknown.push(chain(&error));
        History::default()
    });
    unknown.extend(history.unread.iter().map(|error| chain(error)));
    history::complain_of_damaged(&history.damaged, output);
    let verdicts = match &config {
        Ok(config) => Box::pin(verdicts(id, config, &seams, &survey, &mut unknown)).await,
        Err(_) => Vec::new(),
    };
    let hold = holds.into_iter().find(|hold| hold.snapshot == id && hold.counts_at(at));
    unknown.dedup();
    let explained = Explained { id, at, survey: &survey, verdicts, hold, history, unknown };
    for why in &explained.unknown {
        output.complain(&format!("not known: {why}"));
    }
    output.show(|| explained.json(), || explained.render(output));
    Ok(if explained.unknown.is_empty() { Exit::Done } else { Exit::Failed })
}

/// What each policy that selects a listed snapshot would do with it now.
async fn verdicts(
    id: SnapshotId,
    config: &Config,
    seams: &Seams,
    survey: &Survey,
    unknown: &mut Vec<String>,
) -> Vec<(PolicyName, Preview)> {
    let Some((listing, _)) = survey.listed(id) else { return Vec::new() };
    // An archive without credentials must not keep the others from being read.
    let mut config = config.clone();
    let state = (&config.state_directory, Use::Reading);
    config.archives.retain(|name, settings| assemble::archive(name, settings, seams, state).is_ok());
    if let Err(refusal) = assemble::heed_pauses(&mut config, seams).await {
        unknown.push(refusal.text);
        return Vec::new();
    }
    let runner = assemble::credentials(&config)
        .and_then(|credentials| assemble::runner(&config, credentials, seams, Use::Reading));
    let runner = match runner {
        Ok(runner) => runner,
        Err(refusal) => {
            unknown.push(refusal.text);
            return Vec::new();
        }
    };
    let cache = ListingCache::default();
    let mut found = Vec::new();
    for policy in
        config.policies.iter().filter(|policy| policy.enabled && policy.zones.contains(&listing.zone))
    {
        // Another zone that does not answer would only take time.
        let answered = |zone: &&ZoneName| survey.zones.iter().any(|listing| listing.zone == **zone);
        let zones = policy.zones.iter().filter(answered).cloned().collect();
        let policy = Policy { zones, ..policy.clone() };
        let previews = Box::pin(runner.preview(&cache, &policy, None));
        let name = &policy.name;
        let Ok(previews) = timeout(&*seams.clock, PLAN_WAIT_MAX, previews).await else {
            unknown.push(format!("policy {name}: no plan within {} s", PLAN_WAIT_MAX.as_secs()));
            continue;
        };
        match previews.into_iter().find(|(zone, _)| *zone == listing.zone) {
            Some((_, Ok(preview))) => found.push((name.clone(), preview)),
            Some((zone, Err(why))) => unknown.push(format!("policy {name}, zone {zone}: {why}")),
            None => {}
        }
    }
    found.retain(|(_, preview)| decided(preview).any(|(_, snapshot)| snapshot.id == id));
    found
}

impl Explained<'_> {
    fn decisions(&self) -> impl Iterator<Item = (&PolicyName, &Preview, &Decision)> {
        self.verdicts.iter().filter_map(|(name, preview)| {
            let (decision, _) = decided(preview).find(|(_, snapshot)| snapshot.id == self.id)?;
            Some((name, preview, decision))
        })
    }

    fn copies(&self) -> impl Iterator<Item = (&ArchiveName, &StoredCopy)> {
        self.survey.copies_of(self.id)
    }

    /// What it is, by the zone, an archive, its hold or the audit log.
    fn about(&self) -> (Option<About>, Option<InstanceId>) {
        let logged = || {
            let changes = &self.history.changes;
            // A line about its end does not have its name.
            let change = changes.iter().rfind(|change| !change.snapshot.name.is_empty()).or(changes.last())?;
            let (snapshot, zone) = (&change.snapshot, change.zone.clone()?);
            let about = About {
                zone,
                name: snapshot.name.clone(),
                created_at: snapshot.created_at?,
                instance_name: snapshot.instance_name.clone(),
            };
            Some((about, snapshot.instance_id))
        };
        if let Some(about) = self.survey.about(self.id) {
            let listed = self.survey.listed(self.id).and_then(|(_, snapshot)| snapshot.instance_id);
            let copied = || self.copies().next().map(|(_, copy)| copy.manifest.instance.id);
            return (Some(about), listed.or_else(copied));
        }
        match logged() {
            Some((about, instance)) => (Some(about), instance),
            None => (self.hold.as_ref().and_then(|hold| hold.about.clone()), None),
        }
    }

    /// Whether a zone lists it; not known if one that may did not answer.
    fn is_listed(&self) -> Option<bool> {
        if self.survey.listed(self.id).is_some() {
            return Some(true);
        }
        let zone = self.about().0?.zone;
        let answered = self.survey.zones.iter().any(|listing| listing.zone == zone && listing.is_whole);
        answered.then_some(false)
    }

    /// How it ended, if no run deleted it and a later one found that out.
    fn ending(&self) -> Option<&Change> {
        self.history.changes.iter().rfind(|change| change.action == "vanish")
    }

    /// Its deletion, if the audit log has it.
    fn deletion(&self) -> Option<&Change> {
        self.history.changes.iter().rfind(|change| change.action == "delete" && change.outcome == "done")
    }

    fn json(&self) -> Value {
        let (about, instance_id) = self.about();
        let snapshot = self.survey.listed(self.id).map(|(_, snapshot)| snapshot);
        let decisions = self.decisions().map(|(name, preview, decision)| {
            let mut json = decision_json(preview, decision);
            json["policy"] = json!(name);
            json
        });
        let copies = self.copies().map(|(archive, copy)| {
            let manifest = &copy.manifest;
            json!({
                "archive": archive,
                "verified_at": manifest.verified_at,
                "exported_at": manifest.exported_at,
                "policy": manifest.policy,
                "size_bytes": manifest.image.bytes,
                "md5": manifest.image.md5,
                "file": copy.image().display().to_string(),
                "pruned_at": manifest.pruned_at,
            })
        });
        json!({
            "at": self.at,
            "snapshot": {
                "id": self.id,
                "name": about.as_ref().map(|about| &about.name),
                "created_at": about.as_ref().map(|about| about.created_at),
                "zone": about.as_ref().map(|about| &about.zone),
                "instance_id": instance_id,
                "instance_name": about.as_ref().and_then(|about| about.instance_name.as_ref()),
                "state": snapshot.map(|snapshot| snapshot.state.as_str()),
                "size_gib": snapshot.and_then(|snapshot| snapshot.size_gib),
                "application_consistent": snapshot.and_then(|snapshot| snapshot.application_consistent),
            },
            "is_listed": self.is_listed(),
            "decisions": decisions.collect::<Value>(),
            "copies": copies.collect::<Value>(),
            "problems": self.survey.problems_of(self.id).collect::<Vec<_>>(),
            "hold": self.hold,
            "history": self.history.changes,
            "not_known": self.unknown,
        })
    }

    fn render(&self, output: Output) -> String {
        let (about, instance_id) = self.about();
        let mut rows: Vec<Row> = Vec::new();
        let mut add = |word: &str, text: String, tone: Tone| rows.push(vec![plain(word), (text, tone)]);
        let name = about.as_ref().map_or("", |about| &about.name);
        if let Some(about) = &about {
            let instance = match (&about.instance_name, instance_id) {
                (Some(name), Some(id)) => format!("{name} ({id})"),
                (Some(name), None) => name.clone(),
                (None, Some(id)) => id.to_string(),
                (None, None) => "not known".to_owned(),
            };
            add("zone", about.zone.to_string(), Tone::Plain);
            add("instance", instance, Tone::Plain);
            let (at, ago) = (to_the_second(about.created_at), age(about.created_at, self.at, false));
            add("taken", format!("{at}, {ago} ago"), Tone::Plain);
        }
        let (state, tone) = self.state();
        add("state", state, tone);
        for (policy, preview, decision) in self.decisions() {
            let (verdict, tone) = shown(decision);
            let rule = match decision.rule {
                Rule::NoKeepRule => String::new(),
                rule => format!(" ({})", rule.as_str()),
            };
            let by = match (decision.verdict, decision.expires_at) {
                (Verdict::Keep, Some(until)) => format!(", until {until} if nothing changes"),
                (Verdict::Delete, _) if preview.held.is_some() => ", but the guard blocks it".to_owned(),
                _ => after_export(preview, decision).map_or_else(String::new, |after| format!(", {after}")),
            };
            add("policy", format!("{policy}: {verdict}{rule}{by}"), tone);
            for reason in decision.reasons() {
                add("", format!("- {reason}"), Tone::Plain);
            }
        }
        if self.verdicts.is_empty() && self.is_listed() == Some(true) && self.unknown.is_empty() {
            add("policy", "no enabled policy selects it, so none deletes it".to_owned(), Tone::Plain);
        }
        match &self.hold {
            Some(hold) => {
                let until = hold.until.map_or_else(|| "forever".to_owned(), |until| format!("until {until}"));
                let reason = hold.reason.as_ref().map_or_else(String::new, |reason| format!(": {reason}"));
                add("hold", format!("{until}{reason}"), Tone::Good);
            }
            None => add("hold", "none".to_owned(), Tone::Plain),
        }
        let mut copies = 0;
        for (archive, copy) in self.copies() {
            let manifest = &copy.manifest;
            let bytes = size(manifest.image.bytes);
            copies += 1;
            let verified = to_the_second(manifest.verified_at);
            let (fate, tone) = match manifest.pruned_at.map(to_the_second) {
                Some(at) => (format!("deleted {at} by the archive's retention"), Tone::Bad),
                None => (format!("{bytes}, verified {verified}"), Tone::Good),
            };
            add("copy", format!("archive {archive}: {fate}"), tone);
        }
        for problem in self.survey.problems_of(self.id) {
            copies += 1;
            add("copy", problem, Tone::Bad);
        }
        if copies == 0 {
            add("copy", "none that is known".to_owned(), Tone::Plain);
        }
        let mut text = format!("snapshot {} {}\n", self.id, printable(name));
        text.push_str(&output.indented_table(&[], rows));
        if !self.history.changes.is_empty() {
            text.push_str("\nhistory\n");
            text.push_str(&history::table(&self.history.changes, output));
        }
        text
    }

    /// Its state, or since when and why it is deleted.
    fn state(&self) -> (String, Tone) {
        if let Some((_, snapshot)) = self.survey.listed(self.id) {
            let disk = snapshot.size_gib.map_or_else(String::new, |gib| format!(", of a disk of {gib} GiB"));
            return (format!("{}{disk}", snapshot.state.as_str()), Tone::Plain);
        }
        if let Some(deletion) = self.deletion() {
            let at = to_the_second(deletion.at);
            let who =
                deletion.policy.as_ref().map_or_else(String::new, |policy| format!(" by policy {policy}"));
            let run = deletion.run_id.map_or_else(String::new, |id| format!(", run {id}"));
            let rule = deletion.rule.as_ref().map_or_else(String::new, |rule| format!(", rule {rule}"));
            let why = deletion.reasons.join("; ");
            return (format!("DELETED {at}{who}{run}{rule}: {why}"), Tone::Bad);
        }
        if let Some(ending) = self.ending() {
            let what = match ending.outcome.as_str() {
                "deleted_by_us" => "DELETED by snapwarden",
                "deleted_by_other" => "DELETED, but not by snapwarden",
                "deleted_with_instance" => "DELETED with its instance",
                _ => "VANISHED, and nothing explains it",
            };
            let at = to_the_second(ending.at);
            return (format!("{what} (found {at}): {}", printable(&ending.reasons.join("; "))), Tone::Bad);
        }
        let text = match self.is_listed() {
            Some(_) => {
                "it does not exist any more, and the audit log has no deletion of it: something else deleted it, or \
                 its instance was deleted; the next run of a policy looks into it"
            }
            None => "whether it still exists is not known",
        };
        (text.to_owned(), Tone::Bad)
    }
}
