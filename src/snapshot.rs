//! Exoscale's snapshots, instances and zones, and their ids.
//!
//! These are the values after decoding: what the API may leave out is an `Option`, and an unknown
//! state keeps its text and is never acted on.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::str::FromStr;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// Its first 8 characters, for tables: commands take them for the id.
            pub fn short(self) -> String {
                format!("{:08x}", self.0.as_u128() >> 96)
            }
        }

        impl Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }
    };
}

id!(
    /// The id of a snapshot.
    SnapshotId
);
id!(
    /// The id of an instance.
    InstanceId
);
id!(
    /// The id of a template.
    TemplateId
);
id!(
    /// The id of an asynchronous operation.
    OperationId
);

/// A zone, such as `ch-gva-2`. Its text is safe in a host name and in a path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ZoneName(Arc<str>);

/// The text is no zone's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a zone's name has 1 to 63 lower-case letters, digits and inner hyphens, such as `ch-gva-2`")]
pub struct BadZoneName;

impl ZoneName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ZoneName {
    type Err = BadZoneName;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if plain && (1..=63).contains(&text.len()) && !text.starts_with('-') && !text.ends_with('-') {
            Ok(Self(text.into()))
        } else {
            Err(BadZoneName)
        }
    }
}

impl Display for ZoneName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl Serialize for ZoneName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ZoneName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// The state of a snapshot, in the API's words.
///
/// The steady state of a healthy snapshot is `exported` ("copied to object storage by the platform"), not
/// `ready`; both are good.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SnapshotState {
    /// Being taken.
    Snapshotting,
    /// Being copied to object storage.
    Exporting,
    /// Complete and usable; the steady state.
    Exported,
    /// Complete and usable; seen for a short time, or in older zones.
    Ready,
    /// Being deleted.
    Deleting,
    /// Deleted, but still listed for a moment.
    Deleted,
    /// Failed.
    Error,
    /// An unknown word, or none (empty): never acted on.
    Unknown(Box<str>),
}

impl SnapshotState {
    /// The API's word.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Snapshotting => "snapshotting",
            Self::Exporting => "exporting",
            Self::Exported => "exported",
            Self::Ready => "ready",
            Self::Deleting => "deleting",
            Self::Deleted => "deleted",
            Self::Error => "error",
            Self::Unknown(word) => word,
        }
    }

    /// Whether it is complete and usable.
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Exported | Self::Ready)
    }

    /// Whether it is expected to become good.
    pub fn is_in_flight(&self) -> bool {
        matches!(self, Self::Snapshotting | Self::Exporting)
    }
}

impl From<&str> for SnapshotState {
    fn from(word: &str) -> Self {
        match word {
            "snapshotting" => Self::Snapshotting,
            "exporting" => Self::Exporting,
            "exported" => Self::Exported,
            "ready" => Self::Ready,
            "deleting" => Self::Deleting,
            "deleted" => Self::Deleted,
            "error" => Self::Error,
            other => Self::Unknown(other.into()),
        }
    }
}

impl Display for SnapshotState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A snapshot of an instance's root disk, as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its id.
    pub id: SnapshotId,
    /// The name that the platform gave it; hostile text, not unique.
    pub name: Box<str>,
    /// When it was taken, by the API's clock.
    pub created_at: Timestamp,
    /// Its state at the time of the listing.
    pub state: SnapshotState,
    /// The size of the **disk** in GiB, not of what is stored.
    pub size_gib: Option<u64>,
    /// The instance whose disk it is; the API may leave it out.
    pub instance_id: Option<InstanceId>,
    /// Whether programs in the instance were made to write their data before; none if the API does not say.
    pub application_consistent: Option<bool>,
}

/// An instance, as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Its id.
    pub id: InstanceId,
    /// The name that people gave it; hostile text, not unique.
    pub name: Box<str>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The template that it was started from.
    pub template_id: Option<TemplateId>,
    /// Whether it belongs to an instance pool or an SKS node pool.
    pub is_managed: bool,
    /// When it was created; none if the API does not say.
    pub created_at: Option<Timestamp>,
}

/// All that is needed to build an instance again, beside its name, its labels, its template and its disk. Texts are hostile.
///
/// It is also a part of a manifest, hence the names of its fields.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// Family and size, such as `standard.medium`.
    pub instance_type: Option<String>,
    /// The id of the type.
    pub instance_type_id: Option<Uuid>,
    /// The size of the disk in GiB; a snapshot that was taken before the disk grew is smaller.
    pub disk_size_gib: Option<u64>,
    /// The security groups, which are the organization's in all zones.
    pub security_groups: Vec<Attached>,
    /// The private networks, which are of one zone.
    pub private_networks: Vec<Attached>,
    /// The elastic IPs, which are of one zone; their names are the addresses.
    pub elastic_ips: Vec<Attached>,
    /// The anti-affinity groups, which are the organization's in all zones.
    pub anti_affinity_groups: Vec<Attached>,
    /// Dedicated hosts, which are in one zone.
    pub deploy_target: Option<Attached>,
    /// The names of the SSH keys.
    pub ssh_keys: Vec<String>,
    /// Whether secure boot is enabled.
    pub secure_boot: Option<bool>,
    /// Whether it has a TPM.
    pub tpm: Option<bool>,
    /// The public addresses that it gets: `inet4`, `dual` or `none`.
    pub public_ip_assignment: Option<String>,
    /// Whether its snapshots are meant to be application-consistent.
    pub application_consistent_snapshots: Option<bool>,
    /// What it is a member of.
    pub manager: Option<Manager>,
    /// The user data for cloud-init, in base64. It often holds secrets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
}

/// Something that an instance is attached to, or a member of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Its id.
    pub id: Uuid,
    /// Its name or its address, if the API gives one; hostile text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// The instance pool or the SKS node pool that makes and removes an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manager {
    /// Its id.
    pub id: Option<Uuid>,
    /// `instance-pool` or `sks-nodepool`; hostile text.
    #[serde(rename = "type")]
    pub kind: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_state_survives_and_is_neither_good_nor_in_flight() {
        let state = SnapshotState::from("hibernating");
        assert_eq!(state.as_str(), "hibernating");
        assert!(!state.is_good() && !state.is_in_flight());
    }

    #[test]
    fn a_short_id_is_how_the_id_begins() {
        for id in ["01b1c9d9-0b43-4b23-9b2f-6f7f4b2a9a01", "00000000-0000-4000-8000-000000000001"] {
            assert_eq!(id.parse::<SnapshotId>().unwrap().short(), id[..8]);
        }
    }

    #[test]
    fn zone_names_are_safe_in_hosts_and_paths() {
        for good in ["ch-gva-2", "a", "at-vie-1"] {
            assert_eq!(good.parse::<ZoneName>().unwrap().as_str(), good);
        }
        for bad in ["", "..", "a/b", "A", "-a", "a-", "a.b", "é", &"a".repeat(64)] {
            assert!(bad.parse::<ZoneName>().is_err(), "{bad:?}");
        }
    }
}
