//! How an archive uses its bucket: addresses, classes, encryption, versions and locks.

use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::policy::span::Span;

/// No lock is longer: a year and a month. What is locked can't be deleted by anybody, so a mistyped span would cost for as
/// long as it says; copies that are kept for longer are locked again by each run.
pub const LOCK_MAX: Duration = Duration::from_hours(400 * 24);

/// Where an address has the bucket's name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Addressing {
    /// In the path, which every store understands but for some buckets of Amazon's.
    #[default]
    Path,
    /// Before the host's name.
    Virtual,
}

/// How the store is asked to encrypt what it keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encryption {
    /// With a key of the store.
    Aes256,
    /// With the bucket's key in the key management service.
    Kms,
}

impl Encryption {
    /// S3's name of it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Aes256 => "AES256",
            Self::Kms => "aws:kms",
        }
    }
}

/// What pruning does with versions, where the bucket keeps them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Noncurrent {
    /// They stay until a rule of the bucket deletes them.
    #[default]
    Keep,
    /// They are deleted, too, as soon as nothing locks them.
    Delete,
}

/// Who may end a lock before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// A key with the right to bypass it.
    Governance,
    /// Nobody.
    Compliance,
}

impl LockMode {
    /// S3's name of it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Governance => "GOVERNANCE",
            Self::Compliance => "COMPLIANCE",
        }
    }
}

/// How copies that are kept are locked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockRule {
    span: Span,
    /// Who may end a lock.
    pub mode: LockMode,
}

impl LockRule {
    /// Locks for this span after each run; none if that is more than [`LOCK_MAX`].
    pub fn new(span: Span, mode: LockMode) -> Option<Self> {
        // Anywhere in the calendar it has the same length, but for leap days.
        let start: Timestamp = Timestamp::UNIX_EPOCH;
        let end = span.after(start, &TimeZone::UTC)?;
        (end.duration_since(start).unsigned_abs() <= LOCK_MAX).then_some(Self { span, mode })
    }

    /// Until when what is kept now is locked, in whole seconds.
    pub fn until(&self, now: Timestamp) -> Timestamp {
        let longest = now.checked_add(LOCK_MAX).unwrap_or(now);
        let until = self.span.after(now, &TimeZone::UTC).map_or(longest, |until| until.min(longest));
        Timestamp::from_second(until.as_second()).unwrap_or(until)
    }
}

/// The rules of a bucket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BucketRules {
    /// Where addresses have the bucket's name.
    pub addressing: Addressing,
    /// The storage class of images; none: the bucket's.
    pub storage_class: Option<String>,
    /// How the store encrypts; none: as the bucket says.
    pub encryption: Option<Encryption>,
    /// What pruning does with versions.
    pub noncurrent: Noncurrent,
    /// How copies are locked; none: they are not.
    pub lock: Option<LockRule>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_lock_is_longer_than_a_year_and_a_month() {
        let now: Timestamp = "2026-11-01T02:30:00.75Z".parse().unwrap();
        let rule = |text: &str| LockRule::new(text.parse().unwrap(), LockMode::Compliance);
        assert_eq!(rule("30d").unwrap().until(now).to_string(), "2026-12-01T02:30:00Z");
        assert_eq!(rule("1y").unwrap().until(now).to_string(), "2027-11-01T02:30:00Z");
        assert!(rule("400d").is_some() && rule("9600h").is_some());
        for text in ["401d", "2y", "100y", "14mo", "9601h"] {
            assert_eq!(rule(text), None, "{text}");
        }
    }
}
