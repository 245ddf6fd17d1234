//! The API's operations, as the platform answers them.

use std::collections::BTreeMap;
use std::time::Duration;

use http::header::AUTHORIZATION;
use http::{HeaderMap, Method, StatusCode};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::sim::answer::{Answer, Content};
use crate::sim::call::Call;
use crate::sim::fault::Ending;
use crate::sim::host::{Host, Target};
use crate::sim::signature::{Authorization, presign};
use crate::sim::store;
use crate::sim::world::{InstanceRecord, SnapshotRecord, State, Template, Work};
use crate::snapshot::{InstanceId, OperationId, SnapshotId, SnapshotState, TemplateId, ZoneName};
use crate::transport::Request;

/// A request to the API, and all that is needed to answer it.
pub(super) struct ApiRequest<'a> {
    pub(super) request: &'a Request,
    pub(super) target: &'a Target,
    /// The path behind `/v2`.
    pub(super) path: &'a str,
    /// How an operation that it starts ends.
    pub(super) ending: Ending,
    pub(super) elapsed: Duration,
    pub(super) now: Timestamp,
}

/// The call that a verb and a path behind `/v2` make, and the id in it. A wrong verb or separator is no call.
pub(super) fn route(method: &Method, path: &str) -> (Call, Option<Uuid>) {
    let (kind, rest) = path
        .trim_start_matches('/')
        .split_once('/')
        .map_or_else(|| (path.trim_start_matches('/'), None), |(kind, rest)| (kind, Some(rest)));
    let (id, action) =
        match rest.map(|rest| rest.split_once(':').map_or((rest, None), |(id, to)| (id, Some(to)))) {
            None => (None, None),
            Some((id, action)) => (Some(id), action),
        };
    let call = match (method.as_str(), kind, id.is_some(), action) {
        ("GET", "zone", false, None) => Call::ListZones,
        ("GET", "instance", false, None) => Call::ListInstances,
        ("GET", "instance", true, None) => Call::GetInstance,
        ("POST", "instance", true, Some("create-snapshot")) => Call::CreateSnapshot,
        ("GET", "snapshot", false, None) => Call::ListSnapshots,
        ("GET", "snapshot", true, None) => Call::GetSnapshot,
        ("DELETE", "snapshot", true, None) => Call::DeleteSnapshot,
        ("POST", "snapshot", true, Some("export")) => Call::ExportSnapshot,
        ("POST", "snapshot", true, Some("promote")) => Call::PromoteSnapshot,
        ("GET", "template", false, None) => Call::ListTemplates,
        ("GET", "template", true, None) => Call::GetTemplate,
        ("POST", "template", false, None) => Call::RegisterTemplate,
        ("DELETE", "template", true, None) => Call::DeleteTemplate,
        ("GET", "operation", true, None) => Call::GetOperation,
        ("GET", "quota", false, None) => Call::ListQuotas,
        ("GET", "quota", true, None) => return (Call::GetQuota, None),
        _ => return (Call::Unknown, None),
    };
    match id.map(Uuid::try_parse) {
        None => (call, None),
        Some(Ok(id)) => (call, Some(id)),
        Some(Err(_)) => (Call::Unknown, None),
    }
}

/// Answers one request of the API.
pub(super) fn answer(state: &mut State, api_request: &ApiRequest<'_>) -> Answer {
    carry_out(state, api_request).unwrap_or_else(|(status, message)| {
        ok_with(
            StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            json!({ "message": message }),
        )
    })
}

/// A status and a message in the classic form.
type Refusal = (u16, String);

fn not_found() -> Refusal {
    (404, "not found".to_owned())
}

fn refused(status: u16, message: &str) -> Refusal {
    (status, message.to_owned())
}

fn ok_with(status: StatusCode, json: Value) -> Answer {
    Answer { status, headers: HeaderMap::new(), content: Content::Json(json) }
}

fn ok(json: Value) -> Answer {
    ok_with(StatusCode::OK, json)
}

