//! For packagers: completions and the manual pages.

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use clap::CommandFactory as _;
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::cli::args::Arguments;
use crate::cli::exit::{Exit, Refusal};
use crate::cli::manual::{self, ENVIRONMENT, FILES, Facts, Page, Topic};
use crate::cli::output::Output;
use crate::disk::{Access, RealDisk, create_folders, replace_file};

const NAME: &str = "snapwarden";
const SOURCE: &str = concat!("snapwarden ", env!("CARGO_PKG_VERSION"));
const CONFIGURATION_FILE: &str = "snapwarden.toml";

/// Every key with its explanation: what snapwarden.toml(5) is made of.
const FULL_CONFIGURATION: &str = include_str!("../../config/full.toml");
const MINIMAL_CONFIGURATION: &str = include_str!("../../config/minimal.toml");

/// Prints the completions for a shell.
pub fn completions(shell: Shell, output: Output) -> Exit {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), NAME, &mut script);
    output.print_bytes(&script);
    Exit::Done
}

/// A manual page.
struct Manual {
    name: String,
    section: u8,
    text: String,
}

/// Prints a manual page; without a name the program's.
///
/// # Errors
/// [`Refusal`] if there is no such page.
pub fn man(wanted: Option<&str>, output: Output) -> Result<Exit, Refusal> {
    let pages = pages()?;
    let short = |page: &'_ Manual| page.name.strip_prefix("snapwarden-").unwrap_or(&page.name).to_owned();
    let wanted = wanted.unwrap_or(NAME);
    let Some(page) = pages.iter().find(|page| page.name == wanted || short(page) == wanted) else {
        let known: Vec<String> = pages.iter().map(short).collect();
        return Err(Refusal::usage(format!("there is no page `{wanted}`; there are {}", known.join(", "))));
    };
    output.print(&page.text);
    Ok(Exit::Done)
}

/// Writes all manual pages into the folders `man1` and `man5` of a directory.
///
/// # Errors
/// [`Refusal`] if a file can't be written.
pub fn write_pages(directory: &Path) -> Result<Exit, Refusal> {
    for Manual { name, section, text } in pages()? {
        let folder = directory.join(format!("man{section}"));
        let path = folder.join(format!("{name}.{section}"));
        create_folders(&RealDisk, &folder, Access::Everyone)
            .and_then(|()| replace_file(&RealDisk, &path, text.as_bytes(), Access::Everyone))
            .map_err(|error| Refusal::failed(format!("write the page {}: {error}", path.display())))?;
    }
    Ok(Exit::Done)
}

fn pages() -> io::Result<Vec<Manual>> {
    let mut program = Arguments::command().disable_help_subcommand(true);
    program.build();
    let mut pages = Vec::new();
    add_pages(&program, &mut pages)?;
    pages.push(Manual {
        name: CONFIGURATION_FILE.to_owned(),
        section: 5,
        text: finished(&configuration_page().render()),
    });
    Ok(pages)
}

/// Adds the page of a command, and of those below it.
fn add_pages(command: &clap::Command, pages: &mut Vec<Manual>) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    pages.push(Manual { text: finished(&command_page(&name, command)?), name, section: 1 });
    command.get_subcommands().try_for_each(|below| add_pages(below, pages))
}

