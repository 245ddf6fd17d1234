//! `archive list`, `archive verify`, `archive prune`: the verified copies.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;

use crate::archive::backend::Archive;
use crate::archive::catalogue::{Catalogue, Problem, StoredCopy};
use crate::archive::verify::{Outcome, describe, verify_archive};
use crate::cli::args::Global;
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::{Output, Tone, to_the_second};
use crate::config::policies::MAX_CLOCK_SKEW;
use crate::config::sections::Config;
use crate::policy::name::ArchiveName;
use crate::randomness::fresh_id;
use crate::retention::guard::readable;
use crate::run::archive_prune::{ArchivePruner, CopyToPrune, subject_of};
use crate::run::report::Step;
use crate::run::step::Recorder;
use crate::snapshot::{InstanceId, SnapshotId, ZoneName};
use crate::state::audit::{StepFacts, StepOutcome, Subject};
use crate::text::{chain, counted, printable};

#[derive(Serialize)]
struct JsonArchive<'a> {
    archive: &'a ArchiveName,
    /// Why it is unreadable, if so.
    error: Option<String>,
    images: Vec<JsonImage>,
    /// Copies that the archive's retention removed; their manifests remain.
    pruned: Vec<JsonImage>,
    problems: Vec<String>,
}

#[derive(Serialize)]
struct JsonImage {
    zone: ZoneName,
    instance_id: InstanceId,
    instance_name: Option<String>,
    snapshot_id: SnapshotId,
    snapshot_name: String,
    created_at: Timestamp,
    verified_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    pruned_at: Option<Timestamp>,
    size_bytes: u64,
    md5: String,
    file: String,
}

/// Lists the copies in the archives.
///
/// # Errors
/// [`Refusal`] if an archive is named that is not configured.
pub async fn list(global: &Global, names: &[ArchiveName], output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let seams = Seams::real();
    let archives = assemble::archives(&config, &seams)?;
    check_names(&archives, names)?;
    Ok(show(&archives, names, seams.clock.now(), output).await)
}

/// Prints the copies in the archives with these names; in all, if none is named.
pub async fn show(
    archives: &BTreeMap<ArchiveName, Arc<Archive>>,
    names: &[ArchiveName],
    now: Timestamp,
    output: Output,
) -> Exit {
    let mut exit = Exit::Done;
    let mut all = Vec::new();
    for (name, archive) in archives.iter().filter(|(name, _)| names.is_empty() || names.contains(name)) {
        let json = match archive.catalogue().await {
            Ok(catalogue) => JsonArchive {
                archive: name,
                error: None,
                images: images(&catalogue, false),
                pruned: images(&catalogue, true),
                problems: catalogue.problems().iter().map(Problem::describe).collect(),
            },
            Err(error) => JsonArchive {
                archive: name,
                error: Some(chain(&error)),
                images: vec![],
                pruned: vec![],
                problems: vec![],
            },
        };
        if let Some(error) = &json.error {
            output.complain(&format!("archive {name}: {error}"));
            exit = Exit::Failed;
        }
        all.push(json);
    }
    output.show(&all, |all| all.iter().map(|archive| render(archive, now, output)).collect());
    exit
}

fn check_names(archives: &BTreeMap<ArchiveName, Arc<Archive>>, names: &[ArchiveName]) -> Result<(), Refusal> {
    match names.iter().find(|name| !archives.contains_key(*name)) {
        Some(name) => Err(Refusal::usage(format!("there is no archive `{name}` in the configuration"))),
        None => Ok(()),
    }
}

#[derive(Serialize)]
struct JsonVerified<'a> {
    archive: &'a ArchiveName,
    /// Why it is unreadable, if so.
    error: Option<String>,
    images: Vec<JsonOutcome>,
    problems: Vec<String>,
}

#[derive(Serialize)]
struct JsonOutcome {
    #[serde(flatten)]
    image: JsonImage,
    /// `good`, `corrupt` or `failed`.
    outcome: &'static str,
    /// Why it is not good.
    message: Option<String>,
}

