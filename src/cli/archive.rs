//! `archive list`, `archive verify`, `archive adopt`, `archive prune`: the verified copies.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::archive::backend::Archive;
use crate::archive::catalogue::{Catalogue, CopyFilter, Leftover, Problem, StoredCopy};
use crate::archive::s3::versions::Versions;
use crate::archive::transfer::hash::Hashers;
use crate::archive::transfer::throttle::Throttle;
use crate::archive::verify::{Look, Outcome, Verification, describe};
use crate::cli::args::{Copies, Global};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::{Output, Row, Tone, plain};
use crate::cli::progress::Progress;
use crate::config::sections::Config;
use crate::lookup::{self, Kind, Known};
use crate::policy::name::ArchiveName;
use crate::policy::{ArchiveRules, Guard};
use crate::randomness::fresh_id;
use crate::retention::guard::readable;
use crate::run::archive_adopt::{self, Adopted};
use crate::run::archive_presence::{Looker, exclude_corrupt};
use crate::run::archive_prune::ArchivePruner;
use crate::run::archive_retention::CopyDecision;
use crate::run::archive_verify::{self, ArchiveVerifier};
use crate::run::downloads::ReadWatch;
use crate::run::step::Recorder;
use crate::snapshot::{InstanceId, SnapshotId, ZoneName};
use crate::state::archives::CopyLock;
use crate::state::audit::{StepFacts, StepOutcome};
use crate::state::directory::StateDirectory;
use crate::text::{chain, counted, printable, size, to_the_second};

/// For each archive its result, or why there is none.
type Results<'a, T> = Vec<(&'a ArchiveName, Result<T, String>)>;

/// Works on the archives with these names; on all, if none is named. One that fails is reported as `failure`, and does
/// not stop the next.
async fn each<'a, T>(
    archives: &'a BTreeMap<ArchiveName, Arc<Archive>>,
    names: &[ArchiveName],
    failure: &str,
    output: Output,
    work: impl AsyncFn(&ArchiveName, &Arc<Archive>) -> Result<T, String>,
) -> Results<'a, T> {
    let mut results = Vec::new();
    for (name, archive) in archives.iter().filter(|(name, _)| names.is_empty() || names.contains(name)) {
        let result = work(name, archive).await;
        if let Err(error) = &result {
            output.complain(&format!("archive {name}: {failure}{error}"));
        }
        results.push((name, result));
    }
    results
}

/// Success only if every archive has a good result.
fn exit_of<T>(results: &Results<'_, T>, is_good: impl Fn(&T) -> bool) -> Exit {
    let all_good = results.iter().all(|(_, result)| result.as_ref().is_ok_and(&is_good));
    if all_good { Exit::Done } else { Exit::Failed }
}

/// The results for programs. `fields` gets no result of an archive that failed.
fn json<T>(results: &Results<'_, T>, fields: impl Fn(Option<&T>) -> Value) -> Value {
    let archive = |(name, result): &(&ArchiveName, Result<T, String>)| {
        let mut json = fields(result.as_ref().ok());
        json["archive"] = json!(name);
        json["error"] = json!(result.as_ref().err());
        json
    };
    results.iter().map(archive).collect()
}

/// Lists the copies in the archives.
///
/// # Errors
/// [`Refusal`] if an archive is named that is not configured.
pub async fn list(
    global: &Global,
    names: &[ArchiveName],
    copies: &Copies,
    output: Output,
) -> Result<Exit, Refusal> {
    // All copies are shown, whatever the shard.
    let config = Config { shard: None, ..assemble::configuration(global)? };
    assemble::check_archives(&config, names)?;
    let seams = Seams::real();
    let archives = assemble::archives(&config, &seams, Use::Reading)?;
    let state = assemble::state(&config, &seams, Use::Reading)?;
    let only = filter(copies, &archives, names).await?;
    Ok(show(&archives, &config.archive_rules, &state, names, &only, seams.clock.now(), output).await)
}

/// The filter that the command line gives. Names are those in the manifests of the archives that are named.
async fn filter(
    copies: &Copies,
    archives: &BTreeMap<ArchiveName, Arc<Archive>>,
    names: &[ArchiveName],
) -> Result<CopyFilter, Refusal> {
    let mut known = Vec::new();
    if copies.instance.as_ref().is_some_and(|text| lookup::whole_id(text).is_none()) {
        for (_, archive) in archives.iter().filter(|(name, _)| names.is_empty() || names.contains(name)) {
            // One that can't be read is complained of when it is used.
            let Ok(catalogue) = archive.catalogue().await else { continue };
            known.extend(catalogue.copies().iter().cloned());
        }
    }
    filter_of(copies, &known)
}

