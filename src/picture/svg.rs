//! Snapshots over time, as an SVG for a document.
//!
//! Time runs from left to right. On top are curves (number, age of the oldest, size), below them one row per rule with
//! a bar for each snapshot, as long as the rule keeps it. The file needs no other: no font, no script. It follows the
//! light or dark scheme of the viewer, and all text from outside is escaped.
//!
//! Its size is bounded, however many snapshots there are. Only intervals that are wide enough to be seen have a bar of
//! their own; shorter ones that follow each other are joined to a pale strip; and a row with too many at the same time
//! is drawn as a curve of their number.

use std::fmt::Write as _;

use jiff::civil::{Date, DateTime, time};
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, Unit};

use crate::text::excerpt;

/// A picture with its texts.
#[derive(Debug)]
pub struct Picture<'a> {
    /// The headline.
    pub title: &'a str,
    /// The line below it: zone, instance, time, schedule.
    pub subtitle: &'a str,
    /// The instant at the left edge.
    pub from: Timestamp,
    /// The instant at the right edge.
    pub until: Timestamp,
    /// The present, if it is marked.
    pub now: Option<Timestamp>,
    /// The zone of the axis' days, months and years.
    pub time_zone: &'a TimeZone,
    /// Drawn on top.
    pub curves: Vec<Curve<'a>>,
    /// Drawn below the curves, the first one uppermost.
    pub rows: Vec<Row<'a>>,
    /// Printed below the legend, one per line.
    pub notes: Vec<String>,
}

/// A value over time.
#[derive(Debug)]
pub struct Curve<'a> {
    /// The name of the value.
    pub label: &'a str,
    /// Its values over time, in order; each holds until the next.
    pub points: Vec<(Timestamp, u64)>,
    /// Formats a value.
    pub format: fn(u64) -> String,
}

/// A rule and the snapshots that it keeps.
#[derive(Debug)]
pub struct Row<'a> {
    /// The rule's name.
    pub label: &'a str,
    /// The rule's value, such as `= 7`; may be empty.
    pub detail: String,
    /// When it keeps a snapshot: start and end of each interval, in any order.
    pub spans: Vec<(Timestamp, Timestamp)>,
}

const WIDTH: f64 = 1120.0;
/// Where the time begins: labels are to its left.
const LEFT: f64 = 204.0;
const RIGHT: f64 = WIDTH - 28.0;
/// Where the first curve begins: below title and subtitle.
const TOP: f64 = 84.0;
const CURVE_HEIGHT: f64 = 46.0;
const GAP: f64 = 10.0;
/// Two lines of text fit beside a row.
const ROW_HEIGHT_MIN: f64 = 34.0;
/// Between two labels of the axis.
const TICK_GAP_MIN: f64 = 62.0;
/// What is narrower gets no bar of its own: its round ends would hide it.
const BAR_WIDTH_MIN: f64 = 6.0;
/// Closer marks can't be distinguished.
const PIXEL: f64 = 1.0;
/// With more lanes, a row becomes a curve.
const LANES_MAX: u64 = 32;
/// With more marks, too: at about 20 bytes each they keep a row below 100 KiB.
const MARKS_MAX: usize = 4000;
/// There are not as many rules; a bound all the same.
const ROWS_MAX: usize = 32;

/// A line of this many characters fits across at its size.
const TITLE_MAX: usize = 84;
const LINE_MAX: usize = 168;
const LABEL_MAX: usize = 22;

/// From short to long periods; all are readable on white and on black.
const COLORS: [&str; 8] =
    ["#0f9d8a", "#1f8fc4", "#3f73e0", "#7a5fe8", "#ab4fd0", "#d4478c", "#dd6b34", "#b28614"];

