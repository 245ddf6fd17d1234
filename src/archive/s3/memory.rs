//! The memory that parts on their way into buckets take.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::archive::transfer::buffer::BUFFER_BYTES;
use crate::clock::{Clock, timeout};

/// For all uploads of a process.
const BYTES_MAX: u64 = 64 << 20;

/// Parts of up to a quarter of the budget are gathered in memory.
const SHARES: u64 = 4;

/// Budgets are counted in these.
const UNIT_BYTES: u64 = 64 << 10;

/// A part that has to be in memory waits for it no longer. Two buckets that one download feeds might otherwise wait for each
/// other.
const LONGEST_WAIT: Duration = Duration::from_mins(1);

/// A budget of memory for parts. Clones are the same budget.
#[derive(Debug, Clone)]
pub struct PartMemory {
    units: u32,
    free: Arc<Semaphore>,
}

/// Memory of the budget, until it is dropped.
#[derive(Debug)]
pub(super) struct Reserved(
    #[expect(dead_code, reason = "it is held, not read")] Option<OwnedSemaphorePermit>,
);

impl PartMemory {
    /// A budget of this many bytes.
    pub fn new(bytes: u64) -> Self {
        let units = u32::try_from(bytes / UNIT_BYTES).unwrap_or(u32::MAX);
        Self { units, free: Arc::new(Semaphore::new(units as usize)) }
    }

    /// The one that all uploads of this process share.
    pub fn of_process() -> Self {
        static SHARED: OnceLock<PartMemory> = OnceLock::new();
        SHARED.get_or_init(|| Self::new(BYTES_MAX)).clone()
    }

    /// The largest part that is gathered in memory without need.
    pub(super) fn share(&self) -> u64 {
        u64::from(self.units) * UNIT_BYTES / SHARES
    }

    fn units_of(&self, bytes: u64) -> u32 {
        // A part on its way takes more than its bytes: copied pieces at its ends, and what its connection buffers.
        let held = bytes.saturating_add(BUFFER_BYTES as u64);
        u32::try_from(held.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX).min(self.units)
    }

    /// Memory for a part, if it is no larger than the share of one upload and there is some at this moment.
    pub(super) fn try_reserve(&self, bytes: u64) -> Option<Reserved> {
        if bytes > self.share() {
            return None;
        }
        let free = Arc::clone(&self.free);
        Some(Reserved(Some(free.try_acquire_many_owned(self.units_of(bytes)).ok()?)))
    }

    /// Memory for a part that has to be in memory whatever its size: one that is larger than the budget takes all of it.
    pub(super) async fn reserve(&self, clock: &dyn Clock, bytes: u64) -> Reserved {
        let permit = Arc::clone(&self.free).acquire_many_owned(self.units_of(bytes));
        Reserved(timeout(clock, LONGEST_WAIT, permit).await.ok().and_then(Result::ok))
    }
}

impl Default for PartMemory {
    fn default() -> Self {
        Self::new(BYTES_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::clock::SimClock;

    const MIB: u64 = 1 << 20;

    #[tokio::test(start_paused = true)]
    async fn parts_together_take_no_more_than_the_budget_and_none_waits_for_ever() {
        let memory = PartMemory::default();
        let clock = SimClock::starting_at("2026-11-01T00:00:00Z".parse().unwrap());
        assert!(memory.try_reserve(16 * MIB + 1).is_none(), "more than its share");
        let mut taken: Vec<_> = (0..7).map(|_| memory.try_reserve(8 * MIB).unwrap()).collect();
        assert!(memory.try_reserve(8 * MIB).is_none());
        // What can't do without waits, and a clone waits for the same budget.
        let mut waiting = Box::pin(memory.reserve(&clock, 8 * MIB));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        drop(taken.pop());
        drop(waiting.await);
        assert!(memory.clone().try_reserve(8 * MIB).is_some());
        let before = tokio::time::Instant::now();
        let larger = memory.reserve(&clock, 1 << 40).await;
        assert_eq!(before.elapsed(), LONGEST_WAIT);
        drop((taken, larger));
        let _all = memory.reserve(&clock, 1 << 40).await;
        assert!(memory.try_reserve(1).is_none());
    }
}
