//! The guard: limits beyond which all deletions of a zone are blocked, however right each of them may be.
//!
//! A limit trips when it is exceeded, not when it is met. Percentages are checked zone by zone; `max_deletes`
//! is for all zones of a run. In a zone without deletions there is nothing to block, except that a listing that
//! lost too much must be reported, and not accepted.

use std::fmt::{self, Display};
use std::time::Duration;

use jiff::SignedDuration;

use crate::policy::Guard;
use crate::policy::name::PolicyName;
use crate::retention::inventory::ClockSkew;
use crate::snapshot::ZoneName;
use crate::text::counted;

/// A percentage is checked only beyond this number: of three snapshots two may well be deleted.
pub const FEW: u64 = 10;

/// The facts of a zone that the guard checks.
#[derive(Debug, Clone)]
pub struct ZoneCase {
    /// The zone.
    pub zone: ZoneName,
    /// How many would be deleted, without those that are `accepted`.
    pub deletes: u64,
    /// How many would be deleted of those that waited for a change to settle, since the change was allowed.
    pub accepted: u64,
    /// How many of those are good; the others have failed, and no backup is lost with them.
    pub good_deletes: u64,
    /// How many selected good ones there are.
    pub good: u64,
    /// What vanished from its listing.
    pub drop: ListingDrop,
    /// How far this machine's clock is from the API's.
    pub clock: ClockSkew,
    /// How many deletions were allowed for this zone alone.
    pub allowed: Option<u64>,
}

/// More than this number must have vanished for a listing to be held because everything did.
pub const VERY_FEW: u64 = 2;

/// What vanished from a zone's listings since the last accepted ones, all policies and selections aside. Without
/// an accepted listing no snapshot could have vanished.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ListingDrop {
    /// How many of the accepted listing are not listed any more, and were not deleted by this program.
    pub dropped: u64,
    /// How many the accepted listing had, less those that this program deleted since.
    pub accepted: u64,
    /// How many instances are not listed any more although snapshots of them are.
    pub instances_dropped: u64,
    /// How many instances the listed snapshots are of.
    pub instances: u64,
}

impl ListingDrop {
    /// Whether it exceeds the policy's limit.
    pub fn exceeds(self, guard: &Guard) -> bool {
        self.snapshots_exceed(guard) || self.instances_exceed(guard)
    }

    fn snapshots_exceed(self, guard: &Guard) -> bool {
        let max = guard.max_listing_drop_percent;
        let is_share_exceeded = self.dropped > FEW && is_beyond(self.dropped, self.accepted, max);
        let is_all = self.dropped > VERY_FEW && self.dropped >= self.accepted && max < 100;
        is_share_exceeded || is_all
    }

    /// An instance takes its snapshots with it when it is deleted, so there should be none of these at all.
    fn instances_exceed(self, guard: &Guard) -> bool {
        is_beyond(self.instances_dropped, self.instances, guard.max_listing_drop_percent)
    }
}

/// Whether `part` is more than `percent` of `whole`.
pub(crate) fn is_beyond(part: u64, whole: u64, percent: u8) -> bool {
    u128::from(part) * 100 > u128::from(percent) * u128::from(whole)
}

/// Why nothing of a zone is deleted, and how to allow it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The policy of the run.
    pub policy: PolicyName,
    /// The zone.
    pub zone: ZoneName,
    /// The deletions in all zones of the run: the number to be allowed.
    pub run_deletes: u64,
    /// What is exceeded.
    pub limit: Limit,
}

/// A limit that is exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// `max_clock_skew`: ages can't be trusted. No allowance lets it pass.
    ClockSkew {
        /// This machine's clock less the API's.
        skew: SignedDuration,
        /// How far it may be off in either direction.
        max: Duration,
    },
    /// There is nothing to compare this machine's clock with. No allowance lets it pass.
    NoClock,
    /// `max_deletes`.
    Deletes {
        /// The limit per run.
        max: u64,
    },
    /// `max_delete_percent`.
    DeletePercent {
        /// How many good ones of the zone would be deleted.
        deletes: u64,
        /// How many good ones are selected there.
        good: u64,
        /// The limit in percent.
        max: u8,
    },
    /// `max_listing_drop_percent`: the listing may be incomplete.
    ListingDrop {
        /// What vanished.
        drop: ListingDrop,
        /// The limit in percent.
        max: u8,
    },
}

/// What counts for a run as a whole, in all its zones together.
#[derive(Debug, Clone, Copy)]
pub struct WholeRun {
    /// The deletions in all its zones.
    pub deletes: u64,
    /// A run with at most this number of deletions may pass; a larger one stays blocked as a whole.
    pub allowed: Option<u64>,
}

