//! Facts that `--help` and the manual pages share: exit statuses, environment, files, signals, examples.

use std::fmt::Write as _;

use crate::cli::exit::Exit;

/// The part of the program that a fact is about; a page has the facts of its command's topics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Topic {
    /// Reading the configuration.
    Configuration,
    /// Requests to the API.
    Api,
    /// Archives.
    Archives,
    /// The state directory.
    State,
    /// The service manager.
    Service,
    /// Output and logging.
    Output,
}

use Topic::{Api, Archives, Configuration, Output, Service, State};

/// Topic, name, meaning. Backticks enclose code.
pub(crate) type Facts = [(Topic, &'static str, &'static str)];

/// The environment variables that the program reads.
pub(crate) const ENVIRONMENT: &Facts = &[
    (Configuration, "SNAPWARDEN_CONFIG", "The configuration file, unless `--config` names one."),
    (
        State,
        "STATE_DIRECTORY",
        "The state directory, unless `directory` in `[state]` names one. systemd sets it.",
    ),
    (
        State,
        "SNAPWARDEN_SHARD",
        "The part of the instances that the process is for, such as `0/4`, unless `--shard` names it.",
    ),
    (
        State,
        "SNAPWARDEN_SHARDS, JOB_COMPLETION_INDEX",
        "The same in a pod of an Indexed Job of Kubernetes: how many shards there are, and which is this one. Kubernetes sets the \
         second.",
    ),
    (
        Configuration,
        "EXOSCALE_API_ENDPOINT",
        "The API's address, instead of `endpoint` in `[exoscale]`; `{zone}` stands for the zone's name.",
    ),
    (Api, "EXOSCALE_API_KEY, EXOSCALE_API_SECRET", "The API key and its secret, used before all others."),
    (Api, "EXOSCALE_API_KEY_FILE, EXOSCALE_API_SECRET_FILE", "Files with the key and the secret."),
    (
        Archives,
        "CREDENTIALS_DIRECTORY",
        "The folder of systemd's credentials, with `exoscale-api-key` and `exoscale-api-secret`, `archive-NAME` for \
         an archive, and `notify-NAME` for a notifier. systemd sets it.",
    ),
    (
        Archives,
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN",
        "The key of a bucket, if neither `credentials_file` of the archive nor a systemd credential gives one.",
    ),
    (
        Archives,
        "HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY",
        "The proxy for the API and for buckets, and what is asked without it. The daemon and the platform's metadata server \
         are always asked without it.",
    ),
    (Service, "NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID", "How to report to systemd, which sets them."),
    (Output, "RUST_LOG", "The log level; takes precedence over `--log-level`, `-q` and `-v`."),
    (Output, "NO_COLOR", "If set to anything, `--color auto` means no colors."),
    (Output, "COLUMNS", "The width of tables, if stdout is no terminal."),
];

/// The files that the program reads and writes.
pub(crate) const FILES: &Facts = &[
    (Configuration, "/etc/snapwarden/snapwarden.toml", "The configuration: see snapwarden.toml(5)."),
    (
        Configuration,
        "/etc/snapwarden/conf.d/, /etc/snapwarden/web.yml",
        "Further files, by convention: those that `include` names, and the one of `web_config_file`.",
    ),
    (
        Api,
        "/etc/snapwarden/exoscale-api-key, /etc/snapwarden/exoscale-api-secret",
        "The API key and its secret, if nothing else gives them. The service's unit makes its credentials of these files.",
    ),
    (
        State,
        "/var/lib/snapwarden/",
        "The state directory, with the files below. They are replaced atomically, and readable only by their owner. One \
         that cannot be read is an error that names it.",
    ),
    (
        State,
        "audit.jsonl, audit-YYYY-MM.jsonl",
        "The audit log of this month and of earlier ones: a line before and after each change.",
    ),
    (State, "policy-NAME.json, policy-NAME.N.jsonl", "The snapshots and templates that a policy created."),
    (State, "runs-NAME.json", "The results of a policy's last runs, and the listings that these accepted."),
    (State, "shard.json", "The part of the instances that the directory is about, if not all."),
    (State, "schedules.json", "Up to when the daemon served each schedule."),
    (State, "holds.json, allowances.json", "The holds and allowances of `hold` and `allow`."),
    (
        State,
        "controls.json",
        "The policies that `pause` paused, and those that `trigger` asks for until their runs begin.",
    ),
    (State, "notifications.json", "What notifiers were notified of, and is not known to be over."),
    (State, "archives.json", "The ids of the archives that were used, and the copies that they had."),
    (State, "daemon.json", "Where the daemon listens."),
    (State, "daemon.sock", "Where `status` asks the daemon, without TLS and a password."),
    (
        Archives,
        "snapwarden-archive.json",
        "The marker at the root of an archive: without it, the archive counts as not there.",
    ),
    (
        Archives,
        "ZONE/INSTANCE/TIME-SNAPSHOT.qcow2",
        "In an archive: the image of a snapshot, with its MD5 in `.qcow2.md5` beside it, and its manifest in `.json`.",
    ),
    (
        Archives,
        "ZONE/INSTANCE/TIME-SNAPSHOT.qcow2.part",
        "An image that is not complete yet; the next export continues it.",
    ),
];

