//! The downloads in progress, for progress bars, the log and the status.
//!
//! An entry is there from the first request for an image until its download ended, whichever way: the guard that
//! [`Downloads::begin`] gives removes it when dropped. Readers get a copy, so that no one waits for anyone.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tracing::info;

use crate::archive::manifest::Manifest;
use crate::archive::transfer::progress::Progress;
use crate::clock::Clock;
use crate::policy::name::{ArchiveName, PolicyName};
use crate::snapshot::{SnapshotId, ZoneName};
use crate::text::{printable, size};

/// Between two log lines of a download, at least.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// A rate is the mean over this span.
const RATE_SPAN: Duration = Duration::from_secs(15);

/// Between two moments that are kept to make a rate of, at least.
const MARK_EVERY: Duration = Duration::from_secs(1);

/// All that run. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Downloads {
    running: Arc<Mutex<BTreeMap<u64, Entry>>>,
    /// Progress bars are shown, so the log does not report progress as well.
    shown: bool,
}

/// An image on its way into archives.
#[derive(Debug, Clone, PartialEq)]
pub struct RunningDownload {
    /// What is done with it, as the beginning of a log line: `exporting`, `restoring` or `verifying`.
    pub doing: &'static str,
    /// Whose run it is of; none for a manual command.
    pub policy: Option<PolicyName>,
    /// Where the snapshot is.
    pub zone: ZoneName,
    /// The snapshot.
    pub snapshot_id: SnapshotId,
    /// Its name, as the service gives it.
    pub snapshot_name: String,
    /// The name of its instance, if that is still listed.
    pub instance_name: Option<String>,
    /// The archives that get the image.
    pub archives: Vec<ArchiveName>,
    /// When it began.
    pub started_at: Timestamp,
    /// How far it came.
    pub how_far: HowFar,
}

/// How far a download came; as text, a line for people.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HowFar {
    /// Bytes that are there, those of an earlier download included.
    pub bytes: u64,
    /// The length of the image, where it is known.
    pub total: Option<u64>,
    /// What came over the line of late.
    pub bytes_per_second: u64,
    /// What is done.
    pub state: DownloadState,
}

/// What is done with an image on its way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DownloadState {
    /// All bytes have arrived; they are synced and verified.
    Verifying,
    /// It is being downloaded. Unknown words of another version count as this.
    #[default]
    #[serde(other)]
    Downloading,
}

impl HowFar {
    /// Whole percents, where the length is known.
    pub fn percent(&self) -> Option<u64> {
        let total = self.total.filter(|total| *total > 0)?;
        u64::try_from(u128::from(self.bytes) * 100 / u128::from(total)).ok()
    }

    /// The remaining time at the current rate, if it is known.
    pub fn left(&self) -> Option<SignedDuration> {
        let left = self.total?.saturating_sub(self.bytes);
        let seconds = left.checked_div(self.bytes_per_second)?;
        Some(SignedDuration::from_secs(i64::try_from(seconds).ok()?))
    }
}

impl fmt::Display for HowFar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.state == DownloadState::Verifying {
            return write!(f, "verifying, {}", size(self.bytes));
        }
        if let Some(percent) = self.percent() {
            write!(f, "{percent} %, ")?;
        }
        f.write_str(&size(self.bytes))?;
        if let Some(total) = self.total {
            write!(f, " of {}", size(total))?;
        }
        write!(f, ", {}/s", size(self.bytes_per_second))?;
        match self.left() {
            Some(left) => write!(f, ", {left:#} left"),
            None => Ok(()),
        }
    }
}

impl RunningDownload {
    /// Which snapshot of which instance, safe for a terminal.
    pub fn of(&self) -> String {
        let snapshot = printable(&self.snapshot_name);
        match &self.instance_name {
            Some(instance) => format!("{snapshot} of {}", printable(instance)),
            None => snapshot.into_owned(),
        }
    }
}

#[derive(Debug)]
struct Entry {
    download: RunningDownload,
    /// Bytes received, and moments with the bytes received by then, oldest first. Never empty.
    received: u64,
    marks: VecDeque<(Duration, u64)>,
    /// When it was last logged.
    logged: Duration,
}

