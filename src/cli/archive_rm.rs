//! `archive rm`: one copy, and what is lost with it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;

use clap::ValueEnum as _;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::archive::backend::Archive;
use crate::archive::catalogue::{Catalogue, StoredCopy};
use crate::archive::manifest::Manifest;
use crate::archive::manifest_update::{ManifestUpdate, UpdateError};
use crate::cli::archive::{filter_of, show_daemon};
use crate::cli::archive_copy::known;
use crate::cli::args::{Copies, Global, Loss};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::confirm::{ask, can_ask, is_confirmed};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::Output;
use crate::cli::survey::Survey;
use crate::config::sections::Config;
use crate::lookup::{self, Kind};
use crate::policy::name::ArchiveName;
use crate::policy::{Guard, Policy, Which};
use crate::randomness::fresh_id;
use crate::retention::export_gate::unadopted_text;
use crate::run::archive_presence::{Found, Looker, Presence, remember_write};
use crate::run::archive_retention::subject_of;
use crate::run::step::{Done, Recorder, StepError};
use crate::snapshot::{Snapshot, SnapshotId};
use crate::state::archives::ArchiveMemory;
use crate::state::audit::{Action, StepFacts, StepOutcome};
use crate::state::directory::StateDirectory;
use crate::text::{chain, counted, printable, to_the_second};

/// What is lost with a copy, each with a sentence.
type Losses = Vec<(Loss, String)>;

/// Removes a copy. `answer` is what the command line says may be lost; none if it has to be asked for.
///
/// # Errors
/// [`Refusal`] if nothing was removed.
pub(super) async fn rm(
    global: &Global,
    name: &ArchiveName,
    (text, copies): (&str, &Copies),
    answer: Option<&[Loss]>,
    output: Output,
) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    assemble::check_archives(&config, [name])?;
    let seams = Seams::real();
    let (Some(settings), Some(rules)) = (config.archives.get(name), config.archive_rules.get(name)) else {
        return Err(Refusal::usage(format!("there is no archive `{name}` in the configuration")));
    };
    let archive = assemble::archive(name, settings, &seams, (&config.state_directory, Use::Changing))?;
    let state = assemble::state(&config, &seams, Use::Changing)?;
    let look = async || Meant::look(&config, &seams, &state, (&archive, &rules.guard), (text, copies)).await;
    let Meant { copy, losses, .. } = look().await?;
    confirm(name, &copy, &losses, answer, output)?;
    let accepted = losses;
    // Until the end no policy deletes a snapshot of the zone; while that was asked, one may have.
    let alone = state.lock_zone(&copy.manifest.zone, &*seams.clock, &CancellationToken::new()).await;
    let _alone = alone.map_err(|error| in_doubt(name, &chain(&error)))?;
    let Meant { found, copy, losses } = look().await?;
    if let Some((_, why)) = losses.iter().find(|(loss, _)| accepted.iter().all(|(other, _)| other != loss)) {
        return Err(in_doubt(
            name,
            &format!("more is lost with the copy than a moment ago: {why}; run it again"),
        ));
    }

    let run_id = fresh_id(&*seams.randomness, seams.clock.now());
    let recorder = Recorder::manual(state.clone(), Arc::clone(&seams.clock), run_id);
    let mut reasons = vec!["a manual command".to_owned()];
    reasons.extend(losses.iter().map(|(loss, why)| format!("losing {}: {why}", word(*loss))));
    let intent = StepFacts {
        archive: Some(name.clone()),
        ..StepFacts::new(Action::PruneCopy, &copy.manifest.zone, subject_of(&copy.manifest), reasons)
    };
    let is_hold_lost = losses.iter().any(|(loss, _)| *loss == Loss::Hold);
    let work = remove(&archive, &state, &seams, &copy, &found, is_hold_lost);
    let step = recorder.step(intent, work).await;
    show_daemon(&state, &seams, output).await;
    if step.outcome != StepOutcome::Done {
        let why = step.message.unwrap_or_else(|| "it was not begun".to_owned());
        return Err(Refusal::failed(format!("archive {name}: the copy is not deleted: {why}")));
    }
    let losing: Vec<_> =
        losses.iter().map(|(loss, why)| json!({ "what": word(*loss), "text": why })).collect();
    output.show(
        || {
            json!({
                "archive": name, "zone": copy.manifest.zone, "snapshot": step.facts.snapshot, "losses": losing,
                "bytes": copy.manifest.image.bytes,
            })
        },
        || format!("archive {name}: deleted the copy of {}\n", described(&copy)),
    );
    Ok(Exit::Done)
}

