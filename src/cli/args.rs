//! What one may type.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use jiff::Timestamp;

use crate::policy::span::Span;
use crate::policy::{ArchiveName, PolicyName};
use crate::restore::template::BootMode;
use crate::snapshot::{SnapshotId, ZoneName};
use crate::telemetry::logging;

/// Keeps the snapshots of Exoscale Compute instances in order: prunes, exports, proves and promotes them.
#[derive(Debug, Parser)]
#[command(name = "snapwarden", version, max_term_width = 110)]
pub struct Arguments {
    /// What every command takes.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// The configuration.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "SNAPWARDEN_CONFIG",
        default_value = "/etc/snapwarden/snapwarden.toml"
    )]
    pub config: PathBuf,
    /// How data is printed.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub output: OutputFormat,
    /// How log lines look.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Which log lines there are: error, warn, info, debug or trace.
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
    /// Log errors alone.
    #[arg(short, long, global = true, conflicts_with_all = ["verbose", "log_level"])]
    pub quiet: bool,
    /// Log more; twice, even more.
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "log_level")]
    pub verbose: u8,
    /// When to colour.
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub color: Color,
}

/// How data is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
    /// A picture; of `simulate` alone.
    Svg,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A line of text.
    Text,
    /// A JSON object a line.
    Json,
}

impl From<LogFormat> for logging::Format {
    fn from(format: LogFormat) -> Self {
        match format {
            LogFormat::Text => Self::Text,
            LogFormat::Json => Self::Json,
        }
    }
}

/// Which log lines there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Somebody must act.
    Error,
    /// Something was coped with.
    Warn,
    /// A line per run and per change.
    Info,
    /// Decisions and requests.
    Debug,
    /// Everything.
    Trace,
}

/// When to colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless `NO_COLOR` is set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The daemon: runs policies by their schedules, and serves an HTTP port.
    Run,
    /// Run policies once, in the foreground.
    Once(Once),
    /// Show what a run would do, and why, snapshot by snapshot. Changes nothing.
    Plan(Plan),
    /// Read the configuration and say what is wrong with it. Changes nothing.
    Check(Check),
    /// Play a policy forward: what will exist, and when each snapshot goes. Changes nothing.
    ///
    /// The policy's own schedule goes on as it is written, and the real engine judges at each run, over the real
    /// snapshots of a zone. Just before each run a new snapshot comes into being of each instance that the policy
    /// selects, whether the policy takes it or something else does. Exports count as done, guards as passed, and no
    /// run as late. Other policies have their say about what goes, but no runs of their own.
    ///
    /// With `--output svg` it is a picture for a document: `snapwarden simulate nightly --for 2y --output svg > nightly.svg`.
    Simulate(Simulate),
    /// Make a template of one snapshot, now.
    Promote(Promote),
    /// Bring a verified copy back from an archive, as a file or as a template.
    ///
    /// A file is written as FILE.part, proved, synced, and only then given its name; nothing is overwritten, and it takes
    /// no credentials but those of the archive. A template is fetched by the platform from an archive of type `s3`: a copy
    /// from a folder is stored there first. It boots, and lets users in, as the template of the instance did.
    Restore(Restore),
    /// Pin a snapshot: whatever the policies say, it stays. Needs no credentials, works beside a running daemon.
    Hold(HoldSnapshot),
    /// Take the pin of a snapshot away. Needs no credentials, works beside a running daemon.
    Unhold(Unhold),
    /// Show which snapshots are pinned. Changes nothing.
    Holds,
    /// Let the guard pass a policy's next run, once. Needs no credentials, works beside a running daemon.
    Allow(Allow),
    /// What is in the archives.
    Archive {
        /// What to do.
        #[command(subcommand)]
        command: ArchiveCommand,
    },
    /// What the running daemon says of itself; exits with 1 if something needs attention.
    Status,
    /// Try it without an account: a simulated zone with months of history, in this process, and the daemon over it.
    #[cfg(feature = "demo")]
    Demo(Demo),
    /// Print the completions for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
}

/// `once`
#[derive(Debug, Args)]
pub struct Once {
    /// Which policies; all enabled ones if none is named.
    #[arg(value_name = "POLICY")]
    pub policies: Vec<PolicyName>,
    /// Let the guard pass a run of at most so many deletions; a larger one stays held whole.
    #[arg(long, value_name = "N")]
    pub allow_deletes: Option<u64>,
}

