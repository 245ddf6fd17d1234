//! Claims about archives in repositories of restic, with a simulated restic. The suite for every kind of archive holds for them, too.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::future::{BoxFuture, join};
use jiff::Timestamp;
use tokio::io::DuplexStream;
use tokio::sync::Notify;
use uuid::Uuid;

use super::archive::ResticArchive;
use super::repository::ResticSettings;
use crate::archive::backend::Archive;
use crate::archive::catalogue::StoredCopy;
use crate::archive::copy_reader::CopyReader;
use crate::archive::manifest_update::ManifestUpdate;
use crate::archive::marker::Marker;
use crate::archive::testing::{NoRandomness, TestClock, image};
use crate::archive::tests::contract::{Fixture, LEN, NOW, STEM, begin, source, store_image, write};
use crate::archive::transfer::hash::Hashers;
use crate::archive::verify::{self, Outcome};
use crate::disk::Disk as _;
use crate::process::Command;
use crate::sim::disk::MemoryDisk;
use crate::sim::processes::{Done, SimProcesses, SimTool};
use crate::sim::restic::{SimRepository, SimRestic};
use crate::text::chain;

const PLACE: &str = "rest:https://backup:hush@store.example/";
const HOST: &str = "backup-1";

/// An archive over a simulated restic.
pub(in crate::archive) struct ResticFixture {
    pub(super) restic: SimRestic,
    processes: SimProcesses,
    archive: Archive,
}

impl Default for ResticFixture {
    fn default() -> Self {
        let restic = SimRestic::default();
        restic.init(PLACE);
        let disk = Arc::new(MemoryDisk::new());
        Self::over(&restic, Arc::new(restic.clone()), disk)
    }
}

impl ResticFixture {
    /// The archive as a process has it that starts `program`, on the machine with this disk.
    fn over(restic: &SimRestic, program: Arc<dyn SimTool>, disk: Arc<MemoryDisk>) -> Self {
        let (clock, restic) = (Arc::new(TestClock::at(NOW)), restic.clone());
        let processes = SimProcesses::new(clock.clone());
        processes.install_tool("restic", program);
        let settings = ResticSettings {
            repository: PLACE.into(),
            password_file: "/etc/snapwarden/restic-password".into(),
            program: "restic".to_owned(),
            cache: "/var/cache/snapwarden".into(),
            locks: "/var/lib/snapwarden/restic-vault.locks".into(),
            environment: BTreeMap::from([("AWS_SECRET_ACCESS_KEY".to_owned(), "hush-hush".into())]),
            host: HOST.into(),
        };
        let name = "vault".parse().unwrap();
        let archive = ResticArchive::new(name, settings, Arc::new(processes.clone()), disk, clock);
        Self { restic, processes, archive: Archive::Restic(archive) }
    }

    fn repository<T>(&self, action: impl FnOnce(&mut SimRepository) -> T) -> T {
        self.restic.with(PLACE, action).unwrap()
    }

    fn calls(&self, name: &str) -> usize {
        self.processes.started().iter().filter(|command| command.arguments[0] == name).count()
    }
}

impl Fixture for ResticFixture {
    fn archive(&self) -> &Archive {
        &self.archive
    }

    fn files(&self) -> BTreeMap<String, Bytes> {
        let file = |path: &str| path.trim_start_matches('/').to_owned();
        self.repository(|all| all.snapshots.iter().map(|one| (file(&one.path), one.bytes.clone())).collect())
    }

    /// The bytes of a file that is there change below its snapshot, as by a damage.
    fn write(&self, path: &str, bytes: &[u8]) {
        let (path, bytes) = (format!("/{path}"), Bytes::copy_from_slice(bytes));
        self.repository(|all| match all.snapshots.iter_mut().rfind(|one| one.path == path) {
            Some(found) => found.bytes = bytes,
            None => drop(all.add(&path, "2026-11-20 00:00:00", HOST, bytes)),
        });
    }

    fn remove(&self, path: &str) {
        let path = format!("/{path}");
        self.repository(|all| all.snapshots.retain(|one| one.path != path));
    }

