//! The report as one HTML page, readable on a wide screen, a phone and paper, in light and dark.
//!
//! Well-formed as XML too, so that any tool can take it apart. Everything that comes from outside is escaped.

use std::fmt::Write as _;

use crate::eval::calibration::calibration_error;
use crate::eval::chart::{self, Color, HeatMap, HistogramChart, Level, LineChart, Series, Stroke, escape, smoothed};
use crate::eval::judgement;
use crate::eval::report::{Arm, CacheFacts, Curves, Fact, Histogram, Report, Role, Winner};
use crate::quantity::{NONE, clock, decimal, percent, short_bytes, short_count, thousands};

const STYLE: &str = include_str!("page.css");

const NATS: &str = "nats per token";

pub(super) fn html(report: &Report) -> String {
    let mut page = beginning(&report.run_name, "limbeck report");
    header(&mut page, report);
    comparison(&mut page, report);
    training(&mut page, report);
    judgement::held_back(&mut page, report);
    judgement::sections(&mut page, report);
    expert_load(&mut page, report);
    cache(&mut page, report);
    origin(&mut page, report);
    page.push_str(END);
    page
}

/// What every page begins with: `title` and what kind of page it is, the style, and the open body.
pub(super) fn beginning(title: &str, kind: &str) -> String {
    let mut page = String::from("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n");
    page.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n");
    let _ = writeln!(page, "<title>{} · {kind}</title>", escape(title));
    let _ = writeln!(page, "<style>\n{}{STYLE}</style>\n</head>\n<body>\n<main>", chart::STYLE);
    page
}

/// What every page ends with.
pub(super) const END: &str = "</main>\n</body>\n</html>\n";

fn header(page: &mut String, report: &Report) {
    let headline = report.headline();
    let version = escape(&report.program_version);
    let _ = writeln!(page, "<header>\n<p class=\"kicker\">limbeck {version} · distillation report</p>");
    let _ = writeln!(page, "<h1>{}</h1>", escape(&report.run_name));
    let verdict = match headline.winner {
        Winner::Student => "good",
        Winner::Control => "bad",
        Winner::Neither | Winner::Unknown => "open",
    };
    let _ = writeln!(page, "<p class=\"result {verdict}\">{}</p>", escape(&headline.sentence));
    for note in &headline.notes {
        let _ = writeln!(page, "<p class=\"aside\">{}</p>", escape(note));
    }
    page.push_str("<div class=\"tiles\">\n");
    let mut tile = |class: &str, name: &str, number: String, unit: &str| {
        let _ = writeln!(
            page,
            "<div class=\"tile {class}\"><span>{}</span><b>{}</b><small>{}</small></div>",
            escape(name),
            escape(&number),
            escape(unit)
        );
    };
    if let Some(difference) = headline.difference {
        let sign = if difference > 0.0 { "+" } else { "" };
        let number = format!("{sign}{}", decimal(difference, 3));
        tile(verdict, "student − control", number, "nats per token, less is better");
    }
    for arm in &report.arms {
        let unit = format!("nats per token, perplexity {}", decimal(arm.evaluation.perplexity, 2));
        tile(color_class(arm.role), arm.role.name(), decimal(arm.evaluation.cross_entropy, 3), &unit);
    }
    page.push_str("</div>\n</header>\n");
}

