//! The heartbeat: tokio-cron-scheduler, which nothing else in the house knows.
//!
//! It gives a beat each second and no more. Its jobs in a time zone keep the offset that was right when they were
//! made, start over themselves, and are not waited for at the end; what is due is `timetable`'s to say.

use std::sync::Arc;

use tokio::sync::Notify;
use tokio_cron_scheduler::{Job, JobScheduler, JobSchedulerError};

/// Beats each second while it lives.
pub struct Heartbeat {
    scheduler: JobScheduler,
    beat: Arc<Notify>,
}

impl std::fmt::Debug for Heartbeat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Heartbeat").finish_non_exhaustive()
    }
}

impl Heartbeat {
    /// Starts it.
    ///
    /// # Errors
    /// What the crate says; nothing is known that could go wrong.
    pub async fn start() -> Result<Self, JobSchedulerError> {
        let beat = Arc::new(Notify::new());
        let scheduler = JobScheduler::new().await?;
        let ring = Arc::clone(&beat);
        let job = Job::new_async("* * * * * *", move |_, _| {
            let ring = Arc::clone(&ring);
            Box::pin(async move { ring.notify_one() })
        })?;
        scheduler.add(job).await?;
        scheduler.start().await?;
        Ok(Self { scheduler, beat })
    }

    /// Rings at each beat. Beats that nobody waited for are one.
    pub fn beat(&self) -> Arc<Notify> {
        Arc::clone(&self.beat)
    }

    /// Ends it.
    pub async fn stop(mut self) {
        // It has nothing to wait for, and the process ends anyway.
        let _ = self.scheduler.shutdown().await;
    }
}
