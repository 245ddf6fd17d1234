//! What holds for any bytes from outside. Each claim is a fuzz target of libFuzzer, by its name, and all are tried by a short
//! test of a fixed seed. A claim never panics, and returns whether the bytes were read.
//!
//! What is private is reached as the bytes reach it: through a response, a file, or the output of a program.

#![allow(dead_code, clippy::allow_attributes, reason = "the test uses some items, a fuzz target others")]

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::error::Error;
use std::future::ready;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use snapwarden::archive::backend::Archive;
use snapwarden::archive::local::LocalArchive;
use snapwarden::archive::manifest::{BuildFacts, Manifest, Written};
use snapwarden::archive::marker::{MARKER_FILE, MarkerProblem};
use snapwarden::archive::md5::Md5;
use snapwarden::archive::qcow2::Checker;
use snapwarden::archive::restic::archive::ResticArchive;
use snapwarden::archive::restic::repository::ResticSettings;
use snapwarden::archive::s3::archive::S3Archive;
use snapwarden::archive::s3::client::S3Location;
use snapwarden::archive::store::{ImageToStore, store};
use snapwarden::archive::transfer::connection::Download;
use snapwarden::archive::transfer::hash::Hashers;
use snapwarden::archive::transfer::sink::Begin;
use snapwarden::archive::transfer::source::{ImageSource, ImageStream, SourceError};
use snapwarden::clock::{Clock, SystemClock};
use snapwarden::config;
use snapwarden::credentials::Credentials;
use snapwarden::daemon::server;
use snapwarden::daemon::web::Access as PortAccess;
use snapwarden::disk::{Access, Disk, replace_file};
use snapwarden::exoscale::client::{Client, Settings};
use snapwarden::exoscale::wire::{ListedSnapshots, PromoteRequest, decode_instances, decode_snapshots};
use snapwarden::lookup::Kind;
use snapwarden::policy::bucket::BucketRules;
use snapwarden::policy::span::{Span, parse_duration};
use snapwarden::schedule::Schedule;
use snapwarden::sim::clock::SimClock;
use snapwarden::sim::disk::MemoryDisk;
use snapwarden::sim::processes::{SimProcesses, SimProgram};
use snapwarden::sim::randomness::SeededRandomness;
use snapwarden::snapshot::{Instance, Snapshot, SnapshotState, ZoneName};
use snapwarden::state::audit::{Action, AuditMark, Line, StepFacts, Subject};
use snapwarden::state::directory::StateDirectory;
use snapwarden::state::error::StateError;
use snapwarden::telemetry::Telemetry;
use snapwarden::text::{chain, printable};
use snapwarden::transport::{Request, Response, Transport, TransportError};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// What holds for any bytes. Returns whether they were read.
pub(crate) type Claim = fn(&[u8]) -> bool;

/// The claims by their names.
pub(crate) const CLAIMS: [(&str, Claim); 15] = [
    ("api", api),
    ("archive", archive),
    ("configuration", configuration),
    ("cron", cron),
    ("journal", journal),
    ("listing", listing),
    ("manifest", manifest),
    ("port", port),
    ("qcow2", qcow2),
    ("range", range),
    ("restic", restic),
    ("s3", s3),
    ("span", span),
    ("state", state),
    ("web", web),
];

/// The claim of this name.
pub(crate) fn claim(name: &str) -> Claim {
    CLAIMS.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("no claim is named {name}")).1
}

const NOW: &str = "2026-11-01T12:00:00Z";
const ZONE: &str = "ch-gva-2";
const INSTANCE: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";
const SNAPSHOT: &str = "b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105";

/// The body of a listing is refused in a few printable words, or it is read, each thing once, and what was read reads
/// back as the same.
fn listing(bytes: &[u8]) -> bool {
    let snapshots = decode_snapshots(bytes);
    match &snapshots {
        Ok(listed) => {
            let ids: HashSet<_> = listed.snapshots.iter().map(|snapshot| snapshot.id).collect();
            assert_eq!(ids.len(), listed.snapshots.len());
            assert_eq!(decode_snapshots(written(listed).to_string().as_bytes()).as_ref(), Ok(listed));
        }
        Err(error) => is_printable(&error.to_string()),
    }
    let instances = decode_instances(bytes);
    match &instances {
        Ok(instances) => {
            let ids: HashSet<_> = instances.iter().map(|instance| instance.id).collect();
            assert_eq!(ids.len(), instances.len());
            let text = json!({ "instances": instances.iter().map(whole).collect::<Vec<_>>() }).to_string();
            assert_eq!(decode_instances(text.as_bytes()).as_ref(), Ok(instances));
        }
        Err(error) => is_printable(&error.to_string()),
    }
    snapshots.is_ok_and(|listed| !listed.snapshots.is_empty())
        || instances.is_ok_and(|instances| !instances.is_empty())
}

