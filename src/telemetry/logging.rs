//! The log: on stderr, as text for people or as JSON for machines.
//!
//! Under systemd, where stderr leads to the journal, every line begins with its priority (`<3>` error, `<4>`
//! warning, `<6>` info, `<7>` debug), which the journal takes off again, and text lines leave out what the
//! journal knows anyway: the time, the level, colours.
//!
//! No message can forge a log line: control characters are escaped as [`printable`] does, and the further lines of a message with several are marked as such.

use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::io::{self, Write};

use tracing::field::Field;
use tracing::{Event, Level, Metadata, Subscriber, warn};
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::filter::{self, Targets};
use tracing_subscriber::fmt::format::{self, JsonFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatFields, FormattedFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::{LookupSpan, Scope};

use crate::text::{excerpt, printable, safe_json};

/// Begins the second and every further line of a message: nothing else of ours begins so.
const FURTHER_LINE: &str = "    | ";

/// The most characters of an invalid `RUST_LOG` that are shown.
const RUST_LOG_SHOWN_MAX: usize = 200;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Text
    Text,
    /// One JSON object per line
    Json,
}

/// Starts logging for the whole process. `RUST_LOG`, where it is set, overrides `level`; whatever it says, of
/// the libraries only warnings and errors are logged. One that can't be understood is warned about, and counts
/// as none.
///
/// Lines of the target `silent` are left out, unless `RUST_LOG` says otherwise.
///
/// `to` leads to stderr, and gets each event in one piece. A second call changes nothing.
pub fn start<W>(format: Format, level: &str, silent: Option<&str>, color: bool, to: W)
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let (filter, trouble) = wanted(std::env::var_os("RUST_LOG").as_deref(), level, silent);
    let subscriber = subscriber(format, filter, is_to_journal(), color, to);
    if let Err(error) = tracing::subscriber::set_global_default(subscriber) {
        tracing::debug!("logging was started before: {error}");
    }
    if let Some(trouble) = trouble {
        warn!("{trouble}");
    }
}

/// A message that is no log line and asks a person to act, as it is written to stderr: in JSON it looks like a log line, and
/// the journal gets its priority, which else would be that of a remark. Lines stay lines; other characters that could affect
/// a terminal are escaped.
pub fn complaint(format: Format, text: &str) -> String {
    let prefix = if is_to_journal() { priority(Level::ERROR) } else { "" };
    if format == Format::Json {
        let mut line = String::from(prefix);
        let message = serde_json::Map::from_iter([("message".to_owned(), text.into())]);
        // Writing to a String cannot fail.
        let _ = write_json(&mut line, Level::ERROR, message);
        return safe_json(&line).into_owned();
    }
    let mut safe = String::new();
    for (number, line) in text.lines().enumerate() {
        let program = if number == 0 { concat!(env!("CARGO_PKG_NAME"), ": ") } else { "" };
        let _ = writeln!(safe, "{prefix}{program}{}", printable(line));
    }
    safe
}

fn is_to_journal() -> bool {
    leads_to(std::env::var_os("JOURNAL_STREAM").as_deref(), stderr_identity())
}

/// What is logged, and what is wrong with `RUST_LOG`, if so.
fn wanted(rust_log: Option<&OsStr>, level: &str, silent: Option<&str>) -> (Targets, Option<String>) {
    let silent = silent.map_or_else(String::new, |target| format!(",{target}=off"));
    let usual = || format!("warn,snapwarden={level}{silent}").parse().unwrap_or_default();
    let Some(text) = rust_log.map(OsStr::to_string_lossy).filter(|text| !text.trim().is_empty()) else {
        return (usual(), None);
    };
    match text.parse() {
        Ok(filter) => (filter, None),
        Err(error) => {
            let trouble = format!(
                "`RUST_LOG` is `{}`, which can't be understood ({error}), so it counts as not set: write it like `info` or `snapwarden=debug`",
                excerpt(&text, RUST_LOG_SHOWN_MAX)
            );
            (usual(), Some(trouble))
        }
    }
}

/// Device and inode of our stderr.
fn stderr_identity() -> Option<(u64, u64)> {
    let found = rustix::fs::fstat(io::stderr()).ok()?;
    Some((found.st_dev, found.st_ino))
}

/// Whether `JOURNAL_STREAM`, as systemd sets it (`device:inode`), means this file. The variable alone says
/// nothing: it is inherited, also by those whose stderr was led elsewhere.
fn leads_to(journal_stream: Option<&OsStr>, file: Option<(u64, u64)>) -> bool {
    let named = journal_stream.and_then(|text| {
        let (device, inode) = text.to_str()?.split_once(':')?;
        Some((device.parse().ok()?, inode.parse().ok()?))
    });
    named.is_some() && named == file
}

