//! A simulated zone on loopback, to try the program manually and to measure it: `cargo run --example zone`.
//!
//! It has one zone, `ch-gva-2`, with instances `big-1`, `big-2` … (one, or as many as the second argument says) of one
//! snapshot each (or as many as `ZONE_SNAPSHOTS` says, a day apart), whose image has the given MiB of data (24 if none are given). It prints what to put into the
//! environment, and for each image an address that any HTTP client can fetch it from, with its MD5. Ctrl-C ends it.
//!
//! With a folder and an address as third and fourth argument, the images are written to that folder (`big-1.qcow2` …),
//! and the zone's presigned addresses point to a file server at that address, to compare with.

use std::fs::File;
use std::io::Write as _;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use secrecy::ExposeSecret as _;
use snapwarden::clock::{Clock as _, SystemClock};
use snapwarden::credentials::Credentials;
use snapwarden::exoscale::client::{Client, Settings};
use snapwarden::randomness::SystemRandomness;
use snapwarden::sim::call::Call;
use snapwarden::sim::clock::SimClock;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::image::DiskShape;
use snapwarden::sim::world::{API_KEY, API_SECRET, World};
use snapwarden::transport::HttpTransport;

#[tokio::main]
#[expect(clippy::print_stdout, reason = "it is there to be read")]
#[expect(clippy::disallowed_methods, reason = "what a file server gives out is no file of archive or state")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let number = |nth, otherwise| std::env::args().nth(nth).map_or(Ok(otherwise), |text| text.parse::<u64>());
    let (data_mib, instances) = (number(1, 24)?, number(2, 1)?);
    let snapshots_each = std::env::var("ZONE_SNAPSHOTS").map_or(Ok(1), |text| text.parse::<i64>())?;
    let elsewhere = std::env::args().nth(3).zip(std::env::args().nth(4));
    let clock = Arc::new(SimClock::starting_at(SystemClock::start().now()));
    let world = World::new(clock.clone(), 1);
    world.set_operations_take(Duration::from_millis(10));
    let zone = world.add_zone("ch-gva-2");
    let mut snapshots = Vec::new();
    for number in 1..=instances {
        let instance = world.add_instance(&zone, &format!("big-{number}"), &[]);
        world.set_disk(instance, DiskShape::with_data_mib(data_mib));
        for days in (1..snapshots_each).rev() {
            world.add_snapshot(instance, world.now() - SignedDuration::from_hours(24 * days));
        }
        let snapshot = world.add_snapshot(instance, world.now());
        // Known before the first request, so that no measurement includes it.
        let image = world.image(snapshot);
        image.md5();
        if let Some((folder, address)) = &elsewhere {
            let name = format!("big-{number}.qcow2");
            let mut file = File::create(Path::new(folder).join(&name))?;
            for chunk in image.chunks(0..image.file_bytes()) {
                file.write_all(&chunk)?;
            }
            let there = Effect::Edit("/export/presigned-url", Some(format!("{address}/{name}").into()));
            world.fault(Fault::on(Call::GetSnapshot, there).of(snapshot.0));
        }
        snapshots.push(snapshot);
    }
    let served = world.serve(([127, 0, 0, 1], 0).into()).await?;
    println!("export EXOSCALE_API_ENDPOINT='{}'", served.endpoint());
    println!("export EXOSCALE_API_KEY='{API_KEY}' EXOSCALE_API_SECRET='{API_SECRET}'");

    let settings = Settings {
        endpoint: served.endpoint(),
        request_timeout: Duration::from_secs(10),
        poll_interval: Duration::from_millis(20),
        operation_timeout: Duration::from_mins(1),
        requests_per_second: NonZeroU32::MAX,
        shards: std::num::NonZeroU32::MIN,
        concurrency: NonZeroUsize::MIN,
    };
    let credentials = Credentials::new(API_KEY, API_SECRET, None)?;
    let client = Client::new(
        settings,
        Some(credentials),
        Arc::<HttpTransport>::default(),
        clock,
        Arc::new(SystemRandomness),
    );
    for snapshot in snapshots {
        client.zone(&zone).export_snapshot(snapshot).await?;
        let export = client.zone(&zone).get_snapshot(snapshot).await?.and_then(|found| found.export);
        let export = export.ok_or("the simulated zone exports nothing")?;
        println!("image {} {}", export.presigned_url.expose_secret(), export.md5sum.unwrap_or_default());
    }
    tokio::signal::ctrl_c().await?;
    Ok(())
}