/// A text is refused in a few printable words, or it is a span that reads back from how it is shown and reaches
/// somewhere from any moment.
fn span(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    if let Err(error) = parse_duration(text) {
        is_printable(&error.to_string());
    }
    let span = match text.parse::<Span>() {
        Ok(span) => span,
        Err(error) => {
            is_printable(&error.to_string());
            return false;
        }
    };
    assert_eq!(span.to_string().parse().as_ref(), Ok(&span), "{text:?}");
    for zone in zones() {
        for moment in [Timestamp::MIN, Timestamp::UNIX_EPOCH, Timestamp::MAX] {
            let _ = span.after(moment, &zone);
        }
    }
    true
}

/// A line is refused in a few printable words, or it is due again and again, each time later, and nothing is due between.
fn cron(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    let schedule = match text.parse::<Schedule>() {
        Ok(schedule) => schedule,
        Err(error) => {
            is_printable(&error.to_string());
            return false;
        }
    };
    let again: Schedule = schedule.as_str().parse().unwrap();
    assert_eq!(again.as_str(), schedule.as_str());
    for zone in zones() {
        // Before the clocks change in both zones, and at the ends of the calendar.
        for moment in ["2027-03-27T23:00:00Z".parse().unwrap(), Timestamp::MIN, Timestamp::MAX] {
            let Some(next) = schedule.next_after(moment, &zone) else { continue };
            assert!(next > moment, "{text:?}: {next}");
            assert_eq!(again.next_after(moment, &zone), Some(next), "{text:?}");
            assert_eq!(schedule.last_until(next, moment, &zone), Some(next), "{text:?} after {moment}");
            let after = schedule.next_after(next, &zone);
            assert!(after.is_none_or(|after| after > next), "{text:?}: {after:?} after {next}");
        }
    }
    let gap = schedule.longest_gap(Timestamp::UNIX_EPOCH, &TimeZone::UTC);
    assert!(gap.is_none_or(|gap| gap.is_positive()), "{text:?}: {gap:?}");
    true
}

/// A configuration is refused with a place, in printable lines of bounded number, or it is read.
fn configuration(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    match config::parse(text, "x.toml", None) {
        Ok(config) => {
            let archives = config::check_archive_folders(&config, &MemoryDisk::new());
            archives.unwrap_or_else(|error| is_printable(&error.to_string()));
            true
        }
        Err(diagnostics) => {
            are_printable_lines(&diagnostics.to_string());
            false
        }
    }
}

/// The file that says who may use the port is refused with a place, in printable lines, or it is read; its secrets are not
/// shown.
fn web(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else { return false };
    match config::web::parse(text, "web.yml", Path::new("/etc")) {
        Ok(settings) => {
            let shown = format!("{settings:?}");
            for hash in settings.users.values() {
                assert!(!shown.contains(hash.as_str()), "{shown}");
            }
            true
        }
        Err(diagnostics) => {
            let shown = diagnostics.to_string();
            are_printable_lines(&shown);
            assert!(shown.starts_with("web.yml:"), "{shown}");
            // Behind a key, that is: what stands in the place of a key is shown.
            let is_value = |line: &str| line.split_once("$2y$").is_none_or(|(key, _)| key.contains(':'));
            let is_flat = !text.contains(['{', '[', ',', '?']);
            if is_flat && text.lines().all(is_value) {
                assert!(!shown.contains("$2y$"), "{shown}");
            }
            false
        }
    }
}