    fn has_sums(&self) -> bool {
        false
    }
}

async fn verify(fixture: &ResticFixture, copy: &StoredCopy) -> Outcome {
    let (clock, hashers) = (TestClock::at("2026-12-01T00:00:00Z"), Hashers::default());
    let reader = CopyReader::new(&clock, &NoRandomness, &hashers);
    verify::verify(fixture.archive(), copy, reader).await.outcome
}

async fn copy(fixture: &ResticFixture) -> StoredCopy {
    fixture.archive().catalogue().await.unwrap().copies()[0].clone()
}

#[tokio::test(start_paused = true)]
async fn what_is_saved_of_a_killed_export_is_no_copy_and_is_deleted() {
    let (fixture, bytes) = (ResticFixture::default(), image(LEN, 1));
    // restic saves what it has read if this program is killed: a cut image, and also a whole one.
    for (host, cut) in [(HOST, 700_000), ("backup-2", LEN)] {
        let path = format!("/{STEM}.qcow2");
        let bytes = Bytes::copy_from_slice(&bytes[..cut]);
        fixture.repository(|all| all.add(&path, "2026-11-01 02:30:00", host, bytes));
    }
    let catalogue = fixture.archive().catalogue().await.unwrap();
    assert_eq!((catalogue.copies().len(), catalogue.damaged().count()), (0, 0));
    let leftovers = fixture.archive().leftovers().await.unwrap();
    let useless: Vec<bool> = leftovers.iter().map(|leftover| leftover.is_useless).collect();
    // The other machine may be about to write the manifest.
    assert_eq!(useless, [true, false]);
    assert_eq!(fixture.archive().remove_leftovers().await.unwrap().len(), 1);
    assert_eq!((fixture.calls("prune"), fixture.files().len()), (1, 1));
    // The next export is whole, and leaves nothing of it.
    store_image(fixture.archive(), &source(&bytes)).await.unwrap();
    assert_eq!(fixture.repository(|all| all.snapshots.len()), 2, "the image and its manifest");
    assert_eq!(verify(&fixture, &copy(&fixture).await).await, Outcome::Good);
}

#[tokio::test(start_paused = true)]
async fn without_what_restic_cannot_read_a_listing_is_none_and_no_image_is_left_over() {
    let (fixture, bytes) = (ResticFixture::default(), image(LEN, 1));
    store_image(fixture.archive(), &source(&bytes)).await.unwrap();
    fixture.repository(|all| {
        let manifest = all.snapshots.last().unwrap().id.clone();
        all.unreadable.push(manifest);
    });
    let error = chain(&fixture.archive().catalogue().await.unwrap_err());
    assert!(error.contains("lacks a snapshot that restic cannot read (could not load snapshot"), "{error}");
    assert!(fixture.archive().leftovers().await.is_err());
    assert!(fixture.archive().remove_leftovers().await.is_err());
    assert_eq!(fixture.repository(|all| all.snapshots.len()), 2, "the image and its manifest");
    fixture.repository(|all| all.unreadable.clear());
    assert_eq!(verify(&fixture, &copy(&fixture).await).await, Outcome::Good);
}

/// A restic of two processes: one stores an image, and before that is read back another one looks for what is left of exports;
/// after so many calls of the other one the first goes on to its end.
#[derive(Debug, Default)]
struct Interleaved {
    restic: SimRestic,
    calls_before: usize,
    calls: AtomicUsize,
    is_other_at_work: AtomicBool,
    was_saved: AtomicBool,
    is_saved: Notify,
    may_go_on: Notify,
    is_done: Notify,
}

impl Interleaved {
    async fn run(&self, command: Command, input: DuplexStream) -> Done {
        let reads_back =
            command.arguments[0] == "dump" && command.arguments.last().unwrap().contains(".qcow2");
        let done = self.restic.run(command, input).await;
        if reads_back && !self.was_saved.swap(true, Ordering::Relaxed) {
            self.is_saved.notify_one();
            self.may_go_on.notified().await;
        } else if self.is_other_at_work.load(Ordering::Relaxed)
            && self.calls.fetch_add(1, Ordering::Relaxed) + 1 == self.calls_before
        {
            self.is_other_at_work.store(false, Ordering::Relaxed);
            self.may_go_on.notify_one();
            self.is_done.notified().await;
        }
        done
    }