impl JsonOutcome {
    fn of(copy: &StoredCopy, outcome: &Outcome) -> Self {
        let (word, message) = match outcome {
            Outcome::Good => ("good", None),
            Outcome::Corrupt(why) => ("corrupt", Some(why.clone())),
            Outcome::Failed(why) => ("failed", Some(why.clone())),
        };
        Self { image: image(copy), outcome: word, message }
    }
}

/// Verifies the images again.
///
/// # Errors
/// [`Refusal`] if an archive is named that is not configured.
pub async fn verify(
    global: &Global,
    names: &[ArchiveName],
    percent: u64,
    output: Output,
) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let seams = Seams::real();
    let archives = assemble::archives(&config, &seams)?;
    check_names(&archives, names)?;
    let mut exit = Exit::Done;
    let mut all = Vec::new();
    for (name, archive) in archives.iter().filter(|(name, _)| names.is_empty() || names.contains(name)) {
        // It may take hours, so problems are reported at once.
        let report = |copy: &StoredCopy, outcome: &Outcome| {
            if let Some(line) = describe(name, copy, outcome) {
                output.complain(&line);
            }
        };
        let verified = verify_archive(archive, percent, &*seams.clock, &*seams.randomness, &report).await;
        all.push(match verified {
            Ok(verified) => {
                let problems: Vec<String> = verified.problems.iter().map(Problem::describe).collect();
                for problem in &problems {
                    output.complain(&format!("archive {name}: {problem}"));
                }
                if !verified.is_good() {
                    exit = Exit::Failed;
                }
                let images = verified.copies.iter().map(|(copy, outcome)| JsonOutcome::of(copy, outcome));
                JsonVerified { archive: name, error: None, images: images.collect(), problems }
            }
            Err(error) => {
                let error = chain(&error);
                output.complain(&format!("archive {name}: {error}"));
                exit = Exit::Failed;
                JsonVerified { archive: name, error: Some(error), images: vec![], problems: vec![] }
            }
        });
    }
    if output.is_json() {
        output.print_json(&all);
    } else {
        for verified in &all {
            let count = |word: &str| verified.images.iter().filter(|image| image.outcome == word).count();
            output.print(&format!(
                "archive {}: {} read, {} good, {} corrupt, {} not verified\n",
                verified.archive,
                counted(verified.images.len(), "image"),
                count("good"),
                count("corrupt"),
                count("failed"),
            ));
        }
    }
    Ok(exit)
}

#[derive(Serialize)]
struct JsonPruned<'a> {
    archive: &'a ArchiveName,
    /// Why nothing was pruned, if so.
    error: Option<String>,
    dry_run: bool,
    copies: Vec<JsonPrunedCopy>,
}

#[derive(Serialize)]
struct JsonPrunedCopy {
    zone: ZoneName,
    snapshot: Subject,
    rule: Option<&'static str>,
    reasons: Vec<String>,
    /// `None` for a dry run.
    outcome: Option<StepOutcome>,
    message: Option<String>,
}

impl JsonPrunedCopy {
    fn planned(going: CopyToPrune) -> Self {
        let manifest = &going.copy.manifest;
        Self {
            zone: manifest.zone.clone(),
            snapshot: subject_of(manifest),
            rule: going.rule,
            reasons: going.reasons,
            outcome: None,
            message: None,
        }
    }

    fn done(Step { facts, outcome, message, .. }: Step) -> Self {
        let StepFacts { zone, snapshot, rule, reasons, .. } = facts;
        Self { zone, snapshot, rule, reasons, outcome: Some(outcome), message }
    }
}

