//! The calls that a world knows, by the vendor's operation ids.

use http::Method;
use uuid::Uuid;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Call {
    /// `GET /zone`
    ListZones,
    /// `GET /instance`
    ListInstances,
    /// `GET /instance/{id}`
    GetInstance,
    /// `POST /instance`
    CreateInstance,
    /// `PUT /instance/{id}:stop`
    StopInstance,
    /// `PUT /instance/{id}:start`
    StartInstance,
    /// `PUT /instance/{id}:reset`
    ResetInstance,
    /// `POST /instance/{id}:revert-snapshot`
    RevertInstance,
    /// `GET /instance-type/{id}`
    GetInstanceType,
    /// `POST /instance/{id}:create-snapshot`
    CreateSnapshot,
    /// `GET /snapshot`
    ListSnapshots,
    /// `GET /snapshot/{id}`
    GetSnapshot,
    /// `DELETE /snapshot/{id}`
    DeleteSnapshot,
    /// `POST /snapshot/{id}:export`
    ExportSnapshot,
    /// `POST /snapshot/{id}:promote`
    PromoteSnapshot,
    /// `GET /template`
    ListTemplates,
    /// `GET /template/{id}`
    GetTemplate,
    /// `POST /template`
    RegisterTemplate,
    /// `DELETE /template/{id}`
    DeleteTemplate,
    /// `GET /operation/{id}`
    GetOperation,
    /// `GET /event`
    ListEvents,
    /// `GET /quota`
    ListQuotas,
    /// `GET /quota/{entity}`
    GetQuota,
    /// Anything at the object store.
    GetImage,
    /// Anything else: answered by 404.
    Unknown,
}

/// Each operation of the API: verb, collection, whether an id follows, the action behind the id, and its name.
type Operation = (Call, &'static str, &'static str, bool, Option<&'static str>, &'static str);

const OPERATIONS: [Operation; 23] = [
    (Call::ListZones, "GET", "zone", false, None, "list-zones"),
    (Call::ListInstances, "GET", "instance", false, None, "list-instances"),
    (Call::GetInstance, "GET", "instance", true, None, "get-instance"),
    (Call::CreateInstance, "POST", "instance", false, None, "create-instance"),
    (Call::StopInstance, "PUT", "instance", true, Some("stop"), "stop-instance"),
    (Call::StartInstance, "PUT", "instance", true, Some("start"), "start-instance"),
    (Call::ResetInstance, "PUT", "instance", true, Some("reset"), "reset-instance"),
    (Call::RevertInstance, "POST", "instance", true, Some("revert-snapshot"), "revert-instance-to-snapshot"),
    (Call::GetInstanceType, "GET", "instance-type", true, None, "get-instance-type"),
    (Call::CreateSnapshot, "POST", "instance", true, Some("create-snapshot"), "create-snapshot"),
    (Call::ListSnapshots, "GET", "snapshot", false, None, "list-snapshots"),
    (Call::GetSnapshot, "GET", "snapshot", true, None, "get-snapshot"),
    (Call::DeleteSnapshot, "DELETE", "snapshot", true, None, "delete-snapshot"),
    (Call::ExportSnapshot, "POST", "snapshot", true, Some("export"), "export-snapshot"),
    (Call::PromoteSnapshot, "POST", "snapshot", true, Some("promote"), "promote-snapshot-to-template"),
    (Call::ListTemplates, "GET", "template", false, None, "list-templates"),
    (Call::GetTemplate, "GET", "template", true, None, "get-template"),
    (Call::RegisterTemplate, "POST", "template", false, None, "register-template"),
    (Call::DeleteTemplate, "DELETE", "template", true, None, "delete-template"),
    (Call::GetOperation, "GET", "operation", true, None, "get-operation"),
    (Call::ListEvents, "GET", "event", false, None, "list-events"),
    (Call::ListQuotas, "GET", "quota", false, None, "list-quotas"),
    (Call::GetQuota, "GET", "quota", true, None, "get-quota"),
];

impl Call {
    /// The call that has this operation id.
    pub fn named(operation: &str) -> Option<Self> {
        OPERATIONS.iter().find(|known| known.5 == operation).map(|known| known.0)
    }

    /// The call that a verb and a path behind `/v2` make, and the id in it. A wrong verb or separator is no call.
    pub(super) fn of(method: &Method, path: &str) -> (Self, Option<Uuid>) {
        let path = path.trim_start_matches('/');
        let (kind, rest) = path.split_once('/').map_or((path, None), |(kind, rest)| (kind, Some(rest)));
        let (id, action) = rest.and_then(|rest| rest.split_once(':')).unzip();
        let id = id.or(rest);
        let wanted = (method.as_str(), kind, id.is_some(), action);
        let found = OPERATIONS.iter().find(|operation| {
            let (_, verb, kind, has_id, action, _) = **operation;
            (verb, kind, has_id, action) == wanted
        });
        match (found.map(|operation| operation.0), id.map(Uuid::try_parse)) {
            // Named by a resource, not by an id.
            (Some(Self::GetQuota), _) => (Self::GetQuota, None),
            (Some(call), None) => (call, None),
            (Some(call), Some(Ok(id))) => (call, Some(id)),
            _ => (Self::Unknown, None),
        }
    }

    /// The vendor's operation id; `get-image` for the object store, `unknown` for what is no operation.
    pub fn as_str(self) -> &'static str {
        let other = if self == Self::GetImage { "get-image" } else { "unknown" };
        OPERATIONS.iter().find(|operation| operation.0 == self).map_or(other, |operation| operation.5)
    }

    /// Whether carrying it out changes anything that the organisation has.
    pub fn changes(self) -> bool {
        matches!(
            self,
            Self::CreateInstance
                | Self::StopInstance
                | Self::StartInstance
                | Self::ResetInstance
                | Self::RevertInstance
                | Self::CreateSnapshot
                | Self::DeleteSnapshot
                | Self::ExportSnapshot
                | Self::PromoteSnapshot
                | Self::RegisterTemplate
                | Self::DeleteTemplate
        )
    }
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
            ("GET", format!("/snapshot/{id}:"), Call::Unknown),
        ];
        for (method, path, expected) in table {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            assert_eq!(Call::of(&method, &path).0, expected, "{method} {path}");
        }
    }
}
