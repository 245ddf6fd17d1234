//! The directory itself: opened once, read and written on the blocking pool.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::clock::Clock;
use crate::disk::{self, Access, Disk, Kind, Metadata};
use crate::policy::name::{ArchiveName, PolicyName};
use crate::policy::shard::Shard;
use crate::policy::span::Span;
use crate::snapshot::{SnapshotId, ZoneName};
use crate::state::audit::{AuditLog, AuditMark, Line, TakenAndDeleted};
use crate::state::audit_chain::{AuditHead, ChainReport};
use crate::state::error::StateError;
use crate::state::file;

/// The state directory. Clones are the same directory.
///
/// Its async methods do the disk's work on the blocking pool. What they have begun there is finished also if the
/// caller is dropped.
#[derive(Debug, Clone)]
pub struct StateDirectory {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) path: PathBuf,
    pub(super) audit_log: Arc<AuditLog>,
    /// The part of the instances that it is about; none for all.
    pub(super) shard: Option<Shard>,
}

impl StateDirectory {
    /// The directory, for reading what may be there; nothing is created or changed.
    pub fn at(disk: Arc<dyn Disk>, path: &Path) -> Self {
        let audit_log = Arc::new(AuditLog::new(Arc::clone(&disk), path));
        Self { disk, path: path.to_owned(), audit_log, shard: None }
    }

    /// Opens the directory for a run; one that is missing is created if the folder above it exists. This blocks: it is
    /// called once, before anything else runs.
    ///
    /// # Errors
    /// [`StateError::Directory`] if it can't be created, is no folder, or may not be written.
    pub fn open(disk: Arc<dyn Disk>, path: &Path) -> Result<Self, StateError> {
        let state = Self::at(disk, path);
        state.prepare().map_err(|source| StateError::Directory { path: path.to_owned(), source })?;
        state.audit_log.secure_name()?;
        Ok(state)
    }

    fn prepare(&self) -> io::Result<()> {
        match self.disk.metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let above = self.path.parent().unwrap_or(&self.path);
                if self.disk.metadata(above)?.kind != Kind::Folder {
                    return Err(io::ErrorKind::NotADirectory.into());
                }
            }
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        // What is written below a name that is not safe would be lost with it.
        disk::create_folders(&*self.disk, &self.path, Access::Owner)?;
        // Listing it and locking a file in it show what nothing but trying can: that we may read and write.
        self.disk.list(&self.path)?;
        match self.disk.lock(&self.path.join("directory.lock")) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// The directory's path, as configured.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Free bytes of the directory's file system, if that can be found out.
    pub(crate) async fn free_bytes(&self) -> Option<u64> {
        let Self { disk, path, .. } = self.clone();
        disk::blocking(move || disk::free_bytes_at(&*disk, &path)).await
    }

    /// Adds a line to the audit log and returns once it is safe from a crash. Lines are written one at a time, also by other
    /// processes.
    ///
    /// # Errors
    /// [`StateError`]: then what was intended must not be done.
    pub async fn audit(&self, clock: &dyn Clock, line: Line) -> Result<(), StateError> {
        self.change_audit_log(clock, move |log| log.append(&line)).await
    }

    /// The last line of the audit log; none if there is none.
    ///
    /// # Errors
    /// [`StateError::File`], and [`StateError::Unsafe`] if a line could not be made safe.
    pub async fn audit_head(&self) -> Result<Option<AuditHead>, StateError> {
        self.blocking(|state| state.audit_log.head()).await
    }

    /// Checks the chain of the whole audit log.
    ///
    /// # Errors
    /// [`StateError::File`] if a file can't be read.
    pub async fn verify_audit_log(&self) -> Result<ChainReport, StateError> {
        self.blocking(|state| state.audit_log.verify()).await
    }

    async fn change_audit_log(
        &self,
        clock: &dyn Clock,
        work: impl FnOnce(&AuditLog) -> Result<(), StateError> + Send + 'static,
    ) -> Result<(), StateError> {
        // In this process they take turns, so that only other processes are waited for by trying.
        let turn = Arc::clone(&self.audit_log.turn).lock_owned().await;
        let lock = self.lock_audit_log(clock).await?;
        self.blocking(move |state| {
            let done = work(&state.audit_log);
            drop((lock, turn));
            done
        })
        .await
    }

    /// The end of the audit log.
    ///
    /// # Errors
    /// [`StateError::File`], and [`StateError::Unsafe`] if a line could not be made safe.
    pub async fn audit_end(&self) -> Result<AuditMark, StateError> {
        self.blocking(|state| state.audit_log.end()).await
    }

    /// Removes the files of the audit log whose month ended longer than `keep` ago, each after a line that says so. Nothing else
    /// rests on them.
    ///
    /// # Errors
    /// [`StateError`].
    pub async fn remove_old_audit(&self, clock: &dyn Clock, keep: &Span) -> Result<(), StateError> {
        let (keep, now) = (keep.clone(), clock.now());
        self.change_audit_log(clock, move |log| log.remove_old(&keep, now)).await
    }

