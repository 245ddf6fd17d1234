//! Which snapshots a policy selects.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

use globset::{Glob, GlobMatcher};

use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId};

/// Every part that is given must match; an empty one matches everything.
#[derive(Debug, Clone, Default)]
pub struct Select {
    /// Instances by name or id.
    pub instances: Option<Vec<Pattern<InstanceId>>>,
    /// Instances to exclude, by name or id.
    pub exclude_instances: Vec<Pattern<InstanceId>>,
    /// Labels that the instance must have, with values that match.
    pub labels: BTreeMap<String, NameGlob>,
    /// Instances to exclude that have one of these labels with a value that matches.
    pub exclude_labels: BTreeMap<String, NameGlob>,
    /// Whether members of instance pools and SKS node pools are excluded.
    pub exclude_managed: bool,
    /// Snapshots by name.
    pub snapshot_names: Option<Vec<NameGlob>>,
    /// Snapshots to exclude, by name or id.
    pub exclude_snapshots: Vec<Pattern<SnapshotId>>,
    /// Whether only snapshots that this program created are selected.
    pub only_created: bool,
    /// Whether the rules apply to snapshots of instances that are not listed any more.
    pub judge_orphans: bool,
    /// Where `self` is used: the instance that this program runs on.
    pub this_machine: ThisMachine,
}

/// Where a selection uses `self`. Only the platform knows which instance that is, at run time:
/// [`Select::resolve`] replaces the word by its id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ThisMachine {
    /// In `instances`.
    pub is_selected: bool,
    /// In `exclude_instances`.
    pub is_excluded: bool,
    /// Why the instance is not known.
    pub unknown: Option<String>,
    /// The instance, once it is known.
    pub id: Option<InstanceId>,
}

/// A glob over names or values of labels: `*`, `?`, `[a-z]`, `{a,b}`; `*` also matches `/`, since names are not paths.
#[derive(Debug, Clone)]
pub struct NameGlob(GlobMatcher);

/// The most characters of a glob: as many as a name may have. It also bounds the automaton that a glob
/// becomes, which globset builds without a way to fail.
const GLOB_MAX: usize = 255;

/// The characters that are special in a glob.
const GLOB_CHARACTERS: [char; 5] = ['*', '?', '[', '{', '\\'];

impl NameGlob {
    /// Reads a glob.
    ///
    /// # Errors
    /// A text that explains why it is no glob.
    pub fn new(text: &str) -> Result<Self, String> {
        if text.chars().count() > GLOB_MAX {
            return Err(format!("it has more than {GLOB_MAX} characters"));
        }
        Glob::new(text).map(|glob| Self(glob.compile_matcher())).map_err(|error| error.kind().to_string())
    }

    /// Whether the whole of `name` matches.
    pub fn matches(&self, name: &str) -> bool {
        self.0.is_match(name)
    }

    fn text(&self) -> &str {
        self.0.glob().glob()
    }

    /// The part before the first character that is special in a glob.
    fn plain_beginning(&self) -> &str {
        self.text().split(GLOB_CHARACTERS).next().unwrap_or_default()
    }

    fn is_plain(&self) -> bool {
        !self.text().contains(GLOB_CHARACTERS)
    }

    /// Whether one name may match both. Globs are compared only by their beginnings.
    fn may_meet(&self, other: &Self) -> bool {
        let (mine, others) = (self.plain_beginning(), other.plain_beginning());
        match (self.is_plain(), other.is_plain()) {
            (true, _) => other.matches(self.text()),
            (false, true) => self.matches(other.text()),
            (false, false) => mine.starts_with(others) || others.starts_with(mine),
        }
    }

    /// Whether all that matches surely matches `other`, too.
    fn is_within(&self, other: &Self) -> bool {
        other.text() == "*" || self.text() == other.text() || (self.is_plain() && other.matches(self.text()))
    }
}

impl Display for NameGlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.glob().glob())
    }
}

impl<Id: Display> Display for Pattern<Id> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Name(glob) => glob.fmt(f),
        }
    }
}

/// An instance or a snapshot, by its id or by a glob of its name.
#[derive(Debug, Clone)]
pub enum Pattern<Id> {
    /// By id.
    Id(Id),
    /// By name.
    Name(NameGlob),
}

