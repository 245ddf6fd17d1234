//! Claims about verifying copies again. The real disk in a temporary folder, until it fails.

#![expect(clippy::disallowed_methods, reason = "tests do to files what the program must not do")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::Value;

use super::*;
use crate::archive::catalogue::ProblemKind;
use crate::archive::layout::CopyPaths;
use crate::archive::local::LocalArchive;
use crate::archive::testing::{NoRandomness, Shared, TestClock, TestDisk, image, manifest_of};
use crate::archive::transfer::hash::Hashers;
use crate::disk::{Disk as _, RealDisk};
use crate::policy::Which;
use crate::snapshot::{Snapshot, SnapshotState};

const NOW: &str = "2026-11-20T00:00:00Z";
const INSTANCE: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";

struct Bench {
    folder: tempfile::TempDir,
    disk: Arc<TestDisk>,
    archive: Archive,
    images: Vec<Vec<u8>>,
}

impl Bench {
    /// An archive with some copies; each was verified a day later than the one before it.
    fn with(copies: u8) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let disk = Arc::<TestDisk>::default();
        let path = folder.path().join("vault");
        let clock = Arc::new(TestClock::at(NOW));
        let shared = Arc::new(Shared(Arc::clone(&disk)));
        let local = LocalArchive::new("vault".parse().unwrap(), path, shared, clock);
        let images = (1..=copies).map(|number| image(1_300_000, number.into())).collect();
        let bench = Self { folder, disk, archive: Archive::Local(local), images };
        for (number, bytes) in (1..).zip(&bench.images) {
            let manifest = manifest(number, bytes);
            std::fs::create_dir_all(&bench.paths(number).folder).unwrap();
            write(&bench.paths(number).image(), bytes);
            write(&bench.paths(number).md5(), b"sum");
            write(&bench.paths(number).manifest(None), &manifest.to_bytes());
        }
        bench
    }

    fn paths(&self, number: u8) -> CopyPaths {
        CopyPaths::new(&self.folder.path().join("vault"), &manifest(number, b"").id())
    }

    fn read(&self, number: u8) -> Manifest {
        Manifest::from_bytes(&self.file(number)).unwrap()
    }

    /// The manifest's file.
    fn file(&self, number: u8) -> Vec<u8> {
        let manifests = self.paths(number).manifests();
        manifests.iter().find_map(|path| std::fs::read(path).ok()).unwrap()
    }

    /// Every file of the copies with its bytes, except for the manifests with these numbers.
    fn files(&self, but: &[u8]) -> BTreeMap<PathBuf, Vec<u8>> {
        let but: Vec<_> = but.iter().flat_map(|number| self.paths(*number).manifests()).collect();
        let entries = std::fs::read_dir(self.paths(1).folder).unwrap().map(|entry| entry.unwrap().path());
        let files = entries.filter(|path| !but.contains(path));
        files.map(|path| (path.clone(), std::fs::read(&path).unwrap_or_default())).collect()
    }

    async fn copies(&self) -> Vec<StoredCopy> {
        self.archive.catalogue().await.unwrap().copies().to_vec()
    }

    async fn verify(&self, percent: u64) -> Verification {
        let catalogue = self.archive.catalogue().await.unwrap();
        let mut verification = Verification::of(&catalogue);
        for copy in due(&catalogue, percent, NOW.parse().unwrap()) {
            let outcome = self.verify_one(&copy).await;
            verification.copies.push((copy, outcome));
        }
        verification
    }

    async fn verify_one(&self, copy: &StoredCopy) -> Outcome {
        let (clock, hashers) = (TestClock::at(NOW), Hashers::default());
        let reader = CopyReader::new(&clock, &NoRandomness, &hashers);
        verify(&self.archive, copy, reader).await.outcome
    }
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
}

fn snapshot(number: u8) -> Snapshot {
    Snapshot {
        id: format!("b0c0ab00-0000-4000-8000-0000000000{number:02x}").parse().unwrap(),
        name: "nightly".into(),
        created_at: format!("2026-11-{number:02}T02:30:00.5Z").parse().unwrap(),
        state: SnapshotState::Exported,
        size_gib: Some(10),
        application_consistent: None,
        instance_id: Some(INSTANCE.parse().unwrap()),
    }
}

