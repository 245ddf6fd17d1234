//! A simulated zone on loopback, for trying the program by hand and for measuring it: `cargo run --example zone`.
//!
//! It has one zone, `ch-gva-2`, with an instance `big-1` of one snapshot, whose image has the given MiB of data
//! (24 if none are given), and prints what to put into the environment. Ctrl-C ends it.

use std::sync::Arc;

use snapwarden::clock::{Clock as _, SystemClock};
use snapwarden::sim::clock::SimClock;
use snapwarden::sim::image::DiskShape;
use snapwarden::sim::world::{API_KEY, API_SECRET, World};

#[tokio::main]
#[expect(clippy::print_stdout, reason = "it is there to be read")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let data_mib = std::env::args().nth(1).map_or(Ok(24), |text| text.parse())?;
    let clock = SimClock::starting_at(SystemClock::start().now());
    let world = World::new(Arc::new(clock), 1);
    let zone = world.add_zone("ch-gva-2");
    let instance = world.add_instance(&zone, "big-1", &[]);
    world.set_disk(instance, DiskShape::with_data_mib(data_mib));
    let snapshot = world.add_snapshot(instance, world.now());
    // Known before the first request, so that nobody waits for it in a measurement.
    world.image(snapshot).md5();
    let served = world.serve(([127, 0, 0, 1], 0).into()).await?;
    println!("export EXOSCALE_API_ENDPOINT='{}'", served.endpoint());
    println!("export EXOSCALE_API_KEY='{API_KEY}' EXOSCALE_API_SECRET='{API_SECRET}'");
    tokio::signal::ctrl_c().await?;
    Ok(())
}