impl<Id: PartialEq + std::str::FromStr> Pattern<Id> {
    /// An id if the text is one, else a glob.
    ///
    /// # Errors
    /// A text that explains why it is no glob.
    pub fn new(text: &str) -> Result<Self, String> {
        text.parse().map(Self::Id).or_else(|_| NameGlob::new(text).map(Self::Name))
    }

    fn is_name(&self) -> bool {
        matches!(self, Self::Name(_))
    }

    /// Whether one instance or snapshot may match both: one that is known by its id may have any name.
    fn may_meet(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Id(mine), Self::Id(others)) => mine == others,
            (Self::Name(mine), Self::Name(others)) => mine.may_meet(others),
            _ => true,
        }
    }

    /// Whether all that matches is surely excluded by `exclusion`.
    fn is_within(&self, exclusion: &Self) -> bool {
        match (self, exclusion) {
            (Self::Id(mine), Self::Id(excluded)) => mine == excluded,
            (Self::Name(mine), Self::Name(excluded)) => mine.is_within(excluded),
            _ => false,
        }
    }

    pub(crate) fn matches(&self, id: &Id, name: Option<&str>) -> bool {
        match self {
            Self::Id(wanted) => wanted == id,
            Self::Name(glob) => name.is_some_and(|name| glob.matches(name)),
        }
    }
}

/// The instances that are meant to be without a backup: any of these names, ids and labels is enough.
#[derive(Debug, Clone, Default)]
pub struct Exemption {
    /// By name or id.
    pub instances: Vec<Pattern<InstanceId>>,
    /// Labels, with values that match.
    pub labels: BTreeMap<String, NameGlob>,
}

impl Exemption {
    /// Whether it includes this instance.
    pub fn includes(&self, instance: &Instance) -> bool {
        self.instances.iter().any(|pattern| pattern.matches(&instance.id, Some(&instance.name)))
            || self.labels.iter().any(|label| has_label(instance, label))
    }
}

/// Whether an instance has a label with a value that matches.
fn has_label(instance: &Instance, (key, glob): (&String, &NameGlob)) -> bool {
    instance.labels.get(key).is_some_and(|value| glob.matches(value))
}

impl Select {
    /// Replaces `self` by this machine's id.
    pub fn resolve(&mut self, this_machine: InstanceId) {
        if std::mem::take(&mut self.this_machine.is_selected) {
            self.instances.get_or_insert_default().push(Pattern::Id(this_machine));
        }
        if std::mem::take(&mut self.this_machine.is_excluded) {
            self.exclude_instances.push(Pattern::Id(this_machine));
        }
        self.this_machine.unknown = None;
        self.this_machine.id = Some(this_machine);
    }

    /// The labels that it depends on.
    pub fn label_keys(&self) -> impl Iterator<Item = &String> {
        self.labels.keys().chain(self.exclude_labels.keys())
    }

    /// Whether `self` is used and not resolved.
    pub fn is_in_doubt(&self) -> bool {
        self.this_machine.is_selected || self.this_machine.is_excluded
    }

    /// Whether the policy selects this instance. One that is not listed any more (`None`) has no name and
    /// no labels: only an id, or no condition at all, selects it. Since its name, its labels and its manager are unknown,
    /// any exclusion by one of these excludes it.
    ///
    /// While `self` is not resolved it may be any instance: it selects all and excludes none, so that the policy keeps
    /// too much rather than too little from other policies. The policy itself must do nothing then; `run` ensures that.
    pub fn selects_instance(&self, id: Option<InstanceId>, instance: Option<&Instance>) -> bool {
        let name = instance.map(|instance| &*instance.name);
        let any = |patterns: &[Pattern<InstanceId>]| {
            id.is_some_and(|id| patterns.iter().any(|pattern| pattern.matches(&id, name)))
        };
        let excluded_unlisted = self.exclude_managed
            || !self.exclude_labels.is_empty()
            || self.exclude_instances.iter().any(Pattern::is_name);
        let excluded = instance.map_or(excluded_unlisted, |instance| {
            (self.exclude_managed && instance.is_managed)
                || self.exclude_labels.iter().any(|label| has_label(instance, label))
        });
        (self.this_machine.is_selected || self.instances.as_ref().is_none_or(|patterns| any(patterns)))
            && !any(&self.exclude_instances)
            && !excluded
            && self.labels.iter().all(|label| instance.is_some_and(|instance| has_label(instance, label)))
    }

    /// Whether the policy selects this listed instance.
    pub(crate) fn selects_listed(&self, instance: &Instance) -> bool {
        self.selects_instance(Some(instance.id), Some(instance))
    }