/// The filter that the command line gives. Names are those in the manifests of these copies.
pub(super) fn filter_of<'c>(
    copies: &Copies,
    among: impl IntoIterator<Item = &'c StoredCopy>,
) -> Result<CopyFilter, Refusal> {
    let Some(text) = &copies.instance else {
        return Ok(CopyFilter { instance: None, zone: copies.zone.clone() });
    };
    let known = among.into_iter().map(|StoredCopy { manifest, .. }| Known {
        id: manifest.instance.id.0,
        name: manifest.instance.name.clone(),
        zone: Some(manifest.zone.clone()),
        taken_at: Some(manifest.snapshot.created_at),
    });
    let in_zone = |known: &Known| copies.zone.is_none() || copies.zone == known.zone;
    let instance = lookup::find(Kind::Instance, text, known.filter(in_zone));
    let instance = instance.map_err(|error| Refusal::usage(format!("in the archives, {error}")))?;
    Ok(CopyFilter { instance: Some(InstanceId(instance)), zone: copies.zone.clone() })
}

/// The copies in an archive, and what is wrong with the archive as a whole.
struct Listed {
    catalogue: Catalogue,
    leftovers: Vec<Leftover>,
    /// What the bucket keeps of deleted files; none where it keeps nothing.
    versions: Option<Versions>,
    /// The copies that this state locked.
    locked: BTreeMap<String, CopyLock>,
    alert: Alert,
}

/// What is wrong with an archive as a whole.
#[derive(Default)]
struct Alert {
    text: Option<String>,
    /// The copies that vanished.
    missing: Vec<String>,
}

/// Looks whether the archive is the one that was used, with its copies, and complains if it is not. A state directory
/// that can't be read does not keep an archive from being read.
async fn alert(
    archive: &Archive,
    rules: &BTreeMap<ArchiveName, ArchiveRules>,
    state: &StateDirectory,
    output: Output,
) -> Alert {
    let name = archive.name();
    let Some(rules) = rules.get(name) else { return Alert::default() };
    let looker = match Looker::new(state).await {
        Ok(looker) => looker,
        Err(error) => {
            output.complain(&format!("archive {name}: it is not known which copies it should have: {error}"));
            return Alert::default();
        }
    };
    let alert = match looker.look(archive, &rules.guard).await {
        Ok(found) => Alert { text: found.presence.closed().map(str::to_owned), missing: found.vanished },
        Err(text) => Alert { text: Some(text), missing: Vec::new() },
    };
    if let Some(text) = &alert.text {
        output.complain(&format!("archive {name}: {text}"));
    }
    for stem in &alert.missing {
        output.complain(&format!("archive {name}: missing: {stem}.qcow2"));
    }
    alert
}

/// Prints those copies in the archives with these names that are meant; in all archives, if none is named.
pub async fn show(
    archives: &BTreeMap<ArchiveName, Arc<Archive>>,
    rules: &BTreeMap<ArchiveName, ArchiveRules>,
    state: &StateDirectory,
    names: &[ArchiveName],
    only: &CopyFilter,
    now: Timestamp,
    output: Output,
) -> Exit {
    let read = async |_: &_, archive: &Arc<Archive>| {
        let mut catalogue = archive.catalogue().await.map_err(|error| chain(&error))?;
        // If it can't be read, the alert says so.
        let memory = state.archives().await.map(|archives| archives.of(archive.name())).unwrap_or_default();
        exclude_corrupt(&mut catalogue, &memory);
        catalogue.retain(only);
        let versions = archive.versions(&[]).await.unwrap_or_else(|error| {
            let (name, why) = (archive.name(), chain(&error));
            output.complain(&format!(
                "archive {name}: what its bucket keeps of deleted files is not known: {why}"
            ));
            None
        });
        // They are no copies: if they can't be listed, the copies still are.
        let leftovers = match archive.leftovers().await {
            Ok(leftovers) => {
                leftovers.into_iter().filter(|leftover| only.includes_path(&leftover.path)).collect()
            }
            Err(error) => {
                let (name, why) = (archive.name(), chain(&error));
                output
                    .complain(&format!("archive {name}: what interrupted exports left is not known: {why}"));
                Vec::new()
            }
        };
        let alert = alert(archive, rules, state, output).await;
        Ok(Listed { catalogue, leftovers, versions, locked: memory.locked, alert })
    };
    let results = each(archives, names, "", output, read).await;
    let fields = |listed: Option<&Listed>| {
        let catalogue = listed.map(|listed| &listed.catalogue);
        json!({
            "images": listed.map(|listed| images(listed, false)).unwrap_or_default(),
            "pruned": listed.map(|listed| images(listed, true)).unwrap_or_default(),
            "noncurrent": noncurrent(listed.and_then(|listed| listed.versions.as_ref())),
            "hidden": hidden(listed, only).map(|path| path.display().to_string()).collect::<Value>(),
            "problems": catalogue.map(|catalogue| sentences(catalogue.problems())).unwrap_or_default(),
            "alert": listed.and_then(|listed| listed.alert.text.as_ref()),
            "missing": listed.map(|listed| listed.alert.missing.as_slice()).unwrap_or_default(),
            "leftovers": leftovers(listed.map(|listed| listed.leftovers.as_slice()).unwrap_or_default()),
        })
    };
    let text = |(name, result): &(&ArchiveName, Result<Listed, String>)| {
        let listed = result.as_ref().ok();
        let mut text = render(name, listed.map(|listed| &listed.catalogue), now, output);
        for leftover in listed.iter().flat_map(|listed| &listed.leftovers) {
            let _ = writeln!(text, "{}", describe_leftover(leftover));
        }
        text.push_str(&listed.map_or_else(String::new, |listed| render_versions(listed, only)));
        text
    };
    output.show(|| json(&results, fields), || results.iter().map(text).collect());
    exit_of(&results, |listed| listed.alert.text.is_none())
}

