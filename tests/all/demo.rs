//! The demo as a process, and the commands that it prints for a second terminal.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use snapwarden::disk::{Disk as _, RealDisk};

/// After this line only the daemon prints.
const LAST_LINE: &str = "This is its log:";

/// In the environment of the demo: an account that can't be reached, and must never be used.
const ELSEWHERE: [(&str, &str); 3] = [
    ("EXOSCALE_API_ENDPOINT", "http://127.0.0.1:1/v2"),
    ("EXOSCALE_API_KEY", "EXOelsewhere"),
    ("EXOSCALE_API_SECRET", "elsewhere"),
];

/// A running demo and its output.
struct Running {
    child: Child,
    said: Vec<String>,
    folder: tempfile::TempDir,
}

impl Running {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_snapwarden"))
            .arg("demo")
            .env("TMPDIR", folder.path())
            .envs(ELSEWHERE)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = Vec::new();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        while !said.last().is_some_and(|line: &String| line.contains(LAST_LINE)) {
            said.push(lines.next().unwrap_or_else(|| panic!("it ended after {said:?}")).unwrap());
        }
        Self { child, said, folder }
    }

    /// Waits until the daemon is there.
    fn listens(&mut self) {
        let mut log = BufReader::new(self.child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let said = log.by_ref().find(|line| line.contains("listens on"));
        assert!(said.is_some(), "it ended before it listened");
        // Its later output must be read, or it would block.
        std::thread::spawn(move || log.for_each(drop));
    }

    /// The commands for a second terminal, as printed.
    fn commands(&self) -> Vec<&str> {
        let lines = self.said.iter().filter_map(|line| line.strip_prefix("    "));
        lines.filter(|line| line.starts_with("env ") || line.starts_with("curl ")).collect()
    }

    fn interrupt(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Nothing to do where it has ended, as it should have.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Pastes a command into a shell.
fn paste(command: &str) -> Output {
    Command::new("sh").args(["-c", command]).envs(ELSEWHERE).output().unwrap()
}

fn names_in(folder: &Path) -> Vec<String> {
    RealDisk.list(folder).unwrap().iter().map(|entry| entry.name.to_string_lossy().into_owned()).collect()
}

/// Asks the address of a `curl` line, as curl does.
fn get(command: &str) -> String {
    let address = command.strip_prefix("curl http://").unwrap();
    let (host, path) = address.split_once('/').unwrap();
    let mut stream = TcpStream::connect(host).unwrap();
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn the_commands_for_a_second_terminal_work_and_ctrl_c_leaves_nothing() {
    let mut demo = Running::start();
    demo.listens();
    let readme = include_str!("../../README.md");
    let (introduction, _) = readme.split_once("demo\n").unwrap().1.split_once("\nTo look at it").unwrap();
    assert!(demo.said.join("\n").starts_with(introduction), "the README shows another: {:#?}", demo.said);
    // Commands have paths, and stay in one piece.
    let is_command = |line: &&String| line.starts_with("    ") && line.contains(['/', '\\']);
    for line in demo.said.iter().filter(|line| !is_command(line)) {
        assert!(line.chars().count() <= 80, "{line}");
    }
    let commands: Vec<String> = demo.commands().into_iter().map(str::to_owned).collect();
    let on_hold = commands.iter().find_map(|command| command.split(" hold ").nth(1)?.split(' ').next());
    let on_hold = on_hold.unwrap_or_else(|| panic!("no `hold`: {commands:#?}"));
    // In the order of the output: a part of each command, and of what it prints.
    let mut table = vec![
        (" status", "golden"),
        (" plan nightly", "web-1"),
        (" once nightly", "policy nightly: success"),
        (" archive list", "vault"),
        (" check --online", "delete-snapshot"),
        (" allow nightly 40", "up to 40 deletions"),
        (" hold ", "is on hold forever: before the upgrade"),
        (" holds", on_hold),
        (" unhold ", "is no longer on hold"),
    ]
    .into_iter();
    for command in &commands {
        if command.starts_with("curl ") {
            continue;
        }
        let (part, word) = table.next().unwrap_or_else(|| panic!("`{command}` is not tried here"));
        assert!(command.contains(part), "`{part}` is missing in its place: {commands:#?}");
        let ended = paste(command);
        let (out, err) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
        // It may find the policy locked by a run of the daemon, and says so.
        let met = part == " once nightly" && err.contains("is locked by another process");
        assert!(met || (ended.status.success() && out.contains(word)), "{command}: {ended:?}\n{out}\n{err}");
    }
    assert_eq!(table.next(), None, "{commands:#?}");
    for (path, word) in
        [("/metrics", "snapwarden_policy_enabled{policy=\"fresh\"} 1"), ("/api/v1/status", "\"golden\": {")]
    {
        let command = commands.iter().find(|command| command.starts_with("curl ") && command.ends_with(path));
        let answer = get(command.unwrap_or_else(|| panic!("no `curl` of {path}: {commands:#?}")));
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(word), "{path}: {answer}");
    }

    assert_eq!(names_in(demo.folder.path()).len(), 1);
    demo.interrupt();
    let mut rest = String::new();
    demo.child.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
    assert_eq!(demo.child.wait().unwrap().code(), Some(0), "{rest}");
    assert_eq!(names_in(demo.folder.path()), Vec::<String>::new());
    // No daemon is left to answer.
    let status = paste(commands.iter().find(|command| command.ends_with(" status")).unwrap());
    assert_eq!(status.status.code(), Some(1), "{status:?}");

    // Not even if the signal arrives before the daemon has started, and twice.
    let mut demo = Running::start();
    for _ in 0..2 {
        demo.interrupt();
    }
    // If nothing was in progress, the second signal arrives too late to matter.
    let code = demo.child.wait().unwrap().code();
    assert!(matches!(code, Some(0 | 1)), "{code:?}");
    assert_eq!(names_in(demo.folder.path()), Vec::<String>::new());
}

#[test]
fn all_that_is_shown_once_fits_into_80_columns() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_snapwarden"));
    command.args(["demo", "--once"]).env("TMPDIR", folder.path()).env("COLUMNS", "80").envs(ELSEWHERE);
    let ended = command.output().unwrap();
    let said = String::from_utf8(ended.stdout).unwrap();
    assert!(ended.status.success() && said.contains(" of 49 snapshots"), "{said}");
    // The folder's path is as long as it is.
    for line in said.lines().filter(|line| !line.contains(folder.path().to_str().unwrap())) {
        assert!(line.chars().count() <= 80, "{line}");
    }
}
