//! The world: one organisation's resources in several zones, and how tests arrange and inspect them.
//!
//! A world is reached by HTTP exchanges alone (`sim::service`). Its time is that of the clock that it was given;
//! everything else follows from its seed, so that runs repeat.
//!
//! Asking for a zone or an instance that was never added is a mistake of the test, and panics.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use http::{Method, StatusCode};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::clock::Clock;
use crate::randomness::Randomness as _;
use crate::sim::call::Call;
use crate::sim::fault::{Ending, Fault, When};
use crate::sim::image::{DiskShape, Image};
use crate::sim::randomness::SeededRandomness;
use crate::snapshot::{InstanceId, OperationId, Snapshot, SnapshotId, SnapshotState, TemplateId, ZoneName};

/// The key that may do everything; every world has it.
pub const API_KEY: &str = "EXO0123456789abcdef01234567";

/// The secret of [`API_KEY`].
pub const API_SECRET: &str = "simulated-secret-0123456789abcdefghijklmnop";

/// The one instance type that every world has.
pub const INSTANCE_TYPE: Uuid = Uuid::from_u128(0x2162_4abb_764e_4def_81d7_9fc5_4b59_57fb);

/// The field of an instance that asks for application-consistent snapshots.
pub(super) const CONSISTENCY: &str = "application-consistent-snapshot-enabled";

/// A simulated organisation; clones are the same one.
#[derive(Clone)]
pub struct World {
    pub(super) clock: Arc<dyn Clock>,
    state: Arc<Mutex<State>>,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").finish_non_exhaustive()
    }
}

/// A template, in the API's JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::struct_excessive_bools, reason = "the API has them")]
pub struct Template {
    /// Its id.
    pub id: TemplateId,
    /// Its name; not unique.
    pub name: String,
    /// Its description.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Whether every organisation sees it; ours are private.
    #[serde(rename = "visibility", serialize_with = "visibility")]
    pub public: bool,
    /// The virtual size, in bytes, unlike a snapshot's.
    #[serde(rename = "size")]
    pub size_bytes: u64,
    /// When it was created.
    pub created_at: Timestamp,
    /// `legacy` or `uefi`.
    pub boot_mode: String,
    /// The user that logs in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_user: Option<String>,
    /// Whether a key is put in place for the user.
    pub ssh_key_enabled: bool,
    /// Whether a password is made for the user.
    pub password_enabled: bool,
    /// The operating system's family.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub family: String,
    /// The operating system's version.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// The vendor's build.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub build: String,
    /// Who maintains it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub maintainer: String,
    /// Whether application-consistent snapshots of its instances are possible.
    #[serde(rename = "application-consistent-snapshot-enabled")]
    pub application_consistent: bool,
    /// The address that the platform fetches it from; none if it was promoted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The MD5 that it was registered with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn visibility<S: Serializer>(public: &bool, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(if *public { "public" } else { "private" })
}

/// One request and its outcome.
#[derive(Debug)]
pub struct Exchange {
    /// When it arrived, by the platform's time.
    pub at: Timestamp,
    /// The zone that it was for.
    pub zone: ZoneName,
    /// The call that it makes.
    pub call: Call,
    /// The verb.
    pub method: Method,
    /// The path without the query, which may be a secret.
    pub path: String,
    pub(super) status: OnceLock<StatusCode>,
    pub(super) body_bytes: Arc<AtomicU64>,
}

impl Exchange {
    /// The status of the answer; none if there was none, or the client did not wait for it.
    pub fn status(&self) -> Option<StatusCode> {
        self.status.get().copied()
    }

    /// How many bytes of the body the client read so far.
    pub fn body_bytes(&self) -> u64 {
        self.body_bytes.load(Ordering::Relaxed)
    }
}

/// Who does something at the platform beside the program.
#[derive(Debug, Clone)]
pub enum Somebody {
    /// With an API key, by its name and its id.
    Key(String, String),
    /// A user at the portal, by the address of the mail.
    User(String),
}

/// A request that was to change something, as list-events shows it.
#[derive(Debug)]
pub(super) struct Event {
    pub(super) at: Timestamp,
    pub(super) zone: ZoneName,
    pub(super) handler: &'static str,
    pub(super) uri: String,
    pub(super) status: u16,
    pub(super) address: String,
    pub(super) by: Somebody,
    pub(super) request_id: Uuid,
}

