//! The operation in three stages, for a head whose rows lie apart: in several processes, or on a device.
//!
//! 1. Each shard tells what it knows of every row: [`statistics`] on a processor.
//! 2. What all shards know is joined ([`ShardStatistics::join`]), and [`finish`] makes of it the loss and what each
//!    row's gradient is made of. This is arithmetic on a few numbers per row, in f64, the same for every form.
//! 3. Each shard writes the gradient of its rows, and its part of the hidden states' gradient: [`gradients`] on a
//!    processor. The parts of all shards add up to the gradient.
//!
//! The logits are computed twice, once per pass, since they are held by nobody in between. How the numbers travel from
//! shard to shard is not decided here.

use rayon::prelude::*;

use super::{
    LossSettings, NO_LABEL, RowMeasures, RowTargets, RowWeights, Weigh,
    host::{HostMatrix, PIECE_BYTES, Wanted, gather, piece_rows},
    logits::{row_loss, row_statistics as statistics_of_row, write_dense},
    rows::{DenseGradient, FinishedRow, Outcomes, RowStatistics, finish_row},
};
use crate::gemm_call::{View, multiply};

/// Some consecutive rows of a head.
#[derive(Debug, Clone, Copy)]
pub struct Shard<'a> {
    /// `[rows of the shard, D]`
    pub lm_head: HostMatrix<'a>,
    /// The id of its first row.
    pub first_id: usize,
}

/// What one shard, or several together, know of T rows.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardStatistics {
    /// Of the shard's ids that are not kept; the largest logit and its id are of all ids of the shard.
    pub rows: Vec<RowStatistics>,
    /// The logit of each kept id, in the order of [`RowTargets::ids`]; `-inf` for ids of other shards.
    pub kept_logits: Vec<f32>,
    /// The logit of each label; `-inf` for ids of other shards and for none.
    pub label_logits: Vec<f32>,
}

impl ShardStatistics {
    /// What two shards know together.
    ///
    /// # Panics
    /// When they are of different targets.
    pub fn join(mut self, other: &ShardStatistics, settings: &LossSettings) -> ShardStatistics {
        assert_eq!(self.rows.len(), other.rows.len(), "shards see the same rows");
        assert_eq!(self.kept_logits.len(), other.kept_logits.len(), "shards see the same targets");
        for (own, other) in self.rows.iter_mut().zip(&other.rows) {
            *own = own.join(*other, settings.temperature as f64);
        }
        let logits = self.kept_logits.iter_mut().chain(&mut self.label_logits);
        for (own, other) in logits.zip(other.kept_logits.iter().chain(&other.label_logits)) {
            // Not the larger one, which would lose a logit that is no number.
            if *own == f32::NEG_INFINITY {
                *own = *other;
            }
        }
        self
    }

    /// Counts the kept logits, which are no part of a row's rest, among those that its largest is sought in.
    pub fn with_kept(mut self, targets: &RowTargets) -> ShardStatistics {
        for (row, statistics) in self.rows.iter_mut().enumerate() {
            for place in targets.kept(row) {
                let (logit, id) = (self.kept_logits[place], targets.ids[place]);
                let largest = statistics.largest;
                if logit > largest || (logit == largest && logit > f32::NEG_INFINITY && id < statistics.argmax) {
                    (statistics.largest, statistics.argmax) = (logit, id);
                }
            }
        }
        self
    }
}

/// The loss, and what the gradient of each logit is made of.
#[derive(Debug, Clone)]
pub struct Finished {
    /// `sum_t [ w_soft c d + w_hard ce ]`.
    pub loss: f64,
    /// Measures and weights of each row that has a target.
    pub rows: Vec<Option<(RowMeasures, RowWeights)>>,
    /// Gradient of the logits that are not kept.
    pub dense: Vec<DenseGradient>,
    /// Gradient of each kept logit, in the order of [`RowTargets::ids`].
    pub kept_gradient: Vec<f32>,
    /// What a label that is not kept gets beside the dense gradient; 0 where there is none.
    pub label_gradient: Vec<f32>,
}

