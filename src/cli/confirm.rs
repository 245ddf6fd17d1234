//! Asks before something is done that cannot be undone.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

use crate::cli::exit::Refusal;

/// Whether a person can answer: both the question and the answer need a terminal.
pub(super) fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks on stderr, and returns the line that was typed.
///
/// # Errors
/// [`Refusal`] if it cannot be read.
pub(super) fn ask(question: &str) -> Result<String, Refusal> {
    let mut stderr = io::stderr().lock();
    write!(stderr, "{question} ")?;
    stderr.flush()?;
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    Ok(line.trim().to_owned())
}

/// Asks a question, and returns whether the answer is yes.
///
/// # Errors
/// [`Refusal`] if it cannot be read.
pub(super) fn is_confirmed(question: &str) -> Result<bool, Refusal> {
    let answer = ask(&format!("{question} [y/N]"))?;
    Ok(matches!(answer.to_ascii_lowercase().as_str(), "y" | "yes"))
}