/// A manifest is refused, or what was read is written so that it reads back as the same.
fn manifest(bytes: &[u8]) -> bool {
    // What only a restore needs makes no copy unreadable.
    let _ = BuildFacts::of(bytes);
    let Ok(read) = Manifest::from_bytes(bytes) else { return false };
    for written in [None, Some(Written::over(bytes))] {
        let written = Manifest { written, ..read.clone() }.to_bytes();
        assert_eq!(Manifest::from_bytes(&written).unwrap(), read);
    }
    true
}

/// An archive whose marker and one manifest are these bytes is read; a copy in it is the one that its file's name says; the
/// rest is a problem in bounded words.
fn archive(bytes: &[u8]) -> bool {
    let disk = MemoryDisk::new();
    write(&disk, &image_path().with_extension("json"), bytes);
    write(&disk, &image_path(), b"an image");
    write(&disk, &Path::new(VAULT).join(MARKER_FILE), bytes);
    block_on(async {
        let archive = vault(&disk);
        let catalogue = archive.catalogue().await.unwrap();
        for problem in catalogue.problems() {
            is_bounded(&problem.describe());
        }
        let marker_is_read = match catalogue.marker() {
            Ok(marker) => {
                let marker = marker.as_ref().unwrap();
                archive.write_marker(marker).await.unwrap();
                assert_eq!(archive.marker().await.unwrap().as_ref(), Ok(&Some(marker.clone())));
                true
            }
            Err(problem) => {
                assert!(!matches!(problem, MarkerProblem::Unreadable(_)));
                is_bounded(&problem.to_string());
                false
            }
        };
        for copy in catalogue.copies() {
            let found = &copy.manifest;
            assert_eq!(found.zone.as_str(), ZONE);
            assert_eq!(found.instance.id.to_string(), INSTANCE);
            assert_eq!(found.snapshot.id.to_string(), SNAPSHOT);
        }
        marker_is_read || !catalogue.copies().is_empty()
    })
}

/// Whatever the journal of a download says, and whatever is in the file beside it, the copy that is stored in the end is the
/// image.
fn journal(bytes: &[u8]) -> bool {
    let image: Bytes = [&include_bytes!("seeds/qcow2/3")[..], PADDING].concat().into();
    // It may vouch for half of the image, or for other bytes of the same length.
    let half = image.len() / 2;
    let mut is_resumed = false;
    for part in [image[..half].to_vec(), vec![7; half]] {
        let disk = MemoryDisk::new();
        write(&disk, &image_path().with_extension("qcow2.part"), &part);
        write(&disk, &image_path().with_extension("qcow2.part.json"), bytes);
        let source = FixedImage { image: image.clone(), first: OnceLock::new() };
        block_on(async {
            let (clock, archive) = (clock(), vault(&disk));
            let hashers = Hashers::default();
            let download = Download {
                source: &source,
                clock: &clock,
                randomness: &SeededRandomness::new(1),
                stall_timeout: Duration::from_secs(1),
                connections: 1,
                hashers: &hashers,
                throttle: None,
                progress: &|_| {},
            };
            let wanted = to_store();
            let Begin::Missing(output) = archive.begin(&wanted).await.unwrap() else {
                panic!("there is no copy yet");
            };
            for (_, stored) in store(&wanted, vec![output], &download).await {
                stored.unwrap_or_else(|error| panic!("{}", chain(&error)));
            }
            assert_eq!(archive.catalogue().await.unwrap().copies().len(), 1);
        });
        let stored = snapwarden::disk::read_file(&disk, &image_path(), 1 << 30).unwrap();
        assert!(stored == image, "other bytes are stored");
        is_resumed |= source.first.get().is_some_and(|offset| *offset > 0);
    }
    is_resumed
}

