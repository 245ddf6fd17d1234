//! What is said of a snapshot: by one policy, and in the end.

use std::fmt::{self, Display};

use serde::Serialize;

/// What one policy says of a snapshot by itself, with the key to blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opinion {
    NotSelected,
    Ignores(&'static str),
    Keeps(&'static str),
    Deletes(&'static str),
}

/// Whether a snapshot may be deleted, and why or why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Ruling {
    /// Keep, delete or ignore.
    pub verdict: Verdict,
    /// The key to blame, in the words of `plan`.
    pub rule: &'static str,
    /// The policy, the archive or the instance that keeps it, if one does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// A verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It is kept.
    Keep,
    /// It may be deleted.
    Delete,
    /// No rule applies to it, so it is kept.
    Ignore,
}

impl Ruling {
    pub(super) fn new(verdict: Verdict, rule: &'static str) -> Self {
        Self { verdict, rule, by: None }
    }

    pub(super) fn keep(rule: &'static str) -> Self {
        Self::new(Verdict::Keep, rule)
    }

    pub(super) fn keep_by(rule: &'static str, by: impl Into<String>) -> Self {
        Self { by: Some(by.into()), ..Self::keep(rule) }
    }
}

impl Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Keep => "keep",
            Self::Delete => "delete",
            Self::Ignore => "ignore",
        })
    }
}

impl Display for Ruling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.verdict, self.rule)?;
        if let Some(by) = &self.by {
            write!(f, ": {by}")?;
        }
        f.write_str(")")
    }
}
