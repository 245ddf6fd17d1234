//! A timeline in one line of text: where snapshots lie in time, and what becomes of them.
//!
//! ```text
//! 2026-07-31 x---x---%---#---#---##########o--+ 2026-11-24
//! ```
//!
//! Time runs evenly from left to right, so that gaps look like gaps. Where several snapshots share a place, what
//! stays and what goes are told before what is left alone.

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// What the signs mean.
pub const LEGEND: &str = "# stays   x goes   % some stay, some go   o left alone   + to be taken   - none";

/// What becomes of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It stays.
    Stays,
    /// It goes.
    Goes,
    /// Nobody judges it.
    LeftAlone,
    /// It is not there yet, and will be.
    Coming,
}

/// A snapshot on the line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// When it was taken.
    pub at: Timestamp,
    /// What becomes of it.
    pub fate: Fate,
}

/// What is shown in one place of the line; what comes later here hides what comes before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Sign {
    Nothing,
    LeftAlone,
    Coming,
    Stays,
    Goes,
    Both,
}

impl Sign {
    fn of(fate: Fate) -> Self {
        match fate {
            Fate::Stays => Self::Stays,
            Fate::Goes => Self::Goes,
            Fate::LeftAlone => Self::LeftAlone,
            Fate::Coming => Self::Coming,
        }
    }

    fn beside(self, other: Self) -> Self {
        match (self, other) {
            (Self::Stays, Self::Goes) | (Self::Goes, Self::Stays) => Self::Both,
            _ => self.max(other),
        }
    }

    fn shown(self) -> char {
        match self {
            Self::Nothing => '-',
            Self::LeftAlone => 'o',
            Self::Coming => '+',
            Self::Stays => '#',
            Self::Goes => 'x',
            Self::Both => '%',
        }
    }
}

/// The line, of `width` characters at most: from the oldest mark to `until`, or to the newest mark if that is later,
/// with the dates of both ends where there is room for them. Without marks it is empty.
pub fn line(marks: &[Mark], until: Timestamp, width: usize) -> String {
    let taken = || marks.iter().map(|mark| mark.at);
    let (Some(first), Some(last)) = (taken().min(), taken().max()) else { return String::new() };
    let last = last.max(until);
    let (left, right) = (date(first), date(last));
    // So many places at least, or the dates are worth more than the line between them.
    let beside = left.len() + right.len() + 2;
    let has_dates = width >= beside + 10;
    let places = places(marks, first, last, if has_dates { width - beside } else { width });
    if has_dates { format!("{left} {places} {right}") } else { places }
}

fn places(marks: &[Mark], first: Timestamp, last: Timestamp, count: usize) -> String {
    let mut places = vec![Sign::Nothing; count];
    let nanoseconds = |at: Timestamp| at.as_nanosecond() - first.as_nanosecond();
    let whole = nanoseconds(last).max(1);
    for mark in marks {
        // To the nearest place, so that each end is one.
        let steps = i128::try_from(count).unwrap_or(i128::MAX).saturating_sub(1);
        let place = (nanoseconds(mark.at).saturating_mul(steps).saturating_mul(2) + whole) / (whole * 2);
        let Some(place) = usize::try_from(place).ok().and_then(|place| places.get_mut(place)) else {
            continue;
        };
        *place = place.beside(Sign::of(mark.fate));
    }
    places.into_iter().map(Sign::shown).collect()
}

/// The day in UTC.
fn date(at: Timestamp) -> String {
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

    fn mark(days_ago: i64, fate: Fate) -> Mark {
        Mark { at: now() - jiff::SignedDuration::from_hours(24 * days_ago), fate }
    }

    #[test]
    fn time_runs_evenly_from_the_oldest_to_now() {
        let marks = [
            mark(20, Fate::Goes),
            mark(15, Fate::Goes),
            mark(10, Fate::Stays),
            mark(2, Fate::Stays),
            mark(1, Fate::LeftAlone),
            mark(0, Fate::Coming),
        ];
        assert_eq!(line(&marks, now(), 43), "2026-11-01 x----x----#-------#o+ 2026-11-21");
        // The order of the marks is nobody's business.
        let turned: Vec<Mark> = marks.iter().rev().copied().collect();
        assert_eq!(line(&turned, now(), 43), line(&marks, now(), 43));
    }

    #[test]
    fn a_long_silence_is_seen() {
        assert_eq!(
            line(&[mark(40, Fate::Stays), mark(39, Fate::Stays)], now(), 43),
            "2026-10-12 ##------------------- 2026-11-21"
        );
    }

    #[test]
    fn where_several_share_a_place_what_goes_is_not_hidden() {
        use Fate::{Coming, Goes, LeftAlone, Stays};
        for (fates, sign) in [
            (&[Stays, Goes][..], '%'),
            (&[Goes, Stays, LeftAlone, Coming], '%'),
            (&[LeftAlone, Goes, Coming], 'x'),
            (&[LeftAlone, Stays, Coming], '#'),
            (&[LeftAlone, Coming], '+'),
            (&[LeftAlone], 'o'),
        ] {
            let marks: Vec<Mark> = fates.iter().map(|fate| mark(0, *fate)).collect();
            let drawn = line(&[&[mark(10, Stays)], &marks[..]].concat(), now(), 11);
            assert_eq!(drawn.chars().last(), Some(sign), "{fates:?}: {drawn}");
        }
    }

    #[test]
    fn one_from_the_future_is_the_right_end() {
        let drawn = line(&[mark(10, Fate::Stays), mark(-10, Fate::LeftAlone)], now(), 43);
        assert_eq!(drawn, "2026-11-11 #-------------------o 2026-12-01");
    }

    #[test]
    fn without_room_for_dates_there_are_none_and_without_marks_there_is_nothing() {
        assert_eq!(line(&[mark(4, Fate::Stays)], now(), 5), "#----");
        assert_eq!(line(&[mark(4, Fate::Stays)], now(), 0), "");
        assert_eq!(line(&[], now(), 80), "");
        assert_eq!(line(&[mark(0, Fate::Goes)], now(), 33), "2026-11-21 x---------- 2026-11-21");
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
            let marks: Vec<Mark> = taken.iter().map(|second| Mark { at: at(*second), fate: Fate::Stays }).collect();
            let drawn = line(&marks, at(until), width);
            prop_assert!(drawn.chars().count() <= width, "{drawn}");
            let places = drawn.split(' ').max_by_key(|part| part.len()).unwrap_or_default();
            prop_assert!(width < 60 || places.starts_with('#'), "{drawn}");
        }
    }
}
