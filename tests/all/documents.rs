//! README and `docs`: their commands, configurations, figures of `simulate` and links are tried.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use clap::Parser as _;
use snapwarden::cli::args::Arguments;
use snapwarden::config;

use crate::command_line::is_there;
use crate::stage::{paths, read};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The pages by their paths.
fn pages() -> Vec<(String, String)> {
    let page = |name: String| (name.clone(), read(&Path::new(ROOT).join(name)));
    let docs = paths(&Path::new(ROOT).join("docs"))
        .into_iter()
        .filter(|path| path.extension().is_some_and(|end| end == "md"));
    let docs = docs.map(|path| format!("docs/{}", path.file_name().unwrap().to_str().unwrap()));
    docs.chain(["README.md".to_owned()]).map(page).collect()
}

/// The blocks of code of a page: their language, and their lines without the page's indentation.
fn blocks(page: &str) -> Vec<(String, Vec<String>)> {
    let mut blocks = Vec::new();
    let mut open: Option<(usize, String, Vec<String>)> = None;
    for line in page.lines() {
        let text = line.trim_start();
        match (&mut open, text.strip_prefix("```")) {
            (None, Some(language)) => open = Some((line.len() - text.len(), language.to_owned(), Vec::new())),
            (Some(_), Some(_)) => blocks.extend(open.take().map(|(_, language, lines)| (language, lines))),
            (Some((indent, _, lines)), None) => {
                lines.push(line.get(*indent..).unwrap_or_default().to_owned());
            }
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a block is not closed");
    blocks
}

/// Every command line of this program in a page: in blocks behind a prompt, and in the text between backticks.
fn commands(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (language, lines) in blocks(page) {
        if language == "console" {
            let joined = lines.join("\n").replace("\\\n", " ");
            let typed = joined.lines().filter_map(|line| line.strip_prefix("$ ")).map(str::to_owned);
            found.extend(typed.filter(|line| line.starts_with("snapwarden ")));
        }
    }
    let prose = page.split("```").step_by(2).collect::<String>();
    let spans = prose.split('`').skip(1).step_by(2);
    found.extend(spans.filter(|span| span.starts_with("snapwarden ")).map(|span| span.replace('\n', " ")));
    found
}

/// A command line with the words that stand for something replaced by samples.
fn arguments(command: &str) -> Option<Vec<String>> {
    let command = command.replace(" \\| ", " | ");
    let command = command.split(" | ").next()?.split(" > ").next()?.replace('…', "");
    let mut words = Vec::new();
    for (number, piece) in command.split('"').enumerate() {
        if number % 2 == 1 {
            words.push(piece.to_owned());
        } else {
            words.extend(piece.split_whitespace().map(str::to_owned));
        }
    }
    let sample = |word: String| match word.as_str() {
        "POLICY" => "nightly".to_owned(),
        "ARCHIVE" => "vault".to_owned(),
        "NAME" | "INSTANCE" => "db-1".to_owned(),
        "SNAPSHOT" => "9ee8cb98".to_owned(),
        "N" => "5".to_owned(),
        "Z" => "ch-gva-2".to_owned(),
        "TIME" => "yesterday".to_owned(),
        "SHELL" => "bash".to_owned(),
        _ => word,
    };
    Some(words.into_iter().map(sample).collect())
}

#[test]
fn every_command_of_a_page_exists_with_these_arguments() {
    let mut tried = BTreeSet::new();
    let mut wrong = Vec::new();
    for (page, text) in pages() {
        for command in commands(&text) {
            let words = arguments(&command).unwrap();
            if let Err(error) = Arguments::try_parse_from(&words) {
                // A name alone, as in "`snapwarden restore` does".
                let is_name =
                    words.len() <= 3 && error.kind() == clap::error::ErrorKind::MissingRequiredArgument;
                if !is_name {
                    wrong.push(format!("{page}: `{command}`: {error}"));
                }
            }
            tried.insert(command);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(tried.len() > 40, "{tried:?}");
}

#[test]
fn every_configuration_of_a_page_is_valid() {
    let archives = "[archives.vault]\ntype = \"local\"\npath = \"/srv/a\"\n[archives.offsite]\ntype = \"local\"\npath = \"/srv/b\"\n";
    let policy = |name: &str| format!("[policies.{name}]\nschedule = \"@daily\"\nzones = [\"ch-gva-2\"]\n");
    let mut tried = 0;
    for (page, text) in pages() {
        for (language, lines) in blocks(&text) {
            if language != "toml" {
                continue;
            }
            tried += 1;
            let text = lines.join("\n");
            let tables: BTreeSet<&str> =
                lines.iter().filter_map(|line| line.strip_prefix('[')?.split(']').next()).collect();
            let mut whole = text.clone();
            // What the page leaves out.
            if !tables.iter().any(|table| table.starts_with("archives.")) && text.contains("archives = ") {
                let _ = write!(whole, "\n{archives}");
            }
            let named: BTreeSet<&str> = tables
                .iter()
                .filter_map(|table| table.strip_prefix("policies.")?.split('.').next())
                .collect();
            for name in named.iter().filter(|name| !tables.contains(format!("policies.{name}").as_str())) {
                let _ = write!(whole, "\n{}", policy(name));
            }
            if named.is_empty() {
                let _ = write!(whole, "\n{}[policies.any.retention]\nkeep_last = 1\n", policy("any"));
            }
            config::parse(&whole, &page, None).unwrap_or_else(|error| panic!("{page}: {error}\n{whole}"));
        }
    }
    assert!(tried > 10, "{tried}");
}

/// The samples of the policies by example, with the arguments of their `simulate`.
fn simulations() -> Vec<(String, Vec<String>)> {
    let command = |(_, lines): (String, Vec<String>)| {
        let command = lines[0].strip_prefix("$ snapwarden --config docs/policies.toml ")?.to_owned();
        Some((command, lines))
    };
    let found: Vec<_> =
        blocks(include_str!("../../docs/policies.md")).into_iter().filter_map(command).collect();
    assert_eq!(found.len(), 8);
    found
}

fn simulated(command: &str) -> String {
    let mut program = assert_cmd::Command::new(env!("CARGO_BIN_EXE_snapwarden"));
    program.current_dir(ROOT).args(["--config", "docs/policies.toml"]).args(command.split(' '));
    String::from_utf8(program.output().unwrap().stdout).unwrap()
}

#[test]
fn the_policies_by_example_leave_what_their_page_says() {
    let policies = include_str!("../../docs/policies.toml");
    for (language, lines) in blocks(include_str!("../../docs/policies.md")) {
        let text = lines.join("\n");
        assert!(
            language != "toml" || policies.contains(text.trim()),
            "docs/policies.toml has another:\n{text}"
        );
    }
    for (command, lines) in simulations() {
        let said = simulated(&command);
        let shown = lines[1..].iter().filter(|line| *line != "[…]").cloned().collect::<Vec<_>>().join("\n");
        assert!(said.contains(&shown), "`{command}` does not say\n{shown}\nbut\n{said}");
    }
}

#[test]
fn the_pictures_of_the_policies_are_what_simulate_draws() {
    for (command, _) in simulations() {
        let policy = command.split(' ').nth(1).unwrap();
        let stored = read(&Path::new(ROOT).join(format!("docs/pictures/{policy}.svg")));
        let is_same = simulated(&format!("{command} --output svg")) == stored;
        assert!(is_same, "draw it again: snapwarden {command} --output svg > docs/pictures/{policy}.svg");
    }
}

/// As pages of Git hosts make them.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    kept.chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

#[test]
fn every_link_leads_to_something() {
    let pages = pages();
    let mut tried = 0;
    for (page, text) in &pages {
        let folder = Path::new(page).parent().unwrap();
        let prose = text.split("```").step_by(2).collect::<String>();
        for link in prose.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            tried += 1;
            let (file, section) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.into() } else { folder.join(file) };
            let target = Path::new(ROOT).join(target);
            assert!(is_there(&target), "{page}: {link}");
            if !section.is_empty() {
                let anchors: Vec<String> = read(&target)
                    .lines()
                    .filter(|line| line.starts_with('#'))
                    .map(|line| anchor(line.trim_start_matches('#')))
                    .collect();
                assert!(anchors.iter().any(|anchor| anchor == section), "{page}: {link}");
            }
        }
    }
    assert!(tried > 30, "{tried}");
}

#[test]
fn the_first_page_is_short() {
    let lines = include_str!("../../README.md").lines().count();
    assert!(lines <= 250, "{lines}");
}

/// The names of all functions of the sources and the tests.
fn functions() -> BTreeSet<String> {
    let root = Path::new(ROOT);
    let sources = ["src", "tests"].into_iter().flat_map(|folder| paths(&root.join(folder)));
    let sources = sources.filter(|path| path.extension().is_some_and(|end| end == "rs"));
    let name = |rest: &str| rest.chars().take_while(|one| one.is_alphanumeric() || *one == '_').collect();
    // The short cuts of the fuzz targets are made by a macro: `name: "target", 400;`.
    let by_macro = |line: &str| line.trim_start().split_once(": \"").map(|(before, _)| before.to_owned());
    let names = |text: String| -> Vec<String> {
        let functions = text.split("fn ").skip(1).map(name);
        functions.chain(text.lines().filter_map(by_macro)).collect()
    };
    sources.map(|path| read(&path)).flat_map(names).collect()
}

#[test]
fn every_row_of_the_security_page_names_tests_that_exist() {
    let page = read(&Path::new(ROOT).join("docs/security.md"));
    let (_, rows) = page.split_once("| who | could | what stands against it | tests |\n").unwrap();
    let rows: Vec<&str> = rows.lines().skip(1).take_while(|line| line.starts_with('|')).collect();
    let functions = functions();
    for row in &rows {
        let tests = row.trim_end_matches([' ', '|']).rsplit_once(" | ").unwrap().1;
        let named: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
        assert!(!named.is_empty(), "{row}");
        for name in named {
            let is_there = functions.contains(name) || Path::new(ROOT).join(name).exists();
            assert!(is_there, "there is no test `{name}`");
        }
    }
    assert!(rows.len() >= 11, "{rows:?}");
}

#[test]
fn every_dependency_has_its_reason() {
    let package: toml::Table = toml::from_str(&read(&Path::new(ROOT).join("Cargo.toml"))).unwrap();
    let names = |section: &str| package[section].as_table().unwrap().keys().cloned();
    let used: BTreeSet<String> = names("dependencies").chain(names("dev-dependencies")).collect();
    let page = read(&Path::new(ROOT).join("docs/developers.md"));
    let (_, rows) = page.split_once("| dependency | why |\n").unwrap();
    let mut told = BTreeSet::new();
    for row in rows.lines().skip(1).take_while(|line| line.starts_with('|')) {
        let (names, why) = row.trim_matches(['|', ' ']).split_once(" | ").unwrap();
        assert!(why.len() > 10, "{row}");
        told.extend(names.split('`').skip(1).step_by(2).map(str::to_owned));
    }
    assert_eq!(told, used);
}
