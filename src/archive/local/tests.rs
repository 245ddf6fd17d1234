//! Claims about storing. The real disk in a temporary folder, a source in memory, paused time.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use super::*;
use crate::archive::backend::Archive;
use crate::archive::catalogue::ProblemKind;
use crate::archive::manifest::{TemplateOrigin, TemplateRecord};
use crate::archive::manifest_update::ManifestUpdate;
use crate::archive::store::{ImageToStore, Unverified, store};
use crate::archive::testing::{
    FakeSource, Fault, GIB, NoRandomness, Offer, Shared, TestDisk, image, md5_of, put,
};
use crate::archive::transfer::connection::Download;
use crate::archive::transfer::hash::Hashers;
use crate::archive::transfer::progress::Progress;
use crate::archive::transfer::throttle::Throttle;
use crate::disk::{Access, Kind, RealDisk, read_file, replace_file};
use crate::sim::clock::SimClock;
use crate::sim::disk::MemoryDisk;
use crate::sim::image::{DiskShape, Image};
use crate::sim::randomness::SeededRandomness;
use crate::snapshot::{Instance, Machine, Snapshot, SnapshotState};
use crate::text::chain;

const STEM: &str = "20261101T023000Z-b0c0ab00-0000-4000-8000-000000000001";
const INSTANCE: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";
const LEN: usize = 2_500_000;

struct Bench {
    folder: tempfile::TempDir,
    disk: Arc<TestDisk>,
    archive: Archive,
    clock: Arc<SimClock>,
    connections: usize,
    throttle: Option<Throttle>,
    progress: Mutex<Vec<Progress>>,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let disk = Arc::<TestDisk>::default();
        let archive = archive_in(folder.path(), Arc::new(Shared(Arc::clone(&disk))));
        let clock = clock();
        Self { folder, disk, archive, clock, connections: 1, throttle: None, progress: Mutex::default() }
    }

    async fn store(&self, source: &FakeSource) -> Result<VerifiedCopy, StoreError> {
        self.store_this(&to_store(), source).await
    }

    async fn store_this(
        &self,
        image: &ImageToStore,
        source: &FakeSource,
    ) -> Result<VerifiedCopy, StoreError> {
        let output = match self.archive.begin(image).await? {
            Begin::Stored(copy) => return Ok(copy),
            Begin::Missing(output) => output,
        };
        let progress = |event| self.progress.lock().unwrap().push(event);
        let download = Download {
            source,
            clock: &*self.clock,
            randomness: &NoRandomness,
            stall_timeout: Duration::from_mins(1),
            connections: self.connections,
            hashers: &Hashers::default(),
            throttle: self.throttle.as_ref(),
            progress: &progress,
        };
        let mut stored = store(image, vec![output], &download).await;
        assert_eq!(stored.len(), 1);
        stored.remove(0).1
    }

    fn instance_folder(&self) -> PathBuf {
        self.folder.path().join("vault/ch-gva-2").join(INSTANCE)
    }

    fn path(&self, end: &str) -> PathBuf {
        self.instance_folder().join(format!("{STEM}{end}"))
    }

    fn read(&self, end: &str) -> Vec<u8> {
        crate::disk::read_file(&RealDisk, &self.path(end), u64::MAX).unwrap()
    }

    /// The ends of all names in the instance's folder.
    fn ends(&self) -> Vec<String> {
        let entries = RealDisk.list(&self.instance_folder()).unwrap_or_default();
        entries.iter().map(|e| e.name.to_str().unwrap().trim_start_matches(STEM).to_owned()).collect()
    }

    async fn holds(&self, bytes: &[u8]) {
        let catalogue = self.archive.catalogue().await.unwrap();
        assert_eq!(catalogue.problems(), []);
        assert_eq!(catalogue.copies().len(), 1);
        assert!(self.read(".qcow2") == bytes, "the image differs");
    }

    async fn holds_nothing(&self) {
        let catalogue = self.archive.catalogue().await.unwrap();
        assert_eq!((catalogue.copies(), catalogue.problems()), (&[][..], &[][..]));
    }

    fn saw(&self, wanted: Progress) -> bool {
        self.progress.lock().unwrap().contains(&wanted)
    }
}

fn archive_in(folder: &Path, disk: Arc<dyn Disk>) -> Archive {
    named("vault", folder, disk)
}

fn named(name: &str, folder: &Path, disk: Arc<dyn Disk>) -> Archive {
    Archive::Local(LocalArchive::new(name.parse().unwrap(), folder.join(name), disk, clock()))
}

fn clock() -> Arc<SimClock> {
    Arc::new(SimClock::starting_at("2026-11-02T00:00:00Z".parse().unwrap()))
}

fn snapshot(number: u8, created_at: &str) -> Snapshot {
    Snapshot {
        id: format!("b0c0ab00-0000-4000-8000-0000000000{number:02x}").parse().unwrap(),
        name: "web-1_ROOT-12_20261101023000".into(),
        created_at: created_at.parse().unwrap(),
        state: SnapshotState::Exported,
        size_gib: Some(10),
        application_consistent: Some(true),
        instance_id: Some(INSTANCE.parse().unwrap()),
    }
}

fn to_store() -> ImageToStore {
    ImageToStore {
        zone: "ch-gva-2".parse().unwrap(),
        snapshot: snapshot(1, "2026-11-01T02:30:00.25Z"),
        instance: Some(Instance {
            id: INSTANCE.parse().unwrap(),
            name: "web-1".into(),
            labels: [("backup".to_owned(), "nightly".to_owned())].into(),
            template_id: None,
            is_managed: false,
            created_at: None,
        }),
        policy: Some("nightly".parse().unwrap()),
        run_id: "01932b5e-0000-7000-8000-000000000000".parse().unwrap(),
        template: None,
        machine: None,
        user_data_in: BTreeSet::new(),
        missing: Vec::new(),
    }
}

fn is_mismatch(error: &StoreError) -> bool {
    let StoreError::Unverified { reason, .. } = error else { return false };
    matches!(**reason, Unverified::Mismatch { .. } | Unverified::SecondDownload { .. })
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn assert_send<T: Send>(value: T) -> T {
    value
}

#[tokio::test(start_paused = true)]
async fn a_stored_image_stands_under_its_names_and_md5sum_accepts_it() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    let source = FakeSource::new(Offer::of(&bytes), []);
    let copy = assert_send(bench.store(&source)).await.unwrap();

    assert_eq!((copy.archive().as_str(), copy.bytes()), ("vault", LEN as u64));
    assert!(copy.warnings().is_empty());
    assert_eq!(bench.ends(), [".json", ".qcow2", ".qcow2.md5"]);
    bench.holds(&bytes).await;
    assert_eq!(bench.read(".qcow2.md5"), format!("{}  {STEM}.qcow2\n", md5_of(&bytes)).into_bytes());
    assert_eq!(mode(&bench.instance_folder()), 0o750);
    for end in bench.ends() {
        assert_eq!(mode(&bench.path(&end)), 0o640, "{end}");
    }
    match Command::new("md5sum")
        .args(["-c", "--strict", &format!("{STEM}.qcow2.md5")])
        .current_dir(bench.instance_folder())
        .output()
    {
        Ok(output) => assert!(output.status.success(), "{output:?}"),
        Err(error) => crate::text::skipped(format_args!("md5sum does not run here: {error}")),
    }
}