fn command_page(name: &str, command: &clap::Command) -> io::Result<String> {
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim().to_owned();
    let is_program = name == NAME;
    // Their own options would be lost between those of every command.
    let shown = command.clone().override_usage(usage).mut_args(|option| {
        let is_common = option.is_global_set() && !is_program;
        option.hide(is_common)
    });
    let man = Man::new(shown);
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let description = command.get_long_about().map_or_else(|| about.clone(), ToString::to_string);

    let mut page = Vec::new();
    beginning(name, 1, about.split([':', ';']).next().unwrap_or_default()).to_writer(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    let mut roff = Roff::new();
    roff.control("SH", ["DESCRIPTION"]);
    paragraphs(&mut roff, &description);
    roff.to_writer(&mut page)?;
    man.render_options_section(&mut page)?;
    if !is_program {
        let common = "Options of every command, such as `--config` and `--output`, are in snapwarden(1).";
        let mut roff = Roff::new();
        roff.control("PP", []);
        roff.text([roman(common)]);
        roff.to_writer(&mut page)?;
    }
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let words = command.get_bin_name().unwrap_or(NAME).trim_start_matches(NAME).trim();
    if let Some(facts) = manual::page(words) {
        facts_of(facts).to_writer(&mut page)?;
    }
    String::from_utf8(page).map_err(io::Error::other)
}

/// The sections of a command's page that its help does not have.
fn facts_of(page: &Page) -> Roff {
    let mut roff = Roff::new();
    let common = [Exit::Done, Exit::Failed, Exit::Usage];
    let exits = Exit::ALL.into_iter().filter(|exit| common.contains(exit) || page.exits.contains(exit));
    entries(&mut roff, "EXIT STATUS", exits.map(|exit| ((exit as u8).to_string(), exit.meaning())));
    of_topics(&mut roff, "ENVIRONMENT", ENVIRONMENT, page.topics);
    of_topics(&mut roff, "FILES", FILES, page.topics);
    if !page.topics.is_empty() {
        entries(&mut roff, "SIGNALS", manual::signals(page.command));
    }
    roff.control("SH", ["EXAMPLES"]);
    for (number, (purpose, commands)) in page.examples.iter().enumerate() {
        if number > 0 {
            roff.control("PP", []);
        }
        roff.text([roman(*purpose)]);
        let lines: Vec<String> = commands
            .lines()
            .map(|line| if line.starts_with(' ') { line.to_owned() } else { format!("{NAME} {line}") })
            .collect();
        example(&mut roff, lines.iter().map(String::as_str));
    }
    see_also(&mut roff, if page.command.is_empty() { NAME } else { "" }, page.related);
    roff
}

/// snapwarden.toml(5), made of the configuration with every key.
fn configuration_page() -> Roff {
    let mut roff = beginning(CONFIGURATION_FILE, 5, "the configuration of snapwarden");
    roff.control("SH", ["DESCRIPTION"]);
    paragraphs(
        &mut roff,
        "The file is TOML. Below, every key stands with a sample value. The names `nightly`, `vault` and `offsite` are \
         samples as well. A key without a default switches its feature on, or is required. An unknown key is an error, \
         with the nearest one that exists.\n\n\
         `snapwarden check` checks the file, and `snapwarden plan --candidate FILE` shows what another one would change. The \
         daemon reads it at the start and at SIGHUP.",
    );
    let mut comment = String::new();
    // Keys that share an explanation: it stands above the first, and is shown below the last.
    let mut open: Option<String> = None;
    // The introduction explains the notation of the file itself.
    for line in FULL_CONFIGURATION.lines().skip_while(|line| !line.starts_with("# Names")) {
        if let Some(text) = line.strip_prefix('#') {
            comment.push_str(text);
            continue;
        }
        if open.is_some() && !(comment.is_empty() && line.contains(" = ")) {
            paragraphs(&mut roff, &open.take().unwrap_or_default());
        }
        let explanation = std::mem::take(&mut comment).trim().to_owned();
        if line.starts_with('[') {
            roff.control("SH", [line]);
            paragraphs(&mut roff, &explanation);
        } else if let Some((key, default)) = key_and_default(line) {
            let is_further = open.is_some();
            roff.control(if is_further { "TQ" } else { "TP" }, []);
            roff.text([bold(key), roman(default)]);
            open.get_or_insert(explanation);
        } else if !explanation.is_empty() {
            roff.control("PP", []);
            paragraphs(&mut roff, &explanation);
        }
    }
    paragraphs(&mut roff, &open.unwrap_or_default());
    let overriding = [Topic::Configuration, Topic::State, Topic::Api, Topic::Archives];
    of_topics(&mut roff, "ENVIRONMENT", ENVIRONMENT, &overriding);
    of_topics(&mut roff, "FILES", FILES, &[Topic::Configuration, Topic::Api]);
    roff.control("SH", ["EXAMPLES"]);
    roff.text([roman("A small one, that prunes one zone:")]);
    example(&mut roff, MINIMAL_CONFIGURATION.lines());
    see_also(&mut roff, CONFIGURATION_FILE, &["check", "plan", "simulate", "run"]);
    roff
}

/// `key = value` and the default of a line such as `key = value   # = default`; none if it is no line of a key.
fn key_and_default(line: &str) -> Option<(&str, String)> {
    let (key, default) = line.split_once("# = ").unwrap_or((line, ""));
    let value = key.split_once(" = ")?.1.trim();
    let default = match default {
        "" => String::new(),
        _ if ["this", value, value.trim_matches('"')].contains(&default) => "  (the default)".to_owned(),
        _ => format!("  (default: {default})"),
    };
    Some((key.trim(), default))
}

/// Title and name.
fn beginning(name: &str, section: u8, about: &str) -> Roff {
    let mut roff = Roff::new();
    roff.control("TH", [name, &section.to_string(), "\"\"", SOURCE, NAME]);
    // Neither hyphens nor wide gaps: both spoil commands and file names. The macros of groff hyphenate again after `nh`,
    // unless the register forbids it.
    roff.control("nr", ["HY", "0"]);
    roff.control("nh", []);
    roff.control("ad", ["l"]);
    roff.control("SH", ["NAME"]);
    roff.text([roman(format!("{name} - {about}"))]);
    roff
}

fn paragraphs(roff: &mut Roff, text: &str) {
    for (number, paragraph) in text.split("\n\n").filter(|text| !text.is_empty()).enumerate() {
        if number > 0 {
            roff.control("PP", []);
        }
        let end = if paragraph.ends_with(['.', ':', '…']) { "" } else { "." };
        roff.text([roman(format!("{}{end}", paragraph.replace('\n', " ")))]);
    }
}

fn entries<'a>(roff: &mut Roff, title: &str, entries: impl Iterator<Item = (String, &'a str)>) {
    for (number, (name, meaning)) in entries.enumerate() {
        if number == 0 {
            roff.control("SH", [title]);
        }
        roff.control("TP", []);
        roff.text([bold(name)]);
        roff.text([roman(meaning)]);
    }
}

