//! An archive whose disk goes bad: it can't be written, and what is in it can't be relied on. What needs a copy there is
//! kept until a write succeeds again.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use snapwarden::archive::catalogue::CopyFilter;
use snapwarden::archive::verify::Outcome;
use snapwarden::cli;
use snapwarden::cli::exit::Exit;
use snapwarden::cli::output::Output;
use snapwarden::clock::Clock as _;
use snapwarden::disk::{Access, Disk as _, Open, read_file};
use snapwarden::policy::name::ArchiveName;
use snapwarden::retention::plan::Decision;
use snapwarden::run::list::ListingCache;
use snapwarden::run::preview::Preview;
use snapwarden::run::report::{RunReport, RunResult};
use snapwarden::sim::disk::{DiskCall, MemoryDisk};
use snapwarden::state::archives::ArchiveMemory;
use snapwarden::state::audit::{Action, StepOutcome};

use crate::stage::{Stage, ended, steps};

/// Keeps so many; the newest is exported.
fn keeping(count: u32) -> String {
    format!(
        r#"
[policies.nightly]
zones = ["ch-gva-2"]
[policies.nightly.retention]
keep_last = {count}
[policies.nightly.guard]
max_delete_percent = 100
settle = "0s"
[policies.nightly.export]
archives = ["vault"]
"#
    )
}

/// A stage over a disk in memory, whose policy kept ten and exported the newest.
struct Play {
    stage: Stage,
    disk: MemoryDisk,
}

impl Play {
    async fn new() -> Self {
        Self::with(&keeping(10)).await
    }

    async fn with(policies: &str) -> Self {
        let disk = MemoryDisk::new();
        let stage = Stage::over(Arc::new(disk.clone()));
        disk.create_dir_all(stage.folder.path(), Access::Owner).unwrap();
        stage.instance("web-1", 10);
        let report = stage.run(policies).await;
        assert!(ended(&report, Action::Export, StepOutcome::Done) > 0, "{report:?}");
        Self { stage, disk }
    }

    /// Makes the archive read-only, or no longer.
    fn set_read_only(&self, is_read_only: bool) {
        let kind = is_read_only.then_some(ErrorKind::ReadOnlyFilesystem);
        self.disk.set_unwritable(&self.stage.archive(), kind);
    }

    fn images(&self) -> Vec<PathBuf> {
        let below = |folder: PathBuf| {
            self.disk.list(&folder).unwrap_or_default().into_iter().map(move |entry| folder.join(entry.name))
        };
        let files = below(self.stage.archive().join("ch-gva-2")).flat_map(below);
        files.filter(|path| path.extension().is_some_and(|end| end == "qcow2")).collect()
    }

    /// Changes one bit in the middle of the newest image.
    fn flip(&self) {
        let path = self.images().pop().unwrap();
        let bytes = read_file(&self.disk, &path, 1 << 30).unwrap();
        let middle = bytes.len() / 2;
        let file = self.disk.open(&path, Open::Update, Access::Group).unwrap();
        file.write_all_at(&[bytes[middle] ^ 1], middle as u64).unwrap();
    }

    async fn verify(&self) -> Vec<Outcome> {
        let runner = self.stage.runner(&keeping(10));
        let archive = &runner.archives[&vault()];
        let verified = runner.verifier(archive).verify(100, &|_, _| {}).await.unwrap();
        verified.copies.into_iter().map(|(_, outcome)| outcome).collect()
    }

    async fn memory(&self) -> ArchiveMemory {
        self.stage.runner(&keeping(10)).state.archives().await.unwrap().of(&vault())
    }

    /// How `archive list` ends.
    async fn list(&self) -> Exit {
        let runner = self.stage.runner(&keeping(10));
        let arguments = clap::Parser::try_parse_from(["snapwarden", "-q", "archive", "list"]);
        let arguments: cli::args::Arguments = arguments.unwrap();
        let output = Output::new(&arguments.global);
        let rules = &runner.archive_rules;
        cli::archive::show(
            &runner.archives,
            rules,
            &runner.state,
            &[],
            &CopyFilter::default(),
            self.stage.now(),
            output,
        )
        .await
    }

    /// A run that would delete seven, and deletes none.
    async fn deletes_nothing(&self, words: &[&str]) -> RunReport {
        let before = self.stage.there();
        let report = self.stage.run(&keeping(3)).await;
        assert_eq!(self.stage.there(), before, "{report:?}");
        let all = format!("{report:?}");
        for word in words {
            assert!(all.contains(word), "`{word}` is missing: {all}");
        }
        assert!(matches!(report.result, RunResult::Partial | RunResult::Failed), "{report:?}");
        report
    }

    async fn preview(&self) -> Preview {
        let runner = self.stage.runner(&keeping(3));
        let previews = runner.preview(&ListingCache::default(), &runner.policies[0], None).await;
        previews.into_iter().next().unwrap().1.unwrap()
    }