/// Prunes the copies that the archives' retention does not keep.
///
/// # Errors
/// [`Refusal`] if an archive is named that is not configured, or that has no retention.
pub async fn prune(
    global: &Global,
    names: &[ArchiveName],
    dry_run: bool,
    output: Output,
) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let seams = Seams::real();
    let archives = assemble::archives(&config, &seams)?;
    check_names(&archives, names)?;
    let purpose = if dry_run { Use::Reading } else { Use::Changing };
    let state = assemble::state(&config, &seams, purpose)?;
    let mut exit = Exit::Done;
    let mut all = Vec::new();
    for (name, archive) in &archives {
        let is_named = names.contains(name);
        let rules = config.archive_rules.get(name);
        let Some(retention) = rules.and_then(|rules| rules.retention.clone()) else {
            if is_named {
                let text = format!(
                    "archive `{name}` keeps every copy: to prune it, add a section `[archives.{name}.retention]`"
                );
                return Err(Refusal::usage(text));
            }
            continue;
        };
        if !is_named && !names.is_empty() {
            continue;
        }
        let (clock, archive) = (Arc::clone(&seams.clock), Arc::clone(archive));
        let pruner = ArchivePruner { state: state.clone(), clock, archive, retention };
        let copies = prune_one(&config, &seams, &pruner, dry_run).await;
        let (error, copies) = match copies {
            Ok(copies) => (None, copies),
            Err(error) => (Some(error), Vec::new()),
        };
        if let Some(error) = &error {
            output.complain(&format!("archive {name}: nothing is pruned: {error}"));
        }
        let is_bad = |copy: &JsonPrunedCopy| copy.outcome == Some(StepOutcome::Failed);
        if error.is_some() || copies.iter().any(is_bad) {
            exit = Exit::Failed;
        }
        all.push(JsonPruned { archive: name, error, dry_run, copies });
    }
    if output.is_json() {
        output.print_json(&all);
    } else if all.is_empty() {
        output.print("no archive has a retention: every copy is kept\n");
    } else {
        output.print(&all.iter().map(|pruned| render_pruned(pruned, output)).collect::<String>());
    }
    Ok(exit)
}

/// The copies to prune of one archive, or why none is pruned.
async fn prune_one(
    config: &Config,
    seams: &Seams,
    pruner: &ArchivePruner,
    dry_run: bool,
) -> Result<Vec<JsonPrunedCopy>, String> {
    let planned = pruner.plan(None).await?;
    let zone = planned.first().map(|going| going.copy.manifest.zone.clone());
    let (Some(zone), false) = (zone, dry_run) else {
        return Ok(planned.into_iter().map(JsonPrunedCopy::planned).collect());
    };
    trust_the_clock(config, seams, &zone).await?;
    let run_id = fresh_id(&*seams.randomness, seams.clock.now());
    let recorder = Recorder::manual(pruner.state.clone(), pruner.clock.clone(), run_id);
    let steps = pruner.prune(&recorder, None).await?;
    Ok(steps.into_iter().map(JsonPrunedCopy::done).collect())
}

/// A wrong clock makes every copy look old. So it is compared with the API's clock here, as in a run.
async fn trust_the_clock(config: &Config, seams: &Seams, zone: &ZoneName) -> Result<(), String> {
    let max =
        config.policies.iter().map(|policy| policy.guard.max_clock_skew).min().unwrap_or(MAX_CLOCK_SKEW);
    let why = match assemble::client(config, None, seams).clock_skew(zone).await {
        Ok(Some(skew)) if skew.unsigned_abs() <= max => return Ok(()),
        Ok(Some(skew)) => {
            let side = if skew.is_negative() { "behind" } else { "ahead of" };
            let (off, max) = (readable(skew.unsigned_abs()), readable(max));
            format!("is {off} {side} the API's, more than max_clock_skew = {max}; correct it")
        }
        Ok(None) => "cannot be compared with the API's, since its responses have no date".to_owned(),
        Err(error) => format!("cannot be compared with the API's: {}", chain(&error)),
    };
    Err(format!("ages are unreliable, since this machine's clock {why}"))
}

