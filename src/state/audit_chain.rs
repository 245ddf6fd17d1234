//! The chain of the audit log: each line has the hash of the one before it, so that what is changed in the log is found.
//!
//! `"prev"` in a line is the SHA-256, in hexadecimal digits, of the line before it, without the line feed between the two; `null`
//! in the very first line. The first line of a month's file follows the last one of the file before. Whoever edits, inserts,
//! moves or cuts a line breaks the link of the line that followed it. Two things have no line after them: the last line, and
//! a cut end. They are found by the [head](AuditHead) of the chain, which is kept elsewhere, too: in the archives, and in what
//! `/api/v1/status` shows.
//!
//! **A crash** may leave a part of a line. It is no line, since it is no JSON, and the next line begins after it. So that it
//! hides nothing, the hash is of the last whole line *and of what follows it*: of `A`, a piece `B` and the next line `C`, the
//! link in `C` is the hash of `A`, a line feed, and `B`. A whole line that is made to look like such a piece is missed all the same.
//!
//! **Lines of earlier versions** have no `prev`. The chain begins with the first line that has one, and that has the hash of
//! the last line without.
//!
//! **Old files** are removed by `keep_audit`. Before that a line says which, and the hash of its last line (`remove_audit_file`).
//!
//! Whoever may write in the state directory and in every archive can still make a whole new chain. See `docs/security.md`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize};
use sha2::{Digest as _, Sha256};

use crate::disk::DiskFile;
use crate::text::hex;

/// The end of a chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditHead {
    /// Of the last line, and of what a crash left after it: SHA-256 in hexadecimal digits.
    pub hash: String,
    /// When that line was written.
    pub at: Timestamp,
}

/// A line begins so, and then comes its time.
pub(super) const LINE_BEGINS: &[u8] = b"{\"at\":\"";

/// A line with its link.
#[derive(Debug, Serialize)]
pub(super) struct Chained<'a, T> {
    #[serde(flatten)]
    pub(super) line: &'a T,
    pub(super) prev: Option<String>,
}

/// The action of the line that says that a file was removed.
const REMOVE_FILE: &str = "remove_audit_file";

/// The line that is written before a file of the log is removed.
#[derive(Debug, Serialize)]
pub(super) struct RemovedFile {
    at: Timestamp,
    outcome: &'static str,
    action: &'static str,
    /// It is about none.
    snapshot: BTreeMap<String, String>,
    reasons: [&'static str; 1],
    file: String,
    /// The end of the file; none if it has no whole line.
    last: Option<AuditHead>,
}

impl RemovedFile {
    pub(super) fn new(at: Timestamp, file: String, last: Option<AuditHead>) -> Self {
        let reasons = ["older than `keep_audit`"];
        let outcome = "done";
        Self { at, outcome, action: REMOVE_FILE, snapshot: BTreeMap::new(), reasons, file, last }
    }
}

/// What a line follows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Entry {
    /// It does not say: it is of an earlier version.
    #[default]
    Unlinked,
    /// Nothing: it is the first of all.
    Start,
    /// A line with this hash.
    After(String),
}

/// What the chain needs of a line.
#[derive(Debug, Deserialize)]
struct Link {
    at: Timestamp,
    #[serde(default, rename = "prev", deserialize_with = "present")]
    entry: Entry,
    #[serde(default)]
    action: Option<String>,
    /// Of a file that is removed.
    #[serde(default)]
    file: Option<String>,
    #[serde(default)]
    last: Option<AuditHead>,
}

fn present<'de, D: Deserializer<'de>>(value: D) -> Result<Entry, D::Error> {
    Ok(Option::deserialize(value)?.map_or(Entry::Start, Entry::After))
}

impl Link {
    /// None for what is no whole line.
    fn of(line: &[u8]) -> Option<Self> {
        line.starts_with(LINE_BEGINS).then(|| serde_json::from_slice(line).ok()).flatten()
    }
}

