//! The API's operations, as the platform answers them.

use std::time::Duration;

use http::StatusCode;
use http::header::AUTHORIZATION;
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::sim::call::Call;
use crate::sim::fault::Ending;
use crate::sim::host::Target;
use crate::sim::signature::{Authorization, presign};
use crate::sim::store;
use crate::sim::world::{
    EVENTS_LAST, Event, INSTANCE_TYPE, InstanceRecord, NewInstance, Operation, Reference, SnapshotRecord,
    Somebody, State, Template, Work, Zone,
};
use crate::snapshot::{InstanceId, OperationId, SnapshotId, SnapshotState, TemplateId};
use crate::transport::Request;

/// A request to the API, and all that is needed to answer it.
pub(super) struct ApiRequest<'a> {
    pub(super) state: &'a mut State,
    pub(super) request: &'a Request,
    pub(super) target: &'a Target,
    pub(super) call: Call,
    /// The id in the path.
    pub(super) id: Uuid,
    /// How an operation that it starts ends.
    pub(super) ending: Ending,
    pub(super) elapsed: Duration,
    pub(super) now: Timestamp,
}

/// A status and a message in the classic form.
type Refusal = (StatusCode, String);

fn refused(status: StatusCode, message: &str) -> Refusal {
    (status, message.to_owned())
}

fn not_found() -> Refusal {
    refused(StatusCode::NOT_FOUND, "not found")
}

/// The body of promote and register; fields of only one of them are left out in the other.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct NewTemplate {
    name: String,
    description: Option<String>,
    default_user: Option<String>,
    ssh_key_enabled: Option<bool>,
    password_enabled: Option<bool>,
    url: Option<String>,
    checksum: Option<String>,
    size: Option<u64>,
    boot_mode: Option<String>,
    version: Option<String>,
    build: Option<String>,
    maintainer: Option<String>,
    application_consistent_snapshot_enabled: Option<bool>,
}

/// The body of reset-instance.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Reset {
    template: Option<Reference<TemplateId>>,
    disk_size: Option<u64>,
}

