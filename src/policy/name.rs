//! The names of policies, archives and notifiers, which are safe in paths, labels and messages.

use std::fmt::{self, Display};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text; safe in a path.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = BadName;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                if is_name(text) { Ok(Self(text.into())) } else { Err(BadName) }
            }
        }

        impl Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }
    };
}

name!(
    /// A policy's name.
    PolicyName
);
name!(
    /// An archive's name.
    ArchiveName
);
name!(
    /// A notifier's name.
    NotifierName
);

/// A text that can't name a policy, an archive or a notifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a name has 1 to 63 lower-case letters, digits, `_` and `-`, and begins with a letter or a digit")]
pub struct BadName;

fn is_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=63).contains(&text.len())
        && text.as_bytes().first().is_some_and(|b| plain(*b))
        && text.bytes().all(|b| plain(b) || b == b'_' || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_in_paths_and_labels() {
        for good in ["a", "nightly", "0-a_b", &"a".repeat(63)] {
            assert!(good.parse::<PolicyName>().is_ok(), "{good:?}");
        }
        for bad in ["", "-a", "_a", "A", "a.b", "a/b", "..", "é", &"a".repeat(64)] {
            assert!(bad.parse::<PolicyName>().is_err(), "{bad:?}");
        }
    }
}
