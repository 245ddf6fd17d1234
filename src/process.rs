//! The process seam: other programs.
//!
//! A program is started without a shell. It reads what we write to it, or nothing, runs in the folder `/`, and gets an environment of its own: what
//! [`INHERITED`] names of ours, and what its [`Command`] gives, so that no secret of ours reaches it that way. It leads a
//! group of processes, which receives our signals as a whole. The real form is [`RealProcesses`]; the simulated one is
//! `sim::processes::SimProcesses`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::BoxFuture;
use rustix::pipe::fcntl_setpipe_size;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::process::Child;

/// The variables of our environment that other programs get.
pub const INHERITED: [&str; 4] = ["PATH", "HOME", "LANG", "TZ"];

/// Where programs are looked for if our environment has no `PATH`, as the C library has it.
const PATH: &str = "/bin:/usr/bin";

/// What lies between a program and us: images go through it, and the 64 KiB that the system gives make us take turns. It is the most that
/// everybody may have (`/proc/sys/fs/pipe-max-size`).
const PIPE_BYTES: usize = 1 << 20;

/// A program with its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// An absolute path, or a name to be found in `PATH`.
    pub program: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Its environment, beside the variables of [`INHERITED`].
    pub environment: BTreeMap<String, String>,
    /// Whether we write to its standard input.
    pub has_input: bool,
}

