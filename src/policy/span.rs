//! Spans of time as people write them: `36h`, `14d`, `1y6mo`.

/// A span; days and longer are the calendar's.
#[derive(Debug, Clone, PartialEq)]
pub struct Span(jiff::SpanFieldwise);
