//! The API's JSON, decoded into the types of this program.
//!
//! ```json
//! {"snapshots": [
//!   {"id": "b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105", "name": "web-1_ROOT-1_20261101023000",
//!    "created-at": "2026-11-01T02:30:00Z", "state": "exported", "size": 50, "application-consistent": false,
//!    "instance": {"id": "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec"},
//!    "export": {"presigned-url": "https://…", "md5sum": "9e107d9d372bb6826bd81d3542a419d6"}}
//! ]}
//! ```
//!
//! The published description requires no property of any answer, so each may be missing here, and what is
//! not known is skipped. Two things make a listing invalid: an entry without an id (or a snapshot without a date), and
//! the same id twice. Lists are read entry by entry into small values, so that a listing of 100,000 snapshots costs
//! little more than its own bytes.
//!
//! `instance` in a snapshot is sparse (an id only) or a whole instance; `export` is short-lived and holds a
//! secret, so it is read for a single snapshot alone. A template's `url` may be such an address too and is
//! never read.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::marker::PhantomData;

use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use serde::de::{DeserializeOwned, DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::exoscale::error::is_markup;
use crate::exoscale::machine;
use crate::snapshot::{
    Instance, InstanceId, Machine, OperationId, Snapshot, SnapshotId, SnapshotState, TemplateId, ZoneName,
};
use crate::text::excerpt;

/// Characters of a reason that are shown; serde quotes text of the response in it.
const MAX_REASON: usize = 300;

/// JSON that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// There is nothing.
    #[error("it is empty where JSON was expected")]
    Empty,
    /// A page of a proxy, or an error page of the platform's edge.
    #[error("it is a page of HTML or XML where JSON was expected")]
    Markup,
    /// Longer than anything that makes sense.
    #[error("it is longer than {0} bytes")]
    TooLong(usize),
    /// Something in it is wrong; says what and where, by line and column.
    #[error("{0}")]
    Json(String),
}

impl DecodeError {
    fn new(bytes: &[u8], error: &serde_json::Error) -> Self {
        if bytes.trim_ascii().is_empty() {
            Self::Empty
        } else if is_markup(bytes) {
            Self::Markup
        } else {
            Self::Json(excerpt(&error.to_string(), MAX_REASON))
        }
    }
}

/// What a body of list-snapshots holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedSnapshots {
    /// Every snapshot, in the order listed.
    pub snapshots: Vec<Snapshot>,
    /// The instances as named inside the snapshots, each once, by id; the id stands for a name not given.
    pub mentioned: Vec<Instance>,
}

/// A snapshot, and what its last export left for a while.
#[derive(Debug, Clone)]
pub struct SnapshotDetails {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Where its image can be fetched, if the answer said.
    pub export: Option<ExportInfo>,
}

/// An instance, and what only a request for it alone gives.
#[derive(Debug, Clone)]
pub struct InstanceDetails {
    /// The instance.
    pub instance: Instance,
    /// Its state in the API's words, such as `running` or `stopped`; empty if the answer does not say.
    pub state: String,
    /// Its public IPv4 address.
    pub public_ip: Option<String>,
    /// All that is needed to build it again.
    pub machine: Machine,
    /// The fields that are too long or too many to be kept, and so are not in `machine`, or not wholly.
    pub left_out: Vec<&'static str>,
}

/// Where an exported image can be fetched for a while.
#[derive(Debug, Clone)]
pub struct ExportInfo {
    /// The address, which is itself a credential.
    pub presigned_url: SecretString,
    /// The MD5 of the whole file in hexadecimal digits, if given; an empty one counts as none.
    pub md5sum: Option<String>,
}

/// A template, as listed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Template {
    /// Unique in its zone.
    pub id: TemplateId,
    /// Hostile text, not unique.
    #[serde(default, deserialize_with = "or_empty")]
    pub name: String,
    /// Hostile text.
    pub description: Option<String>,
    /// When it was registered.
    pub created_at: Option<Timestamp>,
    /// In bytes (a snapshot's size is in GiB).
    #[serde(rename = "size", default, deserialize_with = "if_not_negative")]
    pub size_bytes: Option<u64>,
    /// `legacy` or `uefi`.
    pub boot_mode: Option<String>,
    /// The user name for logging in.
    pub default_user: Option<String>,
    /// Whether its instances accept a password.
    pub password_enabled: Option<bool>,
    /// Whether its instances accept an SSH key.
    pub ssh_key_enabled: Option<bool>,
    /// Whether application-consistent snapshots of its instances are possible.
    #[serde(default, rename = "application-consistent-snapshot-enabled", deserialize_with = "if_flag")]
    pub application_consistent: Option<bool>,
    /// The version of its operating system.
    #[serde(default, deserialize_with = "if_text")]
    pub version: Option<String>,
    /// Its own version.
    #[serde(default, deserialize_with = "if_text")]
    pub build: Option<String>,
    /// Who maintains it.
    #[serde(default, deserialize_with = "if_text")]
    pub maintainer: Option<String>,
}

