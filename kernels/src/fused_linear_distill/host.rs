//! The operation on a processor: a few rows of logits at a time, each row finished where it lies.
//!
//! Three matrix products per piece, the fewest there can be: logits, gradient of the hidden states, gradient of the
//! head. The logits of a piece become their own gradient in place, so that a piece is all the memory there is beside
//! the results.

use std::borrow::Cow;

use half::bf16;
use rayon::prelude::*;

use super::{
    LossSettings, NO_LABEL, RowMeasures, RowTargets, RowWeights, Weigh,
    rows::{DenseGradient, Mass, Outcomes, Row, RowStatistics},
};
use crate::{
    gemm_call::{View, multiply},
    vector_math::{max, scaled_exp_in_place, sum_exp_and_squares},
};

/// Bytes of logits in memory at once.
pub(super) const PIECE_BYTES: usize = 48 << 20;
/// Bytes of a head in bf16 that are widened at once.
const WIDENED_BYTES: usize = 16 << 20;
/// Logits whose exponentials are added up in f32; also what stays in the first cache between two passes.
const STRETCH: usize = 2048;

/// A row-major matrix in host memory.
#[derive(Debug, Clone, Copy)]
pub enum HostMatrix<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> HostMatrix<'a> {
    pub fn len(&self) -> usize {
        match self {
            HostMatrix::F32(values) => values.len(),
            HostMatrix::Bf16(values) => values.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn rows(&self, width: usize, first: usize, count: usize) -> Cow<'a, [f32]> {
        let range = first * width..(first + count) * width;
        match self {
            HostMatrix::F32(values) => Cow::Borrowed(&values[range]),
            HostMatrix::Bf16(values) => Cow::Owned(values[range].iter().map(|value| value.to_f32()).collect()),
        }
    }

    /// Rows to work on at once: all where nothing has to be widened.
    pub(super) fn tile(&self, width: usize, rows: usize) -> usize {
        match self {
            HostMatrix::F32(_) => rows.max(1),
            HostMatrix::Bf16(_) => (WIDENED_BYTES / (4 * width.max(1))).clamp(1, rows.max(1)),
        }
    }
}

/// Which gradients are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    pub hidden: bool,
    pub lm_head: bool,
}

impl Wanted {
    pub const NOTHING: Wanted = Wanted { hidden: false, lm_head: false };
    pub const BOTH: Wanted = Wanted { hidden: true, lm_head: true };
}

/// Loss and gradients of a batch.
#[derive(Debug)]
pub struct Output {
    /// `sum_t [ w_soft c d + w_hard ce ]`.
    pub loss: f64,
    /// Measures and weights of each row that has a target.
    pub rows: Vec<Option<(RowMeasures, RowWeights)>>,
    /// `[T, D]`, f32 accumulated.
    pub hidden_grad: Option<Vec<f32>>,
    /// `[V, D]`, f32 accumulated.
    pub lm_head_grad: Option<Vec<f32>>,
}

/// Runs the operation.
///
/// # Shapes
/// - `hidden` `[T, D]`, `lm_head` `[V, D]`, D is `width`, targets of T rows
///
/// # Panics
/// When shapes do not fit, or an id lies beyond the vocabulary: [`RowTargets::check`] says so without a panic.
pub fn run(
    hidden: HostMatrix<'_>,
    lm_head: HostMatrix<'_>,
    width: usize,
    targets: &RowTargets,
    settings: &LossSettings,
    weigh: &Weigh<'_>,
    wanted: Wanted,
) -> Output {
    run_in_pieces(hidden, lm_head, width, targets, settings, weigh, wanted, PIECE_BYTES)
}

