//! What the records of the codecs `packed` and `compact` have in common: one sequence, quantised.
//!
//! A record holds a sequence with everything that is known of it: tokens, documents, and of each valid row the kept
//! ids, their levels, the tails and the label's log-probability. The two codecs write the same numbers, in other
//! ways; what they decode is equal.

use super::codec::Block;
use super::exact_math::{exp, ln};
use super::manifest::QuantiserError;
use super::quantizer::{LABEL_NOTHING, Quantiser, RowKind, label_code, label_of, tail_code};
use crate::targets::{PADDING, PackedSequence, SparseTargets};

/// What must be known to read a record.
#[derive(Debug, Clone)]
pub struct RecordShape {
    pub seq_len: usize,
    pub vocab_size: usize,
    /// Empty in a cache of tokens only.
    pub temperatures: Vec<f32>,
    pub(crate) quantiser: Quantiser,
}

impl RecordShape {
    /// # Errors
    /// Rows that were sampled can only be read at the temperature they were sampled at; `steps` are 1 to 190.
    pub fn new(
        seq_len: usize,
        vocab_size: usize,
        temperatures: &[f32],
        kind: RowKind,
        steps: u16,
    ) -> Result<RecordShape, String> {
        if !(1..=super::quantizer::MAX_STEPS).contains(&steps) {
            return Err(format!("{steps} levels, not 1 to {}", super::quantizer::MAX_STEPS));
        }
        if kind != RowKind::Exact && temperatures.len() > 1 {
            return Err(format!("sampled targets at {} temperatures, not 1", temperatures.len()));
        }
        let quantiser = Quantiser::new(kind, steps);
        Ok(RecordShape { seq_len, vocab_size, temperatures: temperatures.to_vec(), quantiser })
    }

    pub(crate) fn has_targets(&self) -> bool {
        !self.temperatures.is_empty()
    }

    /// Tails that a row stores.
    pub(crate) fn tail_count(&self) -> usize {
        if self.quantiser.has_tail() { self.temperatures.len() } else { 0 }
    }

    /// Log-probabilities of a label that a row stores when the label is not kept: a row without ids says nothing of
    /// how one temperature's follow from another's.
    pub(crate) fn label_count(&self, kept: usize) -> usize {
        if kept == 0 { self.temperatures.len() } else { 1 }
    }
}

/// One row in whole numbers, in the order in which it is decoded: best level first, ids rising within a level.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct QuantisedRow {
    pub ids: Vec<u32>,
    pub levels: Vec<u16>,
    /// One per temperature, for exact rows.
    pub tails: Vec<u8>,
    /// Of a label that is not kept ([`RecordShape::label_count`]).
    pub labels: Vec<u16>,
}

impl QuantisedRow {
    pub(crate) fn clear(&mut self) {
        self.ids.clear();
        self.levels.clear();
        self.tails.clear();
        self.labels.clear();
    }

    pub(crate) fn quantise(
        &mut self,
        shape: &RecordShape,
        targets: &SparseTargets,
        row: usize,
        label: u32,
        error: &mut QuantiserError,
    ) {
        self.clear();
        let kept = targets.offsets[row] as usize..targets.offsets[row + 1] as usize;
        if shape.quantiser.has_tail() {
            self.tails.extend(targets.captures.iter().map(|capture| tail_code(capture.log_tail[row])));
        }
        let tail = self.tails.first().copied().unwrap_or(0);
        shape.quantiser.levels(&targets.captures[0].log_probs[kept.clone()], tail, &mut self.levels);
        self.ids.extend_from_slice(&targets.ids[kept]);
        self.measure(shape, targets, row, label, error);
        self.sort(shape);
        if !self.ids.contains(&label) {
            let captures = &targets.captures[..shape.label_count(self.ids.len())];
            self.labels.extend(captures.iter().map(|capture| label_code(capture.label_log_prob[row])));
        }
    }

    /// Adds what quantising changed at the first temperature. The levels are still in the order of the targets.
    fn measure(
        &self,
        shape: &RecordShape,
        targets: &SparseTargets,
        row: usize,
        label: u32,
        error: &mut QuantiserError,
    ) {
        error.rows += 1;
        let original = &targets.captures[0];
        let kept = targets.offsets[row] as usize..targets.offsets[row + 1] as usize;
        let tail = self.tails.first().copied().unwrap_or(0);
        let mut decoded = vec![];
        shape.quantiser.log_probs(&self.levels, tail, &mut decoded);
        let mut divergence = 0.0;
        for (before, after) in original.log_probs[kept].iter().zip(&decoded) {
            let (before, after) = (f64::from(*before), f64::from(*after));
            let (left, right) = (exp(before), exp(after));
            divergence += left * (before - after);
            error.squared_error += (left - right) * (left - right);
            error.squared_norm += left * left;
        }
        let before = original.label_log_prob[row];
        let after = match self.ids.iter().position(|id| *id == label) {
            Some(place) => decoded[place],
            None => label_of(label_code(before)),
        };
        let moved = f64::from(before) - f64::from(after);
        if moved.is_finite() {
            error.label_max = error.label_max.max(moved.abs());
        }
        if !shape.quantiser.has_tail() {
            return;
        }
        let (before, after) = (f64::from(original.log_tail[row]), f64::from(shape.quantiser.log_tail(tail)));
        let (left, right) = (exp(before), exp(after));
        if left > 0.0 {
            divergence += left * (before - after);
        }
        error.tail_max = error.tail_max.max((left - right).abs());
        error.kl_sum += divergence;
        error.kl_max = error.kl_max.max(divergence);
    }