/// Every state file that is these bytes is read, or refused with its path in bounded words. What was read is written so that it
/// reads back as the same, and a line that is added to the log can be read.
fn state(bytes: &[u8]) -> bool {
    const FILES: [&str; 11] = [
        "allowances.json",
        "archives.json",
        "controls.json",
        "daemon.json",
        "holds.json",
        "notifications.json",
        "policy-p.json",
        "policy-p.1.jsonl",
        "runs-p.json",
        "schedules.json",
        "shard.json",
    ];
    let (disk, folder) = (MemoryDisk::new(), Path::new("/state"));
    for name in FILES.into_iter().chain(["audit.jsonl", "audit-2026-10.jsonl"]) {
        write(&disk, &folder.join(name), bytes);
    }
    block_on(async {
        let state = StateDirectory::open(Arc::new(disk.clone()), folder).unwrap();
        let policy = "p".parse().unwrap();
        let mut is_read = false;
        is_read |= of_state(state.controls().await).is_some();
        is_read |= of_state(state.holds().await).is_some();
        is_read |= of_state(state.archives().await).is_some();
        is_read |= of_state(state.daemon_address().await).is_some();
        is_read |= of_state(state.sent_notifications().await).is_some();
        is_read |= of_state(state.all_policy_states().await).is_some();
        is_read |= of_state(state.created_snapshots().await).is_some();
        is_read |= of_state(state.all_last_runs().await).is_some();
        of_state(state.clone().in_shard(None).map(drop));
        if let Some(read) = of_state(state.schedules().await) {
            state.set_schedules(read.clone()).await.unwrap();
            assert_eq!(state.schedules().await.unwrap(), read);
            is_read = true;
        }
        if let Some(read) = of_state(state.last_runs(&policy).await) {
            state.set_last_runs(&policy, read.clone()).await.unwrap();
            assert_eq!(state.last_runs(&policy).await.unwrap(), read);
            is_read = true;
        }
        if let Some(mut read) = of_state(state.policy_state(&policy).await) {
            let mut after = read.clone();
            after.created.clear();
            state.set_policy_state(&policy, &mut read, after.clone()).await.unwrap();
            assert_eq!(state.policy_state(&policy).await.unwrap().promotions, after.promotions);
            is_read = true;
        }

        let zone: ZoneName = ZONE.parse().unwrap();
        let before = of_state(state.history(10, |_| true).await);
        of_state(state.deleted_since(&zone, AuditMark::default()).await);
        of_state(state.has_export_to(&"vault".parse().unwrap()).await);
        of_state(state.known_in_history(Kind::Instance, "web-1").await);
        of_state(state.listed_zone(&zone).await);
        of_state(state.taken_and_deleted_since(&zone, AuditMark::default()).await);
        let checked = of_state(state.verify_audit_log().await);
        of_state(state.remove_old_audit(&clock(), &"1d".parse().unwrap()).await);
        state.audit(&clock(), line()).await.unwrap();
        // What is added keeps the chain, however the log looks.
        let breaks = checked.map(|report| report.breaks.len());
        let again = state.verify_audit_log().await.unwrap();
        assert!(breaks.is_none_or(|breaks| again.breaks.len() <= breaks + 1), "{again:?}");
        let after = state.history(usize::MAX, |_| true).await.unwrap();
        let is_ours = |run: Option<Uuid>| run == Some(Uuid::nil());
        assert!(after.changes.iter().any(|change| is_ours(change.run_id)), "{after:?}");
        is_read || before.is_some_and(|history| !history.changes.is_empty())
    })
}