    /// The patterns of `instances` and `labels` that none of these instances matches, as they are written.
    pub fn unmatched(&self, instances: &[&Instance]) -> Vec<String> {
        let none = |is_matched: &dyn Fn(&Instance) -> bool| !instances.iter().any(|one| is_matched(one));
        let patterns = self.instances.iter().flatten();
        let patterns = patterns
            .filter(|pattern| none(&|one| pattern.matches(&one.id, Some(&one.name))))
            .map(|pattern| format!("`{pattern}` in `instances`"));
        let labels = self.labels.iter().filter(|label| none(&|one| has_label(one, *label)));
        patterns.chain(labels.map(|(key, glob)| format!("`{key} = \"{glob}\"` in `labels`"))).collect()
    }

    /// Whether an instance may be selected by both; only what is surely different counts as such.
    pub(crate) fn may_overlap(&self, other: &Self) -> bool {
        if self.labels_differ(other) || other.labels_differ(self) {
            return false;
        }
        match (self.left_by(other), other.left_by(self)) {
            (Some(mine), Some(others)) => {
                mine.iter().any(|one| {
                    others.iter().any(|other| match (one, other) {
                        (Some(one), Some(other)) => one.may_meet(other),
                        // `self` may be any instance.
                        _ => true,
                    })
                })
            }
            (Some(left), None) | (None, Some(left)) => !left.is_empty(),
            (None, None) => true,
        }
    }

    /// Whether the other surely has other values of a label, or excludes these.
    fn labels_differ(&self, other: &Self) -> bool {
        self.labels.iter().any(|(key, glob)| {
            other.labels.get(key).is_some_and(|theirs| !glob.may_meet(theirs))
                || other.exclude_labels.get(key).is_some_and(|excluded| glob.is_within(excluded))
        })
    }

    /// The patterns of `instances` that the other does not exclude, `None` among them for `self`; `None` if there is no
    /// such list.
    fn left_by(&self, other: &Self) -> Option<Vec<Option<&Pattern<InstanceId>>>> {
        let is_left = |pattern: &&Pattern<InstanceId>| {
            !other.exclude_instances.iter().any(|excluded| pattern.is_within(excluded))
        };
        let this_machine = (self.this_machine.is_selected && !other.this_machine.is_excluded).then_some(None);
        let patterns = self.instances.as_ref()?;
        Some(patterns.iter().filter(is_left).map(Some).chain(this_machine).collect())
    }