/// The use of one kind of resource by the organization, and its limit.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Quota {
    /// The resource, such as `snapshot` or `template`.
    pub resource: String,
    /// How many there are; 0 if the answer does not say.
    #[serde(default, deserialize_with = "or_zero")]
    pub usage: u64,
    /// How many there may be; `None` is no limit (the API says -1), or one that is not given.
    #[serde(default, deserialize_with = "if_not_negative")]
    pub limit: Option<u64>,
}

/// A zone, as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zone {
    /// The name, which is valid in an address.
    pub name: ZoneName,
    /// The address of its API.
    pub api_endpoint: Option<String>,
    /// The address of its object store.
    pub sos_endpoint: Option<String>,
}

/// An operation that succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// As the response gave it, if it did.
    pub id: Option<OperationId>,
    /// The resource: a new snapshot or template, or the snapshot itself.
    pub reference: Option<Uuid>,
}

/// An event of the platform: the deletion of a snapshot. Its text is hostile, and bounded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeletionEvent {
    /// When.
    pub at: Option<Timestamp>,
    /// The name of the API key.
    pub key_name: Option<String>,
    /// The API key's id, which is no secret.
    pub key: Option<String>,
    /// The address of the user's mail.
    pub user: Option<String>,
    /// The network address that the request came from.
    pub address: Option<String>,
    /// The API's id of the request.
    pub request_id: Option<String>,
}

/// How a deletion ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deleted {
    /// By this operation.
    Done(Operation),
    /// 404: there is no such thing in the zone (any more).
    AlreadyGone,
}

/// The body of a promotion; `None` leaves a value to the platform.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PromoteRequest {
    /// The template's name, 1 to 255 characters.
    pub name: String,
    /// The template's description, at most 255 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The user name for logging in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_user: Option<String>,
    /// Whether its instances accept an SSH key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_key_enabled: Option<bool>,
    /// Whether its instances accept a password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_enabled: Option<bool>,
}

/// The body of registering a template from an image; `None` leaves a value to the platform.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RegisterRequest {
    /// The template's name, 1 to 255 characters.
    pub name: String,
    /// Where the platform fetches the image (qcow2); often a presigned address, hence a secret.
    #[serde(serialize_with = "exposed")]
    pub url: SecretString,
    /// The MD5 of the image, in hexadecimal digits.
    pub checksum: String,
    /// Whether its instances accept an SSH key.
    pub ssh_key_enabled: bool,
    /// Whether its instances accept a password.
    pub password_enabled: bool,
    /// `legacy` (the platform's default) or `uefi`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_mode: Option<String>,
    /// The template's description, at most 255 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The user name for logging in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_user: Option<String>,
    /// The disk's size in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Whether application-consistent snapshots of its instances are possible.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application_consistent_snapshot_enabled: Option<bool>,
    /// The version of its operating system, 1 to 255 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Its own version, 1 to 255 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build: Option<String>,
    /// Who maintains it, 1 to 255 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub maintainer: Option<String>,
}

/// The body of resetting an instance: its disk is wiped, and made of this template.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ResetRequest {
    /// The template.
    pub template: TemplateReference,
    /// The size of the disk in GiB; `None` leaves it to the platform.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_size: Option<u64>,
}

/// A template by its id.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct TemplateReference {
    /// The id.
    pub id: TemplateId,
}

fn exposed<S: serde::Serializer>(secret: &SecretString, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(secret.expose_secret())
}

/// An asynchronous operation, as answered.
///
/// ```json
/// {"id": "e2047130-b86e-11ef-83b3-0d8312b2c2d7", "state": "failure", "reason": "busy", "message": "…",
///  "reference": {"id": "b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105", "link": "/v2/snapshot/b0c0…", "command": "get-snapshot"}}
/// ```
#[derive(Debug, Deserialize)]
pub(super) struct RawOperation {
    pub(super) id: Option<OperationId>,
    #[serde(default, deserialize_with = "or_empty")]
    pub(super) state: String,
    #[serde(default, deserialize_with = "or_empty")]
    pub(super) reason: String,
    #[serde(default, deserialize_with = "or_empty")]
    pub(super) message: String,
    pub(super) reference: Option<Reference<Uuid>>,
}

impl RawOperation {
    /// The id of the thing that it is about.
    pub(super) fn reference(&self) -> Option<Uuid> {
        self.reference.as_ref()?.id
    }
}

/// Another resource, by its id at least.
#[derive(Debug, Deserialize)]
pub(super) struct Reference<Id> {
    pub(super) id: Option<Id>,
}

/// `null` as the empty text.
fn or_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A number; a negative one, by which the API says "none", as `None`.
fn if_not_negative<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Ok(Option::<i64>::deserialize(deserializer)?.and_then(|number| u64::try_from(number).ok()))
}

/// A flag; anything else is as good as none, since nothing else of an answer should be lost for it.
fn if_flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
    Ok(Option::<serde_json::Value>::deserialize(deserializer)?.and_then(|value| value.as_bool()))
}

