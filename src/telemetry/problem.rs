//! A thing that is wrong, as notifiers are notified of it.

use serde::Serialize;

/// One thing that is wrong.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Problem {
    pub(super) instance: Option<String>,
    pub(super) text: String,
}

impl Problem {
    pub(super) fn new(instance: Option<&str>, text: impl Into<String>) -> Self {
        Self { instance: instance.map(str::to_owned), text: text.into() }
    }
}
