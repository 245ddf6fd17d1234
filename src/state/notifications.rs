//! What notifiers were notified of, so that a restart neither repeats it nor forgets to say that it is over.
//!
//! A daemon and commands change the file, so it has a lock of its own.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::policy::name::NotifierName;
use crate::state::directory::StateDirectory;
use crate::state::error::StateError;

/// The version of the file that this program writes.
const VERSION: u64 = 1;

const FILE: &str = "notifications.json";

/// By notifier, and by what is wrong where: what it was notified of and what is not known to be over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SentByNotifier(pub BTreeMap<NotifierName, BTreeMap<String, Sent>>);

/// What a state file holds of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Contents {
    sent: SentByNotifier,
}

/// A notification that arrived.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// When it was sent last.
    pub at: Timestamp,
    /// The instances that it was about.
    pub subjects: BTreeSet<String>,
}

impl StateDirectory {
    /// What notifiers were notified of.
    ///
    /// # Errors
    /// A file that can't be read, is damaged, or was written by a later program.
    pub async fn sent_notifications(&self) -> Result<SentByNotifier, StateError> {
        self.load(FILE, VERSION).await.map(|contents: Contents| contents.sent)
    }

    /// Remembers for a notifier, by what is wrong where, what it was notified of, or with `None` that this is over.
    ///
    /// # Errors
    /// [`StateError`]; what is remembered is as it was then, or new.
    pub async fn remember_notifications(
        &self,
        clock: &dyn Clock,
        notifier: NotifierName,
        changes: Vec<(String, Option<Sent>)>,
    ) -> Result<(), StateError> {
        // Nothing holds the lock for longer than a change takes.
        let never = CancellationToken::new();
        self.change_shared("notifications", clock, &never, move |state| {
            let mut contents: Contents = state.read(FILE, VERSION)?;
            let known = contents.sent.0.entry(notifier).or_default();
            for (key, sent) in changes {
                match sent {
                    Some(sent) => drop(known.insert(key, sent)),
                    None => drop(known.remove(&key)),
                }
            }
            contents.sent.0.retain(|_, known| !known.is_empty());
            state.write(FILE, VERSION, &contents)
        })
        .await
    }
}