/// Every response of the API with this body is read, or refused in bounded words, in which no address of an image is.
fn api(bytes: &[u8]) -> bool {
    let mut is_read = false;
    for status in [StatusCode::OK, StatusCode::CONFLICT] {
        is_read |= block_on(async {
            let client = Client::new(
                Settings {
                    endpoint: "https://api-{zone}.exoscale.com/v2".to_owned(),
                    request_timeout: Duration::from_secs(1),
                    poll_interval: Duration::from_secs(1),
                    operation_timeout: Duration::from_secs(3),
                    requests_per_second: NonZeroU32::new(1000).unwrap(),
                    shards: NonZeroU32::MIN,
                    concurrency: NonZeroUsize::MIN,
                },
                Some(key()),
                Arc::new(Fixed { status, body: Bytes::copy_from_slice(bytes) }),
                Arc::new(clock()),
                Arc::new(SeededRandomness::new(1)),
            )
            .trying_once(Duration::from_secs(1));
            let zone = client.zone(&ZONE.parse().unwrap());
            let (instance, snapshot) = (INSTANCE.parse().unwrap(), SNAPSHOT.parse().unwrap());
            let template = SNAPSHOT.parse().unwrap();
            let mut is_read = false;
            is_read |= told(zone.list_snapshots().await).is_some();
            is_read |= told(zone.list_instances().await).is_some();
            is_read |= told(zone.get_instance(instance).await).is_some();
            is_read |= told(zone.get_instance_type(Uuid::nil()).await).is_some();
            is_read |= told(zone.list_templates().await).is_some();
            is_read |= told(zone.get_template(template).await).is_some();
            is_read |= told(zone.list_quotas().await).is_some();
            is_read |= told(zone.get_quota("snapshot").await).is_some();
            is_read |= told(zone.create_snapshot(instance).await).is_some();
            is_read |= told(zone.export_snapshot(snapshot).await).is_some();
            is_read |= told(zone.delete_snapshot(snapshot).await).is_some();
            is_read |= told(zone.promote_snapshot(snapshot, &PromoteRequest::default()).await).is_some();
            if let Some((zones, _)) = told(client.list_zones(&ZONE.parse().unwrap()).await) {
                assert!(zones.iter().all(|zone| zone.name.as_str().parse::<ZoneName>().is_ok()));
                is_read = true;
            }
            if let Some(Some(details)) = told(zone.get_snapshot(snapshot).await) {
                let shown = format!("{details:?}");
                let secret = details.export.as_ref().map(|export| export.presigned_url.expose_secret());
                // A short one may stand there by chance.
                assert!(secret.is_none_or(|url| url.len() < 20 || !shown.contains(url)), "{shown}");
                is_read = true;
            }
            is_read
        });
    }
    is_read
}

/// A bucket whose every response has this body is read, or refused in bounded words.
fn s3(bytes: &[u8]) -> bool {
    block_on(async {
        let archive = Archive::S3(S3Archive::new(
            "bucket".parse().unwrap(),
            S3Location {
                endpoint: "https://sos-ch-gva-2.exo.io".parse().unwrap(),
                region: ZONE.to_owned(),
                bucket: "backups".to_owned(),
                prefix: "a/".to_owned(),
                rules: BucketRules::default(),
            },
            key(),
            Arc::new(Fixed { status: StatusCode::OK, body: Bytes::copy_from_slice(bytes) }),
            Arc::new(clock()),
            Arc::new(SeededRandomness::new(1)),
        ));
        let mut is_read = reads(&archive).await;
        is_read |= told(archive.leftovers().await).is_some();
        is_read
    })
}

/// A repository whose every listing and file is this output of restic is read, or refused in bounded words.
fn restic(bytes: &[u8]) -> bool {
    block_on(async {
        let clock: Arc<dyn Clock> = Arc::new(clock());
        let processes = SimProcesses::new(Arc::clone(&clock));
        processes.install("restic", SimProgram { stdout: bytes.to_vec(), ..SimProgram::default() });
        let archive = Archive::Restic(ResticArchive::new(
            "repository".parse().unwrap(),
            ResticSettings {
                repository: "/repository".into(),
                password_file: "/password".into(),
                program: "restic".to_owned(),
                cache: "/cache".into(),
                locks: "/locks".into(),
                environment: BTreeMap::new(),
                host: "backup-1".into(),
            },
            Arc::new(processes),
            Arc::new(MemoryDisk::new()),
            clock,
        ));
        reads(&archive).await
    })
}

/// The head of a part is refused, or the part lies in the whole.
fn range(bytes: &[u8]) -> bool {
    let Ok(value) = HeaderValue::from_bytes(bytes) else { return false };
    let headers = HeaderMap::from_iter([
        (header::CONTENT_RANGE, value.clone()),
        (header::CONTENT_LENGTH, value.clone()),
        (header::ETAG, value),
    ]);
    let whole = ImageStream::from_response(StatusCode::OK, &headers, Box::pin(stream::empty())).ok().unwrap();
    assert_eq!((whole.offset, whole.is_part), (0, false));
    let part = ImageStream::from_response(StatusCode::PARTIAL_CONTENT, &headers, Box::pin(stream::empty()));
    match part {
        Ok(part) => {
            assert!(part.is_part && part.total.is_none_or(|total| part.offset < total));
            true
        }
        Err(error) => {
            is_bounded(&chain(&error));
            false
        }
    }
}

/// Room for the tables that a header names.
const PADDING: &[u8] = &[0; 16 << 10];