/// Makes loss and gradient of what all shards know together.
pub fn finish(
    targets: &RowTargets,
    settings: &LossSettings,
    statistics: &ShardStatistics,
    weigh: &Weigh<'_>,
) -> Finished {
    let rows = targets.row_count();
    assert_eq!(statistics.rows.len(), rows, "statistics of every row");
    let mut kept_gradient = vec![0.0f32; targets.ids.len()];
    let mut slots = Vec::with_capacity(rows);
    let mut left = &mut kept_gradient[..];
    for row in 0..rows {
        let (slot, rest) = left.split_at_mut(targets.kept(row).len());
        slots.push(slot);
        left = rest;
    }
    let finished: Vec<_> = slots
        .into_par_iter()
        .enumerate()
        .map_init(Outcomes::default, |outcomes, (row, slot)| {
            if !targets.has_target(row) {
                return None;
            }
            let (kept, label_logit) = (&statistics.kept_logits[targets.kept(row)], statistics.label_logits[row]);
            let statistics = &statistics.rows[row];
            Some(finish_row(targets, row, settings, statistics, kept, label_logit, weigh, outcomes, slot))
        })
        .collect();
    let mut output = Finished {
        loss: 0.0,
        rows: vec![None; rows],
        dense: vec![DenseGradient::default(); rows],
        kept_gradient,
        label_gradient: vec![0.0; rows],
    };
    for (row, finished) in finished.into_iter().enumerate() {
        if let Some(FinishedRow { measures, weights, dense, label_gradient }) = finished {
            output.loss += row_loss(targets, row, settings, &measures, &weights);
            output.rows[row] = Some((measures, weights));
            output.dense[row] = dense;
            output.label_gradient[row] = label_gradient;
        }
    }
    output
}

/// The first stage for one shard, on a processor.
///
/// # Shapes
/// - `hidden` `[T, D]`, D is `width`, targets of T rows
///
/// # Panics
/// When shapes do not fit.
pub fn statistics(
    hidden: HostMatrix<'_>,
    shard: Shard<'_>,
    width: usize,
    targets: &RowTargets,
    settings: &LossSettings,
) -> ShardStatistics {
    let rows = targets.row_count();
    let mut found = ShardStatistics {
        rows: vec![RowStatistics::NONE; rows],
        kept_logits: vec![f32::NEG_INFINITY; targets.ids.len()],
        label_logits: vec![f32::NEG_INFINITY; rows],
    };
    for_each_piece(hidden, shard, width, targets, |live, _, logits| {
        let vocab = shard.vocab(width);
        for (&row, logits) in live.iter().zip(logits.chunks_mut(vocab)) {
            if let Some(place) = shard.place(targets.labels[row], width) {
                found.label_logits[row] = logits[place];
            }
            for kept in targets.kept(row) {
                if let Some(place) = shard.place(targets.ids[kept], width) {
                    found.kept_logits[kept] = std::mem::replace(&mut logits[place], f32::NEG_INFINITY);
                }
            }
        }
        let statistics: Vec<_> =
            logits.par_chunks(vocab).map(|logits| statistics_of_row(logits, settings.temperature)).collect();
        for (&row, mut statistics) in live.iter().zip(statistics) {
            if statistics.largest > f32::NEG_INFINITY {
                statistics.argmax += shard.first_id as u32;
            }
            found.rows[row] = statistics;
        }
    });
    found.with_kept(targets)
}