/// What a command line means, as things are at this moment.
struct Meant {
    found: Found,
    copy: StoredCopy,
    losses: Losses,
}

impl Meant {
    async fn look(
        config: &Config,
        seams: &Seams,
        state: &StateDirectory,
        (archive, guard): (&Archive, &Guard),
        (text, copies): (&str, &Copies),
    ) -> Result<Self, Refusal> {
        let name = archive.name();
        let looker = Looker::new(state).await.map_err(Refusal::failed)?;
        let found = looker.look(archive, guard).await;
        let found = found.map_err(|why| Refusal::failed(format!("archive {name}: {why}")))?;
        match &found.presence {
            Presence::Closed(why) => return Err(in_doubt(name, why)),
            Presence::Unadopted => return Err(Refusal::failed(unadopted_text(name))),
            Presence::InDoubt { .. } | Presence::Known | Presence::FirstUse => {}
        }
        let copy = find(&found.catalogue, text, copies)?;
        if let Presence::InDoubt { why, .. } = &found.presence {
            // Where copies share their data, only removing the corrupt one helps; an export over lost data fails as well.
            let is_corrupt = !found.catalogue.copies().contains(&copy);
            if !is_corrupt || !archive.shares_data() {
                return Err(in_doubt(name, why));
            }
        }
        let mut survey = Survey::default();
        survey.ask_zones(config, seams).await;
        survey.ask_archives(config, seams, state).await;
        let holds = Held::of(state, &found, &copy, seams).await?;
        let losses = losses(config, &survey, &found.catalogue, &copy, holds);
        Ok(Self { found, copy, losses })
    }
}

/// The copy that is meant; a corrupt one too.
fn find(catalogue: &Catalogue, text: &str, copies: &Copies) -> Result<StoredCopy, Refusal> {
    let name = catalogue.archive();
    let corrupt = || catalogue.corrupt().iter().chain(catalogue.unmarked().iter().map(|(copy, _)| copy));
    let all: Vec<&StoredCopy> = catalogue.copies().iter().chain(corrupt()).collect();
    let only = filter_of(copies, all.iter().copied())?;
    let meant: Vec<&StoredCopy> = all.into_iter().filter(|copy| only.includes(&copy.manifest)).collect();
    let id = lookup::find(Kind::Snapshot, text, meant.iter().map(|copy| known(copy)));
    let id = SnapshotId(id.map_err(|error| Refusal::usage(format!("in archive {name}, {error}")))?);
    let mut of_it = meant.into_iter().filter(|copy| copy.manifest.snapshot.id == id);
    match (of_it.next(), of_it.next()) {
        (None, _) => Err(Refusal::usage(format!("archive {name} has no copy of snapshot {id}"))),
        // What an interrupted pruning left may be deleted.
        (Some(copy), None) => match copy.manifest.pruned_at.filter(|_| !copy.has_image) {
            Some(at) => {
                Err(Refusal::usage(format!("archive {name}: the copy of snapshot {id} was deleted at {at}")))
            }
            None => Ok(copy.clone()),
        },
        (Some(_), Some(_)) => Err(Refusal::usage(format!(
            "archive {name} has several copies of snapshot {id}, of different instances: name one with `--instance`"
        ))),
    }
}

/// What holds the copy's snapshot, in a sentence; none if nothing does.
struct Held(Option<String>);

impl Held {
    async fn of(
        state: &StateDirectory,
        found: &Found,
        copy: &StoredCopy,
        seams: &Seams,
    ) -> Result<Self, Refusal> {
        let (id, now) = (copy.manifest.snapshot.id, seams.clock.now());
        let holds = state.holds().await?;
        if let Some(hold) = holds.on(id, now) {
            let until = hold.until.map_or_else(String::new, |until| format!(" until {until}"));
            let reason =
                hold.reason.as_deref().map_or_else(String::new, |why| format!(" ({})", printable(why)));
            return Ok(Self(Some(format!("its snapshot is on hold{until}{reason}"))));
        }
        let mut marks = found.catalogue.holds().get(&id).into_iter().flatten();
        let mark = marks.find(|mark| mark.counts_at(now));
        Ok(Self(mark.map(|mark| {
            let until = mark.until.map_or_else(String::new, |until| format!(" until {until}"));
            format!("its snapshot is on hold{until}, by a mark in the archive")
        })))
    }
}