fn carry_out(state: &mut State, api_request: &ApiRequest<'_>) -> Result<Answer, Refusal> {
    let ApiRequest { request, target, path, now, .. } = *api_request;
    let (call, id) = route(&request.method, path);
    authorize(state, request, call, now)?;
    let zone = &target.zone;
    if !state.zones.contains_key(zone) {
        return Err(not_found());
    }
    let id = id.unwrap_or_default();
    match call {
        Call::ListZones => Ok(ok(zones(state, &target.host))),
        Call::ListInstances => Ok(ok(list_instances(state, zone))),
        Call::GetInstance => get_instance(state, zone, InstanceId(id)),
        Call::CreateSnapshot => create_snapshot(state, api_request, InstanceId(id)),
        Call::ListSnapshots => {
            let records = state.zones[zone].snapshots.values();
            let all: Vec<Value> = records.map(|record| snapshot(state, target, record)).collect();
            Ok(ok(json!({ "snapshots": all })))
        }
        Call::GetSnapshot => Ok(ok(snapshot(state, target, record(state, zone, SnapshotId(id))?))),
        Call::DeleteSnapshot => delete_snapshot(state, api_request, SnapshotId(id)),
        Call::ExportSnapshot => {
            good(state, zone, SnapshotId(id))?;
            Ok(begin(state, api_request, Work::Export(SnapshotId(id))))
        }
        Call::PromoteSnapshot => promote_snapshot(state, api_request, SnapshotId(id)),
        Call::ListTemplates => Ok(ok(list_templates(state, zone, request))),
        Call::GetTemplate => {
            let found = state.zones[zone].templates.get(&TemplateId(id)).ok_or_else(not_found)?;
            Ok(ok(template(zone, found)))
        }
        Call::RegisterTemplate => register_template(state, api_request),
        Call::DeleteTemplate => {
            let found = state.zones[zone].templates.get(&TemplateId(id)).ok_or_else(not_found)?;
            if found.public {
                return Err(refused(403, "Forbidden: the template is public"));
            }
            Ok(begin(state, api_request, Work::DeleteTemplate(TemplateId(id))))
        }
        Call::GetOperation => operation(state, zone, OperationId(id)).map(ok).ok_or_else(not_found),
        Call::ListQuotas => {
            let all: Vec<Value> = state.quotas.keys().filter_map(|resource| quota(state, resource)).collect();
            Ok(ok(json!({ "quotas": all })))
        }
        Call::GetQuota => {
            let resource = path.rsplit('/').next().unwrap_or_default();
            quota(state, resource).map(ok).ok_or_else(not_found)
        }
        Call::GetImage | Call::Unknown => Err(not_found()),
    }
}

/// Whether the request is signed by a key that may do this. A bad signature and a missing permission have the
/// same status.
fn authorize(state: &State, request: &Request, call: Call, now: Timestamp) -> Result<(), Refusal> {
    let Some(header) = request.headers.get(AUTHORIZATION) else {
        // The one public call; but if it is signed, the key needs the permission.
        return if call == Call::ListZones { Ok(()) } else { Err(refused(403, "Invalid request signature")) };
    };
    let key = header.to_str().ok().and_then(Authorization::read).and_then(|read| {
        let key = state.keys.get(read.credential)?;
        read.signs(&key.secret, request.method.as_str(), &request.url, &request.body, now).then_some(key)
    });
    let Some(key) = key else { return Err(refused(403, "Invalid request signature")) };
    let free = matches!(call, Call::GetOperation | Call::Unknown);
    if free || key.allowed.as_ref().is_none_or(|allowed| allowed.contains(&call)) {
        Ok(())
    } else {
        Err(refused(403, "Forbidden by role policy for compute"))
    }
}

fn zones(state: &State, host: &Host) -> Value {
    let all: Vec<Value> = state
        .zones
        .keys()
        .map(|zone| {
            json!({
                "name": zone,
                "api-endpoint": host.api(zone),
                "sos-endpoint": format!("https://sos-{zone}.exo.io"),
            })
        })
        .collect();
    json!({ "zones": all })
}

fn instance(id: InstanceId, record: &InstanceRecord) -> Value {
    json!({
        "id": id,
        "name": record.name,
        "labels": record.labels,
        "state": "running",
        "template": { "id": record.template },
        "created-at": seconds(record.created_at),
    })
}

