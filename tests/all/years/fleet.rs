//! What a seed draws: zones and instances, policies, archives, and how often policies run. The text of the configuration is made
//! of it, so that an edit is another value.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::path::Path;

use jiff::SignedDuration;

use crate::crashes::Dice;

/// The state directory and the folders of archives are below it.
pub(super) const FOLDER: &str = "/simulated";

/// The bucket's host.
pub(super) const STORE: &str = "store.example";

/// Where the repository of restic is.
pub(super) const REPOSITORY: &str = "/simulated/restic";

/// How much time passes from one night to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    Daily,
    Weekly,
    Monthly,
}

impl Pace {
    pub(super) fn of(dice: &Dice) -> Self {
        *dice.any(&[Self::Daily, Self::Weekly, Self::Monthly])
    }

    pub(super) fn nights(self) -> u64 {
        match self {
            Self::Daily | Self::Weekly => 40,
            Self::Monthly => 28,
        }
    }

    pub(super) fn step(self, dice: &Dice) -> SignedDuration {
        let days = match self {
            Self::Daily => 1,
            Self::Weekly => 7,
            Self::Monthly => 28 + dice.below(6),
        };
        let minutes = i64::try_from(days * 24 * 60 + dice.below(120)).unwrap();
        SignedDuration::from_mins(minutes - if dice.one_in(6) { 180 } else { 0 })
    }

    fn schedule(self) -> &'static str {
        match self {
            Self::Daily => "30 2 * * *",
            Self::Weekly => "30 2 * * 0",
            Self::Monthly => "15 3 1 * *",
        }
    }

    /// A span of so many nights.
    fn span(self, nights: u64) -> String {
        match self {
            Self::Daily => format!("{nights}d"),
            Self::Weekly => format!("{nights}w"),
            Self::Monthly => format!("{nights}mo"),
        }
    }
}

/// An archive by what it is kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Store {
    Folder,
    Bucket,
    Repository,
}

impl Store {
    pub(super) const ALL: [Self; 3] = [Self::Folder, Self::Bucket, Self::Repository];

    /// The archive's name in the configuration.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Folder => "vault",
            Self::Bucket => "offsite",
            Self::Repository => "deduplicated",
        }
    }
}

/// An archive, and which copies it keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ArchivePart {
    pub(super) keep_last: Option<u64>,
    pub(super) keep_within: Option<u64>,
    /// In days.
    lock_for: Option<u64>,
}

/// A policy as sections of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PolicyPart {
    pub(super) name: &'static str,
    /// By section; the first has no name.
    pub(super) sections: BTreeMap<&'static str, BTreeMap<&'static str, String>>,
}

impl PolicyPart {
    fn new(name: &'static str) -> Self {
        Self { name, sections: BTreeMap::new() }
    }

    pub(super) fn set(&mut self, section: &'static str, key: &'static str, value: impl Display) {
        self.sections.entry(section).or_default().insert(key, value.to_string());
    }

    pub(super) fn get(&self, section: &'static str, key: &'static str) -> Option<&str> {
        Some(self.sections.get(section)?.get(key)?)
    }

    pub(super) fn settle(&self) -> SignedDuration {
        match self.get("guard", "settle") {
            Some(text) if text == quoted("0s") => SignedDuration::ZERO,
            _ => SignedDuration::from_hours(20),
        }
    }
}

/// The whole configuration as a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Parts {
    pub(super) archives: BTreeMap<Store, ArchivePart>,
    pub(super) policies: Vec<PolicyPart>,
    /// The audit log is kept for longer than the life, not for its 400 days.
    pub(super) keeps_audit: bool,
}

fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}

/// Zones, and what stands in the configuration at first.
#[derive(Debug, Clone)]
pub(super) struct Fleet {
    pub(super) zones: Vec<&'static str>,
    /// The zone, by its place, and the name of each instance at first, with its label `tier`.
    pub(super) instances: Vec<(usize, &'static str, &'static str)>,
    pub(super) pace: Pace,
    pub(super) parts: Parts,
    /// Whether the bucket keeps versions, and so can lock them.
    pub(super) keeps_versions: bool,
}

impl Fleet {
    pub(super) fn draw(dice: &Dice) -> Self {
        let pace = Pace::of(dice);
        let zones = if dice.one_in(3) { vec!["ch-gva-2", "de-fra-1"] } else { vec!["ch-gva-2"] };
        let kinds = [("web-1", "web"), ("db-1", "db"), ("web-2", "web"), ("db-2", "db"), ("ci-1", "none")];
        let count = usize::try_from(1 + dice.below(4)).unwrap();
        let mut instances: Vec<_> = kinds.iter().take(count).collect();
        if dice.one_in(3) && count < kinds.len() {
            instances.push(&kinds[kinds.len() - 1]);
        }
        let zone_of = |number: usize| number % zones.len();
        let instances =
            instances.iter().enumerate().map(|(number, (name, tier))| (zone_of(number), *name, *tier));
        let instances = instances.collect();
        let keeps_versions = dice.one_in(2);
        let archives = archives(dice, pace, keeps_versions);
        let policies = policies(dice, pace, &zones, &archives);
        let parts = Parts { archives, policies, keeps_audit: !dice.one_in(4) };
        Self { zones, instances, pace, parts, keeps_versions }
    }
}

