//! Claims that hold for every kind of archive: a folder on a disk in memory, a bucket in a store in memory, and a repository of a
//! simulated restic. Those that look at single files behind the archive hold for the first two.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::archive::backend::Archive;
use crate::archive::catalogue::{Catalogue, ProblemKind, StoredCopy};
use crate::archive::copy_reader::CopyReader;
use crate::archive::layout::HoldMark;
use crate::archive::local::LocalArchive;
use crate::archive::manifest::{ImageRecord, Manifest};
use crate::archive::manifest_update::{ManifestUpdate, UpdateError};
use crate::archive::proof::VerifiedCopy;
use crate::archive::restic::tests::ResticFixture;
use crate::archive::s3::tests::Bucket;
use crate::archive::stats::ArchiveStats;
use crate::archive::store::{ImageToStore, StoreError, store};
use crate::archive::testing::{
    FakeSource, Fault, NoRandomness, Offer, TestClock, image, manifest_of, md5_of, put,
};
use crate::archive::transfer::connection::Download;
use crate::archive::transfer::hash::Hashers;
use crate::archive::transfer::sink::{Begin, ImageVersion, Output};
use crate::archive::verify::{self, Outcome};
use crate::disk::{Access, Disk as _, Kind, create_folders, read_file, replace_file};
use crate::policy::Which;
use crate::sim::disk::MemoryDisk;
use crate::snapshot::{Snapshot, SnapshotState};
use crate::text::chain;

pub(in crate::archive) const LEN: usize = 1_300_000;
pub(in crate::archive) const NOW: &str = "2026-11-20T00:00:00Z";
const INSTANCE: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";
pub(in crate::archive) const STEM: &str =
    "ch-gva-2/9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec/20261101T023000Z-b0c0ab00-0000-4000-8000-00000000f105";

/// An archive of one kind, and its files behind its back.
pub(in crate::archive) trait Fixture {
    fn archive(&self) -> &Archive;

    /// All files by their path in the archive, except for locks.
    fn files(&self) -> BTreeMap<String, Bytes>;

    fn write(&self, path: &str, bytes: &[u8]);

    fn remove(&self, path: &str);

    /// Whether there is a file for `md5sum -c` beside each image.
    fn has_sums(&self) -> bool {
        true
    }
}

struct Folder {
    disk: MemoryDisk,
    archive: Archive,
}

impl Folder {
    fn new() -> Self {
        let (disk, clock) = (MemoryDisk::new(), Arc::new(TestClock::at(NOW)));
        let (name, path) = ("vault".parse().unwrap(), PathBuf::from("/vault"));
        let archive = Archive::Local(LocalArchive::new(name, path, Arc::new(disk.clone()), clock));
        Self { disk, archive }
    }

    fn add_files(&self, folder: &Path, files: &mut BTreeMap<String, Bytes>) {
        for entry in self.disk.list(folder).unwrap_or_default() {
            let path = folder.join(entry.name);
            if entry.kind == Kind::Folder {
                self.add_files(&path, files);
            } else if path.extension().is_none_or(|end| end != "lock") {
                let name = path.strip_prefix("/vault").unwrap().to_str().unwrap().to_owned();
                files.insert(name, read_file(&self.disk, &path, u64::MAX).unwrap().into());
            }
        }
    }
}

impl Fixture for Folder {
    fn archive(&self) -> &Archive {
        &self.archive
    }

    fn files(&self) -> BTreeMap<String, Bytes> {
        let mut files = BTreeMap::new();
        self.add_files(Path::new("/vault"), &mut files);
        files
    }

    fn write(&self, path: &str, bytes: &[u8]) {
        let path = Path::new("/vault").join(path);
        create_folders(&self.disk, path.parent().unwrap(), Access::Group).unwrap();
        replace_file(&self.disk, &path, bytes, Access::Group).unwrap();
    }

    fn remove(&self, path: &str) {
        self.disk.remove_file(&Path::new("/vault").join(path)).unwrap();
    }
}

fn every_kind() -> [Box<dyn Fixture>; 3] {
    [Box::new(Folder::new()), Box::new(Bucket::default()), Box::new(ResticFixture::default())]
}

/// Those in which a test may put a file.
fn of_plain_files() -> [Box<dyn Fixture>; 2] {
    [Box::new(Folder::new()), Box::new(Bucket::default())]
}

fn snapshot(number: u16, created_at: &str) -> Snapshot {
    Snapshot {
        id: format!("b0c0ab00-0000-4000-8000-00000000{number:04x}").parse().unwrap(),
        name: "nightly".into(),
        created_at: created_at.parse().unwrap(),
        state: SnapshotState::Exported,
        size_gib: Some(10),
        application_consistent: None,
        instance_id: Some(INSTANCE.parse().unwrap()),
    }
}

