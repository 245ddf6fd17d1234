//! State files: JSON with a version, replaced in one step, for their owner alone.

use std::io;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::disk::{self, Access, Disk};
use crate::state::error::StateError;

/// A zone of a million snapshots stays far below this.
const BYTES_MAX: u64 = 256 * 1024 * 1024;

#[derive(Serialize)]
struct Versioned<T> {
    version: u64,
    #[serde(flatten)]
    state: T,
}

#[derive(Deserialize)]
struct VersionAlone {
    version: u64,
}

/// Reads a state file; what was never written is the default.
///
/// # Errors
/// A file that can't be read, is damaged, or was written by a later program.
pub(super) fn read<T>(disk: &dyn Disk, path: &Path, known: u64) -> Result<T, StateError>
where
    T: Default + DeserializeOwned,
{
    // Without the version as a part of the type: serde would hold a flattened state in memory twice.
    Ok(read_part::<Option<T>>(disk, path, known)?.unwrap_or_default())
}

/// Reads those fields of a state file that `T` names: the others cost little.
///
/// # Errors
/// As [`read`].
pub(super) fn read_part<T>(disk: &dyn Disk, path: &Path, known: u64) -> Result<T, StateError>
where
    T: Default + DeserializeOwned,
{
    let bytes = match disk::read_file(disk, path, BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(T::default()),
        Err(source) => return Err(StateError::File { verb: "read", path: path.to_owned(), source }),
    };
    let damaged = |error: serde_json::Error| StateError::damaged(path, error.line(), &error);
    let found = serde_json::from_slice::<VersionAlone>(&bytes).map_err(damaged)?.version;
    if found > known {
        return Err(StateError::FromTheFuture { path: path.to_owned(), found, known });
    }
    serde_json::from_slice(&bytes).map_err(damaged)
}

/// Writes a state file; after a crash at any moment it holds the old or the new, whole.
///
/// # Errors
/// [`StateError::File`].
pub(super) fn write<T: Serialize>(
    disk: &dyn Disk,
    path: &Path,
    version: u64,
    state: &T,
) -> Result<(), StateError> {
    let failed = |source| StateError::File { verb: "write", path: path.to_owned(), source };
    let mut bytes =
        serde_json::to_vec_pretty(&Versioned { version, state }).map_err(|error| failed(error.into()))?;
    bytes.push(b'\n');
    disk::replace_file(disk, path, &bytes, Access::Owner).map_err(failed)
}