/// An image is judged alike in whatever pieces it arrives.
fn qcow2(bytes: &[u8]) -> bool {
    let judged = |piece: usize| {
        let mut checker = Checker::default();
        bytes.chunks(piece).chain(PADDING.chunks(piece)).for_each(|piece| checker.update(piece));
        checker.finish().map_err(|error| error.to_string())
    };
    let found = judged(64 << 10);
    for piece in [1, 513] {
        assert_eq!(judged(piece), found);
    }
    match found {
        Ok(found) => {
            assert!((2..=3).contains(&found.version) && found.virtual_size_bytes > 0);
            true
        }
        Err(error) => {
            is_printable(&error);
            false
        }
    }
}

/// A request to the port is answered by HTTP, or by nothing; what it says is not repeated as HTML; and the port still works.
fn port(bytes: &[u8]) -> bool {
    static PORT: OnceLock<(Runtime, SocketAddr)> = OnceLock::new();
    let (runtime, address) = PORT.get_or_init(|| {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(server::bind(([127, 0, 0, 1], 0).into())).unwrap();
        let address = listener.local_addr().unwrap();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::start());
        let telemetry = Telemetry::new(Arc::clone(&clock), "1.2.3", "abc");
        let access = Arc::new(PortAccess::new(None, &SeededRandomness::new(1)));
        runtime.spawn(server::serve(listener, telemetry, access, clock, CancellationToken::new()));
        (runtime, address)
    });
    let ask = async |request: &[u8]| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // Whoever is refused early may not be heard to the end.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        answer
    };
    runtime.block_on(async {
        // What does not end a head would be waited for.
        let answer = ask(&[bytes, b"\r\n\r\nX\r\n\r\n"].concat()).await;
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1."), "{answer}");
        assert!(answer.len() < 1 << 20 && !answer.contains("<x-canary"), "{answer}");
        let status = answer.split(' ').nth(1).unwrap_or_default();
        let known = ["", "200", "400", "403", "404", "405", "414", "421", "431", "503"];
        assert!(known.contains(&status), "{answer}");
        let probe = ask(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert!(probe.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&probe));
        status == "200"
    })
}

/// What is read of an archive; an error is told in bounded words.
async fn reads(archive: &Archive) -> bool {
    let mut is_read = false;
    if let Some(catalogue) = told(archive.catalogue().await) {
        catalogue.problems().iter().for_each(|problem| is_bounded(&problem.describe()));
        for copy in catalogue.copies() {
            told(archive.has(copy).await);
        }
        is_read = true;
    }
    if let Some(marker) = told(archive.marker().await) {
        is_read |= matches!(marker, Ok(Some(_)));
        if let Err(problem) = marker {
            is_bounded(&problem.to_string());
        }
    }
    is_read
}

/// What was read; an error is told in bounded words.
fn told<T>(result: Result<T, impl Error + 'static>) -> Option<T> {
    result.map_err(|error| is_bounded(&chain(&error))).ok()
}

/// The same of a state file, whose error names the file.
fn of_state<T>(result: Result<T, StateError>) -> Option<T> {
    told(result.inspect_err(|error| assert!(error.to_string().contains("/state"), "{error}")))
}

fn is_printable(error: &str) {
    assert!(!error.is_empty() && error.len() < 2000, "{error}");
    assert!(!error.chars().any(char::is_control), "{error:?}");
}

/// Control characters are escaped where an error is shown.
fn is_bounded(error: &str) {
    is_printable(&printable(error));
}

fn are_printable_lines(errors: &str) {
    assert!(!errors.is_empty() && errors.len() < 100_000, "{errors}");
    assert!(!errors.chars().any(|one| one != '\n' && one.is_control()), "{errors:?}");
}

fn zones() -> [TimeZone; 2] {
    [TimeZone::UTC, TimeZone::get("Australia/Lord_Howe").unwrap()]
}

const VAULT: &str = "/vault";

fn image_path() -> PathBuf {
    Path::new(VAULT).join(ZONE).join(INSTANCE).join(format!("20261101T023000Z-{SNAPSHOT}.qcow2"))
}

fn vault(disk: &MemoryDisk) -> Archive {
    let (name, disk) = ("vault".parse().unwrap(), Arc::new(disk.clone()));
    Archive::Local(LocalArchive::new(name, VAULT.into(), disk, Arc::new(clock())))
}