    /// Stores an image, while another process on the machine with `disk` removes what exports left. How the first ended, what the
    /// other removed, and the archive.
    async fn play(
        self: Arc<Self>,
        [ours, others]: [Arc<MemoryDisk>; 2],
        bytes: &[u8],
    ) -> (Result<(), String>, usize, ResticFixture) {
        self.restic.init(PLACE);
        let program = || Arc::new(Shared(Arc::clone(&self)));
        let first = ResticFixture::over(&self.restic, program(), ours);
        let other = ResticFixture::over(&self.restic, program(), others);
        let source = source(bytes);
        let storing = async {
            let stored = store_image(first.archive(), &source).await;
            self.is_done.notify_one();
            stored.map(drop).map_err(|error| chain(&error))
        };
        let removing = async {
            self.is_saved.notified().await;
            self.is_other_at_work.store(true, Ordering::Relaxed);
            let removed = other.archive().remove_leftovers().await.unwrap();
            self.is_other_at_work.store(false, Ordering::Relaxed);
            self.may_go_on.notify_one();
            removed.len()
        };
        let (stored, removed) = join(storing, removing).await;
        (stored, removed, first)
    }
}

#[derive(Debug)]
struct Shared(Arc<Interleaved>);

impl SimTool for Shared {
    fn run(&self, command: Command, input: DuplexStream) -> BoxFuture<'static, Done> {
        let all = Arc::clone(&self.0);
        Box::pin(async move { all.run(command, input).await })
    }
}

