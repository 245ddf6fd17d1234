//! `demo`: try the program without an account.
//!
//! A simulated zone with months of history, in this process; a configuration in a temporary folder; and the
//! program itself over both, exactly as it would run with a real account: one run of each policy, or the daemon.
//!
//! The daemon's zone is served on a socket, so that the commands of a second terminal reach it as well. Nothing in the
//! environment may lead any of this to a real account: the deletions of the demo's policies can't be undone.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::archive::catalogue::CopyFilter;
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::Output;
use crate::cli::plan::decisions::Filter;
use crate::cli::plan::table;
use crate::cli::progress::Progress;
use crate::cli::{archive, once, run};
use crate::clock::{Clock, SystemClock};
use crate::config;
use crate::credentials::Credentials;
use crate::daemon::Order;
use crate::disk::{Access, RealDisk, replace_file};
use crate::policy::Policy;
use crate::process::RealProcesses;
use crate::randomness::SystemRandomness;
use crate::run::context::{RunOptions, Runner};
use crate::run::list::ListingCache;
use crate::sim::clock::SimClock;
use crate::sim::image::DiskShape;
use crate::sim::world::{API_KEY, API_SECRET, World};
use crate::snapshot::{InstanceId, SnapshotId, SnapshotState, ZoneName};
use crate::text::printable;

/// Fixed, so that the output has the same ids as in the README.
const SEED: u64 = 20_261_101;

const INTRODUCTION: &str = "\
A simulated Exoscale zone runs in this process: three instances, and the
snapshots that were taken of them for months. None was ever deleted, and none
exists anywhere else: if an instance is deleted, so are its snapshots.
snapwarden takes care of them by the two policies of this configuration:

";

/// The default port.
const USUAL_PORT: u16 = 9788;

/// Slow enough to follow, fast enough not to wait.
const NEW_SNAPSHOT_EVERY: Duration = Duration::from_secs(15);

/// Variables that take precedence over the written configuration, and would lead a command to another account.
const OVERRIDING_VARIABLES: [&str; 6] = [
    config::sections::ENDPOINT_VARIABLE,
    "EXOSCALE_API_KEY",
    "EXOSCALE_API_SECRET",
    "EXOSCALE_API_KEY_FILE",
    "EXOSCALE_API_SECRET_FILE",
    "CREDENTIALS_DIRECTORY",
];

/// How many snapshots of each instance `nightly` keeps.
const NIGHTLY_KEEPS: usize = 12;

/// Runs each policy once and shows what happened and why; or runs the daemon, until Ctrl-C.
///
/// # Errors
/// [`Refusal`] if the temporary folder or the loopback can't be used.
pub async fn demo(once: bool, output: Output, progress: &Progress) -> Result<Exit, Refusal> {
    // Before any folder is created: only this process removes it.
    let mut orders = run::orders_by_signal()?;
    if !once {
        return daemon(output, orders).await;
    }
    tokio::select! {
        exit = one_run_each(output, progress) => exit,
        _ = orders.recv() => Ok(Exit::Failed),
    }
}

async fn one_run_each(output: Output, progress: &Progress) -> Result<Exit, Refusal> {
    let folder = tempfile::tempdir()?;
    let clock = Arc::new(SimClock::starting_at(SystemClock::start().now()));
    let world = World::new(clock.clone(), SEED);
    // Waiting for operations would show nothing.
    world.set_operations_take(Duration::ZERO);
    let zone = populate(&world, [24, 48, 8].map(DiskShape::with_data_mib)).zone;
    let history = world.snapshots(&zone).len();
    let seams = Seams {
        transport: world.transport(),
        disk: Arc::new(RealDisk),
        clock,
        randomness: Arc::new(SystemRandomness),
        processes: Arc::new(RealProcesses::default()),
        host: "demo".into(),
    };
    let text = configuration(folder.path());
    let config = config::parse(&text, "demo.toml", None)?;
    let credentials = Credentials::new(API_KEY, API_SECRET, None)?;
    let mut runner = assemble::runner(&config, credentials, &seams, Use::Changing)?;
    runner.downloads = progress.downloads();

    output.print(INTRODUCTION);
    output.print(&indented(&text));
    let mut exit = Exit::Done;
    for (number, policy) in config.policies.iter().enumerate() {
        output.print(&heading(&format!("{}. What `snapwarden plan {}` says", 2 * number + 1, policy.name)));
        show_plan(&runner, policy, output).await;
        output.print(&heading(&format!("{}. What `snapwarden once {}` does", 2 * number + 2, policy.name)));
        let (ended, reports) =
            once::run_all(&runner, &[policy], &RunOptions::default(), output, progress, None).await;
        exit = exit.worse(ended);
        output.print(&reports.iter().map(|report| once::render(report, output)).collect::<String>());
    }
    output.print(&heading("5. The result"));
    let now = runner.clock.now();
    let all = CopyFilter::default();
    let shown = archive::show(&runner.archives, &runner.archive_rules, &runner.state, &[], &all, now, output);
    exit = exit.worse(shown.await);
    let templates: Vec<String> = world.templates(&zone).into_iter().map(|template| template.name).collect();
    output.print(&format!(
        "\nzone {zone}: {} of {history} snapshots, templates: {}\n\n\
         The configuration, the state and the archive were in a temporary folder, which\n\
         has been deleted. For a first policy of your own see README.md.\n",
        world.snapshots(&zone).len(),
        templates.join(", ")
    ));
    Ok(exit)
}

