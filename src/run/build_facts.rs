//! What a manifest keeps so that the instance can be built again: read once for each export.
//!
//! The export is worth more than these: what can't be read is missing in the manifest, which then says so.

use tracing::warn;
use uuid::Uuid;

use crate::archive::manifest::{TemplateOrigin, TemplateRecord};
use crate::exoscale::client::ZoneClient;
use crate::exoscale::wire::InstanceDetails;
use crate::snapshot::{Instance, InstanceId, Machine, TemplateId};
use crate::text::chain;

/// What could be read of an instance and its template.
#[derive(Debug, Default)]
pub(crate) struct FoundFacts {
    pub(crate) machine: Option<Machine>,
    pub(crate) template: Option<TemplateRecord>,
    /// What is missing and why, each a sentence.
    pub(crate) missing: Vec<String>,
}

/// Reads an instance, its type and its template.
pub(crate) async fn find(
    client: &ZoneClient,
    id: Option<InstanceId>,
    listed: Option<&Instance>,
) -> FoundFacts {
    let mut found = FoundFacts::default();
    let Some(id) = id else { return found };
    let details = client.get_instance(id).await;
    let details = match details {
        Ok(Some(details)) => Some(details),
        Ok(None) => {
            found.missing(format!(
                "how to build instance {id} again is not recorded: it does not exist any more"
            ));
            None
        }
        Err(error) => {
            let why = chain(&error);
            found.missing(format!(
                "how to build instance {id} again is not recorded, since it cannot be read: {why}"
            ));
            None
        }
    };
    let template_id = details.as_ref().and_then(|details| details.instance.template_id);
    if let Some(InstanceDetails { mut machine, left_out, .. }) = details {
        if !left_out.is_empty() {
            let fields = left_out.join(", ");
            found.missing(format!("of instance {id} not all is recorded, since it is too long: {fields}"));
        }
        // The API names the type by its id alone.
        if let (None, Some(type_id)) = (&machine.instance_type, machine.instance_type_id) {
            machine.instance_type = found.type_name(client, type_id).await;
        }
        found.machine = Some(machine);
    }
    if let Some(template_id) = template_id.or(listed.and_then(|instance| instance.template_id)) {
        found.template = found.template_of(client, template_id).await;
    }
    found
}

impl FoundFacts {
    fn missing(&mut self, what: String) {
        warn!("{what}");
        self.missing.push(what);
    }

    async fn type_name(&mut self, client: &ZoneClient, id: Uuid) -> Option<String> {
        match client.get_instance_type(id).await {
            Ok(Some(name)) => Some(name),
            Ok(None) => {
                self.missing(format!("the name of instance type {id} is not recorded: the API gives none"));
                None
            }
            Err(error) => {
                let why = chain(&error);
                self.missing(format!(
                    "the name of instance type {id} is not recorded, since it cannot be read: {why}"
                ));
                None
            }
        }
    }

    async fn template_of(&mut self, client: &ZoneClient, id: TemplateId) -> Option<TemplateRecord> {
        let template = match client.get_template(id).await {
            Ok(found) => found?,
            Err(error) => {
                let why = chain(&error);
                self.missing(format!(
                    "boot mode and users are not recorded, since template {id} cannot be read: {why}"
                ));
                return None;
            }
        };
        let origin = TemplateOrigin {
            name: (1..=255).contains(&template.name.chars().count()).then_some(template.name),
            version: template.version,
            build: template.build,
            maintainer: template.maintainer,
        };
        Some(TemplateRecord {
            id,
            boot_mode: template.boot_mode,
            default_user: template.default_user,
            password_enabled: template.password_enabled,
            ssh_key_enabled: template.ssh_key_enabled,
            application_consistent: template.application_consistent,
            origin: Some(Box::new(origin)),
        })
    }
}
