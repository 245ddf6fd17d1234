//! The command-line arguments.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::cli::manual;
use crate::cli::when::When;
use crate::policy::name::{ArchiveName, NotifierName, PolicyName};
use crate::policy::rate::parse_rate;
use crate::policy::select::Pattern;
use crate::policy::shard::Shard;
use crate::policy::span::Span;
use crate::restore::template::BootMode;
use crate::retention::verdict::Verdict;
use crate::run::archive_verify;
use crate::snapshot::{InstanceId, ZoneName};
use crate::telemetry::logging;

/// Creates, prunes, exports, verifies and promotes snapshots of Exoscale Compute instances.
///
/// Policies in the configuration file say which snapshots are kept, and where verified copies are stored. `run` is the daemon,
/// `once` does a single run, and `plan` shows beforehand what a run would do, and why. Data goes to stdout, everything else to
/// stderr. Times are RFC 3339 in UTC, sizes in JSON are bytes.
#[derive(Debug, Parser)]
#[command(name = "snapwarden", version, max_term_width = 110, after_long_help = manual::after_help())]
pub struct Arguments {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// The configuration file
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "SNAPWARDEN_CONFIG",
        default_value = "/etc/snapwarden/snapwarden.toml"
    )]
    pub config: PathBuf,
    /// Be for a part of the instances alone: number I of N, from 0, such as `0/4`, each with a state directory of its own
    #[arg(long, global = true, value_name = "I/N", env = "SNAPWARDEN_SHARD")]
    pub shard: Option<Shard>,
    /// The format of the data on stdout
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub output: OutputFormat,
    /// The format of log lines on stderr
    // The last one counts: the images begin their command line with one.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text", overrides_with = "log_format")]
    pub log_format: logging::Format,
    /// The least severe log lines to show
    #[arg(long, global = true, value_name = "LEVEL", value_parser = ["error", "warn", "info", "debug", "trace"])]
    pub log_level: Option<String>,
    /// Log only errors
    #[arg(short, long, global = true, conflicts_with_all = ["verbose", "log_level"])]
    pub quiet: bool,
    /// Log more; repeat for even more
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "log_level")]
    pub verbose: u8,
    /// When to use colors
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub color: Color,
}

/// The format of a command's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// Tables for people
    Text,
    /// JSON for programs
    Json,
    /// A picture; only `simulate` draws one
    Svg,
}