impl WholeRun {
    /// Adds up a run.
    pub fn new<'a>(zones: impl Iterator<Item = &'a ZoneCase>, allowed: Option<u64>) -> Self {
        Self { deletes: zones.fold(0, |sum, case| sum.saturating_add(case.deletes)), allowed }
    }
}

impl WholeRun {
    /// Whether the run as a whole was allowed.
    pub fn is_allowed(self) -> bool {
        self.allowed.is_some_and(|allowed| self.deletes <= allowed)
    }
}

/// Why a zone of a run is blocked, if it is.
///
/// [`WholeRun::allowed`] lets a run with at most that number of deletions pass, and [`ZoneCase::allowed`] a zone
/// likewise; a difference of the clocks can't be allowed.
pub fn hold(policy: &PolicyName, guard: &Guard, case: &ZoneCase, run: WholeRun) -> Option<Held> {
    let limit = exceeded(guard, case, run)?;
    Some(Held { policy: policy.clone(), zone: case.zone.clone(), run_deletes: run.deletes, limit })
}

fn exceeded(guard: &Guard, case: &ZoneCase, run: WholeRun) -> Option<Limit> {
    if case.deletes > 0 || case.accepted > 0 {
        match case.clock {
            ClockSkew::Known(skew) if skew.unsigned_abs() > guard.max_clock_skew => {
                return Some(Limit::ClockSkew { skew, max: guard.max_clock_skew });
            }
            ClockSkew::Unknown => return Some(Limit::NoClock),
            ClockSkew::Known(_) | ClockSkew::OnPaper => {}
        }
    }
    if run.is_allowed() || case.allowed.is_some_and(|allowed| case.deletes <= allowed) {
        return None;
    }
    if case.drop.exceeds(guard) {
        return Some(Limit::ListingDrop { drop: case.drop, max: guard.max_listing_drop_percent });
    }
    if case.deletes == 0 {
        return None;
    }
    if let Some(max) = guard.max_deletes.filter(|max| run.deletes > *max) {
        return Some(Limit::Deletes { max });
    }
    let (deletes, good, max) = (case.good_deletes, case.good, guard.max_delete_percent);
    let is_exceeded = deletes > FEW && is_beyond(deletes, good, max);
    is_exceeded.then_some(Limit::DeletePercent { deletes, good, max })
}

/// Whether this machine's clock is right, as far as is known.
pub fn is_clock_trusted(guard: &Guard, clock: ClockSkew) -> bool {
    match clock {
        ClockSkew::Known(skew) => skew.unsigned_abs() <= guard.max_clock_skew,
        ClockSkew::Unknown => false,
        ClockSkew::OnPaper => true,
    }
}

impl Held {
    /// Whether it would pass if [`Held::run_deletes`] deletions were allowed.
    pub fn can_be_allowed(&self) -> bool {
        !matches!(self.limit, Limit::ClockSkew { .. } | Limit::NoClock)
    }
}

impl Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policy, zone, run_deletes, limit } = self;
        match limit {
            Limit::ClockSkew { skew, max } => {
                let side = if skew.is_negative() { "behind" } else { "ahead of" };
                let (off, max) = (readable(skew.unsigned_abs()), readable(*max));
                return write!(
                    f,
                    "nothing of zone {zone} is deleted: this machine's clock is {off} {side} the API's, more than \
                     max_clock_skew = {max}, so ages can't be trusted; set the clock right, nothing else lets it pass"
                );
            }
            Limit::NoClock => {
                return write!(
                    f,
                    "nothing of zone {zone} is deleted: the API's answer has no Date header to compare this \
                     machine's clock with, so ages can't be trusted; find out which proxy removes it"
                );
            }
            Limit::Deletes { max } => write!(
                f,
                "nothing of zone {zone} is deleted: the run would delete {}, more than max_deletes = {max}",
                many(*run_deletes, "snapshot")
            )?,
            Limit::DeletePercent { deletes, good, max } => write!(
                f,
                "nothing of zone {zone} is deleted: {deletes} of {} would be deleted, more than max_delete_percent = {max}",
                many(*good, "good snapshot")
            )?,
            Limit::ListingDrop { drop, max } if is_beyond(drop.instances_dropped, drop.instances, *max) => {
                write!(
                    f,
                    "nothing of zone {zone} is deleted: {} of the {} that have snapshots are not listed any more, more than \
                     max_listing_drop_percent = {max}",
                    drop.instances_dropped,
                    many(drop.instances, "instance")
                )?;
            }
            Limit::ListingDrop { drop: ListingDrop { dropped, accepted, .. }, max } => write!(
                f,
                "nothing of zone {zone} is deleted: {dropped} of {} of the last accepted listing are not listed any \
                 more, though snapwarden did not delete them, more than max_listing_drop_percent = {max}",
                many(*accepted, "snapshot")
            )?,
        }
        write!(
            f,
            "; look: snapwarden plan {policy}; if that is right, let it pass: snapwarden once {policy} --allow-deletes \
             {run_deletes}, or in the next scheduled run: snapwarden allow {policy} {run_deletes}"
        )
    }
}