/// A text that is not longer than the API allows; anything else is as good as none.
fn if_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let value = Option::<serde_json::Value>::deserialize(deserializer)?;
    Ok(value.as_ref().and_then(serde_json::Value::as_str).and_then(machine::short_text))
}

/// A time; anything else is as good as none.
fn if_time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    Ok(Option::<serde_json::Value>::deserialize(deserializer)?.and_then(|value| value.as_str()?.parse().ok()))
}

fn or_zero<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Ok(if_not_negative(deserializer)?.unwrap_or_default())
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawSnapshot {
    id: Option<SnapshotId>,
    name: Option<Box<str>>,
    created_at: Option<String>,
    state: Option<String>,
    #[serde(default, deserialize_with = "if_not_negative")]
    size: Option<u64>,
    instance: Option<RawInstance>,
    #[serde(default, deserialize_with = "if_flag")]
    application_consistent: Option<bool>,
}

#[derive(Deserialize)]
struct RawInstance {
    id: Option<InstanceId>,
    name: Option<Box<str>>,
    labels: Option<BTreeMap<String, String>>,
    template: Option<Reference<TemplateId>>,
    /// Any form of it says that there is a manager, but for an empty one.
    manager: Option<serde_json::Value>,
    #[serde(default, rename = "created-at", deserialize_with = "if_time")]
    created_at: Option<Timestamp>,
}

impl RawSnapshot {
    fn checked(self) -> Result<(Snapshot, Option<RawInstance>), String> {
        let name = self.name.unwrap_or_default();
        let id =
            self.id.ok_or_else(|| format!("the snapshot named `{}` has no `id`", excerpt(&name, 100)))?;
        let created_at = self.created_at.ok_or_else(|| format!("snapshot {id} has no `created-at`"))?;
        let created_at = created_at.parse().map_err(|_| {
            let shown = excerpt(&created_at, 50);
            format!("snapshot {id} has the `created-at` `{shown}`, which is not a time as in RFC 3339")
        })?;
        let instance_id = self.instance.as_ref().and_then(|instance| instance.id);
        let snapshot = Snapshot {
            id,
            name,
            created_at,
            state: SnapshotState::from(self.state.unwrap_or_default().as_str()),
            size_gib: self.size,
            instance_id,
            application_consistent: self.application_consistent,
        };
        Ok((snapshot, self.instance))
    }
}

impl RawInstance {
    fn named(self) -> Option<Instance> {
        let id = self.id?;
        Some(Instance {
            id,
            name: self.name.unwrap_or_else(|| id.to_string().into()),
            labels: self.labels.unwrap_or_default(),
            template_id: self.template.and_then(|template| template.id),
            is_managed: self.manager.is_some_and(|manager| {
                manager.as_object().is_none_or(|fields| fields.values().any(|value| !value.is_null()))
            }),
            created_at: self.created_at,
        })
    }

    fn checked(self) -> Result<Instance, String> {
        let shown = excerpt(self.name.as_deref().unwrap_or_default(), 100);
        self.named().ok_or_else(|| format!("the instance named `{shown}` has no `id`"))
    }
}

/// Reads a body of list-snapshots.
///
/// # Errors
/// [`DecodeError`], which says where and what.
pub fn decode_snapshots(bytes: &[u8]) -> Result<ListedSnapshots, DecodeError> {
    let mut snapshots: Vec<Snapshot> = Vec::new();
    let mut seen = HashSet::new();
    let mut mentioned: BTreeMap<InstanceId, RawInstance> = BTreeMap::new();
    each(bytes, "snapshots", |raw: RawSnapshot| {
        let (snapshot, instance) = raw.checked()?;
        if !seen.insert(snapshot.id) {
            return Err(format!("snapshot {} is listed twice", snapshot.id));
        }
        if let Some((id, instance)) = instance.and_then(|instance| Some((instance.id?, instance))) {
            // Snapshots may mention the same instance with a name or without one: the first name counts.
            match mentioned.get_mut(&id) {
                None => drop(mentioned.insert(id, instance)),
                Some(known) if known.name.is_none() && instance.name.is_some() => *known = instance,
                Some(_) => {}
            }
        }
        snapshots.push(snapshot);
        Ok(())
    })?;
    Ok(ListedSnapshots {
        snapshots,
        mentioned: mentioned.into_values().filter_map(RawInstance::named).collect(),
    })
}

/// Reads a body of list-instances.
///
/// # Errors
/// [`DecodeError`], which says where and what.
pub fn decode_instances(bytes: &[u8]) -> Result<Vec<Instance>, DecodeError> {
    let mut instances = Vec::new();
    let mut seen = HashSet::new();
    each(bytes, "instances", |raw: RawInstance| {
        let instance = raw.checked()?;
        if !seen.insert(instance.id) {
            return Err(format!("instance {} is listed twice", instance.id));
        }
        instances.push(instance);
        Ok(())
    })?;
    Ok(instances)
}