/// [`run`] with a budget for the logits.
#[allow(clippy::too_many_arguments)] // the operation's operands, and the size of its scratch space
pub fn run_in_pieces(
    hidden: HostMatrix<'_>,
    lm_head: HostMatrix<'_>,
    width: usize,
    targets: &RowTargets,
    settings: &LossSettings,
    weigh: &Weigh<'_>,
    wanted: Wanted,
    piece_bytes: usize,
) -> Output {
    let (rows, vocab) = (targets.row_count(), lm_head.len() / width);
    assert_eq!(hidden.len(), rows * width, "one row of targets per hidden state");
    // Rows without a target cost nothing.
    let live: Vec<usize> = (0..rows).filter(|&row| targets.has_target(row)).collect();
    let mut output = Output {
        loss: 0.0,
        rows: vec![None; rows],
        hidden_grad: wanted.hidden.then(|| vec![0.0; rows * width]),
        lm_head_grad: wanted.lm_head.then(|| vec![0.0; lm_head.len()]),
    };
    let piece = piece_rows(live.len(), vocab, piece_bytes);
    let tile = lm_head.tile(width, vocab);
    let mut logits = vec![0.0f32; piece.min(live.len()) * vocab];
    let mut gathered_grad = vec![0.0f32; if wanted.hidden { piece.min(live.len()) * width } else { 0 }];
    for (number, live) in live.chunks(piece).enumerate() {
        let count = live.len();
        let hidden = gather(&hidden, width, live);
        let logits = &mut logits[..count * vocab];
        let operand = View::rows(&hidden, count, width, width);
        for first in (0..vocab).step_by(tile) {
            let tile = tile.min(vocab - first);
            let head = lm_head.rows(width, first, tile);
            let head = View::rows(&head, tile, width, width).transposed();
            multiply(&mut logits[first..], vocab, false, 1.0, operand, head, true);
        }
        let finished: Vec<_> = logits
            .par_chunks_mut(vocab)
            .zip(live)
            .map_init(Scratch::default, |scratch, (logits, &row)| {
                scratch.finish(logits, row, targets, settings, weigh, wanted != Wanted::NOTHING)
            })
            .collect();
        for (&row, (measures, weights)) in live.iter().zip(finished) {
            output.loss += row_loss(targets, row, settings, &measures, &weights);
            output.rows[row] = Some((measures, weights));
        }
        if let Some(hidden_grad) = &mut output.hidden_grad {
            for first in (0..vocab).step_by(tile) {
                let tile = tile.min(vocab - first);
                let head = lm_head.rows(width, first, tile);
                let head = View::rows(&head, tile, width, width);
                let gradient = View::rows(&logits[first..], count, tile, vocab);
                multiply(&mut gathered_grad, width, first > 0, 1.0, gradient, head, true);
            }
            for (&row, gradient) in live.iter().zip(gathered_grad.chunks(width)) {
                hidden_grad[row * width..][..width].copy_from_slice(gradient);
            }
        }
        if let Some(lm_head_grad) = &mut output.lm_head_grad {
            let gradient = View::rows(logits, count, vocab, vocab).transposed();
            multiply(lm_head_grad, width, number > 0, 1.0, gradient, operand, true);
        }
    }
    output
}

/// The loss of logits that are there already, and its gradient in their place.
///
/// # Shapes
/// - `logits` `[T, V]`, targets of T rows
pub fn finish_logits(
    logits: &mut [f32],
    vocab: usize,
    targets: &RowTargets,
    settings: &LossSettings,
    weigh: &Weigh<'_>,
) -> (f64, Vec<Option<(RowMeasures, RowWeights)>>) {
    let rows: Vec<_> = logits
        .par_chunks_mut(vocab)
        .enumerate()
        .map_init(Scratch::default, |scratch, (row, logits)| {
            if targets.has_target(row) {
                return Some(scratch.finish(logits, row, targets, settings, weigh, true));
            }
            logits.fill(0.0);
            None
        })
        .collect();
    let loss = rows.iter().enumerate().filter_map(|(row, found)| {
        found.as_ref().map(|(measures, weights)| row_loss(targets, row, settings, measures, weights))
    });
    (loss.sum(), rows)
}

pub(super) fn row_loss(
    targets: &RowTargets,
    row: usize,
    settings: &LossSettings,
    measures: &RowMeasures,
    weights: &RowWeights,
) -> f64 {
    let hard = if targets.labels[row] == NO_LABEL { 0.0 } else { weights.hard as f64 * measures.hard };
    weights.soft as f64 * settings.soft_factor() * measures.soft + hard
}

/// Rows per piece: as many as the budget has room for, in pieces of about equal size.
pub(super) fn piece_rows(rows: usize, vocab: usize, bytes: usize) -> usize {
    let most = (bytes / (4 * vocab.max(1))).max(1);
    rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
}

pub(super) fn gather<'a>(hidden: &HostMatrix<'a>, width: usize, rows: &[usize]) -> Cow<'a, [f32]> {
    let (first, last) = (rows[0], rows[rows.len() - 1]);
    let all = hidden.rows(width, first, last + 1 - first);
    if rows.len() == last + 1 - first {
        return all;
    }
    Cow::Owned(rows.iter().flat_map(|row| &all[(row - first) * width..][..width]).copied().collect())
}