fn render_pruned(pruned: &JsonPruned<'_>, output: Output) -> String {
    let copies = counted(pruned.copies.len(), "copy");
    let head =
        if pruned.dry_run { format!("{copies} would be deleted") } else { format!("{copies} to delete") };
    let mut text = format!("archive {}: {head}\n", pruned.archive);
    let rows = pruned.copies.iter().map(|copy| {
        let (word, tone) = match copy.outcome {
            None => ("would be deleted", Tone::Bad),
            Some(StepOutcome::Done) => ("deleted", Tone::Bad),
            Some(StepOutcome::Failed) => ("FAILED", Tone::Bad),
            Some(StepOutcome::Blocked | StepOutcome::Skipped) => ("kept", Tone::Dim),
        };
        let why = copy.message.clone().unwrap_or_else(|| copy.reasons.join("; "));
        let snapshot = &copy.snapshot;
        let id = || snapshot.instance_id.map_or_else(String::new, |id| id.to_string());
        let plain = |text: String| (text, Tone::Plain);
        vec![
            (word.to_owned(), tone),
            plain(copy.zone.to_string()),
            plain(snapshot.instance_name.clone().unwrap_or_else(id)),
            plain(to_the_second(snapshot.created_at).to_string()),
            plain(why),
        ]
    });
    let rows: Vec<_> = rows.collect();
    if !rows.is_empty() {
        text.push_str(&output.table(&["RESULT", "ZONE", "INSTANCE", "TAKEN", "WHY"], rows));
    }
    text
}

fn images(catalogue: &Catalogue, pruned: bool) -> Vec<JsonImage> {
    let copies = catalogue.copies().iter();
    copies.filter(|copy| copy.manifest.pruned_at.is_some() == pruned).map(image).collect()
}

/// An age for people.
fn age(at: Timestamp, now: Timestamp) -> String {
    match now.duration_since(at).as_hours() {
        hours @ 0..48 => format!("{hours}h"),
        hours if hours > 0 => format!("{}d", hours / 24),
        _ => "(in the future)".to_owned(),
    }
}

fn image(copy: &StoredCopy) -> JsonImage {
    let manifest = &copy.manifest;
    JsonImage {
        zone: manifest.zone.clone(),
        instance_id: manifest.instance.id,
        instance_name: manifest.instance.name.clone(),
        snapshot_id: manifest.snapshot.id,
        snapshot_name: manifest.snapshot.name.clone(),
        created_at: manifest.snapshot.created_at,
        verified_at: manifest.verified_at,
        pruned_at: manifest.pruned_at,
        size_bytes: manifest.image.bytes,
        md5: manifest.image.md5.to_string(),
        file: copy.image.display().to_string(),
    }
}

fn render(archive: &JsonArchive<'_>, now: Timestamp, output: Output) -> String {
    let bytes: u64 = archive.images.iter().map(|image| image.size_bytes).sum();
    let mut text = format!(
        "archive {}: {}, {bytes} bytes\n",
        archive.archive,
        counted(archive.images.len(), "verified image")
    );
    if !archive.images.is_empty() {
        let plain = |text: String| (text, Tone::Plain);
        let rows = archive
            .images
            .iter()
            .map(|image| {
                vec![
                    plain(image.instance_name.clone().unwrap_or_else(|| image.instance_id.to_string())),
                    plain(image.created_at.to_string()),
                    plain(age(image.created_at, now)),
                    plain(image.size_bytes.to_string()),
                    plain(to_the_second(image.verified_at).to_string()),
                    plain(image.md5.clone()),
                    plain(image.file.clone()),
                ]
            })
            .collect();
        text.push_str(&output.table(&["INSTANCE", "TAKEN", "AGE", "BYTES", "VERIFIED", "MD5", "FILE"], rows));
    }
    if !archive.pruned.is_empty() {
        let copies = counted(archive.pruned.len(), "copy");
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{copies} deleted by the archive's retention; the manifests remain");
    }
    for problem in &archive.problems {
        let _ = writeln!(text, "problem: {}", printable(problem));
    }
    text
}
