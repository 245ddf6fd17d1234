//! Finds the copies that serve a restore.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;

use crate::archive::backend::Archive;
use crate::archive::catalogue::{Catalogue, StoredCopy};
use crate::archive::marker::MARKER_FILE;
use crate::lookup::{self, Kind, Known, LookupError};
use crate::policy::name::ArchiveName;
use crate::restore::error::RestoreError;
use crate::snapshot::{InstanceId, SnapshotId};
use crate::text::chain;

/// Which copy to restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// A copy of this snapshot: its id, the beginning of that, or its name in the manifests.
    Snapshot(String),
    /// A copy of the newest snapshot of an instance.
    Latest {
        /// The instance's id, the beginning of that, or its name in the manifests.
        instance: String,
        /// Only snapshots taken before this time.
        before: Option<Timestamp>,
    },
}

/// A copy, and the archive that has it.
#[derive(Debug, Clone)]
pub struct ArchivedCopy {
    /// The archive.
    pub archive: Arc<Archive>,
    /// The copy.
    pub copy: StoredCopy,
}

/// The catalogues of the archives, those in folders first: they are the fastest to read.
#[derive(Debug, Default)]
pub struct ArchiveIndex {
    catalogues: Vec<(Arc<Archive>, Catalogue)>,
    unreadable: BTreeMap<ArchiveName, String>,
}

impl ArchiveIndex {
    /// Reads the catalogues. An unreadable archive does not make the others unusable.
    pub async fn read(archives: impl IntoIterator<Item = Arc<Archive>>) -> Self {
        let mut archives: Vec<Arc<Archive>> = archives.into_iter().collect();
        archives.sort_by_key(|archive| matches!(**archive, Archive::S3(_)));
        let mut index = Self::default();
        for archive in archives {
            match archive.catalogue().await {
                Ok(catalogue) => index.catalogues.push((archive, catalogue)),
                Err(error) => index.add_unreadable(archive.name().clone(), chain(&error)),
            }
        }
        index
    }

    /// Adds an archive that cannot be read, and the reason.
    pub fn add_unreadable(&mut self, archive: ArchiveName, reason: String) {
        self.unreadable.insert(archive, reason);
    }

    /// The archives that cannot be read, each as a sentence.
    pub fn unreadable(&self) -> Vec<String> {
        let sentence =
            |(name, reason): (&ArchiveName, &String)| format!("archive {name} cannot be read: {reason}");
        self.unreadable.iter().map(sentence).collect()
    }

    /// The verified copies that still have their images.
    fn copies(&self) -> impl Iterator<Item = (&Arc<Archive>, &StoredCopy)> {
        self.catalogues.iter().flat_map(|(archive, catalogue)| {
            let copies = catalogue.copies().iter().filter(|copy| copy.manifest.pruned_at.is_none());
            copies.map(move |copy| (archive, copy))
        })
    }

    /// The copies of the wanted snapshot, in the order in which to try them; at least one.
    ///
    /// # Errors
    /// [`RestoreError`] if there is none.
    pub fn find(&self, wanted: &Wanted) -> Result<Vec<ArchivedCopy>, RestoreError> {
        let id = match wanted {
            Wanted::Snapshot(text) => self.snapshot(text)?,
            Wanted::Latest { instance, before } => self.latest(instance, *before)?,
        };
        let matching = self.copies().filter(|(_, copy)| copy.manifest.snapshot.id == id);
        let found: Vec<ArchivedCopy> = matching
            .map(|(archive, copy)| ArchivedCopy { archive: Arc::clone(archive), copy: copy.clone() })
            .collect();
        if found.is_empty() { Err(RestoreError::NoCopy { id, notes: self.notes(id) }) } else { Ok(found) }
    }