/// The commands (none: all that may take a while), their signals, the effect.
const SIGNALS: [(&[&str], &str, &str); 7] = [
    (
        &["run", "demo"],
        "SIGTERM, SIGINT",
        "No new step begins, and steps in flight get `shutdown_grace`. A second signal ends the program at once, with \
         status 1.",
    ),
    (
        &["run", "demo"],
        "SIGHUP",
        "Reads the configuration again. If it is not valid, the old one stays in use, and the log says why. Runs in flight \
         continue with the old one. Another port is opened before the old one is closed; another state directory needs a \
         restart.",
    ),
    (
        &["once"],
        "SIGTERM, SIGINT",
        "No new step begins, and running steps finish. A second signal ends the program at once, with status 1.",
    ),
    (
        &["restore"],
        "SIGTERM, SIGINT",
        "Ends it with status 1. A file that it began to write is removed. An instance is reset as `revert` says.",
    ),
    (
        &["revert"],
        "SIGTERM, SIGINT",
        "Nothing of the instance is changed any more, unless that has begun: then it is ended first. A second signal ends the program \
         at once, with status 1.",
    ),
    (
        &["run", "once"],
        "SIGKILL",
        "As a crash: the audit log has a line of each step that began, and the next run continues downloads.",
    ),
    (&[], "SIGUSR1, SIGUSR2, SIGPIPE", "Ignored. If stdout or stderr is closed, the program continues."),
];

/// The signals of a command, and what they do; for the program (an empty command) those of all, with their commands.
pub(crate) fn signals(command: &str) -> impl Iterator<Item = (String, &'static str)> {
    SIGNALS.iter().filter_map(move |(commands, signals, effect)| {
        let name = match commands {
            [] => (*signals).to_owned(),
            _ if commands.contains(&command) => (*signals).to_owned(),
            _ if command.is_empty() => format!("{signals} ({})", commands.join(", ")),
            _ => return None,
        };
        Some((name, *effect))
    })
}

/// Beyond its help: the facts of a command.
pub(crate) struct Page {
    /// The command, as `archive list`; empty for the program itself.
    pub(crate) command: &'static str,
    /// Its topics.
    pub(crate) topics: &'static [Topic],
    /// Other exit statuses than 0, 1 and 2.
    pub(crate) exits: &'static [Exit],
    /// What it is for, and the arguments.
    pub(crate) examples: &'static [(&'static str, &'static str)],
    /// The commands to see also.
    pub(crate) related: &'static [&'static str],
}

const EVERYTHING: &[Topic] = &[Configuration, Api, Archives, State, Service, Output];
const ZONES: &[Topic] = &[Configuration, Api, Archives, State, Output];
const COPIES: &[Topic] = &[Configuration, Archives, State, Output];
const REMEMBERED: &[Topic] = &[Configuration, State, Output];
const CONFIGURED: &[Exit] = &[Exit::BadConfiguration];
const GUARDED: &[Exit] = &[Exit::Held, Exit::BadConfiguration];

/// The facts of a command; none if it has no page, which a test forbids.
pub(crate) fn page(command: &str) -> Option<&'static Page> {
    PAGES.iter().find(|page| page.command == command)
}

const fn command(
    command: &'static str,
    topics: &'static [Topic],
    exits: &'static [Exit],
    examples: &'static [(&'static str, &'static str)],
    related: &'static [&'static str],
) -> Page {
    Page { command, topics, exits, examples, related }
}

