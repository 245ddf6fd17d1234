//! Prints data to stdout and messages to stderr, in colors where they are wanted.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};

use comfy_table::{Cell, Color as TableColor, ColumnConstraint, ContentArrangement, Table, Width, presets};
use jiff::Timestamp;
use serde::Serialize;

use crate::cli::args::{Color, Global, OutputFormat};
use crate::cli::exit::Exit;
use crate::telemetry::logging;
use crate::text::{printable, safe_json};

/// On a narrower terminal the names of snapshots are left out: the instance and the time identify them, and the
/// reasons need the space.
const NAMES_MIN_WIDTH: usize = 130;

/// Takes the place of a text below a row while a table is drawn. Cells are printable, so none begins so.
const BELOW: &str = "\u{1}";

/// How a command prints.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    format: OutputFormat,
    color: Color,
    log_format: logging::Format,
}

/// The color of a table's cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// No color.
    Plain,
    /// Green.
    Good,
    /// Red: a problem or a deletion.
    Bad,
    /// Grey: not relevant.
    Dim,
}

/// A table's row: each cell with its color.
pub type Row = Vec<(String, Tone)>;

/// Whether stdout and stderr lead to the same place, such as a terminal or the journal.
pub fn is_stdout_stderr() -> bool {
    let identity = |found: rustix::fs::Stat| (found.st_dev, found.st_ino);
    let of = [rustix::fs::fstat(io::stdout()), rustix::fs::fstat(io::stderr())];
    let [Ok(out), Ok(err)] = of.map(|found| found.map(identity)) else { return false };
    out == err
}

/// A cell without a color.
pub fn plain(text: impl Into<String>) -> (String, Tone) {
    (text.into(), Tone::Plain)
}

impl Output {
    /// As the command line says.
    pub fn new(global: &Global) -> Self {
        Self { format: global.output, color: global.color, log_format: global.log_format }
    }

    /// Whether data is drawn as a picture.
    pub fn is_svg(self) -> bool {
        self.format == OutputFormat::Svg
    }

    /// Whether data is for programs.
    pub fn is_json(self) -> bool {
        self.format == OutputFormat::Json
    }

    /// Whether stderr has colors.
    pub fn color_on_stderr(self) -> bool {
        self.wants_color(io::stderr().is_terminal())
    }