impl ApiRequest<'_> {
    /// Changes the state as the request asks, and returns status and body of the answer.
    pub(super) fn answer(mut self) -> (StatusCode, Value) {
        let (status, body) = match self.carry_out() {
            Ok(body) => (StatusCode::OK, body),
            Err((status, message)) => (status, json!({ "message": message })),
        };
        if self.call.changes() {
            self.note_event(status);
        }
        (status, body)
    }

    /// Remembers a request that was to change something, for list-events.
    fn note_event(&mut self, status: StatusCode) {
        let header = self.request.headers.get(AUTHORIZATION).and_then(|header| header.to_str().ok());
        let key =
            header.and_then(Authorization::read).map_or_else(String::new, |read| read.credential.to_owned());
        let event = Event {
            at: self.now,
            zone: self.target.zone.clone(),
            handler: self.call.as_str(),
            uri: self.request.url.path().to_owned(),
            status: status.as_u16(),
            address: "192.0.2.1".to_owned(),
            by: Somebody::Key("simulated".to_owned(), key),
            request_id: self.state.request_id(self.now),
        };
        self.state.add_event(event);
    }

    /// The events of the zone within the times that are asked for; without them of the last day.
    fn list_events(&self) -> Value {
        let time = |name: &str| {
            let mut pairs = self.request.url.query_pairs();
            pairs.find(|(known, _)| known == name).and_then(|(_, value)| value.parse::<Timestamp>().ok())
        };
        let before = |span| self.now.checked_sub(span).unwrap_or(Timestamp::MIN);
        let from = time("from").unwrap_or_else(|| before(SignedDuration::from_hours(24)));
        let from = from.max(before(EVENTS_LAST));
        let to = time("to").unwrap_or(self.now);
        let is_asked_for = |event: &&Event| event.zone == self.target.zone && (from..=to).contains(&event.at);
        let shown = |event: &Event| {
            let mut json = json!({
                "timestamp": event.at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string(),
                "handler": event.handler,
                "uri": event.uri,
                "status": event.status,
                "source-ip": event.address,
                "request-id": event.request_id,
                "zone": event.zone,
                "path-params": {},
                "body-params": {},
                "message": event.handler,
            });
            match &event.by {
                Somebody::Key(name, key) => json["iam-api-key"] = json!({ "name": name, "key": key }),
                Somebody::User(email) => json["iam-user"] = json!({ "email": email }),
            }
            json
        };
        self.state.events.iter().filter(is_asked_for).map(shown).collect()
    }

    fn carry_out(&mut self) -> Result<Value, Refusal> {
        self.authorize()?;
        let zone = self.state.zones.get(&self.target.zone).ok_or_else(not_found)?;
        let (instance_id, snapshot_id) = (InstanceId(self.id), SnapshotId(self.id));
        match self.call {
            Call::ListZones => {
                let zones = self.state.zones.keys().map(|zone| {
                    let sos = format!("https://sos-{zone}.exo.io");
                    json!({ "name": zone, "api-endpoint": self.target.host.api(zone), "sos-endpoint": sos })
                });
                Ok(json!({ "zones": zones.collect::<Vec<_>>() }))
            }
            Call::ListInstances => {
                let all = zone.instances.iter().map(|(id, record)| record.listed(*id));
                Ok(json!({ "instances": all.collect::<Vec<_>>() }))
            }
            Call::GetInstance => zone.shown(instance_id).ok_or_else(no_instance),
            Call::GetInstanceType if self.id == INSTANCE_TYPE => {
                Ok(json!({ "id": self.id, "family": "standard", "size": "medium", "cpus": 2 }))
            }
            Call::CreateInstance => self.create_instance(),
            Call::StopInstance => self.set_running(instance_id, false),
            Call::StartInstance => self.set_running(instance_id, true),
            Call::RevertInstance => self.revert(instance_id),
            Call::ResetInstance => self.reset(instance_id),
            Call::CreateSnapshot => {
                zone.instances.get(&instance_id).ok_or_else(no_instance)?;
                self.within_quota("snapshot")?;
                let id = self.state.add_snapshot(instance_id, self.now, SnapshotState::Snapshotting);
                self.begin(Work::Create(id))
            }
            Call::ListSnapshots => {
                let all = zone.snapshots.values().map(|record| self.snapshot(record));
                Ok(json!({ "snapshots": all.collect::<Vec<_>>() }))
            }
            Call::GetSnapshot => Ok(self.snapshot(zone.snapshots.get(&snapshot_id).ok_or_else(not_found)?)),
            Call::DeleteSnapshot => self.delete(snapshot_id),
            Call::ExportSnapshot => {
                good(zone, snapshot_id)?;
                self.begin(Work::Export(snapshot_id))
            }
            Call::PromoteSnapshot => self.promote_snapshot(snapshot_id),
            Call::ListTemplates => Ok(self.list_templates(zone)),
            Call::GetTemplate => {
                Ok(self.template(zone.templates.get(&TemplateId(self.id)).ok_or_else(not_found)?))
            }
            Call::RegisterTemplate => self.register_template(),
            Call::DeleteTemplate => {
                let found = zone.templates.get(&TemplateId(self.id)).ok_or_else(not_found)?;
                if found.public {
                    return Err(refused(StatusCode::FORBIDDEN, "Forbidden: the template is public"));
                }
                self.begin(Work::DeleteTemplate(found.id))
            }
            Call::GetOperation => {
                let id = OperationId(self.id);
                zone.operations.get(&id).map(|found| operation(id, found)).ok_or_else(not_found)
            }
            Call::ListEvents => Ok(self.list_events()),
            Call::ListQuotas => {
                let all = self.state.quotas.keys().filter_map(|resource| self.quota(resource));
                Ok(json!({ "quotas": all.collect::<Vec<_>>() }))
            }
            Call::GetQuota => {
                let resource = self.request.url.path().rsplit('/').next().unwrap_or_default();
                self.quota(resource).ok_or_else(not_found)
            }
            Call::GetInstanceType | Call::GetImage | Call::Unknown => Err(not_found()),
        }
    }

    /// Whether the request is signed by a key that may do this. A bad signature and a missing permission have the
    /// same status.
    fn authorize(&self) -> Result<(), Refusal> {
        let forbidden = |message| refused(StatusCode::FORBIDDEN, message);
        let Request { headers, method, url, body, .. } = self.request;
        let Some(header) = headers.get(AUTHORIZATION) else {
            // The one public call; but if it is signed, the key needs the permission.
            return if self.call == Call::ListZones {
                Ok(())
            } else {
                Err(forbidden("Invalid request signature"))
            };
        };
        let signed = header.to_str().ok().and_then(Authorization::read).and_then(|read| {
            let (secret, allowed) = self.state.keys.get(read.credential)?;
            read.signs(secret, method.as_str(), url, body, self.now).then_some(allowed)
        });
        let allowed = signed.ok_or_else(|| forbidden("Invalid request signature"))?;
        let is_free = matches!(self.call, Call::GetOperation | Call::Unknown);
        if is_free || allowed.as_ref().is_none_or(|allowed| allowed.contains(&self.call)) {
            Ok(())
        } else {
            Err(forbidden("Forbidden by role policy for compute"))
        }
    }

    fn zone(&self) -> &Zone {
        &self.state.zones[&self.target.zone]
    }

    /// An instance on which no other operation works.
    fn idle_instance(&self, id: InstanceId) -> Result<&InstanceRecord, Refusal> {
        let zone = self.zone();
        let record = zone.instances.get(&id).ok_or_else(no_instance)?;
        let mut unsettled = zone.unsettled.iter().filter_map(|(_, id)| zone.operations.get(id));
        if unsettled.any(|operation| operation.work.instance() == Some(id)) {
            return Err(refused(StatusCode::CONFLICT, "Instance is busy"));
        }
        Ok(record)
    }

    fn body<T: DeserializeOwned>(&self) -> Result<T, Refusal> {
        let malformed = |error| (StatusCode::BAD_REQUEST, format!("malformed body: {error}"));
        serde_json::from_slice(&self.request.body).map_err(malformed)
    }

    fn create_instance(&mut self) -> Result<Value, Refusal> {
        let new: NewInstance = self.body()?;
        let template = self.zone().templates.get(&new.template.id).ok_or_else(not_found)?;
        if new.instance_type.id != INSTANCE_TYPE {
            return Err(not_found());
        }
        if new.disk_size << 30 < template.size_bytes {
            return Err(refused(StatusCode::BAD_REQUEST, "disk-size is smaller than the template"));
        }
        self.within_quota("instance")?;
        let id = self.state.add_instance(&self.target.zone, new, self.now);
        self.begin(Work::AddInstance(id))
    }

    fn set_running(&mut self, id: InstanceId, is_running: bool) -> Result<Value, Refusal> {
        if self.idle_instance(id)?.is_running == is_running {
            let message =
                if is_running { "Instance is already running" } else { "Instance is already stopped" };
            return Err(refused(StatusCode::CONFLICT, message));
        }
        self.begin(Work::SetRunning(id, is_running))
    }

    fn revert(&mut self, id: InstanceId) -> Result<Value, Refusal> {
        let Reference { id: snapshot } = self.body::<Reference<SnapshotId>>()?;
        let record = self.idle_instance(id)?;
        if record.is_running {
            return Err(refused(StatusCode::CONFLICT, "Instance must be stopped"));
        }
        let found = &good(self.zone(), snapshot)?.snapshot;
        if found.instance_id != Some(id) {
            return Err(refused(StatusCode::BAD_REQUEST, "the snapshot is of another instance"));
        }
        if found.size_gib.is_some_and(|size| size > record.disk.size_gib) {
            return Err(refused(StatusCode::BAD_REQUEST, "the disk is smaller than the snapshot"));
        }
        self.begin(Work::Revert { instance: id, snapshot })
    }

    fn reset(&mut self, id: InstanceId) -> Result<Value, Refusal> {
        let Reset { template, disk_size } = self.body()?;
        let record = self.idle_instance(id)?;
        let template = template.map_or(record.template, |template| template.id);
        let found = self.zone().templates.get(&template).ok_or_else(not_found)?;
        let disk_gib = disk_size.unwrap_or(record.disk.size_gib);
        if disk_gib << 30 < found.size_bytes {
            return Err(refused(StatusCode::BAD_REQUEST, "the disk is smaller than the template"));
        }
        self.begin(Work::Reset { instance: id, template, disk_gib })
    }

    fn snapshot(&self, record: &SnapshotRecord) -> Value {
        let found = &record.snapshot;
        let mut json = json!({
            "id": found.id,
            "name": found.name,
            "created-at": found.created_at,
            "state": found.state.as_str(),
            "size": found.size_gib,
        });
        if let Some(is_consistent) = found.application_consistent {
            json["application-consistent"] = is_consistent.into();
        }
        // Sparse, whatever the schema says: the id alone.
        if let Some(instance) = found.instance_id {
            json["instance"] = json!({ "id": instance });
        }
        if let Some((export, at)) = record.export {
            let (zone, key) = (&self.target.zone, store::key_of(found.id, export));
            let lifetime = self.state.address_lifetime.as_secs();
            let query = presign(self.state.address_secret, zone.as_str(), &key, at, lifetime);
            let address = format!("{}?{query}", self.target.host.object(zone, &key));
            json["export"] = json!({ "presigned-url": address, "md5sum": record.image.md5() });
        }
        json
    }

    fn delete(&mut self, id: SnapshotId) -> Result<Value, Refusal> {
        let zone = self.state.zones.get_mut(&self.target.zone).ok_or_else(not_found)?;
        let mut unsettled = zone.unsettled.iter().filter_map(|(_, id)| zone.operations.get(id));
        let is_in_use = unsettled.any(|operation| operation.work.snapshot() == Some(id));
        let state = &mut zone.snapshots.get_mut(&id).ok_or_else(not_found)?.snapshot.state;
        if is_in_use || state.is_in_flight() {
            return Err(refused(StatusCode::CONFLICT, "Snapshot is busy"));
        }
        let state_before = std::mem::replace(state, SnapshotState::Deleting);
        self.begin(Work::Delete { snapshot: id, state_before })
    }

    fn new_template(&self, description_max: usize) -> Result<NewTemplate, Refusal> {
        let malformed = |error| (StatusCode::BAD_REQUEST, format!("malformed body: {error}"));
        let read: NewTemplate = serde_json::from_slice(&self.request.body).map_err(malformed)?;
        let between = |text: &Option<String>, least: usize, most: usize| {
            text.as_ref().is_none_or(|text| (least..=most).contains(&text.chars().count()))
        };
        let is_valid = (1..=255).contains(&read.name.chars().count())
            && between(&read.description, 0, description_max)
            && between(&read.default_user, 1, 255);
        let refusal = || refused(StatusCode::BAD_REQUEST, "a text is too long or too short");
        if is_valid { Ok(read) } else { Err(refusal()) }
    }

    fn promote_snapshot(&mut self, id: SnapshotId) -> Result<Value, Refusal> {
        let record = good(self.zone(), id)?;
        let body = self.new_template(4096)?;
        let source = self.zone().templates.get(&record.template).ok_or_else(not_found)?;
        let template = Template {
            id: TemplateId(self.state.fresh_id()),
            name: body.name,
            description: body.description.unwrap_or_else(|| format!("Promoted snapshot - {id}")),
            public: false,
            size_bytes: record.image.virtual_bytes(),
            created_at: self.now,
            default_user: body.default_user.or_else(|| source.default_user.clone()),
            ssh_key_enabled: body.ssh_key_enabled.unwrap_or(source.ssh_key_enabled),
            password_enabled: body.password_enabled.unwrap_or(source.password_enabled),
            // Boot mode, family, version and build can't be given: they are the source's.
            ..source.clone()
        };
        self.within_quota("template")?;
        self.begin(Work::AddTemplate { template: Box::new(template), from: Some(id) })
    }

    fn register_template(&mut self) -> Result<Value, Refusal> {
        let bad = |message| Err(refused(StatusCode::BAD_REQUEST, message));
        let body = self.new_template(255)?;
        let (Some(url), Some(checksum), Some(ssh_key_enabled), Some(password_enabled)) =
            (body.url, body.checksum, body.ssh_key_enabled, body.password_enabled)
        else {
            return bad("missing keys: 'url', 'checksum', 'ssh-key-enabled' and 'password-enabled'");
        };
        if checksum.len() != 32 || !checksum.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return bad("'checksum' is not an MD5");
        }
        if !url::Url::parse(&url).is_ok_and(|url| matches!(url.scheme(), "http" | "https")) {
            return bad("'url' is not an address");
        }
        let boot_mode = body.boot_mode.unwrap_or_else(|| "legacy".to_owned());
        if !matches!(boot_mode.as_str(), "legacy" | "uefi") {
            return bad("'boot-mode' is neither 'legacy' nor 'uefi'");
        }
        self.within_quota("template")?;
        let template = Template {
            id: TemplateId(self.state.fresh_id()),
            name: body.name,
            description: body.description.unwrap_or_default(),
            public: false,
            size_bytes: body.size.unwrap_or(10 << 30),
            created_at: self.now,
            boot_mode,
            default_user: body.default_user,
            ssh_key_enabled,
            password_enabled,
            family: String::new(),
            version: body.version.unwrap_or_default(),
            build: body.build.unwrap_or_default(),
            maintainer: body.maintainer.unwrap_or_default(),
            application_consistent: body.application_consistent_snapshot_enabled.unwrap_or(false),
            url: Some(url),
            checksum: Some(checksum),
        };
        self.begin(Work::AddTemplate { template: Box::new(template), from: None })
    }

    fn template(&self, template: &Template) -> Value {
        let mut json = json!(template);
        json["zones"] = json!([self.target.zone]);
        json
    }

    fn list_templates(&self, zone: &Zone) -> Value {
        let argument = |wanted: &str| {
            let mut arguments = self.request.url.query_pairs();
            arguments.find(|(name, _)| name == wanted).map(|(_, value)| value.into_owned())
        };
        // Without `visibility=private` the answer has only the public ones.
        let public = argument("visibility").is_none_or(|visibility| visibility == "public");
        let family = argument("family");
        let all = zone.templates.values().filter(|template| {
            template.public == public && family.as_ref().is_none_or(|family| *family == template.family)
        });
        json!({ "templates": all.map(|template| self.template(template)).collect::<Vec<_>>() })
    }

    /// Organisation-wide usage and limit.
    fn usage(&self, resource: &str) -> Option<(usize, i64)> {
        let limit = *self.state.quotas.get(resource)?;
        let in_zone = |zone: &Zone| match resource {
            "snapshot" => zone.snapshots.len(),
            "template" => zone.templates.values().filter(|template| !template.public).count(),
            "instance" => zone.instances.len(),
            _ => 0,
        };
        Some((self.state.zones.values().map(in_zone).sum(), limit))
    }

    fn quota(&self, resource: &str) -> Option<Value> {
        let (usage, limit) = self.usage(resource)?;
        Some(json!({ "resource": resource, "usage": usage, "limit": limit }))
    }

    fn within_quota(&self, resource: &str) -> Result<(), Refusal> {
        let is_exceeded = |(usage, limit)| usize::try_from(limit).is_ok_and(|limit| usage >= limit);
        if self.usage(resource).is_some_and(is_exceeded) {
            let message = format!("The maximum number of resources of type {resource} has been exceeded");
            return Err((StatusCode::CONFLICT, message));
        }
        Ok(())
    }

    /// Starts an operation; the body of the answer.
    fn begin(&mut self, work: Work) -> Result<Value, Refusal> {
        let id = self.state.begin(&self.target.zone, work, self.ending, self.elapsed, self.now);
        self.zone().operations.get(&id).map(|begun| operation(id, begun)).ok_or_else(not_found)
    }
}

