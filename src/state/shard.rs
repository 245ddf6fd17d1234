//! Which part of the instances this state directory is about.
//!
//! What it remembers is about these instances alone: another part would have neither their holds nor their history. So the
//! part changes only by [`StateDirectory::set_shard`], once somebody has seen what that means.

use serde::{Deserialize, Serialize};

use crate::policy::shard::Shard;
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;

/// The version of the file that this program writes.
const VERSION: u64 = 1;

const FILE: &str = "shard.json";

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Remembered {
    shard: Option<Shard>,
}

impl StateDirectory {
    /// The part of the instances that the directory is about; none for all of them.
    pub fn shard(&self) -> Option<Shard> {
        self.shard
    }

    /// The directory as that of this part, or else of the part for which it was made. This blocks: it is called once, before
    /// anything else runs.
    ///
    /// # Errors
    /// [`StateError::OtherShard`] if it was made for another part, or for all instances, and remembers runs.
    pub fn in_shard(mut self, wanted: Option<Shard>) -> Result<Self, StateError> {
        let Remembered { shard: made_for } = self.read(FILE, VERSION)?;
        let is_other = match (made_for, wanted) {
            (_, None) => false,
            (Some(made_for), Some(wanted)) => made_for != wanted,
            (None, Some(_)) => !self.policies_with("runs-")?.is_empty(),
        };
        if is_other {
            return Err(StateError::OtherShard { path: self.path, made_for, wanted });
        }
        self.shard = wanted.or(made_for);
        Ok(self)
    }

    /// Refuses a run for another part than the directory's: also for all instances, since it would be for a part of them alone.
    ///
    /// # Errors
    /// [`StateError::OtherShard`].
    pub fn require_shard(&self, wanted: Option<Shard>) -> Result<(), StateError> {
        if self.shard == wanted {
            return Ok(());
        }
        Err(StateError::OtherShard { path: self.path.clone(), made_for: self.shard, wanted })
    }

    /// Remembers the part that the directory is about, unless it does. This blocks.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub fn remember_shard(&self) -> Result<(), StateError> {
        let Remembered { shard } = self.read(FILE, VERSION)?;
        if shard == self.shard {
            Ok(())
        } else {
            self.write(FILE, VERSION, &Remembered { shard: self.shard })
        }
    }

    /// Makes the directory that of another part.
    ///
    /// # Errors
    /// [`StateError::File`].
    pub async fn set_shard(&mut self, shard: Option<Shard>) -> Result<(), StateError> {
        self.shard = shard;
        self.blocking(Self::remember_shard).await
    }
}