pub(super) fn decode_snapshot(bytes: &[u8]) -> Result<SnapshotDetails, DecodeError> {
    let (snapshot, _) = one(bytes, RawSnapshot::checked)?;
    // Any shape of it is accepted, so that no error can quote the address in it.
    let body = one(bytes, Ok::<serde_json::Value, String>)?;
    let text = |name: &str| {
        let text = body.get("export")?.get(name)?.as_str()?.trim();
        (!text.is_empty()).then(|| text.to_owned())
    };
    let export = text("presigned-url")
        .map(|url| ExportInfo { presigned_url: SecretString::from(url), md5sum: text("md5sum") });
    Ok(SnapshotDetails { snapshot, export })
}

pub(super) fn decode_instance(bytes: &[u8]) -> Result<InstanceDetails, DecodeError> {
    let instance = one(bytes, RawInstance::checked)?;
    // Any shape of the rest is accepted: a field that is odd is none.
    let body = one(bytes, Ok::<serde_json::Value, String>)?;
    let text = |name: &str| body.get(name).and_then(serde_json::Value::as_str).and_then(machine::short_text);
    let (machine, left_out) = machine::machine_of(&body);
    let (state, public_ip) = (text("state").unwrap_or_default(), text("public-ip"));
    Ok(InstanceDetails { instance, state, public_ip, machine, left_out })
}

pub(super) fn decode_instance_type(bytes: &[u8]) -> Result<Option<String>, DecodeError> {
    Ok(machine::type_name(&one(bytes, Ok::<serde_json::Value, String>)?))
}

pub(super) fn decode_operation(bytes: &[u8]) -> Result<RawOperation, DecodeError> {
    one(bytes, Ok)
}

pub(super) fn decode_templates(bytes: &[u8]) -> Result<Vec<Template>, DecodeError> {
    all(bytes, "templates")
}

pub(super) fn decode_template(bytes: &[u8]) -> Result<Template, DecodeError> {
    one(bytes, Ok)
}

pub(super) fn decode_quotas(bytes: &[u8]) -> Result<Vec<Quota>, DecodeError> {
    all(bytes, "quotas")
}

pub(super) fn decode_quota(bytes: &[u8]) -> Result<Quota, DecodeError> {
    one(bytes, Ok)
}

/// Characters of a text in an event that are kept: an address of mail has at most 254.
const MAX_EVENT_TEXT: usize = 255;

/// The fields of an event that are read. Each may have any form.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawEvent {
    #[serde(default, deserialize_with = "if_text")]
    timestamp: Option<String>,
    #[serde(default, deserialize_with = "if_text")]
    uri: Option<String>,
    #[serde(default)]
    status: serde_json::Value,
    #[serde(default, deserialize_with = "if_text")]
    source_ip: Option<String>,
    #[serde(default, deserialize_with = "if_text")]
    request_id: Option<String>,
    #[serde(default)]
    iam_api_key: serde_json::Value,
    #[serde(default)]
    iam_user: serde_json::Value,
}

impl RawEvent {
    /// The snapshot that was deleted by this request, if it is one that succeeded. Nothing but a deletion changes the snapshot at
    /// its own path: all else has a verb behind the id, such as `:export`.
    fn deleted_snapshot(&self) -> Option<SnapshotId> {
        let path = self.uri.as_deref()?.split(['?', '#']).next()?;
        let mut segments = path.trim_end_matches('/').rsplit('/');
        let id = segments.next()?.parse().ok()?;
        let is_snapshot = segments.next() == Some("snapshot");
        let has_succeeded = self.status.as_u64().is_none_or(|status| (200..300).contains(&status));
        (is_snapshot && has_succeeded).then_some(id)
    }
}

/// Reads a body of list-events: the deletions of these snapshots. An event of another form is passed over.
pub(super) fn decode_deletions(
    bytes: &[u8],
    of: &BTreeSet<SnapshotId>,
) -> Result<BTreeMap<SnapshotId, DeletionEvent>, DecodeError> {
    let mut found: BTreeMap<SnapshotId, DeletionEvent> = BTreeMap::new();
    let events: Vec<&RawValue> =
        serde_json::from_slice(bytes).map_err(|error| DecodeError::new(bytes, &error))?;
    for event in events {
        let Ok(raw) = serde_json::from_str::<RawEvent>(event.get()) else { continue };
        let Some(id) = raw.deleted_snapshot().filter(|id| of.contains(id)) else { continue };
        let short = |text: &str| (!text.is_empty()).then(|| excerpt(text, MAX_EVENT_TEXT));
        let text = |value: &serde_json::Value, name: &str| short(value.get(name)?.as_str()?);
        let event = DeletionEvent {
            at: raw.timestamp.as_deref().and_then(|at| at.parse().ok()),
            key_name: text(&raw.iam_api_key, "name"),
            key: text(&raw.iam_api_key, "key"),
            user: text(&raw.iam_user, "email"),
            address: raw.source_ip.as_deref().and_then(short),
            request_id: raw.request_id.as_deref().and_then(short),
        };
        if found.get(&id).is_none_or(|known| known.at <= event.at) {
            found.insert(id, event);
        }
    }
    Ok(found)
}