/// The stylesheet of every picture, for a page that has pictures.
pub const STYLE: &str = "\
.sw-page{fill:#ffffff;stroke:#d9dee4}.sw-band{fill:#f5f7f9}.sw-text{fill:#1f2630}.sw-dim{fill:#66707c}\
.sw-grid{stroke:#d9dee4}.sw-year{stroke:#aeb6c0}.sw-curve{fill:#8794a5;stroke:#66707c}\
@media(prefers-color-scheme:dark){.sw-page{fill:#0f141b;stroke:#2b333d}.sw-band{fill:#161d26}\
.sw-text{fill:#e4e9ef}.sw-dim{fill:#8f9aa7}.sw-grid{stroke:#29313b}.sw-year{stroke:#4a5562}\
.sw-curve{fill:#8794a5;stroke:#a5b0bd}}\
.sw-now{stroke:#d4478c;stroke-dasharray:4 3}.sw-area{stroke:none}.sw-line{fill:none}";

const FONT: &str = "system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',Arial,sans-serif";
const MONO: &str = "ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace";

/// The kinds of marks that a picture has, for its legend.
#[derive(Debug, Default)]
struct Kinds {
    bar: bool,
    strip: bool,
    crowd: bool,
}

/// A picture as a whole SVG file.
pub fn draw(picture: &Picture<'_>) -> String {
    draw_with(picture, &format!("<style>{STYLE}</style>\n"))
}

/// A picture as a part of a page, which has [`STYLE`].
pub fn draw_in_page(picture: &Picture<'_>) -> String {
    draw_with(picture, "")
}

fn draw_with(picture: &Picture<'_>, style: &str) -> String {
    let scale = Scale::new(picture.from, picture.until);
    let mut body = String::new();
    let mut y = TOP;
    let mut kinds = Kinds::default();
    let mut rows = String::new();
    for curve in &picture.curves {
        draw_curve(&mut rows, curve, &scale, y);
        y += CURVE_HEIGHT + GAP;
    }
    for (row, color) in picture.rows.iter().take(ROWS_MAX).zip(COLORS.iter().cycle()) {
        y += draw_row(&mut rows, row, color, &scale, y, &mut kinds) + GAP;
    }
    let bottom = y - GAP / 2.0;
    draw_axis(&mut body, picture, &scale, bottom);
    body.push_str(&rows);
    draw_now(&mut body, picture, &scale, bottom);
    y = bottom + 58.0;
    // The one row's own color, or one that stands for all.
    let color = COLORS[if picture.rows.len() == 1 { 0 } else { 2 }];
    draw_legend(&mut body, color, &kinds, &scale, y);
    for note in &picture.notes {
        y += 19.0;
        let note = escaped(note, LINE_MAX);
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(body, "<text class=\"sw-dim\" x=\"24\" y=\"{}\">{note}</text>", tenth(y));
    }
    let height = y + 22.0;

    let (title, subtitle) = (escaped(picture.title, TITLE_MAX), escaped(picture.subtitle, LINE_MAX));
    let mut svg = String::with_capacity(body.len() + 2048);
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {w} {h}\" width=\"{w}\" height=\"{h}\" \
             role=\"img\" font-family=\"{FONT}\" font-size=\"12\">\n\
             <title>{title}</title>\n<desc>{subtitle}</desc>\n{style}\
             <rect class=\"sw-page\" x=\"0.5\" y=\"0.5\" width=\"{iw}\" height=\"{ih}\" rx=\"10\"/>\n\
             <text class=\"sw-text\" x=\"24\" y=\"38\" font-size=\"20\" font-weight=\"600\">{title}</text>\n\
             <text class=\"sw-dim\" x=\"24\" y=\"60\">{subtitle}</text>",
        w = tenth(WIDTH),
        h = tenth(height),
        iw = tenth(WIDTH - 1.0),
        ih = tenth(height - 1.0),
    );
    svg.push_str(&body);
    svg.push_str("</svg>\n");
    svg
}

/// Rounded to at most one digit behind the point, without a minus before a zero.
fn tenth(number: f64) -> f64 {
    (number * 10.0).round() / 10.0 + 0.0
}

/// Text from outside: cut, safe to look at, and nothing in it is markup.
fn escaped(text: &str, characters_max: usize) -> String {
    let mut safe = String::new();
    for character in excerpt(text, characters_max).chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            // Not allowed in XML.
            '\u{fffe}' | '\u{ffff}' => safe.push('\u{fffd}'),
            other => safe.push(other),
        }
    }
    safe
}

/// Maps an instant to its horizontal position.
struct Scale {
    from: Timestamp,
    seconds: f64,
}