/// Takes an archive over.
///
/// # Errors
/// [`Refusal`] if it is not configured, or can't be taken over.
pub async fn adopt(global: &Global, name: &ArchiveName, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    assemble::check_archives(&config, [name])?;
    let seams = Seams::real();
    let archives = assemble::archives(&config, &seams, Use::Changing)?;
    let state = assemble::state(&config, &seams, Use::Changing)?;
    let results = each(&archives, std::slice::from_ref(name), "it is not taken over: ", output, {
        async |_: &_, archive: &Arc<Archive>| {
            archive_adopt::adopt(&state, &*seams.clock, &*seams.randomness, archive).await
        }
    })
    .await;
    let fields = |adopted: Option<&Adopted>| {
        json!({
            "copies": adopted.map(|adopted| adopted.copies),
            "missing": adopted.map(|adopted| adopted.vanished.as_slice()).unwrap_or_default(),
            "was_foreign": adopted.map(|adopted| adopted.was_foreign),
        })
    };
    let text = |(name, result): &(&ArchiveName, Result<Adopted, String>)| {
        result.as_ref().map_or_else(|_| String::new(), |adopted| render_adopted(name, adopted))
    };
    output.show(|| json(&results, fields), || results.iter().map(text).collect());
    Ok(exit_of(&results, |_| true))
}

fn render_adopted(name: &ArchiveName, adopted: &Adopted) -> String {
    let copies = counted(adopted.copies, "verified copy");
    let mut text = String::new();
    for stem in &adopted.vanished {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "not there any more: {stem}.qcow2");
    }
    let _ = writeln!(text, "archive {name}: taken over with {copies}; snapwarden stores and deletes again");
    if adopted.was_foreign {
        text.push_str(
            "Another state directory used it. If yours was lost, so were the holds and which snapshots snapwarden made: \
             see `snapwarden plan`, and put on hold again what must stay, before the next run.\n",
        );
    }
    text
}

/// Verifies the images again.
///
/// # Errors
/// [`Refusal`] if an archive is named that is not configured.
pub async fn verify(
    global: &Global,
    names: &[ArchiveName],
    (percent, concurrency, bandwidth_limit): (u64, NonZeroUsize, Option<NonZeroU64>),
    copies: &Copies,
    output: Output,
    progress: &Progress,
) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    assemble::check_archives(&config, names)?;
    let seams = Seams::real();
    let archives = assemble::archives(&config, &seams, Use::Changing)?;
    let state = assemble::state(&config, &seams, Use::Reading)?;
    let only = &filter(copies, &archives, names).await?;
    let hashers = &Hashers::default();
    let downloads = progress.downloads();
    let watch = Some(ReadWatch { downloads: &downloads, clock: &seams.clock });
    let work = async |name: &ArchiveName, archive: &Arc<Archive>| {
        // It may take hours, so problems are reported at once.
        let report = |copy: &StoredCopy, outcome: &Outcome| {
            if let Some(line) = describe(name, copy, outcome) {
                output.complain(&line);
            }
        };
        let (clock, randomness) = (&*seams.clock, &*seams.randomness);
        let configured = || config.archive_rules.get(name)?.verify.as_ref()?.bandwidth_limit;
        let throttle = bandwidth_limit.or_else(configured).map(|limit| Throttle::new(limit.get()));
        let work = ArchiveVerifier {
            state: &state,
            clock,
            randomness,
            archive,
            hashers,
            only,
            concurrency,
            throttle: throttle.as_ref(),
            watch,
        };
        let verified = work.verify(percent, &report).await?;
        for problem in sentences(&verified.problems) {
            output.complain(&format!("archive {name}: {problem}"));
        }
        Ok((verified, alert(archive, &config.archive_rules, &state, output).await))
    };
    let work = each(&archives, names, "", output, work);
    let results = progress.during(&downloads, &*seams.clock, work).await;
    show_daemon(&state, &seams, output).await;
    let fields = |result: Option<&(Verification, Alert)>| {
        let (verified, alert) = (result.map(|(verified, _)| verified), result.map(|(_, alert)| alert));
        let copies = verified.iter().flat_map(|verified| &verified.copies);
        json!({
            "images": copies.map(|(copy, outcome)| verified_image(copy, outcome)).collect::<Value>(),
            "problems": verified.map(|verified| sentences(&verified.problems)).unwrap_or_default(),
            "alert": alert.and_then(|alert| alert.text.as_ref()),
            "missing": alert.map(|alert| alert.missing.as_slice()).unwrap_or_default(),
        })
    };
    output.show(
        || json(&results, fields),
        || {
            let rendered = results.iter().map(|(name, result)| {
                render_verified(name, result.as_ref().ok().map(|(verified, _)| verified))
            });
            rendered.collect()
        },
    );
    Ok(exit_of(&results, |(verified, alert)| verified.is_good() && alert.text.is_none()))
}