impl Entry {
    fn note(&mut self, progress: Progress, received: u64, now: Duration) {
        let how_far = &mut self.download.how_far;
        how_far.state = DownloadState::Downloading;
        match progress {
            Progress::Downloading { bytes, total } => (how_far.bytes, how_far.total) = (bytes, total),
            Progress::Resumed { bytes } => how_far.bytes = bytes,
            Progress::StartedOver | Progress::ChecksumMismatch => {
                (how_far.bytes, how_far.total) = (0, None);
            }
            Progress::Verifying => how_far.state = DownloadState::Verifying,
        }
        self.received = received;
        if self.marks.back().is_none_or(|(at, _)| now.saturating_sub(*at) >= MARK_EVERY) {
            self.marks.push_back((now, received));
            // One that is older than the span stays, to measure from.
            while self.marks.get(1).is_some_and(|(at, _)| now.saturating_sub(*at) >= RATE_SPAN) {
                self.marks.pop_front();
            }
        }
    }

    fn seen(&self, now: Duration) -> RunningDownload {
        let old = self.marks.iter().rev().find(|(at, _)| now.saturating_sub(*at) >= RATE_SPAN);
        let (since, before) = old.or(self.marks.front()).copied().unwrap_or((now, self.received));
        let nanos = now.saturating_sub(since).as_nanos();
        let came = u128::from(self.received.saturating_sub(before));
        let rate = (came * 1_000_000_000).checked_div(nanos).unwrap_or_default();
        let mut seen = self.download.clone();
        seen.how_far.bytes_per_second = u64::try_from(rate).unwrap_or(u64::MAX);
        seen
    }
}

impl Downloads {
    /// For a caller that shows progress bars: the log does not report progress as well.
    pub fn shown() -> Self {
        Self { shown: true, ..Self::default() }
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<u64, Entry>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that run, in the order of their beginning, as of this moment of the clock's elapsed time.
    pub fn list(&self, now: Duration) -> Vec<RunningDownload> {
        self.running().values().map(|entry| entry.seen(now)).collect()
    }

    /// One begins.
    pub fn begin(&self, download: RunningDownload, clock: Arc<dyn Clock>) -> Running {
        let now = clock.elapsed();
        let mut running = self.running();
        let key = running.last_key_value().map_or(0, |(key, _)| key + 1);
        let entry = Entry { download, received: 0, marks: [(now, 0)].into(), logged: now };
        running.insert(key, entry);
        drop(running);
        Running { all: self.clone(), key, clock }
    }
}

/// Shows the reading of copies.
#[derive(Debug, Clone, Copy)]
pub struct ReadWatch<'a> {
    /// Where they are shown.
    pub downloads: &'a Downloads,
    /// Gives the time.
    pub clock: &'a Arc<dyn Clock>,
}

impl ReadWatch<'_> {
    /// The reading of one copy begins: `doing` is as in [`RunningDownload`].
    pub fn begin(&self, doing: &'static str, archive: &ArchiveName, manifest: &Manifest) -> Running {
        let Manifest { zone, snapshot, instance, .. } = manifest;
        let read = RunningDownload {
            doing,
            policy: None,
            zone: zone.clone(),
            snapshot_id: snapshot.id,
            snapshot_name: snapshot.name.to_string(),
            instance_name: instance.name.clone(),
            archives: vec![archive.clone()],
            started_at: self.clock.now(),
            how_far: HowFar::default(),
        };
        self.downloads.begin(read, Arc::clone(self.clock))
    }
}

/// One that runs; dropped, it runs no more.
#[derive(Debug)]
pub struct Running {
    all: Downloads,
    key: u64,
    clock: Arc<dyn Clock>,
}

impl Running {
    /// Notes progress, where all bytes that are there were received since the beginning.
    pub fn note_all(&self, progress: Progress) {
        let received = match progress {
            Progress::Downloading { bytes, .. } | Progress::Resumed { bytes } => bytes,
            Progress::StartedOver | Progress::ChecksumMismatch | Progress::Verifying => 0,
        };
        self.note(progress, received);
    }

