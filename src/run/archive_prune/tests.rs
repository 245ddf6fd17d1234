//! Claims about pruning copies, over real files.

#![expect(clippy::disallowed_methods, reason = "tests do to files what the program must not do")]

use std::path::{Path, PathBuf};

use serde_json::json;
use uuid::Uuid;

use super::*;
use crate::archive::local::LocalArchive;
use crate::disk::{Access, RealDisk, replace_file};
use crate::policy::{Count, Retention};
use crate::retention::tests::no_rules;
use crate::sim::clock::SimClock;
use crate::state::allowances::Allowance;
use crate::state::archives::{ArchiveMemory, CorruptCopy};
use crate::state::holds;

const NOW: &str = "2026-11-20T00:00:00Z";
const WEB: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";
const DB: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ed";

struct Bench {
    folder: tempfile::TempDir,
    pruner: ArchivePruner,
}

fn id(day: u8) -> String {
    format!("b0c0ab00-0000-4000-8000-0000000000{day:02}")
}

fn retention() -> Retention {
    Retention { min_keep: 1, ..no_rules() }
}

fn last(count: u32) -> Retention {
    Retention { keep_last: Some(Count::Of(count.try_into().unwrap())), ..retention() }
}

impl Bench {
    fn new(retention: Retention) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let disk = Arc::new(RealDisk);
        let state = StateDirectory::open(disk.clone(), &folder.path().join("state")).unwrap();
        // It remembers a run, so the copies are not those of a lost state.
        let runs = r#"{"version": 1, "zones": {}, "last": {"run_id": "b0c0ab00-0000-4000-8000-00000000f105", "result": "success",
            "started_at": "2026-11-01T00:00:00Z", "finished_at": "2026-11-01T00:00:00Z"}}"#;
        let path = folder.path().join("state/runs-nightly.json");
        replace_file(&RealDisk, &path, runs.as_bytes(), Access::Owner).unwrap();
        let clock = Arc::new(SimClock::starting_at(NOW.parse().unwrap()));
        let path = folder.path().join("vault");
        let vault = LocalArchive::new("vault".parse().unwrap(), path, disk, clock.clone());
        let archive = Arc::new(Archive::Local(vault));
        let guard = Guard {
            max_deletes: None,
            max_delete_percent: 50,
            max_listing_drop_percent: 50,
            max_clock_skew: std::time::Duration::from_mins(5),
            settle: std::time::Duration::ZERO,
            expect_newest: None,
        };
        let rules = ArchiveRules { retention: Some(retention), verify: None, guard, user_data: false };
        Self {
            folder,
            pruner: ArchivePruner {
                state,
                clock,
                archive,
                rules,
                policies: Vec::new(),
                only: CopyFilter::default(),
            },
        }
    }

    fn path(&self, instance: &str, day: u8, end: &str) -> PathBuf {
        let name = format!("202611{day:02}T020000Z-{}{end}", id(day));
        self.folder.path().join("vault/ch-gva-2").join(instance).join(name)
    }

    /// A copy of a snapshot of that day of November, with a mark in its manifest.
    fn copy(&self, instance: &str, day: u8, mark: Option<&str>) {
        let mut manifest = json!({
            "version": 1, "zone": "ch-gva-2",
            "snapshot": {"id": id(day), "name": "n", "created_at": format!("2026-11-{day:02}T02:00:00Z")},
            "instance": {"id": instance, "name": "web-1"},
            "image": {"bytes": 4, "md5": "0".repeat(32)},
            "verified_at": "2026-11-19T00:00:00Z",
        });
        if let Some(mark) = mark {
            manifest[mark] = json!("2026-11-19T00:00:00Z");
        }
        std::fs::create_dir_all(self.path(instance, day, "").parent().unwrap()).unwrap();
        std::fs::write(self.path(instance, day, ".json"), manifest.to_string()).unwrap();
        std::fs::write(self.path(instance, day, ".qcow2"), b"QFI\xfb").unwrap();
        std::fs::write(self.path(instance, day, ".qcow2.md5"), b"sum").unwrap();
    }

    async fn prune(&self) -> Vec<Step> {
        let recorder = Recorder::manual(self.pruner.state.clone(), self.pruner.clock.clone(), Uuid::nil());
        self.pruner.prune(&recorder, None, &CancellationToken::new()).await.unwrap().1
    }

    /// The days whose images are there.
    fn days(&self, instance: &str) -> Vec<u8> {
        (1..=30).filter(|day| self.path(instance, *day, ".qcow2").exists()).collect()
    }
}

