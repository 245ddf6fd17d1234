//! Deletes what a plan says, oldest first. Just before each deletion, the snapshot and the holds are read again.

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _};

use crate::archive::proof::VerifiedCopy;
use crate::exoscale::client::ZoneClient;
use crate::exoscale::error::ApiError;
use crate::exoscale::wire::Deleted;
use crate::retention::verdict::{CopyNeeded, Verdict};
use crate::run::archive_presence::{is_in_doubt, is_still_there};
use crate::run::context::Runner;
use crate::run::list::Listing;
use crate::run::plan::ZonePlan;
use crate::run::report::Step;
use crate::run::step::{Done, Recorder, StepError};
use crate::snapshot::{Snapshot, SnapshotId};
use crate::state::audit::{Action, StepFacts};
use crate::text::{chain, printable};

/// The right to delete one snapshot: every copy that a policy requires is there.
///
/// Only [`permit`] makes one, and it takes a [`VerifiedCopy`] for each, which only the archive can make.
#[derive(Debug)]
struct DeletePermit {
    _copies: Vec<VerifiedCopy>,
}

/// Deletes what the plan of a zone says; the steps are oldest first.
pub(crate) async fn delete_snapshots(runner: &Runner, recorder: &Recorder, plan: &ZonePlan) -> Vec<Step> {
    let mut doomed: Vec<_> =
        plan.decided().filter(|(decision, _)| decision.verdict == Verdict::Delete).collect();
    doomed.sort_by_key(|(_, snapshot)| (snapshot.created_at, snapshot.id));
    let client = runner.client.zone(plan.zone());
    let mut deletions: Vec<BoxFuture<'_, _>> = Vec::new();
    for (decision, snapshot) in doomed {
        let reasons = decision.reasons().map(|reason| reason.to_string()).collect();
        let subject = plan.listing.subject(snapshot);
        let intent = StepFacts {
            rule: Some(decision.rule.as_str()),
            ..StepFacts::new(Action::Delete, plan.zone(), subject, reasons)
        };
        let needed = decision.copies();
        let work = delete_if_unchanged(runner, recorder, &client, needed, snapshot, &plan.listing);
        deletions.push(recorder.step(intent, work).boxed());
    }
    stream::iter(deletions).buffered(runner.concurrency.get()).collect().await
}

async fn delete_if_unchanged(
    runner: &Runner,
    recorder: &Recorder,
    client: &ZoneClient,
    needed: &[CopyNeeded],
    planned: &Snapshot,
    listing: &Listing,
) -> Result<Done, StepError> {
    let permit = permit(runner, needed, planned, listing).await?;
    let Some(now) = client.get_snapshot(planned.id).await? else {
        return Ok(already_deleted());
    };
    if let Some(lacking) = lacking(planned, &now.snapshot) {
        return Err(StepError::blocked(format!(
            "reading it again did not give {lacking}, which the listing had: whether it has changed is unknown"
        )));
    }
    if let Some(difference) = difference(planned, &now.snapshot) {
        return Err(StepError::skipped(format!("it has changed since the plan: {difference}")));
    }
    // Last, so that a hold or a pause placed while the API answers still counts.
    if let Some(held) = held(runner, planned.id).await? {
        return Err(StepError::skipped(held));
    }
    let refusal = recorder.refusal(Action::Delete).await.map_err(|error| {
        let error = chain(&error);
        StepError::failed(format!("not deleted, since whether policies were paused cannot be read: {error}"))
    })?;
    if let Some(refusal) = refusal {
        return Err(StepError::skipped(refusal));
    }
    Ok(match delete(client, planned, permit).await.map_err(StepError::of_deletion)? {
        Deleted::Done(operation) => {
            let operation_id = operation.id;
            check_deleted(client, planned).await.map_err(|error| StepError { operation_id, ..error })?;
            Done { operation_id, ..Done::default() }
        }
        Deleted::AlreadyGone => already_deleted(),
    })
}

