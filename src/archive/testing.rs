//! Shared by this module's tests: images built byte by byte, a source with scripted faults, a disk that fails.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _};
use jiff::Timestamp;

use crate::archive::manifest::{ImageRecord, InstanceRecord, MANIFEST_VERSION, Manifest, SnapshotRecord};
use crate::archive::md5::Md5;
use crate::archive::transfer::source::{ImageSource, ImageStream, SourceError};
use crate::clock::{Clock, SystemClock};
use crate::disk::{Access, Disk, DiskFile, DiskLock, Entry, Metadata, Open, RealDisk};
use crate::randomness::Randomness;
use crate::transport::{Reached, TransportError};

pub(super) const GIB: u64 = 1 << 30;

/// A valid image of `len` bytes, at least four clusters of 64 KiB, of a disk of 10 GiB.
pub(crate) fn image(len: usize, seed: u64) -> Vec<u8> {
    const CLUSTER: usize = 1 << 16;
    assert!(len >= 4 * CLUSTER);
    let mut bytes = vec![0; len];
    put(&mut bytes, 0, b"QFI\xfb");
    put(&mut bytes, 4, &3_u32.to_be_bytes());
    put(&mut bytes, 20, &16_u32.to_be_bytes());
    put(&mut bytes, 24, &(10 * GIB).to_be_bytes());
    put(&mut bytes, 36, &20_u32.to_be_bytes());
    put(&mut bytes, 40, &(3 * CLUSTER as u64).to_be_bytes());
    put(&mut bytes, 48, &(CLUSTER as u64).to_be_bytes());
    put(&mut bytes, 56, &1_u32.to_be_bytes());
    put(&mut bytes, 96, &4_u32.to_be_bytes());
    put(&mut bytes, 100, &104_u32.to_be_bytes());
    let mut state = seed | 1;
    for byte in &mut bytes[3 * CLUSTER + 160..] {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = state.to_be_bytes()[0];
    }
    bytes
}

pub(super) fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    bytes[at..at + what.len()].copy_from_slice(what);
}

/// The manifest of a copy of one snapshot, whose image these bytes are.
pub(crate) fn manifest_of(bytes: &[u8]) -> Manifest {
    let created_at = "2026-11-01T02:30:00Z".parse().unwrap();
    Manifest {
        version: MANIFEST_VERSION,
        zone: "ch-gva-2".parse().unwrap(),
        snapshot: SnapshotRecord {
            id: "b0c0ab00-0000-4000-8000-00000000f105".parse().unwrap(),
            name: "nightly".into(),
            created_at,
            // As manifests are read.
            state: Box::default(),
            size_gib: Some(10),
            application_consistent: None,
        },
        instance: Arc::new(InstanceRecord {
            id: "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec".parse().unwrap(),
            name: None,
            labels: BTreeMap::new(),
        }),
        image: ImageRecord {
            file: Box::default(),
            bytes: bytes.len() as u64,
            md5: md5_of(bytes).parse().unwrap(),
            qcow2_version: Some(3),
            virtual_size_bytes: None,
            etag: None,
            version_id: None,
        },
        exported_at: None,
        verified_at: created_at,
        policy: None,
        template: None,
        warnings: Vec::new(),
        pruned_at: None,
        corrupt_since: None,
        written: None,
    }
}

pub(super) fn md5_of(bytes: &[u8]) -> String {
    let mut md5 = Md5::new();
    md5.update(bytes);
    md5.finish().to_string()
}

/// The behaviour of one connection; after the script all succeed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// None.
    Fine,
    /// The connection breaks after this many bytes.
    Cut(usize),
    /// the body ends as if it were complete after this many bytes.
    End(usize),
    /// No more bytes arrive after this many.
    Stall(usize),
    /// No answer.
    Hang,
    /// The range is ignored, and the connection breaks after this many bytes.
    NoRange(usize),
    /// The answer is from behind the place asked for.
    Beyond,
    /// The answer is from before the place asked for.
    Before,
    /// The answer is a part, from the place asked for to the end of the image.
    Wide,
    /// The last byte that is sent is another.
    Flip,
    /// The header names a backing file.
    OtherHeader,
    /// The promised length is too small by this much.
    Promise(u64),
    Broken,
    Refused,
    Expired,
    Changed,
}

/// What is at the address.
#[derive(Debug, Clone)]
pub(crate) struct Offer {
    pub(super) bytes: Bytes,
    pub(crate) md5: Option<String>,
    pub(super) etag: Option<&'static str>,
    pub(super) tells_total: bool,
}

impl Offer {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let md5 = Some(md5_of(bytes));
        Self { bytes: Bytes::copy_from_slice(bytes), md5, etag: Some("a"), tells_total: true }
    }
}