    /// Into the order of decoding.
    pub(crate) fn sort(&mut self, shape: &RecordShape) {
        let mut order: Vec<(u32, u16)> = self.ids.iter().copied().zip(self.levels.iter().copied()).collect();
        order.sort_unstable_by(|left, right| {
            shape.quantiser.above(left.1, right.1).then(left.1.cmp(&right.1)).then(left.0.cmp(&right.0))
        });
        for (place, (id, level)) in order.into_iter().enumerate() {
            self.ids[place] = id;
            self.levels[place] = level;
        }
    }

    /// Appends the row to `targets`, whose captures have the shape's temperatures.
    pub(crate) fn decode(&self, shape: &RecordShape, label: u32, targets: &mut SparseTargets) {
        let quantiser = &shape.quantiser;
        let start = targets.ids.len();
        targets.ids.extend_from_slice(&self.ids);
        targets.offsets.push(targets.ids.len() as u64);
        let tail = self.tails.first().copied().unwrap_or(0);
        let (first, others) = targets.captures.split_first_mut().expect("a capture");
        quantiser.log_probs(&self.levels, tail, &mut first.log_probs);
        let first_tail = if quantiser.has_tail() { quantiser.log_tail(tail) } else { f32::NEG_INFINITY };
        first.log_tail.push(first_tail);
        let place = if self.labels.is_empty() { self.ids.iter().position(|id| *id == label) } else { None };
        let label_log_prob = match place {
            Some(place) => first.log_probs[start + place],
            None => label_of(self.labels.first().copied().unwrap_or(LABEL_NOTHING)),
        };
        first.label_log_prob.push(label_log_prob);
        for (i, capture) in others.iter_mut().enumerate() {
            let code = self.tails[i + 1];
            capture.log_tail.push(quantiser.log_tail(code));
            // Dividing logits by another temperature scales differences of log-probabilities; the tail says the rest.
            let ratio = f64::from(first.temperature) / f64::from(capture.temperature);
            let scaled = |log_prob: f32| f64::from(log_prob) * ratio;
            let best = first.log_probs.get(start).map_or(0.0, |log_prob| scaled(*log_prob));
            let total: f64 = first.log_probs[start..].iter().map(|log_prob| exp(scaled(*log_prob) - best)).sum();
            let shift = if self.ids.is_empty() { 0.0 } else { quantiser.log_mass(code) - ln(total) - best };
            let moved = |log_prob: f32| (scaled(log_prob) + shift).min(0.0) as f32;
            capture.log_probs.extend(first.log_probs[start..].iter().map(|log_prob| moved(*log_prob)));
            capture.label_log_prob.push(match self.labels.get(i + 1) {
                Some(code) => label_of(*code),
                None => moved(label_log_prob),
            });
        }
    }
}

/// A row that is not valid: keeps nothing, says nothing.
pub(crate) fn push_empty_row(targets: &mut SparseTargets) {
    targets.offsets.push(targets.ids.len() as u64);
    for capture in &mut targets.captures {
        capture.log_tail.push(0.0);
        capture.label_log_prob.push(0.0);
    }
}

/// Lengths of the runs of equal segment numbers, and these numbers.
pub(crate) fn segment_runs(segments: &[u32]) -> Vec<(u32, usize)> {
    segments.chunk_by(|left, right| left == right).map(|run| (run[0], run.len())).collect()
}

/// What a run's number is written as: 0 for padding, else what it grew by and one; the first from 0.
pub(crate) fn segment_step(before: u32, segment: u32) -> u64 {
    if segment == PADDING { 0 } else { u64::from(segment - before) + 1 }
}

/// The inverse of [`segment_step`].
pub(crate) fn segment_after(before: u32, step: u64) -> Result<u32, String> {
    if step == 0 {
        return Ok(PADDING);
    }
    let segment = u64::from(before) + (step - 1);
    match u32::try_from(segment) {
        Ok(segment) if before != PADDING && segment != PADDING => Ok(segment),
        _ => Err("its segments decrease".into()),
    }
}

/// Gives `block` room for targets of the shape, if it has none yet, and checks that they agree.
pub(crate) fn prepare<'a>(block: &'a mut Block, shape: &RecordShape) -> Option<&'a mut SparseTargets> {
    if shape.has_targets() && block.targets.is_none() {
        block.targets = Some(SparseTargets::empty(&shape.temperatures));
    }
    block.targets.as_mut()
}

/// Checks that a sequence is one that a record can hold; what is in its rows was checked by the writer.
pub(crate) fn check(sequence: &PackedSequence, targets: Option<&SparseTargets>, shape: &RecordShape) {
    assert_eq!(sequence.tokens.len(), shape.seq_len + 1, "a sequence of another length");
    assert_eq!(targets.is_some(), shape.has_targets(), "a sequence with targets, or without");
    if let Some(targets) = targets {
        assert_eq!(targets.row_count(), shape.seq_len, "targets of another length");
        assert_eq!(targets.captures.len(), shape.temperatures.len(), "targets at other temperatures");
    }
}
