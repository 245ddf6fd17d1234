//! How far each policy's schedule was served. The daemon alone writes it, under its lock.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::policy::name::{ArchiveName, PolicyName};
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;

/// The version of the file that this program writes.
const VERSION: u64 = 1;

const FILE: &str = "schedules.json";

/// How far the daemon served its schedules.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedules {
    /// By policy; those of the configuration alone.
    pub policies: BTreeMap<PolicyName, Served>,
    /// Up to when the `verify` schedule of each archive was served; those of the configuration alone.
    #[serde(default)]
    pub archives: BTreeMap<ArchiveName, Timestamp>,
}

/// How far a policy's schedule was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// When a daemon first had the policy.
    pub first_seen_at: Timestamp,
    /// Every moment of the schedule up to here had its run, or was counted as skipped or missed. A run that a crash
    /// or a stop cut short does not move it, so that the next start does that run again. It begins with
    /// `first_seen_at`: a policy that never ran is late from then on.
    pub watermark: Timestamp,
    /// The slot of a run that has begun and is not done, also of one that was asked for: a crash or a stop leaves it to the
    /// next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub begun: Option<Timestamp>,
    /// The last slot that was counted as missed, until a run begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missed: Option<Timestamp>,
}

impl StateDirectory {
    /// How far each schedule was served; nothing on a first start.
    ///
    /// # Errors
    /// A file that can't be read, is damaged, or was written by a later program.
    pub async fn schedules(&self) -> Result<Schedules, StateError> {
        self.load(FILE, VERSION).await
    }

    /// Saves it; after a crash at any moment the file holds the old or the new, whole.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub async fn set_schedules(&self, schedules: Schedules) -> Result<(), StateError> {
        self.save(FILE, VERSION, schedules).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_earlier_program_saved_is_read() {
        let text = r#"{"policies": {"p": {"first_seen_at": "2026-11-01T08:00:00Z", "watermark": "2026-11-03T02:30:00Z"}}}"#;
        let schedules: Schedules = serde_json::from_str(text).unwrap();
        let served = schedules.policies.values().next().unwrap();
        assert_eq!((served.begun, served.missed), (None, None));
    }
}