impl Scale {
    fn new(from: Timestamp, until: Timestamp) -> Self {
        Self { from, seconds: until.duration_since(from).as_secs_f64().max(1.0) }
    }

    fn x(&self, at: Timestamp) -> f64 {
        let part = at.duration_since(self.from).as_secs_f64() / self.seconds;
        LEFT + part.clamp(0.0, 1.0) * (RIGHT - LEFT)
    }

    /// How many seconds this width covers.
    fn seconds_in(&self, width: f64) -> f64 {
        width / (RIGHT - LEFT) * self.seconds
    }

    fn width_of(&self, seconds: f64) -> f64 {
        seconds / self.seconds * (RIGHT - LEFT)
    }

    /// The largest value in each column of a pixel.
    fn columns(&self, points: &[(Timestamp, u64)]) -> Vec<u64> {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a small positive number"
        )]
        let column = |x: f64| (x - LEFT) as usize;
        let mut columns = vec![0; column(RIGHT) + 1];
        for (place, (at, value)) in points.iter().enumerate() {
            let end = points.get(place + 1).map_or(RIGHT, |(next, _)| self.x(*next));
            let (first, last) = (column(self.x(*at)), column(end));
            for column in columns.iter_mut().take(last + 1).skip(first) {
                *column = (*column).max(*value);
            }
        }
        columns
    }
}

/// The filled outline of a value over time, from `y` down to the baseline.
fn draw_area(body: &mut String, columns: &[u64], y: f64, height: f64, class: &str, paint: &str) {
    let most = columns.iter().copied().max().unwrap_or(0).max(1);
    #[expect(clippy::cast_precision_loss, reason = "less than a pixel")]
    let level = |value: u64| y + height - (height - 2.0) * (value as f64 / most as f64);
    let mut line = String::new();
    let mut last = None;
    for (column, value) in (0..).zip(columns) {
        if last != Some(*value) {
            let (x, y) = (tenth(LEFT + f64::from(column)), tenth(level(*value)));
            let _ = match last.replace(*value) {
                None => write!(line, "M{x} {y}"),
                Some(_) => write!(line, "H{x}V{y}"),
            };
        }
    }
    let _ = write!(line, "H{}", tenth(RIGHT));
    let base = tenth(y + height);
    let _ = writeln!(
        body,
        "<path class=\"{class}sw-area\"{paint} fill-opacity=\"0.28\" d=\"{line}V{base}H{}Z\"/>\n\
             <path class=\"{class}sw-line\"{paint} stroke-width=\"1.3\" stroke-linejoin=\"round\" d=\"{line}\"/>",
        tenth(LEFT)
    );
}

fn draw_label(body: &mut String, label: &str, detail: &str, middle: f64, mono: bool) {
    let label = escaped(label, LABEL_MAX);
    let family = if mono { format!(" font-family=\"{MONO}\"") } else { String::new() };
    let _ = writeln!(
        body,
        "<text class=\"sw-text\" x=\"24\" y=\"{}\" font-weight=\"600\"{family}>{label}</text>\n\
             <text class=\"sw-dim\" x=\"24\" y=\"{}\" font-size=\"11\">{}</text>",
        tenth(middle - 2.5),
        tenth(middle + 12.5),
        escaped(detail, LABEL_MAX + 6)
    );
}

fn draw_band(body: &mut String, y: f64, height: f64) {
    let _ = writeln!(
        body,
        "<rect class=\"sw-band\" x=\"12\" y=\"{}\" width=\"{}\" height=\"{}\" rx=\"6\" fill-opacity=\"0.75\"/>",
        tenth(y - 4.0),
        tenth(WIDTH - 24.0),
        tenth(height + 8.0)
    );
}

fn draw_curve(body: &mut String, curve: &Curve<'_>, scale: &Scale, y: f64) {
    let most = curve.points.iter().map(|(_, value)| *value).max().unwrap_or(0);
    let last = curve.points.last().map_or(0, |(_, value)| *value);
    draw_area(body, &scale.columns(&curve.points), y, CURVE_HEIGHT, "sw-curve ", "");
    let format = curve.format;
    let detail = format!("most {} · end {}", format(most), format(last));
    draw_label(body, curve.label, &detail, y + CURVE_HEIGHT / 2.0, false);
}

