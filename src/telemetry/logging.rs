//! The log: on stderr, as text for people or as JSON for machines.

use std::io;

use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::fmt::{self, MakeWriter};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::{EnvFilter, filter};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One line of text each.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging for the whole process. `RUST_LOG`, where it is set, goes before `level`; whatever it says, of
/// the libraries only warnings and errors are logged.
///
/// A second call changes nothing.
pub fn start(format: Format, level: &str, color: bool) {
    let wanted = std::env::var("RUST_LOG").ok().filter(|wanted| !wanted.trim().is_empty());
    let filter = wanted
        .and_then(|wanted| EnvFilter::try_new(wanted).ok())
        .unwrap_or_else(|| EnvFilter::new(format!("warn,snapwarden={level}")));
    let subscriber = subscriber(format, filter, color, io::stderr);
    if let Err(error) = tracing::subscriber::set_global_default(subscriber) {
        tracing::debug!("logging was started before: {error}");
    }
}

fn subscriber<W>(
    format: Format,
    filter: EnvFilter,
    color: bool,
    writer: W,
) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let builder = fmt::fmt().with_env_filter(filter).with_writer(writer).with_ansi(color).with_target(false);
    let hush = filter::filter_fn(is_harmless);
    match format {
        Format::Text => Box::new(builder.finish().with(hush)),
        Format::Json => Box::new(builder.json().flatten_event(true).finish().with(hush)),
    }
}

/// The libraries' talk may quote whole requests, and an address or a header may be a secret: of theirs only what
/// they warn of is logged.
fn is_harmless(metadata: &Metadata<'_>) -> bool {
    let within = metadata.target().strip_prefix(env!("CARGO_PKG_NAME"));
    within.is_some_and(|within| within.is_empty() || within.starts_with("::"))
        || *metadata.level() <= Level::WARN
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn of_libraries_only_warnings_are_logged_whatever_is_asked_for() {
        for format in [Format::Text, Format::Json] {
            for wanted in ["trace", "trace,h2=trace,hyper_util::client=debug"] {
                let written = Written::default();
                let writer = written.clone();
                let subscriber = subscriber(format, EnvFilter::new(wanted), false, move || writer.clone());
                tracing::subscriber::with_default(subscriber, || {
                    tracing::trace!(target: "h2::codec::framed_write", "hush");
                    tracing::info!(target: "snapwarden_lookalike", "hush");
                    tracing::warn!(target: "hyper_util::client", "a warning");
                    tracing::trace!("our own");
                });
                let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
                assert_eq!(text.lines().count(), 2, "{text}");
                assert!(text.contains("a warning") && text.contains("our own"), "{text}");
            }
        }
    }
}
