//! Reads the sources and checks the layers that `src/lib.rs` draws, and the order of files inside each module.

use std::collections::{BTreeMap, BTreeSet};

use crate::sources::{Files, circles, paths, sources};

const SEAMS: &[&str] = &["clock", "disk", "process", "randomness", "transport"];
const NOUNS: &[&str] = &["copies", "lookup", "policy", "schedule", "snapshot", "text"];
/// Built on the seams, for all that is above them.
const HELPERS: &[&str] = &["credentials", "lock", "retry"];
const PILLARS: &[&str] = &["archive", "config", "exoscale", "retention", "state"];

/// Which modules each module may use, beside itself.
fn allowed() -> BTreeMap<&'static str, BTreeSet<&'static str>> {
    let all = |lists: &[&[&'static str]]| lists.concat().into_iter().collect::<BTreeSet<_>>();
    let mut modules = BTreeMap::new();
    for noun in NOUNS {
        modules.insert(*noun, all(&[NOUNS]));
    }
    for seam in SEAMS {
        modules.insert(*seam, all(&[&["text"]]));
    }
    for helper in HELPERS {
        modules.insert(*helper, all(&[NOUNS, SEAMS]));
    }
    for pillar in PILLARS {
        modules.insert(*pillar, all(&[NOUNS, SEAMS, HELPERS]));
    }
    // Pure: no seam at all.
    modules.insert("retention", all(&[NOUNS]));
    // It shares nothing with what it judges: of this crate, the nouns that it cannot do without.
    modules.insert("judge", all(&[&["policy", "schedule", "snapshot"]]));
    modules.insert("picture", all(&[NOUNS]));
    modules.insert("sim", all(&[NOUNS, SEAMS]));
    modules.insert(
        "run",
        all(&[NOUNS, SEAMS, HELPERS, &["archive", "exoscale", "judge", "retention", "state"]]),
    );
    modules.insert("restore", all(&[NOUNS, SEAMS, HELPERS, &["archive", "exoscale", "run", "state"]]));
    modules.insert("telemetry", all(&[NOUNS, SEAMS, HELPERS, &["archive", "exoscale", "run", "state"]]));
    modules.insert("daemon", all(&[NOUNS, SEAMS, HELPERS, PILLARS, &["picture", "run", "telemetry"]]));
    let of_cli = &["daemon", "judge", "picture", "restore", "run", "sim", "telemetry"];
    modules.insert("cli", all(&[NOUNS, SEAMS, HELPERS, PILLARS, of_cli]));
    modules.insert("main", all(&[&["cli"]]));
    modules.insert("lib", BTreeSet::new());
    modules
}

/// The module of a file: the first folder or file name below `src`.
fn module_of(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

/// The modules that a file names by a path of this crate.
fn used(file: &str, code: &str) -> BTreeSet<String> {
    paths(file, code).into_iter().filter_map(|(_, path)| path.into_iter().next()).collect()
}

/// Each use of a module beside or above the user's own.
fn not_allowed(files: &Files) -> Vec<String> {
    let allowed = allowed();
    let mut wrong = Vec::new();
    for (file, code) in files {
        let module = module_of(file);
        let may = allowed.get(module).unwrap_or_else(|| panic!("{file} is in no module that lib.rs draws"));
        let uses = used(file, code).into_iter();
        let uses = uses.filter(|target| target != module && !may.contains(target.as_str()));
        wrong.extend(uses.map(|target| format!("{file}: `{module}` may not use `{target}`")));
    }
    wrong
}

#[test]
fn no_module_uses_one_beside_or_above_itself() {
    let wrong = not_allowed(&sources());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_planted_use_upward_or_sideways_is_found() {
    for (file, code, target) in [
        ("retention/plan.rs", "use crate::run::Runner;", "run"),
        ("retention/plan.rs", "use crate::{\n    policy::Policy,\n    disk::Disk,\n};", "disk"),
        ("archive/local.rs", "fn f() { super::super::state::open() }", "state"),
        ("clock.rs", "use super::snapshot::Snapshot;", "snapshot"),
        ("main.rs", "use snapwarden::daemon;", "daemon"),
        ("judge/table.rs", "use crate::retention::age::AgeTable;", "retention"),
        ("judge/mod.rs", "fn f() { crate::run::second_judge::plan_again() }", "run"),
        ("judge/case.rs", "use crate::text::printable;", "text"),
        ("retention/combine.rs", "use crate::judge::rulings;", "judge"),
    ] {
        let files = Files::from([(file.to_owned(), code.to_owned())]);
        let module = module_of(file);
        assert_eq!(not_allowed(&files), [format!("{file}: `{module}` may not use `{target}`")]);
    }
}

#[test]
fn no_files_form_a_circle_and_none_uses_the_file_that_declares_it() {
    let circles: Vec<String> = circles(&sources()).into_iter().map(|lines| lines.join("\n  ")).collect();
    assert!(circles.is_empty(), "circles:\n\n  {}", circles.join("\n\n  "));
}

#[test]
fn retention_and_its_second_judge_are_pure() {
    let pure = ["judge", "retention"];
    for (file, code) in sources().iter().filter(|(file, _)| pure.contains(&module_of(file))) {
        for impure in ["async ", ".await", "tracing", "std::fs", "std::env", "std::io", "tokio", "Mutex"] {
            assert!(!code.contains(impure), "{file} contains `{impure}`");
        }
    }
}

#[test]
fn a_snapshot_is_deleted_in_one_place_alone() {
    let mut callers = sources();
    callers.retain(|file, code| module_of(file) != "exoscale" && code.contains(".delete_snapshot("));
    // `check --online` tries the permission on an id that names nothing.
    assert_eq!(callers.into_keys().collect::<Vec<_>>(), ["cli/check.rs", "run/delete.rs"]);
}

#[test]
fn the_simulated_zone_is_known_to_the_demo_alone() {
    let mut users = sources();
    users.retain(|file, code| module_of(file) != "sim" && used(file, code).contains("sim"));
    assert_eq!(users.into_keys().collect::<Vec<_>>(), ["cli/demo.rs"]);
}

#[test]
fn nothing_is_re_exported_and_imports_name_each_module_on_a_line_of_its_own() {
    for (file, code) in sources() {
        for line in code.lines() {
            let is_re_export = line.starts_with("pub") && line.contains(" use ");
            assert!(!is_re_export, "{file} re-exports: {line}");
            let is_vague = line.starts_with("use ") && (line.ends_with("::*;") || line.contains("crate::{"));
            assert!(!is_vague, "{file} does not name what it imports: {line}");
        }
    }
}
