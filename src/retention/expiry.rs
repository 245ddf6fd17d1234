//! Expiry: until when something keeps a snapshot, in whole seconds of Unix time.
//!
//! While no snapshot of an instance comes, each thing that keeps one of its snapshots does so without a break: a range
//! of seconds. A snapshot expires at the first second that is in none of its ranges.

use std::ops::Range;

use jiff::Timestamp;

pub(crate) const ALWAYS: Range<i64> = i64::MIN..i64::MAX;
pub(crate) const NEVER: Range<i64> = 0..0;

/// The first second at or after an instant.
pub(crate) fn first_second_from(instant: Timestamp) -> i64 {
    // Timestamps round toward 1970.
    instant.as_second() + i64::from(instant.subsec_nanosecond() > 0)
}

/// The first second after an instant; none is after the end of time.
pub(crate) fn first_second_after(instant: Timestamp) -> i64 {
    if instant == Timestamp::MAX {
        return i64::MAX;
    }
    instant.as_second() + i64::from(instant.subsec_nanosecond() >= 0)
}