fn list_instances(state: &State, zone: &ZoneName) -> Value {
    let records = state.zones[zone].instances.iter();
    let all: Vec<Value> = records.map(|(id, record)| instance(*id, record)).collect();
    json!({ "instances": all })
}

fn get_instance(state: &State, zone: &ZoneName, id: InstanceId) -> Result<Answer, Refusal> {
    let zone = &state.zones[zone];
    let record = zone.instances.get(&id).ok_or_else(|| refused(404, "Instance not found"))?;
    let snapshots: Vec<Value> = zone
        .snapshots
        .values()
        .filter(|record| record.snapshot.instance_id == Some(id))
        .map(|record| json!({ "id": record.snapshot.id }))
        .collect();
    let mut whole = instance(id, record);
    whole["snapshots"] = snapshots.into();
    whole["disk-size"] = record.disk.size_gib.into();
    Ok(ok(whole))
}

fn record<'a>(state: &'a State, zone: &ZoneName, id: SnapshotId) -> Result<&'a SnapshotRecord, Refusal> {
    state.zones[zone].snapshots.get(&id).ok_or_else(not_found)
}

/// A snapshot that can be exported and promoted.
fn good<'a>(state: &'a State, zone: &ZoneName, id: SnapshotId) -> Result<&'a SnapshotRecord, Refusal> {
    let found = record(state, zone, id)?;
    if found.snapshot.state.is_good() { Ok(found) } else { Err(refused(409, "Snapshot is not ready")) }
}

fn snapshot(state: &State, target: &Target, record: &SnapshotRecord) -> Value {
    let found = &record.snapshot;
    let mut json = json!({
        "id": found.id,
        "name": found.name,
        "created-at": seconds(found.created_at),
        "state": found.state.as_str(),
        "size": found.size_gib,
        "application-consistent": false,
    });
    // Sparse, whatever the schema says: the id alone.
    if let Some(instance) = found.instance_id {
        json["instance"] = json!({ "id": instance });
    }
    if let Some((export, at)) = record.export {
        let (zone, key) = (&target.zone, store::key_of(found.id, export));
        let query = presign(state.address_secret, zone.as_str(), &key, at, state.address_lifetime.as_secs());
        let address = format!("{}?{query}", target.host.object(zone, &key));
        json["export"] = json!({ "presigned-url": address, "md5sum": record.image.md5() });
    }
    json
}

