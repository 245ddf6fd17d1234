//! The guard: what holds a whole plan back.

use jiff::SignedDuration;

use crate::policy::Guard;
use crate::snapshot::ZoneName;

/// What the guard looks at, zone by zone.
#[derive(Debug, Clone)]
pub struct ZoneCase {
    /// Where.
    pub zone: ZoneName,
    /// How many would go.
    pub deletes: u64,
    /// How many selected good ones there are.
    pub good: u64,
    /// This machine's clock less the API's, where it is known.
    pub clock_skew: Option<SignedDuration>,
}

/// Why nothing of a zone is deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {}

/// Which of the zones of one policy's run are held; in the order given.
///
/// `allowed` lets a run of at most so many deletions pass; a larger one stays held whole, and a clock in
/// doubt can't be allowed.
pub fn hold(guard: &Guard, zones: &[ZoneCase], allowed: Option<u64>) -> Vec<Option<Held>> {
    let _ = (guard, allowed);
    vec![None; zones.len()]
}
