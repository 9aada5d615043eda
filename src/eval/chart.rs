//! Small charts as self-contained HTML figures with inline SVG: lines, heat maps, histograms.
//!
//! No scripts and no outside addresses; colours come from [`STYLE`], which has a light and a dark scheme. Anything
//! can be drawn: no points, one point, points that are not finite (they leave gaps), any range, any number of points.

use std::fmt::Write as _;

pub use crate::eval::area_chart::{HeatMap, HistogramChart};
use crate::eval::axis::{Axis, BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, bounds, is_drawable, short_number};

/// Style sheet of the charts. Okabe and Ito's palette: told apart with every common kind of colour blindness.
pub const STYLE: &str = include_str!("chart.css");

/// Most points drawn of one series; more are thinned so that every peak stays.
pub const MOST_POINTS: usize = 800;

/// A colour of the palette.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Color {
    Blue,
    Orange,
    Green,
    Purple,
    Grey,
}

impl Color {
    fn class(self) -> &'static str {
        match self {
            Color::Blue => "blue",
            Color::Orange => "orange",
            Color::Green => "green",
            Color::Purple => "purple",
            Color::Grey => "grey",
        }
    }
}

/// How a series is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stroke {
    Solid,
    Dashed,
    /// In the background and without a legend: raw values behind their smoothed line.
    Faint,
}

/// Points in the order of `x`.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    pub name: String,
    pub color: Color,
    pub stroke: Stroke,
    pub points: Vec<(f64, f64)>,
}

/// A horizontal line to compare with.
#[derive(Debug, Clone, PartialEq)]
pub struct Level {
    pub name: String,
    pub color: Color,
    pub value: f64,
}

/// Lines over a common horizontal axis.
#[derive(Debug, Clone, PartialEq)]
pub struct LineChart {
    pub title: String,
    /// What the horizontal axis counts.
    pub x_label: String,
    /// What the vertical axis measures, with its unit.
    pub y_label: String,
    pub series: Vec<Series>,
    pub levels: Vec<Level>,
    /// A sentence under the chart.
    pub note: String,
    /// Whether the legend says where each series ends; of no meaning where the horizontal axis is not time.
    pub says_ends: bool,
    /// Includes zero in the vertical range.
    pub from_zero: bool,
    /// Leaves the first twentieth of the horizontal range out of the vertical range, so that the fall of the first
    /// steps does not flatten all the rest.
    pub settle: bool,
    /// Takes a logarithmic vertical axis when all values are positive and span three decades.
    pub log_when_wide: bool,
}

impl LineChart {
    pub fn new(title: &str, x_label: &str, y_label: &str) -> LineChart {
        LineChart {
            title: title.to_string(),
            x_label: x_label.to_string(),
            y_label: y_label.to_string(),
            series: Vec::new(),
            levels: Vec::new(),
            note: String::new(),
            says_ends: true,
            from_zero: false,
            settle: false,
            log_when_wide: false,
        }
    }