/// RFC 3339 in whole seconds, as the API writes it.
fn seconds(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn create_snapshot(
    state: &mut State,
    api_request: &ApiRequest<'_>,
    instance: InstanceId,
) -> Result<Answer, Refusal> {
    let zone = &api_request.target.zone;
    if !state.zones[zone].instances.contains_key(&instance) {
        return Err(refused(404, "Instance not found"));
    }
    within_quota(state, "snapshot")?;
    let id = state.add_snapshot(instance, api_request.now, SnapshotState::Snapshotting);
    Ok(begin(state, api_request, Work::Create(id)))
}

fn delete_snapshot(
    state: &mut State,
    api_request: &ApiRequest<'_>,
    id: SnapshotId,
) -> Result<Answer, Refusal> {
    let zone = &api_request.target.zone;
    let state_before = record(state, zone, id)?.snapshot.state.clone();
    let found = &state.zones[zone];
    let in_use = found
        .unsettled
        .iter()
        .filter_map(|(_, operation)| found.operations.get(operation))
        .any(|operation| operation.work.snapshot() == Some(id));
    if in_use || state_before.is_in_flight() {
        return Err(refused(409, "Snapshot is busy"));
    }
    if let Some(record) = state.zones.get_mut(zone).and_then(|zone| zone.snapshots.get_mut(&id)) {
        record.snapshot.state = SnapshotState::Deleting;
    }
    Ok(begin(state, api_request, Work::Delete { snapshot: id, state_before }))
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
}

fn new_template(api_request: &ApiRequest<'_>, description_max: usize) -> Result<NewTemplate, Refusal> {
    let read: NewTemplate = serde_json::from_slice(&api_request.request.body)
        .map_err(|error| (400, format!("malformed body: {error}")))?;
    let between = |text: &Option<String>, least: usize, most: usize| {
        text.as_ref().is_none_or(|text| (least..=most).contains(&text.chars().count()))
    };
    let is_valid = (1..=255).contains(&read.name.chars().count())
        && between(&read.description, 0, description_max)
        && between(&read.default_user, 1, 255);
    if is_valid { Ok(read) } else { Err(refused(400, "a text is too long or too short")) }
}

fn promote_snapshot(
    state: &mut State,
    api_request: &ApiRequest<'_>,
    id: SnapshotId,
) -> Result<Answer, Refusal> {
    let zone = &api_request.target.zone;
    let record = good(state, zone, id)?;
    let body = new_template(api_request, 4096)?;
    let source = state.zones[zone].templates.get(&record.template).ok_or_else(not_found)?;
    let template = Template {
        id: TemplateId(state.fresh_id()),
        name: body.name,
        description: body.description.unwrap_or_else(|| format!("Promoted snapshot - {id}")),
        public: false,
        size_bytes: record.image.virtual_bytes(),
        created_at: api_request.now,
        default_user: body.default_user.or_else(|| source.default_user.clone()),
        ssh_key_enabled: body.ssh_key_enabled.unwrap_or(source.ssh_key_enabled),
        password_enabled: body.password_enabled.unwrap_or(source.password_enabled),
        // Boot mode and origin can't be given: they are the source's.
        ..source.clone()
    };
    within_quota(state, "template")?;
    Ok(begin(state, api_request, Work::AddTemplate { template: Box::new(template), from: Some(id) }))
}

fn register_template(state: &mut State, api_request: &ApiRequest<'_>) -> Result<Answer, Refusal> {
    let body = new_template(api_request, 255)?;
    let (Some(url), Some(checksum), Some(ssh_key_enabled), Some(password_enabled)) =
        (body.url, body.checksum, body.ssh_key_enabled, body.password_enabled)
    else {
        return Err(refused(
            400,
            "missing keys: 'url', 'checksum', 'ssh-key-enabled' and 'password-enabled'",
        ));
    };
    if checksum.len() != 32 || !checksum.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(refused(400, "'checksum' is not an MD5"));
    }
    if !url::Url::parse(&url).is_ok_and(|url| matches!(url.scheme(), "http" | "https")) {
        return Err(refused(400, "'url' is not an address"));
    }
    let boot_mode = body.boot_mode.unwrap_or_else(|| "legacy".to_owned());
    if !matches!(boot_mode.as_str(), "legacy" | "uefi") {
        return Err(refused(400, "'boot-mode' is neither 'legacy' nor 'uefi'"));
    }
    within_quota(state, "template")?;
    let template = Template {
        id: TemplateId(state.fresh_id()),
        name: body.name,
        description: body.description.unwrap_or_default(),
        public: false,
        size_bytes: body.size.unwrap_or(10 << 30),
        created_at: api_request.now,
        boot_mode,
        default_user: body.default_user,
        ssh_key_enabled,
        password_enabled,
        origin: [String::new(), body.version.unwrap_or_default(), body.build.unwrap_or_default()],
        url: Some(url),
        checksum: Some(checksum),
    };
    Ok(begin(state, api_request, Work::AddTemplate { template: Box::new(template), from: None }))
}

fn template(zone: &ZoneName, template: &Template) -> Value {
    let mut json = json!({
        "id": template.id,
        "name": template.name,
        "visibility": if template.public { "public" } else { "private" },
        // Bytes, unlike a snapshot's.
        "size": template.size_bytes,
        "created-at": seconds(template.created_at),
        "boot-mode": template.boot_mode,
        "ssh-key-enabled": template.ssh_key_enabled,
        "password-enabled": template.password_enabled,
        "application-consistent-snapshot-enabled": false,
        "zones": [zone],
    });
    let [family, version, build] = &template.origin;
    let texts: BTreeMap<&str, Option<&String>> = BTreeMap::from([
        ("description", Some(&template.description)),
        ("default-user", template.default_user.as_ref()),
        ("url", template.url.as_ref()),
        ("checksum", template.checksum.as_ref()),
        ("family", Some(family)),
        ("version", Some(version)),
        ("build", Some(build)),
    ]);
    for (name, text) in texts {
        if let Some(text) = text.filter(|text| !text.is_empty()) {
            json[name] = text.as_str().into();
        }
    }
    json
}

