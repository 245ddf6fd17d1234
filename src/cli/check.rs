//! `check`: reads the configuration; `--online` also tests the permissions that the policies need.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use crate::cli::args::Global;
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::{Exit, Refusal};
use crate::cli::output::{Output, Tone};
use crate::config::sections::Config;
use crate::exoscale::client::ZoneClient;
use crate::exoscale::error::{ApiError, ErrorKind};
use crate::exoscale::wire::PromoteRequest;
use crate::policy::Policy;
use crate::policy::name::PolicyName;
use crate::randomness::{Randomness, fresh_id};
use crate::run::context::Runner;
use crate::schedule::Schedule;
use crate::snapshot::{InstanceId, SnapshotId, TemplateId, ZoneName};
use crate::text::{chain, counted, printable};

#[derive(Serialize)]
struct CheckOutput<'a> {
    config: String,
    policies: Vec<CheckedPolicy<'a>>,
    /// The tests; `None` without `--online`.
    online: Option<Vec<Tried>>,
}

#[derive(Serialize)]
struct CheckedPolicy<'a> {
    policy: &'a PolicyName,
    enabled: bool,
    schedule: Option<&'a str>,
    next_run: Option<Timestamp>,
    zones: &'a [ZoneName],
    does: Vec<&'static str>,
}

#[derive(Serialize)]
struct Tried {
    #[serde(rename = "where")]
    place: String,
    what: &'static str,
    /// The failure, if any.
    error: Option<String>,
}

/// Checks the configuration.
///
/// # Errors
/// [`Refusal`] if the configuration or the credentials are unusable.
pub async fn check(global: &Global, online: bool, output: Output) -> Result<Exit, Refusal> {
    let config = assemble::configuration(global)?;
    let seams = Seams::real();
    let online = if online {
        let credentials = assemble::credentials(&config)?;
        let runner = assemble::runner(&config, credentials, &seams, Use::Reading)?;
        Some(try_all(&config, &runner).await)
    } else {
        None
    };
    let failed = online.as_ref().is_some_and(|tried| tried.iter().any(|tried| tried.error.is_some()));
    let checked = CheckOutput {
        config: global.config.display().to_string(),
        policies: config.policies.iter().map(|policy| checked(policy, seams.clock.now())).collect(),
        online,
    };
    output.show(&checked, |checked| render(checked, output));
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

fn checked(policy: &Policy, now: Timestamp) -> CheckedPolicy<'_> {
    let does = [
        (policy.create, "create"),
        (policy.export.is_some(), "export"),
        (policy.promote.is_some(), "promote"),
        (policy.retention.is_some(), "prune"),
    ];
    CheckedPolicy {
        policy: &policy.name,
        enabled: policy.enabled,
        schedule: policy.schedule.as_ref().map(Schedule::as_str),
        next_run: policy.schedule.as_ref().and_then(|schedule| schedule.next_after(now, &policy.time_zone)),
        zones: &policy.zones,
        does: does.into_iter().filter_map(|(does, word)| does.then_some(word)).collect(),
    }
}

fn render(checked: &CheckOutput<'_>, output: Output) -> String {
    let mut text =
        format!("{}: valid, {}\n", printable(&checked.config), counted(checked.policies.len(), "policy"));
    let plain = |text: String| (text, Tone::Plain);
    let rows = checked
        .policies
        .iter()
        .map(|policy| {
            let zones: Vec<&str> = policy.zones.iter().map(ZoneName::as_str).collect();
            let does = if policy.does.is_empty() { "list".to_owned() } else { policy.does.join(", ") };
            vec![
                plain(policy.policy.to_string()),
                plain(if policy.enabled { "yes" } else { "no" }.to_owned()),
                plain(policy.schedule.unwrap_or("(manual)").to_owned()),
                plain(policy.next_run.map_or_else(|| "-".to_owned(), |next| next.to_string())),
                plain(zones.join(", ")),
                plain(does),
            ]
        })
        .collect();
    text.push_str(&output.table(&["POLICY", "ENABLED", "SCHEDULE", "NEXT DUE", "ZONES", "DOES"], rows));
    if let Some(tried) = &checked.online {
        let rows = tried
            .iter()
            .map(|tried| {
                let (word, tone) = match &tried.error {
                    None => ("ok".to_owned(), Tone::Good),
                    Some(error) => (error.clone(), Tone::Bad),
                };
                vec![plain(tried.place.clone()), plain(tried.what.to_owned()), (word, tone)]
            })
            .collect();
        // Writing to a String cannot fail.
        let _ = write!(text, "\n{}", output.table(&["WHERE", "WHAT", "RESULT"], rows));
    }
    text
}