/// How long the platform keeps events.
pub(super) const EVENTS_LAST: SignedDuration = SignedDuration::from_hours(30 * 24);

#[derive(Debug)]
pub(super) struct State {
    pub(super) randomness: SeededRandomness,
    pub(super) address_secret: u64,
    pub(super) zones: BTreeMap<ZoneName, Zone>,
    /// The secret of each key, and the calls that it permits; none for all.
    pub(super) keys: BTreeMap<String, (String, Option<BTreeSet<Call>>)>,
    pub(super) quotas: BTreeMap<String, i64>,
    pub(super) skew: SignedDuration,
    pub(super) operations_take: Duration,
    /// The instance that the metadata server names; without one there is no such server.
    pub(super) this_machine: Option<InstanceId>,
    pub(super) address_lifetime: Duration,
    /// Exports whose address expired early, by a fault.
    pub(super) expired: BTreeSet<Uuid>,
    pub(super) faults: Vec<Fault>,
    pub(super) log: Vec<Arc<Exchange>>,
    pub(super) events: Vec<Event>,
    instances_added: u64,
}

#[derive(Debug, Default)]
pub(super) struct Zone {
    pub(super) instances: BTreeMap<InstanceId, InstanceRecord>,
    pub(super) snapshots: BTreeMap<SnapshotId, SnapshotRecord>,
    pub(super) templates: BTreeMap<TemplateId, Template>,
    pub(super) operations: BTreeMap<OperationId, Operation>,
    /// Those that are not settled, by when they will be; `MAX` for never.
    pub(super) unsettled: BTreeSet<(Duration, OperationId)>,
}

#[derive(Debug)]
pub(super) struct InstanceRecord {
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) template: TemplateId,
    pub(super) disk: DiskShape,
    pub(super) created_at: Timestamp,
    /// The instance pool that it is a member of.
    pub(super) pool: Option<Uuid>,
    /// Whether it asks for application-consistent snapshots.
    pub(super) asks_for_consistency: bool,
    /// Whether its guest agent works: without it the platform takes other snapshots, and says no word.
    has_agent: bool,
    /// The `n` in the names of its snapshots.
    number: u64,
    pub(super) is_running: bool,
    /// What get-instance shows beside the listing, in the API's JSON.
    pub(super) machine: Map<String, Value>,
    /// The image of the snapshot that its disk was reverted to; the next snapshots have it, too.
    reverted_to: Option<Arc<Image>>,
}

/// The body of create-instance.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct NewInstance {
    pub(super) name: Option<String>,
    pub(super) disk_size: u64,
    pub(super) instance_type: Reference<Uuid>,
    pub(super) template: Reference<TemplateId>,
    #[serde(default)]
    pub(super) labels: BTreeMap<String, String>,
    /// What else it is to have, as get-instance shows it.
    #[serde(flatten)]
    pub(super) machine: Map<String, Value>,
}

/// Something by its id.
#[derive(Debug, Deserialize)]
pub(super) struct Reference<Id> {
    pub(super) id: Id,
}

#[derive(Debug)]
pub(super) struct SnapshotRecord {
    pub(super) snapshot: Snapshot,
    pub(super) image: Arc<Image>,
    /// The last export: its id and when it was made.
    pub(super) export: Option<(Uuid, Timestamp)>,
    pub(super) template: TemplateId,
}

#[derive(Debug)]
pub(super) struct Operation {
    pub(super) work: Work,
    pub(super) ending: Ending,
    pub(super) settled: bool,
}

/// What an operation does when it succeeds.
#[derive(Debug, Clone)]
pub(super) enum Work {
    Create(SnapshotId),
    Delete {
        snapshot: SnapshotId,
        state_before: SnapshotState,
    },
    Export(SnapshotId),
    /// From a snapshot, or registered.
    AddTemplate {
        template: Box<Template>,
        from: Option<SnapshotId>,
    },
    DeleteTemplate(TemplateId),
    AddInstance(InstanceId),
    /// To running or stopped.
    SetRunning(InstanceId, bool),
    Revert {
        instance: InstanceId,
        snapshot: SnapshotId,
    },
    Reset {
        instance: InstanceId,
        template: TemplateId,
        disk_gib: u64,
    },
}