fn subscriber<W>(
    format: Format,
    filter: Targets,
    is_to_journal: bool,
    color: bool,
    writer: W,
) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let builder = tracing_subscriber::fmt::fmt()
        .with_max_level(Level::TRACE)
        .with_writer(Lines { to: writer, format, is_to_journal })
        .with_ansi(color && !is_to_journal)
        .with_target(false)
        // A log that can't be written must not stop the work: saying so on stderr, where it failed, would.
        .log_internal_errors(false);
    let silence = filter::filter_fn(is_harmless);
    match format {
        Format::Text => {
            let line: fn(&FmtContext<'_, _, _>, Writer<'_>, &Event<'_>) -> fmt::Result =
                if is_to_journal { journal_line } else { text_line };
            Box::new(builder.fmt_fields(text_fields()).event_format(line).finish().with(filter).with(silence))
        }
        Format::Json => {
            let line: fn(&FmtContext<'_, _, _>, Writer<'_>, &Event<'_>) -> fmt::Result = json_line;
            Box::new(
                builder.fmt_fields(JsonFields::new()).event_format(line).finish().with(filter).with(silence),
            )
        }
    }
}

/// A JSON object: time, level, and the fields of the run and of the event side by side, so that `policy.name` stands in one
/// place whoever logs it.
fn json_line<S>(
    context: &FmtContext<'_, S, JsonFields>,
    mut writer: Writer<'_>,
    event: &Event<'_>,
) -> fmt::Result
where
    S: Subscriber + for<'s> LookupSpan<'s>,
{
    let mut all = serde_json::Map::new();
    let mut add =
        |fields: &str| all.extend(serde_json::from_str::<serde_json::Map<_, _>>(fields).unwrap_or_default());
    for span in context.event_scope().into_iter().flat_map(Scope::from_root) {
        if let Some(fields) = span.extensions().get::<FormattedFields<JsonFields>>() {
            add(fields);
        }
    }
    let mut own = String::new();
    context.format_fields(Writer::new(&mut own), event)?;
    add(&own);
    write_json(&mut writer, *event.metadata().level(), all)
}

/// Time, level and message come first.
fn write_json(
    writer: &mut dyn fmt::Write,
    level: Level,
    mut fields: serde_json::Map<String, serde_json::Value>,
) -> fmt::Result {
    let mut time = String::new();
    SystemTime.format_time(&mut Writer::new(&mut time))?;
    let message = fields.remove("message").unwrap_or_else(|| "".into());
    write!(writer, "{{\"timestamp\":\"{time}\",\"level\":\"{level}\",\"message\":{message}")?;
    for (name, value) in fields {
        write!(writer, ",{}:{value}", serde_json::Value::from(name))?;
    }
    writeln!(writer, "}}")
}

/// A line for people: time, level, and what the journal gets.
fn text_line<S, N>(context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    N: for<'w> FormatFields<'w> + 'static,
{
    let mut time = String::new();
    SystemTime.format_time(&mut Writer::new(&mut time))?;
    // To the second; JSON has the rest.
    let level = *event.metadata().level();
    write!(writer, "{}Z ", time.get(..19).unwrap_or(&time))?;
    match color_of(level).filter(|_| writer.has_ansi_escapes()) {
        Some(color) => write!(writer, "\u{1b}[{color}m{level:>5}\u{1b}[0m ")?,
        None => write!(writer, "{level:>5} ")?,
    }
    journal_line(context, writer, event)
}

/// Policy, message, reasons, and fields to search for: the journal has time and level already.
fn journal_line<S, N>(
    context: &FmtContext<'_, S, N>,
    mut writer: Writer<'_>,
    event: &Event<'_>,
) -> fmt::Result
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    N: for<'w> FormatFields<'w> + 'static,
{
    if let Some(policy) = policy_of(context) {
        write!(writer, "{policy}: ")?;
    }
    context.format_fields(writer.by_ref(), event)?;
    writeln!(writer)
}

/// By the codes of ANSI X3.64.
fn color_of(level: Level) -> Option<u8> {
    match level {
        Level::ERROR => Some(31),
        Level::WARN => Some(33),
        Level::INFO => Some(32),
        _ => None,
    }
}

/// The policy whose run an event belongs to. Its name has no blanks.
fn policy_of<S, N>(context: &FmtContext<'_, S, N>) -> Option<String>
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    N: for<'w> FormatFields<'w> + 'static,
{
    context.event_scope()?.find_map(|span| {
        let extensions = span.extensions();
        let fields = extensions.get::<FormattedFields<N>>()?;
        fields
            .split(' ')
            .find_map(|field| field.strip_prefix("policy.name="))
            .map(|name| name.trim_matches('"').to_owned())
    })
}

/// The message, the reasons in parentheses, and the rest as `name=value`, safe for a terminal.
fn text_fields() -> impl for<'w> FormatFields<'w> + Send + Sync + 'static {
    let write_field = |writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug| {
        let value = format!("{value:?}");
        match field.name() {
            "message" => {}
            "reasons" => return write!(writer, "({})", printable(value.trim_matches('"'))),
            name => return write!(writer, "{name}={}", printable(&value)),
        }
        for (number, line) in value.split('\n').enumerate() {
            if number > 0 {
                write!(writer, "\n{FURTHER_LINE}")?;
            }
            writer.write_str(&printable(line))?;
        }
        Ok(())
    };
    format::debug_fn(write_field).delimited(" ")
}

/// The libraries' messages may quote whole requests, and an address or a header may be a secret: of theirs only what
/// they warn of is logged.
fn is_harmless(metadata: &Metadata<'_>) -> bool {
    let within = metadata.target().strip_prefix(env!("CARGO_PKG_NAME"));
    within.is_some_and(|within| within.is_empty() || within.starts_with("::"))
        || *metadata.level() <= Level::WARN
}

/// Writes each event in one piece, with priorities where they are wanted.
struct Lines<W> {
    to: W,
    format: Format,
    is_to_journal: bool,
}

/// Takes one event.
struct Line<W> {
    to: W,
    format: Format,
    /// What each line begins with.
    prefix: &'static str,
}

impl<'w, W: MakeWriter<'w>> MakeWriter<'w> for Lines<W> {
    type Writer = Line<W::Writer>;

    fn make_writer(&'w self) -> Self::Writer {
        Line { to: self.to.make_writer(), format: self.format, prefix: "" }
    }

    fn make_writer_for(&'w self, metadata: &Metadata<'_>) -> Self::Writer {
        let prefix = if self.is_to_journal { priority(*metadata.level()) } else { "" };
        Line { to: self.to.make_writer_for(metadata), format: self.format, prefix }
    }
}

/// As in syslog(3).
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        Level::DEBUG | Level::TRACE => "<7>",
    }
}

