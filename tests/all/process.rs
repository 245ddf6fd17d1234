//! The daemon as a process, where things are not as they should be: what keeps it from starting, what it is told while
//! it runs, and how it ends. The zone is a simulated one behind a socket; the clock, the disk and the network are real.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};
use rustix::process::{Pid, Signal, kill_process};
use snapwarden::clock::{Clock as _, SystemClock, timeout};
use snapwarden::disk::{Access, Disk as _, RealDisk, create_folders, replace_file};
use snapwarden::sim::call::Call;
use snapwarden::sim::http_server::Served;
use snapwarden::sim::image::DiskShape;
use snapwarden::sim::world::{API_KEY, API_SECRET, World};
use tokio::sync::mpsc;

use crate::command_line::secrets;
use crate::stage::{Said, files, read, skipped};

/// A process that takes longer hangs.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// A policy whose schedule lets the test be.
pub(crate) const YEARLY: &str = "[policies.p]\nschedule = \"@yearly\"\nzones = [\"ch-gva-2\"]\n\
                      [policies.p.retention]\nkeep_last = 2\n";

/// Runs as soon as the daemon is there, and then lets the test be: takes, exports and deletes a snapshot.
pub(crate) const AT_ONCE: &str = r#"
[policies.p]
schedule = "@hourly"
on_start = "now"
zones = ["ch-gva-2"]
create = true
[policies.p.select]
ownership = "all"
[policies.p.retention]
keep_last = 3
[policies.p.export]
archives = ["vault"]
"#;

/// A zone behind a socket, and a folder with a configuration that leads there.
pub(crate) struct Ground {
    pub(crate) world: World,
    served: Served,
    folder: tempfile::TempDir,
}

