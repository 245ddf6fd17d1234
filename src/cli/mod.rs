//! The command line: parse, run, print, exit status.
//!
//! Data goes to stdout, everything else to stderr. What a command prints is made from values that the layers
//! below return; nothing is decided here.

pub mod allow;
pub mod archive;
pub mod args;
pub mod assemble;
pub mod bars;
pub mod check;
#[cfg(feature = "demo")]
pub mod demo;
pub mod hold;
pub mod once;
pub mod output;
pub mod packaging;
pub mod plan;
pub mod promote;
pub mod restore;
pub mod run;
pub mod signals;
pub mod simulate;
pub mod status;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use clap::error::ErrorKind;

use crate::cli::args::{ArchiveCommand, Arguments, Command};
use crate::cli::bars::Bars;
use crate::cli::output::Output;
use crate::telemetry::logging;

/// How a command ends, for scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exit {
    /// All was done.
    Done = 0,
    /// Nothing failed, but a guard held something back.
    Held = 3,
    /// Something failed, also in part.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// The configuration, or the credentials, can't be used.
    BadConfiguration = 78,
}

impl Exit {
    /// The worse of two: a failure outdoes what a guard held back.
    #[must_use]
    pub fn worse(self, other: Self) -> Self {
        match (self, other) {
            (Self::Done, other)
            | (Self::Held, other @ (Self::Failed | Self::Usage | Self::BadConfiguration)) => other,
            (one, _) => one,
        }
    }
}

/// An end before the work: what to say, and how to exit.
#[derive(Debug)]
pub struct Refusal {
    /// How to exit.
    pub exit: Exit,
    /// What to say on stderr; whole lines, safe for a terminal.
    pub text: String,
}

impl Refusal {
    /// With this status.
    pub fn new(exit: Exit, text: impl Into<String>) -> Self {
        Self { exit, text: text.into() }
    }

    /// Something failed, with its whole chain of causes.
    pub fn failed(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(Exit::Failed, crate::text::chain(error))
    }
}

/// Runs the command that the process was given.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are what was asked for; they are data.
            let exit = match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Exit::Done,
                _ => Exit::Usage,
            };
            // Nobody to tell that stdout is closed.
            let _ = error.print();
            return ExitCode::from(exit as u8);
        }
    };
    let output = Output::new(&arguments.global);
    let bars = Bars::new(&arguments.global);
    let format = arguments.global.log_format.into();
    logging::start(format, arguments.log_level(), output.color_on_stderr(), bars.clone());
    let exit = match dispatch(&arguments, output, &bars) {
        Ok(exit) => exit,
        Err(refusal) => {
            output.complain(&refusal.text);
            refusal.exit
        }
    };
    ExitCode::from(exit as u8)
}

fn dispatch(arguments: &Arguments, output: Output, bars: &Bars) -> Result<Exit, Refusal> {
    let global = &arguments.global;
    if output.is_svg() && !matches!(arguments.command, Command::Simulate(_)) {
        return Err(Refusal::new(
            Exit::Usage,
            "only `simulate` draws pictures: use `--output text` or `--output json`",
        ));
    }
    match &arguments.command {
        Command::Run => on_runtime(run::run(global)),
        Command::Once(once) => on_runtime(once::once(global, once, output, bars)),
        Command::Plan(plan) => on_runtime(plan::plan(global, plan, output)),
        Command::Simulate(simulate) => on_runtime(simulate::simulate(global, simulate, output)),
        Command::Check(check) => on_runtime(check::check(global, check, output)),
        Command::Promote(promote) => on_runtime(promote::promote(global, promote, output)),
        Command::Restore(restore) => on_runtime(restore::restore(global, restore, output)),
        Command::Hold(hold) => on_runtime(hold::hold(global, hold, output)),
        Command::Unhold(unhold) => on_runtime(hold::unhold(global, unhold, output)),
        Command::Holds => on_runtime(hold::holds(global, output)),
        Command::Allow(allow) => on_runtime(allow::allow(global, allow, output)),
        Command::Archive { command: ArchiveCommand::List(list) } => {
            on_runtime(archive::list(global, list, output))
        }
        Command::Archive { command: ArchiveCommand::Verify(verify) } => {
            on_runtime(archive::verify(global, verify, output))
        }
        Command::Archive { command: ArchiveCommand::Prune(prune) } => {
            on_runtime(archive::prune(global, prune, output))
        }
        Command::Status => on_runtime(status::status(global, output)),
        #[cfg(feature = "demo")]
        Command::Demo(demo) => on_runtime(demo::demo(demo, output, bars)),
        Command::Completions { shell } => Ok(packaging::completions(*shell, output)),
        Command::Man => packaging::man(output),
    }
}

/// At the end whatever still blocks on a disk is waited for no longer than this: it may hang for ever, as on a file
/// system whose server is gone, and whoever told us to stop would wait with it.
const END_WAIT_MAX: Duration = Duration::from_secs(2);

/// One thread serves the network, so that nothing is handed from one to another there; hashing and the disk have the
/// blocking pool.
fn on_runtime(work: impl Future<Output = Result<Exit, Refusal>>) -> Result<Exit, Refusal> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Refusal::failed(&error))?;
    let done = runtime.block_on(work);
    runtime.shutdown_timeout(END_WAIT_MAX);
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::blocking;

    #[test]
    fn a_disk_that_hangs_does_not_keep_the_process() {
        let (answer, disk) = std::sync::mpsc::channel::<()>();
        let (begins, has_begun) = tokio::sync::oneshot::channel();
        let work = async {
            let hanging = tokio::spawn(blocking(move || {
                begins.send(()).unwrap();
                disk.recv()
            }));
            has_begun.await.unwrap();
            hanging.abort();
            Ok(Exit::Done)
        };
        assert!(on_runtime(work).is_ok_and(|exit| exit == Exit::Done));
        drop(answer);
    }
}