async fn daemon(output: Output, orders: mpsc::UnboundedReceiver<Order>) -> Result<Exit, Refusal> {
    let folder = tempfile::Builder::new().prefix("snapwarden-demo-").tempdir();
    // Removed when this function ends, also by an error.
    let folder = folder?;
    let clock = Arc::new(SystemClock::start());
    let world = World::new(clock.clone(), SEED);
    // Long enough to be seen, as on a real zone, but short.
    world.set_operations_take(Duration::from_millis(400));
    // Small: all images are written to the temporary folder.
    let history = populate(&world, [DiskShape::default(); 3]);
    world.add_instance(&history.zone, "cache-1", &[]);
    let served = world.serve((Ipv4Addr::LOCALHOST, 0).into()).await?;
    let listen = free_address().await?;

    let config_path = folder.path().join("snapwarden.toml");
    let text = daemon_configuration(folder.path(), &served.endpoint(), listen);
    let credentials = format!("api_key = {API_KEY}\napi_secret = {API_SECRET}\n");
    replace_file(&RealDisk, &folder.path().join("credentials"), credentials.as_bytes(), Access::Owner)
        .and_then(|()| replace_file(&RealDisk, &config_path, text.as_bytes(), Access::Owner))?;

    let program = std::env::current_exe()?;
    let set = |name: &&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let overriding: Vec<&str> = OVERRIDING_VARIABLES.into_iter().filter(set).collect();
    let command = command_line(&program, &config_path, &overriding);
    output.print(&guide(&command, &config_path, listen, next_to_delete(&world, &history)));

    let (send, passed_on) = mpsc::unbounded_channel();
    tokio::select! {
        exit = run_daemon(&config_path, passed_on) => exit,
        () = pass_on(orders, &send) => Ok(Exit::Done),
        () = keep_taking_snapshots(&world, &*clock, [history.web, history.db]) => Ok(Exit::Done),
    }
}

/// The daemon itself, over the written configuration, until Ctrl-C. Neither endpoint nor credentials come from the
/// environment, at the start nor at a reload: what is there may be a real account, whose zone has the same name.
async fn run_daemon(config_path: &Path, orders: mpsc::UnboundedReceiver<Order>) -> Result<Exit, Refusal> {
    let path = config_path.to_owned();
    let read = move || {
        let config = config::load(&path, None)?;
        let credentials = Credentials::new(API_KEY, API_SECRET, None)?;
        Ok((config, credentials))
    };
    run::run_over(read, orders).await
}

/// Passes orders on without end. A closed terminal sends SIGHUP, too, and stops the demo: it could not be stopped from
/// anywhere else.
async fn pass_on(mut orders: mpsc::UnboundedReceiver<Order>, to: &mpsc::UnboundedSender<Order>) {
    let began_on_terminal = io::stdout().is_terminal();
    while let Some(order) = orders.recv().await {
        let is_closed = began_on_terminal && !io::stdout().is_terminal();
        // A daemon that receives no orders any more is about to end.
        let _ = to.send(if is_closed { Order::Stop } else { order });
    }
}

/// Takes snapshots of the instances in turn, as another tool would. Never ends.
async fn keep_taking_snapshots(world: &World, clock: &dyn Clock, instances: [InstanceId; 2]) {
    for instance in instances.into_iter().cycle() {
        clock.sleep(NEW_SNAPSHOT_EVERY).await;
        world.add_snapshot(instance, world.now());
        // Not used here, and it would grow.
        world.clear_log();
    }
}

/// The address for the daemon: with the default port if that is free.
async fn free_address() -> io::Result<SocketAddr> {
    match TcpListener::bind((Ipv4Addr::LOCALHOST, USUAL_PORT)).await {
        Ok(listener) => listener.local_addr(),
        Err(_) => TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?.local_addr(),
    }
}

/// The snapshot that `nightly` deletes as soon as the first instance has a new one.
fn next_to_delete(world: &World, history: &History) -> Option<SnapshotId> {
    let all = world.snapshots(&history.zone);
    let of_web = all.iter().rev().filter(|snapshot| snapshot.instance_id == Some(history.web));
    of_web.map(|snapshot| snapshot.id).nth(NIGHTLY_KEEPS - 1)
}