/// A zone whose name is not valid in an address is left out.
pub(super) fn decode_zones(bytes: &[u8]) -> Result<Vec<Zone>, DecodeError> {
    let mut zones = Vec::new();
    each(bytes, "zones", |raw: serde_json::Value| {
        let text = |name: &str| raw.get(name)?.as_str();
        if let Some(name) = text("name").and_then(|name| name.parse().ok()) {
            let (api, sos) = (text("api-endpoint"), text("sos-endpoint"));
            zones.push(Zone {
                name,
                api_endpoint: api.map(str::to_owned),
                sos_endpoint: sos.map(str::to_owned),
            });
        }
        Ok(())
    })?;
    Ok(zones)
}

/// One object.
fn one<Raw: DeserializeOwned, T>(
    bytes: &[u8],
    checked: impl FnOnce(Raw) -> Result<T, String>,
) -> Result<T, DecodeError> {
    let raw = serde_json::from_slice(bytes).map_err(|error| DecodeError::new(bytes, &error))?;
    checked(raw).map_err(DecodeError::Json)
}

/// Every entry of the list under `key`.
fn all<T: DeserializeOwned>(bytes: &[u8], key: &'static str) -> Result<Vec<T>, DecodeError> {
    let mut entries = Vec::new();
    each(bytes, key, |entry| {
        entries.push(entry);
        Ok(())
    })?;
    Ok(entries)
}

/// Hands over each entry of the list under `key`, one at a time. An empty object, or `null` under the key, is an
/// empty list.
fn each<Raw: DeserializeOwned>(
    bytes: &[u8],
    key: &'static str,
    take: impl FnMut(Raw) -> Result<(), String>,
) -> Result<(), DecodeError> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let list = Entries { key, take, raw: PhantomData, is_inside: false };
    (&mut deserializer)
        .deserialize_map(list)
        .and_then(|()| deserializer.end())
        .map_err(|error| DecodeError::new(bytes, &error))
}

/// Reads an object with a list under `key`; with `is_inside` the list itself.
struct Entries<Raw, Take> {
    key: &'static str,
    take: Take,
    raw: PhantomData<Raw>,
    is_inside: bool,
}

