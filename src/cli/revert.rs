//! `revert`: an instance back to one of its snapshots.

use futures_util::FutureExt as _;

use crate::cli::args::{Global, Revert};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::in_place::{carry_out, check_consent};
use crate::cli::output::Output;
use crate::cli::progress::Progress;
use crate::cli::survey::{Survey, known};
use crate::lookup::{self, Kind};
use crate::restore::in_place::Change;
use crate::snapshot::{SnapshotId, ZoneName};

/// Reverts an instance.
///
/// # Errors
/// [`Refusal`] if it was not reverted, with what was done by then.
pub async fn revert(
    global: &Global,
    revert: &Revert,
    output: Output,
    progress: &Progress,
) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    check_consent(&revert.safety)?;
    let credentials = assemble::credentials(&config)?;
    let seams = Seams::real();
    assemble::check_archives(&config, revert.safety.copy_to.as_ref())?;
    let mut runner = assemble::runner(&config, credentials, &seams, Use::Changing)?;
    runner.downloads = progress.downloads();
    let (zone, snapshot) = if let Some(zone) = &revert.zone {
        let (listed, _) = runner.client.zone(zone).list_snapshots().await?;
        let known = listed.snapshots.iter().map(|snapshot| known(zone, snapshot));
        let found = lookup::find(Kind::Snapshot, &revert.snapshot, known);
        let found = found.map_err(|error| Refusal::usage(format!("zone {zone}: {error}")))?;
        (zone.clone(), SnapshotId(found))
    } else {
        let mut survey = Survey::default();
        survey.ask_zones(&config, &seams).await;
        find(&survey, &revert.snapshot)?
    };
    let change = Change::to_snapshot(&runner, &zone, snapshot).await?;
    carry_out((&runner, &config), (&change, "reverted"), &revert.safety, output, progress).boxed().await
}

/// The snapshot that the text means, and its zone.
fn find(survey: &Survey, text: &str) -> Result<(ZoneName, SnapshotId), Refusal> {
    let found = lookup::find(Kind::Snapshot, text, survey.snapshots());
    let id = SnapshotId(found.map_err(|error| survey.not_found(&error))?);
    let Some((listing, _)) = survey.listed(id) else {
        let mut why = format!("no snapshot {id} is listed in {}", survey.asked());
        for doubt in survey.doubts() {
            why.push_str("\n  not asked: ");
            why.push_str(&doubt);
        }
        why.push_str("\nof one that was exported, `snapwarden restore … --to-instance` has the copy");
        return Err(Refusal::failed(why));
    };
    Ok((listing.zone.clone(), id))
}
