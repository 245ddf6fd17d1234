//! The clock seam: now, elapsed time, sleep and timeouts.
//!
//! Nothing else in this crate asks the machine for the time (`clippy.toml` bans it), so that a test, or a
//! simulation of years, controls it. The simulated form is `sim::clock::SimClock`.

use std::fmt::Debug;
use std::future::Future;
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, Either, select};
use jiff::Timestamp;

/// The source of the time.
pub trait Clock: Send + Sync + Debug {
    /// The wall clock. It may jump in both directions: never measure a span with it.
    fn now(&self) -> Timestamp;

    /// Time since some fixed instant; never decreases. For measuring and for deadlines.
    fn elapsed(&self) -> Duration;

    /// Completes after `duration`.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;
}

/// The time limit passed first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no answer within {} s", .0.as_secs_f64())]
pub struct TimedOut(pub Duration);

/// Waits for `future`, at most for `limit` of the clock's time.
///
/// # Errors
/// [`TimedOut`] if `limit` passed first; the future is dropped then.
pub async fn timeout<F: Future>(
    clock: &dyn Clock,
    limit: Duration,
    future: F,
) -> Result<F::Output, TimedOut> {
    let future = std::pin::pin!(future);
    match select(future, clock.sleep(limit)).await {
        Either::Left((output, _)) => Ok(output),
        Either::Right(((), _)) => Err(TimedOut(limit)),
    }
}

/// The machine's own clock.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock {
    started: Instant,
}

impl SystemClock {
    /// A clock whose elapsed time counts from here.
    #[expect(clippy::disallowed_methods, reason = "this is the seam's real form")]
    pub fn start() -> Self {
        Self { started: Instant::now() }
    }
}

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the seam's real form")]
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    #[expect(clippy::disallowed_methods, reason = "this is the seam's real form")]
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }
}