/// When to use colors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless `NO_COLOR` is set
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// The part of the work that a role is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RolePart {
    /// Create, export and promote: nothing is deleted
    Keeper,
    /// Delete snapshots and templates
    Pruner,
    /// Promote, restore and revert
    Restorer,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon: policies on their schedules, and the HTTP port
    #[command(after_long_help = manual::signals_help("run"))]
    Run,
    /// Run policies once, in the foreground
    ///
    /// With --instance the run is limited to some instances: it is planned over all of them, as ever, but takes, exports,
    /// promotes and deletes snapshots of these alone. The next run then compares with the last whole run, allowances stay, and
    /// archives are not pruned. `plan --instance` shows beforehand what it would do.
    #[command(after_long_help = manual::signals_help("once"))]
    Once {
        /// The policies to run [default: all enabled ones]
        #[arg(value_name = "POLICY")]
        policies: Vec<PolicyName>,
        /// Let the guard allow up to N deletions in this run; it still blocks a larger run
        #[arg(long, value_name = "N")]
        allow_deletes: Option<u64>,
        /// Only the instances with this ID or name, such as `web-*`
        #[arg(long, value_name = "GLOB", value_parser = |text: &str| Pattern::<InstanceId>::new(text))]
        instance: Option<Pattern<InstanceId>>,
    },
    /// Show what a run would do with each snapshot, and why; changes nothing
    Plan(Plan),
    /// Check the configuration file; changes nothing, but `--online` writes a probe into each archive and deletes it
    Check {
        /// Also test the zones, the credentials, each permission that the policies need, and each archive
        #[arg(long)]
        online: bool,
        /// Print, as JSON, the policy of a role that allows what the enabled policies need and nothing else, or a part of it
        ///
        /// It needs no network and no credentials. `keeper` is everything but deletions, `pruner` deletions alone, and
        /// `restorer` what `promote`, `revert`, and `restore` to a template or an instance need.
        #[arg(long, value_name = "PART", conflicts_with = "online")]
        print_role: Option<Option<RolePart>>,
    },
    /// Show which snapshots a policy would keep in the future, and for how long; changes nothing
    ///
    /// The simulation follows the policy's schedule and applies its rules at each run, beginning with the real snapshots
    /// of a zone. Just before each run it adds a snapshot of every selected instance, whether the policy itself or
    /// something else creates it. It assumes that every export succeeds, that no guard blocks a run, and that no run is
    /// late. Other policies still protect the snapshots that they keep, but do not run.
    ///
    /// `--output svg` draws a picture: `snapwarden simulate nightly --for 2y --output svg > nightly.svg`.
    Simulate(Simulate),
    /// Make a template of a snapshot now
    Promote(Promote),
    /// Restore a verified copy from an archive: to a file, to a template, or to an existing instance
    ///
    /// A file is written as FILE.part, verified, synced, and then renamed to FILE; existing files are never overwritten.
    /// This needs only the credentials of the archive. The image of a template is fetched by the platform from an archive
    /// of type `s3`: a copy from a local archive is stored there first. The template gets the boot mode and the login
    /// settings of the instance's original template, and the commands that build the whole instance again are printed.
    ///
    /// An instance is reset with such a template: what is on its disk is lost. A snapshot of it is taken before, put on hold for 30
    /// days, and exported to an archive. No policy with this state directory deletes in the zone meanwhile.
    ///
    /// Of an image that goes to the standard output the last MiB is held back until all of it is verified: if the status is not 0,
    /// what was written ends too early, and must not be used.
    Restore(Restore),
    /// Take an instance back to one of its snapshots: all that was written since is lost
    ///
    /// First a snapshot of the instance as it is now is taken, put on hold for 30 days, and exported to an archive. Then the instance is
    /// stopped, reverted, and started again if it ran. What it writes between that snapshot and its stop is lost: stop it yourself
    /// before, if that matters. No policy with this state directory deletes in the zone meanwhile.
    Revert(Revert),
    /// Put a snapshot on hold: no policy deletes it; an unknown one is refused, or taken with a warning if zones and archives can't be asked; works while the daemon runs
    Hold(Hold),
    /// Release a snapshot from its hold; needs no credentials, works while the daemon runs
    Unhold {
        /// The ID of the snapshot, the first 8 characters or more of it, or its name
        #[arg(value_name = "SNAPSHOT")]
        snapshot: String,
        /// Also remove the marks that other hosts put beside its copies in the archives: for hosts that are gone
        #[arg(long)]
        others: bool,
    },
    /// List the snapshots on hold; changes nothing
    Holds,
    /// Show all that is known of one snapshot, also of one that was deleted: verdicts, copies, holds, history; changes nothing
    ///
    /// Where the zones or the archives can't be asked, it shows what the state directory knows, and says what was not
    /// asked; it then exits with 1.
    Explain {
        /// The ID of the snapshot, the first 8 characters or more of it, or its name
        #[arg(value_name = "SNAPSHOT")]
        snapshot: String,
    },
    /// Show what was changed, when and why: the audit log; needs no credentials, changes nothing
    History(History),
    /// Pause a policy: no step of it begins any more, also of a run in flight, and what it kept stays kept; needs no credentials, works while the daemon runs
    ///
    /// As if `enabled = false` stood in the configuration, until `resume`, also over restarts. The deletions of other policies'
    /// runs that have not begun stop as well: their next runs decide. Exits with 2 if there is no such policy.
    Pause {
        /// The policy
        #[arg(value_name = "POLICY")]
        policy: PolicyName,
    },
    /// End the pause of a policy; needs no credentials, works while the daemon runs
    Resume {
        /// The policy
        #[arg(value_name = "POLICY")]
        policy: PolicyName,
    },
    /// Have the daemon run a policy now; needs no credentials
    ///
    /// The daemon begins the run within 2 seconds, or once after the run in flight, however often it is asked for. Without a
    /// daemon the request waits: one that starts within an hour begins the run. Exits with 0 once it is asked for, and with 2
    /// if there is no such policy, or it is paused or not enabled.
    Trigger {
        /// The policy
        #[arg(value_name = "POLICY")]
        policy: PolicyName,
    },
    /// Let the guard allow a policy's next run, once; needs no credentials, works while the daemon runs
    Allow(Allow),
    /// List, verify, prune or take over the copies in the archives
    Archive {
        /// The subcommand.
        #[command(subcommand)]
        command: ArchiveCommand,
    },
    /// Divide the instances among several processes
    Shard {
        /// The subcommand.
        #[command(subcommand)]
        command: ShardCommand,
    },
    /// Try the notifiers of the configuration
    Notify {
        /// The subcommand.
        #[command(subcommand)]
        command: NotifyCommand,
    },
    /// Show what each instance of the zones has, and what it lacks; exits with 1 if one lacks what it should have; changes nothing
    ///
    /// The newest good snapshot, the newest verified copy and where it is, which policies select it, and what is wrong: the
    /// worst first. `[coverage]` in the configuration names the instances that are meant to be without a backup.
    Coverage {
        /// The instances: IDs, the first 8 characters or more of them, or names [default: all]
        #[arg(value_name = "INSTANCE")]
        instances: Vec<String>,
    },
    /// Show the state of the running daemon; exits with 1 if something needs attention
    ///
    /// The daemon is found by its state directory, also if the configuration file is not valid or names another port by now.
    /// Without a daemon it shows what the directory remembers, and exits with 1 if a policy has a schedule.
    Status {
        /// Only ask whether the daemon's loop turns, for the health of a container: exits with 0, whatever the backups are like
        #[arg(long)]
        live: bool,
    },
    /// Try snapwarden without an account: the daemon, with a simulated zone that has months of history
    #[cfg(feature = "demo")]
    Demo {
        /// Run each policy once and exit, instead of running the daemon
        #[arg(long)]
        once: bool,
    },
    /// Print the completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print a manual page, or write them all
    Man {
        /// The page, such as `once`, `archive-list` or `snapwarden.toml` [default: snapwarden]
        #[arg(value_name = "PAGE")]
        page: Option<String>,
        /// Write all pages into the folders man1 and man5 of this directory, for packagers
        #[arg(long, value_name = "DIR", conflicts_with = "page")]
        directory: Option<PathBuf>,
    },
}