/// Tests everything that the enabled policies need, in every zone and archive that they name.
async fn try_all(config: &Config, runner: &Runner) -> Vec<Tried> {
    let mut needs: BTreeMap<&ZoneName, BTreeSet<Need>> = BTreeMap::new();
    let mut archives = BTreeSet::new();
    for policy in config.policies.iter().filter(|policy| policy.enabled) {
        archives.extend(policy.export.iter().flat_map(|export| &export.archives));
        for zone in &policy.zones {
            needs.entry(zone).or_default().extend(needs_of(policy));
        }
    }
    let mut tried = Vec::new();
    for (zone, needs) in needs {
        let client = runner.client.zone(zone);
        for need in needs {
            let error = need.attempt(&client, &*runner.randomness, runner.clock.now()).await;
            tried.push(Tried {
                place: format!("zone {zone}"),
                what: need.operation(),
                error: error.err().map(|error| chain(&error)),
            });
        }
    }
    if config.policies.iter().any(|policy| policy.enabled && policy.select.is_in_doubt()) {
        let error = runner.metadata.this_machine().await.err().map(|error| chain(&error));
        tried.push(Tried { place: "this machine".to_owned(), what: "self", error });
    }
    for name in archives {
        let error = match runner.archives.get(name) {
            Some(archive) => archive.catalogue().await.err().map(|error| chain(&error)),
            None => Some("it is not configured".to_owned()),
        };
        tried.push(Tried { place: format!("archive {name}"), what: "read", error });
    }
    tried
}

/// A permission that a policy needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Need {
    ListSnapshots,
    ListInstances,
    GetSnapshot,
    GetQuota,
    CreateSnapshot,
    DeleteSnapshot,
    ExportSnapshot,
    ListTemplates,
    GetTemplate,
    PromoteSnapshot,
    DeleteTemplate,
}

fn needs_of(policy: &Policy) -> Vec<Need> {
    let mut needs = vec![Need::ListSnapshots, Need::ListInstances];
    if policy.create {
        needs.extend([Need::CreateSnapshot, Need::GetSnapshot, Need::GetQuota]);
    }
    if policy.retention.is_some() {
        needs.extend([Need::GetSnapshot, Need::DeleteSnapshot]);
    }
    if policy.export.is_some() {
        needs.extend([Need::GetSnapshot, Need::ExportSnapshot, Need::GetTemplate]);
    }
    if let Some(promote) = &policy.promote {
        needs.extend([Need::ListTemplates, Need::PromoteSnapshot]);
        needs.extend(promote.keep.map(|_| Need::DeleteTemplate));
    }
    needs
}

impl Need {
    /// The API's name of it, as a role's policy spells it.
    fn operation(self) -> &'static str {
        match self {
            Self::ListSnapshots => "list-snapshots",
            Self::ListInstances => "list-instances",
            Self::GetSnapshot => "get-snapshot",
            Self::GetQuota => "get-quota",
            Self::CreateSnapshot => "create-snapshot",
            Self::DeleteSnapshot => "delete-snapshot",
            Self::ExportSnapshot => "export-snapshot",
            Self::ListTemplates => "list-templates",
            Self::GetTemplate => "get-template",
            Self::PromoteSnapshot => "promote-snapshot-to-template",
            Self::DeleteTemplate => "delete-template",
        }
    }

    /// Tests it. Operations that change something are tested with a new random id that does not exist: "not found"
    /// means that they are permitted, and nothing can be changed.
    async fn attempt(
        self,
        client: &ZoneClient,
        randomness: &dyn Randomness,
        now: Timestamp,
    ) -> Result<(), ApiError> {
        let nothing: Uuid = fresh_id(randomness, now);
        let (snapshot, template) = (SnapshotId(nothing), TemplateId(nothing));
        let tried = match self {
            Self::ListSnapshots => client.list_snapshots().await.map(drop),
            Self::ListInstances => client.list_instances().await.map(drop),
            Self::GetSnapshot => client.get_snapshot(snapshot).await.map(drop),
            Self::GetQuota => client.get_quota("snapshot").await.map(drop),
            Self::CreateSnapshot => client.create_snapshot(InstanceId(nothing)).await.map(drop),
            Self::DeleteSnapshot => client.delete_snapshot(snapshot).await.map(drop),
            Self::ExportSnapshot => client.export_snapshot(snapshot).await.map(drop),
            Self::ListTemplates => client.list_templates().await.map(drop),
            Self::GetTemplate => client.get_template(template).await.map(drop),
            Self::PromoteSnapshot => {
                let request = PromoteRequest {
                    name: "snapwarden check".to_owned(),
                    description: None,
                    default_user: None,
                    password_enabled: None,
                    ssh_key_enabled: None,
                };
                client.promote_snapshot(snapshot, &request).await.map(drop)
            }
            Self::DeleteTemplate => client.delete_template(template).await.map(drop),
        };
        match tried {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}