impl<W: Write> Write for Line<W> {
    /// Takes a whole event, as the formatter hands it over.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let text = match self.format {
            Format::Text => text,
            Format::Json => safe_json(&text).into_owned().into(),
        };
        let mut lines = String::with_capacity(text.len() + 16);
        for line in text.split_inclusive('\n') {
            lines.push_str(self.prefix);
            lines.push_str(line);
        }
        // In one call, so that lines of several threads don't mix.
        self.to.write_all(lines.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
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

    /// Whether the log leads to the journal, and whether it is coloured.
    const PLAIN: (bool, bool) = (false, false);
    const COLORED: (bool, bool) = (false, true);
    const JOURNAL: (bool, bool) = (true, false);

    /// What is written while `work` is done.
    fn logged(
        format: Format,
        (is_to_journal, color): (bool, bool),
        wanted: &str,
        work: impl FnOnce(),
    ) -> String {
        let written = Written::default();
        let writer = written.clone();
        let filter = wanted.parse().unwrap();
        let subscriber = subscriber(format, filter, is_to_journal, color, move || writer.clone());
        tracing::subscriber::with_default(subscriber, work);
        let bytes = written.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn of_libraries_only_warnings_are_logged_whatever_is_asked_for() {
        for format in [Format::Text, Format::Json] {
            for wanted in ["trace", "trace,h2=trace,hyper_util::client=debug"] {
                let text = logged(format, PLAIN, wanted, || {
                    tracing::trace!(target: "h2::codec::framed_write", "hush");
                    tracing::info!(target: "snapwarden_lookalike", "hush");
                    tracing::warn!(target: "hyper_util::client", "a warning");
                    tracing::trace!("our own");
                });
                assert_eq!(text.lines().count(), 2, "{text}");
                assert!(text.contains("a warning") && text.contains("our own"), "{text}");
            }
        }
    }

    #[test]
    fn the_journal_gets_priorities_and_nothing_that_it_knows_itself() {
        let all = || {
            let _span = tracing::info_span!("policy_run", policy.name = "nightly").entered();
            tracing::error!("one");
            tracing::warn!(zone.name = %"ch-gva-2", "two");
            tracing::info!("three");
            tracing::debug!("four");
            tracing::trace!("five");
        };
        let span = "nightly: ";
        let expected = format!(
            "<3>{span}one\n<4>{span}two zone.name=ch-gva-2\n<6>{span}three\n<7>{span}four\n<7>{span}five\n"
        );
        assert_eq!(logged(Format::Text, JOURNAL, "trace", all), expected);
        let json = logged(Format::Json, JOURNAL, "trace", all);
        assert!(
            json.contains("\"message\":\"two\",\"policy.name\":\"nightly\",\"zone.name\":\"ch-gva-2\"}"),
            "{json}"
        );
        for (line, priority) in json.lines().zip(["<3>", "<4>", "<6>", "<7>", "<7>"]) {
            let rest = line.strip_prefix(priority).unwrap_or_else(|| panic!("{line}"));
            let value: serde_json::Value = serde_json::from_str(rest).unwrap();
            assert!(value["message"].is_string() && value["timestamp"].is_string(), "{line}");
        }
        assert_eq!(json.lines().count(), 5);
    }

    #[test]
    fn elsewhere_a_line_has_its_time_and_level() {
        let text = logged(Format::Text, PLAIN, "info", || tracing::warn!("well"));
        let (time, rest) = text.split_once(' ').unwrap();
        assert!(time.parse::<jiff::Timestamp>().is_ok(), "{text}");
        assert_eq!(rest, " WARN well\n");
    }

    #[test]
    fn a_message_makes_no_line_of_its_own_and_no_priority() {
        let name = "web\n<0>2026-11-01T12:00:00Z  INFO all is well\r\u{1b}[2K\u{202e}\u{9b}1m";
        let work = || {
            let _span = tracing::info_span!("step", name = %name).entered();
            tracing::warn!(name = %name, other = ?name, "failed on {name}");
        };
        for destination in [PLAIN, COLORED, JOURNAL] {
            let text = logged(Format::Text, destination, "info", work);
            let lines: Vec<&str> = text.lines().collect();
            let prefix = if destination == JOURNAL { "<4>" } else { "" };
            assert_eq!(lines.len(), 2, "{text}");
            assert!(lines[1].starts_with(&format!("{prefix}{FURTHER_LINE}<0>2026")), "{text}");
            for harmful in ['\r', '\u{202e}', '\u{9b}'] {
                assert!(!text.contains(harmful), "{text:?}");
            }
            assert!(!text.contains("\u{1b}[2K"), "{text:?}");
        }
        for destination in [PLAIN, JOURNAL] {
            let text = logged(Format::Json, destination, "info", work);
            assert_eq!(text.lines().count(), 1, "{text}");
            assert_eq!(
                text.trim_end().chars().filter(|c| printable(&c.to_string()) != c.to_string()).count(),
                0
            );
            let json = text.trim_start_matches("<4>");
            let value: serde_json::Value = serde_json::from_str(json).unwrap();
            assert_eq!(value["name"], name, "what was said can be read back");
        }
    }

    #[test]
    fn the_journal_is_where_stderr_leads_not_what_a_variable_claims() {
        let file = tempfile::tempfile().unwrap();
        let found = rustix::fs::fstat(file.as_fd()).unwrap();
        let identity = Some((found.st_dev, found.st_ino));
        let own = format!("{}:{}", found.st_dev, found.st_ino);
        let other = format!("{}:{}", found.st_dev, found.st_ino + 1);
        let cases = [
            (Some(own.as_str()), identity, true),
            (Some(other.as_str()), identity, false),
            (Some(own.as_str()), None, false),
            (Some(""), identity, false),
            (Some("1:x"), identity, false),
            (Some("9"), None, false),
            (None, identity, false),
            (None, None, false),
        ];
        for (variable, file, expected) in cases {
            assert_eq!(leads_to(variable.map(OsStr::new), file), expected, "{variable:?}");
        }
        assert!(stderr_identity().is_some());
    }

    #[test]
    fn a_rust_log_that_makes_no_sense_is_said_and_counts_as_none() {
        let cases = [
            (None, "warn,snapwarden=info", false),
            (Some("  "), "warn,snapwarden=info", false),
            (Some("snapwarden=debug"), "snapwarden=debug", false),
            (Some("snapwarden=loud\u{1b}"), "warn,snapwarden=info", true),
            (Some("a=b=c"), "warn,snapwarden=info", true),
        ];
        for (rust_log, expected, said) in cases {
            let (filter, trouble) = wanted(rust_log.map(OsStr::new), "info", None);
            let mut parts: Vec<String> = filter.to_string().split(',').map(str::to_owned).collect();
            parts.sort_by_key(|part| part.contains('='));
            assert_eq!(parts.join(","), expected, "{rust_log:?}");
            assert_eq!(trouble.is_some(), said, "{rust_log:?}: {trouble:?}");
            if let Some(trouble) = trouble {
                assert!(trouble.contains("`RUST_LOG`") && !trouble.contains('\u{1b}'), "{trouble}");
            }
        }
    }
}