/// What a thread needs for a row beside its logits.
#[derive(Debug, Default)]
struct Scratch {
    outcomes: Outcomes,
    kept_logits: Vec<f32>,
    kept_gradient: Vec<f32>,
}

impl Scratch {
    /// Measures one row, and turns its logits into the loss's gradient in them.
    fn finish(
        &mut self,
        logits: &mut [f32],
        row: usize,
        targets: &RowTargets,
        settings: &LossSettings,
        weigh: &Weigh<'_>,
        gradient: bool,
    ) -> (RowMeasures, RowWeights) {
        let kept = targets.kept(row);
        let (ids, label) = (&targets.ids[kept.clone()], targets.labels[row]);
        let label_logit = (label != NO_LABEL).then(|| logits[label as usize]);
        let mut kept_largest = (f32::NEG_INFINITY, u32::MAX);
        self.kept_logits.clear();
        for &id in ids {
            let logit = std::mem::replace(&mut logits[id as usize], f32::NEG_INFINITY);
            if logit > kept_largest.0 || (logit == kept_largest.0 && id < kept_largest.1) {
                kept_largest = (logit, id);
            }
            self.kept_logits.push(logit);
        }
        let mut statistics = row_statistics(logits, settings.temperature);
        let kept_statistics = RowStatistics { largest: kept_largest.0, argmax: kept_largest.1, ..RowStatistics::NONE };
        statistics = statistics.join(kept_statistics, settings.temperature as f64);
        self.kept_gradient.resize(ids.len(), 0.0);
        let target = Row {
            log_probs: &targets.log_probs[kept],
            log_tail: targets.log_tail[row],
            kept_logits: &self.kept_logits,
            label_logit,
            label_place: ids.iter().position(|&id| id == label),
        };
        let (measures, weights, dense) = target.finish(
            settings,
            &statistics,
            &|measures| weigh(row, measures),
            &mut self.outcomes,
            &mut self.kept_gradient,
        );
        if gradient {
            write_dense(logits, &dense, settings.temperature);
            for (&id, &value) in ids.iter().zip(&self.kept_gradient) {
                logits[id as usize] = value;
            }
            if label_logit.is_some() && target.label_place.is_none() {
                logits[label as usize] -= weights.hard;
            }
        }
        (measures, weights)
    }
}

/// What a row's logits add up to, at both temperatures.
pub(super) fn row_statistics(logits: &[f32], temperature: f32) -> RowStatistics {
    let mut statistics = RowStatistics::NONE;
    let mut widest = 0;
    for (number, stretch) in logits.chunks(STRETCH).enumerate() {
        let largest = max(stretch);
        if largest > statistics.largest {
            (statistics.largest, widest) = (largest, number);
        }
        let mass = |temperature: f32| {
            let shift = if largest == f32::NEG_INFINITY { 0.0 } else { largest };
            let (sum, squares) = sum_exp_and_squares(stretch, shift, 1.0 / temperature);
            Mass { largest, sum: sum as f64, squares: squares as f64 }
        };
        let unscaled = mass(1.0);
        statistics.rest_unscaled = statistics.rest_unscaled.join(unscaled, 1.0);
        statistics.rest = match temperature {
            1.0 => statistics.rest_unscaled,
            temperature => statistics.rest.join(mass(temperature), temperature as f64),
        };
    }
    if statistics.largest > f32::NEG_INFINITY {
        let stretch = logits.chunks(STRETCH).nth(widest).unwrap_or(&[]);
        let place = stretch.iter().position(|&logit| logit == statistics.largest).unwrap_or(0);
        statistics.argmax = (widest * STRETCH + place) as u32;
    }
    statistics
}

/// Replaces the logits that are not kept by the loss's gradient in them.
pub(super) fn write_dense(logits: &mut [f32], dense: &DenseGradient, temperature: f32) {
    if dense.soft == 0.0 && dense.hard == 0.0 {
        logits.fill(0.0);
    } else if dense.hard == 0.0 {
        scaled_exp_in_place(logits, dense.shift, 1.0 / temperature, dense.soft);
    } else {
        for stretch in logits.chunks_mut(STRETCH) {
            let mut second = [0.0; STRETCH];
            let second = &mut second[..stretch.len()];
            second.copy_from_slice(stretch);
            scaled_exp_in_place(stretch, dense.shift, 1.0 / temperature, dense.soft);
            scaled_exp_in_place(second, dense.shift_unscaled, 1.0, dense.hard);
            for (value, second) in stretch.iter_mut().zip(second) {
                *value += *second;
            }
        }
    }
}