fn to_store() -> ImageToStore {
    ImageToStore {
        zone: "ch-gva-2".parse().unwrap(),
        snapshot: snapshot(0xf105, "2026-11-01T02:30:00Z"),
        instance: None,
        policy: Some("nightly".parse().unwrap()),
        run_id: "01932b5e-0000-7000-8000-000000000000".parse().unwrap(),
        template: None,
        machine: None,
        user_data_in: BTreeSet::new(),
        missing: Vec::new(),
    }
}

pub(in crate::archive) async fn begin(archive: &Archive) -> Output {
    match archive.begin(&to_store()).await.unwrap() {
        Begin::Missing(output) => output,
        Begin::Stored(copy) => panic!("{copy:?}"),
    }
}

async fn store_in(outputs: Vec<Output>, source: &FakeSource) -> Vec<Result<VerifiedCopy, StoreError>> {
    let download = Download {
        source,
        clock: &TestClock::at(NOW),
        randomness: &NoRandomness,
        stall_timeout: Duration::from_mins(1),
        connections: 1,
        hashers: &Hashers::default(),
        throttle: None,
        progress: &|_| {},
    };
    store(&to_store(), outputs, &download).await.into_iter().map(|(_, result)| result).collect()
}

pub(in crate::archive) async fn store_image(
    archive: &Archive,
    source: &FakeSource,
) -> Result<VerifiedCopy, StoreError> {
    store_in(vec![begin(archive).await], source).await.remove(0)
}

pub(in crate::archive) fn source(bytes: &[u8]) -> FakeSource {
    FakeSource::new(Offer::of(bytes), [])
}

pub(in crate::archive) async fn write(output: &mut Output, bytes: &[u8]) {
    let image =
        ImageVersion { md5: md5_of(bytes).parse().unwrap(), bytes: Some(bytes.len() as u64), etag: None };
    output.sink.expect(&image).unwrap();
    for chunk in bytes.chunks(400_001) {
        output.sink.write(Bytes::copy_from_slice(chunk)).await.unwrap();
    }
}

async fn catalogue(fixture: &dyn Fixture) -> Catalogue {
    fixture.archive().catalogue().await.unwrap()
}

async fn is_empty(fixture: &dyn Fixture) -> bool {
    let catalogue = catalogue(fixture).await;
    catalogue.copies().is_empty() && catalogue.problems().is_empty()
}

/// The archive has one copy, all its files, and no problem.
async fn assert_holds(fixture: &dyn Fixture, bytes: &[u8], why: &str) {
    let catalogue = catalogue(fixture).await;
    assert_eq!((catalogue.copies().len(), catalogue.problems()), (1, &[][..]), "{why}");
    let files = fixture.files();
    let ends: Vec<_> = files.keys().map(|path| path.strip_prefix(STEM).unwrap()).collect();
    assert_eq!(ends, [".json", ".qcow2", ".qcow2.md5"][..2 + usize::from(fixture.has_sums())], "{why}");
    assert!(files[&path(".qcow2")] == bytes, "{why}: the image differs");
    let sums = format!("{}  {}.qcow2\n", md5_of(bytes), STEM.rsplit('/').next().unwrap());
    assert!(!fixture.has_sums() || files[&path(".qcow2.md5")] == sums, "{why}");
    assert_eq!(
        *catalogue.copies()[0].manifest,
        Manifest::from_bytes(&files[&path(".json")]).unwrap(),
        "{why}"
    );
}

/// A bucket adds the `ETag` that its store gave the image.
pub(in crate::archive) fn without_etag(manifest: &Manifest) -> Manifest {
    let image = ImageRecord { etag: None, version_id: None, ..manifest.image.clone() };
    Manifest { image, ..manifest.clone() }
}

fn path(end: &str) -> String {
    format!("{STEM}{end}")
}