/// The subcommands of `shard`.
#[derive(Debug, Subcommand)]
pub enum ShardCommand {
    /// Make the state directory that of the shard that `--shard` names, or of all instances without it; says what moves; needs no
    /// credentials
    ///
    /// A state directory remembers for which shard it was made, and a run for another one is refused, since the holds and all
    /// else that keeps snapshots stay where they are. No daemon and no run may work on the directory meanwhile.
    Adopt,
}

/// The subcommands of `notify`.
#[derive(Debug, Subcommand)]
pub enum NotifyCommand {
    /// Send a sample to a notifier, and show what the other side answered; exits with 1 if it failed
    ///
    /// It takes half a minute if nothing answers. A notifier of type `healthchecks` gets a ping of the kind `log`, which changes
    /// no state there.
    Test {
        /// The notifier
        #[arg(value_name = "NAME")]
        name: NotifierName,
    },
}

/// Arguments of `plan`.
#[derive(Debug, Args)]
pub struct Plan {
    /// The policies to plan [default: all enabled ones]
    #[arg(value_name = "POLICY")]
    pub policies: Vec<PolicyName>,
    /// Plan as of this time instead of now, such as 2027-01-31T00:00:00Z or `in 30d`
    ///
    /// A date (midnight UTC) is a time, too, and so are `now`, `yesterday`, and a span back such as 36h or `2 days ago`.
    #[arg(long, value_name = "TIME")]
    pub at: Option<When>,
    /// Use the body of a list-snapshots response in a file; needs no network, credentials or state
    ///
    /// Without `ZONE=` the file is for the policy's first zone. All its snapshots count as created by snapwarden.
    #[arg(long, value_name = "[ZONE=]FILE")]
    pub snapshots: Vec<ZoneFile>,
    /// Use the body of a list-instances response in a file
    ///
    /// Without it, every instance that a snapshot names counts as listed.
    #[arg(long, value_name = "[ZONE=]FILE", requires = "snapshots")]
    pub instances: Vec<ZoneFile>,
    /// Show only the snapshots with this verdict; the sums are of all
    #[arg(long, value_name = "VERDICT", conflicts_with = "candidate")]
    pub only: Option<Only>,
    /// Show only the snapshots of the instances with this ID or name, such as `web-*`; the sums are of all
    #[arg(long, value_name = "GLOB", value_parser = |text: &str| Pattern::<InstanceId>::new(text), conflicts_with = "candidate")]
    pub instance: Option<Pattern<InstanceId>>,
    /// Show only the sums
    #[arg(long, conflicts_with_all = ["candidate", "only", "instance"])]
    pub summary: bool,
    /// Show only what would change with this configuration file
    #[arg(long, value_name = "FILE")]
    pub candidate: Option<PathBuf>,
    /// Play again a case about which the plan and the second judge disagreed: both verdicts for each snapshot; needs no
    /// configuration, network, credentials or state
    ///
    /// FILE is disagreement-POLICY-ZONE.json in the state directory. Exits with 3 if the two still disagree.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["policies", "at", "snapshots", "candidate", "only", "instance", "summary"])]
    pub facts: Option<PathBuf>,
}