/// Why a program cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// No folder of `PATH` has it.
    #[error("there is no program `{0}` in PATH: write its absolute path")]
    NotFound(String),
    /// A relative path would mean another file in another folder.
    #[error("`{0}` is neither an absolute path nor the name of a program in PATH")]
    Relative(String),
    /// Nothing is known of the file.
    #[error("cannot look at `{}`", .0.display())]
    Look(PathBuf, #[source] io::Error),
    /// It cannot be executed.
    #[error("`{}` is not an executable file: chmod +x makes a script one", .0.display())]
    NotExecutable(PathBuf),
    /// Everybody on this machine could have us run what they like.
    #[error("every user of this machine may change `{path}`: chmod o-w {path}", path = .0.display())]
    WorldWritable(PathBuf),
    /// The system does not start it.
    #[error("cannot start `{}`", .0.display())]
    Start(PathBuf, #[source] io::Error),
    /// A script without its first line.
    #[error("`{}` has no format that this system runs: a script begins with a line such as `#!/bin/sh`", .0.display())]
    Format(PathBuf),
}

/// What a program writes, as it comes.
pub type Output = Pin<Box<dyn AsyncRead + Send>>;

/// What a program reads. Dropped, it is at its end.
pub type Input = Pin<Box<dyn AsyncWrite + Send>>;

/// A program that was started. If it is dropped, the process is killed before its input ends: a program that takes the end
/// of its input for the end of its work must not do so.
pub struct Started {
    /// To wait for it, and to end it.
    pub process: Box<dyn Process>,
    /// Its standard input, if its command has one.
    pub stdin: Option<Input>,
    /// What it writes to its standard output.
    pub stdout: Output,
    /// What it writes to its standard error.
    pub stderr: Output,
}

/// A process, and the group that it leads. Dropped before it has ended, it is killed with its group.
pub trait Process: Send + Debug {
    /// Waits for the end of the process itself. What it began in the background may go on.
    ///
    /// # Errors
    /// Any error of the system.
    fn wait(&mut self) -> BoxFuture<'_, io::Result<ExitStatus>>;

    /// Asks the whole group to end.
    fn terminate(&mut self);

    /// Asks the whole group to end as Ctrl-C does, for programs that clean up only then.
    fn interrupt(&mut self);

    /// Ends the whole group, also what remains of it after the end of the process itself.
    fn kill(&mut self);
}

/// Starts programs.
pub trait Processes: Send + Sync + Debug {
    /// Where a program is, if it may be started.
    ///
    /// # Errors
    /// [`ProgramError`].
    fn find(&self, program: &str) -> Result<PathBuf, ProgramError>;

    /// Starts a program.
    ///
    /// # Errors
    /// [`ProgramError`] if it did not start.
    fn start(&self, command: &Command) -> Result<Started, ProgramError>;

    /// Kills everything that runs, with its groups: for a process that ends at once.
    fn kill_all(&self);
}

/// The leaders of groups that run.
type Groups = Arc<Mutex<BTreeSet<i32>>>;

fn running(groups: &Groups) -> MutexGuard<'_, BTreeSet<i32>> {
    groups.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The real form. Clones know of the same processes.
#[derive(Debug, Clone, Default)]
pub struct RealProcesses {
    groups: Groups,
}

impl Processes for RealProcesses {
    fn find(&self, program: &str) -> Result<PathBuf, ProgramError> {
        if program.starts_with('/') {
            let path = PathBuf::from(program);
            return check(&path).map(|()| path);
        }
        if program.is_empty() || program.contains('/') {
            return Err(ProgramError::Relative(program.to_owned()));
        }
        let path = std::env::var("PATH").unwrap_or_else(|_| PATH.to_owned());
        let mut unusable = None;
        // Folders that depend on where we were started are left out.
        for folder in path.split(':').filter(|folder| folder.starts_with('/')) {
            let path = Path::new(folder).join(program);
            match check(&path) {
                Ok(()) => return Ok(path),
                // Another program of this name must not take its place.
                Err(error @ ProgramError::WorldWritable(_)) => return Err(error),
                Err(error @ ProgramError::NotExecutable(_)) => unusable = unusable.or(Some(error)),
                Err(_) => {}
            }
        }
        Err(unusable.unwrap_or_else(|| ProgramError::NotFound(program.to_owned())))
    }

    fn start(&self, command: &Command) -> Result<Started, ProgramError> {
        let path = self.find(&command.program)?;
        let inherited = INHERITED.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
        let started = tokio::process::Command::new(&path)
            .args(&command.arguments)
            .env_clear()
            .envs(inherited)
            .envs(&command.environment)
            .current_dir("/")
            .stdin(if command.has_input { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn();
        let mut child = started.map_err(|error| match error.kind() {
            _ if error.raw_os_error() == Some(rustix::io::Errno::NOEXEC.raw_os_error()) => {
                ProgramError::Format(path.clone())
            }
            _ => ProgramError::Start(path.clone(), error),
        })?;
        // There is a number, since nothing has waited for it yet; and both were asked for.
        let group = child.id().and_then(|id| i32::try_from(id).ok());
        let (Some(group), Some(stdout), Some(stderr)) = (group, child.stdout.take(), child.stderr.take())
        else {
            return Err(ProgramError::Start(path, io::Error::other("it ended at once")));
        };
        running(&self.groups).insert(group);
        let mut process = RealProcess { child, group, groups: Arc::clone(&self.groups) };
        let stdin = process.child.stdin.take();
        // What the system refuses stays as it is.
        let _ = fcntl_setpipe_size(&stdout, PIPE_BYTES);
        let _ = stdin.as_ref().map(|stdin| fcntl_setpipe_size(stdin, PIPE_BYTES));
        let stdin = stdin.map(|stdin| Box::pin(stdin) as Input);
        Ok(Started { process: Box::new(process), stdin, stdout: Box::pin(stdout), stderr: Box::pin(stderr) })
    }

    fn kill_all(&self) {
        for group in &*running(&self.groups) {
            signal(*group, Signal::KILL);
        }
    }
}

/// Whether this file may be started.
fn check(path: &Path) -> Result<(), ProgramError> {
    let metadata = path.metadata().map_err(|error| ProgramError::Look(path.to_owned(), error))?;
    let mode = metadata.permissions().mode();
    if !metadata.is_file() || mode & 0o111 == 0 {
        return Err(ProgramError::NotExecutable(path.to_owned()));
    }
    if mode & 0o002 != 0 {
        return Err(ProgramError::WorldWritable(path.to_owned()));
    }
    Ok(())
}

fn signal(group: i32, signal: Signal) {
    if let Some(group) = Pid::from_raw(group) {
        // An error says that no process of the group is left.
        let _ = kill_process_group(group, signal);
    }
}

#[derive(Debug)]
struct RealProcess {
    child: Child,
    /// The number of the process, and of its group. Linux gives it to no other process while one of the group is left.
    group: i32,
    groups: Groups,
}

impl Process for RealProcess {
    fn wait(&mut self) -> BoxFuture<'_, io::Result<ExitStatus>> {
        Box::pin(async {
            let status = self.child.wait().await?;
            running(&self.groups).remove(&self.group);
            Ok(status)
        })
    }

    fn terminate(&mut self) {
        signal(self.group, Signal::TERM);
    }

    fn interrupt(&mut self) {
        signal(self.group, Signal::INT);
    }

    fn kill(&mut self) {
        signal(self.group, Signal::KILL);
    }
}

impl Drop for RealProcess {
    fn drop(&mut self) {
        if running(&self.groups).remove(&self.group) {
            self.kill();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::disk::{Access, RealDisk, replace_file};

    /// A script of the shell in this folder.
    fn script(folder: &Path, text: &str, mode: u32) -> PathBuf {
        let path = folder.join("script");
        replace_file(&RealDisk, &path, format!("#!/bin/sh\n{text}").as_bytes(), Access::Everyone).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    fn start(processes: &RealProcesses, program: &str, arguments: &[&str]) -> Started {
        let environment = BTreeMap::from([("FACT".to_owned(), "a b".to_owned())]);
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let program = program.to_owned();
        processes.start(&Command { program, arguments, environment, has_input: false }).unwrap()
    }

    async fn text(mut output: Output) -> String {
        let mut text = String::new();
        output.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn a_program_gets_its_arguments_as_they_are_and_a_small_environment() {
        let Started { mut process, stdout, stderr, .. } = start(
            &RealProcesses::default(),
            "sh",
            &["-c", "env; pwd; echo \"$1\" >&2; exit 7", "sh", "$(id) *"],
        );
        assert_eq!(text(stderr).await, "$(id) *\n");
        let said = text(stdout).await;
        // The shell adds some of its own.
        let own = ["PWD", "OLDPWD", "SHLVL", "_"];
        for line in said.lines().filter_map(|line| line.split_once('=')) {
            assert!([&INHERITED[..], &own, &["FACT"]].concat().contains(&line.0), "{line:?}");
        }
        assert!(said.contains("FACT=a b\n") && said.ends_with("\n/\n"), "{said}");
        assert_eq!(process.wait().await.unwrap().code(), Some(7));
    }

    #[tokio::test]
    async fn its_whole_group_ends_with_it() {
        for how in ["kill", "kill_all", "drop"] {
            let processes = RealProcesses::default();
            // The child keeps the pipe open for as long as it is there.
            let text_of_script = "trap '' TERM; (trap '' TERM; while :; do sleep 100; done) & echo; wait";
            let Started { mut process, mut stdout, stderr, .. } =
                start(&processes, "sh", &["-c", text_of_script]);
            assert_eq!(stdout.read_u8().await.unwrap(), b'\n');
            match how {
                "kill" => process.kill(),
                "kill_all" => processes.kill_all(),
                _ => drop(process),
            }
            assert_eq!(text(stdout).await + &text(stderr).await, "", "{how}");
        }
    }

    #[tokio::test]
    async fn asked_to_end_it_can_clean_up_and_what_it_leaves_can_still_be_killed() {
        let script = "(trap '' TERM; while :; do sleep 100; done) & trap 'echo bye; exit 4' TERM; echo; wait";
        let Started { mut process, mut stdout, .. } = start(&RealProcesses::default(), "sh", &["-c", script]);
        assert_eq!(stdout.read_u8().await.unwrap(), b'\n');
        process.terminate();
        assert_eq!(process.wait().await.unwrap().code(), Some(4));
        process.kill();
        assert_eq!(text(stdout).await, "bye\n");
    }

    #[tokio::test]
    async fn it_reads_what_is_written_to_it_and_dropped_it_never_sees_the_end_of_that() {
        let folder = tempfile::tempdir().unwrap();
        let ended = folder.path().join("ended");
        let command = |script: &str| Command {
            program: "sh".to_owned(),
            arguments: ["-c", script, "sh", ended.to_str().unwrap()].map(str::to_owned).into(),
            environment: BTreeMap::new(),
            has_input: true,
        };
        let mut started = RealProcesses::default().start(&command("cat; exit 3")).unwrap();
        let mut stdin = started.stdin.take().unwrap();
        stdin.write_all(b"abc").await.unwrap();
        drop(stdin);
        assert_eq!(text(started.stdout).await, "abc");
        assert_eq!(started.process.wait().await.unwrap().code(), Some(3));
        // As a program that saves what it has got once its input ends.
        for _ in 0..20 {
            let mut started = RealProcesses::default().start(&command("echo; cat; : > \"$1\"")).unwrap();
            assert_eq!(started.stdout.read_u8().await.unwrap(), b'\n');
            started.stdin.as_mut().unwrap().write_all(b"abc").await.unwrap();
            // It holds the pipe until its end.
            let stdout = std::mem::replace(&mut started.stdout, Box::pin(tokio::io::empty()));
            drop(started);
            text(stdout).await;
            assert!(!ended.exists());
        }
    }

    #[test]
    fn only_what_may_be_started_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let processes = RealProcesses::default();
        let found = |path: &Path| processes.find(path.to_str().unwrap());
        let path = script(folder.path(), "", 0o755);
        assert_eq!(found(&path).unwrap(), path);
        let link = folder.path().join("link");
        symlink(&path, &link).unwrap();
        assert_eq!(found(&link).unwrap(), link);
        script(folder.path(), "", 0o757);
        assert!(matches!(found(&link), Err(ProgramError::WorldWritable(_))));
        script(folder.path(), "", 0o644);
        assert!(matches!(found(&path), Err(ProgramError::NotExecutable(_))));
        assert!(matches!(found(folder.path()), Err(ProgramError::NotExecutable(_))));
        assert!(matches!(found(&folder.path().join("none")), Err(ProgramError::Look(..))));
        assert!(matches!(processes.find("bin/sh"), Err(ProgramError::Relative(_))));
        assert!(matches!(processes.find("no-such-program"), Err(ProgramError::NotFound(_))));
        assert!(processes.find("sh").unwrap().is_absolute());
    }
}
