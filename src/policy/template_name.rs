//! Names of templates made from snapshots: `{instance}-{created:%Y%m%d}`.

/// A pattern for a template's name, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateName {
    text: String,
}
