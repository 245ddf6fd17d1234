//! Asynchronous operations: waiting until what was started has ended.
//!
//! The API answers with an operation at once, `pending` or already ended, and the operation is polled until its state
//! says how it ended. The vendor's own Go client takes any first state but `pending` for success; here the state
//! is read wherever it stands. Giving up does not stop an operation: it may still go on.

use std::time::Duration;

use crate::exoscale::client::{ApiRequest, FailedAttempt, ZoneClient};
use crate::exoscale::error::{ApiError, ErrorKind, is_busy_message, safe_message};
use crate::exoscale::wire::{self, Operation, RawOperation};
use crate::retry::{Attempts, LONGEST_PAUSE, REQUESTS};
use crate::snapshot::OperationId;

/// Until this time after its start an operation is polled at the first interval; then the waits grow.
const STEADY_UNTIL: Duration = Duration::from_secs(30);

/// From this time on the waits grow no more.
const GROWN_AT: Duration = Duration::from_mins(15);

/// The wait before the next poll of an operation that has run for `elapsed`.
///
/// `first` for 30 s, then growing evenly to 60 s at 15 min, then 60 s: as the vendor's clients do with 3 s
/// (egoscale v3 `pollInterval`; Python `exoscale` 0.16).
fn poll_wait(first: Duration, elapsed: Duration) -> Duration {
    let grown = elapsed.saturating_sub(STEADY_UNTIL).as_secs_f64()
        / GROWN_AT.saturating_sub(STEADY_UNTIL).as_secs_f64();
    first + LONGEST_PAUSE.saturating_sub(first).mul_f64(grown.min(1.0))
}

impl ZoneClient {
    /// Waits until the operation in the response `first` has ended.
    pub(super) async fn settle(
        &self,
        operation: &'static str,
        first: RawOperation,
    ) -> Result<Operation, ApiError> {
        let settings = self.settings();
        let begun = self.clock().elapsed();
        let started = first.id;
        let mut reference = first.reference();
        if let Some(ended) = self.ended(operation, &first, started) {
            return ended.map_err(|error| error.with_reference(reference));
        }
        let Some(id) = started else {
            return Err(ApiError::new(self.zone(), operation, ErrorKind::Malformed)
                .with_detail("a pending operation without an id".to_owned())
                .perhaps_carried_out(true));
        };

        let path_id = id.to_string();
        let path = ["operation", path_id.as_str()];
        let poll = ApiRequest::get("get-operation", &path);
        let mut seen = false;
        let mut attempts = Attempts::new(REQUESTS);
        let mut asked = Duration::ZERO;
        loop {
            let elapsed = self.clock().elapsed().saturating_sub(begun);
            let Some(left) = settings.operation_timeout.checked_sub(elapsed).filter(|left| !left.is_zero())
            else {
                let said = format!("still pending after {} s", settings.operation_timeout.as_secs());
                let error = ApiError::new(self.zone(), operation, ErrorKind::OperationTimedOut);
                return Err(unsettled(error.with_detail(said), id).with_reference(reference));
            };
            let wait = poll_wait(settings.poll_interval, elapsed)
                .max(asked)
                .min(LONGEST_PAUSE.max(settings.poll_interval));
            self.clock().sleep(wait.min(left)).await;

            match self.poll(&poll).await {
                Ok(response) => {
                    attempts.reset();
                    (seen, asked) = (true, Duration::ZERO);
                    reference = response.reference().or(reference);
                    if let Some(ended) = self.ended(operation, &response, started) {
                        return ended.map_err(|error| error.with_reference(reference));
                    }
                }
                Err(failed) => {
                    attempts.count_failure();
                    // A fresh operation is not known everywhere at once.
                    let fresh = !seen && failed.error.kind() == ErrorKind::NotFound;
                    if attempts.are_exhausted() || !(failed.is_transient || fresh) {
                        let error = unsettled(failed.error.after(attempts.failed()), id);
                        return Err(error.with_reference(reference));
                    }
                    self.retried("get-operation", failed.error.kind());
                    asked = failed.retry_after.unwrap_or_default();
                }
            }
        }
    }

    async fn poll(&self, request: &ApiRequest<'_>) -> Result<RawOperation, FailedAttempt> {
        let (body, _) = self.send_once(request).await?;
        // Most likely an error page of the edge, and transient.
        wire::decode_operation(&body)
            .map_err(|source| FailedAttempt::transient(self.malformed(request, source), false))
    }

