//! How fast an archive of copies in a folder is read, and how much memory that takes.
//!
//! `dealloc` is the memory that the copies take; another thread allocates it. `with_the_cache` is a new process that finds the
//! manifests in its state directory.
#![expect(clippy::unwrap_used, reason = "what is measured was made here")]

use std::path::Path;
use std::sync::Arc;

use divan::counter::ItemsCount;
use divan::{AllocProfiler, Bencher};
use snapwarden::archive::backend::Archive;
use snapwarden::archive::local::LocalArchive;
use snapwarden::archive::manifest_cache::ManifestCache;
use snapwarden::clock::SystemClock;
use snapwarden::disk::{Access, Disk as _, Open, RealDisk};

#[global_allocator]
static ALLOCATIONS: AllocProfiler = AllocProfiler::system();

const SIZES: [usize; 2] = [1_000, 20_000];

fn main() {
    divan::main();
}

/// An archive with so many copies, 400 of each instance.
fn folder(count: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..count {
        let (instance, hour, day) = (number / 400, number % 24, 1 + number / 24 % 28);
        let of_instance =
            folder.path().join(format!("vault/ch-gva-2/9ee8cb98-ea6e-4d57-bdde-{instance:012x}"));
        RealDisk.create_dir_all(&of_instance, Access::Group).unwrap();
        let stem = format!("202611{day:02}T{hour:02}3000Z-b0c0ef2c-106a-4f3c-a5aa-{number:012x}");
        let manifest = format!(
            r#"{{"version":1,"zone":"ch-gva-2","snapshot":{{"id":"b0c0ef2c-106a-4f3c-a5aa-{number:012x}","name":"web-{instance}_ROOT-{instance}_202611{day:02}{hour:02}3000","created_at":"2026-11-{day:02}T{hour:02}:30:00Z","state":"exported","size_gib":50,"application_consistent":false}},"instance":{{"id":"9ee8cb98-ea6e-4d57-bdde-{instance:012x}","name":"web-{instance}","labels":{{"backup":"nightly"}}}},"image":{{"file":"{stem}.qcow2","bytes":0,"md5":"{number:032x}","qcow2_version":3,"virtual_size_bytes":53687091200}},"exported_at":"2026-12-01T00:00:00Z","verified_at":"2026-12-01T00:00:00Z","policy":"nightly","run_id":"01932b5e-0000-7000-8000-{number:012x}","program_version":"0.1.0","template":{{"id":"b0c0ef2c-106a-4f3c-a5aa-5e6176d0f107","boot_mode":"uefi","default_user":"debian","password_enabled":false,"ssh_key_enabled":true}},"warnings":[],"pruned_at":null,"corrupt_since":null}}"#
        );
        for (end, bytes) in [("qcow2", ""), ("json", &*manifest)] {
            let path = of_instance.join(format!("{stem}.{end}"));
            let file = RealDisk.open(&path, Open::CreateNew, Access::Group).unwrap();
            file.write_all_at(bytes.as_bytes(), 0).unwrap();
        }
    }
    folder
}

/// A process that reads the archive, and how many copies it finds.
fn read(folder: &Path, has_cache: bool) -> usize {
    let disk = Arc::new(RealDisk);
    let archive = LocalArchive::new(
        "vault".parse().unwrap(),
        folder.join("vault"),
        disk.clone(),
        Arc::new(SystemClock::start()),
    );
    let cache = ManifestCache::in_file(disk, folder.join("manifests-vault.jsonl"), true);
    let archive = Archive::Local(if has_cache { archive.with_cache(cache) } else { archive });
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(archive.catalogue()).unwrap().copies().len()
}

#[divan::bench(args = SIZES, sample_count = 10)]
fn reading_anew(bencher: Bencher<'_, '_>, count: usize) {
    let folder = folder(count);
    bencher.counter(ItemsCount::new(count)).bench(|| assert_eq!(read(folder.path(), false), count));
}

#[divan::bench(args = SIZES, sample_count = 10)]
fn with_the_cache(bencher: Bencher<'_, '_>, count: usize) {
    let folder = folder(count);
    assert_eq!(read(folder.path(), true), count);
    bencher.counter(ItemsCount::new(count)).bench(|| assert_eq!(read(folder.path(), true), count));
}
