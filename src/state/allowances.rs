//! Allowances: each lets the next run of a policy, or the next pruning of an archive, pass the guard, once.
//!
//! A command changes the file, also beside a running daemon, so it has a lock of its own.
//! Reading needs none, since the file is replaced in one step.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::policy::name::{ArchiveName, PolicyName};
use crate::snapshot::ZoneName;
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;

/// The version of the file that this program writes.
const VERSION: u64 = 1;

const FILE: &str = "allowances.json";

/// Every allowance that no run took yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Allowances {
    allowances: Vec<Allowance>,
}

/// Whose guard it lets pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AllowanceOf {
    /// In the next run of this policy.
    Policy(PolicyName),
    /// In the next pruning of this archive.
    Archive(ArchiveName),
}

/// Lets one run pass the guard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allowance {
    /// For which policy or archive.
    #[serde(flatten)]
    pub of: AllowanceOf,
    /// For this zone alone; without it, for the run as a whole.
    #[serde(default)]
    pub zone: Option<ZoneName>,
    /// The most deletions with which the run passes, in the zone or as a whole.
    pub deletes: u64,
    /// When it was given.
    pub given_at: Timestamp,
    /// When it ends, if that was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends_at: Option<Timestamp>,
}

impl StateDirectory {
    /// The allowances for the next run of a policy, or the next pruning of an archive; they stay.
    ///
    /// # Errors
    /// A file that can't be read, is damaged, or was written by a later program.
    pub async fn allowances(&self, of: &AllowanceOf) -> Result<Vec<Allowance>, StateError> {
        let mut all: Allowances = self.load(FILE, VERSION).await?;
        all.allowances.retain(|allowance| allowance.of == *of);
        Ok(all.allowances)
    }

    /// Gives an allowance, and returns the one of the same and for the same zone that it replaces.
    ///
    /// # Errors
    /// [`StateError`]; the allowances are as they were then, or new.
    pub async fn allow(
        &self,
        clock: &dyn Clock,
        allowance: Allowance,
    ) -> Result<Option<Allowance>, StateError> {
        // A command: a signal ends its process.
        let never = CancellationToken::new();
        self.change_shared("allowances", clock, &never, move |state| {
            let mut all: Allowances = state.read(FILE, VERSION)?;
            let is_same = |other: &Allowance| other.of == allowance.of && other.zone == allowance.zone;
            let place = all.allowances.iter().position(is_same);
            let replaced = place.map(|place| all.allowances.remove(place));
            all.allowances.push(allowance);
            state.write(FILE, VERSION, &all)?;
            Ok(replaced)
        })
        .await
    }

