//! The calls that a world knows, by the vendor's operation ids.

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Call {
    /// `GET /zone`
    ListZones,
    /// `GET /instance`
    ListInstances,
    /// `GET /instance/{id}`
    GetInstance,
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
    /// `GET /quota`
    ListQuotas,
    /// `GET /quota/{entity}`
    GetQuota,
    /// Anything at the object store.
    GetImage,
    /// Anything else: answered by 404.
    Unknown,
}

impl Call {
    /// The vendor's operation id; `get-image` for the object store, `unknown` for what is no operation.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ListZones => "list-zones",
            Self::ListInstances => "list-instances",
            Self::GetInstance => "get-instance",
            Self::CreateSnapshot => "create-snapshot",
            Self::ListSnapshots => "list-snapshots",
            Self::GetSnapshot => "get-snapshot",
            Self::DeleteSnapshot => "delete-snapshot",
            Self::ExportSnapshot => "export-snapshot",
            Self::PromoteSnapshot => "promote-snapshot-to-template",
            Self::ListTemplates => "list-templates",
            Self::GetTemplate => "get-template",
            Self::RegisterTemplate => "register-template",
            Self::DeleteTemplate => "delete-template",
            Self::GetOperation => "get-operation",
            Self::ListQuotas => "list-quotas",
            Self::GetQuota => "get-quota",
            Self::GetImage => "get-image",
            Self::Unknown => "unknown",
        }
    }

    /// Whether carrying it out changes anything that the organisation has.
    pub fn changes(self) -> bool {
        matches!(
            self,
            Self::CreateSnapshot
                | Self::DeleteSnapshot
                | Self::ExportSnapshot
                | Self::PromoteSnapshot
                | Self::RegisterTemplate
                | Self::DeleteTemplate
        )
    }
}