fn archives(dice: &Dice, pace: Pace, keeps_versions: bool) -> BTreeMap<Store, ArchivePart> {
    let mut archives = BTreeMap::new();
    for store in Store::ALL {
        let is_drawn = match store {
            Store::Folder => !dice.one_in(4),
            Store::Bucket => dice.one_in(3),
            Store::Repository => dice.one_in(4),
        };
        if !is_drawn {
            continue;
        }
        let keep_last = (!dice.one_in(4)).then(|| 1 + dice.below(4));
        let keep_within = keep_last.filter(|_| dice.one_in(3)).map(|_| 1 + dice.below(6));
        let lock_for =
            (store == Store::Bucket && keeps_versions && dice.one_in(2)).then(|| 1 + dice.below(20));
        archives.insert(store, ArchivePart { keep_last, keep_within, lock_for });
    }
    let _ = pace;
    archives
}

fn policies(
    dice: &Dice,
    pace: Pace,
    zones: &[&'static str],
    archives: &BTreeMap<Store, ArchivePart>,
) -> Vec<PolicyPart> {
    let stores: Vec<Store> = archives.keys().copied().collect();
    let mut policies = Vec::new();
    let mut nightly = PolicyPart::new("nightly");
    if !dice.one_in(8) {
        nightly.set("", "create", true);
        nightly.set("select", "exclude_instances", "[\"ci-*\"]");
    }
    if !dice.one_in(6) {
        exports(dice, &mut nightly, &stores);
    }
    retention(dice, pace, &mut nightly);
    if dice.one_in(4) {
        nightly.set("promote", "name", quoted("{snapshot}"));
        nightly.set("promote", "keep", 1 + dice.below(3));
    }
    policies.push(nightly);
    if dice.one_in(2) {
        let mut databases = PolicyPart::new("databases");
        if dice.one_in(2) {
            databases.set("select", "labels", "{ tier = \"db\" }");
        } else {
            databases.set("select", "instances", "[\"db-*\"]");
        }
        if dice.one_in(4) {
            databases.set("", "create", true);
        }
        if dice.one_in(3) {
            exports(dice, &mut databases, &stores);
        }
        retention(dice, pace, &mut databases);
        policies.push(databases);
    }
    if dice.one_in(4) {
        let mut exporter = PolicyPart::new("exporter");
        exports(dice, &mut exporter, &stores);
        if exporter.sections.contains_key("export") {
            policies.push(exporter);
        }
    }
    if dice.one_in(5) {
        let mut sweep = PolicyPart::new("sweep");
        sweep.set("retention", "max_count", 3 + dice.below(6));
        sweep.set("retention", "failed_after", quoted(&pace.span(1)));
        policies.push(sweep);
    }
    // Whose each snapshot is follows from who asked for it only while one policy takes snapshots.
    let is_alone = policies.len() == 1 && policies[0].get("", "create").is_some();
    for policy in &mut policies {
        let ownership = if is_alone && dice.one_in(2) { "created" } else { "all" };
        policy.set("select", "ownership", quoted(ownership));
        policy.set("", "zones", format!("{zones:?}"));
        policy.set("", "schedule", quoted(pace.schedule()));
        let time_zone = *dice.any(&["UTC", "Europe/Zurich", "America/New_York", "Australia/Lord_Howe"]);
        policy.set("", "timezone", quoted(time_zone));
        if dice.one_in(5) {
            policy.set("", "deadline", quoted("30min"));
        }
        if dice.one_in(2) {
            policy.set("select", "orphans", quoted("apply"));
        }
        if !dice.one_in(3) {
            policy.set("guard", "max_delete_percent", 100);
        }
        if dice.one_in(6) {
            policy.set("guard", "settle", quoted("0s"));
        }
        if dice.one_in(8) {
            policy.set("guard", "expect_newest", quoted(&pace.span(2)));
        }
    }
    policies
}

fn exports(dice: &Dice, policy: &mut PolicyPart, stores: &[Store]) {
    let chosen: Vec<&str> = stores.iter().filter(|_| !dice.one_in(3)).map(|store| store.name()).collect();
    if chosen.is_empty() {
        return;
    }
    policy.set("export", "archives", format!("{chosen:?}"));
    policy.set("export", "snapshots", quoted(if dice.one_in(3) { "all" } else { "newest" }));
    if dice.one_in(6) {
        policy.set("export", "required", false);
    }
    policy.set("export", "concurrency", 1 + dice.below(2));
    if dice.one_in(4) {
        policy.set("export", "connections", 2);
    }
}

fn retention(dice: &Dice, pace: Pace, policy: &mut PolicyPart) {
    for _ in 0..=dice.below(3) {
        let count = 1 + dice.below(4);
        match dice.below(10) {
            0..3 => policy.set("retention", "keep_last", count),
            3 => policy.set("retention", "keep_daily", count),
            4 => policy.set("retention", "keep_weekly", count),
            5 => policy.set("retention", "keep_monthly", count),
            6 => policy.set("retention", "keep_yearly", count),
            7 => policy.set("retention", "keep_hourly", count),
            8 => policy.set("retention", "keep_within", quoted(&pace.span(count))),
            _ => policy.set("retention", "keep_within_monthly", quoted(&pace.span(2 * count))),
        }
    }
    if dice.one_in(4) {
        policy.set("retention", "max_age", quoted(&pace.span(3 + dice.below(6))));
    }
    if dice.one_in(4) {
        policy.set("retention", "max_count", 2 + dice.below(6));
    }
    if dice.one_in(3) {
        policy.set("retention", "min_keep", 1 + dice.below(3));
    }
    if dice.one_in(5) {
        policy.set("retention", "keep_oldest", false);
    }
    if dice.one_in(3) {
        policy.set("retention", "failed_after", quoted(&pace.span(1 + dice.below(2))));
    }
}

/// An edit of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Edit {
    /// Every count of a policy is 1.
    KeepOne,
    /// A rule is added that keeps more.
    KeepMore,
    /// The second policy is not there any more.
    Remove,
    /// The gate is open.
    NotRequired,
    /// Copies are kept for less long.
    OneCopy,
}

