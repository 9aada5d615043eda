//! How well a cache holds what its teacher says: a live teacher on a sample of its sequences, row by row against it.
//!
//! Measures, and changes nothing. Logarithms are natural, sums are f64.

use std::path::Path;

use burn::tensor::Device;
use rayon::prelude::*;

use crate::cache::CacheReader;
use crate::checkpoint::CheckpointReader;
use crate::error::{Error, Result};
use crate::models::{Decoder, TokenLayout, parameter::CheckpointWeights};
use crate::targets::{DistillBatch, SparseTargets, TargetKind, TargetSource};

/// Rows of logits held at once.
const HEAD_ROWS: usize = 256;

/// How far a cache is from a live teacher.
#[derive(Debug, Clone, PartialEq)]
pub struct Fidelity {
    /// Whether the live teacher's fingerprint is the one that the cache names.
    pub same_teacher: bool,
    /// Numbers of the sequences compared, evenly spread over the cache.
    pub sequences: Vec<u64>,
    /// Valid rows of these sequences.
    pub rows: u64,
    /// One per temperature of the cache.
    pub captures: Vec<CaptureFidelity>,
    /// Mean KL of the teacher, run over the first of the sequences once more, from itself, over the same outcomes: what
    /// cannot be told from the teacher's own noise. 0 where it computes the same twice.
    pub control: f64,
}

/// One temperature. Live teacher and cache are compared on the ids that the cache keeps and one outcome for all others.
#[derive(Debug, Clone, PartialEq)]
pub struct CaptureFidelity {
    pub temperature: f32,
    /// Mean KL(live || cache) of a row, nats.
    pub kl: f64,
    /// Largest of a row, and where.
    pub worst_row: WorstRow,
    /// The sequence with the largest mean, and that mean.
    pub worst_sequence: (u64, f64),
    /// Largest error of a kept id's log-probability.
    pub log_prob_error: f64,
    /// Largest error of the probability outside the kept ids.
    pub tail_error: f64,
    /// Largest error of the label's log-probability, and the mean error without its sign taken away: a cache that only
    /// estimates labels shows here.
    pub label_error: f64,
    pub label_bias: f64,
    /// Share of the rows whose first kept id is as probable to the live teacher as any.
    pub top1_agreement: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WorstRow {
    pub sequence: u64,
    pub row: usize,
    pub kl: f64,
}

/// What one row came to.
#[derive(Debug, Clone, Copy, Default)]
struct RowFidelity {
    kl: f64,
    log_prob_error: f64,
    tail_error: f64,
    label_error: f64,
    agrees: bool,
}

/// The live teacher's row, seen through some kept ids.
struct LiveRow {
    log_probs: Vec<f64>,
    log_tail: f64,
    label_log_prob: f64,
    /// The largest log-probability of all.
    largest: f64,
}

impl LiveRow {
    fn new(logits: &[f32], temperature: f32, ids: &[u32], label: u32) -> LiveRow {
        let inverse = 1.0 / f64::from(temperature);
        let largest = logits.iter().fold(f32::NEG_INFINITY, |largest, &logit| largest.max(logit));
        let mut weights: Vec<f64> =
            logits.iter().map(|&logit| ((f64::from(logit) - f64::from(largest)) * inverse).exp()).collect();
        let log_sum = weights.iter().sum::<f64>().ln();
        let log_prob = |id: u32| (f64::from(logits[id as usize]) - f64::from(largest)) * inverse - log_sum;
        let log_probs = ids.iter().map(|&id| log_prob(id)).collect();
        // Summed over the others, never one minus the rest.
        ids.iter().for_each(|&id| weights[id as usize] = 0.0);
        let log_tail = weights.iter().sum::<f64>().ln() - log_sum;
        LiveRow { log_probs, log_tail, label_log_prob: log_prob(label), largest: -log_sum }
    }

