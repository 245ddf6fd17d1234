//! `keep_within = "14d"`: those that are not older are kept.

use jiff::Timestamp;

use crate::retention::age::AgeTable;
use crate::retention::reason::Reason;
use crate::retention::rules::candidate::Candidate;
use crate::retention::verdict::Rule;

pub(crate) fn keep_within(newest_first: &mut [Candidate], age: &mut AgeTable, now: Timestamp) {
    for candidate in newest_first {
        let end = age.end(candidate.created_at, candidate.periods.day());
        if now > end {
            candidate.pass_over(Reason::TooOld(age.limit.clone()));
        } else {
            candidate.keep(Rule::KeepWithin, end, Reason::Within(age.limit.clone()));
        }
    }
}
