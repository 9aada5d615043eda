//! Several runs beside each other: a table, the same as comma-separated values, and a page with their curves in the same charts.
//!
//! Reads what the runs left, and measures nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use crate::durable;
use crate::error::{Error, Result};
use crate::eval::chart::{Color, LineChart, Series, Stroke, escape, smoothed};
use crate::eval::page::{END, beginning};
use crate::eval::report::{Arm, Curves, Report, Role};
use crate::eval::text_table;
use crate::quantity::{NONE, decimal, percent, short_count, thousands};
use crate::train::metrics::{Metric, read_metrics};

/// One run: what it is called, its report if it has one, and what it logged.
#[derive(Debug, Clone)]
pub struct ComparedRun {
    pub name: String,
    /// Each key of its recipe, defaults included, with its value.
    pub recipe: BTreeMap<String, String>,
    pub report: Option<Report>,
    pub student: Curves,
}

impl ComparedRun {
    /// Reads a run directory, one that is still training as well.
    ///
    /// # Errors
    /// [`Error::File`] when there is neither a report nor a record in it.
    pub fn read(dir: &Path) -> Result<ComparedRun> {
        let (report, metrics) = (dir.join("report.json"), dir.join("metrics.jsonl"));
        let report = report.is_file().then(|| Report::read(report)).transpose()?;
        if report.is_none() && !metrics.is_file() {
            let tip = "name run directories, as `limbeck distill` makes them";
            return Err(Error::file(dir, "has neither report.json nor metrics.jsonl", tip));
        }
        let lines: Vec<Metric> = if metrics.is_file() { read_metrics(metrics)? } else { vec![] };
        let name = dir.file_name().or(dir.parent().and_then(Path::file_name)).unwrap_or(dir.as_os_str());
        let name = name.to_string_lossy().into_owned();
        let recipe = dir.join("recipe.toml");
        let recipe = if recipe.is_file() { read_recipe(&recipe)? } else { BTreeMap::new() };
        Ok(ComparedRun { name, recipe, report, student: Curves::from_metrics(Role::Student, &lines) })
    }

    fn arms(&self) -> &[Arm] {
        self.report.as_ref().map_or(&[], |report| &report.arms)
    }

    /// The last held-out cross-entropy that was logged in training.
    fn last_held_out(&self) -> Option<(u64, f64)> {
        self.student.held_out.last().copied()
    }
}

fn read_recipe(path: &Path) -> Result<BTreeMap<String, String>> {
    fn flatten(prefix: &str, table: &toml::Table, into: &mut BTreeMap<String, String>) {
        for (key, value) in table {
            let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            match value {
                toml::Value::Table(table) => flatten(&key, table, into),
                toml::Value::String(text) => drop(into.insert(key, text.clone())),
                value => drop(into.insert(key, value.to_string())),
            }
        }
    }
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let table: toml::Table = toml::from_str(&text)
        .map_err(|error| Error::file(path, format!("is no recipe: {}", error.message()), "restore it, or remove it"))?;
    let mut keys = BTreeMap::new();
    flatten("", &table, &mut keys);
    Ok(keys)
}

/// The keys in which the runs' recipes differ, each with its values, after a row of titles; nothing when none does. What a
/// run is called and where it lies is no difference.
fn differences(runs: &[ComparedRun]) -> Vec<Vec<String>> {
    let known: Vec<(&ComparedRun, String)> =
        runs.iter().zip(distinct(runs)).filter(|(run, _)| !run.recipe.is_empty()).collect();
    let keys: BTreeSet<&String> = known.iter().flat_map(|(run, _)| run.recipe.keys()).collect();
    let titles = std::iter::once("recipe".to_string()).chain(known.iter().map(|(_, name)| name.clone()));
    let mut rows = vec![titles.collect::<Vec<_>>()];
    for key in keys.into_iter().filter(|key| *key != "name" && *key != "run.dir") {
        let values: Vec<Option<&String>> = known.iter().map(|(run, _)| run.recipe.get(key)).collect();
        if values.iter().any(|value| *value != values[0]) {
            let shown = values.iter().map(|value| value.map_or(NONE.to_string(), Clone::clone));
            rows.push(std::iter::once(key.clone()).chain(shown).collect());
        }
    }
    if rows.len() > 1 { rows } else { vec![] }
}