impl Work {
    /// The thing that the operation refers to.
    pub(super) fn reference(&self) -> Uuid {
        match self {
            Self::Create(id) | Self::Export(id) | Self::Delete { snapshot: id, .. } => id.0,
            Self::AddTemplate { template, .. } => template.id.0,
            Self::DeleteTemplate(id) => id.0,
            Self::AddInstance(id)
            | Self::SetRunning(id, _)
            | Self::Revert { instance: id, .. }
            | Self::Reset { instance: id, .. } => id.0,
        }
    }

    /// The instance that it works on, with which nothing else can be done meanwhile.
    pub(super) fn instance(&self) -> Option<InstanceId> {
        match self {
            Self::AddInstance(id)
            | Self::SetRunning(id, _)
            | Self::Revert { instance: id, .. }
            | Self::Reset { instance: id, .. } => Some(*id),
            _ => None,
        }
    }

    /// The snapshot that it works on, which can't be deleted meanwhile.
    pub(super) fn snapshot(&self) -> Option<SnapshotId> {
        match self {
            Self::Create(id) | Self::Export(id) | Self::Delete { snapshot: id, .. } => Some(*id),
            Self::Revert { snapshot, .. } => Some(*snapshot),
            Self::AddTemplate { from, .. } => *from,
            Self::DeleteTemplate(_) | Self::AddInstance(_) | Self::SetRunning(..) | Self::Reset { .. } => {
                None
            }
        }
    }
}

impl World {
    /// A world without zones. Its one key, [`API_KEY`], may do everything; nothing is limited; operations take
    /// 2 s and presigned addresses are good for an hour.
    pub fn new(clock: Arc<dyn Clock>, seed: u64) -> Self {
        let randomness = SeededRandomness::new(seed);
        let state = State {
            address_secret: randomness.next_u64(),
            randomness,
            zones: BTreeMap::new(),
            keys: BTreeMap::from([(API_KEY.to_owned(), (API_SECRET.to_owned(), None))]),
            quotas: BTreeMap::from(["instance", "snapshot", "template"].map(|name| (name.to_owned(), -1))),
            skew: SignedDuration::ZERO,
            operations_take: Duration::from_secs(2),
            this_machine: None,
            address_lifetime: Duration::from_hours(1),
            expired: BTreeSet::new(),
            faults: Vec::new(),
            log: Vec::new(),
            events: Vec::new(),
            instances_added: 0,
        };
        Self { clock, state: Arc::new(Mutex::new(state)) }
    }

    /// Adds a zone with one public template.
    pub fn add_zone(&self, name: &str) -> ZoneName {
        let name: ZoneName = name.parse().expect("a zone's name as the API has them");
        let created_at = self.now();
        let id = TemplateId(self.state().fresh_id());
        let template = Template {
            id,
            name: "Linux Ubuntu 24.04 LTS 64-bit".to_owned(),
            description: "Linux Ubuntu 24.04 LTS 64-bit".to_owned(),
            public: true,
            size_bytes: 10 << 30,
            created_at,
            boot_mode: "uefi".to_owned(),
            default_user: Some("ubuntu".to_owned()),
            ssh_key_enabled: true,
            password_enabled: false,
            family: "ubuntu".to_owned(),
            version: "24.04 LTS".to_owned(),
            build: "2026-01-01-simulated".to_owned(),
            maintainer: "Exoscale".to_owned(),
            application_consistent: false,
            url: None,
            checksum: None,
        };
        let zone = Zone { templates: BTreeMap::from([(template.id, template)]), ..Zone::default() };
        self.state().zones.insert(name.clone(), zone);
        name
    }

    /// Adds an instance, started from the zone's public template, with the default disk.
    pub fn add_instance(&self, zone: &ZoneName, name: &str, labels: &[(&str, &str)]) -> InstanceId {
        let created_at = self.now();
        let mut state = self.state();
        let templates = &mut state.zone(zone).templates;
        let template = templates.values().find(|template| template.public).map(|template| template.id);
        let new = NewInstance {
            name: Some(name.to_owned()),
            disk_size: DiskShape::default().size_gib,
            instance_type: Reference { id: INSTANCE_TYPE },
            template: Reference { id: template.expect("add_zone put a public template there") },
            labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            machine: Map::new(),
        };
        state.add_instance(zone, new, created_at)
    }