impl Edit {
    pub(super) const ALL: [Self; 5] =
        [Self::KeepOne, Self::KeepMore, Self::Remove, Self::NotRequired, Self::OneCopy];

    pub(super) fn of(self, parts: &Parts, dice: &Dice) -> Parts {
        let mut parts = parts.clone();
        let count = parts.policies.len();
        let policy = &mut parts.policies[usize::try_from(dice.below(count as u64)).unwrap()];
        match self {
            Self::KeepOne => {
                for (key, value) in policy.sections.entry("retention").or_default() {
                    if key.starts_with("keep_") && value.parse::<u64>().is_ok() {
                        "1".clone_into(value);
                    }
                }
            }
            Self::KeepMore if policy.sections.contains_key("retention") => {
                policy.set("retention", "keep_last", 9);
            }
            Self::Remove if count > 1 => drop(parts.policies.pop()),
            Self::NotRequired if policy.sections.contains_key("export") => {
                policy.set("export", "required", false);
            }
            Self::OneCopy => {
                for archive in parts.archives.values_mut() {
                    if archive.keep_last.is_some() {
                        (archive.keep_last, archive.keep_within) = (Some(1), None);
                    }
                }
            }
            _ => {}
        }
        if parts
            .policies
            .iter()
            .any(|policy| policy.sections.get("retention").is_some_and(BTreeMap::is_empty))
        {
            parts.policies.iter_mut().for_each(|policy| policy.sections.retain(|_, keys| !keys.is_empty()));
        }
        parts
    }
}

impl Parts {
    /// The configuration, with the state in this folder below [`FOLDER`], and the folder of the archive as well.
    pub(super) fn text(&self, state: &str, vault: &str, key_file: &Path) -> String {
        let keep_audit = if self.keeps_audit { "keep_audit = \"20y\"\n" } else { "" };
        let mut text = format!(
            "[state]\ndirectory = \"{FOLDER}/{state}\"\n{keep_audit}[coverage]\nexempt = [\"ci-*\"]\n"
        );
        for (store, ArchivePart { keep_last, keep_within, lock_for }) in &self.archives {
            let name = store.name();
            let mut add = |line: String| {
                let _ = writeln!(text, "{line}");
            };
            add(format!("[archives.{name}]"));
            match store {
                Store::Folder => add(format!("type = \"local\"\npath = \"{FOLDER}/{vault}\"")),
                Store::Bucket => add(format!(
                    "type = \"s3\"\nendpoint = \"https://{STORE}\"\nregion = \"r\"\nbucket = \"backups\"\nprefix = \"sw/\"\n\
                     credentials_file = \"{}\"",
                    key_file.display()
                )),
                Store::Repository => add(format!(
                    "type = \"restic\"\nrepository = \"{REPOSITORY}\"\npassword_file = \"/etc/snapwarden/restic-password\""
                )),
            }
            if let Some(days) = lock_for {
                add(format!("lock_for = \"{days}d\""));
            }
            if let Some(count) = keep_last {
                add(format!("[archives.{name}.retention]\nkeep_last = {count}"));
            }
            if let Some(days) = keep_within {
                add(format!("keep_within = \"{days}d\""));
            }
        }
        for PolicyPart { name, sections } in &self.policies {
            for (section, keys) in sections {
                let dot = if section.is_empty() { "" } else { "." };
                let _ = writeln!(text, "[policies.{name}{dot}{section}]");
                for (key, value) in keys {
                    let _ = writeln!(text, "{key} = {value}");
                }
            }
        }
        text
    }

    pub(super) fn policy(&self, name: &str) -> Option<&PolicyPart> {
        self.policies.iter().find(|policy| policy.name == name)
    }
}