/// Gives each run a name that no other has.
fn distinct(runs: &[ComparedRun]) -> Vec<String> {
    let name = |(number, run): (usize, &ComparedRun)| {
        let is_alone = runs.iter().filter(|other| other.name == run.name).count() == 1;
        if is_alone { run.name.clone() } else { format!("{} ({})", run.name, number + 1) }
    };
    runs.iter().enumerate().map(name).collect()
}

/// What each arm of each run came to; a run without a report has what it logged last.
fn rows(runs: &[ComparedRun]) -> Vec<[String; 9]> {
    let mut rows = vec![];
    for (run, name) in runs.iter().zip(distinct(runs)) {
        let optional = |value: Option<f64>, places| value.map_or(NONE.to_string(), |value| decimal(value, places));
        for arm in run.arms().iter().filter(|arm| arm.role != Role::Teacher) {
            let measured = &arm.evaluation;
            rows.push([
                name.clone(),
                arm.role.name().into(),
                decimal(measured.cross_entropy, 4),
                decimal(measured.perplexity, 2),
                optional(measured.kl_to_teacher, 4),
                measured.top1_agreement.map_or(NONE.to_string(), percent),
                arm.best.as_ref().map_or(NONE.to_string(), |best| best.step.to_string()),
                arm.tokens_seen.map_or(NONE.to_string(), short_count),
                arm.tokens_per_second.map_or(NONE.to_string(), |rate| thousands(rate.round() as u64)),
            ]);
        }
        if run.arms().is_empty() {
            let last = run.last_held_out();
            let state = last.map_or("no report".to_string(), |(step, _)| format!("at step {step}"));
            let value = |show: &dyn Fn(f64) -> String| last.map_or(NONE.to_string(), |(_, value)| show(value));
            let none = || NONE.to_string();
            let cross_entropy = value(&|value| decimal(value, 4));
            let perplexity = value(&|value| decimal(value.exp(), 2));
            rows.push([name, state, cross_entropy, perplexity, none(), none(), none(), none(), none()]);
        }
    }
    rows
}

const TITLES: [&str; 9] =
    ["run", "arm", "cross-entropy", "perplexity", "KL to teacher", "top-1", "best step", "tokens", "tokens/s"];

/// The table for a terminal, and one of what differs in the recipes, in lines of at most `width` characters: an arm below the other where columns do not fit.
pub fn table(runs: &[ComparedRun], width: Option<usize>) -> String {
    let titles = std::iter::once(TITLES.map(str::to_string));
    let rows: Vec<Vec<String>> = titles.chain(rows(runs)).map(Vec::from).collect();
    let mut text = text_table::table(&rows, 2, &[0, 1], width);
    let differences = differences(runs);
    if !differences.is_empty() {
        let all: Vec<usize> = (0..differences[0].len()).collect();
        text.push('\n');
        text.push_str(&text_table::table(&differences, 1, &all, width));
    }
    text
}

/// The measures of all arms as comma-separated values, in full precision; empty where there is none.
pub fn csv(runs: &[ComparedRun]) -> String {
    let mut text = String::from(
        "run,arm,cross_entropy,perplexity,bits_per_byte,kl_to_teacher,top1_agreement,held_out_tokens,best_step,\
         training_tokens,tokens_per_second\n",
    );
    let optional = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
    for (run, name) in runs.iter().zip(distinct(runs)) {
        let name = if name.contains([',', '"']) { format!("\"{}\"", name.replace('"', "\"\"")) } else { name };
        for arm in run.arms() {
            let measured = &arm.evaluation;
            let _ = writeln!(
                text,
                "{name},{},{},{},{},{},{},{},{},{},{}",
                arm.role.name(),
                measured.cross_entropy,
                measured.perplexity,
                measured.bits_per_byte,
                optional(measured.kl_to_teacher),
                optional(measured.top1_agreement),
                measured.token_count,
                arm.best.as_ref().map_or(String::new(), |best| best.step.to_string()),
                arm.tokens_seen.map_or(String::new(), |tokens| tokens.to_string()),
                optional(arm.tokens_per_second),
            );
        }
    }
    text
}