/// Returns the row's height.
fn draw_row(body: &mut String, row: &Row<'_>, color: &str, scale: &Scale, y: f64, kinds: &mut Kinds) -> f64 {
    let counts = counts(&row.spans);
    let most = counts.iter().map(|(_, count)| *count).max().unwrap_or(0);
    // A row with too many becomes a curve, which needs no lanes.
    let lanes = if most > LANES_MAX { Lanes::default() } else { Lanes::new(&row.spans, scale) };
    let is_crowd = most > LANES_MAX || lanes.bars.len() + lanes.strips.len() > MARKS_MAX;
    let pitch: f64 = match lanes.count {
        0..=3 => 9.0,
        4..=6 => 7.0,
        7..=12 => 5.5,
        13..=20 => 4.0,
        _ => 3.0,
    };
    #[expect(clippy::cast_precision_loss, reason = "at most LANES_MAX")]
    let needed = if is_crowd { CURVE_HEIGHT } else { lanes.count as f64 * pitch };
    let height = needed.max(ROW_HEIGHT_MIN);
    draw_band(body, y, height);
    let most = format!("most {most}");
    let detail = if row.detail.is_empty() { most } else { format!("{} · {most}", row.detail) };
    draw_label(body, row.label, &detail, y + height / 2.0, true);
    if is_crowd {
        kinds.crowd = true;
        let paint = format!(" fill=\"{color}\" stroke=\"{color}\"");
        draw_area(body, &scale.columns(&counts), y, height, "", &paint);
        return height;
    }
    let stroke = (pitch - 1.6).max(1.8);
    let first = y + (height - needed) / 2.0 + pitch / 2.0;
    #[expect(clippy::cast_precision_loss, reason = "at most LANES_MAX")]
    let level = |lane: usize| first + lane as f64 * pitch;
    // Draws the lines, each shorter by `inset` at both ends but at least `width_min` wide.
    let mut draw_lines = |lines: &[(usize, f64, f64)], inset: f64, width_min: f64, paint: &str| {
        let line = |(lane, from, to): &(usize, f64, f64)| {
            let from = from + inset;
            format!("M{} {}H{}", tenth(from), tenth(level(*lane)), tenth((to - inset).max(from + width_min)))
        };
        let path: String = lines.iter().map(line).collect();
        if !path.is_empty() {
            let width = tenth(stroke);
            let _ = writeln!(
                body,
                "<path fill=\"none\" stroke=\"{color}\" stroke-width=\"{width}\" {paint} d=\"{path}\"/>"
            );
        }
    };
    draw_lines(&lanes.strips, 0.0, PIXEL, "stroke-opacity=\"0.32\"");
    // Round ends reach beyond the line's end; between two bars there is a gap.
    draw_lines(&lanes.bars, stroke / 2.0 + 0.4, 0.1, "stroke-linecap=\"round\"");
    kinds.strip |= !lanes.strips.is_empty();
    kinds.bar |= !lanes.bars.is_empty();
    height
}

/// The number of open intervals, at each change.
fn counts(spans: &[(Timestamp, Timestamp)]) -> Vec<(Timestamp, u64)> {
    let mut changes: Vec<(Timestamp, bool)> = Vec::with_capacity(spans.len() * 2);
    for (from, until) in spans.iter().filter(|(from, until)| from < until) {
        changes.extend([(*from, true), (*until, false)]);
    }
    // At the same instant, ends are counted before beginnings.
    changes.sort_unstable();
    let mut counts: Vec<(Timestamp, u64)> = Vec::new();
    let mut count: u64 = 0;
    for (at, begins) in changes {
        count = if begins { count + 1 } else { count.saturating_sub(1) };
        match counts.last_mut() {
            Some((last, value)) if *last == at => *value = count,
            _ => counts.push((at, count)),
        }
    }
    counts
}

/// Intervals side by side, so that no two in a lane overlap.
#[derive(Debug, Default)]
struct Lanes {
    count: usize,
    /// Wide enough to be seen alone: lane, left end, right end.
    bars: Vec<(usize, f64, f64)>,
    /// The others; those that follow each other are joined.
    strips: Vec<(usize, f64, f64)>,
}

