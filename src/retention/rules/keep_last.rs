//! `keep_last = N`: the newest N are kept.

use jiff::Timestamp;

use crate::policy::Count;
use crate::retention::reason::Reason;
use crate::retention::rules::candidate::Candidate;
use crate::retention::verdict::Rule;

pub(crate) fn keep_last(newest_first: &mut [Candidate], count: Count) {
    for (place, candidate) in (1..).zip(newest_first) {
        if count.has_place(place) {
            candidate.keep(Rule::KeepLast, Timestamp::MAX, Reason::Last { place, of: count });
        } else {
            candidate.pass_over(Reason::NotLast { place, of: count });
        }
    }
}