/// What was found without reading a byte, and what is wrong with the archive.
type Looks = (Vec<(StoredCopy, Look)>, Vec<Problem>, Alert);

/// Compares lengths and `ETag`s with the manifests, and records nothing.
///
/// # Errors
/// [`Refusal`] if an archive is named that is not configured.
pub async fn look(
    global: &Global,
    names: &[ArchiveName],
    copies: &Copies,
    output: Output,
) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    assemble::check_archives(&config, names)?;
    let seams = Seams::real();
    let archives = assemble::archives(&config, &seams, Use::Reading)?;
    let state = assemble::state(&config, &seams, Use::Reading)?;
    let only = &filter(copies, &archives, names).await?;
    let hashers = &Hashers::default();
    let work = async |name: &ArchiveName, archive: &Arc<Archive>| {
        let (clock, randomness, concurrency) =
            (&*seams.clock, &*seams.randomness, archive_verify::CONCURRENCY);
        let (throttle, watch, state) = (None, None, &state);
        let work = ArchiveVerifier {
            state,
            clock,
            randomness,
            archive,
            hashers,
            only,
            concurrency,
            throttle,
            watch,
        };
        let (looks, problems) = work.look().await?;
        for line in looks.iter().filter_map(|(copy, look)| describe(name, copy, &look.outcome)) {
            output.complain(&line);
        }
        for problem in sentences(&problems) {
            output.complain(&format!("archive {name}: {problem}"));
        }
        Ok((looks, problems, alert(archive, &config.archive_rules, state, output).await))
    };
    let results = each(&archives, names, "", output, work).await;
    let fields = |result: Option<&Looks>| {
        let looks = result.iter().flat_map(|(looks, ..)| looks);
        let image = |(copy, look): &(StoredCopy, Look)| {
            let mut image = verified_image(copy, &look.outcome);
            image["etag_compared"] = json!(look.has_etag);
            image
        };
        json!({
            "images": looks.map(image).collect::<Value>(),
            "problems": result.map(|(_, problems, _)| sentences(problems)).unwrap_or_default(),
            "alert": result.and_then(|(.., alert)| alert.text.as_ref()),
            "missing": result.map(|(.., alert)| alert.missing.as_slice()).unwrap_or_default(),
            "bytes_read": false,
        })
    };
    let text = |(name, result): &(&ArchiveName, Result<Looks, String>)| {
        let looks = result.as_ref().map_or(&[][..], |(looks, ..)| looks);
        let with_etag = looks.iter().filter(|(_, look)| look.has_etag).count();
        let wrong = looks.iter().filter(|(_, look)| !look.outcome.is_good()).count();
        format!(
            "archive {name}: {} looked at, {wrong} wrong; {with_etag} by length and ETag, {} by length alone. No byte was read: \
             this is no proof, and nothing is recorded\n",
            counted(looks.len(), "image"),
            looks.len() - with_etag
        )
    };
    output.show(|| json(&results, fields), || results.iter().map(text).collect());
    let is_good = |(looks, problems, alert): &Looks| {
        let all_good = looks.iter().all(|(_, look)| look.outcome.is_good());
        all_good && problems.is_empty() && alert.text.is_none()
    };
    Ok(exit_of(&results, is_good))
}

/// Has a daemon look at the archives, if the state directory ever met one.
pub(super) async fn show_daemon(state: &StateDirectory, seams: &Seams, output: Output) {
    if state.archives_version().await.is_none() {
        return;
    }
    if let Err(error) = state.note_manual_change(&*seams.clock).await {
        output.complain(&format!("a running daemon sees this after its next run only: {}", chain(&error)));
    }
}

/// A copy that the archive's retention does not keep.
struct PrunedCopy {
    facts: StepFacts,
    /// What keeps it all the same.
    blocked_by: Option<&'static str>,
    /// `None` for a dry run, and if something keeps it.
    outcome: Option<StepOutcome>,
    message: Option<String>,
}

