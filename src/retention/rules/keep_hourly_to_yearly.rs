//! `keep_hourly = N`, `keep_daily`, `keep_weekly`, `keep_monthly`, `keep_yearly`: of the last N hours, days, weeks, months
//! or years that have a snapshot, the newest one each is kept.
//!
//! Periods without a snapshot use no slot. With `keep_oldest`, the oldest of all is kept as well while a slot is left:
//! it grows into the oldest period that the rule asks for.

use jiff::Timestamp;

use crate::policy::{Count, Period};
use crate::retention::reason::Reason;
use crate::retention::rules::candidate::Candidate;
use crate::retention::verdict::Rule;

pub(crate) fn keep_newest_of_each(
    newest_first: &mut [Candidate],
    period: Period,
    slots: Count,
    keep_oldest: bool,
) {
    let rule = Rule::KeepEach(period);
    let last = newest_first.len().saturating_sub(1);
    let mut used = 0;
    // The period before, and when its newest one was created, if that is kept.
    let mut current: Option<(i32, Option<i64>)> = None;
    for (index, candidate) in newest_first.iter_mut().enumerate() {
        let number = candidate.periods.number(period);
        let newer = current.filter(|(current, _)| *current == number);
        let has_slot = slots.has_place(used + 1);
        if newer.is_none() {
            current = Some((number, has_slot.then(|| candidate.created_at.as_second())));
        }
        if newer.is_none() && has_slot {
            used += 1;
            let reason = Reason::NewestOf { period, number, place: used, of: slots };
            candidate.keep(rule, Timestamp::MAX, reason);
        } else if keep_oldest && index == last && has_slot {
            candidate.keep(rule, Timestamp::MAX, Reason::Oldest(rule));
        } else if let Some((_, Some(newest))) = newer {
            candidate.pass_over(Reason::NotNewestOf { rule, newest });
        } else {
            candidate.pass_over(Reason::NoSlot { period, slots });
        }
    }
}
