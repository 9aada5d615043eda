//! The one place where the vocabulary is touched: per row of logits the log-sum-exp, the log-sum-exp of everything
//! not kept, and a few entries.
//!
//! Every loss is a function of these; its gradient in the logits is a multiple of the row's softmax plus a few sparse
//! corrections, whatever the divergence. The mass outside the kept ids is summed, never had by subtraction.

use burn::tensor::{Int, Tensor, TensorData};
use rayon::prelude::*;
use std::sync::Arc;

use crate::{
    host_op::{self, Forward, HostArray, HostOp},
    vector_math::{max, scaled_exp, sum_exp},
};

/// The entries asked for of each row.
#[derive(Debug, Clone)]
pub struct RowEntries {
    /// One id per row.
    pub labels: Arc<Vec<u32>>,
    /// `[N, K]` row-major kept ids, all different within a row; only the first `counts[row]` count.
    pub kept: Arc<Vec<u32>>,
    /// Kept ids of each row, at most K.
    pub counts: Arc<Vec<u32>>,
}

impl RowEntries {
    /// Labels alone.
    pub fn labels(labels: Vec<u32>) -> Self {
        let counts = Arc::new(vec![0; labels.len()]);
        RowEntries { labels: Arc::new(labels), kept: Arc::new(vec![]), counts }
    }

    /// K.
    pub fn width(&self) -> usize {
        self.kept.len() / self.labels.len().max(1)
    }

    fn kept_of(&self, row: usize) -> &[u32] {
        &self.kept[row * self.width()..][..self.counts[row] as usize]
    }
}

/// Stands for the logarithm of nothing where a row keeps its whole vocabulary: finite, so that no mass times it is 0.
pub const LOG_NOTHING: f32 = -1e30;

/// Columns of the result, in this order: log-sum-exp, log-sum-exp of all that is not kept, the label's logit, the kept
/// logits (0 beyond a row's count).
///
/// # Shapes
/// - `logits` `[N, V]`, result `[N, 3 + K]`
pub fn logsumexp_gather(logits: Tensor<2>, entries: &RowEntries) -> Tensor<2> {
    assert_eq!(entries.labels.len(), logits.dims()[0], "one label per row");
    if host_op::runs_on(&logits.device()) {
        return host_op::apply(LogsumexpGather { entries: entries.clone() }, vec![logits.into()]);
    }
    logsumexp_gather_reference(logits, entries)
}

/// [`logsumexp_gather`] in plain tensor operations.
pub fn logsumexp_gather_reference(logits: Tensor<2>, entries: &RowEntries) -> Tensor<2> {
    let [rows, vocab] = logits.dims();
    let device = logits.device();
    let width = entries.width();
    let gather = |ids: &[u32], width: usize| {
        let ids: Vec<i64> = ids.iter().map(|&id| id as i64).collect();
        logits.clone().gather(1, Tensor::<2, Int>::from_data(TensorData::new(ids, [rows, width]), &device))
    };
    let log_sum_exp = |values: Tensor<2>| {
        let largest = values.clone().detach().max_dim(1);
        (values - largest.clone()).exp().sum_dim(1).log() + largest
    };
    let mut outside = vec![0.0f32; rows * vocab];
    let mut counted = vec![0.0f32; rows * width];
    for row in 0..rows {
        for (place, &id) in entries.kept_of(row).iter().enumerate() {
            outside[row * vocab + id as usize] = LOG_NOTHING;
            counted[row * width + place] = 1.0;
        }
    }
    let outside = Tensor::<2>::from_data(TensorData::new(outside, [rows, vocab]), &device);
    let rest = log_sum_exp(logits.clone() + outside).clamp_min(LOG_NOTHING);
    let mut columns = vec![log_sum_exp(logits.clone()), rest, gather(&entries.labels, 1)];
    if width > 0 {
        let counted = Tensor::<2>::from_data(TensorData::new(counted, [rows, width]), &device);
        columns.push(gather(&entries.kept, width) * counted);
    }
    Tensor::cat(columns, 1)
}

