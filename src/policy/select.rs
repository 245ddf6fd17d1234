//! Which snapshots a policy speaks about.

use std::collections::BTreeMap;

use globset::{Glob, GlobMatcher};

use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId};

/// Every part that is given must match; an empty one matches everything.
#[derive(Debug, Clone, Default)]
pub struct Select {
    /// Instances by name or id.
    pub instances: Option<Vec<Pattern<InstanceId>>>,
    /// Instances left out, by name or id.
    pub exclude_instances: Vec<Pattern<InstanceId>>,
    /// Labels that the instance bears, with these values.
    pub labels: BTreeMap<String, String>,
    /// Snapshots by name.
    pub snapshot_names: Option<Vec<NameGlob>>,
    /// Snapshots left out, by name or id.
    pub exclude_snapshots: Vec<Pattern<SnapshotId>>,
    /// Whether snapshots of instances that are not listed any more are judged like others.
    pub judge_orphans: bool,
}

/// A glob over names: `*`, `?`, `[a-z]`, `{a,b}`; `*` also matches `/`, since names are not paths.
#[derive(Debug, Clone)]
pub struct NameGlob(GlobMatcher);

impl NameGlob {
    /// Reads a glob.
    ///
    /// # Errors
    /// A text that says what is wrong with it.
    pub fn new(text: &str) -> Result<Self, String> {
        Glob::new(text).map(|glob| Self(glob.compile_matcher())).map_err(|error| error.kind().to_string())
    }

    /// Whether the whole of `name` fits.
    pub fn matches(&self, name: &str) -> bool {
        self.0.is_match(name)
    }
}

/// A thing by its id, or by a glob of its name.
#[derive(Debug, Clone)]
pub enum Pattern<Id> {
    /// This one.
    Id(Id),
    /// Those with such a name.
    Name(NameGlob),
}

impl<Id: PartialEq + std::str::FromStr> Pattern<Id> {
    /// An id if the text is one, else a glob.
    ///
    /// # Errors
    /// A text that says what is wrong with the glob.
    pub fn new(text: &str) -> Result<Self, String> {
        text.parse().map(Self::Id).or_else(|_| NameGlob::new(text).map(Self::Name))
    }

    fn matches(&self, id: &Id, name: Option<&str>) -> bool {
        match self {
            Self::Id(wanted) => wanted == id,
            Self::Name(glob) => name.is_some_and(|name| glob.matches(name)),
        }
    }
}

impl Select {
    /// Whether the policy speaks about this instance. One that is not listed any more (`None`) has no name and
    /// no labels: only an id, or no condition at all, selects it, and only an id excludes it.
    pub fn selects_instance(&self, id: Option<InstanceId>, instance: Option<&Instance>) -> bool {
        let name = instance.map(|instance| &*instance.name);
        let any = |patterns: &[Pattern<InstanceId>]| {
            id.is_some_and(|id| patterns.iter().any(|pattern| pattern.matches(&id, name)))
        };
        let labelled = |(key, value): (&String, &String)| {
            instance.is_some_and(|instance| instance.labels.get(key) == Some(value))
        };
        self.instances.as_ref().is_none_or(|patterns| any(patterns))
            && !any(&self.exclude_instances)
            && self.labels.iter().all(labelled)
    }

    /// Whether the policy speaks about a snapshot of an instance that it selects.
    pub fn selects_snapshot(&self, snapshot: &Snapshot) -> bool {
        let excluded = |pattern: &Pattern<SnapshotId>| pattern.matches(&snapshot.id, Some(&snapshot.name));
        self.snapshot_names.as_ref().is_none_or(|globs| globs.iter().any(|glob| glob.matches(&snapshot.name)))
            && !self.exclude_snapshots.iter().any(excluded)
    }
}