    /// Which snapshots of a zone were taken, and how others ended, by the lines of the audit log from this mark on; by all of
    /// them if it is a mark of another log.
    ///
    /// # Errors
    /// [`StateError::File`], and [`StateError::Unsafe`] if a line could not be made safe.
    pub async fn taken_and_deleted_since(
        &self,
        zone: &ZoneName,
        from: AuditMark,
    ) -> Result<TakenAndDeleted, StateError> {
        let zone = zone.clone();
        self.blocking(move |state| state.audit_log.taken_and_deleted_since(&zone, &from)).await
    }

    /// Every snapshot of a zone that we deleted, or set out to delete, by the lines of the audit log from this mark
    /// on; by all of them if it is a mark of another log.
    ///
    /// A line that can't be read is passed over: its snapshot then counts as one that we did not delete.
    ///
    /// # Errors
    /// [`StateError::File`], and [`StateError::Unsafe`] if a line could not be made safe.
    pub async fn deleted_since(
        &self,
        zone: &ZoneName,
        from: AuditMark,
    ) -> Result<BTreeSet<SnapshotId>, StateError> {
        let zone = zone.clone();
        self.blocking(move |state| state.audit_log.deleted_since(&zone, &from)).await
    }

    /// Whether the audit log says that an image was ever stored in the archive.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub async fn has_export_to(&self, archive: &ArchiveName) -> Result<bool, StateError> {
        let archive = archive.clone();
        self.blocking(move |state| state.audit_log.has_export_to(&archive)).await
    }

    /// Does what blocks on the blocking pool.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> T {
        let state = self.clone();
        disk::blocking(move || work(&state)).await
    }

    /// Reads a state file; the default if it was never written.
    pub(super) async fn load<T>(&self, name: impl Into<String>, version: u64) -> Result<T, StateError>
    where
        T: Default + DeserializeOwned + Send + 'static,
    {
        let name = name.into();
        self.blocking(move |state| state.read(&name, version)).await
    }

    /// Which version of a state file is there: another value once it was replaced; none if there is no file.
    pub(super) async fn version_of(&self, name: String) -> Option<Metadata> {
        self.blocking(move |state| state.disk.metadata(&state.path.join(name)).ok()).await
    }

    /// Replaces a state file.
    pub(super) async fn save<T>(
        &self,
        name: impl Into<String>,
        version: u64,
        contents: T,
    ) -> Result<(), StateError>
    where
        T: Serialize + Send + 'static,
    {
        let name = name.into();
        self.blocking(move |state| state.write(&name, version, &contents)).await
    }

    /// [`StateDirectory::load`], for work that is on the blocking pool already.
    pub(super) fn read<T: Default + DeserializeOwned>(
        &self,
        name: &str,
        version: u64,
    ) -> Result<T, StateError> {
        file::read(&*self.disk, &self.path.join(name), version).map_err(|error| match error {
            StateError::File { source, .. } if source.kind() == io::ErrorKind::NotADirectory => {
                StateError::Directory { path: self.path.clone(), source }
            }
            other => other,
        })
    }

    /// Reads the file of each policy that has one, also of policies that are not configured any more; for work that is on
    /// the blocking pool already.
    pub(super) fn read_of_policies<T: Default + DeserializeOwned>(
        &self,
        prefix: &str,
        version: u64,
    ) -> Result<Vec<(PolicyName, T)>, StateError> {
        let policies = self.policies_with(prefix)?.into_iter();
        policies
            .map(|policy| {
                let read = self.read(&format!("{prefix}{policy}.json"), version)?;
                Ok((policy, read))
            })
            .collect()
    }

    /// Every policy that has a file whose name begins so.
    pub(super) fn policies_with(&self, prefix: &str) -> Result<Vec<PolicyName>, StateError> {
        let policy_of = |name: &String| name.strip_prefix(prefix)?.strip_suffix(".json")?.parse().ok();
        Ok(self.file_names()?.iter().filter_map(policy_of).collect())
    }

    /// The names of all files; for work that is on the blocking pool already.
    pub(super) fn file_names(&self) -> Result<Vec<String>, StateError> {
        let entries = match self.disk.list(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(StateError::File { verb: "list", path: self.path.clone(), source }),
        };
        Ok(entries.into_iter().filter_map(|entry| entry.name.into_string().ok()).collect())
    }

    /// [`StateDirectory::save`], for work that is on the blocking pool already.
    pub(super) fn write<T: Serialize>(
        &self,
        name: &str,
        version: u64,
        contents: &T,
    ) -> Result<(), StateError> {
        file::write(&*self.disk, &self.path.join(name), version, contents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;

    fn open(path: &Path) -> Result<StateDirectory, StateError> {
        StateDirectory::open(Arc::new(RealDisk), path)
    }

    #[test]
    fn a_missing_directory_is_made_only_below_one_that_exists() {
        let folder = tempfile::tempdir().unwrap();
        assert!(open(&folder.path().join("state")).is_ok());
        let error = open(&folder.path().join("a/b")).unwrap_err();
        assert!(error.to_string().contains("a/b"), "{error}");
    }

    #[test]
    fn a_file_in_the_place_of_the_directory_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        crate::disk::replace_file(&RealDisk, &path, b"", Access::Owner).unwrap();
        assert!(matches!(open(&path), Err(StateError::Directory { .. })));
    }
}
