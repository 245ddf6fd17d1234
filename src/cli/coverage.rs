//! `coverage`: every instance of the zones, what it has, and what it lacks.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::cli::args::Global;
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::{Output, Row, Tone, plain};
use crate::cli::plan::table::age;
use crate::lookup::{self, Kind, Known};
use crate::policy::name::{ArchiveName, PolicyName};
use crate::retention::coverage::{CoverageState, InstanceCoverage};
use crate::run::coverage::FleetCoverage;
use crate::snapshot::InstanceId;
use crate::text::counted;

/// Shows the coverage of these instances, or of all.
///
/// # Errors
/// [`Refusal`] if nothing can be judged, or an instance is not known.
pub async fn coverage(global: &Global, instances: &[String], output: Output) -> Result<Exit, Refusal> {
    let mut config = assemble::configuration(global)?;
    let seams = Seams::real();
    assemble::heed_pauses(&mut config, &seams).await?;
    assemble::complain_of_paused(&config, output);
    let credentials = assemble::credentials(&config)?;
    let runner = assemble::runner(&config, credentials, &seams, Use::Reading)?;
    let mut fleet = runner.coverage().await.map_err(Refusal::failed)?;
    for failure in &fleet.failures {
        output.complain(failure);
    }
    choose(&mut fleet, instances)?;
    if instances.is_empty() {
        for (_, unmatched) in &fleet.unmatched {
            output.complain(unmatched);
        }
    }
    output.show(|| as_json(&fleet), || render(&fleet, !instances.is_empty(), output));
    let lacks = fleet.instances.iter().any(|one| !one.problems.is_empty());
    let is_unmatched = instances.is_empty() && !fleet.unmatched.is_empty();
    Ok(if lacks || is_unmatched || !fleet.failures.is_empty() { Exit::Failed } else { Exit::Done })
}

/// Leaves only the named instances.
fn choose(fleet: &mut FleetCoverage, texts: &[String]) -> Result<(), Refusal> {
    if texts.is_empty() {
        return Ok(());
    }
    let known = || {
        fleet.instances.iter().map(|one| Known {
            id: one.id.0,
            name: Some(one.name.clone()),
            zone: Some(one.zone.clone()),
            taken_at: one.newest_snapshot,
        })
    };
    let mut chosen = Vec::new();
    for text in texts {
        let id =
            lookup::find(Kind::Instance, text, known()).map_err(|error| Refusal::usage(error.to_string()))?;
        if !known().any(|one| one.id == id) {
            let unknown = lookup::LookupError::Unknown { kind: Kind::Instance, text: text.clone() };
            return Err(Refusal::usage(unknown.to_string()));
        }
        chosen.push(InstanceId(id));
    }
    fleet.instances.retain(|one| chosen.contains(&one.id));
    Ok(())
}

fn as_json(fleet: &FleetCoverage) -> Value {
    let instance = |one: &InstanceCoverage| {
        json!({
            "zone": one.zone,
            "instance_id": one.id,
            "instance_name": one.name,
            "state": one.state.as_str(),
            "policies": one.policies,
            "newest_snapshot": one.newest_snapshot,
            "newest_copy": one.newest_copy,
            "archives": one.archives,
            "problems": one.problems,
        })
    };
    json!({ "at": fleet.at, "instances": fleet.instances.iter().map(instance).collect::<Value>() })
}

/// The worst first. Where the width is short, only a few instances that were asked for show their policies.
fn render(fleet: &FleetCoverage, with_policies: bool, output: Output) -> String {
    let row = |one: &InstanceCoverage| {
        let policies: Vec<&str> = one.policies.iter().map(PolicyName::as_str).collect();
        let archives: Vec<&str> = one.archives.iter().map(ArchiveName::as_str).collect();
        let ago =
            |at: Option<jiff::Timestamp>| at.map_or_else(|| "-".to_owned(), |at| age(at, fleet.at, false));
        let tone = match one.state {
            _ if !one.problems.is_empty() => Tone::Bad,
            CoverageState::Covered => Tone::Good,
            CoverageState::Uncovered | CoverageState::Exempt | CoverageState::Vanished => Tone::Dim,
        };
        let mut row: Row = vec![
            plain(&one.name),
            plain(one.zone.as_str()),
            (one.state.as_str().to_owned(), tone),
            plain(ago(one.newest_snapshot)),
            plain(ago(one.newest_copy)),
            plain(archives.join(", ")),
        ];
        let mut texts = one.problems.clone();
        if !output.is_narrow() {
            row.push(plain(policies.join(", ")));
        } else if with_policies && !policies.is_empty() {
            texts.push(format!("policies: {}", policies.join(", ")));
        }
        (row, texts.join("; "))
    };
    let mut head = vec!["INSTANCE", "ZONE", "STATE", "SNAPSHOT", "COPY", "IN"];
    if !output.is_narrow() {
        head.push("POLICIES");
    }
    let rows = fleet.instances.iter().map(row).collect();
    let mut text = output.table_with_text(&head, rows, "PROBLEMS");
    let count = |state| fleet.instances.iter().filter(|one| one.state == state).count();
    let states =
        [CoverageState::Covered, CoverageState::Uncovered, CoverageState::Exempt, CoverageState::Vanished];
    let states = states.map(|state| format!("{} {}", count(state), state.as_str())).join(", ");
    let lacking = fleet.instances.iter().filter(|one| !one.problems.is_empty()).count();
    let all = counted(fleet.instances.len(), "instance");
    // Writing to a String cannot fail.
    let _ = writeln!(text, "\n{all}: {states}; {lacking} with problems");
    text
}