/// Measures down, arms across: three columns fit a phone.
fn comparison(page: &mut String, report: &Report) {
    if report.arms.is_empty() {
        return;
    }
    page.push_str("<section>\n<h2>Comparison</h2>\n<div class=\"card scroll\"><table>\n<thead><tr><th></th>");
    for arm in &report.arms {
        let (color, role) = (color_class(arm.role), arm.role.name());
        let _ = write!(
            page,
            "<th class=\"{color}\">{role}<small>{}</small></th>",
            escape(&arm.name).replace('_', "_<wbr/>")
        );
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    let optional = |value: Option<f64>, show: &dyn Fn(f64) -> String| value.map_or(NONE.to_string(), show);
    type Cell<'a> = &'a dyn Fn(&Arm) -> String;
    type Measure<'a> = &'a dyn Fn(&Arm) -> Option<f64>;
    let four = |value: f64| decimal(value, 4);
    // The measure ranks student against control; less is better.
    let rows: [(&str, &str, Cell, Option<Measure>); 13] = [
        (
            "cross-entropy",
            NATS,
            &|arm| four(arm.evaluation.cross_entropy),
            Some(&|arm| Some(arm.evaluation.cross_entropy)),
        ),
        ("perplexity", "", &|arm| decimal(arm.evaluation.perplexity, 2), Some(&|arm| Some(arm.evaluation.perplexity))),
        (
            "bits per byte",
            "",
            &|arm| four(arm.evaluation.bits_per_byte),
            Some(&|arm| Some(arm.evaluation.bits_per_byte)),
        ),
        (
            "KL to teacher",
            NATS,
            &|arm| optional(arm.evaluation.kl_to_teacher, &four),
            Some(&|arm| arm.evaluation.kl_to_teacher),
        ),
        (
            "top-1 agreement",
            "with the teacher",
            &|arm| optional(arm.evaluation.top1_agreement, &percent),
            Some(&|arm| arm.evaluation.top1_agreement.map(|share| -share)),
        ),
        (
            "calibration error",
            "of the likeliest token",
            &|arm| optional(calibration_error(&arm.evaluation.by_confidence), &percent),
            Some(&|arm| calibration_error(&arm.evaluation.by_confidence)),
        ),
        (
            "best checkpoint",
            "by held-out cross-entropy in training",
            &|arm| {
                arm.best
                    .as_ref()
                    .map_or(NONE.into(), |best| format!("step {} ({})", best.step, four(best.cross_entropy)))
            },
            None,
        ),
        ("held-out tokens", "", &|arm| thousands(arm.evaluation.token_count), None),
        ("parameters", "total", &|arm| short_count(arm.parameters_total), None),
        ("parameters", "active per token", &|arm| short_count(arm.parameters_active), None),
        ("training tokens", "", &|arm| arm.tokens_seen.map_or(NONE.to_string(), thousands), None),
        ("training time", "", &|arm| optional(arm.train_seconds, &clock), None),
        (
            "throughput",
            "tokens/s",
            &|arm| optional(arm.tokens_per_second, &|rate| thousands(rate.round() as u64)),
            None,
        ),
    ];
    let (student, control) = (report.arm(Role::Student), report.arm(Role::Control));
    for (name, unit, cell, measure) in rows {
        let _ = write!(page, "<tr><th>{name}<small>{unit}</small></th>");
        let best = measure.and_then(|measure| {
            let (student, control) = (student.and_then(measure)?, control.and_then(measure)?);
            (student != control).then_some(if student < control { Role::Student } else { Role::Control })
        });
        for arm in &report.arms {
            let text = escape(&cell(arm));
            let text = if best == Some(arm.role) { format!("<b>{text}</b>") } else { text };
            let _ = write!(page, "<td>{text}</td>");
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table></div>\n");
    if student.is_some() && control.is_some() {
        page.push_str(
            "<p class=\"aside\">Bold: the better of student and control. The control is the same model with the same \
             start, data, order and steps, trained on the labels alone.</p>\n",
        );
    }
    page.push_str("</section>\n");
}

fn training(page: &mut String, report: &Report) {
    if report.curves.is_empty() {
        return;
    }
    page.push_str("<section>\n<h2>Training</h2>\n<div class=\"grid\">\n");

    let mut held_out = line_chart(report, "Held-out cross-entropy", NATS, |curves| &curves.held_out);
    held_out.settle = true;
    held_out.note =
        "While training, on `train.evaluate_tokens` of the held-out text; the table is on all of it.".into();
    for curves in report.curves.iter().filter(|curves| !curves.averaged.is_empty()) {
        let name = format!("{}, averaged", curves.role.name());
        let stroke = if curves.role == Role::Control { Stroke::Dashed } else { Stroke::Solid };
        let color = color(Role::Averaged);
        held_out.series.push(Series { name, color, stroke, points: points(&curves.averaged) });
    }
    if let Some(teacher) = report.arm(Role::Teacher) {
        let value = teacher.evaluation.cross_entropy;
        held_out.levels.push(Level { name: "teacher".to_string(), color: color(Role::Teacher), value });
    }

    let mut labels = smooth_chart(report, "Cross-entropy of the training labels", NATS, |curves| &curves.hard_loss);
    (labels.settle, labels.log_when_wide) = (true, true);
    labels.note = "Comparable between student and control. Smoothed; single steps are faint.".to_string();

    let mut loss = smooth_chart(report, "Training loss", NATS, |curves| &curves.loss);
    (loss.settle, loss.log_when_wide) = (true, true);
    loss.note = "What each arm minimises. The student's mixes the divergence from the teacher with the labels, so the \
                 two lines are not comparable."
        .to_string();

    let student = report.curves.iter().find(|curves| curves.role == Role::Student);
    let pair = |soft: &[(u64, f64)], hard: &[(u64, f64)]| {
        [("soft", Color::Blue, Stroke::Solid, soft), ("hard", Color::Purple, Stroke::Dashed, hard)]
            .map(|(name, color, stroke, values)| Series { name: name.into(), color, stroke, points: points(values) })
    };
    let mut weights = LineChart { from_zero: true, ..LineChart::new("Loss weights of the student", "step", "weight") };
    let mut pulls = LineChart::new("Pull of the student's targets", "step", "gradient norm in a token's logits");
    pulls.note = "Of each loss alone, before its weight.".to_string();
    if let Some(student) = student {
        weights.series.extend(pair(&student.soft_weight, &student.hard_weight));
        if !student.soft_gradient_norm.is_empty() {
            pulls.series.extend(pair(&student.soft_gradient_norm, &student.hard_gradient_norm));
        }
    }

    let mut rate = line_chart(report, "Learning rate", "learning rate", |curves| &curves.learning_rate);
    rate.from_zero = true;
    let mut norm = smooth_chart(report, "Gradient norm", "norm before clipping", |curves| &curves.grad_norm);
    (norm.settle, norm.log_when_wide) = (true, true);
    let mut speed = smooth_chart(report, "Throughput", "tokens per second", |curves| &curves.tokens_per_second);
    speed.from_zero = true;

    let mut charts = vec![held_out, labels, loss, weights, rate, norm, speed];
    if report.curves.iter().any(|curves| !curves.imbalance.is_empty()) {
        let mut load =
            smooth_chart(report, "Load of the busiest expert", "times the even share", |curves| &curves.imbalance);
        load.note = "In a step, the mean of the layers with experts; 1 is even.".to_string();
        charts.push(load);
    }
    let mut routers =
        smooth_chart(report, "Routers against the teacher's", "KL in nats per token", |curves| &curves.router_kl);
    routers.series.retain(|series| !series.points.is_empty());
    if !routers.series.is_empty() {
        routers.settle = true;
        charts.push(routers);
    }
    let mut soft = smooth_chart(report, "Divergence from the teacher in training", NATS, |curves| &curves.soft_loss);
    if soft.series.iter().any(|series| !series.points.is_empty()) {
        soft.series.retain(|series| !series.points.is_empty());
        soft.settle = true;
        charts.insert(3, soft);
    }
    if !pulls.series.is_empty() {
        let place =
            charts.iter().position(|chart| chart.title.starts_with("Loss weights")).map_or(0, |place| place + 1);
        charts.insert(place, pulls);
    }
    for chart in charts {
        let _ = writeln!(page, "<div class=\"card\">{}</div>", chart.figure());
    }
    page.push_str("</div>\n</section>\n");
}

fn expert_load(page: &mut String, report: &Report) {
    let routed: Vec<&Arm> = report.arms.iter().filter(|arm| !arm.evaluation.expert_load.is_empty()).collect();
    if routed.is_empty() {
        return;
    }
    page.push_str(
        "<section>\n<h2>Expert load</h2>\n<p class=\"aside\">Share of the held-out tokens that each expert \
                   received, in percent, against an even share of its layer.</p>\n<div class=\"grid\">\n",
    );
    for arm in routed {
        let map = HeatMap {
            title: arm.role.name().to_string(),
            row_label: "mixture-of-experts layer".to_string(),
            column_label: "expert".to_string(),
            values: arm.evaluation.expert_load.clone(),
            note: String::new(),
        };
        let _ = writeln!(page, "<div class=\"card\">{}</div>", map.figure());
    }
    page.push_str("</div>\n</section>\n");
}

fn cache(page: &mut String, report: &Report) {
    if report.cache.is_none() && report.histograms.is_empty() {
        return;
    }
    page.push_str("<section>\n<h2>Soft targets</h2>\n<div class=\"grid\">\n");
    if let Some(cache) = &report.cache {
        facts(page, &cache_facts(cache));
    }
    histogram_cards(page, &report.histograms);
    page.push_str("</div>\n</section>\n");
}

/// A card with a picture for each histogram.
pub(super) fn histogram_cards(page: &mut String, histograms: &[Histogram]) {
    for histogram in histograms {
        let chart = HistogramChart {
            title: &histogram.title,
            x_label: &histogram.x_label,
            edges: &histogram.edges,
            counts: &histogram.counts,
            note: "",
        };
        let _ = writeln!(page, "<div class=\"card\">{}</div>", chart.figure());
    }
}

fn cache_facts(cache: &CacheFacts) -> Vec<Fact> {
    let mut facts = vec![
        Fact::new("rows", thousands(cache.row_count)),
        Fact::new("size", short_bytes(cache.byte_count)),
        Fact::new("bytes per token", decimal(cache.bytes_per_token, 1)),
        Fact::new("kept ids per row", decimal(cache.kept_per_row, 1)),
        Fact::new("mean tail mass", short_share(cache.tail_mass)),
    ];
    if let Some(vocabulary_size) = cache.vocabulary_size {
        // Whole rows would be stored in two bytes a logit.
        let whole = 2.0 * vocabulary_size as f64;
        let times = decimal(whole / cache.bytes_per_token, 1);
        facts.push(Fact::new("vocabulary", thousands(vocabulary_size)));
        facts.push(Fact::new("smaller than whole 16-bit rows", format!("{times} times")));
    }
    facts.extend(cache.more.iter().cloned());
    facts
}

/// Tail masses may be far below a tenth of a percent.
fn short_share(share: f64) -> String {
    if share > 0.0 && share < 1e-3 { format!("{share:.1e}").replace('-', "−") } else { percent(share) }
}

fn origin(page: &mut String, report: &Report) {
    page.push_str("<section>\n<h2>Origin</h2>\n<div class=\"grid\">\n");
    if !report.plan.is_empty() {
        facts(page, &report.plan);
    }
    page.push_str("<div class=\"card\"><h3>How to reproduce</h3>\n");
    let _ = writeln!(page, "<p>With limbeck {} and the recipe below:</p>", escape(&report.program_version));
    let commands =
        if report.commands.is_empty() { "limbeck distill recipe.toml".to_string() } else { report.commands.join("\n") };
    let _ = writeln!(page, "<pre>{}</pre>", escape(&commands));
    page.push_str(
        "<p class=\"note\">All numbers of this page are in <code>report.json</code> beside it.</p></div>\n</div>\n",
    );
    if !report.recipe.is_empty() {
        let recipe = escape(&report.recipe);
        let _ = writeln!(
            page,
            "<details class=\"card\"><summary>The frozen recipe</summary>\n<pre>{recipe}</pre></details>"
        );
    }
    page.push_str("</section>\n");
}

pub(super) fn facts(page: &mut String, facts: &[Fact]) {
    page.push_str("<dl class=\"card\">\n");
    for fact in facts {
        let _ = writeln!(page, "<div><dt>{}</dt><dd>{}</dd></div>", escape(&fact.name), escape(&fact.value));
    }
    page.push_str("</dl>\n");
}

fn line_chart(report: &Report, title: &str, unit: &str, of: impl Fn(&Curves) -> &Vec<(u64, f64)>) -> LineChart {
    let mut chart = LineChart::new(title, "step", unit);
    for curves in &report.curves {
        let stroke = if curves.role == Role::Control { Stroke::Dashed } else { Stroke::Solid };
        let (name, color) = (curves.role.name().to_string(), color(curves.role));
        chart.series.push(Series { name, color, stroke, points: points(of(curves)) });
    }
    chart
}

/// As [`line_chart`], with the raw values behind a smoothed line when there are enough of them to be noise.
fn smooth_chart(report: &Report, title: &str, unit: &str, of: impl Fn(&Curves) -> &Vec<(u64, f64)>) -> LineChart {
    let mut chart = line_chart(report, title, unit, of);
    for index in 0..chart.series.len() {
        let series = &mut chart.series[index];
        if series.points.len() > 40 {
            let faint = Series { stroke: Stroke::Faint, ..series.clone() };
            series.points = smoothed(&series.points);
            series.stroke = Stroke::Solid;
            chart.series.push(faint);
        }
    }
    chart
}

fn points(curve: &[(u64, f64)]) -> Vec<(f64, f64)> {
    curve.iter().map(|&(step, value)| (step as f64, value)).collect()
}

pub(super) fn color(role: Role) -> Color {
    match role {
        Role::Student => Color::Blue,
        Role::Averaged => Color::Purple,
        Role::Control => Color::Orange,
        Role::Teacher => Color::Green,
    }
}

fn color_class(role: Role) -> &'static str {
    match role {
        Role::Student => "blue",
        Role::Averaged => "purple",
        Role::Control => "orange",
        Role::Teacher => "green",
    }
}