    /// How the operation ended; `None` while it is pending.
    fn ended(
        &self,
        operation: &'static str,
        response: &RawOperation,
        started: Option<OperationId>,
    ) -> Option<Result<Operation, ApiError>> {
        let error = |kind, said: String, perhaps| {
            let error = ApiError::new(self.zone(), operation, kind).in_operation(started.or(response.id));
            Some(Err(error.with_detail(said).perhaps_carried_out(perhaps)))
        };
        let said = [("state", &response.state), ("reason", &response.reason), ("message", &response.message)]
            .into_iter()
            .filter(|(_, text)| !text.is_empty())
            .map(|(name, text)| format!("{name} `{}`", safe_message(text)))
            .collect::<Vec<_>>()
            .join(", ");
        match response.state.as_str() {
            "success" => {
                let reference = response.reference();
                Some(Ok(Operation { id: started.or(response.id), reference }))
            }
            "pending" => None,
            "failure" => {
                let kind = match response.reason.as_str() {
                    "busy" | "conflict" => ErrorKind::Conflict,
                    _ if is_busy_message(&response.message) => ErrorKind::Conflict,
                    _ => ErrorKind::OperationFailed,
                };
                let perhaps = matches!(response.reason.as_str(), "partial" | "interrupted" | "unknown");
                error(kind, said, perhaps)
            }
            // The platform gave up on it.
            "timeout" => error(ErrorKind::OperationTimedOut, said, true),
            _ => error(ErrorKind::OperationUnknown, said, true),
        }
    }
}

