//! Simulated programs: they write, take their time by the clock, and end as they were told to, or by a signal.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::io::{self, Cursor};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;

use crate::clock::Clock;
use crate::process::{Command, Process, Processes, ProgramError, Started};

/// SIGKILL and SIGTERM by their numbers on Linux.
const KILL: i32 = 9;
const TERM: i32 = 15;

/// What is called when a program starts, such as one that looks at a zone.
type Effect = Arc<dyn Fn(&Command) + Send + Sync>;

/// A program, and how each of its processes behaves.
#[derive(Clone, Default)]
pub struct SimProgram {
    /// What it writes to its standard output, at once.
    pub stdout: Vec<u8>,
    /// What it writes to its standard error, at once.
    pub stderr: Vec<u8>,
    /// How long it runs.
    pub takes: Duration,
    /// Its exit status.
    pub status: i32,
    /// Whether it goes on if it is asked to end.
    pub is_stubborn: bool,
    /// What happens when it starts.
    pub effect: Option<Effect>,
}

impl Debug for SimProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimProgram")
            .field("takes", &self.takes)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

/// The simulated form of the seam. Clones are the same machine.
#[derive(Debug, Clone)]
pub struct SimProcesses {
    clock: Arc<dyn Clock>,
    programs: Arc<Mutex<BTreeMap<String, SimProgram>>>,
    started: Arc<Mutex<Vec<Command>>>,
}

impl SimProcesses {
    /// A machine without any program.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, programs: Arc::default(), started: Arc::default() }
    }

    /// Installs a program, or replaces it.
    pub fn install(&self, name: &str, program: SimProgram) {
        self.programs.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), program);
    }

    /// Everything that was started, the oldest first.
    pub fn started(&self) -> Vec<Command> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn program(&self, name: &str) -> Result<SimProgram, ProgramError> {
        let programs = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        programs.get(name).cloned().ok_or_else(|| ProgramError::NotFound(name.to_owned()))
    }
}

impl Processes for SimProcesses {
    fn find(&self, program: &str) -> Result<PathBuf, ProgramError> {
        self.program(program).map(|_| Path::new("/usr/bin").join(program))
    }

    fn start(&self, command: &Command) -> Result<Started, ProgramError> {
        let program = self.program(&command.program)?;
        self.started.lock().unwrap_or_else(PoisonError::into_inner).push(command.clone());
        if let Some(effect) = &program.effect {
            effect(command);
        }
        let (stdout, stderr) = (Cursor::new(program.stdout.clone()), Cursor::new(program.stderr.clone()));
        let process = SimProcess {
            clock: Arc::clone(&self.clock),
            ends_at: self.clock.elapsed().saturating_add(program.takes),
            program,
            signal: None,
        };
        Ok(Started { process: Box::new(process), stdout: Box::pin(stdout), stderr: Box::pin(stderr) })
    }

    /// Nothing of a simulation outlives it.
    fn kill_all(&self) {}
}

#[derive(Debug)]
struct SimProcess {
    clock: Arc<dyn Clock>,
    program: SimProgram,
    /// By the clock's elapsed time.
    ends_at: Duration,
    /// The signal that ended it.
    signal: Option<i32>,
}

impl SimProcess {
    fn end_by(&mut self, signal: i32) {
        if self.clock.elapsed() < self.ends_at {
            self.signal = self.signal.or(Some(signal));
        }
    }
}

impl Process for SimProcess {
    fn wait(&mut self) -> BoxFuture<'_, io::Result<ExitStatus>> {
        Box::pin(async {
            if let Some(signal) = self.signal {
                return Ok(ExitStatus::from_raw(signal));
            }
            self.clock.sleep(self.ends_at.saturating_sub(self.clock.elapsed())).await;
            // As the system encodes it.
            Ok(ExitStatus::from_raw(self.program.status << 8))
        })
    }

    fn terminate(&mut self) {
        if !self.program.is_stubborn {
            self.end_by(TERM);
        }
    }

    fn kill(&mut self) {
        self.end_by(KILL);
    }
}