    /// What keeps, by `plan`, each snapshot that would be deleted otherwise.
    async fn blocked(&self) -> Vec<&'static str> {
        self.preview().await.plan.decisions.iter().filter_map(Decision::blocked_by).collect()
    }

    /// How many `plan` would delete if its export succeeded.
    async fn deletions_after_export(&self) -> usize {
        self.preview().await.after_export.len()
    }
}

fn vault() -> ArchiveName {
    "vault".parse().unwrap()
}

fn deleted(report: &RunReport) -> usize {
    ended(report, Action::Delete, StepOutcome::Done)
}

#[tokio::test(start_paused = true)]
async fn corruption_that_a_read_only_archive_cannot_note_is_noted_in_the_state() {
    let play = Play::new().await;
    play.flip();
    play.set_read_only(true);
    let outcomes = play.verify().await;
    let [Outcome::Corrupt(why)] = &outcomes[..] else { panic!("{outcomes:?}") };
    assert!(why.contains("noted in the state directory") && why.contains("does not count"), "{why}");
    let memory = play.memory().await;
    assert_eq!(memory.corrupt.len(), 1);
    assert!(memory.write_failure.unwrap().contains("vault"));
    let runner = play.stage.runner(&keeping(3));
    let stats = runner.archive_stats(&runner.archives[&vault()]).await;
    assert_eq!((stats.images, stats.corrupt), (0, 1), "{stats:?}");
    assert_eq!(play.list().await, Exit::Failed);
    assert_eq!(play.blocked().await, ["archive"; 7]);
    play.deletes_nothing(&["the last write to it failed", "archive adopt vault"]).await;

    // An operator who accepts the archive as it is does not make the copy good.
    play.stage.runner(&keeping(3)).adopt_archive(&vault()).await.unwrap();
    assert_eq!(play.deletions_after_export().await, 7, "if it could be fetched anew");
    play.deletes_nothing(&["cannot be marked as such"]).await;

    // The mark is written, the image fetched anew, and all goes on.
    play.set_read_only(false);
    let report = play.stage.run(&keeping(3)).await;
    assert_eq!((ended(&report, Action::Export, StepOutcome::Done), deleted(&report)), (1, 7), "{report:?}");
    assert_eq!(report.result, RunResult::Success, "{report:?}");
    assert_eq!(play.verify().await, [Outcome::Good]);
    assert_eq!(play.list().await, Exit::Done);
}

