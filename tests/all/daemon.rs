//! The daemon over the simulated zone, in virtual time: its loop turns by the clock alone, no ticker needed.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use snapwarden::cli::assemble;
use snapwarden::clock::Clock as _;
use snapwarden::config;
use snapwarden::config::sections::ServerSettings;
use snapwarden::daemon::service::ServiceManager;
use snapwarden::daemon::{Daemon, DaemonError, Ending, Loaded, Order};
use snapwarden::disk::{Access, Disk as _, RealDisk, replace_file};
use snapwarden::policy::select::Pattern;
use snapwarden::run::context::RunOptions;
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::state::allowances::{Allowance, AllowanceOf};
use snapwarden::state::audit::StepOutcome;
use snapwarden::state::error::StateError;
use snapwarden::state::holds::Hold;
use snapwarden::telemetry::Telemetry;
use snapwarden::transport::{Request, Response, Transport, TransportError};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use crate::stage::Stage;

/// A daemon at work.
pub(crate) struct Play {
    pub(crate) telemetry: Telemetry,
    pub(crate) orders: mpsc::UnboundedSender<Order>,
    ended: JoinHandle<Ending>,
}

pub(crate) fn loaded(stage: &Stage, policies: &str) -> Loaded {
    let server = ServerSettings {
        listen: "127.0.0.1:0".parse().unwrap(),
        web_config_file: None,
        shutdown_grace: Duration::from_secs(30),
    };
    let config = config::parse(&stage.config(policies), "test.toml", None).unwrap();
    let notifiers = assemble::notifiers(&config).unwrap_or_else(|refusal| panic!("{}", refusal.text));
    let notifiers = (notifiers, assemble::wires(&stage.seams));
    Loaded { runner: stage.runner(policies), server, web: None, notifiers }
}

/// Started by nobody who wants to hear of it.
fn nobody() -> ServiceManager {
    ServiceManager::new(&|_| None, 1)
}

async fn open(
    stage: &Stage,
    policies: &str,
    later: Vec<Result<Loaded, String>>,
) -> Result<(Daemon, Telemetry), DaemonError> {
    let later = std::sync::Mutex::new(later.into_iter());
    let load = Box::new(move || later.lock().unwrap().next().expect("a configuration for each reload"));
    let telemetry = Telemetry::new(stage.seams.clock.clone(), "0", "test");
    let daemon = Daemon::open(loaded(stage, policies), load, telemetry.clone(), nobody()).await?;
    Ok((daemon, telemetry))
}

pub(crate) async fn play(stage: &Stage, policies: &str) -> Play {
    play_with(stage, policies, Vec::new()).await
}

pub(crate) async fn play_with(stage: &Stage, policies: &str, later: Vec<Result<Loaded, String>>) -> Play {
    let (daemon, telemetry) = open(stage, policies, later).await.unwrap();
    let (orders, receiver) = mpsc::unbounded_channel();
    let ended = tokio::spawn(daemon.run(receiver, Arc::new(Notify::new())));
    Play { telemetry, orders, ended }
}

impl Play {
    pub(crate) async fn stop(self) -> Telemetry {
        self.orders.send(Order::Stop).unwrap();
        self.ended.await.unwrap();
        self.telemetry
    }

    /// Ends it as a crash does.
    pub(crate) async fn kill(self) {
        self.ended.abort();
        self.ended.await.unwrap_err();
    }

    /// The value of a series, by its whole name with labels.
    pub(crate) fn value(&self, series: &str) -> Option<f64> {
        value(&self.telemetry, series)
    }
}

fn value(telemetry: &Telemetry, series: &str) -> Option<f64> {
    let text = telemetry.metrics_text();
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
    Some(line.parse().unwrap())
}

pub(crate) async fn until(stage: &Stage, at: &str) {
    let at: Timestamp = at.parse().unwrap();
    let left = at.duration_since(stage.now());
    stage.clock.sleep(left.unsigned_abs()).await;
}

/// Starts the play's clock at this moment, with one instance.
pub(crate) fn stage_at(now: &str) -> Stage {
    let stage = Stage::new();
    let at: Timestamp = now.parse().unwrap();
    stage.step(at.duration_since(stage.now()));
    stage.instance("web-1", 0);
    stage
}

/// When snapshots were taken.
pub(crate) fn taken(stage: &Stage) -> Vec<String> {
    stage.world.snapshots(&stage.zone).iter().map(|snapshot| snapshot.created_at.to_string()).collect()
}

pub(crate) fn creating(keys: &str) -> String {
    format!("[policies.p]\nzones = [\"ch-gva-2\"]\ncreate = true\n{keys}\n")
}

