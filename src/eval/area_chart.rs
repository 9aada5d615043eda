//! Charts of filled areas: heat maps and histograms.

use std::fmt::Write as _;

use crate::eval::axis::{Axis, BOTTOM, HEIGHT, LARGEST, LEFT, RIGHT, TOP, WIDTH, bounds, short_number};
use crate::eval::chart::{Legend, escape, figure, nothing, svg};
use crate::quantity::{percent, thousands};

/// A matrix of shares by colour: each row is compared with the even share of its own row.
#[derive(Debug, Clone, PartialEq)]
pub struct HeatMap {
    pub title: String,
    /// What a row is ("layer"); rows are numbered from 0.
    pub row_label: String,
    /// What a column is ("expert"); columns are numbered from 0.
    pub column_label: String,
    /// Rows may differ in length.
    pub values: Vec<Vec<f64>>,
    pub note: String,
}

impl HeatMap {
    /// The `<figure>` with title, legend, map and note.
    pub fn figure(&self) -> String {
        let columns = self.values.iter().map(Vec::len).max().unwrap_or(0);
        if columns == 0 {
            return figure(&self.title, "", &svg(&self.title, 120.0, &nothing("nothing to show")), &self.note);
        }
        let cell_width = (WIDTH - LEFT - RIGHT) / columns as f64;
        let cell_height = cell_width.clamp(12.0, 30.0);
        let height = TOP + cell_height * self.values.len() as f64 + BOTTOM - 4.0;
        let (gap, dense) = if cell_width > 8.0 { (2.0, "") } else { (0.0, " dense") };
        let cell_count = self.values.iter().map(Vec::len).sum::<usize>();
        let mut body = format!(r#"<text x="0" y="12" class="label">{}</text>"#, escape(&self.row_label));
        let every_row = (14.0 / cell_height).ceil() as usize;
        for (row, values) in self.values.iter().enumerate() {
            let y = TOP + cell_height * row as f64;
            if row.is_multiple_of(every_row) {
                let middle = y + cell_height / 2.0 + 4.0;
                let _ = write!(body, r#"<text x="{:.1}" y="{middle:.1}" class="end">{row}</text>"#, LEFT - 8.0);
            }
            let even = values.iter().filter(|value| value.is_finite()).sum::<f64>() / values.len().max(1) as f64;
            for (column, &value) in values.iter().enumerate() {
                let x = LEFT + cell_width * column as f64;
                let (class, opacity) = shade(value / even);
                let _ = write!(
                    body,
                    r#"<rect class="cell {class}{dense}" x="{x:.1}" y="{y:.1}" width="{:.1}" height="{:.1}" fill-opacity="{opacity:.2}""#,
                    (cell_width - gap).max(0.5),
                    (cell_height - 2.0).max(0.5),
                );
                // Thousands of hidden labels would make the page slow to open.
                if cell_count <= 1024 {
                    let (row_label, column_label) = (escape(&self.row_label), escape(&self.column_label));
                    let share = if value.is_finite() { percent(value) } else { "not finite".to_string() };
                    let _ = write!(body, "><title>{row_label} {row}, {column_label} {column}: {share}</title></rect>");
                } else {
                    body.push_str("/>");
                }
                if cell_width >= 24.0 {
                    let (x, y) = (x + (cell_width - gap) / 2.0, y + cell_height / 2.0 + 3.0);
                    let text = if value.is_finite() { format!("{:.0}", 100.0 * value) } else { "?".to_string() };
                    let _ = write!(body, r#"<text x="{x:.1}" y="{y:.1}" class="middle value">{text}</text>"#);
                }
            }
        }
        // Powers of two suit the usual numbers of experts.
        let every_column =
            if cell_width >= 20.0 { 1 } else { ((26.0 / cell_width).ceil() as usize).next_power_of_two() };
        for column in (0..columns).step_by(every_column) {
            let (x, y) = (LEFT + cell_width * (column as f64 + 0.5) - gap / 2.0, height - BOTTOM + 18.0);
            let _ = write!(body, r#"<text x="{x:.1}" y="{y:.1}" class="middle">{column}</text>"#);
        }
        let (x, y) = (WIDTH - RIGHT, height - 5.0);
        let _ = write!(body, r#"<text x="{x}" y="{y:.1}" class="label end">{}</text>"#, escape(&self.column_label));
        let mut legend = Legend::default();
        for (ratio, name) in [(0.25, "¼ of the even share or less"), (1.0, "even"), (4.0, "4 times it or more")] {
            legend.swatch(name, shade(ratio));
        }
        figure(&self.title, &legend.html, &svg(&self.title, height, &body), &self.note)
    }
}

/// Class and opacity of a cell: two hues away from an even share, full at four times or a quarter of it.
fn shade(ratio: f64) -> (&'static str, f64) {
    if ratio.is_nan() {
        return ("unknown", 0.45);
    }
    let octaves = ratio.max(0.0).log2().clamp(-2.0, 2.0);
    (if octaves >= 0.0 { "over" } else { "under" }, octaves.abs() / 2.0 * 0.85)
}

/// Counts between edges.
#[derive(Debug, Clone, PartialEq)]
pub struct HistogramChart<'a> {
    pub title: &'a str,
    /// What is counted along the horizontal axis, with its unit.
    pub x_label: &'a str,
    /// One more than `counts`, ascending.
    pub edges: &'a [f64],
    pub counts: &'a [u64],
    pub note: &'a str,
}

impl HistogramChart<'_> {
    /// The `<figure>` with title, bars and note. Bars of very unequal width (geometric edges) are drawn equally wide.
    pub fn figure(&self) -> String {
        let body = self.bars().unwrap_or_else(nothing);
        figure(self.title, "", &svg(self.title, HEIGHT, &body), self.note)
    }

    fn bars(&self) -> Result<String, &'static str> {
        let total: f64 = self.counts.iter().map(|&count| count as f64).sum();
        if total == 0.0 {
            return Err("nothing was counted");
        }
        if self.edges.len() != self.counts.len() + 1 {
            return Err("the edges do not fit the counts");
        }
        let widths = self.edges.windows(2).map(|pair| pair[1] - pair[0]);
        let (narrowest, widest) = bounds(widths.clone().filter(|width| width.is_finite()));
        let measured = self.edges.iter().all(|edge| edge.abs() < LARGEST);
        let linear = measured && widths.clone().all(|width| width > 0.0) && widest <= 16.0 * narrowest;
        let (right, floor) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        let x_axis = if linear {
            Axis::horizontal(self.edges[0], self.edges[self.counts.len()], false)
        } else {
            Axis::horizontal(0.0, self.counts.len() as f64, true)
        };
        let most = self.counts.iter().copied().max().unwrap_or(0) as f64 / total;
        let y_axis = Axis::vertical(0.0, 100.0 * most, false, true);
        let mut body = String::new();
        for (value, label) in y_axis.ticks() {
            let y = y_axis.place(value);
            let _ = write!(body, r#"<path class="grid" d="M{LEFT} {y:.1}H{right}"/>"#);
            let _ = write!(body, r#"<text x="{:.1}" y="{:.1}" class="end">{label}%</text>"#, LEFT - 8.0, y + 4.0);
        }
        for (index, &count) in self.counts.iter().enumerate() {
            let (from, to) = (self.edges[index], self.edges[index + 1]);
            let (start, end) = if linear { (from, to) } else { (index as f64, index as f64 + 1.0) };
            let (x, end) = (x_axis.place(start), x_axis.place(end));
            let y = y_axis.place(100.0 * count as f64 / total);
            let (from, to, share) = (short_number(from), short_number(to), percent(count as f64 / total));
            let _ = write!(
                body,
                r#"<rect class="bar" x="{:.1}" y="{y:.1}" width="{:.1}" height="{:.1}"><title>{from} to {to}: {} ({share})</title></rect>"#,
                x + 0.5,
                (end - x - 1.0).max(0.5),
                floor - y,
                thousands(count),
            );
        }
        let ticks = if linear {
            x_axis.ticks()
        } else {
            let every = self.edges.len().div_ceil(8);
            let label = |index: usize| (index as f64, short_number(self.edges[index]));
            (0..self.edges.len()).step_by(every).map(label).collect()
        };
        for (value, label) in ticks {
            let _ = write!(
                body,
                r#"<path class="axis" d="M{x:.1} {floor}v4"/><text x="{x:.1}" y="{:.1}" class="middle">{label}</text>"#,
                floor + 18.0,
                x = x_axis.place(value),
            );
        }
        let _ = write!(body, r#"<path class="axis" d="M{LEFT} {floor}H{right}"/>"#);
        let _ = write!(body, r#"<text x="0" y="12" class="label">share of all {}</text>"#, thousands(total as u64));
        let (y, label) = (HEIGHT - 6.0, escape(self.x_label));
        let _ = write!(body, r#"<text x="{right}" y="{y:.1}" class="label end">{label}</text>"#);
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uneven_row_is_told_from_an_even_one() {
        assert_eq!(shade(1.0).1, 0.0);
        assert_eq!(shade(8.0), ("over", 0.85));
        assert_eq!(shade(0.0), ("under", 0.85));
        assert_eq!(shade(f64::NAN).0, "unknown");
        let map = |values| HeatMap {
            title: "t".into(),
            row_label: "layer".into(),
            column_label: "expert".into(),
            values,
            note: String::new(),
        };
        assert!(map(vec![vec![0.5, 0.5], vec![1.0], vec![]]).figure().contains("layer 1, expert 0: 100.0%"));
        assert!(map(vec![]).figure().contains("nothing to show"));
        assert!(map(vec![vec![0.0, f64::NAN]]).figure().contains("not finite"));
    }

    #[test]
    fn a_histogram_that_cannot_be_drawn_says_why() {
        let chart = |edges: &'static [f64], counts: &'static [u64]| {
            HistogramChart { title: "t", x_label: "x", edges, counts, note: "" }.figure()
        };
        assert!(chart(&[], &[]).contains("nothing was counted"));
        assert!(chart(&[0.0], &[3]).contains("the edges do not fit the counts"));
        assert!(chart(&[0.0, 1.0, 2.0], &[1, 3]).contains("1 to 2: 3 (75.0%)"));
        assert!(chart(&[f64::NEG_INFINITY, 1e-6, 1.0], &[1, 3]).contains("−∞ to 1e−6: 1 (25.0%)"));
    }
}