#[tokio::test(start_paused = true)]
async fn a_noted_copy_that_turns_out_good_counts_again() {
    let play = Play::new().await;
    play.flip();
    play.set_read_only(true);
    for _ in 0..2 {
        assert!(matches!(&play.verify().await[..], [Outcome::Corrupt(_)]));
    }
    // The disk reads as it should again, and can't be written yet.
    play.set_read_only(false);
    play.flip();
    play.set_read_only(true);
    assert!(matches!(&play.verify().await[..], [Outcome::Failed(why)] if why.contains("it is good")));
    play.deletes_nothing(&[]).await;
    play.set_read_only(false);
    assert_eq!(play.verify().await, [Outcome::Good]);
    let memory = play.memory().await;
    assert_eq!((memory.corrupt.len(), memory.write_failure), (0, None));
    let report = play.stage.run(&keeping(3)).await;
    assert_eq!((steps(&report, Action::Export).len(), deleted(&report)), (0, 7), "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn a_read_only_archive_closes_its_gate_until_a_write_succeeds() {
    let play = Play::new().await;
    let web = play.stage.world.snapshots(&play.stage.zone)[0].instance_id.unwrap();
    play.stage.step(jiff::SignedDuration::from_hours(24));
    play.stage.world.add_snapshot(web, play.stage.now());
    play.set_read_only(true);
    for _ in 0..2 {
        let report = play.deletes_nothing(&["the last write to it failed"]).await;
        assert_eq!(ended(&report, Action::Export, StepOutcome::Failed), 1, "it is tried again");
        assert_eq!(report.zones[0].plan.as_ref().unwrap().blocked_by_archive, 8);
        let named = report.zones[0].failures.iter().filter(|why| why.contains("archive vault"));
        assert_eq!(named.count(), 1, "{report:?}");
    }
    assert_eq!(play.blocked().await, ["archive"; 8]);
    play.set_read_only(false);
    let report = play.stage.run(&keeping(3)).await;
    assert_eq!((report.result, deleted(&report)), (RunResult::Success, 8), "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn a_corrupt_copy_that_is_read_again_is_no_write_that_succeeds() {
    let play = Play::new().await;
    play.flip();
    assert!(matches!(&play.verify().await[..], [Outcome::Corrupt(_)]));
    play.set_read_only(true);
    let web = play.stage.world.snapshots(&play.stage.zone)[0].instance_id.unwrap();
    play.stage.step(jiff::SignedDuration::from_hours(24));
    play.stage.world.add_snapshot(web, play.stage.now());
    play.stage.run(&keeping(3)).await;
    assert!(play.memory().await.write_failure.is_some());
    assert!(matches!(&play.verify().await[..], [Outcome::Corrupt(_)]));
    assert!(play.memory().await.write_failure.is_some());
    play.deletes_nothing(&[]).await;
}

#[tokio::test(start_paused = true)]
async fn every_kind_of_write_closes_the_gate_and_a_full_disk_does_not() {
    for (call, kind, closes) in [
        (DiskCall::Write, ErrorKind::Other, true),
        (DiskCall::Sync, ErrorKind::Other, true),
        (DiskCall::Rename, ErrorKind::PermissionDenied, true),
        (DiskCall::Write, ErrorKind::StorageFull, false),
        (DiskCall::Write, ErrorKind::QuotaExceeded, false),
    ] {
        let play = Play::new().await;
        let folder = play.images()[0].parent().unwrap().to_owned();
        let web = play.stage.world.snapshots(&play.stage.zone)[0].instance_id.unwrap();
        let newest = play.stage.world.add_snapshot(web, play.stage.now());
        let name = format!("{}-{newest}.qcow2.part", play.stage.now().strftime("%Y%m%dT%H%M%SZ"));
        play.disk.fail_at(call, &folder.join(name), kind);
        let report = play.stage.run(&keeping(3)).await;
        assert_eq!(ended(&report, Action::Export, StepOutcome::Failed), 1, "{call:?} {kind:?}: {report:?}");
        assert_eq!(play.memory().await.write_failure.is_some(), closes, "{call:?} {kind:?}");
        assert_eq!(deleted(&report), if closes { 0 } else { 8 }, "{call:?} {kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_archive_prunes_itself() {
    let policies = keeping(10)
        .replace("[policies.nightly]\n", "[archives.vault.retention]\nkeep_last = 2\n[archives.vault.guard]\nsettle = \"0s\"\n[policies.nightly]\n")
        + "snapshots = \"all\"\n";
    let loose = policies.replace("keep_last = 2", "keep_last = 9");
    let play = Play::with(&loose).await;
    assert_eq!(play.images().len(), 9);
    let web = play.stage.world.snapshots(&play.stage.zone)[0].instance_id.unwrap();
    play.stage.step(jiff::SignedDuration::from_hours(24));
    play.stage.world.add_snapshot(web, play.stage.now());
    play.disk.set_capacity(Some(64 << 20));
    let report = play.stage.run(&policies).await;
    assert_eq!(ended(&report, Action::Export, StepOutcome::Failed), 1, "{report:?}");
    assert_eq!(ended(&report, Action::PruneCopy, StepOutcome::Done), 7, "{report:?}");
    assert_eq!(play.memory().await.write_failure, None);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_remembered_deletes_nothing_either() {
    let play = Play::new().await;
    let remembered = play.stage.state().join("archives.json.new");
    play.flip();
    play.set_read_only(true);
    play.disk.set_unwritable(&remembered, Some(ErrorKind::PermissionDenied));
    let outcomes = play.verify().await;
    let [Outcome::Corrupt(why)] = &outcomes[..] else { panic!("{outcomes:?}") };
    assert!(why.contains("still counts"), "{why}");

    let web = play.stage.world.snapshots(&play.stage.zone)[0].instance_id.unwrap();
    play.stage.world.add_snapshot(web, play.stage.now());
    play.deletes_nothing(&["could not be remembered", "is not remembered"]).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_found_during_the_deletions_keeps_the_rest() {
    for is_corrupt in [true, false] {
        let play = Play::new().await;
        play.stage.world.clear_log();
        play.stage.world.set_operations_take(Duration::from_mins(1));
        let goes_bad = async {
            while play.stage.world.changes().is_empty() {
                play.stage.clock.sleep(Duration::from_secs(1)).await;
            }
            if is_corrupt {
                play.flip();
            }
            play.set_read_only(true);
            play.verify().await;
            if is_corrupt {
                play.stage.runner(&keeping(3)).adopt_archive(&vault()).await.unwrap();
            }
        };
        let policies = keeping(2);
        let (report, ()) = tokio::join!(play.stage.run(&policies), goes_bad);
        let blocked: Vec<_> = steps(&report, Action::Delete)
            .into_iter()
            .filter(|step| step.outcome == StepOutcome::Blocked)
            .map(|step| step.blocked_by)
            .collect();
        let reason = if is_corrupt { "export" } else { "archive" };
        assert!(blocked.len() >= 4 && blocked.iter().all(|by| *by == Some(reason)), "{report:?}");
        assert_eq!(deleted(&report) + blocked.len(), 8, "{report:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_marker_that_cannot_be_written_closes_an_archive_from_before_there_were_any() {
    let play = Play::new().await;
    for file in
        [play.stage.archive().join("snapwarden-archive.json"), play.stage.state().join("archives.json")]
    {
        play.disk.remove_file(&file).unwrap();
    }
    play.set_read_only(true);
    let marker = play.stage.archive().join("snapwarden-archive.json").display().to_string();
    for _ in 0..2 {
        play.deletes_nothing(&["gets no marker", &marker]).await;
    }
    assert_eq!(play.blocked().await, ["archive"; 7]);
    play.set_read_only(false);
    let report = play.stage.run(&keeping(3)).await;
    assert_eq!((report.result, deleted(&report)), (RunResult::Success, 7), "{report:?}");
}