    /// Takes the allowances for a run or a pruning: once they are returned they are removed, also after a crash.
    ///
    /// # Errors
    /// [`StateError`]: then nothing is allowed, since it might be allowed twice.
    pub async fn take_allowances(
        &self,
        of: &AllowanceOf,
        clock: &dyn Clock,
        stop: &CancellationToken,
    ) -> Result<Vec<Allowance>, StateError> {
        // Hardly ever is there one, and a run without changes nothing here. One that comes a moment later is for
        // the next run.
        if self.allowances(of).await?.is_empty() {
            return Ok(Vec::new());
        }
        let of = of.clone();
        self.change_shared("allowances", clock, stop, move |state| {
            let all: Allowances = state.read(FILE, VERSION)?;
            let (taken, allowances): (Vec<_>, Vec<_>) =
                all.allowances.into_iter().partition(|allowance| allowance.of == of);
            state.write(FILE, VERSION, &Allowances { allowances })?;
            Ok(taken)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::disk::{self, Access, Disk as _};
    use crate::sim::clock::SimClock;
    use crate::sim::disk::{DiskCall, MemoryDisk};

    const FOLDER: &str = "/srv";

    fn disk() -> MemoryDisk {
        let disk = MemoryDisk::new();
        disk.create_dir_all(Path::new(FOLDER), Access::Owner).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        disk
    }

    fn state(disk: &MemoryDisk) -> StateDirectory {
        StateDirectory::open(Arc::new(disk.clone()), Path::new(FOLDER)).unwrap()
    }

    fn clock() -> SimClock {
        SimClock::starting_at(Timestamp::UNIX_EPOCH)
    }

    fn never() -> CancellationToken {
        CancellationToken::new()
    }

    fn name(policy: &str) -> AllowanceOf {
        AllowanceOf::Policy(policy.parse().unwrap())
    }

    fn leave(policy: &str, zone: Option<&str>, deletes: u64) -> Allowance {
        let zone = zone.map(|zone| zone.parse().unwrap());
        Allowance { of: name(policy), zone, deletes, given_at: Timestamp::UNIX_EPOCH, ends_at: None }
    }

    #[tokio::test(start_paused = true)]
    async fn one_replaces_that_of_the_same_policy_and_zone_alone() {
        let (state, clock) = (state(&disk()), clock());
        let given = [
            leave("nightly", None, 1),
            leave("nightly", Some("ch-gva-2"), 2),
            leave("weekly", None, 3),
            leave("nightly", Some("de-fra-1"), 4),
        ];
        for one in &given {
            assert_eq!(state.allow(&clock, one.clone()).await.unwrap(), None);
        }
        let another = leave("nightly", Some("ch-gva-2"), 5);
        assert_eq!(state.allow(&clock, another.clone()).await.unwrap(), Some(given[1].clone()));
        let of_nightly = [given[0].clone(), given[3].clone(), another];
        assert_eq!(state.allowances(&name("nightly")).await.unwrap(), of_nightly);
        assert_eq!(state.allowances(&name("weekly")).await.unwrap(), [given[2].clone()]);
    }

    #[tokio::test(start_paused = true)]
    async fn they_are_taken_once_and_a_crash_brings_none_back() {
        let (disk, clock) = (disk(), clock());
        let state_before = state(&disk);
        state_before.allow(&clock, leave("nightly", None, 1)).await.unwrap();
        state_before.allow(&clock, leave("weekly", None, 2)).await.unwrap();
        let taken = state_before.take_allowances(&name("nightly"), &clock, &never()).await.unwrap();
        assert_eq!(taken, [leave("nightly", None, 1)]);
        let state = state(&disk.crash());
        assert_eq!(state.take_allowances(&name("nightly"), &clock, &never()).await.unwrap(), []);
        assert_eq!(state.allowances(&name("weekly")).await.unwrap(), [leave("weekly", None, 2)]);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_cannot_be_taken_away_is_not_given() {
        for call in [DiskCall::Sync, DiskCall::Write, DiskCall::Rename] {
            let (disk, clock) = (disk(), clock());
            let state = state(&disk);
            state.allow(&clock, leave("nightly", None, 1)).await.unwrap();
            disk.fail(call, 1, std::io::ErrorKind::Other);
            state.take_allowances(&name("nightly"), &clock, &never()).await.unwrap_err();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn damaged_allowances_are_an_error_and_are_not_overwritten() {
        let (disk, clock) = (disk(), clock());
        let (state, path) = (state(&disk), Path::new(FOLDER).join(FILE));
        for damaged in
            ["", "{}", "{\"version\":1}", "{\"version\":1,\"allowances\":[{\"policy\":\"nightly\"}]}"]
        {
            disk::replace_file(&disk, &path, damaged.as_bytes(), Access::Owner).unwrap();
            let error = state.allow(&clock, leave("nightly", None, 1)).await.unwrap_err();
            assert!(error.to_string().contains("allowances.json"), "{damaged:?}: {error}");
            state.take_allowances(&name("nightly"), &clock, &never()).await.unwrap_err();
            assert_eq!(disk::read_file(&disk, &path, 100).unwrap(), damaged.as_bytes());
        }
    }
}