/// Prunes the copies that the archives' retention does not keep.
///
/// # Errors
/// [`Refusal`] if an archive is named that is not configured, or that has no retention.
pub async fn prune(
    global: &Global,
    names: &[ArchiveName],
    dry_run: bool,
    copies: &Copies,
    output: Output,
) -> Result<Exit, Refusal> {
    let mut config = assemble::configuration(global)?;
    let seams = Seams::real();
    assemble::heed_pauses(&mut config, &seams).await?;
    assemble::check_archives(&config, names)?;
    let retention = |name: &ArchiveName| config.archive_rules.get(name)?.retention.clone();
    if let Some(name) = names.iter().find(|name| retention(name).is_none()) {
        return Err(Refusal::usage(format!(
            "archive `{name}` keeps every copy: to prune it, add a section `[archives.{name}.retention]`"
        )));
    }
    let purpose = if dry_run { Use::Reading } else { Use::Changing };
    let mut archives = assemble::archives(&config, &seams, purpose)?;
    let only = filter(copies, &archives, names).await?;
    archives.retain(|name, _| retention(name).is_some());
    let state = assemble::state(&config, &seams, purpose)?;
    let work = async |name: &ArchiveName, archive: &Arc<Archive>| {
        let Some(rules) = config.archive_rules.get(name).cloned() else { return Ok(Pruning::none()) };
        let (clock, archive) = (Arc::clone(&seams.clock), Arc::clone(archive));
        let policies = config.policies.clone();
        let pruner =
            ArchivePruner { state: state.clone(), clock, archive, rules, policies, only: only.clone() };
        prune_one(&config, &seams, &pruner, dry_run).await
    };
    let results = each(&archives, names, "nothing is pruned: ", output, work).await;
    if !dry_run {
        show_daemon(&state, &seams, output).await;
    }
    let fields = |pruning: Option<&Pruning>| {
        let copies = pruning.into_iter().flat_map(|pruning| &pruning.copies);
        let copies = copies.map(|PrunedCopy { facts, blocked_by, outcome, message }| {
            let StepFacts { zone, snapshot, rule, reasons, .. } = facts;
            json!({
                "zone": zone, "snapshot": snapshot, "rule": rule, "reasons": reasons, "blocked_by": blocked_by,
                "outcome": outcome, "message": message,
            })
        });
        let notes = pruning.map_or_else(Vec::new, |pruning| pruning.blocked.clone());
        let left = pruning.and_then(|pruning| pruning.leftovers.as_deref().ok());
        let left = leftovers(left.unwrap_or_default());
        json!({
            "dry_run": dry_run, "copies": copies.collect::<Value>(), "blocked": notes, "leftovers": left,
            "leftovers_error": pruning.and_then(|pruning| pruning.leftovers.as_ref().err()),
            "freed_bytes": pruning.filter(|_| !dry_run).and_then(Pruning::freed_bytes),
            "noncurrent": noncurrent(pruning.and_then(|pruning| pruning.versions.as_ref().ok()?.as_ref())),
        })
    };
    let text = |(name, result): &(&ArchiveName, Result<Pruning, String>)| {
        result.as_ref().map_or_else(|_| String::new(), |done| render_pruned(name, done, dry_run, output))
    };
    let none = "no archive has a retention: every copy is kept\n".to_owned();
    output.show(
        || json(&results, fields),
        || if results.is_empty() { none } else { results.iter().map(text).collect() },
    );
    let is_bad = |copy: &PrunedCopy| copy.outcome == Some(StepOutcome::Failed);
    let is_good = |pruning: &Pruning| pruning.leftovers.is_ok() && !pruning.copies.iter().any(is_bad);
    let is_blocked = |(_, pruning): &(&ArchiveName, Result<Pruning, String>)| {
        pruning.as_ref().is_ok_and(|pruning| !pruning.blocked.is_empty())
    };
    let held = if !dry_run && results.iter().any(is_blocked) { Exit::Held } else { Exit::Done };
    Ok(held.worse(exit_of(&results, is_good)))
}

/// What was pruned of an archive, or would be.
struct Pruning {
    copies: Vec<PrunedCopy>,
    /// What the guard keeps, in sentences, and how to let it pass.
    blocked: Vec<String>,
    /// What interrupted exports left, and was removed or would be; or why it stays.
    leftovers: Result<Vec<Leftover>, String>,
    /// The length of the images that were deleted.
    deleted_bytes: u64,
    /// What the bucket keeps of deleted files, those that were deleted now included; none where it keeps nothing.
    versions: Result<Option<Versions>, String>,
    /// A rule of the bucket that deletes these.
    rule: Option<String>,
}

impl Pruning {
    /// Nothing.
    fn none() -> Self {
        let (copies, blocked) = (Vec::new(), Vec::new());
        Self { copies, blocked, leftovers: Ok(Vec::new()), deleted_bytes: 0, versions: Ok(None), rule: None }
    }

    /// How many bytes of the deleted images are not there any more; none if that is not known.
    fn freed_bytes(&self) -> Option<u64> {
        let left = self.versions.as_ref().ok()?.as_ref().map_or(0, |versions| versions.left_bytes);
        Some(self.deleted_bytes.saturating_sub(left))
    }
}

