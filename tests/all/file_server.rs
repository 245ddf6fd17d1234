//! Images from a real file server: nginx, with TLS and ranges, between the zone and the program itself.
//!
//! It is run where nginx and openssl are installed; elsewhere the tests say that they were skipped.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use snapwarden::clock::{Clock as _, SystemClock};
use snapwarden::disk::{Access, Disk as _, Open, RealDisk, replace_file};
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::http_server::Served;
use snapwarden::sim::image::DiskShape;
use snapwarden::sim::world::{API_KEY, API_SECRET, World};

use crate::stage::{paths, read, skipped};

/// nginx over a folder, with a certificate that it signed itself.
struct FileServer {
    folder: PathBuf,
    port: u16,
    nginx: Child,
}

impl FileServer {
    fn start(folder: &Path) -> Option<Self> {
        let key = ["-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "certificate.pem"];
        let about = ["-subj", "/CN=images", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"];
        let leaf = ["-addext", "basicConstraints=critical,CA:FALSE"];
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-x509"]).args(key).args(about).args(leaf).current_dir(folder);
        let signed = openssl.stderr(Stdio::null()).status().is_ok_and(|status| status.success());
        if !signed || Command::new("nginx").arg("-v").stderr(Stdio::null()).status().is_err() {
            skipped(format_args!("nginx and openssl are not both installed, so no image came over TLS"));
            return None;
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
        let shown = folder.display();
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {shown}/{kind};"))
            .join("\n");
        let text = format!(
            "daemon off; {user} pid {shown}/pid; error_log {shown}/errors; events {{}}
             http {{
                 {temporary}
                 log_format ranges '$status $http_range';
                 access_log {shown}/access ranges;
                 server {{
                     listen 127.0.0.1:{port} ssl;
                     ssl_certificate {shown}/certificate.pem;
                     ssl_certificate_key {shown}/key.pem;
                     root {shown};
                     location /slow/ {{ alias {shown}/; limit_rate 16m; }}
                 }}
             }}"
        );
        write(&folder.join("nginx.conf"), text.as_bytes());
        let server = Self { folder: folder.to_owned(), port, nginx: nginx(folder) };
        server.listens();
        Some(server)
    }

    /// It stops in the middle of its work, and starts again.
    fn restart(&mut self) {
        self.stop();
        self.nginx = nginx(&self.folder);
        self.listens();
    }

    fn listens(&self) {
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        until("nginx listens", || TcpStream::connect(address).is_ok());
    }

    fn stop(&mut self) {
        // The master stops its workers, which a killed one could not.
        let pid = i32::try_from(self.nginx.id()).ok().and_then(rustix::process::Pid::from_raw).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.nginx.wait();
    }

    /// The status and the range of each request.
    fn requests(&self) -> Vec<String> {
        read(&self.folder.join("access")).lines().map(str::to_owned).collect()
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn nginx(folder: &Path) -> Child {
    let mut nginx = Command::new("nginx");
    nginx.arg("-p").arg(folder).arg("-c").arg(folder.join("nginx.conf"));
    // It holds no pipe of ours open.
    nginx.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until something is so.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let clock = SystemClock::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    while !is_so() {
        assert!(clock.elapsed() < Duration::from_mins(1), "it never came about that {what}");
        runtime.block_on(async { clock.sleep(Duration::from_millis(5)).await });
    }
}

fn write(path: &Path, bytes: &[u8]) {
    replace_file(&RealDisk, path, bytes, Access::Owner).unwrap();
}

/// A zone whose one image, of this many MiB, is at this address of the file server.
struct Ground {
    server: FileServer,
    folder: tempfile::TempDir,
    md5: String,
    zone: Served,
    _runtime: tokio::runtime::Runtime,
}

impl Ground {
    fn new(mib: u64, path: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let server = FileServer::start(folder.path())?;
        let world = World::new(Arc::new(SystemClock::start()), 3);
        let zone = world.add_zone("ch-gva-2");
        world.set_operations_take(Duration::from_millis(10));
        let instance = world.add_instance(&zone, "big-1", &[]);
        world.set_disk(instance, DiskShape::with_data_mib(mib));
        let snapshot = world.add_snapshot(instance, world.now());
        let image = world.image(snapshot);
        let file = RealDisk.open(&folder.path().join("image"), Open::CreateNew, Access::Group).unwrap();
        let mut at = 0;
        for chunk in image.chunks(0..image.file_bytes()) {
            file.write_all_at(&chunk, at).unwrap();
            at += chunk.len() as u64;
        }
        let address = format!("https://127.0.0.1:{}/{path}image", server.port);
        world
            .fault(Fault::on(Call::GetSnapshot, Effect::Edit("/export/presigned-url", Some(address.into()))));
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let served_zone = runtime.block_on(world.serve(([127, 0, 0, 1], 0).into())).unwrap();
        Some(Self { md5: image.md5().to_owned(), folder, server, zone: served_zone, _runtime: runtime })
    }

    /// A run, over this many connections.
    fn once(&self, connections: u32) -> Child {
        let text = format!(
            r#"
            [exoscale]
            endpoint = "{endpoint}"
            poll_interval = "20ms"
            [state]
            directory = "{folder}/state"
            [archives.vault]
            type = "local"
            path = "{folder}/vault"
            [policies.p]
            zones = ["ch-gva-2"]
            [policies.p.export]
            archives = ["vault"]
            connections = {connections}
            "#,
            endpoint = self.zone.endpoint(),
            folder = self.folder.path().display(),
        );
        let path = self.folder.path().join("snapwarden.toml");
        write(&path, text.as_bytes());
        Command::new(env!("CARGO_BIN_EXE_snapwarden"))
            .arg("--config")
            .arg(path)
            .arg("once")
            .env("EXOSCALE_API_KEY", API_KEY)
            .env("EXOSCALE_API_SECRET", API_SECRET)
            .env("SSL_CERT_FILE", self.folder.path().join("certificate.pem"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// The one file of the archive whose name ends so.
    fn archived(&self, end: &str) -> Option<PathBuf> {
        let vault = self.folder.path().join("vault");
        paths(&vault).into_iter().find(|path| path.to_str().unwrap().ends_with(end))
    }

    /// It ended well, and what is in the archive is the image.
    fn ends_well(&self, run: Child) {
        let output = run.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stdout));
        let manifest: Value = serde_json::from_str(&read(&self.archived(".json").unwrap())).unwrap();
        assert_eq!(manifest["image"]["md5"], self.md5);
        let image = self.archived(".qcow2").unwrap();
        let sum = Command::new("md5sum").arg(&image).output().unwrap();
        assert!(sum.stdout.starts_with(self.md5.as_bytes()), "{sum:?}");
    }
}

#[test]
fn an_image_comes_over_tls_in_one_piece_or_in_ranges() {
    for connections in [1, 3] {
        let Some(ground) = Ground::new(40, "") else { return };
        ground.ends_well(ground.once(connections));
        let requests = ground.server.requests();
        let ranges: Vec<_> =
            requests.iter().filter_map(|request| request.strip_prefix("206 bytes=")).collect();
        if connections == 1 {
            assert_eq!(requests, ["200 -"]);
        } else {
            // 40 MiB and the tables, in pieces of 8 MiB.
            assert_eq!((ranges.len(), requests.len()), (6, 6), "{requests:?}");
            assert!(ranges.contains(&"8388608-16777215"), "{requests:?}");
        }
    }
}

#[test]
fn a_file_server_that_goes_away_and_comes_back_is_asked_for_the_rest() {
    let Some(mut ground) = Ground::new(24, "slow/") else { return };
    let run = ground.once(1);
    let mib = |part: PathBuf| part.metadata().map_or(0, |file| file.len() >> 20);
    until("some of the image came", || ground.archived(".part").is_some_and(|part| mib(part) >= 4));
    ground.server.restart();
    ground.ends_well(run);
    let requests = ground.server.requests();
    let from = requests.last().and_then(|last| last.strip_prefix("206 bytes="));
    let from: u64 = from.and_then(|from| from.strip_suffix('-')).unwrap().parse().unwrap();
    assert!(from >= 4 << 20, "{requests:?}");
}
