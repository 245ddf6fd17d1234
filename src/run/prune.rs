//! Deletes what the plan lets go, oldest first; each one, and what people pinned, is read again just before.

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _};

use crate::archive::proof::VerifiedCopy;
use crate::exoscale::client::ZoneClient;
use crate::exoscale::error::ApiError;
use crate::exoscale::wire::Deleted;
use crate::retention::plan::Decision;
use crate::retention::verdict::{CopyNeeded, Verdict};
use crate::run::list::Listing;
use crate::run::report::Step;
use crate::run::step::{Done, Recorder, StepError};
use crate::run::{Planned, Runner};
use crate::snapshot::{Snapshot, SnapshotId, ZoneName};
use crate::state::audit::{Action, StepFacts};
use crate::text::{chain, printable};

/// The right to delete one snapshot: every copy that a policy requires is in hand.
///
/// Only [`leave`] makes it, and it takes values for that which only the archive can make.
#[derive(Debug)]
struct DeletePermit {
    _copies: Vec<VerifiedCopy>,
}

/// Deletes what the plan of a zone lets go; steps come back oldest first.
pub async fn prune(runner: &Runner, recorder: &Recorder, zone: &ZoneName, planned: &Planned) -> Vec<Step> {
    let snapshots = &planned.listed.inventory.snapshots;
    let mut going: Vec<(&Decision, &Snapshot)> = planned
        .plan
        .decisions
        .iter()
        .filter(|decision| decision.verdict == Verdict::Delete)
        .filter_map(|decision| Some((decision, snapshots.get(decision.index as usize)?)))
        .collect();
    going.sort_by_key(|(_, snapshot)| (snapshot.created_at, snapshot.id));
    let client = runner.client.zone(zone);
    let mut deletions: Vec<BoxFuture<'_, _>> = Vec::new();
    for (decision, snapshot) in going {
        let intent = StepFacts {
            rule: Some(decision.rule.as_str()),
            ..StepFacts::new(
                Action::Delete,
                zone,
                planned.listed.subject(snapshot),
                decision.reasons().map(|reason| reason.to_string()).collect(),
            )
        };
        let needed = decision.copies();
        let work = delete_if_unchanged(runner, &client, needed, snapshot, &planned.listed);
        deletions.push(recorder.step(intent, work).boxed());
    }
    stream::iter(deletions).buffered(runner.concurrency.get()).collect().await
}

async fn delete_if_unchanged(
    runner: &Runner,
    client: &ZoneClient,
    needed: &[CopyNeeded],
    planned: &Snapshot,
    listed: &Listing,
) -> Result<Done, StepError> {
    let leave = leave(needed, planned, listed)?;
    let Some(now) = client.get_snapshot(planned.id).await? else {
        return Ok(gone_already());
    };
    if let Some(difference) = difference(planned, &now.snapshot) {
        return Err(StepError::skipped(format!("it is not what was planned for any more: {difference}")));
    }
    // Last, so that a hold that comes while the API takes its time still counts.
    if let Some(held) = held(runner, planned.id).await? {
        return Err(StepError::skipped(held));
    }
    Ok(match delete(client, planned, leave).await.map_err(StepError::of_deletion)? {
        Deleted::Done(operation) => Done { operation_id: operation.id, ..Done::default() },
        Deleted::AlreadyGone => gone_already(),
    })
}

/// The one place that deletes a snapshot.
async fn delete(client: &ZoneClient, snapshot: &Snapshot, _leave: DeletePermit) -> Result<Deleted, ApiError> {
    client.delete_snapshot(snapshot.id).await
}

/// Collects the proofs that the plan says are needed.
fn leave(needed: &[CopyNeeded], snapshot: &Snapshot, listed: &Listing) -> Result<DeletePermit, StepError> {
    let mut copies = Vec::new();
    for needed in needed {
        let lacking = |why: &str| {
            StepError::skipped(format!(
                "archive {} can't prove the copy that a policy requires{why}",
                needed.archive
            ))
        };
        let catalogue = match listed.catalogues.get(&needed.archive) {
            Some(Ok(catalogue)) => catalogue,
            Some(Err(reason)) => return Err(lacking(&format!(": {reason}"))),
            None => return Err(lacking("")),
        };
        copies.push(catalogue.proof(snapshot, needed.of).ok_or_else(|| lacking(""))?);
    }
    Ok(DeletePermit { _copies: copies })
}

/// Why it must stay, if somebody pinned it since the plan was made.
async fn held(runner: &Runner, snapshot: SnapshotId) -> Result<Option<String>, StepError> {
    let holds = runner.state.holds().await.map_err(|error| {
        StepError::failed(format!("not deleted, since it can't be told what is held: {}", chain(&error)))
    })?;
    Ok(holds.on(snapshot, runner.clock.now()).map(|hold| {
        let until = hold.until.map_or_else(String::new, |until| format!(" until {until}"));
        let reason =
            hold.reason.as_deref().map_or_else(String::new, |reason| format!(": {}", printable(reason)));
        format!("it has been pinned meanwhile{until}{reason}")
    }))
}

/// What a decision may have rested on, and is otherwise by now.
fn difference(planned: &Snapshot, now: &Snapshot) -> Option<String> {
    if planned.state != now.state {
        let [was, is] = [planned, now].map(|snapshot| printable(snapshot.state.as_str()));
        Some(format!("its state was `{was}` and is `{is}`"))
    } else if planned.created_at != now.created_at {
        Some(format!("it was taken at {} and now says {}", planned.created_at, now.created_at))
    } else if planned.name != now.name {
        Some(format!("its name was `{}` and is `{}`", printable(&planned.name), printable(&now.name)))
    } else if planned.instance_id != now.instance_id {
        Some("it is another instance's now".to_owned())
    } else {
        None
    }
}

fn gone_already() -> Done {
    Done { message: Some("it was gone already".to_owned()), ..Done::default() }
}