/// Prunes an archive, or shows what would be pruned.
async fn prune_one(
    config: &Config,
    seams: &Seams,
    pruner: &ArchivePruner,
    dry_run: bool,
) -> Result<Pruning, String> {
    let plan = pruner.plan(None, &[]).await?;
    let zone = plan.deletions().next().map(|copy| copy.facts.zone.clone());
    let (plan, steps) = match zone.filter(|_| !dry_run) {
        Some(zone) => {
            let guard = &pruner.rules.guard;
            trust_the_clock(config, seams, guard, &zone).await?;
            let run_id = fresh_id(&*seams.randomness, seams.clock.now());
            let recorder = Recorder::manual(pruner.state.clone(), pruner.clock.clone(), run_id);
            // A signal ends the process.
            pruner.prune(&recorder, None, &CancellationToken::new()).await?
        }
        None => (plan, Vec::new()),
    };
    let mut steps = steps.into_iter();
    let (mut copies, mut deleted) = (Vec::new(), Vec::new());
    for CopyDecision { copy, facts, blocked_by } in plan.decisions {
        let step = if blocked_by.is_none() { steps.next() } else { None };
        let (outcome, message) = step.map_or((None, None), |step| (Some(step.outcome), step.message));
        deleted.extend((outcome == Some(StepOutcome::Done)).then_some(copy));
        copies.push(PrunedCopy { facts, blocked_by, outcome, message });
    }
    let blocked = plan.held.into_values().chain(plan.pending.into_values()).collect();
    let leftovers = if pruner.only != CopyFilter::default() {
        Ok(Vec::new())
    } else if dry_run {
        let all = pruner.archive.leftovers().await.map_err(|error| chain(&error));
        all.map(|all| all.into_iter().filter(|leftover| leftover.is_useless).collect())
    } else {
        // What was pruned was pruned all the same.
        pruner.archive.remove_leftovers().await.map_err(|error| chain(&error))
    };
    let versions = pruner.archive.versions(&deleted.iter().collect::<Vec<_>>()).await;
    let versions = versions.map_err(|error| chain(&error));
    let deleted_bytes = deleted.iter().map(|copy| copy.manifest.image.bytes).sum();
    let rule = match &*pruner.archive {
        Archive::S3(bucket) if !bucket.deletes_noncurrent() => Some(bucket.lifecycle_rule(seams.clock.now())),
        _ => None,
    };
    Ok(Pruning { copies, blocked, leftovers, deleted_bytes, versions, rule })
}

/// A wrong clock makes every copy look old. So it is compared with the API's clock here, as in a run.
async fn trust_the_clock(
    config: &Config,
    seams: &Seams,
    guard: &Guard,
    zone: &ZoneName,
) -> Result<(), String> {
    let why = match assemble::client(config, None, seams).clock_skew(zone).await {
        Ok(skew) => clock_problem(skew, guard.max_clock_skew),
        Err(error) => Some(format!("cannot be compared with the API's: {}", chain(&error))),
    };
    why.map_or(Ok(()), |why| Err(format!("ages are unreliable, since this machine's clock {why}")))
}

/// What is wrong with this machine's clock, which is ahead of the API's by `skew` if that is known; as the end of a sentence.
pub(super) fn clock_problem(skew: Option<SignedDuration>, max: Duration) -> Option<String> {
    let Some(skew) = skew else {
        return Some("cannot be compared with the API's, since its responses have no date".to_owned());
    };
    let side = if skew.is_negative() { "behind" } else { "ahead of" };
    let (is_off, off) = (skew.unsigned_abs() > max, readable(skew.unsigned_abs()));
    is_off.then(|| {
        let max = readable(max);
        format!("is {off} {side} the API's, more than max_clock_skew = {max}; correct it")
    })
}