    fn wants_color(self, terminal: bool) -> bool {
        match self.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        }
    }

    /// Prints text as it is; the caller has made it safe for a terminal.
    pub fn print(self, text: &str) {
        self.print_bytes(text.as_bytes());
    }

    /// Prints bytes as they are.
    pub fn print_bytes(self, bytes: &[u8]) {
        let mut stdout = io::stdout().lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            // It is no failure if the reader has exited, as in `| head`.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                self.complain(&format!("write to stdout: {error}"));
                // Half of the data must not look like all of it.
                std::process::exit(Exit::Failed as i32);
            }
            _ => {}
        }
    }

    /// Prints a command's data: as pretty JSON or as text. Only the one that is printed is made.
    pub fn show<T: Serialize>(self, json: impl FnOnce() -> T, text: impl FnOnce() -> String) {
        if self.format != OutputFormat::Json {
            self.print(&text());
        } else if let Ok(json) = serde_json::to_string_pretty(&json()) {
            self.print(&safe_json(&json));
            self.print("\n");
        }
    }

    /// Prints a message to stderr, in the format of the log.
    pub fn complain(self, text: &str) {
        let _ = io::stderr().lock().write_all(logging::complaint(self.log_format, text).as_bytes());
    }

    /// The width of the terminal in columns, if stdout is one; else `$COLUMNS`, if that is set.
    pub fn width(self) -> Option<usize> {
        let given = || std::env::var("COLUMNS").ok()?.parse::<usize>().ok();
        Table::new().width().map(usize::from).or_else(given)
    }

    /// A table with an optional head, as wide as its contents, but not wider than the terminal. No value is broken inside:
    /// only the last column may be of any length, and a text there with a word that does not fit stands below its row.
    pub fn table(self, head: &[&str], rows: Vec<Row>) -> String {
        let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
        let whole = columns.saturating_sub(1);
        let before: usize = (0..whole).map(|place| longest_word_in(head, &rows, place) + 2).sum();
        let space = self.width().map_or(usize::MAX, |width| width.saturating_sub(before + 4));
        let has_place_below = whole > 1 && !head.is_empty();
        let split = |mut row: Row| {
            let is_too_wide =
                has_place_below && row.get(whole).is_some_and(|(text, _)| longest_word(text) > space);
            let below = if is_too_wide { row.pop() } else { None };
            (row, below)
        };
        self.draw(head, rows.into_iter().map(split).collect(), whole)
    }

    /// Draws a table of rows with lines below some of them; the first `whole` columns are never broken inside a word.
    fn draw(self, head: &[&str], rows: Vec<(Row, Option<(String, Tone)>)>, whole: usize) -> String {
        let (rows, below): (Vec<Row>, Vec<_>) = rows.into_iter().unzip();
        let widths: Vec<usize> = (0..whole).map(|place| longest_word_in(head, &rows, place)).collect();
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        if !head.is_empty() {
            table.set_header(head.to_vec());
        }
        // Tables may be indented by two columns, and end with a gap of two.
        if let Some(width) = self.width() {
            let width = u16::try_from(width.saturating_sub(2)).unwrap_or(u16::MAX);
            table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
        }
        if self.wants_color(io::stdout().is_terminal()) {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        for (row, below) in rows.into_iter().zip(&below) {
            table.add_row(row.into_iter().map(|(text, tone)| {
                let cell = Cell::new(printable(&text));
                match tone {
                    Tone::Plain => cell,
                    Tone::Good => cell.fg(TableColor::Green),
                    Tone::Bad => cell.fg(TableColor::Red),
                    Tone::Dim => cell.fg(TableColor::DarkGrey),
                }
            }));
            if below.is_some() {
                table.add_row([BELOW]);
            }
        }
        for (place, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, 2));
            if let Some(width) = widths.get(place).and_then(|width| u16::try_from(width + 2).ok()) {
                column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(width)));
            }
        }
        let mut below = below.into_iter().flatten();
        let mut drawn = String::new();
        for line in table.lines() {
            if line.starts_with(BELOW) {
                drawn.extend(below.next().map(|(text, tone)| self.note("", tone, &text)));
            } else {
                drawn.push_str(line.trim_end());
                drawn.push('\n');
            }
        }
        drawn
    }

    /// A table indented by two columns, without names and ages of snapshots on a narrow terminal.
    pub fn indented_table(self, head: &[&str], mut rows: Vec<Row>) -> String {
        let mut head = head.to_vec();
        for word in ["SNAPSHOT", "AGE"].iter().filter(|_| self.is_narrow()) {
            remove_column(&mut head, &mut rows, word);
        }
        let mut text = String::new();
        for line in self.table(&head, rows).lines() {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  {line}");
        }
        text
    }

    /// Whether the terminal is too narrow for everything.
    pub fn is_narrow(self) -> bool {
        self.width().is_some_and(|width| width < NAMES_MIN_WIDTH)
    }

    /// A table without those of the optional columns for which there is no space; the first of them is left out first.
    pub fn fitted_table(self, head: &[&str], mut rows: Vec<Row>, optional: &[&str]) -> String {
        let mut head = head.to_vec();
        let cell_width = |text: &str| printable(text).chars().count();
        let table_width = |head: &[&str], rows: &[Row]| -> usize {
            let column_width = |(place, word): (usize, &&str)| {
                let cells = rows.iter().filter_map(|row| Some(cell_width(&row.get(place)?.0)));
                cells.chain([word.len()]).max().unwrap_or_default() + 2
            };
            head.iter().enumerate().map(column_width).sum()
        };
        for column in optional {
            if self.width().is_none_or(|width| table_width(&head, &rows) + 2 <= width) {
                break;
            }
            remove_column(&mut head, &mut rows, column);
        }
        self.table(&head, rows)
    }

    /// A table whose rows end with a text of any length: a last column where there is space for it, else lines below the
    /// row.
    pub fn table_with_text(self, head: &[&str], rows: Vec<(Row, String)>, last: &str) -> String {
        if !self.is_narrow() {
            let rows = rows.into_iter().map(|(mut row, text)| {
                row.push(plain(text));
                row
            });
            return self.table(&[head, &[last]].concat(), rows.collect());
        }
        let below = |text: String| (!text.is_empty()).then(|| plain(text));
        let rows = rows.into_iter().map(|(row, text)| (row, below(text))).collect();
        self.draw(head, rows, head.len())
    }

    /// A word, and beside it a text that stays in its own column.
    pub fn note(self, word: &str, tone: Tone, text: &str) -> String {
        self.indented_table(&[], vec![vec![(word.to_owned(), tone), plain(text)]])
    }
}

fn longest_word(text: &str) -> usize {
    printable(text).split(' ').map(|word| word.chars().count()).max().unwrap_or_default()
}

/// The width without which a word in this column would be broken.
fn longest_word_in(head: &[&str], rows: &[Row], place: usize) -> usize {
    let cells = rows.iter().filter_map(|row| Some(longest_word(&row.get(place)?.0)));
    cells.chain(head.get(place).map(|word| word.len())).max().unwrap_or_default()
}

fn remove_column(head: &mut Vec<&str>, rows: &mut [Row], word: &str) {
    if let Some(place) = head.iter().position(|column| *column == word) {
        head.remove(place);
        for row in rows {
            row.remove(place);
        }
    }
}

/// A time in a table: to the minute on a narrow terminal.
pub fn moment(at: Timestamp, output: Output) -> String {
    if output.is_narrow() { at.strftime("%Y-%m-%d %H:%M").to_string() } else { at.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_stands_below_its_own_row_whatever_the_cells_hold() {
        let output =
            Output { format: OutputFormat::Text, color: Color::Never, log_format: logging::Format::Text };
        let row = |name: &str, below: Option<&str>| (vec![plain(name), plain("x")], below.map(plain));
        let rows =
            vec![row("\u{1}", None), row("two", Some("below \u{1} two")), row("\u{1}\u{1}", Some("last"))];
        let drawn = output.draw(&["NAME", "IS"], rows, 2);
        let lines: Vec<Vec<&str>> = drawn.lines().map(|line| line.split_whitespace().collect()).collect();
        let expected: [&[&str]; 6] = [
            &["NAME", "IS"],
            &["\\u{1}", "x"],
            &["two", "x"],
            &["below", "\\u{1}", "two"],
            &["\\u{1}\\u{1}", "x"],
            &["last"],
        ];
        assert_eq!(lines, expected, "{drawn}");
    }
}