fn hash_of(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// How much is read at first to find the first or the last line of a file; lines are shorter.
const END_BYTES: u64 = 64 << 10;

/// The end of a file.
#[derive(Debug, Default)]
pub(super) struct Tail {
    /// The last whole line with all that follows it, also what is not ended by a line feed.
    pub(super) last: Option<AuditHead>,
    /// The same without a piece that is not ended.
    pub(super) ended: Option<AuditHead>,
    /// Whether that line has a link.
    pub(super) is_chained: bool,
    /// Whether the file ends with a line feed, or is empty.
    pub(super) is_ended: bool,
}

impl Tail {
    /// Reads the end of a file.
    pub(super) fn of(file: &dyn DiskFile) -> io::Result<Self> {
        let len = file.len()?;
        let mut window = END_BYTES;
        loop {
            let from = len.saturating_sub(window);
            let bytes = read_range(file, from, len)?;
            let tail = Self::in_bytes(&bytes, from == 0);
            if tail.last.is_some() || from == 0 {
                return Ok(tail);
            }
            window = window.saturating_mul(8);
        }
    }

    fn in_bytes(bytes: &[u8], is_all: bool) -> Self {
        let is_ended = bytes.last().is_none_or(|byte| *byte == b'\n');
        let whole = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        // Where the last piece begins that is not ended.
        let ended =
            if is_ended { whole.len() } else { whole.iter().rposition(|byte| *byte == b'\n').unwrap_or(0) };
        let mut end = whole.len();
        loop {
            let begin = whole[..end].iter().rposition(|byte| *byte == b'\n');
            // What is before the bytes that were read may belong to their first line.
            let Some(from) = begin.map(|place| place + 1).or(is_all.then_some(0)) else { break };
            if let Some(link) = Link::of(&whole[from..end]) {
                let head = |to: usize| AuditHead { hash: hash_of(&whole[from..to]), at: link.at };
                let last = Some(head(whole.len()));
                // The line itself may lack its line feed alone.
                let ended = Some(head(ended.max(end)));
                return Self { last, ended, is_chained: link.entry != Entry::Unlinked, is_ended };
            }
            let Some(place) = begin else { break };
            end = place;
        }
        Self { is_ended, ..Self::default() }
    }
}

/// What the first line of a file follows; none if it has no link, or follows nothing.
pub(super) fn follows(file: &dyn DiskFile) -> io::Result<Option<String>> {
    let len = file.len()?;
    let mut window = END_BYTES;
    loop {
        let bytes = read_range(file, 0, window.min(len))?;
        if let Some(link) = bytes.split(|byte| *byte == b'\n').find_map(Link::of) {
            return Ok(if let Entry::After(prev) = link.entry { Some(prev) } else { None });
        }
        if window >= len {
            return Ok(None);
        }
        window = window.saturating_mul(8);
    }
}

fn read_range(file: &dyn DiskFile, from: u64, to: u64) -> io::Result<Vec<u8>> {
    let wanted = usize::try_from(to.saturating_sub(from)).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let (mut bytes, mut read) = (vec![0; wanted], 0);
    while read < wanted {
        let count = file.read_at(&mut bytes[read..], from + read as u64)?;
        if count == 0 {
            break;
        }
        read += count;
    }
    bytes.truncate(read);
    Ok(bytes)
}

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Place {
    /// The name of its file.
    pub file: String,
    /// Its number in the file, from 1.
    pub line: u64,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "line {} of {}", self.line, self.file)
    }
}

/// A place at which the chain is broken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Break {
    /// The line that has no right link.
    #[serde(flatten)]
    pub place: Place,
    /// What is wrong, as a sentence.
    pub problem: String,
}

/// A file that `keep_audit` removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RemovedPart {
    /// Its name.
    pub file: String,
    /// When it was removed.
    pub removed_at: Timestamp,
    /// Its end; none if it had no whole line.
    #[serde(skip)]
    last: Option<AuditHead>,
}

