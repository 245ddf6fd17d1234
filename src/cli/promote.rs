//! `promote`: one snapshot to a template, now.

use serde_json::json;

use crate::cli::args::{Global, Promote};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::Output;
use crate::cli::survey::known;
use crate::exoscale::wire::PromoteRequest;
use crate::lookup::{self, Kind};
use crate::run::context::Runner;
use crate::run::promote::promote_manually;
use crate::run::report::Step;
use crate::snapshot::{SnapshotId, TemplateId, ZoneName};
use crate::state::audit::{StepFacts, StepOutcome};
use crate::text::printable;

/// Refuses a template name that the platform does not accept.
pub(super) fn check_template_name(name: &str) -> Result<(), Refusal> {
    if (1..=255).contains(&name.chars().count()) && !name.chars().any(char::is_control) {
        return Ok(());
    }
    Err(Refusal::usage("a template name must have 1 to 255 characters and no control characters"))
}

/// A template that was made, by its id and name.
pub(super) fn described(id: Option<TemplateId>, name: &str) -> String {
    let id = id.map_or_else(|| "(not named by the API)".to_owned(), |id| id.to_string());
    format!("template {id} ({})", printable(name))
}

/// The facts of a step that is done.
pub(super) fn done(step: Step, work: &str) -> Result<StepFacts, Refusal> {
    if step.outcome == StepOutcome::Done {
        return Ok(step.facts);
    }
    let why = step.message.unwrap_or_else(|| "it was not started".to_owned());
    Err(Refusal::failed(format!("{work}: {why}")))
}

/// Promotes and prints the template's id.
///
/// # Errors
/// [`Refusal`] if no template was made.
pub async fn promote(global: &Global, promote: &Promote, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let credentials = assemble::credentials(&config)?;
    check_template_name(&promote.name)?;
    let runner = assemble::runner(&config, credentials, &Seams::real(), Use::Changing)?;
    let request = PromoteRequest {
        name: promote.name.clone(),
        description: promote.description.clone(),
        ..PromoteRequest::default()
    };
    let snapshot = &snapshot_in_zone(&runner, &promote.zone, &promote.snapshot).await?;
    let step =
        promote_manually(&runner, &promote.zone, *snapshot, &request).await.map_err(Refusal::failed)?;
    let template_id = done(step, &format!("promote snapshot {snapshot}"))?.template_id;
    let Promote { zone, name, .. } = promote;
    output.show(
        || json!({ "zone": zone, "snapshot_id": snapshot, "template_id": template_id, "template_name": name }),
        || format!("{} in zone {zone}\n", described(template_id, name)),
    );
    Ok(Exit::Done)
}

/// The snapshot of a zone that the text means. For a whole id nothing is asked.
async fn snapshot_in_zone(runner: &Runner, zone: &ZoneName, text: &str) -> Result<SnapshotId, Refusal> {
    if let Some(id) = lookup::whole_id(text) {
        return Ok(SnapshotId(id));
    }
    let (listed, _) = runner.client.zone(zone).list_snapshots().await?;
    let known = listed.snapshots.iter().map(|snapshot| known(zone, snapshot));
    lookup::find(Kind::Snapshot, text, known)
        .map(SnapshotId)
        .map_err(|error| Refusal::usage(format!("zone {zone}: {error}")))
}