    /// The `<figure>` with title, legend, chart and note.
    pub fn figure(&self) -> String {
        let drawn: Vec<(&Series, Vec<(f64, f64)>)> =
            self.series.iter().map(|series| (series, decimate(&series.points, MOST_POINTS))).collect();
        let finite = || drawn.iter().flat_map(|(_, points)| points).copied().filter(|&point| is_drawable(point));
        let mut body = String::new();
        let mut note = self.note.clone();
        if finite().next().is_none() {
            body.push_str(&nothing("no points to draw"));
        } else {
            let (first, last) = bounds(finite().map(|(x, _)| x));
            let whole = finite().all(|(x, _)| x.fract() == 0.0);
            let x_axis = Axis::horizontal(first, last, whole);
            let settled = first + 0.05 * (last - first);
            let seen = |from: f64| finite().filter(move |&(x, _)| x >= from).map(|(_, y)| y);
            let level = || self.levels.iter().map(|level| level.value).filter(|value| is_drawable((0.0, *value)));
            let zero = self.from_zero.then_some(0.0);
            let all = bounds(seen(first).chain(level()).chain(zero));
            let late = bounds(seen(settled).chain(level()).chain(zero));
            // Cutting pays only when it shows the rest at least a third larger.
            let cut = self.settle && late.1 - late.0 > 0.0 && (all.1 - all.0) > 1.33 * (late.1 - late.0);
            let (low, high) = if cut { late } else { all };
            let log = self.log_when_wide && low > 0.0 && high / low > 1000.0;
            let y_axis = Axis::vertical(low, high, log, self.from_zero);
            self.draw(&mut body, &drawn, &x_axis, &y_axis);
            if cut {
                let space = if note.is_empty() { "" } else { " " };
                let _ = write!(note, "{space}The first steps leave the frame.");
            }
        }
        let mut legend = Legend::default();
        for series in self.series.iter().filter(|series| series.stroke != Stroke::Faint) {
            let last = series.points.iter().rev().find(|&&point| is_drawable(point));
            let end = last.filter(|_| self.says_ends).map(|&(_, y)| short_number(y));
            legend.line(&series.name, series.color, series.stroke, end);
        }
        for level in &self.levels {
            let value = is_drawable((0.0, level.value)).then(|| short_number(level.value));
            legend.line(&level.name, level.color, Stroke::Dashed, value);
        }
        figure(&self.title, &legend.html, &svg(&self.title, HEIGHT, &body), &note)
    }

