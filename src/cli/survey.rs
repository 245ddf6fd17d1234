//! What the zones and the archives know, for commands that are given a name, and which of them could not be asked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join, join_all};
use jiff::Timestamp;

use crate::archive::catalogue::{Catalogue, StoredCopy};
use crate::cli::assemble::{self, Seams, Use};
use crate::cli::exit::Refusal;
use crate::clock::timeout;
use crate::config::sections::{ArchiveSettings, Config};
use crate::lookup::{Known, LookupError};
use crate::policy::name::ArchiveName;
use crate::run::archive_presence::Looker;
use crate::snapshot::{Instance, InstanceId, Snapshot, SnapshotId, ZoneName};
use crate::state::directory::StateDirectory;
use crate::state::holds::About;
use crate::text::chain;

/// How long a zone or an archive may take to answer.
pub(super) const LOOK_WAIT_MAX: Duration = Duration::from_secs(20);

/// The listings of a zone.
#[derive(Debug)]
pub(super) struct ZoneListing {
    pub(super) zone: ZoneName,
    pub(super) snapshots: Vec<Snapshot>,
    pub(super) instances: Vec<Instance>,
    /// Whether both listings came.
    pub(super) is_whole: bool,
}

impl ZoneListing {
    /// The instance of a snapshot, if it is listed.
    pub(super) fn instance_of(&self, snapshot: &Snapshot) -> Option<&Instance> {
        self.instances.iter().find(|instance| Some(instance.id) == snapshot.instance_id)
    }
}

/// What was asked, and the answers.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Those that answered.
    pub(super) zones: Vec<ZoneListing>,
    /// Those that could be read.
    pub(super) archives: Vec<Arc<Catalogue>>,
    /// Which zones and archives were asked.
    asked: Vec<String>,
    /// Which did not answer, or not wholly, and why; each a sentence.
    pub(super) unasked: Vec<String>,
}

/// A listed snapshot.
pub(super) fn known(zone: &ZoneName, snapshot: &Snapshot) -> Known {
    Known {
        id: snapshot.id.0,
        name: Some(snapshot.name.to_string()),
        zone: Some(zone.clone()),
        taken_at: Some(snapshot.created_at),
    }
}

impl Survey {
    /// Asks the zones of all policies.
    pub(super) async fn ask_zones(&mut self, config: &Config, seams: &Seams) {
        let zones: BTreeSet<&ZoneName> = config.policies.iter().flat_map(|policy| &policy.zones).collect();
        if zones.is_empty() {
            self.unasked.push("no policy has a zone".to_owned());
            return;
        }
        self.asked.extend(zones.iter().map(|zone| format!("zone {zone}")));
        let credentials = match assemble::credentials(config) {
            Ok(credentials) => credentials,
            Err(refusal) => {
                self.unasked.push(refusal.text);
                return;
            }
        };
        let client = assemble::client(config, Some(credentials), seams);
        let ask = async |zone: ZoneName| {
            let client = client.zone(&zone);
            let lists = join(client.list_snapshots(), client.list_instances());
            let lists = timeout(&*seams.clock, LOOK_WAIT_MAX, lists).await;
            (zone, lists)
        };
        for (zone, lists) in join_all(zones.into_iter().cloned().map(ask)).await {
            let Ok((snapshots, instances)) = lists else {
                self.unasked.push(format!("zone {zone}: {}", no_answer()));
                continue;
            };
            let is_whole = snapshots.is_ok() && instances.is_ok();
            let error = snapshots.as_ref().err().or(instances.as_ref().err());
            self.unasked.extend(error.map(|error| format!("zone {zone}: {}", chain(error))));
            let snapshots = snapshots.map(|(listed, _)| listed.snapshots).unwrap_or_default();
            self.zones.push(ZoneListing {
                zone,
                snapshots,
                instances: instances.unwrap_or_default(),
                is_whole,
            });
        }
    }

    /// Asks all archives, as a run looks at them: one whose disk is not mounted, or that lost copies, is not wholly asked.
    pub(super) async fn ask_archives(&mut self, config: &Config, seams: &Seams, state: &StateDirectory) {
        self.asked.extend(config.archives.keys().map(|name| format!("archive {name}")));
        let looker = match Looker::new(state).await {
            Ok(looker) => looker,
            Err(why) => {
                self.unasked.push(format!("which archives were used is not known: {why}"));
                return;
            }
        };
        let look = async |(name, settings): (&ArchiveName, &ArchiveSettings)| {
            let archive = assemble::archive(name, settings, seams, (&config.state_directory, Use::Reading));
            let archive = archive.map_err(|refusal| refusal.text)?;
            let rules = config.archive_rules.get(name).ok_or_else(|| "it has no rules".to_owned())?;
            let look = looker.look(&archive, &rules.guard);
            timeout(&*seams.clock, LOOK_WAIT_MAX, look).await.unwrap_or_else(|_| Err(no_answer()))
        };
        let all: BTreeMap<_, _> = config.archives.iter().collect();
        for (name, found) in all.keys().zip(join_all(all.iter().map(|(name, one)| look((name, one)))).await) {
            let why = match found {
                Ok(found) => {
                    self.archives.push(Arc::clone(&found.catalogue));
                    found.presence.closed().map(str::to_owned)
                }
                Err(why) => Some(why),
            };
            self.unasked.extend(why.map(|why| format!("archive {name}: {why}")));
        }
    }

    /// A listed snapshot, with its zone's listing.
    pub(super) fn listed(&self, id: SnapshotId) -> Option<(&ZoneListing, &Snapshot)> {
        let mut all =
            self.zones.iter().flat_map(|zone| zone.snapshots.iter().map(move |snapshot| (zone, snapshot)));
        all.find(|(_, snapshot)| snapshot.id == id)
    }