/// What is lost with the copy. What can't be found out counts as lost.
fn losses(
    config: &Config,
    survey: &Survey,
    catalogue: &Catalogue,
    copy: &StoredCopy,
    Held(held): Held,
) -> Losses {
    let mut losses: Losses = held.map(|why| (Loss::Hold, why)).into_iter().collect();
    let (manifest, archive) = (&copy.manifest, catalogue.archive());
    let listing = survey.zones.iter().find(|listing| listing.zone == manifest.zone && listing.is_whole);
    let of_instance = |snapshot: &&Snapshot| snapshot.instance_id == Some(manifest.instance.id);
    let snapshots: Option<Vec<&Snapshot>> =
        listing.map(|listing| listing.snapshots.iter().filter(of_instance).collect());

    let without = catalogue.without(copy);
    for policy in &config.policies {
        losses.extend(gate_of(policy, archive, copy, [catalogue, &without], snapshots.as_deref()));
    }

    let is_elsewhere = survey
        .copies_of(manifest.snapshot.id)
        .any(|(name, copy)| name != archive && copy.manifest.pruned_at.is_none());
    let is_listed = snapshots.as_ref().map(|all| {
        all.iter().any(|snapshot| snapshot.id == manifest.snapshot.id && snapshot.state.is_good())
    });
    if is_elsewhere || is_listed == Some(true) {
        return losses;
    }
    let damaged = if manifest.corrupt_since.is_some() { "it is damaged, but " } else { "" };
    let why = if is_listed.is_none() || !survey.unasked.is_empty() {
        let unasked = survey.unasked.join("; ");
        let unasked =
            if unasked.is_empty() { format!("zone {} is in no policy", manifest.zone) } else { unasked };
        format!("{damaged}whether anything else is left of its snapshot is not known: {unasked}")
    } else {
        format!(
            "{damaged}nothing else is left of it: its snapshot is deleted, and no other archive has a copy"
        )
    };
    losses.push((Loss::OnlyCopy, why));
    losses
}

fn in_doubt(name: &ArchiveName, why: &str) -> Refusal {
    Refusal::failed(format!("nothing is deleted from archive {name}: {why}"))
}

/// The snapshots that a policy would not delete any more, if some need the copy.
fn gate_of(
    policy: &Policy,
    archive: &ArchiveName,
    copy: &StoredCopy,
    [with, without]: [&Catalogue; 2],
    snapshots: Option<&[&Snapshot]>,
) -> Option<(Loss, String)> {
    let export =
        policy.export.as_ref().filter(|export| export.required && export.archives.contains(archive))?;
    if !policy.zones.contains(&copy.manifest.zone) {
        return None;
    }
    let name = &policy.name;
    let why = if let Some(snapshots) = snapshots {
        let rests = |snapshot: &&&Snapshot| {
            let proof = |catalogue: &Catalogue| catalogue.proof(snapshot, export.snapshots).is_some();
            proof(with) && !proof(without)
        };
        let count = snapshots.iter().filter(rests).count();
        let snapshots = counted(count, "snapshot");
        (count > 0).then(|| {
            format!(
                "policy {name} deletes {snapshots} of its instance only with this copy: they stay until a newer one is stored"
            )
        })
    } else {
        let is_of_instance = |other: &&StoredCopy| other.manifest.instance.id == copy.manifest.instance.id;
        let count = |catalogue: &Catalogue| catalogue.counting().filter(is_of_instance).count();
        let is_needed = export.snapshots == Which::All || count(without) < count(with);
        let why = format!("policy {name} may delete snapshots only with this copy: they cannot be listed");
        is_needed.then_some(why)
    };
    why.map(|why| (Loss::Gate, why))
}

