//! Cases about which the plan and the second judge disagreed: for people, to be played again. Nothing here reads them.

use std::path::PathBuf;

use serde::Serialize;

use crate::policy::name::PolicyName;
use crate::snapshot::ZoneName;
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;

/// The version of the file that this program writes.
const VERSION: u64 = 1;

impl StateDirectory {
    /// Writes a case, in the place of an earlier one of the policy and the zone. Returns the file's path.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub async fn save_disagreement<T>(
        &self,
        policy: &PolicyName,
        zone: &ZoneName,
        case: T,
    ) -> Result<PathBuf, StateError>
    where
        T: Serialize + Send + 'static,
    {
        let name = format!("disagreement-{policy}-{zone}.json");
        let path = self.path().join(&name);
        self.save(name, VERSION, case).await?;
        Ok(path)
    }
}