    /// Sets what get-instance shows beside the listing: fields of the API's JSON, such as `ssh-keys`.
    pub fn set_machine(&self, instance: InstanceId, fields: Value) {
        let Value::Object(fields) = fields else { panic!("fields of an instance") };
        self.state().instance(instance).1.machine.extend(fields);
    }

    /// Creates an instance, as create-instance does with this body.
    pub fn create_instance(&self, zone: &ZoneName, body: Value) -> InstanceId {
        let new = serde_json::from_value(body).expect("the body of create-instance");
        let created_at = self.now();
        self.state().add_instance(zone, new, created_at)
    }

    /// An instance as get-instance shows it, without a request.
    pub fn shown(&self, instance: InstanceId) -> Value {
        let state = self.settled();
        let mut zones = state.zones.values();
        zones.find_map(|zone| zone.shown(instance)).expect("an instance that exists")
    }

    /// Stops or starts an instance.
    pub fn set_running(&self, instance: InstanceId, is_running: bool) {
        self.state().instance(instance).1.is_running = is_running;
    }

    /// Whether an instance runs.
    pub fn is_running(&self, instance: InstanceId) -> bool {
        self.settled().instance(instance).1.is_running
    }

    /// The template that an instance runs on.
    pub fn template_of(&self, instance: InstanceId) -> TemplateId {
        self.settled().instance(instance).1.template
    }

    /// Sets the shape of the instance's disk, and so of the images of its later snapshots.
    pub fn set_disk(&self, instance: InstanceId, disk: DiskShape) {
        self.state().instance(instance).1.disk = disk;
    }

    /// Sets when an instance was created; at first that is when it was added.
    pub fn set_instance_created(&self, instance: InstanceId, at: Timestamp) {
        self.state().instance(instance).1.created_at = at;
    }

    /// Makes an instance run on another template.
    pub fn set_template(&self, instance: InstanceId, template: TemplateId) {
        self.state().instance(instance).1.template = template;
    }

    /// Makes an instance a member of a new instance pool.
    pub fn put_into_pool(&self, instance: InstanceId) {
        let mut state = self.state();
        let pool = state.fresh_id();
        state.instance(instance).1.pool = Some(pool);
    }

    /// Says whether an instance asks for application-consistent snapshots, and whether its guest agent works: its later
    /// snapshots are so if both are.
    pub fn set_consistency(&self, instance: InstanceId, is_asked_for: bool, has_agent: bool) {
        let mut state = self.state();
        let record = state.instance(instance).1;
        (record.asks_for_consistency, record.has_agent) = (is_asked_for, has_agent);
    }

    /// Sets whether a snapshot is application-consistent; without a value the API does not say.
    pub fn set_consistent(&self, snapshot: SnapshotId, is_consistent: Option<bool>) {
        self.state().snapshot(snapshot).snapshot.application_consistent = is_consistent;
    }

    /// Gives an instance another name and other labels.
    pub fn rename_instance(&self, instance: InstanceId, name: &str, labels: &[(&str, &str)]) {
        let mut state = self.state();
        for zone in state.zones.values_mut() {
            if let Some(record) = zone.instances.get_mut(&instance) {
                name.clone_into(&mut record.name);
                record.labels =
                    labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            }
        }
    }

    /// Removes an instance, and its snapshots with it, as the platform does.
    pub fn remove_instance(&self, instance: InstanceId) {
        for zone in self.state().zones.values_mut() {
            zone.instances.remove(&instance);
            zone.snapshots.retain(|_, record| record.snapshot.instance_id != Some(instance));
        }
    }

    /// Adds a healthy snapshot, as if it had been taken at `created_at`.
    pub fn add_snapshot(&self, instance: InstanceId, created_at: Timestamp) -> SnapshotId {
        self.state().add_snapshot(instance, created_at, SnapshotState::Exported)
    }

    /// Removes a snapshot without a request.
    pub fn remove_snapshot(&self, snapshot: SnapshotId) {
        for zone in self.state().zones.values_mut() {
            zone.snapshots.remove(&snapshot);
        }
    }

    /// Deletes a snapshot as another client does, from this network address: the platform's events show it.
    pub fn delete_snapshot_as(&self, snapshot: SnapshotId, by: Somebody, address: &str) {
        let at = self.now();
        let mut state = self.state();
        let request_id = state.request_id(at);
        let mut zones = state.zones.iter_mut();
        let zone = zones.find_map(|(name, zone)| zone.snapshots.remove(&snapshot).map(|_| name.clone()));
        let event = Event {
            at,
            zone: zone.expect("a snapshot that exists"),
            handler: "delete-snapshot",
            uri: format!("/v2/snapshot/{snapshot}"),
            status: 200,
            address: address.to_owned(),
            by,
            request_id,
        };
        state.add_event(event);
    }