/// A verdict of `plan`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Only {
    /// To be deleted
    Delete,
    /// Kept
    Keep,
    /// Ignored
    Ignore,
}

impl From<Only> for Verdict {
    fn from(only: Only) -> Self {
        match only {
            Only::Delete => Self::Delete,
            Only::Keep => Self::Keep,
            Only::Ignore => Self::Ignore,
        }
    }
}

/// A file that replaces a listing of a zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZoneFile {
    /// The zone; without it, the policy's first one.
    pub zone: Option<ZoneName>,
    /// The path.
    pub file: PathBuf,
}

impl From<&str> for ZoneFile {
    fn from(text: &str) -> Self {
        // A file name may contain `=` as well: only a valid zone name counts as one.
        let named = text.split_once('=').and_then(|(zone, file)| Some((zone.parse().ok()?, file)));
        match named {
            Some((zone, file)) => Self { zone: Some(zone), file: file.into() },
            None => Self { zone: None, file: text.into() },
        }
    }
}

/// Arguments of `simulate`.
#[derive(Debug, Args)]
pub struct Simulate {
    /// The policy
    #[arg(value_name = "POLICY")]
    pub policy: PolicyName,
    /// How far to simulate, such as 90d, 2y or 1y6mo
    #[arg(long = "for", value_name = "SPAN")]
    pub length: Span,
    /// The start, such as 2027-01-31T00:00:00Z, a date (midnight UTC), `now`, `yesterday` or a span back, such as 30d
    #[arg(long, value_name = "TIME", default_value = "now")]
    pub from: When,
    /// The zone [default: the policy's first one]
    #[arg(long)]
    pub zone: Option<ZoneName>,
    /// Start with the body of a list-snapshots response in a file; needs no network, credentials or state
    ///
    /// All its snapshots count as created by snapwarden.
    #[arg(long, value_name = "FILE")]
    pub snapshots: Option<PathBuf>,
    /// Use the body of a list-instances response in a file
    ///
    /// Without it, every instance that a snapshot names counts as listed.
    #[arg(long, value_name = "FILE", requires = "snapshots")]
    pub instances: Option<PathBuf>,
    /// Start without snapshots; needs no network, credentials or state
    ///
    /// One instance with a disk of 10 GiB is assumed, and no other policies.
    #[arg(long, conflicts_with = "snapshots")]
    pub empty: bool,
}

/// Arguments of `promote`.
#[derive(Debug, Args)]
pub struct Promote {
    /// The ID of the snapshot, the first 8 characters or more of it, or its name
    #[arg(value_name = "SNAPSHOT")]
    pub snapshot: String,
    /// The zone of the snapshot
    #[arg(long)]
    pub zone: ZoneName,
    /// The name of the template
    #[arg(long)]
    pub name: String,
    /// The description of the template
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
}

/// What is done before an instance is changed.
#[derive(Debug, Args)]
pub struct Safety {
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    /// Do not export the snapshot from before the change to an archive
    #[arg(long, conflicts_with = "copy_to")]
    pub without_copy: bool,
    /// Export the snapshot from before the change to this archive [default: the one that a policy exports the instance to, or the only one]
    #[arg(long, value_name = "ARCHIVE")]
    pub copy_to: Option<ArchiveName>,
}

