//! The marker of an archive: a small file at its root, by which an archive differs from an empty folder.
//!
//! Without it, a folder whose disk is not mounted looks like an archive that lost everything.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::text::json_error;

/// The name of the file, below the archive's folder or its prefix.
pub const MARKER_FILE: &str = "snapwarden-archive.json";

/// The name of the file that is written, read back and deleted beside it to find out whether that can be done. There is one name
/// and one content, so that whatever a crash left is replaced and deleted by the next time.
pub(super) const PROBE_FILE: &str = "snapwarden-archive.json.probe";

/// What that file holds.
pub(super) const PROBE: &[u8] = b"A test by `snapwarden check --online`. It may be deleted.\n";

/// Each step of a probe by its name, with its failure. Those that were not tried are not there.
pub(crate) type ProbeSteps = Vec<(&'static str, Option<String>)>;

/// Whether what was read back of a probe is what was written, or its failure.
pub(super) fn read_back<E>(
    read: Result<Option<impl AsRef<[u8]>>, E>,
    failure: impl FnOnce(E) -> String,
) -> Option<String> {
    match read {
        Ok(Some(bytes)) if bytes.as_ref() == PROBE => None,
        Ok(Some(_)) => Some(format!("{PROBE_FILE} has other bytes than were written")),
        Ok(None) => {
            Some(format!("{PROBE_FILE} is missing after it was written; does another `check` run right now?"))
        }
        Err(error) => Some(failure(error)),
    }
}

/// The most bytes that are read of one: thousands of states fit.
pub(super) const MARKER_BYTES_MAX: u64 = 1 << 20;

const VERSION: u64 = 1;

/// What the file holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Marker {
    version: u64,
    /// The archive's own id.
    pub id: Uuid,
    /// The state directories that use it.
    #[serde(default)]
    pub states: BTreeSet<Uuid>,
    /// What others wrote beside, which survives a rewrite.
    #[serde(flatten)]
    other: Map<String, Value>,
}

/// Why a marker is there and can't be used, as the end of a sentence about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MarkerProblem {
    /// It is not what this program writes.
    #[error("is damaged ({0})")]
    Damaged(String),
    /// A later program wrote it.
    #[error(
        "is of version {0}, and this program knows up to {VERSION}: a later snapwarden wrote it, use that one"
    )]
    Later(u64),
    /// The disk can't read it.
    #[error("can't be read ({0})")]
    Unreadable(String),
}

impl Marker {
    /// The marker of an archive with this id.
    pub fn new(id: Uuid) -> Self {
        Self { version: VERSION, id, states: BTreeSet::new(), other: Map::new() }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        // A map with text for keys can always be written.
        let mut bytes = serde_json::to_vec_pretty(self).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, MarkerProblem> {
        #[derive(Deserialize)]
        struct VersionAlone {
            version: u64,
        }
        let damaged = |error: serde_json::Error| MarkerProblem::Damaged(json_error(&error));
        let VersionAlone { version } = serde_json::from_slice(bytes).map_err(damaged)?;
        if version > VERSION {
            return Err(MarkerProblem::Later(version));
        }
        serde_json::from_slice(bytes).map_err(damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_survives_a_rewrite_with_all_that_others_wrote() {
        let text = br#"{"version": 1, "id": "b0c0ab00-0000-4000-8000-00000000f105", "note": "ours"}"#;
        let marker = Marker::from_bytes(text).unwrap();
        assert!(marker.states.is_empty());
        let again = Marker::from_bytes(&marker.to_bytes()).unwrap();
        assert_eq!(again, marker);
        assert!(String::from_utf8(again.to_bytes()).unwrap().contains("note"));
    }

    #[test]
    fn damaged_and_later_ones_are_no_markers() {
        let later = Marker::from_bytes(br#"{"version": 2, "anything": []}"#);
        assert_eq!(later, Err(MarkerProblem::Later(2)));
        for text in ["", "{", "[]", "{}", r#"{"version": 1}"#, r#"{"version": 1, "id": 5}"#] {
            let problem = Marker::from_bytes(text.as_bytes()).unwrap_err();
            assert!(matches!(problem, MarkerProblem::Damaged(_)), "{problem}");
        }
    }

    #[test]
    fn a_damaged_marker_is_quoted_in_few_words() {
        let text = format!(r#"{{"version": "{}"}}"#, "a\\u001b".repeat(10_000));
        let problem = Marker::from_bytes(text.as_bytes()).unwrap_err().to_string();
        assert!(problem.len() < 1000 && !problem.contains('\u{1b}'), "{problem}");
    }
}