impl Lanes {
    fn new(spans: &[(Timestamp, Timestamp)], scale: &Scale) -> Self {
        let mut sorted: Vec<_> = spans.iter().copied().filter(|(from, until)| from < until).collect();
        sorted.sort_unstable();
        let mut lanes = Self::default();
        // Of each lane, its last end, and the strip that the next interval may extend.
        let mut used: Vec<(Timestamp, Option<usize>)> = Vec::new();
        for (from, until) in sorted {
            let lane = used.iter().position(|(end, _)| *end <= from).unwrap_or(used.len());
            if lane == used.len() {
                used.push((until, None));
            }
            let Some((end, open)) = used.get_mut(lane) else { continue };
            *end = until;
            let (x1, x2) = (scale.x(from), scale.x(until));
            if x2 - x1 >= BAR_WIDTH_MIN {
                lanes.bars.push((lane, x1, x2));
                *open = None;
                continue;
            }
            match open.and_then(|strip| lanes.strips.get_mut(strip)) {
                Some((_, _, end)) if x1 - *end < PIXEL => *end = end.max(x2),
                _ => {
                    *open = Some(lanes.strips.len());
                    lanes.strips.push((lane, x1, x2));
                }
            }
        }
        lanes.count = used.len();
        lanes
    }
}

/// The steps that an axis may have: multiples of a unit, with the seconds of its shortest one.
const STEPS: [(Unit, f64, &[i64]); 4] = [
    (Unit::Minute, 60.0, &[1, 5, 15, 30, 60, 180, 360, 720]),
    (Unit::Day, DAY, &[1, 2, 7, 14]),
    (Unit::Month, 28.0 * DAY, &[1, 2, 3, 6]),
    (Unit::Year, 365.0 * DAY, &[1, 2, 5, 10, 20, 50, 100, 500, 1000]),
];

/// Seconds.
const DAY: f64 = 86400.0;

/// A step of an axis.
#[derive(Debug, Clone, Copy)]
struct Step {
    unit: Unit,
    count: i64,
}

impl Step {
    /// The smallest step whose labels do not overlap, else the largest.
    fn fitting(scale: &Scale) -> Self {
        let mut steps = STEPS.iter().flat_map(|(unit, seconds, counts)| {
            counts.iter().map(move |count| (Self { unit: *unit, count: *count }, seconds))
        });
        #[expect(clippy::cast_precision_loss, reason = "at most 1000")]
        let fits =
            |(step, seconds): &(Self, &f64)| scale.width_of(step.count as f64 * *seconds) >= TICK_GAP_MIN;
        steps.find(fits).map_or(Self { unit: Unit::Year, count: 1000 }, |(step, _)| step)
    }

    fn span(self) -> Span {
        match self.unit {
            Unit::Minute => Span::new().minutes(self.count),
            Unit::Day => Span::new().days(self.count),
            Unit::Month => Span::new().months(self.count),
            _ => Span::new().years(self.count),
        }
    }

    /// One of its times, by the wall clock, that is not after `wall`: midnight, a Monday, or the beginning of a year.
    fn start(self, wall: DateTime) -> Option<DateTime> {
        let date = wall.date();
        let date = match self.unit {
            // Weeks begin on Monday.
            Unit::Day if self.count >= 7 => {
                let back = i64::from(date.weekday().to_monday_zero_offset());
                date.checked_sub(Span::new().days(back)).ok()?
            }
            Unit::Minute | Unit::Day => date,
            Unit::Month => date.first_of_year(),
            _ => {
                let year = i64::from(date.year());
                let floor = year - year.rem_euclid(self.count);
                // The first years of the calendar may have no such year before them.
                let begins = |year: i64| Date::new(i16::try_from(year).ok()?, 1, 1).ok();
                begins(floor).or_else(|| begins(floor + self.count))?
            }
        };
        Some(date.to_datetime(time(0, 0, 0, 0)))
    }