fn render_pruned(name: &ArchiveName, pruning: &Pruning, dry_run: bool, output: Output) -> String {
    let Pruning { copies, blocked, leftovers, versions, rule, .. } = pruning;
    let head = if dry_run { "would be deleted" } else { "to delete" };
    let deletions = copies.iter().filter(|copy| copy.blocked_by.is_none()).count();
    let mut text = format!("archive {name}: {} {head}\n", counted(deletions, "copy"));
    let row = |copy: &PrunedCopy| -> (Row, String) {
        let (word, tone) = match copy.outcome {
            None if copy.blocked_by.is_some() => ("kept", Tone::Dim),
            None => ("would be deleted", Tone::Bad),
            Some(StepOutcome::Done) => ("deleted", Tone::Bad),
            Some(StepOutcome::Failed) => ("FAILED", Tone::Bad),
            Some(StepOutcome::Blocked | StepOutcome::Skipped) => ("kept", Tone::Dim),
        };
        let StepFacts { zone, snapshot, reasons, .. } = &copy.facts;
        let id = || snapshot.instance_id.map_or_else(String::new, |id| id.to_string());
        let row = vec![
            (word.to_owned(), tone),
            plain(zone.to_string()),
            plain(snapshot.instance_name.clone().unwrap_or_else(id)),
            plain(snapshot.id.map_or_else(|| "-".to_owned(), SnapshotId::short)),
            plain(to_the_second(snapshot.created_at).to_string()),
        ];
        (row, copy.message.clone().unwrap_or_else(|| reasons.join("; ")))
    };
    if !copies.is_empty() {
        let head = &["RESULT", "ZONE", "INSTANCE", "SNAPSHOT", "TAKEN"];
        text.push_str(&output.table_with_text(head, copies.iter().map(row).collect(), "WHY"));
    }
    for why in blocked {
        text.push_str(&output.note("BLOCKED:", Tone::Bad, why));
    }
    let fate = if dry_run { "would be removed" } else { "removed" };
    if let Err(why) = leftovers {
        let why = format!("what interrupted exports left stays: {why}");
        text.push_str(&output.note("FAILED:", Tone::Bad, &why));
    }
    for leftover in leftovers.iter().flatten() {
        let path = printable(&leftover.path.to_string_lossy()).into_owned();
        let _ = writeln!(text, "leftover of an interrupted export, {fate}: {path}");
    }
    if !dry_run && pruning.deleted_bytes > 0 {
        let freed = pruning.freed_bytes().map_or_else(|| "unknown".to_owned(), size);
        let _ = writeln!(text, "freed: {freed} of {}", size(pruning.deleted_bytes));
    }
    if let Err(why) = versions {
        let _ = writeln!(text, "what the bucket keeps of deleted files is not known: {why}");
    }
    let versions = versions.as_ref().ok().and_then(Option::as_ref);
    if let Some(Versions { count, bytes, .. }) = versions.filter(|versions| versions.count > 0) {
        let count = counted(usize::try_from(*count).unwrap_or(usize::MAX), "noncurrent version");
        let _ = writeln!(text, "the bucket keeps {count} of deleted and overwritten files, {}", size(*bytes));
        if let Some(rule) = rule {
            let _ = writeln!(
                text,
                "a lifecycle rule of the bucket deletes them (it replaces the rules that it has): {rule}"
            );
        }
    }
    text
}

fn render_verified(name: &ArchiveName, verified: Option<&Verification>) -> String {
    let (mut good, mut corrupt, mut failed) = (0, 0, 0);
    let copies = verified.map_or(&[][..], |verified| &verified.copies);
    for (_, outcome) in copies {
        *match outcome {
            Outcome::Good | Outcome::Repaired(_) => &mut good,
            Outcome::Corrupt(_) => &mut corrupt,
            Outcome::Failed(_) => &mut failed,
        } += 1;
    }
    format!(
        "archive {name}: {} read, {good} good, {corrupt} corrupt, {failed} not verified\n",
        counted(copies.len(), "image")
    )
}

/// What an interrupted export left, for people.
fn describe_leftover(leftover: &Leftover) -> String {
    let path = printable(&leftover.path.to_string_lossy()).into_owned();
    let bytes = leftover.bytes.map_or_else(String::new, |bytes| format!(", {}", size(bytes)));
    let fate = if leftover.is_useless { "`archive prune` removes it" } else { "an export may resume it" };
    format!("leftover of an interrupted export: {path}{bytes}; {fate}")
}

fn leftovers(leftovers: &[Leftover]) -> Value {
    let leftover = |leftover: &Leftover| {
        let Leftover { path, bytes, is_useless } = leftover;
        json!({ "file": path.display().to_string(), "bytes": bytes, "is_useless": is_useless })
    };
    leftovers.iter().map(leftover).collect()
}

fn sentences(problems: &[Problem]) -> Vec<String> {
    problems.iter().map(Problem::describe).collect()
}

/// How much an archive's bucket keeps of deleted files; for programs.
fn noncurrent(versions: Option<&Versions>) -> Value {
    versions.map_or(Value::Null, |Versions { count, bytes, .. }| json!({ "versions": count, "bytes": bytes }))
}

/// The images that are hidden by a delete marker and not pruned.
fn hidden<'l>(listed: Option<&'l Listed>, only: &CopyFilter) -> impl Iterator<Item = &'l Path> {
    let versions = listed.and_then(|listed| listed.versions.as_ref());
    let hidden = versions.into_iter().flat_map(|versions| &versions.hidden).map(PathBuf::as_path);
    hidden.filter(|path| only.includes_path(path))
}

/// What an archive's bucket keeps beside the copies, and how many of these are locked, for people.
fn render_versions(listed: &Listed, only: &CopyFilter) -> String {
    let mut text = String::new();
    let locks = listed.catalogue.unpruned().filter_map(|copy| listed.locked.get(&copy.stem()));
    let locks: Vec<Timestamp> = locks.map(|lock| lock.until).collect();
    if let Some(first) = locks.iter().min() {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} locked; the first lock ends at {first}", counted(locks.len(), "copy"));
    }
    for path in hidden(Some(listed), only) {
        let path = printable(&path.display().to_string()).into_owned();
        let _ = writeln!(
            text,
            "hidden by a delete marker: {path}: its bytes are still there; whoever may delete versions brings it back by \
             deleting the marker, and that of its manifest"
        );
    }
    if let Some(Versions { count, bytes, .. }) =
        listed.versions.as_ref().filter(|versions| versions.count > 0)
    {
        let count = counted(usize::try_from(*count).unwrap_or(usize::MAX), "noncurrent version");
        let _ = writeln!(text, "{count} of deleted and overwritten files in the bucket, {}", size(*bytes));
    }
    text
}