fn lines(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn what_the_retention_lets_go_goes_and_its_manifest_stays_for_the_gate() {
    let bench = Bench::new(last(2));
    for day in [1, 2, 3, 4] {
        bench.copy(WEB, day, None);
    }
    bench.copy(DB, 5, None);
    let steps = bench.prune().await;
    assert_eq!(steps.iter().map(|step| step.outcome).collect::<Vec<_>>(), [StepOutcome::Done; 2]);
    assert_eq!((bench.days(WEB), bench.days(DB)), (vec![3, 4], vec![5]));
    let catalogue = bench.pruner.archive.catalogue().await.unwrap();
    assert_eq!((catalogue.copies().len(), catalogue.problems().len()), (5, 0));
    let audit = lines(&bench.folder.path().join("state/audit.jsonl"));
    let told: Vec<_> =
        audit.iter().map(|line| (&line["outcome"], &line["action"], &line["archive"])).collect();
    let [intended, done, action, vault] = ["intended", "done", "prune_copy", "vault"].map(|word| json!(word));
    assert_eq!(
        told,
        [
            (&intended, &action, &vault),
            (&done, &action, &vault),
            (&intended, &action, &vault),
            (&done, &action, &vault)
        ]
    );
    assert!(!audit[0]["reasons"][0].as_str().unwrap().is_empty());
    // Pruned once, they neither count nor go again.
    assert!(bench.prune().await.is_empty());
}

#[tokio::test]
async fn the_last_verified_copy_of_an_instance_stays_unless_all_may_go() {
    let aged = Retention { max_age: Some("1d".parse().unwrap()), ..retention() };
    let bench = Bench::new(aged.clone());
    for day in [1, 2, 3] {
        bench.copy(WEB, day, None);
    }
    // Newer ones that are no copies protect nothing.
    bench.copy(WEB, 4, Some("corrupt_since"));
    bench.copy(WEB, 5, Some("pruned_at"));
    std::fs::remove_file(bench.path(WEB, 5, ".qcow2")).unwrap();
    bench.prune().await;
    assert_eq!(bench.days(WEB), [3, 4], "the newest copy, and the corrupt one as it was");
    let empty = Bench::new(Retention { min_keep: 0, ..aged });
    empty.copy(WEB, 1, None);
    empty.prune().await;
    assert_eq!(empty.days(WEB), [0_u8; 0]);
}

#[tokio::test]
async fn a_corrupt_copy_is_neither_counted_nor_touched() {
    let bench = Bench::new(last(2));
    for (day, mark) in [(1, None), (2, None), (3, Some("corrupt_since")), (4, Some("corrupt_since"))] {
        bench.copy(WEB, day, mark);
    }
    assert!(bench.prune().await.is_empty());
    assert_eq!(bench.days(WEB), [1, 2, 3, 4]);
}

#[tokio::test]
async fn a_held_snapshot_keeps_its_copy() {
    let bench = Bench::new(last(1));
    for day in [1, 2, 3] {
        bench.copy(WEB, day, None);
    }
    let clock = Arc::clone(&bench.pruner.clock);
    let now = clock.now();
    let hold =
        holds::Hold { snapshot: id(1).parse().unwrap(), until: None, reason: None, since: now, about: None };
    bench.pruner.state.hold(&*clock, hold).await.unwrap();
    bench.prune().await;
    assert_eq!(bench.days(WEB), [1, 3]);
}

#[tokio::test]
async fn a_copy_stays_if_the_one_that_would_stay_in_its_place_does_not_count_any_more() {
    let corrupt = async |bench: &Bench, kept: &StoredCopy, is_noted: bool| {
        let now = bench.pruner.clock.now();
        if !is_noted {
            bench.pruner.archive.update_manifest(kept, ManifestUpdate::Corrupt(now)).await.unwrap();
            return;
        }
        // The archive could not be written to say so.
        let found = CorruptCopy { since: now, verified_at: kept.manifest.verified_at };
        let stem = kept.stem();
        let note = move |memory: &mut ArchiveMemory| {
            memory.corrupt.insert(stem.clone(), found);
        };
        let (state, clock) = (&bench.pruner.state, &*bench.pruner.clock);
        state.change_archive(clock, bench.pruner.archive.name(), note).await.unwrap();
    };
    for is_noted in [false, true] {
        let bench = Bench::new(last(1));
        for day in [1, 2, 3] {
            bench.copy(WEB, day, None);
        }
        let plan = bench.pruner.plan(None, &[]).await.unwrap();
        let kept = &plan.newest_kept[&WEB.parse().unwrap()];
        assert_eq!(kept.manifest.snapshot.id, id(3).parse().unwrap());
        corrupt(&bench, kept, is_noted).await;
        for decision in plan.deletions() {
            let stays = bench.pruner.prune_one(&decision.copy, Some(kept)).await.unwrap_err();
            assert_eq!(stays.outcome, StepOutcome::Blocked);
            assert!(stays.message.contains("does not count any more"), "{}", stays.message);
        }
        assert_eq!(bench.days(WEB), [1, 2, 3]);
    }
}

#[tokio::test]
async fn an_image_that_a_crash_left_behind_its_mark_goes_the_next_time() {
    let bench = Bench::new(last(1));
    bench.copy(WEB, 1, Some("pruned_at"));
    bench.copy(WEB, 2, None);
    let steps = bench.prune().await;
    assert_eq!(steps.len(), 1);
    assert_eq!(bench.days(WEB), [2]);
    assert!(bench.path(WEB, 1, ".pruned.json").exists() && !bench.path(WEB, 1, ".qcow2.md5").exists());
}

#[tokio::test]
async fn an_image_behind_its_mark_stays_where_none_as_new_is_left() {
    for (min_keep, is_left) in [(1, true), (0, false)] {
        let bench = Bench::new(Retention { min_keep, ..last(1) });
        bench.copy(WEB, 1, None);
        bench.copy(WEB, 2, Some("pruned_at"));
        let plan = bench.pruner.plan(None, &[]).await.unwrap();
        let warned: Vec<&String> = plan.warnings.values().flatten().collect();
        assert_eq!(
            warned.iter().filter(|text| text.contains("remove its `.pruned.json`")).count(),
            usize::from(is_left)
        );
        bench.prune().await;
        assert_eq!(bench.days(WEB), if is_left { vec![1, 2] } else { vec![1] });
    }
}

#[tokio::test]
async fn in_doubt_nothing_is_pruned() {
    let bench = Bench::new(last(1));
    for day in [1, 2] {
        bench.copy(WEB, day, None);
    }
    // It is not known what is on hold.
    let holds = bench.folder.path().join("state/holds.json");
    std::fs::write(&holds, b"{").unwrap();
    assert!(bench.pruner.plan(None, &[]).await.is_err());
    std::fs::remove_file(&holds).unwrap();
    // An archive that is no folder.
    let vault = bench.folder.path().join("vault");
    std::fs::rename(&vault, bench.folder.path().join("away")).unwrap();
    std::fs::write(&vault, b"").unwrap();
    assert!(bench.pruner.plan(None, &[]).await.is_err());
    std::fs::remove_file(&vault).unwrap();
    std::fs::rename(bench.folder.path().join("away"), &vault).unwrap();
    // Two copies of one snapshot.
    std::fs::create_dir_all(vault.join("ch-gva-2").join(DB)).unwrap();
    bench.copy(DB, 1, None);
    assert!(bench.prune().await.is_empty());
    assert_eq!((bench.days(WEB), bench.days(DB)), (vec![1, 2], vec![1]));
}

#[tokio::test]
async fn a_filter_prunes_a_part_of_what_all_would_be_and_never_more() {
    let mut bench = Bench::new(last(1));
    for day in [1, 2, 3] {
        bench.copy(WEB, day, None);
        bench.copy(DB, day + 3, None);
    }
    bench.pruner.only.zone = Some("de-fra-1".parse().unwrap());
    assert!(bench.prune().await.is_empty());
    bench.pruner.only = CopyFilter { instance: Some(DB.parse().unwrap()), zone: None };

    // The guard blocks all four, so it blocks these two, and what was allowed for all stays allowed.
    bench.pruner.rules.guard.max_deletes = Some(3);
    let (of, clock) = (bench.pruner.allowed(), Arc::clone(&bench.pruner.clock));
    let allowance =
        Allowance { of: of.clone(), zone: None, deletes: 4, given_at: clock.now(), ends_at: None };
    bench.pruner.state.allow(&*clock, allowance).await.unwrap();
    assert!(bench.prune().await.is_empty());
    assert_eq!(bench.pruner.plan(None, &[]).await.unwrap().held.len(), 1);
    assert_eq!(bench.pruner.state.allowances(&of).await.unwrap().len(), 1);

    bench.pruner.rules.guard.max_deletes = None;
    assert_eq!(bench.pruner.plan(None, &[]).await.unwrap().decisions.len(), 2);
    assert_eq!(bench.prune().await.len(), 2);
    assert_eq!((bench.days(WEB), bench.days(DB)), (vec![1, 2, 3], vec![6]));
    bench.pruner.only = CopyFilter::default();
    assert_eq!(bench.prune().await.len(), 2);
    assert_eq!((bench.days(WEB), bench.days(DB)), (vec![3], vec![6]));
}
