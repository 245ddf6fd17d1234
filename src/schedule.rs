//! When something is due: cron lines in a time zone.

/// A cron line that was understood.
#[derive(Debug, Clone)]
pub struct Schedule {
    text: String,
}

impl Schedule {
    /// The line as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}
