//! The command line: parse, run, print, exit status.
//!
//! Data goes to stdout, everything else to stderr. Commands only show values that the modules below return; they make
//! no decisions.

pub mod allow;
pub mod archive;
mod archive_copy;
mod archive_rm;
pub mod args;
pub mod assemble;
pub mod check;
mod confirm;
pub mod controls;
pub mod coverage;
#[cfg(feature = "demo")]
pub mod demo;
pub mod exit;
pub mod explain;
pub mod history;
pub mod hold;
mod in_place;
mod manual;
pub mod notify;
pub mod once;
pub mod output;
pub mod packaging;
pub mod plan;
pub mod progress;
pub mod promote;
pub mod restore;
pub mod revert;
mod role;
pub mod run;
pub mod shard;
pub mod signals;
pub mod simulate;
pub mod status;
mod survey;
pub mod when;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use clap::error::ErrorKind;

use crate::cli::args::{ArchiveCommand, Arguments, Command, NotifyCommand, ShardCommand};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::Output;
use crate::cli::progress::Progress;
use crate::run::context::RunOptions;
use crate::run::report::REPORTED;
use crate::telemetry::logging;

/// Runs the command that the process was given.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version were requested, so they are no error.
            let exit = match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Exit::Done,
                _ => Exit::Usage,
            };
            // Nothing can be reported if stdout is closed.
            let _ = error.print();
            return ExitCode::from(exit as u8);
        }
    };
    let output = Output::new(&arguments.global);
    let progress = Progress::new(&arguments.global);
    logging::start(
        arguments.global.log_format,
        arguments.log_level(),
        (arguments.reports_its_run() && output::is_stdout_stderr()).then_some(REPORTED),
        output.color_on_stderr(),
        progress.clone(),
    );
    let exit = match dispatch(&arguments, output, &progress) {
        Ok(exit) => exit,
        Err(refusal) => {
            output.complain(&refusal.text);
            refusal.exit
        }
    };
    ExitCode::from(exit as u8)
}

fn dispatch(arguments: &Arguments, output: Output, progress: &Progress) -> Result<Exit, Refusal> {
    let global = &arguments.global;
    if output.is_svg() && !matches!(arguments.command, Command::Simulate(_)) {
        return Err(Refusal::usage("only `simulate` draws pictures: use `--output text` or `--output json`"));
    }
    match &arguments.command {
        Command::Run => on_runtime(run::run(global)),
        Command::Once { policies, allow_deletes, instance } => {
            let (allow_deletes, instances) = (*allow_deletes, instance.clone());
            let wanted = RunOptions { allow_deletes, instances, ..RunOptions::default() };
            on_runtime(once::once(global, policies, wanted, output, progress))
        }
        Command::Plan(plan) => on_runtime(plan::plan(global, plan, output)),
        Command::Simulate(simulate) => on_runtime(simulate::simulate(global, simulate, output)),
        Command::Check { online: _, print_role: Some(part) } => check::print_role(global, *part, output),
        Command::Check { online, print_role: None } => on_runtime(check::check(global, *online, output)),
        Command::Promote(promote) => on_runtime(promote::promote(global, promote, output)),
        Command::Restore(restore) => on_runtime(restore::restore(global, restore, output, progress)),
        Command::Revert(revert) => on_runtime(revert::revert(global, revert, output, progress)),
        Command::Hold(hold) => on_runtime(hold::hold(global, hold, output)),
        Command::Unhold { snapshot, others } => on_runtime(hold::unhold(global, snapshot, *others, output)),
        Command::Holds => on_runtime(hold::holds(global, output)),
        Command::Explain { snapshot } => on_runtime(explain::explain(global, snapshot, output)),
        Command::History(history) => on_runtime(history::history(global, history, output)),
        Command::Pause { policy } => on_runtime(controls::pause(global, policy, output)),
        Command::Resume { policy } => on_runtime(controls::resume(global, policy, output)),
        Command::Trigger { policy } => on_runtime(controls::trigger(global, policy, output)),
        Command::Allow(allow) => on_runtime(allow::allow(global, allow, output)),
        Command::Archive { command } => match command {
            ArchiveCommand::List { archives, copies } => {
                on_runtime(archive::list(global, archives, copies, output))
            }
            ArchiveCommand::Verify { archives, copies, head: true, .. } => {
                on_runtime(archive::look(global, archives, copies, output))
            }
            ArchiveCommand::Verify { archives, percent, concurrency, bandwidth_limit, copies, .. } => {
                let how = (*percent, *concurrency, *bandwidth_limit);
                on_runtime(archive::verify(global, archives, how, copies, output, progress))
            }
            ArchiveCommand::Copy { from, to, snapshot, newest, concurrency, copies } => {
                let wanted = (snapshot.as_deref(), *newest, copies);
                on_runtime(archive_copy::copy(global, [from, to], wanted, *concurrency, output))
            }
            ArchiveCommand::Rm { archive, snapshot, yes, losing, copies } => {
                let answer = yes.then_some(losing.as_slice());
                on_runtime(archive_rm::rm(global, archive, (snapshot, copies), answer, output))
            }
            ArchiveCommand::Adopt { archive } => on_runtime(archive::adopt(global, archive, output)),
            ArchiveCommand::Prune { archives, dry_run, copies } => {
                on_runtime(archive::prune(global, archives, *dry_run, copies, output))
            }
        },
        Command::Shard { command: ShardCommand::Adopt } => on_runtime(shard::adopt(global, output)),
        Command::Notify { command: NotifyCommand::Test { name } } => {
            on_runtime(notify::test(global, name, output))
        }
        Command::Coverage { instances } => on_runtime(coverage::coverage(global, instances, output)),
        Command::Status { live } => on_runtime(status::status(global, *live, output)),
        #[cfg(feature = "demo")]
        Command::Demo { once } => on_runtime(demo::demo(*once, output, progress)),
        Command::Completions { shell } => Ok(packaging::completions(*shell, output)),
        Command::Man { page, directory: None } => packaging::man(page.as_deref(), output),
        Command::Man { directory: Some(directory), .. } => packaging::write_pages(directory),
    }
}

/// The longest wait for blocking disk work at the end. It may hang forever, as on a file system whose server is
/// unreachable, and must not keep the process from exiting.
const END_WAIT_MAX: Duration = Duration::from_secs(2);

/// Runs a command on one thread, since the network needs no more; hashing and disk use the blocking pool.
fn on_runtime(work: impl Future<Output = Result<Exit, Refusal>>) -> Result<Exit, Refusal> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        signals::ignore_unused()?;
        work.await
    });
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
