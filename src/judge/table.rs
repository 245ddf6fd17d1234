//! A retention table, and what it says of the good snapshots of one instance.

use std::collections::BTreeSet;

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

use crate::judge::calendar::{Age, period_of};
use crate::judge::facts::SnapshotFacts;
use crate::judge::ruling::Opinion;
use crate::policy::Period;

/// The keys of a retention table. A count of `all` is the largest number.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) keep_last: Option<u64>,
    pub(super) keep_within: Option<Age>,
    pub(super) keep: [Option<u64>; 5],
    pub(super) keep_within_each: [Option<Age>; 5],
    pub(super) keep_oldest: bool,
    pub(super) max_age: Option<Age>,
    pub(super) max_count: Option<u64>,
    pub(super) min_keep: u64,
    pub(super) min_keep_consistent: u64,
    pub(super) failed_after: Option<Age>,
}

/// Each period with its keys.
pub(super) const PERIODS: [(Period, &str, &str); 5] = [
    (Period::Hour, "keep_hourly", "keep_within_hourly"),
    (Period::Day, "keep_daily", "keep_within_daily"),
    (Period::Week, "keep_weekly", "keep_within_weekly"),
    (Period::Month, "keep_monthly", "keep_within_monthly"),
    (Period::Year, "keep_yearly", "keep_within_yearly"),
];

impl Table {
    /// One opinion for each of the good snapshots of an instance, newest first.
    pub(super) fn judge(&self, good: &[&SnapshotFacts], zone: &TimeZone, now: Timestamp) -> Vec<Opinion> {
        // The first key that wants each of them.
        let mut wanting: Vec<Option<&'static str>> = vec![None; good.len()];
        let mut has_keep_rule = false;

        if let Some(count) = self.keep_last {
            has_keep_rule = true;
            for (number, wanting) in (1..).zip(&mut wanting) {
                if number <= count {
                    wanting.get_or_insert("keep_last");
                }
            }
        }
        if let Some(within) = &self.keep_within {
            has_keep_rule = true;
            for (snapshot, wanting) in good.iter().zip(&mut wanting) {
                if !within.is_exceeded(snapshot.created_at, zone, now) {
                    wanting.get_or_insert("keep_within");
                }
            }
        }
        let needs_dates =
            self.keep.iter().any(Option::is_some) || self.keep_within_each.iter().any(Option::is_some);
        let needed = good.iter().filter(|_| needs_dates);
        let dates: Vec<Date> = needed.map(|snapshot| zone.to_datetime(snapshot.created_at).date()).collect();
        for ((period, key, _), count) in PERIODS.into_iter().zip(self.keep) {
            let Some(count) = count else { continue };
            has_keep_rule = true;
            let mut used = 0;
            for (is_newest, wanting) in newest_of_each(period, good, &dates).into_iter().zip(&mut wanting) {
                if is_newest && used < count {
                    used += 1;
                    wanting.get_or_insert(key);
                }
            }
            if let Some(oldest) = wanting.last_mut().filter(|_| self.keep_oldest && used < count) {
                oldest.get_or_insert(key);
            }
        }
        for ((period, _, key), within) in PERIODS.into_iter().zip(&self.keep_within_each) {
            let Some(within) = within else { continue };
            has_keep_rule = true;
            let newest = newest_of_each(period, good, &dates);
            for (place, snapshot) in good.iter().enumerate() {
                let is_oldest = place + 1 == good.len();
                let is_meant = newest.get(place) == Some(&true) || self.keep_oldest && is_oldest;
                let wants = is_meant && !within.is_exceeded(snapshot.created_at, zone, now);
                if let Some(wanting) = wanting.get_mut(place).filter(|_| wants) {
                    wanting.get_or_insert(key);
                }
            }
        }

        let mut opinions = Vec::with_capacity(good.len());
        let (mut kept, mut consistent) = (0_u64, 0_u64);
        for ((number, snapshot), wanting) in (1_u64..).zip(good).zip(wanting) {
            let wanting = if has_keep_rule { wanting } else { Some("none") };
            let is_too_old = self.max_age.is_some_and(|age| age.is_exceeded(snapshot.created_at, zone, now));
            let opinion = match wanting {
                None => Opinion::Deletes("keep"),
                Some(_) if is_too_old => Opinion::Deletes("max_age"),
                Some(key) => {
                    kept += 1;
                    let is_too_many = self.max_count.is_some_and(|most| kept > most);
                    if is_too_many { Opinion::Deletes("max_count") } else { Opinion::Keeps(key) }
                }
            };
            consistent += u64::from(snapshot.is_consistent);
            let is_needed = snapshot.is_consistent && consistent <= self.min_keep_consistent;
            opinions.push(match opinion {
                Opinion::Deletes(_) if number <= self.min_keep => Opinion::Keeps("min_keep"),
                Opinion::Deletes(_) if is_needed => Opinion::Keeps("min_keep_consistent"),
                opinion => opinion,
            });
        }
        opinions
    }
}

/// Of which snapshots no newer one is of the same period.
fn newest_of_each(period: Period, newest_first: &[&SnapshotFacts], dates: &[Date]) -> Vec<bool> {
    let mut seen = BTreeSet::new();
    let with_dates = newest_first.iter().zip(dates);
    with_dates.map(|(snapshot, date)| seen.insert(period_of(period, snapshot.created_at, *date))).collect()
}