/// A source in memory.
pub(crate) struct FakeSource {
    pub(super) chunk: usize,
    now: Mutex<Offer>,
    script: Mutex<VecDeque<Fault>>,
    /// What the next renewals bring; without one, all stays.
    renewals: Mutex<VecDeque<Result<Offer, Fault>>>,
    pub(super) opened: Mutex<Vec<(u64, Option<String>)>>,
    pub(super) renewed: AtomicU64,
    pub(super) sent: Arc<AtomicU64>,
}

impl FakeSource {
    pub(crate) fn new(offer: Offer, script: impl IntoIterator<Item = Fault>) -> Self {
        Self {
            chunk: 10_000,
            now: Mutex::new(offer),
            script: Mutex::new(script.into_iter().collect()),
            renewals: Mutex::default(),
            opened: Mutex::default(),
            renewed: AtomicU64::new(0),
            sent: Arc::default(),
        }
    }

    pub(super) fn with_renewals(self, offers: impl IntoIterator<Item = Result<Offer, Fault>>) -> Self {
        self.renewals.lock().unwrap().extend(offers);
        self
    }

    pub(super) fn offsets(&self) -> Vec<u64> {
        self.opened.lock().unwrap().iter().map(|(offset, _)| *offset).collect()
    }
}

fn refusal(fault: Fault) -> SourceError {
    match fault {
        Fault::Refused => SourceError::Refused("no such bucket".into()),
        Fault::Expired => SourceError::Expired,
        Fault::Changed => SourceError::Changed,
        _ => SourceError::Broken("status 503".into()),
    }
}

impl ImageSource for FakeSource {
    fn md5(&self) -> Option<String> {
        self.now.lock().unwrap().md5.clone()
    }

    fn is_export(&self) -> bool {
        true
    }

    fn open<'a>(
        &'a self,
        offset: u64,
        until: Option<u64>,
        etag: Option<&'a str>,
    ) -> BoxFuture<'a, Result<ImageStream, SourceError>> {
        self.opened.lock().unwrap().push((offset, etag.map(str::to_owned)));
        let fault = self.script.lock().unwrap().pop_front().unwrap_or(Fault::Fine);
        let offer = self.now.lock().unwrap().clone();
        Box::pin(async move {
            let mut offset = usize::try_from(offset).unwrap();
            let mut total = offer.bytes.len() as u64;
            let mut end = offer.bytes.len();
            let mut is_part = offset > 0 || until.is_some();
            if let Some(until) = until.filter(|_| !matches!(fault, Fault::NoRange(_) | Fault::Wide)) {
                end = end.min(usize::try_from(until).unwrap());
            }
            let mut tail: Vec<Result<Bytes, TransportError>> = Vec::new();
            let cut = || Err(TransportError::new(Reached::Unknown, "the connection broke"));
            let mut stalls = false;
            match fault {
                Fault::Fine | Fault::Flip | Fault::OtherHeader | Fault::Wide => {}
                Fault::Cut(bytes) => {
                    end = end.min(offset + bytes);
                    tail.push(cut());
                }
                Fault::NoRange(bytes) => {
                    is_part = false;
                    offset = 0;
                    end = end.min(bytes);
                    tail.push(cut());
                }
                Fault::End(bytes) => end = end.min(offset + bytes),
                Fault::Stall(bytes) => {
                    end = end.min(offset + bytes);
                    stalls = true;
                }
                Fault::Hang => std::future::pending().await,
                Fault::Beyond => offset += 1,
                Fault::Before => offset = offset.saturating_sub(1_000),
                Fault::Promise(less) => total -= less,
                _ => return Err(refusal(fault)),
            }
            let mut bytes = offer.bytes.slice(offset..end.max(offset));
            if matches!(fault, Fault::Flip) {
                let mut flipped = bytes.to_vec();
                *flipped.last_mut().unwrap() ^= 1;
                bytes = flipped.into();
            }
            if matches!(fault, Fault::OtherHeader) {
                let mut flipped = bytes.to_vec();
                put(&mut flipped, 8, &[0, 1]);
                bytes = flipped.into();
            }
            let (chunk, sent) = (self.chunk, Arc::clone(&self.sent));
            let chunks = stream::unfold(bytes, move |mut rest| {
                let piece = rest.split_to(rest.len().min(chunk));
                sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
                async move { (!piece.is_empty()).then_some((Ok(piece), rest)) }
            });
            let pending = stream::pending().take(usize::from(stalls));
            Ok(ImageStream {
                offset: offset as u64,
                is_part,
                total: offer.tells_total.then_some(total),
                etag: offer.etag.map(str::to_owned),
                body: Box::pin(chunks.chain(stream::iter(tail)).chain(pending)),
            })
        })
    }

    fn renew(&self) -> BoxFuture<'_, Result<(), SourceError>> {
        self.renewed.fetch_add(1, Ordering::Relaxed);
        let next = self.renewals.lock().unwrap().pop_front();
        Box::pin(async move {
            match next {
                None => Ok(()),
                Some(Ok(offer)) => {
                    *self.now.lock().unwrap() = offer;
                    Ok(())
                }
                Some(Err(fault)) => Err(refusal(fault)),
            }
        })
    }
}

