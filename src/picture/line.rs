//! A timeline in one line of text: when snapshots were taken, and the decision about each.
//!
//! ```text
//! 2026-07-31 x---x---%---#---#---##########o--+ 2026-11-24
//! ```
//!
//! Time runs evenly from left to right, so that gaps look like gaps. Where several snapshots share a column,
//! those to keep and to delete are shown rather than those that are ignored.

use std::collections::BTreeSet;

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// The meaning of the signs.
pub const LEGEND: &str = "# keep  x delete  % keep and delete  o ignore  + to be taken  - none";

/// The decision about a snapshot. Where several share a column, the last of them in this order is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// No policy decides about it.
    Ignore,
    /// It does not exist yet, and will be taken.
    ToBeTaken,
    /// It is kept.
    Keep,
    /// It is deleted.
    Delete,
}

/// The line, of `width` characters at most. `marks` are the snapshots: when each was taken, and the decision about it.
/// The line reaches from the oldest mark to `until`, or to the newest mark if that is later, with the dates of both ends
/// where they fit. Without marks it is empty.
pub fn line(marks: &[(Timestamp, Fate)], until: Timestamp, width: usize) -> String {
    let taken = || marks.iter().map(|(at, _)| *at);
    let (Some(first), Some(last)) = (taken().min(), taken().max()) else { return String::new() };
    let last = last.max(until);
    let (left, right) = (date(first), date(last));
    // With fewer than ten columns between them the dates would say more than the line.
    let beside = left.len() + right.len() + 2;
    let has_dates = width >= beside + 10;
    let columns = columns(marks, first, last, if has_dates { width - beside } else { width });
    if has_dates { format!("{left} {columns} {right}") } else { columns }
}

fn columns(marks: &[(Timestamp, Fate)], first: Timestamp, last: Timestamp, count: usize) -> String {
    let mut columns = vec![BTreeSet::new(); count];
    let nanoseconds = |at: Timestamp| at.as_nanosecond() - first.as_nanosecond();
    let whole = nanoseconds(last).max(1);
    for (at, fate) in marks {
        // To the nearest column, so that each end is one.
        let steps = i128::try_from(count).unwrap_or(i128::MAX).saturating_sub(1);
        let column = (nanoseconds(*at).saturating_mul(steps).saturating_mul(2) + whole) / (whole * 2);
        if let Some(fates) = usize::try_from(column).ok().and_then(|column| columns.get_mut(column)) {
            fates.insert(*fate);
        }
    }
    columns.iter().map(sign).collect()
}

fn sign(fates: &BTreeSet<Fate>) -> char {
    match fates.last() {
        None => '-',
        Some(Fate::Ignore) => 'o',
        Some(Fate::ToBeTaken) => '+',
        Some(Fate::Keep) => '#',
        Some(Fate::Delete) if fates.contains(&Fate::Keep) => '%',
        Some(Fate::Delete) => 'x',
    }
}

/// The day in UTC, like all times.
pub(crate) fn date(at: Timestamp) -> String {
    TimeZone::UTC.to_datetime(at).date().to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: &str = "2026-11-21T00:00:00Z";

    fn now() -> Timestamp {
        NOW.parse().unwrap()
    }

    fn mark(days_ago: i64, fate: Fate) -> (Timestamp, Fate) {
        (now() - jiff::SignedDuration::from_hours(24 * days_ago), fate)
    }

    #[test]
    fn time_runs_evenly_from_the_oldest_to_now() {
        let marks = [
            mark(20, Fate::Delete),
            mark(15, Fate::Delete),
            mark(10, Fate::Keep),
            mark(2, Fate::Keep),
            mark(1, Fate::Ignore),
            mark(0, Fate::ToBeTaken),
        ];
        assert_eq!(line(&marks, now(), 43), "2026-11-01 x----x----#-------#o+ 2026-11-21");
        // The order of the marks does not matter.
        let turned: Vec<_> = marks.iter().rev().copied().collect();
        assert_eq!(line(&turned, now(), 43), line(&marks, now(), 43));
    }

    #[test]
    fn a_long_gap_is_seen() {
        assert_eq!(
            line(&[mark(40, Fate::Keep), mark(39, Fate::Keep)], now(), 43),
            "2026-10-12 ##------------------- 2026-11-21"
        );
    }

    #[test]
    fn where_several_share_a_column_a_deletion_is_not_hidden() {
        use Fate::{Delete, Ignore, Keep, ToBeTaken};
        for (fates, sign) in [
            (&[Keep, Delete][..], '%'),
            (&[Delete, Keep, Ignore, ToBeTaken], '%'),
            (&[Ignore, Delete, ToBeTaken], 'x'),
            (&[Ignore, Keep, ToBeTaken], '#'),
            (&[Ignore, ToBeTaken], '+'),
            (&[Ignore], 'o'),
        ] {
            let marks: Vec<_> = fates.iter().map(|fate| mark(0, *fate)).collect();
            let drawn = line(&[&[mark(10, Keep)], &marks[..]].concat(), now(), 11);
            assert_eq!(drawn.chars().last(), Some(sign), "{fates:?}: {drawn}");
        }
    }

    #[test]
    fn one_from_the_future_is_the_right_end() {
        let drawn = line(&[mark(10, Fate::Keep), mark(-10, Fate::Ignore)], now(), 43);
        assert_eq!(drawn, "2026-11-11 #-------------------o 2026-12-01");
    }

    #[test]
    fn dates_that_do_not_fit_are_left_out_and_without_marks_the_line_is_empty() {
        assert_eq!(line(&[mark(4, Fate::Keep)], now(), 5), "#----");
        assert_eq!(line(&[mark(4, Fate::Keep)], now(), 0), "");
        assert_eq!(line(&[], now(), 80), "");
        assert_eq!(line(&[mark(0, Fate::Delete)], now(), 33), "2026-11-21 x---------- 2026-11-21");
    }

    proptest! {
        #[test]
        fn it_is_never_wider_than_asked_for_and_both_ends_are_marks(
            taken in prop::collection::vec(any::<i64>(), 1..50),
            until in any::<i64>(),
            width in 0_usize..200,
        ) {
            let (least, most) = (Timestamp::MIN.as_second(), Timestamp::MAX.as_second());
            let at = |second: i64| Timestamp::from_second(second.rem_euclid(most - least) + least).unwrap();
            let marks: Vec<_> = taken.iter().map(|second| (at(*second), Fate::Keep)).collect();
            let drawn = line(&marks, at(until), width);
            prop_assert!(drawn.chars().count() <= width, "{drawn}");
            let columns = drawn.split(' ').max_by_key(|part| part.len()).unwrap_or_default();
            prop_assert!(width < 60 || columns.starts_with('#'), "{drawn}");
        }
    }
}