/// Cross-entropy of each row's label, summed over the rows: ordinary language-model loss.
///
/// # Shapes
/// - `logits` `[N, V]`, N labels, result `[1]`
pub fn hard_cross_entropy_sum(logits: Tensor<2>, labels: Vec<u32>) -> Tensor<1> {
    let columns = logsumexp_gather(logits, &RowEntries::labels(labels));
    (columns.clone().narrow(1, 0, 1) - columns.narrow(1, 2, 1)).sum()
}

#[derive(Debug)]
struct LogsumexpGather {
    entries: RowEntries,
}

impl HostOp for LogsumexpGather {
    fn names(&self) -> [&'static str; 2] {
        ["log-sum-exp", "log-sum-exp backward"]
    }

    fn forward(&self, inputs: &[HostArray<'_>]) -> Forward {
        let logits = inputs[0];
        let (rows, vocab, width) = (logits.shape[0], logits.width(), self.entries.width());
        let mut output = vec![0.0; rows * (3 + width)];
        output.par_chunks_mut(3 + width).enumerate().for_each_init(
            || vec![0.0; vocab],
            |rest, (row, output)| {
                let values = &logits.data[row * vocab..][..vocab];
                let kept = self.entries.kept_of(row);
                let largest = max(values);
                output[2] = values[self.entries.labels[row] as usize];
                if kept.is_empty() {
                    output[0] = largest + sum_exp(values, largest).ln();
                    output[1] = output[0];
                    return;
                }
                rest.copy_from_slice(values);
                let mut kept_sum = 0.0;
                for (output, &id) in output[3..].iter_mut().zip(kept) {
                    *output = values[id as usize];
                    kept_sum += (*output - largest).exp();
                    rest[id as usize] = f32::NEG_INFINITY;
                }
                // Each side is summed relative to its own largest, so that a tail of any smallness keeps its digits.
                let rest_largest = max(rest);
                if rest_largest == f32::NEG_INFINITY {
                    output[0] = largest + kept_sum.ln();
                    output[1] = LOG_NOTHING;
                    return;
                }
                let rest_sum = sum_exp(rest, rest_largest);
                output[0] = largest + (kept_sum + rest_sum * (rest_largest - largest).exp()).ln();
                output[1] = rest_largest + rest_sum.ln();
            },
        );
        let saved = output.chunks(3 + width).flat_map(|row| [row[0], row[1]]).collect();
        Forward { shape: vec![rows, 3 + width], data: output, saved }
    }

    fn backward(
        &self,
        inputs: &[HostArray<'_>],
        saved: &[f32],
        grad: &[f32],
        needed: &[bool],
    ) -> Vec<Option<Vec<f32>>> {
        if !needed[0] {
            return vec![None];
        }
        let logits = inputs[0];
        let (vocab, width) = (logits.width(), self.entries.width());
        let mut logits_grad = vec![0.0; logits.data.len()];
        logits_grad.par_chunks_mut(vocab).enumerate().for_each(|(row, logits_grad)| {
            let grad = &grad[row * (3 + width)..][..3 + width];
            let values = &logits.data[row * vocab..][..vocab];
            let (all, rest) = (saved[2 * row], saved[2 * row + 1]);
            // d/dz_v = g_all e^(z_v - all) + [v not kept] g_rest e^(z_v - rest): one coefficient outside the kept ids.
            let outside = if rest > LOG_NOTHING { grad[0] + grad[1] * (all - rest).exp() } else { grad[0] };
            if outside != 0.0 {
                scaled_exp(values, all, outside, logits_grad);
            }
            for (&id, &grad_entry) in self.entries.kept_of(row).iter().zip(&grad[3..]) {
                logits_grad[id as usize] = grad[0] * (values[id as usize] - all).exp() + grad_entry;
            }
            logits_grad[self.entries.labels[row] as usize] += grad[2];
        });
        vec![Some(logits_grad)]
    }
}
