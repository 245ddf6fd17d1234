//! The signals of a process that changes something: some ask it to stop, and none ends it by accident.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGINT and SIGTERM. From its installation on, neither ends the process by itself.
pub struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl StopSignals {
    /// Installs the handlers.
    ///
    /// # Errors
    /// If the system refuses them.
    pub fn install() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Ignores SIGUSR1 and SIGUSR2 from here on: by default each ends the process. SIGPIPE is ignored from the start.
///
/// # Errors
/// If the system refuses it.
pub fn ignore_unused() -> io::Result<()> {
    // A handler stays when its stream is dropped.
    [SignalKind::user_defined1(), SignalKind::user_defined2()]
        .into_iter()
        .try_for_each(|ignored| signal(ignored).map(drop))
}
