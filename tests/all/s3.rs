//! Archives in buckets, against a real S3 server (moto's, or another), with boto3 as the witness of what it holds.
//!
//! It is run where `SNAPWARDEN_MOTO_PYTHON` names a Python that has the packages `moto[server]` and `boto3`; elsewhere
//! the tests say that they were skipped.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{HeaderMap, Method, StatusCode};
use secrecy::ExposeSecret as _;
use serde_json::Value;
use snapwarden::archive::manifest::{
    ImageRecord, InstanceRecord, MANIFEST_VERSION, Manifest, SnapshotRecord,
};
use snapwarden::archive::manifest_update::ManifestUpdate;
use snapwarden::archive::md5::{Md5, Md5Sum};
use snapwarden::archive::s3::archive::S3Archive;
use snapwarden::archive::s3::client::S3Location;
use snapwarden::archive::transfer::sink::{Begin, ImageVersion, Sink};
use snapwarden::archive::transfer::source::ImageSource as _;
use snapwarden::clock::SystemClock;
use snapwarden::copies::CopyId;
use snapwarden::credentials::Credentials;
use snapwarden::policy::bucket::BucketRules;
use snapwarden::randomness::SystemRandomness;
use snapwarden::transport::{Body, HttpTransport, Purpose, Request, Transport as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::certificates::Authority;
use crate::command_line::{Play, end_of};

/// The server, and what boto3 sees in it. It ends with this.
pub(crate) struct Server {
    child: Child,
    pub(crate) endpoint: String,
    /// Its standard input, whose end is its own.
    ask: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Server {
    pub(crate) fn start() -> Option<Self> {
        let Some(python) = std::env::var_os("SNAPWARDEN_MOTO_PYTHON") else {
            crate::stage::skipped(format_args!(
                "SNAPWARDEN_MOTO_PYTHON names no Python with the packages `moto[server]` and `boto3`"
            ));
            return None;
        };
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/s3_server.py");
        let mut child = Command::new(python)
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let ask = child.stdin.take();
        let mut answers = BufReader::new(child.stdout.take().unwrap());
        let mut endpoint = String::new();
        answers.read_line(&mut endpoint).unwrap();
        assert!(endpoint.starts_with("http://"), "the server did not start");
        Some(Self { child, endpoint: endpoint.trim().to_owned(), ask, answers })
    }

    pub(crate) fn ask(&mut self, what: &str) -> Value {
        writeln!(self.ask.as_mut().unwrap(), "{what}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    pub(crate) fn keys(&mut self) -> Vec<String> {
        let objects = self.ask("objects");
        objects.as_object().unwrap().keys().cloned().collect()
    }

    pub(crate) fn keep_versions(&mut self) {
        self.ask("versions");
    }

    /// How many uploads are not complete; as many as `expected` of a server that lists none.
    fn uploads(&mut self, expected: usize) -> usize {
        self.ask("uploads").as_array().map_or(expected, Vec::len)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ask = None;
        let _ = self.child.wait();
    }
}

pub(crate) fn archive(endpoint: &str) -> S3Archive {
    archive_with(endpoint, BucketRules::default())
}

fn archive_with(endpoint: &str, rules: BucketRules) -> S3Archive {
    let location = S3Location {
        endpoint: endpoint.parse().unwrap(),
        region: "us-east-1".to_owned(),
        bucket: "bucket".to_owned(),
        prefix: "snapwarden/".to_owned(),
        rules,
    };
    S3Archive::new(
        "offsite".parse().unwrap(),
        location,
        Credentials::new("EXO1", "hush-hush-hush", None).unwrap(),
        Arc::new(HttpTransport::default()),
        Arc::new(SystemClock::start()),
        Arc::new(SystemRandomness),
    )
}

fn of() -> CopyId {
    CopyId {
        zone: "ch-gva-2".parse().unwrap(),
        instance_id: "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec".parse().unwrap(),
        created_at: "2026-11-01T02:30:00Z".parse().unwrap(),
        snapshot_id: "b0c0ab00-0000-4000-8000-00000000f105".parse().unwrap(),
    }
}

fn manifest(bytes: u64, md5: Md5Sum) -> Manifest {
    let of = of();
    Manifest {
        version: MANIFEST_VERSION,
        zone: of.zone,
        snapshot: SnapshotRecord {
            id: of.snapshot_id,
            name: "nightly".into(),
            created_at: of.created_at,
            // As manifests are read.
            state: Box::default(),
            size_gib: Some(10),
            application_consistent: None,
        },
        instance: Arc::new(InstanceRecord { id: of.instance_id, name: None, labels: BTreeMap::new() }),
        image: ImageRecord {
            file: Box::default(),
            bytes,
            md5,
            qcow2_version: Some(3),
            virtual_size_bytes: None,
            etag: None,
            version_id: None,
        },
        exported_at: None,
        verified_at: of.created_at,
        policy: None,
        template: None,
        warnings: Vec::new(),
        pruned_at: None,
        corrupt_since: None,
        written: None,
    }
}

/// Chunks of 64 KiB, none of them kept.
fn chunks(count: u64) -> impl Iterator<Item = Bytes> {
    (0..count).map(|number| {
        let mut chunk = vec![u8::try_from(number % 251).unwrap(); 64 << 10];
        chunk[..8].copy_from_slice(&number.to_be_bytes());
        Bytes::from(chunk)
    })
}

fn md5_of(chunks: impl Iterator<Item = Bytes>) -> Md5Sum {
    let mut md5 = Md5::new();
    chunks.for_each(|chunk| md5.update(&chunk));
    md5.finish()
}

async fn begin(archive: &S3Archive) -> Box<dyn Sink> {
    match archive.begin(&of()).await.unwrap() {
        Begin::Missing(output) => output.sink,
        Begin::Stored(copy) => panic!("{copy:?}"),
    }
}

async fn write(sink: &mut Box<dyn Sink>, count: u64, md5: Md5Sum) {
    sink.expect(&ImageVersion { md5, bytes: Some(count << 16), etag: None }).unwrap();
    for chunk in chunks(count) {
        sink.write(chunk).await.unwrap();
    }
}

pub(crate) async fn hash(mut body: Body) -> Md5Sum {
    let mut md5 = Md5::new();
    while let Some(chunk) = body.next().await {
        md5.update(&chunk.unwrap());
    }
    md5.finish()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_holds_a_verified_image_and_gives_it_back() {
    let Some(mut server) = Server::start() else { return };
    let archive = archive(&server.endpoint);
    assert!(archive.catalogue().await.unwrap().copies().is_empty());

    let count = 20 * 16 + 1;
    let (bytes, md5) = (count << 16, md5_of(chunks(count)));
    let mut sink = begin(&archive).await;
    write(&mut sink, count, md5).await;
    assert_eq!((server.keys().len(), server.uploads(1)), (0, 1), "it is visible before it is verified");
    let published = sink.publish(manifest(bytes, md5)).await.unwrap();
    let etag = published.image.etag.clone();
    assert!(etag.is_some(), "what `verify --head` compares");
    let mut expected = manifest(bytes, md5);
    expected.image.etag = etag;
    assert_eq!(published, expected);
    let expected = Arc::new(expected);

    let stem = "snapwarden/ch-gva-2/9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec/\
                20261101T023000Z-b0c0ab00-0000-4000-8000-00000000f105";
    let keys = ["json", "qcow2", "qcow2.md5"].map(|end| format!("{stem}.{end}"));
    assert_eq!((server.keys(), server.uploads(0)), (keys.to_vec(), 0));
    let image = &server.ask("objects")[&keys[1]];
    assert_eq!((image["bytes"].as_u64(), image["md5"].as_str()), (Some(bytes), Some(&*md5.to_string())));
    assert_eq!(image["metadata"]["md5"], md5.to_string());
    assert!(image["etag"].as_str().unwrap().ends_with("-3\""), "{image}");

    let catalogue = archive.catalogue().await.unwrap();
    let copy = &catalogue.copies()[0];
    assert_eq!((&copy.manifest, catalogue.problems().len()), (&expected, 0));
    let Begin::Stored(proof) = archive.begin(&of()).await.unwrap() else { panic!("it is stored again") };
    assert_eq!((proof.snapshot_id(), proof.bytes()), (published.snapshot.id, bytes));
    let stored = archive.image(copy);
    let whole = stored.open(0, None, None).await.unwrap();
    assert_eq!((whole.offset, whole.total), (0, Some(bytes)));
    assert_eq!(hash(whole.body).await, md5);
    let end = stored.open(16 << 16, None, whole.etag.as_deref()).await.unwrap();
    assert_eq!((end.offset, end.total), (16 << 16, Some(bytes)));
    assert_eq!(hash(end.body).await, md5_of(chunks(count).skip(16)));

    let address = archive.presign_get(copy, Duration::from_mins(10)).await.unwrap();
    let request = Request {
        method: Method::GET,
        url: address.expose_secret().parse().unwrap(),
        headers: HeaderMap::new(),
        body: Bytes::new(),
        purpose: Purpose::Image,
    };
    let answer = HttpTransport::default().send(request).await.unwrap();
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(hash(answer.body).await, md5);

    let now = "2026-11-20T00:00:00Z".parse().unwrap();
    archive.update_manifest(copy, ManifestUpdate::Pruned(now)).await.unwrap();
    assert_eq!(server.keys(), [keys[0].replace(".json", ".pruned.json")]);
    assert_eq!(archive.catalogue().await.unwrap().copies()[0].manifest.pruned_at, Some(now));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_published_is_not_visible_and_is_resumed() {
    let Some(mut server) = Server::start() else { return };
    let first = archive(&server.endpoint);
    let count = 33 * 16;
    let (bytes, md5) = (count << 16, md5_of(chunks(count)));

    let mut sink = begin(&first).await;
    write(&mut sink, count, md5).await;
    sink.restart().await.unwrap();
    assert_eq!(server.uploads(0), 0, "it was another image");
    write(&mut sink, count, md5).await;
    sink.abandon().await;
    assert_eq!((server.keys().len(), server.uploads(1)), (0, 1));
    let mut sink = begin(&first).await;
    write(&mut sink, count, md5).await;
    drop(sink);
    // Where a store lists its uploads, it is the same one all the time.
    assert_eq!((server.keys().len(), server.uploads(1)), (0, 1));

    // Not by another process: moto says of every upload that it was begun in 2010, so that one takes it for abandoned.
    let mut sink = begin(&first).await;
    write(&mut sink, count, md5).await;
    sink.publish(manifest(bytes, md5)).await.unwrap();
    assert_eq!((server.keys().len(), server.uploads(0)), (3, 0));
    let copies = first.catalogue().await.unwrap();
    assert_eq!((copies.copies().len(), copies.problems().len()), (1, 0));
    let stored = first.image(&copies.copies()[0]).open(0, None, None).await.unwrap();
    assert_eq!(hash(stored.body).await, md5);
}

/// What the next test starts as a process of its own.
const UPLOADS_TO: &str = "SNAPWARDEN_TEST_UPLOADS_TO";

#[tokio::test]
async fn an_upload_needs_three_parts_of_memory_and_some() {
    if let Some(endpoint) = std::env::var_os(UPLOADS_TO) {
        let archive = archive(endpoint.to_str().unwrap());
        let before = peak_kib();
        let count = 256 * 16;
        let md5 = md5_of(chunks(count));
        let mut sink = begin(&archive).await;
        write(&mut sink, count, md5).await;
        sink.publish(manifest(count << 16, md5)).await.unwrap();
        let peak = peak_kib();
        println!("peak {peak} KiB, {before} KiB before");
        assert!(peak <= 48 * 1024 + 3 * 8 * 1024, "{peak} KiB");
        return;
    }
    let Some(mut server) = Server::start() else { return };
    let mut command = Command::new(std::env::current_exe().unwrap());
    let name = "s3::an_upload_needs_three_parts_of_memory_and_some";
    command.args([name, "--exact", "--nocapture"]).env(UPLOADS_TO, &server.endpoint);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("peak"), "{said}");
    println!("{said}");
    assert_eq!(server.keys().len(), 3);
}

/// The most memory that this process had so far.
fn peak_kib() -> u64 {
    let status = crate::stage::read(Path::new("/proc/self/status"));
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_trusted_by_the_authority_of_ca_file_alone() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = Authority::new();
    let (acceptor, address) = (authority.sign().acceptor(), listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let _ = stream.read(&mut [0; 8192]).await;
                let body = "<Error><Code>NoSuchBucket</Code><Message>none</Message></Error>";
                let answer = format!(
                    "HTTP/1.1 404 no\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.shutdown().await;
            });
        }
    });
    let play = Play::new().await;
    let list = async |ca_file: &str| {
        play.configure(&format!(
            "[archives.offsite]\ntype = \"s3\"\nendpoint = \"https://localhost:{}\"\nregion = \"r\"\nbucket = \"backups\"\n\
             {ca_file}\n[policies.nightly]\nzones = [\"ch-gva-2\"]\n",
            address.port()
        ));
        let mut command = play.command(&["archive", "list", "offsite"]);
        command.env("AWS_ACCESS_KEY_ID", "EXO1").env("AWS_SECRET_ACCESS_KEY", "hush-hush-hush");
        end_of(command).await
    };
    let path = authority.write(&play.path(""));
    let trusted = list(&format!("ca_file = \"{}\"", path.display())).await;
    trusted.complained(&["the store answers 404 Not Found (NoSuchBucket"]);
    for (ca_file, words) in [
        ("/nowhere/ca.pem".to_owned(), ["`ca_file` of archive `offsite`, /nowhere/ca.pem, can't be used"]),
        (play.path("snapwarden.toml").display().to_string(), ["no certificate in PEM"]),
    ] {
        let refused = list(&format!("ca_file = \"{ca_file}\"")).await;
        assert_eq!(refused.status, 78, "{refused:?}");
        refused.complained(&words);
    }
}
