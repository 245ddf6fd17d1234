//! `demo`: see it work without an account.
//!
//! A simulated zone with months of history, in this process; a configuration in a temporary folder; and the
//! program itself over both, exactly as it would be over the real thing.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan as _};

use crate::cli::args::Demo;
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::output::Output;
use crate::cli::plan;
use crate::cli::{Exit, Refusal, archive, once};
use crate::clock::{Clock as _, SystemClock};
use crate::config;
use crate::disk::RealDisk;
use crate::exoscale::credentials::Credentials;
use crate::policy::Policy;
use crate::randomness::SystemRandomness;
use crate::run::{RunOptions, Runner};
use crate::sim::clock::SimClock;
use crate::sim::image::DiskShape;
use crate::sim::world::{API_KEY, API_SECRET, World};
use crate::snapshot::{InstanceId, SnapshotState, ZoneName};

/// The zones, instances and months of history never change, so that what the README shows is what one sees.
const SEED: u64 = 20_261_101;

const INTRODUCTION: &str = "\
A simulated Exoscale zone runs in this process: three instances, and the snapshots that were taken of them for
months. Nobody ever deleted one, and none exists anywhere else: if an instance is deleted, its snapshots go with
it. snapwarden puts that in order by the two policies of this configuration:

";

/// Plays one run of each policy, and shows what happened and why.
///
/// # Errors
/// [`Refusal`] if the temporary folder can't be used.
pub async fn demo(_demo: &Demo, output: Output) -> Result<Exit, Refusal> {
    let folder = tempfile::tempdir().map_err(|error| Refusal::failed(&error))?;
    let clock = Arc::new(SimClock::starting_at(SystemClock::start().now()));
    let world = World::new(clock.clone(), SEED);
    let zone = populate(&world);
    let history = world.snapshots(&zone).len();
    let seams = Seams {
        transport: world.transport(),
        disk: Arc::new(RealDisk),
        clock,
        randomness: Arc::new(SystemRandomness),
    };
    let text = configuration(folder.path());
    let config = config::parse(&text, "demo.toml", None).map_err(|error| Refusal::failed(&error))?;
    let credentials = Credentials::new(API_KEY, API_SECRET).map_err(|error| Refusal::failed(&error))?;
    let runner = assemble::runner(&config, credentials, &seams, Use::Running)?;

    output.print(INTRODUCTION);
    output.print(&indented(&text));
    let mut exit = Exit::Done;
    for (number, policy) in config.policies.iter().enumerate() {
        output.print(&heading(&format!("{}. What `snapwarden plan {}` says", 2 * number + 1, policy.name)));
        show_plan(&runner, policy, output).await;
        output.print(&heading(&format!("{}. What `snapwarden once {}` does", 2 * number + 2, policy.name)));
        let (ended, reports) = once::run_all(&runner, &[policy], &RunOptions::default(), output).await;
        exit = exit.worse(ended);
        output.print(&reports.iter().map(|report| once::render(report, output)).collect::<String>());
    }
    output.print(&heading("5. What is there now"));
    exit = exit.worse(archive::show(&runner.archives, &[], output).await);
    let templates: Vec<String> = world.templates(&zone).into_iter().map(|template| template.name).collect();
    output.print(&format!(
        "\nzone {zone}: {} of {history} snapshots, templates: {}\n\n\
         The configuration, the state and the archive were in a temporary folder, which is gone now.\n\
         For a first policy of your own see README.md.\n",
        world.snapshots(&zone).len(),
        templates.join(", ")
    ));
    Ok(exit)
}

/// Three instances with months of history, and one snapshot that failed.
fn populate(world: &World) -> ZoneName {
    let zone = world.add_zone("ch-gva-2");
    // What one waits for on a real zone teaches nothing here.
    world.set_operations_take(Duration::ZERO);
    let today = world.now().to_zoned_datetime(TimeZone::UTC).date();
    let at = |days: i64| -> Option<Timestamp> {
        let then = today.checked_sub(days.days()).ok()?.at(2, 30, 0, 0);
        TimeZone::UTC.to_timestamp(then).ok()
    };
    let take = |instance: InstanceId, days: &mut dyn Iterator<Item = i64>| {
        days.filter_map(at).map(|at| world.add_snapshot(instance, at)).last()
    };
    let instance = |name: &str, labels: &[(&str, &str)], data_mib: u64| {
        let instance = world.add_instance(&zone, name, labels);
        world.set_disk(instance, DiskShape::with_data_mib(data_mib));
        instance
    };
    // Since yesterday: what is of today would be dated in the future if it is early.
    let (web, db) = (instance("web-1", &[("tier", "golden")], 24), instance("db-1", &[], 48));
    take(web, &mut (1..=24).rev());
    take(db, &mut (2..=16).rev());
    if let Some(failed) = take(db, &mut [1].into_iter()) {
        world.set_state(failed, SnapshotState::Error);
    }
    // Weekly, and stopped two months ago: whoever prunes by age alone would be left with nothing.
    take(instance("legacy-1", &[], 8), &mut (0..9).rev().map(|week| 60 + 7 * week));
    zone
}

fn configuration(folder: &Path) -> String {
    format!(
        r#"[state]
directory = "{0}/state"

[archives.vault]                      # where exports go
type = "local"
path = "{0}/vault"

[policies.nightly]                    # prune, but never without a copy that was proved
schedule = "30 2 * * *"
timezone = "Europe/Zurich"
zones = ["ch-gva-2"]
[policies.nightly.retention]
keep_last = 7                         # the newest seven of each instance stay
keep_within = "14d"                   # and all that are younger than two weeks
max_age = "400d"
[policies.nightly.export]
archives = ["vault"]                  # what goes has a newer, verified copy there

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

fn heading(text: &str) -> String {
    format!("\n=== {text}\n\n")
}

fn indented(text: &str) -> String {
    text.lines().map(|line| if line.is_empty() { "\n".to_owned() } else { format!("    {line}\n") }).collect()
}

async fn show_plan(runner: &Runner, policy: &Policy, output: Output) {
    let at = runner.clock.now();
    for (_, planned) in runner.preview(policy, None).await {
        match &planned {
            Ok(planned) => output.print(&plan::render(&policy.name, planned, at, output)),
            Err(failure) => output.complain(failure),
        }
    }
}
