//! The log: on stderr, as text for people or as JSON for machines.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One line of text each.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging for the whole process. `RUST_LOG`, where it is set, goes before `level`.
///
/// A second call changes nothing.
pub fn start(format: Format, level: &str, color: bool) {
    let filter = EnvFilter::try_from_default_env()
        // Of the libraries only what they warn of: their debug lines may quote addresses, which can be secrets.
        .unwrap_or_else(|_| EnvFilter::new(format!("warn,snapwarden={level}")));
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(color);
    let started = match format {
        Format::Text => builder.with_target(false).try_init(),
        Format::Json => builder.json().flatten_event(true).with_target(false).try_init(),
    };
    if let Err(error) = started {
        tracing::debug!("logging was started before: {error}");
    }
}
