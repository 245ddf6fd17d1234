//! The ticker: the only file that uses tokio-cron-scheduler.
//!
//! It ticks each second and does no more: its jobs in a time zone keep the UTC offset of the moment at which they were
//! created, overlap themselves, and are not waited for at the end. So `timetable` decides what is due.

use std::sync::Arc;

use tokio::sync::Notify;
use tokio_cron_scheduler::{Job, JobScheduler, JobSchedulerError};

/// Ticks each second until it is stopped.
pub struct Ticker {
    scheduler: JobScheduler,
    tick: Arc<Notify>,
}

impl std::fmt::Debug for Ticker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ticker").finish_non_exhaustive()
    }
}

impl Ticker {
    /// Starts it.
    ///
    /// # Errors
    /// The scheduler's, if it can't be started.
    pub async fn start() -> Result<Self, JobSchedulerError> {
        let tick = Arc::new(Notify::new());
        let scheduler = JobScheduler::new().await?;
        let sender = Arc::clone(&tick);
        let job = Job::new_async("* * * * * *", move |_, _| {
            let sender = Arc::clone(&sender);
            Box::pin(async move { sender.notify_one() })
        })?;
        scheduler.add(job).await?;
        scheduler.start().await?;
        Ok(Self { scheduler, tick })
    }

    /// Notified at each tick. Ticks that nothing waited for count as one.
    pub fn tick(&self) -> Arc<Notify> {
        Arc::clone(&self.tick)
    }

    /// Ends it.
    pub async fn stop(mut self) {
        // It has nothing to wait for, and the process ends anyway.
        let _ = self.scheduler.shutdown().await;
    }
}