/// `plan`
#[derive(Debug, Args)]
pub struct Plan {
    /// Which policies; all enabled ones if none is named.
    #[arg(value_name = "POLICY")]
    pub policies: Vec<PolicyName>,
    /// Decide as of then instead of now.
    #[arg(long, value_name = "TIME")]
    pub at: Option<Timestamp>,
    /// Decide over the body of a list-snapshots answer in a file: no network, no credentials, no state. Without
    /// `ZONE=` it stands for the policy's first zone. All snapshots in it count as made by this program.
    #[arg(long, value_name = "[ZONE=]FILE")]
    pub snapshots: Vec<ZoneFile>,
    /// The body of a list-instances answer to go with it. Without it, every instance that a snapshot names
    /// counts as listed.
    #[arg(long, value_name = "[ZONE=]FILE", requires = "snapshots")]
    pub instances: Vec<ZoneFile>,
    /// Another configuration: shows only what it would change.
    #[arg(long, value_name = "FILE")]
    pub candidate: Option<PathBuf>,
}

/// A file that stands for a listing of a zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZoneFile {
    /// Of which zone; the policy's first one if none is named.
    pub zone: Option<ZoneName>,
    /// Which file.
    pub file: PathBuf,
}

impl std::str::FromStr for ZoneFile {
    type Err = std::convert::Infallible;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // A file's name may hold `=` as well: only what could be a zone's name is one.
        let named = text.split_once('=').and_then(|(zone, file)| Some((zone.parse().ok()?, file)));
        Ok(match named {
            Some((zone, file)) => Self { zone: Some(zone), file: file.into() },
            None => Self { zone: None, file: text.into() },
        })
    }
}

/// `check`
#[derive(Debug, Args)]
pub struct Check {
    /// Also try the credentials, and each permission that the policies need.
    #[arg(long)]
    pub online: bool,
}

/// `simulate`
#[derive(Debug, Args)]
pub struct Simulate {
    /// Which policy.
    #[arg(value_name = "POLICY")]
    pub policy: PolicyName,
    /// How far: such as 90d, 2y, 1y6mo.
    #[arg(long = "for", value_name = "SPAN")]
    pub length: Span,
    /// From when on, such as 2027-01-31T00:00:00Z.
    #[arg(long, value_name = "now|TIME", default_value = "now")]
    pub from: Start,
    /// In which of the policy's zones; the first one if none is named.
    #[arg(long, value_name = "Z")]
    pub zone: Option<ZoneName>,
    /// Begin with the body of a list-snapshots answer in a file: no network, no credentials, no state. All snapshots
    /// in it count as made by this program.
    #[arg(long, value_name = "FILE")]
    pub snapshots: Option<PathBuf>,
    /// The body of a list-instances answer to go with it. Without it, every instance that a snapshot names
    /// counts as listed.
    #[arg(long, value_name = "FILE", requires = "snapshots")]
    pub instances: Option<PathBuf>,
    /// Begin with nothing: no network, no credentials, no state. One instance with a disk of 10 GiB is imagined, and
    /// the policy is alone.
    #[arg(long, conflicts_with = "snapshots")]
    pub empty: bool,
}

/// Where a play begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// When the command is given.
    Now,
    /// Then.
    At(Timestamp),
}

impl std::str::FromStr for Start {
    type Err = jiff::Error;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "now" { Ok(Self::Now) } else { text.parse().map(Self::At) }
    }
}

/// `promote`
#[derive(Debug, Args)]
pub struct Promote {
    /// Which snapshot.
    #[arg(value_name = "SNAPSHOT")]
    pub snapshot: SnapshotId,
    /// Where it is.
    #[arg(long)]
    pub zone: ZoneName,
    /// The template's name.
    #[arg(long)]
    pub name: String,
    /// The template's description.
    #[arg(long)]
    pub description: Option<String>,
}

/// `restore`
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("which").required(true))]
#[command(group = clap::ArgGroup::new("form").required(true))]
pub struct Restore {
    /// Which snapshot.
    #[arg(value_name = "SNAPSHOT", group = "which")]
    pub snapshot: Option<SnapshotId>,
    /// The newest snapshot of an instance that has a copy: its id, or its name.
    #[arg(long, value_name = "INSTANCE", group = "which")]
    pub latest: Option<String>,
    /// Only snapshots that were taken before then, such as 2027-01-31T00:00:00Z.
    #[arg(long, value_name = "TIME", requires = "latest", conflicts_with = "snapshot")]
    pub before: Option<Timestamp>,
    /// To this new file.
    #[arg(long, value_name = "FILE", group = "form")]
    pub to: Option<PathBuf>,
    /// To a template of this name.
    #[arg(long, value_name = "NAME", group = "form", requires = "zone")]
    pub to_template: Option<String>,
    /// The template's zone.
    #[arg(long, value_name = "Z", requires = "to_template", conflicts_with = "to")]
    pub zone: Option<ZoneName>,
    /// How a machine of the template boots, where the copy's manifest does not say it: legacy or uefi.
    #[arg(long, value_name = "MODE", requires = "to_template", conflicts_with = "to")]
    pub boot_mode: Option<BootMode>,
    /// From this archive alone; else from the first that has a good copy, those in folders first.
    #[arg(long, value_name = "ARCHIVE")]
    pub archive: Option<ArchiveName>,
}

