//! Reads Rust sources as a graph: which file refers to which, and where such references form a circle.
//!
//! A file refers to another one by a path that begins with `crate::`, `super::` or `self::`, in an import or anywhere
//! else, and a file that declares modules refers to each of them. So a child that uses an item of the file that
//! declares it forms a circle, also if it gets there by a re-export.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use snapwarden::disk::read_named_file;

/// Texts by their path below `src`, with `/` between folders.
pub(crate) type Files = BTreeMap<String, String>;

/// A line that makes one file depend on another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Reference {
    from: String,
    line: usize,
    to: String,
}

/// The crate's sources without unit tests and comments.
pub(crate) fn sources() -> Files {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut files = Files::new();
    while let Some(folder) = folders.pop() {
        for entry in folder.read_dir().unwrap() {
            let path = entry.unwrap().path();
            if path.file_stem().is_some_and(|name| name == "tests" || name == "testing") {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&root).unwrap().to_str().unwrap();
                files.insert(name.to_owned(), code(&read_named_file(&path, 1 << 20).unwrap()));
            }
        }
    }
    files
}

/// The code of a file: whatever is only for unit tests, and all comments, become empty lines.
fn code(text: &str) -> String {
    let mut lines = text.lines();
    let mut code = Vec::new();
    while let Some(line) = lines.next() {
        let indentation = &line[..line.len() - line.trim_start().len()];
        if line.trim() != "#[cfg(test)]" {
            code.push(line.split("//").next().unwrap_or(""));
            continue;
        }
        code.push("");
        // The item ends, as rustfmt writes it, at the first line of its own indentation with a semicolon or a brace.
        for of_item in lines.by_ref() {
            code.push("");
            let is_inner = of_item.strip_prefix(indentation).is_none_or(|rest| rest.starts_with(' '));
            if !is_inner && (of_item.ends_with(';') || of_item.ends_with('}')) {
                break;
            }
        }
    }
    code.join("\n")
}

/// The module that a file defines: its names from the root of the crate.
fn module_of(file: &str) -> Vec<&str> {
    let mut names: Vec<&str> = file.trim_end_matches(".rs").split('/').collect();
    if matches!(names.last(), Some(&("mod" | "lib" | "main"))) {
        names.pop();
    }
    names
}

/// The file in which a path's item is defined: that of its longest part that names a module.
fn file_of(files: &Files, path: &[String]) -> Option<String> {
    (0..=path.len()).rev().find_map(|length| {
        let folder = path[..length].join("/");
        let names = match length {
            0 => ["lib.rs".to_owned(), "main.rs".to_owned()],
            _ => [format!("{folder}.rs"), format!("{folder}/mod.rs")],
        };
        names.into_iter().find(|name| files.contains_key(name))
    })
}

/// Reads the names of a path, or of all paths of a group `{a, b::{c, d}}`, and adds them to `paths` behind `prefix`.
/// Returns the rest of the text.
fn read_paths<'t>(mut text: &'t str, prefix: &[String], paths: &mut Vec<Vec<String>>) -> &'t str {
    if let Some(group) = text.strip_prefix('{') {
        text = group.trim_start();
        while !text.is_empty() && !text.starts_with('}') {
            text = read_paths(text, prefix, paths).trim_start();
            // Also behind `name as other`.
            let end = text.find([',', '}']).unwrap_or(text.len());
            text = text[end..].trim_start_matches(',').trim_start();
        }
        return text.strip_prefix('}').unwrap_or(text);
    }
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    let mut path = prefix.to_vec();
    match name {
        "" | "self" => {}
        "super" => drop(path.pop()),
        name => path.push(name.to_owned()),
    }
    match rest.strip_prefix("::") {
        Some(rest) if !rest.starts_with('<') => read_paths(rest, &path, paths),
        _ => {
            paths.push(path);
            rest
        }
    }
}

/// All paths of this crate in a file's code, from the root, each with its line.
pub(crate) fn paths(file: &str, code: &str) -> Vec<(usize, Vec<String>)> {
    let module: Vec<String> = module_of(file).into_iter().map(str::to_owned).collect();
    let root = if file == "main.rs" { "snapwarden::" } else { "crate::" };
    let mut found = Vec::new();
    for (prefix, base) in [(root, &[][..]), ("super::", &module), ("self::", &module)] {
        for (at, _) in code.match_indices(prefix) {
            let before = &code[..at];
            let is_part = before.ends_with(|c: char| c.is_alphanumeric() || "_:$".contains(c));
            // A visibility refers to nothing.
            if is_part || before.ends_with("pub(in ") {
                continue;
            }
            let start = if prefix == root { at + prefix.len() } else { at };
            let mut paths = Vec::new();
            read_paths(&code[start..], base, &mut paths);
            let line = before.matches('\n').count() + 1;
            found.extend(paths.into_iter().map(|path| (line, path)));
        }
    }
    found
}

/// The modules that a file's code declares, each with its line.
fn declared(code: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..).zip(code.lines()).filter_map(|(number, line)| {
        let (before, name) = line.strip_suffix(';')?.rsplit_once("mod ")?;
        (before.is_empty() || before.starts_with("pub")).then_some((number, name))
    })
}

fn references(files: &Files) -> BTreeSet<Reference> {
    let mut references = BTreeSet::new();
    for (from, code) in files {
        let module: Vec<String> = module_of(from).into_iter().map(str::to_owned).collect();
        let declared = declared(code).map(|(line, name)| (line, [&module[..], &[name.to_owned()]].concat()));
        for (line, path) in declared.chain(paths(from, code)) {
            if let Some(to) = file_of(files, &path).filter(|to| to != from) {
                references.insert(Reference { from: from.clone(), line, to });
            }
        }
    }
    references
}

