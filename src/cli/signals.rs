//! The signals of a process that changes something: some ask it to stop, and none ends it by accident.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGINT and SIGTERM. From its installation on, neither ends the process by itself.
pub struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl StopSignals {
    /// Installs the handlers; from here on SIGUSR1 and SIGUSR2 are ignored.
    ///
    /// # Errors
    /// If the system refuses them.
    pub fn install() -> io::Result<Self> {
        // Each would end the process if nothing handled it. A handler stays when its stream is dropped.
        for ignored in [SignalKind::user_defined1(), SignalKind::user_defined2()] {
            drop(signal(ignored)?);
        }
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