#[tokio::test(start_paused = true)]
async fn what_another_process_is_storing_is_never_left_over() {
    let bytes = image(LEN, 1);
    // The other one makes up to two listings and prunes; at 0 it ends first.
    for calls_before in 0..=6 {
        let disk = Arc::new(MemoryDisk::new());
        let played = Arc::new(Interleaved { calls_before, ..Interleaved::default() });
        let (stored, removed, fixture) = played.play([disk.clone(), disk.clone()], &bytes).await;
        assert_eq!((stored, removed), (Ok(()), 0), "after {calls_before} calls");
        assert_eq!(verify(&fixture, &copy(&fixture).await).await, Outcome::Good);
        let locks = disk.list(Path::new("/var/lib/snapwarden/restic-vault.locks")).unwrap();
        assert!(locks.is_empty(), "after {calls_before} calls: {locks:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_that_somebody_deletes_before_its_manifest_is_written_is_no_copy() {
    // Another state directory of a machine of the same name knows nothing of our locks.
    let disks = [Arc::new(MemoryDisk::new()), Arc::new(MemoryDisk::new())];
    let (stored, removed, fixture) = Arc::new(Interleaved::default()).play(disks, &image(LEN, 1)).await;
    assert_eq!(removed, 1);
    let error = stored.unwrap_err();
    assert!(error.contains("its snapshot was deleted before the manifest was written"), "{error}");
    assert!(fixture.files().is_empty(), "{:?}", fixture.files().keys());
}

#[tokio::test(start_paused = true)]
async fn an_image_whose_manifest_cannot_be_read_is_not_left_over() {
    let (fixture, bytes) = (ResticFixture::default(), image(LEN, 1));
    store_image(fixture.archive(), &source(&bytes)).await.unwrap();
    let path = format!("/{STEM}.json");
    fixture.repository(|all| {
        let manifest = all.snapshots.iter().find(|one| one.path == path).unwrap().bytes.clone();
        all.lost.push(manifest);
    });
    let catalogue = fixture.archive().catalogue().await.unwrap();
    assert_eq!((catalogue.copies().len(), catalogue.damaged().count()), (0, 1));
    assert_eq!(fixture.archive().remove_leftovers().await.unwrap(), []);
    fixture.repository(|all| all.lost.clear());
    assert_eq!(verify(&fixture, &copy(&fixture).await).await, Outcome::Good);
}

/// A restic that lets somebody else work before it answers the first call of a name.
struct Meanwhile {
    restic: SimRestic,
    name: &'static str,
    other: Arc<Mutex<Option<BoxFuture<'static, ()>>>>,
}

impl Debug for Meanwhile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl SimTool for Meanwhile {
    fn run(&self, command: Command, input: DuplexStream) -> BoxFuture<'static, Done> {
        let is_meant = command.arguments[0] == self.name;
        let (done, other) = (self.restic.run(command, input), Arc::clone(&self.other));
        Box::pin(async move {
            let done = done.await;
            let other = if is_meant { other.lock().unwrap().take() } else { None };
            if let Some(other) = other {
                other.await;
            }
            done
        })
    }
}

#[tokio::test(start_paused = true)]
async fn of_two_that_write_one_file_at_once_neither_deletes_the_others() {
    for name in ["snapshots", "backup", "never"] {
        let restic = SimRestic::default();
        restic.init(PLACE);
        let other = Arc::default();
        let program = Meanwhile { restic: restic.clone(), name, other: Arc::clone(&other) };
        let [one, two] = [(); 2].map(|()| Arc::new(MemoryDisk::new()));
        let first = ResticFixture::over(&restic, Arc::new(program), one);
        let second = ResticFixture::over(&restic, Arc::new(restic.clone()), two);
        let markers = [1, 2].map(|id| Marker::new(Uuid::from_u128(id)));
        let [Archive::Restic(ours), Archive::Restic(theirs)] =
            [first.archive.clone(), second.archive.clone()]
        else {
            unreachable!()
        };
        let [mine, their] = markers.clone();
        let theirs_too = theirs.clone();
        let writes = async move { theirs_too.write_marker(&their).await.unwrap() };
        *other.lock().unwrap() = Some(Box::pin(writes));
        // It may find that its own is deleted.
        let _ = ours.write_marker(&mine).await;
        let found = theirs.marker().await.unwrap().unwrap();
        assert!(found.as_ref().is_some_and(|found| markers.contains(found)), "{name}: {found:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_marker_that_was_read_is_not_read_again() {
    let (fixture, bytes) = (ResticFixture::default(), image(LEN, 1));
    let Archive::Restic(archive) = fixture.archive() else { unreachable!() };
    let mut marker = Marker::new(Uuid::from_u128(1));
    archive.write_marker(&marker).await.unwrap();
    store_image(fixture.archive(), &source(&bytes)).await.unwrap();
    for _ in 0..3 {
        assert_eq!(archive.catalogue().await.unwrap().marker(), &Ok(Some(marker.clone())));
        assert_eq!(archive.marker().await.unwrap(), Ok(Some(marker.clone())));
    }
    // The image, its manifest, and the marker.
    assert_eq!(fixture.calls("dump"), 3);
    marker.states.insert(Uuid::from_u128(2));
    archive.write_marker(&marker).await.unwrap();
    assert_eq!(archive.marker().await.unwrap(), Ok(Some(marker)));
    assert_eq!(fixture.calls("dump"), 4);
}

#[tokio::test(start_paused = true)]
async fn an_image_that_cannot_be_read_back_is_no_copy() {
    let (fixture, bytes) = (ResticFixture::default(), image(LEN, 1));
    // restic finds the data in its index, and does not look whether it is still there.
    fixture.repository(|all| all.lost.push(Bytes::copy_from_slice(&bytes)));
    let error = chain(&store_image(fixture.archive(), &source(&bytes)).await.unwrap_err());
    assert!(error.contains("the repository has lost data"), "{error}");
    assert!(!error.contains("hush") && error.contains("rest:https://…@store.example/"), "{error}");
    assert!(fixture.files().is_empty());
}

#[tokio::test(start_paused = true)]
async fn lost_data_makes_a_copy_corrupt_and_an_unreachable_repository_does_not() {
    let (fixture, bytes) = (ResticFixture::default(), image(LEN, 1));
    store_image(fixture.archive(), &source(&bytes)).await.unwrap();
    let stored = copy(&fixture).await;
    fixture.repository(|all| all.locked_for = 1000);
    assert!(matches!(verify(&fixture, &stored).await, Outcome::Failed(_)));
    fixture.repository(|all| all.locked_for = 0);
    fixture.repository(|all| all.lost.push(Bytes::copy_from_slice(&bytes)));
    let outcome = verify(&fixture, &stored).await;
    assert!(matches!(&outcome, Outcome::Corrupt(why) if why.contains("lost or damaged")), "{outcome:?}");
    let after = fixture.archive().catalogue().await.unwrap();
    assert_eq!((after.copies().len(), after.corrupt().len()), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn an_image_counts_only_by_the_very_tree_that_its_manifest_names() {
    let (fixture, bytes) = (ResticFixture::default(), image(LEN, 1));
    store_image(fixture.archive(), &source(&bytes)).await.unwrap();
    let path = format!("/{STEM}.qcow2");
    fixture.repository(|all| {
        let image = all.snapshots.iter().find(|one| one.path == path).unwrap().clone();
        all.snapshots.retain(|one| one.path != path);
        all.add(&path, &image.time, HOST, Bytes::copy_from_slice(&bytes[1..]));
    });
    let catalogue = fixture.archive().catalogue().await.unwrap();
    assert_eq!((catalogue.copies().len(), catalogue.damaged().count()), (0, 1));
    let look = verify::look(fixture.archive(), &stored_before(&fixture, &bytes).await).await;
    assert!(look.has_etag && matches!(look.outcome, Outcome::Failed(_)), "{look:?}");
}

/// The copy as it was before something happened to its image.
async fn stored_before(fixture: &ResticFixture, bytes: &[u8]) -> StoredCopy {
    let other = ResticFixture::default();
    store_image(other.archive(), &source(bytes)).await.unwrap();
    let _ = fixture;
    copy(&other).await
}

#[tokio::test(start_paused = true)]
async fn a_lock_is_waited_for_and_dead_ones_are_removed() {
    let (fixture, bytes) = (ResticFixture::default(), image(LEN, 1));
    store_image(fixture.archive(), &source(&bytes)).await.unwrap();
    let stored = copy(&fixture).await;
    let at: Timestamp = "2026-11-19T00:00:00Z".parse().unwrap();
    fixture.repository(|all| all.locked_for = 3);
    fixture.archive().update_manifest(&stored, ManifestUpdate::Pruned(at)).await.unwrap();
    assert_eq!(fixture.calls("unlock"), 3);
    let pruned = copy(&fixture).await;
    fixture.repository(|all| all.locked_for = 1000);
    let error = fixture.archive().forget_pruned(&pruned).await.unwrap_err();
    assert!(chain(&error).contains("another process is working on it"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn no_key_of_ours_is_given_to_restic_and_no_secret_stands_in_its_arguments_or_errors() {
    let (fixture, bytes) = (ResticFixture::default(), image(LEN, 1));
    let mut output = begin(fixture.archive()).await;
    write(&mut output, &bytes).await;
    output.sink.abandon().await;
    let started = fixture.processes.started();
    for command in &started {
        assert!(!command.arguments.join(" ").contains("hush"), "{command:?}");
        let names: Vec<&str> = command.environment.keys().map(String::as_str).collect();
        let expected = ["AWS_SECRET_ACCESS_KEY", "LANG", "RESTIC_CACHE_DIR", "RESTIC_PASSWORD_FILE"];
        assert_eq!(names, [&expected[..], &["RESTIC_REPOSITORY", "TZ"]].concat());
    }
    assert!(!format!("{:?} {}", fixture.archive(), fixture.archive().place()).contains("hush"));
    fixture.repository(|all| all.is_full = true);
    let full = store_image(fixture.archive(), &source(&bytes)).await.unwrap_err();
    assert!(full.is_full() && !chain(&full).contains("hush"), "{}", chain(&full));
}