fn manifest(number: u8, bytes: &[u8]) -> Manifest {
    let of = snapshot(number);
    let mut manifest = manifest_of(bytes);
    (manifest.snapshot.id, manifest.snapshot.created_at) = (of.id, of.created_at);
    manifest.image.file = "../../elsewhere".into();
    Manifest { verified_at: of.created_at, ..manifest }
}

#[tokio::test]
async fn a_good_copy_is_recorded_as_verified_now_and_nothing_else_changes() {
    let bench = Bench::with(2);
    let before = bench.files(&[1, 2]);
    let verified = bench.verify(100).await;
    assert!(verified.is_good() && verified.copies.len() == 2);
    assert_eq!(bench.files(&[1, 2]), before);
    for number in [1, 2] {
        let mut expected = manifest(number, &bench.images[usize::from(number) - 1]);
        expected.verified_at = NOW.parse().unwrap();
        let value = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        assert_eq!(value(&bench.file(number)), value(&expected.to_bytes()));
    }
}

#[tokio::test]
async fn a_bit_that_flipped_makes_a_copy_count_no_more_and_its_image_stays() {
    let bench = Bench::with(2);
    let mut flipped = bench.images[0].clone();
    flipped[1_299_999] ^= 1;
    write(&bench.paths(1).image(), &flipped);
    let before = bench.files(&[1, 2]);
    let verified = bench.verify(100).await;
    assert!(!verified.is_good());
    assert!(matches!(&verified.copies[0].1, Outcome::Corrupt(why) if why.contains("its MD5 is")));
    assert_eq!(verified.copies[1].1, Outcome::Good);
    let after = bench.files(&[1, 2]);
    assert_eq!(before.keys().filter(|path| after.get(*path) != before.get(*path)).count(), 0);
    assert_eq!(bench.read(1).corrupt_since, Some(NOW.parse().unwrap()));
    let catalogue = bench.archive.catalogue().await.unwrap();
    assert_eq!(catalogue.problems()[0].kind, ProblemKind::Corrupt(NOW.parse().unwrap()));
    assert!(catalogue.proof(&snapshot(1), Which::All).is_none());
    assert!(catalogue.proof(&snapshot(2), Which::All).is_some());
    // And it stays an alert.
    let again = bench.verify(100).await;
    assert!(!again.is_good() && again.problems.is_empty(), "it was read again: {again:?}");
}

#[tokio::test]
async fn what_a_clock_that_was_ahead_verified_is_read_next() {
    let bench = Bench::with(3);
    let ahead = "2031-01-01T00:00:00Z".parse().unwrap();
    bench.archive.update_manifest(&bench.copies().await[1], ManifestUpdate::Verified(ahead)).await.unwrap();
    let catalogue = bench.archive.catalogue().await.unwrap();
    let [next] = &due(&catalogue, 1, NOW.parse().unwrap())[..] else { panic!() };
    assert_eq!(next.manifest.verified_at, ahead);
    // By then it is the newest.
    let [next] = &due(&catalogue, 1, ahead)[..] else { panic!() };
    assert_ne!(next.manifest.verified_at, ahead);
}

#[tokio::test]
async fn what_hashes_right_and_is_no_image_is_corrupt() {
    let bench = Bench::with(1);
    let page = vec![b'<'; 1000];
    write(&bench.paths(1).image(), &page);
    write(&bench.paths(1).manifest(None), &manifest(1, &page).to_bytes());
    let verified = bench.verify(100).await;
    assert!(matches!(&verified.copies[0].1, Outcome::Corrupt(why) if why.contains("not a valid image")));
}

#[tokio::test]
async fn what_is_cut_lost_linked_or_foreign_is_reported_and_nothing_is_touched() {
    let bench = Bench::with(5);
    write(&bench.paths(1).image(), &bench.images[0][..1_000_000]);
    std::fs::remove_file(bench.paths(2).image()).unwrap();
    std::fs::remove_file(bench.paths(3).image()).unwrap();
    std::os::unix::fs::symlink(bench.paths(5).image(), bench.paths(3).image()).unwrap();
    write(&bench.paths(4).manifest(None), b"{\"version\": 9}");
    write(&bench.paths(1).folder.join("notes.txt"), b"mine");
    let before = bench.files(&[5]);
    let verified = bench.verify(100).await;
    assert!(!verified.is_good());
    assert_eq!(verified.copies.len(), 1);
    assert_eq!(verified.copies[0].1, Outcome::Good);
    assert_eq!(verified.problems.len(), 5, "{:?}", verified.problems);
    assert_eq!(bench.files(&[5]), before);
}

