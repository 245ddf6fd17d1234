//! Simulated programs: they write, take their time by the clock, and end as the test says, or by a signal. A
//! [`SimTool`] reads its input, too, and does its work.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::io::{self, Cursor};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::io::{AsyncWriteExt as _, DuplexStream};
use tokio::task::JoinHandle;

use crate::clock::Clock;
use crate::process::{Command, Input, Process, Processes, ProgramError, Started};

/// SIGKILL, SIGTERM and SIGINT by their numbers on Linux.
const KILL: i32 = 9;
const TERM: i32 = 15;
const INT: i32 = 2;

/// What is called when a program starts, such as one that looks at a zone.
type Effect = Arc<dyn Fn(&Command) + Send + Sync>;

/// What a process of a [`SimTool`] did.
#[derive(Debug, Clone, Default)]
pub struct Done {
    /// What it writes to its standard output.
    pub stdout: Bytes,
    /// What it writes to its standard error.
    pub stderr: String,
    /// Its exit status.
    pub status: i32,
}

/// A program that does its work, whatever is asked of it.
pub trait SimTool: Send + Sync + Debug {
    /// Runs with what it can read; the end of that is the end of its input. Dropped, it is killed.
    fn run(&self, command: Command, input: DuplexStream) -> BoxFuture<'static, Done>;
}

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
    /// Whether it continues if it is asked to end.
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
    tools: Arc<Mutex<BTreeMap<String, Arc<dyn SimTool>>>>,
    started: Arc<Mutex<Vec<Command>>>,
}

impl SimProcesses {
    /// A machine without any program.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, programs: Arc::default(), tools: Arc::default(), started: Arc::default() }
    }

    /// Installs a program, or replaces it.
    pub fn install(&self, name: &str, program: SimProgram) {
        self.programs.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), program);
    }

    /// Installs a program that does its work, or replaces it.
    pub fn install_tool(&self, name: &str, tool: Arc<dyn SimTool>) {
        self.tools.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), tool);
    }

    fn tool(&self, name: &str) -> Option<Arc<dyn SimTool>> {
        self.tools.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
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
        if self.tool(program).is_none() {
            self.program(program)?;
        }
        Ok(Path::new("/usr/bin").join(program))
    }

    fn start(&self, command: &Command) -> Result<Started, ProgramError> {
        if let Some(tool) = self.tool(&command.program) {
            self.started.lock().unwrap_or_else(PoisonError::into_inner).push(command.clone());
            return Ok(start_tool(&*tool, command));
        }
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
        let stdin = command.has_input.then(|| Box::pin(tokio::io::sink()) as Input);
        Ok(Started { process: Box::new(process), stdin, stdout: Box::pin(stdout), stderr: Box::pin(stderr) })
    }

    /// Nothing of a simulation outlives it.
    fn kill_all(&self) {}
}

/// Bytes that a pipe of Linux holds.
const PIPE_BYTES: usize = 64 << 10;

fn start_tool(tool: &dyn SimTool, command: &Command) -> Started {
    let [(stdin, input), (stdout, mut output), (stderr, mut errors)] =
        std::array::from_fn(|_| tokio::io::duplex(PIPE_BYTES));
    let work = tool.run(command.clone(), input);
    let task = tokio::spawn(async move {
        let done = work.await;
        // The reader may have stopped.
        let _ = output.write_all(&done.stdout).await;
        let _ = errors.write_all(done.stderr.as_bytes()).await;
        done.status
    });
    Started {
        process: Box::new(ToolProcess { task, signal: None, ended: None }),
        stdin: command.has_input.then(|| Box::pin(stdin) as Input),
        stdout: Box::pin(stdout),
        stderr: Box::pin(stderr),
    }
}

/// A process that ends with its work, or by a signal.
#[derive(Debug)]
struct ToolProcess {
    task: JoinHandle<i32>,
    /// The first signal that it got.
    signal: Option<i32>,
    ended: Option<ExitStatus>,
}

impl ToolProcess {
    fn end_by(&mut self, signal: i32) {
        self.task.abort();
        self.signal = self.signal.or(Some(signal));
    }
}

impl Process for ToolProcess {
    fn wait(&mut self) -> BoxFuture<'_, io::Result<ExitStatus>> {
        Box::pin(async {
            if self.ended.is_none() {
                let ended = (&mut self.task).await;
                // As the system encodes it.
                let status = ended.map_or(self.signal.unwrap_or(KILL), |status| status << 8);
                self.ended = Some(ExitStatus::from_raw(status));
            }
            Ok(self.ended.unwrap_or_default())
        })
    }

    fn terminate(&mut self) {
        self.end_by(TERM);
    }

    fn interrupt(&mut self) {
        self.end_by(INT);
    }

    fn kill(&mut self) {
        self.end_by(KILL);
    }
}

impl Drop for ToolProcess {
    fn drop(&mut self) {
        self.task.abort();
    }
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

    fn interrupt(&mut self) {
        self.terminate();
    }

    fn kill(&mut self) {
        self.end_by(KILL);
    }
}