impl<'de, Raw, Take> DeserializeSeed<'de> for Entries<Raw, Take>
where
    Raw: DeserializeOwned,
    Take: FnMut(Raw) -> Result<(), String>,
{
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de, Raw, Take> Visitor<'de> for Entries<Raw, Take>
where
    Raw: DeserializeOwned,
    Take: FnMut(Raw) -> Result<(), String>,
{
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_inside {
            write!(f, "a list of {}", self.key)
        } else {
            write!(f, "an object with `{}`", self.key)
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut list, mut other) = (Some(Self { is_inside: true, ..self }), None);
        while let Some(key) = map.next_key::<String>()? {
            if key != self.key {
                map.next_value::<IgnoredAny>()?;
                other = Some(key);
            } else if let Some(list) = list.take() {
                map.next_value_seed(list)?;
            } else {
                return Err(A::Error::custom(format_args!("`{key}` is there twice")));
            }
        }
        // An empty object is an empty list; one with other keys alone is an error.
        match (list, other) {
            (Some(_), Some(other)) => Err(A::Error::custom(format_args!(
                "there is no `{}` in it, but `{}`",
                self.key,
                excerpt(&other, 50)
            ))),
            _ => Ok(()),
        }
    }

    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut entries: A) -> Result<(), A::Error> {
        let mut place = 1_usize;
        loop {
            let entry = entries.next_element::<Raw>().map_err(|error| {
                A::Error::custom(format_args!("entry {place} of `{}`: {error}", self.key))
            })?;
            let Some(entry) = entry else { return Ok(()) };
            (self.take)(entry)
                .map_err(|what| A::Error::custom(format_args!("entry {place} of `{}`: {what}", self.key)))?;
            place += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105";
    const OTHER: &str = "b0c0ef2c-106a-4f3c-a5aa-5e6176d0f106";
    const INSTANCE: &str = "9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec";

    fn snapshots(json: &str) -> Result<ListedSnapshots, String> {
        decode_snapshots(json.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn only_deletions_that_succeeded_count_of_events_and_their_text_is_bounded() {
        let id = "b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105";
        let of = BTreeSet::from([id.parse().unwrap()]);
        let found = |event: &str| {
            let body = format!("[{event}]");
            decode_deletions(body.as_bytes(), &of).unwrap().into_values().next()
        };
        for uri in [
            "/v2/snapshot/ID",
            "/v2/snapshot/ID/",
            "https://api.example/v2/snapshot/ID?x=1",
            "/ch-gva-2/v2/snapshot/ID",
        ] {
            let uri = uri.replace("ID", id);
            assert!(found(&format!(r#"{{"uri":"{uri}","status":200}}"#)).is_some(), "{uri}");
        }
        for event in [
            r#"{"uri":"/v2/snapshot/ID:export","status":200}"#,
            r#"{"uri":"/v2/instance/ID","status":200}"#,
            r#"{"uri":"/v2/snapshot/ID","status":403}"#,
            r#"{"uri":"/v2/snapshot/00000000-0000-4000-8000-000000000000","status":200}"#,
            r#"{"uri":5}"#,
            "{}",
            r#""ID""#,
            "null",
        ] {
            let event = event.replace("ID", id);
            assert!(found(&event).is_none(), "{event}");
        }
        let long = "x".repeat(10_000);
        let event = format!(
            r#"{{"uri":"/v2/snapshot/{id}","timestamp":"2026-11-01T02:30:00.123Z","source-ip":"{long}","status":"odd","request-id":"r1",
                "iam-api-key":{{"name":"{long}","key":"EXO1","secret":"hush"}},"iam-user":{{"email":"eve@example.org","password":"hush"}}}}"#
        );
        let event = found(&event).unwrap();
        assert_eq!(event.at.unwrap().to_string(), "2026-11-01T02:30:00.123Z");
        assert_eq!((event.key.as_deref(), event.user.as_deref()), (Some("EXO1"), Some("eve@example.org")));
        assert!(event.key_name.as_ref().unwrap().chars().count() <= MAX_EVENT_TEXT + 1);
        assert!(!format!("{event:?}").contains("hush"));
        assert!(event.address.is_none_or(|address| address.len() < 1000));
        for body in ["{}", "", "<html>", "[1"] {
            assert!(decode_deletions(body.as_bytes(), &of).is_err(), "{body}");
        }
    }

    #[test]
    fn the_least_and_the_most_are_both_read() {
        let least = format!(r#"{{"snapshots":[{{"id":"{ID}","created-at":"2026-11-01T02:30:00Z"}}]}}"#);
        let listed = snapshots(&least).unwrap();
        assert_eq!(
            listed.snapshots,
            [Snapshot {
                id: ID.parse().unwrap(),
                name: "".into(),
                created_at: "2026-11-01T02:30:00Z".parse().unwrap(),
                state: SnapshotState::Unknown("".into()),
                size_gib: None,
                application_consistent: None,
                instance_id: None,
            }]
        );
        assert_eq!(listed.mentioned, []);

        let most = format!(
            r#"{{"new":{{"a":[1]}},"snapshots":[{{"id":"{ID}","created-at":"2026-11-01T03:30:00.5+01:00",
                "state":"hibernating","size":50,"name":"\u0000x","application-consistent":null,"later":[[]],
                "export":{{"presigned-url":7}},
                "instance":{{"id":"{INSTANCE}","name":"web-1","labels":{{"a":"b"}},"template":{{"id":"{OTHER}"}}}}}}]}}"#
        );
        let listed = snapshots(&most).unwrap();
        let snapshot = &listed.snapshots[0];
        assert_eq!(snapshot.state, SnapshotState::Unknown("hibernating".into()));
        assert_eq!(snapshot.created_at, "2026-11-01T02:30:00.5Z".parse().unwrap());
        assert_eq!((snapshot.size_gib, &*snapshot.name), (Some(50), "\0x"));
        assert_eq!(
            listed.mentioned,
            [Instance {
                id: INSTANCE.parse().unwrap(),
                name: "web-1".into(),
                labels: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
                template_id: Some(OTHER.parse().unwrap()),
                is_managed: false,
                created_at: None,
            }]
        );
    }

    #[test]
    fn an_instance_is_mentioned_once_by_its_name_if_any_snapshot_gives_one() {
        let entry = |id: &str, instance: &str| {
            format!(r#"{{"id":"{id}","created-at":"2026-11-01T02:30:00Z","instance":{instance}}}"#)
        };
        let sparse = format!(r#"{{"id":"{INSTANCE}"}}"#);
        let fat = format!(r#"{{"id":"{INSTANCE}","name":"web-1"}}"#);
        let names = |first: &str, second: &str| {
            let json = format!(r#"{{"snapshots":[{},{}]}}"#, entry(ID, first), entry(OTHER, second));
            let mentioned = snapshots(&json).unwrap().mentioned;
            mentioned.iter().map(|instance| instance.name.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names(&sparse, &sparse), [INSTANCE]);
        assert_eq!(names(&sparse, &fat), ["web-1"]);
        assert_eq!(names(&fat, &sparse), ["web-1"]);
        assert_eq!(names("{}", "null"), Vec::<String>::new());
    }

    #[test]
    fn a_flag_that_is_none_is_unknown_and_nothing_else_is_lost() {
        for (json, expected) in [
            (r#","application-consistent":true"#, Some(true)),
            (r#","application-consistent":false"#, Some(false)),
            (r#","application-consistent":null"#, None),
            (r#","application-consistent":"yes""#, None),
            (r#","application-consistent":1"#, None),
            (r#","application-consistent":{"a":[true]}"#, None),
            ("", None),
        ] {
            let json =
                format!(r#"{{"snapshots":[{{"id":"{ID}","created-at":"2026-11-01T02:30:00Z"{json}}}]}}"#);
            let listed = snapshots(&json).unwrap().snapshots;
            assert_eq!((listed.len(), listed[0].application_consistent), (1, expected), "{json}");
        }
        for (json, expected) in [("true", Some(true)), ("false", Some(false)), ("\"on\"", None)] {
            let json = format!(r#"{{"id":"{INSTANCE}","application-consistent-snapshot-enabled":{json}}}"#);
            let details = decode_instance(json.as_bytes()).unwrap();
            assert_eq!(details.machine.application_consistent_snapshots, expected, "{json}");
        }
    }

    #[test]
    fn no_list_is_an_empty_list() {
        for json in ["{}", r#"{"snapshots":[]}"#, r#"{"snapshots":null}"#, r#" {"other":1,"snapshots":[]} "#]
        {
            assert_eq!(snapshots(json).unwrap().snapshots, [], "{json}");
        }
    }

    #[test]
    fn an_object_about_something_else_is_no_empty_list() {
        for json in [r#"{"message":"try later"}"#, r#"{"instances":[]}"#] {
            let error = snapshots(json).unwrap_err();
            assert!(error.contains("there is no `snapshots` in it"), "{json}: {error}");
        }
    }

    #[test]
    fn half_a_listing_is_none_and_the_error_says_where() {
        let good = format!(r#"{{"id":"{ID}","created-at":"2026-11-01T02:30:00Z"}}"#);
        let cases = [
            (String::new(), "it is empty where JSON was expected".to_owned()),
            (
                "\n<!DOCTYPE html><html>".to_owned(),
                "it is a page of HTML or XML where JSON was expected".to_owned(),
            ),
            (
                "[]".to_owned(),
                "invalid type: sequence, expected an object with `snapshots` at line 1 column 0".to_owned(),
            ),
            (
                r#"{"snapshots":{}}"#.to_owned(),
                "invalid type: map, expected a list of snapshots at line 1".to_owned(),
            ),
            (
                format!(r#"{{"snapshots":[{good}"#),
                "entry 2 of `snapshots`: EOF while parsing a list at line 1".to_owned(),
            ),
            (format!(r#"{{"snapshots":[{good}]}}{{}}"#), "trailing characters at line 1".to_owned()),
            (
                format!(r#"{{"snapshots":[{good}],"snapshots":[]}}"#),
                "`snapshots` is there twice at line 1".to_owned(),
            ),
            (
                format!(
                    r#"{{"snapshots":[{good},{{"name":"x\u001b","created-at":"2026-11-01T02:30:00Z"}}]}}"#
                ),
                "entry 2 of `snapshots`: the snapshot named `x\\u{1b}` has no `id` at line 1".to_owned(),
            ),
            (
                format!(r#"{{"snapshots":[{{"id":"{ID}"}}]}}"#),
                format!("entry 1 of `snapshots`: snapshot {ID} has no `created-at` at line 1"),
            ),
            (
                format!(r#"{{"snapshots":[{{"id":"{ID}","created-at":"yesterday"}}]}}"#),
                format!(
                    "entry 1 of `snapshots`: snapshot {ID} has the `created-at` `yesterday`, \
                     which is not a time as in RFC 3339 at line 1"
                ),
            ),
            (
                r#"{"snapshots":[{"id":"../etc"}]}"#.to_owned(),
                "entry 1 of `snapshots`: UUID parsing failed".to_owned(),
            ),
            (
                format!(r#"{{"snapshots":[{good},{good}]}}"#),
                format!("entry 2 of `snapshots`: snapshot {ID} is listed twice at line 1"),
            ),
        ];
        for (json, beginning) in cases {
            let error = snapshots(&json).unwrap_err();
            assert!(error.starts_with(&beginning), "{json}\n{error}");
        }
    }

    #[test]
    fn a_listing_cut_anywhere_is_none() {
        let whole = format!(
            r#"{{"snapshots":[{{"id":"{ID}","created-at":"2026-11-01T02:30:00Z","instance":{{"id":"{INSTANCE}"}}}},
                {{"id":"{OTHER}","created-at":"2026-11-01T02:30:00Z","name":"é"}}],"more":[1]}}"#
        );
        assert_eq!(decode_snapshots(whole.as_bytes()).unwrap().snapshots.len(), 2);
        for end in 0..whole.len() {
            assert!(decode_snapshots(&whole.as_bytes()[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn an_instance_without_an_id_or_twice_makes_no_listing() {
        let one = format!(r#"{{"id":"{INSTANCE}"}}"#);
        let read = |json: String| decode_instances(json.as_bytes());
        assert_eq!(&*read(format!(r#"{{"instances":[{one}]}}"#)).unwrap()[0].name, INSTANCE);
        assert!(read(format!(r#"{{"instances":[{one},{one}]}}"#)).is_err());
        assert!(read(r#"{"instances":[{"name":"web-1"}]}"#.to_owned()).is_err());
    }

    #[test]
    fn an_instance_with_a_manager_of_any_kind_is_managed() {
        for (manager, is_managed) in [
            (format!(r#"{{"id":"{OTHER}","type":"instance-pool"}}"#), true),
            (format!(r#"{{"id":"{OTHER}","type":"sks-nodepool"}}"#), true),
            (r#"{"type":"later","more":[1]}"#.to_owned(), true),
            (r#"{"id":null}"#.to_owned(), false),
            ("{}".to_owned(), false),
            ("null".to_owned(), false),
        ] {
            let json = format!(r#"{{"instances":[{{"id":"{INSTANCE}","manager":{manager}}}]}}"#);
            assert_eq!(decode_instances(json.as_bytes()).unwrap()[0].is_managed, is_managed, "{manager}");
        }
    }

    #[test]
    fn the_time_at_which_an_instance_was_created_is_read_if_it_is_one() {
        for (text, expected) in [
            (r#""2026-10-01T02:30:00+02:00""#, Some("2026-10-01T00:30:00Z".parse().unwrap())),
            ("null", None),
            ("7", None),
            (r#""yesterday""#, None),
        ] {
            let json = format!(r#"{{"instances":[{{"id":"{INSTANCE}","created-at":{text}}}]}}"#);
            assert_eq!(decode_instances(json.as_bytes()).unwrap()[0].created_at, expected, "{text}");
        }
    }

    #[test]
    fn outside_text_in_an_error_is_short_and_printable() {
        let json = format!(r#"{{"snapshots":[{{"size":"\u001b{}"}}]}}"#, "x".repeat(10_000));
        let error = snapshots(&json).unwrap_err();
        assert!(error.len() < 400 && !error.contains('\u{1b}'), "{error}");
    }

    #[test]
    fn a_presigned_address_is_never_shown() {
        let snapshot = |export: &str| {
            let json = format!(
                r#"{{"id":"{ID}","created-at":"2026-11-01T02:30:00Z","name":"n","export":{export}}}"#
            );
            decode_snapshot(json.as_bytes())
        };
        let details = snapshot(r#"{"presigned-url":"https://x/y?hush","md5sum":"AB"}"#).unwrap();
        assert!(!format!("{details:?}").contains("hush"));
        let export = details.export.unwrap();
        assert_eq!(export.presigned_url.expose_secret(), "https://x/y?hush");
        assert_eq!(export.md5sum.as_deref(), Some("AB"));
        // Whatever its shape is, it is no error that could quote it.
        for odd in
            [r#""https://x/y?hush""#, r#"{"presigned-url":["hush"]}"#, "null", "{}", r#"{"md5sum":""}"#]
        {
            assert!(snapshot(odd).unwrap().export.is_none(), "{odd}");
        }
        let request = RegisterRequest {
            name: "n".to_owned(),
            url: "https://x/y?hush".into(),
            checksum: "AB".to_owned(),
            ssh_key_enabled: true,
            password_enabled: false,
            boot_mode: None,
            description: None,
            default_user: None,
            size: None,
            application_consistent_snapshot_enabled: None,
            version: None,
            build: None,
            maintainer: None,
        };
        assert!(!format!("{request:?}").contains("hush"));
        assert_eq!(
            serde_json::to_string(&request).unwrap(),
            r#"{"name":"n","url":"https://x/y?hush","checksum":"AB","ssh-key-enabled":true,"password-enabled":false}"#
        );
    }

    #[test]
    fn an_operation_is_read_however_little_it_says() {
        let bare = decode_operation(b"{}").unwrap();
        assert!(bare.id.is_none() && bare.state.is_empty() && bare.reference.is_none());
        let null = br#"{"id":null,"state":null,"reason":null,"message":null,"reference":{"id":null}}"#;
        assert!(decode_operation(null).unwrap().reference.unwrap().id.is_none());
    }

    #[test]
    fn a_limit_of_minus_one_is_no_limit() {
        let quotas = decode_quotas(
            br#"{"quotas":[{"resource":"snapshot","usage":7,"limit":-1},{"resource":"template","limit":50}]}"#,
        );
        assert_eq!(
            quotas.unwrap(),
            [
                Quota { resource: "snapshot".to_owned(), usage: 7, limit: None },
                Quota { resource: "template".to_owned(), usage: 0, limit: Some(50) },
            ]
        );
    }

    #[test]
    fn a_zone_with_an_unusable_name_is_left_out() {
        let zones = decode_zones(
            br#"{"zones":[{"name":"ch-gva-2","api-endpoint":"https://a/v2"},{"name":"../x"},{}]}"#,
        );
        let names: Vec<String> = zones.unwrap().iter().map(|zone| zone.name.to_string()).collect();
        assert_eq!(names, ["ch-gva-2"]);
    }
}
