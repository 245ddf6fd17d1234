//! The vendor's own Python client drives the simulated zone.
//!
//! It is run where `SNAPWARDEN_VENDOR_PYTHON` names a Python that has the package `exoscale`; elsewhere the test
//! says that it was skipped.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use snapwarden::clock::{Clock as _, SystemClock};
use snapwarden::sim::call::Call;
use snapwarden::sim::fault::{Effect, Fault};
use snapwarden::sim::world::{API_KEY, API_SECRET, World};

#[tokio::test(flavor = "multi_thread")]
async fn the_vendors_client_drives_the_simulated_zone() {
    let Some(python) = std::env::var_os("SNAPWARDEN_VENDOR_PYTHON") else {
        crate::stage::skipped(format_args!(
            "SNAPWARDEN_VENDOR_PYTHON names no Python with the package `exoscale`"
        ));
        return;
    };
    let clock = SystemClock::start();
    let world = World::new(Arc::new(clock), 1);
    let zone = world.add_zone("ch-gva-2");
    world.add_zone("de-fra-1");
    let instance = world.add_instance(&zone, "web-1", &[("backup", "nightly")]);
    world.add_snapshot(instance, clock.now() - SignedDuration::from_hours(24));
    world.set_quota("snapshot", 2);
    // Less than the client's first wait, and more than its first request.
    world.set_operations_take(Duration::from_secs(1));
    world.fault(Fault::on(Call::DeleteSnapshot, Effect::operation_fails("busy", "try later")).after(1));
    let served = world.serve("127.0.0.1:0".parse().unwrap()).await.unwrap();

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vendor_client.py");
    let mut command = Command::new(python);
    command
        .arg(script)
        .env("ENDPOINT", served.endpoint())
        .env("API_KEY", API_KEY)
        .env("API_SECRET", API_SECRET);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let (said, erred) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{erred}");
    assert!(said.contains("the vendor's client is content"), "{said}{erred}");
}