/// A wall clock that stands still over tokio's own (paused) time.
#[derive(Debug)]
pub(crate) struct TestClock(SystemClock, Timestamp);

impl TestClock {
    pub(crate) fn at(now: &str) -> Self {
        Self(SystemClock::start(), now.parse().unwrap())
    }
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        self.1
    }
    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        self.0.sleep(duration)
    }
}

#[derive(Debug)]
pub(crate) struct NoRandomness;
impl Randomness for NoRandomness {
    fn next_u64(&self) -> u64 {
        0
    }
}

/// The real disk, until it fails.
#[derive(Debug)]
pub(crate) struct TestDisk {
    /// The bytes that may still be written; then it is full.
    pub(crate) room: AtomicU64,
    /// What it says of its free space.
    pub(crate) free: AtomicU64,
    /// The changes that may still be made; then the machine stops, and nothing works any more.
    pub(crate) changes: AtomicU64,
    stopped: AtomicBool,
    /// Images can't be read.
    pub(super) unreadable: AtomicBool,
    pub(super) log: Mutex<Vec<String>>,
    /// Writes wait until its sender is dropped.
    pub(super) gate: Mutex<Option<Receiver<()>>>,
}

impl Default for TestDisk {
    fn default() -> Self {
        Self {
            room: AtomicU64::new(u64::MAX),
            free: AtomicU64::new(u64::MAX),
            changes: AtomicU64::new(u64::MAX),
            stopped: AtomicBool::new(false),
            unreadable: AtomicBool::new(false),
            log: Mutex::default(),
            gate: Mutex::default(),
        }
    }
}

impl TestDisk {
    fn change(&self, what: &str, path: &Path) -> io::Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let end = name.split_once(".qcow2").map_or_else(
            || name.split_once('.').map_or(name.to_string(), |(_, end)| format!(".{end}")),
            |(_, end)| format!(".qcow2{end}"),
        );
        self.log.lock().unwrap().push(format!("{what} {end}"));
        let left =
            self.changes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if left.is_err() {
            self.stopped.store(true, Ordering::Relaxed);
            return Err(io::Error::other("the machine stopped"));
        }
        Ok(())
    }

    pub(super) fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct TestFile(Arc<TestDisk>, PathBuf, Box<dyn DiskFile>);

impl DiskFile for TestFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let is_image = self.1.extension().is_some_and(|end| end == "qcow2");
        if is_image && self.0.unreadable.load(Ordering::Relaxed) {
            return Err(io::Error::other("the disk is worn out"));
        }
        self.2.read_at(buffer, offset)
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if let Some(gate) = self.0.gate.lock().unwrap().take() {
            let _ = gate.recv();
        }
        self.0.change("write", &self.1)?;
        let room = self.0.room.load(Ordering::Relaxed);
        let fits = bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        self.0.room.fetch_sub(fits as u64, Ordering::Relaxed);
        self.2.write_all_at(&bytes[..fits], offset)?;
        if fits < bytes.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.change("set_len", &self.1)?;
        self.2.set_len(len)
    }
    fn len(&self) -> io::Result<u64> {
        self.2.len()
    }
    fn sync(&self) -> io::Result<()> {
        self.0.change("sync", &self.1)?;
        self.2.sync()
    }

    fn release(&self, bytes: Range<u64>) {
        self.2.release(bytes);
    }
}

/// The seam's form of a shared [`TestDisk`].
#[derive(Debug, Clone)]
pub(crate) struct Shared(pub(crate) Arc<TestDisk>);

impl Disk for Shared {
    fn open(&self, path: &Path, how: Open, access: Access) -> io::Result<Box<dyn DiskFile>> {
        if how == Open::CreateNew {
            self.0.change("create", path)?;
        }
        let file = RealDisk.open(path, how, access)?;
        Ok(Box::new(TestFile(Arc::clone(&self.0), path.to_owned(), file)))
    }
    fn append(&self, path: &Path, bytes: &[u8], access: Access) -> io::Result<()> {
        self.0.change("append to", path)?;
        RealDisk.append(path, bytes, access)
    }
    fn create_dir_all(&self, path: &Path, access: Access) -> io::Result<()> {
        self.0.change("create_dir_all", Path::new("folder"))?;
        RealDisk.create_dir_all(path, access)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.change("rename to", to)?;
        RealDisk.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.0.change("remove", path)?;
        RealDisk.remove_file(path)
    }
    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        RealDisk.list(folder)
    }
    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        RealDisk.metadata(path)
    }
    fn sync_dir(&self, folder: &Path) -> io::Result<()> {
        self.0.change("sync_dir", Path::new("folder"))?;
        RealDisk.sync_dir(folder)
    }
    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        Ok(self.0.free.load(Ordering::Relaxed))
    }
    fn lock(&self, path: &Path) -> io::Result<Box<dyn DiskLock>> {
        self.0.change("lock", path)?;
        RealDisk.lock(path)
    }
}