/// `hold`
#[derive(Debug, Args)]
pub struct HoldSnapshot {
    /// Which snapshot.
    #[arg(value_name = "SNAPSHOT")]
    pub snapshot: SnapshotId,
    /// From then on it counts no more, such as 2027-01-31T00:00:00Z; without it, it counts for ever.
    #[arg(long, value_name = "TIME")]
    pub until: Option<Timestamp>,
    /// Why, for those who come after.
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// `unhold`
#[derive(Debug, Args)]
pub struct Unhold {
    /// Which snapshot.
    #[arg(value_name = "SNAPSHOT")]
    pub snapshot: SnapshotId,
}

/// `allow`
#[derive(Debug, Args)]
pub struct Allow {
    /// Which policy.
    #[arg(value_name = "POLICY")]
    pub policy: PolicyName,
    /// Its next run passes if it would make at most so many deletions; a larger one stays held whole.
    #[arg(value_name = "N")]
    pub deletes: u64,
    /// Let only this zone pass, if it alone has at most so many deletions.
    #[arg(long, value_name = "Z")]
    pub zone: Option<ZoneName>,
}

/// `archive …`
#[derive(Debug, Subcommand)]
pub enum ArchiveCommand {
    /// List the verified exports.
    List(ArchiveList),
    /// Read the images again and prove them by their checksums. Marks in the manifests what came of it; exits with 1 if
    /// something is corrupt or can't be read. Works beside a running daemon.
    Verify(ArchiveVerify),
    /// Remove the copies that `[archives.NAME.retention]` lets go, and say why. Their manifests stay, marked. Needs no
    /// credentials of the API, works beside a running daemon.
    Prune(ArchivePrune),
}

/// `archive verify`
#[derive(Debug, Args)]
pub struct ArchiveVerify {
    /// Which archives; all if none is named.
    #[arg(value_name = "ARCHIVE")]
    pub archives: Vec<ArchiveName>,
    /// Read so many percent of the images of each, those first that were not proved for longest.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=100))]
    pub percent: u64,
}

/// `archive prune`
#[derive(Debug, Args)]
pub struct ArchivePrune {
    /// Which archives; all that have a retention if none is named.
    #[arg(value_name = "ARCHIVE")]
    pub archives: Vec<ArchiveName>,
    /// Only show what would go.
    #[arg(long)]
    pub dry_run: bool,
}

/// `archive list`
#[derive(Debug, Args)]
pub struct ArchiveList {
    /// Which archives; all if none is named.
    #[arg(value_name = "ARCHIVE")]
    pub archives: Vec<ArchiveName>,
}

/// `demo`
#[cfg(feature = "demo")]
#[derive(Debug, Args)]
pub struct Demo {
    /// One run of each policy, then the end, instead of the daemon.
    #[arg(long)]
    pub once: bool,
}

impl Command {
    /// Whether a line per run and per change is wanted without asking for it.
    fn tells_what_it_does(&self) -> bool {
        match self {
            Self::Run | Self::Once(_) | Self::Promote(_) | Self::Restore(_) => true,
            #[cfg(feature = "demo")]
            Self::Demo(demo) => !demo.once,
            _ => false,
        }
    }
}

impl Arguments {
    /// The level for the log: what was asked for, else a line per change where something may change.
    pub fn log_level(&self) -> &'static str {
        if let Some(level) = self.global.log_level {
            return match level {
                LogLevel::Error => "error",
                LogLevel::Warn => "warn",
                LogLevel::Info => "info",
                LogLevel::Debug => "debug",
                LogLevel::Trace => "trace",
            };
        }
        match (self.global.quiet, self.global.verbose) {
            (true, _) => "error",
            (false, 0) if self.command.tells_what_it_does() => "info",
            (false, 0) => "warn",
            (false, 1) => "info",
            (false, 2) => "debug",
            (false, _) => "trace",
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_zone_before_the_file_is_a_zone_only_if_it_can_be_one() {
        let with: ZoneFile = "ch-gva-2=a=b.json".parse().unwrap();
        assert_eq!((with.zone.unwrap().as_str(), with.file.to_str()), ("ch-gva-2", Some("a=b.json")));
        let without: ZoneFile = "dir/a=b.json".parse().unwrap();
        assert_eq!((without.zone, without.file.to_str()), (None, Some("dir/a=b.json")));
    }
}
