//! Reads the sources and holds the floors that `src/lib.rs` draws.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use snapwarden::disk::read_named_file;

const SEAMS: &[&str] = &["clock", "disk", "randomness", "transport"];
/// Ground above the seams.
const HELPERS: &[&str] = &["retry"];
const NOUNS: &[&str] = &["policy", "schedule", "snapshot", "text"];
const PILLARS: &[&str] = &["archive", "config", "exoscale", "retention", "state"];

/// Which rooms each room may use, beside itself.
fn allowed() -> BTreeMap<&'static str, BTreeSet<&'static str>> {
    let all = |lists: &[&[&'static str]]| lists.concat().into_iter().collect::<BTreeSet<_>>();
    let mut rooms = BTreeMap::new();
    for noun in NOUNS {
        rooms.insert(*noun, all(&[NOUNS]));
    }
    for seam in SEAMS {
        rooms.insert(*seam, all(&[&["text"]]));
    }
    for helper in HELPERS {
        rooms.insert(*helper, all(&[NOUNS, SEAMS]));
    }
    for pillar in PILLARS {
        rooms.insert(*pillar, all(&[NOUNS, SEAMS, HELPERS]));
    }
    // Pure: no seam at all.
    rooms.insert("retention", all(&[NOUNS]));
    rooms.insert("picture", all(&[NOUNS]));
    rooms.insert("sim", all(&[NOUNS, SEAMS]));
    rooms.insert("run", all(&[NOUNS, SEAMS, &["archive", "exoscale", "retention", "state"]]));
    rooms.insert("telemetry", all(&[NOUNS, SEAMS, &["archive", "exoscale", "run", "state"]]));
    rooms.insert("daemon", all(&[NOUNS, SEAMS, PILLARS, &["run", "telemetry"]]));
    rooms.insert("cli", all(&[NOUNS, SEAMS, PILLARS, &["daemon", "picture", "run", "sim", "telemetry"]]));
    rooms.insert("main", all(&[&["cli"]]));
    rooms.insert("lib", BTreeSet::new());
    rooms
}

/// Every source but those of unit tests that have files of their own.
fn sources() -> Vec<(PathBuf, String)> {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().unwrap() {
            let path = entry.unwrap().path();
            if path.file_stem().is_some_and(|name| name == "tests") {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = read_named_file(&path, 1 << 20).unwrap();
                files.push((path, text));
            }
        }
    }
    files.sort();
    files
}

/// The room of a file: the first folder or file name below `src`.
fn room_of(path: &Path) -> String {
    let below = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    let first = below.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// The code of a file without its unit tests and without comments.
fn code(text: &str) -> String {
    let before_tests = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap();
    let lines = before_tests.lines().map(|line| line.split("//").next().unwrap_or(""));
    lines.collect::<Vec<_>>().join("\n")
}

/// Every room that a code names by a path of this crate.
fn used(code: &str) -> BTreeSet<String> {
    let mut rooms = BTreeSet::new();
    for prefix in ["crate::", "snapwarden::"] {
        for (place, _) in code.match_indices(prefix) {
            let rest = &code[place + prefix.len()..];
            let names = match rest.strip_prefix('{') {
                Some(group) => {
                    panic!("name each room on its own line, not {prefix}{{{}", &group[..group.len().min(30)])
                }
                None => rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or(""),
            };
            rooms.insert(names.to_owned());
        }
    }
    rooms
}

#[test]
fn no_room_reaches_beside_or_above_itself() {
    let allowed = allowed();
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let room = room_of(&path);
        let may =
            allowed.get(&*room).unwrap_or_else(|| panic!("{} is no room that lib.rs draws", path.display()));
        for target in used(&code(&text)) {
            if target != room && !may.contains(&*target) {
                wrong.push(format!("{}: `{room}` may not use `{target}`", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn retention_is_pure() {
    for (path, text) in sources().iter().filter(|(path, _)| room_of(path) == "retention") {
        let code = code(text);
        for impure in ["async ", ".await", "tracing", "std::fs", "std::env", "std::io", "tokio", "Mutex"] {
            assert!(!code.contains(impure), "{} holds `{impure}`", path.display());
        }
    }
}

#[test]
fn a_snapshot_is_deleted_in_one_place_alone() {
    let callers: Vec<String> = sources()
        .iter()
        .filter(|(path, text)| room_of(path) != "exoscale" && code(text).contains(".delete_snapshot("))
        .map(|(path, _)| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    // `check --online` tries the permission on an id that names nothing.
    assert_eq!(callers, ["check.rs", "prune.rs"]);
}

#[test]
fn the_simulated_zone_is_known_to_the_demo_alone() {
    let users: Vec<String> = sources()
        .iter()
        .filter(|(path, text)| room_of(path) != "sim" && used(&code(text)).contains("sim"))
        .map(|(path, _)| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert!(users.iter().all(|user| user == "demo.rs"), "{users:?}");
}

#[test]
fn lib_re_exports_nothing_and_no_room_imports_by_glob() {
    for (path, text) in sources() {
        let code = code(&text);
        assert!(!code.contains("pub use "), "{} re-exports", path.display());
        assert!(
            !code.lines().any(|line| line.starts_with("use ") && line.ends_with("::*;")),
            "{}",
            path.display()
        );
    }
}
