//! The limits, which delete even what keep rules keep, and `min_keep` and `min_keep_consistent`, which keep even what
//! limits delete.

use std::num::NonZeroU32;

use jiff::Timestamp;

use crate::retention::age::AgeTable;
use crate::retention::reason::Reason;
use crate::retention::rules::candidate::{Candidate, Opinion};
use crate::retention::verdict::Rule;

/// `max_age = "400d"`: those that are older are deleted.
pub(crate) fn max_age(newest_first: &mut [Candidate], age: &mut AgeTable, now: Timestamp) {
    for candidate in newest_first {
        let end = age.end(candidate.created_at, candidate.periods.day());
        candidate.kept_until = candidate.kept_until.min(end);
        if now > end {
            let reason = Reason::TooOld(age.limit.clone());
            if candidate.is_kept() {
                candidate.delete(Rule::MaxAge, reason);
            } else {
                candidate.pass_over(reason);
            }
        }
    }
}

/// `max_count = N`: of those still kept, all but the newest N are deleted.
pub(crate) fn max_count(newest_first: &mut [Candidate], max: NonZeroU32) {
    let kept = newest_first.iter_mut().filter(|candidate| candidate.is_kept());
    for (place, candidate) in (1..).zip(kept) {
        if place > max.get() {
            candidate.delete(Rule::MaxCount, Reason::TooMany { place, max: max.get() });
        }
    }
}

/// `min_keep = N`: the newest N are kept, whatever the rules say.
pub(crate) fn min_keep(newest_first: &mut [Candidate], count: u32) {
    for (place, candidate) in (1..=count).zip(newest_first) {
        keep_always(candidate, Rule::MinKeep, Reason::MinKeep { place, of: count });
    }
}

/// `min_keep_consistent = N`: the newest N that are application-consistent are kept, whatever the rules say.
pub(crate) fn min_keep_consistent(newest_first: &mut [Candidate], count: u32) {
    let consistent = newest_first.iter_mut().filter(|candidate| candidate.is_consistent);
    for (place, candidate) in (1..=count).zip(consistent) {
        keep_always(candidate, Rule::MinKeepConsistent, Reason::MinKeepConsistent { place, of: count });
    }
}

fn keep_always(candidate: &mut Candidate, rule: Rule, reason: Reason) {
    match candidate.opinion {
        // Before the word that it would be deleted otherwise.
        Opinion::Keeps(Rule::MinKeep) => candidate.reasons.insert(1, reason),
        Opinion::Keeps(_) => candidate.reasons.push(reason),
        _ => {
            candidate.opinion = Opinion::Keeps(rule);
            candidate.reasons.splice(0..0, [reason, Reason::OtherwiseDeleted]);
        }
    }
}