fn word(loss: Loss) -> String {
    loss.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

fn described(copy: &StoredCopy) -> String {
    let manifest = &copy.manifest;
    let instance = manifest.instance.name.as_deref().map_or_else(
        || format!("instance {}", manifest.instance.id),
        |name| format!("instance {}", printable(name)),
    );
    let at = to_the_second(manifest.snapshot.created_at);
    format!("snapshot {} of {instance}, taken {at}", manifest.snapshot.id)
}

/// Continues only if the answer says all that is lost.
fn confirm(
    name: &ArchiveName,
    copy: &StoredCopy,
    losses: &[(Loss, String)],
    answer: Option<&[Loss]>,
    output: Output,
) -> Result<(), Refusal> {
    let lost: BTreeSet<Loss> = losses.iter().map(|(loss, _)| *loss).collect();
    let words = lost.iter().map(|loss| word(*loss)).collect::<Vec<_>>();
    let mut said = String::new();
    for (loss, why) in losses {
        // Writing to a String cannot fail.
        let _ = write!(said, "\n  {}: {why}", word(*loss));
    }
    let what = format!("the copy of {} in archive {name}", described(copy));
    match answer {
        Some(losing) if lost.iter().all(|loss| losing.contains(loss)) => return Ok(()),
        Some(_) => {
            return Err(Refusal::usage(format!(
                "with {what} more is lost, so it stays:{said}\nif that is right: --yes --losing {}",
                words.join(",")
            )));
        }
        None if !can_ask() => {
            let losing =
                if lost.is_empty() { String::new() } else { format!(" --losing {}", words.join(",")) };
            return Err(Refusal::usage(format!(
                "{what} is deleted only if that is confirmed, and there is no terminal to ask on:{}{said}\nif that is right: \
                 --yes{losing}",
                if said.is_empty() { " nothing else is lost" } else { " more is lost" }
            )));
        }
        None => {}
    }
    let is_confirmed = if lost.is_empty() {
        is_confirmed(&format!("Delete {what}?"))?
    } else {
        output.complain(&format!("with {what} more is lost:{said}"));
        let typed = ask(&format!("To delete it all the same, type `{}`:", words.join(" ")))?;
        let typed: BTreeSet<&str> = typed.split([' ', ',']).filter(|word| !word.is_empty()).collect();
        typed == words.iter().map(String::as_str).collect()
    };
    if is_confirmed { Ok(()) } else { Err(Refusal::usage("nothing was deleted")) }
}

/// Removes the copy: as pruned, or wholly if it is corrupt, since it must not count as one that was there.
async fn remove(
    archive: &Archive,
    state: &StateDirectory,
    seams: &Seams,
    copy: &StoredCopy,
    found: &Found,
    is_hold_lost: bool,
) -> Result<Done, StepError> {
    let unmarked = found.catalogue.unmarked().iter().find(|(other, _)| other.image() == copy.image());
    let is_corrupt = copy.manifest.corrupt_since.is_some() || unmarked.is_some();
    let removed = async {
        if is_hold_lost {
            archive.remove_holds(&copy.manifest.id(), None).await?;
        }
        if let Some((_, since)) = unmarked {
            archive.update_manifest(copy, ManifestUpdate::Corrupt(*since)).await?;
            let manifest = Arc::new(Manifest { corrupt_since: Some(*since), ..(*copy.manifest).clone() });
            return archive.remove_corrupt(&StoredCopy { manifest, ..copy.clone() }).await;
        }
        if is_corrupt {
            return archive.remove_corrupt(copy).await;
        }
        archive.update_manifest(copy, ManifestUpdate::Pruned(seams.clock.now())).await
    };
    let removed = removed.await;
    let failure = removed.as_ref().err().and_then(UpdateError::failed_write).map(|error| chain(error));
    if removed.is_ok() || failure.is_some() {
        let remembered = remember_write(state, &*seams.clock, archive.name(), failure).await;
        remembered.map_err(StepError::failed)?;
    }
    removed.map_err(|error| StepError::failed(chain(&error)))?;
    if is_corrupt {
        // It is not there any more, and nothing in the archive says why.
        let id = copy.manifest.id();
        let forget = move |memory: &mut ArchiveMemory| {
            Arc::make_mut(&mut memory.copies).remove(&id);
            memory.corrupt.remove(&id.to_string());
        };
        let forgotten = state.change_archive(&*seams.clock, archive.name(), forget).await;
        forgotten.map_err(|error| {
            StepError::failed(format!("it is deleted, but still remembered: {}", chain(&error)))
        })?;
    }
    Ok(Done::default())
}