/// The start of each command for a second terminal.
fn command_line(program: &Path, config_path: &Path, overriding: &[&str]) -> String {
    let mut text = String::new();
    if !overriding.is_empty() {
        text.push_str("env ");
        for name in overriding {
            let _ = write!(text, "-u {name} ");
        }
    }
    let _ = write!(text, "{} --config {}", for_shell(program), for_shell(config_path));
    text
}

/// A path, quoted for a shell where needed.
fn for_shell(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%".contains(c);
    if text.chars().all(plain) { text.into_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

fn guide(
    command: &str,
    config_path: &Path,
    listen: SocketAddr,
    next_to_delete: Option<SnapshotId>,
) -> String {
    let mut commands: Vec<(String, &str)> = [
        ("status", "the state of the daemon"),
        ("plan nightly", "what would be deleted now, and why"),
        ("once nightly", "a run in the foreground, beside the daemon"),
        ("archive list", "the verified copies"),
        ("check --online", "whether the credentials allow everything that the policies need"),
        ("allow nightly 40", "lets up to 40 deletions of the next run pass the guard"),
    ]
    .map(|(arguments, why)| (format!("{command} {arguments}"), why))
    .into();
    if let Some(snapshot) = next_to_delete {
        let hold = format!("{command} hold {snapshot} --reason 'before the upgrade'");
        commands.push((hold, "puts the next one to be deleted on hold"));
        commands.push((format!("{command} holds"), "the snapshots on hold"));
        commands.push((format!("{command} unhold {snapshot}"), "ends the hold"));
    }
    commands.push((format!("curl http://{listen}/metrics"), "for Prometheus"));
    commands.push((format!("curl http://{listen}/api/v1/status"), "for programs"));

    let mut text = format!(
        "\
A simulated Exoscale zone runs in this process, and the daemon over it, on the
real clock. There are four instances, months of snapshots, a new one every {}
seconds, and three policies that run every 20 seconds:

    nightly   exports the newest snapshot of each instance, verifies the copy,
              then keeps the newest {NIGHTLY_KEEPS}
    golden    makes a template of the newest snapshot of web-1, and keeps 4
    fresh     takes snapshots of cache-1 itself, and keeps the newest 5

To look at it from a second terminal:

",
        NEW_SNAPSHOT_EVERY.as_secs()
    );
    for (command, why) in commands {
        let _ = writeln!(text, "    # {why}\n    {}", printable(&command));
    }
    let _ = write!(
        text,
        "
The configuration, to be read and changed; `kill -HUP {}` reloads it:

    {}

Ctrl-C ends the daemon and removes the folder. This is its log:

",
        std::process::id(),
        printable(&config_path.to_string_lossy()),
    );
    text
}

/// The contents of the zone when the demo begins.
struct History {
    zone: ZoneName,
    web: InstanceId,
    db: InstanceId,
}

/// Adds three instances with these disks and months of history, and one snapshot that failed.
fn populate(world: &World, disks: [DiskShape; 3]) -> History {
    let zone = world.add_zone("ch-gva-2");
    let today = world.now().to_zoned_datetime(TimeZone::UTC).date();
    let at = |days: i64| -> Option<Timestamp> {
        let then = today.checked_sub(days.days()).ok()?.at(2, 30, 0, 0);
        TimeZone::UTC.to_timestamp(then).ok()
    };
    let take = |instance: InstanceId, days: &mut dyn Iterator<Item = i64>| {
        days.filter_map(at).map(|at| world.add_snapshot(instance, at)).last()
    };
    let instance = |name: &str, labels: &[(&str, &str)], disk: DiskShape| {
        let instance = world.add_instance(&zone, name, labels);
        world.set_disk(instance, disk);
        instance
    };
    // Until yesterday: early in the day, a snapshot of today would be dated in the future.
    let (web, db) = (instance("web-1", &[("tier", "golden")], disks[0]), instance("db-1", &[], disks[1]));
    take(web, &mut (1..=24).rev());
    take(db, &mut (2..=16).rev());
    if let Some(failed) = take(db, &mut [1].into_iter()) {
        world.set_state(failed, SnapshotState::Error);
    }
    // Weekly, and stopped two months ago: pruning by age alone would leave nothing.
    take(instance("legacy-1", &[], disks[2]), &mut (0..9).rev().map(|week| 60 + 7 * week));
    History { zone, web, db }
}

fn configuration(folder: &Path) -> String {
    format!(
        r#"[state]
directory = "{0}/state"

[archives.vault]                      # where exports go
type = "local"
path = "{0}/vault"

[policies.nightly]                    # prune, never without a verified copy
schedule = "30 2 * * *"
timezone = "Europe/Zurich"
zones = ["ch-gva-2"]
[policies.nightly.retention]
keep_last = 7                         # keep the newest 7 of each instance
keep_within = "14d"                   # and all younger than two weeks
max_age = "400d"
[policies.nightly.export]
archives = ["vault"]                  # each deleted one has a newer copy

[policies.weekly]                     # a golden image each week
schedule = "0 4 * * 0"
zones = ["ch-gva-2"]
[policies.weekly.select]
labels = {{ tier = "golden" }}
[policies.weekly.promote]
name = "{{instance}}-{{created:%Y%m%d}}"
keep = 4
"#,
        folder.display()
    )
}

fn daemon_configuration(folder: &Path, endpoint: &str, listen: SocketAddr) -> String {
    format!(
        r#"[exoscale]
endpoint = "{endpoint}"   # the simulated zone
credentials_file = "{0}/credentials"
poll_interval = "200ms"
requests_per_second = 50

[server]
listen = "{listen}"

[state]
directory = "{0}/state"

[archives.vault]                      # where exports go
type = "local"
path = "{0}/vault"

[policies.nightly]                    # prune, never without a verified copy
schedule = "*/20 * * * * *"           # six fields: seconds first
timezone = "Europe/Zurich"
zones = ["ch-gva-2"]
[policies.nightly.select]
exclude_instances = ["cache-*"]
[policies.nightly.retention]
keep_last = {NIGHTLY_KEEPS}
[policies.nightly.export]
archives = ["vault"]                  # each deleted one has a newer copy

[policies.golden]                     # golden images
schedule = "7,27,47 * * * * *"
zones = ["ch-gva-2"]
[policies.golden.select]
labels = {{ tier = "golden" }}
[policies.golden.promote]
name = "{{instance}}-{{created:%Y%m%d-%H%M%S}}"
keep = 4

[policies.fresh]                      # takes snapshots itself
schedule = "13,33,53 * * * * *"
zones = ["ch-gva-2"]
create = true
[policies.fresh.select]
instances = ["cache-*"]
[policies.fresh.retention]
keep_last = 5
"#,
        folder.display()
    )
}

fn heading(text: &str) -> String {
    format!("\n=== {text}\n\n")
}

fn indented(text: &str) -> String {
    text.lines().map(|line| if line.is_empty() { "\n".to_owned() } else { format!("    {line}\n") }).collect()
}

async fn show_plan(runner: &Runner, policy: &Policy, output: Output) {
    let at = runner.clock.now();
    for (_, planned) in runner.preview(&ListingCache::default(), policy, None).await {
        match &planned {
            Ok(planned) => {
                output.print(&table::render([(&policy.name, planned)], &Filter::default(), at, output));
            }
            Err(failure) => output.complain(failure),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daemon_can_read_its_configuration() {
        let listen = SocketAddr::from(([127, 0, 0, 1], USUAL_PORT));
        let text = daemon_configuration(Path::new("/tmp/x"), "http://127.0.0.1:1/{zone}/v2", listen);
        let config = config::parse(&text, "demo.toml", None).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(config.server.listen, listen);
        let names: Vec<&str> = config.policies.iter().map(|policy| policy.name.as_str()).collect();
        assert_eq!(names, ["nightly", "golden", "fresh"]);
        assert!(config.policies.iter().all(|policy| policy.schedule.is_some()));
        assert!(config.policies[2].create);
    }

    #[test]
    fn a_command_survives_the_shell_and_never_reaches_another_account() {
        let plain = command_line(Path::new("/usr/bin/snapwarden"), Path::new("/tmp/d-1/s.toml"), &[]);
        assert_eq!(plain, "/usr/bin/snapwarden --config /tmp/d-1/s.toml");
        let odd = command_line(
            Path::new("/my tools/it's/snapwarden"),
            Path::new("/tmp/$x/s.toml"),
            &["EXOSCALE_API_ENDPOINT", "EXOSCALE_API_KEY"],
        );
        assert_eq!(
            odd,
            r"env -u EXOSCALE_API_ENDPOINT -u EXOSCALE_API_KEY '/my tools/it'\''s/snapwarden' --config '/tmp/$x/s.toml'"
        );
    }

    #[tokio::test]
    async fn nightly_would_delete_the_named_snapshot_next() {
        let world = World::new(Arc::new(SystemClock::start()), SEED);
        let history = populate(&world, [DiskShape::default(); 3]);
        let next = next_to_delete(&world, &history).unwrap();
        let all = world.snapshots(&history.zone);
        let of_web: Vec<SnapshotId> =
            all.iter().filter(|found| found.instance_id == Some(history.web)).map(|found| found.id).collect();
        assert_eq!(of_web.iter().position(|id| *id == next), Some(of_web.len() - NIGHTLY_KEEPS));
    }
}