    /// Notes progress, with all bytes received so far. Logs it now and then.
    pub fn note(&self, progress: Progress, received: u64) {
        let now = self.clock.elapsed();
        let seen = {
            let mut running = self.all.running();
            let Some(entry) = running.get_mut(&self.key) else { return };
            entry.note(progress, received, now);
            if self.all.shown || now.saturating_sub(entry.logged) < LINE_EVERY {
                return;
            }
            entry.logged = now;
            entry.seen(now)
        };
        info!(
            zone.name = %seen.zone,
            snapshot.id = %seen.snapshot_id,
            "{} snapshot {}: {}", seen.doing, seen.of(), seen.how_far
        );
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.all.running().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::clock::SimClock;

    fn download() -> RunningDownload {
        RunningDownload {
            doing: "exporting",
            policy: Some("nightly".parse().unwrap()),
            zone: "ch-gva-2".parse().unwrap(),
            snapshot_id: "0198c0de-0000-7000-8000-000000000001".parse().unwrap(),
            snapshot_name: "before\u{1b}[2K".to_owned(),
            instance_name: Some("web-1".to_owned()),
            archives: vec!["vault".parse().unwrap()],
            started_at: "2026-11-01T12:00:00Z".parse().unwrap(),
            how_far: HowFar::default(),
        }
    }

    fn clock() -> Arc<SimClock> {
        Arc::new(SimClock::starting_at("2026-11-01T12:00:00Z".parse().unwrap()))
    }

    fn came(bytes: u64) -> Progress {
        Progress::Downloading { bytes, total: Some(1000 << 20) }
    }

    #[tokio::test(start_paused = true)]
    async fn one_is_there_until_its_guard_is_dropped_and_others_stay() {
        let (downloads, clock) = (Downloads::default(), clock());
        let first = downloads.begin(download(), clock.clone());
        let second = downloads.begin(download(), clock.clone());
        first.note(came(1), 1);
        second.note(came(2), 2);
        drop(first);
        let third = downloads.begin(download(), clock.clone());
        third.note(came(3), 3);
        let bytes = || -> Vec<u64> {
            downloads.list(clock.elapsed()).iter().map(|seen| seen.how_far.bytes).collect()
        };
        assert_eq!(bytes(), [2, 3]);
        drop((second, third));
        assert!(bytes().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn the_rate_is_of_what_came_of_late_and_not_of_what_was_there_before() {
        let (downloads, clock) = (Downloads::default(), clock());
        let running = downloads.begin(download(), clock.clone());
        let seen = || downloads.list(clock.elapsed())[0].how_far;
        assert_eq!(seen().to_string(), "0 B, 0 B/s");
        running.note(Progress::Resumed { bytes: 500 << 20 }, 0);
        for second in 1..=100_u64 {
            clock.sleep(Duration::from_secs(1)).await;
            let rate = if second <= 50 { 1 } else { 3 };
            let received = if second <= 50 { second } else { 50 + rate * (second - 50) };
            running.note(came((500 + received) << 20), received << 20);
        }
        assert_eq!(seen().to_string(), "70 %, 700.00 MiB of 1000.00 MiB, 3.00 MiB/s, 1m 40s left");
        clock.sleep(RATE_SPAN).await;
        // It stalls, so the remaining time is unknown.
        assert_eq!(seen().to_string(), "70 %, 700.00 MiB of 1000.00 MiB, 0 B/s");
        running.note(came(1000 << 20), 500 << 20);
        running.note(Progress::Verifying, 500 << 20);
        assert_eq!(seen().to_string(), "verifying, 1000.00 MiB");
        running.note(Progress::StartedOver, 500 << 20);
        assert_eq!((seen().bytes, seen().state), (0, DownloadState::Downloading));
    }

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_log_tells_of_it_every_30_seconds_unless_it_is_shown_elsewhere() {
        for (downloads, expected) in [(Downloads::default(), 3), (Downloads::shown(), 0)] {
            let written = Written::default();
            let subscriber = tracing_subscriber::fmt()
                .with_writer({
                    let to = written.clone();
                    move || to.clone()
                })
                .with_ansi(false);
            let logging = tracing::subscriber::set_default(subscriber.finish());
            let clock = clock();
            let running = downloads.begin(download(), clock.clone());
            for second in 0..100 {
                running.note(came(second << 20), second << 20);
                clock.sleep(Duration::from_secs(1)).await;
            }
            drop(logging);
            let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
            assert_eq!(text.lines().count(), expected, "{text}");
            let line = "before\\u{1b}[2K of web-1: 3 %, 30.00 MiB of 1000.00 MiB, 1.00 MiB/s, 16m 10s left";
            assert!(expected == 0 || text.lines().next().is_some_and(|first| first.contains(line)), "{text}");
        }
    }

    #[test]
    fn what_another_version_says_of_a_download_is_read_as_far_as_it_is_known() {
        let read = |text: &str| serde_json::from_str::<HowFar>(text).unwrap();
        assert_eq!(read(r#"{"state": "resting", "bytes": 3}"#), HowFar { bytes: 3, ..HowFar::default() });
        let proving = HowFar { state: DownloadState::Verifying, total: Some(0), ..HowFar::default() };
        assert_eq!(read(&serde_json::to_string(&proving).unwrap()), proving);
        assert_eq!((proving.percent(), proving.left()), (None, None));
    }
}
