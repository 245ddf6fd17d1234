//! When the rules keep a snapshot, from now on: until it is too old for all of them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use jiff::Timestamp;

use crate::policy::Retention;
use crate::retention::expiry::{ALWAYS, NEVER, first_second_after};
use crate::retention::rules::candidate::Candidate;

/// The seconds during which each snapshot of an instance is kept, newest first, if no other one comes.
///
/// Beyond `max_count` a snapshot is kept again once enough newer ones are not kept any more. That matters where something
/// else keeps it in the meantime.
pub(crate) fn kept_during(newest_first: &[Candidate], table: &Retention) -> impl Iterator<Item = Range<i64>> {
    let (max_count, min_keep, min_keep_consistent) =
        (table.max_count, table.min_keep, table.min_keep_consistent);
    let mut consistent = 0;
    let max = max_count.map_or(usize::MAX, |max| max.get() as usize);
    // The ends of those newer ones that are kept longest, at most `max` of them: the first to end frees a place.
    let mut newer: BinaryHeap<Reverse<Timestamp>> = BinaryHeap::new();
    (1..).zip(newest_first).map(move |(place, candidate)| {
        let until = candidate.kept_until;
        let room_from = match newer.peek() {
            Some(Reverse(first)) if newer.len() >= max => first_second_after(*first),
            _ => i64::MIN,
        };
        if max_count.is_some() {
            newer.push(Reverse(until));
            if newer.len() > max {
                newer.pop();
            }
        }
        consistent += u32::from(candidate.is_consistent);
        match place <= min_keep || candidate.is_consistent && consistent <= min_keep_consistent {
            true => ALWAYS,
            false if until == Timestamp::MIN => NEVER,
            false => room_from..first_second_after(until),
        }
    })
}
