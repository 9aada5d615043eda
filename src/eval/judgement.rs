//! Parts of the report on what was judged: how far a model is from its teacher where that was sure and where it was not, how
//! often it is right when it is sure, and which steps of its training were held back.

use std::fmt::Write as _;

use crate::eval::calibration::{EntropyBin, calibration_error};
use crate::eval::chart::{Color, LineChart, Series, Stroke, escape};
use crate::eval::page::color;
use crate::eval::report::{Arm, Report, Role};
use crate::quantity::percent;
use crate::train::guard::Reaction;
use crate::train::metrics::GuardMetrics;

/// The sections that the measures of the arms are enough for.
pub(super) fn sections(page: &mut String, report: &Report) {
    let sure: Vec<&Arm> = report.arms.iter().filter(|arm| !arm.evaluation.by_entropy.is_empty()).collect();
    if !sure.is_empty() {
        page.push_str("<section>\n<h2>By the teacher's entropy</h2>\n<div class=\"grid\">\n");
        let charts = [
            ("KL to the teacher", "nats per token", (|bin| bin.kl_to_teacher) as fn(&EntropyBin) -> f64),
            ("Agreement with the teacher", "share of tokens", |bin| bin.agreement),
        ];
        for (title, unit, of) in charts {
            let mut chart = LineChart {
                from_zero: true,
                says_ends: false,
                ..LineChart::new(title, "teacher's entropy, nats", unit)
            };
            for arm in &sure {
                chart.series.push(series(arm, arm.evaluation.by_entropy.iter().map(|bin| (middle(bin), of(bin)))));
            }
            chart.note = "On held-out text. Low entropy: the teacher was sure of the next token.".to_string();
            let _ = writeln!(page, "<div class=\"card\">{}</div>", chart.figure());
        }
        page.push_str("</div>\n</section>\n");
    }
    let judged: Vec<&Arm> = report.arms.iter().filter(|arm| !arm.evaluation.by_confidence.is_empty()).collect();
    if judged.is_empty() {
        return;
    }
    page.push_str("<section>\n<h2>Calibration</h2>\n<div class=\"grid\">\n");
    let mut chart = LineChart {
        from_zero: true,
        says_ends: false,
        ..LineChart::new("Reliability", "probability of the likeliest token", "share that was right")
    };
    let even = vec![(0.0, 0.0), (1.0, 1.0)];
    chart.series.push(Series { name: "as it says".into(), color: Color::Grey, stroke: Stroke::Dashed, points: even });
    for arm in &judged {
        chart.series.push(series(arm, arm.evaluation.by_confidence.iter().map(|bin| (bin.confidence, bin.accuracy))));
    }
    let errors = judged.iter().filter_map(|arm| {
        let error = calibration_error(&arm.evaluation.by_confidence)?;
        Some(format!("{} {}", arm.role.name(), percent(error)))
    });
    chart.note = format!(
        "Below the dashed line a model is surer than it is right. Expected calibration error: {}.",
        errors.collect::<Vec<_>>().join(", ")
    );
    let _ = writeln!(page, "<div class=\"card\">{}</div>", chart.figure());
    page.push_str("</div>\n</section>\n");
}

fn series(arm: &Arm, points: impl Iterator<Item = (f64, f64)>) -> Series {
    let stroke = if arm.role == Role::Control { Stroke::Dashed } else { Stroke::Solid };
    Series { name: arm.role.name().into(), color: color(arm.role), stroke, points: points.collect() }
}

/// Where a bin is drawn; the last has no end, and is as wide as the one before it.
fn middle(bin: &EntropyBin) -> f64 {
    bin.to.map_or(bin.from + 1.0, |to| (bin.from + to) / 2.0)
}

/// Steps that a guard held back, when there are any.
pub(super) fn held_back(page: &mut String, report: &Report) {
    const MOST: usize = 50;
    let lines: Vec<&GuardMetrics> = report.curves.iter().flat_map(|curves| &curves.held_back).collect();
    if lines.is_empty() {
        return;
    }
    page.push_str("<section>\n<h2>Steps held back</h2>\n<div class=\"card scroll\"><table>\n");
    page.push_str("<thead><tr><th>step</th><th>arm</th><th>why</th><th>what was done</th></tr></thead>\n<tbody>\n");
    for line in lines.iter().take(MOST) {
        let done = match (line.reaction, line.back_to) {
            (Reaction::Rewind, Some(step)) => format!("went back to step {step}, and on with other sequences"),
            (Reaction::Skip, _) => "skipped".to_string(),
            _ => "the run ended".to_string(),
        };
        let (arm, reason) = (escape(&line.arm), escape(&line.reason));
        let _ = writeln!(page, "<tr><th>{}</th><td>{arm}</td><td>{reason}</td><td>{done}</td></tr>", line.step);
    }
    page.push_str("</tbody></table></div>\n");
    if lines.len() > MOST {
        let _ = writeln!(page, "<p class=\"aside\">And {} more in metrics.jsonl.</p>", lines.len() - MOST);
    }
    page.push_str("</section>\n");
}