    /// The label, and the text below it, drawn where it changes.
    fn labels(self, wall: DateTime) -> (String, String) {
        let (label, below) = match self.unit {
            Unit::Minute => ("%H:%M", "%-d %b %Y"),
            Unit::Day => ("%-d %b", "%Y"),
            Unit::Month => ("%b", "%Y"),
            _ => ("%Y", ""),
        };
        (wall.strftime(label).to_string(), wall.strftime(below).to_string())
    }
}

fn draw_axis(body: &mut String, picture: &Picture<'_>, scale: &Scale, bottom: f64) {
    let step = Step::fitting(scale);
    let begin = picture.time_zone.to_datetime(picture.from);
    let mut wall = step.start(begin);
    let context = |body: &mut String, x: f64, anchor: &str, context: &str| {
        let _ = writeln!(
            body,
            "<text class=\"sw-text\" x=\"{}\" y=\"{}\" text-anchor=\"{anchor}\" font-size=\"11\" font-weight=\"600\">{context}</text>",
            tenth(x),
            tenth(bottom + 34.0)
        );
    };
    let mut below = String::new();
    while let Some(at_wall) = wall {
        wall = at_wall.checked_add(step.span()).ok();
        let Ok(at) = picture.time_zone.to_ambiguous_timestamp(at_wall).compatible() else { continue };
        if at > picture.until {
            break;
        }
        if at < picture.from {
            continue;
        }
        let place = scale.x(at);
        let x = tenth(place);
        let (label, context_here) = step.labels(at_wall);
        // The year or day at the beginning, if the first label leaves space for it.
        if below.is_empty() && place - LEFT > TICK_GAP_MIN {
            below = step.labels(begin).1;
            context(body, LEFT, "start", &below);
        }
        let changes = context_here != below && !below.is_empty();
        let class = if changes { "sw-year" } else { "sw-grid" };
        let _ = writeln!(
            body,
            "<line class=\"{class}\" x1=\"{x}\" x2=\"{x}\" y1=\"{}\" y2=\"{}\"/>\n\
                 <text class=\"sw-dim\" x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{label}</text>",
            tenth(TOP - 6.0),
            tenth(bottom + 4.0),
            tenth(bottom + 19.0),
        );
        if context_here != below {
            context(body, place, "middle", &context_here);
            below = context_here;
        }
    }
}

/// The line at the present.
fn draw_now(body: &mut String, picture: &Picture<'_>, scale: &Scale, bottom: f64) {
    let Some(now) = picture.now else { return };
    let x = tenth(scale.x(now));
    let _ = writeln!(
        body,
        "<line class=\"sw-now\" x1=\"{x}\" x2=\"{x}\" y1=\"{}\" y2=\"{}\"/>\n\
             <text class=\"sw-text\" x=\"{x}\" y=\"{}\" text-anchor=\"middle\" font-size=\"11\" font-weight=\"600\">now</text>",
        tenth(TOP - 6.0),
        tenth(bottom + 4.0),
        tenth(TOP - 10.0)
    );
}

fn draw_legend(body: &mut String, color: &str, kinds: &Kinds, scale: &Scale, y: f64) {
    let mut x = 24.0;
    let brief = duration_words(scale.seconds_in(BAR_WIDTH_MIN));
    let entries = [
        (kinds.bar, "stroke-linecap=\"round\"", "one snapshot, as long as the rule keeps it".to_owned()),
        (
            kinds.strip,
            "stroke-opacity=\"0.32\"",
            format!("one after the other, each kept for less than {brief}"),
        ),
        (kinds.crowd, "", "their number, where there are too many to draw each".to_owned()),
    ];
    for (_, paint, text) in entries.into_iter().filter(|(is_there, ..)| *is_there) {
        let mark = if paint.is_empty() {
            format!(
                "<path fill=\"{color}\" fill-opacity=\"0.28\" stroke=\"{color}\" stroke-width=\"1.3\" d=\"M{} {}v-4h8v-4h14v8\"/>",
                tenth(x),
                tenth(y)
            )
        } else {
            format!(
                "<path stroke=\"{color}\" stroke-width=\"5\" {paint} d=\"M{} {}h18\"/>",
                tenth(x + 2.0),
                tenth(y - 4.0)
            )
        };
        let _ = writeln!(
            body,
            "{mark}\n<text class=\"sw-dim\" x=\"{}\" y=\"{}\">{text}</text>",
            tenth(x + 30.0),
            tenth(y)
        );
        #[expect(clippy::cast_precision_loss, reason = "a short text")]
        let width = text.chars().count() as f64 * 6.1;
        x += 30.0 + width + 26.0;
    }
}