/// An API that reports success and deletes nothing would otherwise be believed every night.
async fn check_deleted(client: &ZoneClient, planned: &Snapshot) -> Result<(), StepError> {
    match client.get_snapshot(planned.id).await {
        Ok(Some(still)) if still.snapshot.state.is_good() || still.snapshot.state == planned.state => {
            Err(StepError::blocked("the API reported success, but the snapshot is still there"))
        }
        // The operation has ended well; the next listing shows the rest.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// The one place that deletes a snapshot.
async fn delete(
    client: &ZoneClient,
    snapshot: &Snapshot,
    _permit: DeletePermit,
) -> Result<Deleted, ApiError> {
    client.delete_snapshot(snapshot.id).await
}

/// Collects the copies that the plan says are needed, if they are there at this moment: since the listing the archive may
/// have vanished, or a write to it may have failed, or a verification may have found them corrupt.
async fn permit(
    runner: &Runner,
    needed: &[CopyNeeded],
    snapshot: &Snapshot,
    listing: &Listing,
) -> Result<DeletePermit, StepError> {
    let mut copies = Vec::new();
    for needed in needed {
        let blocked = |blocked_by, why: &str| {
            let message =
                format!("archive {} has no verified copy, which a policy requires{why}", needed.archive);
            StepError { blocked_by: Some(blocked_by), ..StepError::blocked(message) }
        };
        let closed = |why: String| blocked("archive", &format!(": {why}"));
        let lacking = || blocked("export", "");
        let catalogue = match listing.catalogues.get(&needed.archive) {
            Some(Ok(catalogue)) => catalogue,
            Some(Err(reason)) => return Err(closed(reason.clone())),
            None => return Err(lacking()),
        };
        let archive = runner.archives.get(&needed.archive).ok_or_else(lacking)?;
        is_still_there(archive, catalogue).await.map_err(closed)?;
        let doubts = runner.state.doubts(&needed.archive).await.map_err(|error| closed(chain(&error)))?;
        if let Some(why) = &doubts.write_failure {
            return Err(closed(format!("the last write to it failed: {why}")));
        }
        let (copy, intact) = catalogue.evidence(snapshot, needed.of, needed.or_since).ok_or_else(lacking)?;
        for copy in [copy, intact] {
            if is_in_doubt(&doubts, copy, runner.clock.now()) {
                return Err(blocked("export", ": it was found corrupt since the plan"));
            }
            if !archive.has(copy).await.map_err(|error| closed(chain(&error)))? {
                return Err(blocked("export", ": it vanished since the plan"));
            }
        }
        let proof = catalogue.proof_or_since(snapshot, needed.of, needed.or_since);
        copies.push(proof.ok_or_else(lacking)?);
    }
    Ok(DeletePermit { _copies: copies })
}

/// Why it must be kept, if it is on hold by now.
async fn held(runner: &Runner, snapshot: SnapshotId) -> Result<Option<String>, StepError> {
    let holds = runner.state.holds().await.map_err(|error| {
        StepError::failed(format!("not deleted, since the holds cannot be read: {}", chain(&error)))
    })?;
    Ok(holds.on(snapshot, runner.clock.now()).map(|hold| {
        let until = hold.until.map_or_else(String::new, |until| format!(" until {until}"));
        let reason =
            hold.reason.as_deref().map_or_else(String::new, |reason| format!(": {}", printable(reason)));
        format!("it has been put on hold since the plan{until}{reason}")
    }))
}

/// The first fact that the plan knew and that is missing now.
fn lacking(planned: &Snapshot, now: &Snapshot) -> Option<&'static str> {
    if now.name.is_empty() && !planned.name.is_empty() {
        Some("its name")
    } else if now.instance_id.is_none() && planned.instance_id.is_some() {
        Some("its instance")
    } else {
        None
    }
}

/// The first fact that a decision may depend on and that is different by now.
fn difference(planned: &Snapshot, now: &Snapshot) -> Option<String> {
    if planned.state != now.state {
        let [was, is] = [planned, now].map(|snapshot| printable(snapshot.state.as_str()));
        Some(format!("its state was `{was}` and is `{is}`"))
    } else if planned.created_at != now.created_at {
        Some(format!("it was taken at {} and now says {}", planned.created_at, now.created_at))
    } else if planned.name != now.name {
        Some(format!("its name was `{}` and is `{}`", printable(&planned.name), printable(&now.name)))
    } else if planned.instance_id != now.instance_id {
        Some("it belongs to another instance now".to_owned())
    } else if planned.application_consistent != Some(true) && now.application_consistent == Some(true) {
        Some("it is said to be application-consistent now".to_owned())
    } else {
        None
    }
}

fn already_deleted() -> Done {
    Done { message: Some("it was already deleted".to_owned()), ..Done::default() }
}

#[cfg(test)]
mod tests {
    use jiff::{SignedDuration, Timestamp};
    use uuid::Uuid;

    use super::*;
    use crate::snapshot::{InstanceId, SnapshotState};

    #[test]
    fn every_fact_that_a_decision_may_depend_on_is_compared() {
        let planned = Snapshot {
            id: SnapshotId(Uuid::from_u128(1)),
            name: "a".into(),
            created_at: Timestamp::UNIX_EPOCH,
            state: SnapshotState::Exported,
            size_gib: Some(10),
            application_consistent: None,
            instance_id: Some(InstanceId(Uuid::from_u128(2))),
        };
        assert_eq!(difference(&planned, &planned), None);
        let later = planned.created_at + SignedDuration::from_secs(1);
        for (word, now) in [
            ("state", Snapshot { state: SnapshotState::Ready, ..planned.clone() }),
            ("taken", Snapshot { created_at: later, ..planned.clone() }),
            ("name", Snapshot { name: "b".into(), ..planned.clone() }),
            ("instance", Snapshot { instance_id: Some(InstanceId(Uuid::nil())), ..planned.clone() }),
            ("consistent", Snapshot { application_consistent: Some(true), ..planned.clone() }),
        ] {
            let difference = difference(&planned, &now).unwrap_or_default();
            assert!(difference.contains(word), "{word}: {difference}");
        }
        for (word, now) in [
            ("name", Snapshot { name: "".into(), ..planned.clone() }),
            ("instance", Snapshot { instance_id: None, ..planned.clone() }),
        ] {
            assert!(lacking(&planned, &now).is_some_and(|lacking| lacking.contains(word)), "{word}");
        }
        assert_eq!(lacking(&planned, &planned), None);
    }
}