#[tokio::test(start_paused = true)]
async fn the_manifest_says_all_that_a_restore_needs() {
    let bench = Bench::new();
    let template = TemplateRecord {
        id: "00000000-0000-4000-8000-00000000000a".parse().unwrap(),
        boot_mode: Some("uefi".to_owned()),
        default_user: Some("debian".to_owned()),
        password_enabled: Some(false),
        ssh_key_enabled: Some(true),
        application_consistent: Some(false),
        origin: Some(Box::new(TemplateOrigin {
            name: Some("Debian 12".to_owned()),
            ..TemplateOrigin::default()
        })),
    };
    let machine = Machine {
        instance_type: Some("standard.medium".to_owned()),
        disk_size_gib: Some(10),
        ssh_keys: vec!["alice".to_owned()],
        user_data: Some("aHVzaA==".to_owned()),
        ..Machine::default()
    };
    let missing = vec!["half of it".to_owned()];
    let what = ImageToStore { template: Some(template), machine: Some(machine), missing, ..to_store() };
    bench.store_this(&what, &FakeSource::new(Offer::of(&image(LEN, 1)), [])).await.unwrap();
    let text = String::from_utf8(bench.read(".json")).unwrap();
    insta::assert_snapshot!(text.replace(env!("CARGO_PKG_VERSION"), "[version]"), @r#"
    {
      "version": 2,
      "zone": "ch-gva-2",
      "snapshot": {
        "id": "b0c0ab00-0000-4000-8000-000000000001",
        "name": "web-1_ROOT-12_20261101023000",
        "created_at": "2026-11-01T02:30:00.25Z",
        "state": "exported",
        "size_gib": 10,
        "application_consistent": true
      },
      "instance": {
        "id": "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec",
        "name": "web-1",
        "labels": {
          "backup": "nightly"
        }
      },
      "image": {
        "file": "20261101T023000Z-b0c0ab00-0000-4000-8000-000000000001.qcow2",
        "bytes": 2500000,
        "md5": "e733b685a79410ac7b056903cf15b96f",
        "qcow2_version": 3,
        "virtual_size_bytes": 10737418240
      },
      "exported_at": "2026-11-02T00:00:00Z",
      "verified_at": "2026-11-02T00:00:00Z",
      "policy": "nightly",
      "template": {
        "id": "00000000-0000-4000-8000-00000000000a",
        "boot_mode": "uefi",
        "default_user": "debian",
        "password_enabled": false,
        "ssh_key_enabled": true,
        "application_consistent": false,
        "origin": {
          "name": "Debian 12",
          "version": null,
          "build": null,
          "maintainer": null
        }
      },
      "warnings": [
        "half of it"
      ],
      "pruned_at": null,
      "corrupt_since": null,
      "run_id": "01932b5e-0000-7000-8000-000000000000",
      "program_version": "[version]",
      "machine": {
        "instance_type": "standard.medium",
        "instance_type_id": null,
        "disk_size_gib": 10,
        "security_groups": [],
        "private_networks": [],
        "elastic_ips": [],
        "anti_affinity_groups": [],
        "deploy_target": null,
        "ssh_keys": [
          "alice"
        ],
        "secure_boot": null,
        "tpm": null,
        "public_ip_assignment": null,
        "application_consistent_snapshots": null,
        "manager": null
      }
    }
    "#);
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_without_an_instance_is_refused() {
    let bench = Bench::new();
    let mut what = to_store();
    what.snapshot.instance_id = None;
    let source = FakeSource::new(Offer::of(&image(LEN, 1)), []);
    let error = bench.store_this(&what, &source).await.unwrap_err();
    assert!(matches!(error, StoreError::NoInstance(_)));
    assert!(source.offsets().is_empty());
}

#[tokio::test(start_paused = true)]
async fn without_a_valid_md5_nothing_is_fetched() {
    for md5 in [None, Some(""), Some("  "), Some("abc"), Some("g41d8cd98f00b204e9800998ecf8427e")] {
        let bench = Bench::new();
        let offer = Offer { md5: md5.map(str::to_owned), ..Offer::of(&image(LEN, 1)) };
        let source = FakeSource::new(offer, []);
        let error = bench.store(&source).await.unwrap_err();
        assert!(chain(&error).contains("unverified"), "{}", chain(&error));
        assert!(source.offsets().is_empty() && !bench.ends().contains(&".qcow2".to_owned()));
        bench.holds_nothing().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_md5_in_capitals_is_the_same() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    let offer = Offer { md5: Some(md5_of(&bytes).to_uppercase()), ..Offer::of(&bytes) };
    bench.store(&FakeSource::new(offer, [])).await.unwrap();
    bench.holds(&bytes).await;
}

#[tokio::test(start_paused = true)]
async fn whatever_breaks_is_resumed_where_it_broke() {
    for (fault, asked) in [
        (Fault::Cut(1_234_567), [0, 1_234_567]),
        (Fault::End(1_234_567), [0, 1_234_567]),
        (Fault::Stall(1_234_567), [0, 1_234_567]),
        (Fault::Hang, [0, 0]),
        (Fault::Broken, [0, 0]),
        (Fault::Cut(0), [0, 0]),
    ] {
        let (bench, bytes) = (Bench::new(), image(LEN, 1));
        let source = FakeSource::new(Offer::of(&bytes), [fault]);
        bench.store(&source).await.unwrap();
        assert_eq!(source.offsets(), asked, "{fault:?}");
        let etag = source.opened.lock().unwrap()[1].1.clone();
        assert_eq!(etag.as_deref(), (asked[1] > 0).then_some("a"), "{fault:?}");
        assert!(bench.saw(Progress::Resumed { bytes: asked[1] }));
        assert_eq!(source.sent.load(Ordering::Relaxed), LEN as u64, "no byte twice: {fault:?}");
        bench.holds(&bytes).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_manifest_that_was_renamed_is_judged_by_its_new_name() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    bench.store(&FakeSource::new(Offer::of(&bytes), [])).await.unwrap();
    bench.holds(&bytes).await;
    for end in [".corrupt.json", ".pruned.json"] {
        RealDisk.rename(&bench.path(".json"), &bench.path(end)).unwrap();
        let catalogue = bench.archive.catalogue().await.unwrap();
        assert_eq!((catalogue.copies().len(), catalogue.problems().len()), (0, 1), "{end}");
        assert!(catalogue.problems()[0].describe().contains("lacks the mark"), "{end}");
        RealDisk.rename(&bench.path(end), &bench.path(".json")).unwrap();
        bench.holds(&bytes).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_ignores_ranges_is_no_harm() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    let script = [
        Fault::Cut(1_000_001),
        Fault::NoRange(400_000),
        Fault::NoRange(2_000_000),
        Fault::Beyond,
        Fault::NoRange(LEN),
    ];
    let source = FakeSource::new(Offer { etag: None, ..Offer::of(&bytes) }, script);
    bench.store(&source).await.unwrap();
    assert_eq!(source.offsets(), [0, 1_000_001, 1_000_001, 2_000_000, 2_000_000]);
    bench.holds(&bytes).await;
}

#[tokio::test(start_paused = true)]
async fn five_tries_without_progress_are_the_end() {
    for fault in
        [Fault::Broken, Fault::Hang, Fault::Stall(0), Fault::Expired, Fault::Beyond, Fault::NoRange(7)]
    {
        let bench = Bench::new();
        let script = std::iter::once(Fault::Cut(1_000_000)).chain([fault; 20]);
        let source = FakeSource::new(Offer::of(&image(LEN, 1)), script);
        let error = bench.store(&source).await.unwrap_err();
        let text = chain(&error);
        assert!(text.contains("give up at byte 1000000 of 2500000 after 5 attempts"), "{text}");
        assert!(text.contains("vault/ch-gva-2/"), "{text}");
        assert_eq!(source.offsets().len(), 6, "the first one got somewhere: {fault:?}");
        assert_eq!(bench.ends(), [".qcow2.lock", ".qcow2.part", ".qcow2.part.json"], "{fault:?}");
        bench.holds_nothing().await;
    }
}

#[tokio::test(start_paused = true)]
async fn tries_with_progress_do_not_count_and_waits_stay_below_a_minute() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    let source = FakeSource::new(Offer::of(&bytes), [Fault::Cut(100_000); 20]);
    bench.store(&source).await.unwrap();
    assert_eq!(source.offsets().len(), 21);
    bench.holds(&bytes).await;

    let began = tokio::time::Instant::now();
    Bench::new().store(&FakeSource::new(Offer::of(&bytes), [Fault::Broken; 20])).await.unwrap_err();
    // 1 + 4 + 16 + 30 s where chance adds nothing.
    assert_eq!(began.elapsed().as_secs(), 51);
}

#[tokio::test(start_paused = true)]
async fn a_refused_image_is_not_asked_for_again() {
    let bench = Bench::new();
    let source = FakeSource::new(Offer::of(&image(LEN, 1)), [Fault::Refused]);
    let error = bench.store(&source).await.unwrap_err();
    assert!(chain(&error).ends_with("the image is refused: no such bucket"), "{}", chain(&error));
    assert_eq!(source.offsets(), [0]);
}

#[tokio::test(start_paused = true)]
async fn an_expired_address_is_renewed_and_the_same_image_goes_on() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    let source = FakeSource::new(Offer::of(&bytes), [Fault::Cut(1_000_000), Fault::Expired])
        .with_renewals([Err(Fault::Broken), Ok(Offer::of(&bytes))]);
    bench.store(&source).await.unwrap();
    assert_eq!(source.offsets(), [0, 1_000_000, 1_000_000]);
    assert_eq!(source.renewed.load(Ordering::Relaxed), 2);
    assert_eq!(source.sent.load(Ordering::Relaxed), LEN as u64);
    bench.holds(&bytes).await;
}

#[tokio::test(start_paused = true)]
async fn an_image_that_changed_starts_over() {
    let (old, new) = (image(LEN, 1), image(LEN + 100_000, 2));
    let unnamed = |bytes: &[u8]| Offer { etag: None, ..Offer::of(bytes) };
    let cases =
        [("by its MD5", Offer::of(&old), Offer::of(&new)), ("by its length", unnamed(&old), unnamed(&new))];
    for (how, before, after) in cases {
        let bench = Bench::new();
        let expected = after.bytes.clone();
        let source =
            FakeSource::new(before, [Fault::Cut(1_000_000), Fault::Expired]).with_renewals([Ok(after)]);
        bench.store(&source).await.unwrap();
        assert!(bench.saw(Progress::StartedOver), "{how}");
        assert_eq!(source.offsets().last(), Some(&0), "{how}");
        bench.holds(&expected).await;
    }
}

#[tokio::test(start_paused = true)]
async fn another_etag_alone_changes_nothing() {
    let bytes = image(LEN, 1);
    let other = || Offer { etag: Some("b"), ..Offer::of(&bytes) };
    // After a renewed address, once more after that, and after a restart.
    let bench = Bench::new();
    let script = [Fault::Cut(1_000_000), Fault::Expired, Fault::Cut(500_000), Fault::Expired];
    let source = FakeSource::new(Offer::of(&bytes), script)
        .with_renewals([Ok(other()), Ok(Offer { etag: Some("c"), ..other() })]);
    bench.store(&source).await.unwrap();
    assert_eq!(source.offsets(), [0, 1_000_000, 1_000_000, 1_500_000, 1_500_000]);
    assert_eq!(source.sent.load(Ordering::Relaxed), LEN as u64, "no byte twice");
    assert!(!bench.saw(Progress::StartedOver) && !bench.saw(Progress::ChecksumMismatch));
    bench.holds(&bytes).await;

    for connections in [1, 4] {
        let bench = Bench { connections, ..Bench::new() };
        bench.store(&broken_at(Offer::of(&bytes), 2_000_000)).await.unwrap_err();
        let source = FakeSource::new(other(), []);
        bench.store(&source).await.unwrap();
        assert_eq!(source.offsets(), [2_000_000]);
        assert!(!bench.saw(Progress::StartedOver) && !bench.saw(Progress::ChecksumMismatch));
        bench.holds(&bytes).await;
    }
}

#[tokio::test(start_paused = true)]
async fn other_bytes_behind_the_same_md5_and_length_are_found_by_the_md5() {
    let (old, new) = (image(LEN, 1), image(LEN, 2));
    let bench = Bench::new();
    // The service gives the MD5 of the new bytes before and after; the store had the old ones first.
    let before = Offer { md5: Some(md5_of(&new)), ..Offer::of(&old) };
    bench.store(&broken_at(before, 2_000_000)).await.unwrap_err();
    let source = FakeSource::new(Offer { etag: Some("b"), ..Offer::of(&new) }, []);
    bench.store(&source).await.unwrap();
    assert_eq!(source.offsets(), [2_000_000, 0]);
    assert!(bench.saw(Progress::ChecksumMismatch));
    assert_eq!(bench.ends(), [".json", ".qcow2", ".qcow2.bad", ".qcow2.md5"], "kept once");
    bench.holds(&new).await;
}

#[tokio::test(start_paused = true)]
async fn an_md5_that_is_missing_later_is_unverified() {
    let bench = Bench::new();
    let offer = Offer::of(&image(LEN, 1));
    let lost = Offer { md5: None, ..offer.clone() };
    let source = FakeSource::new(offer, [Fault::Cut(1_000_000), Fault::Expired]).with_renewals([Ok(lost)]);
    assert!(chain(&bench.store(&source).await.unwrap_err()).contains("unverified"));
    assert_eq!(bench.ends(), [".qcow2.lock"]);
}

#[tokio::test(start_paused = true)]
async fn an_image_that_changes_again_and_again_is_given_up() {
    for fault in [Fault::Changed, Fault::Promise(1)] {
        let bench = Bench::new();
        let source = FakeSource::new(Offer::of(&image(LEN, 1)), [fault; 9]);
        let error = bench.store(&source).await.unwrap_err();
        assert!(chain(&error).contains("give up after 3 starts"), "{}", chain(&error));
        assert_eq!(source.offsets(), [0, 0, 0], "{fault:?}");
        bench.holds_nothing().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_broken_promise_once_ends_in_the_right_bytes() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    bench.store(&FakeSource::new(Offer::of(&bytes), [Fault::Promise(50_000)])).await.unwrap();
    bench.holds(&bytes).await;
}

#[tokio::test(start_paused = true)]
async fn an_unknown_length_is_decided_by_the_end_and_the_md5() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    let offer = Offer { tells_total: false, ..Offer::of(&bytes) };
    let source = FakeSource::new(offer.clone(), [Fault::Cut(1_000_000)]);
    bench.store(&source).await.unwrap();
    assert_eq!(source.offsets(), [0, 1_000_000]);
    bench.holds(&bytes).await;

    let bench = Bench::new();
    let error = bench.store(&FakeSource::new(offer, [Fault::End(9), Fault::End(9)])).await.unwrap_err();
    assert!(is_mismatch(&error));
}

#[tokio::test(start_paused = true)]
async fn a_wrong_md5_is_kept_aside_and_fetched_again_by_a_new_address() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    let source = FakeSource::new(Offer::of(&bytes), [Fault::Flip])
        .with_renewals([Err(Fault::Broken), Ok(Offer::of(&bytes))]);
    bench.store(&source).await.unwrap();
    assert_eq!(source.renewed.load(Ordering::Relaxed), 2, "a new address is worth more than one try");
    assert_eq!(source.offsets(), [0, 0]);
    assert!(bench.saw(Progress::ChecksumMismatch));
    assert_eq!(bench.ends(), [".json", ".qcow2", ".qcow2.bad", ".qcow2.md5"]);
    assert_eq!(bench.read(".qcow2.bad").len(), LEN);
    bench.holds(&bytes).await;
}

#[tokio::test(start_paused = true)]
async fn an_md5_that_is_wrong_twice_fails_naming_both_sums() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    let offer = Offer { md5: Some("0".repeat(32)), ..Offer::of(&bytes) };
    for _ in 0..2 {
        let source = FakeSource::new(offer.clone(), []);
        let error = bench.store(&source).await.unwrap_err();
        assert!(is_mismatch(&error));
        assert!(chain(&error).contains(&md5_of(&bytes)) && chain(&error).contains(&"0".repeat(32)));
        assert_eq!(source.offsets(), [0, 0]);
        assert_eq!(bench.ends(), [".qcow2.bad", ".qcow2.lock"], "one bad file, replaced by the next");
        bench.holds_nothing().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_failure_after_a_wrong_md5_names_both() {
    let bench = Bench::new();
    let source = FakeSource::new(Offer::of(&image(LEN, 1)), [Fault::Flip, Fault::Refused]);
    let error = bench.store(&source).await.unwrap_err();
    assert!(is_mismatch(&error));
    assert!(
        chain(&error).contains("no such bucket") && chain(&error).contains(".qcow2.bad"),
        "{}",
        chain(&error)
    );
}

#[tokio::test(start_paused = true)]
async fn an_image_that_does_not_fit_is_not_begun() {
    for tells_total in [true, false] {
        let bench = Bench::new();
        bench.disk.free.store(64 * (1 << 20) + 1_500_000, Ordering::Relaxed);
        let source = FakeSource::new(Offer { tells_total, ..Offer::of(&image(LEN, 1)) }, []);
        let error = bench.store(&source).await.unwrap_err();
        let text = chain(&error);
        let needs = if tells_total { "needs 3 MiB" } else { "needs 2 MiB" };
        assert!(
            text.contains(needs) && text.contains("65 MiB are free") && text.contains("free some space"),
            "{text}"
        );
        if tells_total {
            assert_eq!(source.sent.load(Ordering::Relaxed), 0);
        }
        assert_eq!(bench.ends(), [".qcow2.lock"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_runs_full_at_any_byte_publishes_nothing_and_harms_nothing() {
    let (bench, bytes) = (Bench::new(), image(300_000, 1));
    let other = ImageToStore { snapshot: snapshot(2, "2026-10-01T00:00:00Z"), ..to_store() };
    bench.store_this(&other, &FakeSource::new(Offer::of(&bytes), [])).await.unwrap();
    let before = bench.ends();
    let mut failures = 0;
    for room in (0..300_000).step_by(59_999).chain((300_000..302_000).step_by(61)) {
        bench.disk.room.store(room, Ordering::Relaxed);
        match bench.store(&FakeSource::new(Offer::of(&bytes), [])).await {
            Err(error) => {
                failures += 1;
                assert!(chain(&error).contains("the file system is full"), "{room}: {}", chain(&error));
                let mut expected = before.clone();
                expected.insert(0, ".qcow2.lock".to_owned());
                expected.sort();
                let mut found = bench.ends();
                found.sort();
                assert_eq!(found, expected, "{room}");
                let catalogue = bench.archive.catalogue().await.unwrap();
                assert_eq!((catalogue.copies().len(), catalogue.problems()), (1, &[][..]), "{room}");
            }
            Ok(_) => break,
        }
    }
    assert!(failures > 15, "it also ran full within the files beside the image: {failures}");
    assert_eq!(bench.archive.catalogue().await.unwrap().copies().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_pruning_that_stopped_at_any_change_of_the_disk_is_undone_by_removing_its_mark_while_the_image_is_there()
 {
    let (bytes, mut undone) = (image(400_000, 1), 0);
    for changes in 0.. {
        let bench = Bench::new();
        bench.store(&FakeSource::new(Offer::of(&bytes), [])).await.unwrap();
        let copy = bench.archive.catalogue().await.unwrap().copies()[0].clone();
        bench.disk.changes.store(changes, Ordering::Relaxed);
        let pruned = bench.archive.update_manifest(&copy, ManifestUpdate::Pruned(clock().now())).await;
        let after = archive_in(bench.folder.path(), Arc::new(RealDisk));
        let catalogue = after.catalogue().await.unwrap();
        let found = &catalogue.copies()[0];
        if pruned.is_ok() {
            assert!(found.manifest.pruned_at.is_some() && !found.has_image && undone > 0);
            return;
        }
        if found.manifest.pruned_at.is_some() && found.has_image {
            RealDisk.remove_file(&copy.image().with_extension("pruned.json")).unwrap();
            assert_eq!(after.catalogue().await.unwrap().copies()[0].manifest, copy.manifest);
            undone += 1;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn stopped_at_any_change_of_the_disk_there_is_a_verified_copy_or_none() {
    let (bytes, mut published_at_last) = (image(400_000, 1), 0);
    for changes in 0.. {
        let bench = Bench::new();
        bench.disk.changes.store(changes, Ordering::Relaxed);
        let outcome = bench.store(&FakeSource::new(Offer::of(&bytes), [])).await;
        let after = archive_in(bench.folder.path(), Arc::new(RealDisk));
        let catalogue = after.catalogue().await.unwrap();
        assert!(outcome.is_err() || catalogue.copies().len() == 1, "{changes}");
        if catalogue.copies().is_empty() {
            let harmless = |kind: &ProblemKind| *kind == ProblemKind::NoManifest;
            assert!(catalogue.problems().iter().all(|problem| harmless(&problem.kind)), "{changes}");
        } else {
            published_at_last += 1;
            assert!(bench.read(".qcow2") == bytes, "{changes}");
        }
        if !bench.disk.stopped() {
            assert!(changes > 10 && published_at_last > 1, "{changes}");
            return;
        }
        // The next run makes good what the stop left behind.
        let again = Bench { archive: after, disk: Arc::default(), ..bench };
        again.store(&FakeSource::new(Offer::of(&bytes), [])).await.unwrap();
        again.holds(&bytes).await;
        assert!(!again.ends().contains(&".qcow2.part".to_owned()));
    }
}

#[tokio::test(start_paused = true)]
async fn bytes_are_synced_before_names_and_the_manifest_is_last() {
    let bench = Bench::new();
    bench.store(&FakeSource::new(Offer::of(&image(400_000, 1)), [])).await.unwrap();
    let log = bench.disk.log.lock().unwrap().clone();
    let at = log.iter().rposition(|entry| entry == "write .qcow2.part").unwrap();
    assert_eq!(
        log[at + 1..],
        [
            "sync .qcow2.part",
            "remove .json",
            "remove .pruned.json",
            "remove .corrupt.json",
            "rename to .qcow2",
            "remove .qcow2.md5.new",
            "create .qcow2.md5.new",
            "write .qcow2.md5.new",
            "sync .qcow2.md5.new",
            "rename to .qcow2.md5",
            "sync_dir folder",
            "remove .json.new",
            "create .json.new",
            "write .json.new",
            "sync .json.new",
            "rename to .json",
            "sync_dir folder",
            "remove .qcow2.part.json",
            "remove .qcow2.part",
            "remove .qcow2.lock",
        ]
    );
    // The archive's folder was made too: it, the zone's and the instance's are names in three folders.
    let head: Vec<_> = log.iter().take_while(|entry| !entry.starts_with("lock")).cloned().collect();
    let synced = head.windows(2).filter(|pair| *pair == ["create_dir_all folder", "sync_dir folder"]).count();
    assert_eq!(synced, 3, "{head:?}");
}

#[tokio::test(start_paused = true)]
async fn an_invalid_image_is_not_published_though_its_md5_is_right() {
    let truncated = image(LEN, 1)[..150_000].to_vec();
    let simulated = Image::new(DiskShape::default(), 1);
    let cut = simulated.read(0..simulated.file_bytes() - (1 << 16));
    for bytes in [truncated, cut, Vec::new()] {
        let bench = Bench::new();
        let error = bench.store(&FakeSource::new(Offer::of(&bytes), [])).await.unwrap_err();
        assert!(
            matches!(&error, StoreError::Unverified { reason, .. } if matches!(**reason, Unverified::Invalid(_))),
            "{}",
            chain(&error)
        );
        assert_eq!(bench.ends(), [".qcow2.lock"]);
    }
}

#[tokio::test(start_paused = true)]
async fn what_the_header_forbids_is_refused_before_the_rest_is_fetched() {
    let valid = image(40 << 20, 1);
    let mut backed = valid.clone();
    put(&mut backed, 8, &4096_u64.to_be_bytes());
    for connections in [1, 4] {
        for chunk in [1, 100, 10_000] {
            let bench = Bench { connections, ..Bench::new() };
            let mut source = FakeSource::new(Offer::of(&backed), []);
            source.chunk = chunk;
            let error = chain(&bench.store(&source).await.unwrap_err());
            assert!(error.contains("by its header") && error.contains("a backing file"), "{error}");
            let sent = source.sent.load(Ordering::Relaxed);
            assert!(sent <= 2 * 20_000, "{sent} bytes in two attempts");
            assert_eq!(bench.ends(), [".qcow2.lock"]);
        }
    }
    // A header that was damaged on its way.
    let (bench, valid) = (Bench::new(), image(LEN, 1));
    let source = FakeSource::new(Offer::of(&valid), [Fault::OtherHeader]);
    bench.store(&source).await.unwrap();
    bench.holds(&valid).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_no_image_from_its_first_bytes_on_is_not_kept() {
    for bytes in [&b"<html>not here</html>"[..], b"QFI", b"QFJ\xfb"] {
        for chunk in [1, 10_000] {
            let bench = Bench::new();
            let mut source = FakeSource::new(Offer::of(bytes), []);
            source.chunk = chunk;
            let error = bench.store(&source).await.unwrap_err();
            let expected = if bytes == b"QFI" { "not a valid image" } else { "is not a qcow2 image" };
            assert!(chain(&error).contains(expected), "{}", chain(&error));
            assert_eq!(bench.ends(), [".qcow2.lock"]);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn another_virtual_size_is_warned_about_and_recorded() {
    for (size_gib, warned) in [(Some(20), 1), (Some(u64::MAX), 1), (Some(10), 0), (None, 0)] {
        let bench = Bench::new();
        let mut what = to_store();
        what.snapshot.size_gib = size_gib;
        let copy = bench.store_this(&what, &FakeSource::new(Offer::of(&image(LEN, 1)), [])).await.unwrap();
        assert_eq!(copy.warnings().len(), warned);
        let catalogue = bench.archive.catalogue().await.unwrap();
        let manifest = &catalogue.copies()[0].manifest;
        assert_eq!(manifest.warnings, copy.warnings());
        assert_eq!(manifest.image.virtual_size_bytes, Some(10 * GIB));
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_second_fetch_leaves_the_old_files_alone() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    bench.store(&FakeSource::new(Offer::of(&bytes), [])).await.unwrap();
    RealDisk.remove_file(&bench.path(".json")).unwrap();
    bench.store(&FakeSource::new(Offer::of(&bytes), [Fault::Refused])).await.unwrap_err();
    assert!(bench.read(".qcow2") == bytes);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_store_leaves_a_part_that_nothing_lists_and_the_next_resumes() {
    let (bench, bytes) = (Bench::new(), image(12_000_000, 1));
    let source = FakeSource::new(Offer::of(&bytes), [Fault::Stall(10_000_000)]);
    let dropped = crate::clock::timeout(&*bench.clock, Duration::from_secs(1), bench.store(&source)).await;
    assert!(dropped.is_err());
    assert_eq!(bench.ends(), [".qcow2.lock", ".qcow2.part", ".qcow2.part.json"]);
    bench.holds_nothing().await;
    let again = FakeSource::new(Offer::of(&bytes), []);
    bench.store(&again).await.unwrap();
    assert!(again.offsets()[0] >= 1 << 20, "synced bytes were fetched again: {:?}", again.offsets());
    assert_eq!(bench.ends(), [".json", ".qcow2", ".qcow2.md5"]);
    bench.holds(&bytes).await;
}

#[tokio::test(start_paused = true)]
async fn a_slow_download_that_is_dropped_loses_no_more_than_some_seconds() {
    const PER_SECOND: u64 = 60_000;
    // A few seconds after the beginning, and after the first of several connections: by then too little was received for
    // a full buffer, and for a journal that looks at bytes alone.
    for (connections, seconds, at_least) in [(1, 14, 5 * PER_SECOND), (4, 152, (8 << 20) + PER_SECOND)] {
        let (bench, bytes) = (Bench::new(), image(20 << 20, 1));
        let bench = Bench { connections, throttle: Some(Throttle::new(PER_SECOND)), ..bench };
        let slow = FakeSource::new(Offer::of(&bytes), []);
        let limit = Duration::from_secs(seconds);
        assert!(crate::clock::timeout(&*bench.clock, limit, bench.store(&slow)).await.is_err());
        let (bench, again) = (Bench { throttle: None, ..bench }, FakeSource::new(Offer::of(&bytes), []));
        bench.store(&again).await.unwrap();
        assert!(again.offsets()[0] >= at_least, "{connections}: {:?}", again.offsets());
        bench.holds(&bytes).await;
    }
}

#[tokio::test(start_paused = true)]
async fn names_from_outside_reach_no_path_and_long_ones_keep_the_manifest_small() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    let hostile = "../../etc/\u{1b}[31m\"<b>\n";
    let mut what = to_store();
    what.snapshot.name = hostile.repeat(50_000).into();
    what.snapshot.state = SnapshotState::from(hostile);
    let instance = what.instance.as_mut().unwrap();
    instance.name = hostile.repeat(50_000).into();
    instance.labels = [(hostile.to_owned(), "\u{1}".repeat(1_000_000))].into();
    let copy = bench.store_this(&what, &FakeSource::new(Offer::of(&bytes), [])).await.unwrap();
    assert_eq!(copy.warnings(), ["the instance's labels are left out, since they are too long"]);
    assert_eq!(bench.ends(), [".json", ".qcow2", ".qcow2.md5"]);
    bench.holds(&bytes).await;
}

#[tokio::test(start_paused = true)]
async fn links_in_the_way_are_refused_and_left_alone() {
    let ends = [
        ".qcow2",
        ".json",
        ".qcow2.md5",
        ".qcow2.part",
        ".qcow2.part.json",
        ".qcow2.bad",
        ".qcow2.lock",
        "folder",
    ];
    for end in ends {
        let bench = Bench::new();
        let target = bench.folder.path().join("target");
        let at = if end == "folder" { bench.instance_folder() } else { bench.path(end) };
        RealDisk.create_dir_all(at.parent().unwrap(), Access::Group).unwrap();
        std::os::unix::fs::symlink(&target, &at).unwrap();
        let source = FakeSource::new(Offer::of(&image(LEN, 1)), []);
        let error = bench.store(&source).await.unwrap_err();
        assert!(matches!(&error, StoreError::InTheWay { path } if *path == at), "{end}: {}", chain(&error));
        assert_eq!(RealDisk.metadata(&at).unwrap().kind, Kind::Other);
        assert!(RealDisk.metadata(&target).is_err() && source.offsets().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn chunks_of_any_size_make_the_same_image() {
    for chunk in [1, 4095, 4096, 4097, 1 << 20, LEN] {
        let (bench, bytes) = (Bench::new(), image(if chunk == 1 { 270_000 } else { LEN }, 1));
        let mut source = FakeSource::new(Offer::of(&bytes), [Fault::Cut(3), Fault::Cut(5000)]);
        source.chunk = chunk;
        bench.store(&source).await.unwrap();
        bench.holds(&bytes).await;
    }
}

#[tokio::test]
async fn a_slow_disk_slows_the_network_down() {
    let (bench, bytes) = (Bench::new(), image(20 << 20, 1));
    let (release, gate) = std::sync::mpsc::channel();
    *bench.disk.gate.lock().unwrap() = Some(gate);
    let source = FakeSource::new(Offer::of(&bytes), []);
    let sent = Arc::clone(&source.sent);
    let watch = async {
        // The network has sent what it may, once a batch finds no room beside those that wait for the disk.
        while sent.load(Ordering::Relaxed) < 6 << 20 {
            tokio::task::yield_now().await;
        }
        for _ in 0..10_000 {
            tokio::task::yield_now().await;
        }
        assert!(sent.load(Ordering::Relaxed) <= 8 << 20);
        drop(release);
    };
    let (stored, ()) = tokio::join!(bench.store(&source), watch);
    stored.unwrap();
    bench.holds(&bytes).await;
}

#[tokio::test(start_paused = true)]
async fn an_archive_that_is_not_there_is_empty_and_one_that_can_not_be_read_is_an_error() {
    let bench = Bench::new();
    bench.holds_nothing().await;
    replace_file(&RealDisk, &bench.folder.path().join("vault"), b"a file", Access::Group).unwrap();
    let error = bench.archive.catalogue().await.unwrap_err();
    assert!(chain(&error).starts_with("read archive `vault` in "), "{}", chain(&error));
    let error = bench.store(&FakeSource::new(Offer::of(&image(LEN, 1)), [])).await.unwrap_err();
    assert!(matches!(error, StoreError::Sink(SinkError::Disk { .. })), "{}", chain(&error));
}

#[tokio::test(start_paused = true)]
async fn a_link_under_a_name_of_ours_is_a_problem_and_is_not_followed() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    bench.store(&FakeSource::new(Offer::of(&bytes), [])).await.unwrap();
    let linked = |end: &str| bench.path(end).with_file_name(format!("{}0a{end}", &STEM[..STEM.len() - 2]));
    let manifest = String::from_utf8(bench.read(".json")).unwrap().replace("000000000001", "00000000000a");
    replace_file(&RealDisk, &linked(".json"), manifest.as_bytes(), Access::Group).unwrap();
    std::os::unix::fs::symlink(bench.path(".qcow2"), linked(".qcow2")).unwrap();
    let catalogue = bench.archive.catalogue().await.unwrap();
    assert_eq!(catalogue.copies().len(), 1);
    let found: Vec<_> = catalogue.problems().iter().map(|p| (p.path.clone(), p.kind.clone())).collect();
    let foreign = |end: &str| (linked(end), ProblemKind::Foreign);
    assert_eq!(found, [foreign(".json"), foreign(".qcow2")]);
}

#[tokio::test(start_paused = true)]
async fn a_linked_folder_hides_nothing_silently() {
    let bench = Bench::new();
    RealDisk.create_dir_all(&bench.folder.path().join("vault"), Access::Group).unwrap();
    std::os::unix::fs::symlink("/", bench.folder.path().join("vault/ch-gva-2")).unwrap();
    let catalogue = bench.archive.catalogue().await.unwrap();
    assert!(matches!(catalogue.problems()[0].kind, ProblemKind::Folder(_)));
}

/// A download that receives `bytes` and is given up.
fn broken_at(offer: Offer, bytes: usize) -> FakeSource {
    FakeSource::new(offer, std::iter::once(Fault::Cut(bytes)).chain([Fault::Broken; 9]))
}

#[tokio::test(start_paused = true)]
async fn what_a_failed_download_left_is_resumed_by_the_next() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    let first = broken_at(Offer::of(&bytes), 2_200_000);
    bench.store(&first).await.unwrap_err();
    let second = FakeSource::new(Offer::of(&bytes), []);
    bench.store(&second).await.unwrap();
    assert_eq!(second.opened.lock().unwrap()[..], [(2_200_000, Some("a".to_owned()))]);
    let sent = first.sent.load(Ordering::Relaxed) + second.sent.load(Ordering::Relaxed);
    assert_eq!(sent, LEN as u64, "no byte twice");
    assert!(bench.saw(Progress::Resumed { bytes: 2_200_000 }) && !bench.saw(Progress::ChecksumMismatch));
    assert_eq!(bench.ends(), [".json", ".qcow2", ".qcow2.md5"]);
    bench.holds(&bytes).await;
}

#[tokio::test(start_paused = true)]
async fn an_image_that_changed_between_two_downloads_begins_at_zero() {
    let (old, new) = (image(LEN, 1), image(LEN + 100_000, 2));
    let cases = [
        ("by its MD5", Offer::of(&old), Offer::of(&new), &new),
        (
            "by its length",
            Offer { etag: None, md5: Some(md5_of(&new)), ..Offer::of(&old) },
            Offer { etag: None, ..Offer::of(&new) },
            &new,
        ),
    ];
    for (how, before, after, expected) in cases {
        let bench = Bench::new();
        bench.store(&broken_at(before, 2_000_000)).await.unwrap_err();
        let source = FakeSource::new(after, []);
        bench.store(&source).await.unwrap();
        assert_eq!(source.offsets().last(), Some(&0), "{how}");
        assert!(!bench.saw(Progress::ChecksumMismatch), "{how}");
        bench.holds(expected).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_part_that_is_not_what_its_journal_says_ends_in_the_right_bytes() {
    let bytes = image(LEN, 1);
    let other = image(LEN, 5);
    let cases: [(&str, &str, Vec<u8>, bool); 6] = [
        ("other bytes", ".qcow2.part", other[..2_000_000].to_vec(), true),
        ("longer than synced", ".qcow2.part", [&bytes[..2_000_000], &other[..9_999]].concat(), false),
        ("shorter than synced", ".qcow2.part", bytes[..1_999_999].to_vec(), false),
        ("empty", ".qcow2.part", Vec::new(), false),
        ("no journal", ".qcow2.part.json", b"{".to_vec(), false),
        ("a journal without end", ".qcow2.part.json", vec![b' '; 100_000], false),
    ];
    for (what, end, content, mismatch) in cases {
        let bench = Bench::new();
        bench.store(&broken_at(Offer::of(&bytes), 2_000_000)).await.unwrap_err();
        replace_file(&RealDisk, &bench.path(end), &content, Access::Group).unwrap();
        bench.store(&FakeSource::new(Offer::of(&bytes), [])).await.unwrap();
        assert_eq!(bench.saw(Progress::ChecksumMismatch), mismatch, "{what}");
        bench.holds(&bytes).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_part_of_another_snapshot_is_left_alone_until_it_is_old() {
    let (bench, bytes) = (Bench::new(), image(LEN, 1));
    let day = |number, at| ImageToStore { snapshot: snapshot(number, at), ..to_store() };
    let now = bench.clock.now();
    let [recent, old] = [6, 8].map(|days| (now - jiff::SignedDuration::from_hours(24 * days)).to_string());
    for (number, at) in [(2, &recent), (3, &old)] {
        bench.store_this(&day(number, at), &broken_at(Offer::of(&bytes), 2_000_000)).await.unwrap_err();
    }
    let before: Vec<_> = bench.ends().into_iter().filter(|name| name.contains("00000002")).collect();
    assert!(!before.is_empty());
    let source = FakeSource::new(Offer::of(&bytes), []);
    bench.store(&source).await.unwrap();
    assert_eq!(source.offsets(), [0]);
    assert!(before.iter().all(|name| bench.ends().contains(name)), "{:?}", bench.ends());
    let is_left = |name: &String| name.contains("00000003") && !name.contains(".lock");
    assert!(!bench.ends().iter().any(is_left), "{:?}", bench.ends());
}

#[tokio::test(start_paused = true)]
async fn after_a_crash_at_any_moment_no_byte_is_trusted_that_was_not_synced() {
    let bytes = image(LEN, 1);
    for changes in (0..30).chain((30..700).step_by(11)) {
        for chance in [None, Some(1), Some(2)] {
            let disk = MemoryDisk::new();
            let bench = Bench::new();
            let path = Path::new("/");
            disk.stop_after(changes);
            let before = Bench { archive: archive_in(path, Arc::new(disk.clone())), ..bench };
            let _ = before.store(&broken_at(Offer::of(&bytes), 2_000_000)).await;
            let after = match chance {
                None => disk.crash(),
                Some(seed) => disk.crash_by_chance(&SeededRandomness::new(seed)),
            };
            let after = Bench { archive: archive_in(path, Arc::new(after)), ..before };
            let source = FakeSource::new(Offer::of(&bytes), []);
            after.store(&source).await.unwrap();
            assert!(!after.saw(Progress::ChecksumMismatch), "{changes} {chance:?} {:?}", source.offsets());
            let catalogue = after.archive.catalogue().await.unwrap();
            assert_eq!(catalogue.copies().len(), 1);
        }
    }
}

/// One download into several archives.
async fn store_in(archives: &[Archive], source: &FakeSource) -> Vec<Result<VerifiedCopy, StoreError>> {
    let mut outputs = Vec::new();
    for archive in archives {
        match archive.begin(&to_store()).await.unwrap() {
            Begin::Stored(copy) => panic!("{copy:?} is there"),
            Begin::Missing(output) => outputs.push(output),
        }
    }
    let download = Download {
        source,
        clock: &*clock(),
        randomness: &NoRandomness,
        stall_timeout: Duration::from_mins(1),
        connections: 4,
        hashers: &Hashers::default(),
        throttle: None,
        progress: &|_| {},
    };
    let mut stored = store(&to_store(), outputs, &download).await;
    stored.sort_by(|a, b| a.0.cmp(&b.0));
    stored.into_iter().map(|(_, result)| result).collect()
}

#[tokio::test(start_paused = true)]
async fn one_download_feeds_all_archives_also_where_it_is_resumed() {
    let (folder, bytes) = (tempfile::tempdir().unwrap(), image(LEN, 1));
    let real = |name: &str| named(name, folder.path(), Arc::new(RealDisk));
    let archives = [real("a"), real("b"), real("c")];
    store_in(&archives[1..2], &broken_at(Offer::of(&bytes), 1_500_000)).await[0].as_ref().unwrap_err();
    let source = FakeSource::new(Offer::of(&bytes), [Fault::Cut(500_000)]);
    for stored in store_in(&archives, &source).await {
        stored.unwrap();
    }
    // What one had was copied to the others.
    assert_eq!(source.offsets(), [0, 500_000].map(|at| if at == 0 { 1_500_000 } else { 2_000_000 }));
    for archive in &archives {
        let catalogue = archive.catalogue().await.unwrap();
        let found = read_file(&RealDisk, &catalogue.copies()[0].image(), 1 << 30).unwrap();
        assert!(found == bytes);
    }
}

#[tokio::test(start_paused = true)]
async fn an_archive_that_fails_does_not_keep_the_others_from_their_copy() {
    for room in [0, 100_000, 1_300_000, 2_499_999] {
        let (folder, bytes) = (tempfile::tempdir().unwrap(), image(LEN, 1));
        let full = Arc::<TestDisk>::default();
        full.room.store(room, Ordering::Relaxed);
        let archives = [
            named("a", folder.path(), Arc::new(Shared(full))),
            named("b", folder.path(), Arc::new(RealDisk)),
        ];
        let source = FakeSource::new(Offer::of(&bytes), []);
        let stored = store_in(&archives, &source).await;
        let error = stored[0].as_ref().unwrap_err();
        assert!(chain(error).contains("the file system is full"), "{}", chain(error));
        assert!(stored[1].is_ok() && source.offsets() == [0], "{room}");
        assert!(archives[0].catalogue().await.unwrap().copies().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn several_connections_make_the_same_image_whatever_becomes_of_them() {
    let bytes = image((40 << 20) + 12_345, 1);
    let len = bytes.len() as u64;
    let cases: Vec<(&str, Vec<Fault>, bool)> = vec![
        ("nothing fails", vec![], true),
        ("ranges are ignored from the start", vec![Fault::NoRange(usize::MAX)], false),
        ("and then", vec![Fault::Fine, Fault::NoRange(9), Fault::NoRange(9)], false),
        ("one is refused", vec![Fault::Fine, Fault::Fine, Fault::Broken, Fault::Expired], true),
        (
            "some break",
            vec![Fault::Cut(1), Fault::Fine, Fault::Cut(5_000_000), Fault::Fine, Fault::End(7)],
            true,
        ),
        ("one stalls", vec![Fault::Fine, Fault::Stall(1_000_000)], true),
        ("all break", vec![Fault::Fine, Fault::Cut(7), Fault::Cut(8), Fault::Cut(9), Fault::Cut(10)], true),
        (
            "the address expires",
            vec![Fault::Fine, Fault::Fine, Fault::Expired, Fault::Expired, Fault::Expired, Fault::Expired],
            true,
        ),
    ];
    for (what, script, no_byte_twice) in cases {
        let bench = Bench { connections: 4, ..Bench::new() };
        let source = FakeSource::new(Offer::of(&bytes), script);
        bench.store(&source).await.unwrap_or_else(|error| panic!("{what}: {}", chain(&error)));
        bench.holds(&bytes).await;
        assert!(!bench.saw(Progress::ChecksumMismatch) && !bench.saw(Progress::StartedOver), "{what}");
        let sent = source.sent.load(Ordering::Relaxed);
        assert!(sent <= len + len / 50 || !no_byte_twice, "{what}: {sent} of {len}");
    }
    let bench = Bench { connections: 4, ..Bench::new() };
    let source = FakeSource::new(Offer::of(&bytes), [Fault::Fine, Fault::Changed]);
    bench.store(&source).await.unwrap();
    bench.holds(&bytes).await;

    let bench = Bench { connections: 4, ..Bench::new() };
    let offer = Offer { tells_total: false, ..Offer::of(&bytes) };
    bench.store(&FakeSource::new(offer, [])).await.unwrap();
    bench.holds(&bytes).await;
    assert!(!bench.saw(Progress::ChecksumMismatch), "an unknown length is no end");
}

#[tokio::test(start_paused = true)]
async fn an_answer_to_another_range_does_no_harm_at_any_request() {
    let bytes = image((26 << 20) + 12_345, 1);
    let faults = [Fault::NoRange(usize::MAX), Fault::NoRange(9), Fault::Before, Fault::Beyond, Fault::Wide];
    for fault in faults {
        for number in 0..5 {
            // From the beginning, and from where an earlier download broke off.
            for resumed in [false, true] {
                let bench = Bench { connections: 4, ..Bench::new() };
                if resumed {
                    let script = [Fault::Fine, Fault::Cut(1_000_000)].into_iter().chain([Fault::Broken; 30]);
                    bench.store(&FakeSource::new(Offer::of(&bytes), script)).await.unwrap_err();
                }
                let script = std::iter::repeat_n(Fault::Fine, number).chain([fault]);
                bench.store(&FakeSource::new(Offer::of(&bytes), script)).await.unwrap();
                let again = [Progress::ChecksumMismatch, Progress::StartedOver].map(|event| bench.saw(event));
                assert_eq!(again, [false; 2], "{fault:?} at request {number}, resumed: {resumed}");
                bench.holds(&bytes).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn another_length_at_any_request_starts_over_and_ends_in_the_right_bytes() {
    let bytes = image((26 << 20) + 12_345, 1);
    for connections in [1, 4] {
        for number in 1..5 {
            let bench = Bench { connections, ..Bench::new() };
            let script = std::iter::repeat_n(Fault::Cut(1_000_000), number).chain([Fault::Promise(1)]);
            bench.store(&FakeSource::new(Offer::of(&bytes), script)).await.unwrap();
            assert!(bench.saw(Progress::StartedOver) && !bench.saw(Progress::ChecksumMismatch), "{number}");
            bench.holds(&bytes).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn several_connections_leave_what_the_next_download_resumes() {
    let bytes = image(40 << 20, 1);
    let bench = Bench { connections: 3, ..Bench::new() };
    let script = [Fault::Fine; 3].into_iter().chain([Fault::Broken; 30]);
    bench.store(&FakeSource::new(Offer::of(&bytes), script)).await.unwrap_err();
    let source = FakeSource::new(Offer::of(&bytes), []);
    bench.store(&source).await.unwrap();
    assert!(source.sent.load(Ordering::Relaxed) <= 24 << 20, "{:?}", source.offsets());
    assert!(!bench.saw(Progress::ChecksumMismatch));
    bench.holds(&bytes).await;
}

#[tokio::test(start_paused = true)]
async fn a_probe_names_a_folder_that_can_not_be_written_and_creates_none() {
    let (disk, path) = (MemoryDisk::new(), PathBuf::from("/vault"));
    let archive = archive_in(Path::new("/"), Arc::new(disk.clone()));
    assert_eq!(archive.probe().await, [("write", None)]);
    assert!(disk.metadata(&path).is_err(), "the folder is created when something is first stored");

    // Images go into a folder of the zone.
    let zone = path.join("ch-gva-2");
    create_folders(&disk, &zone, Access::Group).unwrap();
    disk.set_unwritable(&zone, Some(io::ErrorKind::PermissionDenied));
    let steps = archive.probe().await;
    let [("write", Some(failure)), ("read back", None), ("delete", None)] = &steps[..] else {
        panic!("{steps:?}")
    };
    assert!(failure.starts_with("write in /vault/ch-gva-2: "), "{failure}");

    disk.set_unwritable(&zone, None);
    disk.set_unwritable(&path, Some(io::ErrorKind::ReadOnlyFilesystem));
    let steps = archive.probe().await;
    let [("write", Some(failure))] = &steps[..] else { panic!("{steps:?}") };
    assert!(failure.starts_with("write /vault/snapwarden-archive.json.probe: "), "{failure}");
    assert!(failure.contains("`ReadWritePaths=`"), "it says what to do: {failure}");
}