/// An approximate duration in words.
fn duration_words(seconds: f64) -> String {
    let (count, unit) = match seconds {
        seconds if seconds >= 730.0 * DAY => (seconds / (365.25 * DAY), "years"),
        seconds if seconds >= 2.0 * DAY => (seconds / DAY, "days"),
        seconds if seconds >= 7200.0 => (seconds / 3600.0, "hours"),
        seconds if seconds >= 120.0 => (seconds / 60.0, "minutes"),
        seconds => (seconds, "seconds"),
    };
    format!("{} {unit}", count.round())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use jiff::SignedDuration;

    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn hours(from: Timestamp, hours: i64) -> Timestamp {
        from + SignedDuration::from_hours(hours)
    }

    /// One a day, each kept for `held` days, until `days` are over.
    fn daily(from: Timestamp, days: i64, held: i64) -> Vec<(Timestamp, Timestamp)> {
        (0..days).map(|day| (hours(from, 24 * day), hours(from, 24 * (day + held).min(days)))).collect()
    }

    const UTC: &TimeZone = &TimeZone::UTC;

    fn picture(from: Timestamp, until: Timestamp, rows: Vec<Row<'_>>) -> Picture<'_> {
        Picture {
            title: "nightly",
            subtitle: "zone ch-gva-2",
            from,
            until,
            now: None,
            time_zone: UTC,
            curves: vec![Curve {
                label: "snapshots",
                points: vec![(from, 1), (hours(from, 48), 3)],
                format: |value| value.to_string(),
            }],
            rows,
            notes: Vec::new(),
        }
    }

    #[test]
    fn a_small_picture_is_drawn_as_it_was_reviewed() {
        let from = at("2026-11-01T12:00:00Z");
        let rows = vec![
            Row { label: "keep_last", detail: "= 2".to_owned(), spans: daily(from, 14, 2) },
            Row { label: "keep_weekly", detail: String::new(), spans: daily(from, 14, 14) },
        ];
        let mut picture = picture(from, hours(from, 24 * 14), rows);
        picture.notes.push("nothing is real".to_owned());
        insta::assert_snapshot!("small", draw(&picture));
    }

    #[test]
    fn hostile_text_stays_text() {
        let from = at("2026-11-01T12:00:00Z");
        let hostile = "</text><script>alert('1')</script>&\u{202e}\u{1b}]0;\u{ffff}\"";
        let rows = vec![Row { label: hostile, detail: hostile.to_owned(), spans: Vec::new() }];
        let mut picture = picture(from, hours(from, 24), rows);
        (picture.title, picture.subtitle) = (hostile, hostile);
        picture.curves[0].label = hostile;
        picture.notes = vec![hostile.repeat(100)];
        let svg = draw(&picture);
        assert!(!svg.contains("<script"), "{svg}");
        is_well_formed(&svg);
        let strange = |character: char| {
            (character.is_control() && character != '\n') || "\u{202e}\u{ffff}".contains(character)
        };
        assert!(!svg.contains(strange), "{svg}");
        assert_eq!(svg.matches("</text>").count(), svg.matches("<text").count());
        assert!(svg.contains("&lt;script&gt;alert(&#39;1&#39;)") && svg.contains("&amp;\\u{202e}"), "{svg}");
        assert!(!svg.contains("https:") && svg.matches("http").count() == 1, "it needs no other file");
    }

    /// No tag has an attribute twice, and all tags are closed.
    fn is_well_formed(svg: &str) {
        let mut open = Vec::new();
        for tag in svg.split('<').skip(1).map(|rest| rest.split('>').next().unwrap()) {
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "{tag}");
                continue;
            }
            let name = tag.split_whitespace().next().unwrap();
            if !tag.ends_with('/') {
                open.push(name);
            }
            let values = tag.split('"').skip(1).step_by(2).count();
            let keys: Vec<&str> =
                tag.split('"').step_by(2).filter_map(|key| key.trim().strip_suffix('=')).collect();
            let keys: Vec<&str> = keys.iter().map(|key| key.rsplit(' ').next().unwrap()).collect();
            assert_eq!(keys.len(), values, "{tag}");
            assert_eq!(keys.iter().collect::<BTreeSet<_>>().len(), keys.len(), "{tag}");
        }
        assert!(open.is_empty(), "{open:?}");
    }

    #[test]
    fn two_years_of_hours_stay_small() {
        let from = at("2026-11-01T12:00:00Z");
        let end = 2 * 365 * 24;
        let each = |held: i64| -> Vec<_> {
            (0..end).map(|hour| (hours(from, hour), hours(from, (hour + held).min(end)))).collect()
        };
        let rows = [1, 24, 32, 500, 5000, end].map(|held| Row {
            label: "keep_last",
            detail: String::new(),
            spans: each(held),
        });
        let mut picture = picture(from, hours(from, end), rows.into());
        picture.curves[0].points =
            (0..end).map(|hour| (hours(from, hour), hour.unsigned_abs() % 50)).collect();
        let svg = draw(&picture);
        assert!(svg.len() < 200_000, "{}", svg.len());
        is_well_formed(&svg);
    }

    #[test]
    fn no_two_of_a_lane_overlap_and_none_is_lost() {
        let from = at("2026-11-01T12:00:00Z");
        let scale = Scale::new(from, hours(from, 24 * 60));
        let spans: Vec<_> = [(0, 9), (0, 2), (2, 5), (3, 30), (5, 9), (9, 60), (9, 9), (30, 60)]
            .map(|(first, last)| (hours(from, 24 * first), hours(from, 24 * last)))
            .into();
        let lanes = Lanes::new(&spans, &scale);
        assert_eq!(lanes.bars.len(), 7, "what takes no time is not there");
        assert_eq!(lanes.count, 3);
        for (place, (lane, first, last)) in lanes.bars.iter().enumerate() {
            for (other, from, to) in lanes.bars.iter().skip(place + 1) {
                assert!(lane != other || last <= from || to <= first, "{lanes:?}");
            }
        }
        assert_eq!(counts(&spans).iter().map(|(_, count)| *count).max(), Some(3));
    }

    #[test]
    fn the_labels_of_the_axis_never_overlap_however_long_the_time() {
        for (from, until) in [
            ("2026-11-01T12:00:01Z", "2026-11-01T12:00:03Z"),
            ("2026-11-01T12:00:01Z", "2026-11-01T13:00:00Z"),
            ("2027-03-27T12:00:00Z", "2027-03-29T12:00:00Z"),
            ("2026-11-01T12:00:00Z", "2027-02-01T12:00:00Z"),
            ("2026-11-01T12:00:00Z", "2028-11-01T12:00:00Z"),
            ("1970-01-01T00:00:00Z", "2970-01-01T00:00:00Z"),
            ("-009999-01-02T01:59:59Z", "-009000-01-02T01:59:59Z"),
            ("9000-12-30T22:00:00Z", "9999-12-30T22:00:00.999999999Z"),
        ] {
            let (from, until) = (at(from), at(until));
            let mut picture = picture(from, until, Vec::new());
            let zurich = TimeZone::get("Europe/Zurich").unwrap();
            picture.time_zone = &zurich;
            let mut body = String::new();
            draw_axis(&mut body, &picture, &Scale::new(from, until), 100.0);
            let places: Vec<f64> = body
                .lines()
                .filter(|line| line.starts_with("<line"))
                .filter_map(|line| line.split("x1=\"").nth(1)?.split('"').next()?.parse().ok())
                .collect();
            let ticks = body.matches("<line").count();
            assert!(places.len() == ticks && ticks <= 16, "{from}: {ticks}");
            assert!(
                ticks >= 2 || until.duration_since(from) < SignedDuration::from_mins(1),
                "{from}: {ticks}"
            );
            for pair in places.windows(2) {
                assert!(pair[1] - pair[0] >= 50.0, "{from}: {places:?}");
            }
        }
    }
}