/// An operation that was started, and whose end is not known.
fn unsettled(error: ApiError, id: OperationId) -> ApiError {
    error.in_operation(Some(id)).perhaps_carried_out(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exoscale::testing::{Script, Step, ok, status};
    use crate::snapshot::SnapshotId;
    use crate::text::chain;
    use crate::transport::Reached;

    const ID: &str = "e2047130-b86e-11ef-83b3-0d8312b2c2d7";

    fn in_state(state: &str) -> Step {
        ok(format!(r#"{{"id":"{ID}","state":"{state}"}}"#))
    }

    /// An export that meets these steps, and when its requests were sent.
    async fn export(steps: impl IntoIterator<Item = Step>) -> (Result<Operation, ApiError>, Vec<u64>) {
        let (zone, script) = Script::play(steps);
        let snapshot: SnapshotId = "b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105".parse().unwrap();
        let outcome = zone.export_snapshot(snapshot).await;
        for sent in script.sent().iter().skip(1) {
            assert_eq!(sent.url, format!("https://api-ch-gva-2.example/v2/operation/{ID}"));
        }
        (outcome, script.seconds())
    }

    #[tokio::test(start_paused = true)]
    async fn an_operation_settled_in_the_first_answer_is_not_asked_for() {
        let (outcome, seconds) = export([in_state("success")]).await;
        assert_eq!(outcome.unwrap(), Operation { id: Some(ID.parse().unwrap()), reference: None });
        assert_eq!(seconds, [0]);
        let (outcome, _) = export([ok(r#"{"state":"success"}"#)]).await;
        assert_eq!(outcome.unwrap(), Operation { id: None, reference: None });
    }

    #[tokio::test(start_paused = true)]
    async fn a_pending_operation_is_asked_for_until_it_ends() {
        let (outcome, seconds) =
            export([in_state("pending"), in_state("pending"), in_state("pending"), in_state("success")])
                .await;
        assert_eq!(outcome.unwrap().id, Some(ID.parse().unwrap()));
        assert_eq!(seconds, [0, 3, 6, 9]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_bad_end_is_an_error_with_reason_and_message_wherever_it_stands() {
        let end = |state: &str, reason: &str, message: &str| {
            ok(serde_json::json!({ "id": ID, "state": state, "reason": reason, "message": message })
                .to_string())
        };
        let cases = [
            (end("failure", "fault", "disk\u{1b}"), ErrorKind::OperationFailed, false),
            (end("failure", "interrupted", ""), ErrorKind::OperationFailed, true),
            (end("failure", "busy", ""), ErrorKind::Conflict, false),
            (end("failure", "conflict", ""), ErrorKind::Conflict, false),
            (end("failure", "incorrect", "the snapshot is in use"), ErrorKind::Conflict, false),
            (end("timeout", "", ""), ErrorKind::OperationTimedOut, true),
            (end("paused", "", ""), ErrorKind::OperationUnknown, true),
            (end("", "", ""), ErrorKind::OperationUnknown, true),
            (ok("{}"), ErrorKind::OperationUnknown, true),
        ];
        for (step, kind, perhaps) in cases {
            for steps in [vec![step.clone()], vec![in_state("pending"), step.clone()]] {
                let error = export(steps).await.0.unwrap_err();
                assert_eq!((error.kind(), error.may_have_happened()), (kind, perhaps), "{step:?}");
                assert_eq!(error.operation(), "export-snapshot");
            }
        }
        let error = export([end("failure", "fault", "disk\u{1b} https://x/y?sig=hush")]).await.0.unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "`export-snapshot` in zone ch-gva-2, operation {ID}: the operation failed (state `failure`, \
                 reason `fault`, message `disk\\u{{1b}} https://x/y?…`)"
            )
        );
        assert_eq!(error.operation_id(), Some(ID.parse().unwrap()));
    }

    #[tokio::test(start_paused = true)]
    async fn an_operation_that_does_not_end_is_given_up_and_may_have_happened() {
        let (outcome, seconds) = export(vec![in_state("pending"); 200]).await;
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OperationTimedOut);
        assert!(error.may_have_happened());
        assert!(chain(&error).contains("still pending after 3600 s"), "{error}");
        // The last look is at the very end.
        assert_eq!(seconds.last(), Some(&3600));
        let longest = seconds.windows(2).map(|pair| pair[1] - pair[0]).max();
        assert!(longest <= Some(61) && seconds.len() < 130, "{seconds:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_fresh_operation_may_be_unknown_for_a_moment() {
        let unknown = || status(404, "not found");
        let (outcome, _) = export([in_state("pending"), unknown(), unknown(), in_state("success")]).await;
        outcome.unwrap();
        let (outcome, seconds) = export([vec![in_state("pending")], vec![unknown(); 5]].concat()).await;
        let error = outcome.unwrap_err();
        assert_eq!((error.kind(), error.operation()), (ErrorKind::NotFound, "get-operation"));
        assert!(error.may_have_happened());
        assert_eq!(seconds.len(), 6);
        // Once seen, it does not vanish by being fresh.
        let (outcome, _) = export([in_state("pending"), in_state("pending"), unknown()]).await;
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[tokio::test(start_paused = true)]
    async fn a_deletion_is_not_done_because_its_operation_is_not_found() {
        let steps = [vec![ok(format!(r#"{{"id":"{ID}","state":"pending"}}"#))], vec![status(404, ""); 5]];
        let (zone, _) = Script::play(steps.concat());
        let error = zone.delete_snapshot(SnapshotId(uuid::Uuid::nil())).await.unwrap_err();
        assert!(error.may_have_happened());
        assert_eq!(error.operation_id(), Some(ID.parse().unwrap()));
    }

    #[tokio::test(start_paused = true)]
    async fn polls_are_given_up_after_five_errors_in_a_row() {
        let errors = [
            status(500, "oops"),
            status(429, ""),
            Step::Lost(Reached::Nothing),
            Step::Cut("{"),
            ok("<html>"),
        ];
        let four = errors[..4].to_vec();
        // Progress in between begins the count anew.
        let steps = [
            vec![in_state("pending")],
            four.clone(),
            vec![in_state("pending")],
            four,
            vec![in_state("success")],
        ]
        .concat();
        export(steps).await.0.unwrap();
        let (outcome, seconds) = export([vec![in_state("pending")], errors.to_vec()].concat()).await;
        let error = outcome.unwrap_err();
        assert_eq!((error.kind(), error.operation()), (ErrorKind::Malformed, "get-operation"));
        assert!(error.may_have_happened());
        assert_eq!(seconds, [0, 3, 6, 9, 12, 15]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_poll_that_is_refused_ends_the_wait_at_once() {
        let (outcome, seconds) =
            export([in_state("pending"), status(403, "Forbidden by role policy for compute")]).await;
        let error = outcome.unwrap_err();
        assert_eq!((error.kind(), error.operation()), (ErrorKind::Permission, "get-operation"));
        assert!(error.to_string().contains("allow `get-operation`"), "{error}");
        assert_eq!(seconds, [0, 3]);
    }

    #[test]
    fn polls_are_steady_for_30_s_then_slow_down_evenly_until_15_min() {
        let wait = |elapsed| poll_wait(Duration::from_secs(3), Duration::from_secs(elapsed)).as_secs_f64();
        for (elapsed, seconds) in
            [(0, 3.0), (30, 3.0), (465, 31.5), (900, 60.0), (901, 60.0), (1_000_000, 60.0)]
        {
            assert!((wait(elapsed) - seconds).abs() < 1e-6, "{elapsed}: {}", wait(elapsed));
        }
        let slow = Duration::from_secs(90);
        assert_eq!(poll_wait(slow, GROWN_AT), slow);
    }
}
