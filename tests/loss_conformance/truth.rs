//! What the f64 oracle answers, and how far from it an answer may be.

use limbeck_kernels::oracle::{self, KeptRow};

use crate::subject::{Job, Outcome, RowLosses, Source, Student, capture_at, push_nothing, push_row};
use limbeck::targets::SparseTargets;

/// Nothing, or what is wrong.
pub type Finding = Result<(), String>;

/// How far values and gradients may be off.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Of a row's loss, relative to it.
    pub value: f64,
    /// Of a row's loss in nats: where it is a small difference of large terms, it has no more digits than they.
    pub absolute: f64,
    /// Of a gradient's entry, relative to the largest of its row.
    pub gradient: f64,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds { value: 1e-6, absolute: 2e-7, gradient: 1e-5 }
    }
}

/// The right answer to a job that has one, of the teacher or of stored targets.
pub fn truth(job: &Job) -> Outcome {
    let targets = match &job.source {
        Source::Teacher { logits, keep, temperatures } => kept(job, logits, keep, temperatures),
        Source::Stored { targets, .. } => targets.clone(),
        Source::Sampled { .. } | Source::Missing => panic!("there is no oracle for these"),
    };
    let temperature = job.settings.temperature;
    let capture = &targets.captures[capture_at(&targets, temperature).expect("the job is captured where it is used")];
    let logits = job.student.logits();
    let factor = job.settings.soft_factor();
    let (soft_weight, hard_weight) = (job.weights.soft as f64, job.weights.hard as f64);
    let (mut rows, mut loss, mut gradient) = (vec![], 0.0, vec![]);
    for (row, z) in logits.chunks(job.vocab).enumerate() {
        let (sequence, t) = job.place(row);
        if !sequence.is_valid(t) {
            rows.push(None);
            gradient.extend(vec![0.0; job.vocab]);
            continue;
        }
        let places = targets.offsets[row] as usize..targets.offsets[row + 1] as usize;
        let kept = KeptRow {
            ids: targets.ids[places.clone()].to_vec(),
            log_probs: capture.log_probs[places].iter().map(|&log_prob| log_prob as f64).collect(),
            log_tail: capture.log_tail[row] as f64,
            label_log_prob: 0.0,
        };
        let soft = oracle::divergence(job.settings.divergence, z, &kept, temperature as f64);
        let hard = oracle::hard_cross_entropy(z, sequence.tokens[t + 1]);
        loss += soft_weight * factor * soft.value + hard_weight * hard.value;
        let both = soft.logits_grad.iter().zip(&hard.logits_grad);
        gradient.extend(both.map(|(soft, hard)| soft_weight * factor * soft + hard_weight * hard));
        rows.push(Some(RowLosses { soft: soft.value, hard: hard.value }));
    }
    let token_count = rows.iter().flatten().count() as u64;
    let count = token_count as f64;
    gradient.iter_mut().for_each(|value| *value /= count);
    let gradients = match &job.student {
        Student::Logits(_) => vec![gradient],
        Student::Linear { hidden, lm_head, width, .. } => {
            let (mut hidden_grad, mut head_grad) = (vec![0.0; hidden.len()], vec![0.0; lm_head.len()]);
            for (place, g) in gradient.iter().enumerate() {
                let (row, v) = (place / job.vocab, place % job.vocab);
                for d in 0..*width {
                    hidden_grad[row * width + d] += g * lm_head[v * width + d] as f64;
                    head_grad[v * width + d] += g * hidden[row * width + d] as f64;
                }
            }
            vec![hidden_grad, head_grad]
        }
    };
    Outcome { targets, rows, token_count, loss: loss / count, gradients }
}

fn kept(job: &Job, logits: &[f32], keep: &[usize], temperatures: &[f32]) -> SparseTargets {
    let mut targets = SparseTargets::empty(temperatures);
    for (row, logits) in logits.chunks(job.vocab).enumerate() {
        let (sequence, t) = job.place(row);
        if !sequence.is_valid(t) {
            push_nothing(&mut targets);
            continue;
        }
        let at = |temperature: f32| oracle::top_k(logits, keep[row], sequence.tokens[t + 1], temperature as f64);
        let narrow = |kept: KeptRow| {
            let log_probs = kept.log_probs.iter().map(|&log_prob| log_prob as f32).collect();
            (log_probs, kept.log_tail as f32, kept.label_log_prob as f32)
        };
        let captures: Vec<_> = temperatures.iter().map(|&temperature| narrow(at(temperature))).collect();
        push_row(&mut targets, &at(temperatures[0]).ids, &captures);
    }
    targets
}

pub fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()))
}

/// Whether a number is where it has to be; NaN never is.
pub fn near(what: &str, found: f64, truth: f64, bound: f64) -> Finding {
    let fits = found == truth || (found - truth).abs() <= bound;
    if fits { Ok(()) } else { Err(format!("{what} is {found:e} instead of {truth:e}")) }
}

pub fn must(holds: bool, otherwise: impl FnOnce() -> String) -> Finding {
    if holds { Ok(()) } else { Err(otherwise()) }
}

/// Row losses, count and mean.
pub fn same_values(found: &Outcome, truth: &Outcome, bounds: Bounds) -> Finding {
    near("the count", found.token_count as f64, truth.token_count as f64, 0.0)?;
    must(found.rows.len() == truth.rows.len(), || format!("{} rows", found.rows.len()))?;
    for (row, (found, truth)) in found.rows.iter().zip(&truth.rows).enumerate() {
        match (found, truth) {
            (Some(found), Some(truth)) => {
                let bound = |value: f64| bounds.value * value.abs() + bounds.absolute;
                near(&format!("row {row}'s soft loss"), found.soft, truth.soft, bound(truth.soft))?;
                near(&format!("row {row}'s hard loss"), found.hard, truth.hard, bound(truth.hard))?;
            }
            (None, None) => {}
            (found, truth) => return Err(format!("row {row} gives {found:?} instead of {truth:?}")),
        }
    }
    near("the mean", found.loss, truth.loss, bounds.value * truth.loss.abs() + bounds.absolute)
}

/// Every gradient, relative to the largest entry of its row (of itself, where a row is no row of logits).
pub fn same_gradients(found: &Outcome, truth: &Outcome, width: usize, bound: f64) -> Finding {
    must(found.gradients.len() == truth.gradients.len(), || "gradients differ in number".into())?;
    for (number, (found, truth)) in found.gradients.iter().zip(&truth.gradients).enumerate() {
        must(found.len() == truth.len(), || format!("gradient {number} has {} entries", found.len()))?;
        let all = largest(truth);
        for (row, (found, truth)) in found.chunks(width).zip(truth.chunks(width)).enumerate() {
            // Rows of next to no loss have gradients that cancel; they are held against the others as well.
            let bound = bound * largest(truth).max(0.01 * all);
            for (place, (&found, &truth)) in found.iter().zip(truth).enumerate() {
                near(&format!("gradient {number} of row {row} at {place}"), found, truth, bound + 1e-14)?;
            }
        }
    }
    Ok(())
}

pub fn same(found: &Outcome, truth: &Outcome, width: usize, bounds: Bounds) -> Finding {
    same_values(found, truth, bounds)?;
    same_gradients(found, truth, width, bounds.gradient)
}
