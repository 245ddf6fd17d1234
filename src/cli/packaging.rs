//! For packagers: completions and the manual page.

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::cli::args::Arguments;
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::Output;

/// Prints the completions for a shell.
pub fn completions(shell: Shell, output: Output) -> Exit {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "snapwarden", &mut script);
    output.print_bytes(&script);
    Exit::Done
}

/// Prints the manual page.
///
/// # Errors
/// [`Refusal`] if it cannot be rendered.
pub fn man(output: Output) -> Result<Exit, Refusal> {
    let mut page = Vec::new();
    clap_mangen::Man::new(Arguments::command()).render(&mut page)?;
    output.print_bytes(&page);
    Ok(Exit::Done)
}
