//! `run`: the daemon.

use std::io;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::warn;

use crate::cli::args::Global;
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::signals::StopSignals;
use crate::config::sections::Config;
use crate::credentials::Credentials;
use crate::daemon::scheduler::Ticker;
use crate::daemon::service::ServiceManager;
use crate::daemon::{Daemon, Ending, Loaded, Order};
use crate::telemetry::Telemetry;

/// The commit of this build, if the packager sets `SNAPWARDEN_REVISION`.
const REVISION: &str = match option_env!("SNAPWARDEN_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};

/// Runs the daemon until a signal stops it.
///
/// # Errors
/// [`Refusal`] if it cannot start.
pub async fn run(global: &Global) -> Result<Exit, Refusal> {
    // Before anything else: a service manager may send a signal at once.
    let orders = orders_by_signal()?;
    let global = global.clone();
    let read = move || {
        let config = assemble::configuration(&global)?;
        let credentials = assemble::credentials(&config)?;
        Ok((config, credentials))
    };
    run_over(read, orders).await
}

/// Runs the daemon with the configuration from `read`, which is called again at each reload, until `orders` end it.
///
/// # Errors
/// [`Refusal`] if it cannot start.
pub async fn run_over<R>(read: R, orders: mpsc::UnboundedReceiver<Order>) -> Result<Exit, Refusal>
where
    R: Fn() -> Result<(Config, Credentials), Refusal> + Send + 'static,
{
    let seams = Seams::real();
    let telemetry = Telemetry::new(Arc::clone(&seams.clock), env!("CARGO_PKG_VERSION"), REVISION);
    let observer = Arc::new(telemetry.clone());
    let load = move |purpose: Use| -> Result<Loaded, Refusal> {
        let (config, credentials) = read()?;
        let mut runner = assemble::runner(&config, credentials, &seams, purpose)?;
        assemble::require_shard(&config, &runner)?;
        runner.client = runner.client.with_observer(observer.clone());
        runner.downloads = observer.downloads();
        let notifiers = (assemble::notifiers(&config)?, assemble::wires(&seams));
        let web = assemble::web_file(&config)?;
        Ok(Loaded { runner, server: config.server, web, notifiers })
    };
    let loaded = load(Use::Changing)?;
    if loaded.runner.policies.iter().all(|policy| !policy.enabled) {
        warn!("{}", assemble::NOTHING_ENABLED);
    }
    // A reload keeps the state directory that is already open.
    let again = Box::new(move || load(Use::Reading).map_err(|refusal| refusal.text));
    let daemon = Daemon::open(loaded, again, telemetry, ServiceManager::from_environment()).await?;
    let ticker = Ticker::start().await?;
    let ending = daemon.run(orders, ticker.tick()).await;
    ticker.stop().await;
    Ok(match ending {
        Ending::Orderly => Exit::Done,
        Ending::AtOnce => Exit::Failed,
    })
}

/// SIGHUP reloads; SIGINT and SIGTERM stop, a second one at once. From here on none of them ends the process by itself.
///
/// # Errors
/// If the handlers cannot be installed.
pub fn orders_by_signal() -> io::Result<mpsc::UnboundedReceiver<Order>> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut stop = StopSignals::install()?;
    let (send, orders) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let order = tokio::select! {
                _ = hangup.recv() => Order::Reload,
                () = stop.next() => Order::Stop,
            };
            // The daemon no longer receives after its end.
            let _ = send.send(order);
        }
    });
    Ok(orders)
}