/// What the check of a chain found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ChainReport {
    /// How many lines have a link.
    pub lines: u64,
    /// How many lines of earlier versions are before them: nothing protects those.
    pub unlinked: u64,
    /// How many pieces of lines crashes left.
    pub pieces: u64,
    /// The first line that has a link.
    pub begins: Option<Place>,
    /// The end.
    pub head: Option<AuditHead>,
    /// The files that `keep_audit` removed, as far as the log says so.
    pub removed: Vec<RemovedPart>,
    /// Where it is broken.
    pub breaks: Vec<Break>,
    /// Every state that the end ever had.
    #[serde(skip)]
    known: HashSet<String>,
}

impl ChainReport {
    /// Whether a head that was kept elsewhere is the end of this log, or was it once.
    pub fn has(&self, head: &AuditHead) -> bool {
        let is_removed = |part: &RemovedPart| {
            part.last.as_ref().is_some_and(|last| last.hash == head.hash || head.at < last.at)
        };
        self.known.contains(&head.hash) || self.removed.iter().any(is_removed)
    }
}

/// A file that is checked.
#[derive(Debug)]
struct Segment {
    /// Its first whole line.
    first: Place,
    /// The hash of that line.
    begin: String,
    entry: Entry,
    /// Its first line with a link.
    first_linked: Option<Place>,
    end: AuditHead,
}

/// Checks the files of a log, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Check {
    report: ChainReport,
    segments: Vec<Segment>,
    /// Every state of the end, by the line that made it.
    known: HashMap<String, Place>,
    /// Links to what is not the line before, found so far.
    loose: Vec<(Place, String)>,
    /// Of the file that is read.
    file: String,
    number: u64,
    segment: Option<(Segment, Sha256)>,
    /// A piece that is no line, once it is known whether it was ended.
    piece: Option<Vec<u8>>,
}

impl Check {
    /// The lines that follow are of this file.
    pub(super) fn begin(&mut self, path: &Path) {
        self.file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (self.number, self.segment, self.piece) = (0, None, None);
    }

    /// The next line, without its line feed; after a line feed at the end of a file an empty one.
    pub(super) fn line(&mut self, bytes: &[u8]) {
        self.number += 1;
        if let Some(piece) = self.piece.take() {
            self.add_piece(&piece);
        }
        let Some(link) = Link::of(bytes) else {
            self.piece = Some(bytes.to_owned());
            return;
        };
        let place = Place { file: self.file.clone(), line: self.number };
        let entry = link.entry;
        let is_linked = entry != Entry::Unlinked;
        self.report.lines += u64::from(is_linked);
        let end = AuditHead { hash: hash_of(bytes), at: link.at };
        if let Some((segment, _)) = self.segment.as_mut() {
            match entry {
                Entry::Unlinked if segment.first_linked.is_some() => self.report.breaks.push(Break {
                    place: place.clone(),
                    problem: "it has no link, although lines before it have: it was inserted, or an earlier version of the program \
                              wrote it"
                        .to_owned(),
                }),
                Entry::Unlinked => self.report.unlinked += 1,
                Entry::Start => self.report.breaks.push(starts_anew(place.clone())),
                Entry::After(prev) if prev != segment.end.hash => self.loose.push((place.clone(), prev)),
                Entry::After(_) => {}
            }
            segment.end = end;
            if is_linked && segment.first_linked.is_none() {
                segment.first_linked = Some(place.clone());
            }
        } else {
            let first_linked = is_linked.then(|| place.clone());
            self.report.unlinked += u64::from(!is_linked);
            let segment = Segment { first: place.clone(), begin: end.hash.clone(), entry, first_linked, end };
            self.segment = Some((segment, Sha256::new()));
        }
        if let Some((segment, hasher)) = &mut self.segment {
            *hasher = Sha256::new_with_prefix(bytes);
            self.known.insert(segment.end.hash.clone(), place);
        }
        // One without a link, which anybody could have added, says nothing.
        if link.action.as_deref() == Some(REMOVE_FILE) && is_linked {
            let part = |file| RemovedPart { file, removed_at: link.at, last: link.last };
            self.report.removed.extend(link.file.map(part));
        }
    }