    /// Against what is said of the same ids.
    fn compare(&self, log_probs: impl Iterator<Item = f64>, log_tail: f64, label_log_prob: f64) -> RowFidelity {
        let mut row = RowFidelity::default();
        for (place, (live, cached)) in self.log_probs.iter().zip(log_probs).enumerate() {
            row.kl += live.exp() * difference(*live, cached);
            row.log_prob_error = row.log_prob_error.max(difference(*live, cached).abs());
            row.agrees |= place == 0 && *live >= self.largest;
        }
        if self.log_tail > f64::NEG_INFINITY {
            row.kl += self.log_tail.exp() * (self.log_tail - log_tail);
        }
        row.tail_error = (self.log_tail.exp() - log_tail.exp()).abs();
        row.label_error = difference(label_log_prob, self.label_log_prob);
        row
    }
}

/// Of two logarithms; two impossible things do not differ.
fn difference(left: f64, right: f64) -> f64 {
    if left == right { 0.0 } else { left - right }
}

/// Runs the teacher in `checkpoint` over `sequence_count` sequences of the cache (all when it has fewer).
///
/// # Errors
/// [`Error::Usage`] for a cache without soft targets or a count of 0; [`Error::Mismatch`] when the teacher's vocabulary
/// is too small for the ids in the cache; [`Error::NotFinite`] when the teacher's predictions are not.
pub fn compare(cache: &CacheReader, checkpoint: &Path, device: &Device, sequence_count: u64) -> Result<Fidelity> {
    let settings = &cache.manifest().settings;
    let Some(soft_targets) = &settings.soft_targets else {
        let problem = format!("{} has no soft targets", cache.manifest().directory.display());
        return Err(Error::usage(problem, "compare a cache that a teacher made"));
    };
    if soft_targets.selection.kind() == TargetKind::Sampled {
        let problem = format!("{} holds drawn ids with weights", cache.manifest().directory.display());
        return Err(Error::usage(
            problem,
            "a divergence row by row says nothing of them; compare a cache of likeliest ids",
        ));
    }
    if sequence_count == 0 {
        return Err(Error::usage("0 sequences were asked for", "compare at least one"));
    }
    let reader = CheckpointReader::open(checkpoint)?;
    let same_teacher = reader.fingerprint()? == soft_targets.teacher.fingerprint;
    let config = crate::models::read_config(reader.config_path(), reader.config())?;
    config.check_seq_len(settings.seq_len)?;
    let model = Decoder::load_for_inference(config, &CheckpointWeights::new(&reader), device)?;

    let all = cache.sequence_count();
    let wanted = sequence_count.min(all);
    let sequences: Vec<u64> =
        (0..wanted).map(|place| (u128::from(place) * u128::from(all) / u128::from(wanted)) as u64).collect();
    let mut sums: Vec<Sums> = soft_targets.temperatures.iter().map(|&temperature| Sums::new(temperature)).collect();
    let (mut rows, mut control) = (0, 0.0);
    for (place, &number) in sequences.iter().enumerate() {
        let batch = cache.read(&[number])?;
        check_ids(cache, &batch, model.config.vocab_size)?;
        let found = sequence(&model, &batch)?;
        let count = found.len();
        rows += count as u64;
        for (index, sums) in sums.iter_mut().enumerate() {
            sums.add(number, found.iter().map(|(row, captures)| (*row, captures[index])));
        }
        if place == 0 {
            control = noise(&model, &batch)?;
        }
    }
    if rows == 0 {
        let problem = format!("the sequences {sequences:?} have no prediction to compare");
        return Err(Error::usage(problem, "compare more sequences"));
    }
    let captures = sums.into_iter().map(|sums| sums.finish(rows)).collect();
    Ok(Fidelity { same_teacher, sequences, rows, captures, control })
}

fn check_ids(cache: &CacheReader, batch: &DistillBatch, vocab: usize) -> Result<()> {
    let tokens = batch.sequences.iter().flat_map(|sequence| &sequence.tokens);
    let kept = batch.targets.iter().flat_map(|targets| &targets.ids);
    let Some(id) = tokens.chain(kept).find(|&&id| id as usize >= vocab) else { return Ok(()) };
    Err(Error::Mismatch {
        what: "the vocabulary".into(),
        left_name: format!("the cache {}", cache.manifest().directory.display()),
        left: format!("the id {id}"),
        right_name: "the live teacher".into(),
        right: format!("{vocab} ids"),
        tip: "name the teacher that the cache was made with".into(),
    })
}

/// The logits of a batch's valid rows, some rows at a time: `(row, logits)` to `each`, its results in order.
fn rows_of<T: Send>(model: &Decoder, batch: &DistillBatch, each: impl Fn(usize, &[f32]) -> T + Sync) -> Result<Vec<T>> {
    let vocab = model.config.vocab_size;
    let sequence = &batch.sequences[0];
    let (hidden, _) = model.forward(&TokenLayout::of_batch(&model.config, batch));
    let mut results = vec![];
    for first in (0..sequence.seq_len()).step_by(HEAD_ROWS) {
        let count = HEAD_ROWS.min(sequence.seq_len() - first);
        let logits = model.logits(hidden.clone().narrow(0, first, count)).into_data();
        let logits = logits.try_into_vec::<f32>().expect("logits are f32");
        let valid: Vec<(usize, &[f32])> = logits
            .chunks(vocab)
            .enumerate()
            .map(|(row, logits)| (first + row, logits))
            .filter(|(row, _)| sequence.is_valid(*row))
            .collect();
        if valid.iter().any(|(_, logits)| logits.iter().any(|logit| logit.is_nan() || *logit == f32::INFINITY)) {
            return Err(Error::NotFinite {
                what: "the live teacher's prediction".into(),
                tip: "check its weights with inspect".into(),
            });
        }
        results.extend(valid.into_par_iter().map(|(row, logits)| each(row, logits)).collect::<Vec<T>>());
    }
    Ok(results)
}

fn kept(targets: &SparseTargets, row: usize) -> std::ops::Range<usize> {
    targets.offsets[row] as usize..targets.offsets[row + 1] as usize
}

/// Each valid row of a batch of one sequence, at each temperature.
fn sequence(model: &Decoder, batch: &DistillBatch) -> Result<Vec<(usize, Vec<RowFidelity>)>> {
    let (sequence, targets) = (&batch.sequences[0], batch.targets.as_ref().expect("checked to be there"));
    rows_of(model, batch, |row, logits| {
        let kept = kept(targets, row);
        let captures = targets.captures.iter().map(|capture| {
            let live = LiveRow::new(logits, capture.temperature, &targets.ids[kept.clone()], sequence.tokens[row + 1]);
            let log_probs = capture.log_probs[kept.clone()].iter().map(|log_prob| f64::from(*log_prob));
            live.compare(log_probs, f64::from(capture.log_tail[row]), f64::from(capture.label_log_prob[row]))
        });
        (row, captures.collect())
    })
}

/// Mean KL between two runs of the teacher over one sequence, at the first temperature.
fn noise(model: &Decoder, batch: &DistillBatch) -> Result<f64> {
    let (sequence, targets) = (&batch.sequences[0], batch.targets.as_ref().expect("checked to be there"));
    let live = |row: usize, logits: &[f32]| {
        let ids = &targets.ids[kept(targets, row)];
        LiveRow::new(logits, targets.captures[0].temperature, ids, sequence.tokens[row + 1])
    };
    let (first, second) = (rows_of(model, batch, live)?, rows_of(model, batch, live)?);
    let sum: f64 = first
        .iter()
        .zip(&second)
        .map(|(one, other)| one.compare(other.log_probs.iter().copied(), other.log_tail, other.label_log_prob).kl)
        .sum();
    Ok(sum / first.len().max(1) as f64)
}

struct Sums {
    found: CaptureFidelity,
    agreed: u64,
}

impl Sums {
    fn new(temperature: f32) -> Sums {
        let found = CaptureFidelity {
            temperature,
            kl: 0.0,
            worst_row: WorstRow { sequence: 0, row: 0, kl: f64::NEG_INFINITY },
            worst_sequence: (0, f64::NEG_INFINITY),
            log_prob_error: 0.0,
            tail_error: 0.0,
            label_error: 0.0,
            label_bias: 0.0,
            top1_agreement: 0.0,
        };
        Sums { found, agreed: 0 }
    }