    /// Puts a snapshot into a state.
    pub fn set_state(&self, snapshot: SnapshotId, state: SnapshotState) {
        self.state().snapshot(snapshot).snapshot.state = state;
    }

    /// Gives a snapshot another name; the platform itself never does.
    pub fn set_name(&self, snapshot: SnapshotId, name: &str) {
        self.state().snapshot(snapshot).snapshot.name = name.into();
    }

    /// Changes or removes the instance that the platform names for a snapshot.
    pub fn set_instance(&self, snapshot: SnapshotId, instance: Option<InstanceId>) {
        self.state().snapshot(snapshot).snapshot.instance_id = instance;
    }

    /// Replaces a snapshot's image: another MD5, another entity tag.
    pub fn set_image(&self, snapshot: SnapshotId, image: Image) {
        self.state().snapshot(snapshot).image = Arc::new(image);
    }

    /// Limits how many things of a kind (`snapshot`, `template`) the organisation may have; −1 for no limit.
    pub fn set_quota(&self, resource: &str, limit: i64) {
        self.state().quotas.insert(resource.to_owned(), limit);
    }

    /// Adds a key that may make only these calls; an empty list for a valid key without any permission.
    /// `get-operation` needs no permission, nor does `list-zones` without a signature.
    pub fn add_key(&self, key: &str, secret: &str, allowed: &[Call]) {
        let allowed = Some(allowed.iter().copied().collect());
        self.state().keys.insert(key.to_owned(), (secret.to_owned(), allowed));
    }

    /// Sets the instance that the metadata server names; none for a machine that is no instance.
    pub fn set_this_machine(&self, instance: Option<InstanceId>) {
        self.state().this_machine = instance;
    }

    /// Sets how long operations take from now on; with zero they are settled in the answer that starts them.
    pub fn set_operations_take(&self, duration: Duration) {
        self.state().operations_take = duration;
    }

    /// Sets how long presigned addresses made from now on are valid; whole seconds.
    pub fn set_address_lifetime(&self, lifetime: Duration) {
        self.state().address_lifetime = lifetime;
    }

    /// Sets the offset of the platform's clock from the clock that this world was given.
    pub fn set_skew(&self, skew: SignedDuration) {
        self.state().skew = skew;
    }

    /// Adds a fault.
    pub fn fault(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// Removes all faults.
    pub fn clear_faults(&self) {
        self.state().faults.clear();
    }

    /// The platform's time, in whole seconds as the API writes them.
    pub fn now(&self) -> Timestamp {
        let skew = self.state().skew;
        let now = self.clock.now();
        whole_seconds(now.checked_add(skew).unwrap_or(now))
    }

    /// A zone's snapshots, oldest first, without a request.
    pub fn snapshots(&self, zone: &ZoneName) -> Vec<Snapshot> {
        let mut state = self.settled();
        let mut all: Vec<Snapshot> =
            state.zone(zone).snapshots.values().map(|record| record.snapshot.clone()).collect();
        all.sort_by_key(|snapshot| (snapshot.created_at, snapshot.id));
        all
    }

    /// A zone's private templates, oldest first.
    pub fn templates(&self, zone: &ZoneName) -> Vec<Template> {
        let mut state = self.settled();
        let mut all: Vec<Template> =
            state.zone(zone).templates.values().filter(|template| !template.public).cloned().collect();
        all.sort_by_key(|template| (template.created_at, template.id));
        all
    }

    /// A snapshot's image.
    pub fn image(&self, snapshot: SnapshotId) -> Arc<Image> {
        self.state().snapshot(snapshot).image.clone()
    }

    /// Every request so far, in the order of arrival.
    pub fn log(&self) -> Vec<Arc<Exchange>> {
        self.state().log.clone()
    }

    /// The requests of the log that change something.
    pub fn changes(&self) -> Vec<Arc<Exchange>> {
        let mut log = self.log();
        log.retain(|exchange| exchange.call.changes());
        log
    }

    /// Forgets the log.
    pub fn clear_log(&self) {
        self.state().log.clear();
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, after settling all operations that are due.
    pub(super) fn settled(&self) -> MutexGuard<'_, State> {
        let (elapsed, now) = (self.clock.elapsed(), self.now());
        let mut state = self.state();
        state.settle(elapsed, now);
        state
    }
}

/// The API writes no fractions of a second.
fn whole_seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

impl State {
    pub(super) fn fresh_id(&self) -> Uuid {
        let (high, low) = (self.randomness.next_u64(), self.randomness.next_u64());
        uuid::Builder::from_random_bytes(Uuid::from_u64_pair(high, low).into_bytes()).into_uuid()
    }

