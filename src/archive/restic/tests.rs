//! Claims about archives in repositories of restic, with a simulated restic. The suite for every kind of archive holds for them, too.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;

use super::archive::ResticArchive;
use super::repository::ResticSettings;
use crate::archive::backend::Archive;
use crate::archive::catalogue::StoredCopy;
use crate::archive::copy_reader::CopyReader;
use crate::archive::manifest_update::ManifestUpdate;
use crate::archive::testing::{NoRandomness, TestClock, image};
use crate::archive::tests::contract::{Fixture, LEN, NOW, STEM, begin, source, store_image, write};
use crate::archive::transfer::hash::Hashers;
use crate::archive::verify::{self, Outcome};
use crate::sim::disk::MemoryDisk;
use crate::sim::processes::SimProcesses;
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
        let (clock, restic) = (Arc::new(TestClock::at(NOW)), SimRestic::default());
        restic.init(PLACE);
        let processes = SimProcesses::new(clock.clone());
        processes.install_tool("restic", Arc::new(restic.clone()));
        let settings = ResticSettings {
            repository: PLACE.into(),
            password_file: "/etc/snapwarden/restic-password".into(),
            program: "restic".to_owned(),
            cache: "/var/cache/snapwarden".into(),
            environment: BTreeMap::from([("AWS_SECRET_ACCESS_KEY".to_owned(), "hush-hush".into())]),
            host: HOST.into(),
        };
        let name = "vault".parse().unwrap();
        let disk = Arc::new(MemoryDisk::new());
        let archive = ResticArchive::new(name, settings, Arc::new(processes.clone()), disk, clock);
        Self { restic, processes, archive: Archive::Restic(archive) }
    }
}

impl ResticFixture {
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
        let expected = ["AWS_SECRET_ACCESS_KEY", "GOGC", "LANG", "RESTIC_CACHE_DIR", "RESTIC_PASSWORD_FILE"];
        assert_eq!(names, [&expected[..], &["RESTIC_REPOSITORY", "TZ"]].concat());
    }
    assert!(!format!("{:?} {}", fixture.archive(), fixture.archive().place()).contains("hush"));
    fixture.repository(|all| all.is_full = true);
    let full = store_image(fixture.archive(), &source(&bytes)).await.unwrap_err();
    assert!(full.is_full() && !chain(&full).contains("hush"), "{}", chain(&full));
}