    fn add(&mut self, sequence: u64, rows: impl Iterator<Item = (usize, RowFidelity)>) {
        let (mut sum, mut count) = (0.0, 0u64);
        let found = &mut self.found;
        for (number, row) in rows {
            sum += row.kl;
            count += 1;
            if row.kl > found.worst_row.kl {
                found.worst_row = WorstRow { sequence, row: number, kl: row.kl };
            }
            found.log_prob_error = found.log_prob_error.max(row.log_prob_error);
            found.tail_error = found.tail_error.max(row.tail_error);
            found.label_error = found.label_error.max(row.label_error.abs());
            found.label_bias += row.label_error;
            self.agreed += u64::from(row.agrees);
        }
        found.kl += sum;
        if count > 0 && sum / count as f64 > found.worst_sequence.1 {
            found.worst_sequence = (sequence, sum / count as f64);
        }
    }

    fn finish(mut self, rows: u64) -> CaptureFidelity {
        self.found.kl /= rows as f64;
        self.found.label_bias /= rows as f64;
        self.found.top1_agreement = self.agreed as f64 / rows as f64;
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_at_no_distance_from_itself_and_at_the_right_one_from_another() {
        let logits = [0.5f32.ln(), 0.25f32.ln(), 0.125f32.ln(), 0.125f32.ln()];
        let live = LiveRow::new(&logits, 1.0, &[0, 1], 2);
        let same = live.compare(live.log_probs.iter().copied(), live.log_tail, live.label_log_prob);
        assert_eq!((same.kl, same.log_prob_error, same.tail_error, same.label_error), (0.0, 0.0, 0.0, 0.0));
        assert!(same.agrees);
        let quarter = 0.25f64.ln();
        let other = live.compare([quarter, 0.5f64.ln()].into_iter(), quarter, 0.25f64.ln());
        // 1/2 ln 2 - 1/4 ln 2 + 0
        assert!((other.kl - 0.25 * 2f64.ln()).abs() < 1e-7, "{}", other.kl);
        assert!((other.log_prob_error - 2f64.ln()).abs() < 1e-7);
        assert!((other.label_error - 2f64.ln()).abs() < 1e-7 && other.tail_error < 1e-7);
        // A teacher that prefers an id the cache has second.
        assert!(!LiveRow::new(&logits, 1.0, &[1, 0], 2).compare([0.0, 0.0].into_iter(), 0.0, 0.0).agrees);
    }

    #[test]
    fn a_tail_that_the_cache_denies_is_infinitely_far() {
        let live = LiveRow::new(&[0.0, 0.0], 1.0, &[0], 0);
        assert_eq!(live.compare([0.0].into_iter(), f64::NEG_INFINITY, 0.0).kl, f64::INFINITY);
        let whole = LiveRow::new(&[0.0, 1.0], 2.0, &[1, 0], 0);
        let row = whole.compare(whole.log_probs.iter().copied(), f64::NEG_INFINITY, whole.label_log_prob);
        assert_eq!((row.kl, row.tail_error), (0.0, 0.0));
    }
}