    /// Every copy that an archive has or had, with the archive's name.
    pub(super) fn copies(&self) -> impl Iterator<Item = (&ArchiveName, &StoredCopy)> {
        self.archives
            .iter()
            .flat_map(|catalogue| catalogue.copies().iter().map(move |copy| (catalogue.archive(), copy)))
    }

    /// The copies of a snapshot.
    pub(super) fn copies_of(&self, id: SnapshotId) -> impl Iterator<Item = (&ArchiveName, &StoredCopy)> {
        self.copies().filter(move |(_, copy)| copy.manifest.snapshot.id == id)
    }

    /// The instance of a snapshot, if it is known.
    pub(super) fn instance_of(&self, id: SnapshotId) -> Option<InstanceId> {
        let copied = || self.copies_of(id).next().map(|(_, copy)| copy.manifest.instance.id);
        self.listed(id).and_then(|(_, snapshot)| snapshot.instance_id).or_else(copied)
    }

    /// What a snapshot is; none if no zone and no archive knows it.
    pub(super) fn about(&self, id: SnapshotId) -> Option<About> {
        let listed = self.listed(id).map(|(listing, snapshot)| About {
            zone: listing.zone.clone(),
            name: snapshot.name.to_string(),
            created_at: snapshot.created_at,
            instance_name: listing.instance_of(snapshot).map(|instance| instance.name.to_string()),
        });
        let copied = || {
            let (_, StoredCopy { manifest, .. }) = self.copies_of(id).next()?;
            Some(About {
                zone: manifest.zone.clone(),
                name: manifest.snapshot.name.to_string(),
                created_at: manifest.snapshot.created_at,
                instance_name: manifest.instance.name.clone(),
            })
        };
        listed.or_else(copied)
    }

    /// Every snapshot that is listed, or that an archive has or had a copy of.
    pub(super) fn snapshots(&self) -> impl Iterator<Item = Known> {
        let listed = self
            .zones
            .iter()
            .flat_map(|listing| listing.snapshots.iter().map(move |snapshot| known(&listing.zone, snapshot)));
        listed.chain(self.copies().map(|(_, copy)| Known {
            id: copy.manifest.snapshot.id.0,
            name: Some(copy.manifest.snapshot.name.to_string()),
            zone: Some(copy.manifest.zone.clone()),
            taken_at: Some(copy.manifest.snapshot.created_at),
        }))
    }

    /// Every instance that is listed, and those of listed snapshots.
    pub(super) fn instances(&self) -> impl Iterator<Item = Known> {
        self.zones.iter().flat_map(|listing| {
            let instances = listing.instances.iter().map(move |instance| Known {
                id: instance.id.0,
                name: Some(instance.name.to_string()),
                zone: Some(listing.zone.clone()),
                taken_at: None,
            });
            instances.chain(listing.snapshots.iter().filter_map(move |snapshot| {
                Some(Known { id: snapshot.instance_id?.0, name: None, ..known(&listing.zone, snapshot) })
            }))
        })
    }

    /// The newest good snapshot of an instance, taken before this time if one is given.
    pub(super) fn newest_of(
        &self,
        instance: InstanceId,
        before: Option<Timestamp>,
    ) -> Option<(&ZoneListing, &Snapshot)> {
        let all =
            self.zones.iter().flat_map(|zone| zone.snapshots.iter().map(move |snapshot| (zone, snapshot)));
        let meant = all.filter(|(_, snapshot)| {
            snapshot.instance_id == Some(instance)
                && snapshot.state.is_good()
                && before.is_none_or(|before| snapshot.created_at < before)
        });
        meant.max_by_key(|(_, snapshot)| snapshot.created_at)
    }

    /// That a snapshot was not found, and where it was looked for.
    pub(super) fn not_found(&self, error: &LookupError) -> Refusal {
        let mut text = error.to_string();
        if matches!(error, LookupError::Unknown { .. }) {
            text = format!("{text}, in {}: {IDS_ARE_SHOWN}", self.asked());
            for why in self.doubts() {
                text.push_str("\n  not asked: ");
                text.push_str(&why);
            }
        }
        Refusal::usage(text)
    }

    /// Why a snapshot may exist, although no answer has it.
    pub(super) fn doubts(&self) -> Vec<String> {
        let first = |catalogue: &Arc<Catalogue>| {
            Some(format!("archive {}: {}", catalogue.archive(), catalogue.problems().first()?.describe()))
        };
        self.unasked.iter().cloned().chain(self.archives.iter().filter_map(first)).collect()
    }

    /// The files of a snapshot that count as no copy, each a sentence.
    pub(super) fn problems_of(&self, id: SnapshotId) -> impl Iterator<Item = String> {
        let id = id.to_string();
        let problems = self
            .archives
            .iter()
            .flat_map(|catalogue| catalogue.problems().iter().map(|problem| (catalogue.archive(), problem)));
        problems.filter_map(move |(archive, problem)| {
            let is_of_it = problem.path.file_name()?.to_string_lossy().contains(&id);
            is_of_it.then(|| format!("archive {archive}: {}", problem.describe()))
        })
    }

    /// Which zones and archives were asked.
    pub(super) fn asked(&self) -> String {
        self.asked.join(", ")
    }
}

/// Where a user finds ids.
pub(super) const IDS_ARE_SHOWN: &str = "`snapwarden plan` and `snapwarden archive list` show ids";

fn no_answer() -> String {
    format!("no answer for {} s", LOOK_WAIT_MAX.as_secs())
}