fn many(count: u64, noun: &str) -> String {
    counted(usize::try_from(count).unwrap_or(usize::MAX), noun)
}

/// `20m 3s`; to the second, unless there is less than one.
pub(crate) fn readable(duration: Duration) -> String {
    let whole = Duration::from_secs(duration.as_secs());
    let shown = if whole.is_zero() { duration } else { whole };
    SignedDuration::try_from(shown)
        .map_or_else(|_| format!("{} s", shown.as_secs()), |shown| format!("{shown:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUARD: Guard = Guard {
        max_deletes: None,
        max_delete_percent: 50,
        max_listing_drop_percent: 50,
        max_clock_skew: Duration::from_mins(5),
        settle: Duration::from_hours(20),
        expect_newest: None,
    };

    fn zone(name: &str, deletes: u64, good: u64) -> ZoneCase {
        let drop = ListingDrop::default();
        ZoneCase {
            zone: name.parse().unwrap(),
            deletes,
            accepted: 0,
            good_deletes: deletes,
            good,
            drop,
            clock: ClockSkew::OnPaper,
            allowed: None,
        }
    }

    /// A zone in which `dropped` of the last accepted listing are not listed any more.
    fn dropped(deletes: u64, dropped: u64, accepted: u64) -> ZoneCase {
        ZoneCase {
            drop: ListingDrop { dropped, accepted, ..ListingDrop::default() },
            ..zone("a", deletes, 1000)
        }
    }

    fn skewed(seconds: i64) -> ZoneCase {
        let clock = ClockSkew::Known(SignedDuration::from_secs(seconds));
        ZoneCase { clock, ..zone("ch-gva-2", 1, 20) }
    }

    fn holds(guard: &Guard, zones: &[ZoneCase], allowed: Option<u64>) -> Vec<Option<Held>> {
        let run = WholeRun::new(zones.iter(), allowed);
        zones.iter().map(|case| hold(&"nightly".parse().unwrap(), guard, case, run)).collect()
    }

    fn held(guard: &Guard, zones: &[ZoneCase], allowed: Option<u64>) -> Vec<bool> {
        holds(guard, zones, allowed).iter().map(Option::is_some).collect()
    }

    #[test]
    fn max_deletes_trips_when_exceeded_not_when_met() {
        let guard = Guard { max_deletes: Some(5), max_delete_percent: 100, ..GUARD };
        assert_eq!(held(&guard, &[zone("a", 5, 100)], None), [false]);
        assert_eq!(held(&guard, &[zone("a", 6, 100)], None), [true]);
        let none = Guard { max_deletes: None, ..guard };
        assert_eq!(held(&none, &[zone("a", u64::MAX, u64::MAX)], None), [false]);
    }

    #[test]
    fn max_deletes_counts_all_zones_and_holds_each_that_deletes() {
        let guard = Guard { max_deletes: Some(5), ..GUARD };
        let zones = [zone("a", 3, 100), zone("b", 0, 100), zone("c", 3, 100)];
        assert_eq!(held(&guard, &zones, None), [true, false, true]);
        assert_eq!(held(&guard, &zones[..2], None), [false, false]);
    }

    #[test]
    fn the_share_trips_when_exceeded_and_only_where_more_than_10_go() {
        for (deletes, good, expected) in [
            (10, 10, false),
            (11, 22, false),
            (11, 21, true),
            (11, 11, true),
            (12, 24, false),
            (13, 25, true),
            (u64::MAX / 2, u64::MAX, false),
            (u64::MAX / 2 + 1, u64::MAX, true),
        ] {
            assert_eq!(held(&GUARD, &[zone("a", deletes, good)], None), [expected], "{deletes} of {good}");
        }
    }

    #[test]
    fn failed_ones_count_for_max_deletes_and_not_for_the_share_of_good_ones() {
        let few = Guard { max_deletes: Some(20), ..GUARD };
        for (deletes, good_deletes, expected, max_deletes) in
            [(30, 10, false, true), (30, 11, true, true), (20, 0, false, false), (21, 0, false, true)]
        {
            let case = ZoneCase { good_deletes, ..zone("a", deletes, 20) };
            assert_eq!(held(&GUARD, std::slice::from_ref(&case), None), [expected], "{good_deletes} of 20");
            assert_eq!(held(&few, &[case], None), [max_deletes], "{deletes} in all");
        }
    }

    #[test]
    fn the_share_holds_its_own_zone_only() {
        assert_eq!(held(&GUARD, &[zone("a", 20, 20), zone("b", 20, 100)], None), [true, false]);
    }

    #[test]
    fn an_allowance_covers_the_whole_run_or_nothing() {
        let guard = Guard { max_deletes: Some(1), ..GUARD };
        let zones = [zone("a", 20, 20), zone("b", 2, 100)];
        assert_eq!(held(&guard, &zones, Some(21)), [true, true]);
        assert_eq!(held(&guard, &zones, Some(22)), [false, false]);
    }

    #[test]
    fn an_allowance_does_not_hold_what_no_limit_holds() {
        assert_eq!(held(&GUARD, &[zone("a", 9, 100)], Some(0)), [false]);
    }

    #[test]
    fn an_allowance_for_a_zone_covers_its_own_deletions_or_nothing() {
        let guard = Guard { max_deletes: Some(1), ..GUARD };
        for (allowed, expected) in [(19, true), (20, false)] {
            let zones = [ZoneCase { allowed: Some(allowed), ..zone("a", 20, 20) }, zone("b", 2, 100)];
            assert_eq!(held(&guard, &zones, None), [expected, true], "{allowed}");
            assert_eq!(
                held(&guard, &zones, Some(21)),
                [expected, true],
                "{allowed}, and too few for the run"
            );
        }
    }

    #[test]
    fn a_drop_of_the_listing_trips_when_exceeded_and_only_beyond_10() {
        for (dropped_, accepted, max, expected) in [
            (9, 10, 50, false),
            (11, 11, 50, true),
            (11, 22, 50, false),
            (11, 21, 50, true),
            (20, 40, 50, false),
            (21, 40, 50, true),
            (40, 40, 100, false),
            (10, 1000, 0, false),
            (11, 1000, 0, true),
            (u64::MAX / 2, u64::MAX, 50, false),
            (u64::MAX / 2 + 1, u64::MAX, 50, true),
        ] {
            let guard = Guard { max_listing_drop_percent: max, ..GUARD };
            let case = dropped(1, dropped_, accepted);
            assert_eq!(case.drop.exceeds(&guard), expected, "{dropped_} of {accepted}, at most {max} %");
            assert_eq!(held(&guard, &[case], None), [expected], "{dropped_} of {accepted}, at most {max} %");
        }
    }

    #[test]
    fn a_listing_without_anything_that_was_there_trips_and_one_without_the_instances_of_its_snapshots() {
        for (dropped_, accepted, max, expected) in [
            (2, 2, 50, false),
            (3, 3, 50, true),
            (10, 10, 50, true),
            (9, 10, 50, false),
            (10, 10, 100, false),
        ] {
            let guard = Guard { max_listing_drop_percent: max, ..GUARD };
            assert_eq!(held(&guard, &[dropped(1, dropped_, accepted)], None), [expected], "{dropped_}");
        }
        for (instances_dropped, instances, expected) in
            [(0, 0, false), (1, 2, false), (2, 3, true), (1, 1, true)]
        {
            let drop = ListingDrop { instances_dropped, instances, ..ListingDrop::default() };
            let case = ZoneCase { drop, ..zone("a", 1, 20) };
            assert_eq!(held(&GUARD, &[case], None), [expected], "{instances_dropped} of {instances}");
        }
    }

    #[test]
    fn a_drop_holds_its_own_zone_only_and_also_where_nothing_would_go() {
        assert_eq!(held(&GUARD, &[dropped(0, 30, 40), zone("b", 5, 100)], None), [true, false]);
    }

    #[test]
    fn a_drop_passes_once_allowed_also_by_an_allowance_of_nothing() {
        for (deletes, allowed, expected) in [(0, 0, false), (1, 0, true), (1, 1, false), (2, 1, true)] {
            let case = dropped(deletes, 30, 40);
            assert_eq!(held(&GUARD, std::slice::from_ref(&case), Some(allowed)), [expected], "{deletes}");
            let case = ZoneCase { allowed: Some(allowed), ..case };
            assert_eq!(held(&GUARD, &[case], None), [expected], "{deletes} in the zone");
        }
        let skewed = ZoneCase {
            drop: ListingDrop { dropped: 30, accepted: 40, ..ListingDrop::default() },
            ..skewed(1200)
        };
        assert_eq!(held(&GUARD, &[skewed], Some(1000)), [true], "a clock in doubt can't be allowed");
    }

    #[test]
    fn point_10_a_clock_that_is_off_holds_whatever_is_allowed() {
        for (seconds, expected) in [(300, false), (301, true), (-300, false), (-301, true)] {
            assert_eq!(held(&GUARD, &[skewed(seconds)], None), [expected], "{seconds} s");
            assert_eq!(held(&GUARD, &[skewed(seconds)], Some(1000)), [expected], "{seconds} s, allowed");
        }
        assert!(
            held(&GUARD, &[ZoneCase { clock: ClockSkew::Known(SignedDuration::MIN), ..skewed(0) }], None)[0]
        );
        assert_eq!(held(&GUARD, &[zone("a", 1, 20), skewed(1200)], None), [false, true]);
    }

    #[test]
    fn a_zone_without_deletions_has_nothing_to_hold() {
        let none = ZoneCase { deletes: 0, ..skewed(1200) };
        assert_eq!(held(&GUARD, std::slice::from_ref(&none), None), [false]);
        // Those that are accepted go by the same clock.
        assert_eq!(held(&GUARD, &[ZoneCase { accepted: 1, ..none }], None), [true]);
    }

    #[test]
    fn a_clock_is_trusted_within_the_limit_and_where_there_is_none_to_compare_it_with_only_on_paper() {
        for (seconds, expected) in [(0, true), (300, true), (301, false), (-300, true), (-301, false)] {
            assert_eq!(is_clock_trusted(&GUARD, skewed(seconds).clock), expected, "{seconds} s");
        }
        assert!(
            is_clock_trusted(&GUARD, ClockSkew::OnPaper) && !is_clock_trusted(&GUARD, ClockSkew::Unknown)
        );
    }

    #[test]
    fn point_37_what_is_held_says_what_the_numbers_are_and_how_to_let_it_pass() {
        let said = |guard: &Guard, zones: &[ZoneCase]| {
            let held = holds(guard, zones, None).swap_remove(0).unwrap();
            (held.to_string(), held.can_be_allowed())
        };
        let few = Guard { max_deletes: Some(5), ..GUARD };
        let zones = [zone("ch-gva-2", 12, 20), zone("de-fra-1", 1, 20)];
        let way_out = "; look: snapwarden plan nightly; if that is right, let it pass: snapwarden once nightly --allow-deletes 13, \
                       or in the next scheduled run: snapwarden allow nightly 13";
        assert_eq!(
            said(&few, &zones),
            (
                format!(
                    "nothing of zone ch-gva-2 is deleted: the run would delete 13 snapshots, \
                     more than max_deletes = 5{way_out}"
                ),
                true
            )
        );
        assert_eq!(
            said(&GUARD, &zones),
            (
                format!(
                    "nothing of zone ch-gva-2 is deleted: 12 of 20 good snapshots would be deleted, \
                     more than max_delete_percent = 50{way_out}"
                ),
                true
            )
        );
        assert_eq!(
            said(&GUARD, &[dropped(0, 30, 40), zones[1].clone()]),
            (
                "nothing of zone a is deleted: 30 of 40 snapshots of the last accepted listing are not listed any \
                 more, though snapwarden did not delete them, more than max_listing_drop_percent = 50; look: \
                 snapwarden plan nightly; if that is right, let it pass: snapwarden once nightly --allow-deletes 1, or in the next scheduled run: \
                 snapwarden allow nightly 1"
                    .to_owned(),
                true
            )
        );
        let drop = ListingDrop { instances_dropped: 2, instances: 3, ..ListingDrop::default() };
        let (text, can_be_allowed) = said(&GUARD, &[ZoneCase { drop, ..zone("a", 1, 20) }]);
        assert!(text.contains("2 of the 3 instances that have snapshots are not listed any more"), "{text}");
        assert!(can_be_allowed);
        assert_eq!(
            said(&few, &[skewed(-1203)]),
            (
                "nothing of zone ch-gva-2 is deleted: this machine's clock is 20m 3s behind the API's, more than \
                 max_clock_skew = 5m, so ages can't be trusted; set the clock right, nothing else lets it pass"
                    .to_owned(),
                false
            )
        );
    }
}