#[tokio::test(start_paused = true)]
async fn half_past_two_takes_one_snapshot_a_day_through_the_clock_changes_of_2027() {
    for (zone, from, until_at, expected) in [
        (
            "Europe/Zurich",
            "2027-03-27T22:00:00Z",
            "2027-03-29T03:00:00Z",
            ["2027-03-28T01:00:0", "2027-03-29T00:30:0"],
        ),
        (
            "Europe/Zurich",
            "2027-10-30T22:00:00Z",
            "2027-11-01T03:00:00Z",
            ["2027-10-31T00:30:0", "2027-11-01T01:30:0"],
        ),
        (
            "America/New_York",
            "2027-03-14T05:00:00Z",
            "2027-03-15T09:00:00Z",
            ["2027-03-14T07:00:0", "2027-03-15T06:30:0"],
        ),
        (
            "America/New_York",
            "2027-11-07T05:00:00Z",
            "2027-11-08T09:00:00Z",
            ["2027-11-07T07:30:0", "2027-11-08T07:30:0"],
        ),
        (
            "Australia/Lord_Howe",
            "2027-04-03T13:00:00Z",
            "2027-04-04T18:00:00Z",
            ["2027-04-03T16:00:0", "2027-04-04T16:00:0"],
        ),
        (
            "Australia/Lord_Howe",
            "2027-10-02T13:00:00Z",
            "2027-10-03T18:00:00Z",
            ["2027-10-02T15:30:0", "2027-10-03T15:30:0"],
        ),
    ] {
        let stage = stage_at(from);
        let play =
            play(&stage, &creating(&format!("schedule = \"30 2 * * *\"\ntimezone = \"{zone}\""))).await;
        until(&stage, until_at).await;
        let taken = taken(&stage);
        let fits = taken.len() == expected.len()
            && taken.iter().zip(expected).all(|(taken, expected)| taken.starts_with(expected));
        assert!(fits, "{zone} from {from}: {taken:?}");
        assert_eq!(play.value("snapwarden_policy_runs_total{policy=\"p\",result=\"success\"}"), Some(2.0));
        play.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_still_runs_is_not_begun_again_and_what_it_skips_is_counted() {
    let stage = stage_at("2026-11-03T00:05:00Z");
    stage.world.set_operations_take(Duration::from_mins(25));
    let play = play(&stage, &creating("schedule = \"*/10 * * * *\"")).await;
    until(&stage, "2026-11-03T00:32:00Z").await;
    assert_eq!(taken(&stage).len(), 1);
    assert_eq!(play.value("snapwarden_policy_runs_total{policy=\"p\",result=\"skipped\"}"), Some(2.0));
    until(&stage, "2026-11-03T00:38:00Z").await;
    assert_eq!(play.value("snapwarden_policy_runs_total{policy=\"p\",result=\"success\"}"), Some(1.0));
    until(&stage, "2026-11-03T00:41:00Z").await;
    assert_eq!(taken(&stage).len(), 2);
    play.stop().await;
}

/// Panics where it is asked for a zone that is not there.
#[derive(Debug)]
struct Broken(Arc<dyn Transport>);

impl Transport for Broken {
    fn send(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        assert!(!request.url.as_str().contains("at-vie-1"), "a mistake in the program");
        self.0.send(request)
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_fails_its_own_run_alone() {
    let mut stage = stage_at("2026-11-03T00:59:00Z");
    stage.seams.transport = Arc::new(Broken(stage.world.transport()));
    let policies = "[policies.good]\nschedule = \"@hourly\"\nzones = [\"ch-gva-2\"]\n\
                    [policies.bad]\nschedule = \"@hourly\"\nzones = [\"at-vie-1\"]\n";
    let play = play(&stage, policies).await;
    until(&stage, "2026-11-03T02:30:00Z").await;
    let runs = |policy, result| {
        play.value(&format!("snapwarden_policy_runs_total{{policy=\"{policy}\",result=\"{result}\"}}"))
    };
    assert_eq!(runs("bad", "failed"), Some(2.0));
    assert_eq!(runs("good", "success"), Some(2.0));
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_run_that_a_stop_cut_short_is_done_by_the_next_start_and_takes_no_second_snapshot() {
    let stage = stage_at("2026-11-03T00:59:00Z");
    stage.world.set_operations_take(Duration::from_mins(5));
    let policies = creating("schedule = \"@hourly\"");
    let first = play(&stage, &policies).await;
    until(&stage, "2026-11-03T01:00:30Z").await;
    let begun = stage.clock.elapsed();
    first.stop().await;
    let took = stage.clock.elapsed().saturating_sub(begun);
    assert!(took <= Duration::from_secs(31), "the grace is 30 s, it took {took:?}");
    assert_eq!(taken(&stage).len(), 1);

    let second = play(&stage, &policies).await;
    until(&stage, "2026-11-03T01:20:00Z").await;
    assert_eq!(taken(&stage).len(), 1, "the slot has its snapshot");
    assert_eq!(second.value("snapwarden_policy_runs_total{policy=\"p\",result=\"success\"}"), Some(1.0));
    second.stop().await;
    let third = play(&stage, &policies).await;
    until(&stage, "2026-11-03T01:40:00Z").await;
    assert_eq!(third.value("snapwarden_policy_runs_total{policy=\"p\",result=\"success\"}"), Some(0.0));
    third.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_was_in_flight_is_waited_for() {
    let stage = stage_at("2026-11-03T00:59:00Z");
    stage.world.set_operations_take(Duration::from_secs(10));
    let play = play(&stage, &creating("schedule = \"@hourly\"")).await;
    until(&stage, "2026-11-03T01:00:05Z").await;
    play.stop().await;
    let outcomes: Vec<_> = stage.audit().iter().map(|line| line["outcome"].to_string()).collect();
    assert_eq!(outcomes, ["\"intended\"", "\"done\""]);
}

#[tokio::test(start_paused = true)]
async fn metrics_are_there_at_zero_go_on_over_a_restart_and_go_with_their_policy() {
    let stage = stage_at("2026-11-03T00:59:00Z");
    let two =
        creating("schedule = \"@hourly\"") + "[policies.q]\nschedule = \"@daily\"\nzones = [\"ch-gva-2\"]\n";
    let one = creating("schedule = \"@hourly\"");
    let later = vec![Err("a line is wrong".to_owned()), Ok(loaded(&stage, &one))];
    let play = play_with(&stage, &two, later).await;
    stage.clock.sleep(Duration::from_secs(3)).await;
    let runs = "snapwarden_policy_runs_total{policy=\"p\",result=\"success\"}";
    let success = "snapwarden_policy_last_success_timestamp_seconds{policy=\"p\",zone=\"ch-gva-2\"}";
    assert_eq!((play.value(runs), play.value(success)), (Some(0.0), None));
    until(&stage, "2026-11-03T01:30:00Z").await;
    let last = play.value(success);
    assert!(play.value(runs) == Some(1.0) && last.is_some_and(|at| at > 1.0), "{last:?}");

    play.orders.send(Order::Reload).unwrap();
    stage.clock.sleep(Duration::from_secs(3)).await;
    assert_eq!(play.value("snapwarden_config_last_reload_successful"), Some(0.0));
    assert!(play.telemetry.metrics_text().contains("policy=\"q\""));
    play.orders.send(Order::Reload).unwrap();
    stage.clock.sleep(Duration::from_secs(3)).await;
    assert_eq!(play.value("snapwarden_config_last_reload_successful"), Some(1.0));
    assert!(
        !play.telemetry.metrics_text().contains("policy=\"q\""),
        "a policy that is gone leaves no series"
    );
    assert_eq!(play.value(runs), Some(1.0), "a counter goes on over a reload");
    play.stop().await;

    let (_, telemetry) = open(&stage, &one, Vec::new()).await.unwrap();
    assert_eq!(value(&telemetry, success), last, "the last success is known at once after a restart");
    assert_eq!(value(&telemetry, runs), Some(0.0));
}

#[tokio::test(start_paused = true)]
async fn an_allowance_that_is_given_beside_it_shows_within_a_minute_and_goes_with_the_run() {
    let stage = stage_at("2026-11-01T12:00:00Z");
    let policies = creating("schedule = \"30 12 * * *\"\n[policies.p.retention]\nkeep_last = 1");
    let play = play(&stage, &policies).await;
    let series = "snapwarden_guard_allowance{policy=\"p\"}";
    until(&stage, "2026-11-01T12:01:00Z").await;
    assert_eq!(play.value(series), Some(0.0));
    let allowance = Allowance {
        of: AllowanceOf::Policy("p".parse().unwrap()),
        zone: None,
        deletes: 40,
        given_at: stage.now(),
        ends_at: None,
    };
    stage.runner(&policies).state.allow(&stage.clock, allowance).await.unwrap();
    until(&stage, "2026-11-01T12:02:00Z").await;
    assert_eq!(play.value(series), Some(40.0));
    until(&stage, "2026-11-01T12:31:00Z").await;
    assert_eq!(taken(&stage).len(), 1);
    assert_eq!(play.value(series), Some(0.0));
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_hold_shows_within_a_minute_and_so_does_its_end() {
    let stage = stage_at("2026-11-01T12:00:00Z");
    let id = stage.instance("db-1", 1)[0];
    let policies = creating("schedule = \"@yearly\"");
    let play = play(&stage, &policies).await;
    until(&stage, "2026-11-01T12:01:00Z").await;
    assert_eq!(play.value("snapwarden_holds"), Some(0.0));
    let hold = Hold { snapshot: id, until: None, reason: None, since: stage.now(), about: None };
    stage.runner(&policies).state.hold(&stage.clock, hold).await.unwrap();
    until(&stage, "2026-11-01T12:02:00Z").await;
    assert_eq!(play.value("snapwarden_holds"), Some(1.0));
    replace_file(&RealDisk, &stage.state().join("holds.json"), b"{", Access::Owner).unwrap();
    until(&stage, "2026-11-01T12:03:00Z").await;
    assert_eq!(play.value("snapwarden_holds"), None);
    RealDisk.remove_file(&stage.state().join("holds.json")).unwrap();
    until(&stage, "2026-11-01T12:04:00Z").await;
    assert_eq!(play.value("snapwarden_holds"), Some(0.0));
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_commands_do_beside_it_shows_within_a_minute() {
    let stage = stage_at("2026-11-01T12:00:00Z");
    let ids = stage.instance("db-1", 20);
    let keeping = |count: u32| {
        format!(
            "[policies.p]\nzones = [\"ch-gva-2\"]\nschedule = \"@yearly\"\n[policies.p.select]\ninstances = [\"db-1\"]\n\
             [policies.p.retention]\nkeep_last = {count}\n[policies.p.guard]\nmax_deletes = 5\nsettle = \"0s\"\n\
             [policies.p.export]\narchives = [\"vault\"]\n"
        )
    };
    let play = play(&stage, &keeping(16)).await;
    stage.clock.sleep(Duration::from_secs(3)).await;
    let zone = "{policy=\"p\",zone=\"ch-gva-2\"}";
    let of = |name: &str| play.value(&format!("snapwarden_{name}{zone}"));
    let starting = |name: &str| {
        let text = play.telemetry.metrics_text();
        let line = text.lines().find(|line| line.starts_with(&format!("snapwarden_{name}{{")));
        line.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
    };
    let runs = "snapwarden_policy_runs_total{policy=\"p\",result=\"success\"}";
    let images = "snapwarden_archive_images{archive=\"vault\"}";
    assert_eq!((of("policy_last_run_timestamp_seconds"), starting("snapshots")), (None, None));
    assert_eq!(play.value(images), Some(0.0));

    let report = stage.run(&keeping(16)).await;
    assert_eq!(report.result.as_str(), "success", "{report:?}");
    stage.clock.sleep(Duration::from_mins(1)).await;
    let ended = report.finished_at.duration_since(Timestamp::UNIX_EPOCH).as_secs_f64();
    assert_eq!(of("policy_last_run_timestamp_seconds"), Some(ended));
    assert_eq!(of("policy_last_success_timestamp_seconds"), Some(ended));
    assert_eq!((starting("snapshots"), play.value(images)), (Some(16.0), Some(1.0)));
    let newest = stage.world.snapshots(&stage.zone).iter().find(|one| one.id == ids[19]).unwrap().created_at;
    let newest = newest.duration_since(Timestamp::UNIX_EPOCH).as_secs_f64();
    assert_eq!(starting("export_newest_verified_timestamp_seconds"), Some(newest));
    assert_eq!(play.value(runs), Some(0.0), "it counts its own runs");
    assert_eq!(play.telemetry.status_json().policies["p"].last.as_ref().unwrap().result, "success");

    let held = stage.run(&keeping(4)).await;
    assert_eq!(held.result.as_str(), "held", "{held:?}");
    stage.clock.sleep(Duration::from_mins(1)).await;
    assert_eq!((of("policy_held"), of("planned_deletes")), (Some(1.0), Some(12.0)));
    assert_eq!(of("policy_last_success_timestamp_seconds"), Some(ended));

    let files = crate::stage::files(&stage.archive());
    let image = files.iter().find(|(path, _)| path.extension().is_some_and(|end| end == "qcow2")).unwrap();
    let file = RealDisk.open(&image.0, snapwarden::disk::Open::Update, Access::Group).unwrap();
    file.write_all_at(&[image.1[5000] ^ 1], 5000).unwrap();
    let runner = stage.runner(&keeping(4));
    let archive = runner.archives.values().next().unwrap();
    runner.verifier(archive).verify(100, &|_, _| ()).await.unwrap();
    runner.state.note_manual_change(&stage.clock).await.unwrap();
    stage.clock.sleep(Duration::from_mins(1)).await;
    assert_eq!(play.value("snapwarden_archive_corrupt_images{archive=\"vault\"}"), Some(1.0));
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn runs_in_flight_keep_their_configuration() {
    let stage = stage_at("2026-11-03T00:59:00Z");
    stage.world.set_operations_take(Duration::from_mins(5));
    let none = "[policies.q]\nschedule = \"@daily\"\nzones = [\"ch-gva-2\"]\n";
    let play = play_with(&stage, &creating("schedule = \"@hourly\""), vec![Ok(loaded(&stage, none))]).await;
    until(&stage, "2026-11-03T01:00:30Z").await;
    play.orders.send(Order::Reload).unwrap();
    until(&stage, "2026-11-03T01:10:00Z").await;
    let outcomes: Vec<_> = stage.audit().iter().map(|line| line["outcome"].to_string()).collect();
    assert_eq!(outcomes, ["\"intended\"", "\"done\""]);
    assert!(!play.telemetry.metrics_text().contains("policy=\"p\""));
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn two_policies_run_side_by_side() {
    let stage = stage_at("2026-11-03T00:59:00Z");
    stage.world.add_zone("de-fra-1");
    stage.world.set_operations_take(Duration::from_mins(5));
    stage.world.add_instance(&"de-fra-1".parse().unwrap(), "db-1", &[]);
    let policies = creating("schedule = \"@hourly\"")
        + "[policies.q]\nschedule = \"@hourly\"\nzones = [\"de-fra-1\"]\ncreate = true\n";
    let play = play(&stage, &policies).await;
    until(&stage, "2026-11-03T01:06:30Z").await;
    for policy in ["p", "q"] {
        let series = format!("snapwarden_policy_runs_total{{policy=\"{policy}\",result=\"success\"}}");
        assert_eq!(play.value(&series), Some(1.0), "{policy}");
    }
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn damaged_state_is_told_before_anything_begins() {
    // The last is of a policy that is not configured any more.
    for name in [
        "schedules.json",
        "runs-p.json",
        "policy-p.json",
        "holds.json",
        "allowances.json",
        "controls.json",
        "policy-gone.json",
    ] {
        for damage in ["", "{}", "{\"version\": 1, \"", "{\"version\": 99}"] {
            let stage = stage_at("2026-11-03T00:59:00Z");
            drop(loaded(&stage, &creating("schedule = \"@hourly\"")));
            replace_file(&RealDisk, &stage.state().join(name), damage.as_bytes(), Access::Owner).unwrap();
            let error = open(&stage, &creating("schedule = \"@hourly\""), Vec::new()).await.err().unwrap();
            assert!(error.to_string().contains(name), "{name}, {damage}: {error}");
            assert!(stage.world.log().is_empty(), "{name}, {damage}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn point_40_one_daemon_on_a_state_directory() {
    let stage = stage_at("2026-11-03T00:59:00Z");
    let policies = creating("schedule = \"@hourly\"");
    let first = open(&stage, &policies, Vec::new()).await.unwrap();
    let error = open(&stage, &policies, Vec::new()).await.err().unwrap();
    assert!(matches!(error, DaemonError::State(StateError::Locked { .. })), "{error}");
    drop(first);
    open(&stage, &policies, Vec::new()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_port_that_is_taken_is_named() {
    let stage = stage_at("2026-11-03T00:59:00Z");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut loaded = loaded(&stage, &creating("schedule = \"@hourly\""));
    loaded.server.listen = taken.local_addr().unwrap();
    let telemetry = Telemetry::new(stage.seams.clock.clone(), "0", "test");
    let load = Box::new(|| Err(String::new()));
    let error = Daemon::open(loaded, load, telemetry, nobody()).await.unwrap_err();
    assert!(error.to_string().contains(&taken.local_addr().unwrap().to_string()), "{error}");
}

#[tokio::test(start_paused = true)]
async fn point_11_a_clock_that_goes_back_stops_nothing_and_repeats_nothing() {
    let stage = stage_at("2026-11-03T00:59:00Z");
    let play = play(&stage, &creating("schedule = \"@hourly\"")).await;
    until(&stage, "2026-11-03T01:30:00Z").await;
    stage.step(SignedDuration::from_hours(-1));
    until(&stage, "2026-11-03T01:30:00Z").await;
    assert_eq!(taken(&stage).len(), 1);
    until(&stage, "2026-11-03T02:30:00Z").await;
    assert_eq!(taken(&stage).len(), 2);
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn after_a_jump_of_the_clock_the_next_run_is_shown_anew() {
    let stage = stage_at("2026-11-03T02:00:00Z");
    let play = play(&stage, &creating("schedule = \"30 2 * * *\"")).await;
    let next = async || {
        stage.clock.sleep(Duration::from_secs(5)).await;
        play.telemetry.status_json().policies["p"].next_run_at.unwrap().to_string()
    };
    until(&stage, "2026-11-03T12:00:00Z").await;
    assert_eq!(next().await, "2026-11-04T02:30:00Z");
    stage.step(SignedDuration::from_hours(-48));
    assert_eq!(next().await, "2026-11-02T02:30:00Z");
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn two_policies_that_want_one_copy_get_it_together() {
    let stage = stage_at("2026-11-03T00:59:00Z");
    stage.instance("db-1", 1);
    let export = |name: &str| {
        format!(
            "[policies.{name}]\nschedule = \"@hourly\"\nzones = [\"ch-gva-2\"]\n\
             [policies.{name}.export]\narchives = [\"vault\"]\n"
        )
    };
    // Slow enough that the second one comes while the first one stores.
    stage.world.fault(Fault::on(Call::GetImage, Effect::Delay(Duration::from_secs(20))));
    let play = play(&stage, &(export("p") + &export("q"))).await;
    until(&stage, "2026-11-03T01:10:00Z").await;
    for policy in ["p", "q"] {
        let series = format!("snapwarden_policy_runs_total{{policy=\"{policy}\",result=\"success\"}}");
        assert_eq!(play.value(&series), Some(1.0), "{policy}");
    }
    let fetched = stage.world.log().iter().filter(|exchange| exchange.call == Call::GetImage).count();
    assert_eq!(fetched, 1);
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_run_by_hand_goes_first_and_the_slot_is_counted_as_skipped_once() {
    let stage = stage_at("2026-11-03T00:59:00Z");
    let policies = creating("schedule = \"@hourly\"");
    let first = play(&stage, &policies).await;
    stage.world.set_operations_take(Duration::from_mins(3));
    let skipped = "snapwarden_policy_runs_total{policy=\"p\",result=\"skipped\"}";
    let options = RunOptions::default();
    let look = async {
        until(&stage, "2026-11-03T01:00:30Z").await;
        assert_eq!(first.value(skipped), Some(1.0));
        assert_eq!(first.telemetry.status_json().policies["p"].running_since, None, "it does not run");
    };
    let (report, ()) = futures_util::future::join(stage.run_with(&policies, &options), look).await;
    assert_eq!(report.zones[0].steps.len(), 1);
    until(&stage, "2026-11-03T01:10:00Z").await;
    first.stop().await;
    let second = play(&stage, &policies).await;
    until(&stage, "2026-11-03T01:30:00Z").await;
    assert_eq!(taken(&stage).len(), 1, "the slot was dealt with");
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_run_by_hand_of_some_instances_takes_the_place_of_none_of_all() {
    // When it begins, how long each snapshot takes, how many of it there are then, and of the other.
    for (begins, minutes, of_it, restarts) in [
        ("00:59:00", 3, 2, false),
        ("01:00:00", 3, 1, false),
        ("01:00:00", 0, 1, false),
        ("00:59:00", 3, 2, true),
    ] {
        let case = format!("{begins}, {minutes} minutes, {restarts}");
        let stage = stage_at("2026-11-03T00:58:00Z");
        stage.world.add_instance(&stage.zone, "db-1", &[]);
        stage.world.set_operations_take(Duration::from_mins(minutes));
        let policies = creating("schedule = \"@hourly\"");
        let mut daemon = play(&stage, &policies).await;
        until(&stage, &format!("2026-11-03T{begins}Z")).await;
        let only = Pattern::new("db-*").unwrap();
        let by_hand = RunOptions { instances: Some(only), ..RunOptions::default() };
        let report = stage.run_with(&policies, &by_hand).await;
        assert_eq!(report.zones[0].steps.len(), 1, "{case}");
        if restarts {
            daemon.stop().await;
            daemon = play(&stage, &policies).await;
        }
        until(&stage, "2026-11-03T01:30:00Z").await;
        daemon.stop().await;
        let all = stage.world.snapshots(&stage.zone);
        let of = |name: &str| all.iter().filter(|one| one.name.starts_with(name)).count();
        assert_eq!((of("web-1"), of("db-1")), (1, of_it), "{case}: {all:?}");
        assert!(taken(&stage).iter().any(|at| at.starts_with("2026-11-03T01:0")), "{case}: {all:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_by_hand_that_fails_takes_the_place_of_none() {
    let stage = stage_at("2026-11-03T00:59:00Z");
    stage.world.set_operations_take(Duration::from_mins(3));
    let fault = Fault::on(Call::CreateSnapshot, Effect::operation_fails("fault", "no space"));
    stage.world.fault(fault.times(1));
    let policies = creating("schedule = \"@hourly\"");
    let daemon = play(&stage, &policies).await;
    let report = stage.run_with(&policies, &RunOptions::default()).await;
    assert!(report.zones[0].steps.iter().all(|step| step.outcome == StepOutcome::Failed), "{report:?}");
    until(&stage, "2026-11-03T01:30:00Z").await;
    daemon.stop().await;
    let all = stage.world.snapshots(&stage.zone);
    assert_eq!(all.iter().filter(|one| one.state.is_good()).count(), 1, "{all:?}");
}

#[tokio::test(start_paused = true)]
async fn a_memory_that_cannot_be_written_is_told_until_it_can_and_runs_go_on() {
    let stage = stage_at("2026-11-03T00:59:00Z");
    let play = play(&stage, &creating("schedule = \"@hourly\"")).await;
    stage.clock.sleep(Duration::from_secs(3)).await;
    let written = "snapwarden_state_last_write_successful";
    assert_eq!(play.value(written), Some(1.0));
    // In the way of what is written beside the old.
    let in_the_way = stage.state().join("schedules.json.new");
    RealDisk.create_dir_all(&in_the_way, Access::Owner).unwrap();
    until(&stage, "2026-11-03T01:10:00Z").await;
    assert_eq!((taken(&stage).len(), play.value(written)), (1, Some(0.0)));
    let told = play.telemetry.status_json().state_error.unwrap();
    assert!(told.contains("schedules.json"), "{told}");

    assert!(Command::new("rmdir").arg(&in_the_way).status().unwrap().success());
    stage.clock.sleep(Duration::from_secs(5)).await;
    assert_eq!((play.value(written), play.telemetry.status_json().state_error), (Some(1.0), None));
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_is_off_whenever_a_new_policy_is_due_makes_up_for_it_or_counts_it() {
    for (on_start, snapshots, missed) in [("if_missed", 1, 0.0), ("wait", 0, 1.0)] {
        let stage = stage_at("2026-11-03T08:00:00Z");
        let policies = creating(&format!("schedule = \"30 2 * * *\"\non_start = \"{on_start}\""));
        let first = play(&stage, &policies).await;
        until(&stage, "2026-11-03T18:00:00Z").await;
        first.stop().await;
        until(&stage, "2026-11-04T08:00:00Z").await;
        let second = play(&stage, &policies).await;
        until(&stage, "2026-11-04T08:10:00Z").await;
        assert_eq!(taken(&stage).len(), snapshots, "{on_start}");
        let counted = second.value("snapwarden_policy_missed_runs_total{policy=\"p\"}");
        assert_eq!(counted, Some(missed), "{on_start}");
        second.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_was_not_enabled_has_missed_nothing() {
    let stage = stage_at("2026-11-03T00:59:00Z");
    let (on, off) = (creating("schedule = \"@hourly\""), creating("schedule = \"@hourly\"\nenabled = false"));
    let first = play_with(&stage, &on, vec![Ok(loaded(&stage, &off))]).await;
    until(&stage, "2026-11-03T01:30:00Z").await;
    first.orders.send(Order::Reload).unwrap();
    until(&stage, "2026-11-03T05:30:00Z").await;
    first.stop().await;
    let second = play(&stage, &on).await;
    until(&stage, "2026-11-03T05:50:00Z").await;
    assert_eq!(taken(&stage).len(), 1, "before it was switched off");
    until(&stage, "2026-11-03T06:10:00Z").await;
    assert_eq!(taken(&stage).len(), 2);
    assert_eq!(second.value("snapwarden_policy_missed_runs_total{policy=\"p\"}"), Some(0.0));
    second.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_archive_is_proved_again_by_its_own_schedule_and_corruption_shows() {
    let stage = Stage::new();
    stage.instance("web-1", 2);
    let policies = "[archives.vault.verify]\nschedule = \"0 5 * * *\"\n[policies.p]\nzones = [\"ch-gva-2\"]\n\
                    [policies.p.export]\narchives = [\"vault\"]\nsnapshots = \"all\"\n";
    stage.run(policies).await;
    let corrupt = "snapwarden_archive_corrupt_images{archive=\"vault\"}";
    let verified = "snapwarden_archive_last_verify_timestamp_seconds{archive=\"vault\"}";
    let seconds = |at: &str| Some(at.parse::<Timestamp>().unwrap().as_second());
    let whole = |value: Option<f64>| value.map(|value| format!("{value:.0}").parse::<i64>().unwrap());
    let play = play(&stage, policies).await;
    until(&stage, "2026-11-02T04:00:00Z").await;
    assert!(whole(play.value(verified)) < seconds("2026-11-01T13:00:00Z"));
    until(&stage, "2026-11-02T05:30:00Z").await;
    assert!(whole(play.value(verified)) >= seconds("2026-11-02T05:00:00Z"));
    assert_eq!(play.value(corrupt), Some(0.0));
    let files = crate::stage::files(&stage.archive());
    let image = files.iter().find(|(path, _)| path.extension().is_some_and(|end| end == "qcow2")).unwrap();
    let file = RealDisk.open(&image.0, snapwarden::disk::Open::Update, Access::Group).unwrap();
    file.write_all_at(&[image.1[5000] ^ 1], 5000).unwrap();
    until(&stage, "2026-11-03T05:30:00Z").await;
    assert_eq!(play.value(corrupt), Some(1.0));
    play.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_verification_that_was_due_while_no_daemon_ran_is_made_up_for_once() {
    let stage = Stage::new();
    stage.instance("web-1", 2);
    let policies = "[archives.vault.verify]\nschedule = \"0 5 * * *\"\n[policies.p]\nzones = [\"ch-gva-2\"]\n\
                    [policies.p.export]\narchives = [\"vault\"]\nsnapshots = \"all\"\n";
    stage.run(policies).await;
    let verified = async |play: &Play| {
        stage.clock.sleep(Duration::from_mins(10)).await;
        let series = "snapwarden_archive_last_verify_timestamp_seconds{archive=\"vault\"}";
        let value = play.value(series).map_or_else(String::new, |value| format!("{value:.0}"));
        Timestamp::from_second(value.parse().unwrap()).unwrap()
    };
    let at = |text: &str| -> Timestamp { text.parse().unwrap() };
    let first = play(&stage, policies).await;
    let before = verified(&first).await;
    first.stop().await;
    // A machine that is on by day only.
    until(&stage, "2026-11-03T08:00:00Z").await;
    let second = play(&stage, policies).await;
    let made_up = verified(&second).await;
    assert!(
        before < at("2026-11-02T00:00:00Z") && made_up >= at("2026-11-03T08:00:00Z"),
        "{before}, {made_up}"
    );
    second.stop().await;
    let third = play(&stage, policies).await;
    assert_eq!(verified(&third).await, made_up, "once");
    third.stop().await;
}

/// A policy that deletes at midnight, four deletions at a time.
pub(crate) fn deleting(keys: &str, rules: &str) -> String {
    format!(
        "[policies.p]\nzones = [\"ch-gva-2\"]\nschedule = \"@daily\"\n{keys}\n[policies.p.retention]\n{rules}\n\
         [policies.p.guard]\nmax_delete_percent = 100\n"
    )
}

#[tokio::test(start_paused = true)]
async fn a_reload_during_the_delete_phase_stops_what_has_not_begun() {
    let prunes = deleting("", "max_count = 3");
    let keeper = "[policies.q]\nzones = [\"ch-gva-2\"]\n[policies.q.retention]\nkeep_last = 40\n";
    for (what, later, is_stopped) in [
        ("nothing", prunes.clone(), false),
        ("a schedule", prunes.replace("@daily", "@weekly"), false),
        ("paused", deleting("enabled = false", "max_count = 3"), true),
        ("another count", deleting("", "max_count = 10"), true),
        ("a new policy that keeps", [prunes.as_str(), keeper].concat(), true),
        ("removed", keeper.to_owned(), true),
    ] {
        let stage = stage_at("2026-11-01T12:00:00Z");
        stage.instance("db-1", 40);
        stage.step(SignedDuration::from_secs(12 * 3600 - 60));
        stage.world.fault(Fault::on(Call::DeleteSnapshot, Effect::Delay(Duration::from_secs(10))));
        let play = play_with(&stage, &prunes, vec![Ok(loaded(&stage, &later))]).await;
        until(&stage, "2026-11-02T00:00:05Z").await;
        play.orders.send(Order::Reload).unwrap();
        stage.clock.sleep(Duration::from_mins(10)).await;
        let left = stage.there().len();
        // Those in flight end.
        assert_eq!(left, if is_stopped { 36 } else { 3 }, "{what}");
        play.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_reload_that_stops_what_a_run_should_add_has_it_begun_again_for_its_slot() {
    let policies = creating("schedule = \"0 1 * * *\"");
    for (what, later, snapshots) in [
        ("a schedule", policies.replace("0 1", "0 2"), 12),
        ("a count", policies.clone() + "[policies.p.retention]\nkeep_last = 9\n", 12),
        ("not enabled", policies.clone() + "enabled = false\n", 4),
    ] {
        let stage = stage_at("2026-11-03T00:59:00Z");
        for number in 2..=12 {
            stage.world.add_instance(&stage.zone, &format!("web-{number}"), &[]);
        }
        stage.world.set_operations_take(Duration::from_mins(1));
        let play = play_with(&stage, &policies, vec![Ok(loaded(&stage, &later))]).await;
        until(&stage, "2026-11-03T01:00:30Z").await;
        play.orders.send(Order::Reload).unwrap();
        until(&stage, "2026-11-03T01:30:00Z").await;
        let all = stage.world.snapshots(&stage.zone);
        let instances: BTreeSet<_> = all.iter().map(|one| one.instance_id).collect();
        assert_eq!((all.len(), instances.len()), (snapshots, snapshots), "{what}");
        play.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_that_was_cut_short_is_done_by_the_next_start_also_if_it_waits_for_what_was_missed() {
    for is_killed in [false, true] {
        let stage = stage_at("2026-11-03T00:59:00Z");
        stage.world.set_operations_take(Duration::from_mins(5));
        let policies = creating("schedule = \"@hourly\"\non_start = \"wait\"");
        let first = play(&stage, &policies).await;
        until(&stage, "2026-11-03T01:00:05Z").await;
        if is_killed {
            first.kill().await;
        } else {
            first.stop().await;
        }
        // By then one more is due, which is missed.
        until(&stage, "2026-11-03T02:10:00Z").await;
        let second = play(&stage, &policies).await;
        until(&stage, "2026-11-03T02:30:00Z").await;
        assert_eq!(taken(&stage).len(), 1, "killed: {is_killed}");
        let runs = second.value("snapwarden_policy_runs_total{policy=\"p\",result=\"success\"}");
        let missed = second.value("snapwarden_policy_missed_runs_total{policy=\"p\"}");
        assert_eq!((runs, missed), (Some(1.0), Some(1.0)), "killed: {is_killed}");
        second.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_that_something_kept_from_beginning_is_tried_again_until_the_next_slot() {
    // What is in the way until 01:02; how many runs there were by 01:09 that failed, and that did not.
    for (what, schedule, failed, succeeded) in [
        ("controls.json", "0 1 * * *", 1.0, 1.0),
        ("policy-p.lock", "0 1 * * *", 1.0, 1.0),
        ("archives.lock", "0 1 * * *", 1.0, 1.0),
        // At 01:04, which is before the next try, and 01:08.
        ("controls.json", "*/4 1 * * *", 1.0, 2.0),
    ] {
        let stage = stage_at("2026-11-03T00:59:00Z");
        let policies =
            creating(&format!("schedule = \"{schedule}\"\n[policies.p.export]\narchives = [\"vault\"]"));
        let play = play(&stage, &policies).await;
        stage.clock.sleep(Duration::from_secs(5)).await;
        let path = stage.state().join(what);
        let lock = if what == "archives.lock" {
            Some(stage.seams.disk.lock(&path).unwrap())
        } else {
            RealDisk.create_dir_all(&path, Access::Owner).unwrap();
            None
        };
        until(&stage, "2026-11-03T01:02:00Z").await;
        let runs =
            |result| play.value(&format!("snapwarden_policy_runs_total{{policy=\"p\",result=\"{result}\"}}"));
        assert_eq!((taken(&stage).len(), runs("failed")), (0, Some(1.0)), "{what}");
        if lock.is_none() {
            assert!(Command::new("rmdir").arg(&path).status().unwrap().success());
        }
        drop(lock);
        until(&stage, "2026-11-03T01:09:00Z").await;
        assert_eq!((runs("failed"), runs("success")), (Some(failed), Some(succeeded)), "{what}, {schedule}");
        play.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_by_hand_that_began_long_before_the_slot_takes_the_place_of_none_that_takes_snapshots() {
    for (begins, create, runs) in
        [("00:45:00", true, 0.0), ("00:44:59", true, 1.0), ("00:30:00", true, 1.0), ("00:30:00", false, 0.0)]
    {
        let stage = stage_at("2026-11-03T00:29:00Z");
        let policies = creating("schedule = \"0 1 * * *\"");
        let policies = if create {
            policies
        } else {
            stage.instance("db-1", 1);
            policies.replace("create = true", "") + "[policies.p.export]\narchives = [\"vault\"]\n"
        };
        let daemon = play(&stage, &policies).await;
        until(&stage, &format!("2026-11-03T{begins}Z")).await;
        stage.world.set_operations_take(Duration::from_mins(40));
        stage.run_with(&policies, &RunOptions::default()).await;
        stage.world.set_operations_take(Duration::ZERO);
        until(&stage, "2026-11-03T01:50:00Z").await;
        let series = "snapwarden_policy_runs_total{policy=\"p\",result=\"success\"}";
        assert_eq!(daemon.value(series), Some(runs), "{begins}, {create}");
        daemon.stop().await;
    }
}