    /// The snapshot that the text means, also if its copy was pruned.
    fn snapshot(&self, text: &str) -> Result<SnapshotId, RestoreError> {
        let copies = self.catalogues.iter().flat_map(|(_, catalogue)| catalogue.copies());
        let known = copies.map(|copy| Known {
            id: copy.manifest.snapshot.id.0,
            name: Some(copy.manifest.snapshot.name.to_string()),
            zone: Some(copy.manifest.zone.clone()),
            taken_at: Some(copy.manifest.snapshot.created_at),
        });
        lookup::find(Kind::Snapshot, text, known).map(SnapshotId).map_err(|error| self.not_found(error))
    }

    fn not_found(&self, error: LookupError) -> RestoreError {
        let mut notes = self.unreadable();
        notes.extend(self.not_mounted());
        match error {
            LookupError::Unknown { kind, text } => RestoreError::NothingNamed { kind, text, notes },
            several @ LookupError::Several { .. } => RestoreError::Ambiguous(several),
        }
    }

    /// The archives that look as if their disks were not mounted, each as a sentence.
    fn not_mounted(&self) -> Vec<String> {
        let is_empty = |catalogue: &Catalogue| {
            matches!(catalogue.marker(), Ok(None))
                && catalogue.copies().is_empty()
                && catalogue.problems().is_empty()
        };
        let empty = self.catalogues.iter().filter(|(_, catalogue)| is_empty(catalogue));
        let sentence = |(archive, _): &(Arc<Archive>, Catalogue)| {
            let (name, place) = (archive.name(), archive.place());
            format!("archive {name} is empty, {place} has no {MARKER_FILE}: is its disk not mounted?")
        };
        empty.map(sentence).collect()
    }

    /// Facts that explain why a snapshot has no copy.
    fn notes(&self, id: SnapshotId) -> Vec<String> {
        let mut notes = self.unreadable();
        notes.extend(self.not_mounted());
        let id_text = id.to_string();
        for (archive, catalogue) in &self.catalogues {
            let name = archive.name();
            let copies = catalogue.copies().iter().filter(|copy| copy.manifest.snapshot.id == id);
            for at in copies.filter_map(|copy| copy.manifest.pruned_at) {
                notes.push(format!("archive {name} had a copy, and its retention removed the image at {at}"));
            }
            let problems = catalogue.problems().iter().filter(|problem| {
                problem.path.file_name().is_some_and(|name| name.to_string_lossy().contains(&id_text))
            });
            notes.extend(problems.map(|problem| format!("archive {name}: {}", problem.describe())));
        }
        notes
    }

    /// The newest snapshot of an instance that has a copy.
    fn latest(&self, instance: &str, before: Option<Timestamp>) -> Result<SnapshotId, RestoreError> {
        if !self.unreadable.is_empty() {
            return Err(RestoreError::NewestUnknown(self.unreadable()));
        }
        let instance_id = self.instance(instance)?;
        let manifests = self.copies().map(|(_, copy)| &copy.manifest);
        let of_instance = manifests.filter(|manifest| manifest.instance.id == instance_id);
        let snapshots: Vec<(Timestamp, SnapshotId)> =
            of_instance.map(|manifest| (manifest.snapshot.created_at, manifest.snapshot.id)).collect();
        let in_time = snapshots.iter().filter(|(at, _)| before.is_none_or(|before| *at < before));
        match (in_time.max(), before, snapshots.iter().min()) {
            (Some((_, id)), _, _) => Ok(*id),
            (None, Some(before), Some((oldest, _))) => {
                Err(RestoreError::NoneBefore { instance_id, before, oldest: *oldest })
            }
            _ => {
                let (kind, text) = (Kind::Instance, instance.to_owned());
                Err(self.not_found(LookupError::Unknown { kind, text }))
            }
        }
    }

    /// The instance that the text means.
    fn instance(&self, text: &str) -> Result<InstanceId, RestoreError> {
        let known = self.copies().map(|(_, copy)| Known {
            id: copy.manifest.instance.id.0,
            name: copy.manifest.instance.name.clone(),
            zone: Some(copy.manifest.zone.clone()),
            taken_at: Some(copy.manifest.snapshot.created_at),
        });
        lookup::find(Kind::Instance, text, known).map(InstanceId).map_err(|error| self.not_found(error))
    }
}
