//! The units, as systemd itself reads them, and what the journal gets.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use snapwarden::disk::{Access, RealDisk, replace_file};

use crate::stage::{read, skipped};

const SERVICES: [&str; 2] = ["snapwarden.service", "snapwarden-once.service"];
const TIMER: &str = "snapwarden-once.timer";

/// Where a package puts the program.
const INSTALLED: &str = "/usr/bin/snapwarden";

/// What a unit may be exposed to at most, in tenths, as `systemd-analyze security` counts it.
const EXPOSURE_MAX: &str = "20";

fn unit(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(name)
}

/// What systemd-analyze said, if that was anything but praise; none where it is not installed.
fn analyzed(arguments: &[&str], files: &[PathBuf]) -> Option<Result<(), String>> {
    let ended = match Command::new("systemd-analyze").args(arguments).args(files).output() {
        Ok(ended) => ended,
        Err(error) => {
            skipped(format_args!("systemd-analyze {}: {error}", arguments.join(" ")));
            return None;
        }
    };
    let (out, err) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    Some(if ended.status.success() && err.is_empty() { Ok(()) } else { Err(format!("{out}\n{err}")) })
}

#[test]
fn systemd_has_nothing_to_say_against_the_units() {
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<PathBuf> = SERVICES
        .into_iter()
        .chain([TIMER])
        .map(|name| {
            let text = read(&unit(name)).replace(INSTALLED, env!("CARGO_BIN_EXE_snapwarden"));
            let path = folder.path().join(name);
            replace_file(&RealDisk, &path, text.as_bytes(), Access::Owner).unwrap();
            path
        })
        .collect();
    if let Some(said) = analyzed(&["verify", "--man=no", "--recursive-errors=one"], &files) {
        said.unwrap_or_else(|said| panic!("{said}"));
    }
}

#[test]
fn a_service_is_exposed_to_little() {
    for name in SERVICES {
        let threshold = format!("--threshold={EXPOSURE_MAX}");
        let arguments = ["security", "--offline=true", "--no-pager", &threshold];
        if let Some(said) = analyzed(&arguments, &[unit(name)]) {
            said.unwrap_or_else(|said| panic!("{name}: {said}"));
        }
    }
}

/// The assignments of a unit from its user on: all that it may do.
fn permissions(name: &str) -> Vec<String> {
    let text = read(&unit(name));
    let lines = text.lines().skip_while(|line| !line.starts_with("User="));
    lines
        .take_while(|line| *line != "[Install]")
        .filter(|line| line.contains('=') && !line.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

#[test]
fn what_runs_once_may_do_no_more_than_the_daemon() {
    let daemon = permissions("snapwarden.service");
    assert!(daemon.len() > 30, "{daemon:?}");
    assert_eq!(permissions("snapwarden-once.service"), daemon);
}

#[test]
fn what_a_refused_start_says_has_its_priority_in_the_journal() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("snapwarden.toml");
    replace_file(&RealDisk, &config, b"one = 1\ntwo = 2\n", Access::Owner).unwrap();
    // Any file will do: the journal is what the variable and stderr agree upon.
    for (stream, priorities) in [(true, ["<4>", "<3>"]), (false, ["", ""])] {
        let journal = tempfile::NamedTempFile::new().unwrap();
        let found = journal.as_file().metadata().unwrap();
        let inode = if stream { found.ino() } else { found.ino() + 1 };
        let ended = Command::new(env!("CARGO_BIN_EXE_snapwarden"))
            .arg("--config")
            .arg(&config)
            .arg("check")
            .env("JOURNAL_STREAM", format!("{}:{inode}", found.dev()))
            .env("RUST_LOG", "a=b=c")
            .stderr(Stdio::from(journal.reopen().unwrap()))
            .status()
            .unwrap();
        let said = read(journal.path());
        assert_eq!(ended.code(), Some(78), "{said}");
        let mut lines = said.lines();
        let first = lines.next().unwrap();
        assert!(first.starts_with(priorities[0]) && first.contains("`RUST_LOG` is `a=b=c`"), "{said}");
        assert!(said.lines().count() > 3, "{said}");
        assert!(
            lines.all(|line| line.starts_with(priorities[1]) && (stream || !line.starts_with('<'))),
            "{said}"
        );
    }
}
