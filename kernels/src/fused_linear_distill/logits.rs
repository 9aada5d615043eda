//! The loss of logits that are there already, row by row: for models whose logits are needed anyway, and as the plain
//! form that any device can fall back on.

use rayon::prelude::*;

use super::{
    LossSettings, NO_LABEL, RowMeasures, RowTargets, RowWeights, Weigh,
    rows::{DenseGradient, Mass, Outcomes, Row, RowStatistics},
};
use crate::vector_math::{max, scaled_exp_in_place, sum_exp_and_squares};

/// Logits whose exponentials are added up in f32; also what stays in the first cache between two passes.
const STRETCH: usize = 2048;

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

/// What a row adds to the loss.
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