/// All pages.
#[rustfmt::skip]
pub(crate) const PAGES: &[Page] = &[
    command("", EVERYTHING, GUARDED, &[
        ("Check the configuration, the key and the archives; see what a run would do; do it.",
         "check --online\nplan\nonce"),
        ("Is db-1 backed up, where, since when?", "coverage db-1"),
        ("Why was that snapshot deleted, or why is it still there?", "explain 9ee8cb98"),
    ], &["run", "once", "plan", "status"]),
    command("run", EVERYTHING, CONFIGURED, &[
        ("Run the daemon in the foreground, with its log as JSON.", "run --log-format json"),
    ], &["status", "once", "pause", "trigger"]),
    command("once", ZONES, GUARDED, &[
        ("Run one policy, and let the guard allow up to 40 deletions.", "once nightly --allow-deletes 40"),
        ("Only the instances whose names begin with web-.", "once nightly --instance 'web-*'"),
    ], &["plan", "run"]),
    command("plan", ZONES, CONFIGURED, &[
        ("What would be deleted in a month?", "plan nightly --at 'in 30d' --only delete"),
        ("What would another configuration change?", "plan --candidate new.toml"),
    ], &["once", "simulate", "explain"]),
    command("check", ZONES, CONFIGURED, &[
        ("Is the file valid, and does everything that it names work?", "check --online"),
        ("The policy of an API role that allows what the policies need.", "check --print-role"),
    ], &["plan"]),
    command("simulate", ZONES, CONFIGURED, &[
        ("A picture of the snapshots of two years.",
         "simulate nightly --for 2y --output svg > nightly.svg"),
        ("Without an account, from nothing.", "simulate nightly --for 1y --empty"),
    ], &["plan"]),
    command("promote", ZONES, CONFIGURED, &[
        ("Make a template of a snapshot.", "promote 9ee8cb98 --zone ch-gva-2 --name web-golden"),
    ], &["restore"]),
    command("restore", ZONES, CONFIGURED, &[
        ("The newest copy of an instance, as a file.", "restore --latest db-1 --to db-1.qcow2"),
        ("As it was two days ago, as a template.",
         "restore --latest db-1 --before '2 days ago' \\\n    --to-template db-1-back --zone ch-gva-2"),
        ("The instance itself, after a question: its disk is replaced.",
         "restore --latest db-1 --to-instance db-1 --zone ch-gva-2"),
        ("Into a pipe.", "restore --latest db-1 --to - | zstd > db-1.qcow2.zst"),
    ], &["archive-list", "promote", "revert"]),
    command("revert", ZONES, CONFIGURED, &[
        ("The instance as it was at that snapshot.", "revert 9ee8cb98"),
    ], &["restore", "holds", "history"]),
    command("hold", ZONES, CONFIGURED, &[
        ("Keep a snapshot for a week.", "hold 9ee8cb98 --until 7d --reason 'ticket 4711'"),
    ], &["unhold", "holds"]),
    command("unhold", REMEMBERED, CONFIGURED, &[
        ("Let the policies decide again.", "unhold 9ee8cb98"),
    ], &["hold", "holds"]),
    command("holds", REMEMBERED, CONFIGURED, &[
        ("The snapshots on hold, for a script.", "holds --output json"),
    ], &["hold", "unhold"]),
    command("explain", ZONES, CONFIGURED, &[
        ("Why is it kept, or why was it deleted?", "explain 9ee8cb98"),
    ], &["history", "plan"]),
    command("history", COPIES, CONFIGURED, &[
        ("What was deleted last, and why?", "history --action delete"),
        ("What happened since yesterday?", "history --since yesterday"),
        ("How did snapshots end that no run deleted?", "history --action vanish"),
        ("Was the audit log changed?", "history --verify"),
    ], &["explain", "status"]),
    command("pause", REMEMBERED, CONFIGURED, &[
        ("Stop a policy, also a run of it in flight.", "pause nightly"),
    ], &["resume", "trigger"]),
    command("resume", REMEMBERED, CONFIGURED, &[
        ("Let it run again.", "resume nightly"),
    ], &["pause", "trigger"]),
    command("trigger", REMEMBERED, CONFIGURED, &[
        ("Have the daemon run a policy now, and look.", "trigger nightly\nstatus"),
    ], &["run", "once", "pause"]),
    command("allow", REMEMBERED, CONFIGURED, &[
        ("See what the guard blocked, and let it pass once.", "plan nightly\nallow nightly 60"),
        ("The same for the copies in an archive.",
         "archive prune --dry-run vault\nallow --archive vault 60"),
    ], &["plan", "archive-prune"]),
    command("archive", COPIES, GUARDED, &[
        ("The copies in all archives.", "archive list"),
    ], &["restore"]),
    command("archive list", COPIES, CONFIGURED, &[
        ("Which copies of an instance are there?", "archive list --instance db-1"),
    ], &["restore", "archive-verify"]),
    command("archive verify", COPIES, CONFIGURED, &[
        ("A tenth of the copies, beginning with those verified longest ago.",
         "archive verify vault --percent 10"),
    ], &["archive-list"]),
    command("archive copy", COPIES, CONFIGURED, &[
        ("Copy what another archive lacks.", "archive copy vault offsite"),
        ("The newest copy of each instance alone.", "archive copy vault offsite --newest"),
    ], &["archive-list", "archive-verify"]),
    command("archive rm", COPIES, CONFIGURED, &[
        ("Delete one copy, after a question.", "archive rm vault 9ee8cb98"),
        ("The same in a script, though nothing else is left of it.",
         "archive rm vault 9ee8cb98 --yes --losing only-copy"),
    ], &["archive-list", "archive-prune", "hold"]),
    command("archive adopt", COPIES, CONFIGURED, &[
        ("After its disk was replaced: look first, then take it over.",
         "archive list vault\narchive adopt vault"),
    ], &["archive-list"]),
    command("archive prune", COPIES, GUARDED, &[
        ("Which copies would be deleted, and why?", "archive prune --dry-run vault"),
    ], &["archive-list", "allow"]),
    command("shard", REMEMBERED, CONFIGURED, &[
        ("After the number of shards changed: what moves?", "--shard 0/4 shard adopt"),
    ], &["run", "once"]),
    command("shard adopt", REMEMBERED, CONFIGURED, &[
        ("After the number of shards changed: what moves?", "--shard 0/4 shard adopt"),
    ], &["run", "once", "holds"]),
    command("notify", &[Output], CONFIGURED, &[
        ("Does a message arrive?", "notify test ops"),
    ], &["status"]),
    command("notify test", &[Output], CONFIGURED, &[
        ("Does a message arrive?", "notify test ops"),
    ], &["status"]),
    command("coverage", ZONES, CONFIGURED, &[
        ("Is db-1 backed up, where, since when?", "coverage db-1"),
    ], &["plan", "archive-list", "status"]),
    command("status", REMEMBERED, CONFIGURED, &[
        ("Does anything need attention?", "status || echo look"),
        ("Does the daemon run? For the health of a container.", "status --live"),
    ], &["run", "history", "coverage"]),
    #[cfg(feature = "demo")]
    command("demo", &[Output], GUARDED, &[
        ("The daemon over a simulated zone, until Ctrl-C.", "demo"),
        ("One run of each policy, explained.", "demo --once"),
    ], &["run", "once", "plan"]),
    command("completions", &[], &[], &[
        ("For bash.", "completions bash > /etc/bash_completion.d/snapwarden"),
    ], &[]),
    command("man", &[], &[], &[
        ("Read the page of the configuration file.", "man snapwarden.toml | man -l -"),
        ("Write all pages, as a packager does.", "man --directory /usr/share/man"),
    ], &[]),
];

/// The exit statuses and the environment, at the end of the program's `--help`.
pub(crate) fn after_help() -> String {
    let exits = Exit::ALL.map(|exit| ((exit as u8).to_string(), exit.meaning()));
    let environment = ENVIRONMENT.iter().map(|(_, name, meaning)| ((*name).to_owned(), *meaning));
    let mut text = list("Exit status", exits);
    text.push('\n');
    text.push_str(&list("Environment", environment));
    text.push_str("\nFiles, signals and examples are in the manual pages: `snapwarden man | man -l -`");
    text
}

/// The signals, at the end of a command's `--help`.
pub(crate) fn signals_help(command: &str) -> String {
    list("Signals", signals(command)).trim_end().to_owned()
}

/// A heading and its entries, as clap shows options.
fn list(heading: &str, entries: impl IntoIterator<Item = (String, &'static str)>) -> String {
    let mut text = format!("{heading}:\n");
    for (name, meaning) in entries {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {name}\n          {meaning}");
    }
    text
}