fn of_topics(roff: &mut Roff, title: &str, facts: &Facts, topics: &[Topic]) {
    let facts = facts.iter().filter(|(topic, ..)| topics.contains(topic));
    entries(roff, title, facts.map(|(_, name, meaning)| ((*name).to_owned(), *meaning)));
}

fn example<'a>(roff: &mut Roff, lines: impl Iterator<Item = &'a str>) {
    roff.control("PP", []);
    roff.control("RS", ["4"]);
    roff.control("EX", []);
    for line in lines {
        roff.text([roman(line)]);
    }
    roff.control("EE", []);
    roff.control("RE", []);
}

/// The program's page, those of some commands, and the configuration's; but not the one in which they are named.
fn see_also(roff: &mut Roff, here: &str, commands: &[&str]) {
    roff.control("SH", ["SEE ALSO"]);
    let commands = commands.iter().map(|command| (format!("{NAME}-{command}"), 1));
    let all = [(NAME.to_owned(), 1)].into_iter().chain(commands).chain([(CONFIGURATION_FILE.to_owned(), 5)]);
    let mut inlines = Vec::new();
    for (name, section) in all.filter(|(name, _)| name != here) {
        let comma = if inlines.is_empty() { "" } else { ", " };
        inlines.extend([roman(comma), bold(name), roman(format!("({section})"))]);
    }
    roff.text(inlines);
}

/// A page in ASCII, with what stands between backticks in bold.
fn finished(page: &str) -> String {
    let mut text = String::new();
    // Of these three lines two do nothing.
    for line in page.replace(".br\n\n.br\n", ".sp\n").lines() {
        let is_control = line.starts_with('.');
        for (number, part) in line.split('`').enumerate() {
            let opens = number % 2 == 1;
            text.push_str(match number {
                0 => "",
                _ if is_control => "`",
                _ if opens => r"\fB",
                _ => r"\fR",
            });
            for character in part.chars() {
                if character.is_ascii() {
                    text.push(character);
                } else {
                    // Writing to a String cannot fail.
                    let _ = write!(text, r"\[u{:04X}]", u32::from(character));
                }
            }
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_with_its_facts() {
        let (pages, mut described) = (pages().unwrap(), Vec::new());
        for Manual { name, text, .. } in pages.iter().filter(|page| page.section == 1) {
            let page = manual::PAGES.iter().find(|page| {
                let words =
                    if page.command.is_empty() { String::new() } else { format!(" {}", page.command) };
                *name == format!("{NAME}{words}").replace(' ', "-")
            });
            let page = page.unwrap_or_else(|| panic!("{name}: no facts"));
            described.push(page.command);
            assert!(!page.examples.is_empty(), "{name}");
            let mut sections =
                vec!["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "\"EXIT STATUS\"", "EXAMPLES"];
            if !page.topics.is_empty() {
                sections.extend(["ENVIRONMENT", "SIGNALS"]);
            }
            for section in sections.into_iter().chain(["\"SEE ALSO\""]) {
                assert!(text.contains(&format!(".SH {section}\n")), "{name}: {section}");
            }
            for related in page.related {
                let related = format!("{NAME}-{related}");
                assert!(pages.iter().any(|page| page.name == related), "{name}: no page {related}");
            }
        }
        assert_eq!(described.len(), manual::PAGES.len(), "facts of no command: {described:?}");
    }

    #[test]
    fn every_key_of_the_configuration_is_in_its_page() {
        let page = pages().unwrap().into_iter().find(|page| page.name == CONFIGURATION_FILE).unwrap();
        let lines: Vec<&str> = FULL_CONFIGURATION.lines().filter(|line| line.contains(" = ")).collect();
        let keys: Vec<&str> = lines
            .into_iter()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split(' ').next().unwrap())
            .collect();
        assert!(keys.len() > 80, "{keys:?}");
        for key in keys {
            assert!(page.text.contains(&format!("\\fB{key} = ")), "{key}");
        }
        // Each is explained, but for those of a retention of copies, which are a policy's.
        let bare = page.text.split(".SH ").filter(|section| section.contains(".TP\n")).filter(|section| {
            section.trim_end().ends_with("\\fR") && !section.starts_with("[archives.vault.retention]")
        });
        assert_eq!(bare.count(), 0);
    }
}