    /// A piece that a line feed ends.
    fn add_piece(&mut self, piece: &[u8]) {
        self.report.pieces += u64::from(!piece.trim_ascii().is_empty());
        if let Some((segment, hasher)) = &mut self.segment {
            hasher.update(b"\n");
            hasher.update(piece);
            segment.end.hash = hex(&hasher.clone().finalize());
            let line = self.number - 1;
            self.known.insert(segment.end.hash.clone(), Place { file: self.file.clone(), line });
        }
    }

    /// The file has no more lines. A piece that is not ended may be a line that is just being written.
    pub(super) fn end(&mut self) {
        let piece = self.piece.take();
        self.report.pieces += u64::from(piece.is_some_and(|piece| !piece.trim_ascii().is_empty()));
        let Some((segment, _)) = self.segment.take() else { return };
        // The same file, which was renamed while the files were opened.
        self.segments.retain(|other| other.begin != segment.begin);
        self.segments.push(segment);
    }

    /// Brings the files together.
    pub(super) fn report(self) -> ChainReport {
        let Self { mut report, segments, known, loose, .. } = self;
        for (place, prev) in loose {
            let problem = match known.get(&prev) {
                Some(other) => format!(
                    "it does not follow the line before it, but {other}: lines between the two were inserted, or lines were moved"
                ),
                None => "the line that it followed is missing: the line before it was edited, or lines between the two were cut"
                    .to_owned(),
            };
            report.breaks.push(Break { place, problem });
        }
        let is_chained = |segment: &Segment| segment.first_linked.is_some();
        let mut followed: HashSet<&str> = HashSet::new();
        let (mut has_begun, mut has_start) = (false, report.unlinked > 0);
        for segment in &segments {
            let place = || segment.first.clone();
            match &segment.entry {
                Entry::Unlinked if has_begun => report.breaks.push(Break {
                    place: place(),
                    problem: "it has no link, although lines of files before it have: it was inserted, or an earlier version of the \
                              program wrote it"
                        .to_owned(),
                }),
                Entry::Unlinked => {}
                Entry::Start if has_start => report.breaks.push(starts_anew(place())),
                Entry::Start => has_start = true,
                Entry::After(prev) => {
                    let is_end = |other: &Segment| other.end.hash == *prev;
                    let is_removed = |part: &RemovedPart| part.last.as_ref().is_some_and(|last| last.hash == *prev);
                    let problem = if !followed.insert(prev) {
                        Some("another file follows the same line: one of the two was put there")
                    } else if !segments.iter().any(is_end) && !report.removed.iter().any(is_removed) {
                        Some(
                            "the line that it followed is missing, the last one of the file before it: that one was edited or cut, or \
                             the file is missing, and no line says that `keep_audit` removed it",
                        )
                    } else {
                        None
                    };
                    report.breaks.extend(problem.map(|problem| Break { place: place(), problem: problem.to_owned() }));
                }
            }
            has_begun |= is_chained(segment);
        }
        report.begins = segments.iter().find_map(|segment| segment.first_linked.clone());
        let is_end = |segment: &&Segment| !followed.contains(&*segment.end.hash);
        let end = segments.iter().rfind(is_end).or(segments.last());
        report.head = end.map(|segment| segment.end.clone());
        report.breaks.sort_by(|one, other| one.place.cmp(&other.place));
        report.known = known.into_keys().collect();
        report
    }
}