#[tokio::test(start_paused = true)]
async fn one_that_can_not_be_read_is_reported_and_not_marked() {
    let bench = Bench::with(1);
    let copy = bench.copies().await.remove(0);
    let before = bench.files(&[]);
    bench.disk.unreadable.store(true, Ordering::Relaxed);
    assert!(matches!(bench.verify_one(&copy).await, Outcome::Failed(why) if why.contains("can't be read")));
    bench.disk.unreadable.store(false, Ordering::Relaxed);
    std::fs::rename(bench.paths(1).image(), bench.folder.path().join("away")).unwrap();
    assert!(matches!(bench.verify_one(&copy).await, Outcome::Failed(_)));
    std::fs::rename(bench.folder.path().join("away"), bench.paths(1).image()).unwrap();
    assert_eq!(bench.files(&[]), before);
}

#[tokio::test]
async fn what_changed_while_it_was_read_is_not_overwritten() {
    let bench = Bench::with(2);
    let copies = bench.copies().await;
    let copy = copies.iter().find(|copy| copy.manifest.snapshot.id == snapshot(1).id).unwrap();
    let pruned = Manifest { pruned_at: Some(NOW.parse().unwrap()), ..(*copy.manifest).clone() };
    write(&bench.paths(1).manifest(None), &pruned.to_bytes());
    assert!(
        matches!(bench.verify_one(copy).await, Outcome::Failed(why) if why.contains("changed in the meantime"))
    );
    assert_eq!(bench.read(1), pruned);
    // Nor is one that another process stores at this moment.
    let _held = RealDisk.lock(&bench.paths(2).lock()).unwrap();
    let other = copies.iter().find(|copy| copy.manifest.snapshot.id == snapshot(2).id).unwrap();
    assert!(matches!(bench.verify_one(other).await, Outcome::Failed(why) if why.contains("another process")));
    assert_eq!(bench.read(2), *other.manifest);
}

#[tokio::test]
async fn a_share_of_the_copies_goes_round_among_all_of_them() {
    let bench = Bench::with(5);
    let numbers = |verified: &Verification| -> Vec<u8> {
        let ids = verified.copies.iter().map(|(copy, _)| copy.manifest.snapshot.id);
        ids.map(|id| (1..=5).find(|number| snapshot(*number).id == id).unwrap()).collect()
    };
    assert_eq!(numbers(&bench.verify(1).await), [1], "at least one");
    assert_eq!(numbers(&bench.verify(40).await), [2, 3]);
    assert_eq!(numbers(&bench.verify(30).await), [4, 5]);
    assert_eq!(numbers(&bench.verify(100).await).len(), 5);
}

#[tokio::test]
async fn pruning_that_is_stopped_anywhere_leaves_a_copy_that_counts_and_can_be_finished() {
    for changes in 0.. {
        let bench = Bench::with(2);
        let copies = bench.copies().await;
        let copy = copies.iter().find(|copy| copy.manifest.snapshot.id == snapshot(1).id).unwrap();
        bench.disk.changes.store(changes, Ordering::Relaxed);
        let pruned = bench.archive.update_manifest(copy, ManifestUpdate::Pruned(NOW.parse().unwrap())).await;
        let is_through = !bench.disk.stopped();
        assert!(pruned.is_ok() || !is_through);
        bench.disk.changes.store(u64::MAX, Ordering::Relaxed);
        let catalogue = bench.archive.catalogue().await.unwrap();
        assert_eq!(catalogue.problems(), [], "after {changes} changes");
        assert!(catalogue.proof(&snapshot(1), Which::All).is_some(), "after {changes} changes");
        let copy =
            catalogue.copies().iter().find(|copy| copy.manifest.snapshot.id == snapshot(1).id).unwrap();
        assert!(copy.manifest.pruned_at.is_some() || copy.has_image);
        if copy.has_image {
            let later = ManifestUpdate::Pruned("2026-11-21T00:00:00Z".parse().unwrap());
            bench.archive.update_manifest(copy, later).await.unwrap();
        }
        let paths: Vec<_> = bench.files(&[]).into_keys().collect();
        assert!(!paths.contains(&bench.paths(1).image()) && paths.contains(&bench.paths(2).image()));
        let catalogue = bench.archive.catalogue().await.unwrap();
        assert!(catalogue.proof(&snapshot(1), Which::All).is_some() && catalogue.problems().is_empty());
        if is_through {
            break;
        }
    }
}