/// Arguments of `revert`.
#[derive(Debug, Args)]
pub struct Revert {
    /// The ID of the snapshot, the first 8 characters or more of it, or its name
    #[arg(value_name = "SNAPSHOT")]
    pub snapshot: String,
    /// The zone of the snapshot [default: the policies' zones are searched]
    #[arg(long)]
    pub zone: Option<ZoneName>,
    /// What is done before.
    #[command(flatten)]
    pub safety: Safety,
}

/// Arguments of `restore`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("copy").required(true))]
#[command(group = clap::ArgGroup::new("destination").required(true))]
pub struct Restore {
    /// The ID of the snapshot, the first 8 characters or more of it, or its name
    #[arg(value_name = "SNAPSHOT", group = "copy")]
    pub snapshot: Option<String>,
    /// Restore the newest copy of this instance, given by its ID, the first 8 characters or more of it, or its name
    #[arg(long, value_name = "INSTANCE", group = "copy")]
    pub latest: Option<String>,
    /// Only snapshots taken before this time, such as 2027-01-31T00:00:00Z or `2 days ago`
    ///
    /// A date (midnight UTC, thus without that day) is a time, too, and so are `yesterday` (when it began, UTC) and a span
    /// back such as 36h.
    #[arg(long, value_name = "TIME", requires = "latest", conflicts_with = "snapshot")]
    pub before: Option<When>,
    /// Write this new file; `-` for the standard output
    #[arg(long, value_name = "FILE", group = "destination")]
    pub to: Option<PathBuf>,
    /// Make a template with this name
    #[arg(long, value_name = "NAME", group = "destination", requires = "zone")]
    pub to_template: Option<String>,
    /// Reset this instance of the zone: its ID, the first 8 characters or more of it, or its name
    ///
    /// What is on its disk is lost. Before that a snapshot of it is taken, put on hold for 30 days, and exported to an archive.
    #[arg(long, value_name = "INSTANCE", group = "destination", requires = "zone")]
    pub to_instance: Option<String>,
    /// The zone of the template or the instance
    #[arg(long, conflicts_with = "to")]
    pub zone: Option<ZoneName>,
    /// The boot mode of the template [default: as recorded in the manifest]
    #[arg(long, value_name = "MODE", conflicts_with = "to")]
    pub boot_mode: Option<BootMode>,
    /// Reset the instance also with the copy of another one
    #[arg(long)]
    pub from_other: bool,
    /// Read at most this much per second, such as 80MiB
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub bandwidth_limit: Option<NonZeroU64>,
    /// What is done before an instance is reset.
    #[command(flatten)]
    pub safety: Safety,
    /// Also if the disk is larger than the 100 GiB that templates are documented for
    #[arg(long, conflicts_with = "to")]
    pub force: bool,
    /// Use only this archive [default: the first with a good copy, local archives first]
    #[arg(long)]
    pub archive: Option<ArchiveName>,
}

/// Arguments of `hold`.
#[derive(Debug, Args)]
pub struct Hold {
    /// The ID of the snapshot, the first 8 characters or more of it, or its name
    #[arg(value_name = "SNAPSHOT")]
    pub snapshot: String,
    /// The end of the hold, such as 2027-01-31T00:00:00Z, a date (midnight UTC), or a span from now, such as 30d [default: no end]
    #[arg(long, value_name = "TIME")]
    pub until: Option<When>,
    /// The reason, shown by `holds` and `plan`
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// Arguments of `history`.
#[derive(Debug, Args)]
pub struct History {
    /// Only changes of this instance: its ID, the first 8 characters or more of it, or its name then
    #[arg(long, value_name = "INSTANCE")]
    pub instance: Option<String>,
    /// Only changes by this policy, which may be one that is not configured any more
    #[arg(long, value_name = "POLICY")]
    pub policy: Option<PolicyName>,
    /// Only changes since then, such as 2027-01-31T00:00:00Z, a date (midnight UTC), `yesterday` or a span back such as 36h or `2 days ago` [default: the newest 50; with --output json all]
    #[arg(long, value_name = "TIME")]
    pub since: Option<When>,
    /// Only changes of this kind, such as delete
    #[arg(long, value_name = "ACTION", value_parser = [
        "create", "export", "promote", "delete", "delete_template", "prune_copy", "copy", "restore", "stop_instance", "revert",
        "reset", "start_instance", "vanish", "remove_audit_file",
    ])]
    pub action: Option<String>,
    /// Instead: check that no line of the audit log was edited, moved, inserted or cut, by the hash that each has of the one before, and by the last line that the archives have
    #[arg(long, conflicts_with_all = ["instance", "policy", "since", "action"])]
    pub verify: bool,
}

