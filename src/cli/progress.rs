//! Progress bars on a terminal, one for each download; log lines are written above them.
//!
//! Without a terminal none are drawn, and the log reports the downloads instead.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Write};
use std::time::Duration;

use futures_util::future::{Either, select};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing_subscriber::fmt::MakeWriter;

use crate::cli::args::Global;
use crate::clock::Clock;
use crate::policy::name::{ArchiveName, PolicyName};
use crate::run::downloads::{DownloadState, Downloads, RunningDownload};
use crate::snapshot::{SnapshotId, ZoneName};
use crate::telemetry::logging::Format;

/// Five times a second looks smooth and costs nothing.
const REFRESH_INTERVAL: Duration = Duration::from_millis(200);

/// A line that is too long loses its end: the names.
const LINE: &str = "[{bar:20}] {wide_msg}";

/// The progress bars of this process; clones share them.
#[derive(Debug, Clone)]
pub struct Progress {
    /// None if no bars are drawn.
    lines: Option<MultiProgress>,
}

impl Progress {
    /// Draws on stderr if that is a capable terminal, and neither `--quiet` nor JSON logs are requested.
    pub fn new(global: &Global) -> Self {
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        let is_wanted = !global.quiet && global.log_format == Format::Text;
        let is_drawn = is_wanted && io::stderr().is_terminal() && !is_dumb;
        Self { lines: is_drawn.then(MultiProgress::new) }
    }

    /// The downloads of a runner: shown here, or in the log.
    pub fn downloads(&self) -> Downloads {
        if self.lines.is_some() { Downloads::shown() } else { Downloads::default() }
    }

    /// Shows the downloads while `work` runs, and removes the bars afterwards.
    pub async fn during<F: Future>(&self, downloads: &Downloads, clock: &dyn Clock, work: F) -> F::Output {
        let Some(lines) = &self.lines else { return work.await };
        let mut drawn = Drawn { lines, bars: BTreeMap::new() };
        let drawing = async {
            loop {
                drawn.show(&downloads.list(clock.elapsed()));
                clock.sleep(REFRESH_INTERVAL).await;
            }
        };
        match select(std::pin::pin!(work), std::pin::pin!(drawing)).await {
            Either::Left((done, _)) => done,
            Either::Right((never, _)) => never,
        }
    }
}

/// The bars on the terminal; dropping this removes them.
struct Drawn<'a> {
    lines: &'a MultiProgress,
    /// A policy has one download of a snapshot in a zone; a command may read several copies of one.
    bars: BTreeMap<(Option<PolicyName>, Vec<ArchiveName>, ZoneName, SnapshotId), ProgressBar>,
}

impl Drawn<'_> {
    fn show(&mut self, running: &[RunningDownload]) {
        let key = |seen: &RunningDownload| {
            (seen.policy.clone(), seen.archives.clone(), seen.zone.clone(), seen.snapshot_id)
        };
        self.bars.retain(|known, bar| {
            let runs = running.iter().any(|seen| key(seen) == *known);
            if !runs {
                bar.finish_and_clear();
                self.lines.remove(bar);
            }
            runs
        });
        for seen in running {
            let bar = self.bars.entry(key(seen)).or_insert_with(|| self.lines.add(new_bar()));
            let how_far = seen.how_far;
            match how_far.total {
                Some(total) => bar.set_length(total),
                None => bar.unset_length(),
            }
            bar.set_position(match how_far.state {
                DownloadState::Downloading => how_far.bytes,
                DownloadState::Verifying => how_far.total.unwrap_or(how_far.bytes),
            });
            bar.set_message(format!("{how_far}  {}", seen.of()));
        }
    }
}

impl Drop for Drawn<'_> {
    fn drop(&mut self) {
        self.show(&[]);
    }
}

fn new_bar() -> ProgressBar {
    let style = ProgressStyle::with_template(LINE).unwrap_or_else(|_| ProgressStyle::default_bar());
    // Hidden until it is added to the others.
    ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()).with_style(style.progress_chars("=> "))
}

/// Writes to stderr, above the bars.
impl Write for Progress {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A partial write would tear a line, since the bars are drawn between two writes.
        self.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let write = || io::stderr().lock().write_all(bytes);
        match &self.lines {
            Some(lines) => lines.suspend(write),
            None => write(),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl MakeWriter<'_> for Progress {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::downloads::HowFar;

    fn seen(id: u8, how_far: HowFar) -> RunningDownload {
        RunningDownload {
            doing: "exporting",
            policy: Some("nightly".parse().unwrap()),
            zone: "ch-gva-2".parse().unwrap(),
            snapshot_id: format!("0198c0de-0000-7000-8000-0000000000{id:02}").parse().unwrap(),
            snapshot_name: "before\u{1b}[2K\n".to_owned(),
            instance_name: None,
            archives: Vec::new(),
            started_at: "2026-11-01T12:00:00Z".parse().unwrap(),
            how_far,
        }
    }

    #[test]
    fn each_download_has_its_bar_while_it_runs() {
        let lines = MultiProgress::with_draw_target(ProgressDrawTarget::hidden());
        let mut drawn = Drawn { lines: &lines, bars: BTreeMap::new() };
        let began = HowFar::default();
        let half = HowFar { bytes: 1 << 20, total: Some(2 << 20), ..began };
        let verifying = HowFar { state: DownloadState::Verifying, ..half };
        drawn.show(&[seen(1, began), seen(2, half)]);
        let shown = |drawn: &Drawn<'_>| -> Vec<(u64, Option<u64>, String)> {
            drawn.bars.values().map(|bar| (bar.position(), bar.length(), bar.message())).collect()
        };
        let name = "before\\u{1b}[2K\\u{a}";
        assert_eq!(
            shown(&drawn),
            [
                (0, None, format!("0 B, 0 B/s  {name}")),
                (1 << 20, Some(2 << 20), format!("50 %, 1.00 MiB of 2.00 MiB, 0 B/s  {name}")),
            ]
        );
        drawn.show(&[seen(2, verifying)]);
        assert_eq!(shown(&drawn), [(2 << 20, Some(2 << 20), format!("verifying, 1.00 MiB  {name}"))]);
        drawn.show(&[]);
        assert!(drawn.bars.is_empty());
    }

    #[test]
    fn the_line_is_one_that_can_be_drawn() {
        assert!(ProgressStyle::with_template(LINE).is_ok());
    }
}
