//! `keep_within_hourly = "2d"`, `keep_within_daily`, `keep_within_weekly`, `keep_within_monthly`, `keep_within_yearly`: of
//! each hour, day, week, month or year, the newest one is kept while it is not older than that.
//!
//! With `keep_oldest`, the oldest of all is kept as well, likewise.

use jiff::Timestamp;

use crate::policy::Period;
use crate::retention::age::AgeTable;
use crate::retention::reason::Reason;
use crate::retention::rules::candidate::Candidate;
use crate::retention::verdict::Rule;

pub(crate) fn keep_newest_of_each_within(
    newest_first: &mut [Candidate],
    period: Period,
    age: &mut AgeTable,
    keep_oldest: bool,
    now: Timestamp,
) {
    let rule = Rule::KeepWithinEach(period);
    let last = newest_first.len().saturating_sub(1);
    // The period before, and when its newest one was created.
    let mut current: Option<(i32, i64)> = None;
    for (index, candidate) in newest_first.iter_mut().enumerate() {
        let number = candidate.periods.number(period);
        let newer = current.filter(|(current, _)| *current == number);
        if newer.is_none() {
            current = Some((number, candidate.created_at.as_second()));
        }
        let end = age.end(candidate.created_at, candidate.periods.day());
        if now > end {
            candidate.pass_over(Reason::TooOld(age.limit.clone()));
        } else if newer.is_none() {
            let reason = Reason::NewestWithin { period, number, limit: age.limit.clone() };
            candidate.keep(rule, end, reason);
        } else if keep_oldest && index == last {
            candidate.keep(rule, end, Reason::Oldest(rule));
        } else if let Some((_, newest)) = newer {
            candidate.pass_over(Reason::NotNewestOf { rule, newest });
        }
    }
}