#[tokio::test(start_paused = true)]
async fn a_probe_leaves_nothing_is_never_listed_and_replaces_one_that_a_crash_left() {
    const PROBE: &str = "snapwarden-archive.json.probe";
    for fixture in every_kind() {
        let fixture = &*fixture;
        store_image(fixture.archive(), &source(&image(LEN, 1))).await.unwrap();
        let before = fixture.files();
        for left in [false, true] {
            if left {
                fixture.write(PROBE, b"half of it");
                let catalogue = catalogue(fixture).await;
                assert_eq!((catalogue.copies().len(), catalogue.problems()), (1, &[][..]));
            }
            let steps = fixture.archive().probe().await;
            assert_eq!(steps, [("write", None), ("read back", None), ("delete", None)]);
            assert_eq!(fixture.files(), before, "left over: {left}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_is_seen_only_once_it_is_published_and_is_not_stored_again() {
    for fixture in every_kind() {
        let (fixture, bytes) = (&*fixture, image(LEN, 1));
        assert!(is_empty(fixture).await, "before anything is stored");
        let mut output = begin(fixture.archive()).await;
        write(&mut output, &bytes).await;
        assert!(is_empty(fixture).await);
        let visible = [path(".json"), path(".qcow2"), path(".qcow2.md5")];
        assert!(fixture.files().keys().all(|path| !visible.contains(path)));
        let published = output.sink.publish(manifest_of(&bytes)).await.unwrap();
        assert_eq!(without_etag(&published), manifest_of(&bytes));
        assert_holds(fixture, &bytes, "published").await;
        let expected = VerifiedCopy::new(fixture.archive().name(), &published);
        match fixture.archive().begin(&to_store()).await.unwrap() {
            Begin::Stored(copy) => assert_eq!(copy, expected),
            Begin::Missing(_) => panic!("it would be stored again"),
        }
        let stats = ArchiveStats::read(fixture.archive()).await;
        assert_eq!((stats.images, stats.bytes, stats.corrupt, stats.error), (1, LEN as u64, 0, None));
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_abandoned_or_dropped_is_no_copy_and_does_not_harm_the_next() {
    for is_dropped in [true, false] {
        for fixture in every_kind() {
            let (fixture, bytes) = (&*fixture, image(LEN, 1));
            let mut output = begin(fixture.archive()).await;
            write(&mut output, &bytes[..1_000_000]).await;
            if is_dropped {
                drop(output);
            } else {
                output.sink.abandon().await;
            }
            assert!(is_empty(fixture).await);
            store_image(fixture.archive(), &source(&bytes)).await.unwrap();
            assert_holds(fixture, &bytes, "stored after all").await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_that_starts_over_is_the_second_one_alone() {
    for fixture in every_kind() {
        let (fixture, old, new) = (&*fixture, image(LEN, 1), image(LEN - 70_000, 2));
        let mut output = begin(fixture.archive()).await;
        write(&mut output, &old).await;
        output.sink.restart().await.unwrap();
        write(&mut output, &new).await;
        output.sink.publish(manifest_of(&new)).await.unwrap();
        assert_holds(fixture, &new, "started over").await;
    }
}

#[tokio::test(start_paused = true)]
async fn other_bytes_than_the_verified_ones_are_not_published() {
    for fixture in every_kind() {
        let (fixture, bytes) = (&*fixture, image(LEN, 1));
        let mut output = begin(fixture.archive()).await;
        write(&mut output, &bytes[1..]).await;
        output.sink.publish(manifest_of(&bytes)).await.unwrap_err();
        assert!(is_empty(fixture).await);
        assert!(fixture.files().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_wrong_md5_is_fetched_again_once_and_an_invalid_image_never_published() {
    for fixture in every_kind() {
        let (fixture, bytes) = (&*fixture, image(LEN, 1));
        let archive = fixture.archive();
        let wrong = FakeSource::new(Offer { md5: Some("0".repeat(32)), ..Offer::of(&bytes) }, []);
        let error = chain(&store_image(archive, &wrong).await.unwrap_err());
        assert!(error.contains(&md5_of(&bytes)) && error.contains(&"0".repeat(32)), "{error}");
        assert_eq!(wrong.offsets(), [0, 0]);

        let mut backed = bytes.clone();
        put(&mut backed, 8, &4096_u64.to_be_bytes());
        let error = chain(&store_image(archive, &source(&backed)).await.unwrap_err());
        assert!(error.contains("it is not a valid image"), "{error}");

        let unnamed = FakeSource::new(Offer { md5: None, ..Offer::of(&bytes) }, []);
        let error = chain(&store_image(archive, &unnamed).await.unwrap_err());
        assert!(error.contains("unverified") && unnamed.offsets().is_empty(), "{error}");
        assert!(is_empty(fixture).await);

        let flipped = FakeSource::new(Offer::of(&bytes), [Fault::Flip]);
        store_image(archive, &flipped).await.unwrap();
        assert_eq!(catalogue(fixture).await.copies().len(), 1);
        assert!(fixture.files()[&path(".qcow2")] == bytes);
    }
}

#[tokio::test(start_paused = true)]
async fn one_download_feeds_every_kind_of_archive() {
    let (fixtures, bytes) = (every_kind(), image(LEN, 1));
    let mut outputs = Vec::new();
    for fixture in &fixtures {
        outputs.push(begin(fixture.archive()).await);
    }
    let source = FakeSource::new(Offer::of(&bytes), [Fault::Cut(500_000)]);
    for stored in store_in(outputs, &source).await {
        stored.unwrap();
    }
    assert_eq!(source.offsets(), [0, 500_000]);
    for fixture in &fixtures {
        assert_holds(&**fixture, &bytes, "fed").await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_does_not_count_is_fetched_again_and_never_adopted() {
    let bytes = image(LEN, 1);
    let corrupt = Manifest { corrupt_since: Some(NOW.parse().unwrap()), ..manifest_of(&bytes) };
    for damage in ["no manifest", "corrupt", "other length", "garbled", "no image"] {
        for fixture in of_plain_files() {
            let fixture = &*fixture;
            store_image(fixture.archive(), &source(&bytes)).await.unwrap();
            match damage {
                "no manifest" => fixture.remove(&path(".json")),
                "corrupt" => fixture.write(&path(".json"), &corrupt.to_bytes()),
                "other length" => fixture.write(&path(".qcow2"), &bytes[1..]),
                "no image" => fixture.remove(&path(".qcow2")),
                _ => fixture.write(&path(".json"), b"{"),
            }
            assert!(catalogue(fixture).await.copies().is_empty(), "{damage}");
            let source = source(&bytes);
            store_image(fixture.archive(), &source).await.unwrap();
            assert_eq!(source.offsets(), [0], "{damage}");
            assert_holds(fixture, &bytes, damage).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn one_image_is_stored_by_one_at_a_time() {
    for fixture in every_kind() {
        let archive = fixture.archive();
        let output = begin(archive).await;
        let busy = archive.begin(&to_store()).await;
        assert!(matches!(busy, Err(StoreError::Busy { .. })));
        let other = ImageToStore { snapshot: snapshot(2, "2026-10-01T00:00:00Z"), ..to_store() };
        assert!(matches!(archive.begin(&other).await, Ok(Begin::Missing(_))), "another image is none of it");
        output.sink.abandon().await;
        drop(begin(archive).await);
        drop(begin(archive).await);
    }
}

#[tokio::test(start_paused = true)]
async fn the_catalogue_counts_only_verified_copies_and_names_every_problem() {
    let bytes = image(LEN, 1);
    let manifest = String::from_utf8(manifest_of(&bytes).to_bytes()).unwrap();
    let named = |id: &str, end: &str| path(end).replace("00000000f105", id);
    let of = |id: &str| manifest.replace("00000000f105", id);
    for fixture in of_plain_files() {
        let fixture = &*fixture;
        store_image(fixture.archive(), &source(&bytes)).await.unwrap();
        // One of a later version, and one that was pruned, count.
        let later = of("00000000000a").replace("\"version\": 2", "\"version\": 7, \"colour\": {\"of\": [1]}");
        fixture.write(&named("00000000000a", ".json"), later.as_bytes());
        fixture.write(&named("00000000000a", ".qcow2"), &bytes);
        let pruned =
            of("00000000000b").replace("\"pruned_at\": null", "\"pruned_at\": \"2027-01-01T00:00:00Z\"");
        fixture.write(&named("00000000000b", ".json"), pruned.as_bytes());
        // The newest first; of the same moment, by id.
        let counted = ["00000000f105", "00000000000b", "00000000000a"];

        let corrupt = of("00000000000f");
        let corrupt =
            corrupt.replace("\"corrupt_since\": null", "\"corrupt_since\": \"2027-01-01T00:00:00Z\"");
        let elsewhere = path(".json").replace("ch-gva-2", "de-fra-1");
        let stranger = path(".json").replace(INSTANCE, &INSTANCE.replace('9', "8"));
        let cases: [(String, Vec<u8>, &str); 11] = [
            (named("00000000000c", ".qcow2"), bytes.clone(), "there is no manifest beside it"),
            (named("00000000000d", ".json"), of("00000000000d").into(), "the image is missing"),
            (named("00000000000e", ".json"), of("00000000000e").into(), "the image has 1299999 bytes"),
            (named("00000000000f", ".json"), corrupt.into(), "the image is corrupt since 2027"),
            (
                named("000000000010", ".json"),
                manifest.clone().into(),
                "the manifest is about another snapshot",
            ),
            (elsewhere, manifest.clone().into(), "the manifest is about another zone"),
            (stranger, manifest.clone().into(), "the manifest is about another instance"),
            (
                named("000000000011", ".json"),
                b"{\"zone\": \"\x1b[31m\"}".to_vec(),
                "the manifest can't be read",
            ),
            (named("000000000012", ".json"), b"{}".to_vec(), "the manifest can't be read (missing field"),
            (named("000000000013", ".json"), vec![b' '; (1 << 20) + 1], "the manifest can't be read (it"),
            (
                named("000000000014", ".json"),
                of("000000000014").replace("ch-gva-2", "../..").into(),
                "the manifest can't be read",
            ),
        ];
        fixture.write(&named("00000000000e", ".qcow2"), &bytes[1..]);
        for (path, content, _) in &cases {
            fixture.write(path, content);
        }
        // Files of other programs, and of downloads, are neither.
        for name in ["notes.txt", "ch-gva-2/notes.txt", "lost+found/x"] {
            fixture.write(name, b"mine");
        }
        for end in [".qcow2.part", ".qcow2.bad", ".json.new"] {
            fixture.write(&named("000000000015", end), b"half");
        }

        let catalogue = catalogue(fixture).await;
        let ids: Vec<_> =
            catalogue.copies().iter().map(|copy| copy.manifest.snapshot.id.to_string()).collect();
        assert_eq!(ids, counted.map(|end| format!("b0c0ab00-0000-4000-8000-{end}")));
        assert_eq!(catalogue.problems().len(), cases.len(), "{:?}", catalogue.problems());
        assert!(catalogue.problems().is_sorted_by(|one, next| one.path <= next.path));
        for (path, _, reason) in cases {
            let problem = catalogue.problems().iter().find(|problem| problem.path.ends_with(&path)).unwrap();
            let shown = problem.describe();
            assert!(shown.contains(reason) && !shown.contains('\u{1b}'), "{shown}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_proof_is_of_the_snapshot_itself_or_of_a_newer_one_where_that_is_enough() {
    for fixture in every_kind() {
        store_image(fixture.archive(), &source(&image(LEN, 1))).await.unwrap();
        let catalogue = catalogue(&*fixture).await;
        let (stored, older) = (to_store().snapshot, snapshot(9, "2026-10-31T00:00:00Z"));
        let unknown = |snapshot: &Snapshot| Snapshot { instance_id: None, ..snapshot.clone() };
        let other = Some("00000000-0000-4000-8000-000000000001".parse().unwrap());
        let cases = [
            ("itself", stored.clone(), true, true),
            ("itself, without an instance in the listing", unknown(&stored), true, true),
            ("an older one", older.clone(), true, false),
            ("an older one without an instance", unknown(&older), false, false),
            ("an older one of another instance", Snapshot { instance_id: other, ..older }, false, false),
            ("a newer one", snapshot(9, "2026-11-01T02:30:00.26Z"), false, false),
            ("one of the same moment, later by id", snapshot(0xf106, "2026-11-01T02:30:00Z"), false, false),
            ("one of the same moment, earlier by id", snapshot(0, "2026-11-01T02:30:00Z"), true, false),
        ];
        for (what, snapshot, newest, all) in cases {
            for (of, expected) in [(Which::Newest, newest), (Which::All, all)] {
                let proof = catalogue.proof(&snapshot, of);
                assert_eq!(proof.is_some(), expected, "{what}, {of:?}");
                assert!(proof.is_none_or(|proof| proof.snapshot_id() == stored.id));
            }
        }
    }
}

async fn stored_copy(fixture: &dyn Fixture, bytes: &[u8]) -> StoredCopy {
    store_image(fixture.archive(), &source(bytes)).await.unwrap();
    catalogue(fixture).await.copies()[0].clone()
}

#[tokio::test(start_paused = true)]
async fn a_pruned_copy_leaves_its_manifest_and_is_not_stored_again_but_alone_it_does_not_count() {
    for fixture in every_kind() {
        let (fixture, bytes) = (&*fixture, image(LEN, 1));
        let copy = stored_copy(fixture, &bytes).await;
        let at = "2026-11-19T00:00:00Z".parse().unwrap();
        fixture.archive().update_manifest(&copy, ManifestUpdate::Pruned(at)).await.unwrap();
        assert_eq!(fixture.files().into_keys().collect::<Vec<_>>(), [path(".pruned.json")]);
        let after = catalogue(fixture).await;
        assert_eq!(after.problems(), []);
        assert_eq!(*after.copies()[0].manifest, Manifest { pruned_at: Some(at), ..(*copy.manifest).clone() });
        assert!(!after.copies()[0].has_image && after.proof(&to_store().snapshot, Which::All).is_none());
        assert!(matches!(fixture.archive().begin(&to_store()).await, Ok(Begin::Stored(_))));
        // A finding about the copy that was there before is not written over the mark.
        let late = fixture.archive().update_manifest(&copy, ManifestUpdate::Verified(at)).await;
        assert!(matches!(late, Err(UpdateError::Changed { .. })), "{late:?}");
        assert_eq!(catalogue(fixture).await.copies()[0].manifest.pruned_at, Some(at));
    }
}

#[tokio::test(start_paused = true)]
async fn a_mark_stands_in_the_name_of_the_manifest_and_counts_more_than_one_without() {
    let at = "2026-11-19T00:00:00Z".parse().unwrap();
    for (update, end) in
        [(ManifestUpdate::Pruned(at), ".pruned.json"), (ManifestUpdate::Corrupt(at), ".corrupt.json")]
    {
        for fixture in of_plain_files() {
            let (fixture, bytes) = (&*fixture, image(LEN, 1));
            let copy = stored_copy(fixture, &bytes).await;
            // What a later version wrote survives.
            let plain = String::from_utf8(fixture.files()[&path(".json")].to_vec()).unwrap();
            let later = plain.replace("\"version\": 2", "\"version\": 3, \"colour\": {\"of\": [1]}");
            fixture.write(
                &path(".json"),
                later.replace("\"labels\": {", "\"tpm\": true, \"labels\": {").as_bytes(),
            );
            let copy =
                StoredCopy { manifest: Manifest { version: 3, ..(*copy.manifest).clone() }.into(), ..copy };
            fixture.archive().update_manifest(&copy, update).await.unwrap();
            let marked = fixture.files()[&path(end)].clone();
            let read: serde_json::Value = serde_json::from_slice(&marked).unwrap();
            assert_eq!((&read["version"], &read["colour"]["of"][0]), (&3.into(), &1.into()));
            assert_eq!(read["instance"]["tpm"], true);
            assert!(!fixture.files().contains_key(&path(".json")));
            let is_marked = |after: &Catalogue| match update {
                ManifestUpdate::Pruned(_) => {
                    after.problems().is_empty()
                        && after.copies().len() == 1
                        && after.copies()[0].manifest.pruned_at == Some(at)
                }
                _ => {
                    after.copies().is_empty()
                        && after.problems().len() == 1
                        && after.problems()[0].kind == ProblemKind::Corrupt(at)
                }
            };
            assert!(is_marked(&catalogue(fixture).await));
            // As a crash leaves it, and as all archives had it once.
            fixture.write(&path(".json"), plain.as_bytes());
            assert!(is_marked(&catalogue(fixture).await), "{end}");
            fixture.remove(&path(end));
            fixture.write(&path(".json"), &marked);
            assert!(is_marked(&catalogue(fixture).await), "{end}");
            // A name alone is no mark.
            fixture.write(&path(end), plain.as_bytes());
            let after = catalogue(fixture).await;
            assert!(
                after.copies().is_empty() && matches!(after.problems()[0].kind, ProblemKind::Unreadable(_))
            );
            // Whatever was there, a new copy is a good one.
            fixture.write(&path(end), &marked);
            if let ManifestUpdate::Corrupt(_) = update {
                store_image(fixture.archive(), &source(&bytes)).await.unwrap();
                assert_holds(fixture, &bytes, end).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn only_the_manifest_of_a_pruned_copy_without_an_image_is_forgotten() {
    for fixture in every_kind() {
        let (fixture, bytes) = (&*fixture, image(LEN, 1));
        let copy = stored_copy(fixture, &bytes).await;
        let is_refused = async |copy: &StoredCopy| {
            let before = fixture.files();
            let forgotten = fixture.archive().forget_pruned(copy).await;
            assert_eq!(fixture.files(), before);
            matches!(forgotten, Err(UpdateError::Changed { .. }))
        };
        assert!(is_refused(&copy).await);
        let at = "2026-11-19T00:00:00Z".parse().unwrap();
        fixture.archive().update_manifest(&copy, ManifestUpdate::Pruned(at)).await.unwrap();
        assert!(is_refused(&copy).await, "it is another manifest now");
        let pruned = catalogue(fixture).await.copies()[0].clone();
        // As a crash may have left them.
        fixture.write(&path(".qcow2"), &bytes);
        assert!(is_refused(&pruned).await);
        fixture.remove(&path(".qcow2"));
        fixture.write(&path(".qcow2.md5"), b"sum");
        fixture.archive().forget_pruned(&pruned).await.unwrap();
        assert!(fixture.files().is_empty(), "{:?}", fixture.files().keys());
        assert!(is_refused(&pruned).await);
        // It is as if it had never been there.
        store_image(fixture.archive(), &source(&bytes)).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_copy_is_verified_again_and_one_bit_makes_it_count_no_more() {
    for fixture in every_kind() {
        let (fixture, bytes) = (&*fixture, image(LEN, 1));
        let copy = stored_copy(fixture, &bytes).await;
        let later = TestClock::at("2026-12-01T00:00:00Z");
        let verify = async |copy: &StoredCopy| {
            let hashers = Hashers::default();
            let reader = CopyReader::new(&later, &NoRandomness, &hashers);
            verify::verify(fixture.archive(), copy, reader).await.outcome
        };
        assert_eq!(verify(&copy).await, Outcome::Good);
        let again = catalogue(fixture).await.copies()[0].clone();
        let verified_at = "2026-12-01T00:00:00Z".parse().unwrap();
        assert_eq!(*again.manifest, Manifest { verified_at, ..(*copy.manifest).clone() });

        let mut flipped = bytes.clone();
        flipped[LEN - 1] ^= 1;
        fixture.write(&path(".qcow2"), &flipped);
        // What was read before is not what is there now.
        assert!(matches!(verify(&copy).await, Outcome::Failed(why) if why.contains("in the meantime")));
        assert!(matches!(verify(&again).await, Outcome::Corrupt(why) if why.contains("its MD5 is")));
        let after = catalogue(fixture).await;
        assert!(after.copies().is_empty() && after.proof(&to_store().snapshot, Which::All).is_none());
        assert!(matches!(after.problems()[0].kind, ProblemKind::Corrupt(_)));
        assert!(fixture.files()[&path(".qcow2")] == flipped, "the image stays");
    }
}

#[tokio::test(start_paused = true)]
async fn a_corrupt_copy_whose_bytes_are_right_again_counts_again() {
    for fixture in every_kind() {
        let (fixture, bytes) = (&*fixture, image(LEN, 1));
        let copy = stored_copy(fixture, &bytes).await;
        let at = "2026-11-19T00:00:00Z".parse().unwrap();
        fixture.archive().update_manifest(&copy, ManifestUpdate::Corrupt(at)).await.unwrap();
        let verify = async || {
            let (clock, hashers) = (TestClock::at("2026-12-01T00:00:00Z"), Hashers::default());
            let reader = CopyReader::new(&clock, &NoRandomness, &hashers);
            let [copy] = &verify::due(&catalogue(fixture).await, 1, NOW.parse().unwrap())[..] else {
                panic!("it is not read again")
            };
            verify::verify(fixture.archive(), copy, reader).await.outcome
        };
        let mut flipped = bytes.clone();
        flipped[LEN - 1] ^= 1;
        fixture.write(&path(".qcow2"), &flipped);
        assert!(matches!(verify().await, Outcome::Corrupt(_)));
        // Also if it does not begin as an image does: what has the image's length is no page of a proxy.
        fixture.write(&path(".qcow2"), &vec![0; LEN]);
        assert!(matches!(verify().await, Outcome::Corrupt(_)));
        assert_eq!(
            catalogue(fixture).await.problems()[0].kind,
            ProblemKind::Corrupt(at),
            "since the first time"
        );
        fixture.write(&path(".qcow2"), &bytes);
        assert_eq!(verify().await, Outcome::Repaired(at));
        let verified_at = "2026-12-01T00:00:00Z".parse().unwrap();
        let after = catalogue(fixture).await;
        assert_eq!((after.problems(), after.corrupt()), (&[][..], &[][..]));
        assert_eq!(*after.copies()[0].manifest, Manifest { verified_at, ..(*copy.manifest).clone() });
        assert!(after.proof(&to_store().snapshot, Which::All).is_some());
        assert!(fixture.files().keys().all(|path| !path.contains("corrupt")));
    }
}

#[tokio::test(start_paused = true)]
async fn a_copy_on_hold_is_not_pruned_before_every_state_has_released_it() {
    let [ours, theirs] = [1, 2].map(uuid::Uuid::from_u128);
    let time = |text: &str| text.parse::<jiff::Timestamp>().unwrap();
    for fixture in every_kind() {
        let (fixture, bytes) = (&*fixture, image(LEN, 1));
        let (copy, archive) = (stored_copy(fixture, &bytes).await, fixture.archive());
        let id = copy.manifest.id();
        let mark = async |state, until: Option<&str>| {
            let mark = HoldMark::new(state, until.map(time));
            assert!(archive.mark_hold(&id, mark, b"{}\n".to_vec()).await.unwrap());
        };
        let prune = async |at: &str| archive.update_manifest(&copy, ManifestUpdate::Pruned(time(at))).await;
        let marks = async || catalogue(fixture).await.holds().values().flatten().copied().collect::<Vec<_>>();
        mark(ours, None).await;
        mark(theirs, None).await;
        mark(ours, Some("2026-12-01T00:00:00Z")).await;
        let until = Some(time("2026-12-01T00:00:00Z"));
        assert_eq!(marks().await, [HoldMark { state: ours, until }, HoldMark { state: theirs, until: None }]);
        let before = fixture.files();
        assert!(
            matches!(prune("2026-12-02T00:00:00Z").await, Err(UpdateError::Held(mark)) if mark.state == theirs)
        );
        assert_eq!(fixture.files(), before);
        assert_eq!(archive.remove_holds(&id, Some(theirs)).await.unwrap(), 1);
        assert!(matches!(prune("2026-11-30T23:59:59Z").await, Err(UpdateError::Held(_))));
        assert!(
            catalogue(fixture).await.proof(&to_store().snapshot, Which::All).is_some(),
            "it is as it was"
        );
        prune("2026-12-01T00:00:00Z").await.unwrap();
        assert_eq!(fixture.files().into_keys().collect::<Vec<_>>(), [path(".pruned.json")]);
        let late = archive.mark_hold(&id, HoldMark::new(ours, None), b"{}".to_vec()).await;
        assert!(!late.unwrap(), "there is nothing to hold any more");
        assert_eq!(marks().await, []);
    }
}

#[tokio::test(start_paused = true)]
async fn a_corrupt_copy_is_removed_with_its_manifest_and_no_other_is() {
    for fixture in every_kind() {
        let (fixture, bytes) = (&*fixture, image(LEN, 1));
        let copy = stored_copy(fixture, &bytes).await;
        let good = fixture.archive().remove_corrupt(&copy).await;
        assert!(matches!(good, Err(UpdateError::Changed { .. })), "{good:?}");
        let at = "2026-11-19T00:00:00Z".parse().unwrap();
        fixture.archive().update_manifest(&copy, ManifestUpdate::Corrupt(at)).await.unwrap();
        let corrupt = catalogue(fixture).await.corrupt()[0].clone();
        fixture.archive().remove_corrupt(&corrupt).await.unwrap();
        assert!(fixture.files().is_empty() && is_empty(fixture).await);
    }
}

#[tokio::test(start_paused = true)]
async fn a_look_compares_length_and_etag_reads_nothing_and_records_nothing() {
    for fixture in of_plain_files() {
        let (fixture, bytes) = (&*fixture, image(LEN, 1));
        let copy = stored_copy(fixture, &bytes).await;
        let before = fixture.files();
        let look = verify::look(fixture.archive(), &copy).await;
        assert_eq!(look.outcome, Outcome::Good);
        assert_eq!(look.has_etag, matches!(fixture.archive(), Archive::S3(_)));
        assert_eq!(fixture.files(), before);
        // The same bytes by another hand: a store gives them another name.
        fixture.write(&path(".qcow2"), &bytes);
        let again = verify::look(fixture.archive(), &copy).await.outcome;
        assert_eq!(
            matches!(&again, Outcome::Failed(why) if why.contains("ETag")),
            look.has_etag,
            "{again:?}"
        );
        fixture.write(&path(".qcow2"), &bytes[1..]);
        let shorter = verify::look(fixture.archive(), &copy).await.outcome;
        assert!(matches!(shorter, Outcome::Failed(why) if why.contains("1299999 bytes")));
        fixture.remove(&path(".qcow2"));
        let gone = verify::look(fixture.archive(), &copy).await.outcome;
        assert!(matches!(gone, Outcome::Failed(why) if why.contains("missing")));
        assert_eq!(catalogue(fixture).await.corrupt(), []);
    }
}

#[tokio::test(start_paused = true)]
async fn a_copy_is_read_from_any_offset() {
    for fixture in every_kind() {
        let (fixture, bytes) = (&*fixture, image(LEN, 1));
        let copy = stored_copy(fixture, &bytes).await;
        let stored = fixture.archive().image(&copy);
        assert_eq!(stored.md5(), Some(md5_of(&bytes)));
        for offset in [0, 1, 700_000, LEN - 1] {
            let opened = stored.open(offset as u64, None, None).await.unwrap();
            assert_eq!((opened.offset, opened.total), (offset as u64, Some(LEN as u64)));
            let read = crate::transport::read_body(opened.body, LEN).await.unwrap();
            assert!(read == bytes[offset..], "{offset}");
        }
    }
}