    /// Whether the policy selects a snapshot of an instance that it selects.
    pub fn selects_snapshot(&self, snapshot: &Snapshot) -> bool {
        let excluded = |pattern: &Pattern<SnapshotId>| pattern.matches(&snapshot.id, Some(&snapshot.name));
        self.snapshot_names.as_ref().is_none_or(|globs| globs.iter().any(|glob| glob.matches(&snapshot.name)))
            && !self.exclude_snapshots.iter().any(excluded)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::SnapshotState;

    const WEB: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";
    const OTHER: &str = "11111111-2222-4333-8444-555555555555";

    fn instance(name: &str, labels: &[(&str, &str)]) -> Instance {
        Instance {
            id: WEB.parse().unwrap(),
            name: name.into(),
            labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            template_id: None,
            is_managed: false,
            created_at: None,
        }
    }

    fn labels(labels: &[(&str, &str)]) -> BTreeMap<String, NameGlob> {
        labels.iter().map(|(key, glob)| ((*key).to_owned(), NameGlob::new(glob).unwrap())).collect()
    }

    fn snapshot(name: &str) -> Snapshot {
        Snapshot {
            id: OTHER.parse().unwrap(),
            name: name.into(),
            created_at: jiff::Timestamp::UNIX_EPOCH,
            state: SnapshotState::Exported,
            size_gib: None,
            application_consistent: None,
            instance_id: None,
        }
    }

    fn patterns<Id: PartialEq + std::str::FromStr>(texts: &[&str]) -> Vec<Pattern<Id>> {
        texts.iter().map(|text| Pattern::new(text).unwrap()).collect()
    }

    #[test]
    fn globs_fit_whole_names_and_names_are_not_paths() {
        for (glob, name, fits) in [
            ("web-*", "web-1", true),
            ("web-*", "web-", true),
            ("web-*", "my-web-1", false),
            ("*", "../etc/passwd", true),
            ("*", "", true),
            ("*", ".hidden\n", true),
            ("web-?", "web-12", false),
            ("web-[0-9]", "web-7", true),
            ("{web,db}-1", "db-1", true),
            ("Web-1", "web-1", false),
            (r"\*", "*", true),
            (r"\*", "web", false),
        ] {
            assert_eq!(NameGlob::new(glob).unwrap().matches(name), fits, "{glob} on {name:?}");
        }
    }

    #[test]
    fn a_bad_glob_is_refused() {
        for glob in ["web-[", "{a,b", "[z-a]", &"*".repeat(256)] {
            assert!(NameGlob::new(glob).is_err(), "{glob:?}");
        }
    }

    #[test]
    fn an_instance_is_selected_if_every_given_part_fits() {
        let web = instance("web-1", &[("backup", "nightly")]);
        let backup = |glob: &str| labels(&[("backup", glob)]);
        for (what, select, selected) in [
            ("nothing is given", Select::default(), true),
            ("name", Select { instances: Some(patterns(&["db-*", "web-*"])), ..Select::default() }, true),
            ("other name", Select { instances: Some(patterns(&["db-*"])), ..Select::default() }, false),
            ("id", Select { instances: Some(patterns(&[WEB])), ..Select::default() }, true),
            ("other id", Select { instances: Some(patterns(&[OTHER])), ..Select::default() }, false),
            ("excluded name", Select { exclude_instances: patterns(&["*-1"]), ..Select::default() }, false),
            ("excluded id", Select { exclude_instances: patterns(&[WEB]), ..Select::default() }, false),
            ("label", Select { labels: backup("nightly"), ..Select::default() }, true),
            ("label by a glob", Select { labels: backup("{night,week}ly"), ..Select::default() }, true),
            ("label that exists", Select { labels: backup("*"), ..Select::default() }, true),
            (
                "label that is missing",
                Select { labels: labels(&[("tier", "*")]), ..Select::default() },
                false,
            ),
            ("excluded label", Select { exclude_labels: backup("n*"), ..Select::default() }, false),
            ("other value excluded", Select { exclude_labels: backup("none"), ..Select::default() }, true),
            (
                "one of two labels excluded",
                Select { exclude_labels: labels(&[("backup", "*"), ("tier", "*")]), ..Select::default() },
                false,
            ),
            (
                "label, and another excluded",
                Select { labels: backup("*"), exclude_labels: labels(&[("tier", "*")]), ..Select::default() },
                true,
            ),
            ("not managed", Select { exclude_managed: true, ..Select::default() }, true),
            ("other label", Select { labels: backup("weekly"), ..Select::default() }, false),
            (
                "name, but not label",
                Select {
                    instances: Some(patterns(&["web-*"])),
                    labels: backup("weekly"),
                    ..Select::default()
                },
                false,
            ),
        ] {
            assert_eq!(select.selects_instance(Some(web.id), Some(&web)), selected, "{what}");
        }
        let managed = Instance { is_managed: true, ..web };
        for exclude_managed in [false, true] {
            let select = Select { exclude_managed, ..Select::default() };
            assert_eq!(select.selects_instance(Some(managed.id), Some(&managed)), !exclude_managed);
        }
    }

    #[test]
    fn an_instance_is_exempt_by_its_name_its_id_or_a_label() {
        let web = instance("web-1", &[("backup", "none")]);
        for (names, keys, exempt) in [
            (&[][..], &[][..], false),
            (&["db-*", "web-*"], &[], true),
            (&[WEB], &[], true),
            (&[OTHER], &[], false),
            (&["db-*"], &[("backup", "n*")], true),
            (&[], &[("backup", "nightly"), ("tier", "*")], false),
        ] {
            let exemption = Exemption { instances: patterns(names), labels: labels(keys) };
            assert_eq!(exemption.includes(&web), exempt, "{names:?} {keys:?}");
        }
    }

    #[test]
    fn patterns_that_match_no_instance_are_named() {
        let (web, db) = (instance("web-1", &[("backup", "nightly")]), instance("db-1", &[]));
        let select = Select {
            instances: Some(patterns(&["web-*", "cache-*", WEB, OTHER])),
            labels: labels(&[("backup", "weekly"), ("tier", "*")]),
            exclude_instances: patterns(&["nothing"]),
            ..Select::default()
        };
        let of = |instances: &[&Instance]| select.unmatched(instances).len();
        assert_eq!(
            select.unmatched(&[&web, &db]),
            [
                "`cache-*` in `instances`",
                &format!("`{OTHER}` in `instances`"),
                "`backup = \"weekly\"` in `labels`",
                "`tier = \"*\"` in `labels`"
            ]
        );
        assert_eq!((of(&[]), Select::default().unmatched(&[]).len()), (6, 0));
    }

    #[test]
    fn this_machine_is_selected_and_left_out_once_it_is_known() {
        let (web, other) =
            (instance("web-1", &[]), Instance { id: OTHER.parse().unwrap(), ..instance("db-1", &[]) });
        let speaks =
            |select: &Select| [&web, &other].map(|of| select.selects_instance(Some(of.id), Some(of)));
        let this_machine =
            |is_selected, is_excluded| ThisMachine { is_selected, is_excluded, ..ThisMachine::default() };
        let none = || Some(Vec::new());
        for (what, mut select, doubted, resolved) in [
            (
                "selected",
                Select { instances: none(), this_machine: this_machine(true, false), ..Select::default() },
                [true, true],
                [true, false],
            ),
            (
                "selected beside a name",
                Select {
                    instances: Some(patterns(&["db-*"])),
                    this_machine: this_machine(true, false),
                    ..Select::default()
                },
                [true, true],
                [true, true],
            ),
            (
                "left out",
                Select { this_machine: this_machine(false, true), ..Select::default() },
                [true, true],
                [false, true],
            ),
            (
                "both",
                Select { instances: none(), this_machine: this_machine(true, true), ..Select::default() },
                [true, true],
                [false, false],
            ),
        ] {
            assert_eq!((select.is_in_doubt(), speaks(&select)), (true, doubted), "{what}, in doubt");
            select.resolve(web.id);
            assert_eq!((select.is_in_doubt(), speaks(&select)), (false, resolved), "{what}, known");
        }
    }

    #[test]
    fn an_instance_that_is_not_listed_has_no_name_and_no_labels() {
        let id = Some(WEB.parse().unwrap());
        let any_label = || labels(&[("backup", "*")]);
        for (what, select, selected) in [
            ("nothing is given", Select::default(), true),
            ("any name", Select { instances: Some(patterns(&["*"])), ..Select::default() }, false),
            ("its id", Select { instances: Some(patterns(&[WEB])), ..Select::default() }, true),
            ("a label", Select { labels: any_label(), ..Select::default() }, false),
            ("any label excluded", Select { exclude_labels: any_label(), ..Select::default() }, false),
            ("managed excluded", Select { exclude_managed: true, ..Select::default() }, false),
            (
                "any name excluded",
                Select { exclude_instances: patterns(&["*-x"]), ..Select::default() },
                false,
            ),
            ("its id excluded", Select { exclude_instances: patterns(&[WEB]), ..Select::default() }, false),
        ] {
            assert_eq!(select.selects_instance(id, None), selected, "{what}");
        }
        let by_id = Select { instances: Some(patterns(&[WEB])), ..Select::default() };
        assert!(!by_id.selects_instance(None, None), "a snapshot of no known instance fits no id");
        assert!(Select::default().selects_instance(None, None));
    }

    #[test]
    fn snapshots_are_selected_and_excluded_by_name_and_id() {
        let names = |globs: &[&str]| Some(globs.iter().map(|glob| NameGlob::new(glob).unwrap()).collect());
        for (what, select, selected) in [
            ("nothing is given", Select::default(), true),
            ("name", Select { snapshot_names: names(&["*_ROOT-*"]), ..Select::default() }, true),
            ("other name", Select { snapshot_names: names(&["manual-*"]), ..Select::default() }, false),
            ("excluded name", Select { exclude_snapshots: patterns(&["web*"]), ..Select::default() }, false),
            ("excluded id", Select { exclude_snapshots: patterns(&[OTHER]), ..Select::default() }, false),
            ("another excluded", Select { exclude_snapshots: patterns(&[WEB]), ..Select::default() }, true),
        ] {
            assert_eq!(select.selects_snapshot(&snapshot("web_ROOT-1_2026")), selected, "{what}");
        }
    }

    proptest! {
        #[test]
        fn reading_and_matching_never_panic(
            glob in prop_oneof![any::<String>(), r"([a-z*?,]|\{|\}|\[!?|\]|\\|-){0,255}"],
            name in any::<String>(),
        ) {
            if let Ok(glob) = NameGlob::new(&glob) {
                glob.matches(&name);
            }
        }
    }
}
