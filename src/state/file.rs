//! State files: JSON with a version, replaced in one step, for their owner alone.

use std::io;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::disk::{self, Access};
use crate::state::{StateDirectory, StateError};

/// A zone of a million snapshots stays far below this.
const BYTES_MAX: u64 = 256 * 1024 * 1024;

#[derive(Serialize, Deserialize)]
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
pub(super) fn read<T>(directory: &StateDirectory, name: &str, known: u64) -> Result<T, StateError>
where
    T: Default + DeserializeOwned,
{
    let path = directory.path.join(name);
    let bytes = match disk::read_file(&*directory.disk, &path, BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(T::default()),
        Err(source) => return Err(StateError::File { verb: "read", path, source }),
    };
    let damaged = |source: serde_json::Error| StateError::Damaged {
        path: path.clone(),
        line: source.line(),
        column: source.column(),
        source,
    };
    let found = serde_json::from_slice::<VersionAlone>(&bytes).map_err(damaged)?.version;
    if found > known {
        return Err(StateError::FromTheFuture { path, found, known });
    }
    Ok(serde_json::from_slice::<Versioned<T>>(&bytes).map_err(damaged)?.state)
}

/// Writes a state file; after a crash at any moment it holds the old or the new, whole.
///
/// # Errors
/// [`StateError::File`].
pub(super) fn write<T: Serialize>(
    directory: &StateDirectory,
    name: &str,
    version: u64,
    state: &T,
) -> Result<(), StateError> {
    let path = directory.path.join(name);
    let failed = |source| StateError::File { verb: "write", path: path.clone(), source };
    let mut bytes =
        serde_json::to_vec_pretty(&Versioned { version, state }).map_err(|error| failed(error.into()))?;
    bytes.push(b'\n');
    disk::replace_file(&*directory.disk, &path, &bytes, Access::Owner).map_err(failed)
}
