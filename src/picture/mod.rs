//! Pictures of snapshots over time: a line of text for a terminal, and an SVG for a document.

pub mod line;
pub mod svg;