    fn draw(&self, body: &mut String, drawn: &[(&Series, Vec<(f64, f64)>)], x_axis: &Axis, y_axis: &Axis) {
        let suffix = if y_axis.log { " (log scale)" } else { "" };
        let (right, floor) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        for (value, label) in y_axis.ticks() {
            let y = y_axis.place(value);
            let _ = write!(body, r#"<path class="grid" d="M{LEFT} {y:.1}H{right}"/>"#);
            let _ = write!(body, r#"<text x="{:.1}" y="{:.1}" class="end">{label}</text>"#, LEFT - 8.0, y + 4.0);
        }
        for (value, label) in x_axis.ticks() {
            let x = x_axis.place(value);
            let _ = write!(body, r#"<path class="axis" d="M{x:.1} {floor}v4"/>"#);
            let _ = write!(body, r#"<text x="{x:.1}" y="{:.1}" class="middle">{label}</text>"#, floor + 18.0);
        }
        let _ = write!(body, r#"<path class="axis" d="M{LEFT} {floor}H{right}"/>"#);
        let _ = write!(body, r#"<text x="0" y="12" class="label">{}{suffix}</text>"#, escape(&self.y_label));
        let _ = write!(
            body,
            r#"<text x="{right}" y="{:.1}" class="label end">{}</text>"#,
            HEIGHT - 6.0,
            escape(&self.x_label)
        );
        // A nested svg clips what leaves its frame, without an identifier that could clash on the page.
        let (wide, tall) = (right - LEFT + 8.0, floor - TOP + 8.0);
        let (x, y) = (LEFT - 4.0, TOP - 4.0);
        let _ = write!(body, r#"<svg x="{x}" y="{y}" width="{wide}" height="{tall}" viewBox="{x} {y} {wide} {tall}">"#);
        for level in self.levels.iter().filter(|level| is_drawable((0.0, level.value))) {
            let y = y_axis.place(level.value);
            let _ = write!(body, r#"<path class="line dashed {}" d="M{LEFT} {y:.1}H{right}"/>"#, level.color.class());
        }
        let order = |stroke: Stroke| if stroke == Stroke::Faint { 0 } else { 1 };
        for layer in 0..2 {
            for (series, points) in drawn.iter().filter(|(series, _)| order(series.stroke) == layer) {
                draw_series(body, series, points, x_axis, y_axis);
            }
        }
        body.push_str("</svg>");
    }
}

fn draw_series(body: &mut String, series: &Series, points: &[(f64, f64)], x_axis: &Axis, y_axis: &Axis) {
    let color = series.color.class();
    let style = match series.stroke {
        Stroke::Solid => "line",
        Stroke::Dashed => "line dashed",
        Stroke::Faint => "line faint",
    };
    let visible = |point: &(f64, f64)| is_drawable(*point) && (!y_axis.log || point.1 > 0.0);
    let few = points.len() <= 24 && series.stroke != Stroke::Faint;
    let mut path = String::new();
    let mut dots = String::new();
    for run in points.split(|point| !visible(point)).filter(|run| !run.is_empty()) {
        for (index, &(x, y)) in run.iter().enumerate() {
            let command = if index == 0 { 'M' } else { 'L' };
            let (x, y) = (x_axis.place(x), y_axis.place(y));
            let _ = write!(path, "{command}{x:.1} {y:.1}");
            // A run of one point has no line to be seen by.
            if few || run.len() == 1 {
                let _ = write!(dots, r#"<circle class="dot {color}" cx="{x:.1}" cy="{y:.1}" r="2.6"/>"#);
            }
        }
    }
    if !path.is_empty() {
        let _ = write!(body, r#"<path class="{style} {color}" d="{path}"/>{dots}"#);
    }
}

/// Moving average over `points`, centred so that it does not lag; values that are not finite stay gaps.
///
/// The window is a fortieth of the points, so that the line keeps its detail whatever the length of the run. Very many
/// points are averaged in groups first.
pub fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mean = |window: &[(f64, f64)]| {
        let (sum, count) = window
            .iter()
            .filter(|point| is_drawable(**point))
            .fold((0.0, 0usize), |(sum, count), point| (sum + point.1, count + 1));
        sum / count as f64
    };
    let group = points.len().div_ceil(2 * MOST_POINTS).max(1);
    let grouped: Vec<(f64, f64)> = points.chunks(group).map(|chunk| (chunk[chunk.len() / 2].0, mean(chunk))).collect();
    let half = grouped.len() / 80;
    let average = |(index, &(x, y)): (usize, &(f64, f64))| {
        // Narrower at the start, where curves are steep, but not at the end, where the last step would bend the line.
        let window = index - half.min(index)..(index + half.min(index) + 1).min(grouped.len());
        (x, if is_drawable((x, y)) { mean(&grouped[window]) } else { f64::NAN })
    };
    grouped.iter().enumerate().map(average).collect()
}

/// At most `most` points that look the same: of each stretch the lowest and the highest, and a gap if it has one.
pub fn decimate(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    if points.len() <= most {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil((most / 3).max(1));
    let mut kept = Vec::with_capacity(most);
    for bucket in points.chunks(stretch) {
        let finite = || bucket.iter().enumerate().filter(|(_, point)| is_drawable(**point));
        let low = finite().min_by(|a, b| a.1.1.total_cmp(&b.1.1)).map(|(index, _)| index);
        let high = finite().max_by(|a, b| a.1.1.total_cmp(&b.1.1)).map(|(index, _)| index);
        let gap = bucket.iter().position(|point| !is_drawable(*point));
        let mut places: Vec<usize> = [low, high, gap].into_iter().flatten().collect();
        places.sort_unstable();
        places.dedup();
        kept.extend(places.into_iter().map(|place| bucket[place]));
    }
    kept
}

/// Text for HTML and SVG, between tags or in an attribute.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(character),
            control if control.is_control() => escaped.push('\u{fffd}'),
            plain => escaped.push(plain),
        }
    }
    escaped
}

pub(super) fn figure(title: &str, legend: &str, svg: &str, note: &str) -> String {
    let mut html = format!(r#"<figure class="chart"><figcaption>{}</figcaption>"#, escape(title));
    if !legend.is_empty() {
        let _ = write!(html, r#"<ul class="legend">{legend}</ul>"#);
    }
    html.push_str(svg);
    if !note.is_empty() {
        let _ = write!(html, r#"<p class="note">{}</p>"#, escape(note));
    }
    html.push_str("</figure>\n");
    html
}

pub(super) fn svg(title: &str, height: f64, body: &str) -> String {
    format!(
        r#"<svg class="plot" viewBox="0 0 {WIDTH} {height:.0}" role="img" aria-label="{}">{body}</svg>"#,
        escape(title)
    )
}

pub(super) fn nothing(reason: &str) -> String {
    format!(r#"<text x="{}" y="70" class="middle label">{}</text>"#, WIDTH / 2.0, escape(reason))
}

#[derive(Default)]
pub(super) struct Legend {
    pub(super) html: String,
}

impl Legend {
    pub(super) fn line(&mut self, name: &str, color: Color, stroke: Stroke, value: Option<String>) {
        let (dashed, color) = (if stroke == Stroke::Dashed { " dashed" } else { "" }, color.class());
        let value = value.map(|value| format!(" <b>{value}</b>")).unwrap_or_default();
        let _ = write!(
            self.html,
            r#"<li><svg class="key" viewBox="0 0 22 10"><path class="line{dashed} {color}" d="M1 5H21"/></svg>{}{value}</li>"#,
            escape(name)
        );
    }

    pub(super) fn swatch(&mut self, name: &str, (class, opacity): (&str, f64)) {
        let _ = write!(
            self.html,
            r#"<li><svg class="key" viewBox="0 0 22 10"><rect class="cell {class}" x="4" width="14" height="10" fill-opacity="{opacity:.2}"/></svg>{}</li>"#,
            escape(name)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_peaks_and_gaps() {
        let mut points: Vec<(f64, f64)> = (0..100_000).map(|i| (i as f64, (i as f64 / 900.0).sin())).collect();
        points[40_123].1 = 77.0;
        points[60_321].1 = -55.0;
        points[70_000].1 = f64::NAN;
        let kept = decimate(&points, MOST_POINTS);
        assert!(kept.len() <= MOST_POINTS, "{}", kept.len());
        assert!(kept.contains(&(40_123.0, 77.0)) && kept.contains(&(60_321.0, -55.0)));
        assert_eq!(kept.iter().filter(|point| point.1.is_nan()).count(), 1);
        assert!(kept.is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!(decimate(&points[..700], MOST_POINTS).len(), 700);
    }

    #[test]
    fn smoothing_does_not_lag_and_leaves_gaps() {
        let mut points: Vec<(f64, f64)> = (0..500).map(|i| (i as f64, 0.5 * i as f64)).collect();
        let line = smoothed(&points);
        assert!(line.iter().zip(&points).take(490).all(|(smooth, raw)| (smooth.1 - raw.1).abs() < 1e-9), "no lag");
        points[7].1 = f64::INFINITY;
        let line = smoothed(&points);
        assert!(line[7].1.is_nan() && line[8].1.is_finite());
        assert_eq!(smoothed(&vec![(1.0, 2.0); 100_000]).len(), 1_588);
        assert_eq!(smoothed(&[(1.0, 2.0), (2.0, 5.0)]), [(1.0, 2.0), (2.0, 5.0)]);
    }

    #[test]
    fn no_points_bad_points_and_wild_points_are_drawn() {
        let series =
            |points: Vec<(f64, f64)>| Series { name: "s".into(), color: Color::Blue, stroke: Stroke::Solid, points };
        for points in [
            vec![],
            vec![(3.0, 4.0)],
            vec![(0.0, f64::NAN), (1.0, f64::INFINITY)],
            vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 1.5)],
            vec![(0.0, 1e-290), (1.0, 1e290)],
            vec![(1e299, -1e299)],
            vec![(0.0, -1e299), (1.0, 1e299), (f64::NAN, 1.0)],
        ] {
            for log_when_wide in [false, true] {
                let chart = LineChart {
                    series: vec![series(points.clone())],
                    levels: vec![Level { name: "l".into(), color: Color::Green, value: f64::NAN }],
                    log_when_wide,
                    settle: true,
                    ..LineChart::new("t", "x", "y")
                };
                let figure = chart.figure();
                assert!(!figure.contains("NaN") && !figure.contains("inf"), "{points:?}: {figure}");
            }
        }
        let gap = LineChart {
            series: vec![series(vec![(0.0, 1.0), (1.0, 2.0), (2.0, f64::NAN), (3.0, 2.0), (4.0, 1.0)])],
            ..LineChart::new("t", "x", "y")
        };
        let path = gap.figure();
        let path = path.split(r#"<path class="line blue" d=""#).last().and_then(|rest| rest.split('"').next());
        assert_eq!(path.map(|path| path.matches('M').count()), Some(2), "a gap starts a new line");
    }
}