/// Arguments of `allow`.
#[derive(Debug, Args)]
#[command(allow_missing_positional = true)]
pub struct Allow {
    /// The policy
    #[arg(value_name = "POLICY", required_unless_present = "archive", conflicts_with = "archive")]
    pub policy: Option<PolicyName>,
    /// The most deletions that its next run may make; the guard still blocks a larger run
    #[arg(value_name = "N")]
    pub deletes: u64,
    /// Instead of a policy: the next pruning of this archive's copies
    #[arg(long, value_name = "ARCHIVE")]
    pub archive: Option<ArchiveName>,
    /// Allow only this zone, with up to N deletions there
    #[arg(long)]
    pub zone: Option<ZoneName>,
    /// How long it stays allowed [default: 7 days, or a day after the next run if that is later]
    #[arg(long = "for", value_name = "SPAN")]
    pub lasts: Option<Span>,
}

/// Which copies are meant.
#[derive(Debug, Args)]
pub struct Copies {
    /// Only copies of this instance: its ID, the first 8 characters or more of it, or its name in the archives
    #[arg(long, value_name = "INSTANCE")]
    pub instance: Option<String>,
    /// Only copies of this zone's snapshots
    #[arg(long)]
    pub zone: Option<ZoneName>,
}

/// What is lost with a copy beside the copy itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Loss {
    /// Its snapshot is on hold
    Hold,
    /// A policy deletes snapshots only if this copy is there
    Gate,
    /// Nothing else is left of it: no other copy, and no snapshot
    OnlyCopy,
}