fn write(disk: &MemoryDisk, path: &Path, bytes: &[u8]) {
    disk.create_dir_all(path.parent().unwrap(), Access::Owner).unwrap();
    replace_file(disk, path, bytes, Access::Owner).unwrap();
}

fn to_store() -> ImageToStore {
    let snapshot = Snapshot {
        id: SNAPSHOT.parse().unwrap(),
        name: "nightly".into(),
        created_at: "2026-11-01T02:30:00Z".parse().unwrap(),
        state: SnapshotState::from("exported"),
        size_gib: Some(10),
        instance_id: Some(INSTANCE.parse().unwrap()),
        application_consistent: None,
    };
    ImageToStore {
        zone: ZONE.parse().unwrap(),
        snapshot,
        instance: None,
        policy: None,
        run_id: Uuid::nil(),
        template: None,
        machine: None,
        user_data_in: BTreeSet::new(),
        missing: Vec::new(),
    }
}

/// A line of the audit log.
fn line() -> Line {
    let wanted = to_store();
    let step = StepFacts::new(Action::Delete, &wanted.zone, Subject::of(&wanted.snapshot, None), Vec::new());
    Line {
        at: NOW.parse().unwrap(),
        outcome: "done",
        policy: None,
        run_id: Uuid::nil(),
        zone: wanted.zone,
        step,
        operation_id: None,
        message: None,
        by: None,
    }
}

fn key() -> Credentials {
    Credentials::new("EXO1", "a-secret-that-is-not-shown", None).unwrap()
}

fn clock() -> SimClock {
    SimClock::starting_at(NOW.parse().unwrap())
}

/// Runs it in no time, whatever it waits for.
fn block_on<T>(work: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: Runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    }
    RUNTIME.with(|runtime| runtime.block_on(work))
}

/// Answers every request alike.
#[derive(Debug)]
struct Fixed {
    status: StatusCode,
    body: Bytes,
}

impl Transport for Fixed {
    fn send(&self, _request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        let body = self.body.clone();
        let headers = HeaderMap::from_iter([
            (header::CONTENT_LENGTH, HeaderValue::from(body.len())),
            (header::ETAG, HeaderValue::from_static("\"e-1\"")),
        ]);
        let body = Box::pin(stream::once(ready(Ok(body))));
        Box::pin(ready(Ok(Response { status: self.status, headers, body })))
    }
}

/// An image at an address, and where it was first asked for.
struct FixedImage {
    image: Bytes,
    first: OnceLock<u64>,
}

impl ImageSource for FixedImage {
    fn md5(&self) -> Option<String> {
        let mut md5 = Md5::new();
        md5.update(&self.image);
        Some(md5.finish().to_string())
    }

    fn open<'a>(
        &'a self,
        offset: u64,
        _until: Option<u64>,
        _etag: Option<&'a str>,
    ) -> BoxFuture<'a, Result<ImageStream, SourceError>> {
        self.first.get_or_init(|| offset);
        let total = self.image.len();
        let from = usize::try_from(offset).unwrap().min(total);
        let body = Box::pin(stream::once(ready(Ok(self.image.slice(from..)))));
        let stream = ImageStream {
            offset: from as u64,
            is_part: from > 0,
            total: Some(total as u64),
            etag: Some("\"e-1\"".to_owned()),
            body,
        };
        Box::pin(ready(Ok(stream)))
    }
}

fn written(listed: &ListedSnapshots) -> Value {
    let snapshots = listed.snapshots.iter().map(|snapshot| {
        let instance = snapshot.instance_id.and_then(|id| listed.mentioned.iter().find(|one| one.id == id));
        json!({
            "id": snapshot.id, "name": snapshot.name, "created-at": snapshot.created_at,
            "state": snapshot.state.as_str(), "size": snapshot.size_gib, "instance": instance.map(whole),
            "application-consistent": snapshot.application_consistent,
        })
    });
    json!({ "snapshots": snapshots.collect::<Vec<_>>() })
}

fn whole(instance: &Instance) -> Value {
    let template = instance.template_id.map(|id| json!({ "id": id }));
    json!({ "id": instance.id, "name": instance.name, "labels": instance.labels, "template": template })
}
