//! How a command ends: the exit status, or a refusal with its message.

use std::error::Error;

use crate::text::chain;

/// The exit status, for scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exit {
    /// Success.
    Done = 0,
    /// Nothing failed, but a guard blocked deletions.
    Held = 3,
    /// Something failed, at least in part.
    Failed = 1,
    /// Wrong usage.
    Usage = 2,
    /// The configuration or the credentials are unusable.
    BadConfiguration = 78,
}

impl Exit {
    /// All, by their numbers.
    pub(crate) const ALL: [Self; 5] =
        [Self::Done, Self::Failed, Self::Usage, Self::Held, Self::BadConfiguration];

    /// The meaning, for the help and the manual pages.
    pub(crate) fn meaning(self) -> &'static str {
        match self {
            Self::Done => "Done.",
            Self::Failed => {
                "Something failed, at least in part; or something needs attention: an instance without a good snapshot, a \
                 pattern of a policy that matches nothing."
            }
            Self::Usage => "Wrong usage; nothing was done.",
            Self::Held => {
                "Nothing failed, but a guard blocked deletions, or some are pending: a change that would delete them has \
                 to settle."
            }
            Self::BadConfiguration => "The configuration or the credentials are unusable; nothing was done.",
        }
    }

    /// The worse of two: a failure is worse than a block by the guard.
    #[must_use]
    pub fn worse(self, other: Self) -> Self {
        match (self, other) {
            (Self::Done, other)
            | (Self::Held, other @ (Self::Failed | Self::Usage | Self::BadConfiguration)) => other,
            (one, _) => one,
        }
    }
}

/// A command that could not do its work: the message and the exit status.
#[derive(Debug)]
pub struct Refusal {
    /// The exit status.
    pub exit: Exit,
    /// The message for stderr, in whole lines.
    pub text: String,
}

impl Refusal {
    /// Something failed.
    pub fn failed(text: impl Into<String>) -> Self {
        Self::new(Exit::Failed, text)
    }

    /// The configuration or the credentials are unusable, with the whole chain of causes.
    pub fn bad_configuration(error: &(dyn Error + 'static)) -> Self {
        Self::new(Exit::BadConfiguration, chain(error))
    }

    /// With this status.
    pub(super) fn new(exit: Exit, text: impl Into<String>) -> Self {
        Self { exit, text: text.into() }
    }

    /// The command line asks for something impossible.
    pub fn usage(text: impl Into<String>) -> Self {
        Self::new(Exit::Usage, text)
    }
}

/// An error of the modules below is a failure, with its whole chain of causes: `?` reports it.
impl<E: Error + 'static> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self::new(Exit::Failed, chain(&error))
    }
}
