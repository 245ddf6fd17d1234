//! One line of what is wrong, as notifiers are notified of it.

use serde::Serialize;

/// What is wrong, and with which instance if it is about one.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ProblemLine {
    pub(super) instance: Option<String>,
    pub(super) text: String,
}

impl ProblemLine {
    pub(super) fn new(instance: Option<&str>, text: impl Into<String>) -> Self {
        Self { instance: instance.map(str::to_owned), text: text.into() }
    }
}