    /// The id of the next request in the events. It does not come from chance, so that what does stays the same.
    pub(super) fn request_id(&self, at: Timestamp) -> Uuid {
        Uuid::from_u64_pair(at.as_second().unsigned_abs(), self.events.len() as u64)
    }

    /// Adds an event, and forgets those that are too old.
    pub(super) fn add_event(&mut self, event: Event) {
        let oldest = event.at.checked_sub(EVENTS_LAST).unwrap_or(Timestamp::MIN);
        self.events.retain(|event| event.at >= oldest);
        self.events.push(event);
    }

    fn zone(&mut self, name: &ZoneName) -> &mut Zone {
        self.zones.get_mut(name).expect("a zone that was added")
    }

    fn instance(&mut self, id: InstanceId) -> (&ZoneName, &mut InstanceRecord) {
        let mut zones = self.zones.iter_mut();
        zones
            .find_map(|(name, zone)| Some((name, zone.instances.get_mut(&id)?)))
            .expect("an instance that was added")
    }

    fn snapshot(&mut self, id: SnapshotId) -> &mut SnapshotRecord {
        self.zones.values_mut().find_map(|zone| zone.snapshots.get_mut(&id)).expect("a snapshot that exists")
    }

    pub(super) fn add_instance(
        &mut self,
        zone: &ZoneName,
        new: NewInstance,
        created_at: Timestamp,
    ) -> InstanceId {
        let id = InstanceId(self.fresh_id());
        self.instances_added += 1;
        let number = 100_000 + self.instances_added;
        let mut machine = new.machine;
        machine.insert("instance-type".to_owned(), json!({ "id": new.instance_type.id }));
        // Of the addresses for documentation.
        let last = self.instances_added % 250 + 1;
        machine.entry("public-ip").or_insert_with(|| format!("192.0.2.{last}").into());
        let asks = machine.get(CONSISTENCY).and_then(Value::as_bool);
        let record = InstanceRecord {
            name: new.name.unwrap_or_else(|| id.to_string()),
            labels: new.labels,
            template: new.template.id,
            disk: DiskShape { size_gib: new.disk_size, ..DiskShape::default() },
            created_at,
            pool: None,
            asks_for_consistency: asks.unwrap_or(false),
            has_agent: false,
            number,
            is_running: true,
            machine,
            reverted_to: None,
        };
        self.zone(zone).instances.insert(id, record);
        id
    }

    pub(super) fn add_snapshot(
        &mut self,
        instance: InstanceId,
        created_at: Timestamp,
        state: SnapshotState,
    ) -> SnapshotId {
        let id = SnapshotId(self.fresh_id());
        let seed = self.randomness.next_u64();
        let created_at = whole_seconds(created_at);
        let (zone, record) = self.instance(instance);
        let stamp = created_at.strftime("%Y%m%d%H%M%S");
        let snapshot = Snapshot {
            id,
            name: format!("{}_ROOT-{}_{stamp}", record.name, record.number).into(),
            created_at,
            state,
            size_gib: Some(record.disk.size_gib),
            instance_id: Some(instance),
            application_consistent: Some(record.asks_for_consistency && record.has_agent),
        };
        let image = record.reverted_to.clone().unwrap_or_else(|| Arc::new(Image::new(record.disk, seed)));
        let record = SnapshotRecord { snapshot, image, export: None, template: record.template };
        let zone = zone.clone();
        self.zone(&zone).snapshots.insert(id, record);
        id
    }

