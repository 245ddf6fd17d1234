//! Lists a zone, and puts together all that a judgement may depend on.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::future::{FutureExt as _, join, join_all};

use crate::archive::catalogue::Catalogue;
use crate::policy::{ArchiveName, Policy};
use crate::retention::inventory::{ArchivedCopy, ClockSkew, Copies, Hold, Inventory};
use crate::run::Runner;
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, SnapshotState, ZoneName};
use crate::state::audit::Subject;
use crate::text::{chain, counted, printable};

/// What each archive holds, or why that can't be told.
pub type Catalogues = BTreeMap<ArchiveName, Result<Arc<Catalogue>, String>>;

/// A complete listing of a zone.
#[derive(Debug, Clone)]
pub struct Listing {
    /// For judging.
    pub inventory: Inventory,
    /// For proving, at the moment of deletion, what was judged.
    pub catalogues: Catalogues,
    /// What is odd about it.
    pub warnings: Vec<String>,
    instances: HashMap<InstanceId, usize>,
}

impl Listing {
    /// The instance of a snapshot, if it is listed.
    pub fn instance_of(&self, snapshot: &Snapshot) -> Option<&Instance> {
        let place = self.instances.get(&snapshot.instance_id?)?;
        self.inventory.instances.get(*place)
    }

    /// A listed snapshot, as the audit log and the report name it.
    pub(crate) fn subject(&self, snapshot: &Snapshot) -> Subject {
        Subject::of(snapshot, self.instance_of(snapshot))
    }
}

/// Reads what every archive holds that an enabled policy names.
pub async fn catalogues(runner: &Runner) -> Catalogues {
    let names: BTreeSet<&ArchiveName> = runner
        .policies
        .iter()
        .filter(|policy| policy.enabled)
        .filter_map(|policy| policy.export.as_ref())
        .flat_map(|export| &export.archives)
        .collect();
    let mut read: Vec<BoxFuture<'_, _>> = Vec::new();
    for name in names {
        read.push(
            async move {
                let catalogue = match runner.archives.get(name) {
                    Some(archive) => archive.catalogue().await.map(Arc::new).map_err(|error| chain(&error)),
                    None => Err("it is not configured".to_owned()),
                };
                (name.clone(), catalogue)
            }
            .boxed(),
        );
    }
    join_all(read).await.into_iter().collect()
}

/// Both listings of a zone, and how far this machine's clock was from the API's then.
#[derive(Debug, Clone)]
pub struct RawListing {
    snapshots: Vec<Snapshot>,
    instances: Vec<Instance>,
    clock: ClockSkew,
}

/// Lists a zone. Anything less than both listings, whole and decoded, is an error.
///
/// # Errors
/// Why the zone can't be judged, as a sentence.
pub async fn list(runner: &Runner, zone: &ZoneName) -> Result<RawListing, String> {
    let client = runner.client.zone(zone);
    match join(client.list_snapshots(), client.list_instances()).await {
        (Ok((listed, clock_skew)), Ok(instances)) => {
            let clock = clock_skew.map_or(ClockSkew::Unknown, ClockSkew::Known);
            Ok(RawListing { snapshots: listed.snapshots, instances, clock })
        }
        (Err(error), _) | (_, Err(error)) => {
            Err(format!("nothing is done here, since the listing is not complete: {}", chain(&error)))
        }
    }
}

/// Adds to the listings of a zone what people pinned, what this program made, and what the archives hold.
///
/// # Errors
/// Why the zone can't be judged, as a sentence.
pub async fn complete(
    runner: &Runner,
    zone: &ZoneName,
    seen: RawListing,
    catalogues: &Catalogues,
) -> Result<Listing, String> {
    let holds = runner.state.holds().await.map_err(|error| {
        format!("nothing is done here, since it can't be told what is held: {}", chain(&error))
    })?;
    let holds = holds.holds.into_iter().map(|hold| {
        let pin = Hold { until: hold.until, reason: hold.reason };
        (hold.snapshot, pin)
    });
    let copies = catalogues.iter().map(|(name, catalogue)| {
        let copies = match catalogue {
            Ok(catalogue) => Copies::Known(copies_in(catalogue, zone)),
            Err(reason) => Copies::Unreachable(reason.clone()),
        };
        (name.clone(), copies)
    });
    let inventory = Inventory {
        zone: zone.clone(),
        snapshots: seen.snapshots,
        instances: seen.instances,
        created: created(runner, zone).await?,
        coming: HashSet::new(),
        holds: holds.collect(),
        archives: copies.collect(),
        clock: seen.clock,
    };
    Ok(listed(inventory, catalogues.clone()))
}

/// What this program is known to have made, if any policy that speaks about the zone asks for that. It is read
/// after the listing, so that it knows of all that is listed.
async fn created(runner: &Runner, zone: &ZoneName) -> Result<HashSet<SnapshotId>, String> {
    let asks = |policy: &Policy| policy.enabled && policy.select.only_created && policy.zones.contains(zone);
    if !runner.policies.iter().any(asks) {
        return Ok(HashSet::new());
    }
    runner.state.created_snapshots().await.map_err(|error| {
        format!("nothing is done here, since what this program made can't be told: {}", chain(&error))
    })
}

/// Puts a listing together with what is odd about it.
pub fn listed(inventory: Inventory, catalogues: Catalogues) -> Listing {
    let instances: HashMap<_, _> =
        inventory.instances.iter().enumerate().map(|(place, instance)| (instance.id, place)).collect();
    let mut warnings: Vec<String> = Vec::new();
    for snapshot in &inventory.snapshots {
        if let SnapshotState::Unknown(word) = &snapshot.state {
            warnings.push(format!(
                "snapshot {} ({}) is in the unknown state `{}`: it is left alone",
                printable(&snapshot.name),
                snapshot.id,
                printable(word),
            ));
        }
    }
    for (name, catalogue) in &catalogues {
        match catalogue {
            Ok(catalogue) => warnings.extend(unreliable(name, catalogue)),
            Err(reason) => warnings.push(format!(
                "archive {name} can't be read, so whatever needs a copy there stays: {reason}"
            )),
        }
    }
    Listing { inventory, catalogues, warnings, instances }
}

/// A copy that was lost must not wait to be looked for: its snapshot may be gone.
fn unreliable(name: &ArchiveName, catalogue: &Catalogue) -> Option<String> {
    let first = catalogue.problems().first()?;
    Some(format!(
        "archive {name} has {} that can't be relied on, such as {}; see `snapwarden archive list {name}`",
        counted(catalogue.problems().len(), "file"),
        first.describe()
    ))
}

fn copies_in(catalogue: &Catalogue, zone: &ZoneName) -> Vec<ArchivedCopy> {
    catalogue
        .copies()
        .iter()
        .map(|copy| &copy.manifest)
        .filter(|manifest| manifest.zone == *zone)
        .map(|manifest| ArchivedCopy {
            snapshot_id: manifest.snapshot.id,
            instance_id: manifest.instance.id,
            created_at: manifest.snapshot.created_at,
        })
        .collect()
}