fn list_templates(state: &State, zone: &ZoneName, request: &Request) -> Value {
    let argument = |wanted: &str| {
        request.url.query_pairs().find(|(name, _)| name == wanted).map(|(_, value)| value.into_owned())
    };
    // Without `visibility=private` the answer has only the public ones.
    let public = argument("visibility").is_none_or(|visibility| visibility == "public");
    let family = argument("family");
    let all: Vec<Value> = state.zones[zone]
        .templates
        .values()
        .filter(|template| template.public == public)
        .filter(|template| family.as_ref().is_none_or(|family| *family == template.origin[0]))
        .map(|found| template(zone, found))
        .collect();
    json!({ "templates": all })
}

/// Organisation-wide usage and limit.
fn quota(state: &State, resource: &str) -> Option<Value> {
    let limit = *state.quotas.get(resource)?;
    let zones = state.zones.values();
    let usage: usize = match resource {
        "snapshot" => zones.map(|zone| zone.snapshots.len()).sum(),
        "template" => {
            zones.map(|zone| zone.templates.values().filter(|template| !template.public).count()).sum()
        }
        "instance" => zones.map(|zone| zone.instances.len()).sum(),
        _ => 0,
    };
    Some(json!({ "resource": resource, "usage": usage, "limit": limit }))
}

fn within_quota(state: &State, resource: &str) -> Result<(), Refusal> {
    let Some(quota) = quota(state, resource) else { return Ok(()) };
    match (quota["usage"].as_i64(), quota["limit"].as_i64()) {
        (Some(usage), Some(limit)) if limit >= 0 && usage >= limit => {
            Err((409, format!("The maximum number of resources of type {resource} has been exceeded")))
        }
        _ => Ok(()),
    }
}

/// Starts an operation and answers with it.
fn begin(state: &mut State, api_request: &ApiRequest<'_>, work: Work) -> Answer {
    let zone = &api_request.target.zone;
    let id = state.begin(zone, work, api_request.ending, api_request.elapsed, api_request.now);
    ok(operation(state, zone, id).unwrap_or_default())
}

fn operation(state: &State, zone: &ZoneName, id: OperationId) -> Option<Value> {
    let operation = state.zones[zone].operations.get(&id)?;
    let kind = match operation.work {
        Work::Create(_) | Work::Delete { .. } | Work::Export(_) => "snapshot",
        Work::AddTemplate { .. } | Work::DeleteTemplate(_) => "template",
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
    Some(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_verb_separator_or_id_is_no_operation() {
        let id = "b0c0ef2c-106a-4f3c-a5aa-5e6176d0f105";
        let table = [
            ("POST", format!("/snapshot/{id}:export"), Call::ExportSnapshot),
            ("POST", format!("/snapshot/{id}/export"), Call::Unknown),
            ("PUT", format!("/snapshot/{id}:export"), Call::Unknown),
            ("POST", format!("/snapshot/{id}:destroy"), Call::Unknown),
            ("DELETE", format!("/snapshot/{id}"), Call::DeleteSnapshot),
            ("DELETE", "/snapshot/1".to_owned(), Call::Unknown),
            ("DELETE", "/snapshot".to_owned(), Call::Unknown),
            ("GET", "/snapshot".to_owned(), Call::ListSnapshots),
            ("GET", "/snapshot/".to_owned(), Call::Unknown),
            ("GET", String::new(), Call::Unknown),
            ("GET", "/quota/snapshot".to_owned(), Call::GetQuota),
        ];
        for (method, path, expected) in table {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            assert_eq!(route(&method, &path).0, expected, "{method} {path}");
        }
    }
}
