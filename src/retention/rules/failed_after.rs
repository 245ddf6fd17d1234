//! `failed_after = "2d"`: failed snapshots that are older are deleted, once a newer good one exists.

use jiff::Timestamp;

use crate::retention::age::AgeTable;
use crate::retention::reason::Reason;

/// The reason, and the last instant at which the snapshot is kept if no other one comes.
pub(crate) fn failed_after(
    age: &AgeTable,
    created_at: Timestamp,
    has_newer_good: bool,
    now: Timestamp,
) -> (Reason, Timestamp) {
    let end = age.limit.end(created_at);
    if !has_newer_good {
        (Reason::FailedLast, Timestamp::MAX)
    } else if now > end {
        (Reason::Failed(age.limit.clone()), end)
    } else {
        (Reason::FailedYoung(age.limit.clone()), end)
    }
}
