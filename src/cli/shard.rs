//! `shard adopt`: makes the state directory that of another shard, and says what moves.

use std::fmt::Write as _;

use crate::cli::args::Global;
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::{Output, plain};
use crate::config::sections::Config;
use crate::run::shard_adopt::{self, Adopted, MovedHold};
use crate::state::error::described;
use crate::text::{counted, printable};

/// Makes the state directory that of the shard that the command line names, or else of all instances.
///
/// # Errors
/// [`Refusal`] if the state cannot be read or changed, or a daemon or a run works on it.
pub async fn adopt(global: &Global, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let (shard, seams) = (config.shard, Seams::real());
    // As that for which it was made.
    let mut state = assemble::state(&Config { shard: None, ..config }, &seams, Use::Changing)?;
    let adopted = shard_adopt::adopt(&mut state, &*seams.clock, shard).await?;
    let path = printable(&state.path().display().to_string()).into_owned();
    output.show(|| &adopted, || render(&path, &adopted, output));
    Ok(Exit::Done)
}

fn render(path: &str, adopted: &Adopted, output: Output) -> String {
    let Adopted { was, is, known, moved, holds } = adopted;
    let (was, now) = (described(*was), described(*is));
    let mut text = format!("the state directory {path} was for {was}, and is for {now} from now on\n");
    // Writing to a String cannot fail.
    let _ = match moved.len() {
        0 => writeln!(text, "no instance that it knew belongs to another shard"),
        count => writeln!(text, "of {} that it knew, {count} belong to others:", counted(*known, "instance")),
    };
    if !moved.is_empty() {
        let rows = moved.iter().map(|one| {
            vec![plain(one.shard.to_string()), plain(&*one.instance_name), plain(one.instance_id.to_string())]
        });
        text.push_str(&output.indented_table(&["SHARD", "INSTANCE", "ID"], rows.collect()));
    }
    if !holds.is_empty() {
        let _ = writeln!(
            text,
            "\nthese holds protect nothing here; repeat them in their shard, before its next run:"
        );
        for MovedHold { hold, shard } in holds {
            let shard = shard.map_or_else(|| "I/N".to_owned(), |shard| shard.to_string());
            let about = hold.about.as_ref().map(|about| format!("  # {}", printable(&about.name)));
            let about = about.unwrap_or_default();
            let _ = writeln!(text, "  snapwarden --shard {shard} hold {}{about}", hold.snapshot);
        }
    }
    text.push_str(
        "\nA shard knows nothing yet of the instances that come to it: neither their holds nor which of their snapshots \
         snapwarden took, so that a policy with `ownership = \"created\"` never deletes those. `snapwarden plan` shows what \
         it would do.\n",
    );
    text
}