fn no_instance() -> Refusal {
    refused(StatusCode::NOT_FOUND, "Instance not found")
}

/// A snapshot that can be exported and promoted.
fn good(zone: &Zone, id: SnapshotId) -> Result<&SnapshotRecord, Refusal> {
    let found = zone.snapshots.get(&id).ok_or_else(not_found)?;
    let not_ready = || refused(StatusCode::CONFLICT, "Snapshot is not ready");
    if found.snapshot.state.is_good() { Ok(found) } else { Err(not_ready()) }
}

fn operation(id: OperationId, operation: &Operation) -> Value {
    let kind = match operation.work {
        Work::Create(_) | Work::Delete { .. } | Work::Export(_) => "snapshot",
        Work::AddTemplate { .. } | Work::DeleteTemplate(_) => "template",
        Work::AddInstance(_) | Work::SetRunning(..) | Work::Revert { .. } | Work::Reset { .. } => "instance",
    };
    let reference = operation.work.reference();
    let mut json = json!({
        "id": id,
        "state": if operation.settled { operation.ending.state } else { "pending" },
        "reference": {
            "id": reference,
            "link": format!("/v2/{kind}/{reference}"),
            "command": format!("get-{kind}"),
        },
    });
    if operation.settled {
        for (name, text) in [("reason", operation.ending.reason), ("message", operation.ending.message)] {
            if let Some(text) = text {
                json[name] = text.into();
            }
        }
    }
    json
}