/// The subcommands of `archive`.
#[derive(Debug, Subcommand)]
pub enum ArchiveCommand {
    /// List the verified copies
    List {
        /// The archives [default: all]
        #[arg(value_name = "ARCHIVE")]
        archives: Vec<ArchiveName>,
        /// The copies
        #[command(flatten)]
        copies: Copies,
    },
    /// Read the images again and verify their checksums
    ///
    /// The result is recorded in the manifests: a corrupt copy counts no more, and one that was corrupt and is good again counts
    /// again. Exits with 1 if an image is corrupt or unreadable. Works while the daemon runs.
    Verify {
        /// The archives [default: all]
        #[arg(value_name = "ARCHIVE")]
        archives: Vec<ArchiveName>,
        /// Verify this percentage of the images of each archive, starting with the least recently verified
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=100))]
        percent: u64,
        /// Compare lengths, and in buckets each `ETag`, without reading the images
        ///
        /// It takes seconds and proves little: damage that leaves the length as it is, is not found. So nothing is recorded.
        #[arg(long, conflicts_with = "percent")]
        head: bool,
        /// How many images to read at a time
        #[arg(long, value_name = "N", default_value_t = archive_verify::CONCURRENCY)]
        concurrency: NonZeroUsize,
        /// Read at most this much per second of each archive, such as 80MiB [default: `bandwidth_limit` in `[archives.NAME.verify]`]
        #[arg(long, value_name = "RATE", value_parser = parse_rate, conflicts_with = "head")]
        bandwidth_limit: Option<NonZeroU64>,
        /// The copies
        #[command(flatten)]
        copies: Copies,
    },
    /// Copy verified images from one archive to another
    ///
    /// Each image is verified as it is written, by the MD5 in its manifest, and published last. What is there already is
    /// skipped, so is what the other archive's retention removed; what was interrupted is resumed. Needs no API credentials,
    /// works while the daemon runs.
    Copy {
        /// The archive to read
        #[arg(value_name = "FROM")]
        from: ArchiveName,
        /// The archive that gets the copies
        #[arg(value_name = "TO")]
        to: ArchiveName,
        /// Only the copy of this snapshot: its ID, the first 8 characters or more of it, or its name
        #[arg(long, value_name = "SNAPSHOT")]
        snapshot: Option<String>,
        /// Only the newest copy of each instance
        #[arg(long, conflicts_with = "snapshot")]
        newest: bool,
        /// How many images to copy at a time
        #[arg(long, value_name = "N", default_value_t = archive_verify::CONCURRENCY)]
        concurrency: NonZeroUsize,
        /// The copies
        #[command(flatten)]
        copies: Copies,
    },
    /// Delete one copy
    ///
    /// Its manifest remains, marked as pruned; a corrupt copy goes with its manifest. Asks first. If more is lost than one of
    /// several copies, it says what, and the answer has to name it: the hold on its snapshot, the gate that deletions of
    /// snapshots need it for, or the only copy. Works while the daemon runs.
    Rm {
        /// The archive
        #[arg(value_name = "ARCHIVE")]
        archive: ArchiveName,
        /// The ID of the snapshot, the first 8 characters or more of it, or its name
        #[arg(value_name = "SNAPSHOT")]
        snapshot: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// What may be lost with it; needed with --yes if anything is
        #[arg(long, value_name = "WHAT", value_delimiter = ',', requires = "yes")]
        losing: Vec<Loss>,
        /// The copies
        #[command(flatten)]
        copies: Copies,
    },
    /// Take over an archive: one that is new and empty, one that another state directory used, or one that lost copies
    ///
    /// Accepts what is there: from then on snapwarden stores and deletes again. Its marker, `snapwarden-archive.json`, is
    /// written if it is missing or damaged. Make sure first that the disk is mounted and the state directory is the right
    /// one: holds, and which snapshots snapwarden itself made, cannot be read from an archive. Needs no API credentials,
    /// works while the daemon runs. Reading and restoring never need this.
    Adopt {
        /// The archive
        #[arg(value_name = "ARCHIVE")]
        archive: ArchiveName,
    },
    /// Delete the copies that `[archives.NAME.retention]` does not keep, and show why
    ///
    /// Their manifests remain, marked as pruned. Needs no API credentials, works while the daemon runs. With --instance or
    /// --zone all copies are judged, as ever, and only those are deleted; allowances then stay for a pruning of all.
    Prune {
        /// The archives [default: all with a retention]
        #[arg(value_name = "ARCHIVE")]
        archives: Vec<ArchiveName>,
        /// Only show the copies that would be deleted
        #[arg(long)]
        dry_run: bool,
        /// The copies
        #[command(flatten)]
        copies: Copies,
    },
}

impl Command {
    /// Whether the log has a line per run and per change by default.
    fn logs_changes(&self) -> bool {
        match self {
            Self::Run | Self::Once { .. } | Self::Promote(_) | Self::Restore(_) | Self::Revert(_) => true,
            #[cfg(feature = "demo")]
            Self::Demo { once } => !once,
            _ => false,
        }
    }
}

impl Arguments {
    /// Whether the command prints its run for people, and no more was asked for: what is reported need not be logged as well.
    pub fn reports_its_run(&self) -> bool {
        let Global { output, log_format, log_level, verbose, .. } = &self.global;
        let is_for_people = *output == OutputFormat::Text && *log_format == logging::Format::Text;
        let is_run = matches!(self.command, Command::Once { .. });
        #[cfg(feature = "demo")]
        let is_run = is_run || matches!(self.command, Command::Demo { once: true });
        is_run && is_for_people && log_level.is_none() && *verbose == 0
    }

    /// The log level: as given, else `info` for commands that change something.
    pub fn log_level(&self) -> &str {
        if let Some(level) = &self.global.log_level {
            return level;
        }
        match (self.global.quiet, self.global.verbose) {
            (true, _) => "error",
            (false, 0) if self.command.logs_changes() => "info",
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
    fn the_command_line_is_valid() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_zone_before_the_file_is_a_zone_only_if_it_can_be_one() {
        let with = ZoneFile::from("ch-gva-2=a=b.json");
        assert_eq!((with.zone.unwrap().as_str(), with.file.to_str()), ("ch-gva-2", Some("a=b.json")));
        let without = ZoneFile::from("dir/a=b.json");
        assert_eq!((without.zone, without.file.to_str()), (None, Some("dir/a=b.json")));
    }
}