    /// Starts an operation, and ends it if it takes no time.
    pub(super) fn begin(
        &mut self,
        zone: &ZoneName,
        work: Work,
        ending: Ending,
        elapsed: Duration,
        now: Timestamp,
    ) -> OperationId {
        let id = OperationId(self.fresh_id());
        // In elapsed time, which no step of the wall clock touches.
        let due = match ending.when {
            When::AtOnce => elapsed,
            When::Usual => elapsed + self.operations_take,
            When::Never => Duration::MAX,
        };
        let zone = self.zone(zone);
        zone.operations.insert(id, Operation { work, ending, settled: false });
        zone.unsettled.insert((due, id));
        self.settle(elapsed, now);
        id
    }

    fn settle(&mut self, elapsed: Duration, now: Timestamp) {
        for zone in self.zones.values_mut() {
            while let Some(&(due, id)) = zone.unsettled.first().filter(|(due, _)| *due <= elapsed) {
                zone.unsettled.remove(&(due, id));
                let Some(operation) = zone.operations.get_mut(&id) else { continue };
                operation.settled = true;
                let (work, succeeded) = (operation.work.clone(), operation.ending.state == "success");
                let export = Uuid::from_u64_pair(self.randomness.next_u64(), self.randomness.next_u64());
                zone.finish(work, succeeded, export, now);
            }
        }
    }
}

impl InstanceRecord {
    /// An instance as list-instances shows it.
    pub(super) fn listed(&self, id: InstanceId) -> Value {
        let mut instance = json!({
            "id": id,
            "name": self.name,
            "labels": self.labels,
            "state": if self.is_running { "running" } else { "stopped" },
            "template": { "id": self.template },
            "created-at": self.created_at,
        });
        if let Some(pool) = self.pool {
            instance["manager"] = json!({ "id": pool, "type": "instance-pool" });
        }
        instance
    }
}

impl Zone {
    /// An instance as get-instance shows it.
    pub(super) fn shown(&self, id: InstanceId) -> Option<Value> {
        let record = self.instances.get(&id)?;
        let snapshots = self.snapshots.values().map(|record| &record.snapshot);
        let snapshots = snapshots.filter(|snapshot| snapshot.instance_id == Some(id));
        let mut whole = record.listed(id);
        for (name, value) in &record.machine {
            whole[name] = value.clone();
        }
        whole["snapshots"] = snapshots.map(|snapshot| json!({ "id": snapshot.id })).collect();
        whole["disk-size"] = record.disk.size_gib.into();
        whole[CONSISTENCY] = record.asks_for_consistency.into();
        Some(whole)
    }

    fn finish(&mut self, work: Work, succeeded: bool, export: Uuid, now: Timestamp) {
        match work {
            Work::Create(id) => {
                if let Some(record) = self.snapshots.get_mut(&id) {
                    record.snapshot.state =
                        if succeeded { SnapshotState::Exported } else { SnapshotState::Error };
                }
            }
            Work::Delete { snapshot, .. } if succeeded => drop(self.snapshots.remove(&snapshot)),
            Work::Delete { snapshot, state_before } => {
                if let Some(record) = self.snapshots.get_mut(&snapshot) {
                    record.snapshot.state = state_before;
                }
            }
            Work::Export(id) if succeeded => {
                if let Some(record) = self.snapshots.get_mut(&id) {
                    record.export = Some((export, now));
                }
            }
            Work::AddTemplate { template, .. } if succeeded => {
                self.templates.insert(template.id, *template);
            }
            Work::DeleteTemplate(id) if succeeded => drop(self.templates.remove(&id)),
            Work::SetRunning(id, is_running) if succeeded => {
                if let Some(record) = self.instances.get_mut(&id) {
                    record.is_running = is_running;
                }
            }
            Work::Revert { instance, snapshot } if succeeded => {
                let image = self.snapshots.get(&snapshot).map(|record| Arc::clone(&record.image));
                if let Some(record) = self.instances.get_mut(&instance) {
                    record.reverted_to = image;
                }
            }
            Work::Reset { instance, template, disk_gib } if succeeded => {
                if let Some(record) = self.instances.get_mut(&instance) {
                    (record.template, record.disk.size_gib, record.reverted_to) = (template, disk_gib, None);
                    record.is_running = true;
                }
            }
            Work::AddInstance(id) if !succeeded => drop(self.instances.remove(&id)),
            Work::Export(_)
            | Work::AddTemplate { .. }
            | Work::DeleteTemplate(_)
            | Work::AddInstance(_)
            | Work::SetRunning(..)
            | Work::Revert { .. }
            | Work::Reset { .. } => {}
        }
    }
}
