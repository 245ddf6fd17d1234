//! What every run works with, whichever policy it is for, and what may differ from run to run.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::archive::backend::Archive;
use crate::archive::transfer::hash::Hashers;
use crate::clock::Clock;
use crate::exoscale::client::Client;
use crate::exoscale::metadata::Metadata;
use crate::policy::name::ArchiveName;
use crate::policy::select::{Exemption, Pattern};
use crate::policy::span::Span;
use crate::policy::{ArchiveRules, Policy};
use crate::process::Processes;
use crate::randomness::Randomness;
use crate::run::downloads::Downloads;
use crate::snapshot::InstanceId;
use crate::state::directory::StateDirectory;
use crate::transport::Transport;

/// What every run works with. Its methods are the runs themselves (`sequence`) and their previews (`preview`).
#[derive(Debug, Clone)]
pub struct Runner {
    /// The API.
    pub client: Client,
    /// The metadata server, which knows the instance that this machine is.
    pub metadata: Metadata,
    /// Fetches the bytes of exported images.
    pub transport: Arc<dyn Transport>,
    /// Every archive of the configuration.
    pub archives: BTreeMap<ArchiveName, Arc<Archive>>,
    /// The retention of the copies in these archives.
    pub archive_rules: BTreeMap<ArchiveName, ArchiveRules>,
    /// The state directory.
    pub state: StateDirectory,
    /// Gives the time, and waits.
    pub clock: Arc<dyn Clock>,
    /// Makes run ids, and the jitter of pauses.
    pub randomness: Arc<dyn Randomness>,
    /// Starts hooks.
    pub processes: Arc<dyn Processes>,
    /// The name of this machine, by which the daemon spreads runs within their jitter.
    pub host: Arc<str>,
    /// Every policy of the configuration, since each may keep a snapshot that another would delete.
    pub policies: Vec<Policy>,
    /// How long files of the audit log are kept after the end of their month.
    pub keep_audit: Span,
    /// The instances that are meant to be without a backup.
    pub exempt: Exemption,
    /// Whether an image may be fetched over plain HTTP from another machine.
    pub allow_plain_http: bool,
    /// The longest wait for the head of a response.
    pub request_timeout: Duration,
    /// Creations, deletions and promotions at the same time in a zone.
    pub concurrency: NonZeroUsize,
    /// How long what is in flight may go on once the program is stopping.
    pub shutdown_grace: Duration,
    /// The downloads in progress.
    pub downloads: Downloads,
    /// The threads that compute checksums.
    pub hashers: Hashers,
}

impl Runner {
    /// The archives whose manifests may hold user data.
    pub(crate) fn user_data_in(&self) -> BTreeSet<ArchiveName> {
        let rules = self.archive_rules.iter().filter(|(_, rules)| rules.user_data);
        rules.map(|(name, _)| name.clone()).collect()
    }
}

/// What may differ from run to run.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// Lets the guard pass a run of at most this many deletions.
    pub allow_deletes: Option<u64>,
    /// The time in the schedule that the run is for; without it, the time at which the run begins.
    pub slot: Option<Timestamp>,
    /// Once cancelled, no new step begins; those in flight continue.
    pub stop: CancellationToken,
    /// A configuration that was loaded, or a policy that was paused or resumed, since the run began.
    pub changed: ConfigurationChanged,
    /// Limits the run to these instances; it is planned over all of them, and leaves nothing to compare with.
    pub instances: Option<Pattern<InstanceId>>,
    /// Whether the report says of each snapshot and copy what keeps it, for the daemon's page.
    pub with_details: bool,
}

/// Notifies a run of a configuration that was loaded, or of a policy that was paused or resumed, since it began: it decided
/// by what was before.
#[derive(Debug, Clone, Default)]
pub struct ConfigurationChanged {
    /// Once cancelled, no deletion begins: some policy decides otherwise now, and may keep what this run deletes.
    pub deletions: CancellationToken,
    /// Once cancelled, no step begins: the policy of the run was changed, paused or removed.
    pub policy: CancellationToken,
}