/// The page: the table, and the students' curves over each other.
pub fn html(runs: &[ComparedRun]) -> String {
    let mut page = beginning(&format!("{} runs", runs.len()), "limbeck comparison");
    let version = env!("CARGO_PKG_VERSION");
    let _ = writeln!(page, "<header>\n<p class=\"kicker\">limbeck {version} · comparison</p>");
    let names = distinct(runs);
    let _ = writeln!(page, "<h1>{}</h1>\n</header>", escape(&names.join(" · ")));
    page.push_str("<section>\n<h2>Held-out text</h2>\n<div class=\"card scroll\"><table>\n<thead><tr>");
    for title in TITLES {
        let _ = write!(page, "<th>{title}</th>");
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for row in rows(runs) {
        let _ = write!(page, "<tr><th>{}</th>", escape(&row[0]));
        for cell in &row[1..] {
            let _ = write!(page, "<td>{}</td>", escape(cell));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table></div>\n</section>\n");
    let differences = differences(runs);
    if let Some((titles, rows)) = differences.split_first() {
        let cells = |tag: &str, cells: &[String]| -> String {
            cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect()
        };
        page.push_str("<section>\n<h2>What differs</h2>\n<div class=\"card scroll\"><table class=\"text\">\n");
        let _ = writeln!(page, "<thead><tr>{}</tr></thead>\n<tbody>", cells("th", titles));
        for row in rows {
            let _ = writeln!(page, "<tr>{}{}</tr>", cells("th", &row[..1]), cells("td", &row[1..]));
        }
        page.push_str("</tbody></table></div>\n</section>\n");
    }
    page.push_str("<section>\n<h2>Students in training</h2>\n<div class=\"grid\">\n");
    type Of = fn(&Curves) -> &Vec<(u64, f64)>;
    let charts: [(&str, &str, Of); 8] = [
        ("Held-out cross-entropy", "nats per token", |curves| &curves.held_out),
        ("Cross-entropy of the training labels", "nats per token", |curves| &curves.hard_loss),
        ("Divergence from the teacher in training", "nats per token", |curves| &curves.soft_loss),
        ("Weight of the soft target", "weight", |curves| &curves.soft_weight),
        ("Gradient norm", "norm before clipping", |curves| &curves.grad_norm),
        ("Load of the busiest expert", "times the even share", |curves| &curves.imbalance),
        ("Routers against the teacher's", "KL in nats per token", |curves| &curves.router_kl),
        ("Throughput", "tokens per second", |curves| &curves.tokens_per_second),
    ];
    const COLORS: [Color; 5] = [Color::Blue, Color::Orange, Color::Green, Color::Purple, Color::Grey];
    for (title, unit, of) in charts {
        let mut chart = LineChart { settle: true, log_when_wide: true, ..LineChart::new(title, "step", unit) };
        for (number, (run, name)) in runs.iter().zip(&names).enumerate() {
            let points: Vec<(f64, f64)> = of(&run.student).iter().map(|&(step, value)| (step as f64, value)).collect();
            if points.is_empty() {
                continue;
            }
            // Colours come again, dashed.
            let stroke = if (number / COLORS.len()).is_multiple_of(2) { Stroke::Solid } else { Stroke::Dashed };
            let points = if points.len() > 40 { smoothed(&points) } else { points };
            chart.series.push(Series { name: name.clone(), color: COLORS[number % COLORS.len()], stroke, points });
        }
        if !chart.series.is_empty() {
            let _ = writeln!(page, "<div class=\"card\">{}</div>", chart.figure());
        }
    }
    page.push_str("</div>\n</section>\n");
    page.push_str(END);
    page
}

/// Writes a page or a table whole.
///
/// # Errors
/// [`Error::Io`].
pub fn write(path: &Path, text: &str) -> Result<()> {
    durable::write_bytes(path, text.as_bytes())
}