/// Every circle of files: the lines by which its files refer to each other.
pub(crate) fn circles(files: &Files) -> Vec<Vec<String>> {
    let references = references(files);
    let mut reached: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for file in files.keys() {
        let mut next = vec![file.as_str()];
        let reached = reached.entry(file).or_default();
        while let Some(from) = next.pop() {
            let targets = references.iter().filter(|reference| reference.from == from);
            next.extend(targets.map(|reference| reference.to.as_str()).filter(|to| reached.insert(to)));
        }
    }
    let is_mutual = |one: &str, other: &str| reached[one].contains(other) && reached[other].contains(one);
    let mut circles: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for Reference { from, line, to } in &references {
        if is_mutual(from, to) {
            // The first file of the circle stands for it.
            let first = files.keys().find(|file| is_mutual(file, from)).unwrap();
            let text = files[from].lines().nth(line - 1).unwrap_or_default().trim();
            circles.entry(first).or_default().push(format!("{from}:{line} refers to {to}: {text}"));
        }
    }
    circles.into_values().collect()
}

/// Files as they would be read.
fn planted(files: &[(&str, &str)]) -> Files {
    files.iter().map(|(name, text)| ((*name).to_owned(), code(text))).collect()
}

/// The files that refer to another one of a circle.
fn in_circles(files: &[(&str, &str)]) -> Vec<String> {
    let circles = circles(&planted(files));
    let mut names: Vec<String> =
        circles.iter().flatten().map(|line| line.split(':').next().unwrap().to_owned()).collect();
    names.dedup();
    names
}

#[test]
fn a_planted_circle_of_two_is_found_however_they_refer_to_each_other() {
    let of_a = [
        "use crate::m::b::c::C;\n",
        "use crate::m::{\n    b::c::{self, C},\n    b::c as d,\n};\n",
        "use super::b::c::C;\n",
        "fn f() { crate::m::b::c::g() }\n",
    ];
    let of_c = [
        "use crate::m::a::A;\n",
        "use crate::{m::{a, a::A}};\n",
        "use super::super::a::A;\n",
        "type T = super::super::a::A;\n",
        "use self::super::super::a::{A};\n",
    ];
    for (a, c) in of_a.iter().flat_map(|a| of_c.iter().map(move |c| (a, c))) {
        let found = in_circles(&[
            ("lib.rs", "pub mod m;\n"),
            ("m/mod.rs", "mod a;\nmod b;\n"),
            ("m/a.rs", a),
            ("m/b/mod.rs", "pub mod c;\n"),
            ("m/b/c.rs", c),
        ]);
        assert_eq!(found, ["m/a.rs", "m/b/c.rs"], "{a} {c}");
    }
}

#[test]
fn a_child_that_uses_the_file_that_declares_it_is_a_circle() {
    for (parent, child, declaring, using) in [
        ("m/mod.rs", "m/a.rs", "mod a;\npub struct M;\n", "use crate::m::M;\n"),
        ("m.rs", "m/a.rs", "pub(crate) mod a;\npub struct M;\n", "use crate::m::{\n    M,\n};\n"),
        ("m/mod.rs", "m/a.rs", "mod a;\nfn f() {}\n", "fn g() { super::f() }\n"),
        ("m/mod.rs", "m/a.rs", "mod a;\nfn f() {}\n", "use self::super::f;\n"),
        // A re-export of another child's item.
        ("m/mod.rs", "m/a.rs", "mod a;\nmod b;\npub(crate) use self::b::B;\n", "use crate::m::B;\n"),
        ("m/mod.rs", "m/a/mod.rs", "pub mod a;\npub use crate::m::b::*;\nmod b;\n", "use super::*;\n"),
    ] {
        let mut files = vec![
            ("lib.rs", "pub mod m;\n"),
            ("m/b.rs", "pub struct B;\n"),
            (parent, declaring),
            (child, using),
        ];
        let mut expected = [parent, child];
        expected.sort_unstable();
        assert_eq!(in_circles(&files), expected, "{declaring} {using}");
        // The same for a grandchild.
        files.pop();
        files.extend([("m/a.rs", "mod deep;\n"), ("m/a/deep.rs", "use super::super::M;\n")]);
        let expected = ["m.rs", "m/a.rs", "m/a/deep.rs", "m/mod.rs"].map(str::to_owned);
        let expected: Vec<String> =
            expected.into_iter().filter(|name| files.iter().any(|file| file.0 == name)).collect();
        let mut found = in_circles(&files);
        found.sort();
        assert_eq!(found, expected, "{declaring}");
    }
}

#[test]
fn references_that_go_down_or_are_for_tests_alone_are_no_circle() {
    let found = in_circles(&[
        ("lib.rs", "//! See [`crate::m::a`].\npub mod m;\n"),
        (
            "m/mod.rs",
            "pub mod a;\nmod b;\nmod c;\nuse crate::m::a::A;\nfn f() { self::b::g() }\n#[cfg(test)]\nmod tests;\n",
        ),
        (
            "m/a.rs",
            "use crate::m::c::C;\n// use crate::m::M;\npub(in crate::m) struct A;\n#[cfg(test)]\nuse super::b::B;\n",
        ),
        (
            "m/b.rs",
            "use super::{a::A, c::C};\n\n#[cfg(test)]\nmod tests {\n    use super::*;\n    use crate::m::M;\n}\n",
        ),
        ("m/c.rs", "impl C {\n    #[cfg(test)]\n    fn f() {\n        crate::m::b::g();\n    }\n}\n"),
    ]);
    assert_eq!(found, Vec::<String>::new());
}
