//! Copies of snapshots by what their files are named after.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::str::FromStr;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::snapshot::{InstanceId, SnapshotId, ZoneName};

/// The time in the names of files: whole seconds, in UTC.
pub(crate) const TIME: &str = "%Y%m%dT%H%M%SZ";

/// The snapshot that a copy is of, as the names of its files have it. As a text it is the path of these files in the archive,
/// without an ending: `<zone>/<instance id>/<created as 20261101T023000Z>-<snapshot id>`. Fractions of a second are dropped from
/// the time; the id keeps the names apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CopyId {
    /// The zone of the snapshot.
    pub zone: ZoneName,
    /// The instance that it was taken of.
    pub instance_id: InstanceId,
    /// When it was taken.
    pub created_at: Timestamp,
    /// The snapshot.
    pub snapshot_id: SnapshotId,
}

/// The text is no path of a copy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("it is not the path of a copy: zone/instance/time-snapshot")]
pub struct CopyIdError;

/// A set of copies in little memory: there may be hundreds of thousands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct CopySet {
    /// The sorted names in each folder, which has some.
    folders: BTreeMap<Folder, Vec<Name>>,
}

/// Where the copies of an instance are: `<zone>/<instance id>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Folder(ZoneName, InstanceId);

/// The name of a copy's files, without an ending: the second at which the snapshot was taken, and its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Name(i64, SnapshotId);

impl CopyId {
    /// The names of its files in their folder, without an ending.
    pub(crate) fn stem(&self) -> String {
        self.name().to_string()
    }

    fn folder(&self) -> Folder {
        Folder(self.zone.clone(), self.instance_id)
    }

    fn name(&self) -> Name {
        // Downwards, as a date drops the fraction, also before 1970.
        let second = self.created_at.as_nanosecond().div_euclid(1_000_000_000);
        Name(i64::try_from(second).unwrap_or(i64::MAX), self.snapshot_id)
    }

    fn new(Folder(zone, instance_id): &Folder, Name(second, snapshot_id): Name) -> Self {
        let created_at = Timestamp::from_second(second).unwrap_or(Timestamp::MAX);
        Self { zone: zone.clone(), instance_id: *instance_id, created_at, snapshot_id }
    }
}

impl Display for CopyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.folder(), self.name())
    }
}

impl FromStr for CopyId {
    type Err = CopyIdError;

    fn from_str(text: &str) -> Result<Self, CopyIdError> {
        let (folder, name) = text.rsplit_once('/').ok_or(CopyIdError)?;
        Ok(Self::new(&folder.parse()?, name.parse()?))
    }
}

impl Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.0, self.1)
    }
}

impl FromStr for Folder {
    type Err = CopyIdError;

    fn from_str(text: &str) -> Result<Self, CopyIdError> {
        let read = || {
            let (zone, instance) = text.split_once('/')?;
            Some(Self(zone.parse().ok()?, instance.parse().ok()?))
        };
        canonical(read(), text)
    }
}

impl Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = Timestamp::from_second(self.0).unwrap_or(Timestamp::MAX);
        write!(f, "{}-{}", at.strftime(TIME), self.1)
    }
}

impl FromStr for Name {
    type Err = CopyIdError;

    fn from_str(text: &str) -> Result<Self, CopyIdError> {
        let read = || {
            let (time, id) = text.split_once('-')?;
            Some(Self(read_time(time)?.as_second(), id.parse().ok()?))
        };
        canonical(read(), text)
    }
}

/// Accepts only the one form in which a value is written: two texts are two values.
fn canonical<T: Display>(read: Option<T>, text: &str) -> Result<T, CopyIdError> {
    read.filter(|value| value.to_string() == text).ok_or(CopyIdError)
}

/// The time in the name of a file.
pub(crate) fn read_time(text: &str) -> Option<Timestamp> {
    TimeZone::UTC.to_timestamp(DateTime::strptime(TIME, text).ok()?).ok()
}

impl CopySet {
    /// How many they are.
    pub fn len(&self) -> usize {
        self.folders.values().map(Vec::len).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.folders.is_empty()
    }

    /// Whether this one is among them.
    pub fn contains(&self, id: &CopyId) -> bool {
        self.folders.get(&id.folder()).is_some_and(|names| names.binary_search(&id.name()).is_ok())
    }

    /// All, by zone, instance and time.
    pub fn iter(&self) -> impl Iterator<Item = CopyId> {
        self.folders.iter().flat_map(|(folder, names)| names.iter().map(|name| CopyId::new(folder, *name)))
    }

    /// Takes one out.
    pub fn remove(&mut self, id: &CopyId) {
        if let Some(names) = self.folders.get_mut(&id.folder()) {
            names.retain(|name| *name != id.name());
        }
        self.folders.retain(|_, names| !names.is_empty());
    }

