//! Estimates as text and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use super::hardware::Hardware;
use super::modes::Estimate;
use super::work::{TeacherWork, WeightType};
use crate::quantity::{clock, short_bytes, short_count, thousands};

/// What is to be run, on one kind of hardware, and what became of it.
#[derive(Debug, Clone)]
pub struct Forecast<'a> {
    pub hardware: &'a Hardware,
    /// As [`super::estimates`] gives them.
    pub estimates: &'a [Estimate],
    pub tokens: f64,
}

/// The teacher in two lines: its parts, and what a token takes.
pub fn teacher_text(name: &str, work: &TeacherWork, weights: WeightType) -> String {
    let count = |number: f64| short_count(number as u64);
    let active = work.dense + work.chosen_experts + work.head_product;
    format!(
        "teacher     {name}: {} parameters ({} in experts, {} that every token passes, {} in embedding and head), {} in \
         {}\n            one token multiplies {} of them: {:.4} TFLOP, and {:.4} in attention\n",
        count(work.total()),
        count(work.experts),
        count(work.dense),
        count(work.embedding + work.head),
        short_bytes((work.total() * weights.bytes()) as u64),
        weights.name(),
        count(active),
        work.product_flops / 1e12,
        work.attention_flops / 1e12,
    )
}

/// Seconds, or years where a clock is of no use.
fn span(seconds: f64) -> String {
    const YEAR: f64 = 365.25 * 86_400.0;
    if seconds > YEAR { format!("{:.1} years", seconds / YEAR) } else { clock(seconds) }
}

impl Forecast<'_> {
    /// The hardware, a table of the ways to run, and why some of them do not fit.
    pub fn text(&self) -> String {
        let hardware = self.hardware;
        let mut text = format!(
            "\n{}: {} device{} of {}, products at {:.0}% of {} TFLOP/s, disk {}/s\n",
            hardware.name,
            hardware.device_count(),
            if hardware.device_count() == 1 { "" } else { "s" },
            short_bytes(hardware.device_memory),
            100.0 * hardware.efficiency,
            hardware.matmul_flops / 1e12,
            short_bytes(hardware.disk_bandwidth as u64),
        );
        let head = ["way", "a device holds", "tokens at once", "tokens/s", "time", "device-hours", "bound by"];
        let mut rows = vec![head.map(String::from)];
        for estimate in self.estimates.iter().filter(|estimate| estimate.fits()) {
            let hours = estimate.device_hours(hardware, self.tokens);
            let cost = hardware.price.map(|price| format!(", costs {}", thousands((price * hours).round() as u64)));
            rows.push([
                estimate.mode.name(),
                short_bytes(estimate.bytes() as u64),
                short_count(estimate.tokens_at_once as u64),
                thousands(estimate.rate.round() as u64),
                span(self.tokens / estimate.rate),
                format!("{}{}", thousands(hours.ceil() as u64), cost.unwrap_or_default()),
                estimate.bottleneck.to_string(),
            ]);
        }
        let widths: Vec<usize> =
            (0..head.len()).map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0)).collect();
        for row in rows.iter().filter(|_| rows.len() > 1) {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            writeln!(text, "  {}", cells.join("  ").trim_end()).expect("writing to a string");
        }
        if let Some(best) = self.estimates.iter().find(|estimate| estimate.fits()) {
            let parts: Vec<String> =
                best.memory.iter().map(|(name, bytes)| format!("{name} {}", short_bytes(*bytes as u64))).collect();
            let times: Vec<String> =
                best.times.iter().map(|(name, seconds)| format!("{name} {seconds:.2} s")).collect();
            let at_once = short_count(best.tokens_at_once as u64);
            writeln!(
                text,
                "  {} holds {}; {at_once} tokens take {}",
                best.mode.name(),
                parts.join(", "),
                times.join(", ")
            )
            .expect("writing to a string");
        }
        for estimate in self.estimates {
            if let Some(obstacle) = &estimate.obstacle {
                writeln!(text, "  {}: {obstacle}", estimate.mode.name()).expect("writing to a string");
            }
        }
        text
    }

    /// The same as JSON.
    pub fn json(&self) -> Value {
        let parts = |parts: &[(&str, f64)]| -> Value {
            parts.iter().map(|(name, value)| (name.to_string(), json!(value))).collect::<serde_json::Map<_, _>>().into()
        };
        let estimates: Vec<Value> = self
            .estimates
            .iter()
            .map(|estimate| {
                json!({
                    "mode": estimate.mode.name(),
                    "obstacle": estimate.obstacle,
                    "memory_bytes": parts(&estimate.memory),
                    "tokens_at_once": estimate.tokens_at_once,
                    "seconds_by_part": parts(&estimate.times),
                    "seconds": estimate.seconds,
                    "tokens_per_second": estimate.rate,
                    "device_hours": estimate.fits().then(|| estimate.device_hours(self.hardware, self.tokens)),
                    "bound_by": estimate.bottleneck,
                })
            })
            .collect();
        json!({ "hardware": self.hardware, "tokens": self.tokens, "ways": estimates })
    }
}