impl Ground {
    /// A zone `ch-gva-2` with one instance of three snapshots, and a configuration with this policy.
    pub(crate) async fn new(policies: &str) -> Self {
        let world = World::new(Arc::new(SystemClock::start()), 3);
        world.set_operations_take(Duration::ZERO);
        let zone = world.add_zone("ch-gva-2");
        let instance = world.add_instance(&zone, "web-1", &[]);
        world.set_disk(instance, DiskShape { size_gib: 10, data_clusters: 4, cluster_bits: 12 });
        for hours in 1..4 {
            world.add_snapshot(instance, world.now() - SignedDuration::from_hours(hours));
        }
        let served = world.serve(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let ground = Self { world, served, folder: tempfile::tempdir().unwrap() };
        ground.configure("127.0.0.1:0", &ground.path("state"), policies);
        ground
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes the configuration: where to listen, where the state is, and the rest.
    pub(crate) fn configure(&self, listen: &str, state: &Path, rest: &str) {
        let text = format!(
            "[exoscale]\nendpoint = \"{}\"\npoll_interval = \"100ms\"\nrequest_timeout = \"1h\"\n\
             [server]\nlisten = \"{listen}\"\nshutdown_grace = \"1s\"\n[state]\ndirectory = \"{}\"\n\
             [archives.vault]\ntype = \"local\"\npath = \"{}\"\n{rest}",
            self.served.endpoint(),
            state.display(),
            self.path("vault").display(),
        );
        self.write("snapwarden.toml", &text);
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        replace_file(&RealDisk, &self.path(name), text.as_bytes(), Access::Owner).unwrap();
    }

    /// The daemon.
    pub(crate) fn run(&self) -> Command {
        self.command("run")
    }

    /// The program, with credentials, and nothing else in its environment.
    pub(crate) fn command(&self, name: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snapwarden"));
        command.env_clear();
        command.args(["--config", self.path("snapwarden.toml").to_str().unwrap(), name]);
        command.env("EXOSCALE_API_KEY", API_KEY).env("EXOSCALE_API_SECRET", API_SECRET);
        command
    }

    /// Waits until the run in flight has asked for its operation another two times.
    async fn polls_again(&self) {
        let polls = || self.world.log().iter().filter(|exchange| exchange.call == Call::GetOperation).count();
        let (clock, before) = (SystemClock::start(), polls());
        while polls() < before + 2 {
            assert!(clock.elapsed() < PATIENCE, "{:?}", self.world.log());
            clock.sleep(Duration::from_millis(20)).await;
        }
    }

    fn state_bytes(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let of_locks = |path: &Path| path.extension().is_some_and(|end| end == "lock");
        files(&self.path("state")).into_iter().filter(|(path, _)| !of_locks(path)).collect()
    }
}

/// A daemon at work, or what is left of it.
pub(crate) struct Running {
    child: Child,
    lines: mpsc::UnboundedReceiver<String>,
    /// All that was read of its log.
    pub(crate) said: Vec<String>,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (send, lines) = mpsc::unbounded_channel();
        let log = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                // Nobody listens after the test.
                let _ = send.send(line);
            }
        });
        Self { child, lines, said: Vec::new() }
    }

    /// Started, and ready.
    pub(crate) async fn ready(ground: &Ground) -> Self {
        let mut running = Self::start(ground.run());
        running.says("listens on").await;
        running
    }

    /// The next line of its log with this word.
    pub(crate) async fn says(&mut self, word: &str) -> String {
        let clock = SystemClock::start();
        loop {
            match timeout(&clock, PATIENCE, self.lines.recv()).await {
                Ok(Some(line)) => {
                    self.said.push(line.clone());
                    if line.contains(word) {
                        return line;
                    }
                }
                Ok(None) => panic!("it ended without a word of `{word}`: {:#?}", self.said),
                Err(late) => panic!("{late} with `{word}`: {:#?}", self.said),
            }
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Its exit status, and the whole log.
    pub(crate) async fn ended(mut self) -> (Option<i32>, String) {
        let clock = SystemClock::start();
        let rest = async {
            while let Some(line) = self.lines.recv().await {
                self.said.push(line);
            }
        };
        timeout(&clock, PATIENCE, rest).await.expect("it does not end");
        (self.child.wait().unwrap().code(), self.said.join("\n"))
    }

    /// The port that it began with.
    pub(crate) fn port(&self) -> SocketAddr {
        let address = self.said.iter().find_map(|line| line.split("listens on ").nth(1)).unwrap();
        address.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// What its port answers, head and body.
    pub(crate) fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.port()).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Whether the last reload went well, and which policies are there.
    pub(crate) fn in_force(&self) -> (bool, Vec<String>) {
        let answer = self.get("/api/v1/status");
        let status: serde_json::Value =
            serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        let policies = status["policies"].as_object().unwrap().keys().cloned().collect();
        (status["config"]["last_reload_successful"].as_bool().unwrap(), policies)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Nothing to do where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What keeps it from starting: makes it so, and gives the command.
type Spoil = Box<dyn Fn(&Ground) -> Command + Send + Sync>;

fn spoiled(spoil: impl Fn(&Ground) + Send + Sync + 'static) -> Spoil {
    Box::new(move |ground| {
        spoil(ground);
        ground.run()
    })
}

fn without_credentials(variables: &'static [(&'static str, &'static str)]) -> Spoil {
    Box::new(|ground| {
        let mut command = ground.run();
        command.env_remove("EXOSCALE_API_KEY").env_remove("EXOSCALE_API_SECRET");
        command.envs(variables.iter().copied());
        command
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_it_from_starting_is_said_before_anything_begins() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let listen = address.clone();
    let mut cases: Vec<(&str, Spoil, i32, Vec<&str>)> = vec![
        (
            "the port is in use",
            spoiled(move |ground| ground.configure(&listen, &ground.path("state"), AT_ONCE)),
            1,
            vec![&address, "another process has", "`listen` in `[server]`"],
        ),
        (
            "the port is another machine's",
            spoiled(|ground| ground.configure("203.0.113.1:9788", &ground.path("state"), AT_ONCE)),
            1,
            vec!["203.0.113.1:9788", "no address of this machine", "`listen` in `[server]`"],
        ),
        (
            "nothing is above the state directory",
            spoiled(|ground| ground.configure("127.0.0.1:0", &ground.path("a/state"), AT_ONCE)),
            1,
            vec!["a/state", "create it", "`[state]`"],
        ),
        (
            "nobody may write the state directory",
            spoiled(|ground| ground.configure("127.0.0.1:0", Path::new("/proc"), AT_ONCE)),
            1,
            vec!["/proc:", "may write", "`[state]`"],
        ),
        (
            "a file has the name of the state directory",
            spoiled(|ground| ground.write("state", "")),
            1,
            vec!["state:", "must be a folder", "`[state]`"],
        ),
        (
            "no credentials",
            without_credentials(&[]),
            78,
            vec!["EXOSCALE_API_KEY", "EXOSCALE_API_KEY_FILE", "credentials_file"],
        ),
        (
            "half of the credentials",
            without_credentials(&[("EXOSCALE_API_KEY", API_KEY)]),
            78,
            vec!["EXOSCALE_API_KEY", "EXOSCALE_API_SECRET"],
        ),
        (
            "credentials that can't be read",
            without_credentials(&[
                ("EXOSCALE_API_KEY_FILE", "/nothing/key"),
                ("EXOSCALE_API_SECRET_FILE", "/nothing/secret"),
            ]),
            78,
            vec!["/nothing/key", "a readable text file"],
        ),
        (
            "no configuration",
            spoiled(|ground| RealDisk.remove_file(&ground.path("snapwarden.toml")).unwrap()),
            78,
            vec!["snapwarden.toml", "--config"],
        ),
        (
            "a configuration with two mistakes",
            spoiled(|ground| ground.write("snapwarden.toml", "nonsense = 1\n[policies.p]\nzones = 7\n")),
            78,
            vec!["snapwarden.toml:1:1", "nonsense", "snapwarden.toml:3:9", "zones"],
        ),
    ];
    for file in ["holds.json", "allowances.json", "schedules.json", "policy-p.json", "runs-p.json"] {
        for (text, word) in
            [("{\"version\":1", "is damaged at line"), ("{\"version\":99}", "later snapwarden")]
        {
            let spoil = spoiled(move |ground| {
                create_folders(&RealDisk, &ground.path("state"), Access::Owner).unwrap();
                ground.write(&format!("state/{file}"), text);
            });
            cases.push(("a state file", spoil, 1, vec![file, word]));
        }
    }
    // Side by side: each is a process of its own, over a zone of its own.
    join_all(cases.into_iter().map(|(name, spoil, status, words)| async move {
        let ground = Ground::new(AT_ONCE).await;
        let command = spoil(&ground);
        let before = ground.state_bytes();
        let (code, said) = Running::start(command).ended().await;
        assert_eq!(code, Some(status), "{name}: {said}");
        for word in words {
            assert!(said.contains(word), "{name}: `{word}` is missing: {said}");
        }
        assert!(said.starts_with("snapwarden: "), "{name}: {said}");
        assert!(ground.world.log().is_empty(), "{name}: something was begun: {:?}", ground.world.log());
        assert_eq!(ground.state_bytes(), before, "{name}");
    }))
    .await;
    drop(taken);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_became_invalid_is_not_taken_over_and_a_valid_one_is() {
    let two = format!("{YEARLY}{}", YEARLY.replace("policies.p", "policies.q"));
    let ground = Ground::new(&two).await;
    let mut daemon = Running::ready(&ground).await;

    ground.configure(
        "127.0.0.1:0",
        &ground.path("state"),
        "[policies.p]\nzones = []\nshedule = \"@daily\"\n",
    );
    daemon.signal(Signal::HUP);
    daemon.says("not reloaded, the configuration from before stays in force").await;
    daemon.says("shedule").await;
    assert_eq!(daemon.in_force(), (false, vec!["p".to_owned(), "q".to_owned()]));
    assert!(daemon.get("/readyz").starts_with("HTTP/1.1 200"), "the old one serves");
    let mut status = Command::new(env!("CARGO_BIN_EXE_snapwarden"));
    status.env_clear().arg("--config").arg(ground.path("snapwarden.toml")).arg("status");
    let said = Said::of(status.output().unwrap());
    assert_eq!(said.status, 1, "{said:?}");
    said.has(&["snapwarden", "p  ", "q  "]);
    let both =
        ["the configuration file is not valid: ", "the configuration could not be reloaded, the previous"];
    said.complained(&both);
    said.complained(&["shedule", "zones"]);

    ground.configure("127.0.0.1:0", &ground.path("state"), YEARLY);
    daemon.signal(Signal::HUP);
    daemon.says("reloaded: 1 policy now").await;
    assert_eq!(daemon.in_force(), (true, vec!["p".to_owned()]));
    assert!(!daemon.get("/metrics").contains("policy=\"q\""));

    daemon.signal(Signal::TERM);
    let (code, said) = daemon.ended().await;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.ends_with("stopped"), "{said}");
    assert!(ground.world.log().is_empty(), "a reload is no reason to run");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reload_of_the_unit_fails_where_the_configuration_is_bad_and_the_old_one_stays() {
    let ground = Ground::new(YEARLY).await;
    let mut daemon = Running::ready(&ground).await;
    let unit = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/snapwarden.service"));
    let pid = daemon.child.id().to_string();
    let reload = || {
        // As systemd does it: one after the other, up to the first that fails.
        unit.lines().filter_map(|line| line.strip_prefix("ExecReload=")).find_map(|line| {
            let line = line
                .replace("/usr/bin/snapwarden", env!("CARGO_BIN_EXE_snapwarden"))
                .replace("$MAINPID", &pid);
            let mut words = line.split(' ');
            let mut command = Command::new(words.next().unwrap());
            command.args(words).env("SNAPWARDEN_CONFIG", ground.path("snapwarden.toml"));
            let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
            status.code().filter(|code| *code != 0)
        })
    };
    ground.configure("127.0.0.1:0", &ground.path("state"), "[policies.q]\nzones = []\n");
    assert_eq!(reload(), Some(78));
    daemon.says("not reloaded").await;
    assert_eq!(daemon.in_force(), (false, vec!["p".to_owned()]));
    ground.configure("127.0.0.1:0", &ground.path("state"), &YEARLY.replace("policies.p", "policies.q"));
    assert_eq!(reload(), None);
    daemon.says("reloaded: 1 policy now").await;
    assert_eq!(daemon.in_force(), (true, vec!["q".to_owned()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_is_not_there_any_more_is_told_of_at_the_next_start() {
    let two = format!("{YEARLY}{}", YEARLY.replace("policies.p", "policies.gone"));
    let ground = Ground::new(&two).await;
    for (policies, is_told) in [(two.as_str(), false), (YEARLY, true)] {
        ground.configure("127.0.0.1:0", &ground.path("state"), policies);
        let daemon = Running::ready(&ground).await;
        daemon.signal(Signal::TERM);
        let (code, said) = daemon.ended().await;
        assert_eq!(code, Some(0), "{said}");
        let told = said.contains("policy gone is not in the configuration any more");
        assert_eq!(told, is_told, "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_on_the_same_state_is_refused() {
    let ground = Ground::new(YEARLY).await;
    let first = Running::ready(&ground).await;
    let (code, said) = Running::start(ground.run()).ended().await;
    assert_eq!(code, Some(1), "{said}");
    for word in ["state directory", "is locked by another process", "daemon.lock"] {
        assert!(said.contains(word), "`{word}` is missing: {said}");
    }
    first.signal(Signal::KILL);
    first.ended().await;
    // A killed one leaves no lock behind.
    Running::ready(&ground).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_s_health_is_that_of_the_loop_and_not_of_the_backups() {
    let ground = Ground::new(AT_ONCE).await;
    let is_live = || {
        let mut status = Command::new(env!("CARGO_BIN_EXE_snapwarden"));
        status.env_clear().arg("--config").arg(ground.path("snapwarden.toml")).args(["status", "--live"]);
        Said::of(status.output().unwrap())
    };
    let said = is_live();
    assert_eq!(said.status, 1, "{said:?}");
    said.complained(&["no daemon answers at ", "daemon.sock"]);

    // The run fails; the second daemon finds the socket of the first, which was killed.
    ground.world.set_operations_take(Duration::from_hours(1));
    for _ in 0..2 {
        let daemon = Running::ready(&ground).await;
        let said = is_live();
        assert_eq!((said.status, said.out.as_str()), (0, ""), "{said:?}");
        daemon.signal(Signal::KILL);
        daemon.ended().await;
        assert_eq!(is_live().status, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_middle_of_a_run_it_ends_within_its_grace_and_told_twice_at_once() {
    for (grace, times, status) in [("1s", 1, 0), ("1h", 2, 1)] {
        let ground = Ground::new(AT_ONCE).await;
        let path = ground.path("snapwarden.toml");
        let text = read(&path).replace("shutdown_grace = \"1s\"", &format!("shutdown_grace = \"{grace}\""));
        ground.write("snapwarden.toml", &text);
        ground.world.set_operations_take(Duration::from_hours(1));
        let mut daemon = Running::ready(&ground).await;
        ground.polls_again().await;
        daemon.signal(Signal::TERM);
        daemon.says("stopping: 1 run in flight may go on").await;
        for _ in 1..times {
            daemon.signal(Signal::TERM);
        }
        let (code, said) = daemon.ended().await;
        assert_eq!(code, Some(status), "{said}");
        assert!(said.contains("no longer waiting for p"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_that_ask_for_nothing_end_neither_the_daemon_nor_a_run() {
    for (name, policies) in [("run", YEARLY), ("run", AT_ONCE), ("once", AT_ONCE)] {
        let ground = Ground::new(policies).await;
        ground.world.set_operations_take(Duration::from_hours(1));
        let mut running = Running::start(ground.command(name));
        if name == "run" {
            running.says("listens on").await;
        }
        if policies == AT_ONCE {
            ground.polls_again().await;
        }
        for signal in [Signal::USR1, Signal::USR2, Signal::PIPE] {
            running.signal(signal);
        }
        if policies == AT_ONCE {
            ground.polls_again().await;
        } else {
            assert!(running.get("/readyz").starts_with("HTTP/1.1 200"));
        }
        assert_eq!(running.child.try_wait().unwrap(), None, "{name}: {:?}", running.said);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_output_nobody_reads_is_completed() {
    let ground = Ground::new(AT_ONCE).await;
    let mut once = ground.command("once");
    let mut child = once.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let deleted = ground.world.log().iter().filter(|exchange| exchange.call == Call::DeleteSnapshot).count();
    assert_eq!(deleted, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_stands_in_anything_that_a_daemon_says_or_writes() {
    for format in ["text", "json"] {
        let ground = Ground::new(AT_ONCE).await;
        let mut command = ground.run();
        command.args(["--log-format", format]);
        command.env("RUST_LOG", "trace,hyper=trace,hyper_util=trace,reqwest=trace,h2=trace,rustls=trace");
        let mut daemon = Running::start(command);
        daemon.says("listens on").await;
        daemon.says("success: ").await;
        assert!(daemon.said.iter().any(|line| line.contains("list-snapshots")), "{format}: it does not talk");
        let mut told = String::new();
        for line in &mut daemon.said {
            // The address, as `get` looks for it, ends where JSON goes on.
            *line = line.replace('"', " ");
        }
        for path in ["/", "/metrics", "/api/v1/status", "/livez", "/readyz", "/nothing"] {
            told.push_str(&daemon.get(path));
        }
        daemon.signal(Signal::TERM);
        let (code, said) = daemon.ended().await;
        assert_eq!(code, Some(0), "{said}");
        told.push_str(&said);
        for (path, bytes) in files(&ground.path("state")).into_iter().chain(files(&ground.path("vault"))) {
            told.push_str(&path.to_string_lossy());
            told.push_str(&String::from_utf8_lossy(&bytes));
        }
        for did in ["export-snapshot", "1 created, 1 exported, 1 deleted"] {
            assert!(told.contains(did), "{format}: `{did}` is missing");
        }
        for secret in secrets(&ground.world) {
            assert!(!told.contains(&secret), "{format}: `{secret}`");
        }
    }
}

/// How much faster than ours the daemon's clock runs below.
const FASTER: i32 = 600;

/// Half past two by a zone's clock, through the clock changes of 2027, and when that is; also the half hours that those
/// changes skip or repeat where half past two is not among them.
const CLOCK_CHANGES: [(&str, &str, &str); 9] = [
    ("Europe/Zurich", "30 2 * * *", "2027-03-28T01:00:00Z"),
    ("Europe/Zurich", "30 2 * * *", "2027-10-31T00:30:00Z"),
    ("America/New_York", "30 2 * * *", "2027-03-14T07:00:00Z"),
    ("America/New_York", "30 2 * * *", "2027-11-07T07:30:00Z"),
    ("America/New_York", "30 1 * * *", "2027-11-07T05:30:00Z"),
    ("Australia/Lord_Howe", "30 2 * * *", "2027-04-03T16:00:00Z"),
    ("Australia/Lord_Howe", "45 1 * * *", "2027-04-03T14:45:00Z"),
    ("Australia/Lord_Howe", "30 2 * * *", "2027-10-02T15:30:00Z"),
    ("Australia/Lord_Howe", "15 2 * * *", "2027-10-02T15:30:00Z"),
];

#[tokio::test(flavor = "multi_thread")]
async fn through_the_clock_changes_of_2027_it_runs_once_at_the_right_moment() {
    let library = format!("/usr/lib/{}-linux-gnu/faketime/libfaketime.so.1", std::env::consts::ARCH);
    if cfg!(target_feature = "crt-static") || RealDisk.metadata(Path::new(&library)).is_err() {
        return skipped(format_args!("a daemon under another clock: there is no {library}"));
    }
    let library = &library;
    join_all(CLOCK_CHANGES.map(|(zone, schedule, expected)| async move {
        let slot: Timestamp = expected.parse().unwrap();
        // Time to start, and then more than an hour: as long as the longest change.
        let from = slot - SignedDuration::from_mins(20);
        let until = slot + SignedDuration::from_mins(70);
        let policy = format!(
            "[policies.p]\nschedule = \"{schedule}\"\ntimezone = \"{zone}\"\nzones = [\"ch-gva-2\"]\n"
        );
        let ground = Ground::new(&policy).await;
        // Behind the daemon's, so that signatures are good; nothing is deleted here, which a skew would hold back.
        ground.world.set_skew(from.duration_since(ground.world.now()));
        let mut command = ground.run();
        command.env("LD_PRELOAD", library).env("TZ", "UTC");
        command.env("FAKETIME", from.strftime(&format!("@%Y-%m-%d %H:%M:%S x{FASTER}")).to_string());
        let mut daemon = Running::start(command);
        daemon.says("listens on").await;
        let told = daemon.says(" p: ").await;
        assert!(told.contains("p: success"), "{zone} {schedule}: {told}");
        let late = moment(&told).duration_since(slot);
        // A few turns of the loop, and the run: less than the shortest of the changes, by which a wrong moment would be off.
        assert!(
            late >= SignedDuration::ZERO && late < SignedDuration::from_mins(30),
            "{zone} {schedule}: {late}"
        );
        let clock = SystemClock::start();
        clock.sleep(until.duration_since(slot).unsigned_abs() / FASTER.unsigned_abs()).await;
        daemon.signal(Signal::TERM);
        let (code, said) = daemon.ended().await;
        assert_eq!(code, Some(0), "{said}");
        let ended = moment(said.lines().last().unwrap());
        assert!(ended > until, "{zone} {schedule}: {said}");
        assert_eq!(said.matches(" p: ").count(), 1, "{zone} {schedule}: {said}");
        let schedules = read(&ground.path("state/schedules.json"));
        assert!(schedules.contains(&format!("\"watermark\": \"{slot}\"")), "{zone} {schedule}: {schedules}");
    }))
    .await;
}

/// When a line of the log was written.
fn moment(line: &str) -> Timestamp {
    line.split_whitespace().next().unwrap().parse().unwrap_or_else(|error| panic!("{error}: {line}"))
}

/// A policy that runs at once, with this script of the shell as one of its hooks.
fn with_hook(ground: &Ground, key: &str, script: &str) -> String {
    let path = ground.path("hook");
    ground.write("hook", &format!("#!/bin/sh\n{script}"));
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    format!("{AT_ONCE}[policies.p.hooks]\n{key} = [\"{}\", \"an argument\"]\n", path.display())
}

#[tokio::test]
async fn the_output_of_a_hook_is_logged_within_limits_and_it_gets_no_key() {
    let ground = Ground::new(YEARLY).await;
    let script = format!(
        "env > {}\nprintf '%s\\033[31m\\n' \"$1\"\nyes x | head -n 5000\nhead -c 100000 /dev/zero\nsleep 5 &\necho; echo the end >&2\nexit 3",
        ground.path("environment").display()
    );
    let policies = with_hook(&ground, "after", &script);
    ground.configure("127.0.0.1:0", &ground.path("state"), &policies);
    let (status, said) = Running::start(ground.command("once")).ended().await;
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("hook `after`: an argument\\u{1b}[31m"), "{said}");
    assert!(said.matches("hook `after`: x").count() >= 190, "{said}");
    assert!(said.contains("lines more, which are not logged") && said.len() < 100_000, "{}", said.len());
    assert!(said.contains("it ended with exit status: 3; its last line is: "), "{said}");
    let environment = read(&ground.path("environment"));
    assert!(
        environment.contains("SNAPWARDEN_RESULT=success") && environment.contains("SNAPWARDEN_CREATED=1")
    );
    assert!(!environment.contains("EXOSCALE") && !environment.contains(API_SECRET), "{environment}");
}

#[tokio::test]
async fn a_stop_ends_a_hook_with_all_that_it_started() {
    let ground = Ground::new(YEARLY).await;
    let script = format!(
        "trap '' TERM\n(trap '' TERM; while :; do sleep 100; done) &\necho $! > {}\necho ready\nwait",
        ground.path("pid").display()
    );
    let policies = with_hook(&ground, "before", &script);
    ground.configure("127.0.0.1:0", &ground.path("state"), &policies);
    let mut daemon = Running::ready(&ground).await;
    daemon.says("hook `before`: ready").await;
    daemon.signal(Signal::TERM);
    let (_, said) = daemon.ended().await;
    let process = PathBuf::from(format!("/proc/{}/cmdline", read(&ground.path("pid")).trim()));
    // Of one that was killed and that nobody has waited for yet, nothing is left but its number.
    let is_there = || snapwarden::disk::read_named_file(&process, 1 << 16).is_ok_and(|line| !line.is_empty());
    let clock = SystemClock::start();
    while is_there() {
        assert!(clock.elapsed() < PATIENCE, "{said}");
        clock.sleep(Duration::from_millis(20)).await;
    }
    assert!(ground.world.changes().is_empty());
}