    /// Leaves those of these instances.
    pub fn retain_instances(&mut self, mut wanted: impl FnMut(InstanceId) -> bool) {
        self.folders.retain(|Folder(_, instance_id), _| wanted(*instance_id));
    }

    fn sorted(mut folders: BTreeMap<Folder, Vec<Name>>) -> Self {
        folders.retain(|_, names| !names.is_empty());
        for names in folders.values_mut() {
            names.sort_unstable();
            names.dedup();
            names.shrink_to_fit();
        }
        Self { folders }
    }
}

impl FromIterator<CopyId> for CopySet {
    fn from_iter<I: IntoIterator<Item = CopyId>>(ids: I) -> Self {
        let mut folders: BTreeMap<Folder, Vec<Name>> = BTreeMap::new();
        for id in ids {
            folders.entry(id.folder()).or_default().push(id.name());
        }
        Self::sorted(folders)
    }
}

impl<'de> Deserialize<'de> for CopySet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Copies;

        impl<'de> Visitor<'de> for Copies {
            type Value = CopySet;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("copies by zone and instance")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CopySet, A::Error> {
                BTreeMap::deserialize(MapAccessDeserializer::new(map)).map(CopySet::sorted)
            }

            /// Whole paths, as they were written before there were folders.
            fn visit_seq<A: SeqAccess<'de>>(self, mut paths: A) -> Result<CopySet, A::Error> {
                std::iter::from_fn(|| paths.next_element::<CopyId>().transpose()).collect()
            }
        }

        deserializer.deserialize_any(Copies)
    }
}

macro_rules! as_text {
    ($($name:ident),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }
    )*};
}

as_text!(CopyId, Folder, Name);

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str =
        "ch-gva-2/9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec/20261101T023000Z-b0c0ab00-0000-4000-8000-00000000f105";

    #[test]
    fn a_copy_is_read_in_the_one_form_in_which_it_is_written() {
        let id: CopyId = PATH.parse().unwrap();
        assert_eq!(id.to_string(), PATH);
        let fraction = CopyId { created_at: "2026-11-01T02:30:00.987Z".parse().unwrap(), ..id.clone() };
        assert_eq!(fraction.to_string(), PATH);
        for other in [
            "",
            "ch-gva-2",
            &PATH.to_uppercase(),
            &PATH.replace("20261101T02", "20261101T25"),
            &PATH.replace("023000Z", "023060Z"),
            &PATH.replace("ch-gva-2", ".."),
            &PATH.replace("9ee8cb98-", "9ee8cb98"),
            &format!("{PATH}.json"),
            &format!("/{PATH}"),
        ] {
            assert_eq!(other.parse::<CopyId>(), Err(CopyIdError), "{other}");
        }
    }

    #[test]
    fn a_set_knows_its_copies_by_their_names_and_is_the_same_when_it_is_read_back() {
        let id: CopyId = PATH.parse().unwrap();
        let ancient = CopyId { created_at: "1969-12-31T23:59:59.5Z".parse().unwrap(), ..id.clone() };
        let other = CopyId { snapshot_id: SnapshotId(uuid::Uuid::from_u128(7)), ..id.clone() };
        let all = [id.clone(), ancient.clone(), other.clone(), id.clone()];
        let mut set: CopySet = all.iter().cloned().collect();
        assert_eq!(set.len(), 3);
        let fraction = CopyId { created_at: "2026-11-01T02:30:00.987Z".parse().unwrap(), ..id.clone() };
        assert!(all.iter().chain([&fraction]).all(|id| set.contains(id)));
        let elsewhere = CopyId { zone: "de-fra-1".parse().unwrap(), ..id.clone() };
        assert!(!set.contains(&elsewhere));

        let text = serde_json::to_string(&set).unwrap();
        assert_eq!(serde_json::from_str::<CopySet>(&text).unwrap(), set);
        assert!(
            text.starts_with(r#"{"ch-gva-2/9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec":["19691231T235959Z-b0c0"#),
            "{text}"
        );
        let paths: Vec<String> = set.iter().map(|id| id.to_string()).collect();
        assert_eq!(serde_json::from_value::<CopySet>(paths.into()).unwrap(), set);
        for odd in [r#"["elsewhere"]"#, r#"{"ch-gva-2":[]}"#, r#"{"ch-gva-2/x":["y"]}"#, "7", "null"] {
            assert!(serde_json::from_str::<CopySet>(odd).is_err(), "{odd}");
        }

        set.remove(&fraction);
        assert!(!set.contains(&id) && set.contains(&ancient));
        set.remove(&ancient);
        set.remove(&other);
        assert!(set.is_empty());
        assert_eq!(set, CopySet::default());
    }
}
