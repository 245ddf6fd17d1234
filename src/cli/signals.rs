//! The signals that ask the process to stop.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::exit::Refusal;

/// SIGINT and SIGTERM. While this exists, neither ends the process by itself.
pub struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl StopSignals {
    /// Installs the handlers.
    ///
    /// # Errors
    /// [`Refusal`] if the system refuses them.
    pub fn install() -> Result<Self, Refusal> {
        let failed = |error: std::io::Error| Refusal::failed(&error);
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
        })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