fn starts_anew(place: Place) -> Break {
    let problem =
        "a new chain begins here, although there are lines of another: those before it were cut or moved"
            .to_owned();
    Break { place, problem }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use uuid::Uuid;

    use super::*;
    use crate::disk::{Access, Disk as _, RealDisk, read_file, replace_file};
    use crate::policy::span::Span;
    use crate::sim::clock::SimClock;
    use crate::snapshot::{SnapshotId, ZoneName};
    use crate::state::audit::{Action, AuditLog, INTENDED, Line, StepFacts, Subject};
    use crate::state::directory::StateDirectory;

    fn line(at: &str, snapshot: u128) -> Line {
        let zone: ZoneName = "ch-gva-2".parse().unwrap();
        let snapshot = Subject {
            id: Some(SnapshotId(Uuid::from_u128(snapshot))),
            name: "db-1 \u{1b}[31m".to_owned(),
            created_at: Timestamp::UNIX_EPOCH,
            instance_id: None,
            instance_name: None,
        };
        Line {
            at: at.parse().unwrap(),
            outcome: INTENDED,
            policy: None,
            run_id: Uuid::nil(),
            step: StepFacts::new(Action::Delete, &zone, snapshot, Vec::new()),
            zone,
            operation_id: None,
            message: None,
            by: None,
        }
    }

    /// Three months with four lines each.
    const MONTHS: [&str; 3] = ["2026-10", "2026-11", "2026-12"];

    struct Play {
        folder: tempfile::TempDir,
        log: AuditLog,
    }

    impl Play {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let log = AuditLog::new(Arc::new(RealDisk), folder.path());
            Self { folder, log }
        }

        fn three_months() -> Self {
            let play = Self::new();
            for month in MONTHS {
                for day in 1..=4 {
                    play.log.append(&line(&format!("{month}-0{day}T00:00:00Z"), day)).unwrap();
                }
            }
            assert_eq!(play.breaks(), [] as [String; 0]);
            play
        }

        fn path(&self, file: &str) -> PathBuf {
            self.folder.path().join(file)
        }

        fn text(&self, file: &str) -> String {
            String::from_utf8(read_file(&RealDisk, &self.path(file), 1 << 20).unwrap()).unwrap()
        }

        fn write(&self, file: &str, text: &str) {
            replace_file(&RealDisk, &self.path(file), text.as_bytes(), Access::Owner).unwrap();
        }

        /// Changes the lines of a file.
        fn edit(&self, file: &str, edit: impl Fn(&mut Vec<String>)) {
            let mut lines: Vec<String> = self.text(file).lines().map(str::to_owned).collect();
            edit(&mut lines);
            let text = lines.iter().fold(String::new(), |text, line| text + line + "\n");
            self.write(file, &text);
        }

        fn report(&self) -> ChainReport {
            self.log.verify().unwrap()
        }

        fn breaks(&self) -> Vec<String> {
            self.report().breaks.iter().map(|found| found.place.to_string()).collect()
        }
    }

    const OCTOBER: &str = "audit-2026-10.jsonl";
    const NOVEMBER: &str = "audit-2026-11.jsonl";
    const DECEMBER: &str = "audit.jsonl";

    #[test]
    fn whatever_is_changed_in_the_log_is_found_where_it_is() {
        type Edit = Box<dyn Fn(&mut Vec<String>)>;
        let cases: [(&str, &str, Edit, &[&str]); 12] = [
            (
                "an edit",
                NOVEMBER,
                Box::new(|lines| lines[1] = lines[1].replace("db-1", "db-2")),
                &["line 3 of audit-2026-11.jsonl"],
            ),
            (
                "an edit of a file's last line",
                OCTOBER,
                Box::new(|lines| lines[3] = lines[3].replace("db-1", "db-2")),
                &["line 1 of audit-2026-11.jsonl"],
            ),
            (
                "an edit of the very first line",
                OCTOBER,
                Box::new(|lines| lines[0] = lines[0].replace("db-1", "db-2")),
                &["line 2 of audit-2026-10.jsonl"],
            ),
            (
                "an edit of a link",
                NOVEMBER,
                Box::new(|lines| lines[1] = lines[1].replace("\"prev\":\"", "\"prev\":\"0")),
                &["line 2 of audit-2026-11.jsonl", "line 3 of audit-2026-11.jsonl"],
            ),
            (
                "a link that is taken away",
                NOVEMBER,
                Box::new(|lines| lines[1] = lines[1].split(",\"prev\"").next().unwrap().to_owned() + "}"),
                &["line 2 of audit-2026-11.jsonl", "line 3 of audit-2026-11.jsonl"],
            ),
            (
                "a line is cut out",
                NOVEMBER,
                Box::new(|lines| drop(lines.remove(1))),
                &["line 2 of audit-2026-11.jsonl"],
            ),
            (
                "a file's first line is cut",
                NOVEMBER,
                Box::new(|lines| drop(lines.remove(0))),
                &["line 1 of audit-2026-11.jsonl"],
            ),
            (
                "a file's last line is cut",
                NOVEMBER,
                Box::new(|lines| drop(lines.pop())),
                &["line 1 of audit.jsonl"],
            ),
            (
                "two lines are swapped",
                NOVEMBER,
                Box::new(|lines| lines.swap(1, 2)),
                &[
                    "line 2 of audit-2026-11.jsonl",
                    "line 3 of audit-2026-11.jsonl",
                    "line 4 of audit-2026-11.jsonl",
                ],
            ),
            (
                "a line is doubled",
                NOVEMBER,
                Box::new(|lines| lines.insert(2, lines[1].clone())),
                &["line 3 of audit-2026-11.jsonl"],
            ),
            (
                "a line is spoilt",
                NOVEMBER,
                Box::new(|lines| lines[1].truncate(40)),
                &["line 3 of audit-2026-11.jsonl"],
            ),
            (
                "a line is made empty",
                NOVEMBER,
                Box::new(|lines| lines[1].clear()),
                &["line 3 of audit-2026-11.jsonl"],
            ),
        ];
        for (what, file, edit, expected) in cases {
            let play = Play::three_months();
            play.edit(file, edit);
            assert_eq!(play.breaks(), expected, "{what}");
            // It stays broken, and is not broken anew.
            play.log.append(&line("2026-12-05T00:00:00Z", 5)).unwrap();
            assert_eq!(play.breaks(), expected, "{what}");
        }
    }

    #[test]
    fn a_cut_end_is_found_by_a_head_that_was_kept_elsewhere() {
        let play = Play::three_months();
        let head = play.log.head().unwrap().unwrap();
        assert_eq!(Some(&head), play.report().head.as_ref());
        assert_eq!(head.at.to_string(), "2026-12-04T00:00:00Z");
        // Later ones do not matter.
        play.log.append(&line("2026-12-05T00:00:00Z", 5)).unwrap();
        assert!(play.report().has(&head));
        play.edit(DECEMBER, |lines| lines.truncate(3));
        assert!(play.breaks().is_empty() && !play.report().has(&head));
        // Nor does it help to go on from there, to make a whole new chain, or to edit the last line alone.
        play.log.append(&line("2026-12-04T00:00:00Z", 6)).unwrap();
        assert!(play.breaks().is_empty() && !play.report().has(&head));
        let other = Play::three_months();
        other.edit(DECEMBER, |lines| lines[3] = lines[3].replace("db-1", "db-2"));
        assert!(other.breaks().is_empty() && !other.report().has(&head));
        let none = Play::new();
        assert!(none.report().head.is_none() && !none.report().has(&head));
    }

    #[test]
    fn a_file_that_is_missing_is_a_cut_unless_a_line_says_that_it_was_removed() {
        for (file, next) in [(OCTOBER, "line 1 of audit-2026-11.jsonl"), (NOVEMBER, "line 1 of audit.jsonl")]
        {
            let play = Play::three_months();
            RealDisk.remove_file(&play.path(file)).unwrap();
            assert_eq!(play.breaks(), [next]);
        }
        let play = Play::three_months();
        let october = play.report().known;
        let keep: Span = "30d".parse().unwrap();
        play.log.remove_old(&keep, "2026-12-20T00:00:00Z".parse().unwrap()).unwrap();
        let report = play.report();
        assert!(report.breaks.is_empty(), "{report:?}");
        let [removed] = &report.removed[..] else { panic!("{report:?}") };
        assert_eq!(
            (&*removed.file, removed.removed_at.to_string()),
            (OCTOBER, "2026-12-20T00:00:00Z".to_owned())
        );
        assert_eq!(report.lines, 9, "with the line about it");
        // A head of that time is none that was cut.
        let at = "2026-10-02T00:00:00Z".parse().unwrap();
        assert!(report.has(&AuditHead { hash: october.into_iter().next().unwrap(), at }));
        // All of them, so that nothing is left but what says so.
        play.log.remove_old(&keep, "2027-12-20T00:00:00Z".parse().unwrap()).unwrap();
        let report = play.report();
        assert!(report.breaks.is_empty() && report.removed.len() >= 2, "{report:?}");
        // A made up line says nothing.
        let play = Play::three_months();
        let text = play.text(OCTOBER);
        let forged = format!(
            "{{\"at\":\"2026-12-04T00:00:00Z\",\"action\":\"remove_audit_file\",\"file\":\"{OCTOBER}\",\"last\":{{\"hash\":\"{}\",\
             \"at\":\"2026-10-04T00:00:00Z\"}}}}\n",
            hash_of(text.trim_end().rsplit('\n').next().unwrap().as_bytes())
        );
        RealDisk.append(&play.path(DECEMBER), forged.as_bytes(), Access::Owner).unwrap();
        RealDisk.remove_file(&play.path(OCTOBER)).unwrap();
        assert_eq!(play.breaks(), ["line 1 of audit-2026-11.jsonl", "line 5 of audit.jsonl"]);
    }

    #[test]
    fn a_piece_of_a_line_neither_breaks_the_chain_nor_hides_a_cut() {
        let whole = serde_json::to_string(&line("2026-12-09T00:00:00Z", 9)).unwrap();
        for piece in
            ["{\"at\":", &whole[..60], "\u{0}\u{0}\u{0}", "{\"at\":\"2026-12-01\n\n{\"at\":\"2026", &whole]
        {
            let play = Play::three_months();
            let before = play.log.head().unwrap().unwrap();
            RealDisk.append(&play.path(DECEMBER), piece.as_bytes(), Access::Owner).unwrap();
            assert!(play.report().has(&before), "{piece}");
            for day in 5..8 {
                play.log.append(&line(&format!("2026-12-0{day}T00:00:00Z"), day)).unwrap();
            }
            let report = play.report();
            let without_link: Vec<_> = report.breaks.iter().map(|found| found.place.line).collect();
            // A whole line that this program did not write is found for what it is.
            assert_eq!(
                without_link,
                if piece == whole { vec![5] } else { Vec::new() },
                "{piece}: {report:?}"
            );
            assert!(report.has(&before) && report.pieces > 0 || piece == whole, "{report:?}");
            let cut = play.text(DECEMBER).lines().position(|line| line.contains("2026-12-04")).unwrap();
            play.edit(DECEMBER, |lines| drop(lines.remove(cut)));
            assert!(!play.breaks().is_empty(), "{piece}");
        }
        // Also where it is all that a new file has.
        let play = Play::three_months();
        RealDisk.rename(&play.path(DECEMBER), &play.path("audit-2026-12.jsonl")).unwrap();
        RealDisk.append(&play.path(DECEMBER), b"{\"at\":\"2027-01-", Access::Owner).unwrap();
        play.log.append(&line("2027-01-01T00:00:00Z", 1)).unwrap();
        assert!(play.breaks().is_empty(), "{:?}", play.report());
    }

    #[test]
    fn lines_of_earlier_versions_are_before_the_chain() {
        let play = Play::new();
        let old = |day: u8| {
            serde_json::to_string(&line(&format!("2026-10-0{day}T00:00:00Z"), day.into())).unwrap() + "\n"
        };
        play.write(OCTOBER, &(old(1) + &old(2)));
        play.write(DECEMBER, &(old(3) + &old(4)));
        assert_eq!((play.report().begins, play.report().unlinked), (None, 4));
        // The file of before is of October: the next line begins another.
        for (at, begins) in [
            ("2026-10-05T00:00:00Z", "line 3 of audit.jsonl"),
            ("2026-11-01T00:00:00Z", "line 3 of audit.jsonl"),
        ] {
            play.log.append(&line(at, 5)).unwrap();
            let report = play.report();
            assert_eq!((report.unlinked, report.breaks), (4, Vec::new()), "{at}");
            assert_eq!(report.begins.unwrap().to_string(), begins);
        }
        play.edit(DECEMBER, |lines| lines[1] = lines[1].replace("db-1", "db-2"));
        assert_eq!(play.breaks(), ["line 3 of audit.jsonl"], "the last one before the chain is bound by it");

        // A new month begins with the chain.
        let play = Play::new();
        play.write(OCTOBER, &(old(1) + &old(2)));
        play.log.append(&line("2026-11-01T00:00:00Z", 5)).unwrap();
        let report = play.report();
        assert_eq!((report.lines, report.unlinked, report.breaks), (1, 2, Vec::new()));
        assert_eq!(report.begins.unwrap().to_string(), "line 1 of audit.jsonl");
    }

    #[test]
    fn a_clock_that_is_wrong_for_a_while_breaks_nothing() {
        let play = Play::three_months();
        for at in [
            "2020-01-01T00:00:00Z",
            "2020-01-02T00:00:00Z",
            "2026-12-05T00:00:00Z",
            "2031-05-01T00:00:00Z",
            "2026-12-06T00:00:00Z",
            "2027-01-01T00:00:00Z",
        ] {
            play.log.append(&line(at, 7)).unwrap();
            assert!(play.breaks().is_empty(), "{at}: {:?}", play.report());
        }
        assert_eq!(play.report().lines, 18);
    }

    #[test]
    fn a_rename_whose_process_was_killed_before_its_line_breaks_nothing() {
        for month in ["2027-01", "2020-01"] {
            let play = Play::three_months();
            RealDisk.rename(&play.path(DECEMBER), &play.path(&format!("audit-{month}.jsonl"))).unwrap();
            play.log.append(&line("2027-02-01T00:00:00Z", 7)).unwrap();
            assert!(play.breaks().is_empty(), "{month}: {:?}", play.report());
        }
    }

    #[tokio::test]
    async fn several_processes_write_one_chain() {
        let folder = tempfile::tempdir().unwrap();
        let clock = Arc::new(SimClock::starting_at("2026-12-01T00:00:00Z".parse().unwrap()));
        let mut all = tokio::task::JoinSet::new();
        for process in 0..4 {
            let state = StateDirectory::open(Arc::new(RealDisk), folder.path()).unwrap();
            for task in 0..4 {
                let (state, clock) = (state.clone(), Arc::clone(&clock));
                all.spawn(async move {
                    for number in 0..5 {
                        let id = process * 100 + task * 10 + number;
                        state.audit(&*clock, line("2026-12-01T00:00:00Z", id)).await.unwrap();
                    }
                });
            }
        }
        while let Some(done) = all.join_next().await {
            done.unwrap();
        }
        let state = StateDirectory::at(Arc::new(RealDisk), folder.path());
        let report = state.verify_audit_log().await.unwrap();
        assert_eq!((report.lines, report.breaks), (80, Vec::new()));
        assert_eq!(report.head, state.audit_head().await.unwrap());
    }
}