/// The copies that the archive's retention removed, or those that it did not; for programs.
fn images(listed: &Listed, pruned: bool) -> Value {
    let Listed { catalogue, locked, .. } = listed;
    let copies = catalogue.copies().iter().filter(|copy| copy.manifest.pruned_at.is_some() == pruned);
    let with_holds = |copy: &StoredCopy| {
        let mut image = image(copy);
        let marks = catalogue.holds().get(&copy.manifest.snapshot.id).into_iter().flatten();
        image["holds"] = marks.map(|mark| json!({ "state_id": mark.state, "until": mark.until })).collect();
        image["locked_until"] = json!(locked.get(&copy.stem()).filter(|_| !pruned).map(|lock| lock.until));
        image
    };
    copies.map(with_holds).collect()
}

/// An age for people.
fn age(at: Timestamp, now: Timestamp) -> String {
    match now.duration_since(at).as_hours() {
        hours @ 0..48 => format!("{hours}h"),
        hours if hours > 0 => format!("{}d", hours / 24),
        _ => "(in the future)".to_owned(),
    }
}

fn image(copy: &StoredCopy) -> Value {
    let manifest = &copy.manifest;
    let mut image = json!({
        "zone": manifest.zone,
        "instance_id": manifest.instance.id,
        "instance_name": manifest.instance.name,
        "snapshot_id": manifest.snapshot.id,
        "snapshot_name": manifest.snapshot.name,
        "created_at": manifest.snapshot.created_at,
        "verified_at": manifest.verified_at,
        "size_bytes": manifest.image.bytes,
        "md5": manifest.image.md5,
        "file": copy.image().display().to_string(),
    });
    if let Some(at) = manifest.pruned_at {
        image["pruned_at"] = json!(at);
    }
    image
}

fn verified_image(copy: &StoredCopy, outcome: &Outcome) -> Value {
    let (word, message) = match outcome {
        Outcome::Good => ("good", None),
        Outcome::Repaired(since) => ("good", Some(format!("it was marked as corrupt since {since}"))),
        Outcome::Corrupt(why) => ("corrupt", Some(why.clone())),
        Outcome::Failed(why) => ("failed", Some(why.clone())),
    };
    let mut image = image(copy);
    image["outcome"] = json!(word);
    image["message"] = json!(message);
    image
}

fn render(name: &ArchiveName, catalogue: Option<&Catalogue>, now: Timestamp, output: Output) -> String {
    let copies = catalogue.map_or(&[][..], Catalogue::copies);
    let (pruned, images): (Vec<_>, Vec<_>) =
        copies.iter().partition(|copy| copy.manifest.pruned_at.is_some());
    let bytes: u64 = images.iter().map(|copy| copy.manifest.image.bytes).sum();
    let mut text = format!("archive {name}: {}, {}\n", counted(images.len(), "verified image"), size(bytes));
    let row = |copy: &&StoredCopy| -> Row {
        let manifest = &copy.manifest;
        vec![
            plain(manifest.instance.name.clone().unwrap_or_else(|| manifest.instance.id.to_string())),
            plain(manifest.zone.to_string()),
            plain(manifest.snapshot.id.short()),
            plain(to_the_second(manifest.snapshot.created_at).to_string()),
            plain(age(manifest.snapshot.created_at, now)),
            plain(size(manifest.image.bytes)),
            plain(manifest.verified_at.strftime("%Y-%m-%d").to_string()),
            plain(manifest.image.md5.to_string()),
            plain(copy.image().display().to_string()),
        ]
    };
    if !images.is_empty() {
        let head = ["INSTANCE", "ZONE", "SNAPSHOT", "TAKEN", "AGE", "SIZE", "VERIFIED", "MD5", "FILE"];
        // In the order in which they can be done without; JSON has them all.
        let optional = ["FILE", "MD5", "ZONE", "AGE", "VERIFIED", "SIZE"];
        text.push_str(&output.fitted_table(&head, images.iter().map(row).collect(), &optional));
    }
    for copy in &images {
        let id = copy.manifest.snapshot.id;
        let marks = catalogue.and_then(|catalogue| catalogue.holds().get(&id)).into_iter().flatten();
        for mark in marks.filter(|mark| mark.counts_at(now)) {
            let until = mark.until.map_or_else(String::new, |until| format!(" until {until}"));
            let _ = writeln!(
                text,
                "on hold: snapshot {}{until}, marked by state directory {}",
                id.short(),
                mark.state
            );
        }
    }
    if !pruned.is_empty() {
        let copies = counted(pruned.len(), "copy");
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{copies} deleted by the archive's retention; the manifests remain");
    }
    for problem in catalogue.iter().flat_map(|catalogue| catalogue.problems()) {
        let _ = writeln!(text, "problem: {}", printable(&problem.describe()));
    }
    text
}