/// The third stage for one shard, on a processor: its part of the hidden states' gradient `[T, D]`, and the gradient of
/// its rows of the head.
///
/// # Shapes
/// - `hidden` `[T, D]`, D is `width`, targets of T rows
///
/// # Panics
/// When shapes do not fit.
pub fn gradients(
    hidden: HostMatrix<'_>,
    shard: Shard<'_>,
    width: usize,
    targets: &RowTargets,
    settings: &LossSettings,
    finished: &Finished,
    wanted: Wanted,
) -> (Option<Vec<f32>>, Option<Vec<f32>>) {
    let vocab = shard.vocab(width);
    let tile = shard.lm_head.tile(width, vocab);
    let mut hidden_grad = wanted.hidden.then(|| vec![0.0; targets.row_count() * width]);
    let mut lm_head_grad = wanted.lm_head.then(|| vec![0.0; vocab * width]);
    if wanted == Wanted::NOTHING {
        return (hidden_grad, lm_head_grad);
    }
    let mut started = false;
    for_each_piece(hidden, shard, width, targets, |live, operand, logits| {
        logits.par_chunks_mut(vocab).zip(live).for_each(|(logits, &row)| {
            write_dense(logits, &finished.dense[row], settings.temperature);
            for kept in targets.kept(row) {
                if let Some(place) = shard.place(targets.ids[kept], width) {
                    logits[place] = finished.kept_gradient[kept];
                }
            }
            if let Some(place) = shard.place(targets.labels[row], width) {
                logits[place] += finished.label_gradient[row];
            }
        });
        if let Some(hidden_grad) = &mut hidden_grad {
            let mut gathered = vec![0.0f32; live.len() * width];
            for first in (0..vocab).step_by(tile) {
                let tile = tile.min(vocab - first);
                let head = shard.lm_head.rows(width, first, tile);
                let gradient = View::rows(&logits[first..], live.len(), tile, vocab);
                multiply(&mut gathered, width, first > 0, 1.0, gradient, View::rows(&head, tile, width, width), true);
            }
            for (&row, gradient) in live.iter().zip(gathered.chunks(width)) {
                hidden_grad[row * width..][..width].copy_from_slice(gradient);
            }
        }
        if let Some(lm_head_grad) = &mut lm_head_grad {
            let gradient = View::rows(logits, live.len(), vocab, vocab).transposed();
            multiply(lm_head_grad, width, started, 1.0, gradient, operand, true);
            started = true;
        }
    });
    (hidden_grad, lm_head_grad)
}

impl Shard<'_> {
    fn vocab(&self, width: usize) -> usize {
        self.lm_head.len() / width
    }

    /// Where an id lies in the shard.
    fn place(&self, id: u32, width: usize) -> Option<usize> {
        let place = (id as usize).checked_sub(self.first_id)?;
        (id != NO_LABEL && place < self.vocab(width)).then_some(place)
    }
}

/// Calls `work` with a few rows that have targets, their hidden states, and their logits in the shard's vocabulary.
fn for_each_piece(
    hidden: HostMatrix<'_>,
    shard: Shard<'_>,
    width: usize,
    targets: &RowTargets,
    mut work: impl FnMut(&[usize], View<'_>, &mut [f32]),
) {
    let (rows, vocab) = (targets.row_count(), shard.vocab(width));
    assert_eq!(hidden.len(), rows * width, "one row of targets per hidden state");
    let live: Vec<usize> = (0..rows).filter(|&row| targets.has_target(row)).collect();
    if vocab == 0 {
        return;
    }
    let piece = piece_rows(live.len(), vocab, PIECE_BYTES);
    let tile = shard.lm_head.tile(width, vocab);
    let mut logits = vec![0.0f32; piece.min(live.len()) * vocab];
    for live in live.chunks(piece) {
        let hidden = gather(&hidden, width, live);
        let logits = &mut logits[..live.len() * vocab];
        let operand = View::rows(&hidden, live.len(), width, width);
        for first in (0..vocab).step_by(tile) {
            let tile = tile.min(vocab - first);
            let head = shard.lm_head.rows(width, first, tile);
            let head = View::rows(&head, tile, width, width).transposed();
            multiply(&mut logits[first..], vocab, false, 1.0, operand, head, true);
        }
        work(live, operand, logits);
    }
}
